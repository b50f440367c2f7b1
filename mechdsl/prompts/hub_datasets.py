"""`rows hf_dataset("…", split: "…")`: data sets of the Hugging Face hub that are on this disk.

What `save_to_disk` of the package `datasets` has written, a folder of files, or a snapshot in the
hub's cache. Nothing is downloaded, and the package isn't needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.hub_cache import cached
from mechdsl.base.names import name_list
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e05_data import DataFormat, DataNotRead, TooMany
from mechdsl.program.named_paths import HF_DATASET, path_to_read
from mechdsl.prompts.data_files import READERS, DataFile, Malformed, import_parquet
from mechdsl.prompts.values import Record
from mechdsl.syntax import ast

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
"""Of the files that are read; where a folder has several kinds, the first one."""
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""What files without a split in their names have none of."""


@dataclass(frozen=True)
class Named:
    """What `hf_dataset(…)` asks for."""

    path: str
    split: str
    config: str | None = None
    revision: str | None = None


def dataset_of(call: ast.Call) -> Named | None:
    """What a call asks for; None where its arguments are wrong, which has been said."""
    given: dict[str, str] = {}
    for argument in call.arguments:
        name, value = argument.name or "path", argument.value
        if not isinstance(value, ast.String) or name in given:
            return None
        given[name] = value.value
    if call.name != HF_DATASET.name or "[" in given.get("split", ""):
        return None
    if not {"path", "split"} <= given.keys() <= {"path", "split", "config", "revision"}:
        return None
    return Named(**given)


def read_dataset(call: ast.Call) -> tuple[DataFile | None, list[Diagnostic]]:
    """The records of one split. Codes: E0504, E0505, E0506, E0532, E0535."""
    named = dataset_of(call)
    if named is None:
        return None, []
    span = call.span
    try:
        files = _files(named, span)
        content = list(_contents(named, files, span))
        records: list[Record] = []
        for file, data in content:
            records += _records(file, data)
            if len(records) > limits.TRIED:
                raise _Refused(_too_many(named, span, f"{len(records):,} records", limits.TRIED))
        if not records:
            raise Malformed("it has no records", "name another split")
    except _Refused as refused:
        return None, refused.diagnostics
    except Malformed as error:
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


# --- which files ----------------------------------------------------------------------------------


def _files(named: Named, span: Span) -> list[Path]:
    """Those of the split, in the order of their names."""
    folder, problems = path_to_read(HF_DATASET, named.path, span)
    if folder is None:
        raise _Refused(*problems)
    if not folder.is_dir():
        snapshot = cached(named.path, named.revision, of="datasets")
        if snapshot is None:
            hint = (
                'save it on a machine with a network: `load_dataset("…").save_to_disk("folder")`, '
                "or `hf download --repo-type dataset NAME`"
            )
            reason = "there is no such folder, and the Hugging Face cache has no such data set"
            raise _Refused(DataNotRead(span=span, path=named.path, reason=reason, hint=hint))
        return _of_folder(snapshot, named)
    if (folder / "dataset_dict.json").is_file():
        splits = _about(folder / "dataset_dict.json").get("splits")
        known = [str(each) for each in cast("list[object]", splits)] if _is_list(splits) else []
        _known_split(named.split, known)
        folder = folder / named.split
    found = _saved(folder, named) if (folder / "state.json").is_file() else None
    found = _of_folder(folder, named) if found is None else found
    for file in found:
        _, problems = path_to_read(HF_DATASET, str(file.absolute()), span)
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
        raise Malformed(f"`{file.name}` is not understood", "save the data set again")
    return cast("dict[str, Any]", found)


def _known_split(split: str, known: Sequence[str]) -> None:
    if split in known:
        return
    hint = did_you_mean(split, known, f"it has {name_list(known)}" if known else "name another")
    raise Malformed(f"it has no split `{split}`", hint)


def _saved(folder: Path, named: Named) -> list[Path]:
    """What `save_to_disk` says that a data set consists of."""
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
        raise Malformed("files that `state.json` names are missing", "save the data set again")
    return found


def _of_folder(folder: Path, named: Named) -> list[Path]:
    """Files by their names: a split is a word of its own in it, or in the folder's."""
    every = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in SUFFIXES and file.name not in _ABOUT and file.is_file()
    ]
    if named.config is not None:
        every = [file for file in every if named.config in file.relative_to(folder).parts[:-1]]
        if not every:
            raise Malformed(f"it has no config `{named.config}`", "name one of its folders")
    suffix = next((each for each in SUFFIXES if any(f.suffix == each for f in every)), None)
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
        raise Malformed(f"it has no split `{named.split}`", listed)
    configs = {file.relative_to(folder).parts[:-1] for file in found}
    if named.config is None and len(configs) > 1:
        shown = name_list(dict.fromkeys(parts[0] for parts in sorted(configs) if parts))
        raise Malformed("it has several configs", f'write `config: "…"`: {shown}')
    return found


# --- what is in them ------------------------------------------------------------------------------


def _contents(named: Named, files: Sequence[Path], span: Span) -> Iterator[tuple[Path, bytes]]:
    try:
        size = sum(file.stat().st_size for file in files)
        if size > limits.DATA_SET:
            raise _Refused(_too_many(named, span, f"{size:,} bytes", limits.DATA_SET))
        for file in files:
            yield file, file.read_bytes()
    except OSError as error:
        reason, hint = str(error.strerror or error), "save the data set again"
        raise _Refused(DataNotRead(span=span, path=named.path, reason=reason, hint=hint)) from None


def _too_many(named: Named, span: Span, amount: str, most: int) -> Diagnostic:
    hint = "save a part of it: `data.select(range(10_000)).save_to_disk(…)`"
    return TooMany(span=span, what=f"`{named.path}`", amount=amount, most=most, hint=hint)


def _records(file: Path, content: bytes) -> list[Record]:
    if file.suffix != ".arrow":
        return READERS[file.suffix](content)
    import_parquet("arrow")
    arrow = cast("Any", import_module("pyarrow"))
    try:
        try:
            reader = arrow.ipc.open_stream(content)
        except arrow.ArrowInvalid:  # a file with an index at its end
            reader = arrow.ipc.open_file(content)
        return cast("list[Record]", reader.read_all().to_pylist())
    except arrow.ArrowException as error:
        raise Malformed(f"pyarrow: {error}", "save the data set again") from None
