"""Whether the model is right, of every row of the table: also of those that `keep` drops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.found import Found
from mechdsl.execute.readout import Readout
from mechdsl.execute.unusable import Unusable
from mechdsl.plan.plan import Panel
from mechdsl.resolve.resolved import ResolvedExperiment

Read = Callable[[Readout, str, Ints, int | None, float], Found]
"""What is read of an unpatched run on some rows, by occurrence and rounding."""


@dataclass(frozen=True)
class Accuracies:
    """Of the runs that `accuracy(RUN)` asks for, filled as batches finish."""

    experiment: ResolvedExperiment
    values: dict[str, Floats]
    """Run → [row of the table], 1 where the answer is the best token, else 0."""
    rounding: dict[str, Floats]
    """The same: 1 where rounding may decide it."""
    unusable: dict[int, Unusable] = field(default_factory=dict[int, Unusable])
    """Rows in which a run can't be used."""

    def readouts(self) -> Iterator[tuple[str, Readout]]:
        """What is read of which run."""
        for run, correct in self.experiment.accuracies.items():
            yield run, Readout.of([correct])

    def measure(self, read: Read, rounding: float, batch: Ints) -> None:
        """Read the runs on some rows.

        rounding: how far it may move a logit, relative to the largest one.
        """
        for run, readout in self.readouts():
            found = read(readout, run, batch, None, rounding)
            self.values[run][batch] = found.values[0]
            self.rounding[run][batch] = found.rounding[0]
            for row in batch[found.broken].tolist():
                self.unusable.setdefault(row, Unusable(row, run))


def unmeasured_accuracies(panel: Panel) -> dict[str, Accuracies]:
    """Of each experiment by its key, NaN everywhere."""
    rows = len(panel.table)

    def unknown(experiment: ResolvedExperiment) -> dict[str, Floats]:
        return {run: np.full(rows, np.nan) for run in experiment.accuracies}

    every = [plan.experiment for plan in panel.experiments]
    return {each.key: Accuracies(each, unknown(each), unknown(each)) for each in every}
