"""Families of state-space, convolutional, recurrent and mixture-of-experts models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mechdsl.models.shape import (
    BlockAnatomy,
    BlockArrangement,
    Family,
    HookPoint,
    ModelConfig,
    TensorLayout,
    family,
)

_HEADS = ("q", "k", "v", "z", "head_out")

_STREAM = ("resid_pre", "resid_mid", "resid_post")


class _Front(Family):
    """A family with norms before the sublayers."""

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        return "front"


@family("granitemoeshared", "granitemoehybrid", "granitemoe_swa")
class GraniteMoE(_Front):
    """Experts may run parallel to an MLP that every token passes."""


@family("falcon_h1")
class FalconH1(_Front):
    """Attention and a state-space layer side by side, each with a separate factor."""

    adds_up = False

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        reason = "attention and a state-space layer run in parallel, and their sum is added"
        return dict.fromkeys(("mixer_norm", "mixer_out", "resid_mid"), reason)


@family("zamba", "zamba2")
class Zamba(_Front):
    """In hybrid blocks attention and MLP write to what the state-space layer reads, alone."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"mixer": "mamba_decoder.mamba", "mlp": ""}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        hybrid = config["layers_block_type"][layer] == "hybrid"
        return replace(block, reads_stream=False) if hybrid else block


@family("gemma3n_text")
class Gemma3n(_Front):
    """Several streams, of which each sublayer reads a mixture; late blocks have no keys."""

    adds_up = False

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return dict.fromkeys(
            _STREAM, "its blocks carry several residual streams, which each block mixes"
        )

    def whole(self, config: ModelConfig) -> str:
        return "its blocks carry several residual streams"


@family("diffllama")
class DiffLlama(_Front):
    """Differential attention: what a head returns is a difference of two."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        reason = (
            "a head's output is the difference of the outputs of two attention heads of "
            "twice the width"
        )
        return {"z": reason, "head_out": reason, "v": "each value is read by heads of all groups"}

    def whole(self, config: ModelConfig) -> str:
        return "its blocks compute attention twice"


@family("gemma4_text")
class Gemma4(_Front):
    """Perhaps an embedding of the token for each layer, and late blocks without keys. Blocks with
    full attention have other heads."""

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        sizes: dict[str, Any] = {}
        kinds = config.get("layer_types") or ["full_attention"] * (layer + 1)
        if kinds[layer] == "full_attention" and "per_layer_config" not in config:
            sizes["head_dim"] = config.get("global_head_dim", 512)
            if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
                sizes["num_key_value_heads"] = config["num_global_key_value_heads"]
        first_shared = len(kinds) - (config.get("num_kv_shared_layers") or 0)
        if config.get("use_double_wide_mlp") and layer >= first_shared:
            sizes["intermediate_size"] = 2 * config["intermediate_size"]
        return sizes

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        more = bool(config.get("hidden_size_per_layer_input"))
        return replace(block, adds_up=not more, passes_on=not more)

    def whole(self, config: ModelConfig) -> str:
        shared = config.get("num_kv_shared_layers")
        return "later blocks attend to keys and values of earlier ones" if shared else ""


@family("doge")
class Doge(_Front):
    """The stream is multiplied with a learned vector before anything is added."""

    adds_up = False

    def refused(self, config: ModelConfig) -> str:
        mixed = (
            "a token's experts depend on later tokens: its router ranks the scores of all tokens"
        )
        return mixed if config.get("is_moe") else ""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return {"resid_mid": "the stream is scaled, feature by feature, where attention is added"}

    def whole(self, config: ModelConfig) -> str:
        return "values determine which tokens are attended to"


@family("minimax")
class MiniMax(_Front):
    """The stream is normed, not only what is read of it, and each sum weighs its parts."""

    adds_up = False

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        kind = "linear" if config["layer_types"][layer] == "linear_attention" else "full"
        middle = HookPoint(
            f"{block.path}.post_attention_layernorm", "out", block.taps["resid_mid"].layout
        )
        mixed = replace(block.taps["mixer_out"], scale=config[f"{kind}_attn_beta_factor"])
        added = replace(block.taps["mlp_out"], scale=config["mlp_beta_factor"])
        taps = {"resid_mid": middle, "mixer_out": mixed, "mlp_out": added}
        return replace(block.with_taps(**taps), mlp_norm=None)


@family("rwkv")
class RWKV(_Front):
    """Recurrent; the first block norms the stream, and every few blocks it is halved."""

    adds_up = True
    mixes = True

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"down": "feed_forward.value"}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        every = config.get("rescale_every") or 0
        halved = every > 0 and (layer + 1) % every == 0
        # A gate follows `down`.
        block = replace(block, down=None, stream_scale=0.5 if halved else 1.0)
        if layer > 0:
            return block
        return replace(block.without("resid_mid"), adds_up=False, reads_stream=False)


@family("zaya")
class Zaya(_Front):
    """Both sums scale and shift the stream and what is added, feature by feature."""

    adds_up = False

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        added = "the addition to the stream is scaled and shifted, feature by feature"
        made = "keys and values of a token also depend on its neighbours"
        return {"attn_out": added, "mlp_out": added, "k": made, "v": made}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        z, attention = block.taps["z"].layout, f"{block.path}.self_attn"
        q = HookPoint(f"{attention}.qk_norm", "out", TensorLayout(z.units, z.width, axes="heads"))
        middle = f"{block.path}.post_attention_residual_scale"
        middle = HookPoint(middle, "out", block.taps["resid_mid"].layout)
        return block.with_taps(q=q, resid_mid=middle)

    def whole(self, config: ModelConfig) -> str:
        return "queries, keys and values of a token also depend on its neighbours"


@family("jetmoe")
class JetMoE(_Front):
    """Attention is a mixture of experts as well: a token's experts make its queries."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        reason = "a token's queries and outputs come from the experts that it is routed to"
        return dict.fromkeys(("q", "z", "head_out"), reason)

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        heads, width = config["num_key_value_heads"], config["kv_channels"]
        made = f"{block.path}.self_attention.kv_proj"
        k, v = (TensorLayout.heads(heads, width, offset=i * heads * width) for i in range(2))
        return block.with_taps(k=HookPoint(made, "out", k), v=HookPoint(made, "out", v))


class _Streams(_Front):
    """A family with several streams; each sublayer reads a mixture of them."""

    adds_up = False

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return dict.fromkeys(_STREAM, "its blocks carry several residual streams")

    def whole(self, config: ModelConfig) -> str:
        return "its blocks carry several residual streams"


@family("deepseek_v4")
class DeepSeekV4(_Streams):
    """One key is the value of all heads, too; outputs go through a projection in groups."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        one = "keys are also values, and some are tokens of compressed windows"
        return {
            **super().without(config),
            "k": one,
            "v": one,
            "z": "the output projection consists of two maps, in groups of heads",
            "head_out": "the output projection consists of two maps, in groups of heads",
        }


@family("hy_v4")
class HunyuanV4(_Streams):
    """What a sublayer returns is weighed for each stream."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        weighed = "the output of a sublayer is weighted for each stream"
        return {**super().without(config), "attn_out": weighed, "mlp_out": weighed}


@family("qwen4_exp_text")
class Qwen4(_Streams):
    """What a sublayer returns is weighed for each stream."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        weighed = "the output of a sublayer is weighted for each stream"
        return {**super().without(config), "mixer_out": weighed, "mlp_out": weighed}


@family("longcat_flash")
class LongCat(_Front):
    """Each block has two attention sublayers, two MLPs and additional experts."""

    adds_up = False

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        reason = "each block has two attention sublayers, two MLPs and additional experts"
        inside = (*_HEADS, "attn_norm", "attn_out", "resid_mid", "mlp_norm", "mlp_hidden")
        return dict.fromkeys((*inside, "router", "expert_out", "mlp_out"), reason)

    def whole(self, config: ModelConfig) -> str:
        return "each block has two attention sublayers"


def _list_sliding_heads(config: ModelConfig, layer: int) -> ModelConfig:
    """Return the sizes of heads in a block with a window, whose keys begin with `swa_`."""
    kinds = config.get("layer_types") or ()
    if layer >= len(kinds) or "sliding" not in str(kinds[layer]):
        return {}
    return {key.removeprefix("swa_"): n for key, n in config.items() if key.startswith("swa_")}


@family("dots3_note_text")
class Dots3(Family):
    """Blocks with a window have other heads."""

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        return _list_sliding_heads(config, layer)


@family("inkling_text")
class Inkling(_Front):
    """Short convolutions after keys, values and both sublayers."""

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        return _list_sliding_heads(config, layer)

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {"attn_output_norm": "attn_sconv", "mlp_output_norm": "mlp_sconv"}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if "v" not in block.taps:
            return block
        v = replace(block.taps["v"], path=f"{block.path}.self_attn.v_sconv")
        return block.with_taps(v=v)

    def whole(self, config: ModelConfig) -> str:
        return "short convolutions mix tokens outside of attention"


@family("inkling2_text")
class Inkling2(_Front):
    """Every sublayer reads a mean over sums of earlier blocks; short convolutions as in Inkling."""

    adds_up = False

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        return _list_sliding_heads(config, layer)

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        return {
            "attn_output_norm": "post_attention_convolution",
            "mlp_output_norm": "post_mlp_convolution",
        }

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return dict.fromkeys(_STREAM, "sublayers read a mean over earlier blocks, not one stream")

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        if config["layer_types"][layer] == "hybrid_sliding":
            return block
        return block.without("attn_norm")  # queries, keys and values read separate inputs

    def whole(self, config: ModelConfig) -> str:
        return "its sublayers read a mean over earlier blocks"


@family("mimo_v2_flash")
class MiMo(_Front):
    """Values may be scaled after their projection, and blocks with windows have twice the
    key-value heads."""

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        kinds = config.get("layer_types") or ()
        if layer < len(kinds) and kinds[layer] == "sliding_attention":
            return {"num_key_value_heads": 2 * config["num_key_value_heads"]}
        return {}

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        if config.get("attention_value_scale") in (None, 1):
            return {}
        return {"v": "values are multiplied by a constant after their projection"}


@family("roformer")
class RoFormer(Family):
    """Values may be rotated too."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return {"v": "values are rotated"} if config.get("rotary_value") else {}


@family("nemotron_h")
class NemotronH(_Front):
    """Each block has one sublayer, which is called mixer whatever it does."""

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        kind = config["layers_block_type"][layer]
        if kind not in ("mlp", "moe"):
            return block
        mlp = f"{block.path}.mixer"
        taps = {"mlp_norm": block.taps["mixer_norm"], "mlp_out": block.taps["mixer_out"]}
        down = None
        if kind == "mlp":
            down = f"{mlp}.down_proj"
            taps["mlp_hidden"] = HookPoint(
                down, "in", TensorLayout.neurons(config["intermediate_size"])
            )
        elif not config.get("moe_latent_size"):  # experts have the stream's width
            count, width = config["n_routed_experts"], config["hidden_size"]
            taps["router"] = HookPoint(f"{mlp}.experts", "in", TensorLayout.whole(count))
            taps["expert_out"] = HookPoint(
                f"{mlp}.experts", "out", TensorLayout(count, width, stride=0)
            )
        block = block.without("mixer_norm", "mixer_out").with_taps(**taps)
        return replace(block, down=down, attn_norm=None, mlp_norm=block.attn_norm)


def _experts_scaled() -> Mapping[str, str]:
    return dict.fromkeys(("router", "expert_out"), "the experts' sum is scaled outside of them")


@family("laguna")
class Laguna(_Front):
    """Heads differ by layer, and the experts' sum may be scaled."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        scaled = config.get("moe_routed_scaling_factor") not in (None, 1)
        return _experts_scaled() if scaled else {}


@family("minimax_m3_vl_text")
class MiniMaxM3(_Front):
    """The experts' sum may be scaled; sparse blocks choose what they attend to."""

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        return _experts_scaled() if config.get("routed_scaling_factor") not in (None, 1) else {}

    def whole(self, config: ModelConfig) -> str:
        sparse = "minimax_m3_sparse" in config.get("layer_types", ())
        return "an indexer selects the tokens to attend to" if sparse else ""


@family("reformer")
class Reformer(Family):
    """Reversible."""

    def refused(self, config: ModelConfig) -> str:
        return "its blocks carry two streams inside a custom autograd function"
