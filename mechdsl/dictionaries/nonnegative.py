"""Nonnegative least squares for many vectors: the encoder of nonnegative factorizations."""

from __future__ import annotations

import torch
from torch import Tensor

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
