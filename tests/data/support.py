"""Train small tokenizers, and build prompt tables from `.mech` text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic, has_errors
from mechdsl.program import spec
from mechdsl.program.names import Namespace
from mechdsl.program.prompts import lower_prompts
from mechdsl.prompts.positions.cells import resolve_positions
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell
from mechdsl.prompts.table import BlockCompiler, RowSelection, build_table
from mechdsl.prompts.tokens.tokenizer import TextTokenizer
from mechdsl.rules.kinds import registered_words
from mechdsl.syntax import ast

from ..parsing import parse

_WORDS = """
 apple pear plum fig kiwi thing Mary John Tom Anna Luke shop park bag book gave went the When and to
 Paris London Rome France England Italy capital of is in Part Count Total Zoë José naïve café über
 question answer Q A one two three four five six seven eight nine ten colour Vinson Massif
"""
WORDS = _WORDS.split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
# The split that Llama 3 and Qwen use: each digit is a token, without a leading space.
DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, trim: bool = True, digits: bool = False, vocabulary: int = 600) -> Tokenizer:
    """Byte-level BPE, as GPT-2; with `digits` as Qwen."""
    tokenizer = Tokenizer(models.BPE())
    if digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(DIGITS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    numbers = [] if digits else [" ".join(map(str, range(30)))] * 5
    tokenizer.train_from_iterator(CORPUS + numbers, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """BPE with `▁` for spaces, byte fallback and a BOS token, as Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    lines = [word for line in CORPUS for word in re.findall(r" ?\S+", line)]
    numbers = list("0123456789")
    tokenizer.train_from_iterator(lines + numbers, trainer)
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_with_bytes(state, byte_tokens))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _with_bytes(state: str, byte_tokens: list[str]) -> str:
    content = json.loads(state)
    vocabulary = content["model"]["vocab"]
    for token in byte_tokens:
        vocabulary.setdefault(token, len(vocabulary))
    return json.dumps(content)


def unigram() -> Tokenizer:
    """Unigram with Metaspace, as T5 or XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    numbers = [" ".join(map(str, range(30)))]
    tokenizer.train_from_iterator(CORPUS + numbers, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    """WordPiece that lowercases and strips accents, with [CLS] and [SEP], as BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400,
        special_tokens=["[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789:,.|'"),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[
            ("[CLS]", tokenizer.token_to_id("[CLS]")),
            ("[SEP]", tokenizer.token_to_id("[SEP]")),
        ],
    )
    return tokenizer


def wrapped(backend: Tokenizer, **options: Any) -> TextTokenizer:
    """The tokenizer, without diagnostics."""
    tokenizer, diagnostics = TextTokenizer.from_backend(backend, **options)
    assert tokenizer is not None
    assert not diagnostics
    return tokenizer


def tree(text: str, path: Path | None = None) -> ast.File:
    if not text.lstrip().startswith("mech 1"):
        text = "mech 1\n" + text
    file, diagnostics = parse(Source(text, path))
    assert not diagnostics, [d.message for d in diagnostics]
    return file


def blocks(text: str, path: Path | None = None) -> dict[str, spec.Prompts]:
    """The prompts blocks of a text, by name."""
    return {
        s.name.id: lower_prompts(s, Namespace(registered_words()), {})
        for s in tree(text, path).statements
        if isinstance(s, ast.PromptsDef)
    }


def build(
    text: str, tokenizer: TextTokenizer, *, path: Path | None = None, **options: Any
) -> tuple[PromptTable | None, list[Diagnostic]]:
    """The table of the first block of a text; a bare block is called `p`."""
    if "prompts " not in text:
        text = f"prompts p {{\n{text}\n}}"
    found = blocks(text, path)

    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names if name in options}

    given: dict[str, Any] = {"words": lambda _: tokenizer.plain_words()} | take(
        "seed", "words", "parameters", "python"
    )
    compiler = options.pop("compiler", None) or BlockCompiler(found, **given)
    selection = RowSelection(**take("limit", "part", "ids", "prompts_enough", "used"))
    return build_table(next(iter(found.values())), tokenizer, compiler, selection, **options)


def table(text: str, tokenizer: TextTokenizer, **options: Any) -> PromptTable:
    """The table, which must be without errors."""
    made, diagnostics = build(text, tokenizer, **options)
    assert made is not None, [(d.code, d.message, d.label_text) for d in diagnostics]
    assert not has_errors(diagnostics)
    return made


def positions(text: str) -> ast.Positions:
    """The tree of a position expression."""
    file = tree(f"experiment e {{ patch resid_post layer 0 at {text} }}")
    (experiment,) = (s for s in file.statements if isinstance(s, ast.ExperimentDef))
    (rule,) = (s for s in experiment.statements if isinstance(s, ast.Rule))
    assert isinstance(rule.body, ast.Patch)
    return rule.body.at


def metric_text(text: str) -> ast.Expr:
    """The tree of T in `logit(T)`."""
    file = tree(f"metric m = logit({text})")
    (metric,) = (s for s in file.statements if isinstance(s, ast.MetricDef))
    assert isinstance(metric.value, ast.Call)
    value = metric.value.arguments[0].value
    assert not isinstance(value, ast.Range | ast.Quantity | ast.Site)
    return value


def cells(
    text: str, made: PromptTable, tokenizer: TextTokenizer, run: str = "clean", **options: Any
) -> tuple[PositionCell, ...]:
    """The cells of a position expression, without errors."""
    found, diagnostics = resolve_positions(
        positions(text), made, run, tokenizer=tokenizer, **options
    )
    assert not has_errors(diagnostics), [(d.code, d.message, d.help_text) for d in diagnostics]
    return found


def hit(made: PromptTable, cell: PositionCell, row: int = 0, run: str = "clean") -> list[list[str]]:
    """Texts of the tokens that a cell selects in a row: a list per contiguous group."""
    own = made.runs[run].rows[row]
    return [[own.text[slice(*own.offsets[p])].strip() for p in tokens] for tokens in cell.hits[row]]
