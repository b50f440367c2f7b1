"""`mechdsl new`: options, questions, bad answers, and the files that it writes."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner

import mechdsl
from mechdsl.cli import new as new_module
from mechdsl.cli.new import MEASURES, POSITIONS, SITES, TASKS, experiment_text

from .conftest import Command


@pytest.mark.parametrize("task", TASKS)
def test_every_combination_of_choices_validates(task: str, tmp_path: Path) -> None:
    model = f'zoo("{TASKS[task].model}")'
    for number, choices in enumerate(product(SITES, POSITIONS, MEASURES)):
        file = tmp_path / f"{number}.mech"
        file.write_text(experiment_text(TASKS[task], model, *choices), encoding="utf-8")
        assert mechdsl.validate(file) == [], choices


@pytest.mark.parametrize("task", TASKS)
def test_written_file_of_each_task_runs(command: Command, tmp_path: Path, task: str) -> None:
    file = tmp_path / "first.mech"
    assert command("new", file, "--task", task).status == 0
    done = command("run", file)
    assert (done.status, "recovery" in done.out) == (0, True), done.err


def test_written_file_is_in_canonical_form(command: Command, tmp_path: Path) -> None:
    for task in TASKS:
        file = tmp_path / f"{task}.mech"
        assert command("new", file, "--task", task).status == 0
        assert command("fmt", "--check", file).status == 0


def test_options_select_each_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "first.mech"
    options = ("--patch", "heads", "--at", "changed", "--measure", "logit", "--model", "local:m")
    assert command("new", file, *options).status == 0
    text = file.read_text(encoding="utf-8")
    assert 'model subject = local("m")' in text
    assert "patch layer * head * at last-item token" in text
    assert "measure logit(answer) as delta" in text


def test_questions_repeat_after_a_bad_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdsl.cli.new.is_terminal", lambda: True)
    file = tmp_path / "first.mech"
    answers = "poetry\nnames\nnonsense\nzoo:names\nmlp\nlast\nprobability\n"
    done = CliRunner().invoke(new_module.new, [str(file)], input=answers)
    assert done.exception is None
    assert "'poetry' is not one of" in done.output
    assert "`nonsense` is not a model" in done.output
    text = file.read_text(encoding="utf-8")
    assert 'zoo("names")' in text
    assert "patch mlp_out layer * at last token" in text
    assert "measure prob(answer) as delta" in text


def test_existing_file_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "first.mech"
    file.write_text("mine", encoding="utf-8")
    done = command("new", file)
    assert done.status == 2
    assert "already exists" in done.err
    assert file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("options", [("--task", "poetry"), ("--model", "zoo"), ("--at", "here")])
def test_bad_option_writes_nothing(
    command: Command, tmp_path: Path, options: tuple[str, str]
) -> None:
    file = tmp_path / "first.mech"
    done = command("new", file, *options)
    assert (done.status, done.out) == (2, "")
    assert "error[E0208]" in done.err
    assert not file.exists()


def test_missing_extension_is_added(command: Command, tmp_path: Path) -> None:
    done = command("new", tmp_path / "first try")
    assert done.status == 0, done.err
    assert (tmp_path / "first try.mech").is_file()
    assert "mechdsl run '" in done.out


def test_other_extension_is_rejected(command: Command, tmp_path: Path) -> None:
    done = command("new", tmp_path / "first.txt")
    assert done.status == 2
    assert "write `first.mech`" in done.err


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        ("gpt2", "did you mean `hf:gpt2`?"),
        ("counting", "did you mean `zoo:counting`?"),
        ("EleutherAI/pythia-70m", "did you mean `hf:EleutherAI/pythia-70m`?"),
        ("hub:gpt2", "`zoo:NAME`, `hf:ORG/NAME` or `local:FOLDER`"),
        ("zoo:nothing", "it has `counting`"),
    ],
)
def test_wrong_model_names_the_fix(command: Command, tmp_path: Path, model: str, fix: str) -> None:
    file = tmp_path / "first.mech"
    done = command("new", file, "--model", model)
    assert done.status == 2
    assert fix in done.err
    assert not file.exists()


def test_model_that_does_not_know_the_words_writes_nothing(
    command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "first.mech"
    done = command("new", file, "--task", "counting", "--model", "zoo:names")
    assert (done.status, file.exists()) == (2, False)
    assert "error[E0519]" in done.err
    assert "was not written" in done.err


def test_missing_model_is_a_warning(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "first.mech"
    done = command("new", file, "--model", "hf:org/not-downloaded")
    assert (done.status, file.exists()) == (0, True)
    assert "warning[W0710]" in done.err


def test_end_of_input_in_a_question_writes_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdsl.cli.new.is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdin", io.StringIO("counting\n"))
    file = tmp_path / "first.mech"
    done = command("new", file)
    assert (done.status, file.exists()) == (130, False)
    assert "Traceback" not in done.err
