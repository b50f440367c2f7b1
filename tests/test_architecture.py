"""docs/architecture.md is true: its packages, its imports, its files and its functions."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LAYERS: list[str] = [
    name
    for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"][::-1]
    for name in layer.split(" | ")[::-1]
]
"""From the bottom; packages of one layer don't import each other."""
PACKAGES = [name for name in LAYERS if (ROOT / "mechdsl" / name).is_dir()]
FILE = re.compile(r"`((?:mechdsl|tests|grammar|docs|benchmarks|examples)/[\w./]*)(?::([\w.]+))?`")


def section(title: str) -> str:
    """What stands below a heading of the page."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table() -> list[list[str]]:
    """The cells of the table of packages, without its head."""
    rows = [line for line in section("The packages").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows[1:]]


def said(package: str) -> tuple[str, ...]:
    """What a package says of itself: what comes in, what goes out, what it imports."""
    text = (ROOT / "mechdsl" / package / "__init__.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert len(doc.splitlines()) >= 3, f"{package} says too little of itself"
    paragraph = " ".join(doc.split("\n\n")[1].split())
    found = re.fullmatch(r"In: (.+?)\. Out: (.+?)\. Imports (.+)\.", paragraph)
    assert found is not None, f"{package} doesn't say In, Out and Imports: {paragraph}"
    return found.groups()


def imported(package: str) -> set[str]:
    """The other packages that the files of one import, wherever they do."""
    found: set[str] = set()
    for path in (ROOT / "mechdsl" / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            parts = [name.split(".") for name in names]
            found.update(part[1] for part in parts if part[0] == "mechdsl" and len(part) > 1)
    return found - {package}


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and constants of a file: `Class.method` for the third."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
            found.update(f"{node.name}.{each.name}" for each in methods)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found.update(each.id for each in targets if isinstance(each, ast.Name))
    return found


def test_the_packages_are_the_layers_in_their_order() -> None:
    assert [row[0].strip("`") for row in table()] == LAYERS


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is(package: str) -> None:
    [row] = [row for row in table() if row[0] == f"`{package}`"]
    assert tuple(row[1:]) == said(package)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "cli"])
def test_a_package_imports_what_it_says(package: str) -> None:
    """The highest package that it names is the highest that it imports."""
    highest = re.match(r"(\w+)", said(package)[2])
    assert highest is not None
    named = "" if highest[1] == "nothing" else highest[1]
    assert max(imported(package), key=LAYERS.index, default="") == named


@pytest.mark.parametrize("name", sorted({"".join(each) for each in FILE.findall(PAGE)}))
def test_what_is_named_exists(name: str) -> None:
    [(file, inside)] = [each for each in FILE.findall(PAGE) if "".join(each) == name][:1]
    path = ROOT / file
    assert path.exists()
    assert not inside or inside in names_in(path)


def test_every_name_of_a_file_is_looked_at() -> None:
    """A name in backquotes that looks like a path is one that the tests above read."""
    written = re.findall(r"`[^`\s]*(?:/|\.py)[^`\s]*`", PAGE)
    assert [each for each in written if FILE.fullmatch(each) is None] == []


def test_the_rule_is_followed_without_coming_back() -> None:
    steps = re.findall(r"(?m)^\d+\. `mechdsl/(\w+)/", section("One rule, from text to table"))
    assert len(steps) > 20
    assert [LAYERS.index(each) for each in steps] == sorted(LAYERS.index(each) for each in steps)
    # What all others stand on, what only calls them in turn, what only keeps, and what this rule
    # doesn't need, has no step.
    around = {"base", "images", "fits", "diagnostics", "store", "generate"}
    assert set(steps) == set(PACKAGES) - around - {"pipeline", "api", "cli"}
