"""An `experiment` block as typed data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from mechdsl import spec
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import (
    BadArgument,
    DuplicateName,
    MissingLine,
    RepeatedStatement,
    UnknownName,
)
from mechdsl.diagnostics.e06_experiment import NoMeasure, PatchWithoutSource
from mechdsl.lower.constants import constant, whole_number
from mechdsl.lower.prompts import CLEAN, known_run
from mechdsl.lower.scope import Scope, place
from mechdsl.source import Span
from mechdsl.syntax import ast
from mechdsl.syntax.walk import rewrite, walk

if TYPE_CHECKING:
    from mechdsl.lower.program import Parts

NodeT = TypeVar("NodeT", bound=ast.Node)

CORRECTIONS = ("holm", "bh", "none")
LARGEST = 10_000
"""Parts of one measure."""

# What the grammar knows and no stage executes yet, by the class of its node.
LATER: dict[type[ast.Node], str] = {
    ast.Block: "`block attention`",
    ast.Reweight: "`reweight attention`",
    ast.SetEdge: "`set attention`",
    ast.SetSite: "`set`",
    ast.PathRule: "path patching",
    ast.Add: "`add`",
    ast.Scale: "`scale`",
    ast.ProjectOut: "`project out`",
    ast.Clamp: "`clamp`",
    ast.SwapSites: "`swap`",
    ast.Freeze: "`freeze`",
    ast.Against: "`against`",
    ast.Generate: "`generate`",
    ast.Using: "an estimator",
    ast.Discover: "`discover`",
    ast.Search: "`search`",
    ast.ObserveAttention: "`observe attention`",
    ast.ObserveFeatures: "`observe features`",
    ast.Observe: "`observe`",
    ast.During: "`during`",
    ast.Ranked: "a position or site that another experiment ranked",
}


class _Lowering:
    """Collects the statements of one experiment."""

    def __init__(self, definition: ast.ExperimentDef, parts: Parts, scope: Scope) -> None:
        self.definition = definition
        self.parts = parts
        self.scope = scope
        self.models: list[ast.UseModel] = []
        self.prompts: list[ast.UsePrompts] = []
        self.from_into: list[ast.FromInto] = []
        self.keep: list[ast.Expr] = []
        self.loops: list[spec.Loop] = []
        self.rules: list[tuple[ast.Rule, tuple[str, ...]]] = []
        self.measures: list[ast.Measure] = []
        self.stats: list[ast.Stats] = []
        self.reports: list[ast.Report] = []
        self.expects: list[ast.Expect] = []
        self.unsupported = False

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.scope.diagnostics

    def later(self, span: Span, what: str) -> None:
        self.unsupported = True
        self.diagnostics.append(NotSupported(span=span, what=what))

    def collect(self, statements: Sequence[ast.Statement], loops: tuple[str, ...] = ()) -> None:
        for statement in statements:
            match statement:
                case ast.Rule():
                    self.rule(statement, loops)
                case ast.For():
                    self.loop(statement, loops)
                case ast.UseModel():
                    self.once(statement, self.models, "model")
                case ast.UsePrompts():
                    self.once(statement, self.prompts, "prompts")
                case ast.FromInto():
                    self.once(statement, self.from_into, "from … into …")
                case ast.Stats():
                    self.once(statement, self.stats, "stats")
                case ast.Keep():
                    self.keep.append(statement.condition)
                case ast.Measure():
                    self.measures.append(statement)
                case ast.Report():
                    self.reports.append(statement)
                case ast.Expect():
                    self.expects.append(statement)
                case _:
                    self.later(statement.span, LATER[type(statement)])

    def once(self, statement: NodeT, seen: list[NodeT], what: str) -> None:
        """Keep a statement that may stand once in an experiment."""
        if seen:
            self.diagnostics.append(
                RepeatedStatement(
                    span=statement.span,
                    what=what,
                    block=self.definition.name.id,
                    first=seen[0].span.line,
                )
            )
        else:
            seen.append(statement)

    def loop(self, statement: ast.For, loops: tuple[str, ...]) -> None:
        name = statement.name
        taken = next((x for x in self.loops if x.name == name.id), None)
        if taken is not None:
            self.diagnostics.append(
                DuplicateName(span=name.span, name=name.id, first=place(taken.span, name.span))
            )
        else:
            self.loops.append(spec.Loop(span=name.span, name=name.id, domain=statement.domain))
        _use_names(statement.domain, self)
        self.collect(statement.body, (*loops, name.id))

    def rule(self, rule: ast.Rule, loops: tuple[str, ...]) -> None:
        """Keep a rule that can be executed; E0108 at the part that can't."""
        before = len(self.diagnostics)
        what = LATER.get(type(rule.body))
        if what is not None:
            self.later(rule.body.span, what)
            return
        for node in walk(rule):
            if type(node) in LATER:
                self.later(node.span, LATER[type(node)])
            elif isinstance(node, ast.Site) and node.basis is not None:
                self.later(node.span, "a subspace")
            elif isinstance(node, ast.Axis) and node.word in ("expert", "feature"):
                self.later(node.span, f"`{node.word}` sites")
            elif isinstance(node, ast.SpanRef) and (node.row is not None or node.col is not None):
                self.later(node.span, "an image position")
        if isinstance(rule.body, ast.Patch):
            if rule.body.onto is not None:
                self.later(rule.body.onto.span, "`onto`")
            if rule.body.into_layer is not None:
                self.later(rule.body.into_layer.span, "`into layer`")
        if len(self.diagnostics) == before:
            self.rules.append((rule, loops))


def lower_experiment(
    definition: ast.ExperimentDef, parts: Parts, scope: Scope
) -> spec.Experiment | None:
    """The typed experiment, or None where it can't be run; the reasons are in the scope."""
    work = _Lowering(definition, parts, scope)
    work.collect(definition.statements)
    before = len([d for d in scope.diagnostics if d.severity == "error"])
    model = _model(work)
    prompts = _prompts(work)
    source, base = _runs(work, prompts)
    rules = _rules(work, prompts, source, base)
    measures = tuple(_measure(m, parts, scope) for m in work.measures)
    _each_once(measures, work)
    if not measures and not work.unsupported:
        scope.diagnostics.append(
            NoMeasure(span=definition.name.span, experiment=definition.name.id)
        )
    statistics = _statistics(work)
    expects = tuple(_expectation(e, work) for e in work.expects)
    broken = work.unsupported or before != len(
        [d for d in scope.diagnostics if d.severity == "error"]
    )
    if broken or model is None or prompts is None:
        return None
    use = work.prompts[0]
    part = use.prompts.part
    assert part is None or part == "train" or part == "test"
    return spec.Experiment(
        span=definition.name.span,
        name=definition.name.id,
        model=model,
        prompts=prompts.name,
        part=part,
        limit=whole_number(use.limit, parts.parameters),
        source=source,
        base=base,
        loops=tuple(work.loops),
        rules=rules,
        keep=tuple(expand_metrics(k, parts, scope) for k in work.keep),
        measures=measures,
        statistics=statistics,
        reports=tuple(_report(r, work) for r in work.reports),
        expects=expects,
    )


def _model(work: _Lowering) -> str | None:
    scope, parts = work.scope, work.parts
    if not work.models:
        known = scope.names("model")
        if len(known) == 1:
            scope.use("model", known[0], work.definition.span)
            return known[0] if known[0] in parts.models else None
        hint = (
            "add a line such as `model " + known[0] + "`"
            if known
            else 'define one first: `model toy = zoo("counting")`'
        )
        scope.diagnostics.append(
            MissingLine(
                span=work.definition.name.span,
                experiment=work.definition.name.id,
                what="model",
                hint=hint,
            )
        )
        return None
    use = work.models[0]
    if use.models[1:]:
        work.later(use.span, "several models in one experiment")
    ref = use.models[0]
    if not scope.use("model", ref.name, ref.span):
        return None
    return ref.name if ref.name in parts.models else None


def _prompts(work: _Lowering) -> spec.Prompts | None:
    if not work.prompts:
        known = work.scope.names("prompts")
        work.diagnostics.append(
            MissingLine(
                span=work.definition.name.span,
                experiment=work.definition.name.id,
                what="prompts",
                hint=f"add a line such as `prompts {known[0] if known else 'fruit'} limit 64`",
            )
        )
        return None
    use = work.prompts[0]
    if use.kind == "images":
        work.later(use.span, "images")
        return None
    if not work.scope.use("prompts", use.prompts.name, use.prompts.span):
        return None
    found = work.parts.prompts.get(use.prompts.name)
    if found is None:
        return None
    limit = whole_number(use.limit, work.parts.parameters)
    if isinstance(use.limit, str) and not work.scope.use("param", use.limit, use.span):
        limit = 1
    if use.limit is not None and (limit is None or limit < 1):
        work.diagnostics.append(
            BadArgument(
                span=use.span,
                name="limit",
                reason="must be a whole number above 0",
                hint="write a number, or the name of a `param`",
            )
        )
    part = use.prompts.part
    if part is not None and (part not in ("train", "test") or found.split is None):
        work.diagnostics.append(
            UnknownName(
                span=use.prompts.span,
                kind="part",
                name=f"{found.name}.{part}",
                hint=f"add `split 50%` to `prompts {found.name}`: it makes "
                f"`{found.name}.train` and `{found.name}.test`",
            )
        )
    return found


def _runs(work: _Lowering, prompts: spec.Prompts | None) -> tuple[str | None, str]:
    """(source, base) of `from … into …`."""
    if not work.from_into or prompts is None:
        return None, CLEAN
    line = work.from_into[0]
    for refs, what in ((line.sources, "several sources"), (line.bases, "several bases")):
        if refs[1:]:
            work.later(refs[1].span, what)
        elif work.scope.has("prompts", refs[0].name):
            work.later(line.span, "a transplant between two blocks of prompts")
            break
        elif work.scope.has("model", refs[0].name):
            work.later(line.span, "patching across models")
            break
    if work.unsupported:
        return None, CLEAN
    source = known_run(prompts, line.sources[0], work.diagnostics)
    base = known_run(prompts, line.bases[0], work.diagnostics)
    return source, base or CLEAN


def _rules(
    work: _Lowering, prompts: spec.Prompts | None, source: str | None, base: str
) -> tuple[spec.Rule, ...]:
    found: list[spec.Rule] = []
    for rule, loops in work.rules:
        _use_names(rule, work)
        body = rule.body
        match body:
            case ast.Patch():
                run = source
                if body.source is not None and prompts is not None:
                    run = known_run(prompts, body.source, work.diagnostics)
                elif run is None and not work.from_into:
                    corruption = "RUN"
                    if prompts is not None and prompts.corruptions:
                        corruption = prompts.corruptions[0].name
                    work.diagnostics.append(PatchWithoutSource(span=rule.span, base=corruption))
                lowered = spec.Rule(
                    span=rule.span, verb="patch", site=body.site, at=body.at, source=run
                )
            case ast.Ablate():
                by = None if body.by is None else body.by.id
                lowered = spec.Rule(
                    span=rule.span,
                    verb="ablate",
                    site=body.site,
                    at=body.at,
                    fill=body.fill,
                    by=by,
                )
            case ast.ReplaceTokens():
                if not isinstance(body.value, ast.String):
                    work.later(body.value.span, "this replacement")
                lowered = spec.Rule(span=rule.span, verb="replace", at=body.at, fill=body.value)
            case _:
                raise AssertionError(f"rule {type(body).__name__} has no lowering")
        found.append(lowered.model_copy(update={"loops": loops}))
    return tuple(found)


def _use_names(node: ast.Node, work: _Lowering) -> None:
    """Mark groups and parameters that a rule refers to as used."""
    for part in walk(node):
        if isinstance(part, ast.Name):
            _ = work.scope.has("group", part.id) or work.scope.has("param", part.id)
        elif isinstance(part, ast.Bound) and part.name is not None:
            work.scope.has("param", part.name)
        elif isinstance(part, ast.Axis) and isinstance(part.window, str):
            work.scope.has("param", part.window)
        elif isinstance(part, ast.TokenIndex) and isinstance(part.low, str):
            work.scope.has("param", part.low)


def expand_metrics(expression: ast.Expr, parts: Parts, scope: Scope) -> ast.Expr:
    """The expression with the names of metrics replaced by what they stand for."""
    written = expression
    reason = "is defined by itself"
    for _ in range(len(parts.metrics) + 1):
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
        if sum(1 for _ in walk(expression)) > LARGEST:
            reason = f"has more than {LARGEST:,} parts when its metrics are written out"
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


def _measure(measure: ast.Measure, parts: Parts, scope: Scope) -> spec.Measure:
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
    return spec.Measure(
        span=measure.span,
        label=label,
        metric=expand_metrics(metric, parts, scope),
        effect=measure.effect.id,
        effect_span=measure.effect.span,
        at=measure.at,
        per_prompt=measure.per is not None,
    )


def _each_once(measures: tuple[spec.Measure, ...], work: _Lowering) -> None:
    """The same measure twice would only make the correction stricter."""
    seen: dict[tuple[object, ...], spec.Measure] = {}
    for measure in measures:
        key = (measure.metric, measure.effect, measure.at, measure.per_prompt)
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


def _statistics(work: _Lowering) -> spec.Statistics:
    if not work.stats:
        return spec.Statistics(span=work.definition.name.span)
    line = work.stats[0]
    values: dict[str, object] = {"span": line.span}
    if line.resampling is not None:
        arguments = line.resampling.arguments
        count = constant(arguments[0].value, work.parts.parameters) if len(arguments) == 1 else None
        good = isinstance(count, int) and 100 <= count <= 1_000_000
        if line.resampling.name != "bootstrap" or not good:
            work.diagnostics.append(
                BadArgument(
                    span=line.resampling.span,
                    name=line.resampling.name,
                    reason="is not a resampling that is supported",
                    hint="write `bootstrap(n)` with n from 100 to 1,000,000",
                )
            )
        values["resamples"] = count if good else 10_000
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
    if line.correction is not None:
        if line.correction.id not in CORRECTIONS:
            work.diagnostics.append(
                BadArgument(
                    span=line.correction.span,
                    name=line.correction.id,
                    reason="is not a correction for many comparisons",
                    hint=f"write one of {', '.join(CORRECTIONS)}",
                )
            )
        else:
            values["correction"] = line.correction.id
    if line.by is not None:
        values["by"] = line.by.id
    return spec.Statistics.model_validate(values)


def _report(report: ast.Report, work: _Lowering) -> spec.Report:
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
    )


def _expectation(expect: ast.Expect, work: _Lowering) -> spec.Expectation:
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
    return spec.Expectation(
        span=expect.span,
        text=text,
        condition=expect.condition,
        top=whole_number(expect.top, work.parts.parameters),
        contains=expect.contains,
        on_mean=relaxed is not None,
        citing=None if expect.citing is None else expect.citing.value,
    )
