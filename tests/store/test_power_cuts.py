"""After a power cut at any point of a run, all acknowledged values are stored and correct.

Every write of a process, including SQLite's, is recorded and replayed up to each point, without
unsynced writes (all of them, none of them, or a random part).
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

from mechdsl.store.files import StoreProblem
from mechdsl.store.store import Store
from tests.store import writer
from tests.store.crash_disk import Disk, Step, laid_out, recorded

BLOCKS = 3

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="records with strace")


@cache
def steps_of(spoil: str) -> tuple[str, list[Step]]:
    """Return the folder of a run that finishes, and its recorded steps."""
    folder = Path(tempfile.mkdtemp(prefix="mechdsl-power-"))
    try:
        store = folder / "store"
        arguments = ["--blocks", str(BLOCKS), "--finish", "--spoil", spoil]
        return str(store), recorded(store, folder / "log", *arguments)
    finally:
        shutil.rmtree(folder)


def cuts(spoil: str, chances: list[float]) -> Iterator[tuple[list[str], dict[str, bytes | None]]]:
    """Yield the output and the surviving files of a power cut after each step; each state once."""
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
    """Open the surviving store: acknowledged values are correct, and the run resumes."""
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
    """Count the outcomes of power cuts."""
    found: Counter[str] = Counter()
    for number, (said, left) in enumerate(cuts(spoil, chances)):
        place = folder / str(number)
        laid_out(left, place)
        found[check(said, place)] += 1
        shutil.rmtree(place)
    return found


def assert_all_seen(found: Counter[str]) -> None:
    """Assert that cuts happened before and after each commit."""
    for kept in range(BLOCKS):
        assert found[f"{kept} kept, {kept} there"] >= 2
        assert found[f"{kept} kept, {kept + 1} there"] >= 1
    assert found[f"{BLOCKS} kept, {BLOCKS} there"] >= 2
    assert found["finished"] >= 2


def test_power_cut_without_unsynced_writes_loses_no_stored_value(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.0]))


@pytest.mark.slow
def test_power_cut_with_some_unsynced_writes_loses_no_stored_value(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.5]))


@pytest.mark.slow
def test_power_cut_with_any_unsynced_writes_loses_no_stored_value(memory: Path) -> None:
    assert_all_seen(outcomes(memory, "", [0.0, 1.0, *([0.1, 0.5, 0.9] * 10)]))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["files", "names", "index"])
def test_omitted_sync_is_detected(memory: Path, spoil: str) -> None:
    """Guards the tests above: they fail if a sync is omitted."""
    with pytest.raises((AssertionError, StoreProblem)):
        outcomes(memory, spoil, [0.0, 0.5])
