"""The JSON document of a run, and its schema.

A number that doesn't exist is null, and `reason` states why; NaN and infinity never occur. The
pydantic models take a while to build, so this module is imported on use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from functools import cache
from types import UnionType
from typing import Any, Literal, Self, Union, cast, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mechdsl.base.arrays import Floats
from mechdsl.execute.run_record import SavedFile, SizeOrigin
from mechdsl.resolve.cells import CellKey
from mechdsl.results.experiment_result import (
    ChangeType,
    ExpectationChange,
    ExperimentResult,
    FileResult,
    Replies,
    RepliesByPrompt,
    ResultCircuit,
    SeedMean,
    SkippedExperiment,
    VerdictComparison,
    finite_number,
)
from mechdsl.results.statistics_conventions import WITHHELD_TEXTS
from mechdsl.results.survival import Survival, survival_words
from mechdsl.statistics.cell_statistics import compute_category_statistics
from mechdsl.statistics.measurements import (
    CellStatistics,
    Interval,
    MeasureData,
    NullBand,
    may_round_differently,
)
from mechdsl.statistics.verification import VerifiedCells
from mechdsl.vocab.metrics import ControlTitle, Reply


class DocumentPart(BaseModel):
    """Optional keys that weren't given stay out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def create(cls, record: object = None, **others: Any) -> Self:
        """Create a part from a record's attributes of the same names, and from other values.

        NaN and infinity become None, and records in the place of parts become parts. Optional keys
        without a value, or with an empty one, stay out.
        """
        values: dict[str, Any] = {}
        for name, key in cls.model_fields.items():
            value = others.get(name) if name in others else getattr(record, name, None)
            if key.is_required() or not (value is None or (isinstance(value, Sized) and not value)):
                values[key.alias or name] = _convert(value, _part_type(key.annotation))
        return cls(**values)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


@cache
def _part_type(hint: Any) -> type[DocumentPart] | None:
    """Return the type of the part, or of the parts in the list, that a key has; None for others."""
    if get_origin(hint) in (list, Union, UnionType):
        return next(filter(None, map(_part_type, get_args(hint))), None)
    return hint if isinstance(hint, type) and issubclass(hint, DocumentPart) else None


def _convert(value: Any, part: type[DocumentPart] | None) -> Any:
    if isinstance(value, float):
        return finite_number(value)
    if part is None or value is None or isinstance(value, DocumentPart):
        return value
    if isinstance(value, list | tuple):
        return [_convert(each, part) for each in cast("Sequence[Any]", value)]
    return part.create(value)


class ExpectDocument(DocumentPart):
    """The verdict on one `expect`."""

    text: str
    holds: bool
    undecided: bool = Field(False, description="it doesn't hold as the number has no interval")
    value: float | str | None
    low: float | None
    high: float | None
    reason: str | None = None


class SkippedDocument(DocumentPart):
    """What `--fail-fast` left out."""

    experiment: str
    expect: list[str] = Field(
        description="expectations without a verdict; if the experiment itself was run, they name "
        "one that wasn't"
    )


class ExpectationChangeDocument(DocumentPart):
    """An expectation whose verdict isn't that of the earlier run, or that fails in both; or what
    could be computed there and can't be now."""

    kind: ChangeType
    fails: bool = Field(description="whether it fails the job")
    file: str
    experiment: str
    now: ExpectDocument | None = Field(
        default=None, description="absent if the expectation or result is gone"
    )
    before: ExpectDocument | None = Field(
        default=None, description="absent if the expectation or result is new"
    )
    measure: str | None = Field(
        default=None, description="the measure that can't be computed; absent: the whole experiment"
    )
    code: str | None = None
    reason: str | None = None


class VerdictComparisonDocument(DocumentPart):
    """What has changed since an earlier run (`--against`)."""

    runs: list[str] = Field(
        description="the earlier run as named on the command line; one per file"
    )
    fails: bool = Field(description="whether the job fails")
    unchanged: int = Field(description="expectations that held in the earlier run and hold now")
    without: list[str] = Field(description="files that the earlier runs don't contain")
    changes: list[ExpectationChangeDocument]


def known_fields(**values: Any) -> dict[str, Any]:
    """Drop None values, so that the document omits their keys."""
    return {key: value for key, value in values.items() if value is not None}


def skipped_documents(left: Sequence[SkippedExperiment]) -> list[SkippedDocument]:
    """Convert the skipped parts of one file."""
    return [
        SkippedDocument(
            experiment=skipped_experiment.name,
            expect=[expect.text for expect in skipped_experiment.expects],
        )
        for skipped_experiment in left
    ]


def _change_document(change: ExpectationChange) -> ExpectationChangeDocument:
    lost = change.lost
    return ExpectationChangeDocument.create(
        change,
        measure=None if lost is None else change.text,
        code=None if lost is None else lost.code,
        reason=None if lost is None else lost.reason,
    )


class ReplyDocument(DocumentPart):
    """One reply to a prompt."""

    text: str = Field(description="the text without the stop text and the end token")
    tokens: int = Field(description="length in tokens")
    ended: Literal["end", "stop", "length", "broken"] = Field(
        description="why generation ended: an end token, a stop text, the length limit, or a "
        "number that is NaN or infinite"
    )


class RowRepliesDocument(DocumentPart):
    """The replies to one prompt, one per sample and draw of noise."""

    row: int = Field(description="id of the prompt")
    replies: list[ReplyDocument]


class PromptDocument(DocumentPart):
    """A prompt of the base run."""

    row: int
    text: str


class RepliesDocument(DocumentPart):
    """The replies of an experiment (`generate n`)."""

    prompts: list[PromptDocument]
    runs: dict[str, list[RowRepliesDocument]] = Field(description="unpatched runs by name")
    cells: list[list[RowRepliesDocument]] = Field(description="in the order of `cells`")


def replies_document(replies: Replies) -> RepliesDocument | None:
    """Convert replies; None if nothing was generated."""
    if not replies:
        return None
    return RepliesDocument(
        prompts=[PromptDocument(row=row, text=text) for row, text in replies.prompts.items()],
        runs={run: _row_documents(texts) for run, texts in replies.runs.items()},
        cells=[_row_documents(texts) for texts in replies.cells],
    )


def _row_documents(texts: RepliesByPrompt) -> list[RowRepliesDocument]:
    return [
        RowRepliesDocument(row=row, replies=[_reply_document(reply) for reply in replies])
        for row, replies in texts.items()
    ]


def _reply_document(reply: Reply) -> ReplyDocument:
    return ReplyDocument(text=reply.text, tokens=len(reply.ids), ended=reply.ended)


SCHEMA_VERSION: Literal[2] = 2


class NullDocument(DocumentPart):
    """The same effect on random targets (`against random(n)`), or the control that is added for
    something trained."""

    kind: ControlTitle = Field(
        description="`null` for `against random(n)`; `random` or `untrained` for a control that is "
        "added because the experiment uses something trained"
    )
    mean: float | None
    low: float | None = Field(
        description="lower end of the null band; null if no target could be drawn"
    )
    high: float | None
    level: float | None = Field(
        description="probability that a further random target falls in the band, 0 to 1"
    )
    draws: int = Field(description="different random targets that have a value")
    p: float | None = Field(
        description="rank p, (1 + b)/(1 + draws), where b draws are at least as large in size, up "
        "to rounding"
    )
    inside: bool | None = Field(
        description="whether the cell's mean is in the band, up to rounding; null if the draws are "
        "too few for a band at the experiment's confidence (39 at 95 %)"
    )
    what: str = Field(description="the type of random target")


class ExactEffectDocument(DocumentPart):
    """The effect of an estimated cell that was also run."""

    choice: Literal["top", "random"] = Field(description="why the cell was run")
    mean: float | None
    low: float | None
    high: float | None


class CorrelationDocument(DocumentPart):
    """A correlation over cells."""

    value: float | None
    low: float | None
    high: float | None


class AgreementDocument(DocumentPart):
    """Agreement of estimates with exact effects over cells."""

    cells: int
    pearson: CorrelationDocument
    spearman: CorrelationDocument


class TopRecallDocument(DocumentPart):
    """Whether other cells have larger exact effects than those with the largest estimates."""

    found: int = Field(
        description="of as many verified cells with the largest exact effects, those with the "
        "largest estimates"
    )
    above: int = Field(
        description="random cells whose exact effect exceeds the smallest of the cells with the "
        "largest estimates"
    )
    low: float | None = Field(description="Clopper-Pearson interval of their share of all others")
    high: float | None


class TopSearchDocument(DocumentPart):
    """Outcome of `verify until …`."""

    until: Literal["bound", "stable"]
    confidence: float = Field(description="in percent, of `bound`")
    risk: float | None = Field(
        description="estimated probability that a cell that wasn't run is among the largest; 0 if "
        "all were run, null without an estimate"
    )
    freedom: float | None = Field(description="degrees of freedom of the residuals")
    proved: bool = Field(description="whether every cell that can have an effect was run")


class VerificationDocument(DocumentPart):
    """The verified cells of one measure."""

    label: str
    effect: str
    top: int = Field(
        description="cells with the largest absolute estimates; of a search, largest exact effects"
    )
    random: int = Field(description="cells drawn at random from all others")
    others: int = Field(description="all others that can have an effect")
    over_random: AgreementDocument | None = None
    over_all: AgreementDocument
    recall: TopRecallDocument | None = None
    search: TopSearchDocument | None = None


class MeasureDocument(DocumentPart):
    """One effect in one cell."""

    label: str
    metric: str
    effect: str
    estimator: str | None = Field(
        default=None,
        description="the estimator (`using`) if no cell was run: `gradient_input`, "
        "`integrated_gradients(steps: 32)`; for `gradient` the mean is the norm of the "
        "gradient and not an effect, and neither is that of `gradient_attention`",
    )
    at: str | None = Field(
        default=None, description="position at which the metric is read, if the file states one"
    )
    exact: ExactEffectDocument | None = Field(
        default=None, description="effect of an estimated cell that `verify` has run"
    )
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    base: float | None = Field(
        description="mean of the metric on the base run, the effect's 0; of "
        "`minimality`, on the run with the whole circuit"
    )
    source: float | None = Field(
        description="mean of the metric on the source run; of `faithfulness` and `completeness`, "
        "on the run with everything ablated; of `minimality`, the difference between the base run "
        "and that one"
    )
    commonest: float | None = Field(default=None, description="categories: most common value")
    share: float | None = Field(default=None, description="categories: its share of the prompts")
    mean_error: float | None = Field(
        default=None, description="categories: mean absolute difference from the correct number"
    )
    statistics: dict[str, float | None] | None = Field(
        default=None, description="further statistics of the rows' effects, from plugins"
    )
    null: NullDocument | None = Field(default=None, description="controls, if any")
    n: int | None = Field(default=None, description="prompts, if fewer than the cell has")
    effective_n: int | None = Field(
        default=None,
        description="effective sample size, if smaller than the number of prompts: distinct "
        "prompts, or values of the `stats by` column",
    )
    p_at_most: Literal[True] | None = Field(
        default=None,
        description="p is the smallest value that this number of sign flips can give; the true p "
        "may be smaller",
    )
    inert: Literal[True] | None = Field(
        default=None,
        description="the cell can't differ from the base run, or in effects of circuits from the "
        "run that they compare with, and isn't part of the correction",
    )
    rounding: float | None = Field(
        default=None,
        description="rounding alone explains an effect of up to this size; present if the mean is "
        "no larger. For shares and categories: the share of prompts that rounding may "
        "change, if any",
    )
    survives: Survival | None = Field(
        default=None,
        description="whether the effect survives the correction, as in the table; `rounding`: it "
        "can't be told from rounding, whatever its p; `in band`: random targets reach it. Absent "
        "if its p isn't corrected",
    )
    reason: str | None = Field(default=None, description="why a number is null")


class TargetDocument(DocumentPart):
    """Where the cell's intervention acts."""

    position: str | None
    tokens: list[str] = Field(
        description="tokens of the position; of attention, the keys, or the queries if only "
        "these vary"
    )
    queries: list[str] | None = Field(
        default=None, description="tokens of the queries of attention whose keys are `tokens`"
    )
    keys: list[str] | None = Field(
        default=None, description="tokens of the keys of attention whose queries are `tokens`"
    )
    read: list[str] | None = Field(
        default=None,
        description="tokens of the source run, if the same position has a different token",
    )


class ActiveTextDocument(DocumentPart):
    """A prompt in which an observed feature is active."""

    row: int = Field(description="id of the prompt")
    tokens: list[str] = Field(
        description="texts of its tokens, each with the white space before it"
    )
    values: list[float | None] = Field(
        description="activation at each token; null where it isn't observed"
    )


class CellDocument(DocumentPart):
    """One cell of the result table; the keys of `coords` are the experiment's axes, and `item`
    where positions are occurrences of a span."""

    coords: dict[str, int | float | str]
    site: str
    label: str | None = Field(
        default=None, description="description of the feature, from a file of labels"
    )
    at: TargetDocument
    n: int
    listed: list[str] | None = Field(
        default=None, description="tokens that an observation lists (`top 10`), in order of rank"
    )
    listed_mean: list[float] | None = Field(
        default=None, description="the mean probability of each listed token over the rows"
    )
    listed_first: list[float] | None = Field(
        default=None,
        description="the share of rows in which each listed token is the most likely one",
    )
    active: list[ActiveTextDocument] | None = Field(
        default=None, description="prompts in which an observed feature is most active, in order"
    )
    measures: list[MeasureDocument]


class RunDocument(DocumentPart):
    """A metric on an unpatched run."""

    label: str
    metric: str
    at: str | None = Field(
        default=None, description="position at which the metric is read, if the file states one"
    )
    mean: float | None
    low: float | None
    high: float | None
    n: int
    commonest: float | None = Field(default=None, description="categories: most common value")
    share: float | None = Field(default=None, description="categories: its share of the prompts")
    mean_error: float | None = Field(
        default=None, description="categories: mean absolute difference from the correct number"
    )
    rounding: float | None = Field(
        default=None,
        description="accuracies: how far rounding alone may change the value, if at all",
    )
    reason: str | None = None


class LeftOutDocument(DocumentPart):
    """A row that `--allow-nan` left out of every result."""

    row: int
    where: str = Field(description="the run or the cell whose output is NaN or infinite")


class SelectionDocument(DocumentPart):
    """Sites that were selected on rows on which they are tested."""

    of: str = Field(description="the experiment that selected the sites")
    cells: int = Field(description="the number of cells it selected from")
    shared: int = Field(description="tested rows that were also used for the selection")
    rows: int = Field(description="all tested rows")


class SeedMeanDocument(DocumentPart):
    """The mean of a measure over trainings with several seeds, in the cells that differ only in the
    seed."""

    coords: dict[str, int | float | str]
    site: str
    label: str = Field(description="label of the measure")
    effect: str
    seeds: int = Field(description="number of trainings")
    values: list[float] = Field(description="mean of each training")
    mean: float | None
    low: float | None = Field(
        description="low end of the interval over seeds, Student's t of the trainings' means; null "
        "below five trainings"
    )
    high: float | None
    row_low: float | None = Field(
        description="low end of the interval over prompts, of each prompt's mean over the trainings"
    )
    row_high: float | None
    n: int = Field(description="prompts")


class EdgeDocument(DocumentPart):
    """An edge of a circuit."""

    sender: str = Field(
        description="`embed`, a head `L0H1`, an MLP `L0.mlp`, a neuron `L0N3` or `feature 3 of f`; "
        "of an attribution graph `token 3`, `L0.f12@3` (feature 12 at token 3) or `L0.error@3`"
    )
    receiver: str = Field(
        description="an input of a head `L1H0.q`, an MLP, a neuron, a feature or `logits`; of an "
        "attribution graph a feature, `logit 17` or `target`"
    )
    score: float | None = Field(default=None, description="its score, if the circuit has scores")
    at: str | None = Field(
        default=None, description="positions of the receiver; absent for an edge at all tokens"
    )


class CircuitDocument(DocumentPart):
    """The circuit that the rules ablate, or of which they ablate the rest; or the attribution graph
    of a row, after pruning."""

    name: str
    edges: list[EdgeDocument]
    total: int = Field(description="edges of the model, or of the graph before pruning")
    row: int | None = Field(default=None, description="the row of an attribution graph")


class ExperimentDocument(DocumentPart):
    """One experiment."""

    name: str
    model: str
    axes: list[str]
    base: str
    source: str | None
    cells: list[CellDocument]
    runs: dict[str, list[RunDocument]]
    conventions: dict[str, str]
    hashes: dict[str, str]
    expect: list[ExpectDocument]
    left_out: list[LeftOutDocument] | None = Field(
        default=None, description="rows left out of every result, if any"
    )
    selected: list[SelectionDocument] | None = Field(
        default=None,
        description="experiments whose selected sites are tested on the same rows; if present, no "
        "p is corrected",
    )
    seed_means: list[SeedMeanDocument] | None = Field(
        default=None, description="means over trainings with several seeds (`fit(…, seeds: 5)`)"
    )
    verified: list[VerificationDocument] | None = Field(
        default=None, description="agreement of estimates with exact effects (`verify`)"
    )
    circuit: CircuitDocument | None = Field(
        default=None, description="the circuit that the rules name, if they name one"
    )
    replies: RepliesDocument | None = Field(
        default=None, description="generated text, if the experiment has `generate`"
    )


class SizesDocument(DocumentPart):
    """Pass sizes of the run; runs with equal sizes are equal bit for bit."""

    pass_tokens: int = Field(description="most tokens of a pass over patched rows")
    prompt_tokens: int = Field(description="most tokens of a batch of unpatched prompts")
    chosen: SizeOrigin = Field(description="what `pass_tokens` comes from")


class MissingDocument(DocumentPart):
    """An experiment that could not be computed, or one measure of an experiment."""

    experiment: str
    label: str | None = Field(
        default=None, description="label of the measure; absent: the whole experiment"
    )
    effect: str | None = None
    code: str
    reason: str
    expect: list[ExpectDocument] | None = Field(
        default=None, description="expectations of the whole experiment, all of which fail"
    )


class SavedDocument(DocumentPart):
    """A file that a `save` line has written."""

    experiment: str
    kind: str = Field(description="`vectors`, `means`, `direction`, `control vector` or `rows`")
    site: str | None = Field(
        default=None,
        description="as written in the `save` line, like `at` and `run`; absent for a direction",
    )
    at: str | None = None
    run: str | None = None
    direction: str | None = Field(default=None, description="as written in the `save` line")
    file: str = Field(description="path of the safetensors, GGUF or JSON lines file")
    rows_file: str | None = Field(
        default=None,
        description="path of the JSON lines file next to it, with one line per row; absent for "
        "means, directions and rows of features",
    )
    dtype: str
    tensors: int = Field(description="sites, vectors of a direction, or features")
    vectors: int = Field(
        description="vectors or means per site; tokens that were read for features"
    )
    rows: int | None = Field(
        default=None,
        description="rows that have a vector, or were read for features; absent for a direction",
    )
    bytes: int = Field(description="size of the file")
    note: str | None = Field(
        default=None,
        description="which direction was selected, and what is left out, if anything",
    )


class FileDocument(DocumentPart):
    """One `.mech` file."""

    file: str
    hash: str
    seed: int
    sizes: SizesDocument | None = Field(default=None, description="pass sizes, if anything was run")
    experiments: list[ExperimentDocument]
    missing: list[MissingDocument] | None = Field(
        default=None, description="experiments and measures that could not be computed, if any"
    )
    not_run: list[SkippedDocument] | None = Field(
        default=None, description="what `--fail-fast` skipped, if anything"
    )
    saved: list[SavedDocument] | None = Field(
        default=None, description="files that `save` lines have written, if any"
    )


class ResultsDocument(DocumentPart):
    """What `mechdsl run --format json` prints."""

    schema_version: Literal[2] = Field(alias="schema")
    mechdsl: str
    versions: dict[str, str]
    files: list[FileDocument]
    against: VerdictComparisonDocument | None = Field(
        default=None, description="changes since an earlier run, with `--against`"
    )


def _measure_document(
    result: ExperimentResult, measure: int, cell: int, n: int, survives: Survival | None
) -> MeasureDocument:
    data, statistic = result.measures[measure], result.statistics[measure]
    keys = ("commonest", "share", "mean_error") if data.kind == "category" else ()
    return MeasureDocument(
        label=data.label,
        metric=data.metric,
        effect=data.effect,
        **known_fields(
            estimator=data.estimator or None,
            at=data.at,
            exact=_exact_document(result.verification(measure), cell),
        ),
        **_cell_numbers(statistic, cell, "mean", "low", "high", "p", "p_corrected"),
        base=finite_number(statistic.base_mean[cell]),
        source=finite_number(statistic.source_mean[cell]),
        **_cell_numbers(statistic, cell, *keys),
        **known_fields(
            statistics={name: finite_number(each[cell]) for name, each in statistic.further.items()}
            or None,
            null=_null_document(result, measure, cell),
            n=int(statistic.n[cell]) if int(statistic.n[cell]) != n else None,
            effective_n=int(statistic.units[cell])
            if statistic.units[cell] not in (0, statistic.n[cell])
            else None,
            p_at_most=True if statistic.floor[cell] else None,
            inert=True if data.inert[cell] else None,
            rounding=finite_number(statistic.rounding[cell])
            if statistic.at_rounding[cell] or may_round_differently(data, statistic)[cell]
            else None,
            survives=survives or None,
            reason=_reason(statistic, cell, data, result.source),
        ),
    )


def _exact_document(verified: VerifiedCells | None, cell: int) -> ExactEffectDocument | None:
    exact_effect = None if verified is None else verified.of_cell(cell)
    return None if exact_effect is None else ExactEffectDocument.create(exact_effect)


def _verification_document(
    result: ExperimentResult, verified: VerifiedCells
) -> VerificationDocument:
    data, search = result.measures[verified.measure], verified.search
    return VerificationDocument.create(
        verified,
        label=data.label,
        effect=data.effect,
        random=len(verified.cells) - verified.ranked,
        search=None
        if search is None
        else TopSearchDocument.create(search, proved=search.is_proved),
    )


def _cell_numbers(arrays: CellStatistics | NullBand, cell: int, *names: str) -> dict[str, Any]:
    """Return numbers of a cell by name; None for missing ones."""
    return {name: finite_number(getattr(arrays, name)[cell]) for name in names}


def _null_document(result: ExperimentResult, measure: int, cell: int) -> NullDocument | None:
    band = result.control(measure)
    if band is None:
        return None
    return NullDocument(
        **_cell_numbers(band, cell, "mean", "low", "high", "level", "p"),
        kind=band.title,
        draws=int(band.draws[cell]),
        inside=bool(band.inside[cell]) if band.decides[cell] else None,
        what=band.what,
    )


def _reason(
    statistic: CellStatistics, cell: int, data: MeasureData, source: str | None
) -> str | None:
    """Return the cell's reason, extended by those for a missing corrected p and source value."""
    reason = statistic.reasons[cell]
    if statistic.withheld and not data.inert[cell] and np.isnan(statistic.p_corrected[cell]):
        withheld = f"no corrected p: {WITHHELD_TEXTS[statistic.withheld]}"
        reason = f"{reason}; {withheld}" if reason else withheld
    if data.source is not None or data.kind == "category":
        return reason
    missing = "no source run" if source is None else f"not read in the run `{source}`"
    return f"{reason}; {missing}" if reason else missing


def _cell_document(
    result: ExperimentResult, index: int, key: CellKey, survival: Sequence[Sequence[Survival]]
) -> CellDocument:
    n = max((int(statistic.n[index]) for statistic in result.statistics), default=0)
    return CellDocument.create(
        key,
        coords={**key.also, **{axis: key.coords[axis] for axis in result.axes}},
        at=key,
        n=n,
        listed_mean=[mean for mean, _ in key.shares],
        listed_first=[first for _, first in key.shares],
        active=result.active[index] if result.active else (),
        measures=[
            _measure_document(result, measure, index, n, words[index] if words else None)
            for measure, words in enumerate(survival)
        ],
    )


def _run_document(
    label: str, metric: str, interval: Interval, at: str | None = None
) -> RunDocument:
    missing = [interval.mean, interval.low, interval.high]
    reason = None
    if not np.isfinite(missing).all():
        reason = "too few prompts or groups" if np.isfinite(interval.mean) else "not a number"
    rounding = interval.rounding or None
    return RunDocument.create(
        interval, label=label, metric=metric, at=at, reason=reason, rounding=rounding
    )


def _category_run_document(data: MeasureData, values: Floats) -> RunDocument:
    truth = data.truth if data.truth is not None and data.truth.shape[0] == 1 else None
    statistics = compute_category_statistics(values[None], truth)
    return RunDocument(
        label=data.label,
        metric=data.metric,
        **known_fields(at=data.at),
        mean=None,
        low=None,
        high=None,
        n=int(statistics.n[0]),
        commonest=finite_number(statistics.commonest[0]),
        share=finite_number(statistics.share[0]),
        mean_error=finite_number(statistics.mean_error[0]),
        reason=statistics.reasons[0],
    )


def _run_documents(result: ExperimentResult) -> dict[str, list[RunDocument]]:
    by_label = {data.label: data for data in result.measures}
    by_experiment: dict[str, list[RunDocument]] = {}
    for run in {**result.runs, **result.accuracy}:
        intervals = result.run_intervals.get(run, {})
        documents: list[RunDocument] = []
        for label, values in result.runs.get(run, {}).items():
            data = by_label.get(label)
            if data is not None and data.kind == "category":
                documents.append(_category_run_document(data, values))
            else:
                metric, at = (data.metric, data.at) if data else (label, None)
                documents.append(_run_document(label, metric, intervals[label], at))
        if run in result.accuracy:
            documents.append(_run_document("accuracy", "correct", intervals["accuracy"]))
        by_experiment[run] = documents
    return by_experiment


def _seed_mean_document(result: ExperimentResult, mean: SeedMean) -> SeedMeanDocument:
    data = result.measures[mean.measure]
    return SeedMeanDocument.create(
        mean,
        coords=dict(mean.cell.coords),
        site=mean.cell.site,
        label=data.label,
        effect=data.effect,
    )


def experiment_document(result: ExperimentResult) -> ExperimentDocument:
    """Convert a finished experiment."""
    survival = [survival_words(result, measure) for measure in range(len(result.measures))]
    return ExperimentDocument.create(
        result,
        cells=[
            _cell_document(result, index, key, survival) for index, key in enumerate(result.cells)
        ],
        runs=_run_documents(result),
        expect=result.outcomes,
        left_out=[LeftOutDocument(row=row, where=where) for row, where in result.left_out.items()],
        seed_means=[_seed_mean_document(result, seed_mean) for seed_mean in result.seed_means],
        verified=[
            _verification_document(result, verified_cells) for verified_cells in result.verified
        ],
        circuit=_circuit_document(result.circuit),
        replies=replies_document(result.replies),
    )


def _circuit_document(circuit: ResultCircuit | None) -> CircuitDocument | None:
    if circuit is None:
        return None
    scores = circuit.scores or (None,) * len(circuit.edges)
    places = circuit.places or ("",) * len(circuit.edges)
    edges = [
        EdgeDocument.create(sender=of, receiver=to, score=score, at=at)
        for (of, to), score, at in zip(circuit.edges, scores, places, strict=True)
    ]
    row = None if circuit.graph is None else circuit.graph.row
    return CircuitDocument.create(circuit, edges=edges, row=row)


def _missing_documents(file: FileResult) -> list[MissingDocument]:
    """Return what a file's run could not compute: whole experiments, then single measures."""
    whole = [
        MissingDocument.create(missing, experiment=lost.name, expect=lost.outcomes)
        for lost in file.lost
        for missing in lost.reasons
    ]
    parts = [
        MissingDocument.create(
            data.missing, experiment=experiment.name, label=data.label, effect=data.effect
        )
        for experiment in file.experiments
        for data in experiment.measures
        if data.missing is not None
    ]
    return [*whole, *parts]


def _saved_document(saved: SavedFile) -> SavedDocument:
    rows = None if saved.rows_path is None else str(saved.rows_path)
    return SavedDocument.create(saved, file=str(saved.path), rows_file=rows)


def results_document(
    files: Sequence[FileResult],
    versions: Mapping[str, str],
    against: VerdictComparison | None = None,
) -> ResultsDocument:
    """Convert all finished experiments of a run."""
    changes = [] if against is None else [_change_document(change) for change in against.changes]
    return ResultsDocument.create(
        schema_version=SCHEMA_VERSION,
        mechdsl=versions.get("mechdsl", "unknown"),
        versions=dict(versions),
        files=[
            FileDocument.create(
                file,
                experiments=[experiment_document(experiment) for experiment in file.experiments],
                missing=_missing_documents(file),
                not_run=skipped_documents(file.not_run),
                saved=[_saved_document(saved_file) for saved_file in file.saved],
            )
            for file in files
        ],
        against=None
        if against is None
        else VerdictComparisonDocument.create(against, changes=changes),
    )


def results_schema() -> dict[str, Any]:
    """Return the JSON schema of the document, as printed by `mechdsl schema results`."""
    schema = ResultsDocument.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
