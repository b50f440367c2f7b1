"""Results on disk: what is finished is kept, whatever happens next."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.plan.plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.results.variants import joined_axes


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Store:
    """`--out DIR`: per experiment a JSON Lines file with the values of every prompt.

    The first line names axes and measures; then one line per cell and batch of prompts, written
    as soon as its forward pass is done. The variants of an experiment have one file.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder / stem
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        self._plans: dict[str, dict[str, ExperimentPlan]] = {}
        self._axes: dict[str, list[str]] = {}

    def open(self, plan: ExperimentPlan) -> None:
        """Start the file of an experiment, or add a variant to it before its first line."""
        experiment = plan.experiment
        if experiment.name not in self._files:
            path = self.folder / f"{experiment.name}.jsonl"
            self._files[experiment.name] = path.open("w", encoding="utf-8")
        self._plans.setdefault(experiment.name, {})[experiment.key] = plan

    def _head(self, name: str) -> None:
        """The first line, when all variants are known."""
        experiments = [plan.experiment for plan in self._plans[name].values()]
        axes = joined_axes([(e.spec.variant, [a.name for a in e.axes]) for e in experiments])
        self._axes[name] = axes
        first = experiments[0]
        head = {
            "schema": 1,
            "experiment": name,
            "axes": axes,
            "measures": [
                {"label": m.label, "metric": m.text, "effect": s.effect}
                for m, s in zip(first.measures, first.spec.measures, strict=True)
            ],
        }
        self._files[name].write(json.dumps(head, ensure_ascii=False, allow_nan=False) + "\n")

    def unpatched(self, measured: MeasuredValues) -> None:
        """The values of base and source runs, which every effect is set against."""
        ids = [measured.experiment.table.row_ids[i] for i in measured.kept]
        for run, values in measured.unpatched.items():
            for number, item in enumerate(measured.environments):
                line: dict[str, Any] = {"run": run, "rows": ids}
                if measured.experiment.spec.variant:
                    line["variant"] = dict(measured.experiment.spec.variant)
                if item is not None:
                    line["item"] = item
                line["values"] = [[_number(v) for v in found[number]] for found in values]
                self._line(measured.experiment.name, line)

    def rows(self, measured: MeasuredValues, rows: Rows, values: Sequence[Floats]) -> None:
        """The patched values of one pass, by cell. Runs under one label are listed side by side."""
        experiment = measured.experiment
        name = experiment.name
        plan = self._plans[name][experiment.key]
        before = self._before(plan)
        for cell in np.unique(rows.cell):
            chosen = np.flatnonzero(rows.cell == cell)
            coords: dict[str, Any] = dict(experiment.spec.variant)
            for axis, index in zip(experiment.axes, plan.coordinates, strict=True):
                coords[axis.name] = axis.labels[int(index[cell])]
            self._line(
                name,
                {
                    "cell": before + int(cell),
                    "coords": coords,
                    "rows": [measured.experiment.table.row_ids[i] for i in rows.prompt[chosen]],
                    "values": [[_number(float(v)) for v in found[chosen]] for found in values],
                },
            )

    def _before(self, plan: ExperimentPlan) -> int:
        """Cells of the variants before this one."""
        plans = list(self._plans[plan.experiment.name].values())
        return sum(each.n_cells for each in plans[: plans.index(plan)])

    def _line(self, name: str, content: dict[str, Any]) -> None:
        if name not in self._axes:
            self._head(name)
        file = self._files[name]
        file.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()

    def close(self) -> None:
        for name, file in self._files.items():
            if name not in self._axes:
                self._head(name)
            file.close()
        self._files.clear()
