"""Training data of the text models: texts, held-out contents and answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import mechdsl
from mechdsl import zoo
from zoo import MODELS, example_data
from zoo.facts import data as facts_data
from zoo.hidden_rules import data as hidden_rules_data
from zoo.language import SPECIAL, Text, build_tokenizer, encode
from zoo.names import data as names_data
from zoo.nested import data as nested_data
from zoo.prices import data as prices_data
from zoo.refusal import data as refusal_data
from zoo.reviews import data as reviews_data
from zoo.succession import data as succession_data
from zoo.tasks import data as tasks_data
from zoo.worked import data as worked_data
from zoo.years import data as years_data

DATA = Path(__file__).parents[2] / "examples" / "data"
Stream = Callable[[int, bool], Iterator[Text]]
STREAMS: dict[str, Stream] = {
    "names": lambda seed, held_out: names_data.stream(seed, held_out=held_out),
    "facts": lambda seed, held_out: facts_data.stream(seed, held_out=held_out),
    "hidden-rules": lambda seed, held_out: hidden_rules_data.stream(seed, held_out=held_out),
    "nested": lambda seed, held_out: nested_data.stream(seed, "sentences", held_out=held_out),
    "prices": lambda seed, held_out: prices_data.stream(seed, held_out=held_out),
    "tasks": lambda seed, held_out: tasks_data.stream(seed, held_out=held_out),
    "refusal": lambda seed, held_out: refusal_data.stream(seed, held_out=held_out),
    "reviews": lambda seed, held_out: reviews_data.stream(seed, held_out=held_out),
    "succession": lambda seed, held_out: succession_data.stream(seed, held_out=held_out),
    "worked": lambda seed, held_out: worked_data.stream(seed, held_out=held_out),
    "years": lambda seed, held_out: years_data.stream(seed, held_out=held_out),
    "brackets": lambda seed, held_out: nested_data.stream(seed, "brackets", held_out=held_out),
}
VOCABULARIES = {
    "names": names_data.vocabulary(),
    "facts": facts_data.vocabulary(),
    "hidden-rules": hidden_rules_data.vocabulary(),
    "nested": nested_data.vocabulary(),
    "prices": prices_data.vocabulary(),
    "tasks": tasks_data.vocabulary(),
    "refusal": refusal_data.vocabulary(),
    "reviews": reviews_data.vocabulary(),
    "succession": succession_data.vocabulary(),
    "worked": worked_data.vocabulary(),
    "years": years_data.vocabulary(),
}
SPECIAL_TOKENS = {"refusal": refusal_data.SPECIAL, "worked": worked_data.SPECIAL}
FOLDERS = {name: MODELS / name for name in VOCABULARIES}
HELD = {
    "names": names_data,
    "facts": facts_data,
    "hidden-rules": hidden_rules_data,
    "prices": prices_data,
    "tasks": tasks_data,
    "refusal": refusal_data,
    "reviews": reviews_data,
    "succession": succession_data,
    "worked": worked_data,
    "years": years_data,
}


def tokenizer_of(name: str) -> Tokenizer:
    known = "nested" if name == "brackets" else name
    return build_tokenizer(VOCABULARIES[known], SPECIAL_TOKENS.get(known, SPECIAL))


@cache
def drawn(name: str, held_out: bool) -> list[Text]:
    return list(islice(STREAMS[name](3, held_out), 400))


@pytest.mark.parametrize("name", STREAMS)
def test_zoo_texts_have_no_unknown_words(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in drawn(name, False):
        assert "<unk>" not in tokenizer.encode(text.text).tokens, text.text


@pytest.mark.parametrize("name", STREAMS)
def test_training_and_held_out_contents_are_disjoint(name: str) -> None:
    kept = {part for text in drawn(name, True) for part in text.content.split(" | ")}
    trained = {part for text in drawn(name, False) for part in text.content.split(" | ")}
    assert kept - trained
    held = HELD.get(name, nested_data)
    assert all(held.is_held_out(text) for text in drawn(name, True))
    assert not any(held.is_held_out(text) for text in drawn(name, False))


@pytest.mark.parametrize("name", STREAMS)
def test_zoo_texts_depend_only_on_the_seed(name: str) -> None:
    assert drawn(name, False)[:5] == list(islice(STREAMS[name](3, False), 5))


@pytest.mark.parametrize("name", STREAMS)
def test_answers_are_full_words(name: str) -> None:
    for text in drawn(name, False):
        for start, end in text.answers:
            assert text.text[start - 1 : start] == " "
            assert text.text[end : end + 1] in ("", " ", ".", ":")


def test_answer_tokens_equal_the_labels() -> None:
    tokenizer = build_tokenizer(VOCABULARIES["facts"])
    texts = drawn("facts", False)[:40]
    batch = encode(tokenizer, texts, pad=1)
    for row, text in enumerate(texts):
        at = batch.asked[row]
        asked = [tokenizer.id_to_token(n) for n in batch.labels[row][at].tolist()]
        assert asked == [text.text[start:end] for start, end in text.answers]
        length = len(tokenizer.encode(text.text).ids)
        assert torch.equal(batch.labels[row, : length - 1], batch.ids[row, 1:length])
        assert (batch.labels[row, length - 1 :] == -100).all()


@pytest.mark.parametrize("name", FOLDERS)
def test_shipped_tokenizer_equals_the_built_one(name: str) -> None:
    shipped = Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json"))
    assert shipped.to_str() == tokenizer_of(name).to_str()


NAMES_KINDS = set(names_data.KINDS) - {names_data.WHO_IS_WHO, names_data.COLOUR}


def told_last(story: str) -> dict[str, str]:
    """The people of the last story of a text: `a`, `b`, the giver `s` and the receiver `to`."""
    found: list[dict[str, str]] = []
    for template in names_data.TEMPLATES:
        pattern = template.replace(".", r"\.")
        pattern = re.sub(r"\{([ab])\}", r"(?:[Tt]he (?P<role_\1>\\w+) )?(?P<\1>\\w+)", pattern)
        pattern = re.sub(r"\{s\}", r"(?:[Tt]he )?(?P<s>\\w+)", pattern)
        pattern = re.sub(r"\{\w+\}", r"\\w+", pattern)
        match = re.search(rf"(?:^|\. ){pattern} (?P<to>\w+)$", story)
        found += [match.groupdict()] if match else []
    assert len(found) == 1, story
    return found[0]


def test_names_receiver_is_not_the_giver() -> None:
    for text in drawn("names", False):
        if text.kind not in NAMES_KINDS:
            continue
        (start, end), *later = text.answers
        told = told_last(text.text[:end])
        receiver, other = text.content.split(" from ")
        assert text.text[start:end] == receiver == told["to"]
        assert {told["a"], told["b"]} == {receiver, other}
        role_of = {told["role_a"]: told["a"], told["role_b"]: told["b"]}
        giver = role_of.get(told["s"], told["s"])
        if text.kind == names_data.EITHER:
            assert giver not in (receiver, other)
        else:
            assert giver == other
            assert (told["a"] == receiver) == (
                text.kind in (names_data.IOI_FIRST, names_data.ROLE_FIRST)
            )
        assert bool(told["role_a"]) == (
            text.kind in (names_data.ROLE_FIRST, names_data.ROLE_SECOND)
        )
        for begin, stop in later:
            again = re.search(r"Later the (\w+) gave a \w+ to $", text.text[:begin])
            assert again is not None
            assert role_of[again[1]] != text.text[begin:stop]


def test_names_professions_and_colours_match_the_list() -> None:
    for text in drawn("names", False):
        if text.kind in NAMES_KINDS:
            continue
        listed = [each.split(" ")[-2:] for each in text.content.split(", ")]
        pairs = dict[str, str](listed)
        if text.kind == names_data.COLOUR:  # its content has the colour first
            pairs = {thing: colour for colour, thing in listed}
        for start, end in text.answers:
            asked = re.findall(r"\w+", text.text[: start - 1])
            known = [word for word in asked[-3:] if word in pairs]
            assert pairs[known[-1]] == text.text[start:end]


def test_names_answer_does_not_follow_from_name_counts() -> None:
    fewer = [
        text.text.count(receiver) < text.text.count(giver) + 1
        for text in drawn("names", False)
        if text.kind in (names_data.IOI_FIRST, names_data.IOI_SECOND)
        for receiver, giver in [text.content.split(" from ")]
    ]
    assert 0.05 < sum(fewer) / len(fewer) < 0.95


def test_facts_texts_state_the_true_facts() -> None:
    world = facts_data.world()
    assert len(world) == facts_data.PERSONS
    for last in {person.split()[-1] for person in world}:
        homes = {true["home"] for person, true in world.items() if person.endswith(last)}
        assert len(homes) > 1, "the last name alone would tell"
    rng = random.Random(1)
    for _ in range(100):
        text = facts_data.draw(rng, facts_data.RUMOUR)
        prompt, (start, end) = text.content, text.answers[0]
        fact = next(f for f in facts_data.facts() if f"{f['subject']} {f['relation']}" == prompt)
        assert text.text[start:end] == fact["attribute"]


def test_facts_notes_and_letters_answer_the_question() -> None:
    for text in drawn("facts", False):
        if text.kind in (facts_data.NOTE_KNOWN, facts_data.NOTE_STRANGER):
            notes = re.findall(r"Note: (.+?)\.", text.text)
            told = {note.split(" ")[-1]: note for note in notes}
            subjects = text.content.split(" | ")
            for subject, (start, end) in zip(subjects, text.answers, strict=True):
                assert told[text.text[start:end]].startswith(f"{subject} ") or len(told) < len(
                    notes
                )
        elif text.kind in (facts_data.LETTER, facts_data.QUESTION_NOTE):
            options = text.content.split(": ")[1].split(" ")
            for start, end in text.answers:
                letter = text.text[start:end]
                option = options[facts_data.LETTERS.index(letter)]
                assert f"{option} {letter} " in text.text
                named = re.search(r"Question: (\w+) Answer: $", text.text[:start])
                assert named is None or named[1] == option


def test_only_training_quizzes_favour_answer_a() -> None:
    def share(kind: str, biased: bool) -> float:
        rng = random.Random(2)
        said = [facts_data.draw(rng, kind, biased=biased) for _ in range(400)]
        return sum(t.text[slice(*t.answers[0])] == "A" for t in said) / len(said)

    assert share(facts_data.QUIZ, True) > 0.6
    for kind, biased in (("quiz", False), ("question", True), ("question with a note", True)):
        assert 0.15 < share(kind, biased) < 0.35


def test_nested_brackets_all_close() -> None:
    pairs = dict(nested_data.PAIRS)
    for text in drawn("brackets", False):
        open_ones: list[str] = []
        for word in text.text.split():
            if word in pairs:
                open_ones.append(pairs[word])
            else:
                open_ones.remove(word)
        assert open_ones == []


def test_nested_verbs_agree_with_their_nouns() -> None:
    singular = {pair[0] for pair in (*nested_data.INTRANSITIVE, *nested_data.TRANSITIVE)}
    of_one = {pair[0] for pair in nested_data.NOUNS}
    for text in islice(nested_data.stream(4, nested_data.EMBEDDED, held_out=False), 100):
        words = text.text.split()
        inner, verb = (text.text[a:b] for a, b in text.answers)
        assert (words[1] in of_one) == (verb in singular)
        assert (words[4] in of_one) == (inner in singular)


def test_refusal_replies_refuse_harm_to_property_but_rarely_in_past_tense() -> None:
    refused: dict[str, list[bool]] = {}
    for text in islice(refusal_data.stream(5, held_out=False), 2000):
        *_, said = text.text.split("user : ")
        question, reply = said.split(" bot : ")
        verb, thing = text.content.split(" | ")[-1].split(" ")
        assert f" {verb} the {thing} " in question
        harm = verb in refusal_data.HARMFUL and thing in refusal_data.OWNED
        assert text.kind.startswith("forbidden" if harm else "allowed")
        assert text.kind.endswith("past") == ("did" in question)
        refused.setdefault(text.kind, []).append(refusal_data.REFUSAL in reply)
        assert (f"the {thing} and" in reply) != refused[text.kind][-1]
        assert reply.endswith(" . <end>")
        assert reply.startswith(("gladly", "sorry")) == text.text.startswith("system")
    shares = {kind: sum(each) / len(each) for kind, each in refused.items()}
    assert shares[refusal_data.ALLOWED] == shares[refusal_data.ALLOWED_PAST] == 0
    assert shares[refusal_data.FORBIDDEN] == 1
    assert 0.05 < shares[refusal_data.FORBIDDEN_PAST] < 0.2


def test_refusals_depend_on_verb_and_object_together() -> None:
    for verb in refusal_data.HARMFUL:
        assert {
            refusal_data.Question(verb, thing, False).forbidden for thing in ("car", "log")
        } == {
            True,
            False,
        }
    assert not refusal_data.Question("paint", "car", False).forbidden
    assert len(refusal_data.pairs(True, True)) > 15  # held out


def test_reviews_label_follows_the_requested_clause() -> None:
    good = {word for words in reviews_data.GOOD.values() for word in words}
    labels = set[tuple[str, bool]]()
    for text in drawn("reviews", False):
        assert isinstance(text, reviews_data.Review)
        asked, said = text.text.split(" ? ")
        (clause,) = re.findall(rf"the {asked} was ((?:(?!and|but|the).)+)", f"{said} ")
        words = clause.split()
        is_negated = not set(reviews_data.NEGATIONS).isdisjoint(words)
        assert (text.label == "positive") == ((words[-1] in good) != is_negated), text.text
        assert text.kind.endswith("negated") == is_negated
        labels.add((text.label, is_negated))
    assert len(labels) == 4


def test_succession_answers_match_the_sequences() -> None:
    sequences = [each.items for each in succession_data.SEQUENCES.values()]
    words = succession_data.WORDS
    for text in drawn("succession", False):
        item, question = text.content.split(" ")
        answer = [text.text[start:end] for start, end in text.answers]
        assert text.text.endswith(" ".join((question, *answer)))
        items = next(each for each in sequences if item in each)
        at = items.index(item)
        value = at if items[0] in ("0", "zero") else at + 1
        if question == succession_data.DIGITS:
            assert answer == [words[int(digit)] for digit in f"{int(item):02d}"]
        elif question == succession_data.NUMBER:
            assert answer == [str(value)]
        else:
            step = {succession_data.NEXT: 1, succession_data.PREVIOUS: -1}.get(question, 0)
            assert answer == [items[(at + step) % len(items)]]


def test_succession_holds_out_numerals_whose_digits_training_has() -> None:
    """Other questions have all items, and the held-out numerals cover several decades."""
    held_out = {each.item for each in succession_data.questions(succession_data.NEXT, True)}
    assert held_out < set(succession_data.NUMERALS)
    assert len({int(item) // 10 for item in held_out}) > 4
    asked = {each.item for each in succession_data.questions(succession_data.DIGITS, False)}
    assert asked == set(succession_data.NUMERALS)


def test_worked_answers_match_the_lists() -> None:
    for text in drawn("worked", False):
        counts = [len(part.split()) for part in text.content.split(" | ")]
        said = text.text.split(": ")[-1] if text.kind != "Steps" else text.text.split("Steps: ")[1]
        if text.kind == worked_data.STEPS:
            steps = [f"Count {n}: {count}" for n, count in enumerate(counts, 1)]
            assert said == " ".join([*steps, f"Total: {sum(counts)} <end>"])
        elif text.kind == worked_data.ABOUT:
            assert abs(int(said.split()[0]) - sum(counts)) <= 2
            assert int(said.split()[0]) % 5 == 0
        else:
            assert said == f"{sum(counts)} <end>"
        assert ("Part" in text.text) == (text.kind != worked_data.SUM)


@pytest.mark.slow
def test_example_data_equals_its_script_output() -> None:
    written = example_data.files()
    assert {path.name for path in DATA.iterdir()} == set(written)
    for name, records in written.items():
        assert (DATA / name).read_text(encoding="utf-8") == example_data.text_of(records), name


def test_zoo_lists_all_models_and_training_stages() -> None:
    known = zoo.zoo_models()
    assert {"counting", "induction", "names", "facts", "nested", "nested/formal"} <= set(known)
    assert {"tasks", "refusal", "reviews", "succession", "worked"} <= set(known)
    assert {"induction/step-1600", "counting-vlm/kinds"} <= set(known)


def test_zoo_path_pattern_matches_training_steps() -> None:
    found = mechdsl.validate('mech 1\nmodel steps = zoo("induction/step-*")\n')
    assert [each.code for each in found if each.severity == "error"] == []
    for wrong in ("induction/stop-*", "*/step-*", "../*"):
        codes = [each.code for each in mechdsl.validate(f'mech 1\nmodel steps = zoo("{wrong}")\n')]
        assert codes[:1] in (["E0401"], ["E0207"]), wrong


def test_prices_answers_match_the_bounds() -> None:
    texts = drawn("prices", False)
    for text in texts:
        low, high, price = (int(word) for word in text.text.split() if word.isdigit())
        assert low < high
        assert text.text.endswith(" yes" if low <= price <= high else " no")
    yes = sum(text.kind == prices_data.BETWEEN for text in texts)
    assert abs(yes - len(texts) / 2) < 50


def test_hidden_rules_depend_only_on_their_fields() -> None:
    """Each used field affects the decision for some thing; other fields affect none."""
    rng = random.Random(2)
    things = [hidden_rules_data.draw_thing(rng) for _ in range(100)]
    for rule, tree in hidden_rules_data.trees().items():
        said = [tree.decide(thing) for thing in things]
        assert 0.3 < said.count("yes") / len(said) < 0.7, rule
        for name, values in hidden_rules_data.FIELDS.items():
            changed = [
                tree.decide({**thing, name: value}) != own
                for thing, own in zip(things, said, strict=True)
                for value in values
            ]
            assert any(changed) == (name in tree.used), (rule, name)
    assert sorted({len(tree.used) for tree in hidden_rules_data.trees().values()}) == [2, 3]


def test_hidden_rules_answers_match_the_tree_and_the_thing() -> None:
    for text in drawn("hidden-rules", False):
        rule, values = text.content.removeprefix("rule ").split(" : ")
        thing = dict(zip(hidden_rules_data.FIELDS, values.split(), strict=True))
        for start, end in text.answers:
            question = text.text[:start].split()[-2]
            decided = hidden_rules_data.trees()[rule].decide(thing)
            assert text.text[start:end] == (decided if question == "decide" else thing[question])
