"""Vision encoders: `embed` is the sum of patches, class tokens and positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .parts import Architecture, Block, Heads, Refused, Stack

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
LABELS = {"num_labels": 7}
WIDE = {**CONFIG, "hidden_size": 20, "head_dim": 6}
"""Config with heads wider than width / heads."""
DINO_CONFIG = {**WIDE, "mlp_ratio": 2, "layerscale_value": 0.7}

VIT = Block(
    attn_norm="attention",
    q=Heads("attention.q_proj", 4, 6),
    k=Heads("attention.k_proj", 4, 6),
    v=Heads("attention.v_proj", 4, 6),
    output="attention.o_proj",
    heads=4,
    width=6,
    attn_out="attention",
    mlp_norm="mlp",
    mlp_hidden="mlp.fc2",
    mlp_out="mlp",
)
# Both sublayers are scaled, feature by feature, by a module before they are added.
DINO = replace(VIT, attn_out="layer_scale1", mlp_out="layer_scale2")
DINO_3 = replace(
    DINO,
    q=Heads("attention.q_proj", 3, 8),
    k=Heads("attention.k_proj", 3, 8),
    v=Heads("attention.v_proj", 3, 8),
    heads=3,
    width=8,
    mlp_hidden="mlp.down_proj",
)
AIM = replace(
    VIT, output="attention.out_proj", mlp_norm="ffn", mlp_hidden="ffn.down_proj", mlp_out="ffn"
)
CLIP = replace(
    VIT,
    attn_norm="self_attn",
    q=Heads("self_attn.q_proj", 4, 6),
    k=Heads("self_attn.k_proj", 4, 6),
    v=Heads("self_attn.v_proj", 4, 6),
    output="self_attn.out_proj",
    attn_out="self_attn",
)
# A matrix for queries, keys and values side by side.
BLIP = replace(
    CLIP,
    q=Heads("self_attn.qkv", 4, 6),
    k=Heads("self_attn.qkv", 4, 6, start=24),
    v=Heads("self_attn.qkv", 4, 6, start=48),
    output="self_attn.projection",
)
# BERT's names with norms before the sublayers.
DATA2VEC = Block(
    attn_norm="attention",
    q=Heads("attention.attention.query", 4, 6),
    k=Heads("attention.attention.key", 4, 6),
    v=Heads("attention.attention.value", 4, 6),
    output="attention.output.dense",
    heads=4,
    width=6,
    attn_out="attention",
    mlp_norm="intermediate",
    mlp_hidden="output.dense",
    mlp_out="output",
)


def stack(base: str, one: Block, norm: str | None = "layernorm", blocks: str = "layers") -> Stack:
    """Two blocks in the module `base`."""
    base += "." if base else ""
    final = None if norm is None else (base + norm, "out")
    return Stack(base + blocks, 2, one, embed=(base + "embeddings", "out"), final_norm=final)


def bare(name: str, main: Stack, config: dict[str, Any] = CONFIG, **changes: Any) -> Architecture:
    """A model without a head."""
    made: dict[str, Any] = {"build": "AutoModel", "takes": "image"}
    return Architecture(name, config, main, **(made | changes))


def classifier(name: str, main: Stack, config: dict[str, Any] = CONFIG) -> Architecture:
    """A model that classifies images."""
    return bare(name, main, {**config, **LABELS}, build="AutoModelForImageClassification")


def pair(name: str, base: str, one: Block, config: dict[str, Any], **names: Any) -> list[Any]:
    """The classifier, and the model without a head."""
    return [
        classifier(name, stack(base, one, **names), config),
        bare(f"{name}/bare", stack("", one, **names), config),
    ]


def scaled(one: Block) -> Block:
    """With both sublayers scaled, feature by feature, by parameters of the block."""
    return replace(one, attn_scale="lambda_1", mlp_scale="lambda_2")


# Their last norm is for the pooled class token alone: nothing that is returned comes from it.
CLIP_STACK = stack("", CLIP, None, "encoder.layers")
CLIP_CONFIG = {"text_config": {"vocab_size": 61}, "vision_config": CONFIG, "projection_dim": 9}
SIGLIP = stack("", CLIP, "post_layernorm", "encoder.layers")
SIGLIP_CONFIG = {"text_config": {"vocab_size": 61}, "vision_config": CONFIG}
BEIT_CONFIG = {
    **CONFIG,
    "layer_scale_init_value": 0.7,
    "use_mean_pooling": False,
    "use_relative_position_bias": True,
    # A stream of zeros is made by a division here: its rounding isn't to be normed to one.
    "layer_norm_eps": 1e-5,
}
UNSCALED = {**BEIT_CONFIG, "layer_scale_init_value": 0.0}

TABLE: list[Architecture | Refused] = [
    *pair("vit", "vit", VIT, WIDE),
    # A distillation token after the class token.
    bare(
        "deit",
        stack("deit", VIT),
        {**WIDE, **LABELS},
        build="DeiTForImageClassification",
    ),
    bare(
        "deit/teacher",
        stack("deit", VIT),
        {**WIDE, **LABELS},
        build="DeiTForImageClassificationWithTeacher",
    ),
    bare("deit/bare", stack("", VIT), WIDE),
    *pair("vit_msn", "vit", VIT, WIDE),
    # No class token.
    *pair("ijepa", "ijepa", VIT, WIDE),
    *pair("dinov2", "dinov2", DINO, DINO_CONFIG, blocks="encoder.layer"),
    bare(
        "dinov2/gated",
        stack("", replace(DINO, mlp_hidden="mlp.down_proj"), blocks="encoder.layer"),
        {**DINO_CONFIG, "use_swiglu_ffn": True},
    ),
    *pair(
        "dinov2_with_registers", "dinov2_with_registers", DINO, DINO_CONFIG, blocks="encoder.layer"
    ),
    # Rotary positions: `embed` has none.
    bare(
        "dinov3_vit",
        stack("", DINO_3, "norm", "model.layer"),
        {**CONFIG, "num_attention_heads": 3, "num_register_tokens": 2, "layerscale_value": 0.7},
    ),
    bare(
        "dinov3_vit/gated",
        stack("", DINO_3, "norm", "model.layer"),
        {**CONFIG, "num_attention_heads": 3, "use_gated_mlp": True},
    ),
    bare("pixio", stack("", VIT), WIDE),
    bare("tipsv2_vision_model", stack("", DINO, blocks="encoder.layer"), DINO_CONFIG),
    # No last norm; class tokens and registers before the patches.
    bare(
        "radio",
        stack("", DINO, None, "encoder.layer"),
        {**DINO_CONFIG, "mlp_ratio": 1.5, "max_img_size": 16, "num_registers": 2},
    ),
    # The first block reads the normed embeddings.
    bare("clip_vision_model", CLIP_STACK),
    bare("clip_vision_model/class", CLIP_STACK, build="CLIPVisionModel"),
    classifier("clip", stack("vision_model", CLIP, None, "encoder.layers"), CLIP_CONFIG),
    bare("metaclip_2_vision_model", CLIP_STACK, build="MetaClip2VisionModel"),
    bare("chinese_clip_vision_model", CLIP_STACK),
    # Pools with attention; the head isn't what the model returns.
    bare("siglip_vision_model", SIGLIP),
    classifier(
        "siglip", stack("vision_model", CLIP, "post_layernorm", "encoder.layers"), SIGLIP_CONFIG
    ),
    bare("aimv2_vision_model", stack("", AIM, "rms_norm", "encoder.layers")),
    # The last norm is called twice: on all tokens, then on its output for the class token.
    bare("blip_vision_model", stack("", BLIP, None, "encoder.layers"), build="BlipVisionModel"),
    *pair(
        "data2vec-vision", "data2vec_vision", scaled(DATA2VEC), BEIT_CONFIG, blocks="encoder.layer"
    ),
    classifier(
        "data2vec-vision/unscaled",
        stack("data2vec_vision", DATA2VEC, blocks="encoder.layer"),
        UNSCALED,
    ),
    *pair("beit", "beit", scaled(VIT), BEIT_CONFIG),
    classifier("beit/unscaled", stack("beit", VIT), UNSCALED),
    # The norm is then after the average of the patches.
    bare("beit/average", stack("", scaled(VIT), None), {**BEIT_CONFIG, "use_mean_pooling": True}),
    Refused("convnext", "it has no attention, and its stages differ in width"),
    Refused("resnet", "it has no attention, and its stages differ in width"),
    Refused(
        "siglip2_vision_model", "it needs patches with a mask and sizes, not only pixel values"
    ),
    Refused(
        "swin", "its stages differ in width, and its attention is limited to windows of the image"
    ),
    Refused(
        "swinv2", "its stages differ in width, and its attention is limited to windows of the image"
    ),
    Refused("vit_mae", "it drops random patches in every run"),
]
