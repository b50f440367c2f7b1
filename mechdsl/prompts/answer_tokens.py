"""The answer's tokens as positions: those of the text that a measure has behind the prompt."""

from __future__ import annotations

from mechdsl.base.record import Record, record
from mechdsl.syntax import ast
from mechdsl.syntax.walk import walk

ANSWER = "answer"
"""Names them, whichever text of a measure it is."""


@record
class AnswerTokens(Record):
    """The texts that stand behind the prompts, each in passes of its own; or why there are none.

    A text has the same tokens behind the prompts of every run.
    """

    texts: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(the text as a measure names it, how many tokens it is in each row)."""
    reason: str = "only rules of an experiment act on them"
    hint: str = "name a position of the prompt"

    def longest(self, row: int) -> int:
        """Tokens of the longest text of a row."""
        return max((lengths[row] for _, lengths in self.texts), default=0)

    def uneven(self) -> list[int]:
        """The rows whose texts differ in length."""
        every = zip(*(lengths for _, lengths in self.texts), strict=True)
        return [n for n, row in enumerate(every) if len(set(row)) > 1]


NO_ANSWERS = AnswerTokens()


def names_answer(node: ast.Node | None) -> bool:
    """Whether a position may name tokens of the answer."""
    return any(
        (isinstance(part, ast.SpanRef) and part.name == ANSWER)
        or (isinstance(part, ast.Position) and part.and_answer)
        for part in walk(node)
    )
