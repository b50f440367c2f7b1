"""A folder with the data files, and one thread for models this small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .support import write_data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files here read the same data."""
    folder = tmp_path_factory.mktemp("rules")
    write_data(folder)
    return folder
