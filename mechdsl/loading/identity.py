# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What a loaded model is: that of its folder, or what Python has handed over, by what it holds.

Of the latter, a digest of its weights and buffers, its config, its modules with all that they keep,
and the code of the classes and functions that aren't the library's. Where that can't be told, it is
said why, and nothing is kept of it: two models could have the same digest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.hooks.loaded import LoadedModel
from mechdsl.models.identity import digest_of
from mechdsl.program.code_behind import CodeUnknown, code_of_module
from mechdsl.prompts.tokenizer import TextTokenizer

_LIBRARIES = ("torch", "transformers", "huggingface_hub", "peft", "accelerate")
"""Whose code is told by their versions."""
_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Attributes of modules that are told otherwise."""
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice, range)


def identity_of_loaded(model: LoadedModel) -> str | None:
    """The digest of a model; None where it can't be told."""
    return identity_or_reason(model)[0]


def identity_or_reason(model: LoadedModel) -> tuple[str | None, str]:
    """The digest of a model, or why it can't be told, in lower case."""
    if model.identity is not None:
        return model.identity, ""
    try:
        return digest_of(_parts(model)), ""
    except CodeUnknown as unknown:
        return None, str(unknown)


def _parts(model: LoadedModel) -> dict[str, Any]:
    module, code = model.module, _Code()
    tokenizer = model.tokenizer
    if any(vars(nn.modules.module)[f"_global_{table}"] for table in _HOOKS):
        raise CodeUnknown("torch has forward hooks for all modules")
    return {
        "of": "python",
        "weights": model.provenance.get("weights", ""),
        "made of": model.made_of,
        "modules": {path: code.of_part(path, part) for path, part in module.named_modules()},
        "attention": [code.of_attention(config) for config in model.attention_configs],
        "tokenizer": None
        if tokenizer is None
        else [tokenizer.hash, tokenizer.bos, sorted(tokenizer.roles.items()), *_chat(tokenizer)],
        "code": code.found,
    }


def _chat(tokenizer: TextTokenizer) -> list[str]:
    return [] if tokenizer.chat is None else [tokenizer.chat.digest]


_HOOKS = ("forward_pre_hooks", "forward_hooks")


class _Code:
    """Modules told by what they hold; the code that isn't the libraries' is gathered."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._classes: dict[type, Any] = {}

    def of_part(self, path: str, part: nn.Module) -> list[Any]:
        """One module, those inside it aside."""
        held = vars(part)
        where = f"`{path or type(part).__name__}`"
        if "forward" in held:
            raise CodeUnknown(f"{where} has a `forward` of its own, which isn't its class's")
        for table in _HOOKS:
            if any(not _of_library(_home(hook)) for hook in held[f"_{table}"].values()):
                raise CodeUnknown(f"{where} has forward hooks")
        tensors = {**held["_parameters"], **held["_buffers"]}
        rest = {
            name: self.of(value, f"{where}, its `{name}`")
            for name, value in held.items()
            if name not in _OWN and not name.endswith("_hooks") and "_hooks_" not in name
        }
        own = held["_non_persistent_buffers_set"]
        return [
            self.of_class(type(part)),
            {name: _tensor(t, content=name in own) for name, t in tensors.items()},
            rest,
        ]

    def of_class(self, kind: type) -> Any:
        """The names of a class and of its bases, with methods that were put in their place."""
        if kind not in self._classes:
            told: list[Any] = []
            for each in kind.__mro__:
                told.append(_name(each))
                if not _of_library(each.__module__):
                    self._read(each.__module__)
                    continue
                for name, value in list(vars(each).items()):
                    if callable(value) and not _of_library(_home(value)):
                        told.append([name, self.of(value, f"`{each.__name__}.{name}`")])
            self._classes[kind] = told
        return self._classes[kind]

    def of_attention(self, config: Any) -> list[Any]:
        """The name of the attention function, and which function goes by it."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = config._attn_implementation_internal
        known = cast("Mapping[str, Any]", ALL_ATTENTION_FUNCTIONS)
        return [name, self.of(known.get(name), f"the attention `{name}`")]

    def of(self, value: Any, where: str) -> Any:
        """Any value as JSON says it. CodeUnknown for what can't be told."""
        if isinstance(value, Enum):
            return [_name(type(value)), value.name]
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, Tensor):
            return _tensor(value, content=True)
        if isinstance(value, type):
            return self.of_class(value)
        if isinstance(value, nn.Module):
            raise CodeUnknown(f"{where} is a module that isn't among its own")
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return [self.of_class(type(value)), self._items(value.to_dict(), where)]
        if _name(type(value)).endswith("GenerationConfig"):
            return None  # nothing is generated
        if isinstance(value, Mapping):
            return [type(value).__name__, self._items(value, where)]
        if isinstance(value, list | tuple):
            return [type(value).__name__, [self.of(each, where) for each in value]]
        if isinstance(value, set | frozenset):
            return ["set", sorted(digest_of(self.of(each, where)) for each in value)]
        return self._callable(value, where)

    def _items(self, value: Mapping[Any, Any], where: str) -> list[Any]:
        return [[self.of(key, where), self.of(each, where)] for key, each in value.items()]

    def _callable(self, value: Any, where: str) -> Any:
        if isinstance(value, partial):
            parts = (value.func, value.args, dict(value.keywords))
            return ["partial", self.of(parts, where)]
        if isinstance(value, MethodType):
            if not isinstance(value.__self__, type | nn.Module):
                raise CodeUnknown(f"{where} is a method of an object that can't be told")
            return ["method", self.of(value.__func__, where)]
        if not isinstance(value, FunctionType | BuiltinFunctionType):
            raise CodeUnknown(f"{where} is a `{type(value).__name__}`, which can't be told")
        home = _home(value)
        if not _of_library(home):
            if getattr(value, "__closure__", None) or getattr(value, "__wrapped__", None):
                raise CodeUnknown(f"{where} is a function that keeps values of its own")
            self._read(home)
        return ["function", home, value.__qualname__]

    def _read(self, module: str) -> None:
        if module not in self.found:
            self.found |= code_of_module(module)


def _home(function: object) -> str:
    """The module that a function, or the function of a method, is of."""
    inner = getattr(function, "__func__", function)
    return str(getattr(inner, "__module__", None) or type(inner).__module__)


def _of_library(module: str) -> bool:
    root = module.partition(".")[0]
    return root in _LIBRARIES or (root != "__main__" and root in sys.stdlib_module_names)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _tensor(tensor: Tensor | None, *, content: bool) -> Any:
    """content: of parameters and kept buffers it is in the hash of the weights."""
    if tensor is None:
        return None
    told = [str(tensor.dtype), list(tensor.shape)]
    if not content:
        return told
    if tensor.is_meta:
        raise CodeUnknown("a buffer is on the meta device")
    flat = tensor.detach().cpu().contiguous().flatten()
    return [*told, sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()]
