"""Resolve what `fit(…)` trains: the facts of a dictionary or a rotation before it is trained, the
measure that a rotation is trained on, and whether training rows are separate from measured rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

from mechdsl.base.safetensors_files import SafetensorsFile
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.experiments import NoEstimate
from mechdsl.diagnostics.rules import BadBasis, MeasuredOnTrainingRows
from mechdsl.dictionaries.folder import ENCODED_SITES, DictionaryFile
from mechdsl.models.shape import vector_width
from mechdsl.program import spec
from mechdsl.program.basis_methods import TRAINING_DEFAULTS
from mechdsl.program.spec import Constant, constant_value
from mechdsl.program.trainers import TRAINERS
from mechdsl.prompts.positions.cells import is_after_prompts
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.conflicts import SITES_WITHOUT_GRADIENT, find_flat_part
from mechdsl.resolve.directions import DirectionError, count_used_rows
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import (
    FitSample,
    ResolvedExperiment,
    SitePoint,
    TrainedDictionary,
    TrainedRotation,
    Training,
    count_numbers,
)
from mechdsl.syntax import ast

FEWEST_ROWS = 2
"""Rows of a training: one to learn from, and one that is held out."""

ROTATION = "rotation"
"""Name of the tensor with the directions of a trained rotation, one per row."""


def outline_training(
    definition: spec.Basis,
    options: Mapping[str, Constant],
    sample: FitSample,
    point: SitePoint,
    work: ExperimentContext,
) -> TrainedDictionary | TrainedRotation:
    """Return what a `fit` line declares, a dictionary or a rotation, with its weights if they are
    known.

    Args:
        options: Constants of the call.
        sample: The rows that it is trained on.
        point: The site of the basis.

    Raises:
        DirectionError: Too few rows have the position, or a rotation has too many directions.
    """
    call = definition.method
    (inner,) = (each.value for each in call.arguments if each.name is None)
    assert isinstance(inner, ast.Call)
    rows = count_used_rows(sample.cell)
    if rows < FEWEST_ROWS:
        many = "no row" if not rows else "one row only"
        raise DirectionError(
            call,
            f"{many} of `{sample.table.name}` has `{sample.cell.label}`",
            "name a position that more rows have",
        )
    own: dict[str, Constant] = {}
    for argument in inner.arguments:
        value = constant_value(argument.value, work.program.parameters)
        assert argument.name is not None
        assert value is not None
        own[argument.name] = value
    trainer = TRAINERS[inner.name]
    seed = options.get("seed", work.program.seed)
    words = (definition.name, point.site, point.layer, point.unit, sample.run.model, work.model.key)
    training = Training(
        name=" ".join(str(word) for word in words if word is not None),
        definition=definition.name,
        trainer=inner.name,
        of_trainer=own,
        options={**TRAINING_DEFAULTS, **trainer.defaults, **options},
        sample=sample,
        encoded=point,
        made=point,
        seed=int(seed),
        span=call.span,
        minimises=any(each.name == "minimise" for each in call.arguments),
    )
    if trainer.makes == "rotation":
        return _outline_rotation(training, inner, work)
    return _outline_dictionary(training, work)


def _outline_rotation(
    training: Training, inner: ast.Call, work: ExperimentContext
) -> TrainedRotation:
    """Return the rotation of a training. Raises DirectionError."""
    size = TRAINERS[training.trainer].size(training.of_trainer)
    point, shape = training.made, work.model.shape
    width = count_numbers(point, shape)
    if size > width and not shape.stands_in:
        raise DirectionError(
            inner,
            f"{size:,} directions of vectors of `{point.site}`, which have {width:,} numbers",
            f"write at most `dims: {width}`",
        )
    found = work.program.trained.get(training.name)
    if found is not None and isinstance(found[0], SafetensorsFile):
        return TrainedRotation(found[0].path, ROTATION, found[0].digest, size, training)
    return TrainedRotation(Path(), ROTATION, "", size, training)


def _outline_dictionary(training: Training, work: ExperimentContext) -> TrainedDictionary:
    """Return the dictionary of a training."""
    outline = TRAINERS[training.trainer].outline(training.of_trainer)
    shape, point = work.model.shape, training.made
    encoded = SitePoint(ENCODED_SITES[0], point.layer, None) if outline.transcodes else point
    training = replace(training, encoded=encoded)
    width = count_numbers(point, shape)
    read = vector_width(shape, encoded.site) if outline.transcodes else width
    found = work.program.trained.get(training.name)
    if found is not None and isinstance(found[0], DictionaryFile):
        facts = {each.name: getattr(found[0], each.name) for each in fields(DictionaryFile)}
        return TrainedDictionary(**facts, training=training)
    return TrainedDictionary(
        path=Path(),
        layout="SAELens",
        architecture=outline.architecture,
        features=outline.features,
        width_in=read,
        width_out=width,
        dtype="F32",
        digest="",
        weights_digest="",
        tensors={},
        k=outline.k,
        transcodes=outline.transcodes,
        subtracts_bias=not outline.transcodes,
        training=training,
    )


def count_training_rows(training: Training, work: ExperimentContext) -> int:
    """Return how many of the rows that an experiment measures are also training rows."""
    if not work.experiment.measures:
        return 0
    trained = set(training.sample.table.row_keys)
    return sum(key in trained for key in work.table.row_keys)


def check_held_out(definition: spec.Basis, training: Training, work: ExperimentContext) -> None:
    """Report E0345 for measured rows that are also training rows, unless the file allows them."""
    shared = count_training_rows(training, work)
    if not shared or training.options["measure_on_training_rows"]:
        return
    problem = MeasuredOnTrainingRows(
        span=work.experiment.span,
        experiment=work.experiment.name,
        basis=definition.name,
        shared=shared,
        rows=len(work.table.row_keys),
        block=work.table.name,
    )
    if problem not in work.diagnostics:
        work.diagnostics.append(problem)


def describe_training(
    made: TrainedDictionary | TrainedRotation, rows: str, work: ExperimentContext
) -> str:
    """Describe a declared dictionary or rotation for conventions and `explain`.

    Args:
        rows: `80 rows of fruit.train at tokens *`
    """
    assert made.training is not None
    text = f"{made.kind} trained on {rows}"
    if made.training.name in work.program.trained:
        text += f", {work.program.trained[made.training.name][1]}"
    shared = count_training_rows(made.training, work)
    if shared:
        text += f"; {shared} of the {len(work.table)} rows measured here are training rows"
    return text


# --- the measure of a rotation --------------------------------------------------------------------


def paired_positions(objective: ResolvedExperiment) -> tuple[PositionCell, PositionCell]:
    """Return the tokens that a training writes in the clean run, and those that it reads in the
    source run; rows that lack one of them have neither."""
    positions = objective.rules[0].positions
    ((key, written),) = positions.written.items()
    return written, positions.read[key]


def check_objective(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield problems of the rows and the measure that a rotation is trained on.

    Codes: E0608 for a measure without a gradient, E0342 for runs and positions.

    Args:
        objective: As in `mechdsl.program.trainings`, resolved.
    """
    yield from _check_gradient(objective)
    rule, table = objective.rules[0], objective.table
    measure = objective.measures[0]
    runs = [table.runs[name] for name in dict.fromkeys((rule.run, *measure.compared_runs))]
    for run in (each for each in runs if each.noise is not None):
        yield BadBasis(
            span=rule.spec.span,
            reason=f"`{run.name}` has noise, and a rotation is trained on runs without noise",
            hint="name a corruption that changes the text",
        )
    if len(rule.positions.written) != 1 or objective.model.stands_in or table.stands_in:
        return  # several positions are an error of the basis
    cell, _ = paired_positions(objective)
    span = rule.spec.at.span
    rows = [row for row, hits in enumerate(cell.hits) if hits]
    repeated = next((row for row in rows if len(cell.hits[row]) > 1), None)
    if repeated is not None:
        many = len(cell.hits[repeated])
        reason = f"row {repeated} has `{cell.label}` {many} times, and a rotation is trained at one"
        yield BadBasis(span=span, reason=reason, hint="name one of them: `item 1 token`")
    elif is_after_prompts(cell, table.runs[objective.spec.base].rows):
        reason = "a rotation is trained at tokens of the prompt, not of the answer"
        yield BadBasis(span=span, reason=reason, hint="name a position of the prompt")
    elif len(rows) < FEWEST_ROWS:
        reason = f"fewer than {FEWEST_ROWS} rows of `{table.name}` have `{cell.label}` in both runs"
        yield BadBasis(span=span, reason=reason, hint="name a position that more rows have")


def _check_gradient(objective: ResolvedExperiment) -> Iterator[Diagnostic]:
    """Yield E0608 for a measure or a site without a gradient."""
    (rule,), (measure,), (said,) = objective.rules, objective.measures, objective.spec.measures
    problem = find_flat_part(measure, objective.spec.base, at_base=False)
    found = None if problem is None else (said.metric.span, f"`{problem[0]}`", *problem[1:])
    if found is None and measure.in_reply is not None:
        hint = "measure a logit, a probability or a difference of logits"
        found = said.span, "tokens of a reply", "a selected token has no gradient", hint
    points = () if rule.sites is None else (p for own in rule.sites.points.values() for p in own)
    flat = sorted({point.site for point in points} & {*SITES_WITHOUT_GRADIENT})
    if found is None and flat:
        assert rule.spec.site is not None
        hint = "name a site such as `resid_post`, `z` or `mlp_out`"
        reason = "mechdsl doesn't compute gradients at this site"
        found = rule.spec.site.span, f"with respect to `{flat[0]}`", reason, hint
    if found is not None:
        span, what, reason, hint = found
        statement = objective.spec.trains
        yield NoEstimate(
            span=span,
            statement=statement,
            verb="differentiate",
            what=what,
            reason=reason,
            hint=hint,
        )
