"""What effects an experiment's rows can show: the part of `mechdsl plan` that is about power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from mechdsl.base.arrays import Floats, Ints
from mechdsl.plan.plan import ExperimentPlan, Plan
from mechdsl.program import spec
from mechdsl.resolve.resolved import ResolvedExperiment
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
            f"{each.units:,} {_units(tested[name][0], measured)}",
            f"{each.tests:,}",
            f"{each.level:.2g}",
            "none" if each.effect is None else f"{each.effect:.2f} SD",
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
    for name, each in found.items():
        if each.effect is None:
            console.print(_nothing(name, each, tested[name][0]), highlight=False)
    if measured is not None:
        _print_measured(tested, found, measured, console)


def power_of(
    variants: Sequence[ResolvedExperiment],
    plans: Mapping[str, ExperimentPlan],
    measured: Measured | None = None,
) -> Detectable:
    """Of one experiment, all variants together; cells that can't differ aren't tested. Where the
    base run was measured, `keep` has left the rows that there are."""
    cells = sum(int(np.count_nonzero(plans[v.key].exists & ~plans[v.key].inert)) for v in variants)
    rows = {v.key: np.arange(len(v.table)) for v in variants}
    rows |= {key: values.kept for key, values in (measured or {}).items() if key in rows}
    units = min(int(units_of(v, rows[v.key]).max(initial=-1)) + 1 for v in variants)
    return detectable(units, len(_tests(variants)) * cells, variants[0].spec.statistics)


def units_of(experiment: ResolvedExperiment, rows: Ints) -> Ints:
    """[row] the number of its unit: the value of `stats by NAME`, else rows of equal texts and
    tokens in all runs, which no measure tells apart."""
    table, by = experiment.table, experiment.spec.statistics.by
    clean = table.runs["clean"].rows
    if by is not None and all(by in clean[row].values for row in rows):
        keys = [str(clean[row].values.get(by)) for row in rows]
    else:
        keys = [
            tuple(
                (run.rows[row].ids, tuple(sorted(run.rows[row].texts.items())))
                for run in table.runs.values()
            )
            for row in rows
        ]
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


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


def _nothing(name: str, found: Detectable, experiment: ResolvedExperiment) -> str:
    settings = experiment.spec.statistics
    if found.units < 2:
        return f"{name}: {found.units} of them show nothing"
    alone = "one effect alone can't" if settings.correction in ("bh", "max") else "no effect can"
    return (
        f"{name}: {alone} survive: the smallest p of {found.units} is {found.smallest:.3g}, and it "
        f"has to be below {found.level:.3g}"
    )


# --- in the metric's units --------------------------------------------------------------------


def _print_measured(
    tested: Mapping[str, Sequence[ResolvedExperiment]],
    found: Mapping[str, Detectable],
    measured: Measured,
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
                for line in _lines(variant, number, values, found[name].effect):
                    table.add_row(variant.key, variant.measures[number].label, *line)
    console.print()
    console.print(table)
    console.print(
        "effect: the same in the metric's units, if the effect varies between units as the metric "
        "itself does (or as what separates the two runs); of a ratio, as a part of its divisor's "
        "mean",
        style="dim",
        highlight=False,
    )


def _lines(
    experiment: ResolvedExperiment, number: int, values: MeasuredValues, effect: float | None
) -> list[tuple[str, str, str, str]]:
    """Of the base run, and of source − base: what it is of, mean, SD and the effect."""
    base, source = experiment.spec.base, experiment.spec.source
    units = units_of(experiment, values.kept)
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
