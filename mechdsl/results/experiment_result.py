"""Results of experiments in memory, with the values of every prompt.

A file's result holds those of its experiments, what they generated and the verdicts on their
expectations. `Against` holds the verdicts that changed since an earlier run. Functions of
`mechdsl.show` display them; they are called by name, because that package is above this one.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.records import Record, record
from mechdsl.base.runtime import restores_random_state
from mechdsl.base.text import Percent, count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run_record import PassSizes, SavedFile
from mechdsl.program import spec
from mechdsl.resolve.cells import CellKey, Coord
from mechdsl.resolve.expansion import Selection
from mechdsl.statistics.cell_statistics import run_interval
from mechdsl.statistics.intervals import share_interval
from mechdsl.statistics.measurements import (
    CellStatistics,
    EffectSums,
    Interval,
    MeasureData,
    MissingReason,
    NullBand,
    RandomControlValues,
    SamplingDesign,
)
from mechdsl.vocab.metrics import Reply

if TYPE_CHECKING:
    import altair
    import pandas


RepliesByPrompt = Mapping[int, tuple[Reply, ...]]
"""Id of a prompt → what was written behind it: one reply for each sample and draw of noise."""


@dataclass(frozen=True)
class Replies:
    """Replies of cells and of unpatched runs; prompts go by their ids."""

    cells: tuple[RepliesByPrompt, ...] = ()
    """[cell]; a prompt that isn't part of a cell isn't there."""
    runs: Mapping[str, RepliesByPrompt] = field(default_factory=dict[str, RepliesByPrompt])
    """By name, those that are measured: the base run, and the source where effects need it."""
    prompts: Mapping[int, str] = field(default_factory=dict[int, str])
    """The text of each prompt in the base run."""

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def shifted(self, by: int) -> Replies:
        """The same with other ids of prompts."""

        def moved(texts: RepliesByPrompt) -> RepliesByPrompt:
            return {row + by: own for row, own in texts.items()}

        return Replies(
            tuple(map(moved, self.cells)),
            {run: moved(texts) for run, texts in self.runs.items()},
            {row + by: text for row, text in self.prompts.items()},
        )


def merge_replies(parts: Sequence[Replies], several: Sequence[str]) -> Replies:
    """Those of several variants, whose cells stand one behind the other. several: which one each
    is, where their runs differ."""
    runs: dict[str, RepliesByPrompt] = {}
    for part, which in zip(parts, several, strict=True):
        for run, texts in part.runs.items():
            name = f"{run} ({which})" if which else run
            runs[name] = {**runs.get(name, {}), **texts}
    return Replies(
        tuple(texts for part in parts for texts in part.cells),
        runs,
        {row: text for part in reversed(parts) for row, text in part.prompts.items()},
    )


DEFAULT_SHOWN_PROMPTS = 3
"""Prompts that an overlay shows where `top n` doesn't say how many."""


@record
class SeenImage(Record):
    """An image as the model sees it, and how its tokens divide it."""

    title: str
    pixels: NDArray[np.uint8]
    """[height, width, 3], resized and cropped, not normalised."""
    front: int
    """Tokens before those of the patches."""
    rows: int
    cols: int


TEXT_RENDERER = "mechdsl.show.output:experiment_text"

HTML_RENDERER = "mechdsl.show.notebook:experiment_html"

CHART_RENDERER = "mechdsl.show.output:experiment_chart"

DIFFERENCES_RENDERER = "mechdsl.show.differences:differences_text"

JUNIT_RENDERER = "mechdsl.show.junit:results_junit"

VERDICTS_RENDERER = "mechdsl.show.runs:verdict_comparison_text"

REPR_WIDTH = 100
"""Characters of a line of a `repr`."""

MAX_REPR_ITEMS = 5
"""Experiments, or measures, that a `repr` names."""


@restores_random_state
def load_renderer(place: str) -> Callable[..., Any]:
    """The function `module:name`, imported now."""
    module, _, name = place.partition(":")
    return restores_random_state(getattr(import_module(module), name))


ANSWER_TOKENS_KEY = "answer tokens"
"""The convention on tokens of the answer behind the prompts, where it matters."""


@dataclass(frozen=True)
class ExpectOutcome:
    """The verdict on one `expect`."""

    text: str
    holds: bool
    value: float | str | None
    low: float | None
    high: float | None
    reason: str | None = None
    line: int | None = None
    """Of the file."""
    effective_n: int | None = None
    """Independent units behind the value, the fewest of all that it reads; None where it has no
    number."""
    computed: bool = True
    """False where it fails because something that it reads could not be computed."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ExperimentResult:
    """What one experiment found: `measures` hold every prompt's value, `statistics` the rest.

    The executor fills the upper part, `tabulate` the lower one.
    """

    name: str
    model: str
    axes: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes that reports may use: `item` for `position`."""
    centres: tuple[str, ...] = ()
    """Axes whose values are the centres of windows."""
    cells: tuple[CellKey, ...]
    measures: tuple[MeasureData, ...]
    runs: Mapping[str, Mapping[str, Floats]] = field(
        default_factory=dict[str, Mapping[str, Floats]]
    )
    """Run name -> label -> value per prompt, of the unpatched run."""
    accuracy: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """Run name -> 1 or 0 per row, where the prompts have an answer: of all rows, whatever `keep`
    keeps."""
    accuracy_rounding: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """The same: 1 where rounding may decide it."""
    accuracy_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """The same: the ids of these rows; where it is missing they are those of the prompts."""
    accuracy_units: Mapping[str, Ints] = field(default_factory=dict[str, Ints])
    """The same: rows of one number are right or wrong together (one text, one value of `stats
    by`); where it is missing, each is a unit."""
    base: str = "clean"
    source: str | None = None
    called: Mapping[str, str] = field(default_factory=dict[str, str])
    """Other names of base and source, for people: a block's or a model's for its clean run."""
    conventions: Mapping[str, str] = field(default_factory=dict[str, str])
    selected: tuple[Selection, ...] = ()
    """Whose picks it tests on the rows that they were picked on."""
    left_out: Mapping[int, str] = field(default_factory=dict[int, str])
    """Ids of rows that `--allow-nan` left out of everything → where they can't be used."""
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of `model` and `data`."""
    row_ids: tuple[int, ...] | None = None
    """Per prompt, the same prompt has the same id in every experiment."""
    row_keys: tuple[int, ...] | None = None
    """Per prompt, a hash of its content: what is drawn hangs on it, and not on its place."""
    blocks: Ints | None = None
    """[prompt]: of which block of prompts it is, where several stand side by side."""
    strata: Ints | None = None
    """[prompt]: rows of one number have the same values of what the block deals out evenly."""
    population: str = ""
    """What intervals and p are about, in words: `new rows of this design`."""
    row_values: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    """Values of the prompts block per prompt, for `report table by VAR` and `stats by VAR`."""
    drawn: RandomControlValues | None = None
    """What controls measured, until bands are made of it."""
    controls: tuple[NullBand | None, ...] = ()
    """Per measure, or empty where no experiment was run `against` something."""
    texts: tuple[tuple[str, ...], ...] = ()
    """Per prompt, the tokens of the base run as text, for `report overlay`."""
    replies: Replies = field(default_factory=Replies)
    """What rows wrote, with `generate`."""
    rounding: str = ""
    """What bounds of rounding come from, in words."""
    hits: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Per cell and prompt, the indices into `texts` of the tokens that were hit."""
    seen: tuple[SeenImage | None, ...] = ()
    """Per prompt its image, where they are images, and None where it isn't shown."""

    reports: tuple[spec.Report, ...] = ()
    settings: spec.Statistics | None = None
    seed: int = 0
    statistics: tuple[CellStatistics, ...] = ()
    outcomes: tuple[ExpectOutcome, ...] = ()

    def computed(self) -> Iterator[tuple[int, MeasureData]]:
        """The measures that could be computed, with their numbers."""
        return ((n, data) for n, data in enumerate(self.measures) if data.missing is None)

    @property
    def prompts(self) -> int:
        """How many prompts were run."""
        return int(self.measures[0].patched.shape[1]) if self.measures else 0

    @property
    def direction(self) -> str:
        """`clean → fewer`, or the base run alone."""
        base = self.shown(self.base)
        return f"{self.shown(self.source)} → {base}" if self.source else base

    def shown(self, runs: str) -> str:
        """What people call a run, or several: `clean` says too little beside another block."""
        return ", ".join(self.called.get(run, run) for run in runs.split(", "))

    @property
    def holds(self) -> bool:
        """Whether every expectation does."""
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def groups(self) -> NDArray[Any] | None:
        """The groups that are resampled, where `stats by` names a value."""
        by = self.settings.by if self.settings else None
        if by is None or by not in self.row_values:
            return None
        return np.array([str(value) for value in self.row_values[by]])

    def control(self, measure: int) -> NullBand | None:
        """The null band beside a measure."""
        return self.controls[measure] if self.controls else None

    @cached_property
    def sampling(self) -> SamplingDesign:
        """What every interval and p of this experiment hangs on beside its values."""
        if self.settings is None:
            raise ValueError(f"experiment `{self.name}` has no statistics yet")
        keys = self.row_ids if self.row_keys is None else self.row_keys
        return SamplingDesign(
            self.prompts, self.settings, self.seed, keys, self.groups, self.strata, self.blocks
        )

    @cached_property
    def run_intervals(self) -> dict[str, dict[str, Interval]]:
        """Run -> label -> mean and interval on the unpatched run; numbers only."""
        of = {data.label: data for data in self.measures}
        categories = {data.label for data in self.measures if data.kind == "category"}
        found: dict[str, dict[str, Interval]] = {}
        for run, values in self.runs.items():
            found[run] = {
                label: run_interval(rows, self.sampling, of.get(label))
                for label, rows in values.items()
                if label not in categories
            }
        for run in self.accuracy:
            found.setdefault(run, {})["accuracy"] = self.accuracy_of(run)
        return found

    def accuracy_of(self, run: str, confidence: float | None = None) -> Interval:
        """The share of rows in which the model is right, with its exact interval; `n` counts all
        rows, kept or not. No numbers where no row has an answer."""
        if confidence is None:
            confidence = 95.0 if self.settings is None else self.settings.confidence
        rows = self.accuracy[run]
        known = ~np.isnan(rows)
        if not known.any():
            return Interval(np.nan, np.nan, np.nan, 0)
        units = self.accuracy_units.get(run)
        if units is None and self.groups is not None and len(self.groups) == len(rows):
            units = np.unique(self.groups, return_inverse=True)[1]
        codes = np.arange(len(rows)) if units is None else units
        codes = np.unique(codes[known], return_inverse=True)[1].reshape(-1)
        right = np.bincount(codes, weights=rows[known]).astype(np.float64)
        count = np.bincount(codes)
        held = np.array([len(count)], dtype=np.int64)
        sums = EffectSums(right[None], count[None].astype(np.float64), held)
        low, high = share_interval(sums, np.array([len(codes)], dtype=np.int64), confidence)
        ends = (float(rows[known].mean()), float(low[0]), float(high[0]))
        return Interval(*ends, len(codes), self.accuracy_bound(run))

    def accuracy_bound(self, run: str) -> float:
        """How far rounding alone may move the accuracy of a run; 0 where that isn't known."""
        rows, known = self.accuracy_rounding.get(run), ~np.isnan(self.accuracy[run])
        return 0.0 if rows is None or not known.any() else float(rows[known].mean())

    def records(self) -> list[dict[str, Any]]:
        """One flat record per cell and measure, None where a number is missing."""
        return list(_records(self))

    def to_csv(self) -> str:
        """One line per cell and measure, under a line of names; what does not exist is empty."""
        return csv_text(self.records())

    def to_pandas(self) -> pandas.DataFrame:
        """A frame with one row per cell and measure.

        Raises ImportError without pandas, which the extra `mechdsl[frames]` installs.
        """
        return data_frame(self.records())

    def to_text(self, width: int = 100) -> str:
        """The tables, figures and verdicts that the command line prints, `width` columns wide."""
        return load_renderer(TEXT_RENDERER)(self, width)

    def plot(
        self,
        kind: str,
        axis: str | None = None,
        by: str | None = None,
        *,
        top: int | None = None,
    ) -> altair.TopLevelMixin:
        """What `report KIND AXIS by BY top TOP` draws, as an altair chart.

        kind: `heatmap`, `lines`, `bars`, `confusion` or `overlay`. Where neither axis nor by is
        given they are those of the file's own report of this kind, or the first that fit.
        Raises MechdslError for another kind and for what the experiment does not have (E0203,
        E0607), ImportError without altair.
        """
        return load_renderer(CHART_RENDERER)(self, kind, axis, by, top)

    @property
    def summary(self) -> str:
        """What was run, in one line."""
        sizes = {axis: len({cell.coords[axis] for cell in self.cells}) for axis in self.axes}
        grid = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        cells = count_noun(len(self.cells), "cell")
        cells += f" ({grid})" if grid else ""
        where = f"{self.name} on {self.model}"
        return f"{where}: {self.direction}, {cells}, {count_noun(self.prompts, 'prompt')}"

    def __repr__(self) -> str:
        measures = [f"{m.called} of {m.label}" for m in self.measures[:MAX_REPR_ITEMS]]
        more = len(self.measures) - len(measures)
        held = sum(outcome.holds for outcome in self.outcomes)
        lines = [
            self.summary,
            ", ".join(measures) + (f" and {more} more" if more else ""),
            f"{held} of {len(self.outcomes)} expectations hold" if self.outcomes else "",
        ]
        shown = [shorten(line, REPR_WIDTH, placeholder=" …") for line in lines if line]
        return "<ExperimentResult " + "\n  ".join(shown) + ">"

    def _repr_html_(self) -> str:
        return load_renderer(HTML_RENDERER)(self)


NUMBER_COLUMNS = (
    "mean",
    "low",
    "high",
    "p",
    "p_corrected",
    "base_mean",
    "source_mean",
    "commonest",
    "share",
    "mean_error",
)


def _none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _records(result: ExperimentResult) -> Iterator[dict[str, Any]]:
    lists = any(cell.listed for cell in result.cells)
    picked = [each.of for each in result.selected]
    for index, cell in enumerate(result.cells):
        for measure, data in enumerate(result.measures):
            found = result.statistics[measure]
            values = {
                "site": cell.site,
                # an axis may have this name; what is hit is the same then
                "position": cell.coords.get("position", cell.position),
                "tokens": " ".join(cell.tokens),
                "source_run": result.source,
                "base_run": result.base,
                "label": data.label,
                "metric": data.metric,
                "effect": data.effect,
                **({"estimator": data.estimator} if data.estimator else {}),
                "n": int(found.n[index]),
                "effective_n": int(found.units[index]),
                **{key: _none(getattr(found, key)[index]) for key in NUMBER_COLUMNS},
                **_null(result, measure, index),
                "p_at_most": bool(found.floor[index]),
                "inert": bool(data.inert[index]),
                "at_rounding": bool(found.at_rounding[index]),
                "reason": found.reasons[index],
                **({"listed": " ".join(cell.listed)} if lists else {}),
                **({"selected_by": " ".join(picked)} if picked else {}),
            }
            axes = {
                # the variable of a `for` may be called like a column
                f"axis_{axis}" if axis in values else axis: _number_of(cell.coords[axis])
                for axis in result.axes
                if axis != "position"
            }
            named = {"experiment": result.name, "model": result.model}
            yield {**named, **cell.also, **axes, **values}


def _number_of(coordinate: Coord) -> Coord:
    """A percentage without its sign, as columns are calculated with."""
    return float(coordinate) if isinstance(coordinate, Percent) else coordinate


def _null(result: ExperimentResult, measure: int, cell: int) -> dict[str, Any]:
    """Columns that only experiments with controls have."""
    if not result.controls:
        return {}
    band = result.control(measure)
    return {
        **{
            f"null_{key}": None if band is None else _none(getattr(band, key)[cell])
            for key in ("mean", "low", "high", "level", "p")
        },
        "null_draws": None if band is None else int(band.draws[cell]),
        "null_inside": bool(band.inside[cell]) if band and band.decides[cell] else None,
    }


def data_frame(records: list[dict[str, Any]]) -> pandas.DataFrame:
    """Records as a data frame. Raises ImportError where pandas is missing."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "data frames need pandas, which is optional: "
            'pip install "mechdsl[frames]" installs it; `records()` and `to_csv()` need nothing'
        ) from error
    return pandas.DataFrame(records)


def csv_text(records: list[dict[str, Any]]) -> str:
    """Records as CSV; a column that a record lacks is empty."""
    columns = dict.fromkeys(key for record in records for key in record)
    lines = _Lines()
    writer = csv.DictWriter(lines, list(columns), lineterminator="\r\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return "".join(lines.written)


class _Lines:
    """Ends records with `\\n`. The writer is told `\\r\\n`, so that it quotes what holds either."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, line: str) -> None:
        self.written.append(line.removesuffix("\r\n") + "\n")


@dataclass(frozen=True)
class LostExperiment:
    """An experiment that could not be computed, whose expectations therefore fail."""

    name: str
    reasons: tuple[MissingReason, ...]
    outcomes: tuple[ExpectOutcome, ...] = ()


@dataclass(frozen=True)
class UndecidedExpectation:
    """An `expect` without a verdict."""

    text: str
    line: int


@dataclass(frozen=True)
class SkippedExperiment:
    """What `fail_fast` left out: an experiment, or those expectations of one that had to wait for
    another."""

    name: str
    expects: tuple[UndecidedExpectation, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class FileResult:
    """The experiments of one file."""

    file: str
    """Its path as it was given, `<text>` for a text."""
    experiments: tuple[ExperimentResult, ...]
    hash: str = ""
    """SHA-256 of its text."""
    seed: int = 0
    sizes: PassSizes | None = None
    """What the run was laid out by; with it, two runs are equal bit for bit."""
    lost: tuple[LostExperiment, ...] = ()
    not_run: tuple[SkippedExperiment, ...] = ()
    """With `fail_fast`: what comes behind the first expectation that fails."""
    saved: tuple[SavedFile, ...] = ()
    """Files that `save` lines have written."""

    @property
    def computable(self) -> bool:
        """Whether every experiment and every measure that was run could be computed."""
        measures = (data for each in self.experiments for data in each.measures)
        return not self.lost and all(data.missing is None for data in measures)

    @property
    def complete(self) -> bool:
        """Whether every experiment and every measure was computed, and every expectation
        decided."""
        return self.computable and not self.not_run

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self.experiments) or "no experiments"
        return shorten(f"<FileResult {self.file}: {names}", REPR_WIDTH, placeholder=" …") + ">"


def missing_reason(problem: Diagnostic) -> MissingReason:
    """What a diagnostic says, in one line."""
    label = problem.label_text
    said = not label or problem.message.endswith(label)
    return MissingReason(problem.code, problem.message if said else f"{problem.message}: {label}")


StopCondition = Callable[[str, str, Sequence[ExpectOutcome]], bool]
"""(file, experiment, verdicts on its expectations so far) -> whether they end the run."""

ChangeType = Literal["regression", "failed before", "new", "holds now", "gone"]

CHANGE_TYPES: tuple[ChangeType, ...] = get_args(ChangeType)


@dataclass(frozen=True)
class ExpectationChange:
    """An expectation whose verdict isn't that of the earlier run, or that fails in both; or what
    could be computed there and can't be now."""

    kind: ChangeType
    """`regression`: it held there and fails now, or was computed there and can't be now;
    `failed before`: there and now; `new`: not in the earlier run; `holds now`: it failed there;
    `gone`: only in the earlier run."""
    file: str
    experiment: str
    text: str = ""
    """Of the expectation; the measure that could not be computed; empty for a whole experiment."""
    now: ExpectOutcome | None = None
    before: ExpectOutcome | None = None
    lost: MissingReason | None = None
    """Why an experiment or a measure can't be computed now."""

    @property
    def fails(self) -> bool:
        """Whether it fails the job: what failed before doesn't."""
        failed = self.now is not None and not self.now.holds
        return self.kind == "regression" or (self.kind == "new" and failed)


@dataclass(frozen=True)
class VerdictComparison:
    """What has changed since an earlier run: `results.against`."""

    runs: tuple[str, ...]
    """The earlier run, as it was named; several where files have one each."""
    changes: tuple[ExpectationChange, ...]
    """By kind, then in the order of the files."""
    unchanged: int
    """Expectations that held there and hold now."""
    without: tuple[str, ...] = ()
    """Files that are in none of these runs, so that all their expectations are new."""

    def of_kind(self, kind: ChangeType) -> tuple[ExpectationChange, ...]:
        """The changes of one kind."""
        return tuple(each for each in self.changes if each.kind == kind)

    @property
    def regressions(self) -> tuple[ExpectationChange, ...]:
        """Expectations that held there and fail now, and what could be computed there."""
        return self.of_kind("regression")

    @property
    def fails(self) -> bool:
        """Whether the job fails: by a regression, or by an expectation that is new."""
        return any(each.fails for each in self.changes)

    def to_text(self, width: int = 100) -> str:
        """What the command line prints of it, `width` columns wide."""
        return load_renderer(VERDICTS_RENDERER)(self, width)

    def __repr__(self) -> str:
        first = self.to_text(10_000).lstrip().split("\n", 1)[0]
        return f"<Against {first.removeprefix('against ')}>"


@dataclass(frozen=True)
class EarlierRun:
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

    def compare(self, files: Sequence[FileResult]) -> VerdictComparison:
        """What has changed in files that were run."""
        changes: list[ExpectationChange] = []
        unchanged = 0
        for file in files:
            for each in self._of_file(file):
                if each is None:
                    unchanged += 1
                else:
                    changes.append(each)
        changes.sort(key=lambda each: CHANGE_TYPES.index(each.kind))
        without = tuple(file.file for file in files if self.files.get(file.file) is None)
        return VerdictComparison(self.runs, tuple(changes), unchanged, without)

    def _of_file(self, now: FileResult) -> Iterator[ExpectationChange | None]:
        """The changes of a file; None for each expectation that held and holds."""
        earlier = self.files.get(now.file)
        before = _outcomes(earlier)
        after = _outcomes(now)
        # What wasn't decided, or wasn't to be run, isn't gone.
        waiting = {each.name: [e.text for e in each.expects] for each in now.not_run}
        left_out = set(self.unasked.get(now.file, ()))
        if earlier is not None:
            yield from _lost_results(now, earlier)
        for name in dict.fromkeys((*after, *before)):
            if name in after or name not in left_out:
                undecided = waiting.get(name, ())
                found = _pairs(after.get(name, ()), before.get(name, ()), undecided)
                for one, two in found:
                    if one is not None and two is not None and one.holds and two.holds:
                        yield None
                    else:
                        yield _change(now.file, name, one, two)


def stop_condition(earlier: EarlierRun | None) -> StopCondition:
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
) -> Iterator[ExpectationChange]:
    for one, two in _pairs(now, before):
        if one is not None and not one.holds:
            yield _change(file, experiment, one, two)


def _change(
    file: str, experiment: str, now: ExpectOutcome | None, before: ExpectOutcome | None
) -> ExpectationChange:
    either = now or before
    assert either is not None
    return ExpectationChange(_change_type(now, before), file, experiment, either.text, now, before)


def _change_type(now: ExpectOutcome | None, before: ExpectOutcome | None) -> ChangeType:
    if now is None:
        return "gone"
    if before is None:
        return "new"
    if now.holds:
        return "holds now"
    return "regression" if before.holds else "failed before"


def _lost_results(now: FileResult, before: FileResult) -> Iterator[ExpectationChange]:
    """Experiments and measures that can't be computed now, and could there."""
    there = {each.name: each for each in before.experiments}
    for lost in now.lost:
        if lost.name in there:
            why = lost.reasons[0] if lost.reasons else None
            yield ExpectationChange("regression", now.file, lost.name, lost=why)
    for each in now.experiments:
        if each.name not in there:
            continue
        computed = {_measure_key(data) for _, data in there[each.name].computed()}
        for data in each.measures:
            if data.missing is not None and _measure_key(data) in computed:
                text = f"{data.called} of {data.label}"
                yield ExpectationChange("regression", now.file, each.name, text, lost=data.missing)


def _measure_key(data: MeasureData) -> tuple[str, str, str | None]:
    return data.called, data.label, data.at
