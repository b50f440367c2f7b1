"""Random prompts blocks and positions give a result or diagnostics, never an exception."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdsl.diagnostics.core import has_errors
from mechdsl.prompts.answers import numeral_tokens, text_tokens
from mechdsl.prompts.positions.cells import hit_texts, resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.table import replace_tokens
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import build, metric_text, positions, table

LINES = st.sampled_from(
    [
        "a in 0..3",
        "b in [0, 1, 7]",
        'c in ["fig", "pear", "plum", ""]',
        "a = b - 1",
        "b = a * 2",
        "d = other(c)",
        "d, e = others(c)",
        "d, e = a",
        "e = choice(a, b)",
        "e = shuffle(xs)",
        "e = shuffle(c)",
        'e = if a > 1 then c else "kiwi"',
        'f = "{c} {a}"',
        "g = xs[2]",
        "g = xs[a] / b",
        'xs = list(c, a, sep: " ")',
        'xs = list(c, 3, sep: ", ", last: " and ", distinct: true)',
        'xs = list("{c} {b}", a)',
        "xs = list(w, from: ws)",
        "xs = [1..a, 5]",
        "where a > 1 or not b = 7",
        'where c in ["fig", "plum"] and a < b',
        "split 30%",
        'answer " {a}"',
        'answer "{xs[1]}"',
        "answer token_id(a)",
        'wrong " {other(c)}"',
        'text third = " {f}"',
        'span bar = "|"',
        "span c in f",
        "corrupt k { a = a - 1 }",
        "corrupt l { c = other(c) }",
        "corrupt m { xs = list(c, 2) }",
        "corrupt n { swap a, b }",
        'corrupt o { template "{c} | {z = a}" }',
        'corrupt q { replace c tokens with "{a}" }',
        "corrupt r { add gaussian(std: 3 sd) to embed at c tokens }",
        "corrupt s { add gaussian(std: 1, samples: 3) to embed at each item token }",
    ]
)
TEMPLATES = st.sampled_from(
    [
        'template "Part {a}: {xs} | {c} Count:"',
        'template "{c} {c} {d = other(c)}"',
        'template "{f} {xs} {e}"',
        'template in ["{a} {b}", "{xs} | {g}"]',
        "",
    ]
)
PLACES = st.sampled_from(
    [
        "first token",
        "last token",
        "bos token",
        "token *",
        "token 0, 3, -2",
        "tokens *",
        "tokens 2..4",
        "item token",
        "item tokens",
        "first-item token",
        "last-item of xs token",
        "item 2 token",
        "item 1..2 token",
        "item * tokens",
        "each item token",
        "each item of ys tokens",
        "each token of xs",
        "each token of last-item",
        "first token of ys",
        '"|" token',
        '"fig" of ys tokens',
        "bar token",
        "each sep of ys token",
        "each sep of xs token",
        "n token",
        "nothing token",
        "token * align right",
    ]
)


@settings(max_examples=250, deadline=None)
@given(lines=st.lists(LINES, max_size=9, unique=True), template=TEMPLATES, limit=st.integers(1, 9))
def test_random_prompts_block_gives_a_table_or_errors(
    words: TextTokenizer, lines: list[str], template: str, limit: int
) -> None:
    made, diagnostics = build("\n".join([*lines, template]), words, limit=limit, max_length=60)
    assert (made is None) == has_errors(diagnostics)
    for diagnostic in diagnostics:
        assert diagnostic.message
        assert diagnostic.span is not None
        # A label may quote a template, but each field of the diagnostic must be filled in.
        slots = [f"{{{slot.name}}}" for slot in fields(diagnostic)]
        assert not any(slot in diagnostic.label_text for slot in slots)
    if made is not None:
        assert 0 < len(made) <= limit
        for run in made.runs.values():
            assert len(run.rows) == len(made) == len(made.row_ids)
            for row in run.rows:
                assert len(row.ids) == len(row.offsets) == len(row.special)
                assert all(0 <= s.start <= s.end <= len(row.text) for s in row.spans)
        found, problems = text_tokens(made, metric_text("answer"), tokenizer=words)
        assert bool(found) != has_errors(problems)
        ids, problems = numeral_tokens(made, range(6), tokenizer=words)
        assert bool(ids) != has_errors(problems)


@pytest.fixture(scope="module")
def lists(words: TextTokenizer) -> PromptTable:
    return table(
        """
        n in 1..4
        item in ["apple", "pear", "plum", "fig"]
        xs = list(item, n, sep: " ")
        ys = list(item, 2, sep: ", ")
        template "Part 1: {xs} | {ys}. Count {n}:"
        span bar = "|"
        corrupt fewer { n = n - 1 }
        """,
        words,
        limit=12,
    )


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_random_position_gives_cells_or_errors(
    words: TextTokenizer, lists: PromptTable, data: st.DataObject
) -> None:
    text = data.draw(PLACES)
    shape = data.draw(st.integers(0, 6))
    point = text.partition(" align")[0]
    other = data.draw(PLACES).partition(" align")[0].split(",")[0]
    match shape:
        case 1 if "," not in text:
            text = f"{point} + {data.draw(st.integers(1, 3))}"
        case 2 if "," not in text:
            text = f"{point} - 1"
        case 3:
            text = f"{{{text}, {other}}}"
        case 4 if "," not in text:
            text = f"tokens between {point} and {other}"
        case 5 if "," not in text:
            text = f"each token between {other} and {point}"
        case 6 if "," not in text:
            text = f"tokens except {point}"
        case _:
            pass
    for run in lists.runs:
        cells, diagnostics = resolve_positions(positions(text), lists, run, tokenizer=words)
        assert cells or has_errors(diagnostics)
        assert len({c.label for c in cells}) == len(cells)
        for cell in cells:
            assert any(cell.hits)
            for row, hits in zip(lists.runs[run].rows, cell.hits, strict=True):
                for tokens in hits:
                    assert tokens
                    assert len(set(tokens)) == len(tokens)
                    assert 0 <= min(tokens) <= max(tokens) < len(row.ids)
            assert hit_texts(lists, run, cell, words)
            replaced = replace_tokens(lists, run, positions(text), cell, "kiwi", words)
            for row in replaced.rows:
                assert all(0 <= s.start <= s.end <= len(row.text) for s in row.spans)
