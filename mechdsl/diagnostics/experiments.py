"""E0601 to E0603, E061x, E0620, E063x, E0650: experiments as a whole."""

from __future__ import annotations

from mechdsl.base.records import keyword_record
from mechdsl.diagnostics.core import Diagnostic


@keyword_record
class BadControl(Diagnostic):
    """Random targets that can't be drawn."""

    code = "E0630"
    title = "`{text}` can't be drawn: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str


@keyword_record
class NoMeasure(Diagnostic):
    """An experiment without a `measure` line."""

    code = "E0601"
    title = "experiment `{experiment}` measures nothing"
    label = "no `measure` line in this experiment"
    help = "{hint}"
    experiment: str
    hint: str = "add what to read, for example `measure logit(answer) as raw`"


@keyword_record
class PatchWithoutSource(Diagnostic):
    """A `patch` or a `path` without a run that it reads."""

    code = "E0602"
    title = "`{verb}` doesn't say where the activation comes from"
    label = "patched from which run?"
    help = "add a line such as `from clean into {base}`{otherwise}"
    verb: str
    base: str
    otherwise: str


@keyword_record
class EffectNeedsSource(Diagnostic):
    """A share of a way that has only one end."""

    code = "E0603"
    title = "`{effect}` needs a source run"
    label = "the effect is a share of the way from the base run to the source run"
    help = "add a line such as `from clean into {base}`, or measure `as delta`"
    effect: str
    base: str


@keyword_record
class EffectWithoutRule(Diagnostic):
    """A difference between a run and itself."""

    code = "E0611"
    title = "`{effect}` is always 0 in an experiment without a rule"
    label = "nothing is changed in this experiment"
    help = "add a rule such as `patch layer * head * at last token`, or measure `as {instead}`"
    effect: str
    instead: str


@keyword_record
class UnreadableMeasure(Diagnostic):
    """An expression that can't be read off a model's output."""

    code = "E0612"
    title = "`{text}` cannot be measured: {reason}"
    label = "{reason}{place}"
    help = "{hint}"
    text: str
    reason: str
    hint: str
    place: str = ""
    """After a comma, the run or cell and the row, if it occurs only there."""


NO_GENERATION_REASON = "nothing is written"
"""Why an experiment without a rule can't be estimated."""


@keyword_record
class NoEstimate(Diagnostic):
    """What gradients of unpatched runs say nothing about."""

    code = "E0608"
    title = "`using {using}` can't estimate {what}: {reason}"
    label = "{reason}"
    help = "{hint}"
    using: str
    what: str
    reason: str
    hint: str


@keyword_record
class NoRowsKept(Diagnostic):
    """A `keep` that leaves no row."""

    code = "E0613"
    title = "`keep` leaves none of the {rows} rows"
    label = "holds for no row of the clean run"
    help = "the model may not do this task: measure `correct as raw` first"
    rows: int


@keyword_record
class ExperimentFailed(Diagnostic):
    """An experiment that something unforeseen ended."""

    code = "E0650"
    title = "`{experiment}` broke off: {reason}"
    label = "the other experiments were run without it"
    help = (
        "`--only {experiment}` runs it alone, and with MECHDSL_DEBUG=1 in the environment prints "
        "the traceback; if nothing there is yours, please report it with the file"
    )
    experiment: str
    reason: str


@keyword_record
class BadPick(Diagnostic):
    """A `top n of EXPERIMENT` that nothing can be picked by."""

    code = "E0620"
    title = "`{text}` can't be picked: {reason}"
    label = "{reason}"
    help = "{hint}"
    text: str
    reason: str
    hint: str


@keyword_record
class SelectionRowsReused(Diagnostic):
    """Sites that are tested on the rows that they were picked on."""

    code = "W0721"
    hangs_on = frozenset({"rows"})
    title = "`{experiment}` tests what `{of}` picked on the same rows"
    label = "{shared} of its {rows} rows are rows of `{of}`"
    help = (
        "use split: with `split 50%` in `prompts {block}`, let `{of}` run on `{block}.train` and "
        "`{experiment}` on `{block}.test`"
    )
    experiment: str
    of: str
    block: str
    shared: int
    rows: int
