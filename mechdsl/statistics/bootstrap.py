"""Effects under resampled prompts.

All cells and measures of an experiment share one matrix of resampling weights, so that a cell
costs one column of a matrix product, and differences between cells keep what the prompts have in
common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.program import spec
from mechdsl.statistics.measure_data import MeasureData
from mechdsl.vocab.effect_kind import EffectKind

BLOCK = 4_000_000
"""Numbers held at once by one intermediate array (32 MB)."""


class Resampling:
    """Prompts drawn with replacement, the same draws whatever is computed from them.

    A prompt's weights hang on its id and not on its place, so a permutation of the prompts
    changes nothing. With `groups` whole groups are drawn.
    """

    def __init__(
        self,
        prompts: int,
        settings: spec.Statistics,
        seed: int,
        *,
        ids: Sequence[int] | None = None,
        groups: NDArray[Any] | None = None,
    ) -> None:
        self.resamples = settings.resamples
        self.confidence = settings.confidence
        self.seed = seed
        keys = np.arange(prompts) if ids is None else np.asarray(ids)
        self.order: Ints = np.argsort(keys, kind="stable")
        """Data is put into this order first."""
        labels = np.arange(prompts) if groups is None else np.asarray(groups)[self.order]
        codes = np.unique(labels, return_inverse=True)[1].reshape(-1)
        self.grouped = groups is not None
        self.codes: Ints = codes.astype(np.int64)
        self.units = int(codes.max()) + 1 if prompts else 0

    def weights(self, columns: int = 1) -> Iterator[Floats]:
        """How often each prompt was drawn: [resample, prompt] in blocks that leave room for
        `columns` numbers per resample."""
        random = np.random.default_rng([1, self.seed % 2**63])
        left = self.resamples
        step = max(1, BLOCK // max(self.units, columns, len(self.codes), 1))
        while left > 0:
            rows = min(step, left)
            left -= rows
            drawn = random.integers(0, self.units, (rows, self.units))
            drawn += np.arange(rows)[:, None] * self.units
            counts = np.bincount(drawn.ravel(), minlength=rows * self.units)
            by_unit = counts.reshape(rows, self.units).astype(np.float64)
            yield by_unit[:, self.codes] if self.grouped else by_unit

    def units_of(self, present: Bools) -> Ints:
        """How many draws stand behind each cell: prompts, or groups that have a prompt in it."""
        return np.count_nonzero(self.per_unit(present.astype(np.float64)), axis=1)

    def per_unit(self, rows: Floats) -> Floats:
        """[cell, prompt] summed within groups: [cell, unit]."""
        if not self.grouped:
            return rows
        sums = np.zeros((rows.shape[0], self.units))
        np.add.at(sums.T, self.codes, rows.T)
        return sums

    def interval(self, samples: Floats) -> tuple[Floats, Floats]:
        """The percentile interval over the first axis."""
        tail = (100.0 - self.confidence) / 2
        ends = [tail, 100.0 - tail]
        columns = np.array(samples.T)  # a copy, by cell: partitioned in place, twice as fast
        missing = np.isnan(columns)
        with np.errstate(invalid="ignore"):
            if not missing.any():
                low, high = np.percentile(columns, ends, axis=-1, overwrite_input=True)
                return low, high
            none = missing.all(axis=-1)
            columns[none] = 0.0  # numpy warns of cells without a number
            low, high = np.nanpercentile(columns, ends, axis=-1)
        return np.where(none, np.nan, low), np.where(none, np.nan, high)


@dataclass(frozen=True, eq=False)
class Parts:
    """Numerator and denominator of an effect per prompt, 0 where a prompt is not in the cell."""

    effect: EffectKind
    numerator: Floats
    """[cell, prompt]."""
    denominator: Floats | None
    """[1 or cell, prompt]."""
    present: Bools
    """[cell, prompt]."""
    undefined: Ints
    """[cell]: prompts whose own denominator is 0 (`per prompt` only)."""

    @property
    def full(self) -> bool:
        return bool(self.present.all())

    def mean(self) -> Floats:
        """[cell]: the effect itself."""
        return self.weighted(np.ones((1, self.present.shape[1])))[0]

    def weighted(self, weights: Floats) -> Floats:
        """The effect under resampled prompts: [resample, prompt] -> [resample, cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.full:
                count = weights.sum(1, keepdims=True)
            else:
                count = weights @ self.present.T.astype(np.float64)
            top = weights @ self.numerator.T / count
            if self.denominator is None:
                return top
            bottom = weights @ self.denominator.T
            # a resample without any of the cell's prompts is no resample of it: 0/0 is NaN
            return self.effect.divide(top, bottom / count)


def parts(data: MeasureData, effect: EffectKind, cells: Cells, order: Ints) -> Parts:
    """The rows of some cells of a measure, prompts in `order`."""

    def rows(values: Floats | None) -> Floats:
        if values is None:
            return np.full((1, len(order)), np.nan)
        return (values[cells] if values.shape[0] > 1 else values)[:, order]

    patched, base, source = rows(data.patched), rows(data.base), rows(data.source)
    numerator = np.asarray(effect.numerator(patched, base, source), dtype=np.float64)
    numerator = np.broadcast_to(numerator, patched.shape)
    present = ~np.isnan(patched) & ~np.isnan(numerator)
    undefined = np.zeros(patched.shape[0], dtype=np.int64)
    if effect.denominator is None:
        return Parts(effect, np.where(present, numerator, 0.0), None, present, undefined)
    denominator = np.asarray(effect.denominator(patched, base, source), dtype=np.float64)
    present = present & ~np.isnan(denominator)
    if data.per_prompt:
        ratios = effect.divide(numerator, denominator)
        undefined = np.count_nonzero(present & np.isnan(ratios), axis=1)
        return Parts(effect, np.where(present, ratios, 0.0), None, present, undefined)
    if not present.all():  # a prompt outside the cell is outside its denominator too
        denominator = np.where(present, denominator, 0.0)
    return Parts(effect, np.where(present, numerator, 0.0), denominator, present, undefined)


def blocks(cells: int, width: int) -> Iterator[slice]:
    """Cells in blocks whose arrays of `width` numbers per cell stay small."""
    step = max(1, 2 * BLOCK // max(width, 1))
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))
