"""What a family of models says of itself: only what neither its config nor its modules tell.

Entries lie in `families/`, one `@family`-decorated class each; the finder does the rest. Outside of
the package, an entry is made by importing a module with such a class before the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from mechdsl.base.registry import Registry
from mechdsl.models.anatomy import BlockAnatomy, Layout

Arrangement = Literal["front", "behind the sum", "parallel"]
"""Norms in front of the sublayers (and perhaps behind them too, before the sum); norms of the sums;
or attention and MLP side by side."""

Config = Mapping[str, Any]

Inputs = Mapping[str, tuple[int, ...] | list[Any]]
"""What a model is called with beside tokens, for one prompt, by name: the shape of a tensor of
floats, or a list of whole numbers. Prompts lie behind one another in the first dimension."""


class Family:
    """What holds of a family that is found by its modules alone; entries override."""

    norms_behind_rotary: ClassVar[bool] = False
    """Query and key norms stand behind rotary, so that `q` and `k` are what is projected."""
    additive_positions: ClassVar[bool] = False
    """Positions are added to the scores (ALiBi), so that a zero query doesn't attend uniformly."""
    interleaved: ClassVar[bool] = False
    """A fused projection returns query, key and value of each head in turn, as those called
    `query_key_value` do."""
    adds_up: ClassVar[bool] = True
    """resid_pre + attn_out + mlp_out = resid_post; False where something else is added too."""
    mixes: ClassVar[bool] = False
    """No block attends: what is called attention there mixes tokens in another way."""
    encodes: ClassVar[bool] = False
    """Built as a causal model it still sees later tokens, unless `is_decoder` is set."""

    scores: ClassVar[Literal["", "one label", "many labels"]] = ""
    """Of a model with a tower for images and one for texts, what the scores of an image are: those
    of texts of which one is right (softmax), or of texts that are right or not each by itself
    (sigmoid)."""
    staged: ClassVar[str] = ""
    """What there is in place of a list of blocks that are alike; empty where there is one."""
    padded: ClassVar[bool] = False
    """Its tower for texts was trained on texts that are padded to its longest, and sees that."""

    @staticmethod
    def parts(config: Config) -> Mapping[str, str]:
        """Paths within a block, where the finder's choice would be wrong: of `attention`,
        `mixer` (what stands in its place), `attn_out` (what returns what is added), `output` (the
        linear map that `z` goes into),
        `mlp` (several with commas), `mlp_out`, `down`, `attn_norm`, `mlp_norm` (norms in front),
        `attn_behind`, `mlp_behind` (norms before the sum), `middle`, `end` (norms of the sums);
        of the model `final_norm` and `head` (what returns what the unembedding reads, where that is
        no module); empty: there is none."""
        return {}

    @staticmethod
    def arrangement(config: Config) -> Arrangement | None:
        """None: tried out, in the order of `Arrangement`."""
        value = config.get("use_parallel_residual", config.get("parallel_attn"))
        return "parallel" if value is True else None

    @staticmethod
    def fused(n_heads: int, n_kv_heads: int, width: int) -> Mapping[str, Layout] | None:
        """Where queries, keys and values lie in a fused projection, if in no common order."""
        return None

    @staticmethod
    def scales(config: Config) -> Mapping[str, float]:
        """Site to what its tensor is multiplied with before it is added to the stream."""
        by = float(config.get("residual_multiplier") or 1.0)
        return {"attn_out": by, "mlp_out": by, "mixer_out": by}

    @staticmethod
    def without(config: Config) -> Mapping[str, str]:
        """Sites that can't be had, and why."""
        nested = config.get("attn_config") or {}
        if config.get("clip_qkv") or nested.get("clip_qkv"):
            reason = "queries, keys and values are clamped outside of all modules"
            return {"q": reason, "k": reason, "v": reason}
        return {}

    @staticmethod
    def block(config: Config, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        """The parts of one block as they are, where they are not quite what the finder makes of
        them."""
        return block

    @staticmethod
    def whole(config: Config) -> str:
        """Why rows can't start in the middle, from what an unpatched run kept; empty where they
        can."""
        return ""

    @staticmethod
    def refused(config: Config) -> str:
        """Why models of this kind can't be taken apart at all; empty where they can."""
        return ""

    @staticmethod
    def lost(config: Config) -> Mapping[str, str]:
        """Stacks beside the main one (`encoder`, `vision`) that can't be had, and why; `config` is
        the whole model's, as in what follows."""
        return {}

    @staticmethod
    def picture(config: Config) -> Inputs:
        """An image, for one prompt."""
        vision = config.get("vision_config") or config
        size = vision.get("image_size") or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = vision.get("num_channels") or vision.get("in_channels") or 3
        return {"pixel_values": (1, int(channels), int(height), int(width))}

    @staticmethod
    def in_front(config: Config) -> tuple[str, ...] | None:
        """Of an encoder of images, what stands in front of the patches of an image: `cls`,
        `distillation`, `register`, each as often as it does; None where that isn't known. `config`
        is that of the encoder."""
        return None

    @staticmethod
    def any_size(config: Config) -> bool:
        """Whether an encoder of images reads other sizes than that of its config."""
        return False

    @staticmethod
    def sound(config: Config) -> Inputs:
        """What the encoder of a speech model reads, for one prompt; empty for other models."""
        bins, places = config.get("num_mel_bins"), config.get("max_source_positions")
        return {"input_features": (1, bins, 2 * places)} if bins and places else {}


FAMILIES: Registry[type[Family]] = Registry("model family")


def family(*model_types: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family under the `model_type`s of its configs."""

    def register(entry: type[Family]) -> type[Family]:
        for name in model_types:
            FAMILIES.add(name, entry)
        return entry

    return register


def adds_positions(family: str, config: Config) -> bool:
    """Whether scores have something added by position, as the config tells."""
    return family_of(family).additive_positions or bool(config.get("alibi"))


def family_of(model_type: str) -> type[Family]:
    """The entry of a `model_type`, or the defaults."""
    return FAMILIES.get(model_type) or Family
