"""E0604 to E0607, E0621, E0622, W072x, W075x: numbers, statistics and expectations."""

from __future__ import annotations

from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class NotFinite(Diagnostic):
    """A model whose output is NaN, or infinite where a metric can't use that."""

    code = "E0621"
    title = "`{model}` gives NaN or infinity in the {run}, row {row} of `{prompts}`"
    label = "{where}"
    help = (
        "half precision may be too narrow: try `--dtype float32`; `--allow-nan` leaves such rows "
        "out of everything and counts them"
    )
    model: str
    run: str
    row: int
    prompts: str
    where: str


@keyword_record
class MissingPickResult(Diagnostic):
    """An experiment that needs the result of one that could not be computed."""

    code = "E0622"
    title = "`{experiment}` uses the results of `{of}`, which could not be computed"
    label = "needs {what}"
    help = "mend `{of}`, whose error stands above"
    experiment: str
    of: str
    what: str


@keyword_record
class RowsLeftOut(Diagnostic):
    """Rows that `--allow-nan` has left out."""

    code = "W0750"
    title = "{count} of {rows} rows of `{experiment}` are left out: NaN or infinity"
    label = "{listed}"
    help = "find out why: results on the rows that are left say nothing about these"
    experiment: str
    count: int
    rows: int
    listed: str


@keyword_record
class PickBySign(Diagnostic):
    """A pick by sign that would be another one by size."""

    code = "W0751"
    title = "`{text}` picks by sign; by size it would be others"
    label = "picked: {picked}; by absolute value: {by_size}"
    help = (
        "where falls matter, let `{of}` measure the negative first: `measure -logit(answer) as "
        "delta`"
    )
    text: str
    picked: str
    by_size: str
    of: str


@keyword_record
class UndefinedMeasure(Diagnostic):
    """A measure that is no number in a row of an unpatched run."""

    code = "E0631"
    title = "`{text}` has no value in {place}"
    label = "{reason}"
    help = "leave such rows out with `keep`, or measure what has a value in every row"
    text: str
    place: str
    reason: str


@keyword_record
class UndefinedCells(Diagnostic):
    """Cells that have no value, as the measure is no number in some of their rows."""

    code = "W0762"
    title = "`{text}` has no value in {count} of {cells} cells of `{experiment}`"
    label = "{reason}: first in the {place}"
    help = "measure what has a value in every row; in tables these cells are `–`"
    text: str
    count: int
    cells: int
    experiment: str
    reason: str
    place: str


@keyword_record
class ZeroDenominator(Diagnostic):
    code = "E0604"
    title = "the denominator of `{effect}` cannot be told from 0"
    label = "{divisor} is {mean} over {n} rows, {confidence} % interval {low} to {high}"
    help = "measure `as delta`, take more rows, or a metric and a corruption that separate the runs"
    effect: str
    divisor: str
    mean: str
    low: str
    high: str
    confidence: str
    n: int


@keyword_record
class AmbiguousMeasure(Diagnostic):
    code = "E0605"
    title = "which of the {count} measures is meant by `{text}`?"
    label = "could be {candidates}"
    help = "{hint}"
    text: str
    count: int
    candidates: str
    hint: str


@keyword_record
class UnreadableExpectation(Diagnostic):
    code = "E0606"
    title = "this expectation cannot be decided: {reason}"
    help = "{hint}"
    reason: str
    hint: str


@keyword_record
class BadReport(Diagnostic):
    code = "E0607"
    hangs_on = frozenset({"columns"})
    title = "`report {kind}` {reason}"
    help = "{hint}"
    kind: str
    reason: str
    hint: str


@keyword_record
class TooFewPrompts(Diagnostic):
    code = "W0720"
    hangs_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "{about}"
    label = "{reach}"
    help = "take more {unit}s, sweep fewer cells, or see the p values as a description only"
    about: str
    """The cells and their small numbers of prompts."""
    reach: str
    """The smallest possible p with these numbers."""
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""


@keyword_record
class ExplainedByValues(Diagnostic):
    """Rows that differ by one value of the prompts more than by all the rest."""

    code = "W0722"
    title = "`{name}` explains {share} of what rows of `{label_of}` differ by"
    label = "for values that weren't run, effective n is {values} values of `{name}`, not {n} rows"
    help = "{line}, so that intervals and p hold for new values; without it they hold for new rows "
    help += "with these {values}"
    name: str
    share: str
    label_of: str
    values: int
    n: int
    line: str


@keyword_record
class SkewedFamily(Diagnostic):
    """Effects whose corrected p would be below the level too often."""

    code = "W0723"
    title = "effects of `{experiment}` are too skewed to say which of {cells} cells survive"
    label = "over {units} {unit}s, more than 1 in 20 such experiments would find one by chance"
    help = "take more {unit}s, measure a difference of logits in place of a probability or a loss, "
    help += "or write `expect max(…) > 0`, whose bounds hold"
    experiment: str
    cells: int
    units: int
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""
