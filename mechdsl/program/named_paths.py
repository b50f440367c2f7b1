"""Paths that a file names: where they lead, and whether a file may go there.

Whatever opens a file that a `.mech` file names asks `path_to_read` or `path_to_write` first;
nothing else looks at a source's folder. What takes a path is in `CONSTRUCTS`, and so in the list of
`--untrusted`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechdsl.base.files import special_file, unwritable
from mechdsl.base.source import Reach, Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_paths import (
    CannotWrite,
    NamesPath,
    ReadsElsewhere,
    SpecialFile,
    WritesElsewhere,
)
from mechdsl.program.constants import Constant, constant
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


@dataclass(frozen=True)
class PathConstruct:
    """Something that takes a path."""

    name: str
    does: Literal["reads", "runs", "writes"]


USE = PathConstruct("use", "reads")
ROWS = PathConstruct("rows", "reads")
IMAGE = PathConstruct("image", "reads")
LOCAL = PathConstruct("local", "reads")
HF = PathConstruct("hf", "reads")
HF_DATASET = PathConstruct("hf_dataset", "reads")
PYTHON = PathConstruct("python", "runs")
SAVED = PathConstruct("saved", "reads")
TUNED_LENS = PathConstruct("tuned_lens", "reads")
REPORT = PathConstruct("report", "writes")
SAVE = PathConstruct("save", "writes")

CONSTRUCTS = (USE, ROWS, IMAGE, LOCAL, HF, HF_DATASET, PYTHON, SAVED, TUNED_LENS, REPORT, SAVE)
_CALLS = {each.name: each for each in (LOCAL, HF, HF_DATASET, PYTHON, SAVED, TUNED_LENS)}


def reach_of(source: Source, *, outside: bool, untrusted: bool) -> Reach:
    """Where a file may write, unless that is lifted (`outside`), and read, if it is untrusted: its
    folder and the working directory, but a root of the file system only where the file lies in it.
    """
    working = Path.cwd()
    here = {working} if working.parent != working else set[Path]()
    if source.path is not None:
        here.add(source.folder.resolve())
    return Reach(reads=tuple(here) if untrusted else None, writes=None if outside else tuple(here))


# --- what a file names --------------------------------------------------------------------------


def path_in(node: ast.Node, parameters: Mapping[str, Constant]) -> tuple[PathConstruct, str] | None:
    """The path that a node names, as written; None where it names none."""
    match node:
        case ast.Use(path=ast.String(value=path)):
            return USE, path
        case ast.RowsFrom(source=ast.String(value=path)):
            return ROWS, path
        case ast.ImageLine(value=ast.String(value=path)):
            return IMAGE, path
        case ast.Report(file=ast.String(value=path)):
            return REPORT, path
        case ast.Save(file=ast.String(value=path)):
            return SAVE, path
        case ast.Call(name=name, arguments=arguments) if name in _CALLS:
            given = [each.value for each in arguments if each.name in (None, "path")]
            path = constant(given[0], parameters) if given else None
            return (_CALLS[name], path) if isinstance(path, str) else None
        case _:
            return None


def named_paths(
    files: Sequence[ast.File], parameters: Mapping[str, Constant]
) -> Iterator[Diagnostic]:
    """W0780 for each path that a file, or one that it imports, names."""
    for file in files:
        for node in walk(file):
            found = path_in(node, parameters)
            if found is None:
                continue
            construct, path = found
            yield NamesPath(
                span=node.span,
                construct=construct.name,
                does=construct.does,
                path=path,
                where=_in_words(construct, path, node.span),
            )


def _in_words(construct: PathConstruct, path: str, span: Span) -> str:
    if construct in (HF, HF_DATASET) and not _from(span, path).is_dir():
        return "looked for in the Hugging Face cache"
    if construct is PYTHON:
        path = path.rpartition(":")[0]
    real = _resolved(_from(span, path))
    folders = span.source.reach.reads or ()
    inside = any(real.is_relative_to(folder) for folder in folders)
    return "inside of the folder" if inside else f"leads to `{real}`"


# --- where paths lead ---------------------------------------------------------------------------


def path_to_read(
    construct: PathConstruct, written: str, span: Span, *, base: Path | None = None
) -> tuple[Path | None, list[Diagnostic]]:
    """Where a path leads that is read; None where it may not be. Codes: E0532, E0535.

    base: the folder that it starts from, by default that of its file.
    """
    path = _from(span, written, base)
    allowed = span.source.reach.reads
    if allowed is not None and not _inside(path, allowed):
        where = _where(path, written, allowed)
        return None, [
            ReadsElsewhere(span=span, construct=construct.name, path=written, where=where)
        ]
    what = special_file(path)
    if what is not None:
        hint = "name a file that can be read twice: it is looked at before it is used"
        return None, [
            SpecialFile(span=span, construct=construct.name, path=written, what=what, hint=hint)
        ]
    return path, []


def path_to_write(construct: str, written: str, span: Span) -> tuple[Path | None, list[Diagnostic]]:
    """Where a path leads that is written; None where it can't or may not be.

    Codes: E0531, E0532, E0533.
    """
    path = span.source.folder / written
    what = special_file(path, stream=True)
    if what is not None:
        hint = "reports go to plain files; without `to` they are printed"
        return None, [
            SpecialFile(span=span, construct=construct, path=written, what=what, hint=hint)
        ]
    allowed = span.source.reach.writes
    if allowed is not None and not _inside(path, allowed):
        where = _where(path, written, allowed)
        return None, [WritesElsewhere(span=span, construct=construct, path=written, where=where)]
    reason = unwritable(path)
    if reason is not None:
        return None, [CannotWrite(span=span, construct=construct, path=written, reason=reason)]
    return path, []


def inside_reach(path: Path, span: Span) -> bool:
    """Whether a file that is found, not named, may be read: one in a model's folder may be a link
    out of it."""
    allowed = span.source.reach.reads
    return allowed is None or _inside(path, allowed)


def _from(span: Span, written: str, base: Path | None = None) -> Path:
    """`~` is the user's folder, as shells have it, but for what is written."""
    try:
        path = Path(written).expanduser()
    except RuntimeError:  # `~name` of nobody
        path = Path(written)
    return (span.source.folder if base is None else base) / path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a name that none can have
        return path.absolute()


def _inside(path: Path, folders: Sequence[Path]) -> bool:
    real = _resolved(path)
    return any(real.is_relative_to(folder) for folder in folders)


def _where(path: Path, written: str, allowed: Sequence[Path]) -> str:
    """What is wrong with the place, with the way there where that isn't written."""
    if not allowed:  # a text that comes from no file
        return "the working directory is the root of the file system, which is too much to allow"
    told = "neither in the folder of this file nor in the working directory"
    if ".." in Path(written).parts or Path(written).is_absolute() or written.startswith("~"):
        return told
    return f"a link to `{_resolved(path)}`, {told}"
