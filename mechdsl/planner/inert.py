"""Rows and cells that can't differ from the base run, or from the run that an effect uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from mechdsl.base.arrays import Bools, Ints
from mechdsl.planner.rows import CARRIED_STAGES, NO_TOKENS, RowTable, RulePlan, is_below_attention
from mechdsl.resolve.types import (
    CircuitEdge,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    SitePoint,
)
from mechdsl.vocab.sites import SITES

MIDDLE_BLOCKS, ABOVE_ATTENTION, BELOW_ATTENTION = range(3)
"""Range of writes: middle blocks, above the last attention, below the first attention."""


@dataclass(frozen=True, eq=False)
class InertWrites:
    """Writes of one rule that can't affect some measurements."""

    where: Ints
    """Row of `runs` for the writes of each combination of sites. Shape [site combination]."""
    runs: Bools
    """Shape [row, run of the rule's positions]."""
    never: bool = False
    """Whether rows always differ from the base run's, because their replies are sampled separately
    or the results aren't effects."""


def find_inert_writes(
    experiment: ResolvedExperiment, plan: RulePlan, measure: ResolvedMeasure | None = None
) -> InertWrites:
    """Determine, for every run of a rule's positions, whether writes there have no effect.

    Args:
        measure: The measure on which they have none; without it, all measures and the replies.
    """
    runs = len(plan.written.tokens.offsets) - 1
    said = experiment.generation
    if measure is not None and measure.reply is None:
        said = None
    estimator = experiment.spec.estimator
    # A gradient exists whatever is written.
    never = (said is not None and said.sampled) or (
        estimator is not None and not estimator.kind.is_effect
    )
    nothing = plan.rule.sites is None or plan.rule.does.changes == "nothing"
    apart = experiment.model.shape.encodes_apart or plan.rule.in_vision
    if nothing or apart:  # tokens of an encoder see later ones
        none = np.zeros((1, runs), dtype=np.bool_)
        return InertWrites(np.zeros(len(plan.points.offsets) - 1, dtype=np.int64), none, never)
    keys, _ = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
    _, token = plan.written.tokens.expand(np.arange(runs))
    of_run = np.repeat(np.arange(runs), plan.written.tokens.counts(np.arange(runs)))
    prompt = (keys % plan.written.prompts)[of_run]
    measures = experiment.measures if measure is None else (measure,)
    reads = _read_positions(experiment, measures, replies=said is not None)
    ends = _ends(experiment, measures)
    unread, elsewhere = _find_unread(reads, ends, prompt, token, causal=_is_causal(experiment))
    last_layer = experiment.model.shape.n_layers - 1
    if plan.rule.circuit is not None:
        where, masks = _find_inert_edges(plan, last_layer, unread, elsewhere)
    else:
        same, alike = _find_copies(experiment, plan, prompt, token)
        masks = [same | unread, same | elsewhere, alike | unread]
        where = _find_ranges(plan, last_layer)
    writes = np.stack([_all_of(mask, of_run, runs) for mask in masks])
    if plan.rule.acts_later and (measure is None or said is not None):
        writes &= plan.follows[keys // plan.written.prompts] == NO_TOKENS
    return InertWrites(where, writes, never)


def _is_causal(experiment: ResolvedExperiment) -> bool:
    """Return whether no token sees a later one."""
    ahead = experiment.looks_ahead or experiment.mixes_images
    return experiment.model.shape.causal and not ahead


def _find_unread(
    reads: Bools | None, ends: Ints, prompt: Ints, token: Ints, *, causal: bool
) -> tuple[Bools, Bools]:
    """Return which tokens come after all measured ones, and which aren't measured. Shape [token].

    Args:
        reads: The measured positions, shape [prompt, position]; None for all.
        ends: The first position after each prompt, shape [prompt].
    """
    none = np.zeros(len(token), dtype=np.bool_)
    if reads is None:
        unread = token >= ends[prompt] if causal else none
        return unread, unread
    last = reads.shape[1] - 1 - reads[:, ::-1].argmax(axis=1)
    unread = token > last[prompt] if causal else none
    seen = token < reads.shape[1]
    return unread, unread | ~seen | ~reads[prompt, np.where(seen, token, 0)]


def _find_copies(
    experiment: ResolvedExperiment, plan: RulePlan, prompt: Ints, token: Ints
) -> tuple[Bools, Bools]:
    """Return at which tokens a patch copies the base run's own vectors: above the first attention,
    and below it. Shape [token]."""
    none = np.zeros(len(token), dtype=np.bool_)
    shared = _shared_prefix(experiment, plan.rule)
    if shared is None:
        return none, none
    at_the_same = token == plan.read.tokens.values
    same = at_the_same & (token < shared[prompt]) if _is_causal(experiment) else none
    equal = _equal_tokens(experiment, plan.rule)
    inside = token < equal.shape[1]
    return same, at_the_same & inside & equal[prompt, np.where(inside, token, 0)]


def _find_ranges(plan: RulePlan, last_layer: int) -> Ints:
    """Return the range of each site combination; `MIDDLE_BLOCKS` unless all its sites are
    elsewhere."""
    where = np.full(len(plan.points.offsets) - 1, MIDDLE_BLOCKS)
    if plan.paths is None:
        where[_all_points(plan, lambda point: _is_above_attention(point, last_layer))] = (
            ABOVE_ATTENTION
        )
    elif plan.paths.at_the_end:  # all attention is frozen
        where[:] = ABOVE_ATTENTION
    where[_all_points(plan, is_below_attention)] = BELOW_ATTENTION
    return where


NO_EDGES, EDGES_ABOVE, OTHER_EDGES = range(3)
"""Edges that a rule ablates at a token: none, those whose receivers come after the keys and values
of the last attention, others."""


def _find_inert_edges(
    plan: RulePlan, last_layer: int, unread: Bools, elsewhere: Bools
) -> tuple[Ints, list[Bools]]:
    """Return at which tokens the ablation of edges has no effect.

    Returns:
        The index of the mask of each site combination; the masks, each of shape [token].
    """
    circuit = plan.rule.circuit
    assert circuit is not None
    of_token = plan.written_classes
    numbers: dict[tuple[int, ...], int] = {}
    where = np.zeros(len(plan.points.offsets) - 1, dtype=np.int64)
    for key, classes in enumerate(plan.edge_ends):
        ranges = tuple(
            _range_of_edges(to.points, last_layer, known=not circuit.waits) for _, to in classes
        )
        where[key] = numbers.setdefault(ranges, len(numbers))
    masks: list[Bools] = []
    for ranges in numbers:
        own = np.full(len(unread), ranges[0])
        if of_token is not None:
            own = np.array(ranges)[of_token]
        masks.append(unread | (own == NO_EDGES) | ((own == EDGES_ABOVE) & elsewhere))
    return where, masks


def _range_of_edges(receivers: Sequence[SitePoint], last_layer: int, *, known: bool) -> int:
    """Return the range of some edges.

    Args:
        known: Whether they aren't placeholders.
    """
    if not known:
        return OTHER_EDGES
    if not receivers:
        return NO_EDGES
    above = all(_is_above_attention(point, last_layer) for point in receivers)
    return EDGES_ABOVE if above else OTHER_EDGES


def inert_rows(inert: Sequence[InertWrites], rules: Sequence[RulePlan], rows: RowTable) -> Bools:
    """Return whether all writes of a row have no effect. Shape [row]."""
    mask = np.full(len(rows), _may_be(inert), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        dead = one.runs[one.where[plan.site_of_cell[rows.cell]], plan.written_runs(rows)]
        if _changes_edges(plan) and plan.keys is not None and plan.key_of_cell is not None:
            none = plan.keys.tokens.counts(plan.key_runs(rows)) == 0
            dead |= none & (plan.keys_follow[plan.key_of_cell[rows.cell]] == NO_TOKENS)
        dead |= plan.rule.does.unchanged(plan.amounts)[rows.cell]
        mask &= dead | ~plan.acts(rows)
    return mask


def _may_be(inert: Sequence[InertWrites]) -> bool:
    return bool(inert) and not any(one.never for one in inert)


def _changes_edges(plan: RulePlan) -> bool:
    """Whether it changes edges to keys, which may be absent."""
    return plan.rule.does.changes == "edges"


def inert_cells(inert: Sequence[InertWrites], rules: Sequence[RulePlan], count: int) -> Bools:
    """Return whether all writes of a cell's rows have no effect. Shape [cell]."""
    mask = np.full(count, _may_be(inert), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        key, run = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
        dead = np.ones((len(one.runs), len(plan.positions)), dtype=np.bool_)
        for where in range(len(one.runs)):
            np.logical_and.at(dead[where], key // plan.written.prompts, one.runs[where, run])
        own = dead[one.where[plan.site_of_cell], plan.position_of_cell]
        if _changes_edges(plan) and plan.keys is not None and plan.key_of_cell is not None:
            key, run = plan.keys.runs.expand(np.arange(len(plan.keys.runs.offsets) - 1))
            none = np.ones(int(plan.key_of_cell.max()) + 1, dtype=np.bool_)
            empty = plan.keys.tokens.counts(run) == 0
            np.logical_and.at(none, key // plan.keys.prompts, empty)
            own |= (none & (plan.keys_follow == NO_TOKENS))[plan.key_of_cell]
        own |= plan.rule.does.unchanged(plan.amounts)
        mask &= own if plan.active is None else own | ~plan.active
    return mask


def find_equal_cells(
    experiment: ResolvedExperiment,
    rules: Sequence[RulePlan],
    others: Sequence[RulePlan],
    measure: ResolvedMeasure,
    count: int,
) -> Bools:
    """Return whether a measure can't differ between the rules and the rules of a baseline. Shape
    [cell].

    Args:
        others: The rules of the baseline in the same cells, each instead of a rule.
    """
    equal_cells = np.ones(count, dtype=np.bool_)
    for plan, other in zip(rules, others, strict=True):
        if plan.rule is other.rule:
            continue
        if plan.rule.circuit is None:
            equal_cells &= _write_equally(plan, other)
        else:
            changed = _keep_differing_edges(plan, other)
            inert = find_inert_writes(experiment, changed, measure)
            equal_cells &= inert_cells([inert], [changed], count)
    return equal_cells


def _keep_differing_edges(plan: RulePlan, other: RulePlan) -> RulePlan:
    """Return a rule on a circuit with the edges that one of two rules ablates."""
    circuit, theirs = plan.rule.circuit, other.rule.circuit
    assert circuit is not None
    assert theirs is not None
    ((_, without),) = theirs.edges.items()  # a baseline has no sweep
    edges = {
        key: tuple(
            _list_differing(each, without[number if len(without) > 1 else 0])
            for number, each in enumerate(own)
        )
        for key, own in circuit.edges.items()
    }
    return replace(plan, rule=replace(plan.rule, circuit=replace(circuit, edges=edges)))


def _list_differing(
    edges: tuple[CircuitEdge, ...], others: tuple[CircuitEdge, ...]
) -> tuple[CircuitEdge, ...]:
    """List the edges that are in one of two lists. Both have edges of one model, so that edges are
    compared by identity: a list may have 32,000."""
    numbers, theirs = set(map(id, edges)), set(map(id, others))
    return tuple(
        edge
        for some, rest in ((edges, theirs), (others, numbers))
        for edge in some
        if id(edge) not in rest
    )


def _write_equally(plan: RulePlan, other: RulePlan) -> Bools:
    """Return whether two rules of one kind write the same at the same sites. Shape [cell]."""
    cells = zip(_list_targets(plan), _list_targets(other), strict=True)
    return np.array([own == theirs for own, theirs in cells], dtype=np.bool_)


def _list_targets(plan: RulePlan) -> list[tuple[object, ...]]:
    """List what a rule writes in each cell: its sites, coordinates and tokens."""
    points = [
        frozenset(plan.point_table[number] for number in plan.points.values[start:end].tolist())
        for start, end in pairwise(plan.points.offsets.tolist())
    ]
    hits = [position.hits for position in plan.positions]
    coordinates = plan.coordinates_of_cell
    return [
        (
            points[plan.site_of_cell[cell]],
            hits[plan.position_of_cell[cell]],
            None if coordinates is None else plan.coordinates[coordinates[cell]],
            plan.amounts[cell],
        )
        for cell in range(len(plan.site_of_cell))
    ]


def _all_of(mask: Bools, group: Ints, count: int) -> Bools:
    """Return whether all members of a group satisfy the mask. Shape [group]."""
    found = np.ones(count, dtype=np.bool_)
    np.logical_and.at(found, group, mask)
    return found


def _all_points(plan: RulePlan, holds: Callable[[SitePoint], bool]) -> Bools:
    """Return whether all sites of a combination satisfy a condition. Shape [site combination]."""
    mask = np.array([holds(point) for point in plan.point_table], dtype=np.bool_)
    combinations = len(plan.points.offsets) - 1
    index, point = plan.points.expand(np.arange(combinations))
    return _all_of(mask[point], index, combinations)


def _is_above_attention(point: SitePoint, last_layer: int) -> bool:
    on_top = point.layer == last_layer and SITES[point.site].stage not in CARRIED_STAGES
    return on_top or SITES[point.site].when == "output"


def _read_positions(
    experiment: ResolvedExperiment, measures: Sequence[ResolvedMeasure], *, replies: bool
) -> Bools | None:
    """Return the base run's measured positions, shape [prompt, position]; None for all.

    Args:
        replies: Whether replies are read.
    """
    if experiment.model.shape.output_at == "image":
        return None  # a classification head may pool the patches
    base = experiment.spec.base
    lengths = experiment.table.runs[base].lengths
    positions = np.zeros((len(lengths), int(lengths.max())), dtype=np.bool_)
    if replies:
        positions[np.arange(len(lengths)), lengths - 1] = True
    for measure in measures:
        if any(atom.form.takes in ("prompt", "continuation") for atom in measure.atoms):
            return None
        if measure.reply is not None:
            continue
        at = measure.at.get(base)
        positions[np.arange(len(lengths)), lengths - 1 if at is None else np.asarray(at)] = True
    return positions


def _ends(experiment: ResolvedExperiment, measures: Sequence[ResolvedMeasure]) -> Ints:
    """Return the first position after each prompt. Shape [prompt]."""
    appended = np.zeros(len(experiment.table), dtype=np.int64)
    for measure in measures:
        for atom in measure.atoms:
            if atom.texts:
                appended = np.maximum(appended, atom.appended)
    return experiment.table.runs[experiment.spec.base].lengths + appended


def _shared_prefix(experiment: ResolvedExperiment, rule: ResolvedRule) -> Ints | None:
    """Return the number of leading tokens that source and base share, shape [prompt]; None if the
    rule isn't a patch between two plain prompts."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    if not rule.does.copies or source.noise is not None or base.noise is not None:
        return None
    if rule.sites is not None and rule.sites.sources is not None:  # the source is in another layer
        return None
    if source.model != base.model:
        return None
    if source is not base and (source.derived is not None or base.derived is not None):
        return None  # equal tokens, but with rules
    if source is base:
        return base.lengths
    shared: list[int] = []
    for a, b in zip(source.rows, base.rows, strict=True):
        same = 0
        for x, y in zip(a.ids, b.ids, strict=False):
            if x != y:
                break
            same += 1
        shared.append(same)
    return np.array(shared, dtype=np.int64)


def _equal_tokens(experiment: ResolvedExperiment, rule: ResolvedRule) -> Bools:
    """Return whether source and base have the same token. Shape [prompt, position]."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    equal_tokens = np.zeros(
        (len(base.rows), max(len(row.ids) for row in base.rows)), dtype=np.bool_
    )
    for prompt, (a, b) in enumerate(zip(source.rows, base.rows, strict=True)):
        equal = [x == y for x, y in zip(a.ids, b.ids, strict=False)]
        equal_tokens[prompt, : len(equal)] = equal
    return equal_tokens
