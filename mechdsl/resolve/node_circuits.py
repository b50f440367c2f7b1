"""Circuits of nodes: groups of sites, features or positions, and the run that their effects are
relative to, in which everything that the group is chosen from is ablated.

References: Wang et al. 2022 (arXiv 2211.00593), section 4; Marks et al. 2024 (arXiv 2403.19647),
section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import comb
from typing import Literal, TypeAlias

from mechdsl.base.hashing import rank_subset, stable_hash
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.experiments import UnreadableMeasure
from mechdsl.program import spec
from mechdsl.resolve.matched_draws import ExchangeGroup, SiteOptions, combine_draws, draw_distinct
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import (
    DRAW_AXIS,
    AxisIndices,
    BasisTargets,
    Coordinates,
    DrawCounts,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite, walk
from mechdsl.vocab.metrics import COMPLETENESS, EFFECTS, FAITHFULNESS

NODE_FORMS: Mapping[str, str] = {
    name: effect.node_form for name, effect in EFFECTS.items() if effect.node_form is not None
}
"""Effect of a circuit of nodes → the rule that it is defined for."""


def names_circuit(experiment: spec.Experiment, program: spec.Program) -> bool:
    """Whether a rule of an experiment is on a circuit of edges."""
    return any(rule.circuit_name in program.circuits for rule in experiment.rules)


def find_node_problem(
    experiment: spec.Experiment, effect: str, program: spec.Program
) -> tuple[str, str] | None:
    """Return why an effect isn't defined for the rules of an experiment, and a fix; an empty fix if
    no rule has its form.

    None if the rules ablate all nodes except a circuit, for `faithfulness`; or for `completeness` a
    group that a training chooses.
    """
    rules = [rule for rule in experiment.rules if rule.observed is None]
    others = [rule for rule in rules if rule.verb != "ablate" and not _changes_nodes(rule)]
    if effect == FAITHFULNESS.name:
        nodes = [rule for rule in rules if _has_exception(rule)]
        if not nodes:
            return _explain_positions(rules, program) or (_name_forms(effect), "")
    else:
        nodes = [rule for rule in rules if _find_masks(rule, experiment, program)]
        if not nodes:
            return _explain_no_candidates(rules, effect, program)
        others += [rule for rule in rules if rule not in nodes and rule not in others]
    if others:
        each = "an ablation, or a patch that writes where it reads"
        if effect == COMPLETENESS.name:
            each = f"`{NODE_FORMS[effect]} …` or `{_patch_form(effect)} …`"
        reason = f"with `{effect}` of a group, each rule is {each}, and "
        reason += f"`{others[0].span.written}` isn't"
        return reason, "remove this rule, or measure `as delta`"
    if experiment.generation is not None:
        reason = f"`{effect}` of a group isn't available with `generate`"
        return reason, "remove `generate`, or measure `as delta`"
    if experiment.estimator is not None:
        reason = f"`{effect}` is computed exactly"
        return reason, f"remove `using {experiment.estimator.name}`, or measure `as delta`"
    if effect == COMPLETENESS.name and not all(
        _candidates_of(rule, experiment, program) for rule in nodes
    ):
        reason = "the groups of the `for` are chosen from different sites"
        return reason, "write an experiment for each group"
    return None


def _name_forms(effect: str) -> str:
    form = EFFECTS[effect].circuit
    patch = f"`{_patch_form(effect)} … with RUN`"
    return f"`{effect}` is defined for `{form} …`, `{NODE_FORMS[effect]} …` and {patch}"


def _patch_form(effect: str) -> str:
    """Return the form of an effect's rule that takes values from a run."""
    return NODE_FORMS[effect].replace("ablate", "patch", 1)


def suggest_node_rule(experiment: spec.Experiment, effect: str, program: spec.Program) -> str:
    """Return the fix with a rule of the right form, with the group, the positions and the fill of
    the experiment's own rule, if it has one."""
    is_whole = effect == COMPLETENESS.name
    places = {name for name, mask in program.masks.items() if mask.chooses_positions}
    groups = {*(program.masks if is_whole else program.groups)} - places - {*program.circuits}
    own = next((rule for rule in experiment.rules if _changes_nodes(rule)), None)
    verb = "ablate" if own is None else own.verb
    ends = "at tokens * with zero"
    if own is not None:
        ends = f"at {own.span.source.text[own.at.span.start : own.span.end]}"
    named = [] if own is None else [n.id for n in walk(own.site) if isinstance(n, ast.Name)]
    group = next((name for name in (*named, *program.groups) if name in groups), "GROUP")
    everything = "SITES"
    if group in program.masks:
        everything = program.masks[group].site.span.written
    rule = f"{verb} {everything} except {group} {ends}"
    if is_whole:
        rule = f"{verb} {group} {ends}"
    return f"write the rule `{rule}`, or measure `as delta`"


def _find_named_positions(rules: Sequence[spec.Rule], program: spec.Program) -> str | None:
    """Return the first group of positions that rules are at."""
    places = program.position_groups
    spans = (node.name for rule in rules for node in walk(rule.at) if isinstance(node, ast.SpanRef))
    return next((name for name in spans if name in places), None)


def _explain_positions(rules: Sequence[spec.Rule], program: spec.Program) -> tuple[str, str] | None:
    """Return why a rule at a group of positions has no `faithfulness`, and a fix."""
    place = _find_named_positions(rules, program)
    if place is None:
        return None
    reason = f"`{place}` chooses positions, and `{FAITHFULNESS.name}` is defined for circuits and "
    reason += "groups of sites"
    others = "`as delta`" if place in program.positions else "`as completeness` or `as delta`"
    return reason, f"measure {others}"


def _explain_no_candidates(
    rules: Sequence[spec.Rule], effect: str, program: spec.Program
) -> tuple[str, str]:
    """Return why `completeness` has no run to compare with, and a fix."""
    named = [node.id for rule in rules if rule.site is not None for node in rule.site.names]
    group = next((name for name in named if name in program.groups), None)
    place = _find_named_positions(rules, program)
    if place in program.positions:
        reason = f"`{effect}` of positions needs a group that this file trains, and `{place}` is "
        reason += "read from a file"
        return reason, f"write `group {place} = fit(mask(…), …)`, or measure `as delta`"
    if place is not None:
        reason = f"`{effect}` needs a rule at all positions of `{place}` together"
        return reason, f"write `at {place} tokens`, or measure `as delta`"
    if group is None:
        return _name_forms(effect), ""
    if group in program.masks:
        reason = f"`{effect}` needs a rule on the whole of `{group}`"
        return reason, f"write `ablate {group} …`, or measure `as delta`"
    reason = f"`{group}` lists its sites, so the sites that it was chosen from aren't known"
    hint = f"write `ablate SITES except {group} …` with `as faithfulness`, where SITES are those "
    hint += f"that `{group}` was chosen from, or train the group: `group {group} = fit(mask(…), …)`"
    return reason, hint


def _changes_nodes(rule: spec.Rule) -> bool:
    """Whether a rule ablates sites, or patches them where it reads them."""
    moves = rule.onto is not None or rule.into_layer is not None or rule.exchanged is not None
    return rule.site is not None and (rule.verb == "ablate" or (rule.verb == "patch" and not moves))


def _has_exception(rule: spec.Rule) -> bool:
    """Whether a rule ablates or patches everything except a group."""
    if not _changes_nodes(rule) or rule.site is None:
        return False
    return bool(rule.site.excluded) or any(isinstance(node, ast.Except) for node in walk(rule.at))


def _find_masks(
    rule: spec.Rule, experiment: spec.Experiment, program: spec.Program
) -> list[spec.Basis]:
    """Return the trained groups that a rule changes as a whole, several in a `for`; or the one
    whose best sites it changes, `top n of g`."""
    if not _changes_nodes(rule) or rule.site is None:
        return []
    positions = _find_chosen_positions(rule, program)
    if positions is not None:
        return [positions]
    site = rule.site
    if site.ranked is not None and not (site.names or site.axes or site.excluded):
        mask = program.masks.get(site.ranked.of)
        return [mask] if mask is not None and not mask.chooses_positions else []
    if len(site.names) != 1 or site.excluded or site.basis is not None:
        return []
    name = site.names[0].id
    if site.axes and (name not in program.masks or site.axes != program.masks[name].site.axes):
        return []  # a site of a component; a group of coordinates has the axes of its candidates
    domains = (loop.domain for loop in experiment.loops if loop.name == name)
    words = next(domains, None)
    names = [name]
    if words is not None:
        names = [node.id for node in walk(words) if isinstance(node, ast.Name)]
    bases = [program.masks[each] for each in names if each in program.masks]
    is_whole = len(bases) == len(names) and not any(basis.chooses_positions for basis in bases)
    return bases if is_whole else []


def _find_chosen_positions(rule: spec.Rule, program: spec.Program) -> spec.Basis | None:
    """Return the trained group of positions that a rule is at: `at g tokens`."""
    body = rule.at.items[0].body if len(rule.at.items) == 1 else None
    base = body.base if isinstance(body, ast.Point) and body.offset == 0 else None
    if not isinstance(base, ast.SpanTokens) or not base.plural or base.each or base.low is not None:
        return None
    mask = program.masks.get(base.of.name or "")
    return mask if mask is not None and mask.chooses_positions else None


def _candidates_of(
    rule: spec.Rule, experiment: spec.Experiment, program: spec.Program
) -> tuple[ast.Site, ast.Positions | None] | None:
    """Return what the groups of a rule are chosen from: a site, or positions; None if the groups of
    a `for` differ in that."""
    masks = _find_masks(rule, experiment, program)
    if not masks:
        return None
    first = masks[0]
    texts = {" ".join(mask.site.span.written.split()) for mask in masks}
    return (first.site, first.at if first.chooses_positions else None) if len(texts) == 1 else None


# --- the run with everything ablated --------------------------------------------------------------


def with_everything(experiment: spec.Experiment, program: spec.Program) -> spec.Experiment:
    """Return an experiment with its rules as they ablate everything that its circuit of nodes is
    chosen from; the experiment itself without an effect that needs them."""
    effects = {measure.effect for measure in experiment.measures} & {*NODE_FORMS}
    if len(effects) != 1 or experiment.broken or names_circuit(experiment, program):
        return experiment
    (effect,) = effects
    if find_node_problem(experiment, effect, program) is not None:
        return experiment
    rules = tuple(_ablate_all(rule, effect, experiment, program) for rule in experiment.rules)
    return experiment.model_copy(update={"everything": rules})


def _ablate_all(
    rule: spec.Rule, effect: str, experiment: spec.Experiment, program: spec.Program
) -> spec.Rule:
    if not _changes_nodes(rule) or rule.site is None:
        return rule
    if effect == FAITHFULNESS.name:
        site = replace(rule.site, excluded=()) if rule.site.excluded else rule.site
        return rule.model_copy(update={"site": site, "at": rewrite(rule.at, _except_nothing)})
    candidates = _candidates_of(rule, experiment, program)
    if candidates is None:
        return rule
    site, items = candidates
    if items is None:
        return rule.model_copy(update={"site": replace(site, span=rule.site.span)})
    (item,) = rule.at.items
    assert isinstance(item.body, ast.Point)
    assert isinstance(item.body.base, ast.SpanTokens)
    base = item.body.base
    chosen = ast.ChosenTokens(base.of.name or "", items, None, plural=True, span=base.span)
    item = replace(item, body=replace(item.body, base=chosen))
    return rule.model_copy(update={"at": replace(rule.at, items=(item,))})


def _except_nothing(node: ast.Node) -> ast.Node:
    return replace(node, excluded=None) if isinstance(node, ast.Except) else node


def resolve_everything(
    work: ExperimentContext,
    rules: Sequence[ResolvedRule | None],
    resolve: Callable[[ExperimentContext], Sequence[ResolvedRule | None]],
) -> tuple[ResolvedRule, ...]:
    """Resolve the rules with everything ablated; empty without them, or after an error.

    Args:
        rules: The resolved rules of the experiment.
        resolve: Resolves the rules of a context.

    Codes: E0612 and those of rules.
    """
    written = work.experiment.everything
    own = [rule for rule in rules if rule is not None]
    if not written or len(own) != len(written) or has_errors(work.diagnostics):
        return ()
    again = replace(
        work,
        experiment=work.experiment.model_copy(update={"rules": written}),
        sites=replace(work.sites, diagnostics=[]),
        axes={name: work.axes[name] for name in work.loops},
    )
    resolved = [rule for rule in resolve(again) if rule is not None]
    work.diagnostics.extend(d for d in again.diagnostics if d not in work.diagnostics)
    if len(resolved) != len(own) or has_errors(work.diagnostics):
        return ()
    problem = _check_everything(own, resolved, work, again)
    if problem is not None:
        work.diagnostics.append(problem)
        return ()
    return tuple(resolved)


def _check_everything(
    rules: Sequence[ResolvedRule],
    everything: Sequence[ResolvedRule],
    work: ExperimentContext,
    again: ExperimentContext,
) -> Diagnostic | None:
    """Return E0612 if the run with everything ablated can't be compared with the rules."""
    measure = next(each for each in work.experiment.measures if each.effect in NODE_FORMS)
    effect = measure.effect

    def report(reason: str, hint: str) -> Diagnostic:
        text = measure.span.written
        return UnreadableMeasure(span=measure.span, text=text, reason=reason, hint=hint)

    sweeps = any(work.axes.get(name) != axis for name, axis in again.axes.items())
    if sweeps or not _leaves_cells_whole(rules, everything):
        reason = f"`{effect}` is that of a group, and the rule sweeps the values that it leaves out"
        return report(reason, "join them with the plural: `layers`, `heads`, `tokens`")
    for rule, whole in zip(rules, everything, strict=True):
        if rule.does.over_rows and not _has_equal_places(rule, whole):
            reason = "the rule leaves out tokens that have different places in different rows, so "
            reason += "with everything ablated a token would have the fill of other tokens"
            hint = "write `with zero`, or positions with the same places in every row"
            return report(reason, hint)
    return None


def _leaves_cells_whole(rules: Sequence[ResolvedRule], everything: Sequence[ResolvedRule]) -> bool:
    """Whether `except` does more than leave out cells of a sweep."""
    for rule, whole in zip(rules, everything, strict=True):
        if rule.sites is None or whole.sites is None or not rule.sites.missing:
            continue
        axes, every = rule.sites.axes, whole.sites
        cells = [each for each in rule.sites.points.items() if each[0] not in rule.sites.missing]
        if all(
            set(points) == set(every.points[_along(axes, key, every.axes)]) for key, points in cells
        ):
            return False
    return True


def _along(axes: Sequence[str], key: AxisIndices, wanted: Sequence[str]) -> AxisIndices:
    """Return the indices along some of these axes."""
    at = dict(zip(axes, key, strict=True))
    return tuple(at[name] for name in wanted)


def _has_equal_places(rule: ResolvedRule, whole: ResolvedRule) -> bool:
    """Whether the tokens of a rule have the same places among all tokens in every row."""
    positions, every = rule.positions, whole.positions
    for key, cell in positions.written.items():
        there = _along(positions.axes, key, every.axes)
        places: set[tuple[int, ...]] = set()
        for some, full in ((cell, every.written[there]), (positions.read[key], every.read[there])):
            for hits, all_hits in zip(some.hits, full.hits, strict=True):
                tokens = [token for run in all_hits for token in run]
                if hits:
                    places.add(tuple(tokens.index(token) for run in hits for token in run))
        if len(places) > 1:
            return False
    return True


# --- what the circuit is chosen from --------------------------------------------------------------


class NodeChoice(Record):
    """The nodes that a rule's group is chosen from in a cell, and those of the group."""

    every: tuple[Hashable, ...]
    """Sites, or numbers of coordinates, that the rule ablates with everything ablated."""
    group: frozenset[Hashable]
    """The kept nodes if the rule ablates the others; otherwise the ablated ones."""
    fixed: frozenset[Hashable] = frozenset()
    """Nodes that no draw exchanges, because the training couldn't choose them."""

    @property
    def pool(self) -> tuple[Hashable, ...]:
        """The nodes that are drawn from."""
        return tuple(node for node in self.every if node not in self.fixed)

    def options(self, seed: int) -> SiteOptions:
        """Return all groups of equal size, as numbers of the pool."""
        pool = self.pool
        numbers = tuple(n for n, node in enumerate(pool) if node in self.group)
        slot = ExchangeGroup("features", len(pool), None)
        size = comb(len(pool), len(numbers))
        names = [str(_name_node(node)) for node in pool]
        key = stable_hash(seed, "groups", *names, *numbers)
        itself = rank_subset(range(len(pool)), numbers)
        return SiteOptions(
            {slot: numbers}, [slot], [tuple(range(len(pool)))], [size], itself, key, ""
        )

    def drawn(self, numbers: Collection[int]) -> frozenset[Hashable]:
        """Return a group with these nodes of the pool."""
        return frozenset(self.pool[n] for n in numbers) | (self.group & self.fixed)


def _name_node(node: Hashable) -> Hashable:
    """Return a node without its component: groups of queries and keys are drawn alike."""
    return (node.layer, node.unit) if isinstance(node, SitePoint) else node


NodeKind: TypeAlias = Literal["coordinates", "sites"]


def find_chosen(rule: ResolvedRule, whole: ResolvedRule) -> NodeKind | None:
    """Return what differs between a rule and the rule with everything ablated, besides tokens."""
    if rule.basis is not None and whole.basis is not None:
        basis, every = rule.basis, whole.basis
        if basis.axes != every.axes or basis.coordinates != every.coordinates:
            return "coordinates"
    assert rule.sites is not None
    assert whole.sites is not None
    sites = rule.sites.axes != whole.sites.axes or rule.sites.points != whole.sites.points
    return "sites" if sites else None


def read_choice(
    rule: ResolvedRule,
    whole: ResolvedRule,
    kind: NodeKind,
    at: Mapping[str, int],
    choices: Collection[int] = (),
) -> NodeChoice:
    """Return the choice of a rule in a cell.

    Args:
        at: Indices of the cell along all axes of the rule.
        choices: The coordinates that a training could choose; empty for all.
    """
    if kind == "coordinates":
        assert rule.basis is not None
        assert whole.basis is not None
        every = list_coordinates(whole.basis, at)
        ablated = frozenset[Hashable](list_coordinates(rule.basis, at))
        fixed = frozenset[Hashable](n for n in every if choices and n not in choices)
    else:
        assert rule.sites is not None
        assert whole.sites is not None
        every = whole.sites.points[tuple(at[name] for name in whole.sites.axes)]
        numbers = tuple(at[name] for name in rule.sites.axes)
        here = () if numbers in rule.sites.missing else rule.sites.points[numbers]
        here = () if rule.sites.writes_nothing(numbers) else here
        ablated = frozenset[Hashable](here)
        fixed = frozenset[Hashable]()
    group = ablated if not keeps_group(rule) else frozenset(every) - ablated
    return NodeChoice(tuple(every), group, fixed)


def keeps_group(rule: ResolvedRule) -> bool:
    """Whether a rule of the form for faithfulness or completeness ablates all except its group."""
    return _has_exception(rule.spec)


def list_coordinates(basis: BasisTargets, at: Mapping[str, int]) -> tuple[int, ...]:
    """Return the numbers of the coordinates that a rule changes in a cell."""
    coordinate = basis.coordinates[tuple(at[name] for name in basis.axes)]
    return coordinate.which or tuple(
        range(min(basis_member.size for basis_member in basis.bases[coordinate.basis].values()))
    )


# --- random groups --------------------------------------------------------------------------------


class DrawnGroups(Record):
    """The rules of an experiment with random groups."""

    rules: tuple[ResolvedRule, ...]
    draws: int
    """Largest number of draws of a cell."""
    counts: DrawCounts
    sizes: str
    """Sizes of the groups: `3 of 16 sites`."""
    of_choices: bool
    """Whether some groups are drawn only from what their training could choose."""
    different: tuple[int, ...]
    """Number of different draws in each cell."""
    some_alone: bool
    """Whether each draw of some cells is the group itself, because there is no other."""


def draw_groups(
    experiment: ResolvedExperiment, draws: int, choices: Mapping[int, Collection[int]]
) -> DrawnGroups | None:
    """Draw groups of equal size from what the groups of the rules are chosen from.

    Rules whose groups have the same layers and units share each draw. No two draws of a cell are
    equal, and none is the group itself, unless it is the only one of its size. None if no rule has
    a group of sites or coordinates.

    Args:
        choices: Number of a rule → the coordinates that a training could choose.
    """
    pairs = list(zip(experiment.rules, experiment.everything, strict=True))
    kinds: dict[int, NodeKind] = {}
    for n, pair in enumerate(pairs):
        kind = find_chosen(*pair)
        kinds |= {} if kind is None else {n: kind}
    if not kinds:
        return None
    used = {axis for n in kinds for rule in pairs[n] for axis in _choice_axes(rule)}
    axes = [axis for axis in experiment.axes if axis.name in used]
    names = tuple(axis.name for axis in axes)
    groups: dict[tuple[int, int, AxisIndices], frozenset[Hashable]] = {}
    sizes: dict[tuple[int, int], list[int]] = {}
    of_choices = False
    chosen: dict[AxisIndices, dict[int, frozenset[Hashable]]] = {}
    drawn: dict[AxisIndices, list[dict[int, frozenset[Hashable]]]] = {}
    for cell in product(*(range(len(axis)) for axis in axes)):
        at = dict(zip(names, cell, strict=True))
        node_choices = {
            n: read_choice(*pairs[n], kind, at, choices.get(n, ())) for n, kind in kinds.items()
        }
        for n, choice in node_choices.items():
            size = sum(node in choice.group for node in choice.pool)
            sizes.setdefault((n, len(choice.pool)), []).append(size)
            of_choices |= bool(choice.fixed)
        chosen[cell] = {n: choice.group for n, choice in node_choices.items()}
        drawn[cell] = _draw_cell(node_choices, draws, experiment.seed)
    alone = [cell for cell, own in drawn.items() if not own]
    over = experiment.combined_axis
    different = {cell: max(1, len(own)) for cell, own in drawn.items()}
    picks = combine_draws(different, names, over, draws, experiment.seed)
    counts = {cell: len(own) for cell, own in picks.items()}
    most = 0 if len(alone) == len(drawn) else max(counts.values())
    counts |= {} if over in names else dict.fromkeys(alone, most)
    for cell, own in picks.items():
        for draw, n in product(range(draws), kinds):
            has = drawn[cell] and draw < len(own)
            groups[n, draw, cell] = drawn[cell][own[draw]][n] if has else chosen[cell][n]
    rules = list(experiment.rules)
    for n, kind in kinds.items():
        own = {(d, cell): group for (m, d, cell), group in groups.items() if m == n and d < most}
        rules[n] = _with_groups(*pairs[n], kind, names, own)
    said = _describe_sizes(sizes, pairs, kinds)
    drawn_counts = DrawCounts(names, counts)
    numbers = tuple(counts[cell] if cell in alone else number for cell, number in different.items())
    return DrawnGroups(tuple(rules), most, drawn_counts, said, of_choices, numbers, bool(alone))


def _choice_axes(rule: ResolvedRule) -> Iterator[str]:
    yield from () if rule.sites is None else rule.sites.axes
    yield from () if rule.basis is None else rule.basis.axes


def _draw_cell(
    choices: Mapping[int, NodeChoice], draws: int, seed: int
) -> list[dict[int, frozenset[Hashable]]]:
    """Draw the groups of the rules of a cell, all of them in each draw."""
    options = {n: choice.options(seed) for n, choice in choices.items()}
    parts = {option.key: option for option in options.values() if option.count}
    if not parts:
        return []
    picks = draw_distinct(list(parts.values()), draws=draws)
    drawn: list[dict[int, frozenset[Hashable]]] = []
    for pick in picks:
        swaps = dict(zip(parts, pick, strict=True))
        drawn.append(
            {
                n: choices[n].drawn(swaps[option.key].values())
                if option.count
                else choices[n].group
                for n, option in options.items()
            }
        )
    return drawn


def _describe_sizes(
    sizes: Mapping[tuple[int, int], Sequence[int]],
    pairs: Sequence[tuple[ResolvedRule, ResolvedRule]],
    kinds: Mapping[int, NodeKind],
) -> str:
    """Return the sizes of groups, by the number of a rule and that of the nodes to draw from: `1 to
    3 of 16 sites`."""
    said: dict[str, None] = {}
    for (n, total), own in sizes.items():
        size = " to ".join(f"{each:,}" for each in dict.fromkeys((min(own), max(own))))
        said[f"{size} of {count_noun(total, _noun_of(kinds[n], pairs[n][1]))}"] = None
    return " and ".join(said)


def _with_groups(
    rule: ResolvedRule,
    whole: ResolvedRule,
    kind: NodeKind,
    names: tuple[str, ...],
    groups: Mapping[tuple[int, AxisIndices], frozenset[Hashable]],
) -> ResolvedRule:
    """Return a rule with another group for each draw and cell."""
    axes = (DRAW_AXIS, *names)
    keeps = keeps_group(rule)
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    coordinates: dict[AxisIndices, Coordinates] = {}
    missing: set[AxisIndices] = set()
    assert rule.sites is not None
    for (draw, cell), group in groups.items():
        at = dict(zip(names, cell, strict=True))
        every = read_choice(rule, whole, kind, at).every
        ablated = tuple(node for node in every if (node in group) != keeps)
        if kind == "coordinates":
            assert rule.basis is not None
            coordinate = rule.basis.coordinates[tuple(at[name] for name in rule.basis.axes)]
            which = tuple(node for node in ablated if isinstance(node, int))
            coordinates[draw, *cell] = replace(coordinate, which=which)
            continue
        points[draw, *cell] = tuple(node for node in ablated if isinstance(node, SitePoint))
        if not ablated:  # a cell that doesn't exist or writes nothing keeps its placeholder
            coordinate = tuple(at[name] for name in rule.sites.axes)
            points[draw, *cell] = rule.sites.points[coordinate]
            missing |= {(draw, *cell)} if coordinate in rule.sites.missing else set()
    if kind == "coordinates":
        assert rule.basis is not None
        basis = replace(rule.basis, axes=axes, coordinates=coordinates)
        return replace(rule, basis=basis)
    label = f"random group like {next(iter(rule.sites.labels.values()))}"
    sites = SiteTargets(axes, points, dict.fromkeys(points, label), missing=frozenset(missing))
    return replace(rule, sites=sites)


def describe_everything(experiment: ResolvedExperiment) -> str:
    """Describe the run with everything ablated, for the conventions of a table."""
    said: dict[str, None] = {}
    for rule, whole in zip(experiment.rules, experiment.everything, strict=True):
        if rule.does.changes == "nothing":
            continue
        kind = find_chosen(rule, whole)
        parts: list[str] = []
        if kind is not None:
            parts.append(_list_numbers(rule, whole, kind))
        if rule.positions != whole.positions:
            parts.append(_describe_tokens(rule))
        own = " ".join(rule.spec.span.written.split())
        does = "patches" if rule.spec.verb == "patch" else "ablates"
        said[f"`{own}` {does} {' '.join(parts)}" if parts else f"`{own}` as it is"] = None
    bases = [rule.basis for rule in experiment.rules if rule.basis and not rule.spec.drops_error]
    names = {basis.definition: None for basis in bases if basis.definition != ast.STANDARD_BASIS}
    rest = [f"what `{name}` doesn't represent stays" for name in names]
    return "; ".join([*said, "in the same rows", *rest])


def _describe_tokens(rule: ResolvedRule) -> str:
    """Return the tokens of a rule with everything ablated, if they are others."""
    if not keeps_group(rule):
        return "at all positions that the training chooses from"
    every = "all tokens of the prompt, without special tokens"
    is_alone = len(rule.spec.at.items) == 1 and isinstance(rule.spec.at.items[0].body, ast.Except)
    if is_alone:
        return f"at {every}"
    return f"at the named tokens, where `tokens except …` are {every}"


def _list_numbers(rule: ResolvedRule, whole: ResolvedRule, kind: NodeKind) -> str:
    """Return `16 sites instead of 13`, or the ranges of these numbers over the cells."""
    counts: list[list[int]] = []
    for resolved in (whole, rule):
        if kind == "coordinates":
            assert resolved.basis is not None
            axes = resolved.basis.axes
            cells = (dict(zip(axes, key, strict=True)) for key in resolved.basis.coordinates)
            counts.append([len(list_coordinates(resolved.basis, at)) for at in cells])
        else:
            assert resolved.sites is not None
            there = resolved.sites.points.items()
            counts.append(
                [len(points) for key, points in there if key not in resolved.sites.missing]
            )
    every, some = (
        " to ".join(f"{n:,}" for n in dict.fromkeys((min(each), max(each)))) for each in counts
    )
    noun = _noun_of(kind, whole)
    return f"{every} {noun if every == '1' else noun + 's'} instead of {some}"


def _noun_of(kind: NodeKind, rule: ResolvedRule) -> str:
    """Return what the nodes of a rule are called."""
    if kind == "sites" or rule.basis is None:
        return "site"
    return "dimension" if rule.basis.definition == ast.STANDARD_BASIS else "feature"
