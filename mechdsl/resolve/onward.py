"""What one experiment found, used in another: `top 10 of cie`, `top 25% of caap tokens`.

Before an experiment has run, its cells stand in for its ranking, in the order of its grid, so that
everything that needs it can be checked and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from mechdsl.data.positions import resolve_positions
from mechdsl.data.types import PositionCell, PromptTable
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.percent import Percent
from mechdsl.registry import nearest
from mechdsl.resolve.types import (
    Key,
    PositionTargets,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.source import Span
from mechdsl.syntax import ast
from mechdsl.vocab.effects import EFFECTS

if TYPE_CHECKING:
    from mechdsl.data.tokenizer import TextTokenizer
    from mechdsl.results.data import Floats
    from mechdsl.results.experiment import ExperimentResult

SHOWN = 10
"""Sites of a pick that the conventions list."""
Hits = tuple[tuple[int, ...], ...]


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

    @staticmethod
    def of(experiment: ResolvedExperiment, result: ExperimentResult) -> VariantFinding:
        """What a measured experiment found, by its first measure."""
        import numpy as np  # not at the top: `validate` has nothing to calculate

        from mechdsl.results.resampling import parts

        data = result.measures[0]
        ids = result.row_ids if result.row_ids is not None else experiment.table.row_ids
        name = data.label if data.effect == "raw" else f"{data.effect} of {data.label}"
        if data.kind == "category":  # has no effect; picking by it is refused before anything runs
            none = np.full(len(data.patched), np.nan)
            return VariantFinding(experiment, name, none, data.patched, ids)
        effect = EFFECTS[data.effect]
        with np.errstate(divide="ignore", invalid="ignore"):
            means = parts(data, effect, slice(None), np.arange(data.patched.shape[1])).mean()
            values = effect.of_means(data.patched, data.base, data.source)
        return VariantFinding(
            experiment, name, means, np.broadcast_to(values, data.patched.shape), ids
        )

    def sites(self) -> Iterator[RankedSite]:
        """Of every cell that has a value, in the order of the grid."""
        experiment = self.experiment
        axes = [axis.name for axis in experiment.axes]
        places = [[axes.index(a) for a in _sites(rule).axes] for rule in experiment.rules]
        cells = product(*(range(len(axis)) for axis in experiment.axes))
        for cell, index in enumerate(cells):
            value = math.nan if self.means is None else float(self.means[cell])
            if self.means is not None and not math.isfinite(value):
                continue
            points: dict[SitePoint, None] = {}
            labels: dict[str, None] = {}
            for rule, place in zip(experiment.rules, places, strict=True):
                key = tuple(index[i] for i in place)
                labels[_sites(rule).labels[key]] = None
                points.update(dict.fromkeys(_written(rule, key)))
            yield RankedSite(" + ".join(labels), tuple(points), value)

    def tokens(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> Iterator[tuple[int, float, int]]:
        """(row id, value, token of the run) of every position in every row that has it."""
        own = self.experiment
        rule = _token_rule(own)
        index = [axis.name for axis in own.axes].index("position")
        by_label = _by_label(own, rule, table, run, tokenizer)
        cells = [by_label.get(str(label)) for label in own.axes[index].labels]
        here = set(table.row_ids)
        columns = own.table.row_ids if self.values is None else self.row_ids
        worth = None if self.values is None else self._worth(index, self.values)
        for column, row in enumerate(columns):
            for number, cell in enumerate(cells if row in here else ()):
                hits = () if cell is None else cell.get(row, ())
                value = 0.0 if worth is None else float(worth[number, column])
                if hits and math.isfinite(value):
                    yield row, value, hits[0][0]

    def _worth(self, axis: int, values: Floats) -> Floats:
        """[position, row]: a position with several cells (in several layers, say) counts with the
        best of them."""
        import numpy as np

        shape = (*self.experiment.shape, values.shape[1])
        moved = np.moveaxis(values.reshape(shape), axis, 0)
        flat = moved.reshape(moved.shape[0], -1, values.shape[1])
        highest = np.where(np.isnan(flat), -np.inf, flat).max(axis=1)
        return np.where(np.isneginf(highest), np.nan, highest)


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
    def measure(self) -> str:
        return self.parts[0].measure

    @property
    def cells(self) -> int:
        return sum(part.experiment.n_cells for part in self.parts)

    def on(self, model: str) -> Finding:
        """Of a comparison of models, what it found on one of them."""
        own = tuple(part for part in self.parts if part.experiment.model.name == model)
        return self if not own or len(own) == len(self.parts) else Finding(own)

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

    def tokens(
        self, table: PromptTable, run: str, tokenizer: TextTokenizer
    ) -> dict[int, list[int]]:
        """Row id → the tokens of a run that it ranked in that row, the best first."""
        key = (id(table), run)
        if key not in self._orders:
            best: dict[int, dict[int, float]] = {}
            for part in self.parts:
                for row, value, token in part.tokens(table, run, tokenizer):
                    own = best.setdefault(row, {})
                    own[token] = max(value, own.get(token, value))
            # Sorting is stable: ties stay in the order of the grid.
            self._orders[key] = {
                row: sorted(own, key=lambda token, own=own: -own[token])
                for row, own in best.items()
            }
        return self._orders[key]


@dataclass
class Onward:
    """Findings that an experiment may use, and what it picked of them."""

    found: Mapping[str, Finding] = field(default_factory=dict[str, Finding])
    picks: dict[str, str] = field(default_factory=dict[str, str])
    """As written → what was picked, in words."""
    sites_of: dict[str, Span] = field(default_factory=dict[str, Span])
    """Experiments whose sites are used → where."""
    _longest: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    _runs: dict[Span, tuple[str, Mapping[int, Sequence[int]]]] = field(
        default_factory=dict[Span, tuple[str, Mapping[int, Sequence[int]]]]
    )
    """Of tokens that are picked: the first run that they were found in, and all there are."""

    @property
    def stand_ins(self) -> tuple[str, ...]:
        return tuple(name for name, finding in self.found.items() if finding.stands_in)

    # --- sites ------------------------------------------------------------------------------------

    def pick_sites(
        self, node: ast.Ranked, values: Mapping[str, Any], diagnostics: list[Diagnostic]
    ) -> list[RankedSite] | None:
        """The best sites of an experiment; None after E0620."""
        finding = self.found[node.of]
        try:
            for part in finding.parts:
                _check_sites(part.experiment, node)
            count = _count(node, values, len(finding.sites), f"`{node.of}` has {{}} sites")
        except Refused as refusal:
            diagnostics.append(_bad(node, refusal))
            return None
        self.sites_of.setdefault(node.of, node.span)
        chosen = finding.sites[:count]
        self._say_sites(node, finding, chosen)
        return chosen

    def _say_sites(self, node: ast.Ranked, finding: Finding, chosen: Sequence[RankedSite]) -> None:
        key = node.span.written
        if finding.stands_in:
            self.picks[key] = f"known when `{finding.name}` has run; its first cells stand in"
            return
        least, most = self._longest.get(key, (len(chosen), -1))
        self._longest[key] = (min(least, len(chosen)), max(most, len(chosen)))
        if len(chosen) <= most:  # of several values of a loop, the most is listed
            return
        listed = ", ".join(f"{site.label} ({site.value:.3g})" for site in chosen[:SHOWN])
        more = f" … and {len(chosen) - SHOWN} more" if len(chosen) > SHOWN else ""
        said = f"{listed or 'nothing'}{more}; by mean {finding.measure}"
        lowest = finding.sites[-1]
        if chosen and lowest not in chosen and -lowest.value > abs(chosen[0].value):
            said += f", signed: {lowest.label} ({lowest.value:.3g}) is larger, but below 0"
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
        """(label, hits per row) of every cell; none after E0620."""
        node = base.ranked
        finding = self.found[node.of]
        try:
            return self._hits(base, finding, run, values, table, tokenizer)
        except Refused as refusal:
            diagnostics.append(_bad(node, refusal, base.span))
            return []

    def _hits(
        self,
        base: ast.RankedTokens,
        finding: Finding,
        run: str,
        values: Mapping[str, Any],
        table: PromptTable,
        tokenizer: TextTokenizer,
    ) -> list[tuple[str, list[Hits]]]:
        node, name = base.ranked, finding.name
        for part in finding.parts:
            _check_tokens(part.experiment, node, table, tokenizer)
        orders = finding.tokens(table, run, tokenizer)
        if not orders:
            raise Refused(
                f"`{name}` has none of the {len(table)} rows that this experiment runs on",
                "let both run on the same part and limit of their prompts",
            )
        self._same_tokens(base, finding, run, orders)
        counts = {
            row: _count(node, values, len(order), f"row {row} has {{}} tokens of `{name}`")
            for row, order in orders.items()
        }
        self._say_tokens(node, finding, orders, counts, len(table) - len(orders))
        label = _label(base, values)
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
        """What is read in one run and written in another must be there in both, whichever tokens
        turn out to be picked."""
        first, before = self._runs.setdefault(base.span, (run, orders))
        for row, order in orders.items():
            other = len(before.get(row, ()))
            if other != len(order):
                raise Refused(
                    f"row {row} has {other} tokens of `{finding.name}` in `{first}` and "
                    f"{len(order)} in `{run}`",
                    f"let `{finding.name}` sweep positions that a row has in both runs",
                )

    def _say_tokens(
        self,
        node: ast.Ranked,
        finding: Finding,
        orders: Mapping[int, Sequence[int]],
        counts: Mapping[int, int],
        lacking: int,
    ) -> None:
        key = f"{node.span.written} tokens"
        least, most = self._longest.get(key, (min(counts.values()), max(counts.values())))
        least, most = min(least, *counts.values()), max(most, *counts.values())
        self._longest[key] = (least, most)
        sizes = [len(order) for order in orders.values()]
        if finding.stands_in:
            said = f"known when `{finding.name}` has run; its first tokens stand in"
        else:
            said = (
                f"{_ends(least, most)} of {_ends(min(sizes), max(sizes))} tokens in each row, by "
                f"the row's own {finding.measure}, signed"
            )
            if finding.cells > len(_position_labels(finding.parts[0].experiment)):
                said += ", each token by the best of its cells"
        if lacking:
            said += (
                f"; {lacking} of {lacking + len(orders)} rows dropped, `{finding.name}` lacks them"
            )
        self.picks[key] = said


def pick_nothing(
    sites: SiteTargets | None, positions: PositionTargets | None
) -> tuple[SiteTargets | None, PositionTargets | None]:
    """Cells that pick no site write at no token: any site stands in for them.

    A cell has sites and positions of its own in every stage behind this one.
    """
    if sites is None or positions is None or all(sites.points.values()):
        return sites, positions
    some = next((p for p in sites.points.values() if p), (SitePoint("embed", None, None),))
    points = {key: here or some for key, here in sites.points.items()}
    sources = sites.sources
    if sources is not None:
        read = next((p for p in sources.values() if p), some)
        sources = {key: here or read for key, here in sources.items()}
    axes = (*positions.axes, *(a for a in sites.axes if a not in positions.axes))
    sizes = {axis: 1 + max(key[i] for key in sites.points) for i, axis in enumerate(sites.axes)}
    more = axes[len(positions.axes) :]
    written: dict[Key, PositionCell] = {}
    read_at: dict[Key, PositionCell] = {}
    for before in positions.written:
        for behind in product(*(range(sizes[axis]) for axis in more)):
            key = (*before, *behind)
            at = dict(zip(axes, key, strict=True))
            empty = not sites.points[tuple(at[axis] for axis in sites.axes)]
            for cells, into in ((positions.written, written), (positions.read, read_at)):
                cell = cells[before]
                into[key] = _without_tokens(cell) if empty else cell
    labels = {key: label if sites.points[key] else "nothing" for key, label in sites.labels.items()}
    return (
        replace(sites, points=points, labels=labels, sources=sources),
        replace(positions, axes=axes, written=written, read=read_at),
    )


def _without_tokens(cell: PositionCell) -> PositionCell:
    return replace(cell, hits=tuple(((),) if row else () for row in cell.hits))


# --- amounts --------------------------------------------------------------------------------------


def _amount(node: ast.Ranked, values: Mapping[str, Any]) -> int | Percent:
    """How many, or what share."""
    amount: Any = 1 if node.which == "best" else node.amount
    if isinstance(amount, ast.Percent):
        amount = Percent(amount.value)
    name = f"{amount}"
    if isinstance(amount, str):
        if amount not in values:
            known = ", ".join(f"`{each}`" for each in values)
            raise Refused(
                f"`{amount}` is neither a `for` variable around it nor a `param`",
                did_you_mean(
                    nearest(amount, values),
                    f"known here: {known}" if known else "write a number or a percentage",
                ),
            )
        amount = values[amount]
        name = f"`{name}` = {amount}"
    if isinstance(amount, Percent):
        if not 0 <= amount <= 100:
            raise Refused(f"{name} is not between 0% and 100%", "write a share such as `25%`")
        return amount
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
        raise Refused(
            f"{name} is neither a whole number nor a percentage",
            "count them (`top 10 of …`) or name a share (`top 25% of …`)",
        )
    return amount


def _count(node: ast.Ranked, values: Mapping[str, Any], total: int, there: str) -> int:
    """How many of `total` are meant. `there` says how many there are."""
    amount = _amount(node, values)
    if isinstance(amount, Percent):
        # Half up; a share is never rounded down to nothing.
        return max(1, int(amount * total / 100 + 0.5)) if amount else 0
    if amount > total:
        raise Refused(
            f"{there.format(total)}, fewer than {amount}",
            f"write a smaller number, or a share such as `top 25% of {node.of}`",
        )
    return amount


def _label(base: ast.RankedTokens, values: Mapping[str, Any]) -> str:
    node = base.ranked
    if not isinstance(node.amount, str):
        return base.span.written
    return f"top {values[node.amount]} of {node.of} {'tokens' if base.plural else 'token'}"


def _ends(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _bad(node: ast.Ranked, refusal: Refused, span: Span | None = None) -> BadPick:
    where = span or node.span
    return BadPick(span=where, text=where.written, reason=refusal.reason, hint=refusal.hint)


# --- what can be picked ---------------------------------------------------------------------------


def _sites(rule: ResolvedRule) -> SiteTargets:
    assert rule.sites is not None  # `_check_sites` has refused others
    return rule.sites


def _written(rule: ResolvedRule, key: Key) -> tuple[SitePoint, ...]:
    """What a rule writes in a cell; for one on attention, the heads' outputs."""
    points = _sites(rule).points[key]
    if rule.edge is None:
        return points
    return tuple(replace(point, site="z") for point in points)


def _check_first_measure(experiment: ResolvedExperiment) -> None:
    name = experiment.name
    if not experiment.rules:
        raise Refused(
            f"`{name}` intervenes nowhere, so it has nothing to rank",
            "name an experiment with a rule that sweeps",
        )
    first = experiment.measures[0]
    if first.kind == "category":
        raise Refused(
            f"the first measure of `{name}`, `{first.text}`, is a category, which has no order",
            f"let `{name}` measure a number first, such as `logit(answer)`",
        )


def _check_sites(experiment: ResolvedExperiment, node: ast.Ranked) -> None:
    _check_first_measure(experiment)
    name = experiment.name
    without = [rule for rule in experiment.rules if rule.sites is None]
    tokens = f"{node.span.written} tokens"
    if without:
        some = "" if len(without) == len(experiment.rules) else "some rules of "
        raise Refused(
            f"{some}`{name}` change{'' if some else 's'} the input, which is no site",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )
    swept = {axis for rule in experiment.rules for axis in _sites(rule).axes}
    if not swept and experiment.n_cells > 1:
        site = next(iter(_sites(experiment.rules[0]).labels.values()))
        raise Refused(
            f"`{name}` sweeps positions only, all at {site}",
            f"name its tokens, `{tokens}`, or an experiment that sweeps sites",
        )


def _token_rule(experiment: ResolvedExperiment) -> ResolvedRule:
    """The rule whose positions are swept."""
    return next(rule for rule in experiment.rules if "position" in rule.positions.axes)


def _position_labels(experiment: ResolvedExperiment) -> tuple[Any, ...]:
    return next(axis.labels for axis in experiment.axes if axis.name == "position")


def _check_tokens(
    experiment: ResolvedExperiment, node: ast.Ranked, table: PromptTable, tokenizer: TextTokenizer
) -> None:
    _check_first_measure(experiment)
    name = experiment.name
    if experiment.table.name != table.name:
        raise Refused(
            f"`{name}` ranks tokens of `{experiment.table.name}`, this experiment runs on "
            f"`{table.name}`",
            "let both name one block of prompts: tokens are ranked row by row",
        )
    if experiment.model.tokenizer.hash != tokenizer.hash:
        raise Refused(
            f"`{name}` ranks tokens of `{experiment.model.name}`, which has another tokenizer",
            "let both run on one model",
        )
    sweeping = [rule for rule in experiment.rules if "position" in rule.positions.axes]
    if not sweeping:
        raise Refused(
            f"`{name}` doesn't sweep positions",
            "let it sweep single tokens, for example `at each token of …`, or pick its sites: "
            f"`{node.span.written}`",
        )
    rule = sweeping[0]
    if rule.spec.onto is not None:
        raise Refused(
            f"a cell of `{name}` has tokens in two places",
            "let it sweep single tokens, for example `at each token of …`",
        )
    for cell in rule.positions.written.values():
        if any(row and (len(row) != 1 or len(row[0]) != 1) for row in cell.hits):
            raise Refused(
                f"the cell `{cell.label}` of `{name}` covers several tokens",
                "let it sweep single tokens: `each token …` or `token *`, on spans that are "
                "equally long",
            )


def _by_label(
    own: ResolvedExperiment,
    rule: ResolvedRule,
    table: PromptTable,
    run: str,
    tokenizer: TextTokenizer,
) -> dict[str, dict[int, Hits]]:
    """Label → row id → where the positions of an experiment are in one run."""
    positions = rule.positions
    targets = {own.spec.base: positions.written, rule.run: positions.read}.get(run)
    if targets is not None:
        return {
            cell.label: dict(zip(own.table.row_ids, cell.hits, strict=True))
            for cell in targets.values()
        }
    # A run that it neither wrote nor read: the same positions, found in that run's own text.
    cells, problems = resolve_positions(rule.spec.at, table, run, tokenizer=tokenizer)
    if has_errors(problems):
        raise Refused(
            f"the positions of `{own.name}` aren't in `{run}`: {problems[0].message}",
            f"let `{own.name}` run on `{run}` too",
        )
    return {cell.label: dict(zip(table.row_ids, cell.hits, strict=True)) for cell in cells}
