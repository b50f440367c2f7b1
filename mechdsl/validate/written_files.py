"""Reports that would write over what a command reads, or over each other."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path, PurePath

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e06_statistics import BadReport
from mechdsl.models.locate import locate
from mechdsl.program import spec
from mechdsl.program.named_paths import ROWS, path_to_read, path_to_write
from mechdsl.program.python_files import functions_of
from mechdsl.syntax import ast

MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors",
    "*.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "*processor_config.json", "chat_template*",
)  # fmt: skip
"""What loading reads in a model's folder, where other files may lie too."""

Written = tuple[spec.Program, Sequence[spec.Experiment]]
"""A file, and those of its experiments that are reported."""


def check_written(files: Sequence[Written]) -> list[Diagnostic]:
    """E0607 for reports of one command that would write over a file that the command reads, or over
    another report, however the path is spelt and through links."""
    reports = {
        report.span: (report, program)
        for program, experiments in files
        for experiment in experiments
        for report in experiment.reports
        if report.file is not None
    }
    saves = [
        (save, program)
        for program, experiments in files
        for save in {save.span: save for each in experiments for save in each.saves}.values()
    ]
    if not reports and not saves:
        return []
    read: dict[Hashable, tuple[str, spec.Program]] = {}
    for program, _ in files:
        for path, what in _read_by(program):
            read.setdefault(_identity(path), (what, program))
    found: list[Diagnostic] = []
    first: dict[Hashable, tuple[spec.Report, spec.Program]] = {}
    for report, program in reports.values():
        assert report.file is not None
        target, problems = path_to_write(f"report {report.kind}", report.file, report.span)
        if target is None:
            found.extend(problems)
            continue
        path = _identity(target)
        other, of = first.setdefault(path, (report, program))
        if path in read:
            what, reader = read[path]
            where = "" if reader is program else f" in `{reader.span.source.name}`"
            reason = f"would write over {what}{where}"
        elif other is not report:
            where = "" if of is program else f" of `{of.span.source.name}`"
            reason = f"goes to `{report.file}`, as the report on line {other.span.line}{where} does"
        else:
            continue
        hint = "give each report a file of its own"
        found.append(BadReport(span=report.span, kind=report.kind, reason=reason, hint=hint))
    taken = {path: f"the report on line {each.span.line}" for path, (each, _) in first.items()}
    taken |= {path: what for path, (what, _) in read.items()}
    return [*found, *_saved(saves, taken)]


def _saved(
    saves: Sequence[tuple[spec.Save, spec.Program]], taken: dict[Hashable, str]
) -> Iterator[Diagnostic]:
    """E0207 for a `save`, or the rows beside it, over what is read or written otherwise; and what
    is wrong with its path. taken: by file, what it is."""
    for save, _ in saves:
        for suffix in (".safetensors", ".jsonl"):
            written = str(PurePath(save.file).with_suffix(suffix))
            target, problems = path_to_write("save", written, save.span)
            if target is None:
                yield from problems
                break
            path = _identity(target)
            if path in taken:
                yield BadArgument(
                    span=save.span,
                    name=written,
                    reason=f"would write over {taken[path]}",
                    hint="give each `save` a file of its own; its rows stand beside it, in "
                    "`.jsonl`",
                )
                break
            taken[path] = f"what the `save` on line {save.span.line} writes"


def written_over(path: Path, files: Sequence[Written]) -> str | None:
    """What an option's file would be written over, of all that a command reads and writes."""
    own = _identity(path)
    for program, experiments in files:
        for read, what in _read_by(program):
            if _identity(read) == own:
                return what
        for report in (each for experiment in experiments for each in experiment.reports):
            if report.file is None:
                continue
            target, _ = path_to_write(f"report {report.kind}", report.file, report.span)
            if target is not None and _identity(target) == own:
                return f"`{report.file}`, the report on line {report.span.line}"
    return None


def _read_by(program: spec.Program) -> Iterator[tuple[Path, str]]:
    """Every path that running a file reads, and what it is."""
    for path in program.files:
        yield path, f"`{path.name}`, a `.mech` file that is read"
    for prompts in program.prompts.values():
        if isinstance(prompts.rows, ast.String):
            written = prompts.rows.value
            path, _ = path_to_read(ROWS, written, prompts.rows.span)
            if path is not None:
                yield path, f"`{written}`, the rows of prompts `{prompts.name}`"
    for function in functions_of(program):
        yield function.path, f"`{function.file}`, which defines `{function.name}`"
    for model in program.models.values():
        if model.function is not None:  # whose file is among the functions'
            continue
        folder, _ = locate(model, model.span.source.folder)
        if folder is not None:
            for path in (path for pattern in MODEL_FILES for path in folder.glob(pattern)):
                yield path, f"`{path.name}` of the model `{model.name}`"


def _identity(path: Path) -> Hashable:
    """Equal for all paths to one file."""
    try:
        there = path.stat()
    except (OSError, ValueError):  # not there so far, or no path at all
        return os.path.realpath(str(path).replace("\0", ""))
    return there.st_dev, there.st_ino
