"""`observe successor(" one", " two", " three") at layer * head *`: does a head count on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from mechdsl.diagnostics.e02_names import BadArgument
from mechdsl.program import spec
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved_rule import ResolvedRule
from mechdsl.rules.observations.lenses import unembeds
from mechdsl.rules.observations.over_rows import refuse
from mechdsl.rules.observations.registry import observation
from mechdsl.rules.observations.weights import OfWeights
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import Form

FEWEST = 3
"""Texts: of two there is no other to be ranked behind the successor."""


@observation("successor", unit="share")
class Successor(OfWeights):
    """The share of texts whose next one a head raises most, of all that are listed.

    Token embedding → norm and MLP of the first block → OV → final norm's gain → unembedding. Beside
    it stands the mean rank of the next one, 1 where it is raised most.
    source: Gould et al. 2023, arXiv 2312.09230, section 2
    """

    takes: ClassVar = ("arguments",)
    controls: ClassVar[tuple[str, ...]] = ("rank",)
    folded: ClassVar = (
        "through the first block's MLP behind its own norm, then gains of norms, without scales "
        "and biases"
    )

    def __init__(self, tokens: Sequence[int] = (), texts: Sequence[str] = ()) -> None:
        """Each is followed by the next; none only of the entry."""
        self.tokens, self.texts = tuple(tokens), tuple(texts)

    def form_of(self, name: str) -> Form:
        if name == "rank":
            return replace(self.form, unit="rank", meaning="Its mean rank")
        return super().form_of(name)

    def resolve(self, rule: spec.Rule, work: Work) -> ResolvedRule | None:
        there = unembeds(rule, work)
        found = super().resolve(rule, work)
        tokens = _tokens(rule, work)
        if found is None or tokens is None or not there:
            return None
        assert rule.observed is not None
        assert rule.observed.call is not None
        texts = [each.value.span.written for each in rule.observed.call.arguments]
        return replace(found, does=Successor(tokens, texts))

    def said(self) -> Iterator[str]:
        yield f"of {', '.join(self.texts[:8])}" + (", …" if len(self.texts) > 8 else "")
        yield "`rank` is the mean rank of the next one, from 1"


def _tokens(rule: spec.Rule, work: Work) -> list[int] | None:
    """Of each text, without a prompt in front; None after an error. Code: E0207."""
    said, tokenizer = rule.observed, work.model.tokenizer
    assert said is not None
    arguments = () if said.call is None else said.call.arguments
    texts = [each.value for each in arguments if each.name is None]
    strings = [each for each in texts if isinstance(each, ast.String)]
    if len(strings) < len(arguments) or len({each.value for each in strings}) < FEWEST:
        reason = f"takes at least {FEWEST} different texts, each followed by the next"
        refuse(rule, work, reason, 'write `successor(" one", " two", " three")`')
        return None
    found: list[int] = []
    for text in strings:
        ids = tokenizer.encode(text.value, add_special=False).ids
        if len(ids) != 1 and not tokenizer.stands_in:
            pieces = " ".join(f"`{tokenizer.token_text(one)}`" for one in ids)
            reason, hint = f"has several tokens: {pieces}", "name texts of one token"
            name = text.span.written
            problem = BadArgument(span=text.span, name=name, reason=reason, hint=hint)
            work.diagnostics.append(problem)
            return None
        found += ids[:1]
    return found
