"""Builds the counting model's tokenizer: words and punctuation marks are tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from zoo import words
from zoo.counting.data import SPECIAL, vocabulary

MAX_LENGTH = 512


def build_tokenizer() -> Tokenizer:
    """Words and punctuation marks are tokens."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return words.word_tokenizer(vocabulary(), SPECIAL, split)


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_LENGTH)
