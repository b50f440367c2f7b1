"""Edits of cached keys and values, and blocks replaced in some steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mechdsl.forward.generation.replies import ReplyRequest, generate_replies
from mechdsl.forward.generation.rules import GenerationRules, StepRules
from mechdsl.forward.hooks.batch import BlockPairs, RuleWrites, SiteWrite

from ..rules.models import double
from ..rules.test_blocks import LISTS
from .support import NEAR, Act, Look, Rules, agree, by_hand, greedy, written
from .test_rules_during_generation import FAMILIES, MODES, PROMPTS, TOKENS, acts, model_of, width

Pairs = Mapping[int, int | None]


@cache
def edits(name: str) -> tuple[list[tuple[int, ...]], Rules]:
    """One row per edit; every second row also has writes in the prefill and in steps."""
    prompts: list[tuple[int, ...]] = []
    kept: list[Act] = []
    beside: list[Act] = []
    looks: list[Look] = []
    for number, (site, mode) in enumerate(product(("k", "v"), MODES)):
        prompt = PROMPTS[number % len(PROMPTS)]
        row = len(prompts)
        (act,) = acts(name, row, site, mode, "the prefill", prompt)
        heads, _ = width(name, site)
        for layer in (0, 1, 2) if number % 3 else (1,):
            for position in range(len(prompt) - 2, len(prompt)):
                unit = (row + layer) % heads
                kept.append(
                    Act(row, site, layer, mode, act.values, unit, act.to, position=position)
                )
        if number % 2:
            beside += acts(name, row, "resid_post", "add", "each step", prompt)
            beside += acts(name, row, site, "add", "the prefill", prompt)
            last = len(prompt) - 1
            looks.append(Look(row, "set", 0, 1, (last - 1,), 0.9, query=last))
        prompts.append(prompt)
    return [*prompts, *PROMPTS], Rules(beside, looks, kept)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_edits_of_cached_keys_and_values_equal_a_loop_of_full_passes(
    name: str, cached: bool
) -> None:
    prompts, rules = edits(name)
    found = written(model_of(name), prompts, greedy(TOKENS), rules, cached=cached)
    agree(found, by_hand(name, prompts, rules, TOKENS))
    for row, prompt in enumerate(prompts[: -len(PROMPTS)]):
        plain = found.logits[len(prompts) - len(PROMPTS) + PROMPTS.index(prompt)]
        away = (found.logits[row] - plain).abs().amax(1) / plain.abs().amax()
        assert away[1:].amax() > 10 * NEAR
        if row % 2 == 0:  # the prefill doesn't see them
            assert away[0] < NEAR


def exchanged(name: str, pairs: Pairs) -> Any:
    """The model with some blocks replaced or omitted."""
    model = copy.deepcopy(double(name))
    blocks = model.get_submodule(LISTS.get(name, "model.layers"))
    before = list(blocks)
    for to, of in pairs.items():
        if of is None:
            blocks[to].register_forward_hook(_handed_on, with_kwargs=True)
            continue
        blocks[to] = copy.deepcopy(before[of])
        for part in blocks[to].modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = to
    return model


def _handed_on(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@torch.no_grad()
def in_main_stack(blocks: Pairs) -> BlockPairs:
    return tuple((("", to), of) for to, of in blocks.items())


def by_blocks(
    name: str, prompt: tuple[int, ...], first: Pairs, later: Pairs, since: int
) -> tuple[list[int], Tensor]:
    """Generate with the library's cache and replaced blocks."""
    models = exchanged(name, first), exchanged(name, later)
    ids, cache, found = torch.tensor([list(prompt)]), None, list[Tensor]()
    for step in range(TOKENS):
        output = models[step >= since](input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0, -1])
        ids = found[-1].argmax().reshape(1, 1)
    return [int(each.argmax()) for each in found], torch.stack(found)


CASES: tuple[tuple[Pairs, Pairs, int], ...] = (
    ({1: 2}, {1: 2}, 1),
    ({1: 0}, {}, 1),
    ({}, {2: 0}, 1),
    ({}, {1: None}, 2),
    ({2: None}, {2: None}, 1),
    ({0: 1}, {1: 0, 0: 1}, 3),
)
"""Replaced blocks before a step, replaced blocks from it on, and the step."""


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_blocks_replaced_during_generation_equal_a_modified_model(
    name: str, case: tuple[Pairs, Pairs, int], cached: bool
) -> None:
    first, later, since = case
    steps = [StepRules(since, blocks=in_main_stack(later))]
    if since > 1:
        steps.append(StepRules(1, since - 1, blocks=in_main_stack(first)))
    found = written(
        model_of(name),
        PROMPTS,
        greedy(TOKENS),
        prefill=RuleWrites(blocks=in_main_stack(first)),
        later=GenerationRules(steps=tuple(steps)),
        cached=cached,
    )
    agree(found, [by_blocks(name, prompt, first, later, since) for prompt in PROMPTS])


def test_block_omitted_in_the_prefill_cannot_attend_in_steps() -> None:
    prefill = RuleWrites(blocks=((("", 1), None),))
    with pytest.raises(ValueError, match="block 1 was omitted earlier but attends in step 1"):
        generate_replies(model_of("gpt2"), ReplyRequest(PROMPTS, prefill), greedy(2))
    # One token needs only the prefill.
    assert generate_replies(model_of("gpt2"), ReplyRequest(PROMPTS, prefill), greedy(1))


@pytest.mark.parametrize("edited", [False, True])
def test_step_writes_use_the_previous_token_as_its_pass_computed_it(edited: bool) -> None:
    """Two rules that add steps, one after the other, and an edit of the keys of the prompt."""
    model, prompt, first, second, by = model_of("llama"), PROMPTS[2], 4.0, -2.0, 6.0
    heads = torch.arange(model.shape.blocks[0].heads)

    def step(factor: float, rule: int, positions: range) -> SiteWrite:
        places = torch.tensor(positions).repeat_interleave(len(heads))
        rows, units = torch.zeros_like(places), heads.repeat(len(positions))
        factors = torch.full((len(places), 1), factor)
        return SiteWrite("q", 2, rows, places, units, factors, "step", rule=rule)

    def steps(positions: range) -> list[SiteWrite]:
        return [step(first, 0, positions), step(second, 1, positions)]

    row, at, unit = (torch.tensor([n]) for n in (0, 2, 1))
    edit = SiteWrite("k", 1, row, at, unit, torch.tensor([[by]]), "scale", rule=2)
    found = written(
        model,
        [prompt],
        greedy(TOKENS),
        prefill=RuleWrites(steps(range(len(prompt)))),
        later=GenerationRules(
            (edit,) if edited else (),
            tuple(StepRules(1, writes=[write]) for write in steps(range(1))),
        ),
    )

    last: dict[float, Tensor] = {}

    def add_steps(module: nn.Module, given: Any, q: Tensor) -> Tensor:
        for factor in (first, second):
            before = torch.cat([last.get(factor, q[:, :1]), q[:, :-1]], dim=1)
            last[factor], q = q[:, -1:], q + factor * (q - before)
        return q

    net, cache, ids = model.module, DynamicCache(), torch.tensor([prompt])
    handle = net.model.layers[2].self_attn.q_proj.register_forward_hook(add_steps)
    logits: list[Tensor] = []
    with torch.no_grad():
        for number in range(TOKENS):
            logits.append(net(ids, past_key_values=cache, use_cache=True).logits[0, -1].double())
            ids = logits[-1].argmax().reshape(1, 1)
            if number == 0 and edited:
                cache.layers[1].keys[:, 1, 2] *= by
    handle.remove()
    replies = [int(each.argmax()) for each in logits]
    agree(found, [(replies, torch.stack(logits))])
