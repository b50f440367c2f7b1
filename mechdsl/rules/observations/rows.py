"""Observations of the vectors of all rows: rank, similarity, CKA, clusters, and random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from mechdsl.base.hashing import digest_number
from mechdsl.base.limits import is_integer
from mechdsl.base.text import count_noun, name_list
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.syntax import BadArgument, UnknownWord
from mechdsl.program import spec
from mechdsl.program.directions import parse_fit_rows, training_rows
from mechdsl.program.spec import constant_value
from mechdsl.prompts.runs import PositionCell, PromptRun, RunRow
from mechdsl.resolve.observations import (
    ObservedTokens,
    RowSetObservation,
    RowVectors,
    TokenSetObservation,
    TokenVectors,
    TrainingRows,
    join_positions,
)
from mechdsl.resolve.sites import ExperimentContext, resolve_site
from mechdsl.resolve.targets import (
    resolve_base_positions,
    resolve_external_positions,
    sweeps_positions,
)
from mechdsl.resolve.types import (
    Axis,
    Convention,
    EdgeTargets,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
    count_numbers,
)
from mechdsl.rules.kinds import check_same_side
from mechdsl.rules.observations.registry import (
    SiteObservation,
    check_unembedding,
    observation,
    report_bad_observation,
)
from mechdsl.syntax import ast
from mechdsl.vocab.sites import SITES, in_stack

if TYPE_CHECKING:
    from mechdsl.base.arrays import Floats
    from mechdsl.fits.geometry import Mixture


MAX_ROW_NUMBERS = 1 << 29
"""Maximum size of the vectors of one cell: rows times width."""


def check_no_rules(rule: spec.Rule, work: ExperimentContext, reason: str) -> bool:
    """Report E0207 with a reason if the experiment has rules that act."""
    if all(each.verb == "observe" for each in work.experiment.rules):
        return True
    assert rule.observed is not None
    hint = "write the rules as a run, and observe that: `run healed { … }`, then "
    report_bad_observation(rule, work, reason, f"{hint}`observe {rule.observed.word} … of healed`")
    return False


class SiteRowSetObservation(RowSetObservation, SiteObservation):
    """`observe WORD SITE at POSITIONS`, computed from the vectors of all rows."""

    of_several: ClassVar[str] = "a row's vector is the mean over its tokens"

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        made = "is computed from vectors of all rows and doesn't read a run in which rules act"
        return resolved if check_no_rules(rule, work, made) else None

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        """Report E0207 for vectors whose width differs between rows, and for too many numbers."""
        for points in sites.points.values():
            over_keys = [point.site for point in points if SITES[point.site].width == "key"]
            if over_keys:
                reason = (
                    f"can't be computed from `{over_keys[0]}`, whose width depends on the prompt"
                )
                site = in_stack("z", SITES[over_keys[0]].stack)
                hint = f"name a site with vectors of equal width: `{site}`"
                report_bad_observation(rule, work, reason, hint)
                return False
            numbers = len(work.table) * sum(
                count_numbers(point, work.sites.shape) for point in points
            )
            if numbers > MAX_ROW_NUMBERS:
                reason = f"would hold {numbers:,} numbers at a time, more than {MAX_ROW_NUMBERS:,}"
                report_bad_observation(
                    rule, work, reason, "write a smaller `limit` after `prompts`"
                )
                return False
        return True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        assert rule.sites is not None
        parts = [f"{self.word}: {said}"]
        if any(len(points) > 1 for points in rule.sites.points.values()):
            parts.append("joined sites are concatenated into one vector")
        cells = rule.positions.written.values()
        several = any(sum(map(len, row)) > 1 for cell in cells for row in cell.hits)
        if several and not self.of_directions:
            parts.append(self.of_several)
        yield Convention("observed", "; ".join([*parts, *self.said(rule)]))

    def read_run(self, rule: spec.Rule, work: ExperimentContext) -> str:
        other = None if rule.receiver is None else match_run(rule.receiver, work)
        return other or super().read_run(rule, work)

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        """Yield further notes for tables."""
        yield from ()


class SiteTokenSetObservation(TokenSetObservation, SiteRowSetObservation):
    """`observe WORD SITE at POSITIONS`, computed from the vectors of all tokens."""

    of_several: ClassVar[str] = "a row's number is the mean over its tokens"

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        return check_token_numbers(rule, found, work)


def check_token_numbers(rule: spec.Rule, resolved: ResolvedRule, work: ExperimentContext) -> bool:
    """Report E0207 for tokens whose vectors are too many numbers."""
    assert resolved.sites is not None
    every = join_positions(resolved.positions.written.values())
    tokens = sum(len(tokens) for row in every.hits for tokens in row)
    shape = work.sites.shape
    widths = (
        sum(count_numbers(p, shape) for p in points) for points in resolved.sites.points.values()
    )
    numbers = tokens * max(widths, default=0)
    if numbers <= MAX_ROW_NUMBERS:
        return True
    reason = f"would hold {numbers:,} numbers at a time, more than {MAX_ROW_NUMBERS:,}"
    report_bad_observation(rule, work, reason, "write a smaller `limit`, or name fewer tokens")
    return False


def resolve_compared_sites(rule: spec.Rule, work: ExperimentContext) -> SiteTargets | None:
    """Resolve the sites after `with`, with axes `to_layer` and `to_head`; None after an error."""
    assert rule.receiver is not None
    site_targets, axes = resolve_site(rule.receiver, work.sites)
    for axis in axes:
        work.add_axis(replace(axis, name=f"to_{axis.name}"))
    names = {axis.name for axis in axes}
    if site_targets is None:
        return None
    return replace(
        site_targets, axes=tuple(f"to_{n}" if n in names else n for n in site_targets.axes)
    )


def _compares_one_side(rule: ResolvedRule, others: SiteTargets, work: ExperimentContext) -> bool:
    """Report E0317 if the compared sites have vectors at different tokens."""
    every = (here for sites in (rule.sites, others) if sites is not None
             for here in sites.points.values())  # fmt: skip
    return check_same_side(rule.spec, [point for here in every for point in here], work)


def _compares_encoder(rule: ResolvedRule, others: SiteTargets, work: ExperimentContext) -> bool:
    """Return whether patches of image tokens are compared with the vectors of these tokens in the
    language model."""
    shape = work.sites.shape
    if not rule.in_vision or shape.resamples or shape.encodes_apart:
        return False
    return all(not SITES[point.site].stack for here in others.points.values() for point in here)


def repeat_sites(sites: SiteTargets, axis: str, count: int) -> SiteTargets:
    """Repeat each combination `count` times along a new axis."""
    return replace(
        sites,
        axes=(*sites.axes, axis),
        points={(*key, n): here for key, here in sites.points.items() for n in range(count)},
        labels={(*key, n): label for key, label in sites.labels.items() for n in range(count)},
    )


class _RankObservation(SiteRowSetObservation):
    """Dimensionality of the vectors, a single number for all rows."""

    spread: Literal["rows", "unknown", "none"] = "unknown"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "of the rows around their mean"

    def number(self, singular: Floats, seen: RowVectors) -> float:
        """Compute the number.

        Args:
            singular: Singular values of the centred rows, [value].
        """
        raise NotImplementedError

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.geometry import singular_values

        number = self.number(singular_values(seen.vectors, centred=True), seen)
        return [np.full(len(seen.vectors), number)]


@observation("rank", unit="dimensions")
class Rank(_RankObservation):
    """The dimensions in which the vectors of the rows differ by more than rounding.

    returns: 0 to the smaller of width and rows − 1
    source: Golub and Van Loan 2013, section 5.4.1
    """

    def number(self, singular: Floats, seen: RowVectors) -> float:
        from mechdsl.fits.geometry import matrix_rank

        return float(matrix_rank(singular, seen.vectors.shape, seen.precision))

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield "singular values above max(rows, width) · the model's rounding · the largest count"
        yield from super().said(rule)


@observation("effective_rank", unit="dimensions")
class EffectiveRank(_RankObservation):
    """The exponential of the entropy of the vectors' singular values, as shares of their sum.

    returns: 1 to the rank; 0 where no two rows differ
    source: Roy and Vetterli 2007, equation 3
    """

    def number(self, singular: Floats, seen: RowVectors) -> float:
        from mechdsl.fits.geometry import effective_rank, matrix_rank

        real = singular[: matrix_rank(singular, seen.vectors.shape, seen.precision)]
        return effective_rank(real)


def resolve_training_rows(
    rule: spec.Rule, resolved: ResolvedRule, work: ExperimentContext
) -> TrainingRows | None:
    """Resolve the rows after `train:` at the positions of the rule.

    None if there are none, and after an error.
    """
    said = rule.observed
    named = None if said is None else training_rows(said.call)
    if named is None or said is None:
        return None
    rows = parse_fit_rows(named, work.program.prompts)
    table = None if rows is None else work.table.other_tables.get(rows.key)
    if rows is None or table is None or (not table.stands_in and rows.run not in table.runs):
        known = ", ".join(f"`{name}`" for name in work.program.prompts)
        hint = f"write a block, its part or its run: `train: fruit.train`; there is {known}"
        report_bad_observation(rule, work, f"can't be fitted on `{named.span.written}`", hint)
        return None
    if work.table.stands_in or table.stands_in:
        return None
    run_rows, fitted = work.table.runs[work.experiment.base].rows, table.runs[rows.run].rows
    keys, texts = set(table.row_keys), {row.ids for row in fitted}
    images = _source_images(fitted) if table.cut_from or work.table.cut_from else set()
    pairs = zip(work.table.row_keys, run_rows, strict=True)
    shared = sum(
        key in keys or row.ids in texts or bool(_source_images([row]) & images)
        for key, row in pairs
    )
    if shared:
        reason = f"is evaluated on {count_noun(shared, 'row')} that it is fitted on"
        report_bad_observation(
            rule, work, reason, "use parts of a split: `train: fruit.train` on `fruit.test`"
        )
        return None
    cells, problems = resolve_external_positions(rule.at, table, rows.run, work)
    work.diagnostics.extend(problems)
    by_label = {cell.label: cell for cell in cells}
    labels = [cell.label for cell in resolved.positions.written.values()]
    lacking = [label for label in labels if label not in by_label]
    if lacking and not has_errors(problems):
        reason = f"is fitted on rows without `{lacking[0]}`"
        report_bad_observation(rule, work, reason, "name a position that both blocks have")
        return None
    if has_errors(problems):
        return None
    training = TrainingRows(table, table.runs[rows.run], tuple(by_label[label] for label in labels))
    if resolved.in_vision and not _check_images_differ(rule, resolved, training, work):
        return None
    return training


def _check_images_differ(
    rule: spec.Rule, resolved: ResolvedRule, training: TrainingRows, work: ExperimentContext
) -> bool:
    """Report E0207 for rows whose images are those of training rows: the vectors of patches depend
    on the image only."""
    run = work.table.runs[work.experiment.base]
    known = _images_of_rows(training.run, training.cells)
    every = [_images_of_rows(run, [cell]) for cell in resolved.positions.written.values()]
    shared = set().union(*every) & known
    if not shared:
        return True
    reason = f"is evaluated on {count_noun(len(shared), 'image')} of the rows that it is fitted on"
    hint = "name rows with other images, such as a block with another `where`"
    report_bad_observation(rule, work, reason, hint)
    return False


def _images_of_rows(run: PromptRun, cells: Iterable[PositionCell]) -> set[str]:
    """Return digests of the images that have tokens of a position."""
    return {
        image
        for cell in cells
        for number, row in enumerate(run.rows)
        for image in row.images_at(cell.tokens(number))
    }


def _source_images(rows: Sequence[RunRow]) -> set[str]:
    """Return the source images of rows that are images or tiles of images."""
    images = (row.image for row in rows if row.image is not None)
    return {replace(image.uncut, changes=()).content() for image in images}


MAX_CKA_ROWS = 5000
"""Maximum number of rows for CKA, which keeps all pairs of rows in memory."""


@observation("similarity", unit="cosine")
class Similarity(SiteRowSetObservation):
    """The cosine of two vectors of a row.

    At two positions, or at the tokens of one; `with SITE`: at two sites; `with RUN`: in two runs.
    returns: −1 to 1, averaged over the pairs of different tokens
    """

    takes: ClassVar = ("with", "with site")
    of_directions: ClassVar[bool] = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        run = work.table.runs[work.experiment.base]
        if run.draws > 1:
            report_bad_observation(
                rule, work, "has no meaning over draws of noise", "use one draw: `samples: 1`"
            )
            return None
        if rule.receiver is None:
            return self._of_positions(rule, work)
        if rule.onto is not None:
            reason = "compares two positions, or one position at two sites or in two runs"
            report_bad_observation(rule, work, reason, "remove one `with …`")
            return None
        other = match_run(rule.receiver, work)
        resolved = self._of_runs(rule, other, work) if other else self._of_sites(rule, work)
        several = resolved is not None and any(
            sum(map(len, row)) > 1
            for cells in (resolved.positions.written, resolved.positions.read)
            for cell in cells.values()
            for row in cell.hits
        )
        if several:
            reason = "compares one token at a time with itself"
            report_bad_observation(rule, work, reason, "sweep them: `each SPAN token`, `token *`")
            return None
        return resolved

    def _of_positions(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule.model_copy(update={"onto": None}), work)
        if rule.onto is None or resolved is None:
            return resolved
        both = sweeps_positions(rule.at, work) and sweeps_positions(rule.onto, work)
        if both:
            reason = "can't sweep at both positions"
            report_bad_observation(
                rule, work, reason, "sweep at one of them, and name or join the other: `{A, B}`"
            )
            return None
        others = resolve_base_positions(rule.onto, work.reading(resolved.sites))
        return (
            None if others is None else replace(resolved, spec=rule, edge=EdgeTargets(None, others))
        )

    def _of_sites(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.receiver is not None
        resolved, nothing = super().resolve(rule, work), is_unknown_name(rule.receiver, work)
        others = None if nothing else resolve_compared_sites(rule, work)
        if resolved is None or others is None or not self.sites_fit(rule, others, work):
            return None
        if not _compares_one_side(resolved, others, work):
            return None
        shape = work.sites.shape
        widths = {
            sum(count_numbers(point, shape) for point in points)
            for sites in (resolved.sites, others)
            if sites is not None
            for points in sites.points.values()
        }
        if len(widths) > 1 and not shape.stands_in:
            reason = (
                f"needs vectors of equal width, not of {' and '.join(map(str, sorted(widths)))}"
            )
            report_bad_observation(rule, work, reason, "name sites of the same space, or `cka`")
            return None
        return replace(resolved, compared_sites=others)

    def _of_runs(self, rule: spec.Rule, other: str, work: ExperimentContext) -> ResolvedRule | None:
        if work.table.runs[other].draws > 1:
            report_bad_observation(
                rule, work, "has no meaning over draws of noise", "use one draw: `samples: 1`"
            )
            return None
        resolved = super().resolve(rule, work)
        return None if resolved is None else replace(resolved, does=SimilarityBetweenRuns())

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        other = seen.vectors if seen.other is None else seen.other
        different, same = seen.pairs.T
        total = (seen.vectors * other).sum(axis=1) - same
        if np.isnan(total).any():
            raise ValueError("a vector is 0, so it has no direction")
        return [np.divide(total, different, out=np.full(len(total), np.nan), where=different > 0)]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        if rule.compared_sites is not None:
            yield "of the same token at two sites"
            return
        yield "the mean over pairs of different tokens, one from each position"
        yield "rows without such a pair aren't part of the cell"


class SimilarityBetweenRuns(Similarity):
    """Cosine with the vector at the same position in another run."""

    reads: ClassVar = "run"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield f"with the vector at the same position of `{rule.run}`"


@observation("rank_correlation", unit="correlation")
class RankCorrelation(Similarity):
    """The rank correlation of what two tokens of a row predict.

    Spearman's, over the tokens that are among the `rank_correlation(10)` most likely next tokens at
    one position or the other.
    returns: −1 to 1
    source: Spearman 1904; after Liang et al. 2025, arXiv 2509.22415 (activation ranking
        correlation)
    """

    takes: ClassVar = ("with", "arguments")
    of_directions: ClassVar[bool] = False
    of_output: ClassVar[bool] = True

    def __init__(self, count: int = 0) -> None:
        """Create the observation.

        Args:
            count: Number of most likely tokens at each position.
        """
        self.count = count

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        count = _read_top_count(rule, work)
        if rule.onto is None or rule.receiver is not None:
            hint = f"write `observe {self.word}(10) logits at each SPAN token with last token`"
            report_bad_observation(rule, work, "compares two positions of a prompt", hint)
            return None
        resolved = super().resolve(rule, work)
        if resolved is None or count is None or not check_unembedding(rule, work):
            return None
        assert resolved.edge is not None
        cells = (*resolved.positions.written.values(), *resolved.edge.keys.written.values())
        if any(sum(map(len, row)) > 1 for cell in cells for row in cell.hits):
            reason = "compares one token with another one"
            report_bad_observation(rule, work, reason, "sweep them: `each SPAN token`, `token *`")
            return None
        return replace(resolved, does=RankCorrelation(count))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        if any(point.site != "logits" for points in sites.points.values() for point in points):
            report_bad_observation(rule, work, "compares predictions", "write `logits`")
            return False
        return super().sites_fit(rule, sites, work)

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.agreement import top_rank_correlation

        assert seen.other is not None
        pairs = zip(seen.vectors, seen.other, strict=True)
        return [np.array([top_rank_correlation(*pair, self.count) for pair in pairs])]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield (
            "Spearman's correlation of the logits, over the tokens that are among the "
            f"{self.count} most likely at one position or the other"
        )


def _read_top_count(rule: spec.Rule, work: ExperimentContext) -> int | None:
    """Read the number of most likely tokens; None after E0207."""
    assert rule.observed is not None
    call = rule.observed.call
    given = () if call is None else call.arguments
    one = given[0] if len(given) == 1 and given[0].name is None else None
    count = constant_value(None if one is None else one.value, work.program.parameters)
    if is_integer(count, least=2):
        return count
    reason = "takes one whole number of most likely tokens, above 1"
    report_bad_observation(rule, work, reason, f"write `{rule.observed.word}(10)`")
    return None


def match_run(site: ast.Site, work: ExperimentContext) -> str | None:
    """Return the run that is named where a site is permitted; None if no run has this name."""
    name = "" if site.bare is None else site.bare.id
    return name if name in work.table.runs and name not in SITES else None


def is_unknown_name(site: ast.Site, work: ExperimentContext) -> bool:
    """Report E0203 for a name that is neither a run nor part of a site."""
    name = site.bare
    if name is None or name.id in (*SITES, *work.loops, *work.program.groups):
        return False
    blocks = (block for block in work.program.prompts if block != work.table.name)
    runs = dict.fromkeys((*work.table.runs, *blocks))
    known = f"runs are {name_list(runs)}, and a site is, for example, `resid_post layer *`"
    hint = did_you_mean(name.id, [*runs, *SITES], known)
    problem = UnknownWord(span=name.span, kind="site or run", word=name.id, hint=hint)
    work.diagnostics.append(problem)
    return True


@observation("cka", unit="CKA")
class Cka(SiteRowSetObservation):
    """Linear CKA of two sites: how alike they set the rows apart from each other.

    `with RUN`: of the same site in two runs.
    returns: about 0 to 1, corrected for few rows
    source: Kornblith et al. 2019, arXiv 1905.00414, section 3; Song et al. 2012, equation 5
    """

    takes: ClassVar = ("with site",)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        if rule.receiver is None:
            hint = "name the other: `with resid_post layer *`, or a run: `with fewer`"
            report_bad_observation(rule, work, "compares two sites", hint)
            return None
        if len(work.table) > MAX_CKA_ROWS:
            reason = f"of {len(work.table):,} rows is too large: it stores all pairs of rows"
            report_bad_observation(
                rule, work, reason, f"write `limit {MAX_CKA_ROWS}` after `prompts`"
            )
            return None
        if match_run(rule.receiver, work) is not None:
            return None if resolved is None else replace(resolved, does=CkaBetweenRuns())
        others = (
            None if is_unknown_name(rule.receiver, work) else resolve_compared_sites(rule, work)
        )
        if resolved is None or others is None or not self.sites_fit(rule, others, work):
            return None
        if not _compares_encoder(resolved, others, work) and not _compares_one_side(
            resolved, others, work
        ):
            return None
        return replace(resolved, compared_sites=others)

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        from mechdsl.fits.geometry import cka_per_row, linear_kernel

        assert seen.other is not None
        numbers = {key: number for number, key in enumerate(dict.fromkeys(seen.keys))}
        index = np.array([numbers[key] for key in seen.keys])
        first = np.unique(index, return_index=True)[1]
        kernels = (linear_kernel(each[first]) for each in (seen.vectors, seen.other))
        each = cka_per_row(*kernels)
        # Rows with equal vectors share one contribution, so that the mean is unchanged.
        copies, mean = np.bincount(index), each.mean()
        shared = mean + (each - mean) * len(seen.keys) / len(first) / copies
        return [shared[index]]

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        if rule.in_vision and not rule.only_in_vision:
            yield "in the vision encoder, the vector of a token is the mean over its patches"
        yield "the estimator without bias for few rows (Song et al. 2012), over distinct rows"
        yield "its interval is that of the jackknife over rows"


class CkaBetweenRuns(Cka):
    """CKA of a site with the same site in another run."""

    reads: ClassVar = "run"

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield f"with the same site at the same position of `{rule.run}`"
        yield from super().said(rule)


@observation("random")
class RandomNumber(SiteRowSetObservation):
    """A number drawn for each row and place, even between 0 and 1.

    It depends on the seed of the file, on the text or image that is looked at and on the position,
    and not on the vector: maps are set against it, and tokens are ranked by it in random order.
    `random(20)` draws twenty, along an axis `draw`.
    """

    takes: ClassVar = ("arguments",)
    counts = "draw"
    of_whole_text = True

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved, said = super().resolve(rule, work), rule.observed
        assert said is not None
        if said.call is None:
            return resolved
        one = said.call.arguments[0] if len(said.call.arguments) == 1 else None
        node = None if one is None or one.name is not None else one.value
        draws = constant_value(node, work.program.parameters)
        if not is_integer(draws, least=1):
            report_bad_observation(
                rule, work, "takes one whole number of draws, above 0", "write `random(20)`"
            )
            return None
        work.add_axis(Axis(self.counts, tuple(range(1, draws + 1)), said.span))
        if resolved is None or resolved.sites is None:
            return None
        return replace(resolved, sites=repeat_sites(resolved.sites, self.counts, draws))

    def per_row(self, seen: RowVectors, seed: int) -> Sequence[Floats]:
        import numpy as np

        which = (seen.number,) if seen.number else ()
        drawn = [digest_number("random", seed, key, *which) for key in seen.keys]
        return [np.array(drawn, dtype=np.float64) / 2**64]


MAX_CLUSTERS = 64
"""Maximum number of clusters."""


@observation("clusters", unit="probability")
class Clusters(SiteTokenSetObservation):
    """How likely a token's vector is of each of a few clusters.

    `with RUN`: whether its likeliest cluster is the same in both runs.
    returns: 0 to 1; those of all clusters add up to 1
    source: Lloyd 1982, IEEE Transactions on Information Theory 28(2); of patches: Wang, Tan and
    Wang 2024, arXiv 2406.12649
    """

    takes: ClassVar = ("arguments", "with site")
    counts = "cluster"
    findings: ClassVar = ("starts",)

    def __init__(
        self, count: int = 0, trained_on: TrainingRows | None = None, train: str = ""
    ) -> None:
        """Create the observation.

        Args:
            count: Number of clusters; 0 only in the registered instance.
            trained_on: Rows to fit on, if they are other rows.
            train: Name of these rows in the file.
        """
        self.count, self.trained_on, self.train = count, trained_on, train

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        count = _read_count(rule, work)
        before = len(work.diagnostics)
        train = None if resolved is None else resolve_training_rows(rule, resolved, work)
        if rule.receiver is not None and match_run(rule.receiver, work) is None:
            report_bad_observation(rule, work, "is compared with a run", "name one: `with noised`")
        if has_errors(work.diagnostics[before:]):
            return None
        if count is None or resolved is None or resolved.sites is None:
            return None
        named = None if train is None else training_rows(said.call)
        called = "" if named is None else named.span.written
        if rule.receiver is not None:
            return replace(resolved, does=ClusterAgreement(count, train, called))
        work.add_axis(Axis("cluster", tuple(range(1, count + 1)), said.span))
        sites = repeat_sites(resolved.sites, "cluster", count)
        return replace(resolved, does=Clusters(count, train, called), sites=sites)

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        """Report E0207 also for tokens whose order differs between two runs."""
        for row in range(len(work.table)):
            pairs = sorted(_token_pairs(found.positions, row))
            if any(a == c or b >= d for (a, b), (c, d) in pairwise(pairs)):
                reason = "has tokens in a different order in the other run"
                report_bad_observation(rule, work, reason, "write a line for each position")
                return False
        return super().positions_fit(rule, found, work)

    def fitted(self, seen: ObservedTokens, seed: int) -> Mixture:
        """Fit the mixture independently of the order of rows."""
        import numpy as np

        from mechdsl.fits.geometry import fit_mixture

        of = seen.own if seen.training is None else seen.training
        _, rank = np.unique([key.hex() for key in of.keys], return_inverse=True)
        order = np.argsort(rank[of.row], kind="stable")
        return fit_mixture(of.vectors[order], self.count, seed)

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        fit = self.fitted(seen, seed)
        likely = fit(seen.own.vectors).T
        return [likely, np.full(likely.shape, fit.reached)]

    def describe_findings(self, found: Mapping[str, tuple[float, float]]) -> Iterator[Convention]:
        """Describe how many starts have the least sum of squared distances."""
        from mechdsl.fits.geometry import CLUSTER_STARTS

        for least, most in found.values():
            reached = f"{least:.0f} to {most:.0f} of them, depending on the site,"
            if least == most:
                reached = "1 of them" if most == 1 else f"{most:.0f} of them"
            verb = "reaches" if most == 1 else "reach"
            text = f"best of {CLUSTER_STARTS} starts; {reached} {verb} its sum of squared distances"
            if least == 1:
                where = "" if most == 1 else " where only 1 reaches it"
                text += f"; another seed may find other clusters{where}"
            yield Convention("k-means", text)

    def said(self, rule: ResolvedRule) -> Iterator[str]:
        yield (
            f"k-means of {self.count} clusters on standardised vectors of all tokens of the line; "
            "the largest cluster is the first"
        )
        yield f"fitted on `{self.train}`" if self.trained_on else "fitted on the same rows"
        yield from self.told()

    def told(self) -> Iterator[str]:
        """Yield notes on the meaning of its number."""
        yield "its probability is that of Gaussians around the centres with equal variance"


class ClusterAgreement(Clusters):
    """Agreement of a token's most likely cluster with that in another run."""

    reads: ClassVar = "run"
    counts = ""

    def per_token(self, seen: ObservedTokens, seed: int) -> Sequence[Floats]:
        import numpy as np

        assert seen.other is not None
        fit = self.fitted(seen, seed)
        values, other = (
            _likeliest_cluster(fit, token_vectors) for token_vectors in (seen.own, seen.other)
        )
        same = (values == other).astype(float)[None]
        return [same, np.full(same.shape, fit.reached)]

    def told(self) -> Iterator[str]:
        yield "whether the most likely cluster is the same at the same position of the other run"


def _token_pairs(positions: PositionTargets, row: int) -> set[tuple[int, int]]:
    """Return pairs of a token and the corresponding token in the run that is read."""
    cells = zip(positions.written.values(), positions.read.values(), strict=True)
    return {
        pair
        for position_cell, other in cells
        for one, two in zip(position_cell.hits[row], other.hits[row], strict=True)
        for pair in zip(one, two, strict=True)
    }


def _likeliest_cluster(fit: Mixture, tokens: TokenVectors) -> Floats:
    """Return the most likely cluster of each token: [token]."""
    return fit(tokens.vectors).argmax(axis=1).astype(float)


def _read_count(rule: spec.Rule, work: ExperimentContext) -> int | None:
    """Read the number of clusters; report E0207 for a missing number or other arguments."""
    said = rule.observed
    assert said is not None
    arguments = () if said.call is None else said.call.arguments
    plain = [argument.value for argument in arguments if argument.name is None]
    other = next((argument for argument in arguments if argument.name not in (None, "train")), None)
    if other is not None:
        hint = "there is train"
        work.diagnostics.append(
            BadArgument(span=other.span, name=other.name or "", reason="isn't an option", hint=hint)
        )
        return None
    number = constant_value(plain[0], work.program.parameters) if len(plain) == 1 else None
    if not is_integer(number) or not 2 <= number <= MAX_CLUSTERS:
        hint = f"write a number from 2 to {MAX_CLUSTERS}: `clusters(6)`"
        report_bad_observation(rule, work, "doesn't state the number of clusters", hint)
        return None
    return number
