"""From rows of a plan to the vectors that are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.execute.made_of_cells import MadeOfCells
from mechdsl.execute.means_and_donors import Means, MeansAndDonors
from mechdsl.execute.unpatched_batch import TextBehind, UnpatchedBatch, fed_tokens
from mechdsl.hooks.batch import arrays_on_device, gather, on_device
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import Mode, SiteRead, SiteWrite
from mechdsl.hooks.rule_writes import Numbers, RuleWrites
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.plan.columns import EVERY, counted, each_unit, units_of
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.resolve.resolved_rule import Place
from mechdsl.vocab.sites import SITES

LanesOf: TypeAlias = Callable[[RulePlan], UnpatchedBatch]
"""The run that a rule reads → its lanes on the current prompts, or on their donors."""


@dataclass(frozen=True, eq=False)
class _Entries:
    """Every vector that one rule writes, as parallel columns."""

    row: Ints
    written: Ints
    read: Ints
    slot: Ints
    """Which of the joined tokens it is."""
    point: Ints


def read_prompts(plan: RulePlan, rows: Rows, means_and_donors: MeansAndDonors) -> Ints:
    """The prompt whose activation each row reads."""
    donors = means_and_donors.donors.get(plan.number)
    return rows.prompt if donors is None else donors[rows.prompt]


def readable(
    plan: ExperimentPlan,
    rows: Rows,
    means_and_donors: MeansAndDonors,
    texts: Sequence[TextBehind | None],
) -> Ints:
    """Indices of the rows that find all that they read: a donor that has the position too, and no
    token of an answer that is predicted only, in a pass where it would be written.

    texts: behind the prompts of the passes that are measured.
    """
    good = np.ones(len(rows), dtype=np.bool_)
    for rule in plan.rules:
        if rule.rule.does.reads == "donor":
            position = rule.position_of_cell[rows.cell]
            key = position * rule.read.prompts + read_prompts(rule, rows, means_and_donors)
            good &= (rule.read.runs.counts(key) > 0) | ~rule.acts(rows)
    found = np.flatnonzero(good)
    own = rows.take(found)
    fine = np.ones(len(found), dtype=np.bool_)
    for rule in plan.rules:
        if rule.behind:
            tokens = _tokens(rule, own, means_and_donors)
            for text in texts:
                written, read = _there(plan, rule, own, tokens, means_and_donors, text)
                written &= rule.acts(own)[tokens.row]
                fine[tokens.row[written & ~read]] = False
    return found[fine]


def pass_ends(plan: ExperimentPlan, rows: Rows, text: TextBehind | None) -> Ints | None:
    """[row] the first position that a pass with this text behind its prompts doesn't have; None
    where no rule acts on tokens behind the prompts, so that it needn't be asked."""
    return plan.lengths(rows) + fed_tokens(text, rows.prompt) if plan.behind else None


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Every token that one rule writes, as parallel columns."""

    row: Ints
    written: Ints
    read: Ints
    slot: Ints
    """Which of the joined tokens it is."""


def _tokens(plan: RulePlan, rows: Rows, means_and_donors: MeansAndDonors) -> _Tokens:
    """The tokens that the rule writes, whether or not they are there."""
    position = plan.position_of_cell[rows.cell]
    written_run = plan.written_runs(rows)
    read_run = plan.read.run(position, read_prompts(plan, rows, means_and_donors), rows.alternative)
    row, written = plan.written.tokens.expand(written_run)
    _, slot = counted(plan.written.tokens.counts(written_run))
    read = plan.read.tokens.values[plan.read.tokens.offsets[read_run][row] + slot]
    return _Tokens(row, written, read, slot)


def _there(
    plan: ExperimentPlan,
    rule: RulePlan,
    rows: Rows,
    tokens: _Tokens,
    means_and_donors: MeansAndDonors,
    text: TextBehind | None,
) -> tuple[Bools, Bools]:
    """[token] whether a pass with this text behind its prompts has it; whether the run that is read
    has the one that is written there."""
    ends = plan.lengths(rows) + fed_tokens(text, rows.prompt)
    written = tokens.written < ends[tokens.row]
    if rule.rule.does.reads not in ("run", "donor", "cell"):
        return written, np.ones_like(written)
    prompts = read_prompts(rule, rows, means_and_donors)
    lengths = plan.experiment.table.runs[rule.rule.run].lengths[prompts]
    return written, tokens.read < (lengths + fed_tokens(text, prompts))[tokens.row]


def _entries(
    plan: ExperimentPlan,
    rule: RulePlan,
    rows: Rows,
    means_and_donors: MeansAndDonors,
    text: TextBehind | None,
) -> _Entries:
    """What the rule writes, as far as it is there."""
    tokens = _tokens(rule, rows, means_and_donors)
    there = np.ones(len(tokens.row), dtype=np.bool_)
    if rule.behind:  # in a pass that isn't measured, what is read may be missing
        written, read = _there(plan, rule, rows, tokens, means_and_donors, text)
        there = written & read
    row, *others = (each[there] for each in (tokens.row, tokens.written, tokens.read, tokens.slot))
    index, point = rule.points.expand(rule.site_of_cell[rows.cell][row])
    written, read, slot = (each[index] for each in others)
    return _Entries(row[index], written, read, slot, point)


def build_writes(
    plan: ExperimentPlan,
    rows: Rows,
    draws: Ints,
    lanes_of: LanesOf,
    means_and_donors: MeansAndDonors,
    shape: ModelShape,
    text: TextBehind | None = None,
    *,
    senders: bool = True,
) -> list[SiteWrite]:
    """The writes of these rows, with this text behind the prompts; senders: of paths too.

    At one site and layer they act in the order of the file, each on what those before it left;
    where two rules set the same vector, the later one stands.
    """
    parts: dict[Place, list[Part]] = defaultdict(list)
    for rule in plan.rules:
        if rule.rule.does.changes != "sites" or (rule.paths is not None and not senders):
            continue
        entries = _entries(plan, rule, rows, means_and_donors, text)
        pairs = [
            ((to.site, to.layer), (of.site, of.layer))
            for to, of in zip(rule.point_table, rule.source_table, strict=True)
        ]
        places = sorted(set(pairs), key=str)
        place_of_point = np.array([places.index(pair) for pair in pairs], dtype=np.int64)
        unit_of_point, unit_of_source = units_of(rule.point_table), units_of(rule.source_table)
        own = place_of_point[entries.point]
        for index in np.unique(own):
            to, of = places[index]
            chosen = np.flatnonzero(own == index)
            unit = unit_of_point[entries.point[chosen]]
            again, unit = each_unit(unit, units(shape, *to))
            chosen = chosen[again]
            read = unit_of_source[entries.point[chosen]]
            read = np.where(read == EVERY, unit, read)
            asked = _Vectors(
                rule,
                of,
                entries,
                chosen,
                read,
                rows,
                draws,
                lanes_of,
                means_and_donors.of(text),
                means_and_donors.made_with(rule.number, text),
                means_and_donors,
                shape,
            )
            values = rule.rule.does.values(rule.rule, asked)
            spots = entries.row[chosen], entries.written[chosen], unit
            mode = rule.rule.does.mode
            where = asked.amounts if mode == "along" else None
            parts[to].append(Part(*spots, values, mode, where, rule.number))
    apart = any(rule.does.mode == "step" for rule in plan.experiment.rules)
    return [
        write for place, found in parts.items() for write in _in_order(place, found, apart=apart)
    ]


def build_edges(
    plan: ExperimentPlan, rows: Rows, shape: ModelShape, text: TextBehind | None = None
) -> list[EdgeWrite]:
    """The edges of attention that these rows change, in the order of the file."""
    found: list[EdgeWrite] = []
    ends = pass_ends(plan, rows, text)
    for rule in plan.rules:
        edge = rule.rule.edge
        if edge is None or edge.change is None or rule.keys is None:
            continue
        keys = rule.key_runs(rows)
        row, query = rule.written.tokens.expand(rule.written_runs(rows))
        if ends is not None:
            there = query < ends[row]
            row, query = row[there], query[there]
        index, point = rule.points.expand(rule.site_of_cell[rows.cell][row])
        layer = np.array([p.layer for p in rule.point_table], dtype=np.int64)[point]
        unit = units_of(rule.point_table)[point]
        for at in np.unique(layer):
            chosen = np.flatnonzero(layer == at)
            again, head = each_unit(unit[chosen], units(shape, "pattern", int(at)))
            chosen = chosen[again]
            row_of = row[index[chosen]]
            entry, key = rule.keys.tokens.expand(keys[row_of])
            if ends is not None:
                there = key < ends[row_of[entry]]
                entry, key = entry[there], key[there]
            found.append(
                EdgeWrite(
                    int(at),
                    edge.change,
                    torch.from_numpy(row_of),
                    torch.from_numpy(query[index[chosen]]),
                    torch.from_numpy(head),
                    torch.from_numpy(entry),
                    torch.from_numpy(key),
                    torch.from_numpy(rule.amounts[rows.cell[row_of]]),
                )
            )
    return found


def acting(
    plan: ExperimentPlan,
    rows: Rows,
    draws: Ints,
    lanes_of: LanesOf,
    means_and_donors: MeansAndDonors,
    shape: ModelShape,
    text: TextBehind | None = None,
    *,
    senders: bool = True,
) -> RuleWrites:
    """All that the rules of these rows do, with this text behind the prompts; senders: of paths
    too."""
    given = (lanes_of, means_and_donors, shape, text)
    return RuleWrites(
        build_writes(plan, rows, draws, *given, senders=senders),
        build_edges(plan, rows, shape, text),
        build_numbers(plan, rows, text),
        plan.replaced_blocks(int(rows.cell[0])) if len(rows) else (),
    )


def build_numbers(
    plan: ExperimentPlan, rows: Rows, text: TextBehind | None = None
) -> list[Numbers]:
    """The position ids that these rows change, in the order of the file."""
    found: list[Numbers] = []
    ends = pass_ends(plan, rows, text)
    for rule in plan.rules:
        if rule.rule.does.changes != "positions":
            continue
        written = rule.written_runs(rows)
        row, token = rule.written.tokens.expand(written)
        _, place = counted(rule.written.tokens.counts(written))
        number = rule.amounts[rows.cell[row]].astype(np.int64) + place
        if ends is not None:
            there = token < ends[row]
            row, token, number = row[there], token[there], number[there]
        found.append(Numbers(*map(torch.from_numpy, (row, token, number))))
    return found


@dataclass(frozen=True, eq=False)
class _Vectors:
    """What an intervention is asked for at one place: `resolve.types.Vectors`."""

    plan: RulePlan
    place: Place
    """Where is read."""
    entries: _Entries
    chosen: Ints
    """[K] indices into the entries."""
    unit: Ints
    """[K]"""
    rows: Rows
    draws: Ints
    lanes_of: LanesOf
    means: Mapping[int, Means]
    made: MadeOfCells | None
    means_and_donors: MeansAndDonors
    shape: ModelShape

    @property
    def row(self) -> Ints:
        """[K]"""
        return self.entries.row[self.chosen]

    @property
    def amounts(self) -> Tensor:
        return torch.from_numpy(self.plan.amounts[self.rows.cell[self.row]])

    @property
    def width(self) -> int:
        return 1 if SITES[self.place[0]].width == "key" else width(self.shape, *self.place)

    def direction(self) -> Tensor:
        return self.means_and_donors.directions.of(self.plan, self.rows.cell[self.row])

    def read(self) -> Tensor:
        if self.made is not None:
            slot = self.entries.slot[self.chosen]
            return self.made.read(self.rows, self.row, slot, self.place, self.unit, self.draws)
        return self._mean() if self.plan.rule.does.reads == "mean" else self._activation()

    def _mean(self) -> Tensor:
        means = self.means[self.plan.number]
        values = means.values[self.place]
        index = (
            self.plan.position_of_cell[self.rows.cell[self.row]],
            means.groups[self.rows.prompt[self.row]],
            self.entries.slot[self.chosen],
            self.unit,
        )
        return values[arrays_on_device(index, values.device)]

    def _activation(self) -> Tensor:
        lanes = self.lanes_of(self.plan)
        prompts = read_prompts(self.plan, self.rows, self.means_and_donors)
        lane = lanes.lane(prompts[self.row], self.draws[self.row])
        return gather(
            lanes.reads[SiteRead(*self.place)],
            lanes.batch,
            torch.from_numpy(lane),
            torch.from_numpy(self.entries.read[self.chosen]),
            torch.from_numpy(self.unit),
        )


@dataclass(frozen=True, eq=False)
class Part:
    """What one rule writes at one place."""

    row: Ints
    position: Ints
    unit: Ints
    values: Tensor
    mode: Mode = "set"
    to: Tensor | None = None
    rule: int = -1
    """The number of the rule."""


def _in_order(place: Place, parts: Sequence[Part], *, apart: bool) -> Iterator[SiteWrite]:
    """The writes of one place: adjacent rules that set vectors are one write, all others are
    separate.

    apart: no two rules are one write, as a step reads the vectors between two rules.
    """
    for sets, group in groupby(parts, lambda part: part.mode == "set" and not apart):
        if sets:
            yield joined(place, list(group))
            continue
        for part in group:
            yield joined(place, [part])


def joined(place: Place, found: Sequence[Part]) -> SiteWrite:
    """All vectors of one place; of equal ones the last stands."""
    row = np.concatenate([part.row for part in found])
    position = np.concatenate([part.position for part in found])
    unit = np.concatenate([part.unit for part in found])
    longest = max(part.values.shape[1] for part in found)  # vectors over keys, of several rules
    last_values = found[-1].values
    values = torch.cat([_widened(part.values, longest).to(last_values) for part in found])
    to = found[-1].to
    key = np.stack([row, position, unit])
    _, last = np.unique(key[:, ::-1], axis=1, return_index=True)
    if len(last) < len(row):
        keep = np.sort(len(row) - 1 - last)
        row, position, unit = row[keep], position[keep], unit[keep]
        values = values[on_device(keep, values.device)]
        to = None if to is None else to[on_device(keep, to.device)]
    site, layer = place
    return SiteWrite(
        site,
        layer,
        torch.from_numpy(row),
        torch.from_numpy(position),
        torch.from_numpy(unit),
        values,
        mode=found[-1].mode,
        to=to,
        rule=found[-1].rule,
    )


def _widened(values: Tensor, width: int) -> Tensor:
    """[K, width]: what lies behind a vector over keys is never seen."""
    if values.shape[1] == width:
        return values
    return values[:, torch.arange(width).clamp(max=values.shape[1] - 1)]
