"""Tokenizers without transformers: texts to ids with character offsets, and images as tokens."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import compress, pairwise, starmap
from pathlib import Path
from typing import Any, ClassVar, TypedDict, cast

from tokenizers import Encoding, Tokenizer

from mechdsl.base.files import load_json
from mechdsl.base.hashing import stable_hash
from mechdsl.base.records import Record, compact_record
from mechdsl.base.text import Span, quote
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.models import NoImageProcessor
from mechdsl.diagnostics.prompts import NoBosToken, TextSpacing, UnreadableTokenizer
from mechdsl.images.layouts import ImageCell, ImageExpansion, ImageTokens
from mechdsl.images.picture import Picture, Region, covered_tokens
from mechdsl.images.processing import (
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    PatchLayout,
    Processing,
    UnsupportedProcessor,
    parse_processing,
)
from mechdsl.program import spec
from mechdsl.program.images import EXTRA_TOKEN_SPANS, IMAGE_SPAN, INSERTED_SPAN
from mechdsl.prompts.tokens.chat import (
    CHAT_TEMPLATE_FILES,
    ChatTemplate,
    parse_chat_template,
    read_chat_template,
)

SPECIAL_ROLES = ("bos", "cls", "sep", "eos")
"""Special tokens that positions can name."""

_WITHIN_WORDS = {"Punctuation", "Digits"}
"""Pre-tokenizers that divide each word by its characters alone."""

_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
"""Files of slow tokenizers."""

_BATCH = 4096

_CACHED_TEXT = 2**20
"""Characters of the texts whose encodings stay cached if they are more than a batch."""

_UNKNOWN = "<unk>"
"""The token for unknown text in tokenizers that don't name one."""

_FAR = 100.0
"""Difference in log probability by which the token for unknown text is less likely than others."""


@compact_record
class EncodedText:
    """A tokenised text. Offsets are characters; (0, 0) for special tokens."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    source: int = 0
    """Number of tokens that an encoder-decoder's encoder reads; its decoder reads the others."""

    def __len__(self) -> int:
        return len(self.ids)


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *CHAT_TEMPLATE_FILES,
)
"""The files that `TextTokenizer.from_folder` reads."""

_VOCABULARY = re.compile(rb'("vocab"\s*:\s*\{\s*)(?=(\})?)')
"""The brace that opens a vocabulary; group 2 is set if the vocabulary is empty. Quotes inside a
JSON text would follow a backslash."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, readable or not."""
    return any((folder / name).exists() for name in (*TOKENIZER_FILES, *_SLOW))


class _CachedEncodings(dict[str, EncodedText]):
    """Encodings by text."""

    characters = 0
    """Of all texts."""

    def add(
        self, new: Sequence[str], encoded: Iterable[EncodedText], texts: Sequence[str]
    ) -> list[EncodedText]:
        """Add new texts, and return the encodings of texts that are all in the cache then.

        It is cleared if it is larger than a batch and has too many characters.
        """
        self.update(zip(new, encoded, strict=True))
        encoded_texts = [self[text] for text in texts]
        self.characters += sum(map(len, new))
        if len(self) > _BATCH and self.characters > _CACHED_TEXT:
            self.clear()
            self.characters = 0
        return encoded_texts


@lru_cache(maxsize=16)
def _shared_encodings(tokenizer: str, *, add_special: bool) -> _CachedEncodings:
    """Return the encodings that all tokenizers with this hash share, in all files of a check."""
    return _CachedEncodings()


class TextTokenizer:
    """A `tokenizers.Tokenizer` with a policy for the beginning-of-sequence token.

    `bos`: True adds the token in front unless it is there, False removes it, None keeps the
    tokenizer's behaviour.
    """

    stands_in: ClassVar[bool] = False
    """Whether it replaces the tokenizer of a model that isn't available."""
    chat: ChatTemplate | None = None
    """The template that formats the turns of a chat, if there is one."""
    pad: str | None = None
    """The padding token."""
    padded: int = 0
    """Length to which texts are padded, for a model that attends to padding; 0: no padding."""
    starts: tuple[int, ...] = ()
    """Ids of the tokens that an encoder-decoder's decoder begins with, after the encoder's."""
    written: bool = False
    """Whether texts contain their special tokens, as chat templates write them, so that none are
    added."""
    reads_videos: bool = False
    """Whether a video processor of the model reads the frames of a video together."""
    passed: object = None
    """The tokenizer that Python passes with the model, if any."""

    def __init__(
        self,
        backend: Tokenizer,
        *,
        roles: Mapping[str, str],
        bos: bool | None,
        digest: str,
        name: str = "",
        made_unknown: bool = False,
    ) -> None:
        self._backend = backend
        self.made_unknown = made_unknown
        """Whether the token for unknown words was added because the model has none."""
        self.roles: dict[str, str] = {
            role: token
            for role, token in roles.items()
            if role in SPECIAL_ROLES and backend.token_to_id(token) is not None
        }
        self.bos = bos
        self.hash = digest
        """SHA-256 of `tokenizer.json`."""
        self.name = name
        _keep_white_space(backend)
        # Padding and truncation are for batches; a prompt is never truncated silently.
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def from_folder(
        cls, path: Path, bos: bool | None = None, *, span: Span | None = None
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Read `tokenizer.json` and `tokenizer_config.json` of a folder. Codes: E0508, E0522."""
        file = path / "tokenizer.json"

        def refused(reason: str) -> tuple[None, list[Diagnostic]]:
            return None, [
                UnreadableTokenizer(span=span, path=path.name or str(path), reason=reason)
            ]

        try:
            content = file.read_bytes()
        except FileNotFoundError:
            slow = [f", only `{name}`" for name in _SLOW if (path / name).exists()]
            return refused("there is no `tokenizer.json` in the folder" + "".join(slow[:1]))
        except OSError as error:
            return refused(error.strerror or str(error))
        try:
            backend, made_unknown = _backend_of(content)
        except Exception as error:  # the library raises plain `Exception`
            return refused(f"`tokenizer.json` can't be read ({error})")
        config = _read_config(path / "tokenizer_config.json")
        config = _read_config(path / "special_tokens_map.json") | config
        # `add_bos_token` of the config is ignored, as in transformers if there is a
        # `tokenizer.json`.
        made = cls(
            backend,
            roles=_roles(config),
            bos=bos,
            digest=sha256(content).hexdigest(),
            name=path.name,
            made_unknown=made_unknown,
        )
        made.pad = _roles(config, ("pad",)).get("pad")
        made.chat = read_chat_template(path, config, made._added)
        return made._checked(span)

    @classmethod
    def from_backend(
        cls,
        backend: Tokenizer,
        *,
        bos_token: str | None = None,
        cls_token: str | None = None,
        sep_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: object = None,
        bos: bool | None = None,
        span: Span | None = None,
    ) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        """Wrap a copy of a tokenizer that already exists in Python. Codes: E0522."""
        content = backend.to_str().encode()
        tokenizer, made_unknown = _backend_of(content)
        tokens = {"bos": bos_token, "cls": cls_token, "sep": sep_token, "eos": eos_token}
        made = cls(
            tokenizer,
            roles={role: token for role, token in tokens.items() if token is not None},
            bos=bos,
            digest=sha256(content).hexdigest(),
            made_unknown=made_unknown,
        )
        made.pad = pad_token
        named = {f"{role}_token": token for role, token in tokens.items()}
        made.chat = parse_chat_template(chat_template, named, made._added)
        return made._checked(span)

    def chat_for(self, prompts: spec.Prompts) -> ChatTemplate | None:
        """Return the template that formats the turns of a block, with its arguments."""
        if self.chat is None or not prompts.chat_arguments:
            return self.chat
        arguments = {argument.name: argument.value for argument in prompts.chat_arguments}
        return replace(self.chat, arguments=arguments)

    def same_as(self, other: TextTokenizer) -> bool:
        """Return whether both produce the same tokens for every text and every chat."""
        mine, theirs = ((t.hash, t.roles, t.bos, t.chat, t.starts) for t in (self, other))
        return mine == theirs

    def reading(self, *, written: bool) -> TextTokenizer:
        """Return the same tokenizer for texts with or without special tokens in them."""
        return self if written == self.written else self._other

    @cached_property
    def _other(self) -> TextTokenizer:
        other = copy(self)
        for worked_out in ("_kept", "opening"):
            other.__dict__.pop(worked_out, None)
        other.written = not self.written
        other.__dict__["_other"] = self
        return other

    def _checked(self, span: Span | None) -> tuple[TextTokenizer | None, list[Diagnostic]]:
        if self.bos and "bos" not in self.roles:
            return None, [NoBosToken(span=span)]
        return self, []

    # --- vocabulary ---------------------------------------------------------------------------

    @property
    def _added(self) -> dict[str, bool]:
        """Texts that are always a single token, and whether each is a special token."""
        entries = self._backend.get_added_tokens_decoder().values()
        return {entry.content: entry.special for entry in entries}

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._backend.get_vocab_size(with_added_tokens=True) - self.made_unknown

    @property
    def own_size(self) -> int:
        """Number of tokens, excluding added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False) - self.made_unknown

    @cached_property
    def role_ids(self) -> dict[str, int]:
        """Token ids of `bos`, `cls`, `sep` and `eos`, if the tokenizer has them."""
        ids = {role: self._backend.token_to_id(token) for role, token in self.roles.items()}
        return {role: number for role, number in ids.items() if number is not None}

    @cached_property
    def unknown_id(self) -> int | None:
        """The id for text outside the vocabulary."""
        model = self._backend.model
        token = getattr(model, "unk_token", None)
        if token is None:
            # Unigram stores an index that can't be queried; others may have no such token.
            unigram = type(model).__name__ == "Unigram"
            return self._backend.token_to_id(_UNKNOWN) if unigram else None
        return self._backend.token_to_id(cast("str", token))

    @cached_property
    def library(self) -> object:
        """A tokenizer for user functions, which may change it freely: a copy of the one that Python
        passes with the model, or else a `tokenizers.Tokenizer`."""
        if self.passed is not None:
            return deepcopy(self.passed)
        return Tokenizer.from_str(self._backend.to_str())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, with special tokens by name."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """Return a readable token: decoded, special tokens by name."""
        text = self._backend.decode([token], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else self._backend.id_to_token(token) or ""

    def is_space(self, token: int) -> bool:
        """Return whether a token is only white space, which some vocabularies decode to nothing."""
        return not self.token_text(token).strip(" ▁\t\n")

    def plain_words(self) -> list[str]:
        """Return words of letters that are one token after a space, ordered by id."""
        candidates: dict[str, None] = {}
        for number in range(self.vocab_size):
            text = self._backend.decode([number], skip_special_tokens=True).strip()
            if text.isalpha():
                candidates[text] = None
        words = list(candidates)
        before = len(self._raw(["1"])[0].ids)
        encoded = self._raw([f"1 {word}" for word in words])
        unknown = self.unknown_id
        return [
            word
            for word, e in zip(words, encoded, strict=True)
            if len(e.ids) == before + 1 and unknown not in e.ids[-1:]
        ]

    # --- texts to tokens ----------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True) -> EncodedText:
        """Tokenise a text, with special tokens by default."""
        return self.encode_all([text], add_special)[0]

    def encode_all(self, texts: Sequence[str], add_special: bool = True) -> list[EncodedText]:
        """Tokenise many texts."""
        if not add_special:
            return self._raw(texts)
        kept = self._kept
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        raw = map(self._with_opening, self._raw(new)) if self.written else self._raw(new, True)
        whole = map(self._with_padding, map(self._with_bos, raw))
        whole = map(self._with_start, whole) if self.starts else whole
        return kept.add(new, whole, texts)

    @cached_property
    def _kept(self) -> _CachedEncodings:
        """The most recent encodings: a block's tables of few rows and of more follow each other."""
        return _CachedEncodings()

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        shared = _shared_encodings(self.hash, add_special=add_special)
        new = [text for text in dict.fromkeys(texts) if text not in shared]
        out: list[EncodedText] = []
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            for e in self._backend.encode_batch(batch, add_special_tokens=add_special):
                special, offsets = _flags(tuple(e.special_tokens_mask)), e.offsets
                if True in special:
                    pairs = zip(offsets, special, strict=True)
                    offsets = [(0, 0) if added else at for at, added in pairs]
                _place_prefixes(e, offsets, special)
                out.append(EncodedText(tuple(e.ids), tuple(starmap(_place, offsets)), special))
        return shared.add(new, out, texts)

    def _with_opening(self, encoded: EncodedText) -> EncodedText:
        """Mark a beginning-of-sequence token in the text itself as an added special token."""
        bos = self.role_ids.get("bos")
        if bos is None or encoded.ids[:1] != (bos,):
            return encoded
        return EncodedText(
            encoded.ids, ((0, 0), *encoded.offsets[1:]), (True, *encoded.special[1:])
        )

    def _with_bos(self, encoded: EncodedText) -> EncodedText:
        bos = self.role_ids.get("bos")
        if self.bos is None or bos is None:
            return encoded
        present = encoded.ids[:1] == (bos,)
        if self.bos and not present:
            return EncodedText(
                (bos, *encoded.ids), ((0, 0), *encoded.offsets), (True, *encoded.special)
            )
        if not self.bos and present and encoded.special[0]:
            return EncodedText(encoded.ids[1:], encoded.offsets[1:], encoded.special[1:])
        return encoded

    def padded_to(self, length: int) -> TextTokenizer | None:
        """Return the same tokenizer with padding to a length; None if it has no padding token."""
        if self.pad is None or self._backend.token_to_id(self.pad) is None:
            return None
        other = copy(self)
        for worked_out in ("_kept", "_other", "opening"):
            other.__dict__.pop(worked_out, None)
        other.padded = length
        return other

    def with_starts(self, starts: tuple[int, ...] | None) -> TextTokenizer:
        """Return the tokenizer of an encoder-decoder, whose decoder begins with these tokens."""
        if not starts:
            return self
        other = copy(self)
        for worked_out in ("_kept", "_other", "opening"):
            other.__dict__.pop(worked_out, None)
        other.starts = starts
        return other

    def _with_start(self, encoded: EncodedText) -> EncodedText:
        more = len(self.starts)
        return EncodedText(
            (*encoded.ids, *self.starts),
            (*encoded.offsets, *[(0, 0)] * more),
            (*encoded.special, *[True] * more),
            len(encoded),
        )

    def _with_padding(self, encoded: EncodedText) -> EncodedText:
        more = self.padded - len(encoded)
        if more <= 0:
            return encoded
        token = self._backend.token_to_id(self.pad or "")
        assert token is not None  # `padded_to` checked it
        return EncodedText(
            (*encoded.ids, *[token] * more),
            (*encoded.offsets, *[(0, 0)] * more),
            (*encoded.special, *[True] * more),
        )

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids of the special token that texts begin with; empty if there is none, or if it could be
        the token that texts end with."""
        # Only the empty text is certain to be encodable in every vocabulary.
        encoded = self.encode("")
        closing = {self.role_ids[role] for role in ("sep", "eos") if role in self.role_ids}
        closing -= {self.role_ids[role] for role in ("bos", "cls") if role in self.role_ids}
        first = encoded.ids[: min(1, len(encoded) - len(self.starts))]
        return first if first and encoded.special[:1] == (True,) and first[0] not in closing else ()

    def bos_convention(self) -> str:
        """Describe the treatment of the beginning-of-sequence token."""
        bos = self.roles.get("bos")
        if bos is not None and self.opening == (self.role_ids["bos"],):
            by = "by the tokenizer" if self.bos is None else "bos: true"
            return f"`{bos}` before the text ({by})"
        return "none before the text" if self.bos is None else "none before the text (bos: false)"

    def continuation(self, prompt: str, text: str) -> tuple[tuple[int, ...], bool]:
        """Tokenise a text as the continuation of a prompt.

        Returns:
            The ids, and whether the prompt's own tokens stay the same when the text follows. If
            they change (a prompt that ends in a space), the text is tokenised separately.
        """
        return self.continuations([(prompt, text)])[0]

    def continuations(
        self, pairs: Sequence[tuple[str, str]], encoded: Mapping[str, EncodedText] | None = None
    ) -> list[tuple[tuple[int, ...], bool]]:
        """Tokenise many (prompt, text) pairs as `continuation` does; equal pairs once.

        encoded: the encodings of the prompts, if available.
        """
        unique = list(dict.fromkeys(pairs))
        if self.starts:  # the decoder's text is separate from the encoder's
            texts = list(dict.fromkeys(text for _, text in unique))
            encoded_texts = dict(zip(texts, self.encode_all(texts, add_special=False), strict=True))
            return [(encoded_texts[text].ids, True) for _, text in pairs]
        prompts = self.encode_unique(p for p, _ in unique) if encoded is None else encoded
        separate_words = self._separate_words(unique, prompts) if self._splits_at_spaces else {}
        unique = (
            [pair for pair in unique if pair not in separate_words] if separate_words else unique
        )
        whole = self.encode_all([p + t for p, t in unique])
        for pair, both in zip(unique, whole, strict=True):
            before = _without_closing(prompts[pair[0]])
            ids = _without_closing(both)
            kept = ids[: len(before)] == before
            if not kept:
                ids = self.encode(pair[1], add_special=False).ids
            separate_words[pair] = (ids[len(before) :] if kept else ids, kept)
        return [separate_words[pair] for pair in pairs]

    def _separate_words(
        self, pairs: Sequence[tuple[str, str]], prompts: Mapping[str, EncodedText]
    ) -> dict[tuple[str, str], tuple[tuple[int, ...], bool]]:
        """Return the continuations of the pairs in which a text begins a new word after a space.

        Their tokens don't depend on the prompt if `_splits_at_spaces` holds.
        """
        separate = [
            (p, t)
            for p, t in pairs
            if t[:1] == " " and p[-1:].strip() and False in prompts[p].special
        ]
        texts = list(dict.fromkeys(t for _, t in separate))
        encoded_texts = dict(zip(texts, self.encode_all(texts, add_special=False), strict=True))
        return {pair: (encoded_texts[pair[1]].ids, True) for pair in separate}

    @cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether a space between two words always separates their tokens.

        That holds without a normalizer and without added tokens that contain a space or remove the
        next one, if the texts are first split at white space or by the pattern of GPT-2.
        """
        backend = self._backend
        added = backend.get_added_tokens_decoder().values()
        if backend.normalizer or any(
            token.rstrip or re.search(r"\s", token.content) for token in added
        ):
            return False
        state: Any = backend.pre_tokenizer and json.loads(backend.pre_tokenizer.__getstate__())
        steps: list[dict[str, Any]] = (state or {}).get("pretokenizers") or [state or {"type": ""}]
        splits = steps[0]["type"] == "WhitespaceSplit" or steps[0].get("use_regex") is True
        return splits and all(step["type"] in _WITHIN_WORDS for step in steps[1:])

    def encode_unique(self, texts: Iterable[str]) -> dict[str, EncodedText]:
        """Tokenise many texts, equal ones once."""
        unique = list(dict.fromkeys(texts))
        return dict(zip(unique, self.encode_all(unique), strict=True))


def _backend_of(content: bytes) -> tuple[Tokenizer, bool]:
    """Build the tokenizer of a `tokenizer.json`, with a token for unknown words.

    A tokenizer without one raises an exception for any text outside its vocabulary, where a
    diagnostic is needed. Raises plain `Exception` if the text isn't a tokenizer.

    Returns:
        The tokenizer, and whether the token is new.
    """
    backend = Tokenizer.from_buffer(content)  # from a str it would take four times the memory
    model: Any = backend.model
    unigram = type(model).__name__ == "Unigram"
    token = _UNKNOWN if unigram else model.unk_token
    if token is None:
        return backend, False
    there = model.token_to_id(token) if not unigram else re.search(rb'"unk_id":\s*\d', content)
    if there is not None:
        return backend, False
    known = backend.token_to_id(token)
    if unigram:
        whole = json.loads(content)
        own = whole["model"]["vocab"]
        number = whole["model"]["unk_id"] = len(own)
        own.append([token, min((score for _, score in own), default=0.0) - _FAR])
        content = json.dumps(whole).encode()
    else:
        number = known if known is not None else max(backend.get_vocab().values(), default=-1) + 1
        del backend, model  # free them: they are as large as the new tokenizer
        entry = json.dumps({token: number})[1:-1].encode()
        content = _VOCABULARY.sub(lambda m: m[1] + entry + (b"" if m[2] else b","), content, 1)
    return Tokenizer.from_buffer(content), known != number


def _without_closing(encoded: EncodedText) -> tuple[int, ...]:
    """Return the ids without special tokens at the end (an encoder's `[SEP]`)."""
    end = len(encoded.ids)
    while end and encoded.special[end - 1]:
        end -= 1
    # The ids of a prompt without text are only its opening tokens.
    return encoded.ids[:end] if end else encoded.ids


def _place_prefixes(
    encoding: Encoding, offsets: list[tuple[int, int]], special: Sequence[bool]
) -> None:
    """Correct the offsets of spaces that a tokenizer adds before a text or after a special token.

    Such a token (`▁`, `Ġ`) claims the first character after it, which belongs to the next token;
    it covers nothing.
    """
    overlaps = [one[1] > other[0] for one, other in pairwise(offsets)]
    if True not in overlaps:
        return
    tokens: list[str] | None = None  # token texts are slow to obtain and rarely needed
    for n in compress(range(len(overlaps)), overlaps):
        if not special[n + 1]:
            tokens = encoding.tokens if tokens is None else tokens
            if set(tokens[n]) in ({"▁"}, {"Ġ"}):
                offsets[n] = (offsets[n][0], offsets[n][0])


@lru_cache(maxsize=2**10)
def _flags(mask: tuple[int, ...]) -> tuple[bool, ...]:
    """Convert zeros and ones to truth values; equal results share one object to save memory."""
    return tuple(flag == 1 for flag in mask)


@lru_cache(maxsize=2**16)
def _place(start: int, end: int) -> tuple[int, int]:
    """Return a token's range; equal results share one object to save memory."""
    return start, end


def _keep_white_space(backend: Tokenizer) -> None:
    """Include white space in offsets, so that tokens of white space have a range."""
    processor = backend.post_processor
    if processor is None:
        return
    state = cast("bytes", processor.__getstate__())
    wanted = re.sub(rb'"trim_offsets":\s*true', b'"trim_offsets":false', state)
    if wanted != state:
        processor.__setstate__(wanted)
        backend.post_processor = processor


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = load_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}


def _roles(config: Mapping[str, Any], roles: Sequence[str] = SPECIAL_ROLES) -> dict[str, str]:
    """Return special tokens by role; an entry is the token itself, or an object with `content`."""
    markers: dict[str, str] = {}
    for role in roles:
        entry = config.get(f"{role}_token")
        if isinstance(entry, Mapping):
            entry = cast("Mapping[str, Any]", entry).get("content")
        if isinstance(entry, str):
            markers[role] = entry
    return markers


_LAST_WORD = re.compile(r"\s[\"'“‘«(\[{]*([^\W\d_]+(?:['’-][^\W\d_]+)*)$")
"""A word of letters at the end of a prompt, so neither code nor an address."""

_LAST_OPERATOR = re.compile(r"\s(==?|[-=]>|→|⇒|\+|&)$")

_FIRST_WORD = re.compile(r"[^\W\d_]+")

_NUMBERED = re.compile(r"[^\W\d_]\d")

_STOPS = ",;:?!."

_UNSPACED = (
    "BOPOMOFO",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "KHMER",
    "LAO",
    "MYANMAR",
    "THAI",
    "TIBETAN",
    "YI ",
)
"""Scripts without spaces between words, as prefixes of Unicode character names."""


class Respelling(Record):
    """A text with exactly one space before it, tokenised as the continuation of a prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, without a token for the space alone."""
    space_alone: bool
    """Whether the tokenizer uses a separate token for the space."""
    prompt_ends: bool
    """Whether the prompt has to lose its trailing spaces."""

    @property
    def advice(self) -> str:
        ending = "end the template without a space and " * self.prompt_ends
        spelt = quote(f'"{self.text}"')
        return f"{ending}write {spelt}, with a leading space"


def respell(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """Respell a text with exactly one space between it and the prompt.

    Returns:
        None if the tokens of prompt and text don't change, if the vocabulary lacks them, or if the
        prompt ends in a line break.
    """
    before, spaced = prompt.rstrip(" "), " " + text.lstrip(" ")
    if tokenizer.starts or not before or before[-1].isspace() or not spaced.strip():
        return None
    pairs = [("", prompt), (prompt, text), ("", before), (before, spaced)]
    (old, _), (numbers, follows), (new, _), (ids, kept) = tokenizer.continuations(pairs)
    if not kept or not ids or tokenizer.unknown_id in ids:
        return None
    if follows and (*old, *numbers) == (*new, *ids):
        return None
    alone = len(ids) > 1 and tokenizer.is_space(ids[0])
    return Respelling(spaced, ids[1:] if alone else ids, alone, before != prompt)


def spacing_problem(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """Return the likely intended spelling of a text that follows a prompt with no space or two.

    Not a problem are languages without spaces, texts after a quote, a bracket, a line break or a
    special token, code, numbers that continue, symbols that the prompt itself writes without a
    space, letters that continue a word of the prompt, and tokenizers that drop spaces. A text that
    changes the prompt's own tokens is W0703.
    """
    two = prompt.endswith(" ") and text.startswith(" ")
    if not two and not _lacks_space(prompt, text):
        return None
    numbers, kept = tokenizer.continuation(prompt, text)
    meant = respell(prompt, text, tokenizer) if kept else None
    if meant is None or two or not _may_continue_word(prompt, text):
        return meant
    letter = len(text.strip()) == 1 and meant.space_alone
    return None if letter or len(meant.ids) > len(numbers) else meant


def single_token_spelling(prompt: str, text: str, tokenizer: TextTokenizer) -> Respelling | None:
    """Return the spelling that makes a text one token, if a space is why it has several."""
    _, kept = tokenizer.continuation(prompt, text)
    if kept and not prompt.endswith(" "):
        meant = spacing_problem(prompt, text, tokenizer)
    else:
        meant = respell(prompt, text, tokenizer)
    return meant if meant is not None and len(meant.ids) == 1 else None


def spacing_warnings(
    prompts: Sequence[str],
    texts: Sequence[str | None],
    tokenizer: TextTokenizer,
    span: Span,
    rows: Sequence[int],
) -> list[TextSpacing]:
    """Return W0705 for texts that follow prompts with a missing or an extra space.

    Args:
        prompts: The prompt before each text.
        texts: The texts; None is a token given by its id.
        tokenizer: The model's tokenizer.
        span: The source span of the texts.
        rows: The number of each text's row.
    """
    if tokenizer.stands_in:
        return []
    respellings = {
        pair: spacing_problem(*pair, tokenizer)
        for pair in dict.fromkeys((p, t) for p, t in zip(prompts, texts, strict=True) if p and t)
    }
    wrong = {pair: meant for pair, meant in respellings.items() if meant is not None}
    if not wrong:
        return []
    (prompt, text), first = next(iter(wrong.items()))
    pairs = zip(rows, prompts, texts, strict=True)
    return [
        TextSpacing(
            span=span,
            spaces="are two spaces" if text.startswith(" ") else "is no space",
            text=quote(text),
            joined="…" * (len(prompt) > _SHOWN) + prompt[-_SHOWN:] + text,
            rows=len({row for row, p, t in pairs if (p, t) in wrong}),
            total=len(set(rows)),
            hint=first.advice,
        )
    ]


_SHOWN = 20
"""Number of characters of the prompt in a warning."""


def _lacks_space(prompt: str, text: str) -> bool:
    """Return whether a text begins a word directly after a word, a stop or an operator."""
    if " " not in prompt or not text[:1].isalnum() or _is_unspaced(prompt[-1] + text[0]):
        return False
    last, first = prompt[-1], text[0]
    if last.isalpha():
        word = _LAST_WORD.search(prompt)
        if word is None:
            return False
        if first.isdigit():  # `item1, item2, item` and `GPT` may continue with a digit
            return last.islower() and _NUMBERED.search(prompt) is None
        more = _FIRST_WORD.match(text)
        return more is not None and word[1] + more[0] not in prompt
    operator = _LAST_OPERATOR.search(prompt)
    symbol = operator[1] if operator is not None else last
    if (operator is None and last not in _STOPS) or _is_written_unspaced(prompt, symbol):
        return False
    if operator is not None or f"{last} " in prompt:
        return first.isupper() or last != "."
    return first.isupper() if last == "." else first.isalpha() or prompt[-2:-1].isalpha()


def _may_continue_word(prompt: str, text: str) -> bool:
    """Return whether letters follow letters as they do inside a word."""
    return (
        prompt[-1].isalpha() and text[0].isalpha() and (prompt[-1].isupper() or text[0].islower())
    )


def _is_written_unspaced(prompt: str, symbol: str) -> bool:
    """Return whether the prompt itself has a letter or digit directly after a symbol."""
    return re.search(re.escape(symbol) + r"[^\W_]", prompt) is not None


def _is_unspaced(characters: str) -> bool:
    """Return whether any character belongs to a script without spaces between words."""
    return any(unicodedata.name(c, "").startswith(_UNSPACED) for c in characters)


_SIDE = 14

_CACHED_REGIONS = 2**12
"""Maximum number of regions of images whose tokens are cached for the next table."""


class ImageTokenizer(TextTokenizer):
    """A tokenizer of images, whose tokens all have the id of the whole prepared image.

    So two rows have equal tokens exactly if their images are equal.
    """

    def __init__(self, layout: PatchLayout, processing: Processing) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.layout = layout
        self.processing = processing
        self.roles = {}
        self.bos = None
        self.name = ""
        self.hash = sha256(repr((layout, processing)).encode()).hexdigest()
        self.made_unknown = False
        self.texts: TextTokenizer | None = None
        """The text tower's tokenizer, for a model with two towers."""

    @property
    def vocab_size(self) -> int:
        return 1 << 62

    @property
    def own_size(self) -> int:
        return 0

    @cached_property
    def role_ids(self) -> dict[str, int]:
        return {}

    @cached_property
    def unknown_id(self) -> int | None:
        return None

    @property
    def _added(self) -> dict[str, bool]:
        return {}

    @cached_property
    def _splits_at_spaces(self) -> bool:
        return False

    def same_as(self, other: TextTokenizer) -> bool:
        return isinstance(other, ImageTokenizer) and self.hash == other.hash

    def token_text(self, token: int) -> str:
        """Return the name of the token's image, given by its id: image tokens have no text."""
        return f"image {token:x}"

    def plain_words(self) -> list[str]:
        return []

    def convention(self) -> str:
        """Describe the model's input for an image."""
        layout, front = self.layout, []
        for name in layout.names:
            count = len(layout.named(name))
            front.append(f"`{name}`" if count == 1 else f"{count} `{name}` tokens")
        said = f"{self.processing.words}; {layout.rows} x {layout.cols} patches, counted from 1"
        return f"{said}, after {' and '.join(front)}" if front else said

    def _raw(self, texts: Sequence[str], add_special: bool = False) -> list[EncodedText]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> EncodedText:
        """Encode an image. text: the picture's text, which is unique to it."""
        own = stable_hash("image", self.hash, text) >> 66
        front = len(self.layout.front)
        patches = self.layout.tokens - front
        return EncodedText(
            (own,) * self.layout.tokens,
            ((0, 0),) * front + ((0, len(text)),) * patches,
            (True,) * front + (False,) * patches,
        )

    # --- image-only methods -----------------------------------------------------------------------

    def encode_picture(self, picture: Picture, *, inserted: int = 0) -> EncodedText:
        """Encode an image, with this number of tokens inserted after its patches."""
        [encoded_text] = self.encode_all([picture.text])
        return EncodedText(
            encoded_text.ids + encoded_text.ids[-1:] * inserted,
            encoded_text.offsets + ((0, 0),) * inserted,
            encoded_text.special + (False,) * inserted,
        )

    @cached_property
    def expansion(self) -> ImageExpansion:
        """The tokens of an image, as those of images within prompts."""
        layout, count = self.layout, self.layout.tokens
        places = [(token, layout.place(token)) for token in layout.grid]
        cells = tuple(ImageCell(token, 1, *place, None) for token, place in places if place)
        is_image = tuple(token in layout.grid for token in range(count))
        return ImageExpansion((0,) * count, is_image, ImageTokens(0, count, cells))

    def label(self, token: int) -> str:
        """Return the label of a token in tables: its position as written in the language."""
        cell = self.expansion.cell_of.get(token)
        if cell is not None:
            return f"{IMAGE_SPAN} {self.expansion.labels[cell.position]}"
        if token >= self.layout.tokens:
            return f"{INSERTED_SPAN} token {token - self.layout.tokens + 1}"
        name = self.layout.front[token]
        same = self.layout.named(name)
        return name if len(same) == 1 else f"{name} {same.index(token) + 1}"

    def covered(self, region: Region, picture: Picture) -> tuple[int, ...]:
        """Return the tokens that read a part of a region, which no change of the image moves."""
        key = region, replace(picture, changes=()) if picture.changes else picture
        if key not in self._covered:
            from mechdsl.images.pixels import region_coverage  # imports NumPy

            if len(self._covered) == _CACHED_REGIONS:
                self._covered.clear()
            cover = region_coverage(region, picture)
            self._covered[key] = covered_tokens(cover, self.processing, self.layout)
        return self._covered[key]

    @cached_property
    def _covered(self) -> dict[tuple[Region, Picture], tuple[int, ...]]:
        return {}

    def places(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        """Return the tokens of each occurrence of the spans that every image has, by name."""
        hits = {name: tuple((n,) for n in self.layout.named(name)) for name in self.layout.names}
        return {**hits, IMAGE_SPAN: (self.layout.grid,)}


class ImageRowFields(TypedDict, total=False):
    """The fields that only rows of images have."""

    image: Picture
    places: Mapping[str, tuple[tuple[int, ...], ...]]
    regions: Mapping[str, tuple[Region, ...]]


def image_row_fields(
    picture: Picture | None, regions: Mapping[str, tuple[Region, ...]], tokenizer: TextTokenizer
) -> ImageRowFields:
    """Return the image fields of a row; none for a prompt. Occurrences of regions without a token
    are omitted."""
    if picture is None:
        return {}
    assert isinstance(tokenizer, ImageTokenizer)
    picture = picture.sized(tokenizer.layout.size)
    places = {**tokenizer.places()}
    for name, occurrences in regions.items():
        patches = (tokenizer.covered(occurrence, picture) for occurrence in occurrences)
        places[name] = tuple(tokens for tokens in patches if tokens)
    return {"image": picture, "places": places, "regions": regions}


class StandInImageTokenizer(ImageTokenizer):
    """The tokenizer of an unavailable model: more patches than most, every type of extra token."""

    stands_in = True

    def __init__(self) -> None:
        layout = PatchLayout(EXTRA_TOKEN_SPANS, (1, 1), (_SIDE, _SIDE))
        super().__init__(layout, Processing(("exact", _SIDE, _SIDE)))


def read_processing(
    folder: Path, layout: PatchLayout, *, model: str, span: Span | None = None
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Read the image preparation of a model's folder. Codes: E0456."""
    name = PROCESSOR_FILE
    try:
        config: Any = _read(folder / PROCESSOR_FILE, "image_processor")
        if config is None:
            name = PREPROCESSOR_FILE
            config = _read(folder / PREPROCESSOR_FILE)
    except (OSError, ValueError) as error:
        reason = f"`{name}` can't be read ({error})"
        return None, [NoImageProcessor(span=span, model=model, reason=reason)]
    if config is None:
        reason = f"there is no `{PREPROCESSOR_FILE}` next to its `config.json`"
        return None, [NoImageProcessor(span=span, model=model, reason=reason)]
    return make_image_tokenizer(config, layout, model=model, span=span)


def _read(file: Path, part: str = "") -> Any:
    """Read a file, or a key of it; None if it doesn't exist. Raises OSError and ValueError."""
    if not file.exists():
        return None
    document: Any = load_json(file.read_text(encoding="utf-8"))
    if not part:
        return document
    return cast("Mapping[str, Any]", document).get(part) if isinstance(document, Mapping) else None


def make_image_tokenizer(
    config: Any, layout: PatchLayout, *, model: str, span: Span | None = None
) -> tuple[ImageTokenizer | None, list[Diagnostic]]:
    """Build the tokenizer from a processor's config. Codes: E0456."""

    def refused(reason: str, hint: str = "") -> tuple[None, list[Diagnostic]]:
        problem = NoImageProcessor(span=span, model=model, reason=reason)
        return None, [replace(problem, hint=hint) if hint else problem]

    if not isinstance(config, Mapping):
        return refused(f"`{PREPROCESSOR_FILE}` is not a JSON object")
    try:
        processing = parse_processing(config)
    except UnsupportedProcessor as unfit:
        return refused(str(unfit), unfit.hint)
    made = processing.size
    if made is None:
        hint = 'crop images (`"do_center_crop": true`), or give both sides of `size`'
        return refused("it keeps the image size of each file, but the model has a fixed size", hint)
    if layout.any_size:
        layout = replace(layout, size=made)
        if layout.rows < 1 or layout.cols < 1:
            return refused("its images are smaller than a patch")
    elif made != layout.size:
        sizes = (
            f"{made[1]} x {made[0]} pixels, but the model reads {layout.size[1]} x {layout.size[0]}"
        )
        return refused(f"it makes images of {sizes}", "give it the `image_size` of the model")
    return ImageTokenizer(layout, processing), []
