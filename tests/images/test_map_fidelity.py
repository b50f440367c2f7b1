"""`observe infidelity of caap to taken`: infidelity and sensitivity of maps, against references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.optimize import nnls

from ..reference.hooks import Change
from . import support
from .support import GRID, PATCH
from .test_maps import (
    BLOCKS,
    BOXES,
    CAAP,
    MAPS,
    Array,
    given,
    labels,
    looking,
    maps,
    run,
    write_boxes,
)

NEAR = BLOCKS.replace(
    "region object = box",
    "region object = box\n"
    "  corrupt near_1 { blur image radius 1 }\n  corrupt near_2 { mask object }",
)
DRAWN = looking("drawn", "observe random(3) embed at each token of image as chance")
TAKEN = DRAWN + support.experiment(
    "taken",
    "for k in [2, 5] { for d in 1..3 { replace top k of chance(draw: d) tokens with gray } }",
)
ROWS = 5


def without(name: str, pixels: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """The model's input with gray patches."""
    settings = support.PROCESSORS[name][1]
    painted = pixels.clone()
    for row, col in places:
        for channel in range(3):
            gray = (128 / 255 - settings["image_mean"][channel]) / settings["image_std"][channel]
            rows = slice(row * PATCH, (row + 1) * PATCH)
            painted[0, channel, rows, col * PATCH : (col + 1) * PATCH] = gray
    return painted


def difference(name: str, pixels: torch.Tensor, row: int, writes: object = None) -> float:
    seen = support.forward(name, pixels, writes).output  # type: ignore[arg-type]
    answer, wrong = (support.LABELS.index(label) for label in labels(row))
    return float(seen[answer] - seen[wrong])


def caap(name: str, pixels: torch.Tensor, row: int) -> Array:
    """Effect of patching each patch's vectors into the gray image, [row, column]."""
    source, gray = support.forward(name, pixels), support.pixels(name, None)
    base, found = difference(name, gray, row), np.zeros(GRID * GRID)
    for number, token in enumerate(support.patches(name)):
        changes = support.copied(source, "resid_post", 0, [token])
        found[number] = difference(name, gray, row, {("resid_post", 0): changes}) - base
    return found.reshape(GRID, GRID)


def left(name: str, pixels: torch.Tensor, row: int) -> Array:
    """Effect of setting each patch's embedding to zero, [row, column]."""
    base, found = difference(name, pixels, row), np.zeros(GRID * GRID)
    width = support.plain(name, None).sites["embed", 0].shape[-1]
    for number, token in enumerate(support.patches(name)):
        zero = Change(token, 0, torch.zeros(width, dtype=torch.float64))
        found[number] = difference(name, pixels, row, {("embed", 0): [zero]}) - base
    return found.reshape(GRID, GRID)


def least(sums: Sequence[float], falls: Sequence[float]) -> float:
    """Mean square of scale · sum − fall, minimised over scales of at least 0."""
    (scale,), _ = nnls(np.array(sums, dtype=np.float64)[:, None], np.array(falls))
    return float(np.mean((scale * np.array(sums) - falls) ** 2))


@pytest.mark.parametrize("name", ["vit", pytest.param("clip", marks=pytest.mark.slow)])
def test_infidelity_of_maps_equals_reference(name: str, tmp_path: Path) -> None:
    text = MAPS + TAKEN + looking("told", "observe infidelity of caap, left to taken as wrong")
    text += looking("one", "observe infidelity of left to taken(k: 5)")
    found = run(name, tmp_path, text)
    chance = found["drawn"].measures[0].patched.reshape(GRID * GRID, 3, ROWS)
    told, chances = (each.patched for each in found["told"].measures)
    anywhere: list[float] = []
    for row in range(0, ROWS, 2):
        pixels = given(name, tmp_path, row)
        base, falls = difference(name, pixels, row), list[float]()
        sets = list[list[tuple[int, int]]]()
        for count in (2, 5):
            for draw in range(3):
                best = np.argsort(-chance[:, draw, row])[:count]
                sets.append([divmod(int(n), GRID) for n in best])
                falls.append(base - difference(name, without(name, pixels, sets[-1]), row))
        np.testing.assert_allclose(
            chances[:, row], least(list(map(len, sets)), falls), rtol=1e-3, atol=1e-5
        )
        for number, values in enumerate((caap, left)):
            own = values(name, pixels, row)
            sums = [sum(own[place] for place in places) for places in sets]
            expected = least(sums, falls)
            assert told[number, row] == pytest.approx(expected, rel=1e-3, abs=1e-5)
            anywhere.append(expected / np.mean(np.square(falls)))
        got = found["one"].measures[0].patched[0, row]
        assert got == pytest.approx(least(sums[3:], falls[3:]), rel=1e-3, abs=1e-5)
    assert min(anywhere) < 0.9
    said = found["told"].conventions["observed"]
    assert (
        "the 6 sets of patches and the decrease of `logit(answer) - logit(wrong)` are those "
        "of `taken`" in said
    )
    assert found["told"].measures[0].unit == "logit²"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", pytest.param("clip", marks=pytest.mark.slow)])
def test_sensitivity_of_maps_equals_reference(name: str, tmp_path: Path) -> None:
    text = MAPS
    text += support.experiment(
        "near_caap",
        "from near_1, near_2 into neutral",
        "patch resid_post layer 0 at each token of image",
    )
    text += support.experiment(
        "near_left",
        "from neutral into near_1, near_2",
        "ablate embed at each token of image with zero",
    )
    text += looking("told", "observe sensitivity of caap, left to near_caap, near_left as moves")
    write_boxes(tmp_path, name)
    found = support.run_file(text, tmp_path, name, blocks=NEAR)
    told = found["told"].measures[0].patched
    for row in range(0, ROWS, 2):
        whole = Image.open(tmp_path / f"box{row}.png")
        soft, hidden = whole.filter(ImageFilter.GaussianBlur(1)), whole.copy()
        hidden.paste((128, 128, 128), BOXES[row])
        for number, values in enumerate((caap, left)):
            own = values(name, given(name, tmp_path, row), row)
            moved: list[float] = []
            for near in (soft, hidden):
                pixels = support.processor(name)(near, return_tensors="pt")["pixel_values"].double()
                moved.append(float(np.linalg.norm(values(name, pixels, row) - own)))
            expected = max(moved) / float(np.linalg.norm(own))
            assert told[number, row] == pytest.approx(expected, rel=1e-3)
            assert expected > 0.01
    assert "`near_caap` (2), `near_left` (2)" in found["told"].conventions["observed"]


SEVERAL = (
    ((4, 0, 8, 8), (8, 4, 16, 8), (12, 0, 16, 4)),
    ((0, 0, 4, 4),),
    ((0, 4, 8, 8), (12, 12, 16, 16)),
    ((4, 4, 8, 8), (40, 40, 44, 44)),
    ((4, 4, 8, 8), (8, 0, 12, 4)),
)
"""Boxes of whole patches for each row; one is outside its image."""


def in_box(box: tuple[int, ...]) -> tuple[slice, slice]:
    left, top, right, bottom = (each // PATCH for each in box)
    return slice(top, bottom), slice(left, right)


def test_infidelity_drops_rows_without_two_sets_of_patches(tmp_path: Path) -> None:
    """Sets without patches don't count."""
    objects = "for i in 1..3 { replace object i tokens with gray }"
    some = "for k in [2, 5] { replace top k of chance(draw: 1) tokens with gray }"
    text = CAAP + DRAWN + support.experiment("objects", objects)
    beside = objects.replace(" }", "  ablate embed at image row 4 col 1 token with zero }")
    text += support.experiment("beside", beside)
    text += support.experiment("kept", "keep logit(answer) - logit(wrong) > -5.5", objects)
    few = support.experiment("few", objects.replace("3", "2"))
    text += few.replace("images scenes", "images scenes limit 3")
    text += support.experiment("some", some)
    text += support.experiment("more", some.replace("[", "[0, "))
    rule = "patch resid_post layer 0 at image row 1..2 col 2..4 token"
    text += support.experiment("part", "from scenes into neutral", rule)
    for to in ("objects", "beside", "kept", "few", "some", "more"):
        text += looking(f"to_{to}", f"observe infidelity of caap to {to}")
    text += looking("of_part", "observe infidelity of part to objects")
    write_boxes(tmp_path, "vit", SEVERAL)
    found = support.run_file(text, tmp_path, "vit", blocks=BLOCKS)
    told = {name: each.measures[0].patched for name, each in found.items()}
    data, values = found["objects"].measures[0], maps(found["caap"])
    expected = np.full(ROWS, np.nan)
    for row in (0, 2, 4):
        sums = [values[row][in_box(box)].sum() for box in SEVERAL[row]]
        falls = (data.base - data.patched)[: len(sums), row]
        expected[row] = least(sums, falls.tolist())
    np.testing.assert_allclose(told["to_objects"][0], expected, rtol=1e-3)
    assert np.nanmin(expected) > 0.1
    np.testing.assert_array_equal(np.isnan(told["to_beside"][0]), np.isnan(expected))
    lacks = "2 of 5 rows dropped, which `objects` doesn't remove two different sets of patches from"
    assert lacks in found["to_objects"].conventions["observed"]
    for name in ("kept", "few"):
        assert found[name].row_ids == (2, 3, 4)
        here = np.array([row > 1 for row in range(ROWS)])
        np.testing.assert_allclose(
            told[f"to_{name}"][0], np.where(here, expected, np.nan), rtol=1e-3
        )
    np.testing.assert_allclose(told["to_more"], told["to_some"], rtol=1e-4)
    blank = "1 of 5 rows dropped, where `part` has no number for a removed patch"
    assert blank in found["of_part"].conventions["observed"]
    for measure in found["of_part"].measures:
        assert np.isfinite(measure.patched[0]).tolist() == [True, False, False, False, True]


def test_sensitivity_drops_rows_missing_from_the_perturbed_maps(tmp_path: Path) -> None:
    rules = ("from neutral into near_1", "ablate embed at each token of image with zero")
    near = support.experiment("near", *rules)
    text = MAPS + near + near.replace("near {", "few {").replace("scenes", "scenes limit 3")
    for to in ("near", "few"):
        text += looking(f"to_{to}", f"observe sensitivity of left to {to}")
    write_boxes(tmp_path, "vit")
    found = support.run_file(text, tmp_path, "vit", blocks=NEAR)
    whole, some = (found[name].measures[0].patched[0] for name in ("to_near", "to_few"))
    few = found["few"].row_ids
    assert few is not None
    assert len(few) == 3
    here = np.isin(range(ROWS), few)
    np.testing.assert_allclose(some, np.where(here, whole, np.nan), rtol=1e-5)
    assert ("2 of 5 rows dropped, because `few` lacks them") in found["to_few"].conventions[
        "observed"
    ]
    assert "dropped" not in found["to_near"].conventions["observed"]


def test_looped_maps_are_compared_cell_by_cell(tmp_path: Path) -> None:
    """Sensitivity compares equal cells of two loops; infidelity compares each cell to all sets."""
    rule = "patch resid_post layer {} at each token of image"
    loop = f"for l in 0..1 {{ {rule.format('l')} }}"
    text = MAPS + TAKEN
    for name, source, line in (
        ("at_0", "scenes", rule.format(0)),
        ("at_1", "scenes", rule.format(1)),
        ("every", "scenes", loop),
        ("near_at_1", "near_1", rule.format(1)),
        ("nearby", "near_1", loop),
    ):
        text += support.experiment(name, f"from {source} into neutral", line)
    text += looking("moves", "observe sensitivity of every to nearby")
    text += looking("wrong", "observe infidelity of every to taken")
    text += looking("alone", "observe sensitivity of at_1 to near_at_1")
    text += looking("picked", "observe sensitivity of every(l: 1), at_1 to nearby(l: 1), near_at_1")
    text += looking("two", "observe infidelity of at_0, at_1, every(l: 1) to taken")
    write_boxes(tmp_path, "vit")
    found = support.run_file(text, tmp_path, "vit", blocks=NEAR)
    values = {name: each.measures[0].patched for name, each in found.items()}
    assert [cell.coords["l"] for cell in found["moves"].cells] == [0, 1]
    np.testing.assert_allclose(values["moves"][1], values["alone"][0], rtol=1e-4)
    np.testing.assert_allclose(values["picked"], values["alone"][[0, 0]], rtol=1e-4)
    np.testing.assert_allclose(values["wrong"], values["two"][:2], rtol=1e-4)
    np.testing.assert_allclose(values["two"][1], values["two"][2], rtol=1e-4)
    assert found["two"].cells[2].coords["map"] == "every(l: 1)"
    assert np.abs(values["moves"][0] - values["moves"][1]).min() > 1e-3


def test_image_noise_differs_between_corruptions(tmp_path: Path) -> None:
    noise = BLOCKS.replace(
        "region object = box",
        "".join(f"\n  corrupt near_{n} {{ noise image by 8 }}" for n in (1, 2)),
    )
    text = support.experiment(
        "near", "from near_1, near_2 into neutral", "patch embed at each token of image"
    )
    write_boxes(tmp_path, "vit")
    found = support.run_file(text, tmp_path, "vit", blocks=noise)
    one, two = np.split(found["near"].measures[0].patched, 2)
    assert np.abs(one - two).max() > 1e-2


def test_each_draw_of_a_random_map_is_a_separate_map(tmp_path: Path) -> None:
    text = DRAWN + looking("again", "observe random(2) embed at each token of image as more")
    text += looking("plain", "observe random embed at each token of image as single")
    found = run("vit", tmp_path, text)
    three, two, one = (
        found[name].measures[0].patched.reshape(GRID * GRID, -1, ROWS)
        for name in ("drawn", "again", "plain")
    )
    np.testing.assert_array_equal(three[:, :2], two)
    every = np.concatenate([three, one], axis=1)
    assert len(np.unique(every)) == every.size
    assert [cell.coords["draw"] for cell in found["drawn"].cells[:3]] == [1, 2, 3]


OTHERS = (
    TAKEN
    + support.experiment("put", "from scenes into neutral",
                         "for d in 1..3 { patch embed at top 2 of chance(draw: d) tokens }")
    + support.experiment("single", "replace top 2 of chance(draw: 1) tokens with gray")
    + support.experiment("whole",
                         "for d in 1..2 { ablate resid_post layer d at tokens * with zero }")
    + support.experiment("grown", "for d in 1..2 { scale embed at image tokens by d }")
    + support.experiment("raw",
                         "for d in 1..3 { replace top 2 of chance(draw: d) tokens with gray }",
                         measure="measure logit(answer) as raw")
    + support.experiment("near", "from near_1 into neutral",
                         "patch resid_post layer 0 at each token of image")
    + support.experiment("far", "from near_1 into neutral",
                         "patch resid_post layer 1 at each token of image")
)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "infidelity of caap in object",
            "is compared with a different experiment, not with a region",
        ),
        ("pointing of caap to taken", "is compared with a region"),
        ("infidelity of caap to taken, put", "has 2 after `to`"),
        ("infidelity of caap to put", "`put` inserts patches into `neutral`"),
        ("infidelity of caap to single", "`single` removes only one set of patches"),
        ("infidelity of caap to whole", "`whole` changes `cls`, which isn't a patch"),
        ("infidelity of caap to grown", "`grown` removes no patches: it has `scale`"),
        ("infidelity of caap to raw", "`raw` doesn't measure the effect of removing patches"),
        ("infidelity of caap to drawn", "`drawn` removes no patches: it has `observe`"),
        ("infidelity of caap, chance to taken", "`drawn` has a map for each draw"),
        ("infidelity of caap(l: 1) to taken", "`caap` has no axis `l`"),
        ("infidelity of caap(l: n) to taken", "`n` is not a value of an axis"),
        ("sensitivity of caap, left to near", "has 1 after `to` for 2 maps"),
        ("sensitivity of caap to far", "`far` isn't computed like `caap`"),
        ("sensitivity of caap to left", "`left` isn't computed like `caap`"),
        ("sensitivity of caap to caap", "`caap` uses the same runs as `caap`"),
        ("random(0) embed at each token of image", "takes one whole number of draws, above 0"),
        ("random(2, 3) embed at each token of image", "takes one whole number of draws, above 0"),
    ],
)
def test_invalid_infidelity_or_sensitivity_is_rejected(
    line: str, said: str, tmp_path: Path
) -> None:
    write_boxes(tmp_path, "vit")
    text = MAPS + OTHERS + looking("e", f"observe {line}")
    result, problems = support.try_file(text, tmp_path, "vit", blocks=NEAR)
    assert result is None
    errors = [each for each in problems if each.severity == "error"]
    assert [each.code for each in errors] == ["E0207"]
    assert said in errors[0].message + errors[0].label_text


def test_invalid_loop_over_maps_is_rejected(tmp_path: Path) -> None:
    write_boxes(tmp_path, "vit")
    rule = "for m in [{}] {{ patch embed at top 2 of m tokens }}"
    one, two = (
        support.experiment("e", "from scenes into neutral", rule.format(maps))
        for maps in ("caap, 3", "chance(draw: 4), caap")
    )
    three = looking("f", "for d in 1..2 { observe pointing of chance(draw: d) in object }")
    nested = "for d in 1..2 { for m in [chance(draw: d)] { patch embed at top 2 of m tokens } }"
    five = support.experiment("f", "from scenes into neutral", nested)
    four = looking("f", "for m in [caap, left] { observe pointing of m in object }")
    for text, code, reason in (
        (one, "E0620", "`3` is not an experiment"),
        (two, "E0620", "`drawn` has no `draw: 4`"),
        (three, "E0207", "`d` is the variable of a `for`"),
        (four, "E0207", "`m` is the variable of a `for`"),
        (five, "E0620", "`d` in `chance(draw: d)` is neither"),
    ):
        result, problems = support.try_file(MAPS + DRAWN + text, tmp_path, "vit", blocks=BLOCKS)
        assert result is None
        errors = [each for each in problems if each.severity == "error"]
        assert [each.code for each in errors] == [code]
        assert reason in errors[0].message
