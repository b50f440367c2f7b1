"""Completions appended to prompts keep their tokens, even non-canonical ones."""

from __future__ import annotations

import pytest

from mechdsl.prompts.answers import numeral_tokens, text_tokens
from mechdsl.prompts.other_runs import add_replies, add_stand_in_replies, remove_replies
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.vocab.metrics import Reply

from . import support
from .tokenizers import BY_NAME

NUMBERS = 'n in [7, 12, 20] template "Count {n}:" answer " {n}" corrupt other { n = n + 1 }'
SAID = "replies of writes"


def table(tokenizer: TextTokenizer) -> PromptTable:
    """Build the table as for an experiment that generates text."""
    return support.table(NUMBERS, tokenizer, writes=True)


def spelt_out(text: str, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Encode a text in pieces, which differs from the tokenizer's canonical encoding."""
    pieces = [text[:2], text[2:5], text[5:]]
    return tuple(i for piece in pieces for i in tokenizer.encode(piece, add_special=False).ids)


def written(tokenizer: TextTokenizer, made: PromptTable) -> dict[int, Reply]:
    """Return replies of all rows except the second."""
    found: dict[int, Reply] = {}
    for number, row in enumerate(made.row_ids):
        ids = spelt_out(" so the count is" + " so" * number, tokenizer)
        if number != 1:
            found[row] = Reply(ids, tokenizer.decode(ids), "length")
    return dict(reversed(found.items()))


@pytest.mark.parametrize("name", ["qwen", "llama3", "gpt2-prefixed", "llama2", "gemma"])
def test_appended_reply_keeps_its_generated_tokens(name: str) -> None:
    tokenizer = BY_NAME[name].wrapped()
    made = table(tokenizer)
    replies = written(tokenizer, made)
    found, problems = add_replies(made, replies, tokenizer, SAID)
    assert not [each for each in problems if each.severity == "error"]
    assert remove_replies(found) is made
    assert found.replies_of == SAID
    assert found.row_ids == (made.row_ids[0], made.row_ids[2])
    assert found.row_keys == (made.row_keys[0], made.row_keys[2])
    assert [row.id for row in found.sources] == list(found.row_ids)
    assert made.whole
    assert not found.whole
    assert made.dealt == ("n",)
    assert found.dealt == ()
    for run in ("clean", "other"):
        for number, old in ((0, 0), (1, 2)):
            row, before = found.runs[run].rows[number], made.runs[run].rows[old]
            reply = replies[found.row_ids[number]]
            assert row.reply is not None
            assert row.ids == (*before.ids, *reply.ids, *found.moved)
            assert row.reply.of(row.ids) == reply.ids
            assert row.text.startswith(before.text)
            added = row.text[len(before.text) :]
            assert "count is" in added
            assert tokenizer.decode(row.ids) == tokenizer.decode(before.ids) + added
            assert len(row.offsets) == len(row.special) == len(row.ids)
            tokens = row.offsets[len(before.ids) :]
            assert (
                "".join(row.text[low:high] for low, high in tokens) == row.text[len(before.text) :]
            )
            answer = row.texts["answer"]
            said = tokenizer.decode([*row.ids, *answer.ids])
            assert said.endswith(f" {row.values['n']}")


@pytest.mark.parametrize("name", ["qwen", "llama3", "gpt2-prefixed"])
def test_answer_tokens_continue_the_reply(name: str) -> None:
    """White space that all answers begin with moves to the end of the reply."""
    kind = BY_NAME[name]
    tokenizer = kind.wrapped()
    made = table(tokenizer)
    found, _ = add_replies(made, written(tokenizer, made), tokenizer, SAID)
    assert found.moved_text == made.moved_text
    for row in found.runs["clean"].rows:
        whole = kind.backend().encode(
            f"{row.text.removesuffix(found.moved_text)} {row.values['n']}"
        )
        answer = row.texts["answer"].ids
        assert tuple(whole.ids[-len(answer) :]) == answer
    evaluated, problems = text_tokens(found, support.metric_text('" {n}"'), tokenizer=tokenizer)
    assert not problems
    assert [t.ids for t in evaluated] == [
        row.texts["answer"].ids for row in found.runs["clean"].rows
    ]
    ids, problems = numeral_tokens(found, [7], tokenizer=tokenizer)
    assert not problems
    seven = next(row for row in made.runs["clean"].rows if row.values["n"] == 7)
    assert ids == seven.texts["answer"].ids


def test_shared_first_word_of_answers_is_not_appended_to_replies() -> None:
    """The model didn't generate it, although all answers begin with it."""
    tokenizer = BY_NAME["gpt2"].wrapped()
    made = support.table(NUMBERS.replace('" {n}"', '" the {n}"'), tokenizer, writes=True)
    found, _ = add_replies(made, written(tokenizer, made), tokenizer, SAID)
    assert found.moved == ()


def test_answer_that_would_merge_with_the_reply_is_warned_about() -> None:
    """The reply ends in the first letter of a one-token word, and the answer is the rest."""
    tokenizer = BY_NAME["gpt2"].wrapped()
    whole = next(
        w for w in ("the", "count", "is") if len(tokenizer.encode(f" {w}", False).ids) == 1
    )
    made = support.table(
        f'n in 1..2 template "{{n}} is" answer "{whole[1:]}"', tokenizer, writes=True
    )
    ids = tokenizer.encode(f" {whole[0]}", False).ids
    replies = {row: Reply(ids, tokenizer.decode(ids), "length") for row in made.row_ids}
    _, problems = add_replies(made, replies, tokenizer, SAID)
    assert [each.code for each in problems] == ["W0703"]


def test_stand_in_replies_have_the_requested_length() -> None:
    tokenizer = BY_NAME["gpt2-prefixed"].wrapped()
    made = table(tokenizer)
    found = add_stand_in_replies(made, SAID, 4)
    for row, before in zip(found.runs["other"].rows, made.runs["other"].rows, strict=True):
        assert len(row.ids) == len(before.ids) + 4
        assert row.reply is not None
        assert row.reply.stands_in
        assert row.texts == before.texts
    assert found.row_ids == made.row_ids


def test_empty_reply_keeps_its_row() -> None:
    """The row stays in the table, without reply positions."""
    tokenizer = BY_NAME["gpt2-prefixed"].wrapped()
    made = table(tokenizer)
    replies = {row: Reply((), "", "end") for row in made.row_ids}
    found, _ = add_replies(made, replies, tokenizer, SAID)
    assert [row.ids for row in found.runs["clean"].rows] == [
        row.ids for row in made.runs["clean"].rows
    ]
