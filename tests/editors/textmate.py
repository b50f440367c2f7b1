"""The TextMate grammar of `editors/vscode`, built from the words of the language."""

from __future__ import annotations

import json
from pathlib import Path

from mechdsl.show.highlighting import clause_words, registered_names, statement_words

EXTENSION = Path(__file__).parents[2] / "editors" / "vscode"
GRAMMAR = EXTENSION / "syntaxes" / "mech.tmLanguage.json"


def textmate_grammar() -> str:
    """Return the grammar as JSON text."""
    patterns = [
        {"name": "comment.line.number-sign.mech", "match": "#.*$"},
        {
            "name": "string.quoted.double.mech",
            "begin": '"',
            "end": '"',
            "patterns": [
                {"name": "constant.character.escape.mech", "match": r"\\."},
                {"name": "variable.other.placeholder.mech", "match": r"\{[^{}\"]*\}"},
            ],
        },
        {
            "name": "constant.other.site.mech",
            "match": r"\bL[0-9]+([HN][0-9]+(\.[A-Za-z_]\w*)?|\.[A-Za-z_]\w*)\b",
        },
        {"name": "constant.numeric.mech", "match": r"\b[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?%?"},
        {"name": "variable.parameter.mech", "match": r"\b[A-Za-z_]\w*(?=\s*:)"},
        {"name": "keyword.control.mech", "match": _alternatives(statement_words())},
        {"name": "keyword.other.mech", "match": _alternatives(clause_words())},
        {"name": "support.function.mech", "match": _alternatives(registered_names())},
        {"name": "keyword.operator.mech", "match": r"->|\.\.|<=|>=|!=|[-+*/=<>]"},
    ]
    grammar = {"name": "mech", "scopeName": "source.mech", "patterns": patterns}
    return json.dumps(grammar, indent=2) + "\n"


def _alternatives(names: list[str]) -> str:
    return rf"\b({'|'.join(names)})\b"
