"""Circuits of hand-set models: searches find exactly the known edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mechdsl
from benchmarks.known_circuits import KNOWN, THRESHOLDS, make_model, make_tokenizer, write_file
from mechdsl.fits.reports import CircuitReport

from ..quick import some

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


@pytest.mark.parametrize("name", KNOWN)
def test_hand_set_models_answer_correctly(name: str) -> None:
    model, random = make_model(name), np.random.default_rng(0)
    for ids, answer in (KNOWN[name].draw(random) for _ in range(30)):
        logits = model(torch.tensor([[1, *ids]])).logits[0, -1]
        assert logits.argmax() == answer
        assert logits.softmax(0)[answer] > 0.8


@pytest.mark.parametrize("name", some(KNOWN, [*KNOWN][:1]))
def test_searches_find_exactly_the_known_edges_over_a_decade_of_thresholds(
    name: str, tmp_path: Path
) -> None:
    ends = {"low": min(THRESHOLDS), "high": max(THRESHOLDS)}
    assert ends["high"] >= 10 * ends["low"]
    calls = {own: f"acdc(threshold: {value})" for own, value in ends.items()}
    calls["coarse"] = f"coarse_to_fine(threshold: {ends['high']})"
    uses = [
        f"experiment e_{own} {{\n  model m\n  prompts p.test limit 4\n"
        f"  ablate {own} at tokens * with zero\n  measure logit(answer) as raw\n}}"
        for own in calls
    ]
    path = write_file(name, tmp_path, calls, *uses)
    given = {"m": (make_model(name), make_tokenizer())}
    steps: dict[str, int] = {}
    for found in mechdsl.fit(path, given, store=tmp_path / "store"):
        report = found.report
        assert isinstance(report, CircuitReport)
        assert {*report.chosen} == {*KNOWN[name].edges}
        assert report.candidates >= 100
        assert report.trained > report.whole + 1
        steps[found.basis] = report.steps
    assert steps["coarse"] < steps["high"]
