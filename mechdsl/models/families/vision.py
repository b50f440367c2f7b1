"""Encoders of images, and vision-language models."""

from __future__ import annotations

from dataclasses import replace

from mechdsl.models.adapters import Arrangement, Config, Family, family
from mechdsl.models.anatomy import BlockAnatomy


class LayerScaled(Family):
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


@family("beit", "data2vec-vision")
class BEiT(LayerScaled):
    """Layer scale may be left out; positions are added to the scores."""

    additive_positions = True

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        scaled = config.get("layer_scale_init_value")
        return LayerScaled.block(config, layer, block) if scaled else block
