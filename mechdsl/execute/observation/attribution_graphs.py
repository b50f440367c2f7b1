"""Attribution graphs: how features, errors and tokens contribute to each other and to logits.

The output of each MLP is the reconstruction by a transcoder plus an error. With the patterns of
attention and the sizes that norms divide by held constant, the input of each feature and each logit
is then a linear function of what features, errors and tokens add to the residual stream (Ameisen et
al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.base.arrays import Bools, Floats, Ints
from mechdsl.dictionaries.features import Dictionary
from mechdsl.execute.measurement.values import GraphFindings, GraphNode
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite
from mechdsl.forward.hooks.full_pass import FullPassResult, run_full
from mechdsl.forward.hooks.gradients import AutogradFailed
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.packed.unembedding import uncap_logits
from mechdsl.program.estimators import BackwardRules
from mechdsl.rules.observations.graphs import LOGIT_SHARE, MOST_FEATURES, MOST_LOGITS

FROZEN = BackwardRules(fixed_norms=True, constant_patterns=True)
"""Derivatives of a pass in which norms and patterns are constants."""

LANES = 16
"""Targets of a backward pass."""
NODE_SHARE, EDGE_SHARE = 0.8, 0.98
"""Shares of the influence that pruned nodes and edges keep."""


@dataclass(frozen=True, eq=False)
class FeatureNodes:
    """The active features of a prompt, by layer and token."""

    layer: Ints
    token: Ints
    feature: Ints
    activation: Floats

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """The graph of one prompt. Nodes are its features, then the errors of each layer and token,
    then tokens, then logits."""

    features: FeatureNodes
    layers: int
    tokens: int
    logits: Ints
    """Token numbers of the logits that are explained."""
    probabilities: Floats
    """Those of the logits."""
    edges: Floats
    """[target, source] the share of the source in the input of the target: with the sign of its
    effect. Rows of errors and tokens are 0."""
    inputs: Floats
    """[feature or logit] the value that the edges into it explain, with constants left out."""

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

    @property
    def weights(self) -> Floats:
        """[node] the probability of logits, 0 elsewhere."""
        found = np.zeros(len(self.edges))
        found[self.first_logit :] = self.probabilities
        return found


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
    written: Tensor
    """[feature, width]: activation times the direction of the decoder."""

    def contributions(self, embedded: Tensor, outputs: Tensor) -> Tensor:
        """Return [target, source] from gradients [target, token, width] at the stream that enters
        the first block, and [target, layer, token, width] at the outputs of MLPs."""
        layer, token = torch.from_numpy(self.nodes.layer), torch.from_numpy(self.nodes.token)
        at = outputs[:, layer, token]
        of_features = torch.einsum("tnw,nw->tn", at, self.written)
        of_errors = torch.einsum("tlpw,lpw->tlp", outputs, self.errors).flatten(1)
        of_tokens = torch.einsum("tpw,pw->tp", embedded, self.embedded)
        return torch.cat([of_features, of_errors, of_tokens], dim=1)


def attribute(
    model: LoadedModel, ids: Sequence[int], transcoders: Mapping[int, tuple[str, Dictionary]]
) -> AttributionGraph:
    """Compute the graph of the likeliest next tokens of a prompt.

    Args:
        ids: The tokens of the prompt.
        transcoders: Of some layers, the site that the transcoder reads and the transcoder.

    Raises:
        ValueError: More than `MOST_FEATURES` features are active, or a norm of the model can't be
            held constant.
    """
    batch = Batch.of([ids], model.pad_id, model.calling.side, model.device)
    last = batch.lengths[:, None] - 1
    sources, likely, probabilities = _read_sources(model, batch, last, transcoders)
    targets = len(sources.nodes) + len(likely)
    lanes = min(LANES, max(1, targets))
    try:
        leaves, frozen = _run_frozen(model, batch, last, sources, transcoders, lanes)
    except AutogradFailed as failure:
        raise ValueError(f"norms and patterns can't be held constant: {failure}") from failure
    rows: list[Tensor] = []
    inputs: list[Tensor] = []
    for total in _iter_targets(model, frozen, sources, likely, transcoders, lanes):
        gradients = torch.autograd.grad(
            total.sum(), leaves, retain_graph=True, materialize_grads=True
        )
        embedded, *outputs = (each[: len(total)] for each in gradients)
        rows.append(sources.contributions(embedded, torch.stack(outputs, dim=1)))
        inputs.append(total.detach())
    found = torch.cat(rows).double().cpu().numpy()
    count, first = len(sources.nodes), found.shape[1]
    edges = np.zeros((first + len(likely), first + len(likely)))
    edges[:count, :first], edges[first:, :first] = found[:count], found[count:]
    return AttributionGraph(
        sources.nodes,
        sources.layers,
        int(batch.lengths[0]),
        likely,
        probabilities,
        edges,
        torch.cat(inputs).double().cpu().numpy(),
    )


def _stream(layers: int) -> tuple[SiteRead, list[SiteRead]]:
    """Return the sites that nodes write at: the first block's input, and each MLP's output."""
    return SiteRead("resid_pre", 0), [SiteRead("mlp_out", layer) for layer in range(layers)]


def _read_sources(
    model: LoadedModel,
    batch: Batch,
    last: Tensor,
    transcoders: Mapping[int, tuple[str, Dictionary]],
) -> tuple[_Sources, Ints, Floats]:
    """Return the sources of a prompt, its likeliest next tokens and their probabilities."""
    layers = model.shape.n_layers
    entering, writing = _stream(layers)
    reading = {layer: SiteRead(site, layer) for layer, (site, _) in transcoders.items()}
    plain = run_full(model, batch, reads=[entering, *writing, *reading.values()], logits_at=last)
    outputs = torch.stack([_vectors(plain, each) for each in writing])
    errors, written = outputs.clone(), [outputs.new_zeros(0, outputs.shape[-1])]
    found: list[tuple[Ints, Ints, Ints, Floats]] = []
    for layer, (_, transcoder) in sorted(transcoders.items()):
        vectors = _vectors(plain, reading[layer])
        active = transcoder.encode(vectors)
        errors[layer] -= transcoder.decode(active, vectors)
        token, feature = (each.cpu().numpy() for each in active.nonzero(as_tuple=True))
        amount = active[active != 0]
        found.append((np.full(len(token), layer), token, feature, amount.double().cpu().numpy()))
        directions = transcoder.rows().to(outputs)
        written.append(amount[:, None] * directions[torch.from_numpy(feature)])
    if sum(len(each) for each, *_ in found) > MOST_FEATURES:
        count = sum(len(each) for each, *_ in found)
        raise ValueError(f"{count:,} features are active, more than {MOST_FEATURES:,}")
    nodes = FeatureNodes(*(np.concatenate(each) for each in zip(*found, strict=True)))
    assert plain.logits is not None
    chances = plain.logits[0, 0].double().softmax(-1)
    ranked = chances.topk(min(MOST_LOGITS, len(chances)))
    kept = 1 + int((ranked.values.cumsum(0) < LOGIT_SHARE).sum())
    likely, probabilities = (each[:kept].cpu().numpy() for each in (ranked.indices, ranked.values))
    embedded = _vectors(plain, entering)
    return (
        _Sources(layers, embedded, outputs, errors, nodes, torch.cat(written)),
        likely,
        (probabilities),
    )


def _vectors(found: FullPassResult, place: SiteRead) -> Tensor:
    """Return [token, width] of the first row, at least in 32 bits."""
    read = found.reads[place][0, :, 0]
    return read.to(torch.promote_types(read.dtype, torch.float32)).clone()


def _run_frozen(
    model: LoadedModel,
    batch: Batch,
    last: Tensor,
    sources: _Sources,
    transcoders: Mapping[int, tuple[str, Dictionary]],
    lanes: int,
) -> tuple[list[Tensor], FullPassResult]:
    """Run the prompt in several lanes with the outputs of MLPs written as leaves.

    Returns the leaves, [lane, token, width], of the first block's input and of each MLP.
    """
    entering, writing = _stream(sources.layers)
    repeated = batch.take(torch.zeros(lanes, dtype=torch.long))
    rows, positions = repeated.tokens()
    leaves: list[Tensor] = []
    writes: list[SiteWrite] = []
    for place, values in zip(
        [entering, *writing], [sources.embedded, *sources.outputs], strict=True
    ):
        leaf = values.expand(lanes, -1, -1).clone().requires_grad_()
        leaves.append(leaf)
        units = torch.zeros_like(rows)
        writes.append(
            SiteWrite(place.site, place.layer, rows, positions, units, leaf.flatten(0, 1))
        )
    reads = [SiteRead(site, layer) for layer, (site, _) in transcoders.items()]
    frozen = run_full(
        model,
        repeated,
        writes=writes,
        reads=reads,
        logits_at=last.expand(lanes, 1),
        gradients=True,
        backward=FROZEN,
    )
    return leaves, frozen


def _iter_targets(
    model: LoadedModel,
    frozen: FullPassResult,
    sources: _Sources,
    likely: Ints,
    transcoders: Mapping[int, tuple[str, Dictionary]],
    lanes: int,
) -> Iterator[Tensor]:
    """Yield the inputs of some targets, each in a lane of its own: [target]."""
    nodes = sources.nodes
    for first in range(0, len(nodes), lanes):
        part = slice(first, first + lanes)
        found: list[Tensor] = []
        for lane, (layer, token, feature) in enumerate(
            zip(nodes.layer[part], nodes.token[part], nodes.feature[part], strict=True)
        ):
            site, transcoder = transcoders[int(layer)]
            vector = frozen.reads[SiteRead(site, int(layer))][lane, int(token), 0]
            reads = transcoder.encoder_weights()[:, int(feature)].to(sources.embedded)
            found.append(vector.to(reads) @ reads)
        yield torch.stack(found)
    assert frozen.logits is not None
    logits = uncap_logits(model, frozen.logits[:, 0])
    logits = logits - logits.mean(-1, keepdim=True)
    for first in range(0, len(likely), lanes):
        tokens = torch.from_numpy(likely[first : first + lanes]).to(logits.device)
        yield logits[torch.arange(len(tokens)), tokens]


# --- influence ------------------------------------------------------------------------------------


def normalise_edges(edges: Floats) -> Floats:
    """Return absolute values whose sum over the sources of each target is 1, or 0 for no source."""
    sizes = np.abs(edges)
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def compute_influence(shares: Floats, weights: Floats) -> Floats:
    """Return [node] the influence on weighted nodes along all paths.

    Args:
        shares: [target, source] of `normalise_edges`.
        weights: [node].
    """
    found, step = np.zeros(len(weights)), weights @ shares
    for _ in range(len(weights)):  # the longest path has no more edges
        if not step.any():
            break
        found, step = found + step, step @ shares
    return found


def score_graph(graph: AttributionGraph) -> tuple[float, float]:
    """Return the replacement and the completeness score.

    The first is the influence of tokens as a share of that of tokens and errors; the second the
    share of the inputs of nodes that doesn't come from errors, weighted by the influence of nodes.
    """
    shares, weights = normalise_edges(graph.edges), graph.weights
    influence = compute_influence(shares, weights)
    errors = slice(graph.first_error, graph.first_token)
    of_tokens = influence[graph.first_token : graph.first_logit].sum()
    replacement = of_tokens / (of_tokens + influence[errors].sum())
    explained = 1 - shares[:, errors].sum(1)
    reached = influence + weights
    return float(replacement), float((explained * reached).sum() / reached.sum())


def prune_graph(graph: AttributionGraph) -> tuple[Bools, Bools]:
    """Return [node] and [target, source]: the nodes and edges that are kept.

    Nodes are kept in the order of their influence until they have `NODE_SHARE` of it, edges among
    them until they have `EDGE_SHARE`. Features and errors that then lead nowhere, and features that
    nothing leads to, are removed. Tokens and logits stay.
    """
    weights = graph.weights
    influence = compute_influence(normalise_edges(graph.edges), weights)
    nodes = _keep_share(influence, NODE_SHARE)
    nodes[graph.first_token :] = True
    edges = graph.edges * nodes[:, None] * nodes
    shares = normalise_edges(edges)
    reached = compute_influence(shares, weights) + weights
    kept = _keep_share(shares * reached[:, None], EDGE_SHARE)
    while True:
        lost = nodes[: graph.first_token] & ~kept[:, : graph.first_token].any(0)
        features = nodes[: graph.first_error] & ~kept[: graph.first_error].any(1)
        lost[: graph.first_error] |= features
        if not lost.any():
            return nodes, kept
        numbers = np.flatnonzero(lost)
        nodes[numbers], kept[numbers], kept[:, numbers] = False, False, False


def list_graph(graph: AttributionGraph, ids: Sequence[int], row: int) -> GraphFindings:
    """List the nodes and edges that pruning keeps, of a prompt with these tokens."""
    influence = compute_influence(normalise_edges(graph.edges), graph.weights)
    nodes, edges = prune_graph(graph)
    kept = np.flatnonzero(nodes)
    number = {node: n for n, node in enumerate(kept.tolist())}
    targets, sources = np.nonzero(edges)
    return GraphFindings(
        row,
        tuple(_describe_node(graph, node, ids, float(influence[node])) for node in kept.tolist()),
        tuple(
            (number[source], number[target], float(graph.edges[target, source]))
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True)
        ),
        int(np.count_nonzero(graph.edges)),
    )


def _describe_node(
    graph: AttributionGraph, node: int, ids: Sequence[int], influence: float
) -> GraphNode:
    if node < graph.first_error:
        own = graph.features
        place = int(own.layer[node]), int(own.token[node]), int(own.feature[node])
        return GraphNode("feature", *place, float(own.activation[node]), influence)
    if node < graph.first_token:
        layer, token = divmod(node - graph.first_error, graph.tokens)
        return GraphNode("error", layer, token, 0, 0.0, influence)
    if node < graph.first_logit:
        token = node - graph.first_token
        return GraphNode("token", 0, token, ids[token], 0.0, influence)
    which = node - graph.first_logit
    chance = float(graph.probabilities[which])
    return GraphNode("logit", 0, graph.tokens - 1, int(graph.logits[which]), chance, influence)


def _keep_share(scores: Floats, share: float) -> Bools:
    """Return which of the largest scores have a share of their sum together."""
    order = np.argsort(-scores, axis=None, kind="stable")
    sums = np.cumsum(scores.reshape(-1)[order])
    count = 1 + int(np.searchsorted(sums, share * sums[-1])) if sums[-1] > 0 else 0
    found = np.zeros(scores.size, dtype=np.bool_)
    found[order[:count]] = True
    return found.reshape(scores.shape)
