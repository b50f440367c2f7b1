"""A run as a folder for people and other programs: its archive, and every prompt's values."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.visible import json_text
from mechdsl.results.archive import (
    ARRAYS,
    DOCUMENT,
    RESULT,
    TEXT,
    ArchiveProblem,
    pack,
    unpack,
)
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.results import Results

TABLES = "tables.txt"
WIDTH = 100
"""Its columns."""
FILES = (RESULT, ARRAYS, TEXT, DOCUMENT, TABLES)
LINES = ".jsonl"
SCHEMA = 2
"""Of the lines; raised when they mean something else."""
AT_REST = 60.0
"""Seconds after which a folder of a process that is no more is taken for left."""
MOST_DOCUMENT = 500_000_000
"""Bytes of a document that is looked into for names of files."""


def export(results: Results, folder: Path, text: str) -> Path:
    """Write results of a single file into a folder in `folder`, which is called like the file.

    text: of the `.mech` file. Returns the new folder. It holds what `pack` gives, the tables, and
    `NAME.jsonl` of each experiment: a line on its axes and measures, one per unpatched run and one
    per cell, with the values of every prompt. An earlier export of the same name gives way when the
    new one is whole; other files in it stay. Raises OSError where it can't be written,
    ArchiveProblem where results hold what can't be kept.
    """
    return export_content(pack(results, text), results, folder)


def export_content(content: Mapping[str, bytes], results: Results, folder: Path) -> Path:
    """The same of results that are packed already."""
    target = (folder / stem_of(results.files[0].file)).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    aside = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}.new")
    _tidy(target)
    aside.mkdir()
    try:
        for name in (RESULT, ARRAYS, TEXT):
            _write(aside / name, [content[name]])
        for name, shown in ((DOCUMENT, results.to_json() + "\n"), (TABLES, results.to_text(WIDTH))):
            _write(aside / name, [shown.encode("utf-8", "surrogatepass")])
        for experiment in results:
            lines = (json_text(line) + "\n" for line in lines_of(experiment))
            name = experiment.name + LINES
            _write(aside / name, (each.encode("utf-8", "surrogatepass") for each in lines))
        _sync(aside)
        _take_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / target.name


def stem_of(file: str) -> str:
    """What the folder of a file's results is called; `text` for `<text>`. ArchiveProblem where no
    folder can be called so."""
    stem = Path(file[1:-1] if file.startswith("<") and file.endswith(">") else file).stem
    if stem in ("", ".", ".."):
        raise ArchiveProblem(f"`{file}` is not the name of a file")
    return stem


def read_export(folder: Path) -> Results:
    """The results in a folder that `export` has written; ArchiveProblem where it holds none."""
    content: dict[str, bytes] = {}
    for name in (RESULT, ARRAYS, TEXT):
        try:
            content[name] = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise ArchiveProblem(f"`{name}` is missing") from error
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise ArchiveProblem(f"`{name}`: {said}") from error
    return unpack(content)


def is_export(folder: Path) -> bool:
    """Whether a folder looks like one that `export` has written."""
    return (folder / RESULT).is_file()


# --- files ----------------------------------------------------------------------------------------


def _write(path: Path, parts: Any) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """What was renamed in it is durable, where the system can say so of folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take_place(made: Path, target: Path) -> None:
    """Put a whole folder in the place of an earlier one. Files in that which aren't of an export
    are somebody's own, and go into the new one."""
    if not target.exists():
        made.replace(target)
        _sync(target.parent)
        return
    before = target.with_name(made.name.removesuffix("new") + "before")
    ours = _names_in(target)
    target.replace(before)
    try:
        made.replace(target)
    except OSError:
        before.replace(target)
        raise
    _sync(target.parent)
    _empty(before, target, ours)


def _empty(before: Path, target: Path, ours: set[str]) -> None:
    """Remove a folder that has given way, when other files of it are in the new one."""
    for path in before.iterdir():
        if path.name not in ours and not (target / path.name).exists():
            path.replace(target / path.name)
    for name in ours:
        (before / name).unlink(missing_ok=True)
    with suppress(OSError):  # what is left has the name of a file of ours
        before.rmdir()


def _tidy(target: Path) -> None:
    """End what processes that were killed between two renames have begun here."""
    named = re.compile(rf"\.{re.escape(target.name)}-([0-9]+)-[0-9a-f]{{8}}\.(new|before)")
    for path in sorted(target.parent.iterdir()):
        found = named.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            if not _is_left(path, int(found[1])):
                continue
            if found[2] == "new":
                shutil.rmtree(path)
            elif target.exists():
                _empty(path, target, _names_in(path))
            else:
                path.replace(target)


def _is_left(folder: Path, process: int) -> bool:
    """Whether the process that made a folder is no more, or had the number of this one. One of
    another machine can't be asked, so the folder must have been at rest for a while too."""
    if sys.platform == "win32":  # where asking would end it
        return False
    if process != os.getpid():
        try:
            os.kill(process, 0)
            return False
        except ProcessLookupError:
            pass
        except (OSError, OverflowError):
            return False
    facts = [path.stat() for path in (folder, *folder.iterdir())]
    return time.time() - max(max(each.st_mtime, each.st_ctime) for each in facts) >= AT_REST


def _names_in(folder: Path) -> set[str]:
    """The files of an earlier export."""
    names = {*FILES, "state.json"}  # which older versions wrote
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        path = folder / DOCUMENT
        if path.stat().st_size <= MOST_DOCUMENT:
            (file,) = json.loads(path.read_bytes())["files"]
            names |= {str(each["name"]) + LINES for each in file["experiments"]}
    return names


# --- lines ----------------------------------------------------------------------------------------


def lines_of(found: ExperimentResult) -> Iterator[dict[str, Any]]:
    """The lines of an experiment: what it measures, its unpatched runs, its cells.

    `rows` are ids of prompts, and `values` has a list per measure, one value per row; null where
    there is none. Runs under one label are averaged, and a cell lists the rows that are part of it.
    """
    ids = list(range(found.prompts)) if found.row_ids is None else list(found.row_ids)
    yield {
        "schema": SCHEMA,
        "experiment": found.name,
        "axes": list(found.axes),
        "measures": [
            {
                "label": m.label,
                "metric": m.metric,
                "effect": m.effect,
                "at": m.at,
                **({"estimator": m.estimator} if m.estimator else {}),
            }
            for m in found.measures
        ],
    }
    nothing = np.full(found.prompts, np.nan)
    for run, own in found.runs.items():
        values = [_numbers(own.get(data.label, nothing)) for data in found.measures]
        yield {"run": run, "rows": ids, "values": values}
    for number, cell in enumerate(found.cells):
        each = [data.patched[number] for data in found.measures]
        rows = np.flatnonzero(~np.all(np.isnan(each), axis=0)) if each else np.arange(0)
        yield {
            "cell": number,
            "coords": dict(cell.coords),
            "rows": [ids[row] for row in rows.tolist()],
            "values": [_numbers(values[rows]) for values in each],
        }


def _numbers(values: Floats) -> list[float | None]:
    known = np.isfinite(values).tolist()
    return [value if good else None for value, good in zip(values.tolist(), known, strict=True)]
