"""Numbers that are made of a model's weights alone: what heads do to tokens, and to each other.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Gains of norms are in the
maps, their scales and all biases are not, and neither is rotary: queries meet keys at distance 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechdsl.hooks.weight_maps import WeightMaps
from mechdsl.rules.observations.weights import Composition, OfWeights


def positive_share(matrix: Tensor) -> float:
    """Σ λ / Σ |λ| of the eigenvalues of a square matrix, from −1 to 1; NaN where all are 0."""
    values = torch.linalg.eigvals(matrix.double().cpu())
    whole = float(values.abs().sum())
    return float(values.real.sum()) / whole if whole > 0 else float("nan")


def copying(maps: WeightMaps, layer: int, head: int) -> float:
    """`positive_share` of embedding → OV → unembedding: near 1, a head raises the logits of tokens
    that it attends to. Its eigenvalues that aren't 0 are those of W_O (W_U W_E) W_V."""
    return positive_share(
        maps.out(layer, head).double() @ maps.token_map @ maps.value(layer, head).double()
    )


def matching(maps: WeightMaps, layer: int, head: int) -> float:
    """`positive_share` of embedding → QK ← embedding: near 1, a head attends to its own token."""
    key, query = maps.key(layer, head).double(), maps.query(layer, head).double()
    return positive_share(key.T @ maps.token_gram @ query)


@torch.no_grad()
def of_weights(does: OfWeights, maps: WeightMaps, heads: Sequence[tuple[int, int]]) -> float:
    """The number of one cell, of one head or two: (layer, head). ValueError, in words, where the
    model has none."""
    if isinstance(does, Composition):
        return composition(maps, does.by, *heads)
    return {"copying": copying, "matching": matching}[does.word](maps, *heads[0])


def ov_matrix(maps: WeightMaps, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """([d_model, d_value], [d_value, d_model]), whose product is W_V W_O."""
    return maps.value(layer, head), maps.out(layer, head)


def qk_matrix(maps: WeightMaps, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """([d_model, d_head], [d_head, d_model]), whose product is W_Q W_Kᵀ."""
    return maps.query(layer, head), maps.key(layer, head).T


def composition(maps: WeightMaps, how: str, first: tuple[int, int], then: tuple[int, int]) -> float:
    """How much of what a head writes a later one reads by its queries, keys or values (`how`: q, k,
    v): ‖AB‖ / (‖A‖ ‖B‖), Frobenius, of the first one's OV and the later one's map. A random pair
    has about 1/√d_model."""
    left = ov_matrix(maps, *first)
    right = ov_matrix(maps, *then) if how == "v" else qk_matrix(maps, *then)
    if how == "k":  # what keys read stands on the other side
        right = right[1].T, right[0].T
    product = _norm(left[0], left[1] @ right[0], right[1])
    sizes = _norm(left[0], None, left[1]) * _norm(right[0], None, right[1])
    return product / sizes if sizes > 0 else float("nan")


def singular(pair: tuple[Tensor, Tensor]) -> Tensor:
    """[width] singular values of a product of a tall and a wide matrix, the largest first."""
    one, two = (torch.linalg.qr(each.double().cpu())[1] for each in (pair[0], pair[1].T))
    return torch.linalg.svdvals(one @ two.T)


def successors(maps: WeightMaps, layer: int, head: int, vectors: Tensor, tokens: Tensor) -> Tensor:
    """[token] whether the head's output on each vector raises the token of its own number more than
    all others of `tokens` (Gould et al. 2023, successor score).

    vectors: [token, d_model], what the head reads; tokens: [token] ids.
    """
    found = maps.to_logits(vectors @ maps.value(layer, head) @ maps.out(layer, head))
    best = found[:, tokens.to(found.device)].argmax(dim=1).cpu()
    return best == torch.arange(len(tokens))


def _norm(left: Tensor, between: Tensor | None, right: Tensor) -> float:
    """‖left · between · right‖, of Gram matrices of the inner width."""
    one, two = left.double(), right.double()
    grams = one.T @ one, two @ two.T
    inner = between.double() if between is not None else torch.eye(len(grams[0]), dtype=one.dtype)
    inner = inner.to(one.device)
    return float((inner.T @ grams[0] @ inner @ grams[1]).trace().clamp(min=0).sqrt())
