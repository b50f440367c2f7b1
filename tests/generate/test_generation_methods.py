"""Cached keys and values equal full passes, or aren't used."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mechdsl.forward.generation import replies as replies_module
from mechdsl.forward.generation.cached_pass import (
    GenerationMethod,
    _test_methods,
    choose_method,
    run_cached_pass,
)
from mechdsl.forward.hooks.batch import PositionIdWrite, RuleWrites
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model

from ..execute.support import shared, word_tokenizer
from ..models import families
from ..rules.models import bare, double
from .support import Act, Look, Rules, agree, by_hand, greedy, written
from .test_rules_during_generation import PROMPTS, TOKENS, model_of


def mixed(model: LoadedModel) -> Rules:
    """Rules of every type."""
    shape = model.shape
    generator = torch.Generator().manual_seed(0)

    def vector(size: int) -> tuple[float, ...]:
        return tuple((torch.randn(size, generator=generator) * 3).tolist())

    return Rules(
        [
            Act(0, "resid_post", 1, "add", vector(shape.d_model), position=3),
            Act(0, "resid_post", 1, "along", vector(shape.d_model), to=3.0),
            Act(1, "z", 1, "set", vector(shape.blocks[0].d_head), 2, steps=(2, 3)),
            Act(2, "v", 0, "add", vector(shape.blocks[0].d_head), position=0),
            Act(2, "k", 2, "scale", (3.0,)),
        ],
        [
            Look(1, "block", 1, 1, (0, 1), query=2),
            Look(0, "reweight", 2, 0, (0, 3), 4.0, also="newest"),
            Look(2, "block", 1, 0, (5, 6), also="written", steps=(2, None)),
        ],
        [Act(1, "v", 1, "set", vector(shape.blocks[0].d_head), 0, position=1)],
    )


@pytest.mark.parametrize("name", families.EACH)
def test_generation_with_cache_equals_full_passes_in_every_family(name: str) -> None:
    """Every family uses the cache and generates the same completions with it."""
    model = shared(families.module(name))
    assert choose_method(model) == choose_method(model, inside=True) == GenerationMethod("cached")
    rules = mixed(model)
    whole = written(model, PROMPTS, greedy(TOKENS), rules, cached=False)
    expected = [(r.ids, x) for r, x in zip(whole.replies, whole.logits, strict=True)]
    agree(written(model, PROMPTS, greedy(TOKENS), rules), expected)


def whole_only(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make generation with the cache fail."""

    def never(*_: Any) -> Any:
        raise AssertionError(model.name)

    monkeypatch.setattr(replies_module, "CachedPasses", never)


def test_model_whose_output_depends_on_the_call_uses_full_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd: Any = copy.deepcopy(bare("gpt2"))
    model = shared(odd)
    odd.transformer.wte.register_forward_hook(lambda part, args, out: out + 0.3 * out.cumsum(1))
    way = choose_method(model)
    assert way.kind == "whole"
    assert way.reason.startswith("with cached keys and values its logits are off by ")
    whole_only(model, monkeypatch)
    assert written(model, PROMPTS, greedy(2)).replies


def test_model_padded_on_the_right_uses_full_passes() -> None:
    model = model_of("gpt2")
    right = copy.copy(model)
    object.__setattr__(right, "calling", copy.copy(model.calling))
    object.__setattr__(right.calling, "side", "right")
    assert choose_method(right).kind == "whole"
    rules = mixed(right)
    agree(written(right, PROMPTS, greedy(TOKENS), rules), by_hand("gpt2", PROMPTS, rules, TOKENS))


def test_length_dependent_rotary_embedding_uses_full_passes() -> None:
    odd: Any = copy.deepcopy(bare("llama"))
    model = shared(odd)
    odd.model.rotary_emb.rope_type = "dynamic"
    assert choose_method(model) == GenerationMethod(
        "whole", "its rotary embedding depends on the length of the text"
    )
    odd.model.rotary_emb.rope_type = {"full_attention": "default", "sliding": "longrope"}
    assert _test_methods(model, False).kind == "whole"
    odd.model.rotary_emb.rope_type = "default"
    assert _test_methods(model, False).kind == "cached"


def test_nan_in_the_cache_check_selects_full_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mechdsl.forward.generation.cached_pass._run_cached_passes",
        lambda *_: torch.tensor(torch.nan),
    )
    assert _test_methods(model_of("gpt2"), False).kind == "whole"


def test_cache_check_covers_rules_inside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def way(model: Any, *, inside: bool) -> GenerationMethod:
        asked.append(inside)
        return GenerationMethod("cached")

    monkeypatch.setattr("mechdsl.forward.generation.replies.choose_method", way)
    model, row = model_of("llama"), [PROMPTS[0]]
    for site, width in (("resid_post", 20), ("q_rot", 6)):
        act = Act(0, site, 1, "add", (0.5,) * width, position=2)
        written(model, row, greedy(2), Rules([act]))
    look = Look(0, "block", 1, 0, (1,), 0.0, steps=(1, None))
    written(model, row, greedy(2), Rules(looks=[look]))
    assert asked == [False, True, True]


def test_cache_check_runs_passes_with_and_without_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes without rules inside attention may be computed differently."""
    opened: list[bool] = []

    def listening(*given: Any) -> Any:
        opened.append(bool(given[4].edges))
        return run_cached_pass(*given)

    monkeypatch.setattr("mechdsl.forward.generation.cached_pass.run_cached_pass", listening)
    for inside in (False, True):
        opened.clear()
        assert _test_methods(model_of("gpt2"), inside) == GenerationMethod("cached")
        assert set(opened) == ({False, True} if inside else {False})


def test_step_writes_use_full_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that adds a step from the preceding token needs full passes."""
    model = model_of("gpt2")
    act = Act(0, "resid_post", 1, "step", (2.0,))
    whole_only(model, monkeypatch)
    found = written(model, PROMPTS, greedy(TOKENS), Rules([act]))
    plain = written(model, PROMPTS, greedy(TOKENS), cached=False)
    assert found.replies[1:] == plain.replies[1:]
    assert not torch.equal(found.logits[0], plain.logits[0])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_generation_with_other_position_ids_equals_the_library(name: str, cached: bool) -> None:
    """Generated tokens have ordinary ids; the last row has the first prompt without changes."""
    prompts = [*PROMPTS, PROMPTS[0]]
    numbers = ((0, 2, 9), (0, 3, 1), (2, 5, 0), (2, 6, 12))
    each = PositionIdWrite(*torch.tensor(numbers).t())
    prefill = RuleWrites(numbers=[each])
    found = written(model_of(name), prompts, greedy(TOKENS), prefill=prefill, cached=cached)
    expected: list[tuple[list[int], torch.Tensor]] = []
    for row, prompt in enumerate(prompts):
        reply: list[int] = []
        logits: list[torch.Tensor] = []
        for _ in range(TOKENS):
            place = torch.arange(len(prompt) + len(reply))
            for _, position, number in (x for x in numbers if x[0] == row):
                place[position] = number
            ids = torch.tensor([[*prompt, *reply]])
            # Without a mask, the library treats new position ids as new texts.
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                output = double(name)(**given, position_ids=place[None], use_cache=False)
            logits.append(output.logits[0, -1])
            reply.append(int(logits[-1].argmax()))
        expected.append((reply, torch.stack(logits)))
    agree(found, expected)
    plain = written(model_of(name), PROMPTS, greedy(TOKENS))
    assert (found.logits[0] - plain.logits[0]).abs().amax() > 0.1


def test_allowed_keys_and_steps_in_the_prompt_equal_full_passes() -> None:
    """Allowed keys after a query, and steps from the preceding token."""
    model = model_of("llama")
    allowed = Look(0, "block", 1, 1, (3, 4), query=2).edge
    longer = [(1, 2), PROMPTS[0]]
    prefill = RuleWrites(
        [Act(1, "resid_post", 1, "step", (2.0,), position=1).write],
        [replace(allowed, change="allow")],
    )
    settings: dict[str, Any] = {"prefill": prefill}
    for prompts in (PROMPTS, [PROMPTS[0], *longer]):
        whole = written(model, prompts, greedy(TOKENS), cached=False, **settings)
        expected = [(r.ids, x) for r, x in zip(whole.replies, whole.logits, strict=True)]
        agree(written(model, prompts, greedy(TOKENS), **settings), expected)
        plain = written(model, prompts, greedy(TOKENS))
        for row in (0, 1):
            assert (whole.logits[row] - plain.logits[row]).abs().amax() > 0.1


def test_recurrent_model_uses_full_passes() -> None:
    """Mamba has no keys and values."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=families.VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        state_size=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    module = MambaForCausalLM(config)
    families.draw(module, 0)
    model, _ = adopt_model("m", module.eval(), word_tokenizer())
    assert model is not None
    way = choose_method(model)
    assert way.kind == "whole"
    # Since transformers 5.24, its state is an argument of the same name, and the trial fails.
    assert "cached keys and values" in way.reason
    act = Act(0, "resid_post", 0, "add", (3.0,) * 24, position=2)
    found = written(model, PROMPTS, greedy(4), Rules([act]))
    [alone] = written(model, PROMPTS[1:2], greedy(4)).logits
    assert (found.logits[1] - alone).abs().amax() < 1e-4 * alone.abs().amax()
