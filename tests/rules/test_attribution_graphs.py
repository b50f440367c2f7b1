"""Attribution graphs, against a frozen reference model: attention patterns and norm divisors are
replayed, so that every edge is the effect of removing its source."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.dictionaries.features import load_cross_decoder, load_dictionary
from mechdsl.dictionaries.folder import read_cross_decoder, read_dictionary
from mechdsl.execute.observation import attribution_graphs
from mechdsl.execute.observation.attribution_graphs import (
    AttributionGraph,
    FeatureNodes,
    GraphPrompt,
    GraphTranscoder,
    LogitMeasure,
    ablate_nodes,
    attribute,
    compute_influence,
    list_influential,
    normalise_edges,
    predict_ablation,
    prune_graph,
    score_graph,
)
from mechdsl.show.reports import graph as graph_report

from ..execute.support import ROWS, ids_of, prompt, shared, word_tokenizer
from .models import bare, double
from .support import BLOCKS as PROMPTS
from .support import DIFFERENCE, codes, experiment, rows, run_file, try_file
from .test_transcoders import make, make_cross_layer

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}
"""Path of the blocks in the modules of transformers; the rest is as in Llama."""
IDS = prompt(ROWS[0]).ids


# --- the frozen model -----------------------------------------------------------------------------


class Frozen:
    """A model that computes its attention and norms with the patterns and divisors of one prompt.

    MLP outputs are given, so that the logits are a linear function of them.
    """

    def __init__(self, family: str, ids: Sequence[int]) -> None:
        self.model = copy.deepcopy(double(family))
        self.model.set_attn_implementation("eager")
        self.ids = torch.tensor([list(ids)])
        blocks = self.model.get_submodule(BLOCKS.get(family, "model.layers"))
        self.mlps = [block.mlp for block in blocks]
        self.ends = [getattr(b, "post_feedforward_layernorm", b.mlp) for b in blocks]
        self.first = blocks[0]
        self.kept: list[Tensor] = []
        self.replayed: list[Tensor] | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.entering = torch.zeros(0)
        self.added: dict[int | None, Tensor] = {}
        self.responses: dict[int, Callable[[Tensor], Tensor]] = {}
        """By layer, what is added to the output for the input of the MLP."""
        for part in self.model.modules():
            if "norm" in type(part).__name__.lower():
                part.forward = self._norm(part)
        for layer, (mlp, end) in enumerate(zip(self.mlps, self.ends, strict=True)):
            mlp.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].clone()))
            end.register_forward_hook(self._write(layer))
        self.first.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.logits = self.run()
        self.written, self.start = list(self.outputs), self.entering
        self.replayed = list(self.kept)

    def _keep(self, value: Tensor) -> Tensor:
        """The value of the first run, wherever the model computes it."""
        if self.replayed is not None:
            return self.replayed[len(self.kept) - 1 if self.kept.append(value) is None else 0]
        self.kept.append(value)
        return value

    def _norm(self, part: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if isinstance(part, nn.LayerNorm):
                left = x - x.mean(-1, keepdim=True)
                size = self._keep((left.pow(2).mean(-1, keepdim=True) + part.eps).sqrt())
                return left / size * part.weight + part.bias
            own = hasattr(part, "variance_epsilon")
            eps = part.variance_epsilon if own else part.eps
            size = self._keep((x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
            return x / size * (part.weight if own else 1 + part.weight)

        return forward

    def _write(self, layer: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            found = output if self.replayed is None else self.written[layer]
            self.outputs.append(found)
            if layer in self.responses:
                found = found + self.responses[layer](self.inputs[layer])
            return found + self.added[layer] if layer in self.added else found

        return hook

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.entering = args[0]
        more = self.added.get(None)
        return (args[0] if more is None else args[0] + more, *args[1:]), kwargs

    def run(self, added: dict[int | None, Tensor] | None = None) -> Tensor:
        """[vocab] logits after the prompt, with additions to MLP outputs and the embedding."""
        self.added = added or {}
        self.kept, self.inputs, self.outputs = [], [], []
        softmax = nn.functional.softmax

        def replay(value: Tensor, *args: Any, **given: Any) -> Tensor:
            return self._keep(softmax(value, *args, **given))

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(nn.functional, "softmax", replay)
            return self.model(self.ids).logits[0, -1]

    def run_inputs(
        self, added: dict[int | None, Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The inputs of the MLPs, [token, width], and the logits."""
        logits = self.run(added)
        return [each[0] for each in self.inputs], logits

    def without(self, token: int, parts: dict[int | None, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Inputs of MLPs and logits without a source that writes to these layers."""
        changes: dict[int | None, Tensor] = {}
        for layer, part in parts.items():
            changes[layer] = torch.zeros_like(self.start)
            changes[layer][0, token] = -part
        return self.run_inputs(changes)


@cache
def frozen(family: str) -> Frozen:
    return Frozen(family, IDS)


def transcoders(
    family: str, kind: str, folder: Path, layers: Sequence[int]
) -> tuple[dict[int, GraphTranscoder], dict[int, Any]]:
    """Those of some layers, as the package loads them and as the reference has them."""
    given: dict[int, GraphTranscoder] = {}
    own: dict[int, Any] = {}
    reference = frozen(family)
    width = reference.start.shape[-1]
    if kind == "cross_layer":
        count = len(reference.mlps)
        parts = make_cross_layer(folder, width, "ln2.hook_normalized", count)
        for layer in layers:
            own[layer] = Crossing(parts[layer])
            file = read_dictionary(folder / "clt", "clt", transcodes=True, layer=layer)
            decoders = load_cross_decoder(read_cross_decoder(file, layer, count))
            given[layer] = GraphTranscoder.of("mlp_norm", load_dictionary(file), decoders)
        return given, own
    for layer in layers:
        name = f"of_{layer}"
        own[layer] = make(folder, kind, width, name)
        file = read_dictionary(folder / name, name, transcodes=True)
        given[layer] = GraphTranscoder.of("mlp_norm", load_dictionary(file))
    return given, own


@dataclass(frozen=True)
class Crossing:
    """The features of a layer of a cross-layer transcoder, computed from their formulas."""

    parts: dict[str, Tensor]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {"W_enc": self.parts["W_enc"].T}

    def encode(self, x: Tensor) -> Tensor:
        before = x @ self.parts["W_enc"].T + self.parts["b_enc"]
        return (before * (before > self.parts.get("threshold", torch.zeros(1)))).clamp(min=0)

    def writes(self, feature: int) -> Tensor:
        """The contribution of a feature to the outputs of this layer and later ones."""
        return self.parts["W_dec"][feature]


def reconstruct(own: dict[int, Any], codes: dict[int, Tensor], before: list[Tensor]) -> list[Any]:
    """The part of the output of each MLP that isn't an error."""
    found: list[Any] = [0.0] * len(before)
    for layer, each in own.items():
        if not isinstance(each, Crossing):
            found[layer] = each.decode(codes[layer], before[layer])
            continue
        found[layer] = found[layer] + each.parts["b_dec"]
        for later, rows_of in enumerate(each.parts["W_dec"].unbind(1)):
            found[layer + later] = found[layer + later] + codes[layer] @ rows_of
    return found


def skip(own: Any, before: Tensor, now: Tensor) -> Tensor:
    """The change of a skip connection's output relative to the prompt."""
    return (now - before) @ own.weights["W_skip"].T


def recode(own: Any, before: Tensor, ablated: list[tuple[int, int]], now: Tensor) -> Tensor:
    """The change of the features relative to the prompt: active features are linear in the
    input, and ablated ones, (token, feature), are 0."""
    codes = own.encode(before)
    change = (now[0] - before) @ own.weights["W_enc"] * (codes > 0)
    for place in ablated:
        change[place] = -codes[place]
    return change


def respond(own: Any, before: Tensor, ablated: list[tuple[int, int]], now: Tensor) -> Tensor:
    """The change of the features' output."""
    return recode(own, before, ablated, now) @ own.weights["W_dec"]


def without_features(family: str, own: dict[int, Any], nodes: FeatureNodes) -> Tensor:
    """[vocab] logits of the bare model in which features are taken out of the outputs of MLPs."""
    model = copy.deepcopy(double(family))
    blocks = model.get_submodule(BLOCKS.get(family, "model.layers"))
    inputs: dict[int, Tensor] = {}
    for layer, block in enumerate(blocks):

        def keep(_: Any, given: Any, layer: int = layer) -> None:
            inputs[layer] = given[0][0]

        def change(_: Any, given: Any, output: Tensor, layer: int = layer) -> Tensor:
            output = output.clone()
            for of, token, feature in named(nodes):
                crosses = isinstance(own[of], Crossing)
                if of == layer or (crosses and of < layer):
                    amount = own[of].encode(inputs[of])[token, feature]
                    rows_of = own[of].writes(feature) if crosses else own[of].weights["W_dec"]
                    output[0, token] -= amount * rows_of[layer - of if crosses else feature]
            return output

        block.mlp.register_forward_pre_hook(keep)
        getattr(block, "post_feedforward_layernorm", block.mlp).register_forward_hook(change)
    with torch.no_grad():
        return model(torch.tensor([list(IDS)])).logits[0, -1]


def named(nodes: FeatureNodes) -> list[tuple[int, int, int]]:
    """(layer, token, feature) of each feature."""
    every = (each.tolist() for each in (nodes.layer, nodes.token, nodes.feature))
    return list(zip(*every, strict=True))


def graph_of(family: str, given: dict[int, GraphTranscoder]) -> AttributionGraph:
    model = shared(bare(family))
    return attribute(GraphPrompt(model, given, IDS))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "transcoder"), ("llama", "jumprelu_transcoder"), ("gpt_neox", "sparsify"),
     ("gemma2", "transcoder"), ("llama", "skip_transcoder"), ("gemma2", "skip_transcoder"),
     ("gpt2", "cross_layer"), ("gemma2", "cross_layer")],
)  # fmt: skip
def test_graph_edge_equals_the_effect_of_removing_its_source(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = frozen(family)
    layers = range(len(reference.mlps))
    given, own = transcoders(family, kind, tmp_path, [0, 2])  # the second MLP has none
    graph = graph_of(family, given)
    reference.run()
    before, logits = [each[0] for each in reference.inputs], reference.logits
    if "skip" in kind:
        responses = {at: partial(skip, own[at], before[at]) for at in own}
        monkeypatch.setattr(reference, "responses", responses)
    features = graph.features
    assert len(features) > 20
    codes = {layer: own[layer].encode(before[layer]) for layer in given}
    expected = {
        (layer, token, feature): float(codes[layer][token, feature])
        for layer in given
        for token, feature in codes[layer].nonzero().tolist()
    }
    keys = zip(
        features.layer.tolist(), features.token.tolist(), features.feature.tolist(), strict=True
    )
    names = list(keys)
    assert set(names) == set(expected)
    np.testing.assert_allclose(
        features.activation, [expected[name] for name in names], atol=1e-4, rtol=1e-4
    )

    def targets(inputs: list[Tensor], ends: Tensor) -> np.ndarray[Any, Any]:
        found = [float(inputs[at][t] @ own[at].weights["W_enc"][:, f]) for at, t, f in names]
        cap = reference.model.config.to_dict().get("final_logit_softcapping")
        ends = ends if cap is None else cap * torch.atanh(ends / cap)
        found += [float(ends[token] - ends.mean()) for token in graph.logits.tolist()]
        return np.array(found)

    now = targets(before, logits)
    np.testing.assert_allclose(graph.inputs, now, atol=1e-3, rtol=1e-4)
    chances = logits.softmax(-1)
    np.testing.assert_allclose(graph.probabilities, chances[graph.logits], atol=1e-5)
    random = np.random.default_rng(0)
    sources: list[tuple[int, int, dict[int | None, Tensor]]] = []
    for number in random.choice(len(names), 8, replace=False).tolist():
        at, token, feature = names[number]
        crosses = isinstance(own[at], Crossing)
        made = own[at].writes(feature) if crosses else own[at].weights["W_dec"][feature][None]
        parts = {at + n: expected[names[number]] * row for n, row in enumerate(made)}
        sources.append((number, token, parts))
    explained = reconstruct(own, codes, before)
    for at in layers:
        for token in random.choice(graph.tokens, 2, replace=False).tolist():
            part = (reference.written[at][0] - explained[at])[token]
            number = graph.first_error + at * graph.tokens + token
            sources.append((number, token, {at: part}))
    for token in (0, graph.tokens - 1):
        sources.append((graph.first_token + token, token, {None: reference.start[0, token]}))
    largest = 0.0
    for number, token, parts in sources:
        effect = now - targets(*reference.without(token, parts))
        np.testing.assert_allclose(graph.edges[:, number], effect, atol=1e-3, rtol=1e-3)
        largest = max(largest, float(np.abs(effect).max()))
    assert largest > 0.3


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_edges_toward_a_measure_are_its_gradient_times_effects_on_logits(
    family: str, tmp_path: Path
) -> None:
    """Of a log probability; logits of Gemma 2 are capped."""
    given, _ = transcoders(family, "transcoder", tmp_path, [0, 2])
    reference, token = frozen(family), 7
    model = shared(bare(family))
    graph = attribute(GraphPrompt(model, given, IDS, lambda logits: logits.log_softmax(-1)[token]))
    cap = reference.model.config.to_dict().get("final_logit_softcapping")
    logits = reference.run()
    weights = -logits.softmax(-1)
    weights[token] += 1
    if cap is not None:
        weights = weights * (1 - (logits / cap) ** 2)
    assert graph.logits.tolist() == [len(logits)]

    def target(ends: Tensor) -> float:
        ends = ends if cap is None else cap * torch.atanh(ends / cap)
        return float(weights @ ends)

    assert graph.inputs[-1] == pytest.approx(target(logits), abs=1e-3)
    for at in (0, graph.tokens - 1):
        part = reference.start[0, at]
        effect = target(logits) - target(reference.without(at, {None: part})[1])
        assert graph.edges[-1, graph.first_token + at] == pytest.approx(effect, abs=1e-3)
        assert abs(effect) > 0.01


def test_graph_scores_and_pruning_equal_a_worked_example() -> None:
    """Two features, an error, a token and a logit: every path is added up."""
    nodes = FeatureNodes(np.array([0, 1]), np.array([0, 0]), np.array([3, 4]), np.array([1.0, 1.0]))
    edges = np.zeros((3, 6))  # from features 0 and 1, errors 2 and 3, tokens 4 and 5
    edges[0, 4] = 2
    edges[1, 0], edges[1, 2] = -3, 1
    edges[2, 1], edges[2, 3], edges[2, 5] = 2, 1, -1  # into the logit
    graph = AttributionGraph(nodes, 1, 2, np.array([9]), np.array([1.0]), edges, np.zeros(3))
    shares = normalise_edges(edges)
    assert shares[1].tolist() == [0.75, 0, 0.25, 0, 0, 0]
    influence = compute_influence(shares, graph.probabilities)
    np.testing.assert_allclose(influence, [0.375, 0.5, 0.125, 0.25, 0.375, 0.25])
    replacement, completeness = score_graph(graph)
    assert replacement == pytest.approx(0.625 / (0.625 + 0.375))
    reached = 0.375 + 0.5 + 0.125 + 0.25 + 0.375 + 0.25 + 1
    assert completeness == pytest.approx(1 - (0.5 * 0.25 + 1 * 0.25) / reached)
    kept, lines = prune_graph(graph, 0.8, 0.98)
    assert kept.tolist() == [True, True, False, True, True, True]
    assert lines[2].tolist() == [False, True, False, True, False, True]
    assert lines[1].tolist() == [True, False, False, False, False, False]
    every, whole = prune_graph(graph, 1, 1)
    assert every.tolist() == [True, True, True, True, True, True]
    assert (whole == (edges != 0)).all()
    few, _ = prune_graph(graph, 0.2, 0.98)
    assert few.tolist() == [False, False, False, False, True, True]  # nothing leads to it


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "transcoder"), ("gemma2", "sparsify"), ("gpt2", "cross_layer"),
     ("gemma2", "cross_layer")],
)  # fmt: skip
def test_ablated_features_have_the_reference_effect_in_model_and_graph(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = frozen(family), shared(bare(family))
    given, own = transcoders(family, kind, tmp_path, [0, 2])

    def measure(logits: Tensor) -> Tensor:
        return logits[3] - logits[4]

    of = GraphPrompt(model, given, IDS, measure)
    graph = attribute(of)
    chosen = list_influential(graph, 4)
    influence = compute_influence(normalise_edges(graph.edges), graph.probabilities)
    rest = np.delete(influence[: graph.first_error], chosen)
    assert influence[chosen].min() >= rest.max()
    nodes = graph.features.some(chosen)
    assert len(set(named(nodes))) == 4
    one = graph.features.some(chosen[:1])
    found = ablate_nodes(of, [nodes, one]).double()
    for logits, expected in zip(found[1:], [nodes, one], strict=True):
        exact = without_features(family, own, expected)
        np.testing.assert_allclose(logits, exact, atol=1e-3)
        assert float((exact - found[0]).abs().max()) > 0.05
    reference.run()
    before = [each[0] for each in reference.inputs]
    cap = reference.model.config.to_dict().get("final_logit_softcapping")

    def value() -> float:
        logits = reference.run()
        slopes = 1.0 if cap is None else 1 - (reference.logits / cap) ** 2
        return float(measure(slopes * (logits if cap is None else cap * torch.atanh(logits / cap))))

    plain = value()
    places = {at: [place[1:] for place in named(nodes) if place[0] == at] for at in own}
    responses: dict[int, Any] = {
        at: partial(respond, own[at], before[at], places[at]) for at in own
    }
    if kind == "cross_layer":
        responses = {
            at: lambda _, at=at: sum(
                recode(own[of], before[of], places[of], reference.inputs[of])
                @ own[of].parts["W_dec"][:, at - of]
                for of in own
                if of <= at
            )
            for at in range(len(before))
        }
    monkeypatch.setattr(reference, "responses", responses)
    assert predict_ablation(graph, chosen) == pytest.approx(value() - plain, abs=1e-3)
    assert abs(value() - plain) > 0.05


@pytest.mark.parametrize("most", [5, 40])
def test_features_of_little_influence_count_as_errors(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, _ = transcoders("llama", "transcoder", tmp_path, [0, 2])
    whole = graph_of("llama", given)
    monkeypatch.setattr(attribution_graphs, "MOST_FEATURES", most)
    monkeypatch.setattr(attribution_graphs, "RANKED", 16)
    part = graph_of("llama", given)
    assert (len(part.features), part.left_out) == (most, len(whole.features) - most)
    logits = whole.edges[len(whole.features) :], part.edges[most:]
    np.testing.assert_allclose(logits[0].sum(1), logits[1].sum(1), atol=1e-4)
    np.testing.assert_allclose(
        logits[0][:, whole.first_token :], logits[1][:, part.first_token :], atol=1e-5
    )
    influence = compute_influence(normalise_edges(whole.edges), whole.probabilities)
    names = [
        set(zip(own.layer.tolist(), own.token.tolist(), own.feature.tolist(), strict=True))
        for own in (
            part.features,
            whole.features.some(np.argsort(-influence[: whole.first_error])[:3]),
        )
    ]
    assert names[1] <= names[0]
    assert score_graph(part)[0] < score_graph(whole)[0]


# --- the statement --------------------------------------------------------------------------------

T0, T2 = (f'basis t{n} = transcoder("of_{n}") at mlp_out layer {n}\n' for n in (0, 2))
EVERY = "observe attribution_graph(t0, t2) logits at last token as kept"
SUBJECT = "observe attribution_graph(t0) logits at token 1, last token as one"


def lines(observe: str, name: str) -> str:
    return experiment("e_" + name, observe, measure="")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", pytest.param("plain", marks=pytest.mark.slow)])
def test_attribution_graph_statement_has_scores_of_each_prompt(mode: str, data: Path) -> None:
    """At several positions, in rows of different lengths, in two experiments of a file."""
    given, _ = transcoders("llama", "transcoder", data, [0, 2])
    found = run_file(T0 + T2 + lines(EVERY, "kept") + lines(SUBJECT, "one"), data, "llama", mode)
    model = shared(bare("llama"))
    texts = rows("clean")
    whole, part = found["e_kept"], found["e_one"]
    assert len(whole.measures) == len(part.measures) == 2
    for number, text in enumerate(texts):
        scores = score_graph(attribute(GraphPrompt(model, given, text.ids)))
        values = [measure.patched[0, number] for measure in whole.measures]
        np.testing.assert_allclose(values, scores, atol=1e-4)
        ends = [2, len(text.ids)]
        for cell, end in enumerate(ends):
            scores = score_graph(attribute(GraphPrompt(model, {0: given[0]}, text.ids[:end])))
            values = [measure.patched[cell, number] for measure in part.measures]
            np.testing.assert_allclose(values, scores, atol=1e-4)
            assert 0.01 < scores[0] < 0.99


def test_graph_toward_a_measure_uses_the_answers_of_each_row(data: Path) -> None:
    """By a name of the file, or written out; another measure has other scores in the store."""
    given, _ = transcoders("llama", "transcoder", data, [0, 2])
    named = EVERY.replace("logits", "logits toward ld")
    metric = "metric ld = logit(answer) - logit(wrong)\n"
    other = EVERY.replace("logits", "logits toward logprob(wrong)")
    text = T0 + T2 + metric + lines(named, "kept") + lines(other, "other").replace("kept", "rest")
    found = run_file(text, data, "llama", "planned")
    model = shared(bare("llama"))
    for number, (row, record) in enumerate(zip(rows("clean"), ROWS, strict=True)):
        good, bad = (ids_of([record[name]])[-1] for name in ("a", "b"))
        measures: dict[str, LogitMeasure] = {
            "e_kept": lambda own, good=good, bad=bad: own[good] - own[bad],
            "e_other": lambda own, bad=bad: own.log_softmax(-1)[bad],
        }
        for name, measure in measures.items():
            expected = score_graph(attribute(GraphPrompt(model, given, row.ids, measure)))
            values = [each.patched[0, number] for each in found[name].measures]
            np.testing.assert_allclose(values, expected, atol=1e-4)
    written = EVERY.replace("logits", "logits toward answer - wrong")
    again = run_file(T0 + T2 + lines(written, "kept"), data, "llama", "planned")["e_kept"]
    same = [found["e_kept"].measures[0].patched, again.measures[0].patched]
    np.testing.assert_allclose(same[0], same[1])
    assert not np.allclose(same[0], found["e_other"].measures[0].patched, atol=1e-3)
    said = found["e_kept"].conventions["graph"]
    assert "the target is `logit(answer) - logit(wrong)`, to first order" in said


def test_graph_ablation_ablates_the_top_features_of_each_prompt(data: Path) -> None:
    given, _ = transcoders("llama", "transcoder", data, [0, 2])
    line = "observe graph_ablation(t0, t2) logits toward answer - wrong at last token top 3 as cut"
    text = T0 + T2 + experiment("e", line, measure="")
    found = run_file(text, data, "llama", "planned")["e"]
    assert [measure.label for measure in found.measures] == ["cut", "cut predicted", "cut random"]
    model = shared(bare("llama"))
    for number, (row, record) in enumerate(zip(rows("clean"), ROWS, strict=True)):
        good, bad = (ids_of([record[name]])[-1] for name in ("a", "b"))
        of = GraphPrompt(model, given, row.ids, lambda own, a=good, b=bad: own[a] - own[b])
        graph = attribute(of)
        chosen = list_influential(graph, 3)
        logits = ablate_nodes(of, [graph.features.some(chosen)])
        change = (logits[1] - logits[0])[good] - (logits[1] - logits[0])[bad]
        values = [measure.patched[0, number] for measure in found.measures]
        assert values[0] == pytest.approx(float(change), abs=1e-4)
        assert values[1] == pytest.approx(predict_ablation(graph, chosen), abs=1e-4)
        assert abs(values[2]) > 0
    again = run_file(text, data, "llama", "planned")["e"]
    np.testing.assert_array_equal(again.measures[2].patched, found.measures[2].patched)
    assert "the 3 features of each prompt" in found.conventions["observed"]


def test_graph_scores_depend_on_the_transcoder(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    text = T0 + T2 + lines(EVERY, "kept")
    first = run_file(text, data, "llama", "planned")["e_kept"]
    transcoders("llama", "jumprelu_transcoder", data, [0, 2])
    other = run_file(text, data, "llama", "planned")["e_kept"]
    assert not np.allclose(first.measures[0].patched, other.measures[0].patched, atol=1e-3)


@pytest.mark.slow
def test_stored_graph_scores_depend_on_the_transcoder(data: Path, tmp_path: Path) -> None:
    path = data / "graph.mech"
    text = f'mech 1\nmodel m = local("from Python")\n{PROMPTS}\n' + T0 + T2 + lines(EVERY, "kept")
    path.write_text(text, encoding="utf-8")
    models = {"m": (bare("llama"), word_tokenizer())}

    def score(store: Path | None) -> Floats:
        return mechdsl.run(path, models=models, store=store)["e_kept"].measures[0].patched

    transcoders("llama", "transcoder", data, [0, 2])
    first = score(tmp_path / "store")
    transcoders("llama", "jumprelu_transcoder", data, [0, 2])
    other = score(tmp_path / "store")
    np.testing.assert_allclose(other, score(None), atol=1e-5)
    assert np.abs(other - first).max() > 1e-3


BAD = {
    "no transcoder": ("observe attribution_graph logits at last token as g", "E0207"),
    "a number": ("observe attribution_graph(3) logits at last token as g", "E0207"),
    "another site": (
        "observe attribution_graph(t0) resid_post layer 1 at last token as g",
        "E0207",
    ),
    "toward a rank": (
        "observe attribution_graph(t0) logits toward rank(answer) at last token as g",
        "E0207",
    ),
    "toward a distance": (
        "observe attribution_graph(t0) logits toward kl(other) at last token as g",
        "E0207",
    ),
    "toward a text": (
        'observe attribution_graph(t0) logits toward logprob(" w1 w2") at last token as g',
        "E0207",
    ),
    "toward an unknown name": (
        "observe attribution_graph(t0) logits toward answr at last token as g",
        "E0516",
    ),
    "another option": (
        "observe attribution_graph(t0, size: 3) logits at last token as g",
        "E0207",
    ),
    "pruned, but not drawn": (
        "observe attribution_graph(t0, nodes: 90%) logits at last token as g",
        "E0207",
    ),
    "ablation without a measure": (
        "observe graph_ablation(t0) logits at last token top 3 as g",
        "E0207",
    ),
    "ablation without a number": (
        "observe graph_ablation(t0) logits toward answer at last token as g",
        "E0207",
    ),
    "several tokens": ("observe attribution_graph(t0) logits at item tokens as g", "E0207"),
    "unknown name": ("observe attribution_graph(t9) logits at last token as g", "E0201"),
    "twice": ("observe attribution_graph(t0, t0) logits at last token as g", "E0342"),
    "another basis": ("observe attribution_graph(r) logits at last token as g", "E0342"),
    "two cross-layer transcoders": (
        "observe attribution_graph(t0, c) logits at last token as g",
        "E0342",
    ),
    "a cross-layer transcoder of another model": (
        "observe attribution_graph(c) logits at last token as g",
        "E0342",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_attribution_graphs_are_errors(name: str, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0])
    make_cross_layer(data, frozen("llama").start.shape[-1], layers=2)
    bases = {
        "t0": T0,
        "r": "basis r = random(dims: 3) at mlp_out layer 1\n",
        "c": 'basis c = transcoder("clt") at mlp_out layer 1\n',
    }
    line, code = BAD[name]
    used = "".join(text for key, text in bases.items() if f"({key}" in line or f"{key})" in line)
    assert codes(used + experiment("e", line, measure=""), data) == [code]


def test_attribution_graph_in_an_experiment_with_rules_is_an_error(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0])
    line = "observe attribution_graph(t0) logits at last token as g"
    rule = "ablate z layer 0 head 1 at last token with zero"
    assert "E0207" in codes(T0 + experiment("e", line, rule, measure=""), data)


def test_graph_report_shows_and_saves_the_pruned_graph_of_one_row(data: Path) -> None:
    """The terminal, a picture and the JSON of circuit-tracer have the pruned graph."""
    given, _ = transcoders("llama", "transcoder", data, [0, 2])
    text = T0 + T2 + experiment("e", EVERY, "report graph", measure="")
    found = run_file(text, data, "llama", "planned")["e"]
    circuit = found.circuit
    assert circuit is not None
    assert circuit.graph is not None
    graph = attribute(
        GraphPrompt(shared(bare("llama")), given, rows("clean")[circuit.graph.row].ids)
    )
    nodes, edges = prune_graph(graph, 0.8, 0.98)
    assert len(circuit.graph.nodes) == int(nodes.sum()) + len(graph.logits)
    expected = sorted(graph.edges[edges].tolist())
    np.testing.assert_allclose(sorted(circuit.scores), expected, atol=1e-4)
    assert circuit.total == np.count_nonzero(graph.edges)
    report = next(each for each in found.reports if each.kind == "graph")
    graph_report.save(found, report, data / "g.json")
    content = json.loads((data / "g.json").read_text(encoding="utf-8"))
    assert len(content["nodes"]) == len(circuit.graph.nodes)
    names = {node["node_id"]: node for node in content["nodes"]}
    assert len(names) == len(content["nodes"])
    weights = {(e["source"], e["target"]): e["weight"] for e in content["links"]}
    assert len(weights) == len(circuit.edges)
    assert sum(node["is_target_logit"] for node in content["nodes"]) == 1
    for source, target in weights:
        assert names[source]["ctx_idx"] <= names[target]["ctx_idx"]
    for node in content["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, feature, token = map(int, node["node_id"].split("_"))
            own = graph.features
            there = (own.layer == layer) & (own.feature == feature) & (own.token == token)
            assert own.activation[there].item() == pytest.approx(node["activation"], abs=1e-4)
            assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
    assert_viewer_reads(content, graph)
    graph_report.save(found, report, data / "g.svg")
    drawn = (data / "g.svg").read_text(encoding="utf-8")
    assert drawn.count('class="edge"') == min(200, len(circuit.edges))
    assert drawn.count('class="node"') <= len(circuit.graph.nodes)
    console = Console(width=100, record=True, file=io.StringIO())
    graph_report.render(found, report, console)
    said = " ".join(console.export_text().split())
    assert "e: attribution graph kept" in said
    assert f"edges of the graph of row {circuit.graph.row}; 20 shown" in said
    assert "without nodes and edges of little influence" in said


def assert_viewer_reads(content: dict[str, Any], graph: AttributionGraph) -> None:
    """The texts and shares that the viewer of circuit-tracer depends on."""
    logits = [node for node in content["nodes"] if node["feature_type"] == "logit"]
    for own in logits:
        assert own["clerp"].split('"')[2] == f" (p={own['token_prob']:.3f})"
    shares = sorted(graph.influence, reverse=True)
    sums = [sum(shares[: n + 1]) / sum(shares) for n in range(len(shares))]
    for own in content["nodes"]:
        nearest = min(abs(own["influence"] - each) for each in sums)
        assert own["influence"] == 1 if own in logits else nearest < 1e-5
    features = [node for node in content["nodes"] if node["activation"] is not None]
    assert all(0 < node["influence"] <= 0.81 + shares[0] / sum(shares) for node in features)


def test_graph_toward_a_measure_is_drawn_with_one_target(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    line = EVERY.replace("logits", "logits toward answer - wrong").replace("t2)", "t2, nodes: 95%)")
    text = T0 + T2 + experiment("e", line, "report graph", measure="")
    found = run_file(text, data, "llama", "planned")["e"]
    report = next(each for each in found.reports if each.kind == "graph")
    assert (
        "until they have 95% of it, edges until they have 98%" in found.conventions["drawn graph"]
    )
    graph_report.save(found, report, data / "m.json")
    nodes = json.loads((data / "m.json").read_text(encoding="utf-8"))["nodes"]
    (target,) = [node for node in nodes if node["feature_type"] == "logit"]
    assert target["clerp"] == 'Output "answer - wrong" (p=1.000)'
    assert target["is_target_logit"]
    assert found.circuit is not None
    assert {receiver for _, receiver in found.circuit.edges if "L" not in receiver} == {"target"}
    graph_report.save(found, report, data / "m.svg")
    assert ">answer - wrong<" in (data / "m.svg").read_text(encoding="utf-8")


def test_graph_has_no_drawing_without_a_report(data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    found = run_file(T0 + T2 + lines(EVERY, "kept"), data, "llama", "planned")["e_kept"]
    assert found.circuit is None


# --- groups of features ---------------------------------------------------------------------------

CROSS = "".join(f'basis t{n} = transcoder("clt") at mlp_out layer {n}\n' for n in (0, 2))
GROUPS = "group a = features 1, 3 of t0, feature 6 of t2\ngroup b = features 2, 4, 5 of t2\n"
FROM, TO = {0: [1, 3], 2: [6]}, {2: [2, 4, 5]}
WEIGHT = "observe graph_weight(t0, t2, {}) logits toward answer - wrong at last token as {}"


def sum_of_edges(
    family: str, ids: Sequence[int], own: dict[int, Any], ends: tuple[int, int]
) -> tuple[float, float]:
    """The changes of the inputs of b's active features and of logit differences without the output
    of the features of a: the frozen model is linear."""
    reference = Frozen(family, ids)
    before, logits = reference.run_inputs()
    removed: dict[int | None, Tensor] = {}
    for layer, features in FROM.items():
        codes = own[layer].encode(before[layer])[:, features]
        crosses = isinstance(own[layer], Crossing)
        made = own[layer].writes(features) if crosses else own[layer].weights["W_dec"][features]
        for later, rows_of in enumerate(made.unbind(1) if crosses else [made]):
            removed[layer + later] = removed.get(layer + later, 0.0) - (codes @ rows_of)[None]
    after, ablated = reference.run_inputs(removed)
    total = 0.0
    for layer, features in TO.items():
        active = own[layer].encode(before[layer])[:, features] > 0
        change = (before[layer] - after[layer]) @ own[layer].weights["W_enc"][:, features]
        total += float((change * active).sum())
    good, bad = ends
    change = logits - ablated
    return total, float(change[good] - change[bad])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "transcoder"), ("gpt2", "jumprelu_transcoder"), ("gpt2", "cross_layer"),
     pytest.param("gpt_neox", "sparsify", marks=pytest.mark.slow)],
)  # fmt: skip
def test_weight_between_groups_is_the_sum_of_the_edges(family: str, kind: str, data: Path) -> None:
    """Of each row, between groups and to the target, in two experiments of a file."""
    _, own = transcoders(family, kind, data, [0, 2])
    text = (CROSS if kind == "cross_layer" else T0 + T2) + GROUPS
    for name, groups in (("inner", "from: a, to: b"), ("ends", "from: a")):
        text += experiment(name, WEIGHT.format(groups, f"of_{name}"), measure="")
    found = run_file(text, data, family, "planned")
    sizes: list[float] = []
    for number, (row, record) in enumerate(zip(rows("clean"), ROWS, strict=True)):
        good, bad = (ids_of([record[name]])[-1] for name in ("a", "b"))
        expected = sum_of_edges(family, row.ids, own, (good, bad))
        values = [found[name].measures[0].patched[0, number] for name in ("inner", "ends")]
        np.testing.assert_allclose(values, expected, atol=1e-3, rtol=1e-3)
        sizes += map(abs, expected)
    assert max(sizes) > 0.1
    observed = found["inner"].conventions["observed"]
    assert "from the features of `a` (3 features) to those of `b` (3 features)" in observed


@pytest.mark.slow
def test_random_control_of_all_but_one_feature_uses_the_remaining_feature(data: Path) -> None:
    """If the group has all features of a layer but one, the control has that feature."""
    transcoders("llama", "transcoder", data, [0, 2])
    groups = "group a = features 0..10 of t0\ngroup c = feature 11 of t0\n"
    lines = [WEIGHT.format(f"from: {name}", f"of_{name}") for name in "ac"]
    text = (
        T0 + T2 + groups + "".join(experiment(f"e{n}", e, measure="") for n, e in enumerate(lines))
    )
    found = run_file(text, data, "llama", "planned")
    control = found["e0"].measures[1].patched
    np.testing.assert_allclose(control, found["e1"].measures[0].patched, atol=1e-6)
    assert np.abs(control).max() > 1e-3


def test_features_of_groups_are_nodes_in_large_graphs(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    text = T0 + T2 + GROUPS + experiment("e", WEIGHT.format("from: a, to: b", "w"), measure="")
    whole = run_file(text, data, "llama", "planned")["e"].measures[0].patched
    monkeypatch.setattr(attribution_graphs, "MOST_FEATURES", 5)
    part = run_file(text, data, "llama", "planned")["e"].measures[0].patched
    np.testing.assert_allclose(part, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "transcoder"), ("gemma2", "sparsify"), ("gpt2", "cross_layer"),
     ("gemma2", "cross_layer")],
)  # fmt: skip
def test_features_of_a_group_are_ablated_where_they_are_active(
    family: str, kind: str, data: Path
) -> None:
    given, own = transcoders(family, kind, data, [0, 2])
    line = "observe graph_ablation(t0, t2, features: a) logits toward answer - wrong at last token"
    text = CROSS if kind == "cross_layer" else T0 + T2
    text += GROUPS + experiment("e", line + " as cut", measure="")
    found = run_file(text, data, family, "planned")["e"]
    cut, predicted, random = (measure.patched[0] for measure in found.measures)
    row, record = rows("clean")[0], ROWS[0]
    assert row.ids == IDS
    good, bad = (ids_of([record[name]])[-1] for name in ("a", "b"))
    measured = GraphPrompt(
        shared(bare(family)), given, IDS, lambda logits: logits[good] - logits[bad]
    )
    graph = attribute(measured)
    members = [
        number
        for number, (layer, _, feature) in enumerate(named(graph.features))
        if feature in FROM[layer]
    ]
    nodes = graph.features.some(np.array(members))
    change = (
        without_features(family, own, nodes)
        - double(family)(torch.tensor([IDS])).logits[0, -1].detach()
    )
    assert cut[0] == pytest.approx(float(change[good] - change[bad]), abs=1e-3)
    assert predicted[0] == pytest.approx(predict_ablation(graph, np.array(members)), abs=1e-4)
    assert abs(cut[0]) > 0.01
    assert abs(random[0]) > 0
    assert "the features of `a` (3 features) are set to 0" in found.conventions["observed"]


@pytest.mark.parametrize(("family", "kind"), [("llama", "transcoder"), ("gpt2", "cross_layer")])
def test_drawn_supernodes_have_the_sums_of_their_edges(family: str, kind: str, data: Path) -> None:
    """Those of each layer; the JSON has the features, which a group can read."""
    transcoders(family, kind, data, [0, 2])
    bases = CROSS if kind == "cross_layer" else T0 + T2
    groups = "group a = features 1, 9 of t0, feature 6 of t2\ngroup b = features 2, 3, 4 of t2\n"
    options = "t2, supernodes: [a, b], nodes: 100%, edges: 100%)"
    line = EVERY.replace("t2)", options)
    text = bases + groups + experiment("e", line, "report graph", measure="")
    found = run_file(text, data, family, "planned")["e"]
    report = next(each for each in found.reports if each.kind == "graph")
    members = {"L0.f1": "L0.a", "L0.f9": "L0.a", "L2.f6": "L2.a"}
    members |= {f"L2.f{number}": "L2.b" for number in (2, 3, 4)}
    assert found.circuit is not None
    expected: dict[tuple[str, str], float] = {}
    for (of, to), score in zip(found.circuit.edges, found.circuit.scores, strict=True):
        pair = (members.get(of.split("@")[0], of), members.get(to.split("@")[0], to))
        expected[pair] = expected.get(pair, 0.0) + score
    picture = graph_report.picture_of(found, 10_000)
    assert picture is not None
    drawn = {(e.sender.label, e.receiver.label): e.score for e in picture.edges}
    assert drawn == pytest.approx(expected)
    assert ("L0.a", "L2.b") in drawn
    assert any("edges of a supernode's features in one layer" in note for note in picture.notes)
    graph_report.save(found, report, data / "s.svg")
    assert "a (" in (data / "s.svg").read_text(encoding="utf-8")
    graph_report.save(found, report, data / "s.json")
    options = json.loads((data / "s.json").read_text(encoding="utf-8"))["qParams"]
    assert [each[0] for each in options["supernodes"]] == ["a", "b"]
    assert options["pinnedIds"] == [name for each in options["supernodes"] for name in each[1:]]
    read = 'group c = saved("s.json", "b", t0, t2)\n'
    line, measure = "ablate {0} at tokens * with zero", DIFFERENCE
    if kind == "cross_layer":  # rules don't change its features
        line, measure = WEIGHT.format("from: {0}", "of_{0}"), ""
    text = bases + groups + read
    for name, group in (("f", "c"), ("g", "b")):
        text += experiment(name, line.format(group), measure=measure)
    again = run_file(text, data, family, "planned")
    np.testing.assert_array_equal(again["f"].measures[0].patched, again["g"].measures[0].patched)


def test_graph_weight_of_a_ranked_group_uses_the_top_features(data: Path) -> None:
    """The group names features that another experiment of the file ranks."""
    transcoders("llama", "transcoder", data, [0, 2])
    seen = experiment("seen", "observe features of t0 at tokens * top 6", measure="", stats="")
    weight = experiment("e", WEIGHT.format("from: a", "w"), measure="")
    picked = "group a = features top 2 of seen of t0, feature 6 of t2\n"
    found = run_file(T0 + T2 + picked + weight + seen, data, "llama", "planned")
    best = [int(cell.coords["feature"]) for cell in found["seen"].cells[:2]]
    listed = f"group a = features {best[0]}, {best[1]} of t0, feature 6 of t2\n"
    other = run_file(T0 + T2 + listed + weight, data, "llama", "planned")
    np.testing.assert_allclose(
        found["e"].measures[0].patched, other["e"].measures[0].patched, atol=1e-6
    )


@pytest.mark.parametrize("sign", ["", "-"])
def test_ablation_of_features_ranked_by_sign_is_no_error(sign: str, data: Path) -> None:
    """With one of the signs, the largest effects are negative, which is a warning."""
    transcoders("llama", "transcoder", data, [0, 2])
    effect = f"measure {sign}logit(answer) as delta"
    ranked = experiment("r", "ablate feature * of t0 at last token with zero", measure=effect)
    ablated = "observe graph_ablation(t0, t2, features: a) logits toward answer at last token"
    picked = "group a = features top 2 of r of t0\n"
    used = experiment("e", ablated, measure="")
    found = run_file(T0 + T2 + picked + ranked + used, data, "llama", "planned")
    assert np.isfinite(found["e"].measures[0].patched).all()


WRONG_GROUPS = {
    "no group to read from": (WEIGHT.format("to: b", "w"), "needs a group of features"),
    "an unknown group": (WEIGHT.format("from: d", "w"), "`d` isn't a group of features"),
    "a group of heads": (WEIGHT.format("from: h", "w"), "`h` isn't a group of features"),
    "a list": (WEIGHT.format("from: [a, b]", "w"), "`[a, b]` isn't a group of features"),
    "another option": (WEIGHT.format("form: a", "w"), "has no option `form`"),
    "a basis that isn't named": (
        WEIGHT.replace("t0, t2", "t0").format("from: a", "w"),
        "`a` has features of `t2`, which isn't in the graph",
    ),
    "a feature beyond the basis": (
        WEIGHT.format("from: far", "w"),
        "feature 99 does not exist in `t0`",
    ),
    "ablation of both": (
        "observe graph_ablation(t0, t2, features: a) logits toward answer at last token top 3 as w",
        "takes `top` or `features`",
    ),
    "supernodes, but no graph": (
        "observe attribution_graph(t0, t2, supernodes: a) logits at last token as w",
        "`supernodes` are those of a graph that is drawn, and none is",
    ),
    "supernodes with common features": (
        "observe attribution_graph(t0, t2, supernodes: [a, same]) logits at last token as w\n"
        "  report graph",
        "`same` has features in common with `a`",
    ),
}


@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_invalid_graph_group_is_an_error(name: str, data: Path) -> None:
    transcoders("llama", "transcoder", data, [0, 2])
    line, reason = WRONG_GROUPS[name]
    groups = GROUPS + "group h = L0H1\ngroup far = feature 99 of t0\ngroup same = feature 1 of t0\n"
    _, found = try_file(T0 + T2 + groups + experiment("e", line, measure=""), data, "llama")
    errors = [each for each in found if each.severity == "error"]
    assert len(errors) == 1
    assert errors[0].code == ("E0301" if "99" in reason else "E0207")
    assert reason in errors[0].message


def test_supernodes_of_ranked_features_may_share_placeholders(tmp_path: Path) -> None:
    """Until the experiments that rank them have run, all groups have the first features."""
    path, site = tmp_path / "file.mech", "at mlp_out layer 0 at tokens *"
    seen = "".join(
        f"experiment at_{word} {{\n  prompts ioi.test limit 12\n"
        f"  observe features of t0 at {word} token\n}}\n"
        f"group {word}s = features top 2 of at_{word} of t0\n"
        for word in ("cue", "place")
    )
    path.write_text(
        f"""mech 1
model lm = zoo("names")
prompts ioi {{
  name in ["Mary", "John", "Tom", "Anna", "Luke"]
  where in ["shop", "park", "school", "store", "office", "station"]
  template "When {{name}} went to the {{place = where}}, {{cue = name}} gave a bag to"
  answer " Mary"
  split 50%
}}
basis t0 = fit(transcoder(features: 128, k: 8), prompts: ioi.train, steps: 5) {site}
{seen}
experiment drawn {{
  prompts ioi.test limit 12
  observe attribution_graph(t0, supernodes: [cues, places]) logits at last token as explained
  report graph to "g.html"
}}
""",
        encoding="utf-8",
    )
    assert not mechdsl.validate(path).errors
