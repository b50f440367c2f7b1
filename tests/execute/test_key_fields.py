"""Each field that a value depends on is part of its key; other fields have a reason.

If a field changes a number and isn't in the key, the store returns a stale value. No other test
notices a new field."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mechdsl.base.text import Source, Span
from mechdsl.planner.passes import make_plan
from mechdsl.planner.plan import ExperimentPlan, collect_whole_cells
from mechdsl.planner.rows import PathPlan, RaggedColumn, RulePlan, TokenHits
from mechdsl.planner.value_keys import (
    ExperimentKeys,
    RunContents,
    measure_digest,
    measure_row_keys,
    mix_numbers,
)
from mechdsl.program.python_functions import PythonFunction
from mechdsl.prompts.answers import TokenSets
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun, RunNoise, RunRow
from mechdsl.resolve.types import (
    Amounts,
    BasisMember,
    BasisOperand,
    BasisTargets,
    CircuitEdge,
    CircuitTargets,
    Coordinates,
    DirectionTargets,
    DirectionVector,
    DrawnBasis,
    EdgeTargets,
    ExternalRun,
    FeatureNodes,
    FitSample,
    FittedVector,
    Intervention,
    JacobianBasis,
    MetricTerm,
    OutputWeights,
    PathTargets,
    PositionTargets,
    RandomVector,
    ResolvedExperiment,
    ResolvedMeasure,
    ResolvedRule,
    SavedVector,
    SitePoint,
    SiteTargets,
    SpannedBasis,
    StepRanges,
    TokenBasis,
    UnembeddingVector,
    UnitVector,
    WeightBasis,
    WeightedSum,
)
from mechdsl.rules.patching import FILLS
from mechdsl.syntax import ast
from mechdsl.vocab.metrics import METRICS

from . import support
from .test_value_keys import APART, NOISED, one

NOWHERE = Span(Source("", Path("a.mech")), 0, 0)
FUNCTION = PythonFunction(Path("own.py"), "own.py", "read", "0" * 64, 1, NOWHERE)
EXPERIMENTS = {
    "patch": one("patch resid_post layer 0..1 at each item token", ends="from other into clean"),
    "grid": one("patch z layer 0..1 head 1 at subject token, cue token into layer 2"),
    "noised": one("patch resid_post layer 1 at subject token", ends="from clean into noised"),
    "mean": one("ablate z layer 1 head 1 at subject token, cue token with mean by cue2"),
    "fills": one("ablate z layer 1 head 1 at subject token with zero, mean"),
    "apart": one("ablate z layer 1 head 1 at subject token with mean of apart"),
    "number": one("set z layer 1 head 1 at subject token to 0.5"),
    "steered": "direction d = mean(apart) at resid_post layer 1\n"
    + one("add d to resid_post layer 1 at subject token"),
    "in a basis": "basis b = pca(apart, dims: 2) at resid_post layer 1\n"
    + one("patch feature 0..1 of b at subject token", ends="from other into clean"),
    "loop": one("for k in 1..2 { set z layer 1 head 1 at subject token to k }"),
    "swept steps": one(
        "for k in 1..2 { set z layer 1 at last token to 2 during step k }\n  generate 5"
    ),
    "edges": one("block attention layer 1 head 1 from last token to subject token, cue token"),
    "paths": one("path z layer 0 head 1..2 -> q layer 1..2 head 1 at last token"),
    "circuit": "circuit c = L0H1 -> L1H1.k, L1H1 -> logits\n"
    + one("ablate c at subject token with zero"),
    "estimated circuit": "circuit c = L0H1 -> L1H1.k, L0H2 -> L1H1.k, L1H1 -> logits\n"
    + one("ablate all but c without each edge at subject token with zero\n  using eap"),
    "placed circuit": "circuit c = L0H1 -> L1H1.k at subject token, L1H1 -> logits\n"
    + one("ablate c at subject token with zero"),
    "neurons": "circuit c = L0N1 -> L1N1, L1N2 -> logits\n"
    + one("ablate all but c at subject token with zero"),
    "text": one('replace subject tokens with "w7"', ends=""),
    "item": one(
        "patch resid_post layer 1 at each item token", 'measure prob("w{item.index}") as raw'
    ),
    "kl": one("patch resid_post layer 1 at subject token", "measure kl(other) as raw"),
    "cosine": one(
        "patch resid_post layer 1 at subject token",
        "measure cosine(L2.resid, other) at subject token as raw",
    ),
    "loss": one("patch resid_post layer 1 at subject token", "measure loss at cue token as raw"),
    "in reply": one(
        "patch resid_post layer 1 at subject token\n  generate 5",
        "measure entropy at reply token 2 as raw",
    ),
}  # fmt: skip


@cache
def resolved(name: str) -> ResolvedExperiment:
    model = support.adopted("gpt2")
    folder = Path(mkdtemp())
    support.write_rows(folder)
    checked = support.check_file(APART + EXPERIMENTS[name], folder, model, NOISED)
    (found,) = checked.experiments
    return found


@cache
def prepared(name: str) -> ResolvedExperiment:
    """The experiment, with the additions that a field needs in order to matter."""
    match name:
        case "apart of two runs":
            found = resolved("apart")
            (rule,) = found.rules
            assert rule.external is not None
            runs = dict(rule.external.table.runs)
            table = replace(rule.external.table, runs={**runs, "changed": other_row(runs["clean"])})
            return replace(
                found, rules=(replace(rule, external=replace(rule.external, table=table)),)
            )
        case "noised in sds":
            found = changed(resolved("noised"), RunNoise, "sds", lambda sds: 3.0)
            return changed(found, RunNoise, "sd_tokens", lambda tokens: (5, 6))
        case "written":
            number = METRICS["exact_match"].forms["reply"]
            found = changed(resolved("patch"), MetricTerm, "form", lambda form: number)
            found = changed(found, MetricTerm, "wanted", lambda _: {None: (("w1",),) * 4})
            return changed(found, ResolvedMeasure, "reply", lambda reply: (40,))
        case "python":
            found = changed(resolved("patch"), MetricTerm, "python", lambda python: FUNCTION)
            return changed(found, MetricTerm, "rows", lambda rows: ({"count": 1},) * 4)
        case "sets":
            sets = TokenSets(((5, 6), (7, 8)), (0, 0, 1, 1), ((1, 2), (3, 4)))
            return changed(resolved("patch"), MetricTerm, "sets", lambda _: {None: sets})
        case "paths to features":
            ends = {(number,): Coordinates((number,)) for number in range(2)}
            basis = BasisTargets("f", ("f",), ({None: SPANNED},), ("to_layer",), ends)
            return changed(resolved("paths"), PathTargets, "basis", lambda _: basis)
        case _:
            return resolved(name)


def changed(
    experiment: ResolvedExperiment, kind: type, field: str, change: Change
) -> ResolvedExperiment:
    """The experiment with another value in a field of its first rule, measure or row."""

    def other(record: Any) -> Any:
        assert type(record) is kind
        return replace(record, **{field: change(getattr(record, field))})

    rule, measure, table = experiment.rules[0], experiment.measures[0], experiment.table
    base = table.runs[experiment.spec.base]
    if kind in IN_RULE:
        part = IN_RULE[kind]
        rule = replace(rule, **{part: other(getattr(rule, part))})
    elif kind is ResolvedRule:
        rule = other(rule)
    elif kind is ResolvedMeasure:
        measure = other(measure)
    elif kind is MetricTerm:
        measure = replace(measure, atoms=(other(measure.atoms[0]), *measure.atoms[1:]))
    elif kind is TokenSets:
        atom = measure.atoms[0]
        atom = replace(atom, sets={None: other(atom.sets[None])})
        measure = replace(measure, atoms=(atom, *measure.atoms[1:]))
    elif kind is PromptRun:
        base = other(base)
    elif kind is RunNoise:
        base = replace(base, noise=other(base.noise))
    else:
        base = replace(base, rows=(other(base.rows[0]), *base.rows[1:]))
    return replace(
        experiment,
        rules=(rule, *experiment.rules[1:]),
        measures=(measure, *experiment.measures[1:]),
        table=replace(table, runs={**table.runs, experiment.spec.base: base}),
    )


IN_RULE = {
    SiteTargets: "sites",
    PositionTargets: "positions",
    Amounts: "amounts",
    StepRanges: "steps",
    EdgeTargets: "edge",
    PathTargets: "path",
    CircuitTargets: "circuit",
    ExternalRun: "external",
}


def planned(experiment: ResolvedExperiment) -> ExperimentPlan:
    (panel,) = make_plan([experiment]).panels
    return panel.experiments[0]


def keys(plan: ExperimentPlan) -> dict[tuple[int, ...], tuple[bytes, int]]:
    """(cell, prompt, alternative, measure) → the key of its value."""
    table = plan.experiment.table
    contents = RunContents({"m": b"m", "n": b"n"}, "m", 0)
    kept = np.arange(len(table))
    kinds = enumerate(rule.rule.does.reads for rule in plan.rules)
    donors = {number: np.roll(kept, 1) for number, reads in kinds if reads == "donor"}
    found = ExperimentKeys(
        plan, table, contents, kept, donors, collect_whole_cells(plan, plan.rows(kept))
    )
    rows = plan.rows(kept)
    assert len(rows)
    every: dict[tuple[int, ...], tuple[bytes, int]] = {}
    for number, cells in enumerate(found.cells):
        each = zip(rows.cell.tolist(), rows.prompt.tolist(), rows.alternative.tolist(),
                   found.rows(number, rows).tolist(), strict=True)  # fmt: skip
        for cell, prompt, run, row in each:
            code = int(found.code_of_cell[cell])
            every[cell, prompt, run, number] = cells[code], row
    return every


def unpatched_keys(plan: ExperimentPlan) -> list[tuple[bytes, list[int]]]:
    """[measure] (its key, [prompt] the keys of its rows) of the base run."""
    table = plan.experiment.table
    contents = RunContents({"m": b"m", "n": b"n"}, "m", 0)
    base = table.runs[plan.experiment.spec.base]
    every: list[tuple[bytes, list[int]]] = []
    for measure in plan.experiment.measures:
        rows = measure_row_keys(measure, base, plan.items[-1], table, contents)
        every.append(
            (measure_digest(measure), mix_numbers(rows, contents.of(base, table)).tolist())
        )
    return every


Change = Callable[[Any], Any]
"""Value of a field → another value."""


def one_more(values: dict[Any, Any], change: Change) -> dict[Any, Any]:
    """A mapping with another last value."""
    last = list(values)[-1]
    return {**values, last: change(values[last])}


SPANNED = BasisMember("f", "span", {}, SpannedBasis(()), 4, 2, "")
"""A basis for features of a circuit, whose keys contain those of any operand."""


def fewer_edges(classes: tuple[tuple[CircuitEdge, ...], ...]) -> tuple[Any, ...]:
    return tuple(edges[:1] for edges in classes)


def moved(cell: PositionCell) -> PositionCell:
    """Shift every token by one."""
    hits = tuple(tuple(tuple(t + 1 for t in run) for run in row) for row in cell.hits)
    return replace(cell, hits=hits)


def moved_hits(hits: TokenHits) -> TokenHits:
    return replace(hits, tokens=replace(hits.tokens, values=hits.tokens.values + 1))


def turned(values: Any) -> Any:
    return values[::-1]


def next_head(points: tuple[SitePoint, ...]) -> tuple[SitePoint, ...]:
    return tuple(replace(p, unit=(p.unit or 0) + 1) for p in points)


def next_layer(points: tuple[SitePoint, ...]) -> tuple[SitePoint, ...]:
    return tuple(replace(p, layer=(p.layer or 0) + 1) for p in points)


def text(node: ast.Expr, of: str) -> ast.Expr:
    return ast.Name(id=of, span=node.span)


def other_row(run: PromptRun) -> PromptRun:
    return replace(run, rows=(replace(run.rows[0], ids=(*run.rows[0].ids[:-1], 9)), *run.rows[1:]))


def other_table(table: PromptTable) -> PromptTable:
    return replace(table, runs={name: other_row(run) for name, run in table.runs.items()})


def other_direction(targets: DirectionTargets) -> DirectionTargets:
    """A direction of the same name with another method."""
    (member,) = targets.members.values()
    vector = replace(member.vector, method="pca")
    return replace(targets, members={(): replace(member, vector=vector)})


def with_another_coordinate(every: tuple[Coordinates, ...]) -> tuple[Coordinates, ...]:
    return tuple(replace(own, which=(*own.which, 5)) for own in every)


def other_basis(targets: BasisTargets) -> BasisTargets:
    """A basis of the same name with another method."""
    return in_members(targets, "method", lambda method: "random")


def in_members(targets: BasisTargets, field: str, change: Change) -> BasisTargets:
    """Change the value of a field in each basis."""
    (points,) = targets.bases
    members = {
        key: replace(member, **{field: change(getattr(member, field))})
        for key, member in points.items()
    }
    return replace(targets, bases=(members,))


def longer(lists: RaggedColumn) -> RaggedColumn:
    """The first list has its first number twice."""
    return RaggedColumn(
        np.concatenate([lists.offsets[:1], lists.offsets[1:] + 1]),
        np.concatenate([lists.values[:1], lists.values]),
    )


KEYED: dict[type, dict[str, tuple[str, Change]]] = {
    ResolvedRule: {
        "does": ("patch", lambda does: FILLS["resample"]),
        "run": ("patch", lambda run: "longer"),
        "sites": ("patch", lambda sites: replace(sites, points=one_more(sites.points, next_layer))),
        "positions": ("patch", lambda at: replace(at, written=one_more(at.written, moved))),
        "inputs": ("text", lambda inputs: one_more(inputs, other_row)),
        "groups": ("mean", turned),
        "amounts": ("number", lambda amounts: replace(amounts, values={(): 0.25})),
        "external": (
            "apart",
            lambda external: replace(external, table=other_table(external.table)),
        ),
        "python": ("number", lambda python: FUNCTION),
        "edge": ("edges", lambda edge: replace(edge, change="uniform")),
        "path": ("paths", lambda path: replace(path, through_mlps=True)),
        "circuit": ("circuit", lambda of: replace(of, edges=one_more(of.edges, fewer_edges))),
        "only": ("fills", lambda only: replace(only, index=1)),
        "direction": ("steered", other_direction),
        "basis": ("in a basis", other_basis),
        "steps": ("patch", lambda steps: StepRanges((), {(): (0, 0)})),
        "after_prefill": ("patch", lambda after: True),
    },
    SiteTargets: {
        "points": ("grid", lambda points: one_more(points, next_head)),
        "sources": ("grid", lambda points: one_more(points, next_head)),
    },
    PositionTargets: {
        "written": ("patch", lambda cells: one_more(cells, moved)),
        "read": ("patch", lambda cells: one_more(cells, moved)),
        "newest": ("patch", lambda newest: frozenset({(0,), (1,), (2,)})),
    },
    StepRanges: {"values": ("swept steps", lambda values: one_more(values, lambda ends: (1, 3)))},
    Amounts: {"values": ("loop", lambda values: one_more(values, lambda value: value + 1))},
    EdgeTargets: {
        "change": ("edges", lambda change: "uniform"),
        "keys": ("edges", lambda at: replace(at, written=one_more(at.written, moved))),
    },
    PathTargets: {
        "receivers": ("paths", lambda at: replace(at, points=one_more(at.points, next_head))),
        "through_mlps": ("paths", lambda through: not through),
        "frozen_norms": ("paths", lambda frozen: not frozen),
        "basis": ("paths to features", other_basis),
    },
    CircuitTargets: {
        "edges": ("circuit", lambda edges: one_more(edges, fewer_edges)),
        "named": ("estimated circuit", lambda named: {(): dict([*named[()].items()][:2])}),
        "places": ("placed circuit", lambda places: tuple(map(moved, places))),
        "neurons": ("neurons", lambda neurons: {0: (1,)}),
        "features": (
            "neurons",
            lambda features: {("mlp_out", 2): FeatureNodes(SPANNED, (1,))},
        ),
    },
    ExternalRun: {
        "table": ("apart", other_table),
        "run": ("apart of two runs", lambda run: "changed"),
    },
    ResolvedMeasure: {
        "expression": ("patch", lambda node: text(node, "loss")),
        "atoms": ("patch", lambda atoms: atoms[:1]),
        "kind": ("patch", lambda kind: "category"),
        "observed": ("patch", lambda observed: not observed),
        "reply": ("written", lambda reply: (20,)),
        "at": ("patch", lambda at: {"clean": (1, 1, 1, 1)}),
        "in_reply": ("in reply", lambda place: replace(place, number=3)),
    },
    MetricTerm: {
        "node": ("patch", lambda node: text(node, "loss")),
        "name": ("patch", lambda name: "prob"),
        "form": ("patch", lambda form: replace(form, takes="nothing")),
        "lacking": ("patch", lambda rows: (1,)),
        "texts": ("item", lambda texts: one_more(texts, lambda rows: ((9,),) * 4)),
        "of_class": ("patch", lambda of: not of),
        "classes": ("patch", lambda count: count + 1),
        "sets": ("sets", lambda sets: {None: replace(sets[None], of_row=(0, 1, 1, 1))}),
        "run": ("kl", lambda run: "turned"),
        "point": ("cosine", lambda point: replace(point, layer=1)),
        "python": ("python", lambda python: replace(python, digest="1" * 64)),
        "rows": ("python", lambda rows: ({"count": 9}, *rows[1:])),
        "tokenizer": ("python", lambda tokenizer: SimpleNamespace(hash="1" * 64)),
        "wanted": ("written", lambda wanted: {None: (("w2",),) * 4}),
        "own": ("loss", lambda own: {run: (9,) * len(rows) for run, rows in own.items()}),
    },
    TokenSets: {
        "tokens": ("sets", lambda sets: ((*sets[0][:-1], 9), *sets[1:])),
        "of_row": ("sets", lambda of_row: (0, 1, 1, 1)),
        "numbers": ("sets", lambda sets: ((*sets[0][:-1], 9), *sets[1:])),
    },
    RunNoise: {
        "site": ("noised", lambda site: "resid_mid"),
        "positions": ("noised", lambda at: ((1,), *at[1:])),
        "std": ("noised", lambda std: std * 2),
        "sds": ("noised", lambda sds: 3.0),
        "sd_tokens": ("noised in sds", lambda tokens: (*tokens, 7)),
        "samples": ("noised", lambda samples: samples + 1),
        "kind": ("noised", lambda kind: "uniform"),
        "row_keys": ("noised", lambda keys: (1, 2, 3, 4)),
    },
    PromptRun: {
        "rows": ("patch", lambda rows: other_row(PromptRun("", rows)).rows),
        "noise": ("noised", lambda noise: None),
        "model": ("patch", lambda model: "n"),
    },
    RunRow: {
        "ids": ("patch", lambda ids: (*ids[:-1], 9)),
        "special": ("patch", turned),
        "source": ("patch", lambda count: count + 1),
    },
    RulePlan: {
        "rule": ("patch", lambda rule: replace(rule, does=FILLS["resample"])),
        "site_of_cell": ("grid", turned),
        "position_of_cell": ("grid", turned),
        "points": ("grid", longer),
        "point_table": ("grid", next_head),
        "source_table": ("grid", next_head),
        "written": ("patch", moved_hits),
        "read": ("patch", moved_hits),
        "averaged": ("mean", moved_hits),
        "amounts": ("number", lambda amounts: amounts + 1),
        "coordinates": ("in a basis", with_another_coordinate),
        "coordinates_of_cell": ("in a basis", turned),
        "keys": ("edges", moved_hits),
        "key_of_cell": ("edges", turned),
        "follows": ("patch", lambda follows: follows + 1),
        "keys_follow": ("edges", lambda follows: follows + 1),
        "paths": ("paths", lambda paths: replace(paths, table=next_head(paths.table))),
        "active": ("fills", lambda active: ~active),
        "steps": ("swept steps", lambda steps: steps + 1),
    },
    PathPlan: {
        "table": ("paths", next_head),
        "points": ("paths", longer),
        "pair_of_cell": ("paths", turned),
        "coordinates": ("paths to features", with_another_coordinate),
        "coordinates_of_cell": ("paths to features", turned),
    },
}  # fmt: skip
"""By field: an experiment in which it matters, and another value of it."""

SHOWN = "only displayed"
PLACED = "assigns values to cells; the key of a cell contains the value itself"
NOT_KEYED: dict[type, dict[str, str]] = {
    ResolvedRule: {
        "spec": "the rule as written; the other fields contain its meaning. An intervention that "
        "computes numbers from it lists them in its `key`, which is part of the key",
        "compared_sites": "used by observations over all rows and of weights, which aren't stored "
        "by row",
    },
    SiteTargets: {
        "axes": PLACED,
        "labels": SHOWN,
        "left_out": SHOWN,
        "missing": "its cells don't exist, so they have no rows",
    },
    PositionTargets: {
        "axes": PLACED,
        "left_out": SHOWN,
        "every": "a property of the positions in `newest`; `RulePlan.follows` contains both",
    },
    Amounts: {"axes": PLACED},
    StepRanges: {"axes": PLACED},
    EdgeTargets: {},
    PathTargets: {"held": "the shape of the model determines it; conventions describe it"},
    CircuitTargets: {
        "every": "the edges of the model, whose key is part of the key",
        "classes": "sets of `places`; `edges` are those of each class",
        "encoder": "the number of one of `places`; `edges` are those of each class",
        "name": SHOWN,
        "scores": SHOWN,
        "digest": "`edges` are those that are ablated",
        "made": SHOWN,
        "waits": "such an experiment doesn't run",
        "others": SHOWN,
        "dead": SHOWN,
        "place_texts": SHOWN,
        "prompts": SHOWN,
    },
    ExternalRun: {"part": "`table` contains its rows"},
    ResolvedMeasure: {
        "label": SHOWN,
        "text": SHOWN,
        "unit": "displayed, or used after the values are computed",
        "truth": "compared with the values after they are computed",
        "absent": "rows that the results leave out",
        "item": "`MetricTerm.texts` contains the text that uses it",
    },
    MetricTerm: {
        "points": "only `point` is read",
        "axes": PLACED,
        "part_of": "only read for the conventions",
        "alternatives": "a measure contains the terms instead",
    },
    TokenSets: {},
    RunNoise: {
        "drawn": "used for saved rows, whose values aren't stored",
        "sd_images": "`sd_tokens` has one number for each image",
    },
    PromptRun: {
        "name": "a label; the key contains the run's rows",
        "prompts": "the name of a block; the key contains its rows",
        "chat": "the key contains the tokens of the chat",
        "derived": "the key contains its rules (`tests/execute/test_value_keys.py`)",
    },
    RunRow: {
        "text": "the model sees only the tokens",
        "reply": "its tokens are part of the row's tokens",
        "offsets": "only used to find positions, which are part of the key",
        "spans": "only used to find positions, which are part of the key",
        "places": "only used to find positions, which are part of the key",
        "regions": "values computed from regions aren't stored by row",
        "image": "its tokens are a digest of everything that determines its pixels",
        "pictures": "their tokens are digests of everything that determines their pixels",
        "values": "`MetricTerm.rows` contains the values that a function receives, "
        "`ResolvedRule.groups` those that group a mean",
        "texts": "`MetricTerm.texts` contains those that a metric names",
    },
    RulePlan: {
        "directions": "the members of `direction`, in the same order",
        "direction_of_cell": "cells have the axes of `direction`",
        "positions": "`written` is computed from them",
        "sources": "`read` and `averaged` are computed from them",
        "number": "the order of the rules in the key contains it",
        "in_answers": "the tokens in `written`, `read` and `keys` determine it",
        "vectors": "the numbers in `written`, `read` and `averaged` depend on it",
    },
    PathPlan: {
        "reads": "the basis in `PathTargets.basis` determines it",
        "through_mlps": "`PathTargets.through_mlps` is part of the key",
        "frozen_norms": "`PathTargets.frozen_norms` is part of the key",
    },
}
"""By field, why numbers don't depend on it, given the rest of the key."""


@pytest.mark.parametrize("kind", KEYED, ids=lambda kind: kind.__name__)
def test_every_field_is_keyed_or_has_a_reason(kind: type) -> None:
    """A new field is part of the key, or has a reason why it isn't."""
    own = {each.name for each in fields(kind)}
    assert own == KEYED[kind].keys() | NOT_KEYED[kind].keys()
    assert not KEYED[kind].keys() & NOT_KEYED[kind].keys()


class Scaled(Intervention):
    """A custom intervention whose numbers depend on more than a rule's fields."""

    name = "scaled"
    reads = "mean"
    by = 1

    def key(self, rule: ResolvedRule) -> Hashable:
        return rule.run, self.by


@pytest.mark.parametrize("reads", ["run", "donor", "mean"])
def test_value_key_depends_on_the_key_of_a_custom_intervention(
    reads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key contains the intervention's `key`, also if values depend on other rows."""
    monkeypatch.setattr(Scaled, "reads", reads)
    plan = planned(changed(resolved("patch"), ResolvedRule, "does", lambda does: Scaled()))
    before = keys(plan)
    monkeypatch.setattr(Scaled, "by", 2)
    after = keys(plan)
    assert before.keys() == after.keys()
    assert all(before[place] != after[place] for place in before)


FIELDS = [(kind, field) for kind, every in KEYED.items() for field in every]


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=lambda part: getattr(part, "__name__", part)
)
def test_value_key_depends_on_each_keyed_field(kind: type, field: str) -> None:
    name, change = KEYED[kind][field]
    experiment = prepared(name)
    plan = planned(experiment)
    before = keys(plan)
    assert keys(planned(experiment)) == before
    if kind is RulePlan or kind is PathPlan:
        first = plan.rules[0]
        own: Any = first if kind is RulePlan else first.paths
        own = replace(own, **{field: change(getattr(own, field))})
        rule = own if kind is RulePlan else replace(first, paths=own)
        after = keys(replace(plan, rules=(rule, *plan.rules[1:])))
    else:
        other = planned(changed(experiment, kind, field, change))
        after = keys(other)
        if kind in (MetricTerm, TokenSets, ResolvedMeasure, RunNoise, PromptRun, RunRow):
            assert unpatched_keys(plan) != unpatched_keys(other)
    both = before.keys() & after.keys()
    assert both
    assert any(before[place] != after[place] for place in both)


def test_value_key_depends_on_the_group_of_a_mean_by_groups(tmp_path: Path) -> None:
    """A mean by groups writes a different vector into each group."""
    row, *others = support.ROWS[::2]
    support.write_rows(tmp_path, [row, {**row, "cue2": "w22"}, *others])
    model = support.adopted("gpt2")
    text = EXPERIMENTS["mean"]
    for by, apart in ((" by cue2", True), ("", False)):
        checked = support.check_file(text.replace(" by cue2", by), tmp_path, model, support.PROMPTS)
        found = keys(planned(checked.experiments[0]))
        kinds = {key for (cell, *_), key in found.items() if cell == 0}
        assert len(kinds) == (3 if apart else 2)


OPERANDS: dict[type, tuple[BasisOperand, dict[str, Change]]] = {
    TokenBasis: (TokenBasis((3, 4)), {"tokens": lambda tokens: (3, 5)}),
    SpannedBasis: (
        SpannedBasis((UnembeddingVector(3, None),)),
        {
            "vectors": lambda vectors: (UnembeddingVector(4, None),),
            "next_map": lambda point: SitePoint("mlp_hidden", 1, None),
        },
    ),
    OutputWeights: (
        OutputWeights("mlp_out", 1, UnembeddingVector(3, None)),
        {
            "site": lambda site: "attn_out",
            "layer": lambda layer: 0,
            "vector": lambda vector: UnembeddingVector(4, None),
            "replaces": lambda replaces: True,
        },
    ),
    WeightBasis: (
        WeightBasis("mlp_out", 1),
        {"site": lambda site: "attn_out", "layer": lambda layer: 0},
    ),
    DrawnBasis: (DrawnBasis("0", 0), {"draw": lambda draw: "1", "seed": lambda seed: 1}),
    SavedVector: (
        SavedVector(Path("a.safetensors"), "d", "0" * 64),
        {"key": lambda key: "e", "digest": lambda digest: "1" * 64},
    ),
}
"""Operands of bases by class, with another value by field."""


def basis_keys(change: Callable[[BasisTargets], BasisTargets]) -> dict[Any, Any]:
    return keys(planned(changed(resolved("in a basis"), ResolvedRule, "basis", change)))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("method", lambda method: "random"),
        ("options", lambda options: {"dims": 3}),
        ("operand", lambda operand: replace(operand, points=next_layer(operand.points))),
        ("operand", lambda operand: replace(operand, samples=other_samples(operand.samples))),
        ("size", lambda size: size + 1),
        ("reads", lambda reads: "mlp_norm"),
    ],
)
def test_basis_with_another_value_in_a_field_has_another_key(field: str, change: Change) -> None:
    before = basis_keys(lambda targets: targets)
    after = basis_keys(lambda targets: in_members(targets, field, change))
    assert all(before[place] != after[place] for place in before)


@pytest.mark.parametrize("kind", OPERANDS, ids=lambda kind: kind.__name__)
def test_basis_of_another_operand_has_another_key(kind: type) -> None:
    operand, every = OPERANDS[kind]

    def found(own: object) -> dict[Any, Any]:
        return basis_keys(lambda targets: in_members(targets, "operand", lambda _: own))

    before = found(operand)
    assert found(operand) == before
    for field, change in every.items():
        after = found(replace(operand, **{field: change(getattr(operand, field))}))
        assert all(before[place] != after[place] for place in before), field


def test_value_key_depends_on_each_field_of_a_jacobian_basis() -> None:
    """The keys differ from those of principal components on the same rows."""

    def found(**other: object) -> dict[Any, Any]:
        def jacobian(fitted: Any) -> JacobianBasis:
            first, second = SitePoint("resid_post", 0, None), SitePoint("resid_post", 1, None)
            own = JacobianBasis(fitted.samples[0], first, second, False)
            if "sample" in other:
                return replace(own, sample=other_samples(fitted.samples)[0])
            return replace(own, **other)

        return basis_keys(lambda targets: in_members(targets, "operand", jacobian))

    changes: list[dict[str, object]] = [
        {"source": SitePoint("resid_pre", 0, None)},
        {"target": SitePoint("mlp_out", 1, None)},
        {"of_target": True},
        {"sample": None},
    ]
    every = [basis_keys(lambda targets: targets), found(), *(found(**own) for own in changes)]
    assert found() == every[1]
    for place in every[0]:
        assert len({own[place] for own in every}) == len(every)


@pytest.mark.parametrize("field", ["name", "made"])
def test_name_of_a_basis_is_not_keyed(field: str) -> None:
    before = basis_keys(lambda targets: replace(targets, definition="other"))
    after = basis_keys(lambda targets: in_members(targets, field, lambda text: "other"))
    assert before == after == basis_keys(lambda targets: targets)


def test_value_key_depends_on_the_basis_of_each_cell() -> None:
    """If a rule uses two bases, the key depends on the basis of each cell."""

    def with_number(targets: BasisTargets, number: int) -> BasisTargets:
        bases = (*targets.bases, *other_basis(targets).bases)
        coordinates = {key: replace(own, basis=number) for key, own in targets.coordinates.items()}
        return replace(targets, bases=bases, names=targets.names * 2, coordinates=coordinates)

    first, second, alone = (
        basis_keys(lambda targets: with_number(targets, 0)),
        basis_keys(lambda targets: with_number(targets, 1)),
        basis_keys(other_basis),
    )
    assert first == basis_keys(lambda targets: targets)
    assert second == alone
    assert all(first[place] != second[place] for place in first)


def test_value_key_depends_on_inserted_features_and_their_basis() -> None:
    """The key depends on the inserted features and their basis."""

    def with_features(targets: BasisTargets, which: tuple[int, ...], last: BasisTargets) -> Any:
        own = {key: replace(own, inserted=which) for key, own in targets.coordinates.items()}
        bases, names = (*targets.bases, *last.bases), (*targets.names, "other")
        return replace(targets, bases=bases, names=names, coordinates=own)

    every = [
        basis_keys(lambda targets, which=which, of=of: with_features(targets, which, of(targets)))
        for which in ((), (0,), (1,))
        for of in (lambda targets: targets, other_basis)
    ]
    plain, also, *others = every
    assert plain == also == basis_keys(lambda targets: targets)
    for place in plain:
        assert len({own[place] for own in (plain, *others)}) == 5


def test_every_field_of_bases_is_keyed_or_displayed_only() -> None:
    assert {each.name for each in fields(Coordinates)} == {"which", "basis", "inserted"}
    keyed = {"method", "options", "operand", "size", "reads"}
    # The width belongs to the site, and is part of a draw.
    shown = {"name", "made", "width", "labels"}
    assert {each.name for each in fields(BasisMember)} == keyed | shown
    assert {each.name for each in fields(BasisTargets)} == {
        *("definition", "names", "axes"),  # displayed, and assigned to cells
        *("bases", "coordinates"),
    }


def other_samples(samples: tuple[FitSample, ...]) -> tuple[FitSample, ...]:
    return tuple(replace(sample, cell=moved(sample.cell)) for sample in samples)


UNEMBEDDED = UnembeddingVector(3, None)
VECTORS: dict[type, dict[str, Change]] = {
    FittedVector: {
        "method": lambda method: "pca",
        "samples": turned,
        "points": next_layer,
        "options": lambda options: {"component": 2},
    },
    FitSample: {
        "run": other_row,
        "cell": moved,
        "targets": lambda targets: (1.0,) * 4,
        "each_token": lambda each: True,
    },
    UnembeddingVector: {"token": lambda token: 4, "less": lambda less: 5},
    SavedVector: {"key": lambda key: "e", "digest": lambda digest: "1" * 64},
    WeightedSum: {"parts": lambda parts: ((2.0, parts[0][1]),)},
    UnitVector: {"of": lambda of: UnembeddingVector(4, None)},
    RandomVector: {
        "of": lambda of: UnembeddingVector(4, None),
        "draw": lambda draw: "e 1",
        "seed": lambda seed: 1,
        "shuffles": lambda shuffles: True,
    },
}
"""Records of which directions consist, with another value by field."""
NOT_IN_VECTORS: dict[type, dict[str, str]] = {
    FitSample: {"table": "the rows of `run` are its"},
    SavedVector: {"path": "`digest` is of what the file has"},
}


def sampled() -> FittedVector:
    """A difference between two runs."""
    (member,) = resolved("steered").rules[0].direction.members.values()  # type: ignore[union-attr]
    assert isinstance(member.vector, FittedVector)
    (sample,) = member.vector.samples
    return replace(member.vector, samples=(sample, replace(sample, run=sample.table.runs["clean"])))


def vector_of(kind: type, change: tuple[str, Change] | None) -> DirectionVector:
    """A vector with a record of this kind, changed in one of its fields."""
    fitted = sampled()
    first, second = fitted.samples
    made: dict[type, Any] = {
        FittedVector: replace(fitted, samples=(first, replace(second, cell=moved(second.cell)))),
        FitSample: first,
        UnembeddingVector: UNEMBEDDED,
        SavedVector: SavedVector(Path("a.safetensors"), "d", "0" * 64),
        WeightedSum: WeightedSum(((1.0, UNEMBEDDED),)),
        UnitVector: UnitVector(UNEMBEDDED),
        RandomVector: RandomVector(UNEMBEDDED, "e 0", 0),
    }
    found = made[kind]
    if change is not None:
        field, other = change
        found = replace(found, **{field: other(getattr(found, field))})
    return replace(fitted, samples=(found,)) if kind is FitSample else found


def steered(vector: DirectionVector) -> ExperimentPlan:
    def other(targets: DirectionTargets) -> DirectionTargets:
        (member,) = targets.members.values()
        return replace(targets, members={(): replace(member, vector=vector)})

    return planned(changed(resolved("steered"), ResolvedRule, "direction", other))


@pytest.mark.parametrize("kind", VECTORS, ids=lambda kind: kind.__name__)
def test_direction_with_another_value_in_a_field_has_another_key(kind: type) -> None:
    left_out = NOT_IN_VECTORS.get(kind, {})
    assert {each.name for each in fields(kind)} == VECTORS[kind].keys() | left_out.keys()
    before = keys(steered(vector_of(kind, None)))
    assert keys(steered(vector_of(kind, None))) == before
    for change in VECTORS[kind].items():
        after = keys(steered(vector_of(kind, change)))
        assert all(before[place] != after[place] for place in before), change[0]
