"""What lies outside the package in a checkout and inside it in a wheel (see `pyproject.toml`)."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_path(in_wheel: str, in_checkout: str) -> Path:
    """A file or folder: inside the package where a wheel put it, else in the checkout around it.

    in_wheel: from the package; in_checkout: from the folder that holds the package.
    """
    inside = PACKAGE / in_wheel
    return inside if inside.exists() else PACKAGE.parent / in_checkout
