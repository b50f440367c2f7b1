"""All rows of the tables."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from .parts import Architecture, Refused


def every() -> list[Architecture | Refused]:
    """Rows of all modules `rows_…` of this package."""
    found: list[Architecture | Refused] = []
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("rows_"):
            found += import_module(f".{info.name}", __package__).TABLE
    return found
