"""The tuned lens: an affine map of each layer before the logit lens, from a file or trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from mechdsl.base import limits
from mechdsl.base.files import SafetensorsFile, UnreadableFile, compute_digest, inspect_safetensors
from mechdsl.base.text import name_list
from mechdsl.program import spec
from mechdsl.program.paths import TUNED_LENS_PATH, path_to_read
from mechdsl.program.spec import constant_value
from mechdsl.resolve.observations import ObservedVectors
from mechdsl.resolve.probes import resolve_lens
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import Convention, Intervention, ResolvedRule, SiteTargets, TrainedLens
from mechdsl.rules.observations.registry import iter_points, observation, report_bad_observation
from mechdsl.rules.observations.vectors import LogitLens
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

LENS_EXAMPLE = 'tuned_lens("lens.safetensors")'

SMALLER_FILE_HINT = "save fewer layers, or the numbers in 16 bits"


@observation("tuned_lens", unit="probability")
class TunedLens(LogitLens):
    """The probability of the tuned lens' most likely token.

    h + A h + b of the layer's translator goes through the model's own final norm and unembedding:
    `layer.N.weight` [d_model, d_model] and `layer.N.bias` [d_model] of the file are A and b for
    `resid_post layer N`. The last layer needs none, and goes as it is then. A name instead of a
    file is a `lens` that `mechdsl fit` trains.
    source: Belrose et al. 2023, arXiv 2303.08112
    """

    takes: ClassVar = ("arguments", "top")

    def __init__(self, lens: SafetensorsFile | TrainedLens | None = None) -> None:
        """Create the observation; `lens` is None only in the registered instance."""
        self.path = "" if lens is None else str(lens.path)
        self.digest = "" if lens is None else lens.digest
        self.layers: tuple[int, ...] = ()
        self._declared = lens if isinstance(lens, TrainedLens) else None
        if isinstance(lens, TrainedLens):
            self.layers = lens.training.layers
        elif lens is not None:
            self.layers = tuple(sorted(_translated_layers(lens)))

    @property
    def identity(self) -> tuple[object, ...]:
        return type(self), self.name, self.digest, self.layers

    @property
    def trained(self) -> TrainedLens | None:
        return self._declared

    @property
    def untrained(self) -> tuple[Intervention, str] | None:
        return None if self._declared is None else (LogitLens(), "logit lens")

    @property
    def made_of(self) -> Mapping[str, str]:
        """SHA-256 of the file, by name."""
        return {Path(self.path).name: self.digest} if self.path else {}

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        resolved, names = super().resolve(rule, work), rule.observed.bases
        lens = resolve_lens(names[0], work) if names else _read_lens_file(rule, work)
        if resolved is None or lens is None:
            return None
        assert resolved.sites is not None
        there = {p.layer for p in iter_points(resolved.sites) if p.layer is not None}
        if isinstance(lens, TrainedLens):
            fits = _check_layers(rule, lens, sorted(there), work)
        else:
            fits = _check_translators(rule, lens, sorted(there), work)
        return replace(resolved, does=TunedLens(lens)) if fits else None

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        other = next((p.site for p in iter_points(sites) if p.site != "resid_post"), None)
        if other is None:
            return True
        reason = f"reads the stream after each block, not `{other}`"
        report_bad_observation(rule, work, reason, "write `resid_post layer *`")
        return False

    def logits(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        _, layer = seen.place
        vectors = seen.vectors
        assert layer is not None
        if layer in self.layers:
            weight, bias = load_translator(self.path, self.digest, layer)
            weight, bias = weight.to(vectors), bias.to(vectors)
            vectors = vectors + vectors @ weight.T + bias
        return seen.unembedding.logits(vectors, seen.tokens)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.sites is not None
        said = (
            "h + A h + b of its layer through the model's final norm, if it has one, and its "
            "unembedding"
        )
        trained, origin = self._declared, f"{Path(self.path).name}, SHA-256 {self.digest[:12]}…"
        origin = origin if trained is None else f"`{trained.training.definition}`"
        yield Convention(
            "observed", f"tuned lens: {said}; A and b from {origin}; measures read that"
        )
        layers = {point.layer for point in iter_points(rule.sites)}
        if n_layers - 1 in layers.difference(self.layers):
            where = "the file" if trained is None else "the lens"
            yield Convention("last layer", f"has no A and b in {where} and is used unchanged")
        yield from self.said_of_list(rule)


def _read_lens_file(rule: spec.Rule, work: ExperimentContext) -> SafetensorsFile | None:
    """Read the file that the line names; None after an error."""
    assert rule.observed is not None
    call = rule.observed.call
    arguments = () if call is None else call.arguments
    one = arguments[0] if len(arguments) == 1 and arguments[0].name is None else None
    written = None if one is None else constant_value(one.value, work.program.parameters)
    if one is not None and isinstance(one.value, ast.Name) and written is None:
        return None  # no lens of this name is declared, which is reported
    if call is None or not isinstance(written, str):
        report_bad_observation(
            rule, work, "needs a file with its translators, or a lens", f"write `{LENS_EXAMPLE}`"
        )
        return None
    path, problems = path_to_read(TUNED_LENS_PATH, written, call.span)
    work.diagnostics.extend(
        diagnostic for diagnostic in problems if diagnostic not in work.diagnostics
    )
    if path is None:
        return None
    try:
        return inspect_safetensors(path, written, limits.LENS_FILE, SMALLER_FILE_HINT)
    except UnreadableFile as problem:
        report_bad_observation(rule, work, f"can't use its file: {problem.reason}", problem.hint)
        return None


def _check_layers(
    rule: spec.Rule, lens: TrainedLens, layers: list[int], work: ExperimentContext
) -> bool:
    """Report E0207 for layers that a trained lens doesn't have."""
    known = {*lens.training.layers, work.sites.shape.n_layers - 1}
    missing = next((layer for layer in layers if layer not in known), None)
    if missing is None:
        return True
    name = lens.training.definition
    reason = f"reads layer {missing}, for which `{name}` has no map"
    hint = f"declare `{name}` at this layer, too: `at resid_post layer *`"
    report_bad_observation(rule, work, reason, hint)
    return False


def _translated_layers(lens: SafetensorsFile) -> Iterator[int]:
    """Yield the layers for which the file contains a translator."""
    for name in lens.shapes:
        _, _, number = name.removesuffix(".weight").rpartition("layer.")
        if number.isdecimal() and name == f"layer.{number}.weight":
            yield int(number)


def _check_translators(
    rule: spec.Rule, lens: SafetensorsFile, layers: list[int], work: ExperimentContext
) -> bool:
    """Report E0207 for layers without a translator, and for translators of a different size."""
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
                hint = "name the lens file of this model"
            report_bad_observation(rule, work, reason, hint)
            return False
    return True


@lru_cache(maxsize=128)
def load_translator(path: str, digest: str, layer: int) -> tuple[Tensor, Tensor]:
    """Load A, [d_model, d_model], and b, [d_model], of a layer.

    Raises:
        ValueError: If the file has changed since it was checked.
    """
    from safetensors import safe_open

    if not _is_unchanged(path, digest):
        raise ValueError(f"{Path(path).name} has changed since it was checked")
    with cast("Any", safe_open)(path, framework="pt") as file:
        weight, bias = (file.get_tensor(f"layer.{layer}.{part}") for part in ("weight", "bias"))
    return weight, bias


@lru_cache(maxsize=8)
def _is_unchanged(path: str, digest: str) -> bool:
    return compute_digest(Path(path)) == digest
