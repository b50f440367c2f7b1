"""What changes the last bits of numbers: nothing by itself, each switch by its name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mechdsl.base.runtime import ENVIRONMENT_VARIABLES, active_torch_mode, numeric_settings

from ..quick import some


@pytest.mark.parametrize(
    "first",
    some(["", "import torch, transformers", "import torch"], ["", "import torch, transformers"]),
)
def test_nothing_as_torch_starts(first: str) -> None:
    """Else a run would have another key before torch is imported than behind it."""
    code = f"{first}\nfrom mechdsl.base.runtime import numeric_settings as n\nprint(n())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stderr


@pytest.mark.parametrize("name", ENVIRONMENT_VARIABLES)
def test_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numeric_settings()
    monkeypatch.setenv(name, "1")
    assert numeric_settings() == {**before, name: "1"}


SWITCHES: list[tuple[str, Callable[[bool], object]]] = [
    (
        "matmul precision",
        lambda on: torch.set_float32_matmul_precision("highest" if on else "high"),
    ),
    ("deterministic", lambda on: torch.use_deterministic_algorithms(not on)),
    ("default dtype", lambda on: torch.set_default_dtype(torch.float32 if on else torch.float64)),
    ("flash attention", torch.backends.cuda.enable_flash_sdp),
    ("efficient attention", torch.backends.cuda.enable_mem_efficient_sdp),
    ("plain attention", torch.backends.cuda.enable_math_sdp),
    ("cudnn attention", torch.backends.cuda.enable_cudnn_sdp),
    ("tf32 in convolutions", lambda on: setattr(torch.backends.cudnn, "allow_tf32", on)),
    ("cudnn benchmark", lambda on: setattr(torch.backends.cudnn, "benchmark", not on)),
]


@pytest.mark.parametrize(("name", "switch"), SWITCHES, ids=[name for name, _ in SWITCHES])
def test_switches(name: str, switch: Callable[[bool], object]) -> None:
    before = numeric_settings()
    try:
        switch(False)
        assert numeric_settings().keys() - before.keys() == {name}
    finally:
        switch(True)
    assert numeric_settings() == before


def test_autocast_counts_with_its_dtype() -> None:
    before = numeric_settings()
    found: list[str] = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found.append(numeric_settings()["autocast on cpu"])
    assert found == ["torch.bfloat16", "torch.float16"]
    assert numeric_settings() == before


class Function(TorchFunctionMode):
    """May change what any function returns."""


class Dispatch(TorchDispatchMode):
    """The same of operators."""


def test_a_mode_that_may_change_functions_is_named() -> None:
    assert active_torch_mode() is None
    for kind in (Function, Dispatch):
        with kind():
            assert active_torch_mode() == kind.__name__
    with torch.device("cpu"):
        assert active_torch_mode() is None
