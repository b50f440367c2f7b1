"""Mixtures of Gaussians that a file declares with `fit(mixture(…))`.

Their table and the effect of rules, against plain hooks and SciPy, one unpadded prompt at a time;
their keys and errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.fits.factors import RIDGE
from mechdsl.pipeline.trained_files import fits_of_file

from ..quick import in_turn
from ..rules.support import rows
from .test_trained_components import HERE, check_keys, check_rules, vectors, weights
from .test_trained_dictionaries import checked, experiment, fit, models, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
COUNT = 3
MIXTURE = f"mixture(components: {COUNT})"
AT = "resid_post layer 1 at tokens *"
ABLATES = experiment("ablate feature 0..2 of f at last token with zero")


def declare(
    inner: str = MIXTURE, options: str = "steps: 40", at: str = AT, prompts: str = "p"
) -> str:
    return fit(inner, options, at, prompts)


def log_densities(x: Any, own: dict[str, Any]) -> Any:
    """[vector, component] log(w N(x)), from the tensors of a file."""
    found = []
    for mean, p, weight in zip(own["W_dec"], own["precision"], own["log_weights"], strict=True):
        factor = p if np.ndim(p) == 2 else np.diag(np.broadcast_to(p, len(mean)))
        covariance = np.linalg.inv(factor @ factor.T)
        normal = multivariate_normal(own["b_dec"] + mean, covariance, allow_singular=True)
        found.append(weight + np.atleast_1d(normal.logpdf(x)))
    return np.stack(found, axis=1)


def encode(x: Any, own: dict[str, Any]) -> Any:
    found = log_densities(x, own)
    return np.exp(found - logsumexp(found, axis=1, keepdims=True))


@pytest.mark.parametrize(("family", "covariance"), in_turn(HERE, ["diag", "full", "spherical"]))
def test_mixture_report_equals_hooks_and_scipy(
    family: str, covariance: str, tmp_path: Path
) -> None:
    inner = f'mixture(components: {COUNT}, covariance: "{covariance}")'
    path = write(tmp_path, declare(inner), ABLATES)
    (found,) = train(path, family)
    (declared,) = fits_of_file(checked(path, family)).values()
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    by_row = [vectors(family, rows("clean")[n], "resid_post") for n in table.row_ids]
    trained = np.concatenate([by_row[n] for n in order[1:]]).astype(np.float64)
    held_out, own = by_row[order[0]].astype(np.float64), weights(found)
    np.testing.assert_allclose(own["b_dec"], trained.mean(0), atol=1e-4)
    report: Any = found.report
    assert (report.rows, report.held_out_rows) == (3, 1)
    assert (report.vectors, report.held_out_vectors) == (len(trained), len(held_out))
    found_densities = log_densities(held_out, own)
    likelihood = logsumexp(found_densities, axis=1).mean()
    assert report.log_likelihood == pytest.approx(likelihood, rel=1e-3, abs=1e-2)
    spread = np.cov(trained.T, bias=True)
    width = len(spread)
    if covariance != "full":
        spread = np.diag(np.diag(spread))
    if covariance == "spherical":
        spread = np.eye(width) * np.diag(spread).mean()
    spread = spread + RIDGE * trained.var(axis=0).mean() * np.eye(width)
    single = multivariate_normal(trained.mean(0), spread).logpdf(held_out).mean()
    assert report.single == pytest.approx(single, rel=1e-3, abs=1e-2)
    assert report.empty == COUNT - len(set(found_densities.argmax(1)))
    assert np.exp(own["log_weights"]).sum() == pytest.approx(1, abs=1e-5)
    assert (np.diff(own["log_weights"]) <= 0).all()


def test_mixture_control_equals_a_training_without_steps(tmp_path: Path) -> None:
    both = declare() + declare(options="steps: 0").replace("basis f", "basis chance")
    loop = experiment(
        "for b in [f, chance] { set resid_post layer 1 at tokens * to reconstruction of b }"
    )
    own, chance = train(write(tmp_path, both, loop))
    assert own.report.steps > chance.report.steps == 0
    assert own.report.untrained == chance.report.log_likelihood
    assert own.report.single == chance.report.single
    assert own.report.log_likelihood > chance.report.log_likelihood


def test_mixture_with_several_seeds_equals_single_trainings(tmp_path: Path) -> None:
    (both,) = run(write(tmp_path, declare(options="steps: 40, seeds: 2"), ABLATES), fit=True)
    alone = [
        run(write(tmp_path, declare(options=f"steps: 40, seed: {seed}"), ABLATES), fit=True)["e"]
        for seed in (0, 1)
    ]
    assert {cell.coords["seed"] for cell in both.cells} == {0, 1}
    for seed, own in enumerate(alone):
        cells = [cell.coords["seed"] == seed for cell in both.cells]
        np.testing.assert_allclose(
            both.measures[0].patched[cells], own.measures[0].patched, atol=1e-5
        )
    assert both.seed_means


RULES = {
    "ablate": "ablate feature 0..2 of f at last token with zero",
    "mean": "ablate feature 0..2 of f at last token with mean",
    "patch": "patch feature 0..2 of f at last token",
    "add": "for c in [0, 1, 2] { add c to feature 1 of f at last token }",
    "reconstruction": "set resid_post layer 1 at last token to reconstruction of f",
}


@pytest.mark.parametrize(("family", "rule"), in_turn(HERE, [*RULES]))
def test_mixture_rules_equal_hooks(family: str, rule: str, tmp_path: Path) -> None:
    check_rules(declare(), RULES, rule, family, tmp_path, encode, [1])


# --- sizes, options and keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "options", "code", "text"),
    [
        (MIXTURE, "rate: 0.1", "E0207", "remove `rate`"),
        (MIXTURE, "maximise: logit(answer)", "E0207", "which learns from vectors"),
        ("mixture", "steps: 3", "E0207", "needs `components: …`"),
        ("mixture(n_components: 6)", "steps: 3", "E0207", "write `components: …`"),
        ("mixture(clusters: 6)", "steps: 3", "E0207", "write `components: …`"),
        ("mixture(components: 0)", "steps: 3", "E0342", "whole number from 1 on"),
        ('mixture(components: 3, covariance: "tied")', "steps: 3", "E0342", '"spherical"'),
        ('mixture(components: 3, covariance_type: "diag")', "steps: 3", "E0207", "`covariance: "),
        ("gmm(components: 6)", "steps: 3", "E0203", "write `mixture(components: 8)`"),
    ],
)
def test_invalid_mixture_argument_is_rejected(
    inner: str, options: str, code: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(inner, options), ABLATES)
    (problem, *_) = mechdsl.validate(path, models("llama"))
    assert problem.code == code
    assert text in str(problem)


@pytest.mark.parametrize("observed", ["ov(f) layer 1 head 0", "qk(f) layer 1 head 0"])
def test_weight_maps_of_a_mixture_are_rejected(observed: str, tmp_path: Path) -> None:
    text = experiment(f"observe {observed} as moved").replace("  measure", "  # measure")
    path = write(tmp_path, declare(at="resid_pre layer 1 at tokens *"), text)
    problems = mechdsl.validate(path, models("llama"))
    assert any("probabilities" in str(problem) for problem in problems), problems


def test_mixture_with_too_few_vectors_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, declare("mixture(components: 9)", at=f"{AT[:-8]}last token"), ABLATES)
    with pytest.raises(mechdsl.MechdslError, match="9 components of 3 different vectors") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0643"
    assert "`mixture(components: 3)`" in str(found.value)


CHANGES = {
    "components": {"inner": "mixture(components: 2)"},
    "covariance": {"inner": f'mixture(components: {COUNT}, covariance: "spherical")'},
    "steps": {"options": "steps: 0"},
    "seed": {"options": "steps: 40, seed: 1"},
    "validation": {"options": "steps: 40, validation: 50%"},
    "layer": {"at": "resid_post layer 0 at tokens *"},
    "tokens": {"at": "resid_post layer 1 at tokens 0..-2"},
    "run": {"prompts": "other of p"},
}


def test_mixture_key_depends_on_every_argument(tmp_path: Path) -> None:
    check_keys(tmp_path, declare, CHANGES, ABLATES.replace("0..2", "0..1"))


def test_mixture_card_has_controls_and_its_copy_gives_the_same_values(tmp_path: Path) -> None:
    path = write(tmp_path, declare(), ABLATES)
    (found,) = train(path, out=tmp_path / "out")
    folder = tmp_path / "out" / "f"
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("# f: Gaussian mixture")
    assert f"The same for one Gaussian: {found.report.single:.4f}" in card
    copy = 'basis f = sae("out/f") at resid_post layer 1\n'
    (own,) = run(path).files[0].experiments
    (other,) = run(write(tmp_path, copy, ABLATES)).files[0].experiments
    np.testing.assert_allclose(own.measures[0].patched, other.measures[0].patched, atol=1e-5)
    assert json.loads((folder / "cfg.json").read_text("utf-8"))["architecture"] == "mixture"
    tensors = load_file(folder / "sae_weights.safetensors")
    for shape in ((COUNT, 2), (COUNT, 2, 2, 2), (1,)):
        save_file({**tensors, "precision": torch.ones(shape)}, folder / "sae_weights.safetensors")
        problem = mechdsl.validate(write(tmp_path, copy, ABLATES), models("llama"))[0]
        assert problem.code == "E0342"
        assert "`precision` of `out/f` has the shape" in str(problem)
