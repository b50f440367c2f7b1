"""Copies of models with changed weights: edited and rounded models, and sums of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import BadModelSum
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.forward.hooks.model import BASE_PREFIX, LoadedModel
from mechdsl.forward.hooks.module_exchange import get_activation
from mechdsl.loading.anatomy_proof import ProofStore, prove_anatomy, summarize_error
from mechdsl.loading.identity import compute_identity
from mechdsl.models.block import is_transposed
from mechdsl.models.folder import json_digest
from mechdsl.models.shape import BlockAnatomy, HookPoint, TensorLayout
from mechdsl.program import spec
from mechdsl.resolve.bases import MAPPED_SITES

MAX_WIDENED = 1 << 24
"""Numbers of a matrix that are converted to float64 at once."""

STREAM_TOLERANCE = 1e-3
"""How large a component along a direction that is taken out of all weights may remain, relative to
the stream: rounding of half precision."""


class NotCopied(Exception):
    """Raised with the reason why a model's weights can't be changed in a copy."""


EditKind = Literal["scale", "set", "add", "project out", "round"]


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """One change of a model's weights."""

    kind: EditKind
    span: Span
    site: str = ""
    """`attn_out` or `mlp_out`; empty for `project out` and `round`, which change all weights."""
    layer: int = 0
    numbers: tuple[int, ...] = ()
    """Numbers of the vector of all heads or neurons whose output weights change; empty for all."""
    amount: float = 1.0
    """scale: the factor."""
    bits: int = 0
    """round: bits of a weight."""
    vector: Tensor | None = None
    """[d_model] float64: the weights of each number, what is added to them, or the direction that
    is taken out."""

    @property
    def instead(self) -> str:
        """What to do if weights can't be changed like this."""
        if self.kind == "round":
            return "round the weights in Python, and pass the model: `mechdsl.run(…, models=…)`"
        return "use the rule in an experiment, without `with { … }`"


class _Unsuitable(Exception):
    """Raised with the reason why an edit can't be applied."""

    def __init__(self, edit: WeightEdit, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.edit, self.reason, self.hint = edit, reason, hint


def build_edited_model(
    model: spec.Model, base: LoadedModel, edits: Sequence[WeightEdit], *, hashes: bool
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Copy a model and change the copy's weights, in order; the base is unchanged.

    Args:
        hashes: Whether the changed weights are hashed for the model's identity.

    Returns:
        The model and its diagnostics: E0344, E0410, and those of `prove_anatomy`.
    """
    changed = _ChangedWeights(base.module)
    try:
        for edit in edits:
            if edit.kind == "project out":
                _project_out(edit, base, changed)
                _check_stream(edit, base, copy_with_weights(base.module, changed.tensors))
            elif edit.kind == "round":
                _round_all(edit, base, changed)
            else:
                _change_outputs(edit, base, changed)
        module = copy_with_weights(base.module, changed.tensors)
    except _Unsuitable as problem:
        return None, [BadWeights(span=problem.edit.span, reason=problem.reason, hint=problem.hint)]
    except NotCopied as problem:
        hint = "edit the weights in Python, and pass the model: `mechdsl.run(…, models=…)`"
        return None, [BadWeights(span=model.span, reason=str(problem), hint=hint)]
    return _finish(model, [(base, 1.0)], module, changed.tensors, hashes=hashes)


def _finish(
    model: spec.Model,
    terms: Sequence[tuple[LoadedModel, float]],
    module: nn.Module,
    changed: Mapping[str, Tensor],
    *,
    hashes: bool,
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Prove a changed copy, and identify it by its bases and its changed weights."""
    base = terms[0][0]
    digests = {name: _digest(tensor) for name, tensor in changed.items()} if hashes else {}
    weights = {name: own.provenance.get("weights", "") for own, _ in terms for name in [own.name]}
    identity = None
    identities = [[compute_identity(own), factor] for own, factor in terms] if hashes else []
    if identities and all(own is not None for own, _ in identities):
        parts = {"of": model.kind, "bases": identities, "changed": digests}
        identity = json_digest(parts)
    loaded, problems = prove_anatomy(
        model.name,
        module,
        base.shape,
        base.tokenizer,
        provenance={
            **({"weights": json_digest({"bases": weights, "changed": digests})} if hashes else {}),
            "source": model.source,
            "tokenizer": "" if base.tokenizer is None else base.tokenizer.hash,
            **{key: name for each, _ in terms for key, name in each.made_of.items()},
            **{f"{BASE_PREFIX}{name}": weight for name, weight in weights.items()},
        },
        span=model.span,
        proofs=None if identity is None else ProofStore(content=identity),
    )
    if loaded is not None:
        loaded = replace(loaded, identity=identity)
    return loaded, problems


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


# --- edits ----------------------------------------------------------------------------------------


class _ChangedWeights:
    """New values of parameters, by name; the first change of one copies it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors: dict[str, Tensor] = {}

    def of(self, path: str, name: str) -> Tensor | None:
        """Return a parameter to change in place; None if the module has none of that name."""
        key = f"{path}.{name}"
        if key not in self.tensors:
            parameter = dict(self.module.get_submodule(path).named_parameters(recurse=False)).get(
                name
            )
            if parameter is None:
                return None
            self.tensors[key] = parameter.detach().clone()
        return self.tensors[key]


def _matrix(path: str, edit: WeightEdit, changed: _ChangedWeights) -> Tensor:
    """Return the weights of a linear map as [input, output]. Raises _Unsuitable."""
    module = changed.module.get_submodule(path)
    known = type(module).__module__.startswith(("torch.nn.", "transformers."))
    plain = known and (isinstance(module, nn.Linear) or is_transposed(module))
    weight = changed.of(path, "weight") if plain else None
    if weight is None or not weight.is_floating_point():
        raise _Unsuitable(
            edit,
            f"`{path}` is a `{type(module).__name__}`, whose weights can't be edited",
            edit.instead,
        )
    return weight if is_transposed(module) else weight.T


def find_output_map(block: BlockAnatomy, site: str) -> tuple[str, HookPoint] | None:
    """Return the linear map from heads or neurons to `attn_out` or `mlp_out`; None without one.

    Returns:
        The path of its module, and the tap of the heads or neurons that are its input.
    """
    path = block.output if site == "attn_out" else block.down
    tap = block.taps.get(MAPPED_SITES[site])
    if path is None or tap is None or (tap.path, tap.side) != (path, "in"):
        return None
    return path, tap


def _change_outputs(edit: WeightEdit, base: LoadedModel, changed: _ChangedWeights) -> None:
    """Change output weights of heads or neurons. Raises _Unsuitable."""
    output_map = find_output_map(base.anatomy.blocks[edit.layer], edit.site)
    if output_map is None:
        reads = MAPPED_SITES[edit.site]
        raise _Unsuitable(
            edit,
            f"`{edit.site}` of layer {edit.layer} isn't a linear map of `{reads}`",
            "name a layer whose heads or neurons have output weights",
        )
    path, tap = output_map
    matrix = _matrix(path, edit, changed)
    index = torch.tensor(_list_features(tap.layout), device=matrix.device)
    if edit.numbers:
        index = index[torch.tensor(edit.numbers, device=matrix.device)]
    wide = matrix[index].double()
    if edit.kind == "scale":
        wide = wide * edit.amount
    else:
        assert edit.vector is not None
        vector = edit.vector.to(wide)
        wide = vector.expand_as(wide) if edit.kind == "set" else wide + vector
    matrix[index] = wide.to(matrix)


def _list_features(layout: TensorLayout) -> list[int]:
    """List the features of a flat tensor, unit by unit."""
    features: list[int] = []
    for unit in range(layout.units):
        begin = layout.offset + unit // layout.group * layout.stride
        begin += unit % layout.group * layout.width
        features.extend(range(begin, begin + layout.width))
    return features


def _project_out(edit: WeightEdit, base: LoadedModel, changed: _ChangedWeights) -> None:
    """Take a direction out of all weights that write to the stream. Raises _Unsuitable."""
    assert edit.vector is not None
    length = edit.vector.norm()
    unit = edit.vector / length if length > 0 else edit.vector
    for path in _find_embeddings(base):
        weight = changed.of(path, "weight")
        assert weight is not None
        _remove(weight, unit)
    for block in base.anatomy.blocks:
        experts = _find_experts(base, block) if block.down is None else []
        for site, path in (
            ("attn_out", block.output),
            ("mlp_out", block.down),
            ("mixer_out", None),
        ):
            if site in block.taps and path is None and not (site == "mlp_out" and experts):
                reason = f"the weights from which `{block.path}` computes `{site}` aren't known"
                raise _Unsuitable(edit, reason, edit.instead)
        for path in (block.output, block.down):
            if path is not None:
                _remove(_matrix(path, edit, changed), unit)
                _remove_bias(changed.of(path, "bias"), unit)
        for path in experts:
            if isinstance(base.module.get_submodule(path), nn.Linear):
                _remove(_matrix(path, edit, changed), unit)
                _remove_bias(changed.of(path, "bias"), unit)
                continue
            for expert in _matrices_of_experts(path, edit, changed):
                _remove(expert, unit)
            _remove_bias(changed.of(path, f"{EXPERT_WEIGHTS}_bias"), unit)


EXPERT_WEIGHTS = "down_proj"
"""The name, in transformers, of the output weights of experts: a parameter [expert, …] of a module
for all of them, or a linear map in a shared one. `_check_stream` proves that nothing is missing."""


def _find_experts(base: LoadedModel, block: BlockAnatomy) -> list[str]:
    """List the modules in a block with output weights of experts, routed and shared ones."""
    return [
        f"{block.path}.{path}"
        for path, part in base.module.get_submodule(block.path).named_modules()
        if (isinstance(part, nn.Linear) and path.endswith(f".{EXPERT_WEIGHTS}"))
        or EXPERT_WEIGHTS in dict(part.named_parameters(recurse=False))
    ]


def _matrices_of_experts(path: str, edit: WeightEdit, changed: _ChangedWeights) -> Tensor:
    """Return the output weights of all experts as [expert, input, output]. Raises _Unsuitable."""
    weight = changed.of(path, EXPERT_WEIGHTS)
    assert weight is not None
    if weight.dim() != 3 or not weight.is_floating_point():
        reason = f"`{path}.{EXPERT_WEIGHTS}` isn't one matrix for each expert"
        raise _Unsuitable(edit, reason, edit.instead)
    module = changed.module.get_submodule(path)
    return weight if getattr(module, "is_transposed", False) else weight.mT


def _remove_bias(bias: Tensor | None, unit: Tensor) -> None:
    if bias is not None:
        _remove(bias.view(-1, len(unit)), unit)


def explain_projection(model: LoadedModel) -> str | None:
    """Explain why vectors without a direction aren't what a model would write whose weights lack
    it; None if they are. The input of the first block is compared with the embeddings of some
    tokens."""
    for block in model.anatomy.blocks:
        norms = (("attn_out", block.attn_output_norm), ("mlp_out", block.mlp_output_norm))
        for site, norm in norms:
            tap = block.taps.get(site)
            between = norm or (None if tap is None else tap.scaled_by)
            if tap is not None and between is not None:
                return f"`{between}` is between the weights and the stream"
        if "mixer_out" in block.taps:
            return f"the weights from which `{block.path}` computes `mixer_out` aren't known"
    written: list[Tensor] = []
    first: list[Tensor] = []

    def record(part: nn.Module, args: Any, output: Tensor) -> None:
        written.append(output.detach())

    def look(part: nn.Module, args: Any, kwargs: Any) -> None:
        first.append(get_activation(args, kwargs).detach())

    parts = map(model.module.get_submodule, _find_embeddings(model))
    handles = [part.register_forward_hook(record) for part in parts]
    block = model.module.get_submodule(model.anatomy.blocks[0].path)
    handles.append(block.register_forward_pre_hook(look, with_kwargs=True))
    try:
        count = min(16, model.shape.vocab_size)
        with torch.no_grad():
            model.module(torch.arange(count, device=model.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    stream = first[0].double().flatten()
    columns = [own.double().expand_as(first[0]).flatten() for own in written]
    if columns:
        terms = torch.stack(columns, dim=1)
        stream = stream - terms @ torch.linalg.lstsq(terms, stream).solution
    rest = float(stream.norm() / first[0].double().norm())
    if rest > max(STREAM_TOLERANCE, 4 * torch.finfo(model.dtype).eps):
        return f"{rest:.0%} of what the first block reads isn't a sum of embeddings"
    return None


def _find_embeddings(base: LoadedModel) -> list[str]:
    """List the embeddings that are added to the stream: of tokens, positions and segments."""
    blocks = tuple(f"{block.path}." for block in base.anatomy.blocks)
    return [
        path
        for path, part in base.module.named_modules()
        if isinstance(part, nn.Embedding)
        and part.weight.shape[1] == base.shape.d_model
        and not path.startswith(blocks)
        and path != base.anatomy.unembedding
    ]


def _remove(rows: Tensor, unit: Tensor) -> None:
    """Remove the component along a direction from [row, d_model], in place."""
    unit = unit.to(rows.device)
    step = max(1, MAX_WIDENED // rows.shape[1])
    for part in rows.split(step):
        wide = part.double()
        part.copy_(wide - torch.outer(wide @ unit, unit))


def _check_stream(edit: WeightEdit, base: LoadedModel, module: nn.Module) -> None:
    """Check on some tokens that nothing writes along a direction. Raises _Unsuitable."""
    assert edit.vector is not None
    tensors: list[Tensor] = []

    def look(part: nn.Module, args: Any, kwargs: Any) -> None:
        tensors.append(get_activation(args, kwargs).detach())

    paths = [block.path for block in base.anatomy.blocks]
    parts = [module.get_submodule(path) for path in paths]
    if base.anatomy.final_norm is not None:
        parts.append(module.get_submodule(base.anatomy.final_norm))
    handles = [part.register_forward_pre_hook(look, with_kwargs=True) for part in parts]
    try:
        count = min(16, base.shape.vocab_size)
        with torch.no_grad():
            module(torch.arange(count, device=base.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    for number, stream in enumerate(tensors):
        wide = stream.double()
        along = (wide @ (edit.vector / edit.vector.norm()).to(wide)).abs()
        size = wide.norm(dim=-1)
        if bool((along > STREAM_TOLERANCE * size.clamp(min=1e-6)).any()):
            place = "the last block" if number == len(paths) else f"block {number}"
            raise _Unsuitable(
                edit,
                f"the stream at {place} still has a component along the direction",
                edit.instead,
            )


# --- sums -----------------------------------------------------------------------------------------


def build_sum(
    model: spec.Model, terms: Sequence[tuple[LoadedModel, float]], *, hashes: bool
) -> tuple[LoadedModel | None, list[Diagnostic]]:
    """Add models with factors, weight by weight.

    Args:
        terms: The models with their factors; those of equal weights in all models are kept.
        hashes: As in `build_edited_model`.

    Returns:
        The model and its diagnostics: E0457, and those of `prove_anatomy`.
    """
    try:
        changed = _add_weights(terms)
        module = copy_with_weights(terms[0][0].module, changed)
    except NotCopied as problem:
        hint = "add models of the same architecture and size, such as checkpoints of one training"
        return None, [
            BadModelSum(span=model.span, model=model.name, reason=str(problem), hint=hint)
        ]
    return _finish(model, terms, module, changed, hashes=hashes)


def _add_weights(terms: Sequence[tuple[LoadedModel, float]]) -> dict[str, Tensor]:
    """Return the weights of a sum that differ from those of its first model. Raises NotCopied."""
    first, *others = (model for model, _ in terms)
    names = dict(first.module.named_parameters(remove_duplicate=False))
    for other in others:
        _check_same_parts(first, other)
    shared: dict[tuple[int, ...], Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name in names:
        parts = [model.module.get_parameter(name) for model, _ in terms]
        key = tuple(map(id, parts))
        if key not in shared:
            shared[key] = _weighted_sum(name, parts, [factor for _, factor in terms])
        weights[name] = shared[key]
    return weights


def _weighted_sum(name: str, parts: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    if not all(part.is_floating_point() for part in parts):
        raise NotCopied(f"`{name}` isn't a tensor of floats")
    result = torch.empty_like(parts[0])
    rows = [part.detach().flatten() for part in parts]
    out = result.view(-1)
    for begin in range(0, out.numel(), MAX_WIDENED):
        here = slice(begin, begin + MAX_WIDENED)
        total = torch.zeros_like(rows[0][here], dtype=torch.float64)
        for part, factor in zip(rows, factors, strict=True):
            total += factor * part[here].to(total)
        out[here] = total.to(out)
    return result


def _check_same_parts(first: LoadedModel, other: LoadedModel) -> None:
    """Check that two models have the same weights by name, size and precision. Raises NotCopied."""
    pairs = f"`{first.name}` and `{other.name}`"
    if first.dtype != other.dtype:
        raise NotCopied(f"{pairs} have different precision: {first.dtype} and {other.dtype}")
    for what in ("named_parameters", "named_buffers"):
        mine, theirs = (
            dict(getattr(model.module, what)(remove_duplicate=False)) for model in (first, other)
        )
        lacking = sorted(mine.keys() ^ theirs.keys())
        if lacking:
            raise NotCopied(f"only one of {pairs} has `{lacking[0]}`")
        for name, own in mine.items():
            if own.shape != theirs[name].shape:
                sizes = f"{list(own.shape)} and {list(theirs[name].shape)}"
                raise NotCopied(f"`{name}` has the sizes {sizes} in {pairs}")
            if what == "named_buffers" and not torch.equal(own, theirs[name].to(own)):
                raise NotCopied(f"the constants `{name}` of {pairs} differ")


# --- rounded weights ------------------------------------------------------------------------------


def _round_all(edit: WeightEdit, base: LoadedModel, changed: _ChangedWeights) -> None:
    """Round the weights of all linear maps in the blocks of a model.

    The weights of an output w become s · round(w / s) with s = max |w| / (2^(bits − 1) − 1):
    symmetric rounding to the nearest, one scale for each output, as in absmax quantization
    (Dettmers et al. 2022, arXiv 2208.07339, section 2). Biases, norms, embeddings and the
    unembedding stay, and so does the precision of the arithmetic.
    """
    for path in _list_linear_maps(base, edit):
        _round(_matrix(path, edit, changed), edit.bits)


def _list_linear_maps(base: LoadedModel, edit: WeightEdit) -> list[str]:
    """List the paths of linear maps in blocks. Raises _Unsuitable for other matrices of weights."""
    linear_maps: list[str] = []
    for block in base.anatomy.blocks:
        for path, part in base.module.get_submodule(block.path).named_modules(prefix=block.path):
            parameters = dict(part.named_parameters(recurse=False))
            if isinstance(part, nn.Linear) or is_transposed(part):
                linear_maps.append(path)
            elif isinstance(part, nn.Embedding):
                continue
            elif name := next(
                (name for name, parameter in parameters.items() if parameter.dim() > 1), None
            ):
                raise _Unsuitable(
                    edit,
                    f"`{path}.{name}` is a matrix of `{type(part).__name__}`, not of a linear map",
                    edit.instead,
                )
    return linear_maps


def _round(weight: Tensor, bits: int) -> None:
    """Round [input, output] in place, with a scale for each output."""
    levels = 2 ** (bits - 1) - 1
    step = max(1, MAX_WIDENED // weight.shape[0])
    for part in weight.split(step, dim=1):
        wide = part.double()
        scale = wide.abs().amax(dim=0).clamp(min=torch.finfo(torch.float64).tiny) / levels
        part.copy_((wide / scale).round() * scale)


# --- copies ---------------------------------------------------------------------------------------


def copy_with_weights(module: nn.Module, changed: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model over shared storage, with new values of some parameters.

    Equal tensors stay one parameter. If a changed parameter was shared with an unchanged one, such
    as an embedding with the unembedding, the copy's config no longer ties them.

    Args:
        changed: Name of a parameter → its new values.

    Raises:
        NotCopied: The weights aren't all in memory, or the module can't be copied.
    """
    if any("_hf_hook" in part.__dict__ for part in module.modules()):
        raise NotCopied("the weights of the base are distributed over devices, memory or a folder")
    copy = copy_modules(module, ())
    made: dict[int, nn.Parameter] = {}
    for name, tensor in changed.items():
        path, _, own = name.rpartition(".")
        parameter = made.setdefault(id(tensor), nn.Parameter(tensor, False))
        copy.get_submodule(path).register_parameter(own, parameter)
    before = _shared_groups(module)
    if not before <= _shared_groups(copy):
        _untie(copy)
    return copy


def _shared_groups(module: nn.Module) -> set[frozenset[str]]:
    """Return the sets of names of parameters that several names share."""
    groups: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def _untie(module: nn.Module) -> None:
    """Record in a model's configs that embedding and unembedding are separate."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None:
            configs[id(config)] = config
    for config in configs.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def copy_modules(module: nn.Module, changed: Iterable[str]) -> nn.Module:
    """Copy modules over shared storage, except for the parameters of changed modules.

    Changes then reach neither the base nor modules that share weights with a changed one.

    Raises:
        NotCopied: The module contains objects that can't be copied.
    """
    known: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    # Separate parameters, because peft freezes the ones that it is given.
    known |= {
        id(parameter): nn.Parameter(parameter.detach(), False) for parameter in module.parameters()
    }
    known |= {id(hook): hook for hook in _iter_foreign_hooks(module)}
    try:
        copy = deepcopy(module, known)
    except Exception as error:  # the model may contain arbitrary objects
        reason = f"`copy.deepcopy` can't copy the base: {summarize_error(error)}"
        raise NotCopied(reason) from None
    for path in changed:
        part = copy.get_submodule(path)
        for name, parameter in list(part.named_parameters(recurse=False)):
            part.register_parameter(name, nn.Parameter(parameter.detach().clone(), False))
    return copy


def _iter_foreign_hooks(module: nn.Module) -> Iterator[object]:
    """Yield hooks of forward passes that aren't methods of the model's own modules.

    They and their state don't belong to the model, so they aren't copied.
    """
    parts = {id(part) for part in module.modules()}
    for part in module.modules():
        for table in ("_forward_pre_hooks", "_forward_hooks"):
            for hook in vars(part)[table].values():
                if id(getattr(hook, "__self__", hook)) not in parts:
                    yield hook
