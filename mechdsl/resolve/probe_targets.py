"""What a probe is to tell of every row, and how it is fitted: `probe(count, folds: 5)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, Literal, TypeAlias, cast

from mechdsl.base.plural import plural
from mechdsl.base.record import Record, record
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument, did_you_mean
from mechdsl.program.constants import constant
from mechdsl.prompts.expressions import evaluate
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.row_scope import Key, Refusal
from mechdsl.prompts.values import plain
from mechdsl.syntax import ast

Kind: TypeAlias = Literal["ridge", "logistic"]
KINDS: tuple[Kind, ...] = ("ridge", "logistic")
FOLDS = 5
"""Of a probe that says nothing else."""


@record
class Probe(Record):
    """How a probe is fitted, and to what."""

    kind: Kind
    targets: tuple[tuple[float, ...], ...]
    """Per row of the table: numbers, or the number of its class."""
    classes: tuple[str, ...]
    """What classes are called."""
    folds: int
    penalty: float | None
    """None where the fit has a penalty of its own, or chooses one."""
    train: tuple[tuple[float, ...], ...] | None = None
    """Of each row that it is fitted on, where these are others; no row is in a fold then."""
    trained_on: str = ""
    """What these are called in the file."""


def resolve_probe(
    call: ast.Call,
    table: PromptTable,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
    train: PromptTable | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> Probe | None:
    """train: where it is fitted on other rows, these. kinds: that there are; with one of them
    `kind` is no option. None after an error. Codes: E0207 and those of values of a row."""
    plain_ones = [each.value for each in call.arguments if each.name is None]
    if len(plain_ones) != 1:
        example = f"`{call.name}(count)`"
        _bad(diagnostics, call.span, call.name, "takes one value of the rows", example)
        return None
    before = len(diagnostics)
    options = _options(call, parameters, diagnostics, kinds)
    values = row_values(cast(ast.Expr, plain_ones[0]), table, diagnostics)
    others = row_values(cast(ast.Expr, plain_ones[0]), train, diagnostics) if train else []
    if values is None or others is None or len(diagnostics) > before:
        return None
    own, values = len(values), [*values, *others]
    only = kinds[0] if len(kinds) == 1 else None
    kind = only or options.get("kind") or _kind(values)
    span = plain_ones[0].span
    problem = _misfit(
        kind, values, "a number of each row" if only else "`kind: logistic` for classes"
    )
    if problem is not None:
        _bad(diagnostics, span, span.written, *problem)
        return None
    targets, classes = _classes(values) if kind == "logistic" else (_numbers(values), ())
    few = len(set(targets if train is None else targets[own:])) < 2
    if few and not table.stands_in:
        reason = "is the same in all rows, so there is nothing to be told"
        _bad(diagnostics, span, span.written, reason, "a value that differs between rows")
        return None
    if train is not None:
        told = next(each.value.span.written for each in call.arguments if each.name == "train")
        if "folds" in options:
            reason = "has nothing to be held out: the probe is fitted on other rows"
            _bad(diagnostics, call.span, "folds", reason, "leave `folds` or `train` out", bare=True)
            return None
        penalty = options.get("penalty")
        return Probe(kind, targets[:own], classes, FOLDS, penalty, targets[own:], told)
    folds, rows = options.get("folds", FOLDS), len(set(table.cut_from or table.row_keys))
    if rows < folds and not table.stands_in and not table.cut:
        unit = "image" if table.cut_from else "distinct row"
        reason = f"can't be dealt out: there are {plural(rows, unit)} for {folds} folds"
        _bad(
            diagnostics,
            call.span,
            call.name,
            reason,
            f"more {unit.split()[-1]}s, or `folds: {max(2, rows)}`",
        )
        return None
    return Probe(kind, targets, classes, folds, options.get("penalty"))


def row_values(
    expr: ast.Expr, table: PromptTable, diagnostics: list[Diagnostic]
) -> list[object] | None:
    """What an expression is in every clean row, or `count of fewer` in those of a corruption; None
    after an error."""
    if isinstance(expr, ast.OfRef):
        run = expr.of.name if expr.of.part is None else f"{expr.of.name}.{expr.of.part}"
        rows = table.runs[run].rows if run in table.runs else ()
        known = list(rows[0].values) if rows else list(table.runs)
        if not rows or expr.name not in rows[0].values:
            hint = did_you_mean(expr.name if rows else run, known, f"there are {', '.join(known)}")
            what = "value" if rows else "run"
            diagnostics.append(
                BadArgument(
                    span=expr.span, name=expr.span.written, reason=f"is no {what}", hint=hint
                )
            )
            return None
        return [row.values[expr.name] for row in rows]
    found: list[object] = []
    for row in table.sources:
        try:
            found.append(plain(evaluate(expr, row, Key(f"measure:{expr.span.text}"))))
        except Refusal as refusal:
            diagnostics.append(refusal.diagnostic(row.describe()))
            return None
    return found


def _options(
    call: ast.Call,
    parameters: Mapping[str, Any],
    diagnostics: list[Diagnostic],
    kinds: Sequence[Kind],
) -> dict[str, Any]:
    """`folds: 5, kind: logistic, penalty: 0.1`; E0207 for what isn't one."""
    found: dict[str, Any] = {}
    known = [name for name in _OPTIONS if name != "kind" or len(kinds) > 1]
    for each in call.arguments:
        if each.name is None or each.name == "train":
            continue
        word, value = each.name, each.value
        if word not in known:
            hint = did_you_mean(word, known, f"there is {', '.join([*known, 'train'])}")
            _bad(diagnostics, each.span, word, "is no option of a probe", hint, bare=True)
            continue
        number = value.id if isinstance(value, ast.Name) else None
        if word != "kind" or number is None:
            number = constant(cast(ast.Expr, value), parameters)
        good, hint = _OPTIONS[word]
        if not good(number):
            _bad(diagnostics, each.span, word, f"can't be `{value.span.written}`", hint)
        else:
            found[word] = number
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "folds": (lambda n: isinstance(n, int) and 2 <= n <= 1000, "`folds: 5`, from 2 to 1000"),
    "kind": (lambda n: n in KINDS, "`kind: ridge` or `kind: logistic`"),
    "penalty": (lambda n: _is_number(n) and n > 0, "a number above 0"),
}


def _kind(values: Sequence[object]) -> Kind:
    """Numbers and lists of them are told as such, two values and all else as classes."""
    numbers = all(_is_number(value) for value in values)
    if numbers:
        return "ridge" if len(set(values)) > 2 else "logistic"
    return "ridge" if any(isinstance(value, list) for value in values) else "logistic"


def _misfit(kind: Kind, values: Sequence[object], otherwise: str) -> tuple[str, str] | None:
    """Why values can't be told, and what to write; `otherwise` of what is no number."""
    none = sum(value is None for value in values)
    if none:
        return f"has no value in {plural(none, 'row')}", "`where` to leave these rows out"
    lists = [cast("list[object]", value) for value in values if isinstance(value, list)]
    if kind == "logistic":
        if any(isinstance(value, list | Mapping) for value in values):
            return "is a list, which is no class", "`kind: ridge` for lists of numbers"
        return None
    if lists and len(lists) < len(values):
        return "is a list in some rows and none in others", "lists of equally many numbers"
    lengths = {len(each) for each in lists}
    if len(lengths) > 1:
        least, most = min(lengths), max(lengths)
        return f"has {least} to {most} numbers", "lists of equally many numbers"
    if lengths == {0}:
        return "is an empty list", "lists of numbers"
    entries = [entry for each in lists for entry in each] if lists else values
    if not all(_is_number(entry) for entry in entries):
        return "is no number", otherwise
    return None


def _numbers(values: Sequence[object]) -> tuple[tuple[float, ...], ...]:
    lists = (value if isinstance(value, list) else [value] for value in values)
    return tuple(tuple(float(cast(float, entry)) for entry in each) for each in lists)


def _classes(values: Sequence[object]) -> tuple[tuple[tuple[float, ...], ...], tuple[str, ...]]:
    """Numbers first, by size, then texts by their letters: whatever the order of rows."""
    numbers = sorted({cast(float, value) for value in values if _is_number(value)})
    others = sorted({str(value) for value in values if not _is_number(value)})
    order: dict[object, float] = {value: float(n) for n, value in enumerate([*numbers, *others])}
    found = ((order[value if _is_number(value) else str(value)],) for value in values)
    return tuple(found), tuple(map(str, order))


def _bad(
    diagnostics: list[Diagnostic],
    span: Span,
    name: str,
    reason: str,
    hint: str,
    *,
    bare: bool = False,
) -> None:
    hint = hint if bare else f"write {hint}"
    diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
