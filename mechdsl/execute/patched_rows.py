"""Patched rows: one pass over rows of any cells and experiments, read by their readouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.means_and_donors import MeansAndDonors
from mechdsl.execute.observed import Look, Observed, look
from mechdsl.execute.path_patching import frozen, held_rows, received
from mechdsl.execute.readout import Found, Reading, Readout
from mechdsl.execute.unpatched_batch import (
    RuleWrites,
    TextBehind,
    UnpatchedBatch,
    continuation_positions,
    has_loss,
    noise_writes,
    prompt_loss,
    spot_positions,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns, vectors
from mechdsl.execute.writes import (
    Numbers,
    build_edges,
    build_numbers,
    build_writes,
    pass_ends,
)
from mechdsl.hooks.block_exchange import BlockPairs, blocks_replaced
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.packed.behind_last_block import Places
from mechdsl.packed.packed_pass import run_packed
from mechdsl.plan.columns import counted
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Plan
from mechdsl.plan.restart import Held
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.share import SharedRows
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.resolved import Atom


@dataclass(frozen=True, eq=False)
class Member:
    """Rows of one experiment that a pass serves."""

    number: int
    """Of the experiment in its panel."""
    rows: Rows
    at: Ints
    """[row] the row of the pass."""


@dataclass(frozen=True, eq=False)
class _PassRows:
    """What runs in one pass; each distinct row once per draw of noise, draws side by side."""

    run: Run
    batch: Ints
    prompts: Ints
    draw: Ints
    writes: Sequence[SiteWrite]
    edges: Sequence[EdgeWrite] = ()
    held: Held | None = None
    whole: bool = False
    """Nothing of an unpatched run stands in them."""
    numbers: Sequence[Numbers] = ()
    """Tokens with other position ids."""
    blocks: BlockPairs = ()
    """Which blocks compute in the places of others."""

    def __len__(self) -> int:
        return len(self.prompts)

    def beside(self, part: _PassRows, at: Ints) -> _PassRows:
        """With what a part's rows write, which are the rows `at`."""
        where = torch.from_numpy(at)
        held = self.held
        if part.held is not None:
            none = np.zeros(len(self), dtype=np.bool_)
            held = Held(none, none) if held is None else held
            held = Held(held.rows.copy(), held.mlps.copy())
            held.rows[at], held.mlps[at] = part.held.rows, part.held.mlps
        return replace(
            self,
            writes=[*self.writes, *(write.moved(where) for write in part.writes)],
            edges=[*self.edges, *(edge.moved(where) for edge in part.edges)],
            held=held,
            whole=self.whole or part.whole,
            numbers=[*self.numbers, *(numbers.moved(where) for numbers in part.numbers)],
            blocks=self.blocks or part.blocks,
        )


class Patcher:
    """Runs patched rows of a panel's experiments."""

    def __init__(
        self,
        plan: Plan,
        plans: Sequence[ExperimentPlan],
        readouts: Sequence[Readout],
        means_and_donors: Sequence[MeansAndDonors],
        runs: UnpatchedRuns,
        skip: Sequence[Collection[int]],
    ) -> None:
        """skip: per plan, the numbers of the measures that aren't read."""
        self.plan = plan
        self.skip = skip
        self.plans = plans
        self.readouts = readouts
        self.means_and_donors = means_and_donors
        self.runs = runs
        self.model = runs.model

    def values(
        self, shared: SharedRows, chosen: Ints, members: Sequence[Member], run: Run, batch: Ints
    ) -> Iterator[tuple[Member, Found]]:
        """One pass over the chosen distinct rows, which all start from `run`.

        batch: the prompts in work. Gives what is read of the rows of each member.
        """
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = self._pass_rows(shared, chosen, run, batch, draws)
        readouts = [self.readouts[member.number] for member in members]
        repeated = [_repeated(member, draws) for member in members]
        lanes = self.runs.lanes(run, batch)
        lengths = lanes.lengths[lanes.lane(rows.prompts, rows.draw)]
        wanted = [
            _wanted(readout, member, run, lengths, self._look(member))
            for readout, member in zip(readouts, repeated, strict=True)
        ]
        logits, reads, observed, tokens = self._forward(rows, lanes, readouts, wanted)
        for member, many, readout, want, own, read, seen in zip(
            members, repeated, readouts, wanted, logits, reads, observed, strict=True
        ):
            reading = Reading(
                run=run.name,
                prompts=many.rows.prompt,
                items=[self.plans[member.number].items[cell] for cell in many.rows.cell],
                logits=want.spots(own),
                continued={
                    n: self._continued(rows, many, readout, n) for n in readout.continuations
                },
                loss=want.loss(own, readout, many, rows, lanes, run),
                activations=read,
                references=self.runs.references(
                    readout, batch, many.rows.prompt, rows.draw[many.at]
                ),
                observed=seen,
                tokens=tokens,
                has_loss=None if readout.loss is None else has_loss(run, many.rows.prompt),
            )
            found = readout.read(reading, skip=self.skip[member.number])
            found = replace(found, listed=None if seen is None else seen.listed)
            yield member, found.over_draws(draws)

    def everything(
        self, shared: SharedRows, chosen: Ints, run: Run, batch: Ints, reads: Sequence[SiteRead]
    ) -> Mapping[SiteRead, Tensor]:
        """[place, units, width] of these sites in this order, on all tokens of the chosen distinct
        rows, in a whole pass of their own."""
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = self._pass_rows(shared, chosen, run, batch, draws)
        lanes = self.runs.lanes(run, batch)
        lane = lanes.lane(rows.prompts, rows.draw)
        lengths = lanes.lengths[lane]
        number, position = np.repeat(np.arange(len(rows)), lengths), counted(lengths)[1]
        none = np.zeros(0, dtype=np.int64)
        places = dict.fromkeys(reads, (number, position))
        found = self._run_whole(rows, lanes, lane, (none, none), places, None)[1]
        return {read: found[read] for read in reads}

    def _look(self, member: Member) -> Look | None:
        """What an `observe` line of the member's experiment looks at."""
        rule = self.plans[member.number].observes
        return rule and look(rule, member.rows, member.at, self.model.shape)

    def _pass_rows(
        self, shared: SharedRows, chosen: Ints, run: Run, batch: Ints, draws: int
    ) -> _PassRows:
        index = np.repeat(np.arange(len(chosen)), draws)
        draw = np.tile(np.arange(draws), len(chosen))
        prompts = shared.rows.prompt[chosen][index]
        owner = shared.owner[chosen][index]
        found = _PassRows(run, batch, prompts, draw, [], [])
        for number in np.unique(owner):
            own = np.flatnonzero(owner == number)
            rows = shared.rows.take(chosen[index[own]])
            found = found.beside(self._rows_of(int(number), rows, draw[own], run, batch), own)
        return found

    def _rows_of(
        self,
        number: int,
        rows: Rows,
        draw: Ints,
        run: Run,
        batch: Ints,
        text: TextBehind | None = None,
    ) -> _PassRows:
        """The rows of one experiment with what they write, in a pass with this text behind them."""
        plan, shape = self.plans[number], self.model.shape
        path = next((rule for rule in plan.rules if rule.paths is not None), None)
        own = _PassRows(run, batch, rows.prompt, draw, [], whole=plan.whole)
        if path is not None and path.paths is not None and not path.paths.at_the_end:

            def sent(
                senders: Rows, draws: Ints, held: Held, reads: Mapping[SiteRead, Places]
            ) -> Mapping[SiteRead, Tensor]:
                writes = self._writes(number, senders, draws, batch, text)
                rows = _PassRows(
                    run, batch, senders.prompt, draws, writes, held=held, whole=plan.whole
                )
                none = np.zeros(0, dtype=np.int64)
                lanes = self.runs.lanes(run, batch, self._atom(number, text))
                return self._run(rows, lanes, (none, none), reads, None)[1]

            ends = pass_ends(plan, rows, text)
            return replace(own, writes=received(path, rows, draw, sent, shape, ends))
        writes = self._writes(number, rows, draw, batch, text)
        acting = RuleWrites(writes, build_edges(plan, rows, shape, text))
        if run.derived is not None:
            acting = self.runs.rules(run, rows.prompt, draw, batch).then(acting)
        return replace(
            own,
            writes=acting.writes,
            edges=acting.edges,
            numbers=build_numbers(plan, rows, text),
            blocks=plan.replaced_blocks(int(rows.cell[0])),
            held=None if path is None else held_rows(path, len(rows)),
        )

    def _atom(self, number: int, text: TextBehind | None) -> Atom | None:
        """The metric whose text stands behind what an experiment reads: what rules write into the
        prompts is there without it."""
        return text.atom if text is not None and self.plans[number].behind else None

    def _writes(
        self, number: int, rows: Rows, draw: Ints, batch: Ints, text: TextBehind | None
    ) -> list[SiteWrite]:
        """The vectors that the rows of one experiment write."""
        means_and_donors = self.means_and_donors[number]

        def lanes_of(rule: RulePlan) -> UnpatchedBatch:
            donors, apart = means_and_donors.donors.get(rule.number), rule.rule.apart
            prompts = batch if donors is None else np.unique(donors[batch])
            if apart is not None:
                places = {(point.site, point.layer) for point in rule.source_table}
                return self.runs.apart(apart.table, apart.table.runs[apart.run], prompts, places)
            run, atom = self.runs.named(rule.rule.run), self._atom(number, text)
            return self.runs.lanes(run, prompts, atom, alone=donors is not None)

        plan = self.plans[number]
        shape = self.model.shape
        return build_writes(plan, rows, draw, lanes_of, means_and_donors, shape, text)

    def _forward(
        self,
        rows: _PassRows,
        lanes: UnpatchedBatch,
        readouts: Sequence[Readout],
        wanted: Sequence[_Wanted],
    ) -> tuple[list[Tensor], list[dict[int, Tensor]], list[Observed | None], Tensor | None]:
        """Per member the logits at the places it wants, its activations, and what it observes; and
        which tokens."""
        final = (
            np.concatenate([want.final[0] for want in wanted]),
            np.concatenate([want.final[1] for want in wanted]),
        )
        inside: dict[SiteRead, list[Places]] = {}
        parts: list[dict[int, tuple[SiteRead, int]]] = []
        looks: list[dict[SiteRead, int]] = []
        for want in wanted:
            parts.append({})
            looks.append({})
            for atom, (place, where) in want.inside.items():
                own = inside.setdefault(place, [])
                parts[-1][atom] = place, len(own)
                own.append(where)
            for place, where in (want.look.places if want.look is not None else {}).items():
                own = inside.setdefault(place, [])
                looks[-1][place] = len(own)
                own.append(where)
        ends = np.cumsum([len(want.final[0]) for want in wanted])[:-1].tolist()
        if not len(final[0]) and not inside:  # texts of several tokens have passes of their own
            none = torch.zeros(0)
            return [none] * len(wanted), [{} for _ in wanted], [None] * len(wanted), None
        tokens = self.runs.tokens(readouts, rows.batch)
        if any(write.site == "logits" for write in rows.writes):
            tokens = None
        reads = {
            read: (np.concatenate([p[0] for p in own]), np.concatenate([p[1] for p in own]))
            for read, own in inside.items()
        }
        logits, found = self._run(rows, lanes, final, reads, tokens)
        split = {
            read: values.tensor_split(np.cumsum([len(p[0]) for p in inside[read]])[:-1].tolist())
            for read, values in found.items()
        }
        activations = [
            {atom: vectors(split[r][i], readout.atoms[atom][1]) for atom, (r, i) in own.items()}
            for readout, own in zip(readouts, parts, strict=True)
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
        rows: _PassRows,
        lanes: UnpatchedBatch,
        final: Places,
        reads: Mapping[SiteRead, Places],
        tokens: Tensor | None,
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        """([place, vocab], [place, units, width] per site), on what was kept or in whole passes."""
        lane = lanes.lane(rows.prompts, rows.draw)
        if lanes.kept is not None and not rows.whole:
            result = run_packed(
                self.model,
                lanes.kept,
                lane,
                writes=rows.writes,
                final=final,
                reads=reads,
                tokens=tokens,
                shortcuts=self.plan.shortcuts,
                fuse=self.plan.fuses_kernels,
                edges=rows.edges,
                held=rows.held,
            )
            return result.logits, result.reads
        return self._run_whole(rows, lanes, lane, final, reads, tokens)

    def _run_whole(
        self,
        rows: _PassRows,
        lanes: UnpatchedBatch,
        lane: Ints,
        final: Places,
        reads: Mapping[SiteRead, Places],
        tokens: Tensor | None,
    ) -> tuple[Tensor, Mapping[SiteRead, Tensor]]:
        added: list[SiteWrite] = []
        if rows.run.noise is not None:
            added = noise_writes(
                self.model,
                rows.run.noise,
                rows.prompts,
                self.runs.table.row_keys,
                self.runs.seed,
            )
        batch = lanes.batch.take(torch.from_numpy(lane))
        for numbers in rows.numbers:
            batch = batch.numbered(numbers.rows, numbers.positions, numbers.numbers)
        if rows.held is not None:
            added += frozen(self.model, batch, rows.held, rows.writes, added)
        all_logits = any(write.site == "logits" for write in rows.writes)
        slots, at = _by_row(final, len(rows), batch.lengths.cpu().numpy())
        with blocks_replaced(self.model, rows.blocks):
            result = run_whole(
                self.model,
                batch,
                writes=[*added, *rows.writes],
                reads=list(reads),
                logits_at=None if all_logits else torch.from_numpy(at).to(self.model.device),
                tokens=tokens,
                edges=rows.edges,
            )
        assert result.logits is not None
        row = torch.from_numpy(final[0]).to(result.logits.device)
        columns = torch.from_numpy(slots).to(row.device)
        if all_logits:
            columns = batch.columns(row, torch.from_numpy(final[1]).to(row.device))
        found: dict[SiteRead, Tensor] = {}
        for read, (read_rows, positions) in reads.items():
            index = torch.from_numpy(read_rows).to(row.device)
            where = batch.columns(index, torch.from_numpy(positions).to(row.device))
            found[read] = result.reads[read][index, where]
        return result.logits[row, columns], found

    def _continued(self, rows: _PassRows, member: Member, readout: Readout, number: int) -> Tensor:
        """[row, token, vocab]: a pass of the same rows with a text of several tokens behind."""
        atom = readout.atoms[number][1]
        lanes = self.runs.lanes(rows.run, rows.batch, atom)
        draw = rows.draw[member.at]
        prompts = member.rows.prompt
        count = np.arange(len(prompts))
        text = TextBehind(number, atom)
        own = self._rows_of(member.number, member.rows, draw, rows.run, rows.batch, text)
        lengths = lanes.lengths[lanes.lane(prompts, draw)]
        at = continuation_positions(atom, prompts, lengths).numpy()
        final = (np.repeat(count, at.shape[1]), at.reshape(-1))
        logits, _ = self._run(own, lanes, final, {}, None)
        return logits.unflatten(0, at.shape)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The places that one member reads."""

    final: Places
    """Behind the last block: rows of the pass and positions."""
    spots_per_row: int
    """The first places of `final`, row by row; all others are those of a loss."""
    inside: Mapping[int, tuple[SiteRead, Places]]
    """Atom → the site of a `cosine` and where it is read."""
    count: int
    """Rows of the member."""
    look: Look | None = None
    """What it observes."""

    def spots(self, logits: Tensor) -> Tensor | None:
        """[row, spot, vocab]"""
        if not self.spots_per_row:
            return None
        spots = logits[: self.count * self.spots_per_row]
        return spots.unflatten(0, (self.count, self.spots_per_row))

    def loss(
        self,
        logits: Tensor,
        readout: Readout,
        member: Member,
        rows: _PassRows,
        lanes: UnpatchedBatch,
        run: Run,
    ) -> Tensor | None:
        """[row] the loss over all positions."""
        if readout.loss is None:
            return None
        lane = lanes.lane(member.rows.prompt, rows.draw[member.at])
        batch = lanes.batch.take(torch.from_numpy(lane))
        every = logits[self.count * self.spots_per_row :]
        whole = every.new_zeros(*batch.ids.shape, every.shape[-1])
        whole[batch.mask.bool().to(every.device)] = every
        return prompt_loss(readout.loss, whole, batch, run, member.rows.prompt)


def _wanted(
    readout: Readout, member: Member, run: Run, lengths: Ints, look: Look | None
) -> _Wanted:
    """What a readout reads of a member's rows; lengths: [row of the pass]."""
    own = lengths[member.at]
    columns = [spot_positions(spot, run.name, member.rows.prompt, own) for spot in readout.spots]
    rows: list[Ints] = []
    positions: list[Ints] = []
    spots = len(columns) if readout.needs_plain else 0
    if spots:
        rows.append(np.repeat(member.at, spots))
        positions.append(np.stack(columns, axis=1).reshape(-1))
    if readout.loss is not None:
        rows.append(np.repeat(member.at, own))
        positions.append(np.concatenate([np.arange(n) for n in own]))
    empty = np.zeros(0, dtype=np.int64)
    inside = {
        number: (SiteRead(atom.point.site, atom.point.layer), (member.at, columns[spot]))
        for number, (spot, atom) in enumerate(readout.atoms)
        if atom.point is not None
    }
    final = (np.concatenate([empty, *rows]), np.concatenate([empty, *positions]))
    return _Wanted(final, spots, inside, len(member.at), look)


def _repeated(member: Member, draws: int) -> Member:
    """Every row once per draw."""
    index = np.repeat(np.arange(len(member.at)), draws)
    at = member.at[index] * draws + np.tile(np.arange(draws), len(member.at))
    return Member(member.number, member.rows.take(index), at)


def _by_row(places: Places, rows: int, lengths: Ints) -> tuple[Ints, Ints]:
    """([place] its slot, [row, slot] position): places listed by row, free slots read anywhere."""
    order = np.argsort(places[0], kind="stable")
    counts = np.bincount(places[0], minlength=rows)
    slots = np.empty(len(order), dtype=np.int64)
    slots[order] = counted(counts)[1]
    at = np.repeat(lengths[:, None] - 1, max(1, int(counts.max(initial=1))), axis=1)
    at[places[0], slots] = places[1]
    return slots, at
