"""Encoders of images, and vision-language models."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.models.adapters import Arrangement, Config, Family, family
from mechdsl.models.anatomy import BlockAnatomy

MOST_REGISTERS = 1_000


class Classed(Family):
    """A class token in front of the patches."""

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        return ("cls",)


@family(
    "vit", "vit_msn", "clip_vision_model", "metaclip_2_vision_model", "chinese_clip_vision_model"
)
class ViT(Classed):
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


@family("siglip_text_model")
class SigLIPTexts(Family):
    """Every token sees every other."""

    encodes = True


@family("deit")
class DeiT(Family):
    """A token behind the class token that is taught by another model."""

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        return ("cls", "distillation")


@family("ijepa", "siglip_vision_model")
class Unclassed(Family):
    """Patches alone."""

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        return ()


@family("dinov2")
class DINOv2(Classed):
    """Positions are interpolated for images of other sizes."""

    @staticmethod
    def any_size(config: Config) -> bool:
        return True


def _with_registers(count: object) -> tuple[str, ...] | None:
    if not isinstance(count, int) or not 0 <= count <= MOST_REGISTERS:
        return None
    return ("cls", *["register"] * count)


@family("dinov2_with_registers")
class Registers(DINOv2):
    """Registers behind the class token."""

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        return _with_registers(config.get("num_register_tokens", 4))


@family("dinov3_vit")
class DINOv3(Registers):
    """The same; positions are turned in."""

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        return _with_registers(config.get("num_register_tokens", 0))


class LayerScaled(Classed):
    """What is added is multiplied with parameters of the block, feature by feature."""

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        return "front"

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
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

    staged = "it has stages of several widths, and attention in windows of the image"


@family("beit", "data2vec-vision")
class BEiT(LayerScaled):
    """Layer scale may be left out; positions are added to the scores."""

    additive_positions = True

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        scaled = config.get("layer_scale_init_value")
        return LayerScaled.block(config, layer, block) if scaled else block
