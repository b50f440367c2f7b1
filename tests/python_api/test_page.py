"""docs/python.md: its code runs, and it covers every public name and every command option."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import mechdsl
from mechdsl.cli.entry import app

from ..markdown import fences
from .page import CLASSES as CLASSES_OF_THE_PAGE
from .page import FUNCTIONS, page

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
COMMANDS = {
    "run": "run",
    "fit": "fit",
    "validate": "validate",
    "plan": "plan",
    "graph": "graph",
    "explain": "explain",
}
"""Function → command."""
OTHERWISE = {
    ("run", "--format"),
    ("validate", "--format"),
    ("run", "--junit"),
    ("run", "--no-store"),
    ("fit", "--format"),
    ("fit", "--no-store"),
}
"""Options covered by result methods or by `store=False`; `fit` needs a store."""
CLASSES = [
    mechdsl.Results,
    mechdsl.TrainedFit,
    mechdsl.ExperimentResult,
    mechdsl.Differences,
    mechdsl.Run,
    mechdsl.Diagnostics,
    mechdsl.Diagnostic,
    mechdsl.VerdictComparison,
]


def section(title: str) -> str:
    """The text below a heading, up to the next heading."""
    marks = "#" * (3 if f"\n### {title}\n" in PAGE else 2)
    return re.split(r"\n##+ ", PAGE.split(f"\n{marks} {title}\n")[1])[0]


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    lines = [line.replace("\\|", "/") for line in lines]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def named(title: str) -> list[str]:
    return [row[0].strip("`").removesuffix("()") for row in rows(title)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_python_page_code_runs(inside: Path) -> None:
    values: dict[str, Any] = {}
    for block in fences(PAGE):
        if block.language == "python":
            exec(compile(block.content, "docs/python.md", "exec"), values)
        elif block.language == "text":  # output of the preceding block
            assert repr(values["results"]) + "\n" == block.content
    written = {"heads.mech", "heads.svg", "again.svg", "results.json", "results.csv", "graph.svg"}
    written |= {"verdicts.xml", "trainings", "steer.safetensors"}
    assert {path.name for path in inside.iterdir()} == written
    (measure,) = values["steering"].measures
    assert measure.patched.mean() > measure.base.mean() + 2
    assert (inside / "graph.svg").read_text(encoding="utf-8").startswith("<svg")


def test_reference_equals_the_docstrings() -> None:
    assert page() == PAGE, "run `make python-page`"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_page_describes_each_argument_of_a_function(name: str) -> None:
    arguments = set(inspect.signature(getattr(mechdsl, name)).parameters)
    assert {row[0].strip("`") for row in rows(f"`{name}`")} == arguments


@pytest.mark.parametrize("name", CLASSES_OF_THE_PAGE)
def test_page_describes_each_member_of_a_class(name: str) -> None:
    assert [row[0] for row in rows(f"`{name}`") if not row[1]] == []


def test_shared_arguments_have_the_type_and_default_of_run() -> None:
    """Functions repeat their keyword arguments, so that notebooks complete them."""
    declared = inspect.signature(mechdsl.run).parameters
    for name in set(FUNCTIONS) - {"run"}:
        parameters = inspect.signature(getattr(mechdsl, name)).parameters
        for argument in parameters.keys() & declared.keys():
            found = parameters[argument]
            assert found.default == declared[argument].default, (name, argument)
            if argument != "store":  # only `run` can do without a store
                assert found.annotation == declared[argument].annotation, (name, argument)


def test_page_lists_each_public_name() -> None:
    assert sorted(named("`mechdsl`")) == sorted(mechdsl.__all__)
    assert all(inspect.getdoc(getattr(mechdsl, name)) for name in mechdsl.__all__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_page_lists_each_member_of_a_class(kind: type) -> None:
    own = {name for name in dir(kind) if not name.startswith("_")}
    if hasattr(kind, "__dataclass_fields__"):
        own |= {each.name for each in fields(kind)}  # type: ignore[arg-type]
    inherited = {name for base in kind.__bases__ if base is list for name in dir(base)}
    assert sorted(named(f"`{kind.__name__}`")) == sorted(own - inherited)
    for name in own - inherited:
        member = inspect.getattr_static(kind, name, None)
        if callable(member) or isinstance(member, property):
            assert inspect.getdoc(member), f"{kind.__name__}.{name} has no docstring"


@pytest.mark.parametrize("function", COMMANDS)
def test_page_lists_each_option_with_its_argument(function: str) -> None:
    """The Python argument has the name of the command option."""
    head, *table = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in section("Options").splitlines()
        if line.startswith("|") and "---" not in line
    ]
    column = head.index(function)
    said = {row[0]: row[column] for row in table if row[0] and row[column]}
    options = app.commands[COMMANDS[function]].params
    flags = {each.opts[0] for each in options if isinstance(each, click.Option)}
    assert {name for name in said if name.startswith("--")} == flags
    parameters = inspect.signature(getattr(mechdsl, function)).parameters
    listed = {row[column] for row in table if row[column].isidentifier()}
    assert listed == set(parameters)
    for flag in flags:
        if (function, flag) not in OTHERWISE and flag != "--plugin":  # which is repeated
            assert said[flag] == flag.removeprefix("--").replace("-", "_")
