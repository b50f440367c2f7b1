"""What rules write beside the source run: means, donors of resamplings, directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.directions import FittedDirections
from mechdsl.execute.made_of_cells import MadeOfCells
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_batch import TextBehind, UnpatchedBatch, fed_tokens
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.hooks.batch import together_on_device
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.models.shape import units, width
from mechdsl.plan.columns import counted
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import RulePlan
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.prompts.seeded_draws import stable_hash
from mechdsl.resolve.resolved_rule import Apart, Place
from mechdsl.vocab.sites import SITES


@dataclass(frozen=True, eq=False)
class Means:
    """The mean activations that a rule writes."""

    values: Mapping[Place, Tensor]
    """[position, group, token of the position, unit, width]."""
    groups: Ints
    """[prompt] its group."""


@dataclass(frozen=True, eq=False)
class MeansAndDonors:
    """What the rules of an experiment write, beside the source run."""

    means: Mapping[int, Means]
    """By number of the rule."""
    behind: Mapping[int, Mapping[int, Means]]
    """The same with a text behind the prompts, by number of the metric that reads it; of rules that
    act on tokens behind the prompts."""
    donors: Mapping[int, Ints]
    """By number of the rule, [prompt] the row whose activation replaces it, for `resample`: of the
    same block, or of the other one that the rule names."""
    made: Mapping[tuple[int, int | None], MadeOfCells] = field(
        default_factory=dict[tuple[int, int | None], MadeOfCells]
    )
    """As `made_of_cells` gives it."""
    directions: FittedDirections = field(default_factory=FittedDirections)

    def made_with(self, rule: int, text: TextBehind | None) -> MadeOfCells | None:
        """What a rule writes in passes with this text behind the prompts, if it is made of whole
        cells."""
        behind = None if text is None else self.made.get((rule, text.number))
        return self.made.get((rule, None)) if behind is None else behind

    def of(self, text: TextBehind | None) -> Mapping[int, Means]:
        """By number of the rule, the means in passes with this text behind the prompts."""
        return self.means if text is None else {**self.means, **self.behind.get(text.number, {})}


def donors_of(plan: ExperimentPlan, table: PromptTable, seed: int, kept: Ints) -> dict[int, Ints]:
    """What `MeansAndDonors` has; of the experiment's own block, a permutation of the kept rows."""
    found: dict[int, Ints] = {}
    for rule in plan.rules:
        if rule.rule.does.reads == "donor":
            apart = rule.rule.apart
            if apart is None:
                found[rule.number] = _donors(kept, table.row_keys, seed)
            else:
                found[rule.number] = _donors_of_block(table, plan.starting_runs[0], apart, seed)
    return found


def _donors_of_block(table: PromptTable, base: Run, apart: Apart, seed: int) -> Ints:
    """[prompt] a row of another block, drawn by the content of the row; of other text as far as
    there is one."""
    keys, run = apart.table.row_keys, apart.table.runs[apart.run]
    order = sorted(range(len(keys)), key=lambda row: (stable_hash(seed, "donor", keys[row]), row))
    found = np.empty(len(table), dtype=np.int64)
    for prompt, key in enumerate(table.row_keys):
        first = stable_hash(seed, "row of a donor", key) % len(order)
        around = [*order[first:], *order[:first]]
        ids = base.rows[prompt].ids
        found[prompt] = next((row for row in around if run.rows[row].ids != ids), around[0])
    return found


def means_of(
    plan: ExperimentPlan, runs: UnpatchedRuns, batches: Sequence[Ints], readout: Readout
) -> tuple[dict[int, Means], dict[int, dict[int, Means]]]:
    """What `MeansAndDonors` has: averages over the kept rows, streamed by batches of prompts.

    readout: what it has behind the prompts matters where rules act on it.
    """
    averaging = {n: rule for n, rule in enumerate(plan.rules) if rule.rule.does.reads == "mean"}
    means = {number: _means(rule, runs, batches, None) for number, rule in averaging.items()}
    behind = {
        text.number: {
            number: _means(rule, runs, batches, text)
            for number, rule in averaging.items()
            if rule.behind
        }
        for text in (readout.texts_behind if plan.behind else ())
    }
    return means, behind


def _donors(kept: Ints, keys: Sequence[int], seed: int) -> Ints:
    """A seeded permutation of the kept rows without a fixed point; a donor is of other content as
    far as there are enough of these.

    keys: [prompt], which the order hangs on. Equal rows stand side by side in it, so that a step
    over as many as the commonest has leads out of each.
    """
    drawn = {key: stable_hash(seed, "donor", key) for key in {keys[row] for row in kept.tolist()}}
    order = np.array(sorted(kept.tolist(), key=lambda row: drawn[keys[row]]), dtype=np.int64)
    most = max(Counter(keys[row] for row in kept.tolist()).values(), default=0)
    donors = np.arange(len(keys), dtype=np.int64)
    donors[order] = np.roll(order, most if most < len(kept) else 1)
    return donors


def _means(
    rule: RulePlan, runs: UnpatchedRuns, batches: Sequence[Ints], text: TextBehind | None
) -> Means:
    """Mean activations over all kept rows, streamed by batches of prompts."""
    names = rule.rule.groups or ("",) * len(runs.table)
    codes = np.unique(names, return_inverse=True)[1].astype(np.int64)
    tokens = rule.averaged.tokens
    slots = int(tokens.counts(np.arange(len(tokens.offsets) - 1)).max())
    shape = runs.model.shape
    places = {(p.site, p.layer) for p in rule.source_table}
    size = (len(rule.sources), int(codes.max()) + 1)
    apart = rule.rule.apart
    run = runs.named(rule.rule.run) if apart is None else apart.table.runs[apart.run]
    every = np.arange(len(run.rows), dtype=np.int64)
    longest = int((run.lengths + fed_tokens(text, every)).max())
    sums = {
        place: torch.zeros(
            *size,
            slots,
            units(shape, *place),
            longest if SITES[place[0]].width == "key" else width(shape, *place),
            dtype=torch.float64,
        )
        for place in places
    }
    counts = torch.zeros(*size, slots, dtype=torch.float64)
    read = codes if apart is None else np.zeros(len(apart.table), dtype=np.int64)
    if apart is not None:
        every = np.arange(len(apart.table), dtype=np.int64)
        size = max(len(batch) for batch in batches)
        batches = [every[i : i + size] for i in range(0, len(every), size)]
    for batch in batches:
        if apart is None:
            lanes = runs.lanes(run, batch, None if text is None else text.atom)
        else:
            lanes = runs.apart(apart.table, run, batch, places)
        ends = None
        if rule.behind:
            ends = lanes.lengths + np.repeat(fed_tokens(text, batch), lanes.draws)
        _add(rule, batch, lanes, read, sums, counts, ends)
        if len(batches) > 1:
            runs.forget()
    divisor = counts.clamp(min=1)[..., None, None]
    return Means({place: total / divisor for place, total in sums.items()}, codes)


def _add(
    plan: RulePlan,
    prompts: Ints,
    lanes: UnpatchedBatch,
    groups: Ints,
    sums: dict[Place, Tensor],
    counts: Tensor,
    ends: Ints | None,
) -> None:
    """Add these prompts' activations to the sums of a `mean` ablation.

    sums: [position, group, token, unit, width] per place; counts: [position, group, token] how many
    were added; ends: [lane] the first position that isn't there, None where all are.
    """
    positions = np.repeat(np.arange(len(plan.sources)), len(prompts))
    prompt = np.tile(prompts, len(plan.sources))
    key = positions * plan.averaged.prompts + prompt
    index, run = plan.averaged.runs.expand(key)
    for draw in range(lanes.draws):
        lane = lanes.lane(prompt[index], np.full(len(index), draw))
        row, token = plan.averaged.tokens.expand(run)
        _, slot = counted(plan.averaged.tokens.counts(run))
        if ends is not None:
            there = token < ends[lane[row]]
            row, token, slot = row[there], token[there], slot[there]
        added = tuple(
            map(torch.from_numpy, (positions[index][row], groups[prompt[index]][row], slot))
        )
        for place, total in sums.items():
            read = lanes.reads[SiteRead(*place)]
            at = torch.from_numpy(lane[row])
            places = at, lanes.batch.columns(at, torch.from_numpy(token))
            vectors = read[together_on_device(places, read.device)]
            vectors = vectors[..., : total.shape[-1]]  # those over keys may be padded
            total.index_put_(added, vectors.to(total), accumulate=True)
        counts.index_put_(added, torch.ones(len(slot), dtype=counts.dtype), accumulate=True)
