"""Corrections for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mechdsl.base.arrays import Floats


def holm(p: Floats) -> Floats:
    """Holm's step-down correction: no false positive among all tests, with the chosen level."""
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def benjamini_hochberg(p: Floats) -> Floats:
    """Benjamini and Hochberg's step-up correction: the share of false positives."""
    from scipy.stats import false_discovery_control  # not at the top: slow to import

    return false_discovery_control(p)


CORRECTIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": np.copy,
}
"""What `stats correct WORD` does to all p of an experiment; `max` needs more than p."""
