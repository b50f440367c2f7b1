"""Attribution graphs: how features, errors and tokens contribute to each other and to logits.

The output of each MLP is the reconstruction by a transcoder plus an error. With the patterns of
attention and the sizes that norms divide by held constant, the input of each feature and each logit
is then a linear function of what features, errors and tokens add to the residual stream (Ameisen et
al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.dictionaries.features import Dictionary
from mechdsl.dictionaries.folder import SKIP
from mechdsl.execute.measurement.values import GraphFindings, GraphNode
from mechdsl.execute.vectors import OutputMap
from mechdsl.forward.hooks.backward_rules import AutogradFailed
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, indices_to_device
from mechdsl.forward.hooks.coordinates import CoordinateWrite
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.unembedding import uncap_logits
from mechdsl.program.estimators import BackwardRules
from mechdsl.program.group_files import LayerFeature
from mechdsl.rules.observations.graphs import LOGIT_SHARE, MOST_FEATURES, MOST_LOGITS

FROZEN = BackwardRules(fixed_norms=True, constant_patterns=True)
"""Derivatives of a pass in which norms and patterns are constants."""

LANES = 16
"""Targets of a backward pass."""
RANKED = 16 * LANES
"""Features that are selected at a time, where there are too many."""


@dataclass(frozen=True, eq=False)
class FeatureNodes:
    """The active features of a prompt, by layer and token."""

    layer: Ints
    token: Ints
    feature: Ints
    activation: Floats

    def __len__(self) -> int:
        return len(self.layer)

    def some(self, chosen: Ints) -> FeatureNodes:
        """Select some of the features."""
        places = self.layer[chosen], self.token[chosen], self.feature[chosen]
        return FeatureNodes(*places, self.activation[chosen])

    def find(self, chosen: Collection[LayerFeature]) -> Ints:
        """Return the numbers of the nodes of some features, at all tokens."""
        places = zip(self.layer.tolist(), self.feature.tolist(), strict=True)
        numbers = [n for n, place in enumerate(places) if place in chosen]
        return np.array(numbers, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The graph of one prompt. Nodes are its features, then the errors of each layer and token,
    then tokens, then logits. Features and logits are targets; all nodes but logits are sources."""

    features: FeatureNodes
    layers: int
    tokens: int
    logits: Ints
    """Token numbers of the logits that are explained; of a measure, the size of the vocabulary."""
    probabilities: Floats
    """Those of the logits; 1 for a measure."""
    edges: Floats
    """[target, source] the signed part of the target's input that comes from the source."""
    inputs: Floats
    """[target] the value that the edges into it explain, with constants left out."""
    left_out: int = 0
    """Active features that count as errors, because there are too many."""

    @property
    def first_error(self) -> int:
        """Number of the first error; errors of a layer follow each other."""
        return len(self.features)

    @property
    def first_token(self) -> int:
        """Number of the first token."""
        return self.first_error + self.layers * self.tokens

    @property
    def first_logit(self) -> int:
        """Number of the first logit."""
        return self.first_token + self.tokens

    @cached_property
    def influence(self) -> Floats:
        """[source] the influence on the weighted targets along all paths."""
        return compute_influence(normalise_edges(self.edges), self.probabilities)


# --- transcoders ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GraphTranscoder:
    """The features of one layer in a graph."""

    site: str
    """What they are encoded from."""
    dictionary: Dictionary
    decoders: Tensor
    """[layer, feature, width] what a feature of 1 adds to the outputs of the MLPs of this layer and
    later ones; of one layer unless the transcoder crosses layers."""

    @staticmethod
    def of(site: str, dictionary: Dictionary, decoders: Tensor | None = None) -> GraphTranscoder:
        """Create it from the decoders of `load_cross_decoder`, if it crosses layers."""
        row = dictionary.rows()[None] if decoders is None else decoders.transpose(0, 1)
        return GraphTranscoder(site, dictionary, row)

    @property
    def skip(self) -> Tensor | None:
        """[out, in] what is added to the output of the MLP as a linear function of its input."""
        return self.dictionary.tensor(SKIP)


# --- edges ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sources:
    """What a prompt adds to its residual stream."""

    layers: int
    embedded: Tensor
    """[token, width] the stream that enters the first block."""
    outputs: Tensor
    """[layer, token, width] of MLPs."""
    errors: Tensor
    """[layer, token, width]: outputs without their reconstructions."""
    nodes: FeatureNodes
    written: Sequence[tuple[int, Tensor, Tensor]]
    """(number of layers after that of the features, [k] numbers of features, [k, width] activation
    times the direction of the decoder)."""
    bypassed: Mapping[int, Tensor]
    """By layer, the part of the output that a skip connection adds, [token, width]."""

    def contributions(self, embedded: Tensor, outputs: Tensor) -> Tensor:
        """Return [target, source] from gradients [target, token, width] at the stream that enters
        the first block, and [target, layer, token, width] at the outputs of MLPs."""
        layer, token = torch.from_numpy(self.nodes.layer), torch.from_numpy(self.nodes.token)
        of_features = outputs.new_zeros(len(outputs), len(layer))
        for later, which, vectors in self.written:
            at = outputs[:, layer[which] + later, token[which]]
            of_features[:, which] += torch.einsum("tnw,nw->tn", at, vectors)
        of_errors = torch.einsum("tlpw,lpw->tlp", outputs, self.errors).flatten(1)
        of_tokens = torch.einsum("tpw,pw->tp", embedded, self.embedded)
        return torch.cat([of_features, of_errors, of_tokens], dim=1)


@dataclass(frozen=True, eq=False)
class _Targets:
    """Sums of logits that a graph explains."""

    numbers: Ints
    probabilities: Floats
    weights: Tensor
    """[target, vocab] of logits before the model's cap."""


LogitMeasure: TypeAlias = Callable[[Tensor], Tensor]
"""Returns a number for logits [vocab]."""


@dataclass(frozen=True, eq=False)
class GraphPrompt:
    """A prompt whose graph is computed."""

    model: LoadedModel
    transcoders: Mapping[int, GraphTranscoder]
    """By layer."""
    ids: Sequence[int]
    measure: LogitMeasure | None = None
    """Explained to first order in the logits; None: the likeliest next tokens."""
    seed: int = 0
    """Of random features."""
    kept: Collection[LayerFeature] = ()
    """Features that are nodes where they are active, however small their influence."""


def attribute(prompt: GraphPrompt) -> AttributionGraph:
    """Compute the graph of the likeliest next tokens of a prompt, or of a measure.

    Returns:
        The graph. With more than `MOST_FEATURES` active features, those of the most influence are
        its nodes, and the contributions of the others belong to the errors of their layer and
        token.

    Raises:
        ValueError: A norm of the model can't be held constant.
    """
    frozen, targets, _ = _freeze(prompt)
    ends, values = frozen.explain_logits(targets.weights)
    sources, weights, ids = frozen.sources, targets.probabilities, prompt.ids
    every = np.arange(len(sources.nodes))
    chosen, kept = every, sources.nodes.find(prompt.kept)
    if len(every) > MOST_FEATURES:
        chosen = _select_features(frozen, ends, weights, kept)
    rows, inputs = frozen.explain_features(chosen)
    parts = np.concatenate([rows, ends]).T  # of each source
    others = np.setdiff1d(every, chosen)
    errors = len(every) + sources.nodes.layer[others] * len(ids) + sources.nodes.token[others]
    np.add.at(parts, errors, parts[others])
    return AttributionGraph(
        sources.nodes.some(chosen),
        sources.layers,
        len(ids),
        targets.numbers,
        weights,
        np.delete(parts, others, axis=0).T,
        np.concatenate([inputs, values]),
        len(others),
    )


def weigh_features(prompt: GraphPrompt) -> tuple[dict[LayerFeature, float], Tensor]:
    """Return the sum of the edges from each active feature, at all tokens, to the targets of a
    prompt's graph, and the logits [vocab] of the next token. Raises ValueError as `attribute`."""
    frozen, targets, logits = _freeze(prompt)
    ends, _ = frozen.explain_logits(targets.weights)
    nodes, features = frozen.sources.nodes, dict[LayerFeature, float]()
    weights = targets.probabilities @ ends[:, : len(nodes)]
    places = zip(nodes.layer.tolist(), nodes.feature.tolist(), strict=True)
    for place, weight in zip(places, weights.tolist(), strict=True):
        features[place] = features.get(place, 0.0) + weight
    return features, logits


def _freeze(prompt: GraphPrompt) -> tuple[_FrozenPass, _Targets, Tensor]:
    """Return a frozen pass of a prompt, the targets of its graph, and the logits [vocab] of the
    next token. Raises ValueError if a norm of the model can't be held constant."""
    model, ids, transcoders = prompt.model, prompt.ids, prompt.transcoders
    batch = Batch.of([ids], model.pad_id, model.calling.side, model.device)
    last, measure = batch.lengths[:, None] - 1, prompt.measure
    sources, logits = _read_sources(model, batch, last, transcoders)
    targets = _list_likely(logits) if measure is None else _differentiate(model, logits, measure)
    try:
        return _FrozenPass.of(model, batch, last, sources, transcoders), targets, logits
    except AutogradFailed as failure:
        raise ValueError(f"norms and patterns can't be held constant: {failure}") from failure


def _select_features(frozen: _FrozenPass, ends: Floats, probabilities: Floats, kept: Ints) -> Ints:
    """Return some features, and those of the most influence, as far as the edges into those that
    are already selected show it."""
    count = len(frozen.sources.nodes)
    chosen, rows = kept, frozen.explain_features(kept)[0]
    while len(chosen) < MOST_FEATURES:
        shares = normalise_edges(np.concatenate([rows, ends]))
        influence = compute_influence(shares, probabilities, chosen)
        influence[chosen] = -1
        most = min(RANKED, MOST_FEATURES - len(chosen))
        added = np.argsort(-influence[:count], kind="stable")[:most]
        chosen = np.concatenate([chosen, added])
        rows = np.concatenate([rows, frozen.explain_features(added)[0]])
    return np.sort(chosen)


def _stream(layers: int) -> tuple[SiteRead, list[SiteRead]]:
    """Return the sites that nodes write at: the first block's input, and each MLP's output."""
    return SiteRead("resid_pre", 0), [SiteRead("mlp_out", layer) for layer in range(layers)]


def _read_sources(
    model: LoadedModel,
    batch: Batch,
    last: Tensor,
    transcoders: Mapping[int, GraphTranscoder],
) -> tuple[_Sources, Tensor]:
    """Return the sources of a prompt, and the logits [vocab] of the next token."""
    layers = model.shape.n_layers
    entering, writing = _stream(layers)
    reading = {layer: SiteRead(transcoder.site, layer) for layer, transcoder in transcoders.items()}
    plain = run_full(model, batch, reads=[entering, *writing, *reading.values()], logits_at=last)
    outputs = torch.stack([_vectors(plain, each) for each in writing])
    errors, written = outputs.clone(), list[tuple[int, Tensor, Tensor]]()
    bypassed, count = dict[int, Tensor](), 0
    found: list[tuple[Ints, Ints, Ints, Floats]] = []
    for layer, transcoder in sorted(transcoders.items()):
        vectors = _vectors(plain, reading[layer])
        active = transcoder.dictionary.encode(vectors)
        token, feature = (each.cpu().numpy() for each in active.nonzero(as_tuple=True))
        amount = active[active != 0]
        found.append((np.full(len(token), layer), token, feature, amount.double().cpu().numpy()))
        which = torch.arange(count, count + len(token))
        count += len(token)
        for later, decoder in enumerate(transcoder.decoders):
            directions = decoder.to(outputs)
            errors[layer + later] -= active @ directions
            written.append((later, which, amount[:, None] * directions[torch.from_numpy(feature)]))
        bias = transcoder.dictionary.tensor("b_dec")
        assert bias is not None
        errors[layer] -= bias.to(outputs)
        if transcoder.skip is not None:
            bypassed[layer] = vectors @ transcoder.skip.to(outputs).T
            errors[layer] -= bypassed[layer]
    nodes = FeatureNodes(*(np.concatenate(each) for each in zip(*found, strict=True)))
    assert plain.logits is not None
    embedded = _vectors(plain, entering)
    sources = _Sources(layers, embedded, outputs, errors, nodes, written, bypassed)
    return sources, plain.logits[0, 0]


def _list_likely(logits: Tensor) -> _Targets:
    """Return the likeliest next tokens."""
    chances = logits.double().softmax(-1)
    ranked = chances.topk(min(MOST_LOGITS, len(chances)))
    kept = 1 + int((ranked.values.cumsum(0) < LOGIT_SHARE).sum())
    likely, shares = ranked.indices[:kept], ranked.values[:kept]
    weights = torch.eye(len(likely), device=logits.device)
    less_mean = torch.full((len(likely), len(chances)), -1 / len(chances)).to(weights)
    weights = less_mean.index_add(1, likely, weights)
    return _Targets(likely.cpu().numpy(), shares.cpu().numpy(), weights)


def _differentiate(model: LoadedModel, logits: Tensor, measure: LogitMeasure) -> _Targets:
    """Return a measure to first order. Raises ValueError without a finite gradient."""
    with torch.enable_grad():
        capped = logits.clone().float().requires_grad_()
        (gradient,) = torch.autograd.grad(measure(capped), capped)
        (slopes,) = torch.autograd.grad(uncap_logits(model, capped).sum(), capped)
    weights = gradient / slopes
    if not bool(weights.isfinite().all()) or not bool(weights.any()):
        raise ValueError("the gradient of the measure is 0, or isn't finite")
    return _Targets(np.array([len(logits)]), np.ones(1), weights[None])


def _vectors(result: FullPassResult, place: SiteRead) -> Tensor:
    """Return [token, width] of the first row, at least in 32 bits."""
    read = result.reads[place][0, :, 0]
    return read.to(torch.promote_types(read.dtype, torch.float32)).clone()


@dataclass(frozen=True, eq=False)
class _FrozenPass:
    """A pass of the prompt in several lanes, with constant norms and patterns, in which the first
    block's input and the outputs of MLPs are leaves. What skip connections add is computed."""

    model: LoadedModel
    sources: _Sources
    transcoders: Mapping[int, GraphTranscoder]
    leaves: Sequence[Tensor]
    """[lane, token, width] of the first block's input, and of each MLP."""
    found: FullPassResult

    @staticmethod
    def of(
        model: LoadedModel,
        batch: Batch,
        last: Tensor,
        sources: _Sources,
        transcoders: Mapping[int, GraphTranscoder],
    ) -> _FrozenPass:
        """Run the prompt. Raises AutogradFailed."""
        entering, writing = _stream(sources.layers)
        repeated = batch.take(torch.zeros(LANES, dtype=torch.long))
        rows, positions = repeated.tokens()
        units = torch.zeros_like(rows)
        outputs = [output - sources.bypassed.get(n, 0) for n, output in enumerate(sources.outputs)]
        values = [sources.embedded, *outputs]
        leaves = [value.expand(LANES, -1, -1).clone().requires_grad_() for value in values]
        writes: list[SiteWrite] = []
        for place, leaf in zip([entering, *writing], leaves, strict=True):
            at = place.site, place.layer, rows, positions, units
            transcoder = None if place == entering else transcoders.get(place.layer or 0)
            if transcoder is not None and transcoder.skip is not None:
                skip = CoordinateWrite(
                    OutputMap(transcoder.skip.T), "reconstruct", reads=transcoder.site
                )
                writes.append(SiteWrite(*at, leaf.new_zeros(len(rows), 1), mode=skip))
                writes.append(SiteWrite(*at, leaf.flatten(0, 1), mode="add"))
            else:
                writes.append(SiteWrite(*at, leaf.flatten(0, 1)))
        result = run_full(
            model,
            repeated,
            writes=writes,
            reads=[
                SiteRead(graph_transcoder.site, layer)
                for layer, graph_transcoder in transcoders.items()
            ],
            logits_at=last.expand(LANES, 1),
            gradients=True,
            backward=FROZEN,
        )
        return _FrozenPass(model, sources, transcoders, leaves, result)

    def explain_features(self, numbers: Ints) -> tuple[Floats, Floats]:
        """Return the edges into some features, [feature, source], and the inputs that they
        explain, [feature]."""
        nodes = self.sources.nodes.some(numbers)
        every = self.transcoders.items()
        encoders = {n: transcoder.dictionary.encoder_weights() for n, transcoder in every}

        def read(number: int) -> Tensor:
            layer = int(nodes.layer[number])
            place = SiteRead(self.transcoders[layer].site, layer)
            vector = self.found.reads[place][number % LANES, int(nodes.token[number]), 0]
            weights = encoders[layer][:, int(nodes.feature[number])].to(self.sources.embedded)
            return vector.to(weights) @ weights

        return self._explain(len(nodes), read)

    def explain_logits(self, weights: Tensor) -> tuple[Floats, Floats]:
        """Return the edges into sums of logits, [target, source], and their values.

        Args:
            weights: [target, vocab].
        """
        assert self.found.logits is not None
        logits = uncap_logits(self.model, self.found.logits[:, 0])
        logits = logits.to(self.sources.embedded)
        weights = weights.to(logits)
        return self._explain(len(weights), lambda n: logits[n % LANES] @ weights[n])

    def _explain(self, count: int, read: Callable[[int], Tensor]) -> tuple[Floats, Floats]:
        """Explain targets, each read in a separate lane: number n in lane n % LANES."""
        width = len(self.sources.nodes) + self.sources.embedded.shape[0] * (self.sources.layers + 1)
        rows, inputs = [np.zeros((0, width))], [np.zeros(0)]
        for first in range(0, count, LANES):
            values = torch.stack([read(n) for n in range(first, min(count, first + LANES))])
            gradients = torch.autograd.grad(
                values.sum(), self.leaves, retain_graph=True, materialize_grads=True
            )
            embedded, *outputs = (gradient[: len(values)] for gradient in gradients)
            shares = self.sources.contributions(embedded, torch.stack(outputs, dim=1))
            rows.append(shares.double().cpu().numpy())
            inputs.append(values.detach().double().cpu().numpy())
        return np.concatenate(rows), np.concatenate(inputs)


# --- influence ------------------------------------------------------------------------------------


def normalise_edges(edges: Floats) -> Floats:
    """Return absolute values whose sum over the sources of each target is 1, or 0 for no source."""
    sizes = np.abs(edges)
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def compute_influence(shares: Floats, weights: Floats, features: Ints | None = None) -> Floats:
    """Return [source] the influence on weighted logits along all paths.

    Args:
        shares: [target, source] of `normalise_edges`: features, then logits.
        weights: [logit].
        features: The sources that are features with edges into them; None: the first ones.
    """
    count = len(shares) - len(weights)
    features = np.arange(count) if features is None else features
    influence, step = np.zeros(shares.shape[1]), weights @ shares[count:]
    for _ in range(count + 1):  # the longest path has no more edges
        if not step.any():
            break
        influence, step = influence + step, step[features] @ shares[:count]
    return influence


def score_graph(graph: AttributionGraph) -> tuple[float, float]:
    """Return the replacement and the completeness score.

    The first is the influence of tokens as a share of that of tokens and errors; the second the
    share of the inputs of nodes that doesn't come from errors, weighted by the influence of nodes.
    Errors and tokens have no inputs, and count as explained.
    """
    shares, weights = normalise_edges(graph.edges), graph.probabilities
    influence = graph.influence
    errors = slice(graph.first_error, graph.first_token)
    of_tokens = influence[graph.first_token :].sum()
    replacement = of_tokens / (of_tokens + influence[errors].sum())
    reached = np.concatenate([influence[: graph.first_error], weights])
    unexplained = (shares[:, errors].sum(1) * reached).sum()
    return float(replacement), float(1 - unexplained / (influence.sum() + weights.sum()))


def list_influential(graph: AttributionGraph, count: int) -> Ints:
    """Return the numbers of the features with the most influence on the targets, at most `count`.

    Features without influence aren't among them.
    """
    influence = graph.influence[: graph.first_error]
    order = np.argsort(-influence, kind="stable")[:count]
    return order[influence[order] > 0]


def predict_ablation(graph: AttributionGraph, ablated: Ints) -> float:
    """Return the change of the only target along the paths of the graph, if features are ablated.

    The activation of another feature changes by as much as its input, and what it writes in
    proportion to its activation.
    """
    nodes = graph.features
    removed = np.zeros(graph.first_logit)
    """[source] the share of what it writes that is missing."""
    for layer in np.unique(nodes.layer):
        indices = np.flatnonzero(nodes.layer == layer)
        removed[indices] = graph.edges[indices] @ removed / nodes.activation[indices]
        removed[np.intersect1d(indices, ablated)] = 1
    return -float(graph.edges[len(nodes)] @ removed)


def ablate_nodes(prompt: GraphPrompt, every: Sequence[FeatureNodes]) -> Tensor:
    """Return the logits of the next token, [1 + set, vocab]: of the prompt, and with each set of
    features ablated, whose activations in the run are set to 0."""
    model, ids = prompt.model, [prompt.ids] * (1 + len(every))
    batch = Batch.of(ids, model.pad_id, model.calling.side, model.device)
    crosses = any(len(transcoder.decoders) > 1 for transcoder in prompt.transcoders.values())
    writes = (_ablate_across if crosses else _ablate_in_place)(prompt, batch, every)
    result = run_full(model, batch, writes=writes, logits_at=batch.lengths[:, None] - 1)
    assert result.logits is not None
    return result.logits[:, 0]


def _ablate_in_place(
    prompt: GraphPrompt, batch: Batch, every: Sequence[FeatureNodes]
) -> list[SiteWrite]:
    """Return the writes of `ablate_nodes` for transcoders of single layers."""
    writes: list[SiteWrite] = []
    for row, nodes in enumerate(every, 1):
        places = zip(
            nodes.layer.tolist(), nodes.token.tolist(), nodes.feature.tolist(), strict=True
        )
        for layer, token, feature in places:
            transcoder = prompt.transcoders[layer]
            rows, positions, units = (torch.tensor([number]) for number in (row, token, 0))
            mode = CoordinateWrite(transcoder.dictionary, "set", reads=transcoder.site)
            zero, which = torch.zeros(1, 1), torch.tensor([[feature]])
            write = SiteWrite("mlp_out", layer, rows, positions, units, zero, mode=mode, to=which)
            writes.append(write)
    return writes


def _ablate_across(
    prompt: GraphPrompt, batch: Batch, every: Sequence[FeatureNodes]
) -> list[SiteWrite]:
    """Return the writes of `ablate_nodes` for a cross-layer transcoder.

    What a feature adds to the MLPs' outputs of its layer and later ones is subtracted there. Its
    activation depends on the features that are ablated in earlier layers: each layer's activations
    are read in a pass with the writes so far.
    """
    row = np.repeat(np.arange(1, 1 + len(every)), [len(nodes) for nodes in every])
    layer, token, feature = (
        np.concatenate([getattr(nodes, name) for nodes in every])
        for name in ("layer", "token", "feature")
    )
    writes: list[SiteWrite] = []
    for own_layer in np.unique(layer).tolist():
        transcoder, here = prompt.transcoders[own_layer], np.flatnonzero(layer == own_layer)
        place = SiteRead(transcoder.site, own_layer)
        before = [write for write in writes if (write.layer or 0) <= own_layer]
        logits = run_full(
            prompt.model, batch, stop=own_layer + 1, writes=before, reads=[place]
        ).reads[place]
        at, which = np.unique(
            np.stack([row[here], token[here]], axis=1), axis=0, return_inverse=True
        )
        rows, positions = (torch.from_numpy(each) for each in at.T)
        vectors = logits[indices_to_device((rows, batch.columns(rows, positions)), logits.device)]
        index = torch.from_numpy(which.reshape(-1)), torch.from_numpy(feature[here])
        index = indices_to_device(index, logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        amounts = torch.zeros(
            len(at), transcoder.decoders.shape[1], dtype=wide, device=logits.device
        )
        amounts[index] = transcoder.dictionary.encode(vectors[:, 0].to(wide))[index]
        for later, decoder in enumerate(transcoder.decoders):
            units, values = torch.zeros_like(rows), -(amounts @ decoder.to(wide))
            writes.append(
                SiteWrite("mlp_out", own_layer + later, rows, positions, units, values, mode="add")
            )
    return writes


def score_ablation(
    prompt: GraphPrompt, graph: AttributionGraph, chosen: Ints
) -> tuple[float, float, float]:
    """Return the changes of the measure when features are ablated: of these features, as the graph
    predicts it, and of as many other active features.

    Raises ValueError if too few features are active.
    """
    assert prompt.measure is not None
    count = len(graph.features)
    if not len(chosen):
        return 0.0, 0.0, 0.0
    others = np.setdiff1d(np.arange(count), chosen)
    if len(others) < len(chosen):
        needed = 2 * len(chosen)
        raise ValueError(f"only {count} features are active in a prompt, and {needed} are needed")
    drawn = np.random.default_rng(prompt.seed).choice(others, len(chosen), replace=False)
    nodes = [graph.features.some(each) for each in (chosen, drawn)]
    runs = ablate_nodes(prompt, nodes)
    base, own, control = (float(prompt.measure(logits)) for logits in runs)
    return own - base, predict_ablation(graph, chosen), control - base


def sum_edges(graph: AttributionGraph, sources: Ints, targets: Ints | None) -> float:
    """Return the sum of the edges between features.

    Args:
        targets: Numbers of features; None for the targets of the graph, weighted.
    """
    if targets is None:
        ends = graph.edges[len(graph.features) :, sources]
        return float(graph.probabilities @ ends.sum(1))
    return float(graph.edges[np.ix_(targets, sources)].sum())


def score_weight(
    prompt: GraphPrompt, graph: AttributionGraph, sources: Ints, targets: Ints | None
) -> tuple[float, float]:
    """Return the sum of the edges between features, and that from random sources: for each layer as
    many other active features as there are sources, or all others."""
    random, layers = np.random.default_rng(prompt.seed), graph.features.layer
    named = sources if targets is None else np.union1d(sources, targets)
    drawn: list[int] = []
    for layer in np.unique(layers[sources]):
        others = np.setdiff1d(np.flatnonzero(layers == layer), named)
        count = min(len(others), int((layers[sources] == layer).sum()))
        drawn += random.choice(others, count, replace=False).tolist()
    control = sum_edges(graph, np.array(drawn, dtype=np.int64), targets)
    return sum_edges(graph, sources, targets), control


def prune_graph(
    graph: AttributionGraph, node_share: float, edge_share: float
) -> tuple[Bools, Bools]:
    """Return [source] and [target, source]: the nodes and edges that are kept.

    Nodes are kept in the order of their influence until they have `node_share` of it, edges among
    them until they have `edge_share`. Features and errors that then lead nowhere, and features that
    nothing leads to, are removed. Tokens and logits stay.
    """
    weights, count = graph.probabilities, graph.first_error
    nodes = _keep_share(graph.influence, node_share)
    nodes[graph.first_token :] = True
    targets = np.concatenate([nodes[:count], np.ones(len(weights), dtype=np.bool_)])
    shares = normalise_edges(graph.edges * targets[:, None] * nodes)
    reached = np.concatenate([compute_influence(shares, weights)[:count], weights])
    kept = _keep_share(shares * reached[:, None], edge_share)
    while True:
        lost = nodes & ~kept.any(0)
        lost[graph.first_token :] = False
        lost[:count] |= nodes[:count] & ~kept[:count].any(1)
        if not lost.any():
            return nodes, kept
        numbers = np.flatnonzero(lost)
        nodes[numbers], kept[:, numbers] = False, False
        kept[numbers[numbers < count]] = False


def list_graph(
    graph: AttributionGraph,
    ids: Sequence[int],
    row: int,
    pruning: tuple[float, float],
    supernodes: Mapping[str, Collection[LayerFeature]],
) -> GraphFindings:
    """List the nodes and edges that `prune_graph` keeps, of a prompt with these tokens.

    Args:
        supernodes: Names of groups of features.
    """
    nodes, edges = prune_graph(graph, *pruning)
    logits = graph.first_logit + np.arange(len(graph.logits))
    kept = [*np.flatnonzero(nodes).tolist(), *logits.tolist()]
    amounts = [*_accumulate(graph.influence).tolist(), *([1.0] * len(logits))]
    number = {node: n for n, node in enumerate(kept)}
    node_of_target = [*range(graph.first_error), *logits.tolist()]
    targets, sources = np.nonzero(edges)
    members = {
        name: tuple(number[node] for node in graph.features.find(own).tolist() if node in number)
        for name, own in supernodes.items()
    }
    return GraphFindings(
        row,
        tuple(_describe_node(graph, node, ids, amounts[node]) for node in kept),
        tuple(
            (number[source], number[node_of_target[target]], float(graph.edges[target, source]))
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True)
        ),
        int(np.count_nonzero(graph.edges)),
        members,
    )


def _describe_node(
    graph: AttributionGraph, node: int, ids: Sequence[int], influence: float
) -> GraphNode:
    if node < graph.first_error:
        features = graph.features
        place = int(features.layer[node]), int(features.token[node]), int(features.feature[node])
        return GraphNode("feature", *place, float(features.activation[node]), influence)
    if node < graph.first_token:
        layer, token = divmod(node - graph.first_error, graph.tokens)
        return GraphNode("error", layer, token, 0, 0.0, influence)
    if node < graph.first_logit:
        token = node - graph.first_token
        return GraphNode("token", 0, token, ids[token], 0.0, influence)
    which = node - graph.first_logit
    chance = float(graph.probabilities[which])
    return GraphNode("logit", 0, graph.tokens - 1, int(graph.logits[which]), chance, influence)


def _accumulate(influence: Floats) -> Floats:
    """Return, for each source, the share of the influence that it has together with all sources
    that have more."""
    order = np.argsort(-influence, kind="stable")
    totals = np.empty_like(influence)
    totals[order] = np.cumsum(influence[order]) / max(float(influence.sum()), 1e-10)
    return totals


def _keep_share(scores: Floats, share: float) -> Bools:
    """Return which of the largest scores have a share of their sum together."""
    order = np.argsort(-scores, axis=None, kind="stable")
    sums = np.cumsum(scores.reshape(-1)[order])
    count = 1 + int(np.searchsorted(sums, share * sums[-1])) if sums[-1] > 0 else 0
    mask = np.zeros(scores.size, dtype=np.bool_)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)
