"""Tiny classifiers, and their values under plain hooks, one prompt at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from ..families import tables
from ..families.build import VOCABULARY, model
from ..families.parts import Architecture
from ..reference import hooks
from ..shared_models import unchanged

WORDS = ("<pad>", "<s>", *(f"w{i}" for i in range(2, VOCABULARY)))
IDS = {word: i for i, word in enumerate(WORDS)}
LABELS = ("negative", "neutral", "positive")
OF_PROMPTS = {
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
}
OF_TOKENS = {"bert": "BertForTokenClassification", "gpt2": "GPT2ForTokenClassification"}


@cache
def tokenizer() -> Tokenizer:
    """One token per word, with `<s>` before every text."""
    made = Tokenizer(models.WordLevel(IDS, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "<s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


@cache
def classifier(family: str, build: str, **settings: Any) -> tuple[Architecture, nn.Module]:
    """The parts of a family up to its last block, and a classifier of the family."""
    row = next(row for row in tables.every() if row.name == family)
    assert isinstance(row, Architecture)
    row = replace(row, build=build, main=replace(row.main, final_norm=None))
    names: dict[int, str] = dict(settings.pop("names", ()) or enumerate(LABELS))
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: n for n, name in names.items()}}
    overrides: dict[str, Any] = {"pad_token_id": 0, **labels, **settings}
    return row, unchanged(model(row, **overrides))


def prompt(text: str) -> dict[str, Tensor]:
    """The arguments of the model: only the tokens."""
    return {"input_ids": torch.tensor([[1, *(IDS[word] for word in text.split())]])}


@cache
def outputs(family: str, build: str, text: str, **settings: Any) -> Tensor:
    """The model's output for one prompt: [label], or [T, label]."""
    row, module = classifier(family, build, **settings)
    logits, _ = hooks.run(row, module, prompt(text), 0)
    return logits


@cache
def _seen(family: str, build: str, text: str, layer: int) -> dict[str, Tensor]:
    row, module = classifier(family, build)
    return hooks.run(row, module, prompt(text), layer)[1]


@cache
def patched(
    family: str, build: str, texts: tuple[str, str], site: str, layer: int, at: tuple[int, int]
) -> Tensor:
    """The output for the second text, where the vectors at token `at[0]` of the first are written
    at its token `at[1]`."""
    row, module = classifier(family, build)
    source, base = texts
    seen = _seen(family, build, source, layer)
    changes = [hooks.Change(at[1], unit, vector) for unit, vector in enumerate(seen[site][at[0]])]
    return hooks.run(row, module, prompt(base), layer, site, changes)[0]
