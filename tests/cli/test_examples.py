"""`mechdsl examples` and `mechdsl explain language`: files of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

import mechdsl

from .conftest import Command

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FILES = {
    path.relative_to(EXAMPLES): path
    for end in ("mech", "jsonl")
    for path in EXAMPLES.rglob(f"*.{end}")
}


def test_examples_copies_all_files(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("examples")
    assert (done.status, done.err) == (0, "")
    assert done.out == f"copied {len(FILES)} files to mechdsl-examples\n"
    copied = Path("mechdsl-examples")
    for name, path in FILES.items():
        assert (copied / name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert command("validate", copied / "countscope.mech").status == 0
    assert command("validate", copied / "systems" / "12-recall-or-reading.mech").status == 0


def test_examples_overwrites_no_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "counting.mech").write_text("mine", encoding="utf-8")
    (tmp_path / "system2.mech").symlink_to(tmp_path / "nowhere")
    done = command("examples", tmp_path)
    assert done.status == 0
    assert done.out == f"copied {len(FILES) - 2} files to {tmp_path}\n"
    assert done.err.splitlines() == [
        f"{tmp_path / name} already exists and was left unchanged"
        for name in ("counting.mech", "system2.mech")
    ]
    assert (tmp_path / "counting.mech").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_examples_into_a_file_is_an_error(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("examples", tmp_path / "file")
    assert (done.status, done.out) == (2, "")
    assert "error[E0208]: cannot write" in done.err


def test_examples_list_prints_names_and_copies_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("examples", "--list")
    assert done.status == 0
    names = [line.split()[0] for line in done.out.splitlines()]
    top = [name for name in FILES if name.parent == Path() and name.suffix == ".mech"]
    assert names == sorted(map(str, top))
    assert all(line.endswith((".", "?")) for line in done.out.splitlines())
    assert not list(tmp_path.iterdir())
    assert "[E0208]: `--list` copies nothing" in command("examples", "--list", "here").err


def test_explain_language_prints_the_language_page(command: Command) -> None:
    page = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    assert command("explain", "language").out == page
    assert mechdsl.explain("language") == page
