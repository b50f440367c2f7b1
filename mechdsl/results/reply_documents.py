"""What rows wrote, as it stands in the JSON document of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mechdsl.base.reply import Reply
from mechdsl.results.replies import Replies, Texts
from mechdsl.results.verdict_documents import DocumentPart


class ReplyDocument(DocumentPart):
    """What was written once behind a prompt."""

    text: str = Field(description="without a stop text, and without the token that ends it")
    tokens: int = Field(description="its length")
    ended: Literal["end", "stop", "length", "broken"] = Field(
        description="by a token that ends it, by a stop text, as long as it may be, or where a "
        "number was NaN or infinite"
    )


class RowRepliesDocument(DocumentPart):
    """What was written behind one prompt, once for each sample and draw of noise."""

    row: int = Field(description="id of the prompt")
    replies: list[ReplyDocument]


class PromptDocument(DocumentPart):
    """A prompt of the base run."""

    row: int
    text: str


class RepliesDocument(DocumentPart):
    """What the rows of an experiment wrote (`generate n`)."""

    prompts: list[PromptDocument]
    runs: dict[str, list[RowRepliesDocument]] = Field(description="unpatched runs by name")
    cells: list[list[RowRepliesDocument]] = Field(description="in the order of `cells`")


def replies_document(found: Replies) -> RepliesDocument | None:
    """None where nothing was written."""
    if not found:
        return None
    return RepliesDocument(
        prompts=[PromptDocument(row=row, text=text) for row, text in found.prompts.items()],
        runs={run: _rows(texts) for run, texts in found.runs.items()},
        cells=[_rows(texts) for texts in found.cells],
    )


def _rows(texts: Texts) -> list[RowRepliesDocument]:
    return [
        RowRepliesDocument(row=row, replies=[_reply(each) for each in replies])
        for row, replies in texts.items()
    ]


def _reply(found: Reply) -> ReplyDocument:
    return ReplyDocument(text=found.text, tokens=len(found.ids), ended=found.ended)
