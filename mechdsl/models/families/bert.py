"""BERT's kin and other encoders of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

from mechdsl.models.adapters import Arrangement, Config, Family, family
from mechdsl.models.anatomy import BlockAnatomy

_PADDING = "padding changes what it returns, as {}; prompts of several lengths can't be run at once"


@family("convbert")
class ConvBERT(Family):
    """Half of its heads are convolutions."""

    @staticmethod
    def refused(config: Config) -> str:
        return _PADDING.format("a convolution beside attention reads the tokens of padding")


@family("fnet")
class FNet(Family):
    """A Fourier transform in attention's place."""

    @staticmethod
    def refused(config: Config) -> str:
        return _PADDING.format("its Fourier transform is over all tokens, without a mask")


@family("nystromformer")
class Nystromformer(Family):
    """A convolution over values is added to what attention returns."""

    @staticmethod
    def refused(config: Config) -> str:
        return _PADDING.format("a convolution over values reads the tokens of padding")


@family("yoso")
class YOSO(Family):
    """Attention without softmax."""

    @staticmethod
    def refused(config: Config) -> str:
        return _PADDING.format("its attention doesn't look at the mask")


@family("albert")
class ALBERT(Family):
    """One module for all layers; here are the paths where each layer has its own."""

    @staticmethod
    def refused(config: Config) -> str:
        shared = config.get("num_hidden_groups", 1) < config["num_hidden_layers"]
        if shared or config.get("inner_group_num", 1) > 1:
            return "its blocks are one module, which is called again for every layer"
        return ""

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        own = "albert_layers.0"
        return {
            "attention": f"{own}.attention",
            "output": f"{own}.attention.dense",
            "attn_out": f"{own}.attention.dense",
            "mlp": f"{own}.ffn, {own}.ffn_output",
            "mlp_out": f"{own}.ffn_output",
            "middle": f"{own}.attention.LayerNorm",
            "end": f"{own}.full_layer_layer_norm",
        }

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        return "behind the sum"


@family("xmod")
class XMOD(Family):
    """Adapters of languages add to the stream behind the MLP."""

    adds_up = False

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        return {"end": ""}

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        return replace(block, passes_on=False)


@family("mpnet")
class MPNet(Family):
    """BERT's blocks with an attention module of their own, and biases by position."""

    additive_positions = True

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        return {
            "attention": "attention.attn",
            "output": "attention.attn.o",
            "attn_out": "attention.attn",
            "mlp": "intermediate.dense, output.dense",
            "mlp_out": "output.dense",
            "middle": "attention.LayerNorm",
            "end": "output.LayerNorm",
        }

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        return "behind the sum"


@family("esmc")
class ESMC(Family):
    """What is added is scaled with the number of layers."""

    @staticmethod
    def scales(config: Config) -> Mapping[str, float]:
        by = 1 / sqrt(config["num_hidden_layers"] / 36)
        return {"attn_out": by, "mlp_out": by}


@family("deberta")
class DeBERTa(Family):
    """Each head's query, key and value lie together; two get a bias behind their map."""

    additive_positions = True
    interleaved = True

    @staticmethod
    def without(config: Config) -> Mapping[str, str]:
        reason = "a bias is added to queries and values outside of all modules"
        return {"q": reason, "v": reason}

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        """Without `legacy`, the head multiplies with the embeddings' matrix itself. The norm beside
        the blocks is one of distances."""
        head = "lm_predictions.lm_head.LayerNorm"
        return {"final_norm": ""} | ({} if config.get("legacy", True) else {"head": head})


@family("deberta-v2")
class DeBERTa2(Family):
    """Scores have parts by distance; a convolution may stand beside the first block."""

    additive_positions = True

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if config.get("share_att_key") and config.get("relative_attention"):
            # The maps of queries and keys are called again, on distances.
            again = {site: replace(block.taps[site], again=True) for site in ("q", "k")}
            block = block.with_taps(**again)
        convolved = layer == 0 and config.get("conv_kernel_size")
        return replace(block, behind=None) if convolved else block

    @staticmethod
    def whole(config: Config) -> str:
        convolved = config.get("conv_kernel_size")
        return "a convolution beside its first block changes the stream" if convolved else ""

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        return DeBERTa.parts(config)


@family("neomme")
class NeoMME(Family):
    """Attention reads the stream with embeddings mixed in; some layers add others to values."""

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        full = [n for n, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        block = replace(block, reads_stream=False)
        return block.without("v") if layer in (full[0], full[-1]) else block


@family("ibert")
class IBERT(Family):
    """BERT for whole numbers."""

    @staticmethod
    def refused(config: Config) -> str:
        quantized = config.get("quant_mode")
        return "its activations are whole numbers with scales beside them" if quantized else ""
