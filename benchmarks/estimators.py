"""Estimators against patched runs, on models of the zoo: the table of docs/estimators.md.

    python -m benchmarks.estimators [MODEL…] [--write]

Every estimator of effects estimates the cells of each type of site in the base run `clean`, and the
cells are run too. Correlations are over the cells that have an effect, of effects averaged over
prompts; `atp_star`, which has no sign, is compared with their absolute values.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

import mechdsl
from mechdsl.base.arrays import Floats

PAGE = Path(__file__).parents[1] / "docs" / "estimators.md"
BEGIN, END = "<!-- estimators: begin -->", "<!-- estimators: end -->"
ESTIMATORS = (
    "gradient_input",
    "integrated_gradients(steps: 16)",
    "relp",
    "gim",
    "atp_qk",
    "atp_star",
    "cdt",
)
WITHOUT_QUERIES = ("cdt",)
"""Estimators that hold attention weights constant, and reject queries and keys."""
UNSIGNED = ("atp_star",)
"""Estimators without a sign, which are compared with absolute effects."""
SITES = {
    "residual": "resid_pre layer *",
    "attention": "attn_out layer *",
    "heads": "z layer * head *",
    "queries": "q layer * head *",
    "keys": "k layer * head *",
    "MLP": "mlp_out layer *",
}


@dataclass(frozen=True)
class Task:
    """Prompts of a model, and the positions whose vectors are patched."""

    prompts: str
    metric: str
    positions: str


TASKS: Mapping[str, Task] = {
    "names": Task(
        """\
prompts p {
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park", "school"]
  thing in ["bag", "book", "ring"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a {thing} to"
  answer " {io}"
  wrong " {s}"
  corrupt other_names { io, s1, s2 = others(io, s) }
}
""",
        "logit(answer) - logit(wrong)",
        "token *",
    ),
    "counting": Task(
        """\
prompts p {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  wrong " {count - 1}"
  corrupt fewer { count = count - 1 }
}
""",
        "logit(answer) - logit(wrong)",
        "first-item token, last-item token, last-item token + 1, last token",
    ),
}


@dataclass(frozen=True)
class Agreement:
    """Correlations of an estimator with patched runs."""

    model: str
    site: str
    cells: int
    estimator: str
    pearson: float
    spearman: float


def compare(model: str, rows: int = 100) -> list[Agreement]:
    """Estimate and run the cells of each type of site."""
    task = TASKS[model]
    lines = [f'model m = zoo("{model}")', task.prompts]
    corrupted = task.prompts.partition("corrupt ")[2].split()[0]
    for number, site in enumerate(SITES.values()):
        for how, using in enumerate(("", *ESTIMATORS)):
            if not _applies(using, number):
                continue
            lines += [
                f"experiment e{number}_{how} {{",
                "  model m",
                f"  prompts p limit {rows}",
                f"  from {corrupted} into clean",
                f"  patch {site} at {task.positions}",
                f"  using {using}" if using else "",
                f"  measure {task.metric} as {'raw' if using in UNSIGNED else 'delta'}",
                "}",
            ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        found = mechdsl.run("mech 1\n" + "\n".join(lines), store=None)
    effects = {each.name: _effects(each) for each in found.experiments}
    return [
        _agreement(model, site, using, effects[f"e{number}_{how}"], effects[f"e{number}_0"])
        for number, site in enumerate(SITES)
        for how, using in enumerate(ESTIMATORS, 1)
        if _applies(using, number)
    ]


def _applies(using: str, number: int) -> bool:
    """Whether an estimator estimates the site of this number."""
    return using not in WITHOUT_QUERIES or list(SITES)[number] not in ("queries", "keys")


def _effects(result: mechdsl.ExperimentResult) -> Floats:
    """Return [cell, row]."""
    data = result.measures[0]
    return data.patched if data.effect == "raw" else data.patched - data.base


def _agreement(model: str, site: str, using: str, estimate: Floats, run: Floats) -> Agreement:
    some = np.abs(run).max(axis=1) > 0  # others write the vectors that are there
    own, wanted = estimate[some].mean(axis=1), run[some].mean(axis=1)
    wanted = np.abs(wanted) if using in UNSIGNED else wanted
    pearson, spearman = (float(f(own, wanted).statistic) for f in (pearsonr, spearmanr))
    return Agreement(model, site, len(own), using, pearson, spearman)


def table(found: Sequence[Agreement]) -> str:
    """Format the table of the page: Pearson and Spearman, a row for each model and site."""
    head = ["model", "sites", "cells", *(f"`{name}`" for name in ESTIMATORS)]
    lines = [head, ["---"] * len(head)]
    for model, site in dict.fromkeys((each.model, each.site) for each in found):
        own = {e.estimator: e for e in found if (e.model, e.site) == (model, site)}
        each = [
            f"{own[name].pearson:.3f} / {own[name].spearman:.3f}" if name in own else "–"
            for name in ESTIMATORS
        ]
        cells = own[ESTIMATORS[0]].cells
        lines.append([f'`zoo("{model}")`', site, str(cells), *each])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(table: str, begin: str, end: str, page: Path = PAGE) -> None:
    """Replace the table between two comments of a page."""
    text = page.read_text(encoding="utf-8")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    page.write_text(f"{before}\n\n{table}\n\n{after}", encoding="utf-8")


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    given = parser.parse_args()
    found = [each for name in given.models or TASKS for each in compare(name, given.rows)]
    print(table(found))
    if given.write:
        write_table(table(found), BEGIN, END)


if __name__ == "__main__":
    main()
