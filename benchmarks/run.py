"""The benchmark: the same sweeps on mechdsl, a plain hook loop and other libraries, in turns.

    .venv/bin/python benchmarks/run.py --tools plain mechdsl --work W1 W2 --repeats 3

needs nothing beyond the project's own environment; `make bench` makes those of the other libraries
and runs everything. Tables that differ by more than 1e-4 end it with status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.clients import python
from benchmarks.data import NO_IOI, SWEEPS, ioi_file, make, named
from benchmarks.measure import CLOSE, REFERENCE, Measured, Schedule, measure
from benchmarks.report import conditions, markdown, rewrite, show
from benchmarks.tools.names import TOOLS

README = Path(__file__).parent / "README.md"


def main() -> int:
    """Run what the command line asks for; the exit status says whether all tables agree."""
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    status = Console(stderr=True)
    tools = _tools(arguments.tools, status)
    schedule = Schedule(
        repeats=arguments.repeats,
        peer_repeats=min(arguments.peer_repeats, arguments.repeats),
        cells=arguments.cells,
        longest=float("inf") if arguments.full else arguments.longest,
        sample=arguments.sample,
        threads=arguments.threads,
    )
    ioi = ioi_file()
    everything: list[Measured] = []
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mechdsl-bench-") as folder:
        for name in named(arguments.work):
            if SWEEPS[name].random is None and ioi is None:
                skipped.append(f"{name} was skipped: {NO_IOI}")
                console.print(skipped[-1], highlight=False)
                continue
            place = Path(folder) / name
            work = make(name, place, ioi=ioi, small=arguments.small)
            with status.status("") as line:
                say = line.update if status.is_terminal else status.print
                measured = measure(work, place, tools, schedule, say)
            show(measured, console)
            everything.append(measured)
    if not everything:
        return 0
    console.print(conditions(everything, schedule.threads), highlight=False)
    agree = all(measured.agrees for measured in everything)
    verdict = "agree" if agree else "DO NOT all agree"
    console.print(f"The tables {verdict} with those of `{REFERENCE}` within {CLOSE:g}.")
    if arguments.write:
        rewrite(README, markdown(everything, schedule.threads, skipped))
    return 0 if agree else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument(
        "--work",
        nargs="+",
        default=[name for name, sweep in SWEEPS.items() if sweep.default],
        help="W1 is W1a and W1b",
    )
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--peer-repeats", type=int, default=1, help="rounds with other libraries")
    parser.add_argument("--cells", type=int, help="loops run an even sample of about so many cells")
    parser.add_argument("--full", action="store_true", help="loops run all cells")
    parser.add_argument(
        "--longest",
        type=float,
        default=180.0,
        help="seconds; loops that would take longer run a sample",
    )
    parser.add_argument("--sample", type=int, default=192, help="cells of that sample")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--small", action="store_true", help="tiny models: a test of the benchmark")
    parser.add_argument("--write", action="store_true", help="put the results into the README")
    return parser.parse_args()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks and shows defaults."""


def _tools(names: list[str], status: Console) -> list[str]:
    """Those whose environment is there; the plain loop first, as all are held against it."""
    found = [name for name in TOOLS if name in {*names, REFERENCE}]
    missing = [name for name in found if not python(name).exists()]
    if missing:
        status.print(f"without {', '.join(missing)}: `make bench` makes their environment")
    return [name for name in found if name not in missing]


if __name__ == "__main__":
    sys.exit(main())
