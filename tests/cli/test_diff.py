"""`mechdsl diff` and `mechdsl.diff`: two runs of a store, files and folders."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import mechdsl
from mechdsl.results.differences.comparison import differences_schema

from .conftest import HEADS, Command, Done
from .test_commands import imported_by

EXPECTING = HEADS.replace(
    "  report table\n", "  expect max(recovery) > 0.02 on mean\n  report table\n"
)


class Kept:
    """A file and its store in a temporary folder."""

    def __init__(self, folder: Path, command: Command) -> None:
        self.path, self.store = folder / "heads.mech", folder / "kept"
        self._command = command

    def run(self, text: str, *options: object) -> str:
        """Run this text and return the id of the run."""
        self.path.write_text(text, encoding="utf-8")
        before = self.ids()
        done = self._command("run", self.path, "--store", self.store, *options)
        assert done.status in (0, 1), done.err
        (new,) = set(self.ids()) - set(before)
        return new

    def ids(self) -> list[str]:
        return [run.id for run in mechdsl.runs(self.store)] if self.store.is_dir() else []

    def diff(self, old: object, new: object, *options: object) -> Done:
        return self._command("diff", old, new, "--store", self.store, *options)


@pytest.fixture
def kept(tmp_path: Path, command: Command) -> Kept:
    return Kept(tmp_path, command)


def test_raised_limit_is_a_difference_of_inputs_but_no_cell(kept: Kept) -> None:
    old, new = kept.run(EXPECTING, "--limit", 8), kept.run(EXPECTING)
    done = kept.diff(old, new)
    assert (done.status, done.err) == (0, "")
    for said in (
        f"old  {kept.path}, run {old}",
        f"new  {kept.path}, run {new}",
        "limit: 8 → not there",
        "rows of heads: 8 → 16, 8 of them in both; 8 added",
        "8 cells compared",
        "nothing changed beyond noise",
    ):
        assert said in done.out.replace("\n      ", " "), said


def test_diff_with_a_lost_effect_exits_with_status_1(kept: Kept) -> None:
    """The new run patches from the base run, so every effect is gone."""
    text = EXPECTING.replace("stats correct max by count", "stats correct holm")
    old, new = (
        kept.run(text),
        kept.run(text.replace("last-item token", "last-item token with fewer")),
    )
    done = kept.diff(old, new)
    assert done.status == 1
    assert "text of the file" in done.out
    assert "fails now  heads: expect max(recovery) > 0.02 on mean" in done.out
    assert "1 expectation held before and not now" in done.out
    document = json.loads(kept.diff(old, new, "--format", "json").out)
    jsonschema.validate(document, differences_schema())
    assert document["changed"] is True
    assert {each["turn"] for each in document["verdicts"]} == {"fails now"}
    assert document["counts"].get("changed", 0) > 0
    back = kept.diff(new, old)
    assert "holds now" in back.out
    assert "fails now" not in back.out


def test_diff_finds_runs_by_file_id_or_last(kept: Kept) -> None:
    old, new = kept.run(EXPECTING, "--limit", 8), kept.run(EXPECTING, "--limit", 12)
    wanted = kept.diff(old, new).out
    assert kept.diff(old, "last").out == kept.diff(old, kept.path).out == wanted
    kept.path.write_text(EXPECTING + "# more\n", encoding="utf-8")
    done = kept.diff(old, kept.path)
    assert f"run {new} (the file has changed since this run)" in done.out
    assert "changed since" not in kept.diff(old, "last").out
    assert "both are the same run" in kept.diff(new, "last").out


def test_diff_accepts_a_folder_of_out(kept: Kept, tmp_path: Path) -> None:
    id = kept.run(EXPECTING, "--out", tmp_path / "out")
    done = kept.diff(tmp_path / "out" / "heads", id)
    assert (done.status, done.err) == (0, "")
    assert "equal bit for bit: 8" in done.out


def test_diff_folder_that_holds_a_run_compares_the_run_of_the_other_file(
    kept: Kept, tmp_path: Path
) -> None:
    """The folder may be that of `--out`; of several runs in it, diff uses that of the file."""
    out = tmp_path / "out"
    id = kept.run(EXPECTING, "--out", out)
    for old, new in ((out, id), (id, out), (out, kept.path), (out, out / "heads")):
        done = kept.diff(old, new)
        assert (done.status, done.err) == (0, "")
        assert "equal bit for bit: 8" in done.out
    (out / "heads").rename(out / "others")
    kept.run(EXPECTING + "# more\n", "--out", out)
    assert "equal bit for bit: 8" in kept.diff(out, kept.path).out
    assert "did you mean" in kept.diff(out, id).err


def test_unknown_options_are_not_reported_as_differences(kept: Kept, tmp_path: Path) -> None:
    """A folder doesn't record options; their effects are in the results."""
    kept.run(EXPECTING, "--limit", 8, "--out", tmp_path / "out")
    done = kept.diff("last", tmp_path / "out" / "heads")
    assert "none known" in done.out
    assert "not there" not in done.out


def test_python_diff_accepts_results_in_memory(kept: Kept) -> None:
    id = kept.run(EXPECTING)
    results = mechdsl.run(kept.path, limit=8, store=False, progress=False)
    found = mechdsl.diff(id, results, store=kept.store)
    assert found.rows[0].removed
    assert not found.changed
    assert repr(found).endswith("nothing changed beyond noise>")
    (run,) = mechdsl.runs(kept.store)
    assert mechdsl.diff(run, results).to_dict() == found.to_dict()
    assert mechdsl.diff(results, results).counts == {"equal": 8}


def test_unknown_run_is_rejected(kept: Kept) -> None:
    id = kept.run(EXPECTING)
    done = kept.diff(id, id[:-1] + "zz")
    assert (done.status, done.out) == (2, "")
    assert "error[E0208]" in done.err
    with pytest.raises(mechdsl.MechdslError) as caught:
        mechdsl.diff(id, "nothing", store=kept.store)
    assert [each.code for each in caught.value.diagnostics] == ["E0208"]


def test_diff_with_a_single_run_is_rejected(command: Command) -> None:
    done = command("diff", "last")
    assert done.status == 2
    assert "error[E0208]" in done.err


@pytest.mark.slow
def test_stored_runs_are_compared_without_torch(kept: Kept) -> None:
    old, new = kept.run(EXPECTING, "--limit", 8), kept.run(EXPECTING)
    found = imported_by("diff", old, new, "--store", str(kept.store))
    assert not found & {"torch", "transformers", "altair", "pandas", "networkx"}


def test_differences_schema_is_printed(command: Command) -> None:
    assert json.loads(command("schema", "differences").out) == differences_schema()


def test_tab_completes_runs(kept: Kept, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    id = kept.run(EXPECTING)
    line = f"mechdsl diff --store {kept.store} last {id[:6]}"
    monkeypatch.setenv("_MECHDSL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert f"plain,{id}" in command().out.splitlines()
