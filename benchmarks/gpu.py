"""Results and speed on a GPU: one command of at most ten minutes.

    python -m benchmarks.gpu [--shapes 1B 7B] [--dtypes fp32 bf16] [--works W1a …] [--seconds 570]
    python -m benchmarks.gpu --small      # the same on a tiny model, on the CPU if there is no GPU

First the works W1 to W5 and replies are compared on a tiny model with plain hooks on the CPU in
fp32 (`gpu_results.py` has the tolerance). Then they run on models with random weights in the shapes
of 1 and 7 billion parameters. Other tools are mechdsl without its planner, by whole passes (not on
7 billion), plain hooks with one cell in a pass and with 16, the expert's loop of joined layers, and
nnsight where it is installed. The loops run some of the cells; their time is scaled to all.
W5 needs `ioi.csv`, as in `benchmarks.run`.

Everything stops when the time is up, even within a measurement or a comparison; missing ones are
listed. The exit status is 1 where results differ, weren't compared or something failed, and 2
without a GPU.

Columns: seconds for all cells; the largest GPU memory (on the CPU, memory of the process); forward
passes; milliseconds of the host's thread in a pass, without its waiting for the GPU; how often a
pass waits for the device (without a GPU a simulated one, see `synchronisations.py`); and how far
results are from those of plain hooks in fp32 (without fp32, in the first precision). For replies,
the last column is the number of texts that differ from those of `model.generate` in the same
precision.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch

from benchmarks.bound import matmul_rate as cpu_rate
from benchmarks.data import NO_IOI, SWEEPS, ioi_file, make
from benchmarks.gpu_results import (
    Compared,
    RandomTask,
    compare_replies,
    compare_table,
    largest_difference,
)
from benchmarks.model import Passes, Place, placed
from benchmarks.synchronisations import SIMULATED, Places, counted_synchronisations, to_simulated
from benchmarks.tools.base import Table, Tool
from benchmarks.tools.mechdsl import Mechdsl
from benchmarks.tools.names import TOOLS, Entry
from benchmarks.work import Picks, Shape, Work, count
from benchmarks.worker import forget_peak, give_back, memory
from benchmarks.writing import WAYS, Replies, adopted, by_mechdsl
from mechdsl.forward.hooks.model import LoadedModel

SHAPES = {
    "tiny": Shape(layers=2, heads=4, width=64, vocabulary=512),
    "1B": Shape(layers=22, heads=16, width=2048),
    "7B": Shape(layers=32, heads=32, width=4096),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORKS = [name for name, sweep in SWEEPS.items() if sweep.default]
REPLIES = "replies"
WHOLE = Entry("mechdsl-whole", "mechdsl", "Whole")
ENTRIES = {**TOOLS, WHOLE.name: WHOLE}
LOOPS = ("plain", "plain-batched", "expert", "nnsight-batched")
"""The first is what others are held against."""
CELLS = 32
"""Of a loop, at most; a whole layer's at least."""
TOKENS, REPLY_CELLS = 32, 24
SMALL_TOKENS, SMALL_REPLY_CELLS = 4, 8
"""Of replies on a tiny model."""
CLOSE = 1e-3
"""Logits in fp32, of models with 22 or 32 layers."""
CUDA = torch.device("cuda")
BLOCKING = 4
"""CU_CTX_SCHED_BLOCKING_SYNC of the driver."""


class TimeIsUp(BaseException):
    """The time is up. No `Exception`, so that nothing on the way takes it for a failure."""


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
    passes: float
    """For all cells."""
    host: float
    """Milliseconds of the host's thread in a pass."""
    waits: float | None
    """How often the host waits for the device in a pass."""
    off: float | None
    """Logits from the first loop in the first precision; of replies, texts that differ. None where
    that loop failed."""
    places: dict[str, int] = field(default_factory=dict[str, int])
    """Where the host waits, in the run that counts it."""

    def __str__(self) -> str:
        waits = "–" if self.waits is None else f"{self.waits:.1f}"
        off = "–" if self.off is None else f"{self.off:.1e}"
        if self.work == REPLIES and self.off is not None:
            off = f"{self.off:.0f} differ"
        return (
            f"{self.shape:5} {self.dtype:5} {self.work:8} {self.tool:16}{self.seconds:9.3f} s"
            f"{self.memory:9.0f} MiB{self.passes:9.0f} passes{self.host:8.2f} ms"
            f"{waits:>7} waits  off {off}"
        )


@dataclass
class Report:
    """What was found so far, and what hasn't been asked yet."""

    lines: list[Line] = field(default_factory=list[Line])
    faults: list[str] = field(default_factory=list[str])
    """Results that differ, and measurements that failed."""
    left: list[str] = field(default_factory=list[str])
    """Comparisons and measurements that haven't been finished, in their order."""

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """Run one comparison or measurement; its failure isn't that of the others."""
        try:
            yield
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", flush=True)
        except Exception as error:
            traceback.print_exc()
            self.faults.append(f"{name}: failed with {type(error).__name__}: {error}")
        self.left.remove(name)


def main() -> int:
    """Compare, measure and print; the exit status."""
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
    elif not sleep_while_waiting():
        print("The driver doesn't let the host sleep: the host's time contains its waiting.")
    torch.backends.cuda.matmul.allow_tf32 = False
    works = arguments.works
    if "W5" in works and ioi_file() is None:
        print(f"W5 is left out: {NO_IOI}")
        works = [name for name in works if name != "W5"]
    shapes = ["tiny"] if arguments.small else arguments.shapes
    dtypes = sorted(arguments.dtypes, key=lambda dtype: dtype != "fp32")
    compared = [_of("compare", *each) for each in product(works, dtypes)]
    timed = [
        _of(shape, dtype, name, tool)
        for shape, dtype, name in product(shapes, dtypes, works)
        for tool in _tools(name, shape)
    ]
    report = Report(left=[*compared, *timed])
    with suppress(TimeIsUp), time_limit(arguments.seconds):
        for name, dtype in product(works, dtypes):
            with report.step(_of("compare", name, dtype)):
                found = _compared(name, dtype, device)
                print(found, flush=True)
                if not found.agrees:
                    report.faults.append(str(found))
        for dtype in dtypes:
            rate = matmul_rate(device, DTYPES[dtype], small=arguments.small)
            print(f"{dtype}: {rate:.2f} TFLOP/s in a large matrix product", flush=True)
        for shape in shapes:
            _measure(shape, dtypes, works, device, report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(line) for line in report.lines], indent=1))
    if report.left:
        print(f"The time is up. Left out: {'; '.join(report.left)}")
    for fault in report.faults:
        print(fault, file=sys.stderr)
    return 1 if report.faults or {*report.left} & {*compared} else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model alone")
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--works", nargs="+", choices=[*WORKS, REPLIES], default=[*WORKS, REPLIES])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=570, help="stop after them")
    parser.add_argument("--json", type=Path, help="file that gets the lines, with where hosts wait")
    return parser.parse_args()


def _of(*names: str) -> str:
    return " ".join(names)


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """TimeIsUp within the block once the seconds have passed, wherever the main thread is."""

    def stop(*_: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    # Again after 5 s: an exception inside a finalizer is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sleep_while_waiting() -> bool:
    """Let the host's thread sleep while it waits for the GPU, so that its time has no waiting.

    Returns:
        Whether the driver accepted it. It has to be asked before the GPU is first used.
    """
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
        return not driver.cuInit(0) and not driver.cuDevicePrimaryCtxSetFlags_v2(0, BLOCKING)
    except (OSError, AttributeError):
        return False


def matmul_rate(device: str, dtype: torch.dtype, *, small: bool = False) -> float:
    """10¹² floating point operations in a second of a large matrix product."""
    side, repeats = (512, 2) if small else (8192, 10)
    a = torch.randn(side, side, device=device).to(dtype)
    torch.mm(a, a)
    finish(device)
    start = perf_counter()
    for _ in range(repeats):
        torch.mm(a, a)
    finish(device)
    return repeats * 2 * side**3 / (perf_counter() - start) / 1e12


def large_product(device: str) -> float:
    """Multiply-adds per second of a large product in fp32: 2048³ on the CPU, 8192³ on a GPU."""
    return 0.5e12 * matmul_rate("cuda", torch.float32) if device == "cuda" else cpu_rate()


def finish(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def _tools(name: str, shape: str) -> list[str]:
    """What runs a work, or the replies, on a shape; the first loop first."""
    if name == REPLIES:
        own = [way for way in WAYS if way != "nnsight" or _is_there("nnsight")]
        return sorted(own, key=lambda way: way != "generate")
    loops = [loop for loop in LOOPS if loop in ENTRIES and _is_there(loop)]
    whole = [] if shape == "7B" else [WHOLE.name]  # which runs every cell: minutes
    return [loops[0], "mechdsl", *whole, *loops[1:]]


def _is_there(tool: str) -> bool:
    """Whether its library is installed here."""
    try:
        ENTRIES[tool].make()
    except ImportError:
        return False
    return True


def _compared(name: str, dtype: str, device: str) -> Compared:
    """A work, or the replies, on a tiny model."""
    place, title = Place(device, DTYPES[dtype]), _of(name, dtype)
    if name == REPLIES:
        size = SMALL_TOKENS, SMALL_REPLY_CELLS
        return compare_replies(title, SHAPES["tiny"], place, *size)
    with _made(name, "tiny") as (work, folder):
        return compare_table(title, work, folder, place)


@contextmanager
def _made(name: str, shape: str) -> Generator[tuple[Work, Path]]:
    """A work and its folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        work = make(name, folder, ioi=ioi_file(), small=shape == "tiny")
        yield work if shape == "tiny" else replace(work, shape=SHAPES[shape]), folder


def _measure(
    shape: str, dtypes: Sequence[str], works: Sequence[str], device: str, report: Report
) -> None:
    """All works and the replies in all precisions; one model of a precision at a time."""
    references: dict[str, Table] = {}
    for dtype in dtypes:
        place = Place(device, DTYPES[dtype], drawn_on=device, passes=Passes(), models={})
        with placed(place):
            for name in works:
                if name == REPLIES:
                    _measure_replies(shape, dtype, place, report)
                    continue
                found = _measure_work(name, shape, dtype, place, references.get(name), report)
                if dtype == dtypes[0] and found is not None:
                    references[name] = found


def _measure_work(
    name: str, shape: str, dtype: str, place: Place, reference: Table | None, report: Report
) -> Table | None:
    """One work with all tools.

    Args:
        name: The work.
        shape: The model's.
        dtype: The model's.
        place: Where models are built.
        reference: What the first loop gave in the first precision; None in this one.
        report: Gets the lines.

    Returns:
        The table of the first loop; None where it failed.
    """
    first: Table | None = None
    own = 0.0
    with _made(name, shape) as (work, folder):
        for tool in _tools(name, shape):
            title = _of(shape, dtype, name, tool)
            with report.step(title):
                line, table = _sweep(tool, work, folder, place)
                if tool == LOOPS[0]:
                    first = table
                    own = 0.0 if reference is None else largest_difference(reference, table)
                expected = first if reference is None else reference
                off = None if expected is None else largest_difference(expected, table)
                _add(report, replace(line, shape=shape, dtype=dtype, off=off))
                if off is None or first is None:
                    continue
                against = Compared(title, off, own, CLOSE)
                is_judged = dtype == "fp32" or reference is not None
                if is_judged and not against.agrees:
                    report.faults.append(str(against))
    return first


def _measure_replies(shape: str, dtype: str, place: Place, report: Report) -> None:
    """All ways to write; texts are compared with those of the first."""
    first: Replies | None = None
    for tool in _tools(REPLIES, shape):
        with report.step(_of(shape, dtype, REPLIES, tool)):
            line, texts = _write(tool, shape, place)
            first = first or texts
            off = sum(a != b for a, b in zip(_flat(first), _flat(texts), strict=True))
            _add(report, replace(line, shape=shape, dtype=dtype, off=off))


def _add(report: Report, line: Line) -> None:
    report.lines.append(line)
    print(line, flush=True)


def _flat(replies: Replies) -> Iterator[list[int]]:
    return (text for cell in replies for text in cell)


def _sweep(name: str, work: Work, folder: Path, place: Place) -> tuple[Line, Table]:
    """Run a work with a tool; the line has neither shape nor precision."""
    tool: Tool = ENTRIES[name].make()
    picks = work.picks() if tool.whole else work.picks(CELLS)
    passes = _passes(place)
    with _default_device(tool, place.device):
        tool.load(work, folder)
        _forget(place.device)
        passes.count = 0
        before = thread_time()
        timed = tool.run(picks)
        host, used, count_of_run = thread_time() - before, _peak(place.device), passes.count
    places, counted = _waits(tool, name, work, folder, place)
    share = count(work.picks()) / count(picks)
    line = Line(
        shape="",
        dtype="",
        work=work.name,
        tool=name,
        seconds=timed.fixed + share * timed.cells,
        memory=used,
        passes=share * count_of_run,
        host=1e3 * host / count_of_run,
        waits=sum(places.values()) / counted,
        off=None,
        places=_named(places),
    )
    return line, timed.table


def _default_device(tool: Tool, device: str) -> Any:
    """Where loops make their tensors; mechdsl knows the device of its model."""
    return nullcontext() if tool.whole else torch.device(device)


def _passes(place: Place) -> Passes:
    assert place.passes is not None
    return place.passes


def _waits(tool: Tool, name: str, work: Work, folder: Path, place: Place) -> tuple[Places, int]:
    """Where the host waits in a second run of some cells, and its passes.

    Without a GPU, a new tool runs on the simulated device.
    """
    picks: Picks = work.picks() if tool.whole else work.picks(1)
    passes, device = _passes(place), torch.device(place.device)
    with ExitStack() as stack:
        if device.type == "cpu":
            simulated = "cpu" if tool.whole else SIMULATED.type
            stack.enter_context(placed(replace(place, device=simulated, models=None)))
            tool, device = ENTRIES[name].make(), SIMULATED
            if isinstance(tool, Mechdsl):
                tool.load(work, folder)
                tool.model = _simulated(tool.model)
        places = stack.enter_context(counted_synchronisations(device))
        stack.enter_context(_default_device(tool, device.type))
        if device == SIMULATED and not tool.whole:
            tool.load(work, folder)
            places.clear()
        passes.count = 0
        tool.run(picks)
    return places, passes.count


def _simulated(model: LoadedModel) -> LoadedModel:
    """The model, moved to the simulated device."""
    to_simulated(model.module)
    return replace(model, device=SIMULATED)


def _named(places: Places) -> dict[str, int]:
    """The most frequent first, ready for JSON."""
    return {" < ".join(reversed(lines)): times for lines, times in places.most_common()}


def _write(name: str, shape: str, place: Place) -> tuple[Line, Replies]:
    """All cells write after all prompts; the line has neither shape nor precision."""
    small = shape == "tiny"
    size = (SMALL_TOKENS, SMALL_REPLY_CELLS) if small else (TOKENS, REPLY_CELLS)
    passes = _passes(place)
    with torch.inference_mode(name != "mechdsl"):
        run = WAYS[name](RandomTask(SHAPES[shape], *size))
        if not small:
            run()  # warms up
        _forget(place.device)
        passes.count = 0
        before, start = thread_time(), perf_counter()
        texts = run()
        finish(place.device)
        seconds, host = perf_counter() - start, thread_time() - before
        used, count_of_run = _peak(place.device), passes.count
    places = _waits_of_replies(run, name, shape, size, place)
    line = Line(
        shape="",
        dtype="",
        work=REPLIES,
        tool=name,
        seconds=seconds,
        memory=used,
        passes=count_of_run,
        host=1e3 * host / count_of_run,
        waits=None if places is None else sum(places.values()) / count_of_run,
        off=None,
        places=_named(places or Places()),
    )
    return line, texts


def _waits_of_replies(
    run: Callable[[], Replies], name: str, shape: str, size: tuple[int, int], place: Place
) -> Places | None:
    """Where the host waits in another run; without a GPU, mechdsl's on the simulated device.

    Loops of `model.generate` don't run on the simulated device.
    """
    if place.device == "cuda":
        with torch.inference_mode(name != "mechdsl"), counted_synchronisations(CUDA) as places:
            run()
        return places
    if name != "mechdsl":
        return None
    with placed(replace(place, models=None)):
        task = RandomTask(SHAPES[shape], *size)
    with counted_synchronisations(SIMULATED) as places:
        run = by_mechdsl(task, _simulated(adopted(task)))
        run()  # warms up
        places.clear()
        run()
    return places


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
