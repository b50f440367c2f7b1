"""Rows from CSV, JSON, JSONL and Parquet files, and from datasets of the Hugging Face hub.

Records of files that are larger than memory are read when they are used.
"""

from __future__ import annotations

import csv
import io
import json
import re
from array import array
from bisect import bisect_right
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property, lru_cache
from hashlib import sha256
from importlib import import_module
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any, cast, overload

from mechdsl.base import limits
from mechdsl.base.files import RELATIVE_PATH_HINT, compute_digest, find_snapshot, load_json
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import DataFormat, TooManyValues, UnreadableData
from mechdsl.program.paths import HF_DATASET_PATH, ROWS_PATH, WILDCARD, path_to_read, paths_to_read
from mechdsl.prompts.values import DataRecord, RowValue, content_key
from mechdsl.syntax import ast

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
    except Exception as error:  # pyarrow raises exceptions of several types
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
            (group, file, number) for file in files for number, group in enumerate(file.groups)
        ]
        self._open: OrderedDict[int, GroupReader] = OrderedDict()

    def get(self, group: int) -> GroupReader:
        """Return a group of any file."""
        if group not in self._open:
            record_group, file, number = self._all[group]
            while self._open and self._is_full(record_group.size):
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
        self._ends = list(accumulate(group.count for group in self.groups))
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
    reasons: dict[str, str] = {}
    for file in (streamed_file for streamed_file in files if streamed_file.count):
        for name in dict.fromkeys(
            name for streamed_file in files for name in streamed_file.columns
        ):
            if name in file.lacking:
                where = f"line {file.lacking[name]}"
                reasons.setdefault(name, f"`{file.name}`, {where}" if several else where)
            elif name not in file.columns:
                reasons.setdefault(name, f"`{file.name}`")
    return reasons


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
    except Exception as error:  # pyarrow raises exceptions of several types
        raise MalformedData(f"pyarrow: {error}", "write the file again") from None
    reject_repeated(columns, DUPLICATE_COLUMNS)

    def open_group(number: int) -> GroupReader:
        with parquet.ParquetFile(str(file)) as opened:
            return _read_row(opened.read_row_group(number))

    return StreamedFile(name, compute_digest(file), tuple(groups), tuple(columns), open_group)


def _open_arrow(file: Path, name: str) -> StreamedFile:
    """Open a file that is mapped into memory, as `datasets` saves it. Raises OSError,
    MalformedData."""
    import_parquet("arrow")
    table = map_arrow(file)
    columns = cast("list[str]", table.schema.names)
    reject_repeated(columns, DUPLICATE_COLUMNS)

    def open_group(_: int) -> GroupReader:
        batches = map_arrow(file).to_batches()
        ends = list(accumulate(int(batch.num_rows) for batch in batches))

        def read(index: int) -> DataRecord:
            number = bisect_right(ends, index)
            return _read_row(batches[number])(index - (ends[number - 1] if number else 0))

        return read

    groups = (RecordGroup(int(table.num_rows), 0),)
    return StreamedFile(name, compute_digest(file), groups, tuple(columns), open_group)


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


STREAMED_READERS: Mapping[str, Callable[[Path, str], StreamedFile]] = {
    ".jsonl": _open_json_lines,
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
}
"""By suffix. `.arrow` is a file of a data set on the local disk."""


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


class FileOfRecords(Record):
    """One of the files that records are from."""

    digest: str
    """SHA-256 of its bytes."""
    count: int
    """Number of its records."""


class DataFile(Record):
    """The records of one or several files, and a digest of their bytes."""

    records: Sequence[DataRecord]
    columns: tuple[str, ...]
    files: tuple[FileOfRecords, ...]
    """In the order of their records."""
    digest: str
    """SHA-256 of the bytes of one file; of several files, of their digests."""
    lacking: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of streamed rows, the columns that a record lacks, with the place of the record."""

    @cached_property
    def by_content(self) -> RecordOrder:
        """The order in which records are drawn."""
        return RecordOrder(self.records)

    @cached_property
    def sorted(self) -> tuple[DataRecord, ...]:
        """The records in the order of `by_content`."""
        return tuple(self.records[number] for number in self.by_content.order)

    @cached_property
    def ends(self) -> list[int]:
        """The number of the last record of each file, plus 1."""
        return list(accumulate(file.count for file in self.files))

    def digest_of(self, record: int) -> str:
        """Return the digest of the file of a record."""
        return self.files[bisect_right(self.ends, record)].digest


PATTERN_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Suffixes of files that a path with `*` may match. Their values have types; in tables of text, the
type of a value depends on its whole column."""


def read_data_file(
    path: str, span: Span, *, streamed: bool = False
) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read a data file, or all files that match a path with `*`, in the order of their names.

    The path is relative to the `.mech` file. Codes: E0504, E0505, E0506, E0532, E0535.

    Args:
        streamed: Whether records are checked but not kept, and read again when they are used.
    """
    files, problems = paths_to_read(ROWS_PATH, path, span)
    if problems:
        return None, problems
    several = WILDCARD in path
    if "**" in path:
        reason, hint = "`**` isn't supported", "write one `*` for each folder: `text/*/*.jsonl`"
        return None, [UnreadableData(span=span, path=path, reason=reason, hint=hint)]
    if not files:
        hint = f"{RELATIVE_PATH_HINT}; `*` is a part of one name"
        reason = "no file matches"
        return None, [UnreadableData(span=span, path=path, reason=reason, hint=hint)]
    known = [each for each in STREAMED_READERS if each in READERS] if streamed else READERS
    known = [each for each in known if not several or each in PATTERN_SUFFIXES]
    names = [file.name if several else path for file in files]
    for file, name in zip(files, names, strict=True):
        if file.suffix.lower() not in known:
            what = "files of streamed rows" if streamed else "files of a pattern"
            reason = f"{what if streamed or several else 'files'} end in {', '.join(known)}"
            hint = "convert it to one of these" + (", or remove `streamed`" if streamed else "")
            return None, [DataFormat(span=span, path=name, reason=reason, hint=hint)]
    return _read_files(files, names, path, span, streamed=streamed)


def _read_files(
    files: Sequence[Path], names: Sequence[str], path: str, span: Span, *, streamed: bool
) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read files whose types are known.

    Args:
        names: As messages name them.
        path: As written.
    """
    opened: list[StreamedFile] = []
    read: list[DataFile] = []
    for file, name in zip(files, names, strict=True):
        try:
            if streamed:
                opened.append(STREAMED_READERS[file.suffix.lower()](file, name))
            else:
                content = file.read_bytes()
                parse = _parse_once if len(content) <= CACHED_BYTES else _parse
                read.append(parse(file.suffix.lower(), content))
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "there is no such file" if missing else str(error.strerror or error)
            return None, [UnreadableData(span=span, path=name, reason=reason, hint=_hint(file))]
        except MalformedData as error:
            return None, [DataFormat(span=span, path=name, reason=error.reason, hint=error.hint)]
    data_file = _join_streamed(opened) if streamed else _join_records(read)
    if not data_file.records:
        return None, [DataFormat(span=span, path=path, reason="it has no records", hint="add some")]
    return data_file, []


def _of_one_file(records: Sequence[DataRecord], content: bytes) -> DataFile:
    """Return the records of a file with this content."""
    columns = dict.fromkeys(name for record in records for name in record)
    digest = sha256(content).hexdigest()
    files = (FileOfRecords(digest, len(records)),)
    return DataFile(tuple(records), tuple(columns), files, digest)


def _parse(suffix: str, content: bytes) -> DataFile:
    """Read one file. Raises MalformedData."""
    return _of_one_file(READERS[suffix](content), content)


CACHED_BYTES = 2**20
"""Maximum size of a data file whose records blocks of prompts share."""

_parse_once = lru_cache(maxsize=16)(_parse)
"""`_parse`, once for all blocks that read a file: they also share the order of its records."""


def _join_records(read: Sequence[DataFile]) -> DataFile:
    """Return the records of files as those of one."""
    if len(read) == 1:
        return read[0]
    records = tuple(record for data_file in read for record in data_file.records)
    columns = dict.fromkeys(name for data_file in read for name in data_file.columns)
    files = tuple(file for data_file in read for file in data_file.files)
    return DataFile(records, tuple(columns), files, _join_digests(files))


def _join_streamed(opened: Sequence[StreamedFile]) -> DataFile:
    """Return the records of files that stay on the disk."""
    columns = dict.fromkeys(name for file in opened for name in file.columns)
    files = tuple(FileOfRecords(file.digest, file.count) for file in opened)
    records = StreamedRecords(opened)
    return DataFile(records, tuple(columns), files, _join_digests(files), find_lacking(opened))


def _join_digests(files: Sequence[FileOfRecords]) -> str:
    if len(files) == 1:
        return files[0].digest
    return sha256(b"".join(bytes.fromhex(file.digest) for file in files)).hexdigest()


def _hint(file: Path) -> str:
    folder = file.parent
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        names = []
    return did_you_mean(file.name, names, RELATIVE_PATH_HINT)


DATASET_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of data files; if a folder has several types, the first one is read."""

_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Splits that files without a split in their names don't belong to."""


class DatasetReference(Record):
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


def read_dataset(
    call: ast.Call, *, streamed: bool = False
) -> tuple[DataFile | None, list[Diagnostic]]:
    """Read the records of one split. Codes: E0504, E0505, E0506, E0532, E0535.

    Args:
        streamed: As of `read_data_file`.
    """
    named = parse_dataset(call)
    if named is None:
        return None, []
    span = call.span
    try:
        files = _files(named, span)
        if streamed:
            return _open_dataset(files, named, span)
        read: list[DataFile] = []
        count = 0
        for file, data in _contents(named, files, span):
            read.append(_of_one_file(_records(file, data), data))
            count += len(read[-1].records)
            if count > limits.COMBINATIONS:
                raise _Refused(_too_many(named, span, f"{count:,} records", limits.COMBINATIONS))
        if not count:
            raise MalformedData("it has no records", "name another split")
    except _Refused as refused:
        return None, refused.diagnostics
    except MalformedData as error:
        bad = DataFormat(span=span, path=named.path, reason=error.reason, hint=error.hint)
        return None, [bad]
    return _join_records(read), []


def _open_dataset(
    files: Sequence[Path], named: DatasetReference, span: Span
) -> tuple[DataFile | None, list[Diagnostic]]:
    """Open the files of a split, which stay on the disk. Raises MalformedData."""
    other = next((file for file in files if file.suffix not in STREAMED_READERS), None)
    if other is not None:
        known = ", ".join(STREAMED_READERS)
        reason = f"files of streamed rows end in {known}, but it has `{other.name}`"
        raise MalformedData(reason, "remove `streamed`, or save the data set as Parquet")
    names = [f"{named.path}/{file.name}" for file in files]
    return _read_files(files, names, named.path, span, streamed=True)


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
    files = _saved(folder, named) if (folder / "state.json").is_file() else None
    files = _of_folder(folder, named) if files is None else files
    for file in files:
        _, problems = path_to_read(HF_DATASET_PATH, str(file.absolute()), span)
        if problems:
            raise _Refused(*problems)
    return files


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _about(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise MalformedData(f"`{file.name}` can't be read", "save the data set again")
    return cast("dict[str, Any]", document)


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
    paths = [folder / name for name in names]
    if not paths or not all(file.is_file() for file in paths):
        raise MalformedData("files that `state.json` names are missing", "save the data set again")
    return paths


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

    paths = of(named.split)
    others = [split for split in _SPLITS if of(split)]
    if not paths and named.split == "train" and not others:
        paths = every
    if not paths:
        listed = f"there are files of {name_list(others)}" if others else "it has no data files"
        raise MalformedData(f"it has no split `{named.split}`", listed)
    configs = {file.relative_to(folder).parts[:-1] for file in paths}
    if named.config is None and len(configs) > 1:
        shown = name_list(dict.fromkeys(parts[0] for parts in sorted(configs) if parts))
        raise MalformedData("it has several configs", f'write `config: "…"`: {shown}')
    return paths


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
    return cast("list[DataRecord]", map_arrow(file).to_pylist())
