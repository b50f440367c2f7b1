"""Check that a run leaves a model unmodified."""

from __future__ import annotations

from typing import Any

from torch import nn


def clean_model_check(module: nn.Module) -> list[str]:
    """Paths of modules that still have our hooks; empty after every run."""
    left: list[str] = []
    for path, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(_ours(one) for one in (*hooks, part.__dict__.get("forward"))):
            left.append(path)
    return left


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "mechdsl"
