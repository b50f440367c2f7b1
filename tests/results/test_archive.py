"""Stored results: a round trip is exact to the bit, and hostile archives are rejected."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_type_hints

import numpy as np
import pytest
from safetensors.numpy import load, save

import mechdsl
from mechdsl.base.text import Percent, Source, Span
from mechdsl.diagnostics.core import CODES
from mechdsl.diagnostics.experiments import BadReport
from mechdsl.diagnostics.rendering import Diagnostics
from mechdsl.results import results as archive
from mechdsl.results import typed_json
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import (
    ARRAYS_FILE,
    DOCUMENT_FILE,
    RESULT_FILE,
    SOURCE_FILE,
    ArchiveError,
    ArchiveVersionError,
    Results,
    pack_results,
    unpack_results,
)

from ..quick import some
from .archived import TEXTS, written
from .exact import same_diagnostic, same_results

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

EXAMPLES = Path(mechdsl.__file__).parent.parent / "examples"
OFFLINE = ("counting", "countscope", "induction", "mediators", "system2")


@cache
def run(name: str) -> Results:
    return mechdsl.run(written(Path(mkdtemp()), name), profile=True)


@cache
def packed(name: str) -> dict[str, bytes]:
    return pack_results(run(name), TEXTS[name])


def changed(name: str, change: Any, part: str = RESULT_FILE) -> dict[str, bytes]:
    """Return an archive with changed JSON or arrays."""
    content = dict(packed(name))
    if part == RESULT_FILE:
        found = json.loads(content[RESULT_FILE])
        change(found)
        content[RESULT_FILE] = json.dumps(found).encode()
    else:
        arrays = dict(load(content[ARRAYS_FILE]))
        change(arrays)
        content[ARRAYS_FILE] = save(arrays)
    return content


@pytest.mark.parametrize("name", TEXTS)
def test_archived_results_round_trip_bit_for_bit(name: str) -> None:
    same_results(run(name), unpack_results(packed(name)))


def test_sample_files_cover_every_part_of_results() -> None:
    """Guards the round-trip test against samples that lack a feature."""
    assert run("controls")["heads"].controls[0] is not None
    assert run("variants")["heads"].axes[0] == "source"
    (file,) = run("lost and missing").files
    assert [each.name for each in file.lost] == ["gone"]
    assert file.experiments[0].measures[0].missing is not None
    assert any(run("gaps")["heads"].measures[1].gaps)
    assert run("everything printed")["heads"].groups is not None
    assert run("everything printed")["spots"].hits
    assert run("replies")["written"].replies.cells
    kinds = {data.kind for data in run("everything printed")["heads"].measures}
    assert kinds == {"number", "category"}
    shares = {type(cell.coords["k"]) for cell in run("percentages")["curve"].cells}
    assert shares == {Percent}
    tags = run("lists from data")["e"].row_values["tags"]
    assert {type(each) for each in tags} == {list, type(None)}


@pytest.mark.parametrize("name", some(OFFLINE, OFFLINE[:2]))
def test_archived_examples_round_trip(name: str) -> None:
    path = EXAMPLES / f"{name}.mech"
    results = mechdsl.run(path, limit=8, write_reports=False)
    same_results(results, unpack_results(pack_results(results, path.read_text("utf-8"))))


def picture(result: ExperimentResult, kind: str) -> Any:
    return result.plot(kind).to_dict()


@pytest.mark.slow
def test_archived_results_draw_the_same_pictures() -> None:
    name = "everything printed"
    a, b = run(name)["heads"], unpack_results(packed(name))["heads"]
    assert picture(a, "heatmap") == picture(b, "heatmap")
    assert picture(a, "confusion") == picture(b, "confusion")
    spots = run(name)["spots"], unpack_results(packed(name))["spots"]
    assert picture(spots[0], "overlay") == picture(spots[1], "overlay")
    controlled = run("controls")["heads"], unpack_results(packed("controls"))["heads"]
    assert controlled[0].controls[0] is not None
    assert picture(controlled[0], "lines") == picture(controlled[1], "lines")


def test_archive_contains_the_source_and_the_json_document() -> None:
    name = "lost and missing"
    content = packed(name)
    assert content[SOURCE_FILE].decode() == TEXTS[name]
    assert content[DOCUMENT_FILE].decode() == run(name).to_json(indent=None) + "\n"
    assert set(content) == {RESULT_FILE, ARRAYS_FILE, SOURCE_FILE, DOCUMENT_FILE}


def test_run_intervals_are_loaded_and_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run("plain")["heads"].run_intervals
    found = unpack_results(packed("plain"))["heads"]
    monkeypatch.delattr("mechdsl.results.experiment_result.run_interval")
    assert found.run_intervals == wanted


def test_spans_refer_to_the_given_source_only_if_its_text_is_equal() -> None:
    name = "lost and missing"
    source = Source(TEXTS[name], Path("elsewhere.mech"))
    again = unpack_results(packed(name), source)
    spans = [d.span for d in again.diagnostics if d.span is not None]
    assert spans
    assert all(span.source is source for span in spans)
    assert all(r.span.source is source for e in again for r in e.reports)
    other = unpack_results(packed(name), Source(TEXTS[name] + "\n", Path("elsewhere.mech")))
    spans = [d.span for d in other.diagnostics if d.span is not None]
    assert all(span.source.text == TEXTS[name] for span in spans)


def test_reports_of_an_archive_have_no_file_access() -> None:
    reach = [r.span.source.reach for e in unpack_results(packed("plain")) for r in e.reports]
    assert reach
    assert all((each.reads, each.writes) == ((), ()) for each in reach)


def test_span_in_an_imported_file_keeps_its_text() -> None:
    other = Source("mech 1\nmetric m = 1\n", Path("lib/other.mech"))
    said = BadReport(span=Span(other, 7, 13), kind="table", reason="is odd", hint="look")
    results = replace(run("plain"), diagnostics=Diagnostics([said]))
    again = unpack_results(pack_results(results, TEXTS["plain"]))
    (found,) = again.diagnostics
    same_diagnostic(said, found)
    assert found.span is not None
    assert found.span.source.path == Path("lib/other.mech")
    assert again.diagnostics.render() == results.diagnostics.render()


def facts_of(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if f.name not in ("span", "by_text")}


def every_diagnostic() -> list[Any]:
    """Return one diagnostic per code, with facts of the declared types."""
    values: dict[Any, Any] = {str: "a{b}'\"\u202e", int: 2, bool: True}
    source = Source("mech 1\nx\n", Path("a.mech"))
    typed_json._diagnostic_classes()
    return [
        kind(
            span=Span(source, 7, 8),
            **{name: values[hint] for name, hint in facts_of(kind).items()},
        )
        for _, kind in sorted(CODES.items())
        if kind.__module__.startswith("mechdsl.diagnostics.")
    ]


def test_every_diagnostic_round_trips() -> None:
    said = every_diagnostic()
    assert len(said) > 150
    results = replace(run("no experiments"), diagnostics=Diagnostics(said))
    again = unpack_results(pack_results(results, TEXTS["no experiments"]))
    for a, b in zip(said, again.diagnostics, strict=True):
        same_diagnostic(a, b)


def test_archived_diagnostic_keeps_its_message_after_rewording() -> None:
    def reword(found: dict[str, Any]) -> None:
        found["diagnostics"][0]["message"] = "in other {words}"

    was = run("no rules").diagnostics[0]
    (found, *_) = unpack_results(changed("no rules", reword)).diagnostics
    assert (found.code, found.severity) == (was.code, was.severity)
    assert found.message == "in other {words}"
    assert (found.label_text, found.help_text) == (was.label_text, was.help_text)
    assert found.span is not None
    assert was.span is not None
    assert (found.span.start, found.span.end) == (was.span.start, was.span.end)
    assert "in other {words}" in Diagnostics([found]).render()
    assert "" not in CODES


def test_diagnostic_with_an_unknown_code_keeps_its_message() -> None:
    def rename(found: dict[str, Any]) -> None:
        found["diagnostics"][0]["code"] = "W0999"

    was = run("no rules").diagnostics[0]
    (found, *_) = unpack_results(changed("no rules", rename)).diagnostics
    assert (found.code, found.severity, found.message) == ("W0999", "warning", was.message)


# --- hostile archives -----------------------------------------------------------------------------


def experiment_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["files"][0]["experiments"][0]


def put(*path: Any, value: Any) -> Any:
    """Return a change that sets the value at a path of the first experiment."""

    def change(found: dict[str, Any]) -> None:
        here: Any = experiment_of(found)
        for step in path[:-1]:
            here = here[step]
        assert path[-1] in here or isinstance(here, list)
        here[path[-1]] = value

    return change


HOSTILE = {
    "name": put("name", value="../../etc"),
    "absolute name": put("name", value="/etc/x"),
    "name of a type": put("name", value=3),
    "axes": put("axes", value=["layer"]),
    "cells": put("cells", value=[]),
    "a cell too few": lambda found: experiment_of(found)["cells"].pop(),
    "no measures": put("measures", value=[]),
    "effect": put("measures", 0, "effect", value="nonsense"),
    "kind": put("measures", 0, "kind", value="os.system"),
    "array": put("measures", 0, "patched", value="999"),
    "array of another type": put("measures", 0, "patched", value=None),
    "bool": put("measures", 0, "per_prompt", value="yes"),
    "inert": lambda found: put(
        "measures", 0, "inert", value=experiment_of(found)["measures"][0]["patched"]
    )(found),
    "shapes": lambda found: put(
        "measures", 0, "patched", value=experiment_of(found)["measures"][0]["base"]
    )(found),
    "rows": put("row_ids", value=[1, 2]),
    "row values": put("row_values", "count", value=[1]),
    "report": put("reports", 0, "kind", value="nonsense"),
    "report's file": put("reports", 0, "file", value=["a"]),
    "span": put("reports", 0, "span", value={"span": [0, 0, 10**9]}),
    "source": put("reports", 0, "span", value={"span": [7, 0, 1]}),
    "negative source": put("reports", 0, "span", value={"span": [-1, 0, 1]}),
    "no span": put("reports", 0, "span", value=None),
    "resamples": put("settings", "resamples", value=10**12),
    "confidence": put("settings", "confidence", value=1e300),
    "reasons": put("statistics", 0, "reasons", value=[]),
    "statistics": put("statistics", 0, "n", value="0"),
    "texts": put("texts", value=[[["a"]], [0]]),
    "hits": put("hits", value=[[], [1]]),
    "unknown field": lambda found: experiment_of(found).update(extra=1),
    "no name": lambda found: experiment_of(found).pop("name"),
    "tag": put("row_values", "count", value={"pickle": "gASVJAAAAAAAAACMBXBvc2l4"}),
    "two tags": put("row_values", "count", value={"tuple": [], "dict": []}),
    "float": put("row_values", "count", value={"float": "1e5"}),
    "numpy": put("row_values", "count", value={"numpy": ["|O8", 1]}),
    "numpy size": put("row_values", "count", value={"numpy": ["<f99999999", 1]}),
    "path": put("row_values", "count", value={"path": 3}),
    "no such kind": put("row_values", "count", value={"SpanAt": ["a", "b", "c"]}),
    "intervals": lambda found: found.update(intervals=[{}]),
    "no intervals": lambda found: found.update(intervals=[]),
    "no sources": lambda found: found.update(sources=[]),
    "sources": lambda found: found.update(sources=[{"path": 3, "origin": "", "text": ""}]),
    "two files": lambda found: found["files"].append(found["files"][0]),
    "no file": lambda found: found.update(files=[]),
    "twice": lambda found: found["files"][0]["experiments"].append(experiment_of(found)),
    "hash": lambda found: found["files"][0].update(hash="0" * 64),
    "versions": lambda found: found.update(versions=[["a", "b"]]),
    "diagnostics": lambda found: found.update(diagnostics=[{"code": "E0607"}]),
    "severity": lambda found: found.update(
        diagnostics=[
            {
                "code": "W9",
                "severity": "error",
                "message": "",
                "label_text": "",
                "help_text": "",
                "span": None,
                "facts": {},
            }
        ]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_inconsistent_archive_json_is_rejected(name: str) -> None:
    content = changed("plain", HOSTILE[name])
    with pytest.raises(ArchiveError) as found:
        unpack_results(content)
    assert str(found.value)
    assert len(str(found.value)) < 300


ARRAY_CHANGES = {
    "fewer rows": lambda arrays: arrays.update(
        {k: v[:1] for k, v in arrays.items() if v.ndim == 2}
    ),
    "other type": lambda arrays: arrays.update(
        {k: v.astype(np.float32) for k, v in arrays.items()}
    ),
    "flat": lambda arrays: arrays.update({k: v.reshape(-1) for k, v in arrays.items()}),
    "huge": lambda arrays: arrays.update({k: np.zeros((0, 10**12)) for k in arrays}),
    "none": lambda arrays: arrays.clear(),
}


@pytest.mark.parametrize("name", ARRAY_CHANGES)
def test_inconsistent_archive_arrays_are_rejected(name: str) -> None:
    with pytest.raises(ArchiveError):
        unpack_results(changed("plain", ARRAY_CHANGES[name], ARRAYS_FILE))


@pytest.mark.parametrize("part", [RESULT_FILE, ARRAYS_FILE, SOURCE_FILE])
def test_torn_or_missing_archive_part_is_rejected(part: str) -> None:
    content = packed("plain")
    whole = content[part]
    for keep in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ArchiveError):
            unpack_results({**content, part: whole[:keep]})
    for data in (b"\xff" * 100, b"[" * 1_000_000, b"null", b"{}", b"1" * 10_000):
        with pytest.raises(ArchiveError):
            unpack_results({**content, part: data})
    with pytest.raises(ArchiveError, match="is missing"):
        unpack_results({name: data for name, data in content.items() if name != part})


def test_oversized_archive_part_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_JSON_BYTES", len(packed("plain")[RESULT_FILE]) - 1)
    with pytest.raises(ArchiveError, match="has more than"):
        unpack_results(packed("plain"))


def test_flipped_bits_raise_only_archive_errors() -> None:
    """Unpacking raises nothing but ArchiveError, whichever bit is flipped."""
    rng = np.random.default_rng(0)
    refused = 0
    for part in (RESULT_FILE, ARRAYS_FILE):
        whole = packed("plain")[part]
        for place in rng.integers(0, len(whole), 150).tolist():
            torn = bytearray(whole)
            torn[place] ^= 1 << int(rng.integers(0, 8))
            try:
                unpack_results({**packed("plain"), part: bytes(torn)})
            except ArchiveError:
                refused += 1
    assert refused > 30


def test_archive_of_another_version_is_rejected_with_its_version() -> None:
    with pytest.raises(ArchiveVersionError, match=r"different version \(mechdsl 9\)"):
        unpack_results(changed("plain", lambda found: found.update(archive=99, mechdsl="9")))


def test_field_missing_in_an_old_archive_takes_its_default() -> None:
    again = unpack_results(changed("plain", lambda found: experiment_of(found).pop("centres")))
    assert again["heads"].centres == ()


def test_value_that_cannot_be_stored_is_rejected_with_its_type() -> None:
    results = run("plain")
    (file,) = results.files
    odd = replace(file.experiments[0], row_values={"x": [object()] * 8})
    with pytest.raises(ArchiveError, match=r"builtins\.object can't be stored"):
        pack_results(replace(results, files=(replace(file, experiments=(odd,)),)), TEXTS["plain"])
