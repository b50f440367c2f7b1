"""What rules do to the rows of a pass, beside which rows these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mechdsl.hooks.batch import Batch
from mechdsl.hooks.block_exchange import BlockPairs
from mechdsl.hooks.inside_attention import EdgeWrite
from mechdsl.hooks.reads_and_writes import SiteWrite
from mechdsl.vocab.sites import stop_layer


@dataclass(frozen=True, eq=False)
class Numbers:
    """K tokens with other position ids."""

    rows: Tensor
    """[K] long, row of the pass."""
    positions: Tensor
    """[K] long, place in the unpadded prompt."""
    numbers: Tensor
    """[K] long."""

    def moved(self, rows: Tensor) -> Numbers:
        """The same where row i is row `rows[i]`."""
        return replace(self, rows=rows[self.rows])

    def some(self, there: Tensor) -> Numbers:
        """Some of the tokens, by [K] bool."""
        return Numbers(self.rows[there], self.positions[there], self.numbers[there])


@dataclass(frozen=True, eq=False)
class RuleWrites:
    """What rules write into the rows of a pass, in their order."""

    writes: Sequence[SiteWrite] = ()
    edges: Sequence[EdgeWrite] = ()
    numbers: Sequence[Numbers] = ()
    """Tokens with other position ids."""
    blocks: BlockPairs = ()
    """Which blocks compute in the places of others, in all rows."""

    def then(self, later: RuleWrites) -> RuleWrites:
        """With rules that stand behind them, and act on what these leave."""
        return RuleWrites(
            [*self.writes, *later.writes],
            [*self.edges, *later.edges],
            [*self.numbers, *later.numbers],
            tuple(sorted({**dict(self.blocks), **dict(later.blocks)}.items())),
        )

    def moved(self, rows: Tensor) -> RuleWrites:
        """The same where row i is row `rows[i]`."""
        return RuleWrites(
            [write.moved(rows) for write in self.writes],
            [edge.moved(rows) for edge in self.edges],
            [numbers.moved(rows) for numbers in self.numbers],
            self.blocks,
        )

    def below(self, stop: int | None, n_layers: int) -> RuleWrites:
        """Without what lies above where a pass stops."""
        if stop is None:
            return self

        def runs(site: str, layer: int | None) -> bool:
            needed = stop_layer(site, layer, n_layers)
            return needed is not None and needed <= stop

        return replace(
            self,
            writes=[write for write in self.writes if runs(write.site, write.layer)],
            edges=[edge for edge in self.edges if edge.layer < stop],
        )

    def numbered(self, batch: Batch) -> Batch:
        """The tokens with their position ids."""
        for each in self.numbers:
            batch = batch.numbered(each.rows, each.positions, each.numbers)
        return batch
