"""The documentation site: navigation and generated pages are complete, and it builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import mkdocs_hooks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def pages_of(nav: Any) -> list[str]:
    """The pages of a navigation tree, in order."""
    if isinstance(nav, str):
        return [nav]
    if isinstance(nav, dict):
        return [page for value in nav.values() for page in pages_of(value)]
    return [page for item in nav for page in pages_of(item)]


def test_nav_lists_every_page_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = pages_of(config["nav"])
    assert len(listed) == len(set(listed))
    written = {path.name for path in DOCS.glob("*.md")}
    assert set(listed) - set(mkdocs_hooks.generated_pages()) == written


def test_start_page_links_to_every_page_of_the_nav() -> None:
    linked = {
        mkdocs_hooks.page_of(path)
        if mkdocs_hooks.is_generated(path)
        else path.removeprefix("docs/")
        for path in mkdocs_hooks.linked_paths(
            (DOCS / "index.md").read_text(encoding="utf-8"), "docs/index.md"
        )
    }
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert set(pages_of(config["nav"])) - linked == {"index.md"}


def test_error_index_lists_every_error_page() -> None:
    index = mkdocs_hooks.error_index()
    pages = sorted(path.name for path in (DOCS / "errors").glob("*.md"))
    assert len(pages) > 150
    assert sorted(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def test_example_index_lists_every_example_with_a_page() -> None:
    pages = mkdocs_hooks.generated_pages()
    for path in (ROOT / "examples").rglob("*.mech"):
        assert f"{path.relative_to(ROOT)}.md" in pages
    index = mkdocs_hooks.example_index()
    for path in (ROOT / "examples").glob("*.mech"):
        assert f"[{path.name}]({path.name}.md)" in index


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```mech a.mech\nmech 1\n```\n", '```mech title="a.mech"\nmech 1\n```\n'),
        ("```mech add a.mech\n```\n", '```mech title="a.mech, appended"\n```\n'),
        ("Text:\n- one\n- two\n", "Text:\n\n- one\n- two\n"),
        ("- one\n  more\n- two\n", "- one\n  more\n- two\n"),
        ("[e](errors/E0101.md)\n", "[e](errors/E0101.md)\n"),
        ("[c](../CHANGELOG.md#x)\n", "[c](changelog.md#x)\n"),
        ("[e](../examples/ioi.mech)\n", "[e](examples/ioi.mech.md)\n"),
        ("```text\n[e](../README.md)\n```\n", "```text\n[e](../README.md)\n```\n"),
        ("| `a \\| b` | c \\| d |\n", "| `a | b` | c \\| d |\n"),
        ("```\nexperiment e {\n}\n```\n", "```mech\nexperiment e {\n}\n```\n"),
        ("```\nmechdsl run\n```\n", "```\nmechdsl run\n```\n"),
        ("[e](https://example.org/a)\n", "[e](https://example.org/a)\n"),
    ],
)
def test_conversion_matches_github(text: str, expected: str) -> None:
    assert mkdocs_hooks.convert(text, "docs/page.md", "page.md") == expected


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed; `make docs` installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    index = (tmp_path / "errors" / "index.html").read_text(encoding="utf-8")
    assert "E0301" in index
