"""The draws of a noised run, worked out apart from the package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.prompts.rows import Row


def keyed_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a row's number stand for the hash of its content, which noise hangs on;
    `tests/data/test_row_content.py` is about the hash."""
    monkeypatch.setattr(Row, "key", property(lambda row: row.id))


def noise(key: int, draw: int, position: int, width: int) -> Tensor:
    """Of one standard deviation; of the seed 0, the row's key, the draw and the token, nothing
    else."""
    seed = np.random.SeedSequence([0, key, draw, position])
    drawn = np.random.Generator(np.random.Philox(seed)).standard_normal(width)
    return torch.from_numpy(drawn)
