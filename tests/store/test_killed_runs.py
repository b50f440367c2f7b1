"""Killed runs resume and print the undisturbed table, as in `python -m tests.store.killed_runs`;
also with a full disk, a read-only store, torn blobs, or two runs at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from .killed_runs import Begun, Harness, attempt, ends_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_resume_with_the_undisturbed_output(harness: Harness, count: int) -> None:
    killed = 0
    for number, ends in enumerate(ends_of(harness, count, seed=1)):
        killed += any(each.killed for each in harness.killed(number, ends))
    assert killed >= 0.7 * count


@pytest.mark.slow
@pytest.mark.parametrize(("most", "status"), [(24_000, 0), (46_000, 3), (50_000, 3)])
def test_run_on_a_full_disk_resumes_with_the_undisturbed_output(
    harness: Harness, most: int, status: int
) -> None:
    """File sizes are limited; the index exceeds the limit at once or during the run."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def run(place: Path) -> None:
        full = attempt(place, limits=limited)
        assert full.status == status, full.err
        after = attempt(place)
        assert (after.status, after.out) == (0, harness.whole.out), after.err
        if status == 0:  # no store was created
            assert full.out == harness.whole.out
            assert "W0782" in full.err
            return
        assert "the same command then resumes" in full.err
        assert 0 < full.passes < harness.whole.passes
        assert full.passes + after.passes <= harness.whole.passes + 1

    harness.fresh("full", run)


def test_run_with_torn_blobs_recomputes_their_values(harness: Harness) -> None:
    """Each blob of a killed run is truncated, altered or removed."""

    def run(place: Path) -> None:
        last = harness.last_write
        attempt(place, kill_at=(harness.first_write + last) // 2)
        blobs = sorted((place / ".mechdsl" / "blobs").rglob("*.safetensors"))
        assert len(blobs) > 3
        for number, path in enumerate(blobs):
            data = path.read_bytes()
            if number % 3 == 0:
                path.write_bytes(data[: len(data) // 2])
            elif number % 3 == 1:
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            else:
                path.unlink()
        after = attempt(place)
        assert (after.status, after.out) == (0, harness.whole.out), after.err
        assert after.passes == harness.whole.passes

    harness.fresh("torn", run)


def test_finished_run_with_torn_results_is_rebuilt_from_stored_values(harness: Harness) -> None:
    def run(place: Path) -> None:
        assert attempt(place).passes == harness.whole.passes
        for path in (place / ".mechdsl" / "blobs").rglob("*.data"):
            path.write_bytes(path.read_bytes()[:-1])
        after = attempt(place)
        assert (after.status, after.out) == (0, harness.whole.out), after.err
        assert after.passes == 0, "its values are all there"

    harness.fresh("results", run)


@pytest.mark.slow
def test_run_with_a_read_only_store_prints_the_undisturbed_output(harness: Harness) -> None:
    def run(place: Path) -> None:
        attempt(place, kill_at=(harness.first_write + harness.last_write) // 2)
        store = place / ".mechdsl"
        for options in ("bind", "remount,bind,ro"):
            mount = ["mount", "-o", options, str(store), str(store)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("no folder can be mounted")
        try:
            read = attempt(place)
        finally:
            subprocess.run(["umount", str(store)], check=True)
        assert (read.status, read.out) == (0, harness.whole.out), read.err
        assert "W0782" in read.err
        after = attempt(place)
        assert (after.status, after.out) == (0, harness.whole.out), after.err
        assert after.passes < harness.whole.passes

    harness.fresh("read", run)


@pytest.mark.slow
def test_two_simultaneous_runs_print_the_undisturbed_output(harness: Harness) -> None:
    """The same command runs twice on one store."""

    def run(place: Path) -> None:
        for each in [Begun(place, name) for name in ("one", "two")]:
            done = each.ended()
            assert (done.status, done.out) == (0, harness.whole.out), done.err
            assert done.passes
        again = attempt(place)
        assert (again.out, again.passes) == (harness.whole.out, 0)

    harness.fresh("two", run)
