"""What of a file waits for a model that isn't at hand, by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.w07_models import ModelNotHere
from mechdsl.program import spec
from mechdsl.resolve.open_axes import open_axes
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

KINDS = ("layers, heads and sites", "positions as tokens", "answers as tokens", "cells")


def with_waiting(
    found: Sequence[Diagnostic], program: spec.Program, source: Source
) -> list[Diagnostic]:
    """W0710 with the lines of the file that are not wholly checked."""
    return [
        replace(each, waiting=_waiting(each.model, program, source))
        if isinstance(each, ModelNotHere)
        else each
        for each in found
    ]


def _waiting(model: str, program: spec.Program, source: Source) -> str:
    lines: dict[str, set[int]] = {}
    for experiment in program.experiments:
        used = (experiment.model, *(run.model for run in experiment.elsewhere))
        if all(model not in _hangs_on(each, program) for each in used):
            continue
        waits = open_axes(experiment, program.groups, ("shape", "tokens"))
        prompts = program.prompts[experiment.prompts]
        for kind, span in _parts(experiment, prompts, cells=bool(waits)):
            if span.source is source:
                lines.setdefault(kind, set()).add(span.line)
    listed = [f"{kind} ({_listed(sorted(lines[kind]))})" for kind in KINDS if kind in lines]
    return f"; then these are checked too: {', '.join(listed)}" if listed else ""


def _hangs_on(name: str | None, program: spec.Program) -> Iterator[str]:
    """A model, and of an adapter its base."""
    while name is not None:
        yield name
        name = program.models[name].base if name in program.models else None


def _parts(
    experiment: spec.Experiment, prompts: spec.Prompts, *, cells: bool
) -> Iterator[tuple[str, Span]]:
    """cells: whether which ones there are hangs on the model."""
    sites, positions, answers, named = KINDS
    for rule in experiment.every_rule:
        for site in (rule.site, rule.edge, rule.receiver):
            if site is not None:
                yield sites, site.span
        for at in (rule.at, rule.onto):
            if at is not None:
                yield positions, at.span
    for measure in experiment.measures:
        if measure.at is not None:
            yield positions, measure.at.span
    for text in prompts.texts:
        yield answers, text.value.span
    for expect in experiment.expects if cells else ():
        if expect.contains or any(map(_names_a_cell, walk(expect.condition))):
            yield named, expect.span


def _names_a_cell(node: ast.Node) -> bool:
    return isinstance(node, ast.ShortSite | ast.Site) or (
        isinstance(node, ast.Argument) and node.name is not None
    )


def _listed(lines: Sequence[int]) -> str:
    """`line 3`, `lines 3, 5 to 7`."""
    runs = [
        [line for _, line in run]
        for _, run in groupby(enumerate(lines), key=lambda pair: pair[1] - pair[0])
    ]
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(words)}"
