"""Registry of observations, and the base class of observations at sites.

An entry is one class under `observation("WORD")`, here or outside. The first line of its docstring
is the meaning of `observe WORD SITE at POSITIONS`, and `each` computes a number from each vector:

    @observation("largest", unit="activation")
    class Largest(SiteObservation):
        "The largest number of the vector."

        def each(self, rule, seen):
            return seen.vectors.amax(-1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mechdsl.base.records import Registry
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.syntax import BadArgument, NotSupported, UnknownWord
from mechdsl.program import spec
from mechdsl.resolve.observations import Observation
from mechdsl.resolve.runs import RuleKind
from mechdsl.resolve.sites import ExperimentContext
from mechdsl.resolve.types import Convention, PositionTargets, ResolvedRule, SitePoint, SiteTargets
from mechdsl.rules.kinds import resolve_targets, rule_kind
from mechdsl.syntax.words import ObservationWord
from mechdsl.vocab.metrics import EFFECTS, METRICS, MetricForm

if TYPE_CHECKING:
    from torch import Tensor


OBSERVATIONS: Registry[ObservationKind] = Registry("observation")


class ObservationKind(Observation):
    """An observation that a word is registered for."""

    word_facts: ClassVar[ObservationWord]
    """Facts of its word for stages that don't know its class; set when it is registered."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        """Resolve the targets of a line; None after an error. See `RuleKind.resolve`."""
        raise NotImplementedError

    def clauses_fit(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        """Report E0207 for clauses that it doesn't accept, and for missing positions."""
        said = rule.observed
        assert said is not None
        given = {
            "toward": said.toward is not None,
            "with": rule.onto is not None and rule.edge is None,
            "with site": rule.receiver is not None,
            "top": said.top is not None,
            "arguments": said.call is not None,
        }
        before = len(work.diagnostics)
        for clause, there in given.items():
            if there and clause not in self.takes:
                words = "arguments" if clause == "arguments" else f"`{clause}`"
                report_bad_observation(rule, work, f"takes no {words}", "remove them")
        if not said.placed and self.unplaced == "refused":
            report_bad_observation(
                rule, work, "needs a position", "name one, for example `at last token`"
            )
        return not has_errors(work.diagnostics[before:])


K = TypeVar("K", bound=ObservationKind)


def observation(word: str, unit: str = "") -> Callable[[type[K]], type[K]]:
    """Register a kind of observation under the word after `observe`.

    Args:
        unit: The unit of its value.

    Raises:
        ValueError: If the word is already registered.
    """

    def register(entry: type[K]) -> type[K]:
        entry.name, entry.word, entry.unit = f"observe {word}", word, unit
        meaning = (entry.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
        entry.form = MetricForm("observation", unit, "number", _identity, meaning, narrow=True)
        if entry.read_by_measures:
            entry.form = MetricForm("nothing", unit, "number", _top_probability, meaning)
        entry.word_facts = ObservationWord(
            is_lens=entry.read_by_measures,
            of_weights=entry.of_weights,
            of_bases=entry.of_bases,
            of_probes=entry.of_probes,
            of_coordinates=entry.of_coordinates,
            has_graph=entry.has_graph,
            axes=(entry.counts,) if entry.counts else entry.value_axes,
            controls=entry.controls,
        )
        OBSERVATIONS.add(word, entry())
        return entry

    return register


def _identity(values: Tensor) -> Tensor:
    return values


def _top_probability(logits: Tensor) -> Tensor:
    """Return the probability of the most likely token, [row], from logits, [row, vocab]."""
    return logits.softmax(-1).amax(-1)


class SiteObservation(ObservationKind):
    """An observation of vectors at sites: `observe WORD SITE at POSITIONS`."""

    of_output: ClassVar[bool] = False
    """Whether its site is `logits`, the output of the model."""

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        fits = self.clauses_fit(rule, work)
        run = self.read_run(rule, work)
        sites, positions = resolve_targets(rule, run, work)
        if sites is None or positions is None or not fits:
            return None
        named = not self.of_output and _names_logits(rule, sites, work)
        if named or not self.sites_fit(rule, sites, work):
            return None
        resolved = ResolvedRule(spec=rule, does=self, run=run, sites=sites, positions=positions)
        return resolved if self.positions_fit(rule, resolved, work) else None

    def read_run(self, rule: spec.Rule, work: ExperimentContext) -> str:
        """Return the run to compare with, or the observed run if there is no comparison."""
        return work.experiment.base

    def positions_fit(self, rule: spec.Rule, found: ResolvedRule, work: ExperimentContext) -> bool:
        """Check the combination of sites and positions, and report what doesn't fit."""
        return True

    def sites_fit(self, rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
        """Check the sites, and report those that the observation doesn't accept."""
        return True

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        assert rule.spec.observed is not None
        assert rule.sites is not None
        said = self.form.meaning[0].lower() + self.form.meaning[1:]
        over = list(describe_joined(rule.sites, rule.positions))
        averaged = f", averaged over {' and '.join(over)}" if over else ""
        yield Convention("observed", f"{self.word}: {said}{averaged}")


def _names_logits(rule: spec.Rule, sites: SiteTargets, work: ExperimentContext) -> bool:
    """Report a line that observes the model's output, which measures read."""
    assert rule.site is not None
    logits = any(point.site == "logits" for point in iter_points(sites))
    if logits:
        reason = "is the model's output, but observations read earlier activations"
        hint = "measure it: `measure logit(answer) as raw`; it is computed from `final_norm`"
        name, span = rule.site.span.written, rule.site.span
        work.diagnostics.append(BadArgument(span=span, name=name, reason=reason, hint=hint))
    return logits


def describe_joined(sites: SiteTargets, positions: PositionTargets) -> Iterator[str]:
    """Yield what a cell joins, sites or tokens."""
    if any(len(points) > 1 for points in sites.points.values()):
        yield "the joined sites"
    cells = positions.written.values()
    if any(len(tokens) > 1 for cell in cells for row in cell.hits for tokens in row):
        yield "the joined tokens"


def iter_points(sites: SiteTargets) -> Iterator[SitePoint]:
    """Yield the distinct points of all cells."""
    yield from dict.fromkeys(point for points in sites.points.values() for point in points)


@rule_kind("observe")
class ObserveRule(RuleKind):
    """`observe WORD …`: looks, and changes nothing."""

    within_prompt = "`observe` reads only the prompt"
    reads_replies = True

    def observes(self, rule: spec.Rule) -> Observation | None:
        return None if rule.observed is None else OBSERVATIONS.get(rule.observed.word)

    def observation_words(self) -> Mapping[str, ObservationWord]:
        return {word: entry.word_facts for word, entry in OBSERVATIONS.items()}

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        assert rule.observed is not None
        word = rule.observed.word
        _check_name_free(rule, rule.observed, work)
        entry = OBSERVATIONS.get(word)
        if rule.observed.weights_attention and (entry is None or not entry.weights_attention):
            factors = [
                name
                for name, observation_kind in OBSERVATIONS.items()
                if observation_kind.weights_attention
            ]
            hint = did_you_mean(word, factors, f"factors are {', '.join(factors)}")
            kind, span = "factor of attention", rule.observed.span
            work.diagnostics.append(UnknownWord(span=span, kind=kind, word=word, hint=hint))
            return None
        if entry is not None and entry.weights_attention and not rule.observed.weights_attention:
            hint = f"write `observe attention layer * head * from … to … by {word}`"
            report_bad_observation(rule, work, "is a factor of attention weights", hint)
            return None
        if entry is not None and rule.observed.maps and not entry.of_maps:
            report_bad_observation(
                rule, work, "needs a site", f"write `observe {word} resid_post layer 1 at …`"
            )
            return None
        if entry is not None and rule.edge is not None and not entry.leads:
            report_bad_observation(
                rule, work, "needs a site", f"write `observe {word} resid_post layer 1 at …`"
            )
            return None
        if entry is not None:
            return entry.resolve(rule, work)
        hint = did_you_mean(word, OBSERVATIONS, f"observations are {', '.join(OBSERVATIONS)}")
        problem = UnknownWord(span=rule.observed.span, kind="observation", word=word, hint=hint)
        work.diagnostics.append(problem)
        return None


def _check_name_free(rule: spec.Rule, said: spec.ObservedQuantity, work: ExperimentContext) -> None:
    """Report E0207 for a name that means something else in measures and expectations."""
    kind = "an effect" if said.name in EFFECTS else "a metric" if said.name in METRICS else ""
    if not kind:
        return
    hint = "an observation has no effects: remove `as …`, or choose a different name"
    reason = f"names the observation, but `{said.name}` is {kind}"
    problem = BadArgument(span=rule.span, name=f"as {said.name}", reason=reason, hint=hint)
    work.diagnostics.append(problem)


def report_bad_observation(
    rule: spec.Rule, work: ExperimentContext, reason: str, hint: str
) -> None:
    """Report E0207 at the word of an observation."""
    assert rule.observed is not None
    name = f"observe {rule.observed.word}"
    # A reason about something else, such as a token, isn't a predicate of the name.
    reason = f"can't be computed: {reason}" if reason.startswith("`") else reason
    problem = BadArgument(span=rule.observed.span, name=name, reason=reason, hint=hint)
    work.diagnostics.append(problem)


def check_unembedding(rule: spec.Rule, work: ExperimentContext, *, decoders: bool = False) -> bool:
    """Report E0108 for a model whose stream an unembedding doesn't follow, or not in one stack.

    Args:
        decoders: Whether the decoder of an encoder-decoder is accepted.
    """
    shape = work.sites.shape
    reads_text = shape.takes in ("text", "image and text", "attended image")
    if shape.stands_in or (shape.task == "tokens" and shape.causal and reads_text):
        return True
    apart = shape.encodes_apart and shape.task == "tokens"
    if apart and decoders:
        return True
    assert rule.observed is not None
    reason = "which doesn't predict next tokens"
    if apart:
        reason = "which attends to the tokens of an encoder"
    what = f"`observe {rule.observed.word}` of `{work.model.name}`, {reason},"
    problem = NotSupported(span=rule.observed.span, what=what)
    if shape.encodes_apart:
        hint = "measure `logit(answer)` with a rule: `ablate z layer 2 head 1 at … with zero`"
        problem = replace(problem, later=hint)
    work.diagnostics.append(problem)
    return False
