"""The families that need an entry. A new one is a class in one of these modules."""

from mechdsl.models.adapters import Family, family_of
from mechdsl.models.families import bert, gpt, llama, mixed, seq2seq, vision, vlm

__all__ = ["Family", "bert", "family_of", "gpt", "llama", "mixed", "seq2seq", "vision", "vlm"]
