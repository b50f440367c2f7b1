"""Layers, heads, neurons and experts that an axis of a site names; whether the model has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
)
from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.resolve.picks import Onward
from mechdsl.resolve.resolved import Axis, Label
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
    diagnostics: list[Diagnostic] = field(default_factory=list)
    onward: Onward = field(default_factory=Onward)
    words: Mapping[tuple[str, str], Span] = field(default_factory=dict[tuple[str, str], Span])
    """Where the words stand that a `for` runs over, by its variable and the word."""


@dataclass(frozen=True)
class AxisValues:
    """What one axis of a site names."""

    choices: tuple[tuple[int, ...], ...] = ()
    """Per value of `loop` or of `sweep` (or once), the coordinates that are joined; none without
    the axis."""
    sweep: Axis | None = None
    """The axis that it is in the result."""
    loop: str | None = None
    """The `for` variable that it follows."""


def axis_values(
    axis: ast.Axis | None, kinds: list[SiteKind], context: SiteContext
) -> AxisValues | None:
    """The values of one axis of a site; None after an error."""
    if axis is None:
        return AxisValues()
    size = context.shape.n_layers if axis.word == "layer" else units(context.shape, kinds[0].name)
    swept: list[int] = []

    def named(values: range, of: Span) -> bool:
        if len(values) <= limits.CELLS:
            swept.extend(values)
            return True
        axes = f"{axis.word} ({len(values):,})"
        context.diagnostics.append(
            TooManyCells(
                span=of,
                of=f"`{axis.span.written}`",
                cells=len(values),
                most=limits.CELLS,
                axes=axes,
                by_text=not any(map(is_open, axis.values)),
            )
        )
        return False

    single = len(axis.values) == 1
    loop: str | None = None
    for value in axis.values:
        if isinstance(value, ast.Star):
            if not named(range(size), value.span):
                return None
            single = False
            continue
        if value.low.name is not None and value.low.name in context.loops:
            if value.high is not None or len(axis.values) > 1:
                context.diagnostics.append(
                    BadLoopValue(
                        span=value.span,
                        name=value.low.name,
                        reason="a range can't start at the variable of a `for`",
                        hint="write the variable alone, with an offset: `layer l + 1`",
                    )
                )
                return None
            loop = value.low.name
            found = _loop_values(value.low, axis, kinds, size, context)
            if found is None:
                return None
            swept.extend(found)
            continue
        low = _bound(value.low, axis, kinds, size, context)
        high = low if value.high is None else _bound(value.high, axis, kinds, size, context)
        if low is None or high is None:
            return None
        if high < low and context.shape.stands_in and from_end(value.low) != from_end(value.high):
            high = low  # which of them comes first hangs on the model
        if high < low:
            ends = [value.low.span.written, (value.high or value.low).span.written]
            context.diagnostics.append(
                EmptyRange(span=value.span, text=value.span.written, low=ends[1], high=ends[0])
            )
            return None
        single = single and value.high is None
        if not named(range(low, high + 1), value.span):
            return None
    if loop is None:
        swept = list(dict.fromkeys(swept))  # `0, 0..2` names layer 0 once
    windows = [_window(value, axis, size, context) for value in swept]
    if axis.plural and loop is None:
        joined = tuple(sorted({v for window in windows for v in window}))
        return AxisValues((joined,))
    if single or loop is not None:
        return AxisValues(tuple(windows), None, loop)
    joins = axis.window is not None
    return AxisValues(tuple(windows), Axis(axis.word, tuple(swept), axis.span, of_windows=joins))


def from_end(bound: ast.Bound | None) -> bool:
    """Whether the coordinate that it names hangs on how many there are: `-1`, `50%`."""
    return bound is not None and (bound.percent is not None or (bound.value or 0) < 0)


def is_open(value: ast.Star | ast.AxisRange) -> bool:
    """Whether which coordinates it names hangs on the model."""
    return isinstance(value, ast.Star) or from_end(value.low) or from_end(value.high)


def _window(center: int, axis: ast.Axis, size: int, context: SiteContext) -> tuple[int, ...]:
    """The joined layers around a centre: l − ⌊w/2⌋ … l + ⌈w/2⌉ − 1, cut at the ends (ROME)."""
    if axis.window is None:
        return (center,)
    width = context.parameters.get(axis.window) if isinstance(axis.window, str) else axis.window
    if not isinstance(width, int) or width < 1:
        context.diagnostics.append(
            BadLoopValue(
                span=axis.span,
                name="window",
                reason="must be a whole number above 0",
                hint="write `window 9`",
            )
        )
        return (center,)
    return tuple(range(max(0, center - width // 2), min(size, center + (width + 1) // 2)))


def _loop_values(
    bound: ast.Bound, axis: ast.Axis, kinds: list[SiteKind], size: int, context: SiteContext
) -> list[int] | None:
    """The coordinate for every value of a `for` variable."""
    assert bound.name is not None
    found: list[int] = []
    for value in context.loops[bound.name]:
        if not isinstance(value, int):
            context.diagnostics.append(
                BadLoopValue(
                    span=bound.span,
                    name=bound.name,
                    reason=f"`{value}` is not a {axis.word}",
                    hint=f"let it run over whole numbers: `for {bound.name} in 0..{size - 1}`",
                )
            )
            return None
        if not _exists(value + bound.offset, axis.word, kinds, bound.span, context):
            return None
        found.append(value + bound.offset)
    return found


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
            known = [*context.loops, *context.parameters]
            reason = "is neither a `for` variable around this rule nor a `param`"
            hint = did_you_mean(
                bound.name,
                known,
                f"known here: {name_list(known)}"
                if known
                else f"write a number, or add a line `param {bound.name} = 3`",
            )
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
