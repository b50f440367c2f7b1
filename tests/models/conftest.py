"""Models of every family, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from mechdsl.base.text import Source, Span
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.loading.loader import load_model
from mechdsl.program import spec

from . import families

torch.set_num_threads(1)


def statement(path: str, kind: Any = "local", **fields: Any) -> spec.Model:
    """A `model` statement as the parser returns it."""
    text = f'model m = {kind}("{path}")'
    span = Span(Source(text, Path("test.mech")), 0, len(text))
    return spec.Model(span=span, name="m", kind=kind, path=path, **fields)


@pytest.fixture(autouse=True)
def _checked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the cache of self-checks, so that each test runs them."""
    monkeypatch.setenv("MECHDSL_CACHE", "")


class Folders(dict[str, Path]):
    """Folders of tiny models by family, built on first access."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Path:
        self[name] = families.build(name, self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Folders(tmp_path_factory.mktemp("models"))


LATER = {"apertus": "5.1"}
"""Families by the first version of transformers that can load them."""


class Models(dict[str, LoadedModel]):
    """Loaded models by family, loaded on first access."""

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, name: str) -> LoadedModel:
        if Version(transformers.__version__) < Version(LATER.get(name, "0")):
            pytest.skip(f"transformers {transformers.__version__} can't load {name}")
        model, found = load_model(statement(str(self.folders[name])))
        assert model is not None, [(d.message, d.label_text) for d in found]
        assert not found, name
        self[name] = model
        return model


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return Models(folders)
