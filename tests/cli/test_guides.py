"""README.md, docs/tutorial.md, docs/cookbook.md and other guides: their files and commands run, as
a reader would run them, and print what the page shows.

Rules for fences: `mech FILE` and `python FILE` are files, `mech add FILE` appends to one; lines
of `sh` are commands; `text` is a part of what the last one printed; `python` and the steps of
`yaml` run too.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from ..markdown import Fence, fences
from ..quick import some
from .conftest import Command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PICTURES = {"README.md": "heads.png", "docs/figures.md": "circuit.png"}
"""Page → the picture that one of its files draws."""
TUTORIAL = DOCS / "tutorial.md"
COOKBOOK = DOCS / "cookbook.md"
PREPARING = {
    "make demo",
    "make test",
    "pip install .",
    "mechdsl validate experiment.mech",
    'pip install ".[run]"',
    'pip install "mechdsl[offload]"',
    "mechdsl run --offload FOLDER experiment.mech",
    "source .venv/bin/activate",
    "mkdir first",
    "cd first",
}
"""Lines that set up an environment, or need a model that is not in the package."""
PLACEHOLDER = "(model, tokenizer)"
"""Code with it needs the reader's model."""
METHODS = [
    "Activation patching",
    "Path patching",
    "Causal tracing",
    "Attention knockout",
    "Check an estimator",
    "Ablations",
    "Transplant",
    "Induction heads",
    "Faithfulness of a circuit",
    "Choose heads by scores",
    "Search for a group of heads",
    "Discover a circuit",
    "Edges of a circuit",
    "Give edges positions",
    "Use neurons as nodes",
    "Checkpoints",
    "Controls",
    "Check experiments in CI",
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipes() -> dict[str, list[Fence]]:
    found: dict[str, list[Fence]] = {}
    for fence in fences(COOKBOOK.read_text(encoding="utf-8")):
        found.setdefault(fence.heading, []).append(fence)
    return found


def save(fence: Fence) -> Path:
    """Write the file of a `mech` or `python` fence and return its path."""
    assert fence.file is not None, f"a file under {fence.heading!r} has no name"
    path = Path(fence.file)
    before = path.read_text(encoding="utf-8") + "\n" if fence.words[0] == "add" else ""
    path.write_text(before + fence.content, encoding="utf-8")
    return path


def ran(command: Command, line: str) -> str:
    """Run a `mechdsl` line that must succeed, and return its output."""
    program, *arguments = line.split()
    assert program == "mechdsl"
    done = command(*arguments)
    assert (done.status, done.err) == (0, ""), line
    return done.out


def same(said: str, printed: str) -> bool:
    """Return whether two lines have equal words, and equal numbers up to rounding."""
    if NUMBER.sub("0", said).split() != NUMBER.sub("0", printed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    if re.match(r"\d+ of \d+ cells survive", said):
        # Whether a cell exceeds the rounding bound may depend on the CPU.
        return all(abs(int(float(a)) - int(float(b))) <= 1 for a, b in list(pairs)[:2])
    return all(abs(float(a) - float(b)) <= max(0.01, 0.02 * abs(float(b))) for a, b in pairs)


def without_seconds(table: str) -> list[str]:
    """Return the lines of a table without its last column if that is a duration."""
    lines = table.splitlines()
    if not lines[0].endswith("seconds"):
        return lines
    return [line.rpartition(" ")[0] for line in lines]


def part_of(printed: str, said: str) -> str:
    """Return the printed lines that the page shows, from its first line on."""
    lines, shown = printed.splitlines(), said.splitlines()
    at = next((n for n, line in enumerate(lines) if same(shown[0], line)), None)
    assert at is not None, f"{shown[0]!r} was not printed:\n{printed}"
    return "".join(line.rstrip() + "\n" for line in lines[at : at + len(shown)])


def run_page(
    path: Path, command: Command, update: bool, headings: Collection[str] | None = None
) -> None:
    """Run the files and commands of a page in their order and compare what they print.

    Args:
        headings: Sections to run; None: all.
    """
    page = text = path.read_text(encoding="utf-8")
    printed = ""
    moved = 0  # offset of the text rewritten so far
    for fence in fences(page):
        if headings is not None and fence.heading not in headings:
            continue
        if fence.language == "mech":
            file = save(fence)
            assert ran(command, f"mechdsl fmt {file}") == "", "not in canonical form"
        elif fence.language == "sh":
            for line in fence.content.splitlines():
                code = line.partition("  #")[0].strip()
                if code not in PREPARING:
                    printed = ran(command, code)
        elif fence.language == "text":
            shown = part_of(printed, fence.content)
            pairs = zip(without_seconds(fence.content), without_seconds(shown), strict=True)
            if update:
                at = fence.start + moved
                text = text[:at] + shown + text[at + len(fence.content) :]
                moved += len(shown) - len(fence.content)
            else:
                assert all(same(*pair) for pair in pairs), shown
        elif fence.language == "python":
            if fence.file is None:
                run_code(fence, path.name)
            else:
                save(fence)
        else:
            assert fence.language == "yaml"
            run_steps(fence, command)
    if update:
        path.write_text(text, encoding="utf-8")


def test_tutorial_runs_and_draws_its_picture(command: Command, update: bool) -> None:
    run_page(TUTORIAL, command, update)
    assert Path("where.png").read_bytes().startswith(b"\x89PNG")


def run_code(fence: Fence, name: str) -> None:
    """Run Python code that names no model of the reader."""
    if PLACEHOLDER not in fence.content:
        exec(compile(fence.content, name, "exec"), {})


def run_steps(fence: Fence, command: Command) -> None:
    """Run the commands in the steps of a workflow."""
    lines = re.findall(r"^ +- run: (.*)$", fence.content, re.MULTILINE)
    assert lines[0] == 'pip install "$(echo ./mechdsl_core-*.whl)[run]"'
    for line in lines[1:]:
        ran(command, line)


def test_cookbook_has_every_method() -> None:
    assert list(recipes()) == METHODS


@pytest.mark.parametrize("method", some(METHODS, METHODS[1:4:2]))
def test_recipe_runs_and_its_expectations_hold(
    method: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fence in recipes()[method]:
        assert len(fence.content.splitlines()) <= 40
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
            if re.search(r" = fit\(|^  (discover|search) ", fence.content, re.M):
                monkeypatch.delenv("MECHDSL_STORE")
                assert command("fit", str(path)).status == 0
            printed = ran(command, f"mechdsl run {path}")
            assert printed.count("\nholds  expect ") == fence.content.count("\n  expect ") > 0
            for picture in re.findall(r'to "(.*?)"', fence.content):
                assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_readme_runs_and_shows_the_printed_table(command: Command, update: bool) -> None:
    run_page(README, command, update)
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PICTURES)
def test_page_picture_equals_the_picture_drawn_by_its_file(
    page: str, command: Command, update: bool
) -> None:
    name = PICTURES[page]
    every = fences((ROOT / page).read_text(encoding="utf-8"))
    (file,) = (f for f in every if f.language == "mech" and f'to "{name}"' in f.content)
    Path("page.mech").write_text(file.content, encoding="utf-8")
    ran(command, "mechdsl run page.mech")
    with Image.open(name) as picture:
        drawn = picture.convert("RGB")
    if update:
        drawn.quantize(256).save(DOCS / name, optimize=True)
    with Image.open(DOCS / name) as picture:
        shown = picture.convert("RGB")
    assert shown.size == drawn.size
    difference = np.abs(np.asarray(shown, dtype=float) - np.asarray(drawn, dtype=float))
    assert difference.mean() < 2


@pytest.mark.slow
def test_tour_runs_and_shows_the_printed_tables(command: Command, update: bool) -> None:
    run_page(DOCS / "tour.md", command, update)
    assert Path("heads.png").read_bytes().startswith(b"\x89PNG")
    with safe_open("streams.safetensors", "np") as streams:
        assert {f"resid_post.layer{n}" for n in range(4)} < set(streams.keys())


@pytest.mark.parametrize(
    "page",
    [
        *("commands.md", "estimators.md", "install.md"),
        pytest.param("load-models.md", marks=pytest.mark.slow),
    ],
)
def test_page_commands_run(page: str, command: Command, update: bool) -> None:
    run_page(DOCS / page, command, update)


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        "Find independent components",
        *(
            pytest.param(heading, marks=pytest.mark.slow)
            for heading in (
                "Factor activations",
                "Correlate two sites",
                "Find clusters",
                "Compare with a random or an untrained control",
                "Test a group as a circuit",
                "Use features as nodes of edges",
                "Choose sites by scores",
            )
        ),
    ],
)
def test_bases_page_section_runs(
    section: str, command: Command, update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")
    run_page(DOCS / "bases.md", command, update, {section})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "section"),
    [
        ("observations.md", "Train a probe once"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("bases.md", "Find the circuit of a task"),
                ("bases.md", "Write a trainer"),
                ("observations.md", "Train a tuned lens"),
                ("steering.md", "Train an edit"),
            )
        ),
    ],
)
def test_section_with_a_training_runs(
    page: str, section: str, command: Command, update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")
    run_page(DOCS / page, command, update, {section})


@pytest.mark.slow
def test_trained_dictionary_section_runs(
    command: Command, update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")  # `fit` and `run` share the store next to the file
    run_page(DOCS / "bases.md", command, update, {"Train a dictionary"})
    card = Path("dictionaries/f/README.md").read_text(encoding="utf-8")
    assert card.startswith("# f: topk SAE with k 8\n")
    assert {path.name for path in Path("dictionaries").iterdir()} == {"f", "untrained"}
    example = Path("again.mech")
    text = Path("trained.mech").read_text(encoding="utf-8")
    before, _, rest = text.partition("basis f = ")
    copied = 'basis f = sae("dictionaries/f") at resid_post layer 0\n'
    example.write_text(before + copied + rest.partition("\n")[2], encoding="utf-8")
    done = command("run", "again.mech")
    assert (done.status, done.out.count("\nholds  expect ")) == (0, 2)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/cheat-sheet.md",
        "docs/commands.md",
        "docs/estimators.md",
        "docs/index.md",
        "docs/install.md",
        "docs/load-models.md",
        "docs/tour.md",
        "docs/tutorial.md",
        "docs/cookbook.md",
        "docs/own-models.md",
        "docs/runs-and-saves.md",
    ],
)
def test_page_links_exist(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
