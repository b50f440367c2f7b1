"""A stand-in for a quantised model: `zoo("worked")` with weights rounded to 4 bits."""

from importlib.resources import files
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BITS = 4


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round weights to 15 equally spaced levels, with one scale per output channel."""
    levels = 2 ** (BITS - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / levels
    return (weight / scale).round() * scale


def build() -> tuple[Any, Any]:
    """The model, with all linear layers of its blocks rounded, and its tokenizer."""
    folder = str(files("mechdsl") / "zoo" / "worked")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for block in model.model.layers:
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(rounded(module.weight))
    return model, AutoTokenizer.from_pretrained(folder)
