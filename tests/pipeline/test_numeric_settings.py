"""What changes the last bits of numbers: nothing by itself, each switch by its name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mechdsl
from mechdsl.base.runtime import (
    ENVIRONMENT_VARIABLES,
    active_torch_mode,
    exact_convolutions,
    numeric_settings,
)
from mechdsl.forward.hooks import model

from ..execute.support import word_tokenizer
from ..quick import some
from ..rules.models import bare
from .test_trained_dictionaries import write
from .test_trained_rotations import (
    OTHER,
    PATCHES,
    SITE,
    fit,
)


@pytest.mark.parametrize(
    "first",
    some(["", "import torch, transformers", "import torch"], ["", "import torch"]),
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


def test_a_precision_for_some_devices_counts() -> None:
    """Then PyTorch has no answer for all devices."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has no precision for each device")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert numeric_settings()["matmul precision"].startswith("tf32 on GPUs, ")
    finally:
        matmul.fp32_precision = before
    assert numeric_settings() == {}


def test_convolutions_are_exact_and_the_setting_returns() -> None:
    cudnn = torch.backends.cudnn
    assert cudnn.allow_tf32
    with exact_convolutions():
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32


def test_convolutions_are_exact_where_theirs_alone_is_set() -> None:
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):
        pytest.skip("this PyTorch has no precision for each operation")
    before = cudnn.conv.fp32_precision
    try:
        cudnn.rnn.fp32_precision = "ieee"
        with exact_convolutions():
            assert cudnn.conv.fp32_precision == "ieee"
        assert cudnn.conv.fp32_precision == before
        assert numeric_settings() == {}
    finally:
        cudnn.rnn.fp32_precision = before
    assert cudnn.allow_tf32


def test_passes_compute_exact_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In trainings, runs and objectives."""
    seen, call = list[bool](), model.call_module

    def record(*given: Any) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32)
        return call(*given)

    monkeypatch.setattr(model, "call_module", record)
    path = write(tmp_path, fit(), PATCHES, OTHER)
    given, store = {"m": (bare("gpt2"), word_tokenizer())}, tmp_path / "store"
    mechdsl.validate(path, given)  # proves the anatomy, once in a process
    del seen[:]
    counts = [0]
    mechdsl.fit(path, given, store=store)
    counts.append(len(seen))
    mechdsl.run(path, given, store=store)
    counts.append(len(seen))
    mechdsl.objective(path, experiment="control", site=SITE, at="last token", models=given)
    counts.append(len(seen))
    assert sorted(set(counts)) == counts, "each has passes"
    assert not any(seen)


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
