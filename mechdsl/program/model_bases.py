"""`base: m`: the model that an adapter changes, which is another statement of the file."""

from __future__ import annotations

from collections.abc import Iterable

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e04_adapters import AdapterCircle
from mechdsl.program.definitions import Definitions
from mechdsl.program.namespace import Namespace
from mechdsl.syntax import ast

BASE = "base"
"""The argument's name."""


def check_bases(files: Iterable[ast.File], parts: Definitions, scope: Namespace) -> None:
    """Refuse adapters whose base isn't one model of the file: they are no models any more.

    Codes: E0201 for a name that isn't defined, E0207 for one that stands for several models, E0450
    for adapters that are bases of one another.
    """
    for file in files:
        for statement in file.statements:
            if isinstance(statement, ast.ModelDef):
                _check(statement, parts, scope)


def _check(statement: ast.ModelDef, parts: Definitions, scope: Namespace) -> None:
    name = statement.name.id
    own = [each for each in parts.checkpoints.get(name, (name,)) if each in parts.models]
    base = parts.models[own[0]].base if own else None
    if base is None:
        return
    span = next(each.value.span for each in statement.source.arguments if each.name == BASE)
    circle = _circle(own[0], parts)
    if not scope.use("model", base, span):
        pass
    elif base in parts.checkpoints:
        scope.diagnostics.append(
            BadArgument(
                span=span,
                name=base,
                reason="stands for several models, and an adapter has one base",
                hint='give the one that is meant a line: `model m = local("runs/step-9")`',
            )
        )
    elif circle:
        said = " → ".join(f"`{each}`" for each in circle)
        scope.diagnostics.append(AdapterCircle(span=span, model=name, circle=said))
    else:
        return
    for each in own:
        del parts.models[each]


def _circle(name: str, parts: Definitions) -> list[str]:
    """The bases that lead from a model back to itself; none where they don't, or into a circle that
    it is no part of."""
    chain = [name]
    while (model := parts.models.get(chain[-1])) is not None and model.base is not None:
        if model.base in chain:
            return [*chain, name] if model.base == name else []
        chain.append(model.base)
    return []
