"""The dictionaries of `examples/systems` describe the activations of their models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from zoo.dictionaries import DICTIONARIES, Dictionary, activations, train

NAMES = [each.model for each in DICTIONARIES]
UNEXPLAINED = {"refusal": 0.06, "induction": 0.06, "succession": 0.22}
"""Largest share of the variance that a dictionary may leave."""


@pytest.mark.parametrize("of", DICTIONARIES, ids=NAMES)
def test_the_features_explain_the_vectors(of: Dictionary) -> None:
    weights = load_file(of.folder / "sae_weights.safetensors")
    config = json.loads((of.folder / "cfg.json").read_text("utf-8"))
    assert (config["d_sae"], config["k"]) == (of.features, of.k)
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(of.features))
    vectors = activations(of)
    before = (vectors - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    top = before.topk(of.k, dim=1)
    kept = torch.zeros_like(before).scatter(1, top.indices, top.values.relu())
    rest = vectors - kept @ weights["W_dec"] - weights["b_dec"]
    share = rest.square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert share < UNEXPLAINED[of.model]
    assert int((kept > 0).any(0).sum()) > of.features / 2


def test_a_planted_dictionary_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are sums of few of 24 known directions, which the decoder then has."""
    monkeypatch.setattr("zoo.dictionaries.STEPS", 2000)
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(24, 32, generator=random)
    rows = rows / rows.norm(dim=1, keepdim=True)
    amounts = torch.rand(4000, 24, generator=random) + 0.5
    chosen = torch.rand(4000, 24, generator=random) < 2 / 24
    found = train((amounts * chosen) @ rows, 32, 3)["W_dec"]
    assert ((rows @ found.T).max(dim=1).values > 0.95).float().mean() > 0.9
