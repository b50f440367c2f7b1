"""Controls: the rules of an experiment on targets that are drawn at random, matched to its own.

What is drawn hangs on the seed and on the targets that it stands for, and on nothing else, so that
the same targets have the same controls in every experiment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import comb, prod
from typing import TypeAlias

from mechdsl import spec
from mechdsl.data.sampling import Permutation, stable_hash
from mechdsl.data.types import PositionCell
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e03_coordinates import TooManyCells
from mechdsl.diagnostics.e06_controls import BadControl
from mechdsl.models.shape import ModelShape, units
from mechdsl.resolve.sites import points_label
from mechdsl.resolve.types import (
    DRAW,
    Axis,
    Control,
    Key,
    PositionTargets,
    ResolvedExperiment,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.vocab.sites import SITES

UNIT_WORDS: Mapping[str, spec.Drawn] = {
    "head": "heads",
    "kv_head": "heads",
    "neuron": "neurons",
    "expert": "experts",
}
MOST_RANKS = 1 << 62
"""Sets that are counted through; of more, two that are drawn are never the same."""
FINEST_FIRST: tuple[spec.Drawn, ...] = ("heads", "neurons", "experts", "layers", "positions")


@dataclass(frozen=True)
class Slot:
    """Where targets can take each other's place: the heads of one layer, or all layers."""

    word: spec.Drawn
    size: int
    layer: int | None


Own: TypeAlias = Mapping[Slot, tuple[int, ...]]
"""The targets of one cell, ascending, by where they can be exchanged."""
Picked: TypeAlias = Mapping[tuple[Slot, int], int]
"""Target → the one that was drawn in its place."""


class _TooFew(Exception):
    """There are fewer other targets than draws."""

    def __init__(self, label: str, possible: int) -> None:
        super().__init__(label)
        self.label = label
        self.possible = possible


def resolve_control(
    experiment: ResolvedExperiment, most_cells: int
) -> tuple[Control | None, list[Diagnostic]]:
    """What the experiment is set against; None where it is against nothing, or after an error.

    Codes: E0323, E0630.
    """
    asked = experiment.spec.against
    if asked is None:
        return None, []
    if experiment.n_cells * asked.draws > most_cells:
        return None, [
            TooManyCells(
                span=asked.span,
                experiment=experiment.name,
                cells=experiment.n_cells * asked.draws,
                most=most_cells,
                axes=f"{experiment.n_cells:,} cells × {asked.draws:,} draws",
            )
        ]
    try:
        return _Drawing(experiment, asked).control(), []
    except _TooFew as few:
        reason = f"there are only {few.possible} others like {few.label}"
        if few.possible == 1:
            reason = f"there is only one other like {few.label}"
        hint = f"write `against random({few.possible}{f', {asked.what}' if asked.what else ''})`"
        if not few.possible:
            reason = f"there is nothing else like {few.label}"
            hint = "join fewer targets, or draw something else: `random(20, layers)`"
            if asked.what == "layers":
                hint = "draw something else: `random(20, positions)`"
    except _NothingToDraw as nothing:
        reason, hint = nothing.reason, nothing.hint
    if experiment.stand_ins:  # what is really picked may have others
        return None, []
    text = asked.span.written
    return None, [BadControl(span=asked.span, text=text, reason=reason, hint=hint)]


class _NothingToDraw(Exception):
    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class _Drawing:
    """The draws of one experiment."""

    def __init__(self, experiment: ResolvedExperiment, asked: spec.Control) -> None:
        self.experiment = experiment
        self.asked = asked
        self.shape: ModelShape = experiment.model.shape
        self.matched: dict[str, None] = {}
        """What a draw has in common with what it stands for, in words."""
        self.notes: dict[str, None] = {}
        self.drawn: dict[str, None] = {}

    def control(self) -> Control:
        kinds: list[spec.Drawn | None] = [self._kind(rule) for rule in self.experiment.rules]
        if not any(kinds):
            raise self._nothing()
        rules = self._sites(kinds)
        rules = [
            self._positions(rule) if kind == "positions" else rule
            for rule, kind in zip(rules, kinds, strict=True)
        ]
        kept = [
            f"`{rule.spec.span.written}` as it is"
            for rule, kind in zip(self.experiment.rules, kinds, strict=True)
            if kind is None and rule.fill != "observe"
        ]
        own = self.experiment.spec
        draws = self.asked.draws
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
        drawn = f"{what}, {draws:,} draws, seed {self.experiment.seed}"
        return Control(shadow, draws, what, "; ".join([drawn, *self.matched, *self.notes, *kept]))

    def _nothing(self) -> _NothingToDraw:
        what = self.asked.what
        if what is None:
            reason = "no rule of this experiment has targets that could be others"
            return _NothingToDraw(reason, "sites, layers and positions of rules can be drawn")
        reason = f"no rule of this experiment has {what}"
        return _NothingToDraw(reason, "leave out what is drawn, or name what the rules have")

    # --- what is drawn ----------------------------------------------------------------------------

    def _kind(self, rule: ResolvedRule) -> spec.Drawn | None:
        """What is drawn for a rule; None where nothing of it is."""
        has = self._has(rule)
        if self.asked.what is not None:
            return self.asked.what if self.asked.what in has else None
        return next((word for word in FINEST_FIRST if word in has), None)

    def _has(self, rule: ResolvedRule) -> set[spec.Drawn]:
        """What could be drawn for a rule: there are others of it."""
        if rule.sites is None or rule.fill == "observe":
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
        if rule.edge is None and rule.spec.verb != "swap":
            found.add("positions")
        return found

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

        own = {cell: _merged(self._own(kinds[n], here(n, cell)) for n in chosen) for cell in cells}
        everywhere = _merged(own.values())
        points: list[dict[Key, tuple[SitePoint, ...]]] = [{} for _ in rules]
        sources: list[dict[Key, tuple[SitePoint, ...]]] = [{} for _ in rules]
        for cell in cells:
            fits = self._fitting(point for n in chosen for point in here(n, cell))
            labels = dict.fromkeys(_targets(rules[n]).labels[key(n, cell)] for n in chosen)
            label = f"`{' + '.join(labels)}`"
            for draw, picked in enumerate(self._draws(own[cell], everywhere, fits, label)):
                for n in chosen:
                    before, read = here(n, cell), _targets(rules[n]).sources
                    points[n][draw, *cell] = self._moved(before, before, kinds[n], picked)
                    if read is not None:
                        moved = self._moved(read[key(n, cell)], before, kinds[n], picked)
                        sources[n][draw, *cell] = moved
        for n in chosen:
            word = kinds[n]
            assert word is not None
            self.drawn[word] = None
            if word == "layers":
                self.matched["the same component, in as many layers"] = None
            else:
                self.matched["of the same component, as many in each layer"] = None
            rules[n] = replace(
                rules[n],
                sites=SiteTargets(
                    (DRAW, *names),
                    points[n],
                    {key: _label(here) for key, here in points[n].items()},
                    sources[n] or None,
                ),
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

    def _draws(
        self, own: Own, everywhere: Own, fitting: Sequence[int], label: str
    ) -> Iterator[Picked]:
        """For every draw, what takes the place of each target of a cell; all draws differ."""
        slots = sorted(own, key=lambda slot: (slot.word, slot.size, slot.layer or 0))
        everything = {
            slot: tuple(fitting) if slot.word == "layers" else tuple(range(slot.size))
            for slot in slots
        }
        tiers = (
            ("none that a rule names", everywhere),
            ("none of the cell's own", own),
            ("the cell's own among them, as there are too few others", {}),
        )
        most = 0
        for note, without in tiers if own else ():
            pools = [_besides(everything[slot], without.get(slot, ())) for slot in slots]
            sizes = [comb(len(p), len(own[slot])) for p, slot in zip(pools, slots, strict=True)]
            itself = not without  # which is no control
            possible = prod(sizes) - itself
            most = max(most, possible)
            if possible >= self.asked.draws:
                self.notes.setdefault(note)
                yield from self._picks(own, slots, pools, sizes, itself=itself)
                return
        raise _TooFew(label, most)

    def _picks(
        self,
        own: Own,
        slots: Sequence[Slot],
        pools: Sequence[tuple[int, ...]],
        sizes: Sequence[int],
        *,
        itself: bool,
    ) -> Iterator[Picked]:
        parts = [(slot.word, slot.size, slot.layer, own[slot]) for slot in slots]
        key = stable_hash(self.experiment.seed, "control", *parts, *map(len, pools))
        total = prod(sizes)
        order = Permutation(min(total, MOST_RANKS), key)
        draw = given = 0
        while given < self.asked.draws:
            rank = order[draw]
            found: dict[tuple[Slot, int], int] = {}
            same = True
            for slot, pool, size in zip(slots, pools, sizes, strict=True):
                rank, here = divmod(rank, size)
                place = here if total <= MOST_RANKS else None
                targets = subset(pool, len(own[slot]), place, key, slot.layer, draw)
                same = same and targets == own[slot]
                # Which one stands for which is drawn too, as rules may treat them differently.
                several = len(targets) > 1
                places = Permutation(len(targets), key, slot.layer, draw) if several else (0,)
                for n, target in enumerate(own[slot]):
                    found[slot, target] = targets[places[n]]
            draw += 1
            if same and itself:
                continue
            given += 1
            yield found

    def _moved(
        self,
        points: Sequence[SitePoint],
        written: Sequence[SitePoint],
        kind: spec.Drawn | None,
        picked: Picked,
    ) -> tuple[SitePoint, ...]:
        """Points with what was drawn for those that are written (which they may be themselves)."""
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

    def _positions(self, rule: ResolvedRule) -> ResolvedRule:
        """The rule at other tokens of the same rows."""
        self.drawn["positions"] = None
        self.matched["as many tokens of the same row, special tokens excluded"] = None
        own = rule.positions
        across = rule.spec.onto is not None
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
        for key, cell in own.written.items():
            drawn = [
                self._row(row, tokens, hits)
                for row, (tokens, hits) in enumerate(zip(allowed, cell.hits, strict=True))
            ]
            possible = prod(len(each) for each in drawn)
            if all(list(each) == [hits] for each, hits in zip(drawn, cell.hits, strict=True)):
                possible = 0
            if possible < self.asked.draws:
                raise _TooFew(f"`{cell.label}`", possible)
            for draw in range(self.asked.draws):
                hits = tuple(each[draw % len(each)] for each in drawn)
                written[draw, *key] = replace(cell, hits=hits)
                read[draw, *key] = own.read[key] if across else written[draw, *key]
        return replace(
            rule, positions=PositionTargets((DRAW, *own.axes), written, read, own.left_out)
        )

    def _row(
        self, row: int, allowed: tuple[int, ...], hits: tuple[tuple[int, ...], ...]
    ) -> Sequence[tuple[tuple[int, ...], ...]]:
        """What may stand for the runs of one row: as many tokens, others where there are enough."""
        taken = {token for run in hits for token in run}
        most = max((len(run) for run in hits), default=0)
        pool = tuple(token for token in allowed if token not in taken)
        if len(pool) < most:
            self.notes["own tokens among them in rows that have too few others"] = None
            pool = allowed
        if not most or len(pool) < most:
            return [hits]
        id_ = self.experiment.table.row_ids[row]
        key = stable_hash(self.experiment.seed, "control", "positions", id_, pool)
        sizes = [comb(len(pool), len(run)) for run in hits]
        count = min(max(sizes), self.asked.draws + 1)
        orders = [
            Permutation(min(size, MOST_RANKS), key, run)
            for size, run in zip(sizes, hits, strict=True)
        ]
        return [
            tuple(
                subset(
                    pool,
                    len(run),
                    order[draw % len(order)] if size <= MOST_RANKS else None,
                    key,
                    run,
                    draw,
                )
                for run, size, order in zip(hits, sizes, orders, strict=True)
            )
            for draw in range(count)
        ]


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


def _besides(everything: Sequence[int], without: Sequence[int]) -> tuple[int, ...]:
    out = set(without)
    return tuple(each for each in everything if each not in out)


def _merged(parts: Iterable[Own]) -> dict[Slot, tuple[int, ...]]:
    found: dict[Slot, set[int]] = {}
    for part in parts:
        for slot, targets in part.items():
            found.setdefault(slot, set()).update(targets)
    return {slot: tuple(sorted(targets)) for slot, targets in found.items()}


def _label(points: Sequence[SitePoint]) -> str:
    """All points, whatever a table could show: `L0H2.z + L1H3.z`."""
    by_layer: dict[tuple[str, int | None], list[SitePoint]] = {}
    for point in points:
        by_layer.setdefault((point.site, point.layer), []).append(point)
    return " + ".join(points_label(each) for each in by_layer.values())


def subset(pool: Sequence[int], size: int, rank: int | None, *key: object) -> tuple[int, ...]:
    """The set of this rank; without one, that of a seeded draw."""
    if rank is not None:
        return combination(pool, size, rank)
    order = Permutation(len(pool), *key)
    return tuple(sorted(pool[order[n]] for n in range(size)))


def combination(pool: Sequence[int], size: int, rank: int) -> tuple[int, ...]:
    """The set of this rank among all sets of this size, in the order of `itertools`."""
    found: list[int] = []
    start = 0
    for left in range(size, 0, -1):
        if left == 1:  # as in most cells: no need to count
            start, rank = start + rank, 0
        while True:
            behind = comb(len(pool) - start - 1, left - 1)
            if rank < behind:
                break
            rank -= behind
            start += 1
        found.append(pool[start])
        start += 1
    return tuple(found)
