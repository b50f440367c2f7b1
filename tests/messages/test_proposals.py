"""Applying the proposal of a message to its program removes the mistake."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from mechdsl.diagnostics.core import Diagnostic

from .cases import Case, all_cases

SPACES = ("E0507", "E0519", "W0703", "W0705")
"""Codes that propose a text with different spacing, or different tokens of a text."""
CALL = r"{}\((?:[^()]|\([^()]*\))*\)"


def proposals(found: Diagnostic) -> list[str]:
    """Literal texts and calls in the help."""
    said = re.findall(r"`([^`]+)`", found.help_text)
    return [each for each in said if "…" not in each and re.match(r'"|\w+\(', each)]


def applied(program: str, found: Diagnostic, proposal: str) -> str | None:
    """The program with the invalid text replaced by a proposal; None if the text isn't found."""
    assert found.span is not None
    if proposal.startswith('"'):
        if "end the template without a space" in found.help_text:
            program = program.replace(' "\n', '"\n')
        text = proposal.strip('"').strip()
        return re.sub(rf'"\s*{re.escape(text)}\s*"', lambda _: proposal, program)
    word = proposal.partition("(")[0]
    for call in re.finditer(CALL.format(r"\b\w+"), program):
        inside = call.start() <= found.span.start and found.span.end <= call.end()
        if inside and (call[0].startswith(f"{word}(") or found.code == "E0507"):
            return program[: call.start()] + proposal + program[call.end() :]
    return None


def is_tried(case: Case) -> bool:
    return case.said is not None and (
        any(f"[{code}]" in case.said.content for code in SPACES)
        or ("[E0606]" in case.said.content and "auroc(" in case.program)
    )


CASES = [case for case in all_cases() if is_tried(case)]


def test_each_code_has_proposals() -> None:
    said = " ".join(case.said.content for case in CASES if case.said is not None)
    assert all(f"[{code}]" in said for code in (*SPACES, "E0606"))
    assert len(CASES) > 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_proposal_removes_the_mistake(case: Case, tmp_path: Path) -> None:
    for found in case.check(tmp_path)[1]:
        for proposal in proposals(found) if found.code in (*SPACES, "E0606") else ():
            program = applied(case.program, found, proposal)
            assert program not in (None, case.program), f"`{proposal}` is nowhere to put"
            now = replace(case, program=program).check(tmp_path)[1]
            assert found.code not in [each.code for each in now], f"`{proposal}`: {now}"
