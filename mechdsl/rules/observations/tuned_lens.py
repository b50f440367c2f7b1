"""The tuned lens: the logit lens behind an affine translator of each layer, from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from mechdsl.base import limits
from mechdsl.base.names import name_list
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.program.constants import constant
from mechdsl.program.named_paths import TUNED_LENS, path_to_read
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.observation import Seen
from mechdsl.resolve.resolved_rule import Convention, ResolvedRule, SiteTargets
from mechdsl.resolve.saved_tensors import SavedTensors, Unreadable, digest_of, saved_tensors
from mechdsl.rules.observations.lenses import LogitLens
from mechdsl.rules.observations.registry import every_point, observation

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = 'tuned_lens("lens.safetensors")'
SMALLER = "save fewer layers, or the numbers in 16 bits"


@observation("tuned_lens", unit="probability")
class TunedLens(LogitLens):
    """The probability of the tuned lens' most likely token.

    h + A h + b of the layer's translator goes through the model's own final norm and unembedding:
    `layer.N.weight` [d_model, d_model] and `layer.N.bias` [d_model] of the file are A and b for
    `resid_post layer N`. The last layer needs none, and goes as it is then.
    source: Belrose et al. 2023, arXiv 2303.08112
    """

    takes: ClassVar = ("arguments", "top")

    def __init__(self, lens: SavedTensors | None = None) -> None:
        """lens: None only of the entry."""
        self.path = "" if lens is None else str(lens.path)
        self.digest = "" if lens is None else lens.digest
        self.layers = () if lens is None else tuple(sorted(_layers(lens)))

    @property
    def made_of(self) -> Mapping[str, str]:
        """Its file."""
        return {Path(self.path).name: self.digest} if self.path else {}

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        found = super().resolve(rule, work)
        lens = _file(rule, work)
        if found is None or lens is None:
            return None
        assert found.sites is not None
        there = {p.layer for p in every_point(found.sites) if p.layer is not None}
        if not _fits(rule, lens, sorted(there), work):
            return None
        return replace(found, does=TunedLens(lens))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: Work) -> bool:
        other = next((p.site for p in every_point(sites) if p.site != "resid_post"), None)
        if other is None:
            return True
        reason = f"is of the stream behind each block, not of `{other}`"
        _refuse(rule, work, reason, "write `resid_post layer *`")
        return False

    def logits(self, rule: ResolvedRule, seen: Seen) -> Tensor:
        _, layer = seen.place
        vectors = seen.vectors
        assert layer is not None
        if layer in self.layers:
            weight, bias = translator(self.path, self.digest, layer)
            weight, bias = weight.to(vectors), bias.to(vectors)
            vectors = vectors + vectors @ weight.T + bias
        return seen.unembedding.logits(vectors, seen.tokens)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.sites is not None
        said = "h + A h + b of its layer through the model's own final norm and unembedding"
        file = f"{Path(self.path).name}, SHA-256 {self.digest[:12]}…"
        yield Convention("observed", f"tuned lens: {said}; A and b from {file}; measures read that")
        layers = {point.layer for point in every_point(rule.sites)}
        if n_layers - 1 in layers.difference(self.layers):
            yield Convention("last layer", "has no A and b in the file, and goes as it is")
        yield from self.said_of_list(rule)


def _file(rule: spec.Rule, work: Work) -> SavedTensors | None:
    """The file that is named; None after an error."""
    assert rule.observed is not None
    call = rule.observed.call
    arguments = () if call is None else call.arguments
    one = arguments[0] if len(arguments) == 1 and arguments[0].name is None else None
    written = None if one is None else constant(one.value, work.program.parameters)
    if call is None or not isinstance(written, str):
        _refuse(rule, work, "needs a file with its translators", f"write `{EXAMPLE}`")
        return None
    path, problems = path_to_read(TUNED_LENS, written, call.span)
    work.diagnostics.extend(each for each in problems if each not in work.diagnostics)
    if path is None:
        return None
    try:
        return saved_tensors(path, written, limits.LENS_FILE, SMALLER)
    except Unreadable as problem:
        _refuse(rule, work, f"can't use its file: {problem.reason}", problem.hint)
        return None


def _layers(lens: SavedTensors) -> Iterator[int]:
    """Those that it has a translator of."""
    for name in lens.shapes:
        _, _, number = name.removesuffix(".weight").rpartition("layer.")
        if number.isdigit() and name == f"layer.{number}.weight":
            yield int(number)


def _fits(rule: spec.Rule, lens: SavedTensors, layers: list[int], work: Work) -> bool:
    """E0207 where a layer's translator is missing, or isn't one of this model."""
    shape = work.sites.shape
    if shape.stands_in:
        return True
    width = shape.d_model
    wanted = {"weight": (width, width), "bias": (width,)}
    known = name_list(list(lens.shapes)[:6]) or "no tensors"
    for layer in layers:
        names = {part: f"layer.{layer}.{part}" for part in wanted}
        if layer == shape.n_layers - 1 and lens.shapes.keys().isdisjoint(names.values()):
            continue
        for part, size in wanted.items():
            found = lens.shapes.get(names[part])
            if found == size:
                continue
            if found is None:
                reason, hint = f"has no `{names[part]}` in its file", f"the file has {known}"
            else:
                reason = f"has the shape {list(found)} in `{names[part]}`, not {list(size)}"
                hint = "name the lens of this model"
            _refuse(rule, work, reason, hint)
            return False
    return True


def _refuse(rule: spec.Rule, work: Work, reason: str, hint: str) -> None:
    assert rule.observed is not None
    span = rule.observed.span
    found = BadArgument(span=span, name="observe tuned_lens", reason=reason, hint=hint)
    work.diagnostics.append(found)


@lru_cache(maxsize=128)
def translator(path: str, digest: str, layer: int) -> tuple[Tensor, Tensor]:
    """A [d_model, d_model] and b [d_model] of a layer. Raises ValueError where the file isn't the
    one that was checked."""
    from safetensors import safe_open

    if not _unchanged(path, digest):
        raise ValueError(f"{Path(path).name} has changed since it was checked")
    with cast("Any", safe_open)(path, framework="pt") as file:
        weight, bias = (file.get_tensor(f"layer.{layer}.{part}") for part in ("weight", "bias"))
    return weight, bias


@lru_cache(maxsize=8)
def _unchanged(path: str, digest: str) -> bool:
    return digest_of(Path(path)) == digest
