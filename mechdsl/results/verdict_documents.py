"""Verdicts in the JSON document of a run, and what they are set against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mechdsl.results.against import Against, Change, Kind
from mechdsl.results.experiment_result import ExpectOutcome, NotRun


class DocumentPart(BaseModel):
    """Optional keys that weren't given stay out of the JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class ExpectDocument(DocumentPart):
    """The verdict on one `expect`."""

    text: str
    holds: bool
    value: float | str | None
    low: float | None
    high: float | None
    reason: str | None = None


class NotRunDocument(DocumentPart):
    """What `--fail-fast` left out."""

    experiment: str
    expect: list[str] = Field(
        description="expectations without a verdict; where the experiment itself was run, they "
        "name one that wasn't"
    )


class ChangeDocument(DocumentPart):
    """An expectation whose verdict isn't that of the earlier run, or that fails in both; or what
    could be computed there and can't be now."""

    kind: Kind
    fails: bool = Field(description="whether it fails the job")
    file: str
    experiment: str
    now: ExpectDocument | None = Field(default=None, description="not of what is gone")
    before: ExpectDocument | None = Field(default=None, description="not of what is new")
    measure: str | None = Field(default=None, description="what can't be computed; else all of it")
    code: str | None = None
    reason: str | None = None


class AgainstDocument(DocumentPart):
    """What has changed since an earlier run (`--against`)."""

    runs: list[str] = Field(description="the earlier run, as it was named; one per file")
    fails: bool = Field(description="whether the job fails")
    unchanged: int = Field(description="expectations that held there and hold now")
    without: list[str] = Field(description="files that are in none of these runs")
    changes: list[ChangeDocument]


def given(**values: Any) -> dict[str, Any]:
    """Only what is known, so that the other keys stay out of the document."""
    return {key: value for key, value in values.items() if value is not None}


def expectations(outcomes: Sequence[ExpectOutcome]) -> list[ExpectDocument]:
    """Verdicts, in their order."""
    return [_expectation(outcome) for outcome in outcomes]


def _expectation(outcome: ExpectOutcome) -> ExpectDocument:
    return ExpectDocument(
        text=outcome.text,
        holds=outcome.holds,
        value=outcome.value,
        low=outcome.low,
        high=outcome.high,
        **given(reason=outcome.reason),
    )


def not_run(left: Sequence[NotRun]) -> list[NotRunDocument]:
    """What was left out of one file."""
    return [
        NotRunDocument(experiment=each.name, expect=[expect.text for expect in each.expects])
        for each in left
    ]


def against_document(against: Against) -> AgainstDocument:
    """A comparison with an earlier run."""
    return AgainstDocument(
        runs=list(against.runs),
        fails=against.fails,
        unchanged=against.unchanged,
        without=list(against.without),
        changes=[_change(each) for each in against.changes],
    )


def _change(change: Change) -> ChangeDocument:
    lost = change.lost
    return ChangeDocument(
        kind=change.kind,
        fails=change.fails,
        file=change.file,
        experiment=change.experiment,
        **given(
            now=None if change.now is None else _expectation(change.now),
            before=None if change.before is None else _expectation(change.before),
            measure=change.text if lost is not None and change.text else None,
            code=None if lost is None else lost.code,
            reason=None if lost is None else lost.reason,
        ),
    )
