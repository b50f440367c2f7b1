"""Rules and rows as columns of integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.models.shape import ModelShape, unit_count
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.cells import list_token_places
from mechdsl.resolve.types import (
    CircuitEdge,
    Coordinates,
    DirectionMember,
    FittedBasis,
    FittedVector,
    JacobianBasis,
    ResolvedRule,
    SiteLayer,
    SitePoint,
)
from mechdsl.vocab.sites import SITES

ALL_UNITS = -1
"""In columns of units: all units of a site."""

NO_FIRST_TOKEN = int(np.iinfo(np.int64).max)
"""The first token of an empty run."""


@dataclass(frozen=True, eq=False)
class EdgeEnds:
    """The senders or the receivers of some edges."""

    points: list[SitePoint]
    """Those that are distinct, in the order of the edges."""
    of_edge: Ints
    """[edge] number of its end."""


def number_edge_ends(edges: Sequence[CircuitEdge]) -> tuple[EdgeEnds, EdgeEnds]:
    """Number the senders and the receivers of edges."""
    senders, receivers = (_number_points([edge[end] for edge in edges]) for end in (0, 1))
    return senders, receivers


def _number_points(points: Sequence[SitePoint]) -> EdgeEnds:
    # Edges share the objects of few nodes, so that each is hashed once.
    objects = np.fromiter(map(id, points), np.int64, len(points))
    _, first, index = np.unique(objects, return_index=True, return_inverse=True)
    number: dict[SitePoint, int] = {}
    for place in np.sort(first).tolist():
        number.setdefault(points[place], len(number))
    of_object = np.array([number[points[place]] for place in first], dtype=np.int64)
    return EdgeEnds(list(number), of_object[index.reshape(-1)])


def count_columns(counts: Ints) -> tuple[Ints, Ints]:
    """Return (index into counts, 0..count-1), repeated per count, in order."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def point_units(points: Sequence[SitePoint]) -> Ints:
    """Return the head or neuron of each point, or `ALL_UNITS`. Shape [point]."""
    return np.array([ALL_UNITS if p.unit is None else p.unit for p in points], dtype=np.int64)


def expand_units(unit: Ints, count: int) -> tuple[Ints, Ints]:
    """Return (index into unit, head or neuron), with `ALL_UNITS` expanded to `count` units."""
    every = unit == ALL_UNITS
    index, within = count_columns(np.where(every, count, 1))
    return index, np.where(every[index], within, unit[index])


@dataclass(frozen=True, eq=False)
class RaggedColumn:
    """Concatenated lists of integers of different lengths."""

    offsets: Ints
    values: Ints

    @staticmethod
    def of(lists: Iterable[Sequence[int]]) -> RaggedColumn:
        ragged = list(lists)
        offsets = np.zeros(len(ragged) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in ragged], out=offsets[1:])
        return RaggedColumn(offsets, np.array([v for one in ragged for v in one], dtype=np.int64))

    def counts(self, keys: Ints) -> Ints:
        return self.offsets[keys + 1] - self.offsets[keys]

    def expand(self, keys: Ints) -> tuple[Ints, Ints]:
        """Return (index into keys, value) for every value of every key, in order."""
        index, within = count_columns(self.counts(keys))
        return index, self.values[self.offsets[keys][index] + within]


@dataclass(frozen=True, eq=False)
class TokenHits:
    """The token positions of a rule: (position, prompt) → runs → tokens."""

    prompts: int
    runs: RaggedColumn
    """Indexed by position * prompts + prompt."""
    tokens: RaggedColumn
    """Indexed by run."""

    @staticmethod
    def of(cells: Sequence[PositionCell], vectors: int = 1) -> TokenHits:
        """Number the tokens of positions.

        Args:
            cells: The positions.
            vectors: Number of vectors that a site has at each token: the patches of an image that a
                token is made from. Vector i of token t has the number t * vectors + i. Cells of
                patches have these numbers.
        """
        runs: list[range] = []
        tokens: list[tuple[int, ...]] = []
        for cell in cells:
            assert cell.vectors in (1, vectors), "patches at a site of tokens"
            for row in cell.in_patches(vectors).hits:
                runs.append(range(len(tokens), len(tokens) + len(row)))
                tokens += row
        return TokenHits(len(cells[0].hits), RaggedColumn.of(runs), RaggedColumn.of(tokens))

    def leftmost(self, runs: Ints) -> Ints:
        """Return the first token of each run; `NO_FIRST_TOKEN` for an empty run."""
        index, token = self.tokens.expand(runs)
        tokens = np.full(len(runs), NO_FIRST_TOKEN, dtype=np.int64)
        np.minimum.at(tokens, index, token)
        return tokens

    def include_answers(self, lengths: Ints) -> bool:
        """Whether any token lies after its prompt, in the answer.

        Args:
            lengths: Tokens of each prompt, shape [prompt].
        """
        key, run = self.runs.expand(np.arange(len(self.runs.offsets) - 1))
        row, token = self.tokens.expand(run)
        return bool((token >= lengths[key % self.prompts][row]).any())

    def run(self, position: Ints, prompt: Ints, alternative: Ints) -> Ints:
        """Return the run of each row; a single run of a rule serves every alternative."""
        key = position * self.prompts + prompt
        return self.runs.offsets[key] + np.minimum(alternative, self.runs.counts(key) - 1)


NO_TOKENS, NEWEST_TOKEN, ALL_TOKENS = range(3)
"""Tokens of a reply that a rule acts on."""


@dataclass(frozen=True, eq=False)
class PathPlan:
    """The receivers of a path rule."""

    table: tuple[SitePoint, ...]
    reads: tuple[SitePoint, ...]
    """The points that the receivers of `table` read: other sites for features of transcoders."""
    points: RaggedColumn
    """Pair of senders and receivers → indices into `table` of the reachable receivers."""
    pair_of_cell: Ints
    through_mlps: bool
    frozen_norms: bool
    coordinates: tuple[Coordinates, ...] = ()
    """Sets of features that receive."""
    coordinates_of_cell: Ints | None = None
    """Index into `coordinates`, shape [cell]; None if whole vectors receive."""

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Whether any receiver comes after a sender. Shape [cell]."""
        return self.points.counts(self.pair_of_cell) > 0

    @property
    def at_the_end(self) -> bool:
        """Whether paths lead only to the end of the model, so that nothing is recorded."""
        return bool(self.table) and bool(self.is_end.all())

    @property
    def also_at_the_end(self) -> bool:
        """Whether the end of the model is one of several receivers."""
        return bool(self.is_end.any()) and not self.at_the_end

    @property
    def is_end(self) -> Bools:
        """Shape [point of `table`]."""
        return np.array([SITES[p.site].when == "output" for p in self.table], dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class RulePlan:
    """One rule over all cells."""

    rule: ResolvedRule
    site_of_cell: Ints
    position_of_cell: Ints
    points: RaggedColumn
    """Site combination → indices into `point_table`."""
    point_table: tuple[SitePoint, ...]
    source_table: tuple[SitePoint, ...]
    """The source of each point, which differs if a rule writes into another layer."""
    written: TokenHits
    read: TokenHits
    positions: tuple[PositionCell, ...]
    """Written positions, per value of `position_of_cell`."""
    sources: tuple[PositionCell, ...]
    """Read positions."""
    averaged: TokenHits
    """Positions of a mean: `read`, except for the rows of another block."""
    number: int = field(default=0, kw_only=True)
    """Its index among the rules of its experiment."""
    amounts: Floats
    """The written number, or the factor of attention. Shape [cell]."""
    directions: tuple[DirectionMember, ...] = ()
    """The directions that it steers along."""
    direction_of_cell: Ints | None = None
    """Index into `directions`, shape [cell]."""
    coordinates: tuple[Coordinates, ...] = ()
    """Sets of coordinates that it changes in its bases."""
    coordinates_of_cell: Ints | None = None
    """Index into `coordinates`, shape [cell]."""
    keys: TokenHits | None = None
    """Attention rules: the keys; `written` contains the queries."""
    key_of_cell: Ints | None = None
    paths: PathPlan | None = None
    vectors: int = 1
    """Number of vectors of each token, as in `TokenHits.of`."""
    in_answers: bool = False
    """Whether it acts on tokens of the answer, which only some passes include."""

    follows: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Tokens of a reply that it acts on at each step: `NO_TOKENS`, `NEWEST_TOKEN`, or `ALL_TOKENS`
    so far. Shape [position]."""
    keys_follow: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Attention rules: the keys in a reply, like `follows`. Shape [position of keys]."""
    active: Bools | None = None
    """Whether it acts in a cell, shape [cell]; None if it acts in all."""
    steps: Ints | None = None
    """First and last step of a reply in which it acts, shape [cell, 2]; None for every step."""

    def follow(self, rows: RowTable) -> Ints:
        """Return the tokens of a reply, as positions or keys, that it acts on. Shape [row]."""
        tokens = self.follows[self.position_of_cell[rows.cell]]
        if self.key_of_cell is None:
            return tokens
        return tokens + (ALL_TOKENS + 1) * self.keys_follow[self.key_of_cell[rows.cell]]

    @cached_property
    def edge_ends(self) -> tuple[tuple[tuple[EdgeEnds, EdgeEnds], ...], ...]:
        """The senders and the receivers of the edges that it ablates, for each circuit and each
        class of tokens."""
        circuit = self.rule.circuit
        every = () if circuit is None else circuit.edges.values()
        return tuple(tuple(map(number_edge_ends, own)) for own in every)

    @cached_property
    def left_out(self) -> tuple[CircuitEdge, ...]:
        """The edge that each cell of `without each edge` adds or removes, by `site_of_cell`."""
        circuit = self.rule.circuit
        assert circuit is not None
        return tuple(edge for edge in circuit.every if edge in circuit.named[()])

    @cached_property
    def _class_table(self) -> Ints:
        """The class of each token of the base run, shape [prompt, token]; the last column is the
        class of later tokens, which have no place."""
        circuit = self.rule.circuit
        assert circuit is not None
        rows = list_token_places(circuit.places)
        longest = max(chain.from_iterable(rows), default=-1)
        class_table = np.zeros((self.written.prompts, longest + 2), dtype=np.int64)
        for prompt, tokens in enumerate(rows):
            for token, places in tokens.items():
                class_table[prompt, token] = circuit.classes.index(places)
        return class_table

    def classes_of(self, prompt: Ints, token: Ints) -> Ints:
        """Return the class of each token of the base run, as an index into the classes of its
        circuit. Shape [token]."""
        table = self._class_table
        return table[prompt, np.minimum(token, table.shape[1] - 1)]

    @cached_property
    def written_classes(self) -> Ints | None:
        """The class of each of `written.tokens.values`; None without places."""
        if self.rule.circuit is None or not self.rule.circuit.places:
            return None
        keys, _ = self.written.runs.expand(np.arange(len(self.written.runs.offsets) - 1))
        run, token = self.written.tokens.expand(np.arange(len(keys)))
        return self.classes_of((keys % self.written.prompts)[run], token)

    def class_counts(self, rows: RowTable) -> Ints:
        """Return the number of written tokens of each class. Shape [row, class]."""
        runs = self.written_runs(rows)
        classes = self.written_classes
        if classes is None:
            return self.written.tokens.counts(runs)[:, None]
        row, found = RaggedColumn(self.written.tokens.offsets, classes).expand(runs)
        assert self.rule.circuit is not None
        counts = np.zeros((len(rows), len(self.rule.circuit.classes)), dtype=np.int64)
        np.add.at(counts, (row, found), 1)
        return counts

    @property
    def placed(self) -> Iterator[tuple[Sequence[PositionCell], Ints]]:
        """Yield (values, index of each cell's value) for its positions and for its keys."""
        yield self.positions, self.position_of_cell
        if self.rule.edge is not None and self.key_of_cell is not None:
            yield list(self.rule.edge.keys.written.values()), self.key_of_cell

    def within(self, cells: Bools) -> RulePlan:
        """Restrict the rule to some cells (shape [cell]); it has no sites in the others."""
        ends = self.points.offsets
        return replace(
            self,
            active=cells if self.active is None else self.active & cells,
            site_of_cell=np.where(cells, self.site_of_cell, len(ends) - 1),
            points=RaggedColumn(np.append(ends, ends[-1]), self.points.values),
        )

    def joins_units(self, place: SiteLayer, shape: ModelShape) -> bool:
        """Return whether it writes all heads or neurons of a site as one vector."""
        return (
            self.rule.basis is not None
            and self.rule.circuit is None
            and SitePoint(*place, None) in self.point_table
            and unit_count(shape, *place) > 1
        )

    def acts(self, rows: RowTable) -> Bools:
        """Return whether it has an effect. Shape [row]."""
        if self.active is None:
            return np.ones(len(rows), dtype=np.bool_)
        return self.active[rows.cell]

    def written_runs(self, rows: RowTable) -> Ints:
        """Return the written run of each row, as an index into `written.tokens`. Shape [row]."""
        return self.written.run(self.position_of_cell[rows.cell], rows.prompt, rows.alternative)

    def key_runs(self, rows: RowTable) -> Ints:
        """Return the run of each row's keys, as an index into `keys.tokens`; attention rules
        only."""
        assert self.keys is not None
        assert self.key_of_cell is not None
        return self.keys.run(self.key_of_cell[rows.cell], rows.prompt, rows.alternative)

    def run_counts(self, prompts: Ints) -> Ints:
        """Return the number of runs, 0 if the rule has no position. Shape [cell, prompt]."""
        counts = _counts(self.written, self.position_of_cell, prompts)
        if self.keys is not None and self.key_of_cell is not None:
            numbers = _counts(self.keys, self.key_of_cell, prompts)
            counts = np.where((numbers == 0) | (counts == 0), 0, np.maximum(numbers, counts))
        if self.paths is not None:
            counts = np.where(self.paths.exists[:, None], counts, 0)
        counts = np.where(self.without_sites[:, None], 0, counts)
        if self.active is not None:
            counts = np.where(self.active[:, None], counts, 1)
        return counts

    @property
    def without_sites(self) -> Bools:
        """Cells whose sites `except` leaves out, so that they don't exist. Shape [cell]."""
        sites = self.rule.sites
        if sites is None or not sites.missing:
            return np.zeros(len(self.site_of_cell), dtype=np.bool_)
        empty = [key in sites.missing for key in sites.points]
        return np.array([*empty, False])[self.site_of_cell]  # the last one: where it doesn't act


def _counts(hits: TokenHits, position: Ints, prompts: Ints) -> Ints:
    key = position[:, None] * hits.prompts + prompts[None, :]
    return hits.runs.counts(key.ravel()).reshape(key.shape)


@dataclass(frozen=True, eq=False)
class RowTable:
    """One row per (cell, prompt, alternative), as parallel columns."""

    cell: Ints
    prompt: Ints
    """Index into the table's rows."""
    alternative: Ints
    """Index among several runs under one label (the middle tokens of a span), averaged later."""

    def __len__(self) -> int:
        return len(self.cell)

    @staticmethod
    def none() -> RowTable:
        """Return an empty table."""
        empty = np.zeros(0, dtype=np.int64)
        return RowTable(empty, empty, empty)

    def take(self, index: Ints) -> RowTable:
        return RowTable(self.cell[index], self.prompt[index], self.alternative[index])


@dataclass(frozen=True, eq=False)
class PassMember:
    """Rows of one experiment that a pass serves."""

    number: int
    """Number of the experiment in its panel."""
    rows: RowTable
    at: Ints
    """[row] index of the row in the pass."""


CARRIED_STAGES = ("stream", "norm", "key")
"""Stages of a block that its attention carries to later positions; other stages are local."""

OWN_TOKEN_STAGES = (*CARRIED_STAGES, "query")
"""Stages of the first block that depend only on the position's own token."""


def is_below_attention(point: SitePoint) -> bool:
    made_of_own = SITES[point.site].stage in OWN_TOKEN_STAGES
    return point.site == "embed" or (point.layer == 0 and made_of_own)


def iter_basis_fits(
    rules: Iterable[RulePlan],
) -> Iterator[FittedVector | FittedBasis | JacobianBasis]:
    """Yield what the bases of rules are fitted on, once each."""
    bases = (basis for rule in rules for basis in rule.rule.bases)
    fits = {id(fit): fit for basis in bases for fit in basis.fits}
    yield from fits.values()
