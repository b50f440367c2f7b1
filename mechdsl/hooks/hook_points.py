# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""Tensors in a running model: seen through a layout, changed by hooks, blocks stubbed out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdsl.hooks.reads_and_writes import Frame
from mechdsl.models.anatomy import HookPoint, Layout
from mechdsl.models.projections import transposed, without_adapter

Step = Callable[[Tensor, nn.Module, Tensor], Tensor]
"""(the tapped tensor, its module, the module's input) to the tensor that the model goes on with."""


def layout_view(tensor: Tensor, layout: Layout) -> Tensor:
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
            return _grouped(part, layout).flatten(-3, -2)


def layout_put(tensor: Tensor, layout: Layout, view: Tensor) -> None:
    """What was written to `layout_view` is in the tensor, also where that is no view."""
    if layout.group > 1:
        part = _grouped(tensor[..., layout.offset : layout.end], layout)
        part.copy_(view.unflatten(-2, part.shape[-3:-1]))


def _grouped(part: Tensor, layout: Layout) -> Tensor:
    """[…, group, unit of it, width] view."""
    groups = part.unfold(-1, layout.group * layout.width, layout.stride)
    return groups.unflatten(-1, (layout.group, layout.width))


_NAMES = ("hidden_states", "inputs_embeds", "hidden_state", "x", "input", "query")
"""What modules call the activation that they get, where it isn't their first argument."""


def _name(kwargs: dict[str, Any]) -> str:
    return next((name for name in _NAMES if name in kwargs), _NAMES[0])


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The activation that a module was called with."""
    value = args[0] if args else kwargs.get(_name(kwargs))
    if not isinstance(value, Tensor):
        raise TypeError("a tapped module was called without an activation as its first argument")
    return value


def given_again(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another activation."""
    return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, _name(kwargs): value})


@contextmanager
def at_hand(module: nn.Module) -> Generator[None]:
    """The module's own weights can be read, also where accelerate keeps them on a disk, or in
    another memory, while the module isn't running."""
    hook = module.__dict__.get("_hf_hook")
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if hook is None or not any(weight.is_meta for weight in own):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, ())


def scale_of(model: nn.Module, tap: HookPoint) -> float | Tensor:
    """What a tapped tensor is multiplied with to be the site."""
    if tap.scaled_by is None:
        return tap.scale
    path, _, name = tap.scaled_by.rpartition(".")
    module = model.get_submodule(path)
    with at_hand(module):
        return module.get_parameter(name).detach() * tap.scale


def scaled(value: Tensor, scale: float | Tensor) -> Tensor:
    """The tensor times a scale; itself where that is one."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value * scale


def unscaled(value: Tensor, scale: float | Tensor) -> Tensor:
    """The other way round."""
    return value if not isinstance(scale, Tensor) and scale == 1 else value / scale


def head_weights(projection: nn.Module, layout: Layout) -> Tensor:
    """[units, width, d_model]: each head's slice of the output projection."""
    base: nn.Module = without_adapter(projection)
    with at_hand(base):
        weight = base.get_parameter("weight")
        if base is not projection:
            by_input = _as_it_runs(projection, weight.new_zeros(layout.units * layout.width))
        else:
            by_input = weight if transposed(base) else weight.t()
    return by_input.unflatten(0, (layout.units, layout.width))


@torch.no_grad()
def _as_it_runs(projection: nn.Module, nothing: Tensor) -> Tensor:
    """[in, out]: what a linear map makes of each of its inputs, with whatever adapters of peft do
    to it; nothing: [in], zeros."""
    # The class's own, as a packed pass has put another one in its place.
    forward: Any = type(projection).forward
    return forward(projection, torch.diag(nothing + 1)) - forward(projection, nothing[None])


def through_heads(z: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
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


class Stub:
    """Stands in for a block's forward and hands its input on, in the form the block returns."""

    def __init__(self, returns: int | None) -> None:
        self.returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = given_to(args, kwargs)
        return hidden if self.returns is None else (hidden, *[None] * (self.returns - 1))


def _stepped(
    steps: list[Step], value: Tensor, module: nn.Module, given: Tensor, leading: int, flat: bool
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


class InHook:
    """Runs steps on what a module reads, the first time only if `once`."""

    def __init__(
        self, steps: list[Step], frame: Frame, *, flat: bool = True, once: bool = False
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
        given = given_to(args, kwargs)
        value = _stepped(self.steps, given, module, given, self.frame.leading, self.flat)
        return None if value is given else given_again(args, kwargs, value)


class OutHook:
    """Runs steps on what a module returns, the first time only if `once`."""

    def __init__(
        self, steps: list[Step], item: int, frame: Frame, *, flat: bool = True, once: bool = False
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
        first = args[0] if args else kwargs.get(_name(kwargs))
        given = first if isinstance(first, Tensor) else returned
        value = _stepped(self.steps, returned, module, given, self.frame.leading, self.flat)
        if value is returned:
            return None
        if not several:
            return value
        return type(output)([*output[: self.item], value, *output[self.item + 1 :]])


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """The module computes something else for a while; hooks on it stay where they are."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.forward = before


_FUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": partial(nn.functional.gelu, approximate="tanh"),
    "FastGELUActivation": partial(nn.functional.gelu, approximate="tanh"),
    "BloomGelu": partial(nn.functional.gelu, approximate="tanh"),
}
"""Activation functions written out step by step, by class: the same formula in one kernel."""


@contextmanager
def fused(module: nn.Module) -> Generator[None]:
    """Activation functions of a known formula run in one kernel."""
    with ExitStack() as stack:
        for part in module.modules():
            function = _FUSED.get(type(part).__name__)
            if function is not None:
                stack.enter_context(replaced(part, function))
        yield
