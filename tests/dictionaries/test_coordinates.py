"""Coordinate writes, in chunks and at once, and linear bases against least squares."""

from __future__ import annotations

import pytest
import torch

from mechdsl.dictionaries.folder import MAX_GATHERED
from mechdsl.forward.hooks import coordinates
from mechdsl.forward.hooks.coordinates import CoordinateWrite, LinearBasis

WIDTH, SIZE, ROWS = 40, 24, 9
RANDOM = torch.Generator().manual_seed(0)
DIRECTIONS = torch.randn(SIZE, WIDTH, generator=RANDOM, dtype=torch.float64)
CENTER = torch.randn(WIDTH, generator=RANDOM, dtype=torch.float64)
VECTORS = torch.randn(ROWS, WIDTH, generator=RANDOM, dtype=torch.float64)
BASIS = LinearBasis.of(DIRECTIONS, CENTER)


def test_linear_coordinates_equal_least_squares() -> None:
    expected = torch.linalg.lstsq(DIRECTIONS.T, (VECTORS - CENTER).T).solution.T
    torch.testing.assert_close(BASIS.encode(VECTORS, None), expected)
    torch.testing.assert_close(BASIS.reconstruct(VECTORS), CENTER + expected @ DIRECTIONS)


def test_dependent_directions_are_rejected() -> None:
    twice = torch.cat([DIRECTIONS, DIRECTIONS[:1]])
    with pytest.raises(ValueError, match="25 directions span only 24 dimensions"):
        LinearBasis.of(twice)


@pytest.mark.parametrize("count", [1, 3, MAX_GATHERED + 2, None])
@pytest.mark.parametrize("operation", ["set", "add", "scale"])
def test_coordinate_write_modifies_only_named_coordinates(
    operation: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = None
    if count is not None:
        which = torch.stack([torch.randperm(SIZE, generator=RANDOM)[:count] for _ in range(ROWS)])
    index = torch.arange(SIZE).expand(ROWS, -1) if which is None else which
    numbers = torch.randn(index.shape, generator=RANDOM, dtype=torch.float64)
    before = BASIS.encode(VECTORS, None)
    current = before.gather(1, index)
    new = {"set": numbers, "add": current + numbers, "scale": current * numbers}[operation]
    expected = before.scatter(1, index, new)
    write = CoordinateWrite(BASIS, operation)  # pyright: ignore[reportArgumentType]
    found = write.apply(VECTORS, numbers, which)
    torch.testing.assert_close(BASIS.encode(found, None), expected)
    outside = VECTORS - BASIS.reconstruct(VECTORS)
    torch.testing.assert_close(found - BASIS.reconstruct(found), outside)
    monkeypatch.setattr(coordinates, "MAX_NUMBERS", 2 * SIZE)  # a few vectors at a time
    torch.testing.assert_close(write.apply(VECTORS, numbers, which), found)
    one = write.apply(VECTORS, torch.full((ROWS, 1), 0.5), which)
    every = write.apply(VECTORS, torch.full(index.shape, 0.5), which)
    torch.testing.assert_close(one, every)


def test_chunked_reconstruction_equals_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    write = CoordinateWrite(BASIS, "reconstruct")
    monkeypatch.setattr(coordinates, "MAX_NUMBERS", 2 * SIZE)
    found = write.apply(VECTORS, torch.zeros(ROWS, 1), None)
    torch.testing.assert_close(found, BASIS.reconstruct(VECTORS))
