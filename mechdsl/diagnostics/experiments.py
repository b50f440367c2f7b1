"""E0601 to E0603, E061x, E0620, E063x, E0650: experiments as a whole."""

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
