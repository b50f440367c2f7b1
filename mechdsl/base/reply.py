"""What a model has written behind a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReplyText:
    """One reply, without the text or token that ended it."""

    text: str
    """As the tokenizer puts the tokens together, with the white space at its ends."""
    ids: tuple[int, ...]
    """Its tokens."""
    ended: Literal["end", "stop", "length"]
    """By a token of the model, by a text of `until`, or as it has all its tokens."""
