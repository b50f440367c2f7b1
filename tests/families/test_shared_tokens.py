# pyright: reportPrivateUsage=false
"""Passes that compute equal beginnings of prompts once, compared with passes that don't."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.execute import unpatched_batch
from mechdsl.forward.hooks import token_copies
from mechdsl.forward.hooks.full_pass import run_full
from mechdsl.forward.hooks.model import build_batch
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts import runs

from ..quick import some
from . import tables, walk
from .parts import Architecture

ROWS = {row.name: row for row in tables.every() if isinstance(row, Architecture)}
QUICK = ("gpt2", "mixtral")
NEEDS_SOUND = ("moonshine", "speech_to_text")
PROMPTS = [
    (5, 6, 7, 8, 9, 10, 11),
    (5, 6, 7, 8, 9, 12),
    (5, 6, 7, 8),
    (5, 6, 7, 8, 9, 10, 3, 4),
]


@pytest.mark.parametrize("name", some(sorted({*ROWS} - {*NEEDS_SOUND}), QUICK))
def test_logits_with_shared_tokens_equal_those_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    model, _ = adopt_model("m", walk._module(ROWS[name], torch.float32), walk.tokenizer())
    if model is None:
        pytest.skip("the package doesn't take it")
    if model.shape.takes == "image" or model.shape.encodes_apart:
        pytest.skip("it reads more than prompts of text")
    batch = build_batch(model, PROMPTS, [0] * len(PROMPTS), model.calling.side)
    parts: Any = [SimpleNamespace(ids=PROMPTS, run=SimpleNamespace(noise=None))]
    copies = unpatched_batch._find_copies(model, batch, parts)
    if copies is None:
        assert not (model.shape.reads_prefix and model.restartable)
        return
    assert len(copies.computed) < int(batch.mask.sum()) - 8
    plain = run_full(model, batch).logits
    maps = token_copies._list_shared_maps(model, range(model.shape.n_layers))
    with copies.shared(model):
        shared = run_full(model, batch).logits
    assert maps or model.shape.n_experts
    assert plain is not None
    assert shared is not None
    real = batch.mask.bool() if plain.shape[:2] == batch.mask.shape else ...
    np.testing.assert_allclose(shared[real], plain[real], rtol=1e-4, atol=1e-4)
