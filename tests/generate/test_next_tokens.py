"""Choosing and sampling tokens, and the ends of completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.forward.generation.decoding import (
    NO_TOKEN,
    Decoding,
    ReplyBuffer,
    _sample_tokens,
    choose_next_tokens,
)
from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules, StepEdge, StepRules
from mechdsl.forward.hooks.batch import EdgeWrite

from .support import Rules, greedy
from .test_rules_during_generation import PROMPTS, acts, model_of

PROBABILITIES = (0.02, 0.4, 0.08, 0.3, 0.2)
LOGITS = torch.tensor([PROBABILITIES]).log()
DRAWS = 4000


def tokens_of(
    logits: torch.Tensor,
    states: Sequence[int],
    decoding: Decoding,
    keys: Sequence[tuple[int, ...]] = (),
    step: int = 0,
) -> list[int]:
    return choose_next_tokens(logits, np.array(states), decoding, keys, step).tolist()


def drawn(count: int = DRAWS, step: int = 0, seed: int = 5, **how: float | int) -> list[int]:
    """Many draws from one state."""
    decoding = greedy(9, **how)
    keys = [(seed, row) for row in range(count)]
    return tokens_of(LOGITS, [0] * count, decoding, keys, step)


def by_hand(temperature: float = 1.0, top_k: int = 5, top_p: float = 1.0) -> dict[int, float]:
    """Probabilities by token."""
    warm = {n: p ** (1 / temperature) for n, p in enumerate(PROBABILITIES)}
    ordered = sorted(warm, key=lambda n: -warm[n])[:top_k]
    total = sum(warm[n] for n in ordered)
    kept: dict[int, float] = {}
    for n in ordered:
        if sum(kept.values()) >= top_p * (1 - 1e-6):
            break
        kept[n] = warm[n] / total
    return {n: p / sum(kept.values()) for n, p in kept.items()}


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 3, "temperature": 0.7},
        {"top_k": 100, "temperature": 2.0},
        {"top_p": 0.35},
        {"top_p": 0.69},
        {"top_p": 0.71},
        {"top_p": 1.0},
        {"top_p": 0.6, "top_k": 4, "temperature": 1.5},
    ],
)
def test_sampled_tokens_have_the_expected_frequencies(how: dict[str, float]) -> None:
    counts, expected = Counter(drawn(**how)), by_hand(**how)  # pyright: ignore
    assert set(counts) <= set(expected)
    for token, p in expected.items():
        away = abs(counts[token] - p * DRAWS)
        assert away <= 4.5 * np.sqrt(DRAWS * p * (1 - p)), (token, counts[token] / DRAWS, p)


def test_sampled_token_depends_only_on_key_and_step() -> None:
    first = drawn(50, temperature=1.0)
    assert drawn(20, temperature=1.0) == first[:20]
    assert drawn(50, step=1, temperature=1.0) != first
    assert drawn(50, seed=6, temperature=1.0) != first
    # With another state in the batch, and in another order.
    logits = torch.cat([torch.zeros_like(LOGITS), LOGITS])
    keys = [(5, row) for row in reversed(range(50))]
    again = tokens_of(logits, [1] * 50, greedy(9, temperature=1.0), keys)
    assert again[::-1] == first


def test_first_of_equal_logits_is_chosen() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    assert tokens_of(logits, [1, 0, 1], greedy(3)) == [0, 1, 0]
    assert set(tokens_of(logits, [0] * 99, greedy(3, top_k=1), [(n,) for n in range(99)])) == {1}
    found = tokens_of(logits, [1] * 99, greedy(3, top_k=2), [(n,) for n in range(99)])
    assert set(found) == {0, 1}


def test_sampling_at_interval_bounds_chooses_the_right_token() -> None:
    """Each of four equal tokens has a quarter of the interval, including its lower bound. A number
    that rounds to 1 gives the last allowed token."""
    logits, states = torch.zeros(1, 4), torch.zeros(4, dtype=torch.long)
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert _sample_tokens(logits, states, quarters, greedy(3, temperature=1.0)).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert _sample_tokens(logits, states, quarters, greedy(3, top_p=0.5)).tolist() == [0, 0, 1, 1]
    whole = torch.ones(4, dtype=torch.float64)
    assert _sample_tokens(logits, states, whole, greedy(3, top_k=2)).tolist() == [1, 1, 1, 1]
    assert _sample_tokens(logits, states, whole, greedy(3, top_p=0.5)).tolist() == [1, 1, 1, 1]


def test_sampling_from_bfloat16_logits_equals_float32() -> None:
    logits = torch.linspace(0, 3, 400)[None].bfloat16()
    keys, how = [(n,) for n in range(300)], greedy(3, temperature=1.3)
    found = tokens_of(logits, [0] * 300, how, keys)
    assert found == tokens_of(logits.float(), [0] * 300, how, keys)


def test_token_with_minus_infinite_logit_is_never_sampled() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]])
    found = tokens_of(logits, [0] * 300, greedy(3, temperature=5.0), [(n,) for n in range(300)])
    assert set(found) == {1, 3}


def test_row_with_nan_or_infinite_logits_has_no_next_token() -> None:
    """Other rows of the batch still have a next token."""
    logits = torch.tensor([[0.0, torch.nan], [0.0, 1.0], [torch.inf, 0.0], [-torch.inf, 0.0]])
    for decoding in (greedy(3), greedy(3, top_k=1)):
        found = tokens_of(logits, [0, 1, 1, 2, 3], decoding, [(1,)] * 5)
        assert found == [NO_TOKEN, 1, 1, NO_TOKEN, 1]


def test_samples_do_not_depend_on_the_batch() -> None:
    """Samples also ignore the key-value cache and rules on other rows."""
    model, how = model_of("gpt2"), greedy(6, temperature=2.0, top_p=0.95)
    prompts = [prompt for prompt in PROMPTS for _ in range(5)]
    random = [(row, 3, len(prompt)) for row, prompt in enumerate(prompts)]
    together = generate_replies(model, ReplyRequest(prompts, random=random), how)
    assert len({reply.ids for reply in together}) > 10
    for row in (0, 7, 14):
        [alone] = generate_replies(model, ReplyRequest([prompts[row]], random=[random[row]]), how)
        assert alone == together[row]
    request = ReplyRequest(prompts, random=random)
    whole = generate_replies(model, request, how, cached=False, limit=30)
    assert whole == together
    rules = Rules(acts("gpt2", 3, "resid_post", "add", "each step", prompts[3]))
    with_rules = generate_replies(model, ReplyRequest(prompts, random=random, **rules.given()), how)
    assert [n for n in range(15) if with_rules[n] != together[n]] == [3]


def test_sampling_without_a_key_per_row_is_rejected() -> None:
    with pytest.raises(ValueError, match="need a key"):
        generate_replies(model_of("gpt2"), ReplyRequest(PROMPTS), greedy(2, top_k=3))
    with pytest.raises(ValueError, match="need a key"):
        generate_replies(model_of("gpt2"), ReplyRequest(PROMPTS, random=[(1,)]), greedy(2, top_k=3))


LETTERS = " abc\néQ"


def decode(ids: Sequence[int]) -> str:
    """Decode one letter per token; 7 and 8 are one letter together, and 9 is two letters."""
    text = "".join({7: "«", 8: "»", 9: "b\n"}.get(n) or LETTERS[n] for n in ids)
    return text.replace("«»", "é").replace("«", "\ufffd").replace("»", "\ufffd")


def ended(tokens: Sequence[int], **how: object) -> tuple[tuple[int, ...], str, str]:
    writing = ReplyBuffer(1, Decoding(6, decode, **how))  # pyright: ignore
    for n, token in enumerate(tokens):
        goes_on = writing.put(np.array([0]), np.array([token])).tolist()
        assert goes_on == [NO_TOKEN if n == len(tokens) - 1 else token]
    [reply] = writing.replies()
    return reply.ids, reply.text, reply.ended


def test_completion_ends_at_stop_text_end_token_or_length() -> None:
    assert ended([1, 2, 3, 1, 2, 3]) == ((1, 2, 3, 1, 2, 3), "abcabc", "length")
    assert ended([1, 2, 5], ends=frozenset({5, 6})) == ((1, 2), "ab", "end")
    assert ended([5], ends=frozenset({5})) == ((), "", "end")
    assert ended([1, 2, NO_TOKEN]) == ((1, 2), "ab", "broken")
    stops = ("\n", "Q")
    assert ended([1, 2, 4], stops=stops) == ((1, 2), "ab", "stop")
    assert ended([6], stops=stops) == ((), "", "stop")
    # A token with text before the stop text belongs to the completion.
    assert ended([1, 9], stops=stops) == ((1, 9), "ab", "stop")
    # Stop texts of several tokens; the earliest match counts.
    assert ended([3, 1, 2, 3], stops=("bc", "abc")) == ((3,), "c", "stop")
    # A letter of two tokens before the stop text is complete.
    assert ended([1, 7, 8, 4], stops=stops) == ((1, 7, 8), "aé", "stop")
    # At the maximum length.
    assert ended([1, 1, 1, 1, 1, 4], stops=stops) == ((1, 1, 1, 1, 1), "aaaaa", "stop")
    assert ended([1, 1, 1, 1, 1, 5], ends=frozenset({5})) == ((1, 1, 1, 1, 1), "aaaaa", "end")


def test_rows_end_independently_in_any_order() -> None:
    """Each completion ends independently, in any order of rows."""
    writing = ReplyBuffer(5, Decoding(3, decode, ends=frozenset({5, 0}), stops=("bc",)))
    rows = np.array([4, 2, 0, 1])
    assert writing.put(rows, np.array([1, 5, 2, 2])).tolist() == [1, NO_TOKEN, 2, 2]
    rows = np.array([1, 4, 0])
    assert writing.put(rows, np.array([3, NO_TOKEN, 1])).tolist() == [NO_TOKEN, NO_TOKEN, 1]
    assert writing.put(np.array([0, 3]), np.array([3, 0])).tolist() == [NO_TOKEN] * 2
    assert [(reply.ids, reply.text, reply.ended) for reply in writing.replies()] == [
        ((2, 1, 3), "bac", "length"),
        ((), "", "stop"),
        ((), "", "end"),
        ((), "", "end"),
        ((1,), "a", "broken"),
    ]


@pytest.mark.parametrize(
    "how",
    [
        {"tokens": 0},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_invalid_decoding_setting_is_rejected(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"a reply must|temperature must|top_k must|top_p must"):
        Decoding(**{"tokens": 3, "decode": decode, **how})  # pyright: ignore


def test_step_rules_start_at_step_1() -> None:
    with pytest.raises(ValueError, match="step 0"):
        StepRules(0)
    assert [StepRules(2, 3).acts(step) for step in range(5)] == [False, False, True, True, False]
    assert StepRules(2).acts(99)


def test_allow_edge_at_the_newest_token_is_rejected() -> None:
    none = torch.zeros(1, dtype=torch.long)
    edge = EdgeWrite(0, "allow", none, none, none, none, none, torch.zeros(1))
    later = GenerationRules(steps=(StepRules(1, edges=[StepEdge(edge)]),))
    with pytest.raises(ValueError, match="can't be allowed"):
        generate_replies(model_of("gpt2"), ReplyRequest(PROMPTS, later=later), greedy(3))


def test_empty_prompt_is_rejected() -> None:
    with pytest.raises(ValueError, match="every prompt needs a token"):
        generate_replies(model_of("gpt2"), ReplyRequest([(1, 2), ()]), greedy(3))


def sorted_draw(logits: Any, uniform: float, top_k: int | None, top_p: float | None) -> int:
    """The reference: tokens by descending logit, ties by ascending id."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:top_k]
    mass = np.exp(logits[order] - logits.max())
    mass = np.cumsum(mass / mass.sum())
    last = len(mass) - 1 if top_p is None else min(int((mass < top_p).sum()), len(mass) - 1)
    return int(order[min(int((mass <= uniform * mass[last]).sum()), last)])


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x * 2,
    "flat": lambda x: x * 0.01,
    "peaked": lambda x: x * 30,
    "ties": lambda x: (x * 2).round(),
    "16 bits": lambda x: (x * 4).bfloat16().float(),
    "equal": lambda x: x * 0,
    "excluded": lambda x: x.masked_fill(x < 0, -torch.inf),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (40, None), (None, 0.7915), (40, 0.79)]
)
def test_sampling_equals_a_reference_over_sorted_tokens(
    kind: str, top_k: int | None, top_p: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = KINDS[kind](torch.randn(3, 700, generator=generator))
    uniform = torch.rand(60, generator=generator, dtype=torch.float64)
    states = torch.arange(60) % 3
    how = greedy(3, temperature=1.0, top_k=top_k, top_p=top_p)
    found = _sample_tokens(logits, states, uniform, how).tolist()
    every = zip(states.tolist(), uniform.tolist(), strict=True)
    wide = logits.double().numpy()
    assert found == [sorted_draw(wide[state], u, top_k, top_p) for state, u in every]


@pytest.mark.parametrize("how", [{"temperature": 1.3}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}])
def test_sampling_sorts_the_vocabulary_only_for_top_p_alone(
    how: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sort, sizes = torch.Tensor.sort, list[int]()

    def noted(self: torch.Tensor, *given: Any, **named: Any) -> Any:
        sizes.append(self.shape[-1])
        return sort(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "sort", noted)
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1))
    tokens_of(logits, [0, 1, 2, 3], greedy(3, **how), [(n,) for n in range(4)])  # pyright: ignore
    assert max(sizes) < 500
