"""Llama and the most similar models."""

from __future__ import annotations

from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Stack

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

BLOCK = Block(
    attn_norm="self_attn",
    q=Heads("self_attn.q_proj", 4, 6),
    k=Heads("self_attn.k_proj", 2, 6),
    v=Heads("self_attn.v_proj", 2, 6),
    output="self_attn.o_proj",
    heads=4,
    width=6,
    attn_out="self_attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.down_proj",
    mlp_out="mlp",
)

STACK = Stack(
    blocks="model.layers",
    count=3,
    block=BLOCK,
    embed=("model.embed_tokens", "out"),
    final_norm=("lm_head", "in"),
)

TABLE = [Architecture("llama", CONFIG, STACK)]
