"""Killed processes, and concurrent writers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from mechdsl.store.files import StoreProblem
from mechdsl.store.store import Store
from tests.store import writer
from tests.store.support import block, cells, values_of
from tests.store.test_power_cuts import BLOCKS, check

CALLS = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat2", "mkdir", "mkdirat")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-m", "tests.store.writer", str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def killed_at(memory: Path, call: str, number: int) -> str:
    """Kill a writer right before the given occurrence of a system call; return the outcome."""
    folder = memory / f"{call}-{number}"
    inject = f"inject=?{call}:signal=KILL:when={number}"
    process = start(
        folder,
        *("--blocks", str(BLOCKS), "--finish"),
        before=("strace", "-o", "/dev/null", "-e", f"trace=?{call}", "-e", inject),
    )
    said = [text for text in process.communicate()[0].split("\n") if text]
    if process.returncode == 0:
        return "not killed"
    if not said:
        return "before it began"
    found = check(said, folder)
    shutil.rmtree(folder)
    return found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="kills with strace")
def test_writer_killed_around_a_commit_loses_no_stored_value(memory: Path) -> None:
    """The writer is killed at the sync that ends a transaction, and before and after it."""
    found = Counter(killed_at(memory, "fdatasync", number) for number in range(16, 27, 2))
    assert found["0 kept, 1 there"] == 1, "behind the commit, and before it was said"
    assert found["0 kept, 0 there"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="kills with strace")
@pytest.mark.parametrize("call", CALLS)
def test_writer_killed_at_any_system_call_loses_no_stored_value(memory: Path, call: str) -> None:
    found: Counter[str] = Counter()
    number = 0
    while not found["not killed"]:
        number += 1
        found[killed_at(memory, call, number)] += 1
    if call == "fdatasync":
        for kept in range(BLOCKS):
            assert found[f"{kept} kept, {kept} there"] >= 3
            assert found[f"{kept} kept, {kept + 1} there"] >= 1
        assert found["finished"] >= 1


@pytest.mark.parametrize("seed", range(5))
def test_writer_killed_at_a_random_moment_loses_no_stored_value(memory: Path, seed: int) -> None:
    process = start(memory / "store", "--blocks", "100000")
    assert process.stdout is not None
    until = random.Random(seed).randrange(2, 60)
    said = [process.stdout.readline().strip() for _ in range(until)]
    with Store(memory / "store") as store:
        if until > 2:
            assert [run.state for run in store.runs()] == ["running"]
        process.send_signal(signal.SIGKILL)
        said += [text.strip() for text in process.stdout.read().split("\n") if text.strip()]
        process.wait()
        kept = sum(text.startswith("kept") for text in said)
        [run] = store.runs()
        assert run.state == "unfinished", "its lock was freed with it"
        with store.begin(writer.KEY, {}) as again:
            assert again.resumed
            assert again.id == run.id
            there = writer.blocks_in(again.own(writer.cells_of(kept + 5)), kept + 5)
    assert there in (set(range(kept)), set(range(kept + 1)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--key", "same"], ["--key", "same"]),
        (["--key", "one"], ["--key", "another"]),
        (["--key", "one"], ["--key", "another", "--start", "20"]),
    ],
)
def test_two_concurrent_writers_store_all_values(
    memory: Path, first: list[str], second: list[str]
) -> None:
    """Both processes may create the store."""
    both = [start(memory / "store", "--blocks", "20", "--finish", *of) for of in (first, second)]
    for process in both:
        assert process.communicate()[0].split()[-1] == "finished"
        assert process.returncode == 0
    with Store(memory / "store") as store:
        runs = store.runs()
        assert [run.state for run in runs] == ["finished"] * 2
        assert all(store.content(run) == writer.CONTENT for run in runs)
        with store.begin("later", {}) as run:
            blocks = writer.blocks_in(run.earlier(writer.cells_of(40)), 40)
        assert blocks == set(range(40 if "--start" in second else 20))
        swept = store.gc()
        assert (swept.files, swept.runs, swept.blocks) == (0, 0, 0)
        with store.begin("after that", {}) as run:
            assert writer.blocks_in(run.earlier(writer.cells_of(40)), 40) == blocks


def test_gc_during_a_write_removes_no_values_of_the_running_run(memory: Path) -> None:
    """Values of a running run are kept for any limit."""
    process = start(memory / "store", "--blocks", "60", "--finish")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with Store(memory / "store") as store:
        for _ in range(30):
            store.gc(0)
        assert process.stdout.read().split()[-1] == "finished"
        process.wait()
        with store.begin("later", {}) as run:
            found = run.earlier(writer.cells_of(60))
    # The last sweep may remove the finished run, but never a part of it.
    assert writer.blocks_in(found, 60) in (set(range(60)), set())


def test_threads_share_a_store(store: Store) -> None:
    with store.begin("key", {}) as run:

        def keep(thread: int) -> None:
            for number in range(10):
                run.keep(block({cells(1)[0]: {thread * 100 + number: 1.0}}))
                run.own(cells(1))

        threads = [threading.Thread(target=keep, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(values_of(run.own(cells(1)))[cells(1)[0]]) == 40


def test_index_locked_for_too_long_is_a_store_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is a StoreProblem, not SQLite's, and staged files are removed."""
    monkeypatch.setattr("mechdsl.store.files.WRITE_TIMEOUT", 0.05)
    with Store(store.folder) as other, other.begin("key", {}) as run:
        with store._index.writing(), pytest.raises(StoreProblem, match="another process has held"):
            run.keep(block({cells(1)[0]: {1: 1.0}}))
        assert not list((store.folder / "new").iterdir())
        run.keep(block({cells(1)[0]: {1: 1.0}}))
        assert values_of(run.own(cells(1))) == {cells(1)[0]: {1: (1.0,)}}
