"""Names inside a prompts block that nothing refers to."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.w07_names import UnusedName
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def unused_in_blocks(tree: ast.File) -> list[Diagnostic]:
    """W0730 for runs of experiments, and for texts, spans and corruptions of the file's own blocks
    (`answer` aside: accuracies and explanations read it). Values are looked at where rows are made
    of them."""
    defined = [
        (kind, name)
        for block in tree.statements
        if isinstance(block, ast.PromptsDef)
        for kind, name in _definitions(block)
    ]
    defined += [
        ("run", line.name)
        for experiment in tree.statements
        if isinstance(experiment, ast.ExperimentDef)
        for line in experiment.statements
        if isinstance(line, ast.RunDef)
    ]
    definers = {id(name) for _, name in defined}
    python = any(isinstance(node, ast.Call) and node.name == "python" for node in walk(tree))
    used = {word for node in walk(tree) if id(node) not in definers for word in _mentioned(node)}
    return [
        UnusedName(span=name.span, kind=kind, name=name.id)
        for kind, name in defined
        if name.id not in used and not (python and kind == "text")  # a metric may read any of them
    ]


def pools_named(tree: ast.File) -> Iterator[str]:
    """What stands behind `from:` in blocks: a column, or a block whose records a list draws."""
    for block in tree.statements:
        if isinstance(block, ast.PromptsDef):
            for node in walk(block):
                if isinstance(node, ast.Argument) and node.name == "from":
                    yield from (part.id for part in walk(node.value) if isinstance(part, ast.Name))


def _definitions(block: ast.PromptsDef) -> Iterator[tuple[str, ast.Name]]:
    for line in block.lines:
        match line:
            case ast.Text(name=name) if name.id != "answer":
                yield "text", name
            case ast.SpanDef(name=name, within=None):
                yield "span", name
            case ast.Corrupt(name=name):
                yield "corruption", name
            case _:
                pass


def _mentioned(node: ast.Node) -> Iterator[str]:
    """Every word of a node that may be a name."""
    match node:
        case ast.Name(id=word):
            yield word
        case ast.Ref(name=word, part=part):
            yield from (name for name in (word, part) if name is not None)
        case ast.Attribute(name=word, attribute=part):
            yield from (word, part)
        case ast.OfRef(name=word):
            yield word
        case ast.Index(name=word):
            yield word
        case ast.SpanRef(name=name, of=of):
            yield from (word for word in (name, of) if word is not None)
        case ast.String(value=text):
            for inside in re.findall(r"\{([^{}]*)\}", text):
                yield from re.findall(r"\w+", inside)
        case _:
            pass
