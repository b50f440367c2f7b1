"""Layers, heads, neurons and experts that an axis of a site names; whether the model has them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BeyondEveryModel, did_you_mean
from mechdsl.diagnostics.e03_coordinates import (
    BadLoopValue,
    EmptyRange,
    LayerOutOfRange,
    TooManyCells,
    UnitOutOfRange,
    where_loops_are,
)
from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.resolve.open_axes import from_end, is_open
from mechdsl.resolve.picks import Onward
from mechdsl.resolve.resolved import Axis, Label, LoopCells
from mechdsl.resolve.resolved_rule import Key
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SiteKind


@dataclass
class SiteContext:
    """What sites of one experiment are resolved against."""

    model: str
    shape: ModelShape
    groups: Mapping[str, spec.Group]
    parameters: Mapping[str, Any]
    loops: Mapping[str, tuple[Label, ...]]
    nested: LoopCells | None = None
    """Which values of loops go together, where not all do."""
    diagnostics: list[Diagnostic] = field(default_factory=list)
    onward: Onward = field(default_factory=Onward)
    words: Mapping[tuple[str, str], Span] = field(default_factory=dict[tuple[str, str], Span])
    """Where the words stand that a `for` runs over, by its variable and the word."""

    def combinations(self, names: Collection[str]) -> Iterator[tuple[Key, dict[str, Label]]]:
        """Indices of values of these loops, in the order of the experiment, and the values. Where
        such values don't go together, so that there is no cell, others stand in for them."""
        loops = tuple(name for name in self.loops if name in names)
        there = None if self.nested is None else self.nested.along(loops)
        first = {} if there is None else dict(zip(there.axes, min(there.keys), strict=True))
        for key in product(*(range(len(self.loops[name])) for name in loops)):
            at = dict(zip(loops, key, strict=True))
            if there is not None and not there.has(at):
                at |= first
            yield key, {name: self.loops[name][index] for name, index in at.items()}


@dataclass(frozen=True)
class AxisValues:
    """What one axis of a site names."""

    loops: tuple[str, ...] = ()
    """The `for` variables that it follows."""
    sweep: Axis | None = None
    """The axis that it is in the result."""
    choices: Mapping[Key, tuple[int, ...]] = field(default_factory=dict[Key, tuple[int, ...]])
    """Per value of the loops, and of the sweep behind them, the coordinates that are joined; none
    without the axis."""

    def chosen(self, at: Mapping[str, int]) -> tuple[int, ...]:
        """The coordinates of one cell. at: its indices along the axes that they hang on."""
        names = self.loops if self.sweep is None else (*self.loops, self.sweep.name)
        return self.choices[tuple(at[name] for name in names)]


def axis_values(
    axis: ast.Axis | None, kinds: list[SiteKind], context: SiteContext
) -> AxisValues | None:
    """The values of one axis of a site; None after an error."""
    if axis is None:
        return AxisValues()
    return _AxisReader(axis, kinds, context).values()


Numbers = Mapping[str, Label]
"""Values of loops."""


class _AxisReader:
    """Reads one axis of a site."""

    def __init__(self, axis: ast.Axis, kinds: list[SiteKind], context: SiteContext) -> None:
        self.axis = axis
        self.kinds = kinds
        self.context = context
        shape = context.shape
        self.size = shape.n_layers if axis.word == "layer" else units(shape, kinds[0].name)
        self.count = 0
        """How many coordinates are named so far, those of all values of loops together."""

    def values(self) -> AxisValues | None:
        """All of them; None after an error."""
        axis = self.axis
        single = len(axis.values) == 1 and _is_one(axis.values[0])
        ends = {name for value in axis.values for name in _loops_named(value, self.context)}
        if ends and not axis.plural and not single:
            self._no_sweep(
                next(value for value in axis.values if _loops_named(value, self.context))
            )
            return None
        loops = tuple(name for name in self.context.loops if name in ends or name == axis.window)
        choices: dict[Key, tuple[int, ...]] = {}
        swept: list[int] = []
        for key, at in self.context.combinations(loops):
            found = self._named(at)
            width = self._width(at)
            if found is None or width is None:
                return None
            windows = [self._window(value, width) for value in found]
            if axis.plural:
                choices[key] = tuple(sorted({v for window in windows for v in window}))
            elif single:
                (choices[key],) = windows
            else:
                swept = found
                choices.update({(*key, place): own for place, own in enumerate(windows)})
        if axis.plural or single:
            return AxisValues(loops, None, choices)
        joins = axis.window is not None
        sweep = Axis(axis.word, tuple(swept), axis.span, of_windows=joins)
        return AxisValues(loops, sweep, choices)

    def _named(self, at: Numbers) -> list[int] | None:
        """The coordinates that it names for some values of loops."""
        found: list[int] = []
        for value in self.axis.values:
            span = value.span
            if isinstance(value, ast.Star):
                own = range(self.size)
            else:
                low = self._bound(value.low, at)
                high = low if value.high is None else self._bound(value.high, at)
                if low is None or high is None:
                    return None
                ends = from_end(value.low) != from_end(value.high)
                if high < low and self.context.shape.stands_in and ends:
                    high = low  # which of them comes first hangs on the model
                if high < low:
                    self._empty(value, at)
                    return None
                own = range(low, high + 1)
            self.count += len(own)
            if self.count > limits.CELLS:
                self._too_many(span)
                return None
            found.extend(own)
        return list(dict.fromkeys(found))  # `0, 0..2` names layer 0 once

    def _bound(self, bound: ast.Bound, at: Numbers) -> int | None:
        """The coordinate at one end."""
        if bound.name is None or bound.name not in at:
            return _bound(bound, self.axis, self.kinds, self.size, self.context)
        value = at[bound.name]
        if not isinstance(value, int):
            self._bad(
                bound.span,
                bound.name,
                f"`{value}` is not a {self.axis.word}",
                f"let it run over whole numbers: `for {bound.name} in 0..{self.size - 1}`",
            )
            return None
        index = value + bound.offset
        there = _exists(index, self.axis.word, self.kinds, bound.span, self.context)
        return index if there else None

    def _width(self, at: Numbers) -> int | None:
        """Of its windows: 1 without one."""
        asked = self.axis.window
        if asked is None:
            return 1
        width = {**self.context.parameters, **at}.get(asked) if isinstance(asked, str) else asked
        if isinstance(width, int) and width >= 1:
            return width
        hint = "write `window 9`"
        if isinstance(asked, str) and asked in at:
            hint = f"let `{asked}` run over whole numbers above 0: `for {asked} in [1, 3, 5]`"
        reason = "must be a whole number above 0"
        if isinstance(asked, str) and width is not None:
            reason = f"`{asked}` is {width}, and it {reason}"
        elif isinstance(asked, str):
            self._bad(self.axis.span, asked, *_unknown(asked, self.context))
            return None
        self._bad(self.axis.span, "window", reason, hint)
        return None

    def _window(self, center: int, width: int) -> tuple[int, ...]:
        """The joined layers around a centre: l − ⌊w/2⌋ … l + ⌈w/2⌉ − 1, cut at the ends (ROME)."""
        if self.axis.window is None:
            return (center,)
        return tuple(range(max(0, center - width // 2), min(self.size, center + (width + 1) // 2)))

    def _empty(self, value: ast.AxisRange, at: Numbers) -> None:
        """E0321."""
        low, high = value.low, value.high or value.low
        named = {name: at[name] for name in _loops_named(value, self.context)}
        self.context.diagnostics.append(
            EmptyRange(
                span=value.span,
                text=value.span.written,
                low=high.span.written,
                high=low.span.written,
                where=where_loops_are(named),
                instead=self._other_loops(low, high, named) if named else "",
            )
        )

    def _other_loops(self, low: ast.Bound, high: ast.Bound, named: Numbers) -> str:
        """How no value of the loops makes a range empty."""
        if low.name not in named or high.name not in named or low.offset or high.offset:
            return "let the loops give it a start that isn't behind its end"
        first, last = (self.context.loops[end.name or ""] for end in (low, high))
        loops = list(self.context.loops)
        if loops.index(low.name or "") < loops.index(high.name or ""):
            return f"let the inner loop begin there: `for {high.name} in {low.name}..{last[-1]}`"
        return f"let the inner loop end there: `for {low.name} in {first[0]}..{high.name}`"

    def _no_sweep(self, value: ast.Star | ast.AxisRange) -> None:
        """E0322 for a sweep whose values hang on a loop."""
        word, text = self.axis.word, value.span.written
        name = _loops_named(value, self.context)[0]
        reason = "the values of a sweep can't hang on the variable of a `for`"
        hint = f"join them, `{word}s {text}`, or write a loop inside: "
        inside = next(letter for letter in "bcdefg" if letter not in self.context.loops)
        hint += f"`for {inside} in {text} {{ … {word} {inside} … }}`"
        self._bad(value.span, name, reason, hint)

    def _too_many(self, span: Span) -> None:
        """E0323 for more coordinates than cells can be."""
        self.context.diagnostics.append(
            TooManyCells(
                span=span,
                of=f"`{self.axis.span.written}`",
                cells=self.count,
                most=limits.CELLS,
                axes=f"{self.axis.word} ({self.count:,})",
                by_text=not any(map(is_open, self.axis.values)),
            )
        )

    def _bad(self, span: Span, name: str, reason: str, hint: str) -> None:
        """E0322."""
        found = BadLoopValue(span=span, name=name, reason=reason, hint=hint)
        self.context.diagnostics.append(found)


def _is_one(value: ast.Star | ast.AxisRange) -> bool:
    """Whether it names one coordinate."""
    return isinstance(value, ast.AxisRange) and value.high is None


def _loops_named(value: ast.Star | ast.AxisRange, context: SiteContext) -> list[str]:
    """The `for` variables that stand at its ends."""
    ends = () if isinstance(value, ast.Star) else (value.low, value.high)
    return [end.name for end in ends if end is not None and end.name in context.loops and end.name]


def _bound(
    bound: ast.Bound, axis: ast.Axis, kinds: list[SiteKind], size: int, context: SiteContext
) -> int | None:
    if bound.percent is not None:
        if axis.word != "layer" or not 0 <= bound.percent <= 100:
            reason = "only layers have a relative depth" if axis.word != "layer" else "beyond 100%"
            context.diagnostics.append(
                BadLoopValue(
                    span=bound.span,
                    name=bound.span.written,
                    reason=reason,
                    hint="0% is the first layer and 100% the last",
                )
            )
            return None
        # Half up, so that 50% of an odd depth is its middle and files agree on every machine.
        return int(bound.percent / 100 * (size - 1) + 0.5)
    value = bound.value
    if bound.name is not None:
        given = context.parameters.get(bound.name)
        if not isinstance(given, int):
            reason, hint = _unknown(bound.name, context)
            if given is not None:
                reason = f"is {given!r}, not a whole number"
                hint = f"{axis.word}s are counted from 0"
            context.diagnostics.append(
                BadLoopValue(span=bound.span, name=bound.name, reason=reason, hint=hint)
            )
            return None
        value = given + bound.offset
    assert value is not None
    if value < 0:
        value = size + value if -value <= size else value
    return value if _exists(value, axis.word, kinds, bound.span, context) else None


def _unknown(name: str, context: SiteContext) -> tuple[str, str]:
    """What is wrong with a name that stands for no number, and what to do."""
    known = [*context.loops, *context.parameters]
    otherwise = f"write a number, or add a line `param {name} = 3`"
    otherwise = f"known here: {name_list(known)}" if known else otherwise
    reason = "is neither a `for` variable around this rule nor a `param`"
    return reason, did_you_mean(name, known, otherwise)


def _exists(value: int, word: str, kinds: list[SiteKind], span: Span, context: SiteContext) -> bool:
    if word == "layer":
        return layer_exists(value, span, context)
    return all(unit_exists(kind, value, span, context) for kind in kinds)


_MOST = {
    "layer": limits.LAYERS,
    "head": limits.HEADS,
    "expert": limits.EXPERTS,
    "neuron": limits.SIZE,
}


def _beyond_all(word: str, index: int, span: Span, context: SiteContext) -> bool:
    """E0231 for what no model has, where the model isn't at hand to say what it has."""
    most = _MOST[word]
    if not context.shape.stands_in or -most <= index < most:
        return False
    context.diagnostics.append(BeyondEveryModel(span=span, unit=word, index=index, most=most))
    return True


def layer_exists(layer: int, span: Span, context: SiteContext) -> bool:
    """Whether the model has the layer; E0302 where not."""
    if _beyond_all("layer", layer, span, context):
        return False
    if 0 <= layer < context.shape.n_layers:
        return True
    context.diagnostics.append(
        LayerOutOfRange(
            span=span, index=layer, last=context.shape.n_layers - 1, model=context.model
        )
    )
    return False


def unit_exists(kind: SiteKind, unit: int, span: Span, context: SiteContext) -> bool:
    """Whether a site has the head, neuron or expert; E0301 where not."""
    size = units(context.shape, kind.name)
    word = kind.unit if kind.unit in ("neuron", "expert") else "head"
    if _beyond_all(word, unit, span, context):
        return False
    if 0 <= unit < size:
        return True
    shared = kind.unit == "kv_head" and context.shape.n_kv_heads != context.shape.n_heads
    context.diagnostics.append(
        UnitOutOfRange(
            span=span,
            unit=word,
            units="key-value heads" if shared else f"{word}s",
            index=unit,
            last=size - 1,
            where=f"at `{kind.name}`" if shared else "in every layer",
            model=context.model,
        )
    )
    return False
