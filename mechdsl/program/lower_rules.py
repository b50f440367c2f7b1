"""Rules as typed data, by the shape in which they are written."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_experiment import PatchWithoutSource
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import run_of
from mechdsl.program.sort_statements import Statements
from mechdsl.syntax import ast


def lower_rules(
    rule: ast.Rule, source: str | None, prompts: spec.Prompts | None, work: Statements
) -> tuple[spec.Rule, ...]:
    """As `lower_rule`; an ablation with several fills is a rule with each of them."""
    body = rule.body
    if not isinstance(body, ast.Ablate) or not body.more:
        return (lower_rule(rule, source, prompts, work),)
    fills = [ast.Fill(body.fill, body.by, span=body.fill.span), *body.more]
    labels = tuple(_label(fill) for fill in fills)
    return tuple(
        lower_rule(
            replace(rule, body=replace(body, fill=fill.fill, by=fill.by, more=())),
            source,
            prompts,
            work,
        ).model_copy(update={"fills": labels, "fill_index": number})
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
            if not isinstance(body.value, ast.String):
                work.later(body.value.span, "this replacement")
            return spec.Rule(span=rule.span, verb="replace", at=body.at, fill=body.value)
        case ast.SwapSites():
            return _at(rule, "swap", body, onto=body.other)
        case ast.Freeze():
            return _at(rule, "freeze", body)
        case ast.SetSite():
            return _at(rule, "set", body, fill=body.value)
        case ast.Scale():
            return _at(rule, "scale", body, fill=body.factor)
        case ast.Clamp():
            return _at(rule, "clamp", body, fill=body.value)
        case ast.Add():
            return _at(rule, "add", body, fill=body.value)
        case ast.ProjectOut():
            fill = body.direction
            if body.best is not None:
                fill = ast.Index(fill.id, body.best, span=fill.span)
            return _at(rule, "project out", body, fill=fill)
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
        case ast.ObserveAttention():
            return _attention(rule, "observe", body.edge)


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
    """`path SENDER -> RECEIVER at POS through mlps`."""
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
    )
