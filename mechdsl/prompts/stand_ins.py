"""What stands in for a tokenizer that isn't at hand, and for rows that can't be made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from string import ascii_lowercase

from mechdsl.base import limits
from mechdsl.diagnostics.e05_data import UnknownValue
from mechdsl.images.picture import Picture
from mechdsl.program import spec
from mechdsl.program.lower_images import IMAGE
from mechdsl.prompts.build_table import build_table
from mechdsl.prompts.image_reader import StandInReader
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.prompts_block import TEMPLATE, PromptsBlock
from mechdsl.prompts.rows import CLEAN
from mechdsl.prompts.tokenizer import Encoded, TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.reserved import RESERVED

_NAME = re.compile(r"(?!L\d+([HN]\d+)?$)[A-Za-z_]\w*")
"""What a placeholder takes for a name: columns may be called anything."""

_SHOWN = limits.TEXT // (2 * limits.NAME)
"""Names in the prompt, whose text has a limit too."""

_PIECE = re.compile(r"\s?\w+|\s?[^\w\s]+|\s+")
"""A word or a sign with the space before it: most words are one token of most tokenizers."""
_BOS = 0


class StandInTokenizer(TextTokenizer):
    """Words and signs are tokens, behind one that begins the text; it knows every word."""

    stands_in = True

    def __init__(self) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.roles = {"bos": "<s>"}
        self.bos = None
        self.hash = ""
        self.name = ""
        self._ids: dict[str, int] = {self.roles["bos"]: _BOS}
        self._texts: list[str] = [self.roles["bos"]]

    @property
    def vocab_size(self) -> int:
        return 1 << 62

    @property
    def role_ids(self) -> dict[str, int]:  # type: ignore[override]
        return {"bos": _BOS}

    @property
    def unknown_id(self) -> None:  # type: ignore[override]
        return None

    def token_text(self, token: int) -> str:
        return self._texts[token] if token < len(self._texts) else f"<{token}>"

    def plain_words(self) -> list[str]:
        return [f"word{a}{b}" for a in ascii_lowercase for b in ascii_lowercase]

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[Encoded]:
        return [self._encoded(text, add_special) for text in texts]

    def _encoded(self, text: str, add_special: bool) -> Encoded:
        found = list(_PIECE.finditer(text))
        ids = [self._id(piece.group()) for piece in found]
        offsets = [piece.span() for piece in found]
        if add_special:
            ids, offsets = [_BOS, *ids], [(0, 0), *offsets]
        special = (add_special, *(False for _ in found))[0 if add_special else 1 :]
        return Encoded(tuple(ids), tuple(offsets), tuple(special))

    def _id(self, text: str) -> int:
        found = self._ids.setdefault(text, len(self._texts))
        if found == len(self._texts):
            self._texts.append(text)
        return found


def stand_in_table(block: PromptsBlock, tokenizer: TextTokenizer) -> PromptTable:
    """One row with every name of a block whose own rows can't be made: its value is the name, its
    text is marked in the prompt. Its runs are those of the block."""
    at = block.spec.span
    constant = {*block.parameters, *block.texts, "true", "false", TEMPLATE, *RESERVED}
    lacking = (d.name for d in block.diagnostics if isinstance(d, UnknownValue))  # said already
    roles = (turn.role for turn in block.spec.chat)
    unnamed = [] if block.spec.tiles is None else [IMAGE]
    columns = [
        *block.names(),
        *unnamed,
        *roles,
        *(span.name.id for span in block.spec.spans),
        *lacking,
    ]
    known = (n for n in dict.fromkeys(columns) if n not in constant)
    names = [n for n in known if len(n) <= limits.NAME and _NAME.fullmatch(n)]

    def text(value: str) -> ast.String:
        return ast.String(value, span=at)

    made = spec.Prompts(
        span=at,
        name=block.name,
        values=tuple(
            spec.Value(span=at, names=(name,), domain=ast.Domain(text(name), span=at))
            for name in names
        ),
        templates=(text(" ".join(f"{{{name}}}" for name in names[:_SHOWN]) or "word"),),
        texts=tuple(spec.TextDef(span=at, name=name, value=text(" word")) for name in block.texts),
    )
    table, _ = build_table(made, tokenizer=tokenizer, limit=1)
    assert table is not None
    table = replace(table, columns_unknown=block.columns_unknown)
    return with_stand_ins(table, [corruption.name for corruption in block.spec.corruptions])


def as_images(table: PromptTable, reader: StandInReader) -> PromptTable:
    """A table that stands in for one of images: every row is gray."""
    gray = Picture("gray")
    tokens = reader.encode(gray.text)
    runs = {
        name: replace(
            run,
            rows=tuple(
                replace(
                    row,
                    text=gray.text,
                    ids=tokens.ids,
                    offsets=tokens.offsets,
                    special=tokens.special,
                    spans=(),
                    image=gray,
                    places=reader.places(),
                )
                for row in run.rows
            ),
        )
        for name, run in table.runs.items()
    }
    return replace(table, runs=runs)


def with_stand_ins(table: PromptTable, names: Iterable[str]) -> PromptTable:
    """The table with runs of these names too, of the clean rows where it lacks one."""
    clean = table.runs[CLEAN]
    runs = {name: replace(clean, name=name) for name in names}
    return replace(table, runs={**runs, **table.runs}, stands_in=True)
