"""Find a model's folder without the network, check its files, and identify its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, cast

from mechdsl import zoo
from mechdsl.base import limits
from mechdsl.base.files import find_snapshot, load_json, special_file_kind
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.files import ReadOutsideFolder, SpecialFile
from mechdsl.diagnostics.models import (
    AdapterFolder,
    ModelFileTooLarge,
    ModelNotFound,
    ModelNotLocal,
    ModelRunsCode,
    NoConfig,
    NoWeights,
    PickledWeights,
    UnknownZooModel,
    WeightsElsewhere,
)
from mechdsl.program import spec
from mechdsl.program.paths import HF_PATH, LOCAL_PATH, is_inside_reach, path_to_read
from mechdsl.program.spec import Model

_INDEX = ".safetensors.index.json"

_WEIGHTS = "transformers_weights"
"""A key of `config.json`: the file that the library loads the weights from."""

_KERNELS = ("attn_implementation", "experts_implementation")
"""Keys of `config.json`, also with a leading underscore: a kernel, perhaps from a repository."""


def check_folder_files(folder: Path, model: Model, *, by_name: bool) -> Diagnostic | None:
    """Return the reason that a folder's files aren't read; None if they are. Opens no weights.

    Args:
        folder: The folder.
        model: The model statement.
        by_name: Whether the folder was found by a name, in the zoo or in the library's cache
            (whose files are links to others of the cache), so that an untrusted file may read it.

    Returns:
        E0431, E0432, E0433, E0532 or E0535; None without a problem.
    """
    for path in sorted(folder.iterdir()):
        problem = _refused(path, model, by_name=by_name)
        if problem is not None:
            return problem
    config = _object(folder / "config.json")
    kernel = next(_repositories(config), None)
    if kernel is not None:
        return ModelRunsCode(span=model.span, model=model.name, key=kernel[0], value=kernel[1])
    for file, name in referenced_weights(folder, config):
        if not by_name and not is_inside_reach(folder / name, model.span):
            return _elsewhere(model, name, f"`{file}` refers to it, but it is outside the folder")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            return WeightsElsewhere(span=model.span, model=model.name, file=file, name=name)
    return None


def _refused(path: Path, model: Model, *, by_name: bool) -> Diagnostic | None:
    """Return the problem of one of the files."""
    if not by_name and not is_inside_reach(path, model.span):
        return _elsewhere(model, path.name, "a link to a file outside the folder")
    what = special_file_kind(path)
    if what is not None:
        return SpecialFile(
            span=model.span,
            construct=model.kind,
            path=f"{model.path}/{path.name}",
            what=what,
            hint="name a folder written by `save_pretrained`",
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
    return ReadOutsideFolder(span=model.span, construct=model.kind, path=path, where=where)


def referenced_weights(
    folder: Path, config: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (file, name) of weights that an index or the config of the folder names.

    The config is read if it isn't given.
    """
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
    """Yield keys and names of kernels that a config or subconfig loads from a repository."""
    for key, value in config.items():
        if key.strip("_").startswith(_KERNELS) and "/" in str(value):
            yield key, str(value)
        elif isinstance(value, Mapping):
            yield from _repositories(cast("Mapping[str, Any]", value))


def _object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object of a file, empty if it has none: callers report what they lack."""
    try:
        document = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("Mapping[str, Any]", document) if isinstance(document, Mapping) else {}


ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""File names of peft."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
"""Pickles that a trainer saves next to a model."""

_FILE_FOLDER = "the folder of the file"

_WRITE_PATH = "write the path from the `.mech` file to the model's folder"


def locate_model(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    """Return the folder with the model's `config.json`.

    Args:
        model: The model statement.
        base: The folder that relative paths start from, that of the `.mech` file.

    Returns:
        The folder, and E0403, E0404, E0405, E0431 to E0433, E0440, E0532, E0535, or W0710 for a
        missing model, which `require_model` turns into E0401.
    """
    match model.kind:
        case "zoo":
            return _zoo(model)
        case "local":
            return _local(model, base)
        case "hf":
            return _hub(model, base)
        case "python" | "edited" | "rounded" | "sum":
            raise ValueError("a model that is made by a function or from others has no folder")


def weight_files(folder: Path, *, adapter: bool = False) -> list[Path]:
    """Return the safetensors files of a model folder by name; an adapter has exactly one."""
    return sorted(folder.glob(ADAPTER_WEIGHTS if adapter else "*.safetensors"))


def check_weights(folder: Path, model: Model) -> Diagnostic | None:
    """Return E0406 if the folder of a model or an adapter has no weights."""
    adapter = model.base is not None
    if weight_files(folder, adapter=adapter):
        return None
    if adapter:
        advice = "copy it there; peft writes it with `save_pretrained`"
        what = f"`{ADAPTER_WEIGHTS}`"
        return NoWeights(
            span=model.span, model=model.name, what=what, config=ADAPTER_CONFIG, advice=advice
        )
    cached = model.kind == "hf" and folder == find_snapshot(model.path, model.revision)
    advice = f"`hf download {model.path}` fetches them" if cached else "copy them there"
    return NoWeights(span=model.span, model=model.name, advice=advice)


def report_missing_weights(models: Iterable[Model]) -> list[Diagnostic]:
    """Return E0406 for models whose local folders lack weights: everything but running works."""
    folders = (
        (model, locate_model(model, model.span.source.folder)[0])
        for model in models
        if model.is_loaded and model.kind != "python"
    )
    problems = (check_weights(folder, model) for model, folder in folders if folder is not None)
    return [problem for problem in problems if problem is not None]


def _zoo(model: Model) -> tuple[Path | None, list[Diagnostic]]:
    known = zoo.zoo_models()
    if model.path not in known:
        names = name_list(known)
        advice = did_you_mean(model.path, known, f"it has {names}")
        return None, [UnknownZooModel(span=model.span, path=model.path, advice=advice)]
    return _checked(Path(zoo.__path__[0]) / model.path, model, by_name=True)


def _local(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    folder, problems = path_to_read(LOCAL_PATH, model.path, model.span, base=base)
    if folder is None:
        return None, problems
    if not os.path.isdir(folder):  # unlike `Path.is_dir`, accepts any name
        return None, [
            ModelNotLocal(
                span=model.span,
                model=model.name,
                path=model.path,
                place=_FILE_FOLDER,
                advice=_WRITE_PATH,
            )
        ]
    return _checked(folder, model)


def _hub(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    folder, problems = path_to_read(HF_PATH, model.path, model.span, base=base)
    if folder is None:
        return None, problems
    if any(map(os.path.isfile, _configs(folder))):
        return _checked(folder, model)
    snapshot = find_snapshot(model.path, model.revision)
    if snapshot is not None and any(map(os.path.isfile, _configs(snapshot))):
        return _checked(snapshot, model, by_name=True)
    place, advice = "the Hugging Face cache", f"`hf download {model.path}` fetches it"
    if _is_path(model.path):
        place, advice = _FILE_FOLDER, _WRITE_PATH
    return None, [
        ModelNotLocal(
            span=model.span, model=model.name, path=model.path, place=place, advice=advice
        )
    ]


def _is_path(name: str) -> bool:
    """Return whether a name can only be a folder: those of the hub have at most one slash."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def require_model(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Turn the warning about a missing model into E0401, for commands that need the model."""
    return [
        _error(problem) if isinstance(problem, ModelNotLocal) else problem for problem in problems
    ]


def _error(missing: ModelNotLocal) -> ModelNotFound:
    return ModelNotFound(
        span=missing.span,
        model=missing.model,
        path=missing.path,
        place=missing.place,
        advice=f"{missing.advice}; without it nothing can be planned or run. From Python, pass it "
        f'as `models={{"{missing.model}": (model, tokenizer)}}`',
    )


def _checked(
    folder: Path, model: Model, *, by_name: bool = False
) -> tuple[Path | None, list[Diagnostic]]:
    refused = check_folder_files(folder, model, by_name=by_name)
    refused = refused or (_not_a_model if model.base is None else _not_an_adapter)(folder, model)
    if refused is not None:
        return None, [refused]
    pickled = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in _PICKLED and not path.name.startswith(_NO_WEIGHTS)
    )
    if pickled and not weight_files(folder, adapter=model.base is not None):
        return None, [PickledWeights(span=model.span, model=model.name, file=pickled[0])]
    return folder, []


def _configs(folder: Path) -> tuple[Path, Path]:
    """Return the files that identify a model and an adapter."""
    return folder / "config.json", folder / ADAPTER_CONFIG


def _not_a_model(folder: Path, model: Model) -> Diagnostic | None:
    """Return E0404 or E0440 for a folder without a model, or with a model and an adapter.

    The library would apply such an adapter to the model if peft is installed.
    """
    config, adapter = map(os.path.isfile, _configs(folder))
    if not adapter:
        reason = f"no such file in `{model.path}`"
        return None if config else NoConfig(span=model.span, model=model.name, reason=reason)
    named = _base_of(folder)
    of = f"`{named}`" if named else "another model"
    if config:
        return AdapterFolder(
            span=model.span,
            path=model.path,
            base=of,
            kind="as well as a model",
            files="and a `config.json` next to it",
            hint="put the files of the adapter, whose names begin with `adapter_`, into a "
            'separate folder: `model tuned = local("adapter", base: m)` reads it from there',
        )
    name = model.name if model.name.isidentifier() else "tuned"  # `mechdsl sites` has a path here
    line = f'model m = {"local" if _is_path(named) else "hf"}("{named or "…"}")'
    return AdapterFolder(
        span=model.span,
        path=model.path,
        base=of,
        hint=f'write `model {name} = {model.kind}("{model.path}", base: m)`, with a line for '
        f"the model that it was trained on: `{line}`",
    )


def _not_an_adapter(folder: Path, model: Model) -> Diagnostic | None:
    """Return E0404 if a folder that should hold an adapter has none."""
    config, adapter = map(os.path.isfile, _configs(folder))
    if adapter:
        return None
    reason, hint = f"no such file in `{model.path}`", "name a folder that peft has written"
    if config:
        reason, hint = "it has a `config.json`: it is a model, not an adapter", "remove `base:`"
    return NoConfig(
        span=model.span, model=model.name, reason=reason, file=ADAPTER_CONFIG, hint=hint
    )


def _base_of(folder: Path) -> str:
    """Return the base model that an adapter's config names; empty if it names none."""
    try:
        config = load_json((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return named if isinstance(named, str) else ""


FileHasher = Callable[[Path], str]
"""SHA-256 of a file in hex: `Store.file_hash`, which caches hashes, or `hash_file`."""

_CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
"""Files that the library reads besides weights and tokenizer."""

IDENTITY_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Same files as in `mechdsl/prompts/tokens/tokenizer.py`, which this package can't import."""


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file. Raises OSError."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def hash_weights(files: list[Path], hashed: FileHasher = hash_file) -> str:
    """Return the weights' hash in a result's `hashes`.

    It is the SHA-256 of the file; for several files, the SHA-256 of their hashes by file name.
    """
    every = [hashed(path) for path in files]
    return every[0] if len(every) == 1 else json_digest(every)


def folder_identity(
    statement: spec.Model, folder: Path, hashed: FileHasher = hash_file, *, base: str | None = None
) -> str | None:
    """Return the digest of the model in a folder; None if it can't be determined.

    base: the identity of an adapter's base, None if that has none. Raises OSError if a file can't
    be read.
    """
    if statement.base is not None and base is None:
        return None
    adapter = statement.base is not None
    weights = {p.name: p for p in weight_files(folder, adapter=adapter)}
    if not adapter:
        weights |= {name: folder / name for _, name in referenced_weights(folder)}
    parts = {
        "of": "folder",
        "configs": dict(_contents(folder, adapter=adapter)),
        "weights": {
            name: hashed(path) for name, path in sorted(weights.items()) if os.path.isfile(path)
        },
        "base": base,
        "tokenizer": _tokenizer(folder),
    }
    return json_digest(parts)


def file_stamps(statement: spec.Model, folder: Path) -> dict[str, tuple[int, ...] | None]:
    """Return sizes, times and inodes of the files that the identity depends on.

    Equal stamps before and after show that the files weren't written in between.
    """
    adapter = statement.base is not None
    names = [path.name for path in weight_files(folder, adapter=adapter)]
    names += [*_CONFIGS, *IDENTITY_TOKENIZER_FILES]
    for file, name in () if adapter else referenced_weights(folder):
        names += [file, name]
    return {name: _stamp(folder / name) for name in names}


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _contents(folder: Path, *, adapter: bool) -> Iterator[tuple[str, str]]:
    """Yield the configs and the indices that map weights to files, with their hashes."""
    named = (
        [ADAPTER_CONFIG]
        if adapter
        else [*_CONFIGS, *(file for file, _ in referenced_weights(folder))]
    )
    for name in dict.fromkeys(named):
        path = folder / name
        if os.path.isfile(path):
            yield name, sha256(path.read_bytes()).hexdigest()


def _tokenizer(folder: Path) -> Mapping[str, str]:
    files = [folder / name for name in IDENTITY_TOKENIZER_FILES]
    return {p.name: sha256(p.read_bytes()).hexdigest() for p in files if os.path.isfile(p)}


def json_digest(parts: object) -> str:
    """Return the SHA-256 of a value as JSON with sorted names and no white space."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(text.encode()).hexdigest()
