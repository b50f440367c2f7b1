"""The shipped image models have the accuracy of their cards, on held-out scenes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from safetensors import safe_open
from transformers import AutoModelForImageClassification, ViTForImageClassification

from mechdsl import zoo
from mechdsl.images.pixels import SHAPE_COLOURS, SHAPES, TEXTURES
from zoo import pictures
from zoo.shapes import evaluate as shapes
from zoo.shapes.data import CLASSES, GREY_SHARE, examples
from zoo.shapes.train import model_config

ROOT = Path(zoo.__path__[0])
NAMES = ("shapes", "dual")


def test_a_fifth_of_the_scenes_is_held_out() -> None:
    kept, trained = pictures.scenes(True), pictures.scenes(False)
    assert not {*kept} & {*trained}
    assert len({*kept, *trained}) == len(SHAPES) * len(SHAPE_COLOURS) * len(TEXTURES) == 180
    assert 0.15 < len(kept) / 180 < 0.25
    for place, names in enumerate((SHAPES, SHAPE_COLOURS, TEXTURES)):
        assert {scene[place] for scene in kept} == {scene[place] for scene in trained} == {*names}


@pytest.mark.parametrize("held_out", [False, True])
def test_images_show_requested_scenes_and_depend_only_on_the_seed(held_out: bool) -> None:
    drawn = pictures.images(3, 60, held_out=held_out)
    assert {pictures.scene_of(each) for each in drawn} <= {*pictures.scenes(held_out)}
    again = pictures.images(3, 60, held_out=held_out)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_in_grey_replaces_full_patches(share: float) -> None:
    [drawn] = pictures.images(0, 1, held_out=False)
    pixels = pictures.in_grey(drawn.pixels, share, default_rng(0))
    same = (pixels == drawn.pixels).all(-1).reshape(8, 4, 8, 4).swapaxes(1, 2).reshape(64, 16)
    grey = (pixels == pictures.GREY).all(-1).reshape(8, 4, 8, 4).swapaxes(1, 2).reshape(64, 16)
    assert (same.all(1) ^ grey.all(1)).all()
    assert grey.all(1).sum() == 64 * share


def test_training_starts_with_full_images_and_then_adds_grey_patches() -> None:
    given = list(islice(examples(5, 40), 440))
    greys = [(each.pixels == pictures.GREY).all(-1).mean() for each in given]
    assert max(greys[:40]) < 0.05
    assert np.mean(np.array(greys[40:]) > 0.05) == pytest.approx(GREY_SHARE * 0.95, abs=0.07)
    assert max(greys) > 0.97
    assert {each.label for each in given} == {*range(len(CLASSES))}


def test_patch_labels_name_the_shape_where_it_is() -> None:
    for drawn, given in zip(pictures.images(2, 30, held_out=False), examples(2, 30), strict=False):
        assert np.array_equal(drawn.pixels, given.pixels)
        assert CLASSES[given.label] == drawn.kind
        for number, said in enumerate(given.patches):
            row, column = divmod(number, 8)
            inside = drawn.mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum()
            assert said == (given.label if inside >= pictures.PART else len(CLASSES))


def test_image_model_starts_with_position_embeddings_and_keys_equal_to_queries() -> None:
    """Near patches have similar positions, far ones don't; the class token has none."""
    model: Any = ViTForImageClassification(model_config())
    if not hasattr(model.vit, "layers"):
        pytest.skip("transformers had other names, and training needs a new one")
    positions = model.vit.embeddings.position_embeddings
    pictures.begin_with_places(positions)
    pictures.begin_alike(model)
    places = positions.detach()[0, 1:]
    alike = (places @ places.T).reshape(8, 8, 8, 8)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        near = alike[row, column]
        assert near.argmax() == 8 * row + column
        assert near[abs(row - 1), column] > near[(row + 4) % 8, column]
        assert near[row, abs(column - 1)] > near[row, (column + 4) % 8]
    assert not positions[0, 0].any()
    assert len(model.vit.layers) == 6
    for layer in model.vit.layers:
        assert torch.equal(layer.attention.q_proj.weight, layer.attention.k_proj.weight)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_preprocessor_config_equals_training_inputs(name: str) -> None:
    """Read from its file, as torchvision may not be installed."""
    [drawn] = pictures.images(0, 1, held_out=False)
    said = json.loads((ROOT / name / "preprocessor_config.json").read_text())
    assert said["size"] == {"height": 32, "width": 32}
    scaled = drawn.pixels * said["rescale_factor"]
    wanted = (scaled - np.array(said["image_mean"])) / np.array(said["image_std"])
    given = pictures.as_input([drawn.pixels])
    assert given.shape == (1, 3, 32, 32)
    assert given.dtype == torch.float32
    np.testing.assert_allclose(given[0].permute(1, 2, 0), wanted, atol=1e-6)


@pytest.mark.slow
def test_shapes_accuracy_on_held_out_scenes() -> None:
    torch.set_num_threads(1)
    tallies = shapes.evaluate(ROOT / "shapes", 150, shapes.SEED)
    assert tallies[shapes.HELD_OUT].interval()[0] > 0.95
    assert tallies[shapes.SHAPE].share > 0.9, "the shape's patches alone don't tell it"
    assert tallies[shapes.REST].share < 0.3, "something else than the shape tells it"
    assert tallies[shapes.HALF].share > tallies[shapes.MOST].share


def test_shapes_on_a_grey_image_has_no_preference() -> None:
    found = shapes.grey_image(ROOT / "shapes")
    assert set(found) == set(SHAPES)
    assert max(found.values()) < 0.25
    assert min(found.values()) > 0.10


def test_transformers_loads_shapes_with_its_labels() -> None:
    """With transformers' classes and the labels of the configuration."""
    model: Any = AutoModelForImageClassification.from_pretrained(ROOT / "shapes").float()
    drawn = pictures.images(1, 12, held_out=True)
    with torch.no_grad():
        best = model(pixel_values=pictures.as_input([each.pixels for each in drawn])).logits
    said = [model.config.id2label[number] for number in best.argmax(-1).tolist()]
    assert np.mean([a == b.kind for a, b in zip(said, drawn, strict=True)]) > 0.9
    assert model.config.num_hidden_layers >= 6


@pytest.mark.parametrize("name", NAMES)
def test_image_model_weights_are_stored_in_float16(name: str) -> None:
    with safe_open(ROOT / name / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_image_model_cards_have_all_sections(name: str) -> None:
    card = (ROOT / name / "README.md").read_text(encoding="utf-8")
    for part in ("## Images", "## Training", "## Accuracy", "## Limitations", "licence"):
        assert part in card
    assert (ROOT / name / "LICENSE").exists()
