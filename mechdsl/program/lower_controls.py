"""`against random(20, heads) apart from top 5 of X`: what an experiment is set against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e06_controls import BadControl
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.sort_statements import Statements, use_names
from mechdsl.syntax import ast

CONTROLS = ("random",)


def lower_control(work: Statements) -> spec.Control | None:
    """The `against` of an experiment. Codes: E0203, E0630."""
    if not work.against:
        return None
    call = work.against[0].control
    if call.name not in CONTROLS:
        _unknown("control", call.name, call.span, CONTROLS, "write `against random(39)`", work)
        return None
    if not work.rules and not work.unsupported:
        _bad(
            call,
            "no rule of this experiment has targets",
            "add a rule such as `patch layer * head * at last token`",
            work,
        )
        return None
    values = [argument.value for argument in call.arguments]
    if not 1 <= len(values) <= 2 or any(argument.name for argument in call.arguments):
        _bad(
            call,
            "it takes a number, and what is drawn",
            "write `random(39)` or `random(39, heads)`",
            work,
        )
        return None
    draws = constant(values[0], work.parts.parameters)
    if isinstance(values[0], ast.Name):
        work.scope.has("param", values[0].id)
    if not isinstance(draws, int) or isinstance(draws, bool) or not 0 < draws <= limits.DRAWS:
        reason = f"how many must be a whole number from 1 to {limits.DRAWS:,}"
        hint = "write `random(39)`"
        if values[0].span.written in get_args(spec.Drawn):
            hint = f"the number stands first: `random(20, {values[0].span.written})`"
        _bad(call, reason, hint, work)
        return None
    apart = work.against[0].apart
    for site in apart:
        use_names(site, work)
    return spec.Control(span=call.span, draws=draws, what=_what(values[1:], work), apart=apart)


def _what(values: Sequence[ast.Node], work: Statements) -> spec.Drawn | None:
    """What is drawn, where that is said."""
    if not values:
        return None
    word = values[0].span.written
    known = get_args(spec.Drawn)
    for each in known:
        if word == each:
            return each
    hint = f"write one of {', '.join(known)}"
    _unknown("kind of target", word, values[0].span, known, hint, work)
    return None


def _unknown(
    kind: str, word: str, span: Span, known: tuple[str, ...], hint: str, work: Statements
) -> None:
    hint = did_you_mean(word, known, hint)
    work.diagnostics.append(UnknownWord(span=span, kind=kind, word=word, hint=hint))


def _bad(call: ast.Call, reason: str, hint: str, work: Statements) -> None:
    problem = BadControl(span=call.span, text=call.span.written, reason=reason, hint=hint)
    work.diagnostics.append(problem)
