"""Patches and ablations of every site of every family, against plain hooks (A1, A8).

Prompts have different lengths, and the source's positions differ from the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.results.experiment_result import ExperimentResult

from ..models.families import VERIFIED
from ..quick import some
from ..reference.forward import SITES, WITHOUT_LAYER, Write
from ..reference.points import Point, copied, zeroed
from .support import (
    ABSOLUTE,
    DIFFERENCE,
    MODES,
    ROWS,
    Array,
    agree,
    bare,
    difference,
    differences,
    each_patched,
    experiment,
    patched,
    prompts,
    run_file,
    token,
    unpatched,
)

AT = "at {cue token, last token}"
LAYERS = range(3)
HEADS = {"q": 4, "k": 2, "v": 2, "z": 4, "head_out": 4}
SAME_HEADS = ("gpt2", "gpt_neox", "gpt_neox_sequential")
NEURONS = range(3, 25)


def sites(family: str) -> list[str]:
    return [s for s in SITES if not (s == "resid_mid" and family == "gpt_neox")]


def heads(family: str, site: str) -> int:
    return 4 if family in SAME_HEADS else HEADS[site]


def swept(family: str, site: str, layers: Sequence[int]) -> tuple[str, list[list[Point]]]:
    """A site with its axes as text, and the points of each cell in the order of the table."""
    if site in WITHOUT_LAYER:
        return site, [[Point(site)]]
    axis = "layer *" if len(layers) == 3 else f"layer {', '.join(map(str, layers))}"
    if site in HEADS:
        cells = [[Point(site, n, h)] for n in layers for h in range(heads(family, site))]
        return f"{site} {axis} head *", cells
    if site == "mlp_hidden":
        cells = [[Point(site, n, u) for u in NEURONS] for n in layers]
        return f"{site} {axis} neurons 3..24", cells
    return f"{site} {axis}", [[Point(site, n)] for n in layers]


def places(run: str) -> list[list[int]]:
    return [[p.cue, p.last] for p in prompts(run)]


Cells = tuple[tuple[Point, ...], ...]


def changed(
    family: str, cells: Cells, change: Callable[[int, tuple[Point, ...]], list[Write]]
) -> Array:
    """[cell, prompt]: values after the change of a cell to each clean row."""
    columns = []
    for row, (record, base) in enumerate(zip(ROWS, prompts(), strict=True)):
        edits = [change(row, points) for points in cells]
        every = each_patched(family, base, edits)
        columns.append([difference(logits, record) for logits in every])
    return np.array(columns).T


@cache
def expected_patch(family: str, cells: Cells) -> Array:
    def change(row: int, points: tuple[Point, ...]) -> list[Write]:
        base, source = prompts()[row], prompts("longer")[row]
        seen = unpatched(family, source)[1]
        return copied(points, seen, [source.cue, source.last], [base.cue, base.last])

    return changed(family, cells, change)


@cache
def expected_zero(family: str, cells: Cells) -> Array:
    def change(row: int, points: tuple[Point, ...]) -> list[Write]:
        base = prompts()[row]
        return zeroed(points, unpatched(family, base)[1], [base.cue, base.last])

    return changed(family, cells, change)


@cache
def expected_mean(family: str, cells: Cells) -> Array:
    """The mean over the clean rows, at the cue and at the last token separately."""
    every = [unpatched(family, p)[1] for p in prompts()]

    def change(row: int, points: tuple[Point, ...]) -> list[Write]:
        mean = {
            (p.site, p.layer): torch.stack(
                [seen[p.site, p.layer][at] for seen, at in zip(every, places("clean"), strict=True)]
            ).mean(0)
            for p in points
        }
        base = prompts()[row]
        return copied(points, mean, [0, 1], [base.cue, base.last])

    return changed(family, cells, change)


@cache
def expected_from(family: str, cells: Cells, donor: int) -> Array:
    """Every row with the activations of the clean row `donor`."""
    other = prompts()[donor]

    def change(row: int, points: tuple[Point, ...]) -> list[Write]:
        seen, base = unpatched(family, other)[1], prompts()[row]
        return copied(points, seen, [other.cue, other.last], [base.cue, base.last])

    return changed(family, cells, change)


def donors_of(family: str, cells: Cells, values: Array) -> list[int]:
    """The donor of each row, inferred from the values of all cells."""
    found = []
    for row, column in enumerate(values.T):
        near = [
            donor
            for donor in range(len(ROWS))
            if (abs(expected_from(family, cells, donor)[:, row] - column) <= ABSOLUTE).all()
        ]
        assert len(near) == 1, f"row {row} got the activations of the rows {near}"
        found.append(near[0])
    return found


FILLS = ("patch", "zero", "mean", "resample")


def file_of(
    family: str, layers: dict[str, Sequence[int]]
) -> tuple[str, dict[str, list[list[Point]]]]:
    """One experiment per site and fill, and the points of their cells."""
    parts: list[str] = []
    cells: dict[str, list[list[Point]]] = {}
    for site in sites(family):
        for fill in FILLS:
            written, points = swept(family, site, layers[fill])
            name = f"{fill}_{site}"
            rule = f"patch {written} {AT}"
            start = "from longer into clean"
            if fill != "patch":
                rule, start = f"ablate {written} {AT} with {fill}", ""
            parts.append(experiment(name, "prompts p", start, rule, DIFFERENCE))
            cells[name] = points
    return "".join(parts), cells


def compare(
    family: str, found: dict[str, ExperimentResult], cells: dict[str, list[list[Point]]]
) -> None:
    base = differences(family, ROWS)
    permutation: list[int] | None = None
    for name, lists in cells.items():
        fill = name.split("_")[0]
        points = tuple(map(tuple, lists))
        measure = found[name].measures[0]
        match fill:
            case "patch":
                expected = expected_patch(family, points)
            case "zero":
                expected = expected_zero(family, points)
            case "mean":
                expected = expected_mean(family, points)
            case _:
                donors = donors_of(family, points, measure.patched)
                permutation = permutation or donors
                assert donors == permutation, "one permutation serves a whole file"
                columns = [
                    expected_from(family, points, donor)[:, row] for row, donor in enumerate(donors)
                ]
                expected = np.array(columns).T
        agree(measure, expected, base, large=0.02)
    assert permutation is not None
    assert sorted(permutation) == list(range(len(ROWS)))
    assert all(donor != row for row, donor in enumerate(permutation)), "no row keeps its own"


@pytest.mark.parametrize("mode", ["plain", "planned"])
def test_resample_excludes_rows_whose_donor_lacks_the_position(folder: Path, mode: str) -> None:
    """Prompts have 4, 2, 3 and 5 items: a donor gives only its own items."""
    family, layers = "llama", (0, 1)
    cells = tuple((Point("resid_post", layer),) for layer in layers)
    rule = "ablate resid_post layer 0..1 at {} with resample"
    text = "".join(
        experiment(name, "prompts p", rule.format(at), DIFFERENCE)
        for name, at in (("all", AT.removeprefix("at ")), ("some", "each item token"))
    )
    found = run_file(text, folder, bare(family), MODES[mode])
    donors = donors_of(family, cells, found["all"].measures[0].patched)
    expected = np.full((len(layers), 5, len(ROWS)), np.nan)
    dropped = 0
    for row, donor in enumerate(donors):
        base, other = prompts()[row], prompts()[donor]
        seen = unpatched(family, other)[1]
        dropped += len(layers) * max(0, len(base.items) - len(other.items))
        for item, (to, of) in enumerate(zip(base.items, other.items, strict=False)):
            for layer in layers:
                edits = copied([Point("resid_post", layer)], seen, [of], [to])
                value = difference(patched(family, base, edits), ROWS[row])
                expected[layer, item, row] = value
    base_values = differences(family, ROWS)
    agree(found["some"].measures[0], expected.reshape(10, -1), base_values, large=0.02)
    said = f"{dropped} rows of cells left out: the other row lacks the position"
    assert found["some"].conventions["resample"] == said
    assert "resample" not in found["all"].conventions


QUICK = {"patch": (0, 1, 2), "zero": (1,), "mean": (0,), "resample": (1,)}
WHOLE = dict.fromkeys(FILLS, (0, 1, 2))


ALSO = {
    "gpt2": ("plain", "padded on the right"),
    "llama": ("plain", "padded on the right"),
}
"""Modes in addition to `planned`, in which all of these families run."""


@pytest.mark.parametrize(
    "family", some(["gpt2", "llama", "mistral", "qwen3", "gpt_neox"], ["gpt2", "qwen3"])
)
def test_patches_and_ablations_of_every_site_equal_hooks(family: str, folder: Path) -> None:
    text, cells = file_of(family, QUICK)
    for mode in ("planned", *ALSO.get(family, ())):
        compare(family, run_file(text, folder, bare(family), MODES[mode]), cells)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", VERIFIED)
def test_patches_and_ablations_of_every_layer_equal_hooks(
    family: str, mode: str, folder: Path
) -> None:
    text, cells = file_of(family, WHOLE)
    compare(family, run_file(text, folder, bare(family), MODES[mode]), cells)


@pytest.mark.parametrize("mode", MODES)
def test_ablated_heads_leave_no_rounding_errors(folder: Path, mode: str) -> None:
    """Where the embedding is 0, the norm after layer 0 would amplify what remains of the heads."""
    model = copy.deepcopy(bare("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[token("w42")] = 0
    text = "".join(
        experiment(
            site, "prompts p", f"ablate {site} layer 0 heads * at last token with zero", DIFFERENCE
        )
        for site in ("head_out", "z")
    )
    found = run_file(text, folder, model, MODES[mode])
    by_site = {site: found[site].measures[0].patched for site in ("head_out", "z")}
    assert np.abs(by_site["z"]).min() > 1e-2
    np.testing.assert_allclose(by_site["head_out"], by_site["z"], atol=1e-6, rtol=0)
