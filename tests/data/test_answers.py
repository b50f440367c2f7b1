from __future__ import annotations

from typing import Any

import pytest

from mechdsl.prompts.answers import numeral_tokens, text_tokens
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import build, metric_text, table

COUNT = """
  count in 2..9
  template "Count 1 of {count} plum:"
  answer " {count}"
  wrong " {count - 1}"
  corrupt fewer { count = count - 1 }
"""


def ids(
    made: PromptTable, text: str, tokenizer: TextTokenizer, **extra: Any
) -> tuple[list[list[str]], list[str]]:
    """Token texts of the expression in every row, and the codes of its diagnostics."""
    found, diagnostics = text_tokens(made, metric_text(text), tokenizer=tokenizer, extra=extra)
    return [[tokenizer.token_text(i) for i in t.ids] for t in found], [d.code for d in diagnostics]


class TestNamedTexts:
    def test_answer_and_wrong_texts_of_each_run_have_their_tokens(
        self, words: TextTokenizer
    ) -> None:
        made = table(COUNT, words)
        counts = [row.values["count"] for row in made.runs["clean"].rows]
        assert ids(made, "answer", words) == ([[str(n)] for n in counts], [])
        assert ids(made, "wrong", words) == ([[str(n - 1)] for n in counts], [])
        assert ids(made, "answer of fewer", words) == ([[str(n - 1)] for n in counts], [])
        assert ids(made, "wrong of fewer", words) == ([[str(n - 2)] for n in counts], [])

    def test_named_text_has_its_tokens(self, words: TextTokenizer) -> None:
        made = table(COUNT + 'text rival = " {count + 1}"', words)
        count = made.runs["clean"].rows[0].values["count"]
        assert ids(made, "rival", words)[0][0] == [str(count + 1)]

    def test_literal_is_evaluated_with_values_of_the_clean_row(self, words: TextTokenizer) -> None:
        made = table(COUNT, words)
        counts = [row.values["count"] for row in made.runs["clean"].rows]
        assert ids(made, '" {count - 1}"', words) == ([[str(n - 1)] for n in counts], [])
        assert ids(made, '" {item.index}"', words, **{"item.index": 3})[0][0] == ["3"]

    def test_unknown_text_run_or_value_is_rejected(self, words: TextTokenizer) -> None:
        made = table(COUNT, words)
        assert ids(made, "anwser", words) == ([], ["E0516"])
        assert ids(made, "answer of few", words) == ([], ["E0516"])
        assert ids(made, '" {cuont}"', words) == ([], ["E0501"])

    def test_several_tokens(self, gpt2: TextTokenizer) -> None:
        made = table('a in 1..2 template "{a} is" answer " Vinson Massif"', gpt2)
        (tokens, _), problems = ids(made, "answer", gpt2)
        assert "".join(tokens) == " Vinson Massif"
        assert len(tokens) > 1
        assert not problems

    def test_token_id_answer_uses_ids_from_the_data(self, words: TextTokenizer) -> None:
        made = table('n in 10..12 template "{n}" answer token_id(n)', words)
        for row in made.runs["clean"].rows:
            assert row.texts["answer"].ids == (row.values["n"],)
        _, (error,) = build('n in [999] template "Count:" answer token_id(n)', words)
        assert error.code == "E0523"

    def test_answer_outside_the_vocabulary_is_rejected(self, words: TextTokenizer) -> None:
        _, diagnostics = build('n in 1..2 template "Count {n}:" answer " banana bread"', words)
        assert [d.code for d in diagnostics] == ["E0519"]

    def test_empty_answer_is_rejected(self, words: TextTokenizer) -> None:
        _, diagnostics = build('n in 1..2 template "Count {n}:" answer ""', words)
        assert [d.code for d in diagnostics] == ["E0524"]

    def test_prompt_that_ends_in_a_space_is_warned_about(self, gpt2: TextTokenizer) -> None:
        made, (warning,) = build('n in 1..2 template "{n} is " answer "Mary"', gpt2)
        assert made is not None
        assert warning.code == "W0703"


class TestMovedToken:
    """Tokenizers that spell ` 3` as a space and a digit."""

    def test_separate_space_token_moves_into_the_prompt(self, qwen: TextTokenizer) -> None:
        made = table(COUNT, qwen)
        plain = qwen.encode(made.sources[0].prompt.text)
        for run in made.runs.values():
            for row in run.rows:
                assert row.text.endswith("plum: ")
                assert qwen.token_text(row.ids[-1]) == " "
                assert row.offsets[-1] == (len(row.text) - 1, len(row.text))
                assert [len(t.ids) for t in row.texts.values()] == [1, 1]
        assert len(made.runs["clean"].rows[0].ids) == len(plain.ids) + 1
        assert made.moved == plain.ids[1:2] or qwen.token_text(made.moved[0]) == " "
        assert made.conventions["answer"].endswith("its first token ` ` is part of the prompt")
        count = made.runs["clean"].rows[0].values["count"]
        assert ids(made, '" {count + 1}"', qwen)[0][0] == [str(count + 1)]

    def test_constant_answer_is_one_token_after_the_moved_space(self, qwen: TextTokenizer) -> None:
        made = table('n in 1..3 template "{n}:" answer " 3"', qwen)
        assert all(len(r.texts["answer"].ids) == 1 for r in made.runs["clean"].rows)

    def test_text_without_the_moved_space_is_rejected(self, qwen: TextTokenizer) -> None:
        made = table(COUNT, qwen)
        assert ids(made, '"{count}"', qwen)[1] == ["E0520"]

    def test_no_token_moves_if_answer_and_wrong_begin_differently(
        self, qwen: TextTokenizer
    ) -> None:
        made = table('n in 1..3 template "{n}:" answer " {n}" wrong " Mary"', qwen)
        assert made.moved == ()
        assert len(made.runs["clean"].rows[0].texts["answer"].ids) == 2

    def test_shared_first_word_moves_only_if_answers_differ(self, gpt2: TextTokenizer) -> None:
        made = table('w in ["Mary", "John"] template "{w} is" answer " the {w}"', gpt2)
        assert made.moved_text == " the"
        assert made.runs["clean"].rows[0].text.endswith(" is the")
        made = table('w in ["Mary", "John"] template "{w} is" answer " the plum"', gpt2)
        assert made.moved == ()

    def test_moved_token_precedes_closing_special_tokens(self, bert: TextTokenizer) -> None:
        made = table('w in ["mary", "john"] template "{w} is" answer " the {w}"', bert)
        row = made.runs["clean"].rows[0]
        assert [bert.token_text(i) for i in row.ids[-2:]] == ["the", "[SEP]"]
        assert row.special[-2:] == (False, True)


class TestFirstToken:
    TEXT = """a in ["Vinson", "Mary"] template "{a} is" answer " {a} Massif" """

    def test_first_and_last_token_of_answer_are_single_tokens(self, gpt2: TextTokenizer) -> None:
        made = table(self.TEXT + 'wrong " plum"', gpt2)
        found, problems = ids(made, "first token of answer", gpt2)
        assert not problems
        assert all(len(t) == 1 for t in found)
        assert {t[0].strip()[0] for t in found} == {"V", "M"}
        assert ids(made, "last token of answer", gpt2)[0][0] != found[0]

    def test_wrong_answer_with_the_same_first_token_is_rejected(self, gpt2: TextTokenizer) -> None:
        made = table(self.TEXT + 'wrong " {a} plum"', gpt2)
        assert ids(made, "first token of answer", gpt2)[1] == ["E0517"]
        assert ids(made, "last token of answer", gpt2)[1] == []

    def test_answers_that_share_the_last_token_are_rejected(self, gpt2: TextTokenizer) -> None:
        text = 'a in ["Mary", "John"] template "{a} is" answer " {a} plum" '
        assert ids(table(text, gpt2), "last token of answer", gpt2)[1] == ["E0517"]
        text = 'a in ["Mary", "John"] template "{a} is" answer " {a} plum"'
        assert ids(table(text, gpt2), "first token of answer", gpt2)[1] == []


class TestNumerals:
    @pytest.mark.parametrize("name", ["words", "gpt2", "qwen", "llama"])
    def test_numerals_have_the_tokens_of_numeric_answers(
        self, every: dict[str, TextTokenizer], name: str
    ) -> None:
        tokenizer = every[name]
        made = table(COUNT, tokenizer)
        found, problems = numeral_tokens(made, range(1, 10), tokenizer=tokenizer)
        assert not problems
        answers = {
            row.values["count"]: row.texts["answer"].ids[0] for row in made.runs["clean"].rows
        }
        assert {n: found[n - 1] for n in answers} == answers

    def test_several_tokens(self, qwen: TextTokenizer) -> None:
        made = table(COUNT, qwen)
        found, (error,) = numeral_tokens(made, range(1, 13), tokenizer=qwen)
        assert not found
        assert error.code == "E0518"
        assert error.message == "3 of the numerals 1..12 have several tokens"

    def test_numerals_keep_leading_zeros_of_answers(self, gpt2: TextTokenizer) -> None:
        made = table('y in ["02", "41"] template "{y}:" answer "{y}"', gpt2)
        _, (error,) = numeral_tokens(made, range(3, 4), tokenizer=gpt2)
        assert "`03`" in error.label_text

    def test_numerals_are_found_if_answers_have_no_numbers(self, words: TextTokenizer) -> None:
        made = table('w in ["fig", "plum"] template "{w}:" answer " {w}"', words)
        found, problems = numeral_tokens(made, range(4), tokenizer=words)
        assert not problems
        assert [words.token_text(i) for i in found] == ["0", "1", "2", "3"]

    def test_numerals_outside_the_vocabulary_are_rejected(self, words: TextTokenizer) -> None:
        _, (error,) = numeral_tokens(table(COUNT, words), range(25, 41), tokenizer=words)
        assert error.code == "E0519"
