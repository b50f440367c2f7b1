"""Targets of names in statements: results of observations, swept axes, numbers of a `for`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechdsl.base.text import Source, Span
from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.parser import Placeholder, parse_template
from mechdsl.syntax.traversal import NodeT, number_names, rewrite, walk


def results_by_observation(experiments: Sequence[spec.Experiment]) -> dict[str, str]:
    """Map observations to the names of their results."""
    return {
        rule.observed.name: experiment.name
        for experiment in experiments
        for rule in experiment.rules
        if rule.observed is not None and rule.observed.name is not None
    }


def resolve_result_names(experiment: spec.Experiment, results: dict[str, str]) -> spec.Experiment:
    """Replace names of observations, of other experiments or of the experiment's other results, by
    the names of the results."""
    labels = {measure.label for measure in experiment.measures}
    rules = tuple(_resolve_rule_results(rule, results) for rule in experiment.rules)
    derived = tuple(_resolve_run_results(run, results) for run in experiment.derived)
    saves = tuple(
        save.model_copy(
            update={name: resolve_result_references(getattr(save, name), results)
                    for name in ("site", "at", "gradient")}
        )
        for save in experiment.saves
    )  # fmt: skip
    expects = tuple(
        resolve_expectation_results(expect, results, labels) for expect in experiment.expects
    )
    against = experiment.against
    if against is not None:
        apart = tuple(resolve_result_references(site, results) for site in against.apart)
        update: dict[str, object] = {"apart": apart}
        if against.frequency is not None:
            update["frequency"] = resolve_result_references(against.frequency, results)
        against = against.model_copy(update=update)
    directions = tuple(
        save.model_copy(update={"direction": resolve_result_references(save.direction, results)})
        for save in experiment.saved_directions
    )
    parts = {"rules": rules, "derived": derived, "saves": saves, "saved_directions": directions}
    return experiment.model_copy(update={**parts, "expects": expects, "against": against})


def _resolve_run_results(run: spec.DerivedRun, results: dict[str, str]) -> spec.DerivedRun:
    rules = tuple(_resolve_rule_results(rule, results) for rule in run.rules)
    return run.model_copy(update={"rules": rules})


def _resolve_rule_results(rule: spec.Rule, results: dict[str, str]) -> spec.Rule:
    update = {
        name: resolve_result_references(value, results)
        for name in ("site", "at", "onto", "edge", "receiver", "fill", "exchanged")
        if (value := getattr(rule, name)) is not None
    }
    return rule.model_copy(update={**update, **_observed_results(rule, results)})


def _observed_results(rule: spec.Rule, results: dict[str, str]) -> dict[str, spec.ObservedQuantity]:
    """Resolve the results that an `observe` line over maps reads and compares with."""
    said = rule.observed
    if said is None or not said.maps:
        return {}
    named = {
        name: tuple(resolve_result_references(each, results) for each in every)
        for name, every in (("maps", said.maps), ("others", said.others))
    }
    return {"observed": said.model_copy(update=named)}


def resolve_expectation_results(
    expect: spec.Expectation, results: Mapping[str, str], own: Collection[str]
) -> spec.Expectation:
    """Resolve measures of other results in an expectation.

    Args:
        results: Label of a measure → the result that contains it.
        own: Labels and effects of the expecting result.
    """
    if expect.condition is None:
        return expect
    there = {label: name for label, name in results.items() if label not in own}
    taken = {"".join(label.split()) for label in own}
    named = {"".join(label.split()): name for label, name in there.items()}

    def value(node: Any) -> Any:
        text = "".join(node.span.written.split())
        if text in taken:
            return node
        called = node.name if isinstance(node, ast.Call) else text
        if whose := named.get(text, named.get(called)):
            experiment = ast.Name(whose, span=node.span)
            return ast.ExperimentMeasure(node, experiment, span=node.span)
        match node:
            case ast.QualifiedRef(of=ast.Ref(part=None, name=name)) if name in there:
                return replace(node, of=replace(node.of, name=there[name]))
            case ast.Binary() | ast.Compare() | ast.Logical():
                return replace(node, left=value(node.left), right=value(node.right))
            case ast.Not() | ast.Negative():
                return replace(node, operand=value(node.operand))
            case ast.Near() | ast.InRange():
                return replace(node, value=value(node.value))
            case ast.Call(arguments=(first, *others)):
                if node.name in ("spearman", "pearson"):
                    others = [
                        replace(argument, value=result(argument.value)) for argument in others
                    ]
                changed = replace(first, value=value(alone(first.value)))
                return replace(node, arguments=(changed, *others))
            case _:
                return node

    def alone(node: Any) -> Any:
        """Convert a lone word, which also parses as a group of sites."""
        if isinstance(node, ast.Site) and len(node.names) == 1 and not node.axes:
            return node.names[0]
        return node

    def result(node: Any) -> Any:
        node = alone(node)
        if isinstance(node, ast.Name) and node.id in there:
            return replace(node, id=there[node.id])
        return node

    return expect.model_copy(update={"condition": value(expect.condition)})


def resolve_group_results(group: spec.Group, results: dict[str, str]) -> spec.Group:
    """Replace names of observations in a group's sites by the names of their results."""
    sites = tuple(resolve_result_references(site, results) for site in group.sites)
    return group.model_copy(update={"sites": sites})


def resolve_result_references(node: NodeT, results: dict[str, str]) -> NodeT:
    """Replace names of observations in a tree by the names of their results."""

    def change(part: ast.Node) -> ast.Node:
        if isinstance(part, ast.RankedSelection | ast.MapOf) and part.of in results:
            return replace(part, of=results[part.of])
        return part

    return rewrite(node, change)


def possible_axes(rule: spec.Rule) -> Iterator[str]:
    """Yield the names by which reports and expectations may refer to a rule's axes."""
    yield "layer"  # the file may omit it
    for site in (rule.site, rule.reading, rule.edge):
        yield from site_axes(site)
    yield from (f"to_{name}" for name in site_axes(rule.receiver))
    if rule.into_layer is not None:
        yield "to_layer"
    if rule.fills:
        yield "fill"
    if rule.without_edge:
        yield "edge"
    if rule.observed is not None:
        yield from observation_axes(rule.observed)
    yield from position_axes(rule)


def observation_axes(observed: spec.ObservedQuantity) -> Iterator[str]:
    """Yield the axes given by the type of an observation."""
    yield from observed.facts.axes
    if len(observed.maps) > 1 and not observed.placed:
        yield "map"


def position_axes(rule: spec.Rule) -> Iterator[str]:
    """Yield the axes of a rule's positions, whose size depends on the tokens of prompts."""
    if may_sweep(rule.at) or (rule.onto is not None and may_sweep(rule.onto)):
        yield "position"
        yield "item"
        if rule.edge is not None:
            yield "from_position"


def site_axes(site: ast.Site | ast.Edge | None) -> Iterator[str]:
    """Yield the axes of a site or of attention."""
    for axis in walk(site):
        if isinstance(axis, ast.Axis) and not axis.plural and _sweeps(axis):
            yield axis.word


def _sweeps(axis: ast.Axis) -> bool:
    one = len(axis.values) == 1 and isinstance(axis.values[0], ast.AxisRange)
    return not one or any(isinstance(v, ast.AxisRange) and v.high is not None for v in axis.values)


def may_sweep(positions: ast.Positions) -> bool:
    """Whether positions may give more than one cell for some prompts and tokens."""
    return len(positions.items) > 1 or any(map(may_sweep_position, walk(positions)))


def all_tokens() -> ast.Positions:
    """Return `tokens *`, the default positions of a rule without positions and of a mask of
    edges."""
    source = Source("tokens *")
    span = Span(source, 0, len(source.text))
    point = ast.Point(ast.TokenIndex(True, None, span=span), span=span)
    return ast.Positions((ast.Position(point, span=span),), span=span)


def lists_positions(positions: ast.Positions) -> bool:
    """Whether positions are written as several: `each item token`, `token *`, `A, B`."""
    bodies = [item.body for item in positions.items]
    parts = [body.base if isinstance(body, ast.Point) else body for body in bodies]
    return len(parts) > 1 or any(map(may_sweep_position, parts))


def may_sweep_position(node: ast.Node) -> bool:
    """Whether one item of a position may give more than one cell."""
    match node:
        case ast.TokenIndex():
            return not node.plural and (node.low is None or node.high is not None)
        case ast.SpanTokens():
            view = node.of.view
            counted = (node.of.occurrence, view and view.number, node.of.row, node.of.col)
            several = any(at and (at.low is None or at.high is not None) for at in counted)
            ranged = node.high is not None and not node.plural
            return node.each or ranged or (several and not node.plural)
        case ast.Between() | ast.Except():
            return node.each
        case ast.RankedTokens():
            return not node.plural and node.ranked.which != "best"
        case ast.ChosenTokens():
            return not node.plural
        case _:
            return isinstance(node, ast.EachTokenOf | ast.EachStep)


def measure_number_names(measure: spec.Measure) -> set[str]:
    """Return the names in a measure's sites, positions and metric arguments: bounds of ranges,
    entries of lists, placeholders of texts."""
    names = {*number_names(measure.metric), *number_names(measure.at)}
    for call in walk(measure.metric):
        if isinstance(call, ast.Call):
            names.update(
                name for argument in call.arguments for name in argument_names(argument.value)
            )
    return names


def argument_names(argument: ast.Node) -> Iterator[str]:
    """Yield the names in a metric's argument. A lone name is that of a text or a run."""
    for node in () if isinstance(argument, ast.Name) else walk(argument):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.String):
            for piece in parse_template(node)[0]:
                inner = piece.expr if isinstance(piece, Placeholder) else None
                yield from (part.id for part in walk(inner) if isinstance(part, ast.Name))
