"""Descriptions of features in a JSON lines file, such as an export of Neuronpedia.

Each line is an object with the number of the feature in `index` (or `feature`), as a number or a
text, and its description in `description` (or `label`). Other entries are ignored; the first
description of a feature counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from mechdsl.base import limits
from mechdsl.base.records import Record, record
from mechdsl.base.safetensors_files import UnreadableFile

INDEX_KEYS, TEXT_KEYS = ("index", "feature"), ("description", "label")

_EXAMPLE = 'a line is `{"index": 12, "description": "names of months"}`'


@record
class FeatureLabels(Record):
    """Descriptions of features."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    texts: Mapping[int, str]
    """Feature → its description."""


def read_labels(path: Path, written: str) -> FeatureLabels:
    """Read a file of descriptions.

    Args:
        path: A JSON lines file.
        written: The path as the user wrote it.

    Raises:
        UnreadableFile: If it is missing, has another form, or is too large.
    """
    try:
        size = path.stat()
        if size.st_size > limits.LABELS_FILE:
            raise UnreadableFile(
                f"`{written}` has {size.st_size:,} bytes, more than {limits.LABELS_FILE:,}",
                "keep the lines of this dictionary only",
            )
        return _read(path, written, size.st_mtime_ns, size.st_size)
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise UnreadableFile(
            f"`{written}` can't be read: {said}",
            "name a JSON lines file; paths start from the folder of the `.mech` file",
        ) from None


@lru_cache(maxsize=16)
def _read(path: Path, written: str, modified: int, size: int) -> FeatureLabels:
    content = path.read_bytes()
    texts: dict[int, str] = {}
    for feature, text in _entries(content, written):
        texts.setdefault(feature, text)
    if not texts:
        raise UnreadableFile(f"`{written}` describes no feature", _EXAMPLE)
    return FeatureLabels(path, sha256(content).hexdigest(), texts)


def _entries(content: bytes, written: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            index = next(entry[key] for key in INDEX_KEYS if key in entry)
            text = next(entry[key] for key in TEXT_KEYS if key in entry)
            feature = int(index)
        except (ValueError, TypeError, StopIteration, RecursionError):
            raise UnreadableFile(
                f"line {number} of `{written}` has no description", _EXAMPLE
            ) from None
        if isinstance(text, str) and text.strip():
            yield feature, " ".join(text.split())
