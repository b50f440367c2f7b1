"""Probes that a file trains, on other rows: `observe probe(told)`, `observe prediction(told)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from mechdsl.base.files import compute_digest
from mechdsl.base.records import Record
from mechdsl.base.text import count_noun, name_list
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.program import spec
from mechdsl.resolve.directions import find_class
from mechdsl.resolve.observations import ObservedVectors, RowVectors, evaluate_rows
from mechdsl.resolve.probes import class_key, explain_misfit, resolve_trained_probe, target_of
from mechdsl.resolve.sites import ExperimentContext, label_all_points, label_points
from mechdsl.resolve.trainings import name_probe_map
from mechdsl.resolve.types import (
    Convention,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    TrainedProbe,
    count_numbers,
)
from mechdsl.rules.observations.registry import (
    SiteObservation,
    describe_joined,
    iter_points,
    observation,
    report_bad_observation,
)
from mechdsl.syntax import ast

if TYPE_CHECKING:
    from torch import Tensor

    from mechdsl.base.arrays import Floats
    from mechdsl.fits.regression import LinearMap


class ProbeReading(Record):
    """A trained probe, with the values of the rows that it is evaluated on."""

    probe: TrainedProbe
    targets: tuple[float, ...]
    """A number, or the number of the class, of each row."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What its scores depend on, besides the vectors."""
        return self.probe.digest, self.probe.training.inputs, self.targets

    def score(self, seen: RowVectors) -> list[Floats]:
        """Return scores of the probe and of that of shuffled values: [row]."""
        import numpy as np

        from mechdsl.fits.regression import r_squared

        targets = np.array([self.targets[row] for row in seen.prompts.tolist()])
        (point,) = seen.points
        scores: list[Floats] = []
        for shuffled in (False, True):
            made = load_map(self.probe, point, shuffled=shuffled)(seen.vectors)
            if self.probe.classes:
                scores.append((made.argmax(axis=1) == targets).astype(np.float64))
            else:
                scores.append(r_squared(targets, made))
        return scores

    def describe(self, sites: SiteTargets) -> Iterator[str]:
        """Yield notes for tables."""
        probe = self.probe
        what = "accuracy" if probe.classes else "R²"
        yield f"{what} of `{probe.training.definition}` for `{probe.target}`, as it was trained"
        if probe.classes:
            shares = [self.targets.count(float(n)) for n in range(len(probe.classes))]
            yield f"the most common class has {max(shares) / len(self.targets):.3g} of these rows"
        yield from _describe_map(probe, sites)
        yield "values are the clean row's"
        yield "shuffled: the same probe trained with the values permuted between its rows"


def _describe_map(probe: TrainedProbe, sites: SiteTargets) -> Iterator[str]:
    """Yield where a probe was trained if it reads other sites."""
    inputs = set(probe.training.inputs)
    if any(point not in inputs for point in iter_points(sites)):
        where = label_all_points(probe.training.inputs)
        yield f"`{probe.training.definition}` was trained on vectors of {where}"


def read_trained_probe(
    rule: spec.Rule, resolved: ResolvedRule | None, work: ExperimentContext
) -> ProbeReading | None:
    """Resolve a probe that `observe probe(NAME)` names, with the values of the rows; None after an
    error.

    Codes: E0207, and those of `resolve_trained_probe`.
    """
    probe = resolve_named_probe(rule, resolved, work)
    definition = None if probe is None else work.program.bases[probe.training.definition]
    if probe is None or definition is None:
        return None
    assert rule.observed is not None
    assert rule.observed.call is not None
    option = next(
        (argument for argument in rule.observed.call.arguments if argument.name is not None), None
    )
    if option is not None:
        reason = f"is an option of the fit, and `{probe.training.definition}` is already fitted"
        hint = f"remove it, or write it in `probe {probe.training.definition} = fit(…)`"
        name = str(option.name)
        work.diagnostics.append(BadArgument(span=option.span, name=name, reason=reason, hint=hint))
        return None
    target, problems = target_of(definition), list(work.diagnostics)
    values = evaluate_rows(target, work.table, problems)
    work.diagnostics.extend(problem for problem in problems if problem not in work.diagnostics)
    if values is None or work.table.stands_in:
        return None
    targets = _evaluated_targets(probe, values, rule, work)
    return None if targets is None else ProbeReading(probe, targets)


def _evaluated_targets(
    probe: TrainedProbe, values: Sequence[object], rule: spec.Rule, work: ExperimentContext
) -> tuple[float, ...] | None:
    """Return the values as the probe predicts them; E0207 for values that it can't predict."""
    kind = "logistic" if probe.classes else "ridge"
    wrong = explain_misfit(kind, values, "numbers in all rows")
    if wrong is not None:
        reason = f"is evaluated on rows of `{work.table.name}` where `{probe.target}` {wrong[0]}"
        report_bad_observation(rule, work, reason, "name other rows, or use `where`")
        return None
    if not probe.classes:
        if len(set(map(str, values))) > 1:
            return tuple(float(cast("float", value)) for value in values)
        reason = f"has no R²: `{probe.target}` is the same in all rows"
        hint = f"observe the predictions: `observe prediction({probe.training.definition}) at …`"
        report_bad_observation(rule, work, reason, hint)
        return None
    order = {key: float(number) for number, key in enumerate(probe.classes)}
    others = {class_key(value) for value in values} - {*order}
    if not others:
        return tuple(order[class_key(value)] for value in values)
    name = probe.training.definition
    count = sum(class_key(value) in others for value in values)
    reason = f"reads {count_noun(count, 'row')} where `{probe.target}` is "
    reason += f"{name_list(sorted(map(str, others))[:4])}, which `{name}` wasn't trained on"
    hint = f"train `{name}` on rows with these values, or exclude them with `where`"
    report_bad_observation(rule, work, reason, hint)
    return None


def resolve_named_probe(
    rule: spec.Rule, resolved: ResolvedRule | None, work: ExperimentContext
) -> TrainedProbe | None:
    """Resolve the probe that an observation names, and check that it fits the sites; None after an
    error."""
    assert rule.observed is not None
    assert rule.observed.call is not None
    (name,) = rule.observed.bases
    (node,) = (argument.value for argument in rule.observed.call.arguments if argument.name is None)
    value = evaluate_rows(cast("ast.Expr", node), work.table, [])
    if value and not work.table.stands_in:
        reason = f"names `{name}`, which is a probe and a value of `{work.table.name}`"
        report_bad_observation(rule, work, reason, "rename the probe")
        return None
    probe = resolve_trained_probe(name, work)
    if probe is None or resolved is None:
        return None
    assert resolved.sites is not None
    problem = None
    for points in resolved.sites.points.values():
        problem = problem or _misfit(probe, points, work)
    if problem is not None:
        report_bad_observation(rule, work, *problem)
        return None
    return probe


def _misfit(
    probe: TrainedProbe, points: tuple[SitePoint, ...], work: ExperimentContext
) -> tuple[str, str] | None:
    """Return the problem with the sites of a cell."""
    name, inputs = probe.training.definition, probe.training.inputs
    if len(points) != 1:
        return "reads one vector per token, not joined sites", "sweep them: `layer *`"
    (point,) = points
    number = _find_map(probe, point)
    if number is None:
        of_heads = inputs[0].unit is not None
        hint = f"at {inputs[0].site} layer *" + " head *" * of_heads
        where = f"{label_points((point,))}" if of_heads else f"layer {point.layer}"
        reason = f"reads {where}, for which `{name}` has no map"
        return reason, f"declare `{name}` there, too: `{hint}`"
    width = probe.widths[number]
    numbers = count_numbers(point, work.sites.shape)
    if numbers == width or work.sites.shape.stands_in:
        return None
    reason = f"reads vectors of {numbers:,} numbers, and `{name}` is trained on {width:,}"
    return reason, "name a site of the same width"


def _find_map(probe: TrainedProbe, point: SitePoint) -> int | None:
    """Return the number of the map for the vectors of a site: that of its layer and its head, if
    the probe has maps for several. None without one."""
    inputs = probe.training.inputs
    by_layer, by_head = (len({getattr(p, n) for p in inputs}) > 1 for n in ("layer", "unit"))
    for number, site_point in enumerate(inputs):
        same_layer = not by_layer or site_point.layer == point.layer
        if same_layer and (not by_head or site_point.unit == point.unit):
            return number
    return None


def load_map(probe: TrainedProbe, point: SitePoint, *, shuffled: bool = False) -> LinearMap:
    """Load the map for the vectors of a site.

    Raises:
        ValueError: If the file has changed since it was checked.
    """
    from mechdsl.fits.regression import LinearMap

    number = _find_map(probe, point)
    assert number is not None
    name = name_probe_map(probe.training.inputs[number])
    tensors = _load_tensors(str(probe.path), probe.digest)
    prefix = f"shuffled.{name}" if shuffled else name
    return LinearMap(tensors[f"{prefix}.weight"].T, tensors[f"{prefix}.bias"])


@lru_cache(maxsize=16)
def _load_tensors(path: str, digest: str) -> Mapping[str, Floats]:
    from safetensors.numpy import load_file

    if compute_digest(Path(path)) != digest:
        raise ValueError(f"{Path(path).name} has changed since it was checked")
    return load_file(path)


@observation("prediction", unit="prediction")
class PredictionObservation(SiteObservation):
    """What a trained probe predicts from the vector.

    returns: the predicted number, or the log odds of a class: of two classes, the second one
    """

    takes: ClassVar = ("arguments",)
    of_probes = True

    def __init__(self, probe: TrainedProbe | None = None, of_class: int = 0) -> None:
        """Create the observation; `probe` is None only in the registered instance.

        Args:
            of_class: Number of the class whose log odds are returned.
        """
        self.probe, self.of_class = probe, of_class
        if probe is not None:
            self.form = replace(type(self).form, unit="log odds" if probe.classes else probe.target)

    @property
    def identity(self) -> tuple[object, ...]:
        probe = self.probe
        if probe is None:
            return type(self), self.name
        return type(self), self.name, probe.digest, probe.training.inputs, self.of_class

    @property
    def trained(self) -> TrainedProbe | None:
        return self.probe

    @property
    def made_of(self) -> Mapping[str, str]:
        return made_of_probe(self.probe)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved, said = super().resolve(rule, work), rule.observed
        assert said is not None
        if len(said.bases) != 1:
            hint = "name one: `prediction(told)`, with `probe told = fit(ridge, …) at …`"
            report_bad_observation(rule, work, "needs a probe of the file", hint)
            return None
        probe = resolve_named_probe(rule, resolved, work)
        if resolved is None or probe is None:
            return None
        assert said.call is not None
        number = find_class(said.call, probe, work.program)
        if isinstance(number, BadArgument):
            work.diagnostics.append(number)
            return None
        return replace(resolved, does=PredictionObservation(probe, number))

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        import torch

        assert self.probe is not None
        vectors = seen.vectors.detach().double().cpu()
        units = torch.full((len(vectors),), -1) if seen.units is None else seen.units.cpu()
        made = torch.empty(len(vectors), self.probe.outputs, dtype=torch.float64)
        for unit in units.unique().tolist():
            point, own = SitePoint(*seen.place, None if unit < 0 else unit), units == unit
            made[own] = torch.from_numpy(load_map(self.probe, point)(vectors[own].numpy()))
        if self.probe.classes:
            others = [n for n in range(self.probe.outputs) if n != self.of_class]
            made = made[:, self.of_class] - made[:, others].logsumexp(1)
        else:
            made = made[:, 0]
        return made.to(seen.vectors)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert self.probe is not None
        assert rule.sites is not None
        probe, of = self.probe, f"`{self.probe.target}`"
        if probe.classes:
            of = f"{of} = {probe.classes[self.of_class]}, in log odds"
        over = list(describe_joined(rule.sites, rule.positions))
        parts = [f"prediction: of `{probe.training.definition}` for {of}"]
        parts += [f"averaged over {' and '.join(over)}"] if over else []
        yield Convention("observed", "; ".join([*parts, *_describe_map(probe, rule.sites)]))


def made_of_probe(probe: TrainedProbe | None) -> Mapping[str, str]:
    """Return the file of a probe: name → SHA-256."""
    return {} if probe is None or not probe.is_trained else {probe.path.name: probe.digest}
