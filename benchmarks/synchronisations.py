"""How often a program waits for its device, counted on a GPU or without one.

Without a GPU, tensors of a simulated device hold their numbers in ordinary memory and claim to be
elsewhere. Whatever would make the host wait for a GPU is counted: a number or a condition read from
such a tensor, a copy of it to the host, and operations whose result has a size that depends on its
content. An index that is a list of numbers isn't simulated: the numbers are lost.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SIMULATED = torch.device("meta")
"""What tensors of the simulated device claim to be on."""
_WAITING = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::item",
        "aten::equal",
        "aten::nonzero",
        "aten::bincount",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
    }
)
_MIXING = frozenset(
    {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_to_copy"}
)
"""Operations that take tensors on the host and on the device."""
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
_COPY = {False: "copy to the host", True: "copy to the device"}
Places = Counter[tuple[str, ...]]
"""Operation and the lines that called it, innermost last → how often."""


class SimulatedTensor(Tensor):
    """A tensor that claims to be on the simulated device."""

    @staticmethod
    def __new__(cls: Any, numbers: Tensor) -> SimulatedTensor:
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=SIMULATED,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        """On the CPU."""

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"SimulatedTensor({self.numbers})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(function, args, kwargs or {}, Counter())


class _Operations(TorchDispatchMode):
    """Runs operations of the simulated device on the CPU, and counts those that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Places = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _call(function, args, kwargs or {}, self.places)


class _Functions(TorchFunctionMode):
    """What isn't seen as an operation: `torch.tensor`, `torch.as_tensor` and `tolist`."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            made = function(*args, **{**kwargs, "device": "cpu"})
            if torch.device(device) != SIMULATED:
                return made
            _count(self.places, _COPY[True])
            return SimulatedTensor(made)
        if function is Tensor.tolist and isinstance(args[0], SimulatedTensor):
            _count(self.places, "tolist")
            return args[0].numbers.tolist()
        return function(*args, **kwargs)


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], places: Places) -> Any:
    """The operation on the CPU, its result on the simulated device if an input or `device` is."""
    inputs: list[SimulatedTensor] = []
    devices: list[torch.device] = []

    def on_host(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            inputs.append(value)
            return value.numbers
        if isinstance(value, torch.device):
            devices.append(value)
            return torch.device("cpu")
        return value

    own_args, own_kwargs = tree_map(on_host, args), tree_map(on_host, kwargs)
    name = function._schema.name
    simulated = devices[-1] == SIMULATED if devices else bool(inputs)
    waits = _waits(name, args, own_args, own_kwargs, simulated=simulated)
    if waits and (inputs or simulated):
        _count(places, waits)
    if inputs and name not in _MIXING:
        _check_devices(name, (args, kwargs))
    result = function(*own_args, **own_kwargs)
    if function._schema.is_mutable:  # what is written into is what is returned
        return kwargs["out"] if "out" in kwargs else args[0]
    if not simulated:
        return result
    # A view of a tensor from outside of inference mode may not be one from inside.
    inside = torch.is_inference_mode_enabled() and all(each.is_inference() for each in inputs)
    with torch.inference_mode(inside):
        return tree_map(lambda x: SimulatedTensor(x) if isinstance(x, Tensor) else x, result)


def _check_devices(name: str, inputs: Any) -> None:
    """RuntimeError where a tensor of the host is used with those of the device, as a GPU has it."""
    for value in tree_leaves(inputs):
        on_host = isinstance(value, Tensor) and not isinstance(value, SimulatedTensor)
        if on_host and value.dim():
            raise RuntimeError(f"`{name}` has tensors on the host and on the device")


def _count(places: Places, name: str) -> None:
    """Count an operation that waits, with the lines that called it."""
    lines = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    places[name, *lines[-3:]] += 1


def _waits(
    name: str, args: tuple[Any, ...], own: tuple[Any, ...], kwargs: Any, *, simulated: bool
) -> str:
    """What makes the host wait in this operation, `` where nothing does."""
    if name in _WAITING:
        return name
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in ("aten::_to_copy", "aten::to"):
        if simulated and isinstance(args[0], SimulatedTensor):
            return ""
        return "" if simulated and kwargs.get("non_blocking") else _COPY[simulated]
    if name == "aten::copy_":
        both = [isinstance(each, SimulatedTensor) for each in args[:2]]
        return "" if both[0] == both[1] else _COPY[both[0]]
    if name in _INDEXING:
        given = [index for index in own[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in given):
            return f"{name} by a mask"
        if not all(isinstance(index, SimulatedTensor | None) for index in args[1]):
            return f"{name} by indices on the host"
    return ""


def to_simulated(module: nn.Module) -> None:
    """Move a model to the simulated device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = nn.Parameter(SimulatedTensor(parameter.data), requires_grad=False)
            setattr(part, name, moved)
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, SimulatedTensor(buffer))


@contextmanager
def counted_synchronisations(device: torch.device) -> Generator[Places]:
    """Where the host waits for the device: a GPU, or the simulated one."""
    if device.type == "cuda":
        places: Places = Counter()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for each in found:
            if "synchronizing CUDA operation" in str(each.message):
                places[f"{each.filename.rpartition('/')[2]}:{each.lineno}",] += 1
        return
    operations = _Operations()
    with _Functions(operations.places), operations:
        yield operations.places
