"""Conditions of expectations with bound names, and the cells and measures that they refer to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from mechdsl.base.records import Record
from mechdsl.base.text import Percent, Span, measure_names, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.experiments import AmbiguousMeasure, UnreadableExpectation
from mechdsl.diagnostics.rules import EmptyRange
from mechdsl.diagnostics.syntax import UnknownName, UnknownWord
from mechdsl.resolve.cells import COMPONENT_AXIS
from mechdsl.resolve.types import AxisLabel
from mechdsl.syntax import ast
from mechdsl.vocab.aggregates import AREA_HINTS, expectation_functions
from mechdsl.vocab.sites import SHORT_WORDS, SITES, unknown_component

if TYPE_CHECKING:
    from mechdsl.resolve.cells import CellKey


# --- cells --------------------------------------------------------------------------------------

SHORT_COMPONENTS = {"resid": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
"""Short names of components: `L3.mlp` is `mlp_out layer 3`."""

_SITE = re.compile(r"(?:L(?P<layer>[^HN.]+)(?:(?P<unit>[HN])(?P<index>[^.]+))?\.)?(?P<name>\w+)")
"""A site: `L2H0.z`, `L0-2.resid_post`, `L3H*.z`, `embed`."""

_UNITS = {"H": "head", "N": "neuron"}

CoordinateValues = dict[str, int | float | str]


def component_name(name: str) -> str:
    """Return the registered name of a component from its name or short name."""
    return SHORT_COMPONENTS.get(name, name)


def cell_coordinates(cell: CellKey) -> tuple[CoordinateValues, set[str]]:
    """Return a cell's coordinates and components.

    Coordinates include those that only the site's name contains; rules that act together have
    several components.
    """
    coordinate_values: CoordinateValues = {}
    components: set[str] = set()
    rules = cell.site.split(" + ")
    for rule in rules:
        # `L0H2.z → L1H1.k`: a path's site is its sender; its receiver has separate axes.
        for written, prefix in zip(rule.split(" → "), ("", "to_"), strict=False):
            part = _SITE.fullmatch(written)
            if part is None:
                continue
            if not prefix:
                components.add(part["name"])
            if len(rules) > 1:
                continue
            if (part["layer"] or "").isdigit():
                coordinate_values[f"{prefix}layer"] = int(part["layer"])
            if part["unit"] and part["index"].isdigit():
                coordinate_values[prefix + _UNITS[part["unit"]]] = int(part["index"])
    return {**cell.also, **coordinate_values, **cell.coords}, components


class CellSelection(Record):
    """A selection of cells by ranges of coordinates and a component."""

    text: str
    ranges: Mapping[str, tuple[tuple[int | float | str, int | float | str], ...]]
    """Axis → ranges with inclusive ends; a cell must be in one of them."""
    component: str | None = None

    def matches(self, cell: CellKey, open_axes: Collection[str] = ()) -> bool:
        """Whether a cell is selected; in `open_axes` it may have any value, as yet unknown."""
        coordinates, components = cell_coordinates(cell)
        named = self.component if COMPONENT_AXIS not in open_axes else None
        if named and components and named not in components:
            return False
        return all(
            axis in open_axes
            or (axis in coordinates and any(_within(coordinates[axis], *e) for e in allowed))
            for axis, allowed in self.ranges.items()
        )

    def find(self, cells: Iterable[CellKey]) -> list[int]:
        """Return the indices of the selected cells."""
        return [index for index, cell in enumerate(cells) if self.matches(cell)]


def _within(value: int | float | str, low: int | float | str, high: int | float | str) -> bool:
    if isinstance(value, str) and isinstance(low, Percent) and value.endswith("%"):
        value = float(value[:-1])  # a layer as a relative depth
    if isinstance(value, str) or isinstance(low, str) or isinstance(high, str):
        return str(value) == str(low)
    return low <= value <= high


# --- values -------------------------------------------------------------------------------------


class ConstantValue(Record):
    value: float


class CellValue(Record):
    """The value of cells of a measure: one cell's, or an aggregate of several."""

    aggregate: str
    """A name in `AGGREGATES`. Empty: the value of a single cell."""
    measure: int
    where: tuple[CellSelection, ...] = ()
    experiment: str | None = None
    """Name of the other experiment in `delta of other`; `measure` is an index into its measures."""


class Accuracy(Record):
    run: str


class Correlation(Record):
    """A correlation over the cells that both experiments have."""

    how: Literal["spearman", "pearson"]
    measure: int
    experiment: str


class Arithmetic(Record):
    operator: Literal["+", "-", "*", "/"]
    left: ConditionValue
    right: ConditionValue


class Absolute(Record):
    operand: ConditionValue


class Area(Record):
    """The area under the curve of a measure over an axis, divided by the axis's range."""

    measure: int
    axis: str
    where: tuple[CellSelection, ...] = ()
    to_one: bool = False
    """Whether it is the area between the curve and 1."""


class Ranking(Record):
    """`auroc(effect, truth)`: how well an effect ranks positive cells or rows."""

    measure: int
    where: tuple[CellSelection, ...] = ()
    """The ranked cells; with a column, the cell whose rows are ranked."""
    truth: tuple[CellSelection, ...] | None = None
    """Selections of positive cells; None if a column or a run defines positive rows."""
    column: str | None = None
    """A Boolean variable of the prompts, over the rows of one cell."""
    run: str | None = None
    """The run whose answers are right in positive rows."""


ConditionValue = (
    ConstantValue | CellValue | Accuracy | Correlation | Area | Ranking | Arithmetic | Absolute
)

_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def truth_value(value: object) -> bool | None:
    """Convert a value of the prompts to a truth value, if possible; 0 and 1 are valid, also as
    texts from a CSV column."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


# --- conditions ---------------------------------------------------------------------------------


class Comparison(Record):
    operator: Literal["<", "<=", ">", ">=", "=", "!="]
    left: ConditionValue
    right: ConditionValue


class BandCondition(Record):
    """`v near x within t`, `v in a..b`: both ends included."""

    value: ConditionValue
    low: float
    high: float


class BestCellCondition(Record):
    """`argmax(recovery) = L9H9`, `argmax(recovery) = recovery(c: 2)`."""

    how: Literal["argmax", "argmin"]
    measure: int
    where: tuple[CellSelection, ...]
    named: tuple[CellSelection, ...]
    """Selections that the winner must all match."""
    equal: bool = True

    def names(self, cell: CellKey) -> bool:
        """Whether a cell is one of the named cells."""
        return all(cell_selection.matches(cell) for cell_selection in self.named)


class TopCellsCondition(Record):
    """`top 3 contains L9H9, L9H6`, by absolute value."""

    top: int
    measure: int
    sites: tuple[CellSelection, ...]


class LogicalCondition(Record):
    operator: Literal["and", "or"]
    left: Condition
    right: Condition


class Negation(Record):
    operand: Condition


Condition = Comparison | BandCondition | BestCellCondition | LogicalCondition | Negation

ExpectStatement = Condition | TopCellsCondition
"""The content of an `expect` line."""


class KnownMeasure(Record):
    """The names of a measure for expectations."""

    label: str
    effect: str
    kind: Literal["number", "category"] = "number"
    word: str = ""
    """The metric of a single term (`prob` of `prob(answer)`); empty for other expressions."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names: `ld at item 1 token` is also called `ld`."""
        return measure_names(self.label)

    @property
    def metric(self) -> str:
        """The label without the position."""
        return self.names[-1]


def naming_hint(measures: Sequence[KnownMeasure], cells: Sequence[int], of: str = "") -> str:
    """Return a hint that disambiguates measures or suggests a unique name.

    Args:
        of: Suffix for the measures of another experiment (` of other`).
    """
    named = [(measure.effect, measure.metric) for measure in measures]
    for effect, metric in (named[i] for i in cells):
        if metric.isidentifier() and named.count((effect, metric)) == 1:
            return f"name a metric, as in `{effect} of {metric}{of}`"
    effect, metric = named[cells[0]]
    taken = {name for _, name in named}
    own = next(name for n in count(1) if (name := f"m{n}") not in taken)
    return (
        f"name one of them: add `metric {own} = {metric}` and `measure {own} …`, then write "
        f"`{effect} of {own}{of}`"
    )


class KnownNames(Record):
    """The names in an experiment that an expectation may refer to."""

    measures: Sequence[KnownMeasure]
    axes: Sequence[str] = ()
    runs: Sequence[str] = ()
    """Runs. If the prompts have no answer, E0516 reports that there is no accuracy."""
    experiments: Sequence[str] = ()
    """Names of the file's other experiments."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Second names of axes."""
    cells: Sequence[CellKey] | None = None
    """Cells; None while they are unknown."""
    perhaps: Collection[str] = ()
    """Axes that the experiment may not have, because it isn't fully known."""
    open_axes: Collection[str] = ()
    """Axes along which a cell may have any value, because its value isn't known yet."""
    averaged: Collection[str] = ()
    """Names of the axis that the measures average over, or take the area over."""
    name: str = ""
    """The name of the experiment."""
    others: Mapping[str, KnownNames] = field(default_factory=dict[str, "KnownNames"])
    """Names in other experiments with measures that may be referenced, except lost ones."""
    groups: Mapping[str, Sequence[ast.Site]] = field(default_factory=dict[str, Sequence[ast.Site]])
    """Groups of sites of the file."""
    columns: Mapping[str, Sequence[Any]] | None = field(default_factory=dict[str, Sequence[Any]])
    """Variables of the prompts, row by row; None while they are unknown."""
    all_rows: bool = True
    """Whether columns contain every row of the run."""

    @property
    def one_cell(self) -> bool:
        """Whether there is only one cell, as far as is known."""
        if self.cells is not None and not self.open_axes:
            return len(self.cells) == 1
        return all(axis in self.perhaps for axis in self.axes)


AxisNumber = int | float | str

AxisRanges = tuple[tuple[AxisNumber, AxisNumber], ...]


class RefusedCondition(Exception):
    """Raised with the reason why an expectation is invalid."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


def unreadable_expectation(span: Span, reason: str, hint: str) -> RefusedCondition:
    """Return the exception for E0606."""
    return RefusedCondition(UnreadableExpectation(span=span, reason=reason, hint=hint))


def parse_selection(node: ast.ArgumentValue) -> CellSelection:
    """Convert a site to a cell filter; raises RefusedCondition with E0203, E0321 or E0606."""
    text = node.span.written
    hint = "write a site such as `L9H9` or `L3.resid`"
    if isinstance(node, ast.ShortSite):
        return _short(node, text)
    if isinstance(node, ast.EdgeTokenOf):
        hint = f'write a position as a quoted value of its axis: `position: "{text}"`'
    if isinstance(node, ast.Number):
        hint += f", or a value of `for` as a cell: `delta(NAME: {text})`"
    if isinstance(node, ast.Name):
        node = ast.Site(names=(node,), span=node.span)
    if not isinstance(node, ast.Site):
        raise unreadable_expectation(node.span, f"`{text}` is not a site", hint)
    if node.short is not None:
        return _short(node.short, text)
    if node.ranked is not None or node.basis is not None or len(node.names) > 1:
        raise unreadable_expectation(node.span, f"`{text}` is not a plain site", hint)
    ranges = {axis.word: _axis(axis) for axis in node.axes}
    component = _component(node.names[0].id, node.names[0].span) if node.names else None
    return CellSelection(text, {word: each for word, each in ranges.items() if each}, component)


def ascending_range(
    low: AxisNumber, high: AxisNumber, span: Span
) -> tuple[tuple[AxisNumber, AxisNumber]]:
    """Return a range of an axis; E0321 if it is empty."""
    if isinstance(low, int | float) and isinstance(high, int | float) and high < low:
        problem = EmptyRange(span=span, text=span.written, low=f"{high:g}", high=f"{low:g}")
        raise RefusedCondition(problem)
    return ((low, high),)


def _component(name: str, span: Span) -> str:
    """Return the full name of a component, which must exist."""
    component = component_name(name)
    if component not in SITES:
        raise RefusedCondition(unknown_component(name, span, SHORT_WORDS))
    return component


def _axis(axis: ast.Axis) -> AxisRanges:
    """Return the ranges of an axis; empty for `*`."""
    axes: list[tuple[AxisNumber, AxisNumber]] = []
    for value in axis.values:
        if isinstance(value, ast.Star):
            return ()
        if isinstance(value, ast.RankedSelection):
            raise unreadable_expectation(value.span, "not an index", "write the number itself")
        low = _bound(value.low)
        high = low if value.high is None else _bound(value.high)
        ends = ascending_range(low, high, value.span)
        if value.step < 1:
            raise unreadable_expectation(value.span, "its step is not above 0", "write a step")
        axes += ends if value.step == 1 else [(n, n) for n in value.numbers(low, high)]
    return tuple(axes)


def _bound(bound: ast.Bound) -> int:
    if bound.value is None or bound.value < 0:
        text = bound.span.text
        raise unreadable_expectation(
            bound.span, f"`{text}` is not an index", "write the number, counted from 0"
        )
    return bound.value


def _short(node: ast.ShortSite, text: str) -> CellSelection:
    ranges: dict[str, AxisRanges] = {"layer": ((node.layer, node.layer),)}
    if node.unit is not None and node.index is not None:
        ranges["head" if node.unit == "H" else "neuron"] = ((node.index, node.index),)
    component = _component(node.component, node.span) if node.component else None
    return CellSelection(text, ranges, component)


def _written(axis: str, value: AxisLabel) -> str:
    """Format a value of an axis: `layer: 2`, `position: "last token"`."""
    return f'{axis}: "{value}"' if isinstance(value, str) else f"{axis}: {value}"


def _squeezed(text: str) -> str:
    return "".join(text.split())


class CellReader:
    """Reads measures and cells of one experiment: the expecting one or another one."""

    def __init__(self, known: KnownNames, *, of_other: bool = False) -> None:
        self.known = known
        self.of_other = of_other
        self.whose = f"`{known.name}`" if of_other else "this experiment"

    @property
    def experiment(self) -> str | None:
        """The name of another experiment; None for the expecting one."""
        return self.known.name if self.of_other else None

    @property
    def example(self) -> str:
        """An example of a cell's name."""
        if not self.known.cells or self.known.open_axes:
            return "L9H9"
        return ", ".join(_written(axis, at) for axis, at in self.known.cells[0].coords.items())

    @property
    def true_example(self) -> str:
        """An example of a truth in `auroc(measure, …)`: a group, otherwise a site."""
        if self.known.groups:
            return next(iter(self.known.groups))
        cells = [] if self.known.open_axes else list(self.known.cells or ())
        if len({cell.site for cell in cells}) < len(cells) and "position" in cells[0].coords:
            return f'["{cells[0].coords["position"]}"]'
        return f"[{cells[0].site}]" if len(cells) > 1 else "[L9H9]"

    # --- measures

    def labelled(self, node: ast.Expr) -> list[int]:
        """Return the measures whose metric has exactly this text."""
        text = _squeezed(node.span.written)
        measures = self.known.measures
        return [i for i, m in enumerate(measures) if text in map(_squeezed, m.names)]

    def measure(self, node: ast.Expr, *, called: bool = False) -> int:
        """Return the single measure that a name, `recovery of ld` or a metric's text refers to.

        Args:
            called: Whether arguments follow, so that a function may have been meant.
        """
        measures = self.known.measures
        text = node.span.written
        cells = self.labelled(node)
        if not cells and isinstance(node, ast.Name):
            text = node.id
            cells = [i for i, m in enumerate(measures) if node.id in (m.effect, *m.names)]
            numbers = [i for i in cells if measures[i].kind == "number"]
            cells = numbers or cells
            # `prob` is short for the only measure `prob(answer)`.
            cells = cells or [
                i
                for i, m in enumerate(measures)
                if m.word == node.id and not m.metric.isidentifier()
            ]
        elif not cells and isinstance(node, ast.QualifiedRef):
            cells = [
                i
                for i, m in enumerate(measures)
                if m.effect == node.name and node.of.name in m.names
            ]
        if not cells:
            words = {m.effect: None for m in measures} | {m.metric: None for m in measures}
            listed = f"{self.whose} measures {name_list(words)}"
            short = [m.word for m in measures if m.word]
            hint = did_you_mean(
                text, [*words, *short, *(expectation_functions() if called else ())], listed
            )
            hint = AREA_HINTS.get(text.lower(), hint)
            kind = f"measure or effect of {self.whose}"
            raise RefusedCondition(UnknownWord(span=node.span, kind=kind, word=text, hint=hint))
        if len(cells) > 1:
            end = f" of {self.known.name}" if self.of_other else ""
            hint = naming_hint(measures, cells, end)
            raise RefusedCondition(self.which(node.span, text, cells, hint))
        if measures[cells[0]].kind == "category":
            hint = "categories have no mean; `correct` or `expected(1..9)` are numbers"
            raise unreadable_expectation(
                node.span, f"`{measures[cells[0]].label}` is a category", hint
            )
        return cells[0]

    def which(self, span: Span, text: str, cells: Sequence[int], hint: str) -> AmbiguousMeasure:
        named = [self.known.measures[i] for i in cells]
        count = Counter(f"`{measure.effect} of {measure.label}`" for measure in named)
        candidates = " or ".join(
            f"{name} ({n} times)" if n > 1 else name for name, n in count.items()
        )
        return AmbiguousMeasure(
            span=span, text=text, count=len(cells), candidates=candidates, hint=hint
        )

    # --- cells

    def find(self, where: Sequence[CellSelection]) -> list[int]:
        """Return the selected cells, without duplicates in their known coordinates."""
        cells, unknown = self.known.cells or (), self.known.open_axes
        cell_numbers: dict[object, int] = {}
        for i, cell in enumerate(cells):
            if all(cell_selection.matches(cell, unknown) for cell_selection in where):
                apart = tuple(v for axis, v in cell.coords.items() if axis not in unknown)
                cell_numbers.setdefault(apart if unknown else i, i)
        return list(cell_numbers.values())

    def not_one(self, span: Span, where: Sequence[CellSelection], cells: Sequence[int]) -> NoReturn:
        text = ", ".join(cell_selection.text for cell_selection in where)
        if not cells:
            axes = name_list(self.known.axes) or "none"
            hint = f"name a cell of {self.whose}; its axes are {axes}"
            hint = next(self._quoted(where), hint)
            raise unreadable_expectation(span, f"no cell matches {text}", hint)
        count = "several" if self.known.open_axes else len(cells)
        example = f"add `{self._apart(cells)}` to select one, or take `max(…)` over them"
        raise unreadable_expectation(span, f"{text} matches {count} cells", example)

    def _quoted(self, where: Sequence[CellSelection]) -> Iterator[str]:
        """Yield hints for numbers that are texts, as in `position: "14"`."""
        coords = [item for cell in self.known.cells or () for item in cell.coords.items()]
        known = {_written(*item) for item in coords}
        for cell_selection in where:
            axis, _, value = cell_selection.text.partition(": ")
            if (text := f'{axis}: "{value}"') in known:
                yield f"write `{text}`"

    def _apart(self, cell_numbers: Sequence[int]) -> str:
        """Describe what distinguishes these cells."""
        cells = self.known.cells or ()
        coords = [cells[number].coords for number in cell_numbers]
        for axis, value in coords[0].items():
            if axis not in self.known.open_axes and any(at.get(axis) != value for at in coords):
                return _written(axis, value)
        return _written("position", "last token")

    def one_of(
        self, site: ast.Expr | ast.Site, among: Sequence[CellSelection] = ()
    ) -> CellSelection:
        """Parse a site that some of these cells have, but not all of several: the condition would
        never hold, or always."""
        own = parse_selection(site)
        self.must_select(site.span, (own,), among)
        return own

    def must_select(
        self, span: Span, own: Sequence[CellSelection], among: Sequence[CellSelection]
    ) -> None:
        """Report E0606 if a selection has none of these cells, or all of several."""
        if self.known.cells is None:
            return
        where = (*own, *among)
        cells, every = self.find(where), self.find(among)
        if not cells:
            self.not_one(span, where, [])
        if len(cells) == len(every) > 1 and not self.known.open_axes:
            axes = [axis for axis in self.known.axes if self._differ(axis, cells)]
            name = axes[0] if axes else "NAME"
            raise unreadable_expectation(
                span,
                f"all {len(cells)} cells match {', '.join(each.text for each in own)}",
                f"compare single cells: `{self.known.measures[0].effect}({name}: …) > …`",
            )

    def _differ(self, axis: str, cells: Sequence[int]) -> bool:
        """Return whether cells differ in a coordinate."""
        every = self.known.cells or ()
        return len({every[cell].coords.get(axis) for cell in cells}) > 1

    def wheres(self, arguments: Sequence[ast.Argument]) -> tuple[CellSelection, ...]:
        return tuple(
            self.site(argument.value)
            if argument.name is None
            else self.named(argument.name, argument)
            for argument in arguments
        )

    def site(self, node: ast.ArgumentValue) -> CellSelection:
        """Parse a site; E0606 for the label of an axis without the axis, and for an edge."""
        if isinstance(node, ast.SiteMap) and "edge" in self.known.axes:
            text = node.span.written
            hint = f'write the edge as a quoted value of its axis: `edge: "{text}"`'
            raise unreadable_expectation(node.span, f"`{text}` is not a site", hint)
        if not isinstance(node, ast.String):
            return parse_selection(node)
        text = node.span.written
        hint = f"write the axis, too: `{self.axis_of(node)}: {text}`"
        raise unreadable_expectation(node.span, f"`{text}` is not a site", hint)

    def axis_of(self, node: ast.String) -> str:
        """Return the axis that has a label; the axis of positions if none is known to have it."""
        with_label = (
            axis
            for axis in self.known.axes
            if any(str(cell.coords.get(axis)) == node.value for cell in self.known.cells or ())
        )
        return next(with_label, "position")

    def named(self, axis: str, argument: ast.Argument) -> CellSelection:
        """Parse `position: "last token"`, `layer: 2`."""
        number, axis = axis, self.known.aliases.get(axis, axis)  # `item: 3` is a number
        if axis not in self.known.axes:
            listed = name_list(self.known.axes) or "none"
            verb = "can be" if self.known.perhaps else "are"
            hint = did_you_mean(axis, self.known.axes, f"its axes {verb} {listed}")
            kind = f"axis of {self.whose}"
            raise RefusedCondition(UnknownWord(span=argument.span, kind=kind, word=axis, hint=hint))
        value = argument.value
        text = argument.span.written
        match value:
            case ast.String():
                self.label(value, axis)
                return CellSelection(text, {axis: ((value.value, value.value),)})
            case ast.Range():
                ends = ascending_range(self.end(value.low), self.end(value.high), value.span)
                return CellSelection(text, {number: ends})
            case (
                ast.Number()
                | ast.Percent()
                | ast.Negative(operand=ast.Number())
                | ast.Negative(operand=ast.Percent())
            ):
                return CellSelection(text, {number: ((self.end(value), self.end(value)),)})
            case _:
                hint = f'write `{axis}: 2`, `{axis}: 2..4` or `{axis}: "…"`'
                if isinstance(value, ast.Name):
                    hint = f'put words in quotes: `{axis}: "{value.id}"`'
                raise unreadable_expectation(
                    argument.span, f"`{argument.span.written}` is not a value of an axis", hint
                )

    def label(self, value: ast.String, axis: str) -> None:
        """Report E0203 for a label that an axis doesn't have, if its labels are known."""
        if self.known.cells is None or axis in self.known.open_axes:
            return
        axis_labels = (cell.coords[axis] for cell in self.known.cells if axis in cell.coords)
        labels = list(dict.fromkeys(map(str, axis_labels)))
        if labels and value.value not in labels:
            listed = f"it has {name_list(labels)}"
            hint = did_you_mean(value.value, labels, listed)
            kind = f"`{axis}` in {self.whose}"
            raise RefusedCondition(
                UnknownWord(span=value.span, kind=kind, word=value.value, hint=hint)
            )

    def labelled_cells(self, node: ast.String) -> CellSelection:
        """Select the cells with a label, of a position or another axis; E0203 if there are none."""
        axis = self.axis_of(node)
        self.label(node, axis)
        return CellSelection(node.span.written, {axis: ((node.value, node.value),)})

    def end(self, node: ast.Expr) -> float:
        """Return an end of a range of cells; `50%` is 50, as in the labels of cells."""
        match node:
            case ast.Percent():
                return Percent(node.value)
            case ast.Negative(operand=ast.Percent(value=value)):
                return Percent(-value)
            case _:
                return self.constant(node)

    def constant(self, node: ast.Expr) -> float:
        """Return a number, which may have a sign or be a sum."""
        match node:
            case ast.Number():
                return float(node.value)
            case ast.Percent():
                return node.value / 100
            case ast.Negative():
                return -self.constant(node.operand)
            case _:
                raise unreadable_expectation(
                    node.span, "not a plain number", "write the number itself"
                )


def truth_column(argument: ast.Argument, of: CellReader) -> str | None:
    """Return the Boolean variable of the prompts that an argument names; None for a group or sites.

    Codes: E0201 for unknown names, E0606 for ambiguous ones and for variables that aren't Boolean.
    """
    name = _name(argument.value) if argument.name is None else None
    if name is None:
        return None
    columns, groups = of.known.columns, of.known.groups
    a_site = name in groups or component_name(name) in SITES
    if columns is None:
        return None if a_site else name
    span = argument.value.span
    if name not in columns:
        if a_site:
            return None
        words = (*groups, *columns)
        variables = name_list(columns) or "none"
        listed = f"write sites as a list, such as `[L9H9]`; the prompt variables are {variables}"
        kind = "group or prompt variable"
        hint = did_you_mean(name, words, listed)
        raise RefusedCondition(UnknownName(span=span, kind=kind, name=name, hint=hint))
    if a_site:
        other = "a group" if name in groups else "a component"
        reason = f"`{name}` is both {other} and a prompt variable"
        raise unreadable_expectation(span, reason, "rename one of them")
    _check_values(name, columns[name], span, all_rows=of.known.all_rows)
    return name


def _check_values(name: str, values: Sequence[object], span: Span, *, all_rows: bool) -> None:
    """Report E0606 for a variable that isn't both true and false."""
    hint = "use a variable that is 0 or 1, such as `large = if count > 5 then 1 else 0`"
    other = next((value for value in values if truth_value(value) is None), None)
    if other is not None:
        raise unreadable_expectation(
            span, f"`{name}` is neither true nor false: it is `{other}` in one row", hint
        )
    if all_rows and len({truth_value(value) for value in values}) == 1:
        raise unreadable_expectation(span, f"`{name}` is {values[0]} in every row", hint)


def true_cells(
    argument: ast.Argument, where: Sequence[CellSelection], of: CellReader
) -> tuple[CellSelection, ...]:
    """Return the sites of a group or a list, or its positions, which make a cell positive.

    Codes: E0203 for a position that no cell has, E0606 for such a site, and if all ranked cells, or
    none, are positive.
    """
    found = tuple(
        of.labelled_cells(site) if isinstance(site, ast.String) else parse_selection(site)
        for site in _sites(argument, of)
    )
    span, cells = argument.value.span, of.known.cells
    if cells is None:
        return found
    for each in found:
        if not of.find((each,)):
            of.not_one(span, (each,), [])
    ranked = of.find(where)
    if not ranked:
        of.not_one(span, where, [])
    if of.known.open_axes:
        return found
    true = [i for i in ranked if any(each.matches(cells[i]) for each in found)]
    if len(true) in (0, len(ranked)):
        which = "every" if true else "no"
        reason = f"{which} ranked cell is at `{span.written}`"
        hint = "`auroc` compares cells in the list with all others: rank more cells, or list fewer"
        raise unreadable_expectation(span, reason, hint)
    return found


def _sites(argument: ast.Argument, of: CellReader) -> Iterator[ast.ArgumentValue]:
    value = argument.value
    if argument.name is not None:
        reason = f"`{argument.span.written}` doesn't define the positive cells"
        hint = f"write a group or a list of sites or positions, as in `{of.true_example}`"
        raise unreadable_expectation(argument.span, reason, hint)
    listed = value.items if isinstance(value, ast.ListLiteral) else (value,)
    for each in listed:
        name = _name(each)
        if name is not None and name in of.known.groups:
            yield from of.known.groups[name]
        else:
            yield each


def _name(value: ast.ArgumentValue) -> str | None:
    """Return a lone word, which also parses as a group of sites."""
    if isinstance(value, ast.Site) and len(value.names) == 1 and not value.axes:
        return value.names[0].id
    return value.id if isinstance(value, ast.Name) else None
