"""The order of experiments: `top 10 of cie` needs the results of `cie`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.names import CircularExperiments, UnknownName
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.program import spec
from mechdsl.program.directions import direction_dependencies, list_direction_expressions
from mechdsl.program.names import Namespace
from mechdsl.program.references import (
    resolve_group_results,
    resolve_result_names,
    resolve_result_references,
    results_by_observation,
)
from mechdsl.program.spec import RepliesOf
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_call
from mechdsl.syntax.traversal import walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


ResultReference: TypeAlias = ast.RankedSelection | ast.MapOf | RepliesOf
"""A reference to an experiment (`of`) whose results are needed."""


def add_run_order(tree: ast.File, parts: Definitions, scope: Namespace) -> list[spec.Experiment]:
    """Return the experiments, each with the names of those whose results it uses.

    Codes: E0201 for unknown experiments, E0210 for cycles.
    """
    results = results_by_observation(parts.experiments)
    if results:
        groups = {name: resolve_group_results(each, results) for name, each in parts.groups.items()}
        parts.groups.update(groups)
        made = {name: _at_results(each, results) for name, each in parts.directions.items()}
        parts.directions.update(made)
        parts.experiments = [resolve_result_names(each, results) for each in parts.experiments]
    known = _experiments(parts, scope)
    called = {e.name: _called(e, known, results) for e in parts.experiments}
    ranked = {
        e.name: [
            own
            for node in _ranked(e, parts)
            if node.of not in parts.circuits and node not in _mask_picks(e, parts, known)
            for own in _each_of(node, called[e.name])
        ]
        for e in parts.experiments
    }
    own: list[object] = [g.sites for g in parts.groups.values() if _is_own(g, tree)]
    own += [(d.value, d.site) for d in parts.directions.values() if _is_own(d, tree)]
    every = [node for nodes in ranked.values() for node in nodes]
    every.extend(node for each in own for node in _in_tree(each))
    for node in {(node.span, node.of): node for node in every}.values():
        if node.of not in known and not _is_broken(node.of, parts):
            hint = _suggest_ranked(node.of, known, results, parts)
            problem = UnknownName(span=node.span, kind="experiment", name=node.of, hint=hint)
            scope.diagnostics.append(problem)
    _circles(ranked, scope)
    for edits in parts.edits.values():
        node = next(_ranked(edits, parts), None)
        if node is not None:
            reason = f"its edits depend on results of `{node.of}`, but a model is built before "
            reason += "experiments run"
            hint = "name the sites or the direction, or write the rules in an experiment"
            scope.diagnostics.append(BadWeights(span=edits.span, reason=reason, hint=hint))
    return [
        e.model_copy(
            update={
                "after": tuple(dict.fromkeys(node.of for node in ranked[e.name])),
                "called": called[e.name],
            }
        )
        for e in parts.experiments
    ]


def _suggest_ranked(
    name: str, known: Collection[str], results: Mapping[str, str], parts: Definitions
) -> str:
    """Return the fix for `top n of NAME` with a name that isn't an experiment."""
    mask = parts.masks.get(name)
    if name in parts.positions or (mask is not None and mask.chooses_positions):
        hint = f"`{name}` chooses positions, from which `top` doesn't select: "
        return hint + f"write `at {name} tokens`"
    if mask is not None:
        hint = f"`{name}` is a group: `top` selects from groups that `fit` chooses, as "
        return hint + "the site of a rule or after its `except`"
    if name in parts.groups or name in parts.circuits:
        kind = "circuit" if name in parts.circuits else "group"
        hint = f"`{name}` is a {kind} that lists its members; `top` selects from results "
        return hint + "of an experiment, and from groups and circuits that `fit` chooses"
    listed = name_list(known) or "none"
    return did_you_mean(name, [*known, *results], f"the file has {listed}")


def _is_broken(name: str, parts: Definitions) -> bool:
    """Whether a name is that of a group or circuit whose call has an error."""
    if name in parts.masks:
        return False
    circuit = parts.circuits.get(name)
    own = parts.groups.get(name)
    return (own is not None and not own.sites) or (circuit is not None and circuit.is_open)


def _experiments(parts: Definitions, scope: Namespace) -> list[str]:
    """Return all names of results."""
    several = {e.within for e in parts.experiments}
    known = [name for name in scope.names("experiment") if name not in several]
    return list(dict.fromkeys([*(e.name for e in parts.experiments), *known]))


def _called(
    experiment: spec.Experiment, known: Collection[str], results: Mapping[str, str]
) -> dict[str, dict[str, ast.MapOf]]:
    """Return the `for` variables over words, except those named like an experiment: variable → word
    → the experiment, or the cells of one, that the word refers to."""
    found: dict[str, dict[str, ast.MapOf]] = {}
    for loop in experiment.loops:
        listed = loop.domain.values
        items = listed.items if isinstance(listed, ast.ListLiteral) else (listed,)
        named = [item for item in items if isinstance(item, ast.Name | ast.Call)]
        words = {format_call(item): _map_of(item, results) for item in named}
        if words and loop.name not in known and not words.keys() & set(loop.within):
            found[loop.name] = words
    return found


def _map_of(node: ast.Name | ast.Call, results: Mapping[str, str]) -> ast.MapOf:
    name, cell = (node.id, ()) if isinstance(node, ast.Name) else (node.name, node.arguments)
    return ast.MapOf(results.get(name, name), cell, span=node.span)


def _each_of(
    node: ResultReference, called: Mapping[str, Mapping[str, ast.MapOf]]
) -> list[ResultReference]:
    """Expand `top k of m` to one reference per experiment in the domain of `m`."""
    if isinstance(node, RepliesOf) or node.of not in called:
        return [node]
    return [replace(node, of=each.of, span=each.span) for each in called[node.of].values()]


def _is_own(part: spec.Group | spec.Direction, tree: ast.File) -> bool:
    return part.span.source is tree.span.source


def _at_results(direction: spec.Direction, results: dict[str, str]) -> spec.Direction:
    """Replace names of observations in a direction's sites by the names of their results."""
    if direction.site is None:
        return direction
    return direction.model_copy(update={"site": resolve_result_references(direction.site, results)})


def _ranked(experiment: spec.Experiment, parts: Definitions) -> Iterator[ResultReference]:
    """Yield every `top n of …` of an experiment, including those in its groups and directions, and
    the source of the replies after its prompts."""
    if experiment.replies is not None:
        yield experiment.replies
    for part in (*experiment.every_rule, *experiment.measures, *experiment.loops):
        for name in spec.spec_fields(type(part)):
            yield from _in_tree(getattr(part, name), parts.groups)
    for save in experiment.saves:
        metric = () if save.gradient is None else (save.gradient.metric, save.gradient.at)
        yield from _in_tree((save.site, save.at, *metric), parts.groups)
    for save in experiment.saved_directions:
        yield from _in_tree(save.direction, parts.groups)
    for rule in experiment.every_rule:
        if rule.observed is not None:
            yield from (*rule.observed.maps, *rule.observed.others)
            yield from _in_tree(rule.observed.call, parts.groups)
    used = list_direction_expressions(experiment)
    for each in direction_dependencies(used, parts.directions):
        yield from _in_tree((each.value, each.site), parts.groups)
    yield from _in_tree(experiment.keep, parts.groups)
    if experiment.against is not None:
        yield from _in_tree(experiment.against.apart, parts.groups)
        if experiment.against.frequency is not None:
            yield experiment.against.frequency


def _mask_picks(
    experiment: spec.Experiment, parts: Definitions, known: Collection[str]
) -> list[ast.RankedSelection]:
    """Return every `top n of g` that is a site of an experiment's rules, where a training chooses
    the group `g`, or a file has the group that one chose."""
    sites = (
        node
        for rule in experiment.every_rule
        for name in spec.spec_fields(type(rule))
        for node in walk(getattr(rule, name))
        if isinstance(node, ast.Site) and node.ranked is not None
    )
    picks = (site.ranked for site in sites if site.ranked is not None)
    groups = {name for name, mask in parts.masks.items() if not mask.chooses_positions}
    groups |= {name for name, own in parts.groups.items() if own.candidates}
    return [node for node in picks if node.of in groups and node.of not in known]


def _in_tree(
    tree: object, groups: Mapping[str, spec.Group] | None = None
) -> Iterator[ast.RankedSelection]:
    for node in walk(tree):
        if isinstance(node, ast.RankedSelection):
            yield node
        elif groups and isinstance(node, ast.Name) and node.id in groups:
            yield from _in_tree(groups[node.id].sites)


def _circles(ranked: Mapping[str, Sequence[ResultReference]], scope: Namespace) -> None:
    """Report E0210 once per cycle, at the line of its first experiment that needs the next one."""
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> None:
        if name in done:
            return
        for node in ranked[name]:
            if node.of in chain:
                circle = (*chain[chain.index(node.of) :], node.of)
                first = next(n for n in ranked[circle[0]] if n.of == circle[1])
                found = CircularExperiments(
                    span=first.span,
                    experiment=circle[0],
                    of=circle[1],
                    chain=" → ".join(circle),
                )
                if found not in scope.diagnostics:
                    scope.diagnostics.append(found)
            elif node.of in ranked:
                visit(node.of, (*chain, node.of))
        done.add(name)

    for name in ranked:
        visit(name, (name,))


def sort_by_dependency(experiments: Sequence[spec.Experiment]) -> list[spec.Experiment]:
    """Order experiments after those whose results they use, otherwise in source order.

    Experiments in cycles, and those that use missing experiments, are dropped.
    """
    names = {e.name for e in experiments}
    left, found, done = list(experiments), list[spec.Experiment](), set[str]()
    while ready := [e for e in left if done.issuperset(e.after)]:
        found.extend(ready)
        left = [e for e in left if not done.issuperset(e.after)]
        waiting = {e.name for e in left}
        done = {name for name in names if name not in waiting}
    return found


def compared_experiments(experiment: spec.Experiment) -> set[str]:
    """Return words of an experiment's expectations that may be names of other experiments."""
    labels = {measure.label for measure in experiment.measures}
    return {name for each in experiment.expects for name in expectation_experiments(each, labels)}


def expectation_experiments(expectation: spec.Expectation, labels: Collection[str]) -> set[str]:
    """Return words of an expectation that may be names of other experiments.

    Args:
        labels: Labels of the measures of its own experiment.
    """
    found: set[str] = set()
    inner: set[int] = set()
    for node in walk(expectation.condition):
        match node:
            case ast.ExperimentMeasure(measure=measure, experiment=name):
                inner.add(id(measure))
                found.add(name.id)
            case ast.QualifiedRef(of=of) if of.name not in labels and id(node) not in inner:
                found.add(of.whole)
            case ast.Call(name="spearman" | "pearson", arguments=arguments):
                found.update(n.id for n in walk(arguments[1:2]) if isinstance(n, ast.Name))
            case _:
                pass
    return found


def add_dependencies(
    names: Collection[str], experiments: Sequence[spec.Experiment]
) -> list[spec.Experiment]:
    """Return experiments with everything that must run before them and their comparisons."""
    wanted = set(names)
    for experiment in experiments:
        if experiment.name in names:
            wanted |= compared_experiments(experiment).intersection(e.name for e in experiments)
    while True:
        more = {of for e in experiments if e.name in wanted for of in e.after}
        if more <= wanted:
            return [e for e in experiments if e.name in wanted]
        wanted |= more
