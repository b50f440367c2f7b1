"""Does the band of random targets hold as many of them as it states?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.coverage import program
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Ints

PROMPTS = 16


def settings() -> Iterator[Setting]:
    for draws in (10, 20, 50, 200):
        zeros = np.zeros((draws, 1, PROMPTS))
        _, stated = program.in_band(zeros, zeros[0])

        def run(random: np.random.Generator, count: int, draws: int = draws) -> Ints:
            # targets have effects of their own; the one that is looked at is one more of them
            effects = random.standard_t(3, (draws + 1, count, 1))
            values = effects + random.normal(size=(draws + 1, count, PROMPTS))
            inside, _ = program.in_band(values[1:], values[0])
            p = program.rank_p(values[1:], values[0])
            false = np.count_nonzero(p <= program.LEVEL + 1e-12)
            return np.array([[np.count_nonzero(inside), count], [false, count]])

        figures = (
            Figure(f"a further target in the band ({stated:.1f} % stated)", stated),
            Figure("rank p ≤ 0.05", None, 5),
        )
        yield Setting("band of random targets", f"{draws} targets", figures, run)
