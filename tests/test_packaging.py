"""Distributions, what they install, and the action and hooks that install them.

A wheel contains files from outside the package: grammar, pages and examples. `mechdsl-core` checks
files without torch; `mechdsl` adds what running them needs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LANGUAGE = ROOT / "docs" / "language.md"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FULL = ROOT / "packages" / "mechdsl"
"""The distribution `mechdsl`."""
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))

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


def closure(requirements: list[str]) -> dict[str, Requirement]:
    """Distribution → its requirement, for everything that pip installs for these requirements."""
    needed: dict[str, Requirement] = {}
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        one = waiting.pop()
        applies = one.marker is None or one.marker.evaluate({"extra": ""})
        if applies and canonicalize_name(one.name) not in needed:
            needed[canonicalize_name(one.name)] = one
            waiting += map(Requirement, distribution(one.name).requires or ())
    return needed


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip installs for the root of the repository, except for the package."""
    folder = tmp_path_factory.mktemp("light")
    for name in closure(PROJECT["dependencies"]):
        one = distribution(name)
        for top in {Path(str(file)).parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(str(one.locate_file(top))))
    info = folder / "mechdsl_core-0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.4", "Name: mechdsl-core", "Version: 0"]
    lines += [f'Requires-Dist: {each}; extra == "run"' for each in EXTRAS["run"]]
    (info / "METADATA").write_text("\n".join(lines), "utf-8")
    return folder


def run_light(light: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the checkout in a process that sees no other library."""
    program = (
        f"import sys; sys.path += {[str(ROOT), str(light)]}; sys.argv[0] = 'mechdsl'\n"
        "from mechdsl.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
    )


def test_root_dependencies_exclude_torch() -> None:
    assert not closure(PROJECT["dependencies"]).keys() & {"torch", "transformers", "scipy"}


@pytest.mark.parametrize(
    "files",
    [
        ["counting.mech", "image_tokens.mech"],
        pytest.param([""], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_checks_run_without_the_libraries_of_runs(
    files: list[str], light: Path, tmp_path: Path
) -> None:
    text = (EXAMPLES / "counting.mech").read_text("utf-8")
    (tmp_path / "--plugin.mech").write_text(text, "utf-8")
    paths = [str(EXAMPLES / file) for file in files]
    for command in ("validate", "fmt --check"):
        done = run_light(light, tmp_path, *command.split(), "--", "--plugin.mech", *paths)
        assert done.returncode == 0, done.stderr


def test_validate_without_torch_skips_models_with_image_prompts(
    light: Path, tmp_path: Path
) -> None:
    images = EXAMPLES / "image_tokens.mech"
    done = run_light(light, tmp_path, "validate", str(images))
    assert "W0710" in done.stderr
    assert "`counting-vlm` is prepared by torch and transformers" in done.stderr
    done = run_light(light, tmp_path, "validate", "--require-models", str(images))
    assert done.returncode == 2
    assert "E0459" in done.stderr


@pytest.mark.parametrize(
    ("command", "library"),
    [
        (["run", str(EXAMPLES / "counting.mech"), "--no-store"], "torch"),
        (["sites", "counting"], "torch"),
        (["plan", str(EXAMPLES / "counting.mech")], "scipy"),
    ],
)
def test_command_without_its_library_names_the_install_command(
    command: list[str], library: str, light: Path, tmp_path: Path
) -> None:
    done = run_light(light, tmp_path, *command)
    assert done.returncode == 2
    assert f"needs `{library}`, which isn't installed" in done.stderr
    line = next(line for line in done.stderr.splitlines() if " -m pip install " in line)
    assert set(re.findall(r'"(.*?)"', line)) == set(EXTRAS["run"])
    assert f"`{sys.executable} -m pip install " in line


def test_full_distribution_adds_the_extra_run_and_passes_on_extras() -> None:
    full = tomllib.loads((FULL / "pyproject.toml").read_text("utf-8"))["project"]
    same = ["version", "license", "requires-python", "scripts", "description"]
    assert [full[key] for key in same] == [PROJECT[key] for key in same]
    exact = f"=={PROJECT['version']}"
    assert full["dependencies"] == [f"{PROJECT['name']}[run]{exact}"]
    users = EXTRAS.keys() - {"run", "docs", "test"}
    assert full["optional-dependencies"] == {
        extra: [f"{PROJECT['name']}[{extra}]{exact}"] for extra in users
    }


def locked(file: str) -> Iterator[Requirement]:
    """The requirements of a lock file, each of which has a hash."""
    text = (ROOT / file).read_text("utf-8").replace("\\\n", "")
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=sha256:", line)
        assert hashes, line
        assert all(re.fullmatch("[0-9a-f]{64}", each) for each in hashes)
        yield Requirement(requirement)


@pytest.mark.parametrize(
    ("file", "extras", "constraints"),
    [
        ("requirements-ci.txt", ["run", "test"], "constraints.txt"),
        ("requirements-ci-oldest.txt", ["run", "offload"], "constraints-oldest.txt"),
    ],
)
def test_lock_file_has_an_allowed_version_of_each_requirement(
    file: str, extras: list[str], constraints: str
) -> None:
    versions: dict[str, list[str]] = {}
    for requirement in locked(file):
        (version,) = requirement.specifier
        versions.setdefault(canonicalize_name(requirement.name), []).append(version.version)
    lines = (ROOT / constraints).read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    own = [each for extra in extras for each in EXTRAS[extra]]
    asked = [Requirement(each) for each in [*PROJECT["dependencies"], *own]]
    names = {canonicalize_name(requirement.name) for requirement in asked}
    asked += [each for each in map(Requirement, pins) if canonicalize_name(each.name) in names]
    for requirement in asked:
        if requirement.name != "torch":  # each accelerator has another build
            for version in versions[canonicalize_name(requirement.name)]:
                assert requirement.specifier.contains(version), requirement
    assert not [name for name in versions if name.startswith(("torch", "nvidia", "triton"))]


def test_action_installs_its_checkout_and_pins_other_actions() -> None:
    steps = ACTION["runs"]["steps"]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", each) for each in used), used
    (install,) = [step for step in steps if "pip install" in step.get("run", "")]
    assert install["run"].strip().endswith('pip install --quiet "$ACTION"')
    assert install["env"]["ACTION"] == "${{ github.action_path }}"


@pytest.mark.parametrize(
    ("untrusted", "sarif", "options"),
    [
        (ACTION["inputs"]["untrusted"]["default"], "", "--untrusted --format github"),
        ("false", "", "--format github"),
        ("false", "report", "--format github"),
    ],
)
def test_action_passes_files_after_options(
    untrusted: str, sarif: str, options: str, tmp_path: Path
) -> None:
    command = tmp_path / "mechdsl" / "bin" / "mechdsl"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@"\n', "utf-8")
    command.chmod(0o755)
    (tmp_path / "b.mech").touch()
    script = ACTION["runs"]["steps"][-1]["run"]
    files = {"FILES": "--plugin.mech *.mech", "UNTRUSTED": untrusted, "SARIF": sarif}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **files, "RUNNER_TEMP": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"validate {options} -- --plugin.mech b.mech\n"
    if sarif:
        expected = "validate --format sarif -- --plugin.mech b.mech\n"
        assert (tmp_path / sarif).read_text("utf-8") == expected


def test_hooks_pass_files_after_options() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert [(hook["args"], hook["language"]) for hook in hooks] == [(["--"], "python")] * 2


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
    """A folder with the wheels and sdists that `make dist` builds."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    for project in (ROOT, FULL):
        subprocess.run(command, check=True, cwd=project, capture_output=True)
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
    built = [str(path) for path in distributions.glob(pattern)]
    assert len(built) == 2, built
    subprocess.run([*install, *built], check=True, env=variables, cwd=tmp_path)
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
