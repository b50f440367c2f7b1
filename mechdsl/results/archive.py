"""Results as files of bytes, from which they can be had again without running anything.

`archive.json` holds them by the types of their fields, `arrays.safetensors` their arrays,
`file.mech` the text that was run; `results.json` is their document, for programs that read no
archives and for versions of this one that don't read this one's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from mechdsl.base.source import Reach, Source
from mechdsl.diagnostics.raised import Diagnostics
from mechdsl.results.archive_checks import check_file
from mechdsl.results.experiment_result import FileResult
from mechdsl.results.kept_diagnostics import read_diagnostic, write_diagnostic
from mechdsl.results.results import Results
from mechdsl.results.typed_json import Kept, as_list, as_object, form_of
from mechdsl.statistics.measure_data import Interval

ARCHIVE = 1
"""Raised when what is kept means something else, or is kept in another way. A field that is new
takes its default in older archives."""

RESULT, ARRAYS, TEXT = "archive.json", "arrays.safetensors", "file.mech"
DOCUMENT = "results.json"
MOST_JSON = 500_000_000
MOST_ARRAYS = 16_000_000_000
"""Bytes that are read of an archive."""

_FILES = form_of(tuple[FileResult, ...])
_VERSIONS = form_of(Mapping[str, str])
_PATHS = form_of(tuple[Path, ...])
_INTERVALS = form_of(Mapping[str, Mapping[str, Interval]])


class ArchiveProblem(ValueError):
    """An archive can't be read; the text says why, in lower case."""


class OtherVersion(ArchiveProblem):
    """It was written by a version of the package that keeps results in another way."""


def pack(results: Results, text: str) -> dict[str, bytes]:
    """Results of a single file as an archive: name of a file → its bytes.

    text: of the `.mech` file. Raises ArchiveProblem where they hold what can't be kept.
    """
    (file,) = results.files
    kept = Kept(sources=[_own_source(file.file, text)])
    try:
        found = {
            "files": _FILES.write(results.files, kept),
            "versions": _VERSIONS.write(results.versions, kept),
            "diagnostics": [write_diagnostic(each, kept) for each in results.diagnostics],
            "written": _PATHS.write(results.written, kept),
            "profile": results.profile,
            "intervals": [
                None if each.settings is None else _INTERVALS.write(each.run_intervals, kept)
                for each in file.experiments
            ],
        }
    except ValueError as error:
        raise ArchiveProblem(str(error)) from error
    whole = {
        "archive": ARCHIVE,
        "mechdsl": results.versions.get("mechdsl", "unknown"),
        "sources": [_source_parts(each, own=n == 0) for n, each in enumerate(kept.sources)],
        **found,
    }
    return {
        RESULT: json.dumps(whole, allow_nan=False, separators=(",", ":")).encode(),
        ARRAYS: save({name: _in_order(array) for name, array in kept.arrays.items()}),
        TEXT: text.encode("utf-8", "surrogatepass"),
        DOCUMENT: (results.to_json(indent=None) + "\n").encode("utf-8", "surrogatepass"),
    }


def unpack(content: Mapping[str, bytes], source: Source | None = None) -> Results:
    """The results of an archive, equal to what was packed in all that can be seen.

    source: the file as it stands now; where its text is that of the archive, spans are in it.
    Raises ArchiveProblem for whatever is wrong with the archive, which anybody may have written.
    """
    for name, most in ((RESULT, MOST_JSON), (ARRAYS, MOST_ARRAYS), (TEXT, MOST_JSON)):
        if name not in content:
            raise ArchiveProblem(f"`{name}` is missing")
        if len(content[name]) > most:
            raise ArchiveProblem(f"`{name}` has more than {most:,} bytes")
    try:
        return _unpacked(content, source)
    except ArchiveProblem:
        raise
    except Exception as error:  # of json, numpy, safetensors, pydantic: whatever it may hold
        said = str(error) or type(error).__name__
        raise ArchiveProblem(" ".join(said.split())[:200]) from error


def _unpacked(content: Mapping[str, bytes], source: Source | None) -> Results:
    whole = as_object(json.loads(content[RESULT]))
    if whole.get("archive") != ARCHIVE:
        by = whole.get("mechdsl")
        raise OtherVersion(f"it is an archive of another version (mechdsl {by!s:.40})")
    text = content[TEXT].decode("utf-8", "surrogatepass")
    kept = Kept(load(content[ARRAYS]), [])
    for number, parts in enumerate(as_list(whole["sources"])):
        made = _source(as_object(parts), text if number == 0 else None)
        if source is not None and made.text == source.text and number == 0:
            made = source
        elif source is not None:
            made = Source(made.text, made.path, source.reach, made.origin)
        kept.sources.append(made)
    results = Results(
        _FILES.read(whole["files"], kept),
        _VERSIONS.read(whole["versions"], kept),
        Diagnostics(read_diagnostic(each, kept) for each in as_list(whole["diagnostics"])),
        _PATHS.read(whole["written"], kept),
        str(whole["profile"]),
    )
    (file,) = results.files
    if file.hash and file.hash != sha256(content[TEXT]).hexdigest():
        raise ArchiveProblem(f"`{TEXT}` is not the text that was run")
    check_file(file)
    _with_intervals(file, as_list(whole["intervals"]), kept)
    return results


def _with_intervals(file: FileResult, found: list[Any], kept: Kept) -> None:
    """Give experiments the intervals of their unpatched runs, which else are drawn anew."""
    for experiment, parts in zip(file.experiments, found, strict=True):
        if parts is None:
            continue
        intervals = _INTERVALS.read(parts, kept)
        categories = {data.label for data in experiment.measures if data.kind == "category"}
        asked = [(run, label) for run, own in experiment.runs.items() for label in own]
        asked = [pair for pair in asked if pair[1] not in categories]
        asked += [(run, "accuracy") for run in experiment.accuracy]
        if any(label not in intervals.get(run, {}) for run, label in asked):
            raise ArchiveProblem(f"intervals of `{experiment.name}` are missing")
        vars(experiment)["run_intervals"] = intervals  # as the property itself keeps them


def _in_order(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(array.shape)


def _own_source(name: str, text: str) -> Source:
    if name.startswith("<") and name.endswith(">"):
        return Source(text, origin=name[1:-1])
    return Source(text, Path(name))


def _source_parts(source: Source, *, own: bool) -> dict[str, Any]:
    path = None if source.path is None else str(source.path)
    return {"path": path, "origin": source.origin, "text": None if own else source.text}


def _source(parts: dict[str, Any], text: str | None) -> Source:
    """A text of the archive; its file's own is kept beside. What it names is neither read nor
    written: paths of an archive are another's."""
    path, origin = parts["path"], parts["origin"]
    text = parts["text"] if text is None else text
    if type(text) is not str or type(origin) is not str or type(path) not in (str, type(None)):
        raise ArchiveProblem("a text has a name and an origin")
    return Source(text, None if path is None else Path(cast("str", path)), Reach((), ()), origin)
