"""OPT, Qwen, OLMo, Phi and others, hybrids with recurrent blocks, BERT and BART as decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack
from .rows_llama import BLOCK, CONFIG, STACK


def three(block: Block, path: str, groups: int, width: int) -> Block:
    """The block with three linear maps before attention; `{}` in the path is q, k or v."""
    return replace(
        block,
        q=Heads(path.format("q"), 4, width),
        k=Heads(path.format("k"), groups, width),
        v=Heads(path.format("v"), groups, width),
        heads=4,
        width=width,
    )


def normed(block: Block, q: str, k: str, width: int = 6) -> Block:
    """The block with query and key norms over the heads [1, T, heads, width] of the maps."""
    assert block.q is not None
    assert block.k is not None
    return replace(
        block,
        q=Heads(q, block.q.heads, width, form="heads"),
        k=Heads(k, block.k.heads, width, form="heads"),
    )


def config(**settings: Any) -> dict[str, Any]:
    """Llama's tiny config, changed; None takes a setting out."""
    return {k: v for k, v in {**CONFIG, **settings}.items() if v is not None}


def stack(block: Block, other: Mapping[int, Block] | None = None, **changes: Any) -> Stack:
    """Llama's stack with other blocks."""
    return replace(STACK, block=block, other=other or {}, **changes)


# Blocks built as Llama's, of which attention and MLP differ ------------------------------------

BIASED = config(attention_bias=True)
EXPERTS = replace(BLOCK, mlp_hidden=None, experts="mlp.experts", n_experts=4)
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 18,
}
WINDOWS: dict[str, Any] = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}

QK = normed(BLOCK, "self_attn.q_norm", "self_attn.k_norm")
# Norms over all heads together: [1, T, features].
WHOLE_QK = replace(BLOCK, q=Heads("self_attn.q_norm", 4, 6), k=Heads("self_attn.k_norm", 2, 6))
# OLMo 2: no norm before a sublayer, one after it.
POST = replace(WHOLE_QK, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
# An MLP of two linear maps.
TWO_MAPS = replace(BLOCK, mlp_hidden="mlp.c_proj")

LLAMA_KIN: list[Architecture | Refused] = [
    Architecture("qwen2", config(**WINDOWS), STACK),
    Architecture("qwen3", config(**WINDOWS, attention_bias=True), stack(QK)),
    # The first block has a dense MLP.
    Architecture(
        "qwen2_moe", config(**MOE, **WINDOWS, mlp_only_layers=[0]), stack(EXPERTS, {0: BLOCK})
    ),
    Architecture(
        "qwen3_moe",
        config(**MOE, mlp_only_layers=[1], norm_topk_prob=True),
        stack(normed(EXPERTS, "self_attn.q_norm", "self_attn.k_norm"), {1: QK}),
    ),
    olmo := Architecture("olmo", BIASED, STACK),
    # Clipped in place after the maps, so that no module returns them.
    olmo.but(
        "olmo/clip", config=config(clip_qkv=1.5), main=stack(replace(BLOCK, q=None, k=None, v=None))
    ),
    Architecture("olmo2", BIASED, stack(POST)),
    Architecture(
        "olmo3",
        config(
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        stack(POST),
    ),
    # Widths of the norms come from hidden_size, so heads are hidden_size / heads wide.
    olmoe := Architecture(
        "olmoe",
        config(hidden_size=24, head_dim=6, **MOE),
        stack(replace(WHOLE_QK, mlp_hidden=None, experts="mlp.experts", n_experts=4)),
    ),
    olmoe.but(
        "olmoe/clip",
        config=config(hidden_size=24, head_dim=6, clip_qkv=1.5, **MOE),
        main=stack(replace(EXPERTS, q=None, k=None, v=None)),
    ),
]

# Phi: attention and MLP read one norm side by side.
PHI = replace(
    three(BLOCK, "self_attn.{}_proj", 2, 8),
    output="self_attn.dense",
    middle="none",
    mlp_hidden="mlp.fc2",
)
PHI_CONFIG = config(hidden_size=32, head_dim=8)
# Phi 3: queries, keys and values of one map, in this order.
FUSED = replace(
    BLOCK,
    q=Heads("self_attn.qkv_proj", 4, 6),
    k=Heads("self_attn.qkv_proj", 2, 6, start=24),
    v=Heads("self_attn.qkv_proj", 2, 6, start=36),
)

STABLELM_CONFIG = config(hidden_size=32, head_dim=8)
STABLELM = three(BLOCK, "self_attn.{}_proj", 2, 8)
# Per head: query, key, value.
PERSIMMON_V = Heads("self_attn.query_key_value", 4, 8, start=16, step=24)
PERSIMMON = replace(
    BLOCK,
    q=Heads("self_attn.q_layernorm", 4, 8, form="heads"),
    k=Heads("self_attn.k_layernorm", 4, 8, form="heads"),
    v=PERSIMMON_V,
    output="self_attn.dense",
    width=8,
    mlp_hidden="mlp.dense_4h_to_h",
)
PERSIMMON_CONFIG = config(
    hidden_size=32, num_key_value_heads=None, head_dim=None, hidden_act="gelu"
)

PHI_KIN: list[Architecture | Refused] = [
    phi := Architecture("phi", PHI_CONFIG, stack(PHI)),
    phi.but(
        "phi/qk_layernorm",
        config={**PHI_CONFIG, "qk_layernorm": True},
        main=stack(
            replace(
                PHI,
                q=Heads("self_attn.q_layernorm", 4, 8, form="heads_first"),
                k=Heads("self_attn.k_layernorm", 2, 8, form="heads_first"),
            )
        ),
    ),
    Architecture("phi3", config(sliding_window=3), stack(FUSED)),
    Architecture(
        "phimoe",
        config(
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=3,
            attention_bias=True,
            lm_head_bias=True,
        ),
        stack(EXPERTS),
    ),
    stablelm := Architecture(
        "stablelm", {**STABLELM_CONFIG, "use_qkv_bias": True}, stack(STABLELM)
    ),
    # The MLP reads the norm that attention reads.
    stablelm.but(
        "stablelm/parallel",
        config={**STABLELM_CONFIG, "use_parallel_residual": True},
        main=stack(replace(STABLELM, middle="none")),
    ),
    # A separate norm for each head.
    stablelm.but(
        "stablelm/qk_layernorm",
        config={**STABLELM_CONFIG, "qk_layernorm": True},
        main=stack(
            replace(
                STABLELM,
                q=Heads("self_attn.q_layernorm", 4, 8, form="heads_first"),
                k=Heads("self_attn.k_layernorm", 2, 8, form="heads_first"),
            )
        ),
    ),
    Architecture("starcoder2", config(sliding_window=3), stack(TWO_MAPS)),
    Architecture(
        "smollm3",
        config(no_rope_layer_interval=2, sliding_window=3, use_sliding_window=True),
        STACK,
    ),
    Architecture("seed_oss", config(attention_bias=True, attention_out_bias=True), STACK),
    persimmon := Architecture("persimmon", PERSIMMON_CONFIG, stack(PERSIMMON)),
    persimmon.but(
        "persimmon/plain",
        config={**PERSIMMON_CONFIG, "qk_layernorm": False},
        main=stack(
            replace(
                PERSIMMON,
                q=replace(PERSIMMON_V, start=0),
                k=replace(PERSIMMON_V, start=8),
            )
        ),
    ),
]

# Blocks with two maps as MLP next to attention: OPT and the decoders of BART-like models ---------

PRE_NORM = replace(
    three(BLOCK, "self_attn.{}_proj", 4, 6),
    output="self_attn.out_proj",
    mlp_norm="fc1",
    mlp_hidden="fc2",
    mlp_out="fc2",
)
# The norms come after the sums.
POST_NORM = replace(PRE_NORM, middle="self_attn_layer_norm")


def decoder(block: Block, path: str = "model.decoder", head: str = "lm_head") -> Stack:
    return Stack(
        blocks=f"{path}.layers",
        count=3,
        block=block,
        embed=(f"{path}.embed_tokens", "out"),
        final_norm=(head, "in"),
    )


OPT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

OPT: list[Architecture | Refused] = [
    opt := Architecture("opt", OPT_CONFIG, decoder(PRE_NORM)),
    opt.but(
        "opt/post_norm",
        config={**OPT_CONFIG, "do_layer_norm_before": False},
        main=decoder(POST_NORM),
    ),
    # `embed` and `final_norm` are narrower than the stream.
    opt.but("opt/projected", config={**OPT_CONFIG, "word_embed_proj_dim": 14}),
]

BART_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 3,  # the cache of the decoder by itself is made for as many
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "scale_embedding": True,
    "pad_token_id": 0,
}

# Halves of encoder-decoders by themselves, called without the encoder's output: cross attention is
# omitted. Some have scaling embedding modules; others scale the stream after the embedding.
BART_KIN: list[Architecture | Refused] = [
    Architecture("bart/decoder", BART_CONFIG, decoder(POST_NORM)),
    Architecture("mbart/decoder", BART_CONFIG, decoder(PRE_NORM)),
    Architecture("pegasus/decoder", BART_CONFIG, decoder(PRE_NORM)),
    Architecture("marian/decoder", BART_CONFIG, decoder(POST_NORM)),
    Architecture("blenderbot/decoder", BART_CONFIG, decoder(PRE_NORM)),
    Architecture("plbart/decoder", BART_CONFIG, decoder(POST_NORM)),
    Architecture(
        "whisper/decoder",
        {**BART_CONFIG, "num_mel_bins": 8, "max_target_positions": 64, "max_source_positions": 32},
        decoder(PRE_NORM, head="proj_out"),
    ),
    Architecture("trocr", BART_CONFIG, decoder(POST_NORM, head="output_projection")),
    Architecture("mvp/decoder", BART_CONFIG, decoder(POST_NORM)),
]

XGLM: list[Architecture | Refused] = [
    Architecture(
        "xglm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 24,
            "ffn_dim": 40,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        decoder(PRE_NORM, "model"),
    ),
]

# Models with recurrent blocks ------------------------------------------------------------------


def mixing(path: str, mlp: Block | None = None) -> Block:
    """A block whose mixer is at `path`, with the MLP of another block, or none."""
    if mlp is None:
        return Block(mixer_norm=path, mixer_out=path, middle="none")
    return Block(
        mixer_norm=path,
        mixer_out=path,
        mlp_norm=mlp.mlp_norm,
        mlp_hidden=mlp.mlp_hidden,
        mlp_out=mlp.mlp_out,
        experts=mlp.experts,
        n_experts=mlp.n_experts,
    )


ZAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_mamba_heads": 2,
    "mamba_d_state": 6,
    "mamba_d_conv": 3,
    "use_mamba_kernels": False,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Attention and MLP of a hybrid block don't write to the stream: what they make is added to what
# the mixer's norm reads.
HYBRID = mixing("mamba_decoder.mamba")
ZAMBA_STACK = stack(mixing("mamba"), {1: HYBRID, 3: HYBRID}, count=4)

RECURRENT_GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "lru_width": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_window_size": 3,
    "block_types": ["recurrent", "attention"],
    "conv1d_width": 3,
    "logits_soft_cap": 5.0,
    "pad_token_id": 0,
}

LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
}
QWEN_NEXT = config(**LINEAR, **MOE)


def linear(mlp: Block = BLOCK, attention: Block | None = None) -> Stack:
    """The middle block has attention, the others a gated delta net."""
    return stack(mixing("linear_attn", mlp), {1: attention or mixing("self_attn", mlp)})


RWKV = Block(
    mixer_norm="attention",
    mixer_out="attention",
    mlp_norm="feed_forward",
    mlp_hidden="feed_forward.value",
    mlp_out="feed_forward",
)

XLSTM = Block(
    mixer_norm="mlstm_layer",
    mixer_out="mlstm_layer",
    mlp_norm="ffn",
    mlp_hidden="ffn.proj_down",
    mlp_out="ffn",
)

# Qwen 4 carries two streams, [1, T, 2 width]: the output of a sublayer is weighted by
# token and stream before it is added.
QWEN4 = Block(
    mixer_norm="linear_attn",
    middle="none",
    mlp_norm="mlp",
    experts="mlp.experts",
    n_experts=4,
    resid=False,
)

HYBRIDS: list[Architecture | Refused] = [
    Architecture("zamba", {**ZAMBA, "mamba_dt_rank": 4}, ZAMBA_STACK),
    Architecture(
        "zamba2",
        {
            **ZAMBA,
            "num_key_value_heads": 4,  # adapters are as wide as the queries
            "mamba_ngroups": 1,
            "num_mem_blocks": 2,
            "adapter_rank": 3,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "chunk_size": 4,
        },
        ZAMBA_STACK,
    ),
    Architecture(
        "recurrent_gemma",
        RECURRENT_GEMMA,
        stack(
            replace(
                mixing("temporal_block"),
                middle="sum",
                mlp_norm="mlp_block",
                mlp_hidden="mlp_block.down_proj",
                mlp_out="mlp_block",
            )
        ),
    ),
    # The last block has a dense MLP.
    Architecture(
        "qwen3_next",
        {**QWEN_NEXT, "mlp_only_layers": [2]},
        replace(
            linear(EXPERTS),
            other={1: mixing("self_attn", EXPERTS), 2: mixing("linear_attn", BLOCK)},
        ),
    ),
    Architecture("qwen3_5_text", config(**LINEAR), linear()),
    Architecture("qwen3_5_moe_text", QWEN_NEXT, linear(EXPERTS)),
]

LATER_HYBRIDS: list[Architecture | Refused] = [
    # Block 0 norms the stream first, and adds to the normed stream, not to its input.
    Architecture(
        "rwkv",
        {
            "vocab_size": VOCABULARY,
            "context_length": 64,
            "hidden_size": 20,
            "attention_hidden_size": 20,
            "intermediate_size": 28,
            "num_hidden_layers": 3,
            "rescale_every": 2,
        },
        Stack(
            blocks="rwkv.blocks",
            count=3,
            block=RWKV,
            other={0: replace(RWKV, middle="none", adds_up=False)},
            embed=("rwkv.embeddings", "out"),
            final_norm=("head", "in"),
        ),
        note="the stream is halved between blocks 1 and 2 (rescale_every)",
    ),
]

# Attention blocks as OLMo 2's, the others with norms before the sublayers.
OLMO_HYBRID = Architecture(
    "olmo_hybrid",
    config(**{**LINEAR, "head_dim": 6}, attention_bias=True),
    linear(
        attention=replace(
            mixing("self_attn", BLOCK),
            mixer_out="post_attention_layernorm",
            mlp_out="post_feedforward_layernorm",
        )
    ),
)

PHI4 = Architecture(
    "phi4_multimodal",
    config(
        sliding_window=3,
        vision_config={
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
            "image_token_id": 58,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
            "input_size": 16,
            "audio_token_id": 59,
        },
    ),
    stack(FUSED),
    note="run on text alone",
)

# Multi-head latent attention: keys have a part that all heads share, so `k` isn't a site.
YOUTU_CONFIG = config(
    num_key_value_heads=None,
    head_dim=None,
    q_lora_rank=10,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=5,
)
YOUTU = replace(
    BLOCK,
    q=Heads("self_attn.q_b_proj", 4, 6),
    k=None,
    v=Heads("self_attn.kv_b_proj", 4, 5, start=4, step=9),
    width=5,
)

# ZAYA convolves queries and keys, and its values are halves of two maps, one of them a token late.
# Both sums scale and shift the stream and the added vector, feature by feature.
ZAYA = Block(
    attn_norm="self_attn",
    q=Heads("self_attn.qk_norm", 4, 8, form="heads"),
    output="self_attn.o_proj",
    heads=4,
    width=8,
    middle="post_attention_residual_scale",
    mlp_norm="mlp",
    experts="mlp.experts",
    n_experts=4,
)

OTHERS: list[Architecture | Refused] = [
    Architecture(
        "solar_open",
        config(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            routed_scaling_factor=1.5,
            attention_bias=True,
        ),
        stack(EXPERTS),
    ),
    Architecture(
        "vaultgemma",
        config(
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=6,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
        ),
        STACK,
    ),
    OLMO_HYBRID,
    PHI4,
    youtu := Architecture("youtu", YOUTU_CONFIG, stack(YOUTU)),
    youtu.but(
        "youtu/no_query_rank",
        config={**YOUTU_CONFIG, "q_lora_rank": None},
        main=stack(replace(YOUTU, q=Heads("self_attn.q_proj", 4, 6))),
    ),
    Architecture(
        "zaya",
        config(
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            router_hidden_size=10,
            sliding_window=3,
            layer_types=["hybrid", "hybrid_sliding", "hybrid"],
        ),
        stack(ZAYA),
    ),
    Architecture(
        "qwen4_exp_text",
        config(
            **{**LINEAR, **MOE},
            eos_token_id=60,
            hc_count=2,
            hc_lowrank=6,
            ple_layer_ids=[1],
            ngram_vocab_size_base=30,
            heads_per_ngram=2,
            make_ngram_vocab_size_divisible_by=4,
            split_ngram_parts=1,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=4,
            indexer_compress_ratio=2,
        ),
        stack(QWEN4, {1: replace(QWEN4, mixer_norm="self_attn")}),
    ),
]

# OpenAI GPT: norms after the sums, one map for queries, keys and values.
GPT_BLOCK = Block(
    attn_norm="attn",
    q=Heads("attn.c_attn", 4, 6),
    k=Heads("attn.c_attn", 4, 6, start=24),
    v=Heads("attn.c_attn", 4, 6, start=48),
    output="attn.c_proj",
    heads=4,
    width=6,
    attn_out="attn.c_proj",
    middle="ln_1",
    mlp_norm="mlp.c_fc",
    mlp_hidden="mlp.c_proj",
    mlp_out="mlp",
)
GPT = Architecture(
    "openai-gpt",
    {
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
    },
    Stack(
        blocks="transformer.h",
        count=3,
        block=GPT_BLOCK,
        embed=("transformer.tokens_embed", "out"),
        final_norm=("lm_head", "in"),
    ),
)

UNUSUAL: list[Architecture | Refused] = [
    Refused("xlnet", "its blocks take activations as [position, prompt, feature]"),
    Refused("reformer", "its blocks carry two streams inside a custom autograd function"),
    Architecture(
        "xlstm",
        {
            "vocab_size": VOCABULARY,
            # its states are made for a multiple of 64
            "hidden_size": 64,
            "embedding_dim": 64,
            "qk_dim_factor": 1.0,
            "num_hidden_layers": 3,
            "num_blocks": 3,
            "num_heads": 4,
            "ffn_round_up_to_multiple_of": 4,
            "output_logit_soft_cap": 5.0,
            "pad_token_id": 0,
        },
        Stack(
            blocks="backbone.blocks",
            count=3,
            block=XLSTM,
            embed=("backbone.embeddings", "out"),
            final_norm=("lm_head", "in"),
        ),
    ),
]

# BERT-like models as causal decoders -----------------------------------------------------------

BERT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "is_decoder": True,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
# Modules `output` add the stream and norm it; the added vector is their linear map's output.
BERT = Block(
    attn_norm="attention.self",
    q=Heads("attention.self.query", 4, 6),
    k=Heads("attention.self.key", 4, 6),
    v=Heads("attention.self.value", 4, 6),
    output="attention.output.dense",
    heads=4,
    width=6,
    attn_out="attention.output.dense",
    middle="attention.output.LayerNorm",
    mlp_norm="intermediate",
    mlp_hidden="output.dense",
    mlp_out="output.dense",
)


def bert(path: str, head: str, block: Block = BERT) -> Stack:
    return Stack(
        blocks=f"{path}.encoder.layer",
        count=3,
        block=block,
        embed=(f"{path}.embeddings.word_embeddings", "out"),
        final_norm=(head, "in"),
    )


CLS = "cls.predictions.decoder"
NARROW = {**BERT_CONFIG, "embedding_size": 14}

BERT_KIN: list[Architecture | Refused] = [
    Architecture("bert/decoder", BERT_CONFIG, bert("bert", CLS)),
    Architecture("roberta/decoder", BERT_CONFIG, bert("roberta", "lm_head.decoder")),
    # There are linear maps between the embedding and the blocks and before the unembedding.
    Architecture("electra/decoder", NARROW, bert("electra", "generator_lm_head")),
    Architecture("camembert/decoder", BERT_CONFIG, bert("roberta", "lm_head.decoder")),
    Architecture("xlm-roberta/decoder", BERT_CONFIG, bert("roberta", "lm_head.decoder")),
    # Norms before the sublayers, modules `output` add the stream.
    Architecture(
        "megatron-bert/decoder", BERT_CONFIG, bert("bert", CLS, replace(BERT, middle="sum"))
    ),
    Architecture(
        "ernie/decoder",
        {**BERT_CONFIG, "use_task_id": True, "task_type_vocab_size": 3},
        bert("ernie", CLS),
    ),
    Architecture(
        "rembert/decoder",
        {**BERT_CONFIG, "input_embedding_size": 14, "output_embedding_size": 30},
        bert("rembert", CLS),
    ),
    roformer := Architecture("roformer/decoder", NARROW, bert("roformer", CLS)),
    # Values are rotated as well, outside of all modules.
    roformer.but(
        "roformer/rotary_value",
        config={**NARROW, "rotary_value": True},
        main=bert("roformer", CLS, replace(BERT, v=None)),
    ),
    Architecture("data2vec-text/decoder", BERT_CONFIG, bert("data2vec_text", "lm_head.decoder")),
    # With `block_sparse` the first short prompt makes it put other modules in attention's place.
    Architecture(
        "big_bird/decoder", {**BERT_CONFIG, "attention_type": "original_full"}, bert("bert", CLS)
    ),
]

TABLE: list[Architecture | Refused] = [
    *OPT,
    *LLAMA_KIN,
    *PHI_KIN,
    *XGLM,
    *HYBRIDS,
    GPT,
    *LATER_HYBRIDS,
    *OTHERS,
    *UNUSUAL,
    *BERT_KIN,
    *BART_KIN,
]
