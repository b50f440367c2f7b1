"""Identities of a file's models and of the device, for keys of the store."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechdsl.base.hashing import digest
from mechdsl.checks.file_check import CheckedFile
from mechdsl.models.folder import FileHasher, folder_identity, json_digest, locate_model
from mechdsl.results.results import package_version
from mechdsl.store.store import Store

if TYPE_CHECKING:
    import torch

    from mechdsl.forward.hooks.model import LoadedModel


VERSIONED_PACKAGES = ("torch", "transformers")
"""Packages whose version may affect any number."""


class RunKeyError(Exception):
    """A run can't be identified; the text gives the reason in lower case."""

    hint = "use a model that can be identified"


class CodeKeyError(RunKeyError):
    """Code can't be identified."""

    hint = "run the command again, in a new process"


class ModelIdentities:
    """Identities of the models, and the devices of models from Python."""

    def __init__(self, checked: CheckedFile, known: Mapping[str, Any], hashed: FileHasher) -> None:
        self._checked = checked
        self._known = known
        self._hashed = hashed

    def told(self, name: str) -> dict[str, Any]:
        if name in self._known:
            return self._of_python(name, self._known[name])
        model = self._checked.program.models[name]
        return {
            "identity": self._identity(name),
            "dtype": model.dtype,
            "bos": model.bos,
            "bases": [self.told(base) for base in model.bases],
            "folder": self._snapshot(name) if model.is_loaded else "",
        }

    def _of_python(self, name: str, model: LoadedModel) -> dict[str, Any]:
        return {
            "identity": self._identity(name),
            "dtype": str(model.dtype),
            "device": _device_words(model.device),
            "source": model.provenance.get("source", ""),
        }

    def _identity(self, name: str) -> str:
        if name in self._known:
            from mechdsl.loading.identity import explain_identity

            identity, reason = explain_identity(self._known[name])
            if identity is None:
                raise RunKeyError(f"model `{name}` can't be identified: {reason}")
            return identity
        model = self._checked.program.models[name]
        if not model.is_loaded:
            parts = [model.kind, *map(self._identity, model.bases), model.terms, model.bits]
            return json_digest([*parts, *self._edits(name)])
        folder, _ = locate_model(model, model.span.source.folder)
        base = None if model.base is None else self._identity(model.base)
        identity = None
        if folder is not None:
            identity = folder_identity(model, folder, self._hashed, base=base)
        if identity is None:
            raise RunKeyError(f"the files of model `{name}` can't be read")
        return identity

    def _edits(self, name: str) -> list[str]:
        """Digest each edit of a model with all that its numbers depend on."""
        edits = self._checked.edits.get(name)
        if edits is None:
            return []
        from mechdsl.planner.value_keys import OperandKeys, RunContents, edit_digest

        models = {model: digest(json_digest(self.told(model))) for model in edits.models}
        contents = RunContents(models, edits.models[0], edits.seed)
        keys = OperandKeys(contents, models[edits.models[0]])
        try:
            return [edit_digest(rule, keys).hex() for rule in edits.rules]
        except TypeError as unknown:
            raise RunKeyError(f"an edit of model `{name}` can't be identified: {unknown}") from None

    def _snapshot(self, name: str) -> str:
        """Return the commit of a snapshot in the library's cache, which results contain."""
        model = self._checked.program.models[name]
        folder, _ = locate_model(model, model.span.source.folder)
        inside = folder is not None and folder.parent.name == "snapshots"
        return folder.name if folder is not None and inside else ""


def _device_words(device: torch.device) -> str:
    """Return the type of a device, with the name of a GPU."""
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda {torch.cuda.get_device_name(device)}"


# --- devices --------------------------------------------------------------------------------------


_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def cached_device(store: Store, name: str) -> str | None:
    """Return the type of device that a name refers to, with the name of a GPU; None if not cached
    yet. Raises StoreProblem, OSError."""
    return "cpu" if name == "cpu" else store.note(_place(name))


def find_device(store: Store, name: str) -> str | None:
    """Return the type of device that a name refers to, with the name of a GPU; None if it doesn't
    exist. Raises StoreProblem, OSError."""
    device = cached_device(store, name)
    if device is None:
        from mechdsl.loading.devices import explain_device_problem

        if explain_device_problem(name) is not None:
            return None
        device = detect_device(store, name)
    return device


def detect_device(store: Store, name: str) -> str:
    """Determine the type of a device with torch, and cache it; torch's error if it is missing."""
    from mechdsl.loading.devices import get_device

    told = _device_words(get_device(name))
    store.take_note(_place(name), told)
    return told


def _place(name: str) -> str:
    """Return the key of a cached device: everything that the meaning of its name depends on."""
    parts = {
        "name": name,
        "host": platform.node(),
        "platform": platform.platform(),
        "torch": package_version("torch"),
        "visible": [os.environ.get(each) for each in _VARIABLES],
        "files": sorted(_device_files()),
        "driver": _driver(),
    }
    return f"device {json_digest(parts)}"


def _device_files() -> list[str]:
    try:
        every = os.listdir("/dev")
    except OSError:
        return []
    return [each for each in every if each.startswith(("nvidia", "kfd", "dri"))]


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
