"""What `mechdsl plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadCommandLine, did_you_mean
from mechdsl.draw import to_text
from mechdsl.passes import PASSES
from mechdsl.plan import PLAN_PASSES, ExperimentPlan, Plan, runs_of
from mechdsl.registry import nearest


def unknown_passes(names: Sequence[str]) -> list[Diagnostic]:
    """E0208 for every `--no-pass` that names none."""
    known = [*PASSES, *PLAN_PASSES]
    return [
        BadCommandLine(
            reason=f"there is no pass called `{name}`",
            hint=did_you_mean(nearest(name, known), f"passes are {', '.join(known)}"),
        )
        for name in names
        if name not in known
    ]


def print_plan(plan: Plan, console: Console) -> None:
    """The graph, what the passes did to it, and the work per experiment."""
    console.print("intervention graph", style="bold")
    console.print(to_text(plan.graph), highlight=False, markup=False, end="", soft_wrap=True)
    for outcome in plan.passes:
        did = f"{outcome.before} → {outcome.after} nodes" if outcome.changed else "no changes"
        console.print(f"pass {outcome.name}: {did}", highlight=False)
    for name in sorted(plan.without):
        console.print(f"pass {name}: switched off", highlight=False)
    console.print()
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("experiment")
    for title in ("cells", "prompts", "rows", "unpatched passes", "blocks per row"):
        table.add_column(title, justify="right")
    total = 0
    for panel in plan.panels:
        for experiment in panel.experiments:
            rows = count_rows(experiment)
            total += rows
            table.add_row(
                experiment.experiment.name,
                f"{experiment.n_cells:,}",
                f"{len(experiment.experiment.table):,}",
                f"{rows:,}",
                f"{unpatched_rows(experiment):,}",
                _blocks(experiment) if experiment.rules else "–",
            )
    console.print(table)
    console.print(
        f"{total:,} patched rows in all: the plain loop runs one forward pass for each", style="dim"
    )


def count_rows(plan: ExperimentPlan) -> int:
    """Patched rows, draws of noise included: forward passes of the plain loop."""
    if not plan.rules:
        return 0
    experiment = plan.experiment
    rows = plan.rows(np.arange(len(experiment.table), dtype=np.int64))
    return len(rows) * _draws(plan)


def _draws(plan: ExperimentPlan) -> int:
    runs = plan.experiment.table.runs
    names = [plan.experiment.spec.base, plan.experiment.spec.source]
    noises = [runs[name].noise for name in names if name is not None]
    return max((noise.samples for noise in noises if noise is not None), default=1)


def unpatched_rows(plan: ExperimentPlan) -> int:
    """Prompts of all unpatched runs of the experiment, draws included."""
    table = plan.experiment.table
    count = 0
    for name in runs_of(plan.experiment):
        noise = table.runs[name].noise
        count += len(table) * (noise.samples if noise is not None else 1)
    return count


def _blocks(plan: ExperimentPlan) -> str:
    """Mean number of blocks that a row runs, of all."""
    n_layers = plan.experiment.model.shape.n_layers
    return f"{float(np.mean(n_layers - plan.starts)):.1f} of {n_layers}"
