"""Where a model lies on this machine, found without the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from mechdsl import zoo
from mechdsl.base.hub_cache import cached
from mechdsl.base.json_text import load_json
from mechdsl.base.names import name_list
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import did_you_mean
from mechdsl.diagnostics.e04_model import (
    AdapterFolder,
    ModelNotFound,
    NoConfig,
    NoWeights,
    PickledWeights,
    UnknownZooModel,
)
from mechdsl.diagnostics.w07_models import ModelNotHere
from mechdsl.models.folder_files import refused_file
from mechdsl.program.named_paths import HF, LOCAL, path_to_read
from mechdsl.program.spec import Model

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""As peft calls them."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
"""Pickles that a trainer leaves beside a model."""


def locate(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    """The folder with the model's `config.json`.

    `base` is the folder that relative paths start from, the `.mech` file's. Gives E0403, E0404,
    E0405, E0431 to E0433, E0440, E0532, E0535, and W0710 for a model that isn't there, which
    `needed` makes E0401.
    """
    match model.kind:
        case "zoo":
            return _zoo(model)
        case "local":
            return _local(model, base)
        case "hf":
            return _hub(model, base)
        case "python":
            raise ValueError("a model that a function makes lies in no folder")


def weight_files(folder: Path, *, adapter: bool = False) -> list[Path]:
    """The safetensors files of a model folder, in order of their names; of an adapter its one."""
    return sorted(folder.glob(ADAPTER_WEIGHTS if adapter else "*.safetensors"))


def missing_weights(folder: Path, model: Model) -> Diagnostic | None:
    """E0406 for a folder of a model, or of an adapter, that has no weights."""
    adapter = model.base is not None
    if weight_files(folder, adapter=adapter):
        return None
    if adapter:
        advice = "copy it there; peft writes it with `save_pretrained`"
        what = f"`{ADAPTER_WEIGHTS}`"
        return NoWeights(
            span=model.span, model=model.name, what=what, config=ADAPTER, advice=advice
        )
    hub = model.kind == "hf"
    advice = f"`hf download {model.path}` fetches them" if hub else "copy them there"
    return NoWeights(span=model.span, model=model.name, advice=advice)


def without_weights(models: Iterable[Model]) -> list[Diagnostic]:
    """E0406 for models whose folders are on this machine without weights: all but running works."""
    folders = (
        (model, locate(model, model.span.source.folder)[0])
        for model in models
        if model.kind != "python"
    )
    found = (missing_weights(folder, model) for model, folder in folders if folder is not None)
    return [each for each in found if each is not None]


def _zoo(model: Model) -> tuple[Path | None, list[Diagnostic]]:
    known = zoo.zoo_models()
    if model.path not in known:
        names = name_list(known)
        advice = did_you_mean(model.path, known, f"it has {names}")
        return None, [UnknownZooModel(span=model.span, path=model.path, advice=advice)]
    return _checked(Path(zoo.__path__[0]) / model.path, model, by_name=True)


def _local(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    folder, problems = path_to_read(LOCAL, model.path, model.span, base=base)
    if folder is None:
        return None, problems
    if not os.path.isdir(folder):  # which, unlike `Path.is_dir`, takes any name
        return None, [
            ModelNotHere(
                span=model.span,
                model=model.name,
                path=model.path,
                place="the folder of the file",
                advice="write the path from the `.mech` file to the model's folder",
            )
        ]
    return _checked(folder, model)


def _hub(model: Model, base: Path) -> tuple[Path | None, list[Diagnostic]]:
    folder, problems = path_to_read(HF, model.path, model.span, base=base)
    if folder is None:
        return None, problems
    if any(map(os.path.isfile, _configs(folder))):
        return _checked(folder, model)
    snapshot = cached(model.path, model.revision)
    if snapshot is not None and any(map(os.path.isfile, _configs(snapshot))):
        return _checked(snapshot, model, by_name=True)
    return None, [
        ModelNotHere(
            span=model.span,
            model=model.name,
            path=model.path,
            place="the Hugging Face cache",
            advice=f"`hf download {model.path}` fetches it",
        )
    ]


def needed(found: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The same where the model has to be there: what is a warning of a file that is only checked is
    E0401."""
    return [_error(each) if isinstance(each, ModelNotHere) else each for each in found]


def _error(missing: ModelNotHere) -> ModelNotFound:
    return ModelNotFound(
        span=missing.span,
        model=missing.model,
        path=missing.path,
        place=missing.place,
        advice=f"{missing.advice}; without it nothing can be planned or run. From Python it can be "
        f'handed over: `models={{"{missing.model}": (model, tokenizer)}}`',
    )


def _checked(
    folder: Path, model: Model, *, by_name: bool = False
) -> tuple[Path | None, list[Diagnostic]]:
    refused = refused_file(folder, model, by_name=by_name)
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
    """What a model and an adapter are known by."""
    return folder / "config.json", folder / ADAPTER


def _not_a_model(folder: Path, model: Model) -> Diagnostic | None:
    """E0404 or E0440 for a folder that holds no model, or one with an adapter beside it: the
    library would put that on the model where peft is installed."""
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
            beside="and a model too",
            files="and a `config.json` beside it",
            hint="put the files of the adapter, whose names begin with `adapter_`, into a folder "
            'of their own: `model tuned = local("adapter", base: m)` reads it from there',
        )
    name = model.name if model.name.isidentifier() else "tuned"  # a folder's, of `mechdsl sites`
    here = named.startswith(("/", ".", "~")) or "\\" in named
    line = f'model m = {"local" if here else "hf"}("{named or "…"}")'
    return AdapterFolder(
        span=model.span,
        path=model.path,
        base=of,
        hint=f'write `model {name} = {model.kind}("{model.path}", base: m)`, with a line for '
        f"the model that it was trained on: `{line}`",
    )


def _not_an_adapter(folder: Path, model: Model) -> Diagnostic | None:
    """E0404 for a folder that is to be an adapter, and isn't one."""
    config, adapter = map(os.path.isfile, _configs(folder))
    if adapter:
        return None
    reason, hint = f"no such file in `{model.path}`", "point at a folder that peft wrote"
    if config:
        reason, hint = "it has a `config.json`: it is a model, and no adapter", "leave `base:` out"
    return NoConfig(span=model.span, model=model.name, reason=reason, file=ADAPTER, hint=hint)


def _base_of(folder: Path) -> str:
    """The model that an adapter was trained on, as its config says; empty where it doesn't."""
    try:
        config = load_json((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return named if isinstance(named, str) else ""
