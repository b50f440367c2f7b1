"""The tests that cover a line, and their duration; cached outside the repository."""

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
from .server import PACKAGE, ROOT, Collected, Reached

KEPT = Path(tempfile.gettempdir()) / "mechdsl-mutation"
FILE_LIMIT = 60
"""CPU seconds after which no further test of a file is traced."""


def reached(tests: Collected, files: Sequence[Path]) -> Reached:
    """Coverage and duration of the tests of these files."""
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
    """Tests of these files that cover the change, for `budget` seconds.

    First those that together cover most of the module in the least time, then the fastest.
    """
    wanted, names = _lines(mutant), set(map(str, files))
    reaching: dict[str, tuple[float, set[int]]] = {}
    for test, (seconds, lines) in reach.items():
        own = set(lines.get(mutant.module, ()))
        if test.partition("::")[0] in names and own and (not wanted or wanted & own):
            reaching[test] = seconds, own
    found: dict[str, None] = {}
    covered: set[int] = set()
    while rest := [t for t in reaching if t not in found and reaching[t][1] - covered]:
        best = max(rest, key=lambda t: len(reaching[t][1] - covered) / (0.1 + reaching[t][0]))
        found[best] = None
        covered |= reaching[best][1]
    found |= dict.fromkeys(sorted(reaching, key=lambda t: reaching[t][0]))
    left = budget
    taken: list[str] = []
    for test in found:
        if reaching[test][0] <= left or not taken:
            taken.append(test)
            left -= reaching[test][0]
    return taken


def _lines(mutant: Mutant) -> set[int]:
    """Lines of the change; empty means any line of the module."""
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
    functions = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]
    inside = (node for each in functions for part in each.body for node in ast.walk(part))
    return {n.lineno for n in inside if isinstance(n, ast.Name) and n.id in names}


def test_files(paths: Iterable[str]) -> list[Path]:
    """Test files in folders, in order, each once."""
    found: dict[Path, None] = {}
    for path in paths:
        at = ROOT / path
        for file in sorted(at.rglob("test_*.py")) if at.is_dir() else [at]:
            found.setdefault(file.relative_to(ROOT))
    return list(found)
