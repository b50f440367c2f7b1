"""Sizes of passes: measured, halved if memory runs out, and constant memory over many cells."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechdsl.execute.pass_layout
import mechdsl.execute.patching.rows
import mechdsl.execute.run.panel
import mechdsl.planner.plan
from mechdsl.checks.file_check import CheckedFile
from mechdsl.execute.pass_layout import (
    MAX_PASS_TOKENS,
    MIN_PASS_TOKENS,
    PassSizer,
    estimate_cache_bytes,
    estimate_score_bytes,
    estimate_token_bytes,
)
from mechdsl.execute.patching.rows import Patcher
from mechdsl.execute.run.panel import Execution
from mechdsl.execute.run_record import ExecutionOptions, PassSizes
from mechdsl.forward.hooks.batch import is_out_of_memory
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.plan import PASS_TOKENS, PROMPT_TOKENS, ExperimentPlan
from mechdsl.results.results import Results
from mechdsl.store.runs import OpenRun, ValueBlock
from mechdsl.store.store import Store

from ..models import families
from .support import (
    DIFFERENCE,
    EVERY_PASS,
    adopted,
    bare,
    check_file,
    execute_file,
    experiment,
    try_file,
    word_tokenizer,
)

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
    """Objects from before a test aren't scanned at every halving."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- choice of the size ---------------------------------------------------------------------------


Rate = Callable[[int], float]
"""Tokens of a pass → work per second, by an artificial clock."""


def climb(sizes: PassSizer, rate: Rate) -> list[int]:
    """Return the tried sizes."""
    tried: list[int] = []

    def counted(tokens: int) -> float:
        tried.append(tokens)
        return rate(tokens)

    sizes.measure(counted)
    return tried


def hill(best: int) -> Rate:
    """Fastest at one size, slower the farther it is away."""
    return lambda size: 1e6 / (1 + abs(np.log2(size / best)))


@settings(derandomize=True, deadline=None)
@given(best=st.integers(0, 20))
def test_pass_size_climbs_to_the_most_work_per_second(best: int) -> None:
    sizes = PassSizer()
    tried = climb(sizes, hill(1 << best))
    assert tried[0] == PASS_TOKENS
    assert sizes.pass_tokens == min(max(1 << best, MIN_PASS_TOKENS), MAX_PASS_TOKENS)
    assert (sizes.chosen, sizes.settled) == ("measured", True)
    assert max(Counter(tried).values()) == 1
    assert all(MIN_PASS_TOKENS <= size <= MAX_PASS_TOKENS for size in tried)


def test_slower_pass_sizes_are_tried_once() -> None:
    sizes = PassSizer()
    assert climb(sizes, hill(PASS_TOKENS)) == [PASS_TOKENS, PASS_TOKENS * 2, PASS_TOKENS // 2]
    assert sizes.pass_tokens == PASS_TOKENS


def test_pass_size_that_no_rows_fill_is_not_chosen() -> None:
    sizes = PassSizer()
    climb(sizes, lambda size: 0.0 if size > PASS_TOKENS else 1.0 + size)
    assert sizes.kept == PassSizes(PASS_TOKENS, PROMPT_TOKENS, "measured")
    small = PassSizer()
    assert climb(small, lambda size: 0.0) == [PASS_TOKENS]
    assert small.kept == PassSizes(PASS_TOKENS, PROMPT_TOKENS, "default")


def test_given_pass_sizes_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory isn't queried."""
    monkeypatch.delattr(mechdsl.execute.pass_layout, "get_free_memory")
    uses = [(adopted("llama"), check_file(TEXT, folder, adopted("llama")).experiments[0].table)]
    assert PassSizer.of(77, None, uses).kept == PassSizes(77, PROMPT_TOKENS, "given")
    assert PassSizer.of(77, 9, uses).kept == PassSizes(77, 9, "given")
    assert PassSizer.of(77, 9, uses).settled


@pytest.mark.parametrize("rest", [-(1 << 20), 0, 1 << 20, 1 << 24, 1 << 40])
def test_pass_size_is_limited_by_free_memory(
    folder: Path, rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rest: free bytes in addition to those of attention scores."""
    taken = estimate_score_bytes(torch.device("cpu"))
    monkeypatch.setattr(mechdsl.execute.pass_layout, "get_free_memory", lambda device: rest + taken)
    free = max(0, rest)
    model = adopted("llama")
    table = check_file(TEXT, folder, model).experiments[0].table
    sizes = PassSizer.of(None, None, [(model, table)])
    room, kept = estimate_token_bytes(model), estimate_cache_bytes(model, table)
    assert sizes.limit == min(MAX_PASS_TOKENS, max(MIN_PASS_TOKENS, free // 2 // room))
    assert sizes.pass_tokens == min(PASS_TOKENS, sizes.limit)
    assert sizes.prompt_tokens == min(PROMPT_TOKENS, max(1, free // 4 // kept))
    assert sizes.chosen == ("default" if free == 1 << 40 else "memory")
    assert PassSizer.of(None, 9, [(model, table)]).prompt_tokens == 9
    assert all(tokens <= sizes.limit for tokens in climb(sizes, hill(1 << 40)))


def test_halving_sets_the_limit_of_the_pass_size() -> None:
    sizes = PassSizer(pass_tokens=16 * PASS_TOKENS, settled=True)
    assert sizes.halve()
    assert sizes.kept == PassSizes(8 * PASS_TOKENS, PROMPT_TOKENS, "memory")
    assert sizes.limit == 8 * PASS_TOKENS


def test_pass_of_one_token_is_not_halved() -> None:
    sizes = PassSizer(pass_tokens=5)
    assert [sizes.halve() for _ in range(4)] == [True, True, False, False]
    assert sizes.pass_tokens == 1


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
def test_out_of_memory_errors_are_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_oversized_allocation_raises_a_recognised_error() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(found.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), KeyboardInterrupt(), ValueError("memory")]
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# --- running out of memory ------------------------------------------------------------------------


def full_above(tokens: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Simulate full memory in passes over rows with more tokens in a block than this."""
    packed, whole = mechdsl.execute.patching.rows.run_packed, mechdsl.execute.patching.rows.run_full
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

    monkeypatch.setattr(mechdsl.execute.patching.rows, "run_packed", run_packed)
    monkeypatch.setattr(mechdsl.execute.patching.rows, "run_full", run_whole)
    return raised


def patched_values(execution: Execution) -> list[np.ndarray]:
    return [values for measured in execution.measured.values() for values in measured.patched]


def same(a: Execution, b: Execution) -> None:
    for one, other in zip(patched_values(a), patched_values(b), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


PLAIN = tuple(EVERY_PASS)


@pytest.mark.parametrize(
    ("kind", "pass_tokens", "without"),
    [
        pytest.param("GPU", None, (), id="measured"),
        pytest.param("CPU", 500, (), id="given", marks=pytest.mark.slow),
        pytest.param("Python", 500, (), id="of Python"),
        pytest.param("CPU", 500, PLAIN, id="plain", marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_run_continues_with_smaller_passes(
    folder: Path,
    kind: str,
    pass_tokens: int | None,
    without: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    whole = execute_file(checked, model, without, ExecutionOptions(pass_tokens=pass_tokens))
    assert whole.profile.halved == 0
    raised = full_above(30, FULL[kind], monkeypatch)
    found = execute_file(checked, model, without, ExecutionOptions(pass_tokens=pass_tokens))
    same(found, whole)
    assert found.profile.halved == raised["times"] > 0
    assert found.profile.distinct == whole.profile.distinct
    assert sum(found.profile.tokens) == sum(whole.profile.tokens), "no row is run twice"
    assert found.profile.passes == len(found.profile.tokens) > whole.profile.passes


@pytest.mark.parametrize("kind", ["GPU", "Python"])
def test_out_of_memory_unpatched_run_continues_with_fewer_prompts(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    whole = execute_file(checked, model, (), ExecutionOptions(pass_tokens=500))
    compute = mechdsl.execute.unpatched_runs.compute_unpatched
    tried: list[int] = []

    def limited(*args: Any, **kwargs: Any) -> Any:
        found = compute(*args, **kwargs)
        tried.append(len(args[2]))
        if len(args[2]) > 2:
            raise FULL[kind]
        return found

    monkeypatch.setattr(mechdsl.execute.unpatched_runs, "compute_unpatched", limited)
    found = execute_file(checked, model, (), ExecutionOptions(pass_tokens=500))
    same(found, whole)
    assert found.profile.halved == sum(prompts > 2 for prompts in tried) > 0
    assert found.profile.distinct == whole.profile.distinct


def test_single_prompt_that_exceeds_memory_raises(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)

    def full(*_: Any, **__: Any) -> Any:
        raise FULL["GPU"]

    monkeypatch.setattr(mechdsl.execute.unpatched_runs, "compute_unpatched", full)
    with pytest.raises(torch.OutOfMemoryError):
        execute_file(checked, model, (), ExecutionOptions())


Kept = dict[tuple[bytes, int], np.ndarray]
"""(key of a cell, key of a row) → its values."""


COUNTED = 1 << 20
"""Keys of rows below are their numbers in a pass; others are hashes of 64 bits."""


def kept_values(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: ExecutionOptions | None = None,
) -> tuple[Kept, int]:
    """The values that a run stores, each once, and the number of blocks of patched rows."""
    values: Kept = {}
    blocks: list[ValueBlock] = []
    keep = OpenRun.keep

    def kept(self: OpenRun, block: ValueBlock) -> None:
        blocks.append(block)
        keep(self, block)

    how = RunOptions(execution=options or ExecutionOptions())
    with monkeypatch.context() as patch, Store(folder / name) as store:
        patch.setattr(OpenRun, "keep", kept)
        with store.begin(name, {}) as run:
            found, problems = try_file(TEXT, folder, bare("llama"), how, run=run)
    assert found is not None, problems
    for block in blocks:
        for number, cell in enumerate(block.cells):
            begin, end = block.starts[number : number + 2]
            if block.rows[begin:end].max() < COUNTED:  # what this very pass gave, row by row
                continue
            for row in range(begin, end):
                place = (cell, int(block.rows[row]))
                assert place not in values, "kept twice"
                values[place] = block.values[row]
    return values, sum(block.values.shape[1] == 1 for block in blocks)


def same_values(one: Kept, other: Kept) -> None:
    assert one.keys() == other.keys()
    assert len(one) > 100
    for place, values in one.items():
        np.testing.assert_allclose(values, other[place], atol=1e-4)


@pytest.mark.slow
def test_retried_rows_are_stored_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that ran out of memory stores nothing."""
    whole, passes = kept_values("whole", folder, monkeypatch)
    raised = full_above(30, FULL["CPU"], monkeypatch)
    halved, more = kept_values("halved", folder, monkeypatch)
    assert raised["times"] > 0
    assert more > passes
    same_values(halved, whole)


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
def test_single_row_that_exceeds_memory_raises(
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


def test_other_error_in_a_pass_is_raised_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adopted("llama")
    checked = check_file(TEXT, folder, model)
    raised = full_above(30, RuntimeError("something else"), monkeypatch)
    with pytest.raises(RuntimeError, match="something else"):
        execute_file(checked, model)
    assert raised["times"] == 1


# --- layout of passes -----------------------------------------------------------------------------


def layout(
    checked: CheckedFile, options: ExecutionOptions, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[bytes, bytes]], Execution]:
    """(rows and prompts of every pass, what was measured)."""
    passes: list[tuple[bytes, bytes]] = []
    values = Patcher.values

    def noted(self: Patcher, shared: Any, chosen: Any, *given: Any) -> Any:
        passes.append((chosen.tobytes(), given[2].tobytes()))
        return values(self, shared, chosen, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Patcher, "values", noted)
        return passes, execute_file(checked, adopted("llama"), (), options)


def equal(one: Execution, other: Execution) -> None:
    for a, b in zip(patched_values(one), patched_values(other), strict=True):
        assert a.tobytes() == b.tobytes()


def test_layout_of_a_given_size_does_not_depend_on_clock_or_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check_file(TEXT, folder, adopted("llama"))
    options = ExecutionOptions(pass_tokens=40)
    passes, found = layout(checked, options, monkeypatch)
    assert len(passes) > 10
    random = Random(0)
    monkeypatch.setattr(
        mechdsl.execute.pass_layout.time, "perf_counter", lambda: random.uniform(-1e9, 1e9)
    )
    monkeypatch.setattr(
        mechdsl.execute.pass_layout, "get_free_memory", lambda device: random.randrange(1 << 40)
    )
    monkeypatch.setattr(mechdsl.execute.run.panel, "MIN_TRIAL_PASSES", 1)
    again, same_values = layout(checked, options, monkeypatch)
    assert again == passes
    equal(found, same_values)


@pytest.mark.parametrize("bases", [("clean", "other"), ("other", "clean")])
def test_passes_run_in_file_order(
    folder: Path, bases: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "ablate z layer * head * at cue token with zero"
    text = "".join(
        experiment(f"on_{base}", "prompts p", f"from longer into {base}", rule, DIFFERENCE)
        for base in bases
    )
    checked = check_file(text, folder, adopted("llama"))
    started: dict[str, None] = {}
    values = Patcher.values

    def noted(self: Patcher, *args: Any) -> Any:
        started[args[3].name] = None
        return values(self, *args)

    monkeypatch.setattr(Patcher, "values", noted)
    execute_file(checked, adopted("llama"), (), ExecutionOptions(pass_tokens=40))
    assert tuple(started) == bases


@pytest.fixture
def every_pass_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest size is the fastest, and passes are small enough to measure with few rows."""
    monkeypatch.setattr(mechdsl.execute.run.panel, "MIN_TRIAL_PASSES", 2)
    monkeypatch.setattr(mechdsl.execute.pass_layout, "PASS_TOKENS", 64)
    monkeypatch.setattr(mechdsl.execute.pass_layout, "MIN_PASS_TOKENS", 32)
    clock = count()
    monkeypatch.setattr(
        mechdsl.execute.pass_layout.time, "perf_counter", lambda: float(next(clock))
    )


@pytest.mark.usefixtures("every_pass_takes_a_second")
def test_measured_size_gives_identical_values_when_given(folder: Path) -> None:
    result, problems = try_file(TEXT, folder, bare("llama"))
    assert result is not None, problems
    assert result.sizes == PassSizes(256, PROMPT_TOKENS, "measured")
    given = RunOptions(execution=ExecutionOptions(pass_tokens=256))
    again, problems = try_file(TEXT, folder, bare("llama"), given)
    assert again is not None, problems
    assert again.sizes == PassSizes(256, PROMPT_TOKENS, "given")
    one, other = (Results((replace(each, sizes=None),)).to_json() for each in (result, again))
    assert one == other
    assert "up to 256 tokens each, prompts in batches of up to 4,096" in one


def test_trial_passes_are_not_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of trial passes are in no value, file or count."""
    checked = check_file(TEXT, folder, adopted("llama"))
    given = execute_file(checked, adopted("llama"), (), ExecutionOptions(pass_tokens=PASS_TOKENS))
    monkeypatch.setattr(mechdsl.execute.run.panel, "MIN_TRIAL_PASSES", 0)
    monkeypatch.setattr(mechdsl.execute.pass_layout, "MIN_FILLED_SHARE", 0)
    monkeypatch.setattr(mechdsl.execute.pass_layout.PassSizer, "halve", None)
    passes, found = layout(checked, ExecutionOptions(), monkeypatch)
    assert len(passes) > len(found.profile.tokens), "some were thrown away"
    assert sum(found.profile.tokens) == sum(given.profile.tokens)
    assert found.profile.distinct == given.profile.distinct
    for one, other in zip(found.measured.values(), given.measured.values(), strict=True):
        assert (one.rows, one.inert, one.dropped) == (other.rows, other.inert, other.dropped)
    same(found, given)


@pytest.mark.slow
@pytest.mark.usefixtures("every_pass_takes_a_second")
def test_trial_passes_are_not_stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store gets only the passes that count."""
    given, _ = kept_values("given", folder, monkeypatch, ExecutionOptions(pass_tokens=PASS_TOKENS))
    monkeypatch.setattr(mechdsl.execute.run.panel, "MIN_TRIAL_PASSES", 0)
    monkeypatch.setattr(mechdsl.execute.pass_layout, "MIN_FILLED_SHARE", 0)
    tried: list[int] = []
    whole = Patcher.values

    def counted(self: Patcher, shared: Any, chosen: Any, *others: Any) -> Any:
        tried.append(len(chosen))
        return whole(self, shared, chosen, *others)

    monkeypatch.setattr(Patcher, "values", counted)
    found, passes = kept_values("measured", folder, monkeypatch)
    assert len(tried) > passes
    same_values(found, given)


@pytest.mark.usefixtures("every_pass_takes_a_second")
def test_pass_size_that_exceeds_memory_is_not_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third pass is the first of double size. Nothing is halved, as it stored nothing."""
    values = Patcher.values
    calls = 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise FULL["CPU"]
        return values(*args)

    monkeypatch.setattr(Patcher, "values", full)
    checked = check_file(TEXT, folder, adopted("llama"))
    found = execute_file(checked, adopted("llama"))
    assert found.profile.halved == 0
    assert max(found.profile.tokens) == 64


# --- memory over many cells -----------------------------------------------------------------------


NEURONS = 64
MANY = experiment(
    "neurons", "prompts p limit 2", "from longer into clean",
    "patch mlp_hidden layer * neuron * at token -6..-1", DIFFERENCE,
    "measure prob(answer) as delta", stats="",
)  # fmt: skip


@cache
def many_neurons() -> LoadedModel:
    model, diagnostics = adopt_model(
        "m", families.module("gpt2", n_inner=NEURONS), word_tokenizer()
    )
    assert model is not None, diagnostics
    return model


@pytest.mark.parametrize("without", [(), ("inert", "share", "join")])
@pytest.mark.slow
def test_memory_is_constant_over_a_thousand_cells(folder: Path, without: tuple[str, ...]) -> None:
    model = many_neurons()
    checked = check_file(MANY, folder, model)
    assert checked.experiments[0].n_cells == 3 * NEURONS * 6 > 1000
    looks: list[tuple[int, int, int]] = []
    calls = 0

    def look(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 50 or done == total:
            gc.collect()
            tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
            size = sum(tensor.numel() for tensor in tensors)
            looks.append((len(tensors), size, tracemalloc.get_traced_memory()[0]))

    tracemalloc.start()
    try:
        execute_file(checked, model, without, ExecutionOptions(on_progress=look, pass_tokens=40))
    finally:
        tracemalloc.stop()
    assert calls > 100
    (count, size, traced), (count_then, size_then, traced_then) = looks
    assert count_then <= count
    assert size_then <= size
    assert traced_then - traced < 100_000, "a few bytes a pass at most"


@pytest.mark.parametrize(
    ("rows", "batches"),
    [
        (41, 4),
        (130, 2),
        pytest.param(1, 4, marks=pytest.mark.slow),
        pytest.param(90, 2, marks=pytest.mark.slow),
    ],
)
def test_rows_laid_out_in_parts_have_equal_values(
    folder: Path, rows: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """42 cells: one, two or three prompts at a time."""
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
    monkeypatch.setattr(mechdsl.planner.plan, "BATCH_ROWS", rows)
    found = execute_file(checked, model)
    same(found, whole)
    assert found.profile.distinct == whole.profile.distinct
    assert found.profile.passes > whole.profile.passes
    assert len(laid) == batches * len(checked.experiments)
