"""Models of the zoo are loaded and proved once per process; tests that need a real load ask for it.

Loading takes half of the time of a run of a small file. No run changes a model, which other tests
check.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading import loader
from mechdsl.models.folder import (
    FileHasher,
    file_stamps,
    folder_identity,
    hash_file,
    locate_model,
    weight_files,
)
from mechdsl.program import spec

_LOAD = loader.load_model
_STEPS = ("_load_module", "prove_any_anatomy", "ProofStore", "_load_reader", "read_shape")
_SHIPPED = {step: getattr(loader, step) for step in _STEPS}
"""Functions that a test may replace; it then gets a real load."""
_LOADED: dict[tuple[Any, ...], LoadedModel] = {}


def share_zoo_models() -> None:
    """Share the models of the zoo in the rest of this process."""
    loader.load_model = _load_once


@contextmanager
def load_as_shipped() -> Generator[None]:
    """Load models of the zoo at each call."""
    with patch.object(loader, "load_model", _LOAD):
        yield


def _load_once(
    model: spec.Model,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    hashed: FileHasher | None = hash_file,
    spread: Any = None,
    **more: Any,
) -> tuple[LoadedModel | None, list[Any]]:
    folder, _ = locate_model(model, Path.cwd()) if model.kind == "zoo" else (None, [])
    replaced = any(getattr(loader, step) is not own for step, own in _SHIPPED.items())
    if folder is None or spread or replaced:
        return _LOAD(model, device=device, dtype=dtype, hashed=hashed, spread=spread, **more)
    key = (
        *(model.name, model.path, model.revision, model.bos, dtype or model.dtype, str(device)),
        *(folder, tuple(file_stamps(model, folder).items()), os.environ.get("MECHDSL_CACHE")),
    )
    if key not in _LOADED:
        loaded, found = _LOAD(
            model, device=device, dtype=dtype, hashed=hashed, spread=spread, **more
        )
        if loaded is not None and not found:
            _LOADED[key] = loaded
        return loaded, found
    loaded = _LOADED[key]
    provenance = {name: value for name, value in loaded.provenance.items() if name != "weights"}
    provenance = {**loader.describe_weight_hash(weight_files(folder), hashed), **provenance}
    identity = None if hashed is None else folder_identity(model, folder, hashed)
    return replace(loaded, provenance=provenance, identity=identity), []
