"""Families of text encoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

from mechdsl.models.shape import (
    BlockAnatomy,
    BlockArrangement,
    Family,
    ModelConfig,
    ModelInputs,
    family,
)

_PADDING = (
    "padding changes its output, because {}; it can't run prompts of different lengths in one batch"
)


@family("convbert")
class ConvBERT(Family):
    """Half of its heads are convolutions."""

    def refused(self, config: ModelConfig) -> str:
        return _PADDING.format("a convolution parallel to attention reads padding tokens")


@family("fnet")
class FNet(Family):
    """A Fourier transform in attention's place."""

    def refused(self, config: ModelConfig) -> str:
        return _PADDING.format("its Fourier transform covers all tokens, without a mask")


@family("nystromformer")
class Nystromformer(Family):
    """A convolution over values is added to what attention returns."""

    def refused(self, config: ModelConfig) -> str:
        return _PADDING.format("a convolution over values reads padding tokens")


@family("yoso")
class YOSO(Family):
    """Attention without softmax."""

    def refused(self, config: ModelConfig) -> str:
        return _PADDING.format("its attention ignores the mask")


@family("albert")
class ALBERT(Family):
    """One module for all layers; here are the paths where each layer has its own."""

    def refused(self, config: ModelConfig) -> str:
        shared = config.get("num_hidden_groups", 1) < config["num_hidden_layers"]
        if shared or config.get("inner_group_num", 1) > 1:
            return "all of its layers call the same module"
        return ""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
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

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "after the sum"


@family("xmod")
class XMOD(Family):
    """Adapters of languages add to the stream after the MLP."""

    adds_up = False

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"end": ""}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        return replace(block, passes_on=False)


@family("mpnet")
class MPNet(Family):
    """BERT's blocks with a separate attention module, and biases by position."""

    additive_positions = True

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {
            "attention": "attention.attn",
            "output": "attention.attn.o",
            "attn_out": "attention.attn",
            "mlp": "intermediate.dense, output.dense",
            "mlp_out": "output.dense",
            "middle": "attention.LayerNorm",
            "end": "output.LayerNorm",
        }

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "after the sum"


@family("esmc")
class ESMC(Family):
    """What is added is scaled with the number of layers."""

    def scales(self, config: ModelConfig) -> Mapping[str, float]:
        by = 1 / sqrt(config["num_hidden_layers"] / 36)
        return {"attn_out": by, "mlp_out": by}


@family("deberta")
class DeBERTa(Family):
    """Each head's query, key and value lie together; two get a bias after their map."""

    additive_positions = True
    interleaved = True

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        reason = "a bias is added to queries and values outside of all modules"
        return {"q": reason, "v": reason}

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        """Return the paths.

        Without `legacy`, the head multiplies by the embedding matrix itself. The norm next to the
        list of blocks applies to distances.
        """
        head = "lm_predictions.lm_head.LayerNorm"
        return {"final_norm": ""} | ({} if config.get("legacy", True) else {"head": head})


@family("deberta-v2")
class DeBERTa2(Family):
    """Scores have parts by distance; a convolution may run parallel to the first block."""

    additive_positions = True

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if config.get("share_att_key") and config.get("relative_attention"):
            # The projections of queries and keys are called a second time, on distances.
            again = {site: replace(block.taps[site], again=True) for site in ("q", "k")}
            block = block.with_taps(**again)
        convolved = layer == 0 and config.get("conv_kernel_size")
        return replace(block, stream_scale=None) if convolved else block

    def whole(self, config: ModelConfig) -> str:
        convolved = config.get("conv_kernel_size")
        return "a convolution parallel to its first block changes the stream" if convolved else ""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return super().parts(config)


@family("neomme")
class NeoMME(Family):
    """Attention reads the stream with embeddings mixed in; some layers add others to values."""

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        full = [n for n, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        block = replace(block, reads_stream=False)
        return block.without("v") if layer in (full[0], full[-1]) else block


@family("ibert")
class IBERT(Family):
    """BERT for whole numbers."""

    def refused(self, config: ModelConfig) -> str:
        quantized = config.get("quant_mode")
        return "its activations are whole numbers with separate scales" if quantized else ""


@family("t5", "mt5", "umt5", "longt5")
class T5(Family):
    """Positions are added to the scores."""

    additive_positions = True


@family("t5gemma", "t5gemma2")
class T5Gemma(Family):
    """Its classes shift the decoder's text to the right after the decoder's `bos_token_id`."""

    begins_with_bos = True


@family("t5_gemma_module")
class T5GemmaStack(Family):
    """The config of T5Gemma's encoder and decoder."""

    position_ids = frozenset({"encoder", "decoder"})


@family("whisper")
class Whisper(Family):
    """Its encoder counts its frames."""

    position_ids = frozenset({"decoder"})


@family("switch_transformers")
class Switch(T5):
    """Tokens that come when an expert has taken as many as it may aren't given to any."""

    def whole(self, config: ModelConfig) -> str:
        return "each expert takes a fixed number of the tokens processed together"


@family("nllb-moe")
class NLLBMoE(Family):
    """Experts of which each may take as many tokens as there are, or a part of them."""

    def refused(self, config: ModelConfig) -> str:
        if config.get("moe_eval_capacity_token_fraction", 1.0) >= 1:
            return ""
        return "its experts process only some tokens of a pass, so prompts affect one another"


@family("bigbird_pegasus")
class BigBirdPegasus(Family):
    """The norm after the encoder's blocks is called one of embeddings."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"final_norm": "layernorm_embedding"}


@family("led")
class LED(Family):
    """Its encoder attends within windows."""

    def lost(self, config: ModelConfig) -> Mapping[str, str]:
        return {"encoder": "its encoder pads prompts to whole windows"}


@family("pegasus_x")
class PegasusX(Family):
    """Its encoder attends within blocks, and to global tokens."""

    def lost(self, config: ModelConfig) -> Mapping[str, str]:
        reason = "its encoder pads prompts to whole blocks and adds global tokens"
        return {"encoder": reason}


@family("speech_to_text")
class SpeechToText(Family):
    """Frames come before their features, and there may be any number of them."""

    def sound(self, config: ModelConfig) -> ModelInputs:
        return {"input_features": (1, 24, config["input_feat_per_channel"])}


@family("moonshine")
class Moonshine(Family):
    """It reads the sound itself."""

    def sound(self, config: ModelConfig) -> ModelInputs:
        return {"input_values": (1, 3000)}


@family("fsmt")
class FSMT(Family):
    """Its tensors have positions in front of the batch."""

    def refused(self, config: ModelConfig) -> str:
        return "its tensors have the position dimension before the batch dimension"


@family("prophetnet")
class ProphetNet(Family):
    """Its decoder predicts several tokens ahead."""

    def refused(self, config: ModelConfig) -> str:
        return "its decoder runs several streams as one sequence"
