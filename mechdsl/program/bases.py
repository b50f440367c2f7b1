"""`basis NAME = …` as typed data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.names import BadArgument, UnknownWord
from mechdsl.diagnostics.rules import BadBasis
from mechdsl.program import spec
from mechdsl.program.basis_methods import BASIS_METHODS, ROW_OPERANDS, BasisMethod
from mechdsl.program.directions import check_fit_rows, check_row_limit, fitted_block
from mechdsl.program.names import Namespace
from mechdsl.program.spec import constant_value
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

if TYPE_CHECKING:
    from mechdsl.program.spec import Definitions


_TRAINED = (
    "mechdsl trains no bases: save the directions of a trained one, and load them with "
    '`saved("rotation.safetensors", "rotation")`'
)

OTHER_METHODS = {
    "das": _TRAINED,
    "fit": _TRAINED,
    "boundless_das": _TRAINED,
    "rotation": _TRAINED,
    "dictionary": 'write `sae("path/to/sae")` or `transcoder("path/to/transcoder")`',
    "clt": 'write `transcoder("path/to/clt") at mlp_out layer 3`, which can be observed',
    "identity": "write `neurons`",
    "standard": "write `neurons`",
}
"""Methods of other tools → hint."""

OTHER_OPTIONS: dict[str, str] = dict.fromkeys(
    ("n_components", "components", "component", "k", "n", "rank", "dim", "size"), "dims"
)
"""Names of an option in other tools → the option."""


def lower_basis(statement: ast.BasisDef, parts: Definitions, scope: Namespace) -> spec.Basis | None:
    """Lower a definition and report errors that don't depend on the model; None after an error.

    Codes: E0201, E0203, E0207, E0342.
    """
    call = statement.source
    method = BASIS_METHODS.get(call.name)
    if method is None:
        known = ", ".join(f"`{each.example}`" for _, each in BASIS_METHODS.items())
        hint = did_you_mean(call.name, BASIS_METHODS, f"methods are {known}")
        hint = OTHER_METHODS.get(call.name, hint)
        scope.diagnostics.append(
            UnknownWord(span=call.span, kind="basis method", word=call.name, hint=hint)
        )
        return None
    before = len(scope.diagnostics)
    _check_arguments(call, method, parts, scope)
    if statement.site is None:
        scope.diagnostics.append(
            BadBasis(
                span=call.span,
                reason=f"`{statement.name.id}` has no site",
                hint=f"add the site: `basis {statement.name.id} = {call.span.written} at "
                "resid_post layer 2`",
            )
        )
    elif statement.at is not None and method.takes not in ROW_OPERANDS:
        scope.diagnostics.append(
            BadBasis(
                span=statement.at.span,
                reason=f"`{call.name}` reads no activations, so it has no position",
                hint=f"remove `at {statement.at.span.written}`",
            )
        )
    for axis in () if statement.site is None else statement.site.axes:
        if axis.word == "feature" or axis.plural:
            scope.diagnostics.append(
                BadBasis(
                    span=axis.span,
                    reason="a basis has one site, or one per layer or head",
                    hint="write the singular: `layer *` makes a basis of each layer",
                )
            )
    if len(scope.diagnostics) > before or statement.site is None:
        return None
    return spec.Basis(
        span=statement.span,
        name=statement.name.id,
        method=call,
        site=statement.site,
        at=statement.at,
    )


def _check_arguments(
    call: ast.Call, method: BasisMethod, parts: Definitions, scope: Namespace
) -> None:
    values = [a.value for a in call.arguments if a.name is None]
    for argument in call.arguments:
        if argument.name is None:
            continue
        if argument.name not in method.options:
            known = ", ".join(f"`{each}: …`" for each in method.options)
            hint = did_you_mean(argument.name, method.options, f"it takes {known or 'none'}")
            meant = OTHER_OPTIONS.get(argument.name)
            hint = f"write `{meant}: …`" if meant in method.options else hint
            reason = f"is no argument of `{call.name}`"
            scope.diagnostics.append(
                BadArgument(span=argument.span, name=argument.name, reason=reason, hint=hint)
            )
        elif argument.name == "limit":
            check_row_limit(call, argument, parts, scope)
        elif argument.name != "weights":
            value = constant_value(argument.value, parts.parameters)
            problem = method.check_option(argument.name, value)
            if problem is not None:
                scope.diagnostics.append(
                    BadBasis(span=argument.span, reason=problem[0], hint=problem[1])
                )
        for part in walk(argument.value):
            if isinstance(part, ast.Name):
                scope.has("param", part.id)
    problem = _missing_argument(call, method, values)
    if problem is not None:
        scope.diagnostics.append(problem)
        return
    if method.takes in ROW_OPERANDS:
        check_fit_rows(fitted_block(method, values), parts, scope)
    if method.takes == "jacobian" and not isinstance(values[1], ast.SiteMap):
        scope.diagnostics.append(
            BadArgument(
                span=values[1].span,
                name=call.name,
                reason="takes two sites with `->` between them",
                hint=f"write `{method.example}`",
            )
        )
    for value in values if method.takes == "directions" else ():
        name = value.id if isinstance(value, ast.Name) else value.span.written
        scope.use("direction", name, value.span)
    if method.takes == "tokens":
        _check_matrix_rows(call, method, values, parts, scope)
    if method.takes in ("file", "dictionary"):
        _check_texts(call, method, values, parts, scope)


def _missing_argument(
    call: ast.Call, method: BasisMethod, values: Sequence[ast.Node]
) -> BadArgument | None:
    """Return E0207 for a call with a wrong number of operands, or without a required option."""
    one, two = ("block", "dictionary", "python"), ("value and block", "jacobian", "file")
    wanted = {**dict.fromkeys(one, 1), **dict.fromkeys(two, 2)}
    fewest = {"tokens": 2, "directions": 1}.get(method.takes)
    exact = len(values) == wanted.get(method.takes, 0)
    enough = exact if fewest is None else len(values) >= fewest
    given = {OTHER_OPTIONS.get(a.name, a.name) for a in call.arguments if a.name is not None}
    missing = [each for each in method.required if each not in given]
    if enough and not missing:
        return None
    mapped = any(isinstance(value, ast.SiteMap) for value in values)
    example = BASIS_METHODS["jacobian"].example if mapped else method.example
    return BadArgument(
        span=call.span,
        name=call.name,
        reason=f"needs `{missing[0]}: …`" if enough else f"is written `{method.example}`",
        hint=f"write `{example}`",
    )


def _check_matrix_rows(
    call: ast.Call,
    method: BasisMethod,
    values: Sequence[ast.Node],
    parts: Definitions,
    scope: Namespace,
) -> None:
    """Report E0207 unless the arguments are `unembed` and texts."""
    if not (isinstance(values[0], ast.Name) and values[0].id == "unembed"):
        scope.diagnostics.append(
            BadArgument(
                span=values[0].span,
                name=call.name,
                reason=f"has no matrix `{values[0].span.written}`",
                hint=f"write `{method.example}`",
            )
        )
    _check_texts(call, method, values[1:], parts, scope)


def _check_texts(
    call: ast.Call,
    method: BasisMethod,
    values: Sequence[ast.Node],
    parts: Definitions,
    scope: Namespace,
) -> None:
    for value in values:
        if not isinstance(constant_value(value, parts.parameters), str):
            scope.diagnostics.append(
                BadArgument(
                    span=value.span,
                    name=call.name,
                    reason="takes texts in quotes",
                    hint=f"write `{method.example}`",
                )
            )
