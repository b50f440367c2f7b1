"""The GPT-2 model that every tool runs: the same random weights in every environment."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.synchronisations import SIMULATED, to_simulated
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


@dataclass
class Passes:
    """Counts forward passes."""

    count: int = 0
    """Calls of the MLP in the last block."""

    def add(self, *_: Any) -> None:
        """A hook on that MLP's first map."""
        self.count += 1


@dataclass(frozen=True)
class Place:
    """Where and in which precision models are built."""

    device: str = "cpu"
    """That of `SIMULATED` is simulated."""
    dtype: torch.dtype = torch.float32
    drawn_on: str = "cpu"
    """Device that weights are drawn on: a CPU gives the same ones to every device."""
    passes: Passes | None = None
    """Of all models that are built."""
    models: dict[Shape, GPT2LMHeadModel] | None = None
    """Models that were built before, to be used again; None builds each anew."""


_places = [Place()]


@contextmanager
def placed(place: Place) -> Generator[None]:
    """Build models there within the block."""
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()


def build(shape: Shape) -> GPT2LMHeadModel:
    """The model in eval mode, without gradients; in fp32 on the CPU outside of `placed`."""
    place = _places[-1]
    if place.models is not None and shape in place.models:
        return place.models[shape]
    with torch.device(place.drawn_on):
        model: Any = _drawn(shape)
    model = model.to(place.dtype)
    if place.passes is not None:
        model.transformer.h[-1].mlp.c_fc.register_forward_pre_hook(place.passes.add)
    if place.device == SIMULATED.type:
        to_simulated(model)
    else:
        model = model.to(place.device)
    if place.models is not None:
        place.models[shape] = model
    return model


def _drawn(shape: Shape) -> GPT2LMHeadModel:
    """The model in fp32, on the device that is the default."""
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Seeded by name: the order of parameters may differ between versions.
        draw = torch.Generator(torch.get_default_device()).manual_seed(
            shape.seed + crc32(name.encode())
        )
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
