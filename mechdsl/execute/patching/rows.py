"""Patched rows of any cells and experiments in one pass, including path patching.

Path patching: the sender's change propagates along the residual stream; all other sublayers return
their output on the base run. One such row serves all receivers of a sender: the input of each
receiver is recorded, then written in separate rows in which everything is recomputed. If the end of
the model is one of several receivers, the sender's change in the stream after the last block is
added there: the edges to all receivers are patched, and every other edge carries the output of its
node.

References:
    Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
    Edges: Conmy et al. 2023 (arXiv 2304.14997).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.measurement.readout import (
    ObservedValues,
    Readout,
    ReadoutInput,
    ReadoutResult,
    RowObserver,
    build_observer,
    join_requests,
    read_samples,
)
from mechdsl.execute.measurement.values import UnusableRow
from mechdsl.execute.patching.held_passes import hold_rows, hold_sublayers
from mechdsl.execute.patching.writes import (
    RuleInputs,
    RuleReader,
    RuleWrite,
    build_generation_rules,
    build_rule_writes,
    find_pass_ends,
    join_writes,
    list_later_writes,
    select_prefill_rules,
    write_receiving_features,
)
from mechdsl.execute.unpatched_batch import (
    Continuation,
    UnpatchedBatch,
    build_noise_writes,
    compute_prompt_loss,
    find_continuation_positions,
    find_positions,
    has_loss,
)
from mechdsl.execute.unpatched_runs import (
    GeneratedRows,
    GenerationRequest,
    UnpatchedRuns,
    build_reply_readers,
    flatten_units,
    merge_reply_values,
    read_replies,
)
from mechdsl.execute.vectors import FittedDirections
from mechdsl.forward.generation.rules import GenerationRules
from mechdsl.forward.hooks.batch import (
    Batch,
    CircuitWrite,
    RowPositions,
    RuleWrites,
    SiteRead,
    SiteWrite,
    array_to_device,
    arrays_to_device,
    indices_to_device,
)
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.hook_points import fuse_activations
from mechdsl.forward.hooks.model import (
    LoadedModel,
    apply_position_ids,
    has_single_output,
    replace_blocks,
    select_row_logits,
)
from mechdsl.forward.hooks.settled import CircuitSettler
from mechdsl.forward.hooks.token_copies import RowCopies, find_row_copies
from mechdsl.forward.packed.packed_pass import run_packed
from mechdsl.models.restart import HeldSublayers
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.planner.cost import SharedRows
from mechdsl.planner.plan import ExperimentPlan, Plan
from mechdsl.planner.rows import (
    PassMember,
    PathPlan,
    RowTable,
    RulePlan,
    count_columns,
    expand_units,
    point_units,
)
from mechdsl.prompts.runs import PromptRun
from mechdsl.resolve.runs import reads_reply_tokens
from mechdsl.resolve.types import MetricTerm, SiteLayer
from mechdsl.vocab.metrics import Reply
from mechdsl.vocab.sites import SITES


@dataclass(frozen=True, eq=False)
class PassRows:
    """Distinct rows of one pass, each repeated for every noise draw; draws are adjacent."""

    run: PromptRun
    batch: Ints
    prompts: Ints
    draw: Ints
    acting: RuleWrites = field(default_factory=RuleWrites)
    held: HeldSublayers | None = None
    others: RuleWrites = field(default_factory=RuleWrites)
    """For held rows, the rules outside their path, which act before sublayers are held."""
    whole: bool = False
    """Whether the rows share no activations with an unpatched run."""
    later: GenerationRules = field(default_factory=GenerationRules)
    """Rules that act during generation."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def all_logits(self) -> bool:
        """Whether logits are written."""
        return any(write.site == "logits" for write in self.acting.writes)

    def joined(self, part: PassRows, at: Ints) -> PassRows:
        """Add the writes of a member, whose rows are the rows `at`."""
        where = torch.from_numpy(at)
        held = self.held
        if part.held is not None:
            none = np.zeros(len(self), dtype=np.bool_)
            held = HeldSublayers(none, none, none) if held is None else held
            neurons = {**dict.fromkeys(part.held.neurons, none), **held.neurons}
            attention = {**dict.fromkeys(part.held.attention, none), **held.attention}
            held = HeldSublayers(
                held.rows.copy(),
                held.mlps.copy(),
                held.norms.copy(),
                {place: neuron.copy() for place, neuron in neurons.items()},
                {place: own.copy() for place, own in attention.items()},
            )
            for every, mask in (
                (held.rows, part.held.rows),
                (held.mlps, part.held.mlps),
                (held.norms, part.held.norms),
                *((held.neurons[place], neuron) for place, neuron in part.held.neurons.items()),
                *((held.attention[place], own) for place, own in part.held.attention.items()),
            ):
                every[at] = mask
        return replace(
            self,
            acting=self.acting.then(part.acting.moved(where)),
            held=held,
            others=self.others.then(part.others.moved(where)),
            whole=self.whole or part.whole,
            later=self.later.then(part.later.moved(where)),
        )


@dataclass(frozen=True, eq=False)
class PassReads:
    """Positions that one member reads."""

    final: RowPositions
    """After the last block: rows of the pass and positions."""
    spots_per_row: int
    """Spots per row; they come first in `final`, row by row, followed by positions of a loss."""
    inside: Mapping[int, tuple[SiteRead, RowPositions]]
    """Atom → the site of a `cosine` and the positions to read."""
    count: int
    """Number of rows of the member."""
    look: RowObserver | None = None
    """Reader of observed values."""

    @property
    def needs_pass(self) -> bool:
        """Whether anything must be read from a pass over prompts."""
        return bool(len(self.final[0]) or self.inside or self.look is not None)

    def spots(self, logits: Tensor) -> Tensor | None:
        """Return [row, spot, vocab]: the logits at the spots."""
        if not self.spots_per_row:
            return None
        spots = logits[: self.count * self.spots_per_row]
        return spots.unflatten(0, (self.count, self.spots_per_row))

    def loss(
        self,
        logits: Tensor,
        readout: Readout,
        member: PassMember,
        draw: Ints,
        lanes_of: Callable[[], UnpatchedBatch],
        run: PromptRun,
    ) -> Tensor | None:
        """Return [row]: the loss over all positions; lanes_of: gives the run of the rows."""
        if readout.loss is None:
            return None
        lanes = lanes_of()
        lane = lanes.lane(member.rows.prompt, draw[member.at])
        batch = lanes.batch.take(torch.from_numpy(lane))
        every = logits[self.count * self.spots_per_row :]
        whole = every.new_zeros(*batch.ids.shape, every.shape[-1])
        rows, positions = batch.tokens()
        where = indices_to_device((rows, batch.columns(rows, positions)), every.device)
        whole[where] = every
        return compute_prompt_loss(readout.loss, whole, batch, run, member.rows.prompt)


def plan_reads(
    readout: Readout, member: PassMember, run: PromptRun, lengths: Ints, look: RowObserver | None
) -> PassReads:
    """Plan the reads of a readout in a member's rows; lengths: [row of the pass]."""
    length = lengths[member.at]
    columns = [find_positions(spot, run.name, member.rows.prompt, length) for spot in readout.spots]
    rows: list[Ints] = []
    positions: list[Ints] = []
    spots = len(columns) if readout.needs_plain else 0
    if spots:
        rows.append(np.repeat(member.at, spots))
        positions.append(np.stack(columns, axis=1).reshape(-1))
    if readout.loss is not None:
        first = np.array([run.rows[prompt].source for prompt in member.rows.prompt])
        rows.append(np.repeat(member.at, length - first))
        positions.append(
            np.concatenate([np.arange(*pair) for pair in zip(first, length, strict=True)])
        )
    empty = np.zeros(0, dtype=np.int64)
    inside = {
        number: (SiteRead(atom.point.site, atom.point.layer), (member.at, columns[spot]))
        for number, (spot, atom) in enumerate(readout.atoms)
        if atom.point is not None
    }
    final = (np.concatenate([empty, *rows]), np.concatenate([empty, *positions]))
    return PassReads(final, spots, inside, len(member.at), look)


def repeat_draws(member: PassMember, draws: int) -> PassMember:
    """Repeat every row once per draw."""
    index = np.repeat(np.arange(len(member.at)), draws)
    at = member.at[index] * draws + np.tile(np.arange(draws), len(member.at))
    return PassMember(member.number, member.rows.take(index), at)


def arrange_by_row(places: RowPositions, rows: int, lengths: Ints) -> tuple[Ints, Ints]:
    """Arrange positions by row; unused slots read the last position.

    Returns:
        [place] slot of each position, and [row, slot] positions.
    """
    order = np.argsort(places[0], kind="stable")
    counts = np.bincount(places[0], minlength=rows)
    slots = np.empty(len(order), dtype=np.int64)
    slots[order] = count_columns(counts)[1]
    at = np.repeat(lengths[:, None] - 1, max(1, int(counts.max(initial=1))), axis=1)
    at[places[0], slots] = places[1]
    return slots, at


SenderPass = Callable[[RowTable, Ints, Mapping[SiteRead, RowPositions]], Mapping[SiteRead, Tensor]]
"""Pass that yields receiver inputs: with senders patched and all else held, or without the path.

Takes rows and their noise draws, and returns the values read: [place, units, width] per site.
"""


@dataclass(frozen=True, eq=False)
class _PathPasses:
    """The passes of one experiment that receiver inputs are read from."""

    patched: SenderPass
    """With the senders patched and all else held."""
    without: SenderPass
    """Without the path."""


@dataclass(frozen=True, eq=False)
class _ReceiverVectors:
    """All vectors that receivers get, as parallel columns."""

    row: Ints
    token: Ints
    point: Ints
    """Index into the receivers' table."""


@dataclass(frozen=True, eq=False)
class _ReceiverReads:
    """Where the passes over senders' rows read the vectors of receivers."""

    reads: Mapping[SiteRead, RowPositions]
    of_sites: Mapping[SiteLayer, tuple[SiteRead, Ints, Ints]]
    """By site of receivers: the read, numbers of its vectors, and their indices in the read."""
    last: Ints
    """Numbers of the vectors that are added after the last block."""
    gaining: Ints
    """Their indices in the read of the last block."""


@dataclass(frozen=True, eq=False)
class _SenderRows:
    """The distinct rows with patched senders; one serves all receivers of a sender."""

    rows: RowTable
    draws: Ints
    """[sender row] noise draw."""
    of: Ints
    """[row] the sender row that it reads."""


def _list_sender_rows(
    experiment: ExperimentPlan, plan: RulePlan, rows: RowTable, draws: Ints
) -> _SenderRows:
    at = plan.written_runs(rows)
    same = np.stack([experiment.senders[rows.cell], at, rows.alternative, rows.prompt, draws])
    _, first, sender = np.unique(same, axis=1, return_index=True, return_inverse=True)
    return _SenderRows(rows.take(first), draws[first], sender.reshape(-1))


def _compute_receiver_writes(
    plan: RulePlan,
    cells: Ints,
    senders: _SenderRows,
    wanted: _ReceiverVectors,
    passes: _PathPasses,
    shape: ModelShape,
    directions: FittedDirections,
) -> tuple[list[SiteWrite], list[SiteWrite]]:
    """Compute the inputs of receivers downstream of patched senders.

    Recorded inputs precede other rules' writes, which act on them again. The gain after the last
    block is added when all other rules have acted.

    Args:
        plan: The plan of the path rule.
        cells: [row] its cell.
        senders: The rows with patched senders.
        wanted: The vectors that receivers get.
        passes: The passes over the senders' rows.
        shape: The shape of the model.
        directions: The bases of features that receive.

    Returns:
        Writes to the receivers, and what is added after the last block.
    """
    paths = plan.paths
    assert paths is not None
    end = SiteRead("resid_post", shape.n_layers - 1)
    planned = _plan_receiver_reads(paths, wanted, senders.of, end)
    if not planned.reads:  # all receivers are after the end of the pass
        return [], []
    found = passes.patched(senders.rows, senders.draws, planned.reads)
    writes: list[SiteWrite] = []
    added: list[SiteWrite] = []
    last = planned.last
    if len(last):
        without = passes.without(senders.rows, senders.draws, {end: planned.reads[end]})
        gained = (found[end] - without[end])[:, 0]
        vectors = gained[array_to_device(planned.gaining, gained.device)]
        unit = np.zeros(len(last), dtype=np.int64)
        part = RuleWrite(wanted.row[last], wanted.token[last], unit, vectors, "add")
        added.append(join_writes((end.site, end.layer), [part]))
    unit_of = point_units(paths.table)
    for place, (read, own, index) in planned.of_sites.items():
        again, unit = expand_units(unit_of[wanted.point[own]], unit_count(shape, *place))
        own, index = own[again], index[again]
        values = found[read]
        vectors = values[arrays_to_device((index, unit), values.device)]
        part = RuleWrite(wanted.row[own], wanted.token[own], unit, vectors)
        for receiving_feature in write_receiving_features(plan, part, place, cells, directions):
            every = [
                (place, receiving_feature),
                *list_later_writes(receiving_feature, place, directions),
            ]
            writes += [join_writes(to, [own]) for to, own in every]
    return writes, added


def _plan_receiver_reads(
    paths: PathPlan, wanted: _ReceiverVectors, sender: Ints, end: SiteRead
) -> _ReceiverReads:
    """Plan the reads of receiver vectors.

    Args:
        sender: [row] the row of the sender.
        end: The stream after the last block.
    """
    table, is_end = paths.table, paths.is_end
    places = sorted({(p.site, p.layer) for p in table}, key=str)
    of_point = np.array([places.index((p.site, p.layer)) for p in table], dtype=np.int64)
    read_of = {
        (to.site, to.layer): SiteRead(of.site, of.layer, before=of == to)
        for to, of in zip(table, paths.reads, strict=True)
    }
    reads: dict[SiteRead, RowPositions] = {}
    of_sites: dict[SiteLayer, tuple[SiteRead, Ints, Ints]] = {}
    for number, place in enumerate(places):
        indices = np.flatnonzero((of_point[wanted.point] == number) & ~is_end[wanted.point])
        if len(indices):
            reads[read_of[place]], index = _distinct_places(wanted, indices, sender)
            of_sites[place] = read_of[place], indices, index
    last = gaining = np.flatnonzero(is_end[wanted.point])
    if len(last):
        reads[end], gaining = _distinct_places(wanted, last, sender)
    return _ReceiverReads(reads, of_sites, last, gaining)


def _distinct_places(
    wanted: _ReceiverVectors, numbers: Ints, sender: Ints
) -> tuple[RowPositions, Ints]:
    """Find the distinct positions that a subset of receiver vectors is read at.

    Returns:
        (row of the sender, token) of each distinct position, and each vector's index into them.
    """
    seen = np.stack([sender[wanted.row[numbers]], wanted.token[numbers]])
    distinct, inverse = np.unique(seen, axis=1, return_inverse=True)
    return (distinct[0], distinct[1]), inverse.reshape(-1)


def _list_receiver_vectors(plan: RulePlan, rows: RowTable, ends: Ints | None) -> _ReceiverVectors:
    """List the vectors; ends: [row] first position after the end of the pass, None if positions
    needn't be checked."""
    assert plan.paths is not None
    row, token = plan.written.tokens.expand(plan.written_runs(rows))
    if ends is not None:
        there = token < ends[row]
        row, token = row[there], token[there]
    index, point = plan.paths.points.expand(plan.paths.pair_of_cell[rows.cell][row])
    return _ReceiverVectors(row[index], token[index], point)


class Patcher:
    """Runner for the patched rows of a panel's experiments."""

    def __init__(
        self,
        plan: Plan,
        plans: Sequence[ExperimentPlan],
        readouts: Sequence[Readout],
        means_and_donors: Sequence[RuleInputs],
        runs: UnpatchedRuns,
        skip: Sequence[Collection[int]],
    ) -> None:
        """Prepare patched runs; skip: per plan, the numbers of measures to leave out."""
        self.plan = plan
        self.skip = skip
        self.plans = plans
        self.prefilled = [select_prefill_rules(experiment_plan) for experiment_plan in plans]
        """Plans restricted to rules that act on the prompts."""
        self.readouts = readouts
        self.means_and_donors = means_and_donors
        self.systems = [donor.directions.systems for donor in means_and_donors]
        self.runs = runs
        self.model = runs.model
        self._settler = CircuitSettler(self.model)

    def values(
        self,
        shared: SharedRows,
        chosen: Ints,
        members: Sequence[PassMember],
        run: PromptRun,
        batch: Ints,
        replies: Sequence[tuple[Reply, ...]] = (),
    ) -> Iterator[tuple[PassMember, ReadoutResult]]:
        """Run one pass over the chosen distinct rows, which all start from `run`.

        Args:
            chosen: Indices of the rows to run.
            members: Members of the pass, whose rows are read.
            run: The run that the rows start from.
            replies: Per row, the replies from `written`; empty if no text is generated.

        Yields:
            Each member with the readout of its rows.
        """
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = _start_pass(shared, chosen, run, batch, draws)
        readouts = [self.readouts[member.number] for member in members]
        repeated = [repeat_draws(member, draws) for member in members]
        lengths = np.array([len(run.rows[prompt].ids) for prompt in rows.prompts.tolist()])
        wanted = [
            plan_reads(readout, member, run, lengths, self._look(member))
            for readout, member in zip(readouts, repeated, strict=True)
        ]
        readers = build_reply_readers(repeated, self.plans, self.readouts, self.skip, self.systems)
        if readers or any(want.needs_pass for want in wanted):
            rows = self._pass_rows(shared, chosen, run, batch, draws)
        logits, reads, observed, tokens = self._forward(rows, readouts, wanted)
        have = GeneratedRows(rows.run, rows.prompts, (), rows.acting, rows.later)
        lanes_of = partial(self.runs.lanes, run, batch)
        in_replies = read_replies(self.runs, have, replies, readers)
        for member, many, readout, want, logit, read, seen in zip(
            members, repeated, readouts, wanted, logits, reads, observed, strict=True
        ):
            reading = ReadoutInput(
                run=run.name,
                prompts=many.rows.prompt,
                items=[self.plans[member.number].items[cell] for cell in many.rows.cell],
                logits=want.spots(logit),
                continued=self._read_continuations(rows, many, readout),
                loss=want.loss(logit, readout, many, rows.draw, lanes_of, run),
                activations=read,
                references=self.runs.references(
                    readout, batch, many.rows.prompt, rows.draw[many.at]
                ),
                observed=seen,
                tokens=tokens,
                has_loss=None if readout.loss is None else has_loss(run, many.rows.prompt),
            )
            written = [replies[row] for row in many.at] if replies else ()
            result = read_samples(readout, reading, written, skip=self.skip[member.number])
            result = replace(result, listed=None if seen is None else seen.listed)
            if member.number in in_replies:
                result = merge_reply_values(result, in_replies[member.number])
            yield member, result.over_draws(draws)

    def written(
        self, shared: SharedRows, chosen: Ints, run: PromptRun, batch: Ints
    ) -> list[tuple[Reply, ...]]:
        """Generate text; returns, per chosen row and noise draw, one reply for each sample."""
        writer = self.runs.writer
        assert writer is not None
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = self._pass_rows(shared, chosen, run, batch, draws)
        number, cell = shared.owner[chosen].tolist(), shared.rows.cell[chosen].tolist()
        cells = list(zip(number, cell, strict=True))
        content = {(n, c): self.plans[n].content(c) for n, c in dict.fromkeys(cells)}
        keys = [content[each] for each in cells]
        contents = self._contents(shared, chosen)
        return writer.of_rows(
            GenerationRequest(
                run=rows.run,
                prompts=rows.prompts,
                draw=rows.draw,
                keys=[key for key in keys for _ in range(draws)],
                prefill=rows.acting,
                later=rows.later,
                contents=contents and [own for own in contents for _ in range(draws)],
            )
        )

    def _contents(self, shared: SharedRows, chosen: Ints) -> list[bytes] | None:
        """Return, per distinct row, the key of its reply; None if some row has no such key."""
        kept = None if self.runs.writer is None else self.runs.writer.kept
        if kept is None:
            return None
        contents = [b""] * len(chosen)
        owner, rows = shared.owner[chosen], shared.rows.take(chosen)
        for number in np.unique(owner).tolist():
            indices = np.flatnonzero(owner == number)
            keys = kept.of_rows(self.plans[number].experiment.key, rows.take(indices))
            if keys is None:
                return None
            for place, key in zip(indices.tolist(), keys, strict=True):
                contents[place] = key
        return contents

    def everything(
        self,
        shared: SharedRows,
        chosen: Ints,
        run: PromptRun,
        batch: Ints,
        reads: Sequence[SiteRead],
    ) -> Mapping[SiteRead, Tensor]:
        """Read sites on all tokens of the chosen distinct rows, in a separate full pass.

        Returns:
            [place, units, width] per site, in the order of `reads`.
        """
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = self._pass_rows(shared, chosen, run, batch, draws)
        lanes = self.runs.lanes(run, batch)
        lane = lanes.lane(rows.prompts, rows.draw)
        lengths = lanes.lengths[lane]
        number, position = np.repeat(np.arange(len(rows)), lengths), count_columns(lengths)[1]
        none = np.zeros(0, dtype=np.int64)
        places = dict.fromkeys(reads, (number, position))
        tensors = self._run_whole(rows, lanes, lane, (none, none), places, None)[1]
        return {read: tensors[read] for read in reads}

    def _look(self, member: PassMember) -> RowObserver | None:
        """Build the reader of the member's `observe` line, unless it reads reply tokens."""
        rule = self.plans[member.number].observes
        if rule is not None and reads_reply_tokens(rule.rule):
            return None
        systems = self.systems[member.number]
        shape = self.model.shape
        return rule and build_observer(rule, member.rows, member.at, shape, systems=systems)

    def _pass_rows(
        self, shared: SharedRows, chosen: Ints, run: PromptRun, batch: Ints, draws: int
    ) -> PassRows:
        pass_rows = _start_pass(shared, chosen, run, batch, draws)
        every = np.repeat(chosen, draws)
        owner = shared.owner[every]
        for number in np.unique(owner):
            indices = np.flatnonzero(owner == number)
            rows, draw = shared.rows.take(every[indices]), pass_rows.draw[indices]
            pass_rows = pass_rows.joined(
                self._rows_of(int(number), rows, draw, run, batch), indices
            )
        return pass_rows

    def _rows_of(
        self,
        number: int,
        rows: RowTable,
        draw: Ints,
        run: PromptRun,
        batch: Ints,
        text: Continuation | None = None,
    ) -> PassRows:
        """Build the rows of one experiment and their writes, for a pass with this continuation."""
        plan, shape = self.plans[number], self.model.shape
        path = plan.path
        pass_rows = PassRows(run, batch, rows.prompt, draw, whole=plan.whole)
        if self.runs.writer is not None:
            pass_rows = replace(pass_rows, later=self._later(number, rows, draw, run, batch))
        if path is None or path.paths is None:
            return replace(pass_rows, acting=self._acting(number, rows, draw, run, batch, text))
        if path.paths.at_the_end:
            return self._held(pass_rows, number, path, rows, text)

        def read(
            rows: PassRows, reads: Mapping[SiteRead, RowPositions]
        ) -> Mapping[SiteRead, Tensor]:
            none = np.zeros(0, dtype=np.int64)
            lanes = self.runs.lanes(run, batch, self._atom(number, text))
            return self._run(rows, lanes, (none, none), reads, None)[1]

        def patched(
            senders: RowTable, draws: Ints, reads: Mapping[SiteRead, RowPositions]
        ) -> Mapping[SiteRead, Tensor]:
            rows = replace(pass_rows, prompts=senders.prompt, draw=draws)
            return read(self._held(rows, number, path, senders, text), reads)

        def without(
            senders: RowTable, draws: Ints, reads: Mapping[SiteRead, RowPositions]
        ) -> Mapping[SiteRead, Tensor]:
            acting = self._acting(number, senders, draws, run, batch, text, senders=False)
            return read(
                replace(pass_rows, prompts=senders.prompt, draw=draws, acting=acting), reads
            )

        ends = None if path.rule.in_vision else find_pass_ends(plan, rows, text)
        got, added = _compute_receiver_writes(
            path,
            rows.cell,
            _list_sender_rows(plan, path, rows, draw),
            _list_receiver_vectors(path, rows, ends),
            _PathPasses(patched, without),
            shape,
            self.means_and_donors[number].directions,
        )
        others = self._acting(number, rows, draw, run, batch, text, senders=False)
        return replace(pass_rows, acting=RuleWrites(got).then(others).then(RuleWrites(added)))

    def _held(
        self,
        own: PassRows,
        number: int,
        path: RulePlan,
        rows: RowTable,
        text: Continuation | None,
    ) -> PassRows:
        """Build path rows, in which the senders are patched and everything else is held."""
        given = (number, rows, own.draw, own.run, own.batch, text)
        others = RuleWrites() if not own.whole else self._acting(*given, senders=False)
        held = hold_rows(path, len(rows), rows.cell)
        return replace(own, acting=self._acting(*given), held=held, others=others)

    def _acting(
        self,
        number: int,
        rows: RowTable,
        draw: Ints,
        run: PromptRun,
        batch: Ints,
        text: Continuation | None,
        *,
        senders: bool = True,
    ) -> RuleWrites:
        """Build the writes of one experiment's rules, after those of the run that rows start from.

        Args:
            number: Number of the experiment.
            rows: Its rows.
            draw: [row] noise draw.
            run: The run that the rows start from.
            text: Continuation of the prompts.
            senders: Whether to include senders of paths.
        """
        plan, shape = self.prefilled[number], self.model.shape
        given = (self.lanes_of(number, batch, text), self.means_and_donors[number], shape)
        rule_writes = build_rule_writes(plan, rows, draw, *given, text, senders=senders)
        if run.derived is None:
            return rule_writes
        return self.runs.rules(run, rows.prompt, draw, batch).then(rule_writes)

    def _later(
        self, number: int, rows: RowTable, draw: Ints, run: PromptRun, batch: Ints
    ) -> GenerationRules:
        """Build the rules of one experiment that act during generation."""
        lanes_of, shape = self.lanes_of(number, batch, None), self.model.shape
        given = (lanes_of, self.means_and_donors[number], shape)
        return build_generation_rules(self.plans[number], rows, draw, *given)

    def lanes_of(self, number: int, batch: Ints, text: Continuation | None) -> RuleReader:
        """Return a reader of the lanes that the rules of one experiment read."""
        means_and_donors = self.means_and_donors[number]

        def lanes_of(rule: RulePlan) -> UnpatchedBatch:
            donors, external = means_and_donors.donors.get(rule.number), rule.rule.external
            prompts = batch if donors is None else np.unique(donors[batch])
            if external is not None:
                places = {(point.site, point.layer) for point in rule.source_table}
                return self.runs.external_lanes(external, prompts, places)
            named, atom = self.runs.named(rule.rule.run), self._atom(number, text)
            return self.runs.lanes(named, prompts, atom, alone=donors is not None)

        return lanes_of

    def _atom(self, number: int, text: Continuation | None) -> MetricTerm | None:
        """Return the metric whose text follows the prompts that rules read.

        None if no rule of the experiment acts on that text: prompt tokens don't depend on it.
        """
        return text.atom if text is not None and self.plans[number].in_answers else None

    def _forward(
        self,
        rows: PassRows,
        readouts: Sequence[Readout],
        wanted: Sequence[PassReads],
    ) -> tuple[list[Tensor], list[dict[int, Tensor]], list[ObservedValues | None], Tensor | None]:
        """Run the pass.

        Returns:
            Per member: logits at its positions, activations by atom, and observed values; then the
            tokens that the logits are restricted to.
        """
        final = (
            np.concatenate([want.final[0] for want in wanted]),
            np.concatenate([want.final[1] for want in wanted]),
        )
        inside, parts, looks = _join_reads(wanted)
        ends = np.cumsum([len(want.final[0]) for want in wanted])[:-1].tolist()
        if not len(final[0]) and not inside:  # texts of several tokens have separate passes
            none = torch.zeros(0)
            return [none] * len(wanted), [{} for _ in wanted], [None] * len(wanted), None
        tokens = self.runs.tokens(readouts, rows.batch)
        if rows.all_logits:
            tokens = None
        reads = join_requests(inside)
        lanes = self.runs.lanes(rows.run, rows.batch)
        logits, tensors = self._run(rows, lanes, final, reads, tokens)
        split = {
            read: values.tensor_split(np.cumsum([len(p[0]) for p in inside[read]])[:-1].tolist())
            for read, values in tensors.items()
        }
        activations = [
            {
                atom: flatten_units(split[r][i], readout.atoms[atom][1])
                for atom, (r, i) in part.items()
            }
            for readout, part in zip(readouts, parts, strict=True)
        ]
        observed = [
            want.look
            and want.look.observed(
                {r: split[r][i] for r, i in own.items()},
                self.runs.unembedding,
                self.runs.observed_tokens(readout, rows.batch),
            )
            for want, own, readout in zip(wanted, looks, readouts, strict=True)
        ]
        return list(logits.tensor_split(ends)), activations, observed, tokens

    def _run(
        self,
        rows: PassRows,
        lanes: UnpatchedBatch,
        final: RowPositions,
        reads: Mapping[SiteRead, RowPositions],
        tokens: Tensor | None,
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        """Run on stored activations if possible, else in a full pass.

        Returns:
            [place, vocab] logits, and [place, units, width] per site.
        """
        lane = lanes.lane(rows.prompts, rows.draw)
        if lanes.kept is not None and not rows.whole:
            lengths = lanes.batch.lengths.numpy()[lane]
            result = run_packed(
                self.model,
                lanes.kept,
                lane,
                writes=rows.acting.writes,
                final=final,
                reads=reads,
                tokens=tokens,
                shortcuts=self.plan.shortcuts,
                fuse=self.plan.fuses_kernels,
                edges=rows.acting.edges,
                circuits=self._settled_circuits(rows, lengths, alone=not reads),
                held=rows.held,
            )
            return select_row_logits(self.model, result.logits, final[0]), result.reads
        return self._run_whole(rows, lanes, lane, final, reads, tokens)

    def _run_whole(
        self,
        rows: PassRows,
        lanes: UnpatchedBatch,
        lane: Ints,
        final: RowPositions,
        reads: Mapping[SiteRead, RowPositions],
        tokens: Tensor | None,
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        added: list[SiteWrite] = []
        if rows.run.noise is not None:
            keys, seed = self.runs.table.row_keys, self.runs.seed
            added = build_noise_writes(self.model, rows.run.noise, rows.prompts, keys, seed)
        own = lanes.batch.take(torch.from_numpy(lane))
        batch = apply_position_ids(self.model, own, rows.acting)
        lengths = batch.lengths.numpy()
        slots, at = arrange_by_row(final, len(rows), lengths)
        every = rows.all_logits or has_single_output(self.model)
        logits_at = None if every else torch.from_numpy(at)
        with ExitStack() as stack:
            stack.enter_context(replace_blocks(self.model, rows.acting.blocks))
            if rows.held is not None:
                held = hold_sublayers(
                    *(self.model, self.runs.norms, batch),
                    *(rows.held, rows.acting, added, rows.others),
                )
                added = [*added, *stack.enter_context(held)]
            alone = not (added or reads or rows.held is not None)
            if rows.acting.circuits and self.plan.fuses_kernels:
                stack.enter_context(fuse_activations(self.model.module))
            if (copies := self._find_copies(rows, batch, lane, added)) is not None:
                stack.enter_context(copies.shared(self.model))
            result = run_full(
                self.model,
                batch,
                writes=[*added, *rows.acting.writes],
                reads=list(reads),
                logits_at=logits_at,
                tokens=tokens,
                edges=rows.acting.edges,
                circuits=self._settled_circuits(rows, lengths, alone=alone),
            )
        assert result.logits is not None
        row, columns = torch.from_numpy(final[0]), torch.from_numpy(slots)
        if rows.all_logits:
            columns = batch.columns(row, torch.from_numpy(final[1]))
        row, columns = indices_to_device((row, columns), result.logits.device)
        tensors: dict[SiteRead, Tensor] = {}
        for read, (read_rows, positions) in reads.items():
            at = torch.from_numpy(read_rows)
            index = at, batch.of_read(read).columns(at, torch.from_numpy(positions))
            tensors[read] = result.reads[read][indices_to_device(index, self.model.device)]
        if has_single_output(self.model):
            return result.logits[row], tensors
        return result.logits[row, columns], tensors

    def _find_copies(
        self, rows: PassRows, batch: Batch, lane: Ints, added: Sequence[SiteWrite]
    ) -> RowCopies | None:
        """Return the equal tokens of rows of a prompt, if blocks of the model attend to an image;
        rows of other models share them with an unpatched run."""
        attends = self.model.shape.attends_to_image and self.plan.shares_rows
        if not attends or rows.acting.circuits or rows.held is not None:
            return None
        writes = [*added, *rows.acting.writes]
        others = rows.acting.edges, rows.acting.numbers
        return find_row_copies(self.model, batch, lane, writes, *others)

    def _settled_circuits(
        self, rows: PassRows, lengths: Ints, *, alone: bool
    ) -> Sequence[CircuitWrite]:
        """Return the circuits of a pass without the nodes that needn't be computed.

        Args:
            lengths: [row] tokens.
            alone: Whether nothing is written but what rules write, and only logits are read.
        """
        circuits = rows.acting.circuits
        if self.plan.skips_inert and alone and self._settles(rows):
            return [self._settler.settle(circuit, lengths) for circuit in circuits]
        return circuits

    def _settles(self, rows: PassRows) -> bool:
        """Return whether only circuits act, whose ablated edges carry values of unpatched runs on
        prompts of equal length, and which need no step inside an MLP."""
        acting = rows.acting
        if acting.writes or acting.edges or acting.numbers or acting.blocks:
            return False
        for circuit in acting.circuits:
            if not circuit.source or circuit.others or circuit.features or circuit.stack:
                return False
            run = self.runs.named(circuit.source)
            if run.derived is not None or run.model is not None or run.noise is not None:
                return False
            prompts = rows.prompts[np.unique(circuit.rows.numpy())]
            if not np.array_equal(run.lengths[prompts], rows.run.lengths[prompts]):
                return False
        return True

    def _read_continuations(
        self, rows: PassRows, many: PassMember, readout: Readout
    ) -> dict[int, Tensor]:
        """Return the logits of each continuation that the metric reads, by its number."""
        return {n: self._continued(rows, many, readout, n) for n in readout.continuations}

    def _continued(
        self, rows: PassRows, member: PassMember, readout: Readout, number: int
    ) -> Tensor:
        """Return [row, token, vocab]: logits of the same rows with a text of several tokens."""
        atom = readout.atoms[number][1]
        lanes = self.runs.lanes(rows.run, rows.batch, atom)
        draw = rows.draw[member.at]
        prompts = member.rows.prompt
        count = np.arange(len(prompts))
        text = Continuation(number, atom)
        pass_rows = self._rows_of(member.number, member.rows, draw, rows.run, rows.batch, text)
        lengths = lanes.lengths[lanes.lane(prompts, draw)]
        at = find_continuation_positions(atom, prompts, lengths).numpy()
        final = (np.repeat(count, at.shape[1]), at.reshape(-1))
        logits, _ = self._run(pass_rows, lanes, final, {}, None)
        return logits.unflatten(0, at.shape)


def _start_pass(
    shared: SharedRows, chosen: Ints, run: PromptRun, batch: Ints, draws: int
) -> PassRows:
    """Create the distinct rows of a pass, before their writes are known."""
    prompts = np.repeat(shared.rows.prompt[chosen], draws)
    return PassRows(run, batch, prompts, np.tile(np.arange(draws), len(chosen)))


def locate_in_run(runs: UnpatchedRuns, readout: Readout, unusable: UnusableRow) -> UnusableRow:
    """Locate an unusable value in an unpatched run, or in a run that a metric compares it with.

    Runs one more pass over the row.
    """
    prompt = unusable.row
    named = [unusable.run, *(a.run for _, a in readout.atoms if a.run is not None)]
    for name in dict.fromkeys(named):
        run = runs.named(name)
        model = runs.model_of(run)
        for text in (None, *(readout.atoms[n][1] for n in readout.continuations)):
            place = _describe_first(runs.everything(run, prompt, list_stream_reads(model), text))
            if place:
                return UnusableRow(prompt, name, place=place)
    return UnusableRow(prompt, unusable.run, place=_describe_later_site(runs))


def locate_in_cell(
    patcher: Patcher,
    shared: SharedRows,
    row: int,
    run: PromptRun,
    batch: Ints,
    unusable: UnusableRow,
) -> UnusableRow:
    """Locate an unusable value in a patched run, by one more pass over row `row` of `shared`."""
    chosen = np.array([row], dtype=np.int64)
    reads = patcher.everything(shared, chosen, run, batch, list_stream_reads(patcher.model))
    place = _describe_first(reads) or _describe_later_site(patcher.runs)
    return UnusableRow(unusable.row, unusable.run, unusable.cell, place)


def _describe_later_site(runs: UnpatchedRuns) -> str:
    """Describe the location of an unusable value that no site of the prompt shows."""
    return "after the last block" if runs.writer is None else "during generation"


def list_stream_reads(model: LoadedModel) -> list[SiteRead]:
    """List the sites of a model's residual stream and its summands, in forward order."""
    whole = [s for _, s in SITES.items() if s.width == "d_model" and s.unit is None]
    inside = sorted((s for s in whole if s.has_layer), key=lambda site: site.order)
    layers = {site.name: model.anatomy.layers(site.name) for site in inside}
    outside = [SiteRead(name) for name in ("embed", "final_norm") if name in model.anatomy.taps]
    blocks = [
        SiteRead(site.name, layer)
        for layer in range(model.shape.n_layers)
        for site in inside
        if layer in layers[site.name]
    ]
    first = [read for read in outside if read.site == "embed"]
    return [*first, *blocks, *(read for read in outside if read not in first)]


def _describe_first(reads: Mapping[SiteRead, Tensor]) -> str:
    """Describe the first site, in the order of `reads`, with a NaN or infinity; empty if none."""
    for read, vectors in reads.items():
        if not bool(vectors.isfinite().all()):
            of = "" if read.layer is None else f" of layer {read.layer}"
            return f"in `{read.site}`{of}"
    return ""


def _join_reads(
    wanted: Sequence[PassReads],
) -> tuple[
    dict[SiteRead, list[RowPositions]],
    list[dict[int, tuple[SiteRead, int]]],
    list[dict[SiteRead, int]],
]:
    """Collect the positions that the members of a pass read at each site.

    Returns:
        By site, the positions of all members; then per member, where its positions are in that
        list: by atom of its metric, and by site that it observes.
    """
    inside: dict[SiteRead, list[RowPositions]] = {}
    parts: list[dict[int, tuple[SiteRead, int]]] = []
    looks: list[dict[SiteRead, int]] = []
    for want in wanted:
        parts.append({})
        looks.append({})
        for atom, (place, where) in want.inside.items():
            numbers = inside.setdefault(place, [])
            parts[-1][atom] = place, len(numbers)
            numbers.append(where)
        for place, where in (want.look.places if want.look is not None else {}).items():
            numbers = inside.setdefault(place, [])
            looks[-1][place] = len(numbers)
            numbers.append(where)
    return inside, parts, looks
