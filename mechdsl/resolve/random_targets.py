"""Controls: the rules of an experiment on targets that are drawn at random, matched to its own.

What is drawn hangs on the seed and on the targets that it stands for, and on nothing else, so that
the same targets have the same controls in every experiment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from mechdsl.base.plural import plural
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import TooManyCells
from mechdsl.diagnostics.e06_controls import BadControl
from mechdsl.models.shape import ModelShape, units
from mechdsl.program import spec
from mechdsl.prompts.position_hits import lies_behind
from mechdsl.prompts.prompt_table import Hits, PositionCell
from mechdsl.resolve.matched_draws import Picked, Slot, draw_targets, draw_tokens, merged
from mechdsl.resolve.resolved import (
    DRAW,
    Axis,
    Key,
    PositionTargets,
    ResolvedControl,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.resolve.site_targets import points_label
from mechdsl.vocab.sites import SITES

UNIT_WORDS: Mapping[str, spec.Drawn] = {
    "head": "heads",
    "kv_head": "heads",
    "neuron": "neurons",
    "expert": "experts",
}
FINEST_FIRST: tuple[spec.Drawn, ...] = ("heads", "neurons", "experts", "layers", "positions")


def resolve_control(
    experiment: ResolvedExperiment, most_cells: int, draws_enough: int | None = None
) -> tuple[ResolvedControl | None, list[Diagnostic]]:
    """What the experiment is set against; None where it is against nothing, or after an error.

    draws_enough: how many draws are made, where that is to show only whether they can be.
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
        return _Draws(experiment, asked, draws).control(), []
    except _NothingToDraw as nothing:
        reason, hint = nothing.reason, nothing.hint
        others = isinstance(nothing, _NothingElse)
    if experiment.stand_ins or (others and experiment.model.shape.stands_in):
        return None, []  # what is really picked, or the real model, may have others
    text = asked.span.written
    return None, [BadControl(span=asked.span, text=text, reason=reason, hint=hint)]


class _NothingToDraw(Exception):
    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class _NothingElse(_NothingToDraw):
    """What is written has no others of its kind."""


class _Draws:
    """The draws of one experiment."""

    def __init__(self, experiment: ResolvedExperiment, asked: spec.Control, draws: int) -> None:
        self.experiment = experiment
        self.asked = asked
        self.draws = draws
        self.shape: ModelShape = experiment.model.shape
        self.matched: dict[str, None] = {}
        """What a draw has in common with what it stands for, in words."""
        self.notes: dict[str, None] = {}
        self.drawn: dict[str, None] = {}
        self.different: set[int] = set()
        """How many draws differ, in each cell that has others."""
        self.alone: dict[int, tuple[tuple[str, ...], set[Key]]] = {}
        """Rule → axes, and the keys along them that have no others and stand for themselves."""
        self.like: list[str] = []
        """Labels of what is written and has no others."""

    def control(self) -> ResolvedControl:
        kinds: list[spec.Drawn | None] = [self._kind(rule) for rule in self.experiment.rules]
        if not any(kinds):
            raise self._nothing()
        rules = self._sites(kinds)
        rules = [
            self._positions(n, rule) if kind == "positions" else rule
            for n, (rule, kind) in enumerate(zip(rules, kinds, strict=True))
        ]
        self._say_alone(kinds)
        self._say_repeats()
        kept = [
            f"`{rule.spec.span.written}` as it is"
            for rule, kind in zip(self.experiment.rules, kinds, strict=True)
            if kind is None and rule.does.changes != "nothing"
        ]
        own = self.experiment.spec
        draws = self.draws
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
        )
        what = f"random {' and '.join(self.drawn)}"
        drawn = f"{what}, {plural(draws, 'draw')}, seed {self.experiment.seed}"
        return ResolvedControl(
            shadow, draws, what, "; ".join([drawn, *self.matched, *self.notes, *kept])
        )

    def _nothing(self) -> _NothingToDraw:
        what = self.asked.what
        if what is None:
            reason = "no rule of this experiment has targets that could be others"
            return _NothingToDraw(reason, "sites, layers and positions of rules can be drawn")
        if what == "positions" and any(map(self._is_behind, self.experiment.rules)):
            reason = "tokens of an answer have no others that could stand for them"
            return _NothingToDraw(reason, "draw sites or layers, or name positions of the prompt")
        reason = f"no rule of this experiment has {what}"
        return _NothingToDraw(reason, "leave out what is drawn, or name what the rules have")

    def _say_alone(self, kinds: Sequence[spec.Drawn | None]) -> None:
        """How many cells have no others, which can't be all."""
        axes = [axis.name for axis in self.experiment.axes]
        parts = []
        for n, (names, keys) in self.alone.items():
            own = self.experiment.rules[n].positions
            where = [axes.index(name) for name in names], [axes.index(name) for name in own.axes]
            parts.append((*where, keys, {key for key, cell in own.written.items() if _any(cell)}))
        whole = some = 0
        for cell in product(*(range(len(axis)) for axis in self.experiment.axes)):
            fixed = [
                tuple(cell[i] for i in along) in keys
                for along, places, keys, written in parts
                if tuple(cell[i] for i in places) in written
            ]
            whole += all(fixed)
            some += any(fixed) and not all(fixed)
        cells = self.experiment.n_cells
        if whole == cells:
            raise self._nothing_else(kinds)
        if whole:
            has = "has no others and stands for itself"
            if whole > 1:
                has = "have no others and stand for themselves"
            self.notes[f"{whole:,} of {cells:,} cells {has}"] = None
        if some:
            stays = "a rule has no others and stays as it is"
            self.notes[f"in {some:,} of {cells:,} cells {stays}"] = None

    def _nothing_else(self, kinds: Sequence[spec.Drawn | None]) -> _NothingElse:
        if not self.like:
            reason = "no cell of this experiment writes anything"
            return _NothingElse(reason, "let it write something: `top 3`, say, not `top 0`")
        has = {word for rule in self.experiment.rules for word in self._has(rule)}
        word = next((each for each in FINEST_FIRST if each in has and each not in kinds), None)
        hint = "join fewer targets"
        if word is not None:
            hint += f", or draw something else: `random({self.asked.draws}, {word})`"
        return _NothingElse(f"there is nothing else like {self.like[0]}", hint)

    def _say_repeats(self) -> None:
        fewest = min(self.different)
        if fewest == self.draws:
            return
        said = f"{fewest:,} different ones, drawn several times each"
        if fewest == 1:
            said = "a single other, drawn every time"
        elif 2 * fewest > self.draws:
            said = f"{fewest:,} different ones, some drawn twice"
        only = "in some cells only " if len(self.different) > 1 else ""
        self.notes[f"{only}{said}"] = None

    # --- what is drawn ----------------------------------------------------------------------------

    def _kind(self, rule: ResolvedRule) -> spec.Drawn | None:
        """What is drawn for a rule; None where nothing of it is."""
        has = self._has(rule)
        if self.asked.what is not None:
            return self.asked.what if self.asked.what in has else None
        return next((word for word in FINEST_FIRST if word in has), None)

    def _has(self, rule: ResolvedRule) -> set[spec.Drawn]:
        """What could be drawn for a rule: there are others of it."""
        if rule.sites is None or rule.does.changes == "nothing":
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
        if rule.does.drawn_positions and not self._is_behind(rule):
            found.add("positions")
        return found

    def _is_behind(self, rule: ResolvedRule) -> bool:
        """Whether it acts on tokens of the answer, which has no others that it could be."""
        rows = self.experiment.table.runs[self.experiment.spec.base].rows
        return any(lies_behind(cell, rows) for cell in rule.positions.written.values())

    def _size(self, point: SitePoint) -> int:
        return units(self.shape, point.site, point.layer)

    # --- sites ------------------------------------------------------------------------------------

    def _sites(self, kinds: Sequence[spec.Drawn | None]) -> list[ResolvedRule]:
        """The rules with other units or layers, the same ones in all rules that share some."""
        rules = list(self.experiment.rules)
        chosen = [n for n, kind in enumerate(kinds) if kind not in (None, "positions")]
        if not chosen:
            return rules
        used = {axis for n in chosen for axis in _targets(rules[n]).axes}
        axes = [axis for axis in self.experiment.axes if axis.name in used]
        names = tuple(axis.name for axis in axes)
        cells = list(product(*(range(len(axis)) for axis in axes)))

        def key(n: int, cell: Key) -> Key:
            at = dict(zip(names, cell, strict=True))
            return tuple(at[name] for name in _targets(self.experiment.rules[n]).axes)

        def here(n: int, cell: Key) -> tuple[SitePoint, ...]:
            return _targets(self.experiment.rules[n]).points[key(n, cell)]

        somewhere = [_written_along(rule.positions, names) for rule in self.experiment.rules]

        def writes(n: int, cell: Key) -> bool:
            along, keys = somewhere[n]
            return tuple(cell[i] for i in along) in keys

        own = {
            cell: merged(self._own(kinds[n], here(n, cell)) for n in chosen if writes(n, cell))
            for cell in cells
        }
        everywhere = merged(own.values())
        points: list[dict[Key, tuple[SitePoint, ...]]] = [{} for _ in rules]
        sources: list[dict[Key, tuple[SitePoint, ...]]] = [{} for _ in rules]
        labels: list[dict[Key, str]] = [{} for _ in rules]
        alone: set[Key] = set()
        draws, seed = self.draws, self.experiment.seed
        for cell in cells:
            written = [n for n in chosen if writes(n, cell)]
            fits = self._fitting(point for n in written for point in here(n, cell))
            drawn = draw_targets(own[cell], everywhere, fits, draws=draws, seed=seed)
            called = {n: _targets(rules[n]).labels[key(n, cell)] for n in chosen}
            if drawn is None:
                alone.add(cell)
                if written:
                    some = dict.fromkeys(called[n] for n in written)
                    self.like.append(f"`{' + '.join(some)}`")
            else:
                self.notes[drawn.without] = None
                self.different.add(drawn.different)
            for draw, n in product(range(draws), chosen):
                picked = drawn.picks[draw] if drawn is not None and n in written else None
                before, read = here(n, cell), _targets(rules[n]).sources
                after = self._moved(before, before, kinds[n], picked)
                points[n][draw, *cell] = after
                labels[n][draw, *cell] = called[n] if picked is None else _label(after)
                if read is not None:
                    moved = self._moved(read[key(n, cell)], before, kinds[n], picked)
                    sources[n][draw, *cell] = moved
        for n in chosen:
            self.alone[n] = names, alone
            word = kinds[n]
            assert word is not None
            self.drawn[word] = None
            if word == "layers":
                self.matched["the same component, in as many layers"] = None
            else:
                self.matched["of the same component, as many in each layer"] = None
            rules[n] = replace(
                rules[n],
                sites=SiteTargets((DRAW, *names), points[n], labels[n], sources[n] or None),
            )
        return rules

    def _own(
        self, kind: spec.Drawn | None, points: Sequence[SitePoint]
    ) -> dict[Slot, tuple[int, ...]]:
        """What of these points can be another."""
        found: dict[Slot, set[int]] = {}
        for point in points:
            slot = self._slot(point, kind)
            if slot is not None:
                target = point.layer if kind == "layers" else point.unit
                assert target is not None
                found.setdefault(slot, set()).add(target)
        return {slot: tuple(sorted(targets)) for slot, targets in found.items()}

    def _slot(self, point: SitePoint, kind: spec.Drawn | None) -> Slot | None:
        if kind == "layers":
            return Slot("layers", self.shape.n_layers, None)
        unit = SITES[point.site].unit
        if kind is None or point.unit is None or unit is None or UNIT_WORDS[unit] != kind:
            return None
        return Slot(kind, self._size(point), point.layer)

    def _fitting(self, written: Iterable[SitePoint]) -> tuple[int, ...]:
        """The layers that have everything that is written in a cell."""
        points = set(written)

        def fits(layer: int) -> bool:
            return all(
                self.shape.has(p.site, layer)
                and units(self.shape, p.site, layer) == units(self.shape, p.site, p.layer)
                for p in points
                if p.layer is not None
            )

        return tuple(layer for layer in range(self.shape.n_layers) if fits(layer))

    def _moved(
        self,
        points: Sequence[SitePoint],
        written: Sequence[SitePoint],
        kind: spec.Drawn | None,
        picked: Picked | None,
    ) -> tuple[SitePoint, ...]:
        """Points with what was drawn for those that are written (which they may be themselves);
        as they are without it."""
        if picked is None:
            return tuple(points)
        found: list[SitePoint] = []
        for point, target in zip(points, written, strict=True):
            slot = self._slot(target, kind)
            if slot is None:
                found.append(point)
            elif kind == "layers":
                # `into layer`: what is read stays where it is.
                same = point == target and target.layer is not None
                found.append(
                    replace(point, layer=picked[slot, target.layer or 0]) if same else point
                )
            else:
                assert target.unit is not None
                found.append(replace(point, unit=picked[slot, target.unit]))
        return tuple(found)

    # --- positions --------------------------------------------------------------------------------

    def _positions(self, n: int, rule: ResolvedRule) -> ResolvedRule:
        """The rule at other tokens of the same rows."""
        self.drawn["positions"] = None
        self.matched["as many tokens of the same row, special tokens excluded"] = None
        own = rule.positions
        across = rule.spec.onto is not None or rule.apart is not None
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
        written: dict[Key, PositionCell] = {}
        read: dict[Key, PositionCell] = {}
        alone: set[Key] = set()
        self.alone[n] = own.axes, alone
        row_keys = self.experiment.table.row_keys
        draws, seed = self.draws, self.experiment.seed
        for key, cell in own.written.items():
            rows = [
                draw_tokens(tokens, hits, row_key=row_key, draws=draws, seed=seed)
                for row_key, tokens, hits in zip(row_keys, allowed, cell.hits, strict=True)
            ]
            if not any(each for each, _ in rows):
                alone.add(key)
                if _any(cell):
                    self.like.append(f"`{cell.label}`")
            elif any(each and among for each, among in rows):
                self.notes["own tokens among them in rows that have too few others"] = None
            stay = [any(row) and not each for row, (each, _) in zip(cell.hits, rows, strict=True)]
            if any(stay) and key not in alone:
                self.notes["rows without others as they are"] = None
            found: set[tuple[Hits, ...]] = set()
            for draw in range(draws):
                hits = tuple(
                    each[draw] if each else before
                    for before, (each, _) in zip(cell.hits, rows, strict=True)
                )
                found.add(hits)
                written[draw, *key] = replace(cell, hits=hits)
                read[draw, *key] = own.read[key] if across else written[draw, *key]
            if key not in alone:
                self.different.add(len(found))
        return replace(
            rule, positions=PositionTargets((DRAW, *own.axes), written, read, own.left_out)
        )


def with_controls(experiments: Iterable[ResolvedExperiment]) -> list[ResolvedExperiment]:
    """Every experiment, and behind it what it is set against."""
    return [
        each
        for experiment in experiments
        for each in (experiment, experiment.control and experiment.control.experiment)
        if each is not None
    ]


def _targets(rule: ResolvedRule) -> SiteTargets:
    assert rule.sites is not None
    return rule.sites


def _any(cell: PositionCell) -> bool:
    """Whether anything is written there, in any row."""
    return any(run for row in cell.hits for run in row)


def _written_along(
    positions: PositionTargets, axes: Sequence[str]
) -> tuple[tuple[int, ...], set[Key]]:
    """Those of these axes that positions have; the keys along them where anything is written."""
    along = tuple(n for n, axis in enumerate(axes) if axis in positions.axes)
    places = [positions.axes.index(axes[n]) for n in along]
    written = (key for key, cell in positions.written.items() if _any(cell))
    return along, {tuple(key[place] for place in places) for key in written}


def _label(points: Sequence[SitePoint]) -> str:
    """All points, whatever a table could show: `L0H2.z + L1H3.z`."""
    by_layer: dict[tuple[str, int | None], list[SitePoint]] = {}
    for point in points:
        by_layer.setdefault((point.site, point.layer), []).append(point)
    return " + ".join(points_label(each) for each in by_layer.values())
