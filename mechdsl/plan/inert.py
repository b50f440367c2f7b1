"""Rows that can't differ from the base run, by structure: they are equal to it and are not run.

Four arguments, and none of them looks at a float. In causal models source and base are the same
prompt up to the first token in which they differ, and a write behind the last position that is read
reaches nothing. In all models a position knows its own token only below the first attention, and a
write above the last attention reaches its own position only. A rule by which tokens see later ones,
or are numbered otherwise, is held to them too: a row is left out only where all of its rules are.

None of them holds of a rule that follows the newest token of a reply: it writes there what it
writes at the prompt's last token, which that one doesn't have by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Bools, Ints
from mechdsl.plan.rule_rows import NOTHING, Rows, RulePlan
from mechdsl.program.spec import NO_EFFECTS
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule, SitePoint
from mechdsl.vocab.sites import SITES

SEEN_BY_LATER_TOKENS = ("stream", "norm", "key")
"""Stages of a block that its attention carries to later positions; the rest stay where they are."""
MADE_OF_OWN_TOKEN = (*SEEN_BY_LATER_TOKENS, "query")
"""Stages of the first block that hang on the position's own token."""

BETWEEN, ABOVE, BELOW = range(3)
"""Where writes lie: in the middle, above the last attention, below the first one."""


@dataclass(frozen=True, eq=False)
class Inert:
    """What one rule writes that can't change anything that is measured."""

    where: Ints
    """[site combination] where its writes lie; `BETWEEN` unless all of them are elsewhere."""
    runs: Bools
    """[where, run of the rule's positions]"""
    never: bool = False
    """Whether rows are other ones than those of the base run whatever they write: their replies are
    drawn by themselves, or it isn't effects that are asked for."""


def inert_of(experiment: ResolvedExperiment, plan: RulePlan) -> Inert:
    """Of every run of a rule's positions, whether writing there changes nothing."""
    runs = len(plan.written.tokens.offsets) - 1
    combinations = len(plan.points.offsets) - 1
    said = experiment.generation
    estimator = experiment.spec.estimator
    # A gradient is there whatever is written.
    never = (said is not None and said.sampled) or (
        estimator is not None and estimator.name in NO_EFFECTS
    )
    if plan.rule.sites is None or plan.rule.does.changes == "nothing":
        none = np.zeros((3, runs), dtype=np.bool_)
        return Inert(np.zeros(combinations, dtype=np.int64), none, never)
    keys, _ = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
    _, token = plan.written.tokens.expand(np.arange(runs))
    of_run = np.repeat(np.arange(runs), plan.written.tokens.counts(np.arange(runs)))
    prompt = (keys % plan.written.prompts)[of_run]
    none = np.zeros(len(token), dtype=np.bool_)
    causal = experiment.model.shape.causal and not experiment.looks_ahead
    same = alike = none
    shared = _shared_prefix(experiment, plan.rule)
    if shared is not None:
        at_the_same = token == plan.read.tokens.values
        same = at_the_same & (token < shared[prompt]) if causal else none
        equal = _equal_tokens(experiment, plan.rule)
        inside = token < equal.shape[1]
        alike = at_the_same & inside & equal[prompt, np.where(inside, token, 0)]
    unread = elsewhere = none
    reads = _read_positions(experiment)
    if reads is not None:
        last = reads.shape[1] - 1 - reads[:, ::-1].argmax(axis=1)
        unread = token > last[prompt] if causal else none
        seen = token < reads.shape[1]
        elsewhere = unread | ~seen | ~reads[prompt, np.where(seen, token, 0)]
    elif causal:
        unread = elsewhere = token >= _ends(experiment)[prompt]
    last_layer = experiment.model.shape.n_layers - 1
    where = np.full(combinations, BETWEEN)
    if plan.paths is None:
        where[_all_points(plan, lambda point: _is_above_attention(point, last_layer))] = ABOVE
    elif plan.paths.at_the_end:  # all attention is held
        where[:] = ABOVE
    where[_all_points(plan, is_below_attention)] = BELOW
    tokens = (same | unread, same | elsewhere, alike | unread)
    found = np.stack([_all_of(mask, of_run, runs) for mask in tokens])
    if plan.rule.acts_later:
        found &= plan.follows[keys // plan.written.prompts] == NOTHING
    return Inert(where, found, never)


def inert_rows(inert: Sequence[Inert], rules: Sequence[RulePlan], rows: Rows) -> Bools:
    """[row] whether all that it writes changes nothing."""
    found = np.full(len(rows), _may_be(inert), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        dead = one.runs[one.where[plan.site_of_cell[rows.cell]], plan.written_runs(rows)]
        if _changes_edges(plan) and plan.keys is not None and plan.key_of_cell is not None:
            none = plan.keys.tokens.counts(plan.key_runs(rows)) == 0
            dead |= none & (plan.keys_follow[plan.key_of_cell[rows.cell]] == NOTHING)
        dead |= plan.rule.does.unchanged(plan.amounts)[rows.cell]
        found &= dead | ~plan.acts(rows)
    return found


def _may_be(inert: Sequence[Inert]) -> bool:
    return bool(inert) and not any(one.never for one in inert)


def _changes_edges(plan: RulePlan) -> bool:
    """Whether it changes edges to keys, of which there may be none."""
    return plan.rule.does.changes == "edges"


def inert_cells(inert: Sequence[Inert], rules: Sequence[RulePlan], count: int) -> Bools:
    """[cell] whether all that any of its rows writes changes nothing."""
    found = np.full(count, _may_be(inert), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        key, run = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
        dead = np.ones((3, len(plan.positions)), dtype=np.bool_)
        for where in range(3):
            np.logical_and.at(dead[where], key // plan.written.prompts, one.runs[where, run])
        own = dead[one.where[plan.site_of_cell], plan.position_of_cell]
        if _changes_edges(plan) and plan.keys is not None and plan.key_of_cell is not None:
            key, run = plan.keys.runs.expand(np.arange(len(plan.keys.runs.offsets) - 1))
            none = np.ones(int(plan.key_of_cell.max()) + 1, dtype=np.bool_)
            empty = plan.keys.tokens.counts(run) == 0
            np.logical_and.at(none, key // plan.keys.prompts, empty)
            own |= (none & (plan.keys_follow == NOTHING))[plan.key_of_cell]
        own |= plan.rule.does.unchanged(plan.amounts)
        found &= own if plan.active is None else own | ~plan.active
    return found


def _all_of(mask: Bools, group: Ints, count: int) -> Bools:
    """[group] whether it holds for all of its members."""
    found = np.ones(count, dtype=np.bool_)
    np.logical_and.at(found, group, mask)
    return found


def _all_points(plan: RulePlan, holds: Callable[[SitePoint], bool]) -> Bools:
    """[site combination] whether something holds for all its sites."""
    found = np.array([holds(point) for point in plan.point_table], dtype=np.bool_)
    combinations = len(plan.points.offsets) - 1
    index, point = plan.points.expand(np.arange(combinations))
    return _all_of(found[point], index, combinations)


def _is_above_attention(point: SitePoint, last_layer: int) -> bool:
    on_top = point.layer == last_layer and SITES[point.site].stage not in SEEN_BY_LATER_TOKENS
    return on_top or SITES[point.site].when == "output"


def is_below_attention(point: SitePoint) -> bool:
    made_of_own = SITES[point.site].stage in MADE_OF_OWN_TOKEN
    return point.site == "embed" or (point.layer == 0 and made_of_own)


def _read_positions(experiment: ResolvedExperiment) -> Bools | None:
    """[prompt, position] of the base run, what measures read; None for all of them."""
    if experiment.model.shape.output_at == "image":
        return None  # a head may pool its patches
    base = experiment.spec.base
    lengths = experiment.table.runs[base].lengths
    found = np.zeros((len(lengths), int(lengths.max())), dtype=np.bool_)
    if experiment.generation is not None:
        found[np.arange(len(lengths)), lengths - 1] = True
    for measure in experiment.measures:
        if any(atom.form.takes in ("prompt", "continuation") for atom in measure.atoms):
            return None
        if measure.reply is not None:
            continue
        at = measure.at.get(base)
        found[np.arange(len(lengths)), lengths - 1 if at is None else np.asarray(at)] = True
    return found


def _ends(experiment: ResolvedExperiment) -> Ints:
    """[prompt] the first position behind all that go in."""
    behind = np.zeros(len(experiment.table), dtype=np.int64)
    for measure in experiment.measures:
        for atom in measure.atoms:
            if atom.texts:
                behind = np.maximum(behind, atom.behind)
    return experiment.table.runs[experiment.spec.base].lengths + behind


def _shared_prefix(experiment: ResolvedExperiment, rule: ResolvedRule) -> Ints | None:
    """[prompt] how many leading tokens source and base share; None where the rule isn't a patch
    between two plain prompts."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    if not rule.does.copies or source.noise is not None or base.noise is not None:
        return None
    if rule.sites is not None and rule.sites.sources is not None:  # read in another layer
        return None
    if source.model != base.model:
        return None
    if source is not base and (source.derived is not None or base.derived is not None):
        return None  # the same tokens, and rules
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
    """[prompt, position] whether source and base have the same token there."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    found = np.zeros((len(base.rows), max(len(row.ids) for row in base.rows)), dtype=np.bool_)
    for prompt, (a, b) in enumerate(zip(source.rows, base.rows, strict=True)):
        equal = [x == y for x, y in zip(a.ids, b.ids, strict=False)]
        found[prompt, : len(equal)] = equal
    return found
