"""Circuits of vision encoders of prompts, against a pass of the bare model in double precision in
which plain hooks give each receiver a separate sum of senders: one unpadded prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run.panel import execute
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.resolve.circuit_files import VISION_EMBEDDING, VISION_END
from mechdsl.resolve.circuits import AskedCircuits, EdgeGraph, draw_circuits
from mechdsl.resolve.types import SitePoint
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports import graph
from mechdsl.show.reports.circuit_layout import list_edges as list_drawn_edges
from mechdsl.store.store import Store

from ..execute.support import check_file, context, run_on
from ..quick import some
from .support import experiment, succeeded
from .test_encoder_paths import tower
from .test_families import (
    ALL,
    BLOCK,
    bare,
    difference,
    draw,
    folder,
    inputs,
    layout_of,
    loaded,
    run_text,
)
from .test_token_patches import HEADS, LAYERS, WIDTH, Tower, other

Node = tuple[str, int, int]
"""A site without the word `vision`, its layer, and its head or 0."""

Edge = tuple[Node, Node]

EMBED, END = ("embed", 0, 0), ("end", 0, 0)
NAMES = (
    "llava_class",
    "paligemma",
    "gemma3",
    "idefics3",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "llava_next",
    "video_llava",
    "smolvlm",
    "idefics2_wide",
)
QUICK = ("llava_class", "qwen2_5_vl")


@dataclass(frozen=True)
class Encoder:
    """The modules of a vision encoder."""

    blocks: str
    attention: str
    output: str
    """The map from all heads to the stream."""
    mlp: str
    norms: tuple[str, str]
    end: str
    """The norm that the projector reads; empty if it reads the last block."""
    scales: tuple[str, str] = ("", "")
    """Parameters of a block that multiply the outputs of attention and MLP."""


def encoder(name: str) -> Encoder:
    own = Tower() if name == "llava_onevision" else tower(name)
    norms, end, scales = ("layer_norm1", "layer_norm2"), "", ("", "")
    if name == "internvl":
        norms, scales = ("layernorm_before", "layernorm_after"), ("lambda_1", "lambda_2")
    elif name.startswith("qwen"):
        norms = "norm1", "norm2"
    elif "llava" not in name:
        end = f"{own.blocks.removesuffix('.encoder.layers')}.post_layernorm"
    return Encoder(own.blocks, own.attention, own.z, own.mlp, norms, end, scales)


@cache
def doubled(name: str) -> Any:
    return deepcopy(bare(name).model).double()


def list_edges(layers: int = LAYERS) -> list[Edge]:
    """Every edge of an encoder."""
    found, before = list[Edge](), [EMBED]
    for layer in range(layers):
        heads = range(HEADS)
        read = [(site, layer, head) for site in ("q", "k", "v") for head in heads]
        found += [(of, to) for of in before for to in read]
        before += [("z", layer, head) for head in heads]
        found += [(of, ("mlp_norm", layer, 0)) for of in before]
        before.append(("mlp_out", layer, 0))
    return found + [(of, END) for of in before]


@dataclass
class Pass:
    """The outputs of senders in a pass so far, and what ablated edges carry."""

    name: str
    fills: Mapping[Node, Tensor] = field(default_factory=dict[Node, Tensor])
    """[token, width] by sender."""
    ablated: Collection[Edge] = ()
    tokens: Sequence[int] = ()
    """Those at which edges are ablated."""
    given: dict[Node, Tensor] = field(default_factory=dict[Node, Tensor])

    @property
    def encoder(self) -> Encoder:
        return encoder(self.name)

    @property
    def model(self) -> Any:
        return doubled(self.name)

    def module(self, path: str) -> Any:
        return self.model.get_submodule(path)

    def scale(self, layer: int, sublayer: int) -> Any:
        own = self.encoder
        path = own.scales[sublayer]
        return getattr(self.module(f"{own.blocks}.{layer}"), path) if path else 1

    def carried(self, sender: Node, receiver: Node) -> Tensor:
        value = self.given[sender]
        if (sender, receiver) not in self.ablated:
            return value
        value = value.clone()
        value[[*self.tokens]] = self.fills[sender][[*self.tokens]]
        return value

    def seen(self, receiver: Node, sublayers: int) -> Tensor:
        """[token, width]: the stream that a receiver reads after some sublayers."""
        own, x = self.encoder, self.carried(EMBED, receiver)
        for number in range(sublayers):
            layer, is_mlp = divmod(number, 2)
            if is_mlp:
                x = x + self.carried(("mlp_out", layer, 0), receiver)
                continue
            bias = self.module(f"{own.blocks}.{layer}.{own.output}").bias
            for head in range(HEADS):
                x = x + self.carried(("z", layer, head), receiver)
            x = x if bias is None else x + bias * self.scale(layer, 0)
        return x

    def keep_heads(self, layer: int, z: Tensor) -> None:
        own, size = self.encoder, WIDTH // HEADS
        weight = self.module(f"{own.blocks}.{layer}.{own.output}").weight
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            self.given["z", layer, head] = z[:, part] @ weight[:, part].T * self.scale(layer, 0)

    def project(self, path: str, layer: int, sites: str) -> Tensor:
        """[token, out]: queries, keys or values, each head from a separate input."""
        own, size, parts = self.encoder, WIDTH // HEADS, list[Tensor]()
        norm, module = self.module(f"{own.blocks}.{layer}.{own.norms[0]}"), self.module(path)
        for number, site in enumerate(sites):
            for head in range(HEADS):
                x = norm.forward(self.seen((site, layer, head), 2 * layer))
                first = (number * HEADS + head) * size
                parts.append(module.forward(x)[:, first : first + size])
        return torch.cat(parts, -1)


@contextmanager
def hooked(work: Pass) -> Generator[None]:
    """Replace the inputs of all receivers, and keep the outputs of all senders."""
    own, handles = work.encoder, list[Any]()

    def before(path: str, act: Callable[[Tensor], Tensor]) -> None:
        def hook(_: Any, args: Any) -> Any:
            return act(args[0].flatten(0, -2)).view(args[0].shape), *args[1:]

        handles.append(work.module(path).register_forward_pre_hook(hook))

    def after(path: str, act: Callable[[Tensor], Tensor]) -> None:
        def hook(_: Any, args: Any, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            changed = act(value.flatten(0, -2)).view(value.shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        # Before the library's hooks, which collect the outputs of blocks.
        handles.append(work.module(path).register_forward_hook(hook, prepend=True))

    def keep(sender: Node, value: Tensor) -> Tensor:
        work.given[sender] = value
        return value

    before(f"{own.blocks}.0", lambda x: keep(EMBED, x))
    for layer in range(LAYERS):
        block = f"{own.blocks}.{layer}"
        if own.attention == "attn":
            path = f"{block}.attn.qkv"
            after(path, lambda _, path=path, layer=layer: work.project(path, layer, "qkv"))
        else:
            for site in "qkv":
                path = f"{block}.{own.attention}.{site}_proj"
                after(path, lambda _, path=path, n=layer, s=site: work.project(path, n, s))

        def heads(z: Tensor, layer: int = layer) -> Tensor:
            work.keep_heads(layer, z)
            return z

        def read(_: Tensor, layer: int = layer, block: str = block) -> Tensor:
            norm = work.module(f"{block}.{own.norms[1]}")
            return norm.forward(work.seen(("mlp_norm", layer, 0), 2 * layer + 1))

        def sent(x: Tensor, layer: int = layer) -> Tensor:
            keep(("mlp_out", layer, 0), x * work.scale(layer, 1))
            return x

        before(f"{block}.{own.output}", heads)
        before(f"{block}.{own.mlp}", read)
        after(f"{block}.{own.mlp}", sent)
    if own.end:
        before(own.end, lambda _: work.seen(END, 2 * LAYERS))
    else:
        after(f"{own.blocks}.{LAYERS - 1}", lambda _: work.seen(END, 2 * LAYERS))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_inputs(work: Pass, inputs: Mapping[str, Tensor]) -> float:
    """The measure of a prompt."""
    given = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with hooked(work):
        return difference(doubled(work.name)(**given).logits[0])


def run(work: Pass, n: int, image: int) -> float:
    """The measure of a prompt with an image."""
    return run_inputs(work, inputs(work.name, n, image))


@cache
def sent(name: str, n: int, image: int) -> Mapping[Node, Tensor]:
    """The outputs of all senders in a pass without ablated edges."""
    work = Pass(name)
    run(work, n, image)
    return work.given


@dataclass(frozen=True)
class Case:
    """A rule, with the tokens where it acts and the fills of a prompt with its other image."""

    rule: str
    tokens: Callable[[str, int], list[int]]
    """(family, image) → tokens of the encoder."""
    fill: Callable[[str, int, list[int]], Mapping[Node, Tensor]]
    """(family, prompt, tokens) → [token, width] by sender."""


def zeros(name: str, n: int, tokens: list[int]) -> Mapping[Node, Tensor]:
    return {node: torch.zeros_like(own) for node, own in sent(name, n, other(n)).items()}


def of_clean(name: str, n: int, tokens: list[int]) -> Mapping[Node, Tensor]:
    """The values of the run with the prompt's image at the cells of `CELLS`."""
    return {
        node: placed(own, tokens, sent(name, n, n)[node][cells(name, n)])
        for node, own in sent(name, n, other(n)).items()
    }


def means(name: str, n: int, tokens: list[int]) -> Mapping[Node, Tensor]:
    """The mean over prompts of the clean run at each of the patches of one token."""
    return {
        node: placed(
            own,
            tokens,
            torch.stack([sent(name, m, m)[node][tower(name).cell(m, 1, 2)] for m in ALL]).mean(0),
        )
        for node, own in sent(name, n, other(n)).items()
    }


def placed(like: Tensor, tokens: list[int], values: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    found[tokens] = values
    return found


def cells(name: str, image: int) -> list[int]:
    own = tower(name)
    return [*own.cell(image, 1, 1), *own.cell(image, 1, 2)]


BOTH = "{photo row 1 col 1 token, photo row 1 col 2 token}"
CIRCUIT: list[Edge] = [
    (EMBED, ("v", 0, 1)),
    (EMBED, ("k", 1, 0)),
    (("z", 0, 1), ("q", 1, 0)),
    (("z", 0, 0), ("v", 1, 1)),
    (("z", 0, 1), ("mlp_norm", 0, 0)),
    (("mlp_out", 0, 0), ("k", 1, 1)),
    (("mlp_out", 0, 0), ("mlp_norm", 1, 0)),
    (("z", 1, 0), END),
    (("mlp_out", 0, 0), END),
]
CASES = (
    Case("ablate c at photo tokens with zero", lambda name, n: tower(name).every(n), zeros),
    Case("ablate all but c at photo tokens with zero", lambda name, n: tower(name).every(n), zeros),
    Case(f"ablate c at {BOTH} with clean", cells, of_clean),
    Case(f"ablate all but c at {BOTH} with clean", cells, of_clean),
    Case(
        "ablate all but c at photo row 1 col 2 token with mean of clean",
        lambda name, n: tower(name).cell(n, 1, 2),
        means,
    ),
)


def spelled(node: Node) -> str:
    site, layer, head = node
    if node in (EMBED, END):
        return "embed vision" if node == EMBED else "embed"
    unit = f" head {head}" if len(site) == 1 else ""
    return f"{site} vision layer {layer}{unit}"


def written(edges: Iterable[Edge], name: str = "c") -> str:
    return f"circuit {name} = " + ", ".join(f"{spelled(of)} -> {spelled(to)}" for of, to in edges)


def expected(name: str, case: Case, edges: Collection[Edge]) -> list[float]:
    """The measure of each prompt with its other image."""
    ablated, values = {*edges}, list[float]()
    if "all but" in case.rule:
        ablated = {*list_edges()} - ablated
    for n in ALL:
        tokens = case.tokens(name, other(n))
        work = Pass(name, case.fill(name, n, tokens), ablated, tokens)
        values.append(run(work, n, other(n)))
    return values


def check(found: ExperimentResult, values: Sequence[float], rule: str) -> None:
    measure = found.measures[0]
    np.testing.assert_allclose(measure.patched[0], values, atol=1e-4, err_msg=rule)
    assert np.abs(measure.patched - measure.base).max() > 0.01, rule


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_circuits_of_vision_encoders_equal_hooks(name: str, mode: str) -> None:
    """Fills by 0, by a run and by means, at all patches and at those of single tokens."""
    text = written(CIRCUIT) + "\n"
    text += "".join(
        experiment(f"e{n}", "from clean into changed", case.rule) for n, case in enumerate(CASES)
    )
    for found, case in zip(run_text(name, text, mode), CASES, strict=True):
        check(found, expected(name, case, CIRCUIT), case.rule)


# --- other circuits -------------------------------------------------------------------------------


def errors(name: str, text: str) -> list[Diagnostic]:
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "f.mech")
    found = check_source(source, models={"m": context(source, "m", loaded(name))})
    return [each for each in found.diagnostics if each.severity == "error"]


def test_rule_on_a_sender_changes_what_its_edges_carry() -> None:
    """A head is doubled before its edges are ablated, and a block of the language model changes."""
    name, layer = "paligemma", 1
    shift = experiment(
        "e",
        "from clean into changed",
        "scale z vision layer 0 head 1 at photo tokens by 2",
        "ablate c at photo tokens with zero",
        f"ablate resid_post layer {layer} at photo row 1 col 1 token with zero",
    )
    [found], values = run_text(name, f"{written(CIRCUIT)}\n{shift}"), list[float]()
    for n in ALL:
        image, tokens = other(n), tower(name).every(other(n))

        def change(_: Any, args: Any, output: Any, image: int = image, n: int = n) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            value = value.clone()
            value[:, layout_of(name, n, image).cells[0].position] = 0
            return (value, *output[1:]) if isinstance(output, tuple) else value

        work = Doubled(name, zeros(name, n, tokens), {*CIRCUIT}, tokens)
        block = doubled(name).model.language_model.layers[layer]
        handle = block.register_forward_hook(change)
        values.append(run(work, n, image))
        handle.remove()
    check(found, values, "scale")


class Doubled(Pass):
    """A pass in which the outputs of a head are doubled."""

    def keep_heads(self, layer: int, z: Tensor) -> None:
        super().keep_heads(layer, z)
        if layer == 0:
            self.given["z", 0, 1] = 2 * self.given["z", 0, 1]


def test_edge_is_part_of_the_key_of_a_row(tmp_path: Path) -> None:
    """Two files with one store, whose circuits differ in an edge."""
    name, case, fewer = "llava_class", CASES[1], CIRCUIT[:-1]
    for edges in (CIRCUIT, fewer, CIRCUIT):
        text = written(edges) + "\n" + experiment("e", "from clean into changed", case.rule)
        source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{text}', folder() / "f.mech")
        with Store(tmp_path) as kept, kept.begin(text, {}) as opened:
            done = run_on(source, {"m": loaded(name)}, run=opened)
        [found] = succeeded(*done).values()
        check(found, expected(name, case, edges), str(len(edges)))


@pytest.mark.parametrize("name", some(("llava_class", "qwen2_5_vl"), ("llava_class",)))
def test_effects_of_a_circuit_of_an_encoder_equal_hooks(name: str) -> None:
    """Faithfulness, completeness, and the circuit without each of its edges."""
    edges, measure = CIRCUIT[-3:], "measure logit(answer) - logit(wrong) as"
    text = written(edges) + "\n"
    for number, (rule, effect) in enumerate(
        (
            ("ablate all but c", "faithfulness"),
            ("ablate c", "completeness"),
            ("ablate all but c without each edge", "minimality"),
        )
    ):
        lines = "from clean into changed", f"{rule} at photo tokens with zero"
        text += experiment(f"e{number}", *lines, measure=f"{measure} {effect}")
    faithful, complete, minimal = (found.measures[0] for found in run_text(name, text))
    kept, empty = (expected(name, CASES[1], own) for own in (edges, ()))
    without = expected(name, CASES[0], edges)
    np.testing.assert_allclose(faithful.patched[0], kept, atol=1e-4)
    np.testing.assert_allclose(complete.patched[0], without, atol=1e-4)
    for own in (faithful, complete):
        assert own.source is not None
        np.testing.assert_allclose(own.source[0], empty, atol=1e-4)
    assert len(minimal.patched) == len(edges)
    order = [edge for edge in list_edges() if edge in edges]
    for values, left in zip(minimal.patched, order, strict=True):
        own = expected(name, CASES[1], [edge for edge in edges if edge != left])
        np.testing.assert_allclose(values, own, atol=1e-4)


def test_random_circuits_lead_from_the_patches_to_the_projector() -> None:
    name, case = "llava_class", CASES[1]
    edges = [(EMBED, ("v", 1, 0)), (("z", 1, 0), END)]
    rule = experiment("e", "from clean into changed", case.rule, "against random(4)")
    [found] = run_text(name, f"{written(edges)}\n{rule}")
    check(found, expected(name, case, edges), case.rule)
    of, to = SitePoint("z vision", 1, 0), SitePoint("v vision", 1, 0)
    own = frozenset(((VISION_EMBEDDING, to), (of, VISION_END)))
    asked = AskedCircuits(loaded(name).shape, own, 0, 30, stack="vision")
    drawn = draw_circuits(asked)
    graph = EdgeGraph(loaded(name).shape, stack="vision")
    assert drawn.is_connected
    assert len({*graph.every}) == len(list_edges())
    for each in drawn.circuits:
        assert len(each) == 2
        assert graph.covers([edge for edge in each if isinstance(edge, tuple)])
    reading = str(found.conventions["circuit"])
    assert "each MLP and the projector read the stream" in reading
    assert "`embed`" not in reading
    controls = str(found.conventions["controls"])
    assert (
        "of 2 edges, each on a path from `embed vision` to `embed`, at the same tokens" in controls
    )


@pytest.mark.parametrize("name", some(("paligemma", "qwen2_5_vl"), ("paligemma",)))
def test_graph_json_of_an_encoder_is_read_as_the_same_circuit(name: str, tmp_path: Path) -> None:
    lines = ("from clean into changed", CASES[1].rule, "report graph")
    [own] = run_text(name, f"{written(CIRCUIT)}\n{experiment('e', *lines)}")
    graph.save(own, own.reports[0], tmp_path / "c.json")
    saved = f'circuit c = saved("{(tmp_path / "c.json").as_posix()}")\n{experiment("e", *lines)}'
    [found] = run_text(name, saved)
    assert own.circuit is not None
    assert found.circuit is not None
    assert {*found.circuit.edges} == {*own.circuit.edges}
    assert found.circuit.total == len(list_edges())
    np.testing.assert_array_equal(found.measures[0].patched, own.measures[0].patched)
    drawn = list_drawn_edges(own.circuit, None)
    ends = {end.title: end for edge in drawn for end in (edge.sender, edge.receiver)}
    order = [
        "embed vision",
        "vision L0H0",
        "vision L0 MLP",
        "vision L1H0",
        "vision L1 MLP",
        "embed",
    ]
    assert [ends[title].level for title in order] == sorted(ends[title].level for title in order)


def test_circuit_ends_at_the_block_that_the_language_model_reads() -> None:
    """LLaVA's default leaves out the last block, whose components have no edges."""
    name = "llava_class"
    made, found = adopt_model("m", draw(name, vision_feature_layer=-2), bare(name).processor)
    assert made is not None, found
    edges = [(EMBED, ("v", 0, 1)), (("mlp_out", 0, 0), END)]
    rule = experiment("e", "from clean into changed", "ablate c at photo tokens with zero")
    [result] = run_text(name, f"{written(edges)}\n{rule}", model=made)
    assert result.circuit is not None
    assert result.circuit.total == len(list_edges(1))
    later = f"{written([(EMBED, ('v', 1, 0))])}\n{rule}"
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{later}', folder() / "f.mech")
    checked = check_source(source, models={"m": context(source, "m", made)})
    [problem] = [each for each in checked.diagnostics if each.severity == "error"]
    assert problem.code == "E0335"
    assert "the language model reads the vision encoder after block 0" in problem.label_text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_planned_cost_is_near_the_counted_products(name: str) -> None:
    text = f"{written(CIRCUIT)}\n{experiment('e', 'from clean into changed', CASES[1].rule)}"
    plan = make_plan(check_file(text, folder(), loaded(name), BLOCK).experiments)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2


# --- errors ---------------------------------------------------------------------------------------

Z = "z vision layer 0 head 1 -> q vision layer 1 head 0"
REJECTED = {
    "both stacks": (f"{Z}, embed -> L0H1.q", "E0108", "vision encoder and of the language model"),
    "position": (f"{Z} at photo row 1 col 2 token", "E0108", "the vision encoder at a position"),
    "neuron": ("mlp_hidden vision layer 0 neuron 3 -> embed", "E0108", "a neuron or feature of"),
    "text": ("z vision layer 0 head 1 -> L1H0.q", "E0335", "the vision encoder only at `embed`"),
    "images": ("embed -> q vision layer 1 head 0", "E0335", "which don't depend on the text"),
    "end": ("embed -> embed", "E0335", "which don't depend on the text"),
    "logits": ("mlp_out vision layer 1 -> logits", "E0335", "the vision encoder only at `embed`"),
    "earlier": ("z vision layer 1 head 0 -> q vision layer 0 head 0", "E0335", "before or at"),
    "norm": ("embed vision -> attn_norm vision layer 0", "E0334", "isn't an input"),
    "stream": ("resid_post vision layer 0 -> embed", "E0334", "as one of the components"),
}


@pytest.mark.parametrize("key", REJECTED)
def test_edges_that_an_encoder_does_not_have_report_an_error(key: str) -> None:
    edge, code, reason = REJECTED[key]
    rule = experiment("e", "ablate c at photo tokens with zero")
    [found] = errors("llava_class", f"circuit c = {edge}\n{rule}")
    assert found.code == code
    assert reason in f"{found.message}: {found.label_text}"
    assert found.help_text


@pytest.mark.parametrize("receiver", ["q vision layer 1 head 0", "embed"])
def test_embed_with_a_receiver_in_the_encoder_suggests_the_patches(receiver: str) -> None:
    rule = experiment("e", "ablate c at photo tokens with zero")
    [found] = errors("llava_class", f"circuit c = embed -> {receiver}\n{rule}")
    suggested = f"embed vision -> {receiver}"
    assert found.help_text is not None
    assert found.help_text.endswith(f"; or start at the patches: `{suggested}`")
    assert not errors("llava_class", f"circuit c = {suggested}\n{rule}")


@pytest.mark.parametrize("edge", ["z vision layer 0 head 1 -> L1H0.q", "z layer 0 head 0 -> embed"])
def test_only_embed_suggests_the_patches(edge: str) -> None:
    rule = experiment("e", "ablate c at photo tokens with zero")
    [found] = errors("llava_class", f"circuit c = {edge}\n{rule}")
    assert found.code == "E0335"
    assert "embed vision" not in str(found.help_text)


OTHERS = {
    "path": ("path z vision layer 0 head 0 -> q vision layer 1 head 0 at photo tokens", "a `path`"),
    "language path": ("path z layer 0 head 0 -> q layer 1 head 0 at last token", "`path`"),
    "blocks": ("replace block vision layer 1 with identity", "`replace block`"),
    "circuit": ("ablate d at photo tokens with zero", "a second rule that ablates edges"),
}


@pytest.mark.parametrize("key", OTHERS)
def test_rules_that_do_not_act_with_a_circuit_of_an_encoder_are_errors(key: str) -> None:
    rule, reason = OTHERS[key]
    text = f"circuit c = {Z}\ncircuit d = embed vision -> embed\ncircuit t = embed -> logits\n"
    text += experiment("e", "from clean into changed", "ablate c at photo tokens with zero", rule)
    found = errors("llava_class", text)
    assert {each.code for each in found} == {"E0108"}
    assert any(reason in each.message for each in found)


VISION_LINES = (
    "ablate c at photo tokens with zero",
    "scale z vision layer 0 head 0 at photo tokens by 0",
    "observe norm resid_post vision layer 1 at photo tokens as size",
)
LANGUAGE_LINES = {
    "ablate t at last token with zero": "a circuit",
    "path z layer 0 head 0 -> q layer 1 head 0 at last token": "a `path`",
    "path z layer 0 head 0 -> attn_norm layer 1 at last token with frozen norms": "a `path`",
}


@pytest.mark.parametrize("line", VISION_LINES)
@pytest.mark.parametrize("rule", LANGUAGE_LINES)
@pytest.mark.parametrize("is_first", [True, False])
def test_edges_of_the_language_model_with_sites_of_the_encoder_are_one_error(
    rule: str, line: str, *, is_first: bool
) -> None:
    lines = (rule, line) if is_first else (line, rule)
    text = f"circuit c = {Z}\ncircuit t = embed -> logits\n"
    [found] = errors("llava_class", text + experiment("e", "from clean into changed", *lines))
    assert found.code == "E0108"
    what = f"{LANGUAGE_LINES[rule]} of the language model together with sites in the vision encoder"
    assert found.message.startswith(what)
    assert found.help_text == "write an experiment for each"


def test_file_with_edges_of_both_stacks_is_an_error(tmp_path: Path) -> None:
    edges = [Z, "embed -> logits"]
    (tmp_path / "c.json").write_text(json.dumps({"edges": edges}), encoding="utf-8")
    saved = f'circuit c = saved("{(tmp_path / "c.json").as_posix()}")\n'
    rule = experiment("e", "ablate c at photo tokens with zero")
    [found] = errors("llava_class", saved + rule)
    assert found.code == "E0342"
    assert "has edges of the vision encoder and of the language model" in found.message


def test_circuit_of_an_encoder_is_checked_without_the_model() -> None:
    rule = experiment("e", "ablate all but c at photo tokens with zero", "against random(3)")
    text = f"{written(CIRCUIT)}\n{rule}"
    source = Source(f'mech 1\nmodel m = local("nowhere")\n{BLOCK}\n{text}', folder() / "f.mech")
    found = [each for each in check_source(source).diagnostics if each.severity == "error"]
    assert not found
