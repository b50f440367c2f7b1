"""Models that belong to the caller: whatever a run does to them, they are left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def borrowed(models: Iterable[object]) -> Generator[None]:
    """Models, and random numbers, are inside as anybody likes, and afterwards as before: also
    where what is inside raises or is interrupted.

    Of every module its attributes are kept (training mode, hooks, which tensors its parameters and
    buffers are), of its config all that it holds. Values of weights are not copied.
    """
    with ExitStack() as stack:
        for put_back in _random_states():
            stack.callback(put_back)
        parts = {id(part): part for m in models if isinstance(m, nn.Module) for part in m.modules()}
        configs: dict[int, Any] = {}
        for part in parts.values():
            _add_configs(getattr(part, "config", None), configs)
        for held in (*parts.values(), *configs.values()):
            stack.callback(_kept(vars(held)))
        yield


def _kept(attributes: dict[str, Any]) -> Callable[[], None]:
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


def _random_states() -> list[Callable[[], None]]:
    """What puts the global random numbers back, of all generators that a model may draw from."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found: list[Callable[[], None]] = [
        lambda: random.setstate(python),
        lambda: np.random.set_state(numpy),
        lambda: torch.set_rng_state(cpu),
    ]
    # Asking a device that nobody has used would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        found.append(lambda: torch.cuda.set_rng_state_all(cuda))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        found.append(lambda: torch.mps.set_rng_state(mps))
    return found
