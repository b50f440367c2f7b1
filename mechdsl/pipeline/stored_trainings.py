"""Trainings in a store, for `mechdsl runs trainings`: a list, and removal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mechdsl.diagnostics.command_line import BadCommandLine
from mechdsl.execute.run_record import CARD_FILE, StoredTraining
from mechdsl.pipeline.trained_files import FITS_FOLDER
from mechdsl.store.locks import take_lock

_UNKNOWN = "unknown"


def list_trainings(store: Path) -> list[StoredTraining]:
    """Return the trainings of a store, the newest first; none for a folder that isn't a store."""
    return sorted(_trainings(store / FITS_FOLDER), key=lambda each: each.ended, reverse=True)


def _trainings(folder: Path) -> Iterator[StoredTraining]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            continue
        files = [each for each in path.rglob("*") if each.is_file()]
        newest = max(each.stat().st_mtime for each in (path, *files))
        card = _read_card(path)
        yield StoredTraining(
            key=path.name.removesuffix(".part"),
            name=str(card.get("basis", _UNKNOWN)),
            trainer=str(card.get("trainer", _UNKNOWN)),
            file=str(card.get("file", _UNKNOWN)),
            model=str(card.get("model_name", _UNKNOWN)),
            prompts=str(card.get("prompts", _UNKNOWN)),
            finished=path.suffix != ".part",
            ended=datetime.fromtimestamp(newest, UTC).astimezone(),
            size=sum(each.stat().st_size for each in files),
            folder=path,
        )


def _read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a training; empty if there is none that can be read."""
    try:
        card = json.loads((folder / CARD_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def remove_trainings(
    store: Path, keys: Sequence[str]
) -> tuple[list[StoredTraining], list[BadCommandLine]]:
    """Remove the trainings whose keys begin with these texts; all are found before one is removed.

    Returns:
        The removed ones, and E0208 for texts that no key or several keys begin with, and for a
        training that is running.

    Raises:
        OSError: A folder can't be removed.
    """
    every = list_trainings(store)
    found: dict[Path, StoredTraining] = {}
    for text in keys:
        begun = [each for each in every if each.key.startswith(text)]
        if len({each.key for each in begun}) != 1:
            many = "several trainings begin" if begun else "no training begins"
            hint = "`mechdsl runs trainings` lists them"
            return [], [BadCommandLine(reason=f"{many} with `{text}`", hint=hint)]
        found |= {each.folder: each for each in begun}
    removed: list[StoredTraining] = []
    for each in found.values():
        lock = take_lock(each.folder.with_name(f"{each.key}.lock"))
        if lock is None:
            reason = f"another process is training `{each.short_key}`"
            return removed, [BadCommandLine(reason=reason, hint="wait until it ends, or stop it")]
        shutil.rmtree(each.folder)
        lock.free(remove=True)
        removed.append(each)
    return removed, []
