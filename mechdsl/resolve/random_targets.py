"""Controls: the rules of an experiment on targets that are drawn at random, matched to its own.

What is drawn hangs on the seed and on the targets that it stands for, and on nothing else, so that
the same targets have the same controls in every experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mechdsl.base.plural import plural
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import TooManyCells
from mechdsl.diagnostics.e06_controls import BadControl
from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.prompts.position_hits import lies_behind
from mechdsl.prompts.prompt_table import Hits, PositionCell
from mechdsl.resolve.apart_from import LeftOut, words_of
from mechdsl.resolve.matched_draws import (
    UNIT_WORDS,
    Options,
    RowOptions,
    TokenOptions,
    different_draws,
    merged,
    site_options,
)
from mechdsl.resolve.other_sites import OtherSites
from mechdsl.resolve.random_directions import random_directions
from mechdsl.resolve.removed_blocks import inside_removed
from mechdsl.resolve.resolved import DRAW, Axis, Drawn, ResolvedControl, ResolvedExperiment
from mechdsl.resolve.resolved_rule import Key, PositionTargets, ResolvedRule, SitePoint, SiteTargets
from mechdsl.resolve.site_targets import all_points_label
from mechdsl.vocab.sites import SITES

FINEST_FIRST: tuple[spec.Drawn, ...] = (
    "directions",
    "heads",
    "neurons",
    "experts",
    "layers",
    "positions",
)


def resolve_control(
    experiment: ResolvedExperiment,
    apart: Sequence[LeftOut],
    most_cells: int,
    draws_enough: int | None = None,
) -> tuple[ResolvedControl | None, list[Diagnostic]]:
    """What the experiment is set against; None where it is against nothing, or after an error.

    apart: what is never drawn. draws_enough: how many draws are made, where that is to show only
    whether they can be.
    Codes: E0323, E0630.
    """
    asked = experiment.spec.against
    if asked is None:
        return None, []
    if experiment.n_cells * asked.draws > most_cells:
        return None, [
            TooManyCells(
                span=asked.span,
                of=f"experiment `{experiment.name}`",
                cells=experiment.n_cells * asked.draws,
                most=most_cells,
                axes=f"{plural(experiment.n_cells, 'cell')} × {plural(asked.draws, 'draw')}",
            )
        ]
    try:
        draws = asked.draws if draws_enough is None else min(asked.draws, draws_enough)
        if asked.what in (None, "directions") and any(r.direction for r in experiment.rules):
            if apart:
                span = apart[0].site.span
                reason = "directions are drawn, and sites stay as they are"
                hint = "leave `apart from` out"
                return None, [BadControl(span=span, text=span.written, reason=reason, hint=hint)]
            return random_directions(experiment, asked, draws), []
        control = _Draws(experiment, asked, apart, draws).control()
        _outside_removed(control.experiment.rules, experiment.model.name)
        return control, []
    except _NothingToDraw as nothing:
        reason, hint, span = nothing.reason, nothing.hint, nothing.span or asked.span
        others = isinstance(nothing, _NothingElse)
    if experiment.stand_ins or (others and experiment.model.shape.stands_in):
        return None, []  # what is really picked, or the real model, may have others
    text = asked.span.written
    return None, [BadControl(span=span, text=text, reason=reason, hint=hint)]


class _NothingToDraw(Exception):
    def __init__(self, reason: str, hint: str, span: Span | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.span = span


def _outside_removed(rules: Sequence[ResolvedRule], model: str) -> None:
    """Raises _NothingToDraw where a draw lies in a block that computes nothing."""
    for found in inside_removed(rules, (), model):
        written = "" if found.span is None else found.span.written
        raise _NothingToDraw(
            f"a draw for `{written}` lies in a block that is replaced with identity",
            "name blocks with `apart from` so that neither rule is drawn in the other's",
        )


class _NothingElse(_NothingToDraw):
    """What is written has no others of its kind."""


_SITES = -1
"""Among what was drawn for a cell, the sites of all its rules; tokens stand under their rule."""


@dataclass(frozen=True)
class _CellDraws:
    """What was drawn for one cell."""

    picks: list[dict[int, Any]]
    """Per draw and part."""
    sites: list[int]
    """The rules whose sites are others."""

    def picked(self, draw: int, part: int) -> Any:
        """None where nothing was drawn for this part."""
        return self.picks[draw].get(part) if draw < len(self.picks) else None


class _Draws:
    """The draws of one experiment."""

    def __init__(
        self,
        experiment: ResolvedExperiment,
        asked: spec.Control,
        apart: Sequence[LeftOut],
        draws: int,
    ) -> None:
        self.experiment = experiment
        self.asked = asked
        self.apart = apart
        self.draws = draws
        self.shape: ModelShape = experiment.model.shape
        self.others = OtherSites(self.shape, apart)
        self.matched: dict[str, None] = {}
        """What a draw has in common with what it stands for, in words."""
        self.notes: dict[str, None] = {}
        self.drawn: dict[str, None] = {}
        self.like: list[str] = []
        """Labels of what is written and has no others."""

    def control(self) -> ResolvedControl:
        kinds: list[spec.Drawn | None] = [self._kind(rule) for rule in self.experiment.rules]
        if not any(kinds):
            raise self._nothing()
        self._apart_is_drawn(kinds)
        rules, counts = self._rules(kinds)
        draws = max(counts.counts.values())
        kept = [
            f"`{rule.spec.span.written}` as it is"
            for rule, kind in zip(self.experiment.rules, kinds, strict=True)
            if kind is None and rule.does.changes != "nothing"
        ]
        own = self.experiment.spec
        shadow = replace(
            self.experiment,
            spec=own.model_copy(
                update={
                    "name": f"{own.name} against random",
                    "against": None,
                    "reports": (spec.Report(span=self.asked.span, kind="null band"),),
                    "expects": (),
                }
            ),
            axes=(Axis(DRAW, tuple(range(draws)), self.asked.span), *self.experiment.axes),
            rules=tuple(rules),
            accuracies={},
            control_of=self.experiment.key,
            drawn=counts,
        )
        what = f"random {' and '.join(self.drawn)}"
        drawn = f"{what}, {self._how_many(counts)}, seed {self.experiment.seed}"
        apart = [f"apart from {', '.join(f'`{p.site.span.written}`' for p in self.apart)}"]
        parts = [drawn, *self.matched, *self.notes, *(apart if self.apart else []), *kept]
        return ResolvedControl(shadow, draws, self.asked.draws, what, "; ".join(parts))

    def _how_many(self, counts: Drawn) -> str:
        """`20 draws`, or how many there are."""
        some = [count for count in counts.counts.values() if count]
        fewest, most = min(some), max(some)
        if fewest == self.draws:
            return plural(most, "draw")
        if fewest == most:
            return f"{plural(most, 'draw')}, all there are"
        return (
            f"{fewest:,} to {plural(most, 'draw')}, all there are where fewer than {self.draws:,}"
        )

    def _apart_is_drawn(self, kinds: Sequence[spec.Drawn | None]) -> None:
        """E0630 where something is left out that couldn't be drawn anyway."""
        drawn = {kind for kind in kinds if kind is not None}
        possible = set(drawn)
        for rule, kind in zip(self.experiment.rules, kinds, strict=True):
            if kind == "layers":  # a head in other layers is the same head there
                possible |= self._has(rule) - {"positions"}
        for part in self.apart:
            if part.points and possible.isdisjoint(words_of(part)):
                text, words = part.site.span.written, " and ".join(sorted(drawn))
                has = {word for rule in self.experiment.rules for word in self._has(rule)}
                other = next((w for w in FINEST_FIRST if w in words_of(part) & has), None)
                hint = f"leave out {words}"
                if other is not None:
                    hint += f", or draw {other}: `random({self.asked.draws}, {other})`"
                reason = f"`{text}` has none of the {words} that are drawn"
                raise _NothingToDraw(reason, hint, part.site.span)

    def _nothing(self) -> _NothingToDraw:
        what = self.asked.what
        if what is None:
            reason = "no rule of this experiment has targets that could be others"
            return _NothingToDraw(reason, "sites, layers and positions of rules can be drawn")
        if what == "positions" and any(map(self._is_behind, self.experiment.rules)):
            reason = "tokens of an answer have no others that could stand for them"
            return _NothingToDraw(reason, "draw sites or layers, or name positions of the prompt")
        if what == "positions" and any(rule.acts_later for rule in self.experiment.rules):
            reason = "the newest token of a reply has no others that could stand for it"
            return _NothingToDraw(reason, "draw sites or layers, or act `during prefill`")
        reason = f"no rule of this experiment has {what}"
        return _NothingToDraw(reason, "leave out what is drawn, or name what the rules have")

    def _say_alone(self, whole: int, some: int) -> None:
        """How many cells have no others."""
        cells = f"{self.experiment.n_there:,}"
        if whole:
            has = "has no others, and no band" if whole == 1 else "have no others, and no band"
            self.notes[f"{whole:,} of {cells} cells {has}"] = None
        if some:
            stays = "a rule has no others and stays as it is"
            self.notes[f"in {some:,} of {cells} cells {stays}"] = None

    def _nothing_else(self, kinds: Sequence[spec.Drawn | None]) -> _NothingElse:
        if not self.like:
            reason = "no cell of this experiment writes anything"
            return _NothingElse(reason, "let it write something: `top 3`, say, not `top 0`")
        has = {word for rule in self.experiment.rules for word in self._has(rule)}
        word = next((each for each in FINEST_FIRST if each in has and each not in kinds), None)
        hint = "leave out fewer targets" if self.apart else "join fewer targets"
        if word is not None:
            hint += f", or draw something else: `random({self.asked.draws}, {word})`"
        but = " but what is left out" if self.apart else ""
        return _NothingElse(f"there is nothing else like {self.like[0]}{but}", hint)

    # --- what is drawn ----------------------------------------------------------------------------

    def _kind(self, rule: ResolvedRule) -> spec.Drawn | None:
        """What is drawn for a rule; None where nothing of it is."""
        has = self._has(rule)
        if self.asked.what is not None:
            return self.asked.what if self.asked.what in has else None
        return next((word for word in FINEST_FIRST if word in has), None)

    def _has(self, rule: ResolvedRule) -> set[spec.Drawn]:
        """What could be drawn for a rule: there are others of it."""
        if rule.sites is None or rule.does.changes in ("nothing", "positions", "blocks"):
            return set()
        points = {point for here in rule.sites.points.values() for point in here}
        found: set[spec.Drawn] = set()
        for point in points:
            unit = SITES[point.site].unit
            if point.unit is not None and unit is not None and self._size(point) > 1:
                found.add(UNIT_WORDS[unit])
        # The order of layers is what a path is about.
        in_layers = all(point.layer is not None for point in points)
        if rule.path is None and self.shape.n_layers > 1 and in_layers:
            found.add("layers")
        if rule.does.drawn_positions and not self._is_behind(rule) and not rule.acts_later:
            found.add("positions")
        return found

    def _is_behind(self, rule: ResolvedRule) -> bool:
        """Whether it acts on tokens of the answer, which has no others that it could be."""
        rows = self.experiment.table.runs[self.experiment.spec.base].rows
        return any(lies_behind(cell, rows) for cell in rule.positions.written.values())

    def _size(self, point: SitePoint) -> int:
        return units(self.shape, point.site, point.layer)

    # --- cells ------------------------------------------------------------------------------------

    def _rules(self, kinds: Sequence[spec.Drawn | None]) -> tuple[list[ResolvedRule], Drawn]:
        """The rules at other targets, the same ones in all rules that share some; and how many
        draws each cell has."""
        rules = list(self.experiment.rules)
        chosen = [n for n, kind in enumerate(kinds) if kind is not None]
        in_sites = [n for n in chosen if kinds[n] != "positions"]
        used = {axis for n in in_sites for axis in _targets(rules[n]).axes}
        for n in chosen:  # where a rule writes nothing, there is nothing to be drawn
            if n not in in_sites or not all(map(_any, rules[n].positions.written.values())):
                used.update(rules[n].positions.axes)
        names = tuple(axis.name for axis in self.experiment.axes if axis.name in used)
        cells = list(
            product(*(range(len(axis)) for axis in self.experiment.axes if axis.name in used))
        )

        def key(axes: Sequence[str], cell: Key) -> Key:
            return tuple(cell[names.index(name)] for name in axes)

        def here(n: int, cell: Key) -> tuple[SitePoint, ...]:
            targets = _targets(rules[n])
            return targets.points[key(targets.axes, cell)]

        def writes(n: int, cell: Key) -> bool:
            at = rules[n].positions
            return (
                not names
                or any(a not in names for a in at.axes)
                or _any(at.written[key(at.axes, cell)])
            )

        own = {
            cell: merged(
                self.others.own(kinds[n], here(n, cell)) for n in in_sites if writes(n, cell)
            )
            for cell in cells
        }
        everywhere = merged(own.values())
        tokens = {n: self._tokens(rules[n]) for n in chosen if n not in in_sites}
        cell_draws: list[_CellDraws] = []
        whole = some = 0
        there = self.experiment.cells_along(names)
        for cell in cells:
            written = [n for n in chosen if writes(n, cell)]
            parts: dict[int, Options] = {}
            fixed: list[int] = []
            sites = [n for n in in_sites if n in written]
            if sites:
                found = site_options(
                    own[cell],
                    everywhere,
                    self.others.without_units,
                    self.others.fitting({n: here(n, cell) for n in sites}, kinds),
                    draws=self.draws,
                    seed=self.experiment.seed,
                )
                if found is None:
                    fixed += sites
                else:
                    self.notes[found.without] = None
                    parts[_SITES] = found
            for n in written:
                if n in tokens:
                    options = tokens[n][key(rules[n].positions.axes, cell)]
                    if all(row.alone for row in options.rows):
                        fixed.append(n)
                    else:
                        parts[n] = options
            whole += 0 if parts else there[cell]
            some += there[cell] if parts and fixed else 0
            if not parts and fixed:
                labels = dict.fromkeys(self._label_of(n, kinds[n], key, cell) for n in fixed)
                self.like.append(f"`{' + '.join(labels)}`")
            picks = different_draws(list(parts.values()), draws=self.draws) if parts else []
            cell_draws.append(
                _CellDraws([dict(zip(parts, each, strict=True)) for each in picks], sites)
            )
        if whole == there.total():
            raise self._nothing_else(kinds)
        self._say_alone(whole, some)
        drawn = Drawn(names, {c: len(d.picks) for c, d in zip(cells, cell_draws, strict=True)})
        for n in (*in_sites, *tokens):
            word = kinds[n]
            assert word is not None
            self.drawn[word] = None
            moved = self._positions if n in tokens else self._sites
            rules[n] = moved(n, word, names, dict(zip(cells, cell_draws, strict=True)))
        return rules, drawn

    def _label_of(
        self,
        n: int,
        kind: spec.Drawn | None,
        key: Callable[[Sequence[str], Key], Key],
        cell: Key,
    ) -> str:
        """What a rule writes in a cell, in words."""
        rule = self.experiment.rules[n]
        if kind == "positions":
            return rule.positions.written[key(rule.positions.axes, cell)].label
        return _targets(rule).labels[key(_targets(rule).axes, cell)]

    # --- sites ------------------------------------------------------------------------------------

    def _sites(
        self, n: int, kind: spec.Drawn, names: tuple[str, ...], cells: Mapping[Key, _CellDraws]
    ) -> ResolvedRule:
        """The rule with other units or layers."""
        rule = self.experiment.rules[n]
        own = _targets(rule)
        if kind == "layers":
            self.matched["the same component, in as many layers"] = None
        else:
            self.matched["of the same component, as many in each layer"] = None
        points: dict[Key, tuple[SitePoint, ...]] = {}
        sources: dict[Key, tuple[SitePoint, ...]] = {}
        labels: dict[Key, str] = {}
        most = max(len(drawn.picks) for drawn in cells.values())
        for (cell, drawn), draw in product(cells.items(), range(most)):
            at = tuple(cell[names.index(name)] for name in own.axes)
            before = own.points[at]
            picked = drawn.picked(draw, _SITES) if n in drawn.sites else None
            after = self.others.moved(before, before, kind, picked)
            points[draw, *cell] = after
            labels[draw, *cell] = own.labels[at] if picked is None else all_points_label(after)
            if own.sources is not None:
                sources[draw, *cell] = self.others.moved(own.sources[at], before, kind, picked)
        return replace(rule, sites=SiteTargets((DRAW, *names), points, labels, sources or None))

    # --- positions --------------------------------------------------------------------------------

    def _tokens(self, rule: ResolvedRule) -> dict[Key, TokenOptions]:
        """What could stand for the tokens of each cell, in the same rows."""
        across = _across(rule)
        base = self.experiment.table.runs[self.experiment.spec.base].rows
        other = self.experiment.table.runs[rule.run].rows
        if not across and any(a.ids != b.ids for a, b in zip(base, other, strict=True)):
            self.notes["read at the same token of the other run"] = None
        allowed = [
            tuple(
                token
                for token, special in enumerate(row.special)
                if not special and (across or (token < len(there.ids) and not there.special[token]))
            )
            for row, there in zip(base, other, strict=True)
        ]
        row_keys, seed = self.experiment.table.row_keys, self.experiment.seed
        found: dict[Key, TokenOptions] = {}
        for key, cell in rule.positions.written.items():
            rows = [
                RowOptions.of(tokens, hits, row_key=row_key, seed=seed)
                for row_key, tokens, hits in zip(row_keys, allowed, cell.hits, strict=True)
            ]
            found[key] = TokenOptions(rows)
            if any(row.among for row in rows):
                self.notes["own tokens among them in rows that have too few others"] = None
            stay = any(any(row.hits) and row.alone for row in rows)
            if stay and not all(row.alone for row in rows):
                self.notes["rows without others as they are"] = None
        return found

    def _positions(
        self, n: int, kind: spec.Drawn, names: tuple[str, ...], cells: Mapping[Key, _CellDraws]
    ) -> ResolvedRule:
        """The rule at other tokens of the same rows."""
        self.matched["as many tokens of the same row, special tokens excluded"] = None
        rule = self.experiment.rules[n]
        own, across = rule.positions, _across(rule)
        written: dict[Key, PositionCell] = {}
        read: dict[Key, PositionCell] = {}
        most = max(len(drawn.picks) for drawn in cells.values())
        for (cell, drawn), draw in product(cells.items(), range(most)):
            at = tuple(cell[names.index(name)] for name in own.axes)
            hits: tuple[Hits, ...] | None = drawn.picked(draw, n)
            written[draw, *cell], read[draw, *cell] = own.written[at], own.read[at]
            if hits is not None:
                written[draw, *cell] = replace(own.written[at], hits=hits)
                read[draw, *cell] = own.read[at] if across else written[draw, *cell]
        positions = PositionTargets((DRAW, *names), written, read, own.left_out)
        return replace(rule, positions=positions)


def with_controls(experiments: Iterable[ResolvedExperiment]) -> list[ResolvedExperiment]:
    """Every experiment, and behind it what it is set against."""
    return [
        each
        for experiment in experiments
        for each in (
            experiment,
            experiment.control and experiment.control.experiment,
            experiment.bare and experiment.bare.experiment,
        )
        if each is not None
    ]


def _targets(rule: ResolvedRule) -> SiteTargets:
    assert rule.sites is not None
    return rule.sites


def _any(cell: PositionCell) -> bool:
    """Whether anything is written there, in any row."""
    return any(run for row in cell.hits for run in row)


def _across(rule: ResolvedRule) -> bool:
    """Whether what is read stands elsewhere than what is written."""
    return rule.spec.onto is not None or rule.apart is not None
