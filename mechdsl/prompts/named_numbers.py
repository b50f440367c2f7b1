"""Numbers in positions that have a name, of a `for` or a `param`: `item i token`, `token -i`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.base.names import name_list
from mechdsl.base.registry import nearest
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import MisspeltWord
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e03_coordinates import BadLoopValue
from mechdsl.syntax import ast
from mechdsl.syntax.format.constructs import position as written_position
from mechdsl.syntax.walk import rewrite, walk

BEFORE_A_SPAN = ("each", "between", "first", "last")
"""Words of the language that a span may follow."""


@dataclass
class NamedNumbers:
    """Puts numbers in the place of their names."""

    values: Mapping[str, Any]
    """Of the `for` variables around a position, and of parameters."""
    loops: Collection[str]
    """Names of the first."""
    diagnostics: list[Diagnostic] = field(default_factory=list[Diagnostic])
    swept: set[Span] = field(default_factory=set[Span])
    """Where something stands whose number is that of a `for`."""

    def written_out(self, positions: ast.Positions) -> ast.Positions | None:
        """The positions with numbers alone; None after E0322."""
        before = len(self.diagnostics)
        for node in walk(positions):
            if isinstance(node, ast.SpanRef) and (slip := self._slip(node)) is not None:
                self.diagnostics.append(slip)
                return None
            parts = walk(node) if isinstance(node, ast.Point | ast.SpanRef | ast.TokenIndex) else ()
            if any(isinstance(part, ast.Variable) and part.name in self.loops for part in parts):
                self.swept.add(node.span)
        found = rewrite(positions, self._changed)
        return found if len(self.diagnostics) == before else None

    def _changed(self, node: ast.Node) -> Any:
        return self._number(node) if isinstance(node, ast.Variable) else node

    def _slip(self, node: ast.SpanRef) -> Diagnostic | None:
        """Of `eahc item token`, which reads as the number `item` of a span."""
        number = None if node.occurrence is None else node.occurrence.low
        if node.name is None or not isinstance(number, ast.Variable) or number.name in self.values:
            return None
        if node.name == "except":
            reason, hint = "several tokens are meant", "write `tokens except …`"
            return BadLoopValue(span=node.span, name=node.name, reason=reason, hint=hint)
        meant = nearest(node.name, BEFORE_A_SPAN)
        if meant is None:
            return None
        start = node.span.start
        span = Span(node.span.source, start, start + len(node.name))
        return MisspeltWord(span=span, word=node.name, meant=meant)

    def _number(self, node: ast.Variable) -> int:
        """The number; 0 after E0322."""
        value = self.values.get(node.name)
        if isinstance(value, int) and not isinstance(value, bool):
            return (-value if node.negative else value) + node.offset
        example = f"`for {node.name} in 1..5`"
        reason, hint = "positions are whole numbers", f"let it run over whole numbers: {example}"
        if value is None:
            reason = "is neither a `for` variable around this position nor a `param`"
            known = name_list(self.values)
            otherwise = f"known here: {known}" if known else f"write {example} around it"
            hint = did_you_mean(node.name, list(self.values), otherwise)
        self.diagnostics.append(
            BadLoopValue(span=node.span, name=node.name, reason=reason, hint=hint)
        )
        return 0


def has_numbers(node: ast.Node) -> bool:
    """Whether a number in it has a name."""
    return any(isinstance(part, ast.Variable) for part in walk(node))


def counted_once(point: ast.Point) -> ast.Point:
    """`token 4` for `token 15 - 11`, whether or not there is a token 15; `token 3 - 11` leads out
    of the prompt, and isn't counted from its end."""
    base, offset = point.base, point.offset
    if isinstance(base, ast.TokenIndex) and base.high is None and isinstance(base.low, int):
        low = base.low + offset if isinstance(offset, int) else base.low
        if (low < 0) == (base.low < 0):
            return ast.Point(replace(base, low=low, span=point.span), span=point.span)
    return point


def numbered(item: ast.Position) -> str:
    """What a position is called whose numbers have names: `3` for `token i - 11`, `item 2 token`
    for `item i token`."""
    point = counted_once(item.body) if isinstance(item.body, ast.Point) else item.body
    match point:
        case ast.Point(base=ast.TokenIndex(plural=False, low=int(low)), offset=0) if (
            item.align is None
        ):
            return str(low)
        case _:
            return written_position(item)


def number(written: int | ast.Variable | None) -> int | None:
    """What is a number, now that all have been written out; None is `*`."""
    assert not isinstance(written, ast.Variable)
    return written


def bounds(occurrence: ast.Occurrence | None) -> tuple[int, int] | None:
    """The first and the last occurrence that is counted; None for all of them."""
    low = None if occurrence is None else number(occurrence.low)
    if occurrence is None or low is None:
        return None
    high = number(occurrence.high)
    return low, low if high is None else high
