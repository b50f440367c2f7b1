"""Families of image encoders and vision-language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mechdsl.models.shape import (
    ATTENDED,
    TILES,
    BlockAnatomy,
    BlockArrangement,
    Family,
    ModelConfig,
    ModelInputs,
    family,
)

MAX_REGISTERS = 1_000


class ClassTokenEncoder(Family):
    """A family with a class token before the patches."""

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        return ("cls",)


@family(
    "vit", "vit_msn", "clip_vision_model", "metaclip_2_vision_model", "chinese_clip_vision_model"
)
class ViT(ClassTokenEncoder):
    """As most have it."""


@family("clip", "metaclip_2")
class CLIP(Family):
    """Both towers. An image has one caption: the scores of texts are logits of a softmax."""

    scores = "one label"


@family("siglip")
class SigLIP(Family):
    """Each pair of an image and a text is right or not by itself."""

    scores = "many labels"
    padded = True


@family("paligemma")
class PaliGemma(Family):
    """Its config states that the language model sees later tokens, which holds for prompts."""

    prefix = True


@family("mllama_text_model")
class Mllama(Family):
    """Llama 3.2 Vision: every few blocks attend to an image in place of earlier tokens."""

    attends_apart = True

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"cross_norm": "input_layernorm"}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if layer not in config["cross_attention_layers"]:
            return block
        gates = {"attn_out": "cross_attn_attn_gate", "mlp_out": "cross_attn_mlp_gate"}
        return block.with_taps(
            **{
                site: replace(block.taps[site], scaled_by=f"{block.path}.{gate}", squashed=True)
                for site, gate in gates.items()
                if site in block.taps
            }
        )

    def whole(self, config: ModelConfig) -> str:
        return "some of its blocks attend to an image"


@family("mllama")
class MllamaWithImages(Family):
    """The same with its image encoder."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        vision = config["vision_config"]
        tiles, side = vision["max_num_tiles"], vision["image_size"]
        patches = (side // vision["patch_size"]) ** 2 + 1
        width = config["text_config"]["hidden_size"]
        ratios = vision["supported_aspect_ratios"]
        largest = max(range(len(ratios)), key=lambda n: ratios[n][0] * ratios[n][1])
        filled = ratios[largest][0] * ratios[largest][1]
        mask = [1] * filled + [0] * (tiles - filled)
        return {
            ATTENDED: (1, tiles * patches, width),
            TILES: [[mask]],
            "pixel_values": (1, 1, tiles, vision["num_channels"], side, side),
            "aspect_ratio_ids": [[largest + 1]],
            "aspect_ratio_mask": [[mask]],
        }


@family("mllama_vision_model")
class MllamaVision(Family):
    """Two encoders, of which the second has gates. A norm and positions of tiles lie between."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"final_norm": ""}

    def block_lists(self, config: ModelConfig) -> Mapping[str, int]:
        count = int(config.get("num_global_layers", 8))
        return {
            "vision_model.transformer.layers": int(config["num_hidden_layers"]),
            "vision_model.global_transformer.layers": count,
        }

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if ".global_transformer." not in block.path:
            is_last = layer == config["num_hidden_layers"] - 1
            return replace(block, stream_scale=None) if is_last else block
        gates = {"attn_out": "gate_attn", "resid_mid": "gate_attn", "mlp_out": "gate_ffn"}
        return block.with_taps(
            **{
                site: replace(block.taps[site], scaled_by=f"{block.path}.{name}", squashed=True)
                for site, name in gates.items()
                if site in block.taps
            }
        )


@family("siglip_text_model")
class SigLIPTexts(Family):
    """Every token sees every other."""

    encodes = True


@family("deit")
class DeiT(Family):
    """A token after the class token that is taught by another model."""

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        return ("cls", "distillation")


@family("ijepa", "siglip_vision_model")
class PatchEncoder(Family):
    """Patches alone."""

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        return ()


@family("dinov2")
class DINOv2(ClassTokenEncoder):
    """Positions are interpolated for images of other sizes."""

    def any_size(self, config: ModelConfig) -> bool:
        return True


def _with_registers(count: object) -> tuple[str, ...] | None:
    if not isinstance(count, int) or not 0 <= count <= MAX_REGISTERS:
        return None
    return ("cls", *["register"] * count)


@family("dinov2_with_registers")
class RegisterEncoder(DINOv2):
    """Registers after the class token."""

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        return _with_registers(config.get("num_register_tokens", 4))


@family("dinov3_vit")
class DINOv3(RegisterEncoder):
    """The same; positions are turned in."""

    def fixed_tokens(self, config: ModelConfig) -> str:
        return "its attention rotates the last tokens by the positions of patches"

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        return _with_registers(config.get("num_register_tokens", 0))


class LayerScaleEncoder(ClassTokenEncoder):
    """A family that scales sublayer outputs by block parameters, feature by feature."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        factors = {"attn_out": "lambda_1", "resid_mid": "lambda_1", "mlp_out": "lambda_2"}
        return block.with_taps(
            **{
                site: replace(block.taps[site], scaled_by=f"{block.path}.{name}")
                for site, name in factors.items()
            }
        )


@family("swin", "swinv2")
class Swin(Family):
    """Patches merge from stage to stage: what is a token in one layer is none in another."""

    staged = "its stages differ in width, and its attention is limited to windows of the image"


@family("beit", "data2vec-vision")
class BEiT(LayerScaleEncoder):
    """Layer scale may be left out; positions are added to the scores."""

    additive_positions = True

    def fixed_tokens(self, config: ModelConfig) -> str:
        biases = ("use_relative_position_bias", "use_shared_relative_position_bias")
        if not any(config.get(name, True) for name in biases):
            return ""
        return "its attention has a bias for each pair of its tokens, and none for others"

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        scaled = config.get("layer_scale_init_value")
        return super().block(config, layer, block) if scaled else block


def _square(config: ModelConfig) -> tuple[int, int]:
    """Return (channels, pixels per side) of the image encoder's input."""
    vision = config["vision_config"]
    size = vision["image_size"]
    return int(vision.get("num_channels") or 3), int(size if isinstance(size, int) else size[0])


@family("idefics2", "idefics3", "smolvlm")
class Idefics(Family):
    """Every prompt has a list of images."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        channels, side = _square(config)
        return {"pixel_values": (1, 1, channels, side, side)}


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
class PatchListEncoder(Family):
    """An image is a list of patches, with the number of their rows and columns."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        vision = config["vision_config"]
        side, frames = vision["patch_size"], vision["temporal_patch_size"]
        merged = vision["spatial_merge_size"]
        high, wide = 2 * merged, 4 * merged
        width = vision["in_channels"] * frames * side * side
        return {"pixel_values": (high * wide, width), "image_grid_thw": [[1, high, wide]]}


@family("llava_next", "llava_onevision")
class TileEncoder(Family):
    """The whole image, and its parts as they are."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        channels, side = _square(config)
        grid: list[Any] = min(config["image_grid_pinpoints"], key=lambda one: one[0] * one[1])
        tiles = 1 + (grid[0] // side) * (grid[1] // side)
        return {
            "pixel_values": (1, tiles, channels, side, side),
            "image_sizes": [list(grid)],
        }


@family("mistral3", "lighton_ocr")
class Pixtral(Family):
    """Images of any size, filled up to the largest."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        vision = config["vision_config"]
        step = vision["patch_size"] * config["spatial_merge_size"]
        high, wide = 2 * step, step
        return {
            "pixel_values": (1, vision["num_channels"], high, wide),
            "image_sizes": [[high, wide]],
        }


@family("gemma4")
class Gemma4Vision(Family):
    """A list of patches, and where each of them stands."""

    def picture(self, config: ModelConfig) -> ModelInputs:
        vision = config["vision_config"]
        pooled = vision["pooling_kernel_size"]
        places = [[x, y] for y in range(2 * pooled) for x in range(2 * pooled)]
        return {
            "pixel_values": (1, len(places), 3 * vision["patch_size"] ** 2),
            "image_position_ids": [places],
        }


@family("qwen3_vl_text", "qwen3_vl_moe_text")
class InjectedEncoder(Family):
    """What the first blocks of the image encoder return is added between blocks of the text's."""

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        return replace(block, fed=True)


@family("internvl_vision")
class InternVision(LayerScaleEncoder):
    """What is added is always scaled."""
