from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdsl.base.hashing import stable_hash, stable_hashes
from mechdsl.prompts import rows
from mechdsl.prompts.block import PromptsBlock
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.table import BlockCompiler
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.prompts.values import content_key

from .. import fruit
from .support import build, table

FRUIT = "\n".join(["", *fruit.VALUES, fruit.FEWER, ""]).replace("3..9", "2..9")

PINNED = [
    "Part 1: fig apple plum pear apple apple fig apple Count 1:",
    "Part 1: fig fig pear fig apple pear fig plum fig Count 1:",
    "Part 1: plum plum apple pear apple plum Count 1:",
]


def texts(made: PromptTable, run: str = "clean") -> list[str]:
    return [row.text for row in made.runs[run].rows]


def values(made: PromptTable, name: str, run: str = "clean") -> list[Any]:
    return [row.values[name] for row in made.runs[run].rows]


def test_hashes_of_numbers_equal_those_of_each_number() -> None:
    parts = ("é\ud800", 2, 0.5)
    numbers = [0, 7, 2**70]
    assert list(stable_hashes(numbers, *parts)) == [stable_hash(*parts, n) for n in numbers]
    assert list(stable_hashes([3])) == [stable_hash(3)]


def codes(text: str, tokenizer: TextTokenizer, **options: Any) -> list[str]:
    return [d.code for d in build(text, tokenizer, **options)[1]]


class TestCombinations:
    def test_every_combination_is_a_row(self, words: TextTokenizer) -> None:
        made = table('a in 1..3 b in ["x", "y"] template "{a} {b}"', words)
        assert sorted(texts(made)) == ["1 x", "1 y", "2 x", "2 y", "3 x", "3 y"]

    def test_value_drawn_only_by_a_list_is_not_combined(self, words: TextTokenizer) -> None:
        made = table(FRUIT, words, limit=8)
        assert sorted(values(made, "count")) == list(range(2, 10))
        assert "item" not in made.runs["clean"].rows[0].values

    def test_value_drawn_by_a_list_and_the_template_is_combined(self, words: TextTokenizer) -> None:
        text = 'item in ["apple", "pear"] xs = list(item, 2, sep: " ") template "{item}: {xs}"'
        assert sorted(values(table(text, words, limit=2), "item")) == ["apple", "pear"]

    def test_where_drops_combinations(self, words: TextTokenizer) -> None:
        made = table('a in 1..3 b in 1..3 where a < b template "{a} {b}"', words)
        assert sorted(texts(made)) == ["1 2", "1 3", "2 3"]
        assert made.conventions["dropped"] == "6 by `where`"

    def test_range_with_step_lists_its_values(self, words: TextTokenizer) -> None:
        made = table('a in 0..1 step 0.25 template "{a}"', words)
        assert sorted(texts(made)) == ["0", "0.25", "0.5", "0.75", "1"]
        made = table('a in [1..3, 7] template "{a}"', words)
        assert sorted(texts(made)) == ["1", "2", "3", "7"]
        made = table('a in 0..0.3 step 0.1 template "{a}"', words)
        assert sorted(texts(made)) == ["0", "0.1", "0.2", "0.3"]

    def test_parameter_sets_a_range_bound(self, words: TextTokenizer) -> None:
        made = table('a in 1..most template "{a}"', words, parameters={"most": 2})
        assert sorted(texts(made)) == ["1", "2"]

    def test_words_function_lists_words_of_a_model(self, words: TextTokenizer) -> None:
        made = table('w in words(toy) template "{w}"', words, words=lambda m: [m, "pear"])
        assert sorted(texts(made)) == ["pear", "toy"]

    def test_template_list_is_a_value_of_rows(self, words: TextTokenizer) -> None:
        text = 'a in 1..2 template in ["{a} apple", "pear {b = a + 1}"]'
        made = table(text, words)
        assert sorted(texts(made)) == ["1 apple", "2 apple", "pear 2", "pear 3"]
        assert set(values(made, "template")) == {"{a} apple", "pear {b = a + 1}"}
        kept = table(text + 'where template = "{{a}} apple"', words)
        assert sorted(texts(kept)) == ["1 apple", "2 apple"]


class TestLimit:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)))
    def test_rows_of_a_smaller_limit_are_a_prefix_of_a_larger_one(
        self, words: TextTokenizer, seed: int, sizes: tuple[int, int]
    ) -> None:
        small, large = sorted(sizes)
        a = table(FRUIT, words, seed=seed, limit=small)
        b = table(FRUIT, words, seed=seed, limit=large)
        assert a.row_ids == b.row_ids[:small]
        for run in ("clean", "fewer"):
            assert a.runs[run].rows == b.runs[run].rows[:small]

    def test_draws_fill_the_limit_with_distinct_rows(self, words: TextTokenizer) -> None:
        made = table(FRUIT, words, limit=200)
        assert len(made) == 200
        assert len(set(texts(made))) == 200
        assert len(set(made.row_ids)) == 200

    def test_limit_over_all_combinations_returns_all_rows(self, words: TextTokenizer) -> None:
        made = table('a in 1..3 template "{a}"', words, limit=200)
        assert len(made) == 3
        assert "no more exist" in made.conventions["rows"]

    def test_limit_over_all_draws_returns_distinct_rows(self, words: TextTokenizer) -> None:
        text = 'item in ["apple", "pear"] xs = list(item, 2, sep: " ") template "{xs}"'
        assert len(table(text, words, limit=100)) == 4

    def test_rows_depend_on_the_seed(self, words: TextTokenizer) -> None:
        a, b = (table(FRUIT, words, seed=s, limit=20) for s in (0, 1))
        assert texts(a) != texts(b)

    def test_rows_do_not_depend_on_the_random_module(self, words: TextTokenizer) -> None:
        random.seed(1)
        a = table(FRUIT, words, limit=20)
        random.seed(2)
        assert a == table(FRUIT, words, limit=20)

    def test_rows_equal_pinned_texts(self, words: TextTokenizer) -> None:
        """Cached results and published tables depend on these rows."""
        assert texts(table(FRUIT, words, limit=3)) == PINNED

    def test_draws_depend_on_the_name_of_the_block(self, words: TextTokenizer) -> None:
        a = table(f"prompts p {{ {FRUIT} }}", words, limit=20)
        b = table(f"prompts q {{ {FRUIT} }}", words, limit=20)
        assert texts(a) != texts(b)

    def test_tables_of_one_block_compute_each_row_once(
        self, words: TextTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys: list[int] = []

        def counted(*parts: Any) -> int:
            keys.append(content_key(*parts))
            return keys[-1]

        monkeypatch.setattr(rows, "content_key", counted)
        text = f"prompts p {{ {FRUIT} split 50% }}"
        compiler = BlockCompiler(words=lambda _: words.plain_words())
        limits: list[dict[str, Any]] = [{"limit": n} for n in (3, 12, 7)] + [
            {"limit": 5, "part": part} for part in ("train", "test")
        ]
        shared = [table(text, words, compiler=compiler, **each) for each in limits]
        assert len(keys) == len(set(keys)) == 12
        assert shared == [table(text, words, **each) for each in limits]


class TestDraws:
    def test_other_draws_a_different_value(self, words: TextTokenizer) -> None:
        text = 'a in ["apple", "pear", "plum"] b = other(a) template "{a} {b}"'
        made = table(text, words, limit=100)
        assert sorted(texts(made)) == sorted(
            f"{a} {b}"
            for a in ("apple", "pear", "plum")
            for b in ("apple", "pear", "plum")
            if a != b
        )

    def test_others_draws_distinct_values(self, words: TextTokenizer) -> None:
        text = """a in ["apple", "pear", "plum", "fig", "kiwi"] b = other(a)
        c, d, e = others(a, b) template "{a} {b} {c} {d} {e}" """
        assert all(len(set(t.split())) == 5 for t in texts(table(text, words, limit=50)))

    def test_choice_and_shuffle_draw_from_their_values(self, words: TextTokenizer) -> None:
        text = """n in 1..20 c = choice("apple", "pear") xs = list(y, 3, sep: " ", distinct: true)
        y in ["fig", "plum", "kiwi"] zs = shuffle(xs) template "{n} {c} {xs} | {zs}" """
        made = table(text, words)
        assert set(values(made, "c")) == {"apple", "pear"}
        for row in made.runs["clean"].rows:
            assert sorted(row.values["xs"]) == sorted(row.values["zs"]) == ["fig", "kiwi", "plum"]
        assert values(made, "xs") != values(made, "zs")

    def test_list_joins_items_with_separators(self, words: TextTokenizer) -> None:
        text = """n in 0..3 y in ["fig", "plum"] xs = list(y, n, sep: ", ", last: " and ")
        template "[{xs}]" """
        made = table(text, words, limit=4)
        shapes = {t.replace("plum", "x").replace("fig", "x") for t in texts(made)}
        assert shapes == {"[]", "[x]", "[x and x]", "[x, x and x]"}

    def test_index_selects_an_item_of_a_list(self, words: TextTokenizer) -> None:
        text = """y in ["fig", "plum", "kiwi"] xs = list(y, 3, sep: " ", distinct: true)
        template "{xs}: {second = xs[2]}" answer " {xs[3]}" """
        for row in table(text, words, limit=5).runs["clean"].rows:
            assert row.text.split()[-1] == row.text.split()[1]
            assert row.texts["answer"].text == " " + row.values["xs"][2]

    def test_list_of_templates_has_spans_of_their_values(self, words: TextTokenizer) -> None:
        text = """y in ["fig", "plum"] z in 1..3 xs = list("{y} {z}", 2, sep: ", ")
        template "{xs}" """
        made = table(text, words, limit=10)
        assert len(made) == 10
        names = [s.name for s in made.runs["clean"].rows[0].spans]
        assert names == ["xs", "y", "z", "sep", "y", "z"]

    def test_conditional_and_arithmetic_values_are_computed(self, words: TextTokenizer) -> None:
        text = """a in 1..4 b = if a > 2 and not a = 4 then a * 2 else -a
        h = a / 2 template "{a} {b} {h}" """
        assert sorted(texts(table(text, words))) == ["1 -1 0.5", "2 -2 1", "3 6 1.5", "4 -4 2"]

    def test_order_of_definitions_does_not_matter(self, words: TextTokenizer) -> None:
        lines = ["a in 1..4", "b = a + 1", "c = b + a", 'd = "{b}-{c}"', 'template "{d} {c}"']
        first = texts(table("\n".join(lines), words))
        assert texts(table("\n".join(reversed(lines)), words)) == first


class TestCorruptions:
    def test_corrupted_list_length_keeps_drawn_items(self, words: TextTokenizer) -> None:
        made = table(FRUIT + "corrupt more { count = count + 2 }", words, limit=50)
        for clean, fewer, more in zip(
            *(made.runs[r].rows for r in ("clean", "fewer", "more")), strict=True
        ):
            assert fewer.values["fruits"] == clean.values["fruits"][:-1]
            assert more.values["fruits"][: clean.values["count"]] == clean.values["fruits"]
            assert fewer.texts["answer"].text == f" {clean.values['count'] - 1}"

    def test_corrupted_distinct_list_length_keeps_drawn_items(self, words: TextTokenizer) -> None:
        text = """n in 2..5 y in words(toy) xs = list(y, n, sep: " ", distinct: true)
        template "{xs}" corrupt more { n = n + 3 }"""
        made = table(text, words, limit=20)
        for clean, more in zip(made.runs["clean"].rows, made.runs["more"].rows, strict=True):
            assert more.values["xs"][: clean.values["n"]] == clean.values["xs"]
            assert len(set(more.values["xs"])) == clean.values["n"] + 3

    def test_corruption_that_redefines_a_list_redraws_it(self, words: TextTokenizer) -> None:
        text = """y in words(toy) xs = list(y, 6, sep: " ") template "{xs} {cue = xs[1]}"
        corrupt scrambled { xs = list(y, 6, sep: " ") }"""
        made = table(text, words, limit=20)
        assert not set(texts(made)) & set(texts(made, "scrambled"))
        for row in made.runs["scrambled"].rows:
            assert row.values["cue"] == row.values["xs"][0]

    def test_corruption_replaces_each_drawn_item(self, words: TextTokenizer) -> None:
        made = table(FRUIT + "corrupt swapped { item = other(item) }", words, limit=30)
        for clean, swapped in zip(made.runs["clean"].rows, made.runs["swapped"].rows, strict=True):
            pairs = list(zip(clean.values["fruits"], swapped.values["fruits"], strict=True))
            assert len(pairs) == clean.values["count"]
            assert all(a != b for a, b in pairs)

    def test_corruption_edits_one_span_of_a_shared_value(self, words: TextTokenizer) -> None:
        text = """io in ["apple", "pear", "plum", "fig", "kiwi"] s = other(io)
        template "{io} {s1 = s} {s2 = s}" answer " {io}" wrong " {s}"
        corrupt abc { io, s1, s2 = others(io, s) }
        corrupt second { s2 = io }"""
        made = table(text, words, limit=20)
        for n in range(len(made)):
            clean, abc, second = (made.runs[r].rows[n] for r in ("clean", "abc", "second"))
            old, new = clean.text.split(), abc.text.split()
            assert old[1] == old[2]
            assert len(set(new) | set(old)) == 5
            assert second.text.split() == [old[0], old[1], old[0]]

    def test_corruption_keeps_dependent_draws_if_still_valid(self, words: TextTokenizer) -> None:
        text = """a in words(toy) b = other(a) template "{a} {b}" corrupt c { a = other(a, b) }"""
        made = table(text, words, limit=50)
        assert values(made, "b") == values(made, "b", "c")

    def test_corruption_swaps_values_and_replaces_the_template(self, words: TextTokenizer) -> None:
        text = """a in 1..3 b in 4..6 template "{a} {b}" corrupt s { swap a, b }
        corrupt t { template "{b}: {a} {c = a + b}" }"""
        made = table(text, words)
        for n, row in enumerate(made.runs["clean"].rows):
            a, b = row.text.split()
            assert made.runs["s"].rows[n].text == f"{b} {a}"
            assert made.runs["t"].rows[n].text == f"{b}: {a} {int(a) + int(b)}"

    def test_corruption_steps_apply_in_order(self, words: TextTokenizer) -> None:
        text = 'a in 1..3 b in 4..6 template "{a} {b}" corrupt c { a = a + 1 b = a }'
        for clean, row in zip(
            *(table(text, words).runs[r].rows for r in ("clean", "c")), strict=True
        ):
            assert row.values["a"] == row.values["b"] == clean.values["a"] + 1

    def test_rows_equal_after_corruption_are_dropped(self, words: TextTokenizer) -> None:
        made = table('a in 1..4 template "{a}" corrupt c { a = 2 }', words)
        assert sorted(texts(made)) == ["1", "3", "4"]
        assert "1 that `c` leaves unchanged" in made.conventions["dropped"]

    def test_rows_with_equal_tokens_after_replacement_are_dropped(
        self, words: TextTokenizer
    ) -> None:
        text = """a in 1..4 template "{a} and 9" corrupt c { replace a tokens with "2" }
        corrupt d { replace a tokens with "5" }"""
        made = table(text, words)
        assert sorted(texts(made)) == ["1 and 9", "3 and 9", "4 and 9"]
        assert made.conventions["dropped"] == "1 that `c` leaves unchanged"
        assert made.unchanged == {"c"}

    def test_duplicate_records_are_kept_unless_distinct(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n1,2\n1,5\n1,2\n", encoding="utf-8")
        rows = f'rows "{tmp_path / "a.csv"}"'
        rest = 'template "{x}" answer " {y}"'
        every, found = build(f"{rows} {rest}", words)
        assert every is not None
        assert sorted(texts(every)) == ["1", "1", "1", "1", "3"]
        assert every.conventions["rows"] == "5 of 5 records, 2 of them duplicates, seed 0"
        assert [d.message for d in found] == ["2 of 5 rows of prompts `p` are duplicates"]
        once, found = build(f"{rows} distinct {rest}", words)
        assert once is not None
        assert found == []
        assert sorted(texts(once)) == ["1", "1", "3"]
        assert once.conventions["dropped"] == "2 duplicates"
        assert (
            once.row_ids
            == tuple(  # the same rows without duplicates
                number
                for n, number in enumerate(every.row_ids)
                if values(every, "y")[n] not in values(every, "y")[:n]
            )
        )

    def test_equal_draws_for_one_record_are_duplicates(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "a.csv").write_text("x\n1\n1\n", encoding="utf-8")
        text = f'rows "{tmp_path / "a.csv"}" n in 1..2 xs = list(n, 1) template "{{x}} {{xs}}"'
        made, _ = build(text, words, limit=8)
        assert made is not None
        assert sorted(texts(made)) == ["1 1", "1 1", "1 2", "1 2"]

    def test_duplicate_records_are_in_the_same_part_of_a_split(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        lines = [str(n % 7) for n in range(70)]
        (tmp_path / "a.csv").write_text("\n".join(["x", *lines, ""]), encoding="utf-8")
        text = f'rows "{tmp_path / "a.csv"}" template "{{x}}" split 50%'
        parts = [build(text, words, part=part)[0] for part in ("train", "test")]
        train, test = (texts(part) for part in parts if part is not None)
        assert not set(train) & set(test)
        assert sorted(train + test) == sorted(lines)
        assert (len(set(train)), len(set(test))) == (3, 4)

    def test_noise_corruption_records_positions_and_scale(self, words: TextTokenizer) -> None:
        text = """a in ["apple", "pear"] template "Part {a}:"
        corrupt n { add gaussian(std: 3 sd, samples: 10) to embed at a tokens }
        corrupt m { add gaussian(std: 0.5) to embed at last token }"""
        made = table(text, words, limit=1)
        noise, absolute = made.runs["n"].noise, made.runs["m"].noise
        assert noise is not None
        assert absolute is not None
        assert (noise.site, noise.sds, noise.std, noise.samples) == ("embed", 3, None, 10)
        assert noise.positions == ((2,),)
        # Over all rows before `limit`, with repetition.
        assert sorted(map(words.token_text, noise.sd_tokens)) == ["apple", "pear"]
        assert (absolute.std, absolute.sds, absolute.sd_tokens) == (0.5, None, ())
        assert absolute.positions == ((3,),)
        assert made.conventions["noise of n"] == "gaussian, 3 sd over 2 tokens, 10 draws"

    def test_noise_scale_uses_tokens_of_another_span(self, words: TextTokenizer) -> None:
        text = """a in ["apple", "pear"] b = "fig" template "{a} {b}"
        corrupt n { add gaussian(std: 3 sd of b) to embed at a tokens }"""
        noise = table(text, words).runs["n"].noise
        assert noise is not None
        assert [words.token_text(t) for t in noise.sd_tokens] == ["fig", "fig"]

    def test_noise_scale_does_not_depend_on_limit_or_split(self, words: TextTokenizer) -> None:
        text = (
            FRUIT
            + """split 50%
        corrupt n { add gaussian(std: 3 sd) to embed at item tokens }"""
        )
        found = [
            table(text, words, limit=limit, part=part).runs["n"].noise
            for limit, part in ((3, None), (7, "train"))
        ]
        assert len({n.sd_tokens for n in found if n is not None}) == 1

    def test_replace_corruption_replaces_each_item(self, words: TextTokenizer) -> None:
        made = table(FRUIT + 'corrupt blank { replace item tokens with "thing" }', words, limit=10)
        for clean, blank in zip(made.runs["clean"].rows, made.runs["blank"].rows, strict=True):
            things = " ".join(["thing"] * clean.values["count"])
            assert blank.text == f"Part 1: {things} Count 1:"
            assert len(blank.ids) == len(clean.ids)
            assert [blank.text[s.start : s.end] for s in blank.spans if s.name == "item"] == (
                things.split()
            )


REUSED = {
    "values through a text": """a in 1..3 b = a + 1 text = "{b} of" d = "same" e = other(d)
        d in ["x", "y"] template "{text} {d} {e}" answer " {b}" corrupt c { a = a + 10 }""",
    "texts of a list": """x in ["apple", "pear", "fig"] n in 1..4
        xs = list("{x} {n}", 3, sep: ", ") cue = xs[2] template "{xs} {cue}"
        corrupt c { n = n + 5 }""",
    "items of a list": """x in ["apple", "pear", "fig"] xs = list(x, 3, sep: " ") cue = xs[2]
        y in ["apple", "plum"] z = other(y) template "{xs} {cue} {y} {z}"
        corrupt c { x = other(x) }""",
    "draws of several names": """x in words(toy) a, b = others(x) y in ["plum", "kiwi"]
        z = choice("apple", "fig") t = if y = "plum" then a else b
        template "{x} {a} {b} {t} {z}" corrupt c { y = other(y) } corrupt d { a = x }""",
    "a text of a metric": """a in 1..3 b in 4..6 template "{a} {b}{wrong}" wrong " {b}"
        answer "{wrong}" corrupt c { b = b + 3 } corrupt d { swap a, b }""",
    "another template": """a in 1..3 b = a + 1 template "{a} {b} {c = a + b}"
        corrupt c { template "{b}: {a} {c = a * b}" a = a + 1 }""",
}


class TestReusedValues:
    """A corrupted row takes from the clean one the values that no change affects."""

    def test_names_that_read_a_changed_name_have_new_values(self, words: TextTokenizer) -> None:
        made = table(REUSED["values through a text"], words)
        for clean, row in zip(made.runs["clean"].rows, made.runs["c"].rows, strict=True):
            first, *rest = clean.text.split()
            assert row.text.split() == [str(int(first) + 10), *rest]
            assert row.texts["answer"].text == f" {int(first) + 10}"

    @pytest.mark.parametrize("text", REUSED.values(), ids=list(REUSED))
    def test_corrupted_rows_equal_rows_built_without_reuse(
        self, text: str, words: TextTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = table(text, words, limit=20)
        monkeypatch.setattr(PromptsBlock, "affected", lambda self, *given: set(self.names()))
        alone = table(text, words, limit=20)
        assert alone.row_keys == made.row_keys
        assert alone.runs == made.runs

    def test_text_with_a_marked_column_is_written_again(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        rows = [{"prompt": "the apple", "subject": "apple", "other": "fig"}]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        text = """rows "d.json" said = "see {prompt}" template "{said} {subject}"
        span subject in prompt corrupt c { subject = other }"""
        made = table(text, words, path=tmp_path / "f.mech")
        assert texts(made, "c") == ["see the fig fig"]

    def test_python_function_is_called_again(self, words: TextTokenizer, tmp_path: Path) -> None:
        (tmp_path / "f.py").write_text("def both(row):\n    return row['a'] + row['b']\n")
        text = """a in 1..3 b in 4..6 total = python("f.py:both") half = total / 2
        template "{a} {b} {half}" corrupt c { a = a + 1 }"""
        made = table(text, words, path=tmp_path / "f.mech", python=True)
        for clean, row in zip(made.runs["clean"].rows, made.runs["c"].rows, strict=True):
            assert row.values["half"] == clean.values["half"] + 0.5


class TestSplit:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), percent=st.integers(1, 99))
    def test_parts_share_no_row(self, words: TextTokenizer, seed: int, percent: int) -> None:
        text = f'a in 1..10 b in 1..10 template "{{a}} {{b}}" split {percent}%'
        whole = table(text, words, seed=seed)
        train = table(text, words, seed=seed, part="train")
        test = table(text, words, seed=seed, part="test")
        assert len(train) == percent
        assert not set(train.row_ids) & set(test.row_ids)
        assert set(train.row_ids) | set(test.row_ids) == set(whole.row_ids)

    def test_limit_applies_within_a_part_of_a_split(self, words: TextTokenizer) -> None:
        text = FRUIT + "split 30%"
        small = table(text, words, part="test", limit=10)
        large = table(text, words, part="test", limit=40)
        train = table(text, words, part="train", limit=40)
        assert small.row_ids == large.row_ids[:10]
        assert not set(texts(large)) & set(texts(train))

    def test_part_without_split_is_rejected_without_draws(self, words: TextTokenizer) -> None:
        assert len(table(FRUIT, words, part="train", limit=5)) == 5
        assert codes('a in 1..3 template "{a}"', words, part="test") == ["E0509"]


class TestFiles:
    RECORDS = ({"x": "apple", "n": 1}, {"x": "pear", "n": 2}, {"x": "Zoë", "n": 3})

    def write(self, folder: Path, name: str) -> None:
        path = folder / name
        match path.suffix:
            case ".json":
                path.write_text(json.dumps(self.RECORDS), encoding="utf-8")
            case ".jsonl":
                lines = [json.dumps(r, ensure_ascii=False) for r in self.RECORDS]
                path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
            case _:
                sep = "," if path.suffix == ".csv" else "\t"
                lines = [sep.join(["x", "n"]), *(f"{r['x']}{sep}{r['n']}" for r in self.RECORDS)]
                path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
    def test_data_file_format_is_read(
        self, words: TextTokenizer, tmp_path: Path, suffix: str
    ) -> None:
        self.write(tmp_path, f"d.{suffix}")
        made = table(
            f'rows "d.{suffix}" where n > 1 template "{{x}} {{n + 1}}"',
            words,
            path=tmp_path / "f.mech",
        )
        assert sorted(texts(made)) == ["Zoë 4", "pear 3"]
        assert sorted(made.row_ids) == [1, 2]
        assert len(made.data_hash) == 64

    def test_unreadable_parquet_is_rejected(self, words: TextTokenizer, tmp_path: Path) -> None:
        (tmp_path / "d.parquet").write_bytes(b"PAR1")
        made, (error,) = build('rows "d.parquet" template "{x}"', words, path=tmp_path / "f.mech")
        assert made is None
        assert error.code == "E0505"

    def test_parquet_file_is_read(self, words: TextTokenizer, tmp_path: Path) -> None:
        pyarrow: Any = pytest.importorskip("pyarrow")
        parquet: Any = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(list(self.RECORDS)), tmp_path / "d.parquet")
        made = table('rows "d.parquet" template "{x}"', words, path=tmp_path / "f.mech")
        assert len(made) == 3

    def test_csv_values_with_leading_zeros_or_nan_stay_texts(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "d.csv").write_text("y,z,s\n02,1,nan\n41,2,1.5\n")
        made = table('rows "d.csv" template "{y} {z} {s}"', words, path=tmp_path / "f.mech")
        assert sorted(values(made, "y")) == ["02", "41"]
        assert sorted(values(made, "z")) == [1, 2]
        assert sorted(values(made, "s")) == ["1.5", "nan"]

    def test_csv_value_with_quoted_line_break_is_read(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "d.csv").write_text('x\n"apple\npear, ""fig"""\n')
        made = table('rows "d.csv" template "{x}"', words, path=tmp_path / "f.mech")
        assert texts(made) == ['apple\npear, "fig"']

    def test_json_records_inside_an_object_are_read(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        content = {"name": "r", "samples": [{"s": "apple"}, {"s": "pear"}], "tags": ["a"]}
        (tmp_path / "d.json").write_text(json.dumps(content))
        made = table('rows "d.json" template "{name} {s}"', words, path=tmp_path / "f.mech")
        assert sorted(texts(made)) == ["r apple", "r pear"]

    def test_rename_maps_columns_to_values(self, words: TextTokenizer, tmp_path: Path) -> None:
        self.write(tmp_path, "d.json")
        made = table(
            'rows "d.json" rename { word = x } template "{word}"', words, path=tmp_path / "f.mech"
        )
        assert sorted(values(made, "word")) == ["Zoë", "apple", "pear"]

    def test_rename_to_an_existing_column_is_rejected(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "d.json").write_text(json.dumps([{"x": "apple", "y": "pear"}]))

        lines = 'rows "d.json" rename { y = x } template "{y}"'
        assert codes(lines, words, path=tmp_path / "f.mech") == ["E0202"]
        both = table(
            'rows "d.json" rename { x = y, y = x } template "{x} {y}"',
            words,
            path=tmp_path / "f.mech",
        )
        assert texts(both) == ["pear apple"]

    def test_records_are_combined_with_values(self, words: TextTokenizer, tmp_path: Path) -> None:
        self.write(tmp_path, "d.json")
        made = table('rows "d.json" k in 1..2 template "{x} {k}"', words, path=tmp_path / "f.mech")
        assert len(made) == 6
        assert made.conventions["rows"].startswith("6 of 6 combinations")

    def test_list_draws_from_a_column_of_lists(self, words: TextTokenizer, tmp_path: Path) -> None:
        rows = [{"ws": ["apple", "pear", "fig"]}, {"ws": ["plum"]}]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        made = table(
            'rows "d.json" xs = list(w, from: ws, sep: ", ") template "{xs} {ws[1]}"',
            words,
            path=tmp_path / "f.mech",
        )
        assert sorted(texts(made)) == ["apple, pear, fig apple", "plum plum"]

    def test_shots_are_whole_records_without_the_question(
        self, gpt2: TextTokenizer, tmp_path: Path
    ) -> None:
        rows = [{"input": f"i{n}", "output": f"o{n}"} for n in range(5)]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        text = """
        prompts p {
          rows "d.json"
          shots = list("Q: {input} A: {output}", 3, from: pairs, sep: " | ", distinct: true)
          template "{shots} | Q: {input} A:"
          answer " {output}"
        }
        prompts pairs { rows "d.json" template "{input}" }
        """
        made = table(text, gpt2, path=tmp_path / "f.mech", limit=30)
        assert len(made) == 30
        for row in made.runs["clean"].rows:
            shots = row.text.split(" | ")
            own = row.values["input"]
            assert len(set(shots)) == 4
            assert all(s.split()[1][1:] == s.split()[3][1:] for s in shots[:3])
            assert not any(own in s.split() for s in shots[:3])
            assert row.texts["answer"].text == f" o{own[1:]}"
            assert [s.name for s in row.spans].count("input") == 4

    def test_shuffle_permutes_a_column(self, words: TextTokenizer, tmp_path: Path) -> None:
        rows = [{"q": f"q{n}", "a": f"a{n}"} for n in range(20)]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        made = table(
            'rows "d.json" b = shuffle(a) template "{q} {b}"', words, path=tmp_path / "f.mech"
        )
        assert sorted(values(made, "b")) == sorted(values(made, "a"))
        assert values(made, "b") != values(made, "a")

    def test_span_in_a_column_marks_each_occurrence(
        self, words: TextTokenizer, tmp_path: Path
    ) -> None:
        rows = [
            {"prompt": "the apple of Anna is an apple", "subject": "apple", "other": "fig"},
            {"prompt": "pineapple, pear", "subject": "pear", "other": "kiwi"},
        ]
        (tmp_path / "d.json").write_text(json.dumps(rows))
        text = """rows "d.json" template "{prompt}" span subject in prompt
        corrupt c { subject = other }"""
        made = table(text, words, path=tmp_path / "f.mech")
        by_subject = dict(zip(values(made, "subject"), made.runs["clean"].rows, strict=True))
        places = [(s.name, s.start, s.within) for s in by_subject["apple"].spans]
        inside = ("prompt",)
        assert places == [("prompt", 0, ()), ("subject", 4, inside), ("subject", 24, inside)]
        # A corrupted subject replaces the subject within the prompt.
        assert sorted(texts(made, "c")) == ["pineapple, kiwi", "the fig of Anna is an fig"]

    def test_span_of_a_list_marks_each_text(self, words: TextTokenizer, tmp_path: Path) -> None:
        """The list may be empty; a corruption replaces its texts one by one."""
        rows = [
            {"prompt": "apple pear fig", "used": ["fig", "apple"], "new": ["kiwi", "plum"]},
            {"prompt": "pear", "used": [], "new": []},
            {"prompt": "apple pear", "used": "pear", "new": "fig"},
        ]
        path = tmp_path / "d.json"
        text = 'rows "d.json" template "{prompt}" span used in prompt'
        path.write_text(json.dumps(rows))
        made = table(text, words, path=tmp_path / "f.mech")
        spans = {
            row.prompt.text: [s.start for s in row.prompt.spans if s.name == "used"]
            for row in made.sources
        }
        text += " corrupt c { used = new }"
        assert spans == {"apple pear fig": [0, 11], "pear": [], "apple pear": [6]}
        changed = table(text, words, path=tmp_path / "f.mech")
        assert sorted(texts(changed, "c")) == ["apple fig", "plum pear kiwi"]
        for wrong in (
            {"used": ["plum"], "new": ["fig"]},
            {"used": ["apple", 3], "new": ["fig", 4]},
            {"used": ["apple"], "new": []},
        ):
            path.write_text(json.dumps([{"prompt": "apple pear", **wrong}]))
            assert codes(text, words, path=tmp_path / "f.mech") == ["E0521"], wrong
        overlapping = {"used": ["apple pear", "pear"], "new": ["fig", "kiwi"]}
        path.write_text(json.dumps([{"prompt": "apple pear", **overlapping}]))
        assert codes(text, words, path=tmp_path / "f.mech") == ["E0503"]

    def test_literal_span_marks_the_last_occurrence(self, words: TextTokenizer) -> None:
        made = table('template "thing: anything, thing." span slot = "thing"', words)
        (span,) = made.runs["clean"].rows[0].spans
        assert (span.name, span.start) == ("slot", 17)


class TestHugeThings:
    def test_huge_products_are_sampled(self, words: TextTokenizer) -> None:
        text = """a in 0..1000000 b in 0..1000000 x in 1..1000000000
        xs = list(x, 3, sep: " ", distinct: true) where a < b template "{a} {b} {xs}"
        corrupt c { a = other(a) }"""
        made = table(text, words, limit=50)
        assert len(made) == 50
        assert all(row.values["a"] < row.values["b"] for row in made.runs["clean"].rows)

    def test_too_many_combinations_are_rejected(self, words: TextTokenizer) -> None:
        assert codes('a in 0..1000000 b in 0..1000000 template "{a} {b}"', words) == ["E0506"]
        assert codes('a in 0..300000 template "{a}"', words) == ["E0506"]
        assert codes('a in 0..9 template "{a}"', words, limit=10**9) == ["E0506"]

    def test_unsatisfiable_condition_is_rejected_after_the_limit(
        self, words: TextTokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mechdsl.base.limits.COMBINATIONS", 500)
        text = 'a in 0..1000000 b in 0..1000000 where a = b template "{a} {b}"'
        assert codes(text, words, limit=10) == ["E0506"]

    def test_huge_list_is_rejected(self, words: TextTokenizer) -> None:
        text = 'n in [1000000000] y in 1..5 ys = list(y, n) template "{ys}"'
        assert codes(text, words) == ["E0506"]


class TestChains:
    def test_circular_definitions_in_templates_are_rejected(self, words: TextTokenizer) -> None:
        assert codes('template "{a = b} {b = a}"', words) == ["E0502"]
        text = 'n in 1..2 template "{n}" corrupt c { template "{a = b} {b = a}" }'
        assert codes(text, words) == ["E0502"]

    def test_too_long_chain_of_definitions_is_rejected(self, words: TextTokenizer) -> None:
        def chain(length: int) -> str:
            lines = [f"x{n} = x{n - 1} + 1" for n in range(1, length)]
            return "\n".join(["x0 in 1..2", *lines, f'template "{{x{length - 1}}}"'])

        assert sorted(texts(table(chain(40), words))) == ["40", "41"]
        assert codes(chain(1900), words) == ["E0506"]


class TestRefusedRows:
    """Errors found only while rows are built; each is reported once, with an example row."""

    def test_row_error_is_reported_once_with_an_example(self, words: TextTokenizer) -> None:
        text = 'a in 0..9 b = 1 / a c = xs[3] xs = list(y, 2) y in [1, 2] template "{b} {c}"'
        made, diagnostics = build(text, words)
        assert made is None
        assert sorted(d.message for d in diagnostics) == [
            "`1 / a` can't be evaluated: it divides by zero",
            "`xs[3]` can't be evaluated: `xs` has 2 items",
        ]
        assert all(d.label_text.startswith("in the row with a = ") for d in diagnostics)

    @pytest.mark.parametrize(
        ("lines", "code"),
        [
            ('a in 0..2 template "{1 / a}"', "E0503"),
            ('a in 0..2 template "{if a then 1 else 2}"', "E0503"),
            ('a in 0..2 xs = list(b, a - 1) b in 1..3 template "{xs}"', "E0503"),
            ('a in 0..2 xs = list(b, a / 2) b in 1..3 template "{xs}"', "E0503"),
            ('a in 0..2 b = a[1] template "{b}"', "E0503"),
            ('a in 0..2 b, c = a template "{b}"', "E0503"),
            ('a in 0..2 where a < "x" template "{a}"', "E0503"),
            ('a in 1..2 b = other(a, 1, 2) template "{b}"', "E0512"),
            ('a in [1] b = other(a) template "{b}"', "E0512"),
            ('b in 1..3 xs = list(b, 4, distinct: true) template "{xs}"', "E0512"),
            ('a in 1..3 b = other(a + 1) template "{b}"', "E0513"),
            ('b in 1..3 xs = list(b, 4, sap: " ") template "{xs}"', "E0515"),
            ('b in 1..3 xs = list(b, 4, 5) template "{xs}"', "E0515"),
            ('b in 1..3 xs = list(b, 4, distinct: 3) template "{xs}"', "E0515"),
            ('b in 1..3 template "{choice(b)}"', "E0515"),
            ('b in 1..c c in 1..2 template "{b}"', "E0501"),
            ('b in 3..1 template "{b}"', "E0509"),
            ('b in 1..3 step 0 template "{b}"', "E0503"),
            ('b in words(3) template "{b}"', "E0515"),
            ('b in 1..3 xs = list(b, 2) template "{xs} {zz}" answer " {b2}"', "E0501"),
            ('b in 1..3 xs = list(b, 2) template "{xs}" corrupt c { zz = 1 }', "E0501"),
            ('b in 1..3 b2 = 1 template "{b} {b2 = b}"', "E0202"),
            ('b in 1..3 template "{b} {b + }"', "E0113"),
            ('b in 1..3 template "{b}" @guassian(std: 1) to embed at b token }', "E0203"),
            ('b in 1..3 template "{b}" @gaussian(std: 0) to embed at b token }', "E0515"),
            ('b in 1..3 template "{b}" @gaussian(std: 1) to z at b token }', "E0108"),
            ('b in 1..3 template "{b}" corrupt c { replace zz token with "x" }', "E0308"),
        ],
    )  # fmt: skip
    def test_invalid_rows_have_their_error_code(
        self, words: TextTokenizer, lines: str, code: str
    ) -> None:
        made, diagnostics = build(lines.replace("@", "corrupt c { add "), words)
        assert made is None
        assert {d.code for d in diagnostics if d.severity == "error"} == {code}
        assert all(d.span is not None for d in diagnostics)

    def test_rows_that_each_lack_a_corruption_are_rejected(self, words: TextTokenizer) -> None:
        text = 'a in 1..2 template "{a}" corrupt one { a = 1 } corrupt two { a = 2 }'
        made, diagnostics = build(text, words)
        assert made is None
        assert [d.code for d in diagnostics] == ["E0509"]
        assert diagnostics[0].message.endswith("`one` or `two` leaves each of them unchanged")

    def test_corruption_without_effect_in_any_row_is_rejected(self, words: TextTokenizer) -> None:
        text = 'a in 1..2 template "{a}" corrupt one { a = a } corrupt two { a = 2 }'
        made, diagnostics = build(text, words)
        assert made is None
        assert [(d.code, d.message.split("`")[1]) for d in diagnostics] == [("E0510", "one")]


class TestConventions:
    def test_conventions_report_sampled_rows_and_part(self, words: TextTokenizer) -> None:
        made = table(FRUIT, words, limit=5, seed=3)
        assert made.conventions["rows"] == "5 drawn from 8 combinations, seed 3"
        made = table('a in 1..4 template "{a}" split 50%', words, part="train")
        rows = "2 of 4 combinations, part `train` of a 50% split, seed 0"
        assert made.conventions["rows"] == rows

    def test_conventions_report_bos_and_answer_tokens(self, words: TextTokenizer) -> None:
        made = table(FRUIT, words, limit=5)
        assert made.conventions["bos"] == "`<s>` before the text (by the tokenizer)"
        assert made.conventions["answer"].endswith("one token, read after the prompt")
