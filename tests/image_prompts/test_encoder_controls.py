"""`against random` for rules in vision encoders of prompts, against plain hooks on the bare model:
one unpadded prompt at a time, with every target that can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import some
from . import test_resampled_encoder as resampled
from . import test_resampled_patches as grids
from .reference import at
from .support import experiment
from .test_encoder_paths import NAMES, Place, edited, tower
from .test_families import ALL, bare, difference, inputs, layout_of, run_text
from .test_token_patches import HEADS, LAYERS, other

CELL = "photo row 1 col 2 token"


def changed(name: str, n: int, places: Sequence[Place], patches: Sequence[int]) -> float:
    """The effect of zeros at some patches of sites, in a prompt with its other image."""
    given, zero = inputs(name, n, other(n)), at(patches, torch.zeros(()))
    base = difference(bare(name).run(given))
    [place] = places
    with edited(name, place, place.of_head(zero)):
        return difference(bare(name).run(given)) - base


def band(found: ExperimentResult) -> tuple[float, float]:
    own = found.control(0)
    assert own is not None
    return float(own.low[0]), float(own.high[0])


@pytest.mark.parametrize("name", some(NAMES[:-1], ["gemma3"]))
def test_random_heads_and_layers_of_the_encoder_equal_hooks(name: str) -> None:
    """With two heads and two layers, one other target exists."""
    lines = (f"ablate z vision layer 0 head 1 at {CELL} with zero", "from clean into changed")
    text = experiment("heads", *lines, "against random(1)")
    text += experiment(
        "layers",
        "from clean into changed",
        f"ablate mlp_out vision layer 0 at {CELL} with zero",
        "against random(1)",
    )
    heads, layers = run_text(name, text)
    assert (HEADS, LAYERS) == (2, 2)
    patches = [tower(name).cell(other(n), 1, 2) for n in ALL]
    for found, place in ((heads, Place("z", 0, 0)), (layers, Place("mlp_out", 1))):
        own = [changed(name, n, [place], patches[n]) for n in ALL]
        np.testing.assert_allclose(band(found), [np.mean(own)] * 2, atol=1e-4)
        assert np.abs(own).max() > 0.01


def test_random_positions_of_the_encoder_are_tokens_of_images() -> None:
    """Tokens are drawn from a row's image; the means over draws are within those of all tokens."""
    name, site = "gemma3", Place("resid_pre", 1)
    rule = f"ablate resid_pre vision layer 1 at {CELL} with zero"
    lines = ("from clean into changed", rule, "against random(40, positions)")
    [found] = run_text(name, experiment("e", *lines))
    low, high = band(found)
    every: list[list[float]] = []
    for n in ALL:
        own = tower(name)
        cells = {(cell.row, cell.col) for cell in layout_of(name, n, other(n)).cells} - {(1, 2)}
        every.append([changed(name, n, [site], own.cell(other(n), *cell)) for cell in cells])
    means = [float(np.mean(values)) for values in product(*every)]
    assert min(abs(low - mean) for mean in means) < 1e-4
    assert min(abs(high - mean) for mean in means) < 1e-4
    assert min(means) - 1e-4 <= low < high <= max(means) + 1e-4
    assert "image tokens of the same row" in " ".join(found.to_text().split())


def test_random_patches_that_a_resampler_reads_equal_hooks() -> None:
    rule = "ablate resid_post vision layer 0 at photo row 1 col 2 token with zero"
    lines = ("from clean into changed", rule, "against random(40, positions)")
    [found] = resampled.run_text(experiment("e", *lines), "equal and uneven")
    low, high = band(found)
    every: list[list[float]] = []
    for n in ALL:
        given = resampled.inputs("equal and uneven", n, other(n))
        base, own = difference(resampled.bare(splits=True).run(given)), list[float]()
        for patch in [*grids.spots(given).values()]:
            if patch != grids.in_grid(given, 1, 2):
                with resampled.edited("resid_post", 0, at([patch], torch.zeros(()))):
                    own.append(difference(resampled.bare(splits=True).run(given)) - base)
        every.append(own)
    least, most = (float(np.mean([pick(own) for own in every])) for pick in (min, max))
    assert least - 1e-4 <= low < high <= most + 1e-4
    assert "patches of the same row" in " ".join(found.to_text().split())
