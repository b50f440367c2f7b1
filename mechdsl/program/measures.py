"""Measures, statistics, reports, expectations, controls and the estimator of an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from mechdsl.base import limits
from mechdsl.base.limits import is_integer
from mechdsl.base.text import POSITION_SEPARATOR, Span
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.experiments import BadControl
from mechdsl.diagnostics.syntax import BadArgument, RepeatedStatement, UnknownWord
from mechdsl.program import spec
from mechdsl.program.estimators import ESTIMATOR_ALIASES, ESTIMATORS, GradientEstimator
from mechdsl.program.images import IMAGE_SPAN
from mechdsl.program.names import Namespace
from mechdsl.program.spec import constant_value, whole_number_value
from mechdsl.program.statements import Statements, expand_metrics, mark_names_used
from mechdsl.syntax import ast
from mechdsl.syntax.parser import parse_template
from mechdsl.syntax.traversal import walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


TEST_WORDS = ("t", "flips", "bootstrap")
"""Words after `stats test`: methods for p-values."""

PATTERN_METRIC = "matches"
"""The metric whose text is a regular expression and so may contain braces."""

CORRECTION_WORDS = ("holm", "bh", "max", "none")
"""Words after `stats correct`."""

VERDICT_CORRECTIONS = ("holm", "none")
"""Words after `stats verdicts`."""


def lower_measure(measure: ast.Measure, parts: Definitions, scope: Namespace) -> spec.Measure:
    metric = measure.metric
    named = isinstance(metric, ast.Name) and metric.id in parts.metrics
    label = metric.id if named and isinstance(metric, ast.Name) else metric.span.written
    if measure.per is not None and (measure.per.id != "prompt" or measure.effect.id != "relative"):
        scope.diagnostics.append(
            BadArgument(
                span=measure.per.span,
                name=f"per {measure.per.id}",
                reason="is not a type of average",
                hint="only `as relative per prompt` averages ratios",
            )
        )
    expanded = expand_metrics(metric, parts, scope)
    patterns = {id(part) for call in walk(expanded) if isinstance(call, ast.Call)
                and call.name == PATTERN_METRIC for part in walk(call.arguments)}  # fmt: skip
    for node in walk(expanded):
        if isinstance(node, ast.String) and id(node) not in patterns:
            scope.diagnostics.extend(parse_template(node)[1])  # rows would hide a superfluous brace
    return spec.Measure(
        span=measure.span,
        label=label,
        metric=expanded,
        effect=measure.effect.id,
        effect_span=measure.effect.span,
        at=measure.at,
        per_prompt=measure.per is not None,
        over=None if measure.over is None else measure.over.id,
        area=measure.area,
    )


def label_by_position(measures: tuple[spec.Measure, ...]) -> tuple[spec.Measure, ...]:
    """Add positions to the labels of equally named measures: `ld at item 1 token`.

    If only one of them is read at a position other than the end of the prompt, only its label
    changes.
    """
    places: dict[str, set[ast.Position | None]] = {}
    for measure in measures:
        places.setdefault(measure.label, set()).add(measure.at)
    return tuple(
        measure
        if measure.place is None or len(places[measure.label]) == 1
        else measure.model_copy(
            update={"label": f"{measure.label}{POSITION_SEPARATOR}{measure.place}"}
        )
        for measure in measures
    )


def reject_repeated_measures(measures: Sequence[spec.Measure], work: Statements) -> None:
    """Report repeated measures, which would only make the correction stricter."""
    seen: dict[tuple[object, ...], spec.Measure] = {}
    for measure in measures:
        key = (measure.metric, measure.effect, measure.at, measure.per_prompt, measure.over)
        first = seen.setdefault(key, measure)
        if first is not measure:
            work.diagnostics.append(
                RepeatedStatement(
                    span=measure.span,
                    what=measure.span.written,
                    block=work.definition.name.id,
                    first=first.span.line,
                )
            )


def _count_resamples(call: ast.Call, work: Statements) -> int:
    """Return the number of resamples that `bootstrap(n)` asks for; the default for an invalid one,
    which is reported."""
    count = (
        constant_value(call.arguments[0].value, work.parts.parameters)
        if len(call.arguments) == 1
        else None
    )
    resamples = count if isinstance(count, int) and 100 <= count <= 1_000_000 else None
    is_bootstrap = call.name == "bootstrap"
    if not is_bootstrap or resamples is None:
        reason = "is not a supported resampling method"
        reason = "takes one whole number" if is_bootstrap else reason
        hint = "write `bootstrap(n)` with n from 100 to 1,000,000"
        if not is_bootstrap:
            hint = did_you_mean(call.name, ("bootstrap",), hint)
        work.diagnostics.append(
            BadArgument(span=call.span, name=call.name, reason=reason, hint=hint)
        )
    return 10_000 if resamples is None else resamples


def lower_statistics(work: Statements) -> spec.Statistics:
    """Lower the `stats` line; tiles of one image are grouped, as they aren't independent."""
    named = work.prompts[0].prompts if work.prompts else ()
    blocks = [work.parts.prompts.get(ref.name) for ref in named]
    tiles = bool(blocks) and all(block is not None and block.tiles is not None for block in blocks)
    values: dict[str, Any] = {
        "span": work.definition.name.span,
        "by": IMAGE_SPAN if tiles else None,
    }
    if not work.stats:
        return spec.Statistics(**values)
    line = work.stats[0]
    values["span"] = line.span
    if line.resampling is not None:
        values["resamples"] = _count_resamples(line.resampling, work)
    if line.test is not None and line.test.arguments:
        hint = "write the number of resamples first: `stats bootstrap(10000) test bootstrap`"
        reason = "takes no number after `test`"
        problem = BadArgument(span=line.test.span, name=line.test.name, reason=reason, hint=hint)
        work.diagnostics.append(problem)
    elif line.test is not None and _known(
        line.test, line.test.name, TEST_WORDS, "is not a test", work
    ):
        values["test"] = line.test.name
    if line.confidence is not None:
        if not 50 <= line.confidence.value < 100:
            work.diagnostics.append(
                BadArgument(
                    span=line.confidence.span,
                    name="confidence",
                    reason="must be between 50% and 100%",
                    hint="write `confidence 95%`",
                )
            )
        else:
            values["confidence"] = line.confidence.value
    reason = "is not a correction for multiple comparisons"
    if line.correction is not None and _known(
        line.correction, line.correction.id, CORRECTION_WORDS, reason, work
    ):
        values["correction"] = line.correction.id
    reason = "is not a correction for multiple verdicts"
    if line.verdicts is not None and _known(
        line.verdicts, line.verdicts.id, VERDICT_CORRECTIONS, reason, work
    ):
        values["verdicts"] = line.verdicts.id
    if line.by is not None:
        values["by"] = line.by.id
    return spec.Statistics(**values)


def _known(node: ast.Node, word: str, known: Sequence[str], reason: str, work: Statements) -> bool:
    """Whether a word of a `stats` line is valid; E0207 if it isn't."""
    if word in known:
        return True
    hint = did_you_mean(word, known, f"write one of {', '.join(known)}")
    work.diagnostics.append(BadArgument(span=node.span, name=word, reason=reason, hint=hint))
    return False


def lower_report(report: ast.Report, work: Statements) -> spec.Report:
    top = whole_number_value(report.top, work.parts.parameters)
    if report.top is not None and (top is None or top < 1):
        work.diagnostics.append(
            BadArgument(
                span=report.span,
                name="top",
                reason="must be a whole number above 0",
                hint="write `top 10`",
            )
        )
    return spec.Report(
        span=report.span,
        kind=report.kind.id,
        variable=None if report.variable is None else report.variable.id,
        by=None if report.by is None else report.by.id,
        top=top,
        file=None if report.file is None else report.file.value,
        of=None if report.of is None else report.of.id,
        width=report.width,
    )


def _truths(condition: ast.Expr | None) -> Iterator[str]:
    """Yield the names of ground truths: `name_movers` of `auroc(recovery, name_movers)`."""
    for call in walk(condition):
        if isinstance(call, ast.Call) and call.name == "auroc":
            for node in walk(call.arguments[1:2]):
                if isinstance(node, ast.Name):
                    yield node.id


def lower_expectation(expect: ast.Expect, work: Statements) -> spec.Expectation:
    relaxed: Literal["mean"] | None = None
    if expect.relaxed is not None:
        if expect.relaxed.id != "mean":
            work.diagnostics.append(
                BadArgument(
                    span=expect.relaxed.span,
                    name=f"on {expect.relaxed.id}",
                    reason="is not a comparison method",
                    hint="write `on mean` to compare the mean alone, without its interval",
                )
            )
        relaxed = "mean"
    text = expect.span.written.removeprefix("expect ")
    truths = dict.fromkeys(_truths(expect.condition))
    groups = work.parts.groups
    named = [word for word in truths if word in groups and work.scope.has("group", word)]
    return spec.Expectation(
        span=expect.span,
        text=text,
        condition=expect.condition,
        groups=tuple(groups[word] for word in named),
        top=whole_number_value(expect.top, work.parts.parameters),
        contains=expect.contains,
        on_mean=relaxed is not None,
        citing=None if expect.citing is None else expect.citing.value,
    )


CONTROL_KINDS = ("random",)


NO_CONTROL = "none"
"""`against none`: no control for what is trained."""


def lower_no_control(work: Statements) -> spec.NoControl | None:
    """Return the line `against none` of an experiment; None without it."""
    line = next(iter(work.against), None)
    if line is None or line.control.name != NO_CONTROL or line.control.arguments or line.apart:
        return None
    return spec.NoControl(span=line.control.span)


def lower_control(work: Statements) -> spec.Control | None:
    """Lower the `against` line of an experiment. Codes: E0203, E0630."""
    if not work.against or lower_no_control(work) is not None:
        return None
    call = work.against[0].control
    if call.name not in CONTROL_KINDS:
        _unknown("control", call.name, call.span, CONTROL_KINDS, "write `against random(39)`", work)
        return None
    if not work.rules and not work.unsupported:
        _bad_control(
            call,
            "no rule of this experiment has targets",
            "add a rule such as `patch layer * head * at last token`",
            work,
        )
        return None
    named = {argument.name: argument.value for argument in call.arguments if argument.name}
    values = [argument.value for argument in call.arguments if argument.name is None]
    if not 1 <= len(values) <= 2 or named.keys() - {"frequency"}:
        _bad_control(
            call,
            "it takes a number and the type of target to sample",
            "write `random(39)` or `random(39, heads)`",
            work,
        )
        return None
    draws = constant_value(values[0], work.parts.parameters)
    if isinstance(values[0], ast.Name):
        work.scope.has("param", values[0].id)
    if not is_integer(draws) or not 0 < draws <= limits.DRAWS:
        reason = f"the number of draws must be a whole number from 1 to {limits.DRAWS:,}"
        hint = "write `random(39)`"
        if values[0].span.written in get_args(spec.ControlTarget):
            hint = f"write the number first: `random(20, {values[0].span.written})`"
        _bad_control(call, reason, hint, work)
        return None
    apart = work.against[0].apart
    for site in apart:
        mark_names_used(site, work)
    before = len(work.diagnostics)
    what = _what(values[1:], work)
    frequency = _frequency(call, what, named.get("frequency"), work)
    if has_errors(work.diagnostics[before:]):
        return None
    return spec.Control(span=call.span, draws=draws, what=what, apart=apart, frequency=frequency)


def _frequency(
    call: ast.Call, what: spec.ControlTarget | None, value: ast.Node | None, work: Statements
) -> ast.MapOf | None:
    """Return the experiment after `frequency:`, which features need and nothing else takes."""
    if value is None and what != "features":
        return None
    if what == "features" and isinstance(value, ast.Name | ast.Call):
        name = value.id if isinstance(value, ast.Name) else value.name
        cell = () if isinstance(value, ast.Name) else value.arguments
        return ast.MapOf(name, cell, span=value.span)
    reason = "`frequency` is an experiment that observes features"
    if what != "features":
        reason = "only features are matched in frequency"
    hint = "write `random(39, features, frequency: seen)`"
    _bad_control(call, reason, hint, work)
    return None


def _what(values: Sequence[ast.Node], work: Statements) -> spec.ControlTarget | None:
    """Return the type of drawn targets, if the line gives one."""
    if not values:
        return None
    word = values[0].span.written
    known = get_args(spec.ControlTarget)
    for each in known:
        if word == each:
            return each
    hint = f"write one of {', '.join(known)}"
    _unknown("type of target", word, values[0].span, known, hint, work)
    return None


def _unknown(
    kind: str, word: str, span: Span, known: tuple[str, ...], hint: str, work: Statements
) -> None:
    hint = did_you_mean(word, known, hint)
    work.diagnostics.append(UnknownWord(span=span, kind=kind, word=word, hint=hint))


def _bad_control(call: ast.Call, reason: str, hint: str, work: Statements) -> None:
    problem = BadControl(span=call.span, text=call.span.written, reason=reason, hint=hint)
    work.diagnostics.append(problem)


VERIFIED_WORDS = ("top", "random")
"""Words after `verify`: how cells are chosen that are also run."""

STABLE_TOP = 20
"""Number of cells that `verify until stable` searches."""


def lower_estimator(work: Statements) -> spec.Estimator | None:
    """Lower the `using` line of an experiment. Codes: E0203, E0207."""
    if not work.using:
        return None
    line = work.using[0]
    named = line.estimator
    name = named.id if isinstance(named, ast.Name) else named.name
    arguments = () if isinstance(named, ast.Name) else named.arguments
    if ESTIMATOR_ALIASES.get(name, name) not in ESTIMATORS:
        known = (*ESTIMATORS, *ESTIMATOR_ALIASES)
        hint = did_you_mean(name, known, f"write one of {', '.join(ESTIMATORS)}")
        problem = UnknownWord(span=named.span, kind="estimator", word=name, hint=hint)
        work.diagnostics.append(problem)
        return None
    kind = ESTIMATORS[ESTIMATOR_ALIASES.get(name, name)]
    steps, options = kind.steps, dict(kind.options)
    given: set[str | None] = set()
    for argument in arguments:
        key = argument.name
        if key == "steps" and steps is not None and key not in given:
            steps = _steps(argument, kind.steps or 1, work)
        elif key in options and key not in given:
            options[key] = _option(argument, key, kind, work)
        else:
            hint = f"write `{kind.call}`" if "(" in kind.call else f"write `using {name}`"
            _bad_estimator(argument.span, name, "takes no such argument", hint, work)
            return None
        given.add(key)
    return spec.Estimator(
        span=line.span,
        name=name,
        steps=steps,
        options=tuple(options.items()),
        verify=_verification(line, work),
    )


def _verification(line: ast.Using, work: Statements) -> spec.Verification | None:
    """Lower the part after `verify`; None without one, or after an error."""
    if line.stable:
        return spec.Verification(span=line.span, top=STABLE_TOP, until="stable")
    if line.top is not None and line.confidence is not None:
        return _bounded_search(line.top, line.confidence, line, work)
    if not line.verify:
        return None
    first, last = line.verify[0].span, line.verify[-1].span
    counts: dict[str, int] = {}
    for pick in line.verify:
        if pick.how not in VERIFIED_WORDS:
            hint = did_you_mean(pick.how, VERIFIED_WORDS, "write `top 20` or `random 20`")
            problem = UnknownWord(span=pick.span, kind="choice of cells", word=pick.how, hint=hint)
            work.diagnostics.append(problem)
            return None
        if isinstance(pick.amount, str) and not work.scope.use("param", pick.amount, pick.span):
            return None
        amount = whole_number_value(pick.amount, work.parts.parameters)
        if amount is None or not 1 <= amount <= limits.CELLS:
            reason = f"must be a whole number of cells, 1 to {limits.CELLS:,}"
            _bad_estimator(pick.span, pick.how, reason, f"write `{pick.how} 20`", work)
            return None
        if pick.how in counts:
            reason, hint = "is given twice", f"write one `{pick.how}`"
            _bad_estimator(pick.span, pick.how, reason, hint, work)
            return None
        counts[pick.how] = amount
    span = Span(first.source, first.start, last.end)
    return spec.Verification(span=span, top=counts.get("top", 0), random=counts.get("random", 0))


def _bounded_search(
    count: int | str, confidence: ast.Percent, line: ast.Using, work: Statements
) -> spec.Verification | None:
    """Lower `until top 20 95%`; None after an error."""
    if isinstance(count, str) and not work.scope.use("param", count, line.span):
        return None
    top = whole_number_value(count, work.parts.parameters)
    if top is None or not 1 <= top <= limits.CELLS:
        reason = f"must be a whole number of cells, 1 to {limits.CELLS:,}"
        _bad_estimator(line.span, "top", reason, "write `until top 20 95%`", work)
        return None
    if not 50 <= confidence.value < 100:
        reason = "must be a confidence from 50% to less than 100%"
        name, hint = f"{confidence.value:g}%", f"write `until top {top} 95%`"
        _bad_estimator(confidence.span, name, reason, hint, work)
        return None
    return spec.Verification(
        span=line.span, top=top, until="bound", confidence=float(confidence.value)
    )


def _steps(argument: ast.Argument, default: int, work: Statements) -> int:
    """Return the number of points on the line at which gradients are taken."""
    value = _argument_value(argument, work)
    if type(value) is int and 1 <= value <= limits.STEPS:
        return value
    reason = f"must be a whole number from 1 to {limits.STEPS:,}"
    _bad_estimator(argument.span, "steps", reason, f"write `steps: {default}`", work)
    return default


def _option(
    argument: ast.Argument, name: str, kind: GradientEstimator, work: Statements
) -> int | float:
    """Return the number of another argument."""
    default, value = kind.options[name], _argument_value(argument, work)
    whole = type(default) is int
    if type(value) is int or (type(value) is float and not whole):
        reason = kind.check_option(name, value)
        if reason is None:
            return value if whole else float(value)
    else:
        reason = "must be a whole number" if whole else "must be a number"
    _bad_estimator(argument.span, name, reason, f"write `{name}: {default}`", work)
    return default


def _argument_value(argument: ast.Argument, work: Statements) -> spec.Constant | None:
    """Return the constant of an argument, which may be a parameter; None if it isn't constant."""
    if isinstance(argument.value, ast.Name):
        work.scope.has("param", argument.value.id)
    return constant_value(argument.value, work.parts.parameters)


def _bad_estimator(span: Span, name: str, reason: str, hint: str, work: Statements) -> None:
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))


def metric_operands(value: ast.Expr) -> Iterator[ast.Name]:
    """Yield the names that arithmetic of a metric consists of."""
    match value:
        case ast.Name():
            yield value
        case ast.Binary(left=left, right=right):
            yield from (*metric_operands(left), *metric_operands(right))
        case ast.Negative(operand=operand):
            yield from metric_operands(operand)
        case _:
            pass
