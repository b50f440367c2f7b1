"""What is known of p before anything is measured: how small it can get. No numpy here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import neg

from mechdsl.base.plural import plural
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.w07_statistics import TooFewPrompts
from mechdsl.program import spec
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.prompts.prompt_table import RunRow
from mechdsl.resolve.resolved import ResolvedExperiment, cells_of
from mechdsl.vocab.effects import EFFECTS

EXACT_UP_TO = 14
"""Prompts with a non-zero delta up to which all sign flips are enumerated."""

CORRECTION_NAMES: Mapping[str, str] = {
    "holm": "Holm",
    "bh": "Benjamini-Hochberg",
    "max": "max-statistic",
    "none": "none",
}
"""How `stats correct WORD` is called."""


MOST_DRAWN = 100_000
"""Sign flips or resamples, unless the file asks for more of them."""
FEWEST_UNITS = 5
"""Units below which a cell has neither an interval nor a p."""


def smallest_p(units: int, settings: spec.Statistics) -> float:
    """The least p that so many units can have: 2^(1 − n), as often all signs are equal by chance,
    and no less than one flip or resample among all; 1 where units are too few for a test."""
    if units < FEWEST_UNITS:
        return 1.0
    least = 2.0 ** (1 - units)
    if settings.test == "bootstrap":
        return max(least, 2 / (max(MOST_DRAWN, settings.resamples) + 1))
    if settings.test == "flips" and units > EXACT_UP_TO:
        return max(least, 2 / (MOST_DRAWN + 1))
    return least


def out_of_reach(units: Sequence[int], settings: spec.Statistics) -> list[int]:
    """Places of the cells that can't survive the correction, however large their effects.

    units: of every cell that is tested, prompts or groups.
    """
    least = sorted((smallest_p(each, settings) for each in units), reverse=True)
    level = 1 - settings.confidence / 100
    found: list[int] = []
    for place, each in enumerate(units):
        own = smallest_p(each, settings)
        # Holm multiplies by the cells that are left when all with a smaller p have been rejected;
        # the others may leave it as it is
        left = bisect_right(least, -own, key=neg) if settings.correction == "holm" else 1
        if own * left >= level:
            found.append(place)
    return found


def check_rows(variants: Sequence[ResolvedExperiment]) -> list[Diagnostic]:
    """W0720 where p of an experiment, or of a block of it, can't be small enough, however large the
    effect."""
    experiment = variants[0]
    tested = tested_measures(experiment)
    if not tested or not experiment.rules:
        return []
    settings = experiment.spec.statistics
    blocks: dict[object, list[ResolvedExperiment]] = {}
    for each in variants:
        blocks.setdefault(dict(each.spec.variant).get(BLOCKS), []).append(each)
    units: list[int] = []
    for own in blocks.values():
        count = _units(own[0].table.runs["clean"].rows, settings)
        units += [count] * len(tested) * _cells(own)
    found = check_cells(units, settings, tested[0].span, unit_of(experiment))
    return found or _check_groups(blocks.values(), len(tested))


def _units(rows: Sequence[RunRow], settings: spec.Statistics) -> int:
    """Rows, or values of the variable that `stats by` names."""
    if settings.by is None or not rows or settings.by not in rows[0].values:
        return len(rows)
    return len({str(row.values.get(settings.by)) for row in rows})


def _check_groups(
    blocks: Iterable[Sequence[ResolvedExperiment]], measures: int
) -> list[Diagnostic]:
    """W0720 for each table by values of the prompts in which no cell can survive. All its cells are
    one family, but those that have too few rows for a p."""
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
                units += [_units(rows, settings)] * measures * _cells(own)
        units = [each for each in units if each >= FEWEST_UNITS] or units
        if units and len(out_of_reach(units, settings)) == len(units):
            where = f"in the table by {by}, "
            unit = unit_of(experiment)
            found += check_cells(units, settings, report.span, unit, where)
    return found


def _cells(variants: Sequence[ResolvedExperiment]) -> int:
    """How many cells the results have; a part that is read in the cells of one value has those."""
    over, count = variants[0].spec.over, 0
    for each in variants:
        fixed = {} if each.place is None else each.place.fixed
        counted = [axis for axis in each.axes if axis.name not in fixed]
        if over is not None:
            counted = [axis for axis in counted if over not in (axis.name, axis.alias)]
        count += cells_of(counted, each.nested and each.nested.along(each.nested.axes, fixed))
    labels = {str(dict(each.spec.variant).get(over or "", "")) for each in variants}
    return count // len(labels)


def unit_of(experiment: ResolvedExperiment) -> str:
    """What its rows are."""
    return "image" if experiment.model.shape.takes == "image" else "prompt"


def tested_measures(experiment: ResolvedExperiment) -> list[spec.Measure]:
    """Its measures that have a p."""
    known = [m for m in experiment.spec.measures if m.effect in EFFECTS]
    return [m for m in known if EFFECTS[m.effect].tested]


def check_cells(
    units: Sequence[int],
    settings: spec.Statistics,
    span: Span | None,
    unit: str = "prompt",
    where: str = "",
) -> list[Diagnostic]:
    """W0720 where cells have so few prompts (or groups) that no p of theirs is small enough.

    units: of every cell that is tested. unit: what a row is. where: which cells these are.
    """
    lost = out_of_reach(units, settings)
    if not lost:
        return []
    few = sorted({units[place] for place in lost})
    have = " to ".join(str(each) for each in dict.fromkeys((few[0], few[-1])))
    several = "s" if have != "1" else ""
    word = f"value{several} of {settings.by}" if settings.by is not None else f"{unit}{several}"
    have = f"{have} {word}"
    about = f"{where}with {have} no cell can survive the correction"
    if len(lost) < len(units):
        about = f"{len(lost)} of {len(units)} cells have {have}, and can't survive the correction"
    smallest = smallest_p(few[-1], settings)
    corrected = smallest * (len(units) if settings.correction == "holm" else 1)
    name, cells = CORRECTION_NAMES[settings.correction], plural(len(units), "cell")
    reach = f"the smallest p is {smallest:.3g}, corrected ({name}, {cells}) {min(1, corrected):.3g}"
    if few[-1] < FEWEST_UNITS:
        reach = f"below {FEWEST_UNITS} there is neither an interval nor a p"
    return [
        TooFewPrompts(
            span=span,
            about=about,
            reach=reach,
            unit=unit,
        )
    ]
