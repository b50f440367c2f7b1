"""The places that measures and observations read of the rows of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.observed import Look
from mechdsl.execute.readout import Readout
from mechdsl.execute.unpatched_batch import UnpatchedBatch, prompt_loss, spot_positions
from mechdsl.hooks.batch import together_on_device
from mechdsl.hooks.reads_and_writes import SiteRead
from mechdsl.packed.behind_last_block import Places
from mechdsl.plan.columns import counted
from mechdsl.plan.rule_rows import Rows
from mechdsl.prompts.prompt_table import Run


@dataclass(frozen=True, eq=False)
class Member:
    """Rows of one experiment that a pass serves."""

    number: int
    """Of the experiment in its panel."""
    rows: Rows
    at: Ints
    """[row] the row of the pass."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The places that one member reads."""

    final: Places
    """Behind the last block: rows of the pass and positions."""
    spots_per_row: int
    """The first places of `final`, row by row; all others are those of a loss."""
    inside: Mapping[int, tuple[SiteRead, Places]]
    """Atom → the site of a `cosine` and where it is read."""
    count: int
    """Rows of the member."""
    look: Look | None = None
    """What it observes."""

    @property
    def needs_pass(self) -> bool:
        """Whether it reads anything of a pass over prompts."""
        return bool(len(self.final[0]) or self.inside or self.look is not None)

    def spots(self, logits: Tensor) -> Tensor | None:
        """[row, spot, vocab]"""
        if not self.spots_per_row:
            return None
        spots = logits[: self.count * self.spots_per_row]
        return spots.unflatten(0, (self.count, self.spots_per_row))

    def loss(
        self,
        logits: Tensor,
        readout: Readout,
        member: Member,
        draw: Ints,
        lanes: UnpatchedBatch,
        run: Run,
    ) -> Tensor | None:
        """[row] the loss over all positions."""
        if readout.loss is None:
            return None
        lane = lanes.lane(member.rows.prompt, draw[member.at])
        batch = lanes.batch.take(torch.from_numpy(lane))
        every = logits[self.count * self.spots_per_row :]
        whole = every.new_zeros(*batch.ids.shape, every.shape[-1])
        rows, positions = batch.tokens()
        where = together_on_device((rows, batch.columns(rows, positions)), every.device)
        whole[where] = every
        return prompt_loss(readout.loss, whole, batch, run, member.rows.prompt)


def wanted_of(
    readout: Readout, member: Member, run: Run, lengths: Ints, look: Look | None
) -> Wanted:
    """What a readout reads of a member's rows; lengths: [row of the pass]."""
    own = lengths[member.at]
    columns = [spot_positions(spot, run.name, member.rows.prompt, own) for spot in readout.spots]
    rows: list[Ints] = []
    positions: list[Ints] = []
    spots = len(columns) if readout.needs_plain else 0
    if spots:
        rows.append(np.repeat(member.at, spots))
        positions.append(np.stack(columns, axis=1).reshape(-1))
    if readout.loss is not None:
        rows.append(np.repeat(member.at, own))
        positions.append(np.concatenate([np.arange(n) for n in own]))
    empty = np.zeros(0, dtype=np.int64)
    inside = {
        number: (SiteRead(atom.point.site, atom.point.layer), (member.at, columns[spot]))
        for number, (spot, atom) in enumerate(readout.atoms)
        if atom.point is not None
    }
    final = (np.concatenate([empty, *rows]), np.concatenate([empty, *positions]))
    return Wanted(final, spots, inside, len(member.at), look)


def on_draws(member: Member, draws: int) -> Member:
    """Every row once per draw."""
    index = np.repeat(np.arange(len(member.at)), draws)
    at = member.at[index] * draws + np.tile(np.arange(draws), len(member.at))
    return Member(member.number, member.rows.take(index), at)


def by_row(places: Places, rows: int, lengths: Ints) -> tuple[Ints, Ints]:
    """([place] its slot, [row, slot] position): places listed by row, free slots read anywhere."""
    order = np.argsort(places[0], kind="stable")
    counts = np.bincount(places[0], minlength=rows)
    slots = np.empty(len(order), dtype=np.int64)
    slots[order] = counted(counts)[1]
    at = np.repeat(lengths[:, None] - 1, max(1, int(counts.max(initial=1))), axis=1)
    at[places[0], slots] = places[1]
    return slots, at
