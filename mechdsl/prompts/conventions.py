"""Conventions, warnings and errors about finished prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from mechdsl.base.limits import CHAT_DATE
from mechdsl.base.text import count_noun, quote
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import NoTokenFor
from mechdsl.diagnostics.prompts import (
    EmptyPrompt,
    ImageNameAsText,
    PromptTooLong,
    RepeatedBos,
    UnknownWords,
)
from mechdsl.images.layouts import PromptPicture
from mechdsl.images.picture import GRAY_LEVEL, MARKER, PictureChange, Video
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.program.spec import CLEAN
from mechdsl.prompts.block import PromptsBlock
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import RunRow, describe_output
from mechdsl.prompts.tokens.chat import ASSISTANT, find_turns
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.prompts.tokens.tokenizer import EncodedText, ImageTokenizer, TextTokenizer
from mechdsl.prompts.values import RichText


def token_conventions(
    block: PromptsBlock, table: PromptTable, tokenizer: TextTokenizer
) -> dict[str, str]:
    """Describe the beginning-of-sequence token and the tokenisation of answers and other texts."""
    rows = table.runs[CLEAN].rows
    out = {"bos": tokenizer.bos_convention()}
    if isinstance(tokenizer, ImageTokenizer):
        out = {"images": tokenizer.convention()}
        if block.spec.tiles is not None:
            said = (
                "each tile is a row; tiles of one image count as one unit and share a part "
                "of a split and a fold"
            )
            out["tiles"] = f"{block.spec.tiles.words}: {said}"
        if block.spec.regions:
            names = ", ".join(f"`{region.name}`" for region in block.spec.regions)
            said = "patches with a model-input pixel of which at least half is in the region"
            said += "" if block.spec.tiles is None else "; tiles without such patches are dropped"
            out["regions"] = f"{names}: {said}"
    if block.spec.chat:
        out = _chat_conventions(block, rows, tokenizer)
    if isinstance(tokenizer, ImagePromptTokenizer) and any(row.pictures for row in rows):
        out |= tokenizer.prefix_conventions()
    out |= _picture_conventions(rows, tokenizer)
    before = "the prompt"
    if tokenizer.starts:
        before = " ".join(quote(tokenizer.token_text(each)) for each in tokenizer.starts)
        pictures = [picture.picture.noun for row in rows[:1] for picture in row.pictures.values()]
        read = next(iter(pictures), "prompt")
        out["decoder"] = f"begins with {before}; the encoder reads the {read}"
        before = "the reply" if table.replies_of else f"{before} in the decoder"
    for name in rows[0].texts if rows else ():
        lengths = sorted({len(row.texts[name].ids) for row in rows})
        if lengths == [0]:
            first = rows[0].texts[name]
            others = len({row.texts[name].text for row in rows}) - 1
            shown = quote(first.text) + (f" and {count_noun(others, 'other')}" if others else "")
            each = "each " if others else ""
            said = f"{describe_output(first)}, not a token"
            if isinstance(tokenizer, ImageTokenizer) and tokenizer.texts is not None:
                said = "a text that the image is scored with"
            out[name] = f"{shown}: {each}{said}"
            continue
        sizes = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        tokens = "one token" if lengths == [1] else f"{sizes} tokens"
        out[name] = f"{quote(rows[0].texts[name].text)}: {tokens}, read after {before}"
        if table.moved and not block.is_token_id(name):
            out[name] += f"; its first token {quote(table.moved_text)} is part of the prompt"
    return out


def _picture_conventions(rows: Sequence[RunRow], tokenizer: TextTokenizer) -> dict[str, str]:
    """Describe the images within prompts: their preparation and their tokens."""
    out: dict[str, str] = {}
    placed = [picture for row in rows if row.pictures for picture in row.placed_pictures]
    videos = {picture.video for picture in placed}
    for name in dict.fromkeys(picture.video or picture.name for picture in placed):
        every = [picture.picture for row in rows for picture in row.pictures_of(name)]
        said = f"{_list_grids(every, 'tokens')}, {_COUNTED}"
        if every[0].expansion.is_sound:
            frames = max(picture.expansion.size for picture in every)[1]
            said = f"{frames} frames, counted from 1; those after its end are silence"
        elif every[0].expansion.layout.cells and not every[0].expansion.grid:
            said = _resampled_tokens(every, tokenizer)
        joined = name in videos and tokenizer.reads_videos
        if isinstance(tokenizer, ImagePromptTokenizer) and not joined:
            by = f"prepared by the model's `{tokenizer.processor_name}`"
            forms = {picture.picture.grouped for picture in every}
            if True in forms:
                where = " in prompts of several images" if len(forms) > 1 else ""
                by += f", padded to a square and not cut into tiles{where}"
            said = f"{by}; {said}"
        if joined:
            said = f"{_joined_frames(name, rows, tokenizer)}; {said}"
        elif name in videos:
            counts = sorted({len(row.pictures_of(name)) for row in rows})
            shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            said = f"{shown} frames, which the model reads as images in a row, each {said}"
        noun = "video" if name in videos else every[0].picture.noun
        out[f"{noun} `{name}`"] = said
        regions = [f"`{region}`" for region in every[0].regions]
        if regions:
            share = (
                "tokens whose part of the image, divided into 8 x 8, has one that lies at least "
                "half in it"
            )
            out[f"regions of `{name}`"] = f"{', '.join(regions)}: {share}"
    return out


_COUNTED = "rows and columns counted from 1 at the top left"


def _list_grids(pictures: Sequence[PromptPicture], noun: str) -> str:
    """List the rows and columns of images and of their thumbnails, without repetitions.

    noun: Name of the entries, in the plural.
    """
    grids = {picture.expansion.size for picture in pictures}
    said = _list_sizes(grids, noun)
    views = [picture.expansion.layout for picture in pictures if picture.expansion.grid]
    small = [layout.thumbnail for layout in views if len(layout.tiles) > 1]
    sizes = {(tile.rows, tile.cols) for tile in small if tile is not None}
    if not sizes:
        return said
    return f"{said}, and {_list_sizes(sizes, noun)} of the thumbnail"


def _list_sizes(sizes: Collection[tuple[int, int]], noun: str) -> str:
    """List rows and columns: `2 x 4 tokens`, or three of them and the number of others."""
    first = ", ".join(f"{height} x {width}" for height, width in sorted(sizes)[:3])
    more = len(sizes) - 3
    return f"{first} {noun}" + (f" and {count_noun(more, 'more size')}" if more > 0 else "")


def _resampled_tokens(pictures: Sequence[PromptPicture], tokenizer: TextTokenizer) -> str:
    """Describe tokens that a resampler computes, and the patches of the encoder if known."""
    counts = sorted({len(picture.expansion.layout.cells) for picture in pictures})
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    said = f"{shown} tokens without rows and columns, each computed from all patches of a tile"
    if isinstance(tokenizer, ImagePromptTokenizer):
        with suppress(UnsupportedProcessor):
            grids = _list_grids([tokenizer.in_encoder(picture) for picture in pictures], "patches")
            said += f"; in the vision encoder {grids}, {_COUNTED}"
    return said


def _joined_frames(name: str, rows: Sequence[RunRow], tokenizer: TextTokenizer) -> str:
    """Describe the frames of a video that a video processor reads."""
    assert isinstance(tokenizer, ImagePromptTokenizer)
    videos = [picture for row in rows for picture in row.whole_pictures if picture.name == name]
    counts = sorted({video.picture.picture.count for video in videos})
    shown = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    said = f"{shown} frames, {tokenizer.frame_rate:g} per second, all read by the model's "
    said += f"`{tokenizer.video_processor_name}`"
    if (merged := videos[0].merged_frames) > 1:
        said += f", which merges {merged} frames: `frame 1` is the first {merged}"
    extents = dict.fromkeys(
        tuple(picture.picture.picture.extent for picture in row.whole_pictures) for row in rows
    )
    if not all(len(each) < 2 or tokenizer.prepares_together(each) for each in extents):
        said += "; each video of a prompt is prepared alone, because the processor needs the same "
        said += "number of frames in all"
    return said


def _chat_conventions(
    block: PromptsBlock, rows: Sequence[RunRow], tokenizer: TextTokenizer
) -> dict[str, str]:
    """Describe what the chat template adds."""
    chat, bos = block.chat, tokenizer.roles.get("bos")
    there = any(row.special[:1] == (True,) for row in rows)
    by = "the chat template" if tokenizer.bos is None else f"bos: {str(tokenizer.bos).lower()}"
    begun = block.spec.chat[-1].role == ASSISTANT
    said = "turns formatted by the model's chat template, "
    if begun:
        said += "the last one an unfinished reply"
    elif chat is None or chat.starts_reply:
        said += "followed by its start of a reply"
    else:
        said += "without a start of a reply (it doesn't read `add_generation_prompt`)"
    for argument in block.spec.chat_arguments:
        said += f"; {argument.name}: {str(argument.value).lower()}"
    if chat is not None and chat.tells_time:
        said += f"; the template's date is {CHAT_DATE.day} {CHAT_DATE:%B %Y}"
    return {
        "bos": f"`{bos}` before the text ({by})" if there else f"none before the text ({by})",
        "chat": said,
    }


def noise_conventions(table: PromptTable) -> dict[str, str]:
    """Describe the noise of corrupted runs; one standard deviation is computed from weights."""
    out: dict[str, str] = {}
    for name, run in table.runs.items():
        noise = run.noise
        if noise is None:
            continue
        if noise.sds is not None:
            size = f"{noise.sds:g} sd over {count_noun(len(noise.sd_tokens), 'token')}"
            if noise.sd_images:
                size += f" of {count_noun(len(noise.sd_images), 'image')}"
        else:
            size = f"std {noise.std:g}"
        out[f"noise of {name}"] = f"{noise.kind}, {size}, {count_noun(noise.samples, 'draw')}"
    return out


def image_conventions(table: PromptTable) -> dict[str, str]:
    """Describe mean images and the corruptions' changes to images."""
    out: dict[str, str] = {}
    for name, run in table.runs.items():
        images = [row.image for row in run.rows if row.image is not None]
        for picture in (
            prompt_picture.picture for row in run.rows for prompt_picture in row.pictures.values()
        ):
            images += picture.of if isinstance(picture, Video) else (picture,)
        done: dict[tuple[object, ...], list[PictureChange]] = {}
        for change in (picture_change for image in images for picture_change in image.changes):
            done.setdefault((change.how, change.patches is None), []).append(change)
        if done:
            noun = images[0].noun
            out[f"{noun} of {name}"] = ", then ".join(map(_changes_in_words, done.values()))
        means = {image.said: image for image in images if image.how == "mean"}
        if means:
            picture = any(row.image is not None for row in run.rows)
            pixels = "in model-input pixels" if picture else "in pixels before preparation, rounded"
            said = " and ".join(
                f"mean of {count_noun(mean.count, 'image')} of `{mean.said}`"
                f"{'' if mean.fit is None else f', {mean.fit.words} first'}"
                for mean in means.values()
            )
            key = f"image of {table.name if name == CLEAN else name}"
            changed = f", then {out[key]}" if key in out else ""
            out[key] = f"{said}, before any `limit`, {pixels}{changed}"
    return out


_UNITS = {
    "blur": "blur with a Gaussian of radius {} pixels",
    "mask": f"mask with {GRAY_LEVEL} of 255",
    "noise": "noise of standard deviation {} of 255",
    "silence": "silence",
    "swap": "swap of two boxes, each resized to the other (bilinear)",
}


def _changes_in_words(changes: Sequence[PictureChange]) -> str:
    """Describe one change, or several of one type."""
    amounts = sorted({change.amount for change in changes})
    shown = f"{amounts[0]:g}" if len(amounts) == 1 else f"{amounts[0]:g} to {amounts[-1]:g}"
    said = _UNITS[changes[0].how].format(shown)
    return said if changes[0].patches is None else f"{said}, on patches of the model's input"


def check_empty_prompts(
    block: PromptsBlock, run: str, riches: Sequence[RichText]
) -> Iterator[Diagnostic]:
    """Yield E0526 for prompts without text."""
    empty = sum(not rich.text.strip() for rich in riches)
    if empty:
        yield EmptyPrompt(span=block.templates[0].text.span, run=run, rows=empty)


_IMAGE_SUFFIX = re.compile(r"\w\.(?:png|jpe?g|webp|gif|bmp|tiff?)(?!\w|\.\w)", re.IGNORECASE)


def check_image_names(
    block: PromptsBlock, tokenizer: TextTokenizer, run: str, riches: Sequence[RichText]
) -> Iterator[Diagnostic]:
    """Yield W0706 for names of image files in the texts of a model that reads images."""
    if not isinstance(tokenizer, ImagePromptTokenizer):
        return
    mistakes: list[tuple[str, re.Match[str], RichText]] = []
    for rich in riches:
        text = MARKER.sub(lambda marker: " " * len(marker.group()), rich.text)
        if (match := _IMAGE_SUFFIX.search(text)) is not None:
            mistakes.append((text, match, rich))
    if not mistakes:
        return
    text, match, rich = mistakes[0]
    name = text[: match.end()].split()[-1].lstrip("\"'`([{<")
    place = (match.end() - len(name), match.end())
    field = next((s.name for s in rich.spans if (s.start, s.end) == place and not s.within), None)
    hint = f'add the line `image photo = "{name}"`, and write `{{photo}}` in the template'
    if field is not None:
        hint = f'add the line `image photo = "{{{field}}}"`, and write `{{photo}}` instead of '
        hint += f"`{{{field}}}` in the template"
    yield ImageNameAsText(
        span=block.templates[0].text.span,
        name=name,
        rows=len(mistakes),
        total=len(riches),
        run=run,
        hint=hint,
    )


def check_repeated_bos(
    block: PromptsBlock, tokenizer: TextTokenizer, run: str, encoded: Sequence[EncodedText]
) -> Iterator[Diagnostic]:
    """Yield W0707 for prompts that begin with two beginning-of-sequence tokens."""
    bos = tokenizer.role_ids.get("bos")
    rows = sum(bos is not None and text.ids[:2] == (bos, bos) for text in encoded)
    if bos is None or not rows:
        return
    template = block.templates[0]
    yield RepeatedBos(
        span=template.text.span,
        bos=tokenizer.token_text(bos),
        rows=rows,
        total=len(encoded),
        run=run,
    )


def check_unknown_words(
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    run: str,
    riches: Sequence[RichText],
    encoded: Sequence[EncodedText],
) -> Iterator[Diagnostic]:
    """Yield W0702, or E0436 if the tokenizer has no token for unknown words."""
    template = block.templates[0]
    for number, (words, rows) in sorted(_by_turn(block, tokenizer, riches, encoded).items()):
        shown = ", ".join(words[:3]) + (f" and {len(words) - 3} more" * (len(words) > 3))
        turns = template.turns
        span = turns[number].text.span if turns else template.text.span
        unknown = tokenizer.unknown_id
        if unknown is None or tokenizer.made_unknown:
            yield NoTokenFor(span=span, words=shown, rows=rows, total=len(riches), run=run)
            continue
        yield UnknownWords(
            span=span,
            words=shown,
            rows=rows,
            total=len(riches),
            run=run,
            unknown=tokenizer.token_text(unknown),
        )


def _by_turn(
    block: PromptsBlock,
    tokenizer: TextTokenizer,
    riches: Sequence[RichText],
    encoded: Sequence[EncodedText],
) -> dict[int, tuple[list[str], int]]:
    """Return the unknown words by turn number, each turn with its number of affected rows.

    Words outside all turns count for turn 0.
    """
    unknown = tokenizer.unknown_id
    roles = [turn.role for turn in block.templates[0].turns]
    words: dict[int, dict[str, None]] = {}
    rows: dict[int, int] = {}
    for rich, tokens in zip(riches, encoded, strict=True):
        if unknown not in tokens.ids:
            continue
        # Without the decoder's first tokens, which have no text.
        decodes = any(first < last for first, last in tokens.offsets[tokens.source :])
        read = tokens.ids if decodes else tokens.ids[: tokens.source or None]
        places = [i for i, token in enumerate(read) if token == unknown and not tokens.special[i]]
        if not places:
            continue
        turns = list(find_turns(rich, roles))
        seen: set[int] = set()
        for i in places:
            start, end = tokens.offsets[i]
            holds = (n for n, first, last in turns if first <= start < last)
            turn = next(holds, 0)
            words.setdefault(turn, {})[quote(rich.text[start:end].strip())] = None
            seen.add(turn)
        for turn in seen:
            rows[turn] = rows.get(turn, 0) + 1
    return {turn: (list(found), rows[turn]) for turn, found in words.items()}


def check_prompt_lengths(
    block: PromptsBlock, table: PromptTable, most: int
) -> Iterator[Diagnostic]:
    """Yield E0511 for the first run that has prompts of more than `most` tokens."""
    for name, run in table.runs.items():
        lengths = [
            max(0 if row.decodes_text else row.source, len(row.ids) - row.source)
            for row in run.rows
        ]
        longer = sum(n > most for n in lengths)
        if longer:
            yield PromptTooLong(
                span=block.templates[0].text.span,
                run=name,
                rows=longer,
                total=len(lengths),
                longest=max(lengths),
                most=most,
            )
            return
