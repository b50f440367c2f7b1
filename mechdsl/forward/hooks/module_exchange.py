"""Exchange of modules' forward functions, and attention of families that implement their own.

Most models attend through functions of the library that can be exchanged. The modules here
implement attention themselves. An entry does what its module does, with the module's own
projections and rotation, but calls a function for attention. Position biases become part of the
mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.base.records import Registry

_ACTIVATION_NAMES = ("hidden_states", "inputs_embeds", "hidden_state", "x", "input", "query")
"""Names of modules' activation argument, if it isn't the first one."""
CACHE_ARGUMENTS = ("past_key_values", "cache")
"""Names of models' argument with cached keys and values: in transformers before 5.24, and since."""


def find_activation_name(kwargs: dict[str, Any]) -> str:
    return next((name for name in _ACTIVATION_NAMES if name in kwargs), _ACTIVATION_NAMES[0])


def get_activation(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the activation that a module was called with."""
    value = args[0] if args else kwargs.get(find_activation_name(kwargs))
    if not isinstance(value, Tensor):
        raise TypeError("a tapped module was called without an activation as its first argument")
    return value


def replace_activation(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with a different activation."""
    return (
        ((value, *args[1:]), kwargs)
        if args
        else ((), {**kwargs, find_activation_name(kwargs): value})
    )


@contextmanager
def load_weights(module: nn.Module) -> Generator[None]:
    """Make the module's own weights readable, even if accelerate stores them elsewhere.

    Without this, weights on a disk or in other memory are available only while the module runs.
    """
    hook = module.__dict__.get("_hf_hook")
    parameters = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if hook is None or not any(weight.is_meta for weight in parameters):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, ())


class BlockStub:
    """Replacement of a block's forward that passes its input on, in the block's return format."""

    def __init__(self, returns: int | None) -> None:
        self.returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = get_activation(args, kwargs)
        return hidden if self.returns is None else (hidden, *[None] * (self.returns - 1))


class SkippedBlock:
    """Replacement of a block's forward that passes its input on, in the format of its result."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden, result = get_activation(args, kwargs), self.forward(*args, **kwargs)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Replace a module's forward while the context is open; hooks on the module stay in place."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.forward = before


_PACKAGE = __name__.partition(".")[0]


@contextmanager
def suspend_hooks(module: nn.Module) -> Generator[None]:
    """Compute a module and its submodules without hooks of this package while the context is
    open."""
    with ExitStack() as stack:
        for part in module.modules():
            for name in ("_forward_pre_hooks", "_forward_hooks"):
                table: dict[int, Any] = vars(part)[name]
                hooks = dict(table)
                stack.callback(table.update, hooks)
                stack.callback(table.clear)  # is called first
                for key, hook in hooks.items():
                    own = getattr(hook, "func", hook)
                    if str(getattr(own, "__module__", "")).partition(".")[0] == _PACKAGE:
                        del table[key]
        yield


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""Function called like the library's, with (module, query, key, value, mask, **kwargs), that
returns an output [B, T, heads, d_head] and weights. Query, key and value are [B, heads, T,
d_head]."""


class AttentionExchange:
    """Attention function of the modules in one pass, and the masks that they share."""

    def __init__(self, function: AttentionFunction, own: str, *, masked: bool) -> None:
        self.attend = function
        self.own = own
        """The model's own implementation: `eager` or `sdpa`."""
        self.masked = masked
        self.positions: Tensor | None = None
        """[B, T] positions in the running block, if attention needs them."""
        self._masks: dict[object, tuple[tuple[Tensor, ...], Tensor]] = {}

    def mask(self, make: Callable[..., Tensor], *given: Tensor, by: object = None) -> Tensor | None:
        """Call `make` once for tensors that all blocks get; None in a pass without masks.

        by: anything else that the mask depends on.
        """
        if not self.masked:
            return None
        key = (by, *(id(tensor) for tensor in given))
        if key not in self._masks:
            mask = make(*given)
            if bool((mask == mask[:1]).all()):
                mask = mask[:1].clone()
            self._masks[key] = given, mask  # tensors are held, so that their ids aren't reused
        return self._masks[key][1]


@dataclass(frozen=True, eq=False)
class DistanceScores:
    """Summands of scores by distance and content (DeBERTa).

    Queries are multiplied by a vector for the distance to the key, keys by one for the distance to
    the query.
    """

    keys: Tensor | None
    """[heads, distance, d_head], by which queries are multiplied."""
    queries: Tensor | None
    """[heads, distance, d_head], by which keys are multiplied."""
    to_key: Tensor
    """[T, T] long, columns of query and key → distance in `keys`."""
    to_query: Tensor
    """[T, T] long, columns of query and key → distance in `queries`."""

    def scores(self, query: Tensor, key: Tensor, at: Tensor, of: Tensor) -> Tensor:
        """Return […, query, key] for query and key [lane, heads, …, token, d_head] at columns."""
        scores: list[Tensor] = []
        if self.keys is not None:
            each = query @ self._table(self.keys, query)
            index = self.to_key[at][:, of]
            scores.append(each.gather(-1, index.expand(*each.shape[:-1], -1)))
        if self.queries is not None:
            each = key @ self._table(self.queries, key)
            index = self.to_query[at][:, of].t()
            scores.append(each.gather(-1, index.expand(*each.shape[:-1], -1)).transpose(-1, -2))
        return sum(scores, query.new_zeros(()))

    @staticmethod
    def _table(vectors: Tensor, like: Tensor) -> Tensor:
        """Return [heads, …, d_head, distance] in the dtype of `like`."""
        return (
            vectors.to(like.dtype)
            .transpose(-1, -2)
            .view(len(vectors), *[1] * (like.dim() - 4), *vectors.shape[:0:-1])
        )


AttentionEntry = Callable[..., Any]
"""(module, exchange, *args, **kwargs of the module's forward) → the forward's output."""


@contextmanager
def exchange_modules(
    entries: Sequence[tuple[nn.Module, AttentionEntry]],
    function: AttentionFunction,
    name: str,
    *,
    masked: bool,
) -> Generator[None]:
    """Let modules attend with `function`, each through its entry."""
    exchange = AttentionExchange(function, name, masked=masked)
    with ExitStack() as stack:
        for part, entry in entries:
            stack.enter_context(replace_forward(part, _build_forward(entry, part, exchange)))
        yield


def _build_forward(
    entry: AttentionEntry, module: nn.Module, exchange: AttentionExchange
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with load_weights(module):
            return entry(module, exchange, *args, **kwargs)

    return forward


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    distances: DistanceScores | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend as these modules do, with scores and softmax in float32 or wider."""
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)).mul_(scaling)
    if distances is not None:
        every = torch.arange(query.shape[2], device=query.device)
        scores += distances.scores(query, key, every, every) * scaling
    if mask is not None:
        scores = hide_scores(scores, ~mask) if mask.dtype == torch.bool else scores.add_(mask)
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def hide_scores(scores: Tensor, where: Tensor) -> Tensor:
    """Set scores to the lowest finite number: padding sees nothing, and must not become NaN."""
    return scores.masked_fill(where, torch.finfo(scores.dtype).min)


ATTENTION_ENTRIES: Registry[AttentionEntry] = Registry("attention module")
"""By name of the module's class, or by `folder.name` if many classes share the name."""


def attention_entry(*classes: str) -> Callable[[AttentionEntry], AttentionEntry]:
    """Register an entry for these classes."""

    def register(entry: AttentionEntry) -> AttentionEntry:
        for name in classes:
            ATTENTION_ENTRIES.add(name, entry)
        return entry

    return register


def find_attention_entry(module: nn.Module) -> AttentionEntry | None:
    """Return the entry of a module; None if the library's interface suffices."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    folder = kind.__module__.split(".")[-2]
    return ATTENTION_ENTRIES.get(f"{folder}.{kind.__name__}") or ATTENTION_ENTRIES.get(
        kind.__name__
    )


def _split_heads(features: Tensor, count: int) -> Tensor:
    """Return [B, heads, T, d_head] of [B, T, heads * d_head]."""
    return features.unflatten(-1, (count, -1)).transpose(1, 2)


def _append_cached(
    module: Any, given: Mapping[str, Any], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Append keys and values to the cached ones of earlier tokens.

    given: the module's arguments.
    """
    names = (*CACHE_ARGUMENTS, "layer_past")
    cache = next((given[name] for name in names if given.get(name) is not None), None)
    return (key, value) if cache is None else cache.update(key, value, module.layer_idx)


# --- modules with a method for attention ----------------------------------------------------------


class _ModuleProxy:
    """Proxy of a module that replaces some methods."""

    def __init__(self, module: nn.Module, **methods: Callable[..., Any]) -> None:
        self._module = module
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _call_with_method(
    module: nn.Module,
    exchange: AttentionExchange,
    scaling: float,
    window: int | None,
    *args: Any,
    **kw: Any,
) -> Any:
    """Run the module's forward with a different `_attn`; window: visible tokens, with its own."""

    def attn(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, *_: Any) -> Any:
        if window is not None:
            mask = exchange.mask(partial(_hide_outside_window, window=window), mask, by=window)
        out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
        return out.transpose(1, 2), weights

    return type(module).forward(_ModuleProxy(module, _attn=attn), *args, **kw)  # pyright: ignore


def _hide_outside_window(mask: Tensor, window: int) -> Tensor:
    before = mask.shape[-1] - mask.shape[-2]  # keys before the first query
    near = torch.ones_like(mask[0, 0], dtype=torch.bool).tril(before - window)
    return hide_scores(mask, near)


@attention_entry("GPTJAttention", "CodeGenAttention")
def attend_gptj(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    return _call_with_method(module, exchange, float(1 / module.scale_attn), None, *args, **kwargs)


@attention_entry("GPTNeoXJapaneseAttention")
def attend_gpt_neox_japanese(
    module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any
) -> Any:
    return _call_with_method(module, exchange, 1 / module.norm_factor, None, *args, **kwargs)


@attention_entry("GPTNeoSelfAttention")
def attend_gpt_neo(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    window = module.config.window_size if module.attention_type == "local" else None
    return _call_with_method(module, exchange, 1.0, window, *args, **kwargs)


# --- modules with attention in their forward ------------------------------------------------------


@attention_entry("BloomAttention")
def attend_bloom(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor,
    **kw: Any,
) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    key, value = _append_cached(module, kw, key, value)
    mask = exchange.mask(
        lambda mask, alibi: mask + alibi.unflatten(0, (-1, module.num_heads)), attention_mask, alibi
    )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)) + residual, weights


@attention_entry("MptAttention")
def attend_mpt(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    position_bias: Tensor,
    attention_mask: Any = None,
    **kw: Any,
) -> Any:
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (_split_heads(part, module.n_heads) for part in fused.chunk(3, dim=2))
    key, value = _append_cached(module, kw, key, value)
    mask = exchange.mask(  # true where a key is hidden; biases cover the longest prompt
        lambda hides, bias: hide_scores(bias[None, :, :, -hides.shape[-1] :], hides),
        attention_mask,
        position_bias,
    )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.softmax_scale)
    return module.out_proj(out.flatten(2)), weights


@attention_entry("FalconAttention")
def attend_falcon(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kw: Any,
) -> Any:
    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in parts)
    if alibi is None:
        library = import_module(type(module).__module__)
        query, key = library.apply_rotary_pos_emb(query, key, *(position_embeddings or ()))
    key, value = _append_cached(module, kw, key, value)
    # Keys and values are repeated for each head that reads them.
    shared = key.shape[1] // module.num_kv_heads
    key, value = key[:, ::shared], value[:, ::shared]
    mask = attention_mask
    if (
        alibi is not None and exchange.own == "eager"
    ):  # eager attention adds the bias to a mask that includes it
        mask = exchange.mask(
            lambda mask, bias: mask + bias * module.inv_norm_factor, attention_mask, alibi
        )
    out, weights = exchange.attend(module, query, key, value, mask, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), weights


@attention_entry("XGLMAttention", "TrOCRAttention", "MvpAttention")
def attend_xglm(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    attention_mask: Any = None,
    **kw: Any,
) -> Any:
    if kw.get("attn_prompt") is not None:
        return type(module).forward(module, hidden_states, attention_mask=attention_mask, **kw)
    read = kw.get("key_value_states")  # of an encoder
    read = hidden_states if read is None else read
    query, key, value = (
        _split_heads(projection(given), module.num_heads)
        for projection, given in (
            (module.q_proj, hidden_states),
            (module.k_proj, read),
            (module.v_proj, read),
        )
    )
    if kw.get("key_value_states") is None:
        key, value = _append_cached(module, kw, key, value)
    out, weights = exchange.attend(
        module, query, key, value, attention_mask, scaling=module.scaling
    )
    return module.out_proj(out.flatten(2)), weights


# --- encoders -------------------------------------------------------------------------------------


@attention_entry(
    "MegatronBertSelfAttention",
    "RemBertSelfAttention",
    "TapasSelfAttention",
    "BigBirdSelfAttention",
    "LukeSelfAttention",
)
def attend_bert(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(module.__class__.forward).bind(module, *args, **kwargs).arguments
    others = ("encoder_hidden_states", "entity_hidden_states")
    if any(given.get(name) is not None for name in others):  # keys of another sequence
        return module.__class__.forward(module, *args, **kwargs)
    hidden = next(value for name, value in given.items() if name.endswith("hidden_states"))
    query, key, value = (
        _split_heads(projection(hidden), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    mask = given.get("attention_mask")
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return out.flatten(2), weights


@attention_entry("MPNetEncoder")
def run_mpnet_encoder(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    """Skip position biases, which are large, in passes without masks."""
    if exchange.masked:
        return type(module).forward(module, *args, **kwargs)
    standing = _ModuleProxy(module, compute_position_bias=lambda hidden: None)
    return type(module).forward(standing, *args, **kwargs)


@attention_entry("MPNetSelfAttention")
def attend_mpnet(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_bias: Any = None,
    **_: Any,
) -> Any:
    query, key, value = (
        _split_heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.q, module.k, module.v)
    )
    mask = exchange.mask(lambda mask, bias: mask + bias, attention_mask, position_bias)
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return module.o(out.flatten(2)), weights


@attention_entry("BlipAttention")
def attend_blip(module: Any, exchange: AttentionExchange, hidden_states: Tensor, **_: Any) -> Any:
    query, key, value = (
        _split_heads(part, module.num_heads) for part in module.qkv(hidden_states).chunk(3, dim=-1)
    )
    out, weights = exchange.attend(module, query, key, value, None, scaling=module.scale)
    return module.projection(out.flatten(2)), weights


@attention_entry("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention")
def attend_data2vec_vision(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] = (0, 0),
) -> Any:
    def biases() -> Tensor:
        bias_tables = [] if relative_position_bias is None else [relative_position_bias]
        if module.has_relative_position_bias:
            size = module.config.patch_size
            window = (resolution[0] // size, resolution[1] // size)
            count = hidden_states.shape[1]
            bias = module.relative_position_bias(window, interpolate_pos_encoding, dim_size=count)
            bias_tables.append(bias)
        return sum(bias_tables, torch.zeros(1, 1, 1, 1, device=hidden_states.device))

    query, key, value = (
        _split_heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    mask = exchange.mask(biases, by=module)  # each block has separate biases
    out, weights = exchange.attend(module, query, key, value, mask, scaling=scaling)
    return out.flatten(2), weights


@attention_entry("RoFormerSelfAttention")
def attend_roformer(
    module: Any,
    exchange: AttentionExchange,
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
        _split_heads(projection(hidden_states), module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    turned = [query, key, value] if module.rotary_value else [query, key]
    turned = module.apply_rotary_position_embeddings(sinusoidal_pos, *turned)
    query, key, value = (*turned, value)[:3]
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, attention_mask, scaling=scaling)
    return out.flatten(2), weights


@attention_entry("openai.Attention")
def attend_openai_gpt(
    module: Any,
    exchange: AttentionExchange,
    x: Tensor,
    attention_mask: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Any:
    def mask(*given: Tensor) -> Tensor:
        count = x.shape[1]
        later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        return hide_scores(sum(given, x.new_zeros(1, 1, count, count)), later)

    query, key, value = (
        _split_heads(part, module.n_head)
        for part in module.c_attn(x).split(module.split_size, dim=2)
    )
    given = () if attention_mask is None else (attention_mask,)
    made = exchange.mask(mask, *given, by=x.shape[1])
    scaling = value.shape[-1] ** -0.5 if module.scale else 1.0
    out, _weights = exchange.attend(module, query, key, value, made, scaling=scaling)
    return [module.c_proj(out.flatten(2))]


# --- Llama 4: without rotary, queries are scaled by position --------------------------------------


@attention_entry("Llama4TextDecoderLayer")
def run_llama4_block(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    """Store the block's positions, which attention would otherwise count itself."""
    exchange.positions = kwargs.get("position_ids")
    return type(module).forward(module, *args, **kwargs)


@attention_entry("Llama4TextAttention")
def attend_llama4(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Any = None,
    **kw: Any,
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
    key, value = _append_cached(module, kw, key, value)
    out, weights = exchange.attend(
        module, query, key, value, attention_mask, scaling=module.scaling
    )
    return module.o_proj(out.flatten(2)), weights


@attention_entry("DebertaEncoder", "DebertaV2Encoder")
def run_deberta_encoder(module: Any, exchange: AttentionExchange, *args: Any, **kwargs: Any) -> Any:
    """Skip the mask of all tokens and their distances in passes without masks."""
    if exchange.masked:
        return type(module).forward(module, *args, **kwargs)
    standing = _ModuleProxy(
        module, get_rel_pos=lambda *_: None, get_attention_mask=lambda given: given
    )
    return type(module).forward(standing, *args, **kwargs)


@attention_entry("DisentangledSelfAttention")
def attend_deberta(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Any = None,
    relative_pos: Any = None,
    rel_embeddings: Any = None,
) -> Any:
    """Attention of both versions."""
    count = module.num_attention_heads
    if query_states is not None or getattr(module, "talking_head", False):
        given = (attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)
        return type(module).forward(module, hidden_states, *given)
    if hasattr(module, "in_proj"):
        fused = _split_heads(module.in_proj(hidden_states), count)
        query, key, value = fused.chunk(3, dim=-1)
        query = query + module.q_bias.view(count, 1, -1)
        value = value + module.v_bias.view(count, 1, -1)
    else:
        query, key, value = (
            _split_heads(projection(hidden_states), count)
            for projection in (module.query_proj, module.key_proj, module.value_proj)
        )
    distances = None
    if module.relative_attention and exchange.masked:
        distances = _build_distance_scores(module, relative_pos.flatten(0, -2), rel_embeddings)
    scaling = (query.shape[-1] * (1 + len(module.pos_att_type))) ** -0.5
    mask = exchange.mask(lambda mask: mask.bool(), attention_mask)
    out, weights = exchange.attend(
        module, query, key, value, mask, scaling=scaling, distances=distances
    )
    return out.flatten(2), weights


def _build_distance_scores(module: Any, relative: Tensor, embeddings: Tensor) -> DistanceScores:
    """Build distance scores; relative: [T, T], query position minus key position, or its bucket."""
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
        # Not `module(...)`: this module may also project queries or keys, which have hooks.
        made = getattr(module, maps[name]).forward(embeddings[None])
        return _split_heads(made, module.num_attention_heads)[0]

    return DistanceScores(
        keys=table("c2p"),
        queries=table("p2c"),
        to_key=(relative + span).clamp(0, 2 * span - 1),
        to_query=(span - relative).clamp(0, 2 * span - 1).t(),
    )


@attention_entry("IBertSelfAttention")
def attend_ibert(
    module: Any,
    exchange: AttentionExchange,
    hidden_states: Tensor,
    hidden_states_scaling_factor: Any,
    attention_mask: Any = None,
    output_attentions: bool = False,
) -> Any:
    query, key, value = (
        _split_heads(projection(hidden_states)[0], module.num_attention_heads)
        for projection in (module.query, module.key, module.value)
    )
    scaling = module.attention_head_size**-0.5
    out, weights = exchange.attend(module, query, key, value, attention_mask, scaling=scaling)
    return (out.flatten(2), weights), (None, None)
