"""Rules on edges of attention: which layers and heads, from which queries to which keys."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from mechdsl.diagnostics.e02_names import UnknownWord, did_you_mean
from mechdsl.diagnostics.e03_rules import BadEdit
from mechdsl.program import spec
from mechdsl.prompts.table import PositionCell
from mechdsl.resolve.amounts import resolve_amounts
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved import (
    Amounts,
    EdgeKind,
    EdgeTargets,
    Fill,
    PositionTargets,
    ResolvedRule,
)
from mechdsl.resolve.sites import attention_sites
from mechdsl.resolve.targets import plain_targets, sweeps
from mechdsl.syntax import ast

UNIFORM = "uniform"


def resolve_edge_rule(rule: spec.Rule, work: Work) -> ResolvedRule | None:
    """`block`, `reweight`, `set`, `observe attention … from Q to K`; None after an error."""
    assert rule.edge is not None
    assert rule.onto is not None
    sites, axes = attention_sites(rule.edge, work.sites)
    for axis in axes:
        work.add_axis(axis)
    both = sweeps(rule.at, work) and sweeps(rule.onto, work)
    queries = plain_targets(rule.at, work, "from_position" if both else "position")
    keys = plain_targets(rule.onto, work)
    kind, amounts = _kind(rule, work)
    if sites is None or queries is None or keys is None or kind is None:
        return None
    if amounts is not None and not _possible(rule, kind, amounts, keys, work):
        return None
    if work.sites.shape.causal and not _anything_seen(rule, queries, keys, work):
        return None
    if (
        kind == "block"
        and work.sites.shape.causal
        and not _something_left(rule, queries, keys, work)
    ):
        return None
    fill: Fill = "observe" if kind == "observe" else "edge"
    return ResolvedRule(
        spec=rule,
        fill=fill,
        run=work.experiment.base,
        sites=sites,
        positions=queries,
        amounts=amounts,
        edge=EdgeTargets(kind, keys),
    )


def _kind(rule: spec.Rule, work: Work) -> tuple[EdgeKind | None, Amounts | None]:
    """What is done to the edges; (None, None) after an error."""
    match rule.verb:
        case "block":
            return "block", None
        case "observe":
            return "observe", None
        case "reweight":
            amounts = resolve_amounts(rule.fill, work)
            return (None if amounts is None else "reweight"), amounts
        case _:
            pass
    word = rule.fill
    if isinstance(word, ast.Name) and word.id not in (*work.loops, *work.program.parameters):
        if word.id == UNIFORM:
            return "uniform", None
        otherwise = "write `uniform`, or a weight: `0.2`"
        if word.id == "zero":
            otherwise = "write `block attention … from … to …`, or the weight `0`"
        hint = did_you_mean(word.id, [UNIFORM], otherwise)
        work.diagnostics.append(
            UnknownWord(span=word.span, kind="way of attending", word=word.id, hint=hint)
        )
        return None, None
    amounts = resolve_amounts(word, work)
    return (None if amounts is None else "weight"), amounts


def _possible(
    rule: spec.Rule, kind: EdgeKind, amounts: Amounts, keys: PositionTargets, work: Work
) -> bool:
    """E0332 for weights that attention can't have."""
    assert rule.fill is not None
    span = rule.fill.span
    low, high = min(amounts.values.values()), max(amounts.values.values())
    if low < 0:
        hint = "0 takes the edge out, 1 leaves it as it is, 2 doubles it"
        if kind == "weight":
            hint = "a weight lies between 0 and 1"
        problem = BadEdit(
            span=span, reason="attention can't be negative", what=f"this is {low:g}", hint=hint
        )
        work.diagnostics.append(problem)
        return False
    most = max(
        (len(tokens) for cell in keys.written.values() for row in cell.hits for tokens in row),
        default=1,
    )
    if kind == "weight" and high * most > 1 + 1e-9:
        each = f", {high:g} for each of {most} keys" if most > 1 else ""
        work.diagnostics.append(
            BadEdit(
                span=span,
                reason=f"the weights of a query would add up to {high * most:g}",
                what=f"more than 1 in all{each}",
                hint=f"write at most {1 / most:.4g}, or `uniform`",
            )
        )
        return False
    return True


def _anything_seen(
    rule: spec.Rule, queries: PositionTargets, keys: PositionTargets, work: Work
) -> bool:
    """E0332 where every key lies behind every query, most likely exchanged with it."""
    lowest = [_outermost(cell, min) for cell in keys.written.values()]
    highest = [_outermost(cell, max) for cell in queries.written.values()]
    for asked, asking in product(lowest, highest):
        for low, high in zip(asked, asking, strict=True):
            if low is None or high is None or low <= high:
                return True
    assert rule.onto is not None
    work.diagnostics.append(
        BadEdit(
            span=rule.onto.span,
            reason="these tokens come later than all that would attend to them",
            what=f"`{rule.at.span.written}` sees earlier tokens only",
            hint=f"attention goes back: `from {rule.onto.span.written} to {rule.at.span.written}`",
        )
    )
    return False


def _outermost(cell: PositionCell, which: Callable[[list[int]], int]) -> list[int | None]:
    """The first or last token of a cell in every row; None where a row has none."""
    rows = [[token for tokens in row for token in tokens] for row in cell.hits]
    return [which(tokens) if tokens else None for tokens in rows]


def _something_left(
    rule: spec.Rule, queries: PositionTargets, keys: PositionTargets, work: Work
) -> bool:
    """E0332 where a query would have no key left in any cell; windows and sinks aside."""
    axes = {name: i for i, name in enumerate(queries.axes)}
    for q_key, query in queries.written.items():
        for k_key, key in keys.written.items():
            named = dict(zip(keys.axes, k_key, strict=True))
            if any(q_key[axes[n]] != i for n, i in named.items() if n in axes):
                continue
            found = _emptied(query, key)
            if found is None:
                continue
            row, token = found
            text = work.model.tokenizer.token_text(
                work.table.runs[work.experiment.base].rows[row].ids[token]
            )
            work.diagnostics.append(
                BadEdit(
                    span=rule.span,
                    reason="a query would have nothing left to attend to",
                    what=f"in row {row}, all that token {token} (`{text.strip()}`) sees is blocked",
                    hint="leave it a key, its own token for example: `tokens except …`",
                )
            )
            return False
    return True


def _emptied(query: PositionCell, key: PositionCell) -> tuple[int, int] | None:
    """(row, token) of a query whose own and earlier tokens are all among the keys."""
    for row, (asking, blocked) in enumerate(zip(query.hits, key.hits, strict=True)):
        for number, tokens in enumerate(asking):
            if not blocked:
                continue
            gone: Any = set(blocked[min(number, len(blocked) - 1)])
            for token in tokens:
                if gone.issuperset(range(token + 1)):
                    return row, token
    return None
