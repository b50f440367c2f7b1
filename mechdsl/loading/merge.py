# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""`local("tuned", base: m)`: adapters, merged by peft into a copy of their base.

The copy has the base's own tensors but for the modules that the adapter changes, so that several
adapters on one base take little more memory than the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_adapters import AdapterDoesNotFit, NoPeft
from mechdsl.diagnostics.e04_model import LoadFailed
from mechdsl.hooks.loaded import BASE, LoadedModel
from mechdsl.loading.identity import identity_of_loaded
from mechdsl.loading.load import changed_meanwhile, hash_of_weights, import_library, quiet
from mechdsl.loading.peft_models import has_adapters
from mechdsl.loading.prove import take_apart, text_of
from mechdsl.models.adapter_folder import Scaling, read_scaling
from mechdsl.models.identity import Hashed, file_hash, identity_of_folder, stamps
from mechdsl.models.locate import ADAPTER, locate, missing_weights, needed, weight_files
from mechdsl.program import spec
from mechdsl.prompts.tokenizer import TextTokenizer, has_tokenizer

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)"
    r"(?:\.lora_\w+(?:\.weight|\.bias)?|(?:\.base_layer)?\.(?P<whole>\w+))"
)
"""A weight in the file: of LoRA on a module, or one that takes the place of the module's own."""


class _DoesNotFit(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


def load_adapter(
    model: spec.Model, base: LoadedModel, hashed: Hashed | None = file_hash
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """The base with the adapter's weights, taken apart and verified. The base is left as it is.
    hashed: SHA-256 of a file, None to hash no weights.

    Gives E0401, E0404 to E0406, E0409 to E0411, E0451 to E0454, E0508, E0522 and W0711.
    """
    folder, found = locate(model, model.span.source.folder)
    if folder is None:
        return None, needed(found)
    before = stamps(model, folder)
    scaling, found = read_scaling(folder, model)
    if scaling is None:
        return None, found
    missing = missing_weights(folder, model)
    if missing is not None:
        return None, [missing]
    files = weight_files(folder, adapter=True)
    tokenizer = base.tokenizer
    if has_tokenizer(folder):
        bos = None if tokenizer is None else tokenizer.bos
        tokenizer, found = TextTokenizer.from_folder(folder, bos, span=model.span)
        if tokenizer is None:
            return None, found
    if find_spec("peft") is None:
        return None, [NoPeft(span=model.span, model=model.name, base=base.name)]
    try:
        module = _merged(base.module, files[0], scaling)
    except _DoesNotFit as problem:
        hint = problem.hint or f"name the model that it was trained on, instead of `{base.name}`"
        return None, [
            AdapterDoesNotFit(
                span=model.span, model=model.name, base=base.name, reason=str(problem), hint=hint
            )
        ]
    except Exception as error:  # peft and safetensors raise whatever their parts raise
        hint = "it has to load and merge with `PeftModel.from_pretrained(base, folder)`"
        reason = text_of(error)
        return None, [LoadFailed(span=model.span, model=model.name, reason=reason, hint=hint)]
    loaded, found = take_apart(
        model.name,
        module,
        base.shape,
        tokenizer,
        provenance={
            **hash_of_weights(files, hashed),
            "source": f"{model.source}, merged by peft {version('peft')}",
            "tokenizer": "" if tokenizer is None else tokenizer.hash,
            **base.made_of,
            f"{BASE}{base.name}": base.provenance.get("weights", ""),
        },
        span=model.span,
    )
    if loaded is not None and hashed is not None:
        identity = identity_of_folder(model, folder, hashed, base=identity_of_loaded(base))
        loaded = replace(loaded, identity=identity)
    if stamps(model, folder) != before:
        return None, [changed_meanwhile(model)]
    return loaded, found


def _merged(base: nn.Module, file: Path, scaling: Scaling) -> nn.Module:
    """A copy of the base with the adapter's weights in its own. Raises _DoesNotFit, and what peft
    and safetensors raise."""
    if any("_hf_hook" in part.__dict__ for part in base.modules()):
        reason = "the weights of the base are spread over devices, memory or a folder"
        raise _DoesNotFit(reason, "merge it from Python, save that, and load it with `--offload`")
    if has_adapters(base):
        hint = "merge that one first, with `merge_and_unload()`"
        raise _DoesNotFit("the base has an adapter of its own, which isn't merged", hint)
    import_library()
    with quiet():
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        weights = load_file(file)
        found = _parts(weights, base)
        copy = _copy(base, {path for path, _ in found.values()})
        for key, (path, whole) in found.items():
            if whole:
                _put(copy.get_submodule(path), whole, weights[key], key)
        lora = {key: weights[key] for key, (_, whole) in found.items() if not whole}
        if not lora:
            return copy
        settings: dict[str, Any] = {
            "target_modules": sorted({found[key][0] for key in lora}),
            "lora_alpha": scaling.lora_alpha,
            "alpha_pattern": dict(scaling.alpha_pattern),
            **_ranks(lora, found, scaling),
            **scaling.switches,
        }
        config = LoraConfig(**settings, inference_mode=True)
        wrapped: Any = get_peft_model(cast(Any, copy), config)
        try:
            loaded: Any = set_peft_model_state_dict(wrapped, lora)
        except RuntimeError as error:  # sizes differ
            raise _DoesNotFit(_sizes(error)) from None
        lacking = [key for key in loaded.missing_keys if "lora_" in key]
        if lacking or loaded.unexpected_keys:
            key = (*lacking, *loaded.unexpected_keys)[0]
            what = "lack" if lacking else "have"
            raise _DoesNotFit(f"its weights {what} `{key}`", "save the adapter again with peft")
        return wrapped.merge_and_unload(safe_merge=True)


def _parts(weights: Iterable[str], base: nn.Module) -> dict[str, tuple[str, str]]:
    """Key → (path of the module, name of the parameter that it stands for as a whole, empty for
    those of LoRA)."""
    modules = dict(base.named_modules(remove_duplicate=False))
    found: dict[str, tuple[str, str]] = {}
    for key in weights:
        named = _KEY.fullmatch(key)
        if named is None:
            raise _DoesNotFit(f"its weights have `{key}`, which is none of an adapter's")
        path, whole = named["module"], named["whole"] or ""
        if path not in modules:
            raise _DoesNotFit(f"its weights change `{path}`, and the base has no such module")
        if whole and whole not in dict(modules[path].named_parameters(recurse=False)):
            raise _DoesNotFit(f"its weights change `{path}.{whole}`, which the base doesn't have")
        found[key] = path, whole
    if not found:
        raise _DoesNotFit("its file of weights is empty", "save the adapter again with peft")
    return found


def _copy(module: nn.Module, changed: Iterable[str]) -> nn.Module:
    """The modules once more, over the same storage but for the parameters of those that change: so
    nothing reaches the base, nor a module that shares its weights with a changed one."""
    known: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    # Parameters of their own, as peft freezes those that it is given.
    known |= {id(own): nn.Parameter(own.detach(), False) for own in module.parameters()}
    known |= {id(hook): hook for hook in _hooks_from_outside(module)}
    try:
        copy = deepcopy(module, known)
    except Exception as error:  # of whatever somebody has put into the model
        reason = f"`copy.deepcopy` can't copy the base: {text_of(error)}"
        hint = "merge it from Python, with `merge_and_unload()`, and hand over what that gives"
        raise _DoesNotFit(reason, hint) from None
    for path in changed:
        part = copy.get_submodule(path)
        for name, own in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(own.detach().clone(), False))
    return copy


def _hooks_from_outside(module: nn.Module) -> Iterator[object]:
    """Hooks on the way of a forward pass that are no methods of the model's own modules. They, and
    what they hold, aren't the model's to copy."""
    parts = {id(part) for part in module.modules()}
    for part in module.modules():
        for table in ("_forward_pre_hooks", "_forward_hooks"):
            for hook in vars(part)[table].values():
                if id(getattr(hook, "__self__", hook)) not in parts:
                    yield hook


def _put(part: nn.Module, name: str, value: Tensor, key: str) -> None:
    old = part.get_parameter(name)
    if old.shape != value.shape:
        sizes = f"{list(value.shape)}, and the base has {list(old.shape)}"
        raise _DoesNotFit(f"`{key}` is {sizes}")
    with torch.no_grad():
        old.copy_(value)


def _ranks(
    lora: Mapping[str, Tensor], found: Mapping[str, tuple[str, str]], scaling: Scaling
) -> dict[str, Any]:
    """The ranks that the config says, where each is that of the weights: what is merged is divided
    by it. None is above those, so that what a config says takes no memory."""
    from peft.utils.other import get_pattern_key

    first = {key: t for key, t in lora.items() if ".lora_A." in key or key.endswith("embedding_A")}
    most = 1
    for key, tensor in first.items():
        path, rank = found[key][0], len(tensor) if tensor.ndim else 0
        said = scaling.rank_pattern.get(get_pattern_key([*scaling.rank_pattern], path), scaling.r)
        if said != rank:
            reason = f"its weights for `{path}` are of rank {rank}, and its config says {said}"
            raise _DoesNotFit(reason, f"correct `r` or `rank_pattern` in its `{ADAPTER}`")
        most = max(most, rank)
    pattern = {key: min(rank, most) for key, rank in scaling.rank_pattern.items()}
    return {"r": min(scaling.r, most), "rank_pattern": pattern}


def _sizes(error: RuntimeError) -> str:
    """The first of the sizes that differ, in torch's words."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), text_of(error))
