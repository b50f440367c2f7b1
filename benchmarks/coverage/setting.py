"""What is simulated, and when its figure fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mechdsl.base.arrays import Ints

SURE = 99.0
"""Per cent: of the interval of a figure that must reach into its bound."""
REPETITIONS = 10_000
Verdict = Literal["holds", "fails", "printed"]
Run = Callable[[np.random.Generator, int], Ints]
"""(random, repetitions) -> [figure, 2]: how often it came true, and of how many times."""


@dataclass(frozen=True)
class Figure:
    """A share of the repetitions, in per cent."""

    name: str
    low: float | None = None
    """Below it the figure fails; without both ends it is printed and not judged."""
    high: float | None = None
    surely: bool = False
    """Whether the whole interval of the figure must lie within, and not only reach into it."""

    @property
    def bound(self) -> str:
        """In words."""
        return f"all {self._ends}" if self.surely else self._ends

    @property
    def _ends(self) -> str:
        if self.low is None and self.high is None:
            return ""
        if self.low is None or self.high is None:
            return f"≤ {self.high:.4g}" if self.low is None else f"≥ {self.low:.4g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Setting:
    """Data of one kind, drawn again and again."""

    group: str
    name: str
    figures: tuple[Figure, ...]
    run: Run
    repetitions: int = REPETITIONS
    chunk: int = 250
    """Repetitions that share a call: they have the draws of the resampling in common."""
    first_key: str = ""
    """The first `key` of a setting whose names have changed."""

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def seed_key(self) -> str:
        """The text that random numbers depend on. A new name keeps it, and so the numbers."""
        return self.first_key or self.key


@dataclass(frozen=True)
class Outcome:
    """What one figure of a setting came to."""

    setting: Setting
    figure: Figure
    hits: int
    of: int
    repetitions: int

    @property
    def key(self) -> str:
        return f"{self.setting.key}: {self.figure.name}"

    @property
    def share(self) -> float:
        """In per cent, NaN where there was nothing to count."""
        return 100 * self.hits / self.of if self.of else float("nan")

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Clopper and Pearson's, in per cent."""
        from scipy.stats import binomtest

        if not self.of:
            return 0.0, 100.0
        found = binomtest(self.hits, self.of).proportion_ci(SURE / 100, method="exact")
        return 100 * float(found.low), 100 * float(found.high)

    @property
    def verdict(self) -> Verdict:
        """Fails where the interval of the figure lies outside the bound (where it must surely hold:
        not all inside), or there mostly is none of what should hold."""
        low, high = self.figure.low, self.figure.high
        if low is None and high is None:
            return "printed"
        if 2 * self.of < self.repetitions:
            return "fails"
        least, most = self.interval
        if self.figure.surely:
            least, most = most, least
        outside = (low is not None and most < low) or (high is not None and least > high)
        return "fails" if outside else "holds"


@dataclass(frozen=True)
class Judgement:
    """What all outcomes together come to."""

    judged: int
    failing: tuple[str, ...]
    """Keys of outcomes."""
    without_reason: tuple[str, ...]

    @property
    def good(self) -> bool:
        """At most one in ten falls short, each for a reason that is written down."""
        return not self.without_reason and 10 * len(self.failing) <= self.judged


def judge(outcomes: list[Outcome], reasons: dict[str, str]) -> Judgement:
    """reasons: key of an outcome that may fall short -> why, and what is printed there instead."""
    judged = [each for each in outcomes if each.verdict != "printed"]
    failing = tuple(each.key for each in judged if each.verdict == "fails")
    return Judgement(len(judged), failing, tuple(key for key in failing if key not in reasons))
