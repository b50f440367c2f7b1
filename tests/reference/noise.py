"""The draws of a noised run, worked out apart from the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def noise(row: int, draw: int, position: int, width: int) -> Tensor:
    """Of one standard deviation; of the seed 0, the row, the draw and the token, nothing else."""
    key = np.random.SeedSequence([0, row, draw, position])
    drawn = np.random.Generator(np.random.Philox(key)).standard_normal(width)
    return torch.from_numpy(drawn)
