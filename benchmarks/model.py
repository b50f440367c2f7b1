"""The GPT-2 model that every tool runs: the same random weights in every environment."""

from __future__ import annotations

from zlib import crc32

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.work import Shape

_SPREADS = {
    "wte.weight": 0.1,
    "wpe.weight": 0.05,
    "attn.c_attn.weight": 0.04,
    "attn.c_proj.weight": 0.04,
    "mlp.c_fc.weight": 0.03,
    "mlp.c_proj.weight": 0.02,
}
"""Standard deviations at width 768, wide enough that patches move the logits by order 1."""
_OTHERS = 0.02
_FINAL = 3.0
"""Mean of the last norm's weights: effects in logits are that much larger."""


def build(shape: Shape) -> GPT2LMHeadModel:
    """The model in fp32, in eval mode, without gradients."""
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Seeded by name: the order of parameters may differ between versions.
        draw = torch.Generator().manual_seed(shape.seed + crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=draw)
        if ".ln_" in name and name.endswith("weight"):
            mean = _FINAL if ".ln_f." in name else 1.0
            parameter.data.copy_(mean + 0.1 * values)
        else:
            parameter.data.copy_(values * _spread(name, shape))
    return model


def _spread(name: str, shape: Shape) -> float:
    for ending, spread in _SPREADS.items():
        if name.endswith(ending):
            return spread * (768 / shape.width) ** 0.5
    return _OTHERS
