# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""A model taken apart: of the anatomies that it could have, the first that passes all checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import isinf
from typing import Any, cast

import torch
from torch import nn

from mechdsl.base.source import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import IdentityBroken, LoadFailed, OneOutput, PartNotFound
from mechdsl.diagnostics.w07_models import NoEffect, NotRestartable, StackLeftOut
from mechdsl.hooks.batch import Batch
from mechdsl.hooks.loaded import Calling, LoadedModel, Outcome, Stack
from mechdsl.loading.peft_models import unmerged
from mechdsl.loading.probe import sample, tried
from mechdsl.loading.probe_classifiers import OneOutputOnly
from mechdsl.loading.proof_store import Proof, Proofs, key_of
from mechdsl.loading.random_twin import random_twin
from mechdsl.loading.verify import (
    OPENED,
    RESTART,
    RESTART_IMAGES,
    idle_sites,
    restarted_otherwise,
    verify,
    with_sites_within,
)
from mechdsl.models.adapters import family_of
from mechdsl.models.anatomy import Anatomy
from mechdsl.models.finder import find_anatomies, stack_names
from mechdsl.models.shape import ModelShape, units, width
from mechdsl.models.shape_from_config import stack_shape
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.vocab.sites import SITES

TWIN = "of a copy with random weights"
"""What is said of a check that the model itself can't pass or fail."""


def take_apart(
    name: str,
    module: nn.Module,
    shape: ModelShape,
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    proofs: Proofs | None = None,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """The model with the first of its possible anatomies that passes the checks; else what the
    one that got furthest fails at.

    proofs: where checks that were passed before are found, and those of now are kept; only for
    weights that come straight from files.
    """
    module.eval()
    config: Mapping[str, Any] = cast(Any, module).config.to_dict()
    shapes = {"": shape}
    for stack in stack_names(shape):
        other = stack_shape(shape, config, stack)
        if other is not None:
            shapes[stack] = other
    found: dict[str, list[Anatomy]] = {}
    lost: dict[str, str] = {}

    def lose(stack: str, problem: Diagnostic | str) -> None:
        told = isinstance(problem, str)
        lost[stack] = problem if told else f"{problem.message}: {problem.label_text}"

    def left_out() -> list[Diagnostic]:
        return [
            StackLeftOut(span=span, model=name, stack=stack, reason=reason)
            for stack, reason in lost.items()
        ]

    for stack, reason in family_of(str(config.get("model_type"))).lost(config).items():
        shapes.pop(stack, None)
        lose(stack, reason)
    for stack, own in shapes.items():
        anatomies, problems = find_anatomies(
            module.named_modules(), own, stack=stack, model=name, span=span
        )
        if anatomies:
            found[stack] = anatomies
        elif not stack:
            return None, problems
        elif problems and stack != "cross":
            lose(stack, problems[0])
    key = "" if proofs is None else key_of(module, config, **_surroundings(module))
    known = None if proofs is None else proofs.find(key)
    at = dict.fromkeys(found, 0) if known is None else dict(known.chosen)
    if known is not None:
        lost = dict(known.lost)
    best: dict[str, Attempt] = {}
    while True:
        stacks = {stack: Stack(found[stack][n], shapes[stack]) for stack, n in at.items()}
        if "cross" in stacks:
            stacks["cross"] = Stack(_alike(found["cross"], stacks[""].anatomy), shapes["cross"])
        attempt = _attempt(
            name, module, stacks, tokenizer, provenance=provenance, span=span, known=known
        )
        if attempt.model is not None:
            if proofs is not None and known is None:
                model = attempt.model
                packs, idle = model.calling.packs, model.idle
                proofs.keep(key, Proof(dict(at), dict(lost), model.checks, packs, idle))
            return attempt.model, [*left_out(), *attempt.problems]
        stack = "" if attempt.stack == "cross" else attempt.stack
        if stack not in best or attempt.passed > best[stack].passed:
            best[stack] = attempt
        at[stack] += 1
        if at[stack] < len(found[stack]):
            continue
        if not stack and "vision" in at:  # perhaps it's the image that it fails on
            stack, at[""] = "vision", 0
            best.setdefault(stack, best[""])
        if not stack:
            return None, list(best[stack].problems)
        lose(stack, best[stack].problems[0])
        del at[stack]


def _alike(anatomies: list[Anatomy], main: Anatomy) -> Anatomy:
    """The one that takes blocks to be arranged as another stack does."""
    return next((a for a in anatomies if a.arrangement == main.arrangement), anatomies[0])


@dataclass(frozen=True)
class Attempt:
    """What became of one choice of anatomies."""

    passed: int
    """Checks."""
    problems: tuple[Diagnostic, ...] = ()
    model: LoadedModel | None = None
    """With its checks; None where one of them isn't passed."""
    stack: str = ""
    """That which is wrong."""


def _attempt(
    name: str,
    module: nn.Module,
    stacks: Mapping[str, Stack],
    tokenizer: TextTokenizer | None,
    *,
    provenance: Mapping[str, str],
    span: Span | None,
    known: Proof | None,
) -> Attempt:
    if (missing := _no_module(name, module, stacks, span)) is not None:
        return Attempt(0, (missing,))
    try:
        model = describe(name, module, stacks, tokenizer, provenance=provenance)
    except OneOutputOnly as error:
        named = stacks[""].shape.architecture
        problem = OneOutput(span=span, model=name, architecture=named, reason=str(error))
        return Attempt(0, (problem,))
    except Exception as error:  # whatever the model's own forward raises
        reason = f"it doesn't run: {text_of(error)}"
        problem = LoadFailed(span=span, model=name, reason=reason)
        problem = replace(problem, hint=_hook_of_the_users(module) or problem.hint)
        return Attempt(0, (problem,), stack="vision" if "vision" in stacks else "")
    if known is not None:
        calling = replace(model.calling, packs=known.packs)
        model = replace(model, calling=calling, idle=known.idle)
        return _with_checks(model, known.checks, span)
    return prove(model, span)


def _no_module(
    name: str, module: nn.Module, stacks: Mapping[str, Stack], span: Span | None
) -> Diagnostic | None:
    """E0409 for a site whose tensor an entry of a family looks for at a module that isn't there."""
    paths = {path for path, _ in module.named_modules()}
    for own in stacks.values():
        for parts in (own.anatomy.taps, *(block.taps for block in own.anatomy.blocks)):
            for site, tap in parts.items():
                if tap.path not in paths:
                    return PartNotFound(
                        span=span,
                        model=name,
                        architecture=own.shape.architecture,
                        part=f"`{site}`",
                        reason=f"its entry names `{tap.path}`, which is no module of the model",
                    )
    return None


def _surroundings(module: nn.Module) -> dict[str, str]:
    """What the outcome of checks hangs on beside config and versions."""
    first = next(module.parameters())
    return {
        "class": type(module).__name__,
        "dtype": str(first.dtype),
        "device": first.device.type,
        "attention": str(getattr(cast(Any, module).config, "_attn_implementation", "")),
        "hooks": str("_hf_hook" in module.__dict__),
    }


def text_of(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def describe(
    name: str,
    module: nn.Module,
    stacks: Mapping[str, Stack],
    tokenizer: TextTokenizer | None = None,
    *,
    provenance: Mapping[str, str] | None = None,
) -> LoadedModel:
    """A model with an anatomy that nothing has been proved about yet; the main stack is `""`.

    Raises what the model's own forward raises.
    """
    config: Any = cast(Any, module).config
    main = stacks[""]
    pad = getattr(config, "pad_token_id", None)
    # Padding is masked, so any id will do where the config names none.
    pad_id = pad if isinstance(pad, int) and 0 <= pad < main.shape.vocab_size else 0
    accepts = frozenset(inspect.signature(module.forward).parameters)
    dtype = next(module.parameters()).dtype
    own = {stack: replace(s, shape=_fitted(s, main=not stack)) for stack, s in stacks.items()}
    return tried(
        LoadedModel(
            name=name,
            module=module,
            anatomy=main.anatomy,
            shape=own[""].shape,
            tokenizer=tokenizer,
            pad_id=pad_id,
            device=_entrance(module),
            dtype=dtype,
            calling=Calling(accepts),
            others={stack: s for stack, s in own.items() if stack},
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


def _entrance(module: nn.Module) -> torch.device:
    """Where the model wants its inputs: where its first weight is, or, of weights that accelerate
    has spread, where it runs them."""
    hook = module.__dict__.get("_hf_hook")
    runs = getattr(hook, "execution_device", None)
    if runs is not None:
        return torch.device(runs)
    return next(weight.device for weight in module.parameters() if not weight.is_meta)


def _fitted(stack: Stack, *, main: bool) -> ModelShape:
    """The shape with what the modules show of it."""
    anatomy, shape = stack.anatomy, stack.shape
    embed, final = anatomy.taps.get("embed"), anatomy.taps.get("final_norm")
    layers = {site: anatomy.layers(site) for site in anatomy.sites()}
    inside = {site: numbers for site, numbers in layers.items() if SITES[site].has_layer}
    neurons = next(
        (b.taps["mlp_hidden"].layout.units for b in anatomy.blocks if "mlp_hidden" in b.taps),
        shape.d_mlp,
    )
    output = {"logits"} if main and (anatomy.unembedding or shape.takes == "image") else set()
    shape = replace(shape, d_mlp=neurons)
    sizes = {
        (site, layer): (block.taps[site].layout.units, block.taps[site].layout.width)
        for site in ("q", "k", "v", "z", "head_out", "mlp_hidden")
        for layer, block in enumerate(anatomy.blocks)
        if site in block.taps
    }
    return replace(
        shape,
        sizes={
            (site, layer): size
            for (site, layer), size in sizes.items()
            if size != (units(shape, site), width(shape, site))
        },
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


def prove(model: LoadedModel, span: Span | None = None) -> Attempt:
    """Verify a described model: its problems are E0410 for the identity that broke or W0711 for a
    lost shortcut."""
    checks: list[Outcome] = []
    unmoved: list[Outcome] = []
    stack = ""
    try:
        given = sample(model)
        for stack in ("", *model.others):
            for outcome in verify(model, given, stack):
                checks.append(outcome)
                if outcome.passed:
                    continue
                if outcome.identity in (RESTART_IMAGES, OPENED):
                    continue
                if outcome.asks_effect:
                    unmoved.append(outcome)
                    continue
                if outcome.identity != RESTART:
                    broken = _broken(model, outcome.identity, _reason(outcome), span)
                    return Attempt(len(checks), (broken,), stack=stack)
                if (other := restarted_otherwise(model, given)) is not None:
                    model, checks[-1] = other
        if unmoved:
            return _with_effects(model, given, checks, unmoved[0], span)
    except Exception as error:  # a model that is built otherwise raises what it likes
        broken = _broken(model, "every site can be read and written", text_of(error), span)
        return Attempt(len(checks), (broken,), stack=stack)
    return _with_checks(model, tuple(checks), span)


def _with_effects(
    model: LoadedModel,
    given: Batch,
    checks: Sequence[Outcome],
    unmoved: Outcome,
    span: Span | None,
) -> Attempt:
    """A model with parts that do nothing, as far as the checks saw: proved on a copy with random
    weights too, on which every part has to do something."""
    own = [outcome for outcome in checks if not outcome.asks_effect]
    refused = _broken(model, unmoved.identity, _reason(unmoved), span)
    stack = ""
    try:
        stacks = {stack: model.stack(stack) for stack in ("", *model.others)}
        twin = describe(model.name, random_twin(model.module), stacks, model.tokenizer)
        twin = replace(twin, calling=replace(twin.calling, packs=model.calling.packs))
        for stack in stacks:
            for outcome in verify(twin, sample(twin), stack):
                if outcome.identity in (RESTART, RESTART_IMAGES, OPENED):
                    if not outcome.passed:
                        own = [outcome if o.identity == outcome.identity else o for o in own]
                elif not outcome.passed:
                    reason = f"with random weights in place of its own: {_reason(outcome)}"
                    refused = _broken(model, outcome.identity, reason, span)
                    return Attempt(len(checks), (refused,), stack=stack)
                elif outcome.asks_effect:
                    own.append(replace(outcome, identity=f"{outcome.identity} ({TWIN})"))
    except Exception:  # a model that can't be copied, or that takes no other weights
        return Attempt(len(checks), (refused,), stack=stack)
    idle = [(stack, *at) for stack in stacks for at in idle_sites(model, given, stack)]
    return _with_checks(replace(model, idle=tuple(idle)), tuple(own), span)


def _with_checks(model: LoadedModel, checks: tuple[Outcome, ...], span: Span | None) -> Attempt:
    """A model that passed its checks, all but those that only cost time."""
    failed = {outcome.identity: outcome for outcome in checks if not outcome.passed}
    found: tuple[Diagnostic, ...] = ()
    if RESTART in failed:
        reason = _reason(failed[RESTART])
        found = (NotRestartable(span=span, model=model.name, reason=reason),)
    if model.idle:
        found += (NoEffect(span=span, model=model.name, parts=idle_parts(model)),)
    if any(outcome.identity == OPENED and outcome.passed for outcome in checks):
        model = with_sites_within(model)
    proved = replace(
        model,
        checks=checks,
        self_check_error=max(
            (o.error for o in checks if o.identity in (RESTART, RESTART_IMAGES) and o.passed),
            default=0.0,
        ),
        restartable=RESTART not in failed,
    )
    return Attempt(len(checks), found, proved)


def _reason(outcome: Outcome) -> str:
    where = f"{outcome.detail}: " if outcome.detail else ""
    if outcome.failure:
        return where + outcome.failure
    if isinf(outcome.error):
        return f"{where}the shapes differ, or a value is not a number"
    return f"{where}off by {outcome.error:.2g} of the value's size"


def _broken(model: LoadedModel, identity: str, reason: str, span: Span | None) -> IdentityBroken:
    problem = IdentityBroken(
        span=span,
        model=model.name,
        architecture=model.shape.architecture,
        identity=identity,
        reason=reason,
    )
    hint = _hook_of_the_users(model.module) or unmerged(model.module) or problem.hint
    return replace(problem, hint=hint)


_LIBRARIES = ("torch", "transformers", "accelerate", "mechdsl", "peft")
"""Whose hooks a model may have by itself."""


def _hook_of_the_users(module: nn.Module) -> str | None:
    """What to do where hooks of the user's are on the model, most likely the cause: they change
    what checks read and write."""
    for path, part in module.named_modules():
        tables: Any = (vars(part)["_forward_hooks"], vars(part)["_forward_pre_hooks"])
        for hook in (hook for table in tables for hook in table.values()):
            own: Any = getattr(hook, "func", hook)
            home = str(getattr(own, "__module__", None) or type(own).__module__)
            if home.partition(".")[0] not in _LIBRARIES:
                where = f"`{path}`" if path else "the model"
                said = f"a hook of yours on {where} changes what the model computes"
                return f"{said}: remove it first, with its `handle.remove()`"
    return None


def idle_parts(model: LoadedModel) -> str:
    """The parts without effect: `mlp_norm` (layers 0, 1)."""
    layers: dict[tuple[str, str], list[int]] = {}
    for stack, site, layer in model.idle:
        layers.setdefault((stack, site), []).extend([] if layer is None else [layer])
    named = {
        f"`{site}` of `{stack}`" if stack else f"`{site}`": numbers
        for (stack, site), numbers in layers.items()
    }
    return ", ".join(f"{each} ({_in_layers(n)})" if n else each for each, n in named.items())


def _in_layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
