"""Settings that are known to fall short."""

from __future__ import annotations

SHORTFALLS: dict[str, str] = {}
"""Key of an outcome -> why it falls short, and what is printed there instead."""
