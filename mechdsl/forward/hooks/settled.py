"""Nodes of a circuit whose output is that of the run which ablated edges carry.

If every edge into a node carries the values of a run at all tokens, its output is that of the run.
Edges from it then change nothing: their columns are removed from the mask, and the output of a head
or MLP is the fill. A node without a path to the logits may have any output, so it reads ablated
edges too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Ints
from mechdsl.forward.hooks.batch import CircuitWrite, SenderFill, SiteRead
from mechdsl.forward.hooks.circuits import find_norms_after
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.shape import unit_count

Node = tuple[SiteRead, int]
"""A site and a head; 0 for whole vectors."""


class _Graph:
    """All senders and receivers of a model, in forward order."""

    def __init__(self, model: LoadedModel) -> None:
        shape = model.shape
        self.senders: list[Node] = [(SiteRead("resid_pre", 0), 0)]
        self.receivers: list[Node] = []
        self.inputs: list[list[int]] = [[]]
        """Of each sender, the receivers that it is computed from."""
        ends: list[int] = []
        for layer in range(shape.n_layers):
            heads = unit_count(shape, "z", layer)
            own: list[list[int]] = [[] for _ in range(heads)]
            for site in ("q", "k", "v"):
                count = unit_count(shape, site, layer)
                for head in range(heads):
                    own[head].append(len(self.receivers) + head * count // heads)
                self.receivers += [(SiteRead(site, layer), unit) for unit in range(count)]
                ends += [len(self.senders)] * count
            self.senders += [(SiteRead("z", layer), head) for head in range(heads)]
            self.inputs += own
            if shape.has("mlp_out", layer):
                self.inputs.append([len(self.receivers)])
                self.receivers.append((SiteRead("mlp_norm", layer), 0))
                ends.append(len(self.senders))
                self.senders.append((SiteRead("mlp_out", layer), 0))
        self.receivers.append((SiteRead("logits"), 0))
        ends.append(len(self.senders))
        self.before = np.arange(len(self.senders)) < np.array(ends)[:, None]
        """[receiver, sender]: whether a receiver may read a sender."""

    def settle(self, kept: Bools) -> Bools:
        """Return [sender]: whether the output is that of the run.

        Args:
            kept: [receiver, sender] edges that aren't ablated.
        """
        settled = np.zeros(len(self.senders), dtype=np.bool_)
        for sender, own in enumerate(self.inputs):
            settled[sender] = bool(own) and not kept[own][:, ~settled].any()
        return settled

    def reach_logits(self, kept: Bools) -> Bools:
        """Return [receiver]: whether the logits depend on it."""
        found = np.zeros(len(self.receivers), dtype=np.bool_)
        found[-1] = True
        for sender in range(len(self.senders) - 1, -1, -1):
            if kept[found, sender].any():
                found[self.inputs[sender]] = True
        return found

    def read_by(self, computed: Bools) -> Bools:
        """Return [receiver]: whether the logits or one of these senders are computed from it."""
        found = np.zeros(len(self.receivers), dtype=np.bool_)
        found[-1] = True
        for sender in np.flatnonzero(computed):
            found[self.inputs[sender]] = True
        return found


@dataclass(frozen=True, eq=False)
class _Settled:
    """What is left of some edges."""

    units: tuple[tuple[int, ...], ...]
    """Of each fill, the indices of the units that change with the stream."""
    heads: tuple[tuple[int, ...], ...]
    """Of each fill, the indices of the heads whose output is written."""
    mlps: tuple[bool, ...]
    """Of each fill, whether it is the output of an MLP that isn't computed."""
    receivers: tuple[Node, ...]
    mask: Tensor


class CircuitSettler:
    """Removes the nodes of circuits whose output is that of the run; edges are examined once."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._found: dict[int, tuple[Tensor, _Settled]] = {}
        """By identity of the mask, which is kept so that no other tensor gets it."""

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph(self.model)

    def settle(self, write: CircuitWrite, lengths: Ints) -> CircuitWrite:
        """Return a circuit that gives the same logits with fewer senders, heads and MLPs.

        Args:
            write: Its fills are the values of a run of the same model at the same tokens, on
                prompts of equal length; nothing else is written in its rows, and only logits are
                read. Writes with one mask have the same senders and receivers.
            lengths: [row of the batch] tokens.
        """
        rows = np.unique(write.rows.numpy())
        if len(write.rows) != lengths[rows].sum() or find_norms_after(self.model):
            return write
        number = id(write.mask)
        if number not in self._found:
            self._found[number] = write.mask, self._examine(write)
        _, found = self._found[number]
        outputs = {
            fill.where.layer: fill.values[:, 0]
            for fill, skipped in zip(write.fills, found.mlps, strict=True)
            if skipped and fill.where.layer is not None
        }
        return replace(
            write,
            fills=tuple(_take_units(write.fills, found.units)),
            receivers=found.receivers,
            mask=found.mask,
            outputs=outputs,
            heads=tuple(_take_units(write.fills, found.heads)),
        )

    def _examine(self, write: CircuitWrite) -> _Settled:
        graph, fills = self._graph, write.fills
        column = {node: n for n, node in enumerate(graph.senders)}
        place = {node: n for n, node in enumerate(graph.receivers)}
        columns = [column[fill.where, unit] for fill in fills for unit in fill.units]
        kept = graph.before.copy()
        kept[np.ix_([place[each] for each in write.receivers], columns)] &= write.mask.numpy() == 0
        filled = np.isin(np.arange(len(column)), columns)
        kept[np.ix_(~graph.reach_logits(kept), filled)] = False
        settled = graph.settle(kept)
        own = [[column[fill.where, unit] for unit in fill.units] for fill in fills]
        units = [tuple(n for n, node in enumerate(nodes) if not settled[node]) for nodes in own]
        heads = [
            tuple(n for n, node in enumerate(nodes) if settled[node] and fill.where.site == "z")
            for fill, nodes in zip(fills, own, strict=True)
        ]
        mlps = [
            fill.where.site == "mlp_out"
            and bool(settled[nodes[0]])
            and _is_plain_mlp(self.model, fill.where.layer)
            for fill, nodes in zip(fills, own, strict=True)
        ]
        computed = np.ones(len(graph.senders), dtype=np.bool_)
        for nodes, written, skipped in zip(own, heads, mlps, strict=True):
            computed[[nodes[n] for n in written]] = False
            computed[nodes] &= not skipped
        left = [nodes[n] for nodes, index in zip(own, units, strict=True) for n in index]
        ablated = (graph.before & ~kept)[:, left]
        due = graph.read_by(computed) & ablated.any(axis=1)
        return _Settled(
            tuple(units),
            tuple(heads),
            tuple(mlps),
            tuple(graph.receivers[n] for n in np.flatnonzero(due)),
            torch.from_numpy(ablated[due]).to(write.mask),
        )


def _take_units(
    fills: Sequence[SenderFill], chosen: Sequence[tuple[int, ...]]
) -> Iterator[SenderFill]:
    """Yield fills with some of their units, without those that have none."""
    for fill, own in zip(fills, chosen, strict=True):
        if len(own) == len(fill.units):
            yield fill
        elif own:
            units = tuple(fill.units[n] for n in own)
            yield replace(fill, units=units, values=fill.values[:, list(own)])


def _is_plain_mlp(model: LoadedModel, layer: int | None) -> bool:
    """Return whether the MLP is a module from a token's vector to what is added to the stream."""
    assert layer is not None
    block = model.anatomy.blocks[layer]
    tap = block.taps["mlp_out"]
    plain = (tap.side, tap.item, tap.layout.axes) == (
        "out",
        0,
        "flat",
    ) and "router" not in block.taps
    return plain and block.mlp == (tap.path,)
