"""Measures as far as an expectation can name them, and what tells two of them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from mechdsl.base.names import names_of_measure


@dataclass(frozen=True)
class KnownMeasure:
    """A measure as far as an expectation can name it."""

    label: str
    effect: str
    kind: Literal["number", "category"] = "number"
    word: str = ""
    """`prob` of `prob(answer)`: the metric that it is, empty where it is more than one."""

    @property
    def names(self) -> tuple[str, ...]:
        """`ld at item 1 token` is called `ld` too."""
        return names_of_measure(self.label)

    @property
    def metric(self) -> str:
        """The label without the position."""
        return self.names[-1]


def how_to_name(measures: Sequence[KnownMeasure], found: Sequence[int], of: str = "") -> str:
    """How one of several measures that a name could mean is named, or what gives it a name of its
    own.

    of: behind it, where the measures are another experiment's (` of other`).
    """
    named = [(each.effect, each.metric) for each in measures]
    for effect, metric in (named[i] for i in found):
        if metric.isidentifier() and named.count((effect, metric)) == 1:
            return f"name one, as in `{effect} of {metric}{of}`"
    effect, metric = named[found[0]]
    taken = {name for _, name in named}
    own = next(name for n in count(1) if (name := f"m{n}") not in taken)
    return (
        f"give one a name: with `metric {own} = {metric}` above and `measure {own} …` for it, "
        f"`{effect} of {own}{of}` is that one"
    )
