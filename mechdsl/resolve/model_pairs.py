"""Models with two towers, and runs of another model that are paired with an experiment's runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import ModelShapeMismatch, ModelTokenMismatch, NoTokenizer
from mechdsl.diagnostics.prompts import PromptTooLong
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.images.picture import Picture
from mechdsl.models.shape import ModelShape, list_by_layer
from mechdsl.program import spec
from mechdsl.program.images import IMAGE_SPAN
from mechdsl.program.python_functions import is_python_call
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.answers import output_texts
from mechdsl.prompts.conventions import image_conventions, noise_conventions
from mechdsl.prompts.other_runs import PairedRun
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PromptRun, RunRow, TextTokens
from mechdsl.prompts.tokens.image_prompts import IMAGE_TOKEN
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, TextTokenizer, read_processing
from mechdsl.resolve.types import ModelContext, OppositeTower
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import METRICS

SHAPE_SIZES = {"n_layers": "layers", "d_model": "wide", "n_experts": "experts"}
"""Sizes that must be equal for activations of one model to be inserted into another."""

BLOCK_SIZES = {
    "heads": "heads",
    "kv_heads": "key-value heads",
    "d_head": "wide per head",
    "d_value": "wide per value",
    "neurons": "neurons per layer",
}
"""Sizes that must also be equal in each block."""


def join_runs(table: PromptTable, paired_runs: Sequence[PairedRun | None]) -> PromptTable | None:
    """Add runs of other models to the table; None if one is missing."""
    runs = [run for run in paired_runs if run is not None]
    if len(runs) < len(paired_runs):
        return None
    joined = replace(
        table,
        runs={**table.runs, **{run.run.name: run.run for run in runs}},
        other_data={run.run.prompts or "": run.data_hash for run in runs if run.data_hash},
        python=tuple(dict.fromkeys((*table.python, *(f for run in runs for f in run.python)))),
    )
    said = {f"rows of {run.run.name}": f"{run.how} of `{table.name}`" for run in runs if run.how}
    said |= noise_conventions(joined) | image_conventions(joined)
    return replace(joined, conventions={**table.conventions, **said})


def reads_outputs(experiment: spec.Experiment, run: str) -> bool:
    """Return whether a run's outputs are read or written.

    They are if the run is the source of a measure, a metric or an expectation names it, or a rule
    is about `logits`.
    """
    asked = [measure.metric for measure in experiment.measures]
    if run == experiment.source and any(_of_outputs(n) for metric in asked for n in walk(metric)):
        return True
    asked += [expect.condition for expect in experiment.expects if expect.condition is not None]
    calls = [n for each in asked for n in walk(each) if isinstance(n, ast.Call)]
    if any(_of_outputs(n) or n.name == "accuracy" for n in calls if run in _named_arguments(n)):
        return True
    sites = [site for rule in experiment.every_rule for site in (rule.site, rule.receiver) if site]
    return any(name.id == "logits" for site in sites for name in site.names)


def _of_outputs(node: ast.Node) -> bool:
    """Return whether a node is a metric, or a Python function, that reads outputs."""
    if isinstance(node, ast.Call) and is_python_call(node):
        return True
    name = (
        node.id if isinstance(node, ast.Name) else node.name if isinstance(node, ast.Call) else ""
    )
    metric = METRICS.get(name)
    return metric is not None and any(form.of_outputs for form in metric.forms.values())


def _named_arguments(call: ast.Call) -> list[str]:
    values = [argument.value for argument in call.arguments]
    return [value.id for value in values if isinstance(value, ast.Name)]


def check_model_pair(
    run: spec.ExternalRunSpec, source: ModelContext, base: ModelContext, *, outputs: bool
) -> Diagnostic | None:
    """Return E0415 if activations of one model don't fit into the other.

    Args:
        run: The run of the other model.
        source: The other model.
        base: The experiment's model.
        outputs: Whether the other model's outputs are read too, and must be of the same kind.
    """
    differences = list_differences(base.shape, source.shape)
    hint = "patch between two checkpoints or fine-tunings of one model"
    if not differences and outputs:
        differences = _other_outputs(base.shape, source.shape)
        hint = (
            f"write `with {run.name}` after `patch`, without `from {run.name}`: then its vectors "
        )
        hint += f"are read, and only `{base.name}` is measured"
    if not differences or source.shape.stands_in or base.shape.stands_in:
        return None
    return ModelShapeMismatch(
        span=run.span,
        source=source.name,
        base=base.name,
        differences="; ".join(differences),
        hint=hint,
    )


def check_fit_model(span: Span, source: ModelContext, base: ModelContext) -> Diagnostic | None:
    """Return E0415 if what is trained on one model doesn't fit into the other.

    Args:
        span: The call `fit(…)`.
        source: The model that runs the training rows.
        base: The experiment's model.
    """
    differences = list_differences(base.shape, source.shape)
    if not differences or source.shape.stands_in or base.shape.stands_in:
        return None
    return ModelShapeMismatch(
        span=span,
        source=source.name,
        base=base.name,
        differences="; ".join(differences),
        hint="train on another checkpoint or fine-tuning of the same model",
    )


def list_differences(base: ModelShape, source: ModelShape) -> list[str]:
    """Return how the sizes and sites of two models differ; empty if they don't."""
    differences = [
        f"{getattr(source, name):,} and {getattr(base, name):,} {what}"
        for name, what in SHAPE_SIZES.items()
        if getattr(source, name) != getattr(base, name)
    ]
    differences += [
        f"{theirs} and {ours} {what}"
        for name, what in BLOCK_SIZES.items()
        if (theirs := list_by_layer([getattr(block, name) for block in source.blocks]))
        != (ours := list_by_layer([getattr(block, name) for block in base.blocks]))
    ]
    differences = differences[:3]
    only = sorted((base.sites ^ source.sites) - {"logits"})
    if not differences and only:
        differences.append(f"only one of them has `{only[0]}`")
    return differences


def _other_outputs(base: ModelShape, source: ModelShape) -> list[str]:
    """Return the outputs that don't have the same meaning in both models."""
    if "logits" in base.sites ^ source.sites:
        return ["the metric is read from both models, but only one of them has `logits`"]
    if (base.task, base.labels) != (source.task, source.labels):
        kinds = (
            "labels of a classifier and tokens"
            if base.task != source.task
            else ("different labels")
        )
        return [f"the metric is read from both models, but their outputs differ: {kinds}"]
    return []


def build_model_run(
    table: PromptTable,
    theirs: PromptTable,
    source: ModelContext,
    base: ModelContext,
    run: spec.ExternalRunSpec,
) -> tuple[PairedRun | None, list[Diagnostic]]:
    """Create the clean run of the same prompts in another model, which prepares images itself.

    Reports E0416 if that model sees different tokens.
    """
    run_rows = dict(zip(table.row_ids, table.runs[CLEAN].rows, strict=True))
    others = dict(zip(theirs.row_ids, theirs.runs[CLEAN].rows, strict=True))
    unlike = [n for n, row in run_rows.items() if n not in others or not _agree(row, others[n])]
    if not unlike or source.tokenizer.stands_in or base.tokenizer.stands_in:
        rows = tuple(others.get(n, row) if row.pictures else row for n, row in run_rows.items())
        chat = table.runs[CLEAN].chat
        return PairedRun(PromptRun(run.name, rows, model=run.model, chat=chat), ""), []
    first = unlike[0]
    tokens = [
        " ".join(context.tokenizer.token_text(i) for i in rows[first].ids[:8])
        if first in rows
        else "nothing"
        for context, rows in ((source, others), (base, run_rows))
    ]
    example = f"row {first} begins with `{tokens[0]}` and `{tokens[1]}`"
    equal = "the same tokenizer and the same `bos`"
    if first in others and others[first].pictures != run_rows[first].pictures:
        counts = len(others[first].ids), len(run_rows[first].ids)
        example = f"row {first} has {counts[0]:,} and {counts[1]:,} tokens, images included"
        equal = "processors that give images the same rows and columns of tokens"
    return None, [
        ModelTokenMismatch(
            span=run.span,
            source=source.name,
            base=base.name,
            rows=len(unlike),
            total=len(run_rows),
            example=example,
            equal=equal,
        )
    ]


def _agree(row: RunRow, other: RunRow) -> bool:
    """Return whether two models see the same tokens. Those of an image may have other numbers: they
    stand for vectors that depend on each model's processor."""
    if row.ids == other.ids:
        return True
    pairs = zip(row.ids, other.ids, strict=False)
    return (
        len(row.ids) == len(other.ids)
        and row.pictures == other.pictures
        and all(number == theirs or min(number, theirs) >= IMAGE_TOKEN for number, theirs in pairs)
    )


def measures_choice(experiment: spec.Experiment) -> bool:
    """Return whether a metric is a choice among all texts or images to score with."""
    said = (*(measure.metric for measure in experiment.measures), *experiment.keep)
    said += tuple(expect.condition for expect in experiment.expects if expect.condition is not None)
    named = (node for node in walk(said) if isinstance(node, ast.Name | ast.Call))
    words = {node.id if isinstance(node, ast.Name) else node.name for node in named}
    return not words.isdisjoint({*METRICS, "accuracy"} - {"logit", "score", "cosine"})


def find_tower(model: ModelContext, kind: str) -> ModelContext:
    """Return the tower of a model that reads blocks of a kind; other models unchanged.

    Args:
        model: One of the towers, or another model.
        kind: `images` or `prompts`.
    """
    wanted = "vision" if kind == "images" else "text"
    if not model.shape.side or model.shape.side == wanted:
        return model
    if model.image_tower is not None:
        return model.image_tower
    reader, texts = model.tokenizer, model.shape.texts
    tokenizer = reader.texts if isinstance(reader, ImageTokenizer) else None
    if texts is None or tokenizer is None:  # a placeholder
        return model
    return replace(model, shape=texts, tokenizer=tokenizer, opposite=None)


def attach_images(
    model: ModelContext,
    table: PromptTable,
    block: str,
    pictures: Sequence[Picture],
    every: Sequence[Picture] | None,
) -> tuple[ModelContext, PromptTable]:
    """Add the images that texts are scored with to the text tower, and their names to the rows.

    Args:
        model: The text tower.
        table: The prompts of the text tower.
        block: The prompt set of the images.
        pictures: The image of each row.
        every: All images to choose from, if a metric needs them.
    """
    named = {picture.text: picture for picture in (*(every or ()), *pictures)}
    runs = {
        name: replace(
            run,
            rows=tuple(
                replace(row, texts={**row.texts, IMAGE_SPAN: TextTokens(picture.text, ())})
                for row, picture in zip(run.rows, pictures, strict=True)
            ),
        )
        for name, run in table.runs.items()
    }
    labels = tuple(named)
    shape = replace(
        model.shape,
        labels=labels,
        d_logits=len(labels),
        classes=0 if every is None else len(labels),
    )
    opposite = OppositeTower(pictures=tuple(named.values()), block=block)
    return replace(model, shape=shape, opposite=opposite), replace(table, runs=runs)


def attach_placeholder_images(
    model: ModelContext, table: PromptTable
) -> tuple[ModelContext, PromptTable]:
    """Attach placeholders if there are no images, which is reported elsewhere."""
    every = (Picture("gray"),) * len(table)
    model, table = attach_images(model, table, "", every, every)
    return model, replace(table, stands_in=True)


def attach_texts(
    model: ModelContext, table: PromptTable, experiment: spec.Experiment
) -> tuple[ModelContext, list[Diagnostic]]:
    """Add the texts that an experiment scores images with to the image tower.

    Other models are returned unchanged. Codes: E0207, E0511.
    """
    texts = model.shape.texts
    reader = model.tokenizer
    if texts is None:
        problem = _check_own_labels(model, table)
        return model, [] if problem is None else [problem]
    tokenizer = reader.texts if isinstance(reader, ImageTokenizer) else None
    every = tuple(dict.fromkeys([*table.classes, *_texts(table, experiment)]))
    encoded = {} if tokenizer is None else tokenizer.encode_unique(every)
    ids = tuple(encoded[text].ids for text in every if text in encoded)
    problem = _check_text_lengths(ids, texts.max_positions, table)
    shape = replace(model.shape, labels=every, d_logits=len(every), classes=len(table.classes))
    return replace(model, shape=shape, opposite=OppositeTower(every, ids)), (
        [] if problem is None else [problem]
    )


def _check_own_labels(model: ModelContext, table: PromptTable) -> Diagnostic | None:
    """Return E0207 for classes of a model that has labels."""
    said = table.sources[0].block.spec.classes if table.sources else None
    if said is None or model.shape.stands_in:
        return None
    reason = f"lists texts to classify images, but `{model.name}` has its own labels"
    hint = "remove it: `answer` names a label"
    return BadArgument(span=said.span, name="classes", reason=reason, hint=hint)


def _texts(table: PromptTable, experiment: spec.Experiment) -> Iterator[str]:
    """Yield the texts of rows in all runs, and the texts in measures."""
    for run in table.runs.values():
        for row in run.rows:
            for text in row.texts.values():
                yield text.text.strip()
    said = (*(measure.metric for measure in experiment.measures), *experiment.keep)
    for node in walk(said):
        if isinstance(node, ast.Call):
            for argument in node.arguments:
                of = argument.value
                of = of.of if isinstance(of, ast.ClassOutput) else of
                if isinstance(of, ast.String):
                    tokens, _ = output_texts(table, of, "named")
                    yield from (text.text.strip() for text in tokens)


def _check_text_lengths(
    ids: tuple[tuple[int, ...], ...], most: int | None, table: PromptTable
) -> Diagnostic | None:
    """Return E0511 for texts that are too long for the tower."""
    long = [len(each) for each in ids if most is not None and len(each) > most]
    if not long or most is None:
        return None
    return PromptTooLong(
        span=table.sources[0].block.spec.span if table.sources else None,
        run=f"{table.name}, texts",
        rows=len(long),
        total=len(ids),
        longest=max(long),
        most=most,
    )


def read_tower_inputs(
    folder: Path, shape: ModelShape, model: spec.Model
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Read the image preprocessor of a model, with the tokenizer for its texts.

    Codes: E0412, E0456, E0508, E0522.
    """
    assert shape.patches is not None
    reader, diagnostics = read_processing(folder, shape.patches, model=model.name, span=model.span)
    if reader is None or shape.texts is None:
        return reader, diagnostics
    tokenizer, problems = TextTokenizer.from_folder(folder, model.bos, span=model.span)
    if tokenizer is None:
        return None, [*diagnostics, *problems]
    return attach_tokenizer(reader, tokenizer, shape.texts, model=model.name, span=model.span)


def attach_tokenizer(
    reader: ImageTokenizer,
    tokenizer: TextTokenizer,
    shape: ModelShape,
    *,
    model: str,
    span: Span | None,
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Attach a tokenizer for texts, which pads them if the tower was trained on padded texts.

    Codes: E0412.

    Args:
        shape: The shape of the text tower.
    """
    if shape.padded:
        padded = tokenizer.padded_to(shape.max_positions or 0)
        if padded is None:
            reason = "it has no padding token, but the model was trained on padded texts"
            hint = "name one in its `tokenizer_config.json` (`pad_token`)"
            return None, [NoTokenizer(span=span, model=model, reason=reason, hint=hint)]
        tokenizer = padded
    reader.texts = tokenizer
    return reader, []
