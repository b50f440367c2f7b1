"""Rankings of other experiments: `top 10 of cie`, `top 25% of caap tokens`.

Until an experiment has run, its cells in grid order replace its ranking, so that every experiment
that depends on it can be checked and its cells counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, product
from math import isclose
from typing import TYPE_CHECKING, Any

from mechdsl.base.limits import is_integer
from mechdsl.base.records import Record
from mechdsl.base.text import HintedError, Percent, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean, has_errors
from mechdsl.diagnostics.experiments import BadPick, PickBySign
from mechdsl.program import spec
from mechdsl.program.references import may_sweep
from mechdsl.program.spec import SEED_AXIS, constant_value
from mechdsl.prompts.positions.cells import is_after_prompts, resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import Hits, PositionCell
from mechdsl.resolve.cells import CellKey, find_open_axes
from mechdsl.resolve.types import (
    WEIGHTS_BASIS,
    Axis,
    AxisIndices,
    AxisLabel,
    AxisLabels,
    PositionTargets,
    RankingSource,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    select_reached,
)
from mechdsl.syntax import ast
from mechdsl.syntax.printer import format_ranked
from mechdsl.vocab.metrics import Reply

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats
    from mechdsl.prompts.tokens.tokenizer import TextTokenizer


class PickError(HintedError):
    """Error for a pick that isn't possible, with a hint on what to write instead."""


class RankedSite(Record):
    """Points that a cell of another experiment writes, with the mean effect of the cell."""

    label: str
    points: tuple[SitePoint, ...]
    value: float
    """NaN if the experiment hasn't run."""


RowPositions = tuple[int, int, dict[int, int]]
"""A row: its column in the values, its id, and position number → token."""


@dataclass(frozen=True, eq=False)
class VariantFinding:
    """One variant of an experiment (most have only one), with its results once it has run."""

    experiment: ResolvedExperiment
    measure: str = ""
    """Description of the first measure: `recovery of ld`."""
    means: Floats | None = None
    """Mean of the first measure in each cell: [cell]."""
    values: Floats | None = None
    """Value of every prompt in each cell: [cell, row]."""
    row_ids: tuple[int, ...] = ()
    """Ids of the kept rows, the columns of `values`."""
    cells: tuple[CellKey, ...] = ()
    """Keys of the cells in the results."""
    replies: tuple[Mapping[int, tuple[Reply, ...]], ...] = ()
    """For each cell: row id → completions of the row, one for each sample and noise draw."""
    chosen: Mapping[str, int] = field(default_factory=dict[str, int])
    """Axis → index of the selected value, if only some cells are selected."""
    _indices: list[AxisIndices] = field(default_factory=list[AxisIndices], repr=False)
    """Indices of all cells, once known. Selections of cells share them."""
    _positions: dict[tuple[int, str, bool], tuple[PromptTable, list[RowPositions]]] = field(
        default_factory=dict[tuple[int, str, bool], tuple[PromptTable, "list[RowPositions]"]],
        repr=False,
    )
    """Results of `positions`. Selections of cells share them."""

    def grid(self) -> Iterator[tuple[int, AxisIndices]]:
        """Yield the number of each selected cell and its indices along the axes, in grid order."""
        names = [axis.name for axis in self.experiment.axes]
        there = [(names.index(axis), number) for axis, number in self.chosen.items()]
        if not self._indices:
            self._indices.extend(_cells(self.experiment))
        for cell, index in enumerate(self._indices):
            if all(index[place] == number for place, number in there):
                yield cell, index

    def sites(self) -> Iterator[RankedSite]:
        """Yield the sites of every selected cell that has a value, in grid order."""
        experiment = self.experiment
        axes = [axis.name for axis in experiment.axes]
        rules = select_ranked_rules(experiment)
        places = [[axes.index(a) for a in require_site_targets(rule).axes] for rule in rules]
        for cell, index in self.grid():
            value = math.nan if self.means is None else float(self.means[cell])
            if self.means is not None and not math.isfinite(value):
                continue
            points: dict[SitePoint, None] = {}
            labels: dict[str, None] = {}
            for rule, place in zip(rules, places, strict=True):
                key = tuple(index[i] for i in place)
                labels[require_site_targets(rule).labels[key]] = None
                points.update(dict.fromkeys(_written_points(rule, key)))
            yield RankedSite(" + ".join(labels), tuple(points), value)

    def features(self) -> Iterator[tuple[int, float]]:
        """Yield the feature and the value of every selected cell that has one, in grid order."""
        assert self.means is not None
        place = [axis.name for axis in self.experiment.axes].index("feature")
        labels = self.experiment.axes[place].labels
        for cell, index in self.grid():
            feature, value = labels[index[place]], float(self.means[cell])
            if isinstance(feature, int) and math.isfinite(value):
                yield feature, value

    def frequencies(self) -> dict[int, float]:
        """Return, for each feature with values, the share of rows and cells in which it isn't 0."""
        import numpy as np

        assert self.values is not None
        place = [axis.name for axis in self.experiment.axes].index("feature")
        labels = self.experiment.axes[place].labels
        active: dict[int, list[int]] = {}
        for cell, index in self.grid():
            feature, values = labels[index[place]], self.values[cell]
            known = values[np.isfinite(values)]
            if isinstance(feature, int) and len(known):
                sums = active.setdefault(feature, [0, 0])
                sums[0] += int(np.count_nonzero(known))
                sums[1] += len(known)
        return {feature: count / every for feature, (count, every) in active.items()}

    def tokens(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield for each row its id and the values of its tokens in the run.

        Only positions with a value count. A position with several cells (in several layers, for
        example) has the value of the best one.
        """
        import numpy as np

        worth: Floats | None = None
        if self.values is not None:
            of_cells = self._by_position(self.values)
            highest = np.where(np.isnan(of_cells), -np.inf, of_cells).max(axis=1)
            worth = np.where(np.isneginf(highest), np.nan, highest)
        for column, row, places in self.positions(table, run, tokenizer):
            if worth is None:
                yield row, dict.fromkeys(places.values(), 0.0)
                continue
            best: dict[int, float] = {}
            for number, token in places.items():
                value = float(worth[number, column])
                if math.isfinite(value):
                    best[token] = max(value, best.get(token, value))
            if best:
                yield row, best

    @property
    def other_axes(self) -> tuple[Axis, ...]:
        """Axes other than those of image positions; each combination of values has a separate
        map."""
        where = {"position", *self.chosen, *self.window_axes}
        return tuple(axis for axis in self.experiment.axes if axis.name not in where)

    @property
    def of_windows(self) -> bool:
        """Whether its cells are windows of patches."""
        return any(map(sweeps_windows, select_ranked_rules(self.experiment)))

    @property
    def window_axes(self) -> frozenset[str]:
        """Axes along which its windows move."""
        rule = _token_rule(self.experiment) if self.of_windows else None
        return frozenset() if rule is None else frozenset(select_ranked_positions(rule)[0].axes)

    def places(self, run: str) -> Iterator[tuple[AxisIndices, PositionCell]]:
        """Return the positions with values: their indices along the axes, and their tokens in a
        run.

        For a run that the experiment neither wrote nor read, these are the written positions.
        """
        rule = _token_rule(self.experiment)
        targets, _ = select_ranked_positions(rule)
        read = run == rule.run and run != self.experiment.spec.base
        yield from (targets.read if read else targets.written).items()

    def by_place(self, run: str) -> Iterator[tuple[int, tuple[int, ...], Floats]]:
        """Yield each position of each row that has it. The experiment must have run.

        Yields:
            The row id, the tokens of the position in the run, and the position's values in all
            cells that share it, in grid order: [cell].
        """
        import numpy as np

        assert self.values is not None
        own = self.experiment
        names = [axis.name for axis in own.axes]
        along = [names.index(name) for name in select_ranked_positions(_token_rule(own))[0].axes]
        whole = np.full((*own.shape, self.values.shape[1]), np.nan)
        for number, index in self.grid():
            whole[index] = self.values[number]
        for place, axis in enumerate(names):
            if axis in self.chosen:
                whole = whole.take([self.chosen[axis]], axis=place)
        whole = np.moveaxis(whole, along, range(len(along)))
        numbers = {row: number for number, row in enumerate(own.table.row_ids)}
        for key, cell in self.places(run):
            values = whole[key].reshape(-1, self.values.shape[1])
            for column, row in enumerate(self.row_ids):
                tokens = tuple(token for hit in cell.hits[numbers[row]] for token in hit)
                if tokens:
                    yield row, tokens, values[:, column]

    def positions(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Sequence[RowPositions]:
        """Return for each row its column in `values`, its id, and position number → token.

        Rows without positions are omitted.
        """
        key = id(table), run, self.values is None
        if key not in self._positions:  # the table is stored too, so that its id stays unique
            self._positions[key] = table, list(self._find_positions(table, run, tokenizer))
        return self._positions[key][1]

    def _find_positions(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[RowPositions]:
        own = self.experiment
        by_label = _by_label(own, _token_rule(own), table, run, tokenizer)
        places: dict[int, dict[int, int]] = {row: {} for row in table.row_ids}
        for number, label in enumerate(own.axes[self._axis].labels):
            for row, hits in by_label.get(str(label), {}).items():
                if hits and row in places:
                    places[row][number] = hits[0][0]
        columns = own.table.row_ids if self.values is None else self.row_ids
        for column, row in enumerate(columns):
            if tokens := places.get(row):
                yield column, row, tokens

    def by_token(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[tuple[int, tuple[int], Floats]]:
        """Yield each token of each row that has a value, in a run of other text if necessary. The
        experiment must have run.

        Yields:
            The row id, the token alone, and its values in all cells that share it, as in
            `by_place`.

        Raises:
            PickError: If a position isn't in the run.
        """
        assert self.values is not None
        values = self._by_position(self.values)
        for column, row, places in self.positions(table, run, tokenizer):
            for number, token in places.items():
                yield row, (token,), values[number, :, column]

    @property
    def _axis(self) -> int:
        """Index of the position axis."""
        return [axis.name for axis in self.experiment.axes].index("position")

    def _by_position(self, values: Floats) -> Floats:
        """Arrange values: [position, other selected cell, row]. NaN for cells that loops omit."""
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
    """Results of all variants of an experiment; without values until they have run."""

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
        """Whether the number of its sites is unknown because its model isn't available."""
        return any(part.experiment.model.shape.stands_in for part in self.parts)

    @property
    def tokens_stand_in(self) -> bool:
        """Whether its tokens are unknown because its tokenizer isn't available."""
        return any(part.experiment.model.tokenizer.stands_in for part in self.parts)

    @property
    def measure(self) -> str:
        return self.parts[0].measure

    @cached_property
    def cells(self) -> int:
        """Number of selected cells."""
        return sum(1 for part in self.parts for _ in part.grid())

    def on(self, model: str, block: str, seed: object) -> Finding:
        """Select the variants with this model, this prompt set and this seed of trainings, if any
        variant has them."""
        parts = self.parts
        for findings in (
            tuple(part for part in parts if part.experiment.model.name == model),
            tuple(part for part in parts if part.experiment.table.name == block),
            tuple(p for p in parts if dict(p.experiment.spec.variant).get(SEED_AXIS) == seed),
        ):
            parts = tuple(part for part in parts if part in findings) if findings else parts
        return self if len(parts) == len(self.parts) else Finding(parts)

    @cached_property
    def sites(self) -> list[RankedSite]:
        """Sites, the best first. A site with several cells (at several positions, for example) is
        listed once, with the value of its best cell."""
        best: dict[tuple[SitePoint, ...], RankedSite] = {}
        for site in (site for part in self.parts for site in part.sites()):
            old = best.get(site.points)
            if old is None or site.value > old.value:
                best[site.points] = site
        ranked = list(best.values())
        return ranked if self.stands_in else sorted(ranked, key=lambda site: -site.value)

    @cached_property
    def features(self) -> dict[int, float]:
        """Features with the values of their best cells, the best first; none before the run."""
        best: dict[int, float] = {}
        for part in self.parts if not self.stands_in else ():
            for feature, value in part.features():
                best[feature] = max(value, best.get(feature, value))
        return dict(sorted(best.items(), key=lambda pair: -pair[1]))

    @cached_property
    def by_size(self) -> Finding:
        """The same results with absolute values."""
        import numpy as np  # imported here: checks that run no experiment do without numpy

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
        """Return for each row id the ranked tokens of a run, the best first."""
        key = (id(table), run)
        if key not in self._orders:
            best: dict[int, dict[int, float]] = {}
            for part in self.parts:
                for row, values in part.tokens(table, run, tokenizer):
                    own = best.setdefault(row, values)
                    for token, value in values.items() if own is not values else ():
                        own[token] = max(value, own.get(token, value))
            # The sort is stable, so ties stay in grid order.
            self._orders[key] = {
                row: sorted(own, key=own.__getitem__, reverse=True) for row, own in best.items()
            }
        return self._orders[key]


def select_ranked_rules(experiment: ResolvedExperiment) -> tuple[ResolvedRule, ...]:
    """Return the rules whose sites and tokens are ranked: the observations, or else all rules."""
    observing = [rule for rule in experiment.rules if rule.does.changes == "nothing"]
    return tuple(observing or experiment.rules)


def _cells(experiment: ResolvedExperiment) -> Iterator[AxisIndices]:
    """Yield every existing cell in grid order. Paths exist only from earlier to later sites."""
    names = [axis.name for axis in experiment.axes]
    parallel = experiment.model.shape.parallel_block
    paths = [(rule.sites, rule.path.receivers) for rule in experiment.rules if rule.path]
    for index in product(*(range(len(axis)) for axis in experiment.axes)):
        at = dict(zip(names, index, strict=True))
        ends = [
            [
                site_targets.points[tuple(at[name] for name in site_targets.axes)]
                for site_targets in pair
                if site_targets
            ]
            for pair in paths
        ]
        exists = experiment.has(index) and all(rule.leads(at) for rule in experiment.rules)
        if exists and all(select_reached(*pair, parallel=parallel) for pair in ends):
            yield index


def require_site_targets(rule: ResolvedRule) -> SiteTargets:
    """Return the sites of a rule that has sites; picks from other rules are rejected earlier."""
    assert rule.sites is not None
    return rule.sites


def _written_points(rule: ResolvedRule, key: AxisIndices) -> tuple[SitePoint, ...]:
    """Return the points that a rule writes in a cell; the heads' outputs for an attention rule."""
    points = require_site_targets(rule).points[key]
    if rule.edge is None:
        return points
    return tuple(replace(point, site="z") for point in points)


def _token_rule(experiment: ResolvedExperiment) -> ResolvedRule:
    """Return the rule whose positions are swept."""
    every = select_ranked_rules(experiment)
    swept = (rule for rule in every if "position" in select_ranked_positions(rule)[0].axes)
    return next(swept, None) or next(rule for rule in every if sweeps_windows(rule))


def sweeps_windows(rule: ResolvedRule) -> bool:
    """Return whether the rule's positions are rectangles of patches moved by loops."""
    targets, at = select_ranked_positions(rule)
    bases = [getattr(item.body, "base", None) for item in at.items]
    return bool(targets.axes) and all(
        isinstance(base, ast.SpanTokens) and (base.of.row is not None or base.of.col is not None)
        for base in bases
    )


def select_ranked_positions(rule: ResolvedRule) -> tuple[PositionTargets, ast.Positions]:
    """Return the ranked tokens of a rule and the position expression that names them.

    For edges these are the keys, unless only the queries are swept.
    """
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
    """Return label → row id → tokens of an experiment's positions in one run."""
    positions, at = select_ranked_positions(rule)
    targets = {own.spec.base: positions.written, rule.run: positions.read}.get(run)
    if targets is not None:
        if any(cell.vectors > 1 for cell in targets.values()):
            raise PickError(
                f"the positions of `{own.name}` are patches of the vision encoder, which are "
                "resampled to tokens",
                "name patches instead: `photo row 1 col 2 token`",
            )
        return {
            cell.label: dict(zip(own.table.row_ids, cell.hits, strict=True))
            for cell in targets.values()
        }
    # The experiment neither wrote nor read this run, so its positions are resolved in the run's
    # text.
    cells, problems = resolve_positions(at, table, run, tokenizer=tokenizer)
    if has_errors(problems):
        raise PickError(
            f"the positions of `{own.name}` aren't in `{run}`: {problems[0].message}",
            f"run `{own.name}` on `{run}`, too",
        )
    return {cell.label: dict(zip(table.row_ids, cell.hits, strict=True)) for cell in cells}


def observes_weights(experiment: ResolvedExperiment) -> bool:
    """Return whether the experiment observes weights, which don't depend on any row."""
    return any(rule.does.reads_weights_only for rule in experiment.rules)


def read_coordinates(
    node: ast.RankedSelection | ast.MapOf, values: Mapping[str, Any]
) -> AxisLabels:
    """Read the coordinates in the parentheses of a pick.

    Args:
        values: Values of the enclosing `for` variables and of each `param`.

    Raises:
        PickError: If a coordinate has no axis, an unknown value or a duplicate name.
    """
    coordinates: dict[str, AxisLabel] = {}
    for argument in node.cell:
        text, axis = argument.span.written, argument.name
        if axis is None:
            reason = f"`{text}` doesn't say along which axis"
            raise PickError(reason, f"name it: `{node.of}(layer: {text})`")
        if axis in coordinates:
            raise PickError(f"`{axis}` is named twice", "remove one of them")
        coordinates[axis] = _value(argument, values)
    return tuple(coordinates.items())


def _value(argument: ast.Argument, values: Mapping[str, Any]) -> AxisLabel:
    value = constant_value(argument.value, values)
    if value is None or isinstance(value, bool):
        text, hint = argument.value.span.written, f"write one: `{argument.name}: 2`"
        if isinstance(argument.value, ast.Name):
            hint = did_you_mean(
                text, values, f'write a word in quotes: `{argument.name}: "{text}"`'
            )
        raise PickError(f"`{text}` is not a value of an axis", hint)
    return value


def describe_cells(of: str, at: AxisLabels) -> str:
    """Format an experiment with coordinates: `caap(a: 1, b: 3)`."""
    said = ", ".join(f"{axis}: {value}" for axis, value in at)
    return f"{of}({said})" if said else of


def select_cells(finding: Finding, at: AxisLabels, groups: Mapping[str, spec.Group]) -> Finding:
    """Select the results in the cells with these coordinates.

    Raises:
        PickError: If no cell has them.
    """
    parts = finding.parts
    for axis, value in at:
        selected = [_select_along(part, axis, value, groups) for part in parts]
        parts = tuple(part for part in selected if isinstance(part, VariantFinding))
        if not parts:
            labels = dict.fromkeys(str(label) for each in selected for label in _labels(each))
            reason = f"`{finding.name}` has no `{axis}: {value}`"
            raise PickError(reason, f"along `{axis}` it has {name_list(labels)}")
    parts = tuple(part for part in parts if any(True for _ in part.grid()))
    if not parts:
        raise PickError(f"`{finding.name}` has no cell there", "its loops exclude it")
    return Finding(parts)


def _select_along(
    part: VariantFinding, axis: str, value: AxisLabel, groups: Mapping[str, spec.Group]
) -> VariantFinding | tuple[AxisLabel, ...]:
    """Select the cells of a variant with this value along an axis.

    Returns:
        The selection, or the existing values if none matches.
    """
    own = part.experiment
    variant = dict(own.spec.variant)
    if axis in variant:
        return part if _same(variant[axis], value) else (variant[axis],)
    names = [each.name for each in own.axes]
    if axis not in names:
        known = [*variant, *names]
        hint = (
            f"its axes are {name_list(known)}"
            if known
            else ("it has only one cell: remove the index")
        )
        raise PickError(f"`{own.name}` has no axis `{axis}`", did_you_mean(axis, known, hint))
    labels = own.axes[names.index(axis)].labels
    if own.model.stands_in and axis in find_open_axes(own.spec, groups, ("shape", "tokens")):
        return part  # its values aren't known yet
    number = next((n for n, label in enumerate(labels) if _same(label, value)), None)
    return labels if number is None else replace(part, chosen={**part.chosen, axis: number})


def _labels(labels: VariantFinding | tuple[AxisLabel, ...]) -> tuple[AxisLabel, ...]:
    return () if isinstance(labels, VariantFinding) else labels


def _same(label: AxisLabel, value: AxisLabel) -> bool:
    if isinstance(label, str) or isinstance(value, str):
        return label == value
    return isclose(label, value, rel_tol=1e-9, abs_tol=1e-12)


def _check_first_measure(experiment: ResolvedExperiment) -> None:
    name = experiment.name
    if not experiment.rules:
        raise PickError(
            f"`{name}` has no intervention, so it has nothing to rank",
            "name an experiment with a rule that sweeps",
        )
    first = experiment.measures[0]
    if experiment.spec.over is not None:
        raise PickError(
            f"`{name}` averages over `{experiment.spec.over}`, so it ranks no single cells",
            f"rank an experiment without `mean over {experiment.spec.over}`",
        )
    if first.kind == "category":
        raise PickError(
            f"the first measure of `{name}`, `{first.text}`, is a category, which has no order",
            f"let `{name}` measure a number first, such as `logit(answer)`",
        )


def check_rankable_sites(experiment: ResolvedExperiment, node: ast.RankedSelection) -> None:
    _check_first_measure(experiment)
    name = experiment.name
    rules = select_ranked_rules(experiment)
    without = [rule for rule in rules if rule.sites is None]
    tokens = f"{node.span.written} tokens"
    if without:
        some = "" if len(without) == len(rules) else "some rules of "
        raise PickError(
            f"{some}`{name}` change{'' if some else 's'} the input, which isn't a site",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )
    words = {"positions": "position ids", "blocks": "blocks", "circuit": "edges of a circuit"}
    other = next((words[r.does.changes] for r in rules if r.does.changes in words), None)
    if other is not None:
        raise PickError(
            f"`{name}` changes {other}, which aren't sites",
            "name an experiment that writes at sites",
        )
    basis = next((basis for rule in rules for basis in rule.bases), None)
    if basis is not None and basis.definition == WEIGHTS_BASIS:
        raise PickError(
            f"`{name}` changes weights, but only heads and neurons can be picked",
            "rank these: `scale mlp_hidden layer 1 neuron * at tokens * by 0` has the same effect "
            "as `scale weights of layer 1 neuron * by 0`",
        )
    if basis is not None:
        raise PickError(
            f"`{name}` ranks coordinates of `{basis.definition}`, but only sites can be picked",
            "name the dimensions: `dims 0, 3`"
            if basis.definition == ast.STANDARD_BASIS
            else f"name the coordinates: `features 0, 3 of {basis.definition}`",
        )
    swept = {axis for rule in rules for axis in require_site_targets(rule).axes}
    if not swept and experiment.n_cells > 1:
        site = next(iter(require_site_targets(rules[0]).labels.values()))
        raise PickError(
            f"`{name}` sweeps positions only, all at {site}",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )


def check_rankable_features(experiment: ResolvedExperiment, basis: str) -> None:
    """Check that the experiment's first measure ranks features of a basis.

    Raises:
        PickError: If it doesn't.
    """
    _check_first_measure(experiment)
    name, of = experiment.name, f"features of `{basis}`"
    bases = [rule.basis for rule in experiment.rules if rule.basis is not None]
    if all(axis.name != "feature" for axis in experiment.axes):
        raise PickError(
            f"`{name}` doesn't compare {of}",
            f"let it sweep them, `ablate feature * of {basis} …`, or observe them: "
            f"`observe features of {basis} …`",
        )
    if any(basis_targets.definition != basis for basis_targets in bases):
        other = next(
            basis_targets.definition for basis_targets in bases if basis_targets.definition != basis
        )
        raise PickError(f"`{name}` ranks features of `{other}`, not {of}", "name the same basis")


def _check_one_basis(finding: VariantFinding, written: str) -> None:
    """Check that the selected cells have features of one basis: features with the same number in
    different layers or heads are unrelated. Raises PickError.

    Args:
        written: The experiment as the file names it.
    """
    experiment = finding.experiment
    families = [
        points
        for rule in experiment.rules
        for points in (() if rule.basis is None else rule.basis.bases)
        if len(points) > 1
    ]
    swept = [
        axis
        for axis in experiment.axes
        if axis.name in ("layer", "head") and len(axis) > 1 and axis.name not in finding.chosen
    ]
    if not families or not swept:
        return
    names = " and ".join(f"{axis.name}s" for axis in swept)
    places = ", ".join(f"{axis.name}: {axis.labels[0]}" for axis in swept)
    site = " ".join(f"{axis.name} {axis.labels[0]}" for axis in swept)
    raise PickError(
        f"`{written}` ranks features of several {names}, whose numbers are unrelated",
        f"rank those of one, `{experiment.name}({places})`, and write `{site}` before `features`",
    )


def check_rankable_tokens(
    experiment: ResolvedExperiment,
    table: PromptTable,
    tokenizer: TextTokenizer,
    otherwise: str,
    *,
    windows: bool = False,
) -> None:
    """Check that the experiment's first measure ranks each single token of these prompts.

    Args:
        experiment: The experiment to rank by.
        table: The prompts of the experiment that picks.
        tokenizer: The tokenizer of the experiment that picks.
        otherwise: Hint for an experiment that sweeps no positions.
        windows: Whether rectangles of patches are accepted as well as single tokens.

    Raises:
        PickError: If some or all tokens have no value.
    """
    _check_first_measure(experiment)
    _check_same_prompts(experiment, table, tokenizer)
    rule = _select_sweeping_rule(experiment, otherwise, windows=windows)
    if rule.spec.onto is not None and rule.edge is None:
        raise PickError(
            f"a cell of `{experiment.name}` has tokens at two positions",
            "let it sweep single tokens, for example `at each token of …`",
        )
    if not (experiment.model.tokenizer.stands_in or (windows and sweeps_windows(rule))):
        _check_single_tokens(experiment, rule)


def _check_same_prompts(
    experiment: ResolvedExperiment, table: PromptTable, tokenizer: TextTokenizer
) -> None:
    name = experiment.name
    if experiment.table.name != table.name:
        raise PickError(
            f"`{name}` ranks tokens of `{experiment.table.name}`, but this experiment runs "
            f"on `{table.name}`",
            "use the same prompts block in both: tokens are ranked within each row",
        )
    theirs = experiment.model.tokenizer
    known = not theirs.stands_in and not tokenizer.stands_in
    if known and theirs.hash != tokenizer.hash:
        raise PickError(
            f"`{name}` ranks tokens of `{experiment.model.name}`, which has a different tokenizer",
            "run both on the same model",
        )


def _select_sweeping_rule(
    experiment: ResolvedExperiment, otherwise: str, *, windows: bool
) -> ResolvedRule:
    """Return the first rule that sweeps positions, or rectangles of patches if accepted."""
    rules = select_ranked_rules(experiment)
    sweeping = [rule for rule in rules if "position" in select_ranked_positions(rule)[0].axes]
    moving = windows and next((rule for rule in rules if sweeps_windows(rule)), None)
    if moving:
        sweeping = [moving]
    elif experiment.model.tokenizer.stands_in:
        sweeping = [rule for rule in rules if may_sweep(select_ranked_positions(rule)[1])]
    if not sweeping:
        raise PickError(f"`{experiment.name}` doesn't sweep positions", otherwise)
    return sweeping[0]


def _check_single_tokens(experiment: ResolvedExperiment, rule: ResolvedRule) -> None:
    """Check that each cell has one token of each prompt."""
    name, rows = experiment.name, experiment.table.runs[experiment.spec.base].rows
    ends = [len(row.ids) for row in rows]
    for cell in select_ranked_positions(rule)[0].written.values():
        # A loop: cells times rows are the most frequent test of a check.
        for hits, end in zip(cell.hits, ends, strict=True):
            if hits and not (len(hits) == 1 and len(hits[0]) == 1 and hits[0][0] < end):
                break
        else:
            continue
        if is_after_prompts(cell, rows):
            raise PickError(
                f"the cell `{cell.label}` of `{name}` is in the answer, after the prompt",
                "let it sweep only tokens of the prompt: `token *`",
            )
        if any(row and (len(row) != 1 or len(row[0]) != 1) for row in cell.hits):
            raise PickError(
                f"the cell `{cell.label}` of `{name}` covers several tokens",
                "let it sweep single tokens: `each token …` or `token *`, on spans of equal length",
            )


MAX_LISTED_SITES = 10
"""Maximum number of picked sites that a note below a table lists."""


@dataclass
class FindingPicker:
    """Results that an experiment may pick from, and a record of its picks."""

    found: Mapping[str, Finding] = field(default_factory=dict[str, Finding])
    called: Mapping[str, Mapping[str, ast.MapOf]] = field(
        default_factory=dict[str, Mapping[str, ast.MapOf]]
    )
    """`for` variable over experiments → word → the experiment, or a selection of its cells."""
    groups: Mapping[str, spec.Group] = field(default_factory=dict[str, spec.Group])
    """Groups of the file."""
    picks: dict[str, str] = field(default_factory=dict[str, str])
    """Picks as written → description of the picked sites or tokens."""
    sites_of: dict[str, RankingSource] = field(default_factory=dict[str, RankingSource])
    """Experiments whose sites are used, and those that these experiments picked from, by name."""
    _longest: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    _runs: dict[tuple[Span, str], tuple[str, Mapping[int, Sequence[int]]]] = field(
        default_factory=dict[tuple[Span, str], tuple[str, Mapping[int, Sequence[int]]]]
    )
    """For each pick of tokens: the first run in which it was resolved, and its tokens there."""
    _some: dict[tuple[str, AxisLabels], Finding] = field(
        default_factory=dict[tuple[str, AxisLabels], Finding]
    )
    """Results by experiment and coordinates."""
    _texts: dict[tuple[Span, str], str] = field(default_factory=dict[tuple[Span, str], str])
    """For `top k of m` with a `for` variable `m` over experiments: the text for each experiment."""
    _checked: set[str] = field(default_factory=set[str])
    """Experiments that were checked to rank single tokens."""

    @property
    def stand_ins(self) -> tuple[str, ...]:
        return tuple(name for name, finding in self.found.items() if finding.stands_in)

    def finding(
        self, node: ast.RankedSelection | ast.MapOf, values: Mapping[str, Any]
    ) -> tuple[Finding | None, AxisLabels]:
        """Return the results in the selected cells, and the coordinates of these cells.

        Args:
            values: Values of the enclosing `for` variables and of each `param`.

        Returns:
            The results, None for a rejected experiment; and the coordinates.

        Raises:
            PickError: If no cell has these coordinates.
        """
        at, whole = read_coordinates(node, values), self.found.get(node.of)
        if whole is None or not at:
            return whole, at
        if (node.of, at) not in self._some:
            self._some[node.of, at] = select_cells(whole, at, self.groups)
        return self._some[node.of, at], at

    def _named(self, node: ast.RankedSelection, values: Mapping[str, Any]) -> ast.RankedSelection:
        """Replace a `for` variable over experiments by the experiment that is its current value.

        Raises:
            PickError: If the variable has no value or its value isn't an experiment.
        """
        words = self.called.get(node.of)
        if words is None:
            return node
        if node.of not in values:
            reason = (
                f"`{node.of}` loops over experiments, and it isn't known here which one is meant"
            )
            raise PickError(reason, "name one experiment")
        word = str(values[node.of])
        if word not in words:
            raise PickError(f"`{word}` is not an experiment", "let the `for` loop over names only")
        meant = words[word]
        names = (
            argument.value.id for argument in meant.cell if isinstance(argument.value, ast.Name)
        )
        unknown = next((name for name in names if name not in values), None)
        if unknown is not None:
            raise PickError(
                f"`{unknown}` in `{word}` is neither a number nor a `param`",
                f"use a `for` variable to select cells, as in `top 2 of {word}`, and write "
                "a word in quotes",
            )
        named = replace(node, of=meant.of, cell=(*meant.cell, *node.cell))
        shown = replace(named, of=word.partition("(")[0])
        self._texts[node.span, format_ranked(named)] = format_ranked(shown)
        return named

    def _written(self, node: ast.RankedSelection) -> str:
        """Return the source text, with the word in place of a `for` variable over experiments."""
        return self._texts.get((node.span, format_ranked(node)), node.span.written)

    def said(self, node: ast.RankedSelection, values: Mapping[str, Any]) -> str:
        """Return the source text, with the values of `for` variables."""
        node = self._named(node, values)
        head, _, of = self._written(node).partition(" of ")
        if isinstance(node.amount, str):
            head = f"top {values.get(node.amount, node.amount)}"
        cells = describe_cells(of.partition("(")[0].rstrip(), read_coordinates(node, values))
        return f"{head} of {cells}"

    def used_sites(self, node: ast.RankedSelection, finding: Finding) -> None:
        """Record the rows and cells that sites were picked by.

        These are the cells of the experiment and of experiments that it picked from in turn. A
        ranking by weights alone has no rows.
        """
        parts = [part.experiment for part in finding.parts]
        rows = (part.table.row_keys for part in parts if not observes_weights(part))
        source = RankingSource(node.span, finding.cells, frozenset(chain.from_iterable(rows)))
        self.sites_of.setdefault(node.of, source)
        for name, earlier in chain.from_iterable(part.sites_of.items() for part in parts):
            self.sites_of.setdefault(name, replace(earlier, span=node.span))

    # --- sites ------------------------------------------------------------------------------------

    def pick_sites(
        self, node: ast.RankedSelection, values: Mapping[str, Any], diagnostics: list[Diagnostic]
    ) -> list[RankedSite] | None:
        """Return the best sites of an experiment.

        None after E0620, and if the experiment was rejected.
        """
        try:
            node = self._named(node, values)
            finding, _ = self.finding(node, values)
            if finding is None:
                return None
            there = None if finding.shape_stands_in else f"`{node.of}` has {{}} sites"
            for part in finding.parts:
                check_rankable_sites(part.experiment, node)
            count = count_picked(node, values, len(finding.sites), there)
        except PickError as refusal:
            diagnostics.append(_bad_pick(node, refusal))
            return None
        self.used_sites(node, finding)
        chosen = finding.sites[:count]
        self._say_sites(node, finding, chosen)
        if not finding.stands_in:
            by_size = finding.by_size.sites[:count]
            if {site.points for site in by_size} != {site.points for site in chosen}:
                labels = [[site.label for site in sites] for sites in (chosen, by_size)]
                picked, other = _differing(*labels), _differing(*labels[::-1])
                _warn_sign(node, finding, picked, other, diagnostics)
        return chosen

    def pick_features(
        self,
        node: ast.RankedSelection,
        basis: str,
        size: int,
        values: Mapping[str, Any],
        diagnostics: list[Diagnostic],
    ) -> list[int] | None:
        """Return the best features of an experiment, the best first.

        None after E0620, and if the experiment was rejected. Before it has run, they are the first
        features.

        Args:
            basis: The basis that they are of.
            size: Number of its features.
        """
        try:
            node = self._named(node, values)
            finding, _ = self.finding(node, values)
            if finding is None:
                return None
            for part in finding.parts:
                check_rankable_features(part.experiment, basis)
                _check_one_basis(part, node.of)
            there = None if finding.stands_in else f"`{node.of}` has {{}} features"
            ranked = finding.features
            count = count_picked(node, values, size if finding.stands_in else len(ranked), there)
        except PickError as refusal:
            diagnostics.append(_bad_pick(node, refusal))
            return None
        self.used_sites(node, finding)
        if finding.stands_in:
            self._say_sites(node, finding, [])
            return list(range(count))
        chosen = list(ranked)[:count]
        said = ", ".join(f"{each} ({ranked[each]:.3g})" for each in chosen[:MAX_LISTED_SITES])
        more = len(chosen) - MAX_LISTED_SITES
        said += f" … and {more} more" if more > 0 else ""
        self.picks[self._written(node)] = f"features {said}; by mean {finding.measure}, signed"
        by_size = list(finding.by_size.features)[:count]
        if set(by_size) != set(chosen):
            names = [[f"feature {each}" for each in some] for some in (chosen, by_size)]
            picked, other = _differing(*names), _differing(*names[::-1])
            _warn_sign(node, finding, picked, other, diagnostics)
        return chosen

    def _say_sites(
        self, node: ast.RankedSelection, finding: Finding, chosen: Sequence[RankedSite]
    ) -> None:
        key = self._written(node)
        if finding.stands_in:
            self.picks[key] = (
                f"known only after `{finding.name}` has run; its first cells are placeholders"
            )
            return
        least, most = self._longest.get(key, (len(chosen), -1))
        self._longest[key] = (min(least, len(chosen)), max(most, len(chosen)))
        if len(chosen) <= most:  # of several values of a loop, the longest list is shown
            return
        listed = ", ".join(f"{site.label} ({site.value:.3g})" for site in chosen[:MAX_LISTED_SITES])
        more = (
            f" … and {len(chosen) - MAX_LISTED_SITES} more"
            if len(chosen) > MAX_LISTED_SITES
            else ""
        )
        said = f"{listed or 'nothing'}{more}; by mean {finding.measure}"
        said += ", signed"
        lowest = finding.sites[-1]
        if chosen and lowest not in chosen and -lowest.value > abs(chosen[0].value):
            said += f": {lowest.label} ({lowest.value:.3g}) is larger in size, but below 0"
        if finding.cells > len(finding.sites):
            said += f", each of the {len(finding.sites)} sites by the best of its cells"
        self.picks[key] = said

    # --- tokens -----------------------------------------------------------------------------------

    def pick_tokens(
        self,
        base: ast.RankedTokens,
        run: str,
        values: Mapping[str, Any],
        table: PromptTable,
        tokenizer: TextTokenizer,
        diagnostics: list[Diagnostic],
    ) -> list[tuple[str, list[Hits]]]:
        """Return the label and the tokens per row of every cell.

        Empty after E0620, and if the experiment was rejected.
        """
        node = base.ranked
        try:
            node = self._named(node, values)
            finding, at = self.finding(node, values)
            if finding is None:
                return []
            if "position" in dict(at):
                raise PickError("each position is ranked", "remove `position`")
            label = f"{self.said(node, values)} {'tokens' if base.plural else 'token'}"
            named = replace(base, ranked=node)
            hits = self._hits(named, label, finding, run, values, table, tokenizer)
        except PickError as refusal:
            diagnostics.append(_bad_pick(node, refusal, base.span))
            return []
        if not finding.stands_in:
            other = finding.by_size.tokens(table, run, tokenizer)
            orders = finding.tokens(table, run, tokenizer)
            counts = _counts(node, values, orders, finding.name)
            rows = [
                row
                for row, order in orders.items()
                if set(order[: counts[row]]) != set(other[row][: counts[row]])
            ]
            if rows:
                picked = f"tokens of {len(rows)} of {len(orders)} rows"
                others = "other tokens of these rows"
                _warn_sign(node, finding, picked, others, diagnostics, base.span)
        return hits

    def _hits(
        self,
        base: ast.RankedTokens,
        label: str,
        finding: Finding,
        run: str,
        values: Mapping[str, Any],
        table: PromptTable,
        tokenizer: TextTokenizer,
    ) -> list[tuple[str, list[Hits]]]:
        node, name = base.ranked, finding.name
        if name not in self._checked:
            hint = f"select its sites: `{node.span.written}`"
            hint = f"let it sweep single tokens, for example `at each token of …`, or {hint}"
            for part in finding.parts:
                check_rankable_tokens(part.experiment, table, tokenizer, hint)
            self._checked.add(name)
        if finding.tokens_stand_in:
            _ = _amount(node, values)
            ends = [((len(row.ids) - 1,),) for row in table.runs[run].rows]
            return [(label, ends)]
        orders = finding.tokens(table, run, tokenizer)
        if not orders:
            raise PickError(
                f"`{name}` has none of the {len(table)} rows that this experiment runs on",
                "use the same part and limit of the prompts in both",
            )
        self._same_tokens(base, finding, run, orders)
        counts = _counts(node, values, orders, name)
        self._say_tokens(node, finding, orders, counts, len(table) - len(orders))
        amount = _amount(node, values)
        single = not isinstance(amount, Percent) and amount == 1
        if base.plural or single or not any(counts.values()):
            hits: list[Hits] = [
                (tuple(sorted(orders[row][: counts[row]])),) if row in orders else ()
                for row in table.row_ids
            ]
            return [(label, hits)]
        return [
            (
                f"{rank + 1} of {name}",
                [
                    ((orders[row][rank],),) if row in orders and rank < counts[row] else ()
                    for row in table.row_ids
                ],
            )
            for rank in range(max(counts.values()))
        ]

    def _same_tokens(
        self,
        base: ast.RankedTokens,
        finding: Finding,
        run: str,
        orders: Mapping[int, Sequence[int]],
    ) -> None:
        """Check that both runs of a rule have the same number of rankable tokens in every row.

        A rule that reads in one run and writes in another needs every picked token in both.
        """
        place = (base.span, format_ranked(base.ranked))
        first, before = self._runs.setdefault(place, (run, orders))
        for row, order in orders.items():
            other = len(before.get(row, ()))
            if other != len(order):
                raise PickError(
                    f"row {row} has {other} tokens of `{finding.name}` in `{first}` and "
                    f"{len(order)} in `{run}`",
                    f"let `{finding.name}` sweep positions that a row has in both runs",
                )

    def _say_tokens(
        self,
        node: ast.RankedSelection,
        finding: Finding,
        orders: Mapping[int, Sequence[int]],
        counts: Mapping[int, int],
        lacking: int,
    ) -> None:
        key = f"{self._written(node)} tokens"
        least, most = self._longest.get(key, (min(counts.values()), max(counts.values())))
        least, most = min(least, *counts.values()), max(most, *counts.values())
        self._longest[key] = (least, most)
        sizes = [len(order) for order in orders.values()]
        if finding.stands_in:
            said = f"known only after `{finding.name}` has run; its first tokens are placeholders"
        else:
            said = (
                f"{_range_text(least, most)} of {_range_text(min(sizes), max(sizes))} tokens "
                f"in each row, by {finding.measure} of the row, signed"
            )
            axes = finding.parts[0].experiment.axes
            if finding.cells > next(len(a.labels) for a in axes if a.name == "position"):
                said += ", each token ranked by the best of its cells"
        if lacking:
            said += (
                f"; {lacking} of {lacking + len(orders)} rows dropped, because "
                f"`{finding.name}` lacks them"
            )
        self.picks[key] = said


# --- amounts --------------------------------------------------------------------------------------


def _amount(node: ast.RankedSelection, values: Mapping[str, Any]) -> int | Percent:
    """Evaluate the amount of a pick: a count or a percentage."""
    amount: Any = 1 if node.which == "best" else node.amount
    if isinstance(amount, ast.Percent):
        amount = Percent(amount.value)
    name = f"{amount}"
    if isinstance(amount, str):
        if amount not in values:
            known = name_list(values)
            raise PickError(
                f"`{amount}` is neither a `for` variable around it nor a `param`",
                did_you_mean(
                    amount,
                    values,
                    f"known here: {known}" if known else "write a number or a percentage",
                ),
            )
        amount = values[amount]
        name = f"`{name}` = {amount}"
    if isinstance(amount, Percent):
        if not 0 <= amount <= 100:
            raise PickError(f"{name} is not between 0% and 100%", "write a share such as `25%`")
        return amount
    if not is_integer(amount, least=0):
        raise PickError(
            f"{name} is neither a whole number nor a percentage",
            "write a count (`top 10 of …`) or a share (`top 25% of …`)",
        )
    return amount


def count_picked(
    node: ast.RankedSelection, values: Mapping[str, Any], total: int, there: str | None
) -> int:
    """Return how many of `total` items a pick selects.

    Args:
        values: Values of the enclosing `for` variables and of each `param`.
        total: Number of known items.
        there: Message format with the number of items; None if that number isn't known yet.
    """
    amount = _amount(node, values)
    if isinstance(amount, Percent):
        # Round half up; a nonzero share selects at least one item.
        return max(1, int(amount * total / 100 + 0.5)) if amount else 0
    if amount > total and there is not None:
        raise PickError(
            f"{there.format(total)}, fewer than {amount}",
            f"write a smaller number, or a share such as `top 25% of {node.of}`",
        )
    return min(amount, total)


def _counts(
    node: ast.RankedSelection,
    values: Mapping[str, Any],
    orders: Mapping[int, Sequence[int]],
    name: str,
) -> dict[int, int]:
    """Return the number of selected tokens by row id. Rows of equal length share one count."""
    of_size: dict[int, int] = {}
    for row, order in orders.items():
        size = len(order)
        if size not in of_size:
            there = f"row {row} has {{}} tokens of `{name}`"
            of_size[size] = count_picked(node, values, size, there)
    return {row: of_size[len(order)] for row, order in orders.items()}


def _range_text(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _listed(labels: Sequence[str]) -> str:
    more = f" … and {len(labels) - MAX_LISTED_SITES} more" if len(labels) > MAX_LISTED_SITES else ""
    return ", ".join(labels[:MAX_LISTED_SITES]) + more


def _differing(labels: Sequence[str], others: Sequence[str]) -> str:
    """List the labels that aren't among the others."""
    return _listed([label for label in labels if label not in set(others)])


def _warn_sign(
    node: ast.RankedSelection,
    finding: Finding,
    picked: str,
    by_size: str,
    diagnostics: list[Diagnostic],
    span: Span | None = None,
) -> None:
    """Append W0751, once for each source location, even if a `for` gives several numbers."""
    where = span or node.span
    observed = any(
        rule.does.changes == "nothing" for part in finding.parts for rule in part.experiment.rules
    )
    warning = PickBySign(
        span=where,
        text=where.written,
        picked=picked,
        by_size=by_size,
        of=node.of,
        hint="observe the reverse, such as `toward wrong - answer`, or name what to select"
        if observed
        else f"make the negative the first measure of `{node.of}`: `measure -logit(answer) as "
        "delta`",
    )
    earlier = (problem for problem in diagnostics if isinstance(problem, PickBySign))
    if not any((problem.span, problem.of) == (where, node.of) for problem in earlier):
        diagnostics.append(warning)


def _bad_pick(node: ast.RankedSelection, refusal: PickError, span: Span | None = None) -> BadPick:
    where = span or node.span
    return BadPick(span=where, text=where.written, reason=refusal.reason, hint=refusal.hint)
