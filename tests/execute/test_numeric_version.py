"""Frozen numbers of the executor: if one changes, `NUMERIC_VERSION` must be raised, so that earlier
values aren't read from a store. `--update-goldens` then writes the new ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mechdsl.execute.run_record import NUMERIC_VERSION

from .test_value_keys import DIFFERENT, ran

FROZEN = Path(__file__).parent / "numbers.json"
FAMILIES = ("gpt2", "llama", "bloom")
PACKAGES = ("torch", "transformers")
RELATIVE, ABSOLUTE = 1e-4, 2e-5
"""Tolerances of a value; sums of logits round in their last bits."""


def numbers(folder: Path, families: Sequence[str], step: int) -> dict[str, list[float]]:
    """Family and experiment → values of its measure over cells, rows and runs; every `step`-th
    experiment of each type."""
    found: dict[str, list[float]] = {}
    for family in families:
        for kind, texts in DIFFERENT.items():
            for number, text in [*enumerate(texts)][::step]:
                result, _ = ran(text, folder, None, family)
                data = result.experiments[0].measures[0]
                values = [data.patched, data.base, *([] if data.source is None else [data.source])]
                found[f"{family}: {kind} {number}"] = [
                    float(f"{summary:.6g}")
                    for each in values
                    for summary in (np.nanmean(each), np.nanstd(each), each.ravel()[0])
                ]
    return found


def changed(before: dict[str, list[float]], now: dict[str, list[float]]) -> list[str]:
    """The experiments whose numbers differ."""
    return [
        name
        for name in before
        if name not in now
        or not np.allclose(before[name], now[name], rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    ]


@pytest.mark.parametrize(
    ("families", "step"),
    [(FAMILIES[1:2], 3), pytest.param(FAMILIES, 1, marks=pytest.mark.slow)],
    ids=["a third of one family", "all"],
)
def test_numbers_change_only_with_the_numeric_version(
    families: Sequence[str], step: int, tmp_path: Path, request: Any
) -> None:
    installed = {name: version(name) for name in PACKAGES}
    frozen = json.loads(FROZEN.read_text(encoding="utf-8")) if FROZEN.exists() else None
    update = request.config.getoption("--update-goldens")
    if frozen is not None and frozen["packages"] != installed and not update:
        pytest.skip(f"these numbers are of {frozen['packages']}; weights are drawn by torch")
    now = numbers(tmp_path, families, step)
    if frozen is not None:
        before = frozen["numbers"].items()
        frozen["numbers"] = {k: v for k, v in before if step == 1 or k in now}
    if frozen is not None and frozen["packages"] == installed:
        others = changed(frozen["numbers"], now)
        raised = frozen["version"] < NUMERIC_VERSION
        assert not others or raised, (
            f"other numbers than those that were kept: {others[:5]}. Where they are meant, raise "
            "NUMERIC_VERSION in mechdsl/execute/run_record.py and run with --update-goldens"
        )
    if update:
        if families != FAMILIES:
            return
        whole = {"version": NUMERIC_VERSION, "packages": installed, "numbers": now}
        FROZEN.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return
    assert frozen is not None
    assert frozen["version"] == NUMERIC_VERSION, "run with --update-goldens"
    assert frozen["numbers"].keys() == now.keys(), "run with --update-goldens"


def test_changed_numbers_are_detected() -> None:
    before = {"a": [1.0, 0.0], "b": [2.0, 1.0]}
    assert changed(before, {"a": [1.00001, 1e-6], "b": [2.0, 1.0]}) == []
    assert changed(before, {"a": [1.001, 0.0], "b": [2.0, 1.0]}) == ["a"]
    assert changed(before, {"a": [1.0, 0.0]}) == ["b"]
