"""Checks that were passed once needn't run again, as long as nothing that they hang on changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading import prove
from mechdsl.loading.load import adopt, load

from ..families import tables
from ..families.build import model
from . import families
from .conftest import statement


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHDSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Ran(Exception):
    """The checks were run."""


def fail(*args: Any) -> Iterator[Any]:
    raise Ran


def opened(folder: Path, **fields: Any) -> LoadedModel:
    found, problems = load(statement(str(folder)), **fields)
    assert found is not None, problems
    return found


def test_the_second_time_nothing_is_checked(
    folders: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(folders["gemma3_text"])
    monkeypatch.setattr(prove, "verify", fail)
    second = opened(folders["gemma3_text"])
    assert second.checks == first.checks
    assert second.anatomy == first.anatomy
    assert second.calling == first.calling
    assert second.restartable


@pytest.mark.parametrize("change", ["precision", "config", "version", "switched off", "cut short"])
def test_what_they_hang_on_may_not_change(
    folders: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    opened(folders["llama"])
    (kept,) = (cache / "checks").glob("*.json")
    folder, fields = folders["llama"], {}
    match change:
        case "precision":
            fields = {"dtype": "bfloat16"}
        case "config":
            folder = families.build("llama", tmp_path / "other", rope_theta=5000.0)
        case "version":
            monkeypatch.setattr("mechdsl.loading.proof_store.version", lambda name: "0")
        case "switched off":
            monkeypatch.setenv("MECHDSL_CACHE", "")
        case _:
            kept.write_text(kept.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    monkeypatch.setattr(prove, "verify", fail)
    found, problems = load(statement(str(folder)), **fields)
    assert found is None
    assert [d.code for d in problems] == ["E0410"]  # what `fail` raised


def test_whole_passes_are_said_again(cache: Path, tmp_path: Path) -> None:
    row = next(row for row in tables.every() if row.name == "mamba")
    model(row).save_pretrained(tmp_path / "mamba")  # type: ignore[arg-type, operator]
    families.tokenizer().save(str(tmp_path / "mamba" / "tokenizer.json"))
    said = [load(statement(str(tmp_path / "mamba")))[1] for _ in range(2)]
    assert [d.code for d in said[0]] == ["W0711"]
    assert [d.label_text for d in said[0]] == [d.label_text for d in said[1]]


def test_models_from_python_are_always_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = families.module("llama")
    assert adopt("m", module, families.tokenizer())[0] is not None
    assert not cache.exists()
    monkeypatch.setattr(prove, "verify", fail)
    assert adopt("m", module, families.tokenizer())[0] is None
