"""Patched rows: one pass over rows of any cells and experiments, read by their readouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.behind_prompts import read_behind
from mechdsl.execute.found import Found
from mechdsl.execute.means_and_donors import MeansAndDonors
from mechdsl.execute.observed import Look, Observed, look
from mechdsl.execute.pass_rows import PassRows
from mechdsl.execute.path_patching import held_rows, holding, received
from mechdsl.execute.read_samples import read_samples
from mechdsl.execute.readout import Reading, Readout
from mechdsl.execute.reply_readers import HaveWritten, readers_of, with_replies
from mechdsl.execute.step_rules import prefill_of, while_writing
from mechdsl.execute.unpatched_batch import (
    TextBehind,
    UnpatchedBatch,
    continuation_positions,
    has_loss,
    noise_writes,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns, vectors
from mechdsl.execute.wanted_places import Member, Wanted, by_row, on_draws, wanted_of
from mechdsl.execute.while_writing import WhileWriting
from mechdsl.execute.writer import WritingRows
from mechdsl.execute.writes import LanesOf, acting, pass_ends
from mechdsl.hooks.batch import together_on_device
from mechdsl.hooks.block_exchange import blocks_replaced
from mechdsl.hooks.calls import of_places, one_output
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.packed.behind_last_block import Places
from mechdsl.packed.packed_pass import run_packed
from mechdsl.plan.columns import counted
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Plan
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.share import SharedRows
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.replies import in_reply
from mechdsl.resolve.resolved import Atom


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
        self.prefilled = [prefill_of(each) for each in plans]
        """With the rules that act on the prompts alone."""
        self.readouts = readouts
        self.means_and_donors = means_and_donors
        self.runs = runs
        self.model = runs.model

    def values(
        self,
        shared: SharedRows,
        chosen: Ints,
        members: Sequence[Member],
        run: Run,
        batch: Ints,
        replies: Sequence[tuple[Reply, ...]] = (),
    ) -> Iterator[tuple[Member, Found]]:
        """One pass over the chosen distinct rows, which all start from `run`.

        batch: the prompts in work. replies: of each row, those of `written`; none where nothing is
        written. Gives what is read of the rows of each member.
        """
        draws = self.plans[int(shared.owner[chosen[0]])].draws
        rows = _without_rules(shared, chosen, run, batch, draws)
        readouts = [self.readouts[member.number] for member in members]
        repeated = [on_draws(member, draws) for member in members]
        lanes = self.runs.lanes(run, batch)
        lengths = lanes.lengths[lanes.lane(rows.prompts, rows.draw)]
        wanted = [
            wanted_of(readout, member, run, lengths, self._look(member))
            for readout, member in zip(readouts, repeated, strict=True)
        ]
        readers = readers_of(repeated, self.plans, self.readouts, self.skip)
        if readers or any(want.needs_pass for want in wanted):
            rows = self._pass_rows(shared, chosen, run, batch, draws)
        logits, reads, observed, tokens = self._forward(rows, lanes, readouts, wanted)
        have = HaveWritten(rows.run, rows.prompts, (), rows.acting, rows.later)
        behind = read_behind(self.runs, have, replies, readers)
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
                loss=want.loss(own, readout, many, rows.draw, lanes, run),
                activations=read,
                references=self.runs.references(
                    readout, batch, many.rows.prompt, rows.draw[many.at]
                ),
                observed=seen,
                tokens=tokens,
                has_loss=None if readout.loss is None else has_loss(run, many.rows.prompt),
            )
            written = [replies[row] for row in many.at] if replies else ()
            found = read_samples(readout, reading, written, skip=self.skip[member.number])
            found = replace(found, listed=None if seen is None else seen.listed)
            if member.number in behind:
                found = with_replies(found, behind[member.number])
            yield member, found.over_draws(draws)

    def written(
        self, shared: SharedRows, chosen: Ints, run: Run, batch: Ints
    ) -> list[tuple[Reply, ...]]:
        """Per chosen distinct row and draw of noise, what it writes: a text for each sample."""
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
            WritingRows(
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
        """Per distinct row, what its reply hangs on; None where that can't be said of all."""
        kept = None if self.runs.writer is None else self.runs.writer.kept
        if kept is None:
            return None
        found = [b""] * len(chosen)
        owner, rows = shared.owner[chosen], shared.rows.take(chosen)
        for number in np.unique(owner).tolist():
            own = np.flatnonzero(owner == number)
            keys = kept.of_rows(self.plans[number].experiment.key, rows.take(own))
            if keys is None:
                return None
            for place, key in zip(own.tolist(), keys, strict=True):
                found[place] = key
        return found

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
        if rule is not None and in_reply(rule.rule):
            return None
        return rule and look(rule, member.rows, member.at, self.model.shape)

    def _pass_rows(
        self, shared: SharedRows, chosen: Ints, run: Run, batch: Ints, draws: int
    ) -> PassRows:
        found = _without_rules(shared, chosen, run, batch, draws)
        every = np.repeat(chosen, draws)
        owner = shared.owner[every]
        for number in np.unique(owner):
            own = np.flatnonzero(owner == number)
            rows, draw = shared.rows.take(every[own]), found.draw[own]
            found = found.joined(self._rows_of(int(number), rows, draw, run, batch), own)
        return found

    def _rows_of(
        self,
        number: int,
        rows: Rows,
        draw: Ints,
        run: Run,
        batch: Ints,
        text: TextBehind | None = None,
    ) -> PassRows:
        """The rows of one experiment with what they write, in a pass with this text behind them."""
        plan, shape = self.plans[number], self.model.shape
        path = plan.path
        own = PassRows(run, batch, rows.prompt, draw, whole=plan.whole)
        if self.runs.writer is not None:
            own = replace(own, later=self._later(number, rows, draw, run, batch))
        if path is None or path.paths is None:
            return replace(own, acting=self._acting(number, rows, draw, run, batch, text))
        if path.paths.at_the_end:
            return self._held(own, number, path, rows, text)

        def read(rows: PassRows, reads: Mapping[SiteRead, Places]) -> Mapping[SiteRead, Tensor]:
            none = np.zeros(0, dtype=np.int64)
            lanes = self.runs.lanes(run, batch, self._atom(number, text))
            return self._run(rows, lanes, (none, none), reads, None)[1]

        def sent(
            senders: Rows, draws: Ints, reads: Mapping[SiteRead, Places]
        ) -> Mapping[SiteRead, Tensor]:
            rows = replace(own, prompts=senders.prompt, draw=draws)
            return read(self._held(rows, number, path, senders, text), reads)

        def without(
            senders: Rows, draws: Ints, reads: Mapping[SiteRead, Places]
        ) -> Mapping[SiteRead, Tensor]:
            acting = self._acting(number, senders, draws, run, batch, text, senders=False)
            return read(replace(own, prompts=senders.prompt, draw=draws, acting=acting), reads)

        ends = pass_ends(plan, rows, text)
        got, added = received(plan, path, rows, draw, sent, without, shape, ends)
        beside = self._acting(number, rows, draw, run, batch, text, senders=False)
        return replace(own, acting=RuleWrites(got).then(beside).then(RuleWrites(added)))

    def _held(
        self,
        own: PassRows,
        number: int,
        path: RulePlan,
        rows: Rows,
        text: TextBehind | None,
    ) -> PassRows:
        """Rows of a path, in which its senders are patched and all else is held."""
        given = (number, rows, own.draw, own.run, own.batch, text)
        beside = RuleWrites() if not own.whole else self._acting(*given, senders=False)
        held = held_rows(path, len(rows))
        return replace(own, acting=self._acting(*given), held=held, beside=beside)

    def _acting(
        self,
        number: int,
        rows: Rows,
        draw: Ints,
        run: Run,
        batch: Ints,
        text: TextBehind | None,
        *,
        senders: bool = True,
    ) -> RuleWrites:
        """What the rules of one experiment do to rows of it, behind those of the run that they
        start from; senders: of paths too."""
        plan, shape = self.prefilled[number], self.model.shape
        given = (self.lanes_of(number, batch, text), self.means_and_donors[number], shape)
        own = acting(plan, rows, draw, *given, text, senders=senders)
        if run.derived is None:
            return own
        return self.runs.rules(run, rows.prompt, draw, batch).then(own)

    def _later(self, number: int, rows: Rows, draw: Ints, run: Run, batch: Ints) -> WhileWriting:
        """What the rules of one experiment do to rows of it while these write."""
        lanes_of, shape = self.lanes_of(number, batch, None), self.model.shape
        given = (lanes_of, self.means_and_donors[number], shape)
        return while_writing(self.plans[number], rows, draw, *given)

    def lanes_of(self, number: int, batch: Ints, text: TextBehind | None) -> LanesOf:
        """What the rules of one experiment read."""
        means_and_donors = self.means_and_donors[number]

        def lanes_of(rule: RulePlan) -> UnpatchedBatch:
            donors, apart = means_and_donors.donors.get(rule.number), rule.rule.apart
            prompts = batch if donors is None else np.unique(donors[batch])
            if apart is not None:
                places = {(point.site, point.layer) for point in rule.source_table}
                return self.runs.apart(apart.table, apart.table.runs[apart.run], prompts, places)
            named, atom = self.runs.named(rule.rule.run), self._atom(number, text)
            return self.runs.lanes(named, prompts, atom, alone=donors is not None)

        return lanes_of

    def _atom(self, number: int, text: TextBehind | None) -> Atom | None:
        """The metric whose text stands behind what an experiment reads: what rules write into the
        prompts is there without it."""
        return text.atom if text is not None and self.plans[number].behind else None

    def _forward(
        self,
        rows: PassRows,
        lanes: UnpatchedBatch,
        readouts: Sequence[Readout],
        wanted: Sequence[Wanted],
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
        if rows.all_logits:
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
        rows: PassRows,
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
                writes=rows.acting.writes,
                final=final,
                reads=reads,
                tokens=tokens,
                shortcuts=self.plan.shortcuts,
                fuse=self.plan.fuses_kernels,
                edges=rows.acting.edges,
                held=rows.held,
            )
            return of_places(self.model, result.logits, final[0]), result.reads
        return self._run_whole(rows, lanes, lane, final, reads, tokens)

    def _run_whole(
        self,
        rows: PassRows,
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
        batch = rows.acting.numbered(lanes.batch.take(torch.from_numpy(lane)))
        slots, at = by_row(final, len(rows), batch.lengths.numpy())
        every = rows.all_logits or one_output(self.model)
        logits_at = None if every else torch.from_numpy(at)
        with ExitStack() as stack:
            stack.enter_context(blocks_replaced(self.model, rows.acting.blocks))
            if rows.held is not None:
                held = holding(
                    *(self.model, self.runs.norms, batch),
                    *(rows.held, rows.acting, added, rows.beside),
                )
                added = [*added, *stack.enter_context(held)]
            result = run_whole(
                self.model,
                batch,
                writes=[*added, *rows.acting.writes],
                reads=list(reads),
                logits_at=logits_at,
                tokens=tokens,
                edges=rows.acting.edges,
            )
        assert result.logits is not None
        row, columns = torch.from_numpy(final[0]), torch.from_numpy(slots)
        if rows.all_logits:
            columns = batch.columns(row, torch.from_numpy(final[1]))
        row, columns = together_on_device((row, columns), result.logits.device)
        found: dict[SiteRead, Tensor] = {}
        for read, (read_rows, positions) in reads.items():
            at = torch.from_numpy(read_rows)
            index = at, batch.columns(at, torch.from_numpy(positions))
            found[read] = result.reads[read][together_on_device(index, self.model.device)]
        if one_output(self.model):
            return result.logits[row], found
        return result.logits[row, columns], found

    def _continued(self, rows: PassRows, member: Member, readout: Readout, number: int) -> Tensor:
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


def _without_rules(shared: SharedRows, chosen: Ints, run: Run, batch: Ints, draws: int) -> PassRows:
    """Distinct rows of a pass, before it is known what acts in them."""
    prompts = np.repeat(shared.rows.prompt[chosen], draws)
    return PassRows(run, batch, prompts, np.tile(np.arange(draws), len(chosen)))
