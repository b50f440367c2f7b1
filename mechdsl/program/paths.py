"""Paths that a file names: their targets, and whether the file may read or write there.

Code that opens a file named by a `.mech` file first calls `path_to_read` or `path_to_write`; no
other code uses a source's folder. `PATH_CONSTRUCTS` lists every construct that takes a path; so
does the list of `--untrusted`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from glob import iglob
from pathlib import Path, PurePath
from typing import Literal

from mechdsl import zoo
from mechdsl.base import limits
from mechdsl.base.files import special_file_kind, write_obstacle
from mechdsl.base.records import Record
from mechdsl.base.text import AllowedFolders, Source, Span, name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.files import (
    NamedPath,
    ReadOutsideFolder,
    ReportNotWritable,
    SpecialFile,
    WriteOutsideFolder,
)
from mechdsl.diagnostics.models import ModelNotFound
from mechdsl.diagnostics.prompts import TooManyValues
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.program import spec
from mechdsl.program.spec import Constant, constant_value
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

WILDCARD = "*"
"""A part of a name, in the path of a model's folder or of data files."""


class PathConstruct(Record):
    """A construct of the language that takes a path."""

    name: str
    does: Literal["reads", "runs", "writes"]


USE_PATH = PathConstruct("use", "reads")

ROWS_PATH = PathConstruct("rows", "reads")

IMAGE_PATH = PathConstruct("image", "reads")

VIDEO_PATH = PathConstruct("video", "reads")

AUDIO_PATH = PathConstruct("audio", "reads")

LOCAL_PATH = PathConstruct("local", "reads")

HF_PATH = PathConstruct("hf", "reads")

HF_DATASET_PATH = PathConstruct("hf_dataset", "reads")

PYTHON_PATH = PathConstruct("python", "runs")

SAVED_PATH = PathConstruct("saved", "reads")

DICTIONARY_PATH = PathConstruct("sae", "reads")

TRANSCODER_PATH = PathConstruct("transcoder", "reads")

LABELS_PATH = PathConstruct("labels", "reads")

TUNED_LENS_PATH = PathConstruct("tuned_lens", "reads")

REPORT_PATH = PathConstruct("report", "writes")

SAVE_PATH = PathConstruct("save", "writes")

PATH_CONSTRUCTS = (
    USE_PATH,
    ROWS_PATH,
    IMAGE_PATH,
    VIDEO_PATH,
    AUDIO_PATH,
    LOCAL_PATH,
    HF_PATH,
    HF_DATASET_PATH,
    PYTHON_PATH,
    SAVED_PATH,
    DICTIONARY_PATH,
    TRANSCODER_PATH,
    LABELS_PATH,
    TUNED_LENS_PATH,
    REPORT_PATH,
    SAVE_PATH,
)

_CALLS = {
    construct.name: construct
    for construct in (
        LOCAL_PATH,
        HF_PATH,
        HF_DATASET_PATH,
        PYTHON_PATH,
        SAVED_PATH,
        DICTIONARY_PATH,
        TRANSCODER_PATH,
        TUNED_LENS_PATH,
    )
}


def source_reach(source: Source, *, outside: bool, untrusted: bool) -> AllowedFolders:
    """Return the folders where a file may write (unless `outside`) and, if untrusted, read.

    These are the file's folder and the working directory; the root of a file system only if the
    file is directly in it.
    """
    working = Path.cwd()
    here = {working} if working.parent != working else set[Path]()
    if source.path is not None:
        here.add(source.folder.resolve())
    return AllowedFolders(
        reads=tuple(here) if untrusted else None, writes=None if outside else tuple(here)
    )


# --- paths in a file -----------------------------------------------------------------------------


def path_arguments(
    node: ast.Node, parameters: Mapping[str, Constant]
) -> list[tuple[PathConstruct, str]]:
    """Return the paths that a node names, as written in the source."""
    match node:
        case ast.Use(path=ast.String(value=path)):
            return [(USE_PATH, path)]
        case ast.RowsLine(source=ast.String(value=path)):
            return [(ROWS_PATH, path)]
        case ast.ImageLine(value=ast.String(value=path)):
            return [(IMAGE_PATH, path)]
        case ast.VideoLine(value=value):
            return [
                (VIDEO_PATH, each.value) for each in walk(value) if isinstance(each, ast.String)
            ]
        case ast.AudioLine(value=ast.String(value=path)):
            return [(AUDIO_PATH, path)]
        case ast.Report(file=ast.String(value=path)):
            return [(REPORT_PATH, path)]
        case ast.Save(file=ast.String(value=path)) | ast.SaveDirection(file=ast.String(value=path)):
            return [(SAVE_PATH, path)]
        case ast.Call(name=name, arguments=arguments) if name in _CALLS:
            paths = [argument.value for argument in arguments if argument.name in (None, "path")]
            path = constant_value(paths[0], parameters) if paths else None
            return [(_CALLS[name], path)] if isinstance(path, str) else []
        case ast.Argument(name="labels", value=value):
            path = constant_value(value, parameters)
            return [(LABELS_PATH, path)] if isinstance(path, str) else []
        case _:
            return []


def warn_named_paths(
    files: Sequence[ast.File], parameters: Mapping[str, Constant]
) -> Iterator[Diagnostic]:
    """Report W0780 for each path that a file or its imports name."""
    for file in files:
        for node in walk(file):
            for construct, path in path_arguments(node, parameters):
                yield NamedPath(
                    span=node.span,
                    construct=construct.name,
                    does=construct.does,
                    path=path,
                    where=_in_words(construct, path, node.span),
                )


def _in_words(construct: PathConstruct, path: str, span: Span) -> str:
    if construct in (HF_PATH, HF_DATASET_PATH) and not _from(span, path).is_dir():
        return "searched in the Hugging Face cache"
    if construct is PYTHON_PATH:
        path = path.rpartition(":")[0]
    real = _resolved(_from(span, path))
    folders = span.source.reach.reads or ()
    inside = any(real.is_relative_to(folder) for folder in folders)
    return "inside of the folder" if inside else f"leads to `{real}`"


# --- targets of paths -----------------------------------------------------------------------------


def path_to_read(
    construct: PathConstruct, written: str, span: Span, *, base: Path | None = None
) -> tuple[Path | None, list[Diagnostic]]:
    """Resolve a path for reading; None if it may not be read. Codes: E0532, E0535.

    Args:
        base: Folder that relative paths start from; by default that of the file.
    """
    path = _from(span, written, base)
    allowed = span.source.reach.reads
    if allowed is not None and not _inside(path, allowed):
        where = _where(path, written, allowed)
        return None, [
            ReadOutsideFolder(span=span, construct=construct.name, path=written, where=where)
        ]
    what = special_file_kind(path)
    if what is not None:
        hint = "name a regular file: it is read twice"
        return None, [
            SpecialFile(span=span, construct=construct.name, path=written, what=what, hint=hint)
        ]
    return path, []


def paths_to_read(
    construct: PathConstruct, written: str, span: Span
) -> tuple[list[Path], list[Diagnostic]]:
    """Resolve a path for reading, or one with `*` to all matching files in natural order.

    A `*` is a part of one name. Codes: E0506 for too many files, E0532, E0535; no file and no
    diagnostic if none matches.
    """
    if WILDCARD not in written:
        path, problems = path_to_read(construct, written, span)
        return ([] if path is None else [path]), problems
    parent, slash, _ = written[: written.index(WILDCARD)].rpartition("/")
    folder, problems = path_to_read(construct, parent or slash, span)
    if folder is None:
        return [], problems
    pattern = re.sub(r"([?[])", r"[\1]", written[len(parent + slash) :])
    names = sorted(iglob(pattern, root_dir=folder), key=_natural)
    paths = [folder / name for name in names if not (folder / name).is_dir()]
    if len(paths) > limits.DATA_FILES:
        what, most = f"`{written}`", limits.DATA_FILES
        hint = "join small files, or name fewer of them"
        many = f"{len(paths):,} files"
        return [], [TooManyValues(span=span, what=what, amount=many, most=most, hint=hint)]
    for file in paths:
        _, problems = path_to_read(construct, str(file.absolute()), span)
        if problems:
            return [], problems
    return paths, []


def path_to_write(construct: str, written: str, span: Span) -> tuple[Path | None, list[Diagnostic]]:
    """Resolve a path for writing; None if it can't or may not be written.

    Codes: E0531, E0532, E0533.
    """
    path = _from(span, written)
    what = special_file_kind(path, stream=True)
    if what is not None:
        hint = "write reports to regular files, or remove `to` to print them"
        return None, [
            SpecialFile(span=span, construct=construct, path=written, what=what, hint=hint)
        ]
    allowed = span.source.reach.writes
    if allowed is not None and not _inside(path, allowed):
        where = _where(path, written, allowed)
        return None, [WriteOutsideFolder(span=span, construct=construct, path=written, where=where)]
    reason = write_obstacle(path)
    if written.startswith("~") and path == span.source.folder / written:
        reason = f"there is no user `{PurePath(written).parts[0][1:]}`"
    if reason is not None:
        return None, [
            ReportNotWritable(span=span, construct=construct, path=written, reason=reason)
        ]
    return path, []


def is_inside_reach(path: Path, span: Span) -> bool:
    """Whether a file that the source doesn't name may be read; one in a model's folder may be a
    link to a file outside the folder."""
    allowed = span.source.reach.reads
    return allowed is None or _inside(path, allowed)


def _from(span: Span, written: str, base: Path | None = None) -> Path:
    """Resolve a path relative to its file; `~` is the user's folder."""
    try:
        path = Path(written).expanduser()
    except RuntimeError:  # `~name` of an unknown user
        path = Path(written)
    return (span.source.folder if base is None else base) / path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a cycle of links, an invalid name
        return path.absolute()


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    real = _resolved(path)
    return any(real.is_relative_to(folder) for folder in folders)


def _where(path: Path, written: str, allowed: Sequence[Path]) -> str:
    """Describe why a path is rejected, with the resolved path if it differs from the source."""
    if not allowed:  # a text without a file
        return (
            "the working directory is the root of the file system, which can't be allowed "
            "as a whole"
        )
    told = "neither in the folder of this file nor in the working directory"
    if ".." in Path(written).parts or Path(written).is_absolute() or written.startswith("~"):
        return told
    return f"a link to `{_resolved(path)}`, {told}"


def _wildcard_problem(model: spec.Model) -> BadArgument | None:
    """Report a `*` in a revision, in a path that isn't a folder's, or a second one."""
    if WILDCARD in (model.revision or ""):
        return BadArgument(
            span=model.span,
            name=f"{model.revision}",
            reason="has a `*`, which is allowed only in folders",
            hint='write one revision, or a pattern for several folders: `local("runs/step-*")`',
        )
    is_folder = model.kind in ("local", "zoo")
    if model.path.count(WILDCARD) > (1 if is_folder else 0):
        return BadArgument(
            span=model.span,
            name=model.path,
            reason="has more than one `*`"
            if is_folder
            else "has a `*`, which is allowed only in folders",
            hint='write one `*` for the part that differs: `local("runs/step-*")`',
        )
    return None


def expand_checkpoints(model: spec.Model, diagnostics: list[Diagnostic]) -> Sequence[spec.Model]:
    """Expand the `*` in the path of a model; without one, return the model itself.

    Codes: E0207 for a path with several stars, or one that isn't a folder's; E0401 if nothing
    matches.
    """
    problem = _wildcard_problem(model)
    if problem is not None:
        diagnostics.append(problem)
        return []
    if WILDCARD not in model.path:
        return [model]
    before, _, after = model.path.partition(WILDCARD)
    parent, slash, start = before.rpartition("/")
    if model.kind == "zoo":
        names = _of_the_zoo(before, after)
    else:
        folder, problems = path_to_read(LOCAL_PATH, parent or slash, model.span)
        if folder is None:
            diagnostics.extend(problems)
            return []
        names = match_folders(folder, start, after)
    if not names:
        diagnostics.append(
            ModelNotFound(
                span=model.span,
                model=model.name,
                path=model.path,
                place="the zoo" if model.kind == "zoo" else "the folder of the file",
                advice=f"no folder matches; the zoo has {name_list(zoo.zoo_models())}"
                if model.kind == "zoo"
                else (
                    "no folder matches; write the path relative to the `.mech` file, with "
                    "`*` for the part that differs"
                ),
            )
        )
    return [
        model.model_copy(
            update={
                "name": f"{model.name}:{matched}",
                "path": model.path.replace(WILDCARD, matched),
                "matched": matched,
            }
        )
        for matched in names
    ]


def _of_the_zoo(before: str, after: str) -> list[str]:
    """Return the texts that `*` matches in names of the zoo."""
    pattern = re.compile(f"{re.escape(before)}([^/]+){re.escape(after)}")
    names = [match[1] for name in zoo.zoo_models() if (match := pattern.fullmatch(name))]
    return sorted(names, key=_natural)


def match_folders(folder: Path, start: str, after: str) -> list[str]:
    """Return the texts that `*` matches, in natural order: `step-9` before `step-10`.

    Args:
        start: The beginning of the folder's name, before `*`.
        after: The whole path after `*`.
    """
    end, slash, rest = after.partition("/")
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    folders = [
        name[len(start) : len(name) - len(end)]
        for name in names
        if name.startswith(start) and name.endswith(end) and len(name) > len(start) + len(end)
        if start or not name.startswith(".")
        if os.path.isdir(folder / name / rest if slash else folder / name)
    ]
    return sorted(folders, key=_natural)


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key with digits as numbers, so that 9 precedes 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(0, int(p), p) if p[0].isdigit() and p.isascii() else (1, 0, p) for p in parts]
