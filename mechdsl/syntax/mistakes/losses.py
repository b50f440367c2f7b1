"""What is missing from the tree because its statement can't be read."""

from __future__ import annotations

import re
from itertools import pairwise

from mechdsl.base.registry import nearest
from mechdsl.base.source import Span
from mechdsl.syntax import ast
from mechdsl.syntax.mistakes.messages import Mistake
from mechdsl.syntax.mistakes.pieces import first_words

_PLACEHOLDER = re.compile(r"\{\s*([A-Za-z_]\w*)")
_MADE = {"split": ("train", "test"), "answer": ("answer",), "wrong": ("wrong",)}
"""Names that a line makes without writing them as names."""


def lost_with(mistake: Mistake) -> ast.Lost:
    """The statement as one that is lost, with the names that it may have defined: of whatever is
    written like a definition, for the word that says so may be the one that is wrong."""
    words = mistake.statement
    names: set[str] = set()
    if mistake.kind == "experiment_lines":  # names of loops, of runs, of what is observed
        begin = ("for", "run", "as")
        names.update(after.text for word, after in pairwise(words) if word.text in begin)
    elif words:
        known = first_words(mistake.kind)
        begins = words[0].text in known
        meant = words[0].text if begins else nearest(words[0].text, known)
        if meant is not None:
            names.update(_MADE.get(meant, ()))
        elif len(words) == 1 or words[1].text not in ("=", "in", ","):  # any of them is meant
            names.update(*_MADE.values())
        names.update(piece.text for piece in words[begins:2] if piece.kind == "word")
        listed: list[str] = []
        for piece in words[begins:]:
            if piece.text in ("=", "in"):
                names.update(listed)
            if piece.kind == "word":
                listed.append(piece.text)
            elif piece.text != ",":
                listed.clear()
            if piece.kind == "string":
                names.update(_PLACEHOLDER.findall(piece.text))
    span = Span(mistake.source, mistake.begin, mistake.end)
    return ast.Lost(frozenset(names), span=span)
