"""The forms of statements agree with the grammar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from mechdsl.base.text import Source
from mechdsl.syntax import ast
from mechdsl.syntax import parser as engine
from mechdsl.syntax.forms import FORMS, Form, FormField, FormPart, iter_parts
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.printer import format_header, format_line
from mechdsl.syntax.tree_builder import RegisteredWords, TreeBuilder
from mechdsl.vocab.corruptions import change_signatures

WITH_NUDGE = RegisteredWords(verbs={"nudge": ""}, changes=change_signatures())
"""The words of changes, and a verb of a plugin."""

SAMPLES = {
    "axis": "layer 2",
    "axis_value": "3..5",
    "block": "{ }",
    "call": "random(39)",
    "call_or_name": "chosen(a: 1)",
    "columns": "width 2 columns",
    "condition": "a > 1 and not b",
    "count": "20",
    "direction": "d[best of chosen]",
    "domain": "1..9 step 2",
    "edge": "attention layer * head * from last token to token 0",
    "edges": "embed -> L0H1.q at last token, L0H1 -> logits",
    "expr": "if a then 1 else 2",
    "flag": "",
    "further": ", mean by kind, zero",
    "integer": "7",
    "maps": "caap, 0.5 * taken(a: 1)",
    "name": "chosen",
    "names": "one, two",
    "new": "made",
    "new_names": "x, y",
    "nodes": "heads, mlps, features of f",
    "number_or_name": "0.7",
    "observed": "norm",
    "other_features": "with features 3, 12 of f",
    "percent": "25%",
    "picks": "top 20, random 20",
    "position": "last token",
    "positions": "token 0, 3, last token",
    "ref": "p.train",
    "refs": "p.train, q",
    "region": "object_a",
    "site": "resid_post layer 3",
    "sites": "L1H2, mlp_out layer 2",
    "string": '"x.txt"',
    "sum": "a + 2 * b",
    "training": "fit(mask(size: 3), prompts: p.train)",
    "written": "value(mlp_out layer 2) of fewer",
}
WORDS = {
    ast.ChatTurn: ("user",),
    ast.PromptsDef: ("prompts", "images"),
    ast.UsePrompts: ("prompts", "images"),
    ast.BasisDef: ("basis", "lens"),
    ast.RegisteredRule: ("to", "by"),
    ast.Pick: ("top",),
}
PARTS = {ast.ChatTurn, ast.Fill, ast.GenerationSetting, ast.Pick}
"""Statements that occur only inside others and are tested with them."""
SHARED = {"of_run", "as_name", "saved_as", "by", "measured_at"}
"""Clauses that methods read too."""
LOOKAHEAD = {
    "ALLOW": "allow",
    "ALL_BUT": "all but",
    "CIRCUIT": "circuit",
    "FROZEN": "frozen norms",
    "TRAINED": "lens",
    "RENUMBER": "renumber",
    "RUN": "run",
    "SAVE": "save",
}
"""Words that the lexer recognises by the following text, by terminal."""
PLACES = {
    "top": "mech 1\n{}",
    "data": "mech 1\nprompts p {{\n{}\n}}",
    "changes": "mech 1\nprompts p {{ corrupt c {{\n{}\n}} }}",
    "experiment": "mech 1\nexperiment e {{\n{}\n}}",
}


def sentences(parts: Sequence[FormPart], node: type[Any]) -> Iterator[str]:
    """Iterate over texts of a form, with each choice of its groups."""
    choices: list[list[str]] = []
    for part in parts:
        if isinstance(part, str):
            choices.append([part])
        elif isinstance(part, FormField):
            fixed = {"word": WORDS.get(node, ()), "word_itself": (part.name,), "flag": (part.name,)}
            choices.append([*fixed.get(part.kind, (SAMPLES.get(part.kind, ""),))])
        else:
            some = [text for each in part.alternatives for text in sentences(each, node)]
            choices.append([*some, ""] if part.optional else some)
    for texts in product(*choices):
        yield " ".join(text for text in texts if text).replace(" ,", ",")


def parsed(text: str, node: type[Any]) -> list[ast.Node]:
    """Parse a statement in each place, and return those of the class."""
    found: list[ast.Node] = []
    for place in PLACES.values():
        tree, problems = parse(Source(place.format(text)), WITH_NUDGE)
        if not problems and len(tree.statements) == 2:
            found += [each for each in inside(tree.statements[1]) if type(each) is node]
    return found


def inside(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lines", "statements", "changes", "body", "turns"):
        for each in getattr(node, name, ()) if name != "body" or isinstance(node, ast.For) else ():
            yield from inside(each)
    if isinstance(node, ast.Rule):
        yield node.body


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.node.__name__)
def test_each_sentence_of_a_form_is_parsed_and_printed(
    form: Form,
) -> None:
    if form.node in PARTS:
        return
    for text in sentences(form.parts, form.node):
        if form.node is ast.RegisteredRule:
            text = text.replace("chosen", "nudge", 1)
        if form.node is ast.Observe and " at resid_post" in text:
            text = text.replace("norm at", "probe(count) at")
        if form.node is ast.DomainDef:
            text = text.replace("x, y", "x")
        if form.node is ast.Chat:
            text = text.replace("{ }", '{ user "x" }')
        found = parsed(text, form.node)
        assert found, text
        head = format_header(found[0])
        again = format_line(found[0]) if head is None else f"{head} {text[len(head) + 1 :]}"
        assert again == text


def grammar() -> dict[str, list[tuple[Any, ...]]]:
    """Rules by name or alias, with their expansions."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for rule in engine.load_parser().rules:
        found.setdefault(str(rule.alias or rule.origin.name), []).append(tuple(rule.expansion))
        if rule.alias:
            renamed = SimpleNamespace(name=rule.alias, is_term=False)
            found.setdefault(rule.origin.name, []).append((renamed,))
    return found


GRAMMAR = grammar()


def symbols(rule: str, seen: frozenset[str] = frozenset()) -> set[str]:
    """Terminals and built rules that a rule consists of, through rules without a method."""
    found: set[str] = set()
    for expansion in GRAMMAR[rule]:
        for symbol in expansion:
            name = str(symbol.name)
            built = hasattr(TreeBuilder, name) and name not in SHARED
            if symbol.is_term or built or name in seen:
                found.add(name)
            else:
                found |= symbols(name, seen | {rule, name})
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.node.__name__)
def test_form_has_the_words_of_its_grammar_rule(form: Form) -> None:
    keywords = {name: " ".join(word.split()) for name, word in engine.keywords().items()}
    keywords |= LOOKAHEAD
    written = {part for part in iter_parts(form.parts) if isinstance(part, str)}
    written |= {
        part.name
        for part in iter_parts(form.parts)
        if isinstance(part, FormField) and part.kind in ("flag", "word_itself")
    }
    words = {keywords[name] for rule in form.rules for name in symbols(rule) if name in keywords}
    of_fields = {*WORDS.get(form.node, ()), ",", "{", "}"}
    assert words - written <= of_fields
    assert written <= words


def test_clauses_of_forms_are_read_only_by_forms() -> None:
    """Rules without a method are read only by forms."""
    lark: Any = engine.load_parser()
    inlined = {str(rule.origin.name) for rule in lark.rules if rule.options.expand1 or rule.alias}
    of_forms = {rule for form in FORMS.values() for rule in form.rules}
    bare = {
        name
        for name in GRAMMAR
        if not name.startswith("_") and name not in inlined and not hasattr(TreeBuilder, name)
    }
    seen = {
        (rule, symbol.name)
        for rule, expansions in GRAMMAR.items()
        for expansion in expansions
        for symbol in expansion
        if symbol.name in bare and rule not in of_forms and not rule.startswith("_")
    }
    assert {rule for rule, _ in seen} <= bare
