"""Do intervals, p and verdicts hold what they state? Simulated with the program's own functions.

    python -m benchmarks.coverage [--quick] [--only TEXT …] [--write]

Status 1 where more than one judged figure in ten falls short, or one without a known reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# before numpy is imported, here and in the processes: they share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console

from benchmarks.coverage.report import markdown, rewrite, show, summary
from benchmarks.coverage.setting import judge
from benchmarks.coverage.shortfalls import SHORTFALLS
from benchmarks.coverage.simulate import all_settings, simulate

PAGE = Path(__file__).parents[2] / "docs" / "statistics.md"


def main() -> int:
    given = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    progress = Console(stderr=True)
    settings = all_settings(given.full)
    keys = [key for key in settings if not given.only or any(text in key for text in given.only)]
    if given.write and (given.only or given.quick):
        progress.print("--write needs all settings with all repetitions")
        return 2
    done = 0

    def say(key: str) -> None:
        nonlocal done
        done += 1
        progress.print(f"{done} of {len(keys)}: {key}", highlight=False, markup=False)

    found = simulate(
        keys, given.seed, given.processes, say, everything=given.full, quick=given.quick
    )
    judgement = judge(found, SHORTFALLS)
    sentences = summary(judgement, SHORTFALLS)
    show(found, console)
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)
    if given.write:
        rewrite(PAGE, markdown(found, sentences, given.seed))
    return 0 if judgement.good else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions: a look, no proof")
    parser.add_argument("--full", action="store_true", help="every distribution with many cells")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings with it in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true", help=f"also to docs/{PAGE.name}")
    return parser.parse_args()


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks and shows defaults."""


if __name__ == "__main__":
    sys.exit(main())
