"""Time and memory of the command as rows, cells, tokens and reply tokens grow.

    python -m benchmarks.growth [--only rows cells tokens reply] [--largest 200000] [--threads 1]

Each size is one `mechdsl run --no-store` in a process, `plan` too for rows; for tokens it is one
patched prompt as in `benchmarks/long_prompts.py`. The exponent in the last column is that of the
processor time above a run of the smallest size: 1 is linear.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, nan
from pathlib import Path

from benchmarks.estimates import REPEATS

REPOSITORY = Path(__file__).parents[1]
ROWS = """
experiment heads {
  model tiny
  prompts repeats limit SIZE
  from scrambled into clean
  patch layer 1 head 1 at last token
  ablate layer 0 head 0 at last token with mean
  measure logit(answer) - logit(answer of scrambled) as delta
}

experiment norms {
  model tiny
  prompts repeats limit SIZE
  observe norm resid_post layers * at last token
}
"""
FROM_FILE = """mech 1

model tiny = zoo("induction")

prompts repeats {
  rows "rows.csv"
  template "{w1} {w2} {w3} {w1} {w2} {w3} {w1}"
  answer " {w2}"
  corrupt scrambled { w2 = w3 }
}
"""
CELLS = """
experiment cells {
  model tiny
  prompts repeats limit 4
  for c in 1..SIZE { scale resid_post layer 1 at last token by c }
  measure logit(answer) as raw
  report table top 10
}
"""
REPLY = """mech 1

model tiny = local("model")

prompts words {
  thing in ["w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8"]
  template "w9 {thing}"
}

experiment writes {
  model tiny
  prompts words
  generate SIZE
  scale resid_post layer 1 at tokens * by 0.9
  measure contains("w10") as raw
}
"""
SIZES = {
    "rows": (10_000, 30_000, 100_000, 200_000),
    "rows from a file": (10_000, 30_000, 100_000, 200_000),
    "cells": (100, 1_000, 10_000, 100_000),
    "tokens": (1_024, 2_048, 4_096, 8_192),
    "reply": (64, 128, 256, 512),
}


@dataclass(frozen=True)
class Used:
    """What one process took."""

    what: str
    size: int
    wall: float
    processor: float
    """Seconds."""
    peak: float
    """MB that were resident at most."""


def run(what: str, size: int, command: Sequence[str], threads: int) -> Used:
    """One process. Raises RuntimeError where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"`{' '.join(command)}` exits with {process.returncode}")
    took = time.perf_counter() - start
    return Used(what, size, took, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)


def measured(kind: str, size: int, folder: Path, threads: int) -> Iterator[Used]:
    """All processes of one size."""
    if kind == "tokens":
        command = ["benchmarks.long_prompts", "--child", "--tokens", str(size)]
        yield run(kind, size, [*command, "--threads", str(threads)], threads)
        return
    texts = {
        "rows": REPEATS + ROWS,
        "rows from a file": FROM_FILE + ROWS,
        "cells": REPEATS + CELLS,
        "reply": REPLY,
    }
    path = folder / f"{size}.mech"
    path.write_text(texts[kind].replace("SIZE", str(size)), encoding="utf-8")
    if kind == "rows from a file":
        write_rows(folder / "rows.csv", size)
    if kind == "reply":
        write_model(folder / "model")
    if kind.startswith("rows"):
        yield run(f"{kind}: plan", size, ["mechdsl", "plan", str(path)], threads)
    yield run(f"{kind}: run", size, ["mechdsl", "run", "--no-store", str(path)], threads)


def write_rows(path: Path, size: int) -> None:
    """Different triples of the model's words."""
    from zoo.induction.data import WORDS

    count, lines = len(WORDS), ["w1,w2,w3"]
    number = 0
    while len(lines) <= size:
        triple = number % count, number // count % count, number // count**2 % count
        if len(set(triple)) == len(triple):
            lines.append(",".join(WORDS[each] for each in triple))
        number += 1
    path.write_text("\n".join(lines), encoding="utf-8")


def write_model(folder: Path) -> None:
    """A random Llama without an end token, so that replies have all their tokens."""
    from benchmarks.data import words
    from benchmarks.long_prompts import VOCABULARY, build

    build(4, "sdpa").save_pretrained(folder)
    words(VOCABULARY).save(str(folder / "tokenizer.json"))


def exponent(first: Used, before: Used, last: Used) -> float:
    """Of growth from `before` to `last`, above what the smallest size takes."""
    own, more = before.processor - first.processor, last.processor - first.processor
    if own <= 0 or more <= 0:
        return nan
    return log(more / own) / log((last.size - first.size) / (before.size - first.size))


def main() -> None:
    """Print a table, one line for each process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--largest", type=int, default=max(map(max, SIZES.values())))
    parser.add_argument("--threads", type=int, default=1)
    said = parser.parse_args()
    print("| what | size | wall (s) | processor (s) | peak (MB) | exponent |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in said.only:
            found: dict[str, list[Used]] = {}
            for size in SIZES[kind]:
                if size > said.largest:
                    continue
                for used in measured(kind, size, Path(folder), said.threads):
                    own = found.setdefault(used.what, [])
                    own.append(used)
                    grown = f"{exponent(own[0], own[-2], own[-1]):.2f}" if len(own) > 2 else ""
                    print(
                        f"| {used.what} | {size:,} | {used.wall:.1f} | {used.processor:.1f} "
                        f"| {used.peak:,.0f} | {grown} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
