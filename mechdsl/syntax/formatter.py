"""The canonical text of a file, for `mechdsl fmt`.

Indentation is two spaces per brace; each statement is on its own line; words are separated by one
space. At most one of several consecutive blank lines remains, and none at either end of a block.
A statement of several lines has a blank line before and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mechdsl.base.text import Source
from mechdsl.syntax import ast
from mechdsl.syntax.frontend import parse
from mechdsl.syntax.printer import (
    format_header,
    format_line,
    format_names,
    format_site_map,
    format_values,
    statement_body,
)
from mechdsl.syntax.tree_builder import RegisteredWords

MAX_WIDTH = 100


class FormatError(RuntimeError):
    """An internal error: the formatted text parses to a different tree."""


def format_file(tree: ast.File, words: RegisteredWords) -> str:
    """Format a file without syntax errors, including every comment.

    Args:
        words: The words that the file was parsed with.

    Raises:
        FormatError: If the result doesn't parse to the same tree with the same comments.
    """
    comments = sorted(tree.comments, key=lambda c: c.span.start)
    lines = _Writer().block(tree.statements, comments, 0)
    text = "".join(f"{text}\n" for text in lines)
    _check(tree, text, words)
    return text


def _check(tree: ast.File, text: str, words: RegisteredWords) -> None:
    again, problems = parse(Source(text), words)
    if again.statements != tree.statements or (problems and tree.statements):
        raise FormatError("the formatted file is not the same program; please report this")
    if sorted(c.text for c in again.comments) != sorted(c.text for c in tree.comments):
        raise FormatError("a comment was lost in formatting; please report this")


@dataclass
class _Item:
    """A statement with the comment after it, or a comment on separate lines."""

    node: ast.Node
    lines: list[str]
    start: int
    end: int
    is_comment: bool = False

    @property
    def tall(self) -> bool:
        return len(self.lines) > 1


@dataclass
class _Placed:
    """Positions of the comments of one statement."""

    before: list[ast.Comment] = field(default_factory=list[ast.Comment])
    inside: list[ast.Comment] = field(default_factory=list[ast.Comment])
    trailing: list[ast.Comment] = field(default_factory=list[ast.Comment])


class _Writer:
    def block(
        self, nodes: Sequence[ast.Node], comments: Sequence[ast.Comment], depth: int
    ) -> list[str]:
        """Format the statements and comments of one block."""
        items: list[_Item] = []
        used = 0
        for i, node in enumerate(nodes):
            following = nodes[i + 1].span.start if i + 1 < len(nodes) else None
            placed, used = _place(node, comments, used, following)
            items += [_comment_item(c, depth) for c in placed.before]
            items.append(self._statement(node, placed, depth))
        items += [_comment_item(c, depth) for c in comments[used:]]
        return _spaced(items, depth)

    def _statement(self, node: Any, placed: _Placed, depth: int) -> _Item:
        trailing = "".join(f"  {c.text}" for c in placed.trailing)
        lines = self._lines(node, placed.inside, depth)
        lines[-1] += trailing
        end = max([node.span.end, *(c.span.end for c in placed.trailing)])
        return _Item(node, lines, node.span.start, end)

    def _lines(self, node: Any, inside: list[ast.Comment], depth: int) -> list[str]:
        indent = "  " * depth
        head = format_header(node)
        if head is None:
            return _fitted(node, indent + format_line(node), indent)
        flat = indent + _flat(node)
        written = node.span.text
        if written and "\n" not in written and not inside and len(flat) <= MAX_WIDTH:
            return [flat]
        nodes = statement_body(node)
        opening = inside[:1]
        if not opening or opening[0].own_line or not _after_brace(node, nodes, opening[0]):
            opening = []
        rest = inside[len(opening) :]
        first = f"{indent}{head} {{" + "".join(f"  {c.text}" for c in opening)
        if not nodes and not rest and not opening:
            return [f"{indent}{head} {{}}"]
        return [first, *self.block(nodes, rest, depth + 1), f"{indent}}}"]


def _place(
    node: ast.Node, comments: Sequence[ast.Comment], used: int, following: int | None
) -> tuple[_Placed, int]:
    """Assign comments, from number `used` on, to a statement.

    Returns:
        The comments and the number of the first comment that belongs to a later statement.
    """
    placed = _Placed()
    span = node.span
    opening = _brace(node) if format_header(node) is not None else span.end
    while used < len(comments) and comments[used].span.start < span.end:
        comment = comments[used]
        (placed.before if comment.span.start < opening else placed.inside).append(comment)
        used += 1
    if used < len(comments):
        comment = comments[used]
        at = comment.span.start
        alone = following is None or at < following
        if alone and not comment.own_line and "\n" not in span.source.text[span.end : at]:
            placed.trailing.append(comment)
            used += 1
    return placed, used


def _brace(node: Any) -> int:
    """Return the offset of the brace that opens the lines of a statement."""
    text: str = node.span.source.text
    start: int = node.span.start
    nodes = statement_body(node)
    if isinstance(node, ast.For):
        start = node.domain.span.end
    elif isinstance(node, ast.ModelDef):
        start = node.source.span.end
    elif not isinstance(node, ast.Chat):
        start = node.name.span.end
    end = nodes[0].span.start if nodes else node.span.end
    position = start
    while position < end:
        if text[position] == "#":
            position = text.find("\n", position)
        elif text[position] == "{":
            return position
        position += 1
    return node.span.start


def _after_brace(node: ast.Node, nodes: Sequence[ast.Node], comment: ast.Comment) -> bool:
    """Whether a comment follows the brace on the same line."""
    if nodes and nodes[0].span.start < comment.span.start:
        return False
    between = node.span.source.text[_brace(node) + 1 : comment.span.start]
    return not between.strip() and "\n" not in between


def _comment_item(comment: ast.Comment, depth: int) -> _Item:
    text = "  " * depth + comment.text
    return _Item(comment, [text], comment.span.start, comment.span.end, is_comment=True)


def _spaced(items: list[_Item], depth: int) -> list[str]:
    """Join the lines of the items, with blank lines where the format requires them."""
    lines: list[str] = []
    before: _Item | None = None
    for item in items:
        if before is not None and _blank_between(before, item, depth):
            lines.append("")
        lines += item.lines
        before = item
    return lines


def _blank_between(before: _Item, item: _Item, depth: int) -> bool:
    text = item.node.span.source.text[before.end : item.start]
    if text.count("\n") > 1 and any(not part.strip() for part in text.split("\n")[1:-1]):
        return True
    if depth > 0:
        return False
    if isinstance(before.node, ast.Version):
        return True
    return not before.is_comment and (before.tall or (item.tall and not item.is_comment))


def _flat(node: Any) -> str:
    """Format a statement on one line, including its braces."""
    head = format_header(node)
    if head is None:
        return format_line(node)
    nodes = statement_body(node)
    return f"{head} {{ {' '.join(map(_flat, nodes))} }}" if nodes else f"{head} {{}}"


def _fitted(node: Any, text: str, indent: str) -> list[str]:
    """Format a line; break up a list at its end if the line would be too long."""
    if len(text) <= MAX_WIDTH:
        return [text]
    match node:
        case ast.DomainDef(domain=ast.Domain(values=ast.ListLiteral() as items, step=None)):
            head = f"{format_names(node.names)} in "
        case ast.ValueDef(value=ast.ListLiteral() as items):
            head = f"{format_names(node.names)} = "
        case ast.Param(value=ast.ListLiteral() as items):
            head = f"param {node.name.id} = "
        case ast.CircuitDef(edges=edges) if len(edges) > 1:
            head = indent + format_line(replace(node, edges=()))
            lines = ",\n".join(f"{indent}  {format_site_map(edge)}" for edge in edges)
            return [head, *lines.split("\n")]
        case _:
            return [text]
    broken = [f"{indent}  {format_values(item)}," for item in items.items]
    return [f"{indent}{head}[", *broken, f"{indent}]"]
