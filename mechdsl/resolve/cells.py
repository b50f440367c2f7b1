"""Names of cells, axes that depend on the model, and tokens that differ between two runs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from mechdsl.diagnostics.core import UnknownFact
from mechdsl.diagnostics.syntax import UnequalIndexTokens
from mechdsl.program import spec
from mechdsl.program.references import may_sweep_position
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.prompts.runs import PositionCell, PromptRun
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

Coord = int | float | str

_LETTERS = {"layer": "L", "head": "H", "neuron": "N", "expert": "H"}
"""Letter before each kind of number in the name of a site."""


def list_token_places(places: Sequence[PositionCell]) -> list[dict[int, frozenset[int]]]:
    """Return the numbers of the positions that each token is at, for the tokens of each row that
    some position has; empty without positions."""
    token_places: list[dict[int, frozenset[int]]] = []
    for rows in zip(*(place.hits for place in places), strict=True):
        tokens = [{*chain.from_iterable(row)} for row in rows]
        token_places.append(
            {
                token: frozenset(n for n, own in enumerate(tokens) if token in own)
                for token in set[int]().union(*tokens)
            }
        )
    return token_places


@dataclass(frozen=True)
class CellKey:
    """Identity of a cell: its coordinates, site and position."""

    coords: Mapping[str, Coord]
    """One value per axis of the experiment, in the order of its axes."""
    site: str
    """Name of the site in the model, `L2H0.z`; empty in an experiment without rules."""
    position: str | None = None
    tokens: tuple[str, ...] = ()
    """Distinct texts of the written tokens, most frequent first; of attention between two
    positions, the tokens that the axis `position` names: keys, or queries if only these vary."""
    queries: tuple[str, ...] = ()
    """Distinct texts of the queries of attention, if `tokens` are its keys."""
    keys: tuple[str, ...] = ()
    """Distinct texts of the keys of attention, if `tokens` are its queries."""
    read: tuple[str, ...] = ()
    """Distinct texts of the tokens that are read in the source run, if they differ."""
    also: Mapping[str, int] = field(default_factory=dict[str, int])
    """1-based occurrence under the key `item`, if an axis runs over occurrences."""
    listed: tuple[str, ...] = field(default=(), compare=False)
    """Tokens that an observation lists (`top 10`), the most probable first."""
    label: str = field(default="", compare=False)
    """Description of the feature, from a file of labels."""
    shares: tuple[tuple[float, float], ...] = field(default=(), compare=False)
    """For each listed token: its mean probability over rows, and the share of rows in which it is
    the most probable one. Empty if the list doesn't depend on rows."""

    @property
    def name(self) -> str:
        """The site, followed by the coordinates that it doesn't show."""
        shown = [
            f"{axis} {value}" if not isinstance(value, str) else value
            for axis, value in self.coords.items()
            if not self._site_names(axis, value)
        ]
        return " at ".join([self.site, *shown] if self.site else shown) or "the only cell"

    def _site_names(self, axis: str, value: Coord) -> bool:
        """Return whether the name of the site shows a coordinate.

        It doesn't if a rule writes in several layers or heads together and the coordinate belongs
        to something else, such as a direction.
        """
        letter = _LETTERS.get(axis)
        if letter is None or not self.site or isinstance(value, str):
            return letter is not None and bool(self.site)
        return re.search(rf"{letter}{value}(?![\d,-])", self.site) is not None


# --- cells of several variants --------------------------------------------------------------------

VariantLabels = tuple[tuple[str, int | str], ...]
"""Axis and label of everything that varies between variants."""

NO_COORDINATE = "-"
"""Coordinate of a cell along an axis that its variant doesn't have."""


def distinguish_variants(parts: Sequence[tuple[VariantLabels, str]]) -> list[str]:
    """Return a label for each variant: its prompt set and model, unless all variants share them.

    Args:
        parts: Labels and model of each variant.
    """
    blocks = [str(dict(labels).get(PROMPTS_AXIS, "")) for labels, _ in parts]
    models = [model for _, model in parts]
    told = [each if len(set(each)) > 1 else [""] * len(each) for each in (blocks, models)]
    return [", ".join(filter(None, each)) for each in zip(*told, strict=True)]


def join_axes(parts: Sequence[tuple[VariantLabels, Sequence[str]]]) -> list[str]:
    """Join the axes of all variants; axes that vary between variants come first."""
    names = [axis for labels, _ in parts for axis, _ in labels]
    return list(dict.fromkeys([*names, *(axis for _, axes in parts for axis in axes)]))


def join_cells(
    axes: Sequence[str], parts: Iterable[tuple[VariantLabels, Iterable[CellKey]]]
) -> list[CellKey]:
    """Join the cells of all variants, one variant after the other."""
    return [
        replace(cell, coords={axis: _coord(axis, own, cell) for axis in axes})
        for own, cells in ((dict(labels), cells) for labels, cells in parts)
        for cell in cells
    ]


def _coord(axis: str, labels: Mapping[str, int | str], cell: CellKey) -> Coord:
    if axis in labels:
        return labels[axis]
    # A sweep over positions that has a single position has no axis.
    missing = cell.position if axis == "position" else None
    return cell.coords.get(axis, missing or NO_COORDINATE)


def average_cells(cells: Sequence[CellKey], axis: str) -> tuple[list[CellKey], list[list[int]]]:
    """Group cells that differ only along an axis.

    Returns:
        The cells without the axis, and the numbers of the cells that each of them averages.
    """
    groups: dict[tuple[tuple[str, Coord], ...], list[int]] = {}
    for number, cell in enumerate(cells):
        key = tuple((name, value) for name, value in cell.coords.items() if name != axis)
        groups.setdefault(key, []).append(number)
    cell_numbers = [
        _average_key([cells[n] for n in group], dict(key)) for key, group in groups.items()
    ]
    return cell_numbers, list(groups.values())


def _average_key(cells: Sequence[CellKey], coords: Mapping[str, Coord]) -> CellKey:
    """Create the key for the mean of cells, with both ends of each field that differs."""

    def ends(values: Sequence[str]) -> str:
        return " … ".join(dict.fromkeys((values[0], values[-1])))

    positions = [cell.position or "" for cell in cells]
    tokens, queries, keys, read = (
        tuple(dict.fromkeys(text for cell in cells for text in getattr(cell, name)))
        for name in ("tokens", "queries", "keys", "read")
    )
    return CellKey(
        coords=coords,
        site=ends([cell.site for cell in cells]),
        position=ends(positions) or None,
        tokens=tokens,
        queries=queries,
        keys=keys,
        read=read,
        also={k: v for k, v in cells[0].also.items() if all(c.also.get(k) == v for c in cells)},
    )


COMPONENT_AXIS = "component"
"""Name under which the site counts as an axis."""

_UNITS = ("layer", "head", "neuron", "expert")


def find_open_axes(
    experiment: spec.Experiment, groups: Mapping[str, spec.Group], unknown: Collection[UnknownFact]
) -> frozenset[str]:
    """Return the axes whose values aren't known yet.

    These are axes that another experiment picks, features that an observation selects, and axes
    that depend on unavailable facts.
    """
    open_axes: set[str] = set()
    for rule in experiment.rules:
        if rule.site is not None:
            open_axes.update(_of_site(rule.site, groups, unknown))
        if rule.observed is not None and rule.observed.basis and rule.observed.top:
            open_axes.add("feature")
        if rule.receiver is not None:
            names = list(_of_site(rule.receiver, groups, unknown))
            open_axes.update(names, (f"to_{name}" for name in names))
        if rule.edge is not None and rule.edge.heads is not None:
            open_axes.update(_of_site(rule.edge.heads, groups, unknown))
        if "shape" in unknown:
            open_axes.update(_of_axes(rule.edge))
            if rule.into_layer is not None and is_open(rule.into_layer):
                open_axes.update(("layer", "to_layer"))
        for positions in (rule.at, rule.onto):
            if positions is not None and has_open_positions(positions, unknown):
                open_axes.update(("position", "from_position", "item"))
    if "shape" in unknown and any(axis == "model" for axis, _ in experiment.variant):
        # labels by relative depth depend on the number of layers
        open_axes.update(("layer", "to_layer"))
    return frozenset(open_axes)


def has_open_positions(positions: ast.Positions, unknown: Collection[UnknownFact]) -> bool:
    """Return whether unavailable tokens or rows determine which cells exist."""
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
        for axis in part.axes:
            if any(isinstance(value, ast.RankedSelection) for value in axis.values):
                yield axis.word
        if "shape" in unknown:
            yield from _of_axes(part)


def _of_axes(tree: ast.Site | ast.Edge | None) -> Iterator[str]:
    for axis in walk(tree):
        if isinstance(axis, ast.Axis) and any(map(is_open, axis.values)):
            yield axis.word


def counts_from_end(bound: ast.Bound | None) -> bool:
    """Return whether a coordinate depends on the number of coordinates: `-1`, `50%`."""
    return bound is not None and (bound.percent is not None or (bound.value or 0) < 0)


def is_open(value: ast.AxisValue) -> bool:
    """Return whether the model, or another experiment, determines the coordinates."""
    if isinstance(value, ast.RankedSelection):
        return True
    return isinstance(value, ast.Star) or counts_from_end(value.low) or counts_from_end(value.high)


def counts_positions(positions: ast.Positions) -> bool:
    """Return whether positions count tokens instead of naming them."""
    return any(
        isinstance(node, ast.TokenIndex)
        or (isinstance(node, ast.Position) and node.align is not None)
        for node in walk(positions)
    )


def find_token_mismatches(
    base: PromptRun, source: PromptRun, written: PositionCell, read: PositionCell
) -> list[tuple[int, int, int]]:
    """Find tokens of two runs that are paired by index but don't correspond.

    Such tokens have the same index in prompts of different lengths, come after the first difference
    of the prompts (counted from the end: before the last difference), and differ.

    Returns:
        The row, the token of the base run and the token of the source run, for each pair.
    """
    mismatches: list[tuple[int, int, int]] = []
    if written.vectors > 1:  # patches aren't counted
        return mismatches
    for n, (row, theirs) in enumerate(zip(base.rows, source.rows, strict=True)):
        if len(row.ids) == len(theirs.ids):
            continue
        prefix = _shared_length(row.ids, theirs.ids)
        suffix = _shared_length(row.ids[::-1], theirs.ids[::-1])
        hits = zip(written.hits[n], read.hits[n], strict=False)
        for to, of in (pair for run in hits for pair in zip(*run, strict=False)):
            if to >= len(row.ids) or of >= len(theirs.ids):
                continue  # tokens of the answer, which are equal
            tail = len(row.ids) - to
            from_start = to == of and to > prefix
            from_end = tail == len(theirs.ids) - of and tail > suffix + 1
            if (from_start or from_end) and row.ids[to] != theirs.ids[of]:
                mismatches.append((n, to, of))
    return mismatches


def report_token_mismatch(
    positions: ast.Positions,
    runs: tuple[PromptRun, PromptRun],
    pairs: Sequence[tuple[PositionCell, PositionCell]],
    tokenizer: TextTokenizer,
) -> UnequalIndexTokens | None:
    """Return W0760 for counted positions that refer to different tokens in the source run.

    Args:
        positions: The positions as written.
        runs: The base run and the source run.
        pairs: The written and read cells.
    """
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
    """Return the length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
