"""One measure of two runs over the same rows: each row beside itself, or two samples end to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.matched_runs import Matched, matched_rows
from mechdsl.statistics.effect_parts import Parts, parts
from mechdsl.statistics.measure_data import MeasureData
from mechdsl.statistics.sampling import Sampling, by_seen
from mechdsl.statistics.two_runs import Both
from mechdsl.statistics.units import Units, units_of
from mechdsl.vocab.effects import EFFECTS

PER_ROW = ("patched", "base", "source", "truth", "rounding")


@dataclass(frozen=True, eq=False)
class AlignedRows:
    """The rows on which two runs of an experiment are compared, with what intervals hang on."""

    matched: Matched
    sampling: Sampling
    of_new: Bools
    """[row]: all where rows are paired; else whether it is one of the new run."""

    @property
    def paired(self) -> bool:
        """Whether the runs have rows in common; those alone are compared then."""
        return len(self.matched) > 0

    @classmethod
    def of(cls, old: ExperimentResult, new: ExperimentResult) -> AlignedRows:
        found, settings = matched_rows(old, new), new.settings
        if settings is None:
            raise ValueError(f"experiment `{new.name}` has no statistics yet")
        keys, groups = _keys(new), new.groups
        if len(found):
            at = found.new
            sampling = Sampling(
                len(at),
                settings,
                new.seed,
                keys[at].tolist(),
                None if groups is None else groups[at],
                None if new.strata is None else new.strata[at],
                None if new.blocks is None else new.blocks[at],
            )
            return cls(found, sampling, np.ones(len(at), dtype=bool))
        of_new = np.arange(new.prompts + old.prompts) < new.prompts
        by = settings.by
        labels = None
        if groups is not None:  # a value that both runs have is two draws of it: on the safe side
            theirs = old.row_values.get(by or "", range(old.prompts))
            labels = np.array([f"+{each}" for each in groups] + [f"-{each}" for each in theirs])
        own = np.concatenate([keys, _keys(old)])
        return cls(found, Sampling(len(own), settings, new.seed, own.tolist(), labels), of_new)


def _keys(result: ExperimentResult) -> Ints:
    keys = result.row_ids if result.row_keys is None else result.row_keys
    return np.arange(result.prompts) if keys is None else np.array(keys, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Block:
    """Some cells of a measure that share their units."""

    cells: Ints
    both: Both
    units: Units
    whole: bool
    """Whether all rows are in them."""
    of_new: Bools
    """[unit]."""
    n: tuple[Ints, Ints]
    """[cell] each: rows of the old and of the new run."""


class AlignedMeasure:
    """One measure of both runs, over the cells and rows that are compared."""

    def __init__(
        self,
        old: tuple[MeasureData, Ints],
        new: tuple[MeasureData, Ints],
        rows: AlignedRows,
    ) -> None:
        """old, new: the measure, and its cells that the other run has too."""
        self.rows = rows
        self.effect = EFFECTS[new[0].effect]
        self.old = _on(*old, rows, of_new=False)
        self.new = _on(*new, rows, of_new=True)

    def blocks(self, cells: Ints) -> Iterator[Block]:
        """These cells by their units, numerators and denominators summed within them."""
        if not len(cells):
            return
        sampling = self.rows.sampling
        seen = _joined(self.old, self.new, cells)
        for some, view in by_seen(len(cells), seen):
            views = () if view is None else np.split(view, 2)
            design = None if sampling.groups is not None else sampling.strata
            units = units_of([sampling.rows(*views)], design)
            old, new = self.parts(cells[some])
            full = (old.present | new.present).all(1)
            for whole in (True, False):
                own = np.flatnonzero(full == whole)
                if len(own):
                    yield self._block(cells[some[own]], units, whole=whole)

    def _block(self, cells: Ints, units: Units, *, whole: bool) -> Block:
        old, new = self.parts(cells)
        of_new = np.zeros(units.count, dtype=bool)
        of_new[units.codes[0][self.rows.of_new]] = True
        n = np.count_nonzero(old.present, axis=1), np.count_nonzero(new.present, axis=1)
        return Block(cells, Both(old.sums(units), new.sums(units)), units, whole, of_new, n)

    def parts(self, cells: Ints) -> tuple[Parts, Parts]:
        """Of both runs; where rows are paired, of the rows that are in the cell in both."""
        old, new = (parts(data, self.effect, cells) for data in (self.old, self.new))
        if not self.rows.paired:
            return old, new
        present = old.present & new.present
        return _within(old, present), _within(new, present)


def _within(own: Parts, present: Bools) -> Parts:
    denominator = own.denominator
    if denominator is not None and not present.all():
        denominator = np.where(present, denominator, 0.0)
    numerator = np.where(present, own.numerator, 0.0)
    return replace(own, numerator=numerator, denominator=denominator, present=present)


def _on(data: MeasureData, cells: Ints, rows: AlignedRows, *, of_new: bool) -> MeasureData:
    """The measure on these cells, and on the rows that are compared; NaN in those of the other
    sample."""
    places = rows.matched.new if of_new else rows.matched.old
    there = rows.of_new if of_new or rows.paired else ~rows.of_new

    def cut(values: Floats | None) -> Floats | None:
        if values is None:
            return None
        chosen = values[cells] if len(values) > 1 else values
        if rows.paired:
            return chosen[:, places]
        found = np.full((len(chosen), len(there)), np.nan)
        found[:, there] = chosen
        return found

    seen = data.seen
    if seen is not None:
        seen = seen[cells] if len(seen) > 1 else seen
        if rows.paired:
            seen = seen[:, places]
        else:  # rows of the other run are like no other
            own = np.arange(len(there)) + int(seen.max(initial=0)) + 1
            wide = np.repeat(own[None], len(seen), axis=0)
            wide[:, there] = seen
            seen = wide
    held = {name: cut(getattr(data, name)) for name in PER_ROW}
    return replace(data, **held, seen=seen, inert=data.inert[cells], gaps=())


def _joined(old: MeasureData, new: MeasureData, cells: Ints) -> Ints | None:
    """[1 or cell, 2 × row]: what either run sees of rows."""
    if old.seen is None and new.seen is None:
        return None
    rows = old.patched.shape[1]
    views = [np.arange(rows)[None] if each.seen is None else each.seen for each in (old, new)]
    views = [each[cells] if len(each) > 1 else each for each in views]
    most = max(len(each) for each in views)
    return np.concatenate([np.broadcast_to(each, (most, rows)) for each in views], axis=1)
