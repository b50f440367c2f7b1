"""What stands on the other side of a model with two towers: the texts that images are scored with.

A model scores as many texts as an experiment names: the classes of its block, the texts of its
rows, and those that its measures write out. Each is an output of the model, by its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.diagnostics.e05_data import PromptTooLong
from mechdsl.images.picture import Picture
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE
from mechdsl.prompts.answers import output_texts
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import PromptTable, TextTokens
from mechdsl.resolve.resolved import ModelContext, Opposite
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk
from mechdsl.vocab.metrics import METRICS


def chooses(experiment: spec.Experiment) -> bool:
    """Whether something of an experiment is a choice among all that there is to score with."""
    said = (*(each.metric for each in experiment.measures), *experiment.keep)
    said += tuple(each.condition for each in experiment.expects if each.condition is not None)
    named = (node for node in walk(said) if isinstance(node, ast.Name | ast.Call))
    words = {node.id if isinstance(node, ast.Name) else node.name for node in named}
    return not words.isdisjoint({*METRICS, "accuracy"} - {"logit", "score", "cosine"})


def with_images(
    model: ModelContext,
    table: PromptTable,
    block: str,
    own: Sequence[Picture],
    every: Sequence[Picture] | None,
) -> tuple[ModelContext, PromptTable]:
    """The text tower with the images that texts are scored with, and its table with the name of
    each row's image. own: of each row; every: all there are to choose from, where that counts."""
    named = {each.text: each for each in (*(every or ()), *own)}
    runs = {
        name: replace(
            run,
            rows=tuple(
                replace(row, texts={**row.texts, IMAGE: TextTokens(picture.text, ())})
                for row, picture in zip(run.rows, own, strict=True)
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
    opposite = Opposite(pictures=tuple(named.values()), block=block)
    return replace(model, shape=shape, opposite=opposite), replace(table, runs=runs)


def without_images(model: ModelContext, table: PromptTable) -> tuple[ModelContext, PromptTable]:
    """The same where there are none, which is said elsewhere: what stands in for them."""
    every = (Picture("gray"),) * len(table)
    model, table = with_images(model, table, "", every, every)
    return model, replace(table, stands_in=True)


def with_opposite(
    model: ModelContext, table: PromptTable, experiment: spec.Experiment
) -> tuple[ModelContext, list[Diagnostic]]:
    """The image tower with the texts that an experiment scores images with; other models as they
    are. Codes: E0207, E0511."""
    texts = model.shape.texts
    reader = model.tokenizer
    if texts is None:
        problem = _labels_of_its_own(model, table)
        return model, [] if problem is None else [problem]
    tokenizer = reader.texts if isinstance(reader, ImageReader) else None
    every = tuple(dict.fromkeys([*table.classes, *_texts(table, experiment)]))
    encoded = {} if tokenizer is None else tokenizer.encode_unique(every)
    ids = tuple(encoded[text].ids for text in every if text in encoded)
    problem = _too_long(ids, texts.max_positions, table)
    shape = replace(model.shape, labels=every, d_logits=len(every), classes=len(table.classes))
    return replace(model, shape=shape, opposite=Opposite(every, ids)), (
        [] if problem is None else [problem]
    )


def _labels_of_its_own(model: ModelContext, table: PromptTable) -> Diagnostic | None:
    """E0207 for classes of a model that has them already."""
    said = table.sources[0].block.spec.classes if table.sources else None
    if said is None or model.shape.stands_in:
        return None
    reason = f"says what texts images are told apart by, and `{model.name}` has labels of its own"
    hint = "leave it out: `answer` names a label"
    return BadArgument(span=said.span, name="classes", reason=reason, hint=hint)


def _texts(table: PromptTable, experiment: spec.Experiment) -> Iterator[str]:
    """Texts of rows in all runs, and those that measures write out."""
    for run in table.runs.values():
        for row in run.rows:
            for text in row.texts.values():
                yield text.text.strip()
    said = (*(each.metric for each in experiment.measures), *experiment.keep)
    for node in walk(said):
        if isinstance(node, ast.Call):
            for argument in node.arguments:
                of = argument.value
                of = of.of if isinstance(of, ast.ClassOutput) else of
                if isinstance(of, ast.String):
                    found, _ = output_texts(table, of, "named")
                    yield from (text.text.strip() for text in found)


def _too_long(
    ids: tuple[tuple[int, ...], ...], most: int | None, table: PromptTable
) -> Diagnostic | None:
    """E0511 for texts that the tower can't read."""
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
