"""Faithfulness and completeness of groups that a training chooses, against plain passes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source
from mechdsl.fits.reports import MaskReport
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import context, shared
from ..reference.forward import Changes, Write
from ..rules.models import bare
from ..rules.support import Array, records, rows, tokens, worked_out
from .test_trained_coordinate_masks import FEATURES, SITE, sae, weights
from .test_trained_dictionaries import experiment, run, train, write
from .test_trained_masks import HEADS, fit
from .test_trained_rotations import checked

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
DIFFERENCE = "logit(answer) - logit(wrong)"
FAITHFUL = f"measure {DIFFERENCE} as faithfulness"
COMPLETE = f"measure {DIFFERENCE} as completeness"
LAST = "last token"
Point = tuple[str, int, int]
EVERY_HEAD: list[Point] = [("z", layer, head) for layer in range(3) for head in range(4)]


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def chosen(found: mechdsl.TrainedFit) -> list[str]:
    assert isinstance(found.report, MaskReport)
    return list(found.report.chosen)


def heads_of(found: mechdsl.TrainedFit) -> list[Point]:
    """`L1H2.z` → ("z", 1, 2)."""
    names = [name.removesuffix(".z").removeprefix("L").split("H") for name in chosen(found)]
    return [("z", int(layer), int(head)) for layer, head in names]


def less(points: Sequence[Point], without: Sequence[Point]) -> list[Point]:
    return [each for each in points if each not in without]


def zeroed(points: Sequence[Point], at: str) -> Callable[[int], list[Write]]:
    def changes(n: int) -> list[Write]:
        text = rows("second")[n]
        return [
            Write(site, layer, zero, position, unit)
            for site, layer, unit in points
            for position in tokens(text, at)
        ]

    return changes


def check(
    name: str,
    found: ExperimentResult,
    patched: Sequence[Callable[[int], list[Write]]],
    everything: Sequence[Callable[[int], list[Write]]],
) -> None:
    """Compare the runs of each cell, and the effect where it has a value."""

    def values(cells: Sequence[Callable[[int], list[Write]]]) -> Array:
        def changes(n: int, cell: int) -> list[Changes]:
            return [(cells[cell](n), ())]

        keys = [(number,) for number in range(len(cells))]
        every = worked_out(name, keys, changes, rows("second"), records("second"))
        return np.array(list(every.values()))

    own, data = values(patched), found.measures[0]
    empty, base = values(everything), values([lambda _: []])
    assert data.source is not None
    assert np.abs(own - empty).max() > 1e-3
    np.testing.assert_allclose(data.patched, own, atol=1e-4)
    np.testing.assert_allclose(data.source, np.broadcast_to(empty, data.source.shape), atol=1e-4)
    np.testing.assert_allclose(data.base, np.broadcast_to(base, data.base.shape), atol=1e-4)
    share = (own.mean(1) - empty.mean(1)) / (base.mean(1) - empty.mean(1))
    printed = found.statistics[0].mean
    there = ~np.isnan(printed)  # four rows may not distinguish a denominator from 0
    np.testing.assert_allclose(printed[there], share[there], rtol=1e-3)


def trained(
    path: Path, family: str
) -> tuple[dict[str, mechdsl.TrainedFit], dict[str, ExperimentResult]]:
    fits = {each.basis: each for each in train(path, family)}
    found = run(path, family).files[0]
    assert not found.lost
    return fits, {each.name: each for each in found.experiments}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_groups_of_sites_equal_plain_passes(family: str, tmp_path: Path) -> None:
    """With two groups in a `for`, other tokens than those of the training, and MLPs."""
    text = [
        fit(mask="size: 3"),
        fit(mask="size: 2", name="h", options="steps: 6, batch: 2, rate: 0.3, seed: 5"),
        fit(mask="size: 1", name="mlps", at="mlp_out layers * at last token"),
        experiment(f"ablate {HEADS} except g at tokens * with zero", measure=FAITHFUL),
        experiment("ablate g at last token with zero", name="whole", measure=COMPLETE),
        experiment(
            "for x in [g, h] { ablate x at last token with zero }", name="loop", measure=COMPLETE
        ),
        experiment(
            f"for x in [g, h] {{ ablate {HEADS} except x at last token with zero }}",
            name="kept",
            measure=FAITHFUL,
        ),
        experiment(
            f"ablate {HEADS} except g at tokens * with zero",
            "ablate mlp_out layers * except mlps at tokens * with zero",
            name="both",
            measure=FAITHFUL,
        ),
        experiment("ablate mlps at tokens * with zero", name="mlp", measure=COMPLETE),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    g, h = heads_of(fits["g"]), heads_of(fits["h"])
    assert (len(g), len(h)) == (3, 2)
    (name,) = chosen(fits["mlps"])
    mlps: list[Point] = [("mlp_out", layer, 0) for layer in range(3)]
    mlp: list[Point] = [("mlp_out", int(name[1]), 0)]
    every, last = "tokens *", zeroed(EVERY_HEAD, LAST)
    check(family, found["e"], [zeroed(less(EVERY_HEAD, g), every)], [zeroed(EVERY_HEAD, every)])
    check(family, found["whole"], [zeroed(g, LAST)], [last])
    check(family, found["loop"], [zeroed(g, LAST), zeroed(h, LAST)], [last])
    kept = [zeroed(less(EVERY_HEAD, each), LAST) for each in (g, h)]
    check(family, found["kept"], kept, [last])
    both = zeroed([*less(EVERY_HEAD, g), *less(mlps, mlp)], every)
    check(family, found["both"], [both], [zeroed([*EVERY_HEAD, *mlps], every)])
    check(family, found["mlp"], [zeroed(mlp, every)], [zeroed(mlps, every)])
    assert "random groups, 8 draws" in found["e"].conventions["controls"]
    assert "of 3 of 12 sites, drawn from those that ∅" in found["e"].conventions["controls"]
    said = "`ablate g at last token with zero` ablates 12 sites instead of 3; in the same rows"
    assert found["whole"].conventions["∅"] == said


def removed(numbers: Sequence[int], at: str) -> Callable[[int], list[Write]]:
    """The writes of a prompt whose features with these numbers are 0."""

    def remove(x: Tensor) -> Tensor:
        own = {key: each.to(x) for key, each in weights(x.shape[-1]).items()}
        active = ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]).clamp(min=0)
        return x - active[..., list(numbers)] @ own["W_dec"][list(numbers)]

    def changes(n: int) -> list[Write]:
        return [Write("resid_post", 1, remove, at_, 0) for at_ in tokens(rows("second")[n], at)]

    return changes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_of_features_equal_plain_passes(family: str, tmp_path: Path) -> None:
    rule = "features * of f except g at tokens * with zero"
    text = [
        sae(tmp_path, family),
        fit(mask="size: 3", at="features * of f at last token"),
        experiment(f"ablate {rule}", measure=FAITHFUL),
        experiment("ablate g at last token with zero", name="whole", measure=COMPLETE),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    g = [int(name.split()[1]) for name in chosen(fits["g"])]
    rest = [n for n in range(FEATURES) if n not in g]
    check(family, found["e"], [removed(rest, "tokens *")], [removed(range(FEATURES), "tokens *")])
    check(family, found["whole"], [removed(g, LAST)], [removed(range(FEATURES), LAST)])
    said = f"`ablate {rule}` ablates 9 features instead of 6; in the same rows; what `f` doesn't "
    assert found["e"].conventions["∅"] == f"{said}represent stays"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_groups_of_dimensions_and_positions_equal_plain_passes(family: str, tmp_path: Path) -> None:
    places = "first token, token 2, last token"
    text = [
        fit(mask="size: 5", at=f"{SITE} dims 0..9 at last token"),
        experiment(f"ablate {SITE} dims 0..9 except g at last token with zero", measure=FAITHFUL),
        experiment("ablate g at last token with zero", name="whole", measure=COMPLETE),
        fit(mask="size: 1", name="places", source="with: zero", at=f"{SITE} at {places}"),
        experiment(
            f"ablate {SITE} at places tokens with zero",
            name="some",
            measure=COMPLETE,
        ),
        experiment(
            f"ablate {SITE} at tokens except places tokens with zero",
            name="kept",
            measure=FAITHFUL,
        ),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    g = [int(name.split()[2]) for name in chosen(fits["g"])]

    def without(dims: Sequence[int]) -> Callable[[int], list[Write]]:
        def change(x: Tensor) -> Tensor:
            own = x.clone()
            own[..., list(dims)] = 0
            return own

        return lambda n: [Write("resid_post", 1, change, rows("second")[n].last, 0)]

    rest = [n for n in range(10) if n not in g]
    check(family, found["e"], [without(rest)], [without(range(10))])
    check(family, found["whole"], [without(g)], [without(range(10))])
    (place,) = chosen(fits["places"])
    own, whole = zeroed([("resid_post", 1, 0)], place), f"{{{places}}}"
    check(family, found["some"], [own], [zeroed([("resid_post", 1, 0)], whole)])
    every = zeroed([("resid_post", 1, 0)], "tokens between first token and last token")
    left = zeroed([("resid_post", 1, 0)], f"tokens except {place}")
    check(family, found["kept"], [left], [every])


def test_random_groups_of_features_are_those_that_the_training_could_choose(
    tmp_path: Path,
) -> None:
    """Features that no training row changes aren't drawn; before the training, the control has the
    rows of the rule itself."""
    basis = sae(tmp_path)
    width = bare("llama").config.hidden_size
    tensors = {name: each.clone() for name, each in weights(width).items()}
    tensors["b_enc"] += 30
    tensors["b_enc"][[0, 1, 2, 5]] = -100  # never active
    save_file(tensors, tmp_path / "sae.safetensors")
    rule = "ablate features * of f except g at tokens * with zero"
    text = [
        basis,
        fit(mask="size: 2", at="features * of f at last token"),
        experiment(rule, measure=FAITHFUL),
        experiment("ablate g at last token with zero", name="whole", measure=COMPLETE),
        experiment(rule, "against random(12)", name="asked", measure=FAITHFUL),
    ]
    path = write(tmp_path, *text)
    (first, *_) = checked(path, bare("llama")).experiments
    assert first.control is not None
    assert first.control.draws == 8
    assert first.control.experiment.rules[0].basis == first.rules[0].basis
    _, found = trained(path, "llama")
    for name, count in (("e", 8), ("whole", 8), ("asked", comb(5, 2) - 1)):
        said = found[name].conventions["controls"]
        assert f"random groups, {count} draws" in said
        assert "of 2 of 5 features, drawn from those that ∅ ablates and the training could" in said
    again = run(path).files[0].experiments
    for one in again:
        np.testing.assert_array_equal(one.measures[0].source, found[one.name].measures[0].source)


def test_group_of_each_seed_is_compared_with_all_candidates(tmp_path: Path) -> None:
    text = [
        fit(mask="size: 3", options="steps: 6, batch: 2, rate: 0.3, validation: 25%, seeds: 2"),
        experiment("ablate g at last token with zero", measure=COMPLETE),
        experiment(f"ablate {HEADS} except g at last token with zero", name="k", measure=FAITHFUL),
    ]
    fits, found = trained(write(tmp_path, *text), "llama")
    groups = [heads_of(each) for each in fits.values()]
    assert len(groups) == 2
    every = [zeroed(EVERY_HEAD, LAST)]
    check("llama", found["e"], [zeroed(g, LAST) for g in groups], every)
    check("llama", found["k"], [zeroed(less(EVERY_HEAD, g), LAST) for g in groups], every)


def ranked(found: mechdsl.TrainedFit, names: Sequence[str]) -> list[str]:
    """Names of candidates, those with the largest probabilities first."""
    stored = json.loads((found.folder / "mask.json").read_text("utf-8"))
    order = np.argsort(-np.array(stored["probabilities"]), kind="stable")
    own = [str(names[int(n)]) for n in order]
    return [name for name in own if name in chosen(found)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_curve_over_the_size_of_a_group_equals_plain_passes(family: str, tmp_path: Path) -> None:
    """`top n of g` are the sites with the largest probabilities, also of no site."""
    loop = "for n in [0, 1, 3] {{ ablate {} at last token with zero }}"
    text = [
        fit(mask="size: 4"),
        experiment(
            loop.format(f"{HEADS} except top n of g"),
            "against random(5)",
            measure=f"{FAITHFUL}  expect cmd(faithfulness, n) < 1000 on mean",
        ),
        experiment(loop.format("top n of g"), name="whole", measure=COMPLETE),
        experiment("ablate top 50% of g at last token with zero", name="half", measure=COMPLETE),
    ]
    fits, found = trained(write(tmp_path, *text), family)
    names = [f"L{layer}H{head}.z" for _, layer, head in EVERY_HEAD]
    best = [EVERY_HEAD[names.index(name)] for name in ranked(fits["g"], names)]
    assert len(best) == 4
    every = [zeroed(EVERY_HEAD, LAST)]
    check(family, found["e"], [zeroed(less(EVERY_HEAD, best[:n]), LAST) for n in (0, 1, 3)], every)
    check(family, found["whole"], [zeroed(best[:n], LAST) for n in (0, 1, 3)], every)
    check(family, found["half"], [zeroed(best[:2], LAST)], every)
    said = found["e"].conventions["controls"]
    assert "of 0 to 3 of 12 sites, drawn" in said
    assert said.endswith("where there is no other group, each draw is the group itself")


def test_curve_over_the_number_of_features_equals_plain_passes(tmp_path: Path) -> None:
    loop = "for n in 0..3 { ablate features * of f except top n of g at last token with zero }"
    text = [
        sae(tmp_path),
        fit(mask="size: 3", at="features * of f at last token"),
        experiment(loop, measure=FAITHFUL),
    ]
    path = write(tmp_path, *text)
    fits, found = trained(path, "llama")
    best = [
        int(name.split()[1])
        for name in ranked(fits["g"], [f"feature {n} of f" for n in range(FEATURES)])
    ]
    kept = [[n for n in range(FEATURES) if n not in best[:k]] for k in range(4)]
    check(
        "llama", found["e"], [removed(own, LAST) for own in kept], [removed(range(FEATURES), LAST)]
    )


FAILING = {
    "too many": ("ablate layers * heads * except top 4 of g at last token with zero", "E0620"),
    "too many features": (
        "ablate features * of f except top 3 of h at last token with zero",
        "E0620",
    ),
    "features alone": ("ablate top 1 of h at last token with zero", "E0207"),
    "features of another basis": (
        "ablate features * of k except top 1 of h at last token with zero",
        "E0207",
    ),
    "positions": ("ablate top 1 of places at last token with zero", "E0201"),
    "tokens": (f"ablate {SITE} at tokens except top 1 of g tokens with zero", "E0201"),
    "listed": ("ablate layers * heads * except top 1 of listed at last token with zero", "E0201"),
    "exclusion of a control": (
        "ablate layer 1 head * at last token with zero  against random(2) except top 1 of g",
        "E0201",
    ),
}


@pytest.mark.parametrize("key", FAILING)
def test_top_of_a_group_is_an_error_where_it_selects_no_sites(key: str, tmp_path: Path) -> None:
    rule, code = FAILING[key]
    text = [
        sae(tmp_path),
        sae(tmp_path).replace("basis f", "basis k"),
        "group listed = L0H1, L1H2\n",
        fit(mask="size: 3"),
        fit(mask="size: 2", name="h", at="features * of f at last token"),
        fit(
            mask="size: 1", name="places", source="with: zero", at=f"{SITE} at token 2, last token"
        ),
        experiment(rule),
    ]
    source = Source(write(tmp_path, *text).read_text("utf-8"), tmp_path / "file.mech")
    own = context(source, "m", shared(bare("llama")))
    found = check_source(source, models={"m": own}).diagnostics
    assert code in [each.code for each in found if each.severity == "error"]
