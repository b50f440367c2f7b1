"""Two experiments in one file, which share passes: one writes, the other reads at other tokens.

Each has the values of a separate run in full forward passes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from .support import experiment, run_file

RULES = (
    "ablate embed at subject token, cue token with mean",
    "ablate embed at cue token with zero",
    "ablate z layer 1 head 1 at cue token with zero",
    "ablate resid_post layer 0 at subject token with zero",
    "scale mlp_hidden layer 1 neuron 0 at last token by 2",
    "block attention layer 1 from last token to subject token",
    "add 0.5 * step(resid_pre) to resid_pre layer 0 at cue token",
    "ablate final_norm at last token with zero",
    "replace block layer 1 with identity",
)
OBSERVED = (
    "norm embed at subject token, last token",
    "norm resid_pre layer * at first-item token, last token",
    "norm resid_post layer * at first-item token, last token",
    "norm final_norm at first-item token, last token",
    "norm z layer * head * at cue token",
    "norm q layer * head 0 at subject token",
    "norm attn_norm layer * at last-item token",
    "norm mlp_hidden layer 1 at last-item token",
    "logit_lens resid_post layer * at first-item token, last token",
    "attention layer * head * from last token to subject token",
)
WRITTEN = {f"rule{n}": experiment(f"rule{n}", rule) for n, rule in enumerate(RULES)}
READ = {
    f"read{n}": experiment(f"read{n}", f"observe {line}", measure="")
    for n, line in enumerate(OBSERVED)
}


def same(found: ExperimentResult, expected: ExperimentResult) -> None:
    np.testing.assert_allclose(
        found.measures[0].patched, expected.measures[0].patched, rtol=1e-4, atol=1e-4
    )


def hold(data: Path, name: str, mode: str, reads: dict[str, str]) -> None:
    expected: dict[str, ExperimentResult] = {}
    for text in (*WRITTEN.values(), *reads.values()):
        expected |= run_file(text, data, name, "plain")
    for rule, writing in WRITTEN.items():
        for read, reading in reads.items():
            found = run_file(writing + reading, data, name, mode)
            same(found[rule], expected[rule])
            same(found[read], expected[read])


def test_experiments_in_shared_passes_equal_separate_runs(data: Path) -> None:
    """The observed sites are before or after all blocks."""
    reads = {read: READ[read] for read in READ if "embed" in READ[read] or "final" in READ[read]}
    hold(data, "llama", "planned", reads)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "small passes", "padded on the right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_experiments_in_shared_passes_equal_separate_runs_in_other_families(
    data: Path, name: str, mode: str
) -> None:
    hold(data, name, mode, READ)
