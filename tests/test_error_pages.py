"""Every code has a page, and every page is correct.

The failing file of a page fails with exactly the text shown; the corrected file has no errors.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

import mechdsl.diagnostics
from mechdsl.base import limits
from mechdsl.base.text import Source
from mechdsl.diagnostics.core import CODES, Diagnostic, has_errors
from mechdsl.diagnostics.rendering import render_full

from .cli import conftest as cli
from .execute.breaking import broke_off
from .execute.nan import left_out
from .image_prompts import test_families as families
from .image_prompts import test_vision_encoder as vision
from .markdown import Fence, fences
from .models import broken
from .statistics_files.skewed_family import too_skewed

for _module in pkgutil.iter_modules(mechdsl.diagnostics.__path__):
    importlib.import_module(f"mechdsl.diagnostics.{_module.name}")

PAGES = Path(__file__).parent.parent / "docs" / "errors"
CAUSES = {
    **broken.CAUSES,
    "E0458": lambda: (None, families.miscounted()),
    "E0459": lambda: (None, families.changed_text()),
    "E0650": broke_off,
    "W0742": lambda: (None, vision.unread_blocks("ablate z vision layer 1 at {} with zero")),
    "W0723": too_skewed,
    "W0750": left_out,
}
WHILE_RUNNING = ("E0604", "E0613", "E0621", "E0622", "E0631", "E0641", "W0722", "W0751", "W0762")
"""Codes reported after the unpatched runs or after the cells."""
OWN_PROCESS = ("E0536",)
"""Pages whose command runs in a new process, which imports torch."""
WHILE_TRAINING = ("E0643",)
"""Codes reported by `mechdsl fit`."""
REPORTED_TOGETHER = {"E0231": {"W0710"}, "E0622": {"E0604"}, "W0706": {"W0702"}}
"""Codes → other codes that their pages' examples report, too."""


command = cli.command
"""The fixture."""


@dataclass(frozen=True)
class Page:
    code: str
    text: str

    def program(self, label: str) -> Fence | None:
        """The first fence after `Fails:` or `Corrected:`."""
        return next((each for each in fences(self.text) if each.label == label), None)

    @property
    def message(self) -> Fence:
        return next(each for each in fences(self.text) if each.language == "text" and not each.file)

    def files(self) -> dict[str, str]:
        """Files next to the `.mech` file: fences with a file name."""
        return {each.file: each.content for each in fences(self.text) if each.file}


def pages() -> list[Page]:
    return [Page(p.stem, p.read_text(encoding="utf-8")) for p in sorted(PAGES.glob("*.md"))]


def test_error_codes_and_pages_correspond() -> None:
    assert {page.code for page in pages()} == set(CODES)


@pytest.mark.parametrize("code", sorted(CODES))
def test_error_code_has_title_and_help(code: str) -> None:
    kind = CODES[code]
    assert kind.title, code
    assert kind.help, f"{code} has no help line"
    assert re.fullmatch(r"[EW]0\d{3}", code)


def _diagnose(page: Page, text: str, folder: Path) -> tuple[str, list[Diagnostic]]:
    path = folder / "page.mech"
    path.write_text(text, encoding="utf-8")
    if "data" in page.text:
        shutil.copytree(PAGES / "data", folder / "data")
    for name, content in page.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    from mechdsl.checks.file_check import CheckSettings, check_source
    from mechdsl.syntax.frontend import read_source

    source, found = read_source(path)
    if source is not None:
        # As `mechdsl validate`, which reports W0710 about models that are only checked.
        how = CheckSettings(
            require_models=page.code == "E0401", prompts_enough=limits.CHECKED_PROMPTS
        )
        found = check_source(source, how).diagnostics
        if page.code in WHILE_RUNNING and not found:
            from .run_source import run_source

            found = run_source(source)[1]
        if page.code in WHILE_TRAINING and not found:
            found = _train(source, folder / "store")
    return render_full(found, width=100).replace(str(path), "$FILE"), list(found)


def _train(source: Source, store: Path) -> list[Diagnostic]:
    from mechdsl.checks.file_check import check_source
    from mechdsl.pipeline.options import RunOptions
    from mechdsl.pipeline.trainings import train_file

    return train_file(check_source(source), RunOptions(store=store))[1]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.code, marks=pytest.mark.slow if page.code in OWN_PROCESS else ())
        for page in pages()
    ],
)
def test_error_page_equals_the_reported_message(
    page: Page,
    tmp_path: Path,
    update: bool,
    command: cli.Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert page.text.startswith(f"# {page.code}: ")
    failing = page.program("Fails:")
    assert failing is not None, "the page has no failing file"
    if page.code in CAUSES:  # a model from Python, which no command line has
        _, found = CAUSES[page.code]()
        shown = render_full([d for d in found if d.code == page.code], width=100)
        assert shown, page.code
    elif failing.language == "mech":
        shown, found = _diagnose(page, failing.content, tmp_path)
        assert {d.code for d in found} == {page.code} | REPORTED_TOGETHER.get(page.code, set()), (
            shown
        )
    else:
        monkeypatch.chdir(tmp_path)
        shown = _shell(failing.content, tmp_path, command)
        assert page.code in shown, shown
    shown = re.sub(r"\n\n\d+ (error|warning)s?(, \d+ warnings?)?\n$", "\n", shown)  # the count
    if update:
        text = page.message.replaced(page.text, shown)
        (PAGES / f"{page.code}.md").write_text(text, encoding="utf-8")
    else:
        assert page.message.content == shown
    corrected = page.program("Corrected:")
    assert corrected is not None or failing.language == "sh", "the page has no corrected file"
    if corrected is not None and corrected.language == "mech":
        again = tmp_path / "corrected"
        again.mkdir()
        shown, found = _diagnose(page, corrected.content, again)
        assert not has_errors(found), shown
        assert page.code not in {d.code for d in found}, shown


def _shell(script: str, folder: Path, mechdsl: cli.Command) -> str:
    """Standard error of a script. Lines that call `mechdsl` run in this process, which is faster,
    unless the script sets limits."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    said = ""
    limited = "ulimit" in script
    if limited:  # a limit on file sizes would truncate bytecode files for all later imports
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for ours, lines in groupby(
        script.splitlines(keepends=True), lambda line: line[:8] == "mechdsl " and not limited
    ):
        if ours:
            said += "".join(mechdsl(*shlex.split(line, comments=True)[1:]).err for line in lines)
        else:
            said += subprocess.run(
                ["bash", "-c", "".join(lines)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            ).stderr
    assert "Traceback" not in said
    return said.replace(str(folder), "$FOLDER")
