"""All limits of the language, and the checks of a number's type and least value."""

from __future__ import annotations

from datetime import date
from math import inf
from typing import NamedTuple, TypeGuard

_NUMBERS = (int, float)  # a tuple: a union of classes would be rebuilt in each call


def is_integer(value: object, *, least: float = -inf) -> TypeGuard[int]:
    """Return whether a value is an integer of at least `least`; True and False aren't."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an integer or a float; True and False aren't."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def is_whole_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a whole number, however large; infinity and NaN aren't."""
    return is_number(value) and (isinstance(value, int) or value.is_integer())


class Limit(NamedTuple):
    """A row of the table in `docs/language.md`."""

    of: str
    most: int
    codes: tuple[str, ...]
    """Codes of diagnostics reported beyond the limit."""


LIMITS: list[Limit] = []


def _limit(most: int, of: str, *codes: str) -> int:
    LIMITS.append(Limit(of, most, codes))
    return most


# --- the text of a file ---------------------------------------------------------------------------

CHARACTERS = _limit(1_000_000, "characters of a file", "E0109")

LINES = _limit(20_000, "lines of a file", "E0109")

WORDS = _limit(10_000, "tokens of a file, without comments and quoted texts", "E0109")

PLACEHOLDERS = _limit(500, "placeholders in the texts of a file", "E0109")

NAME = _limit(200, "characters of a name", "E0109")

BRACKETS = _limit(100, "levels of nested brackets", "E0109")

DEPTH = _limit(200, "levels of nested operators, calls or positions", "E0109")

FILES = _limit(100, "files that a file imports, directly or indirectly", "E0204")

SYNTAX_ERRORS = _limit(500, "syntax errors reported for a file", "E0109")

DIAGNOSTICS = _limit(1_000, "errors and warnings printed")

# --- what a file defines --------------------------------------------------------------------------

CHAIN = _limit(50, "definitions in a chain of dependencies", "E0506", "E0207")

PARTS = _limit(10_000, "terms of a measure after its metrics are expanded", "E0207")

DOMAIN = _limit(10**12, "values of a domain", "E0506")

ROWS = _limit(200_000, "rows of a table", "E0506")

CHECKED_PROMPTS = _limit(10_000, "prompts of a table that `validate` checks", "W0790")

CHECKED_WORK = _limit(
    200_000, "prompts that `validate` checks, times the statements about each", "W0790"
)

CHECKED_TEXT = _limit(
    500_000, "characters of the prompts of a table that `validate` checks", "W0790"
)

CHECKED_DRAWS = 5
"""Random draws that `validate` makes; they show whether a draw is possible."""

COMBINATIONS = _limit(500_000, "combinations tried to find rows", "E0506")

CLASSES = _limit(10_000, "texts of a `classes` line", "E0506")

ITEMS = _limit(10_000, "items of a list", "E0506")

TEXT = _limit(100_000, "characters of one text of a row", "E0506")

INSERTED = _limit(1_000, "tokens that a corruption inserts", "E0515")

DIGITS = _limit(300, "digits of a computed number", "E0503")

DATA_SET = _limit(2**30, "bytes of a data set from the hub", "E0506")

DATA_FILES = _limit(10_000, "files of a `rows` line", "E0506")

DATA_DEPTH = _limit(50, "levels of nested lists and objects in a data file", "E0505")

SAMPLES = _limit(10_000, "samples of noise", "E0515")

LOOP = _limit(1_000_000, "values of a `for`", "E0322")

CELLS = _limit(1_000_000, "cells of an experiment, or of one site", "E0323")

TOKEN_LISTS = _limit(2**27, "cells whose tokens are listed, times the vocabulary", "E0207")

ALTERNATIVES = _limit(128, "accepted texts of several tokens in a row", "E0612")

NUMERALS = _limit(10_000, "numerals of a measure", "E0612")

DRAWS = _limit(10_000, "random draws of `against`", "E0630")

STEPS = _limit(1_000, "steps of integrated gradients", "E0207")

REPLY_TOKENS = _limit(10_000, "tokens of a reply", "E0207")

REPLY_SAMPLES = _limit(1_000, "samples of a reply", "E0207")

REPEATS = _limit(100_000, "product of the repetition counts in a regular expression", "E0612")

SEARCH_SECONDS = _limit(5, "seconds to search a reply for a regular expression", "E0612")

CHAT_TEMPLATE = _limit(200_000, "characters of a chat template", "E0551")

CHAT_STEPS = _limit(500_000, "steps of a chat template per prompt", "E0552")

IMAGE_FILE = _limit(50_000_000, "bytes of an image in a file", "E0560")

AUDIO_FILE = _limit(20_000_000, "bytes of a sound in a file", "E0560")

IMAGE_PIXELS = _limit(50_000_000, "pixels of an image", "E0560")

TILES = _limit(1_000, "tiles of an image", "E0207")

IMAGE_SIDE = _limit(2_048, "pixels along a side of a generated image", "E0207")

DIRECTION_FILE = _limit(100_000_000, "bytes of a direction file", "E0341")

DICTIONARY_FILE = _limit(8_000_000_000, "bytes of a dictionary's weights", "E0342")

DICTIONARY_CONFIG = _limit(100_000, "bytes of a dictionary's `cfg.json` or `config.yaml`", "E0342")

LABELS_FILE = _limit(200_000_000, "bytes of a file of labels of features", "E0342")

CIRCUIT_NEURONS = _limit(500, "neurons, or features, that a circuit names", "E0207")

CIRCUIT_FILE = _limit(300_000_000, "bytes of a circuit file", "E0342")

GRAPH_FILE = _limit(100_000_000, "bytes of an attribution graph of circuit-tracer", "E0342")

LENS_FILE = _limit(8_000_000_000, "bytes of a tuned-lens file", "E0207")

# --- a model --------------------------------------------------------------------------------------

LAYERS = _limit(1_000, "layers of a model", "E0430")

HEADS = _limit(10_000, "heads of a layer", "E0430")

# Configs of Doge contain 16,384 even for models without experts.
EXPERTS = _limit(100_000, "experts of a layer", "E0430")

SIZE = _limit(1_000_000, "any other dimension of a model, such as its width", "E0430")

MODEL_FILE = _limit(50_000_000, "bytes of a model's JSON file", "E0432")

CHAT_DATE = date(2024, 7, 26)
"""The current date in chat templates (`strftime_now`), whenever they run: Llama's fallback date."""
