"""`mechdsl fit` and `run --fit`: what they print, and their exit statuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mechdsl

from .conftest import Command

CALM = (
    "fit(sae(features: 64, k: 8), prompts: repeats.train, limit: 100, steps: 40, batch: 128, "
    "rate: 0.01) at resid_post layer 0 at tokens 1..-1"
)
WILD = CALM.replace("0.01", "0.99")

TEXT = """mech 1

model toy = zoo("induction")

prompts repeats {
  word in words(toy)
  half = list(word, 4, sep: " ", distinct: true)
  template "{half} {again = half} {cue = half[1]}"
  answer " {half[2]}"
  split 80%
}

basis wild = {WILD}
basis calm = {CALM}

experiment of_wild {
  prompts repeats.test limit 8
  set resid_post layer 0 at tokens 1..-1 to reconstruction of wild
  measure correct as raw
}

experiment of_calm {
  prompts repeats.test limit 8
  set resid_post layer 0 at tokens 1..-1 to reconstruction of calm
  measure correct as raw
}
""".replace("{WILD}", WILD).replace("{CALM}", CALM)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "fit.mech"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, Path]:
    return "--store", tmp_path / "store"


def assert_reports_divergence(text: str) -> None:
    assert "error[E0643]: `wild` can't be trained: the loss rose from" in text
    assert "lower the learning rate: `rate: 0.099`" in text


def test_fit_with_a_diverged_training_exits_with_status_3(
    command: Command, path: Path, store: tuple[str, Path]
) -> None:
    done = command("fit", path, *store)
    assert done.status == 3
    assert_reports_divergence(done.err)
    names = {line.split()[0] for line in done.out.splitlines() if line.strip()}
    assert "calm" in names
    assert "wild" not in names
    again = command("fit", path, *store, "--format", "json")
    assert again.status == 3
    document: dict[str, Any] = json.loads(again.out)
    assert [each["basis"] for each in document["fits"]] == ["calm"]
    (problem,) = document["diagnostics"]
    assert (problem["code"], problem["severity"]) == ("E0643", "error")
    assert "the loss rose from" in problem["message"]


def test_run_fit_with_a_diverged_training_runs_the_other_experiment(
    command: Command, path: Path, store: tuple[str, Path]
) -> None:
    done = command("run", "--fit", path, *store)
    assert done.status == 3
    assert_reports_divergence(done.err)
    assert "of_calm: correct" in done.out
    assert "of_wild: correct" not in done.out


def test_python_warns_of_a_diverged_training_and_raises_without_another(
    path: Path, tmp_path: Path
) -> None:
    with pytest.warns(mechdsl.MechdslWarning, match="the loss rose from"):
        (done,) = mechdsl.fit(path, store=tmp_path / "store")
    assert done.basis == "calm"
    alone = path.with_name("alone.mech")
    text = TEXT.split("experiment of_calm")[0].replace(f"basis calm = {CALM}", "")
    alone.write_text(text, "utf-8")
    with pytest.raises(mechdsl.MechdslError, match="the loss rose from"):
        mechdsl.fit(alone, store=tmp_path / "store")


def test_finished_fit_exits_with_status_0(
    command: Command, path: Path, store: tuple[str, Path]
) -> None:
    path.write_text(TEXT.replace("rate: 0.99", "rate: 0.02"), "utf-8")
    done = command("fit", path, *store)
    assert (done.status, done.err) == (0, "")


def test_run_fit_without_a_store_reports_only_e0208(command: Command, path: Path) -> None:
    done = command("run", "--fit", "--no-store", path)
    assert done.status == 2
    assert "error[E0208]: trainings are kept in a store, and this run has none" in done.err
    assert "E0642" not in done.err
