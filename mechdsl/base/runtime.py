"""State of the process: random generators, garbage collection, numeric settings."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")

R = TypeVar("R")


@contextmanager
def preserve_random_state() -> Generator[None]:
    """Restore the random generators at the end of the block.

    They are Python's and, if imported, those of NumPy and of PyTorch on all devices.
    """
    with ExitStack() as stack:
        for put_back in _random_states():
            stack.callback(put_back)
        yield


def restores_random_state(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to restore random generators: imports may draw, and so does rich for each
    style that it prints."""

    @wraps(function)
    def called(*args: P.args, **named: P.kwargs) -> R:
        with preserve_random_state():
            return function(*args, **named)

    return called


def _random_states() -> list[Callable[[], None]]:
    """Return functions that restore the random generators in use."""
    python = random.getstate()
    states: list[Callable[[], None]] = [lambda: random.setstate(python)]
    # Not imported here, so that `validate` needs neither; a library not imported has no state.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()
        states.append(lambda: numpy.random.set_state(state))
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return states
    cpu = torch.get_rng_state()
    states.append(lambda: torch.set_rng_state(cpu))
    # A query would initialise an unused device.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        states.append(lambda: torch.cuda.set_rng_state_all(cuda))
    if torch.backends.mps.is_available():
        mps = torch.mps.get_rng_state()
        states.append(lambda: torch.mps.set_rng_state(mps))
    return states


@contextmanager
def pause_garbage_collection() -> Generator[None]:
    """Disable garbage collection inside the block, and restore its state afterwards."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_launch() -> tuple[int, int]:
    """Return the number of this process, and of all that a launcher such as torchrun started."""
    try:
        number, count, _ = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        return 0, 1
    return number, count


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status, also as one of several that a launcher started.

    Those skip what runs at the exit of a process: threads of torch's process groups sometimes abort
    it there, and the launcher would report a failure.
    """
    if read_launch()[1] > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


DELAYED_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that end a process after it has saved its work."""


@contextmanager
def delay_signals() -> Generator[Callable[[], None]]:
    """Delay signals that end the process until the block calls what it gets.

    Calling it handles a signal that has arrived since; so does the end of the block. A second
    signal isn't delayed. In other threads than the main one, which get no signals, nothing changes.
    """
    arrived: list[int] = []
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None = None) -> None:
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        else:  # the default: it ends the process
            signal.signal(number, handler)
            signal.raise_signal(number)

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            handle(number, frame)

    def deliver() -> None:
        if arrived:
            handle(arrived.pop())

    if threading.current_thread() is threading.main_thread():
        for number in DELAYED_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield deliver
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    deliver()


ENVIRONMENT_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "PYTORCH_JIT",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "USE_HUB_KERNELS",
)
"""Variables of linear algebra libraries that select instructions and precisions."""


@contextmanager
def exact_convolutions() -> Generator[None]:
    """Compute float32 convolutions in float32 inside the block.

    On GPUs, PyTorch by default rounds their inputs to 10 bits (TF32). In a vision tower whose
    patches are embedded by a convolution, logits then differ in the second decimal.
    """
    cudnn: Any = import_module("torch").backends.cudnn
    try:
        flags, name, exact = cudnn, "allow_tf32", False
        before = cudnn.allow_tf32
    except RuntimeError:  # `fp32_precision` was set for convolutions alone
        flags, name, exact = cudnn.conv, "fp32_precision", "ieee"
        before = flags.fp32_precision
    setattr(flags, name, exact)
    try:
        yield
    finally:
        setattr(flags, name, before)


@contextmanager
def computation_settings() -> Generator[None]:
    """Run PyTorch as numbers need it inside the block: with `exact_convolutions`, and with
    gradients, which the caller may have switched off (`torch.no_grad`)."""
    torch: Any = import_module("torch")
    with exact_convolutions(), torch.inference_mode(mode=False), torch.enable_grad():
        yield


def numeric_settings() -> dict[str, str]:
    """Return the settings that differ from PyTorch's defaults; empty without changes.

    The number of threads is omitted: results are equal up to rounding for any number. So is the
    precision of convolutions: see `exact_convolutions`.
    """
    settings = {name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ}
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "backends"):
        return settings
    now = {
        "matmul precision": _matmul_precision(torch),
        "reduced-precision reductions in float16": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "reduced-precision reductions in bfloat16": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "accumulation in float16": getattr(
            torch.backends.cuda.matmul, "allow_fp16_accumulation", False
        ),
        "mkldnn": getattr(torch.backends.mkldnn, "enabled", True),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "plain attention": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    settings |= {name: str(value) for name, value in now.items() if value != _USUAL[name]}
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            settings[f"autocast on {device}"] = str(torch.get_autocast_dtype(device))
    return settings


def _matmul_precision(torch: Any) -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # `fp32_precision` was set for some devices or operations
        gpu, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        return f"{gpu.fp32_precision} on GPUs, {cpu.fp32_precision} on CPUs"


def active_torch_mode() -> str | None:
    """Return the class of an active PyTorch mode that may change any function's result, or None.

    A default device for new tensors changes no result.
    """
    if "torch" not in sys.modules:
        return None
    overrides: Any = import_module("torch.overrides")
    dispatch: Any = import_module("torch.utils._python_dispatch")
    modes = [
        *overrides._get_current_function_mode_stack(),
        *dispatch._get_current_dispatch_mode_stack(),
    ]
    names = (type(mode).__name__ for mode in modes)
    return next((name for name in names if name != "DeviceContext"), None)


_USUAL: dict[str, object] = {
    "matmul precision": "highest",
    "reduced-precision reductions in float16": True,
    "reduced-precision reductions in bfloat16": True,
    "default dtype": "torch.float32",
    "deterministic": False,
    "cudnn benchmark": False,
    "accumulation in float16": False,
    "mkldnn": True,
    "flash attention": True,
    "efficient attention": True,
    "plain attention": True,
    "cudnn attention": True,
}
"""PyTorch's defaults."""
