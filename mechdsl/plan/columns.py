"""Columns of integers: ragged lists end to end, and the tokens that positions hit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.prompts.prompt_table import PositionCell
from mechdsl.resolve.resolved_rule import SitePoint

EVERY = -1
"""Stands for all units of a site, in columns of units."""
NO_TOKEN = int(np.iinfo(np.int64).max)
"""The first token of nothing."""


def counted(counts: Ints) -> tuple[Ints, Ints]:
    """(index into counts, 0..count-1) for each of so many, in order."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def units_of(points: Sequence[SitePoint]) -> Ints:
    """[point] head or neuron, `EVERY` where a point stands for all of them."""
    return np.array([EVERY if p.unit is None else p.unit for p in points], dtype=np.int64)


def each_unit(unit: Ints, count: int) -> tuple[Ints, Ints]:
    """(index into unit, head or neuron): `EVERY` once for each of `count` units."""
    every = unit == EVERY
    index, within = counted(np.where(every, count, 1))
    return index, np.where(every[index], within, unit[index])


@dataclass(frozen=True, eq=False)
class Ragged:
    """Lists of integers of different lengths, end to end."""

    offsets: Ints
    values: Ints

    @staticmethod
    def of(lists: Iterable[Sequence[int]]) -> Ragged:
        found = list(lists)
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(one) for one in found], out=offsets[1:])
        return Ragged(offsets, np.array([v for one in found for v in one], dtype=np.int64))

    def counts(self, keys: Ints) -> Ints:
        return self.offsets[keys + 1] - self.offsets[keys]

    def expand(self, keys: Ints) -> tuple[Ints, Ints]:
        """(index into keys, value) for every value of every key, in order."""
        index, within = counted(self.counts(keys))
        return index, self.values[self.offsets[keys][index] + within]


@dataclass(frozen=True, eq=False)
class Hits:
    """The token positions of a rule: (position, prompt) → runs → tokens."""

    prompts: int
    runs: Ragged
    """Indexed by position * prompts + prompt."""
    tokens: Ragged
    """Indexed by run."""

    @staticmethod
    def of(cells: Sequence[PositionCell]) -> Hits:
        runs: list[range] = []
        tokens: list[tuple[int, ...]] = []
        for cell in cells:
            for row in cell.hits:
                runs.append(range(len(tokens), len(tokens) + len(row)))
                tokens.extend(row)
        return Hits(len(cells[0].hits), Ragged.of(runs), Ragged.of(tokens))

    def leftmost(self, runs: Ints) -> Ints:
        """The first token of each run; behind all of them where it has none."""
        index, token = self.tokens.expand(runs)
        found = np.full(len(runs), NO_TOKEN, dtype=np.int64)
        np.minimum.at(found, index, token)
        return found

    def lie_behind(self, lengths: Ints) -> bool:
        """Whether some token lies behind its prompt: it is one of the answer's.

        lengths: [prompt]
        """
        key, run = self.runs.expand(np.arange(len(self.runs.offsets) - 1))
        row, token = self.tokens.expand(run)
        return bool((token >= lengths[key % self.prompts][row]).any())

    def run(self, position: Ints, prompt: Ints, alternative: Ints) -> Ints:
        """The run of each row; rules with one run give it to every alternative."""
        key = position * self.prompts + prompt
        return self.runs.offsets[key] + np.minimum(alternative, self.runs.counts(key) - 1)
