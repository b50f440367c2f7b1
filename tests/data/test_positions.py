from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdsl.prompts import runs
from mechdsl.prompts.positions import cells as positions_of_cells
from mechdsl.prompts.positions.cells import check_token_counts, hit_texts, resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import TokenMap
from mechdsl.prompts.table import replace_tokens
from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import cells, hit, positions, table

PARTS = """
  a in 2..5
  b in 2..4
  item in ["apple", "pear", "plum", "fig"]
  part1 = list(item, a, sep: " ")
  part2 = list(item, b, sep: ", ")
  template "Part 1: {part1} | Part 2: {part2}. Count 1: {step1 = a} Total:"
  span bar = "|"
  answer " {a}"
  corrupt fewer { a = a - 1 }
"""
SAME = 'w in ["apple", "pear"] template "Part {w}: fig, plum. Count"'


@pytest.fixture(scope="module")
def parts(words: TextTokenizer) -> PromptTable:
    return table(PARTS, words, limit=24)


def test_positions_of_one_run_share_their_token_maps(
    words: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = table(PARTS, words, limit=3)
    mapped: list[int] = []

    def counting(self: TokenMap, start: int, end: int) -> tuple[int, ...]:
        mapped.append(start)
        return find(self, start, end)

    find = TokenMap.tokens
    monkeypatch.setattr(TokenMap, "tokens", counting)
    first = cells("part1 tokens", made, words)
    once = len(mapped)
    assert once
    made.cells.clear()
    assert cells("part1 tokens", made, words) == first
    assert len(mapped) == once
    made.cells.clear()
    monkeypatch.setattr(runs, "CACHED_TOKENS", 0)  # long runs would take much memory
    assert cells("part1 tokens", made, words) == first
    assert len(mapped) == 2 * once


def test_equal_positions_of_a_table_share_their_cells(
    words: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = table(PARTS, words, limit=3)
    first = cells("part1 tokens", made, words)
    assert cells("part1 tokens", made, words) is first
    assert cells("part1 tokens", made, words, "fewer")[0].hits != first[0].hits
    labels = [cells(text, made, words)[0].label for text in ("item 2 token", "item 02 token")]
    assert labels == ["item 2 token", "item 02 token"]  # as in the file
    monkeypatch.setattr(positions_of_cells, "CACHED_HITS", 2)  # three rows would be too many
    assert cells("part2 tokens", made, words) is not cells("part2 tokens", made, words)


def test_positions_with_a_loop_or_a_problem_are_resolved_each_time(words: TextTokenizer) -> None:
    made = table(PARTS, words, limit=3)
    second, third = (
        cells("token t", made, words, loop_values={"t": number}, loops=("t",)) for number in (1, 2)
    )
    assert [cell.hits for cell in second] != [cell.hits for cell in third]
    assert [codes(made, "token 99", words) for _ in range(2)] == [["E0310"], ["E0310"]]


def codes(made: PromptTable, text: str, tokenizer: TextTokenizer, **options: Any) -> list[str]:
    found = resolve_positions(
        positions(text), made, options.pop("run", "clean"), tokenizer=tokenizer, **options
    )[1]
    return [d.code for d in found]


def row_words(made: PromptTable, n: int, name: str, run: str = "clean") -> list[str]:
    return made.runs[run].rows[n].values[name]


class TestSpans:
    def test_first_and_last_items_are_selected_in_each_row(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        text = "first-item of part1 token, last-item of part1 token, last-item token, last token"
        first, last, last_of_all, end = cells(text, parts, words)
        assert [c.label for c in (first, last, last_of_all, end)] == [
            s.strip() for s in text.split(",")
        ]
        for n in range(len(parts)):
            one, two = row_words(parts, n, "part1"), row_words(parts, n, "part2")
            assert hit(parts, first, n) == [[one[0]]]
            assert hit(parts, last, n) == [[one[-1]]]
            assert hit(parts, last_of_all, n) == [[two[-1]]]
            assert hit(parts, end, n) == [[":"]]

    def test_position_is_resolved_in_each_run_separately(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        (clean,) = cells("last-item of part1 token", parts, words)
        (fewer,) = cells("last-item of part1 token", parts, words, run="fewer")
        for n in range(len(parts)):
            assert fewer.hits[n][0][0] == clean.hits[n][0][0] - 1
            assert hit(parts, fewer, n, "fewer") == [[row_words(parts, n, "part1")[-2]]]

    def test_item_numbers_select_occurrences(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        (second,) = cells("item 2 of part2 token", parts, words)
        assert all(
            hit(parts, second, n) == [[row_words(parts, n, "part2")[1]]] for n in range(len(parts))
        )
        one, two = cells("item 1..2 token", parts, words)
        assert (one.label, two.label) == ("item 1", "item 2")
        (both,) = cells("item 1..2 tokens", parts, words)
        assert both.hits[0] == ((one.hits[0][0][0], two.hits[0][0][0]),)

    def test_each_item_has_one_cell(self, parts: PromptTable, words: TextTokenizer) -> None:
        found = cells("each item of part1 token", parts, words)
        assert [c.label for c in found] == [f"item {k} of part1" for k in range(1, 6)]
        assert [c.item for c in found] == [1, 2, 3, 4, 5]
        for n in range(len(parts)):
            own = row_words(parts, n, "part1")
            assert [hit(parts, c, n) for c in found[: len(own)]] == [[[w]] for w in own]
            assert all(c.hits[n] == () for c in found[len(own) :])

    def test_each_separator_has_one_cell(self, parts: PromptTable, words: TextTokenizer) -> None:
        found = cells("each sep of part2 token", parts, words)
        assert [c.item for c in found] == [1, 2, 3]
        assert hit_texts(parts, "clean", found[0]) == (",",)

    def test_literal_position_selects_the_last_occurrence(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        for text in ("bar token", '"|" token', '"Part" token', '"Part 2" tokens'):
            (cell,) = cells(text, parts, words)
            assert all(hit(parts, cell, n)[0][-1] in ("|", "Part", "2") for n in range(len(parts)))
        (cell,) = cells('"Part" token', parts, words)
        (number,) = cells('"Part 2" token', parts, words)
        assert all(p[0][0] + 1 == q[0][0] for p, q in zip(cell.hits, number.hits, strict=True))

    def test_offset_shifts_position_and_label(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        before, after = cells("step1 token - 1, bar token + 2", parts, words)
        assert before.label == "step1 token - 1"
        assert hit_texts(parts, "clean", before) == (":",)
        assert hit_texts(parts, "clean", after) == ("2",)
        swept = cells("each item token + 1", parts, words)
        assert swept[0].label == "item 1 + 1"
        assert swept[0].item == 1

    def test_item_tokens_joins_all_occurrences(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        (cell,) = cells("item tokens", parts, words)
        for n in range(len(parts)):
            own = [*row_words(parts, n, "part1"), *row_words(parts, n, "part2")]
            assert hit(parts, cell, n) == [own]

    def test_placeholder_that_occurs_twice_needs_an_occurrence(self, words: TextTokenizer) -> None:
        made = table('w in ["apple", "pear"] template "{w} and {w}"', words)
        assert codes(made, "w token", words) == ["E0306"]
        first, last = cells("first-w token, w 2 token", made, words)
        assert (first.hits[0], last.hits[0]) == (((1,),), ((3,),))

    def test_special_tokens_are_selected_by_role(
        self, parts: PromptTable, words: TextTokenizer, bert: TextTokenizer
    ) -> None:
        (bos,) = cells("bos token", parts, words)
        assert set(bos.hits) == {((0,),)}
        assert hit_texts(parts, "clean", bos, words) == ("<s>",)
        made = table(PARTS, bert, limit=4)
        cls, sep = cells("cls token, sep token", made, bert)
        for n, row in enumerate(made.runs["clean"].rows):
            assert cls.hits[n] == ((0,),)
            assert sep.hits[n] == ((len(row.ids) - 1,),)
        assert hit_texts(made, "clean", cells("sep 1 of part2 token", made, bert)[0]) == (",",)
        assert codes(made, "bos token", bert) == ["E0313"]

    def test_first_and_last_token_skip_special_tokens(self, bert: TextTokenizer) -> None:
        made = table(SAME, bert)
        first, last = cells("first token, last token", made, bert)
        assert hit_texts(made, "clean", first) == ("Part",)
        assert hit_texts(made, "clean", last) == ("Count",)


class TestEachTokenOf:
    def facts(self, tmp_path: Path, subjects: list[str], tokenizer: TextTokenizer) -> PromptTable:
        rows = [{"subject": s} for s in subjects]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        text = 'rows "d.json" template "the {subject} is"'
        return table(text, tokenizer, path=tmp_path / "f.mech")

    def test_ragged_spans_have_first_middle_and_last_cells(
        self, tmp_path: Path, words: TextTokenizer
    ) -> None:
        subjects = ["apple", "apple pear", "apple pear fig", "apple pear fig plum kiwi"]
        made = self.facts(tmp_path, subjects, words)
        first, middle, last = cells("each token of subject", made, words)
        assert [c.label for c in (first, middle, last)] == [
            "subject first", "subject middle", "subject last"
        ]  # fmt: skip
        for n, row in enumerate(made.runs["clean"].rows):
            own = row.values["subject"].split()
            assert hit(made, first, n) == ([[own[0]]] if len(own) > 1 else [])
            assert hit(made, middle, n) == [[w] for w in own[1:-1]]
            assert hit(made, last, n) == [[own[-1]]]

    def test_spans_of_equal_length_have_a_cell_per_token(
        self, tmp_path: Path, words: TextTokenizer
    ) -> None:
        made = self.facts(tmp_path, ["apple pear", "fig plum"], words)
        found = cells("each token of subject", made, words)
        assert [c.label for c in found] == ["subject first", "subject last"]
        made = self.facts(tmp_path, ["apple pear fig kiwi", "fig plum apple kiwi"], words)
        found = cells("each token of subject", made, words)
        assert [c.label for c in found] == [f"subject {k}" for k in (1, 2, 3, 4)]

    def test_labels_are_the_same_in_all_runs(self, words: TextTokenizer) -> None:
        made = table(
            'n in [4] w in ["fig"] xs = list(w, n, sep: " ") template "a {xs}"'
            " corrupt c { n = n + 1 }",
            words,
        )
        labels = [
            [c.label for c in cells("each token of xs", made, words, run=run)] for run in made.runs
        ]
        assert labels[0] == labels[1] == ["xs first", "xs middle", "xs last"]

    def test_first_and_last_token_of_a_span_are_selected(
        self, tmp_path: Path, words: TextTokenizer
    ) -> None:
        made = self.facts(tmp_path, ["apple pear fig", "plum kiwi"], words)
        first, last = cells("first token of subject, last token of subject", made, words)
        assert set(hit_texts(made, "clean", first)) == {"apple", "plum"}
        assert set(hit_texts(made, "clean", last)) == {"fig", "kiwi"}


class TestCounted:
    def test_token_indices_select_cells_from_both_ends(self, words: TextTokenizer) -> None:
        made = table(SAME, words)
        size = len(made.runs["clean"].rows[0].ids)
        found = cells("token 0, 3, -2", made, words)
        assert [c.label for c in found] == ["0", "3", "-2"]
        assert [c.hits[0][0][0] for c in found] == [0, 3, size - 2]
        assert [c.label for c in cells("token -3..-1", made, words)] == ["-3", "-2", "-1"]
        assert len(cells("token *", made, words)) == size
        (joined,) = cells("tokens 1..3", made, words)
        assert joined.hits[0] == ((1, 2, 3),)
        (rest,) = cells("tokens 1..-1", made, words)
        assert rest.hits[0] == (tuple(range(1, size)),)
        (everything,) = cells("tokens *", made, words)
        assert everything.hits[0] == (tuple(range(size)),)

    def test_token_indices_count_special_tokens(self, bert: TextTokenizer) -> None:
        made = table(SAME, bert)
        size = len(made.runs["clean"].rows[0].ids)
        (rest,) = cells("tokens 1..-1", made, bert)
        assert rest.hits[0] == (tuple(range(1, size)),)

    def test_loop_value_selects_a_token_index(self, words: TextTokenizer) -> None:
        made = table(SAME, words)
        (cell,) = cells("token c", made, words, loop_values={"c": 2})
        assert cell.label == "2"
        assert codes(made, "token c", words, loop_values={"c": 0.5}) == ["E0322"]

    def test_ragged_prompts_require_an_alignment(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        assert codes(parts, "token *", words) == ["E0305"]
        assert codes(parts, "token 1..-1", words) == ["E0305"]
        lengths = [len(row.ids) for row in parts.runs["clean"].rows]
        left = cells("token * align left", parts, words)
        assert [c.label for c in left] == [str(n) for n in range(max(lengths))]
        assert [sum(bool(h) for h in c.hits) for c in left] == [
            sum(size > n for size in lengths) for n in range(max(lengths))
        ]
        right = cells("token * align right", parts, words)
        assert [c.label for c in right] == [str(-n) for n in range(max(lengths), 0, -1)]
        assert hit_texts(parts, "clean", right[-1]) == (":",)
        assert codes(parts, "token * align middle", words) == ["E0203"]

    def test_runs_of_different_lengths_require_an_alignment(self, words: TextTokenizer) -> None:
        made = table(
            'n in [4] w in ["fig"] xs = list(w, n, sep: " ") template "a {xs}"'
            " corrupt c { n = n + 1 }",
            words,
        )
        assert codes(made, "token *", words) == []
        assert codes(made, "token *", words, with_runs=("c",)) == ["E0305"]

    def test_position_outside_the_prompt_is_rejected(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        assert codes(parts, "token 20", words) == ["E0310"]
        assert codes(parts, "token -40", words) == ["E0310"]
        assert codes(parts, "last token + 1", words) == ["E0310"]
        assert codes(parts, "first token - 1", words) == ["E0310"]  # that is `<s>`
        assert codes(parts, "token 5..2", words) == ["E0321"]
        (found,) = resolve_positions(positions("token 20"), parts, "clean", tokenizer=words)[1]
        assert found.span is not None
        assert found.span.written == "token 20"


class TestSets:
    def test_position_set_joins_tokens_in_written_order(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        bar, end, both = cells("bar token, last token, {last token, bar token}", parts, words)
        assert both.label == "{last token, bar token}"
        assert all(
            q[0] == (r[0][0], p[0][0])  # as written
            for p, r, q in zip(bar.hits, end.hits, both.hits, strict=True)
        )

    def test_tokens_between_two_positions_are_selected(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        (cell,) = cells("tokens between bar token + 1 and step1 token - 1", parts, words)
        for n in range(len(parts)):
            found = hit(parts, cell, n)[0]
            assert found[:3] == ["Part", "2", ":"]
            assert found[-3:] == ["Count", "1", ":"]
        swept = cells("each token between bar token and first-item of part2 token", parts, words)
        assert [c.label for c in swept] == [f"between {k}" for k in range(1, 6)]
        swept = cells("each token between first token and bar token", parts, words)
        assert [c.label for c in swept] == ["between first", "between middle", "between last"]
        assert codes(parts, "tokens between last token and bar token", words) == ["E0311"]
        assert codes(parts, "tokens between item tokens and last token", words) == ["E0314"]
        assert codes(parts, "tokens between each item token and last token", words) == ["E0314"]

    def test_except_selects_all_other_tokens(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        (cell,) = cells("tokens except item tokens", parts, words)
        found = hit_texts(parts, "clean", cell)
        assert not {"apple", "pear", "plum", "fig"} & set(found)
        assert "<s>" not in hit_texts(parts, "clean", cell, words)
        assert codes(parts, "tokens except tokens *", words) == ["E0315"]
        assert codes(parts, "each token except bar token", words) == ["E0305"]
        swept = cells("each token except bar token align left", parts, words)
        assert all("|" not in hit_texts(parts, "clean", c) for c in swept)
        (bars,) = cells("tokens except tokens except bar token", parts, words)
        assert hit_texts(parts, "clean", bars) == ("|",)


class TestRefusals:
    def test_ambiguous_position_lists_alternatives(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        _, (error,) = resolve_positions(positions("item token"), parts, "clean", tokenizer=words)
        assert error.code == "E0306"
        for way in ("`first-item token`", "`last-item token`", "`item 2 token`", "`item tokens`"):
            assert way in error.help_text

    @pytest.mark.parametrize(
        ("run", "needed"), [("clean", "a >= 4"), ("fewer", "a >= 5")], ids=["clean", "fewer"]
    )
    def test_missing_occurrence_suggests_a_where_condition(
        self, parts: PromptTable, words: TextTokenizer, run: str, needed: str
    ) -> None:
        _, (error,) = resolve_positions(
            positions("item 4 of part1 token"), parts, run, tokenizer=words
        )
        assert error.code == "E0309"
        assert f"`where {needed}`" in error.help_text
        lacking = sum(len(row_words(parts, n, "part1", run)) < 4 for n in range(len(parts)))
        assert error.message.startswith(f"{lacking} of {len(parts)} rows")

    def test_unknown_position_name_is_rejected(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        for text in ("itme token", "last-item of part3 token", '"apple" of part9 token'):
            assert codes(parts, text, words) == ["E0308"]
        _, (error,) = resolve_positions(positions("b token"), parts, "clean", tokenizer=words)
        assert "is a value" in error.help_text

    def test_separator_of_white_space_has_no_token(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        assert codes(parts, "each sep of part1 token", words) == ["E0312"]

    def test_line_break_separators_have_tokens(self, gpt2: TextTokenizer) -> None:
        made = table(
            'w in ["fig", "plum"] xs = list(w, 3, sep: "\\n") template "{xs}"', gpt2, limit=3
        )
        one, two = cells("each sep of xs token", made, gpt2)
        assert hit_texts(made, "clean", one) == ("\n",)
        assert one.hits[0] < two.hits[0]

    def test_literal_missing_from_the_prompt_is_rejected(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        assert codes(parts, '"Answer" token', words) == ["E0309"]

    def test_ranked_and_image_positions_are_rejected_in_prompts(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        assert codes(parts, "top 25% of caap tokens", words) == ["E0108"]
        assert codes(parts, "image row 3 col 4 token", words) == ["E0308"]


class TestGlue:
    def test_token_that_covers_adjacent_text_is_warned_about(self, gpt2: TextTokenizer) -> None:
        made = table('w in ["ap", "pe"] template "pear {w}ple"', gpt2)
        _, diagnostics = resolve_positions(positions("w token"), made, "clean", tokenizer=gpt2)
        assert [d.code for d in diagnostics] == ["W0701"]
        assert "`apple`" in diagnostics[0].label_text

    def test_punctuation_is_a_separate_token(self, gpt2: TextTokenizer) -> None:
        made = table('w in ["Mary", "John"] template "When {w}, {v = w}\'s plum"', gpt2)
        first, second = cells("w token, v token", made, gpt2)
        assert set(hit_texts(made, "clean", first)) == {"Mary", "John"}
        assert first.hits[0] != second.hits[0]

    @settings(max_examples=30, deadline=None)
    @given(
        word=st.text("abñéß😀שלםж09", min_size=1, max_size=8),
        before=st.sampled_from(["", " ", "(", "x ", "\n"]),
        after=st.sampled_from(["", " ", ".", "'s", "\n"]),
    )
    @pytest.mark.parametrize("name", ["gpt2", "llama", "qwen", "t5", "bert"])
    def test_selected_tokens_cover_the_span(
        self, every: dict[str, TextTokenizer], name: str, word: str, before: str, after: str
    ) -> None:
        tokenizer = every[name]
        template = json.dumps(f"fig{before}{{w}}{after}plum", ensure_ascii=False)
        made = table(f'w in ["{word}"] template {template}', tokenizer)
        (cell,) = cells("w tokens", made, tokenizer)
        row = made.runs["clean"].rows[0]
        tokens = TokenMap(row)
        (span,) = row.spans
        covered = {i for p in cell.hits[0][0] for i in range(*tokens.places[p])}
        assert set(range(span.start, span.end)) <= covered
        for p in cell.hits[0][0]:
            a, b = tokens.places[p]
            assert a < span.end
            assert b > span.start


class TestJoined:
    def test_joined_positions_need_equal_token_counts(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        for text, wrong in (("last-item of part1 token", []), ("part1 tokens", ["E0307"])):
            base = cells(text, parts, words, run="fewer")
            source = cells(text, parts, words)
            assert [d.code for d in check_token_counts(base, source)] == wrong

    def test_token_counts_ignore_rows_without_the_cell(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        source = cells("each item of part1 token", parts, words)
        base = cells("each item of part1 token", parts, words, run="fewer")
        assert not check_token_counts(base, source[: len(base)])


class TestReplace:
    def replaced(
        self, made: PromptTable, text: str, new: str, tokenizer: TextTokenizer
    ) -> tuple[str, list[str]]:
        (cell,) = cells(text, made, tokenizer)
        row = replace_tokens(made, "clean", positions(text), cell, new, tokenizer).rows[0]
        return row.text, [row.text[s.start : s.end] for s in row.spans]

    def test_replacement_spans_the_selected_tokens(self, gpt2: TextTokenizer) -> None:
        made = table(
            'w in ["Vinson Massif"] v in ["fig"] template "the {w} is {v}. So" answer " Mary"', gpt2
        )
        text = made.runs["clean"].rows[0].text
        assert self.replaced(made, "w tokens", "plum", gpt2) == (
            "the plum is fig. So", ["plum", "fig"]
        )  # fmt: skip
        assert self.replaced(made, "v tokens", "", gpt2)[0] == text.replace("fig", "")
        assert self.replaced(made, "tokens *", "a", gpt2)[0] == "a a a aa a"
        assert self.replaced(made, "{w tokens, v tokens}", "x y", gpt2) == (
            "the x y is x y. So", ["x y", "x y"]
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("at", "expected", "items"),
        [
            ("xs tokens", "Part thing: fig", []),
            ('"plum, pear" tokens', "Part apple, thing: fig", ["apple"]),
            ("item tokens", "Part thing, thing, thing: fig", ["thing"] * 3),
            ("item of xs tokens", "Part thing, thing, thing: fig", ["thing"] * 3),
            ("item 2..3 tokens", "Part apple, thing, thing: fig", ["apple", "thing", "thing"]),
            ("last-item tokens", "Part apple, plum, thing: fig", ["apple", "plum", "thing"]),
            ("sep of xs tokens", "Part applething plumthing pear: fig", ["apple", "plum", "pear"]),
            ("{xs tokens, item tokens}", "Part thing: fig", []),
            ("{xs token, item tokens}", "Part thing, thing, thing: fig", ["thing"] * 3),
        ],
    )
    def test_replacement_keeps_the_named_span(
        self, words: TextTokenizer, tmp_path: Path, at: str, expected: str, items: list[str]
    ) -> None:
        (tmp_path / "d.json").write_text('[{"ws": ["apple", "plum", "pear"]}]')
        lines = 'rows "d.json" xs = list(item, from: ws, sep: ", ") template "Part {xs}: fig"'
        made = table(lines, words, path=tmp_path / "f.mech")
        (cell,) = cells(at, made, words)
        row = replace_tokens(made, "clean", positions(at), cell, "thing", words).rows[0]
        assert row.text == expected
        assert [row.text[s.start : s.end] for s in row.spans if s.name == "item"] == items
        lists = [row.text[s.start : s.end] for s in row.spans if s.name == "xs"]
        assert lists == [expected[len("Part ") : -len(": fig")]]

    def test_replacement_keeps_moved_token_and_answers(self, qwen: TextTokenizer) -> None:
        made = table('n in 2..3 template "Count {n} plum:" answer " {n}"', qwen)
        (cell,) = cells("n token", made, qwen)
        run = replace_tokens(made, "clean", positions("n token"), cell, "Mary", qwen)
        for new, old in zip(run.rows, made.runs["clean"].rows, strict=True):
            assert new.text == "Count Mary plum: "
            assert new.ids[-1:] == old.ids[-1:] == made.moved
            assert new.texts == old.texts
            assert new.values == old.values

    def test_replacement_skips_rows_without_the_cell(
        self, parts: PromptTable, words: TextTokenizer
    ) -> None:
        each = "each item of part1 token"
        found = cells(each, parts, words)
        run = replace_tokens(parts, "clean", positions(each), found[-1], "thing", words)
        for n, (new, old) in enumerate(zip(run.rows, parts.runs["clean"].rows, strict=True)):
            assert (new == old) == (not found[-1].hits[n])
