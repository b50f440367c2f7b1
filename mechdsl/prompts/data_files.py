"""Data files: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` as records."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, cast

from mechdsl.base.json_text import load_json
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e05_data import DataFormat, DataNotRead
from mechdsl.program.named_paths import ROWS, path_to_read
from mechdsl.prompts.row_content import ByContent
from mechdsl.prompts.values import Record, Value

TWO_COLUMNS = "two columns are called"
OWN_NAMES = "give each of them a name of its own"


@dataclass(frozen=True)
class DataFile:
    """The records of a file and the SHA-256 of its bytes."""

    records: tuple[Record, ...]
    columns: tuple[str, ...]
    digest: str

    @cached_property
    def by_content(self) -> ByContent:
        """In which order they are drawn."""
        return ByContent(self.records)

    @cached_property
    def sorted(self) -> tuple[Record, ...]:
        """The records in that order."""
        return tuple(self.records[number] for number in self.by_content.order)


class Malformed(Exception):
    """A file that doesn't hold records; `reason` and `hint` are for the reader."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def read_data(path: str, span: Span) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read a data file; the path is relative to the `.mech` file.

    Codes: E0504, E0505, E0532, E0535.
    """
    file, problems = path_to_read(ROWS, path, span)
    if file is None:
        return None, problems
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        reason = f"files end in {known}"
        hint = "convert it to one of these"
        return None, [DataFormat(span=span, path=path, reason=reason, hint=hint)]
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else str(error.strerror or error)
        )
        return None, [DataNotRead(span=span, path=path, reason=reason, hint=_hint(file))]
    try:
        records = reader(content)
        if not records:
            raise Malformed("it has no records", "add some")
    except Malformed as error:
        return None, [DataFormat(span=span, path=path, reason=error.reason, hint=error.hint)]
    columns = dict.fromkeys(name for record in records for name in record)
    return DataFile(tuple(records), tuple(columns), sha256(content).hexdigest()), []


def _hint(file: Path) -> str:
    folder = file.parent
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        names = []
    otherwise = "the path is relative to the folder of the `.mech` file"
    return did_you_mean(file.name, names, otherwise)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} is not UTF-8", "save the file in UTF-8") from None


def _refuse_repeated(names: Sequence[str], said: str) -> None:
    """Of two values with one name, the first would silently be lost."""
    if len(set(names)) < len(names):
        name = next(name for name, times in Counter(names).items() if times > 1)
        raise Malformed(f"{said} `{name}`", OWN_NAMES)


def _parsed(text: str, where: str) -> Any:
    """JSON whose objects have no key twice. Raises ValueError for what isn't JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in pairs], f"{where} has two keys")
        return dict(pairs)

    return load_json(text, unique)


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise Malformed(f"{where} is not an object", "every record is an object with the columns")
    return cast("Record", value)


def _json_lines(content: bytes) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(_text(content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parsed(line, f"line {number}")
        except ValueError as error:
            reason = f"line {number} is not JSON ({error})"
            raise Malformed(reason, "write one object per line") from None
        records.append(_object(value, f"line {number}"))
    return records


def _json(content: bytes) -> list[Record]:
    try:
        value = _parsed(_text(content), "an object of it")
    except ValueError as error:
        raise Malformed(f"it is not JSON ({error})", "correct the file") from None
    if isinstance(value, dict):
        return _inner_records(cast("dict[str, Any]", value))
    if not isinstance(value, list):
        raise Malformed("it holds neither a list nor an object", "write a list of objects")
    entries = cast("list[Any]", value)
    return [_object(entry, f"record {n}") for n, entry in enumerate(entries)]


def _inner_records(whole: Mapping[str, Any]) -> list[Record]:
    """An object with one list of objects in it: these are the records, the rest goes with each."""
    lists = [k for k, v in whole.items() if _is_table(v)]
    if len(lists) != 1:
        reason = "it is an object without a list of records in it"
        raise Malformed(reason, "write a list of objects")
    shared = {k: v for k, v in whole.items() if k != lists[0]}
    both = next((k for k in shared if any(k in entry for entry in whole[lists[0]])), None)
    if both is not None:
        reason = f"`{both}` stands beside the list `{lists[0]}` and in its records"
        raise Malformed(reason, OWN_NAMES)
    return [cast("Record", shared | entry) for entry in whole[lists[0]]]


def _is_table(value: object) -> bool:
    entries = cast("list[object]", value) if isinstance(value, list) else []
    return bool(entries) and all(isinstance(entry, dict) for entry in entries)


def _separated(delimiter: str) -> Callable[[bytes], list[Record]]:
    def read(content: bytes) -> list[Record]:
        lines = csv.reader(io.StringIO(_text(content), newline=""), delimiter=delimiter)
        try:
            table = [line for line in lines if line]
        except csv.Error as error:
            raise Malformed(f"line {lines.line_num}: {error}", "correct the file") from None
        if not table:
            return []
        header, *body = table
        _refuse_repeated(header, TWO_COLUMNS)
        for number, line in enumerate(body):
            if len(line) != len(header):
                reason = f"record {number} has {len(line)} fields, the header {len(header)}"
                raise Malformed(reason, "quote fields that contain the separator")
        columns = [_typed(column) for column in zip(*body, strict=True)]
        return [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)]

    return read


def _typed(column: Sequence[str]) -> Sequence[Value]:
    """Whole columns of numbers become numbers, unless that changes how one is written (`02`)."""
    for convert in (int, float):
        try:
            values = [convert(text) for text in column]
        except ValueError:
            continue
        if all(isfinite(v) and repr(v) == t for v, t in zip(values, column, strict=True)):
            return values
    return column


def import_parquet(what: str) -> Any:
    """The part of pyarrow that reads parquet; Malformed where the package isn't there."""
    try:
        return cast("Any", import_module("pyarrow.parquet"))
    except ImportError:
        reason = f"reading {what} needs the package pyarrow"
        raise Malformed(reason, "pip install 'mechdsl[frames]'") from None


def _parquet(content: bytes) -> list[Record]:
    parquet = import_parquet("parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        records = cast("list[Record]", file.read().to_pylist())
        names = cast("list[str]", file.schema_arrow.names)
    except Exception as error:  # pyarrow has its own tree of exceptions
        raise Malformed(f"pyarrow: {error}", "write the file again") from None
    _refuse_repeated(names, TWO_COLUMNS)
    return records


READERS: Mapping[str, Callable[[bytes], list[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
