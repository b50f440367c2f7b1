"""Insert slips into valid files and print a table of those that `mechdsl validate` catches.

    python -m tests.slips --seed 1
    python -m tests.slips --seed 1 --without-models --show
    python -m tests.slips --seed 2 --count 100 --also FOLDER --judge

A slip is a misspelt word, a bracket, quote, comma or line dropped or doubled, two words swapped, a
name of another kind, or a range that is reversed or out of bounds. A mutant without diagnostics may
still be a valid file. `--judge` writes such mutants to `judged.csv`, where a person marks each as
`legal` (excluded from the shares), `shape` or `tokenizer` (counts only with the models), or
`missed`. Without a judgement a mutant counts as missed.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mechdsl.diagnostics.rendering import render_full

from .checked import COLUMNS, JUDGED, Checker, Judgement, Outcome, right_files
from .mutants import drawn
from .table import BOUNDS, Shares, shares_of, table


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=500, help="mutants to draw")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--without-models", action="store_true", help="as where none is found")
    parser.add_argument("--show", action="store_true", help="what fell short, with what was said")
    parser.add_argument("--judge", action="store_true", help=f"add to {JUDGED.name}")
    given = parser.parse_args(arguments)
    files = right_files(given.also)
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(files, Path(folder), models=not given.without_models)
        outcomes = [checker.outcome(each) for each in drawn(files, given.seed, given.count)]
    if given.show:
        for outcome in outcomes:
            show(outcome, with_models=checker.models)
    if given.judge:
        judge(outcomes)
    print(table(outcomes, with_models=checker.models))
    shares = shares_of(outcomes, with_models=checker.models)
    return int(not holds(shares))


def holds(shares: Shares) -> bool:
    return all(found >= bound for found, bound in zip(shares, BOUNDS, strict=True))


def show(outcome: Outcome, *, with_models: bool) -> None:
    mutant = outcome.mutant
    if not outcome.counts(with_models=with_models):
        return
    short = ["missed"] if not outcome.caught else []
    if outcome.caught and outcome.on_line is False:
        short.append("on another line")
    if outcome.caught and mutant.right and not outcome.answered:
        short.append("without the right word")
    if short:
        print(f"--- {mutant.file}:{mutant.line} [{mutant.kind}] {', '.join(short)}")
        print(f"- {mutant.before}\n+ {mutant.after}")
        print(render_full(list(outcome.found)))


def judge(outcomes: Sequence[Outcome]) -> None:
    """Append the mutants without diagnostics and judgement to `judged.csv`."""
    new = not JUDGED.exists()
    with JUDGED.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for outcome in outcomes:
            if not outcome.caught and outcome.judgement is None:
                writer.writerow((*outcome.mutant.key, *vars(Judgement("missed", "")).values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
