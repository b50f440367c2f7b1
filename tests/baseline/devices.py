"""Comparison of values on a device with a baseline written on the CPU, file by file."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from . import compare as values
from . import runs

ABSOLUTE, RELATIVE = 1e-4, 1e-3
"""Absolute and relative tolerance of a value."""


@dataclass(frozen=True)
class Compared:
    """One file of the baseline on a device."""

    name: str
    values: int
    worst: float
    """Largest difference of a value."""
    problem: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.values} values, off by {self.worst:.1e} at most"


def compare(folder: Path, only: str | None, device: str, processes: int) -> int:
    """Run each file of a baseline on a device; exit status 1 if any value differs, 2 if none."""
    paths = values.written(folder, only)
    found: list[Compared] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compare_file, path, device) for path in paths]):
            found.append(one := done.result())
            if one.problem is not None:
                print(f"{one.name}: {one.problem}", flush=True)
    found.sort(key=lambda one: -one.worst)
    for one in found[:5]:
        print(one)
    agree = sum(one.problem is None for one in found)
    total = sum(one.values for one in found)
    print(f"{agree} of {len(found)} files agree with the baseline on {device}, {total} values")
    return 2 if not found else 0 if agree == len(found) else 1


def compare_file(path: Path, device: str) -> Compared:
    """Run a file of a baseline on a device."""
    torch.set_num_threads(1)
    case = json.loads(path.read_text(encoding="utf-8"))
    expected = _values(case["found"])
    try:
        found = _values(runs.again(case, device)["found"])
    except Exception:
        return Compared(path.stem, 0, 0.0, traceback.format_exc(limit=-6))
    if expected.keys() != found.keys():
        return Compared(path.stem, 0, 0.0, "has other tables, cells or errors")
    worst, problem = 0.0, None
    for key, one in expected.items():
        off = 0.0 if one == found[key] else _difference(one, found[key])
        worst = max(worst, off)
        if problem is None and not off <= ABSOLUTE + RELATIVE * abs(one or 0.0):
            problem = f"{key}: {one} in the baseline, {found[key]} on {device}"
    return Compared(path.stem, len(expected), worst, problem)


def _difference(one: float | None, other: float | None) -> float:
    return float("inf") if one is None or other is None else abs(one - other)


def _values(found: runs.Document) -> dict[str, float | None]:
    if "errors" in found:
        return {json.dumps(found["errors"]): None}
    return dict(_named(found))


def _named(found: runs.Document) -> Iterator[tuple[str, float | None]]:
    for key, rows in values.frozen(found).items():
        for row, cells in enumerate(rows):
            for column, value in enumerate(cells):
                yield f"{key}, row {row}, column {column}", value
