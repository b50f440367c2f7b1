"""What acts in rows behind the prefill, while they write."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mechdsl.generate.records import StepRules
from mechdsl.hooks.reads_and_writes import SiteWrite


@dataclass(frozen=True, eq=False)
class WhileWriting:
    """What acts behind the prefill, in some rows of a pass."""

    kept: tuple[SiteWrite, ...] = ()
    """Edits of keys and values between the prefill and the first step."""
    steps: tuple[StepRules, ...] = ()
    """What acts at the newest token, in the order of the file."""

    def then(self, later: WhileWriting) -> WhileWriting:
        """With what other rows do."""
        return WhileWriting((*self.kept, *later.kept), (*self.steps, *later.steps))

    def moved(self, rows: Tensor) -> WhileWriting:
        """The same where row i is row `rows[i]`."""
        return WhileWriting(
            tuple(write.moved(rows) for write in self.kept),
            tuple(each.moved(rows) for each in self.steps),
        )
