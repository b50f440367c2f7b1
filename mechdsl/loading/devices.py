"""Devices by name, and restoration of the caller's models after a run."""

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
    """Return the reason why a device can't be used; None if it can."""
    try:
        kind = get_device(name).type
    except (RuntimeError, AssertionError, NotImplementedError):
        known = name.partition(":")[0] in DEVICES
        return "torch finds no such device on this machine" if known else "there is no such device"
    return None if kind in DEVICES else "models can't run there"


def get_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    torch.empty(0, device=device)  # fails now instead of in the middle of a run
    return device


def plan_device_map(name: str, offload: Path | None) -> dict[str, object] | None:
    """Plan the distribution of weights over devices, memory and a folder; None without a folder."""
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
    """Return whether accelerate's name is this device: a number for a GPU, else its type."""
    if isinstance(name, int):
        return device.type not in ("cpu", "mps") and name == (device.index or 0)
    return name == device.type


@contextmanager
def restore_models(models: Iterable[object]) -> Generator[None]:
    """Put models into eval mode without gradient checkpointing, and restore them and the random
    state on exit, also after errors and interrupts.

    The context restores each module's attributes (training mode, hooks, which tensors are its
    parameters and buffers) and all values of its config. It doesn't copy values of weights. What is
    known of images is forgotten, because the weights may change before the next run. Within it,
    outputs have names.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state())
        parts = {id(part): part for m in models if isinstance(m, nn.Module) for part in m.modules()}
        stack.callback(_forget_images, parts.values())
        configs = _list_configs(parts.values())
        for held in (*parts.values(), *configs):
            stack.callback(_save_attributes(vars(held)))
        # A check restores what it changes, so a later step can't rely on its eval mode.
        for part in parts.values():
            part.training = False
            _disable_checkpointing(part)
        name_outputs(parts.values())
        yield


def name_outputs(modules: Iterable[nn.Module]) -> None:
    """Make modules return named outputs; a config with `return_dict=False` asks for tuples."""
    for config in _list_configs(modules):
        if not getattr(config, "return_dict", True):
            config.return_dict = True


def _disable_checkpointing(part: nn.Module) -> None:
    """Remove what transformers adds to a module for gradient checkpointing, which only acts in
    training mode; models with and without it are then identified as one."""
    held = vars(part)
    for hook in held.pop("_require_grads_hooks", ()):
        hook.remove()
    if "_require_grads_hook" in held:
        held.pop("_require_grads_hook").remove()
    held.pop("_gradient_checkpointing_func", None)
    if "gradient_checkpointing" in held:
        del held["gradient_checkpointing"]
        if not hasattr(part, "gradient_checkpointing"):  # no class of the module has it
            held["gradient_checkpointing"] = False


def _forget_images(modules: Iterable[nn.Module]) -> None:
    # Not at the top: a run that reads the store needs the device, but no hooks.
    from mechdsl.forward.hooks.model import (
        ATTENDED_MAPS,
        ENCODED_VECTORS,
        IMAGE_INPUTS,
        IMAGE_TOKENS,
    )

    for module in modules:
        IMAGE_INPUTS.pop(module, None)
        ENCODED_VECTORS.pop(module, None)
        ATTENDED_MAPS.pop(module, None)
        IMAGE_TOKENS.pop(module, None)


def _save_attributes(attributes: dict[str, Any]) -> Callable[[], None]:
    """Return a function that restores an object's attributes.

    Dictionaries among them (hooks, buffers) remain the same objects, because handles of hooks refer
    to them.
    """
    before = dict(attributes)
    tables = [(value, dict(value)) for value in before.values() if isinstance(value, dict)]

    def put_back() -> None:
        attributes.clear()
        attributes.update(before)
        for table, content in tables:
            table.clear()
            table.update(content)

    return put_back


def _list_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """List the distinct configs of modules, and the configs inside them."""
    configs: dict[int, Any] = {}
    for module in modules:
        _add_configs(getattr(module, "config", None), configs)
    return list(configs.values())


def _add_configs(config: Any, configs: dict[int, Any]) -> None:
    """Collect a config of the library and those inside it, for example for text and images."""
    if hasattr(config, "to_dict") and hasattr(config, "__dict__") and id(config) not in configs:
        configs[id(config)] = config
        for value in vars(config).values():
            _add_configs(value, configs)
