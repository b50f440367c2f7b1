"""The benchmark for GPUs on a machine without one."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import warnings
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import benchmarks.gpu
from benchmarks.gpu import SHAPES, main, sleep_while_waiting, time_limit
from benchmarks.gpu_results import MULTIPLE, Compared, RandomTask, largest_difference, shortfall
from benchmarks.synchronisations import counted_synchronisations
from benchmarks.tools import base
from benchmarks.tools.plain import Plain
from benchmarks.writing import by_expert, by_generate

AGREES = Compared("W2 fp32", error=0.0, own=0.0)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def given(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])


def for_ever(*_: Any, **__: Any) -> Any:
    while True:
        pass


def test_without_a_gpu_the_benchmark_names_the_small_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch)
    assert main() == 2
    said = capsys.readouterr().err
    assert "No GPU was found" in said
    assert "`python -m benchmarks.gpu --small`" in said


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Lines of the small version for W2 and replies."""
    to = tmp_path_factory.mktemp("gpu") / "lines.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(benchmarks.gpu, "give_back", lambda: None)  # slow in a large process
        given(patch, "--small", "--works", "W2", "replies", "--dtypes", "bf16", "--json", str(to))
        assert main() == 0
    return json.loads(to.read_text())


def one(lines: list[dict[str, Any]], work: str, tool: str) -> dict[str, Any]:
    (found,) = (line for line in lines if (line["work"], line["tool"]) == (work, tool))
    return found


@pytest.mark.slow
def test_small_version_runs_every_tool_in_bf16(lines: list[dict[str, Any]]) -> None:
    for tool in ("plain", "plain-batched", "mechdsl", "mechdsl-whole"):
        line = one(lines, "W2", tool)
        assert line["seconds"] > 0
        assert line["waits"] > 0
        assert line["off"] < 1
    assert one(lines, "W2", "plain")["passes"] == 9
    assert one(lines, "W2", "plain-batched")["passes"] == 3
    for tool in ("generate", "expert", "mechdsl"):
        assert one(lines, "replies", tool)["passes"] >= 4


@pytest.mark.slow
def test_small_version_counts_where_mechdsl_waits(lines: list[dict[str, Any]]) -> None:
    bounds = (("W2", "mechdsl", 12), ("W2", "mechdsl-whole", 32), ("replies", "mechdsl", 12))
    for work, tool, most in bounds:
        line = one(lines, work, tool)
        waits = sum(line["places"].values())
        assert line["waits"] == waits / line["passes"]
        assert waits <= most


def test_results_that_differ_end_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given(monkeypatch, "--small", "--works", "W2", "replies", "--dtypes", "fp32")
    differs = Compared("W2 fp32", error=1.0, own=0.1)
    monkeypatch.setattr(benchmarks.gpu, "_compared", lambda *_: differs)
    monkeypatch.setattr(benchmarks.gpu, "_measure", lambda *_: None)
    assert main() == 1
    assert capsys.readouterr().err.startswith("W2 fp32: off by 1.0e+00 at most")


@pytest.mark.parametrize(
    ("unending", "status"), [("_compared", 1), ("_sweep", 0), ("matmul_rate", 0)]
)
def test_time_limit_interrupts_any_phase(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unending: str,
    status: int,
) -> None:
    given(
        monkeypatch, "--small", "--works", "W2", "replies", "--dtypes", "fp32", "--seconds", "0.2"
    )
    monkeypatch.setattr(benchmarks.gpu, "_compared", lambda *_: AGREES)
    monkeypatch.setattr(benchmarks.gpu, unending, for_ever)
    start = perf_counter()
    assert main() == status
    assert perf_counter() - start < 5
    printed = capsys.readouterr().out
    assert "The time is up. Left out: " in printed
    assert "tiny fp32 W2 plain; tiny fp32 W2 mechdsl" in printed
    assert ("compare W2 fp32" in printed) == (status == 1)


def test_time_limit_restores_the_handler_of_alarms() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(10):
        assert signal.getsignal(signal.SIGALRM) != before
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.slow
def test_failing_tool_keeps_the_lines_of_other_tools(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep: Any = vars(benchmarks.gpu)["_sweep"]

    def failing(tool: str, *rest: Any) -> Any:
        if tool == "mechdsl":
            raise ValueError("broken")
        return sweep(tool, *rest)

    given(monkeypatch, "--small", "--works", "W2", "replies", "--dtypes", "fp32")
    monkeypatch.setattr(benchmarks.gpu, "_compared", lambda *_: AGREES)
    monkeypatch.setattr(benchmarks.gpu, "_sweep", failing)
    monkeypatch.setattr(benchmarks.gpu, "WAYS", {"generate": by_generate})
    assert main() == 1
    printed = capsys.readouterr()
    assert "tiny fp32 W2 mechdsl: failed with ValueError: broken" in printed.err
    assert "plain-batched" in printed.out
    assert "The time is up" not in printed.out


# --- tolerances -----------------------------------------------------------------------------------


def test_tolerance_follows_the_distance_of_plain_hooks() -> None:
    assert Compared("W2 bf16", error=0.2, own=0.1).agrees
    assert not Compared("W2 bf16", error=0.1 * MULTIPLE + 0.01, own=0.1).agrees
    assert not Compared("W2 fp32", error=2e-4, own=0.0).agrees
    assert not Compared("W2 fp32", error=float("nan"), own=0.1).agrees


def test_table_that_lacks_a_cell_of_the_reference_differs_infinitely() -> None:
    reference, found = np.array([[1.0, np.nan]]), np.array([[1.5, 2.0]])
    assert largest_difference(reference, found) == 0.5
    assert largest_difference(found, reference) == float("inf")


def test_shortfall_of_replies_of_another_cell_is_positive() -> None:
    with torch.inference_mode():
        task = RandomTask(SHAPES["tiny"], tokens=6, cells=4)
        replies = by_generate(task)()
    assert shortfall(task, replies) < 1e-4
    assert shortfall(task, [replies[1], replies[0], *replies[2:]]) > 0.01
    assert shortfall(task, [[text[:-1] for text in cell] for cell in replies]) == float("inf")


def test_expert_replies_equal_the_loop_over_cells() -> None:
    with torch.inference_mode():
        task = RandomTask(SHAPES["tiny"], tokens=6, cells=24)
        assert len({len(ids) for ids in task.prompts}) > 1
        assert by_expert(task)() == by_generate(task)()


# --- GPU-only code, with a simulated GPU ----------------------------------------------------------


def test_loops_are_timed_after_gpu_synchronization(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("finish"))
    monkeypatch.setattr(base, "perf_counter", lambda: order.append("time") or 0.0)
    loop = Plain()
    monkeypatch.setattr(loop, "begin", lambda *_: order.append("begin"))
    monkeypatch.setattr(loop, "patch", lambda _: order.append("patch") or torch.zeros(1, 1))
    loop.cells = [SimpleNamespace()]  # type: ignore[list-item]
    batch = SimpleNamespace(clean=[[1]], corrupted=[[1]], answer=[1], wrong=[2], rows=[0])
    loop.work = SimpleNamespace(batches=[batch], n_rows=1)  # type: ignore[assignment]
    loop.run([[0]])
    clock = ["finish", "time"]
    assert order == [*clock, "begin", *clock, "patch", *clock]


def test_waits_for_a_gpu_are_counted_from_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_synchronisations(torch.device("cuda")) as places:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("does not yet detect all synchronizing operations", stacklevel=1)
    assert list(places.values()) == [3]
    assert modes == ["warn", 0]


def test_gpu_memory_is_the_peak_since_the_last_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: called.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    functions: Any = vars(benchmarks.gpu)
    functions["_forget"]("cuda")
    assert called == ["empty", "reset"]
    assert functions["_peak"]("cuda") == 3


@pytest.mark.parametrize(("started", "accepted"), [(0, 0), (0, 1), (1, 0)])
def test_driver_is_asked_to_let_the_host_sleep(
    monkeypatch: pytest.MonkeyPatch, started: int, accepted: int
) -> None:
    asked: list[tuple[int, ...]] = []

    def flags(*numbers: int) -> int:
        asked.append(numbers)
        return accepted

    driver = SimpleNamespace(cuInit=lambda _: started, cuDevicePrimaryCtxSetFlags_v2=flags)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    assert sleep_while_waiting() == (started == accepted == 0)
    assert asked == ([] if started else [(0, 4)])


def test_without_a_driver_the_host_does_not_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not sleep_while_waiting()
