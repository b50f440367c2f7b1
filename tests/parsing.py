"""Parse, lower and format files with the words of all registered entries."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.program import lowering, spec
from mechdsl.rules.kinds import registered_words
from mechdsl.syntax import ast, formatter, frontend


def parse(source: Source) -> tuple[ast.File, list[Diagnostic]]:
    return frontend.parse(source, registered_words())


def lower_program(
    tree: ast.File, source: Source, settings: Mapping[str, str] | None = None
) -> tuple[spec.Program, list[Diagnostic]]:
    return lowering.lower_program(tree, source, registered_words(), settings)


def format_file(tree: ast.File) -> str:
    return formatter.format_file(tree, registered_words())
