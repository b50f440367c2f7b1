"""Gradients by plain autograd and one plain hook, one unpadded prompt or image at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Where:
    """A tensor that a module takes or returns, as [T, units, width]."""

    path: str
    side: Literal["in", "out"]
    units: int = 1


@dataclass(frozen=True)
class Taken:
    """The gradient of a number by the value at one place."""

    value: Tensor
    """[T, units, width], the value."""
    gradient: Tensor
    """[T, units, width]"""
    metric: float


Forward = Callable[[nn.Module], Tensor]
"""Calls the model and returns one number of its output."""


def taken(module: nn.Module, where: Where, forward: Forward, moved: Tensor | None = None) -> Taken:
    """The value at a place, shifted by `moved`, and the gradient of the number by it."""
    leaves: list[Tensor] = []

    def swap(value: Tensor) -> Tensor:
        flat = value.detach().reshape(value.shape[-2] if value.dim() > 2 else len(value), -1)
        own = flat.reshape(len(flat), where.units, -1).clone()
        leaf = own if moved is None else own + _as_long(moved, len(own))
        leaf.requires_grad_()
        leaves.append(leaf)
        return leaf.reshape(value.shape)

    def entering(part: nn.Module, args: Any) -> Any:
        return (swap(args[0]), *args[1:])

    def leaving(part: nn.Module, args: Any, out: Any) -> Any:
        return (swap(out[0]), *out[1:]) if isinstance(out, tuple) else swap(out)

    # Tensors that a library cached in earlier passes have no gradient.
    module.requires_grad_(False)
    part = module.get_submodule(where.path)
    if where.side == "in":
        handle = part.register_forward_pre_hook(entering)
    else:
        handle = part.register_forward_hook(leaving)
    try:
        with torch.enable_grad():
            number = forward(module)
            (leaf,) = leaves
            (gradient,) = torch.autograd.grad(number, [leaf])
    finally:
        handle.remove()
    return Taken(leaf.detach(), gradient, float(number.detach()))


def _as_long(moved: Tensor, length: int) -> Tensor:
    """Pad with zeros: tokens after the prompt aren't shifted."""
    return torch.cat([moved, moved.new_zeros(length - len(moved), *moved.shape[1:])])


Vectors = Sequence[tuple[int, int]]
"""(position, unit) of each."""


def estimated(
    module: nn.Module,
    where: Where,
    forward: Forward,
    cells: Mapping[Any, Vectors],
    written: Callable[[int, int], Tensor],
    kind: str,
    steps: int = 0,
) -> dict[Any, float]:
    """The estimate of each cell of one place, whose vectors move together.

    written: from a position and a unit, the written vector.
    """
    base = taken(module, where, forward)
    if kind == "gradient":
        return {
            cell: float(torch.stack([base.gradient[at] for at in own]).norm())
            for cell, own in cells.items()
        }
    moved = torch.zeros_like(base.value)
    for own in cells.values():
        for position, unit in own:
            moved[position, unit] = written(position, unit) - base.value[position, unit]
    gradient = base.gradient
    if kind == "integrated_gradients":
        points = [(step + 0.5) / steps for step in range(steps)]
        each = [taken(module, where, forward, moved * at).gradient for at in points]
        gradient = torch.stack(each).mean(0)
    return {
        cell: float(sum((moved[at] * gradient[at]).sum() for at in own))
        for cell, own in cells.items()
    }
