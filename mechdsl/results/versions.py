"""Which packages made a result; without importing them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("mechdsl", "torch", "transformers", "tokenizers", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {package: version_of(package) for package in PACKAGES}


@cache
def version_of(package: str) -> str:
    """`unknown` where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
