"""Output for programs (JSON, CSV, annotations, exit statuses) and for terminals."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import pty
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mechdsl.cli.output import StandardOutput

from .conftest import HEADS, Command, process

BEHAVIOUR = """
experiment behaviour {
  prompts fruit limit 16
  measure correct as raw
  measure argmax(1..9) as raw
  expect accuracy(clean) > 0.5
}
"""
FAILS = BEHAVIOUR.replace("accuracy(clean) > 0.5", "accuracy(clean) < 0.1")
ESCAPE = "\x1b"


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(text: str) -> Any:
    """Parse JSON; NaN and infinity are errors."""
    return json.loads(text, parse_constant=no_constant)


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A sweep, and an experiment without a rule."""
    path = tmp_path / "both.mech"
    path.write_text(HEADS + BEHAVIOUR, encoding="utf-8")
    return path


def test_run_json_matches_its_schema(command: Command, both: Path) -> None:
    done = command("run", both, "--format", "json")
    assert done.status == 0, done.err
    document = strict(done.out)
    schema = strict(command("schema", "results").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert document["schema"] == 2
    (file,) = document["files"]
    assert len(file["hash"]) == 64
    sweep, behaviour = file["experiments"]
    assert (sweep["name"], sweep["model"], sweep["axes"]) == ("heads", "toy", ["layer", "head"])
    assert len(sweep["cells"]) == 8
    for experiment in file["experiments"]:
        for cell in experiment["cells"]:
            assert list(cell["coords"]) == experiment["axes"]
    cell = sweep["cells"][0]
    assert cell["coords"] == {"layer": 0, "head": 0}
    assert cell["site"] == "L0H0.z"
    assert cell["at"]["position"] == "last-item token"
    assert set(cell["at"]["tokens"]) <= {"apple", "pear", "plum", "fig"}
    (measure,) = cell["measures"]
    wanted = {"label", "metric", "effect", "mean", "low", "high", "p", "p_corrected"}
    assert wanted <= set(measure)
    assert measure["low"] <= measure["mean"] <= measure["high"]
    assert set(sweep["runs"]) == {"clean", "fewer"}
    assert {"model", "dtype", "rows", "bos", "answer", "seed"} <= set(sweep["conventions"])
    (verdict,) = behaviour["expect"]
    assert (verdict["text"], verdict["holds"]) == ("accuracy(clean) > 0.5", True)
    raw = behaviour["cells"][0]["measures"][0]
    assert raw["p"] is None
    assert raw["reason"]


def test_swept_position_is_an_axis_in_json(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "positions.mech"
    path.write_text(
        HEADS.replace("head * at last-item token", "head 0 at each item token"), encoding="utf-8"
    )
    (experiment,) = strict(command("run", path, "--format", "json").out)["files"][0]["experiments"]
    assert experiment["axes"] == ["layer", "position"]
    assert all(cell["n"] <= 16 for cell in experiment["cells"])
    assert {cell["coords"]["position"] for cell in experiment["cells"]} >= {"item 1", "item 2"}


def test_run_csv_has_rows_of_every_experiment(command: Command, both: Path) -> None:
    done = command("run", both, "--format", "csv")
    assert done.status == 0, done.err
    lines = list(csv.DictReader(io.StringIO(done.out)))
    assert len(lines) == 8 + 2
    assert {line["experiment"] for line in lines} == {"heads", "behaviour"}
    assert {"layer", "head", "site", "n", "mean", "low", "high", "p_corrected"} <= set(lines[0])
    assert not re.search(r"\b(nan|inf)\b", done.out, re.I)


def test_reports_are_written_for_every_output_format(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "heads.mech"
    path.write_text(HEADS.replace("report table", 'report csv to "heads.csv"'), encoding="utf-8")
    for form in ("table", "json"):
        done = command("run", path, "--format", form)
        assert done.status == 0, done.err
        assert (tmp_path / "heads.csv").read_text(encoding="utf-8").count("\n") == 9
        (tmp_path / "heads.csv").unlink()
    strict(done.out)
    assert "heads.csv" in done.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "no space left on device"),
        (ValueError("too many colours"), "ValueError: too many colours"),
    ],
)
def test_unwritable_report_leaves_other_reports(
    error: Exception,
    said: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = 'report csv to "lost.csv"\n  report table\n  report json to "kept.json"'
    path = tmp_path / "heads.mech"
    path.write_text(HEADS.replace("report table", reports), encoding="utf-8")
    (tmp_path / "lost.csv").write_text("of an earlier run", encoding="utf-8")

    def fails(*given: object) -> str:
        raise error

    monkeypatch.setattr("mechdsl.results.experiment_result.csv_text", fails)
    done = command("run", path)
    assert done.status == 3
    assert f"error[E0536]: `report csv` could not be written to `lost.csv`: {said}" in done.err
    assert "= help: " in done.err
    assert "Traceback" not in done.err
    assert "L1H3.z" in done.out, "the table is printed"
    strict((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert (tmp_path / "lost.csv").read_text(encoding="utf-8") == "of an earlier run"
    assert {each.name for each in tmp_path.iterdir()} == {"heads.mech", "lost.csv", "kept.json"}


def test_unprintable_report_leaves_other_reports(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.mech"
    path.write_text(HEADS.replace("report table", "report csv\n  report table"), encoding="utf-8")

    def fails(*given: object) -> str:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr("mechdsl.results.experiment_result.csv_text", fails)
    done = command("run", path)
    assert done.status == 3
    assert "report csv of heads failed: ValueError: a mistake of ours" in done.err
    assert "L1H3.z" in done.out


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_failed_expectation_exits_with_status_1(
    form: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "fails.mech"
    path.write_text(HEADS + FAILS, encoding="utf-8")
    done = command("run", path, "--format", form, "--only", "behaviour")
    assert done.status == 1
    if form == "json":
        (experiment,) = strict(done.out)["files"][0]["experiments"]
        assert experiment["expect"][0]["holds"] is False
    if form == "table":
        assert "fails" in done.out


def test_only_and_limit_select_experiments_and_rows(command: Command, both: Path) -> None:
    done = command("run", both, "--only", "heads", "--limit", "5", "--format", "json")
    (experiment,) = strict(done.out)["files"][0]["experiments"]
    assert experiment["name"] == "heads"
    assert {cell["n"] for cell in experiment["cells"]} == {5}


@pytest.mark.slow
def test_two_processes_with_one_pass_size_are_equal_bit_for_bit(
    command: Command, heads: Path
) -> None:
    """Compare this process with a new one of another hash seed, whose stderr stays empty."""
    arguments = ("run", heads, "--pass-tokens", 40, "--format", "json", "--out")
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    one = process(*arguments, "one", cwd=heads.parent, env={"PYTHONHASHSEED": seed})
    other = command(*arguments, heads.parent / "other")
    assert (one.status, other.status, one.err) == (0, 0, "")
    assert one.out == other.out
    (file,) = strict(one.out)["files"]
    assert file["sizes"] == {"pass_tokens": 40, "prompt_tokens": 4096, "chosen": "given"}
    (found,) = file["experiments"]
    said = "up to 40 tokens each, prompts in batches of up to 4,096"
    assert found["conventions"]["pass sizes"] == said
    rows = [(heads.parent / name / "heads" / "heads.jsonl") for name in ("one", "other")]
    assert rows[0].read_bytes() == rows[1].read_bytes()
    assert rows[0].read_text("utf-8").count('"cell"') == 8


def test_default_pass_size_appears_only_in_json(command: Command, heads: Path) -> None:
    done = command("run", heads, "--format", "json")
    (file,) = strict(done.out)["files"]
    assert file["sizes"] == {"pass_tokens": 2048, "prompt_tokens": 4096, "chosen": "default"}
    assert "passes" not in file["experiments"][0]["conventions"]
    given = command("run", heads, "--format", "json", "--prompt-tokens", "16")
    assert strict(given.out)["files"][0]["sizes"]["prompt_tokens"] == 16


def test_out_has_the_values_of_every_prompt(command: Command, heads: Path, tmp_path: Path) -> None:
    assert command("run", heads, "--out", tmp_path / "kept").status == 0
    folder = tmp_path / "kept" / "heads"
    lines = [json.loads(x) for x in (folder / "heads.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["axes"] == ["layer", "head"]
    assert [line["run"] for line in lines if "run" in line] == ["fewer", "clean"]
    cells = [line for line in lines if "cell" in line]
    assert {tuple(line["coords"].values()) for line in cells} == {
        (layer, head) for layer in (0, 1) for head in range(4)
    }
    assert sum(len(line["rows"]) for line in cells) == 8 * 16
    strict((folder / "results.json").read_text("utf-8"))


def test_validate_formats_contain_code_and_position(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "bad.mech"
    path.write_text(HEADS.replace("head *", "head 14"), encoding="utf-8")
    (found,) = strict(command("validate", path, "--format", "json").out)
    assert (found["code"], found["severity"]) == ("E0301", "error")
    assert (found["line"], found["column"], found["end_column"]) == (18, 25, 27)
    line = command("validate", path, "--format", "github").out
    assert line.startswith("::error file=")
    assert ",line=18,col=25," in line
    log = strict(command("validate", path, "--format", "sarif").out)
    (result,) = log["runs"][0]["results"]
    assert result["ruleId"] == "E0301"
    region = result["locations"][0]["physicalLocation"]["region"]
    assert (region["startLine"], region["startColumn"]) == (18, 25)
    (rule,) = log["runs"][0]["tool"]["driver"]["rules"]
    assert "(*" not in rule["shortDescription"]["text"]


def test_validate_formats_of_a_valid_file_are_empty(command: Command, heads: Path) -> None:
    assert strict(command("validate", heads, "--format", "json").out) == []
    assert command("validate", heads, "--format", "github").out == ""
    assert strict(command("validate", heads, "--format", "sarif").out)["runs"][0]["results"] == []
    done = command("validate", heads)
    assert (done.status, done.out) == (0, "1 file checked: no errors\n")


# --- terminals and pipes ---


def test_pipe_gets_no_escape_codes(command: Command, both: Path) -> None:
    for name in ("run", "plan", "explain", "validate"):
        done = command(name, both)
        assert ESCAPE not in done.out + done.err, name


def on_a_terminal(*arguments: object, env: dict[str, str]) -> str:
    """Run a command on a pseudo-terminal and return its output."""
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", closefd=True) as screen:
        done = subprocess.Popen(
            [sys.executable, "-m", "mechdsl", *map(str, arguments)],
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env},
        )
        os.close(follower)
        sent = b""
        try:
            while chunk := os.read(screen.fileno(), 65536):
                sent += chunk
        except OSError:  # the other end is closed
            pass
        assert done.wait(timeout=60) is not None
    return sent.decode("utf-8")


def test_terminal_output_is_coloured_unless_no_color_is_set(tmp_path: Path) -> None:
    path = tmp_path / "bad.mech"
    path.write_text(HEADS.replace("head *", "head 14"), encoding="utf-8")
    coloured = on_a_terminal("validate", path, env={})
    plain = on_a_terminal("validate", path, env={"NO_COLOR": "1"})
    assert "\x1b[1;31m" in coloured
    assert ESCAPE not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


@pytest.mark.parametrize("columns", [40, 60])
def test_numbers_are_not_truncated_on_narrow_terminals(
    columns: int, command: Command, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = strict(command("run", both, "--only", "heads", "--format", "json").out)
    cells = document["files"][0]["experiments"][0]["cells"]
    monkeypatch.setattr("mechdsl.cli.output.window_width", lambda: columns)
    shown = command("run", both, "--only", "heads").out
    assert max(map(len, shown.splitlines())) <= columns
    for cell in cells:
        measure = cell["measures"][0]
        numbers = [measure[key] for key in ("mean", "low", "high")]
        texts = [f"{each:.3f}".replace("-0.000", "0.000") for each in numbers]
        if set(texts) == {"0.000"} and any(numbers):
            texts = [f"{each:.1e}" for each in numbers]
        mean, low, high = texts
        assert mean in shown
        assert f"[{low}, {high}]" in shown


def in_bash(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; mechdsl() {{ {sys.executable} -m mechdsl $@; }}; {line}"],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


FULL = "standard output can't be written to: no space left on device\n"
TOO_LARGE = "standard output can't be written to: file too large\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mechdsl explain both.mech | true", ""),
        ("mechdsl schema > /dev/full", FULL),
        ("mechdsl --help > /dev/full", FULL),
        ("PYTHONUNBUFFERED=1 mechdsl explain both.mech | true", ""),
        ("ulimit -f 1; mechdsl schema > small", TOO_LARGE),
        ("ulimit -f 1; PYTHONUNBUFFERED=1 mechdsl schema > small", TOO_LARGE),
        ("mechdsl validate both.mech >&-", "standard output is closed\n"),
    ],
)
def test_closed_or_full_output_exits_with_status_3(line: str, said: str, both: Path) -> None:
    done = in_bash(line, both.parent)
    assert (done.returncode, done.stderr) == (3, said)


@pytest.mark.parametrize("line", ["validate both.mech --limit 3", "validate none.mech", "nonsense"])
@pytest.mark.parametrize("end", ["2>/dev/full", "2>&-", "2>/dev/full >/dev/full"])
def test_lost_standard_error_changes_no_status(line: str, end: str, both: Path) -> None:
    both.write_text(both.read_text().replace("limit 16", "limit 2"), encoding="utf-8")  # W0720
    done = in_bash(
        f"mechdsl {line} 2>/dev/null; echo $?; mechdsl {line} {end}; echo $?", both.parent
    )
    before, after = (each for each in done.stdout.splitlines() if each.isdigit())
    assert after == ("3" if before == "0" and ">/dev/full" in end[4:] else before)


def test_run_with_full_output_exits_with_status_3(
    command: Command, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandardOutput(open("/dev/full", "wb"), encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        done = command("run", both)
    assert (done.status, done.err) == (3, FULL)


class SmallDisk(io.RawIOBase):
    """An unbuffered file on a disk with room for a given number of bytes."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__()
        self.room = room
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any, /) -> int:
        if stat.S_ISCHR(os.fstat(self.descriptor).st_mode):
            return os.write(self.descriptor, data)  # it leads to /dev/null now
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(self.descriptor, memoryview(data)[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_output_filled_midway_exits_with_3(
    command: Command, both: Path, form: str, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk: Any = SmallDisk(both.parent / "out", 100)
    stream = io.BufferedWriter(disk) if buffered else disk
    with StandardOutput(stream, encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        done = command("run", both, "--only", "behaviour", "--format", form)
    assert (done.status, done.err) == (3, FULL)


def test_output_lost_at_close_exits_with_3(
    command: Command, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may report a full disk only on close."""
    close = os.close
    with StandardOutput(SmallDisk(both.parent / "out", 1 << 20), encoding="utf-8") as output:
        own = output.fileno()

        def close_of_a_full_disk(descriptor: int) -> None:
            of_output = os.path.sameopenfile(descriptor, own)
            close(descriptor)
            if of_output:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            patch.setattr(os, "close", close_of_a_full_disk)
            done = command("explain", both)
    assert done.status == 3
    assert done.err == "standard output can't be written to: disk quota exceeded\n"


@pytest.mark.slow
def test_lost_output_still_runs_files_that_write_reports(tmp_path: Path) -> None:
    """The first file prints more than a buffer holds, so the loss shows before the second file;
    its reports are written."""
    reports = "report table\n  " * 8 + 'report csv to "a.csv"'
    for name, lines in (("a", reports), ("b", 'report csv to "b.csv"'), ("c", "report table")):
        text = HEADS.replace("report table", lines)
        (tmp_path / f"{name}.mech").write_text(text, encoding="utf-8")
    done = in_bash("mechdsl run a.mech b.mech c.mech | true", tmp_path)
    assert done.returncode == 3
    for name in ("a.csv", "b.csv"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("\n") == 9
    assert done.stderr == "not run because output is lost and nothing would be saved: c.mech\n"


ASCII = {
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
}


@pytest.mark.slow
def test_characters_missing_in_the_encoding_are_replaced(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.mech"
    text = HEADS.replace('"fig"]', '"fig", "é"]').replace("as recovery", "as delta")
    path.write_text(text.replace("report table", "report table\n  report json"), encoding="utf-8")
    done = process("explain", path, cwd=tmp_path, env=ASCII)
    assert done.status == 0, done.err
    assert done.out.isascii()
    assert "(layer 2 x head 4)" in done.out
    assert ESCAPE not in done.out, "a pipe gets none"
    for name, form in (("run", "table"), ("run", "json"), ("run", "csv"), ("explain", "json")):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
        done = command(name, path, "--format", form)
        sys.stdout.flush()
        assert done.status == 0, done.err
        text = printed.getvalue().decode("ascii")
        assert text
        if form == "table":
            assert "toy | clean > fewer | n = 16" in text
            strict(text[text.index("\n{\n") :])
        found = strict(text) if form == "json" else None
        if name == "explain":
            assert "é" in json.dumps(found, ensure_ascii=False)
