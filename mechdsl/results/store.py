"""Results on disk: what is finished is kept, whatever happens next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.files import write_whole
from mechdsl.base.visible import json_text
from mechdsl.execute.measured_values import MeasuredValues
from mechdsl.plan.plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.results.variants import joined_axes


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


STATE, DOCUMENT = "state.json", "results.json"
State = Literal["running", "unfinished", "finished"]


def unfinished_folder(folder: Path, stem: str) -> Path:
    """Where a run keeps what it has, until it is finished."""
    return folder / f"{stem}.unfinished"


class Store:
    """`--out DIR`: per experiment a JSON Lines file with the values of every prompt.

    The first line names axes and measures; then one line per cell and batch of prompts, written
    as soon as its forward pass is done. The variants of an experiment have one file.

    All lies in `DIR/STEM.unfinished` until the run is finished, and only then in `DIR/STEM`, in
    place of what an earlier run has left there; `state.json` says which it is.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = unfinished_folder(folder, stem)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob("*.jsonl"), self.folder / DOCUMENT):
            left.unlink(missing_ok=True)
        self._target = folder / stem
        self._files: dict[str, IO[str]] = {}
        self._plans: dict[str, dict[str, ExperimentPlan]] = {}
        self._axes: dict[str, list[str]] = {}
        self._write_state(self.folder, "running")

    def _write_state(self, folder: Path, state: State) -> None:
        names = [f"{name}.jsonl" for name in self._files]
        write_whole(folder / STATE, json_text({"schema": 1, "state": state, "files": names}) + "\n")

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
                {"label": m.label, "metric": m.text, "effect": s.effect, "at": s.place}
                for m, s in zip(first.measures, first.spec.measures, strict=True)
            ],
        }
        self._files[name].write(json_text(head) + "\n")

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
        file.write(json_text(content) + "\n")
        file.flush()

    def close(self) -> None:
        """No more lines: either the run is finished, or it broke off, which its state then says."""
        with suppress(OSError):  # a full disk has been told of already
            for name, file in self._files.items():
                if name not in self._axes:
                    self._head(name)
                file.close()
            self._write_state(self.folder, "unfinished")

    def finish(self, document: str) -> None:
        """Keep the results too, and move all to where finished runs lie. OSError where that fails.

        document: of the results, as JSON.
        """
        self._target.mkdir(parents=True, exist_ok=True)
        for name in (STATE, DOCUMENT):  # from here on it isn't the earlier run any more
            (self._target / name).unlink(missing_ok=True)
        for name in self._files:
            (self.folder / f"{name}.jsonl").replace(self._target / f"{name}.jsonl")
        write_whole(self._target / DOCUMENT, document + "\n")
        self._write_state(self._target, "finished")
        (self.folder / STATE).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            self.folder.rmdir()
