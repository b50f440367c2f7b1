"""Checks of models that were passed before: kept by what they hang on, so that they run once.

They hang on the config, the precision, the way of attending, the kind of device and the versions of
all code that takes part. Nothing is kept of models that Python hands over, as anything may have
been done to those.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mechdsl.base.cache import cache_folder
from mechdsl.base.files import write_whole
from mechdsl.hooks.loaded import Outcome


def key_of(config: Mapping[str, Any], **more: str) -> str:
    """Hash of all that the outcome of checks hangs on, the weights aside."""
    code = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _own_code()]
    parts = {
        "config": config,
        "python": sys.version,
        "versions": {name: version(name) for name in ("torch", "transformers", "mechdsl")},
        "code": code,
        **more,
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _own_code() -> list[Path]:
    return sorted(Path(__file__).parents[1].rglob("*.py"))


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


def recall(key: str) -> Proof | None:
    """What was found before; None where nothing was."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        found = json.loads((folder / "checks" / f"{key}.json").read_text(encoding="utf-8"))
        checks = tuple(Outcome(**one) for one in found.pop("checks"))
        idle = tuple((stack, site, layer) for stack, site, layer in found.pop("idle"))
        return Proof(checks=checks, idle=idle, **found)
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it was cut short
        return None


def remember(key: str, proof: Proof) -> None:
    """Keep what was found; where the folder can't be written, the checks just run again."""
    folder = cache_folder()
    if folder is None:
        return
    with suppress(OSError):
        write_whole(folder / "checks" / f"{key}.json", json.dumps(asdict(proof)))
