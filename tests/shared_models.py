"""Load, adopt and identify models that no test modifies once per process.

Loading a model and proving its anatomy takes half of the time of a run of a small file. Zoo models
are shared by default; a test module registers other models with `unchanged`. A test that modifies
a model builds a separate one. Worker processes share the proofs of unchanged models.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading import identity, loader
from mechdsl.models.folder import (
    FileHasher,
    file_stamps,
    folder_identity,
    hash_file,
    locate_model,
    weight_files,
)
from mechdsl.program import spec
from mechdsl.vocab.sites import SITES

Model = TypeVar("Model")
Outcome = tuple[LoadedModel | None, list[Diagnostic]]

_LOAD, _ADOPT, _EXPLAIN = loader.load_model, loader.adopt_model, identity.explain_identity
_STEPS = ("_load_module", "_load_reader", "prove_any_anatomy", "read_shape", "ProofStore")
_SHIPPED = {step: getattr(loader, step) for step in _STEPS}
"""Functions that a test may replace; it then gets a real load."""

_UNCHANGED: dict[int, Any] = {}
"""Models that stay alive and unchanged, by `id`."""
_COPIES: dict[int, Any] = {}
"""`id` of an unchanged model → its copy on the device that tests run on."""
_LOADED: dict[tuple[Any, ...], LoadedModel] = {}
_ADOPTED: dict[tuple[Any, ...], tuple[Any, LoadedModel]] = {}
"""Key, with the registered sites → the tokenizer, which stays alive, and the model."""
_IDENTIFIED: dict[tuple[Any, ...], tuple[Any, tuple[str | None, str]]] = {}
"""Key → the tokenizer, which stays alive, and the identity."""


def unchanged(model: Model) -> Model:
    """Register a model that stays alive and that no test changes."""
    _UNCHANGED[id(model)] = model
    return model


def is_unchanged(model: Any) -> bool:
    """Return whether a model is registered as unchanged."""
    return id(model) in _UNCHANGED


def share_models(device: str = "cpu") -> None:
    """Share models in the rest of this process.

    Args:
        device: Where files run. On devices other than the CPU, models that tests pass are copied
            there, and references compute with the originals.
    """
    loader.load_model = partial(_load_once, device=device)
    loader.adopt_model = _adopt_once if device == "cpu" else partial(_adopt_copy, device)
    identity.explain_identity = _explain_once


def _is_shipped() -> bool:
    return all(getattr(loader, step) is own for step, own in _SHIPPED.items())


def _load_once(
    model: spec.Model,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    hashed: FileHasher | None = hash_file,
    spread: Any = None,
    **more: Any,
) -> Outcome:
    """Load a model of the zoo once; hashes of its files are computed at each call."""
    folder = locate_model(model, Path.cwd())[0] if model.kind == "zoo" else None
    if folder is None or spread or not _is_shipped():
        return _LOAD(model, device=device, dtype=dtype, hashed=hashed, spread=spread, **more)
    key = (
        *(model.name, model.path, model.revision, model.bos, dtype or model.dtype, str(device)),
        *(folder, tuple(file_stamps(model, folder).items()), os.environ.get("MECHDSL_CACHE")),
        *SITES,
    )
    if key not in _LOADED:
        loaded, found = _LOAD(model, device=device, dtype=dtype, hashed=hashed, **more)
        if loaded is not None and not found:
            _LOADED[key] = loaded
        return loaded, found
    loaded = _LOADED[key]
    provenance = {name: value for name, value in loaded.provenance.items() if name != "weights"}
    provenance = {**loader.describe_weight_hash(weight_files(folder), hashed), **provenance}
    digest = None if hashed is None else folder_identity(model, folder, hashed)
    return replace(loaded, provenance=provenance, identity=digest), []


def _adopt_copy(device: str, name: str, module: Any, tokenizer: Any, **more: Any) -> Outcome:
    """Adopt a model's copy on another device; that of an unchanged model once."""
    if not is_unchanged(module):
        return _ADOPT(name, copy.deepcopy(module).to(device), tokenizer, **more)
    if id(module) not in _COPIES:
        _COPIES[id(module)] = unchanged(copy.deepcopy(module).to(device))
    return _adopt_once(name, _COPIES[id(module)], tokenizer, **more)


def _adopt_once(name: str, module: Any, tokenizer: Any, **more: Any) -> Outcome:
    """Adopt an unchanged model once for each tokenizer object."""
    if more.keys() - {"bos"} or not is_unchanged(module) or not _is_shipped():
        return _ADOPT(name, module, tokenizer, **more)
    key = name, id(module), id(tokenizer), more.get("bos"), *SITES
    if key not in _ADOPTED:
        # In the session's folder, for the other worker; mechdsl keeps such proofs in memory.
        with patch.object(loader, "ProcessProofStore", loader.ProofStore):
            model, found = _ADOPT(name, module, tokenizer, **more)
        if model is not None and not found:
            _ADOPTED[key] = tokenizer, model
        return model, found
    return _ADOPTED[key][1], []


def _explain_once(model: LoadedModel) -> tuple[str | None, str]:
    """Compute the identity of an unchanged model once for each tokenizer object."""
    if model.identity is not None or not is_unchanged(model.module):
        return _EXPLAIN(model)
    key = id(model.module), id(model.tokenizer), *sorted(model.provenance.items())
    if key not in _IDENTIFIED:
        _IDENTIFIED[key] = model.tokenizer, _EXPLAIN(model)
    return _IDENTIFIED[key][1]
