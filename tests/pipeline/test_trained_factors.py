"""Factorizations that a file declares with `fit(nmf(…))` and `fit(semi_nmf(…))`.

Training vectors and encodings against plain hooks and SciPy, one unpadded prompt at a time;
controls, keys and errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.pipeline import trainings
from mechdsl.pipeline.trained_files import fits_of_file

from ..execute.support import word_tokenizer
from ..models import families
from ..quick import in_turn
from ..reference.forward import Write
from ..rules.models import bare
from ..rules.support import difference, edited, plain, records, rows, tokens
from .test_trained_components import check_keys, weights
from .test_trained_dictionaries import checked, experiment, fit, models, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
COUNT = 6
SEMI = f"semi_nmf(factors: {COUNT})"
AT = "mlp_hidden layer 1 at tokens *"
ABLATES = experiment("ablate feature 0..3 of f at last token with zero")


def declare(inner: str = SEMI, options: str = "steps: 30", at: str = AT, prompts: str = "p") -> str:
    return fit(inner, options, at, prompts)


def vectors(family: str, block: str, site: str = "mlp_hidden") -> list[Tensor]:
    """[token, width] of each row, in the order of the data."""
    return [plain(family, text)[site, 1].flatten(1) for text in rows(block)]


def encode(x: Any, own: dict[str, Any]) -> Any:
    """Nonnegative least squares with a penalty, as least squares of a longer vector.

    For independent factors, ‖x − fF‖² + 2p·f is, up to a constant, ‖(x − s) − fF‖², where the
    shift s has the product p with each factor.
    """
    factors = own["W_dec"]
    shift = np.linalg.lstsq(factors, own["threshold"], rcond=None)[0]
    return np.array([nnls(factors.T, each - shift)[0] for each in x])


@pytest.mark.parametrize(("family", "site"), in_turn(HERE, ["mlp_hidden", "resid_post"]))
def test_semi_nmf_report_equals_hooks_and_scipy(family: str, site: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(at=f"{site} layer 1 at tokens *"), ABLATES)
    (found,) = train(path, family)
    (declared,) = fits_of_file(checked(path, family)).values()
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    by_row = [vectors(family, "clean", site)[n].numpy() for n in table.row_ids]
    held_out, own = by_row[order[0]], weights(found)
    factors = own["W_dec"]
    np.testing.assert_allclose(np.linalg.norm(factors, axis=1), 1, atol=1e-6)
    trained = np.concatenate([by_row[n] for n in order[1:]])
    length = np.sqrt((trained**2).sum(1).mean())
    np.testing.assert_allclose(own["threshold"], 0.02 * length, rtol=1e-4)
    features = encode(held_out, own)
    error = ((held_out - features @ factors) ** 2).sum()
    spread = ((held_out - held_out.mean(0)) ** 2).sum()
    report = found.report
    assert (report.rows, report.held_out_rows) == (3, 1)
    assert report.vectors == len(trained)
    assert report.explained == pytest.approx(1 - error / spread, abs=1e-3)
    assert report.active == pytest.approx((features > 0).sum(1).mean(), abs=0.15)
    # The control is the random start with the same encoding.
    random = torch.Generator().manual_seed(stable_hash(0, "weights") % 2**63)
    start = torch.randn(COUNT, factors.shape[1], generator=random, dtype=torch.float64)
    start = (start / start.norm(dim=1, keepdim=True)).numpy()
    chance = encode(held_out, {**own, "W_dec": start}) @ start
    assert report.untrained_explained == pytest.approx(
        1 - ((held_out - chance) ** 2).sum() / spread, abs=1e-3
    )

    # The factors fit the training rows better than the start does.
    def fits(given: Any) -> float:
        made = encode(trained, {**own, "W_dec": given}) @ given
        return float(((trained - made) ** 2).sum())

    assert fits(factors) < 0.8 * fits(start)


@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("rule", ["ablate", "add", "reconstruction"])
def test_semi_nmf_rules_equal_hooks_and_scipy(family: str, rule: str, tmp_path: Path) -> None:
    lines = {
        "ablate": "ablate feature 0..3 of f at last token with zero",
        "add": "add 3 to feature 0..3 of f at last token",
        "reconstruction": "set mlp_hidden layer 1 at last token to reconstruction of f",
    }
    path = write(tmp_path, declare(), experiment(lines[rule]))
    (found,) = train(path, family)
    own = weights(found)
    (result,) = run(path, family).files[0].experiments
    for number, cell in enumerate(result.measures[0].patched):
        for row, text in enumerate(rows("second")):

            def act(x: Tensor, number: int = number) -> Tensor:
                before = encode(x.reshape(1, -1).numpy(), own)
                after = before.copy()
                if rule == "add":
                    after[0, number] += 3
                elif rule == "ablate":
                    after[0, number] = 0
                change = torch.from_numpy((after - before) @ own["W_dec"]).reshape(x.shape)
                if rule == "reconstruction":
                    return torch.from_numpy(before @ own["W_dec"]).reshape(x.shape)
                return x + change

            (at,) = tokens(text, "last token")
            after = edited(family, text, [Write("mlp_hidden", 1, act, at)])
            expected = difference(after.logits, records("second")[row])
            assert cell[row] == pytest.approx(expected, abs=2e-3)


# --- nonnegative vectors --------------------------------------------------------------------------


def relu_model() -> dict[str, Any]:
    module = families.module("gpt2", activation_function="relu")
    return {"m": (module, word_tokenizer())}


NMF = f"nmf(factors: {COUNT})"


@pytest.mark.slow
def test_nmf_of_a_relu_model_has_nonnegative_factors(tmp_path: Path) -> None:
    store = tmp_path / "store"
    both = declare(NMF) + declare(NMF, "steps: 0").replace("basis f", "basis chance")
    loop = experiment(
        "for b in [f, chance] { set mlp_hidden layer 1 at tokens * to reconstruction of b }"
    )
    path = write(tmp_path, both, loop)
    own, chance = mechdsl.fit(path, relu_model(), store=store)
    factors = weights(own)["W_dec"]
    assert (factors >= 0).all()
    assert not weights(own)["threshold"].any()
    assert own.report.explained > chance.report.explained
    assert own.report.untrained_explained == chance.report.explained
    assert chance.report.steps == 0
    assert mechdsl.run(path, relu_model(), store=store).complete


def test_nmf_of_signed_vectors_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, declare(NMF), ABLATES)
    with pytest.raises(mechdsl.MechdslError, match="of their numbers are negative") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0643"
    assert f"semi_nmf(factors: {COUNT})" in str(found.value)
    with pytest.raises(mechdsl.MechdslError) as found:
        run(path, fit=True)
    errors = [each.code for each in found.value.diagnostics if each.severity == "error"]
    assert errors == ["E0643", "E0642"]
    path = write(tmp_path, declare(NMF, at="resid_post layer 1 at tokens *"), ABLATES)
    (problem, *_) = mechdsl.validate(path, models("llama"))
    assert problem.code == "E0342"
    assert "those of `resid_post` have negative numbers" in str(problem)


def test_nmf_without_scikit_learn_is_an_error_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, declare(NMF), ABLATES)
    monkeypatch.setattr(trainings, "package_version", lambda name: "unknown")
    with pytest.raises(mechdsl.MechdslError, match="scikit-learn, which isn't installed") as found:
        train(path)
    assert 'pip install "mechdsl[fits]"' in str(found.value)


# --- sizes, options and keys ----------------------------------------------------------------------


def test_more_factors_than_dimensions_or_vectors_are_rejected(tmp_path: Path) -> None:
    width = bare("llama").config.hidden_size
    many = declare(f"semi_nmf(factors: {width + 1})", at="resid_post layer 1 at tokens *")
    (problem, *_) = mechdsl.validate(write(tmp_path, many, ABLATES), models("llama"))
    assert problem.code == "E0342"
    assert f"at most `factors: {width}`" in str(problem)
    few = declare(options="steps: 30, limit: 3", at="mlp_hidden layer 1 at last token")
    with pytest.raises(mechdsl.MechdslError, match="6 factors need as many vectors"):
        train(write(tmp_path, few, ABLATES))


def test_semi_nmf_of_streamed_rows_is_rejected(tmp_path: Path) -> None:
    block = 'prompts texts { rows "second.jsonl" streamed  template "{left} w43" }\n'
    path = write(tmp_path, block, declare(prompts="texts"), ABLATES)
    (problem, *_) = mechdsl.validate(path, models("llama"))
    assert problem.code == "E0342"
    assert "`semi_nmf` uses all vectors together, and `texts` is read in parts" in str(problem)


def test_semi_nmf_vectors_that_exceed_memory_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechdsl.execute import training

    monkeypatch.setattr(training.RowVectors, "chunk_bytes", 1000)
    monkeypatch.setattr(training.RowVectors, "_groups", [[], []])
    with pytest.raises(mechdsl.MechdslError, match="uses all of them together, at most") as found:
        train(write(tmp_path, declare(), ABLATES))
    assert "use fewer rows" in str(found.value)


@pytest.mark.parametrize(
    ("inner", "options", "code", "text"),
    [
        (SEMI, "batch: 16", "E0207", "not an argument of `fit` with `semi_nmf`"),
        (SEMI, "rate: 0.1", "E0207", "remove `rate`"),
        (SEMI, "patience: 3", "E0207", "remove `patience`"),
        ("semi_nmf", "steps: 3", "E0207", "needs `factors: …`"),
        ("semi_nmf(n_components: 6)", "steps: 3", "E0207", "write `factors: …`"),
        ("semi_nmf(factors: 0)", "steps: 3", "E0342", "whole number from 1 on"),
        ("semi_nmf(factors: 6, penalty: 1)", "steps: 3", "E0342", "from 0 to below 1"),
        ("nmf(factors: 6, penalty: 0.1)", "steps: 3", "E0207", "not an argument of `nmf`"),
        ("snmf(factors: 6)", "steps: 3", "E0203", "write `semi_nmf(factors: 8)`"),
    ],
)
def test_invalid_nmf_argument_is_rejected(
    inner: str, options: str, code: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(inner, options), ABLATES)
    (problem, *_) = mechdsl.validate(path, models("llama"))
    assert problem.code == code
    assert text in str(problem)


CHANGES = {
    "factors": {"inner": "semi_nmf(factors: 7)"},
    "penalty": {"inner": f"semi_nmf(factors: {COUNT}, penalty: 0.1)"},
    "steps": {"options": "steps: 29"},
    "seed": {"options": "steps: 30, seed: 1"},
    "validation": {"options": "steps: 30, validation: 50%"},
    "layer": {"at": "mlp_hidden layer 0 at tokens *"},
    "run": {"prompts": "other of p"},
}


def test_semi_nmf_key_depends_on_every_argument(tmp_path: Path) -> None:
    check_keys(tmp_path, declare, CHANGES, ABLATES)


def test_nmf_key_depends_on_the_scikit_learn_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechdsl.pipeline import trained_files

    path = write(tmp_path, declare(NMF), ABLATES)
    before = mechdsl.fit(path, relu_model(), store=tmp_path / "store")[0].folder
    real = trained_files.package_version
    other = {"scikit-learn": "0.1"}
    monkeypatch.setattr(trained_files, "package_version", lambda n: other.get(n) or real(n))
    assert mechdsl.fit(path, relu_model(), store=tmp_path / "store")[0].folder != before


def test_semi_nmf_card_names_options_and_controls(tmp_path: Path) -> None:
    path = write(tmp_path, declare(), ABLATES)
    train(path, out=tmp_path / "out")
    card = (tmp_path / "out" / "f" / "README.md").read_text("utf-8")
    assert card.startswith("# f: nonnegative factorization")
    assert f"Options: factors: {COUNT}, steps: 30" in card
    assert "batch" not in card
    assert "The same with untrained weights" in card
