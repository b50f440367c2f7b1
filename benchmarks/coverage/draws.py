"""Distributions with a mean of 0 and a variance of 1, where nothing else is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mechdsl.base.arrays import Floats

Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]


def _lognormal(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    spread = np.sqrt((np.e - 1) * np.e)
    return (random.lognormal(0, 1, shape) - np.sqrt(np.e)) / spread


def _heavy(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Lognormal, of a normal one with a standard deviation of 1.5."""
    mean = np.exp(1.5**2 / 2)
    return (random.lognormal(0, 1.5, shape) - mean) / (mean * np.sqrt(np.exp(1.5**2) - 1))


def _sparse(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    values = random.exponential(size=shape) * (random.random(shape) < 0.1)
    return (values - 0.1) / np.sqrt(0.19)


def _mostly_zero(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    values = random.normal(size=shape) * (random.random(shape) < 0.25)
    return values / 0.5


DRAWS: Mapping[str, Draw] = {
    "normal": lambda random, shape: random.normal(size=shape),
    "t3": lambda random, shape: random.standard_t(3, shape) / np.sqrt(3),
    "uniform": lambda random, shape: random.uniform(-np.sqrt(3), np.sqrt(3), shape),
    "Laplace": lambda random, shape: random.laplace(0, 1 / np.sqrt(2), shape),
    "exponential": lambda random, shape: random.exponential(size=shape) - 1,
    "lognormal": _lognormal,
    "lognormal, σ 1.5": _heavy,
    "mostly zero": _mostly_zero,
    "sparse": _sparse,
}
"""t3: Student's t with 3 degrees of freedom; lognormal: of a normal one with variance 1; mostly
zero: three in four are exactly 0, the others normal; sparse: one in ten is exponential, the others
are all the same."""
SYMMETRIC = ("normal", "t3", "uniform", "Laplace")
SKEWED = ("exponential", "lognormal", "mostly zero")


def correlated(
    random: np.random.Generator, name: str, cells: int, prompts: int, rho: float
) -> Floats:
    """[cell, prompt]: values of one prompt have the correlation rho, and stay symmetric where the
    distribution is."""
    own = DRAWS[name](random, (cells, prompts))
    if not rho:
        return own
    shared = DRAWS[name](random, (1, prompts))
    return np.sqrt(rho) * shared + np.sqrt(1 - rho) * own
