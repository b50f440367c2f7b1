# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Models from folders, from the hub's cache or from Python: loaded, taken apart, verified."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mechdsl import zoo
from mechdsl.base.garbage import uncollected
from mechdsl.base.source import Source, Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import (
    LoadFailed,
    NotATextModel,
    NoTokenizer,
    NoWeights,
    OtherLayers,
    QuantizedModel,
)
from mechdsl.diagnostics.w07_models import WeightsUnused
from mechdsl.hooks.hook_points import at_hand
from mechdsl.hooks.loaded import LoadedModel
from mechdsl.loading.peft_models import outside_of_modules, unwrapped
from mechdsl.loading.proof_store import Notes, Proofs
from mechdsl.loading.prove import text_of
from mechdsl.loading.towers import take_any_apart
from mechdsl.models.identity import Hashed, file_hash, identity_of_folder, stamps, weights_hash
from mechdsl.models.locate import locate, missing_weights, needed, weight_files
from mechdsl.models.shape import ModelShape
from mechdsl.models.shape_from_config import read_config, read_shape, shape_from_config, shape_of
from mechdsl.program import spec
from mechdsl.prompts.image_reader import ImageReader, reader_of
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.towers_read import read_towers, with_texts

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load(
    model: spec.Model,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    base: Path | None = None,
    spread: Mapping[str, object] | None = None,
    hashed: Hashed | None = file_hash,
    notes: Notes | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Load, take apart and verify the model of a `model` statement, without the network.

    dtype: overrides the statement's. base: folder that relative paths start from, by default that
    of the statement's file. spread: arguments for the library (`device_map`) that say where weights
    go, in place of `device`. hashed: SHA-256 of a file, None to hash no weights. notes:
    where outcomes of the self-check are kept, besides the user's cache. Gives E0401, E0403 to
    E0411, E0508, E0522 and W0711.
    """
    folder, found = locate(model, model.span.source.folder if base is None else base)
    if folder is None:
        return None, needed(found)
    missing = missing_weights(folder, model)
    if missing is not None:
        return None, [missing]
    files = weight_files(folder)
    before = stamps(model, folder)
    shape, found = read_shape(folder, model=model.name, span=model.span)
    if shape is None:
        return None, found
    tokenizer, found = _reader(folder, shape, model)
    if tokenizer is None:
        return None, found
    module, reason, untaken = _from_folder(
        folder, shape.architecture, _DTYPES[dtype or model.dtype], spread or {}
    )
    if module is None:
        return None, [LoadFailed(span=model.span, model=model.name, reason=reason)]
    more = _more_blocks(module, untaken)
    if more is not None:
        blocks, there, key = more
        problem = OtherLayers(span=model.span, model=model.name, blocks=blocks, more=there, key=key)
        return None, [problem]
    unused = _unused(folder, files, untaken, model)
    shape = _filled(module, shape)
    provenance = {
        **hash_of_weights(files, hashed),
        "source": model.source,
        "revision": _revision(folder, model),
        "tokenizer": tokenizer.hash,
    }
    module = module if spread else module.to(device)
    loaded, found = take_any_apart(
        model.name,
        module,
        shape,
        tokenizer,
        provenance=provenance,
        span=model.span,
        proofs=None if spread else Proofs(notes),
    )
    if loaded is not None and hashed is not None:
        loaded = replace(loaded, identity=identity_of_folder(model, folder, hashed))
    if stamps(model, folder) != before:
        return None, [changed_meanwhile(model)]
    return loaded, [*unused, *found]


def hash_of_weights(files: list[Path], hashed: Hashed | None) -> dict[str, str]:
    """The hash of the weights as a part of a model's provenance; nothing where none is made."""
    return {} if hashed is None else {"weights": weights_hash(files, hashed)}


def _reader(
    folder: Path, shape: ModelShape, model: spec.Model
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    """The tokenizer, or what makes images ready."""
    if shape.patches is not None:
        return read_towers(folder, shape, model)
    return TextTokenizer.from_folder(folder, model.bos, span=model.span)


def changed_meanwhile(model: spec.Model) -> Diagnostic:
    """E0411: what was loaded may be neither what the files held nor what they hold, and a hash of
    them would say nothing of it."""
    return LoadFailed(
        span=model.span,
        model=model.name,
        reason="its files changed while they were read",
        hint="run it again when they are written",
    )


def adopt(
    name: str,
    module: nn.Module,
    tokenizer: Any,
    *,
    bos: bool | None = None,
    span: Span | None = None,
    provenance: Mapping[str, str] | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Take over a model that Python holds already; it is put into eval mode, and not moved.

    tokenizer: a fast tokenizer of transformers, a `tokenizers.Tokenizer` or a `TextTokenizer`; of a
    model of images its image processor.
    provenance: where it comes from, if from elsewhere than a call from Python.
    Gives E0407 to E0412, E0451, E0456, E0522, W0711 and W0712.
    """
    images, texts = _two(tokenizer)
    processor = _processor(images)
    text, found = None, []
    if processor is None:
        text, found = _adopt_tokenizer(name, tokenizer, bos, span)
        if text is None:
            return None, found
    if (outside := outside_of_modules(module, name, span)) is not None:
        return None, [outside]
    module = unwrapped(module)
    if (quantized := _quantized(module)) is not None:
        part, kind = quantized
        return None, [QuantizedModel(span=span, model=name, part=part, kind=kind)]
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        it = "" if isinstance(cast(object, module), nn.Module) else type(module).__name__
        reason = f"`{it}` is no model of transformers" if it else "it has no transformers config"
        return None, [LoadFailed(span=span, model=name, reason=reason)]
    values: dict[str, Any] = dict(cast(Any, config).to_dict())
    values["architectures"] = [type(module).__name__]
    shape, found = shape_from_config(values, model=name, span=span)
    if shape is None:
        return None, found
    if text is None:
        text, found = _adopt_processor(name, processor, shape, images, span)
        if text is not None and shape.texts is not None:
            text, found = _adopt_texts(name, cast(ImageReader, text), texts, shape.texts, bos, span)
        if text is None:
            return None, found
    try:
        weights = _hash_parameters(module)
    except ValueError as error:
        return None, [LoadFailed(span=span, model=name, reason=str(error))]
    provenance = {
        "weights": weights,
        "source": "handed over from Python",
        "tokenizer": text.hash,
        **(provenance or {}),
    }
    return take_any_apart(name, module, shape, text, provenance=provenance, span=span)


def look(name: str) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Take a model apart that no file names: of the zoo, of a folder, of the cache. It needs no
    tokenizer, and may take anything: images, audio, two texts.

    Gives E0401, E0403 to E0406, E0408 to E0411, W0711 and W0712.
    """
    kind = "local" if Path(name).is_dir() else "hf" if "/" in name else "zoo"
    kind = "zoo" if name in zoo.zoo_models() else kind
    text = f'{kind}("{name}")'
    span = Span(Source(text, Path(name)), 0, len(text))
    statement = spec.Model(span=span, name=name, kind=kind, path=name)
    folder, found = locate(statement, Path.cwd())
    if folder is None:
        return None, needed(found)
    files = weight_files(folder)
    if not files:
        advice = "a folder with a `config.json` and safetensors is needed"
        return None, [NoWeights(span=span, model=name, advice=advice)]
    config, found = read_config(folder, model=name, span=span)
    if config is None:
        return None, found
    shape, found = shape_of(config, model=name, span=span)
    if shape is None:
        return None, found
    module, reason, _ = _from_folder(folder, shape.architecture, torch.float32)
    if module is None:
        return None, [LoadFailed(span=span, model=name, reason=reason)]
    shape = _filled(module, shape)
    return take_any_apart(
        name, module, shape, None, provenance={"source": text}, span=span, proofs=Proofs()
    )


def _filled(module: nn.Module, shape: ModelShape) -> ModelShape:
    """The shape by the config as the library has it: files leave out what its class takes for
    granted, and some have names of another time."""
    values: dict[str, Any] = dict(cast(Any, module).config.to_dict())
    values["architectures"] = [type(module).__name__]
    return shape_from_config(values)[0] or shape


def _revision(folder: Path, model: spec.Model) -> str:
    """The commit of a snapshot in the cache, else the revision as written."""
    return folder.name if folder.parent.name == "snapshots" else model.revision or ""


# --- loading ------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Generator[None]:
    """Nothing that libraries say on import or while loading reaches the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sink = io.StringIO()
    with warnings.catch_warnings(), redirect_stderr(sink), redirect_stdout(sink):
        warnings.simplefilter("ignore")
        from transformers.utils import logging

        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity(CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


def import_library() -> None:
    """Import what models of every architecture need, which is nearly all that loading imports."""
    with uncollected(), quiet():
        import_module("transformers.modeling_utils")


def _from_folder(
    folder: Path,
    architecture: str,
    dtype: torch.dtype,
    spread: Mapping[str, object] | None = None,
) -> tuple[nn.Module | None, str, list[str]]:
    """The model, or why it can't be loaded; and weights that nothing of it takes. Those that the
    files lack are a reason."""
    import_library()
    with quiet():
        import transformers

        # As the config names it, so that a masked language model isn't loaded as another one.
        made: Any = getattr(transformers, architecture, None)
        if not hasattr(made, "from_pretrained"):
            made = transformers.AutoModelForCausalLM
        try:
            loaded: Any = made.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,  # else a question is asked on the terminal
                local_files_only=True,
                output_loading_info=True,
                **(spread or {}),
            )
        except Exception as error:  # transformers raises whatever its parts raise
            return None, text_of(error), []
    module, info = cast("tuple[nn.Module, Mapping[str, Any]]", loaded)
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    if missing:
        return None, f"the weights lack `{missing[0]}` and {len(missing) - 1} more", []
    return module, "", sorted(str(key) for key in info.get("unexpected_keys", ()))


def _more_blocks(module: nn.Module, untaken: list[str]) -> tuple[int, int, str] | None:
    """(blocks that the model has, blocks that its weights have, one of the keys behind them) where
    the weights are those of a deeper model; None where they aren't."""
    taken = list(module.state_dict())
    for key in reversed(untaken):
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", f".{key}"):
            start, end = number.start() - 1, number.end() - 1
            alike = re.compile(rf"(.*\.)?{re.escape(key[:start])}(\d+){re.escape(key[end:])}")
            blocks = {int(found[2]) for each in taken if (found := alike.fullmatch(each))}
            if blocks and int(key[start:end]) > max(blocks):
                return max(blocks) + 1, int(key[start:end]) + 1, key
    return None


def _unused(
    folder: Path, files: list[Path], untaken: list[str], model: spec.Model
) -> list[Diagnostic]:
    """W0761 for weights that nothing takes, and for files of weights that aren't read."""
    index = folder / "model.safetensors.index.json"
    read = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        read = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    aside = [path.name for path in files if path.name not in read]
    said = [("nothing takes", untaken)] if untaken else []
    said += [("nothing reads the file", aside)] if aside else []
    return [
        WeightsUnused(
            span=model.span,
            model=model.name,
            what=f"{how} `{names[0]}`" + (f" and {len(names) - 1} more" if names[1:] else ""),
        )
        for how, names in said
    ]


def _quantized(module: Any) -> tuple[str, str] | None:
    """A part that torch has quantized, and its class; None where there is none."""
    parts = module.named_modules() if isinstance(module, nn.Module) else ()
    for path, part in parts:
        home = type(part).__module__
        if home.startswith("torch.") and ".quantized" in home:
            return path, f"{home.removeprefix('torch.ao.')}.{type(part).__name__}"
    return None


def _adopt_tokenizer(
    name: str, tokenizer: Any, bos: bool | None, span: Span | None
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    if isinstance(tokenizer, TextTokenizer):
        return tokenizer, []
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        reason = f"`{type(tokenizer).__name__}` is not a fast tokenizer"
        return None, [NoTokenizer(span=span, model=name, reason=reason)]
    roles = {
        f"{role}_token": getattr(tokenizer, f"{role}_token", None)
        for role in ("bos", "cls", "sep", "eos")
    }
    chat = getattr(tokenizer, "chat_template", None)
    pad = getattr(tokenizer, "pad_token", None)
    return TextTokenizer.from_backend(
        backend, **roles, pad_token=pad, chat_template=chat, bos=bos, span=span
    )


def _processor(given: Any) -> dict[str, Any] | None:
    """What an image processor of transformers is; None where that is something else."""
    if isinstance(given, TextTokenizer | Tokenizer) or not hasattr(given, "to_dict"):
        return None
    found: Any = given.to_dict()
    return found if isinstance(found, dict) and "image_processor_type" in found else None


def _two(given: Any) -> tuple[Any, Any]:
    """What makes images ready and the tokenizer, of a processor that holds both, or of a pair."""
    if isinstance(given, tuple) and len(cast("tuple[Any, ...]", given)) == 2:
        return cast("tuple[Any, Any]", given)
    images = getattr(given, "image_processor", None)
    return (given, None) if images is None else (images, getattr(given, "tokenizer", None))


def _adopt_texts(
    name: str,
    reader: ImageReader,
    tokenizer: Any,
    shape: ModelShape,
    bos: bool | None,
    span: Span | None,
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    if tokenizer is None:
        reason = "it was handed over with an image processor alone, and has a tower for texts"
        hint = f'hand over both: `models={{"{name}": (model, (image_processor, tokenizer))}}`'
        return None, [NoTokenizer(span=span, model=name, reason=reason, hint=hint)]
    own, found = _adopt_tokenizer(name, tokenizer, bos, span)
    if own is None:
        return None, found
    return with_texts(reader, own, shape, model=name, span=span)


def _adopt_processor(
    name: str,
    processor: dict[str, Any] | None,
    shape: ModelShape,
    given: Any,
    span: Span | None,
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    if shape.takes != "image":
        reason = f"`{type(given).__name__}` is not a fast tokenizer"
        return None, [NoTokenizer(span=span, model=name, reason=reason)]
    if shape.patches is None:
        return None, [NotATextModel(span=span, model=name, architecture=shape.architecture)]
    return reader_of(processor, shape.patches, model=name, span=span)


def _hash_parameters(module: nn.Module) -> str:
    """SHA-256 over names and bytes of parameters and buffers; ValueError where one has none."""
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        here = _fetched(module, name) if tensor.is_meta else tensor
        flat = here.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fetched(module: nn.Module, name: str) -> Tensor:
    """A weight that accelerate keeps elsewhere; ValueError where there is none."""
    path, _, own = name.rpartition(".")
    part = module.get_submodule(path)
    with at_hand(part):
        weight = cast(Tensor, getattr(part, own))
    if weight.is_meta:
        raise ValueError(f"`{name}` is on the meta device, where there are no values")
    return weight
