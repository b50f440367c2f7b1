"""A model passed from Python to several runs and edited between them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base.text import Source
from mechdsl.loading.loader import adopt_model

from ..execute.support import MODES, run_on
from . import test_attended_images as attended
from . import test_families as base
from .support import succeeded

Pair = tuple[Any, Any]

RULES = """
experiment e {
  model m
  prompts ask
  patch resid_post layer 0 at last token with changed
  measure logit(answer) as raw
}
"""


def llava() -> tuple[Pair, Path, str]:
    """(model, processor), folder, block of prompts."""
    own = base.bare("llava_class")
    return (deepcopy(own.model), own.processor), base.folder(), base.BLOCK


def mllama() -> tuple[Pair, Path, str]:
    """A model with cross-attention to the image, its folder and its block of prompts."""
    pair = deepcopy(attended.bare()), attended.processor()
    return pair, attended.folder(), attended.BLOCK


def values(
    pair: Pair, folder: Path, block: str, store: Path | Literal[False] = False
) -> list[float]:
    path = folder / "handed_over.mech"
    rules = RULES.replace("ask", block.split()[1])
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{block}\n{rules}')
    ran = mechdsl.run(path, {"m": pair}, store=store)
    assert "not stored" not in str(ran.notes)
    [measure] = ran["e"].measures
    return [*measure.base[0], *measure.patched[0]]


@pytest.mark.parametrize("made", [llava, mllama])
def test_vision_weights_edited_between_runs_affect_the_second_run(
    made: Callable[[], tuple[Pair, Path, str]],
) -> None:
    """The second run equals a run of a fresh copy."""
    pair, folder, block = made()
    first = values(pair, folder, block)
    assert values(pair, folder, block) == first
    with torch.no_grad():
        for weight in pair[0].model.multi_modal_projector.parameters():
            weight.mul_(-1.5)
    second = values(pair, folder, block)
    copied = deepcopy(pair[0]), pair[1]
    np.testing.assert_allclose(second, values(copied, folder, block), atol=1e-6)
    assert np.abs(np.subtract(first, second)).max() > 1e-2


@pytest.mark.slow
def test_adopted_model_rereads_images_after_another_run() -> None:
    """The run puts back hooks of the model that was adopted first, but forgets its images."""
    pair, folder, block = llava()
    model, found = adopt_model("m", *pair)
    assert model is not None, found
    rules = RULES.replace("resid_post layer 0 at last token", "resid_post vision layer 0 at PATCH")
    rules = rules.replace("PATCH", "photo row 1 col 1 token")
    known = 'model m = local("handed over")\n'
    source = Source(
        f"mech 1\n{known}{block}\n{rules.replace('ask', block.split()[1])}", folder / "a"
    )
    seen: list[list[float]] = []
    for _ in range(2):
        [result] = succeeded(*run_on(source, {"m": model}, MODES["planned"])).values()
        seen.append(result.measures[0].patched[0].tolist())
        values(pair, folder, block)
    assert seen[0] == seen[1]


def test_store_key_depends_on_the_code_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, folder, block = llava()
    first = values(pair, folder, block, tmp_path)
    kind = type(pair[1].image_processor)
    own = kind.preprocess

    def brighter(self: Any, *given: Any, **named: Any) -> Any:
        found = own(self, *given, **named)
        found["pixel_values"] = [-1.5 * each for each in found["pixel_values"]]
        return found

    monkeypatch.setattr(kind, "preprocess", brighter)
    second = values(pair, folder, block, tmp_path)
    assert second == values(pair, folder, block)
    assert np.abs(np.subtract(first, second)).max() > 1e-2
