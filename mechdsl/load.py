# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Models from folders, from the hub's cache or from Python: loaded, taken apart, verified."""

from __future__ import annotations

import inspect
import io
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from logging import CRITICAL
from math import isinf
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import nn

from mechdsl import spec
from mechdsl.data.tokenizer import TextTokenizer
from mechdsl.diagnostics import Diagnostic
from mechdsl.diagnostics.e04_model import (
    IdentityBroken,
    LoadFailed,
    ModelNotFound,
    NoTokenizer,
    NoWeights,
)
from mechdsl.diagnostics.w07_models import ModelNotHere, NotRestartable
from mechdsl.garbage import uncollected
from mechdsl.loaded import Calling, LoadedModel, Outcome
from mechdsl.models.anatomy import Anatomy
from mechdsl.models.finder import find_anatomy
from mechdsl.models.locate import locate, weight_files
from mechdsl.models.shape import ModelShape, read_shape, shape_from_config
from mechdsl.source import Span
from mechdsl.verify import RESTART, verify

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
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Load, take apart and verify the model of a `model` statement, without the network.

    dtype: overrides the statement's. base: folder that relative paths start from, by default that
    of the statement's file. Gives E0401, E0403 to E0411, E0508, E0522 and W0711.
    """
    folder, found = locate(model, model.span.source.folder if base is None else base)
    if folder is None:
        return None, [_needed(d) if isinstance(d, ModelNotHere) else d for d in found]
    files = weight_files(folder)
    if not files:
        hub = model.kind == "hf"
        advice = f"`hf download {model.path}` fetches them" if hub else "copy them there"
        return None, [NoWeights(span=model.span, model=model.name, advice=advice)]
    shape, found = read_shape(folder, model=model.name, span=model.span)
    if shape is None:
        return None, found
    tokenizer, found = TextTokenizer.from_folder(folder, model.bos, span=model.span)
    if tokenizer is None:
        return None, found
    module, reason = _from_folder(folder, _DTYPES[dtype or model.dtype])
    if module is None:
        return None, [LoadFailed(span=model.span, model=model.name, reason=reason)]
    provenance = {
        "weights": _hash_files(files),
        "source": f'{model.kind}("{model.path}")',
        "revision": _revision(folder, model),
        "tokenizer": tokenizer.hash,
    }
    return _prove(
        model.name, module.to(device), shape, tokenizer, provenance=provenance, span=model.span
    )


def adopt(
    name: str,
    module: nn.Module,
    tokenizer: Any,
    *,
    bos: bool | None = None,
    span: Span | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Take over a model that Python holds already; it is put into eval mode, and not moved.

    tokenizer: a fast tokenizer of transformers, a `tokenizers.Tokenizer` or a `TextTokenizer`.
    Gives E0407 to E0412, E0522 and W0711.
    """
    text, found = _adopt_tokenizer(name, tokenizer, bos, span)
    if text is None:
        return None, found
    config = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None, [LoadFailed(span=span, model=name, reason="it has no transformers config")]
    values: dict[str, Any] = dict(cast(Any, config).to_dict())
    values["architectures"] = [type(module).__name__]
    shape, found = shape_from_config(values, model=name, span=span)
    if shape is None:
        return None, found
    provenance = {
        "weights": _hash_parameters(module),
        "source": "handed over from Python",
        "tokenizer": text.hash,
    }
    return _prove(name, module, shape, text, provenance=provenance, span=span)


def _needed(missing: ModelNotHere) -> ModelNotFound:
    """What was a warning while checking is an error when the model has to run."""
    return ModelNotFound(
        span=missing.span,
        model=missing.model,
        path=missing.path,
        place="the Hugging Face cache",
        advice=f"`hf download {missing.path}` fetches it",
    )


def _revision(folder: Path, model: spec.Model) -> str:
    """The commit of a snapshot in the cache, else the revision as written."""
    return folder.name if folder.parent.name == "snapshots" else model.revision or ""


# --- loading ------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Generator[None]:
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
    with uncollected(), _quiet():
        import_module("transformers.modeling_utils")


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module | None, str]:
    """The model, or why it can't be loaded. Weights that the files lack are a reason."""
    import_library()
    with _quiet():
        from transformers import AutoModelForCausalLM

        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its parts raise
            return None, _text(error)
    module, info = cast("tuple[nn.Module, Mapping[str, Any]]", loaded)
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    if missing:
        return None, f"the weights lack `{missing[0]}` and {len(missing) - 1} more"
    return module, ""


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
    return TextTokenizer.from_backend(backend, **roles, bos=bos, span=span)


def _hash_files(files: list[Path]) -> str:
    """SHA-256 over the safetensors files, in order of their names."""
    digest = sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _hash_parameters(module: nn.Module) -> str:
    """SHA-256 over names and bytes of parameters and buffers."""
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- taking apart and verifying -----------------------------------------------------------------


def _prove(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    module.eval()
    anatomy, found = find_anatomy(module.named_modules(), shape, model=name, span=span)
    if anatomy is None:
        return None, found
    try:
        model = describe(name, module, shape, anatomy, tokenizer, provenance=provenance)
    except Exception as error:  # whatever the model's own forward raises
        return None, [LoadFailed(span=span, model=name, reason=f"it doesn't run: {_text(error)}")]
    return prove(model, span=span)


def _text(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def describe(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    anatomy: Anatomy,
    tokenizer: TextTokenizer | None = None,
    *,
    provenance: Mapping[str, str] | None = None,
) -> LoadedModel:
    """A model with an anatomy that nothing has been proved about yet."""
    first = next(module.parameters())
    config: Any = cast(Any, module).config
    pad = getattr(config, "pad_token_id", None)
    # Padding is masked, so any id will do where the config names none.
    pad_id = pad if isinstance(pad, int) and 0 <= pad < shape.vocab_size else 0
    neurons = anatomy.taps.get("mlp_hidden")
    accepts = frozenset(inspect.signature(module.forward).parameters)
    return LoadedModel(
        name=name,
        module=module,
        anatomy=anatomy,
        shape=replace(
            shape,
            d_mlp=neurons.layout.units if neurons else shape.d_mlp,
            parallel_block=anatomy.parallel,
            sites=frozenset(anatomy.taps) | {"logits"},
        ),
        tokenizer=tokenizer,
        pad_id=pad_id,
        device=first.device,
        dtype=first.dtype,
        calling=Calling(accepts, _block_returns(module, anatomy, first.device)),
        provenance={
            **(provenance or {}),
            "architecture": shape.architecture,
            "dtype": str(first.dtype).removeprefix("torch."),
            "attention": str(getattr(config, "_attn_implementation", "")),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    )


def _block_returns(module: nn.Module, anatomy: Anatomy, device: torch.device) -> int | None:
    """Length of the tuple that the first block returns, None for a tensor."""
    returned: list[Any] = []

    def look(block: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    handle = module.get_submodule(anatomy.block.format(layer=0)).register_forward_hook(look)
    try:
        with torch.inference_mode():
            module(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        handle.remove()
    return len(returned[0]) if isinstance(returned[0], tuple) else None


def prove(
    model: LoadedModel, *, span: Span | None = None
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Verify a described model: E0410 names the identity that broke, W0711 a lost shortcut."""
    checks: list[Outcome] = []
    found: list[Diagnostic] = []
    try:
        for outcome in verify(model):
            checks.append(outcome)
            if outcome.passed:
                continue
            if outcome.identity != RESTART:
                return None, [_broken(model, outcome.identity, _reason(outcome), span)]
            reason = _reason(outcome)
            found.append(NotRestartable(span=span, model=model.name, reason=reason))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return None, [_broken(model, "every site can be read and written", _text(error), span)]
    failed = {outcome.identity for outcome in checks if not outcome.passed}
    return replace(
        model,
        checks=tuple(checks),
        restartable=RESTART not in failed,
    ), found


def _reason(outcome: Outcome) -> str:
    where = f"{outcome.detail}: " if outcome.detail else ""
    if outcome.failure:
        return where + outcome.failure
    if isinf(outcome.error):
        return f"{where}the shapes differ, or a value is not a number"
    return f"{where}off by {outcome.error:.2g} of the value's size"


def _broken(model: LoadedModel, identity: str, reason: str, span: Span | None) -> IdentityBroken:
    return IdentityBroken(
        span=span,
        model=model.name,
        architecture=model.shape.architecture,
        identity=identity,
        reason=reason,
    )
