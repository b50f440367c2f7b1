"""The power is cut at each point of a run: all that was said to be kept is there, nothing is wrong.

Every real write of a process is recorded, SQLite's as well, and done again up to each point,
without what wasn't synced (all of it, none of it, or any part of it).
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mechdsl.store.index import StoreProblem
from mechdsl.store.store import Store
from tests.store import writer
from tests.store.crash_disk import Disk, Step, laid_out, recorded

BLOCKS = 3

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="records with strace")


@cache
def steps_of(spoil: str) -> tuple[str, list[Step]]:
    """The folder, and what was done to it, by a run that finishes."""
    folder = Path(tempfile.mkdtemp(prefix="mechdsl-power-"))
    try:
        store = folder / "store"
        arguments = ["--blocks", str(BLOCKS), "--finish", "--spoil", spoil]
        return str(store), recorded(store, folder / "log", *arguments)
    finally:
        shutil.rmtree(folder)


def cuts(spoil: str, chances: list[float]) -> Iterator[tuple[list[str], dict[str, bytes | None]]]:
    """What had been said, and what is left, for a power cut behind each step; each state once."""
    folder, steps = steps_of(spoil)
    disk = Disk(folder)
    said: list[str] = []
    draw = random.Random(1)
    seen: set[bytes] = set()
    for step in steps:
        if step[0] == "mark":
            said.append(str(step[1]))
        else:
            disk.do(step)
        for chance in chances:
            left = disk.after_power_cut(chance, draw)
            state = hashlib.sha256(repr((said, sorted(left.items()))).encode()).digest()
            if state not in seen:
                seen.add(state)
                yield list(said), left


def check(said: list[str], folder: Path) -> str:
    """Open what is left: all that was said is there, nothing is wrong, and the run goes on."""
    kept = {int(text.split()[1]) for text in said if text.startswith("kept")}
    with Store(folder) as store:
        assert store.writable
        assert (folder / ".gitignore").read_text(encoding="ascii") == "*\n"
        assert not list(folder.glob("*.broken-*")), "the index was lost"
        done = store.finished(writer.KEY)
        assert done is not None or "finished" not in said
        if done is not None:
            assert store.content(done) == writer.CONTENT
            assert done.about == {"file": "a.mech", "done": True}
            with store.begin("another", {}) as later:
                found = later.earlier(writer.cells_of(BLOCKS))
                assert writer.blocks_in(found, BLOCKS) == set(range(BLOCKS))
            return "finished"
        with store.begin(writer.KEY, {"file": "a.mech"}) as run:
            assert run.resumed or "settled" not in said
            assert run.sizes == writer.SIZES or (run.sizes is None and "settled" not in said)
            assert not run.earlier(writer.cells_of(BLOCKS))
            there = writer.blocks_in(run.own(writer.cells_of(BLOCKS)), BLOCKS)
            assert kept <= there, "what was kept is lost"
            assert len(there - kept) <= 1, "more than the pass in flight"
            for number in set(range(BLOCKS)) - there:
                run.keep(writer.block_of(number))
            whole = writer.blocks_in(run.own(writer.cells_of(BLOCKS)), BLOCKS)
            assert whole == set(range(BLOCKS))
            run.finish(writer.CONTENT, {"done": True})
        done = store.finished(writer.KEY)
        assert done is not None
        assert store.content(done) == writer.CONTENT
    return f"{len(kept)} kept, {len(there)} there"


def outcomes(folder: Path, spoil: str, chances: list[float]) -> Counter[str]:
    """How often each came out."""
    found: Counter[str] = Counter()
    for number, (said, left) in enumerate(cuts(spoil, chances)):
        place = folder / str(number)
        laid_out(left, place)
        found[check(said, place)] += 1
        shutil.rmtree(place)
    return found


def assert_all_seen(found: Counter[str]) -> None:
    """The cuts lie everywhere: before and behind each commit."""
    for kept in range(BLOCKS):
        assert found[f"{kept} kept, {kept} there"] >= 2
        assert found[f"{kept} kept, {kept + 1} there"] >= 1
    assert found[f"{BLOCKS} kept, {BLOCKS} there"] >= 2
    assert found["finished"] >= 2


def test_nothing_is_lost_where_nothing_unsynced_is_left(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.0]))


def test_nothing_is_lost_where_a_part_is_left(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.5]))


@pytest.mark.slow
def test_nothing_is_lost_whatever_is_left(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.0, 1.0, *([0.1, 0.5, 0.9] * 10)]))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["files", "names", "index"])
def test_a_sync_that_is_left_out_shows(memory: Path, spoil: str) -> None:
    """The test above can fail."""
    with pytest.raises((AssertionError, StoreProblem)):
        outcomes(memory, spoil, [0.0, 0.5])
