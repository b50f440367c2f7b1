"""How the rows of one experiment were drawn, and how new ones are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Ints
from mechdsl.program import spec
from mechdsl.statistics.measure_data import MeasureData
from mechdsl.statistics.units import Draws, Rows, Units, units_of


@dataclass(frozen=True, eq=False)
class Sampling:
    """What intervals and p of one experiment hang on beside its values."""

    prompts: int
    settings: spec.Statistics
    seed: int
    keys: Sequence[int] | None = None
    """[prompt]: contents of rows; what is drawn hangs on them. Without them all rows differ."""
    groups: NDArray[Any] | None = None
    """[prompt]: the values of `stats by`."""
    strata: Ints | None = None
    """[prompt]: what the block deals out evenly."""

    @cached_property
    def known(self) -> dict[bytes, Units]:
        return {}

    @cached_property
    def order(self) -> Ints | None:
        """Rows by content, so that sums of them are the same in the last bit wherever they stand;
        None where they are in order."""
        if self.keys is None:
            return None
        order = np.argsort(np.asarray(self.keys), kind="stable")
        return None if np.array_equal(order, np.arange(self.prompts)) else order

    @cached_property
    def ordered(self) -> Sampling:
        """The same of the rows in order."""
        order = self.order
        if order is None or self.keys is None:
            return self
        return replace(
            self,
            keys=[self.keys[i] for i in order],
            groups=None if self.groups is None else self.groups[order],
            strata=None if self.strata is None else self.strata[order],
        )

    def rows(self, *seen: Ints) -> Rows:
        """The rows, those of one number in any of `seen` being one unit."""
        return Rows.of(self.prompts, self.keys, seen, self.groups)

    def units(self, seen: Ints | None = None) -> Units:
        """The units of a measure that sees no difference between rows of one number."""
        key = b"" if seen is None else np.ascontiguousarray(seen).tobytes()
        if key not in self.known:
            own = self.rows() if seen is None else self.rows(seen)
            design = None if self.groups is not None else self.strata
            self.known[key] = units_of([own], design)
        return self.known[key]

    def whole(self, present: Bools) -> Bools:
        """[cell] whether it has all rows of every stratum that it has any of, so that new samples
        have as many of them. present: [cell, prompt]"""
        if self.strata is None or self.groups is not None:
            return np.asarray(present.all(1))
        found: Bools = np.asarray(present.any(1))
        for stratum in np.unique(self.strata):
            own = present[:, self.strata == stratum]
            found = found & (own.all(1) | ~own.any(1))
        return found

    def draws(self, units: Units, *, whole: bool = True, resamples: int = 0) -> Draws:
        """New samples; of cells that aren't `whole` without the design."""
        count = resamples or self.settings.resamples
        return Draws(units.count, count, self.seed, units.strata if whole else None)

    def unit_word(self, units: Units) -> str:
        """What one unit is called."""
        if self.groups is not None:
            return f"value of {self.settings.by}" if self.settings.by else "group"
        return "prompt" if units.count == self.prompts else "distinct prompt"


def in_order(data: MeasureData, order: Ints | None) -> MeasureData:
    """A measure with its rows in another order."""
    if order is None:
        return data
    rows = ("patched", "base", "source", "truth", "rounding", "seen")
    held = {name: getattr(data, name) for name in rows}
    return replace(
        data, **{name: each[:, order] for name, each in held.items() if each is not None}
    )


def partitions(data: MeasureData) -> Iterator[tuple[Ints, Ints | None]]:
    """(cells, [prompt] what the measure sees of rows there), of all cells."""
    return by_seen(len(data.patched), data.seen)


def by_seen(count: int, seen: Ints | None) -> Iterator[tuple[Ints, Ints | None]]:
    """The same of so many cells. seen: [1 or cell, prompt], as in `MeasureData`."""
    cells = np.arange(count)
    if seen is None or len(seen) == 1:
        yield cells, None if seen is None else seen[0]
        return
    rows, which = np.unique(seen, axis=0, return_inverse=True)
    for number, seen in enumerate(rows):
        yield cells[which.reshape(-1) == number], seen
