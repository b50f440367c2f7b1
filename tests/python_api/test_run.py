"""`mechdsl.run` and the command line agree: files, warnings, errors, arguments."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.show.progress import is_interactive

from .conftest import FILE, WARNED

AWAY = FILE.replace('zoo("counting")', 'hf("nobody/nothing")')
Ran = tuple[mechdsl.Results, Path, list[Any]]


def refused(*arguments: Any, **more: Any) -> mechdsl.MechdslError:
    with pytest.raises(mechdsl.MechdslError) as found:
        mechdsl.run(*arguments, **more)
    return found.value


# --- files ---


def test_run_writes_reports_to_files(ran: Ran) -> None:
    results, folder, _ = ran
    assert results.written == (folder / "maps" / "heads.svg",)
    assert results.written[0].read_text(encoding="utf-8").startswith("<svg")


def test_run_with_write_reports_false_writes_no_file(inside: Path) -> None:
    results = mechdsl.run(FILE, only="heads", limit=16, write_reports=False)
    assert results.written == ()
    assert list(inside.iterdir()) == []


def test_unwritable_report_is_rejected_before_the_run(inside: Path) -> None:
    Path("maps").write_text("no folder", encoding="utf-8")
    assert [d.code for d in refused(FILE).diagnostics.errors] == ["E0533"]


def test_full_disk_fails_only_the_report(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mechdsl.show.reports.charts.save_chart", full)
    with pytest.warns(mechdsl.MechdslWarning, match="no space left") as shown:
        results = mechdsl.run(FILE, only="heads", limit=16)
    assert [d.code for d in results.diagnostics] == ["E0536"]
    assert len(shown) == 1
    assert results.written == ()
    assert results["heads"].holds


def test_failing_chart_fails_only_its_report(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("made for this test")

    monkeypatch.setattr("mechdsl.show.reports.charts.save_chart", broken)
    with pytest.warns(mechdsl.MechdslWarning, match="ValueError: made for this test"):
        results = mechdsl.run(FILE, only="heads", limit=16)
    assert len(results["heads"].cells) == 8


# --- warnings ---


def test_warnings_are_shown_and_recorded(ran: Ran) -> None:
    results, folder, shown = ran
    (warning,) = shown
    assert warning.message.diagnostic is results.diagnostics[0]
    text = str(warning.message)
    line = FILE[: FILE.rindex("measure logit")].count("\n") + 1
    assert text.startswith(f"{WARNED} at {folder / 'heads.mech'}:{line}:3: with 8 prompts, no cell")
    assert "; help: use more prompts" in text
    assert "\n" not in text
    assert [d.code for d in results.diagnostics] == [WARNED]
    assert results.diagnostics.warnings == results.diagnostics
    assert results.diagnostics.errors == []


@pytest.mark.parametrize(
    "call", [mechdsl.plan, mechdsl.graph, mechdsl.explain, lambda file: mechdsl.run(file)]
)
def test_warning_names_the_file_of_the_caller(call: Any, inside: Path) -> None:
    text = FILE.replace("limit 16", "limit 2").replace("limit 8", "limit 2")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        call(text)
    assert {each.filename for each in shown if each.category is mechdsl.MechdslWarning} == {
        __file__
    }


def test_warning_as_error_stops_before_the_run(inside: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mechdsl.MechdslWarning)
        with pytest.raises(mechdsl.MechdslWarning, match=WARNED):
            mechdsl.run(FILE, out="kept")
    assert list(inside.iterdir()) == []


def test_errors_and_warnings_can_be_pickled() -> None:
    error = refused(FILE.replace("head *", "hed *"))
    warning = mechdsl.MechdslWarning(error.diagnostics[0])
    for each in (error, warning):
        assert str(pickle.loads(pickle.dumps(each))) == str(each)


# --- errors ---


def test_error_text_equals_the_command_line_output(inside: Path) -> None:
    Path("typo.mech").write_text(FILE.replace("head *", "hed *"), encoding="utf-8")
    error = refused("typo.mech")
    done = subprocess.run(
        [sys.executable, "-m", "mechdsl", "validate", "typo.mech"], capture_output=True, text=True
    )
    assert str(error) == "\n" + done.stderr
    assert "did you mean `head`?" in str(error)
    assert str(error.diagnostics) == render_full(error.diagnostics)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"limit": 0}, "E0208", "`limit=0`: it must be a whole number of at least 1"),
        ({"limit": "4"}, "E0208", "`limit='4'`"),
        ({"pass_tokens": -1}, "E0208", "`pass_tokens=-1`"),
        ({"prompt_tokens": 1.5}, "E0208", "`prompt_tokens=1.5`"),
        ({"dtype": "float8"}, "E0208", "did you mean `float16`?"),
        ({"device": "gpu"}, "E0208", "there is no such device"),
        ({"only": "hades"}, "E0208", "did you mean `heads`?"),
        ({"no_pass": "resum"}, "E0208", "did you mean `resume`?"),
        ({"set": {"dept": 3}}, "E0205", "did you mean `depth`?"),
        ({"set": {"depth": "deep"}}, "E0205", "`depth` is a number"),
        ({"models": {"toy": "model"}}, "E0412", 'write `models={"toy": (model, tokenizer)}`'),
        ({"models": {"toy": ("model", None)}}, "E0412", "`None` is in the place of the tokenizer"),
        ({"models": {"tyo": ("m", "t")}}, "E0201", "did you mean `toy`?"),
    ],
)
def test_invalid_argument_reports_code_and_fix(given: dict[str, Any], code: str, said: str) -> None:
    error = refused(FILE, **given)
    assert [d.code for d in error.diagnostics.errors] == [code]
    assert said in str(error)


def test_invalid_model_argument_is_rejected(pair: tuple[Any, Any]) -> None:
    model, tokenizer = pair
    assert "the model is in the place of the tokenizer" in str(
        refused(FILE, {"toy": (tokenizer, model)})
    )
    error = refused(FILE, {"toy": ("gpt2", tokenizer)})
    assert [d.code for d in error.diagnostics.errors] == ["E0411"]
    assert "`str` isn't a model of transformers" in str(error)
    with pytest.raises(TypeError, match="models are a dict"):
        mechdsl.run(FILE, pair)  # type: ignore[arg-type]


def test_missing_hub_model_suggests_passing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    error = refused(AWAY)
    assert [d.code for d in error.diagnostics] == ["E0401", "W0720"]
    assert '`models={"toy": (model, tokenizer)}`' in str(error)


def test_rejected_model_argument_is_not_searched_in_the_hub(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    error = refused(AWAY, {"toy": (pair[0], object())})
    assert [d.code for d in error.diagnostics] == ["E0412", "W0720"]


def test_missing_file_is_reported() -> None:
    assert "cannot read `heads.mec`: no such file" in str(refused("heads.mec"))


# --- arguments ---


def test_parameter_values_and_dtypes_are_converted(inside: Path) -> None:
    """`True` becomes `true`, and torch dtypes are accepted."""
    import torch

    text = FILE.replace("mech 1\n", "mech 1\nparam sure = false\n", 1)
    results = mechdsl.run(
        text, set={"sure": True, "depth": 0}, only="heads", limit=16, dtype=torch.float64
    )
    said = results["heads"].conventions
    assert said["parameters"] == "sure = true, depth = 0"
    assert "float64" in said["dtype"]


def test_profile_is_recorded_if_requested(ran: Ran, inside: Path) -> None:
    assert ran[0].profile == ""
    profile = mechdsl.run(FILE, only="heads", limit=16, profile=True).profile
    assert profile.startswith("profile\n")
    assert "estimated" in profile


def test_validate_accepts_models(pair: tuple[Any, Any]) -> None:
    found = mechdsl.validate(AWAY.replace("head *", "head 14"), {"toy": pair})
    assert [d.code for d in found.errors] == ["E0301", "E0607"]  # and so there is no axis `head`
    assert mechdsl.validate(FILE, {"toy": pair[0]})[0].code == "E0412"  # type: ignore[dict-item]


def test_diagnostics_repr_equals_the_rendered_text() -> None:
    found = mechdsl.validate(FILE.replace("head *", "head 14"))
    assert repr(found) + "\n" == str(found) == render_full(found)
    assert '"code": "E0301"' in found.render("json")
    assert repr(mechdsl.validate("mech 1\n")) == "no errors, no warnings"
    with pytest.raises(ValueError, match="full, json, github, sarif"):
        found.render("yaml")  # type: ignore[arg-type]


def test_progress_is_shown_if_requested(capsys: pytest.CaptureFixture[str]) -> None:
    """Tests aren't interactive, so the default shows none."""
    text = FILE.replace('to "maps/heads.svg"', "")
    for progress, shown in ((None, False), (False, False), (True, True)):
        mechdsl.run(text, only="heads", limit=4, progress=progress)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert ("rows" in printed.err and "32/32" in printed.err) == shown, printed.err


def test_progress_defaults_to_terminals_and_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_interactive()
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stderr, "isatty", lambda: True)
        assert is_interactive()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert is_interactive()
