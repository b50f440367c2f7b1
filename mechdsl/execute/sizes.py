"""The sizes that a run was laid out by, as its results keep them; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ChosenBy = Literal["default", "given", "measured", "memory"]
"""What the size of a pass comes from; `memory`: there wasn't enough of it for another."""


@dataclass(frozen=True)
class PassSizes:
    """What a run was laid out by. Given both, another run of the same plan is laid out the same."""

    pass_tokens: int
    """Of one pass over patched rows, at most."""
    prompt_tokens: int
    """Of one batch of unpatched prompts, at most."""
    chosen: ChosenBy
    """What `pass_tokens` comes from."""
