"""A wheel contains files from outside the package: grammar, pages and examples."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LANGUAGE = ROOT / "docs" / "language.md"

PROGRAM = """
import mechdsl, mechdsl.diagnostics.command_line, mechdsl.syntax.parser_tables as tables
from pathlib import Path
assert Path(mechdsl.__file__).is_relative_to(Path(r"{site}")), mechdsl.__file__
assert "E0301" in mechdsl.diagnostics.command_line.read_page("E0301")
assert mechdsl.explain("language") == Path(r"{language}").read_text(encoding="utf-8")
assert tables.grammar_file().is_relative_to(Path(r"{site}"))
def build(grammar):
    raise AssertionError("the wheel's tables aren't those of its grammar")
tables.build = build
assert mechdsl.validate(Path(r"{file}")) == []
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True, capture_output=True)
    site = folder / "site"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(site)
    return site


@pytest.mark.slow
def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    file = tmp_path / "fruit.mech"
    file.write_text((ROOT / "examples/counting.mech").read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    subprocess.run(
        [sys.executable, "-c", PROGRAM.format(site=wheel, file=file, language=LANGUAGE)],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    copying = [sys.executable, "-m", "mechdsl", "examples", "copied"]
    subprocess.run(copying, check=True, cwd=tmp_path, env=environment)
    copied = {path.relative_to(tmp_path / "copied") for path in (tmp_path / "copied").rglob("*.*")}
    kept = [*EXAMPLES.rglob("*.mech"), *EXAMPLES.rglob("*.jsonl")]
    assert copied == {path.relative_to(EXAMPLES) for path in kept}


@pytest.mark.slow
def test_wheel_has_only_the_required_files(wheel: Path) -> None:
    package = wheel / "mechdsl"
    for needed in (
        "py.typed",
        "grammar/mech.lark",
        "error_pages/E0301.md",
        "syntax/tables.json",
        "zoo/counting/model.safetensors",
        "zoo/counting/README.md",
        "zoo/counting/LICENSE",
        "zoo/names/model.safetensors",
        "zoo/nested/formal/model.safetensors",
        "zoo/induction/step-50/model.safetensors",
        "examples/data/facts.jsonl",
    ):
        assert (package / needed).is_file(), needed
    examples = {path.relative_to(EXAMPLES) for path in EXAMPLES.rglob("*.mech")}
    assert {path.relative_to(package / "examples") for path in wheel.rglob("*.mech")} == examples
    assert [path.relative_to(package) for path in wheel.rglob("language.md")] == [
        Path("language.md")
    ]
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    assert folders.isdisjoint({"editors", "tests", "benchmarks", "docs"})
    outside = [path.name for path in wheel.iterdir() if path != package]
    assert len(outside) == 1, outside
    assert outside[0].endswith(".dist-info")
    assert sum(p.stat().st_size for p in (package / "zoo").rglob("*")) < 25_000_000


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist that `make dist` builds."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_distribution_in_a_clean_environment_runs_an_example(
    distributions: Path, tmp_path: Path, pattern: str
) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    # Dependencies come from the environment of the tests. Its `.pth` files aren't processed, so
    # that its editable install of the checkout stays invisible.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    install += ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    subprocess.run(
        [*install, str(next(distributions.glob(pattern)))], check=True, env=variables, cwd=tmp_path
    )
    where = "import mechdsl; print(mechdsl.__file__)"
    located = subprocess.run(
        [python, "-c", where], check=True, env=variables, cwd=tmp_path, capture_output=True
    )
    assert Path(located.stdout.decode().strip()).is_relative_to(site)
    command = environment / "bin" / "mechdsl"
    subprocess.run([command, "examples", "copied"], check=True, env=variables, cwd=tmp_path)
    ran = subprocess.run(
        [command, "run", "copied/counting.mech"],
        check=True,
        env=variables,
        cwd=tmp_path,
        capture_output=True,
    )
    assert b"which_heads_move_it" in ran.stdout
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (
        ("new", "first"),
        ("validate", "first.mech"),
        ("run", "first.mech"),
        ("explain", "first.mech"),
        ("explain", "patch"),
        ("explain", "E0301"),
        ("explain", "language", "--for-agents"),
    ):
        done = subprocess.run([command, *arguments], env=variables, cwd=empty, capture_output=True)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout
