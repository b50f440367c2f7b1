"""Read the shape of a model from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.files import load_json
from mechdsl.base.limits import is_integer
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import (
    BadSize,
    ComponentNotFound,
    ModelTooLarge,
    NoConfig,
    NotATextModel,
    ShapeUnknown,
    SingleOutput,
)
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.images.processing import PatchLayout
from mechdsl.models.families import find_family  # registers the families
from mechdsl.models.shape import (
    ENCODER_TYPES,
    OTHER_SEQUENCE_CLASSIFIERS,
    BlockSizes,
    Family,
    ModelConfig,
    ModelInput,
    ModelShape,
    OutputTask,
    is_headless,
    output_position,
    output_task,
    stack_names,
)
from mechdsl.vocab.sites import ATTENTION_INTERNAL_SITES, ATTENTION_SITES, SITES, sites_of_module

LAYER_KEYS = (
    "num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers",
    "n_layers", "depth", "decoder_num_hidden_layers",
)  # fmt: skip

HEAD_KEYS = (
    "num_attention_heads", "n_head", "decoder_attention_heads", "num_heads", "n_heads",
    "attention_heads", "decoder_num_attention_heads",
)  # fmt: skip

KV_HEAD_KEYS = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "decoder_num_key_value_heads",
)  # fmt: skip

WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")

HEAD_WIDTH_KEYS = ("head_dim", "d_head", "d_kv", "kv_channels")

MLP_KEYS = (
    "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size",
    "intermediate_size", "n_inner", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "d_ff", "dff",
    "hidden_dim",
)  # fmt: skip

MLP_FACTOR_KEYS = ("intermediate_multiple_size",)

VOCAB_KEYS = ("vocab_size",)

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")

EMBEDDING_KEYS = ("embedding_size", "word_embed_proj_dim")
"""Widths of token embeddings, before and after the stream, if they differ from the model's."""

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

KEY_GROUPS = (
    LAYER_KEYS,
    HEAD_KEYS,
    KV_HEAD_KEYS,
    WIDTH_KEYS,
    HEAD_WIDTH_KEYS,
    MLP_KEYS,
    MLP_FACTOR_KEYS,
    VOCAB_KEYS,
    POSITION_KEYS,
    EMBEDDING_KEYS,
    EXPERT_KEYS,
)
"""Groups of keys with the same meaning."""

MIXER_KEYS = (
    "mamba", "ssm", "state_size", "conv_L_cache", "linear_num_", "linear_attn", "lru_width",
    "rescale_every", "qk_dim_factor", "short_conv",
)  # fmt: skip
"""Prefixes of keys found only in configs of state-space, convolution or recurrent models."""

COUNT_KEYS = (LAYER_KEYS, HEAD_KEYS, KV_HEAD_KEYS, WIDTH_KEYS, MLP_KEYS, VOCAB_KEYS)
"""Sizes that can't be 0; for others, 0 means that the model has none."""

DECODER_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

OTHER_SIZE_KEYS = (
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "input_embedding_size",
    "output_embedding_size",
)  # fmt: skip

SIZE_LIMITS: Mapping[str, int] = {
    **dict.fromkeys(
        (*WIDTH_KEYS, *HEAD_WIDTH_KEYS, *MLP_KEYS, *VOCAB_KEYS, *EMBEDDING_KEYS, *OTHER_SIZE_KEYS),
        limits.SIZE,
    ),
    **dict.fromkeys(MLP_FACTOR_KEYS, limits.LAYERS),
    **dict.fromkeys((*HEAD_KEYS, *KV_HEAD_KEYS), limits.HEADS),
    **dict.fromkeys(EXPERT_KEYS, limits.EXPERTS),
    **dict.fromkeys(LAYER_KEYS, limits.LAYERS),
}
"""The maximum of each key."""


def subconfig(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return the config of a component, or the whole config if it isn't nested."""
    for key in keys:
        if isinstance(nested := config.get(key), Mapping):
            return cast(Mapping[str, Any], nested)
    return config


def find_impossible_sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield keys of sizes whose value isn't a size: below 1, or not an integer.

    Lists belong to models whose blocks differ, and the library replaces null.
    """
    for keys, least in (
        *((keys, 1) for keys in COUNT_KEYS),
        (HEAD_WIDTH_KEYS, 0),
        (EXPERT_KEYS, 0),
    ):
        for key in keys:
            value = config.get(key)
            if value is None or isinstance(value, bool | list | Mapping):
                continue
            if not isinstance(value, int) or value < least:
                yield key, value
            break  # later keys of the group aren't read


def check_sizes(config: Mapping[str, Any], model: str, span: Span | None) -> Diagnostic | None:
    """Return E0430 for an implausible size: a model of that size would exhaust the memory."""
    for key, value in {**subconfig(config, "ffn_config"), **config}.items():
        most = SIZE_LIMITS.get(key)
        if most is not None and isinstance(value, int) and abs(value) > most:
            return ModelTooLarge(span=span, model=model, key=key, number=value, most=most)
    return None


def explain_missing_blocks(
    refused: list[Diagnostic], staged: str, *, model: str, named: str
) -> list[Diagnostic]:
    """Replace missing sizes by E0409 for a model without a list of equal blocks.

    staged: the structure it has instead; empty if it has such a list. named: the model's class.
    """
    if not staged or not all(isinstance(problem, ShapeUnknown) for problem in refused):
        return refused
    hint = "use a vision transformer with uniform blocks: ViT, DeiT, DINOv2, BEiT, CLIP"
    span, part = refused[0].span, "list of blocks"
    return [
        ComponentNotFound(
            span=span, model=model, architecture=named, part=part, reason=staged, hint=hint
        )
    ]


def is_in_config(config: Mapping[str, Any], problems: Iterable[Diagnostic]) -> bool:
    """Return whether a size that couldn't be read is in the config nevertheless."""
    keys = {
        key for problem in problems if isinstance(problem, ShapeUnknown) for key in problem.named
    }
    return any(key in config for key in keys)


DEFAULTS_FILE = Path(__file__).with_name("library_defaults.json")

SUBCONFIG_KEYS = ("text_config", "vision_config", "decoder", "encoder")
"""Keys of the configs of components."""


@cache
def read_defaults() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(DEFAULTS_FILE.read_text(encoding="utf-8"))


def add_defaults(
    config: Mapping[str, Any],
    alike: Iterable[tuple[str, ...]],
    kind: str = "",
    table: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Add the library's defaults to a config; unknown model types stay unchanged.

    Args:
        config: The config.
        alike: Groups of keys with the same meaning, of which a config has one.
        kind: The `model_type`, if the config doesn't have it.
        table: Defaults by model type; None for the package's table.
    """
    kind = str(config.get("model_type", kind))
    table = read_defaults() if table is None else table
    known = table.get(kind, {})
    groups = {key: group for group in alike for key in group}
    defaults: dict[str, Any] = {"model_type": kind, **config} if kind else {**config}
    for key, value in known.items():
        if all(defaults.get(each) is None for each in groups.get(key, (key,))):
            defaults[key] = value
    for part in SUBCONFIG_KEYS:
        given, expected = defaults.get(part), known.get(part, {})
        if isinstance(given, Mapping):
            own = cast("Mapping[str, Any]", given)
            defaults[part] = add_defaults(own, alike, expected.get("model_type", ""), table)
    return defaults


def find_dense_blocks(config: ModelConfig, n_layers: int) -> frozenset[int]:
    """Return the blocks without experts, counted from 0."""
    layers = frozenset(range(n_layers))
    for key, kind in (("mlp_layer_types", "dense"), ("layers_block_type", "mlp")):
        kinds = _config_list(config, key)
        if len(kinds) == n_layers:
            return frozenset(layer for layer, own in enumerate(kinds) if own == kind)
    if "moe_layers" in config or "interleave_moe_layer_step" in config:  # Llama 4
        step = _config_number(config, "interleave_moe_layer_step", 1)
        return layers - frozenset(
            _config_list(config, "moe_layers") or range(step - 1, n_layers, step)
        )
    if period := _config_number(config, "expert_layer_period"):  # Jamba
        offset = _config_number(config, "expert_layer_offset")
        return frozenset(layer for layer in layers if layer % period != offset)
    first = max(
        _config_number(config, key) for key in ("first_k_dense_replace", "num_dense_layers")
    )
    dense = {*range(first), *_config_list(config, "mlp_only_layers")}
    for key in ("decoder_sparse_step", "moe_layer_interval"):
        if step := _config_number(config, key):
            dense |= {layer for layer in layers if (layer + 1) % step}
    if "moe_layer_interval" in config:  # ERNIE 4.5
        end = _config_number(config, "moe_layer_end_index", -1)
        dense |= set(range(_config_number(config, "moe_layer_start_index")))
        dense |= set(range(end + 1, n_layers)) if end >= 0 else set()
    return frozenset(dense & layers)


def _config_number(config: ModelConfig, key: str, default: int = 0) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else default


def _config_list(config: ModelConfig, key: str) -> list[Any]:
    value = config.get(key)
    return cast(list[Any], value) if isinstance(value, list) else []


MAX_IMAGE_SIDE = 4096
"""Maximum pixels of an image side."""


def read_patch_layout(entry: Family, config: Mapping[str, Any]) -> PatchLayout | None:
    """Return the layout of an encoder's config; None if its family doesn't define one."""
    front = entry.in_front(config)
    patch, size = (_sides(config.get(key)) for key in ("patch_size", "image_size"))
    if front is None or patch is None or size is None:
        return None
    return PatchLayout(front, patch, size, entry.any_size(config), entry.fixed_tokens(config))


def _sides(value: object) -> tuple[int, int] | None:
    """Return (height, width) of a size that may be a single number."""
    sides = cast("list[object]", value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(isinstance(n, int) and 0 < n <= MAX_IMAGE_SIDE for n in sides):
        return None
    return cast("tuple[int, int]", tuple(sides))


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if is_integer(value):
            return value
    return None


def available_sites(*, parallel: bool, experts: bool, dense: bool, mixers: bool) -> frozenset[str]:
    """Return the sites of a decoder with these types of blocks."""
    missing: set[str] = set()
    if parallel:
        missing.add("resid_mid")
    if not dense:
        missing |= {"mlp_hidden", *sites_of_module("down")}
    if not experts:
        missing |= {"router", "expert_out"}
    if mixers:
        missing |= {*ATTENTION_SITES, *sites_of_module("output")}
    else:
        missing |= {"mixer_norm", "mixer_out"}
    return frozenset(SITES) - missing


def shape_from_config(
    config: Mapping[str, Any], *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """Return the shape that a `config.json` describes, of the stack that `layer` refers to.

    `model` is the name in messages, `span` the model statement. Returns E0408 if the config lacks a
    size, E0420 if a size is impossible.
    """
    architectures = config.get("architectures")
    names = [str(a) for a in cast(list[Any], architectures)] if architectures else []
    if (task := _scores(config, names)) is not None:
        return _towers(config, names, task, model=model, span=span)
    takes = _takes(config, names)
    text = subconfig(config, "text_config", "decoder") if takes != "image" else config
    if takes == "image":
        text = subconfig(config, "vision_config")
    shape, problems = _shape(text, config, names, takes, model=model, span=span)
    if shape is not None and takes == "attended image":
        shape = _with_attended_image(shape, config)
    if shape is not None and shape.encodes_apart:
        shape = _with_stacks(shape, config)
    if shape is not None and takes == "attended image":
        shape = _with_attending_blocks(shape)
    if shape is not None and takes == "image and text":
        shape = _with_vision(shape, config)
    return shape, problems


def _with_attended_image(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """Add the number of image tokens that blocks attend to, as far as the config shows it."""
    vision = subconfig(config, "vision_config")
    size, patch, tiles = (vision.get(k) for k in ("image_size", "patch_size", "max_num_tiles"))
    blocks = shape.config.get("cross_attention_layers")
    if not (isinstance(size, int) and isinstance(patch, int) and isinstance(tiles, int) and patch):
        return shape
    count = tiles * ((size // patch) ** 2 + 1)
    return replace(shape, attended=count, attending=len(blocks) if blocks else 0, tiles=tiles)


def _with_attending_blocks(shape: ModelShape) -> ModelShape:
    """Divide the blocks into those with the sites of `cross` and those with all other sites, if the
    config names the blocks that attend to an image."""
    cross = shape.others.get("cross")
    blocks = shape.config.get("cross_attention_layers")
    if cross is None or not isinstance(blocks, (list, tuple)):
        return shape
    named = cast(Sequence[Any], blocks)
    attending = frozenset(each for each in named if isinstance(each, int))
    apart = frozenset(range(shape.n_layers)) - attending
    every = {"resid_pre", "resid_post", "mlp_norm", "mlp_hidden", "mlp_out"}
    sites = {site for site in shape.sites - every if SITES[site].has_layer}
    cross = replace(cross, partly=dict.fromkeys(cross.sites, attending))
    others = {**shape.others, "cross": cross}
    if "vision" in others:
        others["vision"] = with_attention(others["vision"])
    return replace(shape, partly=dict.fromkeys(sites, apart), others=others)


def _with_vision(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """Add the vision encoder of a vision-language model, if rules can act in it."""
    entry = IMAGE_LAYOUTS.get(str(config.get("model_type")))
    reason = "its image tokens have no known layout" if entry is None else entry.without_vision
    side = 0 if entry is None else entry.merged_side(config)
    if not (reason or side):
        reason = "its config doesn't state how many patches a token is made from"
    others = {} if reason else _other_stacks(shape, config, ("vision",))
    resamples = entry is not None and entry.resamples
    attends = resamples and entry is not None and not entry.interpolates
    others = {stack: with_attention(model_shape) for stack, model_shape in others.items()}
    return replace(
        shape,
        others=others,
        without_vision=reason,
        merged_side=side or 1,
        resamples=resamples,
        resampler_attends=attends,
    )


_FEATURE_LAYERS: Mapping[str, tuple[int, ...]] = {
    "vipllava": (-2, -5, -8, -11, 6),
    **dict.fromkeys(("llava", "llava_next", "video_llava"), (-2,)),
}
"""By `model_type`, the default of `vision_feature_layer`, if it isn't -1."""

_LATER_LAYERS: Mapping[str, tuple[int, ...]] = dict.fromkeys(
    ("qwen3_vl", "qwen3_vl_moe"), (8, 16, 24)
)
"""By `model_type`, the default of `deepstack_visual_indexes`, if the model has this key."""


def _list_read_blocks(config: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """Return the numbers of blocks of a vision encoder after which the language model reads it, in
    ascending order.

    Args:
        config: The config of the whole model.
        n_layers: Number of blocks of the encoder.
    """
    kind = str(config.get("model_type"))
    named = config.get("vision_feature_layer") or _FEATURE_LAYERS.get(kind, (-1,))
    states = (named,) if isinstance(named, int) else named
    part = subconfig(config, "vision_config")
    later = part.get("deepstack_visual_indexes", _LATER_LAYERS.get(kind)) or ()
    return tuple(sorted({*(n % (n_layers + 1) for n in states), *(n + 1 for n in later)}))


def _other_stacks(
    shape: ModelShape, config: Mapping[str, Any], stacks: Iterable[str]
) -> dict[str, ModelShape]:
    """Return the shapes of stacks, without those of unknown sizes."""
    shapes = {stack: stack_shape(shape, config, stack) for stack in stacks}
    return {
        stack: limit_sites(model_shape, stack)
        for stack, model_shape in shapes.items()
        if model_shape is not None
    }


def limit_sites(shape: ModelShape, stack: str) -> ModelShape:
    """Return the shape of a stack with the sites that a file can name."""
    return replace(shape, sites=shape.sites & frozenset(_STACK_SITES[stack]))


def with_attention(shape: ModelShape) -> ModelShape:
    """Return the shape of a vision encoder with the sites within attention."""
    partly = dict(shape.partly)
    if "z" in partly:
        partly |= dict.fromkeys(ATTENTION_INTERNAL_SITES, partly["z"])
    return replace(shape, sites=shape.sites | {*ATTENTION_INTERNAL_SITES}, partly=partly)


def _with_stacks(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """Add the stacks of an encoder-decoder, and the tokens that its decoder begins with."""
    stacks = _other_stacks(shape, config, stack_names(shape))
    own = subconfig(config, "decoder")
    starts = [config.get(key, own.get(key)) for key in _START_KEYS]
    if starts[0] is None and find_family(str(config.get("model_type"))).begins_with_bos:
        starts[0] = own.get("bos_token_id")
    spoken = _spoken(config) if shape.takes == "sound to text" else ()
    known = tuple(each for each in (*starts, *spoken) if isinstance(each, int))
    first = known if isinstance(starts[0], int) else None
    if shape.attends_to_image:  # the text begins with the template
        first = ()
    return replace(shape, causal=True, others=stacks, starts=first)


_START_KEYS = ("decoder_start_token_id", "forced_bos_token_id")

_SPEECH_KEYS = ("language", "lang_to_id", "task", "task_to_id", "no_timestamps_token_id")
"""Keys of a generation config with further tokens that a speech model's decoder begins with."""


def _spoken(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the tokens of the language, by default English, of the task, by default transcription,
    and of texts without time stamps, as far as a speech model has them."""
    language, task = config.get("language") or "en", config.get("task") or "transcribe"
    languages, tasks = (config.get(key) or {} for key in ("lang_to_id", "task_to_id"))
    code = f"<|{str(language).strip('<|>')}|>"
    return languages.get(code), tasks.get(task), config.get("no_timestamps_token_id")


_CROSS_SITES = ("attn_norm", "q", "k", "v", "scores", "pattern", "z", "head_out", "attn_out")

_STACK_SITES: Mapping[str, tuple[str, ...]] = {
    "encoder": tuple(name for name in SITES if name != "logits"),
    "cross": _CROSS_SITES,
    "vision": tuple(n for n in SITES if n not in ("logits", *ATTENTION_INTERNAL_SITES)),
}
"""The sites that each further stack can have."""


def check_starts(shape: ModelShape, model: str, span: Span | None) -> Diagnostic | None:
    """Return E0408 for an encoder-decoder whose decoder has no known first token."""
    if not shape.encodes_apart or shape.starts is not None:
        return None
    what, keys = "first token of the decoder", "`decoder_start_token_id`"
    return ShapeUnknown(span=span, model=model, what=what, keys=keys)


GENERATION_CONFIG = "generation_config.json"


def add_generation_defaults(
    config: Mapping[str, Any], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Add the tokens that a decoder begins with, which newer folders have in another file."""
    keys = (*_START_KEYS, *_SPEECH_KEYS)
    more = {key: generation[key] for key in keys if generation.get(key) is not None}
    return {**config, **more} if _has_encoder_and_decoder(config) else dict(config)


_ENCODER_DECODER_KEYS = (
    ("decoder_start_token_id",),
    ("num_layers", "num_decoder_layers"),
    ("encoder_layers", "decoder_layers"),
    ("encoder", "decoder"),
)
"""Keys that only the configs of encoder-decoders have, together."""


def _has_encoder_and_decoder(config: Mapping[str, Any]) -> bool:
    """Return whether a config is that of an encoder-decoder.

    Without `is_encoder_decoder`, transformers takes the default of the class, and other keys of the
    config show which.
    """
    stated = config.get("is_encoder_decoder")
    if stated is not None:
        return bool(stated)
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith(("ForCausalLM", "EncoderModel")) for name in names):
        return False
    given = {key for key, value in config.items() if value is not None}
    return any(given.issuperset(keys) for keys in _ENCODER_DECODER_KEYS)


def _scores(config: Mapping[str, Any], names: list[str]) -> OutputTask | None:
    """Return the meaning of the scores of a model with two towers; None for other models."""
    kind = str(config.get("model_type"))
    entry = find_family(kind)
    parts = (config.get(key) for key in ("vision_config", "text_config"))
    if not entry.scores or not is_headless(names, kind):
        return None
    return entry.scores if all(isinstance(part, Mapping) for part in parts) else None


def _towers(
    config: Mapping[str, Any], names: list[str], task: OutputTask, *, model: str, span: Span | None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """Return the image tower of a model with two towers, with the text tower as its `texts`."""
    told: dict[str, Any] = {"model": model, "span": span}
    vision, problems = _shape(
        subconfig(config, "vision_config"), config, names, "image", causal=False, **told
    )
    part = subconfig(config, "text_config")
    kind = str(part.get("model_type"))
    texts, more = _shape(part, part, names, "text", causal=not find_family(kind).encodes, **told)
    if vision is None or texts is None:
        return None, [*problems, *more]
    padded = find_family(str(config.get("model_type"))).padded
    texts = replace(texts, task=task, side="text", output_at="last token", padded=padded)
    output = vision.sites | {"logits"}
    vision = replace(vision, sites=output, task=task, side="vision", output_at="image", texts=texts)
    return vision, []


def stack_shape(shape: ModelShape, config: Mapping[str, Any], stack: str) -> ModelShape | None:
    """Return the shape of the stack `encoder`, `cross` or `vision`; None if a size is missing.

    config: the config of the whole model.
    """
    match stack:
        case "cross":
            return shape
        case "encoder":
            part = subconfig(subconfig(config, "encoder"), "text_config")
            part = {**part, **_encoder_numbers(config)}
        case _:
            part = subconfig(config, "vision_config", "vision_tower", "vision_model")
            if "embed_dim" in part:  # `hidden_size` is then the language model's
                part = {**part, "hidden_size": part["embed_dim"]}
    model_shape, _ = _shape(part, part, [shape.architecture], "image", causal=False)
    lists = find_family("" if model_shape is None else model_shape.family).block_lists(part)
    if model_shape is not None and lists:
        model_shape = replace(model_shape, blocks=model_shape.blocks[:1] * sum(lists.values()))
    if model_shape is not None and stack == "vision":
        model_shape = replace(
            model_shape, read_after=_list_read_blocks(config, model_shape.n_layers)
        )
    return model_shape


def _encoder_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoder-decoder's sizes of its encoder, under the usual keys."""
    keys = {
        "num_decoder_layers": ("num_layers", "encoder_layers", "encoder_num_hidden_layers"),
        "num_attention_heads": ("encoder_attention_heads", "encoder_num_attention_heads"),
        "num_key_value_heads": ("encoder_num_key_value_heads",),
        "intermediate_size": ("encoder_ffn_dim",),
    }
    numbers = {key: _first(config, own) for key, own in keys.items()}
    return {key: value for key, value in numbers.items() if value}


def _takes(config: Mapping[str, Any], names: list[str]) -> ModelInput:
    decodes = any(name.endswith("ForCausalLM") for name in names)
    if _has_encoder_and_decoder(config) and not decodes:
        kind = str(config.get("model_type"))
        entry = IMAGE_LAYOUTS.get(kind)
        if find_family(kind).sound(config):
            return "audio" if entry is None else "sound to text"
        return "image to text" if entry is not None and entry.encodes else "two texts"
    if decodes:
        return "text"
    images = isinstance(config.get("vision_config"), Mapping)
    if images and not any("ForImageClassification" in n for n in names):
        entry = IMAGE_LAYOUTS.get(str(config.get("model_type")))
        return "attended image" if entry is not None and entry.attended else "image and text"
    return "image" if images or {"patch_size", "image_size"} <= config.keys() else "text"


def _numbers(
    text: Mapping[str, Any],
    config: Mapping[str, Any],
    takes: ModelInput,
    model: str,
    span: Span | None,
) -> tuple[dict[str, int], list[Diagnostic]]:
    """Return the sizes that every model has, by name, or the errors in them."""
    impossible: list[Diagnostic] = [
        BadSize(span=span, model=model, key=key, value=json.dumps(value))
        for key, value in find_impossible_sizes({**{k: config.get(k) for k in VOCAB_KEYS}, **text})
    ]
    if impossible:
        return {}, impossible
    numbers = {
        "number of layers": (_first(text, LAYER_KEYS) or _list_length(text), LAYER_KEYS),
        "number of heads": (_first(text, HEAD_KEYS) or _headless(text), HEAD_KEYS),
        "model width": (_first(text, WIDTH_KEYS), WIDTH_KEYS),
        "vocabulary size": (_first(text, VOCAB_KEYS) or _first(config, VOCAB_KEYS), VOCAB_KEYS),
    }
    if takes == "image":
        del numbers["vocabulary size"]
    missing: list[Diagnostic] = [
        ShapeUnknown(span=span, model=model, what=what, keys=", ".join(f"`{k}`" for k in keys))
        for what, (value, keys) in numbers.items()
        if not value
    ]
    if missing:
        return {}, missing
    if (too_large := check_sizes(text, model, span)) is not None:
        return {}, [too_large]
    return {what: value or 0 for what, (value, _) in numbers.items()}, []


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
    """Read the shape; causal: whether tokens see no later ones, None for what the config says."""
    model_type = _model_type(text, config)
    numbers, refused = _numbers(text, config, takes, model, span)
    if refused:
        named, staged = names[0] if names else model_type, find_family(model_type).staged
        return None, explain_missing_blocks(refused, staged, model=model, named=named)
    blocks = _list_block_configs(text, find_family(model_type), numbers["number of layers"])
    for block in blocks:
        for key, value in find_impossible_sizes(block):
            return None, [BadSize(span=span, model=model, key=key, value=json.dumps(value))]
        if (too_large := check_sizes(block, model, span)) is not None:
            return None, [too_large]
    if causal is None:
        causal = _is_causal(text, config, names, takes)
    return _build_shape(text, config, names, takes, numbers, blocks, causal=causal), []


def _model_type(text: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return str(text.get("model_type") or config.get("model_type") or "unknown")


def _encodes(text: Mapping[str, Any], config: Mapping[str, Any], names: list[str]) -> bool:
    """Return whether a model's blocks are those of an encoder."""
    model_type = _model_type(text, config)
    if find_family(model_type).encodes:
        return True
    return output_task(config, names)[0] != "tokens" and model_type in ENCODER_TYPES


def _is_causal(
    text: Mapping[str, Any], config: Mapping[str, Any], names: list[str], takes: ModelInput
) -> bool:
    decodes = not names or output_task(config, names)[0] != "tokens"
    decodes = decodes or any(name.endswith(DECODER_SUFFIXES) for name in names)
    encodes = _encodes(text, config, names) and not _decodes(text)
    both_ways = _attends_both_ways(text, config)
    return decodes and takes != "image" and not encodes and not both_ways


def _build_shape(
    text: Mapping[str, Any],
    config: Mapping[str, Any],
    names: list[str],
    takes: ModelInput,
    numbers: Mapping[str, int],
    blocks: Sequence[Mapping[str, Any]],
    *,
    causal: bool,
) -> ModelShape:
    """Build the shape.

    Args:
        numbers: The sizes that every model has, by name.
        blocks: The config of each block.
    """
    model_type = _model_type(text, config)
    entry = find_family(model_type)
    n_layers, d_model = numbers["number of layers"], numbers["model width"]
    parallel = entry.arrangement(text) == "parallel"
    experts = _count_experts(text)
    dense = find_dense_blocks(text, n_layers) if experts else frozenset[int]()
    n_heads = numbers["number of heads"]
    sites = available_sites(
        parallel=parallel,
        experts=bool(experts),
        dense=bool(dense) or not experts,
        mixers=_has_mixers(text),
    )
    task, labels = output_task(config, names)
    return ModelShape(
        architecture=names[0] if names else model_type,
        family=model_type,
        blocks=tuple(_read_block_sizes(each, n_heads, d_model) for each in blocks),
        d_model=d_model,
        vocab_size=numbers.get("vocabulary size", 0),
        max_positions=max(_first(text, POSITION_KEYS) or 0, 0) or None,
        parallel_block=parallel,
        sites=sites - {"logits"} if _without_head(names, model_type, takes, task) else sites,
        d_embed=_first(text, ("input_embedding_size", *EMBEDDING_KEYS)) or d_model,
        n_experts=experts,
        causal=causal,
        takes=takes,
        masked=any("ForMaskedLM" in name for name in names),
        d_final=_narrow(text, d_model),
        d_logits=len(labels),
        task=task,
        labels=labels,
        output_at=output_position(names, encodes=_encodes(text, config, names)),
        patches=read_patch_layout(entry, text) if takes == "image" else None,
        partly=_list_partial_sites(dense, n_layers),
        config=text,
    )


def _list_block_configs(
    config: Mapping[str, Any], entry: Family, n_layers: int
) -> list[Mapping[str, Any]]:
    """Return the config of each block, with the sizes in which it differs from the others."""
    named = config.get("per_layer_config") or {}
    overrides = {int(layer): sizes for layer, sizes in named.items()}
    lists = {
        key.removesuffix("_per_layer"): value
        for key, value in config.items()
        if isinstance(value, (list, tuple)) and len(value) == n_layers
    }
    blocks: list[Mapping[str, Any]] = []
    for layer in range(n_layers):
        listed = {key: value[layer] for key, value in lists.items()}
        sizes = {key: value for key, value in listed.items() if is_integer(value)}
        sizes |= {**entry.block_config(config, layer), **overrides.get(layer, {})}
        blocks.append({**config, **sizes} if sizes else config)
    return blocks


def _read_block_sizes(config: Mapping[str, Any], n_heads: int, d_model: int) -> BlockSizes:
    """Return the sizes that the config of one block states.

    Args:
        n_heads: Number of heads if the config states none, as in state-space models.
    """
    heads = _first(config, HEAD_KEYS) or n_heads
    d_head = _first(config, HEAD_WIDTH_KEYS) or d_model // heads
    latent = _first(config, ("qk_nope_head_dim",))
    if latent:
        d_head = latent + (_first(config, ("qk_rope_head_dim",)) or 0)
    return BlockSizes(
        heads=heads,
        kv_heads=heads if latent else _kv_heads(config) or heads,
        d_head=d_head,
        d_value=_first(config, ("v_head_dim",)) or d_head,
        neurons=_mlp_width(config, d_model),
    )


def _without_head(names: list[str], model_type: str, takes: ModelInput, task: OutputTask) -> bool:
    return is_headless(names, model_type) or (takes == "image" and task == "tokens")


def _narrow(config: Mapping[str, Any], d_model: int) -> int:
    """Return the width that the unembedding reads, 0 for the model's."""
    width = _first(config, ("output_embedding_size", *EMBEDDING_KEYS)) or 0
    return width if width != d_model else 0


def _mlp_width(config: Mapping[str, Any], d_model: int) -> int:
    """Return the number of neurons of a block; 4 per dimension if the config names none."""
    factor = _first(config, MLP_FACTOR_KEYS) or 0
    return factor * d_model or _first(config, MLP_KEYS) or 4 * d_model


def _count_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts of a block; 0 for a dense model."""
    if config.get("is_moe") is False:
        return 0
    inner = subconfig(config, "ffn_config")
    return _first(config, EXPERT_KEYS) or _first(inner, EXPERT_KEYS) or 0


def _list_partial_sites(dense: frozenset[int], n_layers: int) -> dict[str, frozenset[int]]:
    """Return the blocks of each site that only some blocks have; dense: blocks without experts."""
    if not dense:
        return {}
    sparse = frozenset(range(n_layers)) - dense
    partly = dict.fromkeys(("mlp_hidden", *sites_of_module("down")), dense)
    return partly | {"router": sparse, "expert_out": sparse}


def _attends_both_ways(text: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Return whether the config of a decoder removes its causal mask."""
    if find_family(str(config.get("model_type"))).prefix:
        return False
    return text.get("use_bidirectional_attention") in (True, "all")


def _kv_heads(config: Mapping[str, Any]) -> int | None:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    if config.get("new_decoder_architecture") is False:  # Falcon: the key is set but unused
        return None
    return _first(config, KV_HEAD_KEYS)


def _decodes(config: Mapping[str, Any]) -> bool:
    return bool(config.get("is_decoder"))


def _has_mixers(config: Mapping[str, Any]) -> bool:
    return has_mixer_blocks(config) or any(key.startswith(MIXER_KEYS) for key in config)


def has_mixer_blocks(config: Mapping[str, Any]) -> bool:
    """Return whether the config names blocks that attend without a softmax, or not at all."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    return any(str(kind).startswith("linear_attention") for kind in kinds)


def _list_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of blocks in a list of their types."""
    blocks = config.get("layers_block_type")
    return len(cast(list[Any], blocks)) if isinstance(blocks, list) else None


def _headless(config: Mapping[str, Any]) -> int | None:
    """Return 1 for state-space models, which have no heads."""
    return 1 if _has_mixers(config) else None


def read_config(
    folder: Path, *, name: str = "config.json", model: str = "model", span: Span | None = None
) -> tuple[dict[str, Any] | None, list[Diagnostic]]:
    """Read the `config.json` of a folder, or a similar file; E0404 if it can't be read."""

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


def _lacks_vision(shape: ModelShape) -> bool:
    """Return whether a config doesn't show the sizes of the vision encoder of prompts' images."""
    known = "vision" in shape.others or shape.without_vision or shape.takes == "image to text"
    return shape.reads_images and not known


def shape_of_folder_config(
    config: Mapping[str, Any], *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """Return the shape of a folder's config with the defaults of its model type; E0408 for a size
    in neither."""
    try:
        shape, problems = shape_from_config(config, model=model, span=span)
        if shape is None and all(isinstance(problem, ShapeUnknown) for problem in problems):
            text = subconfig(config, "text_config", "decoder")
            if not is_in_config(text, problems):
                whole = add_defaults(config, KEY_GROUPS)
                return shape_from_config(whole, model=model, span=span)
        if shape is not None and _lacks_vision(shape):
            part = add_defaults(config, KEY_GROUPS).get("vision_config")
            whole = {**config, "vision_config": part}
            completed, _ = shape_from_config(whole, model=model, span=span)
            return completed or shape, problems
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A key may hold any value, and each family reads other keys.
        reason = f"one of its entries has a wrong value ({error})"
        return None, [NoConfig(span=span, model=model, reason=reason)]
    return shape, problems


def read_shape(
    folder: Path, *, model: str = "model", span: Span | None = None
) -> tuple[ModelShape | None, list[Diagnostic]]:
    """Return the shape of the model in a folder.

    E0404 if its `config.json` can't be read, E0407 if it doesn't read text alone, E0439 if its
    output can't be measured.
    """
    config, problems = read_config(folder, model=model, span=span)
    if config is None:
        return None, problems
    if (folder / GENERATION_CONFIG).exists():
        generation, _ = read_config(folder, name=GENERATION_CONFIG, model=model, span=span)
        config = add_generation_defaults(config, generation or {})
    shape, problems = shape_of_folder_config(config, model=model, span=span)
    if shape is not None and (
        shape.takes == "audio" or (shape.takes == "image" and shape.patches is None)
    ):
        return None, [NotATextModel(span=span, model=model, architecture=shape.architecture)]
    if shape is not None and (unstarted := check_starts(shape, model, span)) is not None:
        return None, [unstarted]
    if shape is not None and shape.architecture.endswith(OTHER_SEQUENCE_CLASSIFIERS):
        reason = "it reads several texts at once"
        return None, [
            SingleOutput(span=span, model=model, architecture=shape.architecture, reason=reason)
        ]
    return shape, problems
