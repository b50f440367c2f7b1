"""How often does an expectation hold that shouldn't?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import pearsonr

from benchmarks.coverage import program
from benchmarks.coverage.draws import DRAWS, correlated
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Ints

PROMPTS, MORE = 32, 64
MOST = 5.0
POWER = 80.0
WITHIN = 0.3
LINES = {
    "max(delta) > 0": 1,
    "min(delta) < 0": 1,
    "abs(delta(L0H0)) > 0": 1,
    "abs(mean(delta)) > 0": 1,
    "argmax(delta) = L0H0": 2,
    "top 3 contains L0H0": 4,
}
"""What doesn't hold where no cell has an effect -> from how many cells on it says something."""


def settings() -> Iterator[Setting]:
    for cells, rho, repetitions in (
        (1, 0.0, 5000),
        (4, 0.0, 5000),
        (16, 0.0, 10_000),
        (16, 0.5, 5000),
        (144, 0.0, 2000),
    ):
        yield _nothing(cells, rho, repetitions)
    yield _clear()
    for name in ("normal", "exponential"):
        for side in (1, -1):
            yield _near(name, side)
    yield _accuracy()
    yield from _correlations()
    yield _no_correlations()


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))


def _nothing(cells: int, rho: float, repetitions: int) -> Setting:
    lines = [line for line, least in LINES.items() if cells >= least]

    def run(random: np.random.Generator, count: int) -> Ints:
        held = np.zeros(len(lines), dtype=np.int64)
        for _ in range(count):
            deltas = correlated(random, "normal", cells, PROMPTS, rho)
            result = program.finished(deltas, _seed(random))
            held += [program.verdict(line, result).holds for line in lines]
        return np.stack([held, np.full(len(lines), count)], axis=1)

    figures = tuple(Figure(f"`{line}`", None, MOST) for line in lines)
    name = f"{cells} cells, n = {PROMPTS}" + (f", correlation {rho:g}" if rho else "")
    name = name.replace("1 cells", "1 cell") if cells == 1 else name
    return Setting("`expect` without an effect", name, figures, run, repetitions, chunk=50)


def _clear() -> Setting:
    """A verdict that never holds would pass all else."""
    lines = [*LINES, f"delta(L0H2) near 0 within {3 * WITHIN:g}"]

    def run(random: np.random.Generator, count: int) -> Ints:
        held = np.zeros(len(lines), dtype=np.int64)
        for _ in range(count):
            deltas = random.normal(size=(16, PROMPTS))
            deltas[0] += 2.0
            deltas[1] -= 1.2
            result = program.finished(deltas, _seed(random))
            held += [program.verdict(line, result).holds for line in lines]
        return np.stack([held, np.full(len(lines), count)], axis=1)

    # the mean over the cells is 0.05: `abs(mean(delta))` has nothing to find
    figures = tuple(Figure(f"`{line}`", None if "mean" in line else POWER) for line in lines)
    group = "`expect` with a clear effect"
    first = f"{group}: 16 cells, two of 2 and -1.2 standard deviations, n = {PROMPTS}"
    name = f"16 cells, effects of 2 and −1.2 standard deviations in two, n = {PROMPTS}"
    return Setting(group, name, figures, run, 1000, chunk=50, first_key=first)


def _near(name: str, side: int) -> Setting:
    """The truth lies on the bound. Half a standard deviation wide."""
    line = f"delta(L0H0) near 0 within {WITHIN:g}"

    def run(random: np.random.Generator, count: int) -> Ints:
        held = 0
        for _ in range(count):
            deltas = WITHIN * side + DRAWS[name](random, (1, MORE)) / 2
            held += program.verdict(line, program.finished(deltas, _seed(random))).holds
        return np.array([[held, count]])

    figure = Figure(f"`{line}`", None, MOST)
    label = f"{name}, truth {WITHIN * side:+g}, n = {MORE}"
    return Setting("`expect … near`", label, (figure,), run, 4000, chunk=50)


def _accuracy() -> Setting:
    right = 0.9

    def run(random: np.random.Generator, count: int) -> Ints:
        held = np.zeros(2, dtype=np.int64)
        for _ in range(count):
            accuracy = (random.random(PROMPTS) < right).astype(np.float64)
            deltas = random.normal(size=(1, PROMPTS))
            result = program.finished(deltas, _seed(random), accuracy=accuracy)
            for place, sign in enumerate("<>"):
                line = f"accuracy(clean) {sign} {right:g}"
                held[place] += program.verdict(line, result).holds
        return np.stack([held, np.full(2, count)], axis=1)

    figures = tuple(Figure(f"`accuracy(clean) {sign} {right:g}`", None, MOST) for sign in "<>")
    name = f"accuracy of {right:g}, n = {PROMPTS}"
    return Setting("`expect accuracy`", name, figures, run, 5000, chunk=50)


def _correlations() -> Iterator[Setting]:
    """Effects of two experiments on the same rows, whose noise is nearly the same."""
    for cells, n, true in ((16, 16, 0.0), (16, 32, 0.6), (48, 32, 0.95), (48, 64, 0.6)):

        def run(
            random: np.random.Generator,
            count: int,
            cells: int = cells,
            n: int = n,
            true: float = true,
        ) -> Ints:
            held = np.zeros((3, 2), dtype=np.int64)
            for _ in range(count):
                mine, own = random.normal(size=(2, cells, 1))
                other = true * mine + np.sqrt(1 - true**2) * own
                noise, more = random.normal(size=(2, cells, n))
                noisy = mine + noise, other + 0.9 * noise + 0.4 * more
                one, two = (program.finished(each, _seed(random)) for each in noisy)
                said = program.verdict("pearson(delta, other) > 0", one, other=two)
                if said.low is None or said.high is None:
                    continue
                truth = float(pearsonr(mine[:, 0], other[:, 0]).statistic)
                held += [
                    [said.low <= truth <= said.high, 1],
                    [said.low > truth, 1],
                    [said.high < truth, 1],
                ]
            return held

        figures = (
            Figure("true correlation covered", 93),
            Figure("`>` holds for the true correlation", None, MOST),
            Figure("`<` holds for the true correlation", None, MOST),
        )
        name = f"{cells} cells, n = {n}, true correlation about {true:g}"
        yield Setting("correlations", name, figures, run, 1000, chunk=50)


def _no_correlations() -> Setting:
    """The same without any effect: there is nothing that could be correlated."""

    def run(random: np.random.Generator, count: int) -> Ints:
        held = 0
        for _ in range(count):
            noise = random.normal(size=(48, PROMPTS))
            again = noise + random.normal(0, 0.3, noise.shape)
            one, two = (program.finished(each, _seed(random)) for each in (noise, again))
            held += program.verdict("pearson(delta, other) > 0.5", one, other=two).holds
        return np.array([[held, count]])

    figure = Figure("`pearson(delta, other) > 0.5`", None, MOST)
    return Setting("correlations", "48 cells without an effect, n = 32", (figure,), run, 1000, 50)
