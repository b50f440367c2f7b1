"""`model toy = python("own.py:build")`: what a function gives is the model, where it may run."""

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
from mechdsl.cli.arguments import settings_from_options

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


def test_it_is_the_model_that_the_function_gives(tmp_path: Path, command: Command) -> None:
    """From the command line and from Python, called once a run; both hashes are kept."""
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


def test_a_metric_of_the_same_file_shares_what_it_has_made(tmp_path: Path) -> None:
    code = BUILD.replace("return ", "global SIZE; SIZE = 7; return ")
    code += "\ndef own(logits, rows):\n    return logits[:, SIZE]\n"
    text = TEXT.replace("measure logit(answer)", "measure own")
    path = write(
        tmp_path, text.replace("\nprompts", '\nmetric own = python("own.py:own")\nprompts'), code
    )
    assert mechdsl.run(path, allow_python=True).complete


@pytest.mark.parametrize("name", some(["plan", "graph", "explain"], ["plan"]))
def test_other_commands_make_it_too(name: str, tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, TEXT.replace("head *", "head 14"), BUILD)
    done = command(name, path, "--allow-python")
    assert (done.status, "E0301" in done.err) == (2, True), done.err
    path = write(tmp_path, TEXT, BUILD)
    show = {"plan": mechdsl.plan, "graph": mechdsl.graph, "explain": mechdsl.explain}[name]
    assert "heads" in show(path, allow_python=True)


def test_reports_go_to_files_but_not_over_the_function(tmp_path: Path) -> None:
    report = '  report csv to "{}"\n  stats'
    path = write(tmp_path, TEXT.replace("  stats", report.format("heads.csv")), BUILD)
    mechdsl.run(path, allow_python=True)
    assert (tmp_path / "heads.csv").is_file()
    path = write(tmp_path, TEXT.replace("  stats", report.format("own.py")), BUILD)
    said = {problem.message for problem in mechdsl.validate(path).errors}
    assert "`report csv` would overwrite `own.py`, which defines `build`" in said


def test_validate_calls_nothing(tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, TEXT, BUILD + "\nraise RuntimeError('imported')\n")
    done = command("validate", path)
    assert done.status == 0
    assert "`toy` is created by Python code, which doesn't run here" in done.err
    assert of_codes(mechdsl.validate(path)) == ["W0710"]
    assert of_codes(mechdsl.validate(path, require_models=True)) == ["E0221"]


@pytest.mark.parametrize("name", ["run", "plan", "graph", "explain"])
def test_nothing_runs_without_a_word(name: str, tmp_path: Path, command: Command) -> None:
    path = write(tmp_path, TEXT, BUILD)
    for options, hint in (((), "add `--allow-python`"), (("--untrusted",), "remove `--untrusted`")):
        done = command(name, path, *options)
        assert done.status == 2
        assert "error[E0221]: `build` is Python" in done.err
        assert hint in done.err
    done = command(name, path, "--untrusted", "--allow-python")
    assert (done.status, "E0208" in done.err) == (2, True)
    assert not (tmp_path / "calls").exists()


def test_it_is_not_called_where_the_file_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT + "experiment heads {\n}\n", BUILD)
    with pytest.raises(mechdsl.MechdslError):
        mechdsl.run(path, allow_python=True)
    path = write(tmp_path, TEXT + "nonsense\n", BUILD)
    with pytest.raises(mechdsl.MechdslError):
        mechdsl.run(path, allow_python=True)
    assert not (tmp_path / "calls").exists()


def test_a_model_that_is_handed_over_stands_for_it(tmp_path: Path) -> None:
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
def test_functions_that_give_no_model(name: str, tmp_path: Path) -> None:
    code, expected, part = FAILS[name]
    problem = refused(write(tmp_path, TEXT, code), allow_python=True)
    assert problem.code == expected
    assert part in f"{problem.message} {problem.label_text}"
    assert problem.span.line == 3


def test_the_line_that_raised_is_named(tmp_path: Path) -> None:
    code = "def helper():\n    return 1 / 0\n\n\ndef build():\n    return helper()\n"
    problem = refused(write(tmp_path, TEXT, code), allow_python=True)
    assert problem.label_text == "at own.py:2"


def test_the_file_is_looked_for_beside_the_mech_file(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT.replace("own.py", "lib/own.py"), BUILD)
    assert of_codes(mechdsl.validate(path)) == ["E0222"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "own.py").rename(tmp_path / "lib" / "own.py")
    assert of_codes(mechdsl.validate(path)) == ["W0710"]


def test_checking_without_such_models_needs_no_torch(tmp_path: Path) -> None:
    """A file with a metric of Python is checked without torch, also where it may run."""
    write(tmp_path, FRUIT + EXPERIMENT, BUILD)
    how = settings_from_options((), python="run", allow_outside=False, untrusted=False)
    before = set(sys.modules)
    assert not check(tmp_path / "file.mech", how).built
    assert "mechdsl.loading.loader" not in set(sys.modules) - before


def test_an_adapter_on_a_model_that_a_function_makes(tmp_path: Path) -> None:
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
