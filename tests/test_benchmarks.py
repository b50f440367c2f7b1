"""Imports of benchmarks/ exist, which no other test checks, and tools agree on values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks.chart import CHART, RESULTS, bars, draw
from benchmarks.data import make
from benchmarks.measure import CLOSE, EXPERT, REFERENCE
from benchmarks.tools.names import TOOLS

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "benchmarks").rglob("*.py")
    if path.stem != "__main__"
)
PEERS = {f"benchmarks.tools.{tool.module}" for tool in TOOLS.values() if tool.is_peer}
"""Modules that import another library, which has a separate environment."""


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of each import from the project in a file, including within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] in ("benchmarks", "mechdsl"):
            yield from ((node.module, each.name) for each in node.names)


@pytest.mark.parametrize("name", FILES)
def test_imports_of_a_benchmark_exist(name: str) -> None:
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if module not in PEERS:
        import_module(module)
    for where, wanted in imported(ROOT / name):
        if not hasattr(import_module(where), wanted):
            import_module(f"{where}.{wanted}")


@pytest.mark.parametrize("name", ["W1a", "W2", "W3", pytest.param("W4", marks=pytest.mark.slow)])
def test_expert_loop_equals_the_plain_loop(name: str, tmp_path: Path) -> None:
    work = make(name, tmp_path / name, ioi=None, small=True)
    tables: list[np.ndarray] = []
    for tool in (TOOLS[REFERENCE].make(), TOOLS[EXPERT].make()):
        tool.load(work, tmp_path / name)
        tables.append(tool.run(work.picks()).table)
    plain, expert = tables
    assert np.isfinite(plain).all()
    assert np.nanstd(plain) > 100 * CLOSE
    np.testing.assert_allclose(expert, plain, rtol=0, atol=CLOSE)


def test_chart_and_readme_state_the_stored_results() -> None:
    results = RESULTS.read_text(encoding="utf-8")
    assert CHART.read_text(encoding="utf-8") == draw(results), "run `python -m benchmarks.chart`"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    seconds = {bar.name: bar.seconds for bar in bars(results)}
    assert f"mechdsl {seconds['mechdsl']}" in readme
    assert f"TransformerLens {seconds['TransformerLens']}" in readme
    ratios = [float(n) for n in re.findall(r"([\d.]+)× the fastest other library", results)]
    assert f"In the {len(ratios)} sweeps".replace("6", "six") in " ".join(readme.split())
    assert f"{min(ratios)} to {max(ratios)} times as fast as the fastest other library" in readme
