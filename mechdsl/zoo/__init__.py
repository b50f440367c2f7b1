"""Weights of tiny models, shipped as package data; the repository's folder `zoo` trains them."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def zoo_models() -> tuple[str, ...]:
    """Names that `zoo("…")` knows: of the models, and of what they were while they were trained
    (`induction/step-50`), which lies in a folder within theirs."""
    root = Path(__path__[0])
    configs = (*root.glob("*/config.json"), *root.glob("*/*/config.json"))
    return tuple(sorted(each.parent.relative_to(root).as_posix() for each in configs))
