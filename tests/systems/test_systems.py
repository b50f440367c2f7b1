"""The files of `examples/systems` are valid, documented, and give the stated results."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.syntax.frontend import read_source

from .__main__ import PAGE, outcomes, page, row
from .files import MOST_LINES, System, read, systems

ALL = systems()
IDS = [each.path.stem for each in ALL]


@pytest.mark.parametrize("system", ALL, ids=IDS)
def test_system_file_is_short_and_valid(system: System) -> None:
    assert len(system.text.splitlines()) <= MOST_LINES
    source, _ = read_source(system.path)
    assert source is not None
    checked = check_source(source, CheckSettings(limit=16, python="run"))
    assert [each for each in checked.diagnostics if each.severity == "error"] == []


@pytest.mark.parametrize("system", ALL, ids=IDS)
def test_system_file_has_an_expectation_and_its_model(system: System) -> None:
    """Without an expectation, the stated result would be unchecked."""
    assert "  expect " in system.text
    imported = "common/fruit.mech" in system.text  # the imported file has the model
    assert imported or system.model in system.text.split("\n\n", 2)[2]


@pytest.mark.parametrize("system", ALL, ids=IDS)
def test_systems_page_lists_each_file_with_claim_and_verdict(system: System) -> None:
    told = PAGE.read_text(encoding="utf-8")
    lines = [line for line in told.splitlines() if f"/{system.path.name})" in line]
    assert len(lines) == 1
    assert system.claim in lines[0]
    assert f"**{system.verdict}**: {system.found}" in lines[0]
    expected = row(system, []).split(" | ")
    assert lines[0].split(" | ")[:4] == expected[:4]


def test_systems_page_lists_exactly_the_existing_files() -> None:
    named = re.findall(r"\(\.\./examples/systems/([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert named == [each.path.name for each in ALL]


@pytest.mark.slow
@pytest.mark.parametrize("system", ALL, ids=IDS)
def test_system_expectations_hold(system: System) -> None:
    found = outcomes(system)
    assert [f"{name}: {each.text}" for name, each in found if not each.holds] == []


@pytest.mark.slow
def test_suffix_of_the_system_file_equals_the_search_result() -> None:
    torch.set_num_threads(1)
    (system,) = [each for each in ALL if each.path.name.startswith("25-")]
    script = runpy.run_path(str(system.path.with_name("suffix_search.py")))
    suffix, value, controls = script["search"]()
    assert f'param suffix = "{suffix}"\n' in system.text
    assert len(controls) == 100
    assert value > max(controls) + 3


def test_system_file_without_header_lines_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "99-nothing.mech"
    path.write_text('mech 1\n\n# Paper: x\n# Claim: y\n\nmodel m = zoo("counting")\n')
    with pytest.raises(ValueError, match="99-nothing"):
        read(path)


def test_systems_page_keeps_rows_of_files_that_were_not_run() -> None:
    name = ALL[0].path.name
    rows = page({name: "| a new row |\n"}).splitlines()
    assert "| a new row |" in rows
    assert f"/{name})" not in "".join(rows)
    assert all(f"/{each.path.name})" in "".join(rows) for each in ALL[1:])
