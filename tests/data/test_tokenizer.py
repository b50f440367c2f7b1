from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mechdsl.prompts.runs import RunRow, TokenMap
from mechdsl.prompts.tokens.tokenizer import EncodedText, TextTokenizer

from . import support

NAMES = ("words", "gpt2", "qwen", "llama", "t5", "bert")


def as_row(tokenizer: TextTokenizer, text: str) -> RunRow:
    e = tokenizer.encode(text)
    return RunRow(text, e.ids, e.offsets, e.special, (), {}, {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "Mary gave John a bag",
        "  Zoë,José: naïve café",
        "plum 😀 fig 👩‍👩‍👧 kiwi",
        "مرحبا بالعالم apple",
        "שלום, pear.",
        "one\n\ntwo\tthree ",
        "12 345: 6",
    ],
)
def test_offsets_count_characters_and_cover_the_text(
    every: dict[str, TextTokenizer], name: str, text: str
) -> None:
    encoded = every[name].encode(text)
    covered = {i for a, b in encoded.offsets for i in range(a, b)}
    assert all(0 <= a <= b <= len(text) for a, b in encoded.offsets)
    assert {i for i, char in enumerate(text) if not char.isspace()} <= covered
    starts = [a for (a, _), s in zip(encoded.offsets, encoded.special, strict=True) if not s]
    assert starts == sorted(starts)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.text("abcXYZ019éßñ😀שלםж,.:'-", min_size=1, max_size=6), min_size=1, max_size=6
    ),
    sep=st.sampled_from([" ", "  ", "\n", ", "]),
    choice=st.integers(0, 5),
)
def test_span_tokens_cover_the_span_and_no_other_word(
    every: dict[str, TextTokenizer], name: str, words: list[str], sep: str, choice: int
) -> None:
    n = choice % len(words)
    text = sep.join(words)
    start = len(sep.join(words[:n])) + (len(sep) if n else 0)
    end = start + len(words[n])
    tokens = TokenMap(as_row(every[name], text))
    hit = tokens.tokens(start, end)
    covered = {i for t in hit for i in range(*tokens.places[t])}
    assert set(range(start, end)) <= covered
    # Words are separated by white space, so selected tokens must not extend past it.
    low = max((i + 1 for i in range(start) if text[i].isspace()), default=0)
    high = min((i for i in range(end, len(text)) if text[i].isspace()), default=len(text))
    bridging = any(len(text[slice(*tokens.places[t])].split()) > 1 for t in hit)  # a fused unknown
    assert bridging or covered <= set(range(low, high))


def test_leading_white_space_is_outside_the_token_span(
    gpt2: TextTokenizer, llama: TextTokenizer
) -> None:
    for tokenizer in (gpt2, llama):
        row = as_row(tokenizer, "When Mary went")
        tokens = TokenMap(row)
        (mary,) = tokens.tokens(5, 9)
        assert tokens.token_text(mary) == "Mary"
        assert row.offsets[mary] == (4, 9)
        assert tokens.tokens(4, 5) == ()


def test_line_break_is_a_separate_token(gpt2: TextTokenizer) -> None:
    row = as_row(gpt2, "apple\npear")
    tokens = TokenMap(row)
    (at,) = tokens.tokens(5, 6)
    assert row.offsets[at] == (5, 6)


def test_emoji_span_has_all_its_tokens(gpt2: TextTokenizer) -> None:
    tokens = TokenMap(as_row(gpt2, "fig 😀 kiwi"))
    hit = tokens.tokens(4, 5)
    assert len(hit) >= 3
    assert {tokens.token_text(t) for t in hit} == {"😀"}


def test_sentencepiece_prefix_token_covers_no_character(t5: TextTokenizer) -> None:
    row = as_row(t5, "3 fig")
    assert [t5.token_text(i) for i in row.ids[:2]] == ["▁", "3"]
    assert row.offsets[:2] == ((0, 0), (0, 1))
    assert TokenMap(row).tokens(0, 1) == (1,)


@pytest.mark.parametrize("name", ["t5", "bert", "words"])
def test_unknown_word_is_encoded_as_the_unknown_token(
    every: dict[str, TextTokenizer], name: str
) -> None:
    assert every[name].unknown_id in every[name].encode("fig 漢字").ids


def test_encoding_does_not_depend_on_trim_offsets() -> None:
    text = "apple\n\npear fig "
    a = support.wrapped(support.byte_level(trim=True)).encode(text)
    b = support.wrapped(support.byte_level(trim=False)).encode(text)
    assert a == b


def test_wrapping_does_not_modify_the_tokenizer() -> None:
    backend = support.byte_level(trim=True)
    before = backend.to_str()
    support.wrapped(backend, bos_token="<|endoftext|>", bos=True)
    assert backend.to_str() == before


class TestBos:
    def test_bos_default_follows_the_tokenizer(
        self, words: TextTokenizer, gpt2: TextTokenizer
    ) -> None:
        assert words.encode("apple").special == (True, False)
        assert gpt2.encode("Mary").special == (False,)
        assert words.bos_convention() == "`<s>` before the text (by the tokenizer)"
        assert gpt2.bos_convention() == "none before the text"

    def test_bos_true_adds_the_token_once(self) -> None:
        gpt2 = support.wrapped(support.byte_level(), bos_token="<|endoftext|>", bos=True)
        encoded = gpt2.encode("Mary")
        assert encoded.ids[0] == gpt2.role_ids["bos"]
        assert encoded.special == (True, False)
        assert encoded.offsets[0] == (0, 0)
        again = gpt2.encode("<|endoftext|>Mary")
        assert again.ids == encoded.ids
        assert gpt2.bos_convention() == "`<|endoftext|>` before the text (bos: true)"

    def test_bos_true_adds_no_second_token(self) -> None:
        llama = support.wrapped(support.metaspace(), bos_token="<s>", bos=True)
        assert llama.encode("apple").ids.count(llama.role_ids["bos"]) == 1

    def test_bos_false_removes_the_token(self) -> None:
        llama = support.wrapped(support.metaspace(), bos_token="<s>", bos=False)
        assert not any(llama.encode("apple").special)
        assert llama.bos_convention() == "none before the text (bos: false)"

    def test_bos_true_without_bos_token_is_rejected(self) -> None:
        made, (error,) = TextTokenizer.from_backend(support.byte_level(), bos=True)
        assert made is None
        assert error.code == "E0522"


class TestContinuation:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "qwen"])
    def test_continuation_keeps_the_leading_space(
        self, every: dict[str, TextTokenizer], name: str
    ) -> None:
        tokenizer = every[name]
        ids, kept = tokenizer.continuation("When Mary and John went to the shop,", " Mary")
        assert kept
        assert "".join(map(tokenizer.token_text, ids)).strip() == "Mary"

    def test_continuation_excludes_closing_special_tokens(self, bert: TextTokenizer) -> None:
        ids, kept = bert.continuation("the capital of France is", " Paris")
        assert kept
        assert [bert.token_text(i) for i in ids] == ["paris"]

    def test_continuation_splits_digits(self, qwen: TextTokenizer) -> None:
        ids, _ = qwen.continuation("Count 1:", " 37")
        assert [qwen.token_text(i) for i in ids] == [" ", "3", "7"]

    def test_continuation_after_a_trailing_space_is_encoded_separately(
        self, gpt2: TextTokenizer
    ) -> None:
        ids, kept = gpt2.continuation("the capital of France is ", "Paris")
        assert not kept
        assert ids == gpt2.encode("Paris", add_special=False).ids

    def test_continuation_of_an_empty_prompt_is_encoded(self, words: TextTokenizer) -> None:
        ids, kept = words.continuation("", "apple")
        assert kept
        assert [words.token_text(i) for i in ids] == ["apple"]


def test_plain_words_exclude_special_tokens_and_numbers(
    words: TextTokenizer, gpt2: TextTokenizer, llama: TextTokenizer
) -> None:
    assert {"apple", "Part", "kiwi"} <= set(words.plain_words())
    assert not {"<s>", "1", ":"} & set(words.plain_words())
    assert {"Mary", "apple"} <= set(gpt2.plain_words())
    assert all(w.isalpha() for w in gpt2.plain_words())
    assert {"Mary", "apple"} <= set(llama.plain_words())


class TestFolder:
    def test_folder_saved_by_transformers_is_read(
        self, tmp_path: Path, words: TextTokenizer
    ) -> None:
        from zoo.counting.tokenizer import save_tokenizer

        save_tokenizer(tmp_path)
        made, diagnostics = TextTokenizer.from_folder(tmp_path)
        assert made is not None
        assert not diagnostics
        assert made.encode("apple pear") == words.encode("apple pear")
        assert made.roles == {"bos": "<s>"}
        assert made.hash == sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        assert made.vocab_size == words.vocab_size

    def test_bos_token_object_in_the_config_is_read(self, tmp_path: Path) -> None:
        support.byte_level().save(str(tmp_path / "tokenizer.json"))
        token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
        made, _ = TextTokenizer.from_folder(tmp_path, True)
        assert made is not None
        assert made.encode("Mary").special[0]

    def test_folder_without_tokenizer_config_is_read(self, tmp_path: Path) -> None:
        support.byte_level().save(str(tmp_path / "tokenizer.json"))
        made, diagnostics = TextTokenizer.from_folder(tmp_path)
        assert made is not None
        assert not diagnostics

    def test_folder_without_tokenizer_is_rejected(self, tmp_path: Path) -> None:
        made, (error,) = TextTokenizer.from_folder(tmp_path)
        assert made is None
        assert error.code == "E0508"
        assert "save_pretrained" in error.help_text

    def test_broken_tokenizer_file_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        made, (error,) = TextTokenizer.from_folder(tmp_path)
        assert made is None
        assert error.code == "E0508"

    @pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
    @pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
    def test_folder_tokenizer_encodes_as_transformers(
        self, tmp_path: Path, kind: str, flags: dict[str, bool]
    ) -> None:
        transformers = pytest.importorskip("transformers")
        backend = getattr(support, kind)()
        backend.save(str(tmp_path / "tokenizer.json"))
        bos = {"byte_level": "<|endoftext|>", "metaspace": "<s>", "unigram": "</s>"}[kind]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, **flags}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        made, _ = TextTokenizer.from_folder(tmp_path)
        assert made is not None
        for text in ("Mary gave John a bag", "12 Zoë, 😀\n\nfig ", "Count 1:"):
            assert list(made.encode(text).ids) == theirs(text)["input_ids"]


_WORDS = {"alpha": 0, "beta": 1, "▁beta": 2}
WITHOUT_UNKNOWN: dict[str, models.Model] = {
    "words": models.WordLevel(_WORDS, unk_token="<unk>"),
    "pieces": models.WordPiece(_WORDS, unk_token="[UNK]"),
    "unigram": models.Unigram([(word, -1.0) for word in _WORDS], unk_id=None),
}


@pytest.mark.parametrize("kind", WITHOUT_UNKNOWN)
def test_missing_unknown_token_gets_a_separate_id(kind: str) -> None:
    backend = Tokenizer(WITHOUT_UNKNOWN[kind])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(Exception, match=r"(?i)unk"):
        backend.encode("gamma")
    made, _ = TextTokenizer.from_backend(backend)
    assert made is not None
    assert made.made_unknown
    assert made.vocab_size == made.own_size == len(_WORDS)
    encoded = made.encode("alpha gamma beta")
    assert [encoded.ids[0], encoded.ids[-1]] == [0, 1]
    assert made.unknown_id is not None
    assert made.unknown_id >= made.vocab_size
    assert set(encoded.ids[1:-1]) == {made.unknown_id}
    assert made.encode("alpha beta").ids == (0, 1)
    assert made.bos_convention() == "none before the text"
    assert made.plain_words() == ["alpha", "beta"]


def test_continuation_with_unknown_joint_word_is_encoded_separately() -> None:
    backend = Tokenizer(WITHOUT_UNKNOWN["words"])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made, _ = TextTokenizer.from_backend(backend)
    assert made is not None
    # `alphabeta`, the concatenation, isn't in the vocabulary.
    assert made.continuations([("alpha", "beta"), ("alpha", " beta")]) == [
        ((1,), False),
        ((1,), True),
    ]


def test_unknown_token_among_added_tokens_is_used() -> None:
    backend = Tokenizer(WITHOUT_UNKNOWN["words"])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>"])
    made, _ = TextTokenizer.from_backend(backend)
    assert made is not None
    assert not made.made_unknown
    assert made.encode("alpha gamma").ids == (0, backend.token_to_id("<unk>"))


@pytest.mark.parametrize(
    ("name", "opening"),
    [("words", "<s>"), ("gpt2", None), ("llama", "<s>"), ("bert", "[CLS]"), ("t5", None)],
)
def test_opening_has_the_tokens_before_each_text(
    every: dict[str, TextTokenizer], name: str, opening: str | None
) -> None:
    found = [every[name].token_text(token) for token in every[name].opening]
    assert found == ([] if opening is None else [opening])
    assert every[name].opening == every[name].encode("apple").ids[: len(found)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("words", [{}, {"a": 0, 'vocab": {': 1, "é": 3}], ids=["empty", "words"])
def test_tokenizer_file_without_unknown_token_gets_one(
    tmp_path: Path, words: dict[str, int], indent: int | None
) -> None:
    """The vocabulary size is found in the file whatever its keys contain."""
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    whole = json.loads(made.to_str())
    whole["added_tokens"] = []
    text = json.dumps(whole, ensure_ascii=False, indent=indent)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    found, problems = TextTokenizer.from_folder(tmp_path)
    assert found is not None, problems
    assert found.made_unknown
    assert found.unknown_id == max(words.values(), default=-1) + 1
    assert found.vocab_size == len(words)


def test_encodings_of_many_short_texts_stay_cached_until_they_are_long(
    every: dict[str, TextTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = every["words"].padded_to(1) or every["words"].reading(written=True)
    raw: list[int] = []
    encode = tokenizer._raw

    def count(texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        raw.append(len(texts))
        return encode(texts, add_special)

    monkeypatch.setattr(tokenizer, "_raw", count)
    monkeypatch.setattr("mechdsl.prompts.tokens.tokenizer._BATCH", 3)
    monkeypatch.setattr("mechdsl.prompts.tokens.tokenizer._CACHED_TEXT", 50)
    short = [f"apple {n}" for n in range(5)]  # 35 characters
    for _ in range(2):
        assert tokenizer.encode_all(short) == tokenizer.encode_all(short[:2]) + [
            tokenizer.encode(text) for text in short[2:]
        ]
    assert sum(raw) == len(short)
    tokenizer.encode("apple pear plum fig")
    tokenizer.encode(short[0])
    assert sum(raw) == len(short) + 2


def test_tokenizers_of_one_file_share_encodings_and_others_do_not() -> None:
    """Neither with another vocabulary nor with special tokens, for the same texts."""

    def tokenizer(words: dict[str, int], bos: bool | None = None) -> TextTokenizer:
        backend = Tokenizer(models.WordLevel(words, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        made, problems = TextTokenizer.from_backend(backend, bos_token="<s>", bos=bos)
        assert made is not None, problems
        return made

    words = {"<s>": 0, "?": 1, "apple": 2, "pear": 3}
    other = {"<s>": 0, "?": 1, "apple": 3, "pear": 2}
    expected = {
        (True, True): (0, 2, 3),
        (True, False): (2, 3),
        (False, True): (0, 3, 2),
        (False, False): (3, 2),
    }
    for _ in range(2):
        for (own, special), ids in expected.items():
            made = tokenizer(words if own else other)
            assert made.encode("apple pear", add_special=special).ids == ids
        assert tokenizer(words, bos=False).encode("apple pear").ids == (2, 3)
    texts = ("apple pear apple", "pear apple")
    first, second = (tokenizer(words)._raw(texts) for _ in range(2))
    assert [each.ids for each in first] == [(2, 3, 2), (3, 2)]
    assert all(one is two for one, two in zip(first, second, strict=True))
