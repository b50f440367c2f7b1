"""Which tests run a line, and how long they take; kept outside the repository."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .mutants import Mutant
from .server import PACKAGE, ROOT, Collected, Reached, function_of

KEPT = Path(tempfile.gettempdir()) / "mechdsl-mutation"
FILE_LIMIT = 8
"""Seconds of the processor after which no further test of a file is traced."""


def reached(tests: Collected, files: Sequence[Path]) -> Reached:
    """Of the tests of these files."""
    modules = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
    package = hashlib.sha256(b"".join((PACKAGE / name).read_bytes() for name in modules))
    found: Reached = {}
    for file in files:
        key = package.copy()
        key.update(str(file).encode() + (ROOT / file).read_bytes())
        kept = KEPT / f"{file.stem}-{key.hexdigest()[:16]}.json"
        if not kept.exists():
            began = time.monotonic()
            own = tests.reach(file, modules, FILE_LIMIT)
            seconds = time.monotonic() - began
            print(f"{file}: {len(own)} tests, {seconds:.0f} s", file=sys.stderr, flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(own), encoding="utf-8")
        found |= json.loads(kept.read_text(encoding="utf-8"))
    return found


def chosen(mutant: Mutant, reach: Reached, files: Sequence[Path], budget: float) -> list[str]:
    """Tests of these files that run what is changed, quick ones first, for so many seconds."""
    wanted, names = _lines(mutant), set(map(str, files))
    reaching: dict[str, float] = {}
    for test, (seconds, lines) in reach.items():
        own = lines.get(mutant.module)
        if test.partition("::")[0] not in names or own is None:
            continue
        if not wanted or not wanted.isdisjoint(own):
            reaching[test] = seconds
    return _spread(reaching, budget)


def _lines(mutant: Mutant) -> set[int]:
    """Lines that run only with the change; none for any line of the module."""
    if mutant.in_body:
        return set(range(mutant.lines[0], mutant.lines[1] + 1))
    tree = ast.parse((PACKAGE / mutant.module).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        assert node.end_lineno is not None
        if node.lineno <= mutant.lines[0] <= node.end_lineno:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = {node.name}
    return {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names}


def _spread(reaching: dict[str, float], budget: float) -> list[str]:
    """One of each function first, then the rest, each by seconds, until they are too long."""
    first: dict[str, str] = {}
    for test in sorted(reaching, key=reaching.__getitem__):
        first.setdefault(function_of(test), test)
    front = set(first.values())
    left = budget
    found: list[str] = []
    for test in sorted(reaching, key=lambda t: (t not in front, reaching[t])):
        if reaching[test] <= left or not found:
            found.append(test)
            left -= reaching[test]
    return found


def test_files(paths: Iterable[str]) -> list[Path]:
    """Files of tests in folders, in order, each once."""
    found: dict[Path, None] = {}
    for path in paths:
        at = ROOT / path
        for file in sorted(at.rglob("test_*.py")) if at.is_dir() else [at]:
            found.setdefault(file.relative_to(ROOT))
    return list(found)
