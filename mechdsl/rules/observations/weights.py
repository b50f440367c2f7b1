"""Observations of a model's weights alone: circuits of heads, value vectors, successor heads; and
of circuits alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from mechdsl.base.text import name_list
from mechdsl.diagnostics.core import did_you_mean
from mechdsl.diagnostics.syntax import BadArgument, NotSupported
from mechdsl.models.shape import vector_width
from mechdsl.program import spec
from mechdsl.prompts.runs import PositionCell
from mechdsl.resolve.bases import resolve_argument_bases, resolve_feature_nodes
from mechdsl.resolve.circuits import (
    CircuitEdges,
    ComparedCircuits,
    compare_circuits,
    find_circuit_edges,
    list_sender_sites,
)
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.sites import ExperimentContext, resolve_site
from mechdsl.resolve.types import (
    Axis,
    BasisMember,
    Convention,
    PositionTargets,
    ResolvedRule,
    SiteTargets,
    find_stream,
)
from mechdsl.rules.observations.registry import (
    ObservationKind,
    check_unembedding,
    observation,
    report_bad_observation,
)
from mechdsl.rules.observations.rows import repeat_sites, resolve_compared_sites
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import MetricForm

FOLDED_NOTE = (
    "gains of norms are folded in; their scales, biases and rotary embeddings are not, so "
    "queries and keys are at distance 0"
)


class WeightObservation(RowSetObservation, ObservationKind):
    """`observe WORD layer * head *`: a number of each head's weights, or of each neuron's."""

    spread: Literal["rows", "unknown", "none"] = "none"
    unplaced = "last token"
    reads_vectors = False
    of_weights = True
    folded: ClassVar[str] = FOLDED_NOTE
    """Note on the treatment of norms, biases and positions."""
    compares: ClassVar[bool] = False
    """Whether a second site follows `with`."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.site is not None
        assert rule.observed is not None
        fits = self.clauses_fit(rule, work)
        if rule.observed.placed:
            report_bad_observation(rule, work, "reads weights, not a token", "remove `at …`")
            fits = False
        sites, axes = resolve_site(rule.site, work.sites)
        for axis in axes:
            work.add_axis(axis)
        others = None
        if self.compares and rule.receiver is None:
            report_bad_observation(
                rule, work, "compares two heads", "name the later head: `with layer * head *`"
            )
            fits = False
        elif rule.receiver is not None:
            others = resolve_compared_sites(rule, work)
            fits = fits and others is not None
        if sites is None or not fits:
            return None
        parts = [sites] if others is None else [sites, others]
        if not all(self.sites_fit(rule, part, work) for part in parts):
            return None
        nothing = (((),),) * len(work.table)
        cell = PositionCell("weights", nothing)
        places = PositionTargets((), {(): cell}, {(): cell})
        base = work.experiment.base
        return ResolvedRule(
            spec=rule, does=self, run=base, sites=sites, positions=places, compared_sites=others
        )

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        """Report E0207 for cells that aren't a single head."""
        return check_single_units(
            rule, sites, work, "z", "head", "write `layer * head *`, or `L1H2`"
        )

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        parts = [f"{self.word}: {said}", *self.said(), self.folded]
        yield Convention("observed", "; ".join(parts))

    def said(self) -> Iterator[str]:
        """Yield further notes for tables."""
        yield from ()


def check_single_units(
    rule: spec.Rule, sites: SiteTargets, work: ExperimentContext, site: str, unit: str, hint: str
) -> bool:
    """Report E0207 for cells that aren't a single unit of a site."""
    for key, points in sites.points.items():
        if key not in sites.missing and [(point.site, point.unit is None) for point in points] != [
            (site, False)
        ]:
            report_bad_observation(rule, work, f"reads one {unit} at a time", hint)
            return False
    return True


@observation("copying", unit="share of eigenvalues")
class Copying(WeightObservation):
    """Whether a head raises the logits of the tokens that it attends to.

    returns: −1 to 1, Σ λ / Σ |λ| over the eigenvalues of embedding → OV → unembedding
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    def said(self) -> Iterator[str]:
        yield "Σ λ / Σ |λ| of the eigenvalues of embedding → OV → unembedding"


@observation("matching", unit="share of eigenvalues")
class Matching(WeightObservation):
    """Whether a head attends to tokens that are equal to its own.

    returns: −1 to 1, Σ λ / Σ |λ| over the eigenvalues of embedding → QK ← embedding
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    def said(self) -> Iterator[str]:
        yield "Σ λ / Σ |λ| of the eigenvalues of embedding → QK ← embedding"


def read_option_word(
    rule: spec.Rule, words: Mapping[str, str], reason: str, work: ExperimentContext
) -> str | None:
    """Read the single word in parentheses; report E0207 with `reason` for another word, or none."""
    said = rule.observed
    assert said is not None
    call = said.call
    argument = None if call is None or len(call.arguments) != 1 else call.arguments[0]
    by = argument.value if argument is not None and argument.name is None else None
    if isinstance(by, ast.Name) and by.id in words:
        return by.id
    usage = " or ".join(f"`{said.word}({word})`" for word in words)
    hint = did_you_mean(by.id if isinstance(by, ast.Name) else "", words, f"write {usage}")
    span, name = (said.span, said.word) if by is None else (by.span, by.span.written)
    reason = reason if by is not None else "names no type of composition"
    work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
    return None


COMPOSITIONS: Mapping[str, str] = {"q": "queries", "k": "keys", "v": "values"}


@observation("composition", unit="of its norm")
class Composition(WeightObservation):
    """How much of what a head writes a later head reads.

    returns: 0 to 1, ‖AB‖ / (‖A‖ ‖B‖), Frobenius
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework
    """

    takes: ClassVar = ("arguments", "with site")
    compares = True
    leads_on = True

    def __init__(self, by: str = "") -> None:
        """Create the observation for `by` q, k or v; empty only in the registered instance."""
        self.by = by

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        by = read_option_word(rule, COMPOSITIONS, "isn't a type of composition", work)
        return None if resolved is None or by is None else replace(resolved, does=Composition(by))

    def said(self) -> Iterator[str]:
        maps = "OV" if self.by == "v" else "QK"
        of = COMPOSITIONS[self.by]
        yield f"‖AB‖ / (‖A‖ ‖B‖) of the first head's OV and the later one's {maps}, by its {of}"
        yield "pairs whose second head isn't in a later layer are excluded"


CIRCUITS: Mapping[str, str] = {"ov": "W_V W_O", "qk": "W_Q W_Kᵀ, not divided by the root of width"}


@observation("singular_values", unit="of a vector's length")
class SingularValues(WeightObservation):
    """The largest singular values of what a head does to a vector, the largest first.

    By how much it lengthens a vector along its directions (`ov`), or how large a score two vectors
    of length 1 can have (`qk`).
    source: Millidge and Black 2022, "The singular value decompositions of transformer weight
        matrices are highly interpretable"
    """

    takes: ClassVar = ("arguments", "top")
    counts = "value"

    def __init__(self, of: str = "") -> None:
        """Create the observation for `of` ov or qk; empty only in the registered instance."""
        self.of = of

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        said = rule.observed
        assert said is not None
        of = read_option_word(rule, CIRCUITS, "isn't a map of a head", work)
        if said.top is None:
            report_bad_observation(rule, work, "doesn't state how many", "write `top 5`")
        if resolved is None or resolved.sites is None or of is None or said.top is None:
            return None
        site, shape = ("z" if of == "ov" else "q"), work.sites.shape
        layers = {point.layer for here in resolved.sites.points.values() for point in here}
        most = min(min(vector_width(shape, site, n), shape.d_model) for n in layers)
        if said.top > most and not shape.stands_in:
            report_bad_observation(
                rule,
                work,
                f"doesn't have {said.top} values: a head has {most}",
                f"write `top {most}`",
            )
            return None
        work.add_axis(Axis(self.counts, tuple(range(1, said.top + 1)), said.span))
        sites = repeat_sites(resolved.sites, self.counts, said.top)
        return replace(resolved, does=SingularValues(of), sites=sites)

    def said(self) -> Iterator[str]:
        yield f"of {CIRCUITS[self.of]}"


CIRCUIT_AXES = ("from_feature", "to_feature")
"""Axes of the coordinates that a head reads and writes, or of its query and its key."""


class BasisObservation(WeightObservation):
    """An observation of the coordinates of two bases, along an axis for each of them or the first
    alone."""

    takes: ClassVar = ("arguments",)
    of_bases = True
    keeps_cells = False  # computed faster than read
    basis_counts: ClassVar[tuple[int, ...]]
    """How many bases it takes; one stands for both."""

    def __init__(self, members: tuple[BasisMember, ...] = ()) -> None:
        """Create the observation for two bases; none only in the registered instance."""
        self.members = members

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved, named = super().resolve(rule, work), _read_bases(rule, self.basis_counts, work)
        bases = None if named is None else resolve_argument_bases(named, work)
        if resolved is None or resolved.sites is None or bases is None:
            return None
        members = bases.members[0], bases.members[-1]
        if not self.bases_fit(rule, members, work):
            return None
        sites = resolved.sites
        assert rule.observed is not None
        for axis, member in zip(self.value_axes, members, strict=False):
            size = min(member.size, 2) if work.sites.shape.stands_in else member.size
            work.add_axis(Axis(axis, tuple(range(size)), rule.observed.span))
            sites = repeat_sites(sites, axis, size)
        return replace(resolved, does=type(self)(members), sites=sites, basis=bases)

    def bases_fit(
        self, rule: spec.Rule, members: tuple[BasisMember, BasisMember], work: ExperimentContext
    ) -> bool:
        """Report E0207 for bases that it can't use."""
        return True


class HeadCircuit(BasisObservation):
    """`observe ov(b) layer 1 head 2`, `observe qk(b, c) …`: a head's map between coordinates of
    bases."""

    value_axes = CIRCUIT_AXES
    basis_counts = (1, 2)
    ends: ClassVar[str]
    """What the two bases are of, for tables."""
    reads_coordinates: ClassVar[bool]
    """Whether the second basis reads the result, instead of giving directions too."""

    def bases_fit(
        self, rule: spec.Rule, members: tuple[BasisMember, BasisMember], work: ExperimentContext
    ) -> bool:
        if not self.reads_coordinates or not members[1].reads:
            return True
        reason = f"can't read the result with `{members[1].name}`, a transcoder"
        report_bad_observation(rule, work, reason, "name a basis of the residual stream")
        return False

    def said(self) -> Iterator[str]:
        first, second = self.members
        yield self.ends.format(first.name, second.name)


def _read_bases(
    rule: spec.Rule, counts: tuple[int, ...], work: ExperimentContext
) -> list[ast.Name] | None:
    """Return the names of the bases in parentheses; None after E0207 for other arguments.

    Args:
        counts: Possible numbers of bases.
    """
    said = rule.observed
    assert said is not None
    given = () if said.call is None else said.call.arguments
    values = [argument.value for argument in given if argument.name is None]
    named = [value for value in values if isinstance(value, ast.Name)]
    if len(given) not in counts or len(named) < len(given):
        many = "two bases" if counts == (2,) else "one or two bases"
        listed = ", ".join("bc"[: max(counts)])
        hint = f"write `observe {said.word}({listed}) …`"
        report_bad_observation(rule, work, f"takes {many}", hint)
        return None
    return named if len(said.bases) == len(named) else None  # otherwise already reported


@observation("ov", unit="per coordinate")
class OutputValueCircuit(HeadCircuit):
    """What a head adds to a coordinate of its output, per unit of a coordinate that it reads.

    The direction of coordinate `from_feature` of the first basis goes through the gain of the norm
    and W_V W_O, and the second basis (the first one without it) reads coordinate `to_feature`. For
    a dictionary this is the feature before its bias and activation function.
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework; Dunefsky et al. 2024,
        arXiv 2406.11944
    """

    ends = "from coordinates of {} at the attended token to those of {} in the head's output"
    reads_coordinates = True


@observation("qk", unit="score")
class QueryKeyCircuit(HeadCircuit):
    """What a pair of coordinates adds to a head's score, per unit of both.

    The direction of coordinate `from_feature` of the first basis is at the query, and that of
    `to_feature` of the second (the first one without it) at the key. The score isn't divided by
    the root of the width.
    source: Elhage et al. 2021, transformer-circuits.pub/2021/framework; Dunefsky et al. 2024,
        arXiv 2406.11944
    """

    ends = "from coordinates of {} at the query to those of {} at the key"
    reads_coordinates = False

    def said(self) -> Iterator[str]:
        yield from super().said()
        yield "not divided by the root of width"


@observation("matched_cosine", unit="cosine")
class MatchedCosine(BasisObservation):
    """The largest cosine of a basis's direction with directions of another basis.

    returns: −1 to 1, by coordinate of the first basis; `partner` is the coordinate of the second
        that matches best, from 0
    source: Leask et al. 2025, arXiv 2502.04878; Bricken et al. 2023
    """

    value_axes = ("feature",)
    basis_counts = (2,)
    controls: ClassVar[tuple[str, ...]] = ("partner",)
    folded: ClassVar = "each basis's directions are those that its coordinates add to a vector"

    def form_of(self, name: str) -> MetricForm:
        if name == "partner":
            return replace(self.form, unit="number", meaning="The coordinate that matches best")
        return super().form_of(name)

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        hint = "name the site of the bases: `resid_post layer 1`"
        if len(sites.points) == 1 and len(next(iter(sites.points.values()))) == 1:
            return True
        report_bad_observation(rule, work, "compares bases of one site", hint)
        return False

    def said(self) -> Iterator[str]:
        first, second = self.members
        yield f"of {first.name} with {second.name}; `partner` is the coordinate of {second.name}"


MIN_TEXTS = 3
"""Minimum number of texts: with two, there is none to rank below the successor."""


@observation("successor", unit="share")
class Successor(WeightObservation):
    """The share of texts whose next one a head raises most, of all that are listed.

    Token embedding → norm and MLP of the first block → OV → final norm's gain → unembedding. Beside
    it stands the mean rank of the next one, 1 where it is raised most.
    source: Gould et al. 2023, arXiv 2312.09230, section 2
    """

    takes: ClassVar = ("arguments",)
    controls: ClassVar[tuple[str, ...]] = ("rank",)
    folded: ClassVar = (
        "through the first block's norm and MLP, then gains of norms, without scales and biases"
    )

    def __init__(self, tokens: Sequence[int] = (), texts: Sequence[str] = ()) -> None:
        """Create the observation.

        Args:
            tokens: The token of each text, each followed by its successor; empty only in the
                registered instance.
            texts: The texts as written.
        """
        self.tokens, self.texts = tuple(tokens), tuple(texts)

    def form_of(self, name: str) -> MetricForm:
        if name == "rank":
            return replace(self.form, unit="rank", meaning="Its mean rank")
        return super().form_of(name)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        there = check_unembedding(rule, work)
        resolved = super().resolve(rule, work)
        tokens = _tokens(rule, work)
        if resolved is None or tokens is None or not there:
            return None
        assert rule.observed is not None
        assert rule.observed.call is not None
        texts = [argument.value.span.written for argument in rule.observed.call.arguments]
        return replace(resolved, does=Successor(tokens, texts))

    def said(self) -> Iterator[str]:
        yield f"of {', '.join(self.texts[:8])}" + (", …" if len(self.texts) > 8 else "")
        yield "`rank` is the mean rank of the next one, from 1"


def _tokens(rule: spec.Rule, work: ExperimentContext) -> list[int] | None:
    """Return the token of each text, without a prompt before it; None after E0207."""
    said, tokenizer = rule.observed, work.model.tokenizer
    assert said is not None
    arguments = () if said.call is None else said.call.arguments
    texts = [argument.value for argument in arguments if argument.name is None]
    strings = [string for string in texts if isinstance(string, ast.String)]
    if len(strings) < len(arguments) or len({string.value for string in strings}) < MIN_TEXTS:
        reason = f"takes at least {MIN_TEXTS} different texts, each followed by the next"
        report_bad_observation(rule, work, reason, 'write `successor(" one", " two", " three")`')
        return None
    tokens: list[int] = []
    for text in strings:
        ids = tokenizer.encode(text.value, add_special=False).ids
        if len(ids) != 1 and not tokenizer.stands_in:
            pieces = " ".join(f"`{tokenizer.token_text(one)}`" for one in ids)
            reason, hint = f"has several tokens: {pieces}", "name texts of one token"
            name = text.span.written
            problem = BadArgument(span=text.span, name=name, reason=reason, hint=hint)
            work.diagnostics.append(problem)
            return None
        tokens += ids[:1]
    return tokens


@observation("value_vectors", unit="logit")
class ValueVectors(WeightObservation):
    """What a neuron of activation 1 adds to the logit of the token that it raises most.

    Its output weights go through the final norm's gain and the unembedding, and through nothing
    else: not the norm's scale, no bias. `toward answer - wrong` reads these tokens of each row.
    source: Geva et al. 2022, arXiv 2203.14680
    """

    takes: ClassVar = ("toward", "top")
    folded: ClassVar = (
        "the output weights through the final norm's gain and the unembedding, without the norm's "
        "scale and without biases; a neuron whose activation is negative does the opposite"
    )

    def __init__(self, top: int = 0) -> None:
        """Create the observation, which lists the `top` tokens of each neuron."""
        self.top = top

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        there, said = check_unembedding(rule, work), rule.observed
        resolved = super().resolve(rule, work)
        if resolved is None or not there:
            return None
        assert said is not None
        kind = ValueVectors if said.toward is None else TokenValueVectors
        return replace(resolved, does=kind(said.top or 0))

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        hint = "write `layer * neuron *`"
        return check_single_units(rule, sites, work, "mlp_hidden", "neuron", hint)

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield from super().conventions(rule, n_layers)
        if self.top:
            yield Convention("top tokens", "the tokens whose logits the neuron raises most")


class TokenValueVectors(ValueVectors):
    """The contribution of a neuron to the logits after `toward`, which depend on the row."""

    gives: ClassVar[Literal["number", "logits"]] = "logits"
    spread: Literal["rows", "unknown", "none"] = "rows"

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = "the contribution of the neuron at activation 1 to the named logits"
        yield Convention("observed", f"{self.word}: {said}; {self.folded}")
        if self.top:
            yield Convention("top tokens", "the tokens whose logits the neuron raises most")


class CircuitComparison(WeightObservation):
    """`observe WORD c with d`: numbers of two circuits of one model."""

    takes: ClassVar = ("with site",)
    keeps_cells = False  # computed faster than read

    def __init__(
        self,
        circuits: tuple[CircuitEdges, CircuitEdges] | None = None,
        edges: ComparedCircuits | None = None,
    ) -> None:
        """Create the comparison of two circuits; of none only in the registered instance."""
        nothing = CircuitEdges((), (), {})
        self.first, self.second = circuits or (nothing, nothing)
        self.edges = edges or ComparedCircuits(frozenset(), frozenset(), 0)

    @property
    def made_of(self) -> Mapping[str, str]:
        own = (self.first, self.second)
        return {
            f"circuit {n}": circuit_edges.digest
            for n, circuit_edges in enumerate(own)
            if circuit_edges.digest
        }

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        fits = self.clauses_fit(rule, work)
        if rule.observed.placed:
            report_bad_observation(rule, work, "reads no token", "remove `at …`")
            fits = False
        one = self._circuit(rule.site, rule, work)
        other = self._circuit(rule.receiver, rule, work)
        if one is None or other is None or not fits:
            return None
        if (one.has_places or other.has_places) and self._lacks_prompts(rule, work):
            return None
        first = find_circuit_edges(one, rule.span, work, resolve_feature_nodes)
        second = find_circuit_edges(other, rule.span, work, resolve_feature_nodes)
        if first is None or second is None:
            return None
        if (first.places or second.places) and self._lacks_prompts(rule, work):
            return None
        edges = compare_circuits(first, second, rule, work)
        if isinstance(edges, tuple):
            problem, later = edges
            what = f"`observe {self.word}` of two circuits {problem}"
            work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
            return None
        if not self.edges_fit(first, edges, rule, work):
            return None
        untrained = one.name in work.program.masks and not first.scores
        if not untrained and not self.scores_fit(first, rule, work):
            return None
        edges_of_first, edges_of_second = (
            SiteTargets((), {(): list_sender_sites(circuit_edges.edges)}, {(): name})
            for circuit_edges, name in ((first, one.name), (second, other.name))
        )
        does = type(self)((first, second), edges)
        cell = PositionCell("edges", (((),),) * len(work.table))
        places = PositionTargets((), {(): cell}, {(): cell})
        base = work.experiment.base
        return ResolvedRule(
            spec=rule,
            does=does,
            run=base,
            sites=edges_of_first,
            positions=places,
            compared_sites=edges_of_second,
        )

    def _circuit(
        self, site: ast.Site | None, rule: spec.Rule, work: ExperimentContext
    ) -> spec.Circuit | None:
        """Return a named circuit; None after E0207."""
        name = None if site is None or site.bare is None else site.bare.id
        circuit = None if name is None else work.program.circuits.get(name)
        if circuit is None:
            known = name_list(work.program.circuits) or "the file has none"
            hint = f"write `observe {self.word} c with d as shared`; circuits: {known}"
            reason = "compares two circuits of the file"
            if name is not None:
                reason += f", and `{name}` isn't one"
                hint = did_you_mean(name, work.program.circuits, hint)
            report_bad_observation(rule, work, reason, hint)
            return None
        return circuit

    def _lacks_prompts(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        """Report E0207 for edges with positions in an experiment without prompts."""
        if work.table.name != spec.NO_PROMPTS:
            return False
        reason = "compares edges at positions, which are tokens of prompts"
        hint = "add a line to the experiment, such as `prompts fruit`"
        report_bad_observation(rule, work, reason, hint)
        return True

    def edges_fit(
        self, first: CircuitEdges, edges: ComparedCircuits, rule: spec.Rule, work: ExperimentContext
    ) -> bool:
        """Report E0108 for a first circuit whose edges can't be compared."""
        return True

    def scores_fit(self, circuit: CircuitEdges, rule: spec.Rule, work: ExperimentContext) -> bool:
        """Report E0207 for a first circuit without the scores that it needs."""
        return True

    def key(self, rule: ResolvedRule) -> Hashable:
        scores = tuple(self.first.scores.get(edge) for edge in self.first.every)
        return self.edges.first, self.edges.second, self.edges.total, scores

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        sizes = len(self.edges.first), len(self.edges.second), self.edges.total
        of = "vision encoder" if find_stream(self.edges.every) else "model"
        parts = "{:,} and {:,} edges, of {:,} of the {}".format(*sizes, of)
        yield Convention("observed", "; ".join([f"{self.word}: {said}", parts, *self.said()]))
        if self.edges.groups:
            groups = ", ".join(f"`{group}`" for group in self.edges.groups)
            said = f"each edge counts once for each of these groups of tokens: {groups}; an edge "
            yield Convention("compared at", f"{said}without a position is in all of them")
        if self.edges.divided:
            names = name_list(self.edges.divided)
            said = (
                f"an edge of {names} counts once for each node that the other circuit divides it "
            )
            yield Convention("compared nodes", f"{said}into: neurons or features, and the rest")


@observation("overlap", unit="number")
class CircuitOverlap(CircuitComparison):
    """The number of edges that two circuits share.

    Next to it: `jaccard` |c ∩ d| / |c ∪ d|, `precision` |c ∩ d| / |c|, `recall` |c ∩ d| / |d|, the
    number `expected` by chance, |c| |d| / all edges, and `p`, the probability of as many shared
    edges or more if the edges of c are drawn at random: the upper tail of the hypergeometric
    distribution.
    source: Merullo et al. 2024, arXiv 2310.08744
    """

    controls: ClassVar[tuple[str, ...]] = ("jaccard", "precision", "recall", "expected", "p")

    def form_of(self, name: str) -> MetricForm:
        meanings = {
            "jaccard": "Shared edges as a share of the edges of either circuit",
            "precision": "Shared edges as a share of the first circuit",
            "recall": "Shared edges as a share of the second circuit",
            "expected": "The expected number of shared edges of circuits drawn at random",
            "p": "Probability of as many shared edges or more by chance",
        }
        if name not in meanings:
            return super().form_of(name)
        return replace(self.form, meaning=meanings[name])

    def said(self) -> Iterator[str]:
        yield (
            "`expected` and `p` are of as many edges drawn uniformly (hypergeometric), which need "
            "not be on a path; edges on paths overlap more often"
        )


@observation("edge_auroc", unit="share")
class EdgeRanking(CircuitComparison):
    """The share of pairs of edges that the scores of the first circuit order rightly.

    A pair is an edge of the second circuit and one that isn't in it, of all edges of the model; the
    first has the larger absolute score. Ties count half.
    source: Hanley and McNeil 1982
    """

    def edges_fit(
        self, first: CircuitEdges, edges: ComparedCircuits, rule: spec.Rule, work: ExperimentContext
    ) -> bool:
        divides = {*edges.every} != {*first.every}
        if not edges.groups and not divides:
            return True
        what = f"`observe {self.word}` of circuits whose edges have positions"
        later = "compare circuits without positions, or write `observe overlap`"
        if divides:
            what = (
                f"`observe {self.word}` with a circuit that has more neurons or features as nodes"
            )
            later = "name no further neurons or features, or write `observe overlap`"
        work.diagnostics.append(NotSupported(span=rule.span, what=what, later=later))
        return False

    def scores_fit(self, circuit: CircuitEdges, rule: spec.Rule, work: ExperimentContext) -> bool:
        if len(circuit.scores) == len(circuit.every) or work.sites.shape.stands_in:
            return True
        reason = "needs scores of all edges of the model, which the first circuit doesn't have"
        scores = "let `fit` choose them"
        if find_stream(circuit.every):
            scores = 'read it from a file that has these scores: `saved("graph.json")`'
        hint = f"{scores}, or compare with `observe overlap c with d`"
        report_bad_observation(rule, work, reason, hint)
        return False
