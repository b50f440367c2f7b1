"""Tiny models of every tested family, with large random weights, saved to folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from ..quick import in_turn, some

VOCABULARY = 53
SPECIAL = ("<pad>", "<s>", "<unk>")
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]

_ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
_NEOX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_EVEN = {k: v for k, v in _ROTARY.items() if k != "head_dim"} | {"hidden_size": 24}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 24,
        "n_inner": 28,
        "n_positions": 64,
    },
    "llama": {**_ROTARY, "attention_bias": True},
    "mistral": {**_ROTARY, "sliding_window": 3},
    "qwen2": _EVEN,
    "qwen3": _ROTARY,
    "gpt_neox": {**_NEOX, "use_parallel_residual": True},
    "gpt_neox_sequential": {**_NEOX, "use_parallel_residual": False},
    "phi3": {**_EVEN, "pad_token_id": 0},
    "gptj": {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "n_embd": 24, "rotary_dim": 4},
    "bloom": {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "hidden_size": 24},
    "gemma2": {**_ROTARY, "sliding_window": 3, "query_pre_attn_scalar": 6},
    "gemma3_text": {**_ROTARY, "sliding_window": 3, "query_pre_attn_scalar": 6},
    "olmo2": _EVEN,
    "cohere": _EVEN,
    "exaone4": _ROTARY,
    "mixtral": {**_ROTARY, "num_local_experts": 4},
    "falcon": {**_NEOX, "ffn_hidden_size": 28},
    "gemma": _ROTARY,
    "olmo": _EVEN,
    "phi": {**_NEOX, "partial_rotary_factor": 1.0},
    "cohere2": {**_ROTARY, "sliding_window": 3},
    "apertus": _EVEN,
    "mpt": {"vocab_size": VOCABULARY, "n_layers": 3, "n_heads": 4, "d_model": 24},
    "codegen": {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 8, "n_embd": 48, "rotary_dim": 4},
    "gpt_neo": {
        "vocab_size": VOCABULARY,
        "num_layers": 3,
        "num_heads": 4,
        "hidden_size": 24,
        "attention_types": [[["global", "local", "local"], 1]],
        "window_size": 3,
    },
    "gpt_neox_japanese": {**_NEOX, "intermediate_multiple_size": 2},
    "xglm": {
        "vocab_size": VOCABULARY,
        "num_layers": 3,
        "attention_heads": 4,
        "d_model": 24,
        "ffn_dim": 28,
    },
}

VERIFIED = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt_neox_sequential")
"""Families on which every site is compared with plain hooks."""
KINDS = ("gpt2", "llama", "qwen3", "gpt_neox", "bloom", "gemma2", "mixtral", "falcon", "gpt_neo")
"""Families that together cover the variants of all families."""
VERIFIED_KINDS = tuple(name for name in VERIFIED if name in KINDS)
EACH = some(CONFIGS, KINDS)
"""All families, as a test's parameter."""
SIDED = in_turn(tuple(CONFIGS), ("left", "right"), KINDS)
"""All families, padded on either side."""
ALSO_READ = tuple(name for name in CONFIGS if name not in VERIFIED)
"""Families that the finder reads and the self-check accepts."""


def tokenizer() -> Tokenizer:
    """A tokenizer with one token per word (`w0` to `w49`) and `<s>` before every text."""
    ids = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return made


def module(family: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny model in eval mode; `overrides` change its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"bos_token_id": 1, "eos_token_id": None, **CONFIGS[family], **overrides}
    config = AutoConfig.for_model(family.removesuffix("_sequential"), **settings)
    if not hasattr(config, "pad_token_id"):  # transformers 5.0 reads it all the same
        config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    draw(model, seed)
    return model.eval()


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Draw weights large enough for every head and neuron to matter, and non-identity norms."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan = parameter.shape[0] if "c_" in name else parameter.shape[-1]
            wide = "embed" in name or "wte" in name or "wpe" in name
            parameter.copy_(normal(parameter, 0.8 if wide else 1.2 / math.sqrt(fan)))
        elif name.endswith("bias"):
            parameter.copy_(normal(parameter, 0.3))
        else:
            parameter.copy_(1 + normal(parameter, 0.3))


def build(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model and its tokenizer to `folder`, as `local("…")` reads them."""
    from transformers.utils import logging

    folder.mkdir(parents=True, exist_ok=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    module(family, seed, **overrides).save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
