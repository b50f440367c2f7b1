"""The multiply-adds that `plan` counts for coordinates, against manual counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.base.text import Source
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.pass_cost import encoding_adds, observation_adds
from mechdsl.planner.plan import Plan

from ..execute.support import run_on, shared
from .models import bare
from .support import BLOCKS, experiment, rows, tokens
from .test_dictionaries import FEATURES, LAYER, make
from .test_inactive_features import BASIS, width_of
from .test_transcoders import FEATURES as ENCODED
from .test_transcoders import make_cross_layer

ROWS = len(rows())
EVERY = sum(len(tokens(text, "tokens *")) for text in rows())
SWEEP = "from other into clean  patch feature * of f at last token"


def counted(rule: str, architecture: str, folder: Path, basis: str = BASIS) -> tuple[float, float]:
    """Multiply-adds of separate rows and of joined ones, in units of one feature of one vector."""
    width = width_of("gpt2")
    make(folder, architecture, width)
    plans: list[Plan] = []
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{basis}{experiment("e", rule)}'
    run_on(Source(text, folder / "file.mech"), {"m": shared(bare("gpt2"))}, options)
    (plan,) = plans[0].panels[0].experiments
    work = plan.passes(np.arange(ROWS))
    found = [encoding_adds(plan, work, joined=joined) / width for joined in (False, True)]
    return found[0], found[1]


@pytest.mark.parametrize(
    ("rule", "architecture", "separate", "joined"),
    [
        # encode and decode one feature
        ("clamp feature 1 of f at last token to 2", "standard", 2 * ROWS, 2 * ROWS),
        # encode one feature of two runs, and decode it
        (SWEEP, "standard", 3 * FEATURES * ROWS, 3 * FEATURES * ROWS),
        # encode all features of two runs, and decode one; joined rows share vectors
        (SWEEP, "topk", FEATURES * ROWS * (2 * FEATURES + 1), FEATURES * ROWS * (2 + 1)),
        (
            f"set resid_post layer {LAYER} at tokens * to reconstruction of f",
            "standard",
            2 * FEATURES * EVERY,
            2 * FEATURES * EVERY,
        ),
        (
            f"scale resid_post layer {LAYER} in basis f at tokens * by 2 without error",
            "jumprelu",
            4 * FEATURES * EVERY,
            4 * FEATURES * EVERY,
        ),
    ],
)
def test_plan_counts_multiply_adds_of_coordinates(
    rule: str, architecture: str, separate: float, joined: float, data: Path
) -> None:
    """In addition, each vector is reconstructed once for the size of the error."""
    vectors = EVERY if "tokens *" in rule else ROWS
    error = 2 * FEATURES * vectors
    found = counted(rule, architecture, data)
    assert found == pytest.approx((separate + error, joined + error))


@pytest.mark.parametrize(
    ("rule", "layer", "features"),
    [
        # two layers, each of which encodes and decodes two features
        ("clamp features 1, 5 of f at last token to 2", 1, 2 * (2 + 2) * ROWS),
        # three layers, and the other run
        (SWEEP, 0, ENCODED * (4 + 3) * ROWS),
    ],
)
def test_plan_counts_each_layer_that_a_cross_layer_feature_writes_to(
    rule: str, layer: int, features: int, data: Path
) -> None:
    """Without the size of an error."""
    make_cross_layer(data, width_of("gpt2"), layers=3)
    basis = f'basis f = transcoder("clt") at mlp_out layer {layer}\n'
    assert counted(rule, "standard", data, basis) == pytest.approx((features, features))


def test_plan_counts_products_of_projected_directions(data: Path) -> None:
    """Two products with each direction, and those of all pairs."""
    found = counted("project out features 1, 5 of f at last token", "topk", data)
    assert found == pytest.approx((2 * (2 + 2) * ROWS,) * 2)


def test_plan_counts_no_reconstruction_error_for_linear_bases(data: Path) -> None:
    basis = "basis b = random(dims: 3) at resid_post layer 1\n"
    rule = "from other into clean  patch resid_post layer 1 in basis b at last token"
    assert counted(rule, "standard", data, basis) == pytest.approx((9 * ROWS, 9 * ROWS))


@pytest.mark.parametrize(
    ("line", "architecture", "features"),
    [
        ("observe value features 2, 5 of f at last token", "standard", 2 * ROWS),
        # features of the top-k depend on each other
        ("observe value feature * of f at tokens *", "topk", FEATURES * EVERY),
    ],
)
def test_observed_values_encode_named_features_of_each_row(
    line: str, architecture: str, features: int, data: Path
) -> None:
    found = counted(line, architecture, data)
    assert found == pytest.approx((features, features))


@pytest.mark.parametrize(
    ("line", "architecture", "vectors"),
    [
        # encode and reconstruct, and encode two features again
        ("observe features of f at last token top 2", "standard", ROWS * (3 * FEATURES + 2)),
        # features of the top-k depend on each other
        ("observe features of f at tokens * top 2", "topk", EVERY * 4 * FEATURES),
        (
            "observe features of f at last token top 2 by difference(other)",
            "standard",
            2 * ROWS * (3 * FEATURES + 2),
        ),
    ],
)
def test_plan_counts_multiply_adds_of_observed_features(
    line: str, architecture: str, vectors: int, data: Path
) -> None:
    width = width_of("gpt2")
    make(data, architecture, width)
    plans: list[Plan] = []
    options = RunOptions(on_profile=lambda plan, _: plans.append(plan))
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{BASIS}'
    text += experiment("e", line, measure="", stats="")
    run_on(Source(text, data / "file.mech"), {"m": shared(bare("gpt2"))}, options)
    (plan,) = plans[0].panels[0].experiments
    assert observation_adds(plan, np.arange(ROWS)) / width == vectors
