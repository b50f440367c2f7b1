"""Values that are derived from one another: no circles, and no chains that are too long."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base import limits
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e05_data import CyclicValue, TooMany
from mechdsl.prompts.compiled_template import Definition
from mechdsl.prompts.names_used import Placeholders, uses
from mechdsl.syntax.walk import depth


def endless(graph: Mapping[str, Definition], placeholders: Placeholders) -> Diagnostic | None:
    """E0502, E0506: what is wrong with the way definitions hang on one another. Rows are worked out
    by recursion, which is why chains are bounded."""
    steps: dict[str, int] = {}
    within: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> Diagnostic | None:
        if name in steps or name not in graph:
            return None
        span = graph[name].value.span
        if name in path:
            around = path[path.index(name) :]
            shown = " → ".join(f"`{n}`" for n in (*around, name))
            return CyclicValue(span=span, name=name, path=shown)
        longest = deepest = 0
        for use in uses(graph[name].value, placeholders):
            if use.how in ("value", "pool") and len(path) <= limits.CHAIN:
                found = visit(use.name, (*path, name))
                if found is not None:
                    return found
                longest = max(longest, steps.get(use.name, 0))
                deepest = max(deepest, within.get(use.name, 0))
        steps[name] = longest + 1
        within[name] = deepest + depth(graph[name].value)
        bounds = (
            (steps, limits.CHAIN, f"steps from which `{name}` is derived"),
            (within, 2 * limits.DEPTH, f"parts of `{name}` within one another"),
        )
        for found, most, what in bounds:
            if found[name] > most:
                amount = f"{most + 1} or more"
                hint = "derive it in fewer steps"
                return TooMany(span=span, what=what, amount=amount, most=most, hint=hint)
        return None

    return next((f for f in (visit(name, ()) for name in graph) if f is not None), None)
