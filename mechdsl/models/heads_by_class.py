"""What a model gives, by the name of its class: logits of tokens, of labels, or none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from mechdsl.base import limits

Task = Literal["tokens", "one label", "many labels", "number"]
"""What outputs are: logits of tokens, of labels of which one is right, of labels that are right or
not each by itself, or a number, as regressions give."""
OutputAt = Literal["every token", "first token", "last token", "image"]
"""What outputs are made of: each token has its own, or there is one for a whole prompt, made of its
first token, or of its last one that isn't the pad token, or one for an image."""

OF_PROMPTS = "ForSequenceClassification"
"""How classes end whose output is one of a whole prompt."""
OTHERS_OF_PROMPTS = ("ForMultipleChoice", "ForNextSentencePrediction")
"""The same, of several texts."""
OF_IMAGES = ("ForImageClassification", "ForImageClassificationWithTeacher")
"""The same, of images."""
_CLASSIFIERS = ("ForTokenClassification", OF_PROMPTS, *OF_IMAGES)

ENCODERS = frozenset((
    "albert", "bert", "big_bird", "bros", "camembert", "canine", "convbert", "data2vec-text",
    "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm", "esmc", "eurobert",
    "flaubert", "fnet", "funnel", "gte", "ibert", "jina_embeddings_v3", "layoutlm", "layoutlmv2",
    "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "megatron-bert", "mobilebert",
    "modernbert", "modernvbert", "mpnet", "mra", "nomic_bert", "nystromformer", "perceiver",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert",
    "tapas", "ultrabert", "ultravbert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
))  # fmt: skip
"""Kinds of models of the library whose classifiers see the whole prompt at every token, unless they
say `is_decoder`. Classifiers of prompts read their first token, those of other kinds the last."""


def task_of(config: Mapping[str, Any], names: Sequence[str]) -> tuple[Task, tuple[str, ...]]:
    """What the outputs of a class are, with the names of the labels: `id2label`, else `LABEL_0`
    and so on, as the library has them."""
    if not any(name.endswith(_CLASSIFIERS) for name in names):
        return "tokens", ()
    labels = named_outputs(config)
    if not labels:
        number = config.get("num_labels")
        count = number if isinstance(number, int) and 0 < number <= limits.SIZE else 2
        labels = tuple(f"LABEL_{n}" for n in range(count))
    problem = config.get("problem_type")
    if problem == "multi_label_classification":
        return "many labels", labels
    if problem == "regression" or (len(labels) == 1 and problem is None):
        return "number", labels
    return "one label", labels


def named_outputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of outputs that `id2label` gives, by their numbers; none where one is missing."""
    named = config.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    by_number = {str(key): str(name) for key, name in cast("Mapping[Any, Any]", named).items()}
    numbers = [str(n) for n in range(len(by_number))]
    return tuple(by_number[n] for n in numbers) if by_number.keys() == set(numbers) else ()


def is_headless(names: Sequence[str], model_type: str) -> bool:
    """Whether the class is the library's for a model without a head: `BertModel` of `bert`."""
    bare = re.sub(r"[_-]", "", model_type) + "model"
    return any(name.lower() == bare for name in names)


def output_at(names: Sequence[str], *, encodes: bool) -> OutputAt:
    """What a class makes its outputs of; encodes: every token of its kind sees every other."""
    if any(name.endswith(OF_IMAGES) for name in names):
        return "image"
    if not any(name.endswith(OF_PROMPTS) for name in names):
        return "every token"
    return "first token" if encodes else "last token"
