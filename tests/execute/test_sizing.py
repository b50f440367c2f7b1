"""Sizes of passes: found by measuring, halved where memory runs out, and flat over many cells."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechdsl.execute.execute
import mechdsl.execute.pass_size
import mechdsl.execute.patched_rows
from mechdsl.execute.execute import Execution, Options
from mechdsl.execute.pass_size import (
    LEAST_TOKENS,
    MOST_TOKENS,
    PASS_TOKENS,
    PassSize,
    out_of_memory,
)
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.load import adopt
from mechdsl.pipeline import RunOptions
from mechdsl.plan.plan import ExperimentPlan

from ..models import families
from .support import (
    DIFFERENCE,
    EVERY_PASS,
    adopted,
    bare,
    check_file,
    execute_file,
    experiment,
    run_file,
    word_tokenizer,
)

CPU = torch.device("cpu")
FROM = ("prompts p", "from longer into clean")
TEXT = (
    experiment(
        "heads", *FROM, "patch z layer * head * at cue token, last token", DIFFERENCE,
        "measure loss as delta", 'measure logprob("w3 w9 w4") as delta',
    )
    + experiment(
        "means", "prompts p", "ablate mlp_out layer * at each item token with mean", DIFFERENCE
    )
    + experiment(
        "others", "prompts p", "ablate k layer * heads * at cue token with resample", DIFFERENCE
    )
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """What is there before a test isn't looked through at every halving."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- the climb ------------------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is never in the way."""
    monkeypatch.setattr(mechdsl.execute.pass_size, "free_memory", lambda device: 1 << 60)


Rate = Callable[[int], float]
"""Size of a pass → blocks of tokens per second, by a clock that is made up."""


def climb(size: PassSize, rate: Rate, passes: int = 40) -> list[int]:
    """The sizes of full passes."""
    found: list[int] = []
    for _ in range(passes):
        found.append(size.current)
        work = 3.0 * size.current
        size.measured(size.current, work, work / rate(size.current))
    return found


def hill(best: int) -> Rate:
    """Fastest at one size, slower the farther it is away."""
    return lambda size: 1e6 / (1 + abs(np.log2(size / best)))


@pytest.mark.usefixtures("roomy")
@settings(derandomize=True, deadline=None)
@given(best=st.integers(0, 20))
def test_it_climbs_to_the_size_with_the_most_tokens_per_second(best: int) -> None:
    wanted = min(max(1 << best, LEAST_TOKENS), MOST_TOKENS)
    sizes = climb(PassSize(CPU, bytes_per_token=1), hill(1 << best))
    assert sizes[0] == PASS_TOKENS
    assert set(sizes[20:]) == {wanted}
    steps = [b / a for a, b in pairwise(sizes)]
    assert set(steps) <= {0.25, 0.5, 1, 2, 4}, "it goes on from a neighbour of what was best"
    assert all(LEAST_TOKENS <= size <= MOST_TOKENS for size in sizes)


@pytest.mark.usefixtures("roomy")
def test_what_is_slower_is_tried_once_and_left() -> None:
    sizes = climb(PassSize(CPU, bytes_per_token=1), hill(PASS_TOKENS))
    assert Counter(sizes) == {PASS_TOKENS: 38, PASS_TOKENS * 2: 1, PASS_TOKENS // 2: 1}


@pytest.mark.usefixtures("roomy")
def test_small_passes_say_nothing_about_sizes() -> None:
    """The last pass of a batch is short, and slow for its tokens."""
    size = PassSize(CPU, bytes_per_token=1)
    for _ in range(10):
        size.measured(size.current // 2, 1e9, 1e-3)
    assert size.rates == {}
    assert size.current == PASS_TOKENS


def test_a_size_that_is_given_stays() -> None:
    size = PassSize(CPU, bytes_per_token=1, fixed=77)
    assert set(climb(size, hill(4096))) == {77}
    assert PassSize(CPU, bytes_per_token=1 << 50, fixed=77).current == 77


@pytest.mark.parametrize("free", [0, 1 << 20, 1 << 30, 1 << 40])
def test_no_pass_is_larger_than_the_memory_there_is(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechdsl.execute.pass_size, "free_memory", lambda device: free)
    size = PassSize(CPU, bytes_per_token=1000)
    bound = max(LEAST_TOKENS, free // 1000)
    assert all(tokens <= bound for tokens in climb(size, hill(1 << 40)))


@pytest.mark.usefixtures("roomy")
def test_half_the_size_is_the_most_from_then_on() -> None:
    size = PassSize(CPU, bytes_per_token=1)
    rate = hill(16 * PASS_TOKENS)
    climb(size, rate)
    assert size.current == 16 * PASS_TOKENS
    assert size.halve()
    assert size.current == 8 * PASS_TOKENS
    assert set(climb(size, rate)) <= {8 * PASS_TOKENS, 4 * PASS_TOKENS}
    assert size.current == 8 * PASS_TOKENS


def test_one_token_is_not_halved() -> None:
    size = PassSize(CPU, bytes_per_token=1, fixed=5)
    assert [size.halve() for _ in range(4)] == [True, True, False, False]
    assert size.current == 1


CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 549755813888 bytes. Error code 12 (Cannot allocate memory)"
)
FULL = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "CPU": RuntimeError(CPU_MESSAGE),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_full_memory_is_known_by_its_errors(error: BaseException) -> None:
    assert out_of_memory(error)


def test_memory_that_this_machine_does_not_have_raises_such_an_error() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert out_of_memory(found.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), KeyboardInterrupt(), ValueError("memory")]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert not out_of_memory(error)


# --- running out of memory ------------------------------------------------------------------------


def full_above(tokens: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Memory is full in passes over rows with more tokens in a block than this."""
    packed, whole = mechdsl.execute.patched_rows.run_packed, mechdsl.execute.patched_rows.run_whole
    raised: Counter[str] = Counter()

    def limited(found: Any, count: int) -> Any:
        if count > tokens:
            raised["times"] += 1
            raise error
        return found

    def run_packed(*args: Any, **kwargs: Any) -> Any:
        found = packed(*args, **kwargs)
        return limited(found, max(found.work))

    def run_whole(model: Any, batch: Any, **kwargs: Any) -> Any:
        return limited(whole(model, batch, **kwargs), batch.ids.numel())

    monkeypatch.setattr(mechdsl.execute.patched_rows, "run_packed", run_packed)
    monkeypatch.setattr(mechdsl.execute.patched_rows, "run_whole", run_whole)
    return raised


def patched_values(execution: Execution) -> list[np.ndarray]:
    return [values for measured in execution.measured.values() for values in measured.patched]


def same(a: Execution, b: Execution) -> None:
    for one, other in zip(patched_values(a), patched_values(b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


PLAIN = tuple(EVERY_PASS)


@pytest.mark.parametrize(
    ("kind", "row_tokens", "without"),
    [("GPU", None, ()), ("CPU", 500, ()), ("Python", 500, ()), ("CPU", 500, PLAIN)],
    ids=["measured", "given", "of Python", "plain"],
)
def test_a_run_that_is_out_of_memory_goes_on_with_smaller_passes(
    folder: Path,
    kind: str,
    row_tokens: int | None,
    without: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    whole = execute_file(checked, model, without, Options(row_tokens=row_tokens))
    assert whole.profile.halved == 0
    raised = full_above(30, FULL[kind], monkeypatch)
    found = execute_file(checked, model, without, Options(row_tokens=row_tokens))
    same(found, whole)
    assert found.profile.halved == raised["times"] > 0
    assert found.profile.distinct == whole.profile.distinct
    assert sum(found.profile.tokens) == sum(whole.profile.tokens), "no row is run twice"
    assert found.profile.passes == len(found.profile.tokens) > whole.profile.passes


def test_rows_that_were_tried_again_are_kept_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(name: str) -> list[Any]:
        run_file(TEXT, folder, bare("llama"), RunOptions(out=folder / name))
        found: list[Any] = []
        for path in sorted((folder / name / "file").glob("*.jsonl")):
            for text in path.read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                found += [(path.name, line.get("cell"), row) for row in line.get("rows", ())]
        return sorted(found, key=str)

    whole = lines("whole")
    assert full_above(30, FULL["CPU"], monkeypatch)["times"] == 0
    assert lines("halved") == whole


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_a_row_that_does_not_fit_alone_raises(
    folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    raised = full_above(1, error, monkeypatch)
    with pytest.raises(type(error)) as found:
        execute_file(checked, model)
    assert found.value is error
    assert 1 < raised["times"] < 20
    for name, module in model.module.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert "forward" not in module.__dict__, name


def test_another_error_is_raised_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    raised = full_above(30, RuntimeError("something else"), monkeypatch)
    with pytest.raises(RuntimeError, match="something else"):
        execute_file(checked, model)
    assert raised["times"] == 1


# --- memory over many cells -----------------------------------------------------------------------


NEURONS = 64
MANY = experiment(
    "neurons", "prompts p limit 2", "from longer into clean",
    "patch mlp_hidden layer * neuron * at token -6..-1", DIFFERENCE,
    "measure prob(answer) as delta", stats="",
)  # fmt: skip


@cache
def many_neurons() -> LoadedModel:
    model, diagnostics = adopt("m", families.module("gpt2", n_inner=NEURONS), word_tokenizer())
    assert model is not None, diagnostics
    return model


@pytest.mark.parametrize(
    "without", [(), pytest.param(("inert", "share", "join"), marks=pytest.mark.slow)]
)
def test_memory_is_flat_over_a_thousand_cells(folder: Path, without: tuple[str, ...]) -> None:
    model = many_neurons()
    checked = check_file(MANY, folder, model)
    assert checked.experiments[0].n_cells == 3 * NEURONS * 6 > 1000
    looks: list[tuple[int, int, int]] = []
    calls = 0

    def look(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 100 or done == total:
            gc.collect()
            tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
            size = sum(tensor.numel() for tensor in tensors)
            looks.append((len(tensors), size, tracemalloc.get_traced_memory()[0]))

    tracemalloc.start()
    try:
        execute_file(checked, model, without, Options(on_progress=look, row_tokens=20))
    finally:
        tracemalloc.stop()
    assert calls > 200
    (count, size, traced), (count_then, size_then, traced_then) = looks
    assert count_then <= count
    assert size_then <= size
    assert traced_then - traced < 100_000, "a few bytes a pass at most"


@pytest.mark.parametrize(("rows", "batches"), [(1, 4), (41, 4), (90, 2), (130, 2)])
def test_rows_that_are_laid_out_in_parts_are_the_same(
    folder: Path, rows: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """42 cells: a prompt, two or three of them at a time."""
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    whole = execute_file(checked, model)
    laid: list[int] = []
    original = ExperimentPlan.rows

    def counted(self: ExperimentPlan, prompts: Any) -> Any:
        found = original(self, prompts)
        laid.append(len(found))
        return found

    monkeypatch.setattr(ExperimentPlan, "rows", counted)
    monkeypatch.setattr(mechdsl.execute.execute, "BATCH_ROWS", rows)
    found = execute_file(checked, model)
    same(found, whole)
    assert found.profile.distinct == whole.profile.distinct
    assert found.profile.passes > whole.profile.passes
    assert len(laid) == batches * len(checked.experiments)
