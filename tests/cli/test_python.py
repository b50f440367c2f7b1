"""The Python API: validate and run files."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import mechdsl
from mechdsl.diagnostics.rendering import MechdslError

from .conftest import HEADS

DECLARED_ELSEWHERE = HEADS.replace('zoo("counting")', 'hf("nobody/nothing")')


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = str(files("mechdsl") / "zoo" / "counting")
    found = AutoModelForCausalLM.from_pretrained(folder)
    return found, PreTrainedTokenizerFast.from_pretrained(folder)


def test_validate_returns_diagnostics_of_a_text() -> None:
    assert mechdsl.validate(HEADS) == []
    (found,) = mechdsl.validate(HEADS.replace("head *", "head 14"))
    assert (found.code, found.severity) == ("E0301", "error")
    assert found.span is not None
    assert found.span.text == "14"


def test_validate_accepts_a_path(heads: Path) -> None:
    assert mechdsl.validate(heads) == []
    assert mechdsl.validate(str(heads)) == []
    assert [d.code for d in mechdsl.validate(heads.parent / "missing.mech")] == ["E0112"]


def test_run_accepts_a_loaded_model(model: tuple[Any, Any], tmp_path: Path) -> None:
    given = mechdsl.run(DECLARED_ELSEWHERE, models={"toy": model}, out=tmp_path)
    own = mechdsl.run(HEADS)
    table = given["heads"]
    assert table.axes == ("layer", "head")
    assert len(table.cells) == 8
    a, b = (json.loads(r.to_json())["files"][0]["experiments"][0] for r in (given, own))
    assert a["cells"] == b["cells"]
    assert (tmp_path / "text" / "heads.jsonl").is_file()


def test_run_rejects_a_model_that_the_file_does_not_define(model: tuple[Any, Any]) -> None:
    with pytest.raises(MechdslError) as found:
        mechdsl.run(HEADS, models={"tyo": model})
    assert [d.code for d in found.value.diagnostics] == ["E0201"]


def test_run_accepts_set_limit_and_only(tmp_path: Path) -> None:
    text = HEADS.replace("mech 1\n", "mech 1\nparam depth = 1\n").replace("0..1", "0..depth")
    found = mechdsl.run(text, set={"depth": 0}, limit=4, only="heads")
    assert len(found["heads"].cells) == 4
    assert {len(found["heads"].row_ids)} == {4}


def test_unknown_experiment_of_results_raises_key_error() -> None:
    found = mechdsl.run(HEADS, limit=4)
    with pytest.raises(KeyError):
        found["haeds"]


def test_error_message_contains_a_suggestion() -> None:
    with pytest.raises(MechdslError) as found:
        mechdsl.run(HEADS.replace("head *", "head 14").replace("as recovery", "as recovry"))
    assert sorted(d.code for d in found.value.diagnostics) == ["E0203", "E0301"]
    assert "did you mean `recovery`?" in str(found.value)
