"""Results and speed on a GPU: one command of at most ten minutes.

    python -m benchmarks.gpu [--shapes 1B 7B] [--dtypes fp32 bf16] [--seconds 600]
    python -m benchmarks.gpu --small      # the same on a tiny model, on the CPU if there is no GPU

First the works W1 to W5 on a tiny model are compared with plain hooks on the CPU in fp32. Then they
run, and replies are written, on models with random weights in the shapes of 1 and 7 billion
parameters: with mechdsl, plain hooks with 16 cells in a pass, and, where they are installed, an
expert's loop and nnsight. The loops run some of the cells; their time is scaled to all of them.
A measurement that would begin after the time is up is left out. The exit status is 1 where results
differ, 2 without a GPU.

Columns: seconds for all cells, the largest GPU memory (of the process, on the CPU), forward passes,
milliseconds of the host's thread in a pass, and how often a pass waits for the device. Where a
thread waits by spinning, that is part of its time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch

from benchmarks.data import SWEEPS, make
from benchmarks.model import Place, build, placed
from benchmarks.synchronisations import SIMULATED, counted_synchronisations, to_simulated
from benchmarks.tools.base import Table, Timed, Tool
from benchmarks.tools.mechdsl import Mechdsl
from benchmarks.tools.names import TOOLS
from benchmarks.tools.plain import Plain
from benchmarks.work import Shape, Work, count
from benchmarks.worker import forget_peak, give_back, memory
from benchmarks.writing import PROMPTS, TOKENS, Replies, Task, by_generate, by_mechdsl

SHAPES = {
    "tiny": Shape(layers=2, heads=4, width=64, vocabulary=512),
    "1B": Shape(layers=22, heads=16, width=2048),
    "7B": Shape(layers=32, heads=32, width=4096),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORKS = [name for name, sweep in SWEEPS.items() if sweep.default and sweep.random is not None]
LOOPS = ("plain-batched", "expert", "nnsight-batched")
CELLS = 32
"""Of a loop, at most; a whole layer's at least."""
UNITS = 10
"""By which results in 16 bits may differ, of their precision, times the largest logit."""
REPLY = {"tokens": 32, "cells": 24}


@dataclass(frozen=True)
class Line:
    """One tool on one work."""

    shape: str
    dtype: str
    work: str
    tool: str
    seconds: float
    """For all cells."""
    memory: float
    """MiB at most."""
    passes: float = nan
    host: float = nan
    """Milliseconds of the host's thread in a pass."""
    waits: float = nan
    """How often the host waits for the device in a pass."""

    def __str__(self) -> str:
        return (
            f"{self.shape:5} {self.dtype:5} {self.work:11} {self.tool:16}{self.seconds:9.3f} s"
            f"{self.memory:9.0f} MiB{self.passes:8.0f} passes{self.host:8.2f} ms"
            f"{self.waits:7.1f} waits"
        )


class Clock:
    """What is left of the time."""

    def __init__(self, seconds: float) -> None:
        self.end = perf_counter() + seconds

    def is_up(self) -> bool:
        return perf_counter() > self.end


def main() -> int:
    """Check, measure and print; the exit status."""
    arguments = _arguments()
    with_gpu = torch.cuda.is_available()
    if not with_gpu and not arguments.small:
        print(
            "No GPU was found: `torch.cuda.is_available()` is false. Run `python -m benchmarks.gpu "
            "--small` for a tiny model on the CPU.",
            file=sys.stderr,
        )
        return 2
    device = "cuda" if with_gpu else "cpu"
    if not with_gpu:
        print("No GPU was found: a tiny model runs on the CPU; waits are those of a simulated GPU.")
    torch.backends.cuda.matmul.allow_tf32 = False
    clock = Clock(arguments.seconds)
    differing = [
        line
        for name in arguments.works
        for dtype in arguments.dtypes
        if (line := _checked(name, dtype, device)) is not None
    ]
    lines: list[Line] = []
    for shape in ["tiny"] if arguments.small else arguments.shapes:
        for dtype in arguments.dtypes:
            rate = matmul_rate(device, DTYPES[dtype], small=arguments.small)
            print(f"{shape} {dtype}: {rate:.2f} TFLOP/s in a large matrix product", flush=True)
            lines += _measured(shape, dtype, device, arguments.works, clock)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))
    for line in differing:
        print(line, file=sys.stderr)
    return 1 if differing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model alone")
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=540, help="begin nothing after them")
    parser.add_argument("--json", type=Path, help="file that gets the lines")
    return parser.parse_args()


def _checked(name: str, dtype: str, device: str) -> str | None:
    """Compare a work on a tiny model with plain hooks on the CPU in fp32; what differs."""
    with tempfile.TemporaryDirectory() as folder:
        work = make(name, Path(folder) / name, ioi=None, small=True)
        plain = Plain()
        plain.load(work, Path(folder) / name)
        expected = plain.run(work.picks()).table
        largest = max(
            float(plain.model(torch.tensor(batch.corrupted)).logits.abs().max())
            for batch in work.batches
        )
        with placed(Place(device, DTYPES[dtype])):
            tool = Mechdsl()
            tool.load(work, Path(folder) / name)
            found = tool.run(work.picks()).table
    error = largest_difference(expected, found)
    allowed = tolerance(DTYPES[dtype], largest)
    print(f"{name} {dtype}: off by {error:.1e} at most; {allowed:.1e} are allowed", flush=True)
    return None if error <= allowed else f"{name} {dtype}: off by {error:.1e}"


def tolerance(dtype: torch.dtype, largest: float) -> float:
    """By which the difference of two logits may be off; largest: the largest logit."""
    if dtype == torch.float32:
        return 1e-3
    return 2 * UNITS * torch.finfo(dtype).eps * largest


def largest_difference(expected: Table, found: Table) -> float:
    """Between two tables; infinite where their cells aren't the same."""
    if not np.array_equal(np.isnan(expected), np.isnan(found)):
        return float("inf")
    return float(np.nanmax(np.abs(expected - found)))


def matmul_rate(device: str, dtype: torch.dtype, *, small: bool = False) -> float:
    """10¹² floating point operations in a second of a large matrix product."""
    side, repeats = (512, 2) if small else (8192, 10)
    a = torch.randn(side, side, device=device).to(dtype)
    torch.mm(a, a)
    _wait(device)
    start = perf_counter()
    for _ in range(repeats):
        torch.mm(a, a)
    _wait(device)
    return repeats * 2 * side**3 / (perf_counter() - start) / 1e12


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _measured(
    shape: str, dtype: str, device: str, works: Sequence[str], clock: Clock
) -> list[Line]:
    """All works and the replies, of one model."""
    place = Place(device, DTYPES[dtype], drawn_on=device)
    lines: list[Line] = []

    def add(work: str, tool: str, measure: Callable[[], Line]) -> None:
        if clock.is_up():
            print(f"{shape:5} {dtype:5} {work:11} {tool:16} left out: the time is up", flush=True)
            return
        try:
            lines.append(measure())
            print(lines[-1], flush=True)
        except torch.OutOfMemoryError:
            print(f"{shape:5} {dtype:5} {work:11} {tool:16} out of memory", flush=True)
        _forget(device)

    for name in works:
        with tempfile.TemporaryDirectory() as folder:
            place_of_work = Path(folder) / name
            work = make(name, place_of_work, ioi=None, small=shape == "tiny")
            if shape != "tiny":
                work = replace(work, shape=SHAPES[shape])
            with placed(place):
                add(name, "mechdsl", lambda w=work, f=place_of_work: _mechdsl(shape, dtype, w, f))
                for tool in _installed():
                    add(
                        name,
                        tool,
                        lambda w=work, f=place_of_work, t=tool: _loop(shape, dtype, w, f, t),
                    )
    with placed(place):
        ways = {"mechdsl": by_mechdsl, "generate": by_generate}
        for tool, way in ways.items():
            add("replies", tool, lambda t=tool, way=way: _replies(shape, dtype, t, way))
    return lines


def _installed() -> list[str]:
    """The loops that can be imported here."""
    found: list[str] = []
    for name in LOOPS:
        with suppress(ImportError, KeyError):
            TOOLS[name].make()
            found.append(name)
    return found


def _mechdsl(shape: str, dtype: str, work: Work, folder: Path) -> Line:
    tool = Mechdsl()
    tool.load(work, folder)
    device = tool.model.device.type
    _forget(device)
    before = thread_time()
    timed = tool.run(work.picks())
    host = thread_time() - before
    used = _peak(device)
    profile = tool.profile
    passes = profile.passes + profile.unpatched_passes
    if device == "cpu":
        to_simulated(tool.model.module)
        tool.model = replace(tool.model, device=SIMULATED)
    with counted_synchronisations(tool.model.device) as places:
        tool.run(work.picks())
    waits = sum(places.values()) / passes
    own = shape, dtype, work.name, "mechdsl", timed.cells, used
    return Line(*own, passes, 1e3 * host / passes, waits)


def _loop(shape: str, dtype: str, work: Work, folder: Path, name: str) -> Line:
    tool: Tool = TOOLS[name].make()
    picks = work.picks(CELLS)
    with torch.device(_device()):  # where loops make their tensors
        tool.load(work, folder)
        _forget(_device())
        before = thread_time()
        timed: Timed = tool.run(picks)
        host = thread_time() - before
    share = count(work.picks()) / count(picks)
    seconds = timed.fixed + share * timed.cells
    return Line(shape, dtype, work.name, name, seconds, _peak(_device()), host=1e3 * host * share)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Replies(Task):
    """Random prompts, on a model with the shape of a work's."""

    def __init__(self, shape: Shape) -> None:
        self.model: Any = build(shape)
        self.config: Any = self.model.config
        self.config.bos_token_id = self.config.eos_token_id = None
        self.config.pad_token_id = 0
        small = shape == SHAPES["tiny"]
        self.tokens, self.cells = (4, 4) if small else (REPLY["tokens"], REPLY["cells"])
        draw = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(
            3, shape.vocabulary, (PROMPTS, TOKENS), generator=draw
        ).tolist()
        self.arrange()
        self.ids, self.mask = self.ids.to(self.model.device), self.mask.to(self.model.device)


def _replies(
    shape: str, dtype: str, tool: str, way: Callable[[Task], Callable[[], Replies]]
) -> Line:
    """All cells write behind all prompts."""
    task = _Replies(SHAPES[shape])
    device = task.model.device.type
    with torch.inference_mode(tool == "generate"):
        run = way(task)
        if shape != "tiny":
            run()  # warms up
        _forget(device)
        before, start = thread_time(), perf_counter()
        run()
        _wait(device)
        seconds, host = perf_counter() - start, thread_time() - before
    passes = task.tokens * (task.cells if tool == "generate" else 1)
    own = shape, dtype, "replies", tool, seconds, _peak(device)
    return Line(*own, passes, 1e3 * host / passes)


def _forget(device: str) -> None:
    """Let the peak begin anew."""
    give_back()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak(device: str) -> float:
    """MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else memory("VmHWM")


if __name__ == "__main__":
    sys.exit(main())
