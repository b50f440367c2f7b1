"""Observed features of bases, against features computed from the bare model's activations.

One unpadded prompt at a time; the dictionary is computed from its formulas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import mechdsl
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import PROMPTS, word_tokenizer
from ..models import families
from ..reference.forward import Write
from .basis_reference import Basis, pca, save_rows, saved, svd, words
from .models import bare
from .support import (
    BLOCKS,
    MANY,
    QUICK,
    codes,
    edited,
    experiment,
    plain,
    records,
    rows,
    run_file,
    tokens,
    try_file,
)
from .test_dictionaries import ARCHITECTURES, FEATURES, LAYER, Reference, make
from .test_inactive_features import width_of
from .test_transcoders import BASIS as TRANSCODER
from .test_transcoders import make as make_transcoder

HERE = ("gpt2", "llama", "gpt_neox")
BASIS = f'basis f = sae("sae") at resid_post layer {LAYER}\n'
POSITIONS = ("last token", "tokens *", "subject tokens", "token 3")


def observed(line: str, *more: str) -> str:
    return experiment("e", line, *more, measure="", stats="")


def of_token(name: str, of: Reference, run: str, n: int, at: str) -> Tensor:
    """[token, feature] of one row."""
    text = rows(run)[n]
    return of.encode(plain(name, text)["resid_post", LAYER][tokens(text, at), 0])


def means(name: str, of: Reference, at: str, run: str = "clean") -> np.ndarray:
    """[row, feature]"""
    every = [of_token(name, of, run, n, at).mean(0) for n in range(len(rows(run)))]
    return torch.stack(every).numpy()


def token_text(number: int) -> str:
    """Text of a token of the families' tokenizer."""
    special = len(families.SPECIAL)
    return f"w{number - special}" if number >= special else families.SPECIAL[number]


def check(found: ExperimentResult, expected: np.ndarray, top: int) -> list[int]:
    """Compare the features with the largest absolute means and their values; return them."""
    order = np.argsort(-np.abs(expected.mean(0)), kind="stable")
    order = [int(each) for each in order[:top] if np.abs(expected[:, each]).any()]
    assert [cell.coords["feature"] for cell in found.cells] == order
    values = found.measures[0].patched
    assert np.abs(values - expected[:, order].T).max() < 1e-4
    assert np.abs(expected[:, order]).max() > 0.05
    return order


@pytest.mark.parametrize("mode", MANY)
@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("at", POSITIONS)
def test_strongest_features_equal_the_reference(
    architecture: str, family: str, at: str, mode: str, data: Path
) -> None:
    of = make(data, architecture, width_of(family))
    found = run_file(BASIS + observed(f"observe features of f at {at} top 4"), data, family, mode)
    order = check(found["e"], means(family, of, at), 4)
    assert found["e"].measures[1].label == "features density"
    density = found["e"].measures[1].patched
    for rank, feature in enumerate(order):
        for n in range(len(rows())):
            active = of_token(family, of, "clean", n, at)[:, feature] != 0
            assert density[rank, n] == pytest.approx(active.double().mean().item())


@pytest.mark.parametrize("mode", QUICK)
def test_observation_without_top_has_every_feature_in_order(mode: str, data: Path) -> None:
    """Without `top`, every feature is a cell, in order, inactive ones as well."""
    of = make(data, "standard", width_of("llama"))
    text = BASIS + observed("observe features of f at last token")
    found = run_file(text, data, "llama", mode)["e"]
    assert [cell.coords["feature"] for cell in found.cells] == [*range(FEATURES)]
    expected = means("llama", of, "last token")
    assert np.abs(found.measures[0].patched - expected.T).max() < 1e-4


@pytest.mark.parametrize("family", HERE)
def test_features_by_difference_equal_the_reference(family: str, data: Path) -> None:
    of = make(data, "topk", width_of(family))
    line = "observe features of f of other at subject tokens top 3 by difference(longer)"
    found = run_file(BASIS + observed(line), data, family, "planned")["e"]
    own = means(family, of, "subject tokens", "other")
    check(found, own - means(family, of, "subject tokens", "longer"), 3)
    assert "minus that in `longer`" in found.conventions["observed"]


def sized(folder: Path, counts: list[int]) -> str:
    """Prompts whose rows have a number."""
    lines = [json.dumps({**own, "size": n}) for own, n in zip(records(), counts, strict=True)]
    (folder / "sized.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PROMPTS.replace("data.jsonl", "sized.jsonl")


@pytest.mark.parametrize("family", HERE)
def test_features_by_correlation_equal_pearson_r(family: str, data: Path) -> None:
    """With `correlation`, a cell's value is Pearson's r over its rows."""
    of = make(data, "standard", width_of(family))
    counts = [3, 1, 4, 2]
    blocks = sized(data, counts)
    line = "observe features of f at tokens * top 3 by correlation(2 * size)"
    found = run_file(BASIS + observed(line), data, family, "planned", blocks=blocks)["e"]
    features = means(family, of, "tokens *")
    r = [stats.pearsonr(own, counts).statistic if own.std() > 1e-9 else 0.0 for own in features.T]
    order = np.argsort(-np.abs(r), kind="stable")[:3].tolist()
    assert [cell.coords["feature"] for cell in found.cells] == order
    assert np.abs(found.measures[0].patched.mean(1) - np.array(r)[order]).max() < 1e-4
    assert found.measures[0].unit == "correlation"
    for feature, rank in zip(order, found.measures[0].patched, strict=True):
        x, y = (stats.zscore(each) for each in (features[:, feature], np.array(counts)))
        influence = x * y - r[feature] * (x**2 + y**2) / 2
        assert np.abs(rank - (r[feature] + influence)).max() < 1e-3


@pytest.mark.parametrize("by", ["mean", "difference(other)", "correlation(size)"])
def test_observed_features_do_not_depend_on_batch_size(
    by: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(data, "standard", width_of("llama"))
    blocks = sized(data, [3, 1, 4, 2])
    text = BASIS + observed(f"observe features of f at tokens * top 3 by {by}")
    whole = run_file(text, data, "llama", "planned", blocks=blocks)["e"]
    monkeypatch.setattr("mechdsl.execute.observation.features.MAX_NUMBERS", 600)
    parts = run_file(text, data, "llama", "planned", blocks=blocks)["e"]
    assert [cell.coords for cell in parts.cells] == [cell.coords for cell in whole.cells]
    assert np.abs(parts.measures[0].patched - whole.measures[0].patched).max() < 1e-5
    assert parts.conventions["features of f"] == whole.conventions["features of f"]


def test_prompts_without_the_feature_are_not_listed(data: Path) -> None:
    of = make(data, "topk", width_of("gpt2"))
    text = BASIS + observed("observe features of f at last token")
    found = run_file(text, data, "gpt2", "planned")["e"]
    there = means("gpt2", of, "last token") > 0
    assert not there.all()
    for feature, prompts in enumerate(found.active):
        rows_there = {n for n in range(len(rows())) if there[n, feature]}
        assert {each.row for each in prompts} == rows_there


def test_observed_features_have_a_position_axis(data: Path) -> None:
    """Features are selected over all positions; each has its value at each of them."""
    of = make(data, "jumprelu", width_of("gpt2"))
    line = "observe features of f at each token of subject top 2"
    found = run_file(BASIS + observed(line), data, "gpt2", "planned")["e"]
    assert found.axes == ("position", "feature")
    every = means("gpt2", of, "subject tokens")
    order = np.argsort(-every.mean(0), kind="stable")[:2].tolist()
    places = [each.coords["position"] for each in found.cells]
    assert len(set(places)) > 1
    assert {cell.coords["feature"] for cell in found.cells} == set(order)
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        for n, text in enumerate(rows()):
            span = text.spans["subject"]
            named = {"last": span[-1:], "middle": span[1:-1]}
            named["first"] = span[:1] if len(span) > 1 else ()
            there = list(named[str(cell.coords["position"]).split()[1]])
            if not there:
                assert np.isnan(values[n])
                continue
            own = of.encode(plain("gpt2", text)["resid_post", LAYER][there, 0]).mean(0)
            assert values[n] == pytest.approx(own[cell.coords["feature"]].item(), abs=1e-4)


def test_observed_features_of_a_derived_run_equal_the_reference(data: Path) -> None:
    of = make(data, "standard", width_of("llama"))
    line = "observe features of f of less at tokens * top 3"
    text = BASIS + observed("run less { scale attn_out layer 0 at tokens * by 0.5 }", line)
    found = run_file(text, data, "llama", "planned")["e"]
    expected = []
    for text_of_row in rows():
        half = plain("llama", text_of_row)["attn_out", 0][:, 0] * 0.5
        writes = [Write("attn_out", 0, half[token], token) for token in range(len(half))]
        run = edited("llama", text_of_row, writes)
        expected.append(of.encode(run["resid_post", LAYER][:, 0]).mean(0))
    check(found, torch.stack(expected).numpy(), 3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_observed_transcoder_features_equal_the_reference(family: str, data: Path) -> None:
    """Features of a transcoder are those of the MLP's input."""
    of = make_transcoder(data, "transcoder", width_of(family))
    line = "observe features of t at last token top 3"
    found = run_file(TRANSCODER + observed(line), data, family, "planned")["e"]
    expected = [of.encode(plain(family, text)["mlp_norm", LAYER][text.last, 0]) for text in rows()]
    check(found, torch.stack(expected).numpy(), 3)


@pytest.mark.parametrize("site", ["z layer 1", "z layer 1 head 2", "mlp_hidden layer 0"])
def test_observed_coordinates_of_linear_bases_equal_the_reference(site: str, data: Path) -> None:
    """Coordinates of a linear basis have signs; those with the largest absolute means are kept."""
    text = f"basis n = neurons at {site}\n" + observed("observe features of n at last token top 3")
    found = run_file(text, data, "llama", "planned")["e"]
    name, _, rest = site.partition(" layer ")
    layer, _, head = rest.partition(" head ")
    expected = []
    for row in rows():
        own = plain("llama", row)[name, int(layer)][row.last]
        own = own[int(head)] if head else own.flatten()
        expected.append(own)
    check(found, torch.stack(expected).double().numpy(), 3)


COMPUTED: dict[str, tuple[str, Callable[[str], Basis]]] = {
    "pca": (
        "pca(p, dims: 3) at resid_post layer 1 at last token",
        lambda name: pca(name, "clean", "resid_post", 1, "last token", 3),
    ),
    "svd": (
        "svd(weights: mlp_out, dims: 3) at mlp_out layer 1",
        lambda name: svd(name, "mlp_out", 1, 3),
    ),
    "rows": (
        'rows(unembed, " w3", " w9") at resid_post layer 1',
        lambda name: words(name, "w3", "w9"),
    ),
    "saved": (
        'saved("ROWS", "rows") at resid_post layer 1',
        lambda name: saved(width_of(name)),
    ),
}


@pytest.mark.parametrize("family", HERE)
@pytest.mark.parametrize("method", COMPUTED)
def test_observed_coordinates_of_computed_bases_equal_the_reference(
    method: str, family: str, data: Path
) -> None:
    """Coordinates of bases that are fitted on rows, read from weights, or loaded."""
    written, made = COMPUTED[method]
    file = save_rows(data, width_of(family))
    text = f"basis n = {written.replace('ROWS', file)}\n"
    text += observed("observe features of n at last token")
    found = run_file(text, data, family, "planned")["e"]
    site = "mlp_out" if method == "svd" else "resid_post"
    x = torch.stack([plain(family, row)[site, LAYER][row.last, 0] for row in rows()])
    expected = made(family).coordinates(x)
    assert len(found.cells) == expected.shape[1]
    assert np.abs(found.measures[0].patched - expected.T.numpy()).max() < 1e-3


def test_observed_features_list_active_prompts_and_promoted_tokens(data: Path) -> None:
    """The most active prompts have the activation of each observed token; the listed tokens are
    those that the decoder row raises most."""
    of = make(data, "standard", width_of("llama"))
    text = BASIS + observed("observe features of f at tokens * top 3")
    found = run_file(text, data, "llama", "planned")["e"]
    model = bare("llama")
    for cell, prompts in zip(found.cells, found.active, strict=True):
        feature = int(cell.coords["feature"])
        every = [of_token("llama", of, "clean", n, "tokens *")[:, feature] for n in range(4)]
        order = np.argsort([-own.max().item() for own in every], kind="stable")
        there = [int(n) for n in order if every[n].max() > 0]
        assert [each.row for each in prompts] == there
        for each in prompts:
            assert np.allclose(each.values, every[each.row].numpy(), atol=1e-4)
            assert [token.strip() for token in each.tokens][1:] == list(rows()[each.row].words)
        row = of.w_dec[feature] * model.model.norm.weight.double()
        raised = (model.lm_head.weight.double() @ row).topk(5).indices.tolist()
        assert list(cell.listed) == [token_text(token) for token in raised]


def test_conventions_of_observed_features_report_activity_and_variance(data: Path) -> None:
    of = make(data, "topk", width_of("llama"))
    text = BASIS + observed("observe features of f at tokens * top 3")
    said = run_file(text, data, "llama", "planned")["e"].conventions
    every = torch.cat([of_token("llama", of, "clean", n, "tokens *") for n in range(len(rows()))])
    active = int((every != 0).any(0).sum())
    vectors = torch.cat([plain("llama", row)["resid_post", LAYER][:, 0] for row in rows()])
    error = (vectors - of.decode(of.encode(vectors), vectors)).square().sum()
    explained = 1 - error / (vectors - vectors.mean(0)).square().sum()
    assert said["features of f"] == (
        f"{active} of {FEATURES} features are active at {len(vectors)} tokens; the reconstruction "
        f"explains {explained.item():.4g} of their variance"
    )
    assert said["selected"].startswith(f"up to 3 of {FEATURES} features")


def test_feature_observation_and_rules_share_a_dictionary_in_a_file(data: Path) -> None:
    """An observation, and rules on the same dictionary in another experiment of the file."""
    of = make(data, "topk", width_of("llama"))
    text = BASIS + observed("observe features of f at last token top 3")
    text += experiment("rules", "ablate feature 0..2 of f at last token with zero")
    both = run_file(text, data, "llama", "planned")
    check(both["e"], means("llama", of, "last token"), 3)
    alone = run_file(
        BASIS + experiment("rules", "ablate feature 0..2 of f at last token with zero"),
        data, "llama", "planned",
    )  # fmt: skip
    ours, theirs = (each["rules"].measures[0].patched for each in (both, alone))
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("observe features of g at last token", "E0201"),
        ("observe features of f at last token top 0", "E0207"),
        ("observe features of f at last token by median", "E0203"),
        ("observe features of f at last token by mean(3)", "E0207"),
        ("observe features of f at last token by difference", "E0207"),
        ("observe features of f at last token by difference(nothing)", "E0201"),
        ("observe features of f at last token by correlation", "E0207"),
        ("observe features of f at last token by correlation(subject)", "E0207"),
        ("observe features of f at last token by correlation(1)", "E0207"),
        ("observe features of every at last token", "E0342"),
    ],
)
def test_invalid_feature_observations_are_errors(line: str, code: str, data: Path) -> None:
    make(data, "topk", width_of("llama"))
    bases = BASIS + "basis every = neurons at resid_post layer *\n"
    assert codes(bases + observed(line), data) == [code]


def test_features_of_a_basis_of_several_sites_name_a_line_that_reads_them(data: Path) -> None:
    basis = "basis every = neurons at resid_post layer * except 0\n"
    _, problems = try_file(
        basis + observed("observe features of every at last token"), data, "llama"
    )
    (problem,) = [each for each in problems if each.code == "E0342"]
    assert "`every` is a basis for each of 2 sites" in problem.message
    line = problem.help_text.split("`")[1]
    assert line == "observe value feature * of every"
    found = run_file(basis + observed(f"{line} at last token"), data, "llama", "planned")["e"]
    assert {cell.coords["layer"] for cell in found.cells} == {1, 2}


def test_feature_observation_in_an_experiment_with_rules_is_an_error(data: Path) -> None:
    make(data, "topk", width_of("llama"))
    line = "observe features of f at last token top 2 as seen"
    text = BASIS + experiment("e", "ablate resid_post layer 0 at last token with zero", line)
    assert "E0207" in codes(text, data)


def test_feature_observation_of_a_noised_run_is_an_error(data: Path) -> None:
    make(data, "topk", width_of("llama"))
    noise = "corrupt noised { add gaussian(std: 2 sd) to embed at subject tokens }\n"
    blocks = PROMPTS.replace("corrupt turned", f"{noise}  corrupt turned")
    for line in (
        "observe features of f of noised at last token",
        "observe features of f at last token by difference(noised)",
    ):
        result, problems = try_file(BASIS + observed(line), data, "llama", blocks=blocks)
        assert result is None
        (problem,) = [each for each in problems if each.code == "E0207"]
        assert "draws of noise" in problem.message


@pytest.mark.parametrize("sign", ["<", ">"])
def test_observed_features_belong_to_the_rows_after_keep(sign: str, data: Path) -> None:
    """Values match their rows even if other rows are dropped or lack the position."""
    of = make(data, "standard", width_of("llama"))
    keep = f"keep logit(answer) {sign} logit(wrong)"
    line = "observe features of f at each item token top 2"
    found = run_file(BASIS + observed(keep, line), data, "llama", "planned")["e"]
    assert found.row_ids is not None
    assert 0 < len(found.row_ids) < len(rows())
    checked = 0
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        number = int(str(cell.coords["position"]).rpartition(" ")[2])
        for row, value in zip(found.row_ids, values, strict=True):
            items = rows()[row].spans["items"]
            if number > len(items):
                assert np.isnan(value)
                continue
            x = plain("llama", rows()[row])["resid_post", LAYER][items[number - 1], 0]
            assert value == pytest.approx(of.encode(x)[cell.coords["feature"]].item(), abs=1e-4)
            checked += 1
    assert checked > 3


def test_top_returns_only_active_features(data: Path) -> None:
    """There are fewer cells than requested if fewer features are active."""
    make(data, "topk", width_of("llama"))
    text = BASIS + observed("observe features of f at last token top 11")
    found, _ = try_file(text, data, "llama")
    assert found is not None
    (result,) = found.experiments
    assert 0 < len(result.cells) < 11
    assert all(np.abs(own).any() for own in result.measures[0].patched)


def test_reports_of_observed_features_have_the_activations(data: Path) -> None:
    """Heat maps and overlays have the activations of the features at their tokens."""
    of = make(data, "standard", width_of("llama"))
    lines = (
        'report overlay top 4 to "overlay.html"',
        'report heatmap feature by position to "map.svg"',
    )
    line = "observe features of f at subject token, last token top 3"
    path = data / "file.mech"
    text = BASIS + observed(line, *lines)
    path.write_text(f'mech 1\nmodel m = local("m")\n{BLOCKS}\n{text}', encoding="utf-8")
    found = mechdsl.run(path, {"m": (bare("llama"), word_tokenizer())})["e"]
    features = list(dict.fromkeys(int(cell.coords["feature"]) for cell in found.cells))
    page, _, density = (data / "overlay.html").read_text(encoding="utf-8").partition("density")
    assert "feature" in density
    shown = re.findall(r'<div class="row"><span>feature (\d+)</span>(.*?)</div></div>', page)
    assert [int(feature) for feature, _ in shown] == features * len(rows())
    every_word = [list(text.words) for text in rows()]
    seen: set[int] = set()
    for feature, body in shown:
        texts = re.findall(r"<b [^>]*>([^<]*)</b><small>([^<]*)</small>", body)
        n = every_word.index([word for word, _ in texts[1:]])
        seen.add(n)
        every = of_token("llama", of, "clean", n, "tokens *")[:, int(feature)]
        there = {*tokens(rows()[n], "subject token"), *tokens(rows()[n], "last token")}
        for place, (_, value) in enumerate(texts):
            assert bool(value) == (place in there)
            if value:
                rounding = 0.51 * 10 ** -len(value.partition(".")[2])
                assert abs(float(value) - every[place].item()) < rounding
    assert len(seen) == len(rows())
    chart = (data / "map.svg").read_text(encoding="utf-8")
    said = re.findall(
        r'aria-label="L\d.resid_post in f at (.*?) at feature (\d+), ([-\d.]+)', chart
    )
    assert len({each[:2] for each in said}) == 2 * len(features)
    of_cell = {(at, feature): float(value) for at, feature, value in reversed(said)}
    for (at, feature), value in of_cell.items():
        mean = means("llama", of, at)[:, int(feature)].mean()
        assert value == pytest.approx(mean, rel=5e-3, abs=5e-3)
