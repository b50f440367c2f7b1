"""The batched executor against the plain one, on a head sweep of the zoo model.

Both run the same plan on the same rows, in turns, in one process; the plain one is the same code
with the passes off (a whole forward pass per cell). Prints the ratio of their times, pair by pair,
and the largest difference between their tables. `make bench` runs it; it isn't a test.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from mechdsl.check import check_source
from mechdsl.execute import execute
from mechdsl.load import load
from mechdsl.plan import PLAN_PASSES, make_plan
from mechdsl.source import Source

SWEEP = """
mech 1

model toy = zoo("counting")

prompts parts {{
  a in 3..9
  b in 2..8
  item in ["apple", "pear", "plum", "fig", "kiwi"]
  part1 = list(item, a, sep: " ")
  part2 = list(item, b, sep: " ")
  template "Part 1: {{part1}} Part 2: {{part2}} Count 1:"
  answer " {{a}}"
  corrupt fewer {{ a = a - 1 }}
}}

experiment heads {{
  prompts parts limit {rows}
  from clean into fewer
  patch layer * head * at last token
  measure logit(answer) - logit(answer of fewer) as recovery
}}
"""


def main() -> None:
    """Print one line per pair of runs and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    print(f"{'prompts':>8} {'plain s':>9} {'batched s':>10} {'ratio':>7}   largest difference")
    for rows in arguments.rows:
        ratios: list[float] = []
        checked = check_source(Source(SWEEP.format(rows=rows)))
        model, _ = load(checked.program.models["toy"])
        assert model is not None
        plans = {
            "plain": make_plan(checked.experiments, without=frozenset(PLAN_PASSES)),
            "batched": make_plan(checked.experiments),
        }
        for plan in plans.values():  # warm-up
            execute(plan, {"toy": model})
        for _ in range(arguments.repeats):
            times: dict[str, float] = {}
            tables: dict[str, np.ndarray] = {}
            for name, plan in plans.items():
                start = time.perf_counter()
                done = execute(plan, {"toy": model})
                times[name] = time.perf_counter() - start
                tables[name] = done.measured["heads"].patched[0]
            difference = float(np.abs(tables["plain"] - tables["batched"]).max())
            ratios.append(times["plain"] / times["batched"])
            print(
                f"{rows:>8} {times['plain']:>9.3f} {times['batched']:>10.3f} "
                f"{ratios[-1]:>6.1f}×   {difference:.1e}"
            )
        print(f"{rows:>8} median ratio {statistics.median(ratios):.1f}×")


if __name__ == "__main__":
    main()
