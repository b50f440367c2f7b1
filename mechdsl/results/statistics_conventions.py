"""How the statistics of an experiment came about, in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mechdsl.base.plural import plural
from mechdsl.base.registry import Registry
from mechdsl.program.lower_other_runs import BLOCKS
from mechdsl.program.spec import ATTENTION, GRADIENT
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.cell_statistics import SHARES
from mechdsl.statistics.measure_data import NO_INTERVAL, MeasureData, may_change
from mechdsl.statistics.sampling import partitions
from mechdsl.validate.reachable_p import CORRECTION_NAMES
from mechdsl.vocab.effect_kind import EffectKind

_METHODS = {
    "t": "Student's t corrected for skewness, over {over}",
    "flips": "inverted sign flips over {over}",
    "bootstrap": "bootstrap-t over {over}, at least {n:,} resamples, or Student's t where that is "
    "wider",
}
WITHHELD: Mapping[str, str] = {
    "skewed": "effects are too skewed for it to hold (W0723)",
    "picked": "sites were picked on the same rows (W0721)",
}
CHANGE = "m(patched) − m(base)"
_OF_GRADIENTS = {
    GRADIENT: "the length (L2) of ∂m/∂site in the base run",
    ATTENTION: "Σ max(A · ∂m/∂A, 0) over keys and layers, the mean over heads and queries, of the "
    "attention A in the base run",
}


def statistics_conventions(
    result: ExperimentResult, effects: Registry[EffectKind]
) -> dict[str, str]:
    """How means, intervals and p came about, in words, for the block under every table."""
    settings = result.settings
    if settings is None or not result.statistics:
        return {}
    said = {
        data.called: _formula(data, effects) for data in result.measures if data.kind == "number"
    }
    found: dict[str, str] = {}
    if result.selected:
        found["selection"] = f"{selected_words(result)}: effects look larger here than on new rows"
    if said:
        found["effect"] = "; ".join(f"{name} = {formula}" for name, formula in said.items())
        found["interval"] = _interval(result)
    test = next((each.test for each in result.statistics if each.test), None)
    tests = max(each.tests for each in result.statistics)
    if test and tests:
        found["p"] = test
        found["correction"] = (
            f"{CORRECTION_NAMES[settings.correction]}, over {plural(tests, 'cell')}"
        )
        for why in dict.fromkeys(each.withheld for each in result.statistics if each.withheld):
            found["correction"] += f"; withheld, as {WITHHELD[why]}"
    small = sum(int(np.count_nonzero(each.at_rounding)) for each in result.statistics)
    said = []
    if small:
        said.append(
            f"{plural(small, 'cell')} no larger than what rounding alone may give, not counted as "
            "surviving"
        )
    pairs = zip(result.measures, result.statistics, strict=True)
    changing = sum(int(np.count_nonzero(may_change(*pair))) for pair in pairs)
    if changing:
        said.append(
            f"{plural(changing, 'cell')} in which it may change single prompts of the base run"
        )
    moved = {run: result.accuracy_bound(run) for run in result.accuracy}
    said += [f"the accuracy of {run} by up to {by:.2g}" for run, by in moved.items() if by]
    if said:
        found["rounding"] = f"{', '.join(said)}; {result.rounding}"
    found["seed"] = str(result.seed)
    return found


def selected_words(result: ExperimentResult) -> str:
    """`heads picked sites from 16 cells on the same 32 rows`, of each experiment that picked."""
    return "; ".join(
        f"`{each.of}` picked sites from {plural(each.cells, 'cell')} on "
        + (
            f"the same {plural(each.rows, 'row')}"
            if each.shared == each.rows
            else f"{each.shared:,} of these {plural(each.rows, 'row')}"
        )
        for each in result.selected
    )


def _formula(data: MeasureData, effects: Registry[EffectKind]) -> str:
    """What an effect is made of."""
    effect = effects[data.effect]
    formula = effect.per_prompt_formula or "" if data.per_prompt else effect.formula
    if data.estimator in _OF_GRADIENTS:
        return _OF_GRADIENTS[data.estimator]
    if data.estimator and effect.of_intervention:
        return formula.replace("(m(patched) − m(base))", "estimate").replace(CHANGE, "estimate")
    return formula


def _interval(result: ExperimentResult) -> str:
    """By the kinds of figures that there are."""
    settings, sampling = result.settings, result.sampling
    assert settings is not None
    every = [data for data in result.measures if data.kind == "number"]
    numbers = [data for data in every if data.spread == "rows"]
    if not numbers:
        return "; ".join(dict.fromkeys(NO_INTERVAL[data.spread] for data in every))
    units = [sampling.units(seen) for data in numbers for _, seen in partitions(data)]
    counts = dict.fromkeys(each.count for each in units)
    most = max(units, key=lambda each: each.count)
    over = " or ".join(
        plural(count, sampling.unit_word(most) if count == most.count else "distinct prompt")
        for count in counts
    )
    by_block = ", each block's by themselves" if BLOCKS in result.axes else ""
    within = most.strata is not None and settings.test != "flips"
    design = (by_block or ", within the values that are dealt evenly") if within else ""
    exact = [data.unit == "share" and data.effect in SHARES for data in numbers]
    kinds: list[str] = []
    if not all(exact):
        kinds.append(_METHODS[settings.test].format(over=f"{over}{design}", n=settings.resamples))
    if any(exact):
        kinds.append("of shares by the exact limits of Clopper and Pearson")
    return f"{settings.confidence:g} % {'; '.join(kinds)}"
