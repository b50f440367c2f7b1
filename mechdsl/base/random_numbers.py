"""Global random numbers, which belong to the caller: they go on as if nothing had been drawn."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def kept_random_numbers() -> Generator[None]:
    """Whatever is drawn inside, afterwards they are as before: those of Python, and of numpy and
    torch on all devices where these are imported."""
    with ExitStack() as stack:
        for put_back in _states():
            stack.callback(put_back)
        yield


def keeps_random_numbers(function: Callable[P, R]) -> Callable[P, R]:
    """A function that leaves them as they were: importing may draw some, and rich draws one for
    each style that it prints."""

    @wraps(function)
    def called(*args: P.args, **named: P.kwargs) -> R:
        with kept_random_numbers():
            return function(*args, **named)

    return called


def _states() -> list[Callable[[], None]]:
    """What puts them back, of all generators that may be drawn from."""
    python = random.getstate()
    found: list[Callable[[], None]] = [lambda: random.setstate(python)]
    # Not imported here, so that `validate` needs neither; without them nothing of theirs is moved.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        own = numpy.random.get_state()
        found.append(lambda: numpy.random.set_state(own))
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return found
    cpu = torch.get_rng_state()
    found.append(lambda: torch.set_rng_state(cpu))
    # Asking a device that nobody has used would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        found.append(lambda: torch.cuda.set_rng_state_all(cuda))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        found.append(lambda: torch.mps.set_rng_state(mps))
    return found
