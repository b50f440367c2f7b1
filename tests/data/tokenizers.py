"""Small trained tokenizers of every type in use, each with a reference for its token offsets.

The reference uses the spelling of tokens only: it converts a text to the bytes that the tokenizer
sees, each with the index of its character, and aligns the bytes of the tokens with them. It uses
neither offsets of the library nor positions of mechdsl.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mechdsl.prompts.tokens.tokenizer import TextTokenizer

from .support import wrapped

# The words that tests name are frequent enough to be single tokens wherever a tokenizer allows it.
_WORDS = """
 Mary gave John a bag and went to the shop The capital of France is Paris said Answer Question name
 Total Count x y
"""
_TEXTS = [
    "Zoë saw José in the naïve café über Köln",
    "Zoe\u0308 saw Jose\u0301 in the nai\u0308ve cafe\u0301",
    "I don't know, x,y and (x) or f(x)=y! isn't it? [x] {y} \"Mary\" Mary's",
    "مرحبا بالعالم، كيف حالك؟ مَرْحَبًا",
    "שלום עולם, מה שלומך?",
    "東京は日本の首都です。北京是中国的首都 한국 हिन्दी",
    "  two  spaces\tand tabs\n\nand lines\n",
    "😀 👍🏽 👩‍👩‍👧 ❤️ 🇩🇪 😀😁",
    "12 345 1984 2024 3.14 10,000 0 1 2 3 4 5 6 7 8 9",
    "ﬁne ½ … ß İstanbul ㍿ \u00a0_ # % & / ; : - ’ “ ” € $ @ * + < > ~ | ^ ` \\ Ġ ▁",
]
CHARACTERS = sorted({c for text in [*_TEXTS, _WORDS] for c in text if not c.isspace()})

_SPELLED = [f"{c} {c}{c}" for c in CHARACTERS]
CORPUS = [_WORDS.replace("\n", "")] * 30 + _TEXTS * 12 + _SPELLED

# The patterns of the published tokenizers.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

Reading = list[tuple[int, int | None]]
"""The bytes that a tokenizer sees, each with its character's index (None: inserted)."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A type of tokenizer, with its training and its reference."""

    name: str
    train: Callable[[], Tokenizer]
    read: Callable[[str], Reading]
    spell: Callable[[str], bytes]
    """Returns the bytes of a token."""
    roles: dict[str, str] = field(default_factory=dict[str, str])
    opening: tuple[str, ...] = ()
    """Special tokens that the tokenizer prepends."""
    closing: tuple[str, ...] = ()
    joins: bool = False
    """Whether letters and their combining marks are composed before tokenization."""

    def __str__(self) -> str:
        return self.name

    def backend(self) -> Tokenizer:
        """A separate copy of the tokenizer."""
        return Tokenizer.from_str(_trained(self))

    def wrapped(self, bos: bool | None = None) -> TextTokenizer:
        return _wrapped(self, bos)

    def tokens(self, text: str) -> list[tuple[int, int]]:
        """Character range of each token without white space at the ends (empty if none)."""
        return [trimmed(text, *at) for at in _covered(self, text)]

    def overlapping(self, text: str, start: int, end: int) -> tuple[int, ...]:
        """The tokens (special ones not counted) that cover any of some characters.

        White space at the ends doesn't count. A range of white space selects tokens that cover
        only white space.
        """
        low, high = self.widened(text, *trimmed(text, start, end))
        tokens = self.tokens(text)
        if low < high:
            return tuple(i for i, (a, b) in enumerate(tokens) if a < b and a < high and b > low)
        return tuple(
            i
            for i, (a, b) in enumerate(_covered(self, text))
            if tokens[i][0] == tokens[i][1] and a < end and b > start
        )

    def beside(self, text: str, start: int, end: int, tokens: Iterable[int]) -> list[str]:
        """Texts of the tokens that extend beyond a range of characters."""
        low, high = self.widened(text, *trimmed(text, start, end))
        found = [self.tokens(text)[i] for i in tokens]
        return [text[a:b] for a, b in found if low < high and a < b and (a < low or b > high)]

    def widened(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Extend a range to whole letters with their marks, if the tokenizer composes them."""
        if not self.joins or start == end:
            return start, end
        while start > 0 and is_mark(text[start]):
            start -= 1
        while end < len(text) and is_mark(text[end]):
            end += 1
        return start, end


@cache
def _trained(kind: Kind) -> str:
    return kind.train().to_str()


@cache
def _wrapped(kind: Kind, bos: bool | None) -> TextTokenizer:
    return wrapped(kind.backend(), bos=bos, **{f"{r}_token": t for r, t in kind.roles.items()})


@cache
def _covered(kind: Kind, text: str) -> tuple[tuple[int, int], ...]:
    return tuple(covered(kind, text, spelling(kind, text)))


@cache
def _bare(kind: Kind) -> Tokenizer:
    return kind.backend()


def spelling(kind: Kind, text: str) -> list[str]:
    """The tokens of a text as spelled in the vocabulary, without special tokens."""
    return _bare(kind).encode(text, add_special_tokens=False).tokens


def covered(kind: Kind, text: str, tokens: Iterable[str]) -> list[tuple[int, int]]:
    """Character range of each token, including white space."""
    reading = kind.read(text)
    at = 0
    found: list[tuple[int, int]] = []
    for token in tokens:
        spelt = kind.spell(token)
        part = reading[at : at + len(spelt)]
        assert bytes(b for b, _ in part) == spelt, (token, text)
        at += len(spelt)
        places = [place for _, place in part if place is not None]
        low, high = (min(places), max(places) + 1) if places else (0, 0)
        found.append(kind.widened(text, low, high))
    assert at == len(reading), text
    return found


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    inner = [i for i in range(start, end) if not text[i].isspace()]
    return (inner[0], inner[-1] + 1) if inner else (start, start)


def is_mark(char: str) -> bool:
    return unicodedata.category(char).startswith("M")


# --- how texts are read, and tokens spelt ---------------------------------------------------------


def _bytes(text: str) -> Reading:
    return [(b, i) for i, char in enumerate(text) for b in char.encode()]


def _space_first(text: str) -> Reading:
    return _bytes(text) if text.startswith(" ") else [(0x20, None), *_bytes(text)]


def _pieces(text: str) -> Reading:
    """Treat `▁` in the text as a space."""
    return _bytes(text.replace("▁", " "))


def _space_and_pieces(text: str) -> Reading:
    return [(0x20, None), *_pieces(text)]


def _pieces_space_first(text: str) -> Reading:
    return _pieces(text) if text[:1] in (" ", "▁") else _space_and_pieces(text)


def _normalised(form: str) -> Callable[[str], Reading]:
    """Compose letters with their marks; all bytes have the letter's index."""

    def read(text: str) -> Reading:
        starts = [i for i in range(len(text)) if i == 0 or not is_mark(text[i])]
        ends = [*starts[1:], len(text)]
        return [
            (b, a)
            for a, e in zip(starts, ends, strict=True)
            for b in unicodedata.normalize(form, text[a:e]).encode()  # type: ignore[arg-type]
        ]

    return read


def _words_with_spaces(text: str) -> Reading:
    """Drop white space and insert a space before each word."""
    out: Reading = []
    space = True
    for b, i in _normalised("NFKC")(text):
        char = text[i or 0]
        if char.isspace():
            space = True
            continue
        if space:
            out.append((0x20, None))
        space = False
        out.append((b, i))
    return out


def _plain_letters(text: str) -> Reading:
    """Lowercase letters without accents, white space and control characters."""
    return [
        (b, i)
        for i, char in enumerate(text)
        if not char.isspace() and not unicodedata.category(char).startswith("C")
        for part in unicodedata.normalize("NFD", char)
        if unicodedata.category(part) != "Mn"
        for b in part.lower().encode()
    ]


def _byte_table() -> dict[str, int]:
    """Character → byte of byte-level vocabularies."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_LETTERS = _byte_table()


def _from_letters(token: str) -> bytes:
    return bytes(_LETTERS[char] for char in token)


def _from_pieces(token: str) -> bytes:
    """`▁` for a space, `<0x0A>` for a byte."""
    if token.startswith("<0x") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _from_parts(token: str) -> bytes:
    return token.removeprefix("##").encode()


# --- byte-level BPE -------------------------------------------------------------------------------


def _trained_bpe(tokenizer: Tokenizer, special: Sequence[str], *, size: int = 700) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level(*, trim: bool = False, prefix: bool = False) -> Tokenizer:
    """As GPT-2; `trim` removes white space from offsets, `prefix` prepends a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _trained_bpe(tokenizer, ["<|endoftext|>"])


def split_first(pattern: str, special: Sequence[str] = ("<|endoftext|>",)) -> Tokenizer:
    """Byte-level BPE that splits the text by a custom pattern first."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _trained_bpe(tokenizer, special)


def qwen() -> Tokenizer:
    """Each digit alone; letters and their marks are composed."""
    tokenizer = split_first(QWEN)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def llama_3() -> Tokenizer:
    """Digits in groups of up to three, `<|begin_of_text|>` in front."""
    tokenizer = split_first(LLAMA_3, ["<|begin_of_text|>", "<|end_of_text|>"])
    begin = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    return tokenizer


def roberta() -> Tokenizer:
    """GPT-2's tokens between `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _trained_bpe(tokenizer, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    ends = [(token, tokenizer.token_to_id(token) or 0) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(
        *ends, trim_offsets=True, add_prefix_space=False
    )
    return tokenizer


# --- SentencePiece-style --------------------------------------------------------------------------


def _byte_fallback(special: Sequence[str], lines: Iterable[str], size: int) -> Tokenizer:
    """BPE on characters with byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", *special], show_progress=False
    )
    lines = list(lines)
    # Emoji and most scripts are excluded, so that they are encoded as bytes. The trainer's own
    # limit would break ties between equally frequent characters arbitrarily.
    counts = Counter(character for line in lines for character in line)
    rare = sorted(counts, key=lambda c: (-counts[c], c))[70:]
    pieces = [piece for line in lines for piece in re.split(f"[{re.escape(''.join(rare))}]+", line)]
    tokenizer.train_from_iterator([piece for piece in pieces if piece], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for b in range(256):
        vocabulary[f"<0x{b:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def llama_2() -> Tokenizer:
    """`▁` for spaces, one more in front of each text, `<s>` before that."""
    words = [word for line in CORPUS for word in line.replace(" ", " ▁").split(" ")]
    tokenizer = _byte_fallback(["<s>", "</s>"], words, 900)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    _opened(tokenizer, "<s>")
    return tokenizer


def gemma() -> Tokenizer:
    """`▁` for spaces, none put in front; tokens reach over spaces."""
    lines = [line.replace(" ", "▁") for line in CORPUS]
    tokenizer = _byte_fallback(["<bos>", "<eos>"], lines, 900)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    _opened(tokenizer, "<bos>")
    return tokenizer


def _opened(tokenizer: Tokenizer, token: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _unigram(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", *special],
        unk_token="<unk>",
        initial_alphabet=[*CHARACTERS, "▁", "\n", "\t", "\u00a0"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def t5() -> Tokenizer:
    """Every word by itself with `▁` in front, `</s>` at the end; letters are normalised."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    _unigram(tokenizer, ["</s>"])
    _closed(tokenizer, "</s>")
    return tokenizer


def metaspace(scheme: str, closing: Sequence[str] = ()) -> Tokenizer:
    """White space kept, `▁` in front of each text, only of the first, or of none."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    _unigram(tokenizer, ["</s>", "<sep>", "<cls>"])
    if closing:
        _closed(tokenizer, *closing)
    return tokenizer


def _closed(tokenizer: Tokenizer, *tokens: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A " + " ".join(tokens),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )


# --- WordPiece ------------------------------------------------------------------------------------


def bert() -> Tokenizer:
    """Small letters without accents, `[CLS]` in front and `[SEP]` at the end."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=900,
        special_tokens=["[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer


# --- all of them ----------------------------------------------------------------------------------

_GPT_2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}

KINDS = (
    Kind("gpt2", byte_level, _bytes, _from_letters, _GPT_2),
    Kind("gpt2-trimmed", lambda: byte_level(trim=True), _bytes, _from_letters, _GPT_2),
    Kind(
        "gpt2-prefixed",
        lambda: byte_level(trim=True, prefix=True),
        _space_first,
        _from_letters,
        _GPT_2,
    ),
    Kind("qwen", qwen, _normalised("NFC"), _from_letters, {"eos": "<|endoftext|>"}, joins=True),
    Kind(
        "llama3",
        llama_3,
        _bytes,
        _from_letters,
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        ("<|begin_of_text|>",),
    ),
    Kind(
        "roberta",
        roberta,
        _bytes,
        _from_letters,
        {"bos": "<s>", "cls": "<s>", "sep": "</s>", "eos": "</s>"},
        ("<s>",),
        ("</s>",),
    ),
    Kind(
        "llama2", llama_2, _space_and_pieces, _from_pieces, {"bos": "<s>", "eos": "</s>"}, ("<s>",)
    ),
    Kind("gemma", gemma, _pieces, _from_pieces, {"bos": "<bos>", "eos": "<eos>"}, ("<bos>",)),
    Kind("t5", t5, _words_with_spaces, _from_pieces, {"eos": "</s>"}, (), ("</s>",), joins=True),
    Kind(
        "xlnet",
        lambda: metaspace("always", ["<sep>", "<cls>"]),
        _pieces_space_first,
        _from_pieces,
        {"sep": "<sep>", "cls": "<cls>"},
        (),
        ("<sep>", "<cls>"),
    ),
    Kind("metaspace-first", lambda: metaspace("first"), _pieces_space_first, _from_pieces),
    Kind("metaspace-never", lambda: metaspace("never"), _pieces, _from_pieces),
    Kind(
        "bert",
        bert,
        _plain_letters,
        _from_parts,
        {"cls": "[CLS]", "sep": "[SEP]"},
        ("[CLS]",),
        ("[SEP]",),
        joins=True,
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}
