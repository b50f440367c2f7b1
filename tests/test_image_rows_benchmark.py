"""The benchmark of image token rows on a tiny language model."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import image_rows
from benchmarks.bound import unpatched
from benchmarks.work import Shape


@pytest.mark.slow
def test_image_rows_benchmark_agrees_with_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = Shape(layers=4, heads=4, width=48, vocabulary=image_rows.WORDS)
    monkeypatch.setattr(image_rows, "SHAPE", shape)
    monkeypatch.setattr(sys, "argv", ["image_rows", "--grid", "3", "--threads", "1"])
    image_rows.main()
    said = capsys.readouterr().out
    assert "24 cells on 2 prompts of 17 tokens" in said
    difference = re.search(r"largest difference from the loop (\S+) logits", said)
    spread = re.search(r"standard deviation of (\S+)$", said, re.MULTILINE)
    assert difference is not None
    assert spread is not None
    assert float(difference[1]) < 1e-4 < 0.01 < float(spread[1])
    whole = 2 * (24 + 2) * unpatched(shape, 17)
    assert 0 < image_rows.multiply_adds(3, 17, 0) < whole
