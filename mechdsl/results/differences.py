"""What changed between two runs: inputs, verdicts, effects, and what there is more or less of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mechdsl.results.aligned_measures import AlignedRows
from mechdsl.results.changed_inputs import changed_inputs, row_change
from mechdsl.results.changed_verdicts import VerdictChange, changed_verdicts
from mechdsl.results.compared_cells import ComparedMeasure, State
from mechdsl.results.corrected_cells import decide
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
)
from mechdsl.results.found_differences import CellDifference, Differences, Place, Side
from mechdsl.results.matched_runs import (
    matched_cells,
    matched_files,
    matched_measures,
)
from mechdsl.results.results import Results
from mechdsl.statistics.measure_data import MeasureData


def compare(
    old: Results, new: Results, sides: tuple[Side, Side] = (Side("old"), Side("new"))
) -> Differences:
    """What changed from one run to another.

    sides: what both are called, and what they were asked for. Files are matched by name, or are the
    two that there are; experiments by name; measures by label, effect and the position read at;
    cells by coordinates, site and position; rows by content.
    """
    work = _Comparison(old, new)
    conventions = decide([each for _, each in work.measures])
    options = sides[0].options, sides[1].options
    return Differences(
        old=sides[0],
        new=sides[1],
        inputs=tuple(changed_inputs(old, new, work.files, work.pairs, options)),
        rows=tuple(each for each in (row_change(*pair) for pair in work.pairs) if each),
        verdicts=tuple(work.verdicts),
        cells=tuple(work.cells()),
        added=(*work.added, *work.without_number("found")),
        removed=(*work.removed, *work.without_number("lost")),
        counts=Counter(state for _, each in work.measures for state in each.states),
        conventions=conventions,
    )


class _Comparison:
    """Two runs side by side."""

    def __init__(self, old: Results, new: Results) -> None:
        self.files: list[tuple[FileResult, FileResult]] = []
        self.pairs: list[tuple[str, ExperimentResult, ExperimentResult]] = []
        self.measures: list[tuple[str, ComparedMeasure]] = []
        self.verdicts: list[VerdictChange] = []
        self.added: list[Place] = []
        self.removed: list[Place] = []
        self.several = max(len(old.files), len(new.files)) > 1
        for one, two in matched_files(old, new):
            if one is not None and two is not None:
                self.files.append((one, two))
            self._files(one, two)

    def _files(self, old: FileResult | None, new: FileResult | None) -> None:
        before, after = _by_name(old), _by_name(new)
        for name in dict.fromkeys([*after, *before]):
            one, two = before.get(name), after.get(name)
            file = new or old
            assert file is not None
            self._experiments(f"{name} of {file.file}" if self.several else name, one, two)

    def _experiments(self, name: str, old: Found | None, new: Found | None) -> None:
        self.verdicts += changed_verdicts(name, _outcomes(old), _outcomes(new))
        if isinstance(old, ExperimentResult) and isinstance(new, ExperimentResult):
            self.pairs.append((name, old, new))
            self._pair(name, old, new)
        elif isinstance(old, ExperimentResult):
            self.removed.append(Place(name, reason=_why(new)))
        elif isinstance(new, ExperimentResult):
            self.added.append(Place(name, reason=_why(old)))

    def _pair(self, name: str, old: ExperimentResult, new: ExperimentResult) -> None:
        rows = AlignedRows.of(old, new)
        measures, cells = matched_measures(old, new), matched_cells(old, new)
        for found, result, numbers, places in (
            (self.added, new, measures.added, cells.added),
            (self.removed, old, measures.removed, cells.removed),
        ):
            found += [Place(name, measure_name(result.measures[number])) for number in numbers]
            found += [Place(name, cell=result.cells[place].name) for place in places]
        if len(cells):
            self.measures += [
                (name, ComparedMeasure(old, new, numbers, cells, rows)) for numbers in measures
            ]

    def without_number(self, state: State) -> Iterator[Place]:
        """Cells of both runs that have a number in one of them alone."""
        for name, each in self.measures:
            said = measure_name(each.aligned.new)
            for cell in each.of_state(state).tolist():
                key = each.new.cells[int(each.cells.new[cell])]
                yield Place(name, said, key.name, each.reasons[cell])

    def cells(self) -> Iterator[CellDifference]:
        """Those that have a number in both runs and aren't equal to the bit."""
        for name, each in self.measures:
            for cell in each.of_state("changed", "noise", "unclear", "rounding").tolist():
                yield _cell(name, each, cell)


Found = ExperimentResult | LostExperiment


def _by_name(file: FileResult | None) -> dict[str, Found]:
    if file is None:
        return {}
    return {each.name: each for each in (*file.experiments, *file.lost)}


def _outcomes(found: Found | None) -> Sequence[ExpectOutcome]:
    return () if found is None else found.outcomes


def _why(found: Found | None) -> str | None:
    if not isinstance(found, LostExperiment):
        return None
    return "; ".join(f"not computed ({each.code}): {each.reason}" for each in found.reasons)


def measure_name(data: MeasureData) -> str:
    at = "" if data.at is None else f" at {data.at}"
    return f"{data.called} of {data.label}{at}"


def _cell(experiment: str, found: ComparedMeasure, cell: int) -> CellDifference:
    key = found.new.cells[int(found.cells.new[cell])]
    data, values, paired = found.aligned.new, found.values, found.rows.paired

    def number(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    return CellDifference(
        experiment=experiment,
        cell=key.name,
        coords={**key.also, **key.coords},
        site=key.site,
        position=key.position,
        label=data.label,
        effect=data.called,
        at=data.at,
        kind=data.kind,
        state=found.states[cell],
        paired=paired,
        rows=int(values.n[cell]),
        units=int(found.units[cell]),
        rows_changed=int(values.changed[cell]) if paired else None,
        rows_beyond=int(values.beyond[cell]) if paired else None,
        largest=number(values.largest[cell]),
        old=number(found.before[cell]),
        new=number(found.after[cell]),
        difference=number(found.after[cell] - found.before[cell]),
        low=number(found.low[cell]),
        high=number(found.high[cell]),
        p=number(found.p[cell]),
        p_corrected=number(found.p_corrected[cell]),
        p_at_most=bool(found.floor[cell]),
        rounding=number(found.bound[cell]) or None,
        reason=found.reasons[cell],
    )
