"""What a graph asks for: its experiments as their nodes say them, and the runs that these need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mechdsl.graph.build import unpatched
from mechdsl.graph.nodes import (
    EffectNode,
    EncodeNode,
    ExpectNode,
    ForwardNode,
    Graph,
    MeasureNode,
    ReadNode,
    ReportNode,
    WriteNode,
    leaves,
)
from mechdsl.prompts.prompt_table import Noise
from mechdsl.resolve.resolved import ResolvedExperiment
from mechdsl.resolve.resolved_rule import Place, ResolvedRule


@dataclass(frozen=True, eq=False)
class Asked:
    """One experiment of a graph."""

    experiment: ResolvedExperiment
    """With the rules, axes, measures and runs that its nodes have."""
    clean: EncodeNode
    """The clean run of its prompts: experiments that have it in common share their runs."""
    runs: tuple[ForwardNode, ...]
    """Every unpatched run that it reads, measures or starts from."""


@dataclass(frozen=True)
class RunNeeds:
    """What an unpatched run has to give."""

    forward: ForwardNode
    reads: frozenset[Place] = frozenset()
    measured: bool = False
    stop: int | None = None


def asked(graph: Graph) -> list[Asked]:
    """The experiments of a graph, in the order of the file."""
    by_key: dict[str, list[ReportNode | ExpectNode]] = {}
    for leaf in leaves(graph):
        by_key.setdefault(leaf.experiment, []).append(leaf)
    return [_asked(each) for each in by_key.values()]


def needs(graph: Graph) -> dict[ForwardNode, RunNeeds]:
    """By unpatched run, run to its end, what the nodes behind it need of it."""
    found: dict[ForwardNode, RunNeeds] = {}
    for node in graph:
        if not isinstance(node, ForwardNode) or node.axes:
            continue
        users = list(graph.successors(node))
        reads = frozenset(
            place for user in users if isinstance(user, ReadNode) for place in user.places
        )
        whole = replace(node, stop=None)
        old = found.get(whole, RunNeeds(whole, stop=node.stop))
        found[whole] = RunNeeds(
            whole,
            old.reads | reads,
            old.measured or any(isinstance(user, MeasureNode) for user in users),
            node.stop if old.stop is not None else None,
        )
    return found


def _asked(own: Sequence[ReportNode | ExpectNode]) -> Asked:
    """One experiment, from its leaves."""
    said, effects = own[0].of, _effects(own)
    acting, base, source = effects[0].patched.forward, effects[0].base, effects[0].source
    rules = _rules(effects[0].patched)
    measures = tuple(effect.patched.measure for effect in effects)
    accuracies = {
        measure.forward.run: measure.measure
        for leaf in own
        if isinstance(leaf, ExpectNode)
        for measure in leaf.accuracies
    }
    # An axis is there if a rule has it.
    used = frozenset(name for rule in rules for name in rule.axes)
    experiment = replace(
        said,
        spec=said.spec.model_copy(
            update={
                "base": base.forward.run,
                "source": None if source is None else source.forward.run,
                "rules": tuple(rule.spec for rule in rules),
                "measures": tuple(effect.said for effect in effects),
            }
        ),
        axes=tuple(axis for axis in acting.axes if axis.name in used),
        rules=rules,
        measures=measures,
        keep=acting.encode.kept_by,
        accuracies=accuracies,
    )
    runs = {each.run: each for forward in _runs(own, effects) for each in with_own(forward)}
    for name in _filtering(experiment):  # before the graph is run
        runs.setdefault(name, unpatched(experiment, name))
    clean = replace(acting.encode, run="clean", replaced=None, replaced_by=None)
    return Asked(experiment, clean, tuple(runs.values()))


def _effects(own: Sequence[ReportNode | ExpectNode]) -> tuple[EffectNode, ...]:
    """What some leaf shows or expects, each line of the file once."""
    by_line = {id(effect.said): effect for leaf in own for effect in leaf.effects}
    return tuple(by_line.values())


def _rules(measure: MeasureNode) -> tuple[ResolvedRule, ...]:
    """The rules that act on what is measured: writes as they stand, the others in between where
    the file has them."""
    forward = measure.forward
    found = [_rule(write, write.by) for write in forward.writes if not isinstance(write.by, Noise)]
    for rule in (forward.encode.replaced_by, measure.observed):
        if rule is not None:
            before = [each.spec.span.start < rule.spec.span.start for each in found]
            found.insert(sum(before), rule)
    return tuple(found)


def _rule(write: WriteNode, rule: ResolvedRule) -> ResolvedRule:
    """The rule of a write, which reads what its node reads."""
    read = write.read
    if read is None or rule.sites is None:
        return rule
    sources = None if read.points is rule.sites.points else read.points
    return replace(
        rule,
        run=rule.run if rule.apart is not None else read.forward.run,
        sites=replace(rule.sites, sources=sources),
        positions=replace(rule.positions, read=read.positions),
    )


def _runs(
    own: Sequence[ReportNode | ExpectNode], effects: Sequence[EffectNode]
) -> Iterator[ForwardNode]:
    """The unpatched runs that nodes measure, read or compare with, in the order of the file."""
    yield effects[0].base.forward
    if effects[0].source is not None:
        yield effects[0].source.forward
    yield from _read(effects[0].patched.forward)
    for leaf in own:
        if isinstance(leaf, ExpectNode):
            yield from (measure.forward for measure in leaf.accuracies)
    for effect in effects:
        yield from effect.patched.references


def with_own(forward: ForwardNode) -> Iterator[ForwardNode]:
    """A run, and before it those that its own rules read."""
    ruled = forward
    while ruled.on is not None:
        for read in _read(ruled):
            yield from with_own(read)
        ruled = ruled.on
    yield forward


def _read(forward: ForwardNode) -> Iterator[ForwardNode]:
    """The runs of the sampled rows that what is written is read in; a mean of another block is
    taken of rows of its own, in runs of their own."""
    for write in forward.writes:
        apart = isinstance(write.by, ResolvedRule) and write.by.apart is not None
        if write.read is not None and not apart:
            yield write.read.forward


def _filtering(experiment: ResolvedExperiment) -> Iterator[str]:
    """The runs that `keep` reads."""
    for measure in experiment.keep:
        yield from (atom.run for atom in measure.atoms if atom.run is not None)
    if experiment.keep:
        yield "clean"
