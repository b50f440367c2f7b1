"""Estimated and real seconds of running files, and the constants of the estimate.

    python -m benchmarks.estimates [FILES] [--repeats 3] [--threads 1] [--fit]

Each file is run in a process without the store. The estimate is made right before each run, so that
other work on the machine slows both. `--fit` prints the constants of `mechdsl/show/plan.py` that
fit the files best.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.show.plan import (
    EFFICIENCY,
    REFERENCE_PACE,
    WorkAmounts,
    count_work,
    estimate_time,
    measure_host_pace,
    measure_matmul_rate,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = (
    "lens",
    "induction",
    "ioi",
    "names",
    "refusal",
    "steering",
    "counting",
    "countscope",
    "mediators",
    "function_vectors",
    "system2",
    "probes_against_patching",
)
REPEATS = """mech 1

model tiny = zoo("induction")

prompts repeats {
  word in words(tiny)
  half = list(word, 6, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  corrupt scrambled { half = list(word, 6, sep: " ", distinct: true) }
}
"""
OWN = {
    "rows": """
experiment heads {
  model tiny
  prompts repeats limit 5000
  from scrambled into clean
  patch layer 1 head 1 at last token
  measure logit(answer) - logit(answer of scrambled) as delta
}
""",
    "cells": """
experiment cells {
  model tiny
  prompts repeats limit 200
  for c in 1..500 { scale resid_post layers * at last token by c }
  measure logit(answer) as raw
}
""",
}


@dataclass(frozen=True)
class Measured:
    """One file, once."""

    file: str
    amounts: WorkAmounts
    multiply_adds: float
    rate: float
    pace: float
    wall: float
    """Seconds of the whole command."""
    processor: float
    """Processor seconds of the same."""

    @property
    def estimated(self) -> float:
        return estimate_time(self.amounts, self.multiply_adds, self.rate, self.pace).total


def planned(path: Path) -> dict[str, Any]:
    """What `plan` estimates from, as JSON."""
    source = Source(path.read_text(encoding="utf-8"), path.resolve())
    plan = make_plan(check_source(source).experiments)
    cost = plan_cost(plan)
    found = asdict(count_work(plan, cost.planned, cost.blocks))
    return {
        "amounts": found,
        "multiply_adds": cost.planned.multiply_adds,
        "rate": measure_matmul_rate(),
        "pace": measure_host_pace(),
    }


def measure(path: Path, threads: int) -> Measured:
    """Estimate, then run."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    command = [sys.executable, "-m", "benchmarks.estimates", "--plan", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed
    command = [sys.executable, "-m", "mechdsl", "run", "--no-store", str(path)]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), os.times().elapsed - start
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    own = WorkAmounts(**found.pop("amounts"))
    return Measured(path.stem, own, **found, wall=wall, processor=processor)


def fit(found: Sequence[Measured]) -> WorkAmounts:
    """The constants, none below 0, with the least relative error."""
    from scipy.optimize import lsq_linear

    names = [each.name for each in fields(WorkAmounts)]
    table = np.array([[getattr(each.amounts, name) for name in names] for each in found])
    table *= np.array([each.pace / REFERENCE_PACE for each in found])[:, None]
    left = np.array(
        [each.processor - each.multiply_adds / (each.rate * EFFICIENCY) for each in found]
    )
    seconds = np.array([each.processor for each in found])[:, None]
    scale = np.maximum(table.max(axis=0), 1e-9)
    solved = lsq_linear(table / scale / seconds, left / seconds[:, 0], bounds=(0, np.inf)).x
    return WorkAmounts(*(solved / scale).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.plan:
        print(json.dumps(planned(said.plan)))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = list(said.files) or [EXAMPLES / f"{name}.mech" for name in NAMES]
        for name, text in {} if said.files else OWN.items():
            files.append(Path(folder) / f"{name}.mech")
            files[-1].write_text(REPEATS + text, encoding="utf-8")
        print("| file | estimated (s) | processor (s) | wall (s) | processor / estimated |")
        print("|---|---:|---:|---:|---:|")
        every: list[Measured] = []
        for path in files:
            own = [measure(path, said.threads) for _ in range(said.repeats)]
            every += own
            columns = (
                median(each.estimated for each in own),
                median(each.processor for each in own),
                median(each.wall for each in own),
                median(each.processor / each.estimated for each in own),
            )
            shown = " | ".join(f"{each:.3g}" for each in columns)
            print(f"| {path.stem} | {shown} |", flush=True)
    if said.fit:
        print(f"SECONDS = {fit(every)}")


if __name__ == "__main__":
    main()
