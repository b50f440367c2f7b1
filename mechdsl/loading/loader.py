"""Loading of models from folders, the hub's cache, adapters or Python."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from logging import CRITICAL
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mechdsl import zoo
from mechdsl.base.runtime import pause_garbage_collection
from mechdsl.base.text import Source, Span, name_list
from mechdsl.checks.file_check import CheckedFile
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import (
    AdapterDoesNotFit,
    IdentityBroken,
    LayerCountMismatch,
    LoadFailed,
    NoPeft,
    NotATextModel,
    NoTokenizer,
    NotRestartable,
    NoWeights,
    QuantizedModel,
    SingleOutput,
    StackSkipped,
    UnusedWeights,
)
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.forward.hooks.circuits import (
    explain_no_circuits,
    explain_no_features,
    explain_no_neurons,
)
from mechdsl.forward.hooks.model import (
    BASE_PREFIX,
    PYTHON_PREFIX,
    LoadedModel,
    explain_block_mismatch,
)
from mechdsl.forward.hooks.module_exchange import load_weights
from mechdsl.forward.hooks.weight_maps import NoLinearMap, WeightMaps, find_nonlinear_norm
from mechdsl.forward.packed.unembedding import ModelUnembedding
from mechdsl.loading import devices
from mechdsl.loading.anatomy_proof import (
    NoteStore,
    ProcessProofStore,
    ProofStore,
    attach_other_tower,
    check_adapters,
    has_adapters,
    prove_anatomy,
    prove_any_anatomy,
    summarize_error,
    unwrap_model,
)
from mechdsl.loading.identity import compute_identity, digest_module
from mechdsl.loading.weight_edits import (
    NotCopied,
    WeightEdit,
    build_edited_model,
    build_sum,
    copy_modules,
    explain_projection,
    find_output_map,
)
from mechdsl.models.adapter_folder import AdapterScaling, read_scaling
from mechdsl.models.config import (
    add_generation_defaults,
    check_starts,
    read_config,
    read_shape,
    shape_from_config,
    shape_of_folder_config,
)
from mechdsl.models.folder import (
    ADAPTER_CONFIG,
    FileHasher,
    check_weights,
    file_stamps,
    folder_identity,
    hash_file,
    hash_weights,
    locate_model,
    require_model,
    weight_files,
)
from mechdsl.models.shape import ModelShape, required_stacks
from mechdsl.program import spec
from mechdsl.program.python_functions import PythonFailure, PythonFunction
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer, read_prompt_tokenizer
from mechdsl.prompts.tokens.tokenizer import (
    ImageTokenizer,
    TextTokenizer,
    has_tokenizer,
    make_image_tokenizer,
)
from mechdsl.resolve.bases import MAPPED_SITES, WeightChange
from mechdsl.resolve.conflicts import PROJECT_OUT_OF_WEIGHTS
from mechdsl.resolve.expansion import expand_controls
from mechdsl.resolve.measures import check_readable
from mechdsl.resolve.model_pairs import attach_tokenizer, read_tower_inputs, reads_outputs
from mechdsl.resolve.observations import Observation, RowSetObservation
from mechdsl.resolve.sites import find_missing_point
from mechdsl.resolve.types import ModelContext, ResolvedExperiment, ResolvedRule
from mechdsl.vocab.sites import SITES

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    model: spec.Model,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    base: Path | None = None,
    spread: Mapping[str, object] | None = None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Load, analyze and verify the model of a `model` statement, without network access.

    Args:
        device: Device of the weights.
        dtype: Replaces the statement's dtype.
        base: Folder for relative paths; default: that of the statement's file.
        spread: Arguments for the library (`device_map`) that place weights, instead of `device`.
        hashed: Returns the SHA-256 of a file; None to skip hashes of weights.
        notes: Store for self-check outcomes, in addition to the user's cache.

    Returns:
        The model and its diagnostics: E0401, E0403 to E0411, E0508, E0522 and W0711.
    """
    folder, problems = locate_model(model, model.span.source.folder if base is None else base)
    if folder is None:
        return None, require_model(problems)
    missing = check_weights(folder, model)
    if missing is not None:
        return None, [missing]
    files = weight_files(folder)
    before = file_stamps(model, folder)
    shape, problems = read_shape(folder, model=model.name, span=model.span)
    if shape is None:
        return None, problems
    tokenizer, problems = _load_reader(folder, shape, model)
    if tokenizer is None:
        return None, problems
    module, untaken, problems = _load_all_blocks(folder, shape, model, dtype, spread or {})
    if module is None:
        return None, problems
    loaded, problems = prove_any_anatomy(
        model.name,
        module if spread else module.to(device),
        _complete_shape(module, shape),
        tokenizer,
        provenance={
            **describe_weight_hash(files, hashed),
            "source": model.source,
            "revision": _revision(folder, model),
            "tokenizer": tokenizer.hash,
        },
        span=model.span,
        proofs=None if spread else ProofStore(notes),
    )
    loaded, problems = _without_shared_rows(loaded, problems, model.span)
    if loaded is not None and hashed is not None:
        loaded = replace(loaded, identity=folder_identity(model, folder, hashed))
    if file_stamps(model, folder) != before:
        return None, [report_changed_files(model)]
    return loaded, [*_report_unused_weights(folder, files, untaken, model), *problems]


def describe_weight_hash(files: list[Path], hashed: FileHasher | None) -> dict[str, str]:
    """Return the hash of the weights for a model's provenance; empty if hashes are skipped."""
    return {} if hashed is None else {"weights": hash_weights(files, hashed)}


def _load_reader(
    folder: Path, shape: ModelShape, model: spec.Model
) -> tuple[TextTokenizer | None, list[Diagnostic]]:
    """Load the tokenizer, or the image processor."""
    if shape.patches is not None:
        return read_tower_inputs(folder, shape, model)
    read = read_prompt_tokenizer if shape.has_processor else TextTokenizer.from_folder
    tokenizer, problems = read(folder, model.bos, span=model.span)
    return tokenizer and tokenizer.with_starts(shape.starts), problems


def report_changed_files(model: spec.Model) -> Diagnostic:
    """Report E0411: the loaded weights may match neither the old files nor the new ones.

    A hash of the files would then describe different weights.
    """
    return LoadFailed(
        span=model.span,
        model=model.name,
        reason="its files changed while they were read",
        hint="run it again when the files are complete",
    )


def adopt_model(
    name: str,
    module: nn.Module,
    tokenizer: Any,
    *,
    bos: bool | None = None,
    span: Span | None = None,
    provenance: Mapping[str, str] | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Adopt a model object from Python: it is put into eval mode, but not moved.

    Args:
        module: A transformers model.
        tokenizer: A fast tokenizer of transformers, a `tokenizers.Tokenizer` or a `TextTokenizer`;
            for a model of images, its image processor.
        bos: Whether prompts start with a BOS token; None for the tokenizer's default.
        span: Source of diagnostics.
        provenance: Origin of the model, if it isn't a call from Python.

    Returns:
        The model and its diagnostics: E0407 to E0412, E0451, E0456, E0522, W0711 and W0712.
    """
    passed = _PassedTokenizer(name, tokenizer, bos, span)
    text, problems = None, []
    if passed.processor is None:
        text, problems = passed.adopt(tokenizer)
        if text is None:
            return None, problems
    if (outside := check_adapters(module, name, span)) is not None:
        return None, [outside]
    module = unwrap_model(module)
    if (unfit := _check_passed_module(module, name, span)) is not None:
        return None, [unfit]
    shape, problems = shape_from_config(_config_values(module), model=name, span=span)
    if shape is None:
        return None, problems
    if (unstarted := check_starts(shape, name, span)) is not None:
        return None, [unstarted]
    if text is None or (shape.has_processor and isinstance(tokenizer, tuple)):
        text, problems = passed.adopt_processor(module, shape)
    if text is None:
        return None, problems
    text = text.with_starts(shape.starts)
    try:
        weights = _hash_parameters(module)
    except ValueError as error:
        return None, [LoadFailed(span=span, model=name, reason=str(error))]
    provenance = {
        "weights": weights,
        "source": "passed from Python",
        "tokenizer": text.hash,
        **(provenance or {}),
    }
    content = digest_module(module, weights)
    proofs = None if content is None else ProcessProofStore(content=content)
    loaded, problems = prove_any_anatomy(
        name, module, shape, text, provenance=provenance, span=span, proofs=proofs
    )
    return _without_shared_rows(loaded, problems, span)


def _without_shared_rows(
    model: LoadedModel | None, problems: list[Diagnostic], span: Span | None
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Replace an encoder-decoder by E0407 if its rows weren't proved to be independent."""
    if model is None or not model.shape.encodes_apart:
        return model, problems
    missing = sorted(required_stacks(model.shape) - model.others.keys())
    if missing:
        reason = f"the sites in its stack {name_list(missing)} are not available"
    elif not model.restartable and not model.shape.attends_to_image:
        reason = "the values of its tokens may depend on padding or on other prompts of a pass"
    else:
        return model, problems
    skipped = [
        diagnostic
        for diagnostic in problems
        if isinstance(diagnostic, StackSkipped) and diagnostic.stack in missing
    ]
    whole = [diagnostic for diagnostic in problems if isinstance(diagnostic, NotRestartable)]
    reason = ": ".join([reason, *(diagnostic.reason for diagnostic in (*skipped, *whole)[:1])])
    architecture = model.shape.architecture
    problem = NotATextModel(span=span, model=model.name, architecture=architecture, reason=reason)
    return None, [problem]


def inspect_model(name: str) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Analyze a model without a file's statement: from the zoo, a folder or the cache.

    It needs no tokenizer and may take any input: images, audio, two texts.

    Returns:
        The model and its diagnostics: E0401, E0403 to E0406, E0408 to E0411, W0711 and W0712.
    """
    kind = "local" if Path(name).is_dir() else "hf" if "/" in name else "zoo"
    kind = "zoo" if name in zoo.zoo_models() else kind
    text = f'{kind}("{name}")'
    span = Span(Source(text, Path(name)), 0, len(text))
    statement = spec.Model(span=span, name=name, kind=kind, path=name)
    folder, problems = locate_model(statement, Path.cwd())
    if folder is None:
        return None, require_model(problems)
    files = weight_files(folder)
    if not files:
        advice = "a folder with a `config.json` and safetensors is needed"
        return None, [NoWeights(span=span, model=name, advice=advice)]
    config, problems = read_config(folder, model=name, span=span)
    if config is None:
        return None, problems
    shape, problems = shape_of_folder_config(config, model=name, span=span)
    if shape is None:
        return None, problems
    module, reason, _ = _load_module(folder, shape.architecture, torch.float32)
    if module is None:
        return None, [LoadFailed(span=span, model=name, reason=reason)]
    shape = _complete_shape(module, shape)
    return prove_any_anatomy(
        name, module, shape, None, provenance={"source": text}, span=span, proofs=ProofStore()
    )


def _complete_shape(module: nn.Module, shape: ModelShape) -> ModelShape:
    """Complete the shape from the library's config.

    Files omit the class defaults, and some use outdated names.
    """
    model_shape = shape_from_config(_config_values(module))[0] or shape
    return (
        model_shape if model_shape.starts is not None else replace(model_shape, starts=shape.starts)
    )


def _config_values(module: Any) -> dict[str, Any]:
    """Return the library's config of a model, with the tokens that its decoder begins with."""
    values: dict[str, Any] = {**module.config.to_dict(), "architectures": [type(module).__name__]}
    generation = getattr(module, "generation_config", None)
    return values if generation is None else add_generation_defaults(values, generation.to_dict())


def _revision(folder: Path, model: spec.Model) -> str:
    """Return the commit of a snapshot in the cache, else the statement's revision."""
    return folder.name if folder.parent.name == "snapshots" else model.revision or ""


# --- loading ------------------------------------------------------------------------------------


@contextmanager
def silence_libraries() -> Generator[None]:
    """Suppress all output of libraries during import and loading."""
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
    """Import the modules for models of every architecture: most of what loading imports."""
    with pause_garbage_collection(), silence_libraries():
        import_module("transformers.modeling_utils")


def _load_module(
    folder: Path,
    architecture: str,
    dtype: torch.dtype,
    spread: Mapping[str, object] | None = None,
) -> tuple[nn.Module | None, str, list[str]]:
    """Load a model.

    Returns:
        The model, or the reason why it can't be loaded (weights that the files lack are one); and
        weights in the files that the model doesn't use.
    """
    import_library()
    with silence_libraries():
        import transformers

        # The class that the config names, so that a masked model isn't loaded as a different kind.
        made: Any = getattr(transformers, architecture, None)
        if not hasattr(made, "from_pretrained"):
            made = transformers.AutoModelForCausalLM
        try:
            loaded: Any = made.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,  # avoids a prompt on the terminal
                local_files_only=True,
                output_loading_info=True,
                **(spread or {}),
            )
        except Exception as error:  # transformers passes on errors of its dependencies
            return None, summarize_error(error), []
    module, info = cast("tuple[nn.Module, Mapping[str, Any]]", loaded)
    devices.name_outputs(module.modules())
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    if missing:
        return None, f"the weights lack `{missing[0]}` and {len(missing) - 1} more", []
    return module, "", sorted(str(key) for key in info.get("unexpected_keys", ()))


def _load_all_blocks(
    folder: Path,
    shape: ModelShape,
    model: spec.Model,
    dtype: str | None,
    spread: Mapping[str, object],
) -> tuple[nn.Module | None, list[str], list[Diagnostic]]:
    """Load the modules and check that they have as many blocks as the weights.

    Returns:
        The modules, None on an error; keys of unused weights; and E0411 or E0422.
    """
    module, reason, untaken = _load_module(
        folder, shape.architecture, _DTYPES[dtype or model.dtype], spread
    )
    if module is None:
        return None, [], [LoadFailed(span=model.span, model=model.name, reason=reason)]
    mismatch = _report_extra_blocks(module, untaken, model)
    return (module, untaken, []) if mismatch is None else (None, [], [mismatch])


def _report_extra_blocks(
    module: nn.Module, untaken: list[str], model: spec.Model
) -> Diagnostic | None:
    """Report E0422 for weights of a deeper model; untaken: keys of unused weights."""
    taken = list(module.state_dict())
    for key in reversed(untaken):
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", f".{key}"):
            start, end = number.start() - 1, number.end() - 1
            alike = re.compile(rf"(.*\.)?{re.escape(key[:start])}(\d+){re.escape(key[end:])}")
            blocks = {int(found[2]) for each in taken if (found := alike.fullmatch(each))}
            if blocks and int(key[start:end]) > max(blocks):
                return LayerCountMismatch(
                    span=model.span,
                    model=model.name,
                    blocks=max(blocks) + 1,
                    more=int(key[start:end]) + 1,
                    key=key,
                )
    return None


def _report_unused_weights(
    folder: Path, files: list[Path], untaken: list[str], model: spec.Model
) -> list[Diagnostic]:
    """Report W0761 for unused weights, and for weight files that aren't read."""
    index = folder / "model.safetensors.index.json"
    read = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file() and index.is_file():
        read = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    aside = [path.name for path in files if path.name not in read]
    said = [("nothing takes", untaken)] if untaken else []
    said += [("nothing reads the file", aside)] if aside else []
    return [
        UnusedWeights(
            span=model.span,
            model=model.name,
            what=f"{how} `{names[0]}`" + (f" and {len(names) - 1} more" if names[1:] else ""),
        )
        for how, names in said
    ]


def _check_passed_module(module: Any, name: str, span: Span | None) -> Diagnostic | None:
    """Report a model from Python that is quantized or that has no config of transformers."""
    if (quantized := _find_quantized(module)) is not None:
        part, kind = quantized
        return QuantizedModel(span=span, model=name, part=part, kind=kind)
    if hasattr(getattr(module, "config", None), "to_dict"):
        return None
    it = "" if isinstance(module, nn.Module) else type(module).__name__
    reason = f"`{it}` isn't a model of transformers" if it else "it has no transformers config"
    return LoadFailed(span=span, model=name, reason=reason)


def _find_quantized(module: Any) -> tuple[str, str] | None:
    """Find a module that torch has quantized: its path and class; None if there is none."""
    parts = module.named_modules() if isinstance(module, nn.Module) else ()
    for path, part in parts:
        home = type(part).__module__
        if home.startswith("torch.") and ".quantized" in home:
            return path, f"{home.removeprefix('torch.ao.')}.{type(part).__name__}"
    return None


def _describe_processor(given: Any) -> dict[str, Any] | None:
    """Return the settings of a transformers image processor or feature extractor; None for other
    objects."""
    if isinstance(given, TextTokenizer | Tokenizer) or not hasattr(given, "to_dict"):
        return None
    settings: Any = given.to_dict()
    types = ("image_processor_type", "feature_extractor_type")
    return (
        settings if isinstance(settings, dict) and any(each in settings for each in types) else None
    )


def _split_processor(given: Any) -> tuple[Any, Any]:
    """Split a processor, or a pair, into image processor or feature extractor, and tokenizer."""
    if isinstance(given, tuple) and len(cast("tuple[Any, ...]", given)) == 2:
        return cast("tuple[Any, Any]", given)
    images = getattr(given, "image_processor", None) or getattr(given, "feature_extractor", None)
    return (given, None) if images is None else (images, getattr(given, "tokenizer", None))


class _PassedTokenizer:
    """A tokenizer, image processor or both that Python passes with a model."""

    def __init__(self, name: str, given: Any, bos: bool | None, span: Span | None) -> None:
        """Split what was passed; bos: whether prompts start with a BOS token, None for default."""
        self.name = name
        self.given = given
        self.bos = bos
        self.span = span
        self.images, self.texts = _split_processor(given)
        self.processor = _describe_processor(self.images)
        """Settings of the image processor; None without one."""

    def adopt(
        self,
        tokenizer: Any,
        reader: type[TextTokenizer] = TextTokenizer,
        chat: object = None,
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Adopt a tokenizer of texts; chat: a template that replaces the tokenizer's."""
        if isinstance(tokenizer, TextTokenizer):
            return tokenizer, []
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            return None, [self._report(f"`{type(tokenizer).__name__}` is not a fast tokenizer")]
        roles = {
            f"{role}_token": getattr(tokenizer, f"{role}_token", None)
            for role in ("bos", "cls", "sep", "eos")
        }
        chat = chat or getattr(tokenizer, "chat_template", None)
        pad = getattr(tokenizer, "pad_token", None)
        text, problems = reader.from_backend(
            backend, **roles, pad_token=pad, chat_template=chat, bos=self.bos, span=self.span
        )
        if text is not None:
            text.passed = tokenizer
        return text, problems

    def adopt_processor(
        self, module: nn.Module, shape: ModelShape
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Adopt the image processor, with its tokenizer if the model reads texts too."""
        if shape.has_processor and isinstance(self.given, tuple):
            reason = "it was passed with an image processor and a tokenizer"
            hint = "pass the processor of transformers that contains both, such as `TrOCRProcessor`"
            return None, [self._report(reason, hint)]
        if shape.has_processor and self.texts is not None:
            chat = getattr(self.given, "chat_template", None)
            text, found = self.adopt(self.texts, ImagePromptTokenizer, chat)
            if isinstance(text, ImagePromptTokenizer):
                text = text.with_processor(self.given, getattr(module, "config", None))
            return text, found
        images, found = self._adopt_images(shape)
        if images is None or shape.texts is None:
            return images, found
        return self._add_texts(images, shape.texts)

    def _adopt_images(self, shape: ModelShape) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
        if shape.takes != "image":
            return None, [self._report(f"`{type(self.images).__name__}` is not a fast tokenizer")]
        if shape.patches is None:
            problem = NotATextModel(
                span=self.span, model=self.name, architecture=shape.architecture
            )
            return None, [problem]
        return make_image_tokenizer(self.processor, shape.patches, model=self.name, span=self.span)

    def _add_texts(
        self, images: ImageTokenizer, shape: ModelShape
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Add the tokenizer of the text tower, which has this shape."""
        if self.texts is None:
            reason = "it was passed with only an image processor, but it has a text tower"
            hint = f'pass both: `models={{"{self.name}": (model, (image_processor, tokenizer))}}`'
            return None, [self._report(reason, hint)]
        own, found = self.adopt(self.texts)
        if own is None:
            return None, found
        return attach_tokenizer(images, own, shape, model=self.name, span=self.span)

    def _report(self, reason: str, hint: str = "") -> NoTokenizer:
        problem = NoTokenizer(span=self.span, model=self.name, reason=reason)
        return replace(problem, hint=hint) if hint else problem


def _hash_parameters(module: nn.Module) -> str:
    """Hash names and bytes of parameters and buffers (SHA-256).

    Raises:
        ValueError: A tensor has no values.
    """
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        here = _fetch_weight(module, name) if tensor.is_meta else tensor
        flat = here.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fetch_weight(module: nn.Module, name: str) -> Tensor:
    """Fetch a weight that accelerate stores elsewhere.

    Raises:
        ValueError: The weight has no values.
    """
    path, _, own = name.rpartition(".")
    part = module.get_submodule(path)
    with load_weights(part):
        weight = cast(Tensor, getattr(part, own))
    if weight.is_meta:
        raise ValueError(f"`{name}` is on the meta device, which holds no values")
    return weight


_WEIGHT_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)"
    r"(?:\.lora_\w+(?:\.weight|\.bias)?|(?:\.base_layer)?\.(?P<whole>\w+))"
)
"""Key of a weight in the file: a LoRA matrix of a module, or a replacement of a parameter."""


class _AdapterMismatch(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def load_adapter(
    model: spec.Model, base: LoadedModel, hashed: FileHasher | None = hash_file
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Load the base model with an adapter's weights merged; the base itself is unchanged.

    Args:
        hashed: Returns the SHA-256 of a file; None to skip hashes of weights.

    Returns:
        The model and its diagnostics: E0401, E0404 to E0406, E0409 to E0411, E0451 to E0454, E0508,
        E0522 and W0711.
    """
    folder, problems = locate_model(model, model.span.source.folder)
    if folder is None:
        return None, require_model(problems)
    before = file_stamps(model, folder)
    scaling, problems = read_scaling(folder, model)
    if scaling is None:
        return None, problems
    missing = check_weights(folder, model)
    if missing is not None:
        return None, [missing]
    files = weight_files(folder, adapter=True)
    tokenizer = base.tokenizer
    if has_tokenizer(folder):
        bos = None if tokenizer is None else tokenizer.bos
        images = isinstance(tokenizer, ImagePromptTokenizer)
        read = read_prompt_tokenizer if images else TextTokenizer.from_folder
        tokenizer, problems = read(folder, bos, span=model.span)
        if tokenizer is None:
            return None, problems
    if find_spec("peft") is None:
        return None, [NoPeft(span=model.span, model=model.name, base=base.name)]
    try:
        module = _merge_adapter(base.module, files[0], scaling)
    except Exception as error:  # peft and safetensors pass on errors of their dependencies
        return None, [_report_not_merged(error, model, base)]
    identity = None
    if hashed is not None:
        identity = folder_identity(model, folder, hashed, base=compute_identity(base))
    loaded, problems = prove_anatomy(
        model.name,
        module,
        base.shape,
        tokenizer,
        provenance={
            **describe_weight_hash(files, hashed),
            "source": f"{model.source}, merged by peft {version('peft')}",
            "tokenizer": "" if tokenizer is None else tokenizer.hash,
            **base.made_of,
            f"{BASE_PREFIX}{base.name}": base.provenance.get("weights", ""),
        },
        span=model.span,
        proofs=None if identity is None else ProofStore(content=identity),
    )
    if loaded is not None:
        loaded = replace(loaded, identity=identity)
    if file_stamps(model, folder) != before:
        return None, [report_changed_files(model)]
    return loaded, problems


def _report_not_merged(error: Exception, model: spec.Model, base: LoadedModel) -> Diagnostic:
    if isinstance(error, _AdapterMismatch):
        hint = error.hint or f"name the model that it was trained on, instead of `{base.name}`"
        return AdapterDoesNotFit(
            span=model.span, model=model.name, base=base.name, reason=str(error), hint=hint
        )
    hint = "it has to load and merge with `PeftModel.from_pretrained(base, folder)`"
    reason = summarize_error(error)
    return LoadFailed(span=model.span, model=model.name, reason=reason, hint=hint)


def _merge_adapter(base: nn.Module, file: Path, scaling: AdapterScaling) -> nn.Module:
    """Copy the base and merge the adapter's weights into the copy.

    Raises:
        _AdapterMismatch: The adapter doesn't fit; peft and safetensors raise errors too.
    """
    if any("_hf_hook" in part.__dict__ for part in base.modules()):
        reason = "the weights of the base are distributed over devices, memory or a folder"
        raise _AdapterMismatch(
            reason, "merge it in Python, save the result, and load it with `--offload`"
        )
    if has_adapters(base):
        hint = "merge that one first, with `merge_and_unload()`"
        raise _AdapterMismatch("the base itself has an unmerged adapter", hint)
    import_library()
    with silence_libraries():
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        weights = load_file(file)
        matched = _match_weights(weights, base)
        try:
            copy = copy_modules(base, {path for path, _ in matched.values()})
        except NotCopied as problem:
            hint = "merge it in Python with `merge_and_unload()`, and pass the result"
            raise _AdapterMismatch(str(problem), hint) from None
        for key, (path, whole) in matched.items():
            if whole:
                _put_parameter(copy.get_submodule(path), whole, weights[key], key)
        lora = {key: weights[key] for key, (_, whole) in matched.items() if not whole}
        if not lora:
            return copy
        settings: dict[str, Any] = {
            "target_modules": sorted({matched[key][0] for key in lora}),
            "lora_alpha": scaling.lora_alpha,
            "alpha_pattern": dict(scaling.alpha_pattern),
            **_check_ranks(lora, matched, scaling),
            **scaling.switches,
        }
        config = LoraConfig(**settings, inference_mode=True)
        wrapped: Any = get_peft_model(cast(Any, copy), config)
        try:
            loaded: Any = set_peft_model_state_dict(wrapped, lora)
        except RuntimeError as error:  # sizes differ
            raise _AdapterMismatch(_find_size_mismatch(error)) from None
        lacking = [key for key in loaded.missing_keys if "lora_" in key]
        if lacking or loaded.unexpected_keys:
            key = (*lacking, *loaded.unexpected_keys)[0]
            what = "lack" if lacking else "have"
            raise _AdapterMismatch(
                f"its weights {what} `{key}`", "save the adapter again with peft"
            )
        return wrapped.merge_and_unload(safe_merge=True)


def _match_weights(weights: Iterable[str], base: nn.Module) -> dict[str, tuple[str, str]]:
    """Match the adapter's keys with modules of the base.

    Returns:
        Key → (path of the module, name of the parameter that the weight replaces; empty for LoRA).
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    pairs: dict[str, tuple[str, str]] = {}
    for key in weights:
        named = _WEIGHT_KEY.fullmatch(key)
        if named is None:
            raise _AdapterMismatch(f"its weights have `{key}`, which isn't a key of an adapter")
        path, whole = named["module"], named["whole"] or ""
        if path not in modules:
            raise _AdapterMismatch(f"its weights change `{path}`, but the base has no such module")
        if whole and whole not in dict(modules[path].named_parameters(recurse=False)):
            raise _AdapterMismatch(
                f"its weights change `{path}.{whole}`, which the base doesn't have"
            )
        pairs[key] = path, whole
    if not pairs:
        raise _AdapterMismatch("its file of weights is empty", "save the adapter again with peft")
    return pairs


def _put_parameter(part: nn.Module, name: str, value: Tensor, key: str) -> None:
    old = part.get_parameter(name)
    if old.shape != value.shape:
        sizes = f"{list(value.shape)}, but the base has {list(old.shape)}"
        raise _AdapterMismatch(f"`{key}` is {sizes}")
    with torch.no_grad():
        old.copy_(value)


def _check_ranks(
    lora: Mapping[str, Tensor], pairs: Mapping[str, tuple[str, str]], scaling: AdapterScaling
) -> dict[str, Any]:
    """Return the ranks in the config, after a check that they match the weights.

    Merging divides by the configured rank. Unused larger ranks are reduced to the largest rank of
    the weights, so that a config can't demand memory.
    """
    from peft.utils.other import get_pattern_key

    first = {key: t for key, t in lora.items() if ".lora_A." in key or key.endswith("embedding_A")}
    most = 1
    for key, tensor in first.items():
        path, rank = pairs[key][0], len(tensor) if tensor.ndim else 0
        said = scaling.rank_pattern.get(get_pattern_key([*scaling.rank_pattern], path), scaling.r)
        if said != rank:
            reason = f"its weights for `{path}` are of rank {rank}, but its config says {said}"
            raise _AdapterMismatch(
                reason, f"correct `r` or `rank_pattern` in its `{ADAPTER_CONFIG}`"
            )
        most = max(most, rank)
    pattern = {key: min(rank, most) for key, rank in scaling.rank_pattern.items()}
    return {"r": min(scaling.r, most), "rank_pattern": pattern}


def _find_size_mismatch(error: RuntimeError) -> str:
    """Return the first size mismatch, in torch's words."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next(
        (line for line in lines if line.startswith("size mismatch")), summarize_error(error)
    )


GivenModels = Mapping[str, tuple[Any, Any]]
"""Name → (transformers model, fast tokenizer), passed from Python."""


def adopt_models(
    models: GivenModels, declared: Mapping[str, spec.Model]
) -> tuple[dict[str, LoadedModel], list[Diagnostic]]:
    """Analyze and verify models passed from Python.

    Args:
        models: Models by name.
        declared: The models of the file; `bos` of a model line applies to the model passed.
    """
    loaded: dict[str, LoadedModel] = {}
    diagnostics: list[Diagnostic] = []
    for name, (module, tokenizer) in models.items():
        model, problems = adopt_model(name, module, tokenizer, bos=declared[name].bos)
        diagnostics.extend(problems)
        if model is not None:
            loaded[name] = model
    return loaded, diagnostics


def build_model_contexts(
    source: Source, loaded: Mapping[str, LoadedModel]
) -> dict[str, ModelContext]:
    """Build the contexts that checks need of models from Python; files may still declare them."""
    contexts: dict[str, ModelContext] = {}
    for name, model in loaded.items():
        if model.tokenizer is None:
            continue
        statement = spec.Model(span=Span(source, 0, 0), name=name, kind="local", path="")
        contexts[name] = ModelContext(statement, model.shape, model.tokenizer)
    return contexts


ModelEditor = Callable[
    [spec.Model, Mapping[str, LoadedModel]], tuple[LoadedModel | None, list[Diagnostic]]
]
"""Builds the model of a statement with edits, from the models loaded so far."""


def load_models(
    checked: CheckedFile,
    loaded: dict[str, LoadedModel],
    edit: ModelEditor,
    names: Iterable[str],
    *,
    device: str,
    dtype: str | None,
    offload: Path | None,
    hashed: FileHasher | None = hash_file,
    notes: NoteStore | None = None,
) -> list[Diagnostic]:
    """Load models that aren't in `loaded`, and those they are made from, into `loaded`.

    Args:
        loaded: The models by name; is extended.
        edit: Edits a model.
        names: The models that are needed.
        device: As in `RunOptions`.
        dtype: As in `RunOptions`.
        offload: As in `RunOptions`.
        hashed: Returns the SHA-256 of a file; None to skip hashes of weights.
        notes: As in `load_model`.

    Returns:
        Diagnostics of `load_model`, `load_adapter`, `build_edited_model`, `build_sum` and `edit`.
    """
    diagnostics: list[Diagnostic] = []
    for name in names:
        for statement in _sort_bases_first(name, checked, loaded):
            if any(base not in loaded for base in statement.bases):
                continue  # already reported
            if statement.kind == "edited":
                model, problems = edit(statement, loaded)
            elif statement.kind == "rounded":
                base = loaded[statement.bases[0]]
                rounding = WeightEdit("round", statement.span, bits=statement.bits or 0)
                model, problems = build_edited_model(
                    statement, base, [rounding], hashes=hashed is not None
                )
            elif statement.kind == "sum":
                terms = [(loaded[base], factor) for base, factor in statement.terms]
                model, problems = build_sum(statement, terms, hashes=hashed is not None)
            elif statement.base is not None:
                model, problems = load_adapter(statement, loaded[statement.base], hashed)
            else:
                model, problems = load_model(
                    statement,
                    device=devices.get_device(device),
                    dtype=dtype,
                    spread=devices.plan_device_map(device, offload),
                    hashed=hashed,
                    notes=notes,
                )
            diagnostics.extend(problems)
            if model is not None:
                loaded[statement.name] = model
    return diagnostics


def add_tower_views(
    experiments: Sequence[ResolvedExperiment], models: dict[str, LoadedModel]
) -> None:
    """Add the towers that experiments run, each scored against the opposite tower."""
    for experiment in expand_controls(experiments):
        model = experiment.model
        if model.opposite is not None and model.key not in models:
            models[model.key] = attach_other_tower(models[model.name], model)


def _sort_bases_first(
    name: str, checked: CheckedFile, loaded: Mapping[str, LoadedModel]
) -> list[spec.Model]:
    """List the statements of a model and those it is made from, which come first, as far as they
    aren't loaded."""
    models: dict[str, spec.Model] = {}

    def visit(name: str) -> None:
        if name in loaded or name in models or name in waiting:
            return
        waiting.add(name)
        statement = checked.program.models[name]
        edits = checked.edits.get(name)
        for other in (*statement.bases, *(() if edits is None else edits.models)):
            visit(other)
        models[name] = statement

    waiting: set[str] = set()
    visit(name)
    return list(models.values())


def check_modules(
    experiments: Sequence[ResolvedExperiment], models: Mapping[str, LoadedModel]
) -> list[Diagnostic]:
    """Check what only the modules show: sites (E0402, E0413, E0414), logits (E0437, E0438)."""
    problems: list[Diagnostic | None] = []
    for experiment in expand_controls(experiments):
        model = models[experiment.model.key]
        problems.append(_check_output_token(experiment, model))
        read = [models[name] for name in experiment.models[1:]]
        runs = [
            run for run in experiment.spec.elsewhere if reads_outputs(experiment.spec, run.name)
        ]
        measured = [models[run.model] for run in runs if run.model is not None]
        for rule in experiment.every_rule:
            if rule.does.changes == "positions":
                problems.append(_check_position_ids(rule, model))
            seen = rule.does
            if isinstance(seen, Observation) and not isinstance(seen, RowSetObservation):
                problems += (
                    [_check_unembedding(rule, seen, model)] if seen.gives == "logits" else []
                )
            if rule.path is not None and rule.path.frozen_norms:
                problems.append(_check_frozen_norms(rule, model))
            if rule.path is not None and rule.path.also_at_the_end:
                problems.append(_check_end_receiver(rule, model))
            if rule.circuit is not None:
                problems.append(_check_circuit(rule, model))
            if rule.does.changes == "blocks":
                problems.append(_check_block_exchange(rule, model))
            if isinstance(rule.does, WeightChange):
                problems.append(_check_output_weights(rule, model))
            if rule.spec.verb == PROJECT_OUT_OF_WEIGHTS:
                problems.append(_check_projection(rule, model))
            if isinstance(seen, Observation) and seen.weights_attention:
                problems.append(_check_attention_maps(rule, model))
            if rule.sites is not None:
                points = [p for here in rule.sites.points.values() for p in here]
                span = rule.spec.span
                problems += [
                    find_missing_point(points, m.shape, m.name, span) for m in (model, *read)
                ]
        for save in experiment.saves:
            span = save.spec.span
            problems += [
                find_missing_point(save.points, m.shape, m.name, span) for m in (model, *read)
            ]
        for measure in (*experiment.measures, *experiment.keep):
            points = [atom.point for atom in measure.atoms if atom.point is not None]
            span = measure.expression.span
            problems.append(find_missing_point(points, model.shape, model.name, span))
            problems += [
                check_readable(measure.expression, measure.atoms, m.shape, m.name)
                for m in (model, *measured)
            ]
    return [problem for problem in problems if problem is not None]


def _check_unembedding(
    rule: ResolvedRule, does: Observation, model: LoadedModel
) -> Diagnostic | None:
    """Report E0108 if a component's contribution to logits isn't linear in its output."""
    reason = ""
    assert rule.sites is not None
    places = {(p.site, p.layer) for here in rule.sites.points.values() for p in here}
    blocks = [model.anatomy.blocks[layer] for _, layer in places if layer is not None]
    sites = {site for site, _ in places}
    if model.anatomy.unembedding is None or "resid_post" not in model.shape.sites:
        reason = "of a model whose unembedding isn't found"
    elif does.read_by_measures:
        return None
    elif model.anatomy.final_norm is None:
        reason = "of a model whose final norm isn't found"
    elif "head_out" in sites and any(block.attn_output_norm for block in blocks):
        reason = "of heads followed by a norm"
    elif "mlp_hidden" in sites and any(block.taps["mlp_out"].scaled_by for block in blocks):
        reason = "of neurons followed by a gate"
    elif "mlp_hidden" in sites and any(
        block.mlp_output_norm or block.down is None for block in blocks
    ):
        reason = "of neurons followed by a norm"
    elif not ModelUnembedding(model).folds:
        reason = "through a final norm that isn't a scale times a linear map"
    if not reason:
        return None
    what = f"`observe {does.word}` {reason}, as in `{model.name}`,"
    return NotSupported(span=rule.spec.span, what=what)


def _check_output_weights(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0344 if a sublayer's output isn't a linear map of its heads or neurons."""
    assert rule.sites is not None
    for point in dict.fromkeys(p for here in rule.sites.points.values() for p in here):
        assert point.layer is not None
        block = model.anatomy.blocks[point.layer]
        norm = block.attn_output_norm if point.site == "attn_out" else block.mlp_output_norm
        between = norm or block.taps[point.site].scaled_by
        if between is None and find_output_map(block, point.site) is not None:
            continue
        reason = f"`{between}` is between these weights and the stream"
        if between is None:
            reason = f"`{point.site}` isn't a linear map of `{MAPPED_SITES[point.site]}`"
        return BadWeights(
            span=rule.spec.span,
            reason=f"{reason}, in `{model.name}`",
            hint=f"edit a copy: `model edited = {model.name} with {{ {rule.spec.span.written} }}`",
        )
    return None


def _check_projection(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0344 if a direction is taken out of activations that weights don't write directly."""
    reason = explain_projection(model)
    if reason is None:
        return None
    assert rule.spec.direction is not None
    direction = rule.spec.direction.span.written
    return BadWeights(
        span=rule.spec.span,
        reason=f"{reason}, in `{model.name}`",
        hint=f"remove it from activations: `project out {direction} from resid_post layers * at "
        "tokens *`",
    )


def _check_attention_maps(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 if the values of heads, or what the stream gets of them, aren't linear maps."""
    assert rule.sites is not None
    maps = WeightMaps(model)
    for layer in sorted({p.layer or 0 for here in rule.sites.points.values() for p in here}):
        block = model.anatomy.blocks[layer]
        tap = block.taps.get("attn_out")
        between = block.attn_output_norm or (None if tap is None else tap.scaled_by)
        reason = f"`{between}` is between the heads and the stream"
        if between is None:
            try:
                maps.projected(layer, "v")
                maps.output(layer)
                continue
            except NoLinearMap as error:
                reason = str(error)
        what = f"`by {rule.does.name.removeprefix('observe ')}` in layer {layer} ({reason})"
        return NotSupported(span=rule.spec.span, what=what, later="leave out `by`")
    return None


def _check_position_ids(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 if the model takes no position ids, E0207 for ids beyond its last position."""
    first, last = model.calling.first_position, model.shape.max_positions
    if model.shape.attends_to_image:
        first = 0
    if model.shape.encodes_apart and "decoder_position_ids" in model.calling.accepts:
        return None  # their ids begin at 0, so the numbers were checked before
    if first is None:
        what = f"`renumber` in a model that computes its own positions, as `{model.name}` does,"
        return NotSupported(span=rule.spec.span, what=what)
    assert rule.amounts is not None
    hits = [row for cell in rule.positions.written.values() for rows in cell.hits for row in rows]
    end = int(max(rule.amounts.values.values())) + max(map(len, hits), default=1)
    if last is None or end + first <= last:
        return None
    reason = f"counts to {end - 1}, but the last position is {last - first - 1}"
    hint = "count from a smaller number"
    return BadArgument(span=rule.spec.span, name="from", reason=reason, hint=hint)


def _check_end_receiver(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 for the end as one of several receivers, if senders don't simply add to it.

    Norms after sums and mixed streams prevent that.
    """
    blocks = model.anatomy.blocks
    if all(
        block.adds_up and block.stream_scale is not None and not (block.middle or block.end)
        for block in blocks
    ):
        return None
    what = (
        f"a path to the end together with other receivers in `{model.name}`, whose residual "
        "stream isn't "
        "the sum of the outputs of blocks,"
    )
    return NotSupported(span=rule.spec.span, what=what)


def _check_circuit(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 if edges between the components of the model can't be separated."""
    circuit = rule.circuit
    assert circuit is not None
    reason = explain_no_circuits(model, circuit.stack) or explain_no_neurons(model, circuit.neurons)
    reason = reason or explain_no_features(model, circuit.features)
    what = f"a circuit in `{model.name}` ({reason})"
    return NotSupported(span=rule.spec.span, what=what) if reason else None


def _check_frozen_norms(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 for norms that aren't a linear map divided by a scale."""
    path = find_nonlinear_norm(model.module, model.shape.d_model)
    if path is None:
        return None
    what = f"a path with frozen norms in `{model.name}`, whose `{path}` isn't linear up to a scale"
    return NotSupported(span=rule.spec.span, what=what)


def _check_block_exchange(rule: ResolvedRule, model: LoadedModel) -> Diagnostic | None:
    """Report E0108 for blocks that can't run in place of others."""
    assert rule.sites is not None
    assert rule.sites.sources is not None
    pairs = {
        ((SITES[to.site].stack, to.layer), None if of.site == to.site else of.layer)
        for key, here in rule.sites.points.items()
        for to, of in zip(here, rule.sites.sources[key], strict=True)
    }
    for (stack, to), of in sorted(pairs, key=str):
        assert to is not None
        reason = explain_block_mismatch(model, (stack, to), of)
        if reason:
            place = {"vision": " of the vision encoder", "encoder": " of the encoder"}.get(
                stack, ""
            )
            own = f"block {to}{place}"
            replacement = "identity" if of is None else f"block {of}"
            what = f"{replacement} in place of {own} ({reason})"
            return NotSupported(span=rule.spec.span, what=what)
    return None


def _check_output_token(experiment: ResolvedExperiment, model: LoadedModel) -> Diagnostic | None:
    """Report E0439 for an output token that differs from the class's, E0410 for a non-causal model.

    E0410 is for a classifier that sees later tokens although its family is causal.
    """
    span, named = experiment.model.spec.span, model.shape.architecture
    expected, shape = experiment.model.shape, model.shape
    if shape.output_at != expected.output_at:
        reason = (
            f"it is computed from its {shape.output_at}, but according to its class from "
            f"its {expected.output_at}"
        )
        return SingleOutput(span=span, model=model.name, architecture=named, reason=reason)
    ends_in_pad = any(measure.at for measure in experiment.measures)
    if model.calling.reads == "last token" and model.calling.skips is None and ends_in_pad:
        reason = (
            "prompts end in the pad token, and the output is computed from that token, not "
            "from the preceding one"
        )
        return SingleOutput(span=span, model=model.name, architecture=named, reason=reason)
    if expected.causal and not shape.causal:
        return IdentityBroken(
            span=span,
            model=model.name,
            architecture=named,
            identity="a different last token doesn't change earlier outputs",
            reason=f"it sees later tokens, which its family `{expected.family}` doesn't declare",
            hint="register the family with `@family` and `encodes = True`",
        )
    return None


_BUILD_HINT = (
    "it takes no arguments and returns a model of transformers and its tokenizer: `return "
    "model, tok`"
)


def build_model(
    model: spec.Model, function: PythonFunction
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Call the function and adopt its model, like models from Python: unchanged and not moved.

    Returns:
        The model and its diagnostics: E0223 if the function fails or returns something else, and
        those of `adopt_model`.
    """
    try:
        with redirect_stdout(sys.stderr):  # standard output may carry a report
            given = function.call()
    except PythonFailure as failure:
        return None, [failure.diagnostic]
    pair = cast("tuple[Any, ...]", given) if isinstance(given, tuple) else ()
    if len(pair) != 2:
        kind = "nothing" if given is None else f"a `{type(given).__name__}`"
        reason = f"it returned {kind}, not a model and its tokenizer"
        return None, [function.failure(reason, _BUILD_HINT).diagnostic]
    module, tokenizer = pair
    return adopt_model(
        model.name,
        module,
        tokenizer,
        span=model.span,
        provenance={"source": model.source, f"{PYTHON_PREFIX}{function.file}": function.digest},
    )
