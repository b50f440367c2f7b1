"""Rows from CSV, JSON, JSONL and Parquet files, and from datasets of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from bisect import bisect_right
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import file_digest, sha256
from importlib import import_module
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, cast, overload

from mechdsl.base import limits
from mechdsl.base.files import find_snapshot, load_json
from mechdsl.base.source import Span
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import DataFormat, TooManyValues, UnreadableData
from mechdsl.program.paths import HF_DATASET_PATH, ROWS_PATH, path_to_read
from mechdsl.prompts.values import DataRecord, RowValue, content_key
from mechdsl.syntax import ast


class RecordOrder:
    """An order of records by content: draws and limits are the same for any order of the file."""

    def __init__(self, records: Sequence[DataRecord]) -> None:
        keys = [content_key(record) for record in records]
        self.keys = keys
        """By record number, the hash of its content."""
        self.order = sorted(range(len(keys)), key=lambda number: (keys[number], number))
        """Record numbers in the order of content."""
        self.rank = [0] * len(keys)
        """By record number, its index in `order`."""
        self.copies = [0] * len(keys)
        """By record number, the number of equal records before it."""
        seen: Counter[int] = Counter()
        for place, number in enumerate(self.order):
            self.rank[number] = place
            self.copies[number] = seen[keys[number]]
            seen[keys[number]] += 1


DUPLICATE_COLUMNS = "two columns are called"

RENAME_COLUMNS_HINT = "give each column a different name"


@dataclass(frozen=True)
class DataFile:
    """The records of a file and the SHA-256 of its bytes."""

    records: Sequence[DataRecord]
    columns: tuple[str, ...]
    digest: str
    lacking: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of streamed rows, the columns that a record lacks, with the number of its line."""

    @cached_property
    def by_content(self) -> RecordOrder:
        """The order in which records are drawn."""
        return RecordOrder(self.records)

    @cached_property
    def sorted(self) -> tuple[DataRecord, ...]:
        """The records in the order of `by_content`."""
        return tuple(self.records[number] for number in self.by_content.order)


class MalformedData(Exception):
    """A file without valid records; `reason` and `hint` are for the user."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def read_data_file(
    path: str, span: Span, *, streamed: bool = False
) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read a data file; the path is relative to the `.mech` file.

    Codes: E0504, E0505, E0532, E0535.

    Args:
        streamed: Whether records are checked but not kept, and read again when they are used.
    """
    file, problems = path_to_read(ROWS_PATH, path, span)
    if file is None:
        return None, problems
    known, suffix = STREAMED_READERS if streamed else READERS, file.suffix.lower()
    if suffix not in known:
        reason = f"files {'of streamed rows ' if streamed else ''}end in {', '.join(known)}"
        hint = "convert it to one of these" + (", or remove `streamed`" if streamed else "")
        return None, [DataFormat(span=span, path=path, reason=reason, hint=hint)]
    try:
        found = STREAMED_READERS[suffix](file) if streamed else _read_whole(file)
        if not found.records:
            raise MalformedData("it has no records", "add some")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else str(error.strerror or error)
        return None, [UnreadableData(span=span, path=path, reason=reason, hint=_hint(file))]
    except MalformedData as error:
        return None, [DataFormat(span=span, path=path, reason=error.reason, hint=error.hint)]
    return found, []


def _read_whole(file: Path) -> DataFile:
    """Read all records. Raises OSError, MalformedData."""
    content = file.read_bytes()
    records = READERS[file.suffix.lower()](content)
    columns = dict.fromkeys(name for record in records for name in record)
    return DataFile(tuple(records), tuple(columns), sha256(content).hexdigest())


class StreamedRecords(Sequence[DataRecord]):
    """The records of a file, each read when it is used."""

    def __init__(
        self, read: Callable[[int], DataRecord], count: int, names: Mapping[str, str] | None = None
    ) -> None:
        """Store how records are read.

        Args:
            read: Returns the record with a number.
            count: Number of records.
            names: Column → the name that it gets.
        """
        self._read, self._count, self._names = read, count, names or {}

    def renamed(self, names: Mapping[str, str]) -> StreamedRecords:
        """Return the same records with other names of columns."""
        return StreamedRecords(self._read, self._count, names)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> DataRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DataRecord]: ...
    def __getitem__(self, index: int | slice) -> DataRecord | Sequence[DataRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(self._count)[index]]
        return {self._names.get(name, name): value for name, value in self._read(index).items()}


class _SeenColumns:
    """The columns of records, and which of them some record lacks."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.lacking: dict[str, int] = {}
        """Column → the line of the first record without it."""
        self._first = 0

    def add(self, record: DataRecord, line: int) -> None:
        new = [name for name in record if name not in self.names]
        for name in new if self._first else ():
            self.lacking[name] = self._first
        for name in self.names:
            if name not in record:
                self.lacking.setdefault(name, line)
        self.names |= dict.fromkeys(new)
        self._first = self._first or line


def _open_json_lines(file: Path) -> DataFile:
    """Check each line. Raises OSError, MalformedData."""
    digest, begins, columns, place = sha256(), array("q"), _SeenColumns(), 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            digest.update(line)
            if line.strip():
                try:
                    text = _text(line)
                except MalformedData as error:
                    raise MalformedData(f"line {number}: {error.reason}", error.hint) from None
                columns.add(_line_record(text, number), number)
                begins.append(place)
            place += len(line)

    def read(index: int) -> DataRecord:
        with file.open("rb") as lines:
            lines.seek(begins[index])
            return _line_record(_text(lines.readline()), index + 1)

    records = StreamedRecords(read, len(begins))
    return DataFile(records, tuple(columns.names), digest.hexdigest(), columns.lacking)


def _open_parquet(file: Path) -> DataFile:
    """Open a file of which one group of rows is in memory at a time. Raises OSError,
    MalformedData."""
    parquet = import_parquet("parquet")
    with file.open("rb") as content:
        digest = file_digest(content, "sha256").hexdigest()
    try:
        opened = parquet.ParquetFile(str(file))
        groups = range(opened.metadata.num_row_groups)
        sizes = [int(opened.metadata.row_group(each).num_rows) for each in groups]
        names = cast("list[str]", opened.schema_arrow.names)
    except OSError:
        raise
    except Exception as error:  # pyarrow has its own tree of exceptions
        raise MalformedData(f"pyarrow: {error}", "write the file again") from None
    _refuse_repeated(names, DUPLICATE_COLUMNS)
    ends = list(accumulate(sizes))
    group: Callable[[int], Any] = lru_cache(1)(opened.read_row_group)

    def read(index: int) -> DataRecord:
        number = bisect_right(ends, index)
        within = index - (ends[number] - sizes[number])
        return cast("DataRecord", group(number).slice(within, 1).to_pylist()[0])

    return DataFile(StreamedRecords(read, sum(sizes)), tuple(names), digest)


STREAMED_READERS: Mapping[str, Callable[[Path], DataFile]] = {
    ".jsonl": _open_json_lines,
    ".parquet": _open_parquet,
}


def _line_record(line: str, number: int) -> DataRecord:
    """Return the record of a line. Raises MalformedData."""
    where = f"line {number}"
    try:
        value = _parsed(line, where)
    except ValueError as error:
        reason = f"{where} is not JSON ({error})"
        raise MalformedData(reason, "write one object per line") from None
    return _object(value, where)


def _hint(file: Path) -> str:
    folder = file.parent
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        names = []
    otherwise = "the path is relative to the folder of the `.mech` file"
    return did_you_mean(file.name, names, otherwise)


def _text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one."""
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        hint = "save the file in UTF-8 (in Excel: `CSV UTF-8`)"
        raise MalformedData(f"byte {error.start} is not {name}", hint) from None


def _refuse_repeated(names: Sequence[str], said: str) -> None:
    """Reject repeated names: the first of two values would silently be lost."""
    if len(set(names)) < len(names):
        name = next(name for name, times in Counter(names).items() if times > 1)
        raise MalformedData(f"{said} `{name}`", RENAME_COLUMNS_HINT)


def _parsed(text: str, where: str) -> Any:
    """Parse JSON whose objects have unique keys. Raises ValueError for invalid JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in pairs], f"{where} has two keys")
        return dict(pairs)

    return load_json(text, unique)


def _object(value: Any, where: str) -> DataRecord:
    if not isinstance(value, dict):
        raise MalformedData(
            f"{where} is not an object", "every record is an object with the columns"
        )
    return cast("DataRecord", value)


def _json_lines(content: bytes) -> list[DataRecord]:
    records: list[DataRecord] = []
    for number, line in enumerate(_text(content).split("\n"), 1):
        if line.strip():
            records.append(_line_record(line, number))
    return records


def _json(content: bytes) -> list[DataRecord]:
    try:
        value = _parsed(_text(content), "one of its objects")
    except ValueError as error:
        raise MalformedData(f"it is not JSON ({error})", "correct the file") from None
    if isinstance(value, dict):
        return _inner_records(cast("dict[str, Any]", value))
    if not isinstance(value, list):
        raise MalformedData("it contains neither a list nor an object", "write a list of objects")
    entries = cast("list[Any]", value)
    return [_object(entry, f"record {n}") for n, entry in enumerate(entries)]


def _inner_records(whole: Mapping[str, Any]) -> list[DataRecord]:
    """Return the records of an object's one list of objects, each with the object's other keys."""
    lists = [k for k, v in whole.items() if _is_table(v)]
    if len(lists) != 1:
        reason = "it is an object that contains no list of records"
        raise MalformedData(reason, "write a list of objects")
    shared = {k: v for k, v in whole.items() if k != lists[0]}
    both = next((k for k in shared if any(k in entry for entry in whole[lists[0]])), None)
    if both is not None:
        reason = f"`{both}` is a key next to the list `{lists[0]}` and also a key of its records"
        raise MalformedData(reason, RENAME_COLUMNS_HINT)
    return [cast("DataRecord", shared | entry) for entry in whole[lists[0]]]


def _is_table(value: object) -> bool:
    entries = cast("list[object]", value) if isinstance(value, list) else []
    return bool(entries) and all(isinstance(entry, dict) for entry in entries)


def _separated(delimiter: str) -> Callable[[bytes], list[DataRecord]]:
    def read(content: bytes) -> list[DataRecord]:
        text = _text(content)
        table = _split_fields(text, delimiter)
        if not table:
            return []
        if len(table[0]) == 1:  # the file may be separated by another character
            tables = (_split_fields(text, other) for other in DELIMITERS if other in table[0][0])
            table = next((each for each in tables if len({len(line) for line in each}) == 1), table)
        header, *body = table
        header = [name.strip() for name in header]
        for number, line in enumerate(body):
            if len(line) != len(header):
                reason = f"record {number} has {len(line)} fields, the header {len(header)}"
                raise MalformedData(reason, "quote fields that contain the separator")
        empty = [n for n, name in enumerate(header) if not name and not any(r[n] for r in body)]
        if body and empty:  # from a separator at the end of each line
            header, *body = [
                [field for n, field in enumerate(line) if n not in empty]
                for line in (header, *body)
            ]
        if header.count("") > 1:
            reason = f"{header.count('')} of its columns have no name"
            raise MalformedData(reason, "name them in the first line")
        _refuse_repeated(header, DUPLICATE_COLUMNS)
        columns = [_typed(column) for column in zip(*body, strict=True)]
        return [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)]

    return read


DELIMITERS = ";\t|"
"""Separators of a file whose first line contains no expected separator."""


def _split_fields(text: str, delimiter: str) -> list[list[str]]:
    """Return the fields of each line that isn't empty."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return [line for line in lines if line]
    except csv.Error as error:
        raise MalformedData(f"line {lines.line_num}: {error}", "correct the file") from None


def _typed(column: Sequence[str]) -> Sequence[RowValue]:
    """Convert columns of numbers to numbers, unless that changes the text of one (`02`)."""
    for convert in (int, float):
        try:
            values = [convert(text) for text in column]
        except ValueError:
            continue
        if all(isfinite(v) and repr(v) == t for v, t in zip(values, column, strict=True)):
            return values
    return column


def import_parquet(what: str) -> Any:
    """Import pyarrow's Parquet module; raises `MalformedData` if the package is missing."""
    try:
        return cast("Any", import_module("pyarrow.parquet"))
    except ImportError:
        reason = f"reading {what} needs the package pyarrow"
        raise MalformedData(reason, "pip install 'mechdsl[frames]'") from None


def _parquet(content: bytes) -> list[DataRecord]:
    parquet = import_parquet("parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        records = cast("list[DataRecord]", file.read().to_pylist())
        names = cast("list[str]", file.schema_arrow.names)
    except Exception as error:  # pyarrow has its own tree of exceptions
        raise MalformedData(f"pyarrow: {error}", "write the file again") from None
    _refuse_repeated(names, DUPLICATE_COLUMNS)
    return records


READERS: Mapping[str, Callable[[bytes], list[DataRecord]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}

DATASET_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of data files; if a folder has several types, the first one is read."""

_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Splits that files without a split in their names don't belong to."""


@dataclass(frozen=True)
class DatasetReference:
    """The arguments of `hf_dataset(…)`."""

    path: str
    split: str
    config: str | None = None
    revision: str | None = None


def parse_dataset(call: ast.Call) -> DatasetReference | None:
    """Parse a call; None if its arguments are invalid, which has already been reported."""
    given: dict[str, str] = {}
    for argument in call.arguments:
        name, value = argument.name or "path", argument.value
        if not isinstance(value, ast.String) or name in given:
            return None
        given[name] = value.value
    if call.name != HF_DATASET_PATH.name or "[" in given.get("split", ""):
        return None
    if not {"path", "split"} <= given.keys() <= {"path", "split", "config", "revision"}:
        return None
    return DatasetReference(**given)


def read_dataset(call: ast.Call) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read the records of one split. Codes: E0504, E0505, E0506, E0532, E0535."""
    named = parse_dataset(call)
    if named is None:
        return None, []
    span = call.span
    try:
        files = _files(named, span)
        content = list(_contents(named, files, span))
        records: list[DataRecord] = []
        for file, data in content:
            records += _records(file, data)
            if len(records) > limits.COMBINATIONS:
                raise _Refused(
                    _too_many(named, span, f"{len(records):,} records", limits.COMBINATIONS)
                )
        if not records:
            raise MalformedData("it has no records", "name another split")
    except _Refused as refused:
        return None, refused.diagnostics
    except MalformedData as error:
        bad = DataFormat(span=span, path=named.path, reason=error.reason, hint=error.hint)
        return None, [bad]
    columns = dict.fromkeys(name for record in records for name in record)
    whole = sha256()
    for _, data in content:
        whole.update(sha256(data).digest())
    return DataFile(tuple(records), tuple(columns), whole.hexdigest()), []


class _Refused(Exception):
    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__()
        self.diagnostics = list(diagnostics)


# --- file selection -------------------------------------------------------------------------------


def _files(named: DatasetReference, span: Span) -> list[Path]:
    """Return the files of the split, by name."""
    folder, problems = path_to_read(HF_DATASET_PATH, named.path, span)
    if folder is None:
        raise _Refused(*problems)
    if not folder.is_dir():
        snapshot = find_snapshot(named.path, named.revision, of="datasets")
        if snapshot is None:
            hint = (
                'save it on a machine with a network: `load_dataset("…").save_to_disk("folder")`, '
                "or `hf download --repo-type dataset NAME`"
            )
            reason = "there is no such folder, and the Hugging Face cache has no such data set"
            raise _Refused(UnreadableData(span=span, path=named.path, reason=reason, hint=hint))
        return _of_folder(snapshot, named)
    if (folder / "dataset_dict.json").is_file():
        splits = _about(folder / "dataset_dict.json").get("splits")
        known = [str(each) for each in cast("list[object]", splits)] if _is_list(splits) else []
        _known_split(named.split, known)
        folder = folder / named.split
    found = _saved(folder, named) if (folder / "state.json").is_file() else None
    found = _of_folder(folder, named) if found is None else found
    for file in found:
        _, problems = path_to_read(HF_DATASET_PATH, str(file.absolute()), span)
        if problems:
            raise _Refused(*problems)
    return found


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _about(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MalformedData(f"`{file.name}` can't be read", "save the data set again")
    return cast("dict[str, Any]", found)


def _known_split(split: str, known: Sequence[str]) -> None:
    if split in known:
        return
    hint = did_you_mean(split, known, f"it has {name_list(known)}" if known else "name another")
    raise MalformedData(f"it has no split `{split}`", hint)


def _saved(folder: Path, named: DatasetReference) -> list[Path]:
    """Return the files that `save_to_disk` lists for a data set."""
    state = _about(folder / "state.json")
    own = state.get("_split")
    if isinstance(own, str):
        _known_split(named.split, [own])
    entries = state.get("_data_files")
    names = [
        Path(str(cast("dict[str, object]", each).get("filename"))).name
        for each in cast("list[object]", entries if _is_list(entries) else [])
        if isinstance(each, dict)
    ]
    found = [folder / name for name in names]
    if not found or not all(file.is_file() for file in found):
        raise MalformedData("files that `state.json` names are missing", "save the data set again")
    return found


def _of_folder(folder: Path, named: DatasetReference) -> list[Path]:
    """Return the files of a split: its name is a separate word in the path of a file."""
    every = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in DATASET_SUFFIXES and file.name not in _ABOUT and file.is_file()
    ]
    if named.config is not None:
        every = [file for file in every if named.config in file.relative_to(folder).parts[:-1]]
        if not every:
            raise MalformedData(f"it has no config `{named.config}`", "name one of its folders")
    suffix = next((each for each in DATASET_SUFFIXES if any(f.suffix == each for f in every)), None)
    every = [file for file in every if file.suffix == suffix]

    def of(split: str) -> list[Path]:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
        return [file for file in every if word.search(file.relative_to(folder).as_posix())]

    found = of(named.split)
    others = [split for split in _SPLITS if of(split)]
    if not found and named.split == "train" and not others:
        found = every
    if not found:
        listed = f"there are files of {name_list(others)}" if others else "it has no data files"
        raise MalformedData(f"it has no split `{named.split}`", listed)
    configs = {file.relative_to(folder).parts[:-1] for file in found}
    if named.config is None and len(configs) > 1:
        shown = name_list(dict.fromkeys(parts[0] for parts in sorted(configs) if parts))
        raise MalformedData("it has several configs", f'write `config: "…"`: {shown}')
    return found


# --- file contents --------------------------------------------------------------------------------


def _contents(
    named: DatasetReference, files: Sequence[Path], span: Span
) -> Iterator[tuple[Path, bytes]]:
    try:
        size = sum(file.stat().st_size for file in files)
        if size > limits.DATA_SET:
            raise _Refused(_too_many(named, span, f"{size:,} bytes", limits.DATA_SET))
        for file in files:
            yield file, file.read_bytes()
    except OSError as error:
        reason, hint = str(error.strerror or error), "save the data set again"
        raise _Refused(
            UnreadableData(span=span, path=named.path, reason=reason, hint=hint)
        ) from None


def _too_many(named: DatasetReference, span: Span, amount: str, most: int) -> Diagnostic:
    hint = "save a part of it: `data.select(range(10_000)).save_to_disk(…)`"
    return TooManyValues(span=span, what=f"`{named.path}`", amount=amount, most=most, hint=hint)


def _records(file: Path, content: bytes) -> list[DataRecord]:
    if file.suffix != ".arrow":
        return READERS[file.suffix](content)
    import_parquet("arrow")
    arrow = cast("Any", import_module("pyarrow"))
    try:
        try:
            reader = arrow.ipc.open_stream(content)
        except arrow.ArrowInvalid:  # a file with an index at its end
            reader = arrow.ipc.open_file(content)
        return cast("list[DataRecord]", reader.read_all().to_pylist())
    except arrow.ArrowException as error:
        raise MalformedData(f"pyarrow: {error}", "save the data set again") from None
