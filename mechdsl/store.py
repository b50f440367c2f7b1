"""Results on disk: what is finished is kept, whatever happens next."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mechdsl.execute import Measured
from mechdsl.plan import ExperimentPlan
from mechdsl.results.statistics import Floats
from mechdsl.rule_plan import Rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Store:
    """`--out DIR`: per experiment a JSON Lines file with the values of every prompt.

    The first line names axes and measures; then one line per cell and batch of prompts, written
    as soon as its forward pass is done.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder / stem
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        self._plans: dict[str, ExperimentPlan] = {}

    def open(self, plan: ExperimentPlan) -> None:
        """Start an experiment's file."""
        experiment = plan.experiment
        path = self.folder / f"{experiment.name}.jsonl"
        self._files[experiment.name] = path.open("w", encoding="utf-8")
        self._plans[experiment.name] = plan
        self._line(
            experiment.name,
            {
                "schema": 1,
                "experiment": experiment.name,
                "axes": [axis.name for axis in experiment.axes],
                "measures": [
                    {"label": m.label, "metric": m.text, "effect": s.effect}
                    for m, s in zip(experiment.measures, experiment.spec.measures, strict=True)
                ],
            },
        )

    def unpatched(self, measured: Measured) -> None:
        """The values of base and source runs, which every effect is set against."""
        ids = [measured.experiment.table.row_ids[i] for i in measured.kept]
        for run, values in measured.unpatched.items():
            for number, item in enumerate(measured.environments):
                line: dict[str, Any] = {"run": run, "rows": ids}
                if item is not None:
                    line["item"] = item
                line["values"] = [[_number(v) for v in found[number]] for found in values]
                self._line(measured.experiment.name, line)

    def rows(self, measured: Measured, rows: Rows, values: Sequence[Floats]) -> None:
        """The patched values of one pass, by cell. Runs under one label are listed side by side."""
        name = measured.experiment.name
        plan = self._plans[name]
        for cell in np.unique(rows.cell):
            chosen = np.flatnonzero(rows.cell == cell)
            coords = {
                axis.name: axis.labels[int(index[cell])]
                for axis, index in zip(measured.experiment.axes, plan.coordinates, strict=True)
            }
            self._line(
                name,
                {
                    "cell": int(cell),
                    "coords": coords,
                    "rows": [measured.experiment.table.row_ids[i] for i in rows.prompt[chosen]],
                    "values": [[_number(float(v)) for v in found[chosen]] for found in values],
                },
            )

    def _line(self, name: str, content: dict[str, Any]) -> None:
        file = self._files[name]
        file.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
