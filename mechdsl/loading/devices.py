"""Devices by name, and models of the caller that a run leaves unchanged."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechdsl.base.runtime import preserve_random_state

DEVICES = ("cpu", "cuda", "mps", "xpu")


def explain_device_problem(name: str) -> str | None:
    """Why a device can't be used; None where it can."""
    try:
        kind = get_device(name).type
    except (RuntimeError, AssertionError, NotImplementedError):
        known = name.partition(":")[0] in DEVICES
        return "torch finds no such device on this machine" if known else "there is no such device"
    return None if kind in DEVICES else "models can't run there"


def get_device(name: str) -> torch.device:
    """The device that a name means; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    torch.empty(0, device=found)  # says now what it would say in the middle of a run
    return found


def plan_device_map(name: str, offload: Path | None) -> dict[str, object] | None:
    """How weights are spread over devices, memory and a folder; None where they aren't."""
    if offload is None:
        return None
    spread: dict[str, object] = {"device_map": "auto", "offload_folder": str(offload)}
    if name != "auto":
        from accelerate.utils import get_max_memory

        only = get_device(name)
        room = get_max_memory()
        spread["max_memory"] = {
            k: v for k, v in room.items() if k == "cpu" or _matches_device(only, k)
        }
    return spread


def _matches_device(device: torch.device, name: int | str) -> bool:
    """Whether accelerate calls a device this: a number for a GPU, else its kind."""
    if isinstance(name, int):
        return device.type not in ("cpu", "mps") and name == (device.index or 0)
    return name == device.type


@contextmanager
def restore_models(models: Iterable[object]) -> Generator[None]:
    """Models, and random numbers, are inside as anybody likes, and afterwards as before: also
    where what is inside raises or is interrupted.

    Of every module its attributes are kept (training mode, hooks, which tensors its parameters and
    buffers are), of its config all that it holds. Values of weights are not copied.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state())
        parts = {id(part): part for m in models if isinstance(m, nn.Module) for part in m.modules()}
        configs: dict[int, Any] = {}
        for part in parts.values():
            _add_configs(getattr(part, "config", None), configs)
        for held in (*parts.values(), *configs.values()):
            stack.callback(_save_attributes(vars(held)))
        yield


def _save_attributes(attributes: dict[str, Any]) -> Callable[[], None]:
    """What puts an object's attributes back; tables among them (hooks, buffers) stay the same
    objects, as handles of hooks refer to them."""
    before = dict(attributes)
    tables = [(value, dict(value)) for value in before.values() if isinstance(value, dict)]

    def put_back() -> None:
        attributes.clear()
        attributes.update(before)
        for table, content in tables:
            table.clear()
            table.update(content)

    return put_back


def _add_configs(config: Any, found: dict[int, Any]) -> None:
    """A config of the library with those inside of it: of a text and an image part, say."""
    if hasattr(config, "to_dict") and hasattr(config, "__dict__") and id(config) not in found:
        found[id(config)] = config
        for value in vars(config).values():
            _add_configs(value, found)
