"""A prompts block with resolved names, its data and its axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mechdsl.base import limits
from mechdsl.base.records import Record, closest_name
from mechdsl.base.text import Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import (
    BadCall,
    CyclicValue,
    DataFormat,
    NoDomain,
    NoTemplate,
    TooManyValues,
    UnknownValue,
)
from mechdsl.diagnostics.syntax import (
    BadArgument,
    DuplicateName,
    PythonFailed,
    PythonNotAllowed,
    PythonNotFound,
    UnknownWord,
)
from mechdsl.images.picture import Picture, inspect_image
from mechdsl.images.sounds import SOUND_CHANGES, inspect_sound
from mechdsl.program import spec
from mechdsl.program.images import (
    DRAWN_IMAGES,
    IMAGE_SPAN,
    SHAPE_REGION,
    averaged_block,
    check_tile_columns,
    image_expressions,
    is_random_image,
)
from mechdsl.program.python_functions import (
    NESTED_CALL_HINT,
    NESTED_CALL_REASON,
    PYTHON_CALL,
    PythonFailure,
    PythonFunction,
    find_function,
)
from mechdsl.program.spec import TILE
from mechdsl.prompts.data_files import DataFile, StreamedRecords, read_data_file, read_dataset
from mechdsl.prompts.expressions import (
    Constants,
    NameUse,
    PlaceholderLookup,
    WordLookup,
    counts_tokens,
    find_calls,
    is_random,
    make_domain,
    name_uses,
)
from mechdsl.prompts.tokens.chat import ChatTemplate
from mechdsl.prompts.values import DataRecord, Refusal, RichText, RowValue, to_hashable, to_plain
from mechdsl.syntax import ast
from mechdsl.syntax.parser import Placeholder, parse_template
from mechdsl.syntax.printer import format_string
from mechdsl.syntax.traversal import depth, walk
from mechdsl.vocab.corruptions import (
    ActivationChange,
    ImageChange,
    SwapChange,
    TokenChange,
    ValueChange,
    change_kind,
    change_problems,
    patch_changes,
)

PythonNames = tuple[str, ...]


class PythonCalls:
    """The `python(…)` calls of a block."""

    def __init__(self, parts: Iterable[tuple[PythonNames | None, Any]], *, allowed: bool) -> None:
        """Collect the calls. parts: the expressions of rows, with the names a function may see."""
        self._found: dict[int, tuple[ast.Call, PythonNames | None]] = {}
        for names, node in parts:
            for call in find_python_calls(node):
                # The tree keeps the call alive, so its id stays unique; an equal call elsewhere may
                # see other names.
                self._found[id(call)] = call, names
        self._functions: dict[int, PythonFunction] = {}
        self.allowed = allowed

    @property
    def functions(self) -> tuple[PythonFunction, ...]:
        """The functions called so far."""
        return tuple(dict.fromkeys(self._functions.values()))

    def names(self, node: ast.Call) -> PythonNames | None:
        """Return the names that the function receives; None for all names of the row.

        Raises:
            Refusal: E0222.
        """
        if id(node) not in self._found:
            raise Refusal(
                PythonNotFound,
                node.span,
                written=node.span.written,
                reason=NESTED_CALL_REASON,
                hint=NESTED_CALL_HINT,
            )
        return self._found[id(node)][1]

    def run(self, node: ast.Call, row: dict[str, object]) -> int | float | bool | str:
        """Return the function's value for a row.

        Raises:
            Refusal: E0221, E0222, E0223.
        """
        function = self._function(node)
        try:
            found = function.call(dict(row))
        except PythonFailure as failure:
            facts = failure.diagnostic
            hint = facts.hint
            if facts.reason.startswith("KeyError"):
                hint = f"the row has {', '.join(f'`{name}`' for name in row)}"
            raise Refusal(
                PythonFailed,
                node.span,
                function=facts.function,
                reason=facts.reason,
                where=facts.where,
                hint=hint,
            ) from None
        value: object = found
        if hasattr(found, "item"):  # a NumPy or PyTorch scalar
            try:
                value = found.item()
            except (TypeError, ValueError, RuntimeError):  # several numbers
                value = None
        if isinstance(value, int | float | str) and value == value:
            return value
        given = "NaN" if isinstance(value, float) else f"`{type(found).__name__}`"
        raise Refusal(
            PythonFailed,
            node.span,
            function=function.name,
            reason=f"it returned {given}, not a number or a text",
            where=function.where(),
            hint="a value is one number or one text for each row",
        )

    def _function(self, node: ast.Call) -> PythonFunction:
        function = self._functions.get(id(node))
        if function is not None:
            return function
        function, problems = find_function(node, "value")
        if function is None:
            first = problems[0]
            assert isinstance(first, PythonNotFound)
            facts = {"written": first.written, "reason": first.reason, "hint": first.hint}
            raise Refusal(PythonNotFound, node.span, **facts)
        if not self.allowed:
            raise Refusal(
                PythonNotAllowed,
                node.span,
                function=function.name,
                file=function.file,
                hint=function.allowing,
            )
        self._functions[id(node)] = function
        return function


def find_python_calls(node: Any) -> list[ast.Call]:
    return [part for part in walk(node) if isinstance(part, ast.Call) and part.name == PYTHON_CALL]


def python_scopes(block: PromptsBlock) -> Iterator[tuple[PythonNames | None, Any]]:
    """Yield the expressions of rows, each with the names that a function in it may see.

    A value sees the values above it in the file that depend only on values above it, so no value
    depends on itself. Texts, conditions and corruptions see all values.
    """
    given = (*block.columns, *(name for name, _ in block.axes))
    definitions = list({id(d): d for d in block.definitions.values()}.values())
    places = {name: n for n, d in enumerate(definitions) for name in d.names}
    below = len(definitions)
    places |= {name: below for name in block.texts if name not in places}
    for template in block.templates:
        places |= {name: below for name in template.definitions if name not in places}
    last: dict[int, int] = {below: below}

    def reach(number: int) -> int:
        """Return the last definition in the file that a definition depends on, or itself."""
        if number not in last:
            last[number] = number
            used = {use.name for use in name_uses(definitions[number].value, block.placeholders)}
            last[number] = max([number, *(reach(places[n]) for n in used if n in places)])
        return last[number]

    for number, definition in enumerate(definitions):
        if not find_python_calls(definition.value):
            continue
        above = [n for n in range(number) if reach(n) < number]
        yield (*given, *(name for n in above for name in definitions[n].names)), definition.value
    every = (*given, *(name for definition in definitions for name in definition.names))
    settled = tuple(n for n in every if n not in places or reach(places[n]) < below)
    for node in (*block.texts.values(), *block.spec.where):
        yield settled, node
    for corruption in block.spec.corruptions:
        yield None, corruption.changes


ImageInfo = tuple[str, tuple[int, int]]
"""SHA-256; (height, width) of an image, (sampling rate, number of samples) of a sound."""


class ImageFiles:
    """Properties of the image and sound files that a block names, each file read once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[bool, Path], ImageInfo] = {}

    def look(self, path: Path, *, is_sound: bool = False) -> ImageInfo:
        """Return the hash and size of an image or a sound. Raises `MediaError`."""
        key = is_sound, path
        if key not in self._seen:
            self._seen[key] = (inspect_sound if is_sound else inspect_image)(path)
        return self._seen[key]


def image_of_region(block: spec.Prompts, region: spec.RegionDef) -> spec.PictureDef | None:
    """Return the image within prompts that a region is a part of; None for rows of images."""
    named = [picture for picture in block.pictures if region.image in ("", picture.name)]
    return named[0] if named else None


def is_drawn_mask(block: spec.Prompts, region: spec.RegionDef) -> bool:
    """Return whether a region is the mask of generated shapes."""
    picture = image_of_region(block, region)
    image = block.image if picture is None else picture.value
    return region.column == SHAPE_REGION and _is_drawn(image)


def _is_drawn(image: ast.Expr | None) -> bool:
    return isinstance(image, ast.Call) and image.name in DRAWN_IMAGES


def check_image_changes(prompts: spec.Prompts) -> list[Diagnostic]:
    """Return E0203 and E0207 for changes that don't apply to images or to texts."""
    problems: list[Diagnostic | None] = []
    for corruption in prompts.corruptions:
        for place, change in enumerate(corruption.changes):
            if prompts.kind == "prompts":
                problems.append(_not_of_texts(change, prompts))
            else:
                before = corruption.changes[:place]
                problems.append(
                    _not_of_images(change, prompts) or _too_late(change, before, prompts)
                )
    return [problem for problem in problems if problem is not None]


def _not_of_texts(change: ast.CorruptLine, prompts: spec.Prompts) -> Diagnostic | None:
    kind = change_kind(change)
    if (assigned := _find_assigned_picture(change, prompts)) is not None:
        name = assigned.name
        hint = f"change a value in its definition, `{assigned.value.span.written}`"
        hint += "" if assigned.is_sound else f", or write `mask {name}` for a gray image"
        noun = "a sound" if assigned.is_sound else "a video" if assigned.is_video else "an image"
        reason = f"is {noun}, to which a corruption can't assign a value"
        return BadArgument(span=change.span, name=name, reason=reason, hint=hint)
    if prompts.pictures and isinstance(change, ast.ChangeLine):
        names = [picture.name for picture in (*prompts.pictures, *prompts.regions)]
        if is_region_swap(change, prompts):
            return _unknown_part(change, names[len(prompts.pictures) :])
        if isinstance(kind, ImageChange):
            if change.tokens is None:
                return _unknown_part(change, names) or _wrong_media(change, kind, prompts)
            reason = "changes whole images and regions in prompts, not patches"
            hint = f"write `{kind.name} {names[0]}`, or define a `region`"
            return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    line = change if isinstance(change, ast.ChangeLine) else None
    inserts = line is not None and (line.before or line.after) and not line.given
    if isinstance(kind, TokenChange) and inserts:
        reason, hint = "needs the text of its tokens", 'write it after the position: `with " the"`'
        return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    if not isinstance(kind, ImageChange):
        return None
    reason = "changes images, but these prompts are texts"
    hint = "change a value that the template contains"
    if kind.name == "noise":
        hint += ", or write `add gaussian(std: 3 sd) to embed at token 1`"
    return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)


def _find_assigned_picture(
    change: ast.CorruptLine, prompts: spec.Prompts
) -> spec.PictureDef | None:
    """Return the image, video or sound in prompts that a change assigns a value to."""
    written = {name.id for name in change_kind(change).writes(change)}
    return next((picture for picture in prompts.pictures if picture.name in written), None)


def _wrong_media(
    change: ast.ChangeLine, kind: ImageChange, prompts: spec.Prompts
) -> Diagnostic | None:
    """Return E0207 for a change of images on a sound, or of sounds on an image."""
    sounds = [picture.name for picture in prompts.pictures if picture.is_sound]
    for part in change.values:
        is_sound = isinstance(part, ast.Name) and part.id in sounds
        name = part.span.written
        if is_sound and kind.of not in SOUND_CHANGES:
            reason = f"changes images, but `{name}` is a sound"
            hint = f"write `silence {name}` or `noise {name} by 40`"
        elif not is_sound and kind.of == "silence":
            reason, hint = f"changes sounds, but `{name}` is an image", f"write `mask {name}`"
        else:
            continue
        return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    return None


def _not_of_images(change: ast.CorruptLine, prompts: spec.Prompts) -> Diagnostic | None:
    kind, averaged = change_kind(change), averaged_block(prompts.image)
    swaps = is_region_swap(change, prompts)
    if not isinstance(kind, ImageChange) and not swaps:
        if isinstance(kind, ActivationChange):
            return None
        if isinstance(kind, ValueChange) and not kind.templates(change):
            return None
        if isinstance(kind, TokenChange) and kind.inserts:
            return _inserted_text(change)
        return _of_other_things(change)
    if averaged is not None:
        reason = "changes single images, but this is a mean image"
        hint = f"change the images of `{averaged.name}`"
        return BadArgument(span=change.span, name=kind.name, reason=reason, hint=hint)
    assert isinstance(change, ast.ChangeLine)
    names = [region.name for region in prompts.regions]
    return _unknown_part(change, names if swaps else [IMAGE_SPAN, *names])


def _unknown_part(change: ast.ChangeLine, names: Sequence[str]) -> Diagnostic | None:
    """Return E0203 for a name that is neither an image nor a region."""
    parts = [part for part in change.values if isinstance(part, ast.Name) and part.id not in names]
    for part in parts:
        hint = did_you_mean(part.id, names, f"there is {name_list(names)}")
        return UnknownWord(span=part.span, kind="region", word=part.id, hint=hint)
    return None


def _inserted_text(change: ast.CorruptLine) -> Diagnostic | None:
    """Return E0207 for the text of tokens inserted into images, which have none."""
    if not isinstance(change, ast.ChangeLine) or change.given is None:
        return None
    reason = "is a text, but these prompts are images"
    hint = "leave it out: the tokens are vectors of 0 at `embed` until a rule writes others"
    name = f"with {change.given.span.written}"
    return BadArgument(span=change.given.span, name=name, reason=reason, hint=hint)


def _of_other_things(change: ast.CorruptLine) -> Diagnostic:
    """Return E0207 for a text change in a block of images."""
    name = change_kind(change).name
    hint = "change a value that the `image` line names, or the image: `mask image`, `blur image …`"
    if isinstance(change, ast.ChangeLine) and change.tokens is not None:
        hint = f"write `mask {change.tokens.span.written}` for gray"
    reason = "writes a text, but these prompts are images"
    return BadArgument(span=change.span, name=name, reason=reason, hint=hint)


def _too_late(
    change: ast.CorruptLine, before: Sequence[ast.CorruptLine], prompts: spec.Prompts
) -> Diagnostic | None:
    """Return E0207 for a pixel change after a patch change, which is always applied last."""
    if not is_pixel_change(change, prompts) or not patch_changes(before):
        return None
    reason = "follows a change of patches, but patches are changed after all pixels"
    hint = "write it before the change of patches"
    return BadArgument(span=change.span, name=change_kind(change).name, reason=reason, hint=hint)


def is_region_swap(change: ast.CorruptLine, prompts: spec.Prompts) -> bool:
    """Return whether a change swaps regions rather than values."""
    if not isinstance(change, ast.ChangeLine) or not isinstance(change_kind(change), SwapChange):
        return False
    names = {region.name for region in prompts.regions}
    return any(isinstance(value, ast.Name) and value.id in names for value in change.values)


def is_pixel_change(change: ast.CorruptLine, prompts: spec.Prompts) -> bool:
    """Return whether a change alters an image before it is prepared for the model."""
    if isinstance(change, ast.ChangeLine) and isinstance(change_kind(change), ImageChange):
        return change.tokens is None
    return is_region_swap(change, prompts)


def improve_hint(problem: UnknownValue, prompts: spec.Prompts) -> UnknownValue:
    """Improve the hint if a text lacks its quotes, or a mask of shapes is meant."""
    image, at, name = prompts.image, problem.span, problem.name
    line = at.source.text[: at.start].rpartition("\n")[2] if at is not None else ""
    if re.fullmatch(r"\s*(?:answer|wrong)\s+", line) and problem.hint.startswith("its names"):
        return replace(problem, hint=f'{problem.hint}; write a text in quotes: `" {name}"`')
    if image is None or at is None or problem.hint.startswith("did you mean"):
        return problem
    shapes = _is_drawn(image)
    if any(region.span == at for region in prompts.regions):
        meant = f"did you mean `{SHAPE_REGION}`, the pixels of the shapes?"
        return (
            replace(problem, hint=meant)
            if shapes and closest_name(name, [SHAPE_REGION])
            else problem
        )
    if shapes and image.span.start <= at.start and at.end <= image.span.end:
        return replace(problem, hint=f'{problem.hint}; write a text in quotes: `"{name}"`')
    return problem


class Definition(Record):
    """`a, b = EXPR`: names that are defined together, and their expression."""

    names: tuple[str, ...]
    value: ast.Expr

    @cached_property
    def path(self) -> str:
        """The key of its draws."""
        return ",".join(self.names)


@dataclass
class CompiledTemplate:
    """A template's pieces, and the names that its placeholders define (`{s2 = s}`)."""

    text: ast.String
    """The text; for a chat, that of the first turn."""
    pieces: Sequence[str | Placeholder]
    turns: tuple[ast.ChatTurn, ...] = ()
    """The turns of a chat; the pieces are those of all turns."""
    definitions: dict[str, Definition] = field(default_factory=dict[str, Definition])
    constant: RichText | None = None
    """The text if it has no placeholders."""

    @property
    def texts(self) -> tuple[ast.String, ...]:
        """The text, or the texts of the turns."""
        return tuple(turn.text for turn in self.turns) or (self.text,)

    def __post_init__(self) -> None:
        texts = [piece for piece in self.pieces if isinstance(piece, str)]
        if len(texts) == len(self.pieces):
            self.constant = RichText("".join(texts))
        for piece in self.pieces:
            if isinstance(piece, Placeholder) and piece.name is not None:
                itself = isinstance(piece.expr, ast.Name) and piece.expr.id == piece.name
                if not itself:
                    self.definitions[piece.name] = Definition((piece.name,), piece.expr)


def check_definitions(
    graph: Mapping[str, Definition], placeholders: PlaceholderLookup
) -> Diagnostic | None:
    """Return E0502 or E0506 for cyclic definitions or too long chains of definitions.

    Rows are computed recursively, so the length of chains is limited.
    """
    steps: dict[str, int] = {}
    within: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> Diagnostic | None:
        if name in steps or name not in graph:
            return None
        span = graph[name].value.span
        if name in path:
            around = path[path.index(name) :]
            shown = " → ".join(f"`{n}`" for n in (*around, name))
            return CyclicValue(span=span, name=name, path=shown)
        longest = deepest = 0
        for use in name_uses(graph[name].value, placeholders):
            if use.how in ("value", "pool") and len(path) <= limits.CHAIN:
                problem = visit(use.name, (*path, name))
                if problem is not None:
                    return problem
                longest = max(longest, steps.get(use.name, 0))
                deepest = max(deepest, within.get(use.name, 0))
        steps[name] = longest + 1
        within[name] = deepest + depth(graph[name].value)
        bounds = (
            (steps, limits.CHAIN, f"steps from which `{name}` is derived"),
            (within, 2 * limits.DEPTH, f"nested parts of `{name}`"),
        )
        for problem, most, what in bounds:
            if problem[name] > most:
                amount = f"{most + 1} or more"
                hint = "derive it in fewer steps"
                return TooManyValues(span=span, what=what, amount=amount, most=most, hint=hint)
        return None

    return next((f for f in (visit(name, ()) for name in graph) if f is not None), None)


TEMPLATE = "template"
"""Name of the value that selects one of several templates for a row."""

PromptsSpecs = Mapping[str, spec.Prompts]


def _without_wrong_changes(prompts: spec.Prompts, parameters: Constants) -> spec.Prompts:
    """Return the block without invalid changes, so that other errors in it are reported too."""
    right = tuple(
        c.model_copy(
            update={"changes": tuple(x for x in c.changes if not change_problems((x,), parameters))}
        )
        for c in prompts.corruptions
    )
    return prompts.model_copy(update={"corruptions": right})


class PromptsBlock:
    """The names of a block and their definitions, from its parsed specification."""

    python: bool
    """Whether functions of Python files may run."""
    chat: ChatTemplate | None
    """The chat template that formats turns; None if the tokenizer isn't available."""
    joins_frames: bool
    """Whether the model's video processor reads the frames of a video together."""

    def __init__(
        self,
        prompts: spec.Prompts,
        *,
        seed: int,
        words: WordLookup | None,
        parameters: Constants,
        blocks: PromptsSpecs,
        python: bool = False,
        chat: ChatTemplate | None = None,
        joins_frames: bool = False,
    ) -> None:
        self.spec = _without_wrong_changes(prompts, parameters)
        self.name = prompts.name
        self.seed = seed
        self.parameters = parameters
        self.words = words
        self.blocks = blocks
        self.python = python
        self.chat = chat
        self.joins_frames = joins_frames
        self.diagnostics: list[Diagnostic] = [
            d for c in prompts.corruptions for d in change_problems(c.changes, parameters)
        ] + check_image_changes(prompts)
        self._templates: dict[int, CompiledTemplate] = {}
        self._value_names: dict[int, tuple[str, ...]] = {}
        self._affected: dict[tuple[int, tuple[str, ...]], set[str]] = {}
        self._pools: dict[str, DataFile | None] = {}
        self._columns: dict[str, Sequence[RowValue]] = {}
        self.image_files = ImageFiles()
        self.averaged: dict[str, Picture] = {}
        """The mean images by the block that they are of, or its part, once computed."""
        self.data: DataFile | None = self._read()
        self.columns: tuple[str, ...] = self.data.columns if self.data else ()
        self.templates: tuple[CompiledTemplate, ...] = tuple(map(self.template, prompts.templates))
        if prompts.chat:
            self.templates = (self._of_turns(prompts.chat),)
        self.domains: dict[str, Sequence[RowValue]] = {}
        if prompts.tiles is not None:
            self.domains[TILE] = prompts.tiles.names
        self.definitions: dict[str, Definition] = {}
        for value in prompts.values:
            self._define(value)
        self.texts: dict[str, ast.Expr] = {t.name: t.value for t in prompts.texts}
        self.marks: dict[str, list[ast.SpanDef]] = {}
        """Spans marked inside the text of a column (`span subject in prompt`)."""
        for span in prompts.spans:
            if span.within is not None:
                self.marks.setdefault(span.within.id, []).append(span)
        self._check_names()
        self.axes: tuple[tuple[str, Sequence[RowValue]], ...] = tuple(self._axes())
        self.size = 1
        """Number of combinations of values per record."""
        for _, values in self.axes:
            self.size *= len(values)
        self.draws: bool = any(is_random(node, self.placeholders) for node in self._clean_parts())
        if prompts.image is not None:
            self.draws = self.draws or is_random_image(prompts.image)
        self.draws = self.draws or any(is_random_image(each.value) for each in prompts.pictures)
        self._check_streamed()

    # --- building -------------------------------------------------------------------------------

    def _check_streamed(self) -> None:
        """Check streamed rows, which aren't built before the run.

        Codes: E0207 for drawn values, as draws depend on all rows; E0505 for records without a
        value that the block uses.
        """
        if not self.spec.streamed:
            return
        lacking = {} if self.data is None else self.data.lacking
        for use in (
            use for node in self._clean_parts() for use in name_uses(node, self.placeholders)
        ):
            if use.name in lacking:
                rows = self.spec.rows
                assert rows is not None
                path = rows.value if isinstance(rows, ast.String) else rows.span.written
                reason = f"{lacking[use.name]} has no `{use.name}`"
                hint = "give each record a value, or remove the record"
                bad = DataFormat(span=use.span, path=path, reason=reason, hint=hint)
                self.diagnostics.append(bad)
        if self.draws:
            reason = "draws values, which needs all rows, but they are streamed"
            hint = "compute the values from columns, or remove `streamed`"
            bad = BadArgument(span=self.spec.span, name=self.name, reason=reason, hint=hint)
            self.diagnostics.append(bad)

    def _read(self) -> DataFile | None:
        source = self.spec.rows
        if source is None:
            return None
        streamed, data, diagnostics = self.spec.streamed, None, list[Diagnostic]()
        if isinstance(source, ast.String):
            data, diagnostics = read_data_file(source.value, source.span, streamed=streamed)
        elif isinstance(source, ast.Call):  # other expressions are rejected elsewhere
            data, diagnostics = read_dataset(source, streamed=streamed)
        self.diagnostics += diagnostics
        if data is None or not self.spec.rename:
            return data
        unknown = [column for column in self.spec.rename if column.column not in data.columns]
        for column in unknown:
            self.diagnostics.append(
                UnknownValue(
                    span=column.span,
                    prompts=self.name,
                    name=column.column,
                    hint=_hint(column.column, data.columns, "columns"),
                )
            )
        if unknown:
            return None
        new_names = {column.column: column.name for column in self.spec.rename}
        for column in self.spec.rename:
            if column.name in data.columns and column.name not in new_names:
                shown = source.value if isinstance(source, ast.String) else source.span.written
                first = f"the column `{column.name}` of `{shown}`"
                self.diagnostics.append(
                    DuplicateName(span=column.span, name=column.name, first=first)
                )
        if isinstance(data.records, StreamedRecords):
            records: Sequence[DataRecord] = data.records.renamed(new_names)
        else:
            records = [{new_names.get(k, k): v for k, v in r.items()} for r in data.records]
        columns = tuple(new_names.get(c, c) for c in data.columns)
        lacking = {new_names.get(name, name): place for name, place in data.lacking.items()}
        return replace(data, records=records, columns=columns, lacking=lacking)

    def _define(self, value: spec.Value) -> None:
        if value.domain is not None:
            values, diagnostics = make_domain(
                value.domain, prompts=self.name, constants=self.parameters, words=self.words
            )
            self.diagnostics += diagnostics
            for name in value.names:
                self.domains[name] = values
        elif value.value is not None:
            definition = Definition(value.names, value.value)
            for name in value.names:
                self.definitions[name] = definition

    def template(self, text: ast.String) -> CompiledTemplate:
        """Parse a text once. Codes: E0113 and other syntax errors of templates."""
        template = self._templates.get(id(text))
        if template is None:
            pieces, diagnostics = parse_template(text)
            self.diagnostics += diagnostics
            # The tree keeps `text` alive, so its id stays unique.
            template = self._templates[id(text)] = CompiledTemplate(text, pieces)
        return template

    def _of_turns(self, turns: tuple[ast.ChatTurn, ...]) -> CompiledTemplate:
        texts = [self.template(turn.text) for turn in turns]
        pieces = [piece for text in texts for piece in text.pieces]
        return CompiledTemplate(texts[0].text, pieces, turns)

    def placeholders(self, text: ast.String) -> list[ast.Expr]:
        """Return the expressions in the braces of a text."""
        return [p.expr for p in self.template(text).pieces if isinstance(p, Placeholder)]

    @cached_property
    def text_definitions(self) -> dict[str, Definition]:
        """The texts that metrics refer to, as definitions of their names. A column with the name of
        a text is the value of this name: `answer "{answer}"`."""
        return {
            name: Definition((name,), value)
            for name, value in self.texts.items()
            if name not in self.columns
        }

    @cached_property
    def calls(self) -> PythonCalls:
        """The `python(…)` calls of the block."""
        return PythonCalls(python_scopes(self), allowed=self.python)

    def in_file(self, index: int) -> int:
        """Return the number of the combination at an index of a round.

        Rounds order records by content, so limits and splits select the same records for any order
        of the file.
        """
        if self.data is None:
            return index
        rest, place = divmod(index, self.data_size)
        return rest * self.data_size + self.data.by_content.order[place]

    def place_of(self, number: int) -> int:
        """Return the index of a combination in a round: the inverse of `in_file`."""
        if self.data is None:
            return number
        rest, record = divmod(number, self.data_size)
        return rest * self.data_size + self.data.by_content.rank[record]

    @cached_property
    def data_size(self) -> int:
        """Number of records of the data file; 1 without one."""
        return len(self.data.records) if self.data else 1

    @property
    def columns_unknown(self) -> bool:
        """Whether the block has columns whose names can't be read."""
        return self.data is None and (self.spec.rows is not None or self.spec.from_images)

    @cached_property
    def combinations(self) -> int:
        """Number of rows of one round."""
        return self.size * self.data_size

    @cached_property
    def tiles(self) -> int:
        """Number of tiles per image.

        Rows k, k + n, k + 2n, … of a round are the tiles of one image, for n images.
        """
        return len(self.domains[TILE]) if self.spec.tiles is not None else 1

    def image_number(self, number: int) -> int:
        """Return the number of a row's image: equal for its tiles only."""
        if self.tiles == 1:
            return number
        turn, index = divmod(number, max(1, self.combinations))
        images = self.combinations // self.tiles
        return turn * images + index % max(1, images)

    # --- names ------------------------------------------------------------------------------------

    def _clean_parts(self) -> Iterator[ast.Expr]:
        """Yield all expressions of the clean row."""
        for definition in self.definitions.values():
            yield definition.value
        for template in self.templates:
            yield from template.texts
        if self.spec.image is not None:
            yield from image_expressions(self.spec.image)
        for picture in self.spec.pictures:
            yield from image_expressions(picture.value)
        for region in self.spec.regions:
            if not is_drawn_mask(self.spec, region):
                yield ast.Name(region.column, span=region.span)
        yield from self.texts.values()
        if self.spec.classes is not None:
            yield self.spec.classes
        yield from self.spec.where
        for span in self.spec.spans:
            if span.literal is not None:
                yield span.literal

    def _changed_parts(self) -> Iterator[tuple[set[str], ast.Node]]:
        """Yield the expressions of corruptions, with the names that each change reassigns."""
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                if is_region_swap(change, self.spec) or is_pixel_change(change, self.spec):
                    continue
                if _find_assigned_picture(change, self.spec) is not None:
                    continue
                kind = change_kind(change)
                written = {name.id for name in kind.writes(change)}
                for node in kind.reads(change):
                    yield written, node

    def _all_templates(self) -> Iterator[CompiledTemplate]:
        yield from self.templates
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                yield from map(self.template, change_kind(change).templates(change))

    def _check_names(self) -> None:
        """Add E0202, E0501, E0502 and E0525: all errors detectable before rows are built."""
        if self.spec.tiles is not None:
            self.diagnostics += check_tile_columns(self.spec.tiles, self.columns)
        if not self.templates:
            self.diagnostics.append(NoTemplate(span=self.spec.span, prompts=self.name))
        for template in self._all_templates():
            for name in template.definitions:
                if name in self.domains or name in self.definitions:
                    self._duplicate(template, name)
        if not self.columns_unknown:
            self._check_uses()
        self._check_cycles()
        self._check_tokens()
        self._check_roles()

    def _check_tokens(self) -> None:
        """Add E0515 for `tokens(…)` in a prompt's expressions: it counts in finished prompts."""
        elsewhere = (
            *(definition.value for definition in self.definitions.values()),
            *(text for template in self._all_templates() for text in template.texts),
            *self.texts.values(),
            *(part for _, part in self._changed_parts()),
        )
        for call in find_calls(elsewhere, self.placeholders):
            if counts_tokens(call):
                reason, usage = "can only be used in `where`", "where tokens(answer) = 1"
                bad = BadCall(span=call.span, name="tokens", reason=reason, usage=usage)
                self.diagnostics.append(bad)

    def _check_roles(self) -> None:
        """Add E0202 for values that share the name of a chat role and are used in a turn."""
        first = "the turns of that name, which are spans too"
        marks = [span.name for span in self.spec.spans if span.within is None]
        texts = [turn.text for turn in self.spec.chat]
        uses = [(use.name, use.span) for use in name_uses(tuple(texts), self.placeholders)]
        uses += [(mark.id, mark.span) for mark in marks] if texts else []
        for name, span in uses:
            if name in spec.CHAT_ROLES:
                self.diagnostics.append(DuplicateName(span=span, name=name, first=first))

    def _duplicate(self, template: CompiledTemplate, name: str) -> None:
        for piece in template.pieces:
            if isinstance(piece, Placeholder) and piece.name == name:
                first = f"a value of prompts `{self.name}`"
                self.diagnostics.append(DuplicateName(span=piece.span, name=name, first=first))

    def _check_uses(self) -> None:
        names = self.names()
        parts: list[ast.Node] = [*self._clean_parts(), *(n for _, n in self._changed_parts())]
        for use in name_uses(tuple(parts), self.placeholders):
            if use.name in names or (use.how == "pool" and use.name in self.blocks):
                continue
            problem = improve_hint(self._unknown(use.name, use.span), self.spec)
            self.diagnostics.append(problem)
        for corruption in self.spec.corruptions:
            for change in corruption.changes:
                for target in change_kind(change).writes(change):
                    if target.id not in names:
                        self.diagnostics.append(self._unknown(target.id, target.span))
        for spans in self.marks.values():
            for span in spans:
                for name in (span.name, span.within):
                    if name is not None and name.id not in names:
                        self.diagnostics.append(self._unknown(name.id, name.span))

    def names(self) -> dict[str, None]:
        """Return every name that a row has, in file order."""
        columns: dict[str, None] = dict.fromkeys(self.columns)
        if self.spec.tiles is not None:
            columns[TILE] = None
        for value in self.spec.values:
            columns |= dict.fromkeys(value.names)
        for template in self._all_templates():
            columns |= dict.fromkeys(template.definitions)
        if len(self.templates) > 1:
            columns[TEMPLATE] = None
        columns |= dict.fromkeys(picture.name for picture in self.spec.pictures)
        columns |= dict.fromkeys(self.texts) | dict.fromkeys(self.parameters)
        return columns | dict.fromkeys(("true", "false"))

    def value_names(self, template: CompiledTemplate) -> tuple[str, ...]:
        """Return the names of a row's values besides columns and changed names."""
        value_names = self._value_names.get(id(template))
        if value_names is None:
            names = (*(name for name, _ in self.axes), *self.definitions, *template.definitions)
            tiles = () if self.spec.tiles is None else (IMAGE_SPAN,)
            value_names = self._value_names[id(template)] = tuple(dict.fromkeys((*names, *tiles)))
        return value_names

    def affected(self, template: CompiledTemplate, changed: tuple[str, ...]) -> set[str]:
        """Return the changed names, and the names whose values may depend on them in a template.

        Images, and functions of Python files, may depend on every value.
        """
        key = id(template), changed
        if key not in self._affected:
            names = {*changed, IMAGE_SPAN, *(picture.name for picture in self.spec.pictures)}
            values = {name: definition.value for name, definition in template.definitions.items()}
            values |= {
                name: definition.value for name, definition in self.definitions.items()
            } | self.texts
            reads = {name: self._read_names(value) for name, value in values.items()}
            before = -1
            while before != (before := len(names)):
                names |= {n for n, own in reads.items() if own is None or not names.isdisjoint(own)}
            self._affected[key] = names
        return self._affected[key]

    def _read_names(self, value: ast.Expr) -> set[str] | None:
        """Return every name in an expression, and those marked in their texts; None for all."""
        names: set[str] = set()
        for node in walk(value):
            match node:
                case ast.Call(name="python"):
                    return None
                case ast.String():
                    for inner in self.placeholders(node):
                        own = self._read_names(inner)
                        if own is None:
                            return None
                        names |= own
                case ast.Name(id=name) | ast.Attribute(name=name) | ast.Index(name=name):
                    names |= {name, *(mark.name.id for mark in self.marks.get(name, ()))}
                case _:
                    pass
        return names

    def _unknown(self, name: str, span: Span) -> UnknownValue:
        names = [n for n in self.names() if n not in ("true", "false")]
        hint = _hint(name, names, "names")
        return UnknownValue(span=span, prompts=self.name, name=name, hint=hint, unit=self.spec.unit)

    def unknown(self, name: str, span: Span) -> Refusal:
        """Return E0501 for a name that a row doesn't have."""
        if name in self.domains:
            hint = f"a row has several values: only a list draws `{name}`; `xs[1]` is one of them"
        else:
            hint = self._unknown(name, span).hint
        return Refusal(
            UnknownValue, span, prompts=self.name, name=name, hint=hint, unit=self.spec.unit
        )

    def _check_cycles(self) -> None:
        """Add E0502, or E0506 for too long chains of dependent values."""
        for template in self._all_templates():
            texts = {} if self.columns_unknown else self.text_definitions
            definitions = template.definitions | self.definitions
            graph = definitions | texts | definitions
            problem = check_definitions(graph, self.placeholders)
            if problem is not None:
                self.diagnostics.append(problem)
                return

    def only(self, corruption: spec.Corruption) -> PromptsBlock:
        """Return the same block with one of its corruptions."""
        other = copy(self)
        other.spec = self.spec.model_copy(update={"corruptions": (corruption,)})
        return other

    def _axes(self) -> Iterator[tuple[str, Sequence[RowValue]]]:
        """Yield the crossed domains: all but those that only lists draw from."""
        drawn = set[str]()
        names = set[str]()

        def note(uses: Iterable[NameUse], changed: set[str]) -> None:
            for use in uses:
                if use.how == "item":
                    drawn.add(use.name)
                elif use.how == "value" and use.name not in changed:
                    names.add(use.name)

        for part in self._clean_parts():
            note(name_uses(part, self.placeholders), set())
        for changed, part in self._changed_parts():
            # `item = other(item)` changes each item that the lists drew.
            note(name_uses(part, self.placeholders), changed)
        if len(self.templates) > 1:
            yield TEMPLATE, tuple(t.text.value for t in self.templates)
        if self.spec.tiles is not None:  # outermost: `image_number` depends on it
            yield TILE, self.domains[TILE]
        for name, values in self.domains.items():
            if name == TILE and self.spec.tiles is not None:
                continue
            if name in names or name not in drawn:
                yield name, values

    def is_token_id(self, text: str) -> bool:
        """Return whether a text is a token id, so that nothing is tokenised."""
        node = self.texts[text]
        return isinstance(node, ast.Call) and node.name == "token_id"

    # --- domains of names -------------------------------------------------------------------------

    def domain_of(self, node: ast.Expr, template: CompiledTemplate | None) -> Sequence[RowValue]:
        """Return the values a name ranges over: its domain, or that of its source. Raises E0513."""
        domains = self._domain(node, template, frozenset())
        if domains is None:
            shown = node.span.text
            hint = 'give values to draw from: `x in ["a", "b"]`, then `other(x)`'
            raise Refusal(NoDomain, node.span, name=shown, hint=hint)
        return domains

    def _domain(
        self, node: object, template: CompiledTemplate | None, seen: frozenset[str]
    ) -> Sequence[RowValue] | None:
        match node:
            case ast.Name(id=name) if name not in seen:
                if name in self.domains:
                    return self.domains[name]
                if name == TEMPLATE and len(self.templates) > 1:
                    return [t.text.value for t in self.templates]
                definition = self.definitions.get(name)
                if definition is None and template is not None:
                    definition = template.definitions.get(name)
                if definition is not None:
                    return self._domain(definition.value, template, seen | {name})
                return self.column(name)
            case ast.Index(name=name):
                inner = ast.Name(name, span=node.span)
                return self._domain(inner, template, seen)
            case ast.Call(name="other" | "others" | "shuffle" | "list", arguments=(first, *_)):
                return self._domain(first.value, template, seen)
            case ast.Call(name="choice", arguments=arguments) if len(arguments) > 1:
                fixed = [a.value for a in arguments]
                values = [n.value for n in fixed if isinstance(n, ast.Number | ast.String)]
                return values if len(values) == len(fixed) else None
            case _:
                return None

    def column(self, name: str) -> Sequence[RowValue] | None:
        """Return the distinct values of a column, independent of the file's order."""
        if self.data is None or name not in self.columns:
            return None
        if name not in self._columns:
            values = (record.get(name) for record in self.data.sorted)
            unique = {to_hashable(to_plain(v)): v for v in values if v is not None}
            self._columns[name] = tuple(unique.values())
        return self._columns[name]

    def records(self, name: str) -> DataFile | None:
        """Return the records of this or another block, None if it has none. Raises E0504, E0505."""
        if name == self.name:
            return self.data
        if name not in self.blocks:
            return None
        if name not in self._pools:
            other = PromptsBlock(
                self.blocks[name],
                seed=self.seed,
                words=self.words,
                parameters=self.parameters,
                blocks={},
            )
            wrong = next((d for d in other.diagnostics if d.code in ("E0504", "E0505")), None)
            if isinstance(wrong, DataFormat) and wrong.span is not None:
                facts = {"path": wrong.path, "reason": wrong.reason, "hint": wrong.hint}
                raise Refusal(DataFormat, wrong.span, **facts)
            self._pools[name] = other.data
        return self._pools[name]


def _as_name(column: str) -> str:
    """Return the letters and digits of a column's name, in lower case."""
    return "".join(char for char in column.lower() if char.isalnum())


def _hint(name: str, known: Iterable[str], what: str) -> str:
    names = list(known)
    same = [each for each in names if not each.isidentifier() and _as_name(each) == _as_name(name)]
    if what == "names" and len(same) == 1:
        return f"write `rename {{ {name} = {format_string(same[0])} }}` for this column"
    listed = name_list(names)
    return did_you_mean(name, names, f"its {what} are {listed}" if names else "define it")
