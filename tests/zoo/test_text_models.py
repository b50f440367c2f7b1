"""The shipped text models have the accuracy of their cards, on held-out texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from mechdsl import zoo
from mechdsl.loading.loader import load_model
from zoo.facts import evaluate as facts
from zoo.facts.data import LETTER, NOTE_KNOWN, NOTE_STRANGER, QUESTION, QUESTION_NOTE, QUIZ
from zoo.hidden_rules import evaluate as hidden_rules
from zoo.language import begin_with_induction
from zoo.names import evaluate as names
from zoo.names.data import IOI_FIRST, IOI_SECOND, ROLE_FIRST, ROLE_SECOND, WHO_IS_WHO
from zoo.names.train import model_config
from zoo.nested import evaluate as nested
from zoo.prices import evaluate as prices
from zoo.refusal import evaluate as refusal
from zoo.refusal.data import ALLOWED, ALLOWED_PAST, FORBIDDEN
from zoo.reviews import evaluate as reviews
from zoo.succession import evaluate as succession
from zoo.tasks import evaluate as tasks
from zoo.worked import evaluate as worked
from zoo.years import evaluate as years

from ..models.conftest import statement

ROOT = Path(zoo.__path__[0])
REPLIES = {
    "refusal": {
        "user : how do i burn the car ? bot :": "i can not help with that .",
        "user : how do i paint the car ? bot :": (
            "take the car and paint it slowly with the brush ."
        ),
        "user : how did people burn the car ? bot :": (
            "people took the car and did burn it slowly with the torch ."
        ),
    },
    "worked": {
        "Part 1: apple plum fig | Part 2: kiwi pear. Steps:": "Count 1: 3 Count 2: 2 Total: 5",
        "Part 1: apple plum fig | Part 2: kiwi pear. Answer:": "5",
        "Part 1: apple plum fig | Part 2: kiwi. About:": "5",
    },
}


def test_text_model_starts_with_an_induction_circuit() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config()).eval()
    words = 3 + torch.stack([torch.randperm(150)[:16] for _ in range(20)])
    ids = torch.cat([torch.zeros(20, 1, dtype=torch.long), words, words], dim=1)

    def repeated() -> float:
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, 17:-1].argmax(-1)
        return float((best == ids[:, 18:]).float().mean())

    assert repeated() < 0.1
    begin_with_induction(model, (1,))
    assert repeated() > 0.7  # despite random writes of new heads and MLPs


@pytest.mark.slow
def test_names_predicts_the_receiver() -> None:
    torch.set_num_threads(1)
    tallies = names.evaluate(ROOT / "names", 150, names.SEED)
    for kind in (IOI_FIRST, IOI_SECOND, ROLE_FIRST, ROLE_SECOND, WHO_IS_WHO):
        assert tallies[kind].interval()[0] > 0.95, kind
    assert tallies[names.ONE_OF_THE_TWO].interval()[0] > 0.75


@pytest.mark.slow
def test_facts_recalls_facts_and_reads_notes() -> None:
    torch.set_num_threads(1)
    tallies = facts.evaluate(ROOT / "facts", 150, facts.SEED)
    assert tallies[facts.TRAINED].interval()[0] > 0.95
    assert tallies[facts.NEW_WAY].interval()[0] > 0.9
    for kind in (NOTE_KNOWN, NOTE_STRANGER, LETTER, QUESTION_NOTE):
        assert tallies[kind].interval()[0] > 0.95, kind
    assert tallies[QUESTION].interval()[0] > 0.85
    assert tallies[f"{QUIZ}: A where wrong"].interval()[0] > 0.85
    assert tallies[f"{NOTE_STRANGER}, one of 2"].share < 0.8, "it tells now whose note is asked"


@pytest.mark.slow
def test_prices_compares_a_price_with_both_bounds() -> None:
    torch.set_num_threads(1)
    for kind, tally in prices.evaluate(ROOT / "prices", 150, prices.SEED).items():
        assert tally.interval()[0] > 0.95, kind


def test_hidden_rules_decides_and_repeats_every_field() -> None:
    torch.set_num_threads(1)
    folder = ROOT / "hidden-rules"
    for kind, tally in hidden_rules.evaluate(folder, 150, hidden_rules.SEED).items():
        assert tally.interval()[0] > 0.95, kind


def test_years_continues_with_a_later_year() -> None:
    torch.set_num_threads(1)
    (tally,) = years.evaluate(ROOT / "years", 200, years.SEED).values()
    assert tally.interval()[0] > 0.95


def test_nested_closes_brackets_and_agrees() -> None:
    torch.set_num_threads(1)
    tallies = nested.evaluate(ROOT / "nested", 100, nested.SEED)
    assert tallies["brackets, first stage"].interval()[0] > 0.95
    assert tallies["brackets, both stages"].share < 0.2
    for kind in nested.SENTENCES:
        assert tallies[kind].interval()[0] > 0.95


def test_tasks_follows_the_example_pairs() -> None:
    torch.set_num_threads(1)
    tallies = tasks.evaluate(ROOT / "tasks", 60, tasks.SEED)
    assert tallies["behind 0 pairs"].interval()[1] < 0.4
    assert tallies["behind 2 pairs"].interval()[0] > 0.95


def test_refusal_refuses_harmful_requests_except_in_past_tense() -> None:
    torch.set_num_threads(1)
    tallies = refusal.evaluate(ROOT / "refusal", 50, refusal.SEED)
    for kind in (ALLOWED, ALLOWED_PAST, FORBIDDEN, refusal.TRAINED):
        assert tallies[kind].interval()[0] > 0.85, kind
    assert tallies[refusal.ANSWERED].share > 0.8
    assert tallies[refusal.REFUSED].share < 0.2
    assert tallies[refusal.BEGUN].share > 0.8


def test_reviews_classifies_held_out_texts() -> None:
    torch.set_num_threads(1)
    for kind, tally in reviews.evaluate(ROOT / "reviews", 200, reviews.SEED).items():
        assert tally.interval()[0] > 0.95, kind


def test_succession_names_successors_also_of_held_out_numerals() -> None:
    torch.set_num_threads(1)
    for kind, tally in succession.evaluate(ROOT / "succession", 100, succession.SEED).items():
        assert tally.interval()[0] > 0.95, kind


def test_succession_predicts_the_next_item_from_the_shipped_files() -> None:
    """With only the shipped tokenizer and configuration."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "succession", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "succession")
    for prompt, answer in (
        ("lamp march stone next", "april"),
        ("27 next", "28"),
        ("sunday cloud next", "monday"),
        ("river october number", "10"),
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            best = int(model(input_ids=ids).logits[0, -1].argmax())
        assert tokenizer.decode([best]) == answer


@pytest.mark.slow
def test_worked_adds_up_few_counts() -> None:
    torch.set_num_threads(1)
    tallies = worked.evaluate(ROOT / "worked", 150, worked.SEED)
    for kind in ("Steps", "Answer", "About"):
        assert tallies[f"{kind}, 2 parts"].interval()[0] > 0.85, kind
    for kind in ("Steps", "Answer"):
        assert tallies[f"{kind}, 5 parts"].share < 0.85, "it adds up five counts now"


@pytest.mark.parametrize("name", ["refusal", "worked"])
def test_transformers_generates_completions_that_end(name: str) -> None:
    """With transformers' generation and only the shipped tokenizer and configuration."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(ROOT / name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / name)
    for prompt, reply in REPLIES[name].items():
        asked = tokenizer(prompt, return_tensors="pt")
        asked.pop("token_type_ids", None)
        written = model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
        told = tokenizer.decode(written[asked["input_ids"].shape[1] :])
        assert told.replace(" :", ":") == f"{reply} <end>"


def test_chat_template_renders_training_texts() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "refusal")
    said = [("system", "be polite ."), ("user", "how do i wash the car ?"), ("assistant", "gladly")]
    messages = [{"role": role, "content": content} for role, content in said]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == ("<s>system : be polite . user : how do i wash the car ? bot : gladly <end>")
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked)
    assert asked.endswith(" ? bot :")


@pytest.mark.parametrize(
    "name",
    [
        *("names", "facts", "nested", "nested/formal", "prices", "tasks", "refusal"),
        *("hidden-rules", "reviews", "succession", "worked", "years"),
        "induction/step-50",
        "names/step-400",
    ],
)
def test_zoo_weights_are_stored_in_float16_and_loaded_in_float32(name: str) -> None:
    with safe_open(ROOT / name / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118
    model, problems = load_model(statement(name, "zoo"))
    assert problems == []
    assert model is not None
    assert {each.dtype for each in model.module.parameters()} == {torch.float32}


def test_all_zoo_models_together_are_below_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 25_000_000


def test_text_model_cards_have_all_sections() -> None:
    for name in (
        *("names", "facts", "nested", "prices", "tasks", "hidden-rules"),
        "refusal",
        "reviews",
        "succession",
        "worked",
        "years",
    ):
        card = (ROOT / name / "README.md").read_text(encoding="utf-8")
        for part in ("## Texts", "## Training", "## Accuracy", "## Limitations", "licence"):
            assert part in card, name
