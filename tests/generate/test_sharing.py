"""Shared computation and ended rows, neither of which affects a completion."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.forward.generation import replies as module
from mechdsl.forward.generation.cached_pass import NewTokens
from mechdsl.forward.generation.decoding import Decoding
from mechdsl.forward.generation.rules import RowSharing, RowStates

from .support import Act, Rules, Written, agree, greedy, written
from .test_edited_cache import edits
from .test_generation_methods import mixed
from .test_rules_during_generation import PROMPTS, TOKENS, acts, every_look, every_write, model_of

NAME = "llama"


@dataclass
class Passes:
    """Rows and tokens of each pass."""

    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    found = Passes()
    for name in ("run_cached_pass", "store_keys"):
        before = getattr(module, name)

        def counted(model: Any, tokens: NewTokens, *rest: Any, run: Any = before) -> Any:
            found.sizes.append((len(tokens), tokens.count))
            return run(model, tokens, *rest)

        monkeypatch.setattr(module, name, counted)

    class Counted(module.CachedPass):
        def run(self) -> torch.Tensor:
            found.sizes.append((len(self.tokens), self.tokens.count))
            return super().run()

    monkeypatch.setattr(module, "CachedPass", Counted)
    return found


def as_expected(found: Written) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    return [(r.ids, x) for r, x in zip(found.replies, found.logits, strict=True)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("what", [every_write, every_look, edits])
def test_row_alone_gives_the_completion_of_the_batch(name: str, what: Any) -> None:
    prompts, rules, *_ = what(name)
    model = model_of(name)
    together = written(model, prompts, greedy(TOKENS), rules)
    for row in range(0, len(prompts), 3):
        alone = written(model, [prompts[row]], greedy(TOKENS), rules.of([row]))
        agree(alone, as_expected(together)[row : row + 1])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 9, 40])
@pytest.mark.parametrize("cached", [True, False])
def test_completions_do_not_depend_on_the_pass_limit(
    limit: int, cached: bool, passes: Passes
) -> None:
    prompts, rules, *_ = every_write(NAME)
    some = list(range(0, len(prompts), 4))
    prompts, rules = [prompts[row] for row in some], rules.of(some)
    whole = written(model_of(NAME), prompts, greedy(TOKENS), rules)
    passes.sizes.clear()
    small = written(model_of(NAME), prompts, greedy(TOKENS), rules, limit=limit, cached=cached)
    agree(small, as_expected(whole))
    longest = max(map(len, prompts))
    assert all(rows * tokens <= max(limit, longest) for rows, tokens in passes.sizes)


@pytest.mark.slow
def test_generation_halves_its_batch_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, rules, *_ = every_write(NAME)
    whole = written(model_of(NAME), prompts, greedy(TOKENS), rules)
    tried: list[int] = []

    class Small(module.CachedPasses):
        def __init__(self, model: Any, request: Any, *rest: Any, **way: Any) -> None:
            tried.append(len(request.prompts))
            if len(request.prompts) > 20:
                raise torch.OutOfMemoryError
            super().__init__(model, request, *rest, **way)

    monkeypatch.setattr(module, "CachedPasses", Small)
    agree(written(model_of(NAME), prompts, greedy(TOKENS), rules), as_expected(whole))
    assert tried[:2] == [len(prompts), len(prompts) // 2]

    class Full(module.CachedPasses):
        def __init__(self, *_: Any, **way: Any) -> None:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "CachedPasses", Full)
    with pytest.raises(torch.OutOfMemoryError):
        written(model_of(NAME), prompts, greedy(TOKENS), rules)


def test_batch_size_respects_the_memory_limit(passes: Passes) -> None:
    prompts = [PROMPTS[0]] * 8
    rules = Rules([Act(row, "z", 1, "scale", (float(row),), 1) for row in range(8)])
    shape = model_of(NAME).shape
    each = (
        4
        * 2
        * shape.n_layers
        * shape.blocks[0].kv_heads
        * shape.blocks[0].d_head
        * (len(PROMPTS[0]) + 3)
    )
    room = each + 3 * 4 * shape.vocab_size
    written(model_of(NAME), prompts, greedy(3), rules, memory=3 * room)
    assert max(rows for rows, _ in passes.sizes) == 3


def test_common_prompt_tokens_are_computed_once(passes: Passes) -> None:
    """Rows with a write at the last token compute only that token."""
    prompts = [prompt for prompt in PROMPTS for _ in range(40)]
    rules = Rules(
        [
            Act(row, "z", 1, "scale", (row / 7,), 1, position=len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            if row % 40
        ]
    )
    written(model_of(NAME), prompts, greedy(1), rules)
    assert passes.sizes == [(3, 6), (120, 1)]
    passes.sizes.clear()
    # Without an unpatched row.
    some = [row for row in range(120) if row % 40]
    written(model_of(NAME), [prompts[row] for row in some], greedy(1), rules.of(some))
    assert passes.sizes == [(3, 6), (117, 1)]


def test_prompt_shorter_than_the_common_part_equals_full_passes() -> None:
    """Rules act on the first token of a short prompt and on the last of a long one."""
    prompts = [PROMPTS[2], PROMPTS[1]]
    rules = Rules(
        [
            Act(0, "resid_post", 0, "scale", (3.0,), position=6),
            Act(1, "resid_post", 0, "scale", (3.0,), position=0),
        ]
    )
    found = written(model_of(NAME), prompts, greedy(TOKENS), rules)
    whole = written(model_of(NAME), prompts, greedy(TOKENS), rules, cached=False)
    agree(found, as_expected(whole))


def test_equal_rows_are_computed_once_until_a_rule_separates_them(passes: Passes) -> None:
    """They are shared until a rule acts on one of them."""
    prompts = [PROMPTS[0]] * 6
    rules = Rules(
        [
            *acts(NAME, 4, "resid_post", "add", "from 2 to 3", PROMPTS[0]),
            *acts(NAME, 5, "resid_post", "add", "from 2 to 3", PROMPTS[0]),
        ]
    )
    apart = written(model_of(NAME), prompts, greedy(5), rules)
    assert passes.sizes == [(1, 5), (1, 1), (3, 1), (3, 1), (3, 1)]
    passes.sizes.clear()
    # Two rows with equal rules.
    same = Rules([act for act in rules.acts if act.row == 4])
    same = Rules([*same.acts, *(replace(act, row=5) for act in same.acts)])
    groups = np.array([0, 1, 2, 3, 4, 4])
    together = written(model_of(NAME), prompts, greedy(5), same, groups=groups)
    assert passes.sizes == [(1, 5), (1, 1), (2, 1), (2, 1), (2, 1)]
    assert together.replies[4] == together.replies[5] == apart.replies[4]
    assert together.replies[0] != together.replies[4]


def test_row_groups_do_not_depend_on_the_batch_order() -> None:
    """Short prompts are generated first."""
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    prompts = sorted(prompts, key=len, reverse=True)
    place = len(prompts[3]) - 1
    rules = Rules(
        [
            Act(2, "resid_post", 0, "scale", (3.0,), position=place),
            Act(3, "resid_post", 0, "scale", (-3.0,), position=place),
        ]
    )
    apart = written(model_of(NAME), prompts, greedy(3), rules)
    groups = np.array([0, 0, 1, 2])
    agree(written(model_of(NAME), prompts, greedy(3), rules, groups=groups), as_expected(apart))
    assert (apart.logits[2] - apart.logits[3]).abs().amax() > 0.1


def test_samples_share_their_common_tokens(passes: Passes) -> None:
    prompts = [PROMPTS[0]] * 30
    decoding = greedy(4, temperature=1.0)
    found = written(model_of(NAME), prompts, decoding, groups=np.zeros(30, dtype=np.int64))
    begun = [{r.ids[:n] for r in found.replies} for n in range(4)]
    assert passes.sizes == [(1, 5), *((len(each), 1) for each in begun[1:])]
    assert 1 < len(begun[1]) < 30


def test_ended_rows_are_removed_from_the_batch(passes: Passes) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    rules = Rules(
        [
            Act(row, "resid_post", 1, "add", act.values, steps=(1, None))
            for row, prompt in enumerate(prompts)
            for act in acts(NAME, row, "resid_post", "add", "step 1", prompt)
        ]
    )
    free = written(model_of(NAME), prompts, greedy(TOKENS), rules)
    begun = {reply.ids[0] for reply in free.replies}
    wanted = {reply.ids[1 + row % 4] for row, reply in enumerate(free.replies) if row % 2}
    ends = frozenset(wanted - begun)
    passes.sizes.clear()
    found = written(model_of(NAME), prompts, greedy(TOKENS, ends=ends), rules)
    lengths: list[int] = []
    for before, after in zip(free.replies, found.replies, strict=True):
        end = next((n for n, token in enumerate(before.ids) if token in ends), None)
        assert after.ids == before.ids[:end]
        assert after.ended == ("length" if end is None else "end")
        lengths.append(len(after.ids) + (end is not None))
    steps = [rows for rows, tokens in passes.sizes if tokens == 1][-(max(lengths) - 1) :]
    assert steps == [sum(n > step for n in lengths) for step in range(1, max(lengths))]
    assert len(set(steps)) > 2
    logits = [free.logits[row][:n] for row, n in enumerate(lengths)]
    agree(found, [(r.ids, x) for r, x in zip(found.replies, logits, strict=True)])


def states_of(states: RowStates) -> list[list[int]]:
    """The rows of each state."""
    return [states.rows[states.of == state].tolist() for state in range(len(states))]


def test_row_states_split_by_token() -> None:
    sharing = RowSharing([(1,), (2,), (3,), (4,), (5,)], np.full(5, 99), None)
    first = sharing.first(np.zeros(5))
    second = sharing.follow(first, np.array([7, -1, 7, -1, 7]), 1)
    assert states_of(second) == [[0], [2], [4]]
    assert second.parents.tolist() == [0, 2, 4]
    assert second.leaders.tolist() == [0, 2, 4]
    assert len(sharing.follow(second, np.full(3, -1), 2)) == 0
    same = RowSharing([(1,)] * 4 + [(2,)], np.full(5, 99), None)
    split = same.follow(same.first(np.zeros(5)), np.array([5, 6, 5, 7, -1]), 1)
    assert states_of(split) == [[0, 2], [1], [3]]
    assert split.parents.tolist() == [0, 0, 0]
    moved = split.placed(np.array([2, 0, 1]))
    assert states_of(moved) == [[1], [3], [0, 2]]
    assert second.placed(np.array([2, 0, 1])).parents.tolist() == [2, 4, 0]


def test_row_states_split_where_a_rule_acts_on_one_row() -> None:
    """Two rows with equal rules stay together; the first pass has a given order."""
    acting, groups = np.array([9, 9, 1, 1, 0]), np.array([0, 0, 1, 1, 0])
    sharing = RowSharing([(1,), (2,), (1,), (1,), (1,)], acting, groups)
    first = sharing.first(np.array([3, 1, 3, 3, 2]))
    assert states_of(first) == [[1], [4], [0, 2, 3]]
    then = sharing.follow(first, np.array([7, 7, 7, 7, 7]), 1)
    assert states_of(then) == [[1], [4], [0], [2, 3]]
    assert then.parents.tolist() == [0, 1, 2, 2]


def test_mixed_rules_in_one_batch_equal_full_passes() -> None:
    """Each prompt has two rows, one with rules and one without."""
    model = model_of(NAME)
    rules = mixed(model)
    prompts = [*PROMPTS, *PROMPTS]
    found = written(model, prompts, greedy(TOKENS), rules)
    agree(found, as_expected(written(model, prompts, greedy(TOKENS), rules, cached=False)))


def test_completion_of_one_token() -> None:
    found = written(model_of(NAME), PROMPTS, Decoding(1, str))
    assert [len(reply.ids) for reply in found.replies] == [1, 1, 1]
