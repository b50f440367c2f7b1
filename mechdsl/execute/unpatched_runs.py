"""The unpatched runs of a panel: computed once per batch of prompts, read by everything else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.reply import Reply
from mechdsl.execute.behind_prompts import read_behind
from mechdsl.execute.found import Found
from mechdsl.execute.options import PaddingSide
from mechdsl.execute.read_samples import read_samples
from mechdsl.execute.read_vectors import LanesOf, wanted
from mechdsl.execute.readout import Reading, Readout
from mechdsl.execute.reply_readers import HaveWritten, Reader, with_replies
from mechdsl.execute.unpatched_batch import (
    Spot,
    UnpatchedBatch,
    UnpatchedRequest,
    compute_unpatched,
    has_loss,
    spot_positions,
    spots_of,
)
from mechdsl.execute.writer import Writer
from mechdsl.hooks.batch import on_device, to_device, together_on_device
from mechdsl.hooks.frozen_norms import FrozenNorms
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.packed.model_end import ModelEnd
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.only_looks import only_looks
from mechdsl.plan.plan import Panel, Plan
from mechdsl.plan.restart import Shortcuts
from mechdsl.plan.rule_rows import Rows
from mechdsl.prompts.prompt_table import PromptTable, Run
from mechdsl.resolve.resolved import Atom
from mechdsl.resolve.resolved_rule import Place, SitePoint

TOGETHER = 512
"""Tokens of a run up to which others are run in the same pass."""


class UnpatchedRuns:
    """Runs without rules on the prompts of one panel, for its readouts and rows."""

    def __init__(
        self,
        panel: Panel,
        model: LoadedModel,
        readouts: Sequence[Readout],
        *,
        plan: Plan,
        side: PaddingSide | None,
        others: Mapping[str, LoadedModel] | None = None,
    ) -> None:
        """others: by name, the models that runs of other models run on."""
        self.panel = panel
        self.model = model
        self.others = others or {}
        self.table: PromptTable = panel.table
        self.seed = panel.experiments[0].experiment.seed
        self.side: PaddingSide | None = side
        self.plan = plan
        self.only_looks = only_looks(panel)
        self.readouts = readouts
        narrow = all(readout.narrow for readout in readouts)
        accuracies = any(each.experiment.accuracies for each in panel.experiments)
        self.narrow = plan.narrows_logits and narrow and not accuracies
        self.spots = spots_of([m for readout in readouts for m in readout.measures])
        if {} not in self.spots:  # accuracies read the last token
            self.spots = (*self.spots, {})
        self.behind = any(each.behind for each in panel.experiments)
        self.loss = next((g.loss for g in readouts if g.loss is not None), None)
        self.rules_of: Callable[[Run, Ints, Ints, Ints], RuleWrites] | None = None
        """What the rules of a run write: see `DerivedRuns.rules`."""
        self._lanes: dict[tuple[object, ...], UnpatchedBatch] = {}
        generation = panel.experiments[0].experiment.generation
        self.writer = generation and Writer(
            self.model_of, panel.table, self.seed, generation, cached=plan.keeps_tokens
        )
        """What lets rows write; None where none does."""
        self._behind: dict[tuple[object, ...], dict[int, Found]] = {}
        self.passes = 0
        """Forward passes so far."""

    @property
    def shortcuts(self) -> Shortcuts | None:
        """What rows take over from these runs; None where they are whole passes."""
        return self.plan.shortcuts if self.plan.restarts and self.model.restartable else None

    def named(self, name: str) -> Run:
        return self.table.runs[name]

    def forget(self) -> None:
        """Free everything that was computed."""
        self._lanes.clear()
        self._behind.clear()
        if self.writer is not None:
            self.writer.forget()

    def lanes(
        self,
        run: Run,
        prompts: Ints,
        continuation: Atom | None = None,
        *,
        alone: bool = False,
    ) -> UnpatchedBatch:
        """The unpatched run on these prompts, computed once while the batch is in work.

        Few prompts are run together with what the other runs have to give: one pass reads the
        weights once; unless it is wanted `alone`.
        """
        key = self._key(run, prompts, continuation)
        if key not in self._lanes:
            due = [run]
            if not alone and continuation is None and self._is_own(run):
                due += self._companions(run, prompts)
            rules = self._rules(run, prompts)  # may run others
            self.passes += 1
            found = compute_unpatched(
                self.model_of(run),
                [(each, self._request(each, prompts, continuation)) for each in due],
                prompts,
                self.table.row_keys,
                seed=self.seed,
                side=self.side,
                rules=rules,
            )
            for each, lanes in zip(due, found, strict=True):
                self._lanes[self._key(each, prompts, continuation)] = lanes
        return self._lanes[key]

    def apart(
        self, table: PromptTable, run: Run, prompts: Ints, places: Iterable[Place]
    ) -> UnpatchedBatch:
        """A run of another block on rows of its own, of which these sites are read; computed once
        while the batch is in work."""
        reads = frozenset(places)
        key = (*self._key(run, prompts, None), reads)
        if key in self._lanes:
            return self._lanes[key]
        self.passes += 1
        request = UnpatchedRequest(reads=reads, stop=self.model.shape.n_layers + 1)
        (found,) = compute_unpatched(
            self.model, [(run, request)], prompts, table.row_keys, seed=self.seed, side=self.side
        )
        self._lanes[key] = found
        return found

    def everything(
        self, run: Run, prompt: int, reads: Sequence[SiteRead], continuation: Atom | None
    ) -> Mapping[SiteRead, Tensor]:
        """These sites of one prompt in this order, on all its tokens, in a pass of its own."""
        self.passes += 1
        places = frozenset((read.site, read.layer) for read in reads)
        request = UnpatchedRequest(reads=places, continuation=continuation)
        prompts = np.array([prompt], dtype=np.int64)
        (found,) = compute_unpatched(
            self.model_of(run),
            [(run, request)],
            prompts,
            self.table.row_keys,
            seed=self.seed,
            side=self.side,
            rules=self._rules(run, prompts),
        )
        return {read: found.reads[read] for read in reads}

    def reader(self, run: Run, points: Iterable[SitePoint]) -> LanesOf:
        """What reads these sites of a run, with its rules if it has some, and stops above the
        highest one: see `read_vectors`."""
        model = self.model_of(run)
        request = wanted(points, model.shape)

        def lanes(prompts: Ints) -> UnpatchedBatch:
            rules = self._rules(run, prompts)
            self.passes += 1
            (found,) = compute_unpatched(
                model,
                [(run, request)],
                prompts,
                self.table.row_keys,
                seed=self.seed,
                side=self.side,
                rules=rules,
            )
            return found

        return lanes

    def rules(self, run: Run, prompts: Ints, draw: Ints, batch: Ints) -> RuleWrites:
        """What the rules of a run write in rows that start there: see `DerivedRuns.rules`."""
        assert self.rules_of is not None
        return self.rules_of(run, prompts, draw, batch)

    def _rules(self, run: Run, prompts: Ints) -> RuleWrites | None:
        """The same in its own lanes; None for a run without rules."""
        if run.derived is None:
            return None
        lanes, draw = np.repeat(prompts, run.draws), np.tile(np.arange(run.draws), len(prompts))
        return self.rules(run, lanes, draw, prompts)

    def model_of(self, run: Run) -> LoadedModel:
        """The model that a run runs on."""
        return self.model if run.model is None else self.others[run.model]

    def _companions(self, run: Run, prompts: Ints) -> list[Run]:
        """Runs that are due too and can go along with few prompts, as they run about as far."""
        few = sum(len(run.rows[prompt].ids) for prompt in prompts) <= TOGETHER
        if not few or run.derived is not None or not self._goes_far(run):
            return []
        others = [self.named(name) for name in self.panel.runs]
        return [
            other
            for other in others
            if other is not run
            and other.model == run.model
            and other.derived is None
            and self._key(other, prompts, None) not in self._lanes
            and self._goes_far(other)
        ]

    def _goes_far(self, run: Run) -> bool:
        stop = self._stop(run)
        return stop is None or stop >= 0.75 * self.model.shape.n_layers

    @staticmethod
    def _key(run: Run, prompts: Ints, continuation: Atom | None) -> tuple[object, ...]:
        return id(run), prompts.tobytes(), None if continuation is None else id(continuation)

    def _is_own(self, run: Run) -> bool:
        """Where other text was put in, only rows are measured: positions are theirs."""
        return run is self.table.runs.get(run.name)

    def _request(self, run: Run, prompts: Ints, continuation: Atom | None) -> UnpatchedRequest:
        """What experiments need of a run."""
        if self.only_looks:  # its tokens alone
            return UnpatchedRequest(stop=0)
        own = self._is_own(run)
        needs = self.panel.runs.get(run.name) if own else None
        packed = [plan for plan in self._starting(run) if not plan.whole]
        lowest = min((int(plan.lowest.min()) for plan in packed), default=None)
        if self.shortcuts is None:
            lowest = None
        elif lowest is not None and not self.shortcuts.resume:
            lowest = 0
        measured = own and (needs is None or needs.measured or needs.stop is None)
        reads = set(needs.reads) if needs is not None else set[Place]()
        reads |= self._gauge_reads() if own else set[Place]()
        return UnpatchedRequest(
            reads=frozenset(reads if continuation is None or self.behind else ()),
            lowest=lowest,
            spots=self.spots if measured else (),
            stop=self._stop(run),
            tokens=self.tokens(self.readouts, prompts) if self.narrow else None,
            fuse=self.plan.fuses_kernels,
            loss=self.loss if measured and continuation is None else None,
            continuation=continuation,
        )

    def _starting(self, run: Run) -> list[ExperimentPlan]:
        """The experiments with rows that start from a run."""
        plans = self.panel.experiments
        return [plan for plan in plans if any(run is start for start in plan.starting_runs)]

    def _stop(self, run: Run) -> int | None:
        """How many blocks of a run have to be run; None for all and what lies behind them."""
        if not self._is_own(run):
            return self.model.shape.n_layers
        needs = self.panel.runs.get(run.name)
        if needs is None or self._starting(run) or self._gauge_reads():
            return None
        return needs.stop

    def tokens(self, readouts: Iterable[Readout], prompts: Ints) -> Tensor | None:
        """[K] ascending: all that these readouts read of the logits; None for the vocabulary."""
        if not self.plan.narrows_logits or not all(readout.narrow for readout in readouts):
            return None
        found = sorted(set[int]().union(*(readout.tokens(prompts) for readout in readouts)))
        return to_device(torch.tensor(found, dtype=torch.long), self.model.device)

    def observed_tokens(self, readout: Readout, prompts: Ints) -> Tensor | None:
        """[K] ascending: all that a readout reads of the logits that it observes; None for the
        vocabulary."""
        found = readout.observed_tokens(prompts)
        if found is None:
            return None
        return to_device(torch.tensor(found, dtype=torch.long), self.model.device)

    @cached_property
    def unembedding(self) -> ModelEnd:
        """What the model does behind its last block."""
        return ModelEnd(self.model)

    @cached_property
    def norms(self) -> FrozenNorms:
        """The norms that paths may hold."""
        return FrozenNorms(self.model)

    def _gauge_reads(self) -> set[Place]:
        """Sites that measures compare (`cosine`)."""
        return {
            (atom.point.site, atom.point.layer)
            for readout in self.readouts
            for _, atom in readout.atoms
            if atom.point is not None
        }

    def values(
        self,
        readout: Readout,
        run: str,
        prompts: Ints,
        environment: int | None,
        *,
        relative: float = 0.0,
        skip: Collection[int] = (),
    ) -> Found:
        """What is read of every prompt, draws of noise averaged; `relative` and `skip` as in
        `Readout.read`."""
        if self.only_looks:
            return self._unseen(readout, prompts)
        written = self._written(readout, run, prompts)
        if readout.only_replies:
            reading = self._nothing_read(run, prompts, environment)
            found = read_samples(readout, reading, written, relative, skip=skip)
            found = self._with_replies(found, readout, run, prompts, environment, relative)
            return found.over_draws(self.named(run).draws)
        plain = self.lanes(self.named(run), prompts)
        lanes = np.repeat(prompts, plain.draws)
        draws = np.tile(np.arange(plain.draws), len(prompts))
        reading = Reading(
            run=run,
            prompts=lanes,
            items=[environment] * len(lanes),
            logits=self._of_spots(readout, plain.logits),
            continued={
                n: present(self.lanes(self.named(run), prompts, readout.atoms[n][1]).logits)
                for n in readout.continuations
            },
            loss=plain.loss,
            activations={
                n: self._activation(atom, readout.spots[spot], plain, np.arange(len(lanes)))
                for n, (spot, atom) in enumerate(readout.atoms)
                if atom.point is not None
            },
            references=self.references(readout, prompts, lanes, draws),
            tokens=plain.tokens,
            largest=self._of_spots(readout, plain.largest),
            has_loss=None if plain.loss is None else has_loss(self.named(run), lanes),
        )
        found = read_samples(readout, reading, written, relative, skip=skip)
        found = self._with_replies(found, readout, run, prompts, environment, relative)
        return found.over_draws(plain.draws)

    def _with_replies(
        self,
        found: Found,
        readout: Readout,
        run: str,
        prompts: Ints,
        environment: int | None,
        relative: float,
    ) -> Found:
        """With what is read in the run's own replies: at once of all readouts, as they share the
        passes."""
        if not readout.in_replies:
            return found
        assert self.writer is not None
        key = (run, prompts.tobytes(), environment, relative)
        if key not in self._behind:
            lanes = np.repeat(prompts, self.named(run).draws)
            none = np.zeros_like(lanes)
            rows, at = Rows(none, lanes, none), np.arange(len(lanes))
            items = [environment] * len(lanes)
            readers = {
                id(each): Reader(None, each, rows, at, items)
                for each in self.readouts
                if each.in_replies
            }
            replies = self.writer.of_run(self.named(run), prompts)
            have = HaveWritten(self.named(run), lanes, ())
            self._behind[key] = read_behind(self, have, replies, readers, relative)
        return with_replies(found, self._behind[key][id(readout)])

    @cached_property
    def _shown(self) -> set[str | None]:
        """The runs whose replies are shown beside those of cells, whatever is measured."""
        specs = [plan.experiment.spec for plan in self.panel.experiments]
        return {name for spec in specs for name in (spec.base, spec.source)}

    def _written(self, readout: Readout, run: str, prompts: Ints) -> list[tuple[Reply, ...]]:
        """Per lane, what a run writes, where that is measured."""
        if self.writer is None or not (readout.reads_replies or run in self._shown):
            return []
        return self.writer.of_run(self.named(run), prompts)

    def _nothing_read(self, run: str, prompts: Ints, environment: int | None) -> Reading:
        """Lanes of a run of which nothing but what they write is read."""
        lanes = np.repeat(prompts, self.named(run).draws)
        return Reading(run, lanes, [environment] * len(lanes), None, {}, None, {}, {})

    def _unseen(self, readout: Readout, prompts: Ints) -> Found:
        """No value of any measure: what is observed, rows show."""
        count = len(prompts)
        values = [np.full(count, np.nan) for _ in readout.measures]
        rounding = [np.zeros(count) for _ in readout.measures]
        return Found(values, np.zeros(count, dtype=np.bool_), rounding, {}, {})

    def _of_spots(self, readout: Readout, found: Tensor | None) -> Tensor | None:
        """[lane, spot of the readout, ...] of [lane, spot, ...]."""
        if found is None or not readout.needs_plain:
            return None
        spots = torch.tensor([self.spots.index(spot) for spot in readout.spots])
        return found[:, to_device(spots, found.device)]

    def references(
        self, readout: Readout, prompts: Ints, row_prompts: Ints, draws: Ints
    ) -> dict[int, Tensor]:
        """What `kl(run)`, `js(run)` and `cosine(SITE, run)` compare each row with."""
        found: dict[int, Tensor] = {}
        for number, (spot, atom) in enumerate(readout.atoms):
            if atom.run is None or readout.behind[number]:
                continue
            reference = self.lanes(self.named(atom.run), prompts)
            lane = reference.lane(row_prompts, draws)
            if atom.point is not None:
                found[number] = self._activation(atom, readout.spots[spot], reference, lane)
            else:
                logits = present(reference.logits)
                index = on_device(lane, logits.device)
                found[number] = logits[index, self.spots.index(readout.spots[spot])]
        return found

    def _activation(self, atom: Atom, spot: Spot, lanes: UnpatchedBatch, lane: Ints) -> Tensor:
        """[row, 1, width]: the site of a `cosine` at the measured place of these lanes."""
        assert atom.point is not None
        read = lanes.reads[SiteRead(atom.point.site, atom.point.layer)]
        prompts = np.repeat(lanes.prompts, lanes.draws)[lane]
        position = spot_positions(spot, lanes.run, prompts, lanes.lengths[lane])
        row = torch.from_numpy(lane)
        index = row, lanes.batch.columns(row, torch.from_numpy(np.ascontiguousarray(position)))
        return vectors(read[together_on_device(index, read.device)], atom)


def vectors(found: Tensor, atom: Atom) -> Tensor:
    """[row, 1, width] of [row, units, width]: all units side by side where none is named."""
    assert atom.point is not None
    if atom.point.unit is not None:
        found = found[:, [atom.point.unit]]
    return found.flatten(1)[:, None]


def present(logits: Tensor | None) -> Tensor:
    """The logits of a run that is measured."""
    assert logits is not None, "a measured run was stopped early"
    return logits
