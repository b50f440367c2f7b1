"""What a model gives, by the name of its class: logits of tokens, of labels, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

OF_PROMPTS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
"""How classes end whose output is one of a whole prompt."""
_CLASSIFIERS = ("ForTokenClassification", "ForSequenceClassification")


def labels(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """How many labels a classifier tells apart, 0 for what isn't one."""
    if not any(name.endswith(_CLASSIFIERS) for name in names):
        return 0
    named, number = config.get("id2label"), config.get("num_labels")
    if isinstance(named, Mapping) and named:
        return len(cast("Mapping[str, str]", named))
    return number if isinstance(number, int) and number > 0 else 2


def is_headless(names: Sequence[str], model_type: str) -> bool:
    """Whether the class is the library's for a model without a head: `BertModel` of `bert`."""
    bare = re.sub(r"[_-]", "", model_type) + "model"
    return any(name.lower() == bare for name in names)
