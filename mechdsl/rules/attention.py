"""Rules on attention edges: `block`, `reweight`, `allow`, `set attention … from Q to K`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.rules import BadEdit
from mechdsl.diagnostics.syntax import NotSupported, UnknownWord
from mechdsl.models.shape import has_additive_positions, list_block_kinds
from mechdsl.program import spec
from mechdsl.prompts.positions.cells import is_after, is_found_by_text
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.runs import RuleKind, acts_in_prefill
from mechdsl.resolve.sites import ExperimentContext, named_stack
from mechdsl.resolve.targets import (
    fill_empty_picks,
    resolve_amounts,
    resolve_attention_sites,
    resolve_base_positions,
    sweeps_positions,
)
from mechdsl.resolve.types import (
    Amounts,
    Convention,
    EdgeTargets,
    Intervention,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    mixes_images,
)
from mechdsl.rules.kinds import rule_kind
from mechdsl.syntax import ast
from mechdsl.syntax.traversal import walk
from mechdsl.vocab.metrics import METRICS
from mechdsl.vocab.sites import EdgeChange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_WITHOUT_LOGITS = ("activations", "observation")


class EdgeIntervention(Intervention):
    """An intervention that changes the weights of edges from queries to keys."""

    changes = "edges"
    drawn_positions = False
    change: ClassVar[EdgeChange | None]
    """The change to the weights."""
    said: ClassVar[str]
    """Description of the change."""
    removes: ClassVar[bool] = False
    """Whether the keys are removed, so that each query needs others."""

    def detail(self, rule: ResolvedRule) -> str | None:
        keys = "" if rule.spec.onto is None else rule.spec.onto.span.written
        return f"to {keys} {super().detail(rule)}".strip()

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention("edges", self.said, closing="sinks count as part of the rest")

    @property
    def at_newest(self) -> str:
        return "the newest token's own attention is changed"

    def possible(
        self, rule: spec.Rule, amounts: Amounts, keys: PositionTargets, work: ExperimentContext
    ) -> bool:
        """Report E0332 for weights that attention can't have."""
        low = min(amounts.values.values())
        if low < 0:
            _bad_weight(
                rule, work, "attention weights can't be negative", f"this is {low:g}", self.least
            )
        return low >= 0

    def fits(
        self,
        rule: spec.Rule,
        queries: PositionTargets,
        keys: PositionTargets,
        sites: SiteTargets,
        work: ExperimentContext,
    ) -> bool:
        """Check that the change is possible for edges to hidden keys."""
        return True

    least: ClassVar[str] = "0 removes the edge, 1 leaves it unchanged, 2 doubles it"
    """Hint for a negative number."""


def _bad_weight(
    rule: spec.Rule, work: ExperimentContext, reason: str, what: str, hint: str
) -> None:
    assert rule.fill is not None
    work.diagnostics.append(BadEdit(span=rule.fill.span, reason=reason, what=what, hint=hint))


class EdgeRule(RuleKind):
    """A kind of rule on `attention … from Q to K`."""

    def edit(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[EdgeIntervention | None, Amounts | None]:
        """Return the change to the edges and its number; (None, None) after an error."""
        raise NotImplementedError

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        does, amounts = self.edit(rule, work)
        return resolve_edge(rule, does, amounts, work)


def resolve_edge(
    rule: spec.Rule, does: EdgeIntervention | None, amounts: Amounts | None, work: ExperimentContext
) -> ResolvedRule | None:
    """Resolve the queries and keys of a rule on `attention … from Q to K`; None after an error.

    Args:
        does: The change to the edges; None after an error.
    """
    assert rule.edge is not None
    assert rule.onto is not None
    sites, axes = resolve_attention_sites(rule.edge, work.sites)
    for axis in axes:
        work.add_axis(axis)
    named = rule.edge.stack
    stack = "" if named is None else named_stack(named, work.sites.shape)
    asking, asked = work.reading(sites), work.reading(sites)
    if asked.side and stack and asked.side != "image":
        asked = replace(asked, side="source")
    both = sweeps_positions(rule.at, asking) and sweeps_positions(rule.onto, asked)
    queries = resolve_base_positions(rule.at, asking, "from_position" if both else "position")
    keys = resolve_base_positions(rule.onto, asked)
    sites, queries = fill_empty_picks(sites, queries, SitePoint("pattern", 0, None))
    if sites is None or queries is None or keys is None or does is None:
        return None
    if amounts is not None and not does.possible(rule, amounts, keys, work):
        return None
    causal = (
        work.sites.shape.causal
        and not mixes_images(work.model, work.table)
        and not stack
        and (not work.sites.shape.stands_in or _measures_next_token(work))
    )
    known = not work.model.tokenizer.stands_in
    told = known or (is_found_by_text(rule.at, rule.onto) and not work.table.stands_in)
    if does.looks_ahead:
        if not does.fits(rule, queries, keys, sites, work):
            return None
    elif causal and told and not _check_keys_visible(rule, queries, keys, work):
        return None
    patched = stack == "vision" and not does.looks_ahead
    if patched and not _check_patches_meet(rule, queries, keys, work):
        return None
    run = work.experiment.estimator is None  # an estimator removes no edge
    if (
        does.removes
        and run
        and causal
        and known
        and not _check_keys_left(rule, queries, keys, work)
    ):
        return None
    return ResolvedRule(
        spec=rule,
        does=does,
        run=work.experiment.base,
        sites=sites,
        positions=queries,
        amounts=amounts,
        edge=EdgeTargets(does.change, keys),
    )


@rule_kind("block")
class BlockRule(EdgeRule, EdgeIntervention):
    """`block attention … from Q to K`: the query doesn't see the key."""

    change = "block"
    said = "blocked keys get no weight: a score of −∞ before softmax"
    removes = True

    def edit(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[EdgeIntervention | None, Amounts | None]:
        return self, None


@rule_kind("reweight")
class ReweightRule(EdgeRule, EdgeIntervention):
    """`reweight attention … from Q to K by NUMBER`."""

    change = "reweight"
    said = "weights are multiplied, then the query's weights are normalised to sum to 1"

    def edit(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[EdgeIntervention | None, Amounts | None]:
        amounts = resolve_amounts(rule.fill, work)
        return (None if amounts is None else self), amounts

    def unchanged(self, amounts: NDArray[np.float64]) -> NDArray[np.bool_]:
        return amounts == 1


@rule_kind("allow")
class AllowRule(EdgeRule, EdgeIntervention):
    """`allow attention … from Q to K`: the query sees the key, wherever it stands."""

    change = "allow"
    said = (
        "allowed keys are added to the keys that a query sees, with the model's scores; "
        "other rules act on all of them"
    )
    whole = True
    looks_ahead = True

    def edit(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[EdgeIntervention | None, Amounts | None]:
        return self, None

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        yield Convention("passes", "rows of `allow` are full forward passes")

    def fits(
        self,
        rule: spec.Rule,
        queries: PositionTargets,
        keys: PositionTargets,
        sites: SiteTargets,
        work: ExperimentContext,
    ) -> bool:
        """Report E0108 or E0332 if no key is hidden, or the scores of hidden keys are unknown."""
        shape = work.sites.shape
        if shape.stands_in:
            return True
        assert rule.edge is not None
        stack = "" if rule.edge.stack is None else named_stack(rule.edge.stack, shape)
        if stack == "vision":
            return _check_patches_hidden(rule, queries, keys, sites, work)
        if stack:
            return _reject_seen_keys(rule, stack, work)
        # T5 adds its biases apart from the mask, so they are known for hidden keys, too.
        if has_additive_positions(shape.family, shape.config) and not shape.encodes_apart:
            what = "`allow` in a model that adds positions to scores"
            hint = "name keys that the query sees, with `reweight attention …` or `set attention …`"
            work.diagnostics.append(NotSupported(span=rule.span, what=what, later=hint))
            return False
        if shape.causal:
            known = not work.model.tokenizer.stands_in
            if not known or "sliding_window" in shape.config or not _all_seen(queries, keys):
                return True
        assert rule.onto is not None
        first = rule.at.span.written
        hint = f"name keys after their queries: `from {rule.onto.span.written} to {first}`"
        if not shape.causal:
            hint = "`allow` is for models in which no token sees a later one"
        work.diagnostics.append(
            BadEdit(
                span=rule.onto.span,
                reason="the queries already see these keys",
                what=f"`{first}` comes after them"
                if shape.causal
                else f"every token of `{work.model.name}` sees all other tokens",
                hint=hint,
            )
        )
        return False


_WINDOW_KEYS = ("sliding_window", "local_radius", "attention_window", "block_size")
"""Keys of configs of encoders, some or all of whose layers see a part of the text."""


def _reject_seen_keys(rule: spec.Rule, stack: str, work: ExperimentContext) -> bool:
    """Report E0332, or E0108 in encoders with windows, for edges of a stack without a mask."""
    shape = work.sites.shape
    model_shape = shape.others.get(stack, shape)
    if stack == "encoder" and any(model_shape.config.get(key) for key in _WINDOW_KEYS):
        what = "`allow` in an encoder whose queries see a window of the text"
        hint = "name keys that the query sees, with `reweight attention …` or `set attention …`"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=hint))
        return False
    seen = "the decoder sees all tokens of the encoder"
    if stack != "cross":
        seen = f"every token of the {stack} sees all others"
    assert rule.onto is not None
    hint = f"remove it, or write `reweight attention {stack} …`"
    reason = "the queries already see these keys"
    work.diagnostics.append(BadEdit(span=rule.onto.span, reason=reason, what=seen, hint=hint))
    return False


class UniformWeights(EdgeIntervention):
    """Uniform weights: `to uniform`."""

    name = change = "uniform"
    said = "the keys share their total weight equally, all other keys keep their weights"


class GivenWeight(EdgeIntervention):
    """A given weight: `to 0.2`."""

    name = change = "weight"
    said = "each key gets the weight, all other keys share the rest in proportion to their weights"
    least = "a weight is between 0 and 1"

    def possible(
        self, rule: spec.Rule, amounts: Amounts, keys: PositionTargets, work: ExperimentContext
    ) -> bool:
        if not super().possible(rule, amounts, keys, work):
            return False
        high = max(amounts.values.values())
        assert rule.edge is not None
        in_vision = _stack_word(rule.edge) == "vision"
        each_token = work.sites.shape.merged_side**2 if in_vision else 1
        counts = (
            len(tokens) * each_token // cell.vectors
            for cell in keys.written.values()
            for row in cell.hits
            for tokens in row
        )
        most = max(counts, default=1)
        most = 1 if work.model.tokenizer.stands_in else most
        if high * most <= 1 + 1e-9:
            return True
        each = f", {high:g} for each of {most} keys" if most > 1 else ""
        _bad_weight(
            rule,
            work,
            f"the weights of a query would add up to {high * most:g}",
            f"more than 1 in total{each}",
            f"write at most {1 / most:.4g}, or `uniform`",
        )
        return False


UNIFORM_WEIGHTS, GIVEN_WEIGHT = UniformWeights(), GivenWeight()


@rule_kind("set edge")
class SetEdgeRule(EdgeRule):
    """`set attention … from Q to K to 0.2`, or `to uniform`."""

    def edit(
        self, rule: spec.Rule, work: ExperimentContext
    ) -> tuple[EdgeIntervention | None, Amounts | None]:
        word = rule.fill
        if isinstance(word, ast.Name) and word.id not in (*work.loops, *work.program.parameters):
            if word.id == UNIFORM_WEIGHTS.name:
                return UNIFORM_WEIGHTS, None
            otherwise = "write `uniform`, or a weight: `0.2`"
            if word.id == "zero":
                otherwise = "write `block attention … from … to …`, or the weight `0`"
            hint = did_you_mean(word.id, [UNIFORM_WEIGHTS.name], otherwise)
            work.diagnostics.append(
                UnknownWord(span=word.span, kind="attention weight", word=word.id, hint=hint)
            )
            return None, None
        amounts = resolve_amounts(word, work)
        return (None if amounts is None else GIVEN_WEIGHT), amounts


def _measures_next_token(work: ExperimentContext) -> bool:
    """Return whether a measure reads the next token, which requires a causal model."""
    for measure in work.experiment.measures:
        named = (n.id if isinstance(n, ast.Name) else n.name for n in walk(measure.metric)
                 if isinstance(n, ast.Name | ast.Call))  # fmt: skip
        forms = [set(METRICS[name].forms) for name in named if name in METRICS]
        if measure.at is None and any(each.isdisjoint(_WITHOUT_LOGITS) for each in forms):
            return True
    return False


def _check_keys_visible(
    rule: spec.Rule, queries: PositionTargets, keys: PositionTargets, work: ExperimentContext
) -> bool:
    """Report E0332 if every key is after every query, most likely because they are exchanged.

    A rule of the experiment may allow them.
    """
    if not queries.written or not keys.written:  # an invalid name is already reported
        return True
    if _has_allowed_keys("", work):
        return True
    prompts = (work.table, work.experiment.base, work.model.tokenizer)
    for query, key in _edges(queries, keys):
        ends = zip(_outermost(key, min), _outermost(query, max), strict=True)
        for row, (low, high) in enumerate(ends):
            if low is None or high is None or not is_after(low, high, row, *prompts):
                return True
    assert rule.onto is not None
    work.diagnostics.append(
        BadEdit(
            span=rule.onto.span,
            reason="these tokens come after all tokens that could attend to them",
            what=f"`{rule.at.span.written}` sees earlier tokens only",
            hint=f"attention reads earlier tokens: `from {rule.onto.span.written} to "
            f"{rule.at.span.written}`",
        )
    )
    return False


def _check_patches_meet(
    rule: spec.Rule, queries: PositionTargets, keys: PositionTargets, work: ExperimentContext
) -> bool:
    """Report E0332 if every key is in another image than every query, or in another tile that no
    rule of the experiment allows."""
    tiles = _list_tiles(queries, keys, work)
    if tiles is None or any(query & key for query, key in tiles):
        return True
    of_image = any({q[0] for q in query} & {k[0] for k in key} for query, key in tiles)
    if of_image and _has_allowed_keys("vision", work):
        return True
    assert rule.onto is not None
    allow = ", write `allow attention vision …` to let them attend to each other" * of_image
    work.diagnostics.append(
        BadEdit(
            span=rule.onto.span,
            reason="patches attend to patches of the same image and tile",
            what=f"those of `{rule.at.span.written}` are in other images or tiles",
            hint=f"name tokens of one tile{allow}, or remove `vision`: in the language model, "
            "tokens of images do",
        )
    )
    return False


def _has_allowed_keys(stack: str, work: ExperimentContext) -> bool:
    """Return whether a rule of the experiment or of its runs allows further keys in a stack."""
    experiment = work.experiment
    rules = (*experiment.rules, *(rule for run in experiment.derived for rule in run.rules))
    return any(
        rule.verb == "allow" and rule.edge is not None and _stack_word(rule.edge) == stack
        for rule in rules
    )


def _stack_word(edge: spec.EdgeText) -> str:
    """Return the stack that a file names for an edge; empty for none."""
    return "" if edge.stack is None else edge.stack.id


def _check_patches_hidden(
    rule: spec.Rule,
    queries: PositionTargets,
    keys: PositionTargets,
    sites: SiteTargets,
    work: ExperimentContext,
) -> bool:
    """Report E0108 for keys in other images than a query, or E0332 if the queries see all keys."""
    tiles = _list_tiles(queries, keys, work)
    if tiles is None:
        return True
    pairs = {(q, k) for query, key in tiles for q in query for k in key}
    assert rule.onto is not None
    if any(q[0] != k[0] for q, k in pairs):
        what = "`allow` between patches of different images, which are encoded separately,"
        hint = "name queries and keys of one image, or remove `vision`: in the language model, "
        hint += "tokens of an image attend to those of earlier images"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=hint))
        return False
    vision = work.sites.shape.others["vision"]
    kinds = list_block_kinds(vision.config, vision.n_layers)
    layers = {point.layer or 0 for points in sites.points.values() for point in points}
    has_windows = kinds is not None and any(kinds[layer] == "windowed" for layer in layers)
    if has_windows or any(q != k for q, k in pairs):
        return True
    of_all = work.sites.shape.attends_to_image
    scope = "in all tiles of the image" if of_all else "of its tile"
    work.diagnostics.append(
        BadEdit(
            span=rule.onto.span,
            reason="the queries already see these keys",
            what=f"a patch attends to all patches {scope}",
            hint=("" if of_all else "name keys in another tile, frame or window of the image, or ")
            + "write `reweight attention vision …`",
        )
    )
    return False


Tiles = set[tuple[int, int]]
"""Numbers of an image in its prompt and of a tile in it; 0 if all tiles attend to each other."""


def _list_tiles(
    queries: PositionTargets, keys: PositionTargets, work: ExperimentContext
) -> list[tuple[Tiles, Tiles]] | None:
    """Return the tiles of the queries and of the keys, for each cell and row; None if they aren't
    known."""
    if work.table.stands_in or work.model.tokenizer.stands_in or not queries.written:
        return None
    together = work.sites.shape.attends_to_image
    rows = work.table.runs[work.experiment.base].rows

    def find(cell: PositionCell, row: int) -> Tiles:
        numbers = {token for tokens in cell.tokens(row) for token in tokens}
        patches = {rows[row].patch_tokens[token] for token in numbers}
        return {(image, 0) for image, _ in patches} if together else patches

    return [
        (find(query, row), find(key, row))
        for query, key in _edges(queries, keys)
        for row in range(len(rows))
    ]


def _all_seen(queries: PositionTargets, keys: PositionTargets) -> bool:
    """Return whether no key is after a query, in any cell."""
    return all(
        first is None or last is None or last <= first
        for query, key in _edges(queries, keys)
        for first, last in zip(_outermost(query, min), _outermost(key, max), strict=True)
    )


def _edges(
    queries: PositionTargets, keys: PositionTargets
) -> Iterator[tuple[PositionCell, PositionCell]]:
    """Yield the queries and keys of each cell; a `for` over both has one value in a cell."""
    axes = {name: i for i, name in enumerate(queries.axes)}
    for q_key, query in queries.written.items():
        for k_key, key in keys.written.items():
            named = dict(zip(keys.axes, k_key, strict=True))
            if all(q_key[axes[n]] == i for n, i in named.items() if n in axes):
                yield query, key


def _outermost(cell: PositionCell, which: Callable[[list[int]], int]) -> list[int | None]:
    """Return the first or last token of a cell in every row; None for rows without tokens."""
    rows = [[token for tokens in row for token in tokens] for row in cell.hits]
    return [which(tokens) if tokens else None for tokens in rows]


def _check_keys_left(
    rule: spec.Rule, queries: PositionTargets, keys: PositionTargets, work: ExperimentContext
) -> bool:
    """Report E0332 if a query would have no key left in some cell, except for windows and sinks.

    After the prefill, queries are new tokens, which see themselves unless all tokens are keys.
    """
    rows = work.table.runs[work.experiment.base].rows
    prefill = acts_in_prefill(rule, work)
    if not prefill:
        every = {key: cell for key, cell in keys.written.items() if key in keys.every}
        keys = replace(keys, written=every)
    for query, key in _edges(queries, keys):
        emptied = _emptied(query, key, [row.source for row in rows])
        if emptied is None:
            continue
        row, token = emptied
        ids = rows[row].ids
        text = "of the answer"
        if token < len(ids):
            text = f"`{work.model.tokenizer.token_text(ids[token]).strip()}`"
        whose = f"in row {work.table.row_ids[row]}, all keys of token {token} ({text})"
        whose = whose if prefill else "all keys of each generated token"
        work.diagnostics.append(
            BadEdit(
                span=rule.span,
                reason="a query would have no key left to attend to",
                what=f"{whose} are blocked",
                hint="leave it one key, such as its own token: `tokens except …`",
            )
        )
        return False
    return True


def _emptied(
    query: PositionCell, key: PositionCell, first: Sequence[int]
) -> tuple[int, int] | None:
    """Return the row and token of a query whose own and earlier tokens are all keys, or None.

    first: The first token of each row that the model, or its decoder, reads.
    """
    for row, (asking, blocked) in enumerate(zip(query.hits, key.hits, strict=True)):
        for number, tokens in enumerate(asking):
            if not blocked:
                continue
            gone: Any = set(blocked[min(number, len(blocked) - 1)])
            for token in tokens:
                if gone.issuperset(range(first[row], token + 1)):
                    return row, token
    return None
