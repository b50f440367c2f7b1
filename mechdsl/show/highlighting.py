"""Syntax highlighting of `.mech` files: the words of each category, and a Pygments lexer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from pygments.lexer import RegexLexer, words
from pygments.token import Comment, Keyword, Name, Number, Operator, Punctuation, String, Whitespace

from mechdsl.syntax.parser_tables import grammar_file
from mechdsl.syntax.words import CLAUSE_WORDS, DATA_WORDS, EXPERIMENT_WORDS, SOFT_WORDS, TOP_WORDS
from mechdsl.vocab.corruptions import CHANGES, change_signatures
from mechdsl.vocab.metrics import EFFECTS, METRICS
from mechdsl.vocab.reports import REPORTS
from mechdsl.vocab.sites import SITES

_COMMENT = re.compile(r"^\s*//.*$", re.M)
_LITERAL = re.compile(r'"([a-z]+)"')


def statement_words() -> list[str]:
    """Return the words that begin a statement or a line, sorted."""
    begins = TOP_WORDS | DATA_WORDS | EXPERIMENT_WORDS | SOFT_WORDS | set(change_signatures())
    return sorted(begins - CLAUSE_WORDS)


def clause_words() -> list[str]:
    """Return every other word of the grammar, sorted."""
    grammar = _COMMENT.sub("", grammar_file().read_text(encoding="utf-8"))
    return sorted((CLAUSE_WORDS | set(_LITERAL.findall(grammar))) - set(statement_words()))


def registered_names() -> list[str]:
    """Return the names of sites, metrics, effects, reports and changes, sorted."""
    registries = (SITES, METRICS, EFFECTS, REPORTS, CHANGES)
    names = {name for registry in registries for name, _ in registry.items()}
    return sorted(names - set(statement_words()) - set(clause_words()))


class MechLexer(RegexLexer):
    """The Pygments lexer of `.mech` files."""

    name = "mech"
    aliases: ClassVar[Sequence[str]] = ["mech", "mechdsl"]
    filenames: ClassVar[Sequence[str]] = ["*.mech"]
    url = "https://example.org/mechdsl"
    tokens: ClassVar[dict[str, list[Any]]] = {
        "root": [
            (r"\s+", Whitespace),
            (r"#[^\n]*", Comment.Single),
            (r'"([^"\\\n]|\\[^\n])*"', String.Double),
            (r"[0-9]+(\.[0-9]+)?%", Number),
            (r"[0-9]+\.[0-9]+([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+", Number.Float),
            (r"[0-9]+", Number.Integer),
            (r"L[0-9]+([HN][0-9]+(\.[A-Za-z_]\w*)?|\.[A-Za-z_]\w*)(?!\w)", Name.Constant),
            (r"[A-Za-z_]\w*(?=\s*:)", Name.Attribute),
            (words(statement_words(), prefix=r"\b", suffix=r"\b"), Keyword),
            (words(clause_words(), prefix=r"\b", suffix=r"\b"), Keyword.Pseudo),
            (words(registered_names(), prefix=r"\b", suffix=r"\b"), Name.Builtin),
            (r"[A-Za-z_]\w*", Name),
            (r"->|\.\.|<=|>=|!=|[-+*/=<>]", Operator),
            (r"[{}()\[\],.:|]", Punctuation),
        ]
    }
