"""What a run of a plan did, to be set against what was estimated."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Profile:
    """Counts and seconds of one execution."""

    rows: int = 0
    """Patched rows that could differ from the base run."""
    distinct: int = 0
    """Of these, how many were run: equal ones once."""
    estimated: int = 0
    """Rows whose values were estimated by gradients, and that weren't run."""
    known: int = 0
    """Patched rows whose values the store had before the run."""
    resumed: int = 0
    """Of `rows` and `estimated`, those that the run computed before it was cut short."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """By key, the experiments whose values the store can't keep → why."""
    unpatched_passes: int = 0
    """Forward passes over batches of unpatched prompts."""
    passes: int = 0
    """Forward passes over rows."""
    tokens: list[int] = field(default_factory=list[int])
    """Of every pass, the tokens of its rows."""
    halved: int = 0
    """How often a pass ran out of memory and was tried again at half the size."""
    unpatched_seconds: float = 0.0
    patched_seconds: float = 0.0

    def passed(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens took so long."""
        self.passes += 1
        self.tokens.append(tokens)
        self.patched_seconds += seconds
