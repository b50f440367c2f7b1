"""Outputs of classifiers in measures: `class answer`, `class "positive"`, `class 5`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from mechdsl.base import limits
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e04_model import NoLogits
from mechdsl.diagnostics.e04_outputs import (
    ClassOfTokens,
    OtherTask,
    OutputElsewhere,
    TokenOfLabels,
    UnknownLabel,
)
from mechdsl.models.shape import ModelShape
from mechdsl.prompts.answers import output_texts, quoted
from mechdsl.prompts.prompt_table import PromptTable, TextTokens
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form, Metric, Takes

SHOWN = 5
"""Labels that a message lists."""

_OF_TOKENS: frozenset[Takes] = frozenset({"target", "any", "continuation", "numerals", "prompt"})
_OF_THE_WHOLE: frozenset[Takes] = frozenset({"reference", "nothing"})


def class_argument(
    node: ast.Expr, metric: Metric, shape: ModelShape, *, of_images: bool = False
) -> ast.ClassOutput | None:
    """The class that a metric is of; `correct` alone is of the answer's on a classifier, and what a
    metric of images is of is never a token."""
    arguments = node.arguments if isinstance(node, ast.Call) else ()
    if len(arguments) == 1 and isinstance(arguments[0].value, ast.ClassOutput):
        return arguments[0].value
    if of_images and len(arguments) == 1 and form_of_class(metric, shape) is not None:
        value = arguments[0].value
        if isinstance(value, ast.Name | ast.String | ast.OfRef) and "reference" not in metric.forms:
            return ast.ClassOutput(value, span=value.span)
    alone = next((form.default for form in metric.forms.values() if form.default is not None), None)
    if arguments or alone is None or shape.task == "tokens":
        return None
    return ast.ClassOutput(ast.Name(alone, span=node.span), span=node.span)


def form_of_class(metric: Metric, shape: ModelShape) -> Form | None:
    """The form of a metric that takes a class; None where it has none."""
    kinds: tuple[Takes, ...] = ("target", "class", "continuation")
    if shape.task == "many labels":
        kinds = ("label", *kinds)
    return next((metric.forms[kind] for kind in kinds if kind in metric.forms), None)


def refused_class(
    node: ast.Expr, name: str, wanted: ast.ClassOutput, shape: ModelShape, model: str
) -> Diagnostic | None:
    """Why a metric can't be of a class of this model (E0437, E0443, E0445), or None."""
    if shape.stands_in:
        return None
    text = node.span.written
    if "logits" not in shape.sites:
        return NoLogits(span=node.span, text=text, model=model, architecture=shape.architecture)
    if not shape.d_logits:
        named = wanted.of.span.written
        hint = f"write `{name}({named})`, the token of a text"
        if isinstance(wanted.of, ast.Number):
            hint = f"write `{name}(answer)`, the token of a text; outputs that are no tokens are "
            hint += "known of a model that Python hands over"
        return ClassOfTokens(
            span=node.span, text=text, model=model, architecture=shape.architecture, hint=hint
        )
    if shape.task == "number" and name != "output":
        return _no_logits(node, shape, model)
    if shape.task != "number" and name == "output":
        return _no_number(node, shape, model)
    return None


def refused_form(
    node: ast.Expr, name: str, form: Form, shape: ModelShape, model: str
) -> Diagnostic | None:
    """Why a metric that isn't of a class has no meaning on this model (E0444, E0445), or None."""
    if shape.stands_in:
        return None
    text = node.span.written
    if name == "output" and (shape.task != "number" or shape.outputs > 1):
        return _no_number(node, shape, model)
    if shape.task == "tokens" or name == "output":
        return None
    if form.takes in _OF_TOKENS:
        hint = f"write `class`, as in `{name}(class answer)`: the answer is the name of a label"
        if form.takes == "numerals":
            hint = "write `class`, as in `prob(class answer)`: one label at a time"
        if shape.task == "number":
            return _no_logits(node, shape, model)
        labels = f"its labels are {listed(shape)}"
        return TokenOfLabels(span=node.span, text=text, model=model, labels=labels, hint=hint)
    if form.takes in _OF_THE_WHOLE and shape.task != "one label":
        reason = "each of its labels holds or not by itself, so they have no distribution"
        hint = f"measure them one by one: `prob(class {_example(shape)})`"
        if shape.task == "number":
            reason = "it is a regression: its outputs are numbers, and have no distribution"
            hint = f"write `{_of_number(shape)}`"
        return OtherTask(span=node.span, text=text, model=model, reason=reason, hint=hint)
    return None


def _no_logits(node: ast.Expr, shape: ModelShape, model: str) -> Diagnostic:
    """E0445 for a metric of logits, on a regression."""
    return OtherTask(
        span=node.span,
        text=node.span.written,
        model=model,
        reason="it is a regression: its outputs are numbers, and no logits",
        hint=f"write `{_of_number(shape)}`",
    )


def _no_number(node: ast.Expr, shape: ModelShape, model: str) -> Diagnostic:
    """E0445 for `output`, where there isn't one number."""
    if shape.task == "number":
        reason = f"it gives {shape.outputs} numbers"
        hint = f"say which, as in `{_of_number(shape)}`"
    else:
        tokens = shape.task == "tokens"
        reason = f"its outputs are logits of {'tokens' if tokens else 'labels'}, and not one number"
        hint = f"write `logit({'answer' if tokens else 'class answer'})`"
    return OtherTask(span=node.span, text=node.span.written, model=model, reason=reason, hint=hint)


def _of_number(shape: ModelShape) -> str:
    return "output" if shape.outputs == 1 else f"output(class {_example(shape)})"


def _example(shape: ModelShape) -> str:
    return f'"{shape.labels[0]}"' if shape.labels else "0"


def listed(shape: ModelShape) -> str:
    """The labels for a message, the first ones of many."""
    if not shape.labels:
        return f"numbers, from 0 to {shape.outputs - 1}"
    more = len(shape.labels) - SHOWN
    first = ", ".join(quoted(label) for label in shape.labels[:SHOWN])
    return f"{first} and {more} more" if more > 0 else first


def class_numbers(
    wanted: ast.ClassOutput, table: PromptTable, shape: ModelShape, model: str
) -> tuple[tuple[int, ...], list[Diagnostic]]:
    """The number of the output that is meant, for every row. A text is the name of a label, and
    where labels have none of their own, the number of an output. Codes: E0442 and those of
    texts."""
    of = wanted.of
    count = len(table)
    if isinstance(of, ast.Number):
        texts = (TextTokens(str(of.value), (), of_output=True),) * count
    else:
        labels = "named" if shape.names_labels else "numbered"
        texts, problems = output_texts(table, of, labels)
        if problems:
            return (), problems
    if shape.stands_in:
        return (0,) * count, []
    by_name = {label.strip(): n for n, label in reversed([*enumerate(shape.labels)])}
    by_number = {str(n): n for n in range(min(shape.outputs, limits.SIZE))}
    either = by_name if shape.names_labels else {**by_number, **by_name}
    found = [(by_number if t.of_output else either).get(t.text.strip()) for t in texts]
    lost = Counter(t for t, n in zip(texts, found, strict=True) if n is None)
    if lost:
        return (), [_unknown(of, lost, count, shape, model)]
    return tuple(cast("list[int]", found)), []


def _unknown(
    of: ast.Expr, lost: Mapping[TextTokens, int], rows: int, shape: ModelShape, model: str
) -> Diagnostic:
    first = next(iter(lost))
    text = first.text.strip()
    numbered = first.of_output or not shape.labels
    what = f"output {text}" if first.of_output else f"label {quoted(text)}"
    last = shape.outputs - 1
    where = f"its labels are {listed(shape)}"
    if numbered:
        where = f"its outputs are numbered from 0 to {last}"
    if not isinstance(of, ast.Number | ast.String):
        of_rows = sum(lost.values())
        where = f"in {of_rows:,} of {rows:,} rows; {where}"
    hint = f"write a number from 0 to {last}"
    if not numbered:
        otherwise = "write one of its labels, as its config has them (`id2label`)"
        if isinstance(of, ast.String):
            otherwise += f", or a number without quotes, as in `class {last}`"
        elif text.isdecimal():
            otherwise += "; numbers of outputs are written `token_id(…)`"
        hint = did_you_mean(text, shape.labels, otherwise)
    return UnknownLabel(span=of.span, model=model, what=what, where=where, hint=hint)


# --- where there is one output for a whole prompt ------------------------------------------------


def output_elsewhere(at: Span, shape: ModelShape, model: str) -> Diagnostic:
    """E0446 for a position behind a measure."""
    return OutputElsewhere(
        span=at,
        model=model,
        at=at.written.removeprefix("at "),
        made_of=made_of(shape),
        unit="image" if shape.takes == "image" else "prompt",
    )


def made_of(shape: ModelShape) -> str:
    """What the one output of a model is made of, in words."""
    if shape.output_at == "image":
        return "the whole image"
    if shape.output_at == "first token":
        return "token 0, special tokens counted"
    pad = shape.config.get("pad_token_id")
    return "the last token, special tokens counted" + (
        ", pad tokens not" if pad is not None else ""
    )


def output_positions(table: PromptTable, shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Per run and row, the token that the one output is made of; empty where that is always the
    last one."""
    found: dict[str, tuple[int, ...]] = {}
    for name, run in table.runs.items():
        found[name] = tuple(_position(row.ids, shape) for row in run.rows)
    last = all(
        at == len(row.ids) - 1
        for name, run in table.runs.items()
        for at, row in zip(found[name], run.rows, strict=True)
    )
    return {} if last else found


def _position(ids: Sequence[int], shape: ModelShape) -> int:
    """As transformers finds it in a prompt by itself; the first where all are the pad token."""
    if shape.output_at in ("first token", "image"):
        return 0
    pad = shape.config.get("pad_token_id")
    return next((n for n in reversed(range(len(ids))) if ids[n] != pad), 0)
