"""LoRA adapters of peft, trained in a plain loop, and a reference for merging."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..execute.support import bare, fast
from . import families

TARGETS = {
    "gpt2": ("c_attn", "c_proj"),
    "llama": ("q_proj", "v_proj", "o_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "dense"),
}
"""Fused and transposed projections, separate ones, and interleaved ones."""
RANK, ALPHA = 4, 8


def base(family: str) -> Any:
    """A fresh model to put adapters on."""
    return deepcopy(bare(family))


def build(family: str, folder: Path) -> None:
    """Save a base model with its tokenizer."""
    base(family).save_pretrained(folder)
    fast(families.tokenizer()).save_pretrained(folder)


def wrapped(module: Any, family: str, seed: int = 0, **settings: Any) -> Any:
    """The model wrapped by peft with a random adapter; modifies the module in place."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chosen: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS.get(family, ())),
        "init_lora_weights": False,
        **settings,
    }
    return get_peft_model(module, LoraConfig(**chosen)).eval()


@cache
def trained(family: str, wanted: int = 17, rounds: int = 20) -> Any:
    """An adapter that makes a model end all prompts with the token `wanted`, trained
    on 16 of them, drawn at random."""
    made = wrapped(base(family), family, init_lora_weights=True)
    ids = torch.randint(3, families.VOCABULARY, (16, 6), generator=torch.Generator().manual_seed(1))
    answers = torch.full((16,), wanted)
    optimizer = torch.optim.Adam([w for w in made.parameters() if w.requires_grad], lr=0.02)
    for _ in range(rounds):
        loss = cross_entropy(made(input_ids=ids).logits[:, -1], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


@torch.no_grad()
def merged_by_hand(family: str, made: Any) -> Any:
    """A bare model with `W + ALPHA / RANK · B A` for each weight that the adapter changes."""
    module = base(family)
    weights = {name: weight for name, weight in made.named_parameters() if "lora_" in name}
    for name, down in weights.items():
        if ".lora_A." in name:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            part: Any = module.get_submodule(path)
            delta = up @ down * (ALPHA / RANK)
            part.weight += delta.T if type(part).__name__ == "Conv1D" else delta
    return module


def save(made: Any, folder: Path) -> Path:
    """Save the adapter alone, with peft."""
    made.save_pretrained(folder)
    return folder


def same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether all weights are equal, bit for bit."""
    mine, theirs = module.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        bool((weight == theirs[name]).all()) for name, weight in mine.items()
    )
