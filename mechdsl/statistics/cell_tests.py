"""p of every cell, by the test that the file names, and corrected over all cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.base.plural import several
from mechdsl.base.registry import Registry
from mechdsl.statistics.bootstrap import Studentised, pivots, standard_error, studentise
from mechdsl.statistics.corrections import CORRECTIONS
from mechdsl.statistics.effect_parts import Sums, numerators
from mechdsl.statistics.measure_data import CellStatistics, MeasureData
from mechdsl.statistics.sampling import Sampling, partitions
from mechdsl.statistics.sign_flips import flips_for, flips_in_words, largest_flip, sign_flip
from mechdsl.statistics.units import Draws, Units, blocks, units_of
from mechdsl.validate.reachable_p import MOST_RESAMPLES
from mechdsl.vocab.effect_kind import EffectKind


def cell_p(
    measures: Sequence[MeasureData],
    found: Sequence[CellStatistics],
    sampling: Sampling,
    effects: Registry[EffectKind],
) -> list[CellStatistics]:
    """The same statistics with p, what is corrected, and how it came about."""
    pairs = zip(measures, found, strict=True)
    asked = [_tested(data, each, effects[data.effect]) for data, each in pairs]
    tests = sum(int(np.count_nonzero(each)) for each in asked)
    settings = sampling.settings
    work = _Tests(measures, asked, sampling, effects, tests)
    corrected = work.largest() if settings.correction == "max" else None
    p: list[Floats] = []
    floors: list[Bools] = []
    for number in range(len(measures)):
        own, floor = work.of(number)
        p.append(own)
        floors.append(floor)
    together = np.concatenate(p)
    if corrected is not None:  # both are simulated, of other units or other signs
        corrected = np.maximum(corrected, together)
    else:
        known = ~np.isnan(together)
        corrected = together.copy()
        corrected[known] = CORRECTIONS[settings.correction](together[known])
    split = np.split(corrected, np.cumsum([len(each) for each in p])[:-1])
    return [
        replace(
            each,
            p=own,
            p_corrected=own_corrected,
            floor=floor,
            test=work.words(number) if _has_p(data, effects) else None,
            tests=tests,
        )
        for number, (data, each, own, own_corrected, floor) in enumerate(
            zip(measures, found, p, split, floors, strict=True)
        )
    ]


def _has_p(data: MeasureData, effects: Registry[EffectKind]) -> bool:
    return data.kind == "number" and effects[data.effect].tested


def _tested(data: MeasureData, found: CellStatistics, effect: EffectKind) -> Bools:
    """[cell]: whether it is tested: it has a value, and can differ from the base run."""
    if data.kind != "number" or not effect.tested:
        return np.zeros(len(data.patched), dtype=bool)
    own = numerators(data, effect, slice(None))
    whole = np.isfinite(own.numerator).all(1) & own.present.any(1)
    return whole & np.isfinite(found.mean) & ~data.inert


class _Tests:
    """The tests of one experiment."""

    def __init__(
        self,
        measures: Sequence[MeasureData],
        asked: Sequence[Bools],
        sampling: Sampling,
        effects: Registry[EffectKind],
        tests: int,
    ) -> None:
        self.measures = measures
        self.asked = asked
        self.sampling = sampling
        self.effects = effects
        self.tests = tests
        self.level = 1 - sampling.settings.confidence / 100
        one_level = sampling.settings.correction in ("max", "none")
        self.smallest = 1 if one_level else tests
        """Of how many tests the smallest p has to survive the correction."""

    @property
    def resamples(self) -> int:
        """Enough that a p of the bootstrap can be small enough."""
        wanted = min(MOST_RESAMPLES, 2 * flips_for(self.smallest, self.level))
        return max(self.sampling.settings.resamples, wanted)

    def of(self, number: int) -> tuple[Floats, Bools]:
        """p of one measure's cells, and whether it may be smaller."""
        data = self.measures[number]
        p, floor = np.full(len(data.patched), np.nan), np.zeros(len(data.patched), dtype=bool)
        for cells, seen in partitions(data):
            own = cells[self.asked[number][cells]]
            units = self.sampling.units(seen)
            if self.sampling.settings.test == "bootstrap":
                for some, found in self._resampled(number, own, units):
                    p[some], floor[some] = found.p()
                continue
            for block in blocks(len(own), units.count):
                some = own[block]
                found = sign_flip(
                    self._sums(number, some, units).top,
                    self.smallest,
                    self.sampling.seed,
                    self.level,
                )
                p[some], floor[some] = found.p, found.floor
        return p, floor

    def _sums(self, number: int, cells: Ints, units: Units, of: int = 0) -> Sums:
        data = self.measures[number]
        return numerators(data, self.effects[data.effect], cells).sums(units, of)

    def _resampled(
        self, number: int, cells: Ints, units: Units
    ) -> Iterator[tuple[Ints, Studentised]]:
        data = self.measures[number]
        whole = self.sampling.whole(numerators(data, self.effects[data.effect], cells).present)
        for part in (True, False):
            own = cells[whole == part]
            draws = self.sampling.draws(units, whole=part, resamples=self.resamples)
            for block in blocks(len(own), self.resamples):
                yield own[block], studentise(self._sums(number, own[block], units), draws)

    def largest(self) -> Floats:
        """[cell of all measures]: corrected by the distribution of the largest statistic; all
        cells share their units, so the coarsest are taken."""
        seen = [
            own
            for data, asked in zip(self.measures, self.asked, strict=True)
            for cells, own in partitions(data)
            if own is not None and asked[cells].any()
        ]
        units = units_of([self.sampling.rows(*seen)])
        rows = [
            self._sums(number, np.flatnonzero(asked), units)
            for number, asked in enumerate(self.asked)
            if asked.any()
        ]
        found = np.full(sum(len(asked) for asked in self.asked), np.nan)
        if not rows:
            return found
        tops = np.concatenate([each.top for each in rows])
        if self.sampling.settings.test == "bootstrap":
            bottoms = np.concatenate(
                [np.broadcast_to(each.bottom, each.top.shape) for each in rows]
            )
            held = np.concatenate([each.held for each in rows])
            draws = self.sampling.draws(units, whole=False, resamples=self.resamples)
            p = largest_pivot(Sums(tops, bottoms, held), draws)
        else:
            p = largest_flip(tops, flips_for(1, self.level), self.sampling.seed)
        found[np.concatenate(self.asked)] = p
        return found

    def words(self, number: int) -> str:
        """How p of a measure's cells came about."""
        units = [self.sampling.units(seen) for _, seen in partitions(self.measures[number])]
        most = max(units, key=lambda each: each.count)
        unit = self.sampling.unit_word(most)
        if self.sampling.settings.test == "bootstrap":
            return (
                f"two-sided, by inversion of the bootstrap-t interval over {several(unit)}, "
                f"{self.resamples:,} resamples"
            )
        words = flips_in_words(most.count, self.smallest, unit, self.level)
        return (
            f"{words}; assumes that without an effect they are symmetric about 0 (`stats test "
            "bootstrap` doesn't)"
        )


def largest_pivot(sums: Sums, draws: Draws) -> Floats:
    """[cell]: step-down, as for sign flips. Pivots aren't kept: of many cells they are too many."""
    value, error = sums.value, standard_error(sums, draws.strata)
    found = Studentised(value, error, np.zeros((0, len(value))), sums.held, draws.count)
    own = np.abs(found.ratio)
    order = np.argsort(-own, kind="stable")
    extreme, above, below, known = (np.zeros(len(own), dtype=np.int64) for _ in range(4))
    for each in pivots(sums, draws):
        above += np.count_nonzero(each >= found.ratio, axis=0)
        below += np.count_nonzero(each <= found.ratio, axis=0)
        known += np.count_nonzero(~np.isnan(each), axis=0)
        sizes = np.nan_to_num(np.abs(each[:, order]), nan=0.0)
        largest = np.maximum.accumulate(sizes[:, ::-1], axis=1)[:, ::-1]
        extreme += np.count_nonzero(largest >= own[order], axis=0)
    corrected = np.empty(len(own))
    corrected[order] = np.maximum.accumulate((extreme + 1) / (draws.resamples + 1))
    alone, _ = found.p_of(np.minimum(above, below), known)
    # what doesn't move in any resample has no part in the largest pivots: Bonferroni's for it
    alone = np.where(error == 0, np.minimum(1.0, alone * len(own)), alone)
    return np.where(value == 0, 1.0, np.maximum(corrected, alone))
