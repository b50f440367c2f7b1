"""Families of models: only what neither the config nor the module tree tells.

A new entry is one `@family`-decorated class; the finder does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mechdsl.models.anatomy import Side
from mechdsl.registry import Registry


class Family:
    """What holds of a family that is found by its modules alone; entries override."""

    taps: ClassVar[Mapping[str, tuple[str, Side]]] = {}
    """Site to (path within a block, side), where the finder's own choice would be wrong."""
    qk_norm_heads_first: ClassVar[bool] = False
    """Query and key norms see `[B, H, T, d_head]` instead of `[B, T, H, d_head]`."""
    additive_positions: ClassVar[bool] = False
    """Positions are added to the scores (ALiBi), so that a zero query doesn't attend uniformly."""

    @staticmethod
    def parallel(config: Mapping[str, Any]) -> bool | None:
        """Whether attention and MLP read the same stream; None: only the modules can tell."""
        value = config.get("use_parallel_residual", config.get("parallel_attn"))
        return None if value is None else bool(value)


FAMILIES: Registry[type[Family]] = Registry("model family")


def family(*model_types: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family under the `model_type`s of its configs."""

    def register(entry: type[Family]) -> type[Family]:
        for name in model_types:
            FAMILIES.add(name, entry)
        return entry

    return register


def family_of(model_type: str) -> type[Family]:
    """The entry of a `model_type`, or the defaults."""
    return FAMILIES.get(model_type) or Family


@family("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "phi3")
class Sequential(Family):
    """Attention, then MLP, each added to the stream in turn."""

    @staticmethod
    def parallel(config: Mapping[str, Any]) -> bool | None:
        return False


@family("gpt_neox")
class GPTNeoX(Family):
    """Parallel unless the config says otherwise."""

    @staticmethod
    def parallel(config: Mapping[str, Any]) -> bool | None:
        return bool(config.get("use_parallel_residual", True))


@family("gptj", "phi", "cohere", "cohere2")
class Parallel(Family):
    """One norm, read by attention and MLP side by side."""

    @staticmethod
    def parallel(config: Mapping[str, Any]) -> bool | None:
        return True


@family("bloom")
class Bloom(Sequential):
    """Its sublayers add the residual themselves; what they add is their projection's output."""

    taps: ClassVar[Mapping[str, tuple[str, Side]]] = {
        "attn_out": ("self_attention.dense", "out"),
        "mlp_out": ("mlp.dense_4h_to_h", "out"),
    }
    additive_positions = True


@family("mpt")
class MPT(Sequential):
    """Its MLP adds the residual itself."""

    taps: ClassVar[Mapping[str, tuple[str, Side]]] = {"mlp_out": ("ffn.down_proj", "out")}
    additive_positions = True


@family("gemma3_text", "exaone4", "apertus")
class NormedHeads(Sequential):
    """Query and key norms stand behind the transpose."""

    qk_norm_heads_first = True
