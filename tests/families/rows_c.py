"""Mistral, Mamba, Llama 4 and later models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack
from .rows_llama import BLOCK, CONFIG, STACK

EXPERTS = 4
TWO_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
DENSE_FIRST = ["dense", "sparse", "sparse"]
SIZES: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
"""Of experts."""


def decoder(
    name: str,
    config: Mapping[str, Any],
    block: Block = BLOCK,
    other: Mapping[int, Block] | None = None,
) -> Architecture:
    """Three blocks (or the config's number) with the names of Llama."""
    config = {**CONFIG, **config}
    count = config["num_hidden_layers"]
    return Architecture(name, config, replace(STACK, count=count, block=block, other=other or {}))


def moe(block: Block, module: str = "mlp", count: int = EXPERTS) -> Block:
    """With a mixture of experts in the place of the MLP."""
    return replace(block, mlp_hidden=None, experts=f"{module}.experts", n_experts=count)


def mixer(path: str, module: str = "mlp", down: str | None = "down_proj") -> Block:
    """A block with a mixer of positions at `path`, followed by an MLP."""
    hidden = None if down is None else f"{module}.{down}"
    return Block(
        mixer_norm=path, mixer_out=path, mlp_norm=module, mlp_hidden=hidden, mlp_out=module
    )


def normed(form: Any, q: str = "self_attn.q_norm", k: str = "self_attn.k_norm") -> Block:
    """Query and key norms before rotary."""
    return replace(BLOCK, q=Heads(q, 4, 6, form=form), k=Heads(k, 2, 6, form=form))


def latent(nope: int, rope: int, value: int, query: str = "q_b_proj") -> Block:
    """Multi-head latent attention of four heads; the rotary part of keys is shared by all heads."""
    step = nope + value
    return replace(
        BLOCK,
        q=Heads(f"self_attn.{query}", 4, nope + rope),
        k=None,
        v=Heads("self_attn.kv_b_proj", 4, value, start=nope, step=step),
        width=value,
    )


LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 2,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
}

# Mamba: a block is a norm and a mixer.
MAMBA_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "state_size": 6,
    "pad_token_id": 0,
}
MAMBA_STACK = Stack(
    blocks="backbone.layers",
    count=3,
    block=Block(mixer_norm="mixer", mixer_out="mixer", middle="none"),
    embed=("backbone.embeddings", "out"),
    final_norm=("lm_head", "in"),
)

# Jamba: attention without positions, the MLP or the experts are `feed_forward`.
JAMBA_CONFIG = {
    **CONFIG,
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 3,
    "expert_layer_offset": 0,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "mamba_d_state": 6,
    "mamba_dt_rank": 5,
}
JAMBA_MAMBA, JAMBA_ATTENTION = (mixer(path, "feed_forward") for path in ("mamba", "self_attn"))

# Llama 4: experts get tokens already multiplied by the router's weights, one copy per expert.
# The query norm comes after the rotary embedding.
LLAMA4 = replace(
    BLOCK, mlp_norm="feed_forward", mlp_hidden="feed_forward.down_proj", mlp_out="feed_forward"
)
LLAMA4_CONFIG = {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 22,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_layers": [1, 2],
    "no_rope_layers": [1, 1, 0, 1],
    "attention_chunk_size": 3,
    "floor_scale": 2,
    "attn_scale": 0.5,
}

# MPT: the MLP adds the residual itself.
MPT = Block(
    attn_norm="attn",
    q=Heads("attn.Wqkv", 4, 5),
    k=Heads("attn.Wqkv", 4, 5, start=20),
    v=Heads("attn.Wqkv", 4, 5, start=40),
    output="attn.out_proj",
    heads=4,
    width=5,
    attn_out="attn",
    mlp_norm="ffn",
    mlp_hidden="ffn.down_proj",
    mlp_out="ffn.down_proj",
)
MPT_ROW = Architecture(
    "mpt",
    {
        "vocab_size": VOCABULARY,
        "n_layers": 3,
        "d_model": 20,
        "n_heads": 4,
        "max_seq_len": 64,
        "tie_word_embeddings": False,
    },
    Stack(
        blocks="transformer.blocks",
        count=3,
        block=MPT,
        embed=("transformer.wte", "out"),
        final_norm=("lm_head", "in"),
    ),
)

# LFM2: a short convolution or attention; the final norm is called `embedding_norm`.
LFM2_CONV, LFM2_ATTENTION = (mixer(path, "feed_forward", "w2") for path in ("conv", "self_attn"))
LFM2_CONFIG = {
    "num_hidden_layers": 4,
    "hidden_size": 24,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "tie_word_embeddings": False,
}
# LFM3: with norms after the sublayers (or the identity).
LFM3_CONV, LFM3_ATTENTION = (
    replace(block, mixer_out="post_operator_norm", mlp_out="post_ffn_norm")
    for block in (LFM2_CONV, LFM2_ATTENTION)
)
LFM3 = decoder(
    "lfm3",
    {
        **LFM2_CONFIG,
        "hidden_size": 20,
        "head_dim": 6,
        "layer_types": ["conv", "full_attention", "sliding_attention", "conv"],
        "sliding_window": 3,
    },
    LFM3_CONV,
    {1: LFM3_ATTENTION, 2: LFM3_ATTENTION},
)

# JetMoE: attention is a mixture too: a token's queries come from the experts it is sent to.
JETMOE = Block(
    attn_norm="self_attention",
    k=Heads("self_attention.kv_proj", 2, 6),
    v=Heads("self_attention.kv_proj", 2, 6, start=12),
    attn_out="self_attention",
    mlp_norm="mlp",
    mlp_out="mlp",
)

# ModernBERT: between the last block and the unembedding (`decoder`) are a norm and `lm_head`.
MODERNBERT = Block(
    attn_norm="attn",
    q=Heads("attn.q_proj", 4, 6),
    k=Heads("attn.k_proj", 4, 6),
    v=Heads("attn.v_proj", 4, 6),
    output="attn.Wo",
    heads=4,
    width=6,
    attn_out="attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.Wo",
    mlp_out="mlp",
)

# Nemotron-H: a block has one sublayer: Mamba, attention, an MLP, or experts.
NEMOTRON_MIXER = Block(mixer_norm="mixer", mixer_out="mixer", middle="none")
NEMOTRON_MLP = Block(middle="none", mlp_norm="mixer", mlp_hidden="mixer.down_proj", mlp_out="mixer")
NEMOTRON_MOE = moe(NEMOTRON_MLP, "mixer")
NEMOTRON_H = Architecture(
    "nemotron_h",
    {
        **{key: value for key, value in CONFIG.items() if key != "num_hidden_layers"},
        **SIZES,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 6,
        "chunk_size": 4,
        "n_routed_experts": EXPERTS,
        "moe_shared_expert_intermediate_size": 10,
        "routed_scaling_factor": 1.5,
    },
    Stack(
        blocks="model.layers",
        count=4,
        block=NEMOTRON_MIXER,
        other={1: NEMOTRON_MOE, 3: NEMOTRON_MLP},
        embed=("model.embeddings", "out"),
        final_norm=("lm_head", "in"),
    ),
)

# MiniCPM 3: multipliers at the embedding (inside the module), at the sublayers and before the
# unembedding.
MINICPM3_SCALE = 1.2 / 3**0.5
MINICPM3 = decoder(
    "minicpm3",
    {**LATENT, "scale_emb": 1.5, "scale_depth": 1.2, "dim_model_base": 12},
    replace(latent(4, 2, 5), attn_scale=MINICPM3_SCALE, mlp_scale=MINICPM3_SCALE),
)

# MiniMax: the stream itself is normed before each sublayer, and multiplied with `…_alpha_factor`
# where the sublayer's output (times `…_beta_factor`) is added.
MINIMAX_LINEAR = replace(
    moe(mixer("self_attn")),
    mixer_scale=0.9,
    middle="post_attention_layernorm",
    mlp_scale=1.3,
)
MINIMAX_FULL = replace(MINIMAX_LINEAR, mixer_scale=0.6)

# HyperCLOVA X: norms after the sublayers (or the identity), and multipliers.
HYPERCLOVAX = decoder(
    "hyperclovax",
    {
        "embedding_multiplier": 1.4,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
    },
    replace(BLOCK, attn_out="post_norm1", attn_scale=0.6, mlp_out="post_norm2", mlp_scale=0.6),
)

# Laguna: heads differ by layer and are gated; the sum over experts is multiplied outside.
LAGUNA = normed("heads")
LAGUNA_TWO, LAGUNA_SIX = (
    replace(LAGUNA, q=Heads("self_attn.q_norm", count, 6, form="heads"), heads=count)
    for count in (2, 6)
)
LAGUNA_ROW = decoder(
    "laguna",
    {
        **SIZES,
        "num_attention_heads_per_layer": [4, 2, 6],
        "layer_types": TWO_TYPES,
        "mlp_layer_types": DENSE_FIRST,
        "sliding_window": 3,
        "num_experts": EXPERTS,
        "shared_expert_intermediate_size": 10,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    moe(LAGUNA_SIX),
    {0: LAGUNA, 1: moe(LAGUNA_TWO)},
)

# LongCat-Flash: a block has two attention sublayers and two MLPs, and one mixture of experts
# that reads what the first MLP reads and is added at the end.
LONGCAT = Block(middle="none", adds_up=False)
LONGCAT_CONFIG = {
    **{key: value for key, value in {**CONFIG, **LATENT}.items() if key != "num_hidden_layers"},
    "num_layers": 2,
    "ffn_hidden_size": 28,
    "expert_ffn_hidden_size": 12,
    "moe_topk": 2,
    "n_routed_experts": 3,
    "zero_expert_num": 2,
    "routed_scaling_factor": 1.5,
}
del LONGCAT_CONFIG["intermediate_size"]

# MiMo-V2-Flash: values are narrower than keys, and full attention has half the key-value heads.
MIMO = replace(BLOCK, v=Heads("self_attn.v_proj", 2, 4), width=4)
MIMO_FULL = replace(MIMO, k=Heads("self_attn.k_proj", 1, 6), v=Heads("self_attn.v_proj", 1, 4))
MIMO_ROW = decoder(
    "mimo_v2_flash",
    {
        **SIZES,
        "num_key_value_heads": 1,
        "v_head_dim": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": DENSE_FIRST,
        "sliding_window": 3,
        "n_routed_experts": EXPERTS,
        "routed_scaling_factor": 1.5,
        "attention_value_scale": None,
    },
    moe(MIMO),
    {0: MIMO_FULL, 2: moe(MIMO_FULL)},
)

# Moshi's text decoder: linear maps are wrapped, and the embedding has a row more.
MOSHI = replace(BLOCK, output="self_attn.o_proj.linear", mlp_hidden="mlp.fc2")

# HY 4: four streams with hyper-connections; what a sublayer adds differs by stream.
HY4 = replace(latent(4, 2, 5), attn_out=None, middle="none", mlp_out=None, resid=False)

# Inkling: keys and values go through short convolutions, and so do the outputs of both sublayers.
INKLING = replace(
    normed("heads"), v=Heads("self_attn.v_sconv", 2, 6), attn_out="attn_sconv", mlp_out="mlp_sconv"
)
INKLING_SLIDING = replace(
    INKLING,
    q=Heads("self_attn.q_norm", 2, 4, form="heads"),
    k=Heads("self_attn.k_norm", 1, 4, form="heads"),
    v=Heads("self_attn.v_sconv", 1, 4),
    heads=2,
    width=4,
)
INKLING_CONFIG = {
    **SIZES,
    "unpadded_vocab_size": VOCABULARY,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 4,
    "sliding_window_size": 3,
    "d_rel": 3,
    "rel_extent": 5,
    "conv_kernel_size": 3,
    "log_scaling_n_floor": 2,
    "log_scaling_alpha": 0.5,
    "n_routed_experts": EXPERTS,
    "route_scale": 1.5,
}
# Inkling 2: every sublayer reads a mean over sums of earlier blocks, and the stream is reset at
# some blocks; full attention reads different means for queries, keys and values.
INKLING2 = moe(
    Block(
        attn_norm="self_attn",
        q=Heads("self_attn.q_l2_clip", 2, 4, form="heads"),
        k=Heads("self_attn.k_l2_clip", 1, 4, form="heads"),
        v=Heads("self_attn.v_norm", 1, 4, form="heads"),
        output="self_attn.o_proj",
        heads=2,
        width=4,
        attn_out="post_attention_convolution",
        middle="none",
        mlp_norm="mlp",
        mlp_out="post_mlp_convolution",
        resid=False,
    )
)
INKLING2_FULL = replace(
    INKLING2,
    attn_norm=None,
    q=Heads("self_attn.q_l2_clip", 4, 6, form="heads"),
    k=Heads("self_attn.k_l2_clip", 2, 6, form="heads"),
    v=Heads("self_attn.v_norm", 2, 6, form="heads"),
    heads=4,
    width=6,
)

# MiniMax-M3: the sum over experts is multiplied outside; some layers choose blocks of keys.
M3_DENSE = replace(
    BLOCK,
    q=Heads("self_attn.q_norm", 4, 8, form="heads"),
    k=Heads("self_attn.k_norm", 2, 8, form="heads"),
    v=Heads("self_attn.v_proj", 2, 8),
    width=8,
)
MINIMAX_M3 = decoder(
    "minimax_m3_vl_text",
    {
        **SIZES,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
        "rotary_dim": 4,
        "num_local_experts": EXPERTS,
        "dense_intermediate_size": 22,
        "shared_intermediate_size": 10,
        "routed_scaling_factor": 1.0,
        "mlp_layer_types": DENSE_FIRST,
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 8,  # all: zeros would tie, and padding would decide
    },
    moe(M3_DENSE),
    {0: M3_DENSE},
)


def without_experts(row: Architecture, name: str, **config: Any) -> Architecture:
    """A variant in which what an expert adds isn't what the module of experts computes."""
    blocks = {n: replace(b, experts=None, n_experts=0) for n, b in row.main.other.items()}
    block = replace(row.main.block, experts=None, n_experts=0)
    main = replace(row.main, block=block, other=blocks)
    return row.but(name, config={**row.config, **config}, main=main)


TABLE: list[Architecture | Refused] = [
    decoder("mistral", {"sliding_window": 3}),
    decoder("mixtral", {"num_local_experts": EXPERTS, "sliding_window": 3}, moe(BLOCK)),
    Architecture("mamba", MAMBA_CONFIG, MAMBA_STACK),
    Architecture(
        "mamba2",
        {**MAMBA_CONFIG, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
        MAMBA_STACK,
    ),
    Architecture(
        "jamba",
        JAMBA_CONFIG,
        replace(
            STACK,
            count=4,
            block=JAMBA_MAMBA,
            other={
                0: moe(JAMBA_MAMBA, "feed_forward"),
                1: JAMBA_ATTENTION,
                3: moe(JAMBA_ATTENTION, "feed_forward"),
            },
        ),
    ),
    decoder(
        "llama4_text",
        LLAMA4_CONFIG,
        LLAMA4,
        dict.fromkeys((1, 2), replace(LLAMA4, mlp_hidden=None)),
    ),
    MPT_ROW,
    # What leaves `Wqkv` is clipped before it is used.
    MPT_ROW.but(
        "mpt/clip",
        config={**MPT_ROW.config, "attn_config": {"clip_qkv": 0.5}},
        main=replace(MPT_ROW.main, block=replace(MPT, q=None, k=None, v=None)),
    ),
    decoder(
        "nemotron",
        {"head_dim": 8},
        replace(
            BLOCK,
            q=Heads("self_attn.q_proj", 4, 8),
            k=Heads("self_attn.k_proj", 2, 8),
            v=Heads("self_attn.v_proj", 2, 8),
            width=8,
        ),
    ),
    decoder("ministral", {"sliding_window": 3, "layer_types": TWO_TYPES}),
    decoder(
        "ministral3",
        {
            "sliding_window": 3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    # A norm over all queries at once.
    decoder("minimax_m2", {**SIZES, "num_local_experts": EXPERTS}, moe(normed("flat"))),
    # The output projection is square: heads times head width has to be the hidden size.
    decoder("helium", {"hidden_size": 24}),
    # The query norm comes after the rotary embedding.
    decoder("hunyuan_v1_dense", {}),
    decoder("hunyuan_v1_moe", {"num_experts": EXPERTS, "moe_topk": 2}, moe(BLOCK)),
    decoder("internlm3", {"qkv_bias": True, "bias": True}),
    Architecture(
        "lfm2",
        {**CONFIG, **LFM2_CONFIG, "block_auto_adjust_ff_dim": False},
        replace(STACK, count=4, block=LFM2_CONV, other=dict.fromkeys((1, 3), LFM2_ATTENTION)),
    ),
    Architecture(
        "lfm2_moe",
        {**CONFIG, **LFM2_CONFIG, **SIZES, "num_experts": EXPERTS, "num_dense_layers": 2},
        replace(
            STACK,
            count=4,
            block=LFM2_CONV,
            other={
                1: LFM2_ATTENTION,
                2: moe(LFM2_CONV, "feed_forward"),
                3: moe(LFM2_ATTENTION, "feed_forward"),
            },
        ),
    ),
    Architecture(
        "jetmoe",
        {
            **{key: value for key, value in CONFIG.items() if "heads" not in key},
            "num_key_value_heads": 2,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
        },
        replace(STACK, block=JETMOE),
    ),
    Architecture(
        "modernbert-decoder",
        {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 3,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 6,
            "layer_types": TWO_TYPES,
        },
        Stack(
            blocks="model.layers",
            count=3,
            block=MODERNBERT,
            embed=("model.embeddings.tok_embeddings", "out"),
            final_norm=("decoder", "in"),
        ),
    ),
    # The query norm comes after rotary; `model.norm` also runs before the first block.
    decoder("nanochat", {"final_logit_softcapping": 3.0}, replace(BLOCK, mlp_hidden="mlp.fc2")),
    NEMOTRON_H,
    # Experts of a latent width.
    without_experts(NEMOTRON_H, "nemotron_h/latent", moe_latent_size=12),
    MINICPM3,
    MINICPM3.but(
        "minicpm3/full",
        config={**MINICPM3.config, "q_lora_rank": None},
        main=replace(
            MINICPM3.main,
            block=replace(MINICPM3.main.block, q=latent(4, 2, 5, "q_proj").q),
        ),
    ),
    decoder(
        "minimax",
        {
            "num_local_experts": EXPERTS,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "block_size": 4,
            "full_attn_alpha_factor": 1.2,
            "full_attn_beta_factor": 0.6,
            "linear_attn_alpha_factor": 0.8,
            "linear_attn_beta_factor": 0.9,
            "mlp_alpha_factor": 0.7,
            "mlp_beta_factor": 1.3,
        },
        MINIMAX_LINEAR,
        {1: MINIMAX_FULL},
    ),
    decoder(
        "mellum",
        {
            **SIZES,
            "num_experts": EXPERTS,
            "sliding_window": 3,
            "layer_types": TWO_TYPES,
            "mlp_layer_types": DENSE_FIRST,
        },
        moe(normed("heads")),
        {0: normed("heads")},
    ),
    decoder(
        "hy_v3",
        {**SIZES, "num_experts": EXPERTS, "router_scaling_factor": 1.5},
        moe(normed("heads_first")),
        {0: normed("heads_first")},
    ),
    HYPERCLOVAX,
    HYPERCLOVAX.but("hyperclovax/pre", config={**HYPERCLOVAX.config, "use_post_norm": False}),
    decoder("jais2", {}),
    decoder(
        "kimi_linear",
        {
            **LATENT,
            **SIZES,
            "q_lora_rank": None,
            "linear_head_dim": 6,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": DENSE_FIRST,
            "num_local_experts": EXPERTS,
            "routed_scaling_factor": 1.5,
        },
        moe(mixer("self_attn")),
        {0: mixer("self_attn")},
    ),
    LAGUNA_ROW,
    # A gate for every feature of a head, not one per head.
    LAGUNA_ROW.but("laguna/features", config={**LAGUNA_ROW.config, "gating": "per-element"}),
    without_experts(LAGUNA_ROW, "laguna/scaled", moe_routed_scaling_factor=1.5),
    Architecture("longcat_flash", LONGCAT_CONFIG, replace(STACK, count=2, block=LONGCAT)),
    MIMO_ROW,
    # Values are multiplied after their projection.
    MIMO_ROW.but(
        "mimo_v2_flash/scaled",
        config={**MIMO_ROW.config, "attention_value_scale": 0.7},
        main=replace(
            MIMO_ROW.main,
            block=replace(MIMO_ROW.main.block, v=None),
            other={n: replace(block, v=None) for n, block in MIMO_ROW.main.other.items()},
        ),
    ),
    decoder("moshi", {"ffn_dim": 28, "num_codebooks": 2, "sliding_window": 64}, MOSHI),
    Refused("hrm_text", "its two stacks of blocks run several times in one forward pass"),
    decoder(
        "hy_v4",
        {
            **LATENT,
            **SIZES,
            "n_routed_experts": EXPERTS,
            "routed_scaling_factor": 1.5,
            "index_topk": 16,  # all: zeros would tie, and padding would decide
            "index_head_dim": 6,
            "index_n_heads": 2,
            "indexer_types": ["full", "full", "shared"],
            "hc_mult": 3,
        },
        moe(HY4),
        {0: HY4},
    ),
    decoder(
        "inkling_text",
        {
            **INKLING_CONFIG,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
            "mlp_layer_types": ["dense", "sparse", "dense"],
            "logits_mup_width_multiplier": 1.5,
        },
        INKLING,
        {0: INKLING_SLIDING, 1: moe(INKLING)},
    ),
    decoder(
        "inkling2_text",
        {
            **INKLING_CONFIG,
            "num_hidden_layers": 4,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid"],
            "n_layers_per_attn_res_block": 2,
            "qk_l2_clip_threshold": 2.0,
            "rel_l2_clip_threshold": 1.5,
            "final_logit_softcapping": 3.0,
        },
        INKLING2,
        dict.fromkeys((2, 3), INKLING2_FULL),
    ),
    decoder("iquestcoder", {}),
    decoder(
        "kolibri1",
        {
            **SIZES,
            "num_experts": EXPERTS,
            "layer_types": TWO_TYPES,
            "sliding_window": 3,
            "shared_expert_intermediate_size": 10,
        },
        replace(
            moe(normed("heads_first")),
            attn_out="post_self_attn_layernorm",
            mlp_out="post_mlp_layernorm",
        ),
    ),
    LFM3,
    LFM3.but(
        "lfm3/plain",
        config={**LFM3.config, "use_sandwich_norm": False, "use_attention_gate": False},
    ),
    MINIMAX_M3,
    without_experts(MINIMAX_M3, "minimax_m3_vl_text/scaled", routed_scaling_factor=1.5),
]
