"""What a panel costs: rows, tokens through blocks, multiply-adds.

Counted on the rows themselves, with the masks that the packed run computes by, so nothing here is a
rule of thumb but the size of an MLP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.models.shape import ModelShape
from mechdsl.plan.columns import Ragged
from mechdsl.plan.estimate_cost import GradientWork, gradient_work
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.only_looks import only_looks
from mechdsl.plan.plan import BATCH_ROWS, Panel
from mechdsl.plan.reply_cost import Readings, ReplyWork, reply_work, writing_lengths
from mechdsl.plan.restart import WHOLE_PASS, BlockWork, Held, Mask, RowMasks, Shortcuts, block_work
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.plan.share import Sharer, combined
from mechdsl.plan.sweeps import batch_size, beside, sweeps
from mechdsl.prompts.prompt_table import Run
from mechdsl.resolve.direction_types import fits_of
from mechdsl.resolve.resolved_rule import SitePoint
from mechdsl.vocab.sites import stop_layer


@dataclass(frozen=True)
class Cost:
    """Work of patched rows and unpatched prompts."""

    cells: int = 0
    """Cells with a row to run."""
    rows: int = 0
    forwards: int = 0
    """Calls of the model: one per row in a plain loop."""
    tokens: int = 0
    """Tokens times the blocks that they pass through."""
    multiply_adds: float = 0.0
    backwards: int = 0
    """Passes back, for gradients."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.cells + other.cells,
            self.rows + other.rows,
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.multiply_adds + other.multiply_adds,
            self.backwards + other.backwards,
        )

    def __rmul__(self, times: int) -> Cost:
        return Cost(
            times * self.cells,
            times * self.rows,
            times * self.forwards,
            times * self.tokens,
            times * self.multiply_adds,
            times * self.backwards,
        )

    @property
    def flops(self) -> float:
        """Two per multiply-add."""
        return 2 * self.multiply_adds


# --- one token in one block -------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockCost:
    """Multiply-adds per token of the parts of a block."""

    project: int
    output: int
    mlp: int
    key: int
    """Attention's, per key that a query sees."""

    @staticmethod
    def of(shape: ModelShape) -> _BlockCost:
        heads = shape.n_heads * shape.d_head
        # A hidden layer of four widths has no gate, as a rule; others have.
        matrices = 2 if shape.d_mlp == 4 * shape.d_model else 3
        return _BlockCost(
            project=shape.d_model * (heads + 2 * shape.n_kv_heads * shape.d_head),
            output=heads * shape.d_model,
            mlp=matrices * shape.d_model * shape.d_mlp,
            key=2 * heads,
        )

    def whole(self, lengths: Ints) -> Ints:
        """[row] all tokens of a prompt in one block."""
        pairs = lengths * (lengths + 1) // 2
        return lengths * (self.project + self.output + self.mlp) + pairs * self.key

    def of_work(self, work: BlockWork, counts: Ints) -> tuple[int, int]:
        """(tokens, multiply-adds) of rows, each counted so often."""
        seen = np.arange(1, work.present.shape[1] + 1)

        def tokens(mask: Mask) -> int:
            return int(mask.sum(axis=1) @ counts)

        adds = (
            tokens(work.project) * self.project
            + tokens(work.output) * self.output
            + tokens(work.mlp) * self.mlp
            + int((work.attend @ seen) @ counts) * self.key
        )
        return tokens(work.present), adds


def run_cost(shape: ModelShape, run: Run, stop: int | None) -> Cost:
    """All prompts of a run, each in a pass of its own, through so many blocks; None is all, and the
    logits of one token."""
    lengths, draws = run.lengths, run.draws
    blocks = shape.n_layers if stop is None else min(stop, shape.n_layers)
    prompts, tokens = len(lengths) * draws, int(lengths.sum()) * draws
    logits = prompts * shape.d_model * shape.outputs if stop is None else 0
    per_block = int(_BlockCost.of(shape).whole(lengths).sum()) * draws
    return Cost(0, 0, prompts, tokens * blocks, per_block * blocks + logits)


def reply_cost(shape: ModelShape, work: ReplyWork, stop: int | None = None) -> Cost:
    """Of what is computed behind prompts, through so many blocks; None is all."""
    block, blocks = _BlockCost.of(shape), shape.n_layers if stop is None else stop
    each = block.project + block.output + block.mlp
    adds = blocks * float(work.tokens * each + work.keys * block.key)
    adds += float(work.logits * shape.d_model * shape.outputs)
    return Cost(0, 0, work.forwards, work.tokens * blocks, adds)


# --- rows ---------------------------------------------------------------------------------------


class PanelCount:
    """What is counted once for a panel."""

    def __init__(self, panel: Panel, pass_tokens: int, prompt_tokens: int) -> None:
        self.panel = panel
        self.pass_tokens = pass_tokens
        self.prompt_tokens = prompt_tokens
        self.plans = panel.experiments
        self.table = self.plans[0].experiment.table
        self.shape = self.plans[0].experiment.model.shape
        self.block = _BlockCost.of(self.shape)
        self.sharer = Sharer(self.plans, share=True)

    def chunks(self) -> Iterator[Ints]:
        """Prompts whose rows can be laid out at a time."""
        cells = max(1, sum(each.n_cells for each in self.plans))
        size = max(1, BATCH_ROWS // cells)
        every = np.arange(len(self.table), dtype=np.int64)
        return (every[i : i + size] for i in range(0, len(every), size))

    def unpatched(self, *, stopped: bool) -> Cost:
        """All prompts of all unpatched runs, as often as they are gone through: whole, or those
        that are only read stopped early."""
        found = Cost()
        for name, times in self.sweeps.items():
            needs = self.panel.runs.get(name)
            stop = None if needs is None or not stopped else needs.stop
            found += times * run_cost(self.shape, self.panel.table.runs[name], stop)
        for run, blocks in (*self.fitted, *self.beside):  # which are stopped in any case
            found += run_cost(self.shape, run, blocks)
        return found

    @cached_property
    def sweeps(self) -> Counter[str]:
        """By name, how often an unpatched run is computed on all prompts."""
        several = self.batch_count > 1
        return Counter() if only_looks(self.panel) else sweeps(self.panel, several=several)

    @cached_property
    def batch_count(self) -> int:
        """Batches of prompts."""
        return -(-len(self.table) // batch_size(self.panel, self.prompt_tokens))

    @cached_property
    def beside(self) -> list[tuple[Run, int]]:
        """The runs of other blocks that are read, and how many blocks of them are run."""
        return [(run, self.shape.n_layers) for _, run in beside(self.panel)]

    @cached_property
    def fitted(self) -> list[tuple[Run, int]]:
        """The runs that directions are fitted on, and how many blocks of them are run."""
        plans = (*self.panel.derived.values(), *self.plans)
        members = {m.name: m for p in plans for rule in p.rules for m in rule.directions}
        found: dict[tuple[int, str | None], tuple[Run, int]] = {}
        for fit in (fit for member in members.values() for fit in fits_of(member.vector)):
            layers = self.shape.n_layers
            stops = [stop_layer(p.site, p.layer, layers) or layers for p in fit.points]
            for sample in fit.samples:
                key = id(sample.run.rows), sample.run.model
                before = found.get(key, (sample.run, 0))
                found[key] = sample.run, max(before[1], *(min(stop, layers) for stop in stops))
        return list(found.values())

    def batches(self) -> int:
        """Forward passes over batches of prompts that all unpatched runs take."""
        others = [*self.fitted, *self.beside]
        tokens = (int(run.lengths.sum()) for run, _ in others)
        return self.sweeps.total() * self.batch_count + sum(
            -(-n // self.prompt_tokens) for n in tokens
        )


class PanelWork:
    """The work of a panel on some prompts: of the plain loop first, then with more and more left
    out of it. The panel's unpatched runs are counted with its first prompts."""

    def __init__(self, panel: PanelCount, prompts: Ints) -> None:
        self.panel = panel
        self.first = bool(len(prompts)) and prompts[0] == 0
        self.batches = -(-len(prompts) // batch_size(panel.panel, panel.prompt_tokens))
        self.rows = [plan.passes(prompts) for plan in panel.plans]
        self.patched = self._whole()
        self.unpatched = panel.unpatched(stopped=False) if self.first else Cost()
        self.shortcuts = WHOLE_PASS
        self.keeps_tokens = False
        self.joins = False
        self.readings = Readings.of(panel.plans, self.rows)
        given = prompts, panel.block.whole, panel.pass_tokens
        every = (gradient_work(plan, *given) for plan in panel.plans)
        self.gradients = sum(every, GradientWork())

    @property
    def cost(self) -> Cost:
        """What is left."""
        return self.patched + self.unpatched + self._replies() + self._estimates()

    def _estimates(self) -> Cost:
        """What takes the place of rows that are estimated."""
        shape, found = self.panel.shape, self.gradients
        forwards, backwards = found.forwards, found.backwards
        if self.joins:
            forwards, backwards = found.joined_forwards, found.joined_backwards
        adds = found.adds * shape.n_layers + found.logits * float(shape.d_model * shape.outputs)
        return Cost(0, 0, forwards, found.tokens * shape.n_layers, adds, backwards)

    def _replies(self) -> Cost:
        """What is computed behind the prefill. Unpatched runs are written once for a panel."""
        said = self.panel.plans[0].experiment.generation
        if said is None:
            return Cost()
        parts = [
            writing_lengths(plan, rows, unpatched=self.first and not number)
            for number, (plan, rows) in enumerate(zip(self.panel.plans, self.rows, strict=True))
        ]
        work = reply_work(
            np.concatenate(parts),
            said.tokens,
            said.samples,
            kept=self.keeps_tokens,
            pass_tokens=self.panel.pass_tokens,
        )
        together = self.panel.pass_tokens if self.joins else None
        read = self.readings.work(self.panel.plans, self.rows, together, unpatched=self.first)
        return reply_cost(self.panel.shape, work + read)

    def keep_tokens(self) -> None:
        """Of each step of a reply, only the newest token is computed."""
        self.keeps_tokens = True

    @cached_property
    def shapes(self) -> list[_Shapes]:
        """The rows that are left by what they compute; none are left out any more."""
        return [
            shape
            for plan, rows in zip(self.panel.plans, self.rows, strict=True)
            for shape in _shapes(plan, rows)
        ]

    def stop_early(self) -> None:
        """Unpatched runs that are only read stop above what is read."""
        if self.first:
            self.unpatched = self.panel.unpatched(stopped=True)

    def leave_inert_out(self) -> None:
        """Rows that can't differ from the base run are not run."""
        plans = zip(self.panel.plans, self.rows, strict=True)
        left = [np.flatnonzero(~plan.is_inert(rows)) for plan, rows in plans]
        self.rows = [rows.take(own) for rows, own in zip(self.rows, left, strict=True)]
        self.readings = self.readings.take(left)
        self.patched = self._whole()

    def share(self) -> None:
        """Equal rows are run once."""
        shared = self.panel.sharer.of(self.rows)
        own = [np.flatnonzero(shared.owner == n) for n in range(len(self.panel.plans))]
        self.rows = [shared.rows.take(rows) for rows in own]
        self.readings = self.readings.shared(shared).take(own)
        self.patched = self._whole()

    def restart(self, **shortcuts: bool) -> None:
        """Rows take one thing more over from the unpatched run."""
        self.shortcuts = replace(self.shortcuts, **shortcuts)
        shape = self.panel.shape
        tokens = 0
        adds = self.patched.rows * float(shape.d_model * shape.outputs)
        for one in self.shapes:
            more_tokens, more_adds = one.work(self.panel.block, shape, self.shortcuts)
            tokens += more_tokens
            adds += more_adds
        self.patched = replace(self.patched, tokens=tokens, multiply_adds=adds)

    def narrow(self) -> None:
        """Two rows of the unembedding for every row instead of the vocabulary, where no metric
        needs all."""
        measures = [m for plan in self.panel.plans for m in plan.experiment.measures]
        if not all(atom.form.narrow for measure in measures for atom in measure.atoms):
            return
        shape = self.panel.shape
        saved = self.patched.rows * float(shape.d_model * (shape.outputs - 2))
        left = self.patched.multiply_adds - saved
        self.patched = replace(self.patched, multiply_adds=left)

    def join(self) -> None:
        """Rows ride in passes of a good size, prompts in batches."""
        self.joins = True
        if self.patched.rows:
            passes = -(-sum(one.width for one in self.shapes) // self.panel.pass_tokens)
            forwards = min(self.patched.forwards, max(passes, self.batches))
            self.patched = replace(self.patched, forwards=forwards)
        if self.first:
            self.unpatched = replace(self.unpatched, forwards=self.panel.batches())

    def _whole(self) -> Cost:
        """Every row a whole pass."""
        count = tokens = 0
        adds = 0.0
        shape, block = self.panel.shape, self.panel.block
        n, logits = shape.n_layers, shape.d_model * shape.outputs
        for plan, one in zip(self.panel.plans, self.rows, strict=True):
            lengths = plan.lengths(one)
            count += len(one) * plan.draws
            tokens += int(lengths.sum()) * plan.draws * n
            adds += float(block.whole(lengths).sum()) * plan.draws * n
            adds += len(one) * plan.draws * float(logits)
        # Cells are counted on the first prompts, as all have the same.
        cells = sum(len(np.unique(one.cell)) for one in self.rows) if self.first else 0
        return Cost(cells, count, count, tokens, adds)


def _blocks(table: Sequence[SitePoint], points: Ragged) -> Ints:
    """[site combination] equal where the same sites of the same blocks are written, in whatever
    heads or neurons."""
    numbers: dict[frozenset[tuple[str, int | None]], int] = {}
    places = [(point.site, point.layer) for point in table]
    found: list[int] = []
    for begin, end in zip(points.offsets[:-1], points.offsets[1:], strict=True):
        own = frozenset(places[point] for point in points.values[begin:end])
        found.append(numbers.setdefault(own, len(numbers)))
    return np.array(found, dtype=np.int64)


def _shapes(plan: ExperimentPlan, rows: Rows) -> list[_Shapes]:
    """The rows of an experiment; of path patching, those that record what receivers read too. Where
    such rows are whole passes, what they hold is read in others."""
    found = [_Shapes(plan, rows)]
    path = plan.path
    if path is not None and path.paths is not None and not path.paths.at_the_end:
        at = path.written_runs(rows)
        sender = plan.senders[rows.cell]
        code = combined([[sender, at, rows.alternative, rows.prompt]], [len(rows)])
        _, first = np.unique(code, return_index=True)
        found.append(_Shapes(plan, rows.take(first), recording=True))
    if path is not None and plan.whole:
        found.append(found[-1])
        if path.paths is not None and path.paths.also_at_the_end:  # what is there without it
            found.append(found[-1])
    return found


class _Shapes:
    """The rows of an experiment by what they compute: alike rows are counted together.

    recording: those of path patching in which all but the senders is held, and receivers are read.
    """

    def __init__(self, plan: ExperimentPlan, rows: Rows, *, recording: bool = False) -> None:
        self.plan = plan
        self.recording = recording
        lengths = plan.lengths(rows)
        columns: list[Ints] = [lengths]
        for rule in plan.rules:
            run = rule.written_runs(rows)
            first = rule.written.leftmost(run) if len(rows) else run
            table, points, combination = self._places(rule)
            blocks = _blocks(table, points)[combination[rows.cell]]
            columns += [blocks, first, rule.written.tokens.counts(run)]
        at = [
            np.asarray(measure.at[plan.experiment.spec.base])[rows.prompt]
            for measure in plan.experiment.measures
            if plan.experiment.spec.base in measure.at
        ]
        code = combined([[*columns, *at]], [len(rows)])
        _, first, counts = np.unique(code, return_index=True, return_counts=True)
        self.rows = rows.take(first)
        self.lengths = lengths[first]
        self.counts = counts * plan.draws
        self.masks = self._masks([column[first] for column in at])
        begin = np.where(
            self.masks.real.any(axis=1),
            plan.leftmost(self.rows) if len(first) and not plan.whole else 0,
            0,
        )
        self.width = int(np.maximum(1, self.lengths - begin) @ self.counts)

    def work(self, block: _BlockCost, shape: ModelShape, shortcuts: Shortcuts) -> tuple[int, int]:
        """(tokens through blocks, multiply-adds)"""
        tokens = adds = 0
        shortcuts = WHOLE_PASS if self.plan.whole else shortcuts
        for each in block_work(
            self.masks,
            shape.n_layers,
            parallel=shape.parallel_block,
            causal=shape.causal,
            shortcuts=shortcuts,
        ):
            more_tokens, more_adds = block.of_work(each, self.counts)
            tokens += more_tokens
            adds += more_adds
        return tokens, adds

    def _places(self, rule: RulePlan) -> tuple[Sequence[SitePoint], Ragged, Ints]:
        """What rows write: (points, combinations of them, combination of each cell)."""
        paths = rule.paths
        if paths is not None and not paths.at_the_end and not self.recording:
            return paths.table, paths.points, paths.pair_of_cell
        return rule.point_table, rule.points, rule.site_of_cell

    def _masks(self, at: Sequence[Ints]) -> RowMasks:
        """What the rows write and what is read of them."""
        rows, lengths = self.rows, self.lengths
        longest = int(lengths.max(initial=1))
        real = np.arange(longest)[None, :] < lengths[:, None]
        writes: dict[tuple[str, int | None], Mask] = {}
        received: dict[tuple[str, int | None], Mask] = {}
        for rule in self.plan.rules:
            run = rule.written_runs(rows)
            row, token = rule.written.tokens.expand(run)
            own = token < lengths[row]  # those of an answer are in no pass over the prompts
            row, token = row[own], token[own]
            table, points, combination = self._places(rule)
            index, point = points.expand(combination[rows.cell][row])
            target = received if rule.rule.does.changes == "nothing" else writes
            for number in np.unique(point):
                place = table[number]
                own = index[point == number]
                mask = target.setdefault((place.site, place.layer), np.zeros_like(real))
                mask[row[own], token[own]] = True
                if rule.rule.does.mode == "step":  # what it is a step from is there too
                    mask = received.setdefault((place.site, place.layer), np.zeros_like(real))
                    mask[row[own], np.maximum(token[own] - 1, 0)] = True
            if self.recording and rule.paths is not None:
                for place in {(p.site, p.layer) for p in rule.paths.table}:
                    mask = received.setdefault(place, np.zeros_like(real))
                    mask[row, token] = True
        final = np.zeros_like(real)
        measures = self.plan.experiment.measures
        base = self.plan.experiment.spec.base
        if len(rows) and not self.recording:
            if any(base not in measure.at for measure in measures):
                final[np.arange(len(rows)), lengths - 1] = True
            for column in at:
                final[np.arange(len(rows)), column] = True
        whole = any(a.form.takes == "prompt" for measure in measures for a in measure.atoms)
        if whole and not self.recording:
            final |= real
        reads = {
            (atom.point.site, atom.point.layer): final
            for measure in measures
            for atom in measure.atoms
            if atom.point is not None
        }
        path = None if self.plan.path is None else self.plan.path.paths
        held = None
        if path is not None and not self.plan.whole and (path.at_the_end or self.recording):
            every = np.ones(len(rows), dtype=np.bool_)
            held = Held(every, every & (not path.through_mlps), every & path.frozen_norms)
        return RowMasks(real, writes, {**reads, **received}, final, held)
