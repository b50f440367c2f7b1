"""What `mechdsl plan` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from mechdsl.draw import to_text
from mechdsl.plan import PLAN_PASSES, ExperimentPlan, Plan, runs_of


def print_plan(plan: Plan, console: Console) -> None:
    """The graph, what the passes did to it, and the work per experiment."""
    console.print("intervention graph", style="bold")
    console.print(to_text(plan.graph), highlight=False, markup=False, end="", soft_wrap=True)
    for outcome in plan.passes:
        did = f"{outcome.before} → {outcome.after} nodes" if outcome.changed else "no changes"
        console.print(f"pass {outcome.name}: {did}", highlight=False)
    for name, meaning in PLAN_PASSES.items():
        if name not in plan.without:
            console.print(f"pass {name}: {meaning}", highlight=False)
    for name in sorted(plan.without):
        console.print(f"pass {name}: switched off", highlight=False)
    console.print()
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("experiment", overflow="fold")
    for title in ("cells", "prompts", "rows", "unpatched"):
        table.add_column(title, justify="right", no_wrap=True)
    total = alone = 0
    planned = [each for panel in plan.panels for each in panel.experiments]
    for experiment in sorted(planned, key=lambda each: each.experiment.spec.span.start):
        rows = experiment.count()
        total += rows
        alone += unpatched_rows(experiment)
        table.add_row(
            experiment.experiment.name,
            f"{experiment.n_cells:,}",
            f"{len(experiment.experiment.table):,}",
            f"{rows:,}",
            f"{unpatched_rows(experiment):,}",
        )
    console.print(table)
    console.print(
        f"the plain loop runs {total + alone:,} forward passes, one for each of {total:,} patched "
        f"rows and {alone:,} unpatched prompts",
        style="dim",
    )


def unpatched_rows(plan: ExperimentPlan) -> int:
    """Prompts of all unpatched runs of the experiment, draws included."""
    table = plan.experiment.table
    count = 0
    for name in runs_of(plan.experiment):
        noise = table.runs[name].noise
        count += len(table) * (noise.samples if noise is not None else 1)
    return count
