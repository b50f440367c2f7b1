"""Two further prompts blocks, files with several models, and reference runs of single prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.pipeline.options import RunOptions
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.statistics.measurements import MeasureData

from ..execute.support import (
    PROMPTS,
    ROWS,
    Array,
    Prompt,
    Record,
    agree,
    bare,
    by_name,
    difference,
    run_on,
    shared,
    word_tokenizer,
    write_rows,
)
from ..reference.forward import Write, forward
from ..reference.points import Point, copied
from ..run_source import run_source
from ..shared_models import is_unchanged

OTHERS = """
prompts q {
  rows "data.jsonl"
  template "w7 {cue2} w8 w9 {subject} {alt}"
  corrupt swapped { swap subject, alt }
}
prompts blank {
  cue = "w30"
  subject = "w3 w2"
  template "w6 w6 {cue} w7 {subject} w1"
}
"""
"""`q` is as long as the data; `blank` has one row. Neither has answers."""

SEEDS = {"m": 0, "tuned": 1, "third": 2}
"""The weights of each model."""


def q(record: Record, run: str = "clean") -> Prompt:
    """A row of `q` with manually counted positions; it has no `cue`."""
    first, second = record["subject"].split(), record["alt"].split()
    if run == "swapped":
        first, second = second, first
    words = ("w7", record["cue2"], "w8", "w9", *first, *second)
    return Prompt(words, (), tuple(range(5, 5 + len(first))), 0)


BLANK = Prompt(("w6", "w6", "w30", "w7", "w3", "w2", "w1"), (), (5, 6), 3)


def attempt(
    text: str,
    folder: Path,
    models: Mapping[str, Any],
    options: RunOptions | None = None,
    *,
    prompts: str = PROMPTS + OTHERS,
    tokenizers: Mapping[str, Any] | None = None,
) -> tuple[FileResult | None, list[Diagnostic]]:
    """Run a file on models passed from Python."""
    if not (folder / "data.jsonl").exists():
        write_rows(folder)
    known = "\n".join(f'model {name} = local("handed over")' for name in models)
    whole = f"mech 1\n{known}\n{prompts}\n{text}"
    source = Source(whole, folder / "file.mech")
    if tokenizers is None and all(map(is_unchanged, models.values())):
        return run_on(source, {name: shared(m, name) for name, m in models.items()}, options)
    pairs = {
        name: (model, (tokenizers or {}).get(name) or word_tokenizer())
        for name, model in models.items()
    }
    return run_source(source, options, pairs)


def run(
    text: str, folder: Path, models: Mapping[str, Any], options: Any = None, **others: Any
) -> dict[str, ExperimentResult]:
    """Experiment name → result, prompts in the order of the data."""
    return by_name(*attempt(text, folder, models, options, **others))


def models(family: str, *names: str) -> dict[str, Any]:
    return {name: bare(family, SEEDS[name]) for name in names or ("m",)}


def unpatched(family: str, of: Prompt, model: str = "m") -> Any:
    run = forward(family, bare(family, SEEDS[model]), of.ids)
    return run.logits, run.seen


def patched(family: str, of: Prompt, writes: Iterable[Write], model: str = "m") -> Any:
    return forward(family, bare(family, SEEDS[model]), of.ids, writes).logits


Where = tuple[Sequence[int], Sequence[int]]


def by_prompt(
    family: str,
    cells: Sequence[Sequence[Point]],
    sources: Sequence[Prompt],
    bases: Sequence[Prompt],
    where: Sequence[Where],
    *,
    read: str = "m",
    model: str = "m",
) -> tuple[Array, Array, Array]:
    """Reference values ([cell, prompt] patched, [prompt] base, [prompt] source)."""
    found = np.zeros((len(cells), len(ROWS)))
    base, source = np.zeros(len(ROWS)), np.zeros(len(ROWS))
    for n, record in enumerate(ROWS):
        logits, seen = unpatched(family, sources[n], read)
        source[n] = difference(logits, record)
        base[n] = difference(unpatched(family, bases[n], model)[0], record)
        for cell, points in enumerate(cells):
            edits = copied(points, seen, *where[n])
            found[cell, n] = difference(patched(family, bases[n], edits, model), record)
    return found, base, source


def layers(site: str, count: int = 3) -> list[list[Point]]:
    return [[Point(site, layer)] for layer in range(count)]


def same(measure: MeasureData, expected: tuple[Array, Array, Array], rows: slice) -> None:
    """Compare the cells of one variant, and its base and source values, with a reference."""
    values, base, source = expected
    part = replace(
        measure,
        patched=measure.patched[rows],
        base=np.broadcast_to(measure.base, measure.patched.shape)[rows],
    )
    assert part.patched.shape == (len(values), len(ROWS))
    agree(part, values, base)
    if measure.source is not None:
        own = np.broadcast_to(measure.source, measure.patched.shape)[rows]
        np.testing.assert_allclose(own, np.broadcast_to(source, own.shape), atol=1e-4)
