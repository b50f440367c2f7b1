# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Models that peft or `torch.compile` has put something around."""

from __future__ import annotations

from typing import Any

from torch import nn

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_adapters import OtherAdapter
from mechdsl.models.adapter_folder import OF_INPUTS, READS_MORE

_OUTSIDE = {
    "XLORA": "runs the model twice, to weigh its adapters",
    "ALORA": "begins to work at certain tokens, which it looks for outside of the model's modules",
}


def unwrapped(module: Any) -> Any:
    """The model in what `torch.compile` and peft put around it; adapters stay in its modules."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and has_adapters(module) and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if not isinstance(inner, nn.Module) or inner is module:
            return module
        module = inner


def has_adapters(module: Any) -> bool:
    """Whether peft has put adapters into a model or around it that aren't merged."""
    return hasattr(module, "peft_config")


def unmerged(module: Any) -> str | None:
    """What to do about adapters where they are most likely why a model fails its checks."""
    if not has_adapters(module):
        return None
    merge = "merge its adapters first, and hand over what `model.merge_and_unload()` gives"
    return f"adapters that aren't merged change what its modules compute: {merge}"


def outside_of_modules(module: Any, name: str, span: Span | None) -> Diagnostic | None:
    """E0451 for adapters that do something outside of the modules of the model that they are
    around, so that this model alone isn't what was handed over."""
    while isinstance(getattr(module, "_orig_mod", None), nn.Module):
        module = module._orig_mod
    for config in getattr(module, "peft_config", {}).values():
        kind = getattr(config, "peft_type", "")
        kind = str(getattr(kind, "value", kind))
        kind = "ALORA" if getattr(config, "alora_invocation_tokens", None) else kind
        if kind in OF_INPUTS or kind in _OUTSIDE:
            return OtherAdapter(
                span=span,
                model=name,
                kind=f"`{kind}`",
                what=_OUTSIDE.get(kind, READS_MORE),
                reason=f"a `{type(module).__name__}` of peft",
                hint="hand over a model whose adapters are part of its weights, such as LoRA, or "
                "the one below: `model.get_base_model()`",
            )
    return None
