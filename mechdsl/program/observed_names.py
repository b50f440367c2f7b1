"""Names of observations, where other experiments, expectations and groups name them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechdsl.program import spec
from mechdsl.syntax import ast
from mechdsl.syntax.walk import N, rewrite


def results_by_name(experiments: Sequence[spec.Experiment]) -> dict[str, str]:
    """Observation → the result that it is in, as that is called."""
    return {
        rule.observed.name: experiment.name
        for experiment in experiments
        for rule in experiment.rules
        if rule.observed is not None and rule.observed.name is not None
    }


def with_results(experiment: spec.Experiment, results: dict[str, str]) -> spec.Experiment:
    """The experiment with names of results where it names observations of others, or of its own
    that are other results."""
    own = {measure.label for measure in experiment.measures}

    rules = tuple(
        rule.model_copy(
            update={
                name: named_result(value, results)
                for name in ("site", "at", "onto", "edge", "receiver", "fill")
                if (value := getattr(rule, name)) is not None
            }
            | _observed_results(rule, results)
        )
        for rule in experiment.rules
    )
    expects = tuple(read_elsewhere(each, results, own) for each in experiment.expects)
    against = experiment.against
    if against is not None:
        apart = tuple(named_result(site, results) for site in against.apart)
        against = against.model_copy(update={"apart": apart})
    return experiment.model_copy(update={"rules": rules, "expects": expects, "against": against})


def _observed_results(rule: spec.Rule, results: dict[str, str]) -> dict[str, spec.Observed]:
    """The same of maps that an `observe` line is of, and of what they are set against."""
    said = rule.observed
    if said is None or not said.maps:
        return {}
    named = {
        name: tuple(named_result(each, results) for each in every)
        for name, every in (("maps", said.maps), ("others", said.others))
    }
    return {"observed": said.model_copy(update=named)}


def read_elsewhere(
    expect: spec.Expectation, results: Mapping[str, str], own: Collection[str]
) -> spec.Expectation:
    """The expectation with measures of other results as such. results: label of a measure → the
    result that it is in; own: labels and effects of the one that expects."""
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
            return ast.OfExperiment(node, experiment, span=node.span)
        match node:
            case ast.OfRef(of=ast.Ref(part=None, name=name)) if name in there:
                return replace(node, of=replace(node.of, name=there[name]))
            case ast.Binary() | ast.Compare() | ast.Logical():
                return replace(node, left=value(node.left), right=value(node.right))
            case ast.Not() | ast.Negative():
                return replace(node, operand=value(node.operand))
            case ast.Near() | ast.InRange():
                return replace(node, value=value(node.value))
            case ast.Call(arguments=(first, *others)):
                if node.name in ("spearman", "pearson"):
                    others = [replace(each, value=result(each.value)) for each in others]
                found = replace(first, value=value(alone(first.value)))
                return replace(node, arguments=(found, *others))
            case _:
                return node

    def alone(node: Any) -> Any:
        """A lone word reads as a group of sites too."""
        if isinstance(node, ast.Site) and len(node.names) == 1 and not node.axes:
            return node.names[0]
        return node

    def result(node: Any) -> Any:
        node = alone(node)
        if isinstance(node, ast.Name) and node.id in there:
            return replace(node, id=there[node.id])
        return node

    return expect.model_copy(update={"condition": value(expect.condition)})


def with_results_in(group: spec.Group, results: dict[str, str]) -> spec.Group:
    """The same of a group's sites."""
    sites = tuple(named_result(site, results) for site in group.sites)
    return group.model_copy(update={"sites": sites})


def named_result(node: N, results: dict[str, str]) -> N:
    """The tree with names of results where it names observations."""

    def change(part: ast.Node) -> ast.Node:
        if isinstance(part, ast.Ranked | ast.MapOf) and part.of in results:
            return replace(part, of=results[part.of])
        return part

    return rewrite(node, change)
