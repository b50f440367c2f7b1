"""Numerators and denominators of effects: of every prompt, and summed within units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Bools, Cells, Floats, Ints
from mechdsl.statistics.measure_data import MeasureData
from mechdsl.statistics.units import Units
from mechdsl.vocab.effect_kind import EffectKind


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

    def mean(self) -> Floats:
        """[cell]: the effect itself; NaN where no prompt is in the cell, or the denominator is
        0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            count = np.count_nonzero(self.present, axis=1)
            top = self.numerator.sum(1) / count
            if self.denominator is None:
                return top
            return self.effect.divide(top, self.denominator.sum(1) / count)

    def sums(self, units: Units, of: int = 0) -> Sums:
        """The same by unit."""
        if self.denominator is None:
            full = self.present.all()
            rows = self.present[:1] if full else self.present
            bottom = units.total(rows.astype(np.float64), of)
        else:
            bottom = units.total(self.denominator, of)
            if self.effect.absolute:
                bottom = bottom * np.where(bottom.sum(1, keepdims=True) < 0, -1.0, 1.0)
        top = units.total(self.numerator, of)
        return Sums(top, bottom, units.held(self.present, of))


@dataclass(frozen=True, eq=False)
class Sums:
    """A mean, or a ratio of means, per cell: the sum of `top` over that of `bottom`."""

    top: Floats
    """[cell, unit]."""
    bottom: Floats
    """[1 or cell, unit]."""
    held: Ints
    """[cell]: units that have a row in it."""

    @property
    def value(self) -> Floats:
        """[cell]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.top.sum(1) / self.bottom.sum(1)

    def under(self, weights: Floats) -> Floats:
        """[resample, cell] of resamples [resample, unit]; NaN where none of a cell's is drawn."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ self.top.T) / (weights @ self.bottom.T)

    def chosen(self, cells: Cells) -> Sums:
        """Some of its cells."""
        bottom = self.bottom if len(self.bottom) == 1 else self.bottom[cells]
        return Sums(self.top[cells], bottom, self.held[cells])


def parts(data: MeasureData, effect: EffectKind, cells: Cells) -> Parts:
    """The rows of some cells of a measure."""

    def rows(values: Floats | None) -> Floats:
        if values is None:
            return np.full((1, data.patched.shape[1]), np.nan)
        return values[cells] if values.shape[0] > 1 else values

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


def numerators(data: MeasureData, effect: EffectKind, cells: Cells) -> Parts:
    """What the effect's test is about: its numerator alone."""
    plain = EffectKind(name="", meaning="", formula="", numerator=effect.numerator)
    return parts(data, plain, cells)
