"""Rows from CSV, JSON, JSONL and Parquet files, and from datasets of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.files import RELATIVE_PATH_HINT, find_snapshot
from mechdsl.base.records import Record
from mechdsl.base.source import Span
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import DataFormat, TooManyValues, UnreadableData
from mechdsl.program.paths import (
    HF_DATASET_PATH,
    ROWS_PATH,
    WILDCARD,
    path_to_read,
    paths_to_read,
)
from mechdsl.prompts.record_files import (
    READERS,
    STREAMED_READERS,
    MalformedData,
    StreamedFile,
    StreamedRecords,
    find_lacking,
    import_parquet,
    map_arrow,
)
from mechdsl.prompts.values import DataRecord, content_key
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
    found = _join_streamed(opened) if streamed else _join_records(read)
    if not found.records:
        return None, [DataFormat(span=span, path=path, reason="it has no records", hint="add some")]
    return found, []


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
    records = tuple(record for own in read for record in own.records)
    columns = dict.fromkeys(name for own in read for name in own.columns)
    files = tuple(file for own in read for file in own.files)
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
    return cast("list[DataRecord]", map_arrow(file).to_pylist())
