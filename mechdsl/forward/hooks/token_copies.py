"""Prompts that begin alike, and rows of one prompt: the linear maps of blocks run once for their
equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Bools, Ints
from mechdsl.forward.hooks.batch import (
    Batch,
    EdgeWrite,
    PositionIdWrite,
    SiteWrite,
    indices_to_device,
)
from mechdsl.forward.hooks.model import IMAGE_TOKENS, LoadedModel, list_images
from mechdsl.forward.hooks.module_exchange import replace_forward
from mechdsl.models.block import is_transposed
from mechdsl.prompts.runs import count_worthwhile_copies, share_beginnings


@dataclass(frozen=True, eq=False)
class TokenCopies:
    """Tokens of a pass whose activations are equal, because their prompts begin alike."""

    computed: Tensor
    """[N] ascending: the tokens that are computed. Token = row * T + column."""
    of: Tensor
    """[B * T]: index in `computed` of the token that each token equals."""

    @contextmanager
    def shared(self, model: LoadedModel, layer: int | None = None) -> Generator[None]:
        """Compute the linear maps of blocks, or of one, once for equal tokens while the context is
        open."""
        layers = range(model.shape.n_layers) if layer is None else (layer,)
        with ExitStack() as stack:
            for module in _list_shared_maps(model, layers):
                stack.enter_context(replace_forward(module, self._once(module.forward)))
            yield

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(given, Tensor) or given.shape[:-1].numel() != len(self.of):
                return forward(*args, **kwargs)
            output: Tensor = forward(given.reshape(-1, given.shape[-1])[self.computed])
            return output[self.of].unflatten(0, given.shape[:-1])

        return compute


@dataclass(frozen=True, eq=False)
class RowCopies:
    """Tokens of rows whose activations are equal, because no row has changed them."""

    by_block: Sequence[TokenCopies | None]
    """Of each block; None if it shares no tokens."""

    @contextmanager
    def shared(self, model: LoadedModel) -> Generator[None]:
        """Compute the linear maps of blocks once for equal tokens while the context is open."""
        with ExitStack() as stack:
            for layer, copies in enumerate(self.by_block):
                if copies is not None:
                    stack.enter_context(copies.shared(model, layer))
            yield


def find_row_copies(
    model: LoadedModel,
    batch: Batch,
    lanes: Ints,
    writes: Sequence[SiteWrite],
    edges: Sequence[EdgeWrite],
    numbers: Sequence[PositionIdWrite] = (),
) -> RowCopies:
    """Find the tokens that rows of full forward passes have not changed when a block begins.

    Args:
        model: A causal model, or one whose blocks attend to images.
        batch: The rows.
        lanes: [row] a number; rows with the same number have the same tokens and the same image.
        writes, edges, numbers: Everything that changes the rows.
    """
    count, width = batch.ids.shape
    changed = np.full((model.shape.n_layers + 1, count), width, dtype=np.int64)
    for write in writes:
        first = 0 if write.layer is None else write.layer + (write.site == "resid_post")
        if write.stack == "vision":
            first = 0
        if write.layer is None and write.site != "embed":  # after the last block
            continue
        columns = _list_columns(batch, write.rows, write.positions, write.site, write.stack)
        np.minimum.at(changed[first], write.rows.numpy(), columns)
    for edge in edges:
        first = 0 if edge.stack == "vision" else edge.layer
        columns = _list_columns(batch, edge.rows, edge.queries, "q", edge.stack)
        np.minimum.at(changed[first], edge.rows.numpy(), columns)
    for number in numbers:
        columns = _list_columns(batch, number.rows, number.positions, "embed", "")
        np.minimum.at(changed[0], number.rows.numpy(), columns)
    row_copies: list[TokenCopies | None] = []
    _, prompt = np.unique(lanes, return_inverse=True)
    column, row = np.arange(width), np.arange(count)[:, None]
    padding = column >= (batch.starts + batch.lengths).cpu().numpy()[:, None]
    before: Ints | None = None
    for layer in range(model.shape.n_layers):
        own = changed[: layer + 1].min(axis=0)
        if before is None or not np.array_equal(own, before):
            equal = (column < own[:, None]) | padding
            key = np.where(equal, prompt[:, None], count + row) * width + column
            row_copies.append(_share_tokens(model, key))
        else:
            row_copies.append(row_copies[-1])
        before = own
    return RowCopies(row_copies)


def _list_columns(batch: Batch, rows: Tensor, positions: Tensor, site: str, stack: str) -> Ints:
    """Return [K] columns of the first tokens that changes at positions of a site reach: all tokens
    attend to an image."""
    if stack == "vision" or batch.of_site(site, stack) is not batch:
        return np.zeros(len(rows), dtype=np.int64)
    return batch.columns(rows, positions).numpy()


def _share_tokens(model: LoadedModel, key: Ints) -> TokenCopies | None:
    """Return the copies of tokens [row, column] with equal keys; None if they are few."""
    _, computed, of = np.unique(key, return_index=True, return_inverse=True)
    if key.size - len(computed) < count_worthwhile_copies(key.size):
        return None
    order = np.argsort(computed)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    index = torch.from_numpy(computed[order]), torch.from_numpy(rank[of.reshape(-1)])
    return TokenCopies(*indices_to_device([*index], model.device))


def find_copies(
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    starts: Tensor,
    width: int,
    *,
    groups: Ints | None = None,
) -> TokenCopies | None:
    """Find the tokens of equal beginnings of prompts; None if they aren't shared.

    A beginning never ends within an image, whose tokens may see each other.

    Args:
        model: The model.
        prompts: [prompt] its tokens in the pass.
        starts: [prompt] the column of its first token.
        width: Columns of the pass.
        groups: [prompt] a number; activations of prompts with different numbers differ, also at
            equal tokens. If blocks attend to images, prompts of a group must have the same image.
    """
    table = IMAGE_TOKENS.get(model.module)
    before_images = table is not None and table.prefix_end is not None  # they see the question
    attends = model.shape.attends_to_image and groups is not None
    if not (attends or (model.shape.reads_prefix and model.restartable)) or before_images:
        return None
    owner = share_beginnings(
        prompts, np.zeros(len(prompts), np.int64) if groups is None else groups
    )
    if owner is None:
        return None
    first = starts.cpu().numpy().clip(max=width - 1) + width * np.arange(len(prompts))
    of = np.repeat(first, width)  # padding equals the first token
    row, position = np.nonzero(owner >= 0)
    of[first[row] + position] = first[owner[row, position]] + position
    computed, of = np.unique(of[of], return_inverse=True)
    index = indices_to_device([torch.from_numpy(computed), torch.from_numpy(of)], model.device)
    return TokenCopies(*index)


def find_batch_copies(
    model: LoadedModel, batch: Batch, prompts: Sequence[tuple[int, ...]], noised: Bools
) -> TokenCopies | None:
    """Find the tokens of a batch whose prompts begin alike; None if they aren't shared.

    If blocks attend to images, the prompts must also have the same images.

    Args:
        model: The model.
        batch: The prompts.
        prompts: [prompt] all of its tokens, which begin with those that an encoder reads.
        noised: [prompt] whether its activations differ from those of prompts with equal tokens.
    """
    starts, groups = batch.starts.cpu(), np.zeros(len(prompts), np.int64)
    if model.shape.attends_to_image:
        counts = batch.of_stack("encoder").lengths.cpu()
        starts = starts + counts
        images = list_images(model, batch.of_stack("encoder"))  # each has separate tokens
        numbers = {own: number for number, own in enumerate(dict.fromkeys(images))}
        groups = np.array([numbers[own] for own in images], np.int64)
        pairs = zip(prompts, counts.tolist(), strict=True)
        prompts = [ids[count:] for ids, count in pairs]
    groups = np.where(noised, -1 - np.arange(len(prompts)), groups)
    return find_copies(model, prompts, starts, batch.ids.shape[1], groups=groups)


def _list_shared_maps(model: LoadedModel, layers: Iterable[int]) -> list[nn.Module]:
    """List the linear maps of blocks that read its tokens, without those of experts, which see
    some tokens only."""
    paths: list[str] = []
    for block in (model.anatomy.blocks[layer] for layer in layers):
        paths += [*block.projections, *([block.output] if block.output else [])]
        paths += [] if model.shape.n_experts else block.mlp
    if model.shape.attends_to_image:  # keys and values are of tokens of the image
        for block in (model.others["cross"].anatomy.blocks[layer] for layer in layers):
            paths += [*block.projections[:1], *([block.output] if block.output else [])]
    modules = [module for path in paths for module in model.module.get_submodule(path).modules()]
    return [module for module in modules if isinstance(module, nn.Linear) or is_transposed(module)]
