"""Searches of heads of the vision encoder of prompts with images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from .support import experiment
from .test_encoder_effects import CELL, MEASURE, QUICK, ROWS, WHERE, gated
from .test_families import ALL
from .test_token_patches import HEADS, LAYERS
from .test_vision_dictionaries import fit_and_run

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def greedy(effects: Callable[[set[int]], float], size: int) -> set[int]:
    chosen: set[int] = set()
    for _ in range(size):
        others = {*range(LAYERS * HEADS)} - chosen
        chosen |= {max(others, key=lambda n: effects(chosen | {n}))}
    return chosen


def ablated(name: str, heads: Iterable[int]) -> Tensor:
    """[row] the measure without some heads at the patches of a token."""
    shares = torch.zeros(LAYERS * HEADS)
    shares[[*heads]] = 1
    return gated(name, ALL, shares.view(LAYERS, HEADS), "with: zero").detach()


@pytest.mark.parametrize("name", some(QUICK, ["gemma3"]))
def test_greedy_choice_of_heads_of_the_encoder_equals_hooks(name: str, tmp_path: Path) -> None:
    """Each step takes the head with the largest measure, together with those chosen before."""
    options = f"{ROWS}validation: 0%, {MEASURE}, with: zero"
    text = f"group g = fit(forward_selection(size: 2), {options}) at {WHERE} at {CELL}\n"
    text += experiment("e", f"ablate g at {CELL} with zero")
    folder, [found] = fit_and_run(name, text, tmp_path)
    given = json.loads((folder / "mask.json").read_text("utf-8"))
    size = len(given["chosen"])  # 1 if no second head raises the measure
    expected = greedy(lambda heads: float(ablated(name, heads).mean()), size)
    every = {n: float(ablated(name, expected | {n}).mean()) for n in range(LAYERS * HEADS)}
    assert size == 2 or max(every.values()) == every[min(expected)]
    assert {*given["chosen"]} == expected
    np.testing.assert_allclose(found.measures[0].patched[0], ablated(name, expected), atol=1e-4)


@pytest.mark.parametrize("name", some(QUICK, ["llava_next"]))
def test_searched_heads_of_the_encoder_act_as_hooks_on_other_rows(
    name: str, tmp_path: Path
) -> None:
    rule = f"ablate z vision layer * head * at {CELL} with zero"
    text = experiment("e", "search greedy heads up to 2", rule)
    folder, [found] = fit_and_run(name, text, tmp_path)
    given = json.loads((folder / "mask.json").read_text("utf-8"))
    every = ablated(name, given["chosen"]).tolist()
    own = found.measures[0].patched[0]
    assert len(own) == len(ALL) // 2
    rows = [int(np.abs(np.array(every) - value).argmin()) for value in own]
    np.testing.assert_allclose(own, [every[row] for row in rows], atol=1e-4)
    trained = [row for row in ALL if row not in rows]
    size = len(given["chosen"])  # 1 if no second head raises the measure
    expected = greedy(lambda heads: float(ablated(name, heads)[trained].mean()), size)
    assert {*given["chosen"]} == expected
