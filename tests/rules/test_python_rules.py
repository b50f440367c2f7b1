"""`set … to python(…)`: a function receives all rows of one cell, independent of other cells."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.syntax import PythonFailed
from mechdsl.execute.patching import rule_inputs
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, by_name, run_on, shared
from ..quick import in_turn
from ..reference.forward import Write
from .models import bare
from .support import (
    BLOCKS,
    Key,
    agree,
    difference,
    edited,
    experiment,
    plain,
    records,
    rows,
    tokens,
    unpatched,
)

FUNCTIONS = '''
import torch

CALLS = []


def centred(vectors):
    """Of all that is there; what isn't is NaN."""
    mean = vectors.nanmean(dim=(0, 1), keepdim=True)
    return 2 * (vectors - mean) + mean.roll(1, -1)


def numbered(vectors):
    """Hangs on the order of the rows."""
    return vectors + torch.arange(len(vectors))[:, None, None] * vectors.roll(1, -1)


def of_one_length(vectors):
    """Hangs on the whole width."""
    size = vectors.norm(dim=-1, keepdim=True)
    return 3 * vectors / size + vectors.roll(1, -1)


def shared_out(vectors):
    """Weights over keys, which prompts of other lengths have fewer of."""
    there = ~vectors.isnan()
    return 0.7 * vectors + 0.3 * there / there.sum(-1, keepdim=True)


def counted(vectors):
    CALLS.append(tuple(vectors.shape))
    vectors += 1
    return vectors


def as_it_is(vectors):
    return vectors


def last_first(vectors):
    return vectors.flip(1)
'''
MEAN = "measure logit(answer) - logit(wrong) as delta"


@dataclass(frozen=True)
class Case:
    """One rule, and the reference arguments of its function."""

    rule: str
    function: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    site: Callable[..., Sequence[tuple[str, int, Sequence[int]]]]
    """From a cell's coordinates: site, layer and units of every call."""
    at: Callable[..., str]
    """From a cell's coordinates: its position."""


CASES = {
    "one": Case(
        "set resid_post layer 1 at cue token", "centred", (), [()],
        lambda: [("resid_post", 1, (0,))], lambda: "cue token",
    ),
    "swept": Case(
        "set resid_post layer * at cue token, last token", "centred", ("layer", "position"),
        [(n, at) for n in range(3) for at in ("cue token", "last token")],
        lambda layer, _: [("resid_post", layer, (0,))], lambda _, at: at,
    ),
    "ordered": Case(
        "set attn_out layer * at last token", "numbered", ("layer",), [(0,), (1,), (2,)],
        lambda layer: [("attn_out", layer, (0,))], lambda _: "last token",
    ),
    "ragged": Case(
        "set resid_post layer 0..1 at subject tokens", "centred", ("layer",), [(0,), (1,)],
        lambda layer: [("resid_post", layer, (0,))], lambda _: "subject tokens",
    ),
    "missing": Case(
        "set resid_post layer 1 at each item token", "centred", ("position",),
        [(f"item {n}",) for n in range(1, 6)],
        lambda _: [("resid_post", 1, (0,))], lambda item: f"{item} token",
    ),
    "the same tokens in other cells": Case(
        "set resid_post layer 1 at last-item token", "centred", (), [()],
        lambda: [("resid_post", 1, (0,))], lambda: "items token",
    ),
    "heads": Case(
        "set z layer * head 0..1 at last token", "of_one_length", ("layer", "head"),
        [(n, h) for n in range(3) for h in range(2)],
        lambda layer, head: [("z", layer, (head,))], lambda *_: "last token",
    ),
    "joined heads": Case(
        "set z layer * heads 2, 0 at {cue token, last token}", "of_one_length", ("layer",),
        [(0,), (1,), (2,)],
        lambda layer: [("z", layer, (0, 2))], lambda _: "{cue token, last token}",
    ),
    "joined layers": Case(
        "set z layers 0..1 at last token", "of_one_length", (), [()],
        lambda: [("z", 0, (0, 1, 2, 3)), ("z", 1, (0, 1, 2, 3))], lambda: "last token",
    ),
    "neurons": Case(
        "set mlp_hidden layer 0..1 at last token", "of_one_length", ("layer",), [(0,), (1,)],
        lambda layer: [("mlp_hidden", layer, ())], lambda _: "last token",
    ),
    "keys": Case(
        "set pattern layer * head 1 at last token", "shared_out", ("layer",), [(0,), (1,), (2,)],
        lambda layer: [("pattern", layer, (1,))], lambda _: "last token",
    ),
}  # fmt: skip
NAMES = ("gpt2", "llama", "gpt_neox")


@pytest.fixture(scope="module")
def functions(data: Path) -> Any:
    path = data / "cells.py"
    path.write_text(FUNCTIONS, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("cells", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(
    text: str, folder: Path, name: str, mode: str = "planned", blocks: str = BLOCKS
) -> dict[str, ExperimentResult]:
    source = Source(f'mech 1\nmodel m = local("x")\n{blocks}\n{text}', folder / "file.mech")
    options = replace(MODES[mode], settings=CheckSettings(python="run"))
    return by_name(*run_on(source, {"m": shared(bare(name))}, options))


def written(case: str) -> str:
    return f'{CASES[case].rule} to python("cells.py:{CASES[case].function}")'


def given(
    name: str, site: str, layer: int, units: Sequence[int], at: str
) -> tuple[list[int], Tensor]:
    """The prompts that have the position, and [row, position, width]."""
    found: list[Tensor] = []
    there: list[int] = []
    longest = max(len(text.ids) for text in rows())
    for n, text in enumerate(rows()):
        try:
            places = tokens(text, at)
        except KeyError:
            continue
        seen = plain(name, text)[site, layer]
        seen = seen if not units else seen[:, list(units)]
        if site == "pattern":
            lacking = longest - seen.shape[-1]
            seen = torch.nn.functional.pad(seen, (0, lacking), value=torch.nan)
        found.append(seen[places].flatten(1))
        there.append(n)
    return there, torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=torch.nan)


def expected(case: Case, name: str, functions: Any) -> dict[Key, list[float]]:
    values: dict[Key, list[float]] = {}
    for cell in case.cells:
        at = case.at(*cell)
        changes: dict[int, list[Write]] = {}
        for site, layer, units in case.site(*cell):
            there, vectors = given(name, site, layer, units, at)
            made = getattr(functions, case.function)(vectors.clone())
            for row, n in enumerate(there):
                text = rows()[n]
                every = units or range(plain(name, text)[site, layer].shape[1])
                for slot, place in enumerate(tokens(text, at)):
                    parts = made[row, slot].view(len(every), -1)
                    size = len(text.ids) if site == "pattern" else parts.shape[-1]
                    changes.setdefault(n, []).extend(
                        Write(site, layer, part[:size], place, unit)
                        for unit, part in zip(every, parts, strict=True)
                    )
        values[cell] = [
            difference(edited(name, text, changes[n]).logits, record) if n in changes else np.nan
            for n, (text, record) in enumerate(zip(rows(), records(), strict=True))
        ]
    return values


@pytest.mark.parametrize(("mode", "name"), in_turn(list(MODES), NAMES, list(MODES)[:2]))
def test_python_function_receives_all_rows_of_a_cell(
    data: Path, functions: Any, name: str, mode: str
) -> None:
    text = "".join(experiment(key.replace(" ", "_"), written(key)) for key in CASES)
    found = ran(text, data, name, mode)
    for key, case in CASES.items():
        own = found[key.replace(" ", "_")]
        agree(own, case.axes, expected(case, name, functions), unpatched(name), large=0.05)


NOISED = BLOCKS.replace(
    "  corrupt turned { words = turned }\n",
    "  corrupt turned { words = turned }\n"
    "  corrupt noised { add gaussian(std: 0.5, samples: 3) to embed at subject tokens }\n",
    1,
)
ELSEWHERE = {
    "alternatives": "set resid_post layer * at each token of subject",
    "answers": "set resid_post layer * at tokens * and answer",
    "only answers": "set resid_post layer * at answer tokens",
    "beside": "set resid_post layer * at last token {}\n"
    "  ablate z layer 0 head 1 at each item token with resample",
    "noise": "from clean into noised\n  set resid_post layer * at subject tokens",
    "lone draws": "from noised into clean\n  patch z layer 0 head 1 at subject tokens\n"
    "  set resid_post layer * at subject tokens",
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama"])
@pytest.mark.parametrize("key", list(ELSEWHERE))
def test_python_rule_of_a_cell_does_not_depend_on_other_cells(
    data: Path, functions: Any, key: str, name: str
) -> None:
    """The cell has equal values alone and in a sweep, in passes of any size."""
    rule, to = ELSEWHERE[key], ' to python("cells.py:centred")'
    rule = rule.replace(" {}", to) if "{}" in rule else rule + to
    lone = rule.replace("layer *", "layer 1")
    measure = 'measure logprob("w3 w9 w1") as delta' if "answer" in key else MEAN
    rule, lone = (experiment("e", each, measure=measure) for each in (rule, lone))
    if "answer" in key:
        rule, lone = (t.replace('"w3 w9 w1"', "answer") for t in (rule, lone))
    blocks = (
        NOISED.replace('answer " {a}"', 'answer " {a} w9 {b}"', 1) if "answer" in key else NOISED
    )
    first = ran(lone, data, name, blocks=blocks)["e"].measures[0].patched
    assert (
        np.nanmax(np.abs(first - ran(lone, data, name, blocks=blocks)["e"].measures[0].base)) > 0.05
    )
    for mode in MODES:
        found = ran(rule, data, name, mode, blocks)["e"].measures[0].patched
        own = found.reshape(3, -1, found.shape[-1])[1]
        np.testing.assert_allclose(own, first.reshape(own.shape), atol=1e-4)


def test_python_function_is_called_once_per_cell(
    data: Path, functions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds with other axes and rules; arguments don't depend on them."""
    rule = 'set resid_post layer * at subject tokens to python("cells.py:counted")'
    other = "for c in [0, 1] { set z layer 0 head 0 at last token to c }"
    text = experiment("e", rule) + experiment("f", rule, other)
    shapes = [(4, 4)] * 6
    from mechdsl.program import python_functions as python_files

    seen: list[tuple[int, ...]] = []
    call = python_files.PythonFunction.call

    def watched(self: Any, *arguments: Any) -> Any:
        seen.append(tuple(arguments[0].shape))
        return call(self, *arguments)

    monkeypatch.setattr(python_files.PythonFunction, "call", watched)
    first = ran(text, data, "llama")
    assert [shape[:2] for shape in seen] == shapes
    monkeypatch.setattr(rule_inputs, "MAX_MEMORY_BYTES", 64)
    again = ran(text, data, "llama")
    for name in ("e", "f"):
        a, b = (found[name].measures[0].patched for found in (first, again))
        assert np.array_equal(a, b, equal_nan=True)


def test_python_function_receives_each_noise_draw_separately(data: Path, functions: Any) -> None:
    """A function that returns its argument changes no noise draw."""
    rule = 'set resid_post layer * at subject tokens to python("cells.py:as_it_is")'
    text = experiment("e", "from clean into noised", rule)
    own = ran(text, data, "gpt2", blocks=NOISED)["e"].measures[0]
    np.testing.assert_allclose(own.patched, np.broadcast_to(own.base, own.patched.shape), atol=1e-4)


def test_python_function_that_returns_nan_for_existing_positions_is_an_error(
    data: Path, functions: Any
) -> None:
    text = experiment(
        "e", 'set resid_post layer 1 at subject tokens to python("cells.py:last_first")'
    )
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCKS}\n{text}', data / "file.mech")
    options = replace(MODES["planned"], settings=CheckSettings(python="run"))
    result, problems = run_on(source, {"m": shared(bare("llama"))}, options)
    assert result is None or not result.experiments
    (found,) = [d for d in problems if d.code == "E0223"]
    assert "NaN or infinity" in found.message
    assert isinstance(found, PythonFailed)
    assert "fewer positions" in found.hint
