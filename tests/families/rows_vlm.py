"""Vision-language models: `main` is the language model, `vision` the image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .build import VOCABULARY
from .parts import Architecture, Block, Heads, Stack
from .rows_b import GEMMA4
from .rows_seq2seq import GEMMA, O_PROJ, attention, with_mlp

# --- Inputs of the models -------------------------------------------------------------------------

IMAGE = 55
"""The image token; prompts have no other tokens above 52."""


@dataclass(frozen=True)
class Picture:
    """The image in a prompt."""

    shape: tuple[int, ...]
    """Shape of `pixel_values`."""
    tokens: int
    """Number of tokens of the image."""
    mask: str = ""
    """Name of the model's mask of image tokens, if it needs one."""
    prefix: bool = False
    """Whether the mask is 0 for every token. Without it, PaliGemma attends to later tokens if
    nothing is padded, and not otherwise."""
    also: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of the model."""


PICTURES: dict[str, Picture] = {}
"""Images by the architecture's name."""


def with_picture(
    architecture: Architecture, tokens: tuple[int, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """A prompt with an image after its second token."""
    picture = PICTURES[architecture.name]
    row = [*tokens[:2], *[IMAGE] * picture.tokens, *tokens[2:]]
    prompt = {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.randn(picture.shape, generator=generator),
        **{name: torch.tensor(value) for name, value in picture.also.items()},
    }
    if picture.mask:
        is_image = prompt["input_ids"] == IMAGE
        prompt[picture.mask] = (is_image & (not picture.prefix)).long()
    return prompt


# --- Image encoders -------------------------------------------------------------------------------

SIDE = 8
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 4,
    "projection_dim": 12,
}
SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
VIT = with_mlp(attention("self_attn", 2, 8), "mlp", down="fc2")


def vision(path: str, block: Block = VIT, **changes: Any) -> dict[str, Stack]:
    return {"vision": Stack(blocks=path, count=2, block=block, **changes)}


def fused(path: str, heads: int, width: int, mlp: Block) -> Block:
    """Qwen's blocks: queries of all heads, then keys, then values from one map."""
    q, k, v = (Heads(f"{path}.qkv", heads, width, start=i * heads * width) for i in range(3))
    return replace(
        mlp,
        attn_norm=path,
        q=q,
        k=k,
        v=v,
        output=f"{path}.proj",
        heads=heads,
        width=width,
        attn_out=path,
    )


# --- Language models ------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA = with_mlp(attention("self_attn", 4, 6, kv_heads=2, names=O_PROJ), "mlp", down="down_proj")


def normed(block: Block, form: Any) -> Block:
    """Queries and keys have norms."""
    q, k = Heads("self_attn.q_norm", 4, 6, form=form), Heads("self_attn.k_norm", 2, 6, form=form)
    return replace(block, q=q, k=k)


def language(
    block: Block = LLAMA, path: str = "model.language_model", head: str = "lm_head", **changes: Any
) -> Stack:
    """`embed` is the language model's input, which already has the image embeddings."""
    main = Stack(
        blocks=f"{path}.layers",
        count=3,
        block=block,
        embed=(path, "in"),
        final_norm=(head, "in"),
    )
    return replace(main, **changes)


TABLE: list[Architecture] = []


def row(
    name: str,
    config: dict[str, Any],
    picture: Picture,
    main: Stack,
    others: dict[str, Stack],
    **changes: Any,
) -> None:
    """Add a row and its image."""
    PICTURES[name] = picture
    made = Architecture(
        name,
        config,
        main,
        build="AutoModelForImageTextToText",
        others=others,
        takes="image and text",
    )
    TABLE.append(replace(made, **changes))


PLAIN = Picture((1, 3, SIDE, SIDE), 4)

# LLaVA uses the output of the last block, without the norm after it and without the class token.
LLAVA: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": CLIP,
    "image_token_index": IMAGE,
    "vision_feature_layer": -1,
}


def tower(*, normed: bool = False) -> dict[str, Stack]:
    """CLIP or SigLIP; `normed`: the language model reads what the last norm returns."""
    norm = ("model.vision_tower.post_layernorm", "out")
    return vision(
        "model.vision_tower.encoder.layers",
        embed=("model.vision_tower.embeddings", "out"),
        final_norm=norm if normed else None,
    )


row("llava", LLAVA, PLAIN, language(), tower())
row(
    "vipllava",
    {**LLAVA, "vision_feature_layer": [-2, -1], "vision_feature_layers": [-2, -1]},  # older name
    PLAIN,
    language(),
    tower(),
)

# --- Gemma ----------------------------------------------------------------------------------------

PALIGEMMA: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "gemma"},
    "vision_config": SIGLIP,
    "image_token_index": IMAGE,
    "projection_dim": 20,
    "hidden_size": 20,
}
AROUND = replace(LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
GEMMA_TEXT = {
    **GEMMA,
    "num_hidden_layers": 3,
    "layer_types": [*GEMMA["layer_types"], "full_attention"],
}
PREFIX = replace(PLAIN, mask="token_type_ids", prefix=True)
row("paligemma", PALIGEMMA, PREFIX, language(), tower(normed=True))
row(
    "paligemma/2",
    {**PALIGEMMA, "text_config": {**GEMMA_TEXT, "model_type": "gemma2"}},
    PREFIX,
    language(AROUND),
    tower(normed=True),
)
row(
    "gemma3",
    {
        "text_config": {**GEMMA_TEXT, "final_logit_softcapping": None},
        "vision_config": {**SIGLIP, "image_size": 2 * SIDE},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 56,
        "eoi_token_index": 57,
    },
    Picture((1, 3, 2 * SIDE, 2 * SIDE), 4, mask="token_type_ids"),
    language(normed(AROUND, "heads_first")),
    tower(normed=True),
)

# Gemma 4: values have a norm as well, and the image encoder's maps are modules around linear maps.
GEMMA4_VISION = replace(
    with_mlp(attention("self_attn", 2, 8, kv_heads=1, names=O_PROJ), "mlp", down="down_proj"),
    q=Heads("self_attn.q_norm", 2, 8, form="heads"),
    k=Heads("self_attn.k_norm", 1, 8, form="heads"),
    v=Heads("self_attn.v_norm", 1, 8, form="heads"),
    output="self_attn.o_proj.linear",
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
)
row(
    "gemma4",
    {
        "text_config": {**GEMMA4.config, "use_bidirectional_attention": "vision"},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 8,
        },
        "image_token_id": IMAGE,
        "video_token_id": 54,
        "audio_token_id": 53,
        "boi_token_id": 56,
        "eoi_token_id": 57,
    },
    Picture(
        (1, 16, 12),
        4,
        mask="mm_token_type_ids",
        also={"image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]},
    ),
    replace(
        GEMMA4.main, blocks="model.language_model.layers", embed=("model.language_model", "in")
    ),
    vision(
        "model.vision_tower.encoder.layers",
        GEMMA4_VISION,
        embed=("model.vision_tower.patch_embedder", "out"),
    ),
)

# --- Idefics 3 and SmolVLM ------------------------------------------------------------------------

# Images come as [prompts, images, …], and parts of the images are put together four by four.
BIG = 2 * SIDE
IDEFICS3: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": {k: v for k, v in {**CLIP, "image_size": BIG}.items() if k != "model_type"},
    "image_token_id": IMAGE,
    "scale_factor": 2,
}
IDEFICS3_ARGUMENTS = (
    Picture((1, 1, 3, BIG, BIG), 4),
    language(path="model.text_model"),
    vision(
        "model.vision_model.encoder.layers",
        embed=("model.vision_model.embeddings", "out"),
        final_norm=("model.vision_model.post_layernorm", "out"),
    ),
)
row("idefics3", IDEFICS3, *IDEFICS3_ARGUMENTS)
row("smolvlm", IDEFICS3, *IDEFICS3_ARGUMENTS)

# --- Qwen: images are sequences of patches without a batch, of any height and width ---------------

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 54,
    "vision_start_token_id": 56,
    "vision_end_token_id": 57,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 20,
}


def patches(height: int, width: int) -> Picture:
    return Picture(
        (height * width, 3 * 2 * 2 * 2),
        height * width // 4,
        mask="mm_token_type_ids",
        also={"image_grid_thw": [[1, height, width]]},
    )


QWEN_BLOCK = fused("attn", 2, 8, with_mlp(Block(), "mlp", down="fc2"))
QWEN_TEXT = {**TEXT, "rope_parameters": ROPE}
row(
    "qwen2_vl",
    {
        **TOKENS,
        "text_config": {**QWEN_TEXT, "hidden_size": 24},
        "vision_config": {
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 24,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 2,
        },
    },
    patches(4, 4),
    language(),
    vision("model.visual.blocks", QWEN_BLOCK, embed=("model.visual.patch_embed", "out")),
)
# Most blocks look at windows, for which the patches are put into another order.
row(
    "qwen2_5_vl",
    {
        **TOKENS,
        "text_config": {**QWEN_TEXT, "hidden_size": 24},
        "vision_config": {
            **QWEN_VISION,
            "out_hidden_size": 24,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
    },
    patches(4, 8),
    language(),
    vision(
        "model.visual.blocks",
        fused("attn", 2, 8, with_mlp(Block(), "mlp", down="down_proj")),
        embed=("model.visual.patch_embed", "out"),
    ),
)
# Outputs of the first image blocks are added to the text stream, after its first blocks.
QWEN3_VISION = {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
QWEN3_BLOCKS = vision(
    "model.visual.blocks",
    fused("attn", 2, 8, with_mlp(Block(), "mlp", down="linear_fc2")),
    embed=("model.visual.patch_embed", "out"),
)
row(
    "qwen3_vl",
    {**TOKENS, "text_config": QWEN_TEXT, "vision_config": QWEN3_VISION},
    patches(4, 4),
    language(normed(LLAMA, "heads")),
    QWEN3_BLOCKS,
)
EXPERTS = replace(normed(LLAMA, "heads"), mlp_hidden=None, experts="mlp.experts", n_experts=3)
row(
    "qwen3_vl_moe",
    {
        **TOKENS,
        "text_config": {
            **QWEN_TEXT,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [0],
        },
        "vision_config": QWEN3_VISION,
    },
    patches(4, 4),
    language(EXPERTS, other={0: normed(LLAMA, "heads")}),
    QWEN3_BLOCKS,
)

# --- Others ---------------------------------------------------------------------------------------

# InternVL: what a sublayer returns is multiplied with a parameter of the block, one per feature.
INTERN = replace(
    with_mlp(
        attention("attention", 2, 8, names=("q_norm", "k_norm", "v_proj", "projection_layer")),
        "mlp",
        down="fc2",
    ),
    attn_scale="lambda_1",
    mlp_scale="lambda_2",
)
row(
    "internvl",
    {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {
            **{k: v for k, v in CLIP.items() if k not in ("model_type", "projection_dim")},
            "image_size": BIG,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "layer_scale_init_value": 0.7,
            "use_mean_pooling": False,
        },
        "image_token_id": IMAGE,
    },
    Picture((1, 3, BIG, BIG), 4),
    language(),
    vision(
        "model.vision_tower.encoder.layer",
        INTERN,
        embed=("model.vision_tower.embeddings", "out"),
        final_norm=("model.vision_tower.layernorm", "out"),
    ),
)

PIXTRAL: dict[str, Any] = {**CLIP, "model_type": "pixtral", "image_size": BIG}
PIXTRAL_BLOCK = with_mlp(
    attention("attention", 2, 8, names=O_PROJ), "feed_forward", down="down_proj"
)
row(
    "mistral3",
    {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": 3},
        "vision_config": PIXTRAL,
        "image_token_index": IMAGE,
    },
    Picture((1, 3, BIG, SIDE), 2, also={"image_sizes": [[BIG, SIDE]]}),
    language(),
    vision("model.vision_tower.transformer.layers", PIXTRAL_BLOCK),
)

# Cohere: attention and the MLP read the same norm.
COHERE = {
    **{k: v for k, v in TEXT.items() if k != "head_dim"},
    "model_type": "cohere2",
    "hidden_size": 24,
    "logit_scale": 0.5,
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
PARALLEL = replace(LLAMA, middle="none")
MERGED = Picture((1, 3, BIG, BIG), 4)
row(
    "aya_vision",
    {
        "text_config": COHERE,
        "vision_config": {**SIGLIP, "image_size": BIG},
        "image_token_index": IMAGE,
    },
    MERGED,
    language(PARALLEL),
    tower(),
)
row(
    "cohere2_vision",
    {
        "text_config": COHERE,
        "vision_config": {**SIGLIP, "image_size": BIG},
        "image_token_id": IMAGE,
        "alignment_intermediate_size": 20,
    },
    MERGED,
    language(PARALLEL),
    tower(normed=True),
)

# LLaVA-NeXT: a batch of tiles, with a token after each row of tiles.
TILES = Picture((1, 3, 3, SIDE, SIDE), 14, also={"image_sizes": [[SIDE, BIG]]})
row(
    "llava_next",
    {**LLAVA, "image_grid_pinpoints": [[SIDE, BIG]]},
    TILES,
    language(),
    tower(),
)

row(
    "llava_onevision",
    {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": 54,
        "image_grid_pinpoints": [[SIDE, BIG]],
    },
    TILES,
    language(),
    tower(),
)

# GOT-OCR 2: a grid of patches, [1, height, width, features]. Some blocks look at windows: their
# attention has the windows as its batch. Here there are none of those.
row(
    "got_ocr2",
    {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 16,
            "output_channels": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "window_size": 2,
            "global_attn_indexes": [0, 1],
            "mlp_dim": 24,
        },
        "image_token_index": IMAGE,
    },
    Picture((1, 3, 32, 32), 4),
    language(),
    vision(
        "model.vision_tower.layers",
        fused("attn", 2, 8, with_mlp(Block(), "mlp", down="lin2")),
        embed=("model.vision_tower.patch_embed", "out"),
    ),
)

# Llama 4: experts get every token, multiplied by the router's weight: not (tokens, indices,
# weights). `qk_norm` comes after rotary, one module for queries and keys.
LLAMA4 = with_mlp(
    attention("self_attn", 4, 6, kv_heads=2, names=O_PROJ), "feed_forward", down="down_proj"
)
row(
    "llama4",
    {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 28,
            "intermediate_size": 12,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "moe_layers": [1],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 3,
            "floor_scale": 4,
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "projector_input_dim": 20,
            "projector_output_dim": 20,
            "vision_output_dim": 20,
            "image_size": BIG,
            "patch_size": 4,
        },
        "image_token_index": IMAGE,
        "boi_token_index": 56,
        "eoi_token_index": 57,
    },
    MERGED,
    language(
        LLAMA4,
        "language_model.model",
        "language_model.lm_head",
        other={1: replace(LLAMA4, mlp_hidden=None)},
    ),
    vision(
        "vision_model.model.layers",
        with_mlp(attention("self_attn", 2, 8, names=O_PROJ), "mlp", down="fc2"),
        final_norm=("vision_model.layernorm_post", "out"),
    ),
)

# --- And others -----------------------------------------------------------------------------------

# GLM-4V: norms before and after sublayers; each MLP of the text has its gate in the same map.
row(
    "glm4v",
    {
        **{k: v for k, v in TOKENS.items() if k.endswith("o_token_id") or k.startswith("image")},
        "image_start_token_id": 56,
        "image_end_token_id": 57,
        "video_start_token_id": 58,
        "video_end_token_id": 59,
        "text_config": {**QWEN_TEXT, "hidden_size": 24},
        "vision_config": {**QWEN_VISION, "out_hidden_size": 24, "image_size": SIDE},
    },
    patches(4, 4),
    language(replace(LLAMA, attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")),
    vision(
        "model.visual.blocks",
        fused("attn", 2, 8, with_mlp(Block(), "mlp", down="down_proj")),
        embed=("model.visual.patch_embed", "out"),
        final_norm=("model.visual.post_layernorm", "out"),
    ),
)

# Idefics 2: learned vectors read the image in a separate stack between image encoder and text.
row(
    "idefics2",
    {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": 3},
        "vision_config": {k: v for k, v in CLIP.items() if k != "model_type"},
        "perceiver_config": {
            "hidden_size": 20,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
        },
        "image_token_id": IMAGE,
    },
    Picture((1, 1, 3, SIDE, SIDE), 3),
    language(path="model.text_model"),
    vision(
        "model.vision_model.encoder.layers",
        embed=("model.vision_model.embeddings", "out"),
        final_norm=("model.vision_model.post_layernorm", "out"),
    ),
)

SEEN = ("model.vision_model.embeddings", "out")
NORM = ("model.vision_model.post_layernorm", "out")
row(
    "deepseek_vl",
    {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": SIGLIP,
        "image_token_id": IMAGE,
    },
    PLAIN,
    language(),
    vision("model.vision_model.encoder.layers", embed=SEEN, final_norm=NORM),
)
JANUS = with_mlp(
    attention("self_attn", 2, 8, names=("q_proj", "k_proj", "v_proj", "projection_layer")),
    "mlp",
    down="fc2",
)
row(
    "janus",
    {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {
            **{k: v for k, v in CLIP.items() if k not in ("model_type", "intermediate_size")},
            "mlp_ratio": 1.5,
            "projection_dim": 20,
        },
        "vq_config": {
            "embed_dim": 4,
            "num_embeddings": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 8,
            "image_token_embed_dim": 8,
        },
        "image_token_id": IMAGE,
    },
    PLAIN,
    language(),
    vision("model.vision_model.encoder.layers", JANUS, embed=SEEN),
)
row(
    "lighton_ocr",
    {
        "text_config": {**TEXT, "model_type": "qwen3"},
        "vision_config": PIXTRAL,
        "image_token_id": IMAGE,
    },
    Picture((1, 3, BIG, SIDE), 2, also={"image_sizes": [[BIG, SIDE]]}),
    language(normed(LLAMA, "heads")),
    vision("model.vision_encoder.transformer.layers", PIXTRAL_BLOCK),
)
