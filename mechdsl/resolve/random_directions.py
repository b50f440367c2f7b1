"""Controls of steering: the same rules along random directions of the same length."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from mechdsl.base.plural import plural
from mechdsl.program import spec
from mechdsl.resolve.direction_types import DirectionTargets, Member, RandomLike
from mechdsl.resolve.resolved import DRAW, Axis, Drawn, ResolvedControl, ResolvedExperiment
from mechdsl.resolve.resolved_rule import ResolvedRule


def random_directions(
    experiment: ResolvedExperiment, asked: spec.Control, draws: int
) -> ResolvedControl:
    """Each rule with a direction along others: as long, at the same sites and tokens, drawn evenly
    over all directions. What was one direction in several rules or cells is one in each draw."""
    rules = [
        rule if rule.direction is None else _with_others(rule, rule.direction, draws, experiment)
        for rule in experiment.rules
    ]
    own = experiment.spec
    shadow = replace(
        experiment,
        spec=own.model_copy(
            update={
                "name": f"{own.name} against random",
                "against": None,
                "reports": (spec.Report(span=asked.span, kind="null band"),),
                "expects": (),
            }
        ),
        axes=(Axis(DRAW, tuple(range(draws)), asked.span), *experiment.axes),
        rules=tuple(rules),
        accuracies={},
        control_of=experiment.key,
        drawn=Drawn((), {(): draws}),
    )
    parts = [
        f"random directions, {plural(draws, 'draw')}, seed {experiment.seed}",
        "of the same norm, drawn evenly over all directions, at the same sites and tokens",
        *(
            f"`{rule.spec.span.written}` as it is"
            for rule in experiment.rules
            if rule.direction is None and rule.does.changes != "nothing"
        ),
    ]
    return ResolvedControl(shadow, draws, asked.draws, "random directions", "; ".join(parts))


def _with_others(
    rule: ResolvedRule, own: DirectionTargets, draws: int, experiment: ResolvedExperiment
) -> ResolvedRule:
    members = {
        (draw, *key): Member(
            f"random {draw} like {member.name}",
            RandomLike(member.vector, f"{member.name} {draw}", experiment.seed),
            f"random, of the norm of {member.name}",
        )
        for draw, (key, member) in product(range(draws), own.members.items())
    }
    return replace(rule, direction=DirectionTargets((DRAW, *own.axes), members, own.families))
