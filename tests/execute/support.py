"""Prompts written word by word, files that use them, and a comparison of two results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute.run.panel import Execution, execute
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.computation import run_checked
from mechdsl.pipeline.file_run import run_file as way_of_a_file
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES, make_plan
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.statistics.measurements import MeasureData
from mechdsl.store.runs import OpenRun

from ..models import families
from ..reference.forward import Place, Write, forward, side_by_side
from ..reference.points import Point, copied
from ..run_source import run_source
from ..shared_models import is_unchanged, unchanged

Record = dict[str, Any]
Array = NDArray[np.float64]
Metric = Callable[[Tensor, Record], float]
"""From the logits [T, vocab] of a prompt, and its record."""

ABSOLUTE = 1e-4
RELATIVE = 1e-3
SMALL = 1e-2
"""Effects below this have an absolute bound of SMALL * RELATIVE, or a larger one if the values that
they are differences of have larger rounding errors."""

_RECORDS: list[Record] = [
    {
        "words": ["w3", "w4", "w5", "w6"],
        "more": ["w9", "w8"],
        "subject": "w1 w2 w24 w25",
        "alt": "w12 w37 w13 w31",
        "cue": "w26",
        "cue2": "w27",
        "a": "w10",
        "b": "w11",
    },
    {
        "words": ["w13", "w4"],
        "more": ["w19", "w8", "w7", "w30"],
        "subject": "w35",
        "alt": "w36",
        "cue": "w28",
        "cue2": "w21",
        "a": "w20",
        "b": "w15",
    },
    {
        "words": ["w23", "w14", "w17"],
        "more": ["w9"],
        "subject": "w33 w34",
        "alt": "w16 w18",
        "cue": "w29",
        "cue2": "w22",
        "a": "w17",
        "b": "w32",
    },
    {
        "words": ["w38", "w39", "w6", "w11", "w9"],
        "more": ["w2", "w43", "w44"],
        "subject": "w45 w46 w47",
        "alt": "w30 w0 w8",
        "cue": "w3",
        "cue2": "w48",
        "a": "w49",
        "b": "w5",
    },
]
ROWS = [{**r, "turned": r["words"][1:] + r["words"][:1]} for r in _RECORDS]
"""Prompts of 13, 8, 10 and 13 tokens; those of `longer` have other lengths."""

PROMPTS = """
prompts p {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {subject} w41 {cue} w42"
  answer " {a}"
  wrong " {b}"
  corrupt other { subject = alt }
  corrupt longer { words = more  cue = cue2 }
  corrupt turned { words = turned }
}
"""
STATS = "stats bootstrap(100) confidence 95% correct none"
DIFFERENCE = "measure logit(answer) - logit(wrong) as delta"

WIDER = {
    "attn.c_attn": 1.5,
    "attn.c_proj": 4,
    "v_proj": 2,
    "o_proj": 3,
    "query_key_value": 1.5,
    "attention.dense": 5,
    "mlp.c_proj": 2,
    "down_proj": 2,
    "dense_4h_to_h": 1.5,
}
"""Factors on weights, so that no head is negligible compared with the MLPs."""

EVERY_PASS = frozenset(PASS_NAMES)
WITHOUT_PLAN = RunOptions(without=EVERY_PASS)
"""Full padded passes over the rows of one cell: the reference for plans."""
MODES: dict[str, RunOptions] = {
    "plain": WITHOUT_PLAN,
    "planned": RunOptions(),
    "padded on the right": RunOptions(execution=ExecutionOptions(side="right")),
    "small passes": RunOptions(execution=ExecutionOptions(pass_tokens=40, prompt_tokens=20)),
}


# --- reference prompts ------------------------------------------------------------------------


def ids_of(words: Sequence[str]) -> list[int]:
    """`<s>`, then one token per word."""
    return [1, *(len(families.SPECIAL) + int(word[1:]) for word in words)]


def token(word: str) -> int:
    return ids_of([word])[1]


@dataclass(frozen=True)
class Prompt:
    """One row of one run, with the positions of its parts, counted without the package."""

    words: tuple[str, ...]
    items: tuple[int, ...]
    subject: tuple[int, ...]
    cue: int

    @property
    def ids(self) -> list[int]:
        return ids_of(self.words)

    @property
    def last(self) -> int:
        return len(self.words)


def prompt(record: Record, run: str = "clean") -> Prompt:
    """The prompt of a record in one of the runs of `PROMPTS`."""
    items = record[{"longer": "more", "turned": "turned"}.get(run, "words")]
    subject = (record["alt"] if run == "other" else record["subject"]).split()
    cue = record["cue2"] if run == "longer" else record["cue"]
    words = (*items, "w40", *subject, "w41", cue, "w42")
    n, s = len(items), len(subject)
    return Prompt(words, tuple(range(1, n + 1)), tuple(range(n + 2, n + 2 + s)), n + s + 3)


def prompts(run: str = "clean", rows: Sequence[Record] = ROWS) -> list[Prompt]:
    return [prompt(record, run) for record in rows]


# --- models and files ---------------------------------------------------------------------------


@cache
def bare(family: str, seed: int = 0) -> Any:
    """The family's model in `transformers`, with larger outputs of heads and neurons."""
    model = families.module(family, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, factor in WIDER.items():
                if part in name and parameter.dim() == 2:
                    parameter.mul_(factor)
    return unchanged(model)


def fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", unk_token="<unk>"
    )


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    return fast(families.tokenizer())


def experiment(name: str, *lines: str, stats: str = STATS) -> str:
    """An experiment on the prompts `p`."""
    body = "\n".join(f"  {line}" for line in ("model m", *lines, stats) if line)
    return f"experiment {name} {{\n{body}\n}}\n"


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS) -> None:
    lines = [json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def try_file(
    text: str,
    folder: Path,
    model: Any,
    options: RunOptions | None = None,
    *,
    tokenizer: Any = None,
    prompts: str = PROMPTS,
    run: OpenRun | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run experiments (`text`) on a model; `folder` holds their data."""
    if not (folder / "data.jsonl").exists():
        write_rows(folder)
    whole = f'mech 1\nmodel m = local("handed over")\n{prompts}\n{text}'
    source = Source(whole, folder / "file.mech")
    if tokenizer is None and is_unchanged(model):
        return run_on(source, {"m": shared(model)}, options, run)
    assert run is None
    return run_source(source, options, {"m": (model, tokenizer or word_tokenizer())})


def run_on(
    source: Source,
    models: Mapping[str, LoadedModel],
    options: RunOptions | None = None,
    run: OpenRun | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Like `run_source`, on models that were analysed and checked before."""
    options = options or RunOptions()
    contexts = {name: context(source, name, model) for name, model in models.items()}
    checked = check_source(source, options.settings, contexts)
    if has_errors(checked.diagnostics):
        return None, checked.diagnostics
    if run is None:
        ran = way_of_a_file(checked, options, models)
        return ran.result, [*checked.diagnostics, *ran.diagnostics]
    result, found = run_checked(checked, options, models, run=run)
    return result, [*checked.diagnostics, *found]


def context(source: Source, name: str, model: LoadedModel) -> ModelContext:
    """The context of a loaded model that checking a file needs."""
    assert model.tokenizer is not None
    statement = spec.Model(span=Span(source, 0, 0), name=name, kind="local", path="")
    return ModelContext(statement, model.shape, model.tokenizer)


def run_file(
    text: str,
    folder: Path,
    model: Any,
    options: RunOptions | None = None,
    **others: Any,
) -> dict[str, ExperimentResult]:
    """Experiment → result, prompts in the order of the data; an error fails the test."""
    return by_name(*try_file(text, folder, model, options, **others))


def by_name(
    result: FileResult | None, diagnostics: Sequence[Diagnostic]
) -> dict[str, ExperimentResult]:
    """Experiment → result, rows in the order of the data; an error fails the test."""
    errors = [found for found in diagnostics if found.severity == "error"]
    assert result is not None, render_full(errors, color=False, width=100)
    return {found.name: as_in_the_data(found) for found in result.experiments}


def adopted(family: str, seed: int = 0) -> LoadedModel:
    """The same model, as the executor receives it."""
    return shared(bare(family, seed))


@cache
def shared(module: Any, name: str = "m") -> LoadedModel:
    """A model that no test changes, analysed and checked once."""
    model, diagnostics = adopt_model(name, module, word_tokenizer())
    assert model is not None, render_full(diagnostics, color=False, width=100)
    assert model.restartable
    return model


def check_file(text: str, folder: Path, model: LoadedModel, prompts: str = PROMPTS) -> CheckedFile:
    """Experiments (`text`), checked once, to run in several modes."""
    whole = f'mech 1\nmodel m = local("handed over")\n{prompts}\n{text}'
    source = Source(whole, folder / "file.mech")
    checked = check_source(source, models={"m": context(source, "m", model)})
    assert not has_errors(checked.diagnostics), render_full(
        checked.diagnostics, color=False, width=100
    )
    return checked


def execute_file(
    checked: CheckedFile,
    model: LoadedModel,
    without: Iterable[str] = (),
    options: ExecutionOptions | None = None,
) -> Execution:
    """Run checked experiments without some passes."""
    plan = make_plan(checked.experiments, without=frozenset(without))
    found = execute(plan, {"m": model}, options, check=check_denominators)
    assert not has_errors(found.diagnostics)
    return found


def as_in_the_data(found: ExperimentResult) -> ExperimentResult:
    """The result with its prompts in the order of the data file, not in sampled order."""
    assert found.row_ids is not None
    order = np.argsort(found.row_ids)
    measures = [
        replace(
            m,
            patched=m.patched[:, order],
            base=m.base[:, order],
            source=None if m.source is None else m.source[:, order],
            truth=None if m.truth is None else m.truth[:, order],
        )
        for m in found.measures
    ]
    return replace(
        found,
        measures=tuple(measures),
        row_ids=tuple(sorted(found.row_ids)),
        **{
            name: {
                run: np.asarray(values)[np.argsort(found.accuracy_rows[run])]
                for run, values in getattr(found, name).items()
            }
            for name in ("accuracy", "accuracy_rounding", "accuracy_units", "accuracy_rows")
        },
    )


def with_execution(options: RunOptions, **changes: Any) -> RunOptions:
    return replace(options, execution=replace(options.execution, **changes))


# --- reference values -----------------------------------------------------------------------------


@cache
def _unpatched(family: str, ids: tuple[int, ...]) -> tuple[Tensor, dict[Place, Tensor]]:
    run = forward(family, bare(family), ids)
    return run.logits, run.seen


def unpatched(family: str, of: Prompt) -> tuple[Tensor, dict[Place, Tensor]]:
    """Logits and all sites of an unpatched prompt."""
    return _unpatched(family, tuple(of.ids))


def patched(family: str, of: Prompt, writes: Iterable[Write]) -> Tensor:
    """Logits [T, vocab] of a prompt with changes."""
    return forward(family, bare(family), of.ids, writes).logits


def patched_run(family: str, of: Prompt, writes: Iterable[Write]) -> dict[Place, Tensor]:
    """All sites of a prompt with changes."""
    return forward(family, bare(family), of.ids, writes).seen


def each_patched(family: str, of: Prompt, each: Iterable[Sequence[Write]]) -> list[Tensor]:
    """Logits [T, vocab] of a prompt for each of several changes."""
    changes = [(writes, ()) for writes in each]
    return [run.logits for run in side_by_side(family, bare(family), of.ids, changes)]


def difference(logits: Tensor, record: Record) -> float:
    """`logit(answer) - logit(wrong)` at the last token."""
    return float(logits[-1, token(record["a"])] - logits[-1, token(record["b"])])


def differences(
    family: str, rows: Sequence[Record], run: str = "clean", metric: Metric = difference
) -> Array:
    """[prompt] of an unpatched run."""
    return np.array([metric(unpatched(family, prompt(record, run))[0], record) for record in rows])


def last_logits(logits: Tensor) -> Array:
    return logits[-1].double().numpy()


Runs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""The separate runs of one row: positions that are read and written, averaged over the runs."""


def patches(
    family: str,
    cells: Sequence[Sequence[Point]],
    run: str,
    where: Callable[[Prompt, Prompt], Runs],
    metric: Metric = difference,
) -> Array:
    """[cell, prompt]: points of `run` patched into the clean prompts; NaN without a run."""
    found = np.full((len(cells), len(ROWS)), np.nan)
    for n, record in enumerate(ROWS):
        base, source = prompt(record), prompt(record, run)
        seen = unpatched(family, source)[1]
        runs = where(source, base)
        edits = [copied(points, seen, *at) for points in cells for at in runs]
        values = [metric(logits, record) for logits in each_patched(family, base, edits)]
        if runs:
            found[:, n] = np.reshape(values, (len(cells), len(runs))).mean(1)
    return found


# --- the comparison -------------------------------------------------------------------------------


def rounding(values: Array) -> float:
    """Rounding error of large logits in 32 bits, relative to that of logits below 10."""
    return max(1.0, float(np.nanmax(np.abs(values))) / 10)


def errors(measure: MeasureData, expected: Array, base: Array) -> tuple[float, float]:
    """Largest difference of a value, and the largest one of an effect relative to the effect.

    The effect is the difference from the measured base run, which has the rounding of the patched
    run: without a change it is zero, for values of any size.
    """
    error = np.abs(measure.patched - expected)
    effect = expected - base[None]
    off = np.abs(measure.patched - measure.base - effect)
    relative = off / np.maximum(np.abs(effect), SMALL * rounding(expected))
    return float(np.nanmax(error)), float(np.nanmax(relative))


def agree(measure: MeasureData, expected: Array, base: Array, *, large: float = 0.1) -> None:
    """Assert that the value of each cell and prompt equals the reference.

    large: lower bound of the largest effect. Half of the effects must exceed ten times the
    tolerance; otherwise, the comparison proves nothing.
    """
    assert measure.patched.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(measure.patched), np.isnan(expected))
    np.testing.assert_allclose(
        np.broadcast_to(measure.base, expected.shape)[0], base, atol=ABSOLUTE
    )
    absolute, relative = errors(measure, expected, base)
    assert absolute <= ABSOLUTE, f"off by {absolute:.1e}"
    assert relative <= RELATIVE, f"off by {relative:.1e} of the effect"
    effect = np.abs(expected - base[None])
    assert np.nanmax(effect) > large, f"effects of {np.nanmax(effect):.1e} tell nothing"
    assert np.nanmedian(effect) > 10 * ABSOLUTE, f"most effects are {np.nanmedian(effect):.1e}"
