"""Rules as typed data, by the shape in which they are written."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_experiment import PatchWithoutSource
from mechdsl.program import spec
from mechdsl.program.lower_directions import named_in, split_factor
from mechdsl.program.lower_generation import lower_during
from mechdsl.program.lower_other_runs import run_of
from mechdsl.program.sort_statements import Statements
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def lower_rules(
    rule: ast.Rule, source: str | None, prompts: spec.Prompts | None, work: Statements
) -> tuple[spec.Rule, ...]:
    """As `lower_rule`; an ablation with several fills is a rule with each of them."""
    body = rule.body
    during = lower_during(rule, work)
    if not isinstance(body, ast.Ablate) or not body.more:
        return (lower_rule(rule, source, prompts, work).model_copy(update={"during": during}),)
    fills = [ast.Fill(body.fill, body.by, span=body.fill.span), *body.more]
    labels = tuple(_label(fill) for fill in fills)
    return tuple(
        lower_rule(
            replace(rule, body=replace(body, fill=fill.fill, by=fill.by, more=())),
            source,
            prompts,
            work,
        ).model_copy(update={"fills": labels, "fill_index": number, "during": during})
        for number, fill in enumerate(fills)
    )


def _label(fill: ast.Fill) -> str:
    """`mean of fewer by item`, as it is written."""
    by = "" if fill.by is None else f" by {fill.by.id}"
    return " ".join(fill.fill.span.written.split()) + by


def lower_rule(
    rule: ast.Rule, source: str | None, prompts: spec.Prompts | None, work: Statements
) -> spec.Rule:
    """The rule with the runs that it names; source: the run that patches read."""
    body = rule.body
    match body:
        case ast.Patch():
            return _patch(rule, body, source, prompts, work)
        case ast.PathRule():
            return _path(rule, body, source, prompts, work)
        case ast.Ablate():
            if isinstance(body.fill, ast.OfRef):
                work.scope.has("prompts", body.fill.of.name)
            by = None if body.by is None else body.by.id
            return _at(rule, "ablate", body, fill=body.fill, by=by)
        case ast.ReplaceTokens():
            images = prompts is not None and prompts.kind == "images"
            if not isinstance(body.value, ast.String) and not images:
                work.later(body.value.span, "this replacement")
            return spec.Rule(span=rule.span, verb="replace", at=body.at, fill=body.value)
        case ast.ReplaceBlock():
            span = body.axis.span
            return spec.Rule(
                span=rule.span,
                verb="replace block",
                site=ast.Site((ast.Name("block", span=span),), (body.axis,), span=span),
                at=_all_tokens(),
                fill=body.word,
                source_block=body.source,
            )
        case ast.SwapSites():
            return _at(rule, "swap", body, onto=body.other)
        case ast.Freeze():
            return _at(rule, "freeze", body)
        case ast.SetSite():
            if isinstance(body.value, ast.Reading):
                return _reading(rule, "set", body, body.value, prompts, work)
            if named_in(body.value, work.scope.names("direction")):
                return _of_direction(rule, "set", body, body.value, work)
            return _at(rule, "set", body, fill=body.value)
        case ast.Scale():
            return _at(rule, "scale", body, fill=body.factor)
        case ast.Clamp():
            lowered = _at(rule, "clamp", body, fill=body.value)
            if body.direction is None:
                return lowered
            _known(body.direction, work)
            return lowered.model_copy(update={"direction": body.direction})
        case ast.Add():
            if isinstance(body.value, ast.Reading):
                return _reading(rule, "add", body, body.value, prompts, work)
            if isinstance(body.value, ast.Stepped):
                lowered = _at(rule, "add", body, fill=body.value.factor)
                return lowered.model_copy(update={"stepped": body.value.component})
            return _of_direction(rule, "add", body, body.value, work)
        case ast.ProjectOut():
            return _project_out(rule, body, work)
        case ast.Registered():
            return _at(rule, body.verb.id, body, fill=body.value)
        case ast.Block():
            return _attention(rule, "block", body.edge)
        case ast.Reweight():
            return _attention(rule, "reweight", body.edge, body.factor)
        case ast.SetEdge():
            return _attention(rule, "set edge", body.edge, body.value)
        case ast.Allow():
            return _attention(rule, "allow", body.edge)
        case ast.Renumber():
            return spec.Rule(span=rule.span, verb="renumber", at=body.at, fill=body.start)


def _all_tokens() -> ast.Positions:
    """`tokens *`, where a rule doesn't say it."""
    source = Source("tokens *")
    span = Span(source, 0, len(source.text))
    point = ast.Point(ast.TokenIndex(True, None, span=span), span=span)
    return ast.Positions((ast.Position(point, span=span),), span=span)


def _at(
    rule: ast.Rule,
    verb: str,
    body: ast.SiteRule,
    *,
    fill: ast.Expr | None = None,
    by: str | None = None,
    onto: ast.Positions | None = None,
) -> spec.Rule:
    """`VERB SITE at POSITIONS …`"""
    return spec.Rule(
        span=rule.span, verb=verb, site=body.site, at=body.at, fill=fill, by=by, onto=onto
    )


def _of_direction(
    rule: ast.Rule, verb: str, body: ast.SiteRule, value: ast.Expr, work: Statements
) -> spec.Rule:
    """`VERB NUMBER * DIRECTION …`"""
    factor, direction = split_factor(value, work.scope.names("direction"))
    for name in walk(direction):
        if isinstance(name, ast.Name | ast.Index):
            _known(name, work)
    return _at(rule, verb, body, fill=factor).model_copy(update={"direction": direction})


def _known(direction: ast.Name | ast.Index, work: Statements) -> None:
    """E0201 for a name that is no direction's."""
    name = direction.id if isinstance(direction, ast.Name) else direction.name
    work.scope.use("direction", name, direction.span)


def _project_out(rule: ast.Rule, body: ast.ProjectOut, work: Statements) -> spec.Rule:
    """`project out DIRECTION from SITE at POSITIONS`, or `from weights`."""
    _known(body.direction, work)
    if body.site is not None and body.at is not None:
        lowered = spec.Rule(span=rule.span, verb="project out", site=body.site, at=body.at)
    else:
        span = Span(Source("tokens *", rule.span.source.path), 0, len("tokens *"))
        every = ast.TokenIndex(plural=True, low=None, span=span)
        point = ast.Position(ast.Point(every, span=span), span=span)
        at = ast.Positions((point,), span=span)
        lowered = spec.Rule(span=rule.span, verb="project out of weights", at=at)
    return lowered.model_copy(update={"direction": body.direction})


def _attention(
    rule: ast.Rule, verb: str, edge: ast.Edge, fill: ast.Expr | None = None
) -> spec.Rule:
    """`VERB attention … from QUERIES to KEYS …`"""
    return spec.Rule(
        span=rule.span, verb=verb, edge=edge, at=edge.queries, onto=edge.keys, fill=fill
    )


def _patch(
    rule: ast.Rule,
    body: ast.Patch,
    source: str | None,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """`patch SITE at POSITIONS onto POSITIONS into layer L with RUN`"""
    if body.source is not None and prompts is not None:
        source = run_of(body.source, prompts, work)
    elif source is None and not work.from_into:
        _without_source("patch", rule, prompts, work)
    return spec.Rule(
        span=rule.span,
        verb="patch",
        site=body.site,
        at=body.at,
        source=source,
        onto=body.onto,
        into_layer=body.into_layer,
    )


def _reading(
    rule: ast.Rule,
    verb: str,
    body: ast.SetSite | ast.Add,
    reading: ast.Reading,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """`VERB … NUMBER * value(SITE at POSITIONS) of RUN`"""
    source = None
    if reading.of is not None and prompts is not None:
        source = run_of(reading.of, prompts, work)
    return spec.Rule(
        span=rule.span,
        verb=verb,
        site=body.site,
        at=body.at if reading.at is None else reading.at,
        onto=None if reading.at is None else body.at,
        source=source,
        fill=reading.factor,
        reading=reading.site,
    )


def _without_source(
    verb: str, rule: ast.Rule, prompts: spec.Prompts | None, work: Statements
) -> None:
    corruption = "RUN"
    if prompts is not None and prompts.corruptions:
        corruption = prompts.corruptions[0].name
    otherwise = ", or name a run behind it: `with RUN`" if verb == "patch" else ""
    work.diagnostics.append(
        PatchWithoutSource(span=rule.span, verb=verb, base=corruption, otherwise=otherwise)
    )


def _path(
    rule: ast.Rule,
    body: ast.PathRule,
    source: str | None,
    prompts: spec.Prompts | None,
    work: Statements,
) -> spec.Rule:
    """`path SENDER -> RECEIVER at POS through mlps with frozen norms`."""
    if source is None and not work.from_into:
        _without_source("path", rule, prompts, work)
    for word in body.through:
        if word.id != "mlps":
            hint = did_you_mean(word.id, ["mlps"], "only `mlps` can be let through")
            work.diagnostics.append(
                UnknownWord(span=word.span, kind="part of a path", word=word.id, hint=hint)
            )
    return spec.Rule(
        span=rule.span,
        verb="path",
        site=body.sender,
        receiver=body.receiver,
        at=body.at,
        source=source,
        through_mlps=bool(body.through),
        frozen_norms=body.frozen,
    )
