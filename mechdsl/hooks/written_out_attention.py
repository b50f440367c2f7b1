# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""Attention modules that don't call the library's attention functions, made exchangeable.

Most models attend through functions that can be exchanged; the modules here have attention written
out. An entry does what its module does, with the module's own projections and rotation, and leaves
attention to a function. Biases by position become part of the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.base.registry import Registry
from mechdsl.hooks.attention_exchange import Distances, Exchange, ExchangedAttention, hide

WRITTEN_OUT: Registry[ExchangedAttention] = Registry("attention module")
"""By the name of the module's class, or by `folder.name` where many have it."""


def written_out(*classes: str) -> Callable[[ExchangedAttention], ExchangedAttention]:
    """Register an entry."""

    def register(entry: ExchangedAttention) -> ExchangedAttention:
        for name in classes:
            WRITTEN_OUT.add(name, entry)
        return entry

    return register


def entry_of(module: nn.Module) -> ExchangedAttention | None:
    """The entry of a module; None where the library's interface will do."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    folder = kind.__module__.split(".")[-2]
    return WRITTEN_OUT.get(f"{folder}.{kind.__name__}") or WRITTEN_OUT.get(kind.__name__)


def _heads(features: Tensor, count: int) -> Tensor:
    """[B, heads, T, d_head] of [B, T, heads * d_head]."""
    return features.unflatten(-1, (count, -1)).transpose(1, 2)


def _kept(module: Any, past: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """With those that are kept of earlier tokens."""
    return (key, value) if past is None else past.update(key, value, module.layer_idx)


# --- modules with a method that attends -----------------------------------------------------------


class _Standing:
    """Stands in for a module: everything is the module's but some methods."""

    def __init__(self, module: nn.Module, **methods: Callable[..., Any]) -> None:
        self._module = module
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _by_method(
    module: nn.Module, exchange: Exchange, scaling: float, window: int | None, *args: Any, **kw: Any
) -> Any:
    """The module's forward with another `_attn`. window: tokens that are seen, its own included."""

    def attn(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *_: Any) -> Any:
        if window is not None:
            mask = exchange.mask(partial(_windowed, window=window), mask, by=window)
        out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
        return out.transpose(1, 2), weights

    return type(module).forward(_Standing(module, _attn=attn), *args, **kw)  # pyright: ignore


def _windowed(mask: Tensor, window: int) -> Tensor:
    before = mask.shape[-1] - mask.shape[-2]  # keys in front of the first query
    near = torch.ones_like(mask[0, 0], dtype=torch.bool).tril(before - window)
    return hide(mask, near)


@written_out("GPTJAttention", "CodeGenAttention")
def gptj(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    return _by_method(module, exchange, float(1 / module.scale_attn), None, *args, **kwargs)


@written_out("GPTNeoXJapaneseAttention")
def gpt_neox_japanese(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    return _by_method(module, exchange, 1 / module.norm_factor, None, *args, **kwargs)


@written_out("GPTNeoSelfAttention")
def gpt_neo(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    window = module.config.window_size if module.attention_type == "local" else None
    return _by_method(module, exchange, 1.0, window, *args, **kwargs)


# --- modules that are written in one piece --------------------------------------------------------


@written_out("BloomAttention")
def bloom(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor,
    layer_past: Any = None,
    **_: Any,
) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    key, value = _kept(module, layer_past, key, value)
    mask = exchange.mask(
        lambda mask, alibi: mask + alibi.unflatten(0, (-1, module.num_heads)), attention_mask, alibi
    )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)) + residual, weights


@written_out("MptAttention")
def mpt(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **_: Any,
) -> Any:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (_heads(part, module.n_heads) for part in fused.chunk(3, dim=2))
    key, value = _kept(module, past_key_values, key, value)
    mask = exchange.mask(  # true where a key is hidden; biases are those of the longest prompt
        lambda hides, bias: hide(bias[None, :, :, -hides.shape[-1] :], hides),
        attention_mask,
        position_bias,
    )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.softmax_scale)
    return module.out_proj(out.flatten(2)), weights


@written_out("FalconAttention")
def falcon(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> Any:
    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in parts)
    if alibi is None:
        library = import_module(type(module).__module__)
        query, key = library.apply_rotary_pos_emb(query, key, *(position_embeddings or ()))
    key, value = _kept(module, layer_past, key, value)
    # Keys and values come repeated for each head that reads them.
    shared = key.shape[1] // module.num_kv_heads
    key, value = key[:, ::shared], value[:, ::shared]
    mask = attention_mask
    if (
        alibi is not None and exchange.own == "eager"
    ):  # the bias is in the mask and comes on top of it
        mask = exchange.mask(
            lambda mask, bias: mask + bias * module.inv_norm_factor, attention_mask, alibi
        )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), weights


@written_out("XGLMAttention", "TrOCRAttention", "MvpAttention")
def xglm(
    module: Any, exchange: Exchange, hidden_states: Tensor, attention_mask: Any = None, **kw: Any
) -> Any:
    if kw.get("attn_prompt") is not None:
        return type(module).forward(module, hidden_states, attention_mask=attention_mask, **kw)
    read = kw.get("key_value_states")  # of an encoder
    read = hidden_states if read is None else read
    query, key, value = (
        _heads(projection(given), module.num_heads)
        for projection, given in (
            (module.q_proj, hidden_states),
            (module.k_proj, read),
            (module.v_proj, read),
        )
    )
    if kw.get("key_value_states") is None:
        key, value = _kept(module, kw.get("past_key_values"), key, value)
    out, weights = exchange.attend(
        module, query, key, value, attention_mask, scaling=module.scaling
    )
    return module.out_proj(out.flatten(2)), weights


# --- encoders -------------------------------------------------------------------------------------


@written_out(
    "MegatronBertSelfAttention",
    "RemBertSelfAttention",
    "TapasSelfAttention",
    "BigBirdSelfAttention",
    "LukeSelfAttention",
)
def bert(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(module.__class__.forward).bind(module, *args, **kwargs).arguments
    others = ("encoder_hidden_states", "entity_hidden_states")
    if any(given.get(name) is not None for name in others):  # keys of another sequence
        return module.__class__.forward(module, *args, **kwargs)
    hidden = next(value for name, value in given.items() if name.endswith("hidden_states"))
    query, key, value = (
        _heads(projection(hidden), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    mask = given.get("attention_mask")
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return out.flatten(2), weights


@written_out("MPNetEncoder")
def mpnet_encoder(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    """Without masks, biases by position aren't made either: they are large."""
    if exchange.masked:
        return type(module).forward(module, *args, **kwargs)
    standing = _Standing(module, compute_position_bias=lambda hidden: None)
    return type(module).forward(standing, *args, **kwargs)


@written_out("MPNetSelfAttention")
def mpnet(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_bias: Any = None,
    **_: Any,
) -> Any:
    query, key, value = (
        _heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.q, module.k, module.v)
    )
    mask = exchange.mask(lambda mask, bias: mask + bias, attention_mask, position_bias)
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return module.o(out.flatten(2)), weights


@written_out("BlipAttention")
def blip(module: Any, exchange: Exchange, hidden_states: Tensor, **_: Any) -> Any:
    query, key, value = (
        _heads(part, module.num_heads) for part in module.qkv(hidden_states).chunk(3, dim=-1)
    )
    out, weights = exchange.attend(module, query, key, value, None, scaling=module.scale)
    return module.projection(out.flatten(2)), weights


@written_out("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention")
def data2vec_vision(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] = (0, 0),
) -> Any:
    def biases() -> Tensor:
        found = [] if relative_position_bias is None else [relative_position_bias]
        if module.has_relative_position_bias:
            size = module.config.patch_size
            window = (resolution[0] // size, resolution[1] // size)
            count = hidden_states.shape[1]
            bias = module.relative_position_bias(window, interpolate_pos_encoding, dim_size=count)
            found.append(bias)
        return sum(found, torch.zeros(1, 1, 1, 1, device=hidden_states.device))

    query, key, value = (
        _heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    mask = exchange.mask(biases, by=module)  # each block has biases of its own
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return out.flatten(2), weights


@written_out("RoFormerSelfAttention")
def roformer(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    attention_mask: Any = None,
    sinusoidal_pos: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if any(value is not None and value is not False for value in (*args, *kwargs.values())):
        given = (attention_mask, sinusoidal_pos, *args)
        return type(module).forward(module, hidden_states, *given, **kwargs)
    query, key, value = (
        _heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    turned = [query, key, value] if module.rotary_value else [query, key]
    turned = module.apply_rotary_position_embeddings(sinusoidal_pos, *turned)
    query, key, value = (*turned, value)[:3]
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, attention_mask, scaling=scaling)
    return out.flatten(2), weights


@written_out("openai.Attention")
def openai_gpt(
    module: Any,
    exchange: Exchange,
    x: Tensor,
    attention_mask: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    def mask(*given: Tensor) -> Tensor:
        count = x.shape[1]
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        return hide(sum(given, x.new_zeros(1, 1, count, count)), later)

    query, key, value = (
        _heads(part, module.n_head) for part in module.c_attn(x).split(module.split_size, dim=2)
    )
    given = () if attention_mask is None else (attention_mask,)
    made = exchange.mask(mask, *given, by=x.shape[1])
    scaling = value.shape[-1] ** -0.5 if module.scale else 1.0
    out, _weights = exchange.attend(module, query, key, value, made, scaling=scaling)
    return [module.c_proj(out.flatten(2))]


# --- Llama 4: queries of blocks without rotary grow with their position ---------------------------


@written_out("Llama4TextDecoderLayer")
def llama4_block(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    """Positions, which attention counts by itself, are those that the block is handed."""
    exchange.positions = kwargs.get("position_ids")
    return type(module).forward(module, *args, **kwargs)


@written_out("Llama4TextAttention")
def llama4(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> Any:
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.use_rope:
        library = import_module(type(module).__module__)
        query, key = library.apply_rotary_emb(query, key, position_embeddings)
    if hasattr(module, "qk_norm"):
        query, key = module.qk_norm(query), module.qk_norm(key)
    if module.attn_temperature_tuning and not module.use_rope:
        place = exchange.positions
        if place is None:
            place = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        grown = torch.log1p(torch.floor((place.float() + 1) / module.floor_scale))
        query = (query * (grown * module.attn_scale + 1)[..., None, None]).to(query.dtype)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    key, value = _kept(module, past_key_values, key, value)
    out, weights = exchange.attend(
        module, query, key, value, attention_mask, scaling=module.scaling
    )
    return module.o_proj(out.flatten(2)), weights


@written_out("DebertaEncoder", "DebertaV2Encoder")
def deberta_encoder(module: Any, exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    """Without masks, those of all tokens and their distances aren't made either."""
    if exchange.masked:
        return type(module).forward(module, *args, **kwargs)
    standing = _Standing(
        module, get_rel_pos=lambda *_: None, get_attention_mask=lambda given: given
    )
    return type(module).forward(standing, *args, **kwargs)


@written_out("DisentangledSelfAttention")
def deberta(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Any = None,
    relative_pos: Any = None,
    rel_embeddings: Any = None,
) -> Any:
    """Both versions."""
    count = module.num_attention_heads
    if query_states is not None or getattr(module, "talking_head", False):
        given = (attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)
        return type(module).forward(module, hidden_states, *given)
    if hasattr(module, "in_proj"):
        fused = _heads(module.in_proj(hidden_states), count)
        query, key, value = fused.chunk(3, dim=-1)
        query = query + module.q_bias.view(count, 1, -1)
        value = value + module.v_bias.view(count, 1, -1)
    else:
        query, key, value = (
            _heads(projection(hidden_states), count)
            for projection in (module.query_proj, module.key_proj, module.value_proj)
        )
    distances = None
    if module.relative_attention and exchange.masked:
        distances = _distances(module, relative_pos.flatten(0, -2), rel_embeddings)
    scaling = (query.shape[-1] * (1 + len(module.pos_att_type))) ** -0.5
    mask = exchange.mask(lambda mask: mask.bool(), attention_mask)
    out, weights = exchange.attend(
        module, query, key, value, mask, scaling=scaling, distances=distances
    )
    return out.flatten(2), weights


def _distances(module: Any, relative: Tensor, embeddings: Tensor) -> Distances:
    """relative: [T, T], query's position minus the key's, or its bucket."""
    if hasattr(module, "in_proj"):
        middle = module.max_relative_positions
        span = min(len(relative), middle)
        embeddings = embeddings[middle - span : middle + span]
        maps = {"c2p": "pos_proj", "p2c": "pos_q_proj"}
    else:
        span = module.pos_ebd_size
        embeddings = embeddings[: 2 * span]
        shared = module.share_att_key
        maps = {
            "c2p": "key_proj" if shared else "pos_key_proj",
            "p2c": "query_proj" if shared else "pos_query_proj",
        }

    def table(name: str) -> Tensor | None:
        if name not in module.pos_att_type:
            return None
        # Not the module itself, which may be the one that makes queries or keys.
        made = getattr(module, maps[name]).forward(embeddings[None])
        return _heads(made, module.num_attention_heads)[0]

    return Distances(
        keys=table("c2p"),
        queries=table("p2c"),
        to_key=(relative + span).clamp(0, 2 * span - 1),
        to_query=(span - relative).clamp(0, 2 * span - 1).t(),
    )


@written_out("IBertSelfAttention")
def ibert(
    module: Any,
    exchange: Exchange,
    hidden_states: Tensor,
    hidden_states_scaling_factor: Any,
    attention_mask: Any = None,
    output_attentions: bool = False,
) -> Any:
    query, key, value = (
        _heads(projection(hidden_states)[0], module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, attention_mask, scaling=scaling)
    return (out.flatten(2), weights), (None, None)
