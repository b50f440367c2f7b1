"""Comparison of result documents: bit for bit, or rounded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).parent / "frozen.json"
"""Values of the shipped examples, committed; `python -m tests.baseline --freeze` rewrites them."""
DIGITS = 5
RELATIVE = 1e-4
ABSOLUTE = 2e-5
"""For values near zero: sums of logits round in their last bits."""


def written(folder: Path, only: str | None) -> list[Path]:
    """Files of a baseline: all, or those of `examples` or `random` files."""
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if only is None or path.stem.startswith("random-") == (only == "random")
    ]


def difference(expected: Any, found: Any, path: str = "") -> str | None:
    """The first difference between two documents; None if they are equal bit for bit."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in (*expected, *(key for key in found if key not in expected)):
            if key not in expected or key not in found:
                return f"{path}.{key}: only in {'the baseline' if key in expected else 'this run'}"
            where = difference(expected[key], found[key], f"{path}.{key}")
            if where is not None:
                return where
        return None
    if isinstance(expected, list) and isinstance(found, list):
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            where = difference(one, other, f"{path}[{number}]")
            if where is not None:
                return where
        if len(expected) != len(found):
            return f"{path}: {len(expected)} in the baseline, {len(found)} in this run"
        return None
    one, other = json.dumps(expected), json.dumps(found)  # -0.0 differs from 0.0, and 1 from 1.0
    return None if one == other else f"{path}: {one} in the baseline, {other} in this run"


def frozen(document: dict[str, Any]) -> dict[str, list[list[float | None]]]:
    """`experiment: label` → per cell [mean, low, high, base, source], in five digits; and the
    means of unpatched runs."""
    found: dict[str, list[list[float | None]]] = {}
    for file in document["files"]:
        for experiment in file["experiments"]:
            name = experiment["name"]
            for cell in experiment["cells"]:
                for number, measure in enumerate(cell["measures"]):
                    values = [measure[key] for key in ("mean", "low", "high", "base", "source")]
                    key = f"{name}: {number} {measure['label']}"
                    found.setdefault(key, []).append([_rounded(value) for value in values])
            for run, measures in experiment["runs"].items():
                means = [_rounded(measure["mean"]) for measure in measures]
                found[f"{name}: run {run}"] = [means]
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def close(one: float | None, other: float | None) -> bool:
    """Whether a value equals the frozen value within the tolerance."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
