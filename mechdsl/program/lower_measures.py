"""What an experiment measures and shows, as typed data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from mechdsl.base import limits
from mechdsl.base.names import AT
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import BadArgument, RepeatedStatement, did_you_mean
from mechdsl.program import spec
from mechdsl.program.constants import constant, whole_number
from mechdsl.program.lower_images import IMAGE
from mechdsl.program.namespace import Namespace
from mechdsl.program.sort_statements import Statements
from mechdsl.syntax import ast
from mechdsl.syntax.template import parse_template
from mechdsl.syntax.walk import depth, rewrite, walk

if TYPE_CHECKING:
    from mechdsl.program.definitions import Definitions

TESTS = ("t", "flips", "bootstrap")
"""What stands behind `stats test`: where p comes from."""
PATTERN = "matches"
"""The metric whose text is a regular expression, in which braces count."""
CORRECTIONS = ("holm", "bh", "max", "none")
"""What stands behind `stats correct`."""
OF_VERDICTS = ("holm", "none")
"""What stands behind `stats verdicts`."""


def expand_metrics(expression: ast.Expr, parts: Definitions, scope: Namespace) -> ast.Expr:
    """The expression with the names of metrics replaced by what they stand for."""
    written = expression
    reason = "is defined by itself"
    for step in range(len(parts.metrics) + 1):
        found = False
        # What a metric is called with is a text, a run or a site, whatever its name.
        arguments = {
            part.span
            for call in walk(expression)
            if isinstance(call, ast.Call)
            for part in walk(call.arguments)
        }

        def change(node: ast.Node, arguments: set[Span] = arguments) -> ast.Node:
            nonlocal found
            metric = isinstance(node, ast.Name) and node.span not in arguments
            if isinstance(node, ast.Name) and metric and node.id in parts.metrics:
                found = True
                scope.has("metric", node.id)
                return parts.metrics[node.id]
            if isinstance(node, ast.Name):
                scope.has("param", node.id)
            return node

        expression = rewrite(expression, change)
        if not found:
            return expression
        if sum(1 for _ in walk(expression)) > limits.PARTS:
            reason = f"has more than {limits.PARTS:,} parts when its metrics are written out"
            break
        if depth(expression) > limits.DEPTH + 1:
            reason = f"is nested more than {limits.DEPTH} deep when its metrics are written out"
            break
        if step >= limits.CHAIN:
            reason = f"hangs on more than {limits.CHAIN} metrics, one behind the other"
            break
    for name in parts.metrics:
        scope.has("metric", name)
    scope.diagnostics.append(
        BadArgument(
            span=written.span,
            name=written.span.written,
            reason=reason,
            hint="a metric may use other metrics, but not in a circle or without end",
        )
    )
    return written


def lower_measure(measure: ast.Measure, parts: Definitions, scope: Namespace) -> spec.Measure:
    metric = measure.metric
    named = isinstance(metric, ast.Name) and metric.id in parts.metrics
    label = metric.id if named and isinstance(metric, ast.Name) else metric.span.written
    if measure.per is not None and (measure.per.id != "prompt" or measure.effect.id != "relative"):
        scope.diagnostics.append(
            BadArgument(
                span=measure.per.span,
                name=f"per {measure.per.id}",
                reason="is not a way of averaging",
                hint="only `as relative per prompt` averages ratios",
            )
        )
    expanded = expand_metrics(metric, parts, scope)
    patterns = {id(part) for call in walk(expanded) if isinstance(call, ast.Call)
                and call.name == PATTERN for part in walk(call.arguments)}  # fmt: skip
    for node in walk(expanded):
        if isinstance(node, ast.String) and id(node) not in patterns:
            scope.diagnostics.extend(parse_template(node)[1])  # a brace too many rows would hide
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


def told_apart(measures: tuple[spec.Measure, ...]) -> tuple[spec.Measure, ...]:
    """Measures that go by one name and are read at different places are called by these too:
    `ld at item 1 token`. Where only one is read elsewhere than where the prompt ends, it alone."""
    places: dict[str, set[ast.Position | None]] = {}
    for measure in measures:
        places.setdefault(measure.label, set()).add(measure.at)
    return tuple(
        measure
        if measure.place is None or len(places[measure.label]) == 1
        else measure.model_copy(update={"label": f"{measure.label}{AT}{measure.place}"})
        for measure in measures
    )


def each_once(measures: Sequence[spec.Measure], work: Statements) -> None:
    """The same measure twice would only make the correction stricter."""
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


def lower_statistics(work: Statements) -> spec.Statistics:
    """Tiles of one image count together, as they are no independent observations."""
    named = work.prompts[0].prompts if work.prompts else ()
    blocks = [work.parts.prompts.get(ref.name) for ref in named]
    tiles = bool(blocks) and all(each is not None and each.tiles is not None for each in blocks)
    values: dict[str, object] = {"span": work.definition.name.span, "by": IMAGE if tiles else None}
    if not work.stats:
        return spec.Statistics.model_validate(values)
    line = work.stats[0]
    values["span"] = line.span
    if line.resampling is not None:
        arguments = line.resampling.arguments
        count = constant(arguments[0].value, work.parts.parameters) if len(arguments) == 1 else None
        good = isinstance(count, int) and 100 <= count <= 1_000_000
        if line.resampling.name != "bootstrap" or not good:
            name = line.resampling.name
            own = name == "bootstrap"
            reason = "takes one whole number" if own else "is not a resampling that is supported"
            hint = "write `bootstrap(n)` with n from 100 to 1,000,000"
            if not own:
                hint = did_you_mean(name, ("bootstrap",), hint)
            work.diagnostics.append(
                BadArgument(span=line.resampling.span, name=name, reason=reason, hint=hint)
            )
        values["resamples"] = count if good else 10_000
    if line.test is not None and line.test.arguments:
        hint = "write `stats bootstrap(10000) test bootstrap`: resamples stand in front of it"
        reason = "takes no number behind `test`"
        found = BadArgument(span=line.test.span, name=line.test.name, reason=reason, hint=hint)
        work.diagnostics.append(found)
    elif line.test is not None and _known(line.test, line.test.name, TESTS, "is not a test", work):
        values["test"] = line.test.name
    if line.confidence is not None:
        if not 50 <= line.confidence.value < 100:
            work.diagnostics.append(
                BadArgument(
                    span=line.confidence.span,
                    name="confidence",
                    reason="must lie between 50% and 100%",
                    hint="write `confidence 95%`",
                )
            )
        else:
            values["confidence"] = line.confidence.value
    reason = "is not a correction for many comparisons"
    if line.correction is not None and _known(
        line.correction, line.correction.id, CORRECTIONS, reason, work
    ):
        values["correction"] = line.correction.id
    reason = "is not a correction for several verdicts"
    if line.verdicts is not None and _known(
        line.verdicts, line.verdicts.id, OF_VERDICTS, reason, work
    ):
        values["verdicts"] = line.verdicts.id
    if line.by is not None:
        values["by"] = line.by.id
    return spec.Statistics.model_validate(values)


def _known(node: ast.Node, word: str, known: Sequence[str], reason: str, work: Statements) -> bool:
    """Whether a word of a `stats` line is one that there is; E0207 where it isn't."""
    if word in known:
        return True
    hint = did_you_mean(word, known, f"write one of {', '.join(known)}")
    work.diagnostics.append(BadArgument(span=node.span, name=word, reason=reason, hint=hint))
    return False


def lower_report(report: ast.Report, work: Statements) -> spec.Report:
    top = whole_number(report.top, work.parts.parameters)
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
    )


def _truths(condition: ast.Expr | None) -> Iterator[str]:
    """Words that say what is true: `name_movers` of `auroc(recovery, name_movers)`."""
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
                    reason="is not a way of comparing",
                    hint="`on mean` compares the mean alone, without its interval",
                )
            )
        relaxed = "mean"
    text = expect.span.written.removeprefix("expect ")
    truths = dict.fromkeys(_truths(expect.condition))
    named = [word for word in truths if work.scope.has("group", word)]
    return spec.Expectation(
        span=expect.span,
        text=text,
        condition=expect.condition,
        groups=tuple(work.parts.groups[word] for word in named),
        top=whole_number(expect.top, work.parts.parameters),
        contains=expect.contains,
        on_mean=relaxed is not None,
        citing=None if expect.citing is None else expect.citing.value,
    )
