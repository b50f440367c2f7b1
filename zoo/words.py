"""Word-level tokenizers of the zoo: one token a word, `<s>` in front of every text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, processors


def word_tokenizer(
    words: Sequence[str], special: Sequence[str], split: Any, end: str = ""
) -> Tokenizer:
    """What `split` (a pre-tokenizer) separates is a token; an unknown word is `<unk>`. end: the
    token behind every text, if one is."""
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with spaces
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}".rstrip(),
        pair=f"<s> $A $B {end}".rstrip(),
        special_tokens=[(each, ids[each]) for each in ("<s>", end) if each],
    )
    return tokenizer


def word_of(tokenizer: Tokenizer, token: int) -> str:
    """The word of a token of the vocabulary."""
    return tokenizer.id_to_token(token) or ""


def token_of(tokenizer: Tokenizer, word: str) -> int:
    """The token of a word of the vocabulary."""
    found = tokenizer.token_to_id(word)
    assert found is not None, word
    return found


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    longest: int,
    end: str = "",
    chat_template: str = "",
    padding_side: str = "left",
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`. end: the token that ends a text, if one
    does."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": longest,
        "padding_side": padding_side,
        **({"eos_token": end} if end else {}),
        **({"chat_template": chat_template} if chat_template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
