"""Prompts that begin alike: the linear maps of all blocks run once for their equal tokens."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.base.arrays import Bools, Ints
from mechdsl.forward.hooks.batch import Batch, indices_to_device
from mechdsl.forward.hooks.model import IMAGE_TOKENS, LoadedModel
from mechdsl.forward.hooks.module_exchange import replace_forward
from mechdsl.models.block import is_transposed
from mechdsl.prompts.runs import share_beginnings


@dataclass(frozen=True, eq=False)
class TokenCopies:
    """Tokens of a pass whose activations are equal, because their prompts begin alike."""

    computed: Tensor
    """[N] ascending: the tokens that are computed. Token = row * T + column."""
    of: Tensor
    """[B * T]: index in `computed` of the token that each token equals."""

    @contextmanager
    def shared(self, model: LoadedModel) -> Generator[None]:
        """Compute the linear maps of blocks once for equal tokens while the context is open."""
        with ExitStack() as stack:
            for module in _list_shared_maps(model):
                stack.enter_context(replace_forward(module, self._once(module.forward)))
            yield

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if len(args) == 1 and not kwargs else None
            if not isinstance(given, Tensor) or given.shape[:-1].numel() != len(self.of):
                return forward(*args, **kwargs)
            found: Tensor = forward(given.reshape(-1, given.shape[-1])[self.computed])
            return found[self.of].unflatten(0, given.shape[:-1])

        return compute


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
    attends = model.shape.takes == "attended image" and groups is not None
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

    If blocks attend to images, the prompts must also have the same image.

    Args:
        model: The model.
        batch: The prompts.
        prompts: [prompt] all of its tokens, which begin with those that an encoder reads.
        noised: [prompt] whether its activations differ from those of prompts with equal tokens.
    """
    starts, groups = batch.starts.cpu(), np.zeros(len(prompts), np.int64)
    if model.shape.takes == "attended image":
        counts = batch.of_stack("encoder").lengths.cpu()
        starts = starts + counts
        groups = np.array([ids[0] for ids in prompts], np.int64)  # each image has separate tokens
        pairs = zip(prompts, counts.tolist(), strict=True)
        prompts = [ids[count:] for ids, count in pairs]
    groups = np.where(noised, -1 - np.arange(len(prompts)), groups)
    return find_copies(model, prompts, starts, batch.ids.shape[1], groups=groups)


def _list_shared_maps(model: LoadedModel) -> list[nn.Module]:
    """List the linear maps of all blocks that read its tokens, without those of experts, which see
    some tokens only."""
    paths: list[str] = []
    for block in model.anatomy.blocks:
        paths += [*block.projections, *([block.output] if block.output else [])]
        paths += [] if model.shape.n_experts else block.mlp
    if model.shape.takes == "attended image":  # keys and values are of tokens of the image
        for block in model.others["cross"].anatomy.blocks:
            paths += [*block.projections[:1], *([block.output] if block.output else [])]
    modules = [each for path in paths for each in model.module.get_submodule(path).modules()]
    return [each for each in modules if isinstance(each, nn.Linear) or is_transposed(each)]
