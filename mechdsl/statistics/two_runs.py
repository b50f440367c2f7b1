"""One effect in two runs: the difference of its means, or of its ratios, with an interval and p.

Where both runs have the same rows each unit is set against itself; where they have no row in
common they are two samples. Either way the error is that of the linearised difference (Binder
1983), worked out anew in every resample, as in `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.statistics.bootstrap import FLAT, Studentised, pivot
from mechdsl.statistics.effect_parts import Sums
from mechdsl.statistics.sign_flips import MIN_FLIPS, MOST_WORK, Tested, flips_for, sign_flip
from mechdsl.statistics.units import BLOCK, Draws, blocks


@dataclass(frozen=True, eq=False)
class Both:
    """The same cells of two runs, over the same units."""

    old: Sums
    new: Sums

    @property
    def value(self) -> Floats:
        """[cell]: new less old."""
        return self.new.value - self.old.value

    def chosen(self, cells: Cells) -> Both:
        """Some of its cells."""
        return Both(self.old.chosen(cells), self.new.chosen(cells))


def influence(both: Both) -> Floats:
    """[cell, unit]: how far one unit more would move the difference."""
    return _moves(both.new) - _moves(both.old)


def _moves(sums: Sums) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        left = sums.top - sums.value[:, None] * sums.bottom
        return left / sums.bottom.sum(1, keepdims=True)


# --- the same units -------------------------------------------------------------------------------


def paired(both: Both, draws: Draws) -> Studentised:
    """Bootstrap-t of the difference, each unit set against itself."""
    held = np.minimum(both.new.held, both.old.held)
    moves = influence(both)
    error = np.sqrt(_spread_of(moves, draws.strata, held))
    size = np.sqrt((moves**2).sum(1)) + np.abs(both.value) / np.maximum(held, 1)
    error = np.where(error <= FLAT * size, 0.0, error)
    error = np.where(held > 1, error, np.nan)
    found = list(_pivots(both, draws, error, held))
    every = np.concatenate(found) if found else np.zeros((0, len(error)))
    return Studentised(both.value, error, every, held, draws.count)


def paired_p(both: Both, tests: int, seed: int, level: float) -> Tested:
    """Two-sided p of each cell by sign flips: without a change, the old and the new value of a unit
    could as well be swapped.

    The ratio of both runs together stays as it is under any swap, so the test is as exact of ratios
    as of means. tests, seed, level: as `sign_flip` has them.
    """
    new, old = both.new, both.old
    with np.errstate(divide="ignore", invalid="ignore"):
        together = (new.top + old.top).sum(1) / (new.bottom + old.bottom).sum(1)
    together = np.where(np.isfinite(together), together, 0.0)
    swapped = (new.top - old.top) - together[:, None] * (new.bottom - old.bottom)
    return sign_flip(swapped, tests, seed, level)


def _spread_of(moves: Floats, strata: Ints | None, held: Ints) -> Floats:
    """[cell]: the squared standard error, of what each unit moves."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if strata is None:
            return (moves**2).sum(1) * held / (held - 1)
        found = np.zeros(len(moves))
        for stratum in range(int(strata.max()) + 1):
            own = moves[:, strata == stratum]
            found += own.var(1, ddof=1) * own.shape[1]
        return found


def _pivots(both: Both, draws: Draws, error: Floats, held: Ints) -> Iterator[Floats]:
    """[resample, cell] in blocks of resamples.

    What a unit moves is put together of what both runs have in common and of what differs, so that
    a small difference keeps its digits.
    """
    new, old = both.new, both.old
    with np.errstate(invalid="ignore"):
        mine = _finite(new.top - new.value[:, None] * new.bottom)
        theirs = _finite(old.top - old.value[:, None] * old.bottom)
    parts = (mine, theirs - mine, new.bottom, old.bottom - new.bottom)
    strata = draws.strata
    every = [slice(None)]
    members = every if strata is None else [strata == n for n in range(int(strata.max()) + 1)]
    for weights in draws.weights(6 * len(mine)):
        with np.errstate(divide="ignore", invalid="ignore"):
            scale, other = weights @ new.bottom.T, weights @ old.bottom.T
            one, two = (weights @ mine.T) / scale, (weights @ theirs.T) / other
            ratio = scale / other
            factors = (1 - ratio, -ratio, ratio * two - one, ratio * two)
            squares = np.zeros_like(one)
            for own in members:
                drawn = weights[:, own]
                squares += _squares(drawn, [part[:, own] for part in parts], factors, strata)
            if strata is None:
                squares = squares * (held / (held - 1))
            spread = np.sqrt(np.maximum(squares, 0.0)) / np.abs(scale)
            yield pivot(one - two, spread, error)


def _squares(
    weights: Floats, parts: Sequence[Floats], factors: Sequence[Floats], strata: Ints | None
) -> Floats:
    """[resample, cell]: the weighted sum of squares of Σ factor × part; within strata less that of
    their mean, as an unbiased estimate."""
    kept = [(f, p) for f, p in zip(factors, parts, strict=True) if p.any()]
    found = np.zeros((len(weights), max(len(part) for part in parts)))
    for number, (factor, part) in enumerate(kept):
        found += factor**2 * (weights @ (part**2).T)
        for other, beside in kept[number + 1 :]:
            found += 2 * factor * other * (weights @ (part * beside).T)
    if strata is None:
        return found
    count = weights.shape[1]
    total = sum((factor * (weights @ part.T) for factor, part in kept), np.zeros_like(found))
    return (found - total**2 / count) * count / (count - 1)


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, 0.0)


# --- two samples ----------------------------------------------------------------------------------


def apart(both: Both, of_new: Bools, draws: Draws) -> Studentised:
    """Bootstrap-t of the difference of two independent samples, each drawn anew by itself; degrees
    of freedom by Welch and Satterthwaite.

    of_new: [unit], whether it is one of the new run.
    """
    strata = np.where(of_new, 0, 1)
    own = Draws(draws.units, draws.resamples, draws.seed, strata)
    parts = [_spread_of_sample(each) for each in (both.new, both.old)]
    error = np.sqrt(parts[0] + parts[1])
    freedom = [np.maximum(each.held - 1, 1) for each in (both.new, both.old)]
    with np.errstate(divide="ignore", invalid="ignore"):
        welch = (parts[0] + parts[1]) ** 2 / sum(
            p**2 / f for p, f in zip(parts, freedom, strict=True)
        )
    fewest = np.minimum(both.new.held, both.old.held)
    whole = np.floor(np.where(np.isfinite(welch), welch, 0.0)).astype(np.int64)
    held = np.where(np.isfinite(welch), whole + 1, fewest)
    found = list(_pivots(both, own, error, held))
    every = np.concatenate(found) if found else np.zeros((0, len(error)))
    return Studentised(both.value, error, every, np.maximum(held, 1))


def _spread_of_sample(sums: Sums) -> Floats:
    """[cell]: the squared standard error of one of two samples."""
    moves = _moves(sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (moves**2).sum(1) * sums.held / (sums.held - 1)
    size = np.sqrt((sums.top**2).sum(1)) / np.abs(sums.bottom.sum(1))
    found = np.where(np.sqrt(found) <= FLAT * size, 0.0, found)
    return np.where(sums.held > 1, found, np.nan)


def apart_p(both: Both, of_new: Bools, tests: int, seed: int, level: float) -> Tested:
    """Two-sided p of each cell: in how many deals of all units to two samples of these sizes the
    difference is as many standard errors from 0 (Janssen 1997), and no less than by Welch's t. The
    first holds its level where both runs drew their rows from one population, the second where one
    of them spreads more."""
    cells = len(both.new.top)
    deals = flips_for(tests, level)
    p, floor = np.ones(cells), np.zeros(cells, dtype=bool)
    welch = _by_welch(both)
    if too_much_work(cells, len(of_new), tests, level):
        return Tested(welch, floor)
    for block in blocks(cells, len(of_new)):
        extreme, done = _dealt(both.chosen(block), of_new, deals, seed, level)
        p[block] = (extreme + 1) / (done + 1)
        floor[block] = extreme == 0
    return Tested(np.maximum(p, welch), floor & (p > welch))


def _dealt(both: Both, of_new: Bools, deals: int, seed: int, level: float) -> tuple[Ints, Ints]:
    """[cell] each: deals in which the difference is as far from 0, and how many there were: all of
    them, or fewer where it is clear that p isn't below the level."""
    own = _ratios(both, of_new[None].astype(np.float64))[0]
    extreme, done = np.zeros(len(own), dtype=np.int64), np.zeros(len(own), dtype=np.int64)
    left = np.arange(len(own))
    for dealt in _deals(of_new, deals, len(own), seed):
        found = _ratios(both.chosen(left), dealt)
        extreme[left] += np.count_nonzero(~(found < own[left] * (1 - 1e-9)), axis=0)
        done[left] += len(dealt)
        if done[left[0]] >= MIN_FLIPS:
            left = left[(extreme[left] + 1) / (done[left] + 1) < level]
        if not len(left):
            break
    return extreme, done


def too_much_work(cells: int, units: int, tests: int, level: float) -> bool:
    """Whether Welch's t stands in for so many deals."""
    return flips_for(tests, level) * cells * units > MOST_WORK


def _by_welch(both: Both) -> Floats:
    """[cell]: p by Welch's t; 1 where nothing differs."""
    from scipy.special import stdtr  # not at the top: slow to import

    units = both.new.top.shape[1]
    found = apart(both, np.zeros(units, dtype=bool), Draws(units, 0, 0))
    p = 2 * stdtr(np.maximum(found.freedom, 1), -np.abs(found.ratio))
    return np.where(found.value == 0, 1.0, p)


def _deals(of_new: Bools, deals: int, cells: int, seed: int) -> Iterator[Floats]:
    """[deal, unit] of 1 for the new sample, 0 for the old one."""
    random = np.random.default_rng([3, seed % 2**63])
    units, size = len(of_new), int(np.count_nonzero(of_new))
    step = max(1, BLOCK // max(8 * cells, units))
    for start in range(0, deals, step):
        order = random.random((min(step, deals - start), units)).argsort(axis=1)
        yield (order < size).astype(np.float64)


def _ratios(both: Both, dealt: Floats) -> Floats:
    """[deal, cell]: the size of the difference of two samples in standard errors; infinite where
    both are flat and differ."""
    new, old = both.new, both.old
    top, bottom = new.top + old.top, np.broadcast_to(new.bottom + old.bottom, new.top.shape)
    there = (bottom != 0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = top - top.sum(1, keepdims=True) / bottom.sum(1, keepdims=True) * bottom
        values: list[Floats] = []
        spread = np.zeros((len(dealt), len(top)))
        for own in (dealt, 1 - dealt):
            scale, count = own @ bottom.T, own @ there.T
            value = (own @ left.T) / scale
            squares = own @ (left**2).T
            squares += value * (value * (own @ (bottom**2).T) - 2 * (own @ (left * bottom).T))
            squares = np.where(squares <= FLAT * (own @ (left**2).T), 0.0, squares)
            spread += squares / scale**2 * count / (count - 1)
            values.append(value)
        apart = np.abs(values[0] - values[1])
        size = np.sqrt((left**2).sum(1)) / np.abs(bottom.sum(1))
        return np.where(apart <= FLAT * size, 0.0, apart / np.sqrt(spread))
