"""Paths of edges through single tokens, from the embeddings to the logits of the last token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from ..reference.forward import stack
from .circuits import EMBED, LOGITS
from .support import double
from .test_ablated_circuits import edges, key_heads

Node = tuple[str, int]
"""A component at a token."""


class Step(NamedTuple):
    """An edge at a token."""

    edge: tuple[str, str]
    token: int
    targets: frozenset[Node]
    """The nodes that the receiver is an input of; keys and values are inputs of later tokens."""

    @property
    def sender(self) -> Node:
        return self.edge[0], self.token


@cache
def list_steps(name: str, length: int) -> list[Step]:
    """All edges at all tokens; those into a component precede those from it."""
    shared = stack(name, double(name)).heads // key_heads(name)
    return [
        Step((of, to), token, _targets(to, token, length, shared))
        for of, to in sorted(edges(name)[2], key=lambda edge: _rank(edge[0]))
        for token in range(length)
    ]


def _rank(sender: str) -> tuple[int, bool]:
    """Order components by layer, and heads before the MLP."""
    if sender == EMBED:
        return -1, False
    return int(sender[1 : sender.index("." if "." in sender else "H")]), sender.endswith(".mlp")


def _targets(to: str, token: int, length: int, shared: int) -> frozenset[Node]:
    name, _, part = to.partition(".")
    if to == LOGITS or part == "mlp":
        return frozenset(((to, token),))
    if part == "q":
        return frozenset(((name, token),))
    layer, number = name.removeprefix("L").split("H")
    heads = range(int(number) * shared, (int(number) + 1) * shared)
    return frozenset((f"L{layer}H{n}", later) for n in heads for later in range(token, length))


def find_reached(steps: Iterable[Step]) -> list[Step]:
    """Return the steps that others of them connect with an embedding."""
    nodes, found = set[Node](), list[Step]()
    for step in steps:
        if step.edge[0] == EMBED or step.sender in nodes:
            nodes |= step.targets
            found.append(step)
    return found


def find_leading(steps: Sequence[Step], length: int) -> list[Step]:
    """Return the steps that others of them connect with the logits of the last token."""
    nodes, found = {(LOGITS, length - 1)}, list[Step]()
    for step in reversed(steps):
        if not nodes.isdisjoint(step.targets):
            nodes.add(step.sender)
            found.append(step)
    return found[::-1]
