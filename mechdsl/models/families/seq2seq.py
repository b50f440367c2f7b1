"""Encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping

from mechdsl.models.adapters import Config, Family, Inputs, family


@family("t5", "mt5", "umt5", "longt5")
class T5(Family):
    """Positions are added to the scores."""

    additive_positions = True


@family("switch_transformers")
class Switch(T5):
    """Tokens that come when an expert has taken as many as it may aren't given to any."""

    @staticmethod
    def whole(config: Config) -> str:
        return "each expert takes a fixed number of the tokens that stand side by side"


@family("nllb-moe")
class NLLBMoE(Family):
    """Experts of which each may take as many tokens as there are, or a part of them."""

    @staticmethod
    def refused(config: Config) -> str:
        if config.get("moe_eval_capacity_token_fraction", 1.0) >= 1:
            return ""
        return "its experts take a part of a pass's tokens, so that prompts change one another"


@family("bigbird_pegasus")
class BigBirdPegasus(Family):
    """The norm behind the encoder's blocks is called one of embeddings."""

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        return {"final_norm": "layernorm_embedding"}


@family("led")
class LED(Family):
    """Its encoder attends within windows."""

    @staticmethod
    def lost(config: Config) -> Mapping[str, str]:
        return {"encoder": "its encoder fills prompts up to whole windows by itself"}


@family("pegasus_x")
class PegasusX(Family):
    """Its encoder attends within blocks, and to global tokens."""

    @staticmethod
    def lost(config: Config) -> Mapping[str, str]:
        reason = "its encoder fills prompts up to whole blocks, and has global tokens beside them"
        return {"encoder": reason}


@family("speech_to_text")
class SpeechToText(Family):
    """Frames come before their features, and there may be any number of them."""

    @staticmethod
    def sound(config: Config) -> Inputs:
        return {"input_features": (1, 24, config["input_feat_per_channel"])}


@family("moonshine")
class Moonshine(Family):
    """It reads the sound itself."""

    @staticmethod
    def sound(config: Config) -> Inputs:
        return {"input_values": (1, 3000)}


@family("fsmt")
class FSMT(Family):
    """Its tensors have positions in front of the batch."""

    @staticmethod
    def refused(config: Config) -> str:
        return "its blocks have positions before the batch"


@family("prophetnet")
class ProphetNet(Family):
    """Its decoder predicts several tokens ahead."""

    @staticmethod
    def refused(config: Config) -> str:
        return "its decoder runs several streams as one sequence"
