"""Reports of trainings with several seeds, `fit(…, seeds: 5)`: their mean and its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from mechdsl.execute.run_record import FitReport, Report, TrainedFit
from mechdsl.statistics.intervals import mean_half_width

CONFIDENCE = 95.0
"""Level of the intervals over seeds, in percent."""


@dataclass(frozen=True)
class SeedReports:
    """The trainings of one `fit(…, seeds: 5)` at one site."""

    basis: str
    """`d`, or `d[layer 3]` of a family."""
    fits: tuple[TrainedFit, ...]

    @property
    def mean(self) -> Report:
        """A report with the mean of each number."""
        return self._combined(lambda values: float(np.mean(values)))

    @property
    def half_width(self) -> Report:
        """A report with half the width of each mean's interval over seeds, by Student's t; NaN
        where all numbers are equal."""
        return self._combined(lambda values: mean_half_width(np.array(values), CONFIDENCE))

    def _combined(self, combine: Callable[[list[float]], float]) -> Report:
        """Return a report with combined numbers, and the amounts of the first training."""
        first = self.fits[0].report
        found: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(first)}
        for name in found.keys() - {field.name for field in fields(FitReport)}:
            values = [getattr(fit.report, name) for fit in self.fits]
            if all(type(value) in (int, float) for value in values):
                found[name] = combine(values)
        return type(first)(**found)

    def to_dict(self) -> dict[str, Any]:
        """Return the mean and both ends of the interval of each number as JSON; None for an end
        where all numbers are equal."""
        mean, far = asdict(self.mean), asdict(self.half_width)
        numbers = {n: (own, far[n]) for n, own in mean.items() if type(own) is float}
        return {
            "basis": self.basis,
            "seeds": [fit.seed for fit in self.fits],
            "confidence": CONFIDENCE,
            "mean": {name: own for name, (own, _) in numbers.items()},
            "low": {name: _end(own - width) for name, (own, width) in numbers.items()},
            "high": {name: _end(own + width) for name, (own, width) in numbers.items()},
        }


def _end(value: float) -> float | None:
    return value if np.isfinite(value) else None


def group_by_seeds(fits: Sequence[TrainedFit]) -> list[SeedReports]:
    """Return the trainings with several seeds, together; those that failed are missing."""
    groups: dict[tuple[str, str], list[TrainedFit]] = {}
    for fit in fits:
        if fit.family is not None:
            groups.setdefault((fit.family, fit.site), []).append(fit)
    several = ((name, own) for (name, _), own in groups.items() if len(own) > 1)
    return [SeedReports(name, tuple(own)) for name, own in several]
