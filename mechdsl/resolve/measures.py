"""Measures: expressions over metrics, with every text turned into token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import NoLogits, NoSuchOutput
from mechdsl.models.shape import ModelShape
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.class_outputs import output_elsewhere, output_positions
from mechdsl.resolve.measure_context import MeasureContext, refuse
from mechdsl.resolve.measured_places import at_places, places_of
from mechdsl.resolve.metric_atoms import resolve_atom
from mechdsl.resolve.resolved import Atom, Labels, ResolvedMeasure
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def resolve_measure(
    expression: ast.Expr,
    context: MeasureContext,
    *,
    label: str,
    at: ast.Position | None = None,
    runs: tuple[str, ...] = (),
    observed: bool = False,
) -> ResolvedMeasure | None:
    """The measure with its atoms, at the first of the places that it is read at; None after an
    error.

    `runs` are those that it is read on; `at` is found in each one's own text; `observed`: it is of
    what the experiment looks at. Codes: E0108, E0203, E0437, E0438, E0442 to E0446, E0507, E0612
    and those of texts and positions.
    """
    found = resolve_everywhere(
        expression, context, label=label, at=at, runs=runs, observed=observed
    )
    return None if found is None else found[0][1]


def resolve_everywhere(
    expression: ast.Expr,
    context: MeasureContext,
    *,
    label: str,
    at: ast.Position | None = None,
    runs: tuple[str, ...] = (),
    observed: bool = False,
) -> list[tuple[Labels, ResolvedMeasure]] | None:
    """The measure at each of the places that it is read at, with what tells them apart; as
    `resolve_measure`."""
    before = len(context.diagnostics)
    context.at, context.reads_observed = at, observed
    if not context.items:  # what `{item.index}` stands for is where it is read
        items = (place.item for place in places_of(at, context, runs[:1]))
        context = replace(context, items=tuple(item for item in items if item is not None))
    atoms: dict[ast.Expr, Atom] = {}
    _collect(expression, context, atoms)
    for divisor in divisors(expression):
        _not_zero(divisor, expression, context)
    read = dict.fromkeys((*runs, *(a.run for a in atoms.values() if a.run is not None)))
    places = places_of(at, context, tuple(read) if runs else ())
    shape, model = context.sites.shape, context.sites.model
    if len(context.diagnostics) > before and any(
        d.severity == "error" for d in context.diagnostics[before:]
    ):
        return None
    found = tuple(atoms.values())
    if not _can_be_read(expression, found, at, context):
        return None
    positions: Mapping[str, tuple[int, ...]] | None = None
    if shape.output_at != "every token" and _of_logits(found):
        if at is not None:
            context.diagnostics.append(output_elsewhere(at.span, shape, model))
            return None
        positions = output_positions(context.table, shape)
    elif not shape.causal and not _without_next_token(expression, found, at, context):
        return None
    category = expression in atoms and atoms[expression].form.kind == "category"
    if not category and any(a.form.kind == "category" for a in found):
        refuse(
            context,
            expression.span,
            "categories can't be calculated with",
            "measure it alone, or use `expected(…)`, which is a number",
        )
        return None
    if not _read_alike(expression, found, context):
        return None
    units = {a.form.unit for a in found}
    whole = ResolvedMeasure(
        label=label,
        text=expression.span.written,
        expression=expression,
        atoms=found,
        kind="category" if category else "number",
        unit=units.pop() if len(units) == 1 else "",
        at={} if positions is None else positions,
        truth=_truth(context.table) if category else None,
        observed=observed,
        reply=context.reply if any(a.form.takes == "reply" for a in found) else None,
    )
    everywhere = list(at_places(whole, places, context))
    if not everywhere:
        reason = "no prompt has a token there that another one stands in front of"
        refuse(context, expression.span, reason, "name a later position")
    return everywhere or None


def _can_be_read(
    expression: ast.Expr,
    atoms: Sequence[Atom],
    at: ast.Position | None,
    context: MeasureContext,
) -> bool:
    """Whether it reads the model, what is there, and at a place that it can be read at."""
    if not atoms:
        # Names are of metrics that couldn't be written out, which has been said.
        if not any(isinstance(n, ast.Name) for n in walk(expression)):
            hint = "write a metric such as `logit(answer)`"
            refuse(context, expression.span, "it doesn't read the model", hint)
        return False
    if context.reads_observed and not _of_one_token(expression, atoms, at, context):
        return False
    if at is not None and any(atom.form.takes == "reply" for atom in atoms):
        reason, hint = "a reply is measured as a whole", "leave `at …` out"
        refuse(context, expression.span, reason, hint)
        return False
    unread = unreadable(expression, atoms, context.sites.shape, context.sites.model)
    if unread is not None:
        context.diagnostics.append(unread)
    return unread is None


def _read_alike(expression: ast.Expr, atoms: Sequence[Atom], context: MeasureContext) -> bool:
    """Whether all metrics of a measure are read at one place: a token's loss is read in front of
    it, where it is predicted."""
    if len({atom.form.takes == "own" for atom in atoms}) == 1:
        return True
    reason = "the loss of a token is read in front of it, the rest at the token itself"
    refuse(context, expression.span, reason, "measure them in two lines")
    return False


def _of_one_token(
    expression: ast.Expr, atoms: Sequence[Atom], at: ast.Position | None, context: MeasureContext
) -> bool:
    """Whether a measure can be read off what is observed: one distribution over next tokens."""
    seen = context.observed
    if seen is None or (seen.gives == "number" and at is None):
        return True
    several = any(any(atom.behind) for atom in atoms if atom.texts)
    if at is not None:
        reason, hint = "what is observed says itself where it is", "leave `at …` out"
    elif any(atom.form.takes in ("prompt", "own", "activations", "reply") for atom in atoms):
        reason = "it reads more than one distribution over next tokens"
        hint = "measure it in an experiment without `observe`"
    elif several and not context.tokenizer.stands_in:
        reason, hint = "its text has several tokens", "name a text of one token"
    else:
        return True
    refuse(context, expression.span, reason, hint)
    return False


def _of_logits(atoms: Sequence[Atom]) -> list[Atom]:
    return [atom for atom in atoms if atom.form.of_outputs]


def unreadable(
    expression: ast.Expr, atoms: Sequence[Atom], shape: ModelShape, model: str
) -> Diagnostic | None:
    """E0437 for what reads logits of a model that gives none, E0438 for tokens that it gives none
    for."""
    text, span = expression.span.written, expression.span
    logits = _of_logits(atoms)
    if not logits:
        return None
    named = shape.architecture
    if "logits" not in shape.sites:
        return NoLogits(span=span, text=text, model=model, architecture=named)
    if not shape.d_logits:
        return None
    tokens = [atom for atom in logits if not atom.of_class]
    asked = [token for atom in tokens for token in atom.named]
    if any(atom.form.takes == "prompt" for atom in tokens):  # the prompt's own tokens
        asked.append(shape.vocab_size - 1)
    beyond = [token for token in asked if token >= shape.outputs]
    if not beyond:
        return None
    return NoSuchOutput(
        span=span,
        text=text,
        token=max(beyond),
        model=model,
        outputs=shape.outputs,
        architecture=named,
    )


def _without_next_token(
    expression: ast.Expr,
    atoms: Sequence[Atom],
    at: ast.Position | None,
    context: MeasureContext,
) -> bool:
    """Whether a model that sees the whole prompt can measure this: as far as is known, it doesn't
    predict what comes next."""
    logits = _of_logits(atoms)
    shape = context.sites.shape
    next_token = at is None or any(a.form.takes == "prompt" for a in logits)
    if logits and at is None and shape.task != "tokens":
        reason = f"`{shape.architecture}` has outputs for each token"
        hint = 'write which token is read, as in `at "…" token` or `at subject token`'
    elif shape.task != "tokens":
        return True
    elif logits and next_token and not shape.masked:
        reason = f"the config of `{shape.architecture}` doesn't say that it predicts the next token"
        hint = "take a model whose `architectures` end in `ForCausalLM`, or write where one token "
        hint += 'is read: `at "…" token`'
    elif logits and at is None:
        reason = "a masked language model predicts tokens in their own place"
        hint = 'write where: `at "[MASK]" token`, with the tokenizer\'s own mask in the template'
    elif any(a.form.takes in ("prompt", "own") for a in logits):
        reason = "a masked language model has no loss of tokens that it sees"
        hint = 'measure `logprob(answer) at "[MASK]" token`'
    elif any(
        a.form.takes == "continuation" and any(len(ids) > 1 for t in a.texts.values() for ids in t)
        for a in logits
    ):
        reason = "without a next token, one token is predicted in one place"
        hint = "use answers of one token"
    else:
        return True
    refuse(context, expression.span, reason, hint)
    return False


def evaluate(expression: ast.Expr, value: Callable[[ast.Expr], Any]) -> Any:
    """The expression's value; `value` gives that of an atom (arrays broadcast)."""
    match expression:
        case ast.Number(value=number):
            return number
        case ast.Percent(value=percent):
            return percent / 100
        case ast.Negative(operand=operand):
            return -evaluate(operand, value)
        case ast.Not(operand=operand):
            return evaluate(operand, value) == 0
        case ast.Binary(operator=operator, left=left, right=right):
            return _ARITHMETIC[operator](evaluate(left, value), evaluate(right, value))
        case ast.Compare(operator=operator, left=left, right=right):
            return _COMPARISONS[operator](evaluate(left, value), evaluate(right, value)) * 1.0
        case ast.Logical(operator=operator, left=left, right=right):
            a, b = evaluate(left, value) != 0, evaluate(right, value) != 0
            return ((a & b) if operator == "and" else (a | b)) * 1.0
        case _:
            return value(expression)


def divisors(expression: ast.Expr) -> Iterator[ast.Expr]:
    """What an expression divides by, outside of its metrics."""
    match expression:
        case ast.Negative(operand=operand) | ast.Not(operand=operand):
            yield from divisors(operand)
        case ast.Binary() | ast.Compare() | ast.Logical():
            yield from divisors(expression.left)
            yield from divisors(expression.right)
            if isinstance(expression, ast.Binary) and expression.operator == "/":
                yield expression.right
        case _:
            return


_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _collect(expression: ast.Expr, context: MeasureContext, atoms: dict[ast.Expr, Atom]) -> None:
    """Every atom of the expression, resolved once."""
    match expression:
        case ast.Number() | ast.Percent():
            return
        case ast.Negative(operand=operand) | ast.Not(operand=operand):
            _collect(operand, context, atoms)
        case ast.Binary() | ast.Compare() | ast.Logical():
            _collect(expression.left, context, atoms)
            _collect(expression.right, context, atoms)
        case ast.Name() | ast.Call():
            if expression not in atoms:
                atom = resolve_atom(expression, context)
                if atom is not None:
                    atoms[expression] = atom
        case _:
            refuse(
                context,
                expression.span,
                "it is not a metric",
                "metrics are written as `logit(answer)`, and can be added and subtracted",
            )


def _not_zero(divisor: ast.Expr, expression: ast.Expr, context: MeasureContext) -> None:
    """E0612 for a divisor that is 0 whatever the model says."""
    if any(isinstance(node, ast.Name | ast.Call) for node in walk(divisor)):
        return
    try:
        zero = evaluate(divisor, lambda node: math.nan) == 0
    except ZeroDivisionError:
        return  # within it something is divided by 0, which is said there
    if zero:
        hint = "write a divisor that isn't 0"
        refuse(context, divisor.span, "it divides by 0", hint, of=expression.span)


def _truth(table: PromptTable) -> tuple[float, ...] | None:
    """The number that each row's answer spells; None where an answer is not a number."""
    found: list[float] = []
    for row in table.runs["clean"].rows:
        answer = row.texts.get("answer")
        try:
            found.append(float(answer.text) if answer is not None else float("nan"))
        except ValueError:
            return None
    return tuple(found)
