"""`observe random embed at each token of image`: a map that knows nothing, as a control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechdsl.base.digest import number_of
from mechdsl.resolve.over_rows import RowVectors
from mechdsl.rules.observations.over_rows import OverRowsKind
from mechdsl.rules.observations.registry import observation

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats


@observation("random")
class Random(OverRowsKind):
    """A number drawn for each row and place, even between 0 and 1.

    It hangs on the seed of the file, on the text or image that is looked at and on the position,
    and not on the vector: maps are set against it, and tokens are ranked by it in random order.
    """

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        drawn = [number_of("random", seed, key) for key in seen.keys]
        return [np.array(drawn, dtype=np.float64) / 2**64]
