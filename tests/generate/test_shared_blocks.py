"""Rows with equal tokens share the computation of blocks before their first rule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.arrays import Ints
from mechdsl.forward.generation import cached_pass
from mechdsl.forward.generation import replies as cached
from mechdsl.forward.generation.cached_pass import choose_method
from mechdsl.forward.generation.rules import RowLineup, RowStates, SharedBlocks
from mechdsl.forward.hooks.batch import PositionIdWrite, RuleWrites
from mechdsl.forward.hooks.model import LoadedModel

from ..execute.support import shared
from ..models import families
from ..rules.models import bare
from .support import Act, Look, Rules, agree, by_hand, greedy, written
from .test_rules_during_generation import FAMILIES, PROMPTS, model_of

ROWS: tuple[tuple[int, ...], ...] = (*[PROMPTS[0]] * 9, *[PROMPTS[2]] * 5, PROMPTS[1])
TOKENS = 6


def rules_of(model: LoadedModel) -> Rules:
    """Weak rules on most rows, so that completions stay equal for a while; strong ones on some."""
    shape, random = model.shape, torch.Generator().manual_seed(3)
    top = shape.n_layers - 1

    def vector(size: int) -> tuple[float, ...]:
        return tuple((torch.randn(size, generator=random) * 3).tolist())

    acts = [
        Act(0, "z", top, "scale", (1.1,), 1),
        Act(1, "z", top, "scale", (0.9,), 0),
        Act(2, "mlp_out", top - 1, "scale", (1.05,)),
        Act(2, "resid_post", top, "add", vector(shape.d_model), steps=(4, None)),
        Act(3, "resid_post", 0, "scale", (1.05,)),
        Act(4, "embed", None, "scale", (1.05,)),
        Act(4, "resid_pre", 1, "add", vector(shape.d_model), steps=(3, None)),
        Act(5, "resid_mid", top, "scale", (1.05,), steps=(2, 3)),
        Act(5, "resid_post", top, "add", vector(shape.d_model), steps=(3, 3)),
        Act(6, "logits", None, "scale", (1.05,)),
        Act(9, "z", 1, "scale", (1.1,), position=len(PROMPTS[2]) - 1),
        Act(10, "resid_post", top, "add", vector(shape.d_model), steps=(2, None)),
        Act(11, "final_norm", None, "scale", (1.2,)),
        Act(14, "z", 1, "scale", (1.1,), 1),
    ]
    looks = [
        Look(7, "reweight", 1, 1, (0, 2), 1.3),
        Look(12, "block", top, 0, (1,), steps=(2, None)),
    ]
    kept = [Act(8, "v", 1, "scale", (1.2,), 0, position=2)]
    return Rules(acts, looks, kept)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """[pass] number of rows of each block's attention and of its rest, and of states, for passes
    that share blocks."""
    found: list[list[int]] = []

    class Counted(cached.CachedPass):
        def run(self) -> torch.Tensor:
            if (lineup := self.lineup) is not None and lineup.shares:
                each = [
                    rows(block)
                    for block in range(self.model.shape.n_layers)
                    for rows in (lineup.attending, lineup.rows)
                ]
                found.append([*each, len(lineup)])
            return super().run()

    def run(*arguments: Any) -> torch.Tensor:
        with closing(Counted(*arguments)) as only:
            return only.run()

    monkeypatch.setattr(cached, "CachedPass", Counted)
    monkeypatch.setattr(cached, "run_cached_pass", run)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_equal_completions_share_blocks(name: str, rows: list[list[int]]) -> None:
    model = model_of(name)
    rules = rules_of(model)
    if name == "gpt_neox":  # its sublayers are parallel
        rules = Rules([a for a in rules.acts if a.site != "resid_mid"], rules.looks, rules.kept)
    found = written(model, ROWS, greedy(TOKENS), rules)
    agree(found, by_hand(name, ROWS, rules, TOKENS))
    different = {reply.ids for reply in found.replies[:9]}
    assert len(different) > 1 or name == "gemma2"  # repeats one token
    assert rows[0][0] <= len(ROWS) - 5
    assert any(each[n] < each[n + 1] for each in rows for n in range(0, len(each) - 1, 2))
    assert len({tuple(each) for each in rows}) > 1


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 4])
def test_prefill_shares_blocks_of_rows_with_equal_tokens(
    name: str, shares: bool, count: int, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules act on the last tokens of each prompt, some of them in another pass. A row without
    rules shares its first blocks with the others."""
    model = model_of(name)
    way = replace(choose_method(model), shares=shares)
    monkeypatch.setattr(cached, "choose_method", lambda *_, **__: way)
    top = model.shape.n_layers - 1
    sites = ["z", "mlp_out", "attn_out", "q", "mlp_hidden", "v", "k", "resid_post"]
    acts = [
        Act(row, sites[row % 8], (top, 0, 1)[row % 3], "scale", (1.3,), 0, position=place)
        for row, prompt in enumerate(ROWS)
        if row != 4
        for place in (*range(max(0, len(prompt) - count), len(prompt)), None)
    ]
    rules = Rules(acts)
    found = written(model, ROWS, greedy(3), rules, limit=2 * len(ROWS))
    agree(found, by_hand(name, ROWS, rules, 3))
    assert len(rows) == 3
    assert rows[0][0] < rows[0][1] < len(ROWS) == rows[0][-1]


@pytest.mark.slow
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_without_last_tokens_stops_at_the_keys_of_the_last_block(
    name: str, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every site of the last block is written; writes inside attention need the full block."""
    monkeypatch.setattr(cached, "MAX_RECOMPUTED_TOKENS", 0)
    model = model_of(name)
    assert choose_method(model, inside=within).places is not None
    top = model.shape.n_layers - 1
    sites = ["q", "k", "v", "z", "attn_out", "mlp_hidden", "mlp_out", "resid_pre", "resid_post"]
    sites += ["pattern", "k_rot"] * within
    prompts = [PROMPTS[0]] * (2 * len(sites))
    acts = [
        Act(row, sites[row // 2] if layer else "resid_post", layer, "scale", (1.3,), 0, position=at)
        for row, prompt in enumerate(prompts)
        for layer in (0, top)
        for at in (*range(1, len(prompt)), None)
    ]
    rules = Rules(acts)
    tokens: list[int] = []
    block = model.module.get_submodule(model.anatomy.blocks[top].path)
    handle = block.register_forward_hook(lambda _, __, given: tokens.append(shape_of(given)[1]))
    try:
        found = written(model, prompts, greedy(3), rules)
    finally:
        handle.remove()
    agree(found, by_hand(name, prompts, rules, 3))
    others = len(PROMPTS[0]) - 2
    assert tokens == ([others] if within else []) + [1, 1, 1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("limit", [1, 10_000])
def test_prefill_column_with_only_padding_gives_no_nan(name: str, limit: int) -> None:
    """Rules act from the second token of the longest prompt on. Shorter prompts have only padding
    in the first column, which is a pass of one token, as all columns are with a small limit."""
    model = model_of(name)
    longest, shorter = PROMPTS[0], PROMPTS[0][2:]
    prompts = [shorter] * 4 + [longest] * 4
    acts = [
        Act(row, "resid_post", row % model.shape.n_layers, "scale", (1.3,), position=at)
        for row, prompt in enumerate(prompts)
        for at in (*range(int(prompt == longest), len(prompt)), None)
    ]
    rules = Rules(acts)
    found = written(model, prompts, greedy(3), rules, limit=limit)
    agree(found, by_hand(name, prompts, rules, 3))


def shape_of(given: Any) -> torch.Size:
    """Shape of the hidden states that a block returns."""
    return (given[0] if isinstance(given, tuple) else given).shape


@pytest.mark.parametrize("name", families.EACH)
def test_shared_blocks_of_every_family_equal_full_passes(name: str, rows: list[list[int]]) -> None:
    model = shared(families.module(name))
    places = [choose_method(model, inside=inside).places for inside in (False, True)]
    # BLOOM's attention adds the block's input.
    assert all(each is not None and bool(each.attention) == (name != "bloom") for each in places)
    top = model.shape.n_layers - 1
    acts = [Act(row, "resid_pre", top, "scale", (1.0 + row / 20,)) for row in range(1, 5)]
    acts += [Act(5, "resid_pre", top - 1, "scale", (1.1,)), Act(0, "z", top, "scale", (1.3,), 0)]
    rules = Rules(acts, [Look(6, "reweight", top, 0, (0, 2), 1.2)])
    prompts = [PROMPTS[0]] * 8  # no rule acts on the last
    plain = written(model, prompts, greedy(3), rules, cached=False)
    found = written(model, prompts, greedy(3), rules)
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert min(each[0] for each in rows) < 7


def test_shared_blocks_survive_the_end_of_the_leading_row(rows: list[list[int]]) -> None:
    """The row that others share with ends before them."""
    model = model_of("llama")
    rules = rules_of(model)
    plain = written(model, ROWS, greedy(12), rules, cached=False)
    ends = frozenset({plain.replies[6].ids[4], plain.replies[2].ids[-2]})
    how = greedy(12, ends=ends)
    plain = written(model, ROWS, how, rules, cached=False)
    assert len({len(reply.ids) for reply in plain.replies}) > 2
    found = written(model, ROWS, how, rules)
    assert found.replies == plain.replies
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert rows


def test_rows_with_other_position_ids_share_no_blocks(rows: list[list[int]]) -> None:
    """Such a row is computed separately from the first block on, even with equal tokens."""
    numbers = PositionIdWrite(*torch.tensor(((1, 2, 3), (1, 3, 2), (3, 1, 2))).t())
    acts = [Act(2, "z", 2, "scale", (1.02,)), Act(4, "z", 1, "scale", (1.02,))]
    given = Rules(acts).given()
    settings: dict[str, Any] = {**given, "prefill": RuleWrites(numbers=[numbers])}
    model, prompts = model_of("llama"), [PROMPTS[2]] * 5
    plain = written(model, prompts, greedy(4), cached=False, **settings)
    found = written(model, prompts, greedy(4), **settings)
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert plain.replies[1].ids[:2] == plain.replies[0].ids[:2]
    assert (plain.logits[1] - plain.logits[0]).abs().amax() > 0.01
    assert rows[0][0] == 3


def test_row_with_another_position_id_at_the_last_token_is_separate(rows: list[list[int]]) -> None:
    """Its last prompt token can't be computed like a step."""
    numbers = PositionIdWrite(*torch.tensor(((1, 4, 2), (2, 4, 3))).t())
    settings: dict[str, Any] = {"prefill": RuleWrites(numbers=[numbers])}
    model, prompts = model_of("llama"), [PROMPTS[0]] * 4
    plain = written(model, prompts, greedy(3), cached=False, **settings)
    found = written(model, prompts, greedy(3), **settings)
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert (plain.logits[1] - plain.logits[2]).abs().amax() > 0.01


def test_model_that_fails_the_sharing_check_shares_no_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]
) -> None:
    """Each row is then computed in all blocks."""
    before = cached_pass.limit_to_first_rows

    def wrong(model: LoadedModel, lineup: RowLineup, *rest: Any) -> Any:
        return before(model, replace(lineup, like=np.minimum(lineup.like, 0)), *rest)

    model = shared(copy.deepcopy(bare("llama")))
    with monkeypatch.context() as patch:
        patch.setattr(cached_pass, "limit_to_first_rows", wrong)
        ways = [choose_method(model, inside=inside) for inside in (False, True)]
    assert [way.kind for way in ways] == ["cached"] * 2
    assert [way.places for way in ways] == [None] * 2
    rules = rules_of(model)
    plain = written(model, ROWS, greedy(3), rules, cached=False)
    found = written(model, ROWS, greedy(3), rules)
    agree(found, [(r.ids, x) for r, x in zip(plain.replies, plain.logits, strict=True)])
    assert not rows


def alone(rows: Sequence[int] | Ints, parents: Sequence[int] | Ints) -> RowStates:
    """Row states with one row each."""
    return RowStates(np.array(rows), np.arange(len(rows)), np.array(parents))


LAYERS = 4
Content = tuple[Any, ...]


@pytest.mark.parametrize("seed", range(120))
def test_cached_keys_are_moved_to_where_rows_read_them(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each block, a row reads the keys of its tokens under its rules, also if the arrangement
    is unmodified and the shortcut for that case applies."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 14))
    texts = random.integers(0, 2, count)
    lowest = random.integers(0, 2 * LAYERS + 1, count)
    acting = random.choice([0, 0, 1, 3, 9], count)
    often = [(0.85, 0.15), (0.97, 0.03)][seed % 2]
    blocks, slow = (SharedBlocks(texts, acting, lowest, LAYERS) for _ in range(2))
    monkeypatch.setattr(slow, "_stands", lambda *_: False)
    own = [(int(row),) for row in range(count)]

    def content(row: int, block: int, step: int, reply: Sequence[int]) -> Content:
        """The data that a block's keys depend on."""
        acted = acting[row] <= step and lowest[row] <= 2 * block
        return int(texts[row]), tuple(reply[:step]), own[row] if acted else ()

    states = alone(range(count), range(count))
    blocks.begin(states)
    slow.begin(states)
    replies: list[list[int]] = [[] for _ in range(count)]
    keys: list[dict[int, list[Content]]] = [
        {place: [content(row, block, 0, [])] for place, row in enumerate(states.leaders)}
        for block in range(LAYERS)
    ]
    for step in range(1, 12):
        for reply in replies:
            reply.append(int(random.choice([0, 1], p=often)))
        going = [n for n, row in enumerate(states.leaders) if random.random() < 0.95]
        if not going:
            break
        states = alone(states.leaders[going], going)
        newest = np.array([replies[row][-1] for row in states.leaders])
        again = slow.arrange(states, newest, step)
        states = blocks.arrange(states, newest, step)
        lineup = blocks.lineup
        assert again.leaders.tolist() == states.leaders.tolist()
        assert slow.lineup.begins.tolist() == lineup.begins.tolist()
        assert slow.lineup.like.tolist() == lineup.like.tolist()
        assert sorted(lineup.begins) == list(lineup.begins)
        for block in range(LAYERS):
            of, to = blocks.moves[block]
            was = dict(keys[block])
            for a, b in zip(of.tolist(), to.tolist(), strict=True):
                keys[block][b] = was[a]
            for place, row in enumerate(states.leaders[: lineup.attending(block)]):
                keys[block][place] = [
                    *keys[block][place],
                    content(row, block, step, replies[row]),
                ]
            for state, row in enumerate(states.leaders):
                place = int(lineup.place(np.array([state]), block)[0])
                assert place < lineup.attending(block)
                assert keys[block][place] == [
                    content(row, block, each, replies[row]) for each in range(step + 1)
                ]


def test_arranging_rows_moves_few_keys() -> None:
    """Only rows that fill a gap or need more blocks are moved."""
    blocks = SharedBlocks(np.zeros(6, int), np.zeros(6, int), np.array([0, 6, 6, 4, 4, 4]), 4)
    blocks.begin(alone(range(6), range(6)))
    states = blocks.arrange(alone(range(6), range(6)), np.full(6, 7), 1)
    assert blocks.lineup.begins.tolist() == [0, 0, 4, 4, 4, 6]
    assert blocks.lineup.like.tolist() == [0, 1, 1, 1, 1, 1]
    assert states.leaders.tolist() == [0, 1, 5, 3, 4, 2]
    again = blocks.arrange(alone(states.rows, range(6)), np.full(6, 7), 2)
    assert again.leaders.tolist() == states.leaders.tolist()
    assert all(len(of) == 0 for of, _ in blocks.moves)
    last = blocks.arrange(alone(states.rows, range(6)), np.array([7, 7, 7, 7, 8, 7]), 3)
    assert blocks.lineup.begins.tolist() == [0, 0, 0, 4, 4, 6]
    assert last.leaders.tolist() == [0, 1, 4, 3, 5, 2]
    assert [len(of) for of, _ in blocks.moves] == [1, 1, 2, 2]


def test_row_that_diverges_while_another_ends_moves_its_keys() -> None:
    """The number of states stays the same, but the states differ."""
    blocks = SharedBlocks(np.arange(3), np.full(3, 9), np.zeros(3, int), 2)
    blocks.begin(alone(range(3), range(3)))
    blocks.arrange(alone(range(3), range(3)), np.array([5, 5, 5]), 1)
    blocks.arrange(alone([0, 1, 2], [0, 0, 2]), np.array([6, 7, 5]), 2)
    of, to = blocks.moves[0]
    assert list(zip(of.tolist(), to.tolist(), strict=True)) == [(0, 1)]


HEADER = (1, 5, 9, 20)
"""Common beginning of the prompts."""


@pytest.mark.parametrize("limit", [4096, 20])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_of_a_common_beginning_runs_once_per_set_of_rules(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rules at all tokens of four prompts; the last row has a different vector at a token."""
    monkeypatch.setattr(cached, "MAX_RECOMPUTED_TOKENS", 0)
    computed: list[tuple[int, int]] = []
    before = cached.CachedPasses._prefill_headers

    def headers(self: cached.CachedPasses, rows: Ints, acting: RuleWrites) -> int:
        computed.append((len(rows), before(self, rows, acting)))
        return computed[-1][1]

    monkeypatch.setattr(cached.CachedPasses, "_prefill_headers", headers)
    model, random = model_of(name), torch.Generator().manual_seed(5)
    vectors = (torch.randn(5, model.shape.d_model, generator=random) * 3).tolist()
    prompts = [(*HEADER, *end) for end in ((7,), (8,), (30, 31), (32, 33)) for _ in range(4)]
    acts = [
        Act(row, "resid_post", row % 2, "add", tuple(vectors[own]), position=at)
        for row, prompt in enumerate(prompts)
        for at in (*range(len(prompt)), None)
        for own in (4 if row == len(prompts) - 1 and at == 1 else row % 4,)
    ]
    rules = Rules(acts)
    agree(written(model, prompts, greedy(3), rules, limit=limit), by_hand(name, prompts, rules, 3))
    # Four rules for each of two prompt lengths, and the last row.
    assert computed == [(9, 0), (16, 4)]
