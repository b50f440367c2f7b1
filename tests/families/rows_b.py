"""GPT, Falcon, Gemma, GLM, Granite, ERNIE, EXAONE and related models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack

LAYERS = 3
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "pad_token_id": 0}

# Llama's names, which most families below have.

CONFIG: dict[str, Any] = {
    **COMMON,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
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
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def stack(block: Block, other: Mapping[int, Block] | None = None, **changes: Any) -> Stack:
    plain = Stack(
        blocks="model.layers",
        count=LAYERS,
        block=block,
        other=other or {},
        embed=("model.embed_tokens", "out"),
        final_norm=("lm_head", "in"),
    )
    return replace(plain, **changes)


def normed(block: Block, form: Any) -> Block:
    """With norms after queries and keys."""
    assert block.q is not None
    assert block.k is not None
    return replace(
        block,
        q=replace(block.q, path="self_attn.q_norm", form=form),
        k=replace(block.k, path="self_attn.k_norm", form=form),
    )


def wide(block: Block, width: int) -> Block:
    """With heads of another width."""
    assert block.q is not None
    assert block.k is not None
    assert block.v is not None
    return replace(
        block,
        q=replace(block.q, width=width),
        k=replace(block.k, width=width),
        v=replace(block.v, width=width),
        width=width,
    )


def experts(block: Block, count: int = 4, mlp: str = "mlp") -> Block:
    """With a mixture of experts for the MLP."""
    return replace(
        block,
        mlp_norm=mlp,
        mlp_hidden=None,
        mlp_out=mlp,
        experts=f"{mlp}.experts",
        n_experts=count,
    )


# Post-norms: the added output comes from a norm after the sublayer.
GEMMA_NORMS: dict[str, Any] = {
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}


# GPT-2 and related models: one fused map, or three parallel ones

GPT2_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 20,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": 28,
    "pad_token_id": 0,
}
GPT2_BLOCK = Block(
    attn_norm="attn",
    q=Heads("attn.c_attn", 4, 5),
    k=Heads("attn.c_attn", 4, 5, start=20),
    v=Heads("attn.c_attn", 4, 5, start=40),
    output="attn.c_proj",
    heads=4,
    width=5,
    attn_out="attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.c_proj",
    mlp_out="mlp",
)
GPT2_STACK = Stack(
    blocks="transformer.h",
    count=LAYERS,
    block=GPT2_BLOCK,
    embed=("transformer.wte", "out"),
    final_norm=("lm_head", "in"),
)
GPT2 = Architecture("gpt2", GPT2_CONFIG, GPT2_STACK)

# One key-value head by default; otherwise each head's query, key and value are contiguous.
BIGCODE = GPT2.but(
    "gpt_bigcode",
    main=replace(
        GPT2_STACK,
        block=replace(
            GPT2_BLOCK,
            k=Heads("attn.c_attn", 1, 5, start=20),
            v=Heads("attn.c_attn", 1, 5, start=25),
        ),
    ),
)
BIGCODE_HEADS = BIGCODE.but(
    "gpt_bigcode/heads",
    config={**GPT2_CONFIG, "multi_query": False},
    main=replace(
        GPT2_STACK,
        block=replace(
            GPT2_BLOCK,
            q=Heads("attn.c_attn", 4, 5, step=15),
            k=Heads("attn.c_attn", 4, 5, start=5, step=15),
            v=Heads("attn.c_attn", 4, 5, start=10, step=15),
        ),
    ),
)

GPT_NEO = Architecture(
    "gpt_neo",
    {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["local"], 1]],
        "window_size": 3,
        "pad_token_id": 0,
    },
    replace(
        GPT2_STACK,
        block=replace(
            GPT2_BLOCK,
            q=Heads("attn.attention.q_proj", 4, 5),
            k=Heads("attn.attention.k_proj", 4, 5),
            v=Heads("attn.attention.v_proj", 4, 5),
            output="attn.attention.out_proj",
        ),
    ),
)

# Attention and MLP read the same norm.
GPTJ = Architecture(
    "gptj",
    {**GPT2_CONFIG, "n_embd": 24, "rotary_dim": 4},
    replace(
        GPT2_STACK,
        block=replace(
            GPT2_BLOCK,
            q=Heads("attn.q_proj", 4, 6),
            k=Heads("attn.k_proj", 4, 6),
            v=Heads("attn.v_proj", 4, 6),
            output="attn.out_proj",
            width=6,
            middle="none",
            mlp_hidden="mlp.fc_out",
        ),
    ),
)

# Query, key and value of each head are contiguous.
NEOX_CONFIG: dict[str, Any] = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rotary_pct": 0.34,
}
NEOX_BLOCK = Block(
    attn_norm="attention",
    q=Heads("attention.query_key_value", 4, 6, step=18),
    k=Heads("attention.query_key_value", 4, 6, start=6, step=18),
    v=Heads("attention.query_key_value", 4, 6, start=12, step=18),
    output="attention.dense",
    heads=4,
    width=6,
    attn_out="attention",
    mlp_norm="mlp",
    mlp_hidden="mlp.dense_4h_to_h",
    mlp_out="mlp",
)
NEOX_STACK = Stack(
    blocks="gpt_neox.layers",
    count=LAYERS,
    block=replace(NEOX_BLOCK, middle="none"),
    embed=("gpt_neox.embed_in", "out"),
    final_norm=("lm_head", "in"),
)
NEOX = Architecture("gpt_neox", NEOX_CONFIG, NEOX_STACK)
NEOX_SEQUENTIAL = NEOX.but(
    "gpt_neox/sequential",
    config={**NEOX_CONFIG, "use_parallel_residual": False},
    main=replace(NEOX_STACK, block=NEOX_BLOCK),
)
# In the last block, attention also returns a bias, which the block adds, so no module returns the
# added vector.
NEOX_JAPANESE = NEOX.but(
    "gpt_neox_japanese",
    config={**NEOX_CONFIG, "intermediate_multiple_size": 2},
    main=replace(
        NEOX_STACK,
        blocks="gpt_neox_japanese.layers",
        block=NEOX_BLOCK,
        other={2: replace(NEOX_BLOCK, attn_out=None, middle="none", adds_up=False)},
        embed=("gpt_neox_japanese.embed_in", "out"),
        final_norm=("embed_out", "in"),
    ),
)


# Falcon: parallel by default; how queries, keys and values are fused depends on the config

FALCON_CONFIG: dict[str, Any] = {
    **COMMON,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def falcon(q: Heads, k: Heads, v: Heads, middle: str = "none") -> Stack:
    path = "self_attention.query_key_value"
    block = Block(
        attn_norm="self_attention",
        q=replace(q, path=path),
        k=replace(k, path=path),
        v=replace(v, path=path),
        output="self_attention.dense",
        heads=4,
        width=6,
        attn_out="self_attention",
        middle=middle,
        mlp_norm="mlp",
        mlp_hidden="mlp.dense_4h_to_h",
        mlp_out="mlp",
    )
    return replace(GPT2_STACK, block=block, embed=("transformer.word_embeddings", "out"))


ONE_KEY = Heads("", 4, 6), Heads("", 1, 6, start=24), Heads("", 1, 6, start=30)
EACH_HEAD = (
    Heads("", 4, 6, step=18),
    Heads("", 4, 6, start=6, step=18),
    Heads("", 4, 6, start=12, step=18),
)
GROUPS = (
    Heads("", 4, 6, step=24, group=2),
    Heads("", 2, 6, start=12, step=24),
    Heads("", 2, 6, start=18, step=24),
)
NEW_FALCON = {**FALCON_CONFIG, "new_decoder_architecture": True, "num_kv_heads": 2}

FALCON = Architecture("falcon", FALCON_CONFIG, falcon(*ONE_KEY))
FALCONS = [
    FALCON,
    FALCON.but(
        "falcon/alibi",
        config={**FALCON_CONFIG, "multi_query": False, "alibi": True, "bias": True},
        main=falcon(*EACH_HEAD),
    ),
    FALCON.but(
        "falcon/sequential",
        config={**FALCON_CONFIG, "multi_query": False, "parallel_attn": False, "bias": True},
        main=falcon(*EACH_HEAD, middle="sum"),
    ),
    FALCON.but("falcon/new", config=NEW_FALCON, main=falcon(*GROUPS)),
    FALCON.but(
        "falcon/new_one_norm",
        config={**NEW_FALCON, "num_ln_in_parallel_attn": 1},
        main=falcon(*GROUPS),
    ),
]

FALCON_MAMBA = Architecture(
    "falcon_mamba",
    {**COMMON, "hidden_size": 20, "state_size": 4, "time_step_rank": 3},
    stack(
        Block(mixer_norm="mixer", mixer_out="mixer", middle="none"),
        blocks="backbone.layers",
        embed=("backbone.embeddings", "out"),
    ),
)

# Attention and a state-space layer are parallel. Both read the norm, and their sum is added, each
# with a separate factor, so no module has the mixer's sites.
FALCON_H1 = Architecture(
    "falcon_h1",
    {
        **CONFIG,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_n_groups": 2,
        "mamba_d_state": 4,
        "mamba_chunk_size": 4,
        "mamba_rms_norm": True,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "mlp_multipliers": [0.8, 0.6],
        "key_multiplier": 0.7,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.9, 0.8, 1.1, 0.7, 1.2],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.6,
    },
    stack(
        Block(
            middle="none",
            mlp_norm="feed_forward",
            mlp_hidden="feed_forward.down_proj",
            mlp_out="feed_forward",
            adds_up=False,
        )
    ),
)


# Gemma

GEMMA = Architecture("gemma", CONFIG, stack(BLOCK))

GEMMA2_CONFIG: dict[str, Any] = {
    **CONFIG,
    "layer_types": WINDOWS,
    "sliding_window": 3,
    "query_pre_attn_scalar": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
GEMMA2_BLOCK = replace(BLOCK, **GEMMA_NORMS)
GEMMA2 = Architecture("gemma2", GEMMA2_CONFIG, stack(GEMMA2_BLOCK))
GEMMA3_BLOCK = normed(GEMMA2_BLOCK, "heads_first")
GEMMA3 = GEMMA2.but("gemma3_text", main=stack(GEMMA3_BLOCK))

# Four streams, and the last blocks read keys and values of earlier ones. Values have a norm too.
SHARED_WINDOWS = ["sliding_attention", "full_attention"] * 2
GEMMA3N_BLOCK = replace(
    normed(GEMMA2_BLOCK, "heads"), v=Heads("self_attn.v_norm", 2, 6, form="heads"), resid=False
)
GEMMA3N_REUSE = replace(GEMMA3N_BLOCK, k=None, v=None)
GEMMA3N = Architecture(
    "gemma3n_text",
    {
        **CONFIG,
        "num_hidden_layers": 4,
        "layer_types": SHARED_WINDOWS,
        "sliding_window": 3,
        "num_kv_shared_layers": 2,
        "final_logit_softcapping": 4.0,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 6,
        "altup_num_inputs": 3,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    stack(GEMMA3N_BLOCK, {2: GEMMA3N_REUSE, 3: GEMMA3N_REUSE}, count=4),
)

# Blocks with full attention have heads of another width. They take keys for values with
# `attention_k_eq_v`: before the norms, so `k` and `v` differ still.
GEMMA4_CONFIG: dict[str, Any] = {
    **CONFIG,
    "layer_types": SHARED_WINDOWS[1:],
    "sliding_window": 3,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
}
GEMMA4_BLOCK = replace(GEMMA3N_BLOCK, resid=True)


def full_gemma4(block: Block, keys: int = 2) -> Block:
    return replace(
        block,
        q=Heads("self_attn.q_norm", 4, 8, form="heads"),
        k=Heads("self_attn.k_norm", keys, 8, form="heads"),
        v=Heads("self_attn.v_norm", keys, 8, form="heads"),
        width=8,
    )


GEMMA4_FULL = full_gemma4(GEMMA4_BLOCK)
GEMMA4 = Architecture(
    "gemma4_text", GEMMA4_CONFIG, stack(GEMMA4_BLOCK, {0: GEMMA4_FULL, 2: GEMMA4_FULL})
)
# A parallel dense MLP and experts, each with separate norms before and after it, and a norm after
# the sum.
GEMMA4_EXPERTS_BLOCK = replace(
    GEMMA4_BLOCK, mlp_norm=None, mlp_hidden=None, experts="experts", n_experts=4
)
GEMMA4_EXPERTS_FULL = full_gemma4(GEMMA4_EXPERTS_BLOCK, keys=1)
GEMMA4_EXPERTS = GEMMA4.but(
    "gemma4_text/experts",
    config={
        **GEMMA4_CONFIG,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    main=stack(GEMMA4_EXPERTS_BLOCK, {0: GEMMA4_EXPERTS_FULL, 2: GEMMA4_EXPERTS_FULL}),
)
# A third sublayer adds an embedding of the token for this layer. The last blocks read keys and
# values of earlier ones.
GEMMA4_LAYER_BLOCK = replace(GEMMA4_BLOCK, adds_up=False)
GEMMA4_LAYER_FULL = replace(GEMMA4_FULL, adds_up=False)
GEMMA4_PER_LAYER = GEMMA4.but(
    "gemma4_text/per_layer",
    config={
        **GEMMA4_CONFIG,
        "num_hidden_layers": 4,
        "layer_types": SHARED_WINDOWS,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 6,
    },
    main=stack(
        GEMMA4_LAYER_BLOCK,
        {
            1: GEMMA4_LAYER_FULL,
            2: replace(GEMMA4_LAYER_BLOCK, k=None, v=None),
            3: replace(GEMMA4_LAYER_FULL, k=None, v=None),
        },
        count=4,
    ),
)


# GPT-OSS, GLM

GPT_OSS = Architecture(
    "gpt_oss",
    {
        **CONFIG,
        "layer_types": WINDOWS,
        "sliding_window": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    stack(experts(BLOCK)),
)

# Rotary turns half of each head: an even number of features.
GLM = Architecture("glm", {**CONFIG, "head_dim": 8}, stack(wide(BLOCK, 8)))
GLM4 = GLM.but(
    "glm4",
    main=stack(
        replace(wide(BLOCK, 8), attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")
    ),
)

GLM_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
GLM4_MOE_CONFIG = {**CONFIG, **GLM_EXPERTS, "head_dim": 8, "use_qk_norm": True}
GLM4_MOE_BLOCK = normed(wide(BLOCK, 8), "heads")
GLM4_MOE = Architecture(
    "glm4_moe", GLM4_MOE_CONFIG, stack(experts(GLM4_MOE_BLOCK), {0: GLM4_MOE_BLOCK})
)
GLM4_MOE_PLAIN = GLM4_MOE.but(
    "glm4_moe/plain",
    config={**GLM4_MOE_CONFIG, "use_qk_norm": False},
    main=stack(experts(wide(BLOCK, 8)), {0: wide(BLOCK, 8)}),
)

# Keys and values come out of one map from a latent, keys' rotary part is the same for all heads.
LATENT_CONFIG: dict[str, Any] = {
    **{name: value for name, value in CONFIG.items() if name != "head_dim"},
    **GLM_EXPERTS,
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
LATENT_BLOCK = replace(
    BLOCK,
    q=Heads("self_attn.q_b_proj", 4, 10),
    k=None,
    v=Heads("self_attn.kv_b_proj", 4, 5, start=6, step=11),
    width=5,
)
GLM4_LITE = Architecture(
    "glm4_moe_lite", LATENT_CONFIG, stack(experts(LATENT_BLOCK), {0: LATENT_BLOCK})
)
FULL_RANK = replace(LATENT_BLOCK, q=Heads("self_attn.q_proj", 4, 10))
GLM4_LITE_FULL_RANK = GLM4_LITE.but(
    "glm4_moe_lite/full_rank",
    config={**LATENT_CONFIG, "q_lora_rank": None},
    main=stack(experts(FULL_RANK), {0: FULL_RANK}),
)
# Attention sees the positions that an indexer picks (all here, as zeros would tie, and padding
# would decide); the last block takes the picks of the one before.
GLM_DSA = GLM4_LITE.but(
    "glm_moe_dsa",
    config={
        **LATENT_CONFIG,
        "index_topk": 16,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "indexer_types": ["full", "full", "shared"],
    },
)


# Granite: sublayers are scaled before they are added

GRANITE_CONFIG: dict[str, Any] = {
    **CONFIG,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,  # exact, so that a stream can be set to zero
    "attention_multiplier": 0.3,
}
GRANITE_BLOCK = replace(BLOCK, attn_scale=0.5, mlp_scale=0.5)
GRANITE = Architecture("granite", GRANITE_CONFIG, stack(GRANITE_BLOCK))

GRANITE_MOE_CONFIG = {**GRANITE_CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE_MOE_BLOCK = experts(GRANITE_BLOCK, mlp="block_sparse_moe")
GRANITE_MOE = Architecture("granitemoe", GRANITE_MOE_CONFIG, stack(GRANITE_MOE_BLOCK))
# Experts and a shared MLP read the same norm, and their sum is added: no module has it.
SHARED: dict[str, Any] = {"shared_intermediate_size": 12}
TWO_MLPS: dict[str, Any] = {"mlp_norm": None, "mlp_out": None, "adds_up": False}
GRANITE_SHARED = GRANITE_MOE.but(
    "granitemoeshared",
    config={**GRANITE_MOE_CONFIG, **SHARED},
    main=stack(replace(GRANITE_MOE_BLOCK, **TWO_MLPS)),
)
GRANITE_UNSHARED = GRANITE_MOE.but("granitemoeshared/unshared")

# Each block has a state-space layer or attention. Without experts, only the shared MLP remains.
GRANITE_HYBRID_CONFIG = {
    **GRANITE_MOE_CONFIG,
    **SHARED,
    "position_embedding_type": "rope",
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}
MAMBA_BLOCK = replace(
    GRANITE_MOE_BLOCK,
    **dict.fromkeys(("attn_norm", "q", "k", "v", "output", "attn_out")),
    mixer_norm="mamba",
    mixer_out="mamba",
    mixer_scale=0.5,
)
ATTENTION: dict[str, Any] = {"mixer_norm": "self_attn", "mixer_out": "self_attn"}
HYBRID_BLOCK = replace(MAMBA_BLOCK, **TWO_MLPS)
DENSE_BLOCK = replace(
    MAMBA_BLOCK,
    experts=None,
    mlp_norm="shared_mlp",
    mlp_hidden="shared_mlp.output_linear",
    mlp_out="shared_mlp",
)
GRANITE_HYBRID = Architecture(
    "granitemoehybrid",
    GRANITE_HYBRID_CONFIG,
    stack(HYBRID_BLOCK, {1: replace(HYBRID_BLOCK, **ATTENTION)}),
)
GRANITE_HYBRID_DENSE = GRANITE_HYBRID.but(
    "granitemoehybrid/dense",
    config={**GRANITE_HYBRID_CONFIG, "num_local_experts": 0},
    main=stack(DENSE_BLOCK, {1: replace(DENSE_BLOCK, **ATTENTION)}),
)

SWA: dict[str, Any] = {
    "layer_types": WINDOWS,
    "sliding_window": 3,
    "layer_rope_theta": [0, 1e4, 1e3],
}
GRANITE_SWA = GRANITE.but("granite_swa", config={**GRANITE_CONFIG, **SWA})
GRANITE_MOE_SWA = GRANITE_MOE.but("granitemoe_swa", config={**GRANITE_MOE_CONFIG, **SWA})
GRANITE_MOE_SWA_SHARED = GRANITE_SHARED.but(
    "granitemoe_swa/shared", config={**GRANITE_MOE_CONFIG, **SHARED, **SWA}
)


# ERNIE, EXAONE, FlexOlmo, Flint

ERNIE = Architecture("ernie4_5", {**CONFIG, "use_bias": True}, stack(BLOCK))
ERNIE_MOE = Architecture(
    "ernie4_5_moe",
    {
        **CONFIG,
        "use_bias": True,
        "moe_intermediate_size": 12,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
    },
    stack(experts(BLOCK), {0: BLOCK}),
)

# Post-norms and no norm before: sublayers read the stream as it is.
EXAONE4 = Architecture(
    "exaone4",
    {**CONFIG, "sliding_window": 3, "sliding_window_pattern": 2},
    stack(GEMMA3_BLOCK),
)
EXAONE_MOE_BLOCK = normed(BLOCK, "heads_first")
EXAONE_MOE = Architecture(
    "exaone_moe",
    {
        **CONFIG,
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "moe_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "routed_scaling_factor": 1.5,
    },
    stack(experts(EXAONE_MOE_BLOCK), {0: EXAONE_MOE_BLOCK}),
)

# Norms over the queries of all heads at once.
FLEX_OLMO = Architecture(
    "flex_olmo",
    {**CONFIG, "num_experts": 4, "num_experts_per_tok": 2},
    stack(replace(experts(normed(BLOCK, "flat")), **GEMMA_NORMS)),
)

FLINT_BLOCK = normed(BLOCK, "heads")
FLINT = Architecture(
    "flint",
    {
        **CONFIG,
        "layer_types": WINDOWS,
        "sliding_window": 3,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    stack(experts(FLINT_BLOCK), {0: FLINT_BLOCK}),
)

# Persimmon with patches of images among the tokens.
QKV = "self_attn.query_key_value"
FUYU_CONFIG: dict[str, Any] = {
    "patch_size": 4,
    "image_token_id": VOCABULARY - 1,
    "text_config": {
        "model_type": "persimmon",
        **COMMON,
        "hidden_size": 32,
        "intermediate_size": 28,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
FUYU = Architecture(
    "fuyu",
    FUYU_CONFIG,
    stack(
        replace(
            BLOCK,
            q=Heads("self_attn.q_layernorm", 4, 8, form="heads"),
            k=Heads("self_attn.k_layernorm", 4, 8, form="heads"),
            v=Heads(QKV, 4, 8, start=16, step=24),
            output="self_attn.dense",
            width=8,
            mlp_hidden="mlp.dense_4h_to_h",
        ),
        blocks="model.language_model.layers",
        embed=("model.language_model.embed_tokens", "out"),
    ),
)


TABLE = [
    GPT2,
    GPT_NEO,
    GPTJ,
    NEOX,
    NEOX_SEQUENTIAL,
    *FALCONS,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    GEMMA4_EXPERTS,
    GEMMA4_PER_LAYER,
    GPT_OSS,
    GLM,
    GLM4,
    GRANITE,
    GRANITE_MOE,
    GRANITE_HYBRID,
    GRANITE_HYBRID_DENSE,
    GRANITE_SHARED,
    GRANITE_UNSHARED,
    ERNIE,
    ERNIE_MOE,
    EXAONE4,
    EXAONE_MOE,
    FALCON_H1,
    FALCON_MAMBA,
    FLEX_OLMO,
    FLINT,
    FUYU,
    Refused(
        "gemma4_assistant",
        "it is called with another model's keys and values, not with a prompt",
    ),
    GLM4_MOE,
    GLM4_MOE_PLAIN,
    GLM4_LITE,
    GLM4_LITE_FULL_RANK,
    GLM_DSA,
    GPT2.but("gpt-sw3"),
    BIGCODE,
    BIGCODE_HEADS,
    NEOX_JAPANESE,
    GRANITE_SWA,
    GRANITE_MOE_SWA,
    GRANITE_MOE_SWA_SHARED,
]
