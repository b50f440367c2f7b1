"""Builds the induction model's tokenizer: what white space separates is a token."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from zoo import words
from zoo.induction.data import SPECIAL, vocabulary

MAX_POSITIONS = 128


def build_tokenizer() -> Tokenizer:
    """Words are tokens."""
    return words.word_tokenizer(vocabulary(), SPECIAL, pre_tokenizers.WhitespaceSplit())


def save_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    words.save_tokenizer(build_tokenizer(), folder, longest=MAX_POSITIONS)
