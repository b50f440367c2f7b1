"""Hashes of callables: equal exactly if a function would compute the same values."""

from __future__ import annotations

import functools
import importlib
import math
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.program.code_hashes import MAX_ARRAY_BYTES, CodeHashError, hash_callable

from ..fruit import FRUIT


def cell(text: str, **values: Any) -> Any:
    """Run the text of a notebook cell, and return its function `f`."""
    scope: dict[str, Any] = {"__name__": "__main__", "torch": torch, "np": np, **values}
    exec(compile(text, "<cell>", "exec"), scope)
    return scope["f"]


def digest(function: Callable[..., Any]) -> str:
    return hash_callable(function)[0]


def reason(function: Callable[..., Any]) -> str:
    with pytest.raises(CodeHashError) as raised:
        hash_callable(function)
    return str(raised.value)


# --- equal and different code ---------------------------------------------------------------------

DIFFERENT = {
    "a constant": ("f = lambda x: x[:, 0]", "f = lambda x: x[:, 1]"),
    "the type of a constant": ("f = lambda x: x * 1", "f = lambda x: x * 1.0"),
    "the sign of zero": ("f = lambda x: x + 0.0", "f = lambda x: x + -0.0"),
    "a constant in a tuple": ("f = lambda x: x in (1, 2)", "f = lambda x: x in (1, 2.0)"),
    "a constant in a set": ("f = lambda x: x in {1, 2}", "f = lambda x: x in {1, 3}"),
    "a default value": ("def f(x, k=1): return x + k", "def f(x, k=2): return x + k"),
    "a keyword default": ("def f(x, *, k=1): return x + k", "def f(x, *, k=2): return x + k"),
    "an attribute": ("f = lambda x: x.max(-1)", "f = lambda x: x.min(-1)"),
    "a global": ("k = 1\nf = lambda x: x + k", "k = 2\nf = lambda x: x + k"),
    "a global list": ("k = [1]\nf = lambda x: x + k[0]", "k = [2]\nf = lambda x: x + k[0]"),
    "the order of a dict": (
        "k = {'a': 1, 'b': 2}\nf = lambda x: x + [*k][0]",
        "k = {'b': 2, 'a': 1}\nf = lambda x: x + [*k][0]",
    ),
    "a helper": (
        "def g(x): return x + 1\nf = lambda x: g(x)",
        "def g(x): return x + 2\nf = lambda x: g(x)",
    ),
    "a helper of a helper": (
        "def h(x): return x + 1\ndef g(x): return h(x)\nf = lambda x: g(x)",
        "def h(x): return x + 2\ndef g(x): return h(x)\nf = lambda x: g(x)",
    ),
    "a global of a nested function": (
        "k = 1\ndef f(x):\n  def g(): return x + k\n  return g()",
        "k = 2\ndef f(x):\n  def g(): return x + k\n  return g()",
    ),
    "a constant of a nested lambda": (
        "f = lambda x: (lambda: x + 1)()",
        "f = lambda x: (lambda: x + 2)()",
    ),
    "a comprehension": (
        "f = lambda x: [each + 1 for each in x]",
        "f = lambda x: [each + 2 for each in x]",
    ),
    "a function's attribute": (
        "def f(x): return x * f.k\nf.k = 1",
        "def f(x): return x * f.k\nf.k = 2",
    ),
    "a class attribute": (
        "class C: k = 1\nf = lambda x: x + C.k",
        "class C: k = 2\nf = lambda x: x + C.k",
    ),
    "an inherited class attribute": (
        "class B: k = 1\nclass C(B): pass\nf = lambda x: x + C.k",
        "class B: k = 2\nclass C(B): pass\nf = lambda x: x + C.k",
    ),
    "a method": (
        "class C:\n  def m(self, x): return x + 1\nf = lambda x: C().m(x)",
        "class C:\n  def m(self, x): return x + 2\nf = lambda x: C().m(x)",
    ),
    "a property": (
        "class C:\n  @property\n  def k(self): return 1\nf = lambda x: C().k",
        "class C:\n  @property\n  def k(self): return 2\nf = lambda x: C().k",
    ),
    "a class method": (
        "class C:\n  @classmethod\n  def k(cls): return 1\nf = lambda x: C.k()",
        "class C:\n  @classmethod\n  def k(cls): return 2\nf = lambda x: C.k()",
    ),
    "a decorated helper": (
        "def d(g): return lambda x: g(x) + 1\n@d\ndef f(x): return x",
        "def d(g): return lambda x: g(x) + 2\n@d\ndef f(x): return x",
    ),
    "a shadowed builtin": (
        "def max(x): return 1\nf = lambda x: max(x)",
        "def max(x): return 2\nf = lambda x: max(x)",
    ),
    "a tensor": (
        "k = torch.tensor([1.0, 2.0])\nf = lambda x: x @ k",
        "k = torch.tensor([1.0, 2.5])\nf = lambda x: x @ k",
    ),
    "the type of a tensor": (
        "k = torch.tensor([1.0, 2.0])\nf = lambda x: x @ k",
        "k = torch.tensor([1.0, 2.0]).double()\nf = lambda x: x @ k",
    ),
    "the shape of a tensor": (
        "k = torch.zeros(2, 3)\nf = lambda x: x @ k",
        "k = torch.zeros(3, 2)\nf = lambda x: x @ k",
    ),
    "an array": (
        "k = np.arange(3)\nf = lambda x: x + k",
        "k = np.arange(3) + 1\nf = lambda x: x + k",
    ),
    "a number of numpy": (
        "k = np.float32(1)\nf = lambda x: x + k",
        "k = np.float64(1)\nf = lambda x: x + k",
    ),
    "a dtype": (
        "k = torch.float32\nf = lambda x: x.to(k)",
        "k = torch.float64\nf = lambda x: x.to(k)",
    ),
    "a pattern": (
        "import re\nk = re.compile('a')\nf = lambda x: k.search(x)",
        "import re\nk = re.compile('a', re.I)\nf = lambda x: k.search(x)",
    ),
    "the module of a helper": (
        "from math import sqrt as g\nf = lambda x: g(x)",
        "from cmath import sqrt as g\nf = lambda x: g(x)",
    ),
    "an imported module": (
        "def f(x):\n  import math\n  return math.e",
        "def f(x):\n  import cmath\n  return cmath.e",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_hash_depends_on_everything_that_the_function_reads(what: str) -> None:
    one, other = DIFFERENT[what]
    assert digest(cell(one)) == digest(cell(one))
    assert digest(cell(one)) != digest(cell(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return x + 1", "\n\n# moved\ndef f(x):\n    return x + 1"),
        ("k = 2\nf = lambda x: x + 1", "k = 3\nf = lambda x: x + 1"),
        ("import math\nf = lambda x: math.exp(x)", "import math\n\nf = lambda x: math.exp(x)"),
        ("f = lambda x: x in {'a', 'b', 'c'}", "f = lambda x: x in {'c', 'b', 'a'}"),
    ],
)
def test_hash_is_equal_if_only_unrelated_text_differs(one: str, other: str) -> None:
    assert digest(cell(one)) == digest(cell(other))


def test_hash_covers_a_closure() -> None:
    def shifted(by: object) -> Any:
        return lambda x: x + by

    assert digest(shifted(1)) == digest(shifted(1))
    assert len({digest(shifted(by)) for by in (1, 2, 1.0, True, "1", b"1", None)}) == 7


def test_hash_covers_a_partial() -> None:
    def scaled(x: Any, by: float) -> Any:
        return x * by

    one, again, other = (functools.partial(scaled, by=by) for by in (1.0, 1.0, 2.0))
    assert digest(one) == digest(again)
    assert digest(one) != digest(other)


def test_hash_follows_a_global_edited_between_runs() -> None:
    f = cell("k = {'a': [1, 2]}\nf = lambda x: x + k['a'][0]")
    before = digest(f)
    f.__globals__["k"]["a"][0] = 5
    changed = digest(f)
    f.__globals__["k"]["a"][0] = 1
    assert changed != before
    assert digest(f) == before


def test_hash_follows_a_tensor_edited_in_place() -> None:
    f = cell("k = torch.zeros(3)\nf = lambda x: x + k")
    before = digest(f)
    f.__globals__["k"][1] = 1
    assert digest(f) != before


def test_hash_follows_an_edited_class_attribute() -> None:
    f = cell("class C: k = 1\nf = lambda x: x + C.k")
    before = digest(f)
    f.__globals__["C"].k = 2
    assert digest(f) != before


def test_hash_follows_replaced_code() -> None:
    f = cell("f = lambda x: x")
    before = digest(f)
    f.__code__ = (lambda x: x + 1).__code__
    assert digest(f) != before


def test_hash_of_a_wrapper_covers_its_code() -> None:
    def renamed(by: int) -> Any:
        @functools.wraps(math.exp)
        def exp(x: Any) -> Any:
            return x + by

        exp.__module__, exp.__qualname__ = "math", "exp"
        return exp

    one, other = renamed(1), renamed(2)
    assert digest(one) != digest(other)
    assert digest(lambda x: one(x)) != digest(lambda x: other(x))


def test_hash_covers_recursion() -> None:
    one = "def f(x): return x if x < 1 else f(x - 1)"
    assert digest(cell(one)) == digest(cell(one))
    assert digest(cell(one)) != digest(cell(one.replace("- 1", "- 2")))


def test_hash_covers_a_function_under_no_grad() -> None:
    one = "@torch.no_grad()\ndef f(x): return x + 1"
    assert digest(cell(one)) == digest(cell(one))
    assert digest(cell(one)) != digest(cell(one.replace("+ 1", "+ 2")))


# --- the user's modules ---------------------------------------------------------------------------

MODULE = """
SCALE = 1.0
TABLE = {"a": 1}

def scaled(x):
    return x * SCALE

class Config:
    scale = 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    name = f"helpers_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    del sys.modules[name]


@pytest.mark.parametrize(
    "text",
    [
        "f = lambda x: m.scaled(x)",
        "g = m.scaled\nf = lambda x: g(x)",
        "f = lambda x: x * m.SCALE",
        "f = lambda x: x * getattr(C, 'scale')",
        "def at(where): return where.SCALE\nf = lambda x: x * at(m)",
        "def f(x):\n  import {name} as own\n  return x * own.SCALE",
        "def f(x):\n  from {name} import SCALE\n  return x * SCALE",
        "f = lambda x: x * C.scale",
        "C2 = type('C2', (C,), {})\nf = lambda x: x * C2.scale",
    ],
)
def test_hash_follows_values_of_a_module_in_memory(module: Any, text: str) -> None:
    f = cell(text.replace("{name}", module.__name__), m=module, C=module.Config)
    before = digest(f)
    assert digest(f) == before
    module.SCALE = module.Config.scale = 2.0
    assert digest(f) != before


def test_hash_names_the_module_whose_source_must_be_unchanged(module: Any) -> None:
    f = cell("f = lambda x: m.scaled(x)", m=module)
    assert f"import {module.__name__}\n".encode() in hash_callable(f)[1]


def test_hash_follows_a_patched_function_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    f = cell("f = lambda x: np.own_scale(x)")
    found: list[str] = []
    for text in ("f = lambda x: x", "f = lambda x: x + 1"):
        monkeypatch.setattr(np, "own_scale", cell(text), raising=False)
        found.append(digest(f))
    assert found[0] != found[1]


# --- functions that can't be hashed ---------------------------------------------------------------


class Callable_:
    def __call__(self, x: Any) -> Any:
        return x

    def method(self, x: Any) -> Any:
        return x


@dataclass
class Config:
    scale: float = 1.0


class Broken:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


UNHASHABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "an object": ("f = lambda x: x * c.scale", {"c": Config()}),
    "a method of an object": ("f = lambda x: g(x)", {"g": Callable_().method}),
    "a bound method of a list": ("f = lambda x: g(x)", {"g": [1].count}),
    "a torch module": ("f = lambda x: m(x)", {"m": torch.nn.Linear(2, 2)}),
    "a generator": ("f = lambda x: next(k)", {"k": iter([1])}),
    "a cached function": ("f = lambda x: g(x)", {"g": functools.lru_cache(lambda x: x)}),
    "a list that contains itself": ("k = []\nk.append(k)\nf = lambda x: k", {}),
    "an array of objects": ("f = lambda x: k", {"k": np.array([object()])}),
    "a tensor on the meta device": ("f = lambda x: k", {"k": torch.zeros(2, device="meta")}),
    "large arrays": ("f = lambda x: k", {"k": np.zeros(MAX_ARRAY_BYTES + 1, np.uint8)}),
    "a generator of random numbers": ("f = lambda x: k", {"k": np.random.default_rng(0)}),
    "`random`": ("f = lambda x: random.random()", {"random": random}),
    "a function of `random`": ("f = lambda x: g()", {"g": random.random}),
    "random numbers of torch": ("f = lambda x: torch.rand(3)", {}),
    "a file": ("f = lambda x: open('x').read()", {}),
    "a file that torch reads": ("f = lambda x: torch.load('x')", {}),
    "the environment": ("import os\nf = lambda x: os.environ['x']", {}),
    "an entry of the environment": ("from os import environ\nf = lambda x: environ['x']", {}),
    "the clock": ("from time import time\nf = lambda x: time()", {}),
    "a global that it assigns": ("n = 0\ndef f(x):\n  global n\n  n += 1\n  return n", {}),
    "a variable that it assigns": (
        "def make():\n  n = 0\n  def f(x):\n    nonlocal n\n    n += 1\n    return n\n"
        "  return f\nf = make()",
        {},
    ),
    "globals by name": ("k = 1\nf = lambda x: globals()['k']", {}),
    "evaluated text": ("k = 1\nf = lambda x: eval('k')", {}),
    "a module that isn't imported yet": ("def f(x):\n  import not_imported_yet\n  return x", {}),
    "the module of the notebook": ("import __main__ as m\nf = lambda x: m.k", {}),
    "an object that raises": ("f = lambda x: k", {"k": Broken()}),
    "a callable object": ("f = lambda x: g(x)", {"g": Callable_()}),
}


@pytest.mark.parametrize("what", UNHASHABLE)
def test_function_that_reads_unhashable_state_is_rejected(what: str) -> None:
    text, values = UNHASHABLE[what]
    assert reason(cell(text, **values))


def test_module_read_with_computed_names_is_rejected(module: Any) -> None:
    f = cell("n = 'SCALE'\nf = lambda x: x * getattr(m, n)", m=module)
    assert "getattr" in reason(f)


@pytest.mark.parametrize("function", [Callable_(), Callable_().method, torch.nn.Linear(2, 2)])
def test_callable_with_state_is_rejected(function: Any) -> None:
    assert reason(function)


def test_native_functions_of_packages_are_identified_by_their_names() -> None:
    text = "f = lambda x: g(x)"
    natives = [math.exp, math.log, len, torch.softmax, torch.relu, np.exp, np.log, str.lower]
    found = [digest(cell(text, g=each)) for each in natives]
    assert len(set(found)) == len(natives)
    assert digest(cell(text, g=re.compile("a"))) not in found


# --- reuse of stored results ----------------------------------------------------------------------

FILE = (
    FRUIT
    + """
experiment heads {
  model toy
  prompts fruit limit 8
  from clean into fewer
  patch layer 0 head * at last-item token
  measure own as raw
}
"""
)

CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a global": ("k = 1.0\nf = lambda x: x[:, 0] + k", lambda scope: scope.update(k=2.0)),
    "a list": ("k = [1.0]\nf = lambda x: x[:, 0] + k[0]", lambda scope: scope["k"].append(0)),
    "a tensor": (
        "k = torch.ones(1)\nf = lambda x: x[:, 0] + k",
        lambda scope: scope["k"].add_(1),
    ),
    "a class attribute": (
        "class C: k = 1.0\nf = lambda x: x[:, 0] + C.k",
        lambda scope: setattr(scope["C"], "k", 2.0),
    ),
    "a function attribute": (
        "def f(x): return x[:, 0] + f.k\nf.k = 1.0",
        lambda scope: setattr(scope["f"], "k", 2.0),
    ),
    "a helper": (
        "def g(x): return x[:, 0] + 1\nf = lambda x: g(x)",
        lambda scope: exec("def g(x): return x[:, 0] + 2", scope),
    ),
    "a default value": (
        "def f(x, k=1.0): return x[:, 0] + k",
        lambda scope: setattr(scope["f"], "__defaults__", (2.0,)),
    ),
}


def run(path: Path, function: Any) -> mechdsl.Results:
    return mechdsl.run(path, metrics={"own": function}, store=path.parent / "store")


def is_reused(results: mechdsl.Results) -> bool:
    return any("unchanged since" in note for note in results.notes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "heads.mech"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize("what", CHANGES)
def test_results_are_reused_only_for_an_identical_function(file: Path, what: str) -> None:
    text, change = CHANGES[what]
    f = cell(text)
    first, again = run(file, f), run(file, f)
    assert is_reused(again)
    assert not is_reused(first)
    change(f.__globals__)
    changed = run(file, f.__globals__["f"])
    assert not is_reused(changed)
    fresh = mechdsl.run(file, metrics={"own": f.__globals__["f"]}, store=False)
    one, other = (each["heads"].measures[0].patched for each in (changed, fresh))
    assert np.array_equal(one, other)


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_function_that_modifies_its_inputs_is_not_stored(file: Path) -> None:
    text = "seen = []\ndef f(x):\n  seen.append(1.0)\n  return x[:, 0] + len(seen)"
    first = run(file, cell(text))
    again = run(file, cell(text))
    assert any("has changed since the run began" in note for note in first.notes)
    assert not is_reused(again)
    assert not any("rows from the store" in note for note in again.notes)
    assert [each.state for each in mechdsl.runs(file.parent / "store")].count("finished") == 0


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_unhashable_function_has_no_hash_in_the_results(file: Path) -> None:
    config = Config()
    results = run(file, lambda x: x[:, 0] * config.scale)
    assert not any("metrics" in name for name in results["heads"].hashes)
    hashed = run(file, lambda x: x[:, 0])["heads"].hashes
    assert len(hashed['python metrics["own"]']) == 64
