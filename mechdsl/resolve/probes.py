"""Probes and lenses that a file trains, and the values of rows that probes predict.

`probe NAME = fit(ridge, …) at resid_post layer *` predicts numbers, lists of numbers, or classes;
`lens NAME = fit(tuned_lens, …) at resid_post layer * at tokens *` has a map for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Literal, TypeAlias, cast

from mechdsl.base.limits import is_number
from mechdsl.base.text import count_noun, name_list
from mechdsl.diagnostics.core import has_errors
from mechdsl.program import spec
from mechdsl.program.directions import list_direction_expressions, read_probe_names, used_bases
from mechdsl.program.trainers import ProbeTrainer, find_trainer, trainer_call
from mechdsl.resolve.directions import (
    DirectionError,
    check_training,
    resolve_definition,
    resolve_one_sample,
)
from mechdsl.resolve.observations import evaluate_rows
from mechdsl.resolve.sites import ExperimentContext, find_side, resolve_site
from mechdsl.resolve.trainings import FEWEST_ROWS, STREAM, outline_lens, outline_probe
from mechdsl.resolve.types import FitSample, SitePoint, TrainedLens, TrainedProbe
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES

ProbeKind: TypeAlias = Literal["ridge", "logistic"]

PROBE_KINDS: tuple[ProbeKind, ...] = ("ridge", "logistic")


def is_finite_number(value: object) -> bool:
    return is_number(value) and isfinite(value)


def choose_kind(values: Sequence[object]) -> ProbeKind:
    """Choose regression for numbers and lists of numbers, classes for two values and all others."""
    numbers = all(is_finite_number(value) for value in values)
    if numbers:
        return "ridge" if len(set(values)) > 2 else "logistic"
    return "ridge" if any(isinstance(value, list) for value in values) else "logistic"


def explain_misfit(
    kind: ProbeKind, values: Sequence[object], otherwise: str
) -> tuple[str, str] | None:
    """Return the problem with values that can't be predicted, and a hint.

    Args:
        otherwise: Hint for values that aren't numbers.
    """
    none = sum(value is None for value in values)
    if none:
        return f"has no value in {count_noun(none, 'row')}", "`where` to exclude these rows"
    lists = [cast("list[object]", value) for value in values if isinstance(value, list)]
    if kind == "logistic":
        if any(isinstance(value, list | Mapping) for value in values):
            return "is a list, which isn't a class", "`kind: ridge` for lists of numbers"
        return None
    if lists and len(lists) < len(values):
        return "is a list in only some of the rows", "lists of equal length"
    lengths = {len(each) for each in lists}
    if len(lengths) > 1:
        least, most = min(lengths), max(lengths)
        return f"has {least} to {most} numbers", "lists of equal length"
    if lengths == {0}:
        return "is an empty list", "lists of numbers"
    entries = [entry for each in lists for entry in each] if lists else values
    if not all(is_finite_number(entry) for entry in entries):
        return "isn't a number", otherwise
    return None


def list_numbers(values: Sequence[object]) -> tuple[tuple[float, ...], ...]:
    lists = (value if isinstance(value, list) else [value] for value in values)
    return tuple(tuple(float(cast(float, entry)) for entry in each) for each in lists)


def class_key(value: object) -> float | str:
    """Return what identifies the class of a value: the number itself, or a text."""
    return cast("float", value) if is_finite_number(value) else str(value)


def list_classes(values: Sequence[object]) -> tuple[float | str, ...]:
    """Return the distinct classes: numbers in ascending order, then texts in alphabetical order."""
    keys = {class_key(value) for value in values}
    numbers = sorted(key for key in keys if not isinstance(key, str))
    return (*numbers, *sorted(key for key in keys if isinstance(key, str)))


def number_classes(
    values: Sequence[object],
) -> tuple[tuple[tuple[float, ...], ...], tuple[str, ...]]:
    """Return the number of each value's class, in the order of `list_classes`, and the names."""
    order = {key: float(number) for number, key in enumerate(list_classes(values))}
    return tuple((order[class_key(value)],) for value in values), tuple(map(str, order))


# --- definitions ----------------------------------------------------------------------------------

ELSEWHERE = -1.0
"""Number of a class that only rows without the position have."""


def resolve_trained_probe(name: str, work: ExperimentContext) -> TrainedProbe | None:
    """Resolve a probe that an observation names.

    None after an error, and if a required model or prompt set isn't available.

    Codes: E0207 for values, E0342, E0345, and those of sites and positions.
    """
    return resolve_definition(name, "probe", _resolve, work)


def resolve_direction_probes(work: ExperimentContext) -> dict[str, TrainedProbe | None]:
    """Resolve the probes whose weights are directions of an experiment; see
    `resolve_trained_probe`."""
    nodes = list_direction_expressions(work.experiment)
    nodes += [basis.method for basis in used_bases(work.experiment, work.program)]
    names = dict.fromkeys(read_probe_names(nodes, work.program.directions))
    return {name: resolve_trained_probe(name, work) for name in names}


def target_of(definition: spec.Basis) -> ast.Expr:
    """Return the value that a probe predicts."""
    (target,) = (
        argument.value for argument in definition.method.arguments if argument.name == "target"
    )
    return cast("ast.Expr", target)


def _resolve(definition: spec.Basis, work: ExperimentContext) -> TrainedProbe | None:
    """Resolve a probe. Raises DirectionError."""
    points = _points(definition, work)
    if points is None:
        return None
    reading = replace(work, side=find_side(points, work.model.shape))
    read = resolve_one_sample(definition, "probe", FEWEST_ROWS, reading)
    if read is None:
        return None
    sample, text = read
    rows_of = sample.table.block_rows
    if rows_of is not None and rows_of.block.spec.streamed:
        reason = f"a probe uses all rows together, and `{sample.table.name}` is read in parts"
        hint = "remove `streamed`, and write `limit: 1000` in `fit(…)`"
        raise DirectionError(definition.method, reason, hint)
    fit_sample = _with_targets(definition, sample, work)
    if fit_sample is None:
        return None
    sample, classes = fit_sample
    probe = outline_probe(definition, sample, points, classes, work.program, work.model)
    text = f"{text}, to predict `{probe.target}`"
    return replace(probe, made=check_training(definition, probe, text, work))


def _points(definition: spec.Basis, work: ExperimentContext) -> tuple[SitePoint, ...] | None:
    """Return the site in each of its layers and heads, ascending; None after other errors.

    Raises DirectionError.
    """
    before = len(work.diagnostics)
    sites, _ = resolve_site(definition.site, replace(work.sites, loops={}))
    if sites is None or has_errors(work.diagnostics[before:]):
        return None
    cells = [site_points for key, site_points in sites.points.items() if key not in sites.missing]
    site = definition.site
    first = cells[0][0]
    if any(len(cell) > 1 for cell in cells):
        reason, hint = "it joins several sites, and a probe reads one vector", "name one of them"
        first_cell = cells[0]
        if len({point.layer for point in first_cell}) > 1:
            hint = "write the singular, for a map in each layer: `layer *`"
        elif len({point.unit for point in first_cell}) > 1:
            hint = "write the singular, for a map in each head: `head *`"
        raise DirectionError(site, reason, hint)
    points = [cell[0] for cell in cells]
    if SITES[first.site].width in ("key", "one"):
        kind = "vectors over keys" if SITES[first.site].width == "key" else "single numbers"
        hint = "name a site of vectors, such as `resid_post layer *`"
        raise DirectionError(site, f"it has {kind}, which no probe reads", hint)
    if any(point.site != first.site for point in points):
        raise DirectionError(site, "a probe reads one site", "declare a probe for each site")
    if site.basis_name is not None:
        raise DirectionError(
            site, "a probe reads whole vectors", f"remove `in basis {site.basis_name}`"
        )
    return tuple(
        sorted(
            points,
            key=lambda point: tuple(-1 if n is None else n for n in (point.layer, point.unit)),
        )
    )


def _with_targets(
    definition: spec.Basis, sample: FitSample, work: ExperimentContext
) -> tuple[FitSample, tuple[float | str, ...]] | None:
    """Return the rows with a number, or the number of its class, of each, and the names of the
    classes; None after other errors. Raises DirectionError."""
    target, trainer = target_of(definition), find_trainer(trainer_call(definition.method))
    assert isinstance(trainer, ProbeTrainer)
    problems = list(work.diagnostics)
    values = evaluate_rows(target, sample.table, problems)
    if values is None:
        work.diagnostics.extend(problem for problem in problems if problem not in work.diagnostics)
        return None
    kind = "logistic" if trainer.predicts == "class" else "ridge"
    wrong = explain_misfit(kind, values, "`fit(logistic, …)` for classes")
    if wrong is None and any(isinstance(value, list) for value in values):
        wrong = "is a list, and a probe of the file predicts one number", "one number of the list"
    if wrong is not None:
        raise DirectionError(target, f"`{target.span.written}` {wrong[0]}", f"write {wrong[1]}")
    there = [value for value, hits in zip(values, sample.cell.hits, strict=True) if any(hits)]
    classes = list_classes(there)
    if len(classes) < 2:
        reason = f"`{target.span.written}` is the same in all rows, so there is nothing to predict"
        raise DirectionError(target, reason, "name a value that differs between rows")
    if kind == "ridge":
        return replace(sample, targets=tuple(float(cast("float", value)) for value in values)), ()
    order = {key: float(number) for number, key in enumerate(classes)}
    targets = tuple(order.get(class_key(value), ELSEWHERE) for value in values)
    _check_class_sizes(definition, targets, classes)
    return replace(sample, targets=targets), classes


def _check_class_sizes(
    definition: spec.Basis, targets: tuple[float, ...], classes: tuple[float | str, ...]
) -> None:
    """Check that no class has a single row, of which no row could be held out.

    Raises DirectionError.
    """
    counts = {name: targets.count(float(number)) for number, name in enumerate(classes)}
    single = [str(name) for name, count in counts.items() if count == 1]
    if single:
        raise DirectionError(
            target_of(definition),
            f"`{target_of(definition).span.written}` is {name_list(single[:4])} in one row only, "
            "which can't be both trained on and held out",
            "add such rows, exclude them with `where`, or predict a number with `ridge`",
        )


# --- lenses ---------------------------------------------------------------------------------------


def resolve_lens(name: str, work: ExperimentContext) -> TrainedLens | None:
    """Resolve a lens that an observation names.

    None after an error, and if a required model or prompt set isn't available.

    Codes: E0342, E0345, and those of sites and positions.
    """
    return resolve_definition(name, "lens", _resolve_lens, work)


def _resolve_lens(definition: spec.Basis, work: ExperimentContext) -> TrainedLens | None:
    """Resolve a lens. Raises DirectionError."""
    layers = _lens_layers(definition, work)
    if layers is None:
        return None
    reading = replace(work, side=find_side((), work.model.shape))
    fit_sample = resolve_one_sample(definition, "lens", FEWEST_ROWS, reading)
    if fit_sample is None:
        return None
    sample, text = fit_sample
    lens = outline_lens(definition, sample, layers, work.program, work.model)
    stream = lens.training.stream
    if stream is not None and work.model.shape.encodes_apart:
        reason = "streamed rows of an encoder-decoder aren't read"
        raise DirectionError(definition.method, reason, "train on a `prompts` block")
    if stream is not None:
        text = f"{stream.count:,} streamed rows of {sample.table.name} at {sample.cell.label}"
    return replace(lens, made=check_training(definition, lens, text, work))


def _lens_layers(definition: spec.Basis, work: ExperimentContext) -> tuple[int, ...] | None:
    """Return the layers with a map, which is all named ones but the last of the model; None after
    other errors. Raises DirectionError."""
    before = len(work.diagnostics)
    sites, _ = resolve_site(definition.site, replace(work.sites, loops={}))
    if sites is None or has_errors(work.diagnostics[before:]):
        return None
    points = [
        point for key, here in sites.points.items() if key not in sites.missing for point in here
    ]
    other = next((point.site for point in points if point.site != STREAM), None)
    if other is not None:
        raise DirectionError(
            definition.site,
            f"a lens reads the stream after each block, not `{other}`",
            f"write `at {STREAM} layer * at tokens *`",
        )
    last = work.model.shape.n_layers - 1
    layers = {point.layer for point in points if point.layer is not None}
    if layers == {last} and not work.model.shape.stands_in:
        raise DirectionError(
            definition.site,
            f"the stream after the last block, layer {last}, needs no lens",
            f"name earlier layers: `at {STREAM} layer *`",
        )
    return tuple(sorted(layers - {last}))
