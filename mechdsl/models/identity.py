"""What a model of a folder is, without loading it.

A digest of all that its outputs hang on: config, weights, tokenizer, the base of an adapter. Not of
its name, its path or its precision, so that a copy is the same model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from mechdsl.models.folder_files import named_weights
from mechdsl.models.locate import ADAPTER, weight_files
from mechdsl.program import spec

Hashed = Callable[[Path], str]
"""SHA-256 of a file in hex: `Store.file_hash`, which reads a file once, or `file_hash`."""

_CONFIGS = ("config.json", "generation_config.json", ADAPTER)
"""What the library reads beside weights and tokenizer."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""As `mechdsl/prompts/tokenizer.py` has them, which stands beside this floor."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(files: list[Path], hashed: Hashed = file_hash) -> str:
    """What `hashes` of a result call the weights: the SHA-256 of the file; of several files, that
    of theirs, in order of the names."""
    every = [hashed(path) for path in files]
    return every[0] if len(every) == 1 else digest_of(every)


def identity_of_folder(
    statement: spec.Model, folder: Path, hashed: Hashed = file_hash, *, base: str | None = None
) -> str | None:
    """The digest of the model that a folder holds; None where it can't be told.

    base: of an adapter the identity of its base, None where that has none.
    Raises OSError where a file can't be read.
    """
    if statement.base is not None and base is None:
        return None
    adapter = statement.base is not None
    weights = {p.name: p for p in weight_files(folder, adapter=adapter)}
    if not adapter:
        weights |= {name: folder / name for _, name in named_weights(folder)}
    parts = {
        "of": "folder",
        "configs": dict(_contents(folder, adapter=adapter)),
        "weights": {
            name: hashed(path) for name, path in sorted(weights.items()) if os.path.isfile(path)
        },
        "base": base,
        "tokenizer": _tokenizer(folder),
    }
    return digest_of(parts)


def stamps(statement: spec.Model, folder: Path) -> dict[str, tuple[int, ...] | None]:
    """Sizes, times and inodes of the files that the identity is of: where they are the same before
    and after, the files were not written in between."""
    adapter = statement.base is not None
    names = [path.name for path in weight_files(folder, adapter=adapter)]
    names += [*_CONFIGS, *TOKENIZER]
    for file, name in () if adapter else named_weights(folder):
        names += [file, name]
    return {name: _stamp(folder / name) for name in names}


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _contents(folder: Path, *, adapter: bool) -> Iterator[tuple[str, str]]:
    """The configs, and the indices that say which weights lie in which file."""
    named = [ADAPTER] if adapter else [*_CONFIGS, *(file for file, _ in named_weights(folder))]
    for name in dict.fromkeys(named):
        path = folder / name
        if os.path.isfile(path):
            yield name, sha256(path.read_bytes()).hexdigest()


def _tokenizer(folder: Path) -> Mapping[str, str]:
    files = [folder / name for name in TOKENIZER]
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in files if os.path.isfile(p)}


def digest_of(parts: object) -> str:
    """SHA-256 of what JSON can say: names sorted, no white space."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(text.encode()).hexdigest()
