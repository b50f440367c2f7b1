"""Derivatives by autograd of values that a forward pass computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers.cache_utils import Cache

from mechdsl.forward.hooks.module_exchange import replace_forward

_AUTOGRAD = ("inplace operation", "in-place operation", "Inference tensor", "derivative for")


class _PlainFunction:
    """Replacement of the function by which PyTorch checkpoints code with reentrant autograd."""

    @staticmethod
    def apply(function: Callable[..., Any], preserves_random_state: bool, *args: Any) -> Any:
        return function(*args)


class _BlockFunction:
    """A block whose checkpoint is ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


_checkpointed = checkpoint._checkpoint_without_reentrant_generator  # pyright: ignore[reportPrivateUsage]


def _checkpoint_blocks(function: object, *args: Any, **kwargs: Any) -> Generator[None]:
    if isinstance(function, _BlockFunction):
        yield from _checkpointed(function, *args, **kwargs)
    else:
        yield


@contextmanager
def disable_checkpoints() -> Generator[None]:
    """Store all activations for a backward pass in the context, also those in checkpoints
    (`torch.utils.checkpoint`).

    A checkpoint would compute them again during the backward pass, without the pass's hooks. Only
    those of `recompute_blocks` stay.
    """
    names = {
        "CheckpointFunction": _PlainFunction,
        "_checkpoint_without_reentrant_generator": _checkpoint_blocks,
    }
    before = {name: getattr(checkpoint, name) for name in names}
    try:
        for name, replacement in names.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


class _Reopened:
    """A context that can be opened several times, once for each backward pass."""

    def __init__(self, make: Callable[[], AbstractContextManager[object]]) -> None:
        self.make, self.stack = make, ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(self.make())

    def __exit__(self, *problem: Any) -> bool:
        return bool(self.stack.__exit__(*problem))


@contextmanager
def recompute_blocks(
    blocks: Iterable[nn.Module], again: Callable[[], AbstractContextManager[object]]
) -> Generator[None]:
    """Store only the inputs of blocks for a backward pass, which computes their activations again
    (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174).

    Args:
        blocks: Modules whose hooks, apart from those on the module itself, depend on nothing
            outside the block. A block that gets a cache of keys runs as usual.
        again: The context in which a block runs again, with hooks of the pass.
    """

    def run_checkpointed(function: _BlockFunction, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(each, Cache) for each in (*args, *kwargs.values())):
            return function.function(*args, **kwargs)  # a second run would add keys again
        return checkpoint.checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _Reopened(again)),
            **kwargs,
        )

    with ExitStack() as stack:
        for block in blocks:
            function = partial(run_checkpointed, _BlockFunction(block.forward))
            stack.enter_context(replace_forward(block, function))
        yield


class AutogradFailed(Exception):
    """Autograd can't differentiate the model's code; the text is autograd's message."""


@contextmanager
def catch_autograd_errors() -> Generator[None]:
    """Convert autograd's errors about the model's code to `AutogradFailed`."""
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not any(words in said for words in _AUTOGRAD):
            raise
        raise AutogradFailed(said) from error


def compute_gradients(total: Tensor, leaves: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor]:
    """Return the gradient per leaf, zeros without a dependency; keep: further calls follow.

    Raises AutogradFailed.
    """
    if not total.requires_grad:
        if not torch.is_grad_enabled():
            raise AutogradFailed("gradients are switched off, for example by a Python function")
        return [torch.zeros_like(leaf) for leaf in leaves]
    with catch_autograd_errors():
        return torch.autograd.grad(
            total, leaves, retain_graph=keep, allow_unused=True, materialize_grads=True
        )
