"""The effect at each token of a prompt: the numbers of `report overlay`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.results.experiment_result import ANSWER_TOKENS, ExperimentResult
from mechdsl.show.reports.grid import UPWARDS, panels
from mechdsl.statistics.effect_parts import parts
from mechdsl.vocab.effects import EFFECTS

PROMPTS = 3
"""Prompts that are shown where `top n` doesn't say how many."""


@dataclass(frozen=True)
class Shaded:
    """One prompt with a number at each token, NaN at tokens that no cell hits."""

    prompt: int
    tokens: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    """(the coordinates along other axes, the numbers)."""


@dataclass(frozen=True)
class Overlay:
    """The prompts of one measure."""

    prompts: tuple[Shaded, ...]
    limit: float
    """The greatest absolute number, which has the full colour."""


def overlays(result: ExperimentResult, report: spec.Report) -> Mapping[int, Overlay]:
    """Measure -> its prompts; categories are left out."""
    found: dict[int, Overlay] = {}
    for measure, data in result.computed():
        if data.kind == "category":
            continue
        values = prompt_effects(result, measure)
        hit = np.flatnonzero(np.isfinite(values).any(axis=0))[: report.top or PROMPTS]
        shaded = tuple(_shaded(result, values, int(prompt)) for prompt in hit if result.hits)
        numbers = [abs(x) for each in shaded for _, row in each.rows for x in row if x == x]
        found[measure] = Overlay(shaded, max(numbers, default=0.0))
    return found


def prompt_effects(result: ExperimentResult, measure: int) -> Floats:
    """[cell, prompt]: each prompt's part in the cell's effect; their mean is the effect.

    The denominator is the mean one: that of a single prompt may be close to 0.
    """
    data = result.measures[measure]
    effect = EFFECTS[data.effect]
    rows = parts(data, effect, slice(None))
    values = np.where(rows.present, rows.numerator, np.nan)
    if rows.denominator is None:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = rows.denominator.sum(1) / rows.present.sum(1)
    return np.asarray(effect.divide(values, mean[:, None]), dtype=np.float64)


def _shaded(result: ExperimentResult, values: Floats, prompt: int) -> Shaded:
    tokens = result.texts[prompt]
    others = [axis for axis in result.axes if axis != "position"]
    found = panels(result, ("position",))
    if len(others) == 1 and others[0] in UPWARDS:  # layer 0 is the lowest row, as in maps
        found.reverse()
    rows: list[tuple[str, tuple[float, ...]]] = []
    for panel in found:
        at: list[list[float]] = [[] for _ in tokens]
        for cell in panel.cells.values():
            for token in result.hits[cell][prompt]:
                at[token].append(float(values[cell, prompt]))
        # positions may overlap: a token has the mean of those that hit it
        rows.append((panel.title, tuple(float(np.mean(x)) if x else math.nan for x in at)))
    return Shaded(prompt, tokens, tuple(rows))


def remarks(result: ExperimentResult, measure: int, shown: Overlay) -> list[str]:
    """What is shown, and why a prompt's number isn't its own ratio."""
    if not shown.prompts:
        return ["no tokens to show: they weren't kept with these results"]
    count = f"{len(shown.prompts)} of {result.prompts} prompts, each by itself"
    said = [f"{count}; tokens of {result.base}, without a number where nothing was done"]
    data = result.measures[measure]
    effect = EFFECTS[data.effect]
    if ANSWER_TOKENS in result.conventions:
        said.append("only tokens of the prompts, not those of the answer behind them")
    if effect.denominator is not None and not data.per_prompt:
        said.append(f"{effect.name} of a prompt: over the mean of {effect.divisor}, not its own")
    return said
