"""Llama and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from mechdsl.models.adapters import Arrangement, Config, Family, family


@family("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "phi3")
class Sequential(Family):
    """Attention, then MLP, each added to the stream in turn."""

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        return "front"


@family("gptj", "phi", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text")
class Parallel(Family):
    """One norm, read by attention and MLP side by side."""

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        return "parallel"


@family("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat", "llama4_text")
class NormedBehindRotary(Family):
    """Query and key norms come after rotary."""

    norms_behind_rotary = True


@family("minicpm3")
class MiniCPM(Family):
    """What is added shrinks with depth."""

    @staticmethod
    def scales(config: Config) -> Mapping[str, float]:
        by = float(config["scale_depth"]) / sqrt(config["num_hidden_layers"])
        return {"attn_out": by, "mlp_out": by}
