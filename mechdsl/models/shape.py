"""The sizes, sites and outputs of a model, and the hook points of its sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, ClassVar, Literal, cast

from mechdsl.base import limits
from mechdsl.base.records import Record, Registry
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import NoResidMid, SiteNotOnModel
from mechdsl.images.processing import PatchLayout
from mechdsl.vocab.sites import (
    ATTENTION_INTERNAL_SITES,
    ATTENTION_SITES,
    SITES,
    BlockModule,
    sites_of_module,
)

OutputTask = Literal["tokens", "one label", "many labels", "number"]
"""The meaning of outputs: logits of tokens, of labels of which one is right, of labels that are
right or wrong independently, or a number, as in regression."""

OutputPosition = Literal["every token", "first token", "last token", "image"]
"""The source of outputs: every token, a prompt's first token, its last token except padding, or
an image."""

PaddingSide = Literal["left", "right"]
"""The side of a prompt on which its row is padded."""

SEQUENCE_CLASSIFIER = "ForSequenceClassification"
"""Suffix of classes with one output per prompt."""

OTHER_SEQUENCE_CLASSIFIERS = ("ForMultipleChoice", "ForNextSentencePrediction")
"""Suffixes of classes with one output per several texts."""

IMAGE_CLASSIFIERS = ("ForImageClassification", "ForImageClassificationWithTeacher")
"""Suffixes of classes with one output per image."""

_CLASSIFIERS = ("ForTokenClassification", SEQUENCE_CLASSIFIER, *IMAGE_CLASSIFIERS)

ENCODER_TYPES = frozenset((
    "albert", "bert", "big_bird", "bros", "camembert", "canine", "convbert", "data2vec-text",
    "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "esmc", "eurobert",
    "flaubert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv2",
    "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "megatron-bert", "mobilebert",
    "modernbert", "modernvbert", "mpnet", "mra", "nomic_bert", "nystromformer", "perceiver",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert",
    "tapas", "ultrabert", "ultravbert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
))  # fmt: skip
"""Model types whose classifiers see the whole prompt at every token, unless `is_decoder` is set.
Their prompt classifiers read the first token, those of other types the last."""


def output_task(
    config: Mapping[str, Any], names: Sequence[str]
) -> tuple[OutputTask, tuple[str, ...]]:
    """Return the meaning of a class's outputs and the names of its labels.

    The names come from `id2label`, else they are the library's `LABEL_0` and so on.
    """
    if not any(name.endswith(_CLASSIFIERS) for name in names):
        return "tokens", ()
    labels = output_labels(config)
    if not labels:
        number = config.get("num_labels")
        count = number if isinstance(number, int) and 0 < number <= limits.SIZE else 2
        labels = tuple(f"LABEL_{n}" for n in range(count))
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        return "many labels", labels
    if problem == "regression" or (len(labels) == 1 and problem is None):
        return "number", labels
    return "one label", labels


def output_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the output names of `id2label` in numeric order; none if one is missing."""
    named = config.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    by_number = {str(key): str(name) for key, name in cast("Mapping[Any, Any]", named).items()}
    numbers = [str(n) for n in range(len(by_number))]
    return tuple(by_number[n] for n in numbers) if by_number.keys() == set(numbers) else ()


def is_headless(names: Sequence[str], model_type: str) -> bool:
    """Return whether the class is the library's for a model without a head: `BertModel`."""
    bare = re.sub(r"[_-]", "", model_type) + "model"
    return any(name.lower() == bare for name in names)


def output_position(names: Sequence[str], *, encodes: bool) -> OutputPosition:
    """Return the source of a class's outputs. encodes: every token sees every other token."""
    if any(name.endswith(IMAGE_CLASSIFIERS) for name in names):
        return "image"
    if not any(name.endswith(SEQUENCE_CLASSIFIER) for name in names):
        return "every token"
    return "first token" if encodes else "last token"


ModelInput = Literal[
    "text",
    "image",
    "audio",
    "two texts",
    "image to text",
    "sound to text",
    "attended image",
    "image and text",
]
"""The type of a model's input; `two texts` is an encoder's and a decoder's, and of `image to text`
and `sound to text`, the encoder reads an image or a sound of prompts. Prompts have no sounds for
`audio`. Of `attended image`, the language model reads a text, and some of its
blocks attend to an image."""


class BlockSizes(Record):
    """Sizes of one block; those of a component that it lacks are arbitrary."""

    heads: int
    kv_heads: int
    d_head: int
    """Width of a head's query and key."""
    d_value: int
    """Width of a head's value and of `z`; `d_head` in most models."""
    neurons: int

    @property
    def queries(self) -> int:
        """Width of all queries together."""
        return self.heads * self.d_head

    @property
    def keys(self) -> int:
        """Width of all keys together."""
        return self.kv_heads * self.d_head


class ModelShape(Record):
    """Sizes that coordinates are checked against; heads and layers count from 0."""

    architecture: str
    """Class name of the model (`GPT2LMHeadModel`), else its family."""
    family: str
    """`model_type` of the config (`gpt2`)."""
    blocks: tuple[BlockSizes, ...]
    """Sizes of each block: from the config, or from the modules of a loaded model."""
    d_model: int
    vocab_size: int
    max_positions: int | None
    parallel_block: bool
    """Attention and MLP read the same stream."""
    sites: frozenset[str]
    """Supported sites that this model has, as far as the config shows."""
    d_embed: int
    """Output width of the token embedding; `d_model` in most models."""
    n_experts: int
    """Number of experts that a router chooses from; 0 without a router."""
    causal: bool
    """No token sees a later token."""
    takes: ModelInput = "text"
    masked: bool = False
    """The model predicts tokens at their positions, as far as the config shows."""
    stands_in: bool = False
    """The model isn't available, and these sizes are placeholders."""
    d_final: int = 0
    """Width of `final_norm`; 0: `d_model`, as in most models."""
    d_logits: int = 0
    """Width of `logits`; 0: `vocab_size`, as in all models that predict tokens. Others have one
    number per label."""
    task: OutputTask = "tokens"
    labels: tuple[str, ...] = ()
    """Names of a classifier's outputs in order, or of a language model's outputs other than tokens
    if its config names them."""
    output_at: OutputPosition = "every token"
    side: Literal["", "vision", "text"] = ""
    """The tower, in a model that scores images with texts."""
    texts: ModelShape | None = None
    """The text tower, if this is the image tower."""
    padded: bool = False
    """Texts are padded to `max_positions`, and the padding affects the output."""
    classes: int = 0
    """Number of scored items that are candidates; they come first."""
    patches: PatchLayout | None = None
    """The token of each part of an image; None if the model doesn't read images alone, or if its
    layout isn't known."""
    partly: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    """Sites that only some blocks have, with the blocks; known for a loaded model."""
    others: Mapping[str, ModelShape] = field(default_factory=dict[str, "ModelShape"])
    """Shapes of the stacks of `STACK_SITES`."""
    without_vision: str = ""
    """Why rules can't act in the vision encoder of a vision-language model; empty if they can."""
    merged_side: int = 1
    """Rows, and columns, of patches of the vision encoder that a token of an image is made from."""
    resamples: bool = False
    """Whether tokens of images are resampled from patches, as in `ImageLayout.resamples`."""
    resampler_attends: bool = False
    """Whether a resampler with attention reads all patches for each token."""
    read_after: tuple[int, ...] = ()
    """Numbers of blocks of this vision encoder after which the language model reads its stream."""
    attended: int = 0
    """Number of tokens of an image that some blocks attend to, before the text of each prompt."""
    attending: int = 0
    """Number of these blocks."""
    tiles: int = 0
    """Number of tiles, each of the same number of these tokens."""
    starts: tuple[int, ...] | None = None
    """Tokens that a decoder begins with; None for other models, and if the config names none."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    """The part of the config that describes this stack."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def average(self, size: Callable[[BlockSizes], float]) -> int:
        """Return a size of a block, averaged over all blocks."""
        return round(sum(map(size, self.blocks)) / len(self.blocks))

    def largest(self, size: Callable[[BlockSizes], int]) -> int:
        """Return a size of the block in which it is largest."""
        return max(map(size, self.blocks))

    @property
    def read_layers(self) -> int:
        """Number of blocks up to the last stream that is read: all but those of a vision encoder
        whose output the language model doesn't read."""
        return self.read_after[-1] if self.read_after else self.n_layers

    @property
    def reads_prefix(self) -> bool:
        """Whether no activation depends on later tokens: those of an encoder do."""
        return self.causal and not self.encodes_apart

    @property
    def encodes_apart(self) -> bool:
        """Whether an encoder reads the prompt, its image or its sound, and a decoder writes the
        answer."""
        return self.takes in ("two texts", "image to text", "sound to text", "attended image")

    @property
    def attends_to_image(self) -> bool:
        """Whether some blocks attend to the vectors of an image in place of earlier tokens."""
        return self.takes == "attended image"

    @property
    def reads_images(self) -> bool:
        """Whether prompts may contain images."""
        return self.takes in ("image and text", "image to text", "attended image")

    @property
    def has_processor(self) -> bool:
        """Whether a processor reads prompts with their images or sounds."""
        return self.reads_images or self.takes == "sound to text"

    @property
    def has_encoder(self) -> bool:
        """Whether a decoder attends to an encoder, whatever it reads."""
        return self.encodes_apart or self.takes == "audio"

    @property
    def depth(self) -> int:
        """Number of blocks that most tokens of a prompt pass: in an encoder-decoder, the
        encoder's."""
        return self.others["encoder"].n_layers if "encoder" in self.others else self.n_layers

    @property
    def outputs(self) -> int:
        """Number of outputs in `logits`."""
        return self.d_logits or self.vocab_size

    @property
    def names_labels(self) -> bool:
        """Whether labels have names other than the defaults `LABEL_0` and `0`."""
        named = any(name not in (str(n), f"LABEL_{n}") for n, name in enumerate(self.labels))
        return named or bool(self.side)

    def in_stack(self, site: str) -> tuple[ModelShape, str]:
        """Return the shape of a site's stack, and the site's name without the stack."""
        name, _, stack = site.partition(" ")
        if not stack:
            return self, site
        if stack not in self.others and not self.stands_in:
            return replace(self, sites=frozenset()), name
        return self.others.get(stack, self), name

    def has(self, site: str, layer: int | None) -> bool:
        """Return whether a site exists, in one block if `layer` isn't None."""
        if " " in site:
            shape, name = self.in_stack(site)
            return shape.has(name, layer)
        return site in self.sites and (layer is None or layer in self.partly.get(site, (layer,)))


def stack_names(shape: ModelShape) -> Iterator[str]:
    """Yield the names of the stacks other than the main one."""
    if shape.attends_to_image:
        yield from ("cross", "vision") if shape.tiles else ("cross",)
    elif shape.has_encoder:
        yield from ("encoder", "cross")
    elif shape.takes == "image and text":
        yield "vision"


def required_stacks(shape: ModelShape) -> frozenset[str]:
    """Return the stacks without which nothing runs on an encoder-decoder."""
    return frozenset(stack_names(shape)) - {"vision"}


def list_by_layer(numbers: Sequence[int]) -> str:
    """Format a number of each layer: `4`, or `4, 6, 4` if layers differ."""
    several = numbers if len({*numbers}) > 1 else numbers[:1]
    return ", ".join(f"{number:,}" for number in several)


def unit_count(shape: ModelShape, site: str, layer: int | None) -> int:
    """Return the number of heads, key-value heads, neurons or experts of a site in a layer; 1 for
    whole vectors.

    Args:
        layer: The layer; None only for a site without layers.
    """
    shape, site = shape.in_stack(site)
    unit = SITES[site].unit
    if unit is None:
        return 1
    if unit == "expert":
        return shape.n_experts
    assert layer is not None
    block = shape.blocks[layer]
    return {"head": block.heads, "kv_head": block.kv_heads, "neuron": block.neurons}[unit]


def vector_width(shape: ModelShape, site: str, layer: int | None) -> int:
    """Return the length of one vector of a supported site in a layer.

    Args:
        layer: The layer; None only for a site without layers.
    """
    shape, site = shape.in_stack(site)
    match SITES[site].width:
        case "d_model":
            own = {"embed": shape.d_embed, "final_norm": shape.d_final}
            return own.get(site) or shape.d_model
        case "d_head":
            assert layer is not None
            block = shape.blocks[layer]
            return block.d_value if site in ("v", "z") else block.d_head
        case "n_experts":
            return shape.n_experts
        case "one":
            return 1
        case "vocab":
            return shape.outputs
        case other:
            raise ValueError(f"the width of `{site}` ({other}) depends on the prompt")


STAND_IN_MIN, STAND_IN_MAX = 12, 200
"""Bounds of the numbers of layers, heads and experts: a small model's, and a realistic maximum."""


def stand_in_shape(largest: Mapping[str, int]) -> ModelShape:
    """Return a model with every site and as many heads, neurons and experts as a file names.

    It has one more layer than named, because a path may continue after the last named one. Any
    error found with this shape would also occur with a real model, except the facts in
    `Diagnostic.depends_on`.

    Args:
        largest: The highest index of each word (`layer`, `head`, …) that a file names.
    """
    named = {word: largest.get(word, 0) + 1 for word in ("layer", "head", "expert")}
    named["layer"] += 1
    sizes = {word: min(STAND_IN_MAX, max(STAND_IN_MIN, number)) for word, number in named.items()}
    neurons = max(STAND_IN_MIN, largest.get("neuron", 0) + 1)
    return ModelShape(
        architecture="",
        family="",
        blocks=(BlockSizes(sizes["head"], sizes["head"], 1, 1, neurons),) * sizes["layer"],
        d_model=sizes["head"],
        vocab_size=1,
        max_positions=None,
        parallel_block=False,
        sites=frozenset(SITES),
        d_embed=sizes["head"],
        n_experts=sizes["expert"],
        causal=True,
        stands_in=True,
    )


def check_site(
    shape: ModelShape, site: str, *, model: str, span: Span | None = None
) -> Diagnostic | None:
    """Return the reason that a supported site isn't available (E0402, E0413), or None."""
    if shape.has(site, None):
        return None
    if SITES[site].stack:
        model_shape, _ = shape.in_stack(site)
        reason = f"not a part of its stack `{SITES[site].stack}`"
        known = model_shape.sites
        names = (f"`{name} {SITES[site].stack}`" for name in SITES if name in known)
        hint = "it has " + (", ".join(names) or "none")
        if SITES[site].stack not in shape.others:
            kind = "vision-language models" if SITES[site].stack == "vision" else "encoder-decoders"
            hint = f"remove `{SITES[site].stack}`: only {kind} have this stack"
            reason = f"{shape.architecture} has no stack `{SITES[site].stack}`"
        return SiteNotOnModel(span=span, model=model, site=site, reason=reason, hint=hint)
    if site == "resid_mid" and shape.parallel_block:
        return NoResidMid(span=span, model=model)
    reason = f"not a part of {shape.architecture}"
    hint = "it has " + ", ".join(f"`{name}`" for name in SITES if name in shape.sites)
    if site in ATTENTION_SITES and "mixer_out" in shape.sites:
        reason = "attention isn't supported in models with other mixers, such as state-space layers"
    if site in ATTENTION_INTERNAL_SITES and "z" in shape.sites:
        reason = "its attention is computed outside of transformers' attention registry"
        hint = (
            "make its attention class call `ALL_ATTENTION_FUNCTIONS` (`attention_interface`), as "
            "transformers' own models do: docs/own-models.md"
        )
    return SiteNotOnModel(span=span, model=model, site=site, reason=reason, hint=hint)


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

    def block_config(self, config: ModelConfig, layer: int) -> ModelConfig:
        """Return the sizes of a block that differ from the config's, under the config's keys.

        `per_layer_config` and lists with a number for each block are read for all families.
        """
        return {}

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
