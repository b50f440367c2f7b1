"""What benchmarks/ imports is there: no other test would notice that a function has moved."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.tools.names import TOOLS

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.stem != "__main__"
)
PEERS = {f"benchmarks.tools.{tool.module}" for tool in TOOLS.values() if tool.is_peer}
"""Modules that import another library, which has an environment of its own."""


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what a file imports of the project, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] in ("benchmarks", "mechdsl"):
            yield from ((node.module, each.name) for each in node.names)


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_imports_what_is_there(name: str) -> None:
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if module not in PEERS:
        import_module(module)
    for where, wanted in imported(ROOT / name):
        if not hasattr(import_module(where), wanted):
            import_module(f"{where}.{wanted}")
