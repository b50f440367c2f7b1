"""mechdsl: a `.mech` file on a model that is passed from Python.

Loading, verifying and checking the file are not timed; planning and running are.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

import numpy as np
from tokenizers import Tokenizer

from benchmarks.model import build
from benchmarks.tools.base import Timed, Tool
from benchmarks.work import Picks, Work, count
from mechdsl.base.text import Source, Span
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute.run.panel import Execution, execute
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import PASS_NAMES, make_plan
from mechdsl.program import spec
from mechdsl.resolve.types import ModelContext
from mechdsl.results.assembly.collection import check_denominators


class Mechdsl(Tool):
    """One file, planned and executed."""

    packages = ("mechdsl", "torch", "transformers")
    whole = True
    without: frozenset[str] = frozenset()
    """Passes of the planner that are switched off."""

    def load(self, work: Work, folder: Path) -> None:
        self.work = work
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model, found = adopt_model("gpt2", build(work.shape), tokenizer)
        if model is None:
            raise RuntimeError(str(found))
        self.model = model
        path = folder / "sweep.mech"
        self.source = Source(path.read_text(), path)
        self.checked = self._check(CheckSettings())
        self._compare_prompts()
        self._executed(self._check(CheckSettings(limit=1)))

    def run(self, picks: Picks) -> Timed:
        if count(picks) < count(self.work.picks()):
            raise ValueError("mechdsl runs all cells of a file")
        start = perf_counter()
        execution = self._executed(self.checked)
        seconds = perf_counter() - start
        if execution.diagnostics:
            raise RuntimeError(str(execution.diagnostics))
        measured = execution.measured["sweep"]
        assert list(measured.kept) == list(range(self.work.n_rows))
        table = np.empty_like(measured.patched[0])
        table[:, self.columns] = measured.patched[0]
        return Timed(table, 0.0, seconds)

    def _executed(self, checked: CheckedFile) -> Execution:
        plan = make_plan(checked.experiments, without=self.without)
        return execute(plan, {"gpt2": self.model}, check=check_denominators)

    def _check(self, settings: CheckSettings) -> CheckedFile:
        assert self.model.tokenizer is not None
        statement = spec.Model(span=Span(self.source, 0, 0), name="gpt2", kind="local", path="")
        context = ModelContext(statement, self.model.shape, self.model.tokenizer)
        checked = check_source(self.source, settings, {"gpt2": context})
        if has_errors(checked.diagnostics):
            raise RuntimeError(str(checked.diagnostics))
        return checked

    def _compare_prompts(self) -> None:
        """The file's tokens and cells are those of the work, row by row."""
        (experiment,) = self.checked.experiments
        table = experiment.table
        self.columns = list(table.row_ids)
        assert experiment.n_cells == len(self.work.cells)
        axes = [axis.name for axis in experiment.axes]
        assert axes == sorted(axes, key=["layer", "head", "position"].index)
        for batch in self.work.batches:
            for number, row in enumerate(batch.rows):
                at = self.columns.index(row)
                assert list(table.runs["clean"].rows[at].ids) == batch.clean[number]
                assert list(table.runs["corrupted"].rows[at].ids) == batch.corrupted[number]


class Whole(Mechdsl):
    """The same by whole passes, without any of the planner's passes."""

    without = frozenset(PASS_NAMES)
