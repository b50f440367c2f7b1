"""A folder with the data file, and one thread for models this small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..execute.support import write_rows

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path)
    return tmp_path
