"""Correlated components that a file declares with `fit(cca(…))` and `fit(sparse_cca(…))`.

Their table and the effect of rules, against plain hooks and NumPy, one unpadded prompt at a time;
their keys and errors.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.support import word_tokenizer
from ..quick import in_turn
from ..rules.models import bare
from ..rules.support import forward, plain, rows
from .test_trained_components import HERE, check_keys, check_rules, encode, weights
from .test_trained_dictionaries import checked, experiment, fit, models, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
COUNT, RIDGE = 3, 0.2
CCA = f"cca(components: {COUNT}, ridge: {RIDGE})"
SPARSE = f"sparse_cca(components: {COUNT}, penalty: 0.5)"
OTHER = "with: resid_post layer 0"
AT = "resid_post layer 1 at tokens *"
ABLATES = experiment("ablate feature 0..2 of f at last token with zero")


def declare(inner: str = CCA, options: str = OTHER, at: str = AT, prompts: str = "p") -> str:
    return fit(inner, options, at, prompts)


def vectors(family: str, text: Any, site: str, layer: int) -> Any:
    """[token, width] of one unpadded prompt."""
    return plain(family, text)[site, layer].flatten(1).double().numpy()


def training_rows(path: Path, family: str) -> list[Any]:
    """The training prompts, the held-out one first."""
    (declared, *_) = fits_of_file(checked(path, family)).values()
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    return [rows("clean")[table.row_ids[n]] for n in order]


def reference(x: Any, y: Any, ridge: float) -> tuple[Any, Any]:
    """Encoders of ridge CCA, from the generalised eigenvalue problem."""
    x, y = x - x.mean(0), y - y.mean(0)
    first, second = (each.T @ each / len(each) for each in (x, y))
    first, second = (
        each + ridge * np.trace(each) / len(each) * np.eye(len(each)) for each in (first, second)
    )
    cross = x.T @ y / len(x)
    _, found = eigh(cross @ np.linalg.solve(second, cross.T), first)
    own = found[:, ::-1][:, :COUNT]
    return own, np.linalg.solve(second, cross.T @ own)


def correlate(a: Any, b: Any) -> Any:
    return np.diag(np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :])


@pytest.mark.parametrize(
    ("family", "site"), in_turn(HERE, ["resid_post layer 0", "mlp_out layer 1", "z layer 0"])
)
def test_cca_report_equals_hooks_and_numpy(family: str, site: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(options=f"with: {site}"), ABLATES)
    (found,) = train(path, family)
    texts = training_rows(path, family)
    name, _, layer = site.split()
    sets = [
        [vectors(family, text, *where) for text in texts]
        for where in (("resid_post", 1), (name, int(layer)))
    ]
    held_out = [each[0] for each in sets]
    own, other = (np.concatenate(each[1:]) for each in sets)
    mine, theirs = reference(own, other, RIDGE)
    pairs = (own - own.mean(0)) @ mine, (other - other.mean(0)) @ theirs
    signs = np.sign(correlate(*pairs))
    report: Any = found.report
    assert (report.rows, report.held_out_rows) == (3, 1)
    assert (report.vectors, report.held_out_vectors) == (len(own), len(held_out[0]))
    assert report.training == pytest.approx((correlate(*pairs) * signs).mean(), abs=1e-4)
    expected = correlate(
        (held_out[0] - own.mean(0)) @ mine, (held_out[1] - other.mean(0)) @ theirs * signs
    )
    np.testing.assert_allclose(report.correlations, expected, atol=1e-3)
    assert report.mean == pytest.approx(expected.mean(), abs=1e-3)
    principal = []
    for each, inner in zip(held_out, (own, other), strict=True):
        axes = np.linalg.svd(inner - inner.mean(0), full_matrices=False)[2][:COUNT]
        principal.append(((inner - inner.mean(0)) @ axes.T, (each - inner.mean(0)) @ axes.T))
    (first, first_out), (second, second_out) = principal
    turned = correlate(first_out, second_out) * np.sign(correlate(first, second))
    assert report.components == pytest.approx(turned.mean(), abs=1e-3)
    tensors = weights(found)
    np.testing.assert_allclose(tensors["W_dec"] @ tensors["W_enc"], np.eye(COUNT), atol=1e-4)
    coordinates = encode(own, tensors)
    np.testing.assert_allclose(coordinates.std(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(
        tensors["W_dec"], np.linalg.pinv(coordinates) @ (own - own.mean(0)), atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "inner"), in_turn(HERE, [CCA, SPARSE]))
def test_cca_with_swapped_sites_gives_the_same_pairs(
    family: str, inner: str, tmp_path: Path
) -> None:
    back = declare(inner, "with: resid_post layer 1", "resid_post layer 0 at tokens *")
    loop = "".join(
        experiment(f"ablate feature 0 of {name} at last token with zero", name=f"of_{name}")
        for name in "fg"
    )
    path = write(tmp_path, declare(inner), back.replace("basis f", "basis g"), loop)
    own, other = train(path, family)
    np.testing.assert_allclose(own.report.correlations, other.report.correlations, atol=1e-4)
    held_out = training_rows(path, family)[0]
    first, second = (
        encode(vectors(family, held_out, "resid_post", layer), weights(each))
        for layer, each in ((1, own), (0, other))
    )
    np.testing.assert_allclose(correlate(first, second), own.report.correlations, atol=1e-3)


@pytest.mark.parametrize("family", HERE[:2])
def test_cca_with_row_values_repeats_them_for_each_token(family: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(f"cca(components: 1, ridge: {RIDGE})", "with: subject"), ABLATES)
    path.write_text(path.read_text("utf-8").replace("feature 0..2", "feature 0"), "utf-8")
    (found,) = train(path, family)
    (declared, *_) = fits_of_file(checked(path, family)).values()
    table, paired = declared.training.sample.table, declared.training.paired
    assert paired is not None
    words = [row.values["subject"] for row in declared.training.sample.run.rows]
    expected = [[float(word == each) for each in sorted(set(words))] for word in words]
    assert [list(each) for each in paired.values] == expected
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    sets = [vectors(family, rows("clean")[table.row_ids[n]], "resid_post", 1) for n in order]
    own = np.concatenate(sets[1:])
    columns = [np.tile(expected[n], (len(x), 1)) for n, x in zip(order, sets, strict=True)]
    other = np.concatenate(columns[1:])
    x, y = own - own.mean(0), other - other.mean(0)
    first, second = (each.T @ each / len(each) for each in (x, y))
    first, second = (
        each + RIDGE * np.trace(each) / len(each) * np.eye(len(each)) for each in (first, second)
    )
    cross = x.T @ y / len(x)
    mine = eigh(cross @ np.linalg.solve(second, cross.T), first)[1][:, -1:]
    theirs = np.linalg.solve(second, cross.T @ mine)
    made = correlate(x @ mine, y @ theirs)
    assert found.report.training == pytest.approx(made[0], abs=1e-3)


def test_cca_control_equals_a_training_without_steps(tmp_path: Path) -> None:
    both = declare() + declare(options=f"{OTHER}, steps: 0").replace("basis f", "basis chance")
    loop = experiment(
        "for b in [f, chance] { set resid_post layer 1 at tokens * to reconstruction of b }"
    )
    own, chance = train(write(tmp_path, both, loop))
    assert (own.report.steps, chance.report.steps) == (1, 0)
    assert own.report.training > chance.report.training
    assert abs(own.report.untrained) == pytest.approx(abs(chance.report.mean), abs=0.7)


RULES = {
    "ablate": "ablate feature 0..2 of f at last token with zero",
    "patch": "patch feature 0..2 of f at last token",
    "add": "for c in [0, 1, 2] { add c to features 0, 2 of f at last token }",
    "reconstruction": "set resid_post layer 1 at last token to reconstruction of f",
    "sparse": "ablate feature 0..2 of f at last token with zero",
}


@pytest.mark.parametrize(("family", "rule"), in_turn(HERE, [*RULES]))
def test_cca_rules_equal_hooks(family: str, rule: str, tmp_path: Path) -> None:
    declared = declare(SPARSE if rule == "sparse" else CCA)
    named = "ablate" if rule == "sparse" else rule
    check_rules(declared, RULES, named, family, tmp_path, encode, [0, 2])


# --- vectors of other runs and tokens -------------------------------------------------------------

VIEWS = {
    "other tokens": ("with: resid_post layer 0 at token -2", "clean", -2),
    "other run": ("with: resid_post layer 1 of other", "other", -1),
    "other run and tokens": ("with: resid_post layer 0 of other at token 1", "other", 1),
    "other block": ("with: resid_post layer 1 of second at token 2", "second", 2),
    "corruption of a block": ("with: resid_post layer 1 of second.turned", "second.turned", -1),
}
"""Option, and the run and token of the other vectors, by name."""
LOOSE = "validation: 0%, measure_on_training_rows: true"
ONE = f"cca(components: 1, ridge: {RIDGE})"
LAST = "resid_post layer 1 at last token"
ABLATES_ONE = experiment("ablate feature 0 of f at last token with zero", block="p")


@pytest.mark.parametrize(("family", "view"), in_turn(HERE, [*VIEWS]))
def test_cca_with_another_run_or_token_equals_hooks(family: str, view: str, tmp_path: Path) -> None:
    option, run_name, token = VIEWS[view]
    layer = int(option.split("layer ")[1][0])
    path = write(tmp_path, declare(ONE, f"{option}, {LOOSE}", LAST), ABLATES_ONE)
    (found,) = train(path, family)
    (declared, *_) = fits_of_file(checked(path, family)).values()
    numbers = declared.training.sample.table.row_ids
    own = np.stack([vectors(family, rows("clean")[n], "resid_post", 1)[-1] for n in numbers])
    other = np.stack(
        [vectors(family, rows(run_name)[n], "resid_post", layer)[token] for n in numbers]
    )
    x, y = own - own.mean(0), other - other.mean(0)
    mine = _first_encoder(x, y)
    encoder = weights(found)["W_enc"][:, 0]
    assert abs(np.corrcoef(x @ mine, x @ encoder)[0, 1]) == pytest.approx(1, abs=1e-4)
    theirs = _first_encoder(y, x)
    expected = abs(np.corrcoef(x @ mine, y @ theirs)[0, 1])
    assert found.report.training == pytest.approx(expected, abs=1e-3)
    assert (found.report.rows, found.report.vectors) == (len(numbers), len(numbers))


@pytest.mark.parametrize("family", HERE[:2])
def test_cca_with_another_model_equals_hooks(family: str, tmp_path: Path) -> None:
    tuned = copy.deepcopy(bare(family))
    with torch.no_grad():
        for number, weight in enumerate(tuned.parameters()):
            weight += (
                0.3
                * weight.std()
                * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
            )
    option = "with: resid_post layer 1 of n at token 2"
    line = 'model n = local("handed over, too")\n'
    path = write(tmp_path, line, declare(ONE, f"{option}, {LOOSE}", LAST), ABLATES_ONE)
    both = {**models(family), "n": (tuned, word_tokenizer())}
    (found,) = mechdsl.fit(path, both, store=tmp_path / "store")
    every = rows("clean")
    own = np.stack([vectors(family, text, "resid_post", 1)[-1] for text in every])
    model = copy.deepcopy(tuned).double()
    read = [forward(family, model, text.ids)["resid_post", 1] for text in every]
    other = np.stack([each.flatten(1)[2].double().numpy() for each in read])
    x, y = own - own.mean(0), other - other.mean(0)
    mine, theirs = _first_encoder(x, y), _first_encoder(y, x)
    expected = abs(np.corrcoef(x @ mine, y @ theirs)[0, 1])
    assert found.report.training == pytest.approx(expected, abs=1e-3)
    coordinates = x @ weights(found)["W_enc"][:, 0]
    assert abs(np.corrcoef(x @ mine, coordinates)[0, 1]) == pytest.approx(1, abs=1e-4)


def _first_encoder(x: Any, y: Any) -> Any:
    first, second = (each.T @ each / len(each) for each in (x, y))
    first, second = (
        each + RIDGE * np.trace(each) / len(each) * np.eye(len(each)) for each in (first, second)
    )
    cross = x.T @ y / len(x)
    return eigh(cross @ np.linalg.solve(second, cross.T), first)[1][:, -1]


@pytest.mark.parametrize(
    ("option", "at", "code", "text"),
    [
        ("with: resid_post layer 1 at last token", LAST, "E0342", "correlate with themselves"),
        ("with: resid_post layer 1 of clean", LAST, "E0342", "correlate with themselves"),
        ("with: resid_post layer 0 of nothing", LAST, "E0201", "nothing"),
        ("with: resid_post layer 0 at tokens 1..2", LAST, "E0342", "2 tokens"),
        ("with: resid_post layer 0 at token 1..2", LAST, "E0342", "at one position"),
        ("with: resid_post layer 0 of second.nothing", LAST, "E0201", "second"),
    ],
)
def test_invalid_cca_with_option_is_rejected(
    option: str, at: str, code: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(ONE, f"{option}, {LOOSE}", at), ABLATES_ONE)
    problems = mechdsl.validate(path, models("llama"))
    assert problems[0].code == code, problems
    assert text in str(problems[0])


def test_measuring_rows_of_the_correlated_block_is_rejected(tmp_path: Path) -> None:
    option = "with: resid_post layer 1 of second, validation: 0%"
    used = experiment("ablate feature 0 of f at last token with zero", block="second")
    problems = mechdsl.validate(write(tmp_path, declare(ONE, option, LAST), used), models("llama"))
    assert problems[0].code == "E0345", problems


VIEW_CHANGES = {
    "run": {"options": f"with: resid_post layer 0 of other at last token, {LOOSE}"},
    "token": {"options": f"with: resid_post layer 0 at token 2, {LOOSE}"},
    "block": {"options": f"with: resid_post layer 0 of second at last token, {LOOSE}"},
    "layer": {"options": f"with: resid_post layer 2 at last token, {LOOSE}"},
}


def test_cca_key_depends_on_the_with_option(tmp_path: Path) -> None:
    def one(
        inner: str = ONE,
        options: str = f"with: resid_post layer 0 at last token, {LOOSE}",
        at: str = LAST,
    ) -> str:
        return declare(inner, options, at)

    check_keys(tmp_path, one, VIEW_CHANGES, ABLATES_ONE)


# --- options, errors and keys ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "options", "code", "text"),
    [
        (CCA, "steps: 1", "E0207", "needs `with: …`"),
        (CCA, "with: 3", "E0207", "no vectors `3`"),
        (CCA, f"{OTHER}, batch: 4", "E0207", "remove `batch`"),
        (CCA, f"{OTHER}, maximise: logit(answer)", "E0207", "which learns from vectors"),
        (CCA, "with: nothing", "E0342", "`nothing` is neither a site nor a value"),
        (CCA, "with: [subject, resid_post]", "E0342", "`resid_post` is neither a site nor a value"),
        (CCA, "with: resid_post layer 1", "E0342", "correlate with themselves"),
        (CCA, "with: resid_post layer 0..1", "E0342", "names several sites"),
        (CCA, "with: resid_post layer 9", "E03", "index=9"),
        (CCA, "with: pattern layer 0 head 0", "E0342", "no basis describes"),
        ("cca(n_components: 3)", OTHER, "E0207", "write `components: …`"),
        ("cca(components: 3, ridge: 1)", OTHER, "E0342", "from 0 to below 1"),
        ("cca(components: 3, penalty: 0.1)", OTHER, "E0207", "write `ridge: …`"),
        ("sparse_cca(components: 3, penalty: 1)", OTHER, "E0342", "from 0 to below 1"),
        ("sparse_cca(components: 3, ridge: 0.1)", OTHER, "E0207", "write `penalty: …`"),
        ("svcca(components: 3)", OTHER, "E0203", "write `cca(components: 8)`"),
        ("scca(components: 3)", OTHER, "E0203", "write `sparse_cca(components: 8)`"),
        ("ica(components: 3)", OTHER, "E0207", "which learns from vectors"),
        ("cca(components: 99)", "with: subject", "E0342", "write at most `components: "),
    ],
)
def test_invalid_cca_argument_is_rejected(
    inner: str, options: str, code: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(inner, options), ABLATES)
    problems = mechdsl.validate(path, models("llama"))
    assert problems[0].code.startswith(code), problems
    assert text in str(problems[0])


def test_cca_with_too_few_vectors_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, declare(at="resid_post layer 1 at last token"), ABLATES)
    with pytest.raises(mechdsl.MechdslError, match="correlations need 3 held-out vectors") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0643"
    exact = declare(f"cca(components: {COUNT}, ridge: 0)")
    with pytest.raises(mechdsl.MechdslError, match=r"would all be 1|differ in"):
        train(write(tmp_path, exact, ABLATES))


CHANGES = {
    "components": {"inner": f"cca(components: 4, ridge: {RIDGE})"},
    "ridge": {"inner": f"cca(components: {COUNT}, ridge: 0.5)"},
    "trainer": {"inner": SPARSE},
    "penalty": {"inner": f"sparse_cca(components: {COUNT}, penalty: 0.2)"},
    "steps": {"options": f"{OTHER}, steps: 0"},
    "other layer": {"options": "with: resid_post layer 2"},
    "other site": {"options": "with: mlp_out layer 0"},
    "validation": {"options": f"{OTHER}, validation: 50%"},
    "layer": {"at": "resid_post layer 2 at tokens *"},
    "tokens": {"at": "resid_post layer 1 at tokens 0..-2"},
    "run": {"prompts": "other of p"},
}


def test_cca_key_depends_on_every_argument(tmp_path: Path) -> None:
    check_keys(tmp_path, declare, CHANGES, ABLATES)


def test_cca_card_has_controls_and_its_copy_gives_the_same_values(tmp_path: Path) -> None:
    path = write(tmp_path, declare(), ABLATES)
    (found,) = train(path, out=tmp_path / "out")
    card = (tmp_path / "out" / "f" / "README.md").read_text("utf-8")
    assert card.startswith(f"# f: {COUNT} cca components")
    assert "- Correlated with L0.resid_post" in card
    assert f"The same for random directions: {found.report.untrained:.4f}" in card
    copy = 'basis f = sae("out/f") at resid_post layer 1\n'
    (own,) = run(path).files[0].experiments
    (other,) = run(write(tmp_path, copy, ABLATES)).files[0].experiments
    np.testing.assert_allclose(own.measures[0].patched, other.measures[0].patched, atol=1e-5)
