"""Outputs of classifiers in measures: `class answer`, `class "positive"`, `class 5`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from mechdsl.base import limits
from mechdsl.base.text import Span, quote
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.models import (
    ClassOnLanguageModel,
    NoLogits,
    PositionedOutput,
    TaskMismatch,
    TokenOnClassifier,
    UnknownLabel,
)
from mechdsl.models.shape import ModelShape
from mechdsl.program.images import IMAGE_SPAN
from mechdsl.prompts.answers import output_texts
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import TextTokens
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Metric, MetricArgument, MetricForm

_OLD_END = 2

MAX_LISTED_LABELS = 5
"""Maximum number of labels that a message lists."""

_OF_TOKENS: frozenset[MetricArgument] = frozenset(
    {"target", "any", "continuation", "numerals", "prompt"}
)

_OF_THE_WHOLE: frozenset[MetricArgument] = frozenset({"reference", "nothing"})


def find_class_argument(
    node: ast.Expr, metric: Metric, shape: ModelShape, *, of_images: bool = False
) -> ast.ClassOutput | None:
    """Find the class that a metric refers to; None if it refers to a token.

    On a classifier, `correct` without an argument refers to the answer's class. A metric of images
    never refers to a token.
    """
    arguments = node.arguments if isinstance(node, ast.Call) else ()
    if len(arguments) == 1 and isinstance(arguments[0].value, ast.ClassOutput):
        return arguments[0].value
    if of_images and len(arguments) == 1 and select_class_form(metric, shape) is not None:
        value = arguments[0].value
        if (
            isinstance(value, ast.Name | ast.String | ast.QualifiedRef)
            and "reference" not in metric.forms
        ):
            return ast.ClassOutput(value, span=value.span)
    alone = next((form.default for form in metric.forms.values() if form.default is not None), None)
    if shape.side == "text":  # the image of the row
        alone = IMAGE_SPAN if alone is not None or metric.name == "score" else None
    if arguments or alone is None or shape.task == "tokens":
        return None
    return ast.ClassOutput(ast.Name(alone, span=node.span), span=node.span)


def select_class_form(metric: Metric, shape: ModelShape) -> MetricForm | None:
    """Return the form of a metric that takes a class; None if it has none."""
    kinds: tuple[MetricArgument, ...] = ("target", "class", "continuation")
    chosen = shape.side and metric.name == "correct"  # the best of all classes, for any such model
    if shape.task == "many labels" and not chosen:
        kinds = ("label", *kinds)
    return next((metric.forms[kind] for kind in kinds if kind in metric.forms), None)


def check_class(
    node: ast.Expr, name: str, wanted: ast.ClassOutput, shape: ModelShape, model: str
) -> Diagnostic | None:
    """Return why a metric can't refer to a class of this model (E0437, E0443, E0445), or None."""
    if shape.stands_in:
        return None
    text = node.span.written
    if name == "score" and not shape.side:
        reason = "it has no image and text towers that score each other"
        hint = f"write `logit({wanted.span.written})`"
        return TaskMismatch(span=node.span, text=text, model=model, reason=reason, hint=hint)
    if "logits" not in shape.sites:
        return NoLogits(span=node.span, text=text, model=model, architecture=shape.architecture)
    if not shape.d_logits and not shape.side:
        named = wanted.of.span.written
        hint = f"write `{name}({named})`, the token of a text"
        if isinstance(wanted.of, ast.Number):
            hint = f"write `{name}(answer)`, the token of a text; outputs that aren't tokens are "
            hint += "known for a model passed from Python"
        return ClassOnLanguageModel(
            span=node.span, text=text, model=model, architecture=shape.architecture, hint=hint
        )
    if shape.task == "number" and name != "output":
        return _no_logits(node, shape, model)
    if shape.task != "number" and name == "output":
        return _no_number(node, shape, model)
    return None


def check_form(
    node: ast.Expr, name: str, form: MetricForm, shape: ModelShape, model: str
) -> Diagnostic | None:
    """Return why a metric without a class is undefined for this model (E0444, E0445), or None."""
    if shape.stands_in:
        return None
    text = node.span.written
    if name == "output" and (shape.task != "number" or shape.outputs > 1):
        return _no_number(node, shape, model)
    if shape.task == "tokens" or name == "output":
        return None
    if form.takes in _OF_TOKENS and shape.side:
        reason = "its outputs are scores of images and texts, not logits of tokens"
        hint = f"write `score({'answer' if shape.side == 'vision' else IMAGE_SPAN})`"
        return TaskMismatch(span=node.span, text=text, model=model, reason=reason, hint=hint)
    if form.takes in _OF_TOKENS:
        hint = f"write `class`, as in `{name}(class answer)`: the answer is the name of a label"
        if form.takes == "numerals":
            hint = "write `class`, as in `prob(class answer)`: one label at a time"
        if shape.task == "number":
            return _no_logits(node, shape, model)
        labels = f"its labels are {list_labels(shape)}"
        return TokenOnClassifier(span=node.span, text=text, model=model, labels=labels, hint=hint)
    if form.takes in _OF_THE_WHOLE and shape.task != "one label":
        reason = "its labels are independently true or false, so they have no distribution"
        hint = f"measure them separately: `prob(class {_example(shape)})`"
        if shape.task == "number":
            reason = "it is a regression: its outputs are numbers, which have no distribution"
            hint = f"write `{_of_number(shape)}`"
        return TaskMismatch(span=node.span, text=text, model=model, reason=reason, hint=hint)
    return None


def reads_classes(form: MetricForm, shape: ModelShape) -> bool:
    """Return whether a metric reads all outputs of a model that scores texts.

    Only the classes of such a model count as outputs for the metric.
    """
    return bool(shape.side) and form.of_outputs and not form.narrow and form.takes != "label"


def check_classes_exist(
    node: ast.Expr, table: PromptTable, shape: ModelShape, model: str
) -> Diagnostic | None:
    """Return E0445 for a choice if the file lists nothing to choose from."""
    if shape.classes or shape.stands_in or table.stands_in:
        return None
    return TaskMismatch(
        span=node.span,
        text=node.span.written,
        model=model,
        reason="it scores any text, and no line lists the texts to choose from",
        hint='add a line to the block of images, such as `classes "a photo of a {kind}"`',
    )


def check_class_members(
    wanted: ast.ClassOutput,
    numbers: Sequence[int],
    shape: ModelShape,
    model: str,
) -> Diagnostic | None:
    """Return E0442 for a text that isn't one of the classes, if a metric is a choice."""
    other = [number for number in numbers if number >= shape.classes]
    if not other or shape.stands_in:
        return None
    text = shape.labels[other[0]]
    classes = shape.labels[: shape.classes]
    more = len(classes) - MAX_LISTED_LABELS
    first = ", ".join(quote(label) for label in classes[:MAX_LISTED_LABELS])
    where = f"its classes are {first}" + (f" and {more} more" if more > 0 else "")
    if not isinstance(wanted.of, ast.String):
        where = f"in {len(other):,} of {len(numbers):,} rows; {where}"
    hint = did_you_mean(text, classes, f"`score({wanted.of.span.written})` is of any text")
    what = f"class {quote(text)}"
    return UnknownLabel(span=wanted.of.span, model=model, what=what, where=where, hint=hint)


def report_missing_score_text(node: ast.Expr, model: str) -> Diagnostic:
    """Create E0445 for `score` without a text, which it needs in parentheses."""
    reason = "it scores an image with a text, but there is no text here"
    hint = 'write one: `score(answer)`, `score("a photo of a cat")`'
    return TaskMismatch(
        span=node.span, text=node.span.written, model=model, reason=reason, hint=hint
    )


def _no_logits(node: ast.Expr, shape: ModelShape, model: str) -> Diagnostic:
    """Create E0445 for a metric of logits on a regression model."""
    return TaskMismatch(
        span=node.span,
        text=node.span.written,
        model=model,
        reason="it is a regression: its outputs are numbers, not logits",
        hint=f"write `{_of_number(shape)}`",
    )


def _no_number(node: ast.Expr, shape: ModelShape, model: str) -> Diagnostic:
    """Create E0445 for `output` on a model that doesn't have a single numeric output."""
    if shape.task == "number":
        reason = f"it outputs {shape.outputs} numbers"
        hint = f"name one, as in `{_of_number(shape)}`"
    else:
        tokens = shape.task == "tokens"
        reason = (
            f"its outputs are logits of {'tokens' if tokens else 'labels'}, not a single number"
        )
        hint = f"write `logit({'answer' if tokens else 'class answer'})`"
    return TaskMismatch(
        span=node.span, text=node.span.written, model=model, reason=reason, hint=hint
    )


def _of_number(shape: ModelShape) -> str:
    return "output" if shape.outputs == 1 else f"output(class {_example(shape)})"


def _example(shape: ModelShape) -> str:
    return f'"{shape.labels[0]}"' if shape.labels else "0"


def list_labels(shape: ModelShape) -> str:
    """List the labels for a message, shortened if there are many."""
    if not shape.labels:
        return f"numbers, from 0 to {shape.outputs - 1}"
    more = len(shape.labels) - MAX_LISTED_LABELS
    first = ", ".join(quote(label) for label in shape.labels[:MAX_LISTED_LABELS])
    return f"{first} and {more} more" if more > 0 else first


def resolve_class_numbers(
    wanted: ast.ClassOutput, table: PromptTable, shape: ModelShape, model: str
) -> tuple[tuple[int, ...], list[Diagnostic]]:
    """Resolve the output number of a class for every row.

    A text names a label or, if the labels have no names, an output number. Codes: E0442 and those
    of texts.
    """
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
    if shape.side and any(text.of_output for text in texts):
        where = "its outputs are texts without numbers"
        hint = "write the text, in quotes"
        what = f"output {of.span.written}"
        return (), [UnknownLabel(span=of.span, model=model, what=what, where=where, hint=hint)]
    by_name = {label.strip(): n for n, label in reversed([*enumerate(shape.labels)])}
    by_number = {str(n): n for n in range(min(shape.outputs, limits.SIZE))}
    either = by_name if shape.names_labels else {**by_number, **by_name}
    class_numbers = [(by_number if t.of_output else either).get(t.text.strip()) for t in texts]
    lost = Counter(t for t, n in zip(texts, class_numbers, strict=True) if n is None)
    if lost:
        return (), [_unknown(of, lost, count, shape, model)]
    return tuple(cast("list[int]", class_numbers)), []


def _unknown(
    of: ast.Expr, lost: Mapping[TextTokens, int], rows: int, shape: ModelShape, model: str
) -> Diagnostic:
    first = next(iter(lost))
    text = first.text.strip()
    numbered = first.of_output or not shape.labels
    what = f"output {text}" if first.of_output else f"label {quote(text)}"
    last = shape.outputs - 1
    where = f"its labels are {list_labels(shape)}"
    if numbered:
        where = f"its outputs are numbered from 0 to {last}"
    if not isinstance(of, ast.Number | ast.String):
        of_rows = sum(lost.values())
        where = f"in {of_rows:,} of {rows:,} rows; {where}"
    hint = f"write a number from 0 to {last}"
    if shape.side == "text":
        where, hint = "it scores texts with images", "write `image`, the image of the row"
    elif not numbered:
        otherwise = "write one of its labels, as its config has them (`id2label`)"
        if isinstance(of, ast.String):
            otherwise += f", or a number without quotes, as in `class {last}`"
        elif text.isdecimal():
            otherwise += "; numbers of outputs are written `token_id(…)`"
        hint = did_you_mean(text, shape.labels, otherwise)
    return UnknownLabel(span=of.span, model=model, what=what, where=where, hint=hint)


# --- where there is one output for a whole prompt ------------------------------------------------


def report_fixed_output(at: Span, shape: ModelShape, model: str) -> Diagnostic:
    """Create E0446 for a measure with a position, on a model with a single output."""
    return PositionedOutput(
        span=at,
        model=model,
        at=at.written.removeprefix("at "),
        made_of=describe_pooling(shape),
        unit="image" if shape.takes == "image" else "prompt",
    )


def find_pooled_token(ids: Sequence[int], shape: ModelShape) -> int:
    """Return the token that a text tower pools.

    This is the last token or, with causal attention, the first end-of-text token. Old configs
    (`eos_token_id` 2) don't specify that token, which has the largest id.
    """
    end = shape.config.get("eos_token_id")
    if not shape.causal:
        return len(ids) - 1
    if end == _OLD_END:
        return max(range(len(ids)), key=ids.__getitem__)
    return ids.index(end) if end in ids else 0


def describe_pooling(shape: ModelShape) -> str:
    """Describe what the single output of a model is computed from."""
    if shape.output_at == "image":
        return "the whole image"
    if shape.output_at == "first token":
        return "token 0, special tokens counted"
    if shape.side:
        return "the token that ends it" if shape.causal else "the last token, which is padding"
    pad = shape.config.get("pad_token_id")
    return "the last token, special tokens counted" + (
        ", pad tokens not" if pad is not None else ""
    )


def find_output_positions(table: PromptTable, shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    """Return the token that the single output is computed from, by run and row.

    Empty if it is always the last token.
    """
    positions: dict[str, tuple[int, ...]] = {}
    for name, run in table.runs.items():
        positions[name] = tuple(_position(row.ids, shape) for row in run.rows)
    last = all(
        at == len(row.ids) - 1
        for name, run in table.runs.items()
        for at, row in zip(positions[name], run.rows, strict=True)
    )
    return {} if last else positions


def _position(ids: Sequence[int], shape: ModelShape) -> int:
    """Return the token that transformers pools in a prompt; the first if all are padding."""
    if shape.output_at in ("first token", "image"):
        return 0
    if shape.side:
        return find_pooled_token(ids, shape)
    pad = shape.config.get("pad_token_id")
    return next((n for n in reversed(range(len(ids))) if ids[n] != pad), 0)
