"""What is kept comes back: to the run that wrote it, and to those after it."""

from __future__ import annotations

from pathlib import Path

from mechdsl.store.store import Store
from tests.store.support import block, cells, values_of


def test_values_come_back_to_the_run_and_to_later_ones(tmp_path: Path) -> None:
    one, two, other = cells(3)
    with Store(tmp_path / "store") as store:
        with store.begin("key", {}) as run:
            run.keep(block({one: {1: 0.5, 2: 1.5}, two: {1: 2.5}}))
            assert values_of(run.own([one, two, other])) == {
                one: {1: (0.5,), 2: (1.5,)},
                two: {1: (2.5,)},
            }
            assert not run.earlier([one, two])
        with store.begin("other key", {}) as run:
            assert values_of(run.earlier([other, two])) == {two: {1: (2.5,)}}
            assert not run.own([one, two])
