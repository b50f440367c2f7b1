"""Direction methods that a module outside the package registers."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.base.records import external_modules
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.pipeline.api import explain, plan
from mechdsl.program.direction_methods import DIRECTION_METHODS, FittedMethod, direction_method

from ..reference.forward import Changes, Write
from ..run_source import run_source
from .support import agree, experiment, plain, records, rows, run_file, unpatched, worked_out

ROOT = Path(__file__).parents[2]
TOY = """mech 1
model toy = zoo("counting")
prompts fruit {{
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {{fruits}} Count 1:"
  answer " {{count}}"
}}
direction d = {} at resid_post layer 2 at last token
experiment steered {{
  model toy
  prompts fruit limit 8
  add d to resid_post layer 2 at last token
  measure logit(answer) as delta
}}
"""


@pytest.fixture(autouse=True)
def _median() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    before = dict(DIRECTION_METHODS.items())
    name = "tests.rules.median_method"
    sys.modules.pop(name, None)
    importlib.import_module(name)
    yield
    DIRECTION_METHODS._entries.clear()  # pyright: ignore[reportPrivateUsage]
    DIRECTION_METHODS._entries.update(before)  # pyright: ignore[reportPrivateUsage]


def errors(call: str) -> list[tuple[str, str, str]]:
    found = check_source(Source(TOY.format(call))).diagnostics
    return [(each.code, each.message, each.help_text) for each in found]


def register(**attributes: Any) -> None:
    """Register `broken` with these attributes in a class that is otherwise complete."""

    def fit(self: Any, samples: Any, options: Any) -> Any:
        return samples[0].mean()

    whole = {"takes": "block", "example": "broken(fruit)", "fit": fit, "__module__": "outside"}
    direction_method("broken")(type("Broken", (FittedMethod,), {**whole, **attributes}))


def test_median_direction_equals_reference_hooks(data: Path) -> None:
    text = "direction d = median(p, factor: 2) at resid_post layer 1 at last token\n"
    text += experiment("e", "add d to resid_post layer 1 at last token")
    result = run_file(text, data, "llama", "planned")
    at_last = [plain("llama", each)["resid_post", 1][each.last, 0] for each in rows()]
    vector = 2 * torch.from_numpy(np.median(torch.stack(at_last).numpy(), axis=0))

    def changes(n: int) -> list[Changes]:
        return [([Write("resid_post", 1, at_last[n] + vector, rows()[n].last)], ())]

    values = worked_out("llama", [()], changes, rows(), records())
    agree(result["e"], (), values, unpatched("llama"), most=False)


def test_median_is_described_and_planned() -> None:
    text = TOY.format("median(fruit, factor: 2)")
    assert "median of 8 rows of fruit, factor 2, at L2.resid_post" in explain(text)
    assert "median of 8 rows of fruit, factor 2" in plan(text)
    assert "tests.rules.median_method" in external_modules()


def test_validate_with_median_imports_no_numpy() -> None:
    code = (
        "import sys, tests.rules.median_method\n"
        "from mechdsl.base.text import Source\n"
        "from mechdsl.checks.file_check import check_source\n"
        f"found = check_source(Source({TOY.format('median(fruit)')!r}))\n"
        "assert not found.diagnostics, found.diagnostics\n"
        "assert 'numpy' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("call", "code", "message", "fix"),
    [
        ("medain(fruit)", "E0203", "`medain`", "did you mean `median`?"),
        ("median(fruit, fruit)", "E0207", "`median(fruit)`", "the same number of arguments"),
        ("median(fruit, factr: 2)", "E0207", "`factr`", "did you mean `factor`?"),
        ("median(fruit, factor: true)", "E0341", "a factor is a number", "`factor: 2`"),
        (
            "median(fruit, limit: 2)",
            "E0341",
            "2 rows, fewer than 3",
            "larger number than `limit: 2`",
        ),
    ],
)
def test_wrong_call_is_rejected(call: str, code: str, message: str, fix: str) -> None:
    ((found, said, hint),) = [each for each in errors(call) if each[0] != "W0730"]
    assert found == code
    assert message in said
    assert fix in hint


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"example": None}, r"`example` must be a call: `example = \"broken\(fruit\)\"`"),
        ({"takes": "three"}, "`takes` must be one of `two`, `block`, `value and block`"),
        ({"options": "factor"}, "`options` must be a tuple of names"),
        ({"min_rows": 0}, "`min_rows` must be a whole number of at least 1, not 0"),
        ({"fit": FittedMethod.fit}, "it has no `fit"),
    ],
)
def test_incomplete_class_is_rejected_at_registration(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=f"direction method `broken`: {message}"):
        register(**attributes)
    assert "broken" not in DIRECTION_METHODS


def test_word_of_the_language_is_rejected_as_name() -> None:
    with pytest.raises(TypeError, match="its name is a keyword"):
        direction_method("patch")(type("Broken", (FittedMethod,), {}))


def test_registered_name_is_rejected() -> None:
    whole = {"takes": "block", "example": "mean(fruit)", "fit": lambda *_: None}
    second = type("Broken", (FittedMethod,), whole)
    with pytest.raises(ValueError, match="direction method `mean` is registered twice"):
        direction_method("mean")(second)


@pytest.mark.parametrize(
    ("function", "returned", "message"),
    [
        ("describe", 3, "`Broken.describe` returned 3; it must return a text"),
        ("check_samples", "no", "`Broken.check_samples` returned 'no'; it must return None or"),
        ("default_options", {"b": 1}, "`Broken.default_options` returned {'b': 1}; it must name"),
    ],
)
def test_wrong_return_value_is_an_error_of_the_file(
    function: str, returned: object, message: str
) -> None:
    register(**{function: lambda *_: returned})
    ((code, said, hint),) = errors("broken(fruit)")
    assert code == "E0341"
    assert message in said
    assert hint == f"correct `Broken.{function}` in the module `outside`"


def raises(*_: object) -> None:
    raise KeyError("x")


def test_exception_of_a_class_is_an_error_of_the_file() -> None:
    register(options=("a",), check_option=raises)
    ((code, said, _),) = errors("broken(fruit, a: 1)")
    assert code == "E0341"
    assert "`Broken.check_option` raised KeyError: 'x'" in said


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda *_: np.zeros(3), "returned the shape [3]; it must return [128]"),
        (lambda *_: None, "returned `NoneType`; it must return an array of float64"),
        (lambda *_: np.zeros(128, int), "returned `int64`; it must return an array of float64"),
        (lambda self, samples, _: samples[0].mean() * np.nan, "returned NaN or infinity"),
        (raises, "raised KeyError: 'x'"),
    ],
)
def test_wrong_vector_is_an_error_with_its_cause(fit: Any, message: str) -> None:
    register(fit=fit)
    _, found = run_source(Source(TOY.format("broken(fruit)")))
    (error,) = [each for each in found if each.severity == "error"]
    assert error.code == "E0641"
    assert f"can't be computed: `Broken.fit` {message}" in error.message
    assert error.help_text == "correct `Broken.fit` in the module `outside`"


def test_matrix_without_needs_rows_is_an_error_with_its_cause() -> None:
    register(needs_rows=False, fit=lambda self, samples, _: samples[0].matrix()[0])
    _, found = run_source(Source(TOY.format("broken(fruit)")))
    assert "`matrix` needs a method with `needs_rows = True`" in found[0].message
