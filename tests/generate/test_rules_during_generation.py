"""Every write mode in prefill and steps, against a loop of full passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mechdsl.forward.hooks.batch import EditWrite, WriteMode
from mechdsl.forward.hooks.model import LoadedModel

from ..execute.support import shared
from ..rules.models import bare
from .support import NEAR, Act, Also, Kind, Look, Rules, agree, by_hand, greedy, written

FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "mistral")
PROMPTS: tuple[tuple[int, ...], ...] = ((1, 5, 9, 20, 7), (1, 8, 3), (1, 30, 31, 32, 33, 34, 35))
TOKENS = 6
SITES = (
    *("embed", "resid_pre", "attn_norm", "q", "k", "v", "q_rot", "k_rot", "z", "head_out"),
    *("attn_out", "resid_mid", "mlp_norm", "mlp_hidden", "mlp_out", "resid_post", "final_norm"),
    "logits",
)
MODES: tuple[WriteMode, ...] = ("set", "add", "scale", "along")
Steps = tuple[int, int | None]
WHEN: dict[str, tuple[bool, bool, Steps | None]] = {
    "a token of the prompt": (True, False, None),
    "the prefill": (False, True, None),
    "each step": (False, True, (1, None)),
    "from 2 to 3": (False, False, (2, 3)),
    "step 1": (False, False, (1, 1)),
    "the last one": (False, False, (TOKENS - 1, TOKENS + 3)),
}
"""Whether a rule acts on the second-last and the last prompt token, and in which steps."""


@cache
def model_of(name: str) -> LoadedModel:
    return shared(bare(name))


@cache
def width(name: str, site: str) -> tuple[int, int]:
    """(units, width) of a site in block 1."""
    shape = model_of(name).shape
    match site:
        case "q" | "z" | "q_rot":
            return shape.blocks[0].heads, shape.blocks[0].d_head
        case "k" | "v" | "k_rot":
            return shape.blocks[0].kv_heads, shape.blocks[0].d_head
        case "head_out":
            return shape.blocks[0].heads, shape.d_model
        case "mlp_hidden":
            return shape.blocks[0].neurons, 1
        case "logits":
            return 1, shape.vocab_size
        case _:
            return 1, shape.d_model


def acts(
    name: str, row: int, site: str, mode: WriteMode, when: str, prompt: Sequence[int]
) -> list[Act]:
    """A write of one vector at the tokens and steps of `when`."""
    units, size = width(name, site)
    generator = torch.Generator().manual_seed(row)
    far = 20 if site == "mlp_hidden" else 8 if units > 1 else 3
    values: Tensor = torch.randn(size, generator=generator) * far
    if mode == "scale":
        values = torch.tensor([-2.5])
    layer = None if site in ("embed", "final_norm", "logits") else 1
    inner, last, steps = WHEN[when]
    given = row, site, layer, mode, tuple(values.tolist()), row % units, 4.0
    found = [Act(*given, position=len(prompt) - 2)] if inner else []
    if last:
        found.append(Act(*given, position=len(prompt) - 1))
    if steps is not None:
        found.append(Act(*given, steps=steps))
    return found


@cache
def every_write(name: str) -> tuple[list[tuple[int, ...]], Rules, list[tuple[str, WriteMode, str]]]:
    """One row per write, over prompts of several lengths."""
    prompts: list[tuple[int, ...]] = []
    found: list[Act] = []
    says: list[tuple[str, WriteMode, str]] = []
    sites = [site for site in SITES if site != "resid_mid" or name != "gpt_neox"]
    for number, site in enumerate(sites):
        for other, when in enumerate(WHEN):
            mode = MODES[(number + other) % len(MODES)]
            prompt = PROMPTS[(number + 2 * other) % len(PROMPTS)]
            found += acts(name, len(prompts), site, mode, when, prompt)
            prompts.append(prompt)
            says.append((site, mode, when))
    return prompts, Rules(found), says


@cache
def expected_writes(name: str) -> list[tuple[list[int], Tensor]]:
    prompts, rules, _ = every_write(name)
    return by_hand(name, prompts, rules, TOKENS)


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        pytest.param(
            n, c, marks=() if n in (FAMILIES[:4] if c else ("llama",)) else pytest.mark.slow
        )
        for n in FAMILIES
        for c in (True, False)
    ],
)
def test_writes_during_generation_equal_a_loop_of_full_passes(name: str, cached: bool) -> None:
    prompts, rules, _ = every_write(name)
    found = written(model_of(name), prompts, greedy(TOKENS), rules, cached=cached)
    agree(found, expected_writes(name))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_low_rank_edits_during_generation_equal_a_loop_of_full_passes(
    name: str, cached: bool
) -> None:
    """Two edits at one site, in the prompt and in steps, of several rows."""
    random = torch.Generator().manual_seed(3)
    _, size = width(name, "resid_post")
    edits = [EditWrite(torch.randn(5, size, generator=random) / size**0.5) for _ in range(2)]
    found = [
        Act(row, "resid_post", 1, edits[(row + step) % 2], (1.5 + row,), steps=(step, step + 1))
        for row in range(3)
        for step in (1, 3)
    ]
    found += [Act(0, "mlp_out", 1, edits[0], (2.0,), position=len(PROMPTS[0]) - 1)]
    rules = Rules(found)
    expected = by_hand(name, PROMPTS, rules, TOKENS)
    agree(written(model_of(name), PROMPTS, greedy(TOKENS), rules, cached=cached), expected)
    plain = by_hand(name, PROMPTS, Rules(), TOKENS)
    for (_, logits), (_, others) in zip(expected, plain, strict=True):
        assert (logits - others).abs().max() > 100 * NEAR * others.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_write_during_generation_moves_the_logits(name: str) -> None:
    """Effects on the logits exceed the tolerance of `agree`."""
    prompts, _, says = every_write(name)
    plain = dict(zip(PROMPTS, by_hand(name, PROMPTS, Rules(), TOKENS), strict=True))
    away = [
        float((logits - plain[prompt][1]).abs().amax() / plain[prompt][1].abs().amax())
        for prompt, (_, logits), (site, _, when) in zip(
            prompts, expected_writes(name), says, strict=True
        )
        if site not in ("logits", "final_norm") or when != "a token of the prompt"
    ]
    assert sum(each > 10 * NEAR for each in away) > len(away) * 0.95, sorted(away)[:9]


@pytest.mark.parametrize("cached", [True, False])
def test_rules_at_one_site_act_in_the_given_order(cached: bool) -> None:
    """Each row has a different order."""
    name = "llama"
    words: dict[str, WriteMode] = {"s": "set", "a": "add", "c": "scale"}
    orders = ("sa", "as", "asa", "ca", "ac", "aca", "sc", "cs")
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(orders))]
    found: list[Act] = []
    for place in range(3):
        for row, order in enumerate(orders):
            if place < len(order):
                mode = words[order[place]]
                each = acts(name, row, "resid_post", mode, "each step", prompts[row])
                far = tuple(x * (place + 1) for x in each[0].values)
                found += [replace(act, values=far) for act in each]
    rules = Rules(found)
    mine = written(model_of(name), prompts, greedy(4), rules, cached=cached)
    agree(mine, by_hand(name, prompts, rules, 4))


KINDS: tuple[tuple[Kind, float], ...] = (
    ("block", 0.0),
    ("reweight", 5.0),
    ("uniform", 0.0),
    ("set", 0.1),
)
ALSO: tuple[Also, ...] = ("", "newest", "written")
LATER: tuple[Steps, ...] = ((1, None), (2, 3))


def looks() -> Iterator[tuple[str, list[Look], tuple[int, ...]]]:
    """Edits of attention, each for a separate row."""
    row = 0
    for kind, amount in KINDS:
        for also in ALSO:
            for steps in LATER:
                prompt = PROMPTS[row % len(PROMPTS)]
                keys = (len(prompt) - 2, len(prompt) - 1)
                look = Look(row, kind, 1, row % 4, keys, amount, also=also, steps=steps)
                yield f"{kind} {also}", [look], prompt
                row += 1
        prompt = PROMPTS[row % len(PROMPTS)]
        last = len(prompt) - 1
        look = Look(row, kind, 1, row % 4, (last - 1, last), amount, query=last)
        yield f"{kind} in the prefill", [look], prompt
        row += 1


@cache
def every_look(name: str) -> tuple[list[tuple[int, ...]], Rules, list[tuple[list[int], Tensor]]]:
    each = list(looks())
    prompts, rules = (
        [prompt for *_, prompt in each],
        Rules(looks=[x for _, y, _ in each for x in y]),
    )
    return prompts, rules, by_hand(name, prompts, rules, TOKENS)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss"])
def test_attention_edits_during_generation_equal_a_loop_of_full_passes(
    name: str, cached: bool
) -> None:
    """Includes models with sliding windows and attention sinks."""
    prompts, rules, expected = every_look(name)
    agree(written(model_of(name), prompts, greedy(TOKENS), rules, cached=cached), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_edits_during_generation_move_the_logits(name: str) -> None:
    prompts, _, expected = every_look(name)
    plain = dict(zip(PROMPTS, by_hand(name, PROMPTS, Rules(), TOKENS), strict=True))
    away = [
        float((logits - plain[prompt][1]).abs().amax() / plain[prompt][1].abs().amax())
        for prompt, (_, logits) in zip(prompts, expected, strict=True)
    ]
    # Some keys are outside of a sliding window.
    assert sum(each > 10 * NEAR for each in away) > len(away) * 0.7
