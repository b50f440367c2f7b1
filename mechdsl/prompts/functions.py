"""The functions of a prompts block: `list`, `other`, `choice` and so on, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.base.registry import Registry, nearest
from mechdsl.base.source import Span
from mechdsl.diagnostics.e05_data import BadCall, BadValue, NothingToDraw, TooMany
from mechdsl.prompts.row_scope import Key, Refusal, Scope
from mechdsl.prompts.values import (
    Item,
    Items,
    TokenId,
    Value,
    frozen,
    is_whole,
    plain,
    render,
    shared_item,
)
from mechdsl.syntax import ast

_TRIES = 64
"""Draws before the values that are left are counted out."""

Evaluate = Callable[[ast.Expr, Scope, Key], Value]


@dataclass(frozen=True)
class Function:
    """`usage` is what the help line of a wrong call shows."""

    name: str
    usage: str
    meaning: str
    apply: Callable[[CallSite], Value]
    named: tuple[str, ...] = ()
    draws: bool = True


FUNCTIONS: Registry[Function] = Registry("function")


@dataclass
class CallSite:
    """A call that is being evaluated on a row."""

    node: ast.Call
    function: Function
    scope: Scope
    key: Key
    evaluate: Evaluate
    named: dict[str, ast.Argument] = field(default_factory=dict[str, ast.Argument])
    positional: list[ast.Expr] = field(default_factory=list[ast.Expr])

    def __post_init__(self) -> None:
        for argument in self.node.arguments:
            value = argument.value
            if isinstance(value, ast.Range | ast.Quantity | ast.Site):
                raise self.wrong("takes values, not ranges or sites", argument.span)
            if argument.name is None:
                self.positional.append(value)
            elif argument.name not in self.function.named:
                meant = nearest(argument.name, self.function.named)
                reason = f"has no argument `{argument.name}`"
                raise self.wrong(reason, argument.span, f"{meant}: …" if meant else None)
            elif argument.name in self.named:
                raise self.wrong(f"has `{argument.name}` twice", argument.span)
            else:
                self.named[argument.name] = argument

    def wrong(self, reason: str, span: Span | None = None, usage: str | None = None) -> Refusal:
        """E0515, with how to write it."""
        where, usage = span or self.node.span, usage or self.function.usage
        return Refusal(BadCall, where, name=self.function.name, reason=reason, usage=usage)

    def bad(self, reason: str, hint: str, span: Span | None = None) -> Refusal:
        where = span or self.node.span
        return Refusal(BadValue, where, expression=where.text, reason=reason, hint=hint)

    def expect(self, least: int, most: int | None = None) -> list[ast.Expr]:
        """The positional arguments, if they are as many."""
        if len(self.positional) < least:
            raise self.wrong("needs more arguments" if self.positional else "needs an argument")
        if most is not None and len(self.positional) > most:
            raise self.wrong("has too many arguments", self.positional[most].span)
        return self.positional

    def value(self, node: ast.Expr) -> Value:
        return self.evaluate(node, self.scope, self.key)

    def argument(self, name: str) -> ast.Expr | None:
        found = self.named.get(name)
        return cast("ast.Expr", found.value) if found is not None else None

    def text(self, name: str, default: str) -> str:
        node = self.argument(name)
        if node is None:
            return default
        rich = render(self.value(node))
        if rich is None:
            raise self.bad("it is no text", 'write a text: `sep: ", "`', node.span)
        return rich.text

    def empty(self, reason: str) -> Refusal:
        """E0512: the draw is impossible."""
        expression = self.node.span.text
        return Refusal(NothingToDraw, self.node.span, expression=expression, reason=reason)

    def draw_other(self, values: Sequence[Value], without: set[object], key: Key) -> Value:
        """One of `values` that isn't in `without`.

        What the clean row drew stays in the corrupted one as long as it is allowed.
        """
        for value in self.scope.kept(key):
            if frozen(plain(value)) not in without:
                return value
        value = self._draw_allowed(values, without, key)
        self.scope.keep(key, value)
        return value

    def _draw_allowed(self, values: Sequence[Value], without: set[object], key: Key) -> Value:
        for attempt in range(_TRIES):
            if not len(values):
                break
            value = values[self.scope.draw(key, attempt, len(values))]
            if frozen(plain(value)) not in without:
                return value
        if len(values) > limits.ITEMS:
            raise self.empty(f"{_TRIES} draws gave only excluded values")
        left = [v for v in values if frozen(plain(v)) not in without]
        if not left:
            raise self.empty(f"none of its {len(values)} values is allowed")
        return left[self.scope.draw(key, _TRIES, len(left))]


def _function(
    name: str, usage: str, meaning: str, *, named: tuple[str, ...] = (), draws: bool = True
) -> Callable[[Callable[[CallSite], Value]], Callable[[CallSite], Value]]:
    def register(apply: Callable[[CallSite], Value]) -> Callable[[CallSite], Value]:
        FUNCTIONS.add(name, Function(name, usage, meaning, apply, named, draws))
        return apply

    return register


def check_length(length: int, span: Span) -> None:
    """E0506 for a list that is too long, before it is built."""
    if length > limits.ITEMS:
        raise Refusal(
            TooMany,
            span,
            what=f"`{span.text}`",
            amount=f"{length:,} items",
            most=limits.ITEMS,
            hint="draw a shorter list",
        )


@_function("other", "other(x)", "another value of the same domain, none of these")
def _other(call: CallSite) -> Value:
    nodes = call.expect(1)
    without = {frozen(plain(call.value(node))) for node in nodes}
    return call.draw_other(call.scope.domain(nodes[0]), without, call.key)


def draw_others(call: CallSite, amount: int) -> list[Value]:
    """As many values of the domain, all different, none of the arguments."""
    nodes = call.expect(1)
    without = {frozen(plain(call.value(node))) for node in nodes}
    domain = call.scope.domain(nodes[0])
    found: list[Value] = []
    for n in range(amount):
        found.append(call.draw_other(domain, without, call.key.item(n)))
        without.add(frozen(plain(found[-1])))
    return found


@_function("others", "a, b = others(x, y)", "different values of the same domain, none of these")
def _others(call: CallSite) -> Value:
    return draw_others(call, 1)[0]


@_function("choice", 'choice("a", "b")', "one of these")
def _choice(call: CallSite) -> Value:
    nodes = call.expect(1)
    if len(nodes) > 1:
        return call.value(nodes[call.scope.draw(call.key, 0, len(nodes))])
    value = call.value(nodes[0])
    entries = [i.value for i in value.items] if isinstance(value, Items) else value
    if not isinstance(entries, list):
        raise call.wrong("needs several values, or a list")
    if not entries:
        raise call.empty("the list is empty")
    return entries[call.scope.draw(call.key, 0, len(entries))]


@_function(
    "shuffle",
    "shuffle(column)",
    "a list in another order, a column in another row's value; of texts one value, as of `shots`: "
    "`shuffle(shots, output)`",
)
def _shuffle(call: CallSite) -> Value:
    node, *more = call.expect(1, 2)
    value = call.value(node)
    if more:
        return _dealt(call, value, more[0])
    if isinstance(value, Items):
        order = call.scope.order(call.key, max(1, len(value.items)))
        items = tuple(value.items[order[i]] for i in range(len(value.items)))
        return replace(value, items=items)
    if isinstance(value, list):
        order = call.scope.order(call.key, max(1, len(value)))
        return [value[order[i]] for i in range(len(value))]
    if not isinstance(node, ast.Name):
        raise call.wrong("takes a list or a column")
    return call.scope.elsewhere(node.id, node.span)


def _dealt(call: CallSite, value: Value, what: ast.Expr) -> Value:
    """A list of texts in which one placeholder's values are dealt out anew, to others where any
    differ: `shuffle(shots, output)`."""
    if not isinstance(value, Items) or value.text is None:
        raise call.wrong("deals out values of a list of texts", usage="shuffle(shots, output)")
    if not isinstance(what, ast.Name) or any(what.id not in item.drawn for item in value.items):
        known = name_list(value.items[0].drawn) if value.items else "nothing"
        shown = what.span.written
        raise call.bad(f"its texts draw no `{shown}`", f"they draw {known}", what.span)
    given = [item.drawn[what.id] for item in value.items]
    count = len(given)
    order = call.scope.order(call.key, max(1, count))
    # One that moves none of them is turned by one: its texts would be what they were.
    turns = (([given[(order[i] + n) % count] for i in range(count)]) for n in range(count))
    marks = [frozen(plain(each)) for each in given]
    dealt = next((t for t in turns if [frozen(plain(each)) for each in t] != marks), given)
    items: list[Item] = []
    for n, (item, new) in enumerate(zip(value.items, dealt, strict=True)):
        drawn = {**item.drawn, what.id: new}
        rich = call.scope.with_values(drawn).text(value.text, call.key.item(n))
        items.append(Item(rich, rich, drawn))
    return replace(value, items=tuple(items))


@_function("tokens", "tokens(answer)", "how many tokens a text or a span has", draws=False)
def _tokens(call: CallSite) -> Value:
    (node,) = call.expect(1, 1)
    return call.scope.tokens(node, call.value(node))


@_function("token_id", "token_id(column)", "a column that holds ids of tokens", draws=False)
def _token_id(call: CallSite) -> Value:
    (node,) = call.expect(1, 1)
    value = call.value(node)
    if isinstance(value, bool) or not isinstance(value, int):
        raise call.bad(f"{plain(value)!r} is no token id", "give a column of whole numbers")
    return TokenId(value)


@_function("python", 'python("file.py:name")', "what a Python function gives", draws=False)
def _python(call: CallSite) -> Value:
    return call.scope.python(call.node)


# --- lists ------------------------------------------------------------------------------------


@_function(
    "list",
    'list(item, count, sep: ", ")',
    "draws of a value behind one another",
    named=("from", "sep", "last", "distinct"),
)
def _list(call: CallSite) -> Value:
    nodes = call.expect(1, 2)
    what = nodes[0]
    if not isinstance(what, ast.Name | ast.String):
        raise call.wrong("lists a name, or a text in quotes", what.span)
    sep = call.text("sep", " ")
    last = call.text("last", sep)
    count = _count(call, nodes[1]) if len(nodes) > 1 else None
    distinct = _flag(call, "distinct")
    source = call.argument("from")
    if source is None:
        if count is None:
            raise call.wrong("needs a count")
        drawn = _from_domains(call, what, count, distinct)
    else:
        drawn = _from_pool(call, what, source, count, distinct)
    if isinstance(what, ast.Name):
        return Items(what.id, tuple(drawn), sep, last)
    return Items("", tuple(drawn), sep, last, what)


def _count(call: CallSite, node: ast.Expr) -> int:
    value = call.value(node)
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_whole(value):
        raise call.bad(f"{plain(value)!r} is no count", "give a whole number", node.span)
    if value < 0:
        hint = "leave these rows out with `where`, or begin the values higher"
        raise call.bad(f"a list can't have {int(value)} items", hint, node.span)
    check_length(int(value), call.node.span)
    return int(value)


def _flag(call: CallSite, name: str) -> bool:
    node = call.argument(name)
    if node is None:
        return False
    value = call.value(node)
    if not isinstance(value, bool):
        raise call.wrong(f"takes `{name}: true` or `{name}: false`", node.span)
    return value


def _picks(
    call: CallSite,
    size: int,
    count: int,
    mark: Callable[[int], object] | None,
    excluded: Callable[[int], bool] | None = None,
) -> Iterator[int]:
    """Indices of what is drawn. The first n are the same whatever `count` is.

    mark: what entries are compared by where all have to be different.
    excluded: whether an entry mustn't be drawn.
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
            raise call.empty(f"{count} different ones are asked for, there are {len(seen)}")
        return
    for n in range(count):
        for attempt in range(_TRIES if size else 0):
            index = call.scope.draw(call.key.item(n), attempt, size)
            if excluded is None or not excluded(index):
                yield index
                break
        else:
            raise call.empty("there is nothing but the row's own record" if size else "it is empty")


def _item(
    call: CallSite, what: ast.Name | ast.String, drawn: Mapping[str, Value], key: Key
) -> Item:
    """The item that is made of what was drawn for it, as the corruption leaves that."""
    changed = {name: call.scope.changed_item(name, value, key) for name, value in drawn.items()}
    if isinstance(what, ast.String):
        rich = call.scope.with_values(changed).text(what, key)
        return Item(rich, rich, changed)
    value = changed[what.id]
    rich = render(value)
    if rich is None:
        raise call.bad(f"`{what.id}` has no text", "list texts or numbers", what.span)
    return shared_item(value, rich) if isinstance(value, str) else Item(value, rich)


def _from_domains(
    call: CallSite, what: ast.Name | ast.String, count: int, distinct: bool
) -> Iterator[Item]:
    """Draws of the values that a name, or the placeholders of a text, range over."""
    if isinstance(what, ast.Name):
        names: list[ast.Name] = [what]
    else:
        inner = call.scope.placeholders(what)
        names = list({n.id: n for n in inner if isinstance(n, ast.Name)}.values())
    domains = [call.scope.domain(name) for name in names]
    size = 1
    for domain in domains:
        size *= len(domain)

    def values(index: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for name, domain in zip(names, domains, strict=True):
            index, at = divmod(index, len(domain))
            found[name.id] = domain[at]
        return found

    def mark(index: int) -> object:
        return tuple(frozen(plain(v)) for v in values(index).values())

    for n, index in enumerate(_picks(call, size, count, mark if distinct else None)):
        yield _item(call, what, values(index), call.key.item(n))


def _from_pool(
    call: CallSite,
    what: ast.Name | ast.String,
    source: ast.Expr,
    count: int | None,
    distinct: bool,
) -> Iterator[Item]:
    """Entries of a column that holds a list, or records of a block of prompts."""
    if not isinstance(source, ast.Name):
        raise call.wrong("takes the name of a column or of prompts behind `from:`", source.span)
    fields = _fields(call, what)
    pool = _pool(call, source, drawn=count is not None)

    def excluded(index: int) -> bool:
        # A shot that is the question itself would give the answer away.
        entry = pool[index]
        return isinstance(entry, Mapping) and call.scope.is_own(entry, fields)

    def mark(index: int) -> object:
        return frozen(plain(pool[index]))

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


def _pool(call: CallSite, source: ast.Name, *, drawn: bool) -> Sequence[Value]:
    if not call.scope.known(source.id):
        records = call.scope.records(source.id, drawn=drawn)
        if records is not None:
            return records
    value = call.scope.value(source.id, source.span)
    if isinstance(value, Items):
        return [item.value for item in value.items]
    if not isinstance(value, list):
        hint = "give a column that holds lists, or prompts with `rows`"
        raise call.bad(f"`{source.id}` is not a list", hint, source.span)
    return value
