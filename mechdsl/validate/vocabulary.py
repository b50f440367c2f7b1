"""Tokens that a tokenizer writes and the model has no embedding for: E0421."""

from __future__ import annotations

from collections.abc import Iterable

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.e04_model import VocabularyTooSmall
from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.resolve.resolved import ModelContext, ResolvedExperiment


def tokenizer_fits(model: ModelContext) -> list[Diagnostic]:
    """Whether the model has all of its tokenizer's own tokens. Those that were added to it count
    only where they are used: many a model has never seen them."""
    if model.shape.takes == "image":
        return []  # its tokens are no ids
    size = model.tokenizer.own_size
    return [_too_small(model, f"has {size:,}")] if size > model.shape.vocab_size else []


def prompts_fit(table: PromptTable, model: ModelContext) -> list[Diagnostic]:
    """Whether it has all tokens of the prompts and of their texts."""
    if model.shape.takes == "image":
        return []
    rows = [row for run in table.runs.values() for row in run.rows]
    ids = (
        i for row in rows for each in (row.ids, *(t.ids for t in row.texts.values())) for i in each
    )
    return _all_there(ids, model, f"prompts `{table.name}`")


def measures_fit(experiment: ResolvedExperiment) -> list[Diagnostic]:
    """Whether it has all tokens that measures name."""
    if experiment.model.shape.takes == "image":
        return []
    every = [atom for each in (*experiment.measures, *experiment.keep) for atom in each.atoms]
    atoms = [atom for atom in every if not atom.of_class]
    named = (token for atom in atoms for token in atom.named)
    return _all_there(named, experiment.model, "a measure")


def _all_there(ids: Iterable[int], model: ModelContext, what: str) -> list[Diagnostic]:
    largest = max(ids, default=0)
    if largest < model.shape.vocab_size:
        return []
    token = model.tokenizer.token_text(largest)
    return [_too_small(model, f"puts token {largest:,} (`{token}`) into {what}")]


def _too_small(model: ModelContext, more: str) -> Diagnostic:
    return VocabularyTooSmall(
        span=model.spec.span, model=model.name, size=model.shape.vocab_size, more=more
    )
