"""Basis methods that a module outside the package registers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.program.direction_methods import BASIS_METHODS, BasisMethod, LinearMap, basis_method

from ..reference.forward import Changes, Write
from .support import (
    agree,
    experiment,
    plain,
    records,
    rows,
    run_file,
    try_file,
    unpatched,
    worked_out,
)

RULE = "clamp features * of b at last token to 4"


@pytest.fixture(autouse=True)
def _spread() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    before = dict(BASIS_METHODS.items())
    name = "tests.rules.spread_basis"
    sys.modules.pop(name, None)
    importlib.import_module(name)
    yield
    BASIS_METHODS._entries.clear()  # pyright: ignore[reportPrivateUsage]
    BASIS_METHODS._entries.update(before)  # pyright: ignore[reportPrivateUsage]


def test_spread_basis_equals_reference_hooks(data: Path) -> None:
    text = "basis b = spread(p, dims: 2) at resid_post layer 1 at last token\n"
    result = run_file(text + experiment("e", RULE), data, "llama", "planned")["e"]
    last = [plain("llama", each)["resid_post", 1][each.last, 0] for each in rows()]
    largest = torch.stack(last).std(0, correction=0).argsort(descending=True)[:2]

    def changes(n: int) -> list[Changes]:
        def act(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., largest] = 4.0
            return x

        return [([Write("resid_post", 1, act, rows()[n].last)], ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(result, (), expected, unpatched("llama"), most=False)
    assert "spread of" in result.conventions["basis b"]
    assert "dims 2" in result.conventions["basis b"]


def register(**attributes: Any) -> None:
    """Register `broken` with these attributes in a class that is otherwise complete."""

    def size(self: Any, width: int, rows: int, options: Any) -> Any:
        return 2

    def build(self: Any, given: Any, options: Any, size: int) -> Any:
        return LinearMap(np.eye(given.width)[:size])

    whole = {"takes": "nothing", "example": "broken", "size": size, "build": build}
    whole |= {"__module__": "outside"}
    basis_method("broken")(type("Broken", (BasisMethod,), {**whole, **attributes}))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"takes": "dictionary"}, "`takes` must be one of"),
        ({"example": "other()"}, "`example` must be a call"),
        ({"options": "dims"}, "`options` must be a tuple of names"),
        ({"build": BasisMethod.build}, "it needs `size"),
    ],
)
def test_incomplete_basis_method_is_rejected_at_registration(
    attributes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=r"basis method `broken`: ") as caught:
        register(**attributes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "code", "message"),
    [
        ({"size": lambda self, *given: 0}, "E0342", "`Broken.size` returned 0"),
        ({"size": lambda self, *given: ("no rows", "add rows")}, "E0342", "no rows"),
        ({"size": lambda self, *given: 1 // 0}, "E0342", "`Broken.size` raised ZeroDivisionError"),
        ({"build": lambda self, *given: None}, "E0641", "must return a `LinearMap`"),
        (
            {"build": lambda self, given, *more: LinearMap(np.eye(3))},
            "E0641",
            "`Broken.build` returned [3, 3]",
        ),
        (
            {"build": lambda self, given, *more: LinearMap(np.full((2, given.width), np.nan))},
            "E0641",
            "NaN or infinity",
        ),
        (
            {"build": lambda self, given, *more: LinearMap(np.ones((2, given.width)))},
            "E0641",
            "2 directions span only 1 dimensions",
        ),
    ],
)
def test_mistake_in_a_basis_method_is_an_error_with_its_cause(
    attributes: dict[str, Any], code: str, message: str, data: Path
) -> None:
    register(**attributes)
    text = "basis b = broken at resid_post layer 1\n" + experiment("e", RULE)
    _, diagnostics = try_file(text, data, "llama")
    (found,) = [each for each in diagnostics if each.code == code]
    assert message in found.message
    assert found.message.startswith(("invalid basis: ", "basis `b` "))
