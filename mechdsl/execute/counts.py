"""How many rows a run computed, and how many were known before; without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mechdsl.execute.profile import Profile


@dataclass
class Counts:
    """Rows of cells, each once for every rule that they are run with."""

    computed: int = 0
    stored: int = 0
    """Those whose values came from the store."""
    not_kept: dict[str, str] = field(default_factory=dict[str, str])
    """By key, the experiments whose values the store can't keep → why."""

    def add(self, profile: Profile) -> None:
        """What one execution did."""
        self.computed += profile.rows + profile.estimated - profile.resumed
        self.stored += profile.known + profile.resumed
        self.not_kept.update(profile.not_kept)
