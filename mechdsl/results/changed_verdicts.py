"""Expectations of two runs whose verdicts differ, or that one of them alone has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mechdsl.results.experiment_result import ExpectOutcome
from mechdsl.results.matched_runs import Matched

Turn = Literal["fails now", "holds now", "new", "gone"]


@dataclass(frozen=True)
class VerdictChange:
    """One `expect`."""

    experiment: str
    turn: Turn
    old: ExpectOutcome | None
    new: ExpectOutcome | None

    @property
    def text(self) -> str:
        """As written."""
        found = self.new or self.old
        assert found is not None
        return found.text


def changed_verdicts(
    experiment: str, old: Sequence[ExpectOutcome], new: Sequence[ExpectOutcome]
) -> Iterator[VerdictChange]:
    """Expectations of equal text are one; of several such, in their order."""
    found = Matched.of([each.text for each in old], [each.text for each in new])
    for one, two in found:
        before, after = old[one], new[two]
        if before.holds != after.holds:
            turn: Turn = "holds now" if after.holds else "fails now"
            yield VerdictChange(experiment, turn, before, after)
    for place in found.added:
        yield VerdictChange(experiment, "new", None, new[place])
    for place in found.removed:
        yield VerdictChange(experiment, "gone", old[place], None)
