"""Models as people make them at home: attention alone, circuits set by hand, few positions."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from . import families

TOKENS = 8
PLACES = 6


@torch.no_grad()
def silenced(family: str, *parts: str, layers: tuple[int, ...] = (0, 1, 2)) -> nn.Module:
    """A model whose parameters are zero where a path has one of `parts` in one of the layers."""
    module = families.module(family)
    for path, weight in module.named_parameters():
        named = path.split(".")
        if any(part in named for part in parts) and any(str(n) in named for n in layers):
            weight.zero_()
    return module


@torch.no_grad()
def copier(low: float = 0.0) -> nn.Module:
    """A circuit set by hand: each token's logits are one-hot of the token in front of it.

    A GPT-2 of two blocks without norms; head 0 of block 1 attends to the position before, all other
    heads and all neurons are zero. low: the logit of token 1.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    width = 24  # one-hot tokens, positions, what is copied, and two that are free
    module: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS,
            n_positions=PLACES,
            n_embd=width,
            n_layer=2,
            n_head=4,
            n_inner=8,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    for weight in module.parameters():
        weight.zero_()
    for block in module.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    module.transformer.ln_f = nn.Identity()
    module.transformer.wte.weight[:, :TOKENS] = torch.eye(TOKENS)
    module.transformer.wpe.weight[:, TOKENS : TOKENS + PLACES] = torch.eye(PLACES)
    attention = module.transformer.h[1].attn
    queries, keys, values = attention.c_attn.weight.split(width, dim=1)
    for place in range(PLACES):
        queries[TOKENS + place, max(place - 1, 0)] = 200.0
        keys[TOKENS + place, place] = 1.0
    copied = TOKENS + PLACES
    for token in range(PLACES):  # a head is as wide
        values[token, token] = 1.0
        attention.c_proj.weight[token, copied + token] = 1.0
    module.lm_head.weight[:, copied : copied + TOKENS] = torch.eye(TOKENS)
    module.lm_head.weight[1, TOKENS : TOKENS + PLACES] = low
    return module


def words(unknown: bool = False) -> Tokenizer:
    """One token a word, `w0` to `w49`, nothing in front of texts, and none for other words."""
    ids = {word: number for number, word in enumerate(families.WORDS)}
    if unknown:
        ids["<unk>"] = len(ids)
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


SMALL: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def made(name: str, **settings: Any) -> nn.Module:
    """A tiny model of one of the library's classes."""
    family = getattr(transformers, name)
    module = family(family.config_class(**SMALL, **settings))
    families.draw(module, 0)
    return module.eval()


class ByHand(nn.Module):
    """GPT-2's attention as people write it out, without transformers' registry of functions."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.heads = own.c_attn, own.c_proj, own.num_heads

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, tokens, width = hidden_states.shape
        parts = self.c_attn(hidden_states).split(width, dim=2)
        shape = rows, tokens, self.heads, width // self.heads
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / shape[-1] ** 0.5
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -1e30)
        if attention_mask is not None:
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
            scores = scores.masked_fill(hidden, -1e30)
        pattern = scores.softmax(-1)
        return self.c_proj((pattern @ value).transpose(1, 2).reshape(hidden_states.shape)), pattern


def with_attention_by_hand() -> nn.Module:
    module: Any = families.module("gpt2")
    for block in module.transformer.h:
        block.attn = ByHand(block.attn)
    return module
