"""Scores of images with texts, of models with two towers: what a file measures, and rules in the
image tower, against plain hooks on the bare model, one image and one text at a time, in 64 bits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import mechdsl
from mechdsl.diagnostics.raised import MechdslError
from mechdsl.loading.load import adopt

from ..reference.hooks import Change
from ..rules.support import agree
from . import support, towers
from .support import copied
from .towers import FRONT, GRID, NAMES, Seen, answer, forward, pixels, wrong

QUICK = ("plain", "planned")
PATCHES = [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]
EVERY = [f"image row {row} col {col}" for row, col in PATCHES]
Writes = Mapping[tuple[str, int], Sequence[Change]]
DIFFERENCE = "measure score(answer) - score(wrong) as delta"
CLASSES = ("a photo of a circle", "a photo of a ring", "a photo of a square")


@cache
def plain(name: str, number: int | None, text: str) -> Seen:
    return forward(name, pixels(name, number), text)


def tokens(name: str) -> list[int]:
    """Of the patches."""
    return [FRONT[name] + n for n in range(GRID * GRID)]


def difference(name: str, image: int | None, number: int, writes: Writes) -> float:
    """`score(answer) - score(wrong)` of a row, of its own image or another one."""
    first, second = (
        forward(name, pixels(name, image), text, writes).score
        for text in (answer(number), wrong(number))
    )
    return first - second


def run(
    folder: Path,
    name: str,
    mode: str,
    lines: Sequence[str],
    axes: tuple[str, ...],
    cells: Sequence[tuple[object, ...]],
    writes: Callable[..., Writes],
    *,
    into_gray: bool = True,
    large: float = 0.1,
) -> None:
    """writes: of a row's number and the cell's coordinates."""
    text = support.experiment("e", *lines, measure=DIFFERENCE)
    found = towers.run_file(text, folder, name, mode)["e"]
    images = [None if into_gray else number for number in range(3)]
    expected = {
        tuple(cell): [difference(name, images[n], n, writes(n, *cell)) for n in range(3)]
        for cell in cells
    }
    start = np.array([difference(name, images[n], n, {}) for n in range(3)])
    agree(found, axes, expected, start, large=large, most=False)  # type: ignore[arg-type]


def attended(seen: Seen, layer: int, at: Sequence[int], without: Sequence[int]) -> list[Change]:
    """`z` where some queries don't attend to some keys, from queries, keys and values."""
    q, k, v = (seen.sites[site, layer].transpose(0, 1) for site in ("q", "k", "v"))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    for query in at:
        scores[:, query, list(without)] = -torch.inf
    made = (scores.softmax(-1) @ v).transpose(0, 1)
    return [Change(query, head, made[query, head]) for query in at for head in range(len(q))]


INTO_GRAY = "from scenes into neutral"


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize(
    "name", ["clip", "siglip", pytest.param("metaclip_2", marks=pytest.mark.slow)]
)
def test_patches_of_an_image_go_into_a_gray_one(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, label: str) -> Writes:
        token = tokens(name)[EVERY.index(label)]
        own = plain(name, number, answer(number))
        return {
            ("resid_post", layer): copied(own, "resid_post", layer, [token]) for layer in (0, 1)
        }

    lines = [INTO_GRAY, "patch resid_post vision layers 0..1 at each token of image"]
    cells = [(label,) for label in EVERY]
    run(tmp_path, name, mode, lines, ("position",), cells, writes)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Softmax over the classes, or the model's sigmoid; texts beside them are in no choice."""
    lines = ["ablate resid_post layer 0 at image row 2 col * tokens with zero"]
    measures = (
        "score(answer)", "logit(answer)", "prob(answer)", "rank(answer)", "correct",
        'score("the small red cross")', "loss(answer)",
    )  # fmt: skip
    text = "".join(
        support.experiment(f"e{n}", *lines, measure=f"measure {each} as raw")
        for n, each in enumerate(measures)
    )
    found = towers.run_file(text, tmp_path, name)
    at = [support.token("clip", 2, col) - 1 + FRONT[name] for col in range(1, GRID + 1)]
    zero = plain(name, 0, answer(0)).sites["resid_post", 0][0, 0] * 0
    writes = {("resid_post", 0): [Change(token, 0, zero) for token in at]}
    values: list[list[float]] = []
    for number in range(3):
        score = {
            each: forward(name, pixels(name, number), each, writes).score
            for each in (*CLASSES, "the small red cross")
        }
        own, every = score[answer(number)], np.array([score[each] for each in CLASSES])
        softmax = np.exp(own) / np.exp(every).sum()
        prob = 1 / (1 + np.exp(-own)) if name == "siglip" else softmax
        rank = 1 + (every > own).sum()
        other = score["the small red cross"]
        values.append([own, own, prob, rank, float(rank == 1), other, -np.log(prob)])
    for n, _ in enumerate(measures):
        np.testing.assert_allclose(
            found[f"e{n}"].measures[0].patched[0], np.array(values)[:, n], atol=2e-4, rtol=1e-4
        )
    assert np.ptp(np.array(values), axis=0)[:3].min() > 0.01


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_heads_of_the_class_token_or_of_patches(name: str, mode: str, tmp_path: Path) -> None:
    rows = [FRONT[name] + n for n in range(GRID)]
    at = "image row 1 col * tokens"

    def writes(number: int, layer: int, head: int) -> Writes:
        own = plain(name, number, answer(number)).sites["z", layer]
        return {("z", layer): [Change(token, head, 0 * own[token, head]) for token in rows]}

    lines = [f"ablate z vision layer * head * at {at} with zero"]
    cells = [(layer, head) for layer in range(3) for head in range(4)]
    run(
        tmp_path, name, mode, lines, ("layer", "head"), cells, writes, into_gray=False, large=0.05
    )  # fmt: skip


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["siglip", "metaclip_2"])
def test_attention_between_patches_is_blocked(name: str, mode: str, tmp_path: Path) -> None:
    keys = [FRONT[name] + GRID + n for n in range(GRID)]

    def writes(number: int, layer: int) -> Writes:
        seen = plain(name, number, answer(number))
        return {("z", layer): attended(seen, layer, tokens(name), keys)}

    lines = ["block attention vision layer * from image tokens to image row 2 col * tokens"]
    cells = [(layer,) for layer in range(3)]
    run(tmp_path, name, mode, lines, ("layer",), cells, writes, into_gray=False, large=0.05)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_direction_is_added_and_neurons_are_set(name: str, mode: str, tmp_path: Path) -> None:
    blocks = (
        towers.BLOCKS
        + "direction d = mean_difference(scenes, neutral) at resid_post layer 1 at image tokens\n"
    )
    lines = [
        "add 2 * d to resid_post vision layer 1 at image row 1 col 4 token",
        "set mlp_hidden layer 0 neuron 5 at image row 3 col 2 token to 4",
    ]
    text = support.experiment("e", *lines, measure=DIFFERENCE)
    found = towers.run_file(text, tmp_path, name, mode, blocks)["e"]
    own = [
        plain(name, n, answer(n)).sites["resid_post", 1][tokens(name), 0].mean(0) for n in range(3)
    ]
    gray = plain(name, None, answer(0)).sites["resid_post", 1][tokens(name), 0].mean(0)
    direction = torch.stack(own).mean(0) - gray
    at, neuron = tokens(name)[3], tokens(name)[2 * GRID + 1]
    expected: list[float] = []
    for number in range(3):
        four = plain(name, number, answer(number)).sites["mlp_hidden", 0][neuron, 5] * 0 + 4
        first: Writes = {("mlp_hidden", 0): [Change(neuron, 5, four)]}
        before = forward(name, pixels(name, number), answer(number), first)
        steered = before.sites["resid_post", 1][at, 0] + 2 * direction
        both = {**first, ("resid_post", 1): [Change(at, 0, steered)]}
        expected.append(difference(name, number, number, both))
    start = np.array([difference(name, number, number, {}) for number in range(3)])
    agree(found, (), {(): expected}, start, most=False)  # type: ignore[arg-type]


# --- models in folders, the store, what is refused ------------------------------------------------

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


def write(folder: Path, name: str = "clip", blocks: str = towers.BLOCKS) -> Path:
    support.write_images(folder)
    if not (folder / "clip").exists():
        towers.bare(name).save_pretrained(folder / "clip")
        towers.tokenizer(name).save_pretrained(folder / "clip")
        towers.images_of(name).save_pretrained(folder / "clip")
    (folder / "file.mech").write_text(FILE.replace("BLOCKS", blocks), encoding="utf-8")
    return folder / "file.mech"


def values(path: Path, measure: int = 0, **how: object) -> np.ndarray:
    results = mechdsl.run(path, **how)  # type: ignore[arg-type]
    return results["e"].measures[measure].patched


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_model_in_a_folder_is_the_one_in_python(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    handed = {"clip": (towers.bare(name), (towers.images_of(name), towers.tokenizer(name)))}
    own = values(path, store=False)
    np.testing.assert_allclose(own, values(path, models=handed, store=False), atol=1e-5)
    assert np.ptp(own) > 0.1


def test_a_processor_of_images_and_texts_is_one_file(tmp_path: Path) -> None:
    """As the library writes it, and before the file of images alone, which is older."""
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


def test_the_store_knows_what_images_are_scored_with(tmp_path: Path) -> None:
    store = tmp_path / "store"
    path = write(tmp_path)
    before = [values(path, n, store=store) for n in (0, 1)]
    np.testing.assert_array_equal(values(path, store=store), before[0])
    changed = towers.BLOCKS.replace('"the {other}"', '"the small {other}"')
    write(tmp_path, blocks=changed)
    fresh = values(path, store=False)
    assert np.abs(fresh - before[0]).max() > 0.01
    np.testing.assert_allclose(values(path, store=store), fresh, atol=1e-5)
    write(tmp_path, blocks=towers.BLOCKS.replace('classes "a photo', 'classes "the photo'))
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(path, store=store)
    assert "E0442" in [each.code for each in refused.value.diagnostics]


def test_classes_are_all_values_whichever_rows_there_are(tmp_path: Path) -> None:
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
    found = towers.run_file(text, tmp_path, "clip", blocks=blocks)["e"]
    said = found.conventions["classes"]
    assert said.startswith("3 texts: `a circle`, `a square`, `a cross`;")
    assert "softmax" in said
    assert found.conventions["texts"].startswith("3, each encoded once")


PROB = "measure prob(answer) as raw"


def test_texts_that_are_too_long_are_refused(tmp_path: Path) -> None:
    long = towers.BLOCKS.replace('"the {other}"', f'"the {"small " * 11}{{other}}"')
    text = support.experiment("e", "ablate embed at image tokens with zero", measure=DIFFERENCE)
    _, found = towers.try_file(text, tmp_path, "clip", blocks=long)
    assert [each.code for each in found if each.severity == "error"] == ["E0511"]


def test_scores_that_the_model_changes_itself_are_refused() -> None:
    class CLIPModel(transformers.CLIPModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found: Any = super().forward(*args, **kwargs)
            found.logits_per_image = found.logits_per_image + 0.3
            return found

    module = CLIPModel(towers.bare("clip").config)
    module.load_state_dict(towers.bare("clip").state_dict())
    pair = (towers.images_of("clip"), towers.tokenizer("clip"))
    model, found = adopt("m", module, pair)
    assert model is None
    assert [each.code for each in found] == ["E0410"]
    assert "scores" in found[0].message


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_in_sixteen_bits(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    wide, short = (values(path, store=False, dtype=each) for each in ("float32", "bfloat16"))
    scale = float(towers.bare(name).logit_scale.exp())
    assert 0 < np.abs(wide - short).max() < 0.05 * scale


def test_siglip_needs_a_token_for_padding() -> None:
    own = copy.deepcopy(towers.tokenizer("siglip"))
    own.pad_token = None
    model, found = adopt("m", towers.bare("siglip"), (towers.images_of("siglip"), own))
    assert model is None
    assert [each.code for each in found] == ["E0412"]


def test_an_image_processor_alone_is_refused() -> None:
    model, found = adopt("m", towers.bare("clip"), towers.images_of("clip"))
    assert model is None
    assert [each.code for each in found] == ["E0412"]
