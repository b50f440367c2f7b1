"""Output of `mechdsl plan` and `run --profile`: work, estimated seconds, and statistical power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.base.arrays import Floats, Ints
from mechdsl.base.text import count_noun, format_size
from mechdsl.checks.file_check import group_variants
from mechdsl.execute.run_record import ExecutionProfile, PassSizes
from mechdsl.planner.cost import Cost
from mechdsl.planner.passes import PASSES, PlanCost, SaveCost, add_save_nodes, plan_cost, save_costs
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, ExperimentPlan, Plan
from mechdsl.planner.training_cost import TrainingCost
from mechdsl.program import spec
from mechdsl.program.significance import CORRECTION_NAMES, MIN_UNITS
from mechdsl.resolve.expansion import get_whole_spec
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.types import ResolvedExperiment
from mechdsl.results.assembly.sampling_units import PlannedUnits, plan_units
from mechdsl.show.graph import to_text
from mechdsl.statistics.cell_statistics import draw_count
from mechdsl.statistics.corrections import MULTIPLIER_DRAWS
from mechdsl.statistics.power import TARGET_POWER, DetectableEffect, detectable_effect
from mechdsl.vocab.metrics import EFFECTS

if TYPE_CHECKING:
    from mechdsl.execute.measurement.values import MeasuredValues


EFFICIENCY = 0.8
"""Share of a large product's rate that passes over wide models reach, measured on two cores."""

REFERENCE_PACE = 0.011
"""Seconds of `measure_host_pace` on the machine of `SECONDS_PER_AMOUNT`."""

PACE_STEPS = 100_000


@dataclass(frozen=True)
class WorkAmounts:
    """Work of a run besides large matrix products."""

    runs: float = 1.0
    """Runs of the command, each of which imports libraries and loads models."""
    prompts: float = 0.0
    """Rows of all runs that are created and tokenised."""
    calls: float = 0.0
    """Calls of blocks."""
    block_tokens: float = 0.0
    """Tokens times blocks."""
    cells: float = 0.0
    """Cells that are laid out, measured and reported."""
    rows: float = 0.0
    """Patched or observed rows."""
    numbers: float = 0.0
    """Logits, or numbers of vectors, that metrics and observations read."""
    drawn: float = 0.0
    """Units times resamples and sign flips."""
    summed: float = 0.0
    """Units times resamples and sign flips times cells."""
    fitted: float = 0.0
    """Vectors that observations over rows fit, such as probes."""
    steps: float = 0.0
    """Steps of trainings."""


SECONDS_PER_AMOUNT = WorkAmounts(
    runs=5.0,
    prompts=2.1e-4,
    calls=1.5e-3,
    block_tokens=1.6e-6,
    cells=1.1e-3,
    rows=1.7e-5,
    numbers=3e-9,
    drawn=8e-9,
    summed=1.4e-10,
    fitted=1.4e-3,
    steps=1e-3,
)
"""Seconds per unit of each amount, measured by `benchmarks/estimates.py --fit`; `runs` is between
those of two machines, 6.5 and 3.7."""


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated seconds of one run of a file, by phase."""

    loading: float
    """Importing libraries and loading models."""
    prompts: float
    """Creating and tokenising prompts."""
    passes: float
    """Running the model, including metrics and observations."""
    statistics: float
    """Resampling units for intervals and p-values."""

    @property
    def total(self) -> float:
        return self.loading + self.prompts + self.passes + self.statistics


@cache
def measure_matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """Measure the multiply-adds per second of a square float32 matrix product, once per process.

    The best of the repetitions counts.
    """
    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats + 1):  # the first repetition starts the threads
        start = perf_counter()
        np.matmul(a, a)
        best = min(best, perf_counter() - start)
    return size**3 / best


@cache
def measure_host_pace() -> float:
    """Measure the seconds of a loop in Python, the best of three, once per process.

    Only this thread counts, as those of a matrix product may still wait in a loop.
    """
    best = float("inf")
    for _ in range(3):
        start = thread_time()
        paces: dict[int, str] = {}
        for step in range(PACE_STEPS):
            paces[step % 1000] = str(step)
        best = min(best, thread_time() - start)
    return best


def count_work(plan: Plan, cost: Cost, blocks: int, streamed: int = 0) -> WorkAmounts:
    """Count the work of a plan's run.

    Args:
        plan: The plan of all experiments.
        cost: The remaining cost after its passes, including `save` lines.
        blocks: Number of blocks of the deepest model.
        streamed: Number of streamed rows, whose prompts are built during the run.
    """
    plans = [experiment for panel in plan.panels for experiment in panel.experiments]
    amounts = [_experiment_work(each) for each in plans]
    return WorkAmounts(
        prompts=streamed + sum(len(panel.table) * len(panel.table.runs) for panel in plan.panels),
        calls=(cost.forwards + cost.backwards) * blocks,
        block_tokens=cost.tokens,
        cells=sum(amount.cells for amount in amounts),
        rows=sum(amount.rows for amount in amounts),
        numbers=sum(amount.numbers for amount in amounts),
        drawn=sum(amount.drawn for amount in amounts),
        summed=sum(amount.summed for amount in amounts),
        fitted=sum(amount.fitted for amount in amounts),
    )


def _experiment_work(plan: ExperimentPlan) -> WorkAmounts:
    experiment = plan.experiment
    shape, settings = experiment.model.shape, experiment.spec.statistics
    units, cells = len(experiment.table), plan.n_cells * max(1, len(experiment.measures))
    rows = plan.count()
    atoms = [atom for measure in experiment.measures for atom in measure.atoms]
    reads_all = plan.lists > 0 or not all(atom.form.narrow for atom in atoms)
    outputs = shape.outputs if reads_all else shape.d_model
    written = 0 if experiment.generation is None else experiment.generation.tokens
    samples = 1 if experiment.generation is None else experiment.generation.samples
    draws = draw_count(settings, cells) + MULTIPLIER_DRAWS * (settings.correction == "max")
    # Simultaneous bounds, argmax and non-smooth values are resampled.
    draws += settings.resamples * bool(experiment.spec.expects)
    over_rows = plan.observes is not None and isinstance(plan.observes.rule.does, RowSetObservation)
    return WorkAmounts(
        runs=0,
        cells=cells,
        rows=rows,
        numbers=float(rows * (outputs + written * samples * shape.outputs)),
        drawn=float(units * draws),
        summed=float(cells * units * draws),
        fitted=rows if over_rows else 0,
    )


def estimate_time(
    work: WorkAmounts, multiply_adds: float, rate: float, pace: float
) -> TimeEstimate:
    """Estimate the seconds of a run.

    Args:
        work: Result of `count_work`.
        multiply_adds: Total of all passes over the model.
        rate: Multiply-adds per second, from `measure_matmul_rate`.
        pace: Seconds, from `measure_host_pace`.
    """
    slower = pace / REFERENCE_PACE
    loading, prompts, *passes, drawn, summed, fitted, steps = (
        slower * count * each
        for count, each in zip(astuple(work), astuple(SECONDS_PER_AMOUNT), strict=True)
    )
    products = multiply_adds / (rate * EFFICIENCY)
    return TimeEstimate(loading, prompts, products + sum(passes) + fitted + steps, drawn + summed)


MeasuredByVariant: TypeAlias = "Mapping[str, MeasuredValues]"
"""Key of an experiment's variant → measurements of its base run and its source run."""


def print_power(plan: Plan, console: Console, measured: MeasuredByVariant | None = None) -> None:
    """Print a line per tested experiment and, with measurements, one per measure."""
    plans = {p.experiment.key: p for panel in plan.panels for p in panel.experiments}
    ordered = sorted((p.experiment for p in plans.values()), key=lambda e: e.spec.span.start)
    tested = {
        experiments[0].name: experiments
        for experiments in group_variants(ordered)
        if _tested_measures(experiments)
    }
    if not tested:
        return
    effects = {
        name: detectable_effects(experiments, plans, measured)
        for name, experiments in tested.items()
    }
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("power", overflow="fold")
    for title in ("units", "tests", "level", "effect"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, effect in effects.items():
        units = _range_text([f"{end.units:,}" for end in effect])
        table.add_row(
            name,
            f"{units} {_units_text(tested[name][0], measured)}",
            f"{effect[0].tests:,}",
            f"{effect[0].level:.2g}",
            _range_text([_detectable_text(end, tested[name][0].spec.statistics) for end in effect]),
        )
    console.print()
    console.print(table)
    console.print(
        "effect: the smallest mean delta, in standard deviations of the delta between "
        f"units, that one test finds in {TARGET_POWER:.0%} of such experiments if deltas "
        "are normal; its p must be below the level, "
        f"{_level_text([e[0].spec.statistics for e in tested.values()])}",
        style="dim",
        highlight=False,
    )
    if any(experiments[0].spec.statistics.test == "bootstrap" for experiments in tested.values()):
        console.print(
            "≥: computed for Student's t; the bootstrap-t has equal or lower power",
            style="dim",
            highlight=False,
        )
    for name, (fewest, most) in effects.items():
        if fewest.effect is None:
            some = "" if most.effect is None else f" in cells of {fewest.units}"
            console.print(_no_power_text(name, fewest, tested[name][0], some), highlight=False)
    if measured is not None:
        _print_measured(tested, effects, measured, plans, console)


def detectable_effects(
    variants: Sequence[ResolvedExperiment],
    plans: Mapping[str, ExperimentPlan],
    measured: MeasuredByVariant | None = None,
) -> tuple[DetectableEffect, DetectableEffect]:
    """Return the detectable effects of one experiment, with all its variants, for its cells with
    the fewest and the most units. Cells that can't differ aren't tested. If the base run was
    measured, only rows that satisfy `keep` count."""
    counts = [
        plan_measure_units(plans[v.key], number, _available_rows(v, measured), plans).counts
        for v in variants
        for number in _tested_measures(variants)
    ]
    every = np.concatenate(counts)
    settings = variants[0].spec.statistics
    fewest, most = (int(every.min()), int(every.max())) if len(every) else (0, 0)
    return detectable_effect(fewest, len(every), settings), detectable_effect(
        most, len(every), settings
    )


def plan_measure_units(
    plan: ExperimentPlan, number: int, rows: Ints, plans: Mapping[str, ExperimentPlan]
) -> PlannedUnits:
    """Return the units of one measure, as the run counts them."""
    shapes = {each.experiment.model.name: each.experiment.model.shape for each in plans.values()}
    model = plan.experiment.model

    def causal(name: str | None) -> bool:
        """Return whether a model is causal; one that isn't run is assumed to be like the own."""
        return shapes.get(name or model.name, model.shape).reads_prefix

    return plan_units(plan, number, rows, causal)


def _available_rows(experiment: ResolvedExperiment, measured: MeasuredByVariant | None) -> Ints:
    values = (measured or {}).get(experiment.key)
    return np.arange(len(experiment.table)) if values is None else values.kept


def _range_text(ends: Sequence[str]) -> str:
    """Format `4 to 16`, or one number if they are equal."""
    return " to ".join(dict.fromkeys(ends))


def _tested_measures(variants: Sequence[ResolvedExperiment]) -> list[int]:
    """Return the indices of the tested measures."""
    first = variants[0]
    if not first.rules:
        return []
    return [n for n, m in enumerate(first.spec.measures) if EFFECTS[m.effect].tested]


def _numeric_measures(experiment: ResolvedExperiment) -> list[int]:
    """Return the indices of the tested measures that have a standard deviation."""
    return [n for n in _tested_measures([experiment]) if experiment.measures[n].kind == "number"]


def _units_text(experiment: ResolvedExperiment, measured: MeasuredByVariant | None) -> str:
    by = experiment.spec.statistics.by
    what = "distinct rows" if by is None else f"values of {by}"
    unknown = experiment.keep and experiment.key not in (measured or {})
    return f"{what} before `keep`" if unknown else what


def _level_text(settings: Sequence[spec.Statistics]) -> str:
    said = {
        "none": "that of one test",
        "holm": "over the number of tests (Holm)",
    }
    words = dict.fromkeys(
        said.get(s.correction)
        or f"over the number of tests ({CORRECTION_NAMES.get(s.correction, s.correction)}: at most)"
        for s in settings
    )
    return ", or ".join(words)


def _may_pass_correction(effect: DetectableEffect, settings: spec.Statistics) -> bool:
    """Whether an effect may be significant although Bonferroni's level is out of reach: p is
    corrected by the maximum over cells, whose size depends on the cells."""
    return settings.correction == "max" and effect.smallest < 1 - settings.confidence / 100


def _detectable_text(effect: DetectableEffect, settings: spec.Statistics) -> str:
    if effect.effect is not None:
        least = "≥ " if settings.test == "bootstrap" else ""
        return f"{least}{effect.effect:.2f} SD"
    return "unknown" if effect.units > 1 and _may_pass_correction(effect, settings) else "none"


def _no_power_text(
    name: str, effect: DetectableEffect, experiment: ResolvedExperiment, some: str
) -> str:
    """Explain why no effect is detectable; `some` names the cells, if not all."""
    settings = experiment.spec.statistics
    if effect.units < MIN_UNITS:
        return f"{name}: no p-values: they need at least {MIN_UNITS}, but cells have {effect.units}"
    if _may_pass_correction(effect, settings):
        return (
            f"{name}: which effects can survive{some} depends on the correlation of cells: "
            f"the smallest p of {effect.units} is {effect.smallest:.3g}, also after "
            "correction by the maximum"
        )
    many = settings.correction == "bh"
    alone = f"one effect alone{some} can't" if many else f"no effect{some} can"
    return (
        f"{name}: {alone} survive: the smallest p of {effect.units} is {effect.smallest:.3g}, "
        f"but it must be below {effect.level:.3g}"
    )


# --- in the metric's units --------------------------------------------------------------------


def _print_measured(
    tested: Mapping[str, Sequence[ResolvedExperiment]],
    effects: Mapping[str, tuple[DetectableEffect, DetectableEffect]],
    measured: MeasuredByVariant,
    plans: Mapping[str, ExperimentPlan],
    console: Console,
) -> None:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("measured", overflow="fold")
    table.add_column("measure", overflow="fold")
    for title in ("of", "mean", "SD", "effect"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, variants in tested.items():
        for variant in variants:
            values = measured.get(variant.key)
            if values is None:
                continue
            for number in _numeric_measures(variant):
                units = plan_measure_units(plans[variant.key], number, values.kept, plans).codes
                for line in _measured_lines(
                    variant, number, values, units, effects[name][1].effect
                ):
                    table.add_row(variant.key, variant.measures[number].label, *line)
    console.print()
    console.print(table)
    console.print(
        "effect: the same effect in the metric's units, for cells with the most units, if "
        "the effect varies between units as the metric itself does (or as the difference of "
        "the two runs); for a ratio, as a fraction of its divisor's mean",
        style="dim",
        highlight=False,
    )


def _measured_lines(
    experiment: ResolvedExperiment,
    number: int,
    values: MeasuredValues,
    units: Ints,
    effect: float | None,
) -> list[tuple[str, str, str, str]]:
    """Describe base run and source − base: (name, mean, SD, detectable effect)."""
    base, source = experiment.spec.base, experiment.spec.source
    kind = EFFECTS[experiment.spec.measures[number].effect]
    start = values.unpatched[base][number]
    of: dict[str, Floats] = {base: start}
    if source is not None:
        of[f"{source} − {base}"] = values.unpatched[source][number] - start
    divisor = 1.0
    if kind.denominator is not None:
        ends = None if source is None or kind.circuit else values.unpatched[source][number]
        by = kind.denominator(start, start, start if ends is None else ends)
        divisor = abs(float(np.nanmean(by)))
    lines: list[tuple[str, str, str, str]] = []
    for what, rows in of.items():
        mean, spread = unit_moments(rows, units)
        part = f" of {kind.divisor}" if kind.denominator is not None else ""
        # If no unit differs from another, the variation of effects is unknown.
        shown = "–"
        if effect is not None and divisor and spread:
            shown = f"{effect * spread / divisor:.3g}{part}"
        lines.append((what, f"{mean:.3g}", f"{spread:.3g}", shown))
    return lines


def unit_moments(values: Floats, units: Ints) -> tuple[float, float]:
    """Return mean and standard deviation over the means of units.

    Args:
        values: Shape [environment, row], if a metric names the variable of an axis; the variances
            of
            environments are averaged.
        units: Shape [row].
    """
    means: list[float] = []
    variances: list[float] = []
    for row in values:
        there = np.isfinite(row)
        counts = np.bincount(units[there])
        sums = np.bincount(units[there], row[there])
        each = sums[counts > 0] / counts[counts > 0]
        if len(each) > 1:
            means.append(float(each.mean()))
            variances.append(float(each.var(ddof=1)))
    if not means:
        return float("nan"), float("nan")
    return float(np.mean(means)), float(np.sqrt(np.mean(variances)))


def print_plan(
    plan: Plan,
    console: Console,
    pass_tokens: int | None = None,
    prompt_tokens: int | None = None,
    measured: MeasuredByVariant | None = None,
    *,
    saving: Sequence[ResolvedExperiment] = (),
    trainings: Sequence[TrainingCost] = (),
) -> None:
    """Print the graph, the work per experiment, the detectable effects, the savings of each pass,
    and the cost of `save` lines and trainings.

    Args:
        pass_tokens: Maximum number of tokens of a pass over patched rows; None: the default.
        prompt_tokens: Maximum number of tokens of a batch of unpatched prompts; None: the default.
        measured: Measurements of base and source runs, if they were run.
        saving: Experiments with `save` lines.
        trainings: What `mechdsl fit` trains, whether the store has it or not.
    """
    console.print("intervention graph", style="bold")
    graph = to_text(add_save_nodes(plan.graph, saving))
    console.print(graph, highlight=False, markup=False, end="", soft_wrap=True)
    for rewrite in plan.rewrites:
        did = f"{rewrite.before} → {rewrite.after} nodes" if rewrite.changed else "no changes"
        console.print(f"pass {rewrite.name}: {did}", highlight=False)
    console.print()
    _print_experiments(plan, console)
    print_power(plan, console, measured)
    console.print()
    prompt_tokens = prompt_tokens or PROMPT_TOKENS
    cost = plan_cost(plan, pass_tokens or PASS_TOKENS, prompt_tokens)
    _print_savings(cost, console)
    saves = save_costs(saving, prompt_tokens)
    _print_saves(saves, console)
    deepest = max((experiment.model.shape.n_layers for experiment in saving), default=0)
    cost = replace(cost, blocks=max(cost.blocks, deepest))
    _print_estimate(plan, cost, saves, console)
    _print_trainings(trainings, console)


def _print_trainings(trainings: Sequence[TrainingCost], console: Console) -> None:
    """Print a line per training."""
    if not trainings:
        return
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("training", no_wrap=True)
    titles = ("rows", "held out", "steps", "forwards", "backward", "FLOPs", "memory", "time")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    rate, pace = measure_matmul_rate(), measure_host_pace()
    for each in trainings:
        table.add_row(
            each.name,
            f"{each.rows:,}",
            f"{each.held_out:,}",
            f"{each.steps:,}",
            f"{each.cost.forwards:,}",
            f"{each.cost.backwards:,}",
            f"{each.cost.flops:.3g}",
            format_size(each.memory),
            _time_text(estimate_training_seconds(each, rate, pace)),
        )
    console.print()
    console.print(table)
    console.print(
        "training: what `mechdsl fit` trains before the run unless it is stored, with the largest "
        "number of steps and the controls",
        style="dim",
        highlight=False,
    )
    console.print(
        "memory: vectors, trained weights and activations of a step, besides the model",
        style="dim",
        highlight=False,
    )
    for each in (training_cost for training_cost in trainings if training_cost.assumed):
        text = f"{each.name}: counted with {each.assumed} until its training decides the number"
        console.print(text, style="dim", highlight=False)


def estimate_training_seconds(training: TrainingCost, rate: float, pace: float) -> float:
    """Estimate the seconds of a training, without loading the model; `rate` and `pace` as in
    `estimate_time`."""
    cost = training.cost
    calls = (cost.forwards + cost.backwards) * training.blocks
    work = WorkAmounts(runs=0, calls=calls, block_tokens=cost.tokens, steps=training.steps)
    return estimate_time(work, cost.multiply_adds, rate, pace).passes


def _print_experiments(plan: Plan, console: Console) -> None:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("experiment", overflow="fold")
    for title in ("cells", "prompts", "rows", "unpatched"):
        table.add_column(title, justify="right", no_wrap=True)
    planned = [experiment for panel in plan.panels for experiment in panel.experiments]
    parts: dict[str, list[ExperimentPlan]] = {}
    for each in sorted(planned, key=lambda each: each.experiment.spec.span.start):
        parts.setdefault(get_whole_spec(each.experiment).key, []).append(each)
    for name, own in parts.items():
        said = f"{name}, read at {len(own):,} positions" if own[0].experiment.place else name
        table.add_row(
            said,
            f"{sum(each.experiment.n_there for each in own):,}",
            f"{len(own[0].experiment.table):,}",
            f"{sum(each.count() for each in own if not _is_estimated(each)):,}",
            f"{max(map(count_unpatched_rows, own)):,}",
        )
    console.print(table)
    whole = [each.experiment.name for each in planned if each.whole and not _is_estimated(each)]
    writing: dict[str, dict[str, None]] = {}
    for each in planned:
        said, own = each.experiment.generation, each.experiment.spec
        if said is not None and each.experiment.control_of is None:
            times = f" {said.samples} times" if said.samples > 1 else ""
            what = f"{count_noun(said.tokens, 'token')}{times}"
            writing.setdefault(what, {})[own.within or own.name] = None
    for what, names in writing.items():
        its = "its" if len(names) == 1 else "their"
        console.print(
            f"each row of {' and '.join(names)}, and of {its} base and source run, "
            f"generates up to {what}; the plan counts the maximum",
            highlight=False,
        )
    for each in planned:
        if said := each.experiment.spec.estimator:
            how = "forward and backward passes over its prompts"
            if said.kind.decomposes:
                how = "forward passes over two copies of the prompt for each row"
            console.print(
                f"{each.experiment.name} runs no row: `{said.text}` runs {how}",
                highlight=False,
            )
    if whole:
        console.print(
            f"rows of {', '.join(dict.fromkeys(whole))} are full forward passes: they can't "
            "reuse values cached from unpatched runs",
            highlight=False,
        )
    waiting = {e.experiment.name: e.experiment.stand_ins for e in planned if e.experiment.stand_ins}
    for name, others in waiting.items():
        console.print(
            f"{name} is counted with placeholders: its inputs are known only after "
            f"{' and '.join(others)} {'has' if len(others) == 1 else 'have'} run",
            highlight=False,
        )


def _is_estimated(plan: ExperimentPlan) -> bool:
    return plan.experiment.spec.estimator is not None


def _print_savings(cost: PlanCost, console: Console) -> None:
    """Print a line per pass with the remaining cost."""
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("left after", no_wrap=True)
    back = ("backward",) if cost.plain.backwards else ()
    for title in ("cells", "rows", "forwards", *back, "tokens×blocks", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("saves", justify="right", no_wrap=True)
    table.add_row("the plain loop", *_cost_figures(cost.plain, back=bool(back)), "")
    before = cost.plain
    for saving in cost.savings:
        after = saving.after
        if not saving.on:
            table.add_row(saving.name, *[""] * (5 + len(back)), "off", style="dim")
            continue
        changed = after != before
        share = 1 - after.multiply_adds / before.multiply_adds if before.multiply_adds else 0.0
        saved = f"{share:.0%}" if share >= 0.005 else "–"
        figures = _cost_figures(after, back=bool(back))
        table.add_row(saving.name, *figures, saved, style="" if changed else "dim")
        before = after
    console.print(table)
    counted = {saving.name for saving in cost.savings}
    for one in PASSES:
        if one.shown is not None and one.name not in counted:
            continue  # a pass for replies, but nothing is generated
        console.print(f"{one.name}: {one.does}", style="dim", highlight=False)


def _print_saves(saves: Sequence[SaveCost], console: Console) -> None:
    """Print a line per saved file; each is computed in separate passes, after all cells."""
    if not saves:
        return
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("saved to", overflow="fold")
    for title in ("sites", "vectors", "size", "forwards", "tokens×blocks", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    for save in saves:
        most = "≤ " if save.at_most else ""
        of_features = save.bytes is None
        table.add_row(
            save.file,
            f"{save.sites:,}" + " features" * of_features,
            f"{most}{save.vectors:,}" + " tokens" * of_features,
            "" if save.bytes is None else f"{most}{format_size(save.bytes)}",
            *_cost_figures(save.cost)[2:],
        )
    console.print()
    console.print(table)


def _cost_figures(cost: Cost, *, back: bool = False) -> list[str]:
    """Format the numbers of a cost; `back` includes backward passes."""
    return [
        f"{cost.cells:,}",
        f"{cost.rows:,}",
        f"{cost.forwards:,}",
        *([f"{cost.backwards:,}"] if back else []),
        f"{cost.tokens:,}",
        f"{cost.flops:.3g}",
    ]


def _print_estimate(
    plan: Plan, cost: PlanCost, saves: Sequence[SaveCost], console: Console
) -> None:
    """Print the estimated seconds of a run and of a plain loop; `saves`: the `save` lines."""
    rate, pace = measure_matmul_rate(), measure_host_pace()
    saving = sum((save.cost for save in saves), Cost())
    streamed = sum(save.streamed for save in saves)
    plain, planned = (
        _seconds_text(plan, each + saving, cost.blocks, rate, pace, streamed)
        for each in (cost.plain, cost.planned)
    )
    console.print(
        f"about {_time_text(planned.total)} on this CPU, {_time_text(plain.total)} "
        f"as a plain loop, at {2 * rate / 1e9:.0f} GFLOP/s in a large matrix product",
        highlight=False,
    )
    console.print(
        f"of these {_time_text(planned.loading)} to import libraries and load models, "
        f"{_time_text(planned.prompts)} to build prompts, {_time_text(planned.passes)} to "
        "run the model and "
        f"{_time_text(planned.statistics)} for statistics",
        highlight=False,
    )


def _seconds_text(
    plan: Plan, cost: Cost, blocks: int, rate: float, pace: float, streamed: int = 0
) -> TimeEstimate:
    work = count_work(plan, cost, blocks, streamed)
    return estimate_time(work, cost.multiply_adds, rate, pace)


def _time_text(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def print_profile(
    plan: Plan, profile: ExecutionProfile, sizes: PassSizes, console: Console
) -> None:
    """Print estimates and measurements after a run."""
    cost = plan_cost(plan, sizes.pass_tokens, sizes.prompt_tokens)
    console.print("profile", style="bold")
    table = Table(box=None, padding=(0, 2), show_edge=False)
    for title in ("", "estimated", "measured"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    measured = profile.unpatched_seconds + profile.patched_seconds
    planned = cost.planned
    seconds = _seconds_text(plan, planned, cost.blocks, measure_matmul_rate(), measure_host_pace())
    table.add_row("rows", f"{planned.rows:,}", f"{profile.distinct:,}")
    passes = profile.passes + profile.unpatched_passes
    table.add_row("forwards", f"{planned.forwards:,}", f"{passes:,}")
    table.add_row("seconds", f"{seconds.passes:.3g}", f"{measured:.3g}")
    console.print(table)
    console.print(
        f"{profile.unpatched_seconds:.3g} s for unpatched runs, means and checks, "
        f"{profile.patched_seconds:.3g} s for {profile.rows:,} patched rows, of which "
        f"{profile.distinct:,} are distinct"
        + (f", and {profile.estimated:,} estimated rows" if profile.estimated else ""),
        highlight=False,
    )
    if profile.tokens:
        largest = max(profile.tokens)
        rate_seen = sum(profile.tokens) / max(profile.patched_seconds, 1e-9)
        console.print(
            f"passes of up to {largest:,} tokens, {rate_seen:,.0f} tokens of rows per second",
            highlight=False,
        )


def count_unpatched_rows(plan: ExperimentPlan) -> int:
    """Count the prompts of all unpatched runs of the experiment, per noise draw."""
    table = plan.experiment.table
    return sum(len(table) * table.runs[name].draws for name in plan.runs)
