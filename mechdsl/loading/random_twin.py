"""A copy of a model with random weights, on which every part has an effect."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from mechdsl.models.block_parts import is_norm
from mechdsl.models.projections import transposed

_GAIN = 0.6
"""What a linear map makes of a vector's length: small enough for stacks without norms, in which
attention would otherwise see one token alone."""
_SPREAD = 0.3
"""Standard deviation of biases, and of the scales of norms around 1."""


def random_twin(module: nn.Module) -> nn.Module:
    """The same modules with other parameters, always the same; buffers stay as they are.

    It takes as much memory as the model once more. Raises what copying the model raises.
    """
    twin = deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in twin.modules():
            for own in part.parameters(recurse=False):
                if own.is_floating_point():
                    noise = torch.randn(own.shape, generator=generator)
                    own.copy_(_drawn(part, own, noise))
    return twin.eval()


def _drawn(part: nn.Module, weight: Tensor, noise: Tensor) -> Tensor:
    """A parameter made of noise, by what reads it."""
    if weight.dim() < 2:
        scale = is_norm(part) and weight is getattr(part, "weight", None)
        return _SPREAD * noise + (1.0 if scale or weight.dim() == 0 else 0.0)
    if isinstance(part, nn.Embedding):
        return noise
    inputs = weight.shape[0] if transposed(part) else weight.shape[-1]
    return _GAIN * noise / inputs**0.5
