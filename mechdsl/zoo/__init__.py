"""Tiny models trained by scripts in this repository and shipped as package data."""

from __future__ import annotations

from pathlib import Path


def zoo_models() -> list[str]:
    """Names that `zoo("…")` knows: of the models, and of what they were while they were trained
    (`induction/step-50`), which lies in a folder within theirs."""
    root = Path(__path__[0])
    folders = sorted(each.parent for each in root.glob("*/__init__.py"))
    stages = [each.parent for folder in folders for each in folder.glob("*/config.json")]
    return sorted(each.relative_to(root).as_posix() for each in (*folders, *stages))
