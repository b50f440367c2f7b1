"""The sign-flip test, and corrections for many comparisons.

All cells share one matrix of signs, as they share the resampling weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mechdsl.base.arrays import Floats, Ints
from mechdsl.statistics.bootstrap import BLOCK, blocks
from mechdsl.validate.reachable_p import EXACT_UP_TO

MIN_FLIPS, MAX_FLIPS, FLIPS_PER_CELL = 10_000, 200_000, 20


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


def _exact(deltas: Floats) -> Floats:
    packed = _packed(deltas)
    width = packed.shape[1]
    if width == 0:
        return np.ones(len(deltas))
    # the test is two-sided, so the first sign can stay +
    codes = np.arange(2 ** (width - 1))
    bits = (codes[:, None] >> np.arange(width)[None, :]) & 1
    return _extreme(1.0 - 2.0 * bits.astype(np.float64), packed) / len(codes)


def _normal(deltas: Floats) -> Floats:
    from scipy.special import ndtr  # not at the top: slow to import

    spread = np.sqrt((deltas**2).sum(1))
    return 2 * ndtr(-np.abs(deltas.sum(1)) / spread)


def _random(deltas: Floats, flips: int, seed: int) -> Floats:
    random = np.random.default_rng([2, seed % 2**63])
    cells, units = deltas.shape
    step = max(1, BLOCK // max(cells, units))
    extreme = np.zeros(cells, dtype=np.int64)
    for start in range(0, flips, step):
        rows = min(step, flips - start)
        heads = random.integers(0, 2, (rows, units), dtype=np.int8)
        extreme += _extreme(1.0 - 2.0 * heads.astype(np.float64), deltas)
    return (extreme + 1) / (flips + 1)


def sign_flip(deltas: Floats, tests: int, seed: int) -> Floats:
    """Two-sided p of each cell: is the sum of the deltas far from 0, were their signs random?

    deltas: [cell, prompt or group], 0 where a prompt is not part of the cell
    tests: cells of the whole experiment; the number of random flips grows with it
    returns: [cell], in (0, 1]; 1 where all deltas are 0
    """
    p = np.ones(len(deltas))
    few = np.count_nonzero(deltas, axis=1) <= EXACT_UP_TO
    for block in blocks(int(few.sum()), 2 ** (EXACT_UP_TO - 1)):
        chosen = np.flatnonzero(few)[block]
        p[chosen] = _exact(deltas[chosen])
    many = np.flatnonzero(~few)
    if len(many):
        flips = FLIPS_PER_CELL * tests
        if flips > MAX_FLIPS:
            p[many] = _normal(deltas[many])
        else:
            p[many] = _random(deltas[many], max(flips, MIN_FLIPS), seed)
    return p


def flips_in_words(units: int, tests: int, unit: str) -> str:
    """How `sign_flip` works out p for so many cells."""
    name = f"two-sided sign-flip test on the per-{unit} deltas"
    if units <= EXACT_UP_TO:
        return f"{name}, all flips"
    flips = FLIPS_PER_CELL * tests
    if flips > MAX_FLIPS:
        return f"{name}, normal approximation ({tests:,} cells would need {flips:,} random flips)"
    drawn = f"{max(flips, MIN_FLIPS):,} random flips"
    return f"{name}, {drawn} (all of them for up to {EXACT_UP_TO} {unit}s)"


def holm(p: Floats) -> Floats:
    """Holm's step-down correction: no false positive among all tests, with the chosen level."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def benjamini_hochberg(p: Floats) -> Floats:
    """Benjamini and Hochberg's step-up correction: the share of false positives."""
    from scipy.stats import false_discovery_control  # not at the top: slow to import

    return false_discovery_control(p)


CORRECTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": np.copy,
}
"""What `stats correct WORD` does to all p of an experiment."""
