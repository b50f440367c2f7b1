"""The noise draws of a run, computed without the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.prompts.rows import Row


def keyed_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a row's number instead of the hash of its content, on which noise depends;
    `tests/data/test_row_content.py` tests the hash."""
    monkeypatch.setattr(Row, "key", property(lambda row: row.id))


def noise(key: int, draw: int, position: int, width: int) -> Tensor:
    """Noise with standard deviation 1, from the seed 0, the row's key, the draw and the token."""
    seed = np.random.SeedSequence([0, key, draw, position])
    drawn = np.random.Generator(np.random.Philox(seed)).standard_normal(width)
    return torch.from_numpy(drawn)
