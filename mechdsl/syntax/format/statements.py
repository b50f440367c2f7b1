"""The canonical text of one statement, on one line and without comments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mechdsl.syntax import ast
from mechdsl.syntax.format.constructs import (
    CONDITION,
    SUM,
    axis,
    axis_value,
    call,
    cells_of,
    domain,
    edge,
    expression,
    names,
    percentage,
    position,
    positions,
    ref,
    site,
    string,
    within,
)


def _optional(word: str, value: Any) -> str:
    """` word value`, or nothing."""
    return "" if value is None else f" {word} {value}"


def _written(node: ast.Expr | ast.Reading | ast.Stepped) -> str:
    """What a rule writes: an expression, what a run has somewhere, or a step."""
    if not isinstance(node, ast.Reading | ast.Stepped):
        return within(node, SUM)
    factor = _factor(node.factor)
    if isinstance(node, ast.Stepped):
        return f"{factor}step({node.component.id})"
    at = _of("at", node.at, positions)
    return f"{factor}value({site(node.site)}{at}){_of('of', node.of, ref)}"


def _factor(node: ast.Expr | None) -> str:
    """What something is multiplied with, in front of it; or nothing."""
    return "" if node is None else f"{within(node, SUM + 1)} * "


def _of(word: str, node: Any, text: Any) -> str:
    """` word text(node)`, or nothing."""
    return "" if node is None else f" {word} {text(node)}"


def _id(name: ast.Name) -> str:
    return name.id


def _text(text: ast.String) -> str:
    return string(text.value)


def _condition(node: ast.Expr) -> str:
    return within(node, CONDITION)


def _sum(node: ast.Expr) -> str:
    return within(node, SUM)


def _percent(node: ast.Percent) -> str:
    return percentage(node.value)


def _refs(nodes: Iterable[ast.Ref]) -> str:
    return ", ".join(map(ref, nodes))


def _map_of(node: ast.MapOf) -> str:
    return _factor(node.weight) + cells_of(node)


def header(node: Any) -> str | None:
    """What stands before the brace of a statement that holds lines; None for any other."""
    match node:
        case ast.PromptsDef():
            return f"{node.kind} {node.name.id}"
        case ast.ExperimentDef():
            return f"experiment {node.name.id}"
        case ast.Corrupt():
            return f"corrupt {node.name.id}"
        case ast.For():
            return f"for {node.name.id} in {domain(node.domain)}"
        case ast.RunDef():
            return f"run {node.name.id}"
        case ast.Chat():
            return "chat"
        case _:
            return None


def body(node: Any) -> tuple[Any, ...]:
    """What stands in the braces of such a statement."""
    match node:
        case ast.PromptsDef():
            return node.lines
        case ast.ExperimentDef():
            return node.statements
        case ast.Corrupt():
            return node.changes
        case ast.For():
            return node.body
        case ast.RunDef():
            return node.statements
        case ast.Chat():
            return node.turns
        case _:
            return ()


def line(node: Any) -> str:
    """A statement without lines in braces."""
    for part in (_top, _data, _rule, _statement):
        text = part(node)
        if text is not None:
            return text
    raise TypeError(f"{type(node).__name__} is no statement")


def _top(node: Any) -> str | None:
    match node:
        case ast.Version():
            return f"mech {node.number}"
        case ast.Use():
            return f"use {_text(node.path)}"
        case ast.Param():
            return f"param {node.name.id} = {expression(node.value)}"
        case ast.ModelDef():
            return f"model {node.name.id} = {call(node.source)}"
        case ast.MetricDef():
            return f"metric {node.name.id} = {within(node.value, SUM)}"
        case ast.DirectionDef():
            place = _of("at", node.site, site) + _of("at", node.at, positions)
            return f"direction {node.name.id} = {within(node.value, SUM)}{place}"
        case ast.BasisDef():
            place = _of("at", node.site, site) + _of("at", node.at, positions)
            return f"basis {node.name.id} = {call(node.source)}{place}"
        case ast.GroupDef():
            return f"group {node.name.id} = {', '.join(map(site, node.sites))}"
        case ast.Seed():
            return f"seed {node.value}"
        case _:
            return None


def _data(node: Any) -> str | None:
    match node:
        case ast.Domained():
            return f"{names(node.names)} in {domain(node.domain)}"
        case ast.Derived():
            return f"{names(node.names)} = {expression(node.value)}"
        case ast.Template():
            return f"template {_text(node.text)}"
        case ast.ChatTurn():
            return f"{node.role} {_text(node.text)}"
        case ast.RowsFrom():
            return f"rows {within(node.source, SUM)}" + " distinct" * node.distinct
        case ast.Rename():
            pairs = ", ".join(f"{new.id} = {old.id}" for new, old in node.pairs)
            return f"rename {{ {pairs} }}"
        case ast.Where():
            return f"where {within(node.condition, CONDITION)}"
        case ast.Split():
            return f"split {percentage(node.percent.value)}"
        case ast.Text():
            if node.name.id in ("answer", "wrong"):
                return f"{node.name.id} {expression(node.value)}"
            return f"text {node.name.id} = {expression(node.value)}"
        case ast.SpanDef():
            if node.literal is not None:
                return f"span {node.name.id} = {_text(node.literal)}"
            return f"span {node.name.id}" + _of("in", node.within, _id)
        case ast.ImageLine():
            if node.source is not None:
                return f"image from {ref(node.source)}"
            return f"image {within(node.value, SUM)}"
        case ast.Tiles():
            return f"tiles {node.rows} by {node.cols}{' and whole' if node.whole else ''}"
        case ast.Region():
            return f"region {node.name.id} = {node.column.id}"
        case ast.Classes():
            return f"classes {_text(node.text)}"
        case ast.Change():
            return _change(node)
        case _:
            return None


def _change(node: ast.Change) -> str:
    values = ", ".join(within(value, SUM) for value in node.values)
    return (
        f"{node.word} {values if node.tokens is None else positions(node.tokens)}"
        + _of("to", node.to, site)
        + _of("at", node.at, positions)
        + _of("with", node.given, _sum)
        + _of("by", node.by, _sum)
        + _optional("radius", node.radius)
    )


def _rule(node: Any) -> str | None:
    match node:
        case ast.Rule():
            return line(node.body) + ("" if node.during is None else f" {_during(node.during)}")
        case ast.Patch():
            return (
                f"patch {site(node.site)} at {positions(node.at)}"
                + _of("onto", node.onto, positions)
                + _of("into layer", node.into_layer, axis_value)
                + _of("with", node.source, ref)
            )
        case ast.Ablate():
            fills = ", ".join(
                within(each.fill, SUM) + _of("by", each.by, _id) for each in (node, *node.more)
            )
            return f"ablate {site(node.site)} at {positions(node.at)} with {fills}"
        case ast.ReplaceTokens():
            return f"replace {positions(node.at)} with {within(node.value, SUM)}"
        case ast.ReplaceBlock():
            other = _of("block layer", node.source, axis_value) or _of("", node.word, _id)
            return f"replace block {axis(node.axis)} with {other.strip()}"
        case ast.Block():
            return f"block {edge(node.edge)}"
        case ast.Reweight():
            return f"reweight {edge(node.edge)} by {within(node.factor, SUM)}"
        case ast.SetEdge():
            return f"set {edge(node.edge)} to {within(node.value, SUM)}"
        case ast.Allow():
            return f"allow {edge(node.edge)}"
        case ast.Renumber():
            return f"renumber {positions(node.at)} from {within(node.start, SUM)}"
        case ast.SetSite():
            return f"set {site(node.site)} at {positions(node.at)} to {_written(node.value)}"
        case ast.PathRule():
            through = f" through {names(node.through)}" if node.through else ""
            ends = f"{site(node.sender)} -> {site(node.receiver)}"
            frozen = " with frozen norms" if node.frozen else ""
            return f"path {ends} at {positions(node.at)}{through}{frozen}"
        case ast.Add():
            return f"add {_written(node.value)} to {site(node.site)} at {positions(node.at)}"
        case ast.Scale():
            factor = within(node.factor, SUM)
            return f"scale {site(node.site)} at {positions(node.at)} by {factor}"
        case ast.ProjectOut():
            place = "weights"
            if node.site is not None and node.at is not None:
                place = f"{site(node.site)} at {positions(node.at)}"
            return f"project out {within(node.direction, SUM)} from {place}"
        case ast.Clamp():
            direction = f"{within(node.direction, SUM)} of " if node.direction else ""
            place = f"{site(node.site)} at {positions(node.at)}"
            return f"clamp {direction}{place} to {within(node.value, SUM)}"
        case ast.SwapSites():
            other = positions(node.other)
            return f"swap {site(node.site)} at {positions(node.at)} with {other}"
        case ast.Freeze():
            return f"freeze {site(node.site)} at {positions(node.at)}"
        case ast.Registered():
            value = "" if node.value is None else f" {node.before} {within(node.value, SUM)}"
            return f"{node.verb.id} {site(node.site)} at {positions(node.at)}{value}"
        case _:
            return None


def _during(node: ast.During) -> str:
    if node.phase == "after prefill":
        return node.phase
    if node.phase == "each step":
        return "during each step"
    return f"during step {axis_value(node.steps)}" if node.steps else f"during {node.name}"


def _generate(node: ast.Generate) -> str:
    settings = ", ".join(f"{each.name.id} {within(each.value, SUM)}" for each in node.settings)
    stops = ", ".join(map(_text, node.stops))
    return (
        f"generate {node.tokens}"
        + (f" with {settings}" if settings else "")
        + (f" until {stops}" if stops else "")
    )


def _statement(node: Any) -> str | None:
    match node:
        case ast.UseModel():
            return f"model {_refs(node.models)}"
        case ast.UsePrompts():
            behind = "" if node.replies is None else f" with replies of {call(node.replies)}"
            return f"{node.kind} {_refs(node.prompts)}{_optional('limit', node.limit)}{behind}"
        case ast.FromInto():
            shuffled = " shuffled" if node.shuffled is not None else ""
            return f"from {_refs(node.sources)}{shuffled} into {_refs(node.bases)}"
        case ast.Keep():
            return f"keep {within(node.condition, CONDITION)}"
        case ast.Against():
            apart = f" apart from {', '.join(map(site, node.apart))}" if node.apart else ""
            return f"against {call(node.control)}{apart}"
        case ast.Generate():
            return _generate(node)
        case ast.Using():
            picks = ", ".join(f"{pick.how} {pick.amount}" for pick in node.verify)
            return f"using {call(node.estimator)}" + (f" verify {picks}" if picks else "")
        case ast.Discover():
            end = _of("until", node.until, _condition)
            if node.top is not None and node.unit is not None:
                end += f" top {node.top} {node.unit.id}"
            return f"discover {node.what.id} over {names(node.over)} using {call(node.using)}{end}"
        case ast.Search():
            return f"search {node.how.id} {node.what.id} up to {node.up_to}"
        case ast.ObserveAttention(what=ast.Name(id=what)):
            ends = f"from {positions(node.edge.queries)} to {positions(node.edge.keys)}"
            return f"observe {what}{_of('of', node.run, ref)} {ends}" + _of("as", node.name, _id)
        case ast.ObserveAttention():
            return f"observe {edge(node.edge, node.run)}" + _of("as", node.name, _id)
        case ast.ObserveFeatures():
            top = _optional("top", node.top)
            return f"observe features of {node.basis.id} at {positions(node.at)}{top}"
        case ast.ObserveMaps():
            maps, others = (", ".join(map(_map_of, each)) for each in (node.maps, node.others))
            against = f" to {others}" if others else _of("in", node.region, _id)
            against += _of("at", node.at, positions)
            share = _of("top", node.share, _percent)
            name = _of("as", node.name, _id)
            return f"observe {node.what.id} of {maps}{against}{share}{name}"
        case ast.Observe():
            return _observe(node)
        case ast.Measure():
            at, per = _of("at", node.at, position), _of("per", node.per, _id)
            over = _of("auc over" if node.area else "mean over", node.over, _id)
            return f"measure {within(node.metric, SUM)}{at} as {node.effect.id}{per}{over}"
        case ast.Stats():
            return (
                "stats"
                + (f" {call(node.resampling)}" if node.resampling else "")
                + _of("test", node.test, call)
                + _of("confidence", node.confidence, _percent)
                + _of("correct", node.correction, _id)
                + _of("verdicts", node.verdicts, _id)
                + _of("by", node.by, _id)
            )
        case ast.Report():
            return (
                f"report {node.kind.id}"
                + (f" {node.variable.id}" if node.variable else "")
                + _of("by", node.by, _id)
                + _of("of", node.of, _id)
                + _optional("top", node.top)
                + _of("to", node.file, _text)
            )
        case ast.Save():
            where = f"{site(node.site)}{_of('of', node.run, ref)} at {positions(node.at)}"
            return f"save {where} to {_text(node.file)}" + _of("as", node.dtype, _id)
        case ast.Expect():
            if node.condition is not None:
                what = within(node.condition, CONDITION)
            else:
                what = f"top {node.top} contains {', '.join(map(site, node.contains))}"
            return (
                f"expect {what}" + _of("on", node.relaxed, _id) + _of("citing", node.citing, _text)
            )
        case _:
            return None


def _observe(node: ast.Observe) -> str:
    # `at` before the site is optional; it reads well behind a call, as in `probe(count) at`.
    what = call(node.what) + (" at" if isinstance(node.what, ast.Call) else "")
    return (
        f"observe {what} {site(node.site)}"
        + _of("of", node.run, ref)
        + _of("with", node.beside, site)
        + _of("toward", node.toward, _sum)
        + _of("at", node.at, positions)
        + _of("with", node.other, positions)
        + _optional("top", node.top)
        + _of("as", node.name, _id)
    )
