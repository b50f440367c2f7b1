"""Names of cells, axes that depend on the model, and tokens that differ between two runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mechdsl.diagnostics.core import UnknownFact
from mechdsl.diagnostics.names import UnequalIndexTokens
from mechdsl.program import spec
from mechdsl.program.references import may_sweep_position
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

Coord = int | float | str

_LETTERS = {"layer": "L", "head": "H", "neuron": "N", "expert": "H"}
"""Before their numbers in the name of a site."""


@dataclass(frozen=True)
class CellKey:
    """Which intervention a cell is."""

    coords: Mapping[str, Coord]
    """One value per axis of the experiment, in the order of its axes."""
    site: str
    """As the model names it, `L2H0.z`; empty in an experiment without a rule."""
    position: str | None = None
    tokens: tuple[str, ...] = ()
    """The distinct texts of the tokens that were hit, commonest first."""
    read: tuple[str, ...] = ()
    """The same in the source run, where tokens of one number are other ones there."""
    also: Mapping[str, int] = field(default_factory=dict[str, int])
    """`item`, where an axis runs over occurrences: which of them, counted from 1."""
    listed: tuple[str, ...] = field(default=(), compare=False)
    """Tokens that an observation lists (`top 10`), the first one first."""
    shares: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    """Of each of them, its mean probability over rows, and the share of rows in which it is the
    most likely; none where rows have no part in the list."""

    @property
    def name(self) -> str:
        """The site, with those coordinates that it doesn't show."""
        shown = [
            f"{axis} {value}" if not isinstance(value, str) else value
            for axis, value in self.coords.items()
            if not self._site_names(axis, value)
        ]
        return " at ".join([self.site, *shown] if self.site else shown) or "the only cell"

    def _site_names(self, axis: str, value: Coord) -> bool:
        """Whether the site says a coordinate: not where a rule hits several layers or heads at
        once and something else, such as a direction, is of one of them."""
        letter = _LETTERS.get(axis)
        if letter is None or not self.site or isinstance(value, str):
            return letter is not None and bool(self.site)
        return re.search(rf"{letter}{value}(?![\d,-])", self.site) is not None


# --- cells of several variants --------------------------------------------------------------------

VariantLabels = tuple[tuple[str, int | str], ...]
"""Axis and label of everything that there are several of."""

NO_COORDINATE = "-"
"""The coordinate of a cell along an axis that its variant doesn't have."""


def distinguish_variants(parts: Sequence[tuple[VariantLabels, str]]) -> list[str]:
    """What tells runs of a variant from those of one name of the others: its block, its model;
    nothing where there is one. parts: labels and model of each."""
    blocks = [str(dict(labels).get(PROMPTS_AXIS, "")) for labels, _ in parts]
    models = [model for _, model in parts]
    told = [each if len(set(each)) > 1 else [""] * len(each) for each in (blocks, models)]
    return [", ".join(filter(None, each)) for each in zip(*told, strict=True)]


def join_axes(parts: Sequence[tuple[VariantLabels, Sequence[str]]]) -> list[str]:
    """The axes of all variants: what there are several of comes first."""
    own = [axis for labels, _ in parts for axis, _ in labels]
    return list(dict.fromkeys([*own, *(axis for _, axes in parts for axis in axes)]))


def join_cells(
    axes: Sequence[str], parts: Iterable[tuple[VariantLabels, Iterable[CellKey]]]
) -> list[CellKey]:
    """The cells of all variants, one variant after the other."""
    return [
        replace(cell, coords={axis: _coord(axis, dict(labels), cell) for axis in axes})
        for labels, cells in parts
        for cell in cells
    ]


def _coord(axis: str, labels: Mapping[str, int | str], cell: CellKey) -> Coord:
    if axis in labels:
        return labels[axis]
    # A sweep over positions that finds a single one has no axis.
    missing = cell.position if axis == "position" else None
    return cell.coords.get(axis, missing or NO_COORDINATE)


def average_cells(cells: Sequence[CellKey], axis: str) -> tuple[list[CellKey], list[list[int]]]:
    """(cells without an axis, the numbers of the cells that each is the mean of)."""
    groups: dict[tuple[tuple[str, Coord], ...], list[int]] = {}
    for number, cell in enumerate(cells):
        key = tuple((name, value) for name, value in cell.coords.items() if name != axis)
        groups.setdefault(key, []).append(number)
    found = [_average_key([cells[n] for n in group], dict(key)) for key, group in groups.items()]
    return found, list(groups.values())


def _average_key(cells: Sequence[CellKey], coords: Mapping[str, Coord]) -> CellKey:
    """What the mean of cells is called: both ends of what they differ in."""

    def ends(values: Sequence[str]) -> str:
        return " … ".join(dict.fromkeys((values[0], values[-1])))

    positions = [cell.position or "" for cell in cells]
    return CellKey(
        coords=coords,
        site=ends([cell.site for cell in cells]),
        position=ends(positions) or None,
        tokens=tuple(dict.fromkeys(text for cell in cells for text in cell.tokens)),
        read=tuple(dict.fromkeys(text for cell in cells for text in cell.read)),
        also={k: v for k, v in cells[0].also.items() if all(c.also.get(k) == v for c in cells)},
    )


COMPONENT_AXIS = "component"
"""Stands among the axes for what a site is called."""

_UNITS = ("layer", "head", "neuron", "expert")


def find_open_axes(
    experiment: spec.Experiment, groups: Mapping[str, spec.Group], unknown: Collection[UnknownFact]
) -> frozenset[str]:
    """Coordinates whose values aren't known: those that another experiment picks, and of what
    stands in for something those that it would have to be at hand for."""
    found: set[str] = set()
    for rule in experiment.rules:
        if rule.site is not None:
            found.update(_of_site(rule.site, groups, unknown))
        if rule.receiver is not None:
            own = list(_of_site(rule.receiver, groups, unknown))
            found.update(own, (f"to_{name}" for name in own))
        if rule.edge is not None and rule.edge.heads is not None:
            found.update(_of_site(rule.edge.heads, groups, unknown))
        if "shape" in unknown:
            found.update(_of_axes(rule.edge))
            if rule.into_layer is not None and is_open(rule.into_layer):
                found.update(("layer", "to_layer"))
        for positions in (rule.at, rule.onto):
            if positions is not None and has_open_positions(positions, unknown):
                found.update(("position", "from_position", "item"))
    if "shape" in unknown and any(axis == "model" for axis, _ in experiment.variant):
        found.update(("layer", "to_layer"))  # by their relative depths
    return frozenset(found)


def has_open_positions(positions: ast.Positions, unknown: Collection[UnknownFact]) -> bool:
    """Whether tokens or rows, where they aren't known, decide which cells there are."""
    return any(
        ("tokens" in unknown and _depends_on_tokens(node))
        or ("rows" in unknown and isinstance(node, ast.SpanTokens))
        or (isinstance(node, ast.RankedTokens) and may_sweep_position(node))
        for node in walk(positions)
    )


def _depends_on_tokens(node: ast.Node) -> bool:
    match node:
        case ast.TokenIndex():
            return node.low is None
        case ast.Between() | ast.Except():
            return node.each
        case _:
            return isinstance(node, ast.EachTokenOf)


def _of_site(
    site: ast.Site, groups: Mapping[str, spec.Group], unknown: Collection[UnknownFact]
) -> Iterator[str]:
    members = (each for name in site.names if name.id in groups for each in groups[name.id].sites)
    for part in (site, *members):
        if part.ranked is not None:
            yield from (*_UNITS, COMPONENT_AXIS)
        if "shape" in unknown:
            yield from _of_axes(part)


def _of_axes(tree: ast.Site | ast.Edge | None) -> Iterator[str]:
    for axis in walk(tree):
        if isinstance(axis, ast.Axis) and any(map(is_open, axis.values)):
            yield axis.word


def counts_from_end(bound: ast.Bound | None) -> bool:
    """Whether the coordinate that it names hangs on how many there are: `-1`, `50%`."""
    return bound is not None and (bound.percent is not None or (bound.value or 0) < 0)


def is_open(value: ast.Star | ast.AxisRange) -> bool:
    """Whether which coordinates it names hangs on the model."""
    return isinstance(value, ast.Star) or counts_from_end(value.low) or counts_from_end(value.high)


def counts_positions(positions: ast.Positions) -> bool:
    """Whether it counts tokens, instead of naming them."""
    return any(
        isinstance(node, ast.TokenIndex)
        or (isinstance(node, ast.Position) and node.align is not None)
        for node in walk(positions)
    )


def find_token_mismatches(
    base: PromptRun, source: PromptRun, written: PositionCell, read: PositionCell
) -> list[tuple[int, int, int]]:
    """(row, token of the base run, token of the source run) where the two don't correspond: they
    have one number in prompts of different lengths, lie behind the first difference of the two
    (counted from the end: before the last), and are different tokens."""
    found: list[tuple[int, int, int]] = []
    for n, (own, theirs) in enumerate(zip(base.rows, source.rows, strict=True)):
        if len(own.ids) == len(theirs.ids):
            continue
        prefix = _shared_length(own.ids, theirs.ids)
        suffix = _shared_length(own.ids[::-1], theirs.ids[::-1])
        hits = zip(written.hits[n], read.hits[n], strict=False)
        for to, of in (pair for run in hits for pair in zip(*run, strict=False)):
            if to >= len(own.ids) or of >= len(theirs.ids):
                continue  # the answer's, which are the same
            behind = len(own.ids) - to
            from_start = to == of and to > prefix
            from_end = behind == len(theirs.ids) - of and behind > suffix + 1
            if (from_start or from_end) and own.ids[to] != theirs.ids[of]:
                found.append((n, to, of))
    return found


def report_token_mismatch(
    positions: ast.Positions,
    runs: tuple[PromptRun, PromptRun],
    pairs: Sequence[tuple[PositionCell, PositionCell]],
    tokenizer: TextTokenizer,
) -> UnequalIndexTokens | None:
    """W0760 for counted positions that mean other tokens in the source run; runs: base, source."""
    base, source = runs
    first: tuple[str, int, int, int] | None = None
    rows: set[int] = set()
    for written, read in pairs if counts_positions(positions) else ():
        apart = find_token_mismatches(base, source, written, read)
        rows.update(n for n, _, _ in apart)
        if apart and first is None:
            first = (written.label, *apart[0])
    if first is None:
        return None
    number, n, to, of = first
    return UnequalIndexTokens(
        span=positions.span,
        position=positions.span.written,
        source=source.name,
        base=base.name,
        number=number if number.lstrip("-").isdigit() else str(to),
        theirs=tokenizer.token_text(source.rows[n].ids[of]).strip(),
        own=tokenizer.token_text(base.rows[n].ids[to]).strip(),
        rows=f"{len(rows):,} of {len(base.rows):,}",
    )


def _shared_length(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
