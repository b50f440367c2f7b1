"""`python -m tests.fuzz --seed N --count N`: run hostile files on the command line and count.

The exit status is 1 if a command crashed or `validate` exceeded its limits.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from .cases import KINDS, case
from .commands import COMMANDS, say, write

SECONDS, MEGABYTES = 2.0, 500
"""Limits of `validate`: processor time and memory of the whole process."""


def memory() -> int:
    """Peak memory of this process in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="files of each kind")
    parser.add_argument("--kind", choices=KINDS, action="append")
    given = parser.parse_args()
    wrong = 0
    print(f"{'kind':<10} {'files':>6} {'refused':>8} {'right':>6} {'slowest':>9} {'broke off':>10}")
    for kind in given.kind or KINDS:
        counts: Counter[str] = Counter()
        slowest, number_of_slowest = 0.0, 0
        for number in range(given.seed * given.count, (given.seed + 1) * given.count):
            with TemporaryDirectory() as folder:
                file = write(case(kind, number), Path(folder))
                for command in COMMANDS:
                    said = say(command, file)
                    if said.broke is not None:
                        counts["broke"] += 1
                        print(f"{command} broke off on {kind} {number}:\n{said.broke}")
                    if command == COMMANDS[0]:
                        counts["refused" if said.refused else "right"] += 1
                        if said.seconds > slowest:
                            slowest, number_of_slowest = said.seconds, number
                        if said.refused or said.long or said.seconds > SECONDS / 2:
                            break
        wrong += counts["broke"] + (slowest > SECONDS)
        print(
            f"{kind:<10} {given.count:>6} {counts['refused']:>8} {counts['right']:>6} "
            f"{slowest:>7.2f} s {counts['broke']:>10}   slowest: {number_of_slowest}",
            flush=True,
        )
    print(f"most memory, all commands together: {memory()} MB")
    return int(wrong > 0 or memory() > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
