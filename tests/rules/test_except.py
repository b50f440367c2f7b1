"""`SITE except …`: sites that a rule leaves out, against reference writes to the other sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full
from mechdsl.diagnostics.rules import BadException
from mechdsl.execute.run_record import ExecutionProfile
from mechdsl.pipeline.options import RunOptions
from mechdsl.resolve.cells import Coord
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.vocab.metrics import EFFECTS

from ..execute.support import MODES, by_name, run_on, shared
from ..quick import in_turn
from ..reference.forward import Changes, Write
from .models import bare
from .support import (
    BLOCKS,
    DIFFERENCE,
    agree,
    codes,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    tokens,
    try_file,
    unpatched,
    worked_out,
)
from .test_feature_circuits import write_dictionaries
from .test_joint_paths import cells as values_of

HERE = ("gpt2", "llama", "gpt_neox", "gemma2")
LAYERS, HEADS = range(3), range(4)
FAITHFUL = f"{DIFFERENCE.rpartition(' as ')[0]} as faithfulness"
GROUPS = "group circuit = L0H1, L2H0, L1H3\ngroup few = L0H1, L2H0, L1H3, mlp_out layer 1\n"
SOURCE = "from other into clean  "
LAST = "last token"
SOURCE_AT = f"at {LAST} with other"


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def zeroed(
    n: int, points: Sequence[tuple[str, int, int | None]], at: str = "tokens *"
) -> list[Write]:
    return [
        Write(site, layer, zero, position, unit)
        for site, layer, unit in points
        for position in tokens(rows()[n], at)
    ]


def from_other(
    name: str,
    n: int,
    points: Sequence[tuple[str, int, int]],
    at: str = LAST,
    to: int | None = None,
) -> Iterator[Write]:
    source = rows("other")[n]
    for site, layer, unit in points:
        vector = plain(name, source)[site, layer][tokens(source, at)[-1], unit]
        yield Write(site, layer if to is None else to, vector, tokens(rows()[n], at)[-1], unit)


def heads(without: Sequence[tuple[int, int]], site: str = "z") -> list[tuple[str, int, int]]:
    return [
        (site, layer, head) for layer in LAYERS for head in HEADS if (layer, head) not in without
    ]


CIRCUIT = [(0, 1), (2, 0), (1, 3)]


@dataclass(frozen=True)
class Case:
    rule: str
    axes: tuple[str, ...]
    cells: Sequence[tuple[Coord, ...]]
    changes: Callable[..., Sequence[Write]]


CASES = {
    "a group": Case(
        "ablate layers * heads * except circuit at tokens * with zero",
        (),
        [()],
        lambda m, n: zeroed(n, heads(CIRCUIT)),
    ),
    "a group of other sites too": Case(
        "ablate layers * heads * except few at tokens * with zero  "
        "ablate mlp_out layers * except few at last token with zero",
        (),
        [()],
        lambda m, n: [
            *zeroed(n, heads(CIRCUIT)),
            *zeroed(n, [("mlp_out", 0, 0), ("mlp_out", 2, 0)], LAST),
        ],
    ),
    "heads of another site": Case(
        f"{SOURCE}patch head_out layers * heads * except L0H1, L1H2 at {LAST}",
        (),
        [()],
        lambda m, n: list(from_other(m, n, heads([(0, 1), (1, 2)], "head_out"))),
    ),
    "a sweep with holes": Case(
        f"{SOURCE}patch layer 0..1 head * except circuit, layer 1 head 0 at {LAST}",
        ("layer", "head"),
        [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2)],
        lambda m, n, layer, head: list(from_other(m, n, [("z", layer, head)])),
    ),
    "numbers of the last axis": Case(
        f"{SOURCE}patch resid_post layer * except 1 at {LAST}",
        ("layer",),
        [(0,), (2,)],
        lambda m, n, layer: list(from_other(m, n, [("resid_post", layer, 0)])),
    ),
    "joined heads of swept layers": Case(
        "ablate z layer * heads * except 0..1, layer 2 head 3 at tokens * with zero",
        ("layer",),
        product(LAYERS),
        lambda m, n, layer: zeroed(
            n, [("z", layer, head) for head in (2, 3) if (layer, head) != (2, 3)]
        ),
    ),
    "a whole layer": Case(
        "ablate z layers * heads * except layer 1, L0H0 at tokens * with zero",
        (),
        [()],
        lambda m, n: zeroed(n, heads([(0, 0), *((1, head) for head in HEADS)])),
    ),
    "dimensions": Case(
        "ablate resid_post layer 1 dims 0..9 except 3, 5..6 at last token with zero",
        (),
        [()],
        lambda m, n: [Write("resid_post", 1, without([0, 1, 2, 4, 7, 8, 9]), rows()[n].last, 0)],
    ),
    "the layer of a loop": Case(
        "for l in [0, 2] { ablate layers * heads * except layer l, L1H1 at tokens * with zero }",
        ("l",),
        product((0, 2)),
        lambda m, n, own: zeroed(n, heads([(1, 1), *((own, head) for head in HEADS)])),
    ),
    "the number of a loop": Case(
        f"for l in 0..2 {{ patch resid_post layer * except l {SOURCE_AT} }}",
        ("l", "layer"),
        [(own, layer) for own in LAYERS for layer in LAYERS if own != layer],
        lambda m, n, own, layer: list(from_other(m, n, [("resid_post", layer, 0)])),
    ),
    "heads that a loop leaves out in its own layer": Case(
        "for l in 0..2 { ablate layer l heads * except 1, layer 2 at tokens * with zero }",
        ("l",),
        product((0, 1)),
        lambda m, n, own: zeroed(n, [("z", own, head) for head in (0, 2, 3)]),
    ),
    "dimensions of a loop": Case(
        "for k in 0..2 { ablate resid_post layer 1 dims 0..3 except k at last token with zero }",
        ("k",),
        product(range(3)),
        lambda m, n, k: [
            Write("resid_post", 1, without([d for d in range(4) if d != k]), rows()[n].last, 0)
        ],
    ),
    "written into another layer": Case(
        f"{SOURCE}patch layer 0..1 head 0..1 except L0H1 at {LAST} into layer 2",
        ("layer", "head"),
        [(0, 0), (1, 0), (1, 1)],
        lambda m, n, layer, head: list(from_other(m, n, [("z", layer, head)], to=2)),
    ),
    "swept dimensions": Case(
        "ablate resid_post layer 1 dim 0..3 except 1..2 at last token with zero",
        ("dim",),
        [(0,), (3,)],
        lambda m, n, dim: [Write("resid_post", 1, without([dim]), rows()[n].last, 0)],
    ),
}


def without(dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    def act(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., list(dims)] = 0
        return x

    return act


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), HERE))
def test_rules_with_except_equal_the_reference(family: str, mode: str, data: Path) -> None:
    names = {key: f"e{number}" for number, key in enumerate(CASES)}
    text = GROUPS + "".join(experiment(names[key], case.rule) for key, case in CASES.items())
    found = run_file(text, data, family, mode)
    for key, case in CASES.items():

        def changes(n: int, *cell: Coord, case: Case = case) -> list[Changes]:
            return [(case.changes(family, n, *cell), ())]

        expected = worked_out(family, case.cells, changes, rows(), records())
        try:
            agree(found[names[key]], case.axes, expected, unpatched(family), most=False, large=0.01)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def test_except_top_sites_of_an_experiment_ablates_the_rest(data: Path) -> None:
    """The faithfulness of a circuit: everything else is ablated."""
    first = experiment("ranked", "ablate layer * head * at tokens * with zero")
    rule = "ablate layers * heads * except top 3 of ranked, L2H2 at tokens * with zero"
    found = run_file(first + experiment("rest", rule), data, "llama", "planned")
    measure = found["ranked"].measures[0]
    means = (measure.patched - measure.base).mean(axis=1)
    best = np.argsort(-means)[:3]
    cells = [found["ranked"].cells[n].coords for n in best]
    kept = [(int(cell["layer"] or 0), int(cell["head"] or 0)) for cell in cells]

    def changes(n: int) -> list[Changes]:
        return [(zeroed(n, heads([*kept, (2, 2)])), ())]

    expected = worked_out("llama", [()], changes, rows(), records())
    agree(found["rest"], (), expected, unpatched("llama"), most=False)
    left = len({*kept, (2, 2)})
    said = "`layers * heads * except top 3 of ranked, L2H2`"
    assert found["rest"].conventions["except"] == f"{said}: {left} of 12 sites"


def kept_of(found: ExperimentResult, count: int) -> list[tuple[int, int]]:
    """Layer and head of the cells with the largest means."""
    means = (found.measures[0].patched - found.measures[0].base).mean(axis=1)
    cells = [found.cells[n].coords for n in np.argsort(-means)[:count]]
    return [(int(cell["layer"] or 0), int(cell["head"] or 0)) for cell in cells]


def test_except_top_n_in_loops_and_incomplete_sweeps_equals_the_reference(data: Path) -> None:
    """A ranked experiment that leaves out cells has fewer cells than the product of its axes."""
    zeros = "at tokens * with zero"
    first = experiment("ranked", f"ablate layer * head * {zeros}")
    first += experiment("holed", f"ablate layer * head * except circuit {zeros}")
    rules = {
        "loop": f"for k in [1, 2] {{ ablate layers * heads * except top k of ranked {zeros} }}",
        "holes": f"ablate layers * heads * except top 3 of holed {zeros}",
        "picked": f"ablate top 2 of holed {zeros}",
        "away": f"ablate layers 0..2 heads * except top 0 of ranked, L0H0 {zeros}",
    }
    text = GROUPS + first + "".join(experiment(name, rule) for name, rule in rules.items())
    found = run_file(text, data, "gpt2", "planned")
    assert len(found["holed"].cells) == 9
    ranked, holed = kept_of(found["ranked"], 2), kept_of(found["holed"], 3)
    assert not set(holed) & set(CIRCUIT)
    written = {
        "loop": {(1,): heads(ranked[:1]), (2,): heads(ranked)},
        "holes": {(): heads(holed)},
        "picked": {(): [("z", *each) for each in holed[:2]]},
        "away": {(): heads([(0, 0)])},
    }
    for name, cells in written.items():

        def changes(n: int, *cell: Coord, cells: Any = cells) -> list[Changes]:
            return [(zeroed(n, cells[cell]), ())]

        expected = worked_out("gpt2", list(cells), changes, rows(), records())
        axes = ("k",) if name == "loop" else ()
        agree(found[name], axes, expected, unpatched("gpt2"), most=False)
    assert found["loop"].conventions["except"].endswith(": 1 to 2 of 12 sites")


@pytest.mark.parametrize(("name", "mode"), in_turn(("gpt2", "llama"), list(MODES)))
def test_loop_cell_of_which_except_leaves_no_site_equals_the_base_run(
    data: Path, name: str, mode: str
) -> None:
    """Next to cells with sites, with a control, and with an effect of groups, whose circuit is then
    every site."""
    zeros = "at tokens * with zero"
    text = experiment("ranked", f"ablate layer * head * {zeros}")
    loop = f"for k in [1, 12] {{ ablate layers * heads * except top k of ranked {zeros} }}"
    text += experiment("plain", loop) + experiment("drawn", loop, "against random(2)")
    text += experiment("whole", loop, measure=FAITHFUL)
    found = run_file(text, data, name, mode, precise=True)
    best = kept_of(found["ranked"], 1)

    def changes(n: int, *cell: Coord) -> list[Changes]:
        return [(zeroed(n, heads(best) if cell == (1,) else []), ())]

    expected = worked_out(name, [(1,), (12,)], changes, rows(), records())
    for key in ("plain", "drawn", "whole"):
        each = found[key]
        assert [cell.coords["k"] for cell in each.cells] == [1, 12]
        assert each.cells[1].site == "nothing"
        own = each.measures[0].patched
        np.testing.assert_allclose(own[0], expected[(1,)], atol=1e-4)
        np.testing.assert_allclose(own[1], unpatched(name), atol=1e-6)
    own = found["whole"].measures[0]
    assert own.source is not None
    runs = (run.mean(1) for run in (own.patched, own.base, own.source))
    assert EFFECTS["faithfulness"].of_means(*runs)[1] == pytest.approx(1)
    if mode == "planned":
        assert found["plain"].conventions["inert"]


def test_sweep_names_loop_values_of_which_except_leaves_no_cell(data: Path) -> None:
    zeros = "at tokens * with zero"
    text = experiment("ranked", f"ablate layer 1 head * {zeros}")
    loop = f"for k in [1, 4] {{ ablate layer 1 head * except top k of ranked {zeros} }}"
    found = run_file(text + experiment("swept", loop), data, "llama", "planned")["swept"]
    assert {cell.coords["k"] for cell in found.cells} == {1}
    said = ": 1 to 4 of 4 sites, which leaves no site and no cell for k 4"
    assert found.conventions["except"].endswith(said)


def test_except_top_sites_removes_cells_only_after_ranking(data: Path) -> None:
    """Until the ranked experiment has run, its first cells are placeholders for the best ones."""
    first = experiment("ranked", "ablate layer * head * at tokens * with zero")
    lines = (
        "ablate layer 2 heads * except top 2 of ranked at tokens * with zero",
        "ablate layer 0 heads * except top 4 of ranked at tokens * with zero",
        "ablate layer 0 head * except top 4 of ranked at tokens * with zero",
    )
    text = first + "".join(experiment(f"e{n}", line) for n, line in enumerate(lines))
    found = run_file(text, data, "llama", "planned")
    best = kept_of(found["ranked"], 4)
    assert {layer for layer, _ in best} > {0}
    rest = [head for head in HEADS if (0, head) not in best]
    assert [cell.coords["head"] for cell in found["e2"].cells] == rest
    gone = len({each for each in best[:2] if each[0] == 2})
    assert found["e0"].conventions["except"].endswith(f": {gone} of 4 sites")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_except_head_skips_the_key_that_the_head_reads(family: str, data: Path) -> None:
    """In Llama, two heads share a key."""
    text = experiment("e", "ablate k layers * heads * except L0H0, L2H3 at last token with zero")
    found = run_file(text, data, family, "planned")["e"]
    gone = [(0, 0), (2, 3 if family == "gpt2" else 1)]
    own = range(4 if family == "gpt2" else 2)
    points = [("k", layer, unit) for layer in LAYERS for unit in own if (layer, unit) not in gone]

    def changes(n: int) -> list[Changes]:
        return [(zeroed(n, points, LAST), ())]

    expected = worked_out(family, [()], changes, rows(), records())
    agree(found, (), expected, unpatched(family), most=False, large=0.01)


def test_random_control_of_an_incomplete_sweep_covers_every_cell(data: Path) -> None:
    """Missing cells aren't counted as cells without a band."""
    text = GROUPS + experiment(
        "e", f"{SOURCE}patch layer * head * except circuit at {LAST}", "against random(2)"
    )
    found = run_file(text, data, "gpt2", "planned")["e"]
    band = found.control(0)
    assert band is not None
    assert band.draws.tolist() == [2] * 9
    assert "no band" not in found.conventions["controls"]


def test_sweep_with_except_runs_only_the_remaining_cells(data: Path) -> None:
    """Rows of excluded cells aren't run either."""
    profiles: list[ExecutionProfile] = []
    options = RunOptions(on_profile=lambda _, profile: profiles.append(profile))
    text = experiment("e", f"{SOURCE}patch layer * head * except circuit at {LAST}")
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{GROUPS}{text}'
    source = Source(whole, data / "file.mech")
    found = by_name(*run_on(source, {"m": shared(bare("gpt2"))}, options))["e"]
    assert sum(profile.rows for profile in profiles) == 9 * len(rows())
    cells = [(cell.coords["layer"], cell.coords["head"]) for cell in found.cells]
    assert cells == [(layer, head) for _, layer, head in heads(CIRCUIT)]


@pytest.mark.parametrize(
    ("call", "code"), [("eap(size: 3)", "E0342"), ("search(size: 3)", "E0203")]
)
def test_group_with_an_error_is_not_an_exception_without_effect(
    data: Path, call: str, code: str
) -> None:
    training = f"fit({call}, prompts: p, with: zero, minimise: logit(answer))"
    text = f"group g = {training} at layers * heads * at last token\n"
    rule = "ablate layers * heads * except g at tokens * with zero"
    assert codes(text + experiment("e", rule), data) == [code]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("patch layers 0..1 heads * except L2H0 at last token", "E0343"),
        ("patch layers * heads * except layers * heads * at last token", "E0343"),
        ("patch layer 1 head * except layer 1 at last token", "E0343"),
        ("patch resid_post layer 1 except 2 at last token", "E0343"),
        ("patch embed except 2 at last token", "E0343"),
        ("patch layers * heads * except nobody at last token", "E0203"),
        ("patch layers * heads * except L9H0 at last token", "E0302"),
        ("patch layers * heads * except layer * head 1 at last token", "E0343"),
        ("patch resid_post layer 1 dims 0..3 except 7 at last token", "E0343"),
        ("patch resid_post layer 1 dims 0..3 except 0..3 at last token", "E0343"),
        (
            "for k in 0..1 { ablate resid_post layer 1 dims 0..k except 0 at tokens * with zero }",
            "E0343",
        ),
        (
            "for k in 0..1 { ablate resid_post layer 1 dim 0..3 except k at tokens * with zero }",
            "E0343",
        ),
        (
            "for l in 0..2 { ablate layers 0..1 heads * except layer l at tokens * with zero }",
            "E0343",
        ),
        (
            "for s in [early, late] { ablate resid_post layer * except s at tokens * with zero }",
            "E0343",
        ),
        ("patch layers * heads * apart from L0H1 at last token", "E0101"),
        ("patch layers * heads * except at last token", "E0101"),
        ("patch layer 1 head 0 at last token against random(3) apart from L0H1", "E0101"),
    ],
)
def test_invalid_except_clauses_are_errors(line: str, code: str, data: Path) -> None:
    assert code in codes(experiment("e", SOURCE + line), data)


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        ("resid_post layer 0..1 except resid_post layer 2", "`except resid_post layer 0`"),
        ("mlp_hidden layer 1 neurons 2..5 except L1N9", "`except L1N2`"),
        ("q layer 1 heads * except L2H1", "`except L1H0`"),
        ("k layer 1 heads * except L2H1", "`except k layer 1 head 0`"),
        ("embed except resid_pre layer 0", "remove it: the rule has no further site to leave out"),
        ("layers * heads * except layers * heads *", "leave out fewer sites, or remove the rule"),
    ],
)
def test_exception_without_effect_suggests_a_site_of_the_rule(
    rule: str, hint: str, data: Path
) -> None:
    text = experiment("e", f"{SOURCE}patch {rule} at last token")
    result, diagnostics = try_file(text, data, "llama")
    assert result is None
    (found,) = [each for each in diagnostics if each.code == "E0343"]
    assert hint in render_full([found])


def test_basis_with_except_has_no_member_at_the_excluded_layer(data: Path) -> None:
    basis = "basis b = random(dims: 20) at resid_post layer * except 1\n"
    rule = f"{SOURCE}patch features * of b at {LAST}"
    found = run_file(basis + experiment("e", rule), data, "llama", "planned")["e"]
    assert [cell.coords["layer"] for cell in found.cells] == [0, 2]

    def changes(n: int, layer: int) -> list[Changes]:
        return [(list(from_other("llama", n, [("resid_post", layer, 0)])), ())]

    expected = worked_out("llama", [(0,), (2,)], changes, rows(), records())
    agree(found, ("layer",), expected, unpatched("llama"), most=False)
    of_layer = "ablate resid_post layer 1 in basis b at last token with zero"
    assert codes(basis + experiment("e", of_layer), data) == ["E0342"]


def values(text: str, data: Path) -> dict[str, np.ndarray]:
    found = run_file(text, data, "llama", "planned")
    return {name: each.measures[0].patched for name, each in found.items()}


def test_weight_rule_with_except_equals_separate_rules(data: Path) -> None:
    """Each remaining head has a cell, equal to a rule on this head alone."""
    rule = "scale weights of attn_out layer 1 {} by 0"
    text = experiment("swept", rule.format("head * except 1"))
    text += "".join(experiment(f"h{n}", rule.format(f"head {n}")) for n in (0, 2, 3))
    found = values(text, data)
    assert len(found["swept"]) == 3
    for own, head in zip(found["swept"], (0, 2, 3), strict=True):
        assert np.abs(own - found[f"h{head}"][0]).max() < 1e-6


def test_set_to_value_with_except_equals_separate_rules(data: Path) -> None:
    """Cells that `except` removes are absent for each value of the loop."""
    rule = "set z layer 1 head {} at last token to value(z layer {} head 0)"
    text = experiment("swept", f"for l in 0..1 {{ {rule.format('* except 2', 'l')} }}")
    text += "".join(
        experiment(f"l{layer}h{head}", rule.format(head, layer))
        for layer in (0, 1)
        for head in (0, 1, 3)
    )
    found = values(text, data)
    assert len(found["swept"]) == 6
    alone = [found[f"l{layer}h{head}"][0] for layer in (0, 1) for head in (0, 1, 3)]
    assert np.abs(found["swept"] - np.stack(alone)).max() < 1e-6


def test_integrated_gradients_with_except_equal_listed_heads(data: Path) -> None:
    """No two cells write the same vector."""
    lines = "using integrated_gradients(steps: 4)"
    text = "".join(
        experiment(name, f"ablate layer 1 head {heads} at last token with zero", lines)
        for name, heads in (("left", "* except 1"), ("listed", "0, 2, 3"))
    )
    found = values(text, data)
    assert found["left"].shape == found["listed"].shape
    assert np.abs(found["left"] - found["listed"]).max() < 1e-6


FEATURES = """group some = features 3, 5..6 of f
group others = features 3 of g
group partly = features 5, 11 of f
group outside = features 10, 11 of f
"""
NAME_OTHERS = "name coordinates that the rule writes, such as"


def with_dictionaries(data: Path, rule: str) -> str:
    write_dictionaries(data, "llama", "standard")
    text = 'basis f = sae("llama_standard/sae") at mlp_out layer 1\n'
    text += 'basis g = sae("llama_standard/sae") at mlp_out layer 2\n' + FEATURES
    return text + experiment("e", "from other into clean", f"{rule} at last token")


@pytest.mark.parametrize(
    "site",
    ["features * of f", "feature * of f", "mlp_out layer 1 features * of f", "features 3..9 of f"],
)
def test_excluded_group_of_features_equals_its_numbers(data: Path, site: str) -> None:
    found, wanted = (
        values_of(run_file(with_dictionaries(data, f"patch {site} except {given}"), data, "llama",
                       "planned")["e"])
        for given in ("some", "3, 5, 6")
    )  # fmt: skip
    np.testing.assert_array_equal(found, wanted)
    assert np.unique(wanted).size > 1


def test_features_of_an_excluded_group_outside_the_rule_are_ignored(data: Path) -> None:
    """A group is one exception, as it is for heads; features that are listed are several."""
    found, wanted = (
        values_of(run_file(with_dictionaries(data, f"patch features 3..7 of f except {given}"),
                       data, "llama", "planned")["e"])
        for given in ("partly", "5")
    )  # fmt: skip
    np.testing.assert_array_equal(found, wanted)
    for given in ("outside", "partly, outside", "5, 11"):
        text = with_dictionaries(data, f"patch features 3..7 of f except {given}")
        assert "E0343" in codes(text, data)


@pytest.mark.parametrize(
    ("rule", "fix"),
    [
        ("features 3..7 of f except 11", f"{NAME_OTHERS} `except 3`"),
        ("features 3..7 of f except outside", f"{NAME_OTHERS} `except 3`"),
        ("features 3..7 of f except 3, 11", f"{NAME_OTHERS} `except 4`"),
        (
            "features 3, 5 of f except 3, 11",
            "remove it: the rule has no further coordinate to leave out",
        ),
        ("features 3, 5 of f except 3, 5", "name fewer coordinates, such as `except 3`"),
        ("feature 3 of f except 3", "remove `except`, or add coordinates to the rule"),
    ],
)
def test_fixes_of_exceptions_name_coordinates_of_the_rule(data: Path, rule: str, fix: str) -> None:
    _, found = try_file(with_dictionaries(data, f"patch {rule}"), data, "llama")
    assert [each.hint for each in found if isinstance(each, BadException)] == [fix]


def test_excluded_group_of_features_of_another_basis_is_an_error(data: Path) -> None:
    text = with_dictionaries(data, "patch features * of f except others")
    assert codes(text, data) == ["E0207"]
