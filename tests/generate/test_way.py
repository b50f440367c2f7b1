"""Kept keys and values give what whole passes give, or aren't used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import mechdsl.generate.write_replies as module
from mechdsl.generate.way import Way, way_of
from mechdsl.hooks.loaded import LoadedModel

from ..execute.support import shared
from ..models import families
from ..rules.models import bare
from .support import Act, Look, Rules, agree, by_hand, greedy, written
from .test_acting import PROMPTS, TOKENS, model_of


def mixed(model: LoadedModel) -> Rules:
    """Something of each kind."""
    shape = model.shape
    generator = torch.Generator().manual_seed(0)

    def vector(size: int) -> tuple[float, ...]:
        return tuple((torch.randn(size, generator=generator) * 3).tolist())

    return Rules(
        [
            Act(0, "resid_post", 1, "add", vector(shape.d_model), position=3),
            Act(0, "resid_post", 1, "along", vector(shape.d_model), to=3.0),
            Act(1, "z", 1, "set", vector(shape.d_head), 2, steps=(2, 3)),
            Act(2, "v", 0, "add", vector(shape.d_head), position=0),
            Act(2, "k", 2, "scale", (3.0,)),
        ],
        [
            Look(1, "block", 1, 1, (0, 1), query=2),
            Look(0, "reweight", 2, 0, (0, 3), 4.0, also="newest"),
            Look(2, "block", 1, 0, (5, 6), also="written", steps=(2, None)),
        ],
        [Act(1, "v", 1, "set", vector(shape.d_head), 0, position=1)],
    )


@pytest.mark.parametrize("name", families.EACH)
def test_every_family(name: str) -> None:
    """They keep keys and values, and write the same with them."""
    model = shared(families.module(name))
    assert way_of(model) == way_of(model, inside=True) == Way("cached")
    rules = mixed(model)
    whole = written(model, PROMPTS, greedy(TOKENS), rules, cached=False)
    expected = [(r.ids, x) for r, x in zip(whole.replies, whole.logits, strict=True)]
    agree(written(model, PROMPTS, greedy(TOKENS), rules), expected)


def whole_only(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written on kept keys here."""

    def never(*_: Any) -> Any:
        raise AssertionError(model.name)

    monkeypatch.setattr(module, "CachedPasses", never)


def test_a_model_that_looks_at_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    odd: Any = copy.deepcopy(bare("gpt2"))
    model = shared(odd)
    odd.transformer.wte.register_forward_hook(lambda part, args, out: out + 0.3 * out.cumsum(1))
    way = way_of(model)
    assert way.kind == "whole"
    assert way.reason.startswith("with kept keys and values its logits are off by ")
    whole_only(model, monkeypatch)
    assert written(model, PROMPTS, greedy(2)).replies


def test_a_model_that_counts_columns() -> None:
    model = model_of("gpt2")
    right = copy.copy(model)
    object.__setattr__(right, "calling", copy.copy(model.calling))
    object.__setattr__(right.calling, "side", "right")
    assert way_of(right).kind == "whole"
    rules = mixed(right)
    agree(written(right, PROMPTS, greedy(TOKENS), rules), by_hand("gpt2", PROMPTS, rules, TOKENS))


def test_long_texts_that_turn_otherwise() -> None:
    odd: Any = copy.deepcopy(bare("llama"))
    model = shared(odd)
    odd.model.rotary_emb.rope_type = "dynamic"
    assert way_of(model) == Way("whole", "its rotary embedding hangs on how long the text is")


def test_steps_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written as a step from the token before is written in whole passes."""
    model = model_of("gpt2")
    act = Act(0, "resid_post", 1, "step", (2.0,))
    whole_only(model, monkeypatch)
    found = written(model, PROMPTS, greedy(TOKENS), Rules([act]))
    plain = written(model, PROMPTS, greedy(TOKENS), cached=False)
    assert found.replies[1:] == plain.replies[1:]
    assert not torch.equal(found.logits[0], plain.logits[0])
