"""The measure of an experiment as a function of written vectors, with gradients.

A tensor is written into the base runs of the rows before the rules of the experiment act. The
vectors, means and donors that rules read come from unpatched runs, without the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.execute.image_vectors import find_image_problem, provide_images
from mechdsl.execute.patching.differentiated_run import DifferentiatedRun, DrawLanes, write_point
from mechdsl.execute.patching.rows import Patcher
from mechdsl.execute.patching.writes import build_writes, select_readable_rows
from mechdsl.execute.run.panel import PanelRunner, choose_pass_sizes
from mechdsl.execute.run_record import ExecutionOptions, ExecutionProfile
from mechdsl.execute.vectors import build_reader, read_vectors, split_prompts
from mechdsl.forward.hooks.batch import SiteWrite
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.planner.passes import make_plan
from mechdsl.planner.rows import RowTable
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.types import ResolvedExperiment, SitePoint, count_numbers
from mechdsl.vocab.metrics import EFFECTS

ObjectiveMode: TypeAlias = Literal["set", "add"]
"""Whether a tensor replaces the vectors, or is added to them."""


class ObjectiveFailed(Exception):
    """The unpatched runs of an objective can't be used; `problems` has the reasons."""

    def __init__(self, problems: Sequence[Diagnostic]) -> None:
        """Store the reasons."""
        super().__init__(str(problems[0]))
        self.problems = problems


@dataclass(frozen=True, eq=False)
class ObjectiveVectors:
    """The vectors that a tensor stands for, as parallel columns."""

    row: Ints
    """[vector] index of the row."""
    slot: Ints
    """[vector] index within the position."""
    token: Ints
    """[vector]"""

    @staticmethod
    def of(cell: PositionCell, prompts: Ints) -> ObjectiveVectors:
        """List the vectors of a position in rows of a table."""
        tokens = [cell.hits[prompt][0] for prompt in prompts]
        counts = [len(token) for token in tokens]
        return ObjectiveVectors(
            np.repeat(np.arange(len(prompts)), counts),
            np.concatenate([np.arange(count) for count in counts]),
            np.concatenate([np.array(token, dtype=np.int64) for token in tokens]),
        )


class ObjectiveRun:
    """Base runs of an experiment with written vectors and the experiment's rules."""

    def __init__(
        self,
        experiment: ResolvedExperiment,
        point: SitePoint,
        cell: PositionCell,
        models: Mapping[str, LoadedModel],
        options: ExecutionOptions,
    ) -> None:
        """Run the unpatched runs.

        Args:
            experiment: With one measure and one cell.
            point: The vectors that are written.
            cell: Their tokens.
            models: Loaded models by key.
            options: Sizes of passes.

        Raises:
            ObjectiveFailed: Images can't be read (E0413, E0458), an unpatched run has no value, or
                no row is left.
        """
        problem = find_image_problem(experiment, models)
        if problem is not None:
            raise ObjectiveFailed([problem])
        plan = make_plan([experiment])
        (panel,) = plan.panels
        self.model = models[panel.model]
        self.experiment, self.point, self.cell = experiment, point, cell
        self._panel = PanelRunner(
            panel,
            self.model,
            plan,
            options.side,
            choose_pass_sizes([experiment], models, options),
            ExecutionProfile(),
            others={name: models[name] for name in panel.models[1:]},
        )
        self._panel.prepare(lambda _: {})
        problems = self._panel.lost.get(experiment.key, [])
        if problems:
            raise ObjectiveFailed(problems)
        (self._plan,) = self._panel.running
        self._readout = self._panel.readouts[experiment.key]
        self.prompts = self._select_prompts()
        """[row] ascending rows of the table: those that have the position, a value of the measure
        and everything that rules read."""
        self.run = experiment.table.runs[experiment.spec.base]
        if not len(self.prompts):
            raise ObjectiveFailed([_report_no_rows(experiment, cell)])
        self.vectors = ObjectiveVectors.of(cell, self.prompts)
        self._rules = self._build_rules() if experiment.rules else []

    @property
    def shape(self) -> tuple[int, int, int]:
        """[row, position, width] of a tensor. A vector has the numbers of all heads or neurons,
        unless the site names one."""
        width = count_numbers(self.point, self.model.shape)
        return len(self.prompts), int(self.vectors.slot.max()) + 1, width

    def _select_prompts(self) -> Ints:
        kept = self._panel.measured[self.experiment.key].kept
        (measure,) = self.experiment.measures
        lacking = {*measure.absent, *(row for atom in measure.atoms for row in atom.lacking)}
        if self.experiment.rules:
            rows = self._plan.rows(kept)
            inputs = self._panel.means_and_donors[self.experiment.key]
            good = select_readable_rows(self._plan, rows, inputs, self._readout.passes)
            kept = np.unique(rows.take(good).prompt)
        prompts = [row for row in kept.tolist() if row not in lacking and self.cell.hits[row]]
        return np.array(prompts, dtype=np.int64)

    def _build_rules(self) -> list[SiteWrite]:
        """Build the writes of the rules in all rows, whose values don't depend on the tensor."""
        inputs = self._panel.means_and_donors[self.experiment.key]
        patcher = Patcher(
            self._panel.plan, [self._plan], [self._readout], [inputs], self._panel.runs, [()]
        )
        rows, none = self._rows(), np.zeros(len(self.prompts), dtype=np.int64)
        lanes_of = patcher.lanes_of(0, self.prompts, None)
        writes = build_writes(self._plan, rows, none, lanes_of, inputs, self.model.shape)
        # Tensors created in inference mode can't be differentiated.
        return [
            replace(w, values=w.values.clone(), to=None if w.to is None else w.to.clone())
            for w in writes
        ]

    def _rows(self) -> RowTable:
        none = np.zeros(len(self.prompts), dtype=np.int64)
        return RowTable(none, self.prompts, none)

    def find_overwriting_rule(self) -> int | None:
        """Return the number of a rule that replaces a written vector; None if none does."""
        every = np.ones(len(self.prompts), dtype=np.bool_)
        site_write = self._write(torch.zeros(self.shape), every)
        places = set(_list_places(site_write))
        for write in self._rules:
            replaces = write.where == site_write.where and write.mode == "set"
            if replaces and not places.isdisjoint(_list_places(write)):
                return write.rule
        return None

    def read_start(self) -> Tensor:
        """Return [row, position, width]: the vectors of the base run, at least in 32 bits; 0 at
        positions that a row lacks."""
        run, seed = self.run, self.experiment.seed
        side, model = self._panel.runs.side, self.model
        reader = build_reader(model, self.experiment.table, run, [self.point], seed=seed, side=side)
        batches = split_prompts(model, run, [self.point], self.prompts)
        with torch.no_grad():
            every = read_vectors(reader, [self.point], [self.cell], batches)
            vectors = torch.cat([site_vectors.vectors.clone() for site_vectors in every])
        wide = torch.promote_types(vectors.dtype, torch.float32)
        tensors = torch.zeros(self.shape, dtype=wide, device=vectors.device)
        row, slot = torch.from_numpy(self.vectors.row), torch.from_numpy(self.vectors.slot)
        tensors[row, slot] = vectors.to(wide)
        return tensors

    def values(self, tensor: Tensor, rows: Ints, mode: ObjectiveMode) -> Tensor:
        """Return [row] float64: the measure of rows in which the tensor is written.

        Args:
            tensor: [row, position, width].
            rows: Indices into `prompts`, ascending.
            mode: How the tensor is written.

        Raises:
            AutogradFailed: The model can't be differentiated.
        """
        runs, prompts = self._panel.runs, self.prompts[rows]
        # A model from Python forgets its images after each call.
        provide_images(self.model, (self.run.rows[prompt] for prompt in prompts.tolist()))
        differentiated = DifferentiatedRun(runs, self.run, self._readout, self.prompts)
        lanes = DrawLanes.of(differentiated.unpatched(), prompts, 1)
        is_used = np.zeros(len(self.prompts), dtype=np.bool_)
        is_used[rows] = True
        site_write = replace(self._write(tensor, is_used), mode=mode)
        writes = [site_write, *(_select_rows(rule, is_used) for rule in self._rules)]
        reading, _ = differentiated.read(writes, lanes, ())
        items = [self._plan.items[0]] * len(prompts)
        (values,) = self._readout.tensors(replace(reading, items=items))
        (said,) = self.experiment.spec.measures
        base = self._panel.measured[self.experiment.key].base_of(self._plan, self._rows())[0]
        compared = torch.from_numpy(base[rows]).to(values)
        return EFFECTS[said.effect].numerator(values, compared, None)

    def _write(self, tensor: Tensor, is_used: Bools) -> SiteWrite:
        """Write [row, position, width] at the tokens of the used rows."""
        where = self.vectors
        mask = is_used[where.row]
        row = torch.from_numpy((np.cumsum(is_used) - 1)[where.row[mask]])
        slot, token = torch.from_numpy(where.slot[mask]), torch.from_numpy(where.token[mask])
        vectors = tensor[row.to(tensor.device), slot.to(tensor.device)]
        return write_point(self.point, self.model, row, token, vectors)


def _report_no_rows(experiment: ResolvedExperiment, cell: PositionCell) -> Diagnostic:
    return BadArgument(
        span=experiment.spec.span,
        name=cell.label,
        reason="is in no row that the experiment measures",
        hint="name a position that measured rows have",
    )


def _list_places(write: SiteWrite) -> list[tuple[int, ...]]:
    columns = (write.rows.tolist(), write.positions.tolist(), write.units.tolist())
    return list(zip(*columns, strict=True))


def _select_rows(write: SiteWrite, is_used: Bools) -> SiteWrite:
    """Select the vectors of some rows, and renumber the rows."""
    number = torch.from_numpy(np.cumsum(is_used) - 1)
    return write.some(torch.from_numpy(is_used)[write.rows]).moved(number)
