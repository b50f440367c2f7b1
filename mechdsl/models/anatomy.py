"""Where each site of a model is, and what a model family overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mechdsl.base.records import Registry
from mechdsl.vocab.sites import BlockModule, sites_of_module

HookSide = Literal["in", "out"]

LayoutAxes = Literal["flat", "heads", "heads_first"]


@dataclass(frozen=True)
class TensorLayout:
    """How a tensor is seen as `[B, T, units, width]`.

    `flat` is `[B, T, F]`: unit u is features `offset + u // group * stride + u % group * width`
    onward. `heads` is that view already, `heads_first` is `[B, units, T, width]`.
    """

    units: int
    width: int
    offset: int = 0
    stride: int = 0
    axes: LayoutAxes = "flat"
    group: int = 1
    """Units side by side before `stride` is taken: the queries of one key (Falcon)."""

    @staticmethod
    def whole(width: int) -> TensorLayout:
        """One vector per position."""
        return TensorLayout(1, width, stride=width)

    @staticmethod
    def heads(units: int, width: int, offset: int = 0) -> TensorLayout:
        """Heads side by side, from feature `offset` on."""
        return TensorLayout(units, width, offset=offset, stride=width)

    @staticmethod
    def neurons(units: int) -> TensorLayout:
        """Each feature is a unit of its own."""
        return TensorLayout(units, 1, stride=1)

    @property
    def end(self) -> int:
        """One past the last feature that it touches."""
        last = self.units // self.group - 1
        return self.offset + last * self.stride + self.group * self.width


@dataclass(frozen=True)
class HookPoint:
    """A tensor in the module tree: what a module reads or returns."""

    path: str
    side: HookSide
    layout: TensorLayout
    item: int = 0
    """Which one, where the module returns a tuple."""
    scale: float = 1.0
    """The site is the tensor times this: what a model multiplies it with before it is added."""
    scaled_by: str | None = None
    """Path of a parameter that it is multiplied with too, feature by feature (layer scale)."""
    patches: str | None = None
    """Path of what makes vectors of an image's patches within the module, which then adds their
    positions; the site is these vectors, in front of the positions."""
    again: bool = False
    """The module is called again in the same pass, on something else; the site is what it reads or
    returns first."""


@dataclass(frozen=True)
class BlockAnatomy:
    """The parts of one block by path; None or empty where there is no such part."""

    path: str
    taps: Mapping[str, HookPoint]
    """Site to tensor. `resid_mid` stands for the stream that attention's output is added to where
    its tap is that of what is added, `head_out` for what the output projection returns, `router`
    and `expert_out` for what the experts are called with."""
    projections: tuple[str, ...] = ()
    """The linear maps that make queries, keys and values; one where they are fused."""
    output: str | None = None
    """`z` goes in, attention's output (before any norm behind it) comes out."""
    mlp: tuple[str, ...] = ()
    """The MLP, or the linear maps it consists of where it is no module of its own."""
    down: str | None = None
    """`mlp_hidden` goes in, and what the MLP adds comes out (before any norm behind it)."""
    attn_norm: str | None = None
    """The norm in front of attention (or of what stands in its place); in the stack `cross`, of
    cross attention, as `attn_behind` and `middle` are there."""
    mlp_norm: str | None = None
    attn_behind: str | None = None
    """The norm or scale between the output projection and the stream."""
    mlp_behind: str | None = None
    middle: str | None = None
    """The norm that resid_pre + attn_out goes through, where norms stand behind the sum (BERT)."""
    end: str | None = None
    """The same of resid_mid + mlp_out."""
    adds_up: bool = True
    """resid_pre + attn_out + mlp_out = resid_post; False where more is added, or something else."""
    passes_on: bool = True
    """Where it doesn't add up: what mlp_out gains, resid_post gains all the same."""
    behind: float | None = 1.0
    """resid_post times this is what enters the next block; None where more happens in between."""
    reads_stream: bool = True
    """Its first sublayer reads resid_pre, through a norm or as it is."""
    fed: bool = False
    """Features of images are added to what it returns before the next block reads that."""

    def with_taps(self, **changed: HookPoint) -> BlockAnatomy:
        """With other taps for some sites."""
        return replace(self, taps={**self.taps, **changed})

    def without(self, *sites: str) -> BlockAnatomy:
        """Without some sites."""
        return replace(self, taps={s: t for s, t in self.taps.items() if s not in sites})


def add_output_sites(block: BlockAnatomy, d_model: int) -> BlockAnatomy:
    """With the sites whose entries say which part of the block returns them."""
    parts: dict[BlockModule, str | None] = {"output": block.output, "down": block.down}
    taps = {
        site: HookPoint(path, "out", TensorLayout.whole(d_model))
        for part, path in parts.items()
        for site in sites_of_module(part)
        if path is not None
    }
    return block.with_taps(**taps)


@dataclass(frozen=True)
class Anatomy:
    """The parts of one stack of blocks by path."""

    blocks: tuple[BlockAnatomy, ...]
    taps: Mapping[str, HookPoint]
    """Sites outside the blocks, `logits` aside."""
    embedding: str | None = None
    """The token embedding; None where tokens aren't looked up (images, audio)."""
    final_norm: str | None = None
    """What makes `final_norm` of the last `resid_post`."""
    unembedding: str | None = None
    """None where there is none, or another stack's output is the model's."""
    parallel: bool = False
    """Attention and MLP read the same stream."""
    arrangement: str = field(default="", compare=False)
    """How norms and sublayers are taken to be arranged; alike in stacks that share blocks."""
    additive_positions: bool = False
    """Positions are added to the scores, so a zero query doesn't attend uniformly."""
    norms_behind_rotary: bool = False
    """Queries and keys are normed behind rotary, so that their length doesn't matter."""
    whole: str = ""
    """Why its rows can't start in the middle; empty where nothing is known against it."""
    without: Mapping[str, str] = field(default_factory=dict[str, str])
    """Sites that there could be, and why they can't be had."""

    def tap(self, site: str, layer: int | None) -> HookPoint | None:
        """The tensor of a site; None where the block has none."""
        return (self.taps if layer is None else self.blocks[layer].taps).get(site)

    def layers(self, site: str) -> tuple[int, ...]:
        """Blocks that have a site."""
        return tuple(n for n, block in enumerate(self.blocks) if site in block.taps)

    def sites(self) -> Iterator[str]:
        """Every site that is somewhere, once."""
        yield from dict.fromkeys([*self.taps, *(site for b in self.blocks for site in b.taps)])


BlockArrangement = Literal["front", "behind the sum", "parallel"]
"""Norms in front of the sublayers (and perhaps behind them too, before the sum); norms of the sums;
or attention and MLP side by side."""

ModelConfig = Mapping[str, Any]

ModelInputs = Mapping[str, tuple[int, ...] | list[Any]]
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
    def parts(config: ModelConfig) -> Mapping[str, str]:
        """Paths within a block, where the finder's choice would be wrong: of `attention`,
        `mixer` (what stands in its place), `attn_out` (what returns what is added), `output` (the
        linear map that `z` goes into),
        `mlp` (several with commas), `mlp_out`, `down`, `attn_norm`, `mlp_norm` (norms in front),
        `attn_behind`, `mlp_behind` (norms before the sum), `middle`, `end` (norms of the sums);
        of the model `final_norm` and `head` (what returns what the unembedding reads, where that is
        no module); empty: there is none."""
        return {}

    @staticmethod
    def arrangement(config: ModelConfig) -> BlockArrangement | None:
        """None: tried out, in the order of `Arrangement`."""
        value = config.get("use_parallel_residual", config.get("parallel_attn"))
        return "parallel" if value is True else None

    @staticmethod
    def fused(n_heads: int, n_kv_heads: int, width: int) -> Mapping[str, TensorLayout] | None:
        """Where queries, keys and values lie in a fused projection, if in no common order."""
        return None

    @staticmethod
    def scales(config: ModelConfig) -> Mapping[str, float]:
        """Site to what its tensor is multiplied with before it is added to the stream."""
        by = float(config.get("residual_multiplier") or 1.0)
        return {"attn_out": by, "mlp_out": by, "mixer_out": by}

    @staticmethod
    def without(config: ModelConfig) -> Mapping[str, str]:
        """Sites that can't be had, and why."""
        nested = config.get("attn_config") or {}
        if config.get("clip_qkv") or nested.get("clip_qkv"):
            reason = "queries, keys and values are clamped outside of all modules"
            return {"q": reason, "k": reason, "v": reason}
        return {}

    @staticmethod
    def block(config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        """The parts of one block as they are, where they are not quite what the finder makes of
        them."""
        return block

    @staticmethod
    def whole(config: ModelConfig) -> str:
        """Why rows can't start in the middle, from what an unpatched run kept; empty where they
        can."""
        return ""

    @staticmethod
    def refused(config: ModelConfig) -> str:
        """Why models of this kind can't be taken apart at all; empty where they can."""
        return ""

    @staticmethod
    def lost(config: ModelConfig) -> Mapping[str, str]:
        """Stacks beside the main one (`encoder`, `vision`) that can't be had, and why; `config` is
        the whole model's, as in what follows."""
        return {}

    @staticmethod
    def picture(config: ModelConfig) -> ModelInputs:
        """An image, for one prompt."""
        vision = config.get("vision_config") or config
        size = vision.get("image_size") or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = vision.get("num_channels") or vision.get("in_channels") or 3
        return {"pixel_values": (1, int(channels), int(height), int(width))}

    @staticmethod
    def in_front(config: ModelConfig) -> tuple[str, ...] | None:
        """Of an encoder of images, what stands in front of the patches of an image: `cls`,
        `distillation`, `register`, each as often as it does; None where that isn't known. `config`
        is that of the encoder."""
        return None

    @staticmethod
    def any_size(config: ModelConfig) -> bool:
        """Whether an encoder of images reads other sizes than that of its config."""
        return False

    @staticmethod
    def sound(config: ModelConfig) -> ModelInputs:
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


def has_additive_positions(family: str, config: ModelConfig) -> bool:
    """Whether scores have something added by position, as the config tells."""
    return find_family(family).additive_positions or bool(config.get("alibi"))


def find_family(model_type: str) -> type[Family]:
    """The entry of a `model_type`, or the defaults."""
    return FAMILIES.get(model_type) or Family
