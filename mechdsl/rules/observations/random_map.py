"""`observe random embed at each token of image`: a map that knows nothing, as a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.digest import number_of
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.over_rows import RowVectors
from mechdsl.resolve.resolved import Axis
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.rules.observations.over_rows import OverRowsKind, refuse, several
from mechdsl.rules.observations.registry import observation

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


@observation("random")
class Random(OverRowsKind):
    """A number drawn for each row and place, even between 0 and 1.

    It hangs on the seed of the file, on the text or image that is looked at and on the position,
    and not on the vector: maps are set against it, and tokens are ranked by it in random order.
    `random(20)` draws twenty, along an axis `draw`.
    """

    takes: ClassVar = ("arguments",)
    counts = "draw"

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found, said = super().resolve(rule, work), rule.observed
        assert said is not None
        if said.call is None:
            return found
        one = said.call.arguments[0] if len(said.call.arguments) == 1 else None
        node = None if one is None or one.name is not None else one.value
        draws = constant(node, work.program.parameters)
        if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
            refuse(rule, work, "takes one whole number of draws, above 0", "write `random(20)`")
            return None
        work.add_axis(Axis(self.counts, tuple(range(1, draws + 1)), said.span))
        if found is None or found.sites is None:
            return None
        return replace(found, sites=several(found.sites, self.counts, draws))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        which = (seen.number,) if seen.number else ()
        drawn = [number_of("random", seed, key, *which) for key in seen.keys]
        return [np.array(drawn, dtype=np.float64) / 2**64]
