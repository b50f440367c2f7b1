"""How an execution goes about it; without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PaddingSide = Literal["left", "right"]

Progress = Callable[[int, int], None]
"""(rows done, rows in all)."""


@dataclass(frozen=True)
class Options:
    """How an execution goes about it; results don't depend on it but for their last bits."""

    side: PaddingSide | None = None
    """Where padding stands; None is where it is harmless to the model, on the left if it may be:
    prompts end in one column then, so that writes near the end need few columns."""
    on_progress: Progress | None = None
    pass_tokens: int | None = None
    """Most tokens of one pass over patched rows; chosen by device, free memory and measuring where
    none are given."""
    prompt_tokens: int | None = None
    """Most tokens of one batch of unpatched prompts; fewer than usual where memory is short and
    neither is given."""
    allow_nan: bool = False
    """Leave rows with NaN, or with an infinity that a metric can't use, out of everything. This one
    does change results."""
