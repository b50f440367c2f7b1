"""Random maps: sums, infidelity and sensitivity. The references are computed from the values of
the experiments that the maps come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import event
from hypothesis import strategies as st

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.drawn import few, many
from . import support
from .support import GRID
from .test_map_fidelity import NEAR, least
from .test_maps import Array, looking, write_boxes

ROWS = 5
NEARBY = NEAR.replace("corrupt near_2 { mask object }", "corrupt near_2 { noise image by 30 }")
Cell = tuple[tuple[str, object], ...]
"""The coordinates of a map, except for positions in the image."""
Grids = Mapping[Cell, Array]
"""[row of the data, row of patches, column] of each map; NaN if a row has no value."""

SITES = (
    "embed",
    "resid_post layer 0",
    "mlp_out layer 1",
    "resid_post layer 0..1",
    "z layer L head 1",
)
PLACES = (
    *["each token of image"] * 3,
    "image row 1..3 col 2..4 token",
    "image row 2 col * token",
)
WINDOWS = ("1..3", "[1, 3]")
WEIGHTS = {
    "": lambda c: 1.0,
    "2 * ": lambda c: 2.0,
    "-0.5 * ": lambda c: -0.5,
    "half * ": lambda c: 0.5,
    "(1 - c) * ": lambda c: 1 - c,
    "half * c / 2 * ": lambda c: c / 4,
}
"""Factor before a map → its number, given the value of the loop variable."""
LOOP = (0, 0.25, 2)


@dataclass(frozen=True)
class Map:
    """An experiment that gives one map or several."""

    name: str
    rule: str
    inserted: bool
    """Whether patches are inserted into a gray image, or removed from their own."""
    limit: str

    def written(self, name: str, run: str) -> str:
        sides = f"from {run} into neutral" if self.inserted else f"from neutral into {run}"
        text = support.experiment(name, sides, self.rule)
        return text.replace("images scenes", f"images scenes{self.limit}")

    @property
    def swept(self) -> bool:
        """Whether the experiment gives several maps."""
        return "0..1" in self.rule


@dataclass(frozen=True)
class Named:
    """A reference to a map in a line."""

    text: str
    of: str
    cell: Cell | None
    """None for all maps of the experiment."""


@dataclass(frozen=True)
class Drawn:
    model: str
    text: str
    added: Sequence[tuple[str, Named]]
    """Factors and maps of a sum."""
    judged: Sequence[Named]
    taken: str
    moved: Sequence[Named]


# --- strategies -----------------------------------------------------------------------------------


@st.composite
def made(draw: Any, name: str) -> Map:
    inserted = draw(st.booleans())
    site = draw(st.sampled_from(SITES))
    verb, end = ("patch", "") if inserted else ("ablate", " with zero")
    if draw(st.integers(0, 2)):
        rule = f"{verb} {site} at {draw(st.sampled_from(PLACES))}{end}"
    else:
        at = "image row r..r + 1 col c..c + 1 tokens"
        rule = f"for c in {draw(st.sampled_from(WINDOWS))} {{ {verb} {site} at {at}{end} }}"
        rule = f"for r in {draw(st.sampled_from(WINDOWS))} {{ {rule} }}"
    if " L " in rule:
        rule = f"for l in 0..1 {{ {rule.replace(' L ', ' l ')} }}"
    return Map(name, rule, inserted, draw(st.sampled_from(["", "", " limit 3"])))


@st.composite
def named(draw: Any, every: Sequence[Map], *, alone: bool) -> Named:
    """Draw a reference. alone: to a single map of an experiment."""
    own = draw(st.sampled_from(every))
    if not own.swept or not (alone or draw(st.booleans())):
        return Named(own.name, own.name, None)
    axis = "l" if "for l" in own.rule else "layer"
    value = draw(st.integers(0, 1))
    return Named(f"{own.name}({axis}: {value})", own.name, ((axis, value),))


@st.composite
def drawn(draw: Any) -> Drawn:
    every = [draw(made(f"map_{n}")) for n in range(draw(st.integers(1, 3)))]
    text = "param half = 0.5\n" + looking(
        "maps", "observe random(3) embed at each token of image as chance"
    )
    for own in every:
        near = draw(st.sampled_from(["near_1", "near_2", "near_1, near_2"]))
        text += own.written(own.name, "scenes") + own.written(f"near_{own.name}", near)
    count = draw(st.integers(1, 3))
    terms = [
        (draw(st.sampled_from(list(WEIGHTS))), draw(named(every, alone=False)))
        for _ in range(count)
    ]
    at = draw(st.sampled_from(["each token of image", "image row 2..3 col * token"]))
    line = f"observe sum of {', '.join(f'{front}{of.text}' for front, of in terms)} at {at}"
    if "c" in re.findall(r"\bc\b", line):
        line = f"for c in [{', '.join(map(str, LOOP))}] {{ {line} }}"
    text += looking("added", line)
    size = draw(st.integers(1, 5))
    sets = {
        f"for d in 1..3 {{ replace top {size} of chance(draw: d) tokens with gray }}",
        f"for k in [1, {size + 1}] {{ ablate embed at top k of chance(draw: 2) tokens with zero }}",
        "for r in 1..3 { replace image row r..r + 1 col 2..3 tokens with gray }",
        "ablate embed at image row 1..2 col 3..4 token with zero",
    }
    taken = draw(st.sampled_from(sorted(sets)))
    text += support.experiment("taken", taken)

    def several() -> list[Named]:
        if draw(st.booleans()):
            return [draw(named(every, alone=False))]
        return [draw(named(every, alone=True)) for _ in range(2)]

    judged, moved = several(), several()
    text += looking("wrong", f"observe infidelity of {listed(judged)} to taken")
    near = [Named(f"near_{each.text}", "", None) for each in moved]
    text += looking("moves", f"observe sensitivity of {listed(moved)} to {listed(near)}")
    model = draw(st.sampled_from(("vit", "clip", "siglip")))
    return Drawn(model, text, terms, judged, taken, moved)


def listed(maps: Sequence[Named]) -> str:
    return ", ".join(each.text for each in maps)


# --- reference values -----------------------------------------------------------------------------


def rows_of(result: ExperimentResult, values: Array) -> Array:
    """[…, row of the data], NaN for missing rows."""
    assert result.row_ids is not None
    whole = np.full((*values.shape[:-1], ROWS), np.nan)
    whole[..., list(result.row_ids)] = values
    return whole


def changes(result: ExperimentResult) -> Iterator[tuple[dict[str, Any], Array]]:
    data = result.measures[0]
    for cell, own in zip(result.cells, rows_of(result, data.patched - data.base), strict=True):
        yield dict(cell.coords), own


def grids(result: ExperimentResult) -> Grids:
    """Distribute a window's value over its four patches, and average overlapping windows."""
    found: dict[Cell, dict[tuple[int, int], list[Array]]] = {}
    for coords, own in changes(result):
        if "position" in coords:
            row, col = map(int, re.findall(r"(?:row|col) (\d+)", str(coords.pop("position"))))
            places, share = [(row, col)], 1
        else:
            row, col = int(coords.pop("r")), int(coords.pop("c"))
            places, share = [(row + n, col + k) for n in (0, 1) for k in (0, 1)], 4
        here = found.setdefault(tuple(coords.items()), {})
        for place in places:
            here.setdefault(place, []).append(own / share)
    whole = {cell: np.full((ROWS, GRID, GRID), np.nan) for cell in found}
    for cell, here in found.items():
        for (row, col), each in here.items():
            whole[cell][:, row - 1, col - 1] = np.mean(each, axis=0)
    return whole


def meant(every: Grids, of: Named) -> Grids:
    return {
        cell: own for cell, own in every.items() if of.cell is None or set(of.cell) <= set(cell)
    }


def sets_of(found: Mapping[str, ExperimentResult]) -> list[tuple[Array, Array]]:
    """Of each set: its patches [row, row of patches, column], and the decrease [row]."""
    chance = found["maps"].measures[0].patched.reshape(GRID * GRID, 3, ROWS)
    sets: list[tuple[Array, Array]] = []
    for (coords, own), cell in zip(changes(found["taken"]), found["taken"].cells, strict=True):
        inside = np.zeros((ROWS, GRID, GRID))
        if "r" in coords:
            top = int(coords["r"]) - 1
            inside[:, top : top + 2, 1:3] = 1
        elif "position" in coords:
            row, col = map(int, re.findall(r"(?:row|col) (\d+)", str(coords["position"])))
            inside[:, row - 1, col - 1] = 1
        else:
            count = int(coords["k"]) if "k" in coords else int(str(cell.position).split()[1])
            order = np.argsort(-chance[:, int(coords.get("d", 2)) - 1], axis=0)[:count]
            for row in range(ROWS):
                inside[row].flat[order[:, row]] = 1
        sets.append((inside, -own))
    return sets


def infidelity(values: Array, sets: Sequence[tuple[Array, Array]], row: int) -> float:
    sums, falls = [], []
    for inside, fall in sets:
        sums.append(sum(values[place] for place in zip(*np.nonzero(inside[row]), strict=True)))
        falls.append(fall[row])
    return least(sums, falls) if np.isfinite([*sums, *falls]).all() else float("nan")


def sensitivity(own: Array, near: Sequence[Array]) -> float:
    there = np.isfinite(own)
    length = float(np.sqrt(np.sum(own[there] ** 2)))
    if not length or not all(np.isfinite(each[there]).all() for each in near):
        return float("nan")
    return max(float(np.sqrt(np.sum((each - own)[there] ** 2))) for each in near) / length


def compare(case: Drawn, tmp_path: Path) -> None:
    if not (tmp_path / "boxes.jsonl").exists():
        write_boxes(tmp_path, case.model)
    found = support.run_file(case.text, tmp_path, case.model, blocks=NEARBY)
    every = {name: grids(own) for name, own in found.items() if "map_" in name}

    expected: list[Array] = []
    for c in LOOP if "c" in found["added"].axes else LOOP[:1]:
        total = np.zeros((ROWS, GRID, GRID))
        for front, of in case.added:
            total = total + WEIGHTS[front](c) * sum(meant(every[of.of], of).values())
        expected.append(total)
    told = rows_of(found["added"], found["added"].measures[0].patched)
    for cell, values in zip(found["added"].cells, told, strict=True):
        row, col = map(int, re.findall(r"(?:row|col) (\d+)", str(cell.coords["position"])))
        own = expected[LOOP.index(cell.coords.get("c", LOOP[0]))][:, row - 1, col - 1]
        np.testing.assert_allclose(values, own, rtol=1e-4, atol=1e-5, err_msg=case.text)

    sets = sets_of(found)
    maps = [own for of in case.judged for own in meant(every[of.of], of).values()]
    wanted = np.array([[infidelity(own[n], sets, n) for n in range(ROWS)] for own in maps])
    told = rows_of(found["wrong"], found["wrong"].measures[0].patched)
    np.testing.assert_allclose(told, wanted, rtol=1e-3, atol=1e-5, err_msg=case.text)

    moved: list[list[float]] = []
    for of in case.moved:
        nearby = meant(every[f"near_{of.of}"], of)
        for cell, own in meant(every[of.of], of).items():
            near = [other for key, other in nearby.items() if set(cell) <= set(key)]
            moved.append([sensitivity(own[n], [each[n] for each in near]) for n in range(ROWS)])
    told = rows_of(found["moves"], found["moves"].measures[0].patched)
    np.testing.assert_allclose(told, moved, rtol=1e-3, atol=1e-5, err_msg=case.text)
    event(f"{np.isfinite(wanted).mean():.0%} infidelities, {np.isfinite(moved).mean():.0%} moves")


test_random_maps_equal_reference = few(drawn(), 6)(compare)
test_many_random_maps_equal_reference = many(drawn(), 150)(compare)
