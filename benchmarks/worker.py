"""A process that serves one tool: a line of JSON in, a line of JSON out.

    {"do": "load", "folder": PATH}                      → versions; `whole`: all cells or none
    {"do": "run", "picks": [[cell, …], …], "to": PATH}  → seconds, MiB; the table goes to the file
    {"do": "rate"}                                      → multiply-adds per second

`rate` needs no tool. The process ends with its input.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bound import matmul_rate
from benchmarks.tools.base import Tool
from benchmarks.tools.names import TOOLS
from benchmarks.work import Work


def main() -> None:
    """Serve the tool whose name is the argument, `rate` for none."""
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    name = sys.argv[1]
    tool: Tool | None = None if name == "rate" else TOOLS[name].make()
    for line in sys.stdin:
        try:
            answer = _serve(tool, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _serve(tool: Tool | None, command: dict[str, Any]) -> dict[str, Any]:
    if tool is None:
        return {"rate": matmul_rate()}
    if command["do"] == "load":
        folder = Path(command["folder"])
        tool.load(Work.read(folder / "work.json"), folder)
        give_back()
        return {"versions": {n: version(n) for n in tool.packages}, "whole": tool.whole}
    give_back()
    before = memory("VmRSS")
    forget_peak()
    timed = tool.run(command["picks"])
    np.save(command["to"], timed.table)
    return {
        "fixed": timed.fixed,
        "cells": timed.cells,
        "before": before,
        "peak": memory("VmHWM"),
    }


def memory(field: str) -> float:
    """A field of /proc/self/status in MiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) / 1024 if found else float("nan")


def forget_peak() -> None:
    """Let the peak begin at what is resident now; without the right to, it is the process's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Give what loading and earlier runs have freed back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
