from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdsl.base import hashing
from mechdsl.base.hashing import Permutation, stable_hash


@settings(deadline=None)
@given(size=st.integers(1, 700), seed=st.integers())
def test_permutation_has_each_index_once(size: int, seed: int) -> None:
    assert sorted(Permutation(size, seed)) == list(range(size))


def test_permutations_do_not_depend_on_cached_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = [list(Permutation(size, "seed")) for size in (5, 300)]
    monkeypatch.setattr(hashing, "_CACHED_HALF", 0)
    assert [list(Permutation(size, "seed")) for size in (5, 300)] == cached
    assert cached[0] == [2, 0, 3, 4, 1]


def test_permutation_depends_on_the_seed() -> None:
    orders = {tuple(Permutation(50, seed)) for seed in range(200)}
    assert len(orders) == 200


def test_small_permutation_is_uniform() -> None:
    firsts = [Permutation(4, seed)[0] for seed in range(4000)]
    assert all(880 < firsts.count(n) < 1120 for n in range(4))


def test_huge_permutation_computes_only_requested_indices() -> None:
    order = Permutation(10**30, "seed")
    assert len({order[i] for i in range(1000)}) == 1000


def test_stable_hash_equals_pinned_value() -> None:
    assert stable_hash(0, "fruit", 3) == 0x8D99F09FE1441B40D145292AC4B392DE
    assert stable_hash(0, "a") != stable_hash("0", "b")
    assert stable_hash("a", "b") != stable_hash("ab")
