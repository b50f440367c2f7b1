"""What a model has written behind a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reply:
    """What was written behind one prompt."""

    ids: tuple[int, ...]
    """Tokens, without one that ends it; where a stop text does, those that lie in front of it at
    least in part."""
    text: str
    """As the tokenizer puts the tokens together, with the white space at its ends, without the stop
    text."""
    ended: Literal["end", "stop", "length", "broken"]
    """By a token that ends it, by a stop text, because it is as long as it may be, or because the
    logits that come next are no numbers."""
