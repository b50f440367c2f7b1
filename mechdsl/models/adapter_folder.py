"""Folders with a LoRA adapter in the format of peft."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, cast

from mechdsl.base.limits import is_integer, is_number
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import (
    AdapterConfig,
    AdapterDoesNotFit,
    BaseModelMismatch,
    OtherAdapter,
)
from mechdsl.models.config import read_config
from mechdsl.models.folder import ADAPTER_CONFIG
from mechdsl.models.shape import ModelShape
from mechdsl.program.spec import Model

PROMPT_ADAPTERS = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
    }
)
"""Types of peft that prepend vectors to the model's input and leave its weights unchanged."""

PROMPT_ADAPTER_REASON = "prepends its own vectors to the model's input"
"""Description of their effect."""

_PASSED_OVER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "modules_to_save",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Keys about training, or about facts that the weights show."""

_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged."""

_CLASSIFIERS = {
    "SEQ_CLS": ("classifies prompts", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("classifies each token", "AutoModelForTokenClassification"),
}
"""`task_type` → the model's task, and the library's class for it."""

_PATTERN = re.compile(r"\^?[\w.]+\$?")
"""Paths of modules. Other regular expressions may take exponential time."""


@dataclass(frozen=True)
class AdapterScaling:
    """The scaling of an adapter's weights, with peft's names."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    switches: Mapping[str, bool] = field(default_factory=dict[str, bool])


def read_scaling(folder: Path, model: Model) -> tuple[AdapterScaling | None, list[Diagnostic]]:
    """Read the weight scaling from an adapter's config; None if a setting isn't supported.

    Codes: E0404, E0451, E0452.
    """
    config, problems = read_config(folder, name=ADAPTER_CONFIG, model=model.name, span=model.span)
    if config is None:
        return None, problems
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        return None, [_other(kind, model)]
    refused = next(_refused(config, model), None)
    if refused is not None:
        return None, [refused]
    return AdapterScaling(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        switches={key: bool(config.get(key)) for key in _SWITCHES},
    ), []


def check_base_model(folder: Path, model: Model, base: Model) -> list[Diagnostic]:
    """Return W0773 if the folder names a model other than the base.

    There is no warning if the folder names no model, or if the base comes from Python (from a
    function or passed in).
    """
    config, _ = read_config(folder, name=ADAPTER_CONFIG)
    trained = (config or {}).get("base_model_name_or_path")
    if not isinstance(trained, str) or not trained or base.kind == "python" or not base.path:
        return []
    if _name(trained) == _name(base.path):
        return []
    return [
        BaseModelMismatch(
            span=model.span,
            model=model.name,
            trained=trained,
            base=base.name,
            given=f"`{base.source}`",
        )
    ]


def check_adapter_task(
    folder: Path, model: Model, base: Model, shape: ModelShape
) -> list[Diagnostic]:
    """Return E0453 if the adapter is a classifier's and the base isn't such a classifier."""
    config, _ = read_config(folder, name=ADAPTER_CONFIG)
    task = (config or {}).get("task_type")
    if not isinstance(task, str) or task not in _CLASSIFIERS or shape.stands_in:
        return []
    what, class_name = _CLASSIFIERS[task]
    of = "each token" if shape.output_at == "every token" else "prompts"
    given = "predicts tokens" if shape.task == "tokens" else f"classifies {of}"
    if given == what:
        return []
    path = base.path if base.path and base.kind in ("hf", "local") else "…"
    made = f'`{class_name}.from_pretrained("{path}", num_labels=…)`'
    return [
        AdapterDoesNotFit(
            span=model.span,
            model=model.name,
            base=base.name,
            reason=f"its `task_type` is {task}: its base {what}, but `{base.name}` {given}",
            hint=f"use {made} as the base, whose head the adapter replaces: saved as a "
            f'folder, or returned by a function, `model {base.name} = python("own.py:build")`',
        )
    ]


def _name(path: str) -> str:
    """Return a model's name without its location.

    `gpt2` for `openai/gpt2`, `models/gpt2` and a snapshot in the library's cache.
    """
    parts = PurePath(path.replace("\\", "/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else (parts or ("",))[-1]
    return last.casefold()


def _other(kind: str, model: Model) -> Diagnostic:
    reads = kind in PROMPT_ADAPTERS
    merge = (
        f'`PeftModel.from_pretrained(base, "{model.path}").merge_and_unload()'
        '.save_pretrained("merged")`'
    )
    return OtherAdapter(
        span=model.span,
        model=model.name,
        kind=f"`{kind[:40]}`",
        what=PROMPT_ADAPTER_REASON if reads else "isn't read from a folder",
        reason=f"by its `{ADAPTER_CONFIG}`; only LoRA adapters are supported",
        hint="rules act on tokens of prompts, to which it adds tokens: use an adapter of weights "
        "(LoRA)"
        if reads
        else f"merge it in Python and load the saved model, if peft supports that: {merge}",
    )


def _refused(config: Mapping[str, Any], model: Model) -> Iterator[Diagnostic]:
    """Yield E0452 for the entries that aren't supported."""
    merge = "merge it in Python and load the saved model"

    def refuse(key: str, reason: str, hint: str) -> AdapterConfig:
        value = json.dumps(config[key])
        shown = value if len(value) <= 60 else f"{value[:59]}…"
        return AdapterConfig(
            span=model.span, model=model.name, key=key, value=shown, reason=reason, hint=hint
        )

    for key, value in config.items():
        if key in _PASSED_OVER:
            continue
        wrong = _WRONG.get(key)
        if wrong is not None:
            reason = wrong(value)
            if reason is not None:
                yield refuse(key, reason, f"correct it in `{model.path}/{ADAPTER_CONFIG}`")
        elif key == "init_lora_weights":
            if value not in _STARTS:
                reason = "such an adapter has changed the weights of its base before training"
                yield refuse(key, reason, f"convert it to plain LoRA with peft, or {merge}")
        elif value:
            yield refuse(key, "it changes the adapter's computation and isn't supported", merge)


def _rank(value: Any) -> str | None:
    return None if is_integer(value, least=1) else "a rank is a whole number above 0"


def _number(value: Any) -> str | None:
    return None if is_number(value) and abs(value) < 1e6 else "an adapter can't have this number"


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it is true or false"


def _pattern(value: Any) -> str | None:
    entries = cast("Mapping[Any, Any]", value if value is not None else {})
    if not isinstance(value, Mapping | None):
        return "it must be a mapping from modules to numbers"
    if any(not isinstance(key, str) or not _PATTERN.fullmatch(key) for key in entries):
        return "only names and paths of modules are supported, not other patterns"
    return next((_number(entry) for entry in entries.values() if _number(entry)), None)


def _ranks(value: Any) -> str | None:
    wrong = _pattern(value)
    return wrong or next((_rank(each) for each in (value or {}).values() if _rank(each)), None)


def _biases(value: Any) -> str | None:
    known = ("none", "all", "lora_only")
    return None if value in known else f"it is one of {', '.join(known)}"


_WRONG = {
    "r": _rank,
    "lora_alpha": _number,
    "rank_pattern": _ranks,
    "alpha_pattern": _pattern,
    "bias": _biases,
    **dict.fromkeys(_SWITCHES, _switch),
}
"""Validators of the entries that are used: the error of a value, or None."""
