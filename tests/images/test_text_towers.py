"""Texts scored with images, of models with two towers: rules in the text tower against plain hooks
on the bare model, one image and one text at a time, in 64 bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import mechdsl
from mechdsl.diagnostics.raised import MechdslError

from ..reference.hooks import Change
from ..rules.support import agree
from . import support, towers
from .support import copied
from .towers import NAMES, Seen, forward, inputs, pixels

QUICK = ("plain", "planned")
Writes = Mapping[tuple[str, int], Sequence[Change]]
TEXTS = ("the small circle", "a photo of the red square and cross", "the blue ring")
OTHERS = ("the small cross", "a photo of the red ring and cross", "the blue circle")
MARKED = ("circle", "square", "ring")
BLOCKS = """
images scenes {
  rows "data.jsonl"
  image "{file}"
}
images one {
  image gray
}
prompts captions {
  rows "texts.jsonl"
  image from scenes
  template "{before} {thing}{behind}"
  corrupt changed { thing = rival }
}
"""


def write_texts(folder: Path) -> None:
    records: list[dict[str, str]] = []
    for text, other, thing in zip(TEXTS, OTHERS, MARKED, strict=True):
        before, behind = text.split(f" {thing}")
        rival = other.removeprefix(f"{before} ").removesuffix(behind)
        records.append({"before": before, "thing": thing, "behind": behind, "rival": rival})
    text = "\n".join(map(json.dumps, records)) + "\n"
    (folder / "texts.jsonl").write_text(text, encoding="utf-8")


@cache
def plain(name: str, number: int | None, text: str) -> Seen:
    return forward(name, pixels(name, number), text, tower="text_model")


def score(name: str, number: int | None, text: str, writes: Writes) -> float:
    return forward(name, pixels(name, number), text, writes, tower="text_model").score


def place(name: str, number: int) -> int:
    """The token of what is marked: words are tokens."""
    before = TEXTS[number].split().index(MARKED[number])
    return before + (name != "siglip")


def length(name: str, number: int) -> int:
    return inputs(name, TEXTS[number])["input_ids"].shape[1]


def run(
    folder: Path,
    name: str,
    mode: str,
    lines: Sequence[str],
    axes: tuple[str, ...],
    cells: Sequence[tuple[object, ...]],
    writes: Callable[..., Writes],
    *,
    texts: Sequence[str] = TEXTS,
    blocks: str = BLOCKS,
    image: Callable[[int], int | None] = lambda number: number,
    large: float = 0.1,
) -> None:
    """writes: of a row's number and the cell's coordinates. texts: of the base run."""
    write_texts(folder)
    every = ("model m", "prompts captions", *lines, "measure score as delta", support.STATS)
    text = "experiment e {\n" + "\n".join(every) + "\n}\n"
    found = towers.run_file(text, folder, name, mode, blocks)["e"]
    expected = {
        tuple(cell): [score(name, image(n), texts[n], writes(n, *cell)) for n in range(3)]
        for cell in cells
    }
    start = np.array([score(name, image(n), texts[n], {}) for n in range(3)])
    agree(found, axes, expected, start, large=large, most=False)  # type: ignore[arg-type]


LAYERS = [(layer,) for layer in range(towers.LAYERS)]


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", [*NAMES, towers.OLD])
def test_a_word_is_put_into_another_text(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, layer: int) -> Writes:
        own = plain(name, number, TEXTS[number])
        return {("resid_post", layer): copied(own, "resid_post", layer, [place(name, number)])}

    lines = ["from clean into changed", "patch resid_post text layer * at thing token"]
    run(tmp_path, name, mode, lines, ("layer",), LAYERS, writes, texts=OTHERS)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_heads_of_all_tokens_are_left_out(name: str, mode: str, tmp_path: Path) -> None:
    """Padding is read by SigLIP, and is among all tokens."""

    def writes(number: int, layer: int, head: int) -> Writes:
        own = plain(name, number, TEXTS[number]).sites["z", layer]
        every = range(length(name, number))
        return {("z", layer): [Change(token, head, 0 * own[token, head]) for token in every]}

    lines = ["ablate z layer * head * at tokens * with zero"]
    cells = [(layer, head) for (layer,) in LAYERS for head in range(towers.HEADS)]
    run(tmp_path, name, mode, lines, ("layer", "head"), cells, writes)


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_attention_to_a_word_is_blocked(name: str, mode: str, tmp_path: Path) -> None:
    def writes(number: int, layer: int) -> Writes:
        seen = plain(name, number, TEXTS[number])
        q, k, v = (seen.sites[site, layer].transpose(0, 1) for site in ("q", "k", "v"))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        count = scores.shape[-1]
        if name != "siglip":
            scores = scores.masked_fill(~torch.ones(count, count).tril().bool(), -torch.inf)
        at = place(name, number)
        behind = [count - 1]
        scores[:, behind, at] = -torch.inf
        made = (scores.softmax(-1) @ v).transpose(0, 1)
        return {
            ("z", layer): [
                Change(query, head, made[query, head])
                for query in behind
                for head in range(towers.HEADS)
            ]
        }

    lines = ["block attention text layer * from token -1 to thing token"]
    run(tmp_path, name, mode, lines, ("layer",), LAYERS, writes)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_one_image_for_all_texts(name: str, tmp_path: Path) -> None:
    def writes(number: int) -> Writes:
        own = plain(name, None, TEXTS[number]).sites["mlp_out", 1]
        return {("mlp_out", 1): [Change(place(name, number), 0, 0 * own[0, 0])]}

    blocks = BLOCKS.replace("image from scenes", "image from one")
    lines = ["ablate mlp_out layer 1 at thing token with zero"]
    run(tmp_path, name, "planned", lines, (), [()], writes, blocks=blocks, image=lambda n: None)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_text_chooses_among_all_images(name: str, tmp_path: Path) -> None:
    """Also of the images of rows that aren't run."""
    write_texts(tmp_path)
    measures = ("rank(image)", "correct", "score(image)", "prob(image)")
    texts = [
        f"experiment e{n} {{ model m\n prompts captions\n measure {each} as raw }}\n"
        for n, each in enumerate(measures)
    ]
    blocks = BLOCKS.replace("  corrupt", '  where thing != "square"\n  corrupt')
    found = towers.run_file("".join(texts), tmp_path, name, blocks=blocks)
    scores = np.array([[score(name, n, text, {}) for n in range(3)] for text in TEXTS])[[0, 2]]
    own = scores[[0, 1], [0, 2]]
    softmax = np.exp(own) / np.exp(scores).sum(1)
    expected = [
        1 + (scores > own[:, None]).sum(1),
        (scores.argmax(1) == [0, 2]).astype(float),
        own,
        1 / (1 + np.exp(-own)) if name == "siglip" else softmax,
    ]
    for n, values in enumerate(expected):
        np.testing.assert_allclose(found[f"e{n}"].measures[0].patched[0], values, atol=2e-4)
    assert (scores[:, 1] > own).any(), "the image that no row has is never the better one"


FILE = """\
mech 1
model clip = local("clip")
BLOCKS
experiment e {
  model clip
  prompts captions
  from clean into changed
  patch resid_post layer 0 at thing token
  measure score as delta
  measure rank(image) as raw
}
"""


def write(folder: Path, blocks: str = BLOCKS) -> Path:
    support.write_images(folder)
    write_texts(folder)
    if not (folder / "clip").exists():
        for each in (towers.bare("clip"), towers.tokenizer("clip"), towers.images_of("clip")):
            each.save_pretrained(folder / "clip")
    (folder / "file.mech").write_text(FILE.replace("BLOCKS", blocks), encoding="utf-8")
    return folder / "file.mech"


def values(path: Path, **how: object) -> np.ndarray:
    results = mechdsl.run(path, **how)  # type: ignore[arg-type]
    return results["e"].measures[0].patched


def test_the_store_knows_the_images_that_texts_are_scored_with(tmp_path: Path) -> None:
    from PIL import Image

    store = tmp_path / "store"
    path = write(tmp_path)
    before = values(path, store=store)
    np.testing.assert_array_equal(values(path, store=store), before)
    handed = {"clip": (towers.bare("clip"), (towers.images_of("clip"), towers.tokenizer("clip")))}
    np.testing.assert_allclose(values(path, models=handed, store=False), before, atol=1e-5)
    Image.fromarray(255 - support.image(1)).save(tmp_path / "1.png")
    fresh = values(path, store=False)
    assert np.abs(fresh - before).max() > 0.01
    np.testing.assert_allclose(values(path, store=store), fresh, atol=1e-5)


def test_the_store_knows_images_that_no_row_has(tmp_path: Path) -> None:
    from PIL import Image

    def chosen(**how: object) -> np.ndarray:
        return mechdsl.run(path, **how)["e"].measures[0].patched  # type: ignore[arg-type]

    path = write(tmp_path, BLOCKS.replace("  corrupt", '  where thing != "square"\n  corrupt'))
    path.write_text(path.read_text().replace("score as delta", "prob(image) as raw"))
    before = chosen(store=tmp_path / "store")
    Image.fromarray(255 - support.image(1)).save(tmp_path / "1.png")
    fresh = chosen(store=False)
    assert np.abs(fresh - before).max() > 1e-3
    np.testing.assert_allclose(chosen(store=tmp_path / "store"), fresh, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "codes"),
    [
        ("  image from scenes\n", "", ["E0207"]),
        ("image from scenes", "image from scene", ["E0201"]),
        ("image from scenes", "image from captions", ["E0207"]),
        ('template "{before}', 'template "{image} {before}', ["E0108", "E0501"]),
        ("resid_post layer 0", "resid_post vision layer 0", ["E0207"]),
    ],
)
def test_what_is_refused(old: str, new: str, codes: list[str], tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(MechdslError) as refused:
        mechdsl.run(path, store=False)
    assert [e.code for e in refused.value.diagnostics if e.severity == "error"] == codes
