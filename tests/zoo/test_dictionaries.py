"""The dictionaries of `examples/systems` describe the activations of their models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from zoo.dictionaries import DICTIONARIES, Dictionary, encode, train, training_vectors, unexplained

from ..quick import some

NAMES = [each.name for each in DICTIONARIES]
QUICK = [each for each in DICTIONARIES if each.name in ("refusal-features", "counting-features")]
MOST_UNEXPLAINED = {
    "refusal-features": 0.06,
    "induction-features": 0.06,
    "induction-64": 0.28,
    "induction-128": 0.14,
    "induction-256": 0.06,
    "counting-features": 0.06,
    "succession-features": 0.22,
}
"""Maximum unexplained variance; small dictionaries have fewer features than the data words."""


@pytest.mark.parametrize("of", some(DICTIONARIES, QUICK), ids=NAMES)
def test_shipped_dictionary_explains_the_activations(of: Dictionary) -> None:
    weights = load_file(of.folder / "sae_weights.safetensors")
    config = json.loads((of.folder / "cfg.json").read_text("utf-8"))
    assert (config["d_sae"], config["k"]) == (of.features, of.k)
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(of.features))
    vectors = training_vectors(of)
    assert unexplained(vectors, weights, of.k) < MOST_UNEXPLAINED[of.name]
    assert int((encode(vectors, weights, of.k) > 0).any(0).sum()) > of.features / 2


@pytest.mark.slow
def test_dictionary_training_finds_planted_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are sums of a few of 24 known directions, which the decoder must contain."""
    monkeypatch.setattr("zoo.dictionaries.STEPS", 2000)
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(24, 32, generator=random)
    rows = rows / rows.norm(dim=1, keepdim=True)
    amounts = torch.rand(4000, 24, generator=random) + 0.5
    chosen = torch.rand(4000, 24, generator=random) < 2 / 24
    found = train((amounts * chosen) @ rows, 32, 3)["W_dec"]
    assert ((rows @ found.T).max(dim=1).values > 0.95).float().mean() > 0.9
