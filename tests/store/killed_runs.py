"""Killed runs that resume: `python -m tests.store.killed_runs [--count 200] [--seed 0]`.

A run on a zoo model is killed with kill -9 at each step of the store (a write, a sync, a rename,
the begin and the commit of a transaction), and at random moments. The same command then resumes.
Its output equals that of an undisturbed run, and each kill repeats at most one forward pass.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mechdsl.base.records import REGISTRIES

TEXT = """mech 1
model toy = zoo("counting")
prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}
experiment heads {
  model toy
  prompts fruit limit 12
  from clean into fewer
  patch layer * head * at last-item token, last token
  measure logit(answer) - logit(answer of fewer) as recovery
  stats bootstrap(100)
}
experiment means {
  model toy
  prompts fruit limit 12
  keep correct
  ablate mlp_out layer * at last token with mean
  measure prob(answer) as delta
  stats bootstrap(100)
}
experiment onward {
  model toy
  prompts fruit limit 12
  from clean into fewer
  patch top 3 of heads at last token
  measure logit(answer) as delta
  stats bootstrap(100)
}
"""
SIZES = ("--pass-tokens", "48", "--prompt-tokens", "128")
"""Small enough for many passes, and for two batches of prompts."""


@dataclass
class Steps:
    """Steps of the store on the disk in this process."""

    log: int
    """File descriptor of a log with a line per step and per forward pass."""
    kill_at: int | None = None
    """The number of the step at which the process is killed."""
    count: int = 0

    def step(self, name: str) -> None:
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.tell(f"step {name}")
        self.count += 1

    def tell(self, what: str) -> None:
        os.write(self.log, f"{time.monotonic():.4f} {what}\n".encode())

    def around(self, owner: Any, name: str) -> None:
        """Add a step before and after each call of a function."""
        whole = getattr(owner, name)

        def called(*args: Any, **named: Any) -> Any:
            self.step(f"before {name}")
            found = whole(*args, **named)
            self.step(f"after {name}")
            return found

        setattr(owner, name, called)

    def watch(self) -> None:
        """Count every step of the store, and log every forward pass."""
        from mechdsl.execute.patching.rows import Patcher
        from mechdsl.store import files
        from mechdsl.store.runs import OpenRun

        for owner, name in (
            (files, "write_synced"),
            (files, "sync_folder"),
            (files, "sync"),
            (files.Blobs, "place"),
            (OpenRun, "keep"),
            (OpenRun, "settle"),
            (OpenRun, "finish"),
        ):
            self.around(owner, name)
        steps, writing = self, files.Index.writing

        class Watched:
            """A transaction with steps at its begin, and before and after its commit."""

            def __init__(self, own: Any) -> None:
                self.inner = writing(own)

            def __enter__(self) -> Any:
                steps.step("before begin")
                found = self.inner.__enter__()
                steps.step("after begin")
                return found

            def __exit__(self, *error: Any) -> Any:
                steps.step("before commit")
                found = self.inner.__exit__(*error)
                steps.step("after commit")
                return found

        patch.object(files.Index, "writing", lambda index: Watched(index)).start()
        values = Patcher.values

        def passed(*args: Any, **named: Any) -> Any:
            steps.tell("pass")
            return values(*args, **named)

        patch.object(Patcher, "values", passed).start()


@dataclass
class Attempt:
    """A process that ran the command, completely or until it was killed."""

    killed: bool
    status: int
    out: str
    err: str
    times: list[float] = field(default_factory=list[float])
    """Time of each step."""
    steps: list[str] = field(default_factory=list[str])
    passes: int = 0
    """Number of forward passes begun."""


def attempt(
    folder: Path,
    *,
    kill_at: int | None = None,
    kill_after: float | None = None,
    limits: Callable[[], None] | None = None,
) -> Attempt:
    """Run the command in a separate process, which is killed at a step, or some seconds after it
    first stores values. limits: called in the process before the run."""
    begun = Begun(folder, kill_at=kill_at, limits=limits)
    if kill_after is not None:
        begun.kill(kill_after)
    return begun.ended()


class Begun:
    """The command in a separate process."""

    def __init__(
        self,
        folder: Path,
        name: str = "",
        *,
        kill_at: int | None = None,
        limits: Callable[[], None] | None = None,
    ) -> None:
        """name: prefix of its output files, to run several."""
        names = ("out.txt", "err.txt", "log.txt")
        self.out, self.err, self.log = (folder / f"{name}{each}" for each in names)
        for path in (self.out, self.err, self.log):
            path.write_text("")
        self.child = os.fork()
        if not self.child:
            _child(folder, self.out, self.err, self.log, kill_at, limits)

    def kill(self, after: float) -> None:
        """Kill it some seconds after it first stores values."""
        until = time.monotonic() + 120
        while b"before keep" not in self.log.read_bytes():
            assert time.monotonic() < until, "nothing was kept"
            time.sleep(0.001)
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)

    def ended(self) -> Attempt:
        """Wait for its end."""
        _, status = os.waitpid(self.child, 0)
        told = [line.partition(" ")[::2] for line in self.log.read_text().splitlines()]
        steps = [(float(when), what) for when, what in told if what.startswith("step ")]
        return Attempt(
            os.WIFSIGNALED(status),
            os.waitstatus_to_exitcode(status),
            self.out.read_text("utf-8"),
            self.err.read_text("utf-8"),
            [when for when, _ in steps],
            [what.removeprefix("step ") for _, what in steps],
            sum(what == "pass" for _, what in told),
        )


def _child(
    folder: Path, out: Path, err: Path, log: Path, kill_at: int | None,
    limits: Callable[[], None] | None,
) -> None:  # fmt: skip
    """Run the command in the child process; never return."""
    status = 70
    try:
        for path, number in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY), number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8") for n in (1, 2))
        os.chdir(folder)
        os.environ.pop("MECHDSL_STORE", None)
        for registry in REGISTRIES:  # modules that other tests of this process have registered
            registry.external_modules.clear()
        Steps(os.open(log, os.O_WRONLY | os.O_APPEND), kill_at).watch()
        if limits is not None:
            limits()
        from mechdsl.cli.entry import main

        sys.argv = ["mechdsl", "run", "file.mech", "--device", "cpu", *SIZES]
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass
class Harness:
    """A file, its undisturbed run, and its killed runs."""

    folder: Path
    whole: Attempt = field(init=False)

    def __post_init__(self) -> None:
        warm()
        self.whole = self.fresh("whole", lambda place: attempt(place))
        assert not self.whole.killed, self.whole.err
        assert self.whole.status == 0, self.whole.err
        assert self.whole.passes > 10
        assert "survives" in self.whole.out

    def fresh(self, name: str, then: Callable[[Path], Any]) -> Any:
        """Call a function with a folder that has the file and no store."""
        place = self.folder / name
        place.mkdir()
        try:
            (place / "file.mech").write_text(TEXT, encoding="utf-8")
            return then(place)
        finally:
            shutil.rmtree(place)

    @property
    def first_write(self) -> int:
        """The step at which the first values are stored."""
        return self.whole.steps.index("before keep")

    @property
    def last_write(self) -> int:
        return len(self.whole.steps) - 1 - self.whole.steps[::-1].index("after commit")

    def killed(self, number: int, ends: list[dict[str, Any]]) -> list[Attempt]:
        """Return the attempts of a run that is killed at `ends`; the last attempt completes."""

        def run(place: Path) -> list[Attempt]:
            tries = [attempt(place, **end) for end in ends]
            return [*tries, attempt(place)]

        tries: list[Attempt] = self.fresh(str(number), run)
        last = tries[-1]
        assert last.status == 0, last.err
        assert last.out == self.whole.out, "another table"
        begun = sum(each.passes for each in tries)
        kills = sum(each.killed for each in tries)
        assert begun <= self.whole.passes + kills, (
            f"{begun} passes in {len(tries)} attempts; a whole run has {self.whole.passes}"
        )
        return tries


def warm() -> None:
    """Import the modules of a run once for all forked processes."""
    import torch

    import mechdsl

    torch.set_num_threads(1)
    mechdsl.run(TEXT, write_reports=False)


def ends_of(harness: Harness, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Return how runs are killed: two in three at a step of each type in turn, others at random."""
    drawn = random.Random(seed)
    times = harness.whole.times
    seconds = times[harness.last_write] - times[harness.first_write]
    by_name: dict[str, list[int]] = {}
    for number, name in enumerate(harness.whole.steps):
        if harness.first_write <= number <= harness.last_write:
            by_name.setdefault(name, []).append(number)
    names = sorted(by_name)
    found: list[list[dict[str, Any]]] = []
    for number in range(count):
        if number % 3 == 2:
            found.append([{"kill_after": drawn.uniform(0.0, seconds)}])
            continue
        name = names[(number - number // 3) % len(names)]
        end: dict[str, Any] = {"kill_at": drawn.choice(by_name[name])}
        found.append([end, {"kill_at": drawn.randrange(40)}] if number % 9 == 4 else [end])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    between = again = killed = 0
    hit: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        print(f"a whole run: {harness.whole.passes} passes, {len(harness.whole.steps)} steps")
        for number, ends in enumerate(ends_of(harness, given.count, given.seed)):
            tries = harness.killed(number, ends)
            first = tries[0]
            killed += any(each.killed for each in tries)
            between += first.killed and harness.first_write < len(first.steps) <= harness.last_write
            again = max(again, sum(t.passes for t in tries) - harness.whole.passes)
            for end, each in zip(ends, tries, strict=False):
                if each.killed and "kill_at" in end:
                    hit[harness.whole.steps[end["kill_at"]]] += 1
    print(f"{given.count} of {given.count} gave the undisturbed table; {killed} were killed,")
    print(f"{between} of them between the first and the last write; at most {again} passes again")
    print("killed at: " + ", ".join(f"{name} {count}" for name, count in sorted(hit.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
