"""The entry of a family that the finder can't read by itself: all that it takes is one such file.

Its output projection goes by a name that nobody has heard of, and attention adds half of what it
returns.
"""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.models.anatomy import BlockArrangement, Family, ModelConfig, family


@family("gizmo")
class Gizmo(Family):
    """Llama's blocks, with other names."""

    @staticmethod
    def arrangement(config: ModelConfig) -> BlockArrangement | None:
        return "front"

    @staticmethod
    def parts(config: ModelConfig) -> Mapping[str, str]:
        return {"attention": "mixing", "output": "mixing.gizmo", "mlp": "thinking"}

    @staticmethod
    def scales(config: ModelConfig) -> Mapping[str, float]:
        return {"attn_out": config["half"]}
