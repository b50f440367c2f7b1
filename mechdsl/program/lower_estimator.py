"""`using integrated_gradients(steps: 32)`: what effects are estimated by; no cell is run then."""

from __future__ import annotations

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.e02_names import BadArgument, UnknownWord, did_you_mean
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.sort_statements import Statements
from mechdsl.syntax import ast

LATER = ("atp", "relp", "eap", "eap_ig")
"""Estimators that the language has and no stage executes yet."""
STEPS = 32
"""Of integrated gradients, where the file says no number."""


def lower_estimator(work: Statements) -> spec.Estimator | None:
    """The `using` line of an experiment. Codes: E0108, E0203, E0207."""
    if not work.using:
        return None
    line = work.using[0]
    named = line.estimator
    name = named.id if isinstance(named, ast.Name) else named.name
    arguments = () if isinstance(named, ast.Name) else named.arguments
    if name in LATER:
        work.later(line.span, f"`using {name}`")
        return None
    if name not in spec.ESTIMATORS:
        known = (*spec.ESTIMATORS, *LATER)
        hint = did_you_mean(name, known, f"write one of {', '.join(spec.ESTIMATORS)}")
        problem = UnknownWord(span=named.span, kind="estimator", word=name, hint=hint)
        work.diagnostics.append(problem)
        return None
    if line.verify:
        first, last = line.verify[0].span, line.verify[-1].span
        work.later(Span(first.source, first.start, last.end), "`verify`")
    steps = STEPS if name == spec.INTEGRATED else None
    for argument in arguments:
        if steps is None or argument.name != "steps" or len(arguments) > 1:
            reason = "takes no such argument"
            hint = "write `integrated_gradients(steps: 32)`" if steps else f"write `using {name}`"
            _bad(argument.span, name, reason, hint, work)
            return None
        steps = _steps(argument, work)
    return spec.Estimator(span=line.span, name=name, steps=steps)


def _steps(argument: ast.Argument, work: Statements) -> int:
    """How many points of the line gradients are taken at."""
    value = constant(argument.value, work.parts.parameters)
    if isinstance(argument.value, ast.Name):
        work.scope.has("param", argument.value.id)
    if type(value) is int and 1 <= value <= limits.STEPS:
        return value
    reason = f"must be a whole number from 1 to {limits.STEPS:,}"
    _bad(argument.span, "steps", reason, f"write `steps: {STEPS}`", work)
    return STEPS


def _bad(span: Span, name: str, reason: str, hint: str, work: Statements) -> None:
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
