"""What rules do while a model writes, how its tokens are chosen, and what it has written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mechdsl.hooks.block_exchange import BlockPairs
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import SiteWrite


@dataclass(frozen=True, eq=False)
class StepEdge:
    """Edges of attention from the newest token. The `queries` of `edge` are ignored, its `keys` are
    positions of the prompt."""

    edge: EdgeWrite
    also: Literal["", "newest", "written"] = ""
    """Keys besides: the newest token itself, or all tokens of the reply up to it."""


@dataclass(frozen=True, eq=False)
class StepRules:
    """What acts at the newest token of the passes `first` to `last`, both included: step s has
    token s of the reply as its newest one."""

    first: int
    """1 or more; the prefill is step 0, and what acts there is said by itself."""
    last: int | None = None
    """None: to the end."""
    writes: Sequence[SiteWrite] = ()
    """Their `positions` are ignored."""
    edges: Sequence[StepEdge] = ()
    blocks: BlockPairs = ()
    """Which blocks compute in the places of others, for the newest token of all rows."""

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ValueError("step 0 is the prefill, whose writes are given by themselves")

    def moved(self, rows: Tensor) -> StepRules:
        """The same where row i is row `rows[i]`."""
        return replace(
            self,
            writes=[write.moved(rows) for write in self.writes],
            edges=[replace(each, edge=each.edge.moved(rows)) for each in self.edges],
        )

    def acts(self, step: int) -> bool:
        """Whether it acts in a step."""
        return self.first <= step and (self.last is None or step <= self.last)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and where a reply ends."""

    tokens: int
    """At most."""
    decode: Callable[[Sequence[int]], str]
    """Token ids to their text."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a reply and don't belong to it."""
    stops: tuple[str, ...] = ()
    """A reply ends in front of the first of these texts."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn; else it is always the one with the largest logit, of several
        the first."""
        return (self.temperature, self.top_k, self.top_p) != (None, None, None)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("a reply has at least one token to be")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError("a temperature is above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError("top_k is at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError("top_p is above 0 and at most 1")
