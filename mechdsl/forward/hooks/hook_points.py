"""Tensors of a running model: viewed through a layout, and changed by hooks."""

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
from mechdsl.models.anatomy import HookPoint, TensorLayout
from mechdsl.models.block import is_transposed, unwrap_adapter

HookStep = Callable[[Tensor, nn.Module, Tensor], Tensor]
"""(the tapped tensor, its module, the module's input) to the tensor that the model goes on with."""


def view_layout(tensor: Tensor, layout: TensorLayout) -> Tensor:
    """[B, T, units, width] of a tapped tensor, a view wherever there can be one; what is written
    to it is put back by `layout_put`."""
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
    """What was written to `layout_view` is in the tensor, also where that is no view."""
    if layout.group > 1:
        part = _view_groups(tensor[..., layout.offset : layout.end], layout)
        part.copy_(view.unflatten(-2, part.shape[-3:-1]))


def _view_groups(part: Tensor, layout: TensorLayout) -> Tensor:
    """[…, group, unit of it, width] view."""
    groups = part.unfold(-1, layout.group * layout.width, layout.stride)
    return groups.unflatten(-1, (layout.group, layout.width))


def get_scale(model: nn.Module, tap: HookPoint) -> float | Tensor:
    """What a tapped tensor is multiplied with to be the site."""
    if tap.scaled_by is None:
        return tap.scale
    path, _, name = tap.scaled_by.rpartition(".")
    module = model.get_submodule(path)
    with load_weights(module):
        return module.get_parameter(name).detach() * tap.scale


def apply_scale(value: Tensor, scale: float | Tensor) -> Tensor:
    """The tensor times a scale; itself where that is one."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value * scale


def undo_scale(value: Tensor, scale: float | Tensor) -> Tensor:
    """The other way round."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value / scale


def get_head_weights(projection: nn.Module, layout: TensorLayout) -> Tensor:
    """[units, width, d_model]: each head's slice of the output projection."""
    base: nn.Module = unwrap_adapter(projection)
    with load_weights(base):
        weight = base.get_parameter("weight")
        if base is not projection:
            by_input = _measure_linear_map(
                projection, weight.new_zeros(layout.units * layout.width)
            )
        else:
            by_input = weight if is_transposed(base) else weight.t()
    return by_input.unflatten(0, (layout.units, layout.width))


@torch.no_grad()
def _measure_linear_map(projection: nn.Module, nothing: Tensor) -> Tensor:
    """[in, out]: what a linear map makes of each of its inputs, with whatever adapters of peft do
    to it; nothing: [in], zeros."""
    # The class's own, as a packed pass has put another one in its place.
    forward: Any = type(projection).forward
    return forward(projection, torch.diag(nothing + 1)) - forward(projection, nothing[None])


def project_heads(z: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
    """[K, d_model]: `z` [K, d_head] of `heads` [K] through the heads' slices of the projection.

    heads: on the host, in ascending order.
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
    """The tensor after all steps. Those of vectors (`flat`) see [B, T, width] also where the model
    has put all tokens in one dimension, tokens of one row in two (a grid, parts of an image), or
    images of several rows behind one another."""
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
    """Runs steps on what a module reads, the first time only if `once`."""

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
    """Runs steps on what a module returns, the first time only if `once`."""

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
"""Activation functions written out step by step, by class: the same formula in one kernel."""


@contextmanager
def fuse_activations(module: nn.Module) -> Generator[None]:
    """Activation functions of a known formula run in one kernel."""
    with ExitStack() as stack:
        for part in module.modules():
            function = _FUSED_ACTIVATIONS.get(type(part).__name__)
            if function is not None:
                stack.enter_context(replace_forward(part, function))
        yield
