"""`observe pointing of caap in object`: agreement of maps with regions, against references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.rules.observations.maps import build_grids

from ..reference.hooks import Change
from . import support
from .support import GRID, PATCH, SIDE
from .test_regions import UNRESIZED

Array = NDArray[np.float64]
CORNERS = {"vit": (0, 0), "clip": (7, 1)}
"""(top, left) of the crop of the images."""
BOXES = ((3, 9, 9, 18), (1, 8, 15, 13), (9, 11, 18, 22), (0, 0, 2, 2), (6, 7, 11, 16))
"""In pixels of the file; the fourth is outside the crop of CLIP's processor."""
BLOCKS = """
images scenes {
  rows "boxes.jsonl"
  image "{file}"
  answer "{label}"
  wrong "{other}"
  region object = box
}
images neutral { image gray }
"""
CAAP = support.experiment(
    "caap", "from scenes into neutral", "patch resid_post layer 0 at each token of image"
)
MAPS = CAAP + support.experiment("left", "ablate embed at each token of image with zero")


def labels(row: int) -> tuple[str, str]:
    """(answer, wrong)."""
    return support.LABELS[row % 4], support.LABELS[(row + 2) % 5]


def write_boxes(folder: Path, name: str, boxes: Sequence[object] = BOXES) -> None:
    random = np.random.default_rng(4)
    records: list[dict[str, object]] = []
    for number, box in enumerate(boxes):
        pixels = random.integers(0, 256, (*UNRESIZED[name], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"box{number}.png")
        answer, wrong = labels(number)
        records.append({"file": f"box{number}.png", "box": box, "label": answer, "other": wrong})
    text = "\n".join(map(json.dumps, records)) + "\n"
    (folder / "boxes.jsonl").write_text(text, encoding="utf-8")


def run(name: str, folder: Path, text: str) -> dict[str, ExperimentResult]:
    write_boxes(folder, name)
    return support.run_file(text, folder, name, blocks=BLOCKS)


def looking(name: str, *lines: str) -> str:
    every = ("model m", "images scenes", *lines)
    return f"experiment {name} {{\n" + "\n".join(f"  {line}" for line in every) + "\n}\n"


def masks(name: str) -> list[NDArray[np.bool_]]:
    """[SIDE, SIDE] of each row: the box painted at the file's size, then cropped."""
    top, left = CORNERS[name]
    found: list[NDArray[np.bool_]] = []
    for x, y, right, bottom in BOXES:
        whole = np.zeros(UNRESIZED[name], bool)
        whole[y:bottom, x:right] = True
        found.append(whole[top : top + SIDE, left : left + SIDE])
    return found


def maps(result: ExperimentResult) -> Array:
    """[row, row of patches, column] of an experiment over all patches."""
    data = result.measures[0]
    assert len(data.patched) == GRID * GRID
    return (data.patched - data.base).T.reshape(-1, GRID, GRID)


def inside(mask: NDArray[np.bool_], row: int, col: int) -> float:
    """The share of a patch's pixels."""
    return float(mask[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH].mean())


def pointing(values: Array, mask: NDArray[np.bool_]) -> float:
    row, col = divmod(int(np.nanargmax(values)), GRID)
    return float(inside(mask, row, col) >= 0.5)


def mass(values: Array, mask: NDArray[np.bool_]) -> float:
    within = whole = 0.0
    for row in range(GRID):
        for col in range(GRID):
            if values[row, col] > 0:
                whole += values[row, col]
                within += values[row, col] * inside(mask, row, col)
    return within / whole if whole else float("nan")


def iou(values: Array, mask: NDArray[np.bool_], count: int) -> float:
    painted = np.zeros((SIDE, SIDE), bool)
    for place in np.argsort(-values.ravel())[:count]:
        row, col = divmod(int(place), GRID)
        painted[row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH] = True
    return float((painted & mask).sum() / (painted | mask).sum())


def own_count(mask: NDArray[np.bool_]) -> int:
    return max(1, int(mask.mean() * GRID * GRID + 0.5))


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pointing_mass_and_iou_of_maps_equal_reference(name: str, tmp_path: Path) -> None:
    text = MAPS + looking("at", "observe pointing of caap, left in object")
    text += looking("share", "observe mass of caap, left in object")
    text += looking("own", "observe iou of left, caap in object")
    text += looking("quarter", "observe iou of caap in object top 25%")
    found = run(name, tmp_path, text)
    regions = masks(name)
    there = [n for n, mask in enumerate(regions) if mask.any()]
    assert len(there) == (5 if name == "vit" else 4)
    for number, of in enumerate(("caap", "left")):
        values = maps(found[of])
        assert np.abs(values).max() > 0.1
        at, share, own = (found[each].measures for each in ("at", "share", "own"))
        for row, mask in enumerate(regions):
            if row not in there:
                assert all(np.isnan(each[0].patched[number, row]) for each in (at, share, own))
                continue
            chance = np.mean([inside(mask, *divmod(n, GRID)) >= 0.5 for n in range(GRID * GRID)])
            assert at[0].patched[number, row] == pointing(values[row], mask)
            assert at[1].patched[number, row] == pytest.approx(chance)
            assert share[0].patched[number, row] == pytest.approx(
                mass(values[row], mask), nan_ok=True
            )
            whole = mask.mean() if (values[row] > 0).any() else np.nan
            assert share[1].patched[number, row] == pytest.approx(whole, nan_ok=True)
            expected = iou(values[row], mask, own_count(mask))
            assert own[0].patched[1 - number, row] == pytest.approx(expected)
    quarter = found["quarter"].measures[0].patched
    values = maps(found["caap"])
    expected = [iou(values[row], regions[row], 4) for row in there]
    np.testing.assert_allclose(quarter[0, there], expected)
    every = [pointing(maps(found[of])[n], regions[n]) for of in ("caap", "left") for n in there]
    assert set(every) == {0, 1} or name != "clip"  # both outcomes occur


def test_each_range_of_layers_has_a_map(tmp_path: Path) -> None:
    rule = "for a in 0..1 { for b in a..1 { patch resid_pre layers a..b at each token of image } }"
    text = support.experiment("ranges", "from scenes into neutral", rule)
    text += looking("at", "observe mass of ranges in object", "report heatmap a by b")
    text += looking("best", "ablate embed at best of ranges token with zero", support.DIFFERENCE)
    found = run("vit", tmp_path, text)
    data, regions = found["ranges"].measures[0], masks("vit")
    deltas = (data.patched - data.base).reshape(3, GRID * GRID, -1)
    assert len(found["at"].cells) == 3
    for cell in range(3):
        for row, mask in enumerate(regions):
            expected = mass(deltas[cell, :, row].reshape(GRID, GRID), mask)
            told = found["at"].measures[0].patched[cell, row]
            assert told == pytest.approx(expected, nan_ok=True)
    assert np.nanmax(np.ptp(found["at"].measures[0].patched, axis=0)) > 0.01
    best = deltas.max(0).argmax(0)
    for row in range(len(regions)):
        token = support.patches("vit")[int(best[row])]
        width = support.plain("vit", None).sites["embed", 0].shape[-1]
        zero = Change(token, 0, torch.zeros(width, dtype=torch.float64))
        seen = support.forward("vit", given("vit", tmp_path, row), {("embed", 0): [zero]}).output
        answer, wrong = (support.LABELS.index(name) for name in labels(row))
        changed = found["best"].measures[0].patched[0, row]
        assert changed == pytest.approx(float(seen[answer] - seen[wrong]), abs=1e-4)


def test_mask_of_a_downsized_image_is_averaged(tmp_path: Path) -> None:
    """A pixel of the small image is in the region if at least two of four pixels are."""
    random = np.random.default_rng(1)
    records: list[dict[str, object]] = []
    whole = random.random((3, 2 * SIDE, 2 * SIDE)) < 0.5
    for row in range(3):
        pixels = random.integers(0, 256, (2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"box{row}.png")
        Image.fromarray(whole[row].astype(np.uint8) * 255).save(tmp_path / f"mask{row}.png")
        answer, wrong = labels(row)
        names = {"file": f"box{row}.png", "box": f"mask{row}.png"}
        records.append({**names, "label": answer, "other": wrong})
    text = "\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / "boxes.jsonl").write_text(text, encoding="utf-8")
    text = CAAP + looking("share", "observe mass of caap in object")
    found = support.run_file(text, tmp_path, "vit", blocks=BLOCKS)
    small = whole.reshape(3, SIDE, 2, SIDE, 2).mean((2, 4)) >= 0.5
    values = maps(found["caap"])
    expected = [mass(values[row], small[row]) for row in range(3)]
    np.testing.assert_allclose(found["share"].measures[0].patched[0], expected)


def test_auc_does_not_depend_on_the_order_of_values(tmp_path: Path) -> None:
    area = "measure logit(answer) - logit(wrong) as raw auc over k"
    text = CAAP
    for name, ks in (("sorted", "0, 2, 7"), ("other", "7, 0, 2")):
        rule = f"for k in [{ks}] {{ ablate embed at top k of caap tokens with zero }}"
        text += support.experiment(f"in_{name}", rule, measure=area)
    found = run("vit", tmp_path, text)
    one, two = (found[name].measures[0].patched for name in ("in_sorted", "in_other"))
    np.testing.assert_allclose(one, two)
    assert np.abs(one - found["in_sorted"].measures[0].base).min() > 1e-3


def test_curve_with_a_cell_that_writes_nothing_has_no_random_targets(tmp_path: Path) -> None:
    rule = "for k in [0, 2] { ablate embed at top k of caap tokens with zero }"
    measure = "measure logit(answer) - logit(wrong) as raw auc over k"
    text = CAAP + support.experiment("e", "against random(3)", rule, measure=measure)
    write_boxes(tmp_path, "vit")
    result, diagnostics = support.try_file(text, tmp_path, "vit", blocks=BLOCKS)
    assert result is not None
    assert "e" not in {each.name for each in result.experiments}
    (error,) = (each for each in diagnostics if each.severity == "error")
    assert "over `k` has a cell without other targets" in f"{error.message} {error.label_text}"
    found = run("vit", tmp_path, text.replace("  against random(3)\n", ""))
    assert found["e"].conventions["controls"] == "none"


def test_map_of_part_of_the_image_equals_reference(tmp_path: Path) -> None:
    rule = "patch resid_post layer 0 at image row 1..2 col 2..4 token"
    text = support.experiment("part", "from scenes into neutral", rule)
    text += looking("at", "observe pointing of part in object")
    text += looking("own", "observe iou of part in object")
    found = run("vit", tmp_path, text)
    data = found["part"].measures[0]
    deltas = (data.patched - data.base).reshape(2, 3, -1)
    for row, mask in enumerate(masks("vit")):
        values = np.full((GRID, GRID), np.nan)
        values[:2, 1:] = deltas[..., row]
        at, own = found["at"].measures, found["own"].measures
        chance = np.mean([inside(mask, r, c) >= 0.5 for r in range(2) for c in range(1, 4)])
        assert at[0].patched[0, row] == pointing(values, mask)
        assert at[1].patched[0, row] == pytest.approx(chance)
        expected = iou(values, mask, min(6, own_count(mask)))
        assert own[0].patched[0, row] == pytest.approx(expected)


def test_rows_missing_from_the_map_are_reported(tmp_path: Path) -> None:
    text = CAAP.replace("images scenes", "images scenes limit 3")
    text += looking("at", "observe pointing of caap in object")
    found = run("vit", tmp_path, text)
    assert np.isfinite(found["at"].measures[0].patched).sum() == 3
    assert "2 of 5 rows dropped, because `caap` lacks them" in found["at"].conventions["observed"]


def test_rows_missing_from_the_observing_experiment_are_omitted(tmp_path: Path) -> None:
    text = CAAP + looking("every", "observe pointing of caap in object")
    few = looking("few", "observe pointing of caap in object").replace("scenes", "scenes limit 3")
    found = run("vit", tmp_path, text + few)
    here = found["few"].row_ids
    assert here is not None
    whole = found["every"].measures[0].patched[0, list(here)]
    np.testing.assert_array_equal(found["few"].measures[0].patched[0], whole)
    assert "dropped" not in found["few"].conventions["observed"]


def test_mass_of_a_map_without_positive_values_drops_rows(tmp_path: Path) -> None:
    """A row is dropped if none of its maps has a value; named maps are reported separately."""
    rule = "for k in [1, 2] { scale embed at each token of image by k }"
    text = support.experiment("grown", rule)
    text += looking("both", "observe mass of grown in object")
    text += looking("named", "observe mass of grown(k: 1), grown(k: 2) in object")
    found = run("vit", tmp_path, text)
    both, named = (found[name].measures[0].patched for name in ("both", "named"))
    np.testing.assert_array_equal(both, named)
    assert np.isfinite(both).all(1).tolist() == [False, True]
    said = {name: found[name].conventions["observed"] for name in ("both", "named")}
    assert "dropped" not in said["both"]
    assert "5 of 5 rows dropped, where `grown(k: 1)` has no value above 0" in said["named"]
    assert "`grown(k: 2)` is" not in said["named"]


def test_grid_means_skip_windows_without_a_value() -> None:
    """The second window has no value in the first cell, and one row isn't observed."""
    reader, nan = support.shared("vit").tokenizer, np.nan
    one, two, three = support.patches("vit")[:3]
    numbers = {
        7: ([4.0, 4.0], [nan, 2.0], [6.0, 6.0]),
        8: ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),
    }
    places = [
        (row, tokens, np.array(own))
        for row, each in numbers.items()
        for tokens, own in zip([(one, two), (two, three), (three,)], each, strict=True)
    ]
    work = SimpleNamespace(
        model=SimpleNamespace(tokenizer=reader),
        table=SimpleNamespace(row_ids=(7,)),
        experiment=SimpleNamespace(base="clean"),
    )
    part = SimpleNamespace(by_place=lambda run: iter(places))
    found = build_grids(cast(Any, part), cast(Any, work))
    assert list(found) == [7]
    np.testing.assert_array_equal(found[7][:, 0, :3], [[2, 2, 6], [2, 1.5, 3.5]])
    assert np.isnan(found[7][:, 1:]).all()


def given(name: str, folder: Path, row: int) -> torch.Tensor:
    image = Image.open(folder / f"box{row}.png")
    return support.processor(name)(image, return_tensors="pt")["pixel_values"].double()


def trapezoids(at: list[float], heights: list[float]) -> float:
    pairs = list(zip(at, heights, strict=True))
    area = sum((b - a) * (y + x) / 2 for (a, x), (b, y) in pairwise(pairs))
    return area / (at[-1] - at[0])


@pytest.mark.parametrize("name", ["vit", pytest.param("clip", marks=pytest.mark.slow)])
def test_insertion_and_deletion_curves_equal_hooks(name: str, tmp_path: Path) -> None:
    """Patches are replaced step by step in the order of each of two maps."""
    shares = [0.0, 25, 50, 75, 100]
    loops = "for m in [caap, chance] { for k in 0%..100% step 25% {"
    rule = f"{loops} patch embed at top k of m tokens }} }}"
    area = "measure logit(answer) - logit(wrong) as raw auc over k"
    text = CAAP + looking("drawn", "observe random embed at each token of image as chance")
    for way, sides in (("inserted", "scenes into neutral"), ("deleted", "neutral into scenes")):
        text += support.experiment(way, f"from {sides}", rule, measure=support.DIFFERENCE)
        text += support.experiment(f"{way}_area", f"from {sides}", rule, measure=area)
    text += looking("told", "observe pointing of caap, chance in object")
    found = run(name, tmp_path, text)
    neutral = support.plain(name, None)
    orders = [maps(found["caap"]), found["drawn"].measures[0].patched.T]
    for row in range(len(BOXES)):
        answer, wrong = (support.LABELS.index(label) for label in labels(row))
        own = support.forward(name, given(name, tmp_path, row))
        for number, values in enumerate(orders):
            order = np.argsort(-values[row].ravel(), kind="stable")
            for way, source, pixels in (
                ("inserted", own, support.pixels(name, None)),
                ("deleted", neutral, given(name, tmp_path, row)),
            ):
                curve: list[float] = []
                for share in shares:
                    best = order[: int(share / 100 * GRID * GRID + 0.5)]
                    tokens = [support.patches(name)[n] for n in best]
                    writes = {("embed", 0): support.copied(source, "embed", 0, tokens)}
                    seen = support.forward(name, pixels, writes if tokens else None).output
                    curve.append(float(seen[answer] - seen[wrong]))
                told = found[way].measures[0].patched.reshape(2, 5, -1)[number, :, row]
                np.testing.assert_allclose(told, curve, atol=1e-4)
                whole = found[f"{way}_area"].measures[0].patched[number, row]
                assert whole == pytest.approx(trapezoids(shares, curve), abs=1e-4)
                assert np.ptp(curve) > 0.05
    told = [cell.coords["map"] for cell in found["told"].cells]
    assert told == ["caap", "chance"]
    named = [cell.coords["m"] for cell in found["inserted_area"].cells]
    assert named == ["caap", "chance"]
    assert found["inserted_area"].conventions["auc"].startswith("over k, per row, of 5 cells")


def test_random_map_depends_on_row_patch_and_seed(tmp_path: Path) -> None:
    text = looking("drawn", "observe random embed at each token of image")
    values = run("vit", tmp_path, text)["drawn"].measures[0].patched
    assert len(np.unique(values)) == values.size
    assert (values >= 0).all()
    assert (values < 1).all()
    assert 0.3 < values.mean() < 0.7
    again = run("vit", tmp_path, text)["drawn"].measures[0].patched
    np.testing.assert_array_equal(values, again)
    other = run("vit", tmp_path, f"seed 5\n{text}")["drawn"].measures[0].patched
    assert np.abs(values - other).min() > 0


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (("patch embed at top k of m tokens",), "E0612", "values of `m` are words, such as `caap`"),
        (("patch embed at top 2 of m tokens",), "E0612", "no axis `k`"),
    ],
)
def test_auc_over_words_or_an_unknown_axis_is_rejected(
    lines: tuple[str, ...], code: str, said: str, tmp_path: Path
) -> None:
    (rule,) = lines
    over, loop = ("m", "for k in [1, 2] { ") if " k " in rule else ("k", "")
    rule = f"for m in [caap, left] {{ {loop}{rule} }}" + (" }" if loop else "")
    measure = f"measure logit(answer) as raw auc over {over}"
    text = MAPS + support.experiment("e", "from scenes into neutral", rule, measure=measure)
    write_boxes(tmp_path, "vit")
    result, problems = support.try_file(text, tmp_path, "vit", blocks=BLOCKS)
    assert result is None
    (problem,) = (d for d in problems if d.severity == "error")
    assert problem.code == code
    assert said in problem.message + problem.label_text


def test_loop_variable_of_experiments_is_unknown_outside_the_loop(tmp_path: Path) -> None:
    rule = "for m in [some, others] { ablate top 1 of m at cls token with zero }"
    lines = (rule, "against random(2) except top 1 of m")
    sweep = "ablate z layer * head * at cls token with zero"
    text = "".join(support.experiment(name, sweep) for name in ("some", "others"))
    write_boxes(tmp_path, "vit")
    result, problems = support.try_file(
        text + support.experiment("e", *lines), tmp_path, "vit", blocks=BLOCKS
    )
    assert result is None
    assert [d.code for d in problems if d.severity == "error"] == ["E0620"]


def test_loop_over_experiments_selects_the_best_site_of_each(tmp_path: Path) -> None:
    rule = "for m in [early, others] { ablate best of m at cls token with zero }"
    sweep = "ablate z layer 0 head * at {} with zero"
    text = support.experiment("early", sweep.format("cls token"))
    text += support.experiment("others", sweep.format("image tokens"))
    found = run("vit", tmp_path, text + support.experiment("e", rule))
    for number, name in enumerate(("early", "others")):
        data = found[name].measures[0]
        best = int((data.patched - data.base).mean(1).argmax())
        cell = found["e"].cells[number]
        assert (cell.coords["m"], cell.site) == (name, found[name].cells[best].site)
        expected = found["early"].measures[0].patched[best]
        np.testing.assert_allclose(found["e"].measures[0].patched[number], expected, atol=1e-5)


def test_loop_over_cells_of_maps_uses_the_order_of_each_map(tmp_path: Path) -> None:
    """Also covers coordinates given after the loop variable, as in `m(c: "mlp_out")`."""
    swept = "ablate c layer l at each token of image with zero"
    swept = f"for l in 0..1 {{ for c in [mlp_out, attn_out] {{ {swept} }} }}"
    text = support.experiment("every", swept) + CAAP
    text += looking("drawn", "observe random(2) embed at each token of image as chance")
    rule = "ablate embed at top 2 of {} tokens with zero"
    named = ['every(l: final, c: "attn_out")', "chance(draw: 2)", "caap"]
    text += "param final = 1\n"
    text += support.experiment("e", f"for m in [{', '.join(named)}] {{ {rule.format('m')} }}")
    rule = rule.format('m(c: "mlp_out")')
    text += support.experiment("deep", f"for m in [every(l: 0), every(l: 1)] {{ {rule} }}")
    found = run("vit", tmp_path, text)
    data = found["every"].measures[0]
    deltas = (data.patched - data.base).reshape(2, 2, GRID * GRID, -1)
    drawn = found["drawn"].measures[0].patched.reshape(GRID * GRID, 2, -1)
    fine = found["caap"].measures[0]
    wanted = {
        "e": [deltas[1, 1], drawn[:, 1], fine.patched - fine.base],
        "deep": [deltas[0, 0], deltas[1, 0]],
    }
    for name, orders in wanted.items():
        for row in range(len(BOXES)):
            for values, told in zip(orders, found[name].measures[0].patched[:, row], strict=True):
                tokens = [support.patches("vit")[int(n)] for n in np.argsort(-values[:, row])[:2]]
                width = support.plain("vit", None).sites["embed", 0].shape[-1]
                zero = torch.zeros(width, dtype=torch.float64)
                writes = {("embed", 0): [Change(token, 0, zero) for token in tokens]}
                seen = support.forward("vit", given("vit", tmp_path, row), writes).output
                answer, wrong = (support.LABELS.index(label) for label in labels(row))
                assert told == pytest.approx(float(seen[answer] - seen[wrong]), abs=1e-4)
    assert [cell.coords["m"] for cell in found["e"].cells] == named
    picked = "every(l: 1, c: attn_out)"
    assert found["e"].cells[0].position == f"top 2 of {picked} tokens"
    assert f"top 2 of {named[0]} tokens" in found["e"].conventions


def test_loop_over_an_unknown_experiment_is_rejected(tmp_path: Path) -> None:
    rule = "for m in [caap, nothing] { patch embed at top 2 of m tokens }"
    text = MAPS + support.experiment("e", "from scenes into neutral", rule)
    write_boxes(tmp_path, "vit")
    result, problems = support.try_file(text, tmp_path, "vit", blocks=BLOCKS)
    assert result is None
    assert [d.code for d in problems if d.severity == "error"] == ["E0201"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (looking("e", "observe pointing of caap in thing"), "E0201", "thing"),
        (looking("e", "observe pointing of nothing in object"), "E0201", "nothing"),
        (looking("e", "observe pointing of caap in object top 25%"), "E0207", "takes no `top`"),
        (looking("e", "observe iou of caap in object top 0%"), "E0207", "0% of the patches"),
        (looking("e", "observe norm of caap in object"), "E0207", "needs a site"),
        (looking("e", "observe pointing resid_post layer 0"), "E0207", "reads maps"),
        (looking("e", "observe pointing of caap, over in object"), "E0207", "a map for each layer"),
        (looking("e", "observe pointing of whole in object"), "E0207", "doesn't sweep positions"),
        (
            looking("e", "observe pointing of front in object"),
            "E0207",
            "`cls`, which isn't a patch",
        ),
        (
            looking(
                "e",
                "observe pointing of caap in object",
                "ablate embed at cls token with zero",
                "measure logit(answer) as delta",
            ),
            "E0207",
            "which rules don't change",
        ),
    ],
)
def test_invalid_map_observation_is_rejected(
    text: str, code: str, said: str, tmp_path: Path
) -> None:
    others = support.experiment(
        "over", "ablate z layer 0..1 head 0 at each token of image with zero"
    )
    others += support.experiment("whole", "ablate embed at image tokens with zero")
    others += support.experiment("front", "ablate embed at token * with zero")
    write_boxes(tmp_path, "vit")
    result, problems = support.try_file(MAPS + others + text, tmp_path, "vit", blocks=BLOCKS)
    assert result is None
    assert [d.code for d in problems if d.severity == "error"] == [code]
    (problem,) = (d for d in problems if d.severity == "error")
    assert said in f"{problem.message} {problem.label_text} {problem.span and problem.span.text}"
