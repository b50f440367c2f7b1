"""Scores of images with texts, of models with two towers: what a file measures, and rules in the
image tower, against plain hooks on the bare model, one image and one text at a time, in 64 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ..reference.hooks import Change
from ..rules.support import agree
from . import support, towers
from .support import copied
from .towers import FRONT, GRID, NAMES, Seen, answer, forward, pixels, wrong

QUICK = ("plain", "planned")
PATCHES = [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]
EVERY = [f"image row {row} col {col}" for row, col in PATCHES]
Writes = Mapping[tuple[str, int], Sequence[Change]]
DIFFERENCE = "measure score(answer) - score(wrong) as delta"
CLASSES = ("a photo of a circle", "a photo of a ring", "a photo of a square")


@cache
def plain(name: str, number: int | None, text: str) -> Seen:
    return forward(name, pixels(name, number), text)


def tokens(name: str) -> list[int]:
    """Of the patches."""
    return [FRONT[name] + n for n in range(GRID * GRID)]


def difference(name: str, image: int | None, number: int, writes: Writes) -> float:
    """`score(answer) - score(wrong)` of a row, of its own image or another one."""
    first, second = (
        forward(name, pixels(name, image), text, writes).score
        for text in (answer(number), wrong(number))
    )
    return first - second


def run(
    folder: Path,
    name: str,
    mode: str,
    lines: Sequence[str],
    axes: tuple[str, ...],
    cells: Sequence[tuple[object, ...]],
    writes: Callable[..., Writes],
    *,
    into_gray: bool = True,
    large: float = 0.1,
) -> None:
    """writes: of a row's number and the cell's coordinates."""
    text = support.experiment("e", *lines, measure=DIFFERENCE)
    found = towers.run_file(text, folder, name, mode)["e"]
    images = [None if into_gray else number for number in range(3)]
    expected = {
        tuple(cell): [difference(name, images[n], n, writes(n, *cell)) for n in range(3)]
        for cell in cells
    }
    start = np.array([difference(name, images[n], n, {}) for n in range(3)])
    agree(found, axes, expected, start, large=large, most=False)  # type: ignore[arg-type]


INTO_GRAY = "from scenes into neutral"


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", NAMES)
def test_patches_of_an_image_go_into_a_gray_one(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, label: str) -> Writes:
        token = tokens(name)[EVERY.index(label)]
        own = plain(name, number, answer(number))
        return {
            ("resid_post", layer): copied(own, "resid_post", layer, [token]) for layer in (0, 1)
        }

    lines = [INTO_GRAY, "patch resid_post vision layers 0..1 at each token of image"]
    cells = [(label,) for label in EVERY]
    run(tmp_path, name, mode, lines, ("position",), cells, writes)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Softmax over the classes, or the model's sigmoid; texts beside them are in no choice."""
    lines = ["ablate resid_post layer 0 at image row 2 col * tokens with zero"]
    measures = (
        "score(answer)", "logit(answer)", "prob(answer)", "rank(answer)", "correct",
        'score("the small red cross")', "loss(answer)",
    )  # fmt: skip
    text = "".join(
        support.experiment(f"e{n}", *lines, measure=f"measure {each} as raw")
        for n, each in enumerate(measures)
    )
    found = towers.run_file(text, tmp_path, name)
    at = [support.token("clip", 2, col) - 1 + FRONT[name] for col in range(1, GRID + 1)]
    zero = plain(name, 0, answer(0)).sites["resid_post", 0][0, 0] * 0
    writes = {("resid_post", 0): [Change(token, 0, zero) for token in at]}
    values: list[list[float]] = []
    for number in range(3):
        score = {
            each: forward(name, pixels(name, number), each, writes).score
            for each in (*CLASSES, "the small red cross")
        }
        own, every = score[answer(number)], np.array([score[each] for each in CLASSES])
        if name == "siglip":
            prob = 1 / (1 + np.exp(-own))
        else:
            prob = np.exp(own) / np.exp(every).sum()
        rank = 1 + (every > own).sum()
        other = score["the small red cross"]
        values.append([own, own, prob, rank, float(rank == 1), other, -np.log(prob)])
    for n, _ in enumerate(measures):
        np.testing.assert_allclose(
            found[f"e{n}"].measures[0].patched[0], np.array(values)[:, n], atol=2e-4, rtol=1e-4
        )
    assert np.ptp(np.array(values), axis=0)[:3].min() > 0.01
