"""The cache of the Hugging Face hub: where what was downloaded before lies."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Literal


def hub_cache() -> Path:
    """The Hugging Face cache, as `HF_HUB_CACHE`, `HF_HOME` or the default say."""
    if direct := os.environ.get("HF_HUB_CACHE"):
        return Path(direct).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "hub"


def cached(
    name: str, revision: str | None, *, of: Literal["models", "datasets"] = "models"
) -> Path | None:
    """The snapshot of `org/name` in the cache.

    `revision` is a branch, a tag or (the start of) a commit; None is `main`. None where there is
    no snapshot, or where several commits start with `revision`.
    """
    root = hub_cache() / f"{of}--{name.replace('/', '--')}"
    if not os.path.isdir(root / "snapshots"):
        return None
    wanted = revision or "main"
    if PurePath(wanted).is_absolute() or ".." in PurePath(wanted).parts:
        return None  # a path out of the cache is no revision
    reference = root / "refs" / wanted
    if os.path.isfile(reference):
        wanted = reference.read_text(encoding="utf-8", errors="replace").strip()
    exact = root / "snapshots" / wanted
    if os.path.isdir(exact):
        return exact
    starting = [p for p in (root / "snapshots").iterdir() if p.name.startswith(wanted)]
    return starting[0] if len(starting) == 1 else None
