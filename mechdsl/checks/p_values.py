"""Check p-values before the run: whether an experiment can reach a small p-value. No numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mechdsl.base.source import Span
from mechdsl.base.text import count_noun
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.statistics import TooFewPrompts
from mechdsl.program import spec
from mechdsl.program.significance import (
    CORRECTION_NAMES,
    MIN_UNITS,
    smallest_p_value,
    unreachable_cells,
)
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.prompts.runs import RunRow
from mechdsl.resolve.types import ResolvedExperiment, count_cells
from mechdsl.vocab.effects import EFFECTS


def check_reachable_p(variants: Sequence[ResolvedExperiment]) -> list[Diagnostic]:
    """Report W0720 if the p-values of an experiment, or of one of its blocks, can't be small enough
    for any effect size."""
    experiment = variants[0]
    tested = tested_measures(experiment)
    if not tested or not experiment.rules:
        return []
    settings = experiment.spec.statistics
    blocks: dict[object, list[ResolvedExperiment]] = {}
    for each in variants:
        blocks.setdefault(dict(each.spec.variant).get(PROMPTS_AXIS), []).append(each)
    units: list[int] = []
    for own in blocks.values():
        count = _count_units(own[0].table.runs["clean"].rows, settings)
        units += [count] * _count_tests(own)
    found = check_cell_units(units, settings, tested[0].span, row_unit(experiment))
    return found or _check_groups(blocks.values())


def _count_units(rows: Sequence[RunRow], settings: spec.Statistics) -> int:
    """Count rows, or values of the variable in `stats by`."""
    if settings.by is None or not rows or settings.by not in rows[0].values:
        return len(rows)
    return len({str(row.values.get(settings.by)) for row in rows})


def _check_groups(blocks: Iterable[Sequence[ResolvedExperiment]]) -> list[Diagnostic]:
    """Report W0720 for each table by values of the prompts in which no cell can be significant. All
    its cells are one family, except those with too few rows for a p-value."""
    blocks = list(blocks)
    experiment = blocks[0][0]
    settings, found = experiment.spec.statistics, list[Diagnostic]()
    for report in experiment.spec.reports:
        by, units = report.by, list[int]()
        if by is None:
            continue
        for own in blocks:
            groups: dict[str, list[RunRow]] = {}
            for row in own[0].table.runs["clean"].rows:
                if by in row.values:
                    groups.setdefault(str(row.values[by]), []).append(row)
            for rows in groups.values():
                units += [_count_units(rows, settings)] * _count_tests(own)
        units = [each for each in units if each >= MIN_UNITS] or units
        if units and len(unreachable_cells(units, settings)) == len(units):
            where = f"in the table by {by}, "
            unit = row_unit(experiment)
            found += check_cell_units(units, settings, report.span, unit, where)
    return found


def _count_tests(variants: Sequence[ResolvedExperiment]) -> int:
    """Count the numbers of the measures with a p-value: an effect of unpatched runs is one number,
    and a metric doesn't depend on what is observed."""
    first, count = variants[0], 0
    for said, measure in zip(first.spec.measures, first.measures, strict=True):
        if said.effect not in EFFECTS or not EFFECTS[said.effect].tested:
            continue
        one = not EFFECTS[said.effect].of_intervention and not measure.observed
        count += 1 if one else _count_cells(variants, observed=measure.observed)
    return count


def _count_cells(variants: Sequence[ResolvedExperiment], *, observed: bool) -> int:
    """Count the cells of the results; a part for one value has only that value's cells.

    Args:
        observed: Whether to distinguish cells that differ only in what is observed.
    """
    over, count = variants[0].spec.over, 0
    for each in variants:
        fixed = {} if each.place is None else each.place.fixed
        left_out = fixed.keys() | (frozenset() if observed else each.observed_axes)
        counted = [axis for axis in each.axes if axis.name not in left_out]
        if over is not None:
            counted = [axis for axis in counted if over not in (axis.name, axis.alias)]
        count += count_cells(counted, each.nested and each.nested.along(each.nested.axes, fixed))
    labels = {str(dict(each.spec.variant).get(over or "", "")) for each in variants}
    return count // len(labels)


def row_unit(experiment: ResolvedExperiment) -> str:
    """Return the name of one row."""
    return "image" if experiment.model.shape.takes == "image" else "prompt"


def tested_measures(experiment: ResolvedExperiment) -> list[spec.Measure]:
    """Return the measures that have a p-value."""
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    return [m for m in known if EFFECTS[m.effect].tested]


def check_cell_units(
    units: Sequence[int],
    settings: spec.Statistics,
    span: Span | None,
    unit: str = "prompt",
    where: str = "",
    *,
    measured: bool = False,
) -> list[Diagnostic]:
    """Report W0720 if cells have so few prompts (or groups) that no p-value can be small enough.

    Args:
        units: Number of units of every cell that may be tested.
        unit: Name of one row.
        where: Description of the cells.
        measured: Whether all these cells are tested; before a run, some may prove to be inert.
    """
    lost = unreachable_cells(units, settings)
    if not lost:
        return []
    few = sorted({units[place] for place in lost})
    have = " to ".join(str(each) for each in dict.fromkeys((few[0], few[-1])))
    several = "s" if have != "1" else ""
    word = f"value{several} of {settings.by}" if settings.by is not None else f"{unit}{several}"
    have = f"{have} {word}"
    smallest, level = smallest_p_value(few[-1], settings), 1 - settings.confidence / 100
    is_certain = measured or smallest >= level
    about = f"{where}with {have}, no cell can be significant after correction"
    if len(lost) < len(units):
        about = (
            f"{len(lost)} of {len(units)} cells have only {have} and can't be significant "
            "after correction"
        )
        about += "" if is_certain else f" if all {len(units)} cells are tested"
    elif not is_certain:
        most = math.ceil(level / smallest) - 1  # Holm rejects the smallest p first
        about += f" if more than {most} of the {len(units)} cells are tested"
    corrected = smallest * (len(units) if settings.correction == "holm" else 1)
    name, cells = CORRECTION_NAMES[settings.correction], count_noun(len(units), "cell")
    reach = (
        f"the smallest possible p is {smallest:.3g}, or {min(1, corrected):.3g} after "
        f"correction ({name}, {cells})"
    )
    if few[-1] < MIN_UNITS:
        reach = f"intervals and p-values need at least {MIN_UNITS}"
    if not is_certain:
        reach += "; cells without any possible effect aren't tested"
    return [
        TooFewPrompts(
            span=span,
            about=about,
            reach=reach,
            unit=unit,
        )
    ]
