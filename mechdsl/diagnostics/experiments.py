"""E0601 to E0607, E061x, E062x, E063x, E0650, W072x, W075x: experiments and their statistics."""

from __future__ import annotations

from mechdsl.diagnostics.core import Diagnostic, HintedDiagnostic, ReasonedDiagnostic


class BadControl(ReasonedDiagnostic):
    """Random targets that can't be drawn."""

    code = "E0630"
    title = "`{text}` can't be drawn: {reason}"
    text: str


class NoMeasure(HintedDiagnostic):
    """An experiment without a `measure` line."""

    code = "E0601"
    title = "experiment `{experiment}` measures nothing"
    label = "no `measure` line in this experiment"
    experiment: str
    hint: str = "add a measure, for example `measure logit(answer) as raw`"


class PatchWithoutSource(Diagnostic):
    """A `patch` or a `path` without a run that it reads."""

    code = "E0602"
    title = "`{verb}` has no source run to read the activation from"
    label = "no source run is named"
    help = "add a line such as `from clean into {base}`{otherwise}"
    verb: str
    base: str
    otherwise: str


class EffectNeedsSource(Diagnostic):
    """A share of a way that has only one end."""

    code = "E0603"
    title = "`{effect}` needs a source run"
    label = "this effect is a fraction of the difference between the source run and the base run"
    help = "add a line such as `from clean into {base}`, or measure `as delta`"
    effect: str
    base: str


class EffectWithoutRule(Diagnostic):
    """A difference between a run and itself."""

    code = "E0611"
    title = "`{effect}` is always 0 in an experiment without a rule"
    label = "no rule changes this experiment's runs"
    help = "add a rule such as `patch layer * head * at last token`, or measure `as {instead}`"
    effect: str
    instead: str


class UnreadableMeasure(HintedDiagnostic):
    """An expression that can't be read off a model's output."""

    code = "E0612"
    title = "`{text}` cannot be measured: {reason}"
    label = "{reason}{place}"
    text: str
    reason: str
    place: str = ""
    """After a comma, the run or cell and the row, if it occurs only there."""


NO_GENERATION_REASON = "no rule writes anything"
"""Why an experiment without a rule can't be estimated."""


class NoEstimate(ReasonedDiagnostic):
    """Gradients that are not defined or not computed."""

    code = "E0608"
    title = "`{statement}` can't {verb} {what}: {reason}"
    statement: str
    verb: str = "estimate"
    what: str


class NoRowsKept(Diagnostic):
    """A `keep` that leaves no row."""

    code = "E0613"
    title = "`keep` removes all {rows} rows"
    label = "no row of the clean run meets this condition"
    help = "check that the model can do this task: measure `correct as raw`"
    rows: int


class ExperimentFailed(Diagnostic):
    """An experiment that something unforeseen ended."""

    code = "E0650"
    title = "`{experiment}` failed: {reason}"
    label = "the other experiments still ran"
    help = (
        "run it alone with `--only {experiment}` and MECHDSL_DEBUG=1 in the environment to see "
        "the traceback; if the cause isn't in your code, please report it with the file"
    )
    experiment: str
    reason: str


class BadPick(ReasonedDiagnostic):
    """A `top n of EXPERIMENT` that nothing can be picked by."""

    code = "E0620"
    title = "`{text}` can't be picked: {reason}"
    text: str


class SelectionRowsReused(HintedDiagnostic):
    """Sites that are tested on the rows that they were picked on."""

    code = "W0721"
    depends_on = frozenset({"rows"})
    title = "`{experiment}` tests selections of `{of}` on the rows used to select them"
    label = "{shared} of its {rows} rows are also rows of `{of}`"
    experiment: str
    of: str
    shared: int
    rows: int


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
    title = "the denominator of `{effect}` is too close to 0"
    label = "{divisor} is {size} over {n} rows"
    help = (
        "measure `as delta`, use more rows, or choose a metric and a corruption that "
        "separate the runs"
    )
    effect: str
    divisor: str
    size: str
    """The denominator with its interval."""
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
