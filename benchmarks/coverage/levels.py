"""How often does a test find an effect where there is none?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.coverage import program
from benchmarks.coverage.draws import DRAWS, SKEWED, SYMMETRIC, correlated
from benchmarks.coverage.setting import REPETITIONS, Figure, Setting
from mechdsl.base.arrays import Ints

SIZES = (16, 32, 64, 200)
FAMILIES = (16, 144)
CORRECTIONS = ("holm", "max")
NUMBERS = 1e10
"""Signs times cells that a setting of many cells may take; its repetitions follow from it."""
MOST = 5.5


def settings(everything: bool = False) -> Iterator[Setting]:
    """everything: every distribution and correlation for many cells, where otherwise they take
    turns over the sizes."""
    yield from _one_cell()
    yield from _many_cells(everything)
    yield from _skewed()


def _one_cell() -> Iterator[Setting]:
    for name in SYMMETRIC:
        for n in SIZES:

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                # no cell knows of another without a correction, so a cell is a repetition
                deltas = DRAWS[name](random, (count, n))
                p = program.p_values(deltas, int(random.integers(2**31)))
                return np.array([[np.count_nonzero(p <= program.LEVEL), count]])

            figures = (Figure("no correction", None, MOST),)
            yield Setting("false positives, 1 cell", f"{name}, n = {n}", figures, run)


def _many_cells(everything: bool) -> Iterator[Setting]:
    for cells in FAMILIES:
        for place, n in enumerate(SIZES):
            turn = place + FAMILIES.index(cells)
            pairs = [(SYMMETRIC[turn % 4], 0.5 * (place % 2))]
            if everything:
                pairs = [(name, rho) for name in SYMMETRIC for rho in (0.0, 0.5)]
            for name, rho in pairs:
                for correction in CORRECTIONS:
                    yield _family(name, rho, cells, n, correction)


def _family(name: str, rho: float, cells: int, n: int, correction: str) -> Setting:
    def run(random: np.random.Generator, count: int) -> Ints:
        false = 0
        for _ in range(count):
            deltas = correlated(random, name, cells, n, rho)
            p = program.p_values(deltas, int(random.integers(2**31)), correction=correction)
            false += bool((p <= program.LEVEL).any())
        return np.array([[false, count]])

    # a call costs its signs, n each, and its sums, one per cell
    possible = int(NUMBERS / (10_000 * (2 * n + cells + 100)))
    return Setting(
        f"false positives, {cells} cells",
        f"{name}, correlation {rho:g}, n = {n}",
        (Figure(f"any cell, {correction}", None, MOST),),
        run,
        repetitions=min(REPETITIONS, max(1000, possible // 500 * 500)),
        chunk=100,
    )


def _skewed() -> Iterator[Setting]:
    tests = ("flips", "bootstrap")
    for name in SKEWED:
        for n in (8, *SIZES):

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                deltas = DRAWS[name](random, (count, n))
                seed = int(random.integers(2**31))
                found = [program.p_values(deltas, seed, test=test) for test in tests]
                return np.array([[np.count_nonzero(p <= program.LEVEL), count] for p in found])

            figures = tuple(Figure(f"test {test}") for test in tests)
            yield Setting("false positives, skewed deltas", f"{name}, n = {n}", figures, run)
