"""What two runs have in common: their files, experiments, rows, measures and cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.resolve.cell_key import CellKey
from mechdsl.results.experiment_result import ExperimentResult, FileResult
from mechdsl.results.results import Results
from mechdsl.statistics.measure_data import MeasureData


def in_turn(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """Place by key; of equal keys the first, the second and so on are told apart."""
    counts: Counter[Hashable] = Counter()
    found: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        found[key, counts[key]] = place
        counts[key] += 1
    return found


@dataclass(frozen=True, eq=False)
class Matched:
    """Places of what is in both, side by side in the order of the new run, and of what is in one
    alone."""

    old: Ints
    new: Ints
    added: tuple[int, ...]
    removed: tuple[int, ...]

    @classmethod
    def of(cls, old: Iterable[Hashable], new: Iterable[Hashable]) -> Matched:
        before, after = in_turn(old), in_turn(new)
        common = [key for key in after if key in before]
        return cls(
            old=np.array([before[key] for key in common], dtype=np.int64),
            new=np.array([after[key] for key in common], dtype=np.int64),
            added=tuple(place for key, place in after.items() if key not in before),
            removed=tuple(place for key, place in before.items() if key not in after),
        )

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self.old.tolist(), self.new.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.new)


def matched_files(
    old: Results, new: Results
) -> Iterator[tuple[FileResult | None, FileResult | None]]:
    """Files of one name; where each run has one file, those two, whatever they are called."""
    if len(old.files) == len(new.files) == 1:
        yield old.files[0], new.files[0]
        return
    pairs = Matched.of([each.file for each in old.files], [each.file for each in new.files])
    yield from ((old.files[one], new.files[two]) for one, two in pairs)
    yield from ((None, new.files[place]) for place in pairs.added)
    yield from ((old.files[place], None) for place in pairs.removed)


def matched_rows(old: ExperimentResult, new: ExperimentResult) -> Matched:
    """Rows of equal content; by their numbers where contents aren't known."""
    if old.row_keys is not None and new.row_keys is not None:
        return Matched.of(old.row_keys, new.row_keys)
    return Matched.of(_numbers(old), _numbers(new))


def _numbers(result: ExperimentResult) -> Sequence[int]:
    return range(result.prompts) if result.row_ids is None else result.row_ids


def matched_measures(old: ExperimentResult, new: ExperimentResult) -> Matched:
    """Measures of one label and effect, read at one position, and estimated in one way."""
    return Matched.of(map(measure_key, old.measures), map(measure_key, new.measures))


def measure_key(data: MeasureData) -> Hashable:
    return data.label, data.effect, data.per_prompt, data.kind, data.at, data.estimator


def matched_cells(old: ExperimentResult, new: ExperimentResult) -> Matched:
    """Cells of equal coordinates at one site and position."""
    return Matched.of(map(_cell_key, old.cells), map(_cell_key, new.cells))


def _cell_key(cell: CellKey) -> Hashable:
    coords = tuple(sorted(cell.coords.items()))
    return coords, tuple(sorted(cell.also.items())), cell.site, cell.position
