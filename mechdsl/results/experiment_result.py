"""Results of experiments in memory, with the values of every prompt.

A file's result contains those of its experiments, their generated text and the verdicts on their
expectations. `VerdictComparison` contains the verdicts that changed since an earlier run.
Functions of `mechdsl.show` display results; they are loaded by name, because that package is above
this one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.records import Record
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
from mechdsl.statistics.verification import VerifiedCells
from mechdsl.vocab.metrics import Reply

if TYPE_CHECKING:
    import altair
    import pandas


RepliesByPrompt = Mapping[int, tuple[Reply, ...]]
"""Id of a prompt → its replies: one for each sample and draw of noise."""


@dataclass(frozen=True)
class Replies:
    """Replies of cells and of unpatched runs, by prompt id."""

    cells: tuple[RepliesByPrompt, ...] = ()
    """Replies of each cell, only for prompts that are part of it. Shape [cell]."""
    runs: Mapping[str, RepliesByPrompt] = field(default_factory=dict[str, RepliesByPrompt])
    """Replies of the measured runs by name: the base run, and the source if effects need it."""
    prompts: Mapping[int, str] = field(default_factory=dict[int, str])
    """The text of each prompt in the base run."""

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def shifted(self, by: int) -> Replies:
        """Return the replies with shifted prompt ids."""

        def moved(texts: RepliesByPrompt) -> RepliesByPrompt:
            return {row + by: replies for row, replies in texts.items()}

        return Replies(
            tuple(map(moved, self.cells)),
            {run: moved(texts) for run, texts in self.runs.items()},
            {row + by: text for row, text in self.prompts.items()},
        )


def merge_replies(parts: Sequence[Replies], several: Sequence[str]) -> Replies:
    """Combine the replies of several variants, with their cells in order.

    Args:
        several: Names of the variants, if their runs differ.
    """
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
"""Number of prompts in an overlay without `top n`."""


class SeenImage(Record):
    """An image as the model sees it, and its division into tokens."""

    title: str
    pixels: NDArray[np.uint8]
    """Resized and cropped, not normalised. Shape [height, width, 3]."""
    span: tuple[int, int]
    """Its first token in the prompt, and the one after its last, with tokens of no patch."""
    tokens: tuple[int, ...]
    """The token of each patch, row by row."""
    rows: int
    cols: int


class ActiveText(Record):
    """A prompt in which an observed feature is active."""

    row: int
    """Id of the prompt."""
    tokens: tuple[str, ...]
    """Texts of its tokens, each with the white space before it."""
    values: tuple[float | None, ...]
    """Activation at each token; None where it isn't observed."""


class SeedMean(Record):
    """The mean of a measure over trainings with several seeds, with two separate intervals."""

    measure: int
    """Index in `ExperimentResult.measures`."""
    cell: CellKey
    """The cell without its seed."""
    values: tuple[float, ...]
    """The mean of each training with a value."""
    mean: float
    low: float
    """Low end of the interval over seeds: Student's t of `values`. NaN below five trainings and if
    all are equal."""
    high: float
    row_low: float
    """Low end of the interval over prompts, of each prompt's mean over the trainings; NaN
    without one."""
    row_high: float
    n: int
    """Number of prompts."""

    @property
    def seeds(self) -> int:
        """Number of trainings with a value."""
        return len(self.values)


TARGET_LABEL = "target"
"""Label of the node of a measure that an attribution graph explains."""


class ResultNode(Record):
    """A node of an attribution graph."""

    label: str
    """`token 3`, `L0.f12@3` for feature 12 at token 3, `L0.error@3`, `logit 17` or `target`. In a
    picture, `L0.people` for the features of a supernode in one layer."""
    kind: Literal["token", "feature", "supernode", "error", "logit"]
    layer: int
    """Layer of a feature or an error; 0 for other nodes."""
    token: int
    """Index of the token in the prompt; for logits, the last token."""
    number: int
    """Index of the feature in its dictionary, or of the token in the vocabulary; 0 for errors; the
    size of the vocabulary for a measure."""
    text: str
    """Text of the node's token in the prompt, of a logit's token, or of a measure."""
    amount: float
    """The activation of a feature or the probability of a logit; 1 for a measure, 0 for others."""
    influence: float
    """Cumulative share of the influence of all nodes, from the most influential node to this one; 1
    for logits. The viewer of circuit-tracer hides nodes above a share."""


class ResultGraph(Record):
    """Nodes of an attribution graph and their prompt."""

    row: int
    """Index of the row that the graph explains."""
    tokens: tuple[str, ...]
    """Tokens of the prompt."""
    nodes: tuple[ResultNode, ...]
    supernodes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(name, labels of its features) of each group of features."""


class ResultCircuit(Record):
    """A circuit whose edges, or whose complement, an experiment ablates; or the attribution graph
    that it observes."""

    name: str
    layers: int
    heads: tuple[int, ...]
    """Number of query heads of each layer."""
    groups: Mapping[str, tuple[int, ...]]
    """Number of heads that read one key or value, of each layer, by stack."""
    width: int
    """Width of the residual stream."""
    parallel: bool
    """Whether the heads and the MLP of a block read the same stream."""
    edges: tuple[tuple[str, str], ...]
    """(sender, receiver), as in a file: `embed`, `L0H1`, `L0.mlp`, `L0N3`; `L1H0.q`, `L1.mlp`,
    `L1N2`, `feature 3 of f`, `logits`; in another stack `z cross layer 0 head 1`. For an
    attribution graph, the labels of its nodes."""
    scores: tuple[float, ...]
    """The score of each edge; empty if they have none."""
    total: int
    """Number of edges of the model."""
    circuits: int = 1
    """Number of circuits in a sweep; `edges` contains the edges of all of them."""
    graph: ResultGraph | None = None
    """The nodes of an attribution graph."""
    places: tuple[str, ...] = ()
    """The positions of each edge, as text: `s1 token and last token`, empty for all tokens; empty
    if no edge has positions."""
    features: tuple[tuple[str, int], ...] = ()
    """Its nodes that are features, named as in edges, each with its layer."""
    of_attention: tuple[str, ...] = ()
    """Names of the `features` that belong to the output of attention."""
    neurons: tuple[str, ...] = ()
    """Its nodes that are neurons, named as in edges."""
    dictionaries: tuple[tuple[str, str], ...] = ()
    """The name of each dictionary whose features are nodes, with its SHA-256."""
    prompts: tuple[str, ...] = ()
    """Digests of the prompts that its edges were chosen on, by a training or as in its file."""
    others: tuple[str, ...] = ()
    """The other edges of the model that have scores, as in a file: `L0H1 -> logits at last token`.
    """
    other_scores: tuple[float, ...] = ()
    """The scores of `others`."""
    named_places: tuple[tuple[str, ...], ...] = ()
    """The positions of each edge, as text for a file; empty if no edge has positions."""


TEXT_RENDERER = "mechdsl.show.output:experiment_text"

HTML_RENDERER = "mechdsl.show.notebook:experiment_html"

CHART_RENDERER = "mechdsl.show.output:experiment_chart"

DIFFERENCES_RENDERER = "mechdsl.show.runs:differences_text"

JUNIT_RENDERER = "mechdsl.show.junit:results_junit"

VERDICTS_RENDERER = "mechdsl.show.runs:verdict_comparison_text"

REPR_WIDTH = 100
"""Maximum length of a line in a `repr`."""

MAX_REPR_ITEMS = 5
"""Maximum number of experiments, or measures, in a `repr`."""


PlotKind = Literal["heatmap", "lines", "bars", "confusion", "overlay"]
"""Charts that `plot` draws."""


@restores_random_state
def load_renderer(place: str) -> Callable[..., Any]:
    """Import the function `module:name`."""
    module, _, name = place.partition(":")
    return restores_random_state(getattr(import_module(module), name))


ANSWER_TOKENS_KEY = "answer tokens"
"""Key of the convention on tokens of the answer after the prompts."""


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
    """Line in the file."""
    effective_n: int | None = None
    """Number of independent units, the smallest of all values read; None without a number."""
    computed: bool = True
    """False if it fails because something that it reads could not be computed."""
    undecided: bool = False
    """Whether it doesn't hold because the number has no interval."""

    @property
    def word(self) -> Literal["holds", "fails", "undecided"]:
        """The verdict in one word."""
        if self.undecided:
            return "undecided"
        return "holds" if self.holds else "fails"


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ExperimentResult:
    """The result of one experiment: `measures` have every prompt's value, `statistics` the rest."""

    name: str
    """Name of the experiment in the file."""
    model: str
    """Name of the model in the file."""
    axes: tuple[str, ...]
    """Names of the swept axes."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes that reports may use: `item` for `position`."""
    centres: tuple[str, ...] = ()
    """Axes whose values are the centres of windows."""
    cells: tuple[CellKey, ...]
    """Cells of the sweep: `coords` (axis → value), `site`, `position`, and the `tokens` hit."""
    measures: tuple[MeasureData, ...]
    """Measures in the order of the file: `label`, `metric`, `effect`, and every prompt's values:
    `patched` [cell, prompt], `base` and `source` [1 or cell, prompt]."""
    runs: Mapping[str, Mapping[str, Floats]] = field(
        default_factory=dict[str, Mapping[str, Floats]]
    )
    """Values of the unpatched runs: run name → label → value per prompt."""
    accuracy: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """Run name → 1 or 0 per row, if the prompts have an answer; rows outside `keep` count too."""
    accuracy_rounding: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    """Run name → 1 per row where rounding may decide the accuracy."""
    accuracy_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Run name → ids of the rows in `accuracy`; a missing run has those of the prompts."""
    accuracy_units: Mapping[str, Ints] = field(default_factory=dict[str, Ints])
    """Run name → unit of each row in `accuracy`: rows of one unit are right or wrong together (one
    text, one value of `stats by`). For a missing run, each row is a unit."""
    base: str = "clean"
    """Run that rules are applied to."""
    source: str | None = None
    """Run that rules read from; None if there is none."""
    called: Mapping[str, str] = field(default_factory=dict[str, str])
    """Display names of base and source: a block's or a model's name for its clean run."""
    conventions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Defaults and derived settings, in words."""
    selected: tuple[Selection, ...] = ()
    """Selections by other experiments that were made on the same rows."""
    left_out: Mapping[int, str] = field(default_factory=dict[int, str])
    """Ids of rows that `--allow-nan` excluded from everything → where they can't be used."""
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of the model, the tokenizer, data files, and Python functions. A function that can't
    be hashed is missing."""
    row_ids: tuple[int, ...] | None = None
    """Id of each prompt; a prompt has the same id in every experiment."""
    row_keys: tuple[int, ...] | None = None
    """Hash of each prompt's content, which random draws depend on instead of its index."""
    blocks: Ints | None = None
    """Prompt block of each prompt, if there are several. Shape [prompt]."""
    strata: Ints | None = None
    """Stratum of each prompt: rows of one stratum have equal values of the evenly assigned
    variables. Shape [prompt]."""
    population: str = ""
    """Population of intervals and p-values, in words: `new rows of this design`."""
    row_values: Mapping[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])
    """Values of the prompt block per prompt, for `report table by VAR` and `stats by VAR`."""
    drawn: RandomControlValues | None = None
    """Measurements of controls, until bands are computed from them."""
    controls: tuple[NullBand | None, ...] = ()
    """Null band of each measure: from `against`, or from the automatic control of a trained object;
    empty without both."""
    texts: tuple[tuple[str, ...], ...] = ()
    """Tokens of the base run of each prompt as text, for `report overlay`."""
    replies: Replies = field(default_factory=Replies)
    """Generated text, with `generate`."""
    rounding: str = ""
    """Origin of rounding bounds, in words."""
    hits: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Per cell and prompt, the indices into `texts` of the hit tokens."""
    seen: tuple[tuple[SeenImage, ...], ...] = ()
    """The images of each prompt that are shown; empty without images."""

    active: tuple[tuple[ActiveText, ...], ...] = ()
    """For an observation of features: the prompts in which the feature of each cell is most active,
    highest first. Shape [cell]."""

    reports: tuple[spec.Report, ...] = ()
    """Report lines of the file."""
    settings: spec.Statistics | None = None
    """Settings of `stats`."""
    seed: int = 0
    """Seed of intervals and random draws."""
    statistics: tuple[CellStatistics, ...] = ()
    """Statistics of each measure, as arrays over cells: `mean`, `low`, `high`, `p`, `p_corrected`,
    `n`, `units` (effective sample size), `floor` (p may be smaller), and `reasons`."""
    seed_means: tuple[SeedMean, ...] = ()
    """Means over trainings with several seeds (`fit(…, seeds: 5)`), of each cell and measure:
    `measure`, `cell`, `seeds`, `mean`, the interval over seeds (`low`, `high`) and that over
    prompts (`row_low`, `row_high`, `n`)."""
    verified: tuple[VerifiedCells, ...] = ()
    """For each measure that `verify` applies to: the `cells` that were also run, their `exact`
    effects, and the agreement `over_random` and `over_all` of them."""
    circuit: ResultCircuit | None = None
    """The circuit that rules ablate: `name`, `edges` and their `scores`."""
    outcomes: tuple[ExpectOutcome, ...] = ()
    """Expectations: `text`, `holds`, `value`, `low`, `high`, `effective_n`, `reason`, `line`, and
    whether their values were `computed`."""

    def computed(self) -> Iterator[tuple[int, MeasureData]]:
        """Yield the computed measures with their indices."""
        return ((n, data) for n, data in enumerate(self.measures) if data.missing is None)

    @property
    def prompts(self) -> int:
        """Number of prompts that were run."""
        return int(self.measures[0].patched.shape[1]) if self.measures else 0

    @property
    def direction(self) -> str:
        """`clean → fewer`, or the base run alone."""
        base = self.shown(self.base)
        return f"{self.shown(self.source)} → {base}" if self.source else base

    def shown(self, runs: str) -> str:
        """Return the display name of a run or runs; `clean` is ambiguous next to another block."""
        return ", ".join(self.called.get(run, run) for run in runs.split(", "))

    @property
    def holds(self) -> bool:
        """Whether every expectation holds."""
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def groups(self) -> NDArray[Any] | None:
        """The resampled groups, if `stats by` names a value."""
        by = self.settings.by if self.settings else None
        if by is None or by not in self.row_values:
            return None
        return np.array([str(value) for value in self.row_values[by]])

    def control(self, measure: int) -> NullBand | None:
        """Return the null band of a measure."""
        return self.controls[measure] if self.controls else None

    def verification(self, measure: int) -> VerifiedCells | None:
        """Return the verified cells of a measure."""
        return next(
            (
                verified_cells
                for verified_cells in self.verified
                if verified_cells.measure == measure
            ),
            None,
        )

    @cached_property
    def sampling(self) -> SamplingDesign:
        """The sampling design, which every interval and p-value depends on besides the values."""
        if self.settings is None:
            raise ValueError(f"experiment `{self.name}` has no statistics yet")
        keys = self.row_ids if self.row_keys is None else self.row_keys
        return SamplingDesign(
            self.prompts, self.settings, self.seed, keys, self.groups, self.strata, self.blocks
        )

    @cached_property
    def run_intervals(self) -> dict[str, dict[str, Interval]]:
        """Mean and interval of each unpatched run: run → label → interval; only for numbers."""
        of = {data.label: data for data in self.measures}
        categories = {data.label for data in self.measures if data.kind == "category"}
        intervals: dict[str, dict[str, Interval]] = {}
        for run, values in self.runs.items():
            intervals[run] = {
                label: run_interval(rows, self.sampling, of.get(label))
                for label, rows in values.items()
                if label not in categories
            }
        for run in self.accuracy:
            intervals.setdefault(run, {})["accuracy"] = self.accuracy_of(run)
        return intervals

    def accuracy_of(self, run: str, confidence: float | None = None) -> Interval:
        """Return the share of rows in which the model is correct, with its exact interval. `n`
        counts all rows, regardless of `keep`. Without rows that have an answer, the numbers are
        missing."""
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
        """Return the maximum effect of rounding on a run's accuracy; 0 if unknown."""
        rows, known = self.accuracy_rounding.get(run), ~np.isnan(self.accuracy[run])
        return 0.0 if rows is None or not known.any() else float(rows[known].mean())

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record per cell and measure; missing numbers are None."""
        return list(_records(self))

    def to_csv(self) -> str:
        """Return CSV with a header and a line per cell and measure; missing values are empty."""
        return csv_text(self.records())

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with one row per cell and measure.

        Raises:
            ImportError: Without pandas, which the extra `mechdsl[frames]` installs.
        """
        return data_frame(self.records())

    def to_text(self, width: int = 100) -> str:
        """Return the tables, figures and verdicts of the command line, `width` columns wide."""
        return load_renderer(TEXT_RENDERER)(self, width)

    @overload
    def plot(
        self,
        kind: Literal["heatmap", "lines", "bars", "confusion"],
        axis: str | None = None,
        by: str | None = None,
        *,
        measure: str | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin: ...

    @overload
    def plot(
        self,
        kind: Literal["overlay"],
        *,
        measure: str | None = None,
        top: int | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin: ...

    def plot(
        self,
        kind: PlotKind,
        axis: str | None = None,
        by: str | None = None,
        *,
        measure: str | None = None,
        top: int | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin:
        """Return the chart of `report KIND AXIS by BY top TOP` as an altair chart.

        Args:
            kind: `heatmap`, `lines`, `bars`, `confusion` or `overlay`.
            axis: First axis. Without `axis` and `by`, the axes are those of the file's report of
                this kind, or the first that fit.
            by: Second axis.
            measure: The measure to draw, as in tables (`recovery of ld`), or by its label (`ld`) or
                effect (`recovery`) if no other measure has it. None draws all measures.
            top: Number of entries.
            width: Columns of a paper that the chart spans, 1 or 2; None: the default size.

        Raises:
            MechdslError: If the kind of chart, an axis or the measure doesn't exist (E0203, E0607).
            ValueError: If the width isn't 1 or 2.
            ImportError: If altair isn't installed.
        """
        return load_renderer(CHART_RENDERER)(self, kind, axis, by, top, measure, width)

    @property
    def summary(self) -> str:
        """Description of the experiment in one line."""
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


def finite_number(value: Any) -> float | None:
    """Return a number, or None if it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None


def _records(result: ExperimentResult) -> Iterator[dict[str, Any]]:
    lists = any(cell.listed for cell in result.cells)
    labelled = any(cell.label for cell in result.cells)
    has_queries = any(cell.queries for cell in result.cells)
    has_keys = any(cell.keys for cell in result.cells)
    picked = [selection.of for selection in result.selected]
    for index, cell in enumerate(result.cells):
        for measure, data in enumerate(result.measures):
            statistic = result.statistics[measure]
            values = {
                "site": cell.site,
                # An axis may have this name; its value is then the position.
                "position": cell.coords.get("position", cell.position),
                "tokens": " ".join(cell.tokens),
                **({"queries": " ".join(cell.queries)} if has_queries else {}),
                **({"keys": " ".join(cell.keys)} if has_keys else {}),
                "source_run": result.source,
                "base_run": result.base,
                "label": data.label,
                "metric": data.metric,
                "effect": data.effect,
                **({"estimator": data.estimator} if data.estimator else {}),
                **_verified(result, measure, index),
                "n": int(statistic.n[index]),
                "effective_n": int(statistic.units[index]),
                **{key: finite_number(getattr(statistic, key)[index]) for key in NUMBER_COLUMNS},
                **{name: finite_number(each[index]) for name, each in statistic.further.items()},
                **_null(result, measure, index),
                "p_at_most": bool(statistic.floor[index]),
                "inert": bool(data.inert[index]),
                "at_rounding": bool(statistic.at_rounding[index]),
                "reason": statistic.reasons[index],
                **({"listed": " ".join(cell.listed)} if lists else {}),
                **({"feature_label": cell.label} if labelled else {}),
                **({"selected_by": " ".join(picked)} if picked else {}),
            }
            axes = {
                # The variable of a `for` may have the name of a column.
                f"axis_{axis}" if axis in values else axis: _number_of(cell.coords[axis])
                for axis in result.axes
                if axis != "position"
            }
            named = {"experiment": result.name, "model": result.model}
            yield {**named, **cell.also, **axes, **values}


def _number_of(coordinate: Coord) -> Coord:
    """Return a percentage as a plain number, because columns are used in computations."""
    return float(coordinate) if isinstance(coordinate, Percent) else coordinate


def _null(result: ExperimentResult, measure: int, cell: int) -> dict[str, Any]:
    """Return the columns of experiments with controls."""
    if not result.controls:
        return {}
    band = result.control(measure)
    return {
        **{
            f"null_{key}": None if band is None else finite_number(getattr(band, key)[cell])
            for key in ("mean", "low", "high", "level", "p")
        },
        "null_draws": None if band is None else int(band.draws[cell]),
        "null_kind": None if band is None else band.title,
        "null_inside": bool(band.inside[cell]) if band and band.decides[cell] else None,
    }


def _verified(result: ExperimentResult, measure: int, cell: int) -> dict[str, Any]:
    """Return the columns of experiments with `verify`."""
    if not result.verified:
        return {}
    verified_cells = result.verification(measure)
    exact = None if verified_cells is None else verified_cells.of_cell(cell)
    names = ("exact", "exact_low", "exact_high")
    if exact is None:
        return {"verified": None, **dict.fromkeys(names)}
    return {
        "verified": exact.choice,
        **dict(zip(names, map(finite_number, (exact.mean, exact.low, exact.high)), strict=True)),
    }


def data_frame(records: list[dict[str, Any]]) -> pandas.DataFrame:
    """Convert records to a data frame. Raises ImportError without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "data frames need pandas, which is optional: "
            'pip install "mechdsl[frames]" installs it; `records()` and `to_csv()` need nothing'
        ) from error
    return pandas.DataFrame(records)


_QUOTES_FORMULAS: ContextVar[bool] = ContextVar("_QUOTES_FORMULAS", default=False)


@contextmanager
def quote_formulas(asked: bool = True) -> Generator[None]:
    """Write CSV inside the block with `'` before cells that a spreadsheet reads as formulas."""
    token = _QUOTES_FORMULAS.set(asked)
    try:
        yield
    finally:
        _QUOTES_FORMULAS.reset(token)


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet reads a cell as a formula: `=1+1`, `@sum`, `-x`, but not `-1`."""
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False


def list_formulas(text: str) -> list[str]:
    """Return the distinct cells of a CSV that a spreadsheet reads as formulas."""
    rows = csv.reader(io.StringIO(text, newline=""))
    return list(dict.fromkeys(cell for row in rows for cell in row if is_formula(cell)))


def csv_text(records: list[dict[str, Any]]) -> str:
    """Convert records to CSV; a column that a record lacks is empty."""
    if _QUOTES_FORMULAS.get():
        records = [
            {
                column: f"'{cell}" if isinstance(cell, str) and is_formula(cell) else cell
                for column, cell in record.items()
            }
            for record in records
        ]
    columns = dict.fromkeys(key for record in records for key in record)
    lines = _Lines()
    writer = csv.DictWriter(lines, list(columns), lineterminator="\r\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return "".join(lines.written)


class _Lines:
    """Ends records with `\\n`. The writer is set to `\\r\\n`, so that it quotes both characters."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, line: str) -> None:
        self.written.append(line.removesuffix("\r\n") + "\n")


@dataclass(frozen=True)
class LostExperiment:
    """An experiment that could not be computed; its expectations therefore fail."""

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
    """An experiment that `fail_fast` skipped, or its expectations that depend on another one."""

    name: str
    expects: tuple[UndecidedExpectation, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class FileResult:
    """The experiments of one file."""

    file: str
    """Path of the file as given; `<text>` for a text."""
    experiments: tuple[ExperimentResult, ...]
    hash: str = ""
    """SHA-256 of the file's text."""
    seed: int = 0
    sizes: PassSizes | None = None
    """Layout sizes of the run; with equal sizes, two runs are bit-identical."""
    lost: tuple[LostExperiment, ...] = ()
    not_run: tuple[SkippedExperiment, ...] = ()
    """With `fail_fast`: everything after the first expectation that fails."""
    saved: tuple[SavedFile, ...] = ()
    """Files written by `save` lines."""

    @property
    def computable(self) -> bool:
        """Whether every experiment and measure that was run could be computed."""
        measures = (data for experiment in self.experiments for data in experiment.measures)
        return not self.lost and all(data.missing is None for data in measures)

    @property
    def complete(self) -> bool:
        """Whether every experiment and measure was computed and every expectation decided."""
        return self.computable and not self.not_run

    def __repr__(self) -> str:
        names = ", ".join(experiment.name for experiment in self.experiments) or "no experiments"
        return shorten(f"<FileResult {self.file}: {names}", REPR_WIDTH, placeholder=" …") + ">"


def missing_reason(problem: Diagnostic) -> MissingReason:
    """Return a diagnostic's text in one line."""
    label = problem.label_text
    said = not label or problem.message.endswith(label)
    return MissingReason(problem.code, problem.message if said else f"{problem.message}: {label}")


StopCondition = Callable[[str, str, Sequence[ExpectOutcome]], bool]
"""(file, experiment, verdicts on its expectations so far) → whether they end the run."""

ChangeType = Literal["regression", "failed before", "new", "holds now", "gone"]

CHANGE_TYPES: tuple[ChangeType, ...] = get_args(ChangeType)


@dataclass(frozen=True)
class ExpectationChange:
    """An expectation with a different verdict than in the earlier run, or that fails in both; or a
    result that could be computed there and can't be now."""

    kind: ChangeType
    """`regression`: it held before and fails now, or can no longer be computed; `failed before`: it
    fails in both runs; `new`: not in the earlier run; `holds now`: it failed before; `gone`: only
    in the earlier run."""
    file: str
    experiment: str
    text: str = ""
    """The expectation, or the measure that could not be computed; empty for a whole experiment."""
    now: ExpectOutcome | None = None
    before: ExpectOutcome | None = None
    lost: MissingReason | None = None
    """Why an experiment or a measure can't be computed now."""

    @property
    def fails(self) -> bool:
        """Whether it fails the job; an expectation that failed before doesn't."""
        failed = self.now is not None and not self.now.holds
        return self.kind == "regression" or (self.kind == "new" and failed)


@dataclass(frozen=True)
class VerdictComparison:
    """Changes since an earlier run: `results.against`."""

    runs: tuple[str, ...]
    """Name of the earlier run; several if files have separate runs."""
    changes: tuple[ExpectationChange, ...]
    """Changes by type, then in the order of the files."""
    unchanged: int
    """Number of expectations that held before and hold now."""
    without: tuple[str, ...] = ()
    """Files that are in none of these runs, so that all their expectations are new."""

    def of_kind(self, kind: ChangeType) -> tuple[ExpectationChange, ...]:
        """Return the changes of one type."""
        return tuple(change for change in self.changes if change.kind == kind)

    @property
    def regressions(self) -> tuple[ExpectationChange, ...]:
        """Expectations that held before and fail now, and results that became uncomputable."""
        return self.of_kind("regression")

    @property
    def fails(self) -> bool:
        """Whether the job fails, by a regression or by a new expectation."""
        return any(change.fails for change in self.changes)

    def to_text(self, width: int = 100) -> str:
        """Return the output of the command line, `width` columns wide."""
        return load_renderer(VERDICTS_RENDERER)(self, width)

    def __repr__(self) -> str:
        first = self.to_text(10_000).lstrip().split("\n", 1)[0]
        return f"<VerdictComparison {first.removeprefix('against ')}>"


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run, before its comparison with a new one."""

    runs: tuple[str, ...]
    """Names of the runs."""
    files: Mapping[str, FileResult | None]
    """Current file → its earlier result; None if no run contains the file."""
    unasked: Mapping[str, Collection[str]]
    """Current file → experiments that `only` excludes; they don't count as `gone`."""

    def ends(self, file: str, experiment: str, outcomes: Sequence[ExpectOutcome]) -> bool:
        """Whether verdicts end a run that stops at the first failure of the job."""
        before = _outcomes(self.files.get(file)).get(experiment, ())
        return any(
            _change(file, experiment, one, two).fails
            for one, two in _pairs(outcomes, before)
            if one is not None and not one.holds
        )

    def compare(self, files: Sequence[FileResult]) -> VerdictComparison:
        """Compare files that were run with the earlier run."""
        changes: list[ExpectationChange] = []
        unchanged = 0
        for file in files:
            for change in self._of_file(file):
                if change is None:
                    unchanged += 1
                else:
                    changes.append(change)
        changes.sort(key=lambda change: CHANGE_TYPES.index(change.kind))
        without = tuple(file.file for file in files if self.files.get(file.file) is None)
        return VerdictComparison(self.runs, tuple(changes), unchanged, without)

    def _of_file(self, now: FileResult) -> Iterator[ExpectationChange | None]:
        """Yield the changes of a file; None for each expectation that held and holds."""
        earlier = self.files.get(now.file)
        before = _outcomes(earlier)
        after = _outcomes(now)
        # Undecided and excluded expectations aren't `gone`.
        waiting = {
            skipped_experiment.name: [e.text for e in skipped_experiment.expects]
            for skipped_experiment in now.not_run
        }
        left_out = set(self.unasked.get(now.file, ()))
        if earlier is not None:
            yield from _lost_results(now, earlier)
        for name in dict.fromkeys((*after, *before)):
            if name in after or name not in left_out:
                undecided = waiting.get(name, ())
                pairs = _pairs(after.get(name, ()), before.get(name, ()), undecided)
                for one, two in pairs:
                    if one is not None and two is not None and one.holds and two.holds:
                        yield None
                    else:
                        yield _change(now.file, name, one, two)


def stop_condition(earlier: EarlierRun | None) -> StopCondition:
    """Return the stop condition of `fail_fast`: an expectation fails, or fails the job."""
    if earlier is not None:
        return earlier.ends
    return lambda file, experiment, outcomes: not all(outcome.holds for outcome in outcomes)


def _outcomes(file: FileResult | None) -> dict[str, tuple[ExpectOutcome, ...]]:
    """Return the verdicts of each experiment."""
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
    """Match expectations of one experiment by text, several equal ones in order; current ones
    first.

    Args:
        undecided: Texts of expectations without a verdict.
    """
    left: dict[str, list[ExpectOutcome]] = {}
    for outcome in before:
        left.setdefault(_normal(outcome.text), []).append(outcome)
    for outcome in now:
        same = left.get(_normal(outcome.text))
        yield outcome, same.pop(0) if same else None
    for text in undecided:
        same = left.get(_normal(text))
        if same:
            same.pop(0)
    kept = {id(outcome) for same in left.values() for outcome in same}
    for outcome in before:
        if id(outcome) in kept:
            yield None, outcome


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
    """Yield experiments and measures that could be computed before and can't be now."""
    there = {experiment.name: experiment for experiment in before.experiments}
    for lost in now.lost:
        if lost.name in there:
            why = lost.reasons[0] if lost.reasons else None
            yield ExpectationChange("regression", now.file, lost.name, lost=why)
    for experiment in now.experiments:
        if experiment.name not in there:
            continue
        computed = {_measure_key(data) for _, data in there[experiment.name].computed()}
        for data in experiment.measures:
            if data.missing is not None and _measure_key(data) in computed:
                text = f"{data.called} of {data.label}"
                yield ExpectationChange(
                    "regression", now.file, experiment.name, text, lost=data.missing
                )


def _measure_key(data: MeasureData) -> tuple[str, str, str | None]:
    return data.called, data.label, data.at
