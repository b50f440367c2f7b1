"""Rows that can't differ from the base run, by structure: they are equal to it and are not run.

Three arguments, all for causal decoders, and none of them looks at a float: up to the first token
in which they differ, source and base are the same prompt; a write behind the last position that is
read reaches nothing; and a write above the last attention reaches its own position only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mechdsl.columns import Ints
from mechdsl.resolve.types import ResolvedExperiment, ResolvedRule, SitePoint
from mechdsl.rule_plan import Rows, RulePlan
from mechdsl.vocab.sites import SITES

SEEN_BY_LATER_TOKENS = frozenset({"resid_pre", "attn_norm", "k", "v"})
"""Sites of a block that its attention carries to later positions; the rest stay where they are."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Inert:
    """What one rule writes that can't change what is measured."""

    below: Mask
    """[run] where it reaches later positions."""
    above: Mask
    """[run] where it lies above the last attention."""
    on_top: Mask
    """[site combination] whether all its writes lie above the last attention."""


def inert_of(experiment: ResolvedExperiment, plan: RulePlan) -> Inert:
    """Of every run of a rule's positions, whether writing there changes nothing."""
    runs = len(plan.written.tokens.offsets) - 1
    combinations = len(plan.points.offsets) - 1
    if plan.rule.sites is None:
        nothing = np.zeros(runs, dtype=np.bool_)
        return Inert(nothing, nothing, np.zeros(combinations, dtype=np.bool_))
    keys, _ = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
    _, token = plan.written.tokens.expand(np.arange(runs))
    of_run = np.repeat(np.arange(runs), plan.written.tokens.counts(np.arange(runs)))
    prompt = (keys % plan.written.prompts)[of_run]
    same = np.zeros(len(token), dtype=np.bool_)
    shared = _shared_prefix(experiment, plan.rule)
    if shared is not None:
        same = (token == plan.read.tokens.values) & (token < shared[prompt])
    unread = elsewhere = np.zeros(len(token), dtype=np.bool_)
    reads = _read_positions(experiment)
    if reads is not None:
        last = reads.shape[1] - 1 - reads[:, ::-1].argmax(axis=1)
        unread = token > last[prompt]
        elsewhere = unread | ~reads[prompt, token]
    return Inert(
        below=_all_of(same | unread, of_run, runs),
        above=_all_of(same | elsewhere, of_run, runs),
        on_top=_above_attention(experiment, plan),
    )


def inert_rows(inert: Sequence[Inert], rules: Sequence[RulePlan], rows: Rows) -> Mask:
    """[row] whether all that it writes changes nothing."""
    found = np.full(len(rows), bool(rules), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        run = plan.written.run(plan.position_of_cell[rows.cell], rows.prompt, rows.alternative)
        top = one.on_top[plan.site_of_cell[rows.cell]]
        found &= np.where(top, one.above[run], one.below[run])
    return found


def inert_cells(inert: Sequence[Inert], rules: Sequence[RulePlan], count: int) -> Mask:
    """[cell] whether all that any of its rows writes changes nothing."""
    found = np.full(count, bool(rules), dtype=np.bool_)
    for one, plan in zip(inert, rules, strict=True):
        below, above = (_of_positions(plan, runs) for runs in (one.below, one.above))
        position = plan.position_of_cell
        found &= np.where(one.on_top[plan.site_of_cell], above[position], below[position])
    return found


def _of_positions(plan: RulePlan, runs: Mask) -> Mask:
    """[position] whether it holds for all runs there, on all prompts."""
    key, run = plan.written.runs.expand(np.arange(len(plan.written.runs.offsets) - 1))
    found = np.ones(len(plan.positions), dtype=np.bool_)
    np.logical_and.at(found, key // plan.written.prompts, runs[run])
    return found


def _all_of(mask: Mask, group: Ints, count: int) -> Mask:
    """[group] whether it holds for all of its members."""
    found = np.ones(count, dtype=np.bool_)
    np.logical_and.at(found, group, mask)
    return found


def _above_attention(experiment: ResolvedExperiment, plan: RulePlan) -> Mask:
    """Per site combination: whether all its writes lie above the last attention."""
    last = experiment.model.shape.n_layers - 1

    def is_above(point: SitePoint) -> bool:
        on_top = point.layer == last and point.site not in SEEN_BY_LATER_TOKENS
        return on_top or SITES[point.site].when == "output"

    above = np.array([is_above(point) for point in plan.point_table], dtype=np.bool_)
    combinations = len(plan.points.offsets) - 1
    index, point = plan.points.expand(np.arange(combinations))
    return _all_of(above[point], index, combinations)


def _read_positions(experiment: ResolvedExperiment) -> Mask | None:
    """[prompt, position] of the base run, what measures read; None for all of them."""
    base = experiment.spec.base
    lengths = np.array([len(row.ids) for row in experiment.table.runs[base].rows], dtype=np.int64)
    found = np.zeros((len(lengths), int(lengths.max())), dtype=np.bool_)
    for measure in experiment.measures:
        if any(atom.form.takes in ("prompt", "continuation") for atom in measure.atoms):
            return None
        at = measure.at.get(base)
        found[np.arange(len(lengths)), lengths - 1 if at is None else np.asarray(at)] = True
    return found


def _shared_prefix(experiment: ResolvedExperiment, rule: ResolvedRule) -> Ints | None:
    """[prompt] how many leading tokens source and base share; None where the rule isn't a patch
    between two plain prompts."""
    source, base = experiment.table.runs[rule.run], experiment.table.runs[experiment.spec.base]
    if rule.fill != "source" or source.noise is not None or base.noise is not None:
        return None
    if source is base:
        return np.array([len(row.ids) for row in base.rows], dtype=np.int64)
    shared: list[int] = []
    for a, b in zip(source.rows, base.rows, strict=True):
        same = 0
        for x, y in zip(a.ids, b.ids, strict=False):
            if x != y:
                break
            same += 1
        shared.append(same)
    return np.array(shared, dtype=np.int64)
