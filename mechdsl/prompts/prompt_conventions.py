"""What a table of prompts does by default, in words, to be printed under every result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from mechdsl.base.names import quoted
from mechdsl.base.plural import plural
from mechdsl.images.picture import GRAY, PictureChange
from mechdsl.prompts.answers import output_words
from mechdsl.prompts.chat_template import ASSISTANT, TODAY
from mechdsl.prompts.image_reader import ImageReader
from mechdsl.prompts.prompt_table import PromptTable, RunRow
from mechdsl.prompts.prompts_block import PromptsBlock
from mechdsl.prompts.row_selection import Collection
from mechdsl.prompts.rows import CLEAN
from mechdsl.prompts.tokenizer import TextTokenizer

Split = Literal["train", "test"]


def rows_convention(
    block: PromptsBlock,
    found: Collection,
    kept: int,
    limit: int | None,
    part: Split | None,
    unchanged: Mapping[str, int],
) -> dict[str, str]:
    """Which rows the table has (`rows`), and what was left out on the way (`dropped`).

    unchanged: by corruption that is used, rows that it left as they were.
    """
    unit = "records" if block.data is not None and block.size == 1 else "combinations"
    unit = unit if block.spec.tiles is None else "tiles"
    text = f"{kept:,} of {block.combinations:,} {unit}"
    if block.draws:
        text = f"{kept:,} drawn from {block.combinations:,} {unit}"
    if part is not None and block.spec.split is not None:
        text += f", part `{part}` of a {block.spec.split:g}% split"
    if limit is not None and kept < limit:
        text += f" (limit {limit:,}, there are no more)"
    if found.repeated:
        text += f", {found.repeated:,} of them equal to another"
    out = {"rows": f"{text}, seed {block.seed}"}
    dropped = [f"{n:,} by `where`" for n in (found.filtered,) if n]
    dropped += [f"{n:,} that were there already" for n in (found.equal,) if n]
    dropped += [f"{n:,} that `{run}` leaves unchanged" for run, n in unchanged.items()]
    if dropped:
        out["dropped"] = ", ".join(dropped)
    return out


def token_conventions(
    block: PromptsBlock, table: PromptTable, tokenizer: TextTokenizer
) -> dict[str, str]:
    """The beginning-of-sequence token, and how answers and the like were tokenised."""
    rows = table.runs[CLEAN].rows
    out = {"bos": tokenizer.bos_convention()}
    if isinstance(tokenizer, ImageReader):
        out = {"images": tokenizer.convention()}
        if block.spec.tiles is not None:
            said = (
                "each a row; those of one image count together, in one part of a split, in one fold"
            )
            out["tiles"] = f"{block.spec.tiles.words}: {said}"
        if block.spec.regions:
            names = ", ".join(f"`{region.name}`" for region in block.spec.regions)
            said = "patches with a pixel, as the model gets it, that lies in it by half or more"
            said += "" if block.spec.tiles is None else "; tiles without any drop out"
            out["regions"] = f"{names}: {said}"
    if block.spec.chat:
        out = _chat_conventions(block, rows, tokenizer)
    for name in rows[0].texts if rows else ():
        lengths = sorted({len(row.texts[name].ids) for row in rows})
        if lengths == [0]:
            first = rows[0].texts[name]
            others = len({row.texts[name].text for row in rows}) - 1
            shown = quoted(first.text) + (f" and {plural(others, 'other')}" if others else "")
            each = "each " if others else ""
            said = f"{output_words(first)}, and no token"
            if isinstance(tokenizer, ImageReader) and tokenizer.texts is not None:
                said = "a text that the image is scored with"
            out[name] = f"{shown}: {each}{said}"
            continue
        sizes = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        tokens = "one token" if lengths == [1] else f"{sizes} tokens"
        out[name] = f"{quoted(rows[0].texts[name].text)}: {tokens}, read behind the prompt"
        if table.moved and not block.is_token_id(name):
            out[name] += f"; its first token {quoted(table.moved_text)} stands in the prompt"
    return out


def _chat_conventions(
    block: PromptsBlock, rows: Sequence[RunRow], tokenizer: TextTokenizer
) -> dict[str, str]:
    """What the template of a chat put in."""
    chat, bos = block.chat, tokenizer.roles.get("bos")
    there = any(row.special[:1] == (True,) for row in rows)
    by = "the chat template" if tokenizer.bos is None else f"bos: {str(tokenizer.bos).lower()}"
    begun = block.spec.chat[-1].role == ASSISTANT
    said = "turns as the model's chat template writes them, "
    said += "the last one a reply that has begun" if begun else "and its opening of a reply"
    if chat is not None and chat.tells_time:
        said += f"; today is {TODAY.day} {TODAY:%B %Y} for it"
    return {"bos": f"`{bos}` in front ({by})" if there else f"none in front ({by})", "chat": said}


def noise_conventions(table: PromptTable) -> dict[str, str]:
    """How much noise corrupted runs add; one standard deviation is worked out from weights."""
    out: dict[str, str] = {}
    for name, run in table.runs.items():
        noise = run.noise
        if noise is None:
            continue
        if noise.sds is not None:
            size = f"{noise.sds:g} sd over {plural(len(noise.sd_tokens), 'token')}"
            if noise.sd_images:
                size += f" of {plural(len(noise.sd_images), 'image')}"
        else:
            size = f"std {noise.std:g}"
        out[f"noise of {name}"] = f"{noise.kind}, {size}, {plural(noise.samples, 'draw')}"
    return out


def image_conventions(table: PromptTable) -> dict[str, str]:
    """What images are the mean of, and what corruptions do to them."""
    out: dict[str, str] = {}
    for name, run in table.runs.items():
        images = [row.image for row in run.rows if row.image is not None]
        done: dict[tuple[object, ...], list[PictureChange]] = {}
        for change in (each for image in images for each in image.changes):
            done.setdefault((change.how, change.patches is None), []).append(change)
        if done:
            out[f"image of {name}"] = ", then ".join(map(_changed, done.values()))
        image = images[0] if images else None
        if image is not None and image.how == "mean":
            rows = f"{plural(image.count, 'image')} of `{image.said}`"
            said = f"mean of {rows}, before any `limit`, as the model gets them"
            out[f"image of {table.name if name == CLEAN else name}"] = said
    return out


_UNITS = {
    "blur": "blur with a Gaussian of radius {} pixels",
    "mask": f"mask with {GRAY} of 255",
    "noise": "noise of standard deviation {} of 255",
    "swap": "swap of two boxes, each resized to the other (bilinear)",
}


def _changed(changes: Sequence[PictureChange]) -> str:
    """What is done, by one change or by several of a kind."""
    amounts = sorted({change.amount for change in changes})
    shown = f"{amounts[0]:g}" if len(amounts) == 1 else f"{amounts[0]:g} to {amounts[-1]:g}"
    said = _UNITS[changes[0].how].format(shown)
    return said if changes[0].patches is None else f"{said}, of patches as the model gets them"
