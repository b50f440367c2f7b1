"""Prompts of several blocks, files that use them, and a comparison of two tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.statistics.measurements import MeasureData

from ..execute.support import (
    ABSOLUTE,
    DIFFERENCE,
    MODES,
    PROMPTS,
    RELATIVE,
    ROWS,
    SMALL,
    STATS,
    Prompt,
    Record,
    by_name,
    ids_of,
    prompt,
    rounding,
    run_on,
    shared,
    token,
    write_rows,
)
from ..quick import some
from ..reference.forward import Changes, Edge, Run, Write, forward, side_by_side
from .models import bare, double

Array = NDArray[np.float64]
Key = tuple[Coord | None, ...]
"""The coordinates of a cell; None accepts any value."""

QUICK = ("plain", "planned")
"""With all passes off, and on."""
MANY = some(QUICK, ["planned"])
"""Modes for long lists of cases."""

# --- more prompts ---------------------------------------------------------------------------------

_SECOND: list[Record] = [
    {"left": "w31 w6", "right": "w17", "turn": "w8", "a": "w3", "b": "w44"},
    {"left": "w2 w27 w19", "right": "w45", "turn": "w12", "a": "w28", "b": "w1"},
    {"left": "w48", "right": "w23", "turn": "w5", "a": "w36", "b": "w14"},
    {"left": "w10 w16", "right": "w39", "turn": "w21", "a": "w0", "b": "w25"},
]
_EVEN: list[Record] = [
    {"name": "w4 w30", "other": "w9 w11", "cue": "w26", "a": "w10", "b": "w13"},
    {"name": "w22 w7", "other": "w20 w35", "cue": "w28", "a": "w20", "b": "w15"},
    {"name": "w33 w18", "other": "w1 w46", "cue": "w29", "a": "w17", "b": "w32"},
]
BLOCKS = f"""{PROMPTS}
prompts second {{
  rows "second.jsonl"
  template "{{left}} w43 {{right}} w40"
  answer " {{a}}"
  wrong " {{b}}"
  corrupt turned {{ right = turn }}
}}
prompts single {{
  rows "single.jsonl"
  template "{{left}} w43 {{right}} w40"
  answer " {{a}}"
  wrong " {{b}}"
}}
prompts even {{
  rows "even.jsonl"
  template "{{name}} w41 {{cue}} w42"
  answer " {{a}}"
  wrong " {{b}}"
  corrupt renamed {{ name = other }}
}}
"""


@dataclass(frozen=True)
class Text:
    """One row of one run: its words and its named positions, counted without the package."""

    words: tuple[str, ...]
    spans: Mapping[str, tuple[int, ...]]

    @property
    def ids(self) -> list[int]:
        return ids_of(self.words)

    @property
    def last(self) -> int:
        return len(self.words)


def _of(made: Prompt) -> Text:
    items = {f"item {n + 1}": (at,) for n, at in enumerate(made.items)}
    return Text(
        made.words,
        {
            "subject": made.subject,
            "cue": (made.cue,),
            "items": made.items,
            '"w40"': (made.items[-1] + 1,),
            '"w41"': (made.subject[-1] + 1,),
            **items,
        },
    )


def _second(record: Record, run: str) -> Text:
    left = record["left"].split()
    words = (*left, "w43", record["turn" if run == "turned" else "right"], "w40")
    n = len(left)
    return Text(words, {"left": tuple(range(1, n + 1)), "right": (n + 2,), '"w43"': (n + 1,)})


def _even(record: Record, run: str) -> Text:
    words = (*record["other" if run == "renamed" else "name"].split(), "w41", record["cue"], "w42")
    return Text(words, {"name": (1, 2), "cue": (4,)})


def rows(run: str = "clean") -> list[Text]:
    """The texts of a run, in the order of the data; `clean` and the like are of block `p`."""
    block, _, own = run.partition(".")
    match block:
        case "second":
            return [_second(record, own) for record in _SECOND]
        case "single":
            return [_second(record, own) for record in _SECOND[1:2]] * len(ROWS)
        case "even":
            return [_even(record, own) for record in _EVEN]
        case _:
            return [_of(prompt(record, run)) for record in ROWS]


def records(block: str = "p") -> list[Record]:
    return {"p": ROWS, "second": _SECOND, "single": _SECOND[1:2], "even": _EVEN}[block]


def write_data(folder: Path) -> None:
    write_rows(folder)
    for name, several in (("second", _SECOND), ("single", _SECOND[1:2]), ("even", _EVEN)):
        text = "\n".join(json.dumps(row) for row in several) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# --- positions ------------------------------------------------------------------------------------


def tokens(text: Text, written: str) -> list[int]:
    """Joined tokens of the model's input that a position names, found without the package."""
    written = written.strip()
    if written.startswith("{"):
        parts = written.strip("{}").split(",")
        return [at for part in parts for at in tokens(text, part)]
    if written == "tokens *":
        return [*range(text.last + 1)]
    if written.startswith("tokens except "):
        without = tokens(text, written.removeprefix("tokens except "))
        return [at for at in range(1, text.last + 1) if at not in without]
    if written.startswith("tokens between "):
        first, _, last = written.removeprefix("tokens between ").partition(" and ")
        return [*range(tokens(text, first)[0], tokens(text, last)[0] + 1)]
    name, _, word = written.rpartition(" ")
    if name == "token":
        return [int(word) % (text.last + 1)]
    if name in ("last", "first"):
        return [text.last if name == "last" else 1]
    found = text.spans[name]
    return [*found] if word == "tokens" else [found[-1]]


# --- files ----------------------------------------------------------------------------------------


def experiment(
    name: str, *lines: str, block: str = "p", measure: str = DIFFERENCE, stats: str = STATS
) -> str:
    """An experiment on the rows of a block."""
    every = ("model m", f"prompts {block}", *lines, measure, stats)
    body = "\n".join(f"  {line}" for line in every if line)
    return f"experiment {name} {{\n{body}\n}}\n"


def try_file(
    text: str,
    folder: Path,
    name: str,
    mode: str = "planned",
    *,
    precise: bool = False,
    blocks: str = BLOCKS,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run experiments on a model by its name; precise: in 64 bits."""
    whole = f'mech 1\nmodel m = local("handed over")\n{blocks}\n{text}'
    model = shared(double(name) if precise else bare(name))
    return run_on(Source(whole, folder / "file.mech"), {"m": model}, MODES[mode])


def run_file(
    text: str, folder: Path, name: str, mode: str, *, precise: bool = False, blocks: str = BLOCKS
) -> dict[str, ExperimentResult]:
    """Experiment → result, prompts in the order of the data; an error fails the test."""
    return by_name(*try_file(text, folder, name, mode, precise=precise, blocks=blocks))


def codes(text: str, folder: Path, name: str = "llama") -> list[str]:
    """The codes of the errors that keep a file from running."""
    result, diagnostics = try_file(text, folder, name)
    assert result is None, "this should be an error"
    return [found.code for found in diagnostics]


# --- reference values -----------------------------------------------------------------------------


@cache
def _plain(name: str, ids: tuple[int, ...]) -> Run:
    return forward(name, double(name), ids)


def plain(name: str, text: Text) -> Run:
    """An unpatched run."""
    return _plain(name, tuple(text.ids))


def edited(name: str, text: Text, writes: Iterable[Write] = (), edges: Iterable[Edge] = ()) -> Run:
    return forward(name, double(name), text.ids, writes, edges)


def difference(logits: Tensor, record: Record, at: int = -1) -> float:
    """`logit(answer) - logit(wrong)` at a token, by default the last one."""
    return float(logits[at, token(record["a"])] - logits[at, token(record["b"])])


def unpatched(name: str, run: str = "clean", block: str = "p", at: str = "last token") -> Array:
    """[prompt]"""
    found = [
        difference(plain(name, text).logits, record, tokens(text, at)[0])
        for text, record in zip(rows(run), records(block), strict=True)
    ]
    return np.array(found)


Cells = Mapping[Key, Sequence[float]]
"""One value per prompt for each cell, in the order of the table."""


def table(
    values: Iterable[Sequence[Coord | None]], worked_out: Callable[..., float | None], count: int
) -> dict[Key, list[float]]:
    """Tabulate `worked_out` over prompt numbers and cell coordinates; None means no value.

    Cells without any value are left out.
    """
    found: dict[Key, list[float]] = {}
    for key in values:
        every = [worked_out(n, *key) for n in range(count)]
        if any(value is not None for value in every):
            found[tuple(key)] = [np.nan if value is None else value for value in every]
    return found


def worked_out(
    name: str,
    cells: Iterable[Sequence[Coord | None]],
    changes: Callable[..., Sequence[Changes]],
    texts: Sequence[Text],
    every: Sequence[Record],
    at: str = "last token",
) -> dict[Key, list[float]]:
    """`table` of the difference at a token, from the changes to a prompt in each cell.

    changes: of a prompt's number and the cell's coordinates; the value is the mean over the runs.
    """
    cells = [tuple(cell) for cell in cells]
    values: list[dict[Key, float]] = []
    for n, (text, record) in enumerate(zip(texts, every, strict=True)):
        done = [(cell, each) for cell in cells for each in changes(n, *cell)]
        runs = side_by_side(name, double(name), text.ids, [each for _, each in done])
        place = tokens(text, at)[0]
        found: dict[Key, list[float]] = {}
        for (cell, _), changed in zip(done, runs, strict=True):
            found.setdefault(cell, []).append(difference(changed.logits, record, place))
        values.append({cell: float(np.mean(several)) for cell, several in found.items()})
    return table(cells, lambda n, *cell: values[n].get(cell), len(every))


def product(*axes: Iterable[Coord]) -> list[tuple[Coord, ...]]:
    return list(itertools.product(*axes))


# --- the comparison -------------------------------------------------------------------------------


def agree(
    found: ExperimentResult,
    axes: tuple[str, ...],
    expected: Cells,
    base: Array | None,
    *,
    large: float = 0.1,
    most: bool = True,
    precise: bool = False,
) -> None:
    """Assert that all cells exist and that each prompt's value equals the reference.

    base: [prompt] or [cell, prompt]; None if effects aren't differences. large: lower bound of the
    largest effect. most: half of the effects must exceed ten times the tolerance. precise: the
    run was in 64 bits, so that small effects are compared as well.
    """
    assert found.axes == axes
    keys = [tuple(cell.coords[axis] for axis in axes) for cell in found.cells]
    assert len(keys) == len(expected), f"cells {keys}, not {list(expected)}"
    for key, own in zip(keys, expected, strict=True):
        assert all(b in (a, None) for a, b in zip(key, own, strict=True)), f"{key} is not {own}"
    values = np.array(list(expected.values()))
    compare(found.measures[0], values, base, large=large, most=most, precise=precise)


def compare(
    measure: MeasureData,
    values: Array,
    base: Array | None,
    *,
    large: float = 0.1,
    most: bool = True,
    precise: bool = False,
) -> None:
    """values: [cell, prompt]"""
    absolute, small = (1e-5, 1e-3) if precise else (ABSOLUTE, SMALL * rounding(values))
    assert measure.patched.shape == values.shape
    np.testing.assert_array_equal(np.isnan(measure.patched), np.isnan(values))
    start = np.zeros_like(values) if base is None else np.broadcast_to(base, values.shape)
    if base is not None:
        own = np.broadcast_to(measure.base, values.shape)
        there = ~np.isnan(values)
        np.testing.assert_allclose(own[there], start[there], atol=absolute, rtol=0)
    error, effect = np.abs(measure.patched - values), np.abs(values - start)
    worst = np.unravel_index(np.nanargmax(error), error.shape)
    where = f"cell {worst[0]}, prompt {worst[1]}: {measure.patched[worst]}, not {values[worst]}"
    assert error[worst] <= absolute, f"off by {error[worst]:.1e} in {where}"
    relative = float(np.nanmax(error / np.maximum(effect, small)))
    assert relative <= RELATIVE, f"off by {relative:.1e} of the effect"
    assert np.nanmax(effect) > large, f"effects of {np.nanmax(effect):.1e} tell nothing"
    if most:
        assert np.nanmedian(effect) > 10 * absolute, f"most effects are {np.nanmedian(effect):.1e}"
