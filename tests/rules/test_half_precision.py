"""Steering, allowed edges, position ids, blocks, runs with rules, lenses and paths in bfloat16.

A model in 16 bits rounds differently in a padded batch and with one prompt, so exact equality isn't
tested (see `tests/models/test_precision.py`). The tests bound the difference from the same weights
in float32. The unit is the root mean square error of the bare model's logit differences, for one
unpadded prompt without rules. Over all constructs, the error is at most `NOISIER` units; for each
construct, which has few values, at most `ALONE` units. No value differs by more than `FURTHEST`
rounding steps of the largest logit, doubled because measures are differences of two logits. A lost
or misplaced write causes a larger difference.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.text import Source
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, as_in_the_data, run_on, shared
from ..models.test_precision import FURTHEST, NOISIER
from ..quick import in_turn
from .models import bare
from .support import BLOCKS, QUICK, Array, difference, experiment, records, rows

FAMILIES = ("gpt2", "llama", "gpt_neox")
ALONE = 5
EPS = torch.finfo(torch.bfloat16).eps
DIRECTION = "direction d = mean_difference(p.other, second) at resid_post layer 1 at last token\n"
STEERED = "run steered { add 3 * d to resid_post layer 1 at last token }"
LINES: dict[str, tuple[str, ...]] = {
    "add": ("add 3 * d to resid_post layer * at last token",),
    "set to": ("set resid_post layer * at last token to 2 * d",),
    "scale": ("scale resid_post layer * at last token by -1",),
    "project out": ("project out d from resid_post layer * at last token",),
    "project out of weights": ("project out d from weights",),
    "clamp": ("clamp d of resid_post layer * at last token to 40",),
    "allow": ("allow attention layers * from tokens * to tokens *",),
    "renumber": ("renumber subject tokens from 20",),
    "replace block": ("replace block layer 1 with block layer 2",),
    "identity": ("replace block layer * with identity",),
    "source": (STEERED, "from steered into clean", "patch resid_post layer * at last token"),
    "base": (STEERED, "from other into steered", "patch resid_post layer * at last token"),
    "lens": (STEERED, "observe logit_lens resid_post layer 1..2 of steered at last token"),
    "path": ("from other into clean", "path resid_post layer * -> logits at last token"),
    "beside": (
        "from other into clean", "scale mlp_out layer 2 at last token by -2",
        "path resid_post layer 0..1 -> mlp_norm layer 2 at last token",
    ),
    "frozen": ("from other into clean",
               "path resid_post layer * -> logits at last token with frozen norms"),
}  # fmt: skip


@cache
def pair(name: str) -> tuple[Any, Any]:
    """One model twice: in 16 bits, and with the same weights in float32."""
    half = copy.deepcopy(bare(name)).to(torch.bfloat16)
    return half, copy.deepcopy(half).to(torch.float32)


@cache
def results(data: Path, name: str, half: bool, mode: str) -> dict[str, ExperimentResult]:
    text = DIRECTION
    for number, (key, lines) in enumerate(LINES.items()):
        effect = "raw" if key == "lens" else "delta"
        measure = f"measure logit(answer) - logit(wrong) as {effect}"
        text += experiment(f"e{number}", *lines, measure=measure)
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}'
    model = shared(pair(name)[0 if half else 1])
    result, found = run_on(Source(whole, data / "file.mech"), {"m": model}, MODES[mode])
    assert result is not None, [each.message for each in found]
    return {key: as_in_the_data(each) for key, each in zip(LINES, result.experiments, strict=True)}


@cache
def noise(name: str) -> tuple[float, float]:
    """(root mean square error of the bare model's logit differences, its largest logit)"""
    off, largest = list[float](), 0.0
    for run in ("clean", "other", "longer"):
        for text, record in zip(rows(run), records(), strict=True):
            half, single = (
                model(input_ids=torch.tensor([text.ids]), use_cache=False).logits[0].float()
                for model in pair(name)
            )
            largest = max(largest, float(single.abs().max()))
            off.append(difference(half, record) - difference(single, record))
    return float(np.sqrt(np.mean(np.square(off)))), largest


def rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
@pytest.mark.parametrize("key", list(LINES))
@torch.no_grad()
def test_bfloat16_results_equal_float32_within_rounding(
    data: Path, key: str, name: str, mode: str
) -> None:
    half, single = (results(data, name, each, mode)[key].measures[0] for each in (True, False))
    own, largest = noise(name)
    off = half.patched - single.patched
    effect = rms(single.patched - (0 if key == "lens" else single.base))
    assert rms(off) <= ALONE * own
    assert np.abs(off).max() <= 2 * FURTHEST * EPS * largest
    assert effect > 1.5 * ALONE * own, "a lost write would not be seen"


@pytest.mark.parametrize(("name", "mode"), in_turn(FAMILIES, QUICK))
@torch.no_grad()
def test_bfloat16_results_of_all_rules_equal_float32_within_rounding(
    data: Path, name: str, mode: str
) -> None:
    half, single = (results(data, name, each, mode) for each in (True, False))
    off = [(half[k].measures[0].patched - single[k].measures[0].patched).ravel() for k in LINES]
    assert rms(np.concatenate(off)) <= NOISIER * noise(name)[0]
