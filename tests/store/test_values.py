"""Stored values are returned to the run that wrote them, and to later runs."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from safetensors.numpy import load, save

from mechdsl.store.runs import ValueBlock, pack_values, unpack_values
from mechdsl.store.store import Store
from tests.store.support import block, cells, values_of

ONE, TWO, OTHER = cells(3)


def keep(store: Store, *blocks: ValueBlock, fresh: bool = False) -> None:
    """Store these blocks in a separate run."""
    with store.begin("somebody", {}, fresh=fresh) as run:
        for each in blocks:
            run.keep(each)
        run.finish({}, {})


def test_stored_values_are_found_by_the_run_and_by_later_runs(store: Store) -> None:
    with store.begin("key", {}) as run:
        run.keep(block({ONE: {1: 0.5, 2: 1.5}, TWO: {1: 2.5}}))
        assert values_of(run.own([ONE, TWO, OTHER])) == {
            ONE: {1: (0.5,), 2: (1.5,)},
            TWO: {1: (2.5,)},
        }
        assert not run.earlier([ONE, TWO])
    with store.begin("other key", {}) as run:
        assert values_of(run.earlier([OTHER, TWO])) == {TWO: {1: (2.5,)}}
        assert not run.own([ONE, TWO])


def test_values_are_equal_bit_for_bit(store: Store) -> None:
    values = [math.nan, math.inf, -0.0, 5e-324, 1 / 3, -1.7976931348623157e308]
    rows = [0, 1, 2**63, 2**64 - 1, 7, 8]
    keep(store, block({ONE: dict(zip(rows, values, strict=True))}))
    with store.begin("key", {}) as run:
        keys, found = run.earlier([ONE])[ONE]
    assert (keys.dtype, found.dtype, found.shape) == (np.uint64, np.float64, (6, 1))
    order = np.argsort(np.array(rows, np.uint64))
    assert keys.tolist() == sorted(rows)
    assert found.tobytes() == np.array(values)[order].tobytes()


def test_blocks_with_two_columns_are_merged(store: Store) -> None:
    keep(store, block({ONE: {1: (0.5, 3.0), 2: (1.5, 4.0)}}), block({ONE: {3: (2.5, 5.0)}}))
    with store.begin("key", {}) as run:
        found = values_of(run.earlier([ONE]))
    assert found == {ONE: {1: (0.5, 3.0), 2: (1.5, 4.0), 3: (2.5, 5.0)}}


def test_blocks_with_different_column_counts_are_not_merged(store: Store) -> None:
    """The first block of a cell determines its number of columns."""
    keep(store, block({ONE: {1: 0.5}}), block({ONE: {2: (1.5, 2.5, 6)}, TWO: {2: (3.5, 4.5, 7)}}))
    with store.begin("key", {}) as run:
        found = values_of(run.earlier([ONE, TWO]))
    assert found == {ONE: {1: (0.5,)}, TWO: {2: (3.5, 4.5, 7)}}


def test_cell_without_rows_has_no_columns(store: Store) -> None:
    keep(store, block({ONE: {}, TWO: {1: (1.0, 2.0)}}), block({ONE: {1: 3.0}}))
    with store.begin("key", {}) as run:
        found = values_of(run.earlier([ONE, TWO]))
    assert found == {ONE: {1: (3.0,)}, TWO: {1: (1.0, 2.0)}}


def test_rows_of_several_blocks_are_merged(store: Store) -> None:
    keep(store, block({ONE: {4: 4.0, 1: 1.0}, TWO: {9: 9.0}}), block({TWO: {3: 3.0}}))
    keep(store, block({OTHER: {1: 7.0}, ONE: {2: 2.0}}))
    with store.begin("key", {}) as run:
        found = values_of(run.earlier([ONE, TWO, ONE]))
    assert found == {ONE: {1: (1.0,), 2: (2.0,), 4: (4.0,)}, TWO: {3: (3.0,), 9: (9.0,)}}


def test_first_stored_value_of_a_row_is_used(store: Store) -> None:
    keep(store, block({ONE: {1: 1.0}}))
    keep(store, block({ONE: {1: -1.0, 2: 2.0}}), block({ONE: {2: -2.0}}))
    with store.begin("key", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (1.0,), 2: (2.0,)}}


def test_run_reads_its_own_values(store: Store) -> None:
    """Two simultaneous runs that compute the same cell each use their own values."""
    with store.begin("a", {}) as first, store.begin("b", {}) as second:
        second.keep(block({ONE: {1: 2.0}}))
        first.keep(block({ONE: {1: 1.0}}))
        assert values_of(first.own([ONE])) == {ONE: {1: (1.0,)}}
        assert values_of(second.own([ONE])) == {ONE: {1: (2.0,)}}
        assert not first.earlier([ONE])
        assert not second.earlier([ONE])
    with store.begin("c", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (2.0,)}}, "the first that was kept"


def test_resumed_run_finds_the_same_earlier_values(store: Store) -> None:
    keep(store, block({ONE: {1: 1.0}}))
    with store.begin("key", {}) as run:
        run.keep(block({TWO: {1: 2.0}}))
    keep(store, block({OTHER: {1: 3.0}, ONE: {1: -1.0, 2: -2.0}, TWO: {1: -3.0}}), fresh=True)
    with store.begin("key", {}) as run:
        assert run.resumed
        assert values_of(run.earlier([ONE, TWO, OTHER])) == {ONE: {1: (1.0,)}}
        assert values_of(run.own([ONE, TWO, OTHER])) == {TWO: {1: (2.0,)}}


def test_fresh_run_ignores_and_replaces_earlier_values(store: Store) -> None:
    keep(store, block({ONE: {1: 1.0, 2: 2.0}}), block({TWO: {1: 1.0}}))
    with store.begin("key", {}, fresh=True) as run:
        assert not run.earlier([ONE, TWO])
        run.keep(block({ONE: {1: 10.0}}))
        run.keep(block({ONE: {1: 11.0}}))
        assert values_of(run.own([ONE])) == {ONE: {1: (10.0,)}}
    with store.begin("later", {}) as run:
        assert values_of(run.earlier([ONE, TWO])) == {
            ONE: {1: (10.0,), 2: (2.0,)},
            TWO: {1: (1.0,)},
        }
    keep(store, block({ONE: {1: 20.0}}), fresh=True)
    keep(store, block({ONE: {1: 30.0}}))
    with store.begin("last", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (20.0,), 2: (2.0,)}}, "the latest fresh"


def test_resumed_fresh_run_is_fresh(store: Store) -> None:
    keep(store, block({ONE: {1: 1.0}}))
    with store.begin("key", {}, fresh=True) as run:
        run.keep(block({TWO: {1: 2.0}}))
    with store.begin("key", {}) as run:
        assert run.resumed
        assert not run.earlier([ONE])
        run.keep(block({ONE: {1: 10.0}}))
    with store.begin("later", {}) as run:
        assert values_of(run.earlier([ONE])) == {ONE: {1: (10.0,)}}


def test_block_without_cells_is_not_stored(store: Store) -> None:
    with store.begin("key", {}) as run:
        run.keep(ValueBlock([], np.zeros(1, np.int64), np.zeros(0, np.uint64), np.zeros((0, 1))))
        assert run.own([]) == {}
    assert not list((store.folder / "blobs").iterdir())


def test_cells_without_rows_are_not_found(store: Store) -> None:
    keep(store, block({ONE: {}, TWO: {1: 1.0}, OTHER: {}}))
    with store.begin("key", {}) as run:
        assert values_of(run.earlier([ONE, TWO, OTHER])) == {TWO: {1: (1.0,)}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cells": [ONE, ONE]}, "twice"),
        ({"cells": [ONE, b"short"]}, "16 bytes"),
        ({"cells": [ONE]}, "start"),
        ({"starts": np.array([0, 3, 2])}, "grow"),
        ({"starts": np.array([1, 1, 2])}, "grow"),
        ({"starts": np.array([0, 1, 3])}, "grow"),
        ({"rows": np.array([1], np.uint64)}, "row has a key"),
        ({"values": np.zeros(2)}, "columns"),
        ({"values": np.zeros((2, 4))}, "columns"),
        ({"values": np.zeros((2, 0))}, "columns"),
    ],
)
def test_block_of_inconsistent_shape_is_rejected(
    store: Store, change: dict[str, object], said: str
) -> None:
    right = block({ONE: {1: 1.0}, TWO: {1: 2.0}})
    given = {name: getattr(right, name) for name in ("cells", "starts", "rows", "values")}
    with store.begin("key", {}) as run, pytest.raises(ValueError, match=said):
        run.keep(ValueBlock(**{**given, **change}))  # type: ignore[arg-type]


def test_packed_values_are_deterministic() -> None:
    made = block({ONE: {1: 1.0}, TWO: {1: 2.0, 3: 4.0}})
    assert pack_values(made) == pack_values(made)
    again = unpack_values(pack_values(made))
    assert again is not None
    assert pack_values(again) == pack_values(made)
    assert unpack_values(pack_values(made)[:-1]) is None
    assert unpack_values(b"") is None


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.array([0, 5])},
        {"starts": np.array([0.0, 1.0])},
        {"rows": np.array([1], np.int64)},
        {"values": np.array([[1.0]], np.float32)},
        {"cells": np.zeros((1, 15), np.uint8)},
        {"values": None},
    ],
)
def test_invalid_packed_values_are_rejected(change: dict[str, object]) -> None:
    right = load(pack_values(block({ONE: {1: 1.0}})))
    assert unpack_values(save(right)) is not None
    wrong = {name: of for name, of in {**right, **change}.items() if of is not None}
    assert unpack_values(save(wrong)) is None  # type: ignore[arg-type]


def test_storing_and_finding_values_is_fast(store: Store) -> None:
    """The bounds are a few times the usual duration."""
    pool = cells(5_000)
    with store.begin("key", {}) as run:
        times: list[float] = []
        for number in range(250):
            picked = [pool[(number * 20 + place) % 5_000] for place in range(100)]
            made = block({cell: {number: 1.0} for cell in picked})
            began = time.perf_counter()
            run.keep(made)
            times.append(time.perf_counter() - began)
        assert sorted(times)[5] < 0.02
    with store.begin("other", {}) as run:
        began = time.perf_counter()
        found = run.earlier(pool)
        assert time.perf_counter() - began < 2
    assert sum(len(rows) for rows, _ in found.values()) == 25_000
