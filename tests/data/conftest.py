"""Tokenizers of every type, trained once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from zoo.counting.tokenizer import build_tokenizer

from . import support


@pytest.fixture(scope="session")
def words() -> TextTokenizer:
    """One token per word, after `<s>`."""
    return support.wrapped(build_tokenizer(), bos_token="<s>")


@pytest.fixture(scope="session")
def gpt2() -> TextTokenizer:
    return support.wrapped(support.byte_level(), bos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def qwen() -> TextTokenizer:
    return support.wrapped(support.byte_level(digits=True))


@pytest.fixture(scope="session")
def llama() -> TextTokenizer:
    return support.wrapped(support.metaspace(), bos_token="<s>")


@pytest.fixture(scope="session")
def t5() -> TextTokenizer:
    return support.wrapped(support.unigram(), eos_token="</s>")


@pytest.fixture(scope="session")
def bert() -> TextTokenizer:
    return support.wrapped(support.wordpiece(), cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="session")
def every(
    words: TextTokenizer,
    gpt2: TextTokenizer,
    qwen: TextTokenizer,
    llama: TextTokenizer,
    t5: TextTokenizer,
    bert: TextTokenizer,
) -> dict[str, TextTokenizer]:
    return {"words": words, "gpt2": gpt2, "qwen": qwen, "llama": llama, "t5": t5, "bert": bert}


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with published prompt data."""
    folder = os.environ.get("MECHDSL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MECHDSL_DATA doesn't name a folder with prompt data")
    return Path(folder)
