"""The commands other than `run`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

import mechdsl
from mechdsl import zoo
from mechdsl.cli.entry import COMMANDS, MODULES, app
from mechdsl.diagnostics.command_line import page_codes
from mechdsl.models import folder as identity
from mechdsl.pipeline import file_run

from ..quick import some
from .conftest import HEADS, Command, process

EXAMPLES = Path(mechdsl.__file__).parent.parent / "examples"
TWO = HEADS + "\nexperiment again {\n  prompts fruit limit 16\n  measure correct as raw\n}\n"


def test_mechdsl_without_arguments_lists_its_commands(command: Command) -> None:
    done = command()
    assert done.status == 0
    assert all(name in done.out for name in app.commands)
    assert done.out == command("--help").out


def test_version_is_printed(command: Command) -> None:
    wanted = f"{mechdsl.__version__}\n"
    assert command("version").out == command("--version").out == wanted


@pytest.mark.parametrize("name", sorted(app.commands))
def test_help_describes_each_command(name: str, command: Command) -> None:
    done = command(name, "--help")
    assert done.status == 0
    usage, _, rest = done.out.partition("\n")
    assert usage.startswith(f"Usage: mechdsl {name} ")
    assert re.search(r"^  [A-Z].*\.$", rest, re.M), "no sentence says what it does"


def imported_by(*arguments: str) -> set[str]:
    """The modules that a command has imported when it ends."""
    return imported_by_each([arguments])


def imported_by_each(commands: Sequence[Sequence[str]]) -> set[str]:
    """The modules that are imported when the last of several commands in one process ends."""
    program = (
        "import json, os, sys\nfrom mechdsl import cli\n"
        "os.sched_getaffinity = lambda process: {0}\n"  # all in this process
        f"for arguments in {[list(each) for each in commands]!r}:\n"
        "    sys.argv = ['mechdsl', *arguments]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    *_, modules = done.stdout.splitlines()
    return set(json.loads(modules))


HEAVY = {"torch", "transformers", "altair", "pandas", "scipy", "networkx", "numpy"}
ON_ERROR = {"mechdsl.diagnostics.rendering"}


@pytest.mark.parametrize("share", some([6, 1], [6]), ids=["every sixth", "all"])
def test_validate_does_not_import_torch(share: int, command: Command) -> None:
    paths = sorted(EXAMPLES.glob("*.mech"))
    chosen = {*paths[::share], EXAMPLES / "image_tokens.mech"}
    # Images and their regions are drawn.
    drawn = {EXAMPLES / "image_tokens.mech", EXAMPLES / "captions.mech"}
    plain = sorted(map(str, chosen - drawn))
    assert not imported_by("validate", *plain) & HEAVY
    images = [("validate", str(path)) for path in sorted(drawn)]
    # A model's processor, which is part of transformers, is read once: then it is in the cache.
    assert all(command(*each).status == 0 for each in images)
    assert not imported_by_each(images) & (HEAVY - {"numpy"})


def test_validate_imports_only_modules_that_a_plain_file_needs() -> None:
    found = imported_by("validate", str(EXAMPLES / "counting.mech"))
    others = {f"mechdsl.cli.{name}" for name in MODULES.values()} - {"mechdsl.cli.validate"}
    for_few = {
        "mechdsl.pipeline.api",
        "mechdsl.pipeline.options",
        "mechdsl.models.adapter_folder",
        "click.shell_completion",
    }
    unused = {"pydantic", "rich", "regex", "interegular"}
    assert not found & (HEAVY | ON_ERROR | others | for_few | unused)
    # 173 at the time of writing. Each takes a millisecond of the 0.4 s for the command.
    assert sum(name.startswith("mechdsl.") for name in found) <= 180


@pytest.mark.slow
def test_run_imports_one_modeling_module_and_no_scipy_stats(heads: Path) -> None:
    found = imported_by("run", "--no-store", str(heads))
    # `auto` is the table of classes that transformers itself looks at.
    modeling = {name for name in found if name.startswith("transformers.models.")}
    assert {n.split(".")[2] for n in modeling if ".modeling_" in n} == {"auto", "llama"}
    assert "torch" in found
    assert not {"scipy.stats", "pandas", "altair"} & found


@pytest.mark.parametrize(
    ("arguments", "hashed"),
    [
        (("--no-store",), False),
        (("--no-store", "--format", "csv"), False),
        (("--no-store", "--format", "json"), True),
        (("--no-store", "--out", "out"), True),
    ],
)
def test_run_hashes_weights_once_and_only_where_the_hash_is_used(
    arguments: tuple[str, ...],
    hashed: bool,
    command: Command,
    heads: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(zoo.__path__[0]) / "counting"
    hashes: list[Path] = []

    def file_hash(path: Path) -> str:
        hashes.append(path)
        return identity.hash_file(path)

    monkeypatch.setattr(file_run, "hash_file", file_hash)
    monkeypatch.chdir(heads.parent)
    done = command("run", heads, *arguments)
    assert done.status == 0, done.err
    assert hashes == [folder / "model.safetensors"] * hashed


@pytest.mark.parametrize("arguments", [("--help",), ()])
def test_command_list_imports_no_command(arguments: tuple[str, ...]) -> None:
    found = imported_by(*arguments)
    allowed = {"entry", "output"}
    ours = {name for name in found if name.startswith("mechdsl.")}
    assert ours <= {"mechdsl.cli", "mechdsl.base", "mechdsl.base.text", "mechdsl.base.version"} | {
        f"mechdsl.cli.{name}" for name in allowed
    }


@pytest.mark.parametrize("name", sorted(app.commands))
def test_command_list_equals_the_help_texts(name: str) -> None:
    assert COMMANDS[name] == app.commands[name].get_short_help_str(limit=200)


def test_validate_searches_folders(command: Command, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.mech").write_text(HEADS, encoding="utf-8")
    (tmp_path / "b.mech").write_text(HEADS, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no program", encoding="utf-8")
    assert command("validate", tmp_path).out.startswith("2 files checked")
    assert command("validate", tmp_path, tmp_path / "b.mech").out.startswith("2 files checked")


def cores(count: int, program: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the given number of visible cores."""
    found = f"import os\nos.sched_getaffinity = lambda process: range({count})\n{program}"
    return subprocess.run([sys.executable, "-c", found], capture_output=True, encoding="utf-8")


@pytest.mark.slow
def test_validate_output_does_not_depend_on_the_number_of_cores(tmp_path: Path) -> None:
    for number in range(8):
        where = "last token" if number % 3 else f"item {number + 20} token"
        text = HEADS.replace("last-item token", where)
        (tmp_path / f"{number}.mech").write_text(text, encoding="utf-8")
    program = (
        f"import sys\nsys.argv = ['mechdsl', 'validate', {str(tmp_path)!r}]\n"
        "from mechdsl.cli import main\nmain()\n"
    )
    alone, divided = cores(1, program), cores(3, program)
    assert alone.returncode == divided.returncode == 2
    assert alone.stderr.count("error[E") == 3
    assert (alone.stdout, alone.stderr) == (divided.stdout, divided.stderr)


def test_map_files_gives_files_to_the_process_that_is_free(tmp_path: Path) -> None:
    done = cores(
        2,
        f"""
import os, time
from pathlib import Path
from mechdsl.cli.arguments import map_files
from mechdsl.checks.file_check import CheckSettings

ended = Path({str(tmp_path)!r}, "ended")

def work(file, settings):
    if file.name == "0":
        while not ended.exists():
            time.sleep(0.001)
    elif file.name == "19":
        ended.touch()
    return file, os.getpid()

files = [Path(str(number)) for number in range(20)]
found = list(map_files(work, files, CheckSettings()))
assert [file for file, _ in found] == files
print([process == found[0][1] for _, process in found].count(True))
""",
    )
    # The first file lasts until the other process has worked through all others.
    assert done.stdout == "1\n", done.stderr


def test_map_files_reraises_error_of_worker_process() -> None:
    done = cores(
        2,
        """
import os
from pathlib import Path
from mechdsl.cli.arguments import map_files
from mechdsl.checks.file_check import CheckSettings

def failing(file, settings):
    if file.name == "5":
        raise ValueError("no")
    return os.getpid()

def ending(file, settings):
    os._exit(1)

files = [Path(str(number)) for number in range(8)]
each = map_files(failing, files, CheckSettings())
assert os.getpid() not in {next(each) for _ in range(5)}
for work, kind in ((failing, ValueError), (ending, RuntimeError)):
    try:
        list(map_files(work, files, CheckSettings()))
    except kind as error:
        print(kind.__name__)
""",
    )
    assert done.stdout == "ValueError\nRuntimeError\n", done.stderr


def test_run_of_a_file_without_experiments_prints_a_note(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "common.mech"
    path.write_text("mech 1\n", encoding="utf-8")
    done = command("run", path)
    assert (done.status, done.out) == (0, "")
    assert "common.mech has no experiments, so nothing was run" in done.err


# --- missing models ---


@pytest.mark.parametrize("source", ['hf("not/here")', 'local("not/there")'])
def test_file_with_a_missing_model_is_validated_but_not_planned(
    command: Command, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "a.mech"
    path.write_text(HEADS.replace('zoo("counting")', source), encoding="utf-8")
    done = command("validate", path)
    assert done.status == 0, done.err
    assert "W0710" in done.err
    assert "1 file checked: no errors, 1 experiment without its model" in done.out
    picture = tmp_path / "graph.svg"
    for arguments in (
        ("validate", "--require-models", path),
        ("plan", path),
        ("graph", path, "--format", "svg", "--to", picture),
        ("explain", path),
        ("run", path),
    ):
        done = command(*arguments)
        assert (done.status, done.out) == (2, ""), arguments
        assert "error[E0401]: there is no model at `not/" in done.err
        assert "without it nothing can be planned or run" in done.err
    assert not picture.exists()


def test_validate_reports_a_model_without_weights(command: Command, tmp_path: Path) -> None:
    folder = Path(zoo.__path__[0]) / "counting"
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder, tmp_path / "hollow", ignore=weights)
    path = tmp_path / "a.mech"
    path.write_text(HEADS.replace('zoo("counting")', 'local("hollow")'), encoding="utf-8")
    done = command("validate", path)
    assert (done.status, done.err) == (0, "")
    assert done.out == "1 file checked: no errors, 1 model without weights on this machine\n"
    assert [each.code for each in mechdsl.validate(path)] == []
    done = command("validate", "--require-models", path)
    assert (done.status, done.out) == (2, "")
    assert "error[E0406]" in done.err
    assert [each.code for each in mechdsl.validate(path, require_models=True)] == ["E0406"]


# --- plan ---


def test_plan_prints_stages_and_cell_counts(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "two.mech"
    path.write_text(TWO, encoding="utf-8")
    done = command("plan", path)
    assert done.status == 0, done.err
    for said in ("Forward", "Read", "Write", "Measure", "layer 2 × head 4 = 8 cells"):
        assert said in done.out
    line = next(line for line in done.out.splitlines() if line.strip().startswith("heads"))
    assert line.split()[1:4] == ["8", "16", "128"]
    loop = next(line for line in done.out.splitlines() if line.strip().startswith("the plain loop"))
    assert loop.split()[3:5] == ["8", "128"]


def test_plan_marks_a_disabled_pass_as_off(command: Command, heads: Path) -> None:
    done = command("plan", heads, "--no-pass", "resume")
    rows = [line.split() for line in done.out.splitlines()]
    assert ["resume", "off"] in rows
    assert ["prefix", "off"] not in rows


def test_plan_counts_forward_passes_for_the_given_size(command: Command, heads: Path) -> None:
    def forwards(*given: object) -> int:
        lines = [line.split() for line in command("plan", heads, *given).out.splitlines()]
        return next(int(line[3]) for line in lines if line[:1] == ["join"])

    usual = forwards()
    assert forwards("--pass-tokens", 64) > usual
    assert forwards("--pass-tokens", 10**9) <= usual
    assert forwards("--prompt-tokens", 16) > usual


# --- graph ---


@pytest.mark.parametrize(("form", "begin"), [("dot", "digraph"), ("mermaid", "flowchart")])
def test_graph_is_printed_as_dot_or_mermaid(
    form: str, begin: str, command: Command, heads: Path
) -> None:
    done = command("graph", heads, "--format", form)
    assert done.status == 0, done.err
    assert done.out.startswith(begin)


def test_graph_before_the_passes_lacks_their_rewrites(command: Command, heads: Path) -> None:
    """A source run that is only read stops after the last layer read."""
    rule = "at last-item token"
    text = HEADS.replace("  from clean into fewer\n", "").replace(rule, f"{rule} with fewer")
    heads.write_text(text.replace("as recovery", "as delta"), encoding="utf-8")
    after = command("graph", heads, "--format", "text")
    before = command("graph", heads, "--format", "text", "--before")
    assert (after.status, before.status) == (0, 0)
    assert "first 2 blocks" in after.out
    assert after.out.replace(" · first 2 blocks", "") == before.out
    assert command("graph", heads, "--format", "text", "--after").out == after.out


def test_graph_svg_boxes_do_not_overlap(command: Command, heads: Path, tmp_path: Path) -> None:
    path = tmp_path / "graph.svg"
    assert command("graph", heads, "--format", "svg", "--to", path).status == 0
    root = ElementTree.parse(path).getroot()
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [
        tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        for box in root.iter("{http://www.w3.org/2000/svg}rect")
        if "x" in box.attrib
    ]
    assert len(boxes) > 8
    for number, (x, y, w, h) in enumerate(boxes):
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        for x2, y2, w2, h2 in boxes[:number]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


# --- explain ---


def test_explain_prints_rows_answers_and_tokens(command: Command, heads: Path) -> None:
    done = command("explain", heads)
    assert done.status == 0, done.err
    for said in ("clean, row 0:", "fewer, row 0:", "item → ", "answer = ", "last-item token"):
        assert said in done.out


def test_explain_json_has_rows_with_tokens_and_spans(command: Command, heads: Path) -> None:
    done = command("explain", heads, "--format", "json")
    (experiment,) = json.loads(done.out)["experiments"]
    assert set(experiment["runs"]) == {"clean", "fewer"}
    assert {len(rows) for rows in experiment["runs"].values()} == {16}
    for rows in experiment["runs"].values():
        for row in rows:
            assert len(row["tokens"]) == len(row["ids"]) == len(row["offsets"])
            assert set(row["texts"]) == {"answer"}
            for span in row["spans"]:
                if span["name"] == "item":
                    (token,) = span["tokens"]
                    assert row["tokens"][token].strip() == row["text"][span["start"] : span["end"]]


@pytest.mark.parametrize("written", ["E0301", "e0301"])
def test_explain_prints_the_page_of_a_code(written: str, command: Command) -> None:
    done = command("explain", written)
    assert done.status == 0
    assert done.out.startswith("# E0301: ")


def test_every_code_can_be_explained(command: Command) -> None:
    for code in page_codes():
        assert command("explain", code).out.startswith(f"# {code}: ")


# --- fmt ---


def test_fmt_formats_a_file_and_check_reports_it(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "loose.mech"
    path.write_text(HEADS.replace("  model toy", "model   toy # here"), encoding="utf-8")
    loose = path.read_text(encoding="utf-8")
    done = command("fmt", "--check", path)
    assert (done.status, done.out) == (2, f"would change {path}\n")
    assert path.read_text(encoding="utf-8") == loose
    done = command("fmt", path)
    assert (done.status, done.out) == (0, f"formatted {path}\n")
    assert path.read_text(encoding="utf-8") == HEADS.replace(
        "model toy\n  p", "model toy  # here\n  p"
    )
    assert command("fmt", "--check", path).status == 0


def test_fmt_does_not_write_invalid_files(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "wrong.mech"
    path.write_text("mech 1\nmodel  toy\n", encoding="utf-8")
    assert command("fmt", path).status == 2
    assert path.read_text(encoding="utf-8") == "mech 1\nmodel  toy\n"


# --- schema ---


@pytest.mark.parametrize("what", ["results", "differences", "experiment"])
def test_schema_is_valid_json_schema(what: str, command: Command) -> None:
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(json.loads(command("schema", what).out))


def test_set_overrides_a_parameter(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "heads.mech"
    text = HEADS.replace("mech 1\n", "mech 1\nparam depth = 1\n")
    path.write_text(text.replace("0..1", "0..depth"), encoding="utf-8")
    assert "layer 2 × head 4" in command("plan", path).out
    assert "layer 4 × head 4" in command("plan", path, "--set", "depth=3").out


def test_python_m_mechdsl_runs_a_command(tmp_path: Path) -> None:
    done = process("version", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
