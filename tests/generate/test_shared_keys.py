"""Keys and values common to the rows of a prompt are stored once and attended to jointly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mechdsl.forward.generation.cached_pass import GenerationMethod, NewTokens, choose_method
from mechdsl.forward.generation.key_value_cache import (
    MIN_NEW_COLUMNS,
    KeyValueCache,
    SharedKeyValues,
    SingleQueryAttention,
    sum_weighted,
)
from mechdsl.forward.hooks.model import LoadedModel

from ..execute.support import shared
from ..rules.models import bare
from .support import Act, Look, Rules, agree, by_hand, greedy, written
from .test_rules_during_generation import FAMILIES, PROMPTS, model_of

ROWS: tuple[tuple[int, ...], ...] = (*[PROMPTS[0]] * 5, PROMPTS[1], *[PROMPTS[2]] * 3, PROMPTS[0])
TOKENS = 4


def rules_of(model: LoadedModel) -> Rules:
    """Different rules on every row: at the last and newest tokens, and on cached keys."""
    shape, random = model.shape, torch.Generator().manual_seed(1)

    def vector(size: int) -> tuple[float, ...]:
        return tuple((torch.randn(size, generator=random) * 3).tolist())

    acts = [
        Act(
            row,
            "z",
            row % 2,
            "set",
            vector(shape.blocks[0].d_head),
            row % 2,
            position=len(ROWS[row]) - 1,
        )
        for row in range(5)
    ]
    acts += [
        Act(5, "resid_post", 0, "add", vector(shape.d_model)),
        Act(6, "attn_out", 1, "add", vector(shape.d_model), steps=(2, None)),
        Act(7, "k_rot", 1, "set", vector(shape.blocks[0].d_head), 0, steps=(2, 2)),
        Act(8, "mlp_out", 0, "add", vector(shape.d_model), position=len(ROWS[8]) - 2),
    ]
    looks = [Look(3, "reweight", 1, 1, (0, 2), 5.0), Look(9, "block", 0, 0, (1, 3))]
    kept = [Act(9, "v", 1, "add", vector(shape.blocks[0].d_head), 0, position=2)]
    return Rules(acts, looks, kept)


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each product with shared keys."""
    found: list[int] = []
    before = SharedKeyValues.scores

    def scores(self: SharedKeyValues, layer: int, rows: slice, queries: Tensor) -> Tensor:
        found.append(len(queries))
        return before(self, layer, rows, queries)

    monkeypatch.setattr(SharedKeyValues, "scores", scores)
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_oss", "bloom"])
def test_rows_of_few_prompts_share_cached_keys(name: str, joint: list[int]) -> None:
    """Prompts have unequal numbers of rows in mixed order, each with separate rules."""
    model = model_of(name)
    rules = rules_of(model)
    assert choose_method(model, inside=True).shares
    joint.clear()
    found = written(model, ROWS, greedy(TOKENS), rules)
    assert len(joint) >= TOKENS - 1  # in each step, in the block without edge edits
    if name not in FAMILIES:  # the reference loop doesn't support it
        plain = written(model, ROWS, greedy(TOKENS), rules, cached=False)
        agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    else:
        agree(found, by_hand(name, ROWS, rules, TOKENS))


def test_shared_keys_survive_ended_rows_and_cache_growth(joint: list[int]) -> None:
    """Completions have several lengths, and the longest exceeds the initial cache size."""
    model = model_of("llama")
    rules = rules_of(model)
    rules = replace(rules, looks=[], kept=[])
    tokens = MIN_NEW_COLUMNS + 4
    whole = written(model, ROWS, greedy(tokens), rules, cached=False)
    every = written(model, ROWS, greedy(tokens), rules)
    agree(every, [(r.ids, x) for r, x in zip(whole.replies, whole.logits, strict=True)])
    ends = {reply.ids[6 * row] for row, reply in enumerate(whole.replies[:4])}
    how = greedy(tokens, ends=frozenset(ends))
    plain = written(model, ROWS, how, rules, cached=False)
    lengths = {len(reply.ids) for reply in plain.replies}
    assert len(lengths) > 2
    found = written(model, ROWS, how, rules)
    assert found.replies == plain.replies
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert joint[0] > joint[-1]


def test_different_prompts_share_no_keys(joint: list[int]) -> None:
    model = model_of("llama")
    rules = Rules([Act(0, "resid_post", 0, "add", (1.0,) * model.shape.d_model)])
    assert choose_method(model).shares
    joint.clear()
    agree(written(model, PROMPTS, greedy(2), rules), by_hand("llama", PROMPTS, rules, 2))
    assert not joint


def test_model_that_reads_its_cached_keys_shares_none(
    monkeypatch: pytest.MonkeyPatch, joint: list[int]
) -> None:
    """The model gets the keys, so rows share nothing."""
    odd = shared(copy.deepcopy(bare("llama")))
    monkeypatch.setattr(KeyValueCache, "handed", lambda *_: False)
    assert choose_method(odd) == GenerationMethod("cached", shares=False)
    rules = Rules(rules_of(odd).acts[:5])
    joint.clear()
    agree(written(odd, ROWS, greedy(2), rules), by_hand("llama", ROWS, rules, 2))
    assert not joint


def test_model_with_unsupported_attention_uses_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's attention runs on all keys."""
    model = shared(copy.deepcopy(bare("gemma2")))
    monkeypatch.setattr(SingleQueryAttention, "attend", lambda *_: None)
    assert choose_method(model) == GenerationMethod("cached")
    rules = Rules(rules_of(model).acts)
    agree(written(model, ROWS, greedy(2), rules), by_hand("gemma2", ROWS, rules, 2))


@pytest.mark.parametrize(
    "prompts",
    [
        (0, 0, 1, 1, 2, 2),  # prompts are in order of rows
        (0, 1, 2),
        (2, 0, 1, 2, 0, 1),
        (0, 0, 0, 0, 0, 2, 2, 1, 0),
        (1, 1),  # the rows of other prompts have ended
        (2, 2, 0),
        (*[0] * 9, *[1] * 8, 2),
    ],
)
def test_products_with_shared_keys_equal_separate_products(prompts: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 5, 4, generator=generator) for _ in range(2))
    more = torch.randn(3, 5, 5, 4, generator=generator)  # a layer with a different number of heads
    common = SharedKeyValues(3, [None, (keys, values), (more, more)], prompts)
    assert common.columns == 3
    count = len(prompts)
    for rows in (slice(0, count), slice(1, count), slice(0, count - 1), slice(0, 1)):
        own = list(prompts)[rows]
        queries = torch.randn(len(own), 2, 3, 4, generator=generator)
        weights = torch.randn(len(own), 2, 3, 3, generator=generator)
        scores = torch.einsum("nhsd,nhkd->nhsk", queries, keys[own][:, :, :3])
        found = torch.einsum("nhsk,nhkd->nhsd", weights, values[own][:, :, :3])
        torch.testing.assert_close(common.scores(1, rows, queries), scores)
        torch.testing.assert_close(common.values(1, rows, weights), found)
        assert torch.equal(common.of_rows(1, rows)[0], keys[own][:, :, :3])
        queries = torch.randn(len(own), 5, 1, 4, generator=generator)
        scores = torch.einsum("nhsd,nhkd->nhsk", queries, more[own][:, :, :3])
        torch.testing.assert_close(common.scores(2, rows, queries), scores)
    common.stand([1])
    alone = torch.ones(1, 2, 1, 4)
    expected = (alone * keys[1:2, :, :3]).sum(-1)[:, :, None]
    torch.testing.assert_close(common.scores(1, slice(0, 1), alone), expected)


def test_grouping_of_shared_rows_pads_at_most_twofold() -> None:
    """Even if prompts have very unequal numbers of rows."""
    counts = (1, 2, 3, 5, 9, 100)
    prompts = [number for number, count in enumerate(counts) for _ in range(count)]
    common = SharedKeyValues(1, [(torch.ones(6, 1, 1, 1), torch.ones(6, 1, 1, 1))], prompts)
    common.scores(0, slice(0, len(prompts)), torch.ones(len(prompts), 1, 1, 1))
    (places,) = common._places.values()  # pyright: ignore[reportPrivateUsage]
    assert sum(group.count * group.rows for group in places.groups) < 2 * len(prompts)


def test_additive_mask_cache_distinguishes_recycled_tensors() -> None:
    """A new mask isn't mistaken for a freed mask of the preceding layer."""
    one = SingleQueryAttention(KeyValueCache(1, 3, 8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        seen = torch.rand(3, 1, 1, 5, generator=generator) > 0.5
        expected = torch.full((3, 1, 1, 5), float("-inf"))
        expected[seen] = 0
        assert torch.equal(added(one, seen.clone()), expected)
        expected = torch.randn(3, 1, 1, 5, generator=generator)
        assert torch.equal(added(one, expected.clone()), expected)


def added(one: SingleQueryAttention, mask: Tensor) -> Tensor:
    found = one._added(mask)  # pyright: ignore[reportPrivateUsage]
    assert found is not None
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "bloom"])
def test_single_query_attention_omits_masks_for_equal_prompt_lengths(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions equal the reference; windows, position biases, eager attention and padding need
    masks. The reference has no BLOOM."""
    masks: list[bool] = []
    before = SingleQueryAttention._added  # pyright: ignore[reportPrivateUsage]

    def noted(self: SingleQueryAttention, mask: Tensor | None) -> Tensor | None:
        masks.append(mask is not None)
        return before(self, mask)

    monkeypatch.setattr(SingleQueryAttention, "_added", noted)
    model = model_of(name)
    vector = (2.0,) * model.shape.d_model
    some, other = PROMPTS[0], (1, 6, 6, 40, 12)
    rows = [some, other, some, some]
    acts = [Act(n, "resid_post", 0, "add", vector, steps=(1 + n % 2, None)) for n in (0, 1, 2)]
    choose_method(model)
    masks.clear()
    found = written(model, rows, greedy(TOKENS), Rules(acts))
    assert set(masks) == {name in ("gemma2", "mistral", "bloom")}
    if name != "bloom":
        agree(found, by_hand(name, rows, Rules(acts), TOKENS))
    masks.clear()
    written(model, [*rows, PROMPTS[1]], greedy(TOKENS), Rules(acts))
    assert set(masks) == {True}


def test_masks_are_freed_after_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of a pass aren't held in the next one."""
    found: list[int] = []
    before = SingleQueryAttention._added  # pyright: ignore[reportPrivateUsage]

    def counted(self: SingleQueryAttention, *given: Any) -> Tensor | None:
        made = before(self, *given)
        found.append(len(self._masks))  # pyright: ignore[reportPrivateUsage]
        return made

    monkeypatch.setattr(SingleQueryAttention, "_added", counted)
    model = model_of("llama")
    written(model, ROWS, greedy(TOKENS))
    assert found
    assert max(found) == 1


def test_keys_are_shared_only_in_passes_of_one_token(
    joint: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes over several tokens per row use the model's attention, on all keys."""
    seen: list[int] = []
    before = NewTokens.inputs

    def inputs(self: NewTokens, model: LoadedModel) -> Any:
        seen.append(self.count)
        return before(self, model)

    monkeypatch.setattr(NewTokens, "inputs", inputs)
    model = model_of("llama")
    assert choose_method(model).shares
    joint.clear()
    seen.clear()
    vector = (2.0,) * model.shape.d_model
    rules = Rules(
        [Act(row, "resid_post", 0, "add", vector, position=-2 + len(ROWS[row])) for row in (0, 6)]
    )
    agree(written(model, ROWS, greedy(3), rules), by_hand("llama", ROWS, rules, 3))
    assert seen == [7, 2, 1, 1]
    assert len(joint) == 2 * model.shape.n_layers


def test_bfloat16_model_shares_no_keys(joint: list[int]) -> None:
    """Sharing would round differently from the model's attention."""
    model = shared(copy.deepcopy(bare("llama")).to(torch.bfloat16))
    rules = Rules(rules_of(model).acts)
    assert choose_method(model).kind == "cached"
    found = written(model, ROWS, greedy(2), rules)
    assert not joint
    for row in (3, 8):
        alone = written(model, [ROWS[row]], greedy(2), rules.of([row]))
        assert found.replies[row] == alone.replies[0]


def test_cache_growth_keeps_keys_after_rows_have_ended() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = KeyValueCache(1, 5, 2, later=100)

    def put(rows: int, first: int, count: int) -> torch.Tensor:
        new = torch.randn(rows, 2, count, 4, generator=generator)
        kept.at(slice(0, rows), first, count)
        kept.layers[0].update(new, -new)
        return new

    before = put(5, 0, 2)
    newest = put(3, 2, MIN_NEW_COLUMNS)
    again = put(2, 2 + MIN_NEW_COLUMNS, 4)
    keys, values = kept.every(0)
    expected = torch.cat([before[:2], newest[:2], again], dim=2)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("keys", [0, 1, 3, 4, 5, 9, 16, 17])
def test_weighted_sum_of_few_or_many_keys_equals_the_matrix_product(
    keys: int, queries: int, dtype: torch.dtype
) -> None:
    drawn = torch.Generator().manual_seed(keys)
    weights = torch.rand(5, 2, queries, keys, generator=drawn, dtype=dtype)
    values = torch.randn(5, 2, 30, 24, generator=drawn, dtype=dtype)[:, :, :keys]
    expected = (weights[..., None] * values[:, :, None]).sum(dim=3)
    found = sum_weighted(weights, values)
    assert found.shape == (5, 2, queries, 24)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
