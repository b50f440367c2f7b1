"""Models with a tower for images and one for texts: which of them reads a block, facing what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.other_blocks import paired_run
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.rows import CLEAN, BlockRows
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.resolve.opposite import chooses, with_images, without_images
from mechdsl.resolve.resolved import ModelContext


class Build(Protocol):
    """Makes the table of a block for a model; ids: numbers of the only rows."""

    def __call__(
        self, name: str, model: ModelContext, *, ids: Sequence[int] | None = None
    ) -> tuple[PromptTable | None, list[Diagnostic]]: ...


Say = Callable[..., None]
"""Diagnostics, the model and the blocks that they are of."""


class Towers:
    """What a file's experiments run of such models."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        model: Callable[[str], ModelContext],
        compiled: Callable[[str, TextTokenizer | None], BlockRows],
        build: Build,
        say: Say,
        stand_in: TextTokenizer,
    ) -> None:
        """model: by its name, what is known of it. stand_in: for a tokenizer that isn't there."""
        self.program = program
        self.diagnostics = diagnostics
        self._model = model
        self._compiled = compiled
        self._build = build
        self._say = say
        self._stand_in = stand_in
        self._texts: dict[str, ModelContext] = {}
        self._whole: dict[str, PromptTable | None] = {}

    def reading(self, name: str, model: ModelContext) -> ModelContext:
        """The tower that reads the rows of a block; other models as they are. E0108 and E0207 where
        rows are texts that can't be scored."""
        block = self.program.prompts[name]
        texts = model.shape.texts
        if block.kind == "images":
            return model
        if model.shape.stands_in:
            if block.scored_with is None:
                return model
            return replace(model, shape=replace(model.shape, side="text", task="one label"))
        if texts is None:
            if block.scored_with is not None:
                what = f"`image` in prompts for `{model.name}`, which has no tower for images,"
                self.diagnostics.append(NotSupported(span=block.scored_with.span, what=what))
            return model
        if block.scored_with is None and not block.from_images and name != spec.NO_PROMPTS:
            reason = f"has no images that `{model.name}` scores its texts with"
            hint = "add a line to it: `image from scenes`, a block of images"
            bad = BadArgument(span=block.span, name=name, reason=reason, hint=hint)
            self.diagnostics.append(bad)
        if model.name not in self._texts:
            reader = model.tokenizer.texts if isinstance(model.tokenizer, ImageReader) else None
            tower = replace(model, shape=texts, tokenizer=reader or self._stand_in)
            self._texts[model.name] = tower
        return self._texts[model.name]

    def facing_images(
        self, experiment: spec.Experiment, model: ModelContext, table: PromptTable
    ) -> tuple[ModelContext, PromptTable]:
        """The text tower with the images that its texts are scored with, row by row or one for all;
        others as they are."""
        if model.shape.side != "text":
            return model, table
        ref = self.program.prompts[experiment.prompts].scored_with
        images = None if ref is None else self.program.prompts.get(ref.name)
        unknown = table.stands_in or model.shape.stands_in
        if ref is None or images is None or images.kind != "images" or unknown:
            return without_images(model, table)
        reader = self._model(model.name)
        found, problems = paired_run(
            table,
            self._compiled(experiment.prompts, model.tokenizer).block,
            self._compiled(ref.name, reader.tokenizer),
            CLEAN,
            name=IMAGE,
            tokenizer=reader.tokenizer,
            build=lambda ids: self._build(ref.name, reader, ids=ids),
            span=ref.span,
        )
        self._say(problems, reader, ref.name)
        if found is None:
            return without_images(model, table)
        own = [row.image for row in found.run.rows if row.image is not None]
        every = None
        if chooses(experiment):
            whole = self._every(ref.name, reader)
            rows = () if whole is None else whole.runs[CLEAN].rows
            every = [row.image for row in rows if row.image is not None]
        return with_images(model, table, ref.name, own, every)

    def _every(self, name: str, model: ModelContext) -> PromptTable | None:
        """All rows of a block, whatever limits there are."""
        if name not in self._whole:
            self._whole[name], found = self._build(name, model)
            self._say(found, model, name)
        return self._whole[name]
