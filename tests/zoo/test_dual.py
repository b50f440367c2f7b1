"""The shipped dual encoder matches images and captions of held-out scenes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.random import default_rng
from tokenizers import Tokenizer
from transformers import (
    AutoModelForZeroShotImageClassification,
    AutoTokenizer,
    CLIPModel,
    ViTForImageClassification,
)

from mechdsl import zoo
from zoo import pictures
from zoo.dual import evaluate as dual
from zoo.dual.data import WHOLE_SHARE, alike, caption, fits, told, vocabulary
from zoo.dual.train import begin_with_shapes, build_tokenizer, contrast, encode, model_config

ROOT = Path(zoo.__path__[0])


def test_captions_describe_a_full_scene_or_part_of_it() -> None:
    scene = ("ring", "cyan", "dots")
    assert caption(*scene) == "a cyan ring on dots"
    random = default_rng(0)
    said = [caption(*told(scene, random)) for _ in range(400)]
    parts = {"a ring", "a cyan ring", "a ring on dots"}
    assert {*said} == {*parts, caption(*scene)}
    assert said.count(caption(*scene)) / 400 == pytest.approx(WHOLE_SHARE, abs=0.07)
    assert fits(("ring", "", "dots"), scene)
    assert not fits(("ring", "", "bars"), scene)
    assert not fits(("circle", "cyan", "dots"), scene)


def test_similar_scenes_differ_in_their_texture() -> None:
    random, known = default_rng(0), set(pictures.scenes(False))
    for _ in range(5):
        found = alike(random)
        assert len(found) == len({*found})
        assert known.issuperset(found)
        groups = Counter(scene[:2] for scene in found)
        assert len(groups) == 12
        assert max(groups.values()) <= 4
        assert sorted(groups.values())[6] >= 3


def test_captions_have_known_words_and_an_end_token() -> None:
    tokenizer = build_tokenizer()
    for scene in (*pictures.scenes(False), *pictures.scenes(True)):
        tokens = tokenizer.encode(caption(*scene)).tokens
        assert tokens == ["<s>", *caption(*scene).split(), "<end>"]
        assert "<unk>" not in tokens
    assert len(vocabulary()) == len({*vocabulary()})
    shipped = Tokenizer.from_file(str(ROOT / "dual" / "tokenizer.json"))
    assert shipped.to_str() == tokenizer.to_str()


def test_contrastive_loss_ignores_other_true_captions() -> None:
    scores = torch.tensor([[2.0, 9.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 2.0]])
    true = torch.zeros(3, 3, dtype=torch.bool)
    true[0, 1] = True
    rows = [[2.0, 1.0], [3.0, 0.0, 1.0], [2.0, 1.0, 0.0]]
    columns = [[2.0, 0.0, 1.0], [3.0, 0.0], [2.0, 1.0, 1.0]]
    losses = [-torch.tensor(each).log_softmax(0)[0] for each in (*rows, *columns)]
    assert contrast(scores, true) == pytest.approx(float(sum(losses)) / 6)


def test_dual_accuracy_on_held_out_scenes() -> None:
    torch.set_num_threads(1)
    tallies = dual.evaluate(ROOT / "dual", 72, dual.SEED)
    for name in (dual.KIND, dual.COLOUR):
        assert tallies[name].interval()[0] > 0.9, name
    assert tallies[dual.TEXTURE].interval()[0] > 0.5
    assert tallies[dual.CAPTION].interval()[0] > 0.6
    assert tallies[dual.IMAGE].interval()[0] > 0.8


def test_transformers_loads_dual_with_its_tokenizer() -> None:
    """With its tokenizer, which pads after captions and returns an attention mask."""
    model: Any = AutoModelForZeroShotImageClassification.from_pretrained(ROOT / "dual").float()
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "dual")
    texts = ["a ring", "a red circle on stripes", "a cyan cross"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    own = encode(build_tokenizer(), texts, vocabulary().index("<pad>"))
    assert torch.equal(given["input_ids"], own["input_ids"])
    assert torch.equal(given["attention_mask"], own["attention_mask"])
    pixels = pictures.as_input([each.pixels for each in pictures.images(1, 4, held_out=True)])
    with torch.no_grad():
        together = model(pixel_values=pixels, **own).logits_per_image
        alone = encode(build_tokenizer(), texts[:1], 0)
        one = model(pixel_values=pixels, **alone).logits_per_image[:, 0]
    torch.testing.assert_close(together[:, 0], one, atol=1e-3, rtol=1e-4)


def test_dual_encoder_starts_with_the_layers_of_shapes() -> None:
    """Given equal inputs, its layers have the same outputs as the layers of `shapes`."""
    model: Any = CLIPModel(model_config())
    source: Any = pictures.load(ViTForImageClassification, ROOT / "shapes")
    if not hasattr(source.vit, "layers"):
        pytest.skip("transformers had other names, and training needs a new one")
    begin_with_shapes(model.vision_model)
    pixels = pictures.as_input([each.pixels for each in pictures.images(1, 2, held_out=True)])
    with torch.no_grad():
        known = source(pixel_values=pixels, output_hidden_states=True).hidden_states
        given = model.vision_model.embeddings(pixels)
        torch.testing.assert_close(given, known[0], atol=1e-5, rtol=1e-5)
        for number, layer in enumerate(model.vision_model.encoder.layers):
            found = layer(known[number], attention_mask=None)
            found = found[0] if isinstance(found, tuple) else found
            torch.testing.assert_close(
                found, known[number + 1], atol=0.01, rtol=0
            )  # norms differ in eps
