"""Replacing activations by a trained dictionary costs less loss than principal components."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mechdsl

torch.set_num_threads(1)

FILE = """mech 1

model toy = zoo("induction")

prompts repeats {{
  word in words(toy)
  half = list(word, 6, sep: " ", distinct: true)
  template "{{half}} {{again = half}} {{cue = half[1]}}"
  answer " {{half[2]}}"
  split 80%
}}

basis f = fit(
  sae(features: 512, k: {k}), prompts: repeats.train, limit: 500, steps: 400, batch: 512,
  rate: 0.003, seed: {seed}
) at resid_post layer 0 at tokens 1..-1
basis components = pca(
  repeats.train, dims: {k}, limit: 500, each_token: true
) at resid_post layer 0 at tokens 1..-1

experiment lost {{
  model toy
  prompts repeats.test limit 64
  for b in [f, components] {{
    set resid_post layer 0 at tokens except token 0 to reconstruction of b
  }}
  measure loss as delta
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("k", [8, 16, 32])
def test_dictionary_reconstruction_loses_less_than_principal_components(
    k: int, seed: int, tmp_path: Path
) -> None:
    """On held-out texts, with as many components as active features."""
    path = tmp_path / "lost.mech"
    path.write_text(FILE.format(k=k, seed=seed), "utf-8")
    mechdsl.fit(path, store=tmp_path / "store")
    (found,) = mechdsl.run(path, store=tmp_path / "store").files[0].experiments
    (loss,) = found.measures
    dictionary, components = (loss.patched - loss.base).mean(-1)
    assert abs(dictionary) < 0.2
    assert components > dictionary + 0.3
