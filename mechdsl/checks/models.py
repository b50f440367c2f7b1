"""The models of a file, each read once; a missing model is replaced by a placeholder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from mechdsl.base.installation import install_command, missing_requirements
from mechdsl.base.text import Span
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.diagnostics.models import (
    BadModelSum,
    InputKindMismatch,
    ModelNotLocal,
    NoImageProcessor,
    VocabularyTooSmall,
)
from mechdsl.diagnostics.rules import BadWeights
from mechdsl.diagnostics.syntax import NotSupported, PythonNotAllowed
from mechdsl.models.config import read_shape
from mechdsl.models.folder import locate_model, require_model
from mechdsl.models.shape import ModelShape, stand_in_shape
from mechdsl.program import spec
from mechdsl.program.python_functions import PythonFunction, PythonMode, find_function
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.table import StandInTokenizer
from mechdsl.prompts.tokens.image_prompts import (
    IMAGE_TOKEN,
    ImagePromptTokenizer,
    check_processor,
    read_prompt_tokenizer,
)
from mechdsl.prompts.tokens.tokenizer import (
    TOKENIZER_FILES,
    ImageTokenizer,
    StandInImageTokenizer,
    TextTokenizer,
    has_tokenizer,
)
from mechdsl.resolve.loops import resolve_loops
from mechdsl.resolve.model_pairs import list_differences, read_tower_inputs
from mechdsl.resolve.types import AxisLabel, ModelContext, ResolvedExperiment, SitePoint
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk

_PROCESSOR_LIBRARIES = {"torch", "transformers"}
"""Libraries with the processors of images and sounds in prompts."""


def largest_indices(program: spec.Program) -> dict[str, int]:
    """Return the highest index of a `layer`, `head`, `neuron` and `expert` in the file."""
    indices: dict[str, int] = {}
    for word, index in _named_indices(program):
        indices[word] = max(index, indices.get(word, 0))
    return indices


def _named_indices(program: spec.Program) -> Iterator[tuple[str, int]]:
    for experiment in program.experiments:
        values = _highest(resolve_loops(experiment.loops, program.parameters, []).labels)
        values |= {n: v for n, v in program.parameters.items() if isinstance(v, int)}
        for part in (*experiment.every_rule, *experiment.measures, *experiment.expects):
            for name in spec.spec_fields(type(part)):
                yield from _indices(getattr(part, name), values)
        for rule in experiment.every_rule:
            if rule.into_layer is not None:
                into = ast.Axis("layer", False, (rule.into_layer,), span=rule.span)
                yield from _indices(into, values)
    for group in program.groups.values():
        yield from _indices(group.sites, {})


def _indices(tree: object, values: dict[str, int]) -> Iterator[tuple[str, int]]:
    for node in walk(tree):
        if isinstance(node, ast.ShortSite):
            yield "layer", node.layer
            if node.index is not None:
                yield ("neuron" if node.unit == "N" else "head"), node.index
        elif isinstance(node, ast.Axis):
            for bound in walk(node.values):
                if isinstance(bound, ast.Bound):
                    yield node.word, _index(bound, values)


def _index(bound: ast.Bound, values: dict[str, int]) -> int:
    if bound.name is not None:
        return values.get(bound.name, 0) + bound.offset
    return bound.value or 0


def _highest(loops: Mapping[str, Sequence[AxisLabel]]) -> dict[str, int]:
    """Return the highest number in the domain of each loop."""
    numbers = {name: [n for n in own if isinstance(n, int)] for name, own in loops.items()}
    return {name: max(own, default=0) for name, own in numbers.items()}


def check_python_model(
    model: spec.Model, function: PythonFunction, *, required: bool
) -> Diagnostic:
    """Return W0710 for a model that needs Python, which isn't run; E0221 if it is required."""
    if required:
        return PythonNotAllowed(
            span=function.span,
            function=function.name,
            file=function.file,
            hint=function.allowing,
        )
    return ModelNotLocal(
        span=model.span,
        model=model.name,
        path=model.path,
        absence="created by Python code, which doesn't run here",
        where="the function that creates it",
        advice="`mechdsl plan --allow-python` runs the function",
    )


def check_tokenizer(model: ModelContext) -> list[Diagnostic]:
    """Check that the model has all tokens of its tokenizer, except added tokens. Those are checked
    only if used, because many models were never trained with them."""
    if model.shape.takes == "image":
        return []  # its tokens aren't ids
    size = model.tokenizer.own_size
    return [_too_small(model, f"has {size:,}")] if size > model.shape.vocab_size else []


def check_prompt_tokens(table: PromptTable, model: ModelContext) -> list[Diagnostic]:
    """Check that the model has all tokens of the prompts and of their texts."""
    if model.shape.takes == "image":
        return []
    rows = [row for run in table.runs.values() for row in run.rows]
    texts = (text.ids for row in rows for text in row.texts.values())
    ids = set[int]().union(*(row.ids for row in rows), *texts)
    if model.shape.attends_to_image and isinstance(model.tokenizer, ImagePromptTokenizer):
        mark = model.tokenizer.image_id  # embeddings have more rows than the vocabulary for it
        ids.discard(mark)
    return _all_there(ids, model, f"prompts `{table.name}`")


def check_measure_tokens(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Check that the model has all tokens that measures name."""
    if experiment.model.shape.takes == "image":
        return []
    every = [atom for measure in (*experiment.measures, *experiment.keep) for atom in measure.atoms]
    atoms = [atom for atom in every if not atom.of_class]
    named = (token for atom in atoms for token in atom.named)
    return _all_there(named, experiment.model, "a measure")


def _all_there(ids: Iterable[int], model: ModelContext, what: str) -> list[Diagnostic]:
    largest = max((each for each in ids if each < IMAGE_TOKEN), default=0)
    if largest < model.shape.vocab_size:
        return []
    token = model.tokenizer.token_text(largest)
    return [_too_small(model, f"uses token {largest:,} (`{token}`) in {what}")]


def _too_small(model: ModelContext, more: str) -> Diagnostic:
    return VocabularyTooSmall(
        span=model.spec.span, model=model.name, size=model.shape.vocab_size, more=more
    )


class BuiltModel(Protocol):
    """A model built by a function, with its architecture identified and verified."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def tokenizer(self) -> TextTokenizer | None: ...


ModelBuilder = Callable[[spec.Model, PythonFunction], tuple[BuiltModel | None, list[Diagnostic]]]
"""Builds a statement's model with its function; None on failure. Requires torch."""


class ModelContexts:
    """Everything known about each model of a file."""

    def __init__(
        self,
        program: spec.Program,
        diagnostics: list[Diagnostic],
        given: Mapping[str, ModelContext],
        *,
        python: PythonMode,
        build: ModelBuilder | None,
        require: bool,
    ) -> None:
        """Store the settings; arguments as in `FileContexts`."""
        self.program = program
        self.diagnostics = diagnostics
        self.given = given
        self.mode = python
        self.build = build
        self.built: dict[str, BuiltModel] = {}
        """Models built by functions."""
        self.require = require
        self.stand_in = StandInTokenizer()
        self.stand_in_reader = StandInImageTokenizer()
        self._models: dict[str, ModelContext] = {}
        self._tokenizers: dict[tuple[object, ...], TextTokenizer | None] = {}

    def context(self, name: str) -> ModelContext:
        """Return what is known about a model, or a placeholder if it is missing or rejected."""
        if name not in self._models:
            context = self.given.get(name) or self._read(name)
            if not context.shape.stands_in and not context.tokenizer.stands_in:
                problems = check_tokenizer(context)
                self.diagnostics.extend(problems)
                if problems:
                    context = replace(context, tokenizer=self.stand_in)
            self._models[name] = context
        return self._models[name]

    def fitting(self, model: ModelContext, table: PromptTable) -> ModelContext:
        """Return the model with the tokenizer of a table."""
        images = any(row.image is not None for run in table.runs.values() for row in run.rows)
        reads_rows = table.name != spec.NO_PROMPTS
        if reads_rows and images != (model.shape.takes == "image"):  # already reported
            model = replace(model, shape=stand_in_shape(self._largest))
        if not table.stands_in and images == isinstance(model.tokenizer, ImageTokenizer):
            return model
        return replace(model, tokenizer=self.stand_in_reader if images else self.stand_in)

    def reading(self, name: str, model: ModelContext) -> ModelContext:
        """Adapt the placeholder of a missing model to the input type of a block."""
        images = self.program.prompts[name].kind == "images"
        if images and model.tokenizer.stands_in and not isinstance(model.tokenizer, ImageTokenizer):
            return replace(model, tokenizer=self.stand_in_reader)
        return model

    def _read(self, name: str) -> ModelContext:
        model = self.program.models.get(name)
        shape, tokenizer = None, None
        if model is None:  # its statement is rejected or missing
            model = spec.Model(span=self.program.span, name=name, kind="local", path="")
        elif model.function is not None:
            shape, tokenizer = self._made(model, model.function)
        elif not model.is_loaded:
            shape, tokenizer = self._made_from_others(model)
        elif model.base is not None:
            shape, tokenizer = self._adapted(model, self.context(model.base))
        elif (folder := self._folder(model)) is not None:
            shape, problems = read_shape(folder, model=model.name, span=model.span)
            self.diagnostics.extend(problems)
            if shape is not None and shape.takes == "image":
                tokenizer = self._images(folder, shape, model)
            elif shape is not None or has_tokenizer(folder):
                images = shape is not None and shape.has_processor
                if images and self._lacks_processor(model):
                    shape = None
                else:
                    tokenizer = self._tokenizer(folder, model, images=images)
                if tokenizer is not None and shape is not None:
                    tokenizer = tokenizer.with_starts(shape.starts)
        shape = shape or stand_in_shape(self._largest)
        stand_in = self.stand_in_reader if shape.takes == "image" else self.stand_in
        return ModelContext(model, shape, tokenizer or stand_in)

    def _images(self, folder: Path, shape: ModelShape, model: spec.Model) -> TextTokenizer | None:
        """Return the image processor of the model."""
        assert shape.patches is not None  # otherwise its folder is rejected
        reader, problems = read_tower_inputs(folder, shape, model)
        self.diagnostics.extend(problems)
        return reader

    def _lacks_processor(self, model: spec.Model) -> bool:
        """Report W0710 if prompts have images or sounds, and the libraries of a model's processor
        aren't installed."""
        has_pictures = any(prompts.pictures for prompts in self.program.prompts.values())
        if self.require or not has_pictures:
            return False
        missing = sorted(_PROCESSOR_LIBRARIES & missing_requirements().keys())
        if not missing:
            return False
        self.diagnostics.append(
            ModelNotLocal(
                span=model.span,
                model=model.name,
                path=model.path,
                absence="without the libraries of its processor",
                where="prepared by ",
                place=f"{' and '.join(missing)}, which this installation lacks",
                advice=f"install what runs need: `{install_command()}`",
            )
        )
        return True

    def _folder(self, model: spec.Model) -> Path | None:
        folder, problems = locate_model(model, model.span.source.folder)
        self.diagnostics.extend(require_model(problems) if self.require else problems)
        return folder

    def _made(
        self, model: spec.Model, call: ast.Call
    ) -> tuple[ModelShape | None, TextTokenizer | None]:
        """Call a model's function, if Python may run, the file has no errors so far and the
        function exists; otherwise report why not."""
        function, _ = find_function(call, "model")
        made = None
        if function is None or self.mode == "refuse":
            pass  # E0222, or E0221
        elif self.mode == "look":
            self.diagnostics.append(check_python_model(model, function, required=self.require))
        elif self.build is not None and not has_errors(self.diagnostics):
            made, problems = self.build(model, function)
            self.diagnostics.extend(problems)
        if made is None:
            return None, None
        self.built[model.name] = made
        return made.shape, made.tokenizer

    def _made_from_others(
        self, model: spec.Model
    ) -> tuple[ModelShape | None, TextTokenizer | None]:
        """Return the shape and tokenizer of an edited model or a sum: those of its first base."""
        first, *others = (self.context(name) for name in model.bases)
        if first.shape.side:
            what = f"a copy of `{first.name}`, which has two towers, with other weights"
            self.diagnostics.append(NotSupported(span=model.span, what=what))
            return None, None
        for other in others:
            if first.shape.stands_in or other.shape.stands_in:
                return None, None
            differences = list_differences(first.shape, other.shape)
            if not differences and not other.tokenizer.same_as(first.tokenizer):
                differences = ["their tokenizers differ"]
            if differences:
                said = f"`{other.name}` and `{first.name}` differ: {'; '.join(differences)}"
                hint = "add models of the same architecture and size, with the same tokenizer"
                problem = BadModelSum(span=model.span, model=model.name, reason=said, hint=hint)
                self.diagnostics.append(problem)
                return None, None
        return first.shape, None if first.tokenizer.stands_in else first.tokenizer

    def _adapted(
        self, model: spec.Model, base: ModelContext
    ) -> tuple[ModelShape | None, TextTokenizer | None]:
        """Return the shape and tokenizer of an adapter: those of its base, but the tokenizer of its
        own folder, if any, because it was trained with that one."""
        folder = self._folder(model)
        if folder is None:
            return None, None
        if base.shape.side:
            what = f"an adapter of `{base.name}`, which has two towers,"
            self.diagnostics.append(NotSupported(span=model.span, what=what))
            return None, None
        from mechdsl.models.adapter_folder import check_adapter_task, check_base_model, read_scaling

        scaling, problems = read_scaling(folder, model)
        if scaling is not None:
            problems += check_base_model(folder, model, base.spec)
            problems += check_adapter_task(folder, model, base.spec, base.shape)
        self.diagnostics.extend(problems)
        if has_errors(problems):
            return None, None
        tokenizer = base.tokenizer
        if has_tokenizer(folder):
            text_tokenizer = self._tokenizer(
                folder, model.model_copy(update={"bos": base.spec.bos})
            )
            text_tokenizer = text_tokenizer and text_tokenizer.with_starts(base.shape.starts)
            if (
                text_tokenizer is None
                or base.tokenizer.stands_in
                or not text_tokenizer.same_as(base.tokenizer)
            ):
                tokenizer = text_tokenizer
        return base.shape, tokenizer

    @cached_property
    def _largest(self) -> dict[str, int]:
        return largest_indices(self.program)

    def _tokenizer(
        self, folder: Path, model: spec.Model, *, images: bool = False
    ) -> TextTokenizer | None:
        """Read a tokenizer. Checkpoints with equal files share it, because reading takes long, and
        therefore also share prompts.

        images: whether the model's prompts may contain images.
        """
        key: tuple[object, ...] = (model.name,)
        if model.matched is not None or model.base is not None:
            files = [folder / name for name in TOKENIZER_FILES]
            key = (model.bos, *(file.read_bytes() for file in files if file.is_file()))
        if key not in self._tokenizers:
            read = read_prompt_tokenizer if images else TextTokenizer.from_folder
            tokenizer, problems = read(folder, model.bos, span=model.span)
            self.diagnostics.extend(problems)
            self._tokenizers[key] = tokenizer
        return self._tokenizers[key]

    def words(self, name: str) -> list[str] | None:
        names = self.program.checkpoints.get(name) or (name,)
        if not self.program.models.keys() >= set(names):
            return None
        return self.of_words(name).tokenizer.plain_words()

    def of_words(self, name: str) -> ModelContext:
        names = self.program.checkpoints.get(name) or (name,)
        return self.context(names[0])  # checkpoints share one tokenizer


def check_input_kind(prompts: spec.Prompts, model: ModelContext) -> Diagnostic | None:
    """Return E0455 for images read by a text model and for prompts read by an image model, E0456
    for an image model passed with a tokenizer."""
    shape = model.shape
    if shape.stands_in or prompts.name == spec.NO_PROMPTS:
        return None
    images = prompts.kind == "images"
    sounds = [picture for picture in prompts.pictures if picture.is_sound]
    hears = shape.takes == "sound to text"
    if (sounds or hears) and not (hears and len(sounds) == len(prompts.pictures) > 0):
        return _unheard(prompts, model, sounds)
    if prompts.pictures and (shape.has_processor or shape.takes == "image"):
        if shape.has_processor:
            at = prompts.pictures[0].span
            video = next((picture for picture in prompts.pictures if picture.is_video), None)
            at = at if video is None else video.span
            videos = video is not None
            problems = check_processor(
                model.tokenizer, model=model.name, span=at, videos=videos, sounds=hears
            )
            return next(iter(problems), None)
    elif prompts.pictures:
        hint = "choose a vision-language model for it, or remove the images"
        return _mismatch(prompts, model, ("texts", "of texts with images", hint))
    if shape.takes == "image to text":
        hint = "define a `prompts` block with one image: "
        hint += '`image photo = "{file}"` and `template "{photo}"`'
        given = f"of {'images' if images else 'texts'}"
        return _mismatch(prompts, model, ("an image and writes a text", given, hint))
    if shape.attends_to_image:
        hint = "write an image in the block: "
        hint += '`image photo = "{file}"` and `template "{photo} ..."`'
        given = f"of {'images' if images else 'texts'}"
        return _mismatch(prompts, model, ("a text with an image", given, hint))
    if images == (shape.takes == "image"):
        return None if not images or isinstance(model.tokenizer, ImageTokenizer) else _bare(model)
    reads, given = ("texts", "images") if images else ("images", "prompts")
    hint = f"define a `{'prompts' if images else 'images'}` block for it"
    return _mismatch(prompts, model, (reads, f"of {given}", hint))


def _unheard(
    prompts: spec.Prompts, model: ModelContext, sounds: Sequence[spec.PictureDef]
) -> InputKindMismatch:
    """Return E0455 for sounds passed to a model that reads none, and the reverse."""
    if model.shape.takes != "sound to text":
        words = (
            "no sounds",
            "of sounds",
            "choose a speech model such as Whisper, or remove the sounds",
        )
        return replace(_mismatch(prompts, model, words), span=sounds[0].span)
    hint = 'define a `prompts` block with one sound: `audio a = "{file}"` and `template "{a}"`'
    given = "of images" if prompts.has_images else "of texts"
    return _mismatch(prompts, model, ("a sound and writes a text", given, hint))


def _mismatch(
    prompts: spec.Prompts, model: ModelContext, words: tuple[str, str, str]
) -> InputKindMismatch:
    """Return E0455. words: what the model reads, what the block contains, and the fix."""
    reads, given, hint = words
    return InputKindMismatch(
        span=model.spec.span,
        model=model.name,
        architecture=model.shape.architecture,
        reads=reads,
        block=prompts.name,
        given=given,
        hint=hint,
    )


def check_image_support(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Report E0108 for rules, saves and metrics that aren't applicable to images."""
    if experiment.model.shape.takes != "image":
        return []
    problems: list[Diagnostic] = []
    for rule in experiment.every_rule:
        if rule.does.changes == "input" and isinstance(rule.spec.fill, ast.String):
            problems.append(NotSupported(span=rule.spec.span, what="a text in an image"))
        elif rule.sites is not None:
            points = [p for here in rule.sites.points.values() for p in here]
            problems += _of_logits(points, rule.spec.span)
    for save in experiment.saves:
        problems += _of_logits(save.points, save.spec.span)
    for measure in experiment.measures:
        points = [atom.point for atom in measure.atoms if atom.point is not None]
        problems += _of_logits(points, measure.expression.span)
    return problems


def _of_logits(points: Iterable[SitePoint], span: Span) -> list[Diagnostic]:
    if all(point.site != "logits" for point in points):
        return []
    return [NotSupported(span=span, what="`logits` at a token of an image model")]


def check_edits(edits: ResolvedExperiment) -> list[Diagnostic]:
    """Report E0344 for edits with several directions, of which one would be used after another."""
    problems: list[Diagnostic] = []
    for rule in edits.rules:
        assert rule.sites is not None
        axes = set[str]()
        if rule.basis is not None:
            axes = set(rule.basis.axes)
        elif rule.direction is not None:
            axes = set(rule.direction.axes)
        several = sorted(axes - set(rule.sites.axes))
        if several and rule.spec.direction is not None:
            named = rule.spec.direction.span.written
            reason = f"`{named}` is a direction for each {several[0]}"
            hint = f"select one: `{named}[{several[0]} 2]`"
            problems.append(BadWeights(span=rule.spec.direction.span, reason=reason, hint=hint))
    return problems


def _bare(model: ModelContext) -> Diagnostic:
    reason = "it was passed with a tokenizer instead of an image processor"
    hint = f'pass its processor: `models={{"{model.name}": (model, processor)}}`'
    return NoImageProcessor(span=model.spec.span, model=model.name, reason=reason, hint=hint)
