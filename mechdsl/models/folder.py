"""Folders of models and LoRA adapters: found without the network, checked and identified."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, cast

from mechdsl import zoo
from mechdsl.base import limits
from mechdsl.base.files import find_snapshot, load_json, special_file_kind
from mechdsl.base.limits import is_integer, is_number
from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.files import ReadOutsideFolder, SpecialFile
from mechdsl.diagnostics.models import (
    AdapterConfig,
    AdapterDoesNotFit,
    AdapterFolder,
    BaseModelMismatch,
    ModelFileTooLarge,
    ModelNotFound,
    ModelNotLocal,
    ModelRunsCode,
    NoConfig,
    NoWeights,
    OtherAdapter,
    PickledWeights,
    UnknownZooModel,
    WeightsElsewhere,
)
from mechdsl.models.config import read_config
from mechdsl.models.shape import ModelShape
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


PROMPT_ADAPTERS = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
    }
)
"""Types of peft that prepend vectors to the model's input and leave its weights unchanged."""

PROMPT_ADAPTER_REASON = "prepends its own vectors to the model's input"
"""Description of their effect."""

_PASSED_OVER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "modules_to_save",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Keys about training, or about facts that the weights show."""

_SWITCHES = ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias")

_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights unchanged."""

_CLASSIFIERS = {
    "SEQ_CLS": ("classifies prompts", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("classifies each token", "AutoModelForTokenClassification"),
}
"""`task_type` → the model's task, and the library's class for it."""

_PATTERN = re.compile(r"\^?[\w.]+\$?")
"""Paths of modules. Other regular expressions may take exponential time."""


@dataclass(frozen=True)
class AdapterScaling:
    """The scaling of an adapter's weights, with peft's names."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    switches: Mapping[str, bool] = field(default_factory=dict[str, bool])


def read_scaling(folder: Path, model: Model) -> tuple[AdapterScaling | None, list[Diagnostic]]:
    """Read the weight scaling from an adapter's config; None if a setting isn't supported.

    Codes: E0404, E0451, E0452.
    """
    config, problems = read_config(folder, name=ADAPTER_CONFIG, model=model.name, span=model.span)
    if config is None:
        return None, problems
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        return None, [_other(kind, model)]
    refused = next(_refused_entries(config, model), None)
    if refused is not None:
        return None, [refused]
    return AdapterScaling(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        switches={key: bool(config.get(key)) for key in _SWITCHES},
    ), []


def check_base_model(folder: Path, model: Model, base: Model) -> list[Diagnostic]:
    """Return W0773 if the folder names a model other than the base.

    There is no warning if the folder names no model, or if the base comes from Python (from a
    function or passed in).
    """
    config, _ = read_config(folder, name=ADAPTER_CONFIG)
    trained = (config or {}).get("base_model_name_or_path")
    if not isinstance(trained, str) or not trained or base.kind == "python" or not base.path:
        return []
    if _name(trained) == _name(base.path):
        return []
    return [
        BaseModelMismatch(
            span=model.span,
            model=model.name,
            trained=trained,
            base=base.name,
            given=f"`{base.source}`",
        )
    ]


def check_adapter_task(
    folder: Path, model: Model, base: Model, shape: ModelShape
) -> list[Diagnostic]:
    """Return E0453 if the adapter is a classifier's and the base isn't such a classifier."""
    config, _ = read_config(folder, name=ADAPTER_CONFIG)
    task = (config or {}).get("task_type")
    if not isinstance(task, str) or task not in _CLASSIFIERS or shape.stands_in:
        return []
    what, class_name = _CLASSIFIERS[task]
    of = "each token" if shape.output_at == "every token" else "prompts"
    given = "predicts tokens" if shape.task == "tokens" else f"classifies {of}"
    if given == what:
        return []
    path = base.path if base.path and base.kind in ("hf", "local") else "…"
    made = f'`{class_name}.from_pretrained("{path}", num_labels=…)`'
    return [
        AdapterDoesNotFit(
            span=model.span,
            model=model.name,
            base=base.name,
            reason=f"its `task_type` is {task}: its base {what}, but `{base.name}` {given}",
            hint=f"use {made} as the base, whose head the adapter replaces: saved as a "
            f'folder, or returned by a function, `model {base.name} = python("own.py:build")`',
        )
    ]


def _name(path: str) -> str:
    """Return a model's name without its location.

    `gpt2` for `openai/gpt2`, `models/gpt2` and a snapshot in the library's cache.
    """
    parts = PurePath(path.replace("\\", "/")).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else (parts or ("",))[-1]
    return last.casefold()


def _other(kind: str, model: Model) -> Diagnostic:
    reads = kind in PROMPT_ADAPTERS
    merge = (
        f'`PeftModel.from_pretrained(base, "{model.path}").merge_and_unload()'
        '.save_pretrained("merged")`'
    )
    return OtherAdapter(
        span=model.span,
        model=model.name,
        kind=f"`{kind[:40]}`",
        what=PROMPT_ADAPTER_REASON if reads else "isn't read from a folder",
        reason=f"by its `{ADAPTER_CONFIG}`; only LoRA adapters are supported",
        hint="rules act on tokens of prompts, to which it adds tokens: use an adapter of weights "
        "(LoRA)"
        if reads
        else f"merge it in Python and load the saved model, if peft supports that: {merge}",
    )


def _refused_entries(config: Mapping[str, Any], model: Model) -> Iterator[Diagnostic]:
    """Yield E0452 for the entries that aren't supported."""
    merge = "merge it in Python and load the saved model"

    def refuse(key: str, reason: str, hint: str) -> AdapterConfig:
        value = json.dumps(config[key])
        shown = value if len(value) <= 60 else f"{value[:59]}…"
        return AdapterConfig(
            span=model.span, model=model.name, key=key, value=shown, reason=reason, hint=hint
        )

    for key, value in config.items():
        if key in _PASSED_OVER:
            continue
        wrong = _WRONG.get(key)
        if wrong is not None:
            reason = wrong(value)
            if reason is not None:
                yield refuse(key, reason, f"correct it in `{model.path}/{ADAPTER_CONFIG}`")
        elif key == "init_lora_weights":
            if value not in _STARTS:
                reason = "such an adapter has changed the weights of its base before training"
                yield refuse(key, reason, f"convert it to plain LoRA with peft, or {merge}")
        elif value:
            yield refuse(key, "it changes the adapter's computation and isn't supported", merge)


def _rank(value: Any) -> str | None:
    return None if is_integer(value, least=1) else "a rank is a whole number above 0"


def _number(value: Any) -> str | None:
    return None if is_number(value) and abs(value) < 1e6 else "an adapter can't have this number"


def _switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it is true or false"


def _pattern(value: Any) -> str | None:
    entries = cast("Mapping[Any, Any]", value if value is not None else {})
    if not isinstance(value, Mapping | None):
        return "it must be a mapping from modules to numbers"
    if any(not isinstance(key, str) or not _PATTERN.fullmatch(key) for key in entries):
        return "only names and paths of modules are supported, not other patterns"
    return next((_number(entry) for entry in entries.values() if _number(entry)), None)


def _ranks(value: Any) -> str | None:
    wrong = _pattern(value)
    return wrong or next((_rank(each) for each in (value or {}).values() if _rank(each)), None)


def _biases(value: Any) -> str | None:
    known = ("none", "all", "lora_only")
    return None if value in known else f"it is one of {', '.join(known)}"


_WRONG = {
    "r": _rank,
    "lora_alpha": _number,
    "rank_pattern": _ranks,
    "alpha_pattern": _pattern,
    "bias": _biases,
    **dict.fromkeys(_SWITCHES, _switch),
}
"""Validators of the entries that are used: the error of a value, or None."""
