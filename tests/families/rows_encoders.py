"""Text encoders: BERT and its successors, with masked-language heads or bare."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from . import rows_llama
from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Refused, Stack

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
WIDE = {**CONFIG, "hidden_size": 20, "head_dim": 6}
"""Config with heads wider than width / heads."""
SMALL = {**CONFIG, "embedding_size": 14}
"""Config with narrow embeddings that a linear map widens before the first block."""


def block(query: str, key: str, value: str, **parts: Any) -> Block:
    """A block with 4 heads of 6 features from three linear maps."""
    made = {"q": Heads(query, 4, 6), "k": Heads(key, 4, 6), "v": Heads(value, 4, 6)}
    return Block(**made, heads=4, width=6, **parts)


def bert(name: str, **changes: Any) -> Architecture:
    """A model that has BERT's blocks and BERT's names."""
    made: dict[str, Any] = {"config": CONFIG, "main": stack("bert", POST)}
    made |= {"build": "AutoModelForMaskedLM"} | changes
    return Architecture(name, **made)


def stack(
    base: str,
    one: Block,
    head: str | None = "cls.predictions.decoder",
    blocks: str = "encoder.layer",
    embed: str = "embeddings.word_embeddings",
    **changes: Any,
) -> Stack:
    """Two blocks in the module `base`; `head` is the linear map to the vocabulary."""
    base += "." if base else ""
    final = None if head is None else (head, "in")
    made: dict[str, Any] = {"count": 2, "embed": (base + embed, "out"), "final_norm": final}
    return Stack(base + blocks, block=one, **(made | changes))


# LN(x + attention), LN(x + MLP); the added vectors are the outputs of the two linear maps.
POST = block(
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    attn_norm="attention.self",
    output="attention.output.dense",
    attn_out="attention.output.dense",
    middle="attention.output",
    mlp_norm="intermediate",
    mlp_hidden="output.dense",
    mlp_out="output.dense",
)
# x + attention(LN(x)): the norms moved, `attention` and `output` add the stream themselves.
PRE = replace(POST, middle="sum")
# The norm of the MLP is within `intermediate`.
PRE_ROBERTA = replace(PRE, mlp_norm="intermediate.dense")

DISTIL = block(
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    attn_norm="attention",
    output="attention.out_lin",
    attn_out="attention",
    middle="sa_layer_norm",
    mlp_norm="ffn",
    mlp_hidden="ffn.lin2",
    mlp_out="ffn",
)
MPNET = replace(
    POST,
    attn_norm="attention.attn",
    q=Heads("attention.attn.q", 4, 6),
    k=Heads("attention.attn.k", 4, 6),
    v=Heads("attention.attn.v", 4, 6),
    output="attention.attn.o",
    attn_out="attention.attn",
    middle="attention",
)
# Names of Llama, norms of BERT.
ROTARY = block(
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    attn_norm="self_attn",
    output="self_attn.o_proj",
    attn_out="self_attn",
    middle="post_attention_layernorm",
    mlp_norm="mlp",
    mlp_hidden="mlp.down_proj",
    mlp_out="mlp",
)
# A matrix for queries, keys and values side by side; pre-norm, the first norm of all is missing.
MODERN = Block(
    attn_norm="attn",
    q=Heads("attn.Wqkv", 4, 6),
    k=Heads("attn.Wqkv", 4, 6, start=24),
    v=Heads("attn.Wqkv", 4, 6, start=48),
    output="attn.Wo",
    heads=4,
    width=6,
    attn_out="attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.Wo",
    mlp_out="mlp",
)
# Each head's query, key and value side by side; biases of queries and values are added outside of
# all modules, so that only keys are what a module returns.
DEBERTA = replace(POST, q=None, k=Heads("attention.self.in_proj", 4, 6, start=6, step=18), v=None)
DEBERTA_2 = replace(
    POST,
    q=Heads("attention.self.query_proj", 4, 6),
    k=Heads("attention.self.key_proj", 4, 6),
    v=Heads("attention.self.value_proj", 4, 6),
)
# With `share_att_key` (DeBERTa v3) the maps of queries and keys are called again, on distances.
DEBERTA_3 = replace(
    DEBERTA_2,
    q=Heads("attention.self.query_proj", 4, 6, again=True),
    k=Heads("attention.self.key_proj", 4, 6, again=True),
)
# Queries and keys are normalized outside of all modules.
YOSO = replace(POST, q=None, k=None)
# What the projection reads: the heads of attention, then as many of a convolution.
CONVBERT = replace(POST, q=None, k=None, v=None, output=None)
# The text encoders of CLIP-like models.
CLIP = block(
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    attn_norm="self_attn",
    output="self_attn.out_proj",
    attn_out="self_attn",
    mlp_norm="mlp",
    mlp_hidden="mlp.fc2",
    mlp_out="mlp",
)
FNET = Block(
    mixer_norm="fourier",
    mixer_out="fourier.self",
    middle="fourier.output",
    mlp_norm="intermediate",
    mlp_hidden="output.dense",
    mlp_out="output.dense",
)
# Norms over all heads after the maps of queries and keys; both sublayers are scaled.
ESMC_SCALE = 1 / math.sqrt(2 / 36)
ESMC = replace(
    ROTARY,
    q=Heads("self_attn.q_norm", 4, 6),
    k=Heads("self_attn.k_norm", 4, 6),
    attn_scale=ESMC_SCALE,
    middle="sum",
    mlp_scale=ESMC_SCALE,
)
# The first and the last layer with full attention add a second embedding of the tokens to their
# values; the projection follows a gate, in a separate module; both sublayers are scaled.
NEO = Block(
    attn_norm="self_attn",
    q=Heads("self_attn.q_norm", 4, 8, form="heads_first"),
    k=Heads("self_attn.k_norm", 2, 8, form="heads_first"),
    output="self_attn.output_projection.o_proj",
    heads=4,
    width=8,
    attn_out="self_attn",
    attn_scale=0.6,
    mlp_norm="mlp",
    mlp_hidden="mlp.down_proj",
    mlp_out="mlp",
    mlp_scale=0.6,
)
ALBERT = block(
    "albert_layers.0.attention.query",
    "albert_layers.0.attention.key",
    "albert_layers.0.attention.value",
    attn_norm="albert_layers.0.attention",
    output="albert_layers.0.attention.dense",
    attn_out="albert_layers.0.attention.dense",
    middle="albert_layers.0.attention",
    mlp_norm="albert_layers.0.ffn",
    mlp_hidden="albert_layers.0.ffn_output",
    mlp_out="albert_layers.0.ffn_output",
)

DEBERTA_CONFIG = {
    **CONFIG,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODERN_CONFIG = {
    **CONFIG,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "local_attention": 4,
}

BERT = bert("bert")
ROBERTA = bert("roberta", main=stack("roberta", POST, "lm_head.decoder"))
DEBERTA_V1 = bert("deberta", config=DEBERTA_CONFIG, main=stack("deberta", DEBERTA))
DEBERTA_V2 = bert(
    "deberta-v2",
    config={**DEBERTA_CONFIG, "position_buckets": 4, "norm_rel_ebd": "layer_norm"},
    main=stack("deberta", DEBERTA_2),
)
MODERNBERT = bert(
    "modernbert",
    config=MODERN_CONFIG,
    main=stack("model", MODERN, "decoder", "layers", "embeddings.tok_embeddings", count=3),
)
ESM = bert(
    "esm",
    config={
        **CONFIG,
        "mask_token_id": 2,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
    },
    main=stack("esm", PRE, "lm_head.decoder"),
)

CLIP_STACK = stack(
    "",
    CLIP,
    None,
    "encoder.layers",
    "embeddings.token_embedding",
    final_norm=("final_layer_norm", "out"),
)

TABLE: list[Architecture | Refused] = [
    BERT,
    BERT.but("bert/bare", build="AutoModel", main=stack("", POST, None)),
    ROBERTA,
    ROBERTA.but("camembert"),
    ROBERTA.but("xlm-roberta"),
    ROBERTA.but("data2vec-text", main=stack("data2vec_text", POST, "lm_head.decoder")),
    # Pre-norm, with a norm after all blocks.
    ROBERTA.but("xlm-roberta-xl", main=stack("roberta", PRE, "lm_head.decoder")),
    ROBERTA.but(
        "roberta-prelayernorm",
        main=stack("roberta_prelayernorm", PRE_ROBERTA, "lm_head.decoder"),
    ),
    # Pre-norm; the embeddings aren't normalized at all.
    bert("megatron-bert", main=stack("bert", PRE)),
    bert("ernie", config={**CONFIG, "use_task_id": True}, main=stack("ernie", POST)),
    bert(
        "roc_bert",
        config={**CONFIG, "pronunciation_vocab_size": 7, "shape_vocab_size": 7},
        main=stack("roc_bert", POST),
    ),
    bert("bert-generation", build="BertGenerationEncoder", main=stack("", POST, None)),
    # Cells of the table, boxes of the words left out: all zero.
    bert("tapas", config={**CONFIG, "type_vocab_sizes": [2] * 7}, main=stack("tapas", POST)),
    bert("layoutlm", main=stack("layoutlm", POST)),
    bert(
        "luke",
        config={**CONFIG, "entity_vocab_size": 5},
        main=stack("luke", POST, "lm_head.decoder"),
    ),
    bert("markuplm", build="AutoModel", main=stack("", POST, None)),
    bert("splinter", build="AutoModel", main=stack("", POST, None)),
    # The first two are causal.
    bert(
        "clip_text_model",
        build="CLIPTextModel",
        config={**CONFIG, "eos_token_id": 2},
        main=CLIP_STACK,
    ),
    bert(
        "metaclip_2_text_model",
        build="MetaClip2TextModel",
        config={**CONFIG, "eos_token_id": 2},
        main=CLIP_STACK,
    ),
    bert("siglip_text_model", build="SiglipTextModel", main=CLIP_STACK),
    # Language adapters add to the stream after the MLP; the norm after them ends the block.
    bert(
        "xmod",
        config={**CONFIG, "languages": ["en", "de"], "default_language": "de"},
        main=stack(
            "roberta", replace(POST, middle="attention.output.LayerNorm"), "lm_head.decoder"
        ),
    ),
    bert("electra", config=SMALL, main=stack("electra", POST, "generator_lm_head")),
    bert("roformer", config=SMALL, main=stack("roformer", POST)),
    bert(
        "rembert",
        config={**CONFIG, "input_embedding_size": 14, "output_embedding_size": 18},
        main=stack("rembert", POST),
    ),
    bert(
        "convbert",
        config={**SMALL, "conv_kernel_size": 3, "head_ratio": 2},
        main=stack("convbert", CONVBERT, "generator_lm_head"),
    ),
    bert(
        "distilbert",
        config={
            **CONFIG,
            "n_layers": 2,
            "n_heads": 4,
            "dim": 24,
            "hidden_dim": 40,
        },
        main=stack("distilbert", DISTIL, "vocab_projector", "transformer.layer"),
    ),
    # Whatever the config says, token 1 is padding.
    bert("mpnet", main=stack("mpnet", MPNET, "lm_head.decoder"), begins=2),
    DEBERTA_V1,
    # This head multiplies with the matrix of the embeddings itself.
    DEBERTA_V1.but(
        "deberta/head",
        config={**DEBERTA_CONFIG, "legacy": False},
        main=stack("deberta", DEBERTA, final_norm=("lm_predictions.lm_head.LayerNorm", "out")),
    ),
    DEBERTA_V2,
    DEBERTA_V2.but(
        "deberta-v2/shared",
        config={**DEBERTA_V2.config, "share_att_key": True},
        main=stack("deberta", DEBERTA_3),
    ),
    # A convolution next to the first block: the second block's input isn't the first's output.
    DEBERTA_V2.but("deberta-v2/conv", config={**DEBERTA_V2.config, "conv_kernel_size": 3}),
    MODERNBERT,
    MODERNBERT.but(
        "modernbert/bare",
        build="AutoModel",
        main=stack(
            "",
            MODERN,
            None,
            "layers",
            "embeddings.tok_embeddings",
            count=3,
            final_norm=("final_norm", "out"),
        ),
    ),
    bert(
        "eurobert",
        config=rows_llama.CONFIG,
        main=stack("model", rows_llama.BLOCK, "lm_head", "layers", "embed_tokens", count=3),
    ),
    bert(
        "ultrabert",
        config={
            **rows_llama.CONFIG,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 2,
            "prediction_head_size": 14,
        },
        main=stack("model", rows_llama.BLOCK, "head.decoder", "layers", "embed_tokens", count=3),
    ),
    bert("nomic_bert", config=WIDE, main=stack("nomic_bert", ROTARY, blocks="layers")),
    bert("gte", config=WIDE, main=stack("gte", ROTARY, "lm_head.decoder", "layers")),
    bert(
        "jina_embeddings_v3",
        config=WIDE,
        main=stack("roberta", replace(ROTARY, mlp_hidden="mlp.fc2"), "lm_head.decoder", "layers"),
    ),
    ESM,
    ESM.but("esm/absolute", config={**ESM.config, "position_embedding_type": "absolute"}),
    bert("esmc", main=stack("esmc", ESMC, "lm_head.decoder", "layers", "embed_tokens")),
    # What a block adds to isn't all that its attention reads: that has the embeddings mixed in.
    bert(
        "neomme",
        config={
            **CONFIG,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "hidden_size": 20,
            "head_dim": 8,
            "embedding_rank": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 2,
            "residual_multiplier": 0.6,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 1.0,
                },
            },
        },
        main=stack(
            "model",
            NEO,
            "lm_head",
            "layers",
            "embed_tokens.word_embeddings",
            count=3,
            other={1: replace(NEO, v=Heads("self_attn.v_proj", 2, 8))},
        ),
    ),
    bert("fnet", main=stack("fnet", FNET)),
    # Unquantized; its linear maps are of a separate class and return pairs.
    bert("ibert", main=stack("ibert", POST, "lm_head.decoder")),
    # As many landmarks as tokens: ordinary attention, and a convolution over values.
    bert(
        "nystromformer",
        config={**CONFIG, "num_landmarks": 64, "segment_means_seq_len": 64, "conv_kernel_size": 3},
        main=stack("nystromformer", POST),
    ),
    bert("yoso", config={**CONFIG, "conv_window": 3}, main=stack("yoso", YOSO)),
    bert("big_bird", config={**CONFIG, "attention_type": "original_full"}),
    Refused("albert", "all of its layers call the same module"),
    # As many modules as layers, which no published model has.
    bert(
        "albert/unshared",
        config={**SMALL, "num_hidden_groups": 2},
        main=stack("albert", ALBERT, "predictions.decoder", "encoder.albert_layer_groups"),
    ),
    Refused("canine", "it pools characters, so positions differ between its blocks"),
    Refused("perceiver", "its blocks work on latents, which aren't the prompt's positions"),
    Refused("flaubert", "it has no blocks: attention, MLPs and norms are in separate lists"),
    Refused("xlm", "it has no blocks: attention, MLPs and norms are in separate lists"),
    Refused("funnel", "its blocks pool tokens, so positions differ between layers"),
    Refused("longformer", "it pads prompts to a multiple of its window"),
    Refused("mobilebert", "attention and MLPs add to a narrow stream within each block"),
    Refused("mra", "its attention needs a CUDA kernel and returns zeros without it"),
    Refused("squeezebert", "its activations have features before tokens, and blocks aren't called"),
]
