"""Identities of a file's models, for keys of the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechdsl.checks.file_check import CheckedFile
from mechdsl.models.folder import FileHasher, folder_identity, json_digest, locate_model

if TYPE_CHECKING:
    from mechdsl.forward.hooks.model import LoadedModel


class RunKeyError(Exception):
    """A run can't be identified; the text gives the reason in lower case."""


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
            "device": _device_words(model),
            "source": model.provenance.get("source", ""),
        }

    def _identity(self, name: str) -> str:
        if name in self._known:
            from mechdsl.loading.identity import explain_identity

            found, reason = explain_identity(self._known[name])
            if found is None:
                raise RunKeyError(f"model `{name}` can't be identified: {reason}")
            return found
        model = self._checked.program.models[name]
        if not model.is_loaded:  # its edits and factors are in the texts and parameters
            return json_digest([model.kind, *map(self._identity, model.bases)])
        folder, _ = locate_model(model, model.span.source.folder)
        base = None if model.base is None else self._identity(model.base)
        found = None
        if folder is not None:
            found = folder_identity(model, folder, self._hashed, base=base)
        if found is None:
            raise RunKeyError(f"the files of model `{name}` can't be read")
        return found

    def _snapshot(self, name: str) -> str:
        """Return the commit of a snapshot in the library's cache, which results contain."""
        model = self._checked.program.models[name]
        folder, _ = locate_model(model, model.span.source.folder)
        inside = folder is not None and folder.parent.name == "snapshots"
        return folder.name if folder is not None and inside else ""


def _device_words(model: LoadedModel) -> str:
    if model.device.type != "cuda":
        return model.device.type
    import torch

    return f"cuda {torch.cuda.get_device_name(model.device)}"
