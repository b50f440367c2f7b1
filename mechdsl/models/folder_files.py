"""What the files of a model's folder may be: how large, and what they may name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, cast

from mechdsl.base import limits
from mechdsl.base.files import special_file
from mechdsl.base.json_text import load_json
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import ModelFileTooLarge, RunsCode, WeightsElsewhere
from mechdsl.diagnostics.e05_paths import ReadsElsewhere, SpecialFile
from mechdsl.program.named_paths import inside_reach
from mechdsl.program.spec import Model

_INDEX = ".safetensors.index.json"
_WEIGHTS = "transformers_weights"
"""A key of `config.json`: the file that the library takes the weights from."""
_KERNELS = ("attn_implementation", "experts_implementation")
"""Keys of `config.json`, also behind an underscore: a kernel, which may be a repository's."""


def refused_file(folder: Path, model: Model, *, by_name: bool) -> Diagnostic | None:
    """Why the files of a folder aren't read; None where they are. Opens no weights.

    by_name: whether it was found by a name, in the zoo or the library's cache (whose files are
    links to others of the cache), so that an untrusted file may read it.
    Codes: E0431, E0432, E0433, E0532, E0535.
    """
    for path in sorted(folder.iterdir()):
        found = _refused(path, model, by_name=by_name)
        if found is not None:
            return found
    config = _object(folder / "config.json")
    kernel = next(_repositories(config), None)
    if kernel is not None:
        return RunsCode(span=model.span, model=model.name, key=kernel[0], value=kernel[1])
    for file, name in named_weights(folder, config):
        if not by_name and not inside_reach(folder / name, model.span):
            return _elsewhere(model, name, f"`{file}` names it, and it leads out of the folder")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return WeightsElsewhere(span=model.span, model=model.name, file=file, name=name)
    return None


def _refused(path: Path, model: Model, *, by_name: bool) -> Diagnostic | None:
    """What is wrong with one of the files."""
    if not by_name and not inside_reach(path, model.span):
        return _elsewhere(model, path.name, "a link that leads out of the folder")
    what = special_file(path)
    if what is not None:
        return SpecialFile(
            span=model.span,
            construct=model.kind,
            path=f"{model.path}/{path.name}",
            what=what,
            hint="point at a folder that `save_pretrained` wrote",
        )
    if path.suffix == ".json" and path.is_file():
        size = os.path.getsize(path)
        if size > limits.MODEL_FILE:
            return ModelFileTooLarge(
                span=model.span,
                model=model.name,
                file=path.name,
                size=size,
                most=limits.MODEL_FILE,
            )
    return None


def _elsewhere(model: Model, name: str, where: str) -> Diagnostic:
    path = f"{model.path}/{name}"
    return ReadsElsewhere(span=model.span, construct=model.kind, path=path, where=where)


def named_weights(
    folder: Path, config: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Files of weights that another file of the folder names, behind that one's name: an index, or
    the config, which is read where it isn't given."""
    config = _object(folder / "config.json") if config is None else config
    if isinstance(config.get(_WEIGHTS), str):
        yield "config.json", config[_WEIGHTS]
    more = [folder / config[_WEIGHTS]] if str(config.get(_WEIGHTS)).endswith(_INDEX) else []
    for index in dict.fromkeys([*sorted(folder.glob(f"*{_INDEX}")), *more]):
        shards = _object(index).get("weight_map")
        if isinstance(shards, Mapping):
            names = cast("Mapping[str, Any]", shards).values()
            yield from ((index.name, name) for name in dict.fromkeys(map(str, names)))


def _repositories(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kernels that a config, or that of a part, takes from a repository: their keys and names."""
    for key, value in config.items():
        if key.strip("_").startswith(_KERNELS) and "/" in str(value):
            yield key, str(value)
        elif isinstance(value, Mapping):
            yield from _repositories(cast("Mapping[str, Any]", value))


def _object(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file, empty where it is none: whoever needs it says so."""
    try:
        found = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}
