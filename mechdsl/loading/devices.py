"""Devices by their names, and weights that are spread over several."""

from __future__ import annotations

from pathlib import Path

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")


def device_problem(name: str) -> str | None:
    """Why a device can't be used; None where it can."""
    try:
        kind = device(name).type
    except (RuntimeError, AssertionError, NotImplementedError):
        known = name.partition(":")[0] in DEVICES
        return "torch finds no such device on this machine" if known else "there is no such device"
    return None if kind in DEVICES else "models can't run there"


def device(name: str) -> torch.device:
    """The device that a name means; `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    torch.empty(0, device=found)  # says now what it would say in the middle of a run
    return found


def spread_of(name: str, offload: Path | None) -> dict[str, object] | None:
    """How weights are spread over devices, memory and a folder; None where they aren't."""
    if offload is None:
        return None
    spread: dict[str, object] = {"device_map": "auto", "offload_folder": str(offload)}
    if name != "auto":
        from accelerate.utils import get_max_memory

        only = device(name)
        room = get_max_memory()
        spread["max_memory"] = {k: v for k, v in room.items() if k == "cpu" or _is(only, k)}
    return spread


def _is(device: torch.device, name: int | str) -> bool:
    """Whether accelerate calls a device this: a number for a GPU, else its kind."""
    if isinstance(name, int):
        return device.type not in ("cpu", "mps") and name == (device.index or 0)
    return name == device.type
