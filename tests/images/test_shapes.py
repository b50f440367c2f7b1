"""Generated images: the mask covers the shapes, and a seed determines the pixels."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.random import default_rng
from scipy import ndimage

from mechdsl.images.picture import GridLayout
from mechdsl.images.pixels import (
    COLOUR_SPREAD,
    MARKS,
    SHAPE_COLOURS,
    SHAPES,
    TEXTURE_NOISE,
    TEXTURES,
    ShapesDrawing,
    draw_grid,
    draw_shapes,
)

CASES = [(kind, n, size) for kind in SHAPES for n, size in ((1, 32), (3, 32), (9, 48), (1, 224))]
AREAS = {
    "circle": 0.785,
    "square": 1,
    "triangle": 0.5,
    "cross": 5 / 9,
    "diamond": 0.5,
    "ring": 0.59,
}


def boxes(drawn: ShapesDrawing) -> list[tuple[slice, slice]]:
    """Bounding boxes of the connected components of the mask."""
    labels, _ = ndimage.label(drawn.mask, np.ones((3, 3)))
    return [each for each in ndimage.find_objects(labels) if each is not None]


@pytest.mark.parametrize(("kind", "n", "size"), CASES)
def test_image_has_the_requested_number_and_kind_of_shapes(kind: str, n: int, size: int) -> None:
    for seed in range(20):
        drawn = draw_shapes(kind, n, size, default_rng(seed))
        assert drawn.pixels.shape == (size, size, 3)
        assert (drawn.pixels.dtype, drawn.mask.dtype) == (np.uint8, np.bool_)
        assert len(drawn.colours) == n
        found = boxes(drawn)
        assert len(found) == n
        sides = [max(rows.stop - rows.start, columns.stop - columns.start)
                 for rows, columns in found]  # fmt: skip
        if n == 1 and kind != "triangle":  # which is a pixel narrower where its side is odd
            assert size * 3 // 8 <= sides[0] <= size * 5 // 8
        if n == 1:
            assert drawn.mask.sum() / sides[0] ** 2 == pytest.approx(AREAS[kind], abs=0.12)


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_coloured_and_the_background_is_greyish(kind: str) -> None:
    for seed in range(20):
        drawn = draw_shapes(kind, 1, 32, default_rng(seed))
        away = abs(drawn.pixels.astype(int) - np.array(SHAPE_COLOURS[drawn.colours[0]])).max(-1)
        assert away[drawn.mask].max() <= COLOUR_SPREAD + TEXTURE_NOISE
        saturated = np.ptp(drawn.pixels.astype(int), axis=-1)
        assert saturated[~drawn.mask].max() < 70 < np.median(saturated[drawn.mask])


def test_each_kind_of_shape_has_a_distinct_mask() -> None:
    masks = {
        draw_shapes(kind, 1, 32, default_rng(5), colour="red").mask.tobytes() for kind in SHAPES
    }
    assert len(masks) == len(SHAPES)


def test_seeded_shapes_equal_pinned_digest() -> None:
    random = default_rng(18)
    digest = hashlib.sha256()
    for kind, n, size in CASES:
        drawn = draw_shapes(kind, n, size, random)
        digest.update(drawn.pixels.tobytes() + drawn.mask.tobytes())
    assert digest.hexdigest() == DIGEST


DIGEST = "dae6554a204e5fc2186ed01d6a267b18c8b8fb8d6350859ee45cc19a89f42aa4"


def test_positions_colours_sizes_and_textures_vary() -> None:
    random = default_rng(0)
    drawn = [draw_shapes("circle", 1, 32, random) for _ in range(400)]
    assert {each.colours[0] for each in drawn} == set(SHAPE_COLOURS)
    assert {each.texture for each in drawn} == set(TEXTURES)
    anywhere = np.logical_or.reduce([each.mask for each in drawn])
    assert anywhere[:-1].any(1).all()
    assert anywhere[:, :-1].any(0).all()
    assert anywhere.mean() > 0.85  # circles don't reach the corners
    assert len({int(each.mask.sum()) for each in drawn}) == 9


def test_requested_colour_and_texture_are_drawn() -> None:
    for seed in range(10):
        drawn = draw_shapes("ring", 4, 32, default_rng(seed), colour="cyan", texture="plain")
        assert (drawn.kind, drawn.colours, drawn.texture) == ("ring", ("cyan",) * 4, "plain")
        around = drawn.pixels[~drawn.mask].astype(int)
        assert np.ptp(around, axis=0).max() <= 2 * TEXTURE_NOISE
        striped = draw_shapes("ring", 1, 32, default_rng(seed), texture="stripes")
        rows = np.ma.array(striped.pixels.mean(axis=-1), mask=striped.mask)
        assert rows.mean(axis=1).std() > 2 * rows.mean(axis=0).std()


def test_image_without_shapes_has_only_the_texture() -> None:
    drawn = draw_shapes("circle", 0, 32, default_rng(0))
    assert not drawn.mask.any()
    assert drawn.colours == ()


@pytest.mark.parametrize(
    ("kind", "n", "size", "named", "said"),
    [
        ("blob", 1, 32, {}, "unknown kind 'blob'; there are circle, square"),
        ("ring", 1, 32, {"colour": "pink"}, "unknown colour 'pink'; there are red"),
        ("ring", 1, 32, {"texture": "fur"}, "unknown texture 'fur'; there are plain"),
        ("ring", 50, 32, {}, "50 shapes don't fit into an image of 32 × 32 pixels"),
        ("ring", -1, 32, {}, "-1 shapes don't fit"),
        ("ring", 1, 4, {}, "1 shapes don't fit"),
    ],
)
def test_invalid_shape_is_rejected(
    kind: str, n: int, size: int, named: dict[str, str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        draw_shapes(kind, n, size, default_rng(0), **named)


# --- grids ----------------------------------------------------------------------------------------

GRID_ROWS = (("red circle", "", "blue cross"), ("", "green square", ""))


def test_grids_differ_only_in_the_cell_with_another_shape() -> None:
    other = (("red circle", "yellow square", "blue cross"), GRID_ROWS[1])
    first, second = (
        draw_grid(GridLayout(each, ("@", "#")), default_rng(3)) for each in (GRID_ROWS, other)
    )
    assert first.pixels.shape == (16, 32, 3)
    changed = (first.pixels != second.pixels).any(-1)
    assert changed[:8, 16:24].any()
    changed[:8, 16:24] = False
    assert not changed.any()
    again = draw_grid(GridLayout(GRID_ROWS, ("@", "#")), default_rng(3))
    assert np.array_equal(first.pixels, again.pixels)


@pytest.mark.parametrize("cell", [7, 8, 20])
def test_grid_cell_has_the_requested_colour_and_shape(cell: int) -> None:
    drawn = draw_grid(GridLayout(GRID_ROWS, cell=cell, noise=0), default_rng(0))
    assert drawn.pixels.shape == (2 * cell, 3 * cell, 3)
    for row, things in enumerate(GRID_ROWS):
        for column, thing in enumerate(things):
            place = (slice(row * cell, (row + 1) * cell), slice(column * cell, (column + 1) * cell))
            mask = drawn.mask[place]
            assert mask.any() == bool(thing)
            if not thing:
                continue
            colour, kind = thing.split()
            [where] = ndimage.find_objects(mask.astype(int))
            side = max(each.stop - each.start for each in where)
            assert cell * 5 // 8 <= side < cell
            assert mask.sum() / side**2 == pytest.approx(AREAS[kind], abs=0.25)
            away = abs(drawn.pixels[place][mask].astype(int) - np.array(SHAPE_COLOURS[colour]))
            assert away.max() <= COLOUR_SPREAD


def test_marks_and_lines_are_drawn_only_if_rows_have_marks() -> None:
    blank = (("", ""), ("", ""))
    without = draw_grid(GridLayout(blank, (), noise=0), default_rng(1)).pixels
    assert without.shape == (16, 24, 3)
    assert len(np.unique(without.reshape(-1, 3), axis=0)) == 1
    found = draw_grid(GridLayout(blank, ("&", "%"), noise=0), default_rng(1)).pixels
    for top, mark in ((1, "&"), (9, "%")):
        glyph = (found[top : top + 5, 1:6] == 250).all(-1)
        assert ["".join(".#"[int(each)] for each in line) for line in glyph] == list(MARKS[mark])
    assert (found[[7, 15]] == 20).all()


def test_grid_contrast_and_noise_scale_the_pixels() -> None:
    plain, faint, gone = (
        draw_grid(GridLayout((cells,), noise=0), default_rng(2)).pixels.astype(int)
        for cells in (("red circle",), ("red circle 50%",), ("red circle 0%",))
    )
    assert len(np.unique(gone.reshape(-1, 3), axis=0)) == 1
    np.testing.assert_allclose(faint, (plain + gone) / 2, atol=1)
    noisy, usual = (
        draw_grid(GridLayout((("",),), noise=level), default_rng(2)).pixels.astype(int)
        for level in (40, None)
    )
    assert 30 < abs(noisy - gone).max() <= 40
    assert abs(usual - gone).max() == TEXTURE_NOISE


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (GridLayout((("", ""), ("",))), "2, 1"),
        (GridLayout((("circle",),)), "'circle' isn't"),
        (GridLayout((("red blob",),)), "'red blob' isn't"),
        (GridLayout((("red ring 101%",),)), "'red ring 101%' isn't"),
        (GridLayout((("red ring 50% faint",),)), "50% faint' isn't"),
        (GridLayout((("",),), ("@", "#")), "1 row and 2 marks"),
        (GridLayout((("",),), ("!",)), "unknown mark '!'"),
    ],
)
def test_invalid_grid_is_rejected(layout: GridLayout, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        draw_grid(layout, default_rng(0))
