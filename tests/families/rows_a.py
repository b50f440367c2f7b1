"""Causal language models from AFMoE to Emu3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack
from .rows_llama import BLOCK, CONFIG, STACK

EXPERTS = 4
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


WIDE = {**without(CONFIG, "head_dim"), "hidden_size": 24}
"""Config for architectures whose head width is width / heads."""


def stack(block: Block, **changes: Any) -> Stack:
    return replace(STACK, block=block, **changes)


def moe(block: Block, mlp: str = "mlp") -> Block:
    """Experts instead of a dense MLP."""
    return replace(block, mlp_hidden=None, experts=f"{mlp}.experts", n_experts=EXPERTS)


def dense_first(block: Block, **changes: Any) -> Stack:
    """Experts in all blocks but the first."""
    return stack(moe(block), other={0: block}, **changes)


NORMED = replace(
    BLOCK,
    q=Heads("self_attn.q_norm", 4, 6, form="heads"),
    k=Heads("self_attn.k_norm", 2, 6, form="heads"),
)
"""Norms of each query and key, on [1, T, heads, width]."""

PARALLEL = replace(BLOCK, middle="none")

# --- AFMoE: norms before and after both sublayers, attention's output is gated before o_proj.

AFMOE = Architecture(
    "afmoe",
    {
        **CONFIG,
        "num_dense_layers": 1,
        "moe_intermediate_size": 12,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_scale": 1.5,
        "global_attn_every_n_layers": 3,
        "sliding_window": 3,
        "mup_enabled": True,
    },
    dense_first(replace(NORMED, attn_out="post_attention_layernorm", mlp_out="post_mlp_layernorm")),
)

# --- Arcee, Apertus, BitNet, CWM, Emu3, DiffLlama: Llama, except for details.

PLAIN = [
    Architecture("arcee", CONFIG, STACK),
    Architecture(
        "apertus",
        {**CONFIG, "rope_parameters": ROTARY},
        stack(
            replace(
                BLOCK,
                q=Heads("self_attn.q_norm", 4, 6, form="heads_first"),
                k=Heads("self_attn.k_norm", 2, 6, form="heads_first"),
            )
        ),
    ),
    # Norms before o_proj and down_proj: z and the neurons are the inputs of these two.
    Architecture("bitnet", WIDE, STACK),
    Architecture("cwm", {**CONFIG, "sliding_window": 3, "rope_parameters": ROTARY}, STACK),
    Architecture(
        "emu3",
        {"text_config": {**CONFIG, "bos_token_id": 1, "eos_token_id": None}, "vq_config": {}},
        STACK,
    ),
    # Two heads make one: z has half the heads, of twice the width.
    Architecture("diffllama", CONFIG, stack(replace(BLOCK, heads=2, width=12))),
]

# --- Aria's text model: experts in all blocks, their weights are transposed.

ARIA = Architecture(
    "aria_text",
    {
        **CONFIG,
        "intermediate_size": 12,
        "moe_num_experts": EXPERTS,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    },
    stack(moe(BLOCK)),
)

# --- Multi-head latent attention. Keys have a part for rotary that all heads share.

NOPE, ROPE, VALUE = 4, 4, 6


def mla(q: str = "q_b_proj", heads: int = 4, value: int = VALUE, gate: int = 0) -> Block:
    return replace(
        BLOCK,
        q=Heads(f"self_attn.{q}", heads, NOPE + ROPE, step=NOPE + ROPE + gate),
        k=None,
        v=Heads("self_attn.kv_b_proj", heads, value, start=NOPE, step=NOPE + value),
        heads=heads,
        width=value,
    )


LATENT = {
    **without(CONFIG, "head_dim"),
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "moe_intermediate_size": 12,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V2 = Architecture("deepseek_v2", LATENT, dense_first(mla()))
DEEPSEEK_V3 = Architecture("deepseek_v3", LATENT, dense_first(mla()))
SPARSE = {**LATENT, "index_topk": 16, "index_head_dim": 6, "index_n_heads": 3}
"""An indexer chooses the keys that each query attends to: all of them here, as keys of zeros would
tie, and padding would decide."""

DOTS3 = {
    **SPARSE,
    "head_dim": 8,
    "layer_types": ["indexed_attention", "sliding_attention", "full_attention"],
    "use_dsa": None,
    "sliding_window": 3,
    "shared_experts_intermediate_size": 12,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 8,
    "swa_qk_nope_head_dim": NOPE,
    "swa_v_head_dim": 8,
}

MLA = [
    DEEPSEEK_V2,
    DEEPSEEK_V2.but(
        "deepseek_v2/lite",
        config={**LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        main=dense_first(mla("q_proj")),
    ),
    DEEPSEEK_V3,
    DEEPSEEK_V3.but(
        "deepseek_v3/lite",
        config={**LATENT, "q_lora_rank": None, "rope_interleave": False},
        main=dense_first(mla("q_proj")),
    ),
    Architecture("deepseek_v32", SPARSE, dense_first(mla())),
    # There is a norm after the experts, within the module.
    Architecture("axk1", LATENT, dense_first(mla())),
    # Each head's query is followed by its gate, which already multiplied z.
    Architecture(
        "axk2", {**SPARSE, "gated_norm_rank": 5}, dense_first(mla("q_gate_proj", gate=VALUE))
    ),
    # Blocks with a sliding window have other sizes; each head has a gate before o_proj.
    Architecture(
        "dots3_note_text",
        DOTS3,
        stack(moe(mla()), other={0: mla(), 1: moe(mla(heads=2, value=8))}),
    ),
]

# --- DeepSeek V4: four streams, mixed before each sublayer. One head of keys, which are the values
# too, and an output projection in groups.

V4_BLOCK = Block(
    attn_norm="self_attn",
    q=Heads("self_attn.q_b_norm", 4, 6, form="heads_first"),
    attn_out="self_attn",
    middle="none",
    mlp_norm="mlp",
    mlp_out="mlp",
    experts="mlp.experts",
    n_experts=EXPERTS,
    resid=False,
)
V4 = {
    **without(CONFIG, "num_key_value_heads"),
    "moe_intermediate_size": 12,
    "q_lora_rank": 10,
    "partial_rotary_factor": 0.67,
    "num_experts_per_tok": 2,
    "n_routed_experts": EXPERTS,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
    "hc_mult": 3,
    "mlp_layer_types": ["moe"] * 3,
    "sliding_window": 3,
    "o_groups": 2,
    "o_lora_rank": 5,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_topk": 16,  # all, as above
}
DEEPSEEK_V4 = Architecture("deepseek_v4", V4, stack(V4_BLOCK))
# A table, which comes with the weights, chooses the experts by the token.
V4_HASH = DEEPSEEK_V4.but(
    "deepseek_v4/hash",
    config={**V4, "mlp_layer_types": ["hash_moe", "hash_moe", "moe"]},
)

# --- Bailing hybrid, Bamba: some blocks with linear attention or a state space.

BAILING_BLOCK = Block(
    mixer_norm="self_attn",
    mixer_out="self_attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.down_proj",
    mlp_out="mlp",
)
BAMBA_BLOCK = Block(
    mixer_norm="mamba",
    mixer_out="mamba",
    mlp_norm="feed_forward",
    mlp_hidden="feed_forward.down_proj",
    mlp_out="feed_forward",
)
HYBRID = [
    Architecture(
        "bailing_hybrid",
        {
            **without(LATENT, "q_lora_rank", "n_routed_experts"),
            "num_experts": EXPERTS,
            "head_dim": 6,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        dense_first(BAILING_BLOCK),
    ),
    Architecture(
        "bamba",
        {
            **CONFIG,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 4,
        },
        stack(
            BAMBA_BLOCK,
            other={1: replace(BAMBA_BLOCK, mixer_norm="self_attn", mixer_out="self_attn")},
        ),
    ),
]

# --- BioGPT: no module for the MLP; the embedding module scales.

BIOGPT = Architecture(
    "biogpt",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 28,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    Stack(
        blocks="biogpt.layers",
        count=3,
        block=replace(
            BLOCK,
            k=Heads("self_attn.k_proj", 4, 6),
            v=Heads("self_attn.v_proj", 4, 6),
            output="self_attn.out_proj",
            mlp_norm="fc1",
            mlp_hidden="fc2",
            mlp_out="fc2",
        ),
        embed=("biogpt.embed_tokens", "out"),
        final_norm=("output_projection", "in"),
    ),
)

# --- BLOOM: both sublayers add the residual within their modules; each head has query, key, value
# as neighbours. The residual stream begins after a norm of the embeddings.

BLOOM_BLOCK = Block(
    attn_norm="self_attention",
    q=Heads("self_attention.query_key_value", 4, 6, start=0, step=18),
    k=Heads("self_attention.query_key_value", 4, 6, start=6, step=18),
    v=Heads("self_attention.query_key_value", 4, 6, start=12, step=18),
    output="self_attention.dense",
    heads=4,
    width=6,
    attn_out="self_attention.dense",
    mlp_norm="mlp",
    mlp_hidden="mlp.dense_4h_to_h",
    mlp_out="mlp.dense_4h_to_h",
)
BLOOM_STACK = Stack(
    blocks="transformer.h",
    count=3,
    block=BLOOM_BLOCK,
    embed=("transformer.word_embeddings", "out"),
    final_norm=("lm_head", "in"),
)
BLOOM = Architecture(
    "bloom",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "n_layer": 3,
        "n_head": 4,
        "pad_token_id": 0,
    },
    BLOOM_STACK,
)
# The sublayers' outputs are added to the normed stream, not to the stream.
BLOOM_POST = BLOOM.but(
    "bloom/post_layernorm",
    config={**BLOOM.config, "apply_residual_connection_post_layernorm": True},
    main=replace(BLOOM_STACK, block=replace(BLOOM_BLOCK, middle="self_attention")),
)

# --- CodeGen: parallel. Four groups, each of the queries, values, keys (in this order) of a quarter
# of the heads.


def codegen(heads: int, width: int) -> Stack:
    group = heads // 4
    step = 3 * group * width
    query, value, key = (
        Heads("attn.qkv_proj", heads, width, start=i * group * width, step=step, group=group)
        for i in range(3)
    )
    block = Block(
        attn_norm="attn",
        q=query,
        k=key,
        v=value,
        output="attn.out_proj",
        heads=heads,
        width=width,
        attn_out="attn",
        middle="none",
        mlp_norm="mlp",
        mlp_hidden="mlp.fc_out",
        mlp_out="mlp",
    )
    return replace(BLOOM_STACK, block=block, embed=("transformer.wte", "out"))


CODEGEN = Architecture(
    "codegen",
    {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_ctx": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 8,
        "rotary_dim": 2,
        "n_inner": 28,
    },
    codegen(8, 4),
)
CODEGEN_4 = CODEGEN.but(
    "codegen/4 heads",
    config={**CODEGEN.config, "n_embd": 24, "n_head": 4, "rotary_dim": 4},
    main=codegen(4, 6),
)

# --- Cohere: parallel, both sublayers read one norm; the logits are scaled.

COHERE = Architecture("cohere", {**CONFIG, "logit_scale": 0.5}, stack(PARALLEL))
SLIDING = {**WIDE, "logit_scale": 0.5, "sliding_window": 3}
COHERES = [
    COHERE,
    COHERE.but(
        "cohere/qk_norm",
        config={**COHERE.config, "use_qk_norm": True},
        main=stack(replace(NORMED, middle="none")),
    ),
    Architecture(
        "cohere2",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        stack(PARALLEL),
    ),
    # mlp_out is the average of the experts' sum and the shared expert.
    Architecture(
        "cohere2_moe",
        {
            **SLIDING,
            "hidden_size": 20,
            "head_dim": 6,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 26,
            "sliding_window_pattern": 2,
        },
        dense_first(PARALLEL),
    ),
    Architecture(
        "cohere_compass_text",
        {
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {**ROTARY, "mrope_section": [1, 1, 1]},
                "full_attention": None,
            },
        },
        stack(PARALLEL),
    ),
]

# --- CTRL: attention gets its input three times (values, keys, queries), so `attn_norm` is no
# module's input; the embeddings are scaled in place after their module.

CTRL = Architecture(
    "ctrl",
    {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 24,
        "dff": 28,
        "n_layer": 3,
        "n_head": 4,
    },
    Stack(
        blocks="transformer.h",
        count=3,
        block=Block(
            q=Heads("multi_head_attention.Wq", 4, 6),
            k=Heads("multi_head_attention.Wk", 4, 6),
            v=Heads("multi_head_attention.Wv", 4, 6),
            output="multi_head_attention.dense",
            heads=4,
            width=6,
            attn_out="multi_head_attention",
            mlp_norm="ffn",
            mlp_hidden="ffn.2",
            mlp_out="ffn",
        ),
        embed=("transformer.w", "out"),
        final_norm=("lm_head", "in"),
    ),
)

# --- DBRX: attention and the norms around it are one module. Queries, keys and values are clipped
# after their linear map, so no module returns them.

DBRX = Architecture(
    "dbrx",
    {
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 0.8},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    Stack(
        blocks="transformer.blocks",
        count=3,
        block=Block(
            attn_norm="norm_attn_norm.attn",
            output="norm_attn_norm.attn.out_proj",
            heads=4,
            width=6,
            attn_out="norm_attn_norm.attn",
            mlp_norm="ffn",
            mlp_out="ffn",
            experts="ffn.experts",
            n_experts=EXPERTS,
        ),
        embed=("transformer.wte", "out"),
        final_norm=("lm_head", "in"),
    ),
)

# --- dots1: norms of queries and keys, experts after the first block.

DOTS1 = Architecture(
    "dots1",
    {
        **CONFIG,
        "moe_intermediate_size": 12,
        "n_shared_experts": 1,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "sliding_window": 3,
        "max_window_layers": 2,
    },
    dense_first(NORMED),
)

# --- Doge: the stream is multiplied by a learned vector before each sublayer's output is added. The
# values also produce a mask.

DOGE_BLOCK = replace(NORMED, middle="none", adds_up=False)
DOGE = Architecture("doge", {**CONFIG, "keep_window_size": 16}, stack(DOGE_BLOCK))

REFUSED = [
    Refused(
        "doge/moe",
        "its router splits the scores of all tokens, so the experts of a token depend on "
        "later tokens",
    ),
    Refused(
        "blt",
        "it pools bytes into patches: three stacks of blocks, for bytes, patches and bytes again, "
        "with cross-attention between them",
    ),
    Refused(
        "cpmant",
        "it inserts its own prompt vectors before the tokens, so positions in its blocks differ "
        "from token positions",
    ),
]

TABLE: list[Architecture | Refused] = [
    AFMOE,
    *PLAIN,
    ARIA,
    *MLA,
    DEEPSEEK_V4,
    V4_HASH,
    *HYBRID,
    BIOGPT,
    BLOOM,
    BLOOM_POST,
    CODEGEN,
    CODEGEN_4,
    *COHERES,
    CTRL,
    DBRX,
    DOTS1,
    DOGE,
    *REFUSED,
]
