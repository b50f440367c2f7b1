"""The sites of a model: positions in the computation that rules read and write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Literal

from mechdsl.base.records import Record, Registry
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.syntax import UnknownWord

SiteAxis = Literal["layer", "head", "neuron", "expert"]

UnitKind = Literal["head", "kv_head", "neuron", "expert"]

VectorWidth = Literal["d_model", "d_head", "one", "vocab", "key", "n_experts"]

BlockStage = Literal[
    "stream", "norm", "key", "query", "weight", "mixed", "middle", "mlp", "in_mlp", "end", "outside"
]
"""Stages of a block in computation order: a write at one leaves earlier stages unchanged. `key` and
`norm` affect later tokens through attention, and `outside` is in no block."""

BlockModule = Literal["output", "down"]
"""Modules of a block, named as fields of `BlockAnatomy`."""

PassStage = Literal["embedding", "before", "inside", "after", "output"]

_SHAPES: dict[VectorWidth, str] = {
    "one": "one number per neuron",
    "key": "[key] per query position",
}


class SiteKind(Record):
    """Position of a site in a block, and the kind of its vectors."""

    name: str
    axes: tuple[SiteAxis, ...]
    """Coordinates of the site; `layer` is first."""
    width: VectorWidth
    """Length of the vector for each prompt, position and coordinate."""
    when: PassStage
    """`before`, `inside`, `after`: a write at layer L changes the input, the inside or the output
    of block L. `embedding` precedes all blocks, `output` follows all of them."""
    stage: BlockStage
    """Stage of the block, which determines the part that a write here recomputes."""
    order: int
    """Rank in the order in which a forward pass reaches the sites of one block."""
    meaning: str
    unit: UnitKind | None = None
    """Unit that the second axis counts; `kv_head` if the axis `head` counts key-value heads."""
    output_of: BlockModule | None = None
    """Module whose output is the site; None if the anatomy of the block specifies where it is."""
    short: str | None = None
    """Short name: `L3.attn` is `attn_out`; `H` and `N` are the letters of `L3H5` and `L3N512`."""
    stack: Stack = ""
    """A stack of `STACK_SITES`; empty for the main one."""

    @property
    def side(self) -> TokenSide:
        """The tokens that have a vector here, if only some have one."""
        if self.stack == "vision":
            return "image"
        if self.stack == "encoder" or (self.stack and self.component in ("k", "v")):
            return "source"
        return "target"

    @property
    def component(self) -> str:
        """Name without the stack."""
        return self.name.removesuffix(f" {self.stack}")

    @property
    def has_layer(self) -> bool:
        return "layer" in self.axes

    @property
    def shape(self) -> str:
        """Shape of one vector, as text for tables and messages."""
        return _SHAPES.get(self.width, f"[{self.width}]")


Stack = Literal["", "encoder", "cross", "vision"]

TokenSide = Literal["", "source", "target", "image"]
"""The tokens that have a vector: those of an encoder-decoder's encoder (`source`) or decoder
(`target`), or those of images in a prompt; empty for all tokens."""

STACK_SITES: dict[Stack, str] = {
    "encoder": "the encoder of an encoder-decoder",
    "cross": "the decoder's attention to the encoder",
    "vision": "the vision encoder of a vision-language model",
}
"""Stacks whose sites have a name with the stack: `z cross`."""


class SiteRegistry(Registry[SiteKind]):
    """The sites of a main stack; those of other stacks are found by name, as `z cross`."""

    def get(self, name: str) -> SiteKind | None:
        component, _, stack = name.partition(" ")
        kind = super().get(component)
        if not stack or kind is None:
            return kind
        stacks: dict[str, Stack] = {each: each for each in STACK_SITES}
        return _in_stack(kind, stacks[stack]) if stack in stacks else None

    def __getitem__(self, name: str) -> SiteKind:
        kind = self.get(name)
        if kind is None:
            raise KeyError(name)
        return kind


@cache
def _in_stack(kind: SiteKind, stack: Stack) -> SiteKind:
    """Return a site in another stack: encoders come before all blocks of the main stack."""
    name = f"{kind.name} {stack}"
    if stack != "cross":
        return replace(kind, name=name, stack=stack, when="embedding", stage="outside")
    # It comes after `attn_out` (60) and `resid_mid` (70), and before `mlp_norm` (80).
    order = SITES["resid_mid"].order + kind.order // 10
    return replace(kind, name=name, stack=stack, order=order)


SITES = SiteRegistry("site")


def site(
    name: str,
    axes: tuple[SiteAxis, ...],
    width: VectorWidth,
    when: PassStage,
    stage: BlockStage,
    order: int,
    meaning: str,
    *,
    unit: UnitKind | None = None,
    output_of: BlockModule | None = None,
    short: str | None = None,
) -> SiteKind:
    """Register a site; the arguments are the fields of `SiteKind`."""
    kind = SiteKind(name, axes, width, when, stage, order, meaning, unit, output_of, short)
    return SITES.add(name, kind)


_LAYER: tuple[SiteAxis, ...] = ("layer",)

_HEAD: tuple[SiteAxis, ...] = ("layer", "head")

_NEURON: tuple[SiteAxis, ...] = ("layer", "neuron")

_EXPERT: tuple[SiteAxis, ...] = ("layer", "expert")

site(
    "embed",
    (),
    "d_model",
    "embedding",
    "outside",
    0,
    "the output of the token embedding, or of the patch projection of an image, before position "
    "embeddings; class and register tokens of an image are as the embedding returns them",
)

site(
    "resid_pre",
    _LAYER,
    "d_model",
    "before",
    "stream",
    10,
    "the residual stream that enters the block",
)

site("attn_norm", _LAYER, "d_model", "inside", "norm", 20, "the input of attention, after its norm")

site(
    "q",
    _HEAD,
    "d_head",
    "inside",
    "query",
    30,
    "the head's query, after any query norm, before rotary",
    unit="head",
)

site(
    "k",
    _HEAD,
    "d_head",
    "inside",
    "key",
    31,
    "the key-value head's key, after any key norm, before rotary",
    unit="kv_head",
)

site("v", _HEAD, "d_head", "inside", "key", 32, "the key-value head's value", unit="kv_head")

site(
    "q_rot",
    _HEAD,
    "d_head",
    "inside",
    "query",
    33,
    "the head's query after rotary",
    unit="head",
)

site(
    "k_rot",
    _HEAD,
    "d_head",
    "inside",
    "key",
    34,
    "the key-value head's key after rotary",
    unit="kv_head",
)

site(
    "scores",
    _HEAD,
    "key",
    "inside",
    "weight",
    40,
    "attention scores before softmax: scaled, capped and masked",
    unit="head",
)

site(
    "pattern", _HEAD, "key", "inside", "weight", 41, "attention weights after softmax", unit="head"
)

site(
    "z",
    _HEAD,
    "d_head",
    "inside",
    "mixed",
    50,
    "the head's output before the output projection",
    unit="head",
    short="H",
)

site(
    "head_out",
    _HEAD,
    "d_model",
    "inside",
    "middle",
    51,
    "`z` through the head's slice of the output projection",
    unit="head",
)

site(
    "attn_out",
    _LAYER,
    "d_model",
    "inside",
    "middle",
    60,
    "the output of attention, which is added to the residual stream",
    short="attn",
)

site(
    "mixer_norm", _LAYER, "d_model", "inside", "norm", 61, "the input of the mixer, after its norm"
)

site(
    "mixer_out",
    _LAYER,
    "d_model",
    "inside",
    "middle",
    62,
    "the output of the mixer, which is added to the residual stream; the mixer is attention, or a "
    "state-space, convolution or recurrent layer in its place",
)

site(
    "resid_mid",
    _LAYER,
    "d_model",
    "inside",
    "middle",
    70,
    "the residual stream between attention and MLP",
)

site("mlp_norm", _LAYER, "d_model", "inside", "mlp", 80, "the input of the MLP, after its norm")

site(
    "router",
    _LAYER,
    "n_experts",
    "inside",
    "in_mlp",
    81,
    "the weight of each expert's output, 0 for experts that the router doesn't select",
)

site(
    "expert_out",
    _EXPERT,
    "d_model",
    "inside",
    "in_mlp",
    82,
    "the output of one expert times its weight, which is added to the sum of experts",
    unit="expert",
)

site(
    "mlp_hidden",
    _NEURON,
    "one",
    "inside",
    "in_mlp",
    90,
    "neurons after the activation function (after gating)",
    unit="neuron",
    short="N",
)

site(
    "mlp_out",
    _LAYER,
    "d_model",
    "inside",
    "end",
    100,
    "the output of the MLP, which is added to the residual stream",
    short="mlp",
)

site(
    "resid_post",
    _LAYER,
    "d_model",
    "after",
    "end",
    110,
    "the residual stream that leaves the block",
    short="resid",
)

site(
    "final_norm",
    (),
    "d_model",
    "output",
    "outside",
    120,
    "the input of the unembedding, after the final norm",
)

site(
    "logits",
    (),
    "vocab",
    "output",
    "outside",
    130,
    "the model's output, one number per token of the vocabulary",
)

SHORT_WORDS = tuple(
    kind.short for _, kind in SITES.items() if kind.short is not None and len(kind.short) > 1
)
"""Words that may follow the dot of `L3.mlp`, in addition to the names of sites."""

ATTENTION_INTERNAL_SITES = ("q_rot", "k_rot", "scores", "pattern")
"""Sites that are in no module and are accessed inside the computation of attention."""

ATTENTION_SITES = (
    *("q", "k", "v", "z", "head_out", "attn_norm", "attn_out"),
    *ATTENTION_INTERNAL_SITES,
)
"""Sites of attention, which models with other mixers lack."""

SITES_WITHOUT_STEPS = (
    *ATTENTION_INTERNAL_SITES,
    "embed",
    "head_out",
    "resid_mid",
    "router",
    "expert_out",
    "final_norm",
    "logits",
)
"""Sites without steps, which have no separate tensor in some passes or are outside blocks."""

EdgeChange = Literal["block", "reweight", "uniform", "weight", "allow"]
"""Kinds of changes to the weights of attention edges."""

CoordinateOperation = Literal["set", "add", "scale", "reconstruct", "exchange", "project out"]
"""Kinds of changes to coordinates in a basis."""


def sites_of_stage(*stages: BlockStage) -> tuple[str, ...]:
    """Return the sites of these stages."""
    return tuple(name for name, kind in SITES.items() if kind.stage in stages)


def sites_of_module(part: BlockModule) -> tuple[str, ...]:
    """Return the sites that this module returns."""
    return tuple(name for name, kind in SITES.items() if kind.output_of == part)


def find_short_site(short: str) -> SiteKind | None:
    """Return the site with the short name `attn`, `mlp`, `resid`, `H` or `N`."""
    return next((kind for _, kind in SITES.items() if kind.short == short), None)


_UNIT = re.compile(r"L\d+[HN]\d+(?:\.\w+)?")


GROUP_CALLS = {
    "saved": 'saved("group.json")',
    "fit": "fit(mask(size: 3), prompts: fruit, from: fewer, maximise: shift) at layers * heads * "
    "at last token",
}
"""Calls that define a group, with an example."""


def unknown_component(word: str, span: Span, names: Iterable[str] = ()) -> UnknownWord:
    """Create E0203 that suggests the component or unit (`L9H9`) that was most likely meant.

    Args:
        names: Further words that are valid there.
    """
    unit = next(_units(word), None)
    known = ", ".join(f"`{name}`" for name in SITES)
    hint = f"did you mean `{unit}`?" if unit else f"components are {known}"
    if unit is None and re.fullmatch(r"L\d*[HN]\d*", word):
        hint = "write both numbers: `L9H9` is head 9 of layer 9, `L9N9` a neuron"
    hint = did_you_mean(word, [*SITES, *names], hint)
    if word in GROUP_CALLS:
        hint = f"write `group g = {GROUP_CALLS[word]}`"
    if word == "all":
        hint = "write `ablate all but c` to ablate all edges except those of a circuit `c`, or "
        hint += "`ablate layers * heads * except g` for sites"
    return UnknownWord(span=span, kind="component", word=word, hint=hint)


def _units(word: str) -> Iterator[str]:
    """Yield units one edit away: `L10H0` for `L10yH0`, `l10h0`, `LH100` and `M10H0`."""
    places = range(len(word))
    letters = [i for i in places if word[i].isalpha()]
    yield from _whole(re.sub(r"[lhn](?=\d)", lambda letter: letter[0].upper(), word))
    yield from _whole(*(word[:i] + word[i + 1 :] for i in places))
    yield from _whole(*(word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :] for i in places))
    yield from _whole(*(word[:i] + letter + word[i + 1 :] for i in letters for letter in "LHN"))
    if (begins := _UNIT.match(word)) is not None:
        yield begins[0]


def _whole(*words: str) -> Iterator[str]:
    return (word for word in words if _UNIT.fullmatch(word))


def is_query_or_key(site: str) -> bool:
    """Return whether a site has queries or keys of attention, in any stack."""
    return SITES[site].component in ("q", "k")


def write_order(name: str, layer: int | None) -> tuple[int, int]:
    """Return a sort key for the order in which a forward pass reaches sites.

    `layer` is None for sites outside blocks: `embed` comes first, `final_norm` and `logits` last.
    """
    kind = SITES[name]
    if kind.when == "embedding":
        return (-1, kind.order + (0 if layer is None else (layer + 1) * _BLOCK_ORDER))
    if kind.when == "output" or layer is None:
        return (1 << 30, kind.order)
    return (layer, kind.order)


_BLOCK_ORDER = 1000
"""Difference of the ranks of equal sites in consecutive blocks of an encoder."""


def in_stack(site: str, stack: str) -> str:
    """Return the name of a site in a stack: `z cross`."""
    return f"{site} {stack}" if stack else site


def stop_layer(name: str, layer: int | None, n_layers: int) -> int | None:
    """Return the number of blocks to run before this site can be read.

    `n_layers + 1` means every block and the final norm, without the unembedding. None means the
    whole model.
    """
    kind = SITES[name]
    if kind.when == "embedding":
        return 0
    if name == "logits":
        return None
    if kind.when == "output" or layer is None:
        return n_layers + 1
    return layer if kind.when == "before" else layer + 1
