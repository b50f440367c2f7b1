"""Proof of a model's anatomy: the first candidate that passes all checks, and its storage.

A model with a tower for images and one for texts is split into two models.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from importlib import metadata
from math import isinf
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from mechdsl.base.files import cache_folder, package_digest, write_atomically
from mechdsl.base.hashing import digest
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import (
    ComponentNotFound,
    IdentityBroken,
    IdleComponents,
    LoadFailed,
    NotRestartable,
    OtherAdapter,
    SingleOutput,
    StackSkipped,
)
from mechdsl.forward.hooks.batch import Batch, is_out_of_memory
from mechdsl.forward.hooks.model import BlockStack, CallConvention, CheckOutcome, LoadedModel
from mechdsl.images.picture import Picture
from mechdsl.images.pixels import model_input
from mechdsl.loading.bench import (
    OneOutputOnly,
    build_image_inputs,
    build_sample,
    build_text_sample,
    probe_call,
)
from mechdsl.loading.verify.checks import (
    ATTENTION_IDENTITY,
    PACKED_IDENTITY,
    PACKED_IMAGE_IDENTITY,
    add_attention_sites,
    add_stack_attention,
    add_vision_attention,
    find_idle_sites,
    retry_with_one_prompt,
    run_checks,
)
from mechdsl.models.adapter_folder import PROMPT_ADAPTER_REASON, PROMPT_ADAPTERS
from mechdsl.models.block import is_norm, is_transposed
from mechdsl.models.config import limit_sites, stack_shape
from mechdsl.models.finder import find_anatomies
from mechdsl.models.folder import json_digest
from mechdsl.models.shape import (
    Anatomy,
    BlockAnatomy,
    BlockSizes,
    Family,
    ModelShape,
    find_family,
    required_stacks,
    stack_names,
)
from mechdsl.program.code_hashes import CodeHashError, code_digest, hash_module_code
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, TextTokenizer
from mechdsl.resolve.types import ModelContext
from mechdsl.store.files import StoreProblem
from mechdsl.vocab.sites import SITES, STACK_SITES

version = cache(metadata.version)
"""Return the version of an installed package, which is read once."""

_FILE_KEYS = ("_name_or_path", "transformers_version")
"""Keys of a config that describe its source files."""


class NoteStore(Protocol):
    """Store of short texts by key, which remain between runs."""

    def note(self, key: str) -> str | None:
        """Return the stored text; None if there is none."""
        ...

    def take_note(self, key: str, value: str) -> None:
        """Store a text."""
        ...


def compute_proof_key(module: nn.Module, config: Mapping[str, Any], **more: object) -> str:
    """Hash everything that the outcome of checks depends on, except for weights."""
    parts = {
        "config": {name: value for name, value in config.items() if name not in _FILE_KEYS},
        "machine": [platform.machine(), platform.python_version()],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "code": package_digest(),
        "modules": _hash_module_code(module),
        **more,
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _hash_module_code(module: nn.Module) -> dict[str, str]:
    """Hash the files that define the model's modules, except for torch's own."""
    classes = {type(part) for part in module.modules()}
    classes = {kind for kind in classes if kind.__module__.partition(".")[0] != "torch"}
    files = {kind.__module__: inspect.getsourcefile(kind) for kind in classes}
    return {
        name: "" if file is None else sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
    }


def _hash_family(entry: Family) -> dict[str, str] | None:
    """Hash a family's values and methods, and the files of one that mechdsl doesn't ship; None if
    that is impossible."""
    families: dict[str, str] = {}
    for base in type(entry).__mro__[:-1]:
        for name, value in vars(base).items():
            inner = getattr(value, "__func__", value)
            code = isinstance(inner, FunctionType)
            if code or not name.startswith("__"):
                told = code_digest(inner.__code__) if code else repr(value)
                families[f"{base.__qualname__}.{name}"] = told
        if base.__module__.partition(".")[0] != "mechdsl":
            try:
                families |= hash_module_code(base.__module__)
            except CodeHashError:
                return None
    return families


@dataclass(frozen=True)
class Proof:
    """Outcome of a model's analysis."""

    chosen: Mapping[str, int]
    """Stack → index of the chosen anatomy among its candidates."""
    lost: Mapping[str, str]
    """Stacks that couldn't be proved, with reasons."""
    checks: tuple[CheckOutcome, ...]
    packs: Literal["tokens", "one prompt"]
    """Input of passes over packed rows."""
    idle: tuple[tuple[str, str, int | None], ...] = ()
    """(stack, site, layer) of components without effect."""


class ProofStore:
    """Proofs of earlier runs, in the run's store, if it has one, and in the user's cache.

    Args:
        notes: The run's store.
        content: The digest of the weights and code, unless they come directly from files.
    """

    def __init__(self, notes: NoteStore | None = None, content: str = "") -> None:
        self._notes = notes
        self.content = content

    def find(self, key: str) -> Proof | None:
        """Return the stored proof; None if there is none."""
        noted = _parse_proof(self._noted(key))
        if noted is not None:
            return noted
        cached = _parse_proof(_read_cached(key))
        if cached is not None:
            self._note(key, cached)  # so that the store is complete without the cache
        return cached

    def keep(self, key: str, proof: Proof) -> None:
        """Store a proof; if that fails, the checks run again next time."""
        self._note(key, proof)
        folder = cache_folder()
        if folder is not None:
            with suppress(OSError):
                write_atomically(_get_path(folder, key), json.dumps(asdict(proof)))

    def _noted(self, key: str) -> str | None:
        if self._notes is None:
            return None
        with suppress(OSError, StoreProblem):
            return self._notes.note(f"checks {key}")
        return None

    def _note(self, key: str, proof: Proof) -> None:
        if self._notes is not None:
            with suppress(OSError, StoreProblem):
                self._notes.take_note(f"checks {key}", json.dumps(asdict(proof)))


class ProcessProofStore(ProofStore):
    """The latest proofs of models from Python, in memory: a training would fill the cache with
    proofs of weights that never return."""

    _proofs: ClassVar[dict[str, Proof]] = {}

    def find(self, key: str) -> Proof | None:
        """Return the stored proof; None if there is none."""
        return self._proofs.get(key)

    def keep(self, key: str, proof: Proof) -> None:
        """Store a proof; the oldest one is dropped if there are too many."""
        self._proofs[key] = proof
        if len(self._proofs) > _MAX_PROOFS:
            del self._proofs[next(iter(self._proofs))]


_MAX_PROOFS = 256
"""Maximum number of proofs of models from Python."""


def _read_cached(key: str) -> str | None:
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError, ValueError):
        return _get_path(folder, key).read_text(encoding="utf-8")
    return None


def _get_path(folder: Path, key: str) -> Path:
    return folder / "checks" / f"{key}.json"


def _parse_proof(text: str | None) -> Proof | None:
    """Parse a proof; None for an incomplete text."""
    if text is None:
        return None
    with suppress(ValueError, KeyError, TypeError):
        proof = json.loads(text)
        checks = tuple(CheckOutcome(**one) for one in proof.pop("checks"))
        idle = tuple((stack, site, layer) for stack, site, layer in proof.pop("idle"))
        return Proof(checks=checks, idle=idle, **proof)
    return None


_RANDOM_GAIN = 0.6
"""Factor by which a linear map changes a vector's length: small enough for stacks without norms, in
which attention would otherwise see only one token."""

_RANDOM_SPREAD = 0.3
"""Standard deviation of biases, and of the scales of norms around 1."""


def build_random_copy(module: nn.Module) -> nn.Module:
    """Copy the modules with random but reproducible parameters; buffers stay the same.

    The copy needs as much memory as the model. Errors of copying are raised.
    """
    twin = deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in twin.modules():
            for parameter in part.parameters(recurse=False):
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(_draw_parameter(part, parameter, noise))
    return twin.eval()


def _draw_parameter(part: nn.Module, weight: Tensor, noise: Tensor) -> Tensor:
    """Create a parameter from noise, according to its module."""
    if weight.dim() < 2:
        scale = is_norm(part) and weight is getattr(part, "weight", None)
        return _RANDOM_SPREAD * noise + (1.0 if scale or weight.dim() == 0 else 0.0)
    if isinstance(part, nn.Embedding):
        return noise
    inputs = weight.shape[0] if is_transposed(part) else weight.shape[-1]
    return _RANDOM_GAIN * noise / inputs**0.5


_UNSUPPORTED_ADAPTERS = {
    "XLORA": "runs the model twice, to weigh its adapters",
    "ALORA": "is active only at certain tokens, which it searches for outside of the model's "
    "modules",
}


def unwrap_model(module: Any) -> Any:
    """Unwrap a model from `torch.compile` and peft; adapters in its modules remain."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and has_adapters(module) and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if not isinstance(inner, nn.Module) or inner is module:
            return module
        module = inner


def has_adapters(module: Any) -> bool:
    """Return whether a model contains or is wrapped in peft adapters that aren't merged."""
    return hasattr(module, "peft_config")


def explain_wrappers(module: Any) -> str | None:
    """Return advice about adapters or wrapped modules if they probably cause failed checks."""
    if not has_adapters(module):
        return _explain_checkpoint_wrappers(module)
    merge = "merge its adapters first, and pass the result of `model.merge_and_unload()`"
    return f"unmerged adapters change the computation of its modules: {merge}"


def _explain_checkpoint_wrappers(module: Any) -> str | None:
    """Return advice about modules that torch wraps for activation checkpointing."""
    for path, part in module.named_modules():
        if hasattr(part, "_checkpoint_wrapped_module"):
            return (
                f"`{path}` is in a `{type(part).__name__}`, which hides the modules of a block: "
                "pass the model without `apply_activation_checkpointing`, or use "
                "`model.gradient_checkpointing_enable()`"
            )
    return None


def check_adapters(module: Any, name: str, span: Span | None) -> Diagnostic | None:
    """Report E0451 for adapters that act outside the modules of their model.

    The model alone would then differ from the object that was passed.
    """
    while isinstance(getattr(module, "_orig_mod", None), nn.Module):
        module = module._orig_mod
    for config in getattr(module, "peft_config", {}).values():
        kind = getattr(config, "peft_type", "")
        kind = str(getattr(kind, "value", kind))
        kind = "ALORA" if getattr(config, "alora_invocation_tokens", None) else kind
        if kind in PROMPT_ADAPTERS or kind in _UNSUPPORTED_ADAPTERS:
            return OtherAdapter(
                span=span,
                model=name,
                kind=f"`{kind}`",
                what=_UNSUPPORTED_ADAPTERS.get(kind, PROMPT_ADAPTER_REASON),
                reason=f"a `{type(module).__name__}` of peft",
                hint="pass a model whose adapters are part of its weights, such as LoRA, or "
                "the one below: `model.get_base_model()`",
            )
    return None


RANDOM_COPY_NOTE = "of a copy with random weights"
"""Note on checks that can't be run on the model itself."""


def prove_anatomy(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    proofs: ProofStore | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Prove the first candidate anatomy that passes all checks.

    Args:
        shape: Its shape.
        tokenizer: Its tokenizer.
        provenance: Its provenance.
        span: Source of diagnostics.
        proofs: Store of passed checks.

    Returns:
        The model, or the problems of the candidate that passed the most checks.
    """
    module.eval()
    search = _AnatomySearch(name, module, shape, span)
    problems = search.collect()
    if "" not in search.found:
        return None, problems
    key = None if proofs is None else search.proof_key(proofs)
    known = None if key is None or proofs is None else proofs.find(key)
    at = dict.fromkeys(search.found, 0) if known is None else dict(known.chosen)
    if known is not None:
        search.lost = dict(known.lost)
    best: dict[str, ProofAttempt] = {}
    while True:
        stacks = search.stacks(at)
        attempt = _try_anatomies(
            name, module, stacks, tokenizer, provenance=provenance, span=span, known=known
        )
        if attempt.model is not None:
            if proofs is not None and key is not None and known is None:
                model = attempt.model
                packs, idle = model.calling.packs, model.idle
                proofs.keep(key, Proof(dict(at), dict(search.lost), model.checks, packs, idle))
            return attempt.model, [*search.left_out(), *attempt.problems]
        stack = "" if attempt.stack == "cross" else attempt.stack
        if stack not in best or attempt.passed > best[stack].passed:
            best[stack] = attempt
        at[stack] += 1
        if at[stack] < len(search.found[stack]):
            continue
        if not stack and "vision" in at:  # the image may cause the failure
            stack, at[""] = "vision", 0
            best.setdefault(stack, best[""])
        if not stack:
            return None, list(best[stack].problems)
        search.lose(stack, best[stack].problems[0])
        del at[stack]


class _AnatomySearch:
    """The candidate anatomies of a model's stacks, and the stacks that have no usable one."""

    def __init__(self, name: str, module: nn.Module, shape: ModelShape, span: Span | None) -> None:
        """Start without candidates; shape: of the main stack."""
        self.name = name
        self.module = module
        self.span = span
        self.config: Mapping[str, Any] = cast(Any, module).config.to_dict()
        self.family = find_family(str(self.config.get("model_type")))
        self.shapes = {"": shape}
        for stack in stack_names(shape):
            other = stack_shape(shape, self.config, stack)
            if other is not None:
                self.shapes[stack] = other
        self.found: dict[str, list[Anatomy]] = {}
        """Candidates by stack; without stacks that have none."""
        self.lost: dict[str, str] = {}
        """Reasons by stack for leaving it out."""

    def collect(self) -> list[Diagnostic]:
        """Find the candidates; returns the problems of the main stack if it has none."""
        for stack, reason in self.family.lost(self.config).items():
            self.shapes.pop(stack, None)
            self.lose(stack, reason)
        for stack, own in self.shapes.items():
            anatomies, problems = find_anatomies(
                self.module.named_modules(), own, stack=stack, model=self.name, span=self.span
            )
            if anatomies:
                self.found[stack] = anatomies
            elif not stack:
                return problems
            elif problems and stack != "cross":
                self.lose(stack, problems[0])
        return []

    def lose(self, stack: str, problem: Diagnostic | str) -> None:
        """Leave out a stack."""
        told = isinstance(problem, str)
        self.lost[stack] = problem if told else f"{problem.message}: {problem.label_text}"

    def left_out(self) -> list[Diagnostic]:
        """Report the stacks that are left out."""
        return [
            StackSkipped(span=self.span, model=self.name, stack=stack, reason=reason)
            for stack, reason in self.lost.items()
        ]

    def stacks(self, at: Mapping[str, int]) -> dict[str, BlockStack]:
        """Return the stacks with one candidate each; at: numbers of the candidates."""
        found, shapes = self.found, self.shapes
        stacks = {stack: BlockStack(found[stack][n], shapes[stack]) for stack, n in at.items()}
        if "cross" in stacks:
            anatomy = _match_arrangement(found["cross"], stacks[""].anatomy)
            stacks["cross"] = BlockStack(anatomy, shapes["cross"])
        return stacks

    def proof_key(self, proofs: ProofStore) -> str | None:
        """Return the key of the proof; None if the family's code can't be hashed."""
        entry = _hash_family(self.family)
        if entry is None:
            return None
        return compute_proof_key(
            self.module,
            self.config,
            content=proofs.content,
            entry=entry,
            candidates=digest(self.found, self.shapes).hex(),
            **_describe_environment(self.module),
        )


def _match_arrangement(anatomies: list[Anatomy], main: Anatomy) -> Anatomy:
    """Return the anatomy whose arrangement of blocks matches the main stack's."""
    return next((a for a in anatomies if a.arrangement == main.arrangement), anatomies[0])


@dataclass(frozen=True)
class ProofAttempt:
    """Outcome for one choice of anatomies."""

    passed: int
    """Number of passed checks."""
    problems: tuple[Diagnostic, ...] = ()
    model: LoadedModel | None = None
    """The model with its checks; None if one failed."""
    stack: str = ""
    """The stack that is wrong."""


def _try_anatomies(
    name: str,
    module: nn.Module,
    stacks: Mapping[str, BlockStack],
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    known: Proof | None,
) -> ProofAttempt:
    if (missing := _report_missing_module(name, module, stacks, span)) is not None:
        return ProofAttempt(0, (missing,))
    try:
        model = build_loaded_model(name, module, stacks, tokenizer, provenance=provenance)
    except OneOutputOnly as error:
        named = stacks[""].shape.architecture
        problem = SingleOutput(span=span, model=name, architecture=named, reason=str(error))
        return ProofAttempt(0, (problem,))
    except Exception as error:  # from the model's own forward
        reason = f"it doesn't run: {summarize_error(error)}"
        problem = LoadFailed(span=span, model=name, reason=reason)
        problem = replace(problem, hint=_explain_user_hooks(module) or problem.hint)
        if is_out_of_memory(error):
            problem = _report_out_of_memory(name, error, span)
        return ProofAttempt(0, (problem,), stack="vision" if "vision" in stacks else "")
    if known is not None:
        calling = replace(model.calling, packs=known.packs)
        model = replace(model, calling=calling, idle=known.idle)
        return _finish_model(model, known.checks, span)
    return verify_model(model, span)


def _report_missing_module(
    name: str, module: nn.Module, stacks: Mapping[str, BlockStack], span: Span | None
) -> Diagnostic | None:
    """Report E0409 if a family entry names a module for a site that doesn't exist."""
    paths = {path for path, _ in module.named_modules()}
    for stack in stacks.values():
        for parts in (stack.anatomy.taps, *(block.taps for block in stack.anatomy.blocks)):
            for site, tap in parts.items():
                if tap.path not in paths:
                    return ComponentNotFound(
                        span=span,
                        model=name,
                        architecture=stack.shape.architecture,
                        part=f"`{site}`",
                        reason=f"its entry names `{tap.path}`, which isn't a module of the model",
                    )
    return None


def _describe_environment(module: nn.Module) -> dict[str, str]:
    """Describe what the outcome of checks depends on besides config and versions."""
    first = next(module.parameters())
    return {
        "class": type(module).__name__,
        "dtype": str(first.dtype),
        "device": first.device.type,
        "attention": str(getattr(cast(Any, module).config, "_attn_implementation", "")),
        "hooks": str("_hf_hook" in module.__dict__),
    }


def summarize_error(error: Exception) -> str:
    """Return an exception's message in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def build_loaded_model(
    name: str,
    module: nn.Module,
    stacks: Mapping[str, BlockStack],
    tokenizer: TextTokenizer | None = None,
    *,
    provenance: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Build a model with an unproved anatomy; the main stack is `""`.

    Errors of the model's own forward are raised.
    """
    config: Any = cast(Any, module).config
    main = stacks[""]
    pad = getattr(config, "pad_token_id", None)
    # Padding is masked, so any id works if the config names none.
    pad_id = pad if isinstance(pad, int) and 0 <= pad < main.shape.vocab_size else 0
    accepts = frozenset(inspect.signature(module.forward).parameters)
    dtype = next(module.parameters()).dtype
    block_stacks = {
        stack: replace(s, shape=_fit_shape(s, main=not stack)) for stack, s in stacks.items()
    }
    shapes = {
        stack: limit_sites(s.shape, stack)
        for stack, s in block_stacks.items()
        if stack in STACK_SITES and not (stack == "vision" and main.shape.without_vision)
    }
    block_stacks[""] = replace(
        block_stacks[""], shape=replace(block_stacks[""].shape, others=shapes)
    )
    return probe_call(
        LoadedModel(
            name=name,
            module=module,
            anatomy=main.anatomy,
            shape=block_stacks[""].shape,
            tokenizer=tokenizer,
            pad_id=pad_id,
            device=_find_input_device(module),
            dtype=dtype,
            calling=CallConvention(accepts),
            others={stack: s for stack, s in block_stacks.items() if stack},
            provenance={
                **(provenance or {}),
                "architecture": main.shape.architecture,
                "dtype": str(dtype).removeprefix("torch."),
                "attention": str(getattr(config, "_attn_implementation", "")),
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        )
    )


def _find_input_device(module: nn.Module) -> torch.device:
    """Return the device for the model's inputs.

    It is that of the first weight, or its execution device if accelerate stores it elsewhere.
    """
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
    raise ValueError("no weight has values")


def _fit_shape(stack: BlockStack, *, main: bool) -> ModelShape:
    """Complete the shape from the modules."""
    anatomy, shape = stack.anatomy, stack.shape
    embed, final = anatomy.taps.get("embed"), anatomy.taps.get("final_norm")
    layers = {site: anatomy.layers(site) for site in anatomy.sites()}
    inside = {site: numbers for site, numbers in layers.items() if SITES[site].has_layer}
    output = {"logits"} if main and (anatomy.unembedding or shape.takes == "image") else set()
    return replace(
        shape,
        blocks=tuple(map(_fit_block, shape.blocks, anatomy.blocks)),
        d_embed=embed.layout.width if embed else shape.d_embed,
        d_final=final.layout.width if final and final.layout.width != shape.d_model else 0,
        parallel_block=anatomy.parallel,
        sites=frozenset(layers) | output,
        partly={
            site: frozenset(numbers)
            for site, numbers in inside.items()
            if len(numbers) < shape.n_layers
        },
    )


def _fit_block(sizes: BlockSizes, block: BlockAnatomy) -> BlockSizes:
    """Replace sizes of the config by those of the modules."""
    layouts = {site: tap.layout for site, tap in block.taps.items()}
    heads, keys = layouts.get("q", layouts.get("z")), layouts.get("k", layouts.get("v"))
    if heads is not None:
        sizes = replace(sizes, heads=heads.units)
    if keys is not None:
        sizes = replace(sizes, kv_heads=keys.units)
    if (key := layouts.get("k", layouts.get("q"))) is not None:
        sizes = replace(sizes, d_head=key.width)
    if (value := layouts.get("z", layouts.get("v"))) is not None:
        sizes = replace(sizes, d_value=value.width)
    if "mlp_hidden" in layouts:
        sizes = replace(sizes, neurons=layouts["mlp_hidden"].units)
    return sizes


def verify_model(model: LoadedModel, span: Span | None = None) -> ProofAttempt:
    """Verify a described model.

    Problems are E0410 for a broken identity, or W0711 for a lost shortcut.
    """
    checks: list[CheckOutcome] = []
    unmoved: list[CheckOutcome] = []
    stack = ""
    try:
        given = build_sample(model)
        for stack in ("", *model.others):
            for outcome in run_checks(model, given, stack):
                checks.append(outcome)
                if outcome.passed:
                    continue
                if outcome.identity in (PACKED_IMAGE_IDENTITY, ATTENTION_IDENTITY):
                    continue
                if outcome.asks_effect:
                    unmoved.append(outcome)
                    continue
                if outcome.identity != PACKED_IDENTITY:
                    broken = _report_broken_identity(
                        model, outcome.identity, _explain_outcome(outcome), span, outcome.hint
                    )
                    return ProofAttempt(len(checks), (broken,), stack=stack)
                if (other := retry_with_one_prompt(model, given)) is not None:
                    model, checks[-1] = other
        if unmoved:
            return _verify_random_copy(model, given, checks, unmoved[0], span)
    except Exception as error:  # an unknown architecture may raise anything
        if is_out_of_memory(error):
            problem = _report_out_of_memory(model.name, error, span)
            return ProofAttempt(len(checks), (problem,), stack=stack)
        broken = _report_broken_identity(
            model, "every site can be read and written", summarize_error(error), span
        )
        return ProofAttempt(len(checks), (broken,), stack=stack)
    return _finish_model(model, tuple(checks), span)


def _verify_random_copy(
    model: LoadedModel,
    given: Batch,
    checks: Sequence[CheckOutcome],
    unmoved: CheckOutcome,
    span: Span | None,
) -> ProofAttempt:
    """Verify a model with components that seem to have no effect.

    It is also checked on a copy with random weights, in which every component must have an effect.
    """
    outcomes = [outcome for outcome in checks if not outcome.asks_effect]
    refused = _report_broken_identity(model, unmoved.identity, _explain_outcome(unmoved), span)
    stack = ""
    try:
        stacks = {stack: model.stack(stack) for stack in ("", *model.others)}
        twin = build_loaded_model(
            model.name, build_random_copy(model.module), stacks, model.tokenizer
        )
        twin = replace(twin, calling=replace(twin.calling, packs=model.calling.packs))
        for stack in stacks:
            for outcome in run_checks(twin, build_sample(twin), stack):
                if outcome.identity in (PACKED_IDENTITY, PACKED_IMAGE_IDENTITY, ATTENTION_IDENTITY):
                    if not outcome.passed:
                        outcomes = [
                            outcome if o.identity == outcome.identity else o for o in outcomes
                        ]
                elif not outcome.passed:
                    reason = f"with random weights: {_explain_outcome(outcome)}"
                    refused = _report_broken_identity(model, outcome.identity, reason, span)
                    return ProofAttempt(len(checks), (refused,), stack=stack)
                elif outcome.asks_effect:
                    outcomes.append(
                        replace(outcome, identity=f"{outcome.identity} ({RANDOM_COPY_NOTE})")
                    )
    except Exception:  # the model can't be copied, or doesn't accept other weights
        return ProofAttempt(len(checks), (refused,), stack=stack)
    idle = [(stack, *at) for stack in stacks for at in find_idle_sites(model, given, stack)]
    return _finish_model(replace(model, idle=tuple(idle)), tuple(outcomes), span)


def _finish_model(
    model: LoadedModel, checks: tuple[CheckOutcome, ...], span: Span | None
) -> ProofAttempt:
    """Finish a model whose failed checks, if any, only cost time."""
    failed = {outcome.identity: outcome for outcome in checks if not outcome.passed}
    problems: tuple[Diagnostic, ...] = ()
    if PACKED_IDENTITY in failed:
        reason = _explain_outcome(failed[PACKED_IDENTITY])
        problems = (NotRestartable(span=span, model=model.name, reason=reason),)
    if model.idle:
        problems += (
            IdleComponents(span=span, model=model.name, parts=describe_idle_components(model)),
        )
    shapes = {  # without sites that a trial removed
        stack: limit_sites(model.others[stack].shape, stack) for stack in model.shape.others
    }
    model = replace(model, shape=replace(model.shape, others=shapes))
    if any(outcome.identity == ATTENTION_IDENTITY and outcome.passed for outcome in checks):
        model = add_attention_sites(model)
        if model.shape.encodes_apart and model.others.keys() >= required_stacks(model.shape):
            model = add_stack_attention(model, build_sample(model))
    attends = model.shape.attends_to_image or not model.shape.encodes_apart
    if "vision" in model.others.keys() & model.shape.others.keys() and attends:
        model = add_vision_attention(model, build_sample(model))
    proved = replace(
        model,
        checks=checks,
        self_check_error=max(
            (
                o.error
                for o in checks
                if o.identity in (PACKED_IDENTITY, PACKED_IMAGE_IDENTITY) and o.passed
            ),
            default=0.0,
        ),
        restartable=PACKED_IDENTITY not in failed,
    )
    return ProofAttempt(len(checks), problems, proved)


def _explain_outcome(outcome: CheckOutcome) -> str:
    where = f"{outcome.detail}: " if outcome.detail else ""
    if outcome.failure:
        return where + outcome.failure
    if isinf(outcome.error):
        return f"{where}the shapes differ, or a value is not a number"
    return f"{where}off by {outcome.error:.2g} of the value's size"


def _report_broken_identity(
    model: LoadedModel, identity: str, reason: str, span: Span | None, hint: str = ""
) -> IdentityBroken:
    problem = IdentityBroken(
        span=span,
        model=model.name,
        architecture=model.shape.architecture,
        identity=identity,
        reason=reason,
    )
    user = _explain_user_hooks(model.module) or explain_wrappers(model.module)
    return replace(problem, hint=user or hint or problem.hint)


def _report_out_of_memory(name: str, error: Exception, span: Span | None) -> LoadFailed:
    reason = f"there is no memory for the passes that check it: {summarize_error(error)}"
    hint = "free memory, or use numbers of 16 bits: `--dtype bfloat16`"
    return LoadFailed(span=span, model=name, reason=reason, hint=hint)


_HOOK_LIBRARIES = ("torch", "transformers", "accelerate", "mechdsl", "peft")
"""Libraries whose hooks a model may have."""


def _explain_user_hooks(module: nn.Module) -> str | None:
    """Return advice about the user's hooks, which probably cause failed checks; else None.

    Such hooks change the values that checks read and write.
    """
    for path, part in module.named_modules():
        tables: Any = (vars(part)["_forward_hooks"], vars(part)["_forward_pre_hooks"])
        for hook in (hook for table in tables for hook in table.values()):
            own: Any = getattr(hook, "func", hook)
            home = str(getattr(own, "__module__", None) or type(own).__module__)
            if home.partition(".")[0] not in _HOOK_LIBRARIES:
                where = f"`{path}`" if path else "the model"
                said = f"a hook of yours on {where} changes the model's computation"
                return f"{said}: remove it first, with its `handle.remove()`"
    return None


def describe_idle_components(model: LoadedModel) -> str:
    """Describe the components without effect: `mlp_norm` (layers 0, 1)."""
    layers: dict[tuple[str, str], list[int]] = {}
    for stack, site, layer in model.idle:
        layers.setdefault((stack, site), []).extend([] if layer is None else [layer])
    named = {
        f"`{site}` of `{stack}`" if stack else f"`{site}`": numbers
        for (stack, site), numbers in layers.items()
    }
    return ", ".join(f"{each} ({_describe_layers(n)})" if n else each for each, n in named.items())


def _describe_layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


_TRIAL_VECTORS = 5
"""Number of the other tower's vectors in trials of a tower."""

_SCORE_TOLERANCE, _HALF_SCORE_TOLERANCE = 1e-4, 0.02
"""Relative tolerance between scores and the model's own, in 32 and in 16 bits."""

_TEXTS_PER_PASS = 64

_IMAGES_PER_PASS = 16

CAUSAL_TEXT_MODELS = ("clip_text_model", "metaclip_2_text_model")


class Tower(nn.Module):
    """One of two towers, with the vectors of the other tower.

    Its output equals the library's `logits_per_image` or `logits_per_text`.
    """

    others: Tensor

    def __init__(self, model: Any, tower: nn.Module, projection: nn.Module | None) -> None:
        """Create the tower.

        Args:
            projection: Map into the common space, if the tower doesn't include it.
        """
        super().__init__()
        self.config = cast(Any, tower).config
        self.tower = tower
        self.projection = nn.Identity() if projection is None else projection
        self.logit_scale = cast(nn.Parameter, model.logit_scale)
        self.logit_bias = cast("nn.Parameter | None", getattr(model, "logit_bias", None))
        width = int(self.config.hidden_size)
        if projection is not None:
            width = int(cast(Any, projection).out_features)
        noise = torch.randn(_TRIAL_VECTORS, width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("others", _normalize(noise.to(self.logit_scale)), persistent=False)

    def facing(self, others: Tensor) -> Tower:
        """Copy the tower with other vectors to score against, [other, width] of length 1."""
        tower = copy(self)
        tower._buffers = {**self._buffers, "others": others}
        return tower

    def scores(self, vectors: Tensor) -> Tensor:
        """Return […, other]: scaled cosines, plus the model's bias if it has one."""
        scores = _normalize(vectors) @ self.others.T * self.logit_scale.exp()
        return scores if self.logit_bias is None else scores + self.logit_bias


class ImageTower(Tower):
    """An encoder of images."""

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        return ModelOutput(logits=self.scores(self.vectors(pixel_values)))

    def vectors(self, pixel_values: Tensor) -> Tensor:
        """Return [image, width]: vectors that are compared with the other tower's."""
        return self.projection(self.tower(pixel_values=pixel_values).pooler_output)


class TextTower(Tower):
    """An encoder of texts.

    In a causal encoder each token has scores, and those of the last one are the text's; otherwise a
    text has a single output.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> ModelOutput:
        output = self.tower(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        causal = self.config.model_type in CAUSAL_TEXT_MODELS
        made = self.projection(output.last_hidden_state if causal else output.pooler_output)
        return ModelOutput(logits=self.scores(made))

    def get_input_embeddings(self) -> nn.Module:
        return cast(Any, self.tower).embeddings.token_embedding

    def vectors(self, input_ids: Tensor) -> Tensor:
        """Return [text, width] for texts of one length."""
        return self.projection(self.tower(input_ids=input_ids).pooler_output)


def _normalize(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


# --- analysis of models ---------------------------------------------------------------------------


def build_image_tower(model: Any) -> ImageTower:
    return ImageTower(model, model.vision_model, getattr(model, "visual_projection", None))


def build_text_tower(model: Any) -> TextTower:
    return TextTower(model, model.text_model, getattr(model, "text_projection", None))


def prove_any_anatomy(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    proofs: ProofStore | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Prove a model as `prove_anatomy`; two towers give the image tower, which holds the other."""
    told: dict[str, Any] = {"provenance": provenance, "span": span, "proofs": proofs}
    if shape.texts is None:
        return prove_anatomy(name, module, shape, tokenizer, **told)
    module.eval()
    text_tokenizer = tokenizer.texts if isinstance(tokenizer, ImageTokenizer) else None
    images, problems = prove_anatomy(name, build_image_tower(module), shape, tokenizer, **told)
    texts, more = prove_anatomy(name, build_text_tower(module), shape.texts, text_tokenizer, **told)
    problems = [*problems, *more]
    if images is None or texts is None:
        return None, problems
    problem = _check_tower_scores(module, images, texts, span)
    if problem is not None:
        return None, [problem]
    return replace(images, texts=texts), problems


def _check_tower_scores(
    module: Any, images: LoadedModel, texts: LoadedModel, span: Span | None
) -> Diagnostic | None:
    """Report E0410 if the towers' scores differ from the whole model's."""
    pixels = build_image_inputs(images)["pixel_values"]
    ids = build_text_sample(texts).ids[:1]
    with torch.no_grad():
        logits_per_image = module(pixel_values=pixels, input_ids=ids).logits_per_image
        of_texts = cast(TextTower, texts.module).vectors(ids)
        of_images = cast(ImageTower, images.module).vectors(pixels)
        scores = cast(Tower, images.module).facing(_normalize(of_texts)).scores(of_images)
        other = cast(Tower, texts.module).facing(_normalize(of_images)).scores(of_texts).T
    tolerance, size = _SCORE_TOLERANCE, logits_per_image.abs().max()
    if images.dtype.itemsize <= 2:  # rounding of a cosine is relative to 1, however small it is
        tolerance, size = _HALF_SCORE_TOLERANCE, module.logit_scale.exp()
    error = float(
        max((scores - logits_per_image).abs().max(), (other - logits_per_image).abs().max()) / size
    )
    if error <= tolerance:
        return None
    return IdentityBroken(
        span=span,
        model=images.name,
        architecture=type(module).__name__,
        identity="scores of the towers = scores of the model",
        reason=f"off by {error:.2g} of their size",
    )


# --- scores against the other tower ---------------------------------------------------------------


def attach_other_tower(model: LoadedModel, context: ModelContext) -> LoadedModel:
    """Return the tower that an experiment runs, scored against the opposite tower's vectors."""
    opposite, told = context.opposite, context.shape
    assert opposite is not None
    assert model.texts is not None
    if told.side == "vision":
        own, others = model, _embed_texts(model.texts, opposite.ids)
    else:
        own, others = model.texts, _embed_images(model, opposite.pictures)
    identity = None
    if model.identity is not None:
        identity = json_digest([model.identity, told.side, opposite.digest])
    tower = cast(Tower, own.module).facing(others)
    shape = replace(
        own.shape,
        labels=told.labels,
        d_logits=told.d_logits,
        classes=told.classes,
        output_at=told.output_at,
    )
    return replace(own, module=tower, shape=shape, identity=identity)


def _embed_images(model: LoadedModel, pictures: Sequence[Picture]) -> Tensor:
    """Return [image, width] of length 1."""
    tower, reader = cast(ImageTower, model.module), model.tokenizer
    assert isinstance(reader, ImageTokenizer)
    images: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(pictures), _IMAGES_PER_PASS):
            part = pictures[start : start + _IMAGES_PER_PASS]
            made = np.stack([model_input(picture, reader.processing) for picture in part])
            pixels = torch.from_numpy(made).to(model.device, model.dtype)
            images.append(_normalize(tower.vectors(pixels)))
    return torch.cat(images)


def _embed_texts(model: LoadedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return [text, width] of length 1; texts of equal length share passes without padding."""
    tower = cast(TextTower, model.module)
    embeddings: dict[int, Tensor] = {}
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        by_length.setdefault(len(ids), []).append(number)
    with torch.no_grad():
        for numbers in by_length.values():
            for start in range(0, len(numbers), _TEXTS_PER_PASS):
                part = numbers[start : start + _TEXTS_PER_PASS]
                ids = torch.tensor([list(texts[n]) for n in part], device=model.device)
                embeddings.update(zip(part, _normalize(tower.vectors(ids)), strict=True))
    return torch.stack([embeddings[number] for number in range(len(texts))])
