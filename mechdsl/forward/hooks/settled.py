"""Nodes of a circuit whose output is that of the run which ablated edges carry.

If every edge into a node carries the values of a run at all tokens, its output is that of the run.
Edges from it then change nothing: their columns are removed from the mask, and the output of an MLP
is the fill. A node without a path to the logits may have any output, so it reads ablated edges too.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Bools, Ints
from mechdsl.forward.hooks.batch import CircuitWrite, SiteRead, TokenFrame, indices_to_device
from mechdsl.forward.hooks.circuits import find_norms_after
from mechdsl.forward.hooks.hook_points import get_scale, undo_scale
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.module_exchange import replace_forward
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


def settle_circuit(model: LoadedModel, write: CircuitWrite, lengths: Ints) -> CircuitWrite:
    """Return a circuit that gives the same logits with fewer senders and computed MLPs.

    Args:
        write: Its fills are the values of a run of the same model at the same tokens, on prompts of
            equal length; nothing else is written in its rows, and only logits are read.
        lengths: [row of the batch] tokens.
    """
    rows = np.unique(write.rows.numpy())
    if len(write.rows) != lengths[rows].sum() or find_norms_after(model):
        return write
    graph = _Graph(model)
    column = {node: n for n, node in enumerate(graph.senders)}
    place = {node: n for n, node in enumerate(graph.receivers)}
    columns = [column[fill.where, unit] for fill in write.fills for unit in fill.units]
    kept = graph.before.copy()
    kept[np.ix_([place[each] for each in write.receivers], columns)] &= write.mask.numpy() == 0
    filled = np.isin(np.arange(len(column)), columns)
    kept[np.ix_(~graph.reach_logits(kept), filled)] = False
    settled = graph.settle(kept)
    skipped = {
        layer: fill.values[:, 0]
        for fill in write.fills
        if fill.where.site == "mlp_out"
        and settled[column[fill.where, 0]]
        and (layer := fill.where.layer) is not None
        and _is_plain_mlp(model, layer)
    }
    fills = [
        replace(fill, units=tuple(fill.units[n] for n in own), values=fill.values[:, own])
        for fill in write.fills
        if (own := [n for n, u in enumerate(fill.units) if not settled[column[fill.where, u]]])
    ]
    columns = [column[fill.where, unit] for fill in fills for unit in fill.units]
    ablated = (graph.before & ~kept)[:, columns]
    receivers = [
        n
        for n, (where, _) in enumerate(graph.receivers)
        if ablated[n].any() and not (where.site == "mlp_norm" and where.layer in skipped)
    ]
    return replace(
        write,
        fills=tuple(fills),
        receivers=tuple(graph.receivers[n] for n in receivers),
        mask=torch.from_numpy(ablated[receivers]).to(write.mask),
        outputs=skipped,
    )


def _is_plain_mlp(model: LoadedModel, layer: int) -> bool:
    """Return whether the MLP is a module from a token's vector to what is added to the stream."""
    block = model.anatomy.blocks[layer]
    tap = block.taps["mlp_out"]
    plain = (tap.side, tap.item, tap.layout.axes) == (
        "out",
        0,
        "flat",
    ) and "router" not in block.taps
    return plain and block.mlp == (tap.path,)


@contextmanager
def skip_mlps(
    model: LoadedModel, frame: TokenFrame, circuits: Sequence[CircuitWrite]
) -> Generator[None]:
    """Return the given outputs of MLPs, and compute only the others, while the context is open."""
    with ExitStack() as stack:
        for layer in sorted({layer for circuit in circuits for layer in circuit.outputs}):
            tap = model.tap("mlp_out", layer)
            parts = [
                (index, undo_scale(circuit.outputs[layer], get_scale(model.module, tap)))
                for circuit in circuits
                if layer in circuit.outputs
                for index in [_locate(model, frame, circuit)]
            ]
            module = model.module.get_submodule(tap.path)
            stack.enter_context(replace_forward(module, _Partial(module, parts)))
        yield


def _locate(model: LoadedModel, frame: TokenFrame, circuit: CircuitWrite) -> tuple[Tensor, Tensor]:
    rows, columns, _ = frame.locate("resid_pre", 0, "", circuit.rows, circuit.positions)
    rows, columns = indices_to_device((rows, columns), model.device)
    return rows, columns


class _Partial:
    """The forward of an MLP with outputs that are given."""

    def __init__(
        self, module: nn.Module, parts: Sequence[tuple[tuple[Tensor, Tensor], Tensor]]
    ) -> None:
        self.forward, self.parts = module.forward, parts

    def __call__(self, hidden: Tensor) -> Tensor:
        due = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for (rows, columns), _ in self.parts:
            due[rows.to(due.device), columns.to(due.device)] = False
        found = torch.empty_like(hidden)
        if bool(due.any()):
            found[due] = self.forward(hidden[due][None])[0]
        for (rows, columns), vectors in self.parts:
            found[rows.to(due.device), columns.to(due.device)] = vectors.to(found)
        return found
