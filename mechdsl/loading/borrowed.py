"""Models that belong to the caller: whatever a run does to them, they are left as they were."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from mechdsl.base.random_numbers import kept_random_numbers


@contextmanager
def borrowed(models: Iterable[object]) -> Generator[None]:
    """Models, and random numbers, are inside as anybody likes, and afterwards as before: also
    where what is inside raises or is interrupted.

    Of every module its attributes are kept (training mode, hooks, which tensors its parameters and
    buffers are), of its config all that it holds. Values of weights are not copied.
    """
    with ExitStack() as stack:
        stack.enter_context(kept_random_numbers())
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
