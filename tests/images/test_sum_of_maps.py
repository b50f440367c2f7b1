"""Windows of patches as maps, and `observe sum of fine, coarse at each token of image`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from . import support
from .support import GRID
from .test_maps import (
    BLOCKS,
    CAAP,
    Array,
    given,
    inside,
    labels,
    looking,
    maps,
    masks,
    mass,
    own_count,
    run,
    write_boxes,
)
from .test_maps import iou as overlap

TWO = "for r in 1..3 { for c in 1..3 { replace image row r..r + 1 col c..c + 1 tokens with gray } }"
"""Windows that overlap."""
FOUR = (
    "for r in [1, 3] { for c in [1, 3] { patch embed at image row r..r + 1 col c..c + 1 tokens } }"
)
WINDOWS = support.experiment("two", TWO) + support.experiment(
    "four", "from neutral into scenes", FOUR
)


def changes(result: ExperimentResult) -> Iterator[tuple[tuple[int, int], Array]]:
    """Top left patch of each window, from 0, and its effects [row]."""
    data = result.measures[0]
    for cell, change in zip(result.cells, data.patched - data.base, strict=True):
        yield (int(cell.coords["r"]) - 1, int(cell.coords["c"]) - 1), change


def spread(result: ExperimentResult) -> Array:
    """[row, row of patches, column]: a quarter of a window's value, averaged over windows."""
    rows = result.measures[0].patched.shape[1]
    found: dict[tuple[int, int], list[Array]] = {}
    for (top, left), change in changes(result):
        for row, col in ((top, left), (top + 1, left), (top, left + 1), (top + 1, left + 1)):
            found.setdefault((row, col), []).append(change / 4)
    values = np.full((rows, GRID, GRID), np.nan)
    for (row, col), each in found.items():
        values[:, row, col] = np.mean(each, axis=0)
    return values


def in_gray(values: Array, row: int, folder: Path) -> float:
    """The difference of logits with the three highest patches in gray."""
    tokens = [support.patches("vit")[int(n)] for n in np.argsort(-values.ravel())[:3]]
    gray = support.copied(support.plain("vit", None), "embed", 0, tokens)
    seen = support.forward("vit", given("vit", folder, row), {("embed", 0): gray}).output
    answer, wrong = (support.LABELS.index(name) for name in labels(row))
    return float(seen[answer] - seen[wrong])


@pytest.mark.parametrize("name", ["vit", pytest.param("clip", marks=pytest.mark.slow)])
def test_pointing_mass_and_iou_of_windows_equal_reference(name: str, tmp_path: Path) -> None:
    text = WINDOWS + looking("at", "observe pointing of two, four in object")
    text += looking("share", "observe mass of two in object")
    text += looking("own", "observe iou of two in object")
    found = run(name, tmp_path, text)
    told = 0
    for number, of in enumerate(("two", "four")):
        values = spread(found[of])
        assert np.isfinite(values).all()
        assert np.abs(values).max() > 0.02
        for row, mask in enumerate(masks(name)):
            if not mask.any():
                continue
            at = found["at"].measures[0].patched[number, row]
            highest = [
                divmod(int(n), GRID) for n in np.flatnonzero(values[row] == values[row].max())
            ]
            assert at == pytest.approx(np.mean([inside(mask, *place) >= 0.5 for place in highest]))
            told += 1
            if of == "four":
                assert len(highest) == 4
                continue
            share, own = (found[each].measures[0].patched[0, row] for each in ("share", "own"))
            assert share == pytest.approx(mass(values[row], mask), nan_ok=True)
            assert own == pytest.approx(overlap(values[row], mask, own_count(mask)))
    assert told >= 8


def test_sum_of_maps_equals_reference(tmp_path: Path) -> None:
    """The sum has maps of layers and windows with factors, and other statements use it."""
    layers = support.experiment(
        "layers", "from scenes into neutral", "patch resid_post layer 0..1 at each token of image"
    )
    line = "observe sum of caap, 0.5 * two, -2 * layers at each token of image as all"
    text = CAAP + WINDOWS + layers + looking("added", line, "report overlay top 2")
    text += looking("at", "observe mass of all, caap in object")
    text += support.experiment("best", "patch embed at top 3 of all tokens with neutral")
    found = run("vit", tmp_path, text)
    data = found["layers"].measures[0]
    each = (data.patched - data.base).reshape(2, GRID * GRID, -1).sum(0).T
    expected = maps(found["caap"]) + 0.5 * spread(found["two"])
    expected -= 2 * each.reshape(-1, GRID, GRID)
    result = found["added"]
    values = result.measures[0].patched.T.reshape(-1, GRID, GRID)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(values).max() > 0.1
    for row, mask in enumerate(masks("vit")):
        told = found["at"].measures[0].patched[0, row]
        assert told == pytest.approx(mass(values[row], mask), nan_ok=True)
        changed = found["best"].measures[0].patched[0, row]
        assert changed == pytest.approx(in_gray(values[row], row, tmp_path), abs=1e-4)
    said = result.conventions["observed"]
    assert "sum of caap, 0.5 * two, -2 * layers" in said
    assert "equally" in said


def test_factors_of_summed_maps_are_evaluated(tmp_path: Path) -> None:
    """Factors use parameters and loop variables; rules and observations use the summed maps."""
    line = "observe sum of (c - half) * caap, 1 / 2 * two at each token of image as all"
    text = "param half = 0.5\n" + CAAP + WINDOWS
    text += looking("added", f"for c in [0.5, 1, 3] {{ {line} }}", "report lines c")
    moved = "observe sum of d * caap, r * two at image row r col 2 token as some"
    text += looking("rows", f"for r in 2..3 {{ for d in r..3 {{ {moved} }} }}")
    text += looking("at", "observe mass of all in object")
    text += looking("one", "observe mass of all(c: 3) in object")
    rule = "for c in [1, 3] { patch embed at top 3 of all(c: c) tokens with neutral }"
    text += support.experiment("best", rule)
    found = run("vit", tmp_path, text)
    fine, coarse = maps(found["caap"]), spread(found["two"])
    expected = {c: (c - 0.5) * fine + 0.5 * coarse for c in (0.5, 1, 3)}
    values = found["added"].measures[0].patched.reshape(3, GRID, GRID, -1).transpose(0, 3, 1, 2)
    assert [cell.coords["c"] for cell in found["added"].cells[:: GRID * GRID]] == list(expected)
    np.testing.assert_allclose(values, list(expected.values()), rtol=1e-5, atol=1e-6)
    for cell, told in zip(found["rows"].cells, found["rows"].measures[0].patched, strict=True):
        r, d = int(cell.coords["r"]), int(cell.coords["d"])
        own = d * fine[:, r - 1, 1] + r * coarse[:, r - 1, 1]
        np.testing.assert_allclose(told, own, rtol=1e-5, atol=1e-6)
    assert len(found["rows"].cells) == 3
    for row, mask in enumerate(masks("vit")):
        masses = [mass(each[row], mask) for each in expected.values()]
        told, one = (found[name].measures[0].patched[:, row] for name in ("at", "one"))
        np.testing.assert_allclose(told, masses)
        np.testing.assert_allclose(one, masses[2:])
        for cell, c in enumerate((1, 3)):
            changed = found["best"].measures[0].patched[cell, row]
            assert changed == pytest.approx(in_gray(expected[c][row], row, tmp_path), abs=1e-4)


def test_sum_of_maps_drops_rows_missing_from_a_map(tmp_path: Path) -> None:
    text = CAAP.replace("images scenes", "images scenes limit 3") + WINDOWS
    text += looking("added", "observe sum of caap, two at each token of image")
    found = run("vit", tmp_path, text)["added"]
    assert (np.isfinite(found.measures[0].patched).sum(1) == 3).all()
    assert "2 of 5 rows dropped, because a map lacks them" in found.conventions["observed"]


def test_sum_of_maps_has_no_value_outside_all_windows(tmp_path: Path) -> None:
    rule = "for r in 1..3 { replace image row r..r + 1 col 2..3 tokens with gray }"
    text = CAAP + support.experiment("part", rule)
    text += looking("added", "observe sum of caap, part at each token of image")
    found = run("vit", tmp_path, text)["added"]
    values = found.measures[0].patched.T.reshape(-1, GRID, GRID)
    assert np.isnan(values[..., [0, 3]]).all()
    assert np.isfinite(values[..., 1:3]).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("observe sum of caap, two in object", "is itself a map"),
        ("observe sum resid_post layer 0 at each token of image", "reads maps"),
        ("observe pointing of caap at each token of image", "region"),
        ("observe pointing of 2 * caap in object", "no factor before a map"),
        ("observe sum of caap at cls token", "`cls token` isn't a patch"),
        ("observe sum of caap at image tokens", "covers several tokens"),
        ("observe sum of ordered at each token of image", "doesn't sweep positions"),
    ],
)
def test_invalid_sum_of_maps_is_rejected(line: str, said: str, tmp_path: Path) -> None:
    ordered = "for k in [1, 2] { ablate embed at top k of caap tokens with zero }"
    text = CAAP + WINDOWS + support.experiment("ordered", ordered) + looking("e", line)
    write_boxes(tmp_path, "vit")
    result, problems = support.try_file(text, tmp_path, "vit", blocks=BLOCKS)
    assert result is None
    (problem,) = (d for d in problems if d.severity == "error")
    assert problem.code == "E0207"
    assert said in f"{problem.message} {problem.label_text}"
