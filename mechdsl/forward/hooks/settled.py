"""Nodes of a circuit whose output is that of the run which ablated edges carry.

Edges from them change nothing: their columns are removed from the mask, and the output of a head or
MLP is the fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Ints
from mechdsl.forward.hooks.batch import CircuitWrite, SenderFill, SiteRead
from mechdsl.forward.hooks.circuits import ATTENTION_INPUTS, is_plain_mlp
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.models.block import linear_sizes
from mechdsl.models.circuit_graph import CircuitGraph, CircuitNode


@dataclass(frozen=True, eq=False)
class _Settled:
    """What is left of some edges."""

    units: tuple[tuple[int, ...], ...]
    """Of each fill, the indices of the units that change with the stream."""
    heads: tuple[tuple[int, ...], ...]
    """Of each fill, the indices of the heads whose output is written."""
    mlps: tuple[bool, ...]
    """Of each fill, whether it is the output of an MLP that isn't computed."""
    receivers: tuple[tuple[SiteRead, int], ...]
    mask: Tensor


class CircuitSettler:
    """Removes the nodes of circuits whose output is that of the run; edges are examined once."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._found: dict[int, tuple[Tensor, _Settled]] = {}
        """By identity of the mask, which is kept so that no other tensor gets it."""

    @cached_property
    def _graph(self) -> CircuitGraph:
        return CircuitGraph(self.model.shape)

    @cached_property
    def _has_separate_heads(self) -> bool:
        return has_separate_heads(self.model)

    def settle(self, write: CircuitWrite, lengths: Ints) -> CircuitWrite:
        """Return a circuit that gives the same logits with fewer senders, heads and MLPs.

        Args:
            write: Its fills are the values of a run of the same model at the same tokens, on
                prompts of equal length; nothing else is written in its rows, and only logits are
                read. Writes with one mask have the same senders and receivers, none of them
                neurons.
            lengths: [row of the batch] tokens.
        """
        if self.model.shape.attends_to_image:  # its graph has other heads
            return write
        rows = np.unique(write.rows.numpy())
        if len(write.rows) != lengths[rows].sum() or not self._has_separate_heads:
            return write
        number = id(write.mask)
        if number not in self._found:
            self._found[number] = write.mask, self._examine(write)
        _, settled = self._found[number]
        outputs = {
            fill.where.layer: fill.values[:, 0]
            for fill, skipped in zip(write.fills, settled.mlps, strict=True)
            if skipped and fill.where.layer is not None
        }
        return replace(
            write,
            fills=tuple(_take_units(write.fills, settled.units)),
            receivers=settled.receivers,
            mask=settled.mask,
            outputs=outputs,
            heads=tuple(_take_units(write.fills, settled.heads)),
        )

    def _examine(self, write: CircuitWrite) -> _Settled:
        graph, fills = self._graph, write.fills
        own = [[graph.column[_node(fill.where, unit)] for unit in fill.units] for fill in fills]
        columns = [column for nodes in own for column in nodes]
        rows = [graph.row[_node(*receiver)] for receiver in write.receivers]
        kept = graph.before.copy()
        kept[np.ix_(rows, columns)] &= write.mask.numpy() == 0
        filled = np.isin(np.arange(len(graph.senders)), columns)
        settled = graph.settle(kept, filled)
        units = [tuple(n for n, node in enumerate(nodes) if not settled[node]) for nodes in own]
        heads = [
            tuple(n for n, node in enumerate(nodes) if settled[node] and fill.where.site == "z")
            for fill, nodes in zip(fills, own, strict=True)
        ]
        mlps = [
            fill.where.site == "mlp_out"
            and bool(settled[nodes[0]])
            and is_plain_mlp(self.model, fill.where.layer, normed=True)
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
            tuple(_receiver(graph.receivers[n]) for n in np.flatnonzero(due)),
            torch.from_numpy(ablated[due]).to(write.mask),
        )


def has_separate_heads(model: LoadedModel) -> bool:
    """Return whether a head depends on no queries, keys and values of other heads. A norm over all
    queries of a layer has more weights than a query has numbers."""
    every = range(model.shape.n_layers)
    if any(_has_joint_norm(model, n) for n in every):
        return False
    return all(_has_separate_units(model, site, n) for site in ATTENTION_INPUTS for n in every)


def _has_joint_norm(model: LoadedModel, layer: int) -> bool:
    """Return whether the output projection reads a norm of all heads together (BitNet)."""
    block = model.anatomy.blocks[layer]
    if block.output is None:
        return False
    sizes = linear_sizes(model.module.get_submodule(block.output))
    known = {*block.projections, block.output, block.attn_output_norm, block.middle, block.end}
    known |= {model.tap(site, layer).path for site in ATTENTION_INPUTS}
    parent = block.output.rpartition(".")[0]
    return any(
        weight.dim() == 1 and (sizes is None or len(weight) == sizes[0])
        for name, module in model.module.get_submodule(parent).named_children()
        if f"{parent}.{name}" not in known
        for weight in module.parameters()
    )


def _has_separate_units(model: LoadedModel, site: str, layer: int) -> bool:
    """Return whether a linear map gives queries, keys or values, or a norm acts on each alone."""
    tap = model.tap(site, layer)
    if tap.path in model.anatomy.blocks[layer].projections:
        return True
    weights = [*model.module.get_submodule(tap.path).parameters()]
    return bool(weights) and all(weight.numel() == tap.layout.width for weight in weights)


def _node(where: SiteRead, unit: int) -> CircuitNode:
    return where.site, where.layer, unit


def _receiver(node: CircuitNode) -> tuple[SiteRead, int]:
    site, layer, unit = node
    return SiteRead(site, layer), unit


def _take_units(
    fills: Sequence[SenderFill], chosen: Sequence[tuple[int, ...]]
) -> Iterator[SenderFill]:
    """Yield fills with some of their units, without those that have none."""
    for fill, numbers in zip(fills, chosen, strict=True):
        if len(numbers) == len(fill.units):
            yield fill
        elif numbers:
            units = tuple(fill.units[n] for n in numbers)
            yield replace(fill, units=units, values=fill.values[:, list(numbers)])
