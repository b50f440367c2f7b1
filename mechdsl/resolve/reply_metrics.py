"""Metrics of what a model writes: `exact_match`, `contains("I cannot", "I'm sorry")`, `number`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from mechdsl.prompts.answer_sets import Part, texts_of
from mechdsl.resolve.measure_context import MeasureContext, environments, refuse
from mechdsl.resolve.resolved import Atom, Env
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form
from mechdsl.vocab.reply_metrics import FIRST, LAST, check_pattern

_USAGE = {
    "exact_match": "`exact_match` or `exact_match(answer)`",
    "contains": '`contains("I cannot", "I\'m sorry")`',
    "matches": '`matches("[Nn]o\\b")`',
    "number": "`number` or `number(last)`",
    "length": "`length`",
}


def of_reply(
    node: ast.Expr,
    name: str,
    form: Form,
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> Atom | None:
    """A metric of the reply with what it is compared with, in every row; None after an error.

    Codes: E0612, and those of texts.
    """
    if not has_reply(node, context):
        return None
    given = [each.value for each in arguments]
    rows = len(context.table)
    if any(each.name is not None for each in arguments):
        return _misfit(node, name, "its arguments have no names", context)
    if name == "length":
        if given:
            return _misfit(node, name, "it takes no argument", context)
        return Atom(node, name, form, wanted={None: ((),) * rows})
    if name == "number":
        which = _end(given)
        if which is None:
            return _misfit(node, name, "`first` or `last` number is all that can be asked", context)
        return Atom(node, name, form, wanted={None: ((which,),) * rows})
    if name == "matches":
        pattern = _pattern(node, given, context)
        return (
            None if pattern is None else Atom(node, name, form, wanted={None: ((pattern,),) * rows})
        )
    if not given and form.default is None:
        return _misfit(node, name, "it has no argument", context)
    return _of_texts(node, name, form, given, context)


def has_reply(node: ast.Expr, context: MeasureContext) -> bool:
    """Whether there is something to be read; E0612 where nothing is written."""
    if context.reply is not None:
        return True
    reason = "it reads a reply, and this experiment writes none"
    refuse(context, node.span, reason, "add a line such as `generate 40`")
    return False


def _misfit(node: ast.Expr, name: str, reason: str, context: MeasureContext) -> None:
    refuse(context, node.span, reason, f"write {_USAGE[name]}")


def _end(given: Sequence[object]) -> str | None:
    """Which number of a reply is meant."""
    if not given:
        return FIRST
    word = given[0].id if len(given) == 1 and isinstance(given[0], ast.Name) else ""
    return word if word in (FIRST, LAST) else None


def _pattern(node: ast.Expr, given: Sequence[object], context: MeasureContext) -> str | None:
    """A regular expression as it is written, braces and all."""
    text = given[0] if len(given) == 1 else None
    if not isinstance(text, ast.String):
        return _misfit(node, "matches", "it takes one regular expression in quotes", context)
    try:
        check_pattern(text.value)
    except ValueError as error:
        reason = f"its regular expression is invalid: {error}"
        hint = 'write a character that stands for itself with a backslash: `matches("\\(yes\\)")`'
        refuse(context, text.span, reason, hint, of=node.span)
        return None
    return text.value


def _of_texts(
    node: ast.Expr, name: str, form: Form, given: Sequence[object], context: MeasureContext
) -> Atom | None:
    """Texts of each row, of which any counts."""
    parts = [cast("Part", each) for each in given]
    parts = parts or [ast.Name(form.default or "answer", span=node.span)]
    for part in parts:
        if isinstance(part, ast.ClassOutput | ast.Site | ast.Quantity | ast.EdgeTokenOf):
            reason = f"`{part.span.written}` is no text that a reply could have"
            refuse(context, part.span, reason, f"write {_USAGE[name]}", of=node.span)
            return None
    envs = environments(parts, context)
    if envs is None:
        return None
    wanted: dict[Env, tuple[tuple[str, ...], ...]] = {}
    for env in envs:
        extra = context.names_of(env)
        wanted[env], problems = texts_of(context.table, parts, context.tokenizer, extra)
        context.diagnostics.extend(problems)
        if problems:
            return None
        empty = any(not text.strip() for row in wanted[env] for text in row)
        if empty and not context.table.stands_in:
            every = "every reply has it" if name == "contains" else "no more than an empty reply is"
            refuse(context, node.span, f"one of its texts is empty, and {every}", "name a text")
            return None
    return Atom(node, name, form, wanted=wanted)
