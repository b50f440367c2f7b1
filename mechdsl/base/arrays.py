"""Array types that all packages share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

Bools: TypeAlias = NDArray[np.bool_]

Ints: TypeAlias = NDArray[np.int64]

CellIndex: TypeAlias = slice | Ints
"""Index of some or all entries in an array over cells."""
