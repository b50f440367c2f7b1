"""Observations of attention: weight on keys, entropy, distance, received attention, rollout,
value norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mechdsl.base.limits import is_integer
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.images.processing import PatchLayout
from mechdsl.program import spec
from mechdsl.program.spec import constant_value
from mechdsl.prompts.runs import RunRow
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.resolve.observations import ObservedVectors, RowSetObservation
from mechdsl.resolve.sites import (
    ExperimentContext,
    find_missing_point,
    list_pattern_points,
    resolve_site,
)
from mechdsl.resolve.targets import (
    fill_empty_picks,
    list_rows,
    report_empty_selection,
    resolve_base_positions,
    resolve_later_positions,
    sweeps_positions,
)
from mechdsl.resolve.types import (
    NOTHING,
    Convention,
    EdgeTargets,
    PositionTargets,
    ResolvedRule,
    SitePoint,
    SiteTargets,
    mixes_images,
)
from mechdsl.rules.attention import EdgeIntervention, resolve_edge
from mechdsl.rules.observations.registry import (
    ObservationKind,
    SiteObservation,
    iter_points,
    observation,
    report_bad_observation,
)
from mechdsl.rules.observations.rows import check_no_rules
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import compute_pattern_entropy
from mechdsl.vocab.sites import SITES, in_stack

if TYPE_CHECKING:
    from torch import Tensor


class PatternObservation(SiteObservation):
    """An observation of attention patterns: `observe WORD pattern … at QUERIES`."""

    by_unit = True

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        assert rule.site is not None
        others = [p.site for p in iter_points(sites) if SITES[p.site].component != "pattern"]
        if not others:
            return True
        reason = "isn't an attention pattern"
        hint = f"write `{in_stack('pattern', SITES[others[0]].stack)} layer * head *`"
        name, span = rule.site.span.written, rule.site.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
        return False


def is_causal(sites: SiteTargets | None, work: ExperimentContext) -> bool:
    """Return whether queries attend to earlier keys only, which an encoder's don't."""
    encodes = _is_in(sites, "encoder") or _is_in(sites, "vision")
    return work.model.shape.causal and not encodes


def _is_in(sites: SiteTargets | None, stack: str) -> bool:
    return sites is not None and any(SITES[p.site].stack == stack for p in iter_points(sites))


def in_one_text(rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
    """Report E0207 for attention to an encoder, whose keys are in another text than queries."""
    if all(SITES[point.site].stack != "cross" for point in iter_points(sites)):
        return True
    reason = "compares positions in one text, and the decoder's attention is to the encoder's text"
    report_bad_observation(rule, work, reason, "write `observe entropy`, or `observe attention`")
    return False


@observation("entropy", unit="nat")
class AttentionEntropy(PatternObservation):
    """The entropy of what the query attends to.

    returns: 0..ln(keys), nats; averaged over heads and queries that are joined
    """

    reads_entropy = True

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return seen.vectors[:, 0] if rule.in_vision else compute_pattern_entropy(seen.vectors)


@observation("distance", unit="token")
class AttentionDistance(PatternObservation):
    """How many tokens back the query attends, on average over its attention; in models that see
    both sides how many tokens away, and in images how many patches, of its attention to patches of
    the same tile, or of all tiles that attend to each other.

    `distance(W)` counts keys that are further away than W as W tokens away.
    returns: the sum of weight times min(query - key, W), in tokens; averaged over heads and queries
        that are joined
    source: of images Dosovitskiy et al. 2021, arXiv 2010.11929, appendix D.7
    """

    takes: ClassVar = ("arguments",)
    reads_tokens = True

    def __init__(
        self,
        window: int | None = None,
        *,
        causal: bool = True,
        grid: tuple[int, int, int] | None = None,
        rows: Sequence[RunRow] | None = None,
        side: int = 1,
        joins_tiles: bool = False,
    ) -> None:
        """Create the observation.

        Args:
            window: Largest distance that counts; None for no limit.
            causal: Whether queries attend to earlier keys only.
            grid: For images: the number of tokens before the patches, and the rows and columns of
                patches.
            rows: For the vision encoder of prompts, the rows.
            side: Rows and columns of patches of a token.
            joins_tiles: Whether patches attend to those of all tiles of their image, whose rows and
                columns count over the tiles.
        """
        self.window, self.causal, self.grid = window, causal, grid
        self._rows, self._side, self._joins_tiles = rows, side, joins_tiles

    @property
    def identity(self) -> tuple[object, ...]:
        settings = self.window, self.causal, self.grid, self._rows is not None
        return type(self), self.name, settings

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        window, right = _read_distance(rule, work)
        reader = work.model.tokenizer
        layout = reader.layout if isinstance(reader, ImageTokenizer) else None
        grid = None if layout is None else (len(layout.front), layout.rows, layout.cols)
        if (
            resolved is None
            or not right
            or (layout and not _check_patches(rule, resolved, layout, work))
        ):
            return None
        assert resolved.sites is not None
        if not in_one_text(rule, resolved.sites, work):
            return None
        causal = is_causal(resolved.sites, work) and not mixes_images(work.model, work.table)
        in_vision = _is_in(resolved.sites, "vision") and not reader.stands_in
        rows = list_rows(work.table, work.experiment.base, work) if in_vision else None
        side = 1 if work.model.shape.resamples else work.model.shape.merged_side
        does = AttentionDistance(
            window,
            causal=causal,
            grid=grid,
            rows=rows,
            side=side,
            joins_tiles=work.model.shape.attends_to_image,
        )
        return replace(resolved, does=does)

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        weights = seen.vectors
        if self._rows is not None:
            weights, away = self._within_tiles(seen, self._rows)
        elif self.grid is not None:
            front, rows, cols = self.grid
            weights = weights[:, front : front + rows * cols]
            away = self._between_patches(seen.positions, weights)
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-38)
        else:
            keys = seen.positions.new_tensor(range(weights.shape[1]))
            # negative for later keys, which have no weight in a causal model
            away = seen.positions[:, None] - keys
            away = away if self.causal else away.abs()
        if self.window is not None:
            away = away.clamp(-self.window, self.window)
        return (weights * away).sum(-1)

    def _within_tiles(self, seen: ObservedVectors, rows: Sequence[RunRow]) -> tuple[Tensor, Tensor]:
        """Return the weights on patches of the same tile, normalised, and the distances between the
        centres of patches: [query, key] each."""
        import numpy as np  # not at the top: `validate` only reads the registry

        pairs = np.stack([seen.prompts, seen.positions.cpu().numpy()], axis=1)
        distinct, index = np.unique(pairs, axis=0, return_inverse=True)
        away = np.full((len(distinct), seen.vectors.shape[1]), np.nan)
        for n, (prompt, position) in enumerate(distinct.tolist()):
            for placed in rows[prompt].whole_pictures:
                numbers, places = placed.picture.expansion.list_patches(self._side)
                indices = np.flatnonzero(numbers + placed.first * self._side**2 == position)
                if len(indices):
                    tile, *center = places[indices[0]].tolist()
                    in_tile = places[:, 0] == tile
                    there = np.flatnonzero(places[:, 0] >= 0 if self._joins_tiles else in_tile)
                    key = there + placed.first if self._joins_tiles else there
                    away[n, key] = np.hypot(*(places[there, 1:] - center).T)
        distances = seen.vectors.new_tensor(away[index.ravel()])
        weights = seen.vectors.masked_fill(distances.isnan(), 0)
        return weights / weights.sum(-1, keepdim=True).clamp_min(1e-38), distances.nan_to_num(0)

    def _between_patches(self, queries: Tensor, weights: Tensor) -> Tensor:
        """Compute the distances between centres of patches, in patches: [query, patch]."""
        assert self.grid is not None
        front, _, cols = self.grid
        keys = queries.new_tensor(range(weights.shape[1]))
        query = (queries - front)[:, None]
        down, right = query // cols - keys // cols, query % cols - keys % cols
        return (down**2 + right**2).to(weights.dtype).sqrt()

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        tokens, side = "tokens", "back" if self.causal else "away"
        if self.grid is not None or self._rows is not None:
            tokens = "patches"
            said = "between the centres of patches, in patches, averaged over attention to patches"
            yield Convention("distance", said)
        elif not self.causal:
            yield Convention("distance", "in tokens, in both directions")
        if self.window is not None:
            far = f"{self.window} {tokens}"
            yield Convention("window", f"keys further {side} than {far} count as {far} {side}")


def _read_distance(rule: spec.Rule, work: ExperimentContext) -> tuple[int | None, bool]:
    """Read the window, and whether it is valid; report E0207 if it isn't."""
    assert rule.observed is not None
    call = rule.observed.call
    if call is None:
        return None, True
    one = call.arguments[0] if len(call.arguments) == 1 else None
    node = None if one is None or one.name is not None else one.value
    window = constant_value(node, work.program.parameters)
    if is_integer(window, least=1):
        return window, True
    reason, hint = "takes one whole number of tokens above 0", "write `distance(8)`"
    name = "observe distance"
    work.diagnostics.append(BadArgument(span=call.span, name=name, reason=reason, hint=hint))
    return None, False


def _check_patches(
    rule: spec.Rule, resolved: ResolvedRule, layout: PatchLayout, work: ExperimentContext
) -> bool:
    """Report E0207 for queries that aren't patches of an image."""
    cells = resolved.positions.written.values()
    tokens = {token for cell in cells for row in cell.hits for hit in row for token in hit}
    if all(layout.place(token) is not None for token in tokens):
        return True
    reason, hint = (
        "is between patches, but other tokens have no row and column",
        ("write `at image tokens`"),
    )
    name, span = "observe distance", rule.at.span
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
    return False


@observation("attention", unit="share of attention")
class AttentionWeight(ObservationKind, EdgeIntervention):
    """The weight that the keys of an `observe attention` line get together.

    returns: 0..1, averaged over the queries, heads and layers that are joined
    source: Vaswani et al. 2017, arXiv 1706.03762
    """

    changes = "nothing"
    change = None
    leads = True
    by_unit = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        edge = resolve_edge(rule, self, None, work)
        if edge is None or edge.sites is None:
            return edge
        labels = {key: label for key, label in edge.sites.labels.items() if label == NOTHING}
        if labels.keys() <= edge.sites.missing:
            return edge
        work.diagnostics.append(
            report_empty_selection(rule.span, "observe", "one of its cells selects no head")
        )
        return None

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return sum_key_weights(seen)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.edge is not None
        axes = {axis.word: axis for axis in rule.spec.edge.axes}
        joined = (word for word, axis in axes.items() if axis.plural or axis.window is not None)
        over = [f"these {word}s" for word in joined]
        if rule.spec.edge.heads is not None:
            assert rule.sites is not None
            over += ["these heads"] if any(len(p) > 1 for p in rule.sites.points.values()) else []
        else:
            over += [] if "head" in axes else ["all heads"]
        cells = rule.positions.written.values()
        if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
            over.append("the queries")
        averaged = f", averaged over {' and '.join(over)}" if over else ""
        yield Convention("observed", f"the total weight of the keys{averaged}")


def sum_key_weights(seen: ObservedVectors) -> Tensor:
    """Sum the weights of each query on its keys: [K]."""
    assert seen.keys is not None
    index, key = seen.keys
    weights = seen.vectors[index, key]
    return weights.new_zeros(len(seen.vectors)).index_add_(0, index, weights)


LATER_LABEL, OTHER_LABEL = "later tokens", "other tokens"


@observation("received", unit="share of attention")
class ReceivedAttention(PatternObservation):
    """How much attention each later token pays to this one, on average.

    Over all later tokens, or, with `received(LOW..HIGH)`, those that lie LOW to HIGH tokens
    after it (future attention influence). In models that see both sides over all other tokens, or
    those that lie so far away.
    returns: 0..1, averaged over these tokens, heads and layers that are joined; rows in which no
        token lies there aren't part of the cell
    source: Li et al. 2025, arXiv 2510.13554, section 3
    """

    takes: ClassVar = ("arguments",)

    def __init__(
        self,
        low: int = 1,
        high: int | None = None,
        *,
        causal: bool = True,
        joins_tiles: bool = False,
    ) -> None:
        self.low, self.high, self.causal, self.joins_tiles = low, high, causal, joins_tiles

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        fits = self.clauses_fit(rule, work)
        assert rule.site is not None
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            work.add_axis(axis)
        window = _read_range(rule, work, in_images=_is_in(sites, "vision"))
        if window is None or not fits:
            return None
        if sites is not None and not in_one_text(rule, sites, work):
            return None
        causal = is_causal(sites, work)
        sites, keys = fill_empty_picks(
            sites,
            resolve_later_positions(rule.at, *window, work.reading(sites), both=not causal),
        )
        if sites is None or keys is None or not self.sites_fit(rule, sites, work):
            return None
        if not work.model.tokenizer.stands_in and not _check_single_tokens(rule, keys, work):
            return None
        label = LATER_LABEL if causal else OTHER_LABEL
        later = {key: replace(cell, label=label) for key, cell in keys.read.items()}
        return ResolvedRule(
            spec=rule,
            does=ReceivedAttention(
                *window, causal=causal, joins_tiles=work.model.shape.attends_to_image
            ),
            run=work.experiment.base,
            sites=sites,
            positions=replace(keys, written=later, read=later),
            edge=EdgeTargets(None, replace(keys, read=keys.written)),
        )

    def each(self, rule: ResolvedRule, seen: ObservedVectors) -> Tensor:
        return sum_key_weights(seen)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.sites is not None
        readers = "all later tokens" if self.causal else "all other tokens"
        if (self.low, self.high) != (1, None):
            side = "after it" if self.causal else "away from it in both directions"
            readers = f"the tokens {self.low} to {self.high} {side}"
        if _is_in(rule.sites, "vision"):
            readers += " of its image" if self.joins_tiles else " of its image and tile"
        said = f"received: the attention to a token, averaged over {readers}"
        points = [point for here in rule.sites.points.values() for point in here]
        if any(point.unit is None for point in points):
            said += " and all heads"
        if any(len(here) > 1 for here in rule.sites.points.values()):
            said += " and the joined sites"
        yield Convention("observed", said, "rows without such tokens aren't part of the cell")


def _read_range(
    rule: spec.Rule, work: ExperimentContext, *, in_images: bool
) -> tuple[int, int | None] | None:
    """Read the range of distances in tokens; None after E0207.

    in_images: Whether the tokens are patches of images in prompts.
    """
    assert rule.observed is not None
    call = rule.observed.call
    if call is None:
        return 1, None
    if in_images or isinstance(work.model.tokenizer, ImageTokenizer):
        reason = "counts tokens of a text, but images have rows and columns"
        report_bad_observation(rule, work, reason, "write `received` for all other tokens")
        return None
    one = call.arguments[0] if len(call.arguments) == 1 else None
    node = None if one is None or one.name is not None else one.value
    if isinstance(node, ast.Range):
        low, high = (constant_value(end, work.program.parameters) for end in (node.low, node.high))
        whole = [end for end in (low, high) if is_integer(end)]
        if len(whole) == 2 and 1 <= whole[0] <= whole[1]:
            return whole[0], whole[1]
    reason = "takes a range of distances in tokens, starting at 1 or more"
    report_bad_observation(
        rule, work, reason, "write `received(1..8)`, or `received` for all later tokens"
    )
    return None


def _check_single_tokens(rule: spec.Rule, keys: PositionTargets, work: ExperimentContext) -> bool:
    """Report E0207 for joined tokens, because each has different later tokens."""
    hits = [hit for cell in keys.written.values() for hit in cell.hits]
    if all(sum(map(len, hit)) <= 1 for hit in hits):
        return True
    reason = "observes one token at a time"
    report_bad_observation(rule, work, reason, f"sweep them: {_suggest_sweep(rule.at)}")
    return False


def _suggest_sweep(at: ast.Positions) -> str:
    """Return positions that sweep the tokens which a rule joins."""
    body = at.items[0].body if len(at.items) == 1 else None
    match body.base if isinstance(body, ast.Point) and body.offset == 0 else None:
        case ast.SpanTokens(low=None) as node:
            return f"`at each {node.of.span.written} token`"
        case ast.EachTokenOf() as node:
            name = node.of.span.written
            return f"`at first token of {name}, last token of {name}`"
        case ast.ChosenTokens() as node:
            return f"`at each {node.name} token`"
        case ast.PositionUnion() as node:
            return f"`at {node.items.span.written}`"
        case ast.TokenIndex(low=None):
            return "`at token * align left`"
        case _:
            return "`at each SPAN token`, `at token 1..3`"


@observation("rollout", unit="share of attention")
class AttentionRollout(RowSetObservation, ObservationKind):
    """What of a token is mixed into another by attention, through all layers.

    The product over layers of half the pattern, averaged over heads, and half the identity, which
    stands for the residual stream. Several tokens to which it leads are added up.
    returns: 0..1, averaged over the tokens that it is looked at from
    source: Abnar and Zuidema 2020, arXiv 2005.00928, section 3
    """

    leads = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.edge is not None
        assert rule.onto is not None
        alone = check_no_rules(rule, work, "doesn't read a run in which rules act")
        shape = work.sites.shape
        points = list_pattern_points(shape)
        missing = find_missing_point(points, shape, work.model.name, rule.span)
        if missing is not None:
            work.diagnostics.append(missing)
        both = sweeps_positions(rule.at, work) and sweeps_positions(rule.onto, work)
        queries = resolve_base_positions(rule.at, work, "from_position" if both else "position")
        keys = resolve_base_positions(rule.onto, work)
        if queries is None or keys is None or missing is not None or not alone:
            return None
        return ResolvedRule(
            spec=rule,
            does=self,
            run=work.experiment.base,
            sites=SiteTargets((), {(): points}, {(): "attention"}),
            positions=queries,
            edge=EdgeTargets(None, keys),
        )

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = (
            f"rollout: the product over {n_layers} layers of (pattern averaged over heads + "
            "identity) / 2, with each query's weights normalised to sum to 1; MLPs and norms "
            "aren't included"
        )
        cells = rule.positions.written.values()
        if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
            said += "; averaged over the query tokens"
        yield Convention("observed", said)


@observation("value_norm", unit="activation")
class WeightedValueNorm(RowSetObservation, AttentionWeight):
    """The norm of the value that attention moves from the keys to the query.

    ‖Σ α(q, k) v(k) W_O‖ over the heads that are joined, where α(q, k) is the weight, v(k) the
    value of a head, with its bias, and W_O the head's rows of the output projection.
    returns: at least 0, in the unit of the activation; added up over the keys, averaged over the
        queries and the layers that are joined
    source: Kobayashi et al. 2020, arXiv 2004.10102, sections 2.3 and 3.2
    """

    weights_attention = True
    by_unit = False

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.edge is not None
        alone = check_no_rules(rule, work, "doesn't read a run in which rules act")
        if rule.edge.stack is not None or work.sites.shape.encodes_apart:
            where = "an encoder-decoder" if work.sites.shape.encodes_apart else "a vision encoder"
            if work.sites.shape.attends_to_image and rule.edge.stack is None:
                where = "a model with blocks that attend to an image"
            what, hint = f"`by value_norm` in {where}", "leave out `by value_norm`"
            work.diagnostics.append(NotSupported(span=rule.span, what=what, later=hint))
            return None
        resolved = super().resolve(rule, work)
        if resolved is None or not alone:
            return None
        points = list_value_points(rule_layers(resolved))
        missing = find_missing_point(points, work.sites.shape, work.model.name, rule.span)
        if missing is not None:
            work.diagnostics.append(missing)
            return None
        return resolved

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = (
            "value_norm: ‖attention weight × value × output projection‖ of each query and key, "
            "with the value's bias and without the bias of the output projection"
        )
        assert rule.sites is not None
        cells = rule.positions.written.values()
        points = list(rule.sites.points.values())
        over = ["layers"] if any(len({p.layer for p in here}) > 1 for here in points) else []
        if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
            over.append("queries")
        heads = "; vectors of joined heads are summed first, norms of several keys afterwards"
        averaged = f"; averaged over {' and '.join(over)}" if over else ""
        yield Convention("observed", f"{said}{heads}{averaged}")


def rule_layers(rule: ResolvedRule) -> list[int]:
    """Return the layers that a rule names, in ascending order."""
    assert rule.sites is not None
    return sorted({point.layer or 0 for point in iter_points(rule.sites)})


def list_value_points(layers: Sequence[int]) -> list[SitePoint]:
    """Return the patterns, values and mixed values of some layers, each with all heads."""
    sites = ("pattern", "v", "z")
    return [SitePoint(site, layer, None) for layer in layers for site in sites]
