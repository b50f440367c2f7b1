"""`refusal[best of select]`: the member of a family that another experiment found best."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from mechdsl.diagnostics.e06_onward import BadPick
from mechdsl.resolve.families import Family
from mechdsl.resolve.findings import Finding, Refused, VariantFinding
from mechdsl.resolve.in_progress import Work
from mechdsl.resolve.resolved import Label, ResolvedExperiment
from mechdsl.resolve.resolved_rule import Key
from mechdsl.syntax import ast


def best_coordinates(node: ast.Index, picked: ast.Ranked, family: Family, work: Work) -> Key | None:
    """The member whose cell has the largest mean, signed, of the experiment's first measure; the
    first member before that has run. None after E0620, and where the experiment was refused."""
    try:
        finding, _ = work.sites.onward.finding(picked, work.program.parameters)
        if finding is None:
            return None
        found = [_of_part(part, family, picked) for part in finding.parts]
    except Refused as refusal:
        text = node.span.written
        work.diagnostics.append(
            BadPick(span=node.span, text=text, reason=refusal.reason, hint=refusal.hint)
        )
        return None
    work.sites.onward.used_sites(picked, finding)
    best = max(found, key=lambda each: each[0])
    _say(node, finding, family, best, work)
    return best[1]


def _of_part(part: VariantFinding, family: Family, picked: ast.Ranked) -> tuple[float, Key]:
    """(mean, member) of the best cell."""
    experiment = part.experiment
    axes = _axes(experiment, family, picked)
    if part.means is None:
        return -1.0, (0,) * len(family.axes)
    import numpy as np

    means = np.where(np.isfinite(part.means), part.means, -np.inf)
    if not isfinite(float(means.max())):
        raise Refused(f"`{picked.of}` has no cell with a value", "look at what it measures")
    cell, place = max(part.grid(), key=lambda each: means[each[0]])
    key: list[int] = []
    for axis, own in zip(axes, family.axes, strict=True):
        label = experiment.axes[axis].labels[int(place[axis])]
        key.append(_index(own.labels, label, picked, family))
    return float(means[cell]), tuple(key)


def _axes(experiment: ResolvedExperiment, family: Family, picked: ast.Ranked) -> Sequence[int]:
    """Where the family's axes stand among the experiment's."""
    name = experiment.name
    using = [
        rule.direction
        for rule in experiment.rules
        if rule.direction is not None and set(family.definitions) & set(rule.direction.families)
    ]
    names = [axis.name for axis in experiment.axes]
    swept = {axis for direction in using for axis in direction.axes}
    missing = [axis.name for axis in family.axes if axis.name not in swept]
    if not using or missing:
        what = f"`{name}` doesn't sweep `{family.name}`"
        if using:
            what = f"`{name}` doesn't sweep every `{missing[0]}` of `{family.name}`"
        raise Refused(what, f"let a rule of `{name}` name the family as it is: `{family.name}`")
    if experiment.measures and experiment.measures[0].kind == "category":
        raise Refused(
            f"the first measure of `{name}` is a category, which has no order",
            f"let `{name}` measure a number first",
        )
    return [names.index(axis.name) for axis in family.axes]


def _index(labels: Sequence[Label], label: Label, picked: ast.Ranked, family: Family) -> int:
    if label not in labels:
        raise Refused(
            f"`{picked.of}` found `{label}`, which `{family.name}` doesn't have",
            "let both sweep the same values",
        )
    return labels.index(label)


def _say(
    node: ast.Index,
    finding: Finding,
    family: Family,
    best: tuple[float, Key],
    work: Work,
) -> None:
    picks: dict[str, str] = work.sites.onward.picks
    value, key = best
    text = node.span.written
    if finding.stands_in:
        picks[text] = f"known when `{finding.name}` has run; the first member stands in"
        return
    picks[text] = f"{family.members[key].name} ({value:.3g}); by mean {finding.measure}, signed"
