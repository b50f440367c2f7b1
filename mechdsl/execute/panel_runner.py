"""Runs the cells of the experiments of one panel, prompt batch by prompt batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.diagnostics.e06_experiment import NoEstimate
from mechdsl.execute.estimates import Estimates, NotDifferentiated
from mechdsl.execute.found import Found
from mechdsl.execute.group_replies import GroupReplies, reply_bytes
from mechdsl.execute.no_value import function_failed
from mechdsl.execute.not_finite import cell_words, in_cell, not_finite
from mechdsl.execute.pass_size import stopwatch
from mechdsl.execute.patched_rows import Patcher
from mechdsl.execute.prepared_panel import PreparedPanel, owner
from mechdsl.execute.row_groups import extent, groups, members_of
from mechdsl.execute.try_sizes import WORTH_MEASURING, try_sizes
from mechdsl.execute.unusable import Unusable
from mechdsl.execute.wanted_places import Member
from mechdsl.hooks.memory import out_of_memory
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.share import SharedRows, Sharer
from mechdsl.plan.sweeps import longest_prompt
from mechdsl.prompts.prompt_table import Run


class PanelRunner(PreparedPanel):
    """Runs the experiments of one panel on shared unpatched runs."""

    # --- cells ------------------------------------------------------------------------------------

    def run(self) -> Iterator[int]:
        """Run all cells; yields how many rows, draws included, have been finished."""
        plans = self.running
        if not plans:
            self.runs.forget()
            return
        totals = [
            [
                (np.zeros(values.shape), np.zeros(values.shape))
                for values in self.measured[plan.experiment.key].patched
            ]
            for plan in plans
        ]
        patcher, sharer = self._patcher(), self._sharer()
        for batch in [*self.known_batches, *self.batches]:
            rows: list[Rows] = []
            for number, plan in enumerate(plans):
                measured = self.measured[plan.experiment.key]
                if owner(plan) in self.lost:
                    rows.append(Rows.none())
                    yield self._count(plan, batch)
                    continue
                if not plan.rules:
                    measured.copy_base()
                found = self.sorted_out(plan, batch)
                measured.dropped += found.dropped
                measured.rows += len(found.live) + len(found.known) + len(found.left_out)
                measured.inert += found.inert
                rows.append(found.live)
                if len(found.left_out):
                    values = measured.base_of(plan, found.left_out)
                    measured.wrote_as_base(found.left_out, plan.draws)
                    self._finish(number, found.left_out, values, totals[number])
                if len(found.known):
                    self._finish(number, found.known, found.values, totals[number])
                    together = self.together.get(plan.experiment.key)
                    stored = found.known.cell.tolist()
                    if together is not None:
                        stored = [cell for cell in stored if cell in together.stored]
                    self.profile.known += len(stored)
                yield (found.dropped + len(found.left_out) + len(found.known)) * plan.draws
            for number, plan in enumerate(plans):
                if plan.experiment.spec.estimator is not None:
                    estimated, rows[number] = rows[number], Rows.none()
                    for own, values in self._estimated(patcher, number, estimated, batch):
                        self._finish(number, own, values, totals[number])
                        yield len(own) * plan.draws
            self.profile.rows += sum(len(one) for one in rows)
            shared = sharer.of(rows)
            self.profile.distinct += len(shared)
            for member, values in self._patched(patcher, shared, batch, rows):
                self._finish(member.number, member.rows, values, totals[member.number])
                yield len(member.rows) * plans[member.number].draws
            self._finish_batch()
        for plan, sums_and_counts in zip(plans, totals, strict=True):
            if plan.rules:
                patched = self.measured[plan.experiment.key].patched
                for found, (sums, counts) in zip(patched, sums_and_counts, strict=True):
                    with np.errstate(invalid="ignore"):
                        found[:] = np.where(counts > 0, sums / counts, np.nan)
                self.measured[plan.experiment.key].empty_gaps()
        self.runs.forget()
        self._drop_unusable()

    def _drop_unusable(self) -> None:
        """Drop the rows that can't be used in some cell from all cells, and from those of what an
        experiment is set against."""
        rows: dict[str, set[int]] = {}
        for plan in self.running:
            own = self.measured[plan.experiment.key].unusable
            rows.setdefault(owner(plan), set()).update(own)
        for plan in self._sound:
            measured = self.measured[plan.experiment.key]
            out = rows[owner(plan)] & set(measured.kept.tolist())
            if out and len(out) == len(measured.kept):
                first = next(iter(measured.unusable.values()))
                self._lose(plan, not_finite(plan.experiment, first, len(out)))
            elif out:
                measured.leave_out(sorted(out))
                measured.tokens.forget()
            measured.listed.update(measured.tokens.listed())
            measured.tokens.forget()

    def _saw_unusable(
        self,
        patcher: Patcher,
        shared: SharedRows,
        chosen: Ints,
        batch: Ints,
        run: Run,
        member: Member,
        broken: Bools,
    ) -> None:
        """Rows of a pass can't be used; without `allow_nan` that loses their experiment."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        seen = [self._row_of(member, row) for row in np.flatnonzero(broken).tolist()]
        measured.saw(seen)
        if self.allow_nan or owner(plan) in self.lost:
            return
        row = int(chosen[member.at[int(broken.argmax())]])
        place = in_cell(patcher, shared, row, run, batch, seen[0])
        self._lose(plan, not_finite(plan.experiment, place, 1))

    def _saw_no_value(self, member: Member, found: Found) -> None:
        """Measures that can't be computed in rows of a pass, and cells that have no value."""
        plan = self.running[member.number]
        measured = self.measured[plan.experiment.key]
        for number, failed in found.failed.items():
            seen = self._row_of(member, failed.row or 0)
            measured.refused.setdefault(number, function_failed(failed, plan.experiment, seen))
            measured.failed.add(number)
        none_left = len(measured.refused) == len(plan.experiment.measures)
        if none_left and owner(plan) not in self.lost:
            self._lose(plan, *measured.refused.values())
        for number, gap in found.gaps.items():
            for row in gap.rows.tolist():
                cell = int(member.rows.cell[row])
                measured.lacks(number, cell, self._row_of(member, row), gap.reason)

    def _row_of(self, member: Member, row: int) -> Unusable:
        """A row of a pass, as it is named."""
        plan, rows = self.running[member.number], member.rows
        words = cell_words(plan, int(rows.cell[row]))
        return Unusable(int(rows.prompt[row]), plan.experiment.spec.base, words)

    def _patcher(self) -> Patcher:
        plans = self.running
        means_and_donors = [self.means_and_donors[plan.experiment.key] for plan in plans]
        readouts = [self.readouts[plan.experiment.key] for plan in plans]
        skip = [self.measured[plan.experiment.key].failed for plan in plans]
        return Patcher(self.plan, plans, readouts, means_and_donors, self.runs, skip)

    def _sharer(self) -> Sharer:
        keys = [plan.experiment.key for plan in self.running]
        cells = [self.whole_cells[key] for key in keys]
        kept = [self.measured[key].kept for key in keys]
        return Sharer(self.running, share=self.plan.shares_rows, cells=cells, kept=kept)

    def _finish(
        self,
        number: int,
        rows: Rows,
        values: Sequence[Floats],
        totals: Sequence[tuple[Floats, Floats]],
    ) -> None:
        """Add values of rows to their cells."""
        measured = self.measured[self.running[number].experiment.key]
        columns = np.searchsorted(measured.kept, rows.prompt)
        for (sums, counts), value in zip(totals, values, strict=True):
            np.add.at(sums, (rows.cell, columns), value)
            np.add.at(counts, (rows.cell, columns), 1)

    # --- the size of a pass ---------------------------------------------------------------------

    def measure_sizes(self) -> None:
        """Settle the size of a pass by trying some on rows of the first batch, where there is
        enough to run. Their values are thrown away."""
        enough = WORTH_MEASURING * self.sizes.pass_tokens
        if self.runs.writer is not None:  # its passes are laid out by the tokens of replies
            return
        if not self.batches or self.due_rows() * longest_prompt(self.panel) < enough:
            return
        plans, batch = self.running, self.batches[0]
        live = [self.sorted_out(plan, batch).live for plan in plans]
        run = [plan.experiment.spec.estimator is None for plan in plans]
        shared = self._sharer().of(
            [own if cells else Rows.none() for own, cells in zip(live, run, strict=True)]
        )
        widths, work = extent(shared, self.runs.shortcuts, plans)
        if int(widths.sum()) * len(self.batches) < enough:
            return
        run, group = max(
            groups(shared, self.plan, plans, widths), key=lambda each: int(widths[each[1]].sum())
        )
        patcher = self._patcher()

        def one_pass(chosen: Ints) -> None:
            list(patcher.values(shared, chosen, members_of(shared, chosen), run, batch))

        self.sizes.measure(try_sizes(one_pass, group, widths, work))
        self._finish_batch()

    # --- passes -----------------------------------------------------------------------------------

    def _patched(
        self, patcher: Patcher, shared: SharedRows, batch: Ints, rows_of: Sequence[Rows]
    ) -> Iterator[tuple[Member, list[Floats]]]:
        """All distinct rows in passes of a good size, with the values of their members. rows_of:
        all of each experiment."""
        widths, _ = extent(shared, self.runs.shortcuts, self.running)
        for run, group in groups(shared, self.plan, self.running, widths):
            replies = self._group_replies(patcher, shared, group, run, batch)
            begin = 0
            while begin < len(group):
                ends = np.cumsum(widths[group[begin:]])
                count = max(1, int(np.searchsorted(ends, self.sizes.pass_tokens, side="right")))
                chosen = group[begin : begin + count]
                tokens = int(widths[chosen].sum())
                own = self._own(shared, chosen)
                if own is not None:
                    self.profile.resumed += sum(len(member.rows) for member, _ in own)
                    yield from own
                    begin += count
                    continue
                try:
                    with stopwatch() as seconds:
                        passed = self._pass(patcher, shared, chosen, run, batch, replies)
                except (RuntimeError, MemoryError) as error:
                    if len(chosen) == 1 or not out_of_memory(error) or not self.sizes.halve():
                        raise
                    self.profile.halved += 1
                    continue
                self.profile.passed(tokens, seconds[0])
                self._keep_pass([(member, found) for _, member, found in passed])
                for rows, member, found in passed:
                    if found.broken.any():
                        self._saw_unusable(patcher, shared, rows, batch, run, member, found.broken)
                    self._saw_no_value(member, found)
                    if found.listed is not None:
                        tokens = self.measured[self.running[member.number].experiment.key].tokens
                        tokens.add(member.rows, rows_of[member.number], found.listed)
                    measured = self.measured[self.running[member.number].experiment.key]
                    measured.wrote(member.rows, found.replies)
                    yield member, found.values
                begin += count

    def _estimated(
        self, patcher: Patcher, number: int, rows: Rows, batch: Ints
    ) -> Iterator[tuple[Rows, list[Floats]]]:
        """Rows of an experiment whose effects are estimated, some prompts at a time: what is kept
        for the way back is of all blocks."""
        plan, key = self.running[number], self.running[number].experiment.key
        if not len(rows):
            return
        self.profile.estimated += len(rows)
        given = self.readouts[key], self.means_and_donors[key], self.runs
        estimates = Estimates(plan, *given, patcher.lanes_of(number, batch, None), batch)
        due = np.unique(rows.prompt)
        while len(due):
            most = max(1, self.sizes.pass_tokens // self.runs.model.shape.n_layers)
            prompts, tokens = estimates.first(due, most)
            own = rows.take(np.flatnonzero(np.isin(rows.prompt, prompts)))
            member = Member(number, own, np.arange(len(own)))
            kept = self.patched_values.get(key)
            known = kept.own(own) if kept is not None and kept.any_own else None
            if known is not None:
                self.profile.resumed += len(own)
                yield own, known
                due = due[len(prompts) :]
                continue
            try:
                with stopwatch() as seconds:
                    found = estimates.of(own, self.measured[key].base_of(plan, own))
            except (RuntimeError, MemoryError) as error:
                if len(prompts) == 1 or not out_of_memory(error) or not self.sizes.halve():
                    raise
                self.profile.halved += 1
                continue
            except NotDifferentiated as refused:
                self._lose(plan, _not_differentiated(plan, str(refused)))
                return
            self.profile.passed(tokens, seconds[0])
            self._keep_pass([(member, found)])
            self._saw_no_value(member, found)
            yield own, found.values
            due = due[len(prompts) :]

    def _own(self, shared: SharedRows, chosen: Ints) -> list[tuple[Member, list[Floats]]] | None:
        """What a pass gave, where this run has been through it before it was cut short."""
        if not any(found.any_own for found in self.patched_values.values()):
            return None
        read: list[tuple[Member, list[Floats]]] = []
        for member in members_of(shared, chosen):
            plan = self.running[member.number]
            if owner(plan) in self.lost:
                continue
            values = self.patched_values.get(plan.experiment.key)
            found = None if values is None else values.own(member.rows)
            if found is None:
                return None
            read.append((member, found))
        return read

    def _keep_pass(self, passed: Sequence[tuple[Member, Found]]) -> None:
        """Keep what a pass gave."""
        if self.values is None:
            return
        known = self.patched_values
        keys = [self.running[member.number].experiment.key for member, _ in passed]
        every = zip(keys, passed, strict=True)
        self.values.keep(
            [part for key, pair in every if key in known for part in known[key].parts(*pair)]
        )

    def _pass(
        self,
        patcher: Patcher,
        shared: SharedRows,
        chosen: Ints,
        run: Run,
        batch: Ints,
        replies: GroupReplies | None,
    ) -> list[tuple[Ints, Member, Found]]:
        """One pass over the chosen distinct rows: what is found in those of each member, and which
        rows were run; without those of experiments that are lost."""
        used = self._used(shared, chosen)
        if not len(used):
            return []
        members = self._members(shared, used)
        written = () if replies is None else replies.of(used)
        every = patcher.values(shared, used, members, run, batch, written)
        return [(used, member, found) for member, found in every]

    def _members(self, shared: SharedRows, chosen: Ints) -> list[Member]:
        """Those of the chosen distinct rows whose experiments aren't lost."""
        lost = [owner(plan) in self.lost for plan in self.running]
        return [each for each in members_of(shared, chosen) if not lost[each.number]]

    def _used(self, shared: SharedRows, chosen: Ints) -> Ints:
        """The chosen distinct rows that such a member has."""
        at = [member.at for member in self._members(shared, chosen)]
        return chosen[np.unique(np.concatenate(at))] if at else chosen[:0]

    def _group_replies(
        self, patcher: Patcher, shared: SharedRows, group: Ints, run: Run, batch: Ints
    ) -> GroupReplies | None:
        """What writes the replies of a group's rows; None where none are written."""
        writer, model = self.runs.writer, self.runs.model
        if writer is None:
            return None
        return GroupReplies(
            lambda chosen: patcher.written(shared, chosen, run, batch),
            partial(self._used, shared),
            group,
            np.array([plan.draws for plan in self.running])[shared.owner]
            * writer.generation.samples,
            reply_bytes(shared, self.running, model.dtype.itemsize, model.shape),
            self.sizes,
        )


def _not_differentiated(plan: ExperimentPlan, said: str) -> NoEstimate:
    """What autograd says of the model."""
    estimator = plan.experiment.spec.estimator
    assert estimator is not None
    return NoEstimate(
        span=estimator.span,
        using=estimator.name,
        what=f"cells of `{plan.experiment.name}`",
        reason=f"autograd can't follow `{plan.experiment.model.name}` ({said[:200]})",
        hint="leave `using` out, so that each cell is run",
    )
