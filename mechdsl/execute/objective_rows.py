"""Runs of a training on the effect of an edit: base runs with edited vectors, and gradients.

In each step, the base runs of some rows are run again with edited vectors at the named tokens. The
edit is a function of the vectors of the base run, those of the source run, and the parameters that
are trained; the loss is a measure of the file, or its negative, as a mean over the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.measurement.readout import Readout
from mechdsl.execute.patching.differentiated_run import DifferentiatedRun, DrawLanes, write_point
from mechdsl.execute.training import VectorCache
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.fits.training import TrainingState
from mechdsl.fits.vectors import TrainedEdit
from mechdsl.forward.hooks.batch import CircuitRead, CircuitWrite, SiteWrite
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import build_save_panel
from mechdsl.planner.training_cost import CHUNK_BYTES, FLOAT
from mechdsl.program import spec
from mechdsl.program.estimators import BackwardRules
from mechdsl.program.images import IMAGE_SPAN, INSERTED_SPAN
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.trainings import (
    count_held_out,
    list_edited_images,
    order_objective_rows,
    paired_positions,
)
from mechdsl.resolve.types import ResolvedExperiment, ResolvedSave, SitePoint, count_numbers
from mechdsl.resolve.types import Training as DeclaredTraining

IMAGE_ROWS = 64
"""Number of images whose vectors determine the length of random ones."""

Edit = Callable[[Tensor, Tensor], Tensor]
"""[vector, width] vectors of the base run and of the source run → the vectors that are written."""


def take_source(tensor: Tensor, other: Tensor) -> Tensor:
    """The edit that writes the whole vectors of the source run."""
    return other


EditT = TypeVar("EditT")


@dataclass(frozen=True, eq=False)
class EffectRows(ABC, Generic[EditT]):
    """Rows and the measure of a training on the effect of an edit.

    Vectors of all rows stay in memory if they take at most `CHUNK_BYTES`. Otherwise, those of a
    step's rows are read again.
    """

    declared: DeclaredTraining
    objective: ResolvedExperiment
    """The rows, the rule and the measure."""
    model: LoadedModel
    side: PaddingSide | None
    cache: VectorCache = field(default_factory=VectorCache, kw_only=True)

    @property
    def text(self) -> str:
        """The measure, and whether it is maximised."""
        said = "minimise" if self.declared.minimises else "maximise"
        return f"{said} {self.objective.spec.measures[0].label}"

    # --- rows

    @cached_property
    def rows(self) -> Ints:
        """[row] numbers of the rows with the position in both runs and with a value of the measure,
        in a random order; the first ones are held out."""
        return np.array(order_objective_rows(self.declared, self.objective), dtype=np.int64)

    @cached_property
    def held_out_count(self) -> int:
        """Number of rows at the start of `rows` that the training doesn't use."""
        return count_held_out(self.declared, len(self.rows))

    @property
    def measured(self) -> Ints:
        """[row] numbers of the rows that a report is about: the held-out ones, if there are any."""
        return self.rows[: self.held_out_count] if self.held_out_count else self.rows

    @property
    def chunks(self) -> int:
        """One: the numbers of all rows are in memory."""
        return 1

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of the training rows, twice."""
        rows = torch.from_numpy(self.rows[self.held_out_count :])
        return rows, rows

    def outcome(self, state: TrainingState) -> tuple[int, int, int, bool, str]:
        """Return the fields that reports of these trainings begin with: training rows, held-out
        rows, steps, whether the training stopped early, and the text of the objective."""
        trained = len(self.rows) - self.held_out_count
        return trained, self.held_out_count, state.step, state.stopped, self.text

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of the rows that the training doesn't use, twice."""
        rows = torch.from_numpy(self.rows[: self.held_out_count])
        return rows, rows

    # --- vectors

    @cached_property
    def _cells(self) -> tuple[PositionCell, PositionCell]:
        return paired_positions(self.objective)

    @cached_property
    def _runs(self) -> tuple[PromptRun, PromptRun]:
        """The base run and the source run."""
        table = self.objective.table
        return table.runs[self.objective.spec.base], table.runs[self.objective.rules[0].run]

    def _read(
        self,
        run: PromptRun,
        cell: PositionCell,
        points: Sequence[SitePoint],
        rows: Ints | None = None,
    ) -> list[Tensor]:
        """Return [vector, width] of each point, at least in 32 bits, in the order of the table's
        rows.

        Args:
            run: The run.
            cell: The position.
            points: The sites.
            rows: Numbers of the rows; None for all of the training.
        """
        seed = self.objective.seed
        reader = build_reader(
            self.model, self.objective.table, run, points, seed=seed, side=self.side
        )
        rows = np.sort(self.rows if rows is None else rows)
        batches = split_prompts(self.model, run, points, rows)
        parts: list[list[Tensor]] = [[] for _ in points]
        # What stays in memory has the model's precision, also if a step in bf16 needs it first.
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            for vector in read_vectors(reader, points, [cell], batches):
                parts[vector.point].append(vector.vectors.clone())
        joined = [torch.cat(part) for part in parts]
        return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in joined]

    @cached_property
    def _starts(self) -> Ints:
        """[row of the table] number of its first vector."""
        counts = np.zeros(len(self.objective.table), dtype=np.int64)
        counts[self.rows] = [len(self._cells[0].hits[row][0]) for row in self.rows]
        return np.concatenate([[0], np.cumsum(counts)])

    @property
    @abstractmethod
    def _reads(self) -> Sequence[tuple[int, Sequence[SitePoint]]]:
        """The sites that edits read in the base run, 0, and in the source run, 1."""

    @property
    def _numbers(self) -> int:
        """Numbers in memory for each vector that is edited."""
        points = [point for _, site_points in self._reads for point in site_points]
        return sum(count_numbers(point, self.model.shape) for point in points)

    @cached_property
    def first_rows(self) -> Ints:
        """[row] ascending numbers of the rows whose vectors fit into `CHUNK_BYTES` together, the
        first ones in the order of the training, or all."""
        counts = np.diff(self._starts)[self.rows]
        fit = counts.cumsum() <= CHUNK_BYTES // (FLOAT * max(1, self._numbers))
        return np.sort(self.rows[: max(1, int(fit.sum()))])

    @property
    def _is_bounded(self) -> bool:
        """Whether the vectors of some rows aren't in memory."""
        return len(self.first_rows) < len(self.rows)

    @cached_property
    def _vectors(self) -> tuple[Tensor, ...]:
        """[vector, width] of what `_reads` names, at least in 32 bits, in `first_rows`."""
        table, rows = self.objective.table, self.first_rows
        runs, hits = (run.name for run in self._runs), (cell.hits for cell in self._cells)
        reads = tuple((number, *points) for number, points in self._reads)
        key = (
            id(self.model), table.name, table.row_keys, tuple(rows.tolist()),
            *runs, *hits, reads, self.side,
        )  # fmt: skip
        return self.cache.get(key, lambda: self._read_all(rows))

    def _read_all(self, rows: Ints) -> tuple[Tensor, ...]:
        """Return [vector, width] of what `_reads` names, in the order of the table's rows."""
        tensors = [
            tensor
            for number, points in self._reads
            for tensor in self._read(self._runs[number], self._cells[number], points, rows)
        ]
        assert len({len(tensor) for tensor in tensors}) <= 1
        return tuple(tensors)

    def _vectors_in(self, rows: Ints) -> tuple[Tensor, ...]:
        """Return `_vectors` in these rows; they are read again unless all rows fit into memory."""
        if self._is_bounded:
            return self._read_all(rows)
        which = torch.from_numpy(self._vectors_of(rows)[0])
        return tuple(vector[which.to(vector.device)] for vector in self._vectors)

    def _training_parts(self) -> list[Ints]:
        """Return the training rows, ascending, in parts whose vectors fit into memory."""
        rows, size = np.sort(self.rows[self.held_out_count :]), len(self.first_rows)
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    # --- patched runs

    @cached_property
    def _readout(self) -> Readout:
        return Readout.of([self.objective.measures[0]])

    @cached_property
    def _unpatched(self) -> UnpatchedRuns:
        """The base run and the runs that the measure compares it with."""
        objective, point = self.objective, self.declared.made
        said, (measure,) = objective.rules[0].spec, objective.spec.measures
        assert said.site is not None
        base = objective.spec.base
        line = spec.Save(
            span=said.span, site=said.site, at=said.at, run=base, file="", gradient=measure
        )
        save = ResolvedSave(line, base, (point,), (self._cells[0],), None, objective.measures[0])
        panel = build_save_panel(replace(objective, saves=(save,)))
        return UnpatchedRuns(
            panel, self.model, (self._readout,), plan=make_plan([]), side=self.side
        )

    def values(self, rows: Ints, edit: EditT | None) -> Tensor:
        """Return [row] float64 values of the measure, which carry gradients of the edit.

        The values are in ascending order of the rows; without an edit, those of the base run.
        Raises AutogradFailed.
        """
        rows = np.sort(rows)
        lanes = self._lanes(rows)
        writes = [] if edit is None else self._writes(rows, lanes, edit)
        circuits = [] if edit is None else self._circuits(rows, lanes, edit)
        if edit is not None and self._is_of_vectors(edit):
            writes = self._share_images(rows, writes)
        values = self._measure(rows, lanes, writes, circuits)
        self._unpatched.forget()
        return values

    def _lanes(self, rows: Ints, draws: int = 1) -> DrawLanes:
        """Return the lanes of a pass over rows in ascending order, with `draws` lanes for each."""
        return DrawLanes.of(self._unpatched.reader(self._runs[0], ())(rows), rows, draws)

    def _measure(
        self,
        rows: Ints,
        lanes: DrawLanes,
        writes: Sequence[SiteWrite],
        circuits: Sequence[CircuitWrite | CircuitRead],
        backward: BackwardRules | None = None,
    ) -> Tensor:
        """Return [row] float64 values of the measure in a pass.

        Raises AutogradFailed, and RuleNotApplied for a function without a rule in `backward`.
        """
        reading, _ = self._differentiate(rows, backward).read(writes, lanes, (), circuits)
        (values,) = self._readout.tensors(reading)
        return values

    def _differentiate(
        self, rows: Ints, backward: BackwardRules | None = None
    ) -> DifferentiatedRun:
        """Return the base run of some rows, with changes of derivatives."""
        return DifferentiatedRun(self._unpatched, self._runs[0], self._readout, rows, backward)

    @abstractmethod
    def _writes(self, rows: Ints, lanes: DrawLanes, edit: EditT) -> list[SiteWrite]:
        """Return what the edit writes in some rows, in ascending order of the rows."""

    def _is_of_vectors(self, edit: EditT) -> bool:
        """Return whether rows with equal vectors at equal tokens in both runs get equal vectors."""
        return False

    @cached_property
    def _edited_images(self) -> list[Hashable]:
        return list_edited_images(self.objective)

    def _share_images(self, rows: Ints, writes: Sequence[SiteWrite]) -> list[SiteWrite]:
        """Let rows that get the same vectors in the same images share a pass of the vision encoder,
        forward and backward."""
        if all(write.stack != "vision" for write in writes):
            return list(writes)
        keys = [self._edited_images[row] for row in rows.tolist()]
        first = {key: lane for lane, key in reversed([*enumerate(keys)])}
        alike = torch.tensor([first[key] for key in keys])
        return [
            replace(write, alike=alike) if write.stack == "vision" else write for write in writes
        ]

    def _circuits(self, rows: Ints, lanes: DrawLanes, edit: EditT) -> list[CircuitWrite]:
        """Return the edges that the edit changes in some rows: none."""
        return []

    def _vectors_of(self, rows: Ints) -> tuple[Ints, Ints]:
        """Return [vector] the numbers of the vectors of some rows, and [row] how many each has."""
        starts = self._starts
        parts = zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True)
        which = np.concatenate([np.arange(first, end) for first, end in parts])
        return which, starts[rows + 1] - starts[rows]

    def _places(self, rows: Ints, lanes: DrawLanes) -> tuple[Tensor, Tensor]:
        """Return [vector] the lanes and the tokens of the vectors of some rows, for one draw of the
        rows after the other."""
        which, counts = self._vectors_of(rows)
        draws = len(lanes.prompts) // len(rows)
        draw = np.arange(draws).repeat(len(which))
        lane = lanes.of_draw(np.tile(np.repeat(rows, counts), draws), draw)
        hits = self._cells[0].hits
        token = np.array([token for row in rows for token in hits[row][0]], dtype=np.int64)
        return torch.from_numpy(lane), torch.from_numpy(np.tile(token, draws))

    def mean(self, rows: Ints, edit: EditT | None, batch: int) -> float:
        """Return the mean of the measure over rows, `batch` of them in one pass."""
        rows = np.sort(rows)
        with torch.no_grad():
            parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            return float(torch.cat([self.values(part, edit) for part in parts]).mean())


@dataclass(frozen=True, eq=False)
class ObjectiveRows(EffectRows[Edit]):
    """The rows of a training that edits the vectors of one site."""

    @property
    def _reads(self) -> Sequence[tuple[int, Sequence[SitePoint]]]:
        return [(0, [self.declared.made]), (1, [self.declared.made])]

    @property
    def first_vectors(self) -> Tensor:
        """[vector, width] vectors of the base run in these rows, in the order of the table's rows:
        those that a training starts with."""
        return self._vectors[0]

    @cached_property
    def image_vectors(self) -> Tensor | None:
        """[vector, width] vectors of the tokens of some images, if the edit is at tokens that were
        inserted into them; None otherwise."""
        run, hits = self._runs[0], self._cells[0].hits
        first = int(self.rows[0])
        row = run.rows[first]
        new = {token for tokens in row.places.get(INSERTED_SPAN, ()) for token in tokens}
        if not new.intersection(hits[first][0]):
            return None
        others = tuple(token for token in range(len(row.ids)) if token not in new)
        cell = PositionCell(IMAGE_SPAN, ((others,),) * len(hits))
        return self._read(run, cell, [self.declared.made], self.rows[:IMAGE_ROWS])[0]

    def mean_difference(self) -> Tensor | None:
        """Return [width]: the mean of vectors of the source run minus those of the base run over
        training rows; None without a source run."""
        if self.objective.spec.source is None:
            return None
        count = sum(len(self._vectors_of(part)[0]) for part in self._training_parts())
        difference: Tensor | None = None
        for part in self._training_parts():
            vectors, other = self._vectors_in(part)
            mean = len(vectors) / count * (other - vectors).mean(0)
            difference = mean if difference is None else difference + mean
        return difference

    def _is_of_vectors(self, edit: Edit) -> bool:
        return True

    def _writes(self, rows: Ints, lanes: DrawLanes, edit: Edit) -> list[SiteWrite]:
        """Return the edited vectors of some rows."""
        vectors, other = self._vectors_in(rows)
        point, written = self.declared.made, edit(vectors, other)
        return [write_point(point, self.model, *self._places(rows, lanes), written)]


@dataclass(frozen=True, eq=False)
class EditLoss:
    """An edit with its loss, as `mechdsl.fits.training` trains it."""

    edited: TrainedEdit
    rows: ObjectiveRows
    batch: int
    """Largest number of rows of a pass."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.edited.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        return self.edited.memory

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the mean loss of the rows with these numbers."""
        sign, rows = 1 if self.rows.declared.minimises else -1, inputs.numpy()
        edited = self.edited
        if progress >= 1:  # held-out rows, without gradients
            mean = torch.tensor(self.rows.mean(rows, edited.edit, self.batch))
            return sign * mean + edited.penalty()
        relaxed = partial(edited.relaxed_edit, progress=progress)
        return sign * self.rows.values(rows, relaxed).mean() + edited.penalty()

    def after_step(self) -> None:
        self.edited.after_step()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}
