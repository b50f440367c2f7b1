"""Unpatched prompts that begin alike: their linear maps run once for equal tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.execute import unpatched_runs
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.forward.hooks.token_copies import find_copies
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.prompts import runs
from mechdsl.prompts.runs import share_beginnings
from mechdsl.results.assembly.collection import check_denominators

from ..execute.support import check_file
from ..images import prompts_of_images as vlm
from ..operations import OperationCounter
from ..quick import some
from .reference import Edit, at
from .support import experiment
from .test_families import NAMES, bare, difference, every_cell, folder, inputs_of, loaded, run_text

WORDS = ("w1", "w2 w1", "w3 w1 w2", "w2")
PAIRS = [(image, words) for image in (0, 1) for words in WORDS]
"""(number of the image, question): prompts of several lengths, four for each of two images."""
BLOCK = """
prompts ask {
  rows "questions.jsonl"
  image photo = "{file}"
  template "w3 w2 {photo} w1 {words} w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other }
}
"""
RULES = (
    "patch resid_post layer 1 at last token",
    "ablate resid_post layer 0 at photo tokens with zero",
)
EVERY = "".join(
    experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
)


@pytest.fixture(autouse=True)
def _always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    lines = [
        {"file": f"{image}.png", "other": f"{1 - image}.png", "words": words}
        for image, words in PAIRS
    ]
    (folder() / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@cache
def expected(name: str) -> list[list[float]]:
    """[run without rules, then each rule][prompt] by plain hooks, one prompt at a time."""
    own = bare(name)
    found: list[list[float]] = [[] for _ in range(1 + len(RULES))]
    for image, words in PAIRS:
        clean, base = (inputs_of(name, words, each) for each in (image, 1 - image))
        blocks = own.states(clean)["blocks"]
        last = at([-1], blocks[1][-1])
        zero = at(every_cell(name, 0, 1 - image), torch.zeros(()))
        values = own.run(base), own.run(base, blocks={1: last}), own.run(base, blocks={0: zero})
        for row, value in zip(found, values, strict=True):
            row.append(difference(value))
    return found


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl", "gemma3")))
def test_prompts_with_a_shared_image_equal_hooks(name: str, mode: str) -> None:
    experiments = run_text(name, EVERY, mode, BLOCK)
    base, *patched = expected(name)
    for found, values in zip(experiments, patched, strict=True):
        measure = found.measures[0]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched[0], values, atol=1e-4)
    assert np.abs(np.array(patched) - base).max(1).min() > 0.1


PATCHED = experiment("e", "from clean into changed", RULES[0])


def count(
    name: str, text: str = PATCHED, *, without: frozenset[str] = frozenset()
) -> tuple[int, float]:
    """(multiply-adds that the run counts, multiply-adds that the plan prints)."""
    block = BLOCK.replace(' w3"', ' w3 \\n"') if name.startswith("paligemma") else BLOCK
    plan = make_plan(check_file(text, folder(), loaded(name), block).experiments, without=without)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # encodes the images
    with OperationCounter() as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    return counter.get_total_flops() // 2, plan_cost(plan).planned.multiply_adds


@pytest.mark.parametrize("name", some(NAMES, ("llava_class",)))
def test_shared_images_save_the_planned_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaliGemma's tokens of an image see the question, so nothing is shared there. The plan counts
    each run separately, also if few prompts let two runs share a pass."""
    monkeypatch.setattr(unpatched_runs, "MAX_SHARED_TOKENS", 0)
    (counted, planned), (apart, more) = count(name), count(name, without=frozenset(["share"]))
    if name.startswith("paligemma"):
        assert (counted, planned) == (apart, more)
        return
    assert counted < 0.75 * apart
    assert 0.8 < (more - planned) / (apart - counted) < 1.25


def test_share_beginnings_ragged_prompts_returns_first_owner() -> None:
    prompts = [(5, 6, 7), (5, 6), (5, 6, 7, 8), (6, 6, 7), (5, 6, 7, 8)]
    found = share_beginnings(prompts, np.array([0, 0, 0, 0, 7]))
    assert found is not None
    assert found.tolist() == [
        [0, 0, 0, -1],
        [0, 0, -1, -1],
        [0, 0, 0, 2],
        [3, 3, 3, -1],
        [4, 4, 4, 4],
    ]


def test_share_beginnings_few_copies_returns_none(monkeypatch: pytest.MonkeyPatch) -> None:
    none = np.zeros(3, dtype=np.int64)
    assert share_beginnings([(1, 2), (2, 2), (3, 2)], none) is None
    assert share_beginnings([(1, 2), (1, 2), (3, 2)], none) is not None
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 3)
    assert share_beginnings([(1, 2), (1, 2), (3, 2)], none) is None


def test_find_copies_padded_and_empty_prompts_returns_computed_tokens() -> None:
    """Padding equals the first token, and an empty prompt only has padding."""
    prompts = [(5, 6, 7), (5, 6), (), (5, 6, 7, 8)]
    found = find_copies(loaded("llava_class"), prompts, torch.tensor([1, 2, 4, 0]), 4)
    assert found is not None
    assert found.computed.tolist() == [1, 2, 3, 11, 15]
    assert found.of.tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 3, 3, 3, 3, 0, 1, 2, 4]


def test_noise_at_shared_images_changes_each_prompt_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts with noise in activations don't share, and their clean runs do."""
    noise = "corrupt noised { add gaussian(std: 1, samples: 2) to embed at photo tokens }"
    block = BLOCK.replace("corrupt changed { file = other }", noise)
    text = experiment("e", "from clean into noised", RULES[0])
    [shared] = run_text("qwen2_5_vl", text, block=block)
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1 << 30)
    [apart] = run_text("qwen2_5_vl", text, block=block)
    for one, other in zip(shared.measures, apart.measures, strict=True):
        assert one.source is not None
        assert other.source is not None
        np.testing.assert_allclose(one.base, other.base, atol=1e-5)
        np.testing.assert_allclose(one.source, other.source, atol=1e-5)
        np.testing.assert_allclose(one.patched, other.patched, atol=1e-5)
        assert np.abs(one.base - one.source).min() > 1e-3


# --- generated text -------------------------------------------------------------------------------

WRITTEN = 'measure contains("w1") as raw'
REPLIES = "".join(
    experiment(f"r{n}", "generate 3", "from clean into changed", rule, measure=WRITTEN)
    for n, rule in enumerate(
        (
            "ablate resid_post layer 0 at words tokens with zero",
            "ablate resid_post layer 0 at photo tokens with zero",
        )
    )
)


@cache
def expected_replies(name: str) -> list[list[list[int]]]:
    """[run without rules, then each rule of `REPLIES`][prompt] by plain hooks."""
    own = bare(name)
    found: list[list[list[int]]] = [[], [], []]
    for image, words in PAIRS:
        base, zero = inputs_of(name, words, 1 - image), torch.zeros(())
        end = base["input_ids"].shape[1] - 1 - bool(vlm.FAMILIES[name].before_end)
        question = range(end - len(words.split()), end)
        places = question, every_cell(name, 0, 1 - image)
        edits: list[dict[int, Edit]] = [{}, *({0: at(each, zero)} for each in places)]
        for row, blocks in zip(found, edits, strict=True):
            row.append(own.reply(base, 3, blocks=blocks))
    return found


@pytest.mark.parametrize("mode", some(["planned", "plain"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl", "paligemma2")))
def test_replies_to_prompts_with_a_shared_image_equal_hooks(name: str, mode: str) -> None:
    experiments = run_text(name, REPLIES, mode, BLOCK)
    base, *patched = expected_replies(name)
    for found, replies in zip(experiments, patched, strict=True):
        assert found.replies is not None
        for due, own in ((base, found.replies.runs["changed"]), (replies, found.replies.cells[0])):
            assert [[list(each.ids) for each in own[n]] for n in range(len(PAIRS))] == [
                [ids] for ids in due
            ]
    assert base != patched[1]


@pytest.mark.parametrize("name", some(NAMES, ("llava_class",)))
def test_prefill_of_shared_images_saves_the_planned_products(name: str) -> None:
    text = experiment("e", "generate 3", "from clean into changed", RULES[0], measure=WRITTEN)
    (counted, planned), (apart, more) = (
        count(name, text, without=frozenset(without)) for without in ([], ["share"])
    )
    if name.startswith("paligemma"):  # tokens of its images see the question
        assert (counted, planned) == (apart, more)
        return
    assert counted < 0.7 * apart
    assert 0.5 < planned / counted < 2


# --- the vision encoder ---------------------------------------------------------------------------


@contextmanager
def counted_images(model: LoadedModel) -> Generator[Counter[bytes]]:
    """Count how often a model gets the pixels of each image. Each prompt with pixels has one."""
    found: Counter[bytes] = Counter()

    def look(module: object, args: object, kwargs: dict[str, Any]) -> None:
        keys = [key for key in kwargs if key.startswith("pixel_values")]
        if not keys:
            return
        prompts = len(kwargs["input_ids"])
        for own in kwargs[keys[0]].unflatten(0, (prompts, -1)):
            found[own.contiguous().numpy().tobytes()] += 1

    handle = model.module.register_forward_pre_hook(look, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("name", some(NAMES, ("llava_class", "qwen2_5_vl", "internvl")))
def test_each_image_passes_the_vision_encoder_once(name: str) -> None:
    """The first one passes again, in the check that images act by their vectors only."""
    model, problems = adopt_model("m", deepcopy(bare(name).model), bare(name).processor)
    assert model is not None, problems
    with counted_images(model) as found:
        run_text(name, EVERY + REPLIES, block=BLOCK, model=model)
    assert sorted(found.values()) == [1, 2]
