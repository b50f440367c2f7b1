"""Expressions of a prompts block, evaluated on one row, and the functions they call."""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from itertools import accumulate
from math import inf
from typing import Any, Literal, TypeAlias, cast, overload

from mechdsl.base import limits
from mechdsl.base.limits import is_integer, is_number, is_whole_number
from mechdsl.base.records import Record, Registry, closest_name
from mechdsl.base.text import Span, count_noun, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import (
    BadCall,
    BadValue,
    EmptyDraw,
    NoRows,
    TooManyValues,
    UnknownFunction,
    UnknownValue,
)
from mechdsl.diagnostics.syntax import UnknownName
from mechdsl.program.images import DRAWN_IMAGES
from mechdsl.prompts.values import (
    DrawKey,
    ItemList,
    ListItem,
    Refusal,
    RowValue,
    Scope,
    TokenId,
    cached_item,
    render_value,
    to_hashable,
    to_plain,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

_TRIES = 64
"""Maximum number of draws before the remaining values are enumerated."""

Evaluator = Callable[[ast.Expr, Scope, DrawKey], RowValue]


class PromptFunction(Record):
    """A function of prompts. `usage` appears in the help line of a wrong call."""

    name: str
    usage: str
    meaning: str
    apply: Callable[[CallSite], RowValue]
    named: tuple[str, ...] = ()
    draws: bool = True


FUNCTIONS: Registry[PromptFunction] = Registry("function")


@dataclass
class CallSite:
    """A call under evaluation on a row."""

    node: ast.Call
    function: PromptFunction
    scope: Scope
    key: DrawKey
    evaluate: Evaluator
    named: dict[str, ast.Argument] = field(default_factory=dict[str, ast.Argument])
    positional: list[ast.Expr] = field(default_factory=list[ast.Expr])

    def __post_init__(self) -> None:
        for argument in self.node.arguments:
            value = argument.value
            if isinstance(value, ast.Range | ast.Quantity | ast.SiteValue):
                raise self.wrong("takes values, not ranges or sites", argument.span)
            if argument.name is None:
                self.positional.append(value)
            elif argument.name not in self.function.named:
                meant = closest_name(argument.name, self.function.named)
                reason = f"has no argument `{argument.name}`"
                raise self.wrong(reason, argument.span, f"{meant}: …" if meant else None)
            elif argument.name in self.named:
                raise self.wrong(f"has `{argument.name}` twice", argument.span)
            else:
                self.named[argument.name] = argument

    def wrong(self, reason: str, span: Span | None = None, usage: str | None = None) -> Refusal:
        """Return E0515 with the correct usage."""
        where, usage = span or self.node.span, usage or self.function.usage
        return Refusal(BadCall, where, name=self.function.name, reason=reason, usage=usage)

    def bad(self, reason: str, hint: str, span: Span | None = None) -> Refusal:
        where = span or self.node.span
        return Refusal(BadValue, where, expression=where.text, reason=reason, hint=hint)

    def expect(self, least: int, most: int | None = None) -> list[ast.Expr]:
        """Return the positional arguments if their number is allowed."""
        if len(self.positional) < least:
            raise self.wrong("needs more arguments" if self.positional else "needs an argument")
        if most is not None and len(self.positional) > most:
            raise self.wrong("has too many arguments", self.positional[most].span)
        return self.positional

    def value(self, node: ast.Expr) -> RowValue:
        return self.evaluate(node, self.scope, self.key)

    def argument(self, name: str) -> ast.Expr | None:
        argument = self.named.get(name)
        return cast("ast.Expr", argument.value) if argument is not None else None

    def text(self, name: str, default: str) -> str:
        node = self.argument(name)
        if node is None:
            return default
        rich = render_value(self.value(node))
        if rich is None:
            raise self.bad("it isn't a text", 'write a text: `sep: ", "`', node.span)
        return rich.text

    def empty(self, reason: str) -> Refusal:
        """Return E0512: the draw is impossible."""
        expression = self.node.span.text
        return Refusal(EmptyDraw, self.node.span, expression=expression, reason=reason)

    def draw_other(
        self, values: Sequence[RowValue], without: set[object], key: DrawKey
    ) -> RowValue:
        """Draw one of `values` that isn't in `without`.

        A corrupted row reuses the clean row's draw if it is allowed.
        """
        for value in self.scope.kept(key):
            if to_hashable(to_plain(value)) not in without:
                return value
        value = self._draw_allowed(values, without, key)
        self.scope.keep(key, value)
        return value

    def _draw_allowed(
        self, values: Sequence[RowValue], without: set[object], key: DrawKey
    ) -> RowValue:
        for attempt in range(_TRIES):
            if not len(values):
                break
            value = values[self.scope.draw(key, attempt, len(values))]
            if to_hashable(to_plain(value)) not in without:
                return value
        if len(values) > limits.ITEMS:
            raise self.empty(f"{_TRIES} samples gave only excluded values")
        left = [v for v in values if to_hashable(to_plain(v)) not in without]
        if not left:
            raise self.empty(f"none of its {len(values)} values is allowed")
        return left[self.scope.draw(key, _TRIES, len(left))]


def _function(
    name: str, usage: str, meaning: str, *, named: tuple[str, ...] = (), draws: bool = True
) -> Callable[[Callable[[CallSite], RowValue]], Callable[[CallSite], RowValue]]:
    def register(apply: Callable[[CallSite], RowValue]) -> Callable[[CallSite], RowValue]:
        FUNCTIONS.add(name, PromptFunction(name, usage, meaning, apply, named, draws))
        return apply

    return register


def check_length(length: int, span: Span) -> None:
    """Raise E0506 for a list that is too long, before it is built."""
    if length > limits.ITEMS:
        raise Refusal(
            TooManyValues,
            span,
            what=f"`{span.text}`",
            amount=f"{length:,} items",
            most=limits.ITEMS,
            hint="draw a shorter list",
        )


@_function("other", "other(x)", "another value of the same domain, other than these")
def _other(call: CallSite) -> RowValue:
    nodes = call.expect(1)
    without = {to_hashable(to_plain(call.value(node))) for node in nodes}
    return call.draw_other(call.scope.domain(nodes[0]), without, call.key)


def draw_others(call: CallSite, amount: int) -> list[RowValue]:
    """Draw `amount` values of the domain, all different and unequal to the arguments."""
    nodes = call.expect(1)
    without = {to_hashable(to_plain(call.value(node))) for node in nodes}
    domain = call.scope.domain(nodes[0])
    values: list[RowValue] = []
    for n in range(amount):
        values.append(call.draw_other(domain, without, call.key.item(n)))
        without.add(to_hashable(to_plain(values[-1])))
    return values


@_function("number", "number(x)", "the number that a text spells", draws=False)
def _number(call: CallSite) -> RowValue:
    (node,) = call.expect(1, 1)
    value = to_plain(call.value(node))
    if is_number(value):
        return value
    number = parse_number(value) if isinstance(value, str) else None
    if number is None:
        hint = "exclude these rows with `where`, or correct the data: `1234.5`"
        raise call.bad(f"{value!r} is not a number", hint, node.span)
    return number


def parse_number(text: str) -> int | float | None:
    """Return the number that a text spells in digits, with or without white space around it."""
    plain = text.strip()
    if not _NUMERAL.fullmatch(plain):
        return None
    return int(plain) if plain.lstrip("+-").isdecimal() else float(plain)


_NUMERAL = re.compile(r"[+-]?(\d{1,400}|\d{0,400}\.\d{1,400})([eE][+-]?\d{1,2})?", re.ASCII)


@_function("others", "a, b = others(x, y)", "different values of the same domain, other than these")
def _others(call: CallSite) -> RowValue:
    return draw_others(call, 1)[0]


@_function("choice", 'choice("a", "b")', "one of these")
def _choice(call: CallSite) -> RowValue:
    nodes = call.expect(1)
    if len(nodes) > 1:
        return call.value(nodes[call.scope.draw(call.key, 0, len(nodes))])
    value = call.value(nodes[0])
    entries = [i.value for i in value.items] if isinstance(value, ItemList) else value
    if not isinstance(entries, list):
        raise call.wrong("needs several values, or a list")
    if not entries:
        raise call.empty("the list is empty")
    return entries[call.scope.draw(call.key, 0, len(entries))]


@_function(
    "shuffle",
    "shuffle(column)",
    "a list in a different order, or a column's value from a different row; for a list of "
    "texts, one of their values: `shuffle(shots, output)`",
)
def _shuffle(call: CallSite) -> RowValue:
    node, *more = call.expect(1, 2)
    value = call.value(node)
    if more:
        return _dealt(call, value, more[0])
    if isinstance(value, ItemList):
        order = call.scope.order(call.key, max(1, len(value.items)))
        items = tuple(value.items[order[i]] for i in range(len(value.items)))
        return replace(value, items=items)
    if isinstance(value, list):
        order = call.scope.order(call.key, max(1, len(value)))
        return [value[order[i]] for i in range(len(value))]
    if not isinstance(node, ast.Name):
        raise call.wrong("takes a list or a column")
    return call.scope.elsewhere(node.id, node.span)


def _dealt(call: CallSite, value: RowValue, what: ast.Expr) -> RowValue:
    """Reassign one placeholder's values among a list of texts: `shuffle(shots, output)`.

    The assignment differs from the original one if any two values differ.
    """
    if not isinstance(value, ItemList) or value.text is None:
        raise call.wrong("reassigns values within a list of texts", usage="shuffle(shots, output)")
    if not isinstance(what, ast.Name) or any(what.id not in item.drawn for item in value.items):
        known = name_list(value.items[0].drawn) if value.items else "nothing"
        shown = what.span.written
        raise call.bad(f"its texts don't draw `{shown}`", f"they draw {known}", what.span)
    given = [item.drawn[what.id] for item in value.items]
    count = len(given)
    order = call.scope.order(call.key, max(1, count))
    # If the permutation changes no text, rotate it until one does.
    turns = (([given[(order[i] + n) % count] for i in range(count)]) for n in range(count))
    marks = [to_hashable(to_plain(each)) for each in given]
    dealt = next((t for t in turns if [to_hashable(to_plain(each)) for each in t] != marks), given)
    items: list[ListItem] = []
    for n, (item, new) in enumerate(zip(value.items, dealt, strict=True)):
        drawn = {**item.drawn, what.id: new}
        rich = call.scope.with_values(drawn).text(value.text, call.key.item(n))
        items.append(ListItem(rich, rich, drawn))
    return replace(value, items=tuple(items))


@_function("tokens", "tokens(answer)", "the number of tokens of a text or span", draws=False)
def _tokens(call: CallSite) -> RowValue:
    (node,) = call.expect(1, 1)
    return call.scope.tokens(node, call.value(node))


@_function("token_id", "token_id(column)", "a column of token ids", draws=False)
def _token_id(call: CallSite) -> RowValue:
    (node,) = call.expect(1, 1)
    value = call.value(node)
    if not is_integer(value):
        raise call.bad(f"{to_plain(value)!r} isn't a token id", "give a column of whole numbers")
    return TokenId(value)


@_function("python", 'python("file.py:name")', "the result of a Python function", draws=False)
def _python(call: CallSite) -> RowValue:
    return call.scope.python(call.node)


# --- lists ------------------------------------------------------------------------------------


@_function(
    "list",
    'list(item, count, sep: ", ")',
    "several samples of a value, joined",
    named=("from", "sep", "last", "distinct"),
)
def _list(call: CallSite) -> RowValue:
    nodes = call.expect(1, 2)
    what = nodes[0]
    if not isinstance(what, ast.Name | ast.String):
        raise call.wrong("lists a name, or a text in quotes", what.span)
    sep = call.text("sep", " ")
    last = call.text("last", sep)
    count = _count(call, nodes[1]) if len(nodes) > 1 else None
    distinct = _is_distinct(call)
    source = call.argument("from")
    if source is None:
        if count is None:
            raise call.wrong("needs a count")
        drawn = _from_domains(call, what, count, distinct)
    else:
        drawn = _from_pool(call, what, source, count, distinct)
    if isinstance(what, ast.Name):
        return ItemList(what.id, tuple(drawn), sep, last)
    return ItemList("", tuple(drawn), sep, last, what)


def _count(call: CallSite, node: ast.Expr) -> int:
    value = call.value(node)
    if not is_whole_number(value):
        raise call.bad(f"{to_plain(value)!r} isn't a count", "give a whole number", node.span)
    if value < 0:
        hint = "exclude these rows with `where`, or begin the values higher"
        raise call.bad(f"a list can't have {int(value)} items", hint, node.span)
    check_length(int(value), call.node.span)
    return int(value)


def _is_distinct(call: CallSite) -> bool:
    node = call.argument("distinct")
    if node is None:
        return False
    value = call.value(node)
    if not isinstance(value, bool):
        raise call.wrong("takes `distinct: true` or `distinct: false`", node.span)
    return value


def _picks(
    call: CallSite,
    size: int,
    count: int,
    mark: Callable[[int], object] | None,
    excluded: Callable[[int], bool] | None = None,
) -> Iterator[int]:
    """Yield the indices of draws. The first n are equal for any `count`.

    mark: the key of an entry, if all have to be different. excluded: whether an entry is forbidden.
    """
    if mark is not None:
        seen: set[object] = set()
        order = call.scope.order(call.key, size) if size else ()
        for place in range(size):
            if len(seen) == count:
                return
            index = order[place]
            own = mark(index)
            if own not in seen and (excluded is None or not excluded(index)):
                seen.add(own)
                yield index
        if len(seen) < count:
            raise call.empty(
                f"{count} different entries are needed, but there are only {len(seen)}"
            )
        return
    for n in range(count):
        for attempt in range(_TRIES if size else 0):
            index = call.scope.draw(call.key.item(n), attempt, size)
            if excluded is None or not excluded(index):
                yield index
                break
        else:
            raise call.empty("the only record is the row's own" if size else "it is empty")


def _item(
    call: CallSite, what: ast.Name | ast.String, drawn: Mapping[str, RowValue], key: DrawKey
) -> ListItem:
    """Build the item for drawn values, after the corruption's changes to them."""
    changed = {name: call.scope.changed_item(name, value, key) for name, value in drawn.items()}
    if isinstance(what, ast.String):
        rich = call.scope.with_values(changed).text(what, key)
        return ListItem(rich, rich, changed)
    value = changed[what.id]
    rich = render_value(value)
    if rich is None:
        raise call.bad(f"`{what.id}` has no text", "list texts or numbers", what.span)
    return cached_item(value, rich) if isinstance(value, str) else ListItem(value, rich)


def _from_domains(
    call: CallSite, what: ast.Name | ast.String, count: int, distinct: bool
) -> Iterator[ListItem]:
    """Yield draws of the values that a name, or a text's placeholders, range over."""
    if isinstance(what, ast.Name):
        names: list[ast.Name] = [what]
    else:
        inner = call.scope.placeholders(what)
        names = list({n.id: n for n in inner if isinstance(n, ast.Name)}.values())
    domains = [call.scope.domain(name) for name in names]
    size = 1
    for domain in domains:
        size *= len(domain)

    def values(index: int) -> dict[str, RowValue]:
        row_values: dict[str, RowValue] = {}
        for name, domain in zip(names, domains, strict=True):
            index, at = divmod(index, len(domain))
            row_values[name.id] = domain[at]
        return row_values

    def mark(index: int) -> object:
        return tuple(to_hashable(to_plain(v)) for v in values(index).values())

    for n, index in enumerate(_picks(call, size, count, mark if distinct else None)):
        yield _item(call, what, values(index), call.key.item(n))


def _from_pool(
    call: CallSite,
    what: ast.Name | ast.String,
    source: ast.Expr,
    count: int | None,
    distinct: bool,
) -> Iterator[ListItem]:
    """Yield entries of a column of lists, or records of a block of prompts."""
    if not isinstance(source, ast.Name):
        raise call.wrong("takes the name of a column or of prompts after `from:`", source.span)
    fields = _fields(call, what)
    pool = _pool(call, source, drawn=count is not None)

    def excluded(index: int) -> bool:
        # A shot equal to the question would reveal the answer.
        entry = pool[index]
        return isinstance(entry, Mapping) and call.scope.is_own(entry, fields)

    def mark(index: int) -> object:
        return to_hashable(to_plain(pool[index]))

    if count is None:
        check_length(len(pool), call.node.span)
        indices: Iterator[int] = iter(range(len(pool)))
    else:
        indices = _picks(call, len(pool), count, mark if distinct else None, excluded)
    for n, index in enumerate(indices):
        entry = pool[index]
        if isinstance(entry, Mapping):
            values = dict(entry)
            own = isinstance(what, ast.String)
            missing = [f for f in fields if f not in values and not (own and call.scope.known(f))]
            if missing:
                raise call.bad(
                    f"the records of `{source.id}` have no `{missing[0]}`",
                    f"they have {name_list(values)}",
                    what.span,
                )
        elif len(fields) == 1:
            values = {fields[0]: entry}
        else:
            raise call.wrong("needs one name for each entry of the list", what.span)
        yield _item(call, what, values, call.key.item(n))


def _fields(call: CallSite, what: ast.Name | ast.String) -> list[str]:
    if isinstance(what, ast.Name):
        return [what.id]
    inner = call.scope.placeholders(what)
    return list(dict.fromkeys(n.id for n in inner if isinstance(n, ast.Name)))


def _pool(call: CallSite, source: ast.Name, *, drawn: bool) -> Sequence[RowValue]:
    if not call.scope.known(source.id):
        records = call.scope.records(source.id, drawn=drawn)
        if records is not None:
            return records
    value = call.scope.value(source.id, source.span)
    if isinstance(value, ItemList):
        return [item.value for item in value.items]
    if not isinstance(value, list):
        hint = "give a column that holds lists, or prompts with `rows`"
        raise call.bad(f"`{source.id}` is not a list", hint, source.span)
    return value


_LARGEST = 10**limits.DIGITS

_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def bad_value(span: Span, reason: str, hint: str) -> Refusal:
    """Return E0503 at an expression."""
    return Refusal(BadValue, span, expression=span.text, reason=reason, hint=hint)


def evaluate(node: ast.Expr, scope: Scope, key: DrawKey) -> RowValue:
    """Evaluate an expression.

    Raises:
        Refusal: E0501, E0503, E0506, E0512 to E0515.
    """
    # The two most common classes first. None has subclasses, and `isinstance` is slower.
    if type(node) is ast.Name:
        return scope.value(node.id, node.span)
    if type(node) is ast.String:
        return scope.text(node, key)
    how = _EVALUATORS.get(type(node))
    if how is None:
        raise bad_value(node.span, "prompts have no such value", "write a value of the row")
    return how(node, scope, key)


def is_condition_true(node: ast.Expr, scope: Scope, key: DrawKey) -> bool:
    """Evaluate a condition."""
    value = evaluate(node, scope, key)
    if not isinstance(value, bool):
        raise bad_value(node.span, "it is neither true nor false", "compare it: `count > 3`")
    return value


def evaluate_number(node: ast.Expr, scope: Scope, key: DrawKey) -> int | float:
    """Evaluate an expression that has to be a number."""
    value = evaluate(node, scope, key)
    if not is_number(value):
        shown = to_plain(value)
        hint = 'numbers are written without quotes; join texts in quotes: `"{a} {b}"`'
        if isinstance(shown, str) and parse_number(shown) is not None:
            hint = f"the data contain it as text: write `number({node.span.written})`"
        raise bad_value(node.span, f"it is {shown!r}, not a number", hint)
    return value


def evaluate_whole_number(node: ast.Expr, scope: Scope, key: DrawKey) -> int:
    """Evaluate an expression that has to be a whole number."""
    value = evaluate_number(node, scope, key)
    if not is_whole_number(value):
        hint = "write an expression whose value is a whole number"
        raise bad_value(node.span, f"{value} is not a whole number", hint)
    return int(value)


def _binary(node: ast.Binary, scope: Scope, key: DrawKey) -> int | float:
    try:
        number = _calculated(node, scope, key)
    except OverflowError:
        number = inf
    if not abs(number) < _LARGEST:  # also true for NaN
        reason = f"it has more than {limits.DIGITS} digits"
        raise bad_value(node.span, reason, "calculate with smaller numbers")
    return number


def _calculated(node: ast.Binary, scope: Scope, key: DrawKey) -> int | float:
    left = evaluate_number(node.left, scope, key)
    right = evaluate_number(node.right, scope, key)
    match node.operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "/":
            if right == 0:
                raise bad_value(node.span, "it divides by zero", "exclude these rows with `where`")
            exact = isinstance(left, int) and isinstance(right, int) and left % right == 0
            return left // right if exact else left / right


def _index(node: ast.Index, scope: Scope, key: DrawKey) -> RowValue:
    value = scope.value(node.name, node.span)
    if isinstance(node.index, ast.RankedSelection | ast.Coordinates):
        what = "ranking" if isinstance(node.index, ast.RankedSelection) else "layers or heads"
        raise bad_value(node.span, f"prompts have no {what}", "write a number: `xs[2]`")
    at = evaluate_whole_number(node.index, scope, key)
    entries = [i.value for i in value.items] if isinstance(value, ItemList) else value
    if not isinstance(entries, list):
        raise bad_value(node.span, f"`{node.name}` is not a list", "index the result of `list(…)`")
    if not 1 <= at <= len(entries):
        reason = f"`{node.name}` has {count_noun(len(entries), 'item')}"
        raise bad_value(node.span, reason, "items count from 1; exclude short rows with `where`")
    return entries[at - 1]


def _range(node: ast.Range, scope: Scope, key: DrawKey) -> range:
    low = evaluate_whole_number(node.low, scope, key)
    high = evaluate_whole_number(node.high, scope, key)
    check_length(high - low + 1, node.span)
    return range(low, high + 1)


def _is_one(value: object, item: ast.Expr | ast.Range, scope: Scope, key: DrawKey) -> bool:
    """Return whether a value equals an item of a list, or is in a range there."""
    if isinstance(item, ast.Range):
        return value in _range(item, scope, key)
    return value == to_plain(evaluate(item, scope, key))


def _constant(node: ast.Number | ast.Percent, scope: Scope, key: DrawKey) -> int | float:
    return node.value


def _attribute(node: ast.Attribute, scope: Scope, key: DrawKey) -> RowValue:
    return scope.attribute(node.name, node.attribute, node.span)


def _literal(node: ast.ListLiteral, scope: Scope, key: DrawKey) -> list[RowValue]:
    values: list[RowValue] = []
    for item in node.items:
        if isinstance(item, ast.Range):
            values += _range(item, scope, key)
        else:
            values.append(evaluate(item, scope, key))
    return values


def _negative(node: ast.Negative, scope: Scope, key: DrawKey) -> int | float:
    return -evaluate_number(node.operand, scope, key)


def _conditional(node: ast.Conditional, scope: Scope, key: DrawKey) -> RowValue:
    holds = is_condition_true(node.condition, scope, key)
    return evaluate(node.then if holds else node.otherwise, scope, key)


def _compare(node: ast.Compare, scope: Scope, key: DrawKey) -> bool:
    a = to_plain(evaluate(node.left, scope, key))
    b = to_plain(evaluate(node.right, scope, key))
    try:
        return bool(_COMPARE[node.operator](a, b))
    except TypeError:
        reason = f"{a!r} and {b!r} can't be ordered"
        hint = "compare numbers with numbers and texts with texts"
        text = node.left if isinstance(a, str) else node.right
        if {type(a), type(b)} in ({str, int}, {str, float}) and isinstance(text, ast.Name):
            hint = f"`{text.id}` holds texts; if all of them are numbers, write `number({text.id})`"
        raise bad_value(node.span, reason, hint) from None


def _in_range(node: ast.InRange, scope: Scope, key: DrawKey) -> bool:
    within = node.within
    if isinstance(within, ast.Range):
        number = evaluate_number(node.value, scope, key)
        low = evaluate_number(within.low, scope, key)
        high = evaluate_number(within.high, scope, key)
        return low <= number <= high
    if isinstance(within, ast.ListLiteral):
        value = to_plain(evaluate(node.value, scope, key))
        # Ranges of many numbers aren't expanded for every row.
        return True in [_is_one(value, item, scope, key) for item in within.items]
    values = to_plain(evaluate(within, scope, key))
    if not isinstance(values, list):
        raise bad_value(node.span, "the right side of `in` isn't a list", "write `x in [1, 2]`")
    return to_plain(evaluate(node.value, scope, key)) in values


def _near(node: ast.Near, scope: Scope, key: DrawKey) -> bool:
    value = evaluate_number(node.value, scope, key)
    distance = value - evaluate_number(node.target, scope, key)
    return abs(distance) <= evaluate_number(node.tolerance, scope, key)


def _logical(node: ast.Logical, scope: Scope, key: DrawKey) -> bool:
    left = is_condition_true(node.left, scope, key)
    if left is (node.operator != "and"):
        return left
    return is_condition_true(node.right, scope, key)


def _not(node: ast.Not, scope: Scope, key: DrawKey) -> bool:
    return not is_condition_true(node.operand, scope, key)


def _call(node: ast.Call, scope: Scope, key: DrawKey) -> RowValue:
    function = FUNCTIONS.get(node.name)
    if function is None:
        known = ", ".join(f"`{name}`" for name in FUNCTIONS)
        hint = did_you_mean(node.name, FUNCTIONS, f"there are {known}")
        if node.name in DRAWN_IMAGES:
            hint = f"`{node.name}` draws an image: write `image NAME = {node.name}(…)`"
        raise Refusal(UnknownFunction, node.span, name=node.name, hint=hint)
    return function.apply(CallSite(node, function, scope, key.call(), evaluate))


_EVALUATORS: Mapping[type[ast.Node], Callable[[Any, Scope, DrawKey], RowValue]] = {
    ast.Number: _constant,
    ast.Percent: _constant,
    ast.Attribute: _attribute,
    ast.Index: _index,
    ast.Call: _call,
    ast.ListLiteral: _literal,
    ast.Negative: _negative,
    ast.Binary: _binary,
    ast.Conditional: _conditional,
    ast.Compare: _compare,
    ast.InRange: _in_range,
    ast.Near: _near,
    ast.Logical: _logical,
    ast.Not: _not,
}


PlaceholderLookup: TypeAlias = Callable[[ast.String], Sequence[ast.Expr]]
"""A text → the expressions in its braces."""


class NameUse(Record):
    """A reference to a name, with its role.

    `value`: the row's value; `item`: drawn by a list; `pool`: the name after `from:`; `domain`: the
    values it ranges over, which `other(x)` needs in addition to its value.
    """

    name: str
    how: Literal["value", "item", "pool", "domain"]
    span: Span


def name_uses(node: Any, placeholders: PlaceholderLookup) -> Iterator[NameUse]:
    """Yield every reference in an expression, in text order."""
    match node:
        case ast.Name(id=name):
            yield NameUse(name, "value", node.span)
        case ast.Attribute(name=name):
            yield NameUse(name, "value", node.span)
        case ast.Index(name=name, index=index):
            yield NameUse(name, "value", node.span)
            yield from name_uses(index, placeholders)
        case ast.String():
            for inner in placeholders(node):
                yield from name_uses(inner, placeholders)
        case ast.Call(name="words"):
            return
        case ast.Call(name="list"):
            yield from _list_uses(node, placeholders)
        case ast.Call(name="shuffle", arguments=(shuffled, _)):  # the second names a placeholder
            yield from name_uses(shuffled.value, placeholders)
        case ast.Call(name="other" | "others", arguments=arguments):
            for n, argument in enumerate(arguments):
                if n == 0 and isinstance(argument.value, ast.Name):
                    yield NameUse(argument.value.id, "domain", argument.value.span)
                yield from name_uses(argument.value, placeholders)
        case ast.Node():
            for f in fields(node):
                yield from name_uses(getattr(node, f.name), placeholders)
        case tuple():
            for entry in node:  # pyright: ignore[reportUnknownVariableType]
                yield from name_uses(entry, placeholders)
        case _:
            return


def _list_uses(node: ast.Call, placeholders: PlaceholderLookup) -> Iterator[NameUse]:
    source = next((a for a in node.arguments if a.name == "from"), None)
    for n, argument in enumerate(node.arguments):
        value = argument.value
        if argument is source:
            if isinstance(value, ast.Name):
                yield NameUse(value.id, "pool", value.span)
        elif n == 0 and argument.name is None:
            drawn = [value] if isinstance(value, ast.Name) else []
            if isinstance(value, ast.String):
                drawn = list(placeholders(value))
            for inner in drawn:
                if not isinstance(inner, ast.Name):
                    yield from name_uses(inner, placeholders)
                elif source is None:
                    yield NameUse(inner.id, "item", inner.span)
        else:
            yield from name_uses(value, placeholders)


def is_random(node: Any, placeholders: PlaceholderLookup) -> bool:
    """Return whether an expression draws, so that a combination can yield several rows."""
    match node:
        case ast.Call(name="other" | "others" | "choice" | "shuffle"):
            return True
        case ast.Call(name="list", arguments=arguments):
            everything = len([a for a in arguments if a.name is None]) < 2
            return not everything or any(is_random(a.value, placeholders) for a in arguments)
        case ast.String():
            return any(is_random(inner, placeholders) for inner in placeholders(node))
        case ast.Node():
            return any(is_random(getattr(node, f.name), placeholders) for f in fields(node))
        case tuple():
            return any(is_random(entry, placeholders) for entry in node)  # pyright: ignore[reportUnknownVariableType]
        case _:
            return False


def find_calls(node: Any, placeholders: PlaceholderLookup) -> Iterator[ast.Call]:
    """Yield every call of an expression, including those in the braces of texts."""
    for part in walk(node):
        if isinstance(part, ast.Call):
            yield part
        elif isinstance(part, ast.String):
            yield from find_calls(tuple(placeholders(part)), placeholders)


def counts_tokens(node: object) -> bool:
    """Return whether a node is `tokens(…)`, which depends on the model's tokenizer."""
    return isinstance(node, ast.Call) and node.name == "tokens"


Constants = Mapping[str, int | float | str | bool]

WordLookup = Callable[[str], Sequence[str] | None]
"""The plain words of a model's tokenizer, by the model's name; None for an unknown name."""


class SteppedRange(Sequence[RowValue]):
    """`low`, `low + step`, … up to `high`, in decimal arithmetic: 0.3, not 0.30000000000000004."""

    def __init__(self, low: int | float, high: int | float, step: int | float) -> None:
        self._low, self._step = Decimal(str(low)), Decimal(str(step))
        self._whole = all(isinstance(n, int) for n in (low, step))
        self._length = max(0, int((Decimal(str(high)) - self._low) // self._step) + 1)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> RowValue: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RowValue]: ...
    def __getitem__(self, index: int | slice) -> RowValue | Sequence[RowValue]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not 0 <= index < self._length:
            raise IndexError(index)
        value = self._low + index * self._step
        return int(value) if self._whole else float(value)


class JoinedSequence(Sequence[RowValue]):
    """The concatenation of several sequences."""

    def __init__(self, parts: Sequence[Sequence[RowValue]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> RowValue: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RowValue]: ...
    def __getitem__(self, index: int | slice) -> RowValue | Sequence[RowValue]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        before = self._ends[part - 1] if part else 0
        return self._parts[part][index - before]

    def __iter__(self) -> Iterator[RowValue]:
        for part in self._parts:
            yield from part


class _RefusedDomain(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.code)
        self.diagnostic = diagnostic


def make_domain(
    domain: ast.Domain, *, prompts: str, constants: Constants, words: WordLookup | None
) -> tuple[Sequence[RowValue], list[Diagnostic]]:
    """Return the values of a domain. Codes: E0201, E0501, E0503, E0506, E0509, E0515."""
    try:
        values = _Maker(prompts, constants, words).values(domain)
    except _RefusedDomain as refused:
        return (), [refused.diagnostic]
    if not len(values):
        hint = "ranges ascend and include both ends"
        return (), [
            NoRows(span=domain.span, prompts=prompts, reason="this range is empty", hint=hint)
        ]
    return values, []


class _Maker:
    def __init__(self, prompts: str, constants: Constants, words: WordLookup | None) -> None:
        self.prompts = prompts
        self.constants = constants
        self.words = words

    def values(self, domain: ast.Domain) -> Sequence[RowValue]:
        match domain.values:
            case ast.Range() as inner:
                return self.range(inner, domain.step)
            case ast.ListLiteral(items=items):
                parts: list[Sequence[RowValue]] = []
                for item in items:
                    if isinstance(item, ast.Range):
                        parts.append(self.range(item, None))
                    else:
                        parts.append((self.constant(item),))
                return JoinedSequence(parts)
            case ast.Call(name="words"):
                return self.words_of(domain.values)
            case other:
                return (self.constant(other),)

    def range(self, node: ast.Range, step: ast.Expr | None) -> Sequence[RowValue]:
        low, high = self.number(node.low), self.number(node.high)
        by = 1 if step is None else self.number(step)
        if by <= 0:
            assert step is not None
            raise self.bad(step, "steps are positive", "write a step above 0")
        count = (high - low) / by + 1
        if count > limits.DOMAIN:
            raise _RefusedDomain(
                TooManyValues(
                    span=node.span,
                    what=f"`{node.span.written}`",
                    amount=f"{count:,.0f} values" if count < 1e30 else f"{count:.0e} values",
                    most=limits.DOMAIN,
                    hint="write a smaller range, or a larger `step`",
                )
            )
        if all(isinstance(n, int) for n in (low, high, by)):
            return range(cast("int", low), cast("int", high) + 1, cast("int", by))
        return SteppedRange(low, high, by)

    def number(self, node: ast.Expr) -> int | float:
        value = self.constant(node)
        if not is_number(value):
            raise self.bad(node, f"{value!r} is not a number", "ranges go from number to number")
        return value

    def constant(self, node: ast.Expr) -> int | float | str | bool:
        match node:
            case ast.Number(value=value) | ast.String(value=value) | ast.Percent(value=value):
                return value
            case ast.Negative(operand=operand):
                return -self.number(operand)
            case ast.Binary(operator=sign, left=left, right=right) if sign != "/":
                a, b = self.number(left), self.number(right)
                return a + b if sign == "+" else a - b if sign == "-" else a * b
            case ast.Name(id=name) if name in self.constants:
                return self.constants[name]
            case ast.Name(id=name) if name in ("true", "false"):
                return name == "true"
            case ast.Name(id=name):
                otherwise = (
                    "a domain is fixed for all rows: it holds numbers, texts and parameters; "
                    "restrict combinations with `where`"
                )
                hint = did_you_mean(name, self.constants, otherwise)
                raise _RefusedDomain(
                    UnknownValue(span=node.span, prompts=self.prompts, name=name, hint=hint)
                )
            case _:
                hint = "a domain is fixed for all rows: write numbers, texts or parameters"
                if isinstance(node, ast.Call):
                    hint = did_you_mean(node.name, ["words"], hint)
                raise self.bad(node, "it isn't constant", hint)

    def words_of(self, node: ast.Call) -> Sequence[RowValue]:
        usage = "words(MODEL)"
        model = node.arguments[0].value if len(node.arguments) == 1 else None
        if not isinstance(model, ast.Name):
            reason = "takes one argument, the name of a model"
            raise _RefusedDomain(BadCall(span=node.span, name="words", reason=reason, usage=usage))
        if self.words is None:
            reason = "the model's tokenizer isn't available here"
            raise self.bad(node, reason, "write the words in a list")
        words = self.words(model.id)
        if words is None:
            # Same text as the check of the file's names, so that it is reported once.
            raise _RefusedDomain(
                UnknownName(span=model.span, kind="model", name=model.id, hint="define it first")
            )
        return tuple(words)

    def bad(self, node: ast.Node, reason: str, hint: str) -> _RefusedDomain:
        text = node.span.text
        return _RefusedDomain(
            BadValue(span=node.span, expression=text, reason=reason, rows="every row", hint=hint)
        )
