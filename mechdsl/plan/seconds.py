"""How long the work of a plan takes on this machine, roughly."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from mechdsl.plan.cost import Cost

EFFICIENCY = 0.8
"""Share of a large product's rate that passes over wide models reach, as measured on two cores."""
CALL_SECONDS = 1.5e-3
"""Of one block in one pass, whatever its size: what small models mostly take."""


def matmul_rate(size: int = 1024, repeats: int = 3) -> float:
    """Multiply-adds per second of a product of square matrices in float32, the best of some."""
    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one starts the threads
        start = perf_counter()
        np.matmul(a, a)
        best = min(best, perf_counter() - start)
    return size**3 / best


def estimated_seconds(cost: Cost, blocks: int, rate: float) -> float:
    """Seconds that the work takes in a model of so many blocks, at a rate of multiply-adds per
    second. Rough: it knows neither caches nor other work on the machine."""
    calls = cost.forwards + cost.backwards
    return cost.multiply_adds / (rate * EFFICIENCY) + calls * blocks * CALL_SECONDS
