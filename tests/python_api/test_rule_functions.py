"""Rules that call a Python function passed to `run`, and checks of files that use one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl

from ..fruit import FRUIT

TEXT = (
    FRUIT
    + """
experiment halving {
  model toy
  prompts fruit limit 8
  set resid_post layer 0..1 at last token to halved
  measure logit(answer) as raw
}
"""
)

PYTHON_FILE = """
def halved(vectors):
    return vectors * 0.5
"""

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")


def halved(vectors: Any) -> Any:
    return vectors * 0.5


def values(results: mechdsl.Results) -> Any:
    return results["halving"].measures[0].patched


def error(**arguments: Any) -> mechdsl.Diagnostic:
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(arguments.pop("file", TEXT), **arguments)
    (found,) = raised.value.diagnostics.errors
    return found


def test_rule_function_equals_the_function_of_a_python_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PYTHON_FILE, encoding="utf-8")
    path = tmp_path / "own.mech"
    path.write_text(TEXT.replace("to halved", 'to python("own.py:halved")'), encoding="utf-8")
    passed = mechdsl.run(TEXT, rules={"halved": halved})
    written = mechdsl.run(path, allow_python=True, store=False)
    assert np.array_equal(values(passed), values(written))
    scaled = mechdsl.run(TEXT.replace("to halved", "to 0"))
    assert not np.array_equal(values(passed), values(scaled))
    assert 'halved` of rules["halved"], SHA-256' in passed["halving"].conventions["python"]
    assert 'python rules["halved"]' in passed["halving"].hashes


def test_rule_function_receives_rows_positions_and_width() -> None:
    shapes: list[tuple[int, ...]] = []

    def seen(vectors: Any) -> Any:
        shapes.append(tuple(vectors.shape))
        return vectors

    results = mechdsl.run(TEXT, rules={"halved": seen})
    assert {shape[:2] for shape in shapes} == {(8, 1)}
    base = results["halving"].measures[0].base
    assert np.allclose(values(results), base, atol=1e-5)


def test_store_key_depends_on_tensors_of_a_rule_function(tmp_path: Path) -> None:
    path = tmp_path / "own.mech"
    path.write_text(TEXT, encoding="utf-8")
    shift = torch.zeros(1)

    def run() -> mechdsl.Results:
        return mechdsl.run(
            path, rules={"halved": lambda vectors: vectors + shift}, store=tmp_path / "store"
        )

    first, again = run(), run()
    shift[0] = 3
    changed = run()
    reused = [any("unchanged since" in note for note in each.notes) for each in (again, changed)]
    assert reused == [True, False], again.notes
    assert not np.array_equal(values(first), values(changed))


def test_unknown_rule_name_suggests_the_passed_function() -> None:
    found = error(rules={"halve": halved})
    assert (found.code, found.span and found.span.written) == ("E0337", "halved")
    assert "did you mean `halve`" in found.help_text
    alone = error()
    assert 'rules={"halved": …}' in alone.help_text


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: None, "it is called with `vectors`"),
        (lambda vectors, rows: vectors, "it is called with `vectors`"),
        (lambda vectors, *, by: vectors, "it is called with `vectors`"),
    ],
)
def test_rule_function_with_a_wrong_signature_is_rejected(
    function: Callable[..., Any], said: str
) -> None:
    found = error(rules={"halved": function})
    assert found.code == "E0222"
    assert said in found.message
    assert "def halved(vectors):" in found.help_text
    assert [each.code for each in mechdsl.validate(TEXT, rules={"halved": function}).errors] == [
        "E0222"
    ]


def test_metric_with_a_wrong_signature_is_rejected() -> None:
    text = TEXT.replace("to halved", "to 0").replace("logit(answer)", "own")
    found = error(file=text, metrics={"own": lambda logits, rows, more: logits[:, 0]})
    assert found.code == "E0222"
    assert "def own(logits):" in found.help_text


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda vectors: None, "it returned nothing"),
        (lambda vectors: "text", "it returned a `str`"),
        (lambda vectors: vectors[:, 0], "it returned the shape"),
        (lambda vectors: vectors * float("nan"), "it returned NaN or infinity"),
        (lambda vectors: vectors.nothing, "AttributeError"),
    ],
)
def test_rule_function_with_an_invalid_result_is_rejected(
    returned: Callable[..., Any], said: str
) -> None:
    found = error(rules={"halved": returned})
    assert found.code == "E0223"
    assert said in found.message
    assert 'passed as `rules["halved"]`' in found.label_text


@pytest.mark.parametrize("value", [3, None, "halved"])
def test_rule_that_is_not_callable_raises_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r'rules=.*"halve": halve.*`halved` is a'):
        mechdsl.run(TEXT, rules={"halved": value})
    with pytest.raises(TypeError, match="rules are a dict of functions"):
        mechdsl.run(TEXT, rules=value or 3)


@pytest.mark.parametrize(
    "definition",
    [
        "param halved = 1",
        "metric halved = logit(answer)",
        'model halved = zoo("counting")',
    ],
)
def test_rule_function_named_like_a_definition_is_rejected(definition: str) -> None:
    text = TEXT.replace("experiment halving", f"{definition}\n\nexperiment halving")
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(text, rules={"halved": halved})
    found = [each for each in raised.value.diagnostics if each.code == "E0202"]
    assert [each.message for each in found] == ["`halved` is defined twice"]


def test_rule_function_named_like_a_loop_variable_is_rejected() -> None:
    lines = TEXT.replace("  set resid", "  for halved in [1, 2] {\n  set resid")
    text = lines.replace("to halved\n", "to halved\n  }\n")
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(text, rules={"halved": halved})
    found = next(each for each in raised.value.diagnostics if each.code == "E0202")
    assert 'passed as `rules["halved"]`' in found.label_text


def test_metric_and_rule_with_one_name_are_rejected() -> None:
    with pytest.raises(mechdsl.MechdslError) as raised:
        mechdsl.run(TEXT, rules={"halved": halved}, metrics={"halved": lambda logits: logits})
    found = next(each for each in raised.value.diagnostics if each.code == "E0202")
    assert 'passed as `metrics["halved"]`' in found.label_text


def test_unused_rule_function_gives_a_warning() -> None:
    text = TEXT.replace("to halved", "to 0")
    assert "W0730" in [each.code for each in mechdsl.validate(text, rules={"halved": halved})]


# --- checks without a run -------------------------------------------------------------------------

BOTH = TEXT.replace("logit(answer)", "margin")


def never(values: Any) -> Any:
    raise AssertionError("a check calls no function")


def test_checks_accept_passed_functions_without_calling_them() -> None:
    given: dict[str, Any] = {"metrics": {"margin": never}, "rules": {"halved": never}}
    assert mechdsl.validate(BOTH, **given).errors == []
    assert [each.code for each in mechdsl.validate(BOTH).errors] == ["E0337", "E0203"]
    assert mechdsl.plan(BOTH, **given).cells == {"halving": 2}
    assert "halved" in mechdsl.graph(BOTH, **given)
    assert "resid_post" in mechdsl.explain(BOTH, **given)
    for check in (mechdsl.plan, mechdsl.graph, mechdsl.explain):
        with pytest.raises(mechdsl.MechdslError):
            check(BOTH)


def test_explain_for_agents_returns_the_page_of_the_command() -> None:
    page = mechdsl.explain("language", for_agents=True)
    assert "mech 1" in page
    assert len(page) < len(mechdsl.explain("language"))
    with pytest.raises(mechdsl.MechdslError, match="is an option of `mechdsl explain language`"):
        mechdsl.explain("patch", for_agents=True)


def test_untrusted_file_may_use_passed_functions() -> None:
    found = mechdsl.run(TEXT, rules={"halved": halved}, untrusted=True)
    assert np.array_equal(values(found), values(mechdsl.run(TEXT, rules={"halved": halved})))


def test_metric_with_a_replies_parameter_receives_generated_texts() -> None:
    text = (
        FRUIT.replace("corrupt fewer { count = count - 1 }", "")
        + """
experiment words {
  model toy
  prompts fruit limit 4
  generate 3
  ablate mlp_out layer 0 at last token with zero
  measure own as raw
}
"""
    )
    seen: list[Any] = []

    def lengths(replies: Any, rows: Any) -> Any:
        seen.extend(replies)
        assert len(replies) == len(rows)
        return [len(reply) for reply in replies]

    found = mechdsl.run(text, metrics={"own": lengths})["words"].measures[0]
    assert all(isinstance(each, str) for each in seen)
    assert found.patched.shape == (1, 4)
