"""A `prompts` block as typed data; used and unused names in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from mechdsl.base import limits
from mechdsl.base.text import Source, Span, name_list
from mechdsl.diagnostics.core import Diagnostic, did_you_mean
from mechdsl.diagnostics.prompts import UnknownValue
from mechdsl.diagnostics.syntax import (
    BadArgument,
    DuplicateName,
    NotSupported,
    RepeatedStatement,
    UnknownWord,
    UnusedName,
)
from mechdsl.program import spec
from mechdsl.program.images import (
    FRAME_SPAN,
    IMAGE_SPAN,
    IMAGE_SPANS,
    check_tiles,
    image_problems,
    sound_problems,
    video_problems,
)
from mechdsl.program.names import Namespace, line_reference
from mechdsl.program.paths import HF_DATASET_PATH
from mechdsl.program.spec import CLEAN, Constant, constant_value, whole_number_value
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import field_names, walk

_IN_TEXT = re.compile(r"\{\s*image\s*\}")
"""An image within a prompt."""

NO_IMAGE_REASON = "has no `image` line"

_OF_TEXTS: Mapping[type[ast.Node], str] = {
    ast.Template: "template",
    ast.Chat: "chat",
    ast.SpanDef: "span",
}


class _BlockLines:
    """Collects the lines of one block; each name may occur once."""

    def __init__(self, definition: ast.PromptsDef, scope: Namespace) -> None:
        self.definition = definition
        self.scope = scope
        self.seen: dict[str, ast.Name] = {}
        self.values: list[spec.Value] = []
        self.templates: list[ast.String] = []
        self.chat: ast.Chat | None = None
        self.chat_arguments: list[spec.ChatArgument] = []
        self.parameters: Mapping[str, Constant] = {}
        self.texts: list[spec.TextDef] = []
        self.spans: list[ast.SpanDef] = []
        self.corruptions: list[spec.Corruption] = []
        self.where: list[ast.Expr] = []
        self.rows: ast.RowsLine | None = None
        self.rename: list[spec.RenamedColumn] = []
        self.renamed: dict[str, ast.Name] = {}
        """First occurrence of each new name."""
        self.split: ast.SplitLine | None = None
        self.from_images = False
        self.image: ast.ImageLine | None = None
        self.pictures: list[spec.PictureDef] = []
        self.tiles: ast.TilesLine | None = None
        self.regions: list[spec.RegionDef] = []
        self.classes: ast.ClassesLine | None = None
        self.scored_with: ast.ImageLine | None = None
        self.image_block: ast.Ref | None = None
        """The block whose images the prompts contain."""

    @property
    def diagnostics(self) -> list[Diagnostic]:
        return self.scope.diagnostics

    def name(self, name: ast.Name) -> None:
        first = self.seen.setdefault(name.id, name)
        if first is not name:
            self.diagnostics.append(
                DuplicateName(
                    span=name.span, name=name.id, first=line_reference(first.span, name.span)
                )
            )

    def later(self, node: ast.Node, what: str) -> None:
        self.diagnostics.append(NotSupported(span=node.span, what=what))

    def _rows_from(self, source: ast.Expr) -> None:
        """Report E0207 for an invalid source of rows."""
        if isinstance(source, ast.String):
            return
        name, reason = source.span.written, "names no rows"
        hint = 'write `rows "facts.json"`, or `rows hf_dataset("folder", split: "train")`'
        if isinstance(source, ast.Call) and source.name == HF_DATASET_PATH.name:
            name, known = source.name, ("path", "split", "config", "revision")
            given = [argument.name or "path" for argument in source.arguments]
            odd = next((each for each in given if each not in known), None)
            texts = all(isinstance(argument.value, ast.String) for argument in source.arguments)
            split = next(
                (argument.value for argument in source.arguments if argument.name == "split"), None
            )
            if odd is not None:
                reason = f"has no argument `{odd}`"
                hint = did_you_mean(odd, known, f"it takes {', '.join(known)}")
            elif len(set(given)) < len(given) or not texts:
                reason = "takes texts in quotes, each once"
            elif "path" not in given or split is None:
                reason = "needs a folder or name and a split"
            elif isinstance(split, ast.String) and "[" in split.value:
                reason, hint = (
                    "takes whole splits",
                    "use `where`, or write `limit` in the experiment",
                )
            else:
                return
        bad = BadArgument(span=source.span, name=name, reason=reason, hint=hint)
        self.diagnostics.append(bad)

    def once(
        self, node: ast.Node, first: ast.Node | None, what: str, hint: str = "keep one of them"
    ) -> None:
        if first is not None:
            self.diagnostics.append(
                RepeatedStatement(
                    span=node.span,
                    what=what,
                    block=self.definition.name.id,
                    first=first.span.line,
                    hint=hint,
                )
            )

    def _split_rows(self, line: ast.SplitLine) -> None:
        self.once(line, self.split, "split")
        if 0 < line.percent.value < 100:
            self.split = line
            return
        self.diagnostics.append(
            BadArgument(
                span=line.percent.span,
                name="split",
                reason="must leave rows on both sides",
                hint="write a share between 0% and 100%, such as `split 50%`",
            )
        )
        half = replace(line.percent, value=50.0)
        self.split = self.split or replace(line, percent=half)

    def add(self, line: ast.DataLine) -> None:
        match line:
            case ast.DomainDef(names=names, domain=domain):
                if [n.id for n in names] == ["template"]:
                    self._templates(line)
                    return
                for name in names:
                    self.name(name)
                ids = tuple(n.id for n in names)
                self.values.append(spec.Value(span=line.span, names=ids, domain=domain))
            case ast.ValueDef(names=names, value=value):
                for name in names:
                    self.name(name)
                ids = tuple(n.id for n in names)
                self.values.append(spec.Value(span=line.span, names=ids, value=value))
            case ast.Template(text=text):
                self._writes_rows(line)
                self.templates.append(text)
            case ast.Text(name=name, value=value):
                self.name(name)
                self.texts.append(spec.TextDef(span=line.span, name=name.id, value=value))
            case ast.SpanDef(name=name):
                if line.within is None:
                    self.name(name)
                self.spans.append(line)
            case ast.Corrupt():
                self._corruption(line)
            case ast.WhereLine(condition=condition):
                self.where.append(condition)
            case ast.RowsLine():
                self.once(line, self.rows, "rows")
                self._rows_from(line.source)
                self.rows = line
            case ast.RenameLine(pairs=pairs):
                for new, old in pairs:
                    self._rename(new, old)
            case ast.SplitLine():
                self._split_rows(line)
            case ast.Chat():
                self._chat(line)
            case ast.ImageLine():
                self._image(line)
            case ast.VideoLine():
                self._video(line)
            case ast.AudioLine():
                self._audio(line)
            case ast.TilesLine():
                self.once(line, self.tiles, "tiles")
                self.tiles = self.tiles or line
            case ast.RegionLine():
                self._region(line)
            case ast.ClassesLine():
                self.once(line, self.classes, "classes")
                self.classes = self.classes or line

    def _region(self, line: ast.RegionLine) -> None:
        self.name(line.name)
        if line.name.id in IMAGE_SPANS:
            reason, hint = "is a built-in region of images", "choose another name for the region"
            at, name = line.name.span, line.name.id
            self.diagnostics.append(BadArgument(span=at, name=name, reason=reason, hint=hint))
            return
        name, column = line.name.id, line.column.id
        image = "" if line.image is None else line.image.id
        if line.image is not None and self.definition.kind == "images":
            reason, hint = "is needed only for images in prompts", "leave it out"
            at, word = line.image.span, f"of {image}"
            self.diagnostics.append(BadArgument(span=at, name=word, reason=reason, hint=hint))
        self.regions.append(
            spec.RegionDef(span=line.column.span, name=name, column=column, image=image)
        )

    def _image(self, line: ast.ImageLine) -> None:
        if self.definition.kind == "prompts" and line.source is not None:
            self.once(line, self.scored_with, "image")
            self.scored_with = self.scored_with or line
            self.name(ast.Name(IMAGE_SPAN, span=line.span))
            return
        if self.definition.kind == "prompts":
            self._picture(line)
            return
        if line.name is not None:
            reason, hint = "names an image within prompts", "leave out the name: `image gray`"
            at, name = line.name.span, f"{line.name.id} ="
            self.diagnostics.append(BadArgument(span=at, name=name, reason=reason, hint=hint))
            self.image = self.image or line
            return
        if line.value is None:
            reason, hint = "applies to prompts with images", "write the content of each row"
            name = line.span.written
            bad = BadArgument(
                span=line.span, name=name, reason=reason, hint=f"{hint}: `image gray`"
            )
            self.diagnostics.append(bad)
            return
        hint = (
            "keep one: a row is one image; for several images, write a `prompts` block that "
            'contains them: `image photo = "{file}"`'
        )
        self.once(line, self.image, "image", hint)
        problems = image_problems(line.value)
        self.diagnostics.extend(problems)
        if not problems:
            self.image = self.image or line

    def _picture(self, line: ast.ImageLine) -> None:
        """Define an image within prompts (E0203, E0207)."""
        assert line.value is not None
        if line.name is None:
            reason, hint = (
                "needs a name in a prompt",
                f"write `image photo = {line.span.written[6:]}`",
            )
            bad = BadArgument(
                span=line.span, name="image", reason=reason, hint=f'{hint} and "{{photo}} …"'
            )
            self.diagnostics.append(bad)
            return
        self.name(line.name)
        problems = image_problems(line.value)
        if not problems and line.name.id in IMAGE_SPANS[1:]:
            reason, hint = "is the name of other tokens", "choose another name for the image"
            name = line.name.id
            problems = [BadArgument(span=line.name.span, name=name, reason=reason, hint=hint)]
        self.diagnostics.extend(problems)
        gray = ast.Name("gray", span=line.value.span)
        value = gray if problems else line.value
        self.pictures.append(
            spec.PictureDef(
                span=line.span, name=line.name.id, value=value, is_invalid=bool(problems)
            )
        )

    def _video(self, line: ast.VideoLine) -> None:
        """Define a video within prompts (E0202, E0203, E0207)."""
        self.name(line.name)
        if not any(picture.is_video for picture in self.pictures):
            self.name(ast.Name(FRAME_SPAN, span=line.name.span))
        gray = ast.Name("gray", span=line.value.span)
        frames = ast.ListLiteral((gray, gray), span=gray.span)
        self._clip(line, "video", video_problems(line.value), frames)

    def _audio(self, line: ast.AudioLine) -> None:
        """Define a sound within prompts (E0203, E0207)."""
        self.name(line.name)
        silence = ast.Name("silence", span=line.value.span)
        self._clip(line, "audio", sound_problems(line.value), silence)

    def _clip(
        self,
        line: ast.VideoLine | ast.AudioLine,
        word: Literal["video", "audio"],
        problems: list[Diagnostic],
        fallback: ast.Expr,
    ) -> None:
        """Define a video or a sound; `fallback` stands for a value with problems."""
        if not problems and self.definition.kind == "images":
            reason, hint = "is a part of prompts", "write a `prompts` block"
            problems = [BadArgument(span=line.span, name=word, reason=reason, hint=hint)]
        self.diagnostics.extend(problems)
        self.pictures.append(
            spec.PictureDef(
                span=line.span,
                name=line.name.id,
                value=fallback if problems else line.value,
                is_video=word == "video",
                is_sound=word == "audio",
                is_invalid=bool(problems),
            )
        )

    def check_regions(self) -> None:
        """Report regions of unknown images, of videos and of sounds (E0207, E0501)."""
        names = [
            picture.name for picture in self.pictures if not (picture.is_video or picture.is_sound)
        ]
        if self.image_block is not None:
            names.append(IMAGE_SPAN)
        for region in self.regions:
            at = region.span
            if not names:
                reason, hint = "is a part of an image, and these prompts have none", ""
                hint = 'add one: `image photo = "{file}"`'
                bad = BadArgument(span=at, name="region", reason=reason, hint=hint)
                self.diagnostics.append(bad)
            elif region.image and region.image not in names:
                hint = did_you_mean(region.image, names, f"images are {name_list(names)}")
                block = self.definition.name.id
                self.diagnostics.append(
                    UnknownValue(span=at, prompts=block, name=region.image, hint=hint)
                )
            elif not region.image and len(names) > 1:
                reason = "is ambiguous: these prompts have several images"
                hint = f"write `region {region.name} of {names[0]} = {region.column}`"
                bad = BadArgument(span=at, name="region", reason=reason, hint=hint)
                self.diagnostics.append(bad)
            else:
                continue
            self.regions = [region_def for region_def in self.regions if region_def is not region]

    def _rename(self, new: ast.Name, old: ast.Name | ast.String) -> None:
        first = self.renamed.setdefault(new.id, new)
        if first is not new:
            self.diagnostics.append(
                DuplicateName(
                    span=new.span, name=new.id, first=line_reference(first.span, new.span)
                )
            )
        column = old.id if isinstance(old, ast.Name) else old.value
        self.rename.append(spec.RenamedColumn(span=old.span, name=new.id, column=column))

    def _writes_rows(self, line: ast.Template | ast.DomainDef | ast.Chat) -> None:
        """Report rows that are defined by two methods (E0209, E0207)."""
        is_chat = isinstance(line, ast.Chat)
        first = self.chat or next(iter(self.templates), None)
        if first is not None and is_chat != isinstance(first, ast.Chat):
            reason = "conflicts with `template`: both define the text of rows"
            hint = "keep one of them"
            at = line.span if is_chat else first.span
            self.diagnostics.append(BadArgument(span=at, name="chat", reason=reason, hint=hint))
            return
        self.once(line, first, "chat" if is_chat else "template")

    def _chat(self, line: ast.Chat) -> None:
        self._writes_rows(line)
        self.chat = self.chat or line
        for turn in line.turns:
            if isinstance(turn, ast.Argument):
                self._chat_argument(turn)
            elif turn.role not in spec.CHAT_ROLES:
                known = spec.CHAT_ROLES
                hint = did_you_mean(turn.role, known, f"roles are {name_list(known)}")
                unknown = UnknownWord(span=turn.span, kind="role", word=turn.role, hint=hint)
                self.diagnostics.append(unknown)

        if not any(isinstance(turn, ast.ChatTurn) for turn in line.turns):
            reason, hint = "has no turn", 'add one: `user "{question}"`'
            self.diagnostics.append(
                BadArgument(span=line.span, name="chat", reason=reason, hint=hint)
            )

    def _chat_argument(self, argument: ast.Argument) -> None:
        value = constant_value(argument.value, self.parameters)
        name = argument.name or ""
        if value is None or any(name == other.name for other in self.chat_arguments):
            reason = "is given twice" if value is not None else "isn't a constant"
            hint = "write it once" if value is not None else f"write `{name}: false`"
            bad = BadArgument(span=argument.span, name=name, reason=reason, hint=hint)
            self.diagnostics.append(bad)
            return
        self.chat_arguments.append(spec.ChatArgument(span=argument.span, name=name, value=value))

    def _templates(self, line: ast.DomainDef) -> None:
        self._writes_rows(line)
        values = line.domain.values
        items = values.items if isinstance(values, ast.ListLiteral) else (values,)
        for item in items:
            if isinstance(item, ast.String):
                self.templates.append(item)
            else:
                self.later(item, "a template that isn't a text in quotes")

    def _corruption(self, line: ast.Corrupt) -> None:
        if line.name.id == CLEAN:
            self.diagnostics.append(
                DuplicateName(
                    span=line.name.span,
                    name=CLEAN,
                    first="the uncorrupted run",
                )
            )
            return
        self.name(line.name)
        if all(known.name != line.name.id for known in self.corruptions):
            self.corruptions.append(
                spec.Corruption(span=line.name.span, name=line.name.id, changes=line.changes)
            )

    def only_of_texts(self) -> None:
        """Report text lines in a block of images (E0207, E0108)."""
        for line in self.definition.lines:
            word = _OF_TEXTS.get(type(line))
            if isinstance(line, ast.DomainDef) and [n.id for n in line.names] == ["template"]:
                word = "template"
            if word is not None:
                hint = "remove it: rows of this block are images and have no text"
                if self.image is None and word != "span":
                    hint = "write `image` instead: rows of this block are images"
                reason = "applies to texts, but this block has images"
                bad = BadArgument(span=line.span, name=word, reason=reason, hint=hint)
                self.diagnostics.append(bad)
        for node in walk(self.definition.lines):
            if isinstance(node, ast.Call) and node.name == "tokens":
                reason, hint = "counts tokens of a text, but this block has images", "leave it out"
                bad = BadArgument(span=node.span, name="tokens", reason=reason, hint=hint)
                self.diagnostics.append(bad)

    def find_image_block(self) -> None:
        """Tell a block whose images the prompts contain from one that they are scored with."""
        written = list(self.templates)
        written += [turn.text for turn in _turns(self.chat)]
        line = self.scored_with
        if line is not None and any(_IN_TEXT.search(text.value) for text in written):
            self.image_block, self.scored_with = line.source, None

    def no_template_changes(self) -> None:
        """Report E0207 for corruptions with a different template for rows of a chat."""
        for change in (c for corruption in self.corruptions for c in corruption.changes):
            if isinstance(change, ast.ChangeLine) and change.word == "template":
                bad = BadArgument(
                    span=change.span,
                    name="template",
                    reason="writes a whole prompt, but this block has chats",
                    hint="change a value used in a turn, or write a separate block",
                )
                self.diagnostics.append(bad)

    def only_of_streamed_rows(self) -> None:
        """Report E0207 for lines that need all rows of a block whose rows are read in parts."""
        rows = self.rows
        if rows is None or not rows.streamed:
            return
        hint = "remove it, or `streamed`"
        for line in self.definition.lines:
            if isinstance(line, ast.DomainDef | ast.Text | ast.Corrupt | ast.SplitLine):
                word = line.span.written.split()[0]
                reason = "doesn't go with `streamed`: it needs all rows of the block"
                bad = BadArgument(span=line.span, name=word, reason=reason, hint=hint)
                self.diagnostics.append(bad)
        if self.definition.kind == "images":
            reason = "applies to texts, but this block has images"
            bad = BadArgument(span=rows.span, name="streamed", reason=reason, hint=hint)
            self.diagnostics.append(bad)


def _turns(chat: ast.Chat | None) -> list[ast.ChatTurn]:
    """Return the turns of a chat, with `user` for an invalid role, which is already reported."""
    turns = () if chat is None else chat.turns
    return [
        turn if turn.role in spec.CHAT_ROLES else replace(turn, role="user")
        for turn in turns
        if isinstance(turn, ast.ChatTurn)
    ]


def lower_prompts(
    definition: ast.PromptsDef, scope: Namespace, parameters: Mapping[str, Constant]
) -> spec.Prompts:
    """Lower a block. Codes: E0108, E0201 (`words(MODEL)`), E0202, E0207, E0209."""
    block = _BlockLines(definition, scope)
    block.parameters = parameters
    for line in definition.lines:
        block.add(line)
    block.only_of_streamed_rows()
    if block.chat is not None:
        block.no_template_changes()
    if definition.kind == "images":
        return _images(block, scope, parameters)
    for line, name in ((block.classes, "classes"), (block.tiles, "tiles")):
        if line is not None:
            reason, hint = (
                "apply to images, but this block has texts",
                "move it to an `images` block",
            )
            bad = BadArgument(span=line.span, name=name, reason=reason, hint=hint)
            scope.diagnostics.append(bad)
    block.find_image_block()
    block.check_regions()
    _names_used(definition, scope)
    return _lowered(block)


def _images(
    block: _BlockLines, scope: Namespace, parameters: Mapping[str, Constant]
) -> spec.Prompts:
    """Lower a block of images, with a placeholder for its template."""
    block.only_of_texts()
    _names_used(block.definition, scope)
    lines = (ast.ImageLine, ast.Template, ast.Chat)  # already rejected, or rejected later
    said = any(isinstance(line, lines) for line in block.definition.lines)
    at = block.definition.name.span
    if not said:
        reason = NO_IMAGE_REASON
        hint = 'add one: `image "{file}"`, `image gray` or `image shapes(…)`'
        name = block.definition.name.id
        scope.diagnostics.append(BadArgument(span=at, name=name, reason=reason, hint=hint))
    image = ast.Name("gray", span=at) if block.image is None else block.image.value
    block.chat, block.spans = None, []
    block.templates = [ast.String("", span=at if block.image is None else block.image.span)]
    known = block.image is not None and not block.from_images
    tiles = None
    if block.tiles is not None:
        named = [*block.seen.values(), *block.renamed.values()]
        problems = check_tiles(block.tiles, image, named)
        scope.diagnostics.extend(problems)
        tiles = None if problems else _lower_tiles(block.tiles, scope, parameters)
    own = {
        "image": image,
        "tiles": tiles,
        "from_images": not known,
    }
    return _lowered(block).model_copy(update=own)


def _lower_tiles(
    line: ast.TilesLine, scope: Namespace, parameters: Mapping[str, Constant]
) -> spec.Tiles | None:
    """Lower a `tiles` line; None after an error (E0201, E0207)."""

    def refused(name: str, reason: str, hint: str) -> None:
        bad = BadArgument(span=line.span, name=name, reason=reason, hint=hint)
        scope.diagnostics.append(bad)

    written = (line.rows, line.cols)
    named = [scope.use("param", each, line.span) for each in written if isinstance(each, str)]
    if not all(named):
        return None
    sides = [whole_number_value(each, parameters) for each in written]
    for said, side in zip(written, sides, strict=True):
        if side is None or side < 1:
            hint = "write how many rows, then how many columns: `tiles 2 by 3`"
            return refused(str(said), "is not a whole number above 0", hint)
    rows, cols = (side or 1 for side in sides)
    if rows * cols == 1:
        return refused("tiles 1 by 1", "doesn't cut the images", "remove it: each row is an image")
    if rows * cols > limits.TILES:
        reason = f"cuts each image into {rows * cols:,}, more than {limits.TILES:,}"
        return refused("tiles", reason, "write fewer rows and columns")
    return spec.Tiles(span=line.span, rows=rows, cols=cols, whole=line.whole)


def _names_used(definition: ast.PromptsDef, scope: Namespace) -> None:
    for node in walk(definition.lines):
        # Only `words(toy)` refers to a model in a block.
        if isinstance(node, ast.Call) and node.name == "words" and len(node.arguments) == 1:
            model = node.arguments[0].value
            if isinstance(model, ast.Name):
                scope.use("model", model.id, model.span)
        elif isinstance(node, ast.Name):
            scope.has("param", node.id)
        elif isinstance(node, ast.String):
            for word in re.findall(r"\w+", " ".join(re.findall(r"\{([^{}]*)\}", node.value))):
                scope.has("param", word)


def _lowered(block: _BlockLines) -> spec.Prompts:
    return spec.Prompts(
        span=block.definition.name.span,
        name=block.definition.name.id,
        values=tuple(block.values),
        templates=() if block.chat is not None else tuple(block.templates),
        chat=tuple(_turns(block.chat)),
        chat_arguments=tuple(block.chat_arguments),
        rows=None if block.rows is None else block.rows.source,
        distinct=block.rows is not None and block.rows.distinct,
        streamed=block.rows is not None and block.rows.streamed,
        rename=tuple(block.rename),
        where=tuple(block.where),
        split=None if block.split is None else block.split.percent.value,
        from_images=block.from_images,
        texts=tuple(block.texts),
        classes=None if block.classes is None else block.classes.text,
        scored_with=None if block.scored_with is None else block.scored_with.source,
        contains=block.image_block,
        pictures=tuple(block.pictures),
        regions=tuple(block.regions),
        spans=tuple(block.spans),
        corruptions=tuple(block.corruptions),
    )


def warn_unused_block_names(tree: ast.File) -> list[Diagnostic]:
    """Report W0730 for unused runs of experiments and for unused texts, spans and corruptions of
    the file's own blocks, except `answer`, which accuracies and explanations read. Values are
    checked when rows are created from them."""
    defined = [
        (kind, name)
        for block in tree.statements
        if isinstance(block, ast.PromptsDef)
        for kind, name in _definitions(block)
    ]
    definers = {id(name) for _, name in defined} | {id(run.name) for run in derived_runs(tree)}
    python = any(isinstance(node, ast.Call) and node.name == "python" for node in walk(tree))
    used = {word for node in walk(tree) if id(node) not in definers for word in _mentioned(node)}
    return [
        UnusedName(span=name.span, kind=kind, name=name.id)
        for kind, name in defined
        if name.id not in used and not (python and kind == "text")  # a metric may read any of them
    ] + list(_unused_runs(tree))


def _unused_runs(tree: ast.File) -> Iterator[Diagnostic]:
    """Yield W0730 for runs with rules whose name occurs neither in their experiment nor outside of
    the experiments that define a run of this name."""
    for experiment in tree.statements:
        for name in _defined_runs(experiment):
            others = [
                statement
                for statement in tree.statements
                if statement is experiment
                or name.id not in {run.id for run in _defined_runs(statement)}
            ]
            nodes = (node for each in others for node in walk(each) if node is not name)
            if not any(name.id in _mentioned(node) for node in nodes):
                yield UnusedName(span=name.span, kind="run", name=name.id)


def _defined_runs(statement: ast.Node) -> list[ast.Name]:
    """Return the names of the runs with rules that an experiment defines."""
    if not isinstance(statement, ast.ExperimentDef):
        return []
    return [line.name for line in statement.statements if isinstance(line, ast.RunDef)]


def derived_runs(tree: ast.File) -> Iterator[ast.RunDef]:
    """Yield the runs with rules that the experiments of a file define."""
    for experiment in tree.statements:
        if isinstance(experiment, ast.ExperimentDef):
            yield from (line for line in experiment.statements if isinstance(line, ast.RunDef))


def pool_names(tree: ast.File) -> Iterator[str]:
    """Yield the names after `from:` in blocks: columns, or blocks whose records a list samples."""
    for block in tree.statements:
        if isinstance(block, ast.PromptsDef):
            for node in walk(block):
                if isinstance(node, ast.Argument) and node.name == "from":
                    yield from (part.id for part in walk(node.value) if isinstance(part, ast.Name))


def _definitions(block: ast.PromptsDef) -> Iterator[tuple[str, ast.Name]]:
    for line in block.lines:
        match line:
            case ast.Text(name=name) if name.id != "answer":
                yield "text", name
            case ast.SpanDef(name=name, within=None):
                yield "span", name
            case ast.Corrupt(name=name):
                yield "corruption", name
            case _:
                pass


def _mentioned(node: ast.Node) -> Iterator[str]:
    """Yield every word of a node that may be a name."""
    match node:
        case ast.Name(id=word):
            yield word
        case ast.Ref(name=word, part=part):
            yield from (name for name in (word, part) if name is not None)
        case ast.Attribute(name=word, attribute=part):
            yield from (word, part)
        case ast.QualifiedRef(name=word):
            yield word
        case ast.Index(name=word):
            yield word
        case ast.SpanRef(name=name, of=of):
            yield from (word for word in (name, of) if word is not None)
        case ast.String(value=text):
            for inside in re.findall(r"\{([^{}]*)\}", text):
                yield from re.findall(r"\w+", inside)
        case _:
            pass


def used_corruptions(experiment: spec.Experiment, program: spec.Program) -> frozenset[str]:
    """Return the corruptions of the experiment's block that the experiment, any of its variants or
    any result of the same block refers to. Its rows are those that all of these change. The rows
    used for fitting directions are separate."""
    if experiment.trains:
        return named_corruptions(experiment, program.prompts[experiment.prompts])
    block = experiment.within or experiment.name
    words: set[str] = set()
    for each in program.experiments:
        if (each.within or each.name) == block:
            words.update(texts_within(each.model_copy(update={"name": "", "within": None})))
    runs = program.prompts[experiment.prompts].corruptions
    return frozenset(run.name for run in runs if run.name in words)


def named_corruptions(experiment: spec.Experiment, block: spec.Prompts) -> frozenset[str]:
    """Return the corruptions of a block that an experiment refers to."""
    words = set(texts_within(experiment.model_copy(update={"name": "", "within": None})))
    return frozenset(run.name for run in block.corruptions if run.name in words)


def texts_within(part: Any) -> Iterator[str]:
    """Yield all texts within a part of a program, including names."""
    match part:
        case str():
            yield part
        case ast.Node():
            for node in walk(part):
                for name in field_names(type(node)):
                    value = getattr(node, name)
                    if isinstance(value, str):
                        yield value
        case spec.Spec():
            for name in spec.spec_fields(type(part)):
                if name != "span":
                    yield from texts_within(getattr(part, name))
        case Mapping():
            yield from texts_within(tuple(cast("Mapping[Any, Any]", part).items()))
        case Sequence():
            for each in cast("Sequence[Any]", part):
                yield from texts_within(each)
        case _:
            pass


def no_prompts() -> spec.Prompts:
    """Return a placeholder block with one short text, which doesn't affect the results."""
    text = spec.NO_TEXT
    span = Span(Source(text), 0, len(text))
    return spec.Prompts(span=span, name=spec.NO_PROMPTS, templates=(ast.String(text, span=span),))
