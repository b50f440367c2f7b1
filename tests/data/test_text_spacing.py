"""Answers separated from the prompt by no space or by two: W0705, and related help texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mechdsl.prompts.answers import text_tokens
from mechdsl.prompts.tokens.tokenizer import TextTokenizer, spacing_problem

from . import support
from .support import build, metric_text, wrapped


def characters() -> Tokenizer:
    """A tokenizer in which each character is a token, including the space."""
    known = "~ abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:=+-/$%.,;?!()<>\"'\n"
    vocabulary = {character: number for number, character in enumerate(known)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return made


def whole_words() -> Tokenizer:
    """Words and punctuation; spaces are dropped, as in the models of the zoo."""
    known = ["<unk>", "The", ":", *support.WORDS]
    vocabulary = {word: number for number, word in enumerate(known)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": support.byte_level,
    "byte-level-digits": lambda: support.byte_level(digits=True),
    "metaspace-bpe": support.metaspace,
    "unigram": support.unigram,
    "wordpiece": support.wordpiece,
    "characters": characters,
    "words": whole_words,
}
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


@cache
def tokenizer_of(name: str) -> TextTokenizer:
    return wrapped(TOKENIZERS[name]())


def reported(template: str, answer: str, name: str) -> dict[str, str]:
    """Code → help of diagnostics of a measured answer, except for unknown words (W0702)."""
    tokenizer = tokenizer_of(name)
    written = f"template {json.dumps(template)} answer {json.dumps(answer)}"
    made, diagnostics = build(f'place in ["France", "Italy"] {written}', tokenizer)
    if made is not None:
        diagnostics += text_tokens(made, metric_text("answer"), tokenizer=tokenizer)[1]
    return {d.code: d.help_text for d in diagnostics if d.code != "W0702"}


@EVERY
def test_answer_without_space_is_reported_with_the_spaced_answer(name: str) -> None:
    (help_text,) = reported("The capital of {place} is", "Paris", name).values()
    assert help_text.startswith('write `" Paris"`, with a leading space')


@EVERY
@pytest.mark.parametrize("answer", [" Paris", "Paris"])
def test_template_that_ends_in_space_is_reported_if_tokens_differ(name: str, answer: str) -> None:
    found = reported("The capital of {place} is ", answer, name)
    drops_spaces = name in ("words", "wordpiece")
    if drops_spaces or (name == "characters" and answer == "Paris"):
        assert not found
    else:
        (help_text,) = found.values()
        advice = 'end the template without a space and write `" Paris"`, with a leading space'
        assert help_text.startswith(advice)


@EVERY
def test_answer_with_one_space_is_not_reported(name: str) -> None:
    assert not reported("The capital of {place} is", " Paris", name)


WRONG = {
    "word after a word": ("The colour is", "apple"),
    "number after a word": ("The Total is", "7"),
    "word after a colon": ("question: of France answer:", "Paris"),
    "word after the only colon": ("When is it? answer:", "Paris"),
    "number after a colon": ("question: 1 answer:", "7"),
    "word after a question mark": ("Is it Paris or Rome?", "Paris"),
    "word after a full stop": ("Mary went to Paris.", "Then"),
    "number after an operator": ("x = 1, y =", "7"),
    "word after an arrow": ("France -> Paris, Italy ->", "Rome"),
    "capital after an apostrophe in a word": ("John's friend isn't", "Mary"),
    "quoted last word": ('He said "Mary', "John"),
    "two spaces": ("The Total is ", " 7"),
}


@pytest.mark.parametrize("name", ["byte-level", "byte-level-digits", "characters"])
@pytest.mark.parametrize("case", WRONG)
def test_missing_or_second_space_is_found(case: str, name: str) -> None:
    prompt, text = WRONG[case]
    found = spacing_problem(prompt, text, tokenizer_of(name))
    assert found is not None
    assert found.text == f" {text.strip()}"


RIGHT = {
    "line break": ("The capital of France is\n", "Paris"),
    "chat": ("<|user|>\nThe capital of France?<|end|>\n<|assistant|>\n", "Paris"),
    "chat in brackets": ("[INST] The capital of France? [/INST]", "Paris"),
    "chat with colons and no spaces": ("User:The capital of France?\nBot:", "Paris"),
    "quote": ('The capital of France is "', "Paris"),
    "opening bracket": ("The capital of France (", "Paris"),
    "tag": ("The capital: <city>", "Paris"),
    "pairs without spaces": ("one two: France:Paris Italy:", "Rome"),
    "sum without spaces": ("count 12+30=", "42"),
    "number that continues": ("In the year 19", "84"),
    "decimal": ("Total is 3.", "14"),
    "thousands": ("Total is 10,", "000"),
    "time": ("It is 12:", "30"),
    "price": ("It is $", "5"),
    "unit": ("It is 5", "km"),
    "date": ("It is 2024-", "05"),
    "numbered items": ("item1 item2 item", "3"),
    "name with a number": ("The model GPT", "4"),
    "punctuation": ("Mary went to Paris", "."),
    "comma": ("When Mary went to Paris", ", John"),
    "closing bracket": ("x ( y", ")"),
    "apostrophe": ("It is Mary", "'s"),
    "copied word": ("apple pear app", "le"),
    "more tokens with a space": ("The capital is Vin", "son"),
    "attribute in code": ("def f(x): return self.get", "Name"),
    "address": ("see www.paris.com/fig", "plum"),
    "file name": ("open the file.", "txt"),
    "one letter of several": ("x y z ab", "c"),
    "no spaces at all": ("applepear", "plum"),
    "Chinese": ("法国 的首都是", "巴黎"),
    "Japanese": ("フランス の首都は", "パリ"),
    "Thai": ("เมืองหลวง ของฝรั่งเศสคือ", "ปารีส"),
    "name in a script without spaces": ("The capital 是", "Paris"),
    "space that the text lacks on purpose": ("The capital of France is", ""),
    "white space alone": ("The capital of France is", " "),
}


@pytest.mark.parametrize("name", ["byte-level", "byte-level-digits", "characters", "wordpiece"])
@pytest.mark.parametrize("case", RIGHT)
def test_right_text_is_not_reported(case: str, name: str) -> None:
    if case == "one letter of several" and name != "characters":
        pytest.skip("only where each character is a token")
    if case == "more tokens with a space" and name != "wordpiece":
        pytest.skip("only where the vocabulary has parts of words")
    assert spacing_problem(*RIGHT[case], tokenizer_of(name)) is None


def test_spacing_warning_counts_rows_and_shows_the_first() -> None:
    tokenizer = tokenizer_of("byte-level")
    rows = 'place in ["France", " Italy"] template "one plum is" answer "{place}"'
    made, _ = build(rows, tokenizer)
    assert made is not None
    (warning,) = text_tokens(made, metric_text("answer"), tokenizer=tokenizer)[1]
    assert warning.label_text == "the model reads `one plum isFrance` in 1 of 2 rows"


def test_unmeasured_answer_is_not_reported() -> None:
    _, diagnostics = build(
        'place in ["France"] template "one plum is" answer "{place}"', tokenizer_of("byte-level")
    )
    assert not diagnostics


def test_answer_given_by_token_id_is_not_reported() -> None:
    tokenizer = tokenizer_of("byte-level")
    made, _ = build('n in [40, 41] template "one plum is" answer token_id(n)', tokenizer)
    assert made is not None
    assert not text_tokens(made, metric_text("answer"), tokenizer=tokenizer)[1]


@pytest.mark.parametrize(
    ("metric", "at"),
    [('"Paris"', "measure"), ("answer of other", "prompts"), ("answer", "prompts")],
)
def test_spacing_warning_points_to_the_text_in_its_block(metric: str, at: str) -> None:
    tokenizer = tokenizer_of("byte-level")
    written = """
      place in ["France", "Italy"]
      template "one plum of {place} is"
      answer "Paris"
      corrupt other { place = other(place) }
    """
    made, _ = build(written, tokenizer)
    assert made is not None
    (warning,) = text_tokens(made, metric_text(metric), tokenizer=tokenizer)[1]
    assert warning.code == "W0705"
    assert warning.span is not None
    whole = warning.span.source.text
    assert whole.startswith("mech 1\nmetric" if at == "measure" else "mech 1\nprompts")
