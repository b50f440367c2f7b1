"""When Python doesn't look for garbage.

Imports, saved tables and syntax trees make hundreds of thousands of objects that all stay: looking
for garbage among them takes longer than many a run.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """Garbage is not looked for inside, and afterwards as before."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
