"""Dictionaries trained in vision encoders of prompts with images: the vectors that they read, one
for each patch, and rules on their features, against plain hooks on the bare model's encoder."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.dictionaries.folder import DictionaryFile
from mechdsl.execute import training

from ..execute.support import as_in_the_data
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_attended_encoder as encoder
from . import test_attended_images as attended
from . import test_resampled_encoder as resampled
from .reference import Edit
from .support import RECORDS, experiment, write_data
from .test_encoder_paths import Place, edited, seen, tower
from .test_families import ALL, BLOCK, bare, difference, inputs

pytestmark = pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")

NAMES = ("llava_class", "paligemma", "llava_next", "gemma3", "qwen2_5_vl", "internvl", "smolvlm")
QUICK = ("llava_next", "gemma3")
AT = "resid_pre vision layer 1"
PLACE = Place("resid_pre", 1)
CELL = "photo row 1 col 2 token"
OPTIONS = "prompts: ask, steps: 3, batch: 4, measure_on_training_rows: true"


def other(n: int) -> int:
    return (n + 1) % 4


def fit_and_run(name: str, text: str, folder: Path) -> tuple[Path, list[Any]]:
    """Train the bases of a file; returns the folder of the first one, and the results."""
    write_data(folder)
    block = BLOCK.replace(' w3"\n', ' w3 \\n"\n') if vlm.FAMILIES[name].before_end else BLOCK
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', "utf-8")
    models = {"m": (bare(name).model, bare(name).processor)}
    trained = mechdsl.fit(path, models, store=folder / "store")
    found = mechdsl.run(path, models, store=folder / "store")
    return trained[0].folder, [as_in_the_data(each) for each in found]


def features(weights: dict[str, Tensor], vectors: Tensor) -> Tensor:
    """[vector, feature] of a dictionary whose 2 largest features are active."""
    hidden = (vectors - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    kept, top = torch.zeros_like(hidden), hidden.topk(2, dim=-1).indices
    return kept.scatter(-1, top, hidden.gather(-1, top).clamp(min=0))


def patched(name: str, n: int, weights: dict[str, Tensor], feature: int) -> float:
    """The difference of a prompt with its other image, with a feature of the clean run at each
    patch of a token."""
    own = tower(name)
    clean = features(weights, seen(name, PLACE, n, n)[own.cell(n, 1, 2)])[:, feature]
    here = own.cell(other(n), 1, 2)

    def edit(value: Tensor) -> Tensor:
        now = features(weights, value[here])[:, feature]
        value[here] += torch.outer(clean - now, weights["W_dec"][feature])
        return value

    return _under(name, n, edit)


def _under(name: str, n: int, edit: Edit) -> float:
    with edited(name, PLACE, edit):
        return difference(bare(name).run(inputs(name, n, other(n))))


def record_rows(monkeypatch: pytest.MonkeyPatch, which: int = 0) -> list[Tensor]:
    """The held-out vectors of trainings and those that they learn from, [vector, width] each.

    which: 0 for those that are encoded, 1 for those that are reconstructed.
    """
    given: list[Tensor] = []
    kind: Any = training.RowVectors
    read = kind._read

    def keep(self: Any, rows: Any) -> tuple[Tensor, Tensor]:
        found = read(self, rows)
        given.append(found[which])
        return found

    monkeypatch.setattr(kind, "_read", keep)
    return given


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_dictionary_reads_each_patch_and_its_features_act_on_each(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = record_rows(monkeypatch)
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("patched", "from clean into changed", f"patch feature * of b at {CELL}")
    text += experiment("read", f"observe value feature * of b at {CELL}", measure="")
    folder, (rule, observed) = fit_and_run(name, text, tmp_path)
    own = tower(name)
    expected = torch.cat([seen(name, PLACE, n, n)[own.every(n)] for n in ALL])
    rows = np.array(sorted(torch.cat(given).tolist()))
    np.testing.assert_allclose(rows, sorted(expected.tolist()), atol=2e-5)
    weights = load_file(folder / "sae_weights.safetensors")
    for n in ALL:
        active = features(weights, seen(name, PLACE, n, n)[own.cell(n, 1, 2)])
        np.testing.assert_allclose(observed.measures[0].patched[:, n], active.mean(0), atol=1e-4)
        run = partial(patched, name, n, weights)
        np.testing.assert_allclose(
            rule.measures[0].patched[:, n], [run(feature) for feature in range(6)], atol=2e-4
        )
    assert np.abs(rule.measures[0].patched - rule.measures[0].base).max() > 0.02


@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_observed_features_equal_those_of_each_patch(name: str, tmp_path: Path) -> None:
    """Of all features, of the strongest, and compared with another run."""
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("one", f"observe features of b at {CELL}", measure="")
    text += experiment("all", "observe features of b at photo tokens", measure="")
    text += experiment("top", "observe features of b at photo tokens top 2", measure="")
    ranked = f"observe features of b at {CELL} top 6 by difference(changed)"
    text += experiment("changed", ranked, measure="")
    folder, (one, every, top, changed) = fit_and_run(name, text, tmp_path)
    weights, own = load_file(folder / "sae_weights.safetensors"), tower(name)

    def active(n: int, image: int, patches: list[int]) -> Tensor:
        return features(weights, seen(name, PLACE, n, image)[patches])

    cells = torch.stack([active(n, n, own.cell(n, 1, 2)).mean(0) for n in ALL], 1)
    images = [active(n, n, own.every(n)) for n in ALL]
    means = torch.stack([each.mean(0) for each in images], 1)
    shares = torch.stack([(each != 0).double().mean(0) for each in images], 1)
    others = [active(n, other(n), own.cell(other(n), 1, 2)).mean(0) for n in ALL]
    moved = cells - torch.stack(others, 1)
    np.testing.assert_allclose(one.measures[0].patched, cells, atol=1e-4)
    np.testing.assert_allclose(every.measures[0].patched, means, atol=1e-4)
    np.testing.assert_allclose(every.measures[1].patched, shares, atol=1e-5)
    best = means.mean(1).argsort(descending=True)[:2]
    np.testing.assert_allclose(top.measures[0].patched, means[best], atol=1e-4)
    np.testing.assert_allclose(changed.measures[0].patched, moved, atol=1e-4)
    count = sum(map(len, images))
    assert f"at {count} patches" in every.conventions["features of b"]
    check_shown_patches(name, every.active, images)


def check_shown_patches(name: str, shown: Any, images: list[Tensor]) -> None:
    """Each listed prompt has the name and the activation of each patch."""
    each = len(tower(name).cell(0, 1, 2))
    assert any(shown)
    for feature, texts in enumerate(shown):
        for text in texts:
            values = [float(value) for value in text.values]
            expected = images[text.row][:, feature].tolist()
            np.testing.assert_allclose(sorted(values), sorted(expected), atol=1e-4)
            assert len(set(text.tokens)) == len(values)
            first = " photo row 1 col 2" + (" patch 2" if each > 1 else "")
            assert first in text.tokens


def test_observed_features_of_a_resampled_encoder_are_those_of_patches(tmp_path: Path) -> None:
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("e", "observe features of b at photo tokens", measure="")
    source = resampled.source(text, "mixed")
    Path(source.name).write_text(source.text, "utf-8")
    models = {"m": (resampled.bare(splits=True).model, resampled.bare(splits=True).processor)}
    [trained] = mechdsl.fit(source.name, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(source.name, models, store=tmp_path / "store"))
    weights = load_file(trained.folder / "sae_weights.safetensors")
    for n in ALL:
        prompt = resampled.inputs("mixed", n, n)
        vectors = resampled.state("resid_pre", 1, prompt)[resampled.patches(prompt)]
        expected = features(weights, vectors).mean(0)
        np.testing.assert_allclose(found.measures[0].patched[:, n], expected, atol=1e-4)
    [text, *_] = next(each for each in found.active if each)
    assert " photo thumbnail row 1 col 1" in text.tokens


def test_observed_features_of_patches_that_blocks_attend_to_equal_the_encoder(
    tmp_path: Path,
) -> None:
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("e", f"observe features of b at {CELL}", measure="")
    path = attended.folder() / "features.mech"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{attended.BLOCK}\n{text}', "utf-8")
    models = {"m": (attended.bare(), attended.processor())}
    [trained] = mechdsl.fit(path, models, store=tmp_path / "store")
    [found] = map(as_in_the_data, mechdsl.run(path, models, store=tmp_path / "store"))
    weights = load_file(trained.folder / "sae_weights.safetensors")
    for n in ALL:
        vectors = encoder.state("resid_pre", 1, n, n)[encoder.column(n, 1, 2)]
        [expected] = features(weights, vectors[None])
        np.testing.assert_allclose(found.measures[0].patched[:, n], expected, atol=1e-4)
    assert np.ptp(found.measures[0].patched) > 0.1


def test_features_that_depend_on_preceding_tokens_report_e0207(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dictionary that is marked as a temporal SAE."""
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("e", f"observe features of b at {CELL}", measure="")
    kind: Any = DictionaryFile
    fit_and_run("llava_class", text, tmp_path)
    marked = property(lambda _: 1, lambda _, value: None)
    monkeypatch.setattr(kind, "context_layers", marked)
    models = {"m": (bare("llava_class").model, bare("llava_class").processor)}
    with pytest.raises(mechdsl.MechdslError) as problem:
        mechdsl.run(tmp_path / "file.mech", models, store=tmp_path / "store")
    assert "E0207" in str(problem.value)
    assert "patches of an image have no order" in " ".join(str(problem.value).split())


def test_dictionary_of_a_resampled_encoder_reads_each_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = record_rows(monkeypatch)
    text = f"basis b = fit(sae(features: 6, k: 2), {OPTIONS}) at {AT} at photo tokens\n"
    text += experiment("e", f"observe value feature * of b at {CELL}", measure="")
    source = resampled.source(text, "mixed")
    Path(source.name).write_text(source.text, "utf-8")
    models = {"m": (resampled.bare(splits=True).model, resampled.bare(splits=True).processor)}
    mechdsl.fit(source.name, models, store=tmp_path / "store")
    expected: list[list[float]] = []
    for n in ALL:
        prompt = resampled.inputs("mixed", n, n)
        values = resampled.state("resid_pre", 1, prompt)
        expected += values[resampled.patches(prompt)].tolist()
    rows = np.array(sorted(torch.cat(given).tolist()))
    np.testing.assert_allclose(rows, sorted(expected), atol=2e-5)


@pytest.mark.parametrize(
    "call", ["semi_nmf(factors: 3)", "ica(components: 3)", "mixture(components: 2)"]
)
def test_factors_of_patches_are_fitted_and_observed(call: str, tmp_path: Path) -> None:
    text = f"basis b = fit({call}, prompts: ask, measure_on_training_rows: true) at {AT} at photo "
    text += "tokens\n" + experiment("e", f"observe value feature * of b at {CELL}", measure="")
    _, [found] = fit_and_run("llava_next", text, tmp_path)
    assert np.isfinite(found.measures[0].patched).all()
    assert np.ptp(found.measures[0].patched) > 1e-3


TWICE = BLOCK.replace("  words =", '  more in ["w1", "w3"]\n  words =')
"""Two prompts for each image."""


def test_held_out_rows_with_images_of_other_rows_are_an_error(tmp_path: Path) -> None:
    write_data(tmp_path)
    text = "basis b = fit(sae(features: 6, k: 2), {}prompts: ask, steps: 3, batch: 4, "
    text += f"measure_on_training_rows: true) at {AT} at photo tokens\n"
    text += experiment("e", f"observe value feature 1 of b at {CELL}", measure="")
    models = {"m": (bare("llava_next").model, bare("llava_next").processor)}
    path = tmp_path / "file.mech"
    whole = f'mech 1\nmodel m = local("handed over")\n{TWICE}\n{text}'
    path.write_text(whole.replace("{}", ""), "utf-8")
    with pytest.raises(mechdsl.MechdslError) as problem:
        mechdsl.fit(path, models, store=tmp_path / "store")
    assert "E0342" in str(problem.value)
    first, second = re.search(
        r"rows (\d+) and (\d+) of `ask` have the same image, so it can't be held out",
        str(problem.value),
    ).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert int(second) - int(first) == len(RECORDS)  # the data, once for each word
    path.write_text(whole.replace("{}", "validation: 0%, "), "utf-8")
    assert mechdsl.fit(path, models, store=tmp_path / "store")


@pytest.mark.parametrize(  # InternVL scales the output of the module
    "name", some([name for name in NAMES if name != "internvl"], ["gemma3"])
)
def test_transcoder_of_patches_reads_the_input_and_writes_the_output_of_an_mlp(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = record_rows(monkeypatch, 1)
    at, own = "mlp_out vision layer 0", tower(name)
    text = f"basis b = fit(transcoder(features: 6, k: 2), {OPTIONS}) at {at} at photo tokens\n"
    text += experiment("patched", "from changed into clean", f"patch feature * of b at {CELL}")
    text += experiment("read", f"observe value feature * of b at {CELL}", measure="")
    folder, (rule, observed) = fit_and_run(name, text, tmp_path)
    before, after = Place("mlp_norm", 0), Place("mlp_out", 0)
    expected = torch.cat([seen(name, after, n, n)[own.every(n)] for n in ALL])
    rows = np.array(sorted(torch.cat(given).tolist()))
    np.testing.assert_allclose(rows, sorted(expected.tolist()), atol=2e-5)
    stored = load_file(folder / "sae.safetensors")
    weights = {"W_enc": stored["encoder.weight"].T, "b_enc": stored["encoder.bias"]}
    weights["b_dec"] = torch.zeros(())  # only added to what is decoded

    def encode(n: int, image: int) -> Tensor:
        return features(weights, seen(name, before, n, image)[own.cell(image, 1, 2)])

    def run(n: int, feature: int) -> float:
        change = (encode(n, other(n)) - encode(n, n))[:, feature]

        def edit(value: Tensor) -> Tensor:
            value[own.cell(n, 1, 2)] += torch.outer(change, stored["W_dec"][feature])
            return value

        with edited(name, after, edit):
            return difference(bare(name).run(inputs(name, n, n)))

    for n in ALL:
        active = encode(n, n).mean(0)
        np.testing.assert_allclose(observed.measures[0].patched[:, n], active, atol=1e-4)
        values = [run(n, feature) for feature in range(6)]
        np.testing.assert_allclose(rule.measures[0].patched[:, n], values, atol=2e-4)
    assert np.abs(rule.measures[0].patched - rule.measures[0].base).max() > 0.02
