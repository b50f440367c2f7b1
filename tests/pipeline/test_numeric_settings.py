"""Settings that affect the last bits of results: none by default, each listed by name."""

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
from .test_trained_rotations import OTHER, PATCHES, SITE, fit


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "first",
    some(["", "import torch, transformers", "import torch"], ["", "import torch"]),
)
def test_default_numeric_settings_are_empty(first: str) -> None:
    """Otherwise a run's key would depend on whether torch was imported before."""
    code = f"{first}\nfrom mechdsl.base.runtime import numeric_settings as n\nprint(n())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stderr


@pytest.mark.parametrize("name", ENVIRONMENT_VARIABLES)
def test_numeric_settings_include_environment_variables(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_numeric_settings_include_torch_switches(
    name: str, switch: Callable[[bool], object]
) -> None:
    before = numeric_settings()
    try:
        switch(False)
        assert numeric_settings().keys() - before.keys() == {name}
    finally:
        switch(True)
    assert numeric_settings() == before


def test_numeric_settings_include_a_precision_per_device() -> None:
    """PyTorch then has no single precision for all devices."""
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


def test_exact_convolutions_restores_the_tf32_setting() -> None:
    cudnn = torch.backends.cudnn
    assert cudnn.allow_tf32
    with exact_convolutions():
        assert not cudnn.allow_tf32
    assert cudnn.allow_tf32


def test_exact_convolutions_restores_a_per_operation_setting() -> None:
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


def test_model_calls_run_with_exact_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers trainings, runs and objectives."""
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


def test_numeric_settings_include_the_autocast_dtype() -> None:
    before = numeric_settings()
    found: list[str] = []
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found.append(numeric_settings()["autocast on cpu"])
    assert found == ["torch.bfloat16", "torch.float16"]
    assert numeric_settings() == before


class Function(TorchFunctionMode):
    """A mode that may modify the result of any function."""


class Dispatch(TorchDispatchMode):
    """A mode that may modify the result of any operator."""


def test_active_torch_mode_is_named() -> None:
    assert active_torch_mode() is None
    for kind in (Function, Dispatch):
        with kind():
            assert active_torch_mode() == kind.__name__
    with torch.device("cpu"):
        assert active_torch_mode() is None
