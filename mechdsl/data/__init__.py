"""Prompts: values to texts, texts to tokens, names to positions. No model is needed."""

from mechdsl.data.positions import check_joined, hit_texts, resolve_positions
from mechdsl.data.prompts import build_table, numerals, text_tokens
from mechdsl.data.replace import replace_tokens
from mechdsl.data.tokenizer import TextTokenizer

__all__ = [
    "TextTokenizer",
    "build_table",
    "check_joined",
    "hit_texts",
    "numerals",
    "replace_tokens",
    "resolve_positions",
    "text_tokens",
]
