"""The models of a file, each read once; what isn't there is stood in for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.e01_syntax import NotSupported
from mechdsl.models.locate import locate, needed
from mechdsl.models.shape import ModelShape
from mechdsl.models.shape_from_config import read_shape
from mechdsl.models.stand_in_shape import stand_in_shape
from mechdsl.program import spec
from mechdsl.program.python_files import Mode, PythonFunction, find_function
from mechdsl.prompts.image_reader import ImageReader, StandInReader
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.stand_ins import StandInTokenizer
from mechdsl.prompts.tokenizer import TOKENIZER_FILES, TextTokenizer, has_tokenizer
from mechdsl.resolve.resolved import ModelContext
from mechdsl.resolve.towers_read import read_towers
from mechdsl.syntax import ast
from mechdsl.validate.largest_named import largest_named
from mechdsl.validate.not_called import not_called
from mechdsl.validate.vocabulary import tokenizer_fits


class BuiltModel(Protocol):
    """A model that a function has made, taken apart and proved."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def tokenizer(self) -> TextTokenizer | None: ...


Build = Callable[[spec.Model, PythonFunction], tuple[BuiltModel | None, list[Diagnostic]]]
"""Makes the model of a statement by its function; None where that can't be done. It needs torch."""


class ModelContexts:
    """What is known of each model of a file."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        given: Mapping[str, ModelContext],
        *,
        python: Mode,
        build: Build | None,
        require: bool,
    ) -> None:
        """As those of `Contexts`."""
        self.program = program
        self.diagnostics = diagnostics
        self.given = given
        self.mode = python
        self.build = build
        self.built: dict[str, BuiltModel] = {}
        """Models that functions have made."""
        self.require = require
        self.stand_in = StandInTokenizer()
        self.stand_in_reader = StandInReader()
        self._models: dict[str, ModelContext] = {}
        self._tokenizers: dict[tuple[object, ...], TextTokenizer | None] = {}

    def context(self, name: str) -> ModelContext:
        """What is known of a model; where it isn't here or is refused, what stands in for it."""
        if name not in self._models:
            found = self.given.get(name) or self._read(name)
            if not found.shape.stands_in and not found.tokenizer.stands_in:
                problems = tokenizer_fits(found)
                self.diagnostics.extend(problems)
                if problems:
                    found = replace(found, tokenizer=self.stand_in)
            self._models[name] = found
        return self._models[name]

    def fitting(self, model: ModelContext, table: PromptTable) -> ModelContext:
        """The model with the tokenizer that a table was made with."""
        images = any(row.image is not None for run in table.runs.values() for row in run.rows)
        if images != (model.shape.takes == "image"):  # which has been said
            model = replace(model, shape=stand_in_shape(self._largest))
        if not table.stands_in and images == isinstance(model.tokenizer, ImageReader):
            return model
        return replace(model, tokenizer=self.stand_in_reader if images else self.stand_in)

    def reading(self, name: str, model: ModelContext) -> ModelContext:
        """A model that isn't at hand, as one that reads what a block has."""
        images = self.program.prompts[name].kind == "images"
        if images and model.tokenizer.stands_in and not isinstance(model.tokenizer, ImageReader):
            return replace(model, tokenizer=self.stand_in_reader)
        return model

    def _read(self, name: str) -> ModelContext:
        model = self.program.models.get(name)
        shape, tokenizer = None, None
        if model is None:  # its statement has been refused, or there is none
            model = spec.Model(span=self.program.span, name=name, kind="local", path="")
        elif model.function is not None:
            shape, tokenizer = self._made(model, model.function)
        elif model.base is not None:
            shape, tokenizer = self._adapted(model, self.context(model.base))
        elif (folder := self._folder(model)) is not None:
            shape, found = read_shape(folder, model=model.name, span=model.span)
            self.diagnostics.extend(found)
            if shape is not None and shape.takes == "image":
                tokenizer = self._images(folder, shape, model)
            elif shape is not None or has_tokenizer(folder):
                tokenizer = self._tokenizer(folder, model)
        shape = shape or stand_in_shape(self._largest)
        stand_in = self.stand_in_reader if shape.takes == "image" else self.stand_in
        return ModelContext(model, shape, tokenizer or stand_in)

    def _images(self, folder: Path, shape: ModelShape, model: spec.Model) -> TextTokenizer | None:
        """What makes images ready for the model."""
        assert shape.patches is not None  # else its folder is refused
        reader, found = read_towers(folder, shape, model)
        self.diagnostics.extend(found)
        return reader

    def _folder(self, model: spec.Model) -> Path | None:
        folder, found = locate(model, model.span.source.folder)
        self.diagnostics.extend(needed(found) if self.require else found)
        return folder

    def _made(
        self, model: spec.Model, call: ast.Call
    ) -> tuple[ModelShape | None, TextTokenizer | None]:
        """What a function gives, called where Python may run, the file has no errors so far and
        the function is there; else nothing, and why."""
        function, _ = find_function(call, "model")
        made = None
        if function is None or self.mode == "refuse":
            pass  # E0222, or E0221
        elif self.mode == "look":
            self.diagnostics.append(not_called(model, function, required=self.require))
        elif self.build is not None and not has_errors(self.diagnostics):
            made, found = self.build(model, function)
            self.diagnostics.extend(found)
        if made is None:
            return None, None
        self.built[model.name] = made
        return made.shape, made.tokenizer

    def _adapted(
        self, model: spec.Model, base: ModelContext
    ) -> tuple[ModelShape | None, TextTokenizer | None]:
        """An adapter has the shape of its base, and its tokenizer, unless its folder has another
        one: that is what it was trained with."""
        folder = self._folder(model)
        if folder is None:
            return None, None
        if base.shape.side:
            what = f"an adapter of `{base.name}`, which has two towers,"
            self.diagnostics.append(NotSupported(span=model.span, what=what))
            return None, None
        from mechdsl.models.adapter_folder import other_base, other_task, read_scaling

        scaling, found = read_scaling(folder, model)
        if scaling is not None:
            found += other_base(folder, model, base.spec)
            found += other_task(folder, model, base.spec, base.shape)
        self.diagnostics.extend(found)
        if has_errors(found):
            return None, None
        tokenizer = base.tokenizer
        if has_tokenizer(folder):
            own = self._tokenizer(folder, model.model_copy(update={"bos": base.spec.bos}))
            if own is None or base.tokenizer.stands_in or not own.same_as(base.tokenizer):
                tokenizer = own
        return base.shape, tokenizer

    @cached_property
    def _largest(self) -> dict[str, int]:
        return largest_named(self.program)

    def _tokenizer(self, folder: Path, model: spec.Model) -> TextTokenizer | None:
        """Checkpoints with the same files share one, which takes a while to read, and so their
        prompts."""
        key: tuple[object, ...] = (model.name,)
        if model.matched is not None or model.base is not None:
            files = [folder / name for name in TOKENIZER_FILES]
            key = (model.bos, *(file.read_bytes() for file in files if file.is_file()))
        if key not in self._tokenizers:
            found, problems = TextTokenizer.from_folder(folder, model.bos, span=model.span)
            self.diagnostics.extend(problems)
            self._tokenizers[key] = found
        return self._tokenizers[key]

    def words(self, name: str) -> list[str] | None:
        names = self.program.checkpoints.get(name) or (name,)
        if not self.program.models.keys() >= set(names):
            return None
        return self.of_words(name).tokenizer.plain_words()

    def of_words(self, name: str) -> ModelContext:
        names = self.program.checkpoints.get(name) or (name,)
        return self.context(names[0])  # checkpoints have one tokenizer
