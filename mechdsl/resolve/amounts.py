"""Numbers that rules write: literals, parameters, and the values of `for` variables."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.base.names import name_list
from mechdsl.diagnostics.e03_rules import BadAmount
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.measures import evaluate
from mechdsl.resolve.resolved_rule import Amounts, Key
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def resolve_amounts(node: ast.Expr | None, work: Work) -> Amounts | None:
    """The number for every value of the loops that the expression names; None after E0337."""
    assert node is not None
    names = [part.id for part in walk(node) if isinstance(part, ast.Name)]
    loops = tuple(name for name in work.loops if name in names)
    found: dict[Key, float] = {}
    for key, at in work.sites.combinations(loops):
        values = {**work.program.parameters, **at}
        amount = _number(node, values)
        if amount is None:
            reason, hint = _why(node, values, work)
            work.diagnostics.append(
                BadAmount(span=node.span, text=node.span.written, reason=reason, hint=hint)
            )
            return None
        found[key] = amount
    return Amounts(loops, found)


def _number(node: ast.Expr, values: Mapping[str, object]) -> float | None:
    for part in walk(node):
        match part:
            case ast.Name(id=name):
                value = values.get(name)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    return None
            case ast.Number() | ast.Negative() | ast.Binary():
                pass
            case _:
                return None
    try:
        return float(evaluate(node, lambda name: values[getattr(name, "id", "")]))
    except ZeroDivisionError:
        return None


def _why(node: ast.Expr, values: Mapping[str, object], work: Work) -> tuple[str, str]:
    known = name_list((*work.loops, *work.program.parameters))
    if isinstance(node, ast.Percent):
        return "only numbers can be written here", f"write `{node.value / 100:g}`"
    for part in walk(node):
        if isinstance(part, ast.Name) and part.id in ("zero", "mean"):
            return f"`{part.id}` belongs to `ablate … with {part.id}`", "write a number: `0`"
        if isinstance(part, ast.Name) and part.id not in values:
            return (
                f"`{part.id}` is neither a `for` variable around this rule nor a `param`",
                f"known here are {known}" if known else "write a number, for example `0.5`",
            )
    return "only numbers can be written here", "for example `0.5`, a `param`, or a `for` variable"
