"""An `experiment` block as typed data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechdsl import spec
from mechdsl.diagnostics.e02_names import (
    BadArgument,
    MissingLine,
    UnknownName,
)
from mechdsl.diagnostics.e06_experiment import NoMeasure, PatchWithoutSource
from mechdsl.lower.constants import whole_number
from mechdsl.lower.measures import (
    each_once,
    expand_metrics,
    lower_expectation,
    lower_measure,
    lower_report,
    lower_statistics,
)
from mechdsl.lower.prompts import CLEAN, known_run
from mechdsl.lower.scope import Scope
from mechdsl.lower.statements import Statements, use_names
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.lower.program import Parts


def lower_experiment(
    definition: ast.ExperimentDef, parts: Parts, scope: Scope
) -> spec.Experiment | None:
    """The typed experiment, or None where it can't be run; the reasons are in the scope."""
    work = Statements(definition, parts, scope)
    work.collect(definition.statements)
    before = len([d for d in scope.diagnostics if d.severity == "error"])
    model = _model(work)
    prompts = _prompts(work)
    source, base = _runs(work, prompts)
    rules = _rules(work, prompts, source, base)
    measures = tuple(lower_measure(m, parts, scope) for m in work.measures)
    each_once(measures, work)
    if not measures and not work.unsupported:
        scope.diagnostics.append(
            NoMeasure(span=definition.name.span, experiment=definition.name.id)
        )
    statistics = lower_statistics(work)
    expects = tuple(lower_expectation(e, work) for e in work.expects)
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
        reports=tuple(lower_report(r, work) for r in work.reports),
        expects=expects,
    )


def _model(work: Statements) -> str | None:
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


def _prompts(work: Statements) -> spec.Prompts | None:
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


def _runs(work: Statements, prompts: spec.Prompts | None) -> tuple[str | None, str]:
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
    work: Statements, prompts: spec.Prompts | None, source: str | None, base: str
) -> tuple[spec.Rule, ...]:
    found: list[spec.Rule] = []
    for rule, loops in work.rules:
        use_names(rule, work)
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
