"""Circuits in models whose blocks attend to an image, against a graph of the bare model's maps: one
unpadded prompt at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.execute import mask_training
from mechdsl.execute.mask_training import MaskRows

from .support import BLOCK, MEASURE, RECORDS, experiment
from .test_attended_images import (
    CROSS,
    HEADS,
    IMAGE,
    LAYERS,
    WIDTH,
    bare,
    difference,
    folder,
    inputs,
    other,
    outputs,
    processor,
    run_text,
    token,
    try_text,
)

ALL = range(len(RECORDS))
FROM = "from clean into changed"
Node = tuple[str, int, int]
"""A sender: `embed`, `z`, `mlp`, its layer and head. A receiver: `q`, `k`, `v`, `mlp`, `logits`."""
EMBED, LOGITS = ("embed", -1, 0), ("logits", LAYERS, 0)
Ablated = Callable[[Node, Node], bool]


@dataclass(frozen=True)
class Given:
    """The tensors of a pass that don't depend on the stream of the text."""

    embedded: Tensor
    """[token, d_model]"""
    turned: tuple[Tensor, Tensor]
    """Cosines and sines of positions."""
    states: Tensor
    """[1, token of the image, d_model]"""
    hidden: Tensor
    """[token, token of the image] summands of scores."""
    reads: Tensor
    """[token, 1] 0 for tokens before the image."""


def late_inputs(n: int, image: int) -> dict[str, Any]:
    """The inputs of a prompt with words before the image."""
    picture, reader = Image.open(folder() / f"{image}.png").convert("RGB"), cast("Any", processor())
    text = f"how many {IMAGE} {RECORDS[n]['what']} are there ? answer :"
    return dict(reader(text=[text], images=[[picture]], return_tensors="pt"))


@cache
def given(n: int, image: int, *, late: bool) -> Given:
    from transformers.models.mllama import modeling_mllama

    made, model = late_inputs(n, image) if late else inputs(n, image), bare().model
    prepare: Any = vars(modeling_mllama)["_prepare_cross_attention_mask"]
    text = model.language_model
    with torch.no_grad():
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        seen = model.vision_model(**{name: made[name] for name in names}).last_hidden_state
        states = model.multi_modal_projector(seen).reshape(1, -1, HEADS * WIDTH)
        embedded = text.embed_tokens(made["input_ids"])
        positions = torch.arange(embedded.shape[1])[None]
        mask, reads = prepare(
            made["cross_attention_mask"], model.vision_model.num_patches, torch.float32
        )
        turned = text.rotary_emb(embedded, position_ids=positions)
    return Given(embedded[0], turned, states, mask[0, 0], reads[0, 0])


@torch.no_grad()
def run(
    n: int,
    image: int,
    ablated: Ablated = lambda of, to: False,
    fills: dict[Node, Tensor] | None = None,
    tokens: Collection[int] | None = None,
    shares: Mapping[tuple[Node, Node], Tensor] | None = None,
    *,
    late: bool = False,
) -> tuple[Tensor, dict[Node, Tensor]]:
    """Return [vocab] logits of the last token, and [token, d_model] of all senders.

    Args:
        ablated: Whether an edge carries the fill.
        fills: Of each sender; None for zeros.
        tokens: Tokens of receivers at which edges are ablated; None for all.
        shares: By how much edges carry the fill instead; autograd follows these.
        late: Whether words precede the image.
    """
    from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb

    own, layers = given(n, image, late=late), bare().model.language_model.layers
    nodes: dict[Node, Tensor] = {EMBED: own.embedded}
    count = len(own.embedded)
    here = torch.zeros(count, 1, dtype=torch.bool)
    here[list(range(count) if tokens is None else [t % count for t in tokens])] = True

    def stream(to: Node) -> Tensor:
        found = torch.zeros_like(own.embedded)
        for of, value in nodes.items():
            fill = torch.zeros_like(value) if fills is None else fills[of]
            found = found + (torch.where(here, fill, value) if ablated(of, to) else value)
            if shares is not None:
                found = found + shares[of, to] * (fill - value) * here
        return found

    for layer, block in enumerate(layers):
        crosses = layer in CROSS
        attention = block.cross_attn if crosses else block.self_attn
        shared = HEADS // attention.num_key_value_heads
        gates = [1.0, 1.0]
        if crosses:
            both = block.cross_attn_attn_gate, block.cross_attn_mlp_gate
            gates = [float(gate.tanh()) for gate in both]

        def project(site: str, head: int, map_: Any, norm: Any = block.input_layernorm) -> Tensor:
            vectors = norm(stream((site, layer, head)))  # noqa: B023
            return vectors @ map_.weight[head * WIDTH : (head + 1) * WIDTH].T

        added: dict[Node, Tensor] = {}
        for head in range(HEADS):
            of_key, query = head // shared, project("q", head, attention.q_proj)
            part = slice(of_key * WIDTH, (of_key + 1) * WIDTH)
            if crosses:
                query = attention.q_norm(query)
                key = attention.k_norm(own.states[0] @ attention.k_proj.weight[part].T)
                value = own.states[0] @ attention.v_proj.weight[part].T
                hidden = own.hidden
            else:
                key = project("k", of_key, attention.k_proj)
                value = project("v", of_key, attention.v_proj)
                query, key = (
                    each[0, 0]
                    for each in apply_rotary_pos_emb(
                        query[None, None], key[None, None], *own.turned
                    )
                )
                hidden = torch.full((count, count), -torch.inf).triu(1)
            weights = (query @ key.T * WIDTH**-0.5 + hidden).softmax(-1)
            columns = attention.o_proj.weight[:, head * WIDTH : (head + 1) * WIDTH]
            added["z", layer, head] = gates[0] * (weights @ value) @ columns.T
        nodes |= added
        out = gates[1] * block.mlp(block.post_attention_layernorm(stream(("mlp", layer, 0))))
        nodes["mlp", layer, 0] = out * own.reads if crosses else out
    final = bare().model.language_model.norm(stream(LOGITS))
    return bare().lm_head(final)[-1], nodes


def logit_difference(n: int, logits: Tensor) -> float:
    ids = [token(str(RECORDS[n][key])) for key in ("n", "m")]
    return float(logits[ids[0]] - logits[ids[1]])


def test_sum_of_nodes_is_the_stream_of_the_bare_model() -> None:
    """Nodes are the embedding, heads and MLPs, also those of blocks that attend to the image."""
    for n in ALL:
        logits, nodes = run(n, other(n))
        np.testing.assert_allclose(logit_difference(n, logits), difference(n, other(n)), atol=1e-4)
        states = outputs(n, other(n), output_hidden_states=True).hidden_states
        for layer in range(1, LAYERS):
            own = [value for (_, at, _), value in nodes.items() if at < layer]
            np.testing.assert_allclose(torch.stack(own).sum(0), states[layer][0], atol=1e-4)


def list_all() -> list[tuple[Node, Node]]:
    """List all edges, in forward order of receivers."""
    senders, found = [EMBED], list[tuple[Node, Node]]()
    for layer in range(LAYERS):
        inputs_ = [("q", layer, head) for head in range(HEADS)]
        if layer not in CROSS:
            keys = bare().model.language_model.layers[layer].self_attn.num_key_value_heads
            inputs_ += [(site, layer, head) for site in "kv" for head in range(keys)]
        found += [(of, to) for to in inputs_ for of in senders]
        senders += [("z", layer, head) for head in range(HEADS)]
        found += [(of, ("mlp", layer, 0)) for of in senders]
        senders.append(("mlp", layer, 0))
    return [*found, *((of, LOGITS) for of in senders)]


def spell(node: Node) -> str:
    site, layer, head = node
    if site in ("embed", "logits"):
        return site
    if site == "mlp":
        return f"L{layer}.mlp"
    return f"{site} {'cross ' if layer in CROSS else ''}layer {layer} head {head}"


def sample(share: float, seed: int) -> set[tuple[Node, Node]]:
    draws = np.random.default_rng(seed)
    return {edge for edge in list_all() if draws.random() < share}


def define(name: str, edges: Collection[tuple[Node, Node]]) -> str:
    listed = ",\n  ".join(f"{spell(of)} -> {spell(to)}" for of, to in sorted(edges))
    return f"circuit {name} = {listed}\n"


def check(rule: str, edges: set[tuple[Node, Node]], mode: str = "planned", **more: Any) -> None:
    """Compare the ablation of a circuit with the graph, whose effects have to exceed 0.1."""
    measured = experiment("e", FROM, rule, measure=MEASURE)
    [found] = run_text(define("c", edges) + measured, mode)
    keeps, clean = "all but" in rule, "with clean" in rule
    base, expected = list[float](), list[float]()
    for n in ALL:
        base.append(difference(n, other(n)))
        fills = run(n, n)[1] if clean else None

        def ablated(of: Node, to: Node) -> bool:
            return ((of, to) in edges) != keeps

        logits, _ = run(n, other(n), ablated, fills, **more)
        expected.append(logit_difference(n, logits))
    np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=2e-4)
    assert np.abs(np.array(expected) - base).max() > 0.1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("fill", ["zero", "clean"])
def test_circuit_alone_equals_the_graph_of_the_bare_model(share: float, fill: str) -> None:
    check(f"ablate all but c at tokens * with {fill}", sample(share, 1))


def test_ablated_edges_equal_the_graph_of_the_bare_model() -> None:
    check("ablate c at tokens * with clean", sample(0.3, 2))
    check("ablate c at last token with clean", sample(0.3, 3), tokens=[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["small passes", "plain"])
def test_circuit_in_other_passes_equals_the_graph(mode: str) -> None:
    check("ablate all but c at tokens * with clean", sample(0.5, 4), mode)


def test_edges_at_a_token_equal_the_graph_of_the_bare_model() -> None:
    """Edges into `logits` at the last token, and others at all tokens."""
    edges = {(("z", layer, 2), ("mlp", layer, 0)) for layer in range(LAYERS)}
    text = define("c", edges).rstrip() + ",\n  L2.mlp -> logits at last token\n"
    text += experiment("e", FROM, "ablate c at tokens * with clean", measure=MEASURE)
    [found] = run_text(text)
    edges.add((("mlp", 2, 0), LOGITS))
    for n in ALL:
        logits, _ = run(n, other(n), lambda of, to: (of, to) in edges, run(n, n)[1])
        value = logit_difference(n, logits)
        np.testing.assert_allclose(found.measures[0].patched[0, n], value, atol=2e-4)


def test_search_for_a_circuit_scores_every_edge(tmp_path: Path) -> None:
    assert {*trained(tmp_path, "acdc(threshold: 1.5)", "tokens *")} == {*list_all()}


def test_skipped_mlp_before_the_image_sends_nothing() -> None:
    """Its output would be added at a token before the image."""
    block = BLOCK.replace("{photo} how many {what}", "how many {photo} {what}")
    edges = {(("mlp", 1, 0), (site, 2, head)) for site in "kv" for head in range(2)}
    edges |= {(("mlp", 1, 0), ("mlp", 2, 0))}
    for fill in ("zero", "clean"):
        text = define("c", edges) + experiment("e", FROM, f"ablate c at tokens * with {fill}")
        [found] = run_text(text, block=block)
        for n in ALL:
            base, _ = run(n, other(n), late=True)
            fills = run(n, n, late=True)[1] if fill == "clean" else None
            logits, _ = run(n, other(n), lambda of, to: (of, to) in edges, fills, late=True)
            for values, own in (
                (found.measures[0].base, base),
                (found.measures[0].patched, logits),
            ):
                np.testing.assert_allclose(values[0, n], logit_difference(n, own), atol=2e-4)


def node_of(label: str, end: str) -> Node:
    """Return the node with a label; end: `of` for a sender, `to` for a receiver."""
    if label in ("embed", "logits"):
        return EMBED if label == "embed" else LOGITS
    if found := re.fullmatch(r"(\w) cross layer (\d+) head (\d+)", label):
        return found[1], int(found[2]), int(found[3])
    if found := re.fullmatch(r"L(\d+)H(\d+)(?:\.(\w))?", label):
        return found[3] or "z", int(found[1]), int(found[2])
    assert label.endswith(".mlp"), (label, end)
    return "mlp", int(label.removeprefix("L").removesuffix(".mlp")), 0


def derivatives(n: int, tokens: Collection[int] | None) -> dict[tuple[Node, Node], float]:
    """The derivatives of the measure on the clean run by the shares of the other run in edges."""
    every, fills = list_all(), run(n, other(n))[1]
    shares = {edge: torch.zeros((), requires_grad=True) for edge in every}
    with torch.enable_grad():
        follow: Any = vars(run)["__wrapped__"]
        logits, _ = follow(n, n, lambda of, to: False, fills, tokens, shares)
        ids = [token(str(RECORDS[n][key])) for key in ("n", "m")]
        found = torch.autograd.grad(logits[ids[0]] - logits[ids[1]], [*shares.values()])
    return {edge: float(own) for edge, own in zip(every, found, strict=True)}


def trained(
    to: Path, call: str, at: str, further: str = "", **more: Any
) -> dict[tuple[Node, Node], float]:
    """The scores of all edges that a training writes, or the probabilities of their gates."""
    options = "prompts: ask, from: changed, validation: 0%, measure_on_training_rows: true"
    options += f", maximise: logit(answer) - logit(wrong){further}"
    text = f"circuit c = fit({call}, {options}) at {at}\n"
    text += experiment("e", FROM, f"ablate all but c at {at} with clean")
    for file in folder().iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    path, models = to / "file.mech", {"m": (bare(), processor())}
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', "utf-8")
    (found,) = mechdsl.fit(path, models, store=to / "store", **more)
    content = json.loads((found.folder / "mask.json").read_text("utf-8"))
    ends = (label.split(" -> ") for label in content["labels"])
    edges = [(node_of(of, "of"), node_of(to, "to")) for of, to in ends]
    values = content["probabilities"] if call.startswith("mask") else content["scores"]
    return dict(zip(edges, values, strict=True))


@pytest.mark.parametrize(("at", "tokens"), [("tokens *", None), ("last token", [-1])])
def test_scores_of_edges_equal_derivatives(
    at: str, tokens: Collection[int] | None, tmp_path: Path
) -> None:
    found = trained(tmp_path, "eap(size: 40)", at)
    every = [derivatives(n, tokens) for n in ALL]
    assert {*found} == {*list_all()}
    expected = {edge: np.mean([each[edge] for each in every]) for edge in found}
    for crosses in (True, False):
        own = [edge for edge in found if (edge[1][1] in CROSS) == crosses]
        values, others = (np.array([each[e] for e in own]) for each in (found, expected))
        np.testing.assert_allclose(values, others, atol=1e-4, rtol=1e-4)
        assert np.ptp(others) > 0.01


ERRORS = {
    "L0.mlp -> k cross layer 1 head 0": ("E0335", "the receiver reads the image"),
    "z vision layer 0 head 0 -> logits": ("E0108", "an edge of the vision encoder"),
    "L0.mlp -> L1H0.q": ("E0414", "`m` has no `q` in layer 1"),
    "L1N3 -> logits": ("E0108", "a gate follows the MLP"),
}


@pytest.mark.parametrize("edge", ERRORS)
def test_invalid_edge_reports_its_reason(edge: str) -> None:
    rule = experiment("e", FROM, "ablate c at tokens * with clean")
    _, found = try_text(f"circuit c = {edge}\n{rule}")
    code, reason = ERRORS[edge]
    problem = next(each for each in found if each.severity == "error")
    assert problem.code == code
    assert reason in render_full([problem], color=False, width=200)


@pytest.mark.parametrize("method", ["eap_ig", "eap_ig_activations"])
def test_scores_between_two_images_are_e0608(method: str, tmp_path: Path) -> None:
    with pytest.raises(mechdsl.MechdslError, match="not the image that blocks attend to") as found:
        trained(tmp_path, f"{method}(size: 20, steps: 2)", "tokens *")
    assert "E0608" in str(found.value)


PATHS = {
    (("z", 2, 1), ("q", 3, 0)): "z layer 2 head 1 -> q cross layer 3 head 0",
    (("z", 1, 2), ("q", 2, 3)): "z cross layer 1 head 2 -> q layer 2 head 3",
    (("mlp", 1, 0), ("q", 3, 1)): "mlp_out layer 1 -> q cross layer 3 head 1",
    (("mlp", 2, 0), ("mlp", 3, 0)): "mlp_out layer 2 -> mlp_norm layer 3",
}


@pytest.mark.parametrize("method", ["relp", "gim"])
def test_scores_with_changed_derivatives_equal_estimates_of_paths(
    method: str, tmp_path: Path
) -> None:
    """`test_attended_estimates.py` compares the latter with the bare model."""
    scores = trained(tmp_path, f"{method}(size: 40)", "last token")
    text = "".join(
        experiment(f"e{n}", "from changed into clean", f"path {path} at last token using {method}")
        for n, path in enumerate(PATHS.values())
    )
    for found, edge in zip(run_text(text), PATHS, strict=True):
        [measure] = found.measures
        effect = (measure.patched[0] - measure.base[0]).mean()
        np.testing.assert_allclose(scores[edge], effect, atol=1e-4, rtol=1e-4)
        assert abs(effect) > 1e-3


# --- searches and masks ---------------------------------------------------------------------------


@cache
def other_vectors(n: int) -> dict[Node, Tensor]:
    return run(n, other(n))[1]


def mean_without(ablated: Collection[tuple[Node, Node]]) -> float:
    """The mean measure on the clean run while edges carry vectors of the other run."""
    values = list[float]()
    for n in ALL:
        logits, _ = run(n, n, lambda of, to: (of, to) in ablated, other_vectors(n))
        values.append(logit_difference(n, logits))
    return float(np.mean(values))


def list_steps() -> list[list[tuple[Node, Node]]]:
    """List the edges that each step of `coarse_to_fine` tries together, last blocks first."""
    every = list_all()
    heads = {at: [("z", at, head) for head in reversed(range(HEADS))] for at in range(LAYERS)}
    groups = list[Collection[Node]]()
    for layer in reversed(range(LAYERS)):
        groups += [[("mlp", layer, 0)], heads[layer]]
    groups += [[head] for layer in reversed(range(LAYERS)) for head in heads[layer]]
    steps = [[edge for edge in every if edge[0] in senders] for senders in groups]
    for layer in reversed(range(LAYERS)):
        for site in "vkq":
            steps.append([edge for edge in every if edge[1][:2] == (site, layer)])
    receivers = dict.fromkeys(to for _, to in every)
    for to in reversed(receivers):
        steps += [[edge] for edge in reversed(every) if edge[1] == to]
    return steps


def keep_leading(edges: Collection[tuple[Node, Node]]) -> set[tuple[Node, Node]]:
    """Remove edges from which no path leads to the logits."""
    kept = {edge for edge in edges if edge[1] == LOGITS}
    for _ in range(2 * LAYERS):
        senders = {of for of, _ in kept}
        for of, (site, layer, head) in edges:
            each = len({to for _, to in list_all() if to[:2] == (site, layer)})
            heads = range(HEADS // each * head, HEADS // each * (head + 1))
            reads = [("mlp", layer, 0)] if site == "mlp" else [("z", layer, h) for h in heads]
            if not senders.isdisjoint(reads):
                kept.add((of, (site, layer, head)))
    return kept


def read_chosen(to: Path) -> set[tuple[Node, Node]]:
    [path] = (to / "store").rglob("mask.json")
    content = json.loads(path.read_text("utf-8"))
    ends = (content["labels"][number].split(" -> ") for number in content["chosen"])
    return {(node_of(of, "of"), node_of(to, "to")) for of, to in ends}


@pytest.mark.slow
def test_search_from_blocks_to_edges_equals_a_group_by_group_reference(tmp_path: Path) -> None:
    scores = trained(tmp_path, "coarse_to_fine(threshold: 0.1)", "tokens *")
    ablated, changes = set[tuple[Node, Node]](), dict[tuple[Node, Node], float]()
    value = mean_without(())
    for step in list_steps():
        if left := {*step} - ablated:
            change = mean_without(ablated | left) - value
            changes |= dict.fromkeys(left, change)
            if -change < 0.1:
                ablated |= left
                value += change
    chosen = read_chosen(tmp_path)
    assert chosen == keep_leading({*list_all()} - ablated)
    assert any(to[1] in CROSS for _, to in chosen)
    for edge in chosen:
        assert scores[edge] == pytest.approx(changes[edge], abs=2e-4)


@pytest.mark.slow
def test_greedy_search_ablates_the_least_important_edge(tmp_path: Path) -> None:
    """Checks the first step against all edges; edges to ablated ones are dropped."""
    every = list_all()
    trained(tmp_path, f"greedy(size: {len(every) - 1})", "tokens *")
    dropped = {*every} - read_chosen(tmp_path)
    means = {edge: mean_without([edge]) for edge in every}
    best = max(means.values())
    assert any(means[edge] == pytest.approx(best, abs=1e-4) for edge in dropped)
    assert keep_leading({*every} - dropped) == {*every} - dropped
    assert len(dropped) < len(every) / 2


@pytest.mark.slow
def test_mask_has_the_loss_and_gradient_of_the_bare_model(tmp_path: Path) -> None:
    """For rows of different lengths in one batch, each with other shares."""
    opened, unpatched = list[MaskRows](), mask_training.open_rows

    def spy(*given: Any) -> MaskRows:
        opened.append(unpatched(*given))
        return opened[-1]

    with patch("mechdsl.execute.mask_training.open_rows", spy):
        every = [*trained(tmp_path, "mask(size: 30)", "tokens *", ", steps: 1, batch: 2")]
    [found] = opened
    assert {*every} == {*list_all()}
    batch, ids = [0, 2], found.objective.table.row_ids
    draws = torch.Generator().manual_seed(5)
    mine = torch.rand(2, len(every), generator=draws).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    values, expected = found.values(np.array(batch), mine), list[Tensor]()
    follow: Any = vars(run)["__wrapped__"]
    for row, own in zip(batch, theirs, strict=True):
        n, shares = ids[row], dict(zip(every, own, strict=True))
        logits, _ = follow(n, n, lambda of, to: False, other_vectors(n), None, shares)
        right, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        expected.append(logits[right] - logits[wrong])
    np.testing.assert_allclose(values.detach(), torch.stack(expected).detach(), atol=1e-4)
    (gradient,) = torch.autograd.grad(values.sum(), mine)
    (reference,) = torch.autograd.grad(torch.stack(expected).sum(), theirs)
    np.testing.assert_allclose(gradient, reference, atol=1e-4, rtol=1e-4)
    assert (reference.abs().amax(1) > 0.05).all()
