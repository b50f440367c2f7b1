"""Reading JSON that anyone may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mechdsl.base import limits

_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def load_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds. Raises ValueError, also for lists and objects that are nested
    deeper than `limits.DATA_DEPTH`, where Python's reader would break off, and for halves of
    characters (`\\ud800`). pairs: what makes an object of its keys and values."""
    opened = text.count("[") + text.count("{")
    if opened > limits.DATA_DEPTH and _depth(text) > limits.DATA_DEPTH:
        raise ValueError(
            f"lists and objects are nested more than {limits.DATA_DEPTH} deep",
        )
    found = json.loads(text, object_pairs_hook=pairs)
    if "\\u" in text:  # half a character, which no text can hold: UnicodeEncodeError
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _depth(text: str) -> int:
    """The deepest nesting, or the first beyond the limit."""
    depth = deepest = 0
    for mark in _MARKS.finditer(text):
        if mark[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > limits.DATA_DEPTH:
                break
        elif mark[0] in "]}":
            depth -= 1
    return deepest
