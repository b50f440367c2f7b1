"""Sets of answers in metrics: `prob(answer, alias)`, `prob(label + 1..99)`, `expected(1..9)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.answer_sets import Part, TokenSets, accepted
from mechdsl.resolve.measure_context import (
    MeasureContext,
    environments,
    multi_token,
    refuse,
)
from mechdsl.resolve.resolved import Atom, Env
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.metrics import Form

DIGITS = "digits"
"""`prob(0..99, digits: 2)`: how wide numerals are written."""


def of_set(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    """Any of several texts, or of numerals, of each row; None after an error."""
    parts = [cast("Part", a.value) for a in arguments if a.name is None]
    digits = _digits(node, name, arguments, parts, context)
    if digits is None or not all(_fits_in_set(part, node, name, context) for part in parts):
        return None
    envs = environments(parts, context)
    if envs is None:
        return None
    sets: dict[Env, TokenSets] = {}
    for env in envs:
        rows, problems = accepted(
            context.table,
            parts,
            context.tokenizer,
            extra=context.names_of(env),
            digits=digits or None,
        )
        context.diagnostics.extend(problems)
        if has_errors(problems):
            return None
        if form.takes == "numerals" and any(each.number is None for row in rows for each in row):
            refuse(context, node.span, "not all of it are whole numbers", f"write `{name}(1..9)`")
            return None
        every = ((n, e.text) for n, row in enumerate(rows) for e in row)
        long = next((each for each in every if len(each[1].ids) != 1), None)
        if context.tokenizer.stands_in and name == "logprob":
            long = None
        if long is not None and name == "logprob":
            reason = f"`{long[1].text}` is several tokens, and texts of several are read one by one"
            refuse(context, node.span, reason, "measure `logprob(…)` of each text by itself")
            return None
        if long is not None:
            context.diagnostics.append(multi_token(parts, name, *long, context))
            return None
        sets[env] = TokenSets.made_of(rows)
    return Atom(node, name, form, sets=sets)


def _fits_in_set(part: Part, node: ast.Expr, name: str, context: MeasureContext) -> bool:
    """Whether it can be one of several; E0612 for numerals that are none, whatever the row."""
    if isinstance(part, ast.ClassOutput | ast.Site | ast.Quantity):
        reason = f"`{part.span.written}` can't be one of several"
        refuse(context, part.span, reason, f"write `{name}(answer, wrong)`: texts", of=node.span)
        return False
    if not isinstance(part, ast.Range):
        return True
    low, high = (_integer(end, context.parameters) for end in (part.low, part.high))
    reason = ""
    if low is None or high is None:
        fixed = not any(_of_row(end, context.parameters) for end in (part.low, part.high))
        reason = "the numerals must be two whole numbers, the smaller one first" if fixed else ""
    elif low > high:
        reason = "the numerals must be two whole numbers, the smaller one first"
    elif high - low >= limits.NUMERALS:
        reason = f"{high - low + 1:,} numerals are more than {limits.NUMERALS:,}"
    if reason:
        refuse(context, part.span, reason, f"write `{name}(1..9)`", of=node.span)
    return not reason


def _of_row(end: ast.Expr, parameters: Mapping[str, Any]) -> bool:
    """Whether it may be another number in each row."""
    names = (ast.Name, ast.Attribute, ast.Index, ast.Call)
    found = (part for part in walk(end) if isinstance(part, names))
    return any(not isinstance(part, ast.Name) or part.id not in parameters for part in found)


def _digits(
    node: ast.Expr,
    name: str,
    arguments: tuple[ast.Argument, ...],
    parts: Sequence[Part],
    context: MeasureContext,
) -> int | None:
    """How many digits numerals are written with; 0 is as in `answer`, None after an error."""
    given = next((a for a in arguments if a.name is not None), None)
    if given is None:
        return 0
    number = _integer(cast("ast.Expr", given.value), context.parameters)
    if number is None or not 1 <= number <= limits.DIGITS:
        reason = f"`digits` must be a whole number from 1 to {limits.DIGITS}"
        refuse(context, given.span, reason, f"write `{name}(0..99, digits: 2)`", of=node.span)
        return None
    if not any(isinstance(part, ast.Range | ast.ListOf) for part in parts):
        reason = "`digits` is for numerals, and it has none"
        refuse(context, given.span, reason, "leave it out: texts are written out", of=node.span)
        return None
    return number


def _integer(node: ast.Expr, parameters: Mapping[str, Any]) -> int | None:
    match node:
        case ast.Number(value=int(value)):
            return value
        case ast.Negative(operand=ast.Number(value=int(value))):
            return -value
        case ast.Name(id=name) if isinstance(parameters.get(name), int):
            return parameters[name]
        case _:
            return None
