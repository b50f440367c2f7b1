"""Probes in vision encoders, against scikit-learn on vectors that plain hooks read in the encoder
of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.fits.reports import ProbeReport
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data
from ..images import prompts_of_images as vlm
from ..quick import some
from ..reference.r_squared import r_squared_contributions
from . import test_vision_encoder as plain
from .support import MEASURE, experiment, write_data
from .test_families import ALL, BLOCK, bare, difference, inputs, run_text
from .test_token_patches import TOWERS, edited, state

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

NAMES = (
    "llava_class",
    "paligemma",
    "llava_next",
    "qwen2_5_vl",
    "gemma3",
    "smolvlm",
    "internvl",
    "idefics2_wide",
)
QUICK = ("paligemma", "qwen2_5_vl")
TWICE = BLOCK.replace("  words =", '  more in ["w1", "w3"]\n  words =').replace(
    "w3 w2 {photo}", "w3 {more} {photo}"
)
"""Two prompts for each image, with different texts before it."""
Q = np.array([1.0, 2.0, 3.0, 4.0])
"""The value `n` of the prompts."""


def vectors(name: str, n: int, layer: int, cell: tuple[int, int] | None = None) -> Tensor:
    """[patch, width] after a layer: of all tokens of an image, or of one."""
    if name in plain.CLASS_TOKENS:
        own = plain.patches(name) if cell is None else [plain.column(name, *cell)]
        return plain.state(name, "resid_post", layer, n, n)[own]
    tower = TOWERS[name]
    own = tower.every(n) if cell is None else tower.cell(n, *cell)
    return state(name, "resid_post", layer, n, n)[own]


def means(name: str, layer: int, cell: tuple[int, int] | None = None) -> Floats:
    """[image, width]"""
    return np.stack([vectors(name, n, layer, cell).mean(0).numpy() for n in ALL]).astype(float)


def standardised(x: Floats, fitted: Floats) -> Floats:
    spread = fitted.std(axis=0)
    return (x - fitted.mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)


def ridge(x: Floats, y: Floats) -> Ridge:
    return Ridge(alpha=1.0).fit(standardised(x, x), y)


def left_out(x: Floats) -> Floats:
    """R² and the influence of each image on it, predicted by a fit to the other three images, each
    of which has two prompts."""
    made = [
        ridge(np.repeat(x[own], 2, axis=0), np.repeat(Q[own], 2)).predict(
            standardised(x[[n]], x[own])
        )[0]
        for n in ALL
        for own in [[other for other in ALL if other != n]]
    ]
    return r_squared_contributions(Q, np.array(made))


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_probe_of_patches_equals_scikit_learn_with_an_image_in_one_fold(
    name: str, mode: str
) -> None:
    at = "resid_post vision layer *"
    lines = [
        f"observe probe(n, folds: 4, penalty: 1) at {at} at {where} as told{n}"
        for n, where in enumerate(("photo tokens", "photo row 1 col 2 token"))
    ]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    for found, cell in zip(run_text(name, text, mode, TWICE), (None, (1, 2)), strict=True):
        assert len(found.cells) == 2
        for layer in (0, 1):
            expected = np.tile(left_out(means(name, layer, cell)), 2)
            made = found.measures[0].patched[layer]
            np.testing.assert_allclose(made, expected, atol=1e-4, rtol=1e-4)
        assert np.ptp(found.measures[0].patched) > 0.1


OPTIONS = "prompts: ask, validation: 0%, measure_on_training_rows: true"
AT = "resid_post vision layer * at photo tokens"
TRAINED = f"""
probe t = fit(ridge(penalty: 1), target: n, {OPTIONS}) at {AT}
probe c = fit(logistic(penalty: 1), target: size, {OPTIONS}) at {AT}
direction d = probe(t)
"""
CELL = "photo row 1 col 2 token"


def fit_and_run(name: str, text: str, folder: Path) -> dict[str, ExperimentResult]:
    """Train the probes of a file, and run it."""
    write_data(folder)
    block = BLOCK.replace("  words =", '  size = if n > 2 then "large" else "few"\n  words =')
    block = block.replace(' w3"\n', ' w3 \\n"\n') if vlm.FAMILIES[name].before_end else block
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', "utf-8")
    models = {"m": (bare(name).model, bare(name).processor)}
    mechdsl.fit(path, models, store=folder / "store")
    found = mechdsl.run(path, models, store=folder / "store")
    return {each.name: as_in_the_data(each) for each in found}


@pytest.mark.parametrize("name", some(NAMES, ["qwen2_5_vl"]))
def test_trained_probes_of_patches_predict_and_steer_as_references(
    name: str, tmp_path: Path
) -> None:
    where, site = "resid_post vision layer *", "resid_post vision layer 0"
    text = TRAINED + "".join(
        (
            experiment("of_a", f"observe probe(t) at {where} at photo tokens as told", measure=""),
            experiment("of_b", f"observe prediction(t) at {where} at {CELL} as guess", measure=""),
            experiment("of_c", f"observe prediction(c) at {where} at {CELL} as odds", measure=""),
            experiment("of_d", f"project out d from {site} at photo tokens"),
        )
    )
    found = fit_and_run(name, text, tmp_path)
    for layer in (0, 1):
        x, one = means(name, layer), means(name, layer, (1, 2))
        fitted = ridge(x, Q)
        scores = r_squared_contributions(Q, fitted.predict(standardised(x, x)))
        np.testing.assert_allclose(found["of_a"].measures[0].patched[layer], scores, atol=1e-4)
        expected = fitted.predict(standardised(one, x))
        np.testing.assert_allclose(found["of_b"].measures[0].patched[layer], expected, atol=1e-3)
        # The penalty counts the weights of both classes, which are half of their difference.
        classes = LogisticRegression(C=2.0, tol=1e-9, max_iter=5000).fit(standardised(x, x), Q > 2)
        odds = classes.decision_function(standardised(one, x))
        np.testing.assert_allclose(found["of_c"].measures[0].patched[layer], odds, atol=2e-3)
    x = means(name, 0)
    spread = x.std(axis=0)
    along = torch.from_numpy(ridge(x, Q).coef_ / np.where(spread > 1e-9, spread, np.inf)).float()
    along /= along.norm()

    def without(value: Tensor, own: list[int]) -> Tensor:
        value[own] -= (value[own] @ along)[:, None] * along
        return value

    values, opened = list[float](), plain.edited if name in plain.CLASS_TOKENS else None
    for n in ALL:
        if opened is not None:
            own = plain.patches(name)
            context = opened(bare(name), "resid_post", 0, lambda v, own=own: without(v, own))
        else:
            own = TOWERS[name].every(n)
            context = edited(name, "resid_post", 0, lambda v, own=own: without(v, own))
        with context:
            values.append(difference(bare(name).run(inputs(name, n, n))))
    measure = found["of_d"].measures[0]
    np.testing.assert_allclose(measure.patched[0], values, atol=3e-4)
    assert np.abs(measure.patched - measure.base).max() > 0.1


OTHER = f"""
{TWICE.replace("prompts ask", "prompts train").replace('"w1", "w3"', '"w2"')}
"""
"""Prompts with the same images and other texts."""
REJECTED = {
    "observe probe(n, train: train)": (
        "",
        "E0207",
        "is evaluated on 4 images of the rows that it is fitted on",
    ),
    "observe probe(t)": (
        f"probe t = fit(ridge, target: n, prompts: train) at {AT}",
        "E0345",
        "8 of its 8 rows have images of training rows",
    ),
    "observe norm": (
        f"basis s = fit(sae(features: 8, k: 2), prompts: train) at {AT}",
        "E0345",
        "8 of its 8 rows have images of training rows",
    ),
}


@pytest.mark.parametrize("line", REJECTED)
def test_probe_on_images_of_its_training_reports_the_code(line: str) -> None:
    declared, code, reason = REJECTED[line]
    rule = f"{line} at {AT} as told"
    if declared.startswith("basis"):
        rule = f"set {AT.replace('*', '0')} to reconstruction of s"
    text = f"{OTHER}{declared}\n" + experiment("e", rule, measure="" if "told" in rule else MEASURE)
    with pytest.raises(AssertionError) as problem:
        run_text("qwen2_5_vl", text, block=TWICE)
    assert f"error[{code}]" in str(problem.value)
    assert reason in str(problem.value)


def test_training_on_one_image_reports_that_its_rows_have_the_same_image(tmp_path: Path) -> None:
    write_data(tmp_path)
    block = TWICE.replace("{file}", "0.png").replace("file = other", 'words = "w1"')
    probe = f"probe t = fit(ridge(penalty: 1), target: n, {OPTIONS}) at {AT}\n"
    text = probe + experiment("e", f"observe probe(t) at {AT} as told", measure="")
    path = tmp_path / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', "utf-8")
    models = {"m": (bare("qwen2_5_vl").model, bare("qwen2_5_vl").processor)}
    with pytest.raises(mechdsl.MechdslError) as problem:
        mechdsl.fit(path, models, store=tmp_path / "store")
    assert "all training rows have the same image" in str(problem.value)


def test_trained_probe_counts_the_prompts_of_an_image_as_one_row(tmp_path: Path) -> None:
    """They are held out together."""
    name = "qwen2_5_vl"
    write_data(tmp_path)
    path = tmp_path / "file.mech"
    probe = f"probe t = fit(ridge(penalty: 1), target: n, {OPTIONS}) at {AT}\n"
    text = probe + experiment("e", f"observe probe(t) at {AT} as told", measure="")
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{TWICE}\n{text}', "utf-8")
    models = {"m": (bare(name).model, bare(name).processor)}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    assert isinstance(trained.report, ProbeReport)
    assert (trained.report.rows, trained.report.distinct_rows) == (8, 4)
