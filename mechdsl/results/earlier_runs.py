"""The earlier run that a run is set against, found before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.results.against import Earlier
from mechdsl.results.experiment_result import FileResult
from mechdsl.results.export import is_export, stem_of
from mechdsl.results.named_runs import LAST, SUFFIX, refuse, results_of
from mechdsl.results.results import Results
from mechdsl.store.place import store_folder
from mechdsl.validate.check_file import Checked


@dataclass(frozen=True)
class ToRun:
    """A file that is about to run."""

    name: str
    """As results call it."""
    path: Path | None
    unasked: Collection[str] = ()
    """Experiments of it that aren't run, by `only`."""
    untrusted: bool = False


def to_run(checked: Checked) -> ToRun:
    """A file that was checked."""
    asked = {each.name for each in checked.reported}
    unasked = {each.name for each in checked.program.experiments} - asked
    source = checked.source
    return ToRun(source.name, source.path, unasked, checked.settings.untrusted)


def earlier_run(named: str, files: Sequence[ToRun], store: Path | None = None) -> Earlier:
    """The run that is named, for each of some files.

    named: what `results_of` takes. `last` is the last run of each file, and a folder may hold the
    exports of several. One file is set against whatever run is named, several against runs of files
    that are called like them. store: the one that is named beside it; else each file has its own.
    Raises MechdslError (E0208) where there is no such run, or it is one of none of these files.
    """
    folder = Path(named)
    if named == LAST and files and all(each.path is not None for each in files):
        found = {
            each.name: results_of(str(each.path), _store_of(each, named, store)).files[0]
            for each in files
        }
        return _earlier((named,), found, files)
    if folder.is_dir() and not is_export(folder):
        inside = {each.name: folder / stem_of(each.name) for each in files}
        there = {name: path for name, path in inside.items() if is_export(path)}
        if there:
            found = {name: results_of(str(path)).files[0] for name, path in there.items()}
            return _earlier((named,), found, files)
    _near(folder)
    own = store
    if files and not folder.is_dir() and not named.endswith(SUFFIX):
        own = _store_of(files[0], named, store)
    return given_results(results_of(named, own), files, named)


def given_results(results: Results, files: Sequence[ToRun], named: str = "") -> Earlier:
    """The same of results in memory."""
    before = results.files
    names = ", ".join(f"`{each.file}`" for each in before) or "no file"
    if len(files) == len(before) == 1:
        other = _called(files[0].name) != _called(before[0].file)
        label = f"{named or 'results'}, a run of {names}" if other or not named else named
        return _earlier((label,), {files[0].name: before[0]}, files)
    found = {each.name: match for each in files if (match := _of_name(each.name, before))}
    if files and not found:
        asked = ", ".join(f"`{each.name}`" for each in files)
        start = f"`--against {named}`: it is a run" if named else "`against`: these are results"
        refuse(f"{start} of {names}, which isn't run now", f"name a run of {asked}")
    return _earlier((named or f"results, a run of {names}",), found, files)


def _near(folder: Path) -> None:
    """E0208 for a folder that isn't there, beside some that are runs."""
    if folder.name == str(folder) or folder.suffix == SUFFIX or folder.exists():
        return
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    there = sorted(str(each) for each in beside if is_export(each))
    if there:
        hint = did_you_mean(str(folder), there, f"it has {name_list(there)}")
        refuse(f"there is no folder `{folder}`", hint)


def _store_of(file: ToRun, named: str, store: Path | None) -> Path | None:
    """Where a file's runs are; None: wherever `results_of` looks. An untrusted file may have come
    with a store of whoever made it."""
    found = store_folder(file.path, store, untrusted=file.untrusted)
    if found is None and file.untrusted:
        hint = "name a folder that `--out` has made, or a store with `--store DIR`"
        refuse(f"`--against {named}`: the store beside an untrusted file isn't read", hint)
    return found


def _earlier(
    runs: tuple[str, ...], found: Mapping[str, FileResult], files: Sequence[ToRun]
) -> Earlier:
    return Earlier(
        runs,
        {each.name: found.get(each.name) for each in files},
        {each.name: each.unasked for each in files},
    )


def _called(file: str) -> str:
    return PurePath(file).name


def _of_name(name: str, files: Sequence[FileResult]) -> FileResult | None:
    """The file of this path, else the one that is called so."""
    same = [each for each in files if each.file == name]
    called = [each for each in files if _called(each.file) == _called(name)]
    return next(iter([*same, *called]), None)
