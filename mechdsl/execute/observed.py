"""What `observe` lines see of rows: vectors out of a pass, and what observations make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.hooks.batch import arrays_on_device, on_device, to_device
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.models.shape import ModelShape, units
from mechdsl.packed.behind_last_block import Places
from mechdsl.plan.columns import each_unit, units_of
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.prompts.prompt_table import PositionCell, ReplyPosition
from mechdsl.resolve.observation import Observation, Unembedding
from mechdsl.resolve.resolved_rule import Place, ResolvedRule


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen of rows: a number of each, or logits that metrics read."""

    numbers: Tensor | None = None
    """[row]"""
    logits: Tensor | None = None
    """[row, token]"""
    tokens: Tensor | None = None
    """[K] ascending: the tokens whose logits there are; None for the whole vocabulary."""
    listed: Tensor | None = None
    """[row, vocab] probabilities, where tokens are listed."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Vectors of one site of one layer; K of them."""

    read: SiteRead
    row: Ints
    """[K] the row that each is of."""
    place: Ints
    """[K] where it lies in what was read."""
    unit: Ints | None
    """[K] head or neuron; None where all of them are one vector."""
    position: Ints
    """[K]"""
    keys: tuple[Ints, Ints] | None
    beside: Mapping[Place, Ints] = field(default_factory=dict[Place, Ints])
    """[K] where what stands beside it lies in what was read there."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """As `mechdsl.resolve.observation.Seen`."""

    vectors: Tensor
    units: Tensor | None
    positions: Tensor
    keys: tuple[Tensor, Tensor] | None
    place: Place
    beside: Mapping[Place, Tensor]
    unembedding: Unembedding
    tokens: Tensor | None


@dataclass(frozen=True, eq=False)
class Look:
    """What is looked at in rows of one experiment."""

    rule: ResolvedRule
    does: Observation
    rows: int
    tokens_per_row: Ints
    """[row] positions that are joined."""
    places: Mapping[SiteRead, Places]
    """Rows of the pass and positions that are read, per site."""
    parts: Sequence[_Part]

    def observed(
        self, found: Mapping[SiteRead, Tensor], unembedding: Unembedding, tokens: Tensor | None
    ) -> Observed:
        """found: [place, units, width] per site. tokens: those whose logits are asked for; None for
        all, which are made where they are listed."""
        tokens = None if self.does.lists(self.rule) else tokens
        of_logits = self.does.gives == "logits"
        total: Tensor | None = None
        count = np.zeros(self.rows, dtype=np.int64)
        for part in self.parts:
            seen = self._seen(part, found, unembedding, tokens if of_logits else None)
            if of_logits:
                values = self.does.logits(self.rule, seen)
            else:
                values = self.does.each(self.rule, seen)
            count += np.bincount(part.row, minlength=self.rows)
            in_order = len(self.parts) == 1 and np.array_equal(part.row, np.arange(self.rows))
            if in_order:  # one vector of each row
                total = values
                break
            values = values.cpu()  # where sums don't change with the order of threads
            if total is None:
                total = values.new_zeros(self.rows, *values.shape[1:])
            total.index_add_(0, torch.from_numpy(part.row), values)
        assert total is not None
        over = torch.from_numpy(self.tokens_per_row if self.does.adds_up else count)
        over = to_device(over.to(total.dtype), total.device)
        over = over.reshape(-1, *(1 for _ in total.shape[1:]))
        if of_logits:
            logits = total / over
            listed = _wide(logits).softmax(-1) if self.does.lists(self.rule) else None
            return Observed(logits=logits, tokens=tokens, listed=listed)
        return Observed(numbers=(total / over).cpu())

    def _seen(
        self,
        part: _Part,
        found: Mapping[SiteRead, Tensor],
        unembedding: Unembedding,
        tokens: Tensor | None,
    ) -> _Seen:
        own = _wide(found[part.read])
        device = own.device
        place = on_device(part.place, device)
        chosen = None if part.unit is None else on_device(part.unit, device)
        vectors = own[place].flatten(1) if chosen is None else own[place, chosen]
        keys = None
        if part.keys is not None:
            index, key = arrays_on_device(part.keys, device)
            keys = index, key
        beside = {
            at: _wide(found[SiteRead(*at)])[on_device(where, device)].flatten(1)
            for at, where in part.beside.items()
        }
        return _Seen(
            vectors,
            chosen,
            on_device(part.position, device),
            keys,
            (part.read.site, part.read.layer),
            beside,
            unembedding,
            tokens,
        )


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.element_size() < 4 else values


@dataclass(frozen=True, eq=False)
class InReplies:
    """Where the places of replies lie, in rows that have written."""

    tokens_of: Callable[[ReplyPosition], Sequence[tuple[int, ...]]]
    """[row of the pass] the tokens of its reply, counted from 1."""
    lengths: Ints
    """[row of the pass] tokens of its prompt."""
    at: Ints
    """[row] the row of the pass."""

    def there(self, plan: RulePlan, rows: Rows) -> Bools:
        """[row] whether its reply has all places that are looked at."""
        found = np.ones(len(rows), dtype=np.bool_)
        for cells, cell in plan.placed:
            cell_of_row = cell[rows.cell]
            for number, each in enumerate(cells):
                if each.reply is not None:
                    tokens = self.tokens_of(each.reply)
                    own = np.array([bool(tokens[row]) for row in self.at.tolist()], dtype=np.bool_)
                    found &= own | (cell_of_row != number)
        return found

    def moved(
        self, cells: Sequence[PositionCell], cell: Ints, rows: Ints, index: Ints, position: Ints
    ) -> tuple[Ints, Ints]:
        """Entries `index` with their positions, those of places in replies where these are.

        cell: [entry number] which of the cells; rows: [entry number] its row.
        """
        behind = np.array([each.reply is not None for each in cells], dtype=np.bool_)[cell]
        if not behind.any():
            return index, position
        kept = ~behind[index]
        found, places = [index[kept]], [position[kept]]
        for entry in np.flatnonzero(behind).tolist():
            reply = cells[cell[entry]].reply
            assert reply is not None
            row = int(self.at[rows[entry]])
            own = np.array(self.tokens_of(reply)[row], dtype=np.int64)
            found.append(np.full(len(own), entry))
            places.append(self.lengths[row] - 1 + own)
        whole = np.concatenate(found)
        order = np.argsort(whole, kind="stable")
        return whole[order], np.concatenate(places)[order]


def look(
    plan: RulePlan, rows: Rows, at: Ints, shape: ModelShape, replies: InReplies | None = None
) -> Look:
    """What an `observe` rule looks at; at: [row] the row of the pass."""
    does = plan.rule.does
    assert isinstance(does, Observation)
    row, position = plan.written.tokens.expand(plan.written_runs(rows))
    if replies is not None:
        own = np.arange(len(rows))
        cell = plan.position_of_cell[rows.cell]
        row, position = replies.moved(plan.positions, cell, own, row, position)
    per_row = np.bincount(row, minlength=len(rows))
    index, point = plan.points.expand(plan.site_of_cell[rows.cell][row])
    row, position = row[index], position[index]
    table = plan.point_table
    of_points = list(dict.fromkeys((p.site, p.layer, p.unit is None) for p in table))
    kind = np.array([of_points.index((p.site, p.layer, p.unit is None)) for p in table])[point]
    unit = units_of(table)[point]
    asked: dict[SiteRead, list[Places]] = {}
    parts: list[_Part] = []
    for number, (site, layer, whole) in enumerate(of_points):
        own = np.flatnonzero(kind == number)
        if not len(own):
            continue
        units_here: Ints | None = unit[own]
        if whole and does.by_unit:
            again, units_here = each_unit(unit[own], units(shape, site, layer))
            own = own[again]
        elif whole:
            units_here = None
        read = SiteRead(site, layer)
        part = _Part(
            read=read,
            row=row[own],
            place=_asked(asked, read, at[row[own]], position[own]),
            unit=units_here,
            position=position[own],
            keys=_keys(plan, rows, row[own], replies),
            beside={
                place: _asked(asked, SiteRead(*place), at[row[own]], position[own])
                for place in does.beside(plan.rule, shape)
            },
        )
        parts.append(part)
    places = {
        read: (np.concatenate([p[0] for p in own]), np.concatenate([p[1] for p in own]))
        for read, own in asked.items()
    }
    return Look(plan.rule, does, len(rows), per_row, places, parts)


def _asked(
    asked: dict[SiteRead, list[Places]], read: SiteRead, rows: Ints, positions: Ints
) -> Ints:
    """Where each place lies in what will be read of a site, each of a part read once."""
    before = asked.setdefault(read, [])
    pairs = np.stack([rows, positions])
    distinct, place = np.unique(pairs, axis=1, return_inverse=True)
    start = sum(len(each[0]) for each in before)
    before.append((distinct[0], distinct[1]))
    return start + place.reshape(-1)


def _keys(
    plan: RulePlan, rows: Rows, row: Ints, replies: InReplies | None
) -> tuple[Ints, Ints] | None:
    if plan.keys is None:
        return None
    index, key = plan.keys.tokens.expand(plan.key_runs(rows)[row])
    if replies is None:
        return index, key
    assert plan.rule.edge is not None
    assert plan.key_of_cell is not None
    cells = list(plan.rule.edge.keys.written.values())
    return replies.moved(cells, plan.key_of_cell[rows.cell][row], row, index, key)
