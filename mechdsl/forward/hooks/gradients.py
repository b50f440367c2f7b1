"""Derivatives by autograd of values that a forward pass computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

_AUTOGRAD = ("inplace operation", "in-place operation", "Inference tensor", "derivative for")


class _PlainFunction:
    """Replacement of the function by which PyTorch checkpoints code with reentrant autograd."""

    @staticmethod
    def apply(function: Callable[..., Any], preserves_random_state: bool, *args: Any) -> Any:
        return function(*args)


def _change_nothing(*_: object) -> Generator[None]:
    yield


@contextmanager
def disable_checkpoints() -> Generator[None]:
    """Store all activations for a backward pass in the context, also those in checkpoints
    (`torch.utils.checkpoint`).

    A checkpoint would compute them again during the backward pass, without the pass's hooks.
    """
    names = {
        "CheckpointFunction": _PlainFunction,
        "_checkpoint_without_reentrant_generator": _change_nothing,
    }
    before = {name: getattr(checkpoint, name) for name in names}
    try:
        for name, replacement in names.items():
            setattr(checkpoint, name, replacement)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


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
