"""Custom models: attention alone, hand-set circuits, few positions."""

from __future__ import annotations

from collections.abc import Callable
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


WIDTH = 24
"""One-hot tokens, one-hot positions, a head's output, and two free dimensions."""
WRITTEN = TOKENS + PLACES


@torch.no_grad()
def compiled() -> Any:
    """A GPT-2 of two blocks without norms, all zero except the one-hot embeddings of tokens and
    positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    module: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=TOKENS,
            n_positions=PLACES,
            n_embd=WIDTH,
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
    module.transformer.wpe.weight[:, TOKENS:WRITTEN] = torch.eye(PLACES)
    return module


@torch.no_grad()
def mover(seen_from: Callable[[int], int]) -> Any:
    """A model whose logits at each position are one-hot for the token at `seen_from(position)`:
    head 0 of block 1 attends there and copies the token."""
    module = compiled()
    attention = module.transformer.h[1].attn
    queries, keys, values = attention.c_attn.weight.split(WIDTH, dim=1)
    for place in range(PLACES):
        queries[TOKENS + place, seen_from(place)] = 200.0
        keys[TOKENS + place, place] = 1.0
    for token in range(PLACES):  # a head is as wide
        values[token, token] = 1.0
        attention.c_proj.weight[token, WRITTEN + token] = 1.0
    module.lm_head.weight[:, WRITTEN : WRITTEN + TOKENS] = torch.eye(TOKENS)
    return module


@torch.no_grad()
def copier(low: float = 0.0) -> nn.Module:
    """A model that predicts the preceding token. low: the logit of token 1."""
    module = mover(lambda place: max(place - 1, 0))
    module.lm_head.weight[1, TOKENS:WRITTEN] = low
    return module


def reverser() -> nn.Module:
    """A model that predicts the first three tokens in reverse order."""
    return mover(lambda place: PLACES - 1 - place if place >= PLACES // 2 else place)


@torch.no_grad()
def counter() -> nn.Module:
    """A model that counts token 1 at the last position: the logit of token c is 2 c n - c^2,
    highest where c is n. Head 0 of block 1 attends to all positions equally."""
    module = compiled()
    attention = module.transformer.h[1].attn
    values = attention.c_attn.weight.split(WIDTH, dim=1)[2]
    values[1, 0] = PLACES  # the mean over places, so that the sum is n
    attention.c_proj.weight[0, WRITTEN] = 1.0
    for count in range(PLACES):
        module.lm_head.weight[count, WRITTEN] = 2.0 * count
        module.lm_head.weight[count, WRITTEN - 1] = -float(count**2)
    return module


def words(unknown: bool = False, count: int = len(families.WORDS)) -> Tokenizer:
    """A tokenizer with one token per word (`w0` to `w49`) and no special tokens."""
    ids = {word: number for number, word in enumerate(families.WORDS[:count])}
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
    """GPT-2's attention written out, without transformers' registry of functions."""

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
