"""Tiny models from the tables, with large random weights, and their prompts."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import nn

from .parts import Architecture

VOCABULARY = 61
LENGTHS = (8, 5, 7)
"""Tokens of the prompts."""


def model(architecture: Architecture, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny model in eval mode, as its class builds it from the config."""
    import transformers

    settings = {"bos_token_id": 1, "eos_token_id": None, **architecture.config, **overrides}
    config = transformers.AutoConfig.for_model(architecture.name.partition("/")[0], **settings)
    if not hasattr(config, "pad_token_id"):  # transformers 5.0 reads it all the same
        config.pad_token_id = None
    made = getattr(transformers, architecture.build)
    torch.manual_seed(seed)
    module = made.from_config(config) if architecture.build.startswith("Auto") else made(config)
    draw(module, seed)
    return module.eval()


@torch.no_grad()
def draw(module: nn.Module, seed: int) -> None:
    """Draw weights large enough for every head and neuron to matter, and non-identity norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * std

    for path, part in module.named_modules():
        if "Sinusoidal" in type(part).__name__:  # some must stay rotations
            continue
        if (table := getattr(part, "tid2eid", None)) is not None:  # a token's experts
            order = torch.rand(len(table), part.num_experts, generator=generator).argsort(1)
            table.copy_(order[:, : table.shape[1]])
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("A_log", "dt_bias", "D"):  # of state-space layers, which must stay stable
                continue
            if not parameter.requires_grad:  # tables of sinusoids
                continue
            if parameter.dim() >= 2:
                embeds = isinstance(part, nn.Embedding)
                conv = type(part).__name__ == "Conv1D"
                fan = parameter.shape[0] if conv else math.prod(parameter.shape[1:])
                if parameter.dim() == 3 and not isinstance(part, nn.Conv1d):  # experts
                    fan = parameter.shape[-1]
                parameter.copy_(normal(parameter, 0.8 if embeds else 1.2 / math.sqrt(fan)))
            elif name.endswith("bias") or "norm" not in f"{path}.{type(part).__name__}".lower():
                parameter.add_(normal(parameter, 0.3))
            else:
                parameter.copy_(parameter + normal(parameter, 0.3))


@cache
def ids(count: int, length: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of `length`, `length - 3`, `length - 1`, … tokens that begin with token 1; no pad."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length - (0, 3, 1)[i % 3] for i in range(count)]
    return tuple(
        (1, *torch.randint(3, VOCABULARY - 8, (n - 1,), generator=generator).tolist())
        for n in lengths
    )
