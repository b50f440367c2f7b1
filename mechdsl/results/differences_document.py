"""The JSON document of what changed between two runs, and its schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mechdsl.results.compared_cells import State
from mechdsl.results.document import DocumentPart, ExpectDocument, expectations
from mechdsl.results.experiment_result import ExpectOutcome
from mechdsl.results.found_differences import Differences, Place

SCHEMA_VERSION: Literal[1] = 1


class SideDocument(DocumentPart):
    """One of the two runs."""

    name: str
    note: str | None = Field(default=None, description="what is to be known of it")


class InputDocument(DocumentPart):
    """Something that went into the runs and differs."""

    what: str
    old: str | None
    new: str | None
    experiments: list[str] = Field(description="those it is an input of; empty: of all")


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


class CellDocument(DocumentPart):
    """One effect in one cell that isn't equal to the bit. Numbers that don't exist are null."""

    experiment: str
    coords: dict[str, int | float | str]
    site: str
    position: str | None
    label: str
    effect: str
    at: str | None
    kind: Literal["number", "category"]
    state: State = Field(
        description="changed: beyond noise; noise: the difference can't be told from 0; rounding: "
        "rounding explains every difference; unclear: there is no test"
    )
    paired: bool = Field(description="whether both runs have rows in common, which are compared")
    rows: int = Field(description="rows compared; of two samples, those of the smaller one")
    units: int = Field(description="independent units behind the difference")
    rows_changed: int | None = Field(description="rows of which a value differs")
    rows_beyond: int | None = Field(description="those of them that rounding doesn't explain")
    largest: float | None = Field(description="largest difference of a value")
    old: float | None = Field(
        description="the effect on the rows compared; of categories the share of that which was "
        "commonest"
    )
    new: float | None
    difference: float | None = Field(description="new less old")
    low: float | None
    high: float | None
    p: float | None
    p_corrected: float | None
    p_at_most: bool = Field(description="p is the least that so many flips give")
    rounding: float | None = Field(description="how far rounding may move the difference")
    reason: str | None = Field(description="why there is no test")


class PlaceDocument(DocumentPart):
    """An experiment, a measure or a cell of one, of which one run alone has numbers."""

    experiment: str
    measure: str | None
    cell: str | None
    reason: str | None = Field(description="why the other run has no number of it")


class DifferencesDocument(DocumentPart):
    """What `mechdsl diff --format json` prints."""

    schema_version: Literal[1] = Field(alias="schema")
    old: SideDocument
    new: SideDocument
    changed: bool = Field(description="whether the exit status is 1")
    reasons: list[str] = Field(description="why it is")
    inputs: list[InputDocument]
    rows: list[RowsDocument]
    verdicts: list[VerdictDocument]
    cells: list[CellDocument]
    added: list[PlaceDocument]
    removed: list[PlaceDocument]
    counts: dict[State, int] = Field(description="cells by state, each measure by itself")
    conventions: dict[str, str]


def differences_document(found: Differences) -> DifferencesDocument:
    """All of it."""
    sides = [
        SideDocument(name=each.name, **({"note": each.note} if each.note else {}))
        for each in (found.old, found.new)
    ]
    return DifferencesDocument(
        schema=SCHEMA_VERSION,
        old=sides[0],
        new=sides[1],
        changed=found.changed,
        reasons=list(found.reasons),
        inputs=[
            InputDocument(
                what=each.what, old=each.old, new=each.new, experiments=list(each.experiments)
            )
            for each in found.inputs
        ],
        rows=[RowsDocument(**_lists(vars(each))) for each in found.rows],
        verdicts=[
            VerdictDocument(
                experiment=each.experiment,
                text=each.text,
                turn=each.turn,
                old=_outcome(each.old),
                new=_outcome(each.new),
            )
            for each in found.verdicts
        ],
        cells=[
            CellDocument(**{k: v for k, v in vars(each).items() if k != "cell"})
            for each in found.cells
        ],
        added=_places(found.added),
        removed=_places(found.removed),
        counts=dict(found.counts),
        conventions=dict(found.conventions),
    )


def _lists(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def _outcome(outcome: ExpectOutcome | None) -> ExpectDocument | None:
    return None if outcome is None else expectations([outcome])[0]


def _places(places: tuple[Place, ...]) -> list[PlaceDocument]:
    return [PlaceDocument(**vars(each)) for each in places]


def differences_schema() -> dict[str, Any]:
    """The JSON schema of the document, `mechdsl schema differences`."""
    schema = DifferencesDocument.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
