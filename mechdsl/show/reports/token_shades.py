"""The effect at each token of a prompt: the numbers of `report overlay`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mechdsl.base.arrays import Floats
from mechdsl.program import spec
from mechdsl.results.experiment_result import ANSWER_TOKENS, ExperimentResult
from mechdsl.results.seen_image import SHOWN, SeenImage
from mechdsl.show.reports.grid import UPWARDS, panels
from mechdsl.statistics.effect_parts import parts
from mechdsl.vocab.effects import EFFECTS

Pixels = NDArray[np.uint8]
"""[height, width, 3]."""


@dataclass(frozen=True)
class Shaded:
    """One prompt with a number at each token, NaN at tokens that no cell hits."""

    prompt: int
    tokens: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    """(the coordinates along other axes, the numbers)."""
    image: SeenImage | None = None
    """What its tokens are of, where that isn't text."""


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """An image, and what cells give at its patches."""

    title: str
    pixels: Pixels
    maps: tuple[tuple[str, Floats], ...]
    """(what its cells are called, [row, col] a number for each patch, NaN without one)."""


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
        there = np.isfinite(values).any(axis=0)
        if result.seen:
            there = there & np.array([own is not None for own in result.seen])
        hit = np.flatnonzero(there)[: report.top or SHOWN]
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
    return Shaded(prompt, tokens, tuple(rows), result.seen[prompt] if result.seen else None)


def remarks(result: ExperimentResult, measure: int, shown: Overlay) -> list[str]:
    """What is shown, and why a prompt's number isn't its own ratio."""
    images = bool(result.seen)
    if not shown.prompts:
        what = "images" if images else "tokens"
        return [f"no {what} to show: they weren't kept with these results"]
    count = f"{len(shown.prompts)} of {result.prompts}"
    said = [
        f"{count} prompts, each by itself; tokens of {result.base}, without a number where "
        "nothing was done"
    ]
    if images:
        said = [
            f"{count} images as the model sees them, each by itself, with numbers of patches of "
            f"{result.base}"
        ]
    data = result.measures[measure]
    effect = EFFECTS[data.effect]
    if ANSWER_TOKENS in result.conventions:
        said.append("only tokens of the prompts, not those of the answer behind them")
    if effect.denominator is not None and not data.per_prompt:
        said.append(f"{effect.name} of a prompt: over the mean of {effect.divisor}, not its own")
    return said


def maps_of(each: Shaded, write: Callable[[float], str]) -> ImageMaps:
    """The numbers at the patches of a prompt that is an image; what tokens in front of them have
    stands beside the name of the map."""
    seen = each.image
    assert seen is not None
    maps: list[tuple[str, Floats]] = []
    for title, values in each.rows:
        front = zip(each.tokens[: seen.front], values, strict=False)
        beside = [f"{name}: {write(value)}" for name, value in front if math.isfinite(value)]
        named = " · ".join(part for part in (title, *beside) if part)
        patches = np.array(values[seen.front :], dtype=np.float64).reshape(seen.rows, seen.cols)
        maps.append((named or "effect", patches))
    return ImageMaps(f"image {each.prompt + 1}: {seen.title}", seen.pixels, tuple(maps))
