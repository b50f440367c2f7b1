"""Observations of attention patterns between patches, in models with full attention."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from . import support
from .support import GRID, patches, plain
from .test_blocks import codes, folder_of


def pattern(name: str, number: int, layer: int, head: int) -> Tensor:
    """Reference pattern from q and k, [query, key]."""
    seen = plain(name, number)
    q, k = (seen.sites[site, layer][:, head] for site in ("q", "k"))
    return (q @ k.T / math.sqrt(q.shape[-1])).softmax(-1)


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "siglip"])
@pytest.mark.parametrize("window", [None, 2])
def test_observed_attention_distance_equals_reference(
    name: str, window: int | None, tmp_path: Path
) -> None:
    """Distance between centres of patches, weighted by the attention to patches."""
    word = "distance" if window is None else f"distance({window})"
    where = "image row 1 col 1 token, image row 2..3 col 1..2 tokens"
    line = f"observe {word} pattern layer 0 head * at {where}"
    found = support.run_file(support.experiment("e", line, measure=""), tmp_path, name)["e"]
    own = patches(name)
    expected: list[list[float]] = []
    for head in range(plain(name, 0).sites["q", 0].shape[1]):
        for places in ([(1, 1)], [(2, 1), (2, 2), (3, 1), (3, 2)]):
            row: list[float] = []
            for number in range(3):
                weights, values = pattern(name, number, 0, head), []
                for line_, col in places:
                    of_patches = weights[support.token(name, line_, col)][own].numpy()
                    away = [
                        math.hypot(line_ - 1 - n // GRID, col - 1 - n % GRID)
                        for n in range(len(own))
                    ]
                    away = np.minimum(away, window or 99)
                    values.append(float((of_patches * away).sum() / of_patches.sum()))
                row.append(float(np.mean(values)))
            expected.append(row)
    seen = found.measures[0].patched
    np.testing.assert_allclose(seen, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_observed_received_attention_equals_reference(name: str, tmp_path: Path) -> None:
    where = "image row 2 col 3 token, image row 4 col 4 token"
    line = f"observe received pattern layer 0 head 1 at {where}"
    found = support.run_file(support.experiment("e", line, measure=""), tmp_path, name)["e"]
    expected: list[list[float]] = []
    for place in ((2, 3), (4, 4)):
        token = support.token(name, *place)
        row: list[float] = []
        for number in range(3):
            paid = pattern(name, number, 0, 1)[:, token]
            row.append(float((paid.sum() - paid[token]) / (len(paid) - 1)))
        expected.append(row)
    np.testing.assert_allclose(found.measures[0].patched, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("observe distance pattern layer 1 head 0 at cls token", "E0207"),
        ("observe distance pattern layer 1 head 0 at tokens *", "E0207"),
        ("observe distance(0) pattern layer 1 head 0 at image tokens", "E0207"),
        ("observe received(1..3) pattern layer 1 head 0 at image row 1 col 1 token", "E0207"),
        ("observe received pattern layer 1 head 0 at image row 4 col 4 token", None),
    ],
)
def test_invalid_attention_observation_on_images_is_rejected(
    line: str, wanted: str | None, tmp_path: Path
) -> None:
    folder_of(tmp_path)
    found = codes(tmp_path, line, measure=" ")
    assert found == ([] if wanted is None else [wanted])
