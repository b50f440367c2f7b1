"""Agreement of maps with masks, compared with values counted manually on small images."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.fits.agreement import (
    area_under_curve,
    chance_mass,
    f1,
    infidelity,
    iou,
    mask_auroc,
    mask_shares,
    pixel_patches,
    pointing_game,
    sensitivity,
)

NAN = float("nan")
CORNER = np.zeros((4, 6), np.bool_)
CORNER[:2, :3] = True  # 6 of 24 pixels, which is the first of 2 x 2 patches
VALUES = np.array([[0.9, 0.1], [-2.0, 0.3]])


def test_pixel_patches_assigns_each_pixel_to_a_patch() -> None:
    assert pixel_patches((2, 4), (1, 2)).tolist() == [[0, 0, 1, 1]] * 2
    assert pixel_patches((4, 2), (2, 1)).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    # 5 pixels in 2 patches: the third one is on the border, and belongs to the second patch
    assert pixel_patches((1, 5), (1, 2)).tolist() == [[0, 0, 1, 1, 1]]
    assert pixel_patches((224, 224), (14, 14))[16, 31] == 14 + 1
    with pytest.raises(ValueError, match="3 x 1 patches of an image of 2 x 4 pixels"):
        pixel_patches((2, 4), (3, 1))


def test_mask_shares_are_pixel_fractions_of_patches() -> None:
    assert mask_shares(CORNER, (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert mask_shares(CORNER, (1, 1)).tolist() == [[0.25]]
    assert mask_shares(CORNER, (1, 2)).tolist() == [[0.5, 0]]
    assert mask_shares(CORNER, (4, 3)).tolist() == [[1, 0.5, 0], [1, 0.5, 0], [0] * 3, [0] * 3]


def test_pointing_game_checks_the_patch_with_the_greatest_value() -> None:
    assert pointing_game(VALUES, CORNER) == 1
    assert pointing_game(-VALUES, CORNER) == 0  # the greatest value, not the greatest magnitude
    assert pointing_game(np.array([[0.9, 0.9], [0.0, 0.0]]), CORNER) == 0.5
    assert pointing_game(np.array([[NAN, 0.1], [-2.0, 0.3]]), CORNER) == 0
    assert np.isnan(pointing_game(np.full((2, 2), NAN), CORNER))
    # half of the left patch is in the mask, and a quarter of the image
    assert pointing_game(np.array([[1.0, 0.0]]), CORNER) == 1
    assert pointing_game(np.array([[1.0]]), CORNER) == 0


def test_mask_auroc_counts_pairs_and_ties() -> None:
    """One patch is in the mask; of three outside, one may tie or have no value."""
    assert mask_auroc(VALUES, CORNER) == 1
    assert mask_auroc(-VALUES, CORNER) == 0
    assert mask_auroc(np.array([[0.3, 0.3], [0.0, 0.9]]), CORNER) == 0.5
    assert mask_auroc(np.array([[0.3, NAN], [0.3, 0.1]]), CORNER) == 0.75
    assert np.isnan(mask_auroc(np.array([[NAN, 0.1], [0.2, 0.3]]), CORNER))
    assert np.isnan(mask_auroc(np.array([[1.0, NAN], [NAN, NAN]]), CORNER))


def test_iou_compares_the_top_patches_with_the_mask() -> None:
    assert iou(VALUES, CORNER) == 1  # a quarter of the image: one patch
    assert iou(-VALUES, CORNER) == 0
    # two patches, the first and the last: 6 pixels in both, 12 + 6 - 6 in either
    assert iou(VALUES, CORNER, share=0.5) == 0.5
    assert iou(VALUES, CORNER, share=1.0) == 0.25
    assert iou(VALUES, CORNER, share=0.01) == 1  # at least one
    # all are equal: a quarter of each pixel is taken, 1.5 in both, 6 + 6 - 1.5 in either
    assert iou(np.zeros((2, 2)), CORNER) == pytest.approx(1.5 / 10.5)
    # two tie for the second place: 6 + half of 6 are taken of the mask's 6 and others
    tied = np.array([[2.0, 1.0], [1.0, 0.0]])
    assert iou(tied, CORNER, share=0.5) == pytest.approx(6 / 12)
    assert iou(tied[::-1], CORNER, share=0.5) == pytest.approx(3 / (12 + 6 - 3))
    # patches without a number are never taken
    assert iou(np.array([[NAN, 0.1], [-2.0, 0.3]]), CORNER, share=1.0) == 0
    assert np.isnan(iou(np.full((2, 2), NAN), CORNER))


def test_iou_with_invalid_share_is_rejected() -> None:
    for share in (-0.1, 0.0, 1.1):
        with pytest.raises(ValueError, match=f"a share of {share:g} patches"):
            iou(VALUES, CORNER, share=share)


def test_area_under_curve_uses_trapezoids() -> None:
    at = np.array([0.0, 0.5, 1.0])
    # (1 + 0.5) / 2 * 0.5 + (0.5 + 0) / 2 * 0.5
    assert area_under_curve(np.array([1.0, 0.5, 0.0]), at) == pytest.approx(0.5)
    assert area_under_curve(np.array([1.0, 0.0, 0.0]), at) == pytest.approx(0.25)
    # steps of unequal size: (1 + 0) / 2 * 1 + 0, over 4
    assert area_under_curve(np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 4.0])) == pytest.approx(
        0.125
    )
    assert area_under_curve(np.array([[2.0, 2.0, 2.0], [0.0, 0.5, 1.0]]), at).tolist() == [2, 0.5]
    assert area_under_curve(np.array([3.0, 5.0]), np.array([10.0, 30.0])) == 4
    for steps in ([0.1, 0.2, 1.3], [0.1, 0.7, 1.8], [0.4, 0.6, 1.1, 1.5, 1.7]):
        assert area_under_curve(np.ones(len(steps)), np.array(steps)) == 1, "exactly"
    for wrong in ([0.0], [0.0, 0.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="two steps"):
            area_under_curve(np.ones(len(wrong)), np.array(wrong))


def test_infidelity_is_the_least_error_over_nonnegative_scales() -> None:
    taken = np.array([[[True, False], [False, False]], [[True, True], [False, False]]])
    # the map predicts 0.9 and 1.0; a scale of 2 matches both
    assert infidelity(VALUES, taken, np.array([1.8, 2.0])) == pytest.approx(0)
    assert infidelity(7 * VALUES, taken, np.array([1.8, 2.0])) == pytest.approx(0)
    # the least of (0.9 b - 1)^2 + (1.0 b)^2 is at b = 0.9 / 1.81
    scale = 0.9 / 1.81
    found = infidelity(VALUES, taken, np.array([1.0, 0.0]))
    assert found == pytest.approx(((0.9 * scale - 1) ** 2 + scale**2) / 2)
    # an opposite map is no better than an empty one
    assert infidelity(VALUES, taken, np.array([-1.8, -2.0])) == pytest.approx((1.8**2 + 4) / 2)
    assert infidelity(0 * VALUES, taken, np.array([1.8, 2.0])) == pytest.approx((1.8**2 + 4) / 2)
    lacking = np.array([[0.9, NAN], [0.2, 0.1]])
    assert np.isnan(infidelity(lacking, taken, np.array([1.8, 2.0])))
    assert np.isfinite(infidelity(lacking, taken[:1], np.array([1.8])))


def test_sensitivity_is_the_largest_relative_difference() -> None:
    values = np.array([[3.0, 4.0]])
    others = np.array([[[3.0, 4.0]], [[3.0, 5.0]], [[0.0, 4.0]]])
    assert sensitivity(values, others) == pytest.approx(3 / 5)
    assert sensitivity(10 * values, 10 * others) == pytest.approx(3 / 5)
    assert np.isnan(sensitivity(np.zeros((1, 2)), others))
    part, near = np.array([[3.0, np.nan]]), np.array([[[3.0, np.nan]], [[0.0, np.nan]]])
    assert sensitivity(part, near) == pytest.approx(1)
    assert np.isnan(sensitivity(values, near))


def test_f1_and_iou_of_tokens_ignore_missing_values() -> None:
    """One row of tokens; the fourth has no value."""
    values, mask = np.array([[0.9, 0.1, 0.5, NAN]]), np.array([[True, False, False, True]])
    assert f1(values, mask) == pytest.approx(2 * 1 / (2 + 2))
    assert f1(values, mask, 0.34) == pytest.approx(2 * 1 / (1 + 2))
    assert f1(-values, mask) == 0
    assert np.isnan(f1(np.full((1, 4), NAN), mask))
    assert iou(values, mask, 0.5) == pytest.approx(1 / 3), "half of three tokens: two of them"


def test_chance_mass_is_the_mask_share_of_patches_with_values() -> None:
    assert chance_mass(VALUES, CORNER) == pytest.approx(0.25)
    partial = np.array([[0.9, NAN], [-2.0, 0.3]])
    assert chance_mass(partial, CORNER) == pytest.approx(6 / 18)
    assert np.isnan(chance_mass(np.full((2, 2), NAN), CORNER))
