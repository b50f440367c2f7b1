"""The size of a model and the sites it has, read from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mechdsl.diagnostics import Diagnostic
from mechdsl.diagnostics.e04_model import (
    NoConfig,
    NoResidMid,
    NotADecoder,
    ShapeUnknown,
    SiteNotOnModel,
)
from mechdsl.models.adapters import family_of
from mechdsl.source import Span
from mechdsl.vocab.sites import SITES

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_MODEL = ("hidden_size", "n_embd", "d_model", "model_dim")
_HEAD_WIDTH = ("head_dim", "d_head", "d_kv", "kv_channels")
_MLP = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff")
_VOCAB = ("vocab_size",)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


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
    parallel_block: bool | None
    """Attention and MLP read the same stream; None: only the modules can tell."""
    sites: frozenset[str]
    """Supported sites that this model has, as far as the config tells."""


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def available_sites(*, parallel: bool | None, experts: bool) -> frozenset[str]:
    """Supported sites of a decoder with this kind of block."""
    missing: set[str] = set()
    if parallel:
        missing.add("resid_mid")
    if experts:
        missing.add("mlp_hidden")
    return frozenset(name for name, kind in SITES.items() if kind.supported) - missing


def shape_from_config(
    config: Mapping[str, Any], *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The shape that a `config.json` describes.

    `model` is the name in messages, `span` the model statement. Gives E0407 for a model that is
    no causal decoder and E0408 for a config that lacks a number.
    """
    architectures = config.get("architectures")
    names = [str(a) for a in cast(list[Any], architectures)] if architectures else []
    nested = config.get("text_config")
    text = cast(Mapping[str, Any], nested) if isinstance(nested, Mapping) else config
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    architecture = names[0] if names else model_type
    if names and not any(name.endswith(_DECODERS) for name in names):
        return None, [NotADecoder(span=span, model=model, architecture=architecture)]
    if config.get("is_encoder_decoder"):
        return None, [NotADecoder(span=span, model=model, architecture=architecture)]

    found = {
        "number of layers": (_first(text, _LAYERS), _LAYERS),
        "number of heads": (_first(text, _HEADS), _HEADS),
        "model width": (_first(text, _MODEL), _MODEL),
        "vocabulary size": (_first(text, _VOCAB) or _first(config, _VOCAB), _VOCAB),
    }
    missing: list[Diagnostic] = [
        ShapeUnknown(span=span, model=model, what=what, keys=", ".join(f"`{k}`" for k in keys))
        for what, (value, keys) in found.items()
        if not value
    ]
    if missing:
        return None, missing
    n_layers, n_heads, d_model, vocab_size = (value or 0 for value, _ in found.values())
    parallel = family_of(model_type).parallel(text)
    multi_query = bool(text.get("multi_query")) and not text.get("new_decoder_architecture")
    return ModelShape(
        architecture=architecture,
        family=model_type,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=1 if multi_query else _first(text, _KV_HEADS) or n_heads,
        d_model=d_model,
        d_head=_first(text, _HEAD_WIDTH) or d_model // n_heads,
        d_mlp=_first(text, _MLP) or 4 * d_model,
        vocab_size=vocab_size,
        max_positions=_first(text, _POSITIONS),
        parallel_block=parallel,
        sites=available_sites(parallel=parallel, experts=bool(_first(text, _EXPERTS))),
    ), []


def read_shape(
    folder: Path, *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The shape of the model in a folder; E0404 where its `config.json` can't be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        return None, [NoConfig(span=span, model=model, reason=str(reason).lower())]
    except json.JSONDecodeError as error:
        return None, [NoConfig(span=span, model=model, reason=f"not JSON: {error.msg}")]
    if not isinstance(config, dict):
        return None, [NoConfig(span=span, model=model, reason="it is not a JSON object")]
    return shape_from_config(cast(dict[str, Any], config), model=model, span=span)


def missing_site(
    shape: ModelShape, site: str, *, model: str, span: Span | None = None
) -> Diagnostic | None:
    """Why a supported site of the language is not one of this model (E0402, E0413), or None."""
    if site in shape.sites:
        return None
    if site == "resid_mid" and shape.parallel_block:
        return NoResidMid(span=span, model=model)
    available = ", ".join(f"`{name}`" for name in SITES if name in shape.sites)
    return SiteNotOnModel(
        span=span, model=model, site=site, architecture=shape.architecture, available=available
    )


def units(shape: ModelShape, site: str) -> int:
    """How many heads, key-value heads or neurons a site has per layer; 1 for whole vectors."""
    match SITES[site].unit:
        case "head":
            return shape.n_heads
        case "kv_head":
            return shape.n_kv_heads
        case "neuron":
            return shape.d_mlp
        case _:
            return 1


def width(shape: ModelShape, site: str) -> int:
    """Length of one vector of a supported site."""
    match SITES[site].width:
        case "d_model":
            return shape.d_model
        case "d_head":
            return shape.d_head
        case "one":
            return 1
        case "vocab":
            return shape.vocab_size
        case other:
            raise ValueError(f"the width of `{site}` ({other}) depends on the prompt")
