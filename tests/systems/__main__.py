"""Run the published experiments: `python -m tests.systems [NN…] [--write]`.

Prints each expectation; `--write` writes the results to `docs/systems.md`, where rows of files that
weren't run are kept.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import mechdsl
from mechdsl.results.experiment_result import ExpectOutcome

from .files import System, systems

PAGE = Path(__file__).parents[2] / "docs" / "systems.md"

INTRO = """\
# Published experiments

This page lists published interpretability experiments as files that you can run. Each row is a
file of `examples/systems/` that applies the experiment to a tiny model of the package:

```sh
mechdsl run examples/systems/03-countscope.mech
```

Each row gives the claim of the publication, the results, and a verdict on the tiny model. A tiny
model, trained for another task, needn't behave like a large one: nothing was tuned to confirm a
claim. The `expect` lines of a file state its results, whether they confirm the claim or not. The
page shows their values, with 95 % intervals if available. n is the number of independent units:
distinct prompts, or groups of `stats by`. The row numbers come from a longer list of publications.

`make systems` runs all files and builds this page. `python -m tests.systems NN…` runs some.

| system | claim | file | model | result | verdict |
| --- | --- | --- | --- | --- | --- |
"""


def _number(value: float) -> str:
    return f"{value:.3g}"


def _result(name: str, outcome: ExpectOutcome) -> str:
    """Return `` knocked_out: `delta(L1H1)` -2.1 [-2.3, -1.9], n = 64 ``."""
    what = outcome.text
    for sign in (" > ", " < ", " near ", " = "):
        what = what.partition(sign)[0]
    value = outcome.value if isinstance(outcome.value, str) else None
    if isinstance(outcome.value, float) and " contains " not in what:
        value = _number(outcome.value)
        if outcome.low is not None and outcome.high is not None:
            value += f" [{_number(outcome.low)}, {_number(outcome.high)}]"
    if value is None:
        return f"{name}: `{what}`"
    n = "" if outcome.effective_n is None else f", n = {outcome.effective_n:,}"
    return f"{name}: `{what}` {value}{n}"


def row(system: System, outcomes: Sequence[tuple[str, ExpectOutcome]]) -> str:
    """The table line of a system."""
    cells = (
        f"{system.number}. {system.paper}",
        system.claim,
        f"[{system.path.name}](../examples/systems/{system.path.name})",
        f"`{system.model}`",
        "<br>".join(_result(name, outcome) for name, outcome in outcomes),
        f"**{system.verdict}**: {system.found}",
    )
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |\n"


def outcomes(system: System) -> list[tuple[str, ExpectOutcome]]:
    """Every expectation of a file, with its experiment's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "= fit(" not in system.text:
            results = mechdsl.run(system.path, device="cpu", store=False, allow_python=True)
        else:
            with TemporaryDirectory() as store:
                results = mechdsl.run(
                    system.path, device="cpu", store=store, fit=True, allow_python=True
                )
    return [(each.name, outcome) for each in results for outcome in each.outcomes]


def page(rows: Mapping[str, str]) -> str:
    """The page with the given rows by file name; rows of other files are kept."""
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    lines: list[str] = []
    for system in systems():
        link = f"/{system.path.name})"
        kept = (line + "\n" for line in old.splitlines() if link in line)
        lines.append(rows.get(system.path.name) or next(kept, ""))
    return INTRO + "".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status is 1 if an expectation fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="by default all")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args(arguments)
    rows: dict[str, str] = {}
    held = True
    for system in systems():
        if args.numbers and system.number not in args.numbers:
            continue
        found = outcomes(system)
        rows[system.path.name] = row(system, found)
        for name, outcome in found:
            held &= outcome.holds
            sign = outcome.word if outcome.holds else outcome.word.upper()
            print(f"{system.path.name}: {sign}  {_result(name, outcome)}", flush=True)
    if args.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
