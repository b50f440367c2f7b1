"""Probabilities of Gaussians: the encoder of mixtures."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Probability below which a vector doesn't belong to a component: its feature is 0."""


def log_densities(
    vectors: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor
) -> Tensor:
    """Return [K, component] log(w N(x; μ, Σ)) in nats, computed in float64.

    Args:
        vectors: [K, width].
        means: [component, width] μ.
        precisions: Factors of Σ⁻¹ = P Pᵀ: [component, width, width] P, [component, width] its
            diagonal, or [component] the number on its diagonal.
        log_weights: [component] log w.
    """
    wide = vectors.cpu() if vectors.device.type == "mps" else vectors  # which has no float64
    wide = wide.double()
    means, precisions, log_weights = (
        each.to(wide.device, torch.float64) for each in (means, precisions, log_weights)
    )
    width = means.shape[1]
    full = precisions.dim() == 3
    diagonal = precisions.diagonal(dim1=1, dim2=2) if full else precisions
    diagonal = diagonal.reshape(len(means), -1).expand(-1, width)
    constants = log_weights + diagonal.log().sum(1) - width / 2 * math.log(2 * math.pi)
    found: list[Tensor] = []
    for mean, factor, constant in zip(means, precisions, constants, strict=True):
        off = wide - mean
        scaled = off @ factor if full else off * factor
        found.append(constant - scaled.square().sum(1) / 2)
    return torch.stack(found, dim=1)


def mean_log_likelihood(vectors: Tensor, tensors: Mapping[str, Tensor]) -> float:
    """Return the mean of log p(x) over vectors [K, width], in nats, under the tensors of a file."""
    weights = tensors["precision"], tensors["log_weights"]
    center = tensors["b_dec"].to(vectors)
    return float(log_densities(vectors - center, tensors["W_dec"], *weights).logsumexp(1).mean())


def assign_components(
    vectors: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor
) -> Tensor:
    """Return [K, component] the probabilities that vectors belong to components.

    Probabilities below `SMALLEST` are 0. Arguments are those of `log_densities`.
    """
    found = log_densities(vectors, means, precisions, log_weights).softmax(dim=1)
    return (found * (found >= SMALLEST)).to(vectors)
