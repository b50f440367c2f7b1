"""The LALR parser, and the lexer that goes with it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from lark import Lark, Token
from lark.common import LexerConf
from lark.exceptions import UnexpectedCharacters
from lark.grammar import NonTerminal, Rule, RuleOptions, Terminal
from lark.lexer import Lexer, PatternStr, TerminalDef
from lark.parsers.lalr_analysis import IntParseTable, Reduce, Shift
from lark.parsers.lalr_parser import (
    LALR_Parser,
    _Parser,  # pyright: ignore[reportPrivateUsage]
)

from mechdsl.base.garbage import uncollected
from mechdsl.syntax.parser_tables import load_tables
from mechdsl.syntax.reserved import CHANGE_WORDS
from mechdsl.syntax.transform import ToAst
from mechdsl.syntax.verbs import VERBS

CONTEXTUAL_PRIORITY = 3
"""Terminals of this priority and above are read only where the parser accepts them."""


class MechLexer(Lexer):
    """Lark's contextual lexer with four differences, none of which changes a right file.

    Literals, names and punctuation are read wherever they stand, so that a wrong one reaches the
    parser and its message names the word; a keyword is only ever a whole word; one regular
    expression serves all states, which saves compiling one for each. Words that the grammar itself
    doesn't have are looked up: of changes in `CHANGE_WORDS`, of rules in `VERBS`. Where a name can
    stand too, such a verb begins a rule only as the first word of its line.
    """

    def __init__(
        self,
        conf: LexerConf,
        states: dict[int, Collection[str]],
        always_accept: Collection[str] = (),
    ) -> None:
        terminals: list[TerminalDef] = sorted(
            conf.terminals, key=lambda t: (-t.priority, -t.pattern.max_width, -len(t.pattern.value))
        )
        self.ignored = frozenset(conf.ignore)
        words = {t.pattern.value: t.name for t in terminals if t.pattern.value.isalpha()}
        self.words = words
        names = set(words.values())
        plain = [t for t in terminals if t.priority < CONTEXTUAL_PRIORITY and t.name not in names]
        self.contextual = [
            (t.name, re.compile(t.pattern.to_regexp()).match)
            for t in terminals
            if t.priority >= CONTEXTUAL_PRIORITY
        ]
        self.match = re.compile(
            "|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in plain)
        ).match
        self.states = states

    def lex(self, lexer_state: Any, parser_state: Any) -> Iterator[Token]:
        text: str = lexer_state.text.text
        position: int = lexer_state.text.start
        end: int = lexer_state.text.end
        while position < end:
            found = self.match(text, position)
            if found is None:
                raise UnexpectedCharacters(text, position, 0, 0, state=parser_state)
            kind = found.lastgroup
            if kind in self.ignored:
                position = found.end()
                continue
            if kind == "NAME":
                accepted = self.states[parser_state.position]
                for name, match in self.contextual:
                    if name in accepted and (special := match(text, position)):
                        kind, found = name, special
                        break
                else:
                    word = found.group()
                    keyword = self.words.get(word)
                    if keyword in accepted:
                        kind = keyword
                    elif word in CHANGE_WORDS and "CHANGE" in accepted:
                        kind = "CHANGE"
                    elif word in VERBS and "VERB" in accepted:
                        alone = "NAME" not in accepted or _first_of_line(text, position)
                        alone = alone or "STAR" in accepted  # behind a span, no number's name
                        kind = "VERB" if alone else kind
            start, position = position, found.end()
            token = Token(kind or "", found.group(), start, end_pos=position)
            lexer_state.last_token = token
            yield token


def _first_of_line(text: str, position: int) -> bool:
    return not text[text.rfind("\n", 0, position) + 1 : position].strip()


class MechParser(LALR_Parser):
    """Lark's parser, made of saved tables in half the time: a rule is looked up once, not in each
    of the twenty thousand places where it is reduced."""

    @classmethod
    def deserialize(cls, data: Any, memo: Any, callbacks: Any, debug: bool = False) -> MechParser:
        tokens = data["tokens"]
        reductions = {number: (Reduce, rule) for number, rule in memo.items()}
        states = {
            state: {
                tokens[token]: reductions[target["@"]] if reduces else (Shift, target)
                for token, (reduces, target) in actions.items()
            }
            for state, actions in data["states"].items()
        }
        made = cls.__new__(cls)
        made._parse_table = IntParseTable(states, data["start_states"], data["end_states"])
        made.parser = _Parser(made._parse_table, callbacks, debug)
        return made


@cache
def parser() -> Lark:
    """The parser of this process, made at its first use."""
    loader: Any = Lark
    with uncollected():
        tables = load_tables()
        return loader._load_from_dict(
            tables["data"],
            _objects(tables["memo"]),
            transformer=ToAst(),
            _plugins={"ContextualLexer": MechLexer, "LALR_Parser": MechParser},
        )


def _objects(memo: Mapping[int, Any]) -> dict[int, Rule | TerminalDef]:
    """The rules and terminals of saved tables, which lark then takes as they are.

    Lark would look up the class and the fields of each symbol again, in each of the thousands of
    places where it occurs; here equal symbols and options become one object.
    """
    kinds: dict[str, Any] = {
        each.__name__: each for each in (Terminal, NonTerminal, RuleOptions, TerminalDef)
    }
    made: dict[int, Any] = {}

    def part(saved: Any) -> Any:
        # By identity: `from_json` gives equal parts as one dictionary.
        if id(saved) not in made:
            made[id(saved)] = kinds[saved["__type__"]].deserialize(saved, {})
        return made[id(saved)]

    return {
        number: Rule(
            part(saved["origin"]),
            list(map(part, saved["expansion"])),
            saved["order"],
            saved["alias"],
            part(saved["options"]),
        )
        if saved["__type__"] == "Rule"
        else part(saved)
        for number, saved in memo.items()
    }


@cache
def keywords() -> dict[str, str]:
    """The words and signs of the language, by the names the parser gives them."""
    return {
        terminal.name: terminal.pattern.value
        for terminal in parser().terminals
        if isinstance(terminal.pattern, PatternStr)
    }
