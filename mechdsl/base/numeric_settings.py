"""What changes the last bits of numbers and stands in no file: the environment, and torch's own
switches, which Python may have set. Without importing torch."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

VARIABLES = (
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
"""Of the libraries that multiply matrices: which instructions and precisions they may use."""


def numeric_settings() -> dict[str, str]:
    """All that isn't as torch starts with it; empty where nobody has changed anything. How many
    threads there are is left out: a number is the same up to rounding with any."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "backends"):
        return found
    now = {
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
        "reduced sums in float16": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "reduced sums in bfloat16": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "sums in float16": getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
        "mkldnn": getattr(torch.backends.mkldnn, "enabled", True),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "plain attention": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
    found |= {name: str(value) for name, value in now.items() if value != _USUAL[name]}
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            found[f"autocast on {device}"] = str(torch.get_autocast_dtype(device))
    return found


def active_mode() -> str | None:
    """The class of a mode of torch that is active and may change what any function of it returns;
    None without one. A device for new tensors changes no number."""
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
    "tf32 in convolutions": True,
    "reduced sums in float16": True,
    "reduced sums in bfloat16": True,
    "default dtype": "torch.float32",
    "deterministic": False,
    "cudnn benchmark": False,
    "sums in float16": False,
    "mkldnn": True,
    "flash attention": True,
    "efficient attention": True,
    "plain attention": True,
    "cudnn attention": True,
}
"""What torch starts with."""
