"""Do intervals hold the truth as often as they say?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.coverage import program
from benchmarks.coverage.draws import DRAWS
from benchmarks.coverage.setting import Figure, Setting
from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.measurements import CellStatistics

SIZES = (8, 16, 32, 64, 200)
DISTRIBUTIONS = {
    "normal": SIZES,
    "t3": SIZES,
    "exponential": SIZES,
    "lognormal": SIZES,
    "lognormal, σ 1.5": SIZES[1:],
    "sparse": SIZES,
}
WIDEST = 99
"""Per cent. Families of skewed cells need more than 95 % of each interval with few units."""
SHARES = (0.5, 0.7, 0.9, 0.98, 0.999)
TRUTH = 0.5


def _held(found: CellStatistics, truth: float) -> Ints:
    """[1, 2]: intervals that hold the truth, and how many there are. One of no width claims
    nothing, as a note says under the table."""
    there = found.low < found.high
    # a bound of exact numbers may be off by a rounding error
    held = (found.low <= truth + 1e-12) & (truth - 1e-12 <= found.high)
    return np.array([[np.count_nonzero(held[there]), np.count_nonzero(there)]])


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(2**31))


def covered(low: float | None = 93, high: float | None = WIDEST) -> tuple[Figure, ...]:
    return (Figure("covered", low, high),)


def settings() -> Iterator[Setting]:
    yield from _means()
    yield from _ratios()
    yield from _shares()
    yield from _differences_of_shares()
    yield from _groups()
    yield from _unequal_groups()
    yield from _repeated()
    yield from _strata()


def _means() -> Iterator[Setting]:
    for name, sizes in DISTRIBUTIONS.items():
        for n in sizes:

            def run(random: np.random.Generator, count: int, name: str = name, n: int = n) -> Ints:
                data = program.measured(TRUTH + DRAWS[name](random, (count, n)))
                return _held(program.statistics_of(data, _seed(random)), TRUTH)

            yield Setting("interval of a mean", f"{name}, n = {n}", covered(), run)


def _recovery(random: np.random.Generator, count: int, n: int) -> dict[str, Any]:
    """The way from base to source is 3 on average and 1 wide; half of it comes back."""
    base = random.normal(-2, 1, (count, n))
    way = random.normal(3, 1, (count, n))
    moved = TRUTH * way + random.normal(0, 1, (count, n))
    return {"patched": base + moved, "base": base, "source": base + way, "effect": "recovery"}


def _relative(random: np.random.Generator, count: int, n: int) -> dict[str, Any]:
    """The base is 2 on average and 1 wide; the effect follows it in part."""
    base = random.normal(2, 1, (count, n))
    moved = TRUTH * base + random.normal(0, 1, (count, n))
    return {"patched": base + moved, "base": base, "effect": "relative"}


def _doubtful(random: np.random.Generator, count: int, n: int) -> dict[str, Any]:
    """The way is 3 of its standard errors on average, and what comes back goes with it."""
    way = 3 / np.sqrt(n) + random.normal(size=(count, n))
    moved = (
        TRUTH * 3 / np.sqrt(n) + random.normal(0, 0.6, (count, n)) + 0.8 * (way - 3 / np.sqrt(n))
    )
    base = np.zeros((count, n))
    return {"patched": base + moved, "base": base, "source": base + way, "effect": "recovery"}


def _ratios() -> Iterator[Setting]:
    several = (
        ("recovery", _recovery, SIZES),
        ("relative", _relative, SIZES),
        ("recovery, source less base of 3 standard errors", _doubtful, SIZES[1:]),
    )
    for name, draw, sizes in several:
        for n in sizes:

            def run(random: np.random.Generator, count: int, draw: Any = draw, n: int = n) -> Ints:
                data = program.measured(**draw(random, count, n))
                return _held(program.statistics_of(data, _seed(random)), TRUTH)

            group, first = "interval of a ratio", name.replace(", source less base", " of a way")
            first = f"{group}: {first}, n = {n}"
            yield Setting(group, f"{name}, n = {n}", covered(), run, first_key=first)


def _shares() -> Iterator[Setting]:
    for n in (5, *SIZES):
        for p in SHARES:

            def run(random: np.random.Generator, count: int, n: int = n, p: float = p) -> Ints:
                right = (random.random((count, n)) < p).astype(np.float64)
                data = program.measured(right, unit="share")
                return _held(program.statistics_of(data, _seed(random)), p)

            yield Setting("interval of a share", f"p = {p:g}, n = {n}", covered(93, 100), run)


def _differences_of_shares() -> Iterator[Setting]:
    """Patched and base right or wrong on the same prompts."""
    for n in (8, 32, 200):
        for p, q in ((0.9, 0.5), (0.98, 0.9), (0.98, 0.98)):

            def run(
                random: np.random.Generator, count: int, n: int = n, p: float = p, q: float = q
            ) -> Ints:
                base = random.random((count, n)) < p
                # half of the prompts answer as in the base run, as far as q < p lets them
                again = random.random((count, n)) < q / p
                patched = base & again
                data = program.measured(
                    patched.astype(np.float64),
                    base.astype(np.float64),
                    effect="delta",
                    unit="share",
                )
                return _held(program.statistics_of(data, _seed(random)), q - p)

            if p != q:
                name = f"{p:g} → {q:g}, n = {n}"
                yield Setting("interval of a difference of shares", name, covered(93, 100), run)


def _sizes(random: np.random.Generator, groups: int) -> Ints:
    """Of groups: 2 to 12 prompts each."""
    return random.integers(2, 13, groups)


def _in_groups(random: np.random.Generator, count: int, codes: Ints) -> Floats:
    """Most of the variance lies between groups (intra-class correlation 0.8)."""
    groups = int(codes.max()) + 1
    between = random.normal(0, np.sqrt(0.8), (count, groups))
    return TRUTH + between[:, codes] + random.normal(0, np.sqrt(0.2), (count, len(codes)))


def _groups() -> Iterator[Setting]:
    for groups in (8, 16, 32):

        def run(random: np.random.Generator, count: int, groups: int = groups) -> Ints:
            codes = np.repeat(np.arange(groups), _sizes(random, groups))
            data = program.measured(_in_groups(random, count, codes))
            found = program.statistics_of(data, _seed(random), groups=codes)
            return _held(found, TRUTH)

        yield Setting("`stats by`", f"{groups} groups of 2 to 12", covered(92, None), run)

        def ratio(random: np.random.Generator, count: int, groups: int = groups) -> Ints:
            codes = np.repeat(np.arange(groups), _sizes(random, groups))
            way = 3 + _in_groups(random, count, codes) - TRUTH
            moved = TRUTH * way + _in_groups(random, count, codes) - TRUTH
            base = np.zeros_like(way)
            data = program.measured(base + moved, base, base + way, effect="recovery")
            found = program.statistics_of(data, _seed(random), groups=codes)
            return _held(found, TRUTH)

        name = f"recovery, {groups} groups of 2 to 12"
        yield Setting("`stats by`", name, covered(92, None), ratio)


def _unequal_groups() -> Iterator[Setting]:
    """One group has half of the rows: then so few count that an interval is often withheld."""

    def run(random: np.random.Generator, count: int) -> Ints:
        codes = np.concatenate([np.zeros(60, dtype=np.int64), np.repeat(np.arange(1, 16), 4)])
        data = program.measured(_in_groups(random, count, codes))
        return _held(program.statistics_of(data, _seed(random), groups=codes), TRUTH)

    yield Setting("`stats by`", "16 groups, one with half of the rows", covered(None, None), run)


def _repeated() -> Iterator[Setting]:
    """Rows that share what the measure sees have one value."""
    for distinct, rows in ((8, 40), (20, 100), (50, 100)):

        def run(
            random: np.random.Generator, count: int, distinct: int = distinct, rows: int = rows
        ) -> Ints:
            more = random.integers(0, distinct, rows - distinct)
            seen = np.concatenate([np.arange(distinct), more])
            values = TRUTH + random.normal(size=(count, distinct))
            data = program.measured(values[:, seen], seen=seen[None])
            return _held(program.statistics_of(data, _seed(random)), TRUTH)

        name = f"{distinct} distinct of {rows} rows"
        first = f"rows that look the same: {name}"
        yield Setting("duplicate rows", name, covered(92, None), run, first_key=first)


def _strata() -> Iterator[Setting]:
    """Rows are dealt out evenly over four values with means of their own."""
    for n in (16, 32, 64):

        def run(random: np.random.Generator, count: int, n: int = n) -> Ints:
            strata = np.arange(n) % 4
            values = TRUTH + 2 * (strata - 1.5) + random.normal(size=(count, n))
            found = program.statistics_of(
                program.measured(values), _seed(random), strata=strata.astype(np.int64)
            )
            return _held(found, TRUTH)

        name = f"4 strata, n = {n}"
        first = f"rows dealt out evenly: 4 values, n = {n}"
        yield Setting("balanced strata", name, covered(), run, first_key=first)
