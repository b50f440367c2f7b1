"""Hooks stay installed from step to step while rules act at the same sites."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mechdsl.forward.generation import replies as cached
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies

from ..execute.support import shared
from ..models import families
from .support import Act, Look, Rules, agree, by_hand, greedy, written
from .test_rules_during_generation import FAMILIES, PROMPTS, model_of

TOKENS = 6


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each pass that installs hooks."""
    found: list[int] = []

    class Counted(cached.CachedPass):
        def __init__(self, model: Any, tokens: Any, *rest: Any) -> None:
            found.append(len(tokens))
            super().__init__(model, tokens, *rest)

    monkeypatch.setattr(cached, "CachedPass", Counted)
    return found


def scaled(row: int, steps: tuple[int, int | None] = (1, None), site: str = "z") -> Act:
    return Act(row, site, 1, "scale", (1.5 + row,), steps=steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_are_installed_once_while_the_same_sites_are_written(
    name: str, opened: list[int]
) -> None:
    rules = Rules([scaled(0), scaled(1), scaled(2, (2, 3)), scaled(2, site="resid_post")])
    agree(
        written(model_of(name), PROMPTS[:3], greedy(TOKENS), rules),
        by_hand(name, PROMPTS[:3], rules, TOKENS),
    )
    assert opened == [3]  # in step 4, one row of `z` is no longer written


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hooks_inside_attention_are_reinstalled_in_each_step(name: str, opened: list[int]) -> None:
    """Writes inside attention depend on the length of the text."""
    rules = Rules([scaled(0), scaled(1, site="q")], [Look(1, "reweight", 1, 0, (0, 2), 1.3)])
    agree(
        written(model_of(name), PROMPTS[:2], greedy(TOKENS), rules),
        by_hand(name, PROMPTS[:2], rules, TOKENS),
    )
    assert opened == [2] * (TOKENS - 1)


def test_rules_at_another_site_reinstall_hooks(opened: list[int]) -> None:
    rules = Rules([scaled(0), scaled(1, (3, 4), "mlp_out")])
    agree(
        written(model_of("llama"), PROMPTS[:2], greedy(TOKENS), rules),
        by_hand("llama", PROMPTS[:2], rules, TOKENS),
    )
    assert opened == [2] * 2  # in steps 1 and 3; in step 5 the hook of the second site does nothing


def test_rows_that_end_or_diverge_keep_hooks(opened: list[int]) -> None:
    """The last row equals the first until a rule acts on it; the middle row ends early."""
    prompts, rules = [*PROMPTS[:2], PROMPTS[0]], Rules([scaled(1), scaled(2, (4, None))])
    expected = by_hand("llama", prompts, rules, TOKENS)
    end = expected[1][0][2]
    ended = expected[1][0].index(end)
    assert end not in {*expected[0][0], *expected[2][0]}
    found = written(model_of("llama"), prompts, greedy(TOKENS, ends=frozenset({end})), rules)
    assert [len(reply.ids) for reply in found.replies] == [TOKENS, ended, TOKENS]
    assert [found.replies[row].ids for row in (0, 2)] == [tuple(expected[row][0]) for row in (0, 2)]
    assert opened == [2]
    assert ended > 0


def test_hooks_on_routers_and_experts_are_installed_once(opened: list[int]) -> None:
    model = shared(families.module("mixtral"))
    shape = model.shape
    acts = [
        Act(0, "router", 1, "scale", (1.5,)),
        Act(1, "expert_out", 0, "scale", (2.0,), 1),
        Act(1, "mlp_out", shape.n_layers - 1, "scale", (1.5,)),
    ]
    plain = written(model, PROMPTS[:2], greedy(TOKENS), Rules(acts), cached=False)
    found = written(model, PROMPTS[:2], greedy(TOKENS), Rules(acts))
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert opened == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_generation_removes_all_hooks_even_after_a_failure(
    fails: bool, monkeypatch: pytest.MonkeyPatch, opened: list[int]
) -> None:
    model = model_of("llama")
    written(model, PROMPTS[:2], greedy(2))  # so that the method is already chosen
    opened.clear()

    def hooks() -> list[tuple[int, int, bool]]:
        return [
            (len(part._forward_pre_hooks), len(part._forward_hooks), "forward" in part.__dict__)
            for part in model.module.modules()
        ]

    before, choose = hooks(), cached.choose_next_tokens

    def stopping(*given: Any) -> Any:
        if given[-1] == 3:
            assert hooks() != before
            assert not fails, "stopped"
        return choose(*given)

    monkeypatch.setattr(cached, "choose_next_tokens", stopping)
    request = ReplyRequest(PROMPTS[:2], later=Rules([scaled(0), scaled(1)]).given()["later"])
    with pytest.raises(AssertionError, match="stopped") if fails else nullcontext():
        generate_replies(model, request, greedy(TOKENS))
    assert opened == [2]
    assert hooks() == before
    assert not torch.is_inference_mode_enabled()
