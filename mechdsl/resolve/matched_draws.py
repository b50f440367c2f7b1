"""Seeded draws of targets that match a cell's own in number and kind.

A draw depends on the seed, on the targets that it replaces and on the pool. This module has no
knowledge of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import comb, prod
from typing import Any, TypeAlias

from mechdsl.base.hashing import (
    Permutation,
    choose_subset,
    random_rank,
    rank_subset,
    stable_hash,
    unrank_subset,
)
from mechdsl.base.records import Record
from mechdsl.program import spec
from mechdsl.prompts.runs import Hits
from mechdsl.vocab.sites import Stack

UNIT_WORDS: Mapping[str, spec.ControlTarget] = {
    "head": "heads",
    "kv_head": "heads",
    "neuron": "neurons",
    "expert": "experts",
}

MAX_RANKS = 1 << 62
"""Maximum number of sets to enumerate; larger numbers are sampled."""


class ExchangeGroup(Record):
    """Targets that are interchangeable: the heads of one layer, or all layers."""

    word: spec.ControlTarget
    size: int
    layer: int | None
    stack: Stack = ""


CellTargets: TypeAlias = Mapping[ExchangeGroup, tuple[int, ...]]
"""Targets of one cell in ascending order, by exchange group."""

TargetSwaps: TypeAlias = Mapping[tuple[ExchangeGroup, int], int]
"""Target → the target that was drawn to replace it."""


class SiteOptions(Record):
    """All sets of targets that could replace those of a cell."""

    own: CellTargets
    slots: Sequence[ExchangeGroup]
    pools: Sequence[tuple[int, ...]]
    sizes: Sequence[int]
    """Number of sets for each pool."""
    itself: int | None
    """Rank of the cell's own targets, which aren't a control; None if they can't be drawn."""
    key: int
    without: str
    """Description of the excluded targets."""

    @property
    def count(self) -> int:
        """Number of different replacements."""
        return prod(self.sizes) - (self.itself is not None)

    def pick(self, rank: int | None, draw: int) -> TargetSwaps:
        """Return target → replacement.

        Args:
            rank: Rank of the replacement; None for a seeded random one.
            draw: Number of the draw.
        """
        if rank is not None and self.itself is not None:
            rank += rank >= self.itself
        swaps: dict[tuple[ExchangeGroup, int], int] = {}
        for slot, pool, size in zip(self.slots, self.pools, self.sizes, strict=True):
            numbers, here = self.own[slot], None
            if rank is not None:
                rank, here = divmod(rank, size)
            targets = choose_subset(pool, len(numbers), here, self.key, slot.layer, draw)
            # The assignment is random too, because rules may treat the targets differently.
            several = len(targets) > 1
            places = Permutation(len(targets), self.key, slot.layer, draw) if several else (0,)
            for n, target in enumerate(numbers):
                swaps[slot, target] = targets[places[n]]
        return swaps


def find_site_options(
    cell_targets: CellTargets,
    everywhere: CellTargets,
    apart: CellTargets,
    fitting: Sequence[int],
    *,
    draws: int,
    seed: int,
) -> SiteOptions | None:
    """Return the possible replacements for the targets of a cell; None if there are none.

    Args:
        cell_targets: The targets of the cell.
        everywhere: The targets of all cells.
        apart: Targets that are never drawn.
        fitting: Layers that can be drawn.
    """
    slots = sorted(
        cell_targets, key=lambda slot: (slot.word, slot.size, slot.layer or 0, slot.stack)
    )
    everything = {
        slot: _exclude(
            tuple(fitting) if slot.word == "layers" else range(slot.size), apart.get(slot, ())
        )
        for slot in slots
    }
    tiers = (
        ("none named by a rule", everywhere),
        ("none of the cell's targets", cell_targets),
        ("including the cell's targets if there are too few others", {}),
    )
    chosen: SiteOptions | None = None
    for note, without in tiers if cell_targets else ():
        pools = [_exclude(everything[slot], without.get(slot, ())) for slot in slots]
        sizes = [
            comb(len(p), len(cell_targets[slot])) for p, slot in zip(pools, slots, strict=True)
        ]
        itself = None
        if not without and all(set(cell_targets[s]).issubset(everything[s]) for s in slots):
            itself = _rank([rank_subset(everything[s], cell_targets[s]) for s in slots], sizes)
        parts = [(slot.word, slot.size, slot.layer, cell_targets[slot]) for slot in slots]
        stacks = [slot.stack for slot in slots if slot.stack]
        key = stable_hash(seed, "control", *parts, *map(len, pools), *stacks)
        site_options = SiteOptions(cell_targets, slots, pools, sizes, itself, key, note)
        if site_options.count > (0 if chosen is None else chosen.count):
            chosen = site_options
        if chosen is not None and chosen.count >= draws:
            break
    return chosen


def _rank(places: Sequence[int], sizes: Sequence[int]) -> int:
    """Combine the ranks of components into a joint rank; the first component varies fastest."""
    rank = 0
    for place, size in reversed(list(zip(places, sizes, strict=True))):
        rank = rank * size + place
    return rank


class RowOptions(Record):
    """All tokens that could replace those of one row.

    Each run of tokens is replaced by the same number of tokens. Runs of equal length get different
    replacements, because their order has no meaning.
    """

    hits: Hits
    pool: tuple[int, ...]
    groups: Mapping[int, tuple[int, int]]
    """Length of a run → number of runs of this length, number of token sets."""
    itself: int | None
    key: int

    @classmethod
    def of(cls, allowed: tuple[int, ...], hits: Hits, *, row_key: int, seed: int) -> RowOptions:
        """Create the options from tokens that aren't the row's own, or from all if there are
        none."""
        taken = {token for run in hits for token in run}
        lengths = Counter(map(len, hits))
        chosen: RowOptions | None = None
        for pool in (_exclude(allowed, sorted(taken)), allowed):
            groups = {size: (runs, comb(len(pool), size)) for size, runs in lengths.items()}
            key = stable_hash(seed, "control", "positions", row_key, pool)
            options = cls(hits, pool, groups, None, key)
            if taken <= set(pool):
                options = replace(options, itself=options.own_rank())
            if chosen is None or chosen.alone:
                chosen = options
        assert chosen is not None
        return chosen

    @property
    def total(self) -> int:
        return prod(comb(sets, runs) for runs, sets in self.groups.values())

    @property
    def count(self) -> int:
        """Number of different replacements; 1 for a row without alternatives."""
        return 1 if self.alone else self.total - (self.itself is not None)

    @property
    def alone(self) -> bool:
        """Whether the row has no alternatives."""
        return not any(self.hits) or self.total <= (self.itself is not None)

    @property
    def among(self) -> bool:
        """Whether the drawn tokens may include the row's own."""
        return not self.alone and not {t for run in self.hits for t in run}.isdisjoint(self.pool)

    def own_rank(self) -> int | None:
        """Return the rank of the row's own tokens; None if two of its runs are equal."""
        places: list[int] = []
        sizes: list[int] = []
        for size, (runs, sets) in self.groups.items():
            numbers = {rank_subset(self.pool, run) for run in self.hits if len(run) == size}
            if len(numbers) < runs:
                return None
            places.append(rank_subset(range(sets), sorted(numbers)))
            sizes.append(comb(sets, runs))
        return _rank(places, sizes)

    def pick(self, rank: int | None, draw: int) -> Hits:
        """Return tokens for the row's runs.

        Args:
            rank: Rank of the replacement; None for a seeded random one.
            draw: Number of the draw.
        """
        if self.alone:
            return self.hits
        if rank is None and self.count <= MAX_RANKS:
            rank = random_rank(self.count, self.key, draw)
        if rank is not None and self.itself is not None:
            rank += rank >= self.itself
        drawn: dict[int, list[tuple[int, ...]]] = {}
        for size, (runs, sets) in self.groups.items():
            here = None
            if rank is not None:
                rank, here = divmod(rank, comb(sets, runs))
            drawn[size] = self._runs(size, runs, sets, here, draw)
        return tuple(drawn[len(run)].pop(0) for run in self.hits)

    def _runs(
        self, size: int, runs: int, sets: int, rank: int | None, draw: int
    ) -> list[tuple[int, ...]]:
        if runs == 1:
            return [choose_subset(self.pool, size, rank, self.key, size, draw)]
        if sets > MAX_RANKS:
            return [
                choose_subset(self.pool, size, None, self.key, size, draw, n) for n in range(runs)
            ]
        places = choose_subset(range(sets), runs, rank, self.key, size, draw)
        return [unrank_subset(self.pool, size, place) for place in places]


class TokenOptions(Record):
    """All tokens that could replace those of one cell, row by row."""

    rows: Sequence[RowOptions]

    @property
    def key(self) -> int:
        return stable_hash(*(row.key for row in self.rows))

    @property
    def count(self) -> int:
        return prod(row.count for row in self.rows)

    def pick(self, rank: int | None, draw: int) -> tuple[Hits, ...]:
        hits: list[Hits] = []
        for row in self.rows:
            here = None
            if rank is not None:
                rank, here = divmod(rank, row.count)
            hits.append(row.pick(here, draw))
        return tuple(hits)


class NumberedDraws(Record):
    """Draws of one cell that are made, by number."""

    count: int
    key: int

    def pick(self, rank: int | None, draw: int) -> int:
        return random_rank(self.count, self.key, draw) if rank is None else rank


DrawOptions: TypeAlias = SiteOptions | TokenOptions | NumberedDraws


def combine_draws(
    counts: Mapping[tuple[int, ...], int],
    axes: Sequence[str],
    over: str | None,
    draws: int,
    seed: int,
) -> dict[tuple[int, ...], list[int]]:
    """Return which draws each cell has, so that no two draws of all cells of a curve are equal.

    A cell with fewer than `draws` draws repeats them. There are fewer than `draws` curves only if
    there are no others, and none if a cell has no draws.

    Args:
        counts: Cell → number of its different draws.
        axes: Names of the axes of a cell.
        over: The axis of curves; without it, or if cells don't differ along it, a cell has its
            different draws.
        draws: Number of draws to make.
    """
    along = axes.index(over) if over in axes else None
    if along is None:
        return {cell: [*range(min(count, draws))] for cell, count in counts.items()}
    curves: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for cell in counts:
        curves.setdefault((*cell[:along], *cell[along + 1 :]), []).append(cell)
    combined: dict[tuple[int, ...], list[int]] = {}
    for cells in curves.values():
        few = [cell for cell in cells if counts[cell] < draws]
        parts = [NumberedDraws(counts[cell], stable_hash(seed, "curve", *cell)) for cell in few]
        picks = draw_distinct(parts, draws=draws) if few else [[]]
        number = len(picks) if len(few) == len(cells) else min(len(picks), 1) * draws
        for cell in cells:
            combined[cell] = [*range(number)]
        for place, cell in enumerate(few):
            combined[cell] = [picks[draw % len(picks)][place] for draw in range(number)]
    return combined


def draw_distinct(parts: Sequence[DrawOptions], *, draws: int) -> list[list[Any]]:
    """Draw options for all components, with no two draws equal.

    Draws are uniform and without replacement, so they are exchangeable. There are fewer than
    `draws` if there aren't enough different ones.
    """
    total = prod(part.count for part in parts)
    keys = [part.key for part in parts]
    key = keys[0] if len(keys) == 1 else stable_hash(*keys)
    found: list[list[Any]] = []
    if total <= MAX_RANKS:
        order = Permutation(total, key) if total else ()
        for draw in range(min(draws, total)):
            rank = order[draw]
            picks: list[Any] = []
            for part in parts:
                rank, here = divmod(rank, part.count)
                picks.append(part.pick(here, draw))
            found.append(picks)
        return found
    seen: set[str] = set()
    draw = 0
    while len(found) < draws:
        few = (part.count if part.count <= MAX_RANKS else None for part in parts)
        picks = [
            part.pick(None if count is None else random_rank(count, key, n, draw), draw)
            for n, (part, count) in enumerate(zip(parts, few, strict=True))
        ]
        draw += 1
        if repr(picks) not in seen:
            seen.add(repr(picks))
            found.append(picks)
    return found


def merge_targets(parts: Iterable[CellTargets]) -> dict[ExchangeGroup, tuple[int, ...]]:
    """Merge the targets of several cells or rules, in ascending order."""
    units: dict[ExchangeGroup, set[int]] = {}
    for part in parts:
        for slot, targets in part.items():
            units.setdefault(slot, set()).update(targets)
    return {slot: tuple(sorted(targets)) for slot, targets in units.items()}


def _exclude(everything: Sequence[int], without: Sequence[int]) -> tuple[int, ...]:
    out = set(without)
    return tuple(each for each in everything if each not in out)


def draw_coordinates(
    named: Sequence[int], choices: Sequence[int], *, draws: int, seed: int
) -> tuple[list[tuple[int, ...]], str]:
    """Draw sets with others of these coordinates.

    Coordinates that can't be chosen stay as they are. There are fewer than `draws` if there aren't
    enough different sets.

    Args:
        named: The coordinates to replace.
        choices: The coordinates to draw from.
        draws: Number of sets.
        seed: Seed of the draws.

    Returns:
        The sets, and a description of the excluded coordinates.
    """
    every = set(choices)
    numbers = tuple(sorted(every.intersection(named)))
    if not numbers:
        return [], ""
    slot = ExchangeGroup("features", max(every) + 1, None)
    others = {slot: tuple(n for n in range(slot.size) if n not in every)}
    site_options = find_site_options(
        {slot: numbers}, {slot: numbers}, others, (), draws=draws, seed=seed
    )
    if site_options is None:
        return [], ""
    disjoint = set(site_options.pools[0]).isdisjoint(numbers)
    note = "none of the cell's own" if disjoint else "including the cell's own"
    swaps = [picked for (picked,) in draw_distinct([site_options], draws=draws)]
    return [tuple(sorted(swap.get((slot, n), n) for n in named)) for swap in swaps], note


FREQUENCY_RATIO = 2.0
"""Largest ratio of the frequencies of a feature and of one that is drawn for it."""


def draw_features(
    named: Sequence[int], frequencies: Mapping[int, float], draws: int, key: int
) -> list[tuple[int, ...]]:
    """Draw sets of other features, each active about as often as the one that it replaces.

    There are fewer than `draws` if there aren't enough different ones, and none if a feature has
    no alternative.

    Args:
        named: The features.
        frequencies: Feature → share of rows in which it is active.
        draws: Number of sets.
        key: Seed of the draws.
    """
    numbers = set(named)
    others = [
        [
            other
            for other, share in frequencies.items()
            if other not in numbers
            and 0 < frequencies.get(feature, 0) <= FREQUENCY_RATIO * share
            and share <= FREQUENCY_RATIO * frequencies[feature]
        ]
        for feature in named
    ]
    if not all(others):
        return []
    features: dict[tuple[int, ...], None] = {}
    for attempt in range(MAX_ATTEMPTS * draws):
        drawn: list[int] = []
        for place, pool in enumerate(others):
            left = [each for each in pool if each not in drawn]
            if left:
                drawn.append(left[stable_hash(key, attempt, place) % len(left)])
        if len(drawn) == len(named):
            features[tuple(sorted(drawn))] = None
        if len(features) == draws:
            break
    return list(features)


MAX_ATTEMPTS = 20
"""Number of attempts for each draw of features, after which all are taken to be found."""
