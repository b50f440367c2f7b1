"""Differences of two runs: inputs, verdicts, effects, and cells that only one run has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import Field

from mechdsl.base.files import write_atomically
from mechdsl.base.text import count_noun, dump_json
from mechdsl.resolve.cells import CellKey
from mechdsl.results.differences.cells import (
    AlignedRows,
    CellState,
    IndexMatch,
    MeasureComparison,
    cell_key,
    decide_changes,
    match_cells,
    match_measures,
    match_rows,
)
from mechdsl.results.document import DocumentPart, ExpectDocument
from mechdsl.results.experiment_result import (
    DIFFERENCES_RENDERER,
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
    load_renderer,
)
from mechdsl.results.results import Results
from mechdsl.results.runs import (
    SOURCE_SUFFIX,
    Run,
    RunFacts,
    find_export,
    find_run,
    find_store_folder,
    load_results,
    load_stored_results,
    open_store,
    read_facts,
)
from mechdsl.statistics.measurements import MeasureData
from mechdsl.syntax.frontend import read_source


def match_files(
    old: Results, new: Results
) -> Iterator[tuple[FileResult | None, FileResult | None]]:
    """Match files by name; if each run has one file, match them whatever their names."""
    if len(old.files) == len(new.files) == 1:
        yield old.files[0], new.files[0]
        return
    pairs = IndexMatch.of([file.file for file in old.files], [file.file for file in new.files])
    yield from ((old.files[one], new.files[two]) for one, two in pairs)
    yield from ((None, new.files[place]) for place in pairs.added)
    yield from ((old.files[place], None) for place in pairs.removed)


STATISTICS_CONVENTIONS = frozenset(
    {
        "accuracy",
        "correction",
        "effect",
        "inert",
        "interval",
        "null band",
        "p",
        "pass sizes",
        "population",
        "rounding",
        "rows",
        "seed",
    }
)
"""Conventions that describe how numbers were computed, or that other sections contain."""


@dataclass(frozen=True)
class InputChange:
    """A changed input of the runs; None for a run without it."""

    what: str
    old: str | None
    new: str | None
    experiments: tuple[str, ...] = ()
    """Experiments with this input; empty for an input of all experiments."""


@dataclass(frozen=True)
class RowChange:
    """Rows of one experiment that are in only one run, by content."""

    experiment: str
    old: int
    """Number of rows in the old run."""
    new: int
    common: int
    added: tuple[int, ...]
    """Numbers of the new run's additional rows."""
    removed: tuple[int, ...]
    """Numbers of the rows that are missing in the new run."""


def find_input_changes(
    old: Results,
    new: Results,
    files: Sequence[tuple[FileResult, FileResult]],
    pairs: Sequence[tuple[str, ExperimentResult, ExperimentResult]],
    options: tuple[Mapping[str, str] | None, Mapping[str, str] | None],
) -> Iterator[InputChange]:
    """Yield changes of text, options, seed, pass sizes, inputs of experiments, and versions.

    Args:
        pairs: Name of an experiment and its result in both runs.
        options: Options of both runs besides the file (parameters, a limit); None if unknown.
    """
    for one, two in files:
        yield from _input_differences(_file_inputs(one), _file_inputs(two))
    one, two = options
    if one is not None and two is not None:
        yield from _input_differences(one, two)
    changes: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name, one, two in pairs:
        for change in _pair_changes(one, two):
            changes.setdefault((change.what, change.old, change.new), []).append(name)
    for key, names in changes.items():
        yield InputChange(*key, () if len(names) == len(pairs) else tuple(names))
    for change in _input_differences(old.versions, new.versions):
        yield InputChange(f"version of {change.what}", change.old, change.new)


def _input_differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[InputChange]:
    for what in dict.fromkeys([*new, *old]):
        if old.get(what) != new.get(what):
            yield InputChange(what, old.get(what), new.get(what))


def _file_inputs(file: FileResult) -> dict[str, str]:
    file_inputs = {"text of the file": file.hash, "seed": str(file.seed)}
    if file.sizes is not None:
        sizes = file.sizes
        file_inputs["pass sizes"] = f"{sizes.pass_tokens:,} tokens, prompts {sizes.prompt_tokens:,}"
    return file_inputs


def _pair_changes(old: ExperimentResult, new: ExperimentResult) -> Iterator[InputChange]:
    yield from _input_differences(_experiment_inputs(old), _experiment_inputs(new))
    for one, two in match_measures(old, new):
        before, after = old.measures[one], new.measures[two]
        if before.metric != after.metric:
            yield InputChange(f"metric of {after.label}", before.metric, after.metric)


def _experiment_inputs(result: ExperimentResult) -> dict[str, str]:
    inputs = {"model's name": result.model, "runs": result.direction}
    if result.settings is not None:
        own = result.settings
        by = "" if own.verdicts == "none" else f" verdicts {own.verdicts}"
        by += "" if own.by is None else f" by {own.by}"
        inputs["stats"] = (
            f"bootstrap({own.resamples}) confidence {own.confidence:g} correct {own.correction} "
            f"test {own.test}{by}"
        )
    for what, digest in result.hashes.items():
        inputs[f"{what} (SHA-256)"] = digest
    others = {k: text for k, text in result.conventions.items() if k not in STATISTICS_CONVENTIONS}
    return {**inputs, **others}


def find_row_change(name: str, old: ExperimentResult, new: ExperimentResult) -> RowChange | None:
    """Return the changes of rows; None if both runs have the same rows."""
    match = match_rows(old, new)
    if not match.added and not match.removed:
        return None
    return RowChange(
        name,
        old.prompts,
        new.prompts,
        len(match),
        tuple(_row_number(new, place) for place in match.added),
        tuple(_row_number(old, place) for place in match.removed),
    )


def _row_number(result: ExperimentResult, place: int) -> int:
    return place if result.row_ids is None else result.row_ids[place]


VerdictChangeType = Literal["fails now", "holds now", "new", "gone"]


@dataclass(frozen=True)
class VerdictChange:
    """The change of one `expect`."""

    experiment: str
    turn: VerdictChangeType
    old: ExpectOutcome | None
    new: ExpectOutcome | None

    @property
    def text(self) -> str:
        """The expectation as written in the source."""
        outcome = self.new or self.old
        assert outcome is not None
        return outcome.text


def find_verdict_changes(
    experiment: str, old: Sequence[ExpectOutcome], new: Sequence[ExpectOutcome]
) -> Iterator[VerdictChange]:
    """Match expectations by text; several equal ones in order."""
    match = IndexMatch.of([outcome.text for outcome in old], [outcome.text for outcome in new])
    for one, two in match:
        before, after = old[one], new[two]
        if before.holds != after.holds:
            turn: VerdictChangeType = "holds now" if after.holds else "fails now"
            yield VerdictChange(experiment, turn, before, after)
    for place in match.added:
        yield VerdictChange(experiment, "new", None, new[place])
    for place in match.removed:
        yield VerdictChange(experiment, "gone", old[place], None)


COMPARED_STATES: tuple[CellState, ...] = ("equal", "rounding", "noise", "changed", "unclear")
"""States of cells that have a number in both runs."""


@dataclass(frozen=True)
class ComparedRun:
    """One of the two runs, as displayed."""

    name: str
    note: str = ""
    """A note on the run: that its file has changed since."""
    options: Mapping[str, str] | None = None
    """Options besides the file; None if unknown, as for a folder."""


@dataclass(frozen=True)
class UnmatchedItem:
    """An experiment, or a measure or cell of one, that only one of the runs has."""

    experiment: str
    measure: str | None = None
    """`recovery of logit(answer)`; None for all measures."""
    cell: str | None = None
    reason: str | None = None
    """Why the other run has no number for it, although its file contains it."""


@dataclass(frozen=True)
class CellDifference:
    """One effect in one cell; None for missing numbers."""

    experiment: str
    cell: str
    coords: Mapping[str, int | float | str]
    site: str
    position: str | None
    label: str
    effect: str
    at: str | None
    kind: str
    state: CellState
    paired: bool
    """Whether the runs share rows; then only shared rows are compared."""
    rows: int
    """Number of compared rows; for two samples, of the smaller one."""
    units: int
    """Number of independent units."""
    rows_changed: int | None
    """Number of rows with a different value; None if no rows are shared."""
    rows_beyond: int | None
    """Number of these rows that rounding doesn't explain."""
    largest: float | None
    """Largest difference of a value, in the metric's unit; None for categories or unshared rows."""
    old: float | None
    """The effect on the compared rows; for categories, the share of the most frequent one."""
    new: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    p_at_most: bool
    """Whether p is the smallest value for this number of flips, and may be smaller."""
    rounding: float | None
    """Maximum effect of rounding on the difference."""
    reason: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Differences:
    """The result of `mechdsl.diff`."""

    old: ComparedRun
    """The old run: its `name`, a `note`, and its `options`."""
    new: ComparedRun
    """The new run, like `old`."""
    inputs: tuple[InputChange, ...]
    """Inputs that differ: `what`, `old`, `new`, and the `experiments` if not all are affected."""
    rows: tuple[RowChange, ...]
    """Per experiment, the numbers of `old`, `new` and `common` rows, and the ids of rows that were
    `added` and `removed`."""
    verdicts: tuple[VerdictChange, ...]
    """Expectations that changed, are new or are gone: `experiment`, `text`, `turn`, and both
    outcomes."""
    cells: tuple[CellDifference, ...]
    """Cells that aren't bit-identical."""
    added: tuple[UnmatchedItem, ...]
    """Experiments, measures and cells that only the new run has numbers for."""
    removed: tuple[UnmatchedItem, ...]
    """Experiments, measures and cells that only the old run has numbers for."""
    counts: Mapping[CellState, int]
    """Number of cells per state, separately for each measure."""
    conventions: Mapping[str, str]
    """Methods of the figures, in words."""

    @property
    def changed_cells(self) -> tuple[CellDifference, ...]:
        """Cells whose effect changed beyond noise."""
        return tuple(cell for cell in self.cells if cell.state == "changed")

    @property
    def compared(self) -> int:
        """Number of cells with a number in both runs."""
        return sum(self.counts.get(state, 0) for state in COMPARED_STATES)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the exit status is 1, in words; empty if it is 0."""
        failing = sum(verdict.turn == "fails now" for verdict in self.verdicts)
        cells, gone = len(self.changed_cells), len(self.removed)
        return tuple(
            said
            for count, said in (
                (cells, f"{count_noun(cells, 'cell')} changed beyond noise"),
                (failing, f"{count_noun(failing, 'expectation')} held before and not now"),
                (gone, f"{gone:,} {'thing' if gone == 1 else 'things'} gone"),
            )
            if count
        )

    @property
    def changed(self) -> bool:
        """Whether the exit status is 1: an effect changed beyond noise, an expectation that held
        fails, or something is missing."""
        return bool(self.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `mechdsl diff --format json`."""
        return differences_document(self).as_json()

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 2) -> str:
        """Return the document as JSON text, and write it to `path` if given."""
        text = dump_json(self.to_dict(), indent)
        if path is not None:
            write_atomically(Path(path), text + "\n")
        return text

    def to_text(self, width: int = 100) -> str:
        """Return the output of the command line, `width` columns wide."""
        return load_renderer(DIFFERENCES_RENDERER)(self, width)

    def __repr__(self) -> str:
        said = "; ".join(self.reasons) or "nothing changed beyond noise"
        return f"<Differences {self.old.name} → {self.new.name}: {said}>"


def compare_results(
    old: Results,
    new: Results,
    sides: tuple[ComparedRun, ComparedRun] = (ComparedRun("old"), ComparedRun("new")),
) -> Differences:
    """Compare two runs.

    Files are matched by name, or as the only two; experiments by name; measures by label, effect
    and position; cells by coordinates, site and position; rows by content.

    Args:
        sides: Names and options of both runs.
    """
    work = _Comparison(old, new)
    conventions = decide_changes([comparison for _, comparison in work.measures])
    options = sides[0].options, sides[1].options
    return Differences(
        old=sides[0],
        new=sides[1],
        inputs=tuple(find_input_changes(old, new, work.files, work.pairs, options)),
        rows=tuple(change for change in (find_row_change(*pair) for pair in work.pairs) if change),
        verdicts=tuple(work.verdicts),
        cells=tuple(work.cells()),
        added=(*work.added, *work.without_number("found")),
        removed=(*work.removed, *work.without_number("lost")),
        counts=Counter(state for _, comparison in work.measures for state in comparison.states),
        conventions=conventions,
    )


class _Comparison:
    """The comparison of two runs."""

    def __init__(self, old: Results, new: Results) -> None:
        self.files: list[tuple[FileResult, FileResult]] = []
        self.pairs: list[tuple[str, ExperimentResult, ExperimentResult]] = []
        self.measures: list[tuple[str, MeasureComparison]] = []
        self.verdicts: list[VerdictChange] = []
        self.added: list[UnmatchedItem] = []
        self.removed: list[UnmatchedItem] = []
        self.several = max(len(old.files), len(new.files)) > 1
        for one, two in match_files(old, new):
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

    def _experiments(
        self, name: str, old: ComputedOrLost | None, new: ComputedOrLost | None
    ) -> None:
        self.verdicts += find_verdict_changes(name, _outcomes(old), _outcomes(new))
        if isinstance(old, ExperimentResult) and isinstance(new, ExperimentResult):
            self.pairs.append((name, old, new))
            self._pair(name, old, new)
        elif isinstance(old, ExperimentResult):
            self.removed.append(UnmatchedItem(name, reason=_missing_text(new)))
        elif isinstance(new, ExperimentResult):
            self.added.append(UnmatchedItem(name, reason=_missing_text(old)))

    def _pair(self, name: str, old: ExperimentResult, new: ExperimentResult) -> None:
        rows = AlignedRows.of(old, new)
        measures, cells = match_measures(old, new), match_cells(old, new)
        label = _label_cells((*old.cells, *new.cells))
        for differences, result, numbers, places in (
            (self.added, new, measures.added, cells.added),
            (self.removed, old, measures.removed, cells.removed),
        ):
            differences += [
                UnmatchedItem(name, measure_label(result.measures[number])) for number in numbers
            ]
            differences += [
                UnmatchedItem(name, cell=label(result.cells[place])) for place in places
            ]
        if len(cells):
            self.measures += [
                (name, MeasureComparison(old, new, numbers, cells, rows)) for numbers in measures
            ]

    def without_number(self, state: CellState) -> Iterator[UnmatchedItem]:
        """Yield cells of both runs that have a number in only one of them."""
        for name, comparison in self.measures:
            said = measure_label(comparison.aligned.new)
            for cell in comparison.of_state(state).tolist():
                key = comparison.new.cells[int(comparison.cells.new[cell])]
                yield UnmatchedItem(name, said, key.name, comparison.reasons[cell])

    def cells(self) -> Iterator[CellDifference]:
        """Yield cells with a number in both runs that aren't bit-identical."""
        for name, comparison in self.measures:
            for cell in comparison.of_state("changed", "noise", "unclear", "rounding").tolist():
                yield _cell_difference(name, comparison, cell)


def _label_cells(cells: Iterable[CellKey]) -> Callable[[CellKey], str]:
    """Return a function that names a cell: with its position if another cell has its name."""
    names = Counter(key.name for key in {cell_key(cell): cell for cell in cells}.values())

    def label(cell: CellKey) -> str:
        is_unique = names[cell.name] == 1 or cell.position is None
        return cell.name if is_unique else f"{cell.name} at {cell.position}"

    return label


ComputedOrLost = ExperimentResult | LostExperiment


def _by_name(file: FileResult | None) -> dict[str, ComputedOrLost]:
    if file is None:
        return {}
    return {experiment.name: experiment for experiment in (*file.experiments, *file.lost)}


def _outcomes(outcome: ComputedOrLost | None) -> Sequence[ExpectOutcome]:
    return () if outcome is None else outcome.outcomes


def _missing_text(outcome: ComputedOrLost | None) -> str | None:
    if not isinstance(outcome, LostExperiment):
        return None
    return "; ".join(f"not computed ({reason.code}): {reason.reason}" for reason in outcome.reasons)


def measure_label(data: MeasureData) -> str:
    at = "" if data.at is None else f" at {data.at}"
    return f"{data.called} of {data.label}{at}"


def _cell_difference(experiment: str, comparison: MeasureComparison, cell: int) -> CellDifference:
    key = comparison.new.cells[int(comparison.cells.new[cell])]
    data, values, paired = comparison.aligned.new, comparison.values, comparison.rows.paired

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
        state=comparison.states[cell],
        paired=paired,
        rows=int(values.n[cell]),
        units=int(comparison.units[cell]),
        rows_changed=int(values.changed[cell]) if paired else None,
        rows_beyond=int(values.beyond[cell]) if paired else None,
        largest=number(values.largest[cell]),
        old=number(comparison.before[cell]),
        new=number(comparison.after[cell]),
        difference=number(comparison.after[cell] - comparison.before[cell]),
        low=number(comparison.low[cell]),
        high=number(comparison.high[cell]),
        p=number(comparison.p[cell]),
        p_corrected=number(comparison.p_corrected[cell]),
        p_at_most=bool(comparison.floor[cell]),
        rounding=number(comparison.bound[cell]) or None,
        reason=comparison.reasons[cell],
    )


DIFFERENCES_SCHEMA_VERSION: Literal[1] = 1


class ComparedRunDocument(DocumentPart):
    """One of the two runs."""

    name: str
    note: str | None = Field(default=None, description="a remark on the run")


class InputDocument(DocumentPart):
    """Something that went into the runs and differs."""

    what: str
    old: str | None
    new: str | None
    experiments: list[str] = Field(
        description="experiments that use this input; empty: all of them"
    )


class RowsDocument(DocumentPart):
    """Rows that are in one run alone, by their contents."""

    experiment: str
    old: int = Field(description="rows in the old run")
    new: int
    common: int
    added: list[int] = Field(description="numbers of the rows that only the new run has")
    removed: list[int] = Field(description="numbers of the rows that only the old run has")


class VerdictDocument(DocumentPart):
    """An expectation whose verdict differs, or that one run alone has."""

    experiment: str
    text: str
    turn: Literal["fails now", "holds now", "new", "gone"]
    old: ExpectDocument | None
    new: ExpectDocument | None


class CellDifferenceDocument(DocumentPart):
    """One effect in one cell that isn't equal to the bit. Numbers that don't exist are null."""

    experiment: str
    coords: dict[str, int | float | str]
    site: str
    position: str | None
    label: str
    effect: str
    at: str | None
    kind: Literal["number", "category"]
    state: CellState = Field(
        description="changed: beyond noise; noise: the difference can't be distinguished from 0; "
        "rounding: "
        "rounding explains every difference; unclear: there is no test"
    )
    paired: bool = Field(description="whether both runs have rows in common, which are compared")
    rows: int = Field(description="rows compared; of two samples, those of the smaller one")
    units: int = Field(description="independent units of the difference")
    rows_changed: int | None = Field(description="rows in which a value differs")
    rows_beyond: int | None = Field(description="rows whose difference rounding doesn't explain")
    largest: float | None = Field(description="largest difference of a value")
    old: float | None = Field(
        description="the effect on the rows compared; for categories, the share of the category "
        "that was most common"
    )
    new: float | None
    difference: float | None = Field(description="new minus old")
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    p_at_most: bool = Field(
        description="p is the smallest value that this number of sign flips can give"
    )
    rounding: float | None = Field(description="how far rounding may move the difference")
    reason: str | None = Field(description="why there is no test")


class UnmatchedItemDocument(DocumentPart):
    """An experiment, a measure or a cell of one, of which one run alone has numbers."""

    experiment: str
    measure: str | None
    cell: str | None
    reason: str | None = Field(description="why the other run has no such number")


class DifferencesDocument(DocumentPart):
    """What `mechdsl diff --format json` prints."""

    schema_version: Literal[1] = Field(alias="schema")
    old: ComparedRunDocument
    new: ComparedRunDocument
    changed: bool = Field(description="whether the exit status is 1")
    reasons: list[str] = Field(description="reasons for exit status 1")
    inputs: list[InputDocument]
    rows: list[RowsDocument]
    verdicts: list[VerdictDocument]
    cells: list[CellDifferenceDocument]
    added: list[UnmatchedItemDocument]
    removed: list[UnmatchedItemDocument]
    counts: dict[CellState, int] = Field(
        description="cells by state, counted separately for each measure"
    )
    conventions: dict[str, str]


def differences_document(differences: Differences) -> DifferencesDocument:
    """Convert the comparison to its document."""
    return DifferencesDocument.create(differences, schema_version=DIFFERENCES_SCHEMA_VERSION)


def differences_schema() -> dict[str, Any]:
    """Return the JSON schema of the document, as printed by `mechdsl schema differences`."""
    schema = DifferencesDocument.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


RunSource = Results | Run | str | Path
"""Results, a run of a store, or the name of a run: its id, a file, a folder."""

NON_INPUT_SETTINGS = frozenset({"fresh", "allow-outside", "untrusted", "allow-python"})
"""Settings that don't affect numbers."""


@dataclass(frozen=True, eq=False)
class _LoadedRun:
    side: ComparedRun
    results: Results
    id: str | None = None
    """Id of a run of a store."""


def diff_runs(old: RunSource, new: RunSource, store: Path | None = None) -> Differences:
    """Compare two runs.

    Args:
        store: Folder of the runs; None: next to the `.mech` file, if one of the runs is named by
            one,
            or in the working directory.

    Raises:
        MechdslError: E0208 if a run is missing or unreadable.
    """
    one, two = _load_run(old, new, store), _load_run(new, old, store)
    sides = [one.side, two.side]
    if one.id is not None and one.id == two.id:
        sides = [
            replace(side, note="; ".join(filter(None, (side.note, "both are the same run"))))
            for side in sides
        ]
    elif sides[0].name == sides[1].name:
        sides = [
            replace(side, name=f"{side.name}, {word}")
            for side, word in zip(sides, ("old", "new"), strict=True)
        ]
    return compare_results(one.results, two.results, (sides[0], sides[1]))


def _load_run(given: RunSource, other: RunSource, store: Path | None) -> _LoadedRun:
    """Load a run; an id is looked up in the store of `other`, the other run."""
    if isinstance(given, Results):
        files = ", ".join(file.file for file in given.files) or "no file"
        return _LoadedRun(ComparedRun(files), given)
    if isinstance(given, Run):
        return _LoadedRun(_compared_run(given.facts, given.about), given.results, given.id)
    text = str(given)
    if Path(text).is_dir():
        return _LoadedRun(
            ComparedRun(text), load_results(str(find_export(Path(text), str(other))), store)
        )
    with_file = (
        text if text.endswith(SOURCE_SUFFIX) or isinstance(other, Results | Run) else str(other)
    )
    with open_store(find_store_folder(with_file, store)) as opened:
        run = find_run(opened, text)
        results = load_stored_results(opened, run)
    side = _compared_run(read_facts(run), run.about)
    return _LoadedRun(replace(side, note=_source_change_note(text, results)), results, run.id)


def _compared_run(facts: RunFacts, about: Mapping[str, Any]) -> ComparedRun:
    """Describe a run of a store, with all its parameters and other options."""
    parameters = about.get("parameters")
    options = {name: v for name, v in facts.settings.items() if name not in NON_INPUT_SETTINGS}
    if isinstance(parameters, dict):
        own = cast("dict[Any, Any]", parameters)
        options = {name: v for name, v in options.items() if not name.startswith("set ")}
        options = {**{f"parameter {name}": str(v) for name, v in own.items()}, **options}
    name = f"{facts.file}, run {facts.id}" if facts.file else f"run {facts.id}"
    return ComparedRun(name, "", options)


def _source_change_note(text: str, results: Results) -> str:
    """Return a note if a named file differs from the text that was run."""
    if not text.endswith(SOURCE_SUFFIX):
        return ""
    source, _ = read_source(Path(text))
    if source is None:
        return "the file can't be read now"
    now = sha256(source.text.encode()).hexdigest()
    if all(file.hash == now for file in results.files):
        return ""
    return "the file has changed since this run"
