"""Runs on disk: runs of a store, folders of exports, and the names that refer to them.

`StoredRun.about` contains the facts of a run besides its results. When a run begins: `file` (the
path as given), `path` (absolute, links resolved; null for a text), `settings` (option → value, for
the given options), `parameters`, `versions` and `hashes` (name → text). When it finishes: the
result of `about_results`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NoReturn, cast

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.base.text import count_noun, dump_json, name_list
from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.results.experiment_result import (
    MAX_REPR_ITEMS,
    EarlierRun,
    ExperimentResult,
    FileResult,
)
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
from mechdsl.store.files import INDEX_NAME, StoreProblem
from mechdsl.store.runs import StoredRun
from mechdsl.store.store import STORE_OFF, STORE_VARIABLE, Store, store_folder


def about_results(
    results: Results, *, computed: int, stored: int, seconds: float
) -> dict[str, Any]:
    """Return the facts that a finished run adds.

    Args:
        computed: Number of rows that were run.
        stored: Number of rows with values from the store.
        seconds: Duration of this and earlier attempts.
    """
    outcomes = [outcome for result in results for outcome in result.outcomes]
    lost = [
        outcome
        for file in results.files
        for experiment in file.lost
        for outcome in experiment.outcomes
    ]
    return {
        "experiments": len(results),
        "lost": sum(len(file.lost) for file in results.files),
        "held": sum(bool(outcome.holds) for outcome in outcomes),
        "expectations": len(outcomes) + len(lost),
        "computed": computed,
        "stored": stored,
        "seconds": round(seconds, 3),
    }


@dataclass(frozen=True)
class RunFacts:
    """The listed facts of a run; None if the store doesn't have them."""

    id: str
    state: str
    began: datetime
    """Start in the reader's time zone."""
    file: str
    seconds: float | None
    experiments: int | None
    held: int | None
    expectations: int | None
    computed: int | None
    stored: int | None
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    versions: Mapping[str, str]
    hashes: Mapping[str, str]
    size: int
    """Size of the results in bytes."""

    @property
    def verdict(self) -> str:
        """`2 of 3 hold`; empty without expectations."""
        return f"{self.held} of {self.expectations}" if self.expectations else ""

    @property
    def rows(self) -> str:
        """`96 computed, 32 from the store`."""
        if self.computed is None or self.stored is None:
            return ""
        return f"{count_noun(self.computed, 'row')} computed, {self.stored:,} from the store"

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object: times as ISO 8601, unknown facts as null."""
        return {**vars(self), "began": self.began.isoformat(timespec="seconds")}


def read_facts(run: StoredRun) -> RunFacts:
    """Read the facts of a run from an untrusted store; values of a wrong type are dropped."""
    about: Mapping[str, Any] = run.about

    def number(name: str) -> int | None:
        found = about.get(name)
        return found if type(found) is int else None

    def texts(name: str) -> dict[str, str]:
        found = about.get(name)
        if not isinstance(found, dict):
            return {}
        return {str(k): str(v) for k, v in cast("dict[Any, Any]", found).items() if v is not None}

    seconds, file = about.get("seconds"), about.get("file")
    if type(seconds) not in (int, float) and run.ended is not None:
        seconds = run.ended - run.began
    return RunFacts(
        id=run.id,
        state=run.state,
        began=datetime.fromtimestamp(run.began).astimezone(),
        file=file if type(file) is str else "",
        seconds=seconds if type(seconds) in (int, float) else None,
        experiments=number("experiments"),
        held=number("held"),
        expectations=number("expectations"),
        computed=number("computed"),
        stored=number("stored"),
        settings=texts("settings"),
        parameters=texts("parameters"),
        versions=texts("versions"),
        hashes=texts("hashes"),
        size=run.size,
    )


def add_hashes(facts: RunFacts, results: Results) -> RunFacts:
    """Add the hashes of the results' inputs, each once."""
    hashes: dict[str, str] = {}
    for result in results:
        for name, value in result.hashes.items():
            if value and value not in hashes.values():
                hashes[name if name not in hashes else f"{name} of {result.name}"] = value
    return replace(facts, hashes={**hashes, **facts.hashes})


TABLES_FILE = "tables.txt"

TABLES_WIDTH = 100
"""Width of the tables in columns."""

EXPORT_FILES = (RESULT_FILE, ARRAYS_FILE, SOURCE_FILE, DOCUMENT_FILE, TABLES_FILE)

LINES_SUFFIX = ".jsonl"

LINES_SCHEMA_VERSION = 2
"""Version of the lines; raised when their meaning changes."""

STALE_SECONDS = 60.0
"""Seconds after which a folder of a terminated process is considered abandoned."""

MAX_DOCUMENT_BYTES = 500_000_000
"""Maximum size in bytes of a document that is searched for file names."""


def export_results(results: Results, folder: Path, text: str) -> Path:
    """Write results of a single file into a new folder in `folder`, named after the file.

    The folder contains the files of `pack_results`, the tables, and `NAME.jsonl` of each
    experiment: a line on its axes and measures, one per unpatched run and one per cell, with the
    values of every prompt. It replaces an earlier export of the same name when it is complete;
    other files in that export are retained.

    Args:
        text: Text of the `.mech` file.

    Returns:
        The new folder.

    Raises:
        OSError: If it can't be written.
        ArchiveError: If results contain values that can't be stored.
    """
    return export_archive(pack_results(results, text), results, folder)


def export_archive(content: Mapping[str, bytes], results: Results, folder: Path) -> Path:
    """Write results that are already packed, as `export_results` does."""
    target = (folder / export_stem(results.files[0].file)).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    aside = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}.new")
    _remove_stale_folders(target)
    aside.mkdir()
    try:
        for name in (RESULT_FILE, ARRAYS_FILE, SOURCE_FILE):
            _write_synced(aside / name, [content[name]])
        for name, shown in (
            (DOCUMENT_FILE, results.to_json() + "\n"),
            (TABLES_FILE, results.to_text(TABLES_WIDTH)),
        ):
            _write_synced(aside / name, [shown.encode("utf-8", "surrogatepass")])
        for experiment in results:
            lines = (dump_json(line) + "\n" for line in experiment_lines(experiment))
            name = experiment.name + LINES_SUFFIX
            _write_synced(aside / name, (line.encode("utf-8", "surrogatepass") for line in lines))
        _sync_folder(aside)
        _replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder / target.name


def export_stem(file: str) -> str:
    """Return the folder name for a file's results; `text` for `<text>`.

    Raises:
        ArchiveError: If no folder can have the name.
    """
    stem = Path(file[1:-1] if file.startswith("<") and file.endswith(">") else file).stem
    if stem in ("", ".", ".."):
        raise ArchiveError(f"`{file}` is not the name of a file")
    return stem


def read_export(folder: Path) -> Results:
    """Read the results in a folder of `export_results`; ArchiveError if it contains none."""
    content: dict[str, bytes] = {}
    for name in (RESULT_FILE, ARRAYS_FILE, SOURCE_FILE):
        try:
            content[name] = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise ArchiveError(f"`{name}` is missing") from error
        except OSError as error:
            said = (error.strerror or str(error)).lower()
            raise ArchiveError(f"`{name}`: {said}") from error
    return unpack_results(content)


def is_export(folder: Path) -> bool:
    """Whether a folder looks like one of `export_results`."""
    return (folder / RESULT_FILE).is_file()


# --- files ----------------------------------------------------------------------------------------


def _write_synced(path: Path, parts: Any) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renamed files in a folder durable, if the system supports it for folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace_folder(made: Path, target: Path) -> None:
    """Replace an earlier folder by a complete one. Files in the earlier folder that aren't part of
    an export are the user's and are moved to the new one."""
    if not target.exists():
        made.replace(target)
        _sync_folder(target.parent)
        return
    before = target.with_name(made.name.removesuffix("new") + "before")
    ours = _exported_names(target)
    target.replace(before)
    try:
        made.replace(target)
    except OSError:
        before.replace(target)
        raise
    _sync_folder(target.parent)
    _remove_replaced(before, target, ours)


def _remove_replaced(before: Path, target: Path, ours: set[str]) -> None:
    """Remove a replaced folder if its other files are in the new one."""
    for path in before.iterdir():
        if path.name not in ours and not (target / path.name).exists():
            path.replace(target / path.name)
    for name in ours:
        (before / name).unlink(missing_ok=True)
    with suppress(OSError):  # remaining files have the names of export files
        before.rmdir()


def _remove_stale_folders(target: Path) -> None:
    """Finish what processes killed between two renames have begun."""
    named = re.compile(rf"\.{re.escape(target.name)}-([0-9]+)-[0-9a-f]{{8}}\.(new|before)")
    for path in sorted(target.parent.iterdir()):
        match = named.fullmatch(path.name)
        if match is None:
            continue
        with suppress(OSError):
            if not _is_stale(path, int(match[1])):
                continue
            if match[2] == "new":
                shutil.rmtree(path)
            elif target.exists():
                _remove_replaced(path, target, _exported_names(path))
            else:
                path.replace(target)


def _is_stale(folder: Path, process: int) -> bool:
    """Whether the process that created a folder has ended, or had this process's number. A process
    of another machine can't be checked, so the folder must also be unchanged for a while."""
    if sys.platform == "win32":  # the check would end the process
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
    return time.time() - max(max(fact.st_mtime, fact.st_ctime) for fact in facts) >= STALE_SECONDS


def _exported_names(folder: Path) -> set[str]:
    """Return the files of an earlier export."""
    names = {*EXPORT_FILES, "state.json"}  # written by older versions
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        path = folder / DOCUMENT_FILE
        if path.stat().st_size <= MAX_DOCUMENT_BYTES:
            (file,) = json.loads(path.read_bytes())["files"]
            names |= {str(each["name"]) + LINES_SUFFIX for each in file["experiments"]}
    return names


# --- lines ----------------------------------------------------------------------------------------


def experiment_lines(result: ExperimentResult) -> Iterator[dict[str, Any]]:
    """Yield the lines of an experiment: its measures, its unpatched runs, its cells.

    `rows` are ids of prompts, and `values` has a list per measure, one value per row; null for
    missing values. Several runs under one label are averaged, and a cell lists the rows that are
    part of it.
    """
    ids = list(range(result.prompts)) if result.row_ids is None else list(result.row_ids)
    yield {
        "schema": LINES_SCHEMA_VERSION,
        "experiment": result.name,
        "axes": list(result.axes),
        "measures": [
            {
                "label": m.label,
                "metric": m.metric,
                "effect": m.effect,
                "at": m.at,
                **({"estimator": m.estimator} if m.estimator else {}),
            }
            for m in result.measures
        ],
    }
    nothing = np.full(result.prompts, np.nan)
    for run, own in result.runs.items():
        values = [_json_numbers(own.get(data.label, nothing)) for data in result.measures]
        yield {"run": run, "rows": ids, "values": values}
    for number, cell in enumerate(result.cells):
        each = [data.patched[number] for data in result.measures]
        rows = np.flatnonzero(~np.all(np.isnan(each), axis=0)) if each else np.arange(0)
        yield {
            "cell": number,
            "coords": dict(cell.coords),
            "rows": [ids[row] for row in rows.tolist()],
            "values": [_json_numbers(values[rows]) for values in each],
        }


def _json_numbers(values: Floats) -> list[float | None]:
    known = np.isfinite(values).tolist()
    return [value if good else None for value, good in zip(values.tolist(), known, strict=True)]


LAST_RUN = "last"
"""Name of the latest finished run."""

SOURCE_SUFFIX = ".mech"

MAX_LISTED_RUNS = 5
"""Maximum number of runs that a message lists."""

_NAMES = (
    "a run is its id or the beginning of one, `last`, a `.mech` file (its latest finished run), or "
    "a folder written by `--out`"
)


def raise_run_error(reason: str, hint: str) -> NoReturn:
    """Raise MechdslError (E0208)."""
    raise MechdslError([BadCommandLine(reason=reason, hint=hint)])


def find_store_folder(text: str | None, named: Path | None = None) -> Path:
    """Return the store for a run's name: the given one, the one next to the `.mech` file, or the
    one in the working directory. Raises MechdslError if stores are disabled."""
    file = (
        Path(text)
        if text is not None and text.endswith(SOURCE_SUFFIX)
        else Path("any" + SOURCE_SUFFIX)
    )
    path = store_folder(file, named)
    if path is None:
        reason = f"there is no store: `{STORE_VARIABLE}` is `{STORE_OFF}`"
        raise_run_error(reason, "name one with `--store DIR`, `store=` in Python")
    return path


def has_store(folder: Path) -> bool:
    """Whether a store exists; opening a missing one would create it."""
    return (folder / INDEX_NAME).is_file()


def open_store(folder: Path) -> Store:
    """Open an existing store. Raises MechdslError (E0208) if it is missing or unreadable."""
    if not has_store(folder):
        hint = "`mechdsl run FILE` creates one next to the file; `--store DIR` names another"
        raise_run_error(f"there is no store `{folder}`", hint)
    try:
        return Store(folder)
    except (StoreProblem, OSError) as error:
        raise store_error(folder, error) from error


def store_error(folder: Path, error: Exception) -> MechdslError:
    """Convert an error of a store to E0208."""
    strerror = error.strerror if isinstance(error, OSError) else None
    said = (strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
    hint = "name another with `--store DIR`; its contents can be recomputed"
    reason = f"the store `{folder}` can't be used: {said}"
    return MechdslError([BadCommandLine(reason=reason, hint=hint)])


def find_run(store: Store, text: str) -> StoredRun:
    """Find the run of a store by its id, a unique prefix of one, `last`, or a `.mech` file, which
    means its latest finished run. Raises MechdslError (E0208) if no run, or several, match."""
    runs = fetch_runs(store)
    finished = [run for run in runs if run.state == "finished"]
    if text == LAST_RUN:
        if not finished:
            raise_run_error(
                f"no run in `{store.folder}` is finished", "`mechdsl runs` lists all of them"
            )
        return finished[0]
    if text.endswith(SOURCE_SUFFIX):
        return _run_of_file(store, finished, Path(text))
    begun = [run for run in runs if run.id.startswith(text)] if text else []
    exact = [run for run in begun if run.id == text]
    if exact or len(begun) == 1:
        return (exact or begun)[0]
    if begun:
        hint = f"write more of the id: {_run_list(begun)}"
        raise_run_error(f"`{text}` is the beginning of {len(begun)} runs", hint)
    near = did_you_mean(text, [run.id for run in runs], "")
    hint = near or f"{_NAMES}; `mechdsl runs` lists them"
    raise_run_error(f"there is no run `{text}` in `{store.folder}`", hint)


def _run_of_file(store: Store, finished: Sequence[StoredRun], file: Path) -> StoredRun:
    """Find the run of a file. If the store was moved or copied with its files, paths differ; then
    the file's name decides if it is unique."""
    path = os.path.realpath(file)
    same = [run for run in finished if source_path(run) == path]
    if same:
        return same[0]
    called = [run for run in finished if Path(source_path(run) or "").name == file.name]
    if len({source_path(run) for run in called}) == 1:
        return called[0]
    if called:
        hint = f"give the id of one of them: {_run_list(called)}"
        raise_run_error(
            f"the store has runs of several files called `{file.name}`, none with this path", hint
        )
    others = [str(run.about.get("file", "")) for run in finished]
    hint = did_you_mean(str(file), others, "`mechdsl runs` lists the runs")
    raise_run_error(f"no finished run of `{file}` is in `{store.folder}`", hint)


def source_path(run: StoredRun) -> str | None:
    """Return the absolute path of the run's file, links resolved; None for a text."""
    path = run.about.get("path")
    return path if isinstance(path, str) else None


def _run_list(runs: Sequence[StoredRun]) -> str:
    more = f" and {len(runs) - MAX_LISTED_RUNS} more" if len(runs) > MAX_LISTED_RUNS else ""
    return ", ".join(f"`{run.id}`" for run in runs[:MAX_LISTED_RUNS]) + more


def is_export_name(text: str) -> bool:
    """Whether a text names a folder of `--out` or `export`; a folder `last` must be `./last`."""
    return text not in ("", LAST_RUN) and is_export(Path(text))


def find_export(folder: Path, file: str) -> Path:
    """Return the export of a file in a folder of `--out`, or the only export; the folder itself if
    it is an export or contains none."""
    if not folder.is_dir() or is_export(folder):
        return folder
    inside = [path for path in folder.iterdir() if is_export(path)]
    paths = [
        path for path in inside if file.endswith(SOURCE_SUFFIX) and path.name == Path(file).stem
    ]
    return (paths or (inside if len(inside) == 1 else [folder]))[0]


def load_results(text: str, store: Path | None = None) -> Results:
    """Load the results of a folder of `--out` or `export`, or of a run of a store (see `find_run`).

    Args:
        store: Folder of the store; None: next to the `.mech` file, or in the working directory.

    Raises:
        MechdslError: E0208 if the results are missing or unreadable.
    """
    folder = Path(text)
    if is_export_name(text):
        try:
            return read_export(folder)
        except ArchiveError as error:
            hint = "export the run again, or run its file again with `--out`"
            raise_run_error(f"the folder `{folder}` can't be read: {error}", hint)
    if text not in ("", LAST_RUN) and folder.is_dir():
        inside = sorted(f"`{path}`" for path in folder.iterdir() if is_export(path))
        hint = f"did you mean {' or '.join(inside[:MAX_LISTED_RUNS])}?" if inside else _NAMES
        raise_run_error(f"the folder `{folder}` contains no run", hint)
    with open_store(find_store_folder(text, store)) as opened:
        return load_stored_results(opened, find_run(opened, text))


def load_stored_results(store: Store, run: StoredRun) -> Results:
    """Load the results of a run. Raises MechdslError (E0208) if it has none, or none that this
    version can read."""
    content = load_archive(store, run)
    try:
        return unpack_results(content)
    except ArchiveError as error:
        raise unreadable_run_error(run, error) from error


def load_archive(store: Store, run: StoredRun) -> dict[str, bytes]:
    """Load the files of a run's archive. Raises MechdslError (E0208) if there are none."""
    if run.state != "finished":
        said = "is still running" if run.state == "running" else "was not finished"
        hint = "run the same command again; it resumes where it stopped"
        raise_run_error(f"run `{run.id}` {said}: it has no results", hint)
    try:
        return store.content(run)
    except (StoreProblem, OSError) as error:
        raise unreadable_run_error(run, error) from error


def unreadable_run_error(run: StoredRun, error: Exception) -> MechdslError:
    """Return E0208 for results that are damaged or of a different version."""
    if isinstance(error, ArchiveVersionError):
        hint = "`mechdsl runs show RUN --format json` prints its document; run its file again"
    else:
        hint = "run its file again: results still in the store aren't recomputed"
    said = f"the results of run `{run.id}` can't be read: {error}"
    return MechdslError([BadCommandLine(reason=said, hint=hint)])


def fetch_runs(store: Store) -> list[StoredRun]:
    """Return all runs, the newest first. Raises MechdslError (E0208)."""
    try:
        return store.runs()
    except (StoreProblem, OSError, ValueError) as error:
        raise store_error(store.folder, error) from error


MAX_REPR_RUNS = 4 * MAX_REPR_ITEMS
"""Maximum number of runs in a `repr`."""


class Run:
    """A run in a store."""

    def __init__(self, folder: Path, stored: StoredRun) -> None:
        self._folder = folder
        self._stored = stored

    @property
    def id(self) -> str:
        """Id of the run, as in `mechdsl runs`: `20261121-154210-3fa2`."""
        return self._stored.id

    @property
    def state(self) -> str:
        """State when the runs were listed: `finished`, `running`, or `unfinished`, which the same
        command resumes."""
        return self._stored.state

    @property
    def file(self) -> str:
        """Path of the file that was run, as given."""
        return self.facts.file

    @property
    def began(self) -> datetime:
        """Start in the local time zone."""
        return self.facts.began

    @property
    def about(self) -> Mapping[str, Any]:
        """Facts in the store: settings, versions, hashes, number of computed rows."""
        return self._stored.about

    @cached_property
    def facts(self) -> RunFacts:
        """Typed facts, as listed by `mechdsl runs`."""
        return read_facts(self._stored)

    @cached_property
    def results(self) -> Results:
        """The results, read at first access.

        Raises:
            MechdslError: E0208 if the run isn't finished or can't be read.
        """
        with open_store(self._folder) as store:
            return load_stored_results(store, self._stored)

    def export(self, folder: str | Path) -> Path:
        """Write the run into a folder in `folder`, named after its file, as `--out` does.

        Returns:
            The new folder.

        Raises:
            MechdslError: E0208 if the run has no results or they can't be read.
            OSError: If they can't be written.
        """
        results = self.results
        with open_store(self._folder) as store:
            content = load_archive(store, self._stored)
        return export_archive(content, results, Path(folder))

    def remove(self) -> None:
        """Remove the run from the store; the values that it computed remain for other runs.

        Raises:
            MechdslError: E0208 if the run is still running, or the store is read-only.
        """
        with open_store(self._folder) as store:
            try:
                store.remove(self._stored)
            except (StoreProblem, OSError) as error:
                raise store_error(self._folder, error) from error

    def __repr__(self) -> str:
        return f"<Run {run_line(self.facts)}>"


class Runs(list[Run]):
    """The runs of `mechdsl.runs`: a list, the newest first."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        super().__init__(runs)

    def __repr__(self) -> str:
        if not self:
            return "<Runs: none>"
        lines = [run_line(run.facts) for run in self[:MAX_REPR_RUNS]]
        more = len(self) - MAX_REPR_RUNS
        return "<Runs " + "\n  ".join([*lines, f"and {more} more"] if more > 0 else lines) + ">"


def run_line(facts: RunFacts) -> str:
    """Format a run in one line."""
    held = f"{facts.verdict} expectations hold" if facts.verdict else ""
    state = "" if facts.state == "finished" else facts.state
    began = f"{facts.began:%Y-%m-%d %H:%M}"
    return ", ".join(filter(None, (f"{facts.id}: {facts.file}", began, state, held)))


def load_runs(folder: Path) -> Runs:
    """Load the runs of a store. Raises MechdslError (E0208) if it is missing or unreadable."""
    with open_store(folder) as store:
        return Runs(Run(folder, run) for run in fetch_runs(store))


@dataclass(frozen=True)
class FileToRun:
    """A file that is about to run."""

    name: str
    """Name of the file in results."""
    path: Path | None
    unasked: Collection[str] = ()
    """Experiments that `only` excludes."""
    untrusted: bool = False


def prepare_file(checked: CheckedFile) -> FileToRun:
    """Convert a checked file."""
    asked = {experiment.name for experiment in checked.reported}
    unasked = {experiment.name for experiment in checked.program.experiments} - asked
    source = checked.source
    return FileToRun(source.name, source.path, unasked, checked.settings.untrusted)


def find_earlier_run(
    named: str, files: Sequence[FileToRun], store: Path | None = None
) -> EarlierRun:
    """Find the named earlier run for each of some files.

    One file is compared with any named run, several files with runs of files of the same name.

    Args:
        named: A name as for `load_results`. `last` is the last run of each file, and a folder may
            contain the exports of several.
        store: The given store; otherwise each file has its own.

    Raises:
        MechdslError: E0208 if no such run exists, or it is of none of these files.
    """
    folder = Path(named)
    if named == LAST_RUN and files and all(file.path is not None for file in files):
        results = {
            file.name: load_results(str(file.path), _store_of(file, named, store)).files[0]
            for file in files
        }
        return _build_earlier_run((named,), results, files)
    if folder.is_dir() and not is_export(folder):
        inside = {file.name: folder / export_stem(file.name) for file in files}
        there = {name: path for name, path in inside.items() if is_export(path)}
        if there:
            results = {name: load_results(str(path)).files[0] for name, path in there.items()}
            return _build_earlier_run((named,), results, files)
    _check_folder(folder)
    own = store
    if files and not folder.is_dir() and not named.endswith(SOURCE_SUFFIX):
        own = _store_of(files[0], named, store)
    return earlier_run_from_results(load_results(named, own), files, named)


def earlier_run_from_results(
    results: Results, files: Sequence[FileToRun], named: str = ""
) -> EarlierRun:
    """Return the earlier run of each file from results in memory."""
    before = results.files
    names = ", ".join(f"`{result.file}`" for result in before) or "no file"
    if len(files) == len(before) == 1:
        other = _run_name(files[0].name) != _run_name(before[0].file)
        label = f"{named or 'results'}, a run of {names}" if other or not named else named
        return _build_earlier_run((label,), {files[0].name: before[0]}, files)
    file_results = {
        file.name: match for file in files if (match := _file_of_name(file.name, before))
    }
    if files and not file_results:
        asked = ", ".join(f"`{file.name}`" for file in files)
        start = f"`--against {named}`: it is a run" if named else "`against`: these are results"
        raise_run_error(f"{start} of {names}, which isn't run now", f"name a run of {asked}")
    return _build_earlier_run((named or f"results, a run of {names}",), file_results, files)


def _check_folder(folder: Path) -> None:
    """Raise E0208 for a missing folder if its parent contains exports."""
    if folder.name == str(folder) or folder.suffix == SOURCE_SUFFIX or folder.exists():
        return
    siblings = folder.parent.iterdir() if folder.parent.is_dir() else ()
    there = sorted(str(path) for path in siblings if is_export(path))
    if there:
        hint = did_you_mean(str(folder), there, f"it has {name_list(there)}")
        raise_run_error(f"there is no folder `{folder}`", hint)


def _store_of(file: FileToRun, named: str, store: Path | None) -> Path | None:
    """Return the folder of a file's runs; None for the default of `load_results`. An untrusted file
    may come with an untrusted store."""
    path = store_folder(file.path, store, untrusted=file.untrusted)
    if path is None and file.untrusted:
        hint = "name a folder written by `--out`, or a store with `--store DIR`"
        raise_run_error(
            f"`--against {named}`: the store next to an untrusted file isn't read", hint
        )
    return path


def _build_earlier_run(
    runs: tuple[str, ...], results: Mapping[str, FileResult], files: Sequence[FileToRun]
) -> EarlierRun:
    return EarlierRun(
        runs,
        {file.name: results.get(file.name) for file in files},
        {file.name: file.unasked for file in files},
    )


def _run_name(file: str) -> str:
    return PurePath(file).name


def _file_of_name(name: str, files: Sequence[FileResult]) -> FileResult | None:
    """Return the file with this path, or else with this name."""
    same = [file for file in files if file.file == name]
    called = [file for file in files if _run_name(file.file) == _run_name(name)]
    return next(iter([*same, *called]), None)
