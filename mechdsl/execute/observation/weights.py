"""Observations computed from a model's weights alone, such as the OV and QK circuits of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mechdsl.base.arrays import Floats, Ints
from mechdsl.execute.measurement.readout import ListedToken, ObservedValues, Readout, ReadoutInput
from mechdsl.execute.vectors import list_directions, list_readers
from mechdsl.fits.agreement import auroc
from mechdsl.forward.hooks.coordinates import CoordinateSystem
from mechdsl.forward.hooks.weight_maps import WeightMaps
from mechdsl.resolve.types import ItemNumber, SitePoint
from mechdsl.rules.observations.weights import (
    CircuitOverlap,
    Composition,
    EdgeRanking,
    HeadCircuit,
    MatchedCosine,
    SingularValues,
    Successor,
    ValueVectors,
    WeightObservation,
)

MATCHED_ROWS = 1024
"""Number of directions that are compared with all others at once."""

NEURON_BATCH = 64
"""Number of neurons whose logits are computed at once."""


def compute_positive_share(matrix: Tensor) -> float:
    """Return Σ λ / Σ |λ| of a square matrix's eigenvalues, from −1 to 1; NaN if all are 0."""
    values = torch.linalg.eigvals(matrix.double().cpu())
    whole = float(values.abs().sum())
    return float(values.real.sum()) / whole if whole > 0 else float("nan")


def score_copying(maps: WeightMaps, layer: int, head: int) -> float:
    """Compute the positive share of embedding → OV → unembedding.

    Near 1, a head raises the logits of tokens that it attends to. The nonzero eigenvalues are those
    of W_O (W_U W_E) W_V.
    """
    return compute_positive_share(
        maps.out(layer, head).double() @ maps.token_map @ maps.value(layer, head).double()
    )


def score_matching(maps: WeightMaps, layer: int, head: int) -> float:
    """Compute the positive share of embedding → QK ← embedding.

    Near 1, a head attends to its own token.
    """
    key, query = maps.key(layer, head).double(), maps.query(layer, head).double()
    return compute_positive_share(key.T @ maps.token_gram @ query)


def compare_edges(does: CircuitOverlap) -> dict[str, float]:
    """Return the numbers of `observe overlap`, by word."""
    from scipy.stats import hypergeom

    first, second, total = does.edges.first, does.edges.second, does.edges.total
    shared = len(first & second)
    sizes = len(first), len(second)
    return {
        does.word: shared,
        "jaccard": shared / len(first | second),
        "precision": shared / sizes[0],
        "recall": shared / sizes[1],
        "expected": sizes[0] * sizes[1] / total,
        "p": float(hypergeom.sf(shared - 1, total, sizes[1], sizes[0])),
    }


def rank_edges(does: EdgeRanking) -> float:
    """Return the AUROC of absolute scores for the edges of the second circuit.

    Raises ValueError if all edges of the model are in it.
    """
    true, every = {edge for edge, _ in does.edges.second}, does.first.every
    sizes = np.abs([does.first.scores[edge] for edge in every])
    there = np.array([edge in true for edge in every])
    if there.all():
        raise ValueError("the second circuit has every edge of the model")
    return float(auroc(sizes[None], there)[0])


@dataclass(eq=False)
class WeightObserver:
    """Reader of an observation of weights in each cell."""

    does: WeightObservation
    maps: WeightMaps
    readout: Readout
    """Readout of the measures that use it."""
    prompts: Ints
    """[column] row of the table."""
    run: str
    sites: Sequence[tuple[SitePoint, ...]]
    """Per cell, the sites of the line and those after `with`."""
    values: Ints
    """Per cell, the index along the axis `value`; zeros without that axis."""
    items: Sequence[ItemNumber]
    coordinates: tuple[Ints, Ints]
    """Per cell, the coordinates of both bases of a circuit."""
    features: Ints
    """Per cell, the coordinate of the first of two compared bases."""
    systems: Mapping[str, CoordinateSystem]

    @torch.no_grad()
    def numbers(self, cell: int) -> Mapping[str, float]:
        """Compute the observed numbers, by word. Raises ValueError if there are none."""
        does, maps = self.does, self.maps
        ends = [(point.layer or 0, point.unit or 0) for point in self.sites[cell]]
        match does:
            case Composition(by=by):
                return {does.word: score_composition(maps, by, *ends)}
            case SingularValues(of=of):
                return {does.word: self._singular(of, *ends[0])[self.values[cell]]}
            case HeadCircuit():
                at = tuple(int(coordinate[cell]) for coordinate in self.coordinates)
                return {does.word: float(self._circuit(*ends[0])[at])}
            case MatchedCosine():
                values, partners = self._matches()
                feature = int(self.features[cell])
                return {does.word: values[feature], "partner": partners[feature]}
            case CircuitOverlap():
                return compare_edges(does)
            case EdgeRanking():
                return {does.word: rank_edges(does)}
            case Successor(tokens=tokens):
                share, rank = score_successors(maps, *ends[0], torch.tensor(tokens))
                return {does.word: share, "rank": rank}
            case ValueVectors():
                return {does.word: float(self._logits(*ends[0]).amax())}
            case _:
                return {
                    does.word: {"copying": score_copying, "matching": score_matching}[does.word](
                        maps, *ends[0]
                    )
                }

    @torch.no_grad()
    def read(self, cell: int) -> list[Floats]:
        """Compute the measures, [column] each, from the logits of a value vector."""
        ((layer, neuron),) = [(point.layer or 0, point.unit or 0) for point in self.sites[cell]]
        tokens = self.readout.observed_tokens(self.prompts)
        logits = self._logits(layer, neuron)
        if tokens is not None:
            logits = logits[tokens]
        count = len(self.prompts)
        seen = ObservedValues(
            logits=logits.expand(count, -1),
            tokens=None if tokens is None else torch.tensor(tokens, device=logits.device),
        )
        env = [self.items[cell]] * count
        reading = ReadoutInput(self.run, self.prompts, env, None, {}, None, {}, {}, seen)
        result = self.readout.read(reading)
        if result.broken.any():
            raise ValueError("its logits aren't numbers")
        for gap in result.gaps.values():
            raise ValueError(gap.reason)
        return result.values

    @torch.no_grad()
    def listed(self, cell: int) -> list[ListedToken]:
        """List the tokens that a cell raises, in descending order of logits."""
        if not isinstance(self.does, ValueVectors) or not self.does.top:
            return []
        ((layer, neuron),) = [(point.layer or 0, point.unit or 0) for point in self.sites[cell]]
        logits = self._logits(layer, neuron)
        indices = logits.topk(min(self.does.top, len(logits))).indices.tolist()
        return list(map(ListedToken, indices))

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as one observation
    def _matches(self) -> tuple[list[float], list[float]]:
        """Return [coordinate]: the largest cosine with the other basis, and its coordinate."""
        assert isinstance(self.does, MatchedCosine)
        first, second = (
            normalize(list_directions(self.systems[member.name], member.width), dim=1)
            for member in self.does.members
        )
        similarities = [(part @ second.T).max(dim=1) for part in first.split(MATCHED_ROWS)]
        values = torch.cat([similarity.values for similarity in similarities])
        return values.tolist(), torch.cat(
            [similarity.indices for similarity in similarities]
        ).double().tolist()

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as one observation
    def _circuit(self, layer: int, head: int) -> Tensor:
        """Return [from, to] of a head's circuit between the coordinates of two bases."""
        does = self.does
        assert isinstance(does, HeadCircuit)
        first, second = (self.systems[member.name] for member in does.members)
        width = self.maps.shape.d_model
        factors = get_ov_factors if does.reads_coordinates else get_qk_factors
        left, right = (factor.double().cpu() for factor in factors(self.maps, layer, head))
        directions = list_directions(first, width) @ left
        last = (
            right @ list_readers(second, width)
            if does.reads_coordinates
            else right @ list_directions(second, width).T
        )
        return directions @ last

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as one observation
    def _singular(self, of: str, layer: int, head: int) -> list[float]:
        return compute_singular_values(
            (get_ov_factors if of == "ov" else get_qk_factors)(self.maps, layer, head)
        ).tolist()

    def _logits(self, layer: int, neuron: int) -> Tensor:
        """Return [vocabulary] of a value vector, computed together with adjacent neurons."""
        first = neuron - neuron % NEURON_BATCH
        return self._block(layer, first)[neuron - first]

    @lru_cache(maxsize=1)  # noqa: B019
    def _block(self, layer: int, first: int) -> Tensor:
        return self.maps.to_logits(self.maps.neurons(layer)[first : first + NEURON_BATCH])


def get_ov_factors(maps: WeightMaps, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Return ([d_model, d_value], [d_value, d_model]), whose product is W_V W_O."""
    return maps.value(layer, head), maps.out(layer, head)


def get_qk_factors(maps: WeightMaps, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Return ([d_model, d_head], [d_head, d_model]), whose product is W_Q W_Kᵀ."""
    return maps.query(layer, head), maps.key(layer, head).T


def score_composition(
    maps: WeightMaps, how: str, first: tuple[int, int], then: tuple[int, int]
) -> float:
    """Measure how much a later head reads of an earlier head's output.

    It reads by its queries, keys or values (`how`: q, k, v). The score is ‖AB‖ / (‖A‖ ‖B‖) with
    Frobenius norms, for the first head's OV and the later head's map. Random matrices have about
    1/√d_model.
    """
    left = get_ov_factors(maps, *first)
    right = get_ov_factors(maps, *then) if how == "v" else get_qk_factors(maps, *then)
    if how == "k":  # keys read from the other side of QK
        right = right[1].T, right[0].T
    product = _product_norm(left[0], left[1] @ right[0], right[1])
    sizes = _product_norm(left[0], None, left[1]) * _product_norm(right[0], None, right[1])
    return product / sizes if sizes > 0 else float("nan")


def compute_singular_values(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return [width]: singular values of a tall times a wide matrix, in descending order."""
    one, two = (torch.linalg.qr(each.double().cpu())[1] for each in (pair[0], pair[1].T))
    return torch.linalg.svdvals(one @ two.T)


def score_successors(
    maps: WeightMaps, layer: int, head: int, tokens: Tensor
) -> tuple[float, float]:
    """Measure how often a head raises the next of ordered tokens most (Gould et al. 2023).

    The head reads the first MLP's output for a token. Tokens of equal logits share no first rank,
    and count as half a rank each.

    Args:
        tokens: [n] in order.

    Returns:
        Share of tokens whose successor ranks first among all given tokens, and its mean rank.
    """
    read = maps.first_mlp(maps.embedded(tokens[:-1]))
    scores = maps.to_logits(read @ maps.value(layer, head) @ maps.out(layer, head)).double().cpu()
    tensor = scores.gather(1, tokens[1:, None])
    others = scores[:, tokens.unique()]
    above, equal = (others > tensor).sum(1), (others == tensor).sum(1) - 1
    ranks = 1 + above + equal / 2
    return float((ranks == 1).double().mean()), float(ranks.double().mean())


def _product_norm(left: Tensor, between: Tensor | None, right: Tensor) -> float:
    """Return ‖left · between · right‖, from Gram matrices of the inner width."""
    one, two = left.double(), right.double()
    grams = one.T @ one, two @ two.T
    inner = between.double() if between is not None else torch.eye(len(grams[0]), dtype=one.dtype)
    inner = inner.to(one.device)
    return float((inner.T @ grams[0] @ inner @ grams[1]).trace().clamp(min=0).sqrt())
