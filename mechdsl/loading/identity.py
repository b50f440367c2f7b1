"""Identity of a loaded model: a digest of its folder, or of all its values and code."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from logging import Logger
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from mechdsl.forward.hooks.model import LoadedModel, list_attention_configs
from mechdsl.models.folder import json_digest
from mechdsl.program.code_hashes import CodeHashError, code_digest, hash_module_code, is_installed

IDENTIFIED_LIBRARIES = ("torch", "transformers", "huggingface_hub", "peft", "accelerate")
"""Packages that are identified by their version and their code in memory."""

_CALL_ATTRIBUTES = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
"""Attributes that are looked up in a call of a module."""

_NATIVE_TYPES = (
    *(BuiltinFunctionType, WrapperDescriptorType, MethodDescriptorType),
    *(GetSetDescriptorType, MemberDescriptorType),
)


class _Row(NamedTuple):
    first: int


_TUPLE_FIELD_TYPE: Any = type(vars(_Row)["first"])
"""The type of the attributes of a named tuple's class."""

_NUMBER_TYPES = (int, float, complex, type(None), torch.dtype, torch.device)
"""Types whose values in library code are described; texts may differ between processes."""

_COMMON_ATTRIBUTES = frozenset({
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__"),
    *("__annotations__", "__annotate_func__", "__annotations_cache__", "__parameters__"),
    *("__abstractmethods__", "_abc_impl", "__orig_bases__", "__match_args__", "__slotnames__"),
    *("__dataclass_fields__", "__dataclass_params__", "__firstlineno__", "__static_attributes__"),
})  # fmt: skip
"""Attributes set by the interpreter, which no forward pass reads."""

ValueDescriber = Callable[[Any, str], Any]
"""(value, its location) → its description as JSON. Raises CodeHashError."""


class ReachedCode:
    """Functions and classes reachable from those that are added.

    In the user's own code, every value that a function reads is described by `tell`, which raises
    CodeHashError if it can't. In library code, numbers, functions and classes are described.
    """

    def __init__(self, tell: ValueDescriber) -> None:
        self._tell = tell
        self._labels: dict[object, str] = {}
        self._counts: Counter[str] = Counter()
        self._packages: set[str] = set()
        self._functions: dict[FunctionType, list[Any]] = {}
        self._waiting: list[FunctionType] = []
        self._classes: dict[type, None] = {torch.Tensor: None}
        self._names: set[str] = set(_CALL_ATTRIBUTES)
        self._bindings: dict[tuple[str, str], Any] = {}
        self._looked_up: set[tuple[type, bool]] = set()
        self.homes: set[str] = set()
        """Modules whose source files count too: those of the user's functions, and of module
        classes outside the libraries."""

    def add_module_class(self, kind: type) -> str:
        """Add the class of one of the model's modules, whose packages are followed."""
        homes = {base.__module__ for base in kind.__mro__}
        self._packages |= set(map(_get_root, homes))
        self.homes |= set(filter(_has_source, homes))
        return self.add_class(kind)

    def add_class(self, kind: type) -> str:
        """Add a class whose methods may be called; returns labels of the class and its bases."""
        self._classes[kind] = None
        return " ".join(self._label(each, _qualified_name(each)) for each in kind.__mro__)

    def add_function(self, function: FunctionType) -> str:
        """Add a function that is called; returns its label."""
        home = get_globals_module(function)
        if function not in self._functions:
            self._functions[function] = []
            self._waiting.append(function)
            if not is_library(home):
                self.homes.add(home)
        return self._label(function, f"{home}.{function.__qualname__}")

    def _label(self, value: FunctionType | type | ModuleType, name: str) -> str:
        """Return a unique label; repeatedly created functions and classes share a name."""
        if value not in self._labels:
            number = self._counts[name]
            self._counts[name] += 1
            self._labels[value] = f"{name} {number}" if number else name
        return self._labels[value]

    def digest(self) -> str:
        """Return the SHA-256 of all reachable code. Raises CodeHashError."""
        before = (0, 0)
        while before != (now := (len(self._names), len(self._classes))):
            before = now
            self._looked_up.clear()
            for kind in list(self._classes):
                self._look_up(kind)
            while self._waiting:
                self._follow(self._waiting.pop())
        functions = [*self._functions.values(), *self._bindings.items()]
        return sha256("\n".join(sorted(map(repr, functions))).encode()).hexdigest()

    def _is_followed(self, home: str) -> bool:
        if not is_library(home):
            return True
        return _get_root(home) in self._packages and (
            _get_root(home) != "torch" or home.startswith("torch.nn.")
        )

    # --- functions and classes ---

    def _follow(self, function: FunctionType) -> None:
        """Read a function's defaults, its closure and the globals that it names."""
        code, home = function.__code__, get_globals_module(function)
        own = not is_library(home)
        where = f"`{function.__qualname__}`"
        values: dict[str, Any] = {}
        names = _list_names(code) | (_list_texts(code) if own else frozenset())
        for number, value in enumerate(function.__defaults__ or ()):
            values[f"default {number}"] = self._of(value, f"a default of {where}", own)
        for name, value in (function.__kwdefaults__ or {}).items():
            values[f"default {name}"] = self._of(value, f"a default of {where}", own)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                kept = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            values[f"closure {name}"] = self._of(
                kept, f"`{name}`, which {where} keeps,", own, names
            )
        if self._is_followed(home):
            self._names |= names
            held = function.__globals__
            for name in sorted(names if own else held.keys() & names):
                value = held[name] if name in held else _find_imported(name, function)
                if value is not _MISSING and (own or not _is_cache(home, name, value)):
                    told = self._of(value, f"`{name}`, which {where} reads,", own, names)
                    values[f"global {name}"] = told
        self._functions[function] = [self.add_function(function), code_digest(code), values]

    def _look_up(self, kind: type) -> None:
        """Read the attributes of a class and its bases that some function names."""
        whole = not issubclass(kind, nn.Module)
        for base in kind.__mro__[:-1]:
            if (base, whole) in self._looked_up:
                continue
            self._looked_up.add((base, whole))
            if not (base is torch.Tensor or self._is_followed(base.__module__)):
                continue
            own, name = not is_library(base.__module__), self._label(base, _qualified_name(base))
            for attribute, value in list(vars(base).items()):
                if attribute not in self._names and not (whole and attribute.startswith("__")):
                    continue
                if attribute in _COMMON_ATTRIBUTES or (name, attribute) in self._bindings:
                    continue
                where = f"`{base.__qualname__}.{attribute}`"
                self._bindings[name, attribute] = self._of(value, where, own)

    def _attributes(
        self,
        module: ModuleType,
        names: frozenset[str],
        inside: tuple[ModuleType, ...],
        *,
        own_reads: bool,
    ) -> None:
        """Read the attributes of a module that occur in the code that names the module.

        Args:
            module: The module.
            names: All names in that code.
            inside: Modules that led to it.
            own_reads: Whether that code is the user's own.

        Raises:
            CodeHashError: The user's own code reads something that can't be described.
        """
        own, held = not is_library(module.__name__), vars(module)
        data, label = self._is_followed(module.__name__), self._label(module, module.__name__)
        for name in sorted(held.keys() & names):
            key, value = (label, name), held[name]
            if not own and _is_cache(module.__name__, name, value):
                continue
            if own_reads:
                _refuse_unseen(value, f"`{module.__name__}.{name}`")
            if isinstance(value, ModuleType):
                self._bindings[key] = self._label(value, value.__name__)
                if value not in inside:
                    self._attributes(value, names, (*inside, value), own_reads=own_reads)
            elif own_reads and not data and isinstance(value, (*_NUMBER_TYPES, str)):
                self._bindings[key] = repr(value)
            elif key not in self._bindings and (data or isinstance(value, FunctionType | type)):
                self._bindings[key] = self._of(value, f"`{'.'.join(key)}`", own)

    # --- values ---

    def _of(self, value: Any, where: str, own: bool, names: Iterable[str] = ()) -> Any:
        """Describe a value.

        Args:
            value: The value.
            where: Its location, for messages.
            own: Whether it belongs to the user's own code.
            names: Names that occur in the same code.
        """
        if own:
            _refuse_unseen(value, where)
        match value:
            case FunctionType():
                return self.add_function(value)
            case ModuleType():
                self._attributes(value, frozenset(names), (value,), own_reads=own)
                return self._label(value, value.__name__)
            case type():
                return self.add_class(value)
            case MethodType():
                inner = value.__func__
                if isinstance(inner, FunctionType) and is_library(get_globals_module(inner)):
                    return self.add_function(inner)
                return self._tell(value, where)
            case staticmethod() | classmethod():
                return self._of(cast("Any", value).__func__, where, own, names)
            case property():
                return [self._of(each, where, own) for each in (value.fget, value.fset)]
            case cached_property():
                return self._of(cast("Any", value).func, where, own)
            case partial() if not own:
                held = cast("Any", value)
                parts = (held.func, held.args, held.keywords)
                return [self._of(part, where, own) for part in parts]
            case Logger():
                return "logger"
            case _ if isinstance(value, _TUPLE_FIELD_TYPE):
                return ["field", *value.__reduce__()[1]]
            case _ if isinstance(value, _NATIVE_TYPES) and is_stateless(value):
                native = cast("Any", value)
                return [getattr(native, "__module__", None), native.__qualname__]
            case _:
                return self._data(value, where, own)

    def _data(self, value: Any, where: str, own: bool) -> Any:
        kind = type(value)
        inner = getattr(value, "__wrapped__", None)
        if isinstance(inner, FunctionType) and is_library(
            get_globals_module(inner)
        ):  # for example from `lru_cache`
            return self.add_function(inner)
        if own or not is_library(kind.__module__) or isinstance(value, torch.Tensor):
            return self._tell(value, where)
        if isinstance(value, _NUMBER_TYPES):
            return repr(value)
        if kind in (list, tuple):
            return [self._of(each, where, own) for each in value]
        if kind is dict:
            return [
                [repr(name), self._of(each, where, own)]
                for name, each in value.items()
                if not _is_mechdsl_entry(each)
            ]
        if self._is_followed(kind.__module__):
            self.add_class(kind)
        return _qualified_name(kind)


def _refuse_unseen(value: object, where: str) -> None:
    """Raise CodeHashError for environment variables and the user's compiled code.

    They may change under the same name.
    """
    if value is os.environ or value is os.getenv:
        raise CodeHashError(f"{where} is the environment, which may change")
    if is_user_compiled(value) or type(value).__module__ == type(torch.ops).__module__:
        raise CodeHashError(f"{where} is compiled code, which can't be told")


def is_user_compiled(value: object) -> bool:
    """Return whether a function or method belongs to a compiled module of the user."""
    home = getattr(getattr(value, "__objclass__", value), "__module__", None) or ""
    return isinstance(value, _NATIVE_TYPES) and home in sys.modules and not is_library(home)


def is_stateless(native: object) -> bool:
    """Return whether a native function reads no object's state."""
    own = getattr(native, "__self__", None)
    return own is None or isinstance(own, type | ModuleType)


def get_globals_module(function: FunctionType) -> str:
    """Return the module whose globals a function reads, which `functools.wraps` doesn't change."""
    name = str(function.__globals__.get("__name__", ""))
    return "collections" if name.startswith("namedtuple_") else name  # the creator of these


@lru_cache(maxsize=8192)
def is_library(module: str) -> bool:
    """Return whether a module belongs to Python or an installed package, not to the user."""
    return not _has_source(module) or is_installed(_get_root(module))


def _has_source(module: str) -> bool:
    """Return whether a module is identified by its source file, not only by a version."""
    root = _get_root(module)
    return root not in IDENTIFIED_LIBRARIES and (
        root == "__main__" or root not in sys.stdlib_module_names
    )


def _is_mechdsl_entry(value: object) -> bool:
    """Return whether a hook or an attention function of the library is mechdsl's."""
    return isinstance(value, FunctionType) and _get_root(get_globals_module(value)) == _get_root(
        __name__
    )


def _is_cache(module: str, name: str, value: object) -> bool:
    """Return whether a library changes this global itself while it builds or runs any model.

    Such globals differ between two moments of one process. transformers 5.17, for example, lists in
    `_CAN_RECORD_REGISTRY` the layers of every model built so far.
    """
    if isinstance(value, int | float):  # a switch, which may change results
        return False
    is_private_table = isinstance(value, dict) and name.startswith("_")
    return is_private_table or name in _list_rebound_globals(module)


@lru_cache(maxsize=8192)
def _list_rebound_globals(module: str) -> frozenset[str]:
    """Return the globals that functions of a module assign, from its source."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        return frozenset()
    with suppress(OSError):
        source = Path(file).read_text("utf-8", "replace")
        if "global " not in source:  # the pattern is slow
            return frozenset()
        found = re.findall(r"^[ \t]+global ([\w, ]+)$", source, re.MULTILINE)
        return frozenset(name.strip() for names in found for name in names.split(","))
    return frozenset()


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _get_root(module: str) -> str:
    return module.partition(".")[0]


_MISSING = object()


def _find_imported(name: str, function: FunctionType) -> object:
    """Find a module that the user's function may import itself, if it has been imported."""
    package = function.__globals__.get("__package__") or ""
    module = sys.modules.get(name) or sys.modules.get(f"{package}.{name}")
    return _MISSING if module is None else module


@lru_cache(maxsize=8192)
def _list_names(code: CodeType) -> frozenset[str]:
    """Return the globals and attributes that code names."""
    inner = (_list_names(value) for value in code.co_consts if isinstance(value, CodeType))
    return frozenset(code.co_names).union(*inner)


def _list_texts(code: CodeType) -> frozenset[str]:
    """Return texts in code that may be names of attributes, as for `getattr`."""
    texts = {each for each in code.co_consts if isinstance(each, str) and each.isidentifier()}
    inner = (_list_texts(value) for value in code.co_consts if isinstance(value, CodeType))
    return frozenset(texts).union(*inner)


_MODULE_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules", "training"})
"""Attributes of modules that are described separately."""

_PLAIN_TYPES = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    slice,
    range,
)


_BUILT_IN_TYPES = ("builtins", "collections", "torch")
"""Modules whose types are described by their names and contents."""


def compute_identity(model: LoadedModel) -> str | None:
    """Return the digest of a model; None if it can't be computed."""
    return explain_identity(model)[0]


def explain_identity(model: LoadedModel) -> tuple[str | None, str]:
    """Return the digest of a model, or the reason why it can't be computed, in lower case."""
    if model.identity is not None:
        return model.identity, ""
    try:
        return json_digest(_list_parts(model)), ""
    except CodeHashError as unknown:
        return None, str(unknown)


def digest_module(module: nn.Module, weights: str) -> str | None:
    """Return the digest of a module's values and code; None if it can't be computed.

    Args:
        module: The module.
        weights: The digest of its parameters.
    """
    with suppress(CodeHashError):
        return json_digest({"weights": weights, **_list_module_parts(module)})
    return None


def _list_module_parts(module: nn.Module, given: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Describe a module's values and code, except for parameters, and the code of a processor.

    Args:
        module: The module.
        given: A processor from Python and its config.

    Raises:
        CodeHashError: They can't be described.
    """
    if any(vars(nn.modules.module)[f"_global_{table}"] for table in _HOOKS):
        raise CodeHashError("torch has hooks for all modules")
    told = _ModuleDescription(module)
    try:
        return {
            "modules": {path: told.of_part(path, part) for path, part in module.named_modules()},
            "attention": [told.of_attention(config) for config in list_attention_configs(module)],
            "processor": told.of_processor(given),
            "code": told.code(),
        }
    except RecursionError:
        raise CodeHashError("it has a value that is nested too deeply") from None


def _list_parts(model: LoadedModel) -> dict[str, Any]:
    tokenizer = model.tokenizer
    return {
        "of": "python in eval mode",
        "weights": model.provenance.get("weights", ""),
        "made of": model.made_of,
        **_list_module_parts(model.module, getattr(tokenizer, "given", None)),
        "tokenizer": None
        if tokenizer is None
        else [
            tokenizer.hash,
            tokenizer.bos,
            sorted(tokenizer.roles.items()),
            *([] if tokenizer.chat is None else [tokenizer.chat.digest]),
        ],
    }


_GENERATION_SETTINGS = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
"""Settings of a generation config that replies depend on."""

_PROCESSOR_PARTS = ("image_processor", "video_processor", "feature_extractor")
"""Attributes of a processor that prepare images and sounds."""

_STATES_OF_CALLS = frozenset({"rope_deltas"})
"""Attributes that modules of the library set in a call, and read only in later steps of the same
reply: Qwen2-VL's offset of positions."""

_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


class _ModuleDescription:
    """Description of modules by their values; collects the code that they run."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = set(model.modules())
        self._open: dict[int, None] = {}
        """Identities of the values that are being described, the outermost first."""
        self._reached = ReachedCode(self.of)

    def code(self) -> list[Any]:
        """Return digests of the code reached so far."""
        reached = self._reached.digest()
        files: dict[str, str] = {}
        for home in sorted(self._reached.homes):
            if home not in files:
                files |= hash_module_code(home)
        return [reached, files]

    def of_part(self, path: str, part: nn.Module) -> list[Any]:
        """Describe one module without its submodules."""
        held = vars(part)
        where = f"`{path or type(part).__name__}`"
        if "forward" in held:
            raise CodeHashError(f"{where} has a `forward` that differs from that of its class")
        for table in _HOOKS:
            if not all(map(self._is_hook_of_library, held[f"_{table}"].values())):
                raise CodeHashError(f"{where} has {table.partition('_')[0]} hooks")
        tensors = {**held["_parameters"], **held["_buffers"]}
        if any(tensor is not None and tensor._backward_hooks for tensor in tensors.values()):
            raise CodeHashError(f"{where} has a tensor with hooks")
        left_out = _MODULE_ATTRIBUTES
        if is_library(type(part).__module__):
            left_out |= _STATES_OF_CALLS
        rest = {
            name: self.of(value, f"{where}, its `{name}`")
            for name, value in held.items()
            if name not in left_out and not name.endswith("_hooks") and "_hooks_" not in name
        }
        own = held["_non_persistent_buffers_set"]
        return [
            self._reached.add_module_class(type(part)),
            {name: _describe_tensor(t, content=name in own) for name, t in tensors.items()},
            rest,
        ]

    def of_processor(self, given: tuple[Any, Any] | None) -> list[str]:
        """Add the code of a processor from Python; the tokenizer's hash covers its settings."""
        processor = None if given is None else given[0]
        parts = {name: getattr(processor, name, None) for name in _PROCESSOR_PARTS}
        names: list[str] = []
        for name, part in {"processor": processor, **parts}.items():
            if part is None:
                continue
            if any(isinstance(each, FunctionType | MethodType) for each in vars(part).values()):
                raise CodeHashError(f"its {name} has a method that differs from that of its class")
            names.append(self._reached.add_class(type(part)))
        return names

    def _is_hook_of_library(self, hook: Any) -> bool:
        """Return whether a library set the hook; its code is then added like any function's.

        A run adds hooks and removes them at its end: mechdsl's, and the hooks with which
        transformers returns activations. They count as a library's, and their code isn't added.
        """
        function = getattr(hook, "__func__", hook)
        inner = hook.func if isinstance(hook, partial) else hook
        if _is_mechdsl_entry(getattr(inner, "__func__", inner)):
            return True
        if isinstance(function, FunctionType):
            if get_globals_module(function) == "transformers.utils.output_capturing":
                return True
            self._reached.add_function(function)
            return is_library(get_globals_module(function))
        return type(hook) is not partial and is_library(type(hook).__module__)

    def of_attention(self, config: Any) -> list[Any]:
        """Return the name of the attention function, and the functions of that name."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = config._attn_implementation_internal
        known = [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS]
        tables = cast("list[Mapping[str, Any]]", known)
        return [name, *(self.of(each.get(name), f"the attention `{name}`") for each in tables)]

    def of(self, value: Any, where: str) -> Any:
        """Describe any value as JSON. Raises CodeHashError if that is impossible."""
        if isinstance(value, _PLAIN_TYPES) and not isinstance(value, Enum):
            return [self._kind(value, where), _describe_plain(value)]
        if isinstance(value, Tensor):
            return _describe_tensor(value, content=True)
        if isinstance(value, np.ndarray | np.generic) and type(value).__module__ == "numpy":
            return _describe_array(value, where)
        if isinstance(value, type):
            return self._reached.add_class(value)
        if isinstance(value, Logger):
            return "logger"
        if isinstance(value, nn.Module):
            if value in self._parts:
                return "a module of its own"
            raise CodeHashError(f"{where} is a module that isn't among its own")
        if _qualified_name(type(value)).endswith("GenerationConfig"):
            used = (getattr(value, name, None) for name in _GENERATION_SETTINGS)
            return [self.of(each, where) for each in used]
        if id(value) in self._open:
            return ["contains itself", list(self._open).index(id(value))]
        self._open[id(value)] = None
        try:
            return self._of_parts(value, where)
        finally:
            del self._open[id(value)]

    def _of_parts(self, value: Any, where: str) -> Any:
        """Describe a value by its parts, which may contain it."""
        if isinstance(value, Enum):
            kind = self._reached.add_module_class(type(value))
            return [kind, value.name, self.of(value.value, where)]
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return [self._reached.add_class(type(value)), self._items(value.to_dict(), where)]
        if isinstance(value, Mapping):
            items = self._items(value, where)
            if isinstance(value, defaultdict):
                items.append(self.of(cast("Any", value).default_factory, where))
            return [self._kind(value, where), items]
        if isinstance(value, list | tuple | deque):
            return [self._kind(value, where), [self.of(each, where) for each in value]]
        if isinstance(value, set | frozenset):
            return [
                self._kind(value, where),
                sorted(json_digest(self.of(each, where)) for each in value),
            ]
        if _is_pure_python(type(value)):
            return self._kind(value, where)
        return self._callable(value, where)

    def _kind(self, value: Any, where: str) -> Any:
        """Describe the class of a value, and the attributes of an instance of a Python class."""
        kind = type(value)
        if kind.__module__ in _BUILT_IN_TYPES:
            return kind.__name__
        return [self._reached.add_module_class(kind), self._items(_get_attributes(value), where)]

    def _items(self, value: Mapping[Any, Any], where: str) -> list[Any]:
        return [[self.of(key, where), self.of(each, where)] for key, each in value.items()]

    def _callable(self, value: Any, where: str) -> Any:
        if isinstance(value, partial):
            parts = (value.func, value.args, dict(value.keywords))
            return ["partial", self.of(parts, where)]
        if isinstance(value, MethodType):
            own = value.__self__
            if not isinstance(own, type) and own not in self._parts:
                raise CodeHashError(f"{where} is a method of an object that can't be told")
            return ["method", self.of(value.__func__, where)]
        if isinstance(value, FunctionType):
            return ["function", self._reached.add_function(value)]
        if (
            isinstance(value, BuiltinFunctionType)
            and is_stateless(value)
            and not is_user_compiled(value)
        ):
            return ["function", value.__module__, value.__qualname__]
        raise CodeHashError(f"{where} is a `{type(value).__name__}`, which can't be told")


def _describe_tensor(tensor: Tensor | None, *, content: bool) -> Any:
    """Describe a tensor; content: include values, which the weights' hash covers for parameters."""
    if tensor is None:
        return None
    told = [str(tensor.dtype), list(tensor.shape)]
    if not content:
        return told
    if tensor.is_meta:
        raise CodeHashError("a buffer is on the meta device")
    flat = tensor.detach().cpu().contiguous().flatten()
    return [*told, sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()]


class _Pure:
    """A class with nothing but attributes."""


def _is_pure_python(kind: type) -> bool:
    """Return whether the attributes of an instance contain everything that it holds."""
    sizes = (kind.__basicsize__, kind.__dictoffset__, kind.__itemsize__)
    return kind is SimpleNamespace or sizes == (_Pure.__basicsize__, _Pure.__dictoffset__, 0)


def _get_attributes(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def _describe_plain(value: Any) -> str:
    """Return the text of a value, also if a subclass writes it differently."""
    kind: Any = next(each for each in type(value).__mro__ if each in _PLAIN_TYPES)
    return kind.__repr__(value)


def _describe_array(value: np.ndarray | np.generic, where: str) -> list[Any]:
    """Describe an array or number of numpy by its type, shape and content."""
    if value.dtype.hasobject:
        raise CodeHashError(f"{where} is an array of objects, which can't be told")
    content = sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return [type(value).__name__, str(value.dtype), list(value.shape), content]
