"""The senders and receivers of a model's edges, and the nodes that give what ablated edges carry.

If every edge into a node carries the values of a run at all tokens, its output is that of the run.
Edges from it then change nothing. A node without a path to the logits may have any output, so it
reads ablated edges too.
"""

from __future__ import annotations

import numpy as np

from mechdsl.base.arrays import Bools
from mechdsl.models.shape import ModelShape, unit_count

CircuitNode = tuple[str, int | None, int]
"""A site, its layer, and a head; 0 for whole vectors."""


class CircuitGraph:
    """All senders and receivers of a model, in forward order."""

    def __init__(self, shape: ModelShape) -> None:
        self.senders: list[CircuitNode] = [("resid_pre", 0, 0)]
        self.receivers: list[CircuitNode] = []
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
                self.receivers += [(site, layer, unit) for unit in range(count)]
                ends += [len(self.senders)] * count
            self.senders += [("z", layer, head) for head in range(heads)]
            self.inputs += own
            if shape.has("mlp_out", layer):
                self.inputs.append([len(self.receivers)])
                self.receivers.append(("mlp_norm", layer, 0))
                ends.append(len(self.senders))
                self.senders.append(("mlp_out", layer, 0))
        self.receivers.append(("logits", None, 0))
        ends.append(len(self.senders))
        self.column = {node: n for n, node in enumerate(self.senders)}
        self.row = {node: n for n, node in enumerate(self.receivers)}
        self.before = np.arange(len(self.senders)) < np.array(ends)[:, None]
        """[receiver, sender]: whether a receiver may read a sender."""

    def settle(self, kept: Bools, filled: Bools) -> Bools:
        """Return [sender]: whether the output is that of the run.

        Args:
            kept: [receiver, sender] edges that aren't ablated; afterwards, nodes without a path to
                the logits read ablated edges.
            filled: [sender] whether some edges from it are ablated.
        """
        kept[np.ix_(~self._reach_logits(kept), filled)] = False
        settled = np.zeros(len(self.senders), dtype=np.bool_)
        for sender, numbers in enumerate(self.inputs):
            settled[sender] = bool(numbers) and not kept[numbers][:, ~settled].any()
        return settled

    def _reach_logits(self, kept: Bools) -> Bools:
        """Return [receiver]: whether the logits depend on it."""
        logits = np.zeros(len(self.receivers), dtype=np.bool_)
        logits[-1] = True
        for sender in range(len(self.senders) - 1, -1, -1):
            if kept[logits, sender].any():
                logits[self.inputs[sender]] = True
        return logits

    def read_by(self, computed: Bools) -> Bools:
        """Return [receiver]: whether the logits or one of these senders are computed from it."""
        mask = np.zeros(len(self.receivers), dtype=np.bool_)
        mask[-1] = True
        for sender in np.flatnonzero(computed):
            mask[self.inputs[sender]] = True
        return mask
