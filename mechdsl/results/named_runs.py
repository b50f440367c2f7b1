"""Runs of a store, by what people call them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean
from mechdsl.diagnostics.raised import MechdslError
from mechdsl.results.archive import ArchiveProblem, OtherVersion, unpack
from mechdsl.results.export import is_export, read_export
from mechdsl.results.results import Results
from mechdsl.store.index import NAME
from mechdsl.store.place import OFF, VARIABLE, store_folder
from mechdsl.store.runs import StoredRun
from mechdsl.store.store import Store, StoreProblem

LAST = "last"
"""The latest finished run."""
SUFFIX = ".mech"
LISTED = 5
"""Runs that a message names."""
_NAMES = (
    "a run is its id or the beginning of one, `last`, a `.mech` file (its latest finished run), or "
    "a folder that `--out` has made"
)


def refuse(reason: str, hint: str) -> NoReturn:
    """MechdslError (E0208)."""
    raise MechdslError([BadCommandLine(reason=reason, hint=hint)])


def folder_of(text: str | None, named: Path | None = None) -> Path:
    """The store that a run called so is in: the one that is named, or beside the `.mech` file, or
    in the working folder. Raises MechdslError where stores are switched off."""
    file = Path(text) if text is not None and text.endswith(SUFFIX) else Path("any" + SUFFIX)
    found = store_folder(file, named)
    if found is None:
        reason = f"there is no store: `{VARIABLE}` is `{OFF}`"
        refuse(reason, "name one with `--store DIR`, `store=` in Python")
    return found


def has_store(folder: Path) -> bool:
    """Whether a store is there; opening one that isn't would make it."""
    return (folder / NAME).is_file()


def open_store(folder: Path) -> Store:
    """A store that is there. Raises MechdslError (E0208) where it isn't or can't be read."""
    if not has_store(folder):
        hint = "`mechdsl run FILE` makes one beside the file; `--store DIR` names another"
        refuse(f"there is no store `{folder}`", hint)
    try:
        return Store(folder)
    except (StoreProblem, OSError) as error:
        raise store_refused(folder, error) from error


def store_refused(folder: Path, error: Exception) -> MechdslError:
    """E0208 for what a store says."""
    strerror = error.strerror if isinstance(error, OSError) else None
    said = (strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
    hint = "name another with `--store DIR`; what it holds can be computed again"
    reason = f"the store `{folder}` can't be used: {said}"
    return MechdslError([BadCommandLine(reason=reason, hint=hint)])


def find_run(store: Store, text: str) -> StoredRun:
    """The run of a store that a text names: an id, the beginning of just one, `last`, or a `.mech`
    file, which is its latest finished run. Raises MechdslError (E0208) where it is none or several.
    """
    runs = runs_of(store)
    finished = [run for run in runs if run.state == "finished"]
    if text == LAST:
        if not finished:
            refuse(f"no run in `{store.folder}` is finished", "`mechdsl runs` lists all of them")
        return finished[0]
    if text.endswith(SUFFIX):
        return _run_of_file(store, finished, Path(text))
    begun = [run for run in runs if run.id.startswith(text)] if text else []
    exact = [run for run in begun if run.id == text]
    if exact or len(begun) == 1:
        return (exact or begun)[0]
    if begun:
        hint = f"write more of it: {_listed(begun)}"
        refuse(f"`{text}` is the beginning of {len(begun)} runs", hint)
    near = did_you_mean(text, [run.id for run in runs], "")
    hint = near or f"{_NAMES}; `mechdsl runs` lists them"
    refuse(f"there is no run `{text}` in `{store.folder}`", hint)


def _run_of_file(store: Store, finished: Sequence[StoredRun], file: Path) -> StoredRun:
    """A store may have been moved with its files, or copied: then the path is another one, and the
    name decides, if it is that of one file only."""
    path = os.path.realpath(file)
    same = [run for run in finished if path_of(run) == path]
    if same:
        return same[0]
    called = [run for run in finished if Path(path_of(run) or "").name == file.name]
    if len({path_of(run) for run in called}) == 1:
        return called[0]
    if called:
        hint = f"give the id of the one that is meant: {_listed(called)}"
        refuse(f"the store has runs of several files called `{file.name}`, none of this path", hint)
    others = [str(run.about.get("file", "")) for run in finished]
    hint = did_you_mean(str(file), others, "`mechdsl runs` lists what there is")
    refuse(f"no finished run of `{file}` is in `{store.folder}`", hint)


def path_of(run: StoredRun) -> str | None:
    """The whole path of the file that was run, links followed; None of a text."""
    path = run.about.get("path")
    return path if isinstance(path, str) else None


def _listed(runs: Sequence[StoredRun]) -> str:
    more = f" and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
    return ", ".join(f"`{run.id}`" for run in runs[:LISTED]) + more


def names_export(text: str) -> bool:
    """Whether it is a folder that `--out` or `export` has made; one called `last` is `./last`."""
    return text not in ("", LAST) and is_export(Path(text))


def export_in(folder: Path, file: str) -> Path:
    """The export of a file in a folder that `--out` has made, or the only one; the folder itself
    where it is an export or holds no such one."""
    if not folder.is_dir() or is_export(folder):
        return folder
    inside = [each for each in folder.iterdir() if is_export(each)]
    own = [each for each in inside if file.endswith(SUFFIX) and each.name == Path(file).stem]
    return (own or (inside if len(inside) == 1 else [folder]))[0]


def results_of(text: str, store: Path | None = None) -> Results:
    """The results that a text names: a folder that `--out` or `export` has made, or a run of a
    store as `find_run` finds it.

    store: its folder; None: that of the `.mech` file, or of the working folder.
    Raises MechdslError (E0208) where there is none, and where it can't be read.
    """
    folder = Path(text)
    if names_export(text):
        try:
            return read_export(folder)
        except ArchiveProblem as error:
            hint = "export the run again, or run its file again with `--out`"
            refuse(f"the folder `{folder}` can't be read: {error}", hint)
    if text not in ("", LAST) and folder.is_dir():
        inside = sorted(f"`{each}`" for each in folder.iterdir() if is_export(each))
        hint = f"did you mean {' or '.join(inside[:LISTED])}?" if inside else _NAMES
        refuse(f"the folder `{folder}` holds no run", hint)
    with open_store(folder_of(text, store)) as opened:
        return stored_results(opened, find_run(opened, text))


def stored_results(store: Store, run: StoredRun) -> Results:
    """The results of a run. Raises MechdslError (E0208) where there are none, or none that this
    version can read."""
    content = content_of(store, run)
    try:
        return unpack(content)
    except ArchiveProblem as error:
        raise unreadable(run, error) from error


def content_of(store: Store, run: StoredRun) -> dict[str, bytes]:
    """The files of a run's archive. Raises MechdslError (E0208) where there are none."""
    if run.state != "finished":
        said = "is still running" if run.state == "running" else "was not finished"
        hint = "the command that began it goes on from where it stopped"
        refuse(f"run `{run.id}` {said}: it has no results", hint)
    try:
        return store.content(run)
    except (StoreProblem, OSError) as error:
        raise unreadable(run, error) from error


def unreadable(run: StoredRun, error: Exception) -> MechdslError:
    """E0208 for results that are torn, or those of another version."""
    if isinstance(error, OtherVersion):
        hint = "`mechdsl runs show RUN --format json` prints its document; run its file again"
    else:
        hint = "run its file again: what the store still has isn't computed again"
    said = f"the results of run `{run.id}` can't be read: {error}"
    return MechdslError([BadCommandLine(reason=said, hint=hint)])


def runs_of(store: Store) -> list[StoredRun]:
    """All of them, the newest first. Raises MechdslError (E0208)."""
    try:
        return store.runs()
    except (StoreProblem, OSError, ValueError) as error:
        raise store_refused(store.folder, error) from error
