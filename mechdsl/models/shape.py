"""The size of a model and the sites it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mechdsl.images.patches import PatchLayout
from mechdsl.models.heads_by_class import OutputAt, Task
from mechdsl.vocab.sites import SITES

ModelInput = Literal["text", "image", "audio", "two texts", "image and text"]
"""What a model is called with; `two texts` is an encoder's and a decoder's."""


@dataclass(frozen=True)
class ModelShape:
    """Numbers that coordinates are checked against; heads and layers count from 0."""

    architecture: str
    """Class name of the model (`GPT2LMHeadModel`), else its family."""
    family: str
    """`model_type` of the config (`gpt2`)."""
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocab_size: int
    max_positions: int | None
    parallel_block: bool
    """Attention and MLP read the same stream."""
    sites: frozenset[str]
    """Supported sites that this model has, as far as the config tells."""
    d_value: int
    """Width of a head's value and of `z`; `d_head` but for latent attention."""
    d_embed: int
    """Width of what the token embedding returns; `d_model` but for a few."""
    n_experts: int
    """Experts that a router chooses from, 0 where there are none."""
    causal: bool
    """No token sees a later one."""
    takes: ModelInput = "text"
    masked: bool = False
    """It predicts tokens in their own place, as far as the config tells."""
    stands_in: bool = False
    """The model isn't at hand, and these numbers stand in for its own."""
    d_final: int = 0
    """Width of `final_norm`; 0: `d_model`, as in all but a few."""
    d_logits: int = 0
    """Width of `logits`; 0: `vocab_size`, as in all that predict tokens. Others give a number for
    each label."""
    task: Task = "tokens"
    labels: tuple[str, ...] = ()
    """Names of the outputs of a classifier, in their order; of a language model whose outputs are
    others than its tokens, where its config names them."""
    output_at: OutputAt = "every token"
    side: Literal["", "vision", "text"] = ""
    """Which tower it is, of a model that scores images with texts."""
    texts: ModelShape | None = None
    """The tower for texts, where this is the one for images."""
    padded: bool = False
    """Its texts are padded to `max_positions`, and it sees that."""
    classes: int = 0
    """Of what is scored, those that are chosen from; they come first."""
    patches: PatchLayout | None = None
    """Which part of an image is which token; None where it reads no images alone, or that isn't
    known of its kind."""
    partly: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    """Sites that only some blocks have, and which; known of a loaded model."""
    sizes: Mapping[tuple[str, int], tuple[int, int]] = field(
        default_factory=dict[tuple[str, int], tuple[int, int]]
    )
    """(units, width) of a site in blocks where they are others; known of a loaded model."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)
    """The part of the config that describes this stack."""

    @property
    def outputs(self) -> int:
        """How many numbers `logits` are."""
        return self.d_logits or self.vocab_size

    @property
    def names_labels(self) -> bool:
        """Whether labels have names of their own: others than `LABEL_0` or `0`, by number."""
        named = any(name not in (str(n), f"LABEL_{n}") for n, name in enumerate(self.labels))
        return named or bool(self.side)

    def has(self, site: str, layer: int | None) -> bool:
        """Whether a site is there, in one block."""
        return site in self.sites and (layer is None or layer in self.partly.get(site, (layer,)))


def units(shape: ModelShape, site: str, layer: int | None = None) -> int:
    """How many heads, key-value heads or neurons a site has per layer, or in one layer; 1 for whole
    vectors."""
    if layer is not None and (site, layer) in shape.sizes:
        return shape.sizes[site, layer][0]
    match SITES[site].unit:
        case "head":
            return shape.n_heads
        case "kv_head":
            return shape.n_kv_heads
        case "neuron":
            return shape.d_mlp
        case "expert":
            return shape.n_experts
        case _:
            return 1


def width(shape: ModelShape, site: str, layer: int | None = None) -> int:
    """Length of one vector of a supported site, in one layer where layers differ."""
    if layer is not None and (site, layer) in shape.sizes:
        return shape.sizes[site, layer][1]
    match SITES[site].width:
        case "d_model":
            own = {"embed": shape.d_embed, "final_norm": shape.d_final}
            return own.get(site) or shape.d_model
        case "d_head":
            return shape.d_value if site in ("v", "z") else shape.d_head
        case "n_experts":
            return shape.n_experts
        case "one":
            return 1
        case "vocab":
            return shape.outputs
        case other:
            raise ValueError(f"the width of `{site}` ({other}) depends on the prompt")
