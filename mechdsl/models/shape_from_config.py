"""The shape of a model, read from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from mechdsl.base.json_text import load_json
from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import BadSize, NoConfig, NotATextModel, OneOutput, ShapeUnknown
from mechdsl.models.config_keys import (
    ALIKE,
    DECODERS,
    EXPERTS,
    HEAD_WIDTH,
    HEADS,
    KV_HEADS,
    LAYERS,
    MIXERS,
    MLP,
    MODEL,
    NARROW,
    POSITIONS,
    TIMES,
    VOCAB,
)
from mechdsl.models.config_parts import (
    impossible_sizes,
    is_written,
    part_of,
    size_too_large,
    without_blocks,
)
from mechdsl.models.families import family_of
from mechdsl.models.heads_by_class import (
    ENCODERS,
    OTHERS_OF_PROMPTS,
    Task,
    is_headless,
    output_at,
    task_of,
)
from mechdsl.models.library_defaults import with_defaults
from mechdsl.models.patch_layout import patch_layout
from mechdsl.models.shape import ModelInput, ModelShape
from mechdsl.models.sparsity import dense_blocks
from mechdsl.vocab.sites import SITES, WITHIN_ATTENTION, of_part


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def available_sites(*, parallel: bool, experts: bool, dense: bool, mixers: bool) -> frozenset[str]:
    """Sites of a decoder with these kinds of blocks."""
    missing: set[str] = set()
    if parallel:
        missing.add("resid_mid")
    if not dense:
        missing |= {"mlp_hidden", *of_part("down")}
    if not experts:
        missing |= {"router", "expert_out"}
    if mixers:
        missing |= {"q", "k", "v", "z", "head_out", "attn_norm", "attn_out", *WITHIN_ATTENTION}
        missing |= {*of_part("output")}
    else:
        missing |= {"mixer_norm", "mixer_out"}
    return frozenset(SITES) - missing


def shape_from_config(
    config: Mapping[str, Any], *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The shape that a `config.json` describes, of the stack that `layer` means.

    `model` is the name in messages, `span` the model statement. Gives E0408 for a config that
    lacks a number, E0420 for one that can't be.
    """
    architectures = config.get("architectures")
    names = [str(a) for a in cast(list[Any], architectures)] if architectures else []
    if (task := _scores(config, names)) is not None:
        return _towers(config, names, task, model=model, span=span)
    takes = _takes(config, names)
    text = part_of(config, "text_config", "decoder") if takes != "image" else config
    if takes == "image":
        text = part_of(config, "vision_config")
    return _shape(text, config, names, takes, model=model, span=span)


def _scores(config: Mapping[str, Any], names: list[str]) -> Task | None:
    """What the scores of a model with two towers are; None of other models."""
    kind = str(config.get("model_type"))
    entry = family_of(kind)
    parts = (config.get(key) for key in ("vision_config", "text_config"))
    if not entry.scores or not is_headless(names, kind):
        return None
    return entry.scores if all(isinstance(part, Mapping) for part in parts) else None


def _towers(
    config: Mapping[str, Any], names: list[str], task: Task, *, model: str, span: Span | None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The tower for images of a model with two, and in it that for texts."""
    told: dict[str, Any] = {"model": model, "span": span}
    vision, found = _shape(
        part_of(config, "vision_config"), config, names, "image", causal=False, **told
    )
    part = part_of(config, "text_config")
    kind = str(part.get("model_type"))
    texts, more = _shape(part, part, names, "text", causal=not family_of(kind).encodes, **told)
    if vision is None or texts is None:
        return None, [*found, *more]
    padded = family_of(str(config.get("model_type"))).padded
    texts = replace(texts, task=task, side="text", output_at="last token", padded=padded)
    output = vision.sites | {"logits"}
    vision = replace(vision, sites=output, task=task, side="vision", output_at="image", texts=texts)
    return vision, []


def stack_shape(shape: ModelShape, config: Mapping[str, Any], stack: str) -> ModelShape | None:
    """The shape of a stack beside the main one: `encoder`, `cross`, `vision`; `config` is the
    whole model's. None where the config lacks a number."""
    match stack:
        case "cross":
            return shape
        case "encoder":
            part = part_of(part_of(config, "encoder"), "text_config")
            part = {**part, **_encoder_numbers(config)}
        case _:
            part = part_of(config, "vision_config", "vision_tower", "vision_model")
            if "embed_dim" in part:  # and `hidden_size` is the language model's
                part = {**part, "hidden_size": part["embed_dim"]}
    found, _ = _shape(part, part, [shape.architecture], "image", causal=False)
    return found


def _encoder_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder-decoder's own keys for its encoder, under the names that others use."""
    keys = {
        "num_decoder_layers": ("num_layers", "encoder_layers", "encoder_num_hidden_layers"),
        "num_attention_heads": ("encoder_attention_heads", "encoder_num_attention_heads"),
        "num_key_value_heads": ("encoder_num_key_value_heads",),
        "intermediate_size": ("encoder_ffn_dim",),
    }
    found = {key: _first(config, own) for key, own in keys.items()}
    return {key: value for key, value in found.items() if value}


def _takes(config: Mapping[str, Any], names: list[str]) -> ModelInput:
    decodes = any(name.endswith("ForCausalLM") for name in names)
    if config.get("is_encoder_decoder") and not decodes:
        sounds = family_of(str(config.get("model_type"))).sound(config)
        return "audio" if sounds else "two texts"
    if decodes:
        return "text"
    images = isinstance(config.get("vision_config"), Mapping)
    if images and not any("ForImageClassification" in n for n in names):
        return "image and text"
    return "image" if images or {"patch_size", "image_size"} <= config.keys() else "text"


def _numbers(
    text: Mapping[str, Any],
    config: Mapping[str, Any],
    takes: ModelInput,
    model: str,
    span: Span | None,
) -> tuple[dict[str, int], list[Diagnostic]]:
    """The numbers that every model has, by what they are; or what is wrong with them."""
    impossible: list[Diagnostic] = [
        BadSize(span=span, model=model, key=key, value=json.dumps(value))
        for key, value in impossible_sizes({**{k: config.get(k) for k in VOCAB}, **text})
    ]
    if impossible:
        return {}, impossible
    found = {
        "number of layers": (_first(text, LAYERS) or _listed(text), LAYERS),
        "number of heads": (_first(text, HEADS) or _headless(text), HEADS),
        "model width": (_first(text, MODEL), MODEL),
        "vocabulary size": (_first(text, VOCAB) or _first(config, VOCAB), VOCAB),
    }
    if takes == "image":
        del found["vocabulary size"]
    missing: list[Diagnostic] = [
        ShapeUnknown(span=span, model=model, what=what, keys=", ".join(f"`{k}`" for k in keys))
        for what, (value, keys) in found.items()
        if not value
    ]
    if missing:
        return {}, missing
    if (too_large := size_too_large(text, model, span)) is not None:
        return {}, [too_large]
    return {what: value or 0 for what, (value, _) in found.items()}, []


def _shape(
    text: Mapping[str, Any],
    config: Mapping[str, Any],
    names: list[str],
    takes: ModelInput,
    *,
    causal: bool | None = None,
    model: str = "model",
    span: Span | None = None,
) -> tuple[ModelShape | None, list[Diagnostic]]:
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    entry = family_of(model_type)
    numbers, refused = _numbers(text, config, takes, model, span)
    if refused:
        named = names[0] if names else model_type
        return None, without_blocks(refused, entry.staged, model=model, named=named)
    n_heads, d_model = numbers["number of heads"], numbers["model width"]
    parallel = entry.arrangement(text) == "parallel"
    multi_query = bool(text.get("multi_query")) and not text.get("new_decoder_architecture")
    latent = _first(text, ("qk_nope_head_dim",))
    rotary = _first(text, ("qk_rope_head_dim",))
    width = _first(text, HEAD_WIDTH) or d_model // n_heads
    d_head = latent + (rotary or 0) if latent else width
    experts = _first(text, EXPERTS) or _first(part_of(text, "ffn_config"), EXPERTS) or 0
    experts = 0 if text.get("is_moe") is False else experts
    dense = dense_blocks(text, numbers["number of layers"]) if experts else frozenset[int]()
    sparse = frozenset(range(numbers["number of layers"])) - dense
    partly: dict[str, frozenset[int]] = {}
    if dense:
        partly = dict.fromkeys(("mlp_hidden", *of_part("down")), dense)
        partly |= {"router": sparse, "expert_out": sparse}
    task, labels = task_of(config, names)
    encodes = entry.encodes or (task != "tokens" and model_type in ENCODERS)
    if causal is None:
        decodes = any(name.endswith(DECODERS) for name in names) or not names
        decodes = decodes or task != "tokens"
        causal = decodes and takes != "image" and (not encodes or _decodes(text))
        causal = causal and text.get("use_bidirectional_attention") not in (True, "all")
    return ModelShape(
        architecture=names[0] if names else model_type,
        family=model_type,
        n_layers=numbers["number of layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads if latent else 1 if multi_query else _kv_heads(text) or n_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=(_first(text, TIMES) or 0) * d_model or _first(text, MLP) or 4 * d_model,
        vocab_size=numbers.get("vocabulary size", 0),
        max_positions=max(_first(text, POSITIONS) or 0, 0) or None,
        parallel_block=parallel,
        sites=available_sites(
            parallel=parallel,
            experts=bool(experts),
            dense=bool(dense) or not experts,
            mixers=_has_mixers(text),
        )
        - ({"logits"} if _without_head(names, model_type, takes, task) else set()),
        d_value=_first(text, ("v_head_dim",)) or d_head,
        d_embed=_first(text, ("input_embedding_size", *NARROW)) or d_model,
        n_experts=experts,
        causal=causal,
        takes=takes,
        masked=any("ForMaskedLM" in name for name in names),
        d_final=_narrow(text, d_model),
        d_logits=len(labels),
        task=task,
        labels=labels,
        output_at=output_at(names, encodes=encodes),
        patches=patch_layout(entry, text) if takes == "image" else None,
        partly=partly,
        config=text,
    ), []


def _without_head(names: list[str], model_type: str, takes: ModelInput, task: Task) -> bool:
    return is_headless(names, model_type) or (takes == "image" and task == "tokens")


def _narrow(config: Mapping[str, Any], d_model: int) -> int:
    """Width of what the unembedding reads, 0 for the model's."""
    width = _first(config, ("output_embedding_size", *NARROW)) or 0
    return width if width != d_model else 0


def _kv_heads(config: Mapping[str, Any]) -> int | None:
    if config.get("new_decoder_architecture") is False:  # Falcon: written, but not used
        return None
    return _first(config, KV_HEADS)


def _decodes(config: Mapping[str, Any]) -> bool:
    return bool(config.get("is_decoder"))


def _has_mixers(config: Mapping[str, Any]) -> bool:
    return mixes(config) or any(key.startswith(MIXERS) for key in config)


def mixes(config: Mapping[str, Any]) -> bool:
    """Whether the config names blocks that attend without a softmax, or not at all."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    return any(str(kind).startswith("linear_attention") for kind in kinds)


def _listed(config: Mapping[str, Any]) -> int | None:
    """How many blocks a list names."""
    blocks = config.get("layers_block_type")
    return len(cast(list[Any], blocks)) if isinstance(blocks, list) else None


def _headless(config: Mapping[str, Any]) -> int | None:
    """State-space models have no heads; one stands for all."""
    return 1 if _has_mixers(config) else None


def read_config(
    folder: Path, *, name: str = "config.json", model: str = "model", span: Span | None = None
) -> tuple[dict[str, Any] | None, list[Diagnostic]]:
    """The `config.json` of a folder, or another file of that kind; E0404 where it can't be read."""

    def refused(reason: str) -> tuple[None, list[Diagnostic]]:
        return None, [NoConfig(span=span, model=model, reason=reason, file=name)]

    try:
        config = load_json((folder / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        return refused(str(reason).lower())
    except ValueError as error:
        return refused(f"not JSON: {getattr(error, 'msg', str(error))}")
    if not isinstance(config, dict):
        return refused("it is not a JSON object")
    return cast(dict[str, Any], config), []


def shape_of(
    config: Mapping[str, Any], *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The shape that a folder's config describes, with what its kind takes for granted; E0408 for a
    number that neither says."""
    try:
        shape, found = shape_from_config(config, model=model, span=span)
        if shape is None and all(isinstance(each, ShapeUnknown) for each in found):
            text = part_of(config, "text_config", "decoder")
            if not is_written(text, found):
                whole = with_defaults(config, ALIKE)
                return shape_from_config(whole, model=model, span=span)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # Anything may stand behind a key, and each family reads its own.
        reason = f"one of its entries is not what it should be ({error})"
        return None, [NoConfig(span=span, model=model, reason=reason)]
    return shape, found


def read_shape(
    folder: Path, *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """The shape of the model in a folder; E0404 where its `config.json` can't be read, E0407 where
    it doesn't read text alone, E0439 where its output is one that can't be measured."""
    config, found = read_config(folder, model=model, span=span)
    if config is None:
        return None, found
    shape, found = shape_of(config, model=model, span=span)
    if shape is not None and (
        shape.takes not in ("text", "image and text", "image")
        or (shape.takes == "image" and shape.patches is None)
    ):
        return None, [NotATextModel(span=span, model=model, architecture=shape.architecture)]
    if shape is not None and shape.architecture.endswith(OTHERS_OF_PROMPTS):
        reason = "it reads several texts at once"
        return None, [
            OneOutput(span=span, model=model, architecture=shape.architecture, reason=reason)
        ]
    return shape, found
