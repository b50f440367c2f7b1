"""Computations of encoders: products, nonnegative least squares, and probabilities of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mechdsl.dictionaries.folder import MAX_GATHERED


def project_some(vectors: Tensor, columns: Tensor, which: Tensor | None) -> Tensor:
    """Return products with the columns of a matrix: [K, size], or [K, m] with named columns.

    Args:
        vectors: [K, width].
        columns: [width, size].
        which: [K, m] long; None for all.
    """
    if which is None:
        return vectors @ columns
    if which.shape[1] > MAX_GATHERED:
        return (vectors @ columns).gather(1, which)
    return torch.einsum("kw,kmw->km", vectors, columns.T[which])


def combine_some(numbers: Tensor, rows: Tensor, which: Tensor | None) -> Tensor:
    """Return sums of rows times numbers: [K, width].

    Args:
        numbers: [K, size], or [K, m] for named rows.
        rows: [size, width].
        which: [K, m] long; None for all.
    """
    if which is None:
        return numbers @ rows
    if which.shape[1] > MAX_GATHERED:
        every = numbers.new_zeros(len(numbers), len(rows))
        return every.scatter_add(1, which, numbers) @ rows
    return torch.einsum("km,kmw->kw", numbers, rows[which])


def distinct_rows(vectors: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the rows that differ in any bit, and [K] the number of each row among them.

    None if all rows are different.

    Args:
        vectors: [K, width] float32 or float64.
    """
    if len(vectors) < 2:
        return None
    bits = vectors.contiguous().view(torch.int32 if vectors.element_size() == 4 else torch.int64)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 62, (bits.shape[1],), generator=random).to(bits.device)
    _, number = torch.unique((bits * factors).sum(1), return_inverse=True)
    rows = torch.arange(len(bits), device=bits.device)
    count = int(number.max()) + 1
    first = rows.new_full((count,), len(bits)).scatter_reduce(0, number, rows, "amin")
    if count == len(bits) or not torch.equal(bits[first][number], bits):
        return None
    return vectors[first], number


ROUNDING = 1e-12
"""Gradient, relative to the largest product of a vector with a factor, that counts as 0."""

SOLVED_BYTES = 1 << 27
"""Bytes of the systems of equations that are in memory at once."""


def solve_nonnegative(vectors: Tensor, factors: Tensor, penalties: Tensor) -> Tensor:
    """Return the nonnegative coefficients of factors whose sum is nearest to each vector.

    The active set method, for all vectors in parallel; the result for a vector doesn't depend on
    the others. Coefficients carry gradients of the vectors, with the set of positive ones fixed.
    For linearly independent factors, the solution is unique.

    Args:
        vectors: [K, width].
        factors: [factor, width].
        penalties: [factor] costs p of coefficients; 0 for least squares.

    Returns:
        [K, factor] argmin over f ≥ 0 of ‖x − f F‖² / 2 + f · p, computed in float64.

    References:
        Lawson and Hanson 1974, Solving Least Squares Problems, chapter 23.
    """
    wide = vectors.cpu() if vectors.device.type == "mps" else vectors  # which has no float64
    rows = factors.to(wide.device, torch.float64)
    products = wide.double() @ rows.T - penalties.to(rows)
    gram = rows @ rows.T
    size = max(1, SOLVED_BYTES // (8 * gram.numel()))
    parts: list[Tensor] = []
    for own in products.split(size) if len(products) else ():
        with torch.no_grad():
            positive = _find_support(own, gram)
        parts.append(_solve(own, gram, positive))
    found = torch.cat(parts) if parts else products
    return found.clamp_min(0).to(vectors)


def _solve(products: Tensor, gram: Tensor, passive: Tensor) -> Tensor:
    """Return [K, factor]: least squares with the passive coefficients only, the others 0."""
    chosen = passive.to(gram)
    system = gram * chosen[:, :, None] * chosen[:, None]
    system = system + torch.diag_embed(1 - chosen)
    return torch.linalg.solve(system, (products * chosen)[..., None])[..., 0] * chosen


def _find_support(products: Tensor, gram: Tensor) -> Tensor:
    """Return [K, factor]: which coefficients are positive in the solution.

    Each row is in one of two states. With a feasible solution, the factor with the largest gradient
    becomes passive. With a solution that has negative coefficients, the row moves towards it until
    the first coefficient is 0, which leaves the passive set.
    """
    count = len(gram)
    found = torch.zeros_like(products)
    passive = torch.zeros_like(products, dtype=torch.bool)
    barred = torch.zeros_like(passive)  # factors that rounding lets in and out again
    limit = ROUNDING * products.abs().amax(1, keepdim=True)
    left = torch.arange(len(products), device=products.device)
    feasible = torch.ones_like(left, dtype=torch.bool)
    for _ in range(6 * count + 6):  # twice the limit of SciPy, whose steps are pairs of these
        gradient = products[left] - found[left] @ gram
        open_ = ~passive[left] & ~barred[left] & (gradient > limit[left])
        going = open_.any(1) | ~feasible[left]
        left, gradient, open_ = left[going], gradient[going], open_[going]
        if not len(left):
            break
        entering = feasible[left]
        best = gradient.where(open_, gradient.new_full((), -torch.inf)).argmax(1)
        passive[left[entering], best[entering]] = True
        solved, now = _solve(products[left], gram, passive[left]), found[left]
        negative = passive[left] & (solved <= 0)
        shares = now / (now - solved).clamp_min(torch.finfo(now.dtype).tiny)
        shares = shares.where(negative, now.new_ones(()))
        share = shares.amin(1, keepdim=True)
        leaves = negative & (shares <= share)
        moved = (now + share * (solved - now)).masked_fill(leaves, 0)
        fine = ~negative.any(1)
        found[left] = torch.where(fine[:, None], solved, moved)
        passive[left] &= ~leaves
        improves = entering & (share[:, 0] > 0)
        barred[left] = (barred[left] | leaves & (now == 0)) & ~improves[:, None]
        feasible[left] = fine
    return passive


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
