"""What the store costs: the same sweeps with an empty store and without one, in turns.

    python -m benchmarks.store [--work W1a W3] [--rounds 3] [--threads 2] [--small]

Per sweep: seconds without a store; those that its own calls take (keys, lookups, writes that
wait for the disk), which is what it costs; the difference of both runs, which on most machines is
smaller than what two equal runs differ by; how many passes were kept and their bytes; and the
seconds of the same sweep read from the store. Tables have to be equal bit for bit. Status 1 where
its calls take more than 2 % and more than 50 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.data import SWEEPS, make, named
from benchmarks.tools.mechdsl import Mechdsl
from benchmarks.work import Work
from mechdsl.execute.cache import PanelCache, RunCache
from mechdsl.execute.run.panel import Execution, PanelRunner, execute
from mechdsl.pipeline.computation import open_value_cache
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.store.runs import OpenRun
from mechdsl.store.store import Store

SHARE, SECONDS = 0.02, 0.05
"""What it may cost."""
CALLS = (
    (PanelRunner, ("_unmeasured", "_look_up", "_due", "_own", "_store_pass")),
    (PanelCache, ("of", "own_unpatched", "measured", "flush")),
    (RunCache, ("settle",)),
    (Store, ("__init__", "begin", "close")),
    (OpenRun, ("finish",)),
)
"""All that a run calls for the store's sake; none of them within another, but for `finish`."""


class Clock:
    """The seconds that are spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for owner, names in CALLS:
            for name in names:
                static = isinstance(vars(owner)[name], classmethod)
                timed = self.timed(getattr(owner, name))
                setattr(owner, name, staticmethod(timed) if static else timed)

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds += perf_counter() - start

        return called


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    dear, clock = False, Clock()
    for name in named(arguments.work):
        if SWEEPS[name].random is None and not arguments.ioi:
            print(f"{name} was skipped: MECHDSL_DATA names no folder with ioi.csv")
            continue
        with tempfile.TemporaryDirectory(prefix="mechdsl-bench-") as folder:
            place = Path(folder) / name
            ioi = Path(arguments.ioi) if arguments.ioi else None
            make(name, place, ioi=ioi, small=arguments.small)
            dear |= _sweep(name, place, arguments.rounds, clock)
    return 1 if dear else 0


def _sweep(name: str, folder: Path, rounds: int, clock: Clock) -> bool:
    """Measure one sweep; whether it costs too much."""
    tool = Mechdsl()
    tool.load(Work.read(folder / "work.json"), folder)
    bare: list[float] = []
    added: list[float] = []
    own: list[float] = []
    read: list[float] = []
    size = passes = 0
    for number in range(rounds):
        where = folder / f"store {number}"
        once, without = _run(tool, None, clock)
        clock.seconds = 0.0
        with_store, kept = _run(tool, where, clock)
        own.append(clock.seconds)
        again, stored = _run(tool, where, clock)
        bare.append(once)
        added.append(with_store - once)
        read.append(again)
        for other in (kept, stored):
            _same(without, other)
        assert stored.profile.passes == 0
        passes = kept.profile.passes
        with Store(where) as store:
            size = store.size()
    cost = median(own)
    dear = cost > SECONDS and cost > SHARE * median(bare)
    print(
        f"{name}: {median(bare):.2f} s without a store; its calls take {cost:.3f} s "
        f"({cost / median(bare):.2%}), with it {', '.join(f'{each:+.3f}' for each in added)} s; "
        f"{passes} passes, {size / 1024:.0f} KiB; read again in {median(read):.3f} s"
        f"{': more than 2 % and 50 ms' if dear else ''}",
        flush=True,
    )
    return dear


def _run(tool: Mechdsl, folder: Path | None, clock: Clock) -> tuple[float, Execution]:
    """Seconds of planning and running, with the store opened and closed."""
    models = {"gpt2": tool.model}
    start = perf_counter()
    plan = make_plan(tool.checked.experiments)
    if folder is None:
        found = execute(plan, models, check=check_denominators)
        return perf_counter() - start, found
    with Store(folder) as store, store.begin("benchmark", {}) as run:
        kept = clock.timed(open_value_cache)(run, tool.checked, models, RunOptions())
        found = execute(plan, models, kept=kept, check=check_denominators)
        run.finish({}, {})
    return perf_counter() - start, found


def _same(one: Execution, other: Execution) -> None:
    for key, measured in one.measured.items():
        for a, b in zip(measured.patched, other.measured[key].patched, strict=True):
            assert a.tobytes() == b.tobytes(), "the tables differ"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = [name for name, sweep in SWEEPS.items() if sweep.default]
    parser.add_argument("--work", nargs="+", default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--small", action="store_true", help="few rows, to see that it runs")
    data = os.environ.get("MECHDSL_DATA")
    csv = None if data is None else Path(data) / "ioi.csv"
    parser.set_defaults(ioi=str(csv) if csv is not None and csv.is_file() else None)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
