"""Circuits of encoder-decoders: a pass over one unpadded prompt in which plain hooks give each
receiver a separate sum of senders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..reference.ruled import multiply_gate
from .encoder_decoders import LIKE_T5, Place, name_of, place

Node = tuple[str, int, int]
"""A site as a file spells it (`z cross`), its layer, and its head, its neuron or 0."""

Edge = tuple[Node, Node]

EMBED, LOGITS = ("embed", 0, 0), ("logits", 0, 0)
ENCODED = ("embed encoder", 0, 0)


@dataclass(frozen=True)
class Features:
    """The features of a dictionary of an MLP's output that are nodes."""

    numbers: tuple[int, ...]
    encode: Callable[[Tensor], Tensor]
    decoder: Tensor
    """[feature, width]"""
    of_inputs: bool = False
    """Whether they encode the input of the MLP, as those of a transcoder."""

    def parts(self, inputs: Tensor, outputs: Tensor) -> list[Tensor]:
        """[token, width] by feature: what it adds to the stream."""
        found = self.encode(inputs if self.of_inputs else outputs)
        return [found[:, n, None] * self.decoder[n] for n in self.numbers]


@dataclass(frozen=True)
class Family:
    """A model in double precision, and its sizes."""

    name: str
    model: Any
    layers: int
    encoder_layers: int
    heads: int
    encoder_heads: int
    split: Mapping[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    """Numbers of neurons of the MLPs whose neurons are nodes, by stack and layer."""
    features: Mapping[tuple[str, int], Features] = field(
        default_factory=dict[tuple[str, int], Features]
    )
    """By site of the output and layer."""

    def after(self, stack: str) -> bool:
        """Whether norms follow the sums of a stream."""
        return name_of(self.name) in ("bart", "marian")

    def place(self, site: str, layer: int) -> Place:
        return place(self.name, site, layer)

    def count(self, stack: str) -> int:
        return self.encoder_heads if stack == "encoder" else self.heads

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def norm(self, site: str, layer: int) -> str:
        """The norm before a sublayer, or after its sum."""
        component, _, stack = site.partition(" ")
        root = "encoder" if stack == "encoder" else "decoder"
        if name_of(self.name) in LIKE_T5:
            number = {"z": 1 if stack == "cross" else 0, "mlp_out": 1 if stack else 2}[component]
            return f"{root}.block.{layer}.layer.{number}.layer_norm"
        if name_of(self.name) == "t5gemma":
            kind = {"z": "self_attn", "z cross": "cross_attn"}.get(
                site.removesuffix(" encoder"), "feedforward"
            )
            return f"model.{root}.layers.{layer}.pre_{kind}_layernorm"
        names = {"z cross": "encoder_attn", "mlp_out": "final", "mlp_out encoder": "final"}
        return f"model.{root}.layers.{layer}.{names.get(site, 'self_attn')}_layer_norm"

    def output_norm(self, site: str, layer: int) -> str:
        """The norm of the sum of heads or neurons; empty if there is none."""
        if name_of(self.name) != "t5gemma":
            return ""
        return self.norm(site, layer).replace(".pre_", ".post_")

    def end(self, stack: str) -> str:
        """The norm of the end of a stream; empty if its last sublayer has it."""
        root = stack or "decoder"
        if name_of(self.name) in LIKE_T5:
            return f"{root}.final_layer_norm"
        if name_of(self.name) == "t5gemma":
            return f"model.{root}.norm"
        return "" if self.after(stack) else f"model.{root}.layer_norm"

    def scale(self, site: str, layer: int) -> Any:
        """The factor of a sublayer's output before it is added to the stream."""
        return 1

    def mlp(self, site: str, layer: int) -> str:
        """The module that reads what an MLP reads."""
        path = self.place(site, layer).path
        if name_of(self.name) == "t5gemma":
            return path.replace("post_feedforward_layernorm", "mlp")
        return path if name_of(self.name) in LIKE_T5 else path.replace("fc2", "fc1")

    def down(self, site: str, layer: int) -> str:
        """The linear map that reads the neurons of an MLP."""
        path = self.place(site, layer).path
        if name_of(self.name) == "t5gemma":
            return f"{self.mlp(site, layer)}.down_proj"
        return f"{path}.wo" if name_of(self.name) in LIKE_T5 else path

    def activations(self, site: str, layer: int, x: Tensor) -> Tensor:
        """[token, neuron]: what an MLP's last map reads, without hooks."""
        module = self.module(self.mlp(site, layer))
        if name_of(self.name) == "t5gemma":
            opened = module.act_fn(module.gate_proj.forward(x))
            return multiply_gate(module, opened, module.up_proj.forward(x))
        if name_of(self.name) not in LIKE_T5:
            block = self.module(self.mlp(site, layer).rpartition(".")[0])
            return block.activation_fn(module.forward(x))
        if hasattr(module, "wi"):
            return module.act(module.wi.forward(x))
        return multiply_gate(module, module.act(module.wi_0.forward(x)), module.wi_1.forward(x))

    def neurons(self, site: str, layer: int) -> int:
        """The number of an MLP's neurons that are nodes; 0 for other sublayers."""
        component, _, stack = site.partition(" ")
        return self.split.get((stack, layer), 0) if component == "mlp_out" else 0

    def sublayers(self, stack: str) -> Iterator[tuple[str, int]]:
        for layer in range(self.encoder_layers if stack else self.layers):
            yield f"z {stack}".strip(), layer
            if not stack:
                yield "z cross", layer
            yield f"mlp_out {stack}".strip(), layer


@cache
def doubled(make: Callable[[str], Any], name: str, *sizes: int) -> Family:
    """A model of a family; sizes: layers and heads of the decoder and of the encoder."""
    layers, encoder_layers, heads, encoder_heads = sizes
    return Family(
        name, copy.deepcopy(make(name)).double(), layers, encoder_layers, heads, encoder_heads
    )


def list_neurons(family: Family, site: str, layer: int) -> list[Node]:
    """The neurons of an MLP that are nodes."""
    of = site.replace("mlp_out", "mlp_hidden")
    return [(of, layer, n) for n in range(family.neurons(site, layer))]


def list_features(family: Family, site: str, layer: int) -> list[Node]:
    """The features of an MLP that are nodes."""
    found = family.features.get((site, layer))
    return [] if found is None else [("feature", layer, n) for n in found.numbers]


def senders_of(family: Family, site: str, layer: int) -> list[Node]:
    if family.neurons(site, layer):
        return list_neurons(family, site, layer)
    if site.startswith("mlp_out"):
        return [*list_features(family, site, layer), (site, layer, 0)]
    return [(site, layer, head) for head in range(family.count(site.partition(" ")[2]))]


def receivers_of(family: Family, site: str, layer: int) -> list[Node]:
    """The receivers of a sublayer in its own stream."""
    component, _, stack = site.partition(" ")
    if family.neurons(site, layer):
        return list_neurons(family, site, layer)
    if component == "mlp_out":
        return [
            *list_features(family, site, layer),
            (f"mlp_norm {stack}".strip(), layer, 0),
        ]
    words = "q" if stack == "cross" else "qkv"
    heads = range(family.count(stack))
    return [(f"{word} {stack}".strip(), layer, head) for word in words for head in heads]


def list_edges(family: Family) -> list[Edge]:
    """All edges: in each stream, from every sender to the receivers after it."""
    found: list[Edge] = []
    for stack in ("encoder", ""):
        before = [ENCODED if stack else EMBED]
        for site, layer in family.sublayers(stack):
            found += [(of, to) for to in receivers_of(family, site, layer) for of in before]
            before += senders_of(family, site, layer)
        ends = [LOGITS]
        if stack:
            heads = range(family.heads)
            words, layers = ("k cross", "v cross"), range(family.layers)
            ends = [(word, layer, head) for layer in layers for word in words for head in heads]
        found += [(of, to) for to in ends for of in before]
    return found


@dataclass
class Pass:
    """What the hooks of a pass know: the outputs of senders so far, and what edges carry."""

    family: Family
    fills: Mapping[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    shares: Mapping[Edge, Tensor] = field(default_factory=dict[Edge, Tensor])
    """By ablated edge, [token, 1] 1 at the tokens where it is ablated."""
    given: dict[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    """[token, width] by sender."""
    moved: Mapping[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    """Instead of fill - output, of `shares` of edges."""
    shifts: Mapping[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    """[token, width] added to the outputs of senders."""

    def keep(self, sender: Node, value: Tensor) -> Tensor:
        """Keep the output of a sender; returns it."""
        self.given[sender] = value + self.shifts.get(sender, 0)
        return self.given[sender]

    def carried(self, sender: Node, receiver: Node | None) -> Tensor:
        value = self.given[sender]
        share = None if receiver is None else self.shares.get((sender, receiver))
        if share is None:
            return value
        change = self.moved[sender] if self.moved else self.fills[sender] - value
        return value + share * change

    def seen(self, stack: str, receiver: Node, sublayers: int) -> Tensor:
        """[token, width]: the stream that a receiver reads after some sublayers."""
        family = self.family
        x = self.carried(ENCODED if stack else EMBED, receiver)
        for site, layer in [*family.sublayers(stack)][:sublayers]:
            added = sum(self.carried(of, receiver) for of in senders_of(family, site, layer))
            assert isinstance(added, Tensor)
            if site.startswith("z") or family.neurons(site, layer):
                path = family.place(site, layer).path
                path = path if site.startswith("z") else family.down(site, layer)
                bias = family.module(path).bias
                added = added if bias is None else added + bias * family.scale(site, layer)
                norm = family.output_norm(site, layer)
                added = family.module(norm).forward(added) if norm else added
            x = x + added
            if family.after(stack):
                x = family.module(family.norm(site, layer)).forward(x)
        return x

    def read(self, stack: str, receiver: Node, number: int, norm: str) -> Tensor:
        """[token, width]: what a receiver reads, after the norm before it."""
        x = self.seen(stack, receiver, number)
        return x if self.family.after(stack) or not norm else self.family.module(norm).forward(x)


@contextmanager
def hooked(work: Pass) -> Generator[None]:
    """Replace the inputs of all receivers, and keep the outputs of all senders."""
    family, handles = work.family, list[Any]()

    def before(path: str, act: Callable[[Tensor], Tensor]) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (act(args[0][0])[None], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"][0])[None]}

        handles.append(family.module(path).register_forward_pre_hook(hook, with_kwargs=True))

    def after(path: str, act: Callable[[Tensor], Tensor]) -> None:
        def hook(_: Any, args: Any, output: Tensor) -> Tensor:
            return act(output[0])[None]

        handles.append(family.module(path).register_forward_hook(hook))

    for stack in ("encoder", ""):
        first = family.place(f"resid_pre {stack}".strip(), 0).path
        before(first, lambda x, stack=stack: work.keep(ENCODED if stack else EMBED, x))
        for number, (site, layer) in enumerate(family.sublayers(stack)):
            norm = family.norm(site, layer)
            if family.neurons(site, layer):
                given = (site, layer, stack, number, norm)
                path = family.down(site, layer)
                before(path, lambda _, given=given: _keep_neurons(work, *given))
                continue
            if list_features(family, site, layer):
                given = (site, layer, stack, number, norm)
                output = family.place(site, layer).path
                after(output, lambda _, given=given: _keep_features(work, *given))
                continue
            if site.startswith("mlp_out"):
                to = (site.replace("out", "norm"), layer, 0)
                given = (stack, to, number, norm)
                before(family.mlp(site, layer), lambda _, given=given: work.read(*given))
                output = family.place(site, layer).path
                after(output, lambda x, site=site, layer=layer: _keep_mlp(work, site, layer, x))
                continue
            own = site.partition(" ")[2]
            for word in "q" if own == "cross" else "qkv":
                _project(after, work, f"{word} {own}".strip(), layer, (stack, number, norm))
            path = family.place(site, layer).path
            before(path, lambda z, site=site, layer=layer: _keep_heads(work, site, layer, z))
    count = len([*family.sublayers("encoder")])
    for layer in range(family.layers):
        for word in ("k cross", "v cross"):
            _project(after, work, word, layer, ("encoder", count, family.end("encoder")))
    count, end = len([*family.sublayers("")]), family.end("")
    last = end or family.norm("mlp_out", family.layers - 1)
    after(last, lambda _: work.read("", LOGITS, count, end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _project(after: Any, work: Pass, site: str, layer: int, given: tuple[str, int, str]) -> None:
    """Compute queries, keys or values, each head from a separate input."""
    family, (stack, number, norm) = work.family, given
    path = family.place(site, layer).path
    module, count = family.module(path), family.count(site.partition(" ")[2])

    def act(plain: Tensor) -> Tensor:
        heads: list[Tensor] = []
        for head in range(count):
            x = work.read(stack, (site, layer, head), number, norm)
            heads.append(module.forward(x).unflatten(-1, (count, -1))[:, head])
        assert plain.shape[-1] == heads[0].shape[-1] * count
        return torch.cat(heads, -1)

    after(path, act)


def _keep_mlp(work: Pass, site: str, layer: int, x: Tensor) -> Tensor:
    scale = work.family.scale(site, layer)
    return work.keep((site, layer, 0), x * scale) / scale


def _keep_neurons(work: Pass, site: str, layer: int, stack: str, number: int, norm: str) -> Tensor:
    """[token, neuron]: each neuron from a separate input."""
    family, found = work.family, list[Tensor]()
    weight, scale = family.module(family.down(site, layer)).weight, family.scale(site, layer)
    for node in list_neurons(family, site, layer):
        x = work.read(stack, node, number, norm)
        found.append(family.activations(site, layer, x)[:, node[2]])
        work.keep(node, found[-1][:, None] * weight[:, node[2]] * scale)
    return torch.stack(found, -1)


def _keep_features(work: Pass, site: str, layer: int, stack: str, number: int, norm: str) -> Tensor:
    """[token, width]: the sum of features and of the rest, each from a separate input."""
    own = work.family.features[site, layer]
    module = work.family.module(work.family.place(site, layer).path)

    for number_of, node in enumerate(list_features(work.family, site, layer)):
        x = work.read(stack, node, number, norm)
        work.keep(node, own.parts(x, module.forward(x))[number_of])
    x = work.read(stack, (site.replace("out", "norm"), layer, 0), number, norm)
    outputs = module.forward(x)
    work.keep((site, layer, 0), outputs - torch.stack(own.parts(x, outputs)).sum(0))
    return outputs


def _keep_heads(work: Pass, site: str, layer: int, z: Tensor) -> Tensor:
    weight = work.family.module(work.family.place(site, layer).path).weight
    every = senders_of(work.family, site, layer)
    width = z.shape[-1] // len(every)
    for of in every:
        own = slice(of[2] * width, (of[2] + 1) * width)
        work.keep(of, z[:, own] @ weight[:, own].T * work.family.scale(site, layer))
    return z


def run(work: Pass, inputs: Mapping[str, Tensor]) -> Tensor:
    """[token of the decoder, vocab] logits."""
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with hooked(work):
        return work.family.model(**given, use_cache=False).logits[0]


def at_tokens(
    edges: Collection[Edge], encoder: Sequence[int], decoder: Sequence[int], sizes: tuple[int, int]
) -> dict[Edge, Tensor]:
    """Shares of edges that are ablated at some tokens of the encoder and of the decoder."""
    found: dict[Edge, Tensor] = {}
    for edge in edges:
        encodes = edge[0][0].endswith("encoder")
        share = torch.zeros(sizes[0] if encodes else sizes[1], 1).double()
        share[list(encoder if encodes else decoder)] = 1
        found[edge] = share
    return found
