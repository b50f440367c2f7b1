"""Alternatives for a row's tokens: every other choice once, never the row's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product

import pytest

from mechdsl.prompts.runs import Hits
from mechdsl.resolve.matched_draws import RowOptions

Drawn = dict[int, frozenset[tuple[int, ...]]]
"""Length of a group → the sets of tokens of groups with this length, in any order."""

CASES: list[tuple[int, Hits]] = [
    (5, ((2,),)),
    (4, ((0, 1, 2),)),
    (6, ((0, 1), (2, 3))),
    (4, ((0,), (1,))),
    (4, ((0,), (1,), (2,))),
    (5, ((0, 1), (2,))),
    (4, ((0, 1), (1, 2))),
    (4, ((1,), (1,))),
    (3, ((0, 1, 2),)),
]
"""(number of available tokens, the row's own tokens), from many alternatives to none."""


def drawn(hits: Hits) -> Drawn:
    return {size: frozenset(run for run in hits if len(run) == size) for size in map(len, hits)}


def every(pool: list[int], hits: Hits) -> Iterator[Drawn]:
    """Every choice of distinct groups with the same lengths."""
    sizes = sorted({len(run) for run in hits})
    runs = [
        combinations(combinations(pool, size), sum(len(run) == size for run in hits))
        for size in sizes
    ]
    for chosen in product(*runs):
        yield {size: frozenset(own) for size, own in zip(sizes, chosen, strict=True)}


@pytest.mark.parametrize(("size", "hits"), CASES)
def test_row_draws_each_other_choice_once_and_never_its_own(size: int, hits: Hits) -> None:
    options = RowOptions.of(tuple(range(size)), hits, row_key=1, seed=0)
    taken = {token for run in hits for token in run}
    others = list(every([n for n in range(size) if n not in taken], hits))
    expected = others or [each for each in every(list(range(size)), hits) if each != drawn(hits)]
    if not expected:
        assert options.alone
        assert options.pick(None, 0) == hits
        return
    found = [drawn(options.pick(rank, 0)) for rank in range(options.count)]
    assert sorted(map(repr, map(_sorted, found))) == sorted(map(repr, map(_sorted, expected)))
    assert options.among == (not others)
    for draw in range(40):  # without a rank, of a seeded draw
        assert drawn(options.pick(None, draw)) in expected


def _sorted(choice: Drawn) -> list[tuple[int, list[tuple[int, ...]]]]:
    return [(size, sorted(runs)) for size, runs in sorted(choice.items())]
