"""Locating a model's folder without the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from mechdsl.models.folder import locate_model, require_model
from mechdsl.zoo import zoo_models

from .conftest import statement


def folder(path: Path, *names: str, config: object = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    for name in names:
        (path / name).write_bytes(b"")
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two snapshots of `org/name`; `main` is the second."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--org--name"
    for commit in ("607a30d783dfa663", "11c5a3d5811f5021"):
        folder(root / "snapshots" / commit, "model.safetensors", config={})
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("11c5a3d5811f5021")
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "commit"),
    [
        (None, "11c5a3d5811f5021"),
        ("main", "11c5a3d5811f5021"),
        ("607a30d", "607a30d783dfa663"),
        ("607a30d783dfa663", "607a30d783dfa663"),
    ],
)
def test_hub_snapshot_is_located_by_its_revision(hub: Path, revision: str, commit: str) -> None:
    found, problems = locate_model(statement("org/name", "hf", revision=revision), hub)
    assert not problems
    assert found is not None
    assert found.name == commit


@pytest.mark.parametrize("revision", ["abc", ""])
def test_unknown_revision_warns_and_empty_revision_means_main(hub: Path, revision: str) -> None:
    """An empty revision is a prefix of every commit, so it means `main`."""
    found, problems = locate_model(statement("org/name", "hf", revision=revision), hub)
    assert (found is None) == bool(revision)
    assert [d.code for d in problems] == (["W0710"] if revision else [])


def test_hub_cache_location_follows_hf_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    root = tmp_path / "hub" / "models--gpt2"
    folder(root / "snapshots" / "abc", config={})
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc\n")
    found, _ = locate_model(statement("gpt2", "hf"), tmp_path)
    assert found == root / "snapshots" / "abc"


def test_hf_model_missing_from_the_cache_warns(hub: Path) -> None:
    found, problems = locate_model(statement("org/other", "hf"), hub)
    assert found is None
    assert [(d.code, d.severity) for d in problems] == [("W0710", "warning")]
    assert "not on this machine" in problems[0].message


def test_hf_statement_accepts_a_folder_path(tmp_path: Path) -> None:
    place = folder(tmp_path / "mine", "model.safetensors", config={})
    assert locate_model(statement("mine", "hf"), tmp_path) == (place, [])
    assert locate_model(statement(str(place), "hf"), Path("elsewhere")) == (place, [])


def test_local_path_is_relative_to_the_file(tmp_path: Path) -> None:
    place = folder(tmp_path / "runs" / "a", "model.safetensors", config={})
    assert locate_model(statement("runs/a"), tmp_path) == (place, [])


@pytest.mark.parametrize(
    ("files", "config", "code"),
    [
        ((), None, "E0404"),
        (("pytorch_model.bin",), {}, "E0405"),
        (("weights.pt",), {}, "E0405"),
        (("consolidated.00.pth",), {}, "E0405"),
    ],
)
def test_local_folder_without_config_or_safetensors_is_rejected(
    tmp_path: Path, files: tuple[str, ...], config: object, code: str
) -> None:
    folder(tmp_path / "a", *files, config=config)
    found, problems = locate_model(statement("a"), tmp_path)
    assert found is None
    assert [d.code for d in problems] == [code]


def test_pickled_files_next_to_safetensors_are_ignored(tmp_path: Path) -> None:
    folder(tmp_path / "a", "pytorch_model.bin", "model.safetensors", config={})
    assert locate_model(statement("a"), tmp_path)[1] == []


@pytest.mark.parametrize("kind", ["local", "hf"])
def test_missing_model_warning_becomes_an_error_for_a_run(
    hub: Path, kind: Literal["local", "hf"]
) -> None:
    _, problems = locate_model(statement("no/where", kind), hub)
    assert [d.code for d in problems] == ["W0710"]
    assert [d.code for d in require_model(problems)] == ["E0401"]


def test_unknown_zoo_model_is_rejected_with_a_suggestion(tmp_path: Path) -> None:
    _, problems = locate_model(statement("countin", "zoo"), tmp_path)
    assert [d.code for d in problems] == ["E0403"]
    assert problems[0].help_text == "did you mean `counting`?"
    _, problems = locate_model(statement("xyz", "zoo"), tmp_path)
    assert "`counting`" in problems[0].help_text
    assert "counting" in zoo_models()


def test_finder_modules_do_not_import_torch() -> None:
    code = (
        "import mechdsl.models, mechdsl.models.finder, mechdsl.vocab.sites, sys;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
