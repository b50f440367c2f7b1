"""Values that a function of a Python file gives: which names of the row it may see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mechdsl.diagnostics.e02_python import PythonFailed, PythonNotAllowed, PythonNotFound
from mechdsl.program.python_files import (
    INSIDE,
    NAME,
    OUTSIDE,
    PythonFailure,
    PythonFunction,
    find_function,
)
from mechdsl.prompts.row_scope import Refusal
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

Names = tuple[str, ...]


class Calls:
    """The `python(…)` of a block."""

    def __init__(self, parts: Iterable[tuple[Names | None, Any]], *, allowed: bool) -> None:
        """parts: what rows are made of, each with the names that a function in it is given."""
        self._found: dict[int, tuple[ast.Call, Names | None]] = {}
        for names, node in parts:
            for call in python_calls(node):
                # The tree holds on to the call, so its id stays its own; an equal one elsewhere
                # may see other names.
                self._found[id(call)] = call, names
        self._functions: dict[int, PythonFunction] = {}
        self.allowed = allowed

    @property
    def functions(self) -> tuple[PythonFunction, ...]:
        """Those that were called so far."""
        return tuple(dict.fromkeys(self._functions.values()))

    def names(self, node: ast.Call) -> Names | None:
        """What the function is given of the row; None for all that it has. E0222."""
        if id(node) not in self._found:
            raise Refusal(
                PythonNotFound,
                node.span,
                written=node.span.written,
                reason=INSIDE,
                hint=OUTSIDE,
            )
        return self._found[id(node)][1]

    def run(self, node: ast.Call, row: dict[str, object]) -> int | float | bool | str:
        """The value that the function gives. E0221, E0222, E0223."""
        function = self._function(node)
        try:
            found = function.call(dict(row))
        except PythonFailure as failure:
            facts = failure.diagnostic
            hint = facts.hint
            if facts.reason.startswith("KeyError"):
                hint = f"the row has {', '.join(f'`{name}`' for name in row)}"
            raise Refusal(
                PythonFailed,
                node.span,
                function=facts.function,
                reason=facts.reason,
                where=facts.where,
                hint=hint,
            ) from None
        value: object = found
        if hasattr(found, "item"):  # of numpy or torch
            try:
                value = found.item()
            except (TypeError, ValueError, RuntimeError):  # of several numbers
                value = None
        if isinstance(value, int | float | str) and value == value:
            return value
        given = "NaN" if isinstance(value, float) else f"`{type(found).__name__}`"
        raise Refusal(
            PythonFailed,
            node.span,
            function=function.name,
            reason=f"it gave {given}, not a number or a text",
            where=function.where(),
            hint="a value is one number or one text for each row",
        )

    def _function(self, node: ast.Call) -> PythonFunction:
        found = self._functions.get(id(node))
        if found is not None:
            return found
        found, problems = find_function(node, "value")
        if found is None:
            first = problems[0]
            assert isinstance(first, PythonNotFound)
            facts = {"written": first.written, "reason": first.reason, "hint": first.hint}
            raise Refusal(PythonNotFound, node.span, **facts)
        if not self.allowed:
            raise Refusal(
                PythonNotAllowed,
                node.span,
                function=found.name,
                file=found.file,
                hint=found.allowing,
            )
        self._functions[id(node)] = found
        return found


def python_calls(node: Any) -> list[ast.Call]:
    return [part for part in walk(node) if isinstance(part, ast.Call) and part.name == NAME]
