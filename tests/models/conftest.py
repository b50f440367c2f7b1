"""Models of every family, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechdsl import spec
from mechdsl.load import load
from mechdsl.loaded import LoadedModel
from mechdsl.source import Source, Span

from . import families

torch.set_num_threads(1)


def statement(path: str, kind: str = "local", **fields: object) -> spec.Model:
    """A `model` statement as the parser would hand it on."""
    text = f'model m = {kind}("{path}")'
    span = Span(Source(text, Path("test.mech")), 0, len(text))
    return spec.Model.model_validate(
        {"span": span, "name": "m", "kind": kind, "path": path, **fields}
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: families.build(name, root / name) for name in families.CONFIGS}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, LoadedModel]:
    models: dict[str, LoadedModel] = {}
    for name, folder in folders.items():
        model, found = load(statement(str(folder)))
        assert model is not None, [(d.message, d.label_text) for d in found]
        assert [d.code for d in found] == (["W0711"] if name in families.WHOLE else [])
        models[name] = model
    return models
