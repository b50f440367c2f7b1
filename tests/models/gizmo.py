"""The entry of a family that the finder can't read without help, in one file.

Its output projection has an unknown name, and attention's output is halved before it is added.
"""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.models.shape import BlockArrangement, Family, ModelConfig, family


@family("gizmo")
class Gizmo(Family):
    """Llama's blocks, with other names."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"attention": "mixing", "output": "mixing.gizmo", "mlp": "thinking"}

    def scales(self, config: ModelConfig) -> Mapping[str, float]:
        return {"attn_out": config["half"]}
