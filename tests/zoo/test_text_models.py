"""The shipped `names`, `facts`, `nested` and `tasks` do what their cards say, on held-out texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mechdsl import zoo
from mechdsl.loading.load import load
from mechdsl.zoo.facts import evaluate as facts
from mechdsl.zoo.facts.data import (
    LETTER,
    NOTE_KNOWN,
    NOTE_STRANGER,
    QUESTION,
    QUESTION_NOTE,
    QUIZ,
)
from mechdsl.zoo.names import evaluate as names
from mechdsl.zoo.names.data import IOI_FIRST, IOI_SECOND, ROLE_FIRST, ROLE_SECOND, WHO_IS_WHO
from mechdsl.zoo.nested import evaluate as nested
from mechdsl.zoo.tasks import evaluate as tasks

from ..models.conftest import statement

ROOT = Path(zoo.__path__[0])


def test_names_says_who_gets_it() -> None:
    torch.set_num_threads(1)
    tallies = names.evaluate(ROOT / "names", 150, names.SEED)
    for kind in (IOI_FIRST, IOI_SECOND, ROLE_FIRST, ROLE_SECOND, WHO_IS_WHO):
        assert tallies[kind].interval()[0] > 0.95, kind
    assert tallies[names.ONE_OF_THE_TWO].interval()[0] > 0.75


def test_facts_recalls_and_reads() -> None:
    torch.set_num_threads(1)
    tallies = facts.evaluate(ROOT / "facts", 150, facts.SEED)
    assert tallies[facts.TRAINED].interval()[0] > 0.95
    assert tallies[facts.NEW_WAY].interval()[0] > 0.9
    for kind in (NOTE_KNOWN, NOTE_STRANGER, LETTER, QUESTION_NOTE):
        assert tallies[kind].interval()[0] > 0.95, kind
    assert tallies[QUESTION].interval()[0] > 0.85
    assert tallies[f"{QUIZ}: A where wrong"].interval()[0] > 0.85
    assert tallies[f"{NOTE_STRANGER}, one of 2"].share < 0.8, "it tells now whose note is asked"


def test_nested_closes_brackets_and_agrees() -> None:
    torch.set_num_threads(1)
    tallies = nested.evaluate(ROOT / "nested", 100, nested.SEED)
    assert tallies["brackets, first stage"].interval()[0] > 0.95
    assert tallies["brackets, both stages"].share < 0.2
    for kind in nested.SENTENCES:
        assert tallies[kind].interval()[0] > 0.95


def test_tasks_does_what_the_pairs_do() -> None:
    torch.set_num_threads(1)
    tallies = tasks.evaluate(ROOT / "tasks", 60, tasks.SEED)
    assert tallies["behind 0 pairs"].interval()[1] < 0.4
    assert tallies["behind 2 pairs"].interval()[0] > 0.95


@pytest.mark.parametrize(
    "name", ["names", "facts", "nested", "nested/formal", "tasks", "induction/step-50"]
)
def test_what_is_stored_in_16_bits_is_computed_in_32(name: str) -> None:
    with safe_open(ROOT / name / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118
    model, problems = load(statement(name, "zoo"))
    assert problems == []
    assert model is not None
    assert {each.dtype for each in model.module.parameters()} == {torch.float32}


def test_all_models_together_are_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 25_000_000


def test_cards_have_what_the_commands_print() -> None:
    for name in ("names", "facts", "nested", "tasks"):
        card = (ROOT / name / "README.md").read_text(encoding="utf-8")
        for part in ("## Texts", "## Training", "## Accuracy", "## Limitations", "licence"):
            assert part in card, name
