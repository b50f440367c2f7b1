"""Tiny `transformers` models on which rules are tested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import nn

from ..execute.support import WIDER
from ..models import families
from ..shared_models import unchanged

T = TypeVar("T")
GPT_OSS: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_EXPERTS: dict[str, Any] = {
    **{key: GPT_OSS[key] for key in list(GPT_OSS)[:8]},
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 18,
}
WITH_EXPERTS: dict[str, dict[str, Any]] = {
    "gpt_oss": GPT_OSS,
    "qwen2_moe": {**_EXPERTS, "hidden_size": 24, "head_dim": 6},
    "qwen3_moe": {**_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True},
    "olmoe": {**_EXPERTS, "hidden_size": 24, "intermediate_size": 16},
}
"""Families with experts. Qwen2 has one that all tokens share, and a block of Qwen3 has none."""
FAMILIES = (
    "gpt2",
    "llama",
    "gpt_neox",
    "gpt_neox_sequential",
    "mistral",
    "gemma2",
    "qwen3",
    "gpt_oss",
)
BIASED_OUTPUT = ("gpt2", "llama", "gpt_neox", "gpt_neox_sequential", "gpt_oss")
"""Families whose attention output projection has a bias."""
STRAIGHT = ("gpt2", "llama", "gpt_neox", "gpt_neox_sequential")
"""Families that are also tested without norms: `gpt2 without norms`."""
WITHOUT_NORMS = " without norms"
EXACT = " exact"
"""Ends the name of a model without a step in 32 bits: `gemma2 exact` has norms in the precision of
their input, and windows longer than the prompts, so that padding is finite in 64 bits."""


@cache
def bare(name: str) -> Any:
    """The model in 32 bits, which the package runs."""
    family = name.removesuffix(WITHOUT_NORMS).removesuffix(EXACT)
    changes = {"sliding_window": 64} if name.endswith(EXACT) else {}
    known = family in WITH_EXPERTS
    model: Any = _with_experts(family) if known else families.module(family, **changes)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            for part, factor in WIDER.items():
                if part in key and parameter.dim() >= 2:
                    parameter.mul_(factor)
        if name.endswith(WITHOUT_NORMS):
            _take_norms_out(model)
        if name.endswith(EXACT):
            _put_exact_norms(model)
    return unchanged(model)


@cache
def double(name: str) -> Any:
    """The same weights in 64 bits, for the reference."""
    model = copy.deepcopy(bare(name)).double()
    model.config._experts_implementation = "eager"  # the others have no 64 bits
    return unchanged(model)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


_FREE: dict[str, list[Any]] = {}
"""Copies of each model, by name, that no call is changing; calls can be nested."""


def _copied(name: str) -> Any:
    model = copy.deepcopy(double(name))
    model.set_attn_implementation("eager")
    return model


def on_the_model(call: Callable[..., T]) -> Callable[..., T]:
    """Turn a function of a 64-bit model and its name into a function of the name.

    The function may add hooks to the model, whose attention takes masks, and replace its modules.
    All changes are undone when it returns. A copy of the model for each call would be too slow."""

    @wraps(call)
    def of_a_name(name: str, *given: Any, **named: Any) -> T:
        free = _FREE.setdefault(name, [])
        model = free.pop() if free else _copied(name)
        before = [
            (table, dict(table))
            for module in model.modules()
            for table in (module._modules, *(getattr(module, hooks) for hooks in _HOOKS))
        ]
        try:
            return call(model, name, *given, **named)
        finally:
            for table, old in before:
                table.clear()
                table.update(old)
            free.append(model)

    return of_a_name


def _with_experts(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens: Any = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(family, **tokens, **WITH_EXPERTS[family])
    model = AutoModelForCausalLM.from_config(config)
    families.draw(model, 0)
    return model.eval()


def _take_norms_out(model: Any) -> None:
    """Remove the norms before sublayers and at the end; shrink weights to keep values small."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if "norm" in type(child).__name__.lower():
                setattr(part, name, nn.Identity())
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.mul_(0.4 if "embed" in key or "wte" in key else 0.5)


def _put_exact_norms(model: Any) -> None:
    """Replace Gemma's norms, which compute in 32 bits."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(len(child.weight), eps=child.eps)
                exact.weight.copy_(1 + child.weight)
                setattr(part, name, exact)
