"""Vision-language models: how an image is given to them, mostly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mechdsl.models.adapters import Config, Family, Inputs, family
from mechdsl.models.anatomy import BlockAnatomy
from mechdsl.models.families.vision import LayerScaled


def _square(config: Config) -> tuple[int, int]:
    """(channels, pixels of a side) of what the image encoder sees."""
    vision = config["vision_config"]
    size = vision["image_size"]
    return int(vision.get("num_channels") or 3), int(size if isinstance(size, int) else size[0])


@family("idefics2", "idefics3", "smolvlm")
class Idefics(Family):
    """Every prompt has a list of images."""

    @staticmethod
    def picture(config: Config) -> Inputs:
        channels, side = _square(config)
        return {"pixel_values": (1, 1, channels, side, side)}


@family("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v")
class Patches(Family):
    """An image is a list of patches, and how many stand above and beside one another."""

    @staticmethod
    def picture(config: Config) -> Inputs:
        vision = config["vision_config"]
        side, frames = vision["patch_size"], vision["temporal_patch_size"]
        merged = vision["spatial_merge_size"]
        high, wide = 2 * merged, 4 * merged
        width = vision["in_channels"] * frames * side * side
        return {"pixel_values": (high * wide, width), "image_grid_thw": [[1, high, wide]]}


@family("llava_next", "llava_onevision")
class Tiles(Family):
    """The whole image, and its parts as they are."""

    @staticmethod
    def picture(config: Config) -> Inputs:
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

    @staticmethod
    def picture(config: Config) -> Inputs:
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

    @staticmethod
    def picture(config: Config) -> Inputs:
        vision = config["vision_config"]
        pooled = vision["pooling_kernel_size"]
        places = [[x, y] for y in range(2 * pooled) for x in range(2 * pooled)]
        return {
            "pixel_values": (1, len(places), 3 * vision["patch_size"] ** 2),
            "image_position_ids": [places],
        }


@family("qwen3_vl_text", "qwen3_vl_moe_text")
class Fed(Family):
    """What the first blocks of the image encoder return is added between blocks of the text's."""

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        return replace(block, fed=True)


@family("internvl_vision")
class InternVision(LayerScaled):
    """What is added is always scaled."""
