"""Resolve measures: expressions over metrics, with every text as token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import product
from typing import Any, TypeAlias, cast

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun, find_run, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.experiments import UnreadableMeasure
from mechdsl.diagnostics.models import NoLogits, NoSuchOutput
from mechdsl.diagnostics.rules import AxisDoesNotFit
from mechdsl.diagnostics.syntax import NotSupported, UnknownName, UnknownWord
from mechdsl.models.shape import ModelShape
from mechdsl.program.python_functions import find_function, is_python_call, metric_use
from mechdsl.program.references import argument_names
from mechdsl.prompts.answers import (
    SetExpression,
    TokenSets,
    accepted_texts,
    accepted_tokens,
    is_list,
    right_numbers,
    text_tokens,
)
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, ReplyPosition, TextTokens
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN, ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.class_outputs import (
    check_class,
    check_class_members,
    check_classes_exist,
    check_form,
    find_class_argument,
    find_output_positions,
    reads_classes,
    report_fixed_output,
    report_missing_score_text,
    resolve_class_numbers,
    select_class_form,
)
from mechdsl.resolve.loops import evaluate_arithmetic, iter_divisors
from mechdsl.resolve.sites import (
    MeasureContext,
    find_item_numbers,
    find_side,
    report_misspelt_token,
    report_multi_token,
    report_unreadable,
    resolve_site,
)
from mechdsl.resolve.types import (
    AxisLabels,
    ItemNumber,
    MetricTerm,
    ResolvedMeasure,
    find_image_layout,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import rewrite, walk
from mechdsl.vocab.metrics import FIRST, LAST, METRICS, MetricArgument, MetricForm, check_pattern
from mechdsl.vocab.sites import SITES

Arguments: TypeAlias = tuple[ast.Argument, ...]
MetricBuilder: TypeAlias = Callable[[MetricTerm, Arguments, MeasureContext], MetricTerm | None]
"""Fills in the arguments of a term, which has only the fields `node`, `name` and `form`."""

_REPLY_USAGE = {
    "exact_match": "`exact_match` or `exact_match(answer)`",
    "contains": '`contains("I cannot", "I\'m sorry")`',
    "matches": '`matches("[Nn]o\\b")`',
    "number": "`number` or `number(last)`",
    "length": "`length`",
}


def resolve_reply_metric(
    term: MetricTerm, arguments: Arguments, context: MeasureContext
) -> MetricTerm | None:
    """Resolve a metric of the reply and the texts that it compares with; None after an error.

    Codes: E0612, and those of texts.
    """
    if not check_reply(term.node, context):
        return None
    given = [argument.value for argument in arguments]
    rows = len(context.table)
    if any(argument.name is not None for argument in arguments):
        return _report_reply_usage(term, "its arguments have no names", context)
    if term.name == "length":
        if given:
            return _report_reply_usage(term, "it takes no argument", context)
        return replace(term, wanted={None: ((),) * rows})
    if term.name == "number":
        which = _numeral_end(given)
        if which is None:
            return _report_reply_usage(
                term, "only the `first` or `last` number can be read", context
            )
        return replace(term, wanted={None: ((which,),) * rows})
    if term.name == "matches":
        pattern = _pattern(term, given, context)
        return None if pattern is None else replace(term, wanted={None: ((pattern,),) * rows})
    if not given and term.form.default is None:
        return _report_reply_usage(term, "it has no argument", context)
    return _of_texts(term, given, context)


def check_reply(node: ast.Expr, context: MeasureContext) -> bool:
    """Check that the experiment generates a reply; otherwise report E0612."""
    if context.reply is not None:
        return True
    reason = "it reads a reply, and this experiment generates none"
    report_unreadable(context, node.span, reason, "add a line such as `generate 40`")
    return False


def _report_reply_usage(term: MetricTerm, reason: str, context: MeasureContext) -> None:
    report_unreadable(context, term.node.span, reason, f"write {_REPLY_USAGE[term.name]}")


def _numeral_end(given: Sequence[object]) -> str | None:
    """Return whether the first or the last number of a reply is meant; None if neither."""
    if not given:
        return FIRST
    word = given[0].id if len(given) == 1 and isinstance(given[0], ast.Name) else ""
    return word if word in (FIRST, LAST) else None


def _pattern(term: MetricTerm, given: Sequence[object], context: MeasureContext) -> str | None:
    """Return a regular expression verbatim, including braces."""
    text = given[0] if len(given) == 1 else None
    if not isinstance(text, ast.String):
        return _report_reply_usage(term, "it takes one regular expression in quotes", context)
    try:
        check_pattern(text.value)
    except ValueError as error:
        reason = f"its regular expression is invalid: {error}"
        hint = 'escape special characters with a backslash: `matches("\\(yes\\)")`'
        report_unreadable(context, text.span, reason, hint, of=term.node.span)
        return None
    return text.value


def _of_texts(
    term: MetricTerm, given: Sequence[object], context: MeasureContext
) -> MetricTerm | None:
    """Resolve the texts of each row, any of which matches."""
    parts = [cast("SetExpression", each) for each in given]
    parts = parts or [ast.Name(term.form.default or "answer", span=term.node.span)]
    for part in parts:
        if isinstance(part, ast.ClassOutput | ast.SiteValue | ast.Quantity | ast.EdgeTokenOf):
            reason = f"`{part.span.written}` is not a text that a reply could contain"
            report_unreadable(
                context, part.span, reason, f"write {_REPLY_USAGE[term.name]}", of=term.node.span
            )
            return None
    envs = find_item_numbers(parts, context)
    if envs is None:
        return None
    wanted: dict[ItemNumber, tuple[tuple[str, ...], ...]] = {}
    for env in envs:
        extra = context.names_of(env)
        wanted[env], problems = accepted_texts(context.table, parts, context.tokenizer, extra)
        context.diagnostics.extend(problems)
        if problems:
            return None
        empty = any(not text.strip() for row in wanted[env] for text in row)
        if empty and not context.table.stands_in:
            every = (
                "every reply contains it"
                if term.name == "contains"
                else ("which is true only of an empty reply")
            )
            report_unreadable(
                context, term.node.span, f"one of its texts is empty, and {every}", "name a text"
            )
            return None
    return replace(term, wanted=wanted)


DIGITS_ARGUMENT = "digits"
"""Argument with the width of numerals: `prob(0..99, digits: 2)`."""


def resolve_set_metric(
    term: MetricTerm, arguments: Arguments, context: MeasureContext
) -> MetricTerm | None:
    """Resolve a metric of any of several texts or numerals, for each row; None after an error."""
    parts = [cast("SetExpression", a.value) for a in arguments if a.name is None]
    right = parts[1] if term.form.compared and len(parts) > 1 else None
    parts = parts[:1] if term.form.compared else parts
    digits = _digits(term, arguments, parts, context)
    if digits is None or not all(
        _fits_in_set(part, term.node, term.name, context) for part in parts
    ):
        return None
    envs = find_item_numbers([*parts, right], context)
    if envs is None:
        return None
    sets: dict[ItemNumber, TokenSets] = {}
    for env in envs:
        rows, problems = accepted_tokens(
            context.table,
            parts,
            context.tokenizer,
            extra=context.names_of(env),
            digits=digits or None,
        )
        context.diagnostics.extend(problems)
        if has_errors(problems):
            return None
        if term.form.takes == "numerals" and any(
            tokens.number is None for row in rows for tokens in row
        ):
            report_unreadable(
                context,
                term.node.span,
                "not all of its entries are whole numbers",
                f"write `{term.name}(1..9)`",
            )
            return None
        every = ((n, e.text) for n, row in enumerate(rows) for e in row)
        long = next((each for each in every if len(each[1].ids) != 1), None)
        if long is not None and not _sums_tokens(parts, term.name, *long, context):
            return None
        if long is not None and not context.tokenizer.stands_in:
            by_item = env is not None or any(_differs_by_cell(part, context) for part in parts)
            if not _reads_whole_texts(term.node, by_item, context):
                return None
            texts = [tuple(tokens.text.ids for tokens in row) for row in rows]
            return _of_alternatives(term.node, term.name, texts, context)
        sets[env] = TokenSets.made_of(rows)
        if term.form.compared:
            numbers = _right_numbers(term, right, env, context)
            if numbers is None:
                return None
            sets[env] = sets[env].minus(numbers)
    return replace(term, sets=sets)


def _right_numbers(
    term: MetricTerm, right: SetExpression | None, env: ItemNumber, context: MeasureContext
) -> Sequence[int] | None:
    """Return each row's right number: the answer or a second argument; None after an error."""
    if isinstance(right, ast.Range | ast.ListLiteral):
        reason = f"`{right.span.written}` isn't one number"
        hint = f"pass the right number as the second argument: `{term.name}(1..9, n)`"
        report_unreadable(context, right.span, reason, hint, of=term.node.span)
        return None
    if right is not None:
        numbers, problems = right_numbers(context.table, right, context.names_of(env))
        context.diagnostics.extend(problems)
        return None if problems else numbers
    answers = _truth(context.table) or ()
    if not answers or not all(answer.is_integer() for answer in answers):
        reason = "the answers aren't whole numbers"
        hint = f"pass the right number as the second argument: `{term.name}(1..9, n)`"
        report_unreadable(context, term.node.span, reason, hint)
        return None
    return [int(answer) for answer in answers]


def _sums_tokens(
    parts: Sequence[ast.Node], name: str, row: int, long: TextTokens, context: MeasureContext
) -> bool:
    """Return whether a metric reads texts of several tokens; report E0507 otherwise.

    Also reports a text that is one token with another spelling, such as a space before it.
    """
    problem = None
    whole = METRICS[name].forms.get("continuation")
    if whole is None or whole.joined is None:
        problem = report_multi_token(parts, name, row, long, context)
    elif name != "logprob" and not context.tokenizer.stands_in:
        problem = report_misspelt_token(parts, name, row, long, context)
    if problem is not None:
        context.diagnostics.append(problem)
    return problem is None


def _of_alternatives(
    node: ast.Expr,
    name: str,
    rows: Sequence[tuple[tuple[int, ...], ...]],
    context: MeasureContext,
) -> MetricTerm | None:
    """Resolve a metric of any of several texts, of which some have several tokens.

    The n-th term reads the n-th text of each row. Texts of one token are one term if every row has
    some.
    """
    forms = METRICS[name].forms
    texts = [_without_extensions(row) for row in rows]
    singles = [[ids for ids in row if len(ids) == 1] for row in texts]
    terms: list[MetricTerm] = []
    if all(singles):
        texts = [[ids for ids in row if len(ids) > 1] for row in texts]
        sets = TokenSets(*_number_sets([tuple(ids[0] for ids in row) for row in singles]))
        term = MetricTerm(_part(node, 0), name, forms["any"], sets={None: sets}, part_of=node)
        terms.append(term)
    count = max(map(len, texts))
    if count > limits.ALTERNATIVES:
        reason = f"{count:,} texts of a row are more than {limits.ALTERNATIVES:,}"
        hint = f"name fewer texts, or measure `{name}(first token of …)`"
        report_unreadable(context, node.span, reason, hint)
        return None
    longest_first = [sorted(row, key=len, reverse=True) for row in texts]
    for number in range(count):
        own = [row[number] if number < len(row) else () for row in longest_first]
        filler = next(ids for ids in own if ids)[:1]
        term = MetricTerm(
            _part(node, len(terms)),
            name,
            forms["continuation"],
            texts={None: tuple(ids or filler for ids in own)},
            lacking=tuple(n for n, ids in enumerate(own) if not ids),
            part_of=node,
        )
        terms.append(term)
    return MetricTerm(node, name, forms["any"], alternatives=tuple(terms))


def _without_extensions(row: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the distinct texts of a row, without those that begin with another one.

    A continuation that begins with such a text also begins with the shorter one.
    """
    own = set(row)
    return [
        ids
        for ids in dict.fromkeys(row)
        if not any(ids[:length] in own for length in range(1, len(ids)))
    ]


def _number_sets(
    rows: Sequence[tuple[int, ...]],
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return the distinct sets, and the index of each row's set."""
    numbers = {row: n for n, row in enumerate(dict.fromkeys(rows))}
    return tuple(numbers), tuple(numbers[row] for row in rows)


def _part(node: ast.Expr, number: int) -> ast.Expr:
    """Return the expression of one of several accepted texts."""
    index = ast.Argument("text", ast.Number(number, span=node.span), span=node.span)
    arguments = node.arguments if isinstance(node, ast.Call) else ()
    name = node.name if isinstance(node, ast.Call) else node.span.written
    return ast.Call(name, (*arguments, index), span=node.span)


def _fits_in_set(part: SetExpression, node: ast.Expr, name: str, context: MeasureContext) -> bool:
    """Check that an argument can be one of several; report E0612 if it never is."""
    if isinstance(part, ast.ClassOutput | ast.SiteValue | ast.Quantity):
        reason = f"`{part.span.written}` can't be an entry of a list"
        report_unreadable(
            context, part.span, reason, f"write `{name}(answer, wrong)`: texts", of=node.span
        )
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
        report_unreadable(context, part.span, reason, f"write `{name}(1..9)`", of=node.span)
    return not reason


def _of_row(end: ast.Expr, parameters: Mapping[str, Any]) -> bool:
    """Return whether the end of a range may differ between rows."""
    names = (ast.Name, ast.Attribute, ast.Index, ast.Call)
    parts = (part for part in walk(end) if isinstance(part, names))
    return any(not isinstance(part, ast.Name) or part.id not in parameters for part in parts)


def _digits(
    term: MetricTerm, arguments: Arguments, parts: Sequence[SetExpression], context: MeasureContext
) -> int | None:
    """Return the number of digits of numerals: 0 to match `answer`, None after an error."""
    given = next((a for a in arguments if a.name is not None), None)
    if given is None:
        return 0
    number = _integer(cast("ast.Expr", given.value), context.parameters)
    if number is None or not 1 <= number <= limits.DIGITS:
        reason = f"`digits` must be a whole number from 1 to {limits.DIGITS}"
        report_unreadable(
            context, given.span, reason, f"write `{term.name}(0..99, digits: 2)`", of=term.node.span
        )
        return None
    if not any(isinstance(part, ast.Range | ast.ListLiteral) for part in parts):
        reason = "`digits` applies to numerals, but there are none"
        report_unreadable(
            context, given.span, reason, "remove it: texts are given in full", of=term.node.span
        )
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


def resolve_metric(node: ast.Name | ast.Call, context: MeasureContext) -> MetricTerm | None:
    """Resolve a metric, or a function of a Python file; None after an error.

    Codes: E0108, E0203, E0222, E0442 to E0445, E0507, E0612 and those of texts.
    """
    if isinstance(node, ast.Call) and is_python_call(node):
        return _of_python(node, context)
    name = node.id if isinstance(node, ast.Name) else node.name
    seen = context.observed if context.reads_observed and isinstance(node, ast.Name) else None
    own = seen is not None and (seen.gives == "number" or seen.read_by_measures)
    if seen is not None and own and name in (*context.names, seen.word):
        return MetricTerm(node, seen.word, seen.form)
    if seen is not None and name in seen.controls:
        return MetricTerm(node, name, seen.form_of(name))
    if context.reads_observed and name in context.names and not own:
        return None  # a missing or incomplete observation is reported elsewhere
    metric = METRICS.get(name)
    if metric is None and isinstance(node, ast.Name) and name in context.metrics:
        return None  # its definition has an error that is already reported
    if metric is None:
        if isinstance(node, ast.Name) and name in context.parameters:
            hint = "parameters can't be used in a measure"
        else:
            hint = _other_word(node, name, context)
        context.diagnostics.append(UnknownWord(span=node.span, kind="metric", word=name, hint=hint))
        return None
    arguments = node.arguments if isinstance(node, ast.Call) else ()
    if "reply" in metric.forms:
        return resolve_reply_metric(
            MetricTerm(node, name, metric.forms["reply"]), arguments, context
        )
    shape = context.sites.shape
    images = isinstance(context.tokenizer, ImageTokenizer) or bool(shape.side)
    wanted = find_class_argument(node, metric, shape, of_images=images)
    if name == "score" and wanted is None and not shape.stands_in:
        context.diagnostics.append(report_missing_score_text(node, context.sites.model))
        return None
    if wanted is not None:
        form = select_class_form(metric, shape)
    else:
        form = _select_form(metric.forms, arguments, context)
    if form is None:
        report_unreadable(
            context,
            node.span,
            _explain_misfit(metric.forms, len(arguments)),
            f"write {_usage(name, metric.forms)}",
        )
        return None
    if wanted is not None:
        return _of_class(MetricTerm(node, name, form), wanted, context)
    problem = check_form(node, name, form, shape, context.sites.model)
    chooses = reads_classes(form, shape)
    if problem is None and chooses:
        problem = check_classes_exist(node, context.table, shape, context.sites.model)
    problem = problem or _find_decimal(node, name, arguments)
    if problem is not None:
        context.diagnostics.append(problem)
        return None
    term = _BUILDERS[form.takes](MetricTerm(node, name, form), arguments, context)
    return replace(term, classes=shape.classes) if term is not None and chooses else term


def _find_decimal(
    node: ast.Expr, name: str, arguments: tuple[ast.Argument, ...]
) -> Diagnostic | None:
    """Return E0612 for an argument `1.9`, which is neither a numeral nor a text."""
    values = (argument.value for argument in arguments if argument.name is None)
    for value in values:
        if isinstance(value, ast.Number) and isinstance(value.value, float):
            reason = f"`{value.span.written}` is a decimal, and numerals are whole numbers"
            hint = f'write a text, `{name}("{value.span.written}")`'
            if "numerals" in METRICS[name].forms:
                hint += f", or a range, `{name}(1..9)`"
            return UnreadableMeasure(
                span=value.span, text=node.span.written, reason=reason, hint=hint
            )
    return None


def _other_word(node: ast.Expr, name: str, context: MeasureContext) -> str:
    """Return the hint for a name that isn't a metric."""
    rows = context.table.runs["clean"].rows
    if name in context.metrics:
        return f"`{name}` is defined in this file: write it alone, without brackets"
    if isinstance(node, ast.Name) and rows and name in rows[0].values:
        hint = (
            f"`{name}` is a value of the prompts, but metrics are computed from the model's output"
        )
        if isinstance(rows[0].values[name], int):
            hint += f"; `absolute_error(1..9, {name})` compares the most likely number with it"
        return hint
    if name == "auc":
        return "the area under a curve is an expectation: `expect auc(prob, k) < 0.4`"
    return unknown_metric_hint(name, context.metrics)


def unknown_metric_hint(name: str, others: Iterable[str] = ()) -> str:
    """Return the hint for a name that no metric has; `others` are metrics of the file."""
    known = ", ".join(METRICS)
    return did_you_mean(name, [*METRICS, *others], f"metrics are {known}")


def _select_form(
    forms: Mapping[MetricArgument, MetricForm],
    arguments: tuple[ast.Argument, ...],
    context: MeasureContext,
) -> MetricForm | None:
    """Select the form that fits the number and kind of the arguments; None if no form fits."""
    values = [a.value for a in arguments if a.name is None]
    if any(a.name not in (None, DIGITS_ARGUMENT) for a in arguments):
        return None
    if not arguments:
        return (
            (forms.get("own") if context.at is not None else None)
            or forms.get("nothing")
            or forms.get("prompt")
            or forms.get("observation")
            or next((f for f in forms.values() if f.default is not None), None)
        )
    if len(values) == 2 and "activations" in forms:
        return forms["activations"]
    ranges = [isinstance(value, ast.Range) for value in values]
    sets = [
        wide or is_list(context.table, value) for wide, value in zip(ranges, values, strict=True)
    ]
    numerals = forms.get("numerals")
    if numerals is not None and numerals.compared:
        return numerals if sets[:1] == [True] and len(values) <= 2 else None
    if values and numerals is not None and all(ranges if "any" in forms else sets):
        return numerals
    if not values:
        return None
    if len(arguments) > 1 or any(sets):
        return forms.get("any")
    if isinstance(values[0], ast.Quantity | ast.SiteValue):
        return None
    return forms.get("target") or forms.get("continuation") or forms.get("reference")


def _explain_misfit(forms: Mapping[MetricArgument, MetricForm], given: int) -> str:
    """Explain from the number of arguments why no form of a metric fits."""
    alone = {"nothing", "prompt", "own", "observation"}
    most = 2 if "activations" in forms else 0 if alone.issuperset(forms) else 1
    if not given:
        return "it has no argument"
    if given <= most or not {"any", "numerals"}.isdisjoint(forms):
        return "its argument has the wrong type"
    return f"it takes {count_noun(most, 'argument') if most else 'no argument'}, not {given}"


_USAGE: Mapping[MetricArgument, str] = {
    "target": "`{}(answer)`",
    "any": "`{}(answer, wrong)`",
    "continuation": "`{}(answer)`",
    "numerals": "`{}(1..9)`",
    "reference": "`{}(clean)`",
    "class": "`{}(class answer)`",
    "label": "`{}(class answer)`",
    "nothing": "`{}`",
    "prompt": "`{}`",
    "own": "`{}`, with `at`",
    "activations": "`{}(L3.resid, clean)`",
    "observation": "`{}`, together with a line `observe attention …`",
}


def _usage(name: str, forms: Mapping[MetricArgument, MetricForm]) -> str:
    if any(form.compared for form in forms.values()):
        return f"`{name}(1..9)`, or `{name}(1..9, n)` for a value `n` of the row"
    return " or ".join(dict.fromkeys(_USAGE[takes].format(name) for takes in forms))


def _of_nothing(term: MetricTerm, arguments: Arguments, context: MeasureContext) -> MetricTerm:
    return term


def _of_attention(
    term: MetricTerm, arguments: Arguments, context: MeasureContext
) -> MetricTerm | None:
    if context.observed is None or context.observed.word != term.name:
        hint = "add a line `observe attention layer * head * from last token to …`"
        report_unreadable(
            context, term.node.span, "no `observe attention` line selects the attention", hint
        )
        return None
    return term


def _of_text(term: MetricTerm, arguments: Arguments, context: MeasureContext) -> MetricTerm | None:
    """Resolve `logit(T)` and `logprob(T)`: the token ids of T, for every row and occurrence."""
    text: Any = (
        arguments[0].value
        if arguments
        else ast.Name(term.form.default or "answer", span=term.node.span)
    )
    envs = find_item_numbers([text], context)
    if envs is None:
        return None
    by_item = None not in envs
    texts: dict[ItemNumber, tuple[tuple[int, ...], ...]] = {}
    for env in envs:
        extra = context.names_of(env)
        tokens, problems = text_tokens(
            context.table, text, tokenizer=context.tokenizer, extra=extra
        )
        context.diagnostics.extend(problems)
        if any(p.severity == "error" for p in problems):
            return None
        if term.form.takes == "target":
            long = next(((n, t) for n, t in enumerate(tokens) if len(t.ids) != 1), None)
            if long is not None and not _sums_tokens([text], term.name, *long, context):
                return None
            if long is not None:
                term = replace(term, form=METRICS[term.name].forms["continuation"])
        texts[env] = tuple(t.ids for t in tokens)
    several = any(len(ids) != 1 for rows in texts.values() for ids in rows)
    several = several and not context.tokenizer.stands_in
    by_item = by_item or _differs_by_cell(text, context)
    if several and not _reads_whole_texts(text, by_item, context):
        return None
    return replace(term, texts=texts)


def _differs_by_cell(text: ast.Node, context: MeasureContext) -> bool:
    """Return whether a text contains a variable of a loop over cells."""
    return not context.names_of(None).keys().isdisjoint(argument_names(text))


def _reads_whole_texts(node: ast.Node, by_item: bool, context: MeasureContext) -> bool:
    """Return whether a measure can read texts of several tokens; report E0108 otherwise."""
    if not by_item and context.at is None:
        return True
    what = "that differs by cell" if by_item else "read before the end of the prompt"
    problem = NotSupported(span=node.span, what=f"a text of several tokens {what}")
    context.diagnostics.append(problem)
    return False


def _of_class(
    term: MetricTerm, wanted: ast.ClassOutput, context: MeasureContext
) -> MetricTerm | None:
    """Resolve `logit(class C)`: the number of the output C, for every row."""
    shape, model = context.sites.shape, context.sites.model
    problem = check_class(term.node, term.name, wanted, shape, model)
    if problem is not None:
        context.diagnostics.append(problem)
        return None
    numbers, problems = resolve_class_numbers(wanted, context.table, shape, model)
    chooses = reads_classes(term.form, shape)
    if chooses and not problems:
        lacking = check_classes_exist(term.node, context.table, shape, model)
        lacking = lacking or check_class_members(wanted, numbers, shape, model)
        problems = [] if lacking is None else [lacking]
    context.diagnostics.extend(problems)
    if problems:
        return None
    texts: dict[ItemNumber, tuple[tuple[int, ...], ...]] = {None: tuple((n,) for n in numbers)}
    classes = shape.classes if chooses else 0
    return replace(term, texts=texts, of_class=True, classes=classes)


def _of_run(term: MetricTerm, arguments: Arguments, context: MeasureContext) -> MetricTerm | None:
    run = _reference(arguments[0].value, context)
    return None if run is None else replace(term, run=run)


def _of_activations(
    term: MetricTerm, arguments: Arguments, context: MeasureContext
) -> MetricTerm | None:
    site = arguments[0].value
    if isinstance(site, ast.ShortSite):
        site = ast.Site(short=site, span=site.span)
    elif isinstance(site, ast.Name):
        site = ast.Site(names=(site,), span=site.span)
    if not isinstance(site, ast.Site):
        report_unreadable(
            context,
            site.span,
            "its first argument is not a site",
            "write `cosine(resid_post layer 5, clean)`",
            of=term.node.span,
        )
        return None
    targets, axes = resolve_site(site, context.sites)
    run = _reference(arguments[1].value, context)
    if targets is None or run is None:
        return None
    if any(len(points) != 1 for points in targets.points.values()):
        context.diagnostics.append(
            AxisDoesNotFit(
                span=site.span,
                site=site.span.written,
                reason="combines several sites",
                hint="name one layer (and one head or neuron), or sweep: `layer *`",
            )
        )
        return None
    if any(SITES[p.site].stack == "vision" for here in targets.points.values() for p in here):
        what, hint = "a measure of sites in the vision encoder", "write `observe norm` of the site"
        context.diagnostics.append(NotSupported(span=site.span, what=what, later=hint))
        return None
    # Each loop has a single value here, so only the axes of the site distinguish points.
    numbers = [n for n, of in enumerate(targets.axes) if of not in context.sites.loops]
    site_points = {
        tuple(key[n] for n in numbers): points[0] for key, points in targets.points.items()
    }
    if not axes:
        return replace(term, run=run, point=site_points[()])
    return replace(term, run=run, points=site_points, axes=axes)


def _of_python(node: ast.Call, context: MeasureContext) -> MetricTerm | None:
    """Resolve a function of a Python file, which isn't called until there are logits."""
    use = metric_use(node)
    function, problems = find_function(node, use)
    context.diagnostics.extend(problems)
    if function is None or (use == "reply" and not check_reply(node, context)):
        return None
    takes = "reply" if use == "reply" else "rows"
    form = MetricForm(takes, "", "number", function.call, "a function of a Python file")
    rows = tuple(
        {
            **row.values,
            **{name: text.text for name, text in row.texts.items()},
            # Names of values contain no dot, so these keys can't collide with them.
            **{f"{name}.ids": text.ids for name, text in row.texts.items()},
        }
        for row in context.table.runs["clean"].rows
    )
    tokenizer = None if function.tokenizer == "nothing" else context.tokenizer
    return MetricTerm(node, function.name, form, python=function, rows=rows, tokenizer=tokenizer)


def resolve_run(value: Any, context: MeasureContext) -> str | None:
    """Resolve the run of a metric such as `kl(clean)`; None after E0201 for an unknown run."""
    name = value.id if isinstance(value, ast.Name) else ""
    if isinstance(value, ast.Attribute):  # a corruption of a different prompt set
        name = f"{value.name}.{value.attribute}"
    run = find_run(name, context.table.runs)
    if run is not None:
        return run
    runs = list(context.table.runs)
    known = name_list(runs)
    context.diagnostics.append(
        UnknownName(
            span=value.span,
            kind="run",
            name=value.span.written,
            hint=did_you_mean(name, runs, f"runs are {known}"),
        )
    )
    return None


def _reference(value: Any, context: MeasureContext) -> str | None:
    """Resolve the run to compare with; report a run with several noise draws."""
    run = resolve_run(value, context)
    if run is not None and context.table.runs[run].draws > 1:
        context.diagnostics.append(
            NotSupported(span=value.span, what="a comparison with several draws of noise")
        )
        return None
    return run


_BUILDERS: Mapping[MetricArgument, MetricBuilder] = {
    "target": _of_text,
    "continuation": _of_text,
    "any": resolve_set_metric,
    "numerals": resolve_set_metric,
    "reference": _of_run,
    "nothing": _of_nothing,
    "prompt": _of_nothing,
    "own": _of_nothing,
    "observation": _of_attention,
    "activations": _of_activations,
}
"""By argument, the function that resolves the arguments of a metric. Classes, replies and Python
functions have separate ones."""

MEASURED_AXIS = "measured"
"""Axis of the positions at which measures are read."""

STEP_AXIS = "step"
"""Axis of the generation steps at which measures are read."""


class ReadPosition(Record):
    """One position at which a measure is read."""

    label: str = ""
    at: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Token by run and row; arbitrary for rows that lack the position."""
    absent: tuple[int, ...] = ()
    """Rows that lack the position in some run."""
    item: int | None = None
    reply: ReplyPosition | None = None


def find_read_positions(
    at: ast.Position | None, context: MeasureContext, runs: tuple[str, ...]
) -> list[ReadPosition]:
    """Resolve the positions at which a measure is read, in each run.

    For the last token, and after an error, the result is one position without a label.
    """
    if at is None:
        return [ReadPosition()]
    positions = ast.Positions((at,), span=at.span)
    found: dict[str, dict[str, PositionCell]] = {}
    for run in runs:
        cells, problems = resolve_positions(
            positions,
            context.table,
            run,
            tokenizer=context.tokenizer,
            loop_values={**context.parameters, **context.loop_values},
            loops=tuple(context.loop_values),
            replies=context.replies,
            side=find_side((), context.sites.shape),
        )
        context.diagnostics.extend(p for p in problems if p not in context.diagnostics)
        if any(p.severity == "error" for p in problems):
            return [ReadPosition()]
        known = any(cell.reply is not None for cell in cells)
        if context.tokenizer.stands_in and len(cells) == 1 and not known:
            continue  # its number of tokens isn't known
        if not all(_single(cell) for cell in cells):
            report_unreadable(
                context,
                at.span,
                "a measure is read at one token of every prompt",
                "name one position, such as `last token` or `subject token`, or sweep single "
                "tokens: `each item token`, `token * align left`",
            )
            return [ReadPosition()]
        found[run] = {cell.label: cell for cell in cells}
    if not found:
        return [ReadPosition()]
    first = next(iter(found.values()))
    labels = [
        label
        for label in first
        if all(label in position_cells for position_cells in found.values())
    ]
    return [_read_position(label, first, found, context.table) for label in labels]


def _single(cell: PositionCell) -> bool:
    """Return whether the cell is one token in every row that has it."""
    if cell.reply is not None and not cell.reply.single:
        return False
    return all(len(row) <= 1 and all(len(tokens) == 1 for tokens in row) for row in cell.hits)


def _read_position(
    label: str,
    first: Mapping[str, PositionCell],
    positions: Mapping[str, Mapping[str, PositionCell]],
    table: PromptTable,
) -> ReadPosition:
    """Return a position in each run; the first readable token where a row lacks it."""
    at: dict[str, tuple[int, ...]] = {}
    absent: set[int] = set()
    for run, cells in positions.items():
        hits = cells[label].hits
        absent.update(row for row, own in enumerate(hits) if not own)
        rows = table.runs[run].rows
        at[run] = tuple(
            own[0][0] if own else row.source for own, row in zip(hits, rows, strict=True)
        )
    return ReadPosition(label, at, tuple(sorted(absent)), first[label].item, first[label].reply)


def expand_read_positions(
    measure: ResolvedMeasure, places: Sequence[ReadPosition], context: MeasureContext
) -> Iterator[tuple[AxisLabels, ResolvedMeasure]]:
    """Yield the measure at each position that some row has, for each combination of swept sites."""
    swept = {axis.name: axis for atom in measure.atoms for axis in atom.axes}
    keys = product(*(range(len(axis)) for axis in swept.values()))
    sites = [dict(zip(swept, key, strict=True)) for key in keys]
    for place, chosen in product(places, sites):
        labels: list[tuple[str, int | float | str]] = []
        if len(places) > 1 and place.reply is not None and place.reply.kind == "step":
            labels.append((STEP_AXIS, place.reply.number))
        elif len(places) > 1:
            labels.append((MEASURED_AXIS, place.label))
        labels += [(name, swept[name].labels[index]) for name, index in chosen.items()]
        expanded = _read_at(measure, place, chosen, context)
        if len(expanded.absent) < len(context.table) or not len(context.table):
            yield tuple(labels), expanded


def _read_at(
    measure: ResolvedMeasure,
    place: ReadPosition,
    chosen: Mapping[str, int],
    context: MeasureContext,
) -> ResolvedMeasure:
    atoms = tuple(_term_at(atom, place, chosen, context) for atom in measure.atoms)
    at, absent = place.at or measure.at, set(place.absent)
    if place.reply is None and any(atom.form.takes == "own" for atom in atoms):
        starts = {run: [row.source for row in context.table.runs[run].rows] for run in at}
        pairs = {run: list(zip(tokens, starts[run], strict=True)) for run, tokens in at.items()}
        absent.update(
            n for pair in pairs.values() for n, (token, first) in enumerate(pair) if token == first
        )
        at = {run: tuple(max(t - 1, first) for t, first in pair) for run, pair in pairs.items()}
    return replace(
        measure, atoms=atoms, at=at, absent=tuple(sorted(absent)), item=place.item,
        in_reply=place.reply,
        reply=measure.reply if place.reply is None else context.reply,
    )  # fmt: skip


def _term_at(
    atom: MetricTerm, place: ReadPosition, chosen: Mapping[str, int], context: MeasureContext
) -> MetricTerm:
    if atom.points:
        key = tuple(chosen[axis.name] for axis in atom.axes)
        return replace(atom, point=atom.points[key], points={}, axes=())
    if atom.form.takes == "own":
        rows = {run: context.table.runs[run].rows for run in place.at}
        own = {
            run: tuple(row.ids[token] for row, token in zip(rows[run], tokens, strict=True))
            for run, tokens in place.at.items()
        }
        return replace(atom, own=own)
    if atom.by_item and place.item in (*atom.texts, *atom.sets, *atom.wanted):
        texts = {None: atom.texts[place.item]} if atom.texts else {}
        sets = {None: atom.sets[place.item]} if atom.sets else {}
        wanted = {None: atom.wanted[place.item]} if atom.wanted else {}
        return replace(atom, texts=texts, sets=sets, wanted=wanted)
    return atom


def resolve_measure(
    expression: ast.Expr,
    context: MeasureContext,
    *,
    label: str,
    at: ast.Position | None = None,
    runs: tuple[str, ...] = (),
) -> ResolvedMeasure | None:
    """Resolve a measure and its metrics at the first position at which it is read.

    Args:
        context: State for resolving measures; errors are added to its diagnostics.
        at: The position, which is resolved in the text of each run; None for the last token.
        runs: The runs on which the measure is read.

    Returns:
        The measure; None after an error.

    Codes: E0108, E0203, E0437, E0438, E0442 to E0446, E0507, E0612 and those of texts and
    positions.
    """
    measure_positions = resolve_measure_positions(
        expression, context, label=label, at=at, runs=runs
    )
    return None if measure_positions is None else measure_positions[0][1]


def _without_categories(
    expression: ast.Expr, terms: Sequence[MetricTerm], context: MeasureContext
) -> bool:
    """Return whether no term is a category, and report one that is."""
    if not any(term.form.kind == "category" for term in terms):
        return True
    report_unreadable(
        context,
        expression.span,
        "arithmetic doesn't apply to categories",
        "measure it alone, or use `expected(…)`, which is numeric",
    )
    return False


def resolve_measure_positions(
    expression: ast.Expr,
    context: MeasureContext,
    *,
    label: str,
    at: ast.Position | None = None,
    runs: tuple[str, ...] = (),
    observed: bool = False,
) -> list[tuple[AxisLabels, ResolvedMeasure]] | None:
    """Resolve a measure at each position at which it is read, with the labels of the position.

    See `resolve_measure` for the arguments. observed: Whether metrics read the experiment's
    observation.
    """
    before = len(context.diagnostics)
    context.at, context.reads_observed = at, observed
    if not context.items:  # the measured position determines `{item.index}`
        items = (place.item for place in find_read_positions(at, context, runs[:1]))
        context = replace(context, items=tuple(item for item in items if item is not None))
    expression, atoms = _resolve_terms(expression, context)
    read = dict.fromkeys((*runs, *(a.run for a in atoms.values() if a.run is not None)))
    places = find_read_positions(at, context, tuple(read) if runs else ())
    shape, model = context.sites.shape, context.sites.model
    if has_errors(context.diagnostics[before:]):
        return None
    terms = tuple(atoms.values())
    if not _can_be_read(expression, terms, at, context):
        return None
    if not _predicts_tokens(expression, terms, places, context):
        return None
    positions: Mapping[str, tuple[int, ...]] | None = None
    if shape.output_at != "every token" and _of_logits(terms):
        if at is not None:
            context.diagnostics.append(report_fixed_output(at.span, shape, model))
            return None
        positions = find_output_positions(context.table, shape)
    elif not shape.causal and not _without_next_token(expression, terms, at, context):
        return None
    category = expression in atoms and atoms[expression].form.kind == "category"
    alone = category or _without_categories(expression, terms, context)
    if not alone or not _read_alike(expression, terms, context):
        return None
    units = {a.form.unit for a in terms}
    whole = ResolvedMeasure(
        label=label,
        text=expression.span.written,
        expression=expression,
        atoms=terms,
        kind="category" if category else "number",
        unit=units.pop() if len(units) == 1 else "",
        at={} if positions is None else positions,
        truth=_truth(context.table) if category else None,
        observed=observed,
        reply=context.reply if any(a.form.takes == "reply" for a in terms) else None,
    )
    everywhere = list(expand_read_positions(whole, places, context))
    if not everywhere:
        reason = "no prompt has a token there with a preceding token"
        report_unreadable(context, expression.span, reason, "name a later position")
    return everywhere or None


def _can_be_read(
    expression: ast.Expr,
    atoms: Sequence[MetricTerm],
    at: ast.Position | None,
    context: MeasureContext,
) -> bool:
    """Check that a measure reads the model, and at a position that its metrics support."""
    if not atoms:
        # Names are metrics whose definitions have errors, which are already reported.
        if not any(isinstance(n, ast.Name) for n in walk(expression)):
            hint = "write a metric such as `logit(answer)`"
            report_unreadable(context, expression.span, "it doesn't read the model", hint)
        return False
    if context.reads_observed and not _of_one_token(expression, atoms, at, context):
        return False
    if at is not None and any(atom.form.takes == "reply" for atom in atoms):
        reason, hint = "a reply is measured as a whole", "remove `at …`"
        report_unreadable(context, expression.span, reason, hint)
        return False
    unread = check_readable(expression, atoms, context.sites.shape, context.sites.model)
    if unread is not None:
        context.diagnostics.append(unread)
    return unread is None


def _predicts_tokens(
    expression: ast.Expr,
    atoms: Sequence[MetricTerm],
    places: Sequence[ReadPosition],
    context: MeasureContext,
) -> bool:
    """Check that a model of prompts with images predicts the tokens whose loss is measured."""
    takes = {atom.form.takes for atom in atoms} & {"prompt", "own"}
    written = [place for place in places if place.reply is None]
    if not takes or not written:
        return True
    reader, runs = context.tokenizer, context.table.runs
    layout = find_image_layout(reader, context.table)
    image = reader.image_id if layout and isinstance(reader, ImagePromptTokenizer) else None
    if layout is not None and layout.prefix_end:
        reason = "each token of these prompts attends to later ones, so none of them is predicted"
        hint = "measure the answer: `logprob(answer)`"
    elif "own" in takes and any(
        runs[run].rows[row].ids[token] >= IMAGE_TOKEN or runs[run].rows[row].ids[token] == image
        for place in written
        for run, tokens in place.at.items()
        for row, token in enumerate(tokens)
        if row not in place.absent
    ):
        reason = "the position includes a token of an image, which the model doesn't predict"
        hint = "name tokens of text, such as `last token`"
    else:
        return True
    report_unreadable(context, expression.span, reason, hint)
    return False


def _read_alike(expression: ast.Expr, atoms: Sequence[MetricTerm], context: MeasureContext) -> bool:
    """Check that all metrics of a measure are read at the same token.

    The loss of a token is read at the preceding token, where it is predicted.
    """
    if len({atom.form.takes == "own" for atom in atoms}) == 1:
        return True
    reason = "the loss of a token is read at the preceding token, the others at the token itself"
    report_unreadable(context, expression.span, reason, "measure them in two lines")
    return False


def _of_one_token(
    expression: ast.Expr,
    atoms: Sequence[MetricTerm],
    at: ast.Position | None,
    context: MeasureContext,
) -> bool:
    """Check that a measure can read the observation, which is a single next-token distribution."""
    seen = context.observed
    if seen is None or (seen.gives == "number" and at is None):
        return True
    several = any(any(atom.appended) for atom in atoms if atom.texts)
    if at is not None:
        reason, hint = "an observation has its own position", "remove `at …`"
    elif any(atom.form.takes in ("prompt", "own", "activations", "reply") for atom in atoms):
        reason = "it reads more than one distribution over next tokens"
        hint = "measure it in an experiment without `observe`"
    elif several and not context.tokenizer.stands_in:
        reason, hint = "its text has several tokens", "name a text of one token"
    else:
        return True
    report_unreadable(context, expression.span, reason, hint)
    return False


def _of_logits(atoms: Sequence[MetricTerm]) -> list[MetricTerm]:
    return [atom for atom in atoms if atom.form.of_outputs]


def check_readable(
    expression: ast.Expr, atoms: Sequence[MetricTerm], shape: ModelShape, model: str
) -> Diagnostic | None:
    """Return E0437 for logits of a model without logits, or E0438 for tokens that have no logit."""
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
    if any(atom.form.takes == "prompt" for atom in tokens):  # it reads the prompt's tokens
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
    atoms: Sequence[MetricTerm],
    at: ast.Position | None,
    context: MeasureContext,
) -> bool:
    """Check that a model with bidirectional attention can compute a measure.

    Such a model isn't known to predict the next token.
    """
    logits = _of_logits(atoms)
    shape = context.sites.shape
    next_token = at is None or any(a.form.takes == "prompt" for a in logits)
    if logits and at is None and shape.task != "tokens":
        reason = f"`{shape.architecture}` has outputs for each token"
        hint = 'write which token is read, as in `at "…" token` or `at subject token`'
    elif shape.task != "tokens":
        return True
    elif logits and next_token and not shape.masked:
        reason = (
            f"the config of `{shape.architecture}` doesn't state that it predicts the next token"
        )
        hint = "use a model whose `architectures` end in `ForCausalLM`, or write where one token "
        hint += 'is read: `at "…" token`'
    elif logits and at is None:
        reason = "a masked language model predicts tokens at their own position"
        hint = 'write where: `at "[MASK]" token`, with the tokenizer\'s mask token in the template'
    elif any(a.form.takes in ("prompt", "own") for a in logits):
        reason = "a masked language model has no loss for tokens that it sees"
        hint = 'measure `logprob(answer) at "[MASK]" token`'
    elif any(
        a.form.takes == "continuation" and any(len(ids) > 1 for t in a.texts.values() for ids in t)
        for a in logits
    ):
        reason = "without next-token prediction, one position predicts one token"
        hint = "use answers of one token"
    else:
        return True
    report_unreadable(context, expression.span, reason, hint)
    return False


def _collect_terms(
    expression: ast.Expr, context: MeasureContext, atoms: dict[ast.Expr, MetricTerm]
) -> None:
    """Resolve each metric of an expression once."""
    match expression:
        case ast.Number() | ast.Percent():
            return
        case ast.Negative(operand=operand) | ast.Not(operand=operand):
            _collect_terms(operand, context, atoms)
        case ast.Binary() | ast.Compare() | ast.Logical():
            _collect_terms(expression.left, context, atoms)
            _collect_terms(expression.right, context, atoms)
        case ast.Name() | ast.Call():
            if expression not in atoms:
                atom = resolve_metric(expression, context)
                if atom is not None:
                    atoms[expression] = atom
        case _:
            report_unreadable(
                context,
                expression.span,
                "it is not a metric",
                "metrics are written as `logit(answer)`, and can be added and subtracted",
            )


def _resolve_terms(
    expression: ast.Expr, context: MeasureContext
) -> tuple[ast.Expr, dict[ast.Expr, MetricTerm]]:
    """Return the expression that combines the terms, and the terms by their nodes in it."""
    atoms: dict[ast.Expr, MetricTerm] = {}
    _collect_terms(expression, context, atoms)
    for divisor in iter_divisors(expression):
        _not_zero(divisor, expression, context)
    return _with_alternatives(expression, atoms), atoms


def _with_alternatives(expression: ast.Expr, atoms: dict[ast.Expr, MetricTerm]) -> ast.Expr:
    """Replace each term of several accepted texts by the terms of its texts.

    Returns:
        The expression that adds their probabilities.
    """
    for node, atom in list(atoms.items()):
        if not atom.alternatives:
            continue
        del atoms[node]
        atoms.update((part.node, part) for part in atom.alternatives)
        combine = METRICS[atom.name].forms["continuation"].joined
        assert combine is not None
        arguments = tuple(ast.Argument(None, p.node, span=node.span) for p in atom.alternatives)
        total = ast.Call(combine, arguments, span=node.span)
        expression = rewrite(expression, lambda n, old=node, new=total: new if n == old else n)
    return expression


def _not_zero(divisor: ast.Expr, expression: ast.Expr, context: MeasureContext) -> None:
    """Report E0612 for a divisor that is always 0."""
    if any(isinstance(node, ast.Name | ast.Call) for node in walk(divisor)):
        return
    try:
        zero = evaluate_arithmetic(divisor, lambda node: math.nan) == 0
    except ZeroDivisionError:
        return  # the inner division by 0 is reported separately
    if zero:
        hint = "use a nonzero divisor"
        report_unreadable(context, divisor.span, "it divides by 0", hint, of=expression.span)


def _truth(table: PromptTable) -> tuple[float, ...] | None:
    """Return the number that each row's answer spells; None if an answer is not a number."""
    truths: list[float] = []
    for row in table.runs["clean"].rows:
        answer = row.texts.get("answer")
        try:
            truths.append(float(answer.text) if answer is not None else float("nan"))
        except ValueError:
            return None
    return tuple(truths)
