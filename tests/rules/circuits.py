"""A forward pass, one prompt at a time, in which each receiver reads a separate sum of senders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..reference.forward import Run, Stack, stack
from ..reference.ruled import FlatSoftmax

EMBED = "embed"
LOGITS = "logits"


def head(layer: int, number: int) -> str:
    return f"L{layer}H{number}"


def mlp(layer: int) -> str:
    return f"L{layer}.mlp"


def neuron(layer: int, number: int) -> str:
    return f"L{layer}N{number}"


class Encoder(Protocol):
    """A dictionary, computed from its formulas."""

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, features: Tensor, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """Features of the MLP, or of the attention, of a layer that are nodes."""

    of: Encoder
    names: Mapping[str, int]
    """Node → its number in the dictionary."""
    reads: str = "mlp_out"
    """What is encoded: `mlp_out`, `mlp_norm`, `resid_mid` or `attn_out`."""

    def split(self, node: str, output: Tensor, encoded: Tensor) -> Tensor:
        """What a feature, or the rest of the output, adds to the stream, [T, d_model]."""
        values = self.of.encode(encoded)
        nothing = self.of.decode(torch.zeros_like(values), encoded)

        def alone(number: int) -> Tensor:
            own = torch.zeros_like(values)
            own[:, number] = values[:, number]
            return self.of.decode(own, encoded) - nothing

        if node in self.names:
            return alone(self.names[node])
        return output - sum(map(alone, self.names.values()), torch.zeros_like(output))


def mlp_nodes(layer: int, features: Features) -> list[str]:
    return [*features.names, mlp(layer)]


def attention_nodes(layer: int, features: Features) -> list[str]:
    return [*features.names, f"L{layer}.attn"]


@torch.no_grad()
def neuron_weights(parts: Stack, layer: int, count: int) -> tuple[Tensor, Tensor]:
    """What each neuron adds to the stream per unit of activation, [neuron, d_model], and the bias
    of the MLP, [d_model]."""
    block = parts.block(layer)
    nothing = torch.zeros(count, count, dtype=next(block.parameters()).dtype)
    bias = parts.down(block, nothing[:1])[0]
    return parts.down(block, nothing.fill_diagonal_(1)) - bias, bias


def reads(
    parts: Stack,
    kv: int,
    *,
    parallel: bool,
    split: Mapping[int, int] | None = None,
    features: Mapping[int, Features] | None = None,
    attention: Mapping[int, Features] | None = None,
) -> dict[str, list[str]]:
    """Receiver → the senders before it.

    Args:
        split: Layers whose neurons are nodes instead of the MLP, with the number of neurons.
        features: Layers whose features are nodes; the MLP is the rest of its output.
        attention: Layers whose features of the output of attention are nodes; heads send to these.
    """
    found: dict[str, list[str]] = {}
    before = [EMBED]
    for layer in range(parts.layers):
        heads = [head(layer, n) for n in range(parts.heads)]
        for letter, count in (("q", parts.heads), ("k", kv), ("v", kv)):
            found |= {f"{head(layer, n)}.{letter}": [*before] for n in range(count)}
        if attention and layer in attention:
            nodes = attention_nodes(layer, attention[layer])
            found |= dict.fromkeys(nodes, heads)
            heads = nodes
        count = (split or {}).get(layer)
        names = [mlp(layer)] if count is None else [neuron(layer, n) for n in range(count)]
        names = mlp_nodes(layer, features[layer]) if features and layer in features else names
        found |= {name: [*before, *([] if parallel else heads)] for name in names}
        before += [*heads, *names]
    return {**found, LOGITS: before}


def outputs(
    run: Run,
    parts: Stack,
    split: Collection[int] = (),
    features: Mapping[int, Features] | None = None,
    attention: Mapping[int, Features] | None = None,
) -> dict[str, Tensor]:
    """Sender → its output in a run, [T, d_model]; split: layers whose neurons are nodes."""
    found = {EMBED: run["resid_pre", 0][:, 0]}
    for layer in range(parts.layers):
        found |= {head(layer, n): run["head_out", layer][:, n] for n in range(parts.heads)}
        found[mlp(layer)] = run["mlp_out", layer][:, 0]
        if layer in split:
            hidden = run["mlp_hidden", layer].flatten(1)
            weights, _ = neuron_weights(parts, layer, hidden.shape[1])
            found |= {neuron(layer, n): hidden[:, n, None] * own for n, own in enumerate(weights)}
        if features and layer in features:
            own, output = features[layer], run["mlp_out", layer][:, 0]
            encoded = run[own.reads, layer][:, 0]
            found |= {n: own.split(n, output, encoded) for n in mlp_nodes(layer, own)}
        if attention and layer in attention:
            own, output = attention[layer], run["attn_out", layer][:, 0]
            found |= {n: own.split(n, output, output) for n in attention_nodes(layer, own)}
    return found


@torch.no_grad()
def circuit_pass(
    name: str,
    model: Any,
    ids: Sequence[int],
    fills: Mapping[str, Tensor],
    ablated: Collection[tuple[str, str]] | Mapping[tuple[str, str], Tensor],
    positions: Sequence[int],
    *,
    moved: Mapping[str, Tensor] | None = None,
    added: Mapping[str, Tensor] | None = None,
    held: Mapping[str, Tensor] | None = None,
    record: dict[str, Tensor] | None = None,
    rules: str = "",
    split: Mapping[int, int] | None = None,
    features: Mapping[int, Features] | None = None,
    attention: Mapping[int, Features] | None = None,
) -> Tensor:
    """The logits [T, vocab] if ablated edges carry the fills, [T, d_model] by sender, at these
    positions, and all others what their senders give in the same pass; or a share of the fill, the
    rest of it from the same pass.

    Args:
        moved: Sender → [T, d_model] added to its output.
        added: Receiver → [T, d_model] added to what it reads.
        held: Sender or `resid_pre 1` → [T, d_model], or query, key or value → [T, width], instead
            of what the pass computes; NaN keeps the computed number.
        record: Filled with the values of these names.
        rules: "relp" or "gim" for these derivatives, of a model by `ruled`.
        split: Layers whose neurons are senders and receivers, with the number of neurons.
        features: Layers whose features are senders and receivers.
        attention: Layers whose features of the output of attention are, too; their heads send only
            to these and to the rest of this output.
    """
    moves, adds, fixed = moved or {}, added or {}, held or {}
    seen_so_far = {} if record is None else record

    def taken(key: str, value: Tensor) -> Tensor:
        own = fixed.get(key, torch.full_like(value, torch.nan))
        seen_so_far[key] = torch.where(own.isnan(), value, own)
        return seen_so_far[key]

    shares = ablated if isinstance(ablated, Mapping) else dict.fromkeys(ablated, 1.0)
    parts = stack(name, model)
    x = parts.positions(parts.embed(torch.tensor([list(ids)])))[0] + moves.get(EMBED, 0)
    x = taken(EMBED, x)
    given = {EMBED: x}
    kv = getattr(model.config, "num_key_value_heads", None) or parts.heads
    there = torch.zeros(len(ids), 1, dtype=x.dtype)
    there[list(positions)] = 1

    normed = type(parts).behind_attention is not Stack.behind_attention
    into = dict[str, list[tuple[str, Any]]]()
    for (sender, to), share in shares.items():
        into.setdefault(to, []).append((sender, share))

    def seen_by(receiver: str) -> Tensor:
        if normed:
            ablated_ = dict(into.get(receiver, ()))
            carried = {
                of: own + ablated_.get(of, 0.0) * there * (fills.get(of, own) - own)
                for of, own in given.items()
            }
            found = _join(parts, carried, attention or {}, split or {})
            return (found + adds.get(receiver, 0))[None]
        seen = x + adds.get(receiver, 0)
        for sender, share in into.get(receiver, ()):
            seen = seen + share * there * (fills[sender] - given[sender])
        return seen[None]

    for layer in range(parts.layers):
        block = parts.block(layer)
        x = taken(f"resid_pre {layer}", x)
        first, second = parts.norms(block)
        counts = (parts.heads, kv, kv)
        names = [
            f"{head(layer, n)}.{letter}"
            for letter, count in zip("qkv", counts, strict=True)
            for n in range(count)
        ]
        projected = parts.project(block, first(torch.cat([seen_by(name) for name in names])))
        inputs = torch.arange(len(names)).split(counts)  # of each query, key and value
        own_inputs = [
            every[own, :, range(len(own))] for every, own in zip(projected, inputs, strict=True)
        ]
        qkv = [
            torch.stack([taken(names[n], x) for n, x in zip(own.tolist(), each, strict=True)], 1)
            for own, each in zip(inputs, own_inputs, strict=True)
        ]
        q, k, v = (each[None] for each in qkv)
        z = _attended(parts, layer, q, k, v, rules)
        weight, bias = parts.output(block)
        each = torch.einsum("thd,hdm->htm", z, weight.unflatten(0, (parts.heads, -1)))
        nodes = [mlp(layer)]
        if split and layer in split:
            nodes = [neuron(layer, n) for n in range(split[layer])]
        own = features.get(layer) if features else None
        nodes = nodes if own is None else mlp_nodes(layer, own)
        mlp_input = torch.cat(list(map(seen_by, nodes))) if parts.parallel else None
        given |= {
            head(layer, n): taken(head(layer, n), each[n] + moves.get(head(layer, n), 0))
            for n in range(parts.heads)
        }
        bias = torch.zeros_like(x[0]) if bias is None else bias
        if attention and layer in attention:
            split_ = attention[layer]
            for name in attention_nodes(layer, split_):
                ends = dict(into.get(name, ()))
                joined = bias + adds.get(name, 0)
                for n in range(parts.heads):
                    of, value = head(layer, n), given[head(layer, n)]
                    share = ends.get(of, 0.0) * there
                    joined = joined + value + share * (fills.get(of, value) - value)
                output = parts.behind_attention(block, joined)
                value = split_.split(name, output, output)
                given[name] = taken(name, value + moves.get(name, 0))
            x = x + sum(given[name] for name in attention_nodes(layer, split_))
        else:
            joined = torch.stack([given[head(layer, n)] for n in range(parts.heads)]).sum(0)
            x = x + parts.behind_attention(block, joined + bias)
        mlp_input = torch.cat(list(map(seen_by, nodes))) if mlp_input is None else mlp_input
        if split and layer in split:
            hidden = _activations(parts, block, second(mlp_input), rules)
            weights, bias = neuron_weights(parts, layer, len(nodes))
            for n, name in enumerate(nodes):
                own = hidden[n, :, n, None] * weights[n]
                given[name] = taken(name, own + moves.get(name, 0))
            x = x + parts.behind_mlp(block, sum(given[name] for name in nodes) + bias)
            continue
        if own is not None:
            for n, name in enumerate(nodes):
                stream = mlp_input[n]
                given_ = second(stream[None])[0]
                hidden = parts.neurons(block, given_[None])
                output = parts.down(block, given_[None] if hidden is None else hidden)[0]
                output = block.mlp(given_[None])[0] if rules else output
                seen = {"mlp_out": output, "mlp_norm": given_, "resid_mid": stream}
                value = own.split(name, output, seen[own.reads])
                given[name] = taken(name, value + moves.get(name, 0))
            x = x + sum(given[name] for name in nodes)
            continue
        if rules:
            given[mlp(layer)] = parts.behind_mlp(block, block.mlp(second(mlp_input)))[0]
        else:
            hidden = parts.neurons(block, second(mlp_input))
            hidden = second(mlp_input) if hidden is None else hidden
            given[mlp(layer)] = parts.behind_mlp(block, parts.down(block, hidden))[0]
        given[mlp(layer)] = taken(mlp(layer), given[mlp(layer)] + moves.get(mlp(layer), 0))
        x = x + given[mlp(layer)]
    return parts.unembed(parts.final(seen_by(LOGITS)))[0]


def _join(
    parts: Stack,
    carried: Mapping[str, Tensor],
    attention: Mapping[int, Features],
    split: Mapping[int, int],
) -> Tensor:
    """[T, d_model]: the stream of senders so far, with the norm after each attention, and after
    each MLP whose neurons are senders."""
    x = carried[EMBED]
    for layer in range(parts.layers):
        heads = [carried[of] for n in range(parts.heads) if (of := head(layer, n)) in carried]
        if layer in attention:
            nodes = attention_nodes(layer, attention[layer])
            x = x + sum(carried[name] for name in nodes if name in carried)
        elif heads:
            block = parts.block(layer)
            _, bias = parts.output(block)
            joined = torch.stack(heads).sum(0) + (0 if bias is None else bias)
            x = x + parts.behind_attention(block, joined)
        if layer in split and neuron(layer, 0) in carried:
            _, bias = neuron_weights(parts, layer, split[layer])
            joined = sum(carried[neuron(layer, n)] for n in range(split[layer]))
            x = x + parts.behind_mlp(parts.block(layer), joined + bias)
        x = x + carried.get(mlp(layer), 0)
    return x


def _activations(parts: Stack, block: Any, x: Tensor, rules: str) -> Tensor:
    """[copies, T, neurons]; with the derivatives of `ruled`, which replaces whole gated MLPs."""
    if rules and hasattr(block.mlp, "gate_proj"):
        gate, up = block.mlp.act_fn(block.mlp.gate_proj(x)), block.mlp.up_proj(x)
        return (gate * up.detach() + gate.detach() * up) / 2
    hidden = parts.neurons(block, x)
    assert hidden is not None
    return hidden


def _attended(parts: Stack, layer: int, q: Tensor, k: Tensor, v: Tensor, rules: str = "") -> Tensor:
    """[T, head, d_head]"""
    if rules == "gim":
        for part, divisor in ((q, 4), (k, 4), (v, 2)):
            part.register_hook(lambda grad, divisor=divisor: grad / divisor)
    q, k = parts.rotate(q)[0], parts.rotate(k)[0]
    shared = parts.heads // k.shape[1]
    k, v = k.repeat_interleave(shared, dim=1), v[0].repeat_interleave(shared, dim=1)
    length = len(q)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (parts.window(layer) or length))
    scores = torch.einsum("thd,shd->ths", q, k) * parts.scale(q.shape[-1])
    if parts.cap is not None:
        scores = torch.tanh(scores / parts.cap) * parts.cap
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    sinks = parts.sinks(parts.block(layer))
    if sinks is not None:
        sink = sinks[:, None].expand(length, parts.heads, 1)
        scores = torch.cat([scores, sink], dim=2)
    weights = FlatSoftmax.apply(scores) if rules == "gim" else scores.softmax(2)
    pattern = weights[..., :length]
    return torch.einsum("ths,shd->thd", pattern, v)
