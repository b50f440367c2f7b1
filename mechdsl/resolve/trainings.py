"""Resolve what `fit(…)` trains: the facts of a dictionary before it is trained, and whether its
training rows differ from the rows that an experiment measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rules import MeasuredOnTrainingRows
from mechdsl.dictionaries.folder import ENCODED_SITES, DictionaryFile
from mechdsl.models.shape import ModelShape, vector_width
from mechdsl.program import spec
from mechdsl.program.basis_methods import TRAINING_DEFAULTS
from mechdsl.program.spec import Constant, constant_value
from mechdsl.program.trainers import TRAINERS
from mechdsl.prompts.rows import PromptTable
from mechdsl.resolve.types import (
    FitSample,
    ModelContext,
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
    program: spec.Program,
    model: ModelContext,
) -> TrainedDictionary:
    """Return the dictionary that a `fit` line declares, with its weights if they are known.

    Args:
        options: Constants of the call.
        sample: The rows that it is trained on.
        point: The site of the basis.
        model: The model of the experiment.
    """
    training = _describe_training(definition, options, sample, point, program, model)
    found = program.trained.get(training.name)
    if found is not None:
        file, _ = found
        assert isinstance(file, DictionaryFile)
        facts = {each.name: getattr(file, each.name) for each in fields(DictionaryFile)}
        return TrainedDictionary(**facts, training=training)
    return _without_weights(training, model.shape)


def _describe_training(
    definition: spec.Basis,
    options: Mapping[str, Constant],
    sample: FitSample,
    point: SitePoint,
    program: spec.Program,
    model: ModelContext,
) -> Training:
    call = definition.method
    (inner,) = (each.value for each in call.arguments if each.name is None)
    assert isinstance(inner, ast.Call)
    own: dict[str, Constant] = {}
    for argument in inner.arguments:
        value = constant_value(argument.value, program.parameters)
        assert argument.name is not None
        assert value is not None
        own[argument.name] = value
    transcodes = TRAINERS[inner.name].outline(own).transcodes
    words = (definition.name, point.site, point.layer, point.unit, sample.run.model, model.key)
    return Training(
        name=" ".join(str(word) for word in words if word is not None),
        trainer=inner.name,
        of_trainer=own,
        options={**TRAINING_DEFAULTS, **options},
        sample=sample,
        encoded=SitePoint(ENCODED_SITES[0], point.layer, None) if transcodes else point,
        made=point,
        seed=int(options.get("seed", program.seed)),
        span=call.span,
    )


def _without_weights(training: Training, shape: ModelShape) -> TrainedDictionary:
    """Return a dictionary before it is trained."""
    outline = TRAINERS[training.trainer].outline(training.of_trainer)
    width = count_numbers(training.made, shape)
    return TrainedDictionary(
        path=Path(),
        layout="SAELens",
        architecture=outline.architecture,
        features=outline.features,
        width_in=vector_width(shape, training.encoded.site) if outline.transcodes else width,
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


def count_training_rows(training: Training, experiment: spec.Experiment, table: PromptTable) -> int:
    """Return how many of the rows that an experiment measures are also training rows."""
    if not experiment.measures:
        return 0
    trained = set(training.sample.table.row_keys)
    return sum(key in trained for key in table.row_keys)


def check_held_out(
    definition: spec.Basis, training: Training, experiment: spec.Experiment, table: PromptTable
) -> Diagnostic | None:
    """Return E0345 for measured rows that are also training rows, unless the file allows them.

    Args:
        table: The rows of the experiment.
    """
    shared = count_training_rows(training, experiment, table)
    if not shared or training.options["measure_on_training_rows"]:
        return None
    return MeasuredOnTrainingRows(
        span=experiment.span,
        experiment=experiment.name,
        basis=definition.name,
        shared=shared,
        rows=len(table),
        block=table.name,
    )


def describe_training(
    made: TrainedDictionary,
    rows: str,
    program: spec.Program,
    experiment: spec.Experiment,
    table: PromptTable,
) -> str:
    """Describe a declared dictionary for conventions and `explain`.

    Args:
        rows: `80 rows of fruit.train at tokens *`
        table: The rows of the experiment.
    """
    assert made.training is not None
    text = f"{made.kind} trained on {rows}"
    if made.training.name in program.trained:
        text += f", {program.trained[made.training.name][1]}"
    shared = count_training_rows(made.training, experiment, table)
    if shared:
        text += f"; {shared} of the {len(table)} rows measured here are training rows"
    return text
