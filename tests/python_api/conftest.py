"""A file, the results of a run of it, and a model of the caller."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import mechdsl

from ..fruit import FRUIT

FILE = (
    FRUIT.replace("mech 1\n", "mech 1\nparam depth = 1\n", 1)
    + """
experiment heads {
  model toy
  prompts fruit limit 16
  from clean into fewer
  patch layer 0..depth head * at last-item token
  measure logit(answer) - logit(answer of fewer) as recovery
  report table top 5
  report heatmap layer by head to "maps/heads.svg"
  expect accuracy(clean) > 0.5
}

experiment positions {
  prompts fruit limit 8
  from clean into fewer
  patch resid_post layer 2 at each item token
  measure logit(answer) - logit(answer of fewer) as recovery
  measure argmax(1..9) as raw
  report lines position
}
"""
)
"""Two experiments: one whose picture goes to a file, one whose 8 rows are too few for any p."""
WARNED = "W0720"


@pytest.fixture(scope="session")
def pair() -> tuple[Any, Any]:
    """A model and its tokenizer, which neither tests nor the package may modify."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = str(files("mechdsl") / "zoo" / "counting")
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[mechdsl.Results, Path, list[Any]]:
    """Results, the folder of the file, and the warnings that were shown."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "heads.mech").write_text(FILE, encoding="utf-8")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        results = mechdsl.run(folder / "heads.mech")
    return results, folder, [each for each in shown if each.category is mechdsl.MechdslWarning]


@pytest.fixture
def results(ran: tuple[mechdsl.Results, Path, list[Any]]) -> mechdsl.Results:
    return ran[0]


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that the test works in."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
