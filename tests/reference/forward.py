"""Explicit forward passes of tiny models, on one unpadded prompt at a time.

Linear maps, norms and activation functions are modules of the bare model; attention, rotary
embeddings, masks, windows, caps, sinks and the order of operations are explicit. Every site is
read, any vectors of any sites are written, and attention edges are edited one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Place = tuple[str, int | None]
"""A site and its layer, None for `embed`, `final_norm`, `logits`."""
SITES = (
    "embed",
    "resid_pre",
    "attn_norm",
    "q",
    "k",
    "v",
    "z",
    "head_out",
    "attn_out",
    "resid_mid",
    "mlp_norm",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
    "final_norm",
    "logits",
)
"""Sites between the modules of every family, in the order of a pass; attention also has `q_rot`,
`k_rot`, `scores` and `pattern`."""
WITHOUT_LAYER = ("embed", "final_norm", "logits")


@dataclass(frozen=True)
class Write:
    """A vector that replaces the computed one at a site, or a function of the computed one.

    position and unit are None for all of them, which may have vectors of their own: then `vector`
    is [T, units, width], or broadcasts to it. unit is the head or the neuron. Of `scores` and
    `pattern`, a vector is over keys and its position is the query.
    """

    site: str
    layer: int | None
    vector: Tensor | Callable[[Tensor], Tensor]
    position: int | None = None
    unit: int | None = None


@dataclass(frozen=True)
class Edge:
    """An edit of the attention from any of `queries` to any of `keys`; heads None are all."""

    kind: Literal["block", "reweight", "uniform", "set"]
    layer: int
    queries: Sequence[int]
    keys: Sequence[int]
    amount: float = 0.0
    heads: Sequence[int] | None = None


Changes = tuple[Sequence[Write], Sequence[Edge]]
"""Changes to one copy of a prompt; the later of two writes to one vector applies."""


@dataclass
class Run:
    """The result of a forward pass: logits [T, vocab], and every site as [T, units, width]."""

    writes: Sequence[Write]
    logits: Tensor
    copy: int
    """The number of the copy in `copies`, where each site is [copies, T, units, width]."""
    copies: dict[Place, Tensor]

    def __getitem__(self, place: Place) -> Tensor:
        return self.copies[place][self.copy]

    @cached_property
    def seen(self) -> dict[Place, Tensor]:
        return {place: value[self.copy] for place, value in self.copies.items()}


class Pass:
    """Copies of a prompt on their way through the model."""

    def __init__(self, each: Sequence[Changes]) -> None:
        self.seen: dict[Place, Tensor] = {}
        self.here: dict[Place, list[tuple[int, Write]]] = {}
        self.edges: dict[int, list[tuple[int, Edge]]] = {}
        for copy, (writes, edges) in enumerate(each):
            for write in writes:
                self.here.setdefault((write.site, write.layer), []).append((copy, write))
            for edge in edges:
                self.edges.setdefault(edge.layer, []).append((copy, edge))

    def at(
        self, site: str, layer: int | None, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """The site's value [copies, T, units, width] with its writes; the value is recorded."""
        writes = self.here.get((site, layer), [])
        if writes:
            value = value.clone()
        for copy, write in writes:
            positions, units = _only(write.position), _only(write.unit)
            there = value[copy, positions, units]
            vectors = write.vector
            vectors = vectors.expand_as(there) if isinstance(vectors, Tensor) else vectors(there)
            if allowed is not None:
                vectors = torch.where(allowed[positions, None], vectors, there)
            value[copy, positions, units] = vectors
        self.seen[site, layer] = value
        return value

    def edited(self, layer: int, rows: Tensor, visible: Tensor) -> Tensor:
        """The weights of attention, [copies, T, heads, keys], with the edges edited."""
        for copy, edge in self.edges.get(layer, ()):
            heads = range(rows.shape[2]) if edge.heads is None else edge.heads
            for query in edge.queries:
                keys = [key for key in edge.keys if visible[query, key]]
                if keys:
                    here = copy, query, list(heads)
                    rows[here] = edited(rows[here], edge, keys)
        return rows

    def whole(self, site: str, layer: int | None, value: Tensor) -> Tensor:
        """`at` for a site without heads, [copies, T, width]."""
        return self.at(site, layer, value[:, :, None])[:, :, 0]


def _only(number: int | None) -> slice:
    """A slice of one index, or of all."""
    return slice(None) if number is None else slice(number, number + 1 or None)


# --- families -------------------------------------------------------------------------------------


class Stack:
    """The components of a model; x is [copies, T, d_model] everywhere."""

    parallel = False
    cap: float | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.layers = model.config.num_hidden_layers
        self.heads = model.config.num_attention_heads

    def embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def positions(self, x: Tensor) -> Tensor:
        """The stream before the first block."""
        return x

    def block(self, layer: int) -> Any:
        raise NotImplementedError

    def norms(self, block: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, [copies, T, heads, d_head]."""
        raise NotImplementedError

    def rotate(self, x: Tensor) -> Tensor:
        return x

    def scale(self, width: int) -> float:
        return width**-0.5

    def window(self, layer: int) -> int | None:
        return None

    def sinks(self, block: Any) -> Tensor | None:
        return None

    def output(self, block: Any) -> tuple[Tensor, Tensor | None]:
        """The output projection, [heads * d_head, d_model], and its bias."""
        raise NotImplementedError

    def behind_attention(self, block: Any, x: Tensor) -> Tensor:
        return x

    def neurons(self, block: Any, x: Tensor) -> Tensor | None:
        """[copies, T, neurons]; None for experts."""
        raise NotImplementedError

    def down(self, block: Any, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def behind_mlp(self, block: Any, x: Tensor) -> Tensor:
        return x

    def final(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def unembed(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GPT2(Stack):
    def embed(self, ids: Tensor) -> Tensor:
        return self.model.transformer.wte.weight[ids]

    def positions(self, x: Tensor) -> Tensor:
        return x + self.model.transformer.wpe.weight[: x.shape[1]]

    def block(self, layer: int) -> Any:
        return self.model.transformer.h[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.ln_1, block.ln_2

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = x @ block.attn.c_attn.weight + block.attn.c_attn.bias
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in out.chunk(3, dim=-1))
        return q, k, v

    def output(self, block: Any) -> tuple[Tensor, Tensor | None]:
        return block.attn.c_proj.weight, block.attn.c_proj.bias

    def neurons(self, block: Any, x: Tensor) -> Tensor | None:
        return block.mlp.act(x @ block.mlp.c_fc.weight + block.mlp.c_fc.bias)

    def down(self, block: Any, hidden: Tensor) -> Tensor:
        return hidden @ block.mlp.c_proj.weight + block.mlp.c_proj.bias

    def final(self, x: Tensor) -> Tensor:
        return self.model.transformer.ln_f(x)

    def unembed(self, x: Tensor) -> Tensor:
        return x @ self.model.lm_head.weight.T


def _turned(x: Tensor, theta: float, width: int) -> Tensor:
    """Rotate each pair (i, i + half) of features by its position's angle; x is
    [copies, T, heads, width].

    width: as the model counts it; a single feature still makes a pair.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = _angles(x.shape[1], half, theta, width, x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@cache
def _angles(
    length: int, half: int, theta: float, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [T, 1, half]."""
    frequencies = theta ** (-2 * torch.arange(half, dtype=dtype) / width)
    angles = torch.arange(length, dtype=dtype)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


class Llama(Stack):
    def embed(self, ids: Tensor) -> Tensor:
        return self.model.model.embed_tokens.weight[ids]

    def block(self, layer: int) -> Any:
        return self.model.model.layers[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.input_layernorm, block.post_attention_layernorm

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, width = block.self_attn, block.self_attn.head_dim
        q = attention.q_proj(x).unflatten(-1, (-1, width))
        k = attention.k_proj(x).unflatten(-1, (-1, width))
        v = attention.v_proj(x).unflatten(-1, (-1, width))
        return q, k, v

    def rotate(self, x: Tensor) -> Tensor:
        return _turned(x, self.config.rope_parameters["rope_theta"], x.shape[-1])

    def window(self, layer: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        windowed = kinds is not None and kinds[layer] == "sliding_attention"
        return self.config.sliding_window if windowed else None

    def output(self, block: Any) -> tuple[Tensor, Tensor | None]:
        return block.self_attn.o_proj.weight.T, block.self_attn.o_proj.bias

    def neurons(self, block: Any, x: Tensor) -> Tensor | None:
        mlp = block.mlp
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    def down(self, block: Any, hidden: Tensor) -> Tensor:
        return block.mlp.down_proj(hidden)

    def final(self, x: Tensor) -> Tensor:
        return self.model.model.norm(x)

    def unembed(self, x: Tensor) -> Tensor:
        return self.model.lm_head(x)


class Mistral(Llama):
    def window(self, layer: int) -> int | None:
        return self.config.sliding_window


class Qwen3(Llama):
    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(block, x)
        return block.self_attn.q_norm(q), block.self_attn.k_norm(k), v


class Gemma2(Llama):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.cap = model.config.attn_logit_softcapping

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * self.config.hidden_size**0.5

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.input_layernorm, block.pre_feedforward_layernorm

    def scale(self, width: int) -> float:
        return self.config.query_pre_attn_scalar**-0.5

    def behind_attention(self, block: Any, x: Tensor) -> Tensor:
        return block.post_attention_layernorm(x)

    def behind_mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.post_feedforward_layernorm(x)

    def unembed(self, x: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return torch.tanh(super().unembed(x) / cap) * cap


class GptOss(Llama):
    def sinks(self, block: Any) -> Tensor | None:
        return block.self_attn.sinks

    def neurons(self, block: Any, x: Tensor) -> Tensor | None:
        return None

    def down(self, block: Any, hidden: Tensor) -> Tensor:
        """The weighted output of each token's best experts, from their input."""
        router, experts = block.mlp.router, block.mlp.experts
        scores = hidden @ router.weight.T + router.bias
        best, chosen = scores.topk(router.top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        out = torch.zeros_like(hidden)
        for n in range(scores.shape[-1]):
            both = hidden @ experts.gate_up_proj[n] + experts.gate_up_proj_bias[n]
            gate, up = both[..., ::2].clamp(max=experts.limit), both[..., 1::2]
            up = up.clamp(-experts.limit, experts.limit)
            made = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
            made = made @ experts.down_proj[n] + experts.down_proj_bias[n]
            out += weights[..., n, None] * made
        return out


class NeoX(Stack):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.parallel = model.config.use_parallel_residual

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.gpt_neox.embed_in.weight[ids]

    def block(self, layer: int) -> Any:
        return self.model.gpt_neox.layers[layer]

    def norms(self, block: Any) -> tuple[Any, Any]:
        return block.input_layernorm, block.post_attention_layernorm

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = block.attention.query_key_value(x).unflatten(-1, (self.heads, 3, -1))
        return out[..., 0, :], out[..., 1, :], out[..., 2, :]

    def rotate(self, x: Tensor) -> Tensor:
        rope = self.config.rope_parameters
        width = int(x.shape[-1] * rope.get("partial_rotary_factor", 1.0))
        even = width + width % 2
        turned = _turned(x[..., :even], rope["rope_theta"], width)
        return torch.cat([turned, x[..., even:]], dim=-1)

    def output(self, block: Any) -> tuple[Tensor, Tensor | None]:
        return block.attention.dense.weight.T, block.attention.dense.bias

    def neurons(self, block: Any, x: Tensor) -> Tensor | None:
        return block.mlp.act(block.mlp.dense_h_to_4h(x))

    def down(self, block: Any, hidden: Tensor) -> Tensor:
        return block.mlp.dense_4h_to_h(hidden)

    def final(self, x: Tensor) -> Tensor:
        return self.model.gpt_neox.final_layer_norm(x)

    def unembed(self, x: Tensor) -> Tensor:
        return x @ self.model.get_output_embeddings().weight.T


STACKS: dict[str, type[Stack]] = {
    "gpt2": GPT2,
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Llama,
    "qwen3": Qwen3,
    "gemma2": Gemma2,
    "gpt_oss": GptOss,
    "gpt_neox": NeoX,
    "gpt_neox_sequential": NeoX,
}


def stack(name: str, model: Any) -> Stack:
    return STACKS[name.split(" ")[0]](model)


# --- a forward pass -------------------------------------------------------------------------------


@torch.no_grad()
def side_by_side(
    name: str,
    model: Any,
    ids: Sequence[int],
    each: Sequence[Changes],
) -> list[Run]:
    """Run one prompt through the model, with a copy for each of `each`."""
    parts = stack(name, model)
    run = Pass(each)
    x = run.whole("embed", None, parts.embed(torch.tensor([list(ids)] * len(each))))
    x = parts.positions(x)
    for layer in range(parts.layers):
        x = _block(parts, layer, x, run)
    x = run.whole("final_norm", None, parts.final(x))
    logits = run.whole("logits", None, parts.unembed(x))
    return [Run(writes, logits[n], n, run.seen) for n, (writes, _) in enumerate(each)]


def forward(
    name: str,
    model: Any,
    ids: Sequence[int],
    writes: Iterable[Write] = (),
    edges: Iterable[Edge] = (),
) -> Run:
    """Run one prompt through the model."""
    (run,) = side_by_side(name, model, ids, [(tuple(writes), tuple(edges))])
    return run


def _block(parts: Stack, layer: int, x: Tensor, run: Pass) -> Tensor:
    block = parts.block(layer)
    first, second = parts.norms(block)
    pre = run.whole("resid_pre", layer, x)
    attn = run.whole("attn_out", layer, _attention(parts, layer, first(pre), run))
    if parts.parallel:
        mlp = run.whole("mlp_out", layer, _mlp(parts, layer, second(pre), run))
        return run.whole("resid_post", layer, pre + attn + mlp)
    mid = run.whole("resid_mid", layer, pre + attn)
    mlp = run.whole("mlp_out", layer, _mlp(parts, layer, second(mid), run))
    return run.whole("resid_post", layer, mid + mlp)


def _mlp(parts: Stack, layer: int, x: Tensor, run: Pass) -> Tensor:
    block = parts.block(layer)
    x = run.whole("mlp_norm", layer, x)
    hidden = parts.neurons(block, x)
    if hidden is not None:
        hidden = run.at("mlp_hidden", layer, hidden[..., None])[..., 0]
    return parts.behind_mlp(block, parts.down(block, x if hidden is None else hidden))


def _attention(parts: Stack, layer: int, x: Tensor, run: Pass) -> Tensor:
    """Index letters: c is the copy, t the query, s the key, h the head, d its width, m d_model."""
    block = parts.block(layer)
    x = run.whole("attn_norm", layer, x)
    q, k, v = parts.project(block, x)
    q, k, v = run.at("q", layer, q), run.at("k", layer, k), run.at("v", layer, v)
    q, k = run.at("q_rot", layer, parts.rotate(q)), run.at("k_rot", layer, parts.rotate(k))
    copies, length, heads, width = q.shape
    shared = heads // k.shape[2]  # this many heads in a row read the same keys and values
    k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)

    visible = _visible(length, parts.window(layer))
    scores = torch.einsum("cthd,cshd->cths", q, k) * parts.scale(width)
    if parts.cap is not None:
        scores = torch.tanh(scores / parts.cap) * parts.cap
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    scores = run.at("scores", layer, scores, visible)

    sinks = parts.sinks(block)
    every = scores  # [copy, query, head, key], the sink after the keys
    if sinks is not None:
        sink = sinks[:, None].expand(copies, length, heads, 1)
        every = torch.cat([scores, sink], dim=3)
    rows = run.edited(layer, every.softmax(3), visible)
    pattern = run.at("pattern", layer, rows[..., :length], visible)

    z = run.at("z", layer, torch.einsum("cths,cshd->cthd", pattern, v))
    weight, bias = parts.output(block)
    each = torch.einsum("cthd,hdm->cthm", z, weight.unflatten(0, (heads, -1)))
    total = run.at("head_out", layer, each).sum(2)
    return parts.behind_attention(block, total if bias is None else total + bias)


@cache
def _visible(length: int, window: int | None) -> Tensor:
    """[query, key]"""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < (window or length))


def edited(rows: Tensor, edge: Edge, keys: list[int]) -> Tensor:
    """The weights of the keys, and of the sink, for one query of some heads, [heads, keys]."""
    rows = rows.clone()
    match edge.kind:
        case "block" | "reweight":
            rows[:, keys] *= 0 if edge.kind == "block" else edge.amount
            total = rows.sum(1, keepdim=True)
            return torch.where(total > 0, rows / total, rows)
        case "uniform":
            rows[:, keys] = rows[:, keys].sum(1, keepdim=True) / len(keys)
            return rows
        case "set":
            rows[:, keys] = 0
            total = rows.sum(1, keepdim=True)
            others = rows / total * (1 - edge.amount * len(keys))
            others[:, keys] = edge.amount
            rows[:, keys] = 1 / len(keys)  # if there is no other key; a row sums to 1
            return torch.where(total > 0, others, rows)
