"""The canonical text of one construct, on one line and without comments."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from mechdsl.syntax import ast
from mechdsl.syntax.transform import unescape

# How tightly each kind of expression binds; what a place of the grammar asks for at least.
CONDITION = 1
_AND, _NOT, _COMPARISON = 2, 3, 4
SUM = 5
_PRODUCT, _FACTOR, _ATOM = 6, 7, 8


def _binding(node: Any) -> int:
    match node:
        case ast.Conditional():
            return 0
        case ast.Logical(operator="or"):
            return CONDITION
        case ast.Logical():
            return _AND
        case ast.Not():
            return _NOT
        case ast.Compare() | ast.InRange() | ast.Near():
            return _COMPARISON
        case ast.Binary(operator="+" | "-"):
            return SUM
        case ast.Binary():
            return _PRODUCT
        case ast.Negative():
            return _FACTOR
        case _:
            return _ATOM


def expression(node: Any) -> str:
    """Where the grammar takes a sum or `if … then … else …`."""
    return _plain(node) if isinstance(node, ast.Conditional) else within(node, SUM)


def within(node: Any, least: int) -> str:
    """An expression, in brackets where it binds less tightly than its place needs."""
    text = _plain(node)
    return f"({text})" if _binding(node) < least else text


def values(node: Any) -> str:
    """A range or an expression."""
    if isinstance(node, ast.Range):
        return f"{within(node.low, SUM)}..{within(node.high, SUM)}"
    return expression(node)


def _plain(node: Any) -> str:
    match node:
        case ast.Number():
            return _number(node)
        case ast.Percent():
            return percentage(node.value)
        case ast.String():
            return string(node.value)
        case ast.Name():
            return node.id
        case ast.ShortSite():
            return _short(node)
        case ast.OfRef():
            return f"{node.name} of {ref(node.of)}"
        case ast.OfExperiment():
            return f"{_plain(node.measure)} of {node.experiment.id}"
        case ast.Attribute():
            return f"{node.name}.{node.attribute}"
        case ast.Index():
            return f"{node.name}[{_inside(node.index)}]"
        case ast.Call():
            return call(node)
        case ast.ListOf():
            return f"[{', '.join(map(values, node.items))}]"
        case ast.EdgeTokenOf():
            return f"{node.which} token of {within(node.of, _ATOM)}"
        case ast.ClassOutput():
            return f"class {within(node.of, _ATOM)}"
        case ast.Negative():
            return f"-{within(node.operand, _FACTOR)}"
        case ast.Binary():
            own = _binding(node)
            return f"{within(node.left, own)} {node.operator} {within(node.right, own + 1)}"
        case ast.Conditional():
            condition = within(node.condition, CONDITION)
            then, otherwise = expression(node.then), expression(node.otherwise)
            return f"if {condition} then {then} else {otherwise}"
        case ast.Compare():
            return f"{within(node.left, SUM)} {node.operator} {within(node.right, SUM)}"
        case ast.InRange():
            return f"{within(node.value, SUM)} in {values(node.within)}"
        case ast.Near():
            value, target = within(node.value, SUM), within(node.target, SUM)
            return f"{value} near {target} within {within(node.tolerance, SUM)}"
        case ast.Logical():
            own = _binding(node)
            return f"{within(node.left, own)} {node.operator} {within(node.right, own + 1)}"
        case ast.Not():
            return f"not {within(node.operand, _NOT)}"
        case _:
            raise TypeError(f"{type(node).__name__} is no expression")


def _inside(node: Any) -> str:
    match node:
        case ast.Ranked():
            return ranked(node)
        case ast.Coordinates(items=items):
            return ", ".join(f"{each.word} {each.value}" for each in items)
        case _:
            return within(node, SUM)


def _number(node: ast.Number) -> str:
    """As it was written (`1e6`), if it was."""
    written = node.span.text
    if written[:1].isdigit():
        try:
            same = type(node.value)(written) == node.value
        except ValueError:
            same = False
        if same:
            return written
    return repr(node.value)


def percentage(value: float) -> str:
    """`50%`, `12.5%`: never with an exponent, which percentages don't have."""
    digits = format(Decimal(repr(value)), "f")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}%"


def string(value: str) -> str:
    """A text in quotes, escaped."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    text = escaped.replace("\n", "\\n").replace("\t", "\\t")
    assert unescape(text) == value
    return f'"{text}"'


def _short(node: ast.ShortSite) -> str:
    unit = f"{node.unit}{node.index}" if node.unit else ""
    return f"L{node.layer}{unit}" + (f".{node.component}" if node.component else "")


def ref(node: ast.Ref) -> str:
    """`fruit`, `fruit.train`."""
    return node.name if node.part is None else f"{node.name}.{node.part}"


def listed(items: Iterable[str]) -> str:
    """`a, b, c`."""
    return ", ".join(items)


def names(items: Iterable[ast.Name]) -> str:
    """Names between commas."""
    return listed(item.id for item in items)


def call(node: ast.Call | ast.Name) -> str:
    """A call; one without arguments has no brackets either."""
    if isinstance(node, ast.Name):
        return node.id
    if not node.arguments:
        return node.name
    return f"{node.name}({listed(map(_argument, node.arguments))})"


def _argument(node: ast.Argument) -> str:
    value: Any = node.value
    if isinstance(value, ast.Quantity):
        text = f"{value.value!r} {value.unit}" + (f" of {value.of}" if value.of else "")
    elif isinstance(value, ast.Site):
        text = site(value)
    else:
        text = values(value)
    return text if node.name is None else f"{node.name}: {text}"


def domain(node: ast.Domain) -> str:
    """What a value ranges over."""
    return values(node.values) + (f" step {within(node.step, SUM)}" if node.step else "")


# --- sites ------------------------------------------------------------------------------------


def site(node: ast.Site) -> str:
    """`resid_post layer 3 in basis b`."""
    parts = [name.id for name in node.names] + [axis(a) for a in node.axes]
    if node.short is not None:
        parts.append(_short(node.short))
    if node.ranked is not None:
        parts.append(f"of {ranked(node.ranked)}" if node.names else ranked(node.ranked))
    if node.basis is not None:
        parts.append(f"in basis {node.basis}")
    return " ".join(parts)


def axis(node: ast.Axis) -> str:
    """`layer 1, 3..5 window 2`."""
    text = f"{node.word}{'s' if node.plural else ''} {listed(map(axis_value, node.values))}"
    if node.window is not None:
        text += f" window {node.window}"
    return text + (f" of {node.of}" if node.of else "")


def axis_value(node: ast.Star | ast.AxisRange) -> str:
    """`*`, `3`, `l + 1..50%`."""
    if isinstance(node, ast.Star):
        return "*"
    return _bound(node.low) + (f"..{_bound(node.high)}" if node.high else "")


def _bound(node: ast.Bound) -> str:
    if node.percent is not None:
        return percentage(node.percent)
    if node.name is not None:
        return node.name + _offset(node.offset)
    return str(node.value)


def _offset(offset: int | ast.Variable) -> str:
    if isinstance(offset, ast.Variable):
        return f" {'-' if offset.negative else '+'} {offset.name}"
    return f" {'-' if offset < 0 else '+'} {abs(offset)}" if offset else ""


def ranked(node: ast.Ranked) -> str:
    """`top 25% of caap(a: 1)`, `best of select`."""
    of = cells_of(node)
    if node.which == "best":
        return f"best of {of}"
    amount = node.amount
    text = percentage(amount.value) if isinstance(amount, ast.Percent) else str(amount)
    return f"top {text} of {of}"


def cells_of(node: ast.Ranked | ast.MapOf) -> str:
    """`caap`, `caap(a: 1)`."""
    return call(ast.Call(node.of, node.cell, span=node.span))


def edge(node: ast.Edge, run: ast.Ref | None = None) -> str:
    """`attention layer * from Q to K`; run: the one that is looked at."""
    parts = ["attention", *([node.stack.id] if node.stack else []), *map(axis, node.axes)]
    parts += [site(node.heads)] if node.heads is not None else []
    parts += [] if run is None else [f"of {ref(run)}"]
    return f"{' '.join(parts)} from {positions(node.queries)} to {positions(node.keys)}"


# --- positions --------------------------------------------------------------------------------


def positions(node: ast.Positions) -> str:
    """`token 0, 3, last token`: a further index stands without `token`."""
    texts: list[str] = []
    before: ast.TokenIndex | None = None
    for item in node.items:
        index = _token_index(item)
        bare = _is_bare(item) and index is not None and not isinstance(index.low, ast.Variable)
        if bare and index is not None and before is not None and before.plural == index.plural:
            texts.append(_index(index))
        else:
            texts.append(position(item))
        before = index
    return listed(texts)


def _token_index(item: ast.Position) -> ast.TokenIndex | None:
    base = item.body.base if isinstance(item.body, ast.Point) else None
    return base if isinstance(base, ast.TokenIndex) else None


def _is_bare(item: ast.Position) -> bool:
    alone = item.align is None and not item.and_answer
    return alone and isinstance(item.body, ast.Point) and item.body.offset == 0


def position(node: ast.Position) -> str:
    """One item of a list of positions."""
    also = " and answer" if node.and_answer else ""
    return _position_set(node.body) + also + (f" align {node.align}" if node.align else "")


def _position_set(node: ast.Point | ast.Between | ast.Except) -> str:
    if isinstance(node, ast.Point):
        return _base(node.base) + _offset(node.offset)
    each = "each token" if node.each else "tokens"
    if isinstance(node, ast.Between):
        return f"{each} between {_position_set(node.low)} and {_position_set(node.high)}"
    return f"{each} except {_position_set(node.excluded)}"


def _base(node: ast.PointBase) -> str:
    match node:
        case ast.TokenIndex():
            return f"{_tokens(node.plural)} {_index(node)}"
        case ast.SpanTokens():
            each = "each " if node.each else ""
            last = "" if node.high is None else f"..{node.high}"
            numbers = "" if node.low is None else f" {node.low}{last}"
            return f"{each}{span(node.of)} {_tokens(node.plural)}{numbers}"
        case ast.EachStep():
            return "each step"
        case ast.EachTokenOf():
            return f"each token of {span(node.of)}"
        case ast.EdgeToken():
            return f"{node.which} token" + (f" of {span(node.of)}" if node.of else "")
        case ast.RankedTokens():
            return f"{ranked(node.ranked)} {_tokens(node.plural)}"
        case ast.Joined():
            return f"{{{positions(node.items)}}}"


def _tokens(plural: bool) -> str:
    return "tokens" if plural else "token"


def _index(node: ast.TokenIndex) -> str:
    low = _counter(node.low)
    return low if node.high is None else f"{low}..{node.high}"


def _counter(node: int | ast.Variable | None) -> str:
    """`*`, `3`, `i`, `-i`, `i + 1`."""
    if isinstance(node, ast.Variable):
        return ("-" if node.negative else "") + node.name + _offset(node.offset)
    return "*" if node is None else str(node)


def span(node: ast.SpanRef) -> str:
    """`item 3`, `last-item of part1`, `"Answer"`, `image row 3 col 4`."""
    if node.literal is not None:
        text = string(node.literal)
    else:
        text = f"{node.edge}-{node.name}" if node.edge else str(node.name)
    if node.occurrence is not None:
        text += f" {occurrence(node.occurrence)}"
    if node.row is not None and node.col is not None:
        text += f" row {occurrence(node.row)} col {occurrence(node.col)}"
    return text + (f" of {node.of}" if node.of else "")


def occurrence(node: ast.Occurrence) -> str:
    """`*`, `3`, `2..5`, `i`."""
    low = _counter(node.low)
    return low if node.high is None else f"{low}..{_counter(node.high)}"
