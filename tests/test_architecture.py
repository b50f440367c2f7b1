"""docs/architecture.md matches the code: packages, layers, imports, files and functions."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = [
    contract
    for contract in PROJECT["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
]
LAYERS: list[str] = [
    name for layer in CONTRACTS[0]["layers"][::-1] for name in layer.split(" | ")[::-1]
]
"""From the lowest layer; packages of one layer don't import each other."""
PACKAGES = [name for name in LAYERS if (ROOT / "mechdsl" / name).is_dir()]
FILE = re.compile(r"`((?:mechdsl|tests|grammar|docs|benchmarks|examples)/[\w./]*)(?::([\w.]+))?`")
MAX_FILES = 380
MAX_CHAIN = 25
"""Files in the longest chain of imports."""


def section(title: str) -> str:
    """The text under a heading of the page."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(title: str) -> list[list[list[str]]]:
    """The tables of a section: the cells of each row, without the heading."""
    blocks = re.findall(r"(?m)(?:^\|.*\n)+", section(title))
    rows = [[line.strip("|").split(" | ") for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in row] for row in table[2:]] for table in rows]


def package_docstring(package: str) -> tuple[str, ...]:
    """The input, output and imports that the docstring of a package names."""
    text = (ROOT / "mechdsl" / package / "__init__.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert len(doc.splitlines()) >= 3, f"the docstring of {package} is too short"
    paragraph = " ".join(doc.split("\n\n")[1].split())
    found = re.fullmatch(r"In: (.+?)\. Out: (.+?)\. Imports (.+)\.", paragraph)
    assert found is not None, f"{package} lacks In, Out or Imports: {paragraph}"
    return found.groups()


def subpackages() -> list[Path]:
    every = (ROOT / "mechdsl").glob("*/*/__init__.py")
    return [path.parent for path in every if "zoo" not in path.parts]


@cache
def imported_names(path: Path) -> tuple[tuple[str, str], ...]:
    """(module, name) of every import from mechdsl, wherever it is in the file."""
    return tuple(_imported_names(path))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _imported_names(path: Path) -> Iterator[tuple[str, str]]:
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mechdsl":
            yield from ((node.module or "", alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from ((name, "") for name in names if name.split(".")[0] == "mechdsl")


def imported_packages(package: str) -> set[str]:
    files = (ROOT / "mechdsl" / package).rglob("*.py")
    modules = (f"{module}.{name}" for path in files for module, name in imported_names(path))
    return {module.split(".")[1] for module in modules} - {package}


@cache
def module_files() -> dict[str, Path]:
    """Module → its file, without `zoo`."""
    files = (ROOT / "mechdsl").rglob("*.py")
    paths = [path.relative_to(ROOT) for path in files if "zoo" not in path.parts]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def find_module(module: str, name: str) -> str | None:
    """The file that an import takes a name from; a package's `__init__` may pass it on."""
    files = module_files()
    if f"{module}.{name}" in files:
        return f"{module}.{name}"
    path = files.get(module)
    if path is None or path.name != "__init__.py":
        return module if path is not None else None
    for source, passed_on in imported_names(ROOT / path):
        if passed_on == name:
            return find_module(source, name)
    return None


@cache
def import_graph() -> nx.DiGraph[str]:
    """Module files and their imports; an `__init__` only passes names on."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for module, path in module_files().items():
        if path.name == "__init__.py":
            continue
        graph.add_node(module)
        found = {find_module(*each) for each in imported_names(ROOT / path)}
        graph.add_edges_from((module, other) for other in found if other is not None)
    packages = [module for module in graph if module_files()[module].name == "__init__.py"]
    graph.remove_nodes_from(packages)
    return graph


def names_in(path: Path) -> set[str]:
    """Functions, classes, constants and methods (`Class.method`) of a file."""
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


# --- packages and layers --------------------------------------------------------------------------


def test_package_table_lists_layers_in_order() -> None:
    [table] = tables("Packages")
    assert [row[0].strip("`") for row in table] == LAYERS


@pytest.mark.parametrize("package", PACKAGES)
def test_package_table_repeats_docstring(package: str) -> None:
    [table] = tables("Packages")
    [row] = [row for row in table if row[0] == f"`{package}`"]
    assert tuple(row[1:]) == package_docstring(package)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "cli"])
def test_highest_import_of_package_is_named_first(package: str) -> None:
    highest = re.match(r"(\w+)", package_docstring(package)[2])
    assert highest is not None
    named = "" if highest[1] == "nothing" else highest[1]
    others = imported_packages(package) & set(LAYERS)
    assert max(others, key=LAYERS.index, default="") == named


def test_layers_inside_packages_match_contracts() -> None:
    table, _ = tables("Layers inside a package")
    written = {
        row[0].strip("`"): [re.findall(r"`(\w+)`", layer) for layer in row[1].split(" → ")]
        for row in table
    }
    contracts = {
        contract["containers"][0].removeprefix("mechdsl."): [
            layer.split(" | ") for layer in contract["layers"][::-1]
        ]
        for contract in CONTRACTS[1:]
    }
    assert written == contracts


def test_subpackage_table_repeats_docstrings() -> None:
    _, table = tables("Layers inside a package")
    found: dict[str, str] = {}
    for folder in subpackages():
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        [summary, *_] = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        found[f"`{folder.relative_to(ROOT).as_posix()}/`"] = summary.removesuffix(".")
    assert {row[0]: row[1] for row in table} == found


# --- files ----------------------------------------------------------------------------------------


def test_import_graph_has_no_cycles() -> None:
    circles = [each for each in nx.strongly_connected_components(import_graph()) if len(each) > 1]
    assert [sorted(circle) for circle in circles] == []


def test_longest_chain_of_imports_is_within_limit() -> None:
    chain: list[str] = nx.dag_longest_path(import_graph())
    assert len(chain) <= MAX_CHAIN, chain


def test_number_of_files_is_within_limit() -> None:
    assert 200 < len(module_files()) <= MAX_FILES


# --- names on the page ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({"".join(each) for each in FILE.findall(PAGE)}))
def test_named_file_and_definition_exist(name: str) -> None:
    [(file, inside)] = [each for each in FILE.findall(PAGE) if "".join(each) == name][:1]
    path = ROOT / file
    assert path.exists()
    assert not inside or inside in names_in(path)


def test_every_path_on_the_page_is_checked() -> None:
    """The preceding test reads each name in backticks that looks like a path."""
    written = re.findall(r"`[^`\s]*(?:/|\.py)[^`\s]*`", PAGE)
    assert [each for each in written if FILE.fullmatch(each) is None] == []


def test_steps_of_one_rule_follow_the_layers() -> None:
    [steps, _] = section("One rule, from text to table").split("\n### ")
    packages = re.findall(r"(?m)^\d+\. `mechdsl/(\w+)/", steps)
    assert len(packages) > 20
    places = [LAYERS.index(each) for each in packages]
    assert places == sorted(places)
    # Packages that every stage uses, those that only store data or call the others, and those that
    # this rule doesn't need, have no step.
    without = {"base", "images", "fits", "dictionaries", "diagnostics", "store", "pipeline", "cli"}
    assert set(packages) == set(PACKAGES) - without


def test_no_dataclass_field_is_named_save() -> None:
    """nnsight adds `save` to `object`, and a dataclass would use it as the field's default."""
    found = [
        f"{path.name}: {each.name}"
        for path in sorted(ROOT.glob("mechdsl/**/*.py"))
        for each in nodes_of(path)
        if isinstance(each, ast.ClassDef)
        for field in each.body
        if isinstance(field, ast.AnnAssign) and field.value is None
        if isinstance(field.target, ast.Name) and field.target.id == "save"
    ]
    assert found == []
