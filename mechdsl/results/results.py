"""Results of a run, in memory and in an archive that is safe to unpack.

In an archive, `archive.json` contains results by the types of their fields,
`arrays.safetensors` their arrays, and `file.mech` the text of the run. `results.json` is the
JSON document of the run, for programs that don't read archives and for other versions of mechdsl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from mechdsl.base import limits
from mechdsl.base.files import write_atomically
from mechdsl.base.text import AllowedFolders, Source, count_noun, dump_json, name_list
from mechdsl.base.version import __version__
from mechdsl.diagnostics.rendering import Diagnostics
from mechdsl.execute.run_record import SavedFile
from mechdsl.program.plugins import plugin_versions
from mechdsl.results.experiment_result import (
    HTML_RENDERER,
    JUNIT_RENDERER,
    MAX_REPR_ITEMS,
    REPR_WIDTH,
    ExpectationChange,
    ExperimentResult,
    FileResult,
    PlotKind,
    VerdictComparison,
    csv_text,
    data_frame,
    load_renderer,
)
from mechdsl.results.typed_json import (
    Attachments,
    as_list,
    as_object,
    build_codec,
    read_diagnostic,
    write_diagnostic,
)
from mechdsl.statistics.measurements import Interval, MeasureData
from mechdsl.vocab.metrics import EFFECTS
from mechdsl.vocab.reports import REPORTS

if TYPE_CHECKING:
    import altair
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class Results:
    """The results of `mechdsl.run`: `results["name"]` is an experiment; iterate for all of them."""

    files: tuple[FileResult, ...]
    """Results of each file: `file`, `hash`, `seed`, `sizes`, `experiments`, `lost` experiments,
    experiments that `fail_fast` left `not_run`, and `saved` files."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions of the packages that the numbers depend on, including `mechdsl`."""
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    """Warnings of the run, and reports that could not be written."""
    written: tuple[Path, ...] = ()
    """Files of reports (`report … to "x.png"`), in source order."""
    profile: str = ""
    """Estimated and measured work, with `profile=True`."""
    notes: tuple[str, ...] = ()
    """Notes on the store: that nothing was run, or why nothing is cached."""
    against: VerdictComparison | None = None
    """Changes since an earlier run, with `against=…`."""

    @property
    def experiments(self) -> tuple[ExperimentResult, ...]:
        """All experiments, in source order."""
        return tuple(experiment for file in self.files for experiment in file.experiments)

    @property
    def saved(self) -> tuple[SavedFile, ...]:
        """Files written by `save` lines, in source order."""
        return tuple(saved_file for file in self.files for saved_file in file.saved)

    @property
    def holds(self) -> bool:
        """Whether every expectation of every experiment was decided and holds."""
        lost = [experiment for file in self.files for experiment in file.lost]
        left = any(
            skipped_experiment.expects for file in self.files for skipped_experiment in file.not_run
        )
        if left or any(experiment.outcomes for experiment in lost):
            return False
        return all(experiment.holds for experiment in self.experiments)

    @property
    def regressions(self) -> tuple[ExpectationChange, ...]:
        """Results that held, or were computed, in the earlier run, but not in this one.

        Raises:
            ValueError: If the run wasn't compared with an earlier one.
        """
        if self.against is None:
            raise ValueError(
                "these results aren't compared with another run: `mechdsl.run(…, "
                "against=…)` compares them"
            )
        return self.against.regressions

    @property
    def complete(self) -> bool:
        """Whether every experiment and measure was computed and every expectation decided."""
        return all(file.complete for file in self.files)

    def __getitem__(self, name: str) -> ExperimentResult:
        """Return the experiment of this name (over several files, the first); KeyError if
        missing."""
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        known = name_list(experiment.name for experiment in self.experiments) or "none"
        raise KeyError(f"no experiment `{name}` in these results; there are: {known}")

    def __iter__(self) -> Iterator[ExperimentResult]:
        return iter(self.experiments)

    def __len__(self) -> int:
        return len(self.experiments)

    def records(self) -> list[dict[str, Any]]:
        """Return a flat record per cell and measure of every experiment, None for missing
        numbers."""
        return [
            {"file": file.file, **record}
            for file in self.files
            for experiment in file.experiments
            for record in experiment.records()
        ]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with one row per cell and measure of every experiment.

        Raises:
            ImportError: Without pandas, which the extra `mechdsl[frames]` installs.
        """
        return data_frame(self.records())

    def to_csv(self) -> str:
        """Return the CSV of `mechdsl run --format csv`: one line per cell and measure. An axis that
        an experiment lacks is empty."""
        return csv_text(self.records())

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `mechdsl run --format json`."""
        from mechdsl.results.document import results_document  # slow to import

        return results_document(self.files, self.versions, self.against).as_json()

    def to_json(self, path: str | Path | None = None, *, indent: int | None = 2) -> str:
        """Return the document as JSON text, and write it to `path` if given."""
        text = dump_json(self.to_dict(), indent)
        if path is not None:
            write_atomically(Path(path), text + "\n")
        return text

    def to_text(self, width: int = 100) -> str:
        """Return the output of the command line, `width` columns wide: tables, figures, verdicts
        and saved files."""
        texts = [experiment.to_text(width) for experiment in self.experiments]
        texts += [f"{saved_file.line}\n" for saved_file in self.saved]
        return "".join([*texts, "" if self.against is None else self.against.to_text(width)])

    def to_junit(self, path: str | Path | None = None) -> str:
        """Return the output of `mechdsl run --junit`: JUnit XML with a test per expectation. It is
        also written to `path` if given.

        Raises:
            OSError: If the file can't be written.
        """
        text: str = load_renderer(JUNIT_RENDERER)(self)
        if path is not None:
            write_atomically(Path(path), text)
        return text

    @overload
    def plot(
        self,
        kind: Literal["heatmap", "lines", "bars", "confusion"],
        axis: str | None = None,
        by: str | None = None,
        *,
        measure: str | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin: ...

    @overload
    def plot(
        self,
        kind: Literal["overlay"],
        *,
        measure: str | None = None,
        top: int | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin: ...

    def plot(
        self,
        kind: PlotKind,
        axis: str | None = None,
        by: str | None = None,
        *,
        measure: str | None = None,
        top: int | None = None,
        width: int | None = None,
    ) -> altair.TopLevelMixin:
        """Return a chart of the only experiment, as `ExperimentResult.plot` does.

        The arguments and the other exceptions are those of `ExperimentResult.plot`.

        Raises:
            ValueError: If there isn't exactly one experiment.
        """
        if len(self) == 1:
            draw: Callable[..., altair.TopLevelMixin] = self.experiments[0].plot
            return draw(kind, axis, by, measure=measure, top=top, width=width)
        if not self.experiments:
            raise ValueError("these results have no experiment to plot")
        known = ", ".join(
            f'results["{experiment.name}"].plot(…)' for experiment in self.experiments
        )
        raise ValueError(f"these results have {len(self)} experiments; plot one of them: {known}")

    def __repr__(self) -> str:
        count = count_noun(len(self), "experiment")
        asked = sum(len(result.outcomes) for result in self)
        held = sum(outcome.holds for result in self for outcome in result.outcomes)
        verdict = f", {held} of {asked} expectations hold" if asked else ""
        files = ", ".join(file.file for file in self.files)
        lines = [
            f"{files}: {count}{verdict}",
            *(e.summary for e in self.experiments[:MAX_REPR_ITEMS]),
        ]
        if len(self) > MAX_REPR_ITEMS:
            lines.append(f"and {len(self) - MAX_REPR_ITEMS} more")
        shown = [shorten(line, REPR_WIDTH, placeholder=" …") for line in lines]
        return "<Results " + "\n  ".join(shown) + ">"

    def _repr_html_(self) -> str:
        return "".join(load_renderer(HTML_RENDERER)(experiment) for experiment in self.experiments)


_FILE_NAME = re.compile(r"\w[^/\\\0]*")
"""Pattern of a valid file name without a folder."""

RESAMPLE_RANGE = range(100, 1_000_001)
"""Numbers of resamples that a file can request."""


def check_file_result(file: FileResult) -> None:
    """Check the consistency of a result; ValueError for an array whose shape doesn't match its
    cells and prompts, and for invalid references."""
    names = [result.name for result in file.experiments]
    if len({*names}) < len(names):
        raise ValueError("two experiments have the same name")
    for experiment in file.experiments:
        for right in _experiment_checks(experiment):
            if not right:
                raise ValueError(f"the parts of `{experiment.name:.100}` are inconsistent")


def _experiment_checks(result: ExperimentResult) -> Iterator[bool]:
    cells, prompts = len(result.cells), result.prompts
    yield _FILE_NAME.fullmatch(result.name) is not None
    yield cells <= limits.CELLS and prompts <= limits.ROWS
    yield all(cell.coords.keys() >= {*result.axes} for cell in result.cells)
    for data in result.measures:
        yield from _measure_checks(data, cells, prompts)
    yield len(result.statistics) in (0, len(result.measures))
    yield len(result.controls) in (0, len(result.measures))
    for verified_cells in result.verified:
        yield 0 <= verified_cells.measure < len(
            result.measures
        ) and 0 <= verified_cells.ranked <= len(verified_cells.cells)
        yield all(
            a.shape == verified_cells.cells.shape
            for a in (verified_cells.exact, verified_cells.low, verified_cells.high)
        )
        yield verified_cells.cells.ndim == 1 and len({*verified_cells.cells.tolist()}) == len(
            verified_cells.cells
        )
        yield {*verified_cells.cells.tolist()} <= {*range(cells)}
    for arrays in (*result.statistics, *(band for band in result.controls if band is not None)):
        yield all(array.shape == (cells,) for array in _array_fields(arrays))
    yield all(len(statistic.reasons) == cells for statistic in result.statistics)
    for own in result.runs.values():
        yield all(values.shape == (prompts,) for values in own.values())
    yield from _accuracy_checks(result)
    yield all(keys is None or len(keys) == prompts for keys in (result.row_ids, result.row_keys))
    yield result.strata is None or result.strata.shape == (prompts,)
    yield all(len(values) == prompts for values in result.row_values.values())
    yield from _overlay_checks(result)
    yield from _image_checks(result)
    yield from _reply_checks(result)
    if result.drawn is not None:
        yield len(result.drawn.values) == len(result.measures)
        yield all(v.ndim == 3 and v.shape[1:] == (cells, prompts) for v in result.drawn.values)
        yield result.drawn.counts.shape == (cells,)
    yield all(report.kind in REPORTS for report in result.reports)
    if result.settings is not None:
        yield result.settings.resamples in RESAMPLE_RANGE and 0 < result.settings.confidence < 100


def _measure_checks(data: MeasureData, cells: int, prompts: int) -> Iterator[bool]:
    yield data.effect in EFFECTS
    yield data.patched.shape == (cells, prompts)
    for array in (data.base, data.source, data.truth, data.rounding, data.seen):
        yield array is None or array.shape in ((1, prompts), (cells, prompts))
    yield data.inert.shape == (cells,)
    yield data.same is None or data.same.shape == (cells,)
    yield len(data.gaps) in (0, cells)


def _accuracy_checks(result: ExperimentResult) -> Iterator[bool]:
    for run, values in result.accuracy.items():
        yield values.ndim == 1 and len(values) <= limits.ROWS
        for other in (result.accuracy_rounding, result.accuracy_units):
            yield run not in other or other[run].shape == values.shape
        ids = result.accuracy_rows.get(run)
        yield (result.prompts if ids is None else len(ids)) == len(values)


def _overlay_checks(result: ExperimentResult) -> Iterator[bool]:
    yield len(result.texts) in (0, result.prompts)
    yield len(result.hits) in (0, len(result.cells))
    yield len(result.active) in (0, len(result.cells))
    lengths = [len(text) for text in result.texts]
    for hits in {id(each): each for each in result.hits}.values():
        yield len(hits) == len(lengths)
        yield all(
            0 <= place < length
            for numbers, length in zip(hits, lengths, strict=False)
            for place in numbers
        )


def _image_checks(result: ExperimentResult) -> Iterator[bool]:
    """Check that images are within the size limit and have the tokens of their prompt."""
    yield len(result.seen) in (0, result.prompts)
    for images, text in zip(result.seen, result.texts, strict=False):
        for image in images:
            shape = image.pixels.shape
            yield len(shape) == 3 and shape[2] == 3 and prod(shape) <= limits.IMAGE_PIXELS
            yield 0 < image.rows <= shape[0]
            yield 0 < image.cols <= shape[1]
            yield len(image.tokens) == image.rows * image.cols
            yield (
                0
                <= image.span[0]
                <= min(image.tokens)
                <= max(image.tokens)
                < image.span[1]
                <= len(text)
            )


def _reply_checks(result: ExperimentResult) -> Iterator[bool]:
    """Check that every reply has a prompt, and that every entry has at least one reply."""
    written = result.replies
    yield len(written.cells) in (0, len(result.cells))
    for texts in (*written.cells, *written.runs.values()):
        yield texts.keys() <= written.prompts.keys()
        yield all(texts.values())


def _array_fields(of: Any) -> Iterator[NDArray[Any]]:
    for each in fields(of):
        value = getattr(of, each.name)
        if isinstance(value, np.ndarray):
            yield value


ARCHIVE_VERSION = 2
"""Version of the archive format; raised when the meaning or form of a field changes. A new field
has its default in older archives."""

RESULT_FILE, ARRAYS_FILE, SOURCE_FILE = "archive.json", "arrays.safetensors", "file.mech"

DOCUMENT_FILE = "results.json"

MAX_JSON_BYTES = 500_000_000

MAX_ARRAY_BYTES = 16_000_000_000
"""Maximum number of bytes read from an archive."""

_FILES_CODEC = build_codec(tuple[FileResult, ...])

_VERSIONS_CODEC = build_codec(Mapping[str, str])

_PATHS_CODEC = build_codec(tuple[Path, ...])

_INTERVALS_CODEC = build_codec(Mapping[str, Mapping[str, Interval]])


class ArchiveError(ValueError):
    """An archive can't be read; the text gives the reason in lower case."""


class ArchiveVersionError(ArchiveError):
    """The archive was written by a version of mechdsl with a different format."""


def pack_results(results: Results, text: str) -> dict[str, bytes]:
    """Pack the results of a single file as an archive.

    Args:
        text: Text of the `.mech` file.

    Returns:
        File name → content.

    Raises:
        ArchiveError: If the results contain values that can't be stored.
    """
    (file,) = results.files
    kept = Attachments(sources=[_own_source(file.file, text)])
    try:
        parts = {
            "files": _FILES_CODEC.write(results.files, kept),
            "versions": _VERSIONS_CODEC.write(results.versions, kept),
            "diagnostics": [write_diagnostic(problem, kept) for problem in results.diagnostics],
            "written": _PATHS_CODEC.write(results.written, kept),
            "profile": results.profile,
            "intervals": [
                None
                if experiment.settings is None
                else _INTERVALS_CODEC.write(experiment.run_intervals, kept)
                for experiment in file.experiments
            ],
        }
    except ValueError as error:
        raise ArchiveError(str(error)) from error
    whole = {
        "archive": ARCHIVE_VERSION,
        "mechdsl": results.versions.get("mechdsl", "unknown"),
        "sources": [_source_parts(source, own=n == 0) for n, source in enumerate(kept.sources)],
        **parts,
    }
    arrays = {
        name: np.ascontiguousarray(array).reshape(array.shape)  # it gives numbers a dimension
        for name, array in kept.arrays.items()
    }
    return {
        RESULT_FILE: json.dumps(whole, allow_nan=False, separators=(",", ":")).encode(),
        ARRAYS_FILE: save(arrays),
        SOURCE_FILE: text.encode("utf-8", "surrogatepass"),
        DOCUMENT_FILE: (results.to_json(indent=None) + "\n").encode("utf-8", "surrogatepass"),
    }


def unpack_results(content: Mapping[str, bytes], source: Source | None = None) -> Results:
    """Restore the results of an archive, with all public data equal to the packed results.

    Args:
        source: The current file; spans refer to it if its text is the archive's.

    Raises:
        ArchiveError: For any error in the archive, which may be untrusted.
    """
    for name, most in (
        (RESULT_FILE, MAX_JSON_BYTES),
        (ARRAYS_FILE, MAX_ARRAY_BYTES),
        (SOURCE_FILE, MAX_JSON_BYTES),
    ):
        if name not in content:
            raise ArchiveError(f"`{name}` is missing")
        if len(content[name]) > most:
            raise ArchiveError(f"`{name}` has more than {most:,} bytes")
    try:
        return _unpack_content(content, source)
    except ArchiveError:
        raise
    except Exception as error:  # errors of json, numpy, safetensors, pydantic
        said = str(error) or type(error).__name__
        raise ArchiveError(" ".join(said.split())[:200]) from error


def _unpack_content(content: Mapping[str, bytes], source: Source | None) -> Results:
    whole = as_object(json.loads(content[RESULT_FILE]))
    if whole.get("archive") != ARCHIVE_VERSION:
        by = whole.get("mechdsl")
        raise ArchiveVersionError(f"it is an archive of a different version (mechdsl {by!s:.40})")
    text = content[SOURCE_FILE].decode("utf-8", "surrogatepass")
    kept = Attachments(load(content[ARRAYS_FILE]), [])
    for number, parts in enumerate(as_list(whole["sources"])):
        made = _read_source(as_object(parts), text if number == 0 else None)
        if source is not None and made.text == source.text and number == 0:
            made = source
        elif source is not None:
            made = Source(made.text, made.path, source.reach, made.origin)
        kept.sources.append(made)
    results = Results(
        _FILES_CODEC.read(whole["files"], kept),
        _VERSIONS_CODEC.read(whole["versions"], kept),
        Diagnostics(read_diagnostic(each, kept) for each in as_list(whole["diagnostics"])),
        _PATHS_CODEC.read(whole["written"], kept),
        str(whole["profile"]),
    )
    (file,) = results.files
    if file.hash and file.hash != sha256(content[SOURCE_FILE]).hexdigest():
        raise ArchiveError(f"`{SOURCE_FILE}` is not the text that was run")
    check_file_result(file)
    _restore_intervals(file, as_list(whole["intervals"]), kept)
    return results


def _restore_intervals(file: FileResult, found: list[Any], kept: Attachments) -> None:
    """Restore the intervals of unpatched runs, which would otherwise be resampled."""
    for experiment, parts in zip(file.experiments, found, strict=True):
        if parts is None:
            continue
        intervals = _INTERVALS_CODEC.read(parts, kept)
        categories = {data.label for data in experiment.measures if data.kind == "category"}
        asked = [(run, label) for run, values in experiment.runs.items() for label in values]
        asked = [pair for pair in asked if pair[1] not in categories]
        asked += [(run, "accuracy") for run in experiment.accuracy]
        if any(label not in intervals.get(run, {}) for run, label in asked):
            raise ArchiveError(f"intervals of `{experiment.name}` are missing")
        vars(experiment)["run_intervals"] = intervals  # the cache of the property


def _own_source(name: str, text: str) -> Source:
    if name.startswith("<") and name.endswith(">"):
        return Source(text, origin=name[1:-1])
    return Source(text, Path(name))


def _source_parts(source: Source, *, own: bool) -> dict[str, Any]:
    path = None if source.path is None else str(source.path)
    return {"path": path, "origin": source.origin, "text": None if own else source.text}


def _read_source(parts: dict[str, Any], text: str | None) -> Source:
    """Restore a text of the archive; the file's own text is stored separately. Its paths are
    neither read nor written, because paths of an archive may belong to another machine."""
    path, origin = parts["path"], parts["origin"]
    text = parts["text"] if text is None else text
    if type(text) is not str or type(origin) is not str or type(path) not in (str, type(None)):
        raise ArchiveError("a text has a name and an origin")
    return Source(
        text, None if path is None else Path(cast("str", path)), AllowedFolders((), ()), origin
    )


RESULT_PACKAGES = ("mechdsl", "torch", "transformers", "tokenizers", "numpy", "scipy")


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on, loaded plugins included."""
    packages = {package: package_version(package) for package in RESULT_PACKAGES}
    return {**packages, **plugin_versions()}


NOT_INSTALLED = "unknown"
"""Version of a package that isn't installed."""


@cache
def package_version(package: str) -> str:
    """Return the version of a package; `NOT_INSTALLED` if it isn't there."""
    if package == "mechdsl":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
