"""Change the package in small ways and check that its tests fail.

    python -m tests.mutation --seed 1 --count 200 --write
    python -m tests.mutation --target 'planner/plan.py' --count 20 --budget 120
    python -m tests.mutation --survivors --budget 600
    python -m tests.mutation --target planner/cost.py --named 'block.key'

One operator, constant, condition, keyword, … at a time is changed, sampled from the modules below
by the seed. Then the tests that cover the changed line run: first those that together cover most
of the module in the least time, as many as fit into `--budget` seconds, until one fails.
`--write` adds the outcomes to `table.csv`, in which a surviving mutant has a reason;
`--survivors` samples none and reruns the survivors of the table.

In the table, `open` marks a survivor for which it is unknown whether it changes a number.

The first run is slow: it records the lines that each test covers, and caches them outside the
repository until the package or the test changes.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from .mutants import Mutant, mutants
from .reach import chosen, reached, test_files
from .server import PACKAGE, Collected, Ran, imported, prepare

TABLE = Path(__file__).parent / "table.csv"
COLUMNS = ("seed", "kind", "mutant", "outcome", "by")
LIMIT = 90
"""Seconds beyond the budget after which a mutant counts as killed, because it hangs."""

PLANNER = (
    "tests/execute/test_inert.py",
    "tests/execute/test_savings.py",
    "tests/execute/test_cost.py",
    "tests/execute/test_coordinates.py",
    "tests/execute/test_sizing.py",
    "tests/compiler/test_plan.py",
)
VALUES = (
    "tests/execute/test_effects.py",
    "tests/execute/test_masked.py",
    "tests/execute/test_noise.py",
    "tests/execute/test_positions.py",
    "tests/execute/test_metrics.py",
    "tests/rules/test_attention.py",
    "tests/rules/test_paths.py",
    "tests/rules/test_random_rules.py",
    "tests/rules/test_transplants.py",
)
FILES = (
    "tests/controls/test_controls.py",
    "tests/elsewhere/test_blocks.py",
    "tests/elsewhere/test_means.py",
    "tests/elsewhere/test_variants.py",
    "tests/onward/test_tokens.py",
)
MODELS = (
    "tests/models/test_packed.py",
    "tests/models/test_exchange.py",
    "tests/models/test_hooks.py",
    "tests/models/test_encoders.py",
    "tests/families/test_walk.py",
)
STATISTICS = (
    "tests/results/test_statistics.py",
    "tests/results/test_rounding.py",
    "tests/results/test_flips.py",
    "tests/results/test_variants.py",
    "tests/results/test_controls.py",
)
NUMBERS = (
    "tests/execute/test_not_finite.py",
    "tests/results/test_rounding.py",
)
CHECKED = (
    "tests/compiler/test_without_model.py",
    "tests/compiler/test_token_alignment.py",
    "tests/elsewhere/test_prompts.py",
    "tests/elsewhere/test_models.py",
    "tests/elsewhere/test_blocks.py",
    "tests/messages/test_messages.py",
)
IMAGES = (
    "tests/images/test_pixels.py",
    "tests/images/test_regions.py",
    "tests/images/test_replace.py",
    "tests/images/test_tiles.py",
)
RESULTS = (
    *STATISTICS,
    "tests/results/test_archive.py",
    "tests/results/test_expectations.py",
    "tests/results/test_reports.py",
    "tests/results/test_distinct_rows.py",
    "tests/results/test_typed_json.py",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "planner/*.py models/restart.py": (*PLANNER, *VALUES, *FILES),
    "forward/packed/*.py": (
        *MODELS,
        "tests/execute/test_masked.py",
        "tests/execute/test_savings.py",
        *VALUES,
        *FILES,
    ),
    "forward/hooks/*.py": (*MODELS, *VALUES, *FILES),
    "execute/*.py": (*PLANNER, *VALUES, *FILES, *NUMBERS),
    "statistics/*.py vocab/metrics.py": (
        *STATISTICS,
        *FILES,
        "tests/execute/test_effects.py",
    ),
    "checks/prompt_tables.py checks/file_check.py": CHECKED,
    "prompts/positions/spans.py": ("tests/data/test_positions.py", *CHECKED),
    "program/paths.py": ("tests/cli/test_paths.py", "tests/cli/test_written_files.py"),
    "forward/generation/*.py": ("tests/generate", "tests/rules/test_in_replies.py"),
    "images/*.py": IMAGES,
    "images/layouts.py prompts/tokens/image_prompts.py execute/image_vectors.py": (
        "tests/images/test_layouts.py",
        "tests/images/test_video_layouts.py",
        "tests/image_prompts",
    ),
    "store/*.py": ("tests/store",),
    "resolve/*.py": ("tests/compiler", *CHECKED, *FILES),
    "resolve/circuits.py models/circuit_graph.py forward/hooks/settled.py "
    "forward/hooks/circuits.py": (
        "tests/rules/test_ablated_circuits.py",
        "tests/rules/test_classifier_circuits.py",
        "tests/rules/test_compared_circuits.py",
        "tests/pipeline/test_edge_scores.py",
        "tests/pipeline/test_edge_searches.py",
        "tests/pipeline/test_trained_circuits.py",
    ),
    "resolve/controls.py resolve/matched_draws.py": (
        "tests/controls",
        "tests/pipeline/test_training_controls.py",
        "tests/rules/test_random_features.py",
    ),
    "loading/weight_edits.py": ("tests/rules/test_weights.py",),
    "execute/edit_training.py": ("tests/pipeline/test_trained_edits.py",),
    "results/document.py results/experiment_result.py results/results.py results/runs.py": RESULTS,
    "results/statistics_conventions.py results/typed_json.py": RESULTS,
    "results/differences/*.py results/assembly/*.py results/verdicts/*.py": (*RESULTS, *FILES),
    "results/assembly/combination.py": (*STATISTICS, *FILES, "tests/execute/test_effects.py"),
    "results/assembly/collection.py": ("tests/execute/test_effects.py", *FILES),
}
"""Changed modules, as patterns relative to the package → files or folders of their tests; the last
matching pattern applies."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="mutants to draw")
    parser.add_argument("--target", default="*", metavar="GLOB", help="of modules, below mechdsl/")
    parser.add_argument("--named", default="", metavar="TEXT", help="of mutants: a part of it")
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests for each")
    parser.add_argument("--survivors", action="store_true", help="those of the table, again")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    given = parser.parse_args(arguments)
    of_modules = {name: tests for name, tests in targets().items() if fnmatch(name, given.target)}
    every = [mutant for name in of_modules for mutant in of_module(name)]
    every = [mutant for mutant in every if given.named in mutant.name]
    if given.survivors:
        alive = {row["mutant"] for row in read_table().values() if row["outcome"] == "survived"}
        every = [mutant for mutant in every if mutant.name in alive]
    else:
        every = draw(every, given.seed, given.count)
    seed = given.seed if given.write else None
    prepare()
    files = {name: test_files(of_modules[name]) for name in sorted({m.module for m in every})}
    every_file = list(dict.fromkeys(file for own in files.values() for file in own))

    def in_forks(collected: Collected) -> list[tuple[Mutant, list[str], Ran | None]]:
        """What each mutant meets; None where its module has to be imported anew."""
        found: list[tuple[Mutant, list[str], Ran | None]] = []
        reach = reached(collected, every_file)
        for mutant in every:
            tests = chosen(mutant, reach, files[mutant.module], given.budget)
            ran = None
            if tests and collected.can_exchange(mutant):
                ran = collected.run(mutant, tests, given.budget + LIMIT)
                report(mutant, tests, ran, seed)
            found.append((mutant, tests, ran))
        return found

    alive = 0
    for mutant, tests, ran in Collected.of(every_file, in_forks):
        if ran is None:
            ran = imported(mutant, tests, given.budget + LIMIT) if tests else Ran(True)
            report(mutant, tests, ran, seed)
        alive += ran.passed
    print(f"{len(every)} mutants, {alive} survive")
    return int(alive > 0)


def report(mutant: Mutant, tests: Sequence[str], ran: Ran, seed: int | None) -> None:
    """Print the outcome; with a seed, write it to the table."""
    outcome = "survived" if ran.passed else "killed"
    by = (f"{len(tests)} tests" if tests else "no test runs it") if ran.passed else ran.failed
    print(f"{outcome} [{mutant.kind}] {mutant.name} | {by}", flush=True)
    if seed is None:
        return
    table = read_table()
    old = table.get(mutant.name, {})
    reason = old.get("by", "") if old.get("outcome") == outcome == "survived" else ""
    table[mutant.name] = {
        "seed": old.get("seed") or str(seed),
        "kind": mutant.kind,
        "mutant": mutant.name,
        "outcome": outcome,
        "by": reason or by,
    }
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def targets() -> dict[str, tuple[str, ...]]:
    """Module → paths of tests."""
    every = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
    found: dict[str, tuple[str, ...]] = {}
    for patterns, tests in TARGETS.items():
        for pattern in patterns.split():
            own = [module for module in every if fnmatch(module, pattern)]
            assert own, f"no module is {pattern}"
            found |= dict.fromkeys(own, tests)
    return found


def of_module(module: str) -> list[Mutant]:
    return mutants(module, (PACKAGE / module).read_text(encoding="utf-8"))


def draw(every: Sequence[Mutant], seed: int, count: int) -> list[Mutant]:
    """Sample modules by their size, and in a module each type of change equally often."""
    drawn = random.Random(seed)
    found: dict[str, Mutant] = {}
    left = list(every)
    while left and len(found) < count:
        module = drawn.choice(left).module
        own = [m for m in left if m.module == module]
        kind = drawn.choice(sorted({m.kind for m in own}))
        mutant = drawn.choice([m for m in own if m.kind == kind])
        left.remove(mutant)
        if mutant.is_python():
            found[mutant.name] = mutant
    return list(found.values())


def read_table() -> dict[str, dict[str, str]]:
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["mutant"]: row for row in csv.DictReader(file)}


def unmatched(names: Iterable[str]) -> list[str]:
    """Names in the table that match no change of the current modules."""
    wanted = list(names)
    modules = {name.partition(":")[0] for name in wanted}
    there = [module for module in sorted(modules) if (PACKAGE / module).exists()]
    today = {mutant.name for module in there for mutant in of_module(module)}
    return [name for name in wanted if name not in today]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
