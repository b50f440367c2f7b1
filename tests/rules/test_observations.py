"""What `observe` lines see, beside what plain code makes of the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mechdsl.resolve.cell_key import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES
from ..reference.forward import Run, Write, side_by_side
from .models import FAMILIES, double
from .paths import End
from .support import (
    QUICK,
    Key,
    agree,
    experiment,
    product,
    rows,
    run_file,
    table,
    tokens,
)
from .test_attention import PAIR, taken

LAYERS, HEADS = range(3), range(4)
LAST, CUE, SUBJECT = "last token", "cue token", "subject token"
Value = Callable[..., float]
"""Of a run, its text and the cell's coordinates; KeyError where the text lacks the position."""


@dataclass(frozen=True)
class Case:
    """An observation, and what it gives in each cell."""

    lines: tuple[str, ...]
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    value: Value
    label: str = "norm"
    act: Callable[..., list[Write]] = lambda name, n, *at: []
    base: str = "clean"
    large: float = 0.1


def norm(vector: Tensor) -> float:
    return float(vector.flatten().norm())


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def patched(where: str, layer: int = 0) -> Callable[..., list[Write]]:
    return lambda name, n, *at: taken(name, n, "longer", [End("resid_post", layer)], where)


CASES: dict[str, Case] = {
    "norm_of_the_stream": Case(
        ("observe norm resid_post layer * at last token, cue token, subject token",),
        ("layer", "position"),
        product(LAYERS, (LAST, CUE, SUBJECT)),
        lambda run, text, layer, at: norm(run["resid_post", layer][tokens(text, at)[0]]),
    ),
    "norm_of_heads": Case(
        ("observe norm layer * head * at last token",),
        ("layer", "head"),
        product(LAYERS, HEADS),
        lambda run, text, layer, head: norm(run["z", layer][text.last, head]),
    ),
    "norm_of_all_heads": Case(
        ("observe norm z layer * at cue token",),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["z", layer][tokens(text, CUE)[0]]),
    ),
    "norm_of_joined_sites": Case(
        (f"observe norm head_out layers 1..2 head * at {PAIR}",),
        ("head",),
        product(HEADS),
        lambda run, text, head: mean(
            [norm(run["head_out", n][at, head]) for n in (1, 2) for at in tokens(text, PAIR)]
        ),
    ),
    "norm_of_each_item": Case(
        ("observe norm mlp_out layer 1..2 at each item token",),
        ("layer", "position"),
        product((1, 2), [f"item {n}" for n in range(1, 6)]),
        lambda run, text, layer, at: norm(run["mlp_out", layer][tokens(text, f"{at} token")[0]]),
    ),
    "norm_of_a_patched_run": Case(
        (
            "from longer into clean",
            "patch resid_post layer 0 at cue token",
            "observe norm resid_post layer * at last token as lengths",
            "measure logit(answer) as raw",
        ),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["resid_post", layer][text.last]),
        "lengths",
        patched(CUE),
    ),
    "norm_of_another_run": Case(
        (
            "from longer into clean",
            "patch resid_post layer 0 at cue token",
            "observe norm resid_post layer * of longer at last token as others",
            "measure logit(answer) as raw",
        ),
        ("layer",),
        product(LAYERS),
        lambda run, text, layer: norm(run["resid_post", layer][text.last]),
        "others",
        base="longer",
    ),
}


@cache
def found(data: Path, name: str, mode: str) -> dict[str, ExperimentResult]:
    text = "".join(experiment(key, *case.lines, measure="") for key, case in CASES.items())
    return run_file(text, data, name, mode)


@cache
def expected(name: str, key: str) -> dict[Key, list[float]]:
    case = CASES[key]
    cells = [tuple(cell) for cell in case.cells]
    every: list[dict[Key, Run]] = []
    for n, text in enumerate(rows(case.base)):
        changes = [(case.act(name, n, *cell), []) for cell in cells]
        runs = side_by_side(name, double(name), text.ids, changes)
        every.append(dict(zip(cells, runs, strict=True)))

    def value(n: int, *at: Coord) -> float | None:
        try:
            return case.value(every[n][at], rows(case.base)[n], *at)
        except KeyError:
            return None

    return table(cells, value, len(every))


def hold(data: Path, key: str, name: str, mode: str) -> None:
    case = CASES[key]
    own = [line for line in case.lines if line.startswith("observe")]
    named = f"{key}.{case.label}" if " as " in own[0] and len(case.lines) > 1 else key
    result = found(data, name, mode)[named]
    assert (result.measures[0].label, result.measures[0].effect) == (case.label, "raw")
    agree(result, case.axes, expected(name, key), None, large=case.large)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("key", list(CASES))
def test_what_is_observed_is_in_the_model(data: Path, key: str, mode: str) -> None:
    hold(data, key, "llama", mode)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_what_is_observed_is_in_other_models(data: Path, name: str) -> None:
    for key in CASES:
        hold(data, key, name, "planned")


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("key", list(CASES))
def test_what_is_observed_is_in_every_model(data: Path, key: str, name: str, mode: str) -> None:
    hold(data, key, name, mode)
