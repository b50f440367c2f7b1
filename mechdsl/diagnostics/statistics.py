"""E0604 to E0607, E0621, E0622, W072x, W075x: numbers, statistics and expectations."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic


class NotFinite(Diagnostic):
    """A model whose output is NaN, or infinite where a metric can't use that."""

    code = "E0621"
    title = "`{model}` gives NaN or infinity in the {run}, row {row} of `{prompts}`"
    label = "{where}"
    help = "{hint}, or use `--allow-nan` to exclude and count these rows"
    model: str
    run: str
    row: int
    prompts: str
    where: str
    hint: str


class MissingPickResult(Diagnostic):
    """An experiment that needs the result of one that could not be computed."""

    code = "E0622"
    title = "`{experiment}` uses the results of `{of}`, which could not be computed"
    label = "needs {what}"
    help = "fix the error in `{of}` above"
    experiment: str
    of: str
    what: str


class RowsLeftOut(Diagnostic):
    """Rows that `--allow-nan` has left out."""

    code = "W0750"
    title = "{count} of {rows} rows of `{experiment}` are excluded because of NaN or infinity"
    label = "{listed}"
    help = "find the cause: results on the remaining rows say nothing about these"
    experiment: str
    count: int
    rows: int
    listed: str


class PickBySign(Diagnostic):
    """A pick by sign that would be another one by size."""

    code = "W0751"
    title = "`{text}` ranks by signed value; ranking by absolute value gives a different selection"
    label = "only by signed value: {picked}; only by absolute value: {by_size}"
    help = "if decreases matter, {hint}"
    text: str
    picked: str
    by_size: str
    of: str
    hint: str


class UndefinedMeasure(Diagnostic):
    """A measure that isn't a number in a row of an unpatched run."""

    code = "E0631"
    title = "`{text}` has no value in {place}"
    label = "{reason}"
    help = "exclude these rows with `keep`, or use a measure that has a value in every row"
    text: str
    place: str
    reason: str


class UndefinedCells(Diagnostic):
    """Cells that have no value, as the measure isn't a number in some of their rows."""

    code = "W0762"
    title = "`{text}` has no value in {count} of {cells} cells of `{experiment}`"
    label = "{reason}: first in the {place}"
    help = "use a measure that has a value in every row; tables show these cells as `–`"
    text: str
    count: int
    cells: int
    experiment: str
    reason: str
    place: str


class ZeroDenominator(Diagnostic):
    code = "E0604"
    title = "the denominator of `{effect}` is not significantly different from 0"
    label = "{divisor} is {mean} over {n} rows, {interval}"
    help = (
        "measure `as delta`, use more rows, or choose a metric and a corruption that "
        "separate the runs"
    )
    effect: str
    divisor: str
    mean: str
    interval: str
    """`with a 95 % interval from LOW to HIGH`, or why there is none."""
    n: int


class AmbiguousMeasure(HintedDiagnostic):
    code = "E0605"
    title = "`{text}` is ambiguous: it matches {count} measures"
    label = "it could mean {candidates}"
    text: str
    count: int
    candidates: str


class UnreadableExpectation(HintedDiagnostic):
    code = "E0606"
    title = "this expectation cannot be decided: {reason}"
    reason: str


class BadReport(HintedDiagnostic):
    code = "E0607"
    depends_on = frozenset({"columns"})
    title = "`report {kind}` {reason}"
    kind: str
    reason: str


class TooFewPrompts(Diagnostic):
    code = "W0720"
    depends_on = frozenset({"shape", "tokens", "rows", "count"})
    title = "{about}"
    label = "{reach}"
    help = "use more {unit}s, sweep fewer cells, or treat the p-values as descriptive only"
    about: str
    """The cells and their small numbers of prompts."""
    reach: str
    """The smallest possible p with these numbers."""
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""


class ExplainedByValues(Diagnostic):
    """Rows that differ by one value of the prompts more than by all the rest."""

    code = "W0722"
    title = "`{name}` explains {share} of the variance between rows of `{label_of}`"
    label = "for new values, the effective sample size is {values} values of `{name}`, not {units}"
    help = (
        "{line} to make intervals and p-values hold for new values; otherwise they hold "
        "for new {population} with these {values} values of `{name}`"
    )
    name: str
    share: str
    label_of: str
    values: int
    units: str
    """The effective sample size of the cell, such as `5 values of io`."""
    population: str
    """What intervals are about: rows, or values of `stats by`."""
    line: str


class SkewedFamily(Diagnostic):
    """Effects whose corrected p would be below the level too often."""

    code = "W0723"
    title = "effects of `{experiment}` are too skewed to say which of {cells} cells are significant"
    label = (
        "with {units} {unit}s, more than 1 in 20 such experiments would find a significant "
        "cell by chance"
    )
    help = "use more {unit}s, measure a difference of logits instead of a probability or a loss, "
    help += "or write `expect max(…) > 0`, whose bounds remain valid"
    experiment: str
    cells: int
    units: int
    unit: str = "prompt"
    """Name of a row: a prompt or an image."""
