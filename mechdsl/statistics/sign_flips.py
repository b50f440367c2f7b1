"""The sign-flip test: are the deltas far from 0, were their signs random?

Fisher 1935. It holds its level where deltas are as often above 0 as below under the null, by the
same amounts; `stats test bootstrap` doesn't ask for that. All cells share one matrix of signs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.statistics.units import BLOCK, blocks
from mechdsl.validate.reachable_p import EXACT_UP_TO

MIN_FLIPS = 10_000
PER_TEST = 4
"""Random flips for each cell, over the level: of so many, three may be as extreme as what was
measured, and the cell still survives."""
MOST_STEPS = 1000
"""Beyond so many steps the largest delta of a lattice is as if there were none."""
MOST_WORK = 20_000_000_000
"""Flips × cells × units beyond which p is worked out by a saddlepoint approximation."""


@dataclass(frozen=True, eq=False)
class Tested:
    """p of cells."""

    p: Floats
    """[cell], in (0, 1]; 1 where all deltas are 0."""
    floor: Bools
    """[cell]: p is the smallest that so many flips give, so that it may be smaller."""


def flips_for(tests: int, level: float) -> int:
    """Random flips for so many cells: enough that a p can be small enough."""
    return max(MIN_FLIPS, ceil(PER_TEST * tests / level))


def by_saddlepoint(cells: int, units: int, flips: int) -> bool:
    """Whether so many flips would be too much work."""
    return flips * cells * units > MOST_WORK


def _packed(deltas: Floats) -> Floats:
    """The non-zero deltas of each cell moved to the left, the rest cut."""
    width = int(np.count_nonzero(deltas, axis=1).max(initial=0))
    left = np.argsort(deltas == 0, axis=1, kind="stable")[:, :width]
    return np.take_along_axis(deltas, left, axis=1)


def _extreme(signs: Floats, deltas: Floats) -> Ints:
    """[cell]: in how many rows of signs the sum is at least as far from 0 as observed."""
    # sums that are equal by value differ by rounding, so the bound gives way a little
    slack = 1e-9 * np.abs(deltas).sum(1)
    reached = np.abs(signs @ deltas.T) >= np.abs(deltas.sum(1)) - slack
    return np.count_nonzero(reached, axis=0)


def _every_sign(width: int) -> Floats:
    """The test is two-sided, so the first sign can stay +: [2 ** (width − 1), width]."""
    codes = np.arange(2 ** max(width - 1, 0))
    bits = (codes[:, None] >> np.arange(width)[None, :]) & 1
    return 1.0 - 2.0 * bits.astype(np.float64)


def _exact(deltas: Floats) -> Floats:
    packed = _packed(deltas)
    if packed.shape[1] == 0:
        return np.ones(len(deltas))
    signs = _every_sign(packed.shape[1])
    return _extreme(signs, packed) / len(signs)


def _random_signs(units: int, flips: int, cells: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng([2, seed % 2**63])
    # numpy draws four small numbers at once and throws away what a call leaves of them
    step = max(4, BLOCK // max(cells, units) // 4 * 4)
    for start in range(0, flips, step):
        heads = random.integers(0, 2, (min(step, flips - start), units), dtype=np.int8)
        yield 1.0 - 2.0 * heads.astype(np.float64)


def saddlepoint(deltas: Floats) -> Floats:
    """[cell]: two-sided p of the sum under random signs, for many units.

    Lugannani and Rice 1980, on the generating function Σ log cosh(s d), with Daniels' (1987) second
    correction where all sums lie on one lattice, as of ranks; exact where all deltas have one size,
    as their sum is binomial then.
    """
    from scipy.special import bdtrc, ndtr  # not at the top: slow to import

    p = np.ones(len(deltas))
    for cell, row in enumerate(deltas):
        sizes = np.abs(row[row != 0])
        n, total = len(sizes), abs(float(row.sum()))
        if not n or total <= 1e-9 * sizes.sum():
            continue
        if np.ptp(sizes) <= 1e-9 * sizes.max():
            more = (n + round(total / sizes.mean())) // 2
            p[cell] = min(1.0, 2 * float(bdtrc(more - 1, n, 0.5)))
            continue
        if total >= sizes.sum() * (1 - 1e-9):
            p[cell] = 2.0 ** (1 - n)
            continue
        half = _half_step(sizes)
        total -= half
        if total <= 1e-9 * sizes.sum():
            continue
        at = _saddle(sizes, total)
        kurve = float(np.logaddexp(at * sizes, -at * sizes).sum() - n * np.log(2))
        bent = float((sizes**2 / np.cosh(np.minimum(at * sizes, 300)) ** 2).sum())
        w = np.sqrt(max(2 * (at * total - kurve), 0.0))
        if w < 1e-3:
            continue
        u = (np.sinh(at * half) / half if half else at) * np.sqrt(bent)
        density = np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)
        tail = float(ndtr(-w)) + density * (1 / u - 1 / w)
        # near the ends single flips count, and the tail is too thin by about one of them
        p[cell] = min(1.0, 2 * tail + 2.0 ** (1 - n))
    return p


def _half_step(sizes: Floats) -> float:
    """Half of what lies between two sums, where all are so many times that apart; else 0."""
    for parts_of_least in range(1, 5):
        times = sizes / sizes.min() * parts_of_least
        whole = np.round(times)
        if whole.max() < MOST_STEPS and (np.abs(times - whole) <= 1e-6 * times).all():
            step = float(np.gcd.reduce(whole.astype(np.int64)))
            return step * float(sizes.min()) / parts_of_least
    return 0.0


def _saddle(sizes: Floats, total: float) -> float:
    """Where Σ d tanh(s d) is what was observed."""
    from scipy.optimize import brentq  # not at the top: slow to import

    def off(at: float) -> float:
        return float((sizes * np.tanh(at * sizes)).sum()) - total

    high = 1.0 / sizes.max()
    while off(high) < 0:
        high *= 2
    return float(brentq(off, 0.0, high, rtol=1e-12))


def sign_flip(deltas: Floats, tests: int, seed: int, level: float = 0.05) -> Tested:
    """Two-sided p of each cell.

    deltas: [cell, unit], 0 where a unit is not part of the cell
    tests: cells of the whole experiment; the number of random flips grows with it, and with
    1 / level
    """
    cells, units = deltas.shape
    flips = flips_for(tests, level)
    p, floor = np.ones(cells), np.zeros(cells, dtype=bool)
    few = np.count_nonzero(deltas, axis=1) <= EXACT_UP_TO
    for block in blocks(int(few.sum()), 2 ** (EXACT_UP_TO - 1)):
        chosen = np.flatnonzero(few)[block]
        p[chosen] = _exact(deltas[chosen])
    many = np.flatnonzero(~few)
    if len(many) and by_saddlepoint(tests, units, flips):
        p[many] = saddlepoint(deltas[many])
    elif len(many):
        extreme = np.zeros(len(many), dtype=np.int64)
        for signs in _random_signs(units, flips, len(many), seed):
            extreme += _extreme(signs, deltas[many])
        p[many] = (extreme + 1) / (flips + 1)
        floor[many] = extreme == 0
    return Tested(p, floor)


def largest_flip(deltas: Floats, flips: int, seed: int) -> Floats:
    """[cell]: p corrected by the distribution of the largest statistic of all these cells.

    Westfall and Young 1993, algorithm 4.1: each cell against the largest of those that are no
    larger than itself. A flip leaves the sum of squares, so the sum over its root orders as t
    does."""
    size = np.sqrt((deltas**2).sum(1))
    unit = deltas / np.where(size > 0, size, 1.0)[:, None]
    own = np.abs(unit.sum(1))
    order = np.argsort(-own, kind="stable")
    unit, own = unit[order], own[order]
    used = np.flatnonzero(np.any(deltas != 0, axis=0))
    exact = len(used) <= EXACT_UP_TO
    if exact:
        unit = unit[:, used]
    all_signs = (
        iter([_every_sign(len(used))])
        if exact
        else _random_signs(unit.shape[1], flips, len(unit), seed)
    )
    extreme, count = np.zeros(len(own), dtype=np.int64), 0
    for signs in all_signs:
        found = np.abs(signs @ unit.T)
        largest = np.maximum.accumulate(found[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= own * (1 - 1e-9), axis=0)
        count += len(signs)
    p = extreme / count if exact else (extreme + 1) / (count + 1)
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(p)
    return np.where(size > 0, found, 1.0)


def flips_in_words(units: int, tests: int, unit: str, level: float) -> str:
    """How `sign_flip` works out p for so many cells."""
    name = f"two-sided sign-flip test on the deltas per {unit}"
    if units <= EXACT_UP_TO:
        return f"{name}, all flips"
    flips = flips_for(tests, level)
    if by_saddlepoint(tests, units, flips):
        return f"{name}, saddlepoint approximation ({tests:,} cells would need {flips:,} flips)"
    return f"{name}, {flips:,} random flips (all of them for up to {EXACT_UP_TO} of them)"
