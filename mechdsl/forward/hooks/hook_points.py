"""Tensors of a running model: views through a layout, and hooks that change them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.batch import TokenFrame
from mechdsl.forward.hooks.module_exchange import (
    find_activation_name,
    get_activation,
    load_weights,
    replace_activation,
    replace_forward,
)
from mechdsl.models.block import is_transposed, unwrap_adapter
from mechdsl.models.shape import HookPoint, TensorLayout

HookStep = Callable[[Tensor, nn.Module, Tensor], Tensor]
"""(tapped tensor, its module, the module's input) → the tensor that the model continues with."""


def view_layout(tensor: Tensor, layout: TensorLayout) -> Tensor:
    """Return [B, T, units, width] of a tapped tensor, as a view if possible.

    If it is a copy, `put_layout` writes changes back.
    """
    match layout.axes:
        case "heads":
            return tensor
        case "heads_first":
            return tensor.transpose(1, 2)
        case "flat":
            part = tensor[..., layout.offset : layout.end]
            if layout.group == 1:
                return part.unfold(-1, layout.width, max(layout.stride, 1))
            return _view_groups(part, layout).flatten(-3, -2)


def put_layout(tensor: Tensor, layout: TensorLayout, view: Tensor) -> None:
    """Write changes of a `view_layout` into the tensor, if the view is a copy."""
    if layout.group > 1:
        part = _view_groups(tensor[..., layout.offset : layout.end], layout)
        part.copy_(view.unflatten(-2, part.shape[-3:-1]))


def _view_groups(part: Tensor, layout: TensorLayout) -> Tensor:
    """Return a view [..., group, unit of the group, width]."""
    groups = part.unfold(-1, layout.group * layout.width, layout.stride)
    return groups.unflatten(-1, (layout.group, layout.width))


def get_scale(model: nn.Module, tap: HookPoint) -> float | Tensor:
    """Return the factor from a tapped tensor to its site."""
    if tap.scaled_by is None:
        return tap.scale
    path, _, name = tap.scaled_by.rpartition(".")
    module = model.get_submodule(path)
    with load_weights(module):
        by = module.get_parameter(name).detach()
        return (by.tanh() if tap.squashed else by) * tap.scale


def apply_scale(value: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply a tensor by a scale; returns the same tensor if the scale is 1."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value * scale


def undo_scale(value: Tensor, scale: float | Tensor) -> Tensor:
    """Divide a tensor by a scale; returns the same tensor if the scale is 1."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value / scale


def get_head_weights(projection: nn.Module, layout: TensorLayout) -> Tensor:
    """Return [units, width, d_model]: each head's slice of the output projection."""
    return get_linear_map(projection).unflatten(0, (layout.units, layout.width))


def get_linear_map(module: nn.Module) -> Tensor:
    """Return [in, out]: the matrix of a linear map, including peft adapters."""
    base: nn.Module = unwrap_adapter(module)
    with load_weights(base):
        weight = base.get_parameter("weight")
        by_input = weight if is_transposed(base) else weight.t()
        if base is module:
            return by_input
        return _measure_linear_map(module, by_input.new_zeros(len(by_input)))


@torch.no_grad()
def _measure_linear_map(projection: nn.Module, nothing: Tensor) -> Tensor:
    """Measure the matrix [in, out] of a linear map, including peft adapters.

    Args:
        nothing: [in] zeros.
    """
    every, none = torch.diag(nothing + 1), nothing[None]
    return _call_without_hooks(projection, every) - _call_without_hooks(projection, none)


def project(projection: nn.Module, given: Tensor) -> Tensor:
    """Return the output of a linear map for other vectors than those of its call.

    given: [1, K, …] as the map receives them.
    """
    with load_weights(unwrap_adapter(projection)):
        return _call_without_hooks(projection, given)


def _call_without_hooks(module: nn.Module, given: Tensor) -> Tensor:
    # The class's own forward, because a packed pass replaces the instance's.
    forward: Any = type(module).forward
    outputs = forward(module, given)
    return (
        outputs[0] if isinstance(outputs, tuple) else outputs
    )  # I-BERT's map also returns a scale


def project_heads(z: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
    """Return [K, d_model]: `z` [K, d_head] of `heads` [K], projected by the slices of these heads.

    heads: on the host, ascending.
    """
    distinct, counts = heads.unique_consecutive(return_counts=True)
    out = z.new_empty(z.shape[0], weight.shape[2])
    first = 0
    for head, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        out[first : first + count] = z[first : first + count] @ weight[head]
        first += count
    return out


def _run_steps(
    steps: list[HookStep], value: Tensor, module: nn.Module, given: Tensor, leading: int, flat: bool
) -> Tensor:
    """Apply all steps to a tensor.

    Steps on vectors (`flat`) always get [B, T, width], also if the model merges rows and tokens in
    one dimension, or spreads a row's tokens over two (a grid, parts of an image).
    """
    now = value
    if flat:
        now = value.reshape(leading, -1, value.shape[-1])
        given = given.reshape(leading, -1, given.shape[-1])
    before = now
    for step in steps:
        now = step(now, module, given)
    if now is before:
        return value
    if now.shape == before.shape:
        return now.reshape(value.shape)
    return now.flatten(0, 1) if value.dim() == 2 else now


class InputHook:
    """Hook that runs steps on a module's input, only in the first call if `once`."""

    def __init__(
        self, steps: list[HookStep], frame: TokenFrame, *, flat: bool = True, once: bool = False
    ) -> None:
        self.steps = steps
        self.frame = frame
        self.flat = flat
        self.once = once
        self.done = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.once and self.done:
            return None
        self.done = True
        given = get_activation(args, kwargs)
        value = _run_steps(self.steps, given, module, given, self.frame.leading, self.flat)
        return None if value is given else replace_activation(args, kwargs, value)


class OutputHook:
    """Hook that runs steps on a module's output, only in the first call if `once`."""

    def __init__(
        self,
        steps: list[HookStep],
        item: int,
        frame: TokenFrame,
        *,
        flat: bool = True,
        once: bool = False,
    ) -> None:
        self.steps = steps
        self.item = item
        self.frame = frame
        self.flat = flat
        self.once = once
        self.done = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.once and self.done:
            return None
        self.done = True
        several = isinstance(output, (tuple, list))
        returned: Tensor = output[self.item] if several else output
        first = args[0] if args else kwargs.get(find_activation_name(kwargs))
        given = first if isinstance(first, Tensor) else returned
        value = _run_steps(self.steps, returned, module, given, self.frame.leading, self.flat)
        if value is returned:
            return None
        if not several:
            return value
        return type(output)([*output[: self.item], value, *output[self.item + 1 :]])


_FUSED_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": partial(nn.functional.gelu, approximate="tanh"),
    "FastGELUActivation": partial(nn.functional.gelu, approximate="tanh"),
    "BloomGelu": partial(nn.functional.gelu, approximate="tanh"),
}
"""Fused kernels for activation functions of equal formula, by class."""


@contextmanager
def fuse_activations(module: nn.Module) -> Generator[None]:
    """Run activation functions of a known formula in one kernel."""
    with ExitStack() as stack:
        for part in module.modules():
            function = _FUSED_ACTIVATIONS.get(type(part).__name__)
            if function is not None:
                stack.enter_context(replace_forward(part, function))
        yield
