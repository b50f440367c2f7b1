"""`against random(n, subspaces)`: random subspaces of equal dimension at the same sites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mechdsl
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckedFile, check_source
from mechdsl.execute.vectors import compute_system
from mechdsl.forward.hooks.coordinates import LinearBasis
from mechdsl.resolve.types import BasisTargets

from .test_controls import START, control

BASES = """
basis numbers = pca(fruit, dims: 3, limit: 30) at resid_post layer 2 at last token
basis chance = random(dims: 3) at resid_post layer 2
basis layers_of = random(dims: 2) at resid_post layer *
"""
MEASURE = "from clean into fewer\n  measure logit(answer) as delta"
PATCH = "patch resid_post layer 2 in basis numbers at last token"


def text_of(*lines: str, name: str = "e", bases: str = BASES) -> str:
    body = "\n  ".join(("prompts fruit limit 12", MEASURE, *lines))
    return f"{START}{bases}\nexperiment {name} {{\n  {body}\n}}\n"


def check(*lines: str, bases: str = BASES) -> CheckedFile:
    return check_source(Source(text_of(*lines, bases=bases)))


def drawn(found: CheckedFile) -> BasisTargets:
    basis = control("e", found).experiment.rules[0].basis
    assert basis is not None
    return basis


def nothing() -> torch.Tensor:
    return torch.zeros(0)


def directions(basis: BasisTargets, number: int) -> torch.Tensor:
    (member,) = basis.bases[number].values()
    system = compute_system(member, nothing, nothing)
    assert isinstance(system, LinearBasis)
    return system.directions


@pytest.mark.parametrize(
    ("line", "size"),
    [(PATCH, 3), ("patch features 0, 2 of numbers at last token", 2)],
)
def test_band_of_random_subspaces_equals_explicit_experiments(
    line: str, size: int, tmp_path: Path
) -> None:
    draws = 5
    basis = drawn(check(line, f"against random({draws})"))
    made = [directions(basis, number) for number in range(draws)]
    for own in made:
        assert own.shape[0] == size
        torch.testing.assert_close(own @ own.T, torch.eye(size).double())
    tensors = {f"d{n}": own.contiguous() for n, own in enumerate(made)}
    save_file(tensors, tmp_path / "draws.safetensors")
    names = [f"s{n}" for n in range(draws)]
    saved = "".join(
        f'basis {name} = saved("draws.safetensors", "d{n}") at resid_post layer 2\n'
        for n, name in enumerate(names)
    )
    loop = f"for s in [{', '.join(names)}] {{ patch resid_post layer 2 in basis s at last token }}"
    path = tmp_path / "explicit.mech"
    path.write_text(text_of(loop, bases=saved), encoding="utf-8")
    expected = np.asarray(mechdsl.run(path)["e"].statistics[0].mean)
    result = mechdsl.run(text_of(line, f"against random({draws})"))["e"]
    band = result.control(0)
    assert band is not None
    assert band.what == "random subspaces"
    found = [band.low[0], band.high[0], band.mean[0]]
    wanted = [expected.min(), expected.max(), expected.mean()]
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    own = float(result.statistics[0].mean[0])
    as_large = int((np.abs(expected) >= abs(own)).sum())
    assert band.p[0] == pytest.approx((1 + as_large) / (1 + draws))
    said = "random subspaces, 5 draws, seed 3; of as many dimensions, drawn uniformly"
    assert result.conventions["controls"].startswith(said)


def test_random_subspaces_have_the_size_of_each_cell() -> None:
    """Each feature has one dimension; cells with equal features share their draws."""
    swept = drawn(check("patch feature 0..2 of chance at last token", "against random(4)"))
    assert len(swept.bases) == 12
    assert {member.size for member in swept.members} == {1}
    first = [directions(swept, number) for number in range(12)]
    assert len({tuple(own.flatten().tolist()) for own in first}) == 12
    again = drawn(
        check(
            "for c in [1, 3] { scale feature 0 of chance at last token by c }", "against random(4)"
        )
    )
    assert len(again.bases) == 4
    torch.testing.assert_close(directions(again, 1), first[3])


def test_each_layer_has_separate_random_subspaces() -> None:
    rule = "patch resid_post layer * in basis layers_of at last token"
    basis = drawn(check(rule, "against random(2)"))
    assert len(basis.bases) == 2
    found: set[tuple[float, ...]] = set()
    for member in basis.members:
        system = compute_system(member, nothing, nothing)
        assert isinstance(system, LinearBasis)
        found.add(tuple(system.directions.flatten().tolist()))
    assert len(found) == len(basis.members) == 8


def test_each_basis_of_a_loop_has_separate_random_subspaces() -> None:
    loop = "for b in [numbers, chance] { patch resid_post layer 2 in basis b at last token }"
    basis = drawn(check(loop, "against random(2)"))
    found = {tuple(directions(basis, number).flatten().tolist()) for number in range(4)}
    assert len(found) == len(basis.bases) == 4


def test_random_subspaces_do_not_depend_on_basis_names() -> None:
    other = BASES.replace("numbers", "others").replace("basis chance", "basis first")
    one = drawn(check(PATCH, "against random(2)"))
    two = drawn(check(PATCH.replace("numbers", "others"), "against random(2)", bases=other))
    torch.testing.assert_close(directions(one, 1), directions(two, 1))


def test_each_basis_of_a_loop_is_compared_with_its_subspaces() -> None:
    """Principal components have a larger effect than random subspaces; a random basis doesn't."""
    loop = "for b in [numbers, chance] { patch resid_post layer 2 in basis b at last token }"
    result = mechdsl.run(text_of(loop, "against random(9, subspaces)"))["e"]
    band = result.control(0)
    assert band is not None
    own = np.abs(np.asarray(result.statistics[0].mean))
    assert band.p[0] == pytest.approx(0.1)
    assert own[0] > 3 * own[1]
    assert band.p[1] > 0.1


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ((PATCH, "against random(9, heads)"), "sites of rules in a basis aren't drawn"),
        ((PATCH, "against random(9) except L0H1"), "subspaces are drawn, and sites don't change"),
        (
            (
                "ablate resid_post layer 2 in basis numbers at last token with zero",
                "against random(9)",
            ),
            "depends on its directions' lengths and centre",
        ),
        (
            ("add 2 to feature 0 of numbers at last token", "against random(9)"),
            "depends on its directions' lengths and centre",
        ),
        (
            (
                "set resid_post layer 2 at last token to reconstruction of chance",
                "against random(9)",
            ),
            "depends on its directions' lengths and centre",
        ),
        (
            ("patch resid_post layer 2 in basis whole at last token", "against random(9)"),
            "spans all 128 numbers of a vector",
        ),
        (("patch L0H1 at last token", "against random(9, subspaces)"), "has subspaces"),
    ],
)
def test_control_without_random_subspaces_is_rejected(lines: tuple[str, ...], reason: str) -> None:
    bases = f"{BASES}basis whole = random(dims: 128) at resid_post layer 2\n"
    found = [each for each in check(*lines, bases=bases).diagnostics if each.code == "E0630"]
    assert len(found) == 1
    assert reason in found[0].message


@pytest.mark.parametrize(
    "line",
    [
        "add 2 to feature 0 of chance at last token",
        "clamp features 0..1 of chance at last token to 4",
        "ablate resid_post layer 2 in basis chance at last token with zero",
        "ablate resid_post layer 2 in basis numbers at last token with mean",
        "patch resid_post layer 2 dims 0..7 at last token",
    ],
)
def test_rule_that_depends_only_on_the_span_has_random_subspaces(line: str) -> None:
    assert drawn(check(line, "against random(2)")).members
