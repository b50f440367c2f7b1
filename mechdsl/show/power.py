"""What effects an experiment's rows can show: the part of `mechdsl plan` that is about power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.base.arrays import Floats, Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.plan import Plan
from mechdsl.program import spec
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.results.planned_units import PlannedUnits, planned_units
from mechdsl.statistics.power import POWER, Detectable, detectable
from mechdsl.validate.check_file import by_name
from mechdsl.validate.reachable_p import CORRECTION_NAMES
from mechdsl.vocab.effects import EFFECTS

if TYPE_CHECKING:  # it imports torch, which a plan doesn't need
    from mechdsl.execute.measured_values import MeasuredValues

Measured: TypeAlias = "Mapping[str, MeasuredValues]"
"""Experiment variant, by its key → what its base run and its source run gave."""


def print_power(plan: Plan, console: Console, measured: Measured | None = None) -> None:
    """A line per experiment that tests something; with what was measured, one per measure too."""
    plans = {p.experiment.key: p for panel in plan.panels for p in panel.experiments}
    ordered = sorted((p.experiment for p in plans.values()), key=lambda e: e.spec.span.start)
    tested = {each[0].name: each for each in by_name(ordered) if _tests(each)}
    if not tested:
        return
    found = {name: power_of(each, plans, measured) for name, each in tested.items()}
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("power", overflow="fold")
    for title in ("units", "tests", "level", "effect"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, each in found.items():
        table.add_row(
            name,
            f"{_range([f'{end.units:,}' for end in each])} {_units(tested[name][0], measured)}",
            f"{each[0].tests:,}",
            f"{each[0].level:.2g}",
            _range([_effect(end, tested[name][0].spec.statistics) for end in each]),
        )
    console.print()
    console.print(table)
    console.print(
        f"effect: the smallest mean delta, in standard deviations of the delta from unit to unit, "
        f"that one test finds in {POWER:.0%} of such experiments, were deltas normal; its p has to "
        f"be below the level, {_levels([e[0].spec.statistics for e in tested.values()])}",
        style="dim",
        highlight=False,
    )
    if any(each[0].spec.statistics.test == "bootstrap" for each in tested.values()):
        console.print(
            "≥: of Student's t; the bootstrap-t finds as much or less",
            style="dim",
            highlight=False,
        )
    for name, (fewest, most) in found.items():
        if fewest.effect is None:
            some = "" if most.effect is None else f" in cells of {fewest.units}"
            console.print(_nothing(name, fewest, tested[name][0], some), highlight=False)
    if measured is not None:
        _print_measured(tested, found, measured, plans, console)


def power_of(
    variants: Sequence[ResolvedExperiment],
    plans: Mapping[str, ExperimentPlan],
    measured: Measured | None = None,
) -> tuple[Detectable, Detectable]:
    """Of one experiment, all variants together: of its cells with the fewest and the most units.
    Cells that can't differ aren't tested. Where the base run was measured, `keep` has left the rows
    that there are."""
    counts = [
        units_of(plans[v.key], number, _rows(v, measured), plans).counts
        for v in variants
        for number in _tests(variants)
    ]
    every = np.concatenate(counts)
    settings = variants[0].spec.statistics
    fewest, most = (int(every.min()), int(every.max())) if len(every) else (0, 0)
    return detectable(fewest, len(every), settings), detectable(most, len(every), settings)


def units_of(
    plan: ExperimentPlan, number: int, rows: Ints, plans: Mapping[str, ExperimentPlan]
) -> PlannedUnits:
    """Of one measure, as the run counts them."""
    shapes = {each.experiment.model.name: each.experiment.model.shape for each in plans.values()}
    own = plan.experiment.model

    def causal(name: str | None) -> bool:
        """A model on which nothing is run isn't known; it is taken to be like the own one."""
        return shapes.get(name or own.name, own.shape).causal

    return planned_units(plan, number, rows, causal)


def _rows(experiment: ResolvedExperiment, measured: Measured | None) -> Ints:
    values = (measured or {}).get(experiment.key)
    return np.arange(len(experiment.table)) if values is None else values.kept


def _range(ends: Sequence[str]) -> str:
    """`4 to 16`, or one of them where they are the same."""
    return " to ".join(dict.fromkeys(ends))


def _tests(variants: Sequence[ResolvedExperiment]) -> list[int]:
    """Numbers of the measures that are tested."""
    first = variants[0]
    if not first.rules:
        return []
    return [n for n, m in enumerate(first.spec.measures) if EFFECTS[m.effect].tested]


def _of_numbers(experiment: ResolvedExperiment) -> list[int]:
    """Those of them that have a standard deviation."""
    return [n for n in _tests([experiment]) if experiment.measures[n].kind == "number"]


def _units(experiment: ResolvedExperiment, measured: Measured | None) -> str:
    by = experiment.spec.statistics.by
    what = "distinct rows" if by is None else f"values of {by}"
    unknown = experiment.keep and experiment.key not in (measured or {})
    return f"{what} before `keep`" if unknown else what


def _levels(settings: Sequence[spec.Statistics]) -> str:
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


def _by_others(found: Detectable, settings: spec.Statistics) -> bool:
    """Whether an effect may survive though Bonferroni's level is out of reach: the maximum over
    cells corrects p, and how large that is hangs on them."""
    return settings.correction == "max" and found.smallest < 1 - settings.confidence / 100


def _effect(found: Detectable, settings: spec.Statistics) -> str:
    if found.effect is not None:
        least = "≥ " if settings.test == "bootstrap" else ""
        return f"{least}{found.effect:.2f} SD"
    return "unknown" if found.units > 1 and _by_others(found, settings) else "none"


def _nothing(name: str, found: Detectable, experiment: ResolvedExperiment, some: str) -> str:
    """some: in which cells, where it isn't all."""
    settings = experiment.spec.statistics
    if found.units < 2:
        return f"{name}: {found.units} of them show nothing"
    if _by_others(found, settings):
        return (
            f"{name}: what can survive{some} hangs on how cells are correlated: the smallest p of "
            f"{found.units} is {found.smallest:.3g}, corrected by the maximum too"
        )
    many = settings.correction == "bh"
    alone = f"one effect alone{some} can't" if many else f"no effect{some} can"
    return (
        f"{name}: {alone} survive: the smallest p of {found.units} is {found.smallest:.3g}, and it "
        f"has to be below {found.level:.3g}"
    )


# --- in the metric's units --------------------------------------------------------------------


def _print_measured(
    tested: Mapping[str, Sequence[ResolvedExperiment]],
    found: Mapping[str, tuple[Detectable, Detectable]],
    measured: Measured,
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
            for number in _of_numbers(variant):
                units = units_of(plans[variant.key], number, values.kept, plans).codes
                for line in _lines(variant, number, values, units, found[name][1].effect):
                    table.add_row(variant.key, variant.measures[number].label, *line)
    console.print()
    console.print(table)
    console.print(
        "effect: the same in the metric's units in cells with the most units, if the effect varies "
        "between units as the metric itself does (or as what separates the two runs); of a ratio, "
        "as a part of its divisor's mean",
        style="dim",
        highlight=False,
    )


def _lines(
    experiment: ResolvedExperiment,
    number: int,
    values: MeasuredValues,
    units: Ints,
    effect: float | None,
) -> list[tuple[str, str, str, str]]:
    """Of the base run, and of source − base: what it is of, mean, SD and the effect."""
    base, source = experiment.spec.base, experiment.spec.source
    kind = EFFECTS[experiment.spec.measures[number].effect]
    start = values.unpatched[base][number]
    of: dict[str, Floats] = {base: start}
    if source is not None:
        of[f"{source} − {base}"] = values.unpatched[source][number] - start
    divisor = 1.0
    if kind.denominator is not None:
        ends = None if source is None else values.unpatched[source][number]
        by = kind.denominator(start, start, start if ends is None else ends)
        divisor = abs(float(np.nanmean(by)))
    lines: list[tuple[str, str, str, str]] = []
    for what, rows in of.items():
        mean, spread = by_unit(rows, units)
        part = f" of {kind.divisor}" if kind.denominator is not None else ""
        # where no unit differs from another nothing is known of how effects will
        shown = "–"
        if effect is not None and divisor and spread:
            shown = f"{effect * spread / divisor:.3g}{part}"
        lines.append((what, f"{mean:.3g}", f"{spread:.3g}", shown))
    return lines


def by_unit(values: Floats, units: Ints) -> tuple[float, float]:
    """Mean and standard deviation over the means of units.

    values: [environment, row], where a metric names what an axis runs over; their variances are
        averaged
    units: [row]
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
