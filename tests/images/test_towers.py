"""Scores of images with texts by models with two towers: measures against plain hooks on the bare
model, one image and one text at a time, in fp64; models in folders, and store keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import mechdsl
from mechdsl.diagnostics.rendering import MechdslError
from mechdsl.loading import anatomy_proof
from mechdsl.loading.loader import adopt_model

from . import duals, support
from .reference import Act, call
from .support import DUALS, double, pixels, save
from .views import View

CLASSES = ("a photo of a circle", "a photo of a ring", "a photo of a square")


def score(name: str, number: int, text: str, acts: Iterable[Act]) -> float:
    """Score of one image with one text."""
    given = {"pixel_values": pixels(name, number), **duals.inputs(name, text)}
    return float(call(double(name), support.stack(name), given, acts).output)


@pytest.mark.parametrize("name", DUALS)
def test_metrics_of_two_towers_equal_reference(name: str, tmp_path: Path) -> None:
    """`prob` is a softmax over the classes or the model's sigmoid; other texts don't count."""
    lines = ["ablate resid_post layer 0 at image row 2 col * tokens with zero"]
    measures = (
        "score(answer)", "logit(answer)", "prob(answer)", "rank(answer)", "correct",
        'score("the small red cross")', "loss(answer)",
    )  # fmt: skip
    text = "".join(
        support.experiment(f"e{n}", *lines, measure=f"measure {each} as raw")
        for n, each in enumerate(measures)
    )
    found = support.run_file(text, tmp_path, name)
    values: list[list[float]] = []
    for number in range(3):
        acts = View(name, number, "own").make("resid_post", 0, "image row 2 col *", 0.0)
        texts = (*CLASSES, "the small red cross")
        scores = {each: score(name, number, each, acts) for each in texts}
        own = scores[f"a photo of a {support.ANSWERS[number]}"]
        every = np.array([scores[each] for each in CLASSES])
        softmax = np.exp(own) / np.exp(every).sum()
        prob = 1 / (1 + np.exp(-own)) if name in duals.PADDED else softmax
        rank = 1 + (every > own).sum()
        other = scores["the small red cross"]
        values.append([own, own, prob, rank, float(rank == 1), other, -np.log(prob)])
    for n, _ in enumerate(measures):
        np.testing.assert_allclose(
            found[f"e{n}"].measures[0].patched[0], np.array(values)[:, n], atol=2e-4, rtol=1e-4
        )
    assert np.ptp(np.array(values), axis=0)[:3].min() > 0.01


@pytest.mark.parametrize("at_once", [1, 64])
def test_texts_of_several_lengths_are_scored_in_order(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of equal length are encoded together."""
    monkeypatch.setattr(anatomy_proof, "_TEXTS_PER_PASS", at_once)
    said = ("a blue ring", "the small red cross and a ring", "the red cross", "a ring")
    measures = (f'measure score("{each}") as raw' for each in said)
    found = support.run_file(support.experiment("e", *measures, measure=""), tmp_path, "clip/dual")
    for each, measure in zip(said, found["e"].measures, strict=True):
        expected = [score("clip/dual", n, each, ()) for n in range(3)]
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["clip/dual", "siglip/dual"])
def test_keep_and_expect_of_images_use_ranks_among_classes(name: str, tmp_path: Path) -> None:
    """The measure uses a text that isn't a class."""
    scores = np.array([[score(name, n, each, ()) for each in CLASSES] for n in range(3)])
    own = [CLASSES.index(f"a photo of a {each}") for each in support.ANSWERS]
    ranks = [1 + int((row > row[at]).sum()) for row, at in zip(scores, own, strict=True)]
    last = max(ranks)
    assert min(ranks) < last
    zero = "ablate embed at image row 1 col * tokens with zero"
    lines = (zero, f"keep rank(answer) < {last}", "expect accuracy(clean) < 1")
    measure = 'measure score("the blue ring") as raw'
    text = support.experiment("e", *lines, measure=measure)
    found = support.run_file(text, tmp_path, name)["e"]
    assert len(found.row_ids) == sum(rank < last for rank in ranks)
    [expected] = found.outcomes
    assert expected.value == pytest.approx(np.mean([rank == 1 for rank in ranks]))


def test_keep_scores_a_text_that_occurs_nowhere_else(tmp_path: Path) -> None:
    name, text = "clip/dual", "the small red ring"
    own = [score(name, n, text, ()) for n in range(3)]
    middle = float(np.mean(own))
    lines = (
        "ablate embed at image row 1 col * tokens with zero",
        f'keep score("{text}") > {middle}',
    )
    measure = 'measure score("the blue ring") as raw'
    found = support.run_file(support.experiment("e", *lines, measure=measure), tmp_path, name)["e"]
    assert len(found.row_ids) == sum(each > middle for each in own)


# --- models in folders, store keys, errors --------------------------------------------------------

FILE = """\
mech 1
model clip = local("clip")
BLOCKS
experiment e {
  model clip
  images scenes
  from scenes into neutral
  patch resid_post layer 1 at image row * col 2 tokens
  measure score(answer) - score(wrong) as delta
  measure prob(answer) as raw
}
"""


def write(folder: Path, name: str = "clip/dual", blocks: str = support.OF_TEXTS) -> Path:
    support.write_images(folder)
    save(name, folder)
    (folder / "file.mech").write_text(FILE.replace("BLOCKS", blocks), encoding="utf-8")
    return folder / "file.mech"


def values(path: Path, measure: int = 0, **how: object) -> np.ndarray:
    results = mechdsl.run(path, **how)  # type: ignore[arg-type]
    return results["e"].measures[measure].patched


@pytest.mark.parametrize("name", ["clip/dual", "siglip/dual"])
def test_two_tower_model_in_a_folder_equals_the_one_passed_from_python(
    name: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name)
    own = values(path, store=False)
    np.testing.assert_allclose(
        own, values(path, models={"clip": support.handed(name)}, store=False), atol=1e-5
    )
    assert np.ptp(own) > 0.1


@pytest.mark.slow
def test_processor_config_takes_precedence_over_preprocessor_config(tmp_path: Path) -> None:
    """transformers saves the combined file; the file of images alone is older."""
    path = write(tmp_path)
    own = values(path, store=False)
    file = tmp_path / "clip" / "preprocessor_config.json"
    config = json.loads(file.read_text())
    whole = {"processor_class": "CLIPProcessor", "image_processor": config}
    (tmp_path / "clip" / "processor_config.json").write_text(json.dumps(whole))
    file.write_text(json.dumps({**config, "image_mean": [0.1, 0.2, 0.9]}))
    np.testing.assert_array_equal(values(path, store=False), own)
    file.unlink()
    np.testing.assert_array_equal(values(path, store=False), own)
    whole["image_processor"] = {**config, "image_mean": [0.1, 0.2, 0.9]}
    store = tmp_path / "store"
    np.testing.assert_array_equal(values(path, store=store), own)
    (tmp_path / "clip" / "processor_config.json").write_text(json.dumps(whole))
    assert np.abs(values(path, store=store) - own).max() > 0.01


def test_store_key_depends_on_the_scored_texts(tmp_path: Path) -> None:
    store = tmp_path / "store"
    path = write(tmp_path)
    before = [values(path, n, store=store) for n in (0, 1)]
    np.testing.assert_array_equal(values(path, store=store), before[0])
    changed = support.OF_TEXTS.replace('"a photo of a {other}"', '"the small {other}"')
    write(tmp_path, blocks=changed)
    fresh = values(path, store=False)
    assert np.abs(fresh - before[0]).max() > 0.01
    np.testing.assert_allclose(values(path, store=store), fresh, atol=1e-5)
    write(tmp_path, blocks=support.OF_TEXTS.replace('classes "a photo', 'classes "the photo'))
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(path, store=store)
    assert "E0442" in [each.code for each in refused.value.diagnostics]


def test_classes_include_values_of_filtered_rows(tmp_path: Path) -> None:
    blocks = """
images scenes {
  kind in ["circle", "square", "cross"]
  where kind = "circle"
  image shapes(n: 1, kind: kind, size: 16)
  answer "a {kind}"
  classes "a {kind}"
}
"""
    text = support.experiment("e", "ablate embed at image tokens with zero", measure=PROB)
    found = support.run_file(text, tmp_path, "clip/dual", blocks=blocks)["e"]
    said = found.conventions["classes"]
    assert said.startswith("3 texts: `a circle`, `a square`, `a cross`;")
    assert "softmax" in said
    assert found.conventions["texts"].startswith("3, each encoded once")


PROB = "measure prob(answer) as raw"


def test_too_long_class_text_is_rejected(tmp_path: Path) -> None:
    of = '"a photo of a {other}"'
    most = duals.LONGEST - len(("<s>", "the", "ring", "</s>"))
    short, long = (
        support.OF_TEXTS.replace(of, f'"the {"small " * count}{{other}}"')
        for count in (most, most + 1)
    )
    text = support.experiment("e", "ablate embed at image tokens with zero")
    support.run_file(text, tmp_path, "clip/dual", blocks=short)
    _, found = support.try_file(text, tmp_path, "clip/dual", blocks=long)
    assert [each.code for each in found if each.severity == "error"] == ["E0511"]


def test_model_that_modifies_scores_is_rejected() -> None:
    class CLIPModel(transformers.CLIPModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().forward(*args, **kwargs)
            found.logits_per_image = found.logits_per_image + 0.3
            return found

    module = CLIPModel(duals.bare("clip/dual").config)
    module.load_state_dict(duals.bare("clip/dual").state_dict())
    model, found = adopt_model("m", module, support.handed("clip/dual")[1])
    assert model is None
    assert [each.code for each in found] == ["E0410"]
    assert "scores" in found[0].message


def test_unsupported_text_tower_is_rejected() -> None:
    """The image tower of the model is supported."""

    class Shifted(CLIPEncoderLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) + 0.3

    module = copy.deepcopy(duals.bare("clip/dual"))
    module.text_model.encoder.layers[1].__class__ = Shifted
    model, found = adopt_model("m", module, support.handed("clip/dual")[1])
    assert model is None
    assert [each.code for each in found] == ["E0410"]
    assert "layer 1" in found[0].label_text


@pytest.mark.parametrize("name", ["clip/dual", "siglip/dual"])
def test_conventions_describe_scores_texts_and_classes(name: str, tmp_path: Path) -> None:
    blocks = """
images scenes {
  kind in ["circle", "square", "triangle", "cross", "ring"]
  image shapes(n: 1, kind: kind, size: 16)
  answer "a {kind}"
  classes "a {kind}"
}
"""
    text = support.experiment("e", "ablate embed at image tokens with zero", measure=PROB)
    said = support.run_file(text, tmp_path, name, blocks=blocks)["e"].conventions
    score = "the model's own logit of an image and a text: cosine times the model's scale"
    assert said["score"] == score + ", plus its bias" * (name in duals.PADDED)
    assert said["texts"] == "5, each encoded once by the text tower, where no rule acts"
    assert said["classes"].startswith(
        "5 texts: `a circle`, `a square`, `a triangle`, `a cross` and 1 more; `correct`:"
    )
    assert ("softmax" in said["classes"]) == (name not in duals.PADDED)
    assert ("sigmoid" in said.get("prob", "")) == (name in duals.PADDED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip/dual", "siglip/dual"])
def test_two_tower_scores_in_bfloat16_are_close_to_fp32(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    wide, short = (values(path, store=False, dtype=each) for each in ("float32", "bfloat16"))
    scale = float(duals.bare(name).logit_scale.exp())
    assert 0 < np.abs(wide - short).max() < 0.05 * scale


def test_siglip_tokenizer_without_pad_token_is_rejected() -> None:
    own = copy.deepcopy(duals.tokenizer("siglip/dual"))
    own.pad_token = None
    model, found = adopt_model(
        "m", duals.bare("siglip/dual"), (support.processor("siglip/dual"), own)
    )
    assert model is None
    assert [each.code for each in found] == ["E0412"]


def test_two_tower_model_without_tokenizer_is_rejected() -> None:
    model, found = adopt_model("m", duals.bare("clip/dual"), support.processor("clip/dual"))
    assert model is None
    assert [each.code for each in found] == ["E0412"]
