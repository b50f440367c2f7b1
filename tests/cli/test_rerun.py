"""Reruns of an unchanged file: nothing is run, and torch isn't imported."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from mechdsl import cli, zoo
from mechdsl.base import records
from mechdsl.execute.patching.rows import Patcher
from mechdsl.pipeline import computation

from .conftest import HEADS, Command, Done, process

HEAVY = ("torch", "transformers", "networkx", "altair", "vl_convert", "pandas", "scipy.stats")
WATCHED = """
import json, os, sys
opened = []
def hook(event, args):
    if event == "open" and not isinstance(args[0], int):
        opened.append(os.fsdecode(args[0]))
sys.addaudithook(hook)
from mechdsl.cli import main
sys.argv[0] = "mechdsl"
try:
    main()
finally:
    with open("seen.json", "w") as file:
        json.dump({"modules": list(sys.modules), "opened": opened}, file)
"""
"""A program that runs the command line and records its imports and opened files."""
EVERY = HEADS.replace(
    "  report table\n",
    "  report table\n  report heatmap layer by head\n  report bars layer\n"
    '  report table to "table.csv"\n  report json to "all.json"\n  expect accuracy(clean) > 2\n',
)


class Watched:
    """A command in a separate process, with its imports and opened files."""

    def __init__(self, *arguments: object, cwd: Path, before: str = "") -> None:
        self.done = subprocess.run(
            [sys.executable, "-c", before + WATCHED, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        seen = json.loads((cwd / "seen.json").read_text("utf-8"))
        self.modules, self.opened = set(seen["modules"]), seen["opened"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder in which this process has run a file, with a store, and what was said."""
    folder = tmp_path_factory.mktemp("rerun")
    (folder / "heads.mech").write_text(EVERY, encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        patch.setattr(sys, "argv", ["mechdsl", "run", "heads.mech", "--store", "kept"])
        for registry in records.REGISTRIES:  # without the modules of other tests
            patch.setattr(registry, "external_modules", set[str]())
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as done:
            cli.main()
    assert done.value.code == 1, err.getvalue()
    assert "expect" in out.getvalue()
    return folder, Done(1, out.getvalue(), err.getvalue())


@pytest.fixture
def made(first: tuple[Path, Done]) -> Path:
    return first[0]


@pytest.mark.parametrize(
    "form",
    ["table", *(pytest.param(form, marks=pytest.mark.slow) for form in ("json", "csv"))],
)
def test_rerun_prints_the_stored_results_without_torch(form: str, first: tuple[Path, Done]) -> None:
    made, plain = first
    for name in ("table.csv", "all.json"):
        (made / name).unlink(missing_ok=True)
    shutil.rmtree(made / "out", ignore_errors=True)
    arguments = ["run", "heads.mech", "--format", form]
    again = Watched(*arguments, "--store", "kept", "--out", "out", cwd=made)
    assert not again.modules & {*HEAVY}
    assert (made / "out" / "heads" / "heads.jsonl").is_file()
    assert (made / "table.csv").is_file()
    if form != "table":
        plain = process(*arguments, "--no-store", cwd=made)
    assert again.done.stdout == plain.out
    assert again.done.returncode == plain.status == 1
    *before, note = [line for line in again.done.stderr.splitlines() if "unchanged" in line]
    assert not before
    assert note.startswith("heads.mech: unchanged since 20")
    assert again.done.stderr.replace(f"{note}\n", "") == plain.err


@pytest.mark.slow
def test_python_rerun_does_not_import_torch(made: Path) -> None:
    code = (
        "import sys, mechdsl\n"
        "results = mechdsl.run('heads.mech', store='kept', write_reports=False)\n"
        "print(results.to_json()[:1], len(results.to_csv()) > 9, results.notes[0][:20])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=made, capture_output=True, text=True
    )
    assert done.stdout == "{ True heads.mech: unchange\n[]\n", done.stderr


@pytest.mark.slow
def test_rerun_does_not_read_weights(tmp_path: Path) -> None:
    """The model has 20 MB; no weights file is opened."""
    folder = own_model(tmp_path, width=256)
    assert (folder / "model.safetensors").stat().st_size > 20e6
    # The store distrusts files that were written a moment ago; this file stays as it is.
    now = "from mechdsl.store import files\nfiles.RACY_SECONDS = 0\n"
    first = Watched("run", "own.mech", "--store", "kept", cwd=tmp_path, before=now)
    assert first.done.returncode == 0, first.done.stderr
    assert weights(first)
    again = Watched("run", "own.mech", "--store", "kept", cwd=tmp_path)
    assert again.done.returncode == 0
    assert again.modules.isdisjoint(HEAVY)
    assert weights(again) == []
    assert again.done.stdout == first.done.stdout


def weights(watched: Watched) -> list[str]:
    return [path for path in watched.opened if path.endswith(".safetensors")]


def own_model(folder: Path, *, width: int) -> Path:
    """Create a random model of eight layers with the zoo's tokenizer, and `own.mech`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    counting, own = Path(zoo.__path__[0]) / "counting", folder / "model"
    torch.manual_seed(0)
    vocabulary = json.loads((counting / "config.json").read_text("utf-8"))["vocab_size"]
    config = GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=8, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(counting / name, own)
    text = HEADS.replace('zoo("counting")', 'local("model")').replace("as recovery", "as delta")
    (folder / "own.mech").write_text(text, encoding="utf-8")
    return own


def seconds(folder: Path, *arguments: str) -> float:
    """Return CPU seconds, the best of three, since other work runs in parallel."""
    best = 60.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = process("run", *arguments, cwd=folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, spent)
        assert "unchanged since" in done.err
    return best


@pytest.mark.slow
def test_rerun_takes_at_most_1_5_cpu_seconds(tmp_path: Path) -> None:
    from mechdsl.base.files import shipped_path

    shutil.copy(shipped_path("examples", "examples") / "counting.mech", tmp_path)
    process("run", "counting.mech", "--store", "kept", cwd=tmp_path)
    assert seconds(tmp_path, "counting.mech", "--store", "kept") < 1.5


@pytest.mark.slow
def test_rerun_with_half_a_gigabyte_takes_at_most_3_cpu_seconds(tmp_path: Path) -> None:
    folder = own_model(tmp_path, width=1152)
    assert (folder / "model.safetensors").stat().st_size > 500e6
    time.sleep(2.1)
    process("run", "own.mech", "--store", "kept", cwd=tmp_path)
    assert seconds(tmp_path, "own.mech", "--store", "kept") < 3


# --- options --------------------------------------------------------------------------------------


def test_store_is_next_to_the_file_by_default(
    heads: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    shutil.move(heads, tmp_path / "below" / "heads.mech")
    first = command("run", "below/heads.mech")
    assert (tmp_path / "below" / ".mechdsl").is_dir()
    assert "unchanged" not in first.err
    assert "unchanged" in command("run", "below/heads.mech").err
    assert "unchanged" in command("run", "below").err
    assert "unchanged" not in command("run", "below/heads.mech", "--no-store").err
    assert "unchanged" not in command("run", "below/heads.mech", "--fresh").err
    assert "unchanged" not in command("run", "below/heads.mech", "--store", "other").err
    assert "unchanged" in command("run", "below/heads.mech", "--store", "other").err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "other"]


def test_rerun_prints_one_note_per_file(heads: Path, command: Command) -> None:
    other = heads.with_name("other.mech")
    other.write_text(HEADS.replace("limit 16", "limit 8"), encoding="utf-8")
    kept = ("--store", heads.parent / "kept")
    assert "unchanged" not in command("run", heads, other, *kept).err
    done = command("run", heads, other, *kept)
    lines = [line for line in done.err.splitlines() if "unchanged" in line]
    assert [line.partition(":")[0] for line in lines] == [str(heads), str(other)]
    assert done.status == 0


SECOND = """
experiment again {
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 1..2 head * at last-item token
  measure logit(answer) - logit(answer of fewer) as delta
  against random(2, heads)
}
"""
CHANGES: dict[str, tuple[tuple[tuple[str, str], ...], int, int]] = {
    "a layer more": ((("layer 0..1", "layer 0..2"),), 128, 192),
    "another layer": ((("layer 0..1", "layer 1..2"),), 64, 128),
    "other positions": ((("last-item token", "last token"),), 0, 128),
    "more rows": ((("limit 16", "limit 24"),), 128, 192),
    "fewer rows": ((("limit 16", "limit 8"),), 64, 64),
    "a measure more": ((("  stats", "  measure prob(answer) as raw\n  stats"),), 0, 128),
    "another effect": ((("as recovery", "as delta"),), 128, 128),
    "another table": ((("report table", "report bars layer"),), 128, 128),
    "another rule": ((("patch layer", "ablate layer"), ("token\n", "token with zero\n")), 0, 128),
}
"""Edits of the file, and then the number of stored rows and of all rows."""


@pytest.mark.parametrize("change", CHANGES)
def test_edited_file_runs_only_rows_missing_in_the_store(
    change: str, heads: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed number of stored rows equals the number of rows that aren't run."""
    counted = rows_that_run(monkeypatch)
    store = ("--store", heads.parent / "kept")
    done = command("run", heads, *store)
    assert (done.status, "from the store" in done.err) == (0, False)
    assert counted == [128]
    pairs, stored, every = CHANGES[change]
    text = heads.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    heads.write_text(text, encoding="utf-8")
    counted[:] = [0]
    done = command("run", heads, *store)
    assert done.status == 0, done.err
    assert counted == [every - stored]
    said = [line for line in done.err.splitlines() if "from the store" in line]
    note = f"{heads}: {stored} of {every} rows from the store"
    assert said == ([note] if stored else [])
    assert "from the store" not in done.out
    plain = command("run", heads, "--no-store")
    assert plain.out == done.out
    (run, _) = json.loads(command("runs", *store, "--format", "json").out)
    assert (run["computed"], run["stored"]) == (every - stored, stored)


def test_rows_of_another_experiment_are_read_from_the_store(
    heads: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of random controls are stored, too."""
    counted = rows_that_run(monkeypatch)
    store = ("--store", heads.parent / "kept")
    command("run", heads, *store)
    second = heads.with_name("second.mech")
    text = HEADS.partition("experiment heads")[0] + SECOND
    second.write_text(text, encoding="utf-8")
    counted[:] = [0]
    alone = command("run", second, "--no-store")
    (every,) = counted
    counted[:] = [0]
    done = command("run", second, *store)
    assert done.out == alone.out
    (said,) = [line for line in done.err.splitlines() if "from the store" in line]
    assert said == f"{second}: {every - counted[0]} of {every} rows from the store"
    assert every > 64
    assert 32 <= every - counted[0] < every


def rows_that_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows run in forward passes, in a list of one number."""
    found = [0]
    real = Patcher.values

    def values(self: Patcher, shared: Any, chosen: Any, members: Any, *others: Any) -> Any:
        found[0] += sum(len(member.rows) for member in members)
        return real(self, shared, chosen, members, *others)

    monkeypatch.setattr(Patcher, "values", values)
    return found


@pytest.mark.parametrize("other", [("--fresh",), ("--store", "kept")])
def test_contradicting_store_options_are_rejected(
    other: tuple[str, ...], heads: Path, command: Command
) -> None:
    done = command("run", heads, "--no-store", *other)
    assert done.status == 2
    assert f"`--no-store` and `{other[0]}` contradict each other" in done.err


def test_standard_input_has_no_store(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(HEADS.encode())))
    done = command("run", "-")
    assert done.status == 0, done.err
    assert "L1H3.z" in done.out
    assert list(tmp_path.iterdir()) == []


# --- failed runs ----------------------------------------------------------------------------------


def test_full_disk_exits_with_status_3_and_a_hint(
    heads: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(computation, "run_checked", full)
    done = command("run", heads, "--store", heads.parent / "kept")
    assert done.status == 3
    assert "can't be written to: no space left on device" in done.err
    assert (
        "the same command then resumes, and finished values stay in the store. `--no-store` runs"
        in done.err
    )
    done = command("run", heads, "--no-store")
    assert done.status == 3
    assert "failed: no space left on device" in done.err
    assert "resume" not in done.err


def test_internal_error_states_that_results_are_stored(
    heads: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(computation, "run_checked", broken)
    done = command("run", heads, "--store", heads.parent / "kept")
    assert done.status == 3
    assert done.err.splitlines()[-1] == (
        "finished results are stored; run the same command to resume"
    )
    assert "resume" not in command("run", heads, "--no-store").err
