"""Repeated runs of a file use the store exactly if nothing relevant differs."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import mechdsl
from mechdsl import MechdslError, zoo
from mechdsl.loading import loader
from mechdsl.pipeline import computation
from mechdsl.results.results import Results
from mechdsl.store.runs import OpenRun
from mechdsl.store.store import Store

from ..cli.conftest import HEADS

ZOO = Path(zoo.__path__[0]) / "counting"
DATA = """mech 1

model toy = local("model")

prompts fruit {
  rows "rows.csv"
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
}

experiment heads {
  model toy
  prompts fruit
  from clean into fewer
  patch layer 0 head * at last-item token
  measure logit(answer) - logit(answer of fewer) as recovery
  report table to "table.csv"
  expect mean(recovery, head 0) > 5
}
"""
ROWS = "count,item\n" + "".join(f"{n},{item}\n" for item in ("apple", "fig") for n in range(3, 9))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the computed files, in order."""
    found: list[str] = []
    real = computation.run_checked

    def counted(checked: Any, *arguments: Any, **named: Any) -> Any:
        found.append(checked.source.name)
        return real(checked, *arguments, **named)

    monkeypatch.setattr(computation, "run_checked", counted)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a data file, and a store from a run of the file."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ZOO / name, folder / "model")
    (folder / "rows.csv").write_text(ROWS, encoding="utf-8")
    (folder / "heads.mech").write_text(DATA, encoding="utf-8")
    again(folder / "heads.mech")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder `made`."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy" / "heads.mech"


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def again(file: Path, **options: Any) -> Results:
    options = {"store": file.parent / ".mechdsl", **options}
    return mechdsl.run(file, **options)


def seen(results: Results) -> tuple[Any, ...]:
    """All visible parts of results."""
    told = [str(each) for each in results.diagnostics]
    return results.to_json(), results.to_csv(), results.to_text(), told, results.holds


pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def test_unmodified_file_is_not_computed_again(here: Path, computed: list[str]) -> None:
    (here.parent / "table.csv").unlink()
    second = again(here)
    assert computed == []
    (note,) = second.notes
    assert note.startswith(f"{here}: unchanged since 20")
    assert note.endswith("); `--fresh` computes it again")
    first = again(here, store=False)
    assert computed == [str(here)]
    assert first.notes == ()
    assert seen(second) == seen(first)
    assert not second.holds
    assert second.written == first.written
    assert (here.parent / "table.csv").is_file()


def test_cached_run_rewrites_its_reports(here: Path) -> None:
    path = here.parent / "table.csv"
    whole = path.read_bytes()
    path.write_text("", encoding="utf-8")
    again(here)
    assert path.read_bytes() == whole
    path.unlink()
    assert again(here, write_reports=False).written == ()
    assert not path.exists()


def test_cached_run_from_another_folder_uses_the_new_file_name(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results and diagnostics have the file's current name."""
    monkeypatch.chdir(here.parent)
    results = again(Path("heads.mech"))
    assert computed == []
    assert results.files[0].file == "heads.mech"
    assert all(d.span is None or d.span.source.name == "heads.mech" for d in results.diagnostics)


def test_output_folder_of_a_cached_run_equals_a_computed_run(
    here: Path, tmp_path: Path, computed: list[str]
) -> None:
    """The folder has the values of every prompt."""
    again(here, out=tmp_path / "one")
    assert computed == []
    again(here, out=tmp_path / "two", store=False)
    assert computed == [str(here)]
    names = {path.name for path in (tmp_path / "one" / "heads").iterdir()}
    assert "heads.jsonl" in names
    for name in names:
        one, two = (tmp_path / out / "heads" / name for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Modify the content of a file, keeping its size but not its time."""
    before = path.read_bytes()
    after = change(before)
    assert after != before
    path.write_bytes(after)


def other_weights(here: Path) -> dict[str, Any]:
    path = here.parent / "model" / "model.safetensors"
    size = path.stat().st_size
    rewritten(path, lambda b: b[:-1] + bytes([b[-1] ^ 1]))
    assert path.stat().st_size == size
    return {}


def other_weights_of_the_same_time(here: Path) -> dict[str, Any]:
    path = here.parent / "model" / "model.safetensors"
    before = path.stat()
    other_weights(here)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    return {}


def other_tokenizer(here: Path) -> dict[str, Any]:
    rewritten(here.parent / "model" / "tokenizer.json", lambda b: b + b"\n")
    return {}


def other_roles(here: Path) -> dict[str, Any]:
    rewritten(here.parent / "model" / "tokenizer_config.json", lambda b: b + b"\n")
    return {}


def other_config(here: Path) -> dict[str, Any]:
    path = here.parent / "model" / "config.json"
    rewritten(path, lambda b: b.replace(b'"eps"', b'"eps" ') + b"\n")
    return {}


def other_rows(here: Path) -> dict[str, Any]:
    rewritten(here.parent / "rows.csv", lambda b: b.replace(b"apple", b"grape", 1))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_weights_of_the_same_time,
        other_tokenizer,
        other_roles,
        other_config,
        other_rows,
        lambda here: {"dtype": "float64"},
        lambda here: {"limit": 8},
        lambda here: {"only": "heads"},
        lambda here: {"no_pass": ["resume"]},
        lambda here: {"pass_tokens": 200},
        lambda here: {"allow_nan": True},
        lambda here: {"fresh": True},
        lambda here: {"profile": True},
        lambda here: {"store": False},
    ],
)
def test_modified_inputs_or_options_recompute_the_file(
    change: Callable[[Path], dict[str, Any]], here: Path, computed: list[str]
) -> None:
    again(here, **change(here))
    assert computed == [str(here)]


def test_file_is_recomputed_with_another_transformers_version(
    here: Path, computed: list[str], of_version: Callable[[str, str], None]
) -> None:
    of_version("transformers", "5.99")
    again(here)
    assert computed == [str(here)]
    again(here)
    assert computed == [str(here)]


def test_fresh_run_replaces_the_cached_run(here: Path, computed: list[str]) -> None:
    (before,) = again(here).notes
    again(here, fresh=True)
    (after,) = again(here).notes
    assert len(computed) == 1
    assert after.partition("(")[2] != before.partition("(")[2]


def test_truncated_archive_is_recomputed(here: Path, computed: list[str]) -> None:
    """The damage is detected, and the file is run again."""
    with Store(here.parent / ".mechdsl") as store:
        assert len(store.runs()) == 1
    for path in (here.parent / ".mechdsl").rglob("*"):
        if path.is_file() and path.stat().st_size > 500 and path.suffix != ".sqlite":
            content = path.read_bytes()
            if b"heads" in content and not content.startswith(b"SQLite"):
                path.write_bytes(content[: len(content) // 2])
    again(here)
    assert computed == [str(here)]


def test_store_records_settings_and_outcome_of_a_run(here: Path) -> None:
    with Store(here.parent / ".mechdsl") as store:
        (run,) = store.runs()
    assert run.state == "finished"
    about = run.about
    assert Path(about["path"]).name == "heads.mech"
    assert about["file"].endswith("heads.mech")
    assert about["settings"] == {}
    assert about["held"] == 0
    assert about["expectations"] == 1
    assert about["seconds"] > 0
    again(here, limit=8, dtype="float64", no_pass=["resume"])
    with Store(here.parent / ".mechdsl") as store:
        settings = store.runs()[0].about["settings"]
    assert settings == {"limit": "8", "dtype": "float64", "no-pass": "resume"}


def test_incomplete_run_is_computed_again(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdsl.results.experiment_result.FileResult.complete", False)
    again(here, limit=8)
    again(here, limit=8)
    assert len(computed) == 2


def test_run_whose_inputs_are_modified_meanwhile_is_not_stored(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are rewritten during the run, so its results belong to no version."""
    real = computation.run_checked

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        done = real(*arguments, **named)
        other_weights(here)
        return done

    monkeypatch.setattr(computation, "run_checked", meanwhile)
    results = again(here, limit=8)
    note, counts = results.notes
    assert "not stored: a file that it read changed during the run" in note
    assert counts == f"{here}: 32 of 32 rows from the store"
    with Store(here.parent / ".mechdsl") as store:
        assert [run.state for run in store.runs()] == ["unfinished", "finished"]


def test_values_from_rows_without_digest_are_not_stored(tmp_path: Path) -> None:
    """A function gets a date: its values aren't stored, and a note reports that."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"count": [3, 4, 5, 6], "item": ["apple", "fig"] * 2, "day": [date(2020, 1, 9)] * 4}
    parquet.write_table(arrow.table(columns), tmp_path / "rows.parquet")
    (tmp_path / "own.py").write_text(
        "def read(logits, rows):\n    return [row['day'].day for row in rows]\n", "utf-8"
    )
    text = DATA.partition("  expect")[0].replace("rows.csv", "rows.parquet") + "}\n"
    text = text.replace("logit(answer) - logit(answer of fewer)", 'python("own.py:read")')
    text = text.replace('local("model")', 'zoo("counting")').replace("as recovery", "as raw")
    file = tmp_path / "heads.mech"
    file.write_text(text, encoding="utf-8")
    (note,) = (results := again(file, allow_python=True)).notes
    assert note.endswith("values of `heads` are not stored: a date has no digest")
    assert (results["heads"].measures[0].patched == 9).all()
    file.write_text(text + "# another\n", encoding="utf-8")
    assert again(file, allow_python=True).notes == results.notes


FROM_FOLDER = "_load_module"
"""Name of the function that loads the files."""


def test_weights_modified_while_loading_are_an_error(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old weights are loaded but the new ones are hashed; values stored under that hash would
    be wrong."""
    real: Callable[..., Any] = getattr(loader, FROM_FOLDER)

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        done = real(*arguments, **named)
        other_weights(here)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(loader, FROM_FOLDER, meanwhile)
        with pytest.raises(MechdslError, match="changed while they were read"):
            again(here, limit=8)
    assert seen(again(here, limit=8)) == seen(again(here, limit=8, store=False))


# --- files of activations -------------------------------------------------------------------------

SAVE = '  save resid_post layer 1 of clean at last-item token to "own.safetensors"\n  report table'


def with_save(file: Path) -> Path:
    text = file.read_text(encoding="utf-8").replace("  report table", SAVE, 1)
    file.write_text(text, encoding="utf-8")
    return file.parent / "own.safetensors"


def patched(results: Results) -> bytes:
    return results["heads"].measures[0].patched.tobytes()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each stored block of values."""
    found: list[int] = []
    real = OpenRun.keep

    def counted(self: OpenRun, block: Any) -> None:
        found.append(len(block.cells))
        real(self, block)

    monkeypatch.setattr(OpenRun, "keep", counted)
    return found


def test_save_added_to_stored_experiments_computes_only_its_activations(
    here: Path, passes: list[int]
) -> None:
    first = again(here)
    saved = with_save(here)
    for _ in range(2):  # first with a modified text, then with the same text
        found = again(here)
        assert passes == []
        assert [note.partition(": ")[2] for note in found.notes] == ["48 of 48 rows from the store"]
        assert patched(found) == patched(first)
        content = saved.read_bytes()
        saved.unlink()
    again(here, store=False)
    assert saved.read_bytes() == content
    with Store(here.parent / ".mechdsl") as store:
        assert {run.state for run in store.runs()} == {"finished"}


@pytest.mark.parametrize("at", ["a pass", "the file"])
def test_interrupted_run_with_save_resumes(
    at: str, here: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = with_save(here)
    how = {"pass_tokens": 60, "store": here.parent / "Kept"}
    whole = again(here, **{**how, "store": here.parent / "Other"})
    every = len(passes)
    assert every > 3
    passes.clear()
    saved.unlink()
    with monkeypatch.context() as patch:
        if at == "a pass":
            real = OpenRun.keep

            def stopped(self: OpenRun, block: Any) -> None:
                if len(passes) == every // 2:
                    raise KeyboardInterrupt
                real(self, block)

            patch.setattr(OpenRun, "keep", stopped)
        else:
            patch.setattr("mechdsl.store.files.TensorFile.put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(here, **how)
    assert not saved.exists()
    before = len(passes)
    assert before == (every if at == "the file" else every // 2)
    passes.clear()
    found = again(here, **how)
    assert len(passes) == every - before
    assert patched(found) == patched(whole)
    assert saved.exists()
    with Store(here.parent / "Kept") as store:
        assert [run.state for run in store.runs()] == ["finished"]


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# --- stores ---------------------------------------------------------------------------------------


def warned(results: Results) -> list[str]:
    return [d.message for d in results.diagnostics if d.code == "W0782"]


def test_store_path_that_is_a_file_warns(here: Path, computed: list[str]) -> None:
    file = here.parent / "kept"
    file.write_text("", encoding="utf-8")
    with pytest.warns(mechdsl.MechdslWarning, match="W0782"):
        results = again(here, store=file)
    assert warned(results) == [f"the store `{file}` can't be used: it is a file, not a folder"]
    assert computed == [str(here)]


def test_read_only_store_is_read_and_warns_if_values_are_computed(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached values are read; new values aren't stored, which a warning reports."""
    monkeypatch.setattr(Store, "_prepare", lambda self: False)
    assert warned(again(here)) == []
    assert computed == []
    folder = here.parent / ".mechdsl"
    said = [f"the store `{folder}` is read-only, so nothing is stored"]
    assert warned(again(here, limit=8)) == said
    assert warned(again(here, limit=8)) == said
    assert len(computed) == 2


def test_full_disk_during_a_run_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(computation, "run_checked", full)
    with pytest.raises(MechdslError) as found:
        again(here, limit=8, store=here.parent / "Kept")
    (said,) = found.value.diagnostics
    folder = here.parent / "Kept"
    assert said.code == "E0208"
    assert said.message == f"the store `{folder}` can't be written to: no space left on device"
    assert "the same command then resumes" in said.help_text
    assert "`--no-store` runs without" in said.help_text


def test_full_disk_at_the_end_of_a_run_warns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The computed results are still returned."""

    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mechdsl.store.runs.OpenRun.finish", full)
    results = again(here, limit=8)
    (said,) = warned(results)
    assert said.endswith("rejects the results: no space left on device")
    assert results["heads"].prompts == 8


def test_other_os_errors_are_not_converted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(computation, "run_checked", broken)
    with pytest.raises(FileNotFoundError):
        again(here, limit=8)


# --- location of the store ------------------------------------------------------------------------


def test_store_location_follows_argument_and_environment(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MECHDSL_STORE")
    assert again(here, store=None).notes
    monkeypatch.setenv("MECHDSL_STORE", str(here.parent / "elsewhere"))
    assert not again(here, store=None).notes
    assert again(here, store=None).notes
    monkeypatch.setenv("MECHDSL_STORE", "none")
    assert not again(here, store=None).notes
    assert again(here, store=str(here.parent / "elsewhere")).notes
    assert len(computed) == 2


def test_program_text_has_no_store_unless_named(computed: list[str], inside: Path) -> None:
    text = HEADS.replace("limit 16", "limit 4")
    mechdsl.run(text, write_reports=False)
    assert list(inside.iterdir()) == []
    mechdsl.run(text, write_reports=False, store="named")
    results = mechdsl.run(text, write_reports=False, store="named")
    assert len(computed) == 2
    assert results.notes[0].startswith("<text>: unchanged since")


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MECHDSL_STORE")
    return tmp_path


def test_untrusted_file_ignores_the_store_in_its_folder(
    here: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made the file may have forged the values in its store."""
    monkeypatch.delenv("MECHDSL_STORE")
    text = here.read_text("utf-8").replace('  report table to "table.csv"\n', "")
    here.write_text(text, encoding="utf-8")
    for _ in range(2):
        assert again(here, store=None, untrusted=True).notes == ()
    assert len(computed) == 2


@pytest.mark.parametrize("store", [True, 3])
def test_store_that_is_no_path_is_rejected(store: Any, here: Path) -> None:
    with pytest.raises(MechdslError, match="it must be a folder"):
        mechdsl.run(here, store=store)


def test_fresh_without_a_store_is_rejected(here: Path) -> None:
    with pytest.raises(MechdslError, match="`store=False` and `fresh=True` contradict each other"):
        mechdsl.run(here, store=False, fresh=True)


# --- models from Python ---------------------------------------------------------------------------


@pytest.mark.slow
def test_run_on_a_model_from_python_is_cached_by_its_identity(
    here: Path, computed: list[str]
) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(ZOO)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ZOO)
    own = {"toy": (model, tokenizer)}
    first = again(here, models=own)
    second = again(here, models=own)
    assert len(computed) == 1
    assert seen(first) == seen(second)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    again(here, models=own)
    assert len(computed) == 2
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    for _ in range(2):
        results = again(here, models=own)
        (note,) = results.notes
        assert "nothing of it is stored: model `toy` can't be identified" in note
        assert note.endswith("`model.layers.0` has forward hooks")
    assert len(computed) == 4
    hook.remove()
    again(here, models=own)
    assert len(computed) == 4


# --- Python files ---------------------------------------------------------------------------------


def test_run_depends_on_python_files_and_their_imports(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = tmp_path / "lib"
    helpers.mkdir()
    (helpers / "own_helper_of_rerun.py").write_text("def two(): return 2\n", encoding="utf-8")
    code = (
        "def many(row):\n    from own_helper_of_rerun import two\n    return row['count'] * two()\n"
    )
    (tmp_path / "own.py").write_text(code, encoding="utf-8")
    text = HEADS.replace(
        '  template "Part', '  many = python("own.py:many")\n  template "Part'
    ).replace("limit 16", "limit 4")
    file = tmp_path / "heads.mech"
    file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(helpers)
    again(file, allow_python=True)
    again(file, allow_python=True)
    assert len(computed) == 1
    (tmp_path / "own.py").write_text(code + "# more\n", encoding="utf-8")
    again(file, allow_python=True)
    again(file, allow_python=True)
    assert len(computed) == 2
    time.sleep(0.01)
    (helpers / "own_helper_of_rerun.py").write_text("def two(): return 22\n", encoding="utf-8")
    results = again(file, allow_python=True)  # the process still has the old module in memory
    assert len(computed) == 3
    assert "`own_helper_of_rerun.py` may have changed since this process" in results.notes[0]
    monkeypatch.delitem(__import__("sys").modules, "own_helper_of_rerun")
    again(file, allow_python=True)
    again(file, allow_python=True)
    assert len(computed) == 4
