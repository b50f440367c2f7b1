"""Runs one work on several tools in turns, and works out what is shown of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.bound import multiply_adds
from benchmarks.clients import Client, WorkerFailed
from benchmarks.tools.base import Table
from benchmarks.tools.names import TOOLS
from benchmarks.work import Picks, Work, count

REFERENCE = "plain"
EXPERT = "expert"
OURS = "mechdsl"
CLOSE = 1e-4
"""Logits: how far the tables of two tools may be apart."""
AIM, AIM_OF_BOUND = 1.5, 0.9
"""mechdsl against the expert's loop: so many times faster, or so much of what the bound allows."""


@dataclass(frozen=True)
class Schedule:
    """How often and how much."""

    repeats: int
    peer_repeats: int
    cells: int | None
    """Cells that loops run: a number, or None to decide by `longest`."""
    longest: float
    """Seconds: loops that would take longer run a sample."""
    sample: int
    """Cells of that sample."""
    threads: int


@dataclass
class Runs:
    """All runs of one tool on one work."""

    tool: str
    picks: Picks
    everything: int
    """Cells in all batches together."""
    versions: dict[str, str]
    seconds: list[float] = field(default_factory=list[float])
    """Per round; where cells were sampled, of all cells: fixed + in cells × all / sampled."""
    before: float = 0.0
    """MiB that are resident before a run: libraries, weights."""
    peak: float = 0.0
    """MiB that are resident at most during a run."""
    difference: float = float("nan")
    """Logits: the largest distance from the reference's table."""
    failure: str | None = None

    @property
    def sampled(self) -> bool:
        return count(self.picks) < self.everything


@dataclass
class Measured:
    """One work on all tools."""

    work: Work
    runs: dict[str, Runs]
    multiply_adds: int
    """The lower bound."""
    rates: list[float] = field(default_factory=list[float])
    """Multiply-adds per second, per round."""
    spread: float = float("nan")
    """Logits: standard deviation over cells, mean over rows."""

    @property
    def bound(self) -> float:
        """Seconds."""
        return self.multiply_adds / median(self.rates)

    def ratio(self, slow: str, fast: str) -> float | None:
        """How many times faster `fast` is: the median over the rounds that both have."""
        if slow not in self.runs or fast not in self.runs:
            return None
        pairs = list(zip(self.runs[slow].seconds, self.runs[fast].seconds, strict=False))
        return median(a / b for a, b in pairs) if pairs else None

    def is_right(self, tool: str) -> bool:
        """Whether a tool ran and every cell of it is the reference's."""
        runs = self.runs.get(tool)
        return runs is not None and runs.failure is None and runs.difference <= CLOSE

    @property
    def target(self) -> float | None:
        """How many times faster than the expert's loop mechdsl is meant to be."""
        runs = self.runs.get(EXPERT)
        if runs is None or not runs.seconds:
            return None
        return min(AIM, AIM_OF_BOUND * median(runs.seconds) / self.bound)

    @property
    def fastest_peer(self) -> str | None:
        """The fastest of the other libraries."""
        ran = {
            name: median(runs.seconds)
            for name, runs in self.runs.items()
            if TOOLS[name].is_peer and runs.seconds and runs.failure is None
        }
        return min(ran, key=lambda name: ran[name]) if ran else None

    @property
    def agrees(self) -> bool:
        """Whether every tool that ran gave the reference's table."""
        reference = self.runs.get(REFERENCE)
        return (reference is None or reference.failure is None) and all(
            self.is_right(name) for name in self.runs if name != REFERENCE
        )


def measure(
    work: Work,
    folder: Path,
    tools: Sequence[str],
    schedule: Schedule,
    say: Callable[[str], None],
) -> Measured:
    """Rounds of A B C A B C, with a matmul before every round; nothing else runs meanwhile."""
    found = Measured(work, {}, multiply_adds(work))
    clients: dict[str, Client] = {}
    rate = Client("rate", schedule.threads, folder / "rate.log")
    tables: dict[str, Table] = {}
    try:
        for name in tools:
            say(f"{work.name}: {name} is loading")
            clients[name] = Client(name, schedule.threads, folder / f"{name}.log")
            found.runs[name] = _load(clients[name], work, folder, schedule)
        for number in range(max(schedule.repeats, schedule.peer_repeats)):
            found.rates.append(rate.ask(do="rate")["rate"])
            for name in tools:
                rounds = schedule.peer_repeats if TOOLS[name].is_peer else schedule.repeats
                runs = found.runs[name]
                if number >= rounds or runs.failure is not None:
                    continue
                say(f"{work.name}: {name}, round {number + 1} of {rounds}")
                to = folder / f"{name}.npy"
                try:
                    _run(clients[name], runs, to)
                except WorkerFailed as failure:
                    runs.failure = str(failure)
                    continue
                tables[name] = np.load(to)
                _compare(found, name, tables)
    finally:
        for client in (rate, *clients.values()):
            client.close()
    return found


def _load(client: Client, work: Work, folder: Path, schedule: Schedule) -> Runs:
    everything = work.picks()
    runs = Runs(client.name, everything, count(everything), {})
    try:
        loaded = client.ask(do="load", folder=str(folder))
        runs.versions = loaded["versions"]
        if loaded["whole"]:
            return runs
        if schedule.cells is not None:
            runs.picks = work.picks(schedule.cells)
            return runs
        tried = work.picks(16)
        answer = client.ask(do="run", picks=tried, to=str(folder / "tried.npy"))
        if answer["cells"] / count(tried) * runs.everything > schedule.longest:
            runs.picks = work.picks(schedule.sample)
    except WorkerFailed as failure:
        runs.failure = str(failure)
    return runs


def _run(client: Client, runs: Runs, to: Path) -> None:
    answer = client.ask(do="run", picks=runs.picks, to=str(to))
    scale = runs.everything / count(runs.picks)
    runs.seconds.append(answer["fixed"] + answer["cells"] * scale)
    runs.before = answer["before"]
    runs.peak = max(runs.peak, answer["peak"])


def _compare(found: Measured, name: str, tables: dict[str, Table]) -> None:
    """Hold a table against the cells that were asked for, and against the reference's."""
    runs = found.runs[name]
    table = tables[name]
    if not np.array_equal(np.isfinite(table), _asked(found.work, runs.picks)):
        runs.failure = f"{name}: values are missing, or there are some that weren't asked for"
        return
    reference = tables.get(REFERENCE)
    if reference is None:
        return
    if name == REFERENCE:
        several = np.isfinite(reference).sum(axis=0) > 1
        found.spread = float(np.nanstd(reference[:, several], axis=0).mean())
    distance = np.abs(table - reference)
    if not np.isfinite(distance).any():
        runs.failure = f"{name}: no cell that {REFERENCE} ran"
        return
    worst = float(np.nanmax(distance))
    runs.difference = worst if np.isnan(runs.difference) else max(runs.difference, worst)


def _asked(work: Work, picks: Picks) -> np.ndarray:
    """[cell, row]: whether a value has to be there."""
    asked = np.zeros((len(work.cells), work.n_rows), dtype=np.bool_)
    for batch, chosen in zip(work.batches, picks, strict=True):
        asked[np.ix_(chosen, batch.rows)] = True
    return asked
