"""Records of data files: formats, and files that are larger than memory, whose records are read
when they are used."""

from __future__ import annotations

import csv
import io
from array import array
from bisect import bisect_right
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from hashlib import file_digest, sha256
from importlib import import_module
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, cast, overload

from mechdsl.base.files import load_json
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError
from mechdsl.prompts.values import DataRecord, RowValue

DUPLICATE_COLUMNS = "two columns are called"

RENAME_COLUMNS_HINT = "give each column a different name"


class MalformedData(HintedError):
    """A file without valid records; `reason` and `hint` are for the user."""


def parse_line(line: str, number: int) -> DataRecord:
    """Return the record of a line. Raises MalformedData."""
    where = f"line {number}"
    try:
        value = _parsed(line, where)
    except ValueError as error:
        reason = f"{where} is not JSON ({error})"
        raise MalformedData(reason, "write one object per line") from None
    return _object(value, where)


def decode_text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark, or UTF-16 with one."""
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        hint = "save the file in UTF-8 (in Excel: `CSV UTF-8`)"
        raise MalformedData(f"byte {error.start} is not {name}", hint) from None


def reject_repeated(names: Sequence[str], said: str) -> None:
    """Reject repeated names: the first of two values would silently be lost."""
    if len(set(names)) < len(names):
        name = next(name for name, times in Counter(names).items() if times > 1)
        raise MalformedData(f"{said} `{name}`", RENAME_COLUMNS_HINT)


def _parsed(text: str, where: str) -> Any:
    """Parse JSON whose objects have unique keys. Raises ValueError for invalid JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        reject_repeated([key for key, _ in pairs], f"{where} has two keys")
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
    for number, line in enumerate(decode_text(content).split("\n"), 1):
        if line.strip():
            records.append(parse_line(line, number))
    return records


def _json(content: bytes) -> list[DataRecord]:
    try:
        value = _parsed(decode_text(content), "one of its objects")
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
        text = decode_text(content)
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
        reject_repeated(header, DUPLICATE_COLUMNS)
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
    reject_repeated(names, DUPLICATE_COLUMNS)
    return records


READERS: Mapping[str, Callable[[bytes], list[DataRecord]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


# --- files that are larger than memory ------------------------------------------------------------


GROUP_BYTES = 1 << 28
"""Bytes of the groups of records that are in memory at once; a larger group is alone."""

GROUP_COUNT = 64
"""Number of groups that are open at once."""

GroupReader = Callable[[int], DataRecord]
"""Returns a record of a group by its number in the group."""


class RecordGroup(Record):
    """Successive records of a file that are read together, such as a row group of Parquet."""

    count: int
    size: int
    """Bytes in memory; 0 if each record is read by itself."""


class StreamedFile(Record):
    """A file whose records have been checked but aren't in memory."""

    name: str
    """As messages name it."""
    digest: str
    """SHA-256 of its bytes."""
    groups: tuple[RecordGroup, ...]
    columns: tuple[str, ...]
    open_group: Callable[[int], GroupReader]
    """Reads a group by its number."""
    lacking: Mapping[str, int] = field(default_factory=dict[str, int])
    """The columns that a record lacks, with the number of its line."""

    @property
    def count(self) -> int:
        """Number of records."""
        return sum(group.count for group in self.groups)


class _OpenGroups:
    """The groups that were used last, which stay in memory."""

    def __init__(self, files: Sequence[StreamedFile]) -> None:
        self._all = [
            (own, file, number) for file in files for number, own in enumerate(file.groups)
        ]
        self._open: OrderedDict[int, GroupReader] = OrderedDict()

    def get(self, group: int) -> GroupReader:
        """Return a group of any file."""
        if group not in self._open:
            own, file, number = self._all[group]
            while self._open and self._is_full(own.size):
                self._open.popitem(last=False)
            self._open[group] = file.open_group(number)
        self._open.move_to_end(group)
        return self._open[group]

    def _is_full(self, more: int) -> bool:
        size = more + sum(self._all[group][0].size for group in self._open)
        return size > GROUP_BYTES or len(self._open) >= GROUP_COUNT


class StreamedRecords(Sequence[DataRecord]):
    """The records of files, each read when it is used."""

    def __init__(
        self, files: Sequence[StreamedFile], names: Mapping[str, str] | None = None
    ) -> None:
        """Store how records are read.

        Args:
            names: Column → the name that it gets.
        """
        self.files, self._names = files, names or {}
        self._ends = list(accumulate(own.count for own in self.groups))
        self._open = _OpenGroups(files)

    @property
    def groups(self) -> list[RecordGroup]:
        """The groups of all files."""
        return [group for file in self.files for group in file.groups]

    def renamed(self, names: Mapping[str, str]) -> StreamedRecords:
        """Return the same records with other names of columns."""
        return StreamedRecords(self.files, names)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> DataRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[DataRecord]: ...
    def __getitem__(self, index: int | slice) -> DataRecord | Sequence[DataRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        group = bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        record = self._open.get(group)(index - first)
        return {self._names.get(name, name): value for name, value in record.items()}


def find_lacking(files: Sequence[StreamedFile]) -> dict[str, str]:
    """Return the columns that a record lacks, with its place: "line 3", "`b.jsonl`, line 3"."""
    several = len(files) > 1
    found: dict[str, str] = {}
    for file in (each for each in files if each.count):
        for name in dict.fromkeys(name for each in files for name in each.columns):
            if name in file.lacking:
                where = f"line {file.lacking[name]}"
                found.setdefault(name, f"`{file.name}`, {where}" if several else where)
            elif name not in file.columns:
                found.setdefault(name, f"`{file.name}`")
    return found


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


def _open_json_lines(file: Path, name: str) -> StreamedFile:
    """Check each line. Raises OSError, MalformedData."""
    digest, begins, columns, place = sha256(), array("q"), _SeenColumns(), 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            digest.update(line)
            if line.strip():
                try:
                    text = decode_text(line)
                except MalformedData as error:
                    raise MalformedData(f"line {number}: {error.reason}", error.hint) from None
                columns.add(parse_line(text, number), number)
                begins.append(place)
            place += len(line)

    def read(index: int) -> DataRecord:
        with file.open("rb") as lines:
            lines.seek(begins[index])
            return parse_line(decode_text(lines.readline()), index + 1)

    groups = (RecordGroup(len(begins), 0),)
    names = tuple(columns.names)
    return StreamedFile(name, digest.hexdigest(), groups, names, lambda _: read, columns.lacking)


def _open_parquet(file: Path, name: str) -> StreamedFile:
    """Open a file of row groups. Raises OSError, MalformedData."""
    parquet = import_parquet("parquet")
    try:
        with parquet.ParquetFile(str(file)) as opened:
            metadata, columns = opened.metadata, cast("list[str]", opened.schema_arrow.names)
            every = [metadata.row_group(each) for each in range(metadata.num_row_groups)]
            groups = [RecordGroup(int(own.num_rows), int(own.total_byte_size)) for own in every]
    except OSError:
        raise
    except Exception as error:  # pyarrow has its own tree of exceptions
        raise MalformedData(f"pyarrow: {error}", "write the file again") from None
    reject_repeated(columns, DUPLICATE_COLUMNS)

    def open_group(number: int) -> GroupReader:
        with parquet.ParquetFile(str(file)) as opened:
            return _read_row(opened.read_row_group(number))

    return StreamedFile(name, _compute_digest(file), tuple(groups), tuple(columns), open_group)


def _open_arrow(file: Path, name: str) -> StreamedFile:
    """Open a file that is mapped into memory, as `datasets` saves it. Raises OSError,
    MalformedData."""
    import_parquet("arrow")
    table = map_arrow(file)
    columns = cast("list[str]", table.schema.names)
    reject_repeated(columns, DUPLICATE_COLUMNS)

    def open_group(_: int) -> GroupReader:
        batches = map_arrow(file).to_batches()
        ends = list(accumulate(int(each.num_rows) for each in batches))

        def read(index: int) -> DataRecord:
            number = bisect_right(ends, index)
            return _read_row(batches[number])(index - (ends[number - 1] if number else 0))

        return read

    groups = (RecordGroup(int(table.num_rows), 0),)
    return StreamedFile(name, _compute_digest(file), groups, tuple(columns), open_group)


def map_arrow(file: Path) -> Any:
    """Return the table of an Arrow file or stream, whose values stay on the disk.

    Raises OSError, MalformedData.
    """
    arrow = cast("Any", import_module("pyarrow"))
    try:
        try:
            reader = arrow.ipc.open_stream(arrow.memory_map(str(file)))
        except arrow.ArrowInvalid:  # a file with an index at its end
            reader = arrow.ipc.open_file(arrow.memory_map(str(file)))
        return reader.read_all()
    except arrow.ArrowException as error:
        raise MalformedData(f"pyarrow: {error}", "save the data set again") from None


def _read_row(rows: Any) -> GroupReader:
    """Return a reader of a table or a batch of pyarrow."""
    return lambda index: cast("DataRecord", rows.slice(index, 1).to_pylist()[0])


def _compute_digest(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


STREAMED_READERS: Mapping[str, Callable[[Path, str], StreamedFile]] = {
    ".jsonl": _open_json_lines,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
}
"""By suffix. `.arrow` is a file of a data set on the local disk."""
