"""Every invalid input is a diagnostic with a code and a help line; nothing runs, status 2."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from importlib.resources import files
from pathlib import Path

import pytest

from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.pipeline.api import run

from .conftest import HEADS, Command, Done, process

ZOO = Path(str(files("mechdsl") / "zoo" / "counting"))


def refused(done: Done, code: str, *, place: bool = False) -> None:
    """Assert exit status 2, a code, a help line, a position if any, and an empty stdout."""
    assert done.status == 2, done.err
    assert done.out == ""
    assert f"[{code}]" in done.err, done.err
    assert "= help: " in done.err
    assert "Traceback" not in done.err
    assert re.search(r"error\[E0\d{3}\]: \S", done.err)
    if place:
        assert re.search(r"(┌─|-->) \S+:\d+:\d+$", done.err, re.M), done.err


def edited(*changes: tuple[str, str]) -> str:
    text = HEADS
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


# --- files ---

CONTENTS: dict[str, tuple[bytes, str, bool]] = {
    "empty": (b"", "E0111", True),
    "only white space": (b" \n\t\n", "E0111", True),
    "only a comment": (b"# nothing here\n", "E0111", True),
    "binary": (random.Random(0).randbytes(5000), "E0110", False),
    "not UTF-8": ("mech 1 # é".encode("latin-1"), "E0110", False),
    "10,000 opened braces": (b"mech 1\nprompts x " + b"{" * 10_000, "E0109", True),
    "10,000 nested braces": (b"mech 1\nprompts x " + b"{" * 10_000 + b"}" * 10_000, "E0109", True),
    "10,000 nested brackets": (
        edited(("logit(answer) ", "(" * 10_000 + "logit(answer)" + ")" * 10_000)).encode(),
        "E0109",
        True,
    ),
    "10,000 signs": (
        edited(("logit(answer) ", "-" * 10_000 + "logit(answer)")).encode(),
        "E0109",
        True,
    ),
    "5 MB of comments": ((HEADS + "# x\n" * 1_250_000).encode(), "E0109", True),
    "5 MB in one line": (b"x" * 5_000_000, "E0109", True),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_invalid_file_content_is_rejected(name: str, command: Command, tmp_path: Path) -> None:
    content, code, place = CONTENTS[name]
    path = tmp_path / "bad.mech"
    path.write_bytes(content)
    start = time.monotonic()
    refused(command("run", path), code, place=place)
    assert time.monotonic() - start < 20  # takes at most a second on an idle machine


def test_missing_file_is_rejected_by_every_command(command: Command, tmp_path: Path) -> None:
    for name in ("run", "validate", "plan", "graph", "explain", "fmt"):
        refused(command(name, tmp_path / "missing.mech"), "E0112")


def test_too_long_file_name_is_rejected(command: Command) -> None:
    done = command("validate", "/" + "a" * 300)
    assert done.status == 2
    assert "file name too long" in done.err


def test_folder_without_files_is_rejected(command: Command, tmp_path: Path) -> None:
    for name in ("run", "validate", "fmt"):
        refused(command(name, tmp_path), "E0208")
    for name in ("plan", "graph", "explain"):
        refused(command(name, tmp_path), "E0112")


def test_one_invalid_file_prevents_the_whole_run(
    command: Command, heads: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "zzz.mech"
    bad.write_text(HEADS.replace("layer 0..1", "layer 7"), encoding="utf-8")
    refused(command("run", heads, bad), "E0302", place=True)


# --- statements of files ---

SAID: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "list of 10⁹ items": ((("list(item, count", "list(item, 1000000000"),), "E0506"),
    "values up to 10⁹": ((("3..9", "1..1000000000"),), "E0506"),
    "10⁹ rows": ((("limit 16", "limit 1000000000"),), "E0506"),
    "10⁹ layers": ((("layer 0..1", "layer 0..1000000000"),), "E0302"),
    "10⁹ tokens": ((("last-item token", "token 0..1000000000"),), "E0310"),
    "10⁹ turns": (
        (
            ("  patch layer 0..1", "  for l in 0..1000000000 { patch layer l"),
            ("last-item token", "last-item token }"),
        ),
        "E0322",
    ),
    "10⁹ numerals": ((("measure logit(answer)", "measure expected(1..1000000000)"),), "E0612"),
    "layer that doesn't exist": ((("layer 0..1", "layer 7"),), "E0302"),
    "head that doesn't exist": ((("head *", "head 14"),), "E0301"),
    "position that some prompts lack": ((("last-item", "item 5"),), "E0309"),
    "token outside the prompt": ((("last-item token", "token 40"),), "E0310"),
    "prompts of different lengths": ((("last-item token", "token *"),), "E0305"),
    "answer of several tokens": (((" {count}", " {count} apple"),), "E0507"),
    "answer outside the vocabulary": (((" {count}", " hello"),), "E0519"),
    "corruption that changes nothing": ((("count = count - 1", "count = count"),), "E0510"),
    "list shorter than nothing": ((("count = count - 1", "count = count - 20"),), "E0503"),
    "prompt longer than the context": (
        (("3..9", "3000..3001"), ('answer " {count}"', 'answer " 9"')),
        "E0511",
    ),
    "model folder that doesn't exist": ((('zoo("counting")', 'local("nowhere")'),), "E0401"),
    "model that isn't in the cache": ((('zoo("counting")', 'hf("nobody/nothing")'),), "E0401"),
    "no such zoo model": ((('"counting"', '"cuonting"'),), "E0403"),
}


@pytest.mark.parametrize("name", SAID)
def test_invalid_program_is_rejected_before_cells_run(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    changes, code = SAID[name]
    path, kept = tmp_path / "bad.mech", tmp_path / "kept"
    path.write_text(edited(*changes), encoding="utf-8")
    start = time.monotonic()
    refused(command("run", path, "--out", kept), code, place=True)
    assert time.monotonic() - start < 30
    assert no_cells(kept)


def no_cells(folder: Path) -> bool:
    """Return whether no file under `--out` has a cell."""
    return not any('"cell"' in p.read_text(encoding="utf-8") for p in folder.rglob("*.jsonl"))


@pytest.mark.parametrize("effect", ["recovery", "relative"])
def test_zero_denominator_is_rejected(effect: str, command: Command, tmp_path: Path) -> None:
    path, kept = tmp_path / "bad.mech", tmp_path / "kept"
    same = ("logit(answer of fewer) as recovery", f"logit(answer) as {effect}")
    path.write_text(edited(same), encoding="utf-8")
    refused(command("run", path, "--out", kept), "E0604", place=True)
    assert no_cells(kept)


# --- models ---


def model_folder(folder: Path, *, without: str = "") -> Path:
    folder.mkdir()
    for path in ZOO.iterdir():
        if path.suffix in (".json", ".safetensors") and not path.name.startswith(without or "\0"):
            shutil.copy(path, folder)
    return folder


def local(tmp_path: Path) -> Path:
    path = tmp_path / "local.mech"
    path.write_text(HEADS.replace('zoo("counting")', 'local("model")'), encoding="utf-8")
    return path


def test_model_without_tokenizer_is_rejected(command: Command, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", without="tokenizer")
    refused(command("run", local(tmp_path)), "E0508", place=True)


def test_pickled_weights_are_rejected(command: Command, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", without="model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"anything")
    refused(command("run", local(tmp_path)), "E0405", place=True)


def test_invalid_model_config_is_rejected(command: Command, tmp_path: Path) -> None:
    model_folder(tmp_path / "model", without="config")
    (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")
    done = command("run", local(tmp_path))
    assert done.status == 2
    assert "error[E04" in done.err
    assert "Traceback" not in done.err


def test_truncated_weights_are_rejected(command: Command, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = command("run", local(tmp_path))
    assert done.status == 2
    assert "error[E04" in done.err
    assert "Traceback" not in done.err


# --- the command line ---

LINES: dict[str, tuple[str, str]] = {
    "run FILE --nonsense": ("E0208", "no such option"),
    "run FILE --ony heads": ("E0208", "did you mean `--only`?"),
    "frobnicate FILE": ("E0208", "`mechdsl --help` lists the commands"),
    "check FILE": ("E0208", "did you mean `validate`?"),
    "format FILE": ("E0208", "did you mean `fmt`?"),
    "runs check": ("E0208", "`mechdsl runs --help` lists its arguments and options"),
    "runn FILE": ("E0208", "did you mean `run`?"),
    "run": ("E0208", "`mechdsl run --help` lists its arguments and options"),
    "run FILE --format xml": ("E0208", "'table', 'json', 'csv'"),
    "run FILE --limit 0": ("E0208", "0 is not in the range"),
    "run FILE --pass-tokens 0": ("E0208", "0 is not in the range"),
    "plan FILE --prompt-tokens 0": ("E0208", "0 is not in the range"),
    "run FILE --limit many": ("E0208", "--limit"),
    "run FILE --dtype float8": ("E0208", "float8"),
    "run FILE --set": ("E0208", "requires an argument"),
    "run FILE --set depth": ("E0208", "has no `=`"),
    "run FILE --set =3": ("E0208", "has no name"),
    "run FILE --set depth=2 --set depth=3": ("E0208", "is given twice"),
    "run FILE --set dpth=2": ("E0205", "did you mean `depth`?"),
    "run FILE --set depth=deep": ("E0205", "`depth` is a number"),
    "run FILE --set depth=": ("E0205", "for example `--set depth=1`"),
    "run FILE --set depth={": ("E0205", "`depth` is a number"),
    "run FILE --set depth=1.5": ("E0322", "is 1.5, not a whole number"),
    "run FILE --set depth=9": ("E0302", "layer 9 does not exist"),
    "run FILE --device nonsense": ("E0208", "there is no such device"),
    "run FILE --device xpu": ("E0208", "torch finds no such device on this machine"),
    "run FILE --device meta": ("E0208", "models can't run there"),
    "run FILE --no-pass nonsense": ("E0208", "passes are"),
    "run FILE --no-pass prefx": ("E0208", "did you mean `prefix`?"),
    "plan FILE --no-pass nonsense": ("E0208", "passes are"),
    "run FILE --only nonsense": ("E0208", "it has `heads`"),
    "run FILE --only head": ("E0208", "did you mean `heads`?"),
    "run FILE --out FILE": ("E0208", "exists"),
    "run FILE --out FILE/under": ("E0208", "not a directory"),
    "graph FILE --format png": ("E0208", "'dot', 'mermaid', 'svg'"),
    "graph FILE --to FILE/x.svg": ("E0208", "cannot write"),
    "graph FILE FILE": ("E0208", "unexpected extra argument"),
    "schema nonsense": ("E0208", "'results', 'differences', 'experiment'"),
    "explain E9999": ("E0208", "there is no code `E9999`"),
    "explain E030": ("E0208", "did you mean"),
}


@pytest.mark.parametrize("line", LINES)
def test_invalid_command_line_is_rejected(line: str, command: Command, tmp_path: Path) -> None:
    code, said = LINES[line]
    path = tmp_path / "heads.mech"
    changes = (("mech 1\n", "mech 1\nparam depth = 1\n"), ("layer 0..1", "layer 0..depth"))
    path.write_text(edited(*changes), encoding="utf-8")
    done = command(*(word.replace("FILE", str(path)) for word in line.split()))
    refused(done, code)
    assert said in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_folder_without_write_permission_is_rejected(
    command: Command, heads: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    refused(command("run", heads, "--out", folder), "E0208")


def test_fmt_of_a_read_only_file_is_rejected(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.mech"
    path.write_text("mech   1\n", encoding="utf-8")

    def denied(self: Path, *rest: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", denied)
    done = command("fmt", path)
    assert (done.status, "cannot write" in done.err) == (2, True)


def test_separate_process_reports_errors_without_traceback(tmp_path: Path) -> None:
    """Errors equal those of this process, without a traceback at interpreter exit."""
    (tmp_path / "braces.mech").write_text("mech 1\n" + "{" * 10_000, encoding="utf-8")
    refused(process("run", "missing.mech", cwd=tmp_path), "E0112")
    refused(process("run", "braces.mech", cwd=tmp_path), "E0109", place=True)
    refused(process("run", "--nonsense", cwd=tmp_path), "E0208")


def test_python_run_raises_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(MechdslError) as found:
        run(HEADS.replace("head *", "head 14"), out=tmp_path / "kept")
    assert [d.code for d in found.value.diagnostics] == ["E0301"]
    assert "patch layer 0..1 head 14" in str(found.value)
    assert not (tmp_path / "kept").exists()


def test_internal_error_exits_with_status_3_without_traceback(
    command: Command, heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("made for this test")

    monkeypatch.setattr("mechdsl.pipeline.computation.execute", broken)
    done = command("run", heads, "--format", "json")
    assert (done.status, done.out) == (3, "")
    assert "ZeroDivisionError: made for this test" in done.err
    assert "MECHDSL_DEBUG=1" in done.err


def test_validate_prints_diagnostics_as_json(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "bad.mech"
    path.write_text(edited(("layer 0..1", "layer 7")), encoding="utf-8")
    done = command("validate", path, tmp_path / "missing.mech", "--format", "json")
    assert done.status == 2
    found = {d["code"]: d for d in json.loads(done.out)}
    assert set(found) == {"E0302", "E0112"}
    assert (found["E0302"]["line"], found["E0302"]["column"]) == (18, 15)
