"""Observation of attribution graphs: how features of transcoders explain the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from mechdsl.base.files import SafetensorsFile
from mechdsl.base.records import Record
from mechdsl.base.text import Percent, count_noun, name_list
from mechdsl.diagnostics.core import did_you_mean, has_errors
from mechdsl.diagnostics.syntax import BadArgument
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.program import spec
from mechdsl.program.group_files import LayerFeature
from mechdsl.program.spec import constant_value
from mechdsl.resolve.bases import list_group_features, read_decoders, resolve_transcoders
from mechdsl.resolve.conflicts import find_flat_part
from mechdsl.resolve.measures import resolve_measure
from mechdsl.resolve.observations import RowSetObservation
from mechdsl.resolve.sites import (
    ExperimentContext,
    MeasureContext,
    find_missing_point,
    list_pattern_points,
)
from mechdsl.resolve.targets import resolve_base_positions
from mechdsl.resolve.types import (
    BasisMember,
    Convention,
    ResolvedMeasure,
    ResolvedRule,
    SitePoint,
    SiteTargets,
)
from mechdsl.rules.observations.registry import ObservationKind, observation, report_bad_observation
from mechdsl.rules.observations.rows import check_no_rules
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import MetricForm


class Supernode(Record):
    """A group of features in a graph."""

    name: str
    features: frozenset[LayerFeature]


MOST_FEATURES = 4096
"""Most features of a graph; others count as errors."""
PRUNING: Mapping[str, float] = {"nodes": 0.8, "edges": 0.98}
"""Option of a drawn graph → the share of the influence that is kept without it."""
MOST_LOGITS, LOGIT_SHARE = 10, 0.95
"""The targets are the likeliest tokens that together have this probability, at most this many."""


@observation("attribution_graph", unit="part")
class AttributionGraphs(RowSetObservation, ObservationKind):
    """How much of the likeliest next tokens is explained by paths from tokens through features.

    It is the replacement score of the prompt's attribution graph: the influence of tokens as a
    share of that of tokens and of the errors of transcoders. Next to it: `completeness`, the share
    of the inputs of nodes that doesn't come from errors, weighted by the influence of the nodes.
    `toward answer - wrong` explains this measure instead of the likeliest tokens.
    returns: 0 to 1
    source: Ameisen et al. 2025, Circuit Tracing
    """

    takes: ClassVar = ("arguments", "toward")
    group_options: ClassVar[tuple[str, ...]] = ("supernodes",)
    """Options that name groups of features; a list only for `supernodes`."""
    other_options: ClassVar[tuple[str, ...]] = ()
    """Options that a subclass reads."""
    selects: ClassVar[bool] = True
    """Whether only the features of the most influence are nodes, if there are many."""
    of_bases = True
    has_graph = True
    unplaced = "last token"
    controls: ClassVar[tuple[str, ...]] = ("completeness",)

    def __init__(
        self,
        members: Mapping[int, BasisMember] | None = None,
        *,
        decoders: Mapping[int, SafetensorsFile] | None = None,
        pruning: tuple[float, float] | None = None,
        target: ResolvedMeasure | None = None,
        top: int = 0,
        groups: Mapping[str, tuple[Supernode, ...]] | None = None,
    ) -> None:
        """Create the observation.

        Args:
            members: The transcoders, by layer; None only in the registered instance.
            decoders: Those of a cross-layer transcoder, by the layer of their features.
            pruning: Shares of the influence that nodes and edges of the drawn graph of the first
                row keep; None if no graph is drawn.
            target: The measure that is explained; None: the likeliest next tokens.
            top: Number of features that are ablated; 0: those of a group.
            groups: The groups of features that options name.
        """
        self.members, self.decoders = members or {}, decoders or {}
        self.pruning, self.target, self.top = pruning, target, top
        self.groups = groups or {}

    @property
    def keeps_cells(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether scores may be stored: not if a graph is drawn, which only a run has, and no
        effects of drawn features."""
        return self.pruning is None and "random" not in self.controls

    @property
    def dependencies(self) -> object:
        return [
            (layer, member.reads, member.operand.digest)
            for layer, member in sorted(self.members.items())
            if isinstance(member.operand, DictionaryFile)
        ] + [
            *(decoder.digest for _, decoder in sorted(self.decoders.items())),
            *((option, [sorted(supernode.features) for supernode in group])
              for option, group in sorted(self.groups.items())),
        ]  # fmt: skip

    def features_of(self, option: str) -> frozenset[LayerFeature]:
        """Return the features of the group that an option names; empty without the option."""
        return frozenset().union(*(supernode.features for supernode in self.groups.get(option, ())))

    def form_of(self, name: str) -> MetricForm:
        if name != "completeness":
            return super().form_of(name)
        meaning = "The share of the inputs of nodes that doesn't come from errors, weighted"
        return replace(self.form, meaning=meaning)

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        fits = self.clauses_fit(rule, work)
        fits = check_no_rules(rule, work, "doesn't read a run in which rules act") and fits
        fits = self._model_fits(rule, work) and fits
        target = _resolve_target(rule, work)
        positions = resolve_base_positions(rule.at, work)
        names = self._names(rule, work)
        transcoders = None if names is None else resolve_transcoders(names, work)
        if transcoders is None or positions is None or not fits:
            return None
        assert rule.observed is not None
        if target is None and rule.observed.toward is not None:  # already reported
            return None
        if any(len(tokens) != 1 for cell in positions.written.values() for row in cell.hits
               for tokens in row):  # fmt: skip
            reason, hint = "explains one token at a time", "name a single one: `at last token`"
            report_bad_observation(rule, work, reason, hint)
            return None
        bases, members = transcoders
        decoders = read_decoders(names or (), members, work)
        if decoders is None:
            return None
        pruning, groups = self._pruning(rule, work), self._read_groups(rule, members, work)
        if pruning is None or groups is None:
            return None
        draws = any(report.kind == "graph" for report in work.experiment.reports)
        layers = work.sites.shape.n_layers
        points = (SitePoint("resid_pre", 0, None), *_mlp_points(layers))
        return ResolvedRule(
            spec=rule,
            does=type(self)(
                members,
                decoders=decoders,
                pruning=pruning if draws else None,
                target=target,
                top=rule.observed.top or 0,
                groups=groups,
            ),
            run=work.experiment.base,
            sites=SiteTargets((), {(): points}, {(): "logits"}),
            positions=positions,
            basis=bases,
        )

    def _names(self, rule: spec.Rule, work: ExperimentContext) -> list[ast.Name] | None:
        """Return the names of the transcoders; None after E0207 for anything else."""
        said = rule.observed
        assert said is not None
        given = () if said.call is None else said.call.arguments
        named = [e.value for e in given if e.name is None and isinstance(e.value, ast.Name)]
        if not named or len(named) < sum(e.name is None for e in given):
            hint = f"write `observe {said.word}(t) logits at last token`"
            report_bad_observation(rule, work, "needs the names of transcoders", hint)
            return None
        return named if len(said.bases) == len(named) else None  # otherwise already reported

    def _pruning(self, rule: spec.Rule, work: ExperimentContext) -> tuple[float, float] | None:
        """Return the shares of influence that the nodes and the edges of a drawn graph keep; None
        after E0207."""
        assert rule.observed is not None
        shares = dict(PRUNING)
        call = rule.observed.call
        for given in () if call is None else call.arguments:
            if given.name is None or given.name in (*self.group_options, *self.other_options):
                continue
            share = constant_value(given.value, work.program.parameters)
            if given.name not in shares:
                known = name_list((*shares, *self.group_options, *self.other_options))
                reason, hint = f"has no option `{given.name}`", f"it has {known}"
            elif not isinstance(share, Percent) or not 0 < share <= 100:
                reason = f"`{given.name}` must be a percentage above 0%"
                hint = f"write `{given.name}: 90%`"
            elif not any(report.kind == "graph" for report in work.experiment.reports):
                reason = f"`{given.name}` prunes a graph that is drawn, and none is"
                hint = "add `report graph`, or remove the option"
            else:
                shares[given.name] = share / 100
                continue
            report_bad_observation(rule, work, reason, hint)
            return None
        return shares["nodes"], shares["edges"]

    def _read_groups(
        self, rule: spec.Rule, members: Mapping[int, BasisMember], work: ExperimentContext
    ) -> dict[str, tuple[Supernode, ...]] | None:
        """Return the groups that options name, by option; None after E0207 or an error in a
        group."""
        assert rule.observed is not None
        groups: dict[str, tuple[Supernode, ...]] = {}
        call = rule.observed.call
        for given in () if call is None else call.arguments:
            if given.name is None or given.name not in self.group_options:
                continue
            values: Sequence[ast.Node] = (given.value,)
            if isinstance(given.value, ast.ListLiteral) and given.name == "supernodes":
                values = given.value.items
            supernodes: list[Supernode] = []
            for value in values:
                group = work.program.groups.get(value.id) if isinstance(value, ast.Name) else None
                written = " ".join(value.span.written.split())
                if group is not None and not group.sites:  # reported where it is defined
                    return None
                if group is None or not group.names_features:
                    every = work.program.groups.items()
                    others = [name for name, other in every if other.names_features]
                    hint = "define one: `group people = features 3, 8 of t0`"
                    hint = did_you_mean(written, others, hint)
                    _report_group(value, written, "isn't a group of features", hint, work)
                    return None
                features = list_group_features(group, members, value, work)
                if features is None:
                    return None
                shared = next(
                    (supernode.name for supernode in supernodes if supernode.features & features),
                    None,
                )
                # Until other experiments have run, features that they rank are placeholders.
                if shared is not None and not work.sites.onward.stand_ins:
                    reason = f"has features in common with `{shared}`"
                    _report_group(value, written, reason, "name groups without these", work)
                    return None
                supernodes.append(Supernode(group.name, features))
            groups[given.name] = tuple(supernodes)
        if "supernodes" in groups and all(
            report.kind != "graph" for report in work.experiment.reports
        ):
            reason = "`supernodes` are those of a graph that is drawn, and none is"
            report_bad_observation(rule, work, reason, "add `report graph`, or remove the option")
            return None
        return groups

    def _model_fits(self, rule: spec.Rule, work: ExperimentContext) -> bool:
        """Report what the line or the model lacks."""
        assert rule.site is not None
        shape, before = work.sites.shape, len(work.diagnostics)
        if rule.site.span.written != "logits":
            hint = f"write `observe {self.word}(t) logits at last token`"
            report_bad_observation(rule, work, "explains logits and no other site", hint)
        if not shape.stands_in and (
            (shape.task, shape.causal, shape.takes) != ("tokens", True, "text")
        ):
            reason = "needs a language model of texts that predicts the next token"
            report_bad_observation(rule, work, reason, "name another model")
        base = work.table.runs[work.experiment.base]
        if base.noise is not None:
            reason = f"doesn't read `{base.name}`, whose vectors differ between draws of noise"
            report_bad_observation(rule, work, reason, "observe a run without noise")
        points = (*list_pattern_points(shape), *_mlp_points(shape.n_layers))
        missing = find_missing_point(points, shape, work.model.name, rule.span)
        if missing is not None and not has_errors(work.diagnostics[before:]):
            work.diagnostics.append(missing)
        return not has_errors(work.diagnostics[before:])

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        yield Convention(
            "observed",
            f"{self.word}: the replacement score of each prompt's attribution graph: the influence "
            "of tokens as a share of that of tokens and errors; completeness: the share of the "
            "inputs of nodes that doesn't come from errors, weighted by the influence of nodes",
        )
        yield from self.graph_conventions(n_layers)

    def describe_group(self, option: str) -> str:
        """Return the group of an option with the number of its features."""
        (supernode,) = self.groups[option]
        return f"`{supernode.name}` ({count_noun(len(supernode.features), 'feature')})"

    def graph_conventions(self, n_layers: int) -> Iterator[Convention]:
        count = len(self.members)
        others = [str(layer) for layer in range(n_layers) if layer not in self.members]
        said = f"transcoders of {count} of {n_layers} layers"
        operands = [
            member.operand
            for member in self.members.values()
            if isinstance(member.operand, DictionaryFile)
        ]
        crosses = any(operand.crosses_layers for operand in operands)
        if crosses:
            said = f"a cross-layer transcoder, with features of {count} of {n_layers} layers"
        skips = any(operand.skips for operand in operands)
        said += "; paths through skip connections are linear" if skips else ""
        if others:
            rest = "what they don't write to" if crosses else "the whole output of"
            said += f"; {rest} other MLPs (layer {', '.join(others)}) is an error"
        yield Convention("transcoders", said)
        targets = (
            f"targets are the likeliest tokens, at most {MOST_LOGITS}, that together have a "
            f"probability of {LOGIT_SHARE:.0%}, weighted by it, each minus the mean logit"
        )
        if self.target is not None:
            targets = (
                f"the target is `{self.target.text}`, to first order: logits times the measure's "
                "gradient"
            )
        selected = (
            f"; before pruning; of more than {MOST_FEATURES:,} active features, those of the most "
            "influence are nodes, others count as errors"
        )
        yield Convention(
            "graph",
            f"patterns of attention and divisors of norms are constants; {targets}"
            f"{selected if self.selects else ''}",
        )
        if self.pruning is not None:
            nodes, edges = (f"{100 * share:.4g}" for share in self.pruning)
            yield Convention(
                "drawn graph",
                f"of the first row: nodes by influence until they have {nodes}% of it, edges until "
                f"they have {edges}%",
            )


@observation("graph_ablation")
class GraphAblation(AttributionGraphs):
    """How a measure changes when the features with the most influence on it are ablated.

    The model runs with the current activation of each of these features set to 0 at its token, so
    that all later components respond. Next to it: `predicted`, the change along the paths of the
    prompt's attribution graph, and `random`, the change with as many other active features ablated.
    source: Ameisen et al. 2025, Circuit Tracing
    """

    takes: ClassVar = ("arguments", "toward", "top")
    group_options: ClassVar[tuple[str, ...]] = ("features",)
    controls: ClassVar[tuple[str, ...]] = ("predicted", "random")

    def form_of(self, name: str) -> MetricForm:
        meanings = {
            "predicted": "The change along the paths of the graph",
            "random": "The change with as many other active features ablated",
        }
        return replace(self.form, meaning=meanings[name]) if name in meanings else self.form

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        said = rule.observed
        assert said is not None
        before = len(work.diagnostics)
        named = any(e.name == "features" for e in said.call.arguments) if said.call else False
        top = "`top 5` at the end of the line"
        for wrong, reason, hint in (
            (said.toward is None, "needs a measure", "write `toward answer - wrong`"),
            (
                said.top is None and not named,
                "needs features",
                f"write {top}, or a group: `{said.word}(t, features: people)`",
            ),
            (said.top is not None and named, "takes `top` or `features`", "remove one of them"),
        ):
            if wrong:
                report_bad_observation(rule, work, reason, hint)
        resolved = super().resolve(rule, work)
        return None if has_errors(work.diagnostics[before:]) else resolved

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        which = f"the {self.top} features of each prompt with the most influence on it"
        count = f"{self.top}"
        if self.groups:
            which, count = f"the features of {self.describe_group('features')}", "as many"
        yield Convention(
            "observed",
            f"{self.word}: the change of the measure in the model in which {which} are set to 0; "
            "predicted: the change along paths of the graph, where the activation of a feature is "
            f"a linear function of its input; random: {count} other active features of the prompt "
            "are set to 0",
        )
        yield from self.graph_conventions(n_layers)


@observation("graph_weight")
class GraphWeight(AttributionGraphs):
    """The sum of the edges from one group of features to another, or to the target.

    Edges of the prompt's attribution graph between all active features of the groups, at all
    tokens. Next to it: `random`, the sum from as many other active features of the same layers.
    source: Ameisen et al. 2025, Circuit Tracing
    """

    group_options: ClassVar[tuple[str, ...]] = ("from", "to")
    controls: ClassVar[tuple[str, ...]] = ("random",)

    def form_of(self, name: str) -> MetricForm:
        meaning = "The sum from as many other active features of the same layers"
        return replace(self.form, meaning=meaning) if name == "random" else self.form

    def resolve(self, rule: spec.Rule, work: ExperimentContext) -> ResolvedRule | None:
        resolved = super().resolve(rule, work)
        if resolved is None:
            return None
        assert isinstance(resolved.does, GraphWeight)
        if "from" not in resolved.does.groups:
            hint = f"write `{self.word}(t0, t1, from: people, to: places)`"
            report_bad_observation(rule, work, "needs a group of features", hint)
            return None
        return resolved

    def conventions(self, rule: ResolvedRule, n_layers: int) -> Iterator[Convention]:
        to = "the target" if self.target is not None else "the targets, weighted"
        if "to" in self.groups:
            to = f"those of {self.describe_group('to')}"
        yield Convention(
            "observed",
            f"{self.word}: the sum of the edges from the features of {self.describe_group('from')} "
            f"to {to}, at all tokens of the prompt; random: from as many other active features of "
            "the same layers, or all others of a layer if there are fewer",
        )
        yield from self.graph_conventions(n_layers)


def _report_group(
    node: ast.Node, name: str, reason: str, hint: str, work: ExperimentContext
) -> None:
    """Report E0207 for a group that an option can't take."""
    work.diagnostics.append(BadArgument(span=node.span, name=name, reason=reason, hint=hint))


def _resolve_target(rule: spec.Rule, work: ExperimentContext) -> ResolvedMeasure | None:
    """Resolve the measure after `toward`; None without one, or after an error.

    E0207 for a measure that isn't a function of the next token's logits with a gradient, and the
    codes of measures.
    """
    said = rule.observed
    if said is None or said.toward is None:
        return None
    measure = resolve_next_token_measure(said.toward, "toward", rule, work)
    flat = measure and find_flat_part(measure, work.experiment.base, at_base=True)
    if flat is not None:
        text, reason, hint = flat
        report_bad_observation(rule, work, f"has no edges toward `{text}`: {reason}", hint)
        return None
    return measure


def resolve_next_token_measure(
    expression: ast.Expr, label: str, rule: spec.Rule, work: ExperimentContext
) -> ResolvedMeasure | None:
    """Resolve a measure of the next token's logits; None after an error.

    Codes: E0207 for a measure of anything else, and those of measures.
    """
    context = MeasureContext(
        work.table,
        work.model.tokenizer,
        work.sites,
        (),
        work.diagnostics,
        metrics=work.program.metrics,
    )
    measure = resolve_measure(expression, context, label=label)
    if measure is None:
        return None
    example = "toward answer - wrong" if label == "toward" else "target: correct(answer)"
    hint = f"name texts of one token: `{example}`"
    for atom in measure.atoms:
        several = any(atom.appended) and not work.model.tokenizer.stands_in
        if atom.form.takes in ("prompt", "own", "activations") or atom.run is not None or several:
            own = "has several tokens" if several else "isn't read from the next token's logits"
            does = "explains" if label == "toward" else "reads"
            reason = f"{does} the next token, and `{atom.node.span.written}` {own}"
            report_bad_observation(rule, work, reason, hint)
            return None
    return measure


def _mlp_points(layers: int) -> tuple[SitePoint, ...]:
    return tuple(SitePoint("mlp_out", layer, None) for layer in range(layers))
