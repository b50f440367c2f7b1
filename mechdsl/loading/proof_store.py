"""Outcomes of the self-check of models from files, so that it runs once.

An outcome depends on the config, the precision, the attention implementation, the kind of device
and all code that takes part: that of mechdsl and of the model's modules by content, the rest by
version. File times and places don't count, so that another checkout, a reinstalled package or a
restored cache finds it. Nothing is kept of models that Python hands over, as anything may have been
done to those.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from mechdsl.base.cache import cache_folder
from mechdsl.base.files import write_whole
from mechdsl.base.own_code import own_code
from mechdsl.hooks.loaded import Outcome
from mechdsl.store.problem import StoreProblem

_OF_FILES = ("_name_or_path", "transformers_version")
"""What a config says of the files that it came from."""


class Notes(Protocol):
    """Small texts under keys, which a store keeps between runs."""

    def note(self, key: str) -> str | None:
        """What was noted."""
        ...

    def take_note(self, key: str, value: str) -> None:
        """Keep a text."""
        ...


def key_of(module: nn.Module, config: Mapping[str, Any], **more: str) -> str:
    """Hash of all that the outcome of checks depends on, the weights aside."""
    parts = {
        "config": {name: value for name, value in config.items() if name not in _OF_FILES},
        "machine": [platform.machine(), platform.python_version()],
        "versions": {name: version(name) for name in ("torch", "transformers", "mechdsl")},
        "code": own_code(),
        "modules": _module_code(module),
        **more,
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _module_code(module: nn.Module) -> dict[str, str]:
    """Hashes of the files that define the model's modules, but for torch's own."""
    classes = {type(part) for part in module.modules()}
    classes = {each for each in classes if each.__module__.partition(".")[0] != "torch"}
    files = {each.__module__: inspect.getsourcefile(each) for each in classes}
    return {
        name: "" if file is None else sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
    }


@dataclass(frozen=True)
class Proof:
    """What came of taking a model apart."""

    chosen: Mapping[str, int]
    """Stack → which of the anatomies that it could have."""
    lost: Mapping[str, str]
    """Stacks that couldn't be proved, and why."""
    checks: tuple[Outcome, ...]
    packs: Literal["tokens", "one prompt"]
    """How packed rows are called."""
    idle: tuple[tuple[str, str, int | None], ...] = ()
    """(stack, site, layer) of the parts without effect."""


class Proofs:
    """Proofs of earlier runs, kept in the run's store, if it has one, and in the user's cache."""

    def __init__(self, notes: Notes | None = None) -> None:
        self._notes = notes

    def find(self, key: str) -> Proof | None:
        """The proof that was kept; None where there is none."""
        noted = _parsed(self._noted(key))
        if noted is not None:
            return noted
        cached = _parsed(_cached(key))
        if cached is not None:
            self._note(key, cached)  # so that whoever gets the store alone has it
        return cached

    def keep(self, key: str, proof: Proof) -> None:
        """Keep a proof; where nothing can be written, the checks just run again."""
        self._note(key, proof)
        folder = cache_folder()
        if folder is not None:
            with suppress(OSError):
                write_whole(_file(folder, key), json.dumps(asdict(proof)))

    def _noted(self, key: str) -> str | None:
        if self._notes is None:
            return None
        with suppress(OSError, StoreProblem):
            return self._notes.note(f"checks {key}")
        return None

    def _note(self, key: str, proof: Proof) -> None:
        if self._notes is not None:
            with suppress(OSError, StoreProblem):
                self._notes.take_note(f"checks {key}", json.dumps(asdict(proof)))


def _cached(key: str) -> str | None:
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError, ValueError):
        return _file(folder, key).read_text(encoding="utf-8")
    return None


def _file(folder: Path, key: str) -> Path:
    return folder / "checks" / f"{key}.json"


def _parsed(text: str | None) -> Proof | None:
    """None for a text that was cut short."""
    if text is None:
        return None
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(text)
        checks = tuple(Outcome(**one) for one in found.pop("checks"))
        idle = tuple((stack, site, layer) for stack, site, layer in found.pop("idle"))
        return Proof(checks=checks, idle=idle, **found)
    return None
