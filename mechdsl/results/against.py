"""A run's verdicts, set against those of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
)
from mechdsl.results.shown import AGAINST_AS_TEXT, shown_by
from mechdsl.statistics.measure_data import MeasureData, Missing

Ends = Callable[[str, str, Sequence[ExpectOutcome]], bool]
"""(file, experiment, verdicts on its expectations so far) -> whether they end the run."""
Kind = Literal["regression", "failed before", "new", "holds now", "gone"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Change:
    """An expectation whose verdict isn't that of the earlier run, or that fails in both; or what
    could be computed there and can't be now."""

    kind: Kind
    """`regression`: it held there and fails now, or was computed there and can't be now;
    `failed before`: there and now; `new`: not in the earlier run; `holds now`: it failed there;
    `gone`: only in the earlier run."""
    file: str
    experiment: str
    text: str = ""
    """Of the expectation; the measure that could not be computed; empty for a whole experiment."""
    now: ExpectOutcome | None = None
    before: ExpectOutcome | None = None
    lost: Missing | None = None
    """Why an experiment or a measure can't be computed now."""

    @property
    def fails(self) -> bool:
        """Whether it fails the job: what failed before doesn't."""
        failed = self.now is not None and not self.now.holds
        return self.kind == "regression" or (self.kind == "new" and failed)


@dataclass(frozen=True)
class Against:
    """What has changed since an earlier run: `results.against`."""

    runs: tuple[str, ...]
    """The earlier run, as it was named; several where files have one each."""
    changes: tuple[Change, ...]
    """By kind, then in the order of the files."""
    unchanged: int
    """Expectations that held there and hold now."""
    without: tuple[str, ...] = ()
    """Files that are in none of these runs, so that all their expectations are new."""

    def of_kind(self, kind: Kind) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(each for each in self.changes if each.kind == kind)

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Expectations that held there and fail now, and what could be computed there."""
        return self.of_kind("regression")

    @property
    def fails(self) -> bool:
        """Whether the job fails: by a regression, or by an expectation that is new."""
        return any(each.fails for each in self.changes)

    def to_text(self, width: int = 100) -> str:
        """What the command line prints of it, `width` columns wide."""
        return shown_by(AGAINST_AS_TEXT)(self, width)

    def __repr__(self) -> str:
        first = self.to_text(10_000).lstrip().split("\n", 1)[0]
        return f"<Against {first.removeprefix('against ')}>"


@dataclass(frozen=True)
class Earlier:
    """An earlier run, before the one that is set against it."""

    runs: tuple[str, ...]
    """As they were named."""
    files: Mapping[str, FileResult | None]
    """File that is run now → what it is set against; None where no run has it."""
    unasked: Mapping[str, Collection[str]]
    """File that is run now → experiments of it that aren't, by `only`: they aren't gone."""

    def ends(self, file: str, experiment: str, outcomes: Sequence[ExpectOutcome]) -> bool:
        """Whether verdicts end a run that stops at the first failure that fails the job."""
        before = _outcomes(self.files.get(file)).get(experiment, ())
        paired = _paired(file, experiment, outcomes, before)
        return any(each.fails for each in paired)

    def compare(self, files: Sequence[FileResult]) -> Against:
        """What has changed in files that were run."""
        changes: list[Change] = []
        unchanged = 0
        for file in files:
            for each in self._of_file(file):
                if each is None:
                    unchanged += 1
                else:
                    changes.append(each)
        changes.sort(key=lambda each: KINDS.index(each.kind))
        without = tuple(file.file for file in files if self.files.get(file.file) is None)
        return Against(self.runs, tuple(changes), unchanged, without)

    def _of_file(self, now: FileResult) -> Iterator[Change | None]:
        """The changes of a file; None for each expectation that held and holds."""
        earlier = self.files.get(now.file)
        before = _outcomes(earlier)
        after = _outcomes(now)
        # What wasn't decided, or wasn't to be run, isn't gone.
        waiting = {each.name: [e.text for e in each.expects] for each in now.not_run}
        left_out = set(self.unasked.get(now.file, ()))
        if earlier is not None:
            yield from _lost(now, earlier)
        for name in dict.fromkeys((*after, *before)):
            if name in after or name not in left_out:
                undecided = waiting.get(name, ())
                found = _pairs(after.get(name, ()), before.get(name, ()), undecided)
                for one, two in found:
                    if one is not None and two is not None and one.holds and two.holds:
                        yield None
                    else:
                        yield _change(now.file, name, one, two)


def first_failure(earlier: Earlier | None) -> Ends:
    """What ends a run with `fail_fast`: an expectation that fails, or that fails the job."""
    if earlier is not None:
        return earlier.ends
    return lambda file, experiment, outcomes: not all(each.holds for each in outcomes)


def _outcomes(file: FileResult | None) -> dict[str, tuple[ExpectOutcome, ...]]:
    """Experiment → its verdicts."""
    if file is None:
        return {}
    every: tuple[ExperimentResult | LostExperiment, ...] = (*file.experiments, *file.lost)
    return {each.name: each.outcomes for each in every}


def _normal(text: str) -> str:
    return " ".join(text.split())


def _pairs(
    now: Sequence[ExpectOutcome],
    before: Sequence[ExpectOutcome],
    undecided: Sequence[str] = (),
) -> Iterator[tuple[ExpectOutcome | None, ExpectOutcome | None]]:
    """Expectations of one experiment by their texts, several equal ones by their order; first all
    of now. undecided: texts of some that are in neither."""
    left: dict[str, list[ExpectOutcome]] = {}
    for each in before:
        left.setdefault(_normal(each.text), []).append(each)
    for each in now:
        same = left.get(_normal(each.text))
        yield each, same.pop(0) if same else None
    for text in undecided:
        same = left.get(_normal(text))
        if same:
            same.pop(0)
    kept = {id(each) for same in left.values() for each in same}
    for each in before:
        if id(each) in kept:
            yield None, each


def _paired(
    file: str, experiment: str, now: Sequence[ExpectOutcome], before: Sequence[ExpectOutcome]
) -> Iterator[Change]:
    for one, two in _pairs(now, before):
        if one is not None and not one.holds:
            yield _change(file, experiment, one, two)


def _change(
    file: str, experiment: str, now: ExpectOutcome | None, before: ExpectOutcome | None
) -> Change:
    either = now or before
    assert either is not None
    return Change(_kind(now, before), file, experiment, either.text, now, before)


def _kind(now: ExpectOutcome | None, before: ExpectOutcome | None) -> Kind:
    if now is None:
        return "gone"
    if before is None:
        return "new"
    if now.holds:
        return "holds now"
    return "regression" if before.holds else "failed before"


def _lost(now: FileResult, before: FileResult) -> Iterator[Change]:
    """Experiments and measures that can't be computed now, and could there."""
    there = {each.name: each for each in before.experiments}
    for lost in now.lost:
        if lost.name in there:
            why = lost.reasons[0] if lost.reasons else None
            yield Change("regression", now.file, lost.name, lost=why)
    for each in now.experiments:
        if each.name not in there:
            continue
        computed = {_name(data) for _, data in there[each.name].computed()}
        for data in each.measures:
            if data.missing is not None and _name(data) in computed:
                text = f"{data.called} of {data.label}"
                yield Change("regression", now.file, each.name, text, lost=data.missing)


def _name(data: MeasureData) -> tuple[str, str, str | None]:
    return data.called, data.label, data.at
