"""Conventions of statistics in words, and cells ranked by size.

They describe the computation of means, intervals and p-values, and which experiment selected sites
on the same rows. Reports and expectations rank cells by size; `top n of` ranks them by sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from mechdsl.base.records import Registry
from mechdsl.base.text import count_noun
from mechdsl.program.estimators import find_estimator
from mechdsl.program.significance import CORRECTION_NAMES
from mechdsl.program.spec import PROMPTS_AXIS
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.cell_statistics import SHARE_RUNS, is_share, mean_range, share_mask
from mechdsl.statistics.measurements import (
    NO_INTERVAL_REASONS,
    CellStatistics,
    MeasureData,
    cells_by_view,
    may_round_differently,
)
from mechdsl.vocab.aggregates import ROW_STATISTICS
from mechdsl.vocab.metrics import EFFECTS, EffectKind

_METHODS = {
    "t": "Student's t corrected for skewness, over {over}",
    "flips": "inverted sign flips over {over}",
    "bootstrap": "bootstrap-t over {over}, at least {n:,} resamples, or Student's t where that is "
    "wider",
}

WITHHELD_TEXTS: Mapping[str, str] = {
    "skewed": "effects are too skewed for a valid correction (W0723)",
    "picked": "sites were picked on the same rows (W0721)",
}

ABLATED_EFFECTS = ("faithfulness", "completeness")
"""Effects that are 0 in the run with everything ablated."""

CHANGE_FORMULA = "m(patched) − m(base)"


def statistics_conventions(
    result: ExperimentResult, effects: Registry[EffectKind]
) -> dict[str, str]:
    """Describe the methods of means, intervals and p-values, for the text below every table."""
    settings = result.settings
    if settings is None or not result.statistics:
        return {}
    said = {
        data.called: _effect_formula(data, effects, result)
        for data in result.measures
        if data.kind == "number"
    }
    conventions: dict[str, str] = {}
    if result.selected:
        conventions["selection"] = (
            f"{selection_text(result)}: effects look larger here than on new rows"
        )
    if said:
        conventions["effect"] = "; ".join(f"{name} = {formula}" for name, formula in said.items())
        conventions["interval"] = _interval_text(result)
    for name, entry in ROW_STATISTICS.items():
        failures = [
            statistic.failures[name]
            for statistic in result.statistics
            if name in statistic.failures
        ]
        if any(name in statistic.further for statistic in result.statistics):
            conventions[name] = "; ".join([entry.documentation, *dict.fromkeys(failures)])
    test = next((statistic.test for statistic in result.statistics if statistic.test), None)
    tests = max(statistic.tests for statistic in result.statistics)
    if test and tests:
        conventions["p"] = test
        conventions["correction"] = (
            f"{CORRECTION_NAMES[settings.correction]}, over {count_noun(tests, 'cell')}"
        )
        repeated = sum(int(np.count_nonzero(statistic.repeated)) for statistic in result.statistics)
        if repeated:
            conventions["correction"] += (
                f"; {count_noun(repeated, 'further cell')} not counted, as the measure can't "
                "differ there from a counted cell"
            )
        conventions["correction"] += _withheld_text(result)
    conventions |= _equal_draws(result)
    conventions |= _rounding(result)
    conventions["seed"] = str(result.seed)
    return conventions


def _equal_draws(result: ExperimentResult) -> dict[str, str]:
    texts = {n: describe_equal_draws(result, n) for n in range(len(result.measures))}
    said = [f"{result.measures[n].called}: {text}" for n, text in texts.items() if text]
    return {"equal draws": "; ".join(said)} if said else {}


def _rounding(result: ExperimentResult) -> dict[str, str]:
    small = sum(int(np.count_nonzero(statistic.at_rounding)) for statistic in result.statistics)
    said: list[str] = []
    if small:
        said.append(
            f"{count_noun(small, 'cell')} with a mean effect no larger than rounding alone can "
            "produce, not counted as significant"
        )
    pairs = zip(result.measures, result.statistics, strict=True)
    changing = sum(int(np.count_nonzero(may_round_differently(*pair))) for pair in pairs)
    if changing:
        said.append(
            f"{count_noun(changing, 'cell')} in which rounding may change single prompts of "
            "the base run"
        )
    if near := _count_inside_by_rounding(result):
        said.append(
            f"{count_noun(near, 'cell')} outside of the null band by no more than rounding, "
            "counted as inside"
        )
    moved = {run: result.accuracy_bound(run) for run in result.accuracy}
    said += [f"the accuracy of {run} by up to {by:.2g}" for run, by in moved.items() if by]
    return {"rounding": f"{', '.join(said)}; {result.rounding}"} if said else {}


def _count_inside_by_rounding(result: ExperimentResult) -> int:
    pairs = zip(result.controls, result.statistics, strict=False)  # no controls, or one a measure
    decided = [
        band.decides & band.is_inside_by_rounding(statistics.mean)
        for band, statistics in pairs
        if band
    ]
    return sum(int(np.count_nonzero(each)) for each in decided)


def describe_equal_draws(result: ExperimentResult, measure: int) -> str:
    """Describe the cells whose random controls all have the same effect; empty if there are none.

    Random circuits with few edges often equal the fully ablated run: being better than all of them
    is then being better than one run.
    """
    band = result.control(measure)
    if band is None or band.title == "untrained":
        return ""
    statistic = result.statistics[measure]
    equal = np.flatnonzero(band.is_one_value(statistic.rounding))
    if not len(equal):
        return ""
    ablated = ""
    if result.measures[measure].effect in ABLATED_EFFECTS:
        at_zero = np.maximum(np.abs(band.low), np.abs(band.high)) <= statistic.rounding
        ablated = ", that of the run with everything ablated" if at_zero[equal].all() else ""
    cells = len(result.cells)
    which = "" if cells == 1 else f" in {len(equal):,} of {count_noun(cells, 'cell')}"
    return (
        f"all draws have the same effect{which}{ablated}: their range has no width, so it doesn't "
        f"show how much {band.what} differ"
    )


def _withheld_text(result: ExperimentResult) -> str:
    """Describe the measures whose p isn't corrected; empty if there are none."""
    pairs = zip(result.measures, result.statistics, strict=True)
    tested = [(data, statistics) for data, statistics in pairs if statistics.tested.any()]
    text = ""
    for why in dict.fromkeys(
        statistics.withheld for _, statistics in tested if statistics.withheld
    ):
        names = [
            f"{data.called} of {data.label}"
            for data, statistics in tested
            if statistics.withheld == why
        ]
        measures = f" for {', '.join(names)}" if len(names) < len(tested) else ""
        text += f"; withheld{measures}, as {WITHHELD_TEXTS[why]}"
    return text


def selection_text(result: ExperimentResult) -> str:
    """Return `heads picked sites from 16 cells on the same 32 rows` per selecting experiment."""
    return "; ".join(
        f"`{selection.of}` picked sites from {count_noun(selection.cells, 'cell')} on "
        + (
            f"the same {count_noun(selection.rows, 'row')}"
            if selection.shared == selection.rows
            else f"{selection.shared:,} of these {count_noun(selection.rows, 'row')}"
        )
        for selection in result.selected
    )


def _effect_formula(
    data: MeasureData, effects: Registry[EffectKind], result: ExperimentResult
) -> str:
    """Return the formula of an effect."""
    effect = effects[data.effect]
    formula = effect.per_prompt_formula or "" if data.per_prompt else effect.formula
    kind = find_estimator(data.estimator)
    if kind is not None and not kind.is_effect:
        return kind.formula
    if data.estimator and effect.of_intervention:
        return formula.replace("(m(patched) − m(base))", "estimate").replace(
            CHANGE_FORMULA, "estimate"
        )
    if effect.circuit is not None and result.circuit is None:  # a circuit of nodes
        return formula.replace("every edge", "everything")
    return formula


def _interval_text(result: ExperimentResult) -> str:
    """Describe the intervals, by the types of values in the result."""
    settings, sampling = result.settings, result.sampling
    assert settings is not None
    every = [data for data in result.measures if data.kind == "number"]
    numbers = [data for data in every if data.spread == "rows"]
    if not numbers:
        return "; ".join(dict.fromkeys(NO_INTERVAL_REASONS[data.spread] for data in every))
    units = [sampling.units(seen) for data in numbers for _, seen in cells_by_view(data)]
    most = max(units, key=lambda each: each.count)
    words = {unit.count: sampling.unit_word(unit) for unit in units}
    over = " or ".join(count_noun(*each) for each in words.items())
    if any(word.startswith("group of ") for word in words.values()):
        over += " (values with equal rows are one group)"
    by_block = ", separately for each block" if PROMPTS_AXIS in result.axes else ""
    within = most.strata is not None and settings.test != "flips"
    design = (by_block or ", within the values that are dealt evenly") if within else ""
    shares = [data for data in numbers if data.effect in SHARE_RUNS and is_share(data)]
    exact = [share_mask(data, EFFECTS[data.effect]) for data in shares]
    kinds: list[str] = []
    mixed = not all(each.all() for each in exact)
    if len(shares) < len(numbers) or mixed:
        kinds.append(_METHODS[settings.test].format(over=f"{over}{design}", n=settings.resamples))
    if shares and (not mixed or any(each.any() for each in exact)):
        which = " of rows that are all 0 or 1" if mixed else ""
        kinds.append(f"shares{which}: the exact limits of Clopper and Pearson")
        unnamed = [data.label for data in shares if data.unit != "share"]
        if unnamed:
            kinds.append(f"all values of {', '.join(unnamed)} are 0 or 1: treated as shares")
    level = round(1 - settings.confidence / 100, 10)
    if any(_reaches_zero(statistic, level) for statistic in result.statistics):
        kinds.append(f"extended to 0 where so few values that aren't 0 give no p below {level:g}")
    kinds += _name_cut_cells(result)
    return f"{settings.confidence:g} % {'; '.join(kinds)}"


def _reaches_zero(cells: CellStatistics, level: float) -> bool:
    """Whether the interval of a cell ends at 0 because its p can't be below the level."""
    at_zero = (cells.low == 0) | (cells.high == 0)
    return bool((at_zero & (cells.mean != 0) & (cells.p >= level)).any())


def _name_cut_cells(result: ExperimentResult) -> Iterator[str]:
    """Yield how many intervals are cut to the range of a mean of probabilities or shares."""
    for data, statistic in zip(result.measures, result.statistics, strict=True):
        limits = mean_range(data)
        if limits is None:
            continue
        exact = np.zeros(len(statistic.mean), dtype=bool)
        exact[statistic.n > 0] = share_mask(data, EFFECTS[data.effect])
        cut = (
            ((statistic.low == limits[0]) | (statistic.high == limits[1]))
            & (statistic.low < statistic.high)
            & ~exact
        )
        if cut.any():
            least, most = limits
            yield (
                f"in {count_noun(int(cut.sum()), 'cell')}, the interval of {data.label} is cut to "
                f"{least:g} to {most:g}, the range of its means"
            )


def rank_by_size(result: ExperimentResult, measure: int, count: int) -> list[int]:
    """Return the cells with the largest absolute means; cells without a mean are excluded."""
    means = result.statistics[measure].mean
    return sorted(_cells_with_mean(result, measure), key=lambda cell: -abs(means[cell]))[:count]


def sign_ranking_note(result: ExperimentResult, measure: int, count: int) -> str | None:
    """Return a note on the cells that `top n of` selects instead, because it ranks by sign; None if
    they are the same cells."""
    means = result.statistics[measure].mean
    by_sign = sorted(_cells_with_mean(result, measure), key=lambda cell: -means[cell])[:count]
    by_size = rank_by_size(result, measure, count)
    others = [result.cells[cell].name for cell in by_sign if cell not in by_size]
    if not others:
        return None
    pick = f"`top {count} of {result.name}`"
    return f"{pick} ranks by sign and would include {', '.join(others)}"


def _cells_with_mean(result: ExperimentResult, measure: int) -> list[int]:
    means = result.statistics[measure].mean
    return [cell for cell in range(len(means)) if math.isfinite(means[cell])]
