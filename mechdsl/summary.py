"""What `mechdsl plan` prints."""

from __future__ import annotations

import numpy as np
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
    for title in ("cells", "prompts", "rows", "unpatched", "blocks a row", "tokens a row"):
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
            _blocks(experiment) if experiment.rules else "–",
            _tokens(experiment, reuses=plan.reuses) if experiment.rules else "–",
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


def _blocks(plan: ExperimentPlan) -> str:
    """Mean number of blocks that a row runs, of all."""
    n_layers = plan.experiment.model.shape.n_layers
    return f"{float(np.mean(n_layers - plan.starts)):.1f} of {n_layers}"


def _tokens(plan: ExperimentPlan, *, reuses: bool) -> str:
    """Mean number of tokens that a row computes, of all: from its leftmost write or read on."""
    experiment = plan.experiment
    base = experiment.spec.base
    lengths = np.array([len(row.ids) for row in experiment.table.runs[base].rows], dtype=np.int64)
    rows = plan.rows(np.arange(len(lengths), dtype=np.int64))
    whole = lengths[rows.prompt]
    first = np.minimum(plan.leftmost(rows), whole - 1)
    for measure in experiment.measures:
        if base in measure.at:
            first = np.minimum(first, np.asarray(measure.at[base])[rows.prompt])
        if any(atom.form.takes == "prompt" for atom in measure.atoms):
            first = np.zeros_like(first)
    if not reuses or any(rule.rule.sites is None for rule in plan.rules):
        first = np.zeros_like(first)
    return f"{float(np.mean(whole - first)):.1f} of {float(np.mean(whole)):.1f}"
