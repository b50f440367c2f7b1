"""Families of text decoders: GPT-2, Llama and their descendants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

from mechdsl.models.shape import (
    BlockAnatomy,
    BlockArrangement,
    Family,
    ModelConfig,
    TensorLayout,
    family,
)


@family("gpt_neox")
class GPTNeoX(Family):
    """Parallel unless the config says otherwise."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "parallel" if config.get("use_parallel_residual", True) else "front"


@family("falcon")
class Falcon(Family):
    """Positions are rotary or added to the scores; parallel or not."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        parallel = config.get("parallel_attn") or config.get("new_decoder_architecture")
        return "parallel" if parallel else "front"


@family("codegen")
class CodeGen(Family):
    """Queries, values and keys, in this order, for each of four groups of heads."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "parallel"

    def fused(self, n_heads: int, n_kv_heads: int, width: int) -> Mapping[str, TensorLayout] | None:
        group = n_heads // 4
        return {
            site: TensorLayout(
                n_heads, width, offset=i * group * width, stride=3 * group * width, group=group
            )
            for i, site in enumerate(("q", "v", "k"))
        }


@family("gpt_bigcode")
class GPTBigCode(Family):
    """With a key for every head, each head's query, key and value lie together."""

    interleaved = True


@family("bloom")
class Bloom(Family):
    """Its sublayers add the residual themselves; what they add is their projection's output."""

    additive_positions = True

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {
            "attn_out": "self_attention.dense",
            "mlp_out": "mlp.dense_4h_to_h",
            "mlp": "mlp.dense_h_to_4h, mlp.dense_4h_to_h",
        }

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if not config.get("apply_residual_connection_post_layernorm"):
            return block
        # The sublayer's output is added to the normed stream.
        tap = block.taps["resid_mid"]
        middle = replace(tap, path=f"{block.path}.self_attention")
        return replace(block.with_taps(resid_mid=middle), adds_up=False)


@family("mpt")
class MPT(Family):
    """Its MLP adds the residual itself."""

    additive_positions = True

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"mlp_out": "ffn.down_proj", "mlp": "ffn.up_proj, ffn.down_proj"}


@family("gpt_neox_japanese")
class GPTNeoXJapanese(Family):
    """The last block adds a bias to what attention returns, outside of all modules."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if layer < config["num_hidden_layers"] - 1:
            return block
        return replace(block.without("attn_out", "resid_mid"), adds_up=False)


@family("dbrx")
class DBRX(Family):
    """Attention and the norms around it are one module."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"norms": "norm_attn_norm.norm_1, norm_attn_norm.norm_2"}


@family("ctrl")
class CTRL(Family):
    """Attention is handed its input three times."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"down": "ffn.2"}

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return {"attn_norm": "attention receives it three times, for queries, keys and values"}


@family("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "phi3")
class SequentialDecoder(Family):
    """Attention, then MLP, each added to the stream in turn."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"


@family("gptj", "phi", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text")
class ParallelDecoder(Family):
    """One norm, read by attention and MLP side by side."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "parallel"


@family("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat", "llama4_text")
class NormAfterRotary(Family):
    """Query and key norms come after rotary."""

    norms_after_rotary = True


@family("minicpm3")
class MiniCPM(Family):
    """What is added shrinks with depth."""

    def scales(self, config: ModelConfig) -> Mapping[str, float]:
        by = float(config["scale_depth"]) / sqrt(config["num_hidden_layers"])
        return {"attn_out": by, "mlp_out": by}
