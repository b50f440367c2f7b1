"""What `mechdsl plan` prints, and what `run --profile` adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from mechdsl.base.byte_sizes import size_text
from mechdsl.base.plural import plural
from mechdsl.execute.profile import Profile
from mechdsl.execute.sizes import PassSizes
from mechdsl.plan.cost import Cost
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.make_plan import with_saves
from mechdsl.plan.passes import PASSES
from mechdsl.plan.plan import PASS_TOKENS, PROMPT_TOKENS, Plan
from mechdsl.plan.save_cost import SaveCost, save_costs
from mechdsl.plan.savings import PlanCost, plan_cost
from mechdsl.resolve.measured_parts import whole_spec
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.show.graph import to_text
from mechdsl.show.power import Measured, print_power
from mechdsl.show.seconds import Estimate, amounts, estimate, host_pace, matmul_rate


def print_plan(
    plan: Plan,
    console: Console,
    pass_tokens: int = PASS_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    measured: Measured | None = None,
    *,
    saving: Sequence[ResolvedExperiment] = (),
) -> None:
    """The graph, the work per experiment, what effects its rows can show, what each pass saves, and
    what `save` lines cost. measured: what base and source runs gave, if they were run; saving: the
    experiments with `save` lines."""
    console.print("intervention graph", style="bold")
    graph = to_text(with_saves(plan.graph, saving))
    console.print(graph, highlight=False, markup=False, end="", soft_wrap=True)
    for rewrite in plan.rewrites:
        did = f"{rewrite.before} → {rewrite.after} nodes" if rewrite.changed else "no changes"
        console.print(f"pass {rewrite.name}: {did}", highlight=False)
    console.print()
    _experiments(plan, console)
    print_power(plan, console, measured)
    console.print()
    cost = plan_cost(plan, pass_tokens, prompt_tokens)
    _savings(cost, console)
    saves = save_costs(saving, prompt_tokens)
    _saves(saves, console)
    deepest = max((each.model.shape.n_layers for each in saving), default=0)
    cost = replace(cost, blocks=max(cost.blocks, deepest))
    _estimate(plan, cost, sum((each.cost for each in saves), Cost()), console)


def _experiments(plan: Plan, console: Console) -> None:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("experiment", overflow="fold")
    for title in ("cells", "prompts", "rows", "unpatched"):
        table.add_column(title, justify="right", no_wrap=True)
    planned = [each for panel in plan.panels for each in panel.experiments]
    parts: dict[str, list[ExperimentPlan]] = {}
    for each in sorted(planned, key=lambda each: each.experiment.spec.span.start):
        parts.setdefault(whole_spec(each.experiment).key, []).append(each)
    for name, own in parts.items():
        said = f"{name}, read at {len(own):,} places" if own[0].experiment.place else name
        table.add_row(
            said,
            f"{sum(each.experiment.n_there for each in own):,}",
            f"{len(own[0].experiment.table):,}",
            f"{sum(each.count() for each in own if not _estimated(each)):,}",
            f"{max(map(unpatched_rows, own)):,}",
        )
    console.print(table)
    whole = [each.experiment.name for each in planned if each.whole and not _estimated(each)]
    writing: dict[str, dict[str, None]] = {}
    for each in planned:
        said, own = each.experiment.generation, each.experiment.spec
        if said is not None and each.experiment.control_of is None:
            times = f" {said.samples} times" if said.samples > 1 else ""
            what = f"{plural(said.tokens, 'token')}{times}"
            writing.setdefault(what, {})[own.within or own.name] = None
    for what, names in writing.items():
        its = "its" if len(names) == 1 else "their"
        console.print(
            f"each row of {' and '.join(names)}, and of {its} base and source run, writes up to "
            f"{what}: counted as if all did",
            highlight=False,
        )
    for each in planned:
        if said := each.experiment.spec.estimator:
            console.print(
                f"{each.experiment.name} runs no row: `{said.text}` takes passes forward and back "
                "over its prompts",
                highlight=False,
            )
    if whole:
        console.print(
            f"rows of {', '.join(dict.fromkeys(whole))} are whole passes: what is kept of "
            "unpatched runs can't stand in them",
            highlight=False,
        )
    waiting = {e.experiment.name: e.experiment.stand_ins for e in planned if e.experiment.stand_ins}
    for name, others in waiting.items():
        console.print(
            f"{name} is counted with stand-ins: what it uses is known when "
            f"{' and '.join(others)} {'has' if len(others) == 1 else 'have'} run",
            highlight=False,
        )


def _estimated(plan: ExperimentPlan) -> bool:
    return plan.experiment.spec.estimator is not None


def _savings(cost: PlanCost, console: Console) -> None:
    """A line per pass: what is left after it."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("left after", no_wrap=True)
    back = ("backward",) if cost.plain.backwards else ()
    for title in ("cells", "rows", "forwards", *back, "tokens×blocks", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_row("the plain loop", *_figures(cost.plain, back=bool(back)), "")
    before = cost.plain
    for saving in cost.savings:
        after = saving.after
        if not saving.on:
            table.add_row(saving.name, *[""] * (5 + len(back)), "off", style="dim")
            continue
        changed = after != before
        share = 1 - after.multiply_adds / before.multiply_adds if before.multiply_adds else 0.0
        saved = f"{share:.0%}" if share >= 0.005 else "–"
        figures = _figures(after, back=bool(back))
        table.add_row(saving.name, *figures, saved, style="" if changed else "dim")
        before = after
    console.print(table)
    counted = {saving.name for saving in cost.savings}
    for one in PASSES:
        if one.shown is not None and one.name not in counted:
            continue  # of replies, where none are written
        console.print(f"{one.name}: {one.does}", style="dim", highlight=False)


def _saves(saves: Sequence[SaveCost], console: Console) -> None:
    """A line per file that is written: each is made in passes of its own, behind all cells."""
    if not saves:
        return
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("saved to", overflow="fold")
    for title in ("sites", "vectors", "size", "forwards", "tokens×blocks", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in saves:
        table.add_row(
            each.save.spec.file,
            f"{len(each.layout.widths):,}",
            f"{'≤ ' if each.layout.at_most else ''}{each.layout.vectors:,}",
            f"{'≤ ' if each.layout.at_most else ''}{size_text(each.bytes)}",
            *_figures(each.cost)[2:],
        )
    console.print()
    console.print(table)


def _figures(cost: Cost, *, back: bool = False) -> list[str]:
    """back: with the passes back."""
    return [
        f"{cost.cells:,}",
        f"{cost.rows:,}",
        f"{cost.forwards:,}",
        *([f"{cost.backwards:,}"] if back else []),
        f"{cost.tokens:,}",
        f"{cost.flops:.3g}",
    ]


def _estimate(plan: Plan, cost: PlanCost, saves: Cost, console: Console) -> None:
    """Print the seconds of a run and of a plain loop. saves: the work of `save` lines, in both."""
    rate, pace = matmul_rate(), host_pace()
    plain, planned = (
        _seconds(plan, each + saves, cost.blocks, rate, pace) for each in (cost.plain, cost.planned)
    )
    console.print(
        f"about {_time(planned.total)} on this CPU, {_time(plain.total)} as a plain loop, at "
        f"{2 * rate / 1e9:.0f} GFLOP/s in a large product",
        highlight=False,
    )
    console.print(
        f"of these {_time(planned.loading)} to import libraries and load models, "
        f"{_time(planned.prompts)} to make prompts, {_time(planned.passes)} to run the model and "
        f"{_time(planned.statistics)} for statistics",
        highlight=False,
    )


def _seconds(plan: Plan, cost: Cost, blocks: int, rate: float, pace: float) -> Estimate:
    return estimate(amounts(plan, cost, blocks), cost.multiply_adds, rate, pace)


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_profile(plan: Plan, profile: Profile, sizes: PassSizes, console: Console) -> None:
    """Estimated against measured, after a run."""
    cost = plan_cost(plan, sizes.pass_tokens, sizes.prompt_tokens)
    console.print("profile", style="bold")
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for title in ("", "estimated", "measured"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    measured = profile.unpatched_seconds + profile.patched_seconds
    planned = cost.planned
    seconds = _seconds(plan, planned, cost.blocks, matmul_rate(), host_pace())
    table.add_row("rows", f"{planned.rows:,}", f"{profile.distinct:,}")
    passes = profile.passes + profile.unpatched_passes
    table.add_row("forwards", f"{planned.forwards:,}", f"{passes:,}")
    table.add_row("seconds", f"{seconds.passes:.3g}", f"{measured:.3g}")
    console.print(table)
    console.print(
        f"{profile.unpatched_seconds:.3g} s for unpatched runs, means and checks, "
        f"{profile.patched_seconds:.3g} s for {profile.rows:,} patched rows, of which "
        f"{profile.distinct:,} are distinct"
        + (f", and {profile.estimated:,} that were estimated" if profile.estimated else ""),
        highlight=False,
    )
    if profile.tokens:
        largest = max(profile.tokens)
        rate_seen = sum(profile.tokens) / max(profile.patched_seconds, 1e-9)
        console.print(
            f"passes of up to {largest:,} tokens, {rate_seen:,.0f} tokens of rows per second",
            highlight=False,
        )


def unpatched_rows(plan: ExperimentPlan) -> int:
    """Prompts of all unpatched runs of the experiment, draws included."""
    table = plan.experiment.table
    return sum(len(table) * table.runs[name].draws for name in plan.runs)
