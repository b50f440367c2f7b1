"""Encoder-decoders: T5-like and BART-like models, speech-to-text models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack

# `main` is the decoder with its self-attention, `cross` the decoder's blocks once more with cross
# attention alone: its keys and values are at the encoder's positions. Between the two is
# `resid_mid` of the decoder, so that resid_post is resid_pre + attn_out + cross attn_out + mlp_out.


def attention(
    path: str,
    heads: int,
    width: int,
    *,
    kv_heads: int | None = None,
    names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "out_proj"),
) -> Block:
    """A block with only the attention module at `path`."""
    q, k, v, output = (f"{path}.{name}" for name in names)
    return Block(
        attn_norm=path,
        q=Heads(q, heads, width),
        k=Heads(k, kv_heads or heads, width),
        v=Heads(v, kv_heads or heads, width),
        output=output,
        heads=heads,
        width=width,
        attn_out=path,
        middle="none",
        resid=False,
    )


def with_mlp(block: Block, path: str, *, down: str = "", middle: str = "sum") -> Block:
    """Attention that adds the residual, followed by the MLP: one module, with `down` in it."""
    return replace(
        block,
        middle=middle,
        resid=True,
        mlp_norm=path,
        mlp_hidden=f"{path}.{down}" if down else None,
        mlp_out=path,
    )


# --- T5: sublayers in `layer` add the residual; the modules inside them don't ---------------------

T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
GATED: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu"}
QKVO = ("q", "k", "v", "o")


def t5(
    *, self_attention: str = "SelfAttention", mlp: str = "DenseReluDense"
) -> tuple[Stack, dict[str, Stack]]:
    decoder = attention("layer.0.SelfAttention", 4, 6, names=QKVO)
    encoder = attention(f"layer.0.{self_attention}", 4, 6, names=QKVO)
    return Stack(
        blocks="decoder.block",
        count=3,
        block=with_mlp(decoder, f"layer.2.{mlp}", down="wo"),
        embed=("decoder.embed_tokens", "out"),
        final_norm=("lm_head", "in"),
    ), {
        "encoder": Stack(
            blocks="encoder.block",
            count=2,
            block=with_mlp(encoder, f"layer.1.{mlp}", down="wo"),
            embed=("encoder.embed_tokens", "out"),
            final_norm=("encoder.final_layer_norm", "out"),
        ),
        "cross": Stack(
            blocks="decoder.block",
            count=3,
            block=attention("layer.1.EncDecAttention", 4, 6, names=QKVO),
        ),
    }


T5_MAIN, T5_OTHERS = t5()
T5_ROW = Architecture(
    "t5",
    T5,
    T5_MAIN,
    build="AutoModelForSeq2SeqLM",
    others=T5_OTHERS,
    takes="two texts",
)
LOCAL_MAIN, LOCAL_OTHERS = t5(self_attention="LocalSelfAttention")
GLOBAL_MAIN, GLOBAL_OTHERS = t5(self_attention="TransientGlobalSelfAttention")
LONG: dict[str, Any] = {**T5, "local_radius": 2, "global_block_size": 3}


def without_keys(stack: Stack) -> Stack:
    return replace(stack, block=replace(stack.block, k=None, v=None))


# Every second layer has experts, one for each token: called with a mask, not with indices.
SWITCH_MAIN, SWITCH_OTHERS = t5(mlp="mlp")


def sparse(stack: Stack, layer: int) -> Stack:
    """Experts in one layer."""
    return replace(stack, other={layer: replace(stack.block, mlp_hidden=None)})


# --- T5Gemma: Gemma's blocks, norms before and after every sublayer -------------------------------

GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "query_pre_attn_scalar": 5,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 6.0,
    "attn_logit_softcapping": 4.0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
O_PROJ = ("q_proj", "k_proj", "v_proj", "o_proj")
GEMMA_BLOCK = replace(
    with_mlp(attention("self_attn", 4, 6, kv_heads=2, names=O_PROJ), "mlp", down="down_proj"),
    attn_out="post_self_attn_layernorm",
    mlp_out="post_feedforward_layernorm",
)
T5GEMMA = Architecture(
    "t5gemma",
    {
        "encoder": {**GEMMA, "hidden_size": 24},
        "decoder": {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": [*GEMMA["layer_types"], "full_attention"],
        },
        "vocab_size": VOCABULARY,
    },
    Stack(
        blocks="model.decoder.layers",
        count=3,
        block=GEMMA_BLOCK,
        embed=("model.decoder.embed_tokens", "out"),
        final_norm=("lm_head.out_proj", "in"),
    ),
    build="AutoModelForSeq2SeqLM",
    others={
        "encoder": Stack(
            blocks="model.encoder.layers",
            count=2,
            block=GEMMA_BLOCK,
            embed=("model.encoder.embed_tokens", "out"),
            final_norm=("model.encoder.norm", "out"),
        ),
        "cross": Stack(
            blocks="model.decoder.layers",
            count=3,
            block=replace(
                attention("cross_attn", 4, 6, kv_heads=2, names=O_PROJ),
                attn_out="post_cross_attn_layernorm",
            ),
        ),
    },
    takes="two texts",
)

# T5Gemma 2: queries and keys have norms, and the decoder's attention is over the decoder's and the
# encoder's positions at once: the same maps make keys and values of both, one call for each.
NORMED = replace(
    GEMMA_BLOCK,
    q=Heads("self_attn.q_norm", 4, 6, form="heads_first"),
    k=Heads("self_attn.k_norm", 2, 6, form="heads_first"),
)
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
T5GEMMA2 = T5GEMMA.but(
    "t5gemma2",
    config={
        "encoder": {
            "text_config": GEMMA,
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 56,
            "eoi_token_index": 57,
        },
        "decoder": GEMMA,
        "image_token_index": 55,
    },
    main=replace(T5GEMMA.main, count=2, block=replace(NORMED, k=None, v=None)),
    others={
        "encoder": Stack(
            blocks="model.encoder.text_model.layers",
            count=2,
            block=NORMED,
            embed=("model.encoder.text_model.embed_tokens", "out"),
            final_norm=("model.encoder.text_model.norm", "out"),
        ),
    },
)

# --- BART-like: blocks are pre-norm (mBART) or post-norm (BART), the MLP is `fc1` and `fc2` -------

BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 20,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "scale_embedding": True,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def with_fc(block: Block, *, post: bool) -> Block:
    return replace(
        block,
        middle="self_attn_layer_norm" if post else "sum",
        resid=True,
        mlp_norm="fc1",
        mlp_hidden="fc2",
        mlp_out="fc2",
    )


def bart(
    name: str,
    *,
    post: bool = False,
    root: str = "model",
    norm: str = "layer_norm",
    build: str = "AutoModelForSeq2SeqLM",
    **config: Any,
) -> Architecture:
    """`norm`: the norm after the encoder's blocks, which pre-norm encoders have."""
    end = f"{root}.encoder.layers.1" if post else f"{root}.encoder.{norm}"
    return Architecture(
        name,
        {**BART, **config},
        Stack(
            blocks=f"{root}.decoder.layers",
            count=3,
            block=with_fc(attention("self_attn", 4, 5), post=post),
            embed=(f"{root}.decoder.embed_tokens", "out"),
            final_norm=("lm_head", "in"),
        ),
        build=build,
        others={
            "encoder": Stack(
                blocks=f"{root}.encoder.layers",
                count=2,
                block=with_fc(attention("self_attn", 2, 10), post=post),
                embed=(f"{root}.encoder.embed_tokens", "out"),
                final_norm=(end, "out"),
            ),
            "cross": Stack(
                blocks=f"{root}.decoder.layers", count=3, block=attention("encoder_attn", 4, 5)
            ),
        },
        takes="two texts",
    )


def encoder_with(row: Architecture, **changes: Any) -> Architecture:
    """The row with another encoder."""
    encoder = replace(row.others["encoder"], **changes)
    return replace(row, others={**row.others, "encoder": encoder})


def inner(module: str) -> tuple[str, str, str, str]:
    """Names of the maps if queries, keys and values are in a separate module."""
    return f"{module}.query", f"{module}.key", f"{module}.value", "output"


def without_encoder(row: Architecture) -> Architecture:
    return replace(row, others={"cross": row.others["cross"]})


# LED and PEGASUS-X fill what the encoder reads up to whole windows or blocks: it has more positions
# than the prompt has tokens.
LED = without_encoder(
    bart(
        "led",
        post=True,
        root="led",
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    )
)
PEGASUS_X = without_encoder(bart("pegasus_x", num_global_tokens=3, block_size=4))
# BigBird-PEGASUS: `layernorm_embedding` is the norm after the blocks.
BIG_BIRD = encoder_with(
    bart(
        "bigbird_pegasus",
        norm="layernorm_embedding",
        attention_type="original_full",
        use_bias=True,
    ),
    block=with_fc(attention("self_attn", 2, 10, names=inner("self")), post=False),
)
# NLLB-MoE: every second layer has experts: called with a mask, not with indices.
NLLB_DENSE = bart(
    "nllb-moe",
    num_experts=3,
    expert_capacity=64,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
    moe_token_dropout=0.2,
)
NLLB_CROSS = replace(NLLB_DENSE.others["cross"], block=attention("cross_attention", 4, 5))
NLLB_MAIN = replace(
    NLLB_DENSE.main, block=with_mlp(attention("self_attn", 4, 5), "ffn", down="fc2")
)
NLLB_ENCODER = replace(
    NLLB_DENSE.others["encoder"], block=with_mlp(attention("self_attn", 2, 10), "ffn", down="fc2")
)
NLLB = replace(
    NLLB_DENSE,
    main=sparse(NLLB_MAIN, 1),
    others={"encoder": sparse(NLLB_ENCODER, 1), "cross": NLLB_CROSS},
)

# --- Speech: the encoder's stream begins after convolutions, and no module returns it -------------

AUDIO: dict[str, Any] = {"max_source_positions": 9, "max_target_positions": 64}


def speech(name: str, **config: Any) -> Architecture:
    row = bart(name, build="AutoModelForSpeechSeq2Seq", **AUDIO, **config)
    return replace(encoder_with(row, embed=None), takes="audio")


# `proj_out` is Whisper's unembedding.
WHISPER_LIKE = speech("whisper", num_mel_bins=6, begin_suppress_tokens=None)
WHISPER = replace(WHISPER_LIKE, main=replace(WHISPER_LIKE.main, final_norm=("proj_out", "in")))

MOONSHINE_BLOCK = with_mlp(attention("self_attn", 4, 5, names=O_PROJ), "mlp", down="fc2")
MOONSHINE = Architecture(
    "moonshine",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "intermediate_size": 28,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 3,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.8,
    },
    Stack(
        blocks="model.decoder.layers",
        count=3,
        block=MOONSHINE_BLOCK,
        embed=("model.decoder.embed_tokens", "out"),
        final_norm=("proj_out", "in"),
    ),
    build="AutoModelForSpeechSeq2Seq",
    others={
        "encoder": Stack(
            blocks="model.encoder.layers",
            count=2,
            block=MOONSHINE_BLOCK,
            final_norm=("model.encoder.layer_norm", "out"),
        ),
        "cross": Stack(
            blocks="model.decoder.layers",
            count=3,
            block=attention("encoder_attn", 4, 5, names=O_PROJ),
        ),
    },
    takes="audio",
)

TABLE = [
    T5_ROW,
    # This setting also selects T5 v1.1, which doesn't scale the unembedding's input.
    T5_ROW.but("t5/gated", config={**GATED, "tie_word_embeddings": False}),
    T5_ROW.but("mt5", config=GATED),
    T5_ROW.but("umt5", config=GATED),
    T5_ROW.but("longt5", config=LONG, main=LOCAL_MAIN, others=LOCAL_OTHERS),
    T5_ROW.but(
        "longt5/global",
        config={**LONG, "encoder_attention_type": "transient-global"},
        main=GLOBAL_MAIN,
        # The maps of keys and values are called a second time, for sums of blocks.
        others={**GLOBAL_OTHERS, "encoder": without_keys(GLOBAL_OTHERS["encoder"])},
    ),
    T5_ROW.but(
        "switch_transformers",
        config={**T5, "num_experts": 3, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        main=sparse(SWITCH_MAIN, 1),
        others={**SWITCH_OTHERS, "encoder": sparse(SWITCH_OTHERS["encoder"], 1)},
    ),
    T5GEMMA,
    T5GEMMA2,
    bart("bart", post=True),
    bart("plbart", post=True),
    bart("mvp", post=True),
    bart("marian", post=True),
    bart("blenderbot-small", post=True),
    bart("mbart"),
    bart("pegasus"),
    bart("blenderbot"),
    bart("m2m_100"),
    LED,
    BIG_BIRD,
    PEGASUS_X,
    NLLB,
    WHISPER,
    speech(
        "speech_to_text",
        input_feat_per_channel=6,
        num_conv_layers=2,
        conv_kernel_sizes=(3, 3),
        conv_channels=12,
    ),
    MOONSHINE,
    Refused("fsmt", "its tensors have the position dimension before the batch dimension"),
    Refused("prophetnet", "its decoder runs several streams as one sequence"),
]
