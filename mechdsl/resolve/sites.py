"""Resolve sites against a model: layers, heads, neurons and experts, with their axes.

`SiteContext`, `ExperimentContext` and `MeasureContext` hold the state of an experiment while it is
resolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from mechdsl.base import limits
from mechdsl.base.records import Record
from mechdsl.base.text import Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.experiments import BadPick, UnreadableMeasure
from mechdsl.diagnostics.models import SiteNotInBlock, SiteNotOnModel
from mechdsl.diagnostics.prompts import MultiTokenText
from mechdsl.diagnostics.rules import (
    AxesCollide,
    AxisDoesNotFit,
    BadBasis,
    BadException,
    BadLoopValue,
    EmptyRange,
    LayerOutOfRange,
    NoComponent,
    TooManyCells,
    UnitOutOfRange,
    loop_hint,
)
from mechdsl.diagnostics.syntax import BadArgument, IndexBeyondModels, NotSupported, UnknownWord
from mechdsl.models.shape import ModelShape, check_site, unit_count
from mechdsl.program import spec
from mechdsl.program.spec import CLEAN, SEED_AXIS
from mechdsl.prompts.answers import answer_context, is_list
from mechdsl.prompts.positions.cells import NO_REPLIES, ReplyTokens
from mechdsl.prompts.positions.spans import NO_ANSWERS, AnswerTokens
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import Hits, TextTokens
from mechdsl.prompts.tokens.tokenizer import TextTokenizer, single_token_spelling
from mechdsl.resolve.cells import counts_from_end, is_open
from mechdsl.resolve.findings import FindingPicker, PickError, count_picked
from mechdsl.resolve.observations import Observation
from mechdsl.resolve.types import (
    Axis,
    AxisIndices,
    AxisLabel,
    FeatureNode,
    ItemNumber,
    LoopCells,
    MaskCandidate,
    ModelContext,
    PlacedEdge,
    PositionChoice,
    SiteCoordinate,
    SitePoint,
    SiteTargets,
    find_split_output,
)
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import number_names, walk
from mechdsl.syntax.words import STACKS
from mechdsl.vocab.sites import (
    SHORT_WORDS,
    SITES,
    STACK_SITES,
    SiteKind,
    TokenSide,
    find_short_site,
    unknown_component,
)

if TYPE_CHECKING:
    from mechdsl.resolve.types import DirectionFamily, TrainedProbe


@dataclass
class SiteContext:
    """State for resolving the sites of one experiment."""

    model: str
    shape: ModelShape
    groups: Mapping[str, spec.Group]
    parameters: Mapping[str, Any]
    loops: Mapping[str, tuple[AxisLabel, ...]]
    nested: LoopCells | None = None
    """Combinations of loop values that exist; None if all do."""
    diagnostics: list[Diagnostic] = field(default_factory=list)
    onward: FindingPicker = field(default_factory=FindingPicker)
    words: Mapping[tuple[str, str], Span] = field(default_factory=dict[tuple[str, str], Span])
    """Source locations of the words that a `for` runs over, by variable and word."""
    circuits: Collection[str] = ()
    """Names of circuits, which only ablations take."""
    bases: Collection[str] = ()
    """Names of bases, whose features are sites."""
    positions: Collection[str] = ()
    """Names of groups of positions, which aren't sites."""
    partial_layers: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """Each `*` of layers that leaves out blocks without the site, as written, with the layers."""

    def of_definitions(self) -> SiteContext:
        """Return the context for sites of definitions, which are outside of every loop."""
        return replace(self, loops={}, nested=None)

    def combinations(
        self, names: Collection[str]
    ) -> Iterator[tuple[AxisIndices, dict[str, AxisLabel]]]:
        """Yield the indices and values of every combination of these loops, in grid order.

        For a combination that doesn't exist, and so has no cell, the values are those of one that
        does.
        """
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
    """Coordinates that one axis of a site names."""

    loops: tuple[str, ...] = ()
    """`for` variables that the axis depends on."""
    sweep: Axis | None = None
    """Axis of the result, if the site sweeps it."""
    choices: Mapping[AxisIndices, tuple[int, ...]] = field(
        default_factory=dict[AxisIndices, tuple[int, ...]]
    )
    """Joined coordinates for each value of the loops, followed by the index along the sweep; empty
    if the site has no such axis."""

    def chosen(self, at: Mapping[str, int]) -> tuple[int, ...]:
        """Return the coordinates of one cell.

        Args:
            at: Indices of the cell along the loops and the sweep.
        """
        names = self.loops if self.sweep is None else (*self.loops, self.sweep.name)
        return self.choices[tuple(at[name] for name in names)]


def resolve_axis(
    axis: ast.Axis | None,
    kinds: list[SiteKind],
    context: SiteContext,
    *,
    size: int | None = None,
) -> AxisValues | None:
    """Resolve the coordinates of one axis of a site; None after an error.

    Args:
        kinds: The sites that the axis belongs to; none for coordinates of a basis.
        size: Number of coordinates; by default, the number of layers.
    """
    if axis is None:
        return AxisValues()
    return _AxisReader(axis, kinds, context, size).values()


LoopValues = Mapping[str, AxisLabel]
"""Loop variables and their current values."""


class _AxisReader:
    """Resolver for one axis of a site."""

    def __init__(
        self, axis: ast.Axis, kinds: list[SiteKind], context: SiteContext, size: int | None
    ) -> None:
        self.axis = axis
        self.kinds = kinds
        self.context = context
        shape = context.shape
        self.size = count_layers(kinds, shape) if size is None else size
        self.count = 0
        """Number of coordinates so far, over all loop values."""

    def values(self) -> AxisValues | None:
        """Resolve all coordinates; None after an error."""
        axis = self.axis
        single = len(axis.values) == 1 and _is_one(axis.values[0])
        ends = {name for value in axis.values for name in _loops_named(value, self.context)}
        if ends and not axis.plural and not single:
            self._no_sweep(
                next(value for value in axis.values if _loops_named(value, self.context))
            )
            return None
        loops = tuple(name for name in self.context.loops if name in ends or name == axis.window)
        choices: dict[AxisIndices, tuple[int, ...]] = {}
        swept: list[int] = []
        for key, at in self.context.combinations(loops):
            numbers = self._named(at)
            width = self._width(at)
            if numbers is None or width is None:
                return None
            windows = [self._window(value, width) for value in numbers]
            if axis.plural:
                choices[key] = tuple(sorted({v for window in windows for v in window}))
            elif single:
                (choices[key],) = windows
            else:
                swept = numbers
                choices.update({(*key, place): own for place, own in enumerate(windows)})
        if axis.plural or single:
            return AxisValues(loops, None, choices)
        joins = axis.window is not None
        sweep = Axis(axis.word, tuple(swept), axis.span, of_windows=joins)
        return AxisValues(loops, sweep, choices)

    def _named(self, at: LoopValues) -> list[int] | None:
        """Return the coordinates for one combination of loop values; None after an error."""
        numbers: list[int] = []
        for value in self.axis.values:
            span = value.span
            own: Sequence[int]
            if isinstance(value, ast.Star):
                own = self._every_layer() if self.axis.word == "layer" else range(self.size)
            elif isinstance(value, ast.RankedSelection):
                values = {**self.context.parameters, **at}
                picked = self.context.onward.pick_features(
                    value, self.axis.of or "", self.size, values, self.context.diagnostics
                )
                if picked is None:
                    return None
                own = picked
            else:
                low = self._bound(value.low, at)
                high = low if value.high is None else self._bound(value.high, at)
                if low is None or high is None:
                    return None
                if value.step < 1:
                    reason, hint = "its step is not above 0", "write a step above 0: `0..6 step 2`"
                    self._bad(span, span.written, reason, hint)
                    return None
                ends = counts_from_end(value.low) != counts_from_end(value.high)
                if high < low and self.context.shape.stands_in and ends:
                    high = low  # the order of the two depends on the model
                if high < low:
                    self._empty(value, at)
                    return None
                own = value.numbers(low, high)
            self.count += len(own)
            if self.count > limits.CELLS:
                self._too_many(span)
                return None
            numbers.extend(own)
        return list(dict.fromkeys(numbers))  # `0, 0..2` names layer 0 once

    def _every_layer(self) -> list[int]:
        """Return the layers that `*` names, and record them if it leaves out blocks."""
        layers = find_layers(self.kinds, self.context.shape)
        if len(layers) < self.size:
            sites = dict.fromkeys(kind.name.replace("pattern", "attention") for kind in self.kinds)
            axis = " ".join(self.axis.span.written.split())
            text = f"`{axis}` of {name_list(list(sites))}"
            self.context.partial_layers[text] = tuple(layers)
        return layers

    def _bound(self, bound: ast.Bound, at: LoopValues) -> int | None:
        """Return the coordinate at one end of a range; None after an error."""
        if bound.name is None or bound.name not in at:
            index = _bound(bound, self.axis, self.size, self.context)
            return index if index is not None and self._exists(index, bound.span) else None
        value = at[bound.name]
        if not isinstance(value, int):
            self._bad(
                bound.span,
                bound.name,
                f"`{value}` is not a {self.axis.word}",
                f"loop over whole numbers: `for {bound.name} in 0..{self.size - 1}`",
            )
            return None
        index = value + bound.offset
        return index if self._exists(index, bound.span) else None

    def _exists(self, value: int, span: Span) -> bool:
        """Check that a coordinate exists; report E0301 or E0302 otherwise."""
        word = self.axis.word
        if word == "layer":
            return check_layer(value, span, self.context, self.kinds)
        if word in _MOST and _exceeds_every_model(word, value, span, self.context):
            return False
        if 0 <= value < self.size:
            return True
        if word in _MOST:
            kind = next(each for each in self.kinds if each.unit is not None)
            report_missing_unit(kind, value, span, self.context)
            return False
        self.context.diagnostics.append(
            UnitOutOfRange(
                span=span,
                unit=word,
                units=f"{word}s",
                index=value,
                numbers=f"0..{self.size - 1}",
                model=self.axis.of or self.context.model,
            )
        )
        return False

    def _width(self, at: LoopValues) -> int | None:
        """Return the width of the windows, 1 without windows; None after an error."""
        asked = self.axis.window
        if asked is None:
            return 1
        width = {**self.context.parameters, **at}.get(asked) if isinstance(asked, str) else asked
        if isinstance(width, int) and width >= 1:
            return width
        hint = "write `window 9`"
        if isinstance(asked, str) and asked in at:
            hint = f"loop `{asked}` over whole numbers above 0: `for {asked} in [1, 3, 5]`"
        reason = "it must be a whole number above 0"
        if isinstance(asked, str) and width is not None:
            reason = f"`{asked}` is {width}, and {reason}"
        elif isinstance(asked, str):
            self._bad(self.axis.span, asked, *_unknown_name(asked, self.context))
            return None
        self._bad(self.axis.span, "window", reason, hint)
        return None

    def _window(self, center: int, width: int) -> tuple[int, ...]:
        """Return the joined layers around a centre: l − ⌊w/2⌋ … l + ⌈w/2⌉ − 1, clipped (ROME).

        In a model in which some blocks lack the site, the layers that have it are counted.
        """
        if self.axis.window is None:
            return (center,)
        layers = find_layers(self.kinds, self.context.shape)
        if center in layers:
            place = layers.index(center)
            return tuple(layers[max(0, place - width // 2) : place + (width + 1) // 2])
        return tuple(range(max(0, center - width // 2), min(self.size, center + (width + 1) // 2)))

    def _empty(self, value: ast.AxisRange, at: LoopValues) -> None:
        """Report E0321 for an empty range."""
        low, high = value.low, value.high or value.low
        named = {name: at[name] for name in _loops_named(value, self.context)}
        self.context.diagnostics.append(
            EmptyRange(
                span=value.span,
                text=value.span.written,
                low=high.span.written,
                high=low.span.written,
                where=loop_hint(named),
                instead=self._other_loops(low, high, named) if named else "",
            )
        )

    def _other_loops(self, low: ast.Bound, high: ast.Bound, named: LoopValues) -> str:
        """Suggest loops whose values never make the range empty."""
        if low.name not in named or high.name not in named or low.offset or high.offset:
            return "choose loops in which its start isn't greater than its end"
        first, last = (self.context.loops[end.name or ""] for end in (low, high))
        loops = list(self.context.loops)
        if loops.index(low.name or "") < loops.index(high.name or ""):
            return f"start the inner loop there: `for {high.name} in {low.name}..{last[-1]}`"
        return f"end the inner loop there: `for {low.name} in {first[0]}..{high.name}`"

    def _no_sweep(self, value: ast.AxisValue) -> None:
        """Report E0322 for a sweep whose values depend on a loop."""
        word, text = self.axis.word, value.span.written
        name = _loops_named(value, self.context)[0]
        reason = "the values of a sweep can't depend on the variable of a `for`"
        hint = f"join them, `{word}s {text}`"
        if not isinstance(value, ast.RankedSelection):  # which a `for` doesn't take
            inside = next(letter for letter in "bcdefg" if letter not in self.context.loops)
            hint += f", or write a loop inside: `for {inside} in {text} {{ … {word} {inside} … }}`"
        self._bad(value.span, name, reason, hint)

    def _too_many(self, span: Span) -> None:
        """Report E0323 for more coordinates than the maximum number of cells."""
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
        """Report E0322."""
        problem = BadLoopValue(span=span, name=name, reason=reason, hint=hint)
        self.context.diagnostics.append(problem)


def _is_one(value: ast.AxisValue) -> bool:
    """Return whether a value names a single coordinate."""
    return isinstance(value, ast.AxisRange) and value.high is None


def _loops_named(value: ast.AxisValue, context: SiteContext) -> list[str]:
    """Return the `for` variables at the ends of a range, or in a selection."""
    if isinstance(value, ast.RankedSelection):
        named = (value.amount, value.of, *(argument.value.span.written for argument in value.cell))
        return [name for name in named if isinstance(name, str) and name in context.loops]
    ends = () if isinstance(value, ast.Star) else (value.low, value.high)
    return [end.name for end in ends if end is not None and end.name in context.loops and end.name]


def _bound(bound: ast.Bound, axis: ast.Axis, size: int, context: SiteContext) -> int | None:
    """Return the coordinate of a bound, which may not exist; None after an error."""
    if bound.percent is not None:
        if axis.word != "layer" or not 0 <= bound.percent <= 100:
            reason = (
                "only layers have a relative depth" if axis.word != "layer" else "it is beyond 100%"
            )
            context.diagnostics.append(
                BadLoopValue(
                    span=bound.span,
                    name=bound.span.written,
                    reason=reason,
                    hint="0% is the first layer and 100% the last",
                )
            )
            return None
        # Round half up, so that 50% of an odd depth is the middle layer on every machine.
        return int(bound.percent / 100 * (size - 1) + 0.5)
    value = bound.value
    if bound.name is not None:
        given = context.parameters.get(bound.name)
        if not isinstance(given, int):
            reason, hint = _unknown_name(bound.name, context)
            if bound.name in STACKS and given is None:
                reason = f"it is a stack, and `{axis.word}` needs a number"
                hint = (
                    f"write the component before it: `{_UNIT_SITES.get(axis.word, 'z {} layer 1')}`"
                )
                hint = hint.format(bound.name)
            if given is not None:
                reason = f"it is {given!r}, not a whole number"
                hint = f"{axis.word}s are counted from 0"
            context.diagnostics.append(
                BadLoopValue(span=bound.span, name=bound.name, reason=reason, hint=hint)
            )
            return None
        value = given + bound.offset
    assert value is not None
    return size + value if -size <= value < 0 else value


_UNIT_SITES = {
    "neuron": "mlp_hidden {} layer 1 neuron 3",
    "head": "z {} layer 1 head 3",
    "expert": "expert_out {} layer 1 expert 3",
}
"""A site of one unit in a stack, by the word of the unit's axis; sites of layers by default."""


def _unknown_name(name: str, context: SiteContext) -> tuple[str, str]:
    """Return the reason and the hint for a name that isn't a number."""
    known = [*context.loops, *context.parameters]
    otherwise = f"write a number, or add a line `param {name} = 3`"
    otherwise = f"names known here: {name_list(known)}" if known else otherwise
    reason = "it is neither a `for` variable around this rule nor a `param`"
    return reason, did_you_mean(name, known, otherwise)


_MOST = {
    "layer": limits.LAYERS,
    "head": limits.HEADS,
    "expert": limits.EXPERTS,
    "neuron": limits.SIZE,
}


def _exceeds_every_model(word: str, index: int, span: Span, context: SiteContext) -> bool:
    """Report E0231 for an index that no model has, if the model's shape isn't available."""
    most = _MOST[word]
    if not context.shape.stands_in or -most <= index < most:
        return False
    context.diagnostics.append(IndexBeyondModels(span=span, unit=word, index=index, most=most))
    return True


def count_layers(kinds: Sequence[SiteKind], shape: ModelShape) -> int:
    """Return the number of layers of the sites' stack."""
    return shape.in_stack(kinds[0].name)[0].n_layers if kinds else shape.n_layers


def find_layers(kinds: Iterable[SiteKind], shape: ModelShape) -> list[int]:
    """Return the layers that `layer *` names: those in which a block has one of the sites."""
    kinds = list(kinds)
    layers = range(count_layers(kinds, shape))
    names = [kind.name for kind in kinds]
    having = [n for n in layers if any(shape.has(name, n) for name in names)]
    return having or list(layers)  # a site that the model lacks has its own error


def check_layer(
    layer: int, span: Span, context: SiteContext, kinds: Sequence[SiteKind] = ()
) -> bool:
    """Check that the stack of these sites has the layer; otherwise report E0302."""
    if _exceeds_every_model("layer", layer, span, context):
        return False
    count = count_layers(kinds, context.shape)
    if 0 <= layer < count:
        return True
    stack = kinds[0].name.partition(" ")[2] if kinds else ""
    where = f" in its stack `{stack}`" if stack else ""
    context.diagnostics.append(
        LayerOutOfRange(span=span, index=layer, last=count - 1, model=context.model, where=where)
    )
    return False


def report_missing_unit(kind: SiteKind, unit: int, span: Span, context: SiteContext) -> None:
    """Report E0301 for a head, neuron or expert that a site lacks in a named layer."""
    problem = _create_missing_unit(kind, unit, span, context.shape, context.model)
    context.diagnostics.append(problem)


def _create_missing_unit(
    kind: SiteKind, unit: int, span: Span, shape: ModelShape, model: str
) -> UnitOutOfRange:
    """Create E0301, which states the numbers of each layer and the layers that have the unit."""
    word = kind.unit if kind.unit in ("neuron", "expert") else "head"
    layers_of: dict[int, list[int]] = {}
    for layer in find_layers([kind], shape):
        layers_of.setdefault(unit_count(shape, kind.name, layer), []).append(layer)
    blocks = shape.in_stack(kind.name)[0].blocks
    are_shared = kind.unit == "kv_head" and any(b.kv_heads != b.heads for b in blocks)
    if len(layers_of) == 1:
        (count,) = layers_of
        numbers = f"0..{count - 1} {f'at `{kind.name}`' if are_shared else 'in every layer'}"
    else:
        listed = [f"0..{n - 1} in {_name_layers(own)}" for n, own in sorted(layers_of.items())]
        numbers = f"{', '.join(listed[:-1])} and {listed[-1]}"
    having = sorted(n for count, own in layers_of.items() if count > unit for n in own)
    return UnitOutOfRange(
        span=span,
        unit=word,
        units="key-value heads" if are_shared else f"{word}s",
        index=unit,
        numbers=numbers,
        model=model,
        others=f", or name a layer that has it: `layer {having[0]}`" if having else "",
    )


def _name_layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


@dataclass
class ExperimentContext:
    """State of an experiment being resolved, with the axes and diagnostics found so far."""

    experiment: spec.Experiment
    program: spec.Program
    model: ModelContext
    table: PromptTable
    sites: SiteContext
    axes: dict[str, Axis] = field(default_factory=dict)
    families: dict[str, DirectionFamily | None] = field(default_factory=dict)
    """Direction families by name; None for one with errors."""
    family_axes: dict[str, tuple[AxisLabel, ...]] = field(default_factory=dict)
    """Labels of the experiment's axes that come from a direction family."""
    answers: AnswerTokens = NO_ANSWERS
    """Texts after the prompts; `NO_ANSWERS` for a rule kind that can't act on them."""

    replies: ReplyTokens = NO_REPLIES
    """Reply tokens; `NO_REPLIES` for a rule that can't act on them."""
    side: TokenSide = ""
    """The tokens of an encoder-decoder that positions name."""
    probes: Mapping[str, TrainedProbe | None] = field(default_factory=dict)
    """The probes whose weights are directions of the experiment; None for one with errors."""
    outer: spec.Experiment | None = None
    """The experiment that defines the run being resolved; None outside of runs."""

    def reading(self, sites: SiteTargets | None) -> ExperimentContext:
        """Return the context for positions at these sites, in an encoder-decoder."""
        if sites is None:  # after an error
            return replace(self, side="")
        points = [p for here in sites.points.values() for p in here]
        return replace(self, side=find_side(points, self.model.shape))

    @property
    def measuring(self) -> spec.Experiment:
        """The experiment whose measures depend on the rules."""
        return self.experiment if self.outer is None else self.outer

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.sites.diagnostics

    @property
    def loops(self) -> Mapping[str, tuple[AxisLabel, ...]]:
        return self.sites.loops

    @property
    def reply(self) -> tuple[object, ...] | None:
        """Key of the generation settings; None if the experiment generates no text."""
        said = self.experiment.generation
        return None if said is None else said.key(self.program.seed)

    def ranked(
        self,
        base: ast.RankedTokens,
        run: str,
        values: Mapping[str, Any],
        diagnostics: list[Diagnostic],
    ) -> list[tuple[str, list[Hits]]]:
        """Return the tokens that another experiment ranked, in one run of these rows."""
        return self.sites.onward.pick_tokens(
            base, run, values, self.table, self.model.tokenizer, diagnostics
        )

    def add_axis(self, axis: Axis) -> None:
        """Add a sweep to the axes; report E0320 if an axis of that name exists."""
        first = self.axes.get(axis.name)
        if first is not None:
            word, letter = axis.name, axis.name[0]
            shared, plural = f"for {letter} in … {{ … {word} {letter} … }}", f"{word}s"
            if word == "fill":
                shared, plural = "ablate {A, B} … with zero, mean", "with zero"
            if word == "position":
                shared, plural = "for t in 3..5 { … at token t … }", "{A, B}"
            self.diagnostics.append(
                AxesCollide(
                    span=axis.span, axis=word, shared=shared, plural=plural, first=first.span.line
                )
            )
            return
        self.axes[axis.name] = axis

    def add_seed_axis(self, seeds: tuple[int, ...], span: Span) -> bool:
        """Add the axis of trainings with several seeds; False if the experiment has an axis of this
        name with other values."""
        known = self.axes.get(SEED_AXIS)
        if known is None:
            self.add_axis(Axis(SEED_AXIS, seeds, span))
        elif known.labels != seeds:
            return False
        self.family_axes[SEED_AXIS] = seeds
        return True

    def draws_agree(self) -> None:
        """Report E0108 if noise runs differ in their number of draws.

        Draw k of one run is paired with draw k of another.
        """
        experiment = self.experiment
        names = [experiment.base, experiment.source, *(rule.source for rule in experiment.rules)]
        samples = {self.table.runs[name].draws for name in names if name is not None} - {1}
        if len(samples) > 1:
            what = "runs with different numbers of noise draws"
            self.diagnostics.append(NotSupported(span=experiment.span, what=what))


ITEM_INDEX = "item.index"


@dataclass
class MeasureContext:
    """State for resolving the measures of one experiment."""

    table: PromptTable
    tokenizer: TextTokenizer
    sites: SiteContext
    items: tuple[int, ...]
    """Occurrences that the position axis runs over; empty if it runs over none."""
    diagnostics: list[Diagnostic] = field(default_factory=list)
    at: ast.Position | None = None
    """Position of the current measure; None means the last token."""
    observed: Observation | None = None
    """The experiment's observation."""
    names: Collection[str] = ()
    """Names by which a measure may refer to the observation."""
    reads_observed: bool = False
    """Whether the current measure reads the observation."""
    metrics: Collection[str] = ()
    """Names of the metrics that the file defines."""
    reply: tuple[object, ...] | None = None
    """Key of the generation settings; None if the experiment generates no text."""
    loop_values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Values of the `for` variables that measures name, in the current cells."""

    replies: ReplyTokens = NO_REPLIES
    """Tokens that are generated after the prompts."""

    def names_of(self, env: ItemNumber) -> dict[str, Any]:
        """Return the values of names in texts and sets that don't come from a row.

        These are the occurrence, and variables of a `for` whose name no value of a row has.
        """
        rows = self.table.sources[:1]
        loops = {
            name: value
            for name, value in self.loop_values.items()
            if not any(row.known(name) for row in rows)
        }
        return loops if env is None else {**loops, ITEM_INDEX: env}

    @property
    def parameters(self) -> Mapping[str, Any]:
        return self.sites.parameters


def report_unreadable(
    context: MeasureContext, span: Span, reason: str, hint: str, of: Span | None = None
) -> None:
    """Report E0612 at a span.

    Args:
        span: The part with the error.
        of: The whole metric, if `span` is a part of it.
    """
    context.diagnostics.append(
        UnreadableMeasure(span=span, text=(of or span).written, reason=reason, hint=hint)
    )


def find_item_numbers(
    parts: Sequence[object], context: MeasureContext
) -> Sequence[ItemNumber] | None:
    """Return the occurrences that the arguments depend on.

    Reports E0612 and returns None if they depend on occurrences and the experiment sweeps none.
    """
    by_item = [
        node
        for part in parts
        for node in walk(part)
        if (isinstance(node, ast.String) and ITEM_INDEX in node.value)
        or (isinstance(node, ast.Attribute) and f"{node.name}.{node.attribute}" == ITEM_INDEX)
    ]
    if not by_item:
        return (None,)
    if context.items:
        return context.items
    report_unreadable(
        context,
        by_item[0].span,
        "`{item.index}` needs a sweep over occurrences",
        "sweep over them: `at each item token`",
    )
    return None


def report_multi_token(
    parts: Sequence[ast.Node], name: str, row: int, long: TextTokens, context: MeasureContext
) -> Diagnostic:
    """Create E0507 for a text of several tokens in a row, among the `parts` of a metric."""
    misspelt = report_misspelt_token(parts, name, row, long, context)
    if misspelt is not None:
        return misspelt
    hint = f"`{name}({', '.join(map(_first_token, parts))})`"
    if len(parts) == 1 and not is_list(context.table, parts[0]):
        hint = f"`logprob({parts[0].span.written})`, which is summed over its tokens, or {hint}"
    return _report_tokens(parts, name, long, f"write {hint}", context)


def report_misspelt_token(
    parts: Sequence[ast.Node], name: str, row: int, long: TextTokens, context: MeasureContext
) -> Diagnostic | None:
    """Create E0507 for a text that is one token in another spelling; None for other texts."""
    if isinstance(parts[0], ast.EdgeTokenOf):
        return None
    tokenizer = context.tokenizer.reading(written=context.table.runs[CLEAN].chat)
    meant = single_token_spelling(answer_context(context.table, row), long.text, tokenizer)
    if meant is None:
        return None
    return _report_tokens(parts, name, long, f"{meant.advice}: then it is one token", context)


def _report_tokens(
    parts: Sequence[ast.Node], name: str, long: TextTokens, hint: str, context: MeasureContext
) -> Diagnostic:
    return MultiTokenText(
        span=parts[0].span.to(parts[-1].span),
        text=long.text,
        tokens=" ".join(f"`{context.tokenizer.token_text(i)}`" for i in long.ids),
        metric=name,
        hint=hint,
    )


def _first_token(part: ast.Node) -> str:
    written = part.span.written
    whole = isinstance(part, ast.Range | ast.EdgeTokenOf)
    return written if whole else f"first token of {written}"


def resolve_site(
    site: ast.Site, context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Resolve the targets of a site and the axes that it adds; None after an error."""
    targets, axes = _resolve_named_site(site, context)
    if targets is None or not site.excluded:
        return targets, axes
    remaining = _leave_out(targets, site, context)
    return remaining, () if remaining is None else axes


class _Exception(Record):
    """Test for the points that one item of `except` names, for every value of its loops."""

    loops: tuple[str, ...]
    matches: Mapping[AxisIndices, Callable[[SitePoint], bool]]
    is_open: bool = False
    """Whether the named points are still placeholders, because a pick hasn't run, the model isn't
    available, or a group has an error."""
    is_pick: bool = False
    """Whether the named points depend on the results of another experiment."""

    def gone(self, points: Collection[SitePoint], at: Mapping[str, int]) -> set[SitePoint]:
        """Return the named ones of the points, at these indices along the loops."""
        matches = self.matches[tuple(at[name] for name in self.loops)]
        return {point for point in points if matches(point)}


def read_exceptions(site: ast.Site, context: SiteContext) -> tuple[ast.Site | ast.AxisRange, ...]:
    """Return what `except` names; the name of a `for` variable or of a `param` is a number."""

    def read(item: ast.Site | ast.AxisRange) -> Iterable[ast.Site | ast.AxisRange]:
        if isinstance(item, ast.AxisRange) or len(item.names) != 1 or item.axes:
            return (item,)
        name = item.names[0].id
        is_number = name in {*context.loops, *context.parameters}
        if not is_number or _find_groups(item, context) is not None:
            return _list_features(item, context.groups.get(name), site) or (item,)
        return (ast.AxisRange(ast.Bound(name=name, span=item.span), span=item.span),)

    return tuple(chain.from_iterable(map(read, site.excluded)))


def _list_features(item: ast.Site, group: spec.Group | None, site: ast.Site) -> list[ast.AxisRange]:
    """Return the numbers of a group of features of the basis and the vectors of a site; empty for
    other groups."""
    if group is None or not group.names_features or group.waits or site.coordinates is None:
        return []
    alone = without_coordinates(replace(site, names=(), axes=(site.coordinates,)))
    if any(
        without_coordinates(each) not in (without_coordinates(site), alone) for each in group.sites
    ):
        return []
    axes = (each.coordinates for each in group.sites)
    values = [value for axis in axes if axis is not None for value in axis.values]
    ranges = [
        replace(value, span=item.span) for value in values if isinstance(value, ast.AxisRange)
    ]
    return ranges if len(ranges) == len(values) else []


NumberException: TypeAlias = ast.AxisRange | ast.Site
"""Numbers after `except`, or `top n of g` where a training chooses coordinates."""


def number_exceptions(site: ast.Site, context: SiteContext) -> list[NumberException]:
    """Return what `except` names of the last axis of a site."""
    return [
        item
        for item in read_exceptions(site, context)
        if isinstance(item, ast.AxisRange) or picks_numbers(item, site, context)
    ]


def picks_numbers(item: ast.Site, site: ast.Site, context: SiteContext) -> bool:
    """Whether an exception selects the best coordinates of a group that a training chooses from the
    coordinates of the same vector as those of a site."""
    group = None if item.ranked is None or item.names else context.groups.get(item.ranked.of)
    if group is None or not group.ranked or group.ranked[0].coordinates is None:
        return False
    return without_coordinates(group.ranked[0]) == without_coordinates(site)


def without_coordinates(site: ast.Site) -> ast.Site:
    """Return a site without the numbers of its coordinates and without exceptions."""
    axes = tuple(
        replace(axis, values=(), plural=True) if axis is site.coordinates else axis
        for axis in site.axes
    )
    return replace(site, axes=axes, excluded=())


def _rank_numbers(group: spec.Group) -> list[int]:
    """Return the coordinates of a group, those with the largest scores first; none until it is
    trained."""
    axes = (site.coordinates for site in group.ranked)
    values = (value for axis in axes if axis is not None for value in axis.values)
    numbers = (value.low.value for value in values if isinstance(value, ast.AxisRange))
    return [] if group.waits else [number for number in numbers if number is not None]


LISTED_VALUES = 5
"""Largest number of combinations of loop values that a convention lists."""


def _leave_out(targets: SiteTargets, site: ast.Site, context: SiteContext) -> SiteTargets | None:
    """Leave out the points that `except` names; reports E0343 for an exception without effect."""
    exceptions: list[tuple[ast.Site | ast.AxisRange, _Exception]] = []
    for item in read_exceptions(site, context):
        error = _exception(item, site, context)
        if error is None:
            return None
        exceptions.append((item, error))
    named = {name for _, each in exceptions for name in each.loops}
    loops = tuple(name for name in context.loops if name in named and name not in targets.axes)
    axes = (*targets.axes, *loops)
    every = {point for points in targets.points.values() for point in points}
    written = ", ".join(" ".join(item.span.written.split()) for item in site.excluded)
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    counts: set[int] = set()
    without = dict[str, None]()  # values of loops that leave no site
    for inner, values in context.combinations(named):
        chosen = dict(zip((name for name in context.loops if name in named), inner, strict=True))
        gone: set[SitePoint] = set()
        for item, each in exceptions:
            site_points = each.gone(every, chosen)
            if not site_points and not (each.is_open or each.is_pick):
                reason = f"names no site of the rule{loop_hint(values)}"
                _report_exception(item, reason, context, hint=_site_hint(every))
                return None
            gone |= site_points
        counts.add(len(gone))
        empty = True
        for key, site_points in targets.points.items():
            at = dict(zip(targets.axes, key, strict=True))
            if any(at.get(name, index) != index for name, index in chosen.items()):
                continue
            full = (*key, *(chosen[name] for name in loops))
            kept = tuple(point for point in site_points if point not in gone)
            if not kept and any(each.is_open for _, each in exceptions):
                kept = site_points  # placeholders must not remove a cell
            points[full] = kept
            empty &= not kept
            same = kept == site_points or not kept
            labels[full] = (
                targets.labels[key] if same else f"{targets.labels[key]} except {written}"
            )
        if empty:
            without[", ".join(f"{name} {values[name]}" for name in values)] = None
    if not any(points.values()):
        hint = "leave out fewer sites, or remove the rule"
        _report_exception(site.excluded[0], "leaves no site", context, hint=hint)
        return None
    least, most = min(counts), max(counts)
    said = f"{least if least == most else f'{least} to {most}'} of {len(every)} sites"
    if without and targets.axes:
        shown, more = [*without][:LISTED_VALUES], len(without) - LISTED_VALUES
        listed = "; ".join(shown) + (f" and {more:,} more" if more > 0 else "")
        said += f", which leaves no site and no cell for {listed}"
    # A site that is left out isn't a cell of a sweep. Without a sweep, the cell writes nothing.
    missing = frozenset(key for key, own in points.items() if not own and targets.axes)
    return SiteTargets(axes, points, labels, left_out=said, missing=missing)


def _exception(
    item: ast.Site | ast.AxisRange, site: ast.Site, context: SiteContext
) -> _Exception | None:
    """Resolve an item of `except`; None after an error.

    A number is a value of the site's last axis. A head names this head at any site of heads, and
    a layer without a component all of the layer.
    """
    if isinstance(item, ast.AxisRange):
        return _numbered_exception(item, site, context)
    words = {axis.word for axis in item.axes}
    shape = context.shape
    if words == {"layer"} and not item.names:
        numbers = resolve_axis(item.axes[0], [SITES["resid_post"]], context)
        if numbers is None:
            return None
        if numbers.sweep is None:
            layers = {
                key: lambda point, own=choice: point.layer in own
                for key, choice in numbers.choices.items()
            }
            return _Exception(numbers.loops, layers, is_open=shape.stands_in)
    group = None if item.bare is None else context.groups.get(item.bare.id)
    if group is not None and group.names_features and not (group.waits or group.candidates):
        reason = "has features, and `except` takes those of the basis and the site of the rule"
        hint = "name numbers, `except 3, 5`, or a group of features of this basis"
        bad = BadArgument(span=item.span, name=group.name, reason=reason, hint=hint)
        context.diagnostics.append(bad)
        return None
    site_targets, axes = _resolve_named_site(item, context)
    if site_targets is None:
        return None
    if axes:
        _report_exception(item, "is a sweep", context, hint="write the plural: `heads *`")
        return None
    groups = _find_groups(item, context)
    members = [item] if groups is None else [site for group in groups for site in group.sites]
    picks = [member.ranked for member in members if member.ranked is not None]
    of_heads = not item.names or groups is not None or item.short is not None
    matches = {
        key: _match_points(frozenset(points), shape, of_heads=of_heads)
        for key, points in site_targets.points.items()
    }
    is_open = shape.stands_in or bool(picks and context.onward.stand_ins)
    # The definition of a group without sites has an error, as may that of one whose training has no
    # candidates yet.
    is_open |= any(not own.sites or (own.waits and not own.ranked) for own in groups or ())
    return _Exception(site_targets.axes, matches, is_open=is_open, is_pick=bool(picks))


def _match_points(
    named: frozenset[SitePoint], shape: ModelShape, *, of_heads: bool
) -> Callable[[SitePoint], bool]:
    """Return the test for named points.

    Args:
        of_heads: Whether a head stands for itself at any site of heads, and for the keys and
            values that it reads.
    """
    heads = {
        (p.layer, p.unit) for p in named if SITES[p.site].unit == "head" and p.unit is not None
    }

    def matches(point: SitePoint) -> bool:
        if point in named or not of_heads or point.unit is None:
            return point in named
        match SITES[point.site].unit:
            case "head":
                return (point.layer, point.unit) in heads
            case "kv_head":
                size = unit_count(shape, "q", point.layer)
                size //= unit_count(shape, point.site, point.layer)
                first = point.unit * size
                return any((point.layer, unit) in heads for unit in range(first, first + size))
            case _:
                return False

    return matches


def _numbered_exception(
    item: ast.AxisRange, site: ast.Site, context: SiteContext
) -> _Exception | None:
    """Resolve values of the site's last axis; None after an error."""
    axis = site.axes[-1] if site.axes else None
    if axis is None or axis.word not in ("layer", "head", "neuron", "expert"):
        reason = "is a number, and the site has no axis for it"
        _report_exception(item, reason, context, hint="remove it, or name a site of the rule")
        return None
    ranges = _number_ranges(item, context)
    if ranges is None:
        return None
    loops, choices = ranges
    by_layer = axis.word == "layer"
    matches = {
        key: lambda point, own=choice: (point.layer if by_layer else point.unit) in own
        for key, choice in choices.items()
    }
    return _Exception(loops, matches, is_open=context.shape.stands_in)


def _number_ranges(
    item: NumberException, context: SiteContext
) -> tuple[tuple[str, ...], Mapping[AxisIndices, Sequence[int]]] | None:
    """Return the numbers of a range, or of a pick, for every value of the loops that it names.

    None after E0343 or E0620.
    """
    if isinstance(item, ast.Site):
        assert item.ranked is not None
        group = context.groups[item.ranked.of]
        ranked = _rank_numbers(group)
        counts = _count_of_group(item, item.ranked, len(group.ranked), context)
        if counts is None:
            return None
        return counts[0], {key: ranked[:count] for key, count in counts[1].items()}
    loops = tuple(name for name in context.loops if name == item.low.name)
    ranges: dict[AxisIndices, range] = {}
    for key, values in context.combinations(loops):
        name = item.low.name
        low = item.low.value if name is None else {**context.parameters, **values}.get(name)
        if not isinstance(low, int):
            hint = "write a number, such as `except 3`"
            _report_exception(item, f"is `{low}`, not a number", context, hint=hint)
            return None
        high = low if item.high is None else item.high.value or 0
        ranges[key] = range(low, high + 1)
    return loops, ranges


def exclude_values(
    axis_values: AxisValues, numbers: Sequence[NumberException], context: SiteContext
) -> AxisValues | None:
    """Leave out coordinates of an axis; None after E0343."""
    read: list[tuple[tuple[str, ...], Mapping[AxisIndices, Sequence[int]]]] = []
    for number in numbers:
        ranges = _number_ranges(number, context)
        if ranges is None:
            return None
        if axis_values.sweep is not None and ranges[0]:
            reason = "differs by cell, and the rule sweeps its coordinates"
            _report_exception(number, reason, context, hint="join the coordinates with the plural")
            return None
        read.append(ranges)
    named = {*axis_values.loops, *(name for loops, _ in read for name in loops)}
    loops = tuple(name for name in context.loops if name in named)
    choices: dict[AxisIndices, tuple[int, ...]] = {}
    for key, values in context.combinations(loops):
        at = dict(zip(loops, key, strict=True))
        first = tuple(at[name] for name in axis_values.loops)
        own = {k: chosen for k, chosen in axis_values.choices.items() if k[: len(first)] == first}
        every = {value for chosen in own.values() for value in chosen}
        named_by = dict[Span, set[int]]()  # the numbers of a group share its span
        for number, (names, ranges) in zip(numbers, read, strict=True):
            common = every & set(ranges[tuple(at[name] for name in names)])
            named_by.setdefault(number.span, set()).update(common)
        gone = set[int]().union(*named_by.values())
        for number in numbers:
            group = context.groups.get(number.span.written.split()[0])
            is_chosen = group is not None and bool(group.choices)  # by a training
            is_chosen |= isinstance(number, ast.Site)
            if not named_by[number.span] and not is_chosen:
                reason = f"names no coordinate of the rule{loop_hint(values)}"
                _report_exception(number, reason, context, hint=_coordinate_hint(every, gone))
                return None
        if gone == every:
            hint = "remove `except`, or add coordinates to the rule"
            if len(every) > 1:
                hint = f"name fewer coordinates, such as `except {min(every)}`"
            reason = f"leaves no coordinate{loop_hint(values)}"
            _report_exception(numbers[0], reason, context, hint=hint)
            return None
        for k, chosen in own.items():
            kept = tuple(value for value in chosen if value not in gone)
            choices[(*key, *k[len(first) :])] = kept
    if axis_values.sweep is None:
        return AxisValues(loops, None, choices)
    kept = sorted({each[-1] for each, choice in choices.items() if choice})
    sweep = replace(axis_values.sweep, labels=tuple(axis_values.sweep.labels[n] for n in kept))
    numbered = {
        (*each[:-1], kept.index(each[-1])): choice
        for each, choice in choices.items()
        if each[-1] in kept
    }
    return AxisValues(loops, sweep, numbered)


def _coordinate_hint(every: set[int], gone: set[int]) -> str:
    """Return a fix for an exception without a coordinate of the rule.

    Args:
        every: The coordinates of the rule.
        gone: Those that other exceptions leave out.
    """
    left = every - gone
    if len(left) < 2:
        return "remove it: the rule has no further coordinate to leave out"
    return f"name coordinates that the rule writes, such as `except {min(left)}`"


def _site_hint(every: Collection[SitePoint]) -> str:
    """Return a fix for an exception without a site of the rule, which writes these."""
    if len(every) < 2:
        return "remove it: the rule has no further site to leave out"
    first = min(every, key=lambda p: (p.layer or 0, p.unit or 0, p.site))
    place = "" if first.layer is None else f" layer {first.layer}"
    unit = SITES[first.site].unit
    text = f"{first.site}{place}"
    if first.unit is not None:
        text += f" {'neuron' if unit == 'neuron' else 'head'} {first.unit}"
    if first.unit is not None and unit in ("head", "neuron") and not SITES[first.site].stack:
        text = f"L{first.layer}{'N' if unit == 'neuron' else 'H'}{first.unit}"
    return f"name sites that the rule writes, such as `except {text}`"


def _report_exception(
    item: ast.Site | ast.AxisRange, reason: str, context: SiteContext, *, hint: str
) -> None:
    context.diagnostics.append(
        BadException(span=item.span, text=item.span.written, reason=reason, hint=hint)
    )


def _resolve_named_site(
    site: ast.Site, context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Resolve a site without its exceptions."""
    groups = _find_groups(site, context)
    if site.short is not None:
        targets, axes = _resolve_joined(site, (site,), context)
    elif site.ranked is not None:
        targets, axes = _resolve_picked(site, site.ranked, context), ()
    elif groups is not None:
        targets, axes = _resolve_groups(site, groups, context), ()
    else:
        targets, axes = resolve_swept_site(site, context)
    if targets is not None:
        points = (point for here in targets.points.values() for point in here)
        missing = find_missing_point(points, context.shape, context.model, site.span)
        if missing is not None:
            context.diagnostics.append(missing)
            return None, ()
    return targets, axes


def list_pattern_points(shape: ModelShape) -> tuple[SitePoint, ...]:
    """Return the patterns of all layers, each with all heads."""
    return tuple(SitePoint("pattern", layer, None) for layer in range(shape.n_layers))


def _find_groups(site: ast.Site, context: SiteContext) -> tuple[spec.Group, ...] | None:
    """Return the groups that a site stands for, several for a `for` variable; None for others."""
    if len(site.names) != 1 or site.axes:
        return None
    name = site.names[0].id
    words = (name,) if name in context.groups else context.loops.get(name, ())
    groups = [context.groups[str(word)] for word in words if str(word) in context.groups]
    return tuple(groups) if groups and len(groups) == len(words) else None


def _resolve_groups(
    site: ast.Site, groups: Sequence[spec.Group], context: SiteContext
) -> SiteTargets | None:
    """Resolve a group, or the groups of a `for`: joined points for each; None after an error."""
    name = site.names[0].id
    site_targets: list[SiteTargets] = []
    for group in groups:
        if not group.sites:  # its definition has an error
            return None
        looped = name != group.name
        if any(each.coordinates is not None for each in group.sites):
            hint = f"write a rule with `{group.name}` itself"
            if looped:
                reason = "chooses features or dimensions, which no `for` takes"
            elif not group.names_features:
                reason = "has features of bases and other sites"
                hint = "define a group of the features, and one of the other sites"
            else:
                reason = "is a group of features, which this statement doesn't take"
                hint = f"change them: `ablate {name} at last token with zero`"
            span = context.words.get((name, group.name), site.span)
            bad = BadArgument(span=span, name=group.name, reason=reason, hint=hint)
            context.diagnostics.append(bad)
            return None
        if not _fits_model(group, site, context):
            return None
        targets, _ = _resolve_joined(site, group.sites, context.of_definitions())
        if targets is None:
            return None
        site_targets.append(targets)
    if name in context.groups:
        return site_targets[0]
    return SiteTargets(
        (name,),
        {(number,): site_target.points[()] for number, site_target in enumerate(site_targets)},
        {(number,): group.name for number, group in enumerate(groups)},
    )


def _fits_model(group: spec.Group, site: ast.Site, context: SiteContext) -> bool:
    """Whether the model has all candidates of a group in a file; reports E0342 otherwise."""
    shape = context.shape
    for site_name, layer, unit in () if shape.stands_in else group.candidates:
        label = f"`{site_name}`"
        if site_name in SITES:
            point = SitePoint(site_name, layer, unit)
            deepest = count_layers([SITES[site_name]], shape) if layer is not None else 1
            if (layer or 0) < deepest and not find_missing_point(
                [point], shape, context.model, site.span
            ):
                continue
            label = f"`{label_points([point])}`"
        reason = f"the file of `{group.name}` has {label}, and the model `{context.model}` has no "
        reason += "such site"
        hint = "read a file of a training in this model"
        bad = BadBasis(span=group.span, reason=reason, hint=hint, what="group")
        context.diagnostics += [] if bad in context.diagnostics else [bad]
        return False
    return True


def find_missing_point(
    points: Iterable[SitePoint], shape: ModelShape, model: str, span: Span
) -> Diagnostic | None:
    """Return E0301, E0402, E0413 or E0414 for the first point that the model doesn't have."""
    points = list(points)
    for site, layer in dict.fromkeys((point.site, point.layer) for point in points):
        missing = check_site(shape, site, model=model, span=span)
        if missing is not None:
            return missing
        if not shape.has(site, layer):
            stack, name = shape.in_stack(site)
            numbers = sorted(stack.partly[name])
            return SiteNotInBlock(
                span=span,
                model=model,
                site=site,
                layer=layer or 0,
                reason="its blocks have different structures",
                layers=f"layer {', '.join(map(str, numbers))}",
            )
    for point in points:
        last = unit_count(shape, point.site, point.layer) - 1
        if point.unit is not None and point.unit > last:
            return _create_missing_unit(SITES[point.site], point.unit, span, shape, model)
    return None


def _resolve_joined(
    site: ast.Site, sites: tuple[ast.Site, ...], context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Resolve short names and groups: joined points without an axis."""
    points: list[SitePoint] = []
    for member in sites:
        if member.short is not None:
            point = _resolve_short_name(member.short, context)
            if point is None:
                return None, ()
            points.append(point)
            continue
        if member.ranked is not None:
            ranked_sites = context.onward.pick_sites(
                member.ranked, context.parameters, context.diagnostics
            )
            if ranked_sites is None:
                return None, ()
            points.extend(point for ranked_site in ranked_sites for point in ranked_site.points)
            continue
        targets, axes = resolve_swept_site(member, context)
        if targets is None:
            return None, ()
        if axes or targets.axes:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=member.span,
                    site=member.span.written,
                    reason="sweeps inside a group, whose sites are joined",
                    hint="write the plural: `layers`, `heads`",
                )
            )
            return None, ()
        points.extend(targets.points[()])
    # a group may name a point twice, for example directly and in a pick
    points = list(dict.fromkeys(points))
    plain = len(sites) == 1 and sites[0].ranked is None
    name = site.span.written if site.bare is None else site.bare.id  # without a line in the file
    label = label_points(points) if plain else name
    return SiteTargets((), {(): tuple(points)}, {(): label}), ()


def _resolve_picked(
    site: ast.Site, node: ast.RankedSelection, context: SiteContext
) -> SiteTargets | None:
    """Resolve `top 10 of cie` to joined points, for every value of the `for` variables in it."""
    named = set(number_names(node))
    loops = tuple(name for name in context.loops if name in named)
    group = context.groups.get(node.of)
    is_result = node.of in context.onward.found or node.of in context.onward.called
    if group is not None and (group.ranked or group.waits) and not is_result:
        return _pick_from_group(site, node, group, context)
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    for key, values in context.combinations(loops):
        here = {**context.parameters, **values}
        sites = context.onward.pick_sites(node, here, context.diagnostics)
        if sites is None:
            return None
        points[key] = tuple(
            dict.fromkeys(point for ranked_site in sites for point in ranked_site.points)
        )
        several = context.onward.said(node, here) if loops else site.span.written
        labels[key] = sites[0].label if len(sites) == 1 else several
    return SiteTargets(loops, points, labels)


def _pick_from_group(
    site: ast.Site,
    node: ast.RankedSelection,
    group: spec.Group,
    context: SiteContext,
) -> SiteTargets | None:
    """Resolve `top 2 of g` to the sites with the largest scores of a group that a training chooses.

    None after E0207 for a group of features or dimensions, and E0620 for picks of too many sites.
    """
    if any(each.coordinates is not None for each in (*group.ranked, *group.sites)):
        reason = "is a group of features or dimensions, and `top` selects sites of a group"
        hint = f"write `{node.of}`, or train a smaller group"
        bad = BadArgument(span=site.span, name=node.of, reason=reason, hint=hint)
        context.diagnostics += [] if bad in context.diagnostics else [bad]
        return None
    if not _fits_model(group, site, context):
        return None
    targets, _ = _resolve_joined(site, group.ranked or group.sites, context)
    if targets is None:
        return None
    ranked = targets.points[()]
    counts = _count_of_group(site, node, len(ranked), context)
    if counts is None:
        return None
    points = {key: ranked[:count] for key, count in counts[1].items()}
    labels = {
        key: f"top {len(site_points)} of {node.of}" if counts[0] else site.span.written
        for key, site_points in points.items()
    }
    return SiteTargets(counts[0], points, labels)


def _count_of_group(
    site: ast.Site, node: ast.RankedSelection, total: int, context: SiteContext
) -> tuple[tuple[str, ...], dict[AxisIndices, int]] | None:
    """Return how many members `top n of g` selects, for every value of the `for` variables in it,
    with their names; None after E0620.

    Args:
        total: Number of members.
    """
    named = set(number_names(node))
    loops = tuple(name for name in context.loops if name in named)
    known = context.groups[node.of].ranked and not context.shape.stands_in
    there = f"`{node.of}` has {{}} members" if known else None
    counts: dict[AxisIndices, int] = {}
    for key, values in context.combinations(loops):
        try:
            counts[key] = count_picked(node, {**context.parameters, **values}, total, there)
        except PickError as problem:
            text, reason, hint = node.span.written, problem.reason, problem.hint
            bad = BadPick(span=site.span, text=text, reason=reason, hint=hint)
            context.diagnostics.append(bad)
            return None
    return loops, counts


def _resolve_short_name(short: ast.ShortSite, context: SiteContext) -> SitePoint | None:
    kind = _short_kind(short, context)
    if kind is None or not check_layer(short.layer, short.span, context):
        return None
    if not check_component(kind, short.span, context):
        return None
    unit = short.index if kind.unit is not None else None
    if unit is not None:
        word = kind.unit if kind.unit in ("neuron", "expert") else "head"
        if _exceeds_every_model(word, unit, short.span, context):
            return None
        if unit >= unit_count(context.shape, kind.name, short.layer):
            report_missing_unit(kind, unit, short.span, context)
            return None
    return SitePoint(kind.name, short.layer, unit)


def _short_kind(short: ast.ShortSite, context: SiteContext) -> SiteKind | None:
    default = find_short_site(short.unit or "resid")
    if short.component is None:
        if short.unit is None:
            _no_component(short.span, context)
            return None
        return default
    kind = find_short_site(short.component) or SITES.get(short.component)
    if kind is None:
        said = unknown_component(short.component, short.span, SHORT_WORDS)
        context.diagnostics.append(said)
        return None
    letter = {"head": "H", "kv_head": "H", "neuron": "N"}.get(kind.unit or "")
    if letter != short.unit:
        names = (
            f"`L{short.layer}{letter}0.{kind.name}`" if letter else f"`L{short.layer}.{kind.name}`"
        )
        context.diagnostics.append(
            AxisDoesNotFit(
                span=short.span,
                site=kind.name,
                reason="has no such coordinate" if short.unit else "needs a head or neuron",
                hint=f"write {names}",
            )
        )
        return None
    return kind


def _no_component(span: Span, context: SiteContext) -> None:
    components = ", ".join(
        f"`{name}`"
        for name, kind in SITES.items()
        if kind.axes == ("layer",) and name in context.shape.sites
    )
    context.diagnostics.append(NoComponent(span=span, components=components))


def _is_component_loop(word: ast.Name, context: SiteContext) -> bool:
    """Whether the first word of a site is the variable of a `for`. A variable with the name of a
    component is a number, which no site begins with."""
    return word.id in context.loops and word.id not in SITES


def resolve_components(site: ast.Site, context: SiteContext) -> list[SiteKind] | None:
    """Resolve the component of a site; several if a `for` runs over components."""
    words = list(site.names)
    first = words[0] if words and words[0].id not in context.loops else None
    stacks = [word for word in (first, *words[1:]) if word is not None and word.id in STACKS]
    if stacks and not check_stack(stacks[0], context):
        return None
    words = [word for word in words if word not in stacks]
    stack = named_stack(stacks[0], context.shape) if stacks else ""
    stack = f" {stack}" if stack else ""
    if not words:
        if any(axis.word == "head" for axis in site.axes):
            return _in_stack(SITES["z"], stack, site.span, context)
        if any(axis.word == "neuron" for axis in site.axes):
            return _in_stack(SITES["mlp_hidden"], stack, site.span, context)
        _no_component(site.span, context)
        return None
    word = words[0]
    names = context.loops[word.id] if _is_component_loop(word, context) else (word.id,)
    kinds: list[SiteKind] = []
    for name in names:
        kind = SITES.get(str(name))
        if kind is None and re.fullmatch(r"L\d+", str(name)):
            _no_component(word.span, context)  # an incomplete short name such as `L9`
            return None
        if kind is None and name in context.circuits:
            hint = f"write `ablate {name} at … with zero`, or `ablate all but {name} …`"
            reason = "is a circuit, whose edges can only be ablated"
            if word.id in context.loops:
                reason = "is a circuit, and a `for` can't loop over circuits"
                hint = f"write an experiment for each circuit: `ablate {name} at …`"
            bad = BadArgument(span=word.span, name=str(name), reason=reason, hint=hint)
            context.diagnostics.append(bad)
            return None
        if kind is None and name in context.groups:
            _report_group(str(name), word, site, context)
            return None
        if kind is None and any(
            isinstance(problem, BadLoopValue) and problem.name == word.id
            for problem in context.diagnostics
        ):
            return None  # a stand-in for values that are reported
        if kind is None and name in context.bases:
            reason = "is a basis, and rules name its features"
            hint = f"write `features * of {word.id}`"
            bad = BadArgument(span=word.span, name=str(name), reason=reason, hint=hint)
            context.diagnostics.append(bad)
            return None
        if kind is None:
            context.diagnostics.append(_report_no_component(str(name), word, context))
            return None
        site_kinds = _in_stack(kind, stack, word.span, context)
        if site_kinds is None:
            return None
        kinds += site_kinds
    if len(words) > 1:
        report_unknown_stack(words[1], context)
        return None
    return kinds


def _report_no_component(name: str, word: ast.Name, context: SiteContext) -> Diagnostic:
    """Return E0207 for a group of positions as a site, and E0203 for an unknown word."""
    span = context.words.get((word.id, name), word.span)
    if name not in context.positions:
        others = (*context.groups, *context.circuits, *context.loops)
        return unknown_component(name, span, others)
    hint = f"name sites here, and write `at {name} tokens` in a rule"
    return BadArgument(span=span, name=name, reason="chooses positions, not sites", hint=hint)


def _report_group(name: str, word: ast.Name, site: ast.Site, context: SiteContext) -> None:
    """Report E0207 for a group that a site names next to an axis, or that a list of sites names."""
    reason = "is a group, which takes no layers, heads or components"
    hint = f"write `{name}` alone"
    if word.id in context.loops:
        hint = f"write `{word.id}` alone, in a `for` over groups only"
    elif not site.axes and len(site.names) == 1:
        reason = "is a group, and a group lists only sites"
        hint = f"write one rule for `{name}` and one for the other sites: rules of an experiment "
        hint += "act together; after `except`, list the group and the sites"
    span = context.words.get((word.id, name), word.span)
    context.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))


def _in_stack(
    kind: SiteKind, stack: str, span: Span, context: SiteContext
) -> list[SiteKind] | None:
    """Return the site of a stack; None after E0402 or E0413."""
    site_kind = SITES[f"{kind.name}{stack}"]
    return [site_kind] if check_component(site_kind, span, context) else None


def named_stack(word: ast.Name, shape: ModelShape) -> str:
    """Return the stack of `STACK_SITES` that a word names; empty for the main one.

    In a model with two towers, `vision` is the main stack of rows that are images.
    """
    is_tower = word.id == "vision" and "vision" not in shape.others
    return word.id if word.id in STACK_SITES and not is_tower else ""


ATTENDED_IMAGE_HINT = "use `k cross` and `v cross` at the tokens of the image"


def check_stack(word: ast.Name, context: SiteContext) -> bool:
    """Check that a stack before the axes is the one that rules act in anyway.

    For a model with two towers this is the tower that reads the rows; an encoder-decoder has the
    stacks `encoder`, `decoder` and `cross`. Codes: E0108, E0203, E0207.
    """
    side = context.shape.side
    if word.id not in STACKS:
        report_unknown_stack(word, context)
    elif (
        (
            word.id in STACK_SITES
            and word.id != "vision"
            and (word.id != "encoder" or not context.shape.attends_to_image)
        )
        or (word.id in context.shape.others)
        or (word.id == "decoder" and context.shape.encodes_apart)
        or word.id == side
        or (context.shape.stands_in and word.id in ("vision", "text"))
    ):
        return True
    elif side and word.id in ("vision", "text"):
        rows, other = ("images", "prompts") if side == "vision" else ("prompts", "images")
        hint = f"remove `{word.id}`; an experiment on {other} acts in its {word.id} tower"
        if word.id == "text":
            hint += ", with a line `image from …` in its block"
        reason = f"isn't the tower that rules act in here: the rows are {rows}"
        bad = BadArgument(span=word.span, name=f"{word.id} layer", reason=reason, hint=hint)
        context.diagnostics.append(bad)
    else:
        problem = NotSupported(span=word.span, what=f"the stack `{word.id}`")
        if context.shape.takes == "image and text":
            hint = (
                "use `embed` at the tokens of an image, which is the output of the vision encoder "
            )
            reason = context.shape.without_vision or "a check of the encoder failed"
            hint += f"and its projector: in this model, {reason}"
            if word.id == "text":
                hint = "remove `text`: rules act in the language model"
            problem = replace(problem, later=hint)
        elif context.shape.attends_to_image:
            hint = ATTENDED_IMAGE_HINT
            if "vision" in context.shape.others:
                hint += ", or `vision`, the encoder of images"
            problem = replace(problem, later=hint)
        elif word.id == "vision" and context.shape.takes in ("image to text", "sound to text"):
            read = context.shape.takes.split()[0]
            hint = f"write `encoder`, the stack of this model that reads the {read}"
            problem = replace(problem, later=hint)
        context.diagnostics.append(problem)
    return False


def report_unknown_stack(word: ast.Name, context: SiteContext) -> None:
    """Report E0203 for a word between a component and its axes that isn't a stack."""
    hint = did_you_mean(word.id, STACKS, f"remove `{word.id}`: the axes come next")
    if word.id.startswith(("cross", "enc_dec", "encoder_decoder", "encdec")):
        hint = "did you mean `cross`, the decoder's attention to the encoder?"
    context.diagnostics.append(UnknownWord(span=word.span, kind="stack", word=word.id, hint=hint))


def find_side(points: Sequence[SitePoint], shape: ModelShape) -> TokenSide:
    """Return the tokens at which sites have vectors, if only some have one; empty otherwise."""
    side = SITES[points[0].site].side if points else "target"
    if shape.encodes_apart:
        return "source" if side == "image" else side
    return side if side == "image" else ""


def check_component(kind: SiteKind, span: Span, context: SiteContext) -> bool:
    """Check that the model has a component; otherwise report E0402 or a related code."""
    missing = check_site(context.shape, kind.name, model=context.model, span=span)
    if missing is not None and not any(map(partial(_are_alike, missing), context.diagnostics)):
        context.diagnostics.append(missing)
    return missing is None


def _are_alike(one: Diagnostic, two: Diagnostic) -> bool:
    """Return whether two errors of one line are about the same missing site."""
    if not (isinstance(one, SiteNotOnModel) and isinstance(two, SiteNotOnModel)):
        return False
    assert one.span is not None
    assert two.span is not None
    return (one.site, one.span.line) == (two.site, two.span.line)


def resolve_into_layer(
    read: SiteTargets, into: ast.Star | ast.AxisRange, context: SiteContext
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Resolve `into layer L`, which writes into other layers than the site that is read.

    Several layers become an axis `to_layer`.
    """
    kinds = [SITES[p.site] for points in read.points.values() for p in points]
    if not all(kind.has_layer for kind in kinds):
        context.diagnostics.append(
            AxisDoesNotFit(
                span=into.span,
                site=kinds[0].name,
                reason="has no layers to write to",
                hint="remove `into layer …`",
            )
        )
        return None, ()
    for site_points in read.points.values():
        if len({p.layer for p in site_points}) > 1:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=into.span,
                    site=label_points(site_points),
                    reason="is read in several layers at once, which can't all be written to one",
                    hint="sweep with the singular `layer`, or remove `into layer …`",
                )
            )
            return None, ()
    word = ast.Axis("layer", False, (into,), span=into.span)
    values = resolve_axis(word, kinds, context)
    if values is None:
        return None, ()
    axes = () if values.sweep is None else (replace(values.sweep, name="to_layer"),)
    values = replace(values, sweep=axes[0] if axes else None)
    extra = [loop for loop in values.loops if loop not in read.axes]
    names = (*read.axes, *extra, *(axis.name for axis in axes))
    sizes = [len(context.loops[loop]) for loop in extra] + [len(axis) for axis in axes]
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    sources: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    for before, site_points in read.points.items():
        for more in product(*map(range, sizes)):
            key = (*before, *more)
            at = dict(zip(names, key, strict=True))
            (layer,) = values.chosen(at)
            points[key] = tuple(replace(p, layer=layer) for p in site_points)
            sources[key] = site_points
            labels[key] = f"{read.labels[before]} → L{layer}"
    missing = frozenset(key for key, site_points in points.items() if not site_points)
    return SiteTargets(names, points, labels, sources, read.left_out, missing), axes


def resolve_swept_site(
    site: ast.Site, context: SiteContext, kinds: list[SiteKind] | None = None
) -> tuple[SiteTargets | None, tuple[Axis, ...]]:
    """Resolve the points that axes name, of the given components or else of the site's own."""
    kinds = resolve_components(site, context) if kinds is None else kinds
    if kinds is None:
        return None, ()
    if not all(_axes_fit(site, kind, context) for kind in kinds):
        return None, ()
    by_word = {axis.word: axis for axis in site.axes}
    layers = resolve_axis(by_word.get("layer"), kinds, context)
    unit_axis = next((a for a in site.axes if a.word != "layer"), None)
    units_ = _resolve_unit_axis(unit_axis, kinds, layers, context)
    if layers is None or units_ is None:
        return None, ()
    looped = site.names and _is_component_loop(site.names[0], context)
    component_loop = site.names[0].id if looped else None

    axes: list[Axis] = []
    loops: list[str] = []
    if component_loop is not None:
        loops.append(component_loop)
    for part in (layers, units_):
        loops.extend(loop for loop in part.loops if loop not in loops)
        if part.sweep is not None:
            axes.append(part.sweep)
    names = (*loops, *(axis.name for axis in axes))
    sizes = [len(context.loops[loop]) for loop in loops] + [len(axis) for axis in axes]
    joined = _most_joined(layers) * max(map(_most_joined, units_.by_size.values()))
    if (cells := prod(sizes) * joined) > limits.CELLS:
        counts = (f"{name} ({size:,})" for name, size in zip(names, sizes, strict=True))
        context.diagnostics.append(
            TooManyCells(
                span=site.span,
                of=f"`{site.span.written}`",
                cells=cells,
                most=limits.CELLS,
                axes=" × ".join(counts) or "points that it joins",
                by_text=not any(is_open(value) for axis in site.axes for value in axis.values),
            )
        )
        return None, ()
    points: dict[AxisIndices, tuple[SitePoint, ...]] = {}
    labels: dict[AxisIndices, str] = {}
    for key in product(*map(range, sizes)):
        at = dict(zip(names, key, strict=True))
        kind = kinds[at[component_loop] if component_loop is not None else 0]
        here = tuple(
            SitePoint(kind.name, layer, unit)
            for layer in _chosen(layers, at, kind.has_layer)
            for unit in units_.chosen(kind, layer, at, context.shape)
        )
        points[key] = here
        labels[key] = label_points(here) if here else ""
    missing = frozenset(key for key, here in points.items() if not here)
    return SiteTargets(names, points, labels, missing=missing), tuple(axes)


class _UnitValues(Record):
    """Heads, neurons or experts that an axis names, in layers that may differ in their number."""

    loops: tuple[str, ...]
    sweep: Axis | None
    by_size: Mapping[int, AxisValues]
    """By the number of units of a layer."""

    def chosen(
        self, kind: SiteKind, layer: int | None, at: Mapping[str, int], shape: ModelShape
    ) -> tuple[int | None, ...]:
        """Return the units of a layer in one cell, empty if it has none of them; (None,) for a site
        without such an axis."""
        if kind.unit is None:
            return (None,)
        values = self.by_size.get(unit_count(shape, kind.name, layer))
        values = values or next(iter(self.by_size.values()))  # the layer lacks the site: an error
        if not values.choices:
            return (None,)
        if self.sweep is None or values.sweep is None:
            return values.chosen(at)
        label = self.sweep.labels[at[self.sweep.name]]
        if label not in values.sweep.labels:
            return ()
        return values.chosen({**at, self.sweep.name: values.sweep.labels.index(label)})


def _resolve_unit_axis(
    axis: ast.Axis | None, kinds: list[SiteKind], layers: AxisValues | None, context: SiteContext
) -> _UnitValues | None:
    """Resolve the axis of heads, neurons or experts of a site; None after an error.

    `*` names the units of each layer; a number must exist in all of them.

    Args:
        layers: None after an error: a number must then exist in some layer.
    """
    if axis is None:
        return _UnitValues((), None, {0: AxisValues()})
    named = find_layers(kinds, context.shape)
    if layers is not None:
        named = sorted({layer for choice in layers.choices.values() for layer in choice})
    kinds_of: dict[int, list[SiteKind]] = {}
    for kind in kinds:
        having = [layer for layer in named if context.shape.has(kind.name, layer)] or named
        for size in dict.fromkeys(unit_count(context.shape, kind.name, n) for n in having):
            kinds_of.setdefault(size, []).append(kind)
    by_size: dict[int, AxisValues] = {}
    for size in sorted(kinds_of, reverse=True)[: None if layers else 1]:
        values = resolve_axis(axis, kinds_of[size], context, size=size)
        if values is None:
            return None
        by_size[size] = values
    first = next(iter(by_size.values()))
    sweep = first.sweep
    if sweep is not None and len(by_size) > 1:
        labels = {n: None for each in by_size.values() if each.sweep for n in each.sweep.labels}
        sweep = replace(sweep, labels=tuple(labels))
    return _UnitValues(first.loops, sweep, by_size)


def _most_joined(values: AxisValues) -> int:
    return max(map(len, values.choices.values()), default=1)


def _chosen(values: AxisValues, at: Mapping[str, int], applies: bool) -> tuple[int | None, ...]:
    """Return the joined coordinates of one cell; (None,) for a component without such an axis."""
    return values.chosen(at) if applies and values.choices else (None,)


def _suggest_list(site: ast.Site, word: str) -> str:
    """Return the hint for an axis that a site has twice; `q layer 1 head 2, k layer 1 head 3` reads
    as the heads 2 and `k` of a site with two layers."""
    second = re.search(r",\s*([a-z_]+)\s+layers?\b", site.span.written)
    if second is not None and second[1] in SITES:
        named = re.sub(r"\b(layer|head|neuron) (?=\*|\w+ *\.\.)", r"\1s ", site.span.written)
        return f"write several sites as a group: `group g = {named}`, and name `g`"
    return f"write a list: `{word} 0, 3`"


def _axes_fit(site: ast.Site, kind: SiteKind, context: SiteContext) -> bool:
    allowed = set(kind.axes)
    for axis in site.axes:
        if axis.word not in allowed:
            has = " and ".join(f"`{a}`" for a in kind.axes) or "no axes"
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=axis.span,
                    site=kind.name,
                    reason=f"has no axis `{axis.word}`",
                    hint=f"`{kind.name}` has {has}",
                )
            )
            return False
    words = [axis.word for axis in site.axes]
    for word in dict.fromkeys(words):
        if words.count(word) > 1:
            context.diagnostics.append(
                AxisDoesNotFit(
                    span=site.axes[-1].span,
                    site=kind.name,
                    reason=f"names the axis `{word}` twice",
                    hint=_suggest_list(site, word),
                )
            )
            return False
    if kind.has_layer and "layer" not in words:
        name = kind.name if site.names else site.span.written
        every = f"{name} layer *" if site.names else f"layer * {name}"
        reason, hint = "needs a layer", f"write `{every}` for every layer, one run each"
        if site.names and site.names[0].id in context.loops and site.names[0].id in SITES:
            reason = "is a component here, not the variable of the loop, and needs a layer"
            hint = "rename the variable: `for s in …`"
        problem = AxisDoesNotFit(span=site.span, site=name, reason=reason, hint=hint)
        context.diagnostics.append(problem)
        return False
    return True


def label_points(points: tuple[SitePoint, ...] | list[SitePoint]) -> str:
    """Format joined points of a site: `L2H0.z`, `L3.resid_post`, `L0-2.resid_post`, `L3H*.z`,
    `embed`, `L0,2H0-3.z + L1H0-5.z` where layers differ."""
    site = points[0].site
    layers_of: dict[frozenset[int | None], list[int]] = {}
    for layer in sorted({p.layer for p in points if p.layer is not None}):
        units = frozenset(p.unit for p in points if p.layer == layer)
        layers_of.setdefault(units, []).append(layer)
    labels: list[str] = []
    for units, layers in layers_of.items():
        where = f"L{_numbers(layers)}"
        if SITES[site].unit is not None:
            letter = "N" if SITES[site].unit == "neuron" else "H"
            known = sorted(u for u in units if u is not None)
            where += letter + ("*" if None in units else _numbers(known))
        labels.append(f"{where}.{site}")
    return " + ".join(labels) or site


def label_all_points(points: Sequence[SitePoint]) -> str:
    """Format every point, even if a table abbreviates the list: `L0H2.z + L1H3.z`."""
    by_layer: dict[tuple[str, int | None], list[SitePoint]] = {}
    for point in points:
        by_layer.setdefault((point.site, point.layer), []).append(point)
    return " + ".join(label_points(site_points) for site_points in by_layer.values())


def label_node(point: SitePoint) -> str:
    """Format one end of an edge as a file names it: `embed`, `L0H1`, `L1H0.q`, `L1.mlp`, `L1N3`,
    `feature 3 of f`, `logits`; in another stack `embed encoder`, `q cross layer 1 head 0`."""
    if point.layer is None:
        return "embed" if SITES[point.site].stack == "vision" else "logits"
    if isinstance(point, FeatureNode):
        site, _ = find_split_output(point)
        within = f"{site} layer {point.layer} " if point.is_of_layers else ""
        return f"{within}feature {point.unit} of {point.basis}"
    if SITES[point.site].stack:
        if SITES[point.site].component == "resid_pre":
            return f"embed {SITES[point.site].stack}"
        site, unit = point.site, ""
        if SITES[site].component == "mlp_hidden":
            unit = "" if point.unit is None else f" neuron {point.unit}"
            site = site if unit else site.replace("mlp_hidden", "mlp_out")  # the other neurons
        elif point.unit is not None:
            unit = f" head {point.unit}"
        return f"{site} layer {point.layer}{unit}"
    if point.site == "mlp_hidden" and point.unit is not None:
        return f"L{point.layer}N{point.unit}"
    if point.site == "attn_out":
        return f"L{point.layer}.attn"
    if point.unit is None:  # an MLP, or its other neurons
        return "embed" if point.site == "resid_pre" else f"L{point.layer}.mlp"
    head = f"L{point.layer}H{point.unit}"
    return head if point.site == "z" else f"{head}.{point.site}"


def describe_position(label: AxisLabel) -> str:
    """Describe a position: `token -2`, `last token`."""
    return f"token {label}" if str(label).lstrip("-").isdigit() else str(label)


def label_candidates(candidates: Sequence[MaskCandidate]) -> str:
    """Format candidates: `L0H2.z + L1H3.z`, `features 3, 12 of f`, `L3.resid_post dims 0..7`,
    `item 2 + token 5`, `embed -> L0H1.q, L0H1 -> logits at last token`."""
    placed = [candidate for candidate in candidates if isinstance(candidate, PlacedEdge)]
    if placed:
        return ", ".join(f"{label_candidates((edge.edge,))} at {edge.label}" for edge in placed)
    edges = [candidate for candidate in candidates if isinstance(candidate, tuple)]
    if edges:
        return ", ".join(f"{label_node(of)} -> {label_node(to)}" for of, to in edges)
    positions = [
        candidate.label for candidate in candidates if isinstance(candidate, PositionChoice)
    ]
    if positions:
        return " + ".join(map(describe_position, positions))
    points = [candidate for candidate in candidates if isinstance(candidate, SitePoint)]
    coordinates = [candidate for candidate in candidates if isinstance(candidate, SiteCoordinate)]
    if not coordinates:
        return label_all_points(points)
    first, listed = (
        coordinates[0],
        _list_coordinates([coordinate.number for coordinate in coordinates]),
    )
    ending = "" if len(coordinates) == 1 else "s"
    if first.basis is not None:
        return f"feature{ending} {listed} of {first.basis}"
    return f"{label_points((first.point,))} dim{ending} {listed}"


def _list_coordinates(numbers: Sequence[int]) -> str:
    """Format ascending numbers: `3`, `0..7`, `3, 12`."""
    if len(numbers) > 1 and tuple(numbers) == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _numbers(values: list[int]) -> str:
    """Format numbers as ranges: `3`, `0-2`, `0,3,7`."""
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return ",".join(map(str, values))
