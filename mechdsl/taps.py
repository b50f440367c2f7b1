# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false
"""Tensors in a running model: seen through a layout, changed by hooks, blocks stubbed out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mechdsl.models.anatomy import Layout
from mechdsl.models.finder import transposed

Step = Callable[[Tensor, nn.Module, Tensor], Tensor]
"""(the tapped tensor, its module, the module's input) to the tensor that the model goes on with."""


def layout_view(tensor: Tensor, layout: Layout) -> Tensor:
    """[B, T, units, width] view of a tapped tensor; writing to it writes to the tensor."""
    match layout.axes:
        case "heads":
            return tensor
        case "heads_first":
            return tensor.transpose(1, 2)
        case "flat":
            part = tensor[..., layout.offset : layout.end]
            return part.unfold(-1, layout.width, max(layout.stride, 1))


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The activation that a module was called with."""
    value = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(value, Tensor):
        raise TypeError("a tapped module was called without an activation as its first argument")
    return value


def given_again(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another activation."""
    return ((value, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": value})


def head_weights(projection: nn.Module, layout: Layout) -> Tensor:
    """[units, width, d_model]: each head's slice of the output projection."""
    weight = projection.get_parameter("weight")
    by_input = weight if transposed(projection) else weight.t()
    return by_input.unflatten(0, (layout.units, layout.width))


def through_heads(z: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
    """[K, d_model]: `z` [K, d_head] of `heads` [K] through the heads' slices of the projection."""
    out = z.new_empty(z.shape[0], weight.shape[2])
    for head in heads.unique().tolist():
        mine = heads == head
        out[mine] = z[mine] @ weight[head]
    return out


class Stub:
    """Stands in for a block's forward and hands its input on, in the form the block returns."""

    def __init__(self, returns: int | None) -> None:
        self.returns = returns

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = given_to(args, kwargs)
        return hidden if self.returns is None else (hidden, *[None] * (self.returns - 1))


class InHook:
    """Runs steps on what a module reads."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = value = given_to(args, kwargs)
        for step in self.steps:
            value = step(value, module, given)
        return None if value is given else given_again(args, kwargs, value)


class OutHook:
    """Runs steps on what a module returns."""

    def __init__(self, steps: list[Step], item: int) -> None:
        self.steps = steps
        self.item = item

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        returned: Tensor = output[self.item] if isinstance(output, tuple) else output
        value = returned
        given = given_to(args, kwargs) if args or "hidden_states" in kwargs else returned
        for step in self.steps:
            value = step(value, module, given)
        if value is returned:
            return None
        if not isinstance(output, tuple):
            return value
        return (*output[: self.item], value, *output[self.item + 1 :])


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


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def clean_model_check(module: nn.Module) -> list[str]:
    """Paths of modules on which something of ours was left; empty after every run."""
    left: list[str] = []
    for path, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(_ours(one) for one in (*hooks, part.__dict__.get("forward"))):
            left.append(path)
    return left
