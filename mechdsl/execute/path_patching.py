"""Path patching: what receivers read when a sender alone is patched and all else is held.

The sender's change runs along the residual stream, past sublayers that return what they return on
the base run. One such row serves all receivers of a sender: what each would read is recorded, and
written in rows of its own in which everything recomputes.

Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.writes import Part, joined
from mechdsl.hooks.batch import Batch
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.models.shape import ModelShape, units
from mechdsl.packed.behind_last_block import Places
from mechdsl.plan.columns import counted, each_unit, units_of
from mechdsl.plan.restart import Held
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.resolve.resolved_rule import Place

Run = Callable[[Rows, Ints, Held, Mapping[SiteRead, Places]], Mapping[SiteRead, Tensor]]
"""Runs rows (with their draws) of which the senders are patched and the rest is held; gives what
is read, [places of that site, units, width]."""


@dataclass(frozen=True, eq=False)
class _Received:
    """Every vector that receivers are to get, as parallel columns."""

    row: Ints
    token: Ints
    point: Ints
    """Index into the receivers' table."""


def held_rows(plan: RulePlan, count: int) -> Held:
    """So many rows of a path rule, held."""
    assert plan.paths is not None
    return Held(
        np.ones(count, dtype=np.bool_),
        np.full(count, not plan.paths.through_mlps, dtype=np.bool_),
    )


def received(
    plan: RulePlan,
    rows: Rows,
    draws: Ints,
    run: Run,
    shape: ModelShape,
    ends: Ints | None = None,
) -> list[SiteWrite]:
    """What receivers of these rows read behind their patched senders, to be written there.

    ends: [row] the first position that the pass doesn't have; None where it has all.
    """
    assert plan.paths is not None
    at = plan.written_runs(rows)
    same = np.stack([plan.site_of_cell[rows.cell], at, rows.prompt, draws])
    _, first, sender = np.unique(same, axis=1, return_index=True, return_inverse=True)
    sender = sender.reshape(-1)
    wanted = _wanted(plan, rows, at, ends)
    table = plan.paths.table
    places = sorted({(p.site, p.layer) for p in table}, key=str)
    of_point = np.array([places.index((p.site, p.layer)) for p in table], dtype=np.int64)
    unit_of = units_of(table)
    reads: dict[SiteRead, Places] = {}
    back: dict[Place, tuple[Ints, Ints]] = {}
    for number, place in enumerate(places):
        own = np.flatnonzero(of_point[wanted.point] == number)
        if not len(own):
            continue
        seen = np.stack([sender[wanted.row[own]], wanted.token[own]])
        distinct, inverse = np.unique(seen, axis=1, return_inverse=True)
        reads[SiteRead(*place)] = distinct[0], distinct[1]
        back[place] = own, inverse.reshape(-1)
    if not reads:  # the pass ends before all of them
        return []
    held = held_rows(plan, len(first))
    found = run(rows.take(first), draws[first], held, reads)
    writes: list[SiteWrite] = []
    for place, (own, index) in back.items():
        again, unit = each_unit(unit_of[wanted.point[own]], units(shape, *place))
        own, index = own[again], index[again]
        values = found[SiteRead(*place)]
        vectors = values[
            torch.from_numpy(index).to(values.device), torch.from_numpy(unit).to(values.device)
        ]
        part = Part(wanted.row[own], wanted.token[own], unit, vectors)
        writes.append(joined(place, [part]))
    return writes


def _wanted(plan: RulePlan, rows: Rows, at: Ints, ends: Ints | None) -> _Received:
    assert plan.paths is not None
    row, token = plan.written.tokens.expand(at)
    if ends is not None:
        there = token < ends[row]
        row, token = row[there], token[there]
    index, point = plan.paths.points.expand(plan.paths.pair_of_cell[rows.cell][row])
    return _Received(row[index], token[index], point)


# --- whole passes ---------------------------------------------------------------------------------


def frozen(
    model: LoadedModel,
    batch: Batch,
    held: Held,
    senders: Sequence[SiteWrite],
    noise: Sequence[SiteWrite],
) -> list[SiteWrite]:
    """What holds every head and MLP of held rows at the base run, in a whole pass.

    senders: what is written behind it. noise: that of the base run.
    """
    shape, rows = model.shape, np.flatnonzero(held.rows)
    without_mlps = np.flatnonzero(held.rows & held.mlps)
    neurons = {write.layer for write in senders if write.site == "mlp_hidden"}
    wanted: list[tuple[str, int, Ints]] = []
    for layer in range(shape.n_layers):
        heads = next(s for s in ("z", "mixer_out", "attn_out") if shape.has(s, layer))
        wanted.append((heads, layer, rows))
        mlp = "mlp_hidden" if layer in neurons else "mlp_out"
        if shape.has(mlp, layer):
            wanted.append((mlp, layer, without_mlps))
    reads = [SiteRead(site, layer) for site, layer, own in wanted if len(own)]
    found = run_whole(model, batch, writes=noise, reads=reads, stop=shape.n_layers).reads
    lengths = batch.lengths.cpu().numpy()
    writes: list[SiteWrite] = []
    for site, layer, own in wanted:
        if not len(own):
            continue
        read = found[SiteRead(site, layer)]
        writes.append(_everywhere(read, site, layer, own, batch, lengths))
    return writes


def _everywhere(
    read: Tensor, site: str, layer: int, rows: Ints, batch: Batch, lengths: Ints
) -> SiteWrite:
    """What was read of these rows, at all tokens and units."""
    count = read.shape[2]
    index, within = counted(lengths[rows] * count)
    where = torch.from_numpy(rows[index]), torch.from_numpy(within // count)
    unit = torch.from_numpy(within % count)
    columns = batch.columns(*where).to(read.device)
    values = read[where[0].to(read.device), columns, unit.to(read.device)]
    return SiteWrite(site, layer, *where, unit, values)
