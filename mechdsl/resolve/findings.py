"""What experiments found: their sites and tokens, ranked by their first measure.

Before an experiment has run, its cells stand in for its ranking, in the order of its grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from mechdsl.base.reply import Reply
from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.positions import resolve_positions
from mechdsl.prompts.prompt_table import Hits, PositionCell, PromptTable
from mechdsl.resolve.cell_key import CellKey
from mechdsl.resolve.path_rules import reached
from mechdsl.resolve.resolved import Axis, ResolvedExperiment
from mechdsl.resolve.resolved_rule import Key, PositionTargets, ResolvedRule, SitePoint, SiteTargets
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats
    from mechdsl.prompts.tokenizer import TextTokenizer


class Refused(Exception):
    """Why nothing can be picked, and what to write."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class RankedSite:
    """What a cell of another experiment writes, with its mean effect."""

    label: str
    points: tuple[SitePoint, ...]
    value: float
    """NaN where it hasn't run."""


@dataclass(frozen=True, eq=False)
class VariantFinding:
    """One variant of an experiment (most have one), with what it found once it has run."""

    experiment: ResolvedExperiment
    measure: str = ""
    """`recovery of ld`."""
    means: Floats | None = None
    """[cell] of its first measure."""
    values: Floats | None = None
    """[cell, row] of every prompt."""
    row_ids: tuple[int, ...] = ()
    """Of the rows that it kept."""
    cells: tuple[CellKey, ...] = ()
    """As results have them."""
    replies: tuple[Mapping[int, tuple[Reply, ...]], ...] = ()
    """[cell] id of a row → what was written behind it, one for each sample and draw of noise."""
    chosen: Mapping[str, int] = field(default_factory=dict[str, int])
    """Where some cells are meant alone, axis → the number of its value that they have."""

    def grid(self) -> Iterator[tuple[int, Key]]:
        """(number of a cell, its indices along the axes) of those that are meant, in the order of
        the grid."""
        names = [axis.name for axis in self.experiment.axes]
        there = [(names.index(axis), number) for axis, number in self.chosen.items()]
        for cell, index in enumerate(_cells(self.experiment)):
            if all(index[place] == number for place, number in there):
                yield cell, index

    def sites(self) -> Iterator[RankedSite]:
        """Of every cell that has a value, in the order of the grid."""
        experiment = self.experiment
        axes = [axis.name for axis in experiment.axes]
        rules = ranked_rules(experiment)
        places = [[axes.index(a) for a in site_targets(rule).axes] for rule in rules]
        for cell, index in self.grid():
            value = math.nan if self.means is None else float(self.means[cell])
            if self.means is not None and not math.isfinite(value):
                continue
            points: dict[SitePoint, None] = {}
            labels: dict[str, None] = {}
            for rule, place in zip(rules, places, strict=True):
                key = tuple(index[i] for i in place)
                labels[site_targets(rule).labels[key]] = None
                points.update(dict.fromkeys(_written(rule, key)))
            yield RankedSite(" + ".join(labels), tuple(points), value)

    def tokens(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """(row id, token of the run → value) of every row, for its positions that have a value; one
        with several cells (in several layers, say) counts with the best of them."""
        import numpy as np

        worth: Floats | None = None
        if self.values is not None:
            of_cells = self._by_position(self.values)
            highest = np.where(np.isnan(of_cells), -np.inf, of_cells).max(axis=1)
            worth = np.where(np.isneginf(highest), np.nan, highest)
        for column, row, found in self.positions(table, run, tokenizer):
            if worth is None:
                yield row, dict.fromkeys(found.values(), 0.0)
                continue
            best: dict[int, float] = {}
            for number, token in found.items():
                value = float(worth[number, column])
                if math.isfinite(value):
                    best[token] = max(value, best.get(token, value))
            if best:
                yield row, best

    @property
    def beside(self) -> tuple[Axis, ...]:
        """Its axes beside those that say where in an image: there is a map for each of their
        combinations."""
        where = {"position", *self.chosen, *self.window_axes}
        return tuple(axis for axis in self.experiment.axes if axis.name not in where)

    @property
    def of_windows(self) -> bool:
        """Whether its cells are of windows of patches."""
        return any(map(of_windows, ranked_rules(self.experiment)))

    @property
    def window_axes(self) -> frozenset[str]:
        """Along which its windows move."""
        rule = _token_rule(self.experiment) if self.of_windows else None
        return frozenset() if rule is None else frozenset(ranked_tokens(rule)[0].axes)

    def places(self, run: str) -> Iterator[tuple[Key, PositionCell]]:
        """The positions that it has numbers of: their index along the axes that they hang on, and
        where they are in a run; in one that it neither wrote nor read, where it wrote."""
        rule = _token_rule(self.experiment)
        targets, _ = ranked_tokens(rule)
        read = run == rule.run and run != self.experiment.spec.base
        yield from (targets.read if read else targets.written).items()

    def by_place(self, run: str) -> Iterator[tuple[int, tuple[int, ...], Floats]]:
        """(row id, tokens of a position in the run, [cell] its values in the cells beside it, in
        the order of the grid) of every position in every row that has it; of what has run."""
        import numpy as np

        assert self.values is not None
        own = self.experiment
        names = [axis.name for axis in own.axes]
        along = [names.index(name) for name in ranked_tokens(_token_rule(own))[0].axes]
        whole = np.full((*own.shape, self.values.shape[1]), np.nan)
        for number, index in self.grid():
            whole[index] = self.values[number]
        for place, axis in enumerate(names):
            if axis in self.chosen:
                whole = whole.take([self.chosen[axis]], axis=place)
        whole = np.moveaxis(whole, along, range(len(along)))
        numbers = {row: number for number, row in enumerate(own.table.row_ids)}
        for key, cell in self.places(run):
            beside = whole[key].reshape(-1, self.values.shape[1])
            for column, row in enumerate(self.row_ids):
                tokens = tuple(token for hit in cell.hits[numbers[row]] for token in hit)
                if tokens:
                    yield row, tokens, beside[:, column]

    def positions(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[tuple[int, int, dict[int, int]]]:
        """(column of a row, its id, number of a position → its token there) of the rows that have
        one."""
        own = self.experiment
        by_label = _by_label(own, _token_rule(own), table, run, tokenizer)
        found: dict[int, dict[int, int]] = {row: {} for row in table.row_ids}
        for number, label in enumerate(own.axes[self._axis].labels):
            for row, hits in by_label.get(str(label), {}).items():
                if hits and row in found:
                    found[row][number] = hits[0][0]
        columns = own.table.row_ids if self.values is None else self.row_ids
        for column, row in enumerate(columns):
            if tokens := found.get(row):
                yield column, row, tokens

    @property
    def _axis(self) -> int:
        """Which of its axes is that of positions."""
        return [axis.name for axis in self.experiment.axes].index("position")

    def _by_position(self, values: Floats) -> Floats:
        """[position, cell beside it that is meant, row], NaN where loops leave a cell out."""
        import numpy as np

        whole = np.full((*self.experiment.shape, values.shape[1]), np.nan)
        for number, index in self.grid():
            whole[index] = values[number]
        for place, axis in enumerate(self.experiment.axes):
            if axis.name in self.chosen:
                whole = whole.take([self.chosen[axis.name]], axis=place)
        moved = np.moveaxis(whole, self._axis, 0)
        return moved.reshape(moved.shape[0], -1, values.shape[1])


@dataclass(eq=False)
class Finding:
    """What all variants of an experiment found; without values before they have run."""

    parts: tuple[VariantFinding, ...]
    _orders: dict[tuple[int, str], dict[int, list[int]]] = field(
        default_factory=dict[tuple[int, str], dict[int, list[int]]], repr=False
    )

    @property
    def name(self) -> str:
        return self.parts[0].experiment.name

    @property
    def stands_in(self) -> bool:
        """Whether it has not run yet."""
        return any(part.means is None for part in self.parts)

    @property
    def shape_stands_in(self) -> bool:
        """Whether how many sites it has isn't known, for lack of its model."""
        return any(part.experiment.model.shape.stands_in for part in self.parts)

    @property
    def tokens_stand_in(self) -> bool:
        """The same of its tokens."""
        return any(part.experiment.model.tokenizer.stands_in for part in self.parts)

    @property
    def measure(self) -> str:
        return self.parts[0].measure

    @cached_property
    def cells(self) -> int:
        """How many are meant."""
        return sum(1 for part in self.parts for _ in part.grid())

    def on(self, model: str, block: str) -> Finding:
        """Of a comparison of models, what it found on one of them; of blocks of prompts alike."""
        parts = self.parts
        for own in (
            tuple(part for part in parts if part.experiment.model.name == model),
            tuple(part for part in parts if part.experiment.table.name == block),
        ):
            parts = tuple(part for part in parts if part in own) if own else parts
        return self if len(parts) == len(self.parts) else Finding(parts)

    @cached_property
    def sites(self) -> list[RankedSite]:
        """Its sites, the best first. A site with several cells (at several positions, say) counts
        once, with the best of them."""
        best: dict[tuple[SitePoint, ...], RankedSite] = {}
        for site in (site for part in self.parts for site in part.sites()):
            old = best.get(site.points)
            if old is None or site.value > old.value:
                best[site.points] = site
        ranked = list(best.values())
        return ranked if self.stands_in else sorted(ranked, key=lambda site: -site.value)

    @cached_property
    def by_size(self) -> Finding:
        """The same with absolute values in place of signed ones."""
        import numpy as np  # not at the top: there is none of it before something has run

        parts = [
            replace(
                part,
                means=None if part.means is None else np.abs(part.means),
                values=None if part.values is None else np.abs(part.values),
            )
            for part in self.parts
        ]
        return Finding(tuple(parts))

    def tokens(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> dict[int, list[int]]:
        """Row id → the tokens of a run that it ranked in that row, the best first."""
        key = (id(table), run)
        if key not in self._orders:
            best: dict[int, dict[int, float]] = {}
            for part in self.parts:
                for row, values in part.tokens(table, run, tokenizer):
                    own = best.setdefault(row, {})
                    for token, value in values.items():
                        own[token] = max(value, own.get(token, value))
            # Sorting is stable: ties stay in the order of the grid.
            self._orders[key] = {
                row: sorted(own, key=lambda token, own=own: -own[token])
                for row, own in best.items()
            }
        return self._orders[key]


def ranked_rules(experiment: ResolvedExperiment) -> tuple[ResolvedRule, ...]:
    """The rules whose sites and tokens are ranked: what is observed, else all that act."""
    observing = [rule for rule in experiment.rules if rule.does.changes == "nothing"]
    return tuple(observing or experiment.rules)


def _cells(experiment: ResolvedExperiment) -> Iterator[Key]:
    """Every cell that there is, in the order of the grid: paths only lead forward."""
    names = [axis.name for axis in experiment.axes]
    parallel = experiment.model.shape.parallel_block
    paths = [(rule.sites, rule.path.receivers) for rule in experiment.rules if rule.path]
    for index in product(*(range(len(axis)) for axis in experiment.axes)):
        at = dict(zip(names, index, strict=True))
        ends = [
            [each.points[tuple(at[name] for name in each.axes)] for each in pair if each]
            for pair in paths
        ]
        if experiment.has(index) and all(reached(*pair, parallel=parallel) for pair in ends):
            yield index


def site_targets(rule: ResolvedRule) -> SiteTargets:
    """The sites of a rule that has some; picks of others are refused first."""
    assert rule.sites is not None
    return rule.sites


def _written(rule: ResolvedRule, key: Key) -> tuple[SitePoint, ...]:
    """What a rule writes in a cell; for one on attention, the heads' outputs."""
    points = site_targets(rule).points[key]
    if rule.edge is None:
        return points
    return tuple(replace(point, site="z") for point in points)


def _token_rule(experiment: ResolvedExperiment) -> ResolvedRule:
    """The rule whose positions are swept."""
    every = ranked_rules(experiment)
    swept = (rule for rule in every if "position" in ranked_tokens(rule)[0].axes)
    return next(swept, None) or next(rule for rule in every if of_windows(rule))


def of_windows(rule: ResolvedRule) -> bool:
    """Whether its positions are rectangles of patches, which loops move over the image."""
    targets, at = ranked_tokens(rule)
    bases = [getattr(item.body, "base", None) for item in at.items]
    return bool(targets.axes) and all(
        isinstance(base, ast.SpanTokens) and (base.of.row is not None or base.of.col is not None)
        for base in bases
    )


def ranked_tokens(rule: ResolvedRule) -> tuple[PositionTargets, ast.Positions]:
    """The tokens of a rule that are ranked, with the positions that say which: of edges the keys,
    unless queries alone are swept."""
    alone = rule.edge is None or "position" in rule.positions.axes
    if rule.edge is None or (alone and "position" not in rule.edge.keys.axes):
        return rule.positions, rule.spec.at
    return rule.edge.keys, rule.spec.onto or rule.spec.at


def _by_label(
    own: ResolvedExperiment,
    rule: ResolvedRule,
    table: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
) -> dict[str, dict[int, Hits]]:
    """Label → row id → where the positions of an experiment are in one run."""
    positions, at = ranked_tokens(rule)
    targets = {own.spec.base: positions.written, rule.run: positions.read}.get(run)
    if targets is not None:
        return {
            cell.label: dict(zip(own.table.row_ids, cell.hits, strict=True))
            for cell in targets.values()
        }
    # A run that it neither wrote nor read: the same positions, found in that run's own text.
    cells, problems = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(problems):
        raise Refused(
            f"the positions of `{own.name}` aren't in `{run}`: {problems[0].message}",
            f"let `{own.name}` run on `{run}` too",
        )
    return {cell.label: dict(zip(table.row_ids, cell.hits, strict=True)) for cell in cells}
