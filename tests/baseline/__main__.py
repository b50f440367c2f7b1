"""Write results of all examples and random files, or compare this commit with written results.

python -m tests.baseline --write DIR [--only examples|random] [--count 200]
python -m tests.baseline --against DIR [--only examples|random]
python -m tests.baseline --freeze
python -m tests.baseline --against DIR --device cuda [--only examples|random] [--processes 8]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch

from . import compare, devices, runs


def write(folder: Path, only: str | None, count: int) -> int:
    """Write one file for each example and each random file."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: Iterator[tuple[str, runs.Document]] = chain(
        ((name, runs.example(name)) for name in (runs.NAMES if only != "random" else ())),
        (
            (f"random-{number:03}", case)
            for number, case in enumerate(runs.random_files(count) if only != "examples" else ())
        ),
    )
    written = 0
    for name, case in cases:
        text = json.dumps(case, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        written += 1
    print(f"{written} files written to {folder}")
    return 0


def against(folder: Path, only: str | None) -> int:
    """Compare with a baseline; return exit status 1 if any file differs, 2 without a baseline."""
    paths = compare.written(folder, only)
    if not paths:
        print(f"no baseline in {folder}", file=sys.stderr)
        return 2
    differing = 0
    for path in paths:
        case = json.loads(path.read_text(encoding="utf-8"))
        # Round-trip through JSON, as the expected results.
        found = json.loads(json.dumps(runs.again(case)["found"]))
        where = compare.difference(case["found"], found)
        if where is not None:
            differing += 1
            print(f"{path.name} differs: {where}", flush=True)
    print(f"{len(paths) - differing} of {len(paths)} files are equal bit for bit")
    return 1 if differing else 0


def freeze() -> int:
    """Rewrite the committed values of the examples."""
    values = {name: compare.frozen(runs.example(name)["found"]) for name in runs.FROZEN_NAMES}
    lines: list[str] = []
    for name, found in values.items():
        rows = [f"  {json.dumps(key)}: {json.dumps(each)}" for key, each in found.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n }")
    compare.FROZEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(values)} examples frozen in {compare.FROZEN.name}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.baseline")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="DIR")
    what.add_argument("--against", type=Path, metavar="DIR")
    what.add_argument("--freeze", action="store_true")
    parser.add_argument("--only", choices=["examples", "random"])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--device", help="of --against: values are held, not bits")
    parser.add_argument("--processes", type=int, default=8, help="for --device")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = perf_counter()
    if given.freeze:
        status = freeze()
    elif given.write is not None:
        status = write(given.write, given.only, given.count)
    elif given.device is not None:
        status = devices.compare(given.against, given.only, given.device, given.processes)
    else:
        status = against(given.against, given.only)
    print(f"{perf_counter() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
