"""Drawing other targets in the place of a cell's own: as many, of the same kind, seeded.

Nothing here knows of rules: what is drawn hangs on the seed, on the targets that it stands for and
on those that it is taken from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import TypeAlias

from mechdsl.program import spec
from mechdsl.prompts.prompt_table import Hits
from mechdsl.prompts.seeded_draws import Permutation, stable_hash, subset

MOST_RANKS = 1 << 62
"""Sets that are counted through; of more, two that are drawn are never the same."""


@dataclass(frozen=True)
class Slot:
    """Where targets can take each other's place: the heads of one layer, or all layers."""

    word: spec.Drawn
    size: int
    layer: int | None


Own: TypeAlias = Mapping[Slot, tuple[int, ...]]
"""The targets of one cell, ascending, by where they can be exchanged."""
Picked: TypeAlias = Mapping[tuple[Slot, int], int]
"""Target → the one that was drawn in its place."""


@dataclass(frozen=True)
class MatchedDraws:
    """What takes the place of a cell's targets."""

    picks: list[Picked]
    """One for every draw."""
    different: int
    """How many of the draws differ."""
    without: str
    """Which targets were left out, in words."""


def draw_targets(
    own: Own, everywhere: Own, fitting: Sequence[int], *, draws: int, seed: int
) -> MatchedDraws | None:
    """For every draw, what takes the place of each target of a cell; None without others.

    Where there are fewer others than draws, each is drawn as often as the next, or once more.
    everywhere: the targets of all cells. fitting: the layers that can be drawn.
    """
    slots = sorted(own, key=lambda slot: (slot.word, slot.size, slot.layer or 0))
    everything = {
        slot: tuple(fitting) if slot.word == "layers" else tuple(range(slot.size)) for slot in slots
    }
    tiers = (
        ("none that a rule names", everywhere),
        ("none of the cell's own", own),
        ("the cell's own among them where there are too few others", {}),
    )
    chosen = None
    most = 0
    for note, without in tiers if own else ():
        pools = [_besides(everything[slot], without.get(slot, ())) for slot in slots]
        sizes = [comb(len(p), len(own[slot])) for p, slot in zip(pools, slots, strict=True)]
        # What the cell has itself is no control.
        itself = not without and all(set(own[s]).issubset(everything[s]) for s in slots)
        possible = prod(sizes) - itself
        if possible > most:
            most, chosen = possible, (note, pools, sizes, itself)
        if most >= draws:
            break
    if chosen is None:
        return None
    said, pools, sizes, itself = chosen
    picks = _picks(own, slots, pools, sizes, itself=itself, draws=draws, seed=seed)
    return MatchedDraws(list(picks), min(most, draws), said)


def _picks(
    own: Own,
    slots: Sequence[Slot],
    pools: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
    *,
    itself: bool,
    draws: int,
    seed: int,
) -> Iterator[Picked]:
    parts = [(slot.word, slot.size, slot.layer, own[slot]) for slot in slots]
    key = stable_hash(seed, "control", *parts, *map(len, pools))
    total = prod(sizes)
    order = Permutation(min(total, MOST_RANKS), key)
    draw = given = 0
    while given < draws:
        rank = order[draw % len(order)]
        found: dict[tuple[Slot, int], int] = {}
        same = True
        for slot, pool, size in zip(slots, pools, sizes, strict=True):
            rank, here = divmod(rank, size)
            place = here if total <= MOST_RANKS else None
            targets = subset(pool, len(own[slot]), place, key, slot.layer, draw)
            same = same and targets == own[slot]
            # Which one stands for which is drawn too, as rules may treat them differently.
            several = len(targets) > 1
            places = Permutation(len(targets), key, slot.layer, draw) if several else (0,)
            for n, target in enumerate(own[slot]):
                found[slot, target] = targets[places[n]]
        draw += 1
        if same and itself:
            continue
        given += 1
        yield found


def draw_tokens(
    allowed: tuple[int, ...], hits: Hits, *, row_key: int, draws: int, seed: int
) -> tuple[Sequence[Hits], bool]:
    """For every draw, what stands for the runs of one row, as many tokens (none without
    others); and whether the row's own may be among them."""
    sizes = [len(run) for run in hits]
    taken = {token for run in hits for token in run}
    most = 0
    pool: tuple[int, ...] = ()
    for tokens in (_besides(allowed, sorted(taken)), allowed) if taken else ():
        itself = taken <= set(tokens)
        possible = max(comb(len(tokens), size) for size in sizes) - itself
        if len(tokens) >= max(sizes) and possible > most:
            most, pool = possible, tokens
        if most >= draws:
            break
    if not most:
        return [], False
    key = stable_hash(seed, "control", "positions", row_key, pool)
    options = _token_options(pool, hits, key, draws)
    found: list[Hits] = []
    while len(found) < draws:  # once more, in another order
        again = len(found) // len(options)
        order = Permutation(len(options), key, again) if again else range(len(options))
        found.extend(options[n] for n in order)
    return found, not taken.isdisjoint(pool)


def _token_options(pool: tuple[int, ...], hits: Hits, key: int, draws: int) -> list[Hits]:
    """Different tokens of the pool for the runs of one row, enough for all draws."""
    sizes = [comb(len(pool), len(run)) for run in hits]
    orders = [
        Permutation(min(size, MOST_RANKS), key, run) for size, run in zip(sizes, hits, strict=True)
    ]
    found = [
        tuple(
            subset(
                pool,
                len(run),
                order[draw % len(order)] if size <= MOST_RANKS else None,
                key,
                run,
                draw,
            )
            for run, size, order in zip(hits, sizes, orders, strict=True)
        )
        for draw in range(min(max(sizes), draws + 1))
    ]
    return [each for each in found if each != hits][:draws]


def merged(parts: Iterable[Own]) -> dict[Slot, tuple[int, ...]]:
    """All targets of several, ascending."""
    found: dict[Slot, set[int]] = {}
    for part in parts:
        for slot, targets in part.items():
            found.setdefault(slot, set()).update(targets)
    return {slot: tuple(sorted(targets)) for slot, targets in found.items()}


def _besides(everything: Sequence[int], without: Sequence[int]) -> tuple[int, ...]:
    out = set(without)
    return tuple(each for each in everything if each not in out)
