# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""What a loaded model is: that of its folder, or what Python has handed over, by what it holds.

The identity of the latter is a digest of its weights and buffers, its config, its modules with the
values that they hold, and the code that they run: the source files of the user's own classes and
functions, and all code that is reached as it is in memory (`mechdsl/loading/reached_code.py`).
Where a part can't be described, there is a reason instead, and nothing is kept of the model: two
models could have the same digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import partial
from hashlib import sha256
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.reached_code import ReachedCode, home_of, is_free, is_own_compiled, of_library
from mechdsl.models.identity import digest_of
from mechdsl.program.code_behind import CodeUnknown, code_of_module
from mechdsl.prompts.tokenizer import TextTokenizer

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
    module, tokenizer = model.module, model.tokenizer
    if any(vars(nn.modules.module)[f"_global_{table}"] for table in _HOOKS):
        raise CodeUnknown("torch has hooks for all modules")
    told = _Told(module)
    return {
        "of": "python",
        "weights": model.provenance.get("weights", ""),
        "made of": model.made_of,
        "modules": {path: told.of_part(path, part) for path, part in module.named_modules()},
        "attention": [told.of_attention(config) for config in model.attention_configs],
        "tokenizer": None
        if tokenizer is None
        else [tokenizer.hash, tokenizer.bos, sorted(tokenizer.roles.items()), *_chat(tokenizer)],
        "code": told.code(),
    }


def _chat(tokenizer: TextTokenizer) -> list[str]:
    return [] if tokenizer.chat is None else [tokenizer.chat.digest]


_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


class _Told:
    """Describes modules by the values that they hold, and gathers the code that they run."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = set(model.modules())
        self._reached = ReachedCode(self.of)

    def code(self) -> list[Any]:
        """The code of everything that was described so far."""
        reached = self._reached.digest()
        files: dict[str, str] = {}
        for home in sorted(self._reached.homes):
            if home not in files:
                files |= code_of_module(home)
        return [reached, files]

    def of_part(self, path: str, part: nn.Module) -> list[Any]:
        """One module, those inside it aside."""
        held = vars(part)
        where = f"`{path or type(part).__name__}`"
        if "forward" in held:
            raise CodeUnknown(f"{where} has a `forward` of its own, which isn't its class's")
        for table in _HOOKS:
            if not all(map(self._is_hook_of_library, held[f"_{table}"].values())):
                raise CodeUnknown(f"{where} has {table.partition('_')[0]} hooks")
        tensors = {**held["_parameters"], **held["_buffers"]}
        if any(tensor is not None and tensor._backward_hooks for tensor in tensors.values()):
            raise CodeUnknown(f"{where} has a tensor with hooks")
        rest = {
            name: self.of(value, f"{where}, its `{name}`")
            for name, value in held.items()
            if name not in _OWN and not name.endswith("_hooks") and "_hooks_" not in name
        }
        own = held["_non_persistent_buffers_set"]
        return [
            self._reached.add_module_class(type(part)),
            {name: _tensor(t, content=name in own) for name, t in tensors.items()},
            rest,
        ]

    def _is_hook_of_library(self, hook: Any) -> bool:
        """Whether a library has put it there; its code is read as that of any function."""
        function = getattr(hook, "__func__", hook)
        if isinstance(function, FunctionType):
            self._reached.add_function(function)
            return of_library(home_of(function))
        return type(hook) is not partial and of_library(type(hook).__module__)

    def of_attention(self, config: Any) -> list[Any]:
        """The name of the attention function, and which functions go by it."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = config._attn_implementation_internal
        known = [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS]
        tables = cast("list[Mapping[str, Any]]", known)
        return [name, *(self.of(each.get(name), f"the attention `{name}`") for each in tables)]

    def of(self, value: Any, where: str) -> Any:
        """Any value as JSON says it. CodeUnknown for what can't be told."""
        if isinstance(value, Enum):
            return [_name(type(value)), value.name]
        if isinstance(value, _PLAIN):
            return [type(value).__name__, repr(value)]
        if isinstance(value, Tensor):
            return _tensor(value, content=True)
        if isinstance(value, type):
            return self._reached.add_class(value)
        if isinstance(value, nn.Module):
            if value in self._parts:
                return "a module of its own"
            raise CodeUnknown(f"{where} is a module that isn't among its own")
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return [self._reached.add_class(type(value)), self._items(value.to_dict(), where)]
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
            own = value.__self__
            if not isinstance(own, type) and own not in self._parts:
                raise CodeUnknown(f"{where} is a method of an object that can't be told")
            return ["method", self.of(value.__func__, where)]
        if isinstance(value, FunctionType):
            return ["function", self._reached.add_function(value)]
        if isinstance(value, BuiltinFunctionType) and is_free(value) and not is_own_compiled(value):
            return ["function", value.__module__, value.__qualname__]
        raise CodeUnknown(f"{where} is a `{type(value).__name__}`, which can't be told")


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
