"""Training of a declared rotation: patched runs with gradients, its controls and its files.

In each step, the base runs of some rows are run again with vectors x + (y − x) RᵀR at the named
tokens, where x are the vectors of the base run and y those of the source run. The rows of R are the
directions that are trained, and the loss is the measure, or its negative, as a mean over the rows.

References:
    Geiger et al. 2023, arXiv 2303.02536.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.base.safetensors_files import compute_digest
from mechdsl.execute.measurement.readout import Readout
from mechdsl.execute.patching.differentiated_run import DifferentiatedRun, DrawLanes
from mechdsl.execute.run_record import ROTATION_FILE, RotationReport
from mechdsl.execute.training import (
    count_held_out,
    order_rows,
    read_settings,
    run_training,
    start_generator,
    write_card,
)
from mechdsl.execute.unpatched_runs import UnpatchedRuns
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.fits.rotations import Rotation, exchange
from mechdsl.fits.training import Training
from mechdsl.forward.hooks.batch import SiteWrite
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import PaddingSide, unit_count
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import build_save_panel
from mechdsl.program import spec
from mechdsl.program.trainers import TRAINERS
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.resolve.trainings import ROTATION, paired_positions
from mechdsl.resolve.types import ResolvedExperiment, ResolvedSave, TrainedRotation
from mechdsl.resolve.types import Training as DeclaredTraining

Subspace = Tensor | Literal["none", "whole"]
"""What is patched: the span of [dims, width] orthonormal rows, nothing, or the whole vector."""


@dataclass(frozen=True, eq=False)
class RotationRows:
    """The rows, the vectors and the measure that a rotation is trained on."""

    declared: DeclaredTraining
    objective: ResolvedExperiment
    """The rows, the patch and the measure."""
    model: LoadedModel
    side: PaddingSide | None

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
        measure = self.objective.measures[0]
        lacking = {*measure.absent, *(row for atom in measure.atoms for row in atom.lacking)}
        there = [row for row, hits in enumerate(self._cells[0].hits) if hits and row not in lacking]
        return order_rows(self.declared, self.objective.table, np.array(there, dtype=np.int64))

    @cached_property
    def held_out_count(self) -> int:
        """Number of rows at the start of `rows` that the training doesn't use."""
        return count_held_out(self.declared, len(self.rows))

    @property
    def chunks(self) -> int:
        """One: the vectors of all rows are in memory."""
        return 1

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of the training rows, twice."""
        rows = torch.from_numpy(self.rows[self.held_out_count :])
        return rows, rows

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

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """[vector, width] each, at least in 32 bits: vectors of the base run, and those that come
        in for them; in the order of the table's rows."""
        own, other = (self._read(*each) for each in zip(self._runs, self._cells, strict=True))
        assert own.shape == other.shape
        return own, other

    def _read(self, run: PromptRun, cell: PositionCell) -> Tensor:
        point, seed = self.declared.made, self.objective.seed
        reader = build_reader(
            self.model, self.objective.table, run, [point], seed=seed, side=self.side
        )
        batches = split_prompts(self.model, run, [point], np.sort(self.rows))
        with torch.no_grad():
            found = [
                each.vectors.clone() for each in read_vectors(reader, [point], [cell], batches)
            ]
        joined = torch.cat(found)
        return joined.to(torch.promote_types(joined.dtype, torch.float32))

    @cached_property
    def _starts(self) -> Ints:
        """[row of the table] number of its first vector."""
        counts = np.zeros(len(self.objective.table), dtype=np.int64)
        counts[self.rows] = [len(self._cells[0].hits[row][0]) for row in self.rows]
        return np.concatenate([[0], np.cumsum(counts)])

    # --- patched runs

    @cached_property
    def _readout(self) -> Readout:
        return Readout.of([self.objective.measures[0]])

    @cached_property
    def _unpatched(self) -> UnpatchedRuns:
        """The base run and the runs that the measure compares it with."""
        own, point = self.objective, self.declared.made
        said, (measure,) = own.rules[0].spec, own.spec.measures
        assert said.site is not None
        base = own.spec.base
        line = spec.Save(
            span=said.span, site=said.site, at=said.at, run=base, file="", gradient=measure
        )
        save = ResolvedSave(line, base, (point,), (self._cells[0],), None, own.measures[0])
        panel = build_save_panel(replace(own, saves=(save,)))
        return UnpatchedRuns(
            panel, self.model, (self._readout,), plan=make_plan([]), side=self.side
        )

    def values(self, rows: Ints, subspace: Subspace) -> Tensor:
        """Return [row] float64 values of the measure, which carry gradients of the subspace.

        The values are in ascending order of the rows. Raises AutogradFailed.
        """
        rows, runs = np.sort(rows), self._unpatched
        run = self._runs[0]
        lanes = DrawLanes.of(runs.reader(run, ())(rows), rows, 1)
        writes = (
            []
            if isinstance(subspace, str) and subspace == "none"
            else [self._write(rows, lanes, subspace)]
        )
        differentiated = DifferentiatedRun(runs, run, self._readout, rows)
        reading, _ = differentiated.read(writes, lanes, ())
        (values,) = self._readout.tensors(reading)
        runs.forget()
        return values

    def _write(self, rows: Ints, lanes: DrawLanes, subspace: Tensor | str) -> SiteWrite:
        """Return the patch of some rows."""
        starts, hits, point = self._starts, self._cells[0].hits, self.declared.made
        counts = starts[rows + 1] - starts[rows]
        parts = zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True)
        which = np.concatenate([np.arange(first, end) for first, end in parts])
        own, other = (each[torch.from_numpy(which).to(each.device)] for each in self.vectors)
        changed = other if isinstance(subspace, str) else exchange(own, other, subspace)
        lane = lanes.of_draw(np.repeat(rows, counts), np.zeros(len(which), dtype=np.int64))
        token = np.array([token for row in rows for token in hits[row][0]], dtype=np.int64)
        units = unit_count(self.model.shape, point.site, point.layer) if point.unit is None else 1
        unit = torch.arange(units) if point.unit is None else torch.tensor([point.unit])
        return SiteWrite(
            point.site,
            point.layer,
            torch.from_numpy(lane).repeat_interleave(units),
            torch.from_numpy(token).repeat_interleave(units),
            unit.repeat(len(which)),
            changed.reshape(len(which) * units, -1),
        )

    def mean(self, rows: Ints, subspace: Subspace, batch: int) -> float:
        """Return the mean of the measure over rows, `batch` of them in one pass."""
        rows = np.sort(rows)
        with torch.no_grad():
            parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            return float(torch.cat([self.values(each, subspace) for each in parts]).mean())


@dataclass(frozen=True, eq=False)
class RotationObjective:
    """A rotation with its loss, as `mechdsl.fits.training` trains it."""

    rotation: Rotation
    rows: RotationRows
    sign: int
    """1 if the measure is minimised, -1 if it is maximised."""
    batch: int
    """Largest number of rows of a pass."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.rotation.parameters

    @property
    def memory(self) -> Mapping[str, Tensor]:
        return {}

    def loss(self, inputs: Tensor, targets: Tensor, step: int, progress: float) -> Tensor:
        """Return the mean loss of the rows with these numbers."""
        directions = self.rotation.directions()
        if len(inputs) > self.batch:  # held-out rows, without gradients
            return torch.tensor(self.sign * self.rows.mean(inputs.numpy(), directions, self.batch))
        return self.sign * self.rows.values(inputs.numpy(), directions).mean()

    def after_step(self) -> None:
        self.rotation.after_step()

    def weights(self) -> dict[str, Tensor]:
        return {ROTATION: self.rotation.directions().detach()}


def train_rotation(
    declared: TrainedRotation,
    rows: RotationRows,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    checkpoints: Path,
    due: Callable[[], bool],
    on_step: Callable[[int, int], None],
) -> RotationReport:
    """Train a rotation, and write it to a folder.

    See `mechdsl.execute.training.train_dictionary` for the arguments.

    Raises:
        AutogradFailed: The model can't be differentiated.
        NotFinite: The measure or a weight became NaN or infinite.
        OSError: A file can't be written.
    """
    training, settings = declared.training, read_settings(declared.training)
    trainer = TRAINERS[training.trainer]
    with torch.enable_grad():
        rotation = trainer.start_rotation(
            rows.vectors[0], training.of_trainer, start_generator(training)
        )
        start = rotation.directions().detach()
        sign = 1 if training.minimises else -1
        model = RotationObjective(rotation, rows, sign, settings.batch)
        loop = Training(model, rows, rows.held_out(), settings, lambda own, other: (own, other))
        run_training(loop, checkpoints, due, on_step)
    trained = model.weights()[ROTATION]
    save_file({ROTATION: trained.cpu().contiguous()}, folder / ROTATION_FILE)
    (folder / ROTATION_FILE).chmod(0o644)
    held_out = rows.rows[: rows.held_out_count]
    measured = held_out if len(held_out) else rows.rows
    cases: tuple[Subspace, ...] = (trained, start, "none", "whole")
    means = [rows.mean(measured, each, settings.batch) for each in cases]
    report = RotationReport(
        len(rows.rows) - len(held_out),
        len(held_out),
        loop.state.step,
        loop.state.stopped,
        rows.text,
        *means,
    )
    digest = compute_digest(folder / ROTATION_FILE)
    write_card(folder, {**facts, "sha256": digest}, report)
    return report
