"""Rules on weights and edited image models, against copies of the bare model with edited
weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from . import support
from .support import ANSWERS, LABELS, WRONG

Edit = Callable[[Any], None]

WIDTH = 6
"""Width of a head."""


def head(layer: int, number: int, factor: float) -> Edit:
    def change(model: Any) -> None:
        weight = model.vit.layers[layer].attention.o_proj.weight
        weight[:, WIDTH * number : WIDTH * (number + 1)] *= factor

    return change


def neurons(layer: int, first: int, last: int, factor: float) -> Edit:
    def change(model: Any) -> None:
        model.vit.layers[layer].mlp.fc2.weight[:, first : last + 1] *= factor

    return change


CASES: dict[str, Edit] = {
    "scale weights of attn_out layer 1 head 2 by -1": head(1, 2, -1),
    "scale weights of layer 0 head 3 by 0": head(0, 3, 0),
    "scale weights of mlp_out layer 1 neurons 3..9 by 3": neurons(1, 3, 9, 3),
    "scale weights of L0.mlp by 0.5": neurons(0, 0, 10**6, 0.5),
}


def edited_logit_differences(change: Edit) -> np.ndarray:
    model = copy.deepcopy(support.double("vit"))
    with torch.no_grad():
        change(model)
        found = [model(pixel_values=support.pixels("vit", n)).logits[0] for n in range(3)]
    pairs = zip(found, ANSWERS, WRONG, strict=False)
    return np.array([float(x[LABELS.index(a)] - x[LABELS.index(b)]) for x, a, b in pairs])


@pytest.mark.parametrize("mode", ["planned", "plain", "small passes"])
def test_weight_rules_and_edited_models_equal_edited_copies(mode: str, tmp_path: Path) -> None:
    text = ""
    measure = "measure logit(answer) - logit(wrong) as raw"
    for number, line in enumerate(CASES):
        text += support.experiment(f"rule{number}", line, measure=measure)
        own = support.experiment(f"model{number}", measure=measure)
        text += f"model c{number} = m with {{ {line} }}\n"
        text += own.replace("model m", f"model c{number}")
    text += support.experiment("plain", measure=measure)
    found = support.run_file(text, tmp_path, "vit", mode)
    plain = found["plain"].measures[0].patched[0]
    for number, (line, change) in enumerate(CASES.items()):
        expected = edited_logit_differences(change)
        for kind in ("rule", "model"):
            own = found[f"{kind}{number}"].measures[0].patched[0]
            assert np.abs(own - expected).max() < 1e-4, (kind, line)
        assert np.abs(expected - plain).max() > 1e-3, line


def test_weight_edit_of_a_two_tower_model_is_rejected(tmp_path: Path) -> None:
    text = "model c = m with { scale weights of L0.mlp by 0.5 }\n"
    text += support.experiment("e").replace("model m", "model c")
    result, found = support.try_file(text, tmp_path, "clip/dual")
    assert result is None
    assert "E0108" in [each.code for each in found if each.severity == "error"]
