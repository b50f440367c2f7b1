"""Does the band of random targets hold as many of them as it states?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.coverage import program
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Ints

PROMPTS = 16
SLACK = 2.0
"""Per cent: so far may the share be from what is stated."""


def settings() -> Iterator[Setting]:
    for draws in (10, 20, 50, 200):
        stated, ranked = _stated(draws)

        def run(
            random: np.random.Generator, count: int, draws: int = draws, ranked: bool = ranked
        ) -> Ints:
            # targets have effects of their own; the one that is looked at is one more of them
            effects = random.standard_t(3, (draws + 1, count, 1))
            values = effects + random.normal(size=(draws + 1, count, PROMPTS))
            inside, _ = program.in_band(values[1:], values[0])
            found = [[np.count_nonzero(inside), count]]
            if ranked:
                p = program.rank_p(values[1:], values[0])
                assert p is not None
                found.append([np.count_nonzero(p <= program.LEVEL), count])
            return np.array(found)

        figures = [Figure(f"one more target in it ({stated:.1f} % stated)", stated - SLACK)]
        if ranked:
            figures.append(Figure("rank p ≤ 0.05", None, 5.5))
        yield Setting("band of random targets", f"{draws} targets", tuple(figures), run)


def _stated(draws: int) -> tuple[float, bool]:
    """What share a band states, in per cent, and whether there is a rank p."""
    zeros = np.zeros((draws, 1, PROMPTS))
    _, stated = program.in_band(zeros, zeros[0])
    return stated, program.rank_p(zeros, zeros[0]) is not None
