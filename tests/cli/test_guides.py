"""README.md, docs/tutorial.md and docs/cookbook.md: their files and commands run, as a reader would
run them, and print what stands on the page.

Fences are read so: `mech FILE` is a file, `mech add FILE` goes to its end; lines of `sh` are
commands; `text` is a part of what the last one printed; `python` and the steps of `yaml` run too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from ..markdown import Fence, fences
from .conftest import Command

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
COOKBOOK = ROOT / "docs" / "cookbook.md"
PREPARING = {"make demo", "source .venv/bin/activate", "mkdir first", "cd first"}
"""Lines of the tutorial that lead to where these tests are."""
METHODS = [
    "Activation patching",
    "Path patching",
    "Causal tracing",
    "Attention knockout",
    "Ablations",
    "Transplant",
    "Induction heads",
    "Checkpoints",
    "Controls",
    "Check experiments in CI",
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipes() -> dict[str, list[Fence]]:
    found: dict[str, list[Fence]] = {}
    for fence in fences(COOKBOOK.read_text(encoding="utf-8")):
        found.setdefault(fence.heading, []).append(fence)
    return found


def save(fence: Fence) -> Path:
    """The file of a `mech` fence."""
    assert fence.file is not None, f"a file under {fence.heading!r} has no name"
    path = Path(fence.file)
    before = path.read_text(encoding="utf-8") + "\n" if fence.words[0] == "add" else ""
    path.write_text(before + fence.content, encoding="utf-8")
    return path


def ran(command: Command, line: str) -> str:
    """What a line starting with `mechdsl` prints; it must be right."""
    program, *arguments = line.split()
    assert program == "mechdsl"
    done = command(*arguments)
    assert (done.status, done.err) == (0, ""), line
    return done.out


def same(said: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers that are the same but for rounding."""
    if NUMBER.sub("0", said).split() != NUMBER.sub("0", printed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.01, 0.02 * abs(float(b))) for a, b in pairs)


def part_of(printed: str, said: str) -> str:
    """The part of what was printed that the page shows: it begins with the same line."""
    lines, shown = printed.splitlines(), said.splitlines()
    at = next((n for n, line in enumerate(lines) if same(shown[0], line)), None)
    assert at is not None, f"{shown[0]!r} was not printed:\n{printed}"
    return "".join(line.rstrip() + "\n" for line in lines[at : at + len(shown)])


def test_the_tutorial(command: Command, update: bool) -> None:
    page = text = TUTORIAL.read_text(encoding="utf-8")
    printed = ""
    moved = 0  # by what was rewritten so far
    for fence in fences(page):
        if fence.language == "mech":
            path = save(fence)
            assert ran(command, f"mechdsl fmt {path}") == "", "not in canonical form"
        elif fence.language == "sh":
            for line in fence.content.splitlines():
                if line not in PREPARING:
                    printed = ran(command, line)
        elif fence.language == "text":
            shown = part_of(printed, fence.content)
            pairs = zip(fence.content.splitlines(), shown.splitlines(), strict=True)
            if update:
                at = fence.start + moved
                text = text[:at] + shown + text[at + len(fence.content) :]
                moved += len(shown) - len(fence.content)
            else:
                assert all(same(*pair) for pair in pairs), shown
        else:
            assert fence.language == "yaml"
            run_steps(fence, command)
    assert Path("where.png").read_bytes().startswith(b"\x89PNG")
    if update:
        TUTORIAL.write_text(text, encoding="utf-8")


def run_steps(fence: Fence, command: Command) -> None:
    """The steps of a workflow that are commands."""
    lines = re.findall(r"^ +- run: (.*)$", fence.content, re.MULTILINE)
    assert lines[0] == "pip install ./mechdsl-*.whl"
    for line in lines[1:]:
        ran(command, line)


def test_the_cookbook_has_every_method() -> None:
    assert list(recipes()) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe(method: str, command: Command) -> None:
    for fence in recipes()[method]:
        assert len(fence.content.splitlines()) <= 25
        if fence.language == "python":
            exec(compile(fence.content, method, "exec"), {})
        elif fence.language == "sh":
            for line in fence.content.splitlines():
                ran(command, line)
        elif fence.language == "yaml":
            save(recipes()["Induction heads"][0])
            for made in (each for each in recipes()[method] if each.language == "sh"):
                ran(command, made.content)
            run_steps(fence, command)
            assert "<testcase" in Path("verdicts.xml").read_text(encoding="utf-8")
        else:
            path = save(fence)
            assert ran(command, f"mechdsl fmt --check {path}") == "", "not in canonical form"
            printed = ran(command, f"mechdsl run {path}")
            assert printed.count("\nholds  expect ") == fence.content.count("\n  expect ") > 0
            for picture in re.findall(r'to "(.*?)"', fence.content):
                assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_the_files_of_the_readme(command: Command) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second, third = [each for each in fences(page) if each.language == "mech"]
    path = save(first)
    assert ran(command, f"mechdsl fmt --check {path}") == ""
    assert "report heatmap written to heads.png" in ran(command, f"mechdsl run {path}")
    assert Path("heads.png").read_bytes().startswith(b"\x89PNG")
    path = save(second)
    assert ran(command, f"mechdsl fmt --check {path}") == ""
    printed = ran(command, f"mechdsl run {path}")
    assert "null: range of 39 draws of random directions" in printed
    assert "\nholds  expect max(delta) > 0" in printed
    assert "\nlooked_at.lens: " in printed
    assert "\nlooked_at.written: " in printed
    assert "moved → clean" in printed
    with safe_open("streams.safetensors", "np") as streams:
        assert {f"resid_post.layer{n}" for n in range(4)} < set(streams.keys())
    path = save(third)
    assert ran(command, f"mechdsl fmt --check {path}") == ""
    printed = ran(command, f"mechdsl run {path}")
    assert "\nholds  expect contains > 0.6" in printed
    assert "\nanswered: replies" in printed
    assert "\nword_by_word: kl(clean)" in printed


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/tutorial.md",
        "docs/cookbook.md",
        "docs/own-models.md",
        "docs/runs-and-saves.md",
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
