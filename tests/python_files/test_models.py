"""`model toy = python("own.py:build")`: models returned by Python functions."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.cli.arguments import CheckOptions

from ..cli.conftest import Command, command
from ..fruit import FRUIT
from ..quick import some
from .test_python_files import check, write

__all__ = ["command"]

ZOO = files("mechdsl") / "zoo" / "counting"
EXPERIMENT = """
experiment heads {
  prompts fruit limit 8
  from clean into fewer
  patch layer 1 head * at last-item token
  measure logit(answer) as delta
  stats bootstrap(100) correct none
}
"""
TEXT = FRUIT.replace('zoo("counting")', 'python("own.py:build")') + EXPERIMENT
BUILD = f"""
from pathlib import Path

def build():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (Path(__file__).parent / "calls").open("a") as calls:
        calls.write("called ")
    print("made")
    folder = {str(ZOO)!r}
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
"""


def of_codes(found: mechdsl.Diagnostics) -> list[str]:
    return [each.code for each in found if each.code != "W0720"]


def refused(path: Path, **options: Any) -> Any:
    """The one error that `mechdsl.run` raises."""
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(path, **options)
    (problem,) = raised.value.diagnostics.errors
    return problem


def test_model_from_a_function_equals_the_zoo_model(tmp_path: Path, command: Command) -> None:
    """Covers the command line and Python; the function is called once per run."""
    path = write(tmp_path, TEXT, BUILD)
    done = command("run", path, "--allow-python", "--format", "json")
    assert done.status == 0, done.err
    assert "made\n" in done.err  # and not in the document
    (theirs,) = json.loads(done.out)["files"][0]["experiments"]
    assert (tmp_path / "calls").read_text() == "called "
    ours = mechdsl.run(path, allow_python=True)["heads"]
    assert (tmp_path / "calls").read_text() == "called called "
    (tmp_path / "plain.mech").write_text(FRUIT + EXPERIMENT, encoding="utf-8")
    plain = mechdsl.run(tmp_path / "plain.mech")["heads"]
    np.testing.assert_array_equal(ours.measures[0].patched, plain.measures[0].patched)
    for hashes in (ours.hashes, theirs["hashes"]):
        assert hashes["python own.py"] == sha256(BUILD.encode()).hexdigest()
        assert len(hashes["model"]) == 64
    assert ours.conventions["model"] == 'LlamaForCausalLM, python("own.py:build")'


def test_metric_shares_globals_with_the_model_function(tmp_path: Path) -> None:
    code = BUILD.replace("return ", "global SIZE; SIZE = 7; return ")
    code += "\ndef own(logits, rows):\n    return logits[:, SIZE]\n"
    text = TEXT.replace("measure logit(answer)", "measure own")
    path = write(
        tmp_path, text.replace("\nprompts", '\nmetric own = python("own.py:own")\nprompts'), code
    )
    assert mechdsl.run(path, allow_python=True).complete


@pytest.mark.parametrize("name", some(["plan", "graph", "explain"], ["plan"]))
def test_plan_graph_and_explain_call_the_model_function(
    name: str, tmp_path: Path, command: Command
) -> None:
    path = write(tmp_path, TEXT.replace("head *", "head 14"), BUILD)
    done = command(name, path, "--allow-python")
    assert (done.status, "E0301" in done.err) == (2, True), done.err
    path = write(tmp_path, TEXT, BUILD)
    show = {"plan": mechdsl.plan, "graph": mechdsl.graph, "explain": mechdsl.explain}[name]
    assert "heads" in show(path, allow_python=True)


def test_report_that_would_overwrite_the_python_file_is_rejected(tmp_path: Path) -> None:
    report = '  report csv to "{}"\n  stats'
    path = write(tmp_path, TEXT.replace("  stats", report.format("heads.csv")), BUILD)
    mechdsl.run(path, allow_python=True)
    assert (tmp_path / "heads.csv").is_file()
    path = write(tmp_path, TEXT.replace("  stats", report.format("own.py")), BUILD)
    said = {problem.message for problem in mechdsl.validate(path).errors}
    assert "`report csv` would overwrite `own.py`, which defines `build`" in said


def test_validate_does_not_call_the_model_function(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, TEXT, BUILD + "\nraise RuntimeError('imported')\n")
    done = command("validate", path)
    assert done.status == 0
    assert "`toy` is created by Python code, which doesn't run here" in done.err
    assert of_codes(mechdsl.validate(path)) == ["W0710"]
    assert of_codes(mechdsl.validate(path, require_models=True)) == ["E0221"]


@pytest.mark.parametrize("name", ["run", "plan", "graph", "explain"])
def test_model_function_requires_allow_python(name: str, tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, TEXT, BUILD)
    for options, hint in (((), "add `--allow-python`"), (("--untrusted",), "remove `--untrusted`")):
        done = command(name, path, *options)
        assert done.status == 2
        assert "error[E0221]: `build` is Python" in done.err
        assert hint in done.err
    done = command(name, path, "--untrusted", "--allow-python")
    assert (done.status, "E0208" in done.err) == (2, True)
    assert not (tmp_path / "calls").exists()


def test_model_function_is_not_called_for_an_invalid_file(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "experiment heads {\n}\n", BUILD)
    with pytest.raises(mechdsl.MechdslError):
        mechdsl.run(path, allow_python=True)
    path = write(tmp_path, TEXT + "nonsense\n", BUILD)
    with pytest.raises(mechdsl.MechdslError):
        mechdsl.run(path, allow_python=True)
    assert not (tmp_path / "calls").exists()


def test_model_passed_from_python_replaces_the_model_function(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = AutoModelForCausalLM.from_pretrained(ZOO), AutoTokenizer.from_pretrained(ZOO)
    path = write(tmp_path, TEXT, BUILD)
    assert mechdsl.run(path, {"toy": pair}).complete
    assert not (tmp_path / "calls").exists()


RETURN = "    return AutoModel"
FAILS = {
    "another name": ("def make():\n    pass\n", "E0222", "defines no function `build`"),
    "arguments": ("def build(folder):\n    pass\n", "E0222", "is called with 0"),
    "it raises": ("def build():\n    raise OSError('gone')\n", "E0223", "OSError: gone"),
    "it ends": ("def build():\n    raise SystemExit(3)\n", "E0223", "SystemExit: 3"),
    "nothing": ("def build():\n    pass\n", "E0223", "it returned nothing, not a model"),
    "one": ("def build():\n    return 3\n", "E0223", "it returned a `int`, not a model"),
    "three": ("def build():\n    return 1, 2, 3\n", "E0223", "it returned a `tuple`, not a model"),
    "no model": (f"{BUILD}\n".replace(RETURN, "    return 3, AutoModel").replace(
        "AutoModelForCausalLM.from_pretrained(folder), ", ""), "E0411", "`int` isn't a model"),
    "no tokenizer": ("def build():\n    return 1, None\n", "E0412", "`NoneType`"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_invalid_model_function_reports_its_cause(name: str, tmp_path: Path) -> None:
    code, expected, part = FAILS[name]
    problem = refused(write(tmp_path, TEXT, code), allow_python=True)
    assert problem.code == expected
    assert part in f"{problem.message} {problem.label_text}"
    assert problem.span.line == 3


def test_exception_in_a_model_function_names_its_line(tmp_path: Path) -> None:
    code = "def helper():\n    return 1 / 0\n\n\ndef build():\n    return helper()\n"
    problem = refused(write(tmp_path, TEXT, code), allow_python=True)
    assert problem.label_text == "at own.py:2"


def test_python_file_is_found_relative_to_the_mech_file(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("own.py", "lib/own.py"), BUILD)
    assert of_codes(mechdsl.validate(path)) == ["E0222"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "own.py").rename(tmp_path / "lib" / "own.py")
    assert of_codes(mechdsl.validate(path)) == ["W0710"]


def test_check_without_python_models_imports_no_torch(tmp_path: Path) -> None:
    """Checks don't load models, even if Python may run."""
    write(tmp_path, FRUIT + EXPERIMENT, BUILD)
    options = CheckOptions((), untrusted=False, allow_python=True)
    before = set(sys.modules)
    assert not check(tmp_path / "file.mech", options.settings()).built
    assert "mechdsl.loading.loader" not in set(sys.modules) - before


@pytest.mark.slow
def test_adapter_on_a_model_from_a_function_records_hashes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(ZOO)
    get_peft_model(
        module, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "tuned")
    line = 'model toy = python("own.py:build")\n'
    text = TEXT.replace(line, f'{line}model tuned = local("tuned", base: toy)\n')
    path = write(tmp_path, text.replace("heads {", "heads {\n  model toy, tuned"), BUILD)
    found = mechdsl.run(path, allow_python=True)["heads"]
    assert {cell.coords["model"] for cell in found.cells} == {"toy", "tuned"}
    assert (tmp_path / "calls").read_text() == "called "
    weights = (tmp_path / "tuned" / "adapter_model.safetensors").read_bytes()
    assert found.hashes["model of tuned"] == sha256(weights).hexdigest()
    assert found.hashes["base toy of tuned"] == found.hashes["model of toy"]
    assert found.hashes["python own.py"] == sha256(BUILD.encode()).hexdigest()
