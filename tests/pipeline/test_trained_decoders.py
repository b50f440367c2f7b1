"""Dictionaries trained on the decoder of another one: `prompts: decoder of big`.

Their weights against a loop that shares no code with the package; the order of trainings; controls,
keys and errors; and use in rules, equal to a dictionary in a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mechdsl
from mechdsl.base.hashing import stable_hash
from mechdsl.diagnostics.core import has_errors
from mechdsl.execute import training
from mechdsl.execute.dictionary_training import draw_normal

from ..quick import in_turn
from .test_trained_dictionaries import (
    ABLATES,
    FEATURES,
    HERE,
    OTHER,
    QUICK,
    RULES,
    SAE,
    K,
    assert_same_results,
    encoded,
    experiment,
    fit,
    models,
    run,
    train,
    trained_by_hand,
    write,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
SITE = "resid_post layer 1"
BIG = fit().replace("basis f", "basis big")


def meta(of: str = "big", options: str = QUICK, at: str = SITE, inner: str = SAE) -> str:
    return f"basis f = fit({inner}, prompts: decoder of {of}, {options}) at {at}\n"


def write_dictionary(folder: Path, rows: Tensor) -> None:
    """Write a ReLU SAE with these decoder rows."""
    folder.mkdir(exist_ok=True)
    features, width = rows.shape
    tensors = {
        "W_dec": rows,
        "W_enc": rows.T,
        "b_enc": rows[:, 0].clone(),
        "b_dec": rows[0].clone(),
    }
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": width, "d_sae": features, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(config), "utf-8")


def draw_rows(features: int, width: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(features, width, generator=random) + 0.5


def weights(found: mechdsl.TrainedFit) -> dict[str, Tensor]:
    return load_file(found.folder / "sae_weights.safetensors")


def explained(rows: Tensor, own: dict[str, Tensor]) -> float:
    error = (rows - encoded(rows, own) @ own["W_dec"] - own["b_dec"]).square().sum()
    return float(1 - error / (rows - rows.mean(0)).square().sum())


@pytest.mark.parametrize("family", HERE)
def test_decoder_training_equals_a_reference_loop_over_unit_rows(
    family: str, tmp_path: Path
) -> None:
    width = models(family)["m"][0].config.hidden_size
    rows = draw_rows(30, width)
    rows[4] = 0  # has no direction
    write_dictionary(tmp_path / "own", rows)
    path = write(tmp_path, f'basis big = sae("own") at {SITE}\n', meta(options=f"{QUICK}, seed: 3"))
    path.write_text(path.read_text("utf-8") + ABLATES, "utf-8")
    (found,) = train(path, family)
    units = torch.stack([row / row.norm() for row in rows if row.norm() > 0])
    random = torch.Generator().manual_seed(stable_hash(3, "decoder directions") % 2**63)
    order = torch.randperm(29, generator=random)
    expected, own = trained_by_hand(units[order[3:]], seed=3), weights(found)
    for name, tensor in expected.items():
        assert torch.allclose(own[name], tensor, atol=1e-4, rtol=1e-3), name
    report: Any = found.report
    assert (report.rows, report.vectors, report.held_out_rows) == (26, 26, 3)
    assert report.explained == pytest.approx(explained(units[order[:3]], own), abs=1e-4)
    normal = draw_normal(units[order[3:]], 29, 3)
    chance = trained_by_hand(normal[order[3:]], seed=3)
    assert report.normal_explained == pytest.approx(explained(normal[order[:3]], chance), abs=1e-3)


def test_normal_control_rows_have_mean_and_covariance_of_the_directions() -> None:
    rows = draw_rows(12, 6)
    rows = rows / rows.norm(dim=1, keepdim=True)
    drawn = draw_normal(rows, 100_000, 0)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(100_000), atol=1e-5)
    assert torch.equal(drawn, draw_normal(rows, 100_000, 0))
    assert not torch.equal(drawn, draw_normal(rows, 100_000, 1))
    unscaled = rows.mean(0) / rows.mean(0).norm()
    assert torch.allclose(drawn.mean(0) / drawn.mean(0).norm(), unscaled, atol=0.05)
    assert (drawn.T.cov() - rows.T.cov(correction=0)).abs().max() < 0.05


@pytest.mark.parametrize("first", ["big", "f"])
@pytest.mark.parametrize("at", ["resid_post layer 1", "z layer 1", "mlp_out layer 1"])
def test_outer_dictionary_is_trained_before_its_decoder_dictionary(
    at: str, first: str, tmp_path: Path
) -> None:
    """In any line order, for SAEs and transcoders; the result equals that with a saved folder."""
    inner = SAE.replace("sae", "transcoder") if at.startswith("mlp_out") else SAE
    big = fit(inner, at=f"{at} at tokens *").replace("basis f", "basis big")
    lines = [big, meta(at=at)] if first == "big" else [meta(at=at), big]
    use = experiment("ablate feature 0..3 of f at last token with zero")
    path = write(tmp_path, *lines, use)
    found = train(path, out=tmp_path)
    assert [each.basis for each in found] == ["big", "f"]
    method = "transcoder" if at.startswith("mlp_out") else "sae"
    (loaded,) = train(write(tmp_path, f'basis big = {method}("big") at {at}\n', meta(at=at), use))
    own = weights(found[1])
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(loaded).items())
    card = (tmp_path / "f" / "README.md").read_text("utf-8")
    assert "- Rows: 22 of `decoder of big`, 22 vectors; 2 rows held out" in card
    kind = found[0].what
    assert f"- The dictionary of the decoder: {kind}" in card
    assert "a dictionary of normal vectors with the same covariance" in card


@pytest.mark.parametrize(
    ("name", "family"),
    in_turn(["ablate", "reconstruction", "derived", "replies", "loop"], HERE),
)
def test_decoder_dictionary_in_rules_equals_its_folder(
    name: str, family: str, tmp_path: Path
) -> None:
    """With a second experiment that uses the outer dictionary on the same block."""
    measure = {"measure": "measure logit(answer) as raw"} if name == "replies" else {}
    other = experiment("ablate feature 0..3 of big at last token with zero", name="other")
    text = experiment(*RULES[name], **measure) + other
    train(write(tmp_path, meta(), BIG, text), family, out=tmp_path)
    own = run(write(tmp_path, meta(), BIG, text), family, fresh=True).files[0].experiments
    loaded = "".join(f'basis {n} = sae("{n}") at {SITE}\n' for n in ("f", "big"))
    expected = run(write(tmp_path, loaded, text), family, store=False).files[0].experiments
    assert len(own) == 2
    assert_same_results(own, expected)
    said = own[0].conventions["basis f"]
    assert f"trained on {FEATURES} decoder directions of big" in said
    assert "of normal vectors with the same covariance" in said


def test_decoder_training_uses_the_decoder_of_each_layer(tmp_path: Path) -> None:
    at = "resid_post layer 0..1"
    big = fit(at=f"{at} at tokens *").replace("basis f", "basis big")
    use = experiment(
        "patch resid_post layer 0..1 in basis f at last token", "from turned into clean"
    )
    found = train(write(tmp_path, meta(at=at), big, use))
    names = ["big[layer 0]", "big[layer 1]", "f[layer 0]", "f[layer 1]"]
    assert sorted(each.basis for each in found) == names
    own = {each.basis: weights(each)["W_dec"] for each in found}
    assert not torch.equal(own["f[layer 0]"], own["f[layer 1]"])


def test_decoder_training_key_depends_on_the_outer_dictionary(tmp_path: Path) -> None:
    def keys(*lines: str, use: str = ABLATES) -> dict[str, str]:
        return {each.basis: each.folder.name for each in train(write(tmp_path, *lines, use))}

    before = keys(BIG, meta())
    assert keys(BIG, meta(), "# a comment\n") == before
    renamed = keys(BIG.replace("basis big", "basis wide"), meta(of="wide"))
    assert renamed == {"wide": before["big"], "f": before["f"]}
    for big, own in (
        (BIG.replace("rate: 0.01", "rate: 0.02"), meta()),
        (BIG.replace(QUICK, f"{QUICK}, seed: 1"), meta()),
        (BIG, meta(options=f"{QUICK}, seed: 1")),
        (BIG, meta(options=f"{QUICK}, validation: 20%")),
        (BIG, meta(inner=SAE.replace(f"k: {K}", "k: 3"))),
    ):
        found = keys(big, own)
        assert found["f"] != before["f"]
        assert (found["big"] == before["big"]) == (big == BIG)
    path = write(tmp_path, BIG.replace(QUICK, f"{QUICK}, seed: 2"), meta(), ABLATES)
    with pytest.raises(mechdsl.MechdslError, match="isn't trained") as missing:
        run(path)
    assert {each.code for each in missing.value.diagnostics} == {"E0642"}


def test_measuring_training_rows_of_the_outer_dictionary_is_rejected(tmp_path: Path) -> None:
    measured = ABLATES.replace("prompts second", "prompts p")
    with pytest.raises(mechdsl.MechdslError, match="measures rows that `f` is trained on") as found:
        train(write(tmp_path, BIG, meta(), measured))
    assert {each.code for each in found.value.diagnostics} == {"E0345"}
    allowed = BIG.replace(QUICK, f"{QUICK}, measure_on_training_rows: true")
    path = write(tmp_path, allowed, meta(), measured)
    train(path)
    (done,) = run(path).files[0].experiments
    assert "4 of the 4 rows measured here are training rows" in done.conventions["basis f"]


def test_failed_outer_training_is_reported_for_both_dictionaries(tmp_path: Path) -> None:
    inner = f'sae(features: {FEATURES}, kind: "jump_relu", penalty: 1e38)'
    wild = fit(inner, "steps: 200, batch: 16, rate: 0.99").replace("basis f", "basis big")
    path = write(tmp_path, wild, meta(), ABLATES, OTHER)
    with pytest.raises(mechdsl.MechdslError) as found:
        train(path)
    messages = [each.message for each in found.value.diagnostics]
    assert len(messages) == 2
    assert "finite after" in messages[0]
    assert "a basis or group that it needs isn't trained" in messages[1]
    assert [each.name for each in run(path).files[0].experiments] == ["other"]


def test_validate_plan_and_explain_work_before_a_decoder_training(tmp_path: Path) -> None:
    path = write(tmp_path, meta(), BIG, ABLATES)
    assert not has_errors(mechdsl.validate(path, models("llama")))
    assert mechdsl.plan(path, models=models("llama")) is not None
    assert "24 decoder directions of big" in str(mechdsl.explain(path, models=models("llama")))


@pytest.mark.slow
def test_interrupted_control_of_a_decoder_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, BIG, meta(), ABLATES)
    whole = train(path)[1]
    done: list[int] = []
    real = training.Training._step  # pyright: ignore[reportPrivateUsage]

    def step(self: Any) -> None:
        done.append(self.state.step)
        if len(done) == 12 + 12 + 8:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(training.Training, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(path, fresh=True)
    done.clear()
    found = train(path, fresh=True)[1]
    assert done[-5:] == [*range(7, 12)]
    assert found.report == whole.report
    assert all(torch.equal(weights(found)[n], t) for n, t in weights(whole).items())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_decoder_training_finds_planted_parts_but_none_in_normal_rows(
    seed: int, tmp_path: Path
) -> None:
    """Each direction is a sum of two of eight parts."""
    random = torch.Generator().manual_seed(seed)
    width = models("llama")["m"][0].config.hidden_size
    parts = torch.linalg.qr(torch.randn(width, 8, generator=random))[0].T
    pairs = torch.combinations(torch.arange(8))
    amounts = 0.5 + torch.rand(len(pairs) * 8, 2, generator=random)
    which = pairs.repeat(8, 1)
    write_dictionary(tmp_path / "own", (parts[which] * amounts[:, :, None]).sum(1))
    options = f"steps: 1500, batch: 64, rate: 0.01, seed: {seed}"
    own = meta(options=options, inner="sae(features: 8, k: 2)")
    (found,) = train(write(tmp_path, f'basis big = sae("own") at {SITE}\n', own, ABLATES))
    report: Any = found.report
    centred = parts - parts.mean(0)  # the mean is in the bias
    centred = centred / centred.norm(dim=1, keepdim=True)
    cosines = centred @ weights(found)["W_dec"].T
    assert (cosines.max(1).values > 0.95).float().mean() >= 0.75
    assert report.explained > 0.9
    assert report.explained > report.normal_explained + 0.15
    assert report.explained > report.untrained_explained + 0.3


ERRORS: dict[str, tuple[list[str], str, str]] = {
    "unknown": ([meta(of="bigg"), BIG], "E0201", "big"),
    "itself": ([meta(of="f")], "E0342", "`f` is trained on its own decoder"),
    "circle": (
        [meta(of="g"), meta(of="f").replace("basis f", "basis g")],
        "E0342",
        "is trained on its own decoder",
    ),
    "no dictionary": (
        ["basis c = pca(p, dims: 2) at resid_post layer 1\n", meta(of="c")],
        "E0342",
        "`c` isn't a dictionary",
    ),
    "rotation": ([BIG, meta(inner="das(dims: 2)")], "E0342", "`das` isn't trained on the decoder"),
    "transcoder": (
        [BIG, meta(inner=SAE.replace("sae", "transcoder"))],
        "E0342",
        "`transcoder` isn't trained on the decoder",
    ),
    "factors": (
        [BIG, meta(inner="nmf(factors: 4)")],
        "E0342",
        "`nmf` isn't trained on the decoder",
    ),
    "limit": ([BIG, meta(options="limit: 3")], "E0207", "needs prompts"),
    "measured rows": (
        [BIG, meta(options="measure_on_training_rows: true")],
        "E0207",
        "needs prompts",
    ),
    "position": ([BIG, meta(at=f"{SITE} at last token")], "E0342", "so it has no position"),
    "site": ([BIG, meta(at="resid_post layer 0")], "E0342", "has no decoder at `L0.resid_post`"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_decoder_training_is_rejected_by_validate(name: str, tmp_path: Path) -> None:
    lines, code, said = ERRORS[name]
    path = write(tmp_path, *lines, ABLATES)
    found = [each for each in mechdsl.validate(path, models("llama")) if each.severity == "error"]
    assert code in {each.code for each in found}
    assert len({each.span for each in found}) <= (2 if name == "circle" else 1), found
    assert any(said in str(each.message) for each in found), found


def test_decoder_with_too_few_features_is_rejected(tmp_path: Path) -> None:
    width = models("llama")["m"][0].config.hidden_size
    write_dictionary(tmp_path / "own", draw_rows(2, width))
    path = write(tmp_path, f'basis big = sae("own") at {SITE}\n', meta(), ABLATES)
    (found,) = mechdsl.validate(path, models("llama"))
    assert (found.code, "has 2 features only" in found.message) == ("E0342", True)
    write_dictionary(tmp_path / "own", torch.zeros(8, width))
    with pytest.raises(mechdsl.MechdslError, match="0 of 8 features have a decoder"):
        train(path)
