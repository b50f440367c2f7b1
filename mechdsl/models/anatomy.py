"""The hook points of a model's sites, and the properties that a model family overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, ClassVar, Literal, cast

from mechdsl.base.records import Record, Registry
from mechdsl.vocab.sites import BlockModule, sites_of_module

HookSide = Literal["in", "out"]

LayoutAxes = Literal["flat", "heads", "heads_first"]


class TensorLayout(Record):
    """A view of a tensor as `[B, T, units, width]`.

    `flat` is `[B, T, F]`: unit u starts at feature
    `offset + u // group * stride + u % group * width`. `heads` is already `[B, T, units, width]`,
    `heads_first` is `[B, units, T, width]`.
    """

    units: int
    width: int
    offset: int = 0
    stride: int = 0
    axes: LayoutAxes = "flat"
    group: int = 1
    """Adjacent units per `stride`: the queries that share one key (Falcon)."""

    @staticmethod
    def whole(width: int) -> TensorLayout:
        """Return the layout with one vector per position."""
        return TensorLayout(1, width, stride=width)

    @staticmethod
    def heads(units: int, width: int, offset: int = 0) -> TensorLayout:
        """Return the layout with adjacent heads, from feature `offset` on."""
        return TensorLayout(units, width, offset=offset, stride=width)

    @staticmethod
    def neurons(units: int) -> TensorLayout:
        """Return the layout in which each feature is a unit."""
        return TensorLayout(units, 1, stride=1)

    @property
    def end(self) -> int:
        """The index after the last feature of the layout."""
        last = self.units // self.group - 1
        return self.offset + last * self.stride + self.group * self.width


class HookPoint(Record):
    """A tensor in the module tree: the input or output of a module."""

    path: str
    side: HookSide
    layout: TensorLayout
    item: int = 0
    """Index of the tensor if the module returns a tuple."""
    scale: float = 1.0
    """The site is the tensor times this factor, which the model applies before the addition."""
    scaled_by: str | None = None
    """Path of a parameter that also multiplies the tensor, feature by feature (layer scale)."""
    squashed: bool = False
    """`scaled_by` is a gate: its hyperbolic tangent multiplies the tensor."""
    patches: str | None = None
    """Path of the submodule that embeds an image's patches, if `path` then adds positions to them;
    the site is the patch vectors before the positions are added."""
    again: bool = False
    """The module is called again in the same pass on another input; the site is its first input or
    output."""


class BlockAnatomy(Record):
    """The components of one block by path; None or empty if the block lacks one."""

    path: str
    taps: Mapping[str, HookPoint]
    """Site to hook point. If `resid_mid` has the hook point of attention's output, the site is the
    stream after that output is added. `head_out` is represented by the output projection's output,
    `router` and `expert_out` by the hook points of the experts module."""
    projections: tuple[str, ...] = ()
    """The linear maps that compute queries, keys and values; one if they are fused."""
    output: str | None = None
    """The linear map from `z` to attention's output, before any norm after it."""
    mlp: tuple[str, ...] = ()
    """The MLP, or its linear maps if it isn't a separate module."""
    down: str | None = None
    """The linear map from `mlp_hidden` to the MLP's output, before any norm after it."""
    attn_norm: str | None = None
    """The norm before attention or the sublayer that replaces it. In the stack `cross`, this field,
    `attn_output_norm` and `middle` refer to cross attention."""
    mlp_norm: str | None = None
    attn_output_norm: str | None = None
    """The norm or scale between the output projection and the stream."""
    mlp_output_norm: str | None = None
    middle: str | None = None
    """The norm of resid_pre + attn_out, in models with norms after the sum (BERT)."""
    end: str | None = None
    """The norm of resid_mid + mlp_out, in models with norms after the sum."""
    adds_up: bool = True
    """resid_pre + attn_out + mlp_out = resid_post; False if the block computes anything else."""
    passes_on: bool = True
    """If `adds_up` is False: a change of mlp_out still changes resid_post by the same amount."""
    stream_scale: float | None = 1.0
    """The next block reads resid_post times this factor; None if more happens in between."""
    reads_stream: bool = True
    """The first sublayer reads resid_pre, directly or through a norm."""
    fed: bool = False
    """Image features are added to the block's output before the next block reads it."""

    def with_taps(self, **changed: HookPoint) -> BlockAnatomy:
        """Return a copy with changed hook points for some sites."""
        return replace(self, taps={**self.taps, **changed})

    def without(self, *sites: str) -> BlockAnatomy:
        """Return a copy without some sites."""
        return replace(self, taps={s: t for s, t in self.taps.items() if s not in sites})


def add_output_sites(block: BlockAnatomy, d_model: int) -> BlockAnatomy:
    """Add the sites whose vocabulary entries name the module that returns them."""
    parts: dict[BlockModule, str | None] = {"output": block.output, "down": block.down}
    taps = {
        site: HookPoint(path, "out", TensorLayout.whole(d_model))
        for part, path in parts.items()
        for site in sites_of_module(part)
        if path is not None
    }
    return block.with_taps(**taps)


class Anatomy(Record):
    """The components of one stack of blocks by path."""

    blocks: tuple[BlockAnatomy, ...]
    taps: Mapping[str, HookPoint]
    """Sites outside the blocks, except `logits`."""
    embedding: str | None = None
    """The token embedding; None if the stack doesn't look up tokens (images, audio)."""
    final_norm: str | None = None
    """The module that computes `final_norm` from the last `resid_post`."""
    unembedding: str | None = None
    """None if there is none, or if the model's output comes from another stack."""
    parallel: bool = False
    """Attention and MLP read the same stream."""
    arrangement: str = field(default="", compare=False)
    """The assumed arrangement of norms and sublayers; equal in stacks that share blocks."""
    additive_positions: bool = False
    """Positions are added to the scores, so a zero query doesn't attend uniformly."""
    norms_after_rotary: bool = False
    """Queries and keys are normed after rotary embedding, so their norm before it has no effect."""
    whole: str = ""
    """The reason that rows can't start at a middle block; empty if none is known."""
    without: Mapping[str, str] = field(default_factory=dict[str, str])
    """Unavailable sites, each with the reason."""

    def tap(self, site: str, layer: int | None) -> HookPoint | None:
        """Return the hook point of a site; None if the block lacks the site."""
        return (self.taps if layer is None else self.blocks[layer].taps).get(site)

    def layers(self, site: str) -> tuple[int, ...]:
        """Return the blocks that have a site."""
        return tuple(n for n, block in enumerate(self.blocks) if site in block.taps)

    def sites(self) -> Iterator[str]:
        """Yield every site of the stack or its blocks once."""
        yield from dict.fromkeys([*self.taps, *(site for b in self.blocks for site in b.taps)])


BlockArrangement = Literal["front", "after the sum", "parallel"]
"""`front`: norms before the sublayers, perhaps also after them, before the sum. `after the sum`:
norms of the sums. `parallel`: attention and MLP read the same stream."""

ModelConfig = Mapping[str, Any]

ModelInputs = Mapping[str, tuple[int, ...] | list[Any]]
"""A model's inputs for one prompt besides tokens, by name: the shape of a float tensor, or a list
of integers. Prompts are concatenated along the first dimension."""


ATTENDED, TILES = "cross_attention_states", "tiles"
"""Inputs of a model whose blocks attend to an image: the vectors of its patches, tile by tile, and
whether the image fills each tile."""


class Family:
    """Defaults for a family that is recognised by its modules; registered entries override."""

    norms_after_rotary: ClassVar[bool] = False
    """Query and key norms follow rotary embedding, so `q` and `k` are the projections' outputs."""
    additive_positions: ClassVar[bool] = False
    """Positions are added to the scores (ALiBi), so that a zero query doesn't attend uniformly."""
    interleaved: ClassVar[bool] = False
    """A fused projection returns query, key and value head by head, as those called
    `query_key_value` do."""
    adds_up: ClassVar[bool] = True
    """resid_pre + attn_out + mlp_out = resid_post; False if something else is added too."""
    mixes: ClassVar[bool] = False
    """No block attends: the modules called attention mix tokens by another method."""
    attends_apart: ClassVar[bool] = False
    """Blocks whose attention is that of the stack `cross` have no other attention; of the main
    stack, only the stream before and after them is known."""
    encodes: ClassVar[bool] = False
    """Even as a causal model, it sees later tokens unless `is_decoder` is set."""
    begins_with_bos: ClassVar[bool] = False
    """If the config states no `decoder_start_token_id`, the decoder begins with its
    `bos_token_id`."""
    position_ids: ClassVar[frozenset[str]] = frozenset()
    """Stacks of an encoder-decoder whose position ids are arguments of the model's forward."""

    prefix: ClassVar[bool] = False
    """All tokens of a prompt with an image attend to each other (`token_type_ids` of 0), and tokens
    after it to earlier ones (1)."""

    scores: ClassVar[Literal["", "one label", "many labels"]] = ""
    """The meaning of an image's scores in a model with an image tower and a text tower: exactly one
    text is right (softmax), or each text is right or wrong independently (sigmoid)."""
    staged: ClassVar[str] = ""
    """The structure that replaces a list of equal blocks; empty if there is such a list."""
    padded: ClassVar[bool] = False
    """The text tower was trained on texts padded to its maximum length, and attends to padding."""

    def parts(self, config: ModelConfig) -> Mapping[str, str]:
        """Return paths within a block where the finder's choice is wrong; an empty path means none.

        Keys: `attention`, `mixer` (the sublayer that replaces it), `attn_out` (the module that
        returns the added tensor), `output` (the linear map that reads `z`), `mlp` (several,
        separated by commas), `mlp_out`, `down`, `attn_norm`, `mlp_norm` (norms before the
        sublayers), `attn_output_norm`, `mlp_output_norm` (norms before the sum), `middle`, `end`
        (norms of the sums). Keys of the model: `final_norm` and `head` (the module that returns
        the unembedding's input, if the unembedding isn't a module).
        """
        return {}

    def arrangement(self, config: ModelConfig) -> BlockArrangement | None:
        """Return the arrangement; None: the finder tries those of `BlockArrangement` in order."""
        value = config.get("use_parallel_residual", config.get("parallel_attn"))
        return "parallel" if value is True else None

    def fused(self, n_heads: int, n_kv_heads: int, width: int) -> Mapping[str, TensorLayout] | None:
        """Return the layouts of q, k and v in a fused projection; None for the common orders."""
        return None

    def scales(self, config: ModelConfig) -> Mapping[str, float]:
        """Return the factor of each site's tensor, applied before the addition to the stream."""
        by = float(config.get("residual_multiplier") or 1.0)
        return {"attn_out": by, "mlp_out": by, "mixer_out": by}

    def without(self, config: ModelConfig) -> Mapping[str, str]:
        """Return unavailable sites, each with the reason."""
        nested = config.get("attn_config") or {}
        if config.get("clip_qkv") or nested.get("clip_qkv"):
            reason = "queries, keys and values are clamped outside of all modules"
            return {"q": reason, "k": reason, "v": reason}
        return {}

    def block(self, config: ModelConfig, layer: int, block: BlockAnatomy) -> BlockAnatomy:
        """Correct the finder's result for one block."""
        return block

    def block_lists(self, config: ModelConfig) -> Mapping[str, int]:
        """Return the ends of the paths of several lists that form a stack, in order, each with its
        number of blocks; empty for one list."""
        return {}

    def whole(self, config: ModelConfig) -> str:
        """Return the reason that rows can't start at a middle block, from cached activations of an
        unpatched run; empty if they can."""
        return ""

    def refused(self, config: ModelConfig) -> str:
        """Return the reason that the family isn't supported at all; empty if it is."""
        return ""

    def lost(self, config: ModelConfig) -> Mapping[str, str]:
        """Return unavailable stacks (`encoder`, `vision`), each with the reason.

        Here and in the methods below, `config` is the config of the whole model.
        """
        return {}

    def picture(self, config: ModelConfig) -> ModelInputs:
        """Return an image input for one prompt."""
        vision = config.get("vision_config") or config
        size = vision.get("image_size") or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = vision.get("num_channels") or vision.get("in_channels") or 3
        return {"pixel_values": (1, int(channels), int(height), int(width))}

    def in_front(self, config: ModelConfig) -> tuple[str, ...] | None:
        """Return the tokens before an image's patches in an image encoder, in order, with repeats.

        Args:
            config: The config of the encoder.

        Returns:
            Names out of `cls`, `distillation` and `register`; None if unknown.
        """
        return None

    def any_size(self, config: ModelConfig) -> bool:
        """Return whether an image encoder accepts sizes other than its config's."""
        return False

    def fixed_tokens(self, config: ModelConfig) -> str:
        """Return the reason that an image encoder reads no tokens after the patches, such as
        positions that its attention computes from the order of tokens; empty if it does."""
        return ""

    def sound(self, config: ModelConfig) -> ModelInputs:
        """Return a speech encoder's inputs for one prompt; empty for other models."""
        bins, places = config.get("num_mel_bins"), config.get("max_source_positions")
        return {"input_features": (1, bins, 2 * places)} if bins and places else {}


FAMILIES: Registry[Family] = Registry("model family")

_UNREGISTERED = Family()


def family(*model_types: str) -> Callable[[type[Family]], type[Family]]:
    """Register a family under the `model_type`s of its configs."""

    def register(entry: type[Family]) -> type[Family]:
        made = entry()
        for name in model_types:
            FAMILIES.add(name, made)
        return entry

    return register


def has_additive_positions(family: str, config: ModelConfig) -> bool:
    """Return whether the config adds a position term to attention scores."""
    keys = ("alibi", "relative_attention_num_buckets")
    return find_family(family).additive_positions or any(config.get(key) for key in keys)


def list_block_kinds(config: ModelConfig, n_layers: int) -> Sequence[str] | None:
    """Return the kind of each block of a stack; None if the config names none."""
    every = range(n_layers)
    kinds, full = config.get("layer_types"), config.get("fullatt_block_indexes")
    cross, count = config.get("cross_attention_layers"), config.get("num_global_layers")
    if isinstance(full, list):  # the other blocks attend within windows
        kinds = ["full" if n in full else "windowed" for n in every]
    elif isinstance(cross, list):
        kinds = ["attends to the image" if n in cross else "attends to the text" for n in every]
    elif isinstance(count, int):
        kinds = ["global" if n >= n_layers - count else "local" for n in every]
    return cast(Sequence[str], kinds) if isinstance(kinds, list) else None


def find_family(model_type: str) -> Family:
    """Return the entry of a `model_type`, or the defaults."""
    return FAMILIES.get(model_type) or _UNREGISTERED
