"""How often does a test find an effect where there is none?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.coverage import program
from benchmarks.coverage.draws import DRAWS, SKEWED, SYMMETRIC, correlated
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Floats, Ints

SIZES = (16, 32, 64, 200)
FAMILIES = (16, 144)
MANY = 1536
CORRECTIONS = ("holm", "max")
NUMBERS = 4e9
"""Numbers that a setting of many cells may draw; its repetitions follow from it."""
MOST = 5.5
MOST_SKEWED = 6.0
PLANNED = 78.0, 82.0
"""Per cent: `plan` says 80."""
STRATA = 4


def settings(everything: bool = False) -> Iterator[Setting]:
    """everything: every distribution and correlation for many cells, where otherwise symmetric ones
    take turns over the sizes."""
    yield from _one_cell()
    yield from _many_cells(everything)
    yield from _tails()
    yield from _strata()
    yield from _skewed()
    yield from _power()
    yield from _planned()


def _false(p: Floats) -> int:
    return int(np.count_nonzero(p < program.LEVEL))


def _one_cell() -> Iterator[Setting]:
    for name in SYMMETRIC:
        for n in SIZES:

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                # no cell knows of another without a correction, so a cell is a repetition
                p = program.p_values(DRAWS[name](random, (count, n)), _seed(random))
                return np.array([[_false(p), count]])

            figures = (Figure("no correction", None, MOST),)
            yield Setting("false positives, 1 cell", f"{name}, n = {n}", figures, run)


def _many_cells(everything: bool) -> Iterator[Setting]:
    for cells in FAMILIES:
        for place, n in enumerate(SIZES):
            turn = place + FAMILIES.index(cells)
            pairs = [(SYMMETRIC[turn % 4], 0.5 * (place % 2))]
            if everything:
                pairs = [(name, rho) for name in SYMMETRIC for rho in (0.0, 0.5)]
            pairs += [(name, 0.0) for name in SKEWED]
            for name, rho in pairs:
                yield _family(name, rho, cells, n)


def _family(name: str, rho: float, cells: int, n: int) -> Setting:
    def run(random: np.random.Generator, count: int) -> Ints:
        false = np.zeros(len(CORRECTIONS), dtype=np.int64)
        for _ in range(count):
            deltas = correlated(random, name, cells, n, rho)
            seed = _seed(random)
            found = [program.p_values(deltas, seed, correction=each) for each in CORRECTIONS]
            false += [bool(_false(p)) for p in found]
        return np.stack([false, np.full(len(CORRECTIONS), count)], axis=1)

    most = MOST_SKEWED if name in SKEWED else MOST
    possible = int(NUMBERS / (cells * n * 200))
    return Setting(
        f"false positives, {cells} cells",
        f"{name}, correlation {rho:g}, n = {n}",
        tuple(Figure(f"any cell significant, {each}", None, most) for each in CORRECTIONS),
        run,
        repetitions=min(4000, max(1000, possible // 500 * 500)),
        chunk=50,
    )


def _tails() -> Iterator[Setting]:
    """Of so many cells that families are dear: p of each cell, far out in its tail."""
    level = program.LEVEL / MANY
    for name in SKEWED:
        for n in SIZES:

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                deltas = DRAWS[name](random, (count * MANY, n))
                p = program.p_values(deltas, _seed(random)).reshape(count, MANY)
                return np.array([[np.count_nonzero((p < level).any(1)), count]])

            figures = (Figure(f"any p below 0.05 / {MANY:,}", None, MOST_SKEWED),)
            group, drawn = f"false positives, {MANY:,} cells", f"{name}, correlation 0, n = {n}"
            yield Setting(group, drawn, figures, run, 2000, chunk=10)


def _strata() -> Iterator[Setting]:
    """Rows dealt out evenly over values with means of their own, which balance or not."""
    for n in (16, 32, 64):

        def run(random: np.random.Generator, count: int, n: int = n) -> Ints:
            strata = (np.arange(n) % STRATA).astype(np.int64)
            balanced = 2 * (strata - (STRATA - 1) / 2) + random.normal(size=(count, n))
            found = []
            for effect in (0.0, 4 / np.sqrt(n)):
                p = program.p_values(balanced + effect, _seed(random), strata=strata)
                found.append([_false(p), count])
            return np.array(found)

        # degrees of freedom that strata take are missed in small samples
        figures = (
            Figure("without an effect", None, MOST),
            Figure("effect of 4 standard errors", 60 if n == 16 else 80),
        )
        yield Setting("p within strata", f"{STRATA} values, n = {n}", figures, run)


def _skewed() -> Iterator[Setting]:
    tests = ("t", "flips", "bootstrap")
    for name in SKEWED:
        for n in (8, *SIZES):

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                deltas, seed = DRAWS[name](random, (count, n)), _seed(random)
                found = [program.p_values(deltas, seed, test=test) for test in tests]
                return np.array([[_false(p), count] for p in found])

            # the other tests don't correct for skewness, which the page says of them
            figures = tuple(
                Figure(f"test {test}", None, MOST_SKEWED if test == "t" else None) for test in tests
            )
            yield Setting("false positives, skewed deltas", f"{name}, n = {n}", figures, run)


def _power() -> Iterator[Setting]:
    """One cell of many has an effect of so many standard deviations."""
    for cells, n, size in ((16, 16, 1.6), (144, 32, 1.2), (144, 64, 0.8)):

        def run(
            random: np.random.Generator,
            count: int,
            cells: int = cells,
            n: int = n,
            size: float = size,
        ) -> Ints:
            found = np.zeros(len(CORRECTIONS), dtype=np.int64)
            for _ in range(count):
                deltas = random.normal(size=(cells, n))
                deltas[0] += size
                seed = _seed(random)
                for place, each in enumerate(CORRECTIONS):
                    p = program.p_values(deltas, seed, correction=each)
                    found[place] += p[0] < program.LEVEL
            return np.stack([found, np.full(len(CORRECTIONS), count)], axis=1)

        least = 80.0 if n >= 32 else None  # with fewer, no test of so many cells finds as much
        figures = tuple(Figure(f"significant, {each}", least) for each in CORRECTIONS)
        first = f"power: {cells} cells, one of {size:g} standard deviations, n = {n}"
        name = f"{cells} cells, an effect of {size:g} standard deviations in one, n = {n}"
        yield Setting("power", name, figures, run, 2000, chunk=50, first_key=first)


def _planned() -> Iterator[Setting]:
    """Of the smallest effect that `plan` states: how often is it found?"""
    asked = {"t": ((8, 1), (16, 1), (32, 1), (32, 144), (64, 144)), "flips": ((12, 1), (32, 16))}
    asked["bootstrap"] = ((16, 1), (32, 16))
    for test, sizes in asked.items():
        for n, tests in sizes:

            def run(
                random: np.random.Generator,
                count: int,
                test: str = test,
                n: int = n,
                tests: int = tests,
            ) -> Ints:
                effect, level = program.planned(n, tests, test)
                deltas = effect + random.normal(size=(count, n))
                p = program.p_values(deltas, _seed(random), test=test)
                return np.array([[np.count_nonzero(p < level), count]])

            name = f"n = {n}, {tests} cells, `test {test}`".replace(" 1 cells", " 1 cell")
            # of the bootstrap-t the effect is stated as the least
            low, high = PLANNED
            figures = (Figure("significant", None if test == "bootstrap" else low, high),)
            yield Setting("power that `plan` states", name, figures, run, 4000)


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))
