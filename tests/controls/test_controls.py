"""`against random(n)`: bands equal those of explicit experiments on the random targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.base.hashing import unrank_subset
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, CheckSettings, check_source
from mechdsl.diagnostics.core import has_errors
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import PASS_NAMES, make_plan
from mechdsl.resolve.types import ResolvedControl, SitePoint
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.results.runs import read_export
from mechdsl.syntax.frontend import read_source

from ..run_source import run_source

FILE = Path(__file__).parent / "group.mech"
TEXT = FILE.read_text("utf-8")
START = TEXT[: TEXT.index("experiment together")]
"""Everything above the experiments."""
EVERY_PASS = frozenset(PASS_NAMES)


@cache
def checked() -> CheckedFile:
    source, _ = read_source(FILE)
    assert source is not None
    found = check_source(source)
    assert not has_errors(found.diagnostics), found.diagnostics
    return found


@cache
def results() -> mechdsl.Results:
    return mechdsl.run(FILE)


def control(name: str, of: CheckedFile | None = None) -> ResolvedControl:
    found = next(e for e in (of or checked()).experiments if e.name == name).control
    assert found is not None
    return found


def check(*lines: str, start: str = START) -> CheckedFile:
    body = "".join(f"  {line}\n" for line in lines)
    return check_source(Source(f"{start}experiment e {{\n  prompts fruit limit 12\n{body}}}\n"))


def drawn(of: ResolvedControl, rule: int = 0) -> dict[tuple[int, ...], tuple[SitePoint, ...]]:
    sites = of.experiment.rules[rule].sites
    assert sites is not None
    return dict(sites.points)


def explicit(rules: list[str], *lines: str) -> list[ExperimentResult]:
    """Results of one experiment for each rule."""
    text = START
    for number, rule in enumerate(rules):
        body = "\n  ".join((*lines, rule))
        text += f"experiment e{number} {{\n  prompts fruit limit 12\n  {body}\n}}\n"
    return list(mechdsl.run(text))


def effects(found: list[ExperimentResult], measure: int = 0) -> np.ndarray:
    return np.array([float(each.statistics[measure].mean[0]) for each in found])


def check_band(result: ExperimentResult, cell: int, values: np.ndarray, measure: int = 0) -> None:
    """Compare a band with the range of effects and the rank of the cell's effect."""
    band = result.control(measure)
    assert band is not None
    assert band.draws[cell] == len(values)
    found = [band.low[cell], band.high[cell], band.mean[cell]]
    assert found == pytest.approx([values.min(), values.max(), values.mean()], rel=1e-3, abs=1e-4)
    own = float(result.statistics[measure].mean[cell])
    as_large = sum(abs(float(value)) >= abs(own) for value in values)
    assert band.p[cell] == pytest.approx((1 + as_large) / (1 + len(values)))
    assert band.inside[cell] == (values.min() <= own <= values.max())
    assert band.level[cell] == pytest.approx((len(values) - 1) / (len(values) + 1))


PATCH = ("from clean into fewer", "measure logit(answer) as delta")
MEASURED_TWICE = (
    "from clean into fewer",
    "measure logit(answer) - logit(answer of fewer) as recovery",
    "measure logit(answer) as delta",
)


# --- rules that can't act together ---


@pytest.mark.parametrize(
    "rule",
    [
        "ablate attn_out layer 0 at last-item token with zero",
        "block attention layer 0 from last token to last-item token",
    ],
)
def test_control_of_a_rule_in_a_replaced_block_is_rejected(rule: str) -> None:
    removed = ("replace block layer 1 with identity", "measure logit(answer) as delta")
    found = check(rule, *removed, "against random(5)")
    (wrong,) = [each for each in found.diagnostics if each.code == "E0630"]
    assert f"`{rule}` is in a block that is replaced with identity" in wrong.message
    assert not has_errors(check(rule, *removed).diagnostics)


# --- bands ----------------------------------------------------------------------------------------


def test_band_of_joined_heads_equals_explicit_experiments() -> None:
    rules = []
    for points in drawn(control("together")).values():
        first, second = points
        rules.append(
            f"for l in [{first.layer}] {{ patch layer l head {first.unit} at last-item token }} "
            f"for k in [{second.layer}] {{ patch layer k head {second.unit} at last-item token }}"
        )
    found = explicit(rules, *MEASURED_TWICE)
    for measure in range(2):
        check_band(results()["together"], 0, effects(found, measure), measure)


def test_band_of_each_head_equals_explicit_experiments() -> None:
    points = drawn(control("each_head"))
    rules = [f"patch L{p.layer}H{p.unit} at last-item token" for (p,) in points.values()]
    values = dict(zip(points, effects(explicit(rules, *PATCH)), strict=True))
    result = results()["each_head"]
    for cell, (layer, head) in enumerate(np.ndindex(2, 4)):
        check_band(result, cell, np.array([values[draw, layer, head] for draw in range(3)]))


def test_band_of_each_layer_equals_explicit_experiments() -> None:
    points = drawn(control("each_layer"))
    rules = [f"patch resid_post layer {p.layer} at last-item token" for (p,) in points.values()]
    values = dict(zip(points, effects(explicit(rules, *PATCH)), strict=True))
    for cell in range(4):
        own = np.array([values[draw, cell] for draw in range(2)])
        check_band(results()["each_layer"], cell, own)


def test_band_of_heads_in_other_layers_equals_explicit_experiments() -> None:
    points = drawn(control("other_layers"))
    rules = [f"ablate L{p.layer}H{p.unit} at last-item token with zero" for (p,) in points.values()]
    measure = "measure logit(answer) as delta"
    values = dict(zip(points, effects(explicit(rules, measure)), strict=True))
    for cell in range(4):
        own = np.array([values[draw, cell] for draw in range(2)])
        check_band(results()["other_layers"], cell, own)
    assert all(p.layer != 1 and p.unit == head for (_, head), (p,) in points.items())


@pytest.mark.slow
def test_band_of_neurons_equals_explicit_experiments() -> None:
    rules = []
    for points in drawn(control("neurons")).values():
        units = ", ".join(str(p.unit) for p in points)
        rules.append(f"ablate layer 1 neurons {units} at last-item token with mean")
    found = explicit(rules, "measure logit(answer) as delta")
    check_band(results()["neurons"], 0, effects(found))


@cache
def bare() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(files("mechdsl") / "zoo" / "counting")).eval()


@torch.no_grad()
def logits_and_layer(ids: tuple[int, ...], patch: Callable[[torch.Tensor], None]) -> Any:
    seen: list[torch.Tensor] = []

    def hook(module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        patch(hidden)
        seen.append(hidden)

    handle = bare().model.layers[1].register_forward_hook(hook)
    try:
        logits = bare()(torch.tensor([ids])).logits[0, -1]
    finally:
        handle.remove()
    return logits, seen[0].clone()


def test_band_of_random_positions_equals_hooks() -> None:
    """Each row has different random tokens, so the reference is hooks on one prompt at a time."""
    of = control("elsewhere")
    table, rule = of.experiment.table, of.experiment.rules[0]
    clean, base = table.runs["clean"].rows, table.runs["fewer"].rows
    values = np.zeros((of.draws, len(table)))
    for row, (own, other) in enumerate(zip(clean, base, strict=True)):
        answer = own.texts["answer"].ids[0]
        _, source = logits_and_layer(own.ids, lambda hidden: None)
        before, _ = logits_and_layer(other.ids, lambda hidden: None)
        for draw in range(of.draws):
            ((token,),) = rule.positions.written[(draw,)].hits[row]
            assert rule.positions.read[(draw,)].hits[row] == ((token,),)

            def patch(hidden: Any, token: int = token, source: Any = source) -> None:
                hidden[0, token] = source[0, token]

            after, _ = logits_and_layer(other.ids, patch)
            values[draw, row] = float(after[answer] - before[answer])
    check_band(results()["elsewhere"], 0, values.mean(axis=1))


@pytest.mark.slow
def test_bands_do_not_depend_on_planner_passes() -> None:
    source, _ = read_source(FILE)
    assert source is not None
    plain, _ = run_source(source, RunOptions(without=EVERY_PASS))
    assert plain is not None
    for result in plain.experiments:
        for own, other in zip(result.controls, results()[result.name].controls, strict=True):
            assert own is not None
            assert other is not None
            assert own.low == pytest.approx(other.low, rel=1e-3, abs=1e-4)
            assert own.high == pytest.approx(other.high, rel=1e-3, abs=1e-4)


def test_band_uses_the_confidence_of_the_experiment() -> None:
    narrow = TEXT.replace("  against random(8)", "  stats confidence 50%\n  against random(8)")
    values = results()["together"].control(0)
    found = mechdsl.run(narrow, only="together")["together"].control(0)
    assert values is not None
    assert found is not None
    assert values.low[0] < found.low[0] < found.high[0] < values.high[0]
    assert values.mean == pytest.approx(found.mean)
    assert (values.level[0], found.level[0]) == pytest.approx((7 / 9, 5 / 9))


# --- random targets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["together", "each_head", "neurons"])
def test_random_targets_have_the_same_layers_but_not_the_same_units(name: str) -> None:
    experiment = next(e for e in checked().experiments if e.name == name)
    own = experiment.rules[0].sites
    assert own is not None
    for (_, *cell), points in drawn(control(name)).items():
        before = own.points[tuple(cell)]
        assert sorted((p.site, p.layer or 0) for p in points) == sorted(
            (p.site, p.layer or 0) for p in before
        )
        assert len(set(points)) == len(points)
        assert not set(points) & set(before)


@pytest.mark.parametrize("name", ["together", "each_head", "each_layer", "neurons"])
def test_draws_of_a_cell_are_distinct(name: str) -> None:
    by_cell: dict[tuple[int, ...], list[frozenset[SitePoint]]] = {}
    for (_, *cell), points in drawn(control(name)).items():
        by_cell.setdefault(tuple(cell), []).append(frozenset(points))
    for sets in by_cell.values():
        assert len(set(sets)) == len(sets) == control(name).draws


def test_draws_depend_only_on_seed_and_targets() -> None:
    lines = (*PATCH, "patch L0H1 at last-item token", "against random(3)")
    first = drawn(control("e", check(*lines)))
    others = START + "experiment before { prompts fruit limit 3 measure logit(answer) as raw }\n"
    assert drawn(control("e", check(*lines, start=others))) == first
    swept = (*PATCH, "patch layer 0 head 1, 3 at last token", "against random(3)")
    sweep = drawn(control("e", check(*swept)))
    assert {sweep[draw, 0] for draw in range(3)} == set(first.values())
    lines = (*PATCH, "patch layer 1 neurons 0..3 at last token", "against random(5)")
    one, two = (
        drawn(control("e", check(*lines, start=START.replace("seed 3", f"seed {seed}"))))
        for seed in (3, 4)
    )
    assert one != two


def test_rules_that_share_a_head_share_its_random_head() -> None:
    rules = (
        "ablate L0H1 at last token with zero",
        "ablate L0H1.q at first token of fruits with zero",
        "ablate L0H3 at last token with zero",
    )
    found = control("e", check(*PATCH, *rules, "against random(1)"))
    first, second, third = (drawn(found, rule)[(0,)][0] for rule in range(3))
    assert (first.layer, first.unit) == (second.layer, second.unit)
    assert {first.unit, third.unit} == {0, 2}


def test_rule_without_alternatives_stays_fixed_in_controls() -> None:
    rules = ('replace first token of fruits with "fig"', "ablate L0H1 at last token with zero")
    found = control("e", check("measure logit(answer) as delta", *rules, "against random(2)"))
    assert found.what == "random heads"
    assert '`replace first token of fruits with "fig"` unchanged' in found.said


def test_joined_heads_with_few_alternatives_reuse_their_own() -> None:
    """Three of four heads are joined, so any other three include one of them."""
    rule = "ablate layer 0 heads 0..2 at last token with zero"
    found = control("e", check("measure logit(answer) as delta", rule, "against random(3)"))
    assert {frozenset(p.unit for p in points) for points in drawn(found).values()} == {
        frozenset(each) for each in combinations(range(4), 3) if each != (0, 1, 2)
    }
    assert "including the cell's targets" in found.said


def test_control_with_few_alternatives_uses_each_once() -> None:
    """Each head has three alternatives, so there are only three draws."""
    rule = "patch layer * head * at last-item token"
    found = control("e", check(*PATCH, rule, "against random(20)"))
    by_cell: dict[tuple[int, ...], list[int | None]] = {}
    for (_, layer, head), (point,) in drawn(found).items():
        assert point.layer == layer
        by_cell.setdefault((layer, head), []).append(point.unit)
    assert len(by_cell) == 16
    for (_, head), units in by_cell.items():
        assert sorted(units) == sorted(set(range(4)) - {head})
    assert found.said.startswith("random heads, 3 draws, all that exist, seed 3;")
    assert "none of the cell's targets" in found.said

    values = effects(explicit([f"patch L1H{head} at last-item token" for head in range(4)], *PATCH))
    body = "".join(f"  {line}\n" for line in (*PATCH, rule, "against random(20)"))
    text = f"{START}experiment e {{\n  prompts fruit limit 12\n{body}}}\n"
    (result,) = mechdsl.run(text)
    for head in range(4):
        check_band(result, 4 + head, np.delete(values, head))
    printed = result.to_text(120)
    assert (
        "null: range of 3 draws of random heads, all that exist; a target like these falls in this "
        "range" in printed
    )
    assert "with probability 50 %" in printed
    assert "needs 39 draws, more than exist" in printed


def test_control_reports_when_all_alternatives_are_used() -> None:
    rule = "patch L1H2 at last-item token"
    few, more = (control("e", check(*PATCH, rule, f"against random({n})")) for n in (3, 4))
    assert "all that exist" not in few.said
    assert "3 draws, all that exist" in more.said
    assert drawn(more) == drawn(few)


def test_cells_with_different_numbers_of_alternatives_have_own_counts() -> None:
    """One head of four has three alternatives, two heads have more pairs: each cell has its own
    number of draws."""
    lines = (
        "for k in [1, 2] { patch top k of which at last-item token }",
        *PATCH,
        "against random(4)",
    )
    body = "".join(f"  {line}\n" for line in lines)
    text = f"{START}{WHICH}experiment e {{\n  prompts fruit limit 6\n{body}}}\n"
    picked = mechdsl.run(text)["e"]
    band = picked.control(0)
    assert band is not None
    # L2H0 and L1H2: 3 alternatives for the first, 3 × 3 pairs for both
    assert band.draws.tolist() == [3, 4]
    assert "3 to 4 draws, all that exist where fewer than 4" in picked.conventions["controls"]
    assert (
        "range of 3 to 4 draws of random heads, all that exist where fewer than 4"
        in picked.to_text(140)
    )
    others = [f"patch L2H{head} at last-item token" for head in (1, 2, 3)]
    found = []
    for number, rule in enumerate(others):
        one = "\n  ".join((*PATCH, rule))
        each = f"{START}experiment e{number} {{\n  prompts fruit limit 6\n  {one}\n}}\n"
        found.append(mechdsl.run(each)[f"e{number}"])
    check_band(picked, 0, effects(found))


def test_plan_has_no_rows_for_missing_draws() -> None:
    """One rule has random heads, the other random positions; where the latter writes nothing, only
    three heads are alternatives."""
    found = control("e", check_source(Source(BOTH)))
    drawn_ = found.experiment.drawn
    assert drawn_ is not None
    plans = make_plan([found.experiment]).panels[0].experiments
    rows = len(found.experiment.table)
    most = 3 * found.draws * rows
    assert plans[0].count() == sum(drawn_.counts.values()) * rows < most


def test_draws_prefer_sets_without_the_own_targets() -> None:
    """For two of four heads, one set excludes both; five sets differ from the own set."""
    rule = "ablate layer 0 heads 0, 1 at last token with zero"
    lines = ("measure logit(answer) as delta", rule)
    one, many = (control("e", check(*lines, f"against random({n})")) for n in (1, 20))
    assert [{p.unit for p in points} for points in drawn(one).values()] == [{2, 3}]
    sets = Counter(frozenset(p.unit for p in points) for points in drawn(many).values())
    assert sets == {frozenset(s): 1 for s in combinations(range(4), 2) if s != (0, 1)}
    assert "5 draws, all that exist" in many.said
    assert "including the cell's targets" in many.said


def test_control_varies_only_rules_with_alternatives() -> None:
    rules = (
        "ablate layer 0 heads * at last token with zero",
        "ablate layer 1..2 head 1 at last token with zero",
    )
    found = control("e", check("measure logit(answer) as delta", *rules, "against random(3)"))
    assert "stand" not in found.said
    for points in drawn(found, 0).values():
        assert {(p.layer, p.unit) for p in points} == {(0, head) for head in range(4)}
    assert all(p.unit != 1 for (p,) in drawn(found, 1).values())


PLACES = (
    "experiment places {\n  prompts fruit limit 6\n  ablate embed at token * align left with zero\n"
    "  measure prob(answer) as delta\n}\n"
)
WHICH = (
    "experiment which {\n  prompts fruit limit 6\n  from clean into fewer\n"
    "  patch layer * head * at last-item token\n  measure logit(answer) as delta\n}\n"
)
CURVES = [
    ("ablate embed at top k of places tokens with zero", PLACES, ""),
    ("from clean into fewer patch top k of which at last-item token", WHICH, ""),
    ("ablate resid_post layer 0 at top k of places tokens with zero", PLACES, ", positions"),
]
BOTH = f"""{START}{PLACES}experiment e {{
  prompts fruit limit 6
  for k in 0%..100% step 50% {{ ablate embed at top k of places tokens with zero }}
  ablate L0H1 at last token with zero
  measure logit(answer) as delta
  against random(5)
}}
"""
"""If the first rule writes nothing, only the second has alternatives."""


@pytest.mark.parametrize(("rule", "picked", "what"), CURVES, ids=["tokens", "sites", "named"])
def test_ends_of_a_curve_have_no_band(rule: str, picked: str, what: str) -> None:
    start, _, rest = rule.rpartition("patch ")
    inside = f"patch {rest}" if start else rule
    curve = (
        f"experiment curve {{\n  prompts fruit limit 6\n  {start}\n"
        f"  for k in 0%..100% step 25% {{ {inside} }}\n"
        f"  measure logit(answer) as delta\n  against random(5{what})\n}}\n"
    )
    found = mechdsl.run(START + picked + curve)["curve"]
    said = found.conventions["controls"]
    assert "2 of 5 cells have no alternatives and no band" in said
    band = found.control(0)
    assert band is not None
    for end in (0, 4):
        assert np.isnan([band.low[end], band.mean[end], band.high[end], band.p[end]]).all()
        assert band.draws[end] == 0
        assert not band.inside[end]
    assert band.draws[1:4].tolist() == [5, 5, 5]
    assert all(band.low[cell] < band.high[cell] for cell in (1, 2, 3))


def test_random_tokens_are_uniform_in_each_row() -> None:
    """Each other token of a row is equally likely; no two draws are equal in all rows."""
    rule = "ablate embed at last-item token with zero"
    lines = ("measure logit(answer) as delta", rule, "against random(600)")
    found = control("e", check(*lines))
    cells = found.experiment.rules[0].positions.written
    rows = found.experiment.table.runs["clean"].rows
    assert len({cell.hits for cell in cells.values()}) == 600
    own = check(*lines).experiments[0].rules[0].positions.written[()].hits
    for number, row in enumerate(rows):
        counts = Counter(cells[draw,].hits[number][0] for draw in range(found.draws))
        ((token,),) = own[number]
        others = {n for n, special in enumerate(row.special) if not special} - {token}
        assert set(counts) == {(other,) for other in others}
        mean = 600 / len(others)
        assert max(abs(count - mean) for count in counts.values()) < 4.5 * mean**0.5


def test_single_row_uses_each_other_token_once() -> None:
    rule = "ablate embed at last-item token with zero"
    lines = ("measure logit(answer) as delta", rule, "against random(60)")
    body = "".join(f"  {line}\n" for line in lines)
    text = f"{START}experiment e {{\n  prompts fruit limit 1\n{body}}}\n"
    found = control("e", check_source(Source(text)))
    (row,) = found.experiment.table.runs["clean"].rows
    cells = found.experiment.rules[0].positions.written.values()
    counts = Counter(cell.hits for cell in cells)
    others = row.special.count(False) - 1
    assert set(counts.values()) == {1}
    assert len(counts) == found.draws == others
    assert f"{others} draws, all that exist" in found.said


def test_conventions_report_cells_with_a_fixed_rule() -> None:
    said = mechdsl.run(BOTH)["e"].conventions["controls"]
    assert said.startswith("random heads and positions, 3 to 5 draws, all that exist where fewer")
    assert "in 1 of 3 cells a rule has no alternatives and doesn't change" in said
    assert "no band" not in said


def test_control_of_embeddings_draws_positions() -> None:
    rule = "ablate embed at first token of fruits with zero"
    found = control("e", check("measure logit(answer) as delta", rule, "against random(6)"))
    assert found.what == "random positions"
    rows = found.experiment.table.runs["clean"].rows
    own = check("measure logit(answer) as delta", rule).experiments[0].rules[0].positions
    for cell in found.experiment.rules[0].positions.written.values():
        for row, before, hits in zip(rows, own.written[()].hits, cell.hits, strict=True):
            ((token,),) = hits
            assert not row.special[token]
            assert hits != before


def test_random_positions_keep_the_number_of_joined_tokens() -> None:
    rule = "ablate resid_post layer 1 at tokens except fruits tokens with zero"
    text = "against random(4, positions)"
    found = control("e", check("measure logit(answer) as delta", rule, text))
    own = check("measure logit(answer) as delta", rule).experiments[0].rules[0].positions
    for cell in found.experiment.rules[0].positions.written.values():
        for before, hits in zip(own.written[()].hits, cell.hits, strict=True):
            assert [len(run) for run in hits] == [len(run) for run in before]
            assert all(list(run) == sorted(set(run)) for run in hits)


def test_large_sets_of_random_neurons_are_distinct() -> None:
    """There are too many sets to enumerate."""
    rule = "ablate layer 1 neurons 0..150 at last token with zero"
    found = control("e", check("measure logit(answer) as delta", rule, "against random(5)"))
    sets = [frozenset(p.unit for p in points) for points in drawn(found).values()]
    assert len(set(sets)) == 5
    assert all(len(each) == 151 and not each & set(range(151)) for each in sets)


def test_unrank_subset_equals_itertools_combinations() -> None:
    pool = (2, 3, 5, 7, 11, 13)
    for size in range(7):
        every = [unrank_subset(pool, size, rank) for rank in range(comb(6, size))]
        assert every == list(combinations(pool, size))


# --- results, plans and exports -------------------------------------------------------------------


def test_results_list_controls_as_null_of_their_experiment() -> None:
    names = [e.name for e in checked().experiments]
    assert [each.name for each in results()] == names
    document = results().to_dict()["files"][0]["experiments"]
    assert [each["name"] for each in document] == names
    null = document[0]["cells"][0]["measures"][0]["null"]
    assert null["draws"] == 8
    assert null["what"] == "random heads"
    assert null["low"] < null["mean"] < null["high"]
    assert null["level"] == pytest.approx(7 / 9)
    assert 0 < null["p"] <= 1
    assert null["inside"] is None  # 8 draws are too few to say


def test_plan_counts_rows_of_controls() -> None:
    with_, without = (
        make_plan(check(*PATCH, "patch layer 0..1 head * at last-item token", *more).experiments)
        for more in (("against random(3)",), ())
    )
    own, drawn_ = (each.count() for each in with_.panels[0].experiments)
    assert own == sum(each.count() for each in without.panels[0].experiments)
    assert drawn_ == 3 * own


def test_conventions_describe_controls() -> None:
    said = results()["together"].conventions["controls"]
    assert said.startswith("random heads, 8 draws, seed 3; ")
    assert "at least 95 %" in results()["together"].conventions["null band"]
    text = TEXT.replace("  against random(8)\n", "")
    alone = mechdsl.run(text, only="together")["together"]
    assert alone.controls == ()
    assert alone.conventions["controls"].startswith("none (`against random(39)`")


def test_number_of_draws_may_be_a_command_line_parameter() -> None:
    text = TEXT.replace("seed 3", "seed 3\nparam draws = 2").replace("random(8)", "random(draws)")
    found = check_source(Source(text), CheckSettings({"draws": "5"}))
    assert not has_errors(found.diagnostics), found.diagnostics
    assert control("together", found).draws == 5


def test_each_base_has_a_band() -> None:
    lines = (
        "from clean into fewer, clean",
        "measure logit(answer) as delta",
        "ablate L0H1 at last token with zero",
        "against random(3)",
    )
    body = "".join(f"  {line}\n" for line in lines)
    text = f"{START}experiment e {{\n  prompts fruit limit 12\n{body}}}\n"
    (result,) = mechdsl.run(text)
    band = result.control(0)
    assert band is not None
    assert len(band.low) == len(result.cells) == 2
    assert (band.low <= band.high).all()


def test_export_keeps_bands(tmp_path: Path) -> None:
    (result,) = mechdsl.run(TEXT, only="together", out=tmp_path)
    kept = {path.name for path in (tmp_path / "text").glob("*.jsonl")}
    assert kept == {"together.jsonl"}
    (again,) = read_export(tmp_path / "text")
    for band, own in zip(again.controls, result.controls, strict=True):
        assert band is not None
        assert own is not None
        for name in ("low", "high", "mean", "p"):
            np.testing.assert_array_equal(getattr(band, name), getattr(own, name))


# --- with other rules -----------------------------------------------------------------------------

RULES = [
    ("path L0H{unit} -> logits at last token", 1),
    ("block attention layer 1 head {unit} from last token to fruits tokens", 2),
    ("patch z layer 1 head {unit} at last-item token into layer 2", 2),
    ("freeze L1H{unit} at last token patch resid_post layer 0 at last-item token", 3),
]


@pytest.mark.parametrize(("rule", "unit"), RULES, ids=lambda each: str(each).split()[0])
def test_band_of_paths_edges_and_freezes_equals_explicit_experiments(rule: str, unit: int) -> None:
    heads = "heads" if rule.startswith("freeze") else ""
    lines = (*PATCH, rule.format(unit=unit), f"against random(3{', ' * bool(heads)}{heads})")
    found = control("e", check(*lines))
    units = [points[0].unit for points in drawn(found).values()]
    assert unit not in units
    text = START + "experiment e {\n  prompts fruit limit 12\n  " + "\n  ".join(lines) + "\n}\n"
    values = effects(explicit([rule.format(unit=other) for other in units], *PATCH))
    check_band(mechdsl.run(text)["e"], 0, values)


def test_top_heads_of_another_experiment_have_a_band(tmp_path: Path) -> None:
    """The placeholders, all heads of one layer, have no alternatives; the selected heads do."""
    picked = (
        "experiment each {\n  prompts fruit limit 12\n  from clean into fewer\n"
        "  patch layer * head * at last-item token\n  measure logit(answer) as delta\n}\n"
        "experiment best {\n  prompts fruit limit 12\n  from clean into fewer\n"
        "  patch top 4 of each at last-item token\n  measure logit(answer) as delta\n"
        "  against random(5)\n}\n"
    )
    found = mechdsl.run(START + picked)["best"]
    band = found.control(0)
    assert band is not None
    assert band.high[0] < found.statistics[0].mean[0]
    assert found.conventions["controls"].startswith("random heads, 5 draws")
