# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Mixture-of-experts sites, on the module that is handed tokens, chosen experts and their weights.

The model library calls it `experts(tokens, indices, weights)`, [n, d_model], [n, k] and [n, k], and
it returns the weighted sum. `router` is all weights, zero for experts that weren't chosen; writing
it asks every expert. `expert_out` is one expert's share of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.reads_and_writes import Frame

Change = Callable[[Tensor], Tensor]
"""[B, T, units, width] to the same."""


class RouterHook:
    """Reads and writes the weights that experts are asked with."""

    def __init__(self, change: Change, experts: int, frame: Frame) -> None:
        self.change = change
        self.experts = experts
        self.frame = frame

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens, index, weights = _called(args, kwargs)
        dense = weights.new_zeros(len(weights), self.experts)
        dense.scatter_(1, index, weights)
        given = dense.unflatten(0, (self.frame.leading, -1)).unsqueeze(2)
        value = self.change(given)
        if value is given:
            return None
        every = torch.arange(self.experts, dtype=index.dtype, device=index.device)
        every = every.expand(len(dense), -1).contiguous()
        return (tokens, every, value.squeeze(2).flatten(0, 1).contiguous()), {}


class ExpertHook:
    """Reads and writes what single experts add."""

    def __init__(self, change: Change, experts: int, frame: Frame) -> None:
        self.change = change
        self.experts = experts
        self.frame = frame

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        tokens, index, weights = _called(args, kwargs)
        shares = (self._alone(module, tokens, index, weights, e) for e in range(self.experts))
        each = torch.stack([share.reshape(len(weights), -1) for share in shares], dim=1)
        given = each.unflatten(0, (self.frame.leading, -1))
        value = self.change(given)
        if value is given:
            return None
        return output + (value - given).sum(2).reshape(output.shape)

    @staticmethod
    def _alone(
        module: nn.Module, tokens: Tensor, index: Tensor, weights: Tensor, expert: int
    ) -> Tensor:
        """[n, d_model]: one expert's share."""
        weight = (weights * (index == expert)).sum(1, keepdim=True)
        only = torch.full_like(index[:, :1], expert)
        # Not the module itself: its hooks are these.
        return module.forward(tokens, only, weight)


def _called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, indices, weights) of a call."""
    tokens, index, weights = (*args, *kwargs.values())[:3]
    return tokens, index.reshape(-1, index.shape[-1]), weights.reshape(-1, weights.shape[-1])
