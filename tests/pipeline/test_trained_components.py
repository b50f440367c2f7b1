"""Linear components that a file declares with `fit(ica(…))`.

Their table and the effect of rules, against plain hooks and NumPy, one unpadded prompt at a time;
their keys and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kurtosis
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.pipeline import trainings
from mechdsl.pipeline.trained_files import fits_of_file

from ..quick import in_turn
from ..reference.forward import Write
from ..rules.support import difference, edited, plain, records, rows, tokens
from .test_trained_dictionaries import checked, experiment, fit, models, run, train, write

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
HERE = ("gpt2", "llama", "gpt_neox")
COUNT = 5
ICA = f"ica(components: {COUNT})"
AT = "resid_post layer 1 at tokens *"
ABLATES = experiment("ablate feature 0..3 of f at last token with zero")


def declare(inner: str = ICA, options: str = "steps: 40", at: str = AT, prompts: str = "p") -> str:
    return fit(inner, options, at, prompts)


def vectors(family: str, text: Any, site: str) -> Any:
    """[token, width] of one unpadded prompt."""
    return plain(family, text)[site, 1].flatten(1).numpy()


def weights(fit: mechdsl.TrainedFit) -> dict[str, Any]:
    found = load_file(fit.folder / "sae_weights.safetensors")
    return {name: tensor.double().numpy() for name, tensor in found.items()}


Encode = Callable[[Any, dict[str, Any]], Any]


def encode(x: Any, own: dict[str, Any]) -> Any:
    return (x - own["b_dec"]) @ own["W_enc"]


@pytest.mark.parametrize(("family", "site"), in_turn(HERE, ["resid_post", "mlp_hidden", "z"]))
def test_ica_report_equals_hooks_and_scipy(family: str, site: str, tmp_path: Path) -> None:
    path = write(tmp_path, declare(at=f"{site} layer 1 at tokens *"), ABLATES)
    (found,) = train(path, family)
    (declared,) = fits_of_file(checked(path, family)).values()
    table = declared.training.sample.table
    order = sorted(range(4), key=lambda n: stable_hash(0, "training row", table.row_keys[n]))
    by_row = [vectors(family, rows("clean")[n], site) for n in table.row_ids]
    trained = np.concatenate([by_row[n] for n in order[1:]])
    held_out, own = by_row[order[0]], weights(found)
    np.testing.assert_allclose(own["b_dec"], trained.mean(0), atol=1e-4)
    inner = encode(trained, own)
    np.testing.assert_allclose(np.cov(inner.T, bias=True), np.eye(COUNT), atol=1e-2)
    coordinates = encode(held_out, own)
    error = held_out - own["b_dec"] - coordinates @ own["W_dec"]
    spread = ((held_out - held_out.mean(0)) ** 2).sum()
    report: Any = found.report
    assert (report.rows, report.held_out_rows) == (3, 1)
    assert (report.vectors, report.held_out_vectors) == (len(trained), len(held_out))
    assert report.explained == pytest.approx(1 - (error**2).sum() / spread, abs=1e-3)

    def spiky(values: Any) -> float:
        return float(np.median(np.abs(kurtosis(values))))

    assert report.kurtosis == pytest.approx(spiky(coordinates), abs=1e-3)
    axes = np.linalg.svd(trained - trained.mean(0), full_matrices=False)[2][:COUNT]
    principal = (held_out - trained.mean(0)) @ axes.T
    assert report.components_kurtosis == pytest.approx(spiky(principal), abs=1e-3)
    # The training rows are less normal along the components than along random rotations of them.
    random = np.random.default_rng(0)
    turns = [np.linalg.qr(random.standard_normal((COUNT, COUNT)))[0] for _ in range(20)]
    assert spiky(inner) > np.mean([spiky(inner @ turn) for turn in turns])


def test_ica_control_equals_a_training_without_steps(tmp_path: Path) -> None:
    both = declare() + declare(options="steps: 0").replace("basis f", "basis chance")
    loop = experiment(
        "for b in [f, chance] { set resid_post layer 1 at tokens * to reconstruction of b }"
    )
    own, chance = train(write(tmp_path, both, loop))
    assert own.report.steps > chance.report.steps == 0
    assert own.report.untrained_kurtosis == chance.report.kurtosis
    assert own.report.explained == pytest.approx(chance.report.explained, abs=1e-5)
    assert own.report.kurtosis != chance.report.kurtosis


RULES = {
    "ablate": "ablate feature 0..3 of f at last token with zero",
    "mean": "ablate feature 0..3 of f at last token with mean",
    "patch": "patch feature 0..3 of f at last token",
    "add": "for c in [0, 1, 2, 3] { add c to features 1, 3 of f at last token }",
    "reconstruction": "set resid_post layer 1 at last token to reconstruction of f",
}


def check_rules(
    declared: str,
    rules: Mapping[str, str],
    rule: str,
    family: str,
    folder: Path,
    encode: Encode,
    added: Sequence[int],
) -> None:
    """Compare a rule on features at layer 1 with hooks on one unpadded prompt at a time.

    Args:
        rules: Lines of a file by name: `ablate`, `mean`, `patch`, `add` or `reconstruction`.
        rule: The name of the tested line.
        encode: Features of vectors, [vector, feature], from the tensors of the file.
        added: Features to which the numbers of a loop are added.
    """
    lines = ["from turned into clean", rules[rule]] if rule == "patch" else [rules[rule]]
    path = write(folder, declared, experiment(*lines))
    (found,) = train(path, family)
    own = weights(found)
    (result,) = run(path, family).files[0].experiments
    texts = rows("second")
    last = {n: vectors(family, text, "resid_post")[-1:] for n, text in enumerate(texts)}
    mean = encode(np.concatenate(list(last.values())), own).mean(0)
    for number, cell in enumerate(result.measures[0].patched):
        for row, text in enumerate(texts):

            def act(x: Tensor, number: int = number, row: int = row) -> Tensor:
                before = encode(x.reshape(1, -1).numpy(), own)
                after = before.copy()
                if rule == "add":
                    after[0, added] += number
                elif rule == "mean":
                    after[0, number] = mean[number]
                elif rule == "patch":
                    other = vectors(family, rows("second.turned")[row], "resid_post")[-1:]
                    after[0, number] = encode(other, own)[0, number]
                elif rule == "ablate":
                    after[0, number] = 0
                change = torch.from_numpy((after - before) @ own["W_dec"]).reshape(x.shape)
                if rule == "reconstruction":
                    made = before @ own["W_dec"] + own["b_dec"]
                    return torch.from_numpy(made).reshape(x.shape)
                return x + change

            (at,) = tokens(text, "last token")
            after = edited(family, text, [Write("resid_post", 1, act, at)])
            expected = difference(after.logits, records("second")[row])
            assert cell[row] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("family", "rule"), in_turn(HERE, [*RULES]))
def test_ica_rules_equal_hooks(family: str, rule: str, tmp_path: Path) -> None:
    check_rules(declare(), RULES, rule, family, tmp_path, encode, [1, 3])


# --- sizes, options and keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "options", "code", "text"),
    [
        (ICA, "batch: 16", "E0207", "remove `batch`"),
        (ICA, "maximise: logit(answer)", "E0207", "which learns from vectors"),
        ("ica", "steps: 3", "E0207", "needs `components: …`"),
        ("ica(n_components: 6)", "steps: 3", "E0207", "write `components: …`"),
        ("ica(dims: 6)", "steps: 3", "E0207", "write `components: …`"),
        ("ica(components: 0)", "steps: 3", "E0342", "whole number from 1 on"),
        ("ica(components: 6, penalty: 1)", "steps: 3", "E0207", "not an argument of `ica`"),
        ("fastica(components: 6)", "steps: 3", "E0203", "write `ica(components: 8)`"),
        ("ica(components: 999)", "steps: 3", "E0342", "write at most `components: "),
    ],
)
def test_invalid_ica_argument_is_rejected(
    inner: str, options: str, code: str, text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, declare(inner, options), ABLATES)
    (problem, *_) = mechdsl.validate(path, models("llama"))
    assert problem.code == code
    assert text in str(problem)


def test_ica_with_too_few_vectors_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, declare(at="resid_post layer 1 at last token"), ABLATES)
    with pytest.raises(mechdsl.MechdslError, match="differ in 2 dimensions only") as found:
        train(path)
    assert found.value.diagnostics[0].code == "E0643"
    assert "`ica(components: 2)`" in str(found.value)


def test_ica_without_scikit_learn_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "package_version", lambda name: "unknown")
    with pytest.raises(mechdsl.MechdslError, match="`ica` needs scikit-learn"):
        train(write(tmp_path, declare(), ABLATES))


CHANGES = {
    "components": {"inner": "ica(components: 4)"},
    "steps": {"options": "steps: 3"},
    "seed": {"options": "steps: 40, seed: 1"},
    "validation": {"options": "steps: 40, validation: 50%"},
    "layer": {"at": "resid_post layer 0 at tokens *"},
    "tokens": {"at": "resid_post layer 1 at tokens 0..-2"},
    "run": {"prompts": "other of p"},
}


def check_keys(
    folder: Path, declare: Callable[..., str], changes: Mapping[str, dict[str, str]], used: str
) -> None:
    """Check that each modified declaration needs another training with other weights, and that the
    same declaration gives the same weights again.

    Args:
        used: An experiment that uses the declared basis.
    """
    (base,) = train(write(folder, declare(), used))
    first, folders = weights(base), {base.folder}
    for name, change in changes.items():
        (found,) = train(write(folder, declare(**change), used))
        assert found.folder not in folders, name
        folders.add(found.folder)
        own = weights(found)
        assert not all(np.array_equal(own[each], first[each]) for each in first), name
    again = train(write(folder, declare(), used), fresh=True)[0]
    assert again.folder == base.folder
    assert all(np.array_equal(weights(again)[each], first[each]) for each in first)


def test_ica_key_depends_on_every_argument(tmp_path: Path) -> None:
    check_keys(tmp_path, declare, CHANGES, ABLATES)


def test_ica_card_has_controls_and_its_copy_gives_the_same_values(tmp_path: Path) -> None:
    path = write(tmp_path, declare(), ABLATES)
    (found,) = train(path, out=tmp_path / "out")
    card = (tmp_path / "out" / "f" / "README.md").read_text("utf-8")
    assert card.startswith(f"# f: {COUNT} ica components")
    assert f"The same for a random rotation: {found.report.untrained_kurtosis:.4f}" in card
    copy = 'basis f = sae("out/f") at resid_post layer 1\n'
    (own,) = run(path).files[0].experiments
    (other,) = run(write(tmp_path, copy, ABLATES)).files[0].experiments
    np.testing.assert_allclose(own.measures[0].patched, other.measures[0].patched, atol=1e-5)
