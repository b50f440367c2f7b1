"""What replies cost: all that is computed behind the prefill, at most, as rows that end leave; and
the passes over prompts and replies in which these are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mechdsl.base.arrays import Ints
from mechdsl.plan.experiment_plan import ExperimentPlan
from mechdsl.plan.rule_rows import Rows
from mechdsl.plan.share import SharedRows
from mechdsl.prompts.prompt_table import ReplyPosition
from mechdsl.resolve.replies import in_reply

_RULES = ""
"""The pass in which the rules of a row act; others have the name of a run without rules."""


@dataclass(frozen=True)
class ReplyWork:
    """Steps of replies that a panel's rows write; the prefill is counted with the rows."""

    forwards: int
    tokens: int
    """Through one block each."""
    keys: int
    """Pairs of a query and a key, in one block each."""
    logits: int
    """Distributions over the vocabulary."""

    def __add__(self, other: ReplyWork) -> ReplyWork:
        return ReplyWork(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.keys + other.keys,
            self.logits + other.logits,
        )


def reply_work(
    lengths: Ints, tokens: int, samples: int, *, kept: bool, pass_tokens: int
) -> ReplyWork:
    """The work behind prompts of these lengths, [row].

    tokens: what a reply has at most. kept: keys and values of earlier tokens are, and `pass_tokens`
    rows write together, each one token in a step; else each step of each row is a whole pass over
    its prompt and its reply so far.
    """
    steps = np.arange(1, tokens, dtype=np.int64)
    rows = len(lengths) * samples
    whole = lengths[:, None] + steps
    if kept:
        together = -(-rows // pass_tokens)
        return ReplyWork(
            len(steps) * together, rows * len(steps), int(whole.sum()) * samples, rows * len(steps)
        )
    pairs = whole * (whole + 1) // 2
    return ReplyWork(
        rows * len(steps), int(whole.sum()) * samples, int(pairs.sum()) * samples, rows * len(steps)
    )


def writing_lengths(plan: ExperimentPlan, rows: Rows, *, unpatched: bool) -> Ints:
    """[row] tokens of the prompts behind which an experiment writes, draws of noise included.
    unpatched: those of its base and source run come to these rows."""
    found = [np.repeat(plan.lengths(rows), plan.draws)]
    if unpatched:
        experiment = plan.experiment
        names = dict.fromkeys((experiment.spec.base, experiment.spec.source))
        runs = [experiment.table.runs[name] for name in names if name is not None]
        found += [np.repeat(run.lengths, run.draws) for run in runs]
    return np.concatenate(found)


def reading_work(lengths: Ints, logits: int, samples: int, pass_tokens: int | None) -> ReplyWork:
    """Whole passes over prompts and replies, [row] so many tokens together.

    logits: distributions that are read, of all rows. pass_tokens: of passes that rows ride in; None
    where each has its own.
    """
    rows, tokens = len(lengths), int(lengths.sum())
    passes = rows if pass_tokens is None else -(-tokens // pass_tokens)
    pairs = int((lengths * (lengths + 1) // 2).sum())
    return ReplyWork(passes * samples, tokens * samples, pairs * samples, logits * samples)


@dataclass(frozen=True, eq=False)
class Readings:
    """In which passes the rows of a panel's experiments are read behind their prompts."""

    passes: tuple[Mapping[str, Ints], ...]
    """Per experiment: by pass, [row] how many places are read there; 0 where it isn't needed."""
    most: int
    """Places that there are."""

    @staticmethod
    def of(plans: Sequence[ExperimentPlan], rows: Sequence[Rows]) -> Readings:
        passes = (
            {name: np.full(len(own), len(_places(plan))) for name in _reads(plan)}
            for plan, own in zip(plans, rows, strict=True)
        )
        return Readings(tuple(passes), len(set[ReplyPosition | None]().union(*map(_places, plans))))

    def take(self, index: Sequence[Ints]) -> Readings:
        """Of some rows of each experiment."""
        pairs = zip(self.passes, index, strict=True)
        passes = ({name: own[i] for name, own in each.items()} for each, i in pairs)
        return Readings(tuple(passes), self.most)

    def shared(self, shared: SharedRows) -> Readings:
        """Of distinct rows, the same for each experiment: what any of their members reads."""
        found: dict[str, Ints] = {}
        for passes, (which, _) in zip(self.passes, shared.members, strict=True):
            for name, own in passes.items():
                whole = found.setdefault(name, np.zeros(len(shared), dtype=np.int64))
                np.add.at(whole, which, own)
        every = {name: np.minimum(own, self.most) for name, own in found.items()}
        return Readings(tuple(every for _ in self.passes), self.most)

    def work(
        self,
        plans: Sequence[ExperimentPlan],
        rows: Sequence[Rows],
        pass_tokens: int | None,
        *,
        unpatched: bool,
    ) -> ReplyWork:
        """Of these rows of each experiment; unpatched: base and source runs come to them."""
        said = plans[0].experiment.generation
        found = ReplyWork(0, 0, 0, 0)
        if said is None:
            return found
        every = list(self._lengths(plans, rows))
        every += _unpatched(plans, self.most) if unpatched else []
        by_pass: dict[str, list[tuple[Ints, int]]] = {}
        for name, lengths, logits in every:
            by_pass.setdefault(name, []).append((lengths + said.tokens, logits))
        for parts in by_pass.values():
            lengths = np.concatenate([own for own, _ in parts])
            logits = sum(own for _, own in parts)
            found += reading_work(lengths, logits, said.samples, pass_tokens)
        return found

    def _lengths(
        self, plans: Sequence[ExperimentPlan], rows: Sequence[Rows]
    ) -> Iterator[tuple[str, Ints, int]]:
        """(pass, [row] tokens of the prompts, distributions that are read), with draws of noise."""
        for passes, plan, own in zip(self.passes, plans, rows, strict=True):
            for name, places in passes.items():
                chosen = own.take(np.flatnonzero(places))
                if name == _RULES:
                    lengths = plan.lengths(chosen)
                else:
                    lengths = plan.experiment.table.runs[name].lengths[chosen.prompt]
                yield name, np.repeat(lengths, plan.draws), int(places.sum()) * plan.draws


def _reads(plan: ExperimentPlan) -> Iterator[str]:
    """The passes that an experiment reads behind its rows' prompts."""
    experiment = plan.experiment
    looks = plan.observes is not None and in_reply(plan.observes.rule)
    if looks or any(measure.in_reply is not None for measure in experiment.measures):
        yield experiment.spec.base if experiment.as_base else _RULES
        yield from _references(plan)


def _references(plan: ExperimentPlan) -> Iterator[str]:
    """The runs that what is measured in replies is set against."""
    measured = (each for each in plan.experiment.measures if each.in_reply is not None)
    runs = (atom.run for measure in measured for atom in measure.atoms)
    yield from dict.fromkeys(run for run in runs if run is not None)


def _places(plan: ExperimentPlan) -> set[ReplyPosition | None]:
    """Of a reply, those that something is measured at, or else one: a pass gives some logits."""
    found = {each.in_reply for each in plan.experiment.measures}
    return found - {None} or {None}


def _unpatched(plans: Sequence[ExperimentPlan], places: int) -> list[tuple[str, Ints, int]]:
    """The same of base and source runs, which are measured once behind what they write."""
    found: dict[tuple[str, str], Ints] = {}
    for plan in plans:
        experiment = plan.experiment
        if all(measure.in_reply is None for measure in experiment.measures):
            continue
        for name in (experiment.spec.base, experiment.spec.source):
            run = None if name is None else experiment.table.runs[name]
            if name is None or run is None:
                continue
            for other in ("", *_references(plan)):
                prompts = (experiment.table.runs[other] if other else run).lengths
                found[name, other] = np.repeat(prompts, run.draws)
    return [
        (f"{name} {other}", lengths, len(lengths) * places)
        for (name, other), lengths in found.items()
    ]
