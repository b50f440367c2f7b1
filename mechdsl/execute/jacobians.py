"""Jacobians of one site by another, averaged over rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechdsl.execute.unpatched_batch import add_images, build_noise_writes
from mechdsl.forward.hooks.batch import Batch, SiteRead, SiteWrite, indices_to_device
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.gradients import catch_autograd_errors, compute_gradients
from mechdsl.forward.hooks.model import LoadedModel, has_single_output
from mechdsl.models.shape import PaddingSide, unit_count
from mechdsl.planner.plan import PROMPT_TOKENS
from mechdsl.resolve.types import JacobianBasis, SitePoint, count_numbers
from mechdsl.vocab.sites import stop_layer

MAX_NUMBERS = 1 << 26
"""Numbers of the Jacobians that are in memory together."""


@dataclass(frozen=True, eq=False)
class JacobianProduct:
    """The mean over rows of JᵀJ, or of JJᵀ for a basis of the target."""

    product: Tensor
    """[width, width] float64, on the CPU."""
    passes: int
    """Number of forward passes."""


def mean_jacobian_product(
    model: LoadedModel, basis: JacobianBasis, *, seed: int, side: PaddingSide | None = None
) -> JacobianProduct:
    """Compute the mean over rows, and over the tokens and noise draws of each row.

    Each token has a row of the batch to itself, so that its Jacobian has no part of other tokens.

    Args:
        seed: Seed of noise.
        side: As in `ExecutionOptions`.

    Raises:
        AutogradFailed: Autograd can't differentiate the model's code.
    """
    spots = [
        (prompt, token, sum(map(len, runs)))
        for prompt, runs in enumerate(basis.sample.cell.hits)
        for run in runs
        for token in run
    ]
    rows, draws = len({prompt for prompt, _, _ in spots}), basis.sample.run.draws
    width = count_numbers(basis.target if basis.of_target else basis.source, model.shape)
    total = torch.zeros(width, width, dtype=torch.float64)
    passes = 0
    for part in _split(model, basis, spots):
        found = _jacobians(model, basis, [spot[:2] for spot in part], seed, side)
        weights = torch.tensor([1 / (rows * count * draws) for _, _, count in part])
        weights = weights.double().repeat_interleave(draws)
        scaled = found.cpu().double() * weights.sqrt()[:, None, None]
        flat = (scaled.transpose(1, 2) if basis.of_target else scaled).flatten(0, 1)
        total += flat.T @ flat
        passes += 1
    return JacobianProduct(total, passes)


def _split(
    model: LoadedModel, basis: JacobianBasis, spots: list[tuple[int, int, int]]
) -> Iterator[list[tuple[int, int, int]]]:
    """Split the tokens into batches."""
    longest = max(len(row.ids) for row in basis.sample.run.rows)
    numbers = count_numbers(basis.source, model.shape) * count_numbers(basis.target, model.shape)
    count = min(PROMPT_TOKENS // longest, MAX_NUMBERS // numbers)
    count = max(1, count // basis.sample.run.draws)
    return (spots[begin : begin + count] for begin in range(0, len(spots), count))


def _jacobians(
    model: LoadedModel,
    basis: JacobianBasis,
    spots: list[tuple[int, int]],
    seed: int,
    side: PaddingSide | None,
) -> Tensor:
    """Return [K, width of target, width of source]: the Jacobians at tokens of prompts, those of
    all noise draws of a token one after the other."""
    run = basis.sample.run
    spots = [spot for spot in spots for _ in range(run.draws)]
    prompts = np.array([prompt for prompt, _ in spots], dtype=np.int64)
    keys = basis.sample.table.row_keys
    noise = build_noise_writes(model, run.noise, prompts, keys, seed)
    own = [run.rows[prompt] for prompt, _ in spots]
    ids = [row.ids for row in own]
    batch = Batch.of(ids, model.pad_id, side or model.calling.side, model.device)
    batch = add_images(model, batch, own)
    lanes, tokens = torch.arange(len(spots)), torch.tensor([token for _, token in spots])
    dtype = torch.promote_types(model.dtype, torch.float32)
    width = count_numbers(basis.source, model.shape)
    leaf = torch.zeros(len(spots), width, dtype=dtype, device=model.device, requires_grad=True)
    read = SiteRead(basis.target.site, basis.target.layer)
    with catch_autograd_errors():
        result = run_full(
            model,
            batch,
            stop=stop_layer(read.site, read.layer, model.shape.n_layers),
            writes=[*noise, _addition(model, basis.source, lanes, tokens, leaf)],
            reads=[read],
            gradients=True,
        )
    found = result.reads[read]
    # A classifier has one output, whatever the token.
    one = read.site == "logits" and has_single_output(model)
    columns = torch.zeros_like(lanes) if one else batch.columns(lanes, tokens)
    vectors = found[indices_to_device((lanes, columns), found.device)]
    unit = basis.target.unit
    vectors = vectors.flatten(1) if unit is None else vectors[:, unit]
    last = vectors.shape[1] - 1
    rows = [
        compute_gradients(vectors[:, number].sum(), [leaf], keep=number < last)[0]
        for number in range(last + 1)
    ]
    return torch.stack(rows, dim=1)


def _addition(
    model: LoadedModel, point: SitePoint, lanes: Tensor, tokens: Tensor, leaf: Tensor
) -> SiteWrite:
    """Add the leaf to the vectors of a point, with all heads or neurons if it names none."""
    count = unit_count(model.shape, point.site, point.layer) if point.unit is None else 1
    first = point.unit or 0
    units = torch.arange(first, first + count).repeat(len(lanes))
    rows, positions = (each.repeat_interleave(count) for each in (lanes, tokens))
    values = leaf.unflatten(1, (count, -1)).flatten(0, 1)
    return SiteWrite(point.site, point.layer, rows, positions, units, values, mode="add")
