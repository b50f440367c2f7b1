"""What a device's name means on this machine; without torch, where it has been found out before."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from mechdsl.models.identity import digest_of
from mechdsl.results.versions import version_of
from mechdsl.store.store import Store

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def known_device(store: Store, name: str) -> str | None:
    """The kind of device that a name means, with the name of a GPU; None where nobody knows yet.
    Raises StoreProblem, OSError."""
    return "cpu" if name == "cpu" else store.note(_place(name))


def found_device(store: Store, name: str) -> str:
    """The same, asked of torch and kept. Raises what torch raises where there is no such device."""
    import torch

    from mechdsl.loading.devices import device

    found = device(name)
    told = found.type
    if told == "cuda":
        told = f"{told} {torch.cuda.get_device_name(found)}"
    store.take_note(_place(name), told)
    return told


def _place(name: str) -> str:
    """What a note is kept under: all that a name of a device hangs on."""
    parts = {
        "name": name,
        "host": platform.node(),
        "platform": platform.platform(),
        "torch": version_of("torch"),
        "visible": [os.environ.get(each) for each in _VARIABLES],
        "files": sorted(_device_files()),
        "driver": _driver(),
    }
    return f"device {digest_of(parts)}"


def _device_files() -> list[str]:
    try:
        every = os.listdir("/dev")
    except OSError:
        return []
    return [each for each in every if each.startswith(("nvidia", "kfd", "dri"))]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
