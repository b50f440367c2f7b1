"""Helpers that check and plan programs without weights."""

from __future__ import annotations

from pathlib import Path

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.program import spec
from mechdsl.resolve.types import ResolvedExperiment

from .. import fruit
from ..parsing import lower_program, parse

HEAD = fruit.head(fruit.FEWER, "corrupt other_fruit { item = other(item) }")
FROM = "from clean into fewer"
DELTA = "measure logit(answer) as delta"


def experiment(*lines: str, name: str = "test", limit: int = 64) -> str:
    """An experiment with these lines."""
    body = "".join(f"  {line}\n" for line in (f"prompts fruit limit {limit}", *lines))
    return f"\nexperiment {name} {{\n{body}}}\n"


def lowered(text: str, path: Path | None = None) -> spec.Program:
    source = Source(text, path)
    tree, found = parse(source)
    program, more = lower_program(tree, source)
    # HEAD has more corruptions than an experiment of one line uses.
    assert {d.code for d in [*found, *more]} <= {"W0730"}
    return program


def resolved(text: str) -> list[ResolvedExperiment]:
    checked = check_source(Source(text))
    assert not has_errors(checked.diagnostics), checked.diagnostics
    return checked.experiments


def one(*lines: str, head: str = HEAD) -> ResolvedExperiment:
    """Return the only experiment of a file with these lines."""
    (found,) = resolved(head + experiment(*lines))
    return found


def codes(*lines: str, head: str = HEAD) -> list[str]:
    """Return the diagnostic codes of an experiment with these lines."""
    return [d.code for d in check_source(Source(head + experiment(*lines))).diagnostics]
