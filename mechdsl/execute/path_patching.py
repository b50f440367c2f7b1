"""Path patching: what receivers read when a sender alone is patched and all else is held.

The sender's change runs along the residual stream, past sublayers that return what they return on
the base run. One such row serves all receivers of a sender: what each would read is recorded, and
written in rows of its own in which everything recomputes. Where the end of the model is a receiver
beside others, what the sender alone changes in the stream behind the last block is added to it in
those rows: the edges to all receivers are patched, and every other edge carries what its own node
computes there.

Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969); edges: Conmy et
al. 2023 (arXiv 2304.14997).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.execute.writes import Part, joined
from mechdsl.hooks.batch import Batch, arrays_on_device, on_device, together_on_device
from mechdsl.hooks.calls import one_output
from mechdsl.hooks.frozen_norms import FrozenNorms
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.hooks.reads_and_writes import SiteRead, SiteWrite
from mechdsl.hooks.rule_writes import RuleWrites
from mechdsl.hooks.whole_pass import run_whole
from mechdsl.models.shape import ModelShape, units
from mechdsl.packed.behind_last_block import Places
from mechdsl.plan.columns import counted, each_unit, units_of
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.restart import Held
from mechdsl.plan.rule_rows import Rows, RulePlan
from mechdsl.resolve.resolved_rule import Place

Run = Callable[[Rows, Ints, Mapping[SiteRead, Places]], Mapping[SiteRead, Tensor]]
"""Runs rows (with their draws) of which the senders are patched and the rest is held, or in which
nothing of the path is done; gives what is read, [places of that site, units, width]."""


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
    paths = plan.paths
    return Held(
        np.ones(count, dtype=np.bool_),
        np.full(count, not paths.through_mlps, dtype=np.bool_),
        np.full(count, paths.frozen_norms, dtype=np.bool_),
    )


def received(
    experiment: ExperimentPlan,
    plan: RulePlan,
    rows: Rows,
    draws: Ints,
    run: Run,
    base: Run,
    shape: ModelShape,
    ends: Ints | None = None,
) -> tuple[list[SiteWrite], list[SiteWrite]]:
    """What receivers of these rows read behind their patched senders, to be written there: what
    comes by before rules write there, as these act on it again. And what is added behind the last
    block, where all other rules have acted.

    run, base: with the senders patched and all else held; without the path. ends: [row] the first
    position that the pass doesn't have; None where it has all.
    """
    assert plan.paths is not None
    at = plan.written_runs(rows)
    same = np.stack([experiment.senders[rows.cell], at, rows.alternative, rows.prompt, draws])
    _, first, sender = np.unique(same, axis=1, return_index=True, return_inverse=True)
    sender = sender.reshape(-1)
    wanted = _wanted(plan, rows, at, ends)
    table, is_end = plan.paths.table, plan.paths.is_end
    places = sorted({(p.site, p.layer) for p in table}, key=str)
    of_point = np.array([places.index((p.site, p.layer)) for p in table], dtype=np.int64)
    unit_of = units_of(table)
    reads: dict[SiteRead, Places] = {}
    back: dict[Place, tuple[Ints, Ints]] = {}
    for number, place in enumerate(places):
        own = np.flatnonzero((of_point[wanted.point] == number) & ~is_end[wanted.point])
        if len(own):
            reads[SiteRead(*place, before=True)], index = _distinct(wanted, own, sender)
            back[place] = own, index
    last = np.flatnonzero(is_end[wanted.point])
    behind, gaining = SiteRead("resid_post", shape.n_layers - 1), last
    if len(last):
        reads[behind], gaining = _distinct(wanted, last, sender)
    if not reads:  # the pass ends before all of them
        return [], []
    found = run(rows.take(first), draws[first], reads)
    writes: list[SiteWrite] = []
    added: list[SiteWrite] = []
    if len(last):
        without = base(rows.take(first), draws[first], {behind: reads[behind]})
        gained = (found[behind] - without[behind])[:, 0]
        vectors = gained[on_device(gaining, gained.device)]
        unit = np.zeros(len(last), dtype=np.int64)
        part = Part(wanted.row[last], wanted.token[last], unit, vectors, "add")
        added.append(joined((behind.site, behind.layer), [part]))
    for place, (own, index) in back.items():
        again, unit = each_unit(unit_of[wanted.point[own]], units(shape, *place))
        own, index = own[again], index[again]
        values = found[SiteRead(*place, before=True)]
        vectors = values[arrays_on_device((index, unit), values.device)]
        part = Part(wanted.row[own], wanted.token[own], unit, vectors)
        writes.append(joined(place, [part]))
    return writes, added


def _distinct(wanted: _Received, own: Ints, sender: Ints) -> tuple[Places, Ints]:
    """The rows of senders, and tokens of these, that some of what is wanted is read at; which of
    these places each is."""
    seen = np.stack([sender[wanted.row[own]], wanted.token[own]])
    distinct, inverse = np.unique(seen, axis=1, return_inverse=True)
    return (distinct[0], distinct[1]), inverse.reshape(-1)


def _wanted(plan: RulePlan, rows: Rows, at: Ints, ends: Ints | None) -> _Received:
    assert plan.paths is not None
    row, token = plan.written.tokens.expand(at)
    if ends is not None:
        there = token < ends[row]
        row, token = row[there], token[there]
    index, point = plan.paths.points.expand(plan.paths.pair_of_cell[rows.cell][row])
    return _Received(row[index], token[index], point)


# --- whole passes ---------------------------------------------------------------------------------


@contextmanager
def holding(
    model: LoadedModel,
    norms: FrozenNorms,
    batch: Batch,
    held: Held,
    acting: RuleWrites,
    noise: Sequence[SiteWrite],
    beside: RuleWrites,
) -> Generator[list[SiteWrite]]:
    """What holds every head and MLP of held rows at the base run, in a whole pass; meanwhile their
    norms are held too where that is asked.

    acting: what is written behind it. noise: that of the base run. beside: the other rules, which
    act on the base run too. What is held is what comes by before these write there: they act on it
    again, in their order.
    """
    shape, rows = model.shape, np.flatnonzero(held.rows)
    without_mlps = np.flatnonzero(held.rows & held.mlps)
    neurons = {write.layer for write in acting.writes if write.site == "mlp_hidden"}
    removed = {to for to, of in acting.blocks if of is None}
    wanted: list[tuple[SiteRead, Ints]] = []
    for layer in range(shape.n_layers):
        if layer in removed:
            continue
        heads = next(s for s in ("z", "mixer_out", "attn_out") if shape.has(s, layer))
        wanted.append((SiteRead(heads, layer, before=True), rows))
        mlp = "mlp_hidden" if layer in neurons else "mlp_out"
        if shape.has(mlp, layer):
            wanted.append((SiteRead(mlp, layer, before=True), without_mlps))
    wanted = [(read, own) for read, own in wanted if len(own)]
    frozen = bool(held.norms.any())
    # Norms may stand behind the last one of the stream: then nothing stops before them.
    stop = None if frozen else shape.n_layers
    beside = beside.below(shape.n_layers + int(frozen), shape.n_layers)
    last = None if one_output(model) else (batch.lengths - 1)[:, None]
    with norms.recorded(held.norms) as scales:
        found = run_whole(
            model,
            batch,
            writes=[*noise, *beside.writes],
            reads=[read for read, _ in wanted],
            stop=stop,
            logits_at=last,
            edges=beside.edges,
        ).reads
    lengths = batch.lengths.numpy()
    with norms.kept(held.norms, scales):
        yield [
            _everywhere(found[read], read.site, read.layer, own, batch, lengths)
            for read, own in wanted
        ]


def _everywhere(
    read: Tensor, site: str, layer: int | None, rows: Ints, batch: Batch, lengths: Ints
) -> SiteWrite:
    """What was read of these rows, at all tokens and units."""
    count = read.shape[2]
    index, within = counted(lengths[rows] * count)
    where = torch.from_numpy(rows[index]), torch.from_numpy(within // count)
    unit = torch.from_numpy(within % count)
    index = where[0], batch.columns(*where), unit
    values = read[together_on_device(index, read.device)]
    return SiteWrite(site, layer, *where, unit, values)
