"""How many tokens go into one pass: found by measuring, and held to the memory there is."""

from __future__ import annotations

import gc
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mechdsl.hooks.loaded import LoadedModel
from mechdsl.plan.plan import PASS_TOKENS
from mechdsl.prompts.table import PromptTable

LEAST_TOKENS = 256
MOST_TOKENS = 1 << 17
KEPT_SHARE = 0.25
"""Of the free memory, what unpatched runs may keep for the rows that start from them."""


def free_memory(device: torch.device) -> int:
    """Bytes that can be had without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line.split() for line in lines if line.startswith("MemAvailable"))
        available = int(found[1]) * 1024
    except (OSError, StopIteration, ValueError):
        available = 4 << 30
    return min(available, _group_limit())


def _group_limit() -> int:
    """What a container leaves."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 1 << 62


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass
class PassSize:
    """The number of tokens of the next pass.

    Sizes are powers of two times `PASS_TOKENS`. The next larger and the next smaller one are tried
    now and then on passes that are full; the one with the most tokens per second is kept.
    """

    device: torch.device
    bytes_per_token: int
    """Of the largest tensors that are alive at once."""
    fixed: int | None = None
    """A size that is given; nothing is measured then."""
    limit: int = MOST_TOKENS
    rates: dict[int, float] = field(default_factory=dict[int, float])
    """Size → blocks of tokens per second, of the fastest pass."""
    current: int = PASS_TOKENS

    def __post_init__(self) -> None:
        if self.fixed is not None:
            self.current = self.limit = self.fixed
            return
        room = int(free_memory(self.device) * 0.5) // max(1, self.bytes_per_token)
        self.limit = max(LEAST_TOKENS, min(MOST_TOKENS, room))
        if self.device.type != "cpu":
            self.current *= 8
        self.current = min(self.current, self.limit)

    def measured(self, tokens: int, work: float, seconds: float) -> None:
        """A pass of so many tokens did this work. Small passes tell nothing about sizes."""
        if self.fixed is not None or tokens < 0.7 * self.current or seconds <= 0:
            return
        self.rates[self.current] = max(self.rates.get(self.current, 0.0), work / seconds)
        best = max(self.rates, key=lambda size: self.rates[size])
        for near in (best * 2, best // 2):
            if near not in self.rates and LEAST_TOKENS <= near <= self.limit:
                self.current = near
                return
        self.current = best

    def halve(self) -> bool:
        """After running out of memory; false where nothing smaller is worth trying."""
        if self.current <= 1:
            return False
        self.current = self.limit = max(1, self.current // 2)
        self.rates = {size: rate for size, rate in self.rates.items() if size <= self.limit}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


@contextmanager
def stopwatch(device: torch.device) -> Generator[list[float]]:
    """A list that gets the seconds of what is run inside, with all that the device has to do."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - start)


def bytes_per_token(model: LoadedModel) -> int:
    """Of what one pass holds at once for a token: the MLP, the stream, queries, keys and values."""
    shape = model.shape
    heads = shape.n_heads * shape.d_head
    return model.dtype.itemsize * (3 * shape.d_mlp + 12 * shape.d_model + 6 * heads)


def kept_bytes(model: LoadedModel, table: PromptTable) -> int:
    """Of what unpatched runs keep for a token of a prompt, in all blocks and runs."""
    shape = model.shape
    heads, shared = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    width = 3 * shape.d_model + 2 * heads + 4 * shared
    return max(1, model.dtype.itemsize * width * shape.n_layers * len(table.runs))
