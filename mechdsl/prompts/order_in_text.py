"""Which of two positions comes first, as far as any tokenizer would agree."""

from __future__ import annotations

from mechdsl.prompts.prompt_table import PromptTable
from mechdsl.prompts.tokenizer import TextTokenizer
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk


def by_text(*positions: ast.Node) -> bool:
    """Whether positions are found by what is written, and by no count of tokens."""
    return not any(map(_counted, walk(positions)))


def _counted(node: ast.Node) -> bool:
    match node:
        case ast.Point():
            return bool(node.offset)
        case ast.TokenIndex():
            return node.high is not None or node.low not in (None, 0, -1)
        case _:
            return isinstance(node, ast.RankedTokens)


def behind(
    low: int, high: int, row: int, table: PromptTable, run: str, tokenizer: TextTokenizer
) -> bool:
    """Whether token `low` of a row lies behind its token `high`. Where words stand in for tokens,
    there has to be white space between them: a tokenizer may join what touches."""
    if low <= high or not tokenizer.stands_in:
        return low > high
    ids = table.runs[run].rows[row].ids[high + 1 : low + 1]
    return any(tokenizer.token_text(token)[:1].isspace() for token in ids)
