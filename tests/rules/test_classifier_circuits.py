"""Circuits of a BERT classifier, whose norms follow sums: against loops over its weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

import mechdsl

from ..execute import support
from ..models import families
from ..shared_models import unchanged
from .circuits import EMBED, LOGITS, head, mlp, neuron

Edge = tuple[str, str]
LAYERS, HEADS, WIDTH, NEURONS = 3, 4, 24, 28
PROMPTS = support.PROMPTS.replace('answer " {a}"', 'answer "LABEL_1"').replace(
    'wrong " {b}"', 'wrong "LABEL_0"'
)


@cache
def bare() -> Any:
    return bare_family("bert")


@cache
def double() -> Any:
    return unchanged(copy.deepcopy(bare()).double())


def list_edges(split: Collection[int] = ()) -> list[Edge]:
    """The edges of the model, in the order of senders.

    Args:
        split: Layers whose neurons are nodes.
    """
    found: list[Edge] = []
    before = [EMBED]
    for layer in range(LAYERS):
        heads = [head(layer, n) for n in range(HEADS)]
        found += [(of, f"{to}.{letter}") for letter in "qkv" for to in heads for of in before]
        inner = nodes_of_mlp(layer, split)
        found += [(of, to) for to in inner for of in (*before, *heads)]
        before += [*heads, *inner]
    found += [(of, LOGITS) for of in before]
    return sorted(found, key=lambda edge: before.index(edge[0]))


def nodes_of_mlp(layer: int, split: Collection[int]) -> list[str]:
    return [neuron(layer, n) for n in range(NEURONS)] if layer in split else [mlp(layer)]


def classify(
    ids: Sequence[int],
    fills: Mapping[str, Tensor] | None = None,
    shares: Mapping[Edge, Tensor | float] | None = None,
    positions: Collection[int] | None = None,
    moved: Tensor | None = None,
    split: Collection[int] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The difference of the logits of one text, and the outputs of all components, [T, width].

    Every receiver recomputes its input from the outputs of the components in this pass.

    Args:
        fills: By sender, the output that ablated edges carry; with `moved`, its change.
        shares: By edge, the share of the fill.
        moved: Added to the embeddings.
        split: Layers whose neurons are nodes.
    """
    bert, given = double().bert, dict[str, Tensor]()
    shares = shares or {}
    there = torch.ones(len(ids), 1, dtype=torch.double)
    if positions is not None:
        there = torch.zeros_like(there)
        there[list(positions)] = 1
    given[EMBED] = bert.embeddings(input_ids=torch.tensor([list(ids)]))[0]
    given[EMBED] = given[EMBED] if moved is None else given[EMBED] + moved

    def of(sender: str, receiver: str) -> Tensor:
        value = given[sender]
        share = shares.get((sender, receiver))
        if share is None or fills is None:
            return value
        return value + share * there * (fills[sender] - (value if moved is None else 0))

    def seen_by(receiver: str, layers: int, *, middle: bool = False) -> Tensor:
        seen = of(EMBED, receiver)
        for layer in range(layers + middle):
            block = bert.encoder.layer[layer]
            added = sum(of(head(layer, n), receiver) for n in range(HEADS))
            added = added + block.attention.output.dense.bias
            seen = block.attention.output.LayerNorm(seen + added)
            if layer < layers:
                sent = sum(of(sender, receiver) for sender in nodes_of_mlp(layer, split))
                sent = sent + (block.output.dense.bias if layer in split else 0)
                seen = block.output.LayerNorm(seen + sent)
        return seen

    for layer in range(LAYERS):
        block = bert.encoder.layer[layer]
        own, size = block.attention.self, WIDTH // HEADS
        for n in range(HEADS):
            q, k, v = (
                getattr(own, word)(seen_by(f"{head(layer, n)}.{word[0]}", layer))[
                    :, n * size : (n + 1) * size
                ]
                for word in ("query", "key", "value")
            )
            pattern = (q @ k.T / size**0.5).softmax(-1)
            weight = block.attention.output.dense.weight[:, n * size : (n + 1) * size]
            given[head(layer, n)] = pattern @ v @ weight.T
        for n, node in enumerate(nodes_of_mlp(layer, split)):
            inner = block.intermediate(seen_by(node, layer, middle=True))
            if layer in split:
                given[node] = inner[:, n, None] * block.output.dense.weight[:, n]
            else:
                given[node] = block.output.dense(inner)
    final = seen_by(LOGITS, LAYERS)
    logits = double().classifier(torch.tanh(bert.pooler.dense(final[0])))
    return logits[1] - logits[0], given


SOME = {
    "embed -> L0H1.q": [(EMBED, "L0H1.q")],
    "L0H1 -> L1H0.k": [("L0H1", "L1H0.k")],
    "L1H3 -> L2H3.v": [("L1H3", "L2H3.v")],
    "L0.mlp -> q layer 2 heads *": [(mlp(0), f"{head(2, n)}.q") for n in range(HEADS)],
    "L0H2 -> L0.mlp": [("L0H2", mlp(0))],
    "embed -> mlp_norm layers *": [(EMBED, mlp(layer)) for layer in range(LAYERS)],
    "L1H2 -> logits": [("L1H2", LOGITS)],
    "L2.mlp -> logits": [(mlp(2), LOGITS)],
}


def compare_circuit(
    edges: Mapping[str, Sequence[Edge]],
    split: tuple[int, ...],
    rule: str,
    fill: str,
    at: str,
    mode: str,
    folder: Path,
) -> None:
    """Check an ablated circuit against a loop. `split`: layers whose neurons are nodes."""
    lines = ("prompts p", f"ablate {rule} at {at} with {fill}")
    measure = "measure logit(class answer) - logit(class wrong) as raw"
    text = f"circuit c = {', '.join(edges)}\n" + support.experiment("e", *lines, measure)
    found = support.run_file(text, folder, bare(), support.MODES[mode], prompts=PROMPTS)
    named = {edge for each in edges.values() for edge in each}
    ablated = named if rule == "c" else set(list_edges(split)) - named
    shares = dict.fromkeys(ablated, 1.0)
    values = found["e"].measures[0].patched
    both = zip(support.prompts(), support.prompts("other"), strict=True)
    for row, (own, other) in enumerate(both):
        _, filled = classify(other.ids, split=split)
        plain, _ = classify(own.ids)
        if fill == "zero":
            filled = {name: torch.zeros(len(own.ids), WIDTH).double() for name in filled}
        positions = None if at == "tokens *" else [own.cue, own.subject[-1]]
        expected, _ = classify(own.ids, filled, shares, positions, split=split)
        assert values[0, row] == pytest.approx(float(expected), abs=1e-4)
        assert abs(float(expected - plain)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize(
    ("rule", "fill", "at"),
    [
        ("c", "other", "tokens *"),
        ("all but c", "other", "tokens *"),
        ("all but c", "zero", "{cue token, subject token}"),
        ("c", "zero", "tokens *"),
    ],
)
def test_circuit_of_bert_classifier_equals_a_loop(
    rule: str, fill: str, at: str, mode: str, tmp_path: Path
) -> None:
    compare_circuit(SOME, (), rule, fill, at, mode, tmp_path)


NAMED = ("L0N3", "L0N5", "L1N2")
SPLIT = (0, 1)
GROUP = f"group g = {', '.join(NAMED)}\n"
OF_NEURONS: dict[str, list[Edge]] = {
    "embed -> L0N3": [(EMBED, "L0N3")],
    "layer 0 heads * -> L0N5": [(head(0, n), "L0N5") for n in range(HEADS)],
    "L0N3 -> L1N2": [("L0N3", "L1N2")],
    "L0N5 -> L1H0.k": [("L0N5", "L1H0.k")],
    "L1H2 -> L1N2": [("L1H2", "L1N2")],
    "L1N2 -> L2.mlp": [("L1N2", mlp(2))],
    "L0N3 -> logits, L1N2 -> logits": [("L0N3", LOGITS), ("L1N2", LOGITS)],
    "L2.mlp -> logits": [(mlp(2), LOGITS)],
}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize(
    ("rule", "fill", "at"),
    [
        ("c", "other", "tokens *"),
        ("all but c", "other", "{cue token, subject token}"),
        ("all but c", "zero", "tokens *"),
        ("c", "zero", "tokens *"),
    ],
)
def test_neurons_of_bert_classifier_equal_a_loop(
    rule: str, fill: str, at: str, mode: str, tmp_path: Path
) -> None:
    """The dense layers before and after the neurons are in two modules."""
    compare_circuit(OF_NEURONS, SPLIT, rule, fill, at, mode, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["c", "all but c"])
def test_circuit_of_bert_classifier_with_positions_equals_a_loop(rule: str, tmp_path: Path) -> None:
    """Every second edge is in the circuit at two tokens only."""
    places = ["" if n % 2 else " at {cue token, token 1}" for n in range(len(SOME))]
    written = [edge + at for edge, at in zip(SOME, places, strict=True)]
    measure = "measure logit(class answer) - logit(class wrong) as raw"
    lines = ("prompts p", f"ablate {rule} at tokens * with other", measure)
    text = f"circuit c = {', '.join(written)}\n" + support.experiment("e", *lines)
    found = support.run_file(text, tmp_path, bare(), prompts=PROMPTS)["e"].measures[0].patched
    both = zip(support.prompts(), support.prompts("other"), strict=True)
    for row, (own, other) in enumerate(both):
        _, filled = classify(other.ids)
        every = torch.ones(len(own.ids), 1, dtype=torch.double)
        some = torch.zeros_like(every)
        some[[own.cue, 1]] = 1
        shares = {
            edge: some if at else every
            for edges, at in zip(SOME.values(), places, strict=True)
            for edge in edges
        }
        if rule == "all but c":
            shares = {edge: 1 - shares.get(edge, 0 * every) for edge in list_edges()}
        expected, _ = classify(own.ids, filled, shares)
        assert found[0, row] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("neurons", [False, True])
def test_edge_scores_of_bert_classifier_equal_derivatives(tmp_path: Path, *, neurons: bool) -> None:
    """EAP: the derivative by the share of each edge. EAP-IG moves the embeddings to the fill."""
    split, group, nodes = (SPLIT, GROUP, ", nodes: g") if neurons else ((), "", "")
    edges = list_edges(split)
    given = {"m": (bare(), support.word_tokenizer())}
    makers = (("eap(size: 40)", 1), ("eap_ig(size: 40, steps: 3)", 3))
    for maker, steps in makers:
        line = (
            f"{group}circuit c = fit({maker}{nodes}, prompts: p, from: other, validation: 0%, "
            "measure_on_training_rows: true, maximise: logit(class answer) - logit(class wrong))\n"
        )
        rule = ("prompts p", "ablate all but c at tokens * with other")
        text = support.experiment("e", *rule, "measure logit(class answer) as raw")
        path = tmp_path / f"{steps}.mech"
        path.write_text(f'mech 1\nmodel m = local("handed over")\n{PROMPTS}\n{line}{text}')
        support.write_rows(tmp_path)
        (found,) = mechdsl.fit(path, given, store=tmp_path / "store")
        content = json.loads((found.folder / "mask.json").read_text())
        total = torch.zeros(len(edges)).double()
        for own, other in zip(support.prompts(), support.prompts("other"), strict=True):
            with torch.no_grad():
                _, filled = classify(other.ids, split=split)
                _, plain = classify(own.ids, split=split)
            for step in range(1, steps + 1):
                moved = (1 - step / steps) * (filled[EMBED] - plain[EMBED])
                total += derivatives(own.ids, plain, filled, edges, moved, split) / steps
        expected = add_other_neurons(edges, total / len(support.prompts()))
        scores = dict(zip(content["labels"], content["scores"], strict=True))
        assert len(scores) == len(expected)
        for name, value in scores.items():
            assert value == pytest.approx(expected[name], abs=1e-4), name
        assert np.ptp([*expected.values()]) > 0.01


def add_other_neurons(edges: Sequence[Edge], scores: Tensor) -> dict[str, float]:
    """Scores by label, those of the neurons that the circuit doesn't name added up."""
    found: dict[str, float] = {}
    for edge, score in zip(edges, scores, strict=True):
        label = " -> ".join(
            f"{end.partition('N')[0]}.mlp" if "N" in end and end not in NAMED else end
            for end in edge
        )
        found[label] = found.get(label, 0.0) + float(score)
    return found


def derivatives(
    ids: Sequence[int],
    plain: Mapping[str, Tensor],
    filled: Mapping[str, Tensor],
    edges: Sequence[Edge],
    moved: Tensor,
    split: Collection[int] = (),
) -> Tensor:
    """[edge] derivatives by the shares of constant changes, on embeddings that are moved."""
    shares = {edge: torch.zeros((), dtype=torch.double, requires_grad=True) for edge in edges}
    changes = {sender: filled[sender] - value for sender, value in plain.items()}
    value, _ = classify(ids, changes, shares, moved=moved, split=split)
    return torch.stack(torch.autograd.grad(value, list(shares.values())))


SIZES: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@cache
def bare_family(name: str) -> Any:
    sizes = dict(SIZES)
    if name == "distilbert":
        sizes |= {"dim": WIDTH, "hidden_dim": NEURONS, "n_layers": LAYERS, "n_heads": HEADS}
    if name == "gpt2":
        sizes |= {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
        sizes |= {"bos_token_id": 1, "eos_token_id": 1}
    config = AutoConfig.for_model(name.removesuffix("/tokens"), **sizes)
    of_tokens = name.endswith("/tokens")
    made = AutoModelForMaskedLM if of_tokens else AutoModelForSequenceClassification
    model = made.from_config(config).eval()
    families.draw(model, 3)
    return unchanged(model)


def some(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    [
        "roberta",
        "gpt2",
        "bert/tokens",
        *map(some, ("electra", "distilbert", "roberta-prelayernorm", "llama", "mpnet")),
    ],
)
def test_circuit_with_all_other_edges_ablated_equals_the_fill_run(
    name: str, tmp_path: Path
) -> None:
    """All edges outside the circuit carry another run's values, or those of the same run."""
    outputs = "answer" if name.endswith("/tokens") else "class answer"
    at = " at last token" if name.endswith("/tokens") else ""
    measure = f"measure logit({outputs}){at} as raw"
    rules = ("ablate all but c at tokens * with turned", "ablate all but c at tokens * with clean")
    text = "circuit c = embed -> L2H3.q\n" + "".join(
        support.experiment(key, "prompts p", *lines, measure)
        for key, lines in (
            ("moved", rules[:1]),
            ("unmoved", rules[1:]),
            ("run", ("from turned into clean", "patch resid_pre layer 0 at tokens *")),
        )
    )
    given = support.PROMPTS if name.endswith("/tokens") else PROMPTS
    found = support.run_file(text, tmp_path, bare_family(name), prompts=given)
    moved, unmoved, run = (found[key].measures[0] for key in ("moved", "unmoved", "run"))
    np.testing.assert_allclose(moved.patched, run.patched, atol=1e-4)
    np.testing.assert_allclose(unmoved.patched, run.base, atol=1e-4)
    assert np.abs(moved.patched - unmoved.patched).max() > 0.01


@pytest.mark.parametrize(
    ("rule", "fill"), [("all but c", "other"), pytest.param("c", "zero", marks=pytest.mark.slow)]
)
def test_estimates_of_edges_of_bert_classifier_are_derivatives_in_the_circuit(
    rule: str, fill: str, tmp_path: Path
) -> None:
    lines = ("prompts p", f"ablate {rule} without each edge at tokens * with {fill}", "using eap")
    measure = "measure logit(class answer) - logit(class wrong) as delta"
    circuit = list_edges()[::2]
    text = f"circuit c = {', '.join(f'{of} -> {to}' for of, to in circuit)}\n"
    text += support.experiment("e", *lines, measure)
    found = support.run_file(text, tmp_path, bare(), prompts=PROMPTS)["e"]
    ablated = {*circuit} if rule == "c" else {*list_edges()} - {*circuit}
    values: list[dict[Edge, float]] = []
    for own, other in zip(support.prompts(), support.prompts("other"), strict=True):
        with torch.no_grad():
            _, filled = classify(other.ids)
        if fill == "zero":
            filled = {of: torch.zeros(len(own.ids), WIDTH).double() for of in filled}
        shares = {edge: torch.zeros((), dtype=torch.double) for edge in circuit}
        shares = {edge: (own_ + (rule == "c")).requires_grad_() for edge, own_ in shares.items()}
        value, _ = classify(own.ids, filled, {**dict.fromkeys(ablated, 1.0), **shares})
        slopes = torch.autograd.grad(value, [*shares.values()])
        sign = -1 if rule == "c" else 1
        values.append(
            {e: float(value.detach() + sign * s) for e, s in zip(shares, slopes, strict=True)}
        )
    labels = [str(cell.coords["edge"]).split(" -> ") for cell in found.cells]
    assert len(labels) == len(circuit)
    expected = np.array([[row[of, to] for row in values] for of, to in labels])
    np.testing.assert_allclose(found.measures[0].patched, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 1e-2
