"""Resolve what `fit(…)` trains: the facts of a dictionary before it is trained, and whether its
training rows are kept apart from the rows that an experiment measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from mechdsl.diagnostics.rules import MeasuredOnTrainingRows
from mechdsl.dictionaries.folder import ENCODED_SITES, DictionaryFile
from mechdsl.models.shape import vector_width
from mechdsl.program import spec
from mechdsl.program.basis_methods import TRAINING_DEFAULTS
from mechdsl.program.spec import Constant, constant_value
from mechdsl.program.trainers import TRAINERS
from mechdsl.resolve.directions import DirectionError, count_used_rows
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import (
    FitSample,
    SitePoint,
    TrainedDictionary,
    Training,
    count_numbers,
)
from mechdsl.syntax import ast

FEWEST_ROWS = 2
"""Rows of a training: one to learn from, and one that is held out."""


def outline_training(
    definition: spec.Basis,
    options: Mapping[str, Constant],
    sample: FitSample,
    point: SitePoint,
    work: ExperimentContext,
) -> TrainedDictionary:
    """Return the dictionary that a `fit` line declares, with its weights if they are known.

    Args:
        options: Constants of the call.
        sample: The rows that it is trained on.
        point: The site of the basis.

    Raises:
        DirectionError: Too few rows have the position.
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
    outline = TRAINERS[inner.name].outline(own)
    shape = work.model.shape
    encoded = SitePoint(ENCODED_SITES[0], point.layer, None) if outline.transcodes else point
    width = count_numbers(point, shape)
    read = vector_width(shape, encoded.site) if outline.transcodes else width
    seed = options.get("seed", work.program.seed)
    words = (definition.name, point.site, point.layer, point.unit, sample.run.model, work.model.key)
    training = Training(
        name=" ".join(str(word) for word in words if word is not None),
        trainer=inner.name,
        of_trainer=own,
        options={**TRAINING_DEFAULTS, **options},
        sample=sample,
        encoded=encoded,
        made=point,
        seed=int(seed),
        span=call.span,
    )
    found = work.program.trained.get(training.name)
    if found is not None:
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


def describe_training(made: TrainedDictionary, rows: str, work: ExperimentContext) -> str:
    """Describe a declared dictionary for conventions and `explain`.

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
