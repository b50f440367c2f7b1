"""Families of vision-language models, with tiles and marker tokens within images, against plain
hooks on the bare model with its processor."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import cache, cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import IMAGE_LAYOUTS, ImageTokens, image_layout
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.loading.identity import digest_module
from mechdsl.loading.loader import adopt_model
from mechdsl.prompts.tokens import image_prompts
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer, read_prompt_tokenizer
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, run_on
from ..families import build
from ..images import prompts_of_images as vlm
from ..quick import some
from ..shared_models import unchanged
from .reference import Bare, Edit, OpenEdit, at, followed
from .support import RECORDS, STATS, experiment, folder_of, succeeded, write_data

NAMES = (
    "llava_class",
    "vipllava",
    "video_llava",
    "llava_next",
    "llava_onevision",
    "idefics2",
    "idefics3",
    "smolvlm",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "paligemma",
    "paligemma2",
)
QUICK = ("video_llava", "idefics3", "internvl", "qwen2_5_vl", "gemma3", "paligemma")
"""Families that differ most in how they lay out, number and attend to the tokens of images."""
IN_A_GRID = [name for name in NAMES if name != "idefics2"]
"""Families whose image tokens have rows and columns."""
WORDS = ("w1", "w2 w1", "w3 w1 w2", "w2")
BLOCK = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  words = if n = 1 then "w1" else if n = 2 then "w2 w1" else if n = 3 then "w3 w1 w2" else "w2"
  template "w3 w2 {photo} w1 {words} w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other }
}
"""


@cache
def folder() -> Path:
    made = Path(mkdtemp(prefix="mechdsl-families-"))
    write_data(made)
    return made


@cache
def bare(name: str) -> Bare:
    return Bare(draw(name), vlm.processor(name))


def draw(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A model with large weights, whose replies contain no images."""
    overrides = {**vlm.FAMILIES[name].overrides, **overrides}
    model: Any = build.model(vlm.architecture(name), seed, **overrides)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(3 if "embed" in path else 2)
        head: Any = model.get_output_embeddings()
        words = {*vlm.WORDS.values()}
        if vlm.FAMILIES[name].before_end:  # nor further ends of the prompt
            words = {vlm.WORDS[each] for each in ("w1", "w2", "w3")}
        head.weight[[n for n in range(len(head.weight)) if n not in words]] = 0
    return model


@cache
def loaded(name: str) -> LoadedModel:
    model, found = adopt_model("m", bare(name).model, bare(name).processor)
    assert model is not None, found
    return unchanged(model)


@cache
def inputs(name: str, number: int, image: int) -> dict[str, Tensor]:
    return inputs_of(name, WORDS[number], image)


def inputs_of(name: str, words: str, image: int) -> dict[str, Tensor]:
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    marker = vlm.FAMILIES[name].marker
    text = f"w3 w2 {marker} w1 {words} w3{vlm.FAMILIES[name].before_end}"
    return bare(name).with_pictures(text, [picture])


@cache
def layout_of(name: str, number: int, image: int) -> ImageTokens:
    size = Image.open(folder() / f"{image}.png").size[::-1]
    own = bare(name)
    [found] = image_layout(own.processor, own.model.config, inputs(name, number, image), [size])
    return found


def cells(name: str, number: int, image: int) -> dict[tuple[int, int], int]:
    """Row and column → position in the prompt, without the thumbnail of tiles."""
    found = layout_of(name, number, image)
    tiles = [cell for cell in found.cells if cell.tile != 0] or found.cells
    return {(cell.row, cell.col): cell.position for cell in tiles}


def every_cell(name: str, number: int, image: int) -> list[int]:
    return [cell.position for cell in layout_of(name, number, image).cells]


def tile_cells(name: str, number: int, image: int, tile: int) -> list[list[int]]:
    """Positions of a tile's cells, row by row."""
    own = [cell for cell in layout_of(name, number, image).cells if cell.tile == tile]
    rows = sorted({cell.row for cell in own})
    return [[cell.position for cell in own if cell.row == row] for row in rows]


def difference(logits: Tensor) -> float:
    words = logits[..., [vlm.WORDS["w1"], vlm.WORDS["w2"]]]
    first, second = words.reshape(-1, 2)[-1]
    return float(first - second)


@cache
def blocks(name: str, number: int, image: int) -> list[Tensor]:
    return bare(name).states(inputs(name, number, image))["blocks"]


Run = Callable[[str, int], Tensor]
ALL = range(len(RECORDS))


def under_edits(name: str, opened: OpenEdit, edit: Callable[[int], Edit]) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    found: list[float] = []
    for n in ALL:
        with opened(edit(n)):
            found.append(difference(bare(name).run(inputs(name, n, (n + 1) % 4))))
    return found


def one_cell(name: str, n: int) -> Tensor:
    other = (n + 1) % 4
    value = blocks(name, n, n)[0][cells(name, n, n)[1, 2]]
    edit = at([cells(name, n, other)[1, 2]], value)
    return bare(name).run(inputs(name, n, other), blocks={0: edit})


def all_cells(name: str, n: int) -> Tensor:
    other = (n + 1) % 4
    edit = at(every_cell(name, n, other), torch.zeros(()))
    return bare(name).run(inputs(name, n, other), blocks={0: edit})


def last_token(name: str, n: int) -> Tensor:
    edit = at([-1], blocks(name, n, n)[1][-1])
    return bare(name).run(inputs(name, n, (n + 1) % 4), blocks={1: edit})


CASES: dict[str, tuple[str, Run]] = {
    "one cell": ("patch resid_post layer 0 at photo row 1 col 2 token", one_cell),
    "all cells": ("ablate resid_post layer 0 at photo tokens with zero", all_cells),
    "last token": ("patch resid_post layer 1 at last token", last_token),
}


def values(run: Run, name: str) -> Sequence[float]:
    return [difference(run(name, n)) for n in ALL]


def run_text(
    name: str,
    text: str,
    mode: str = "planned",
    block: str = BLOCK,
    model: LoadedModel | None = None,
) -> list[ExperimentResult]:
    """The results of a file on a block, rows in the order of the data.

    model: the family's model; by default, one that other tests use too.
    """
    if vlm.FAMILIES[name].before_end:  # its prompts end with a line break
        block = block.replace(' w3"\n', ' w3 \\n"\n')
    source = Source(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', folder() / "f.mech")
    models = {"m": loaded(name) if model is None else model}
    return list(succeeded(*run_on(source, models, MODES[mode])).values())


@pytest.mark.parametrize("name", NAMES)
def test_image_processor_draws_no_random_numbers(name: str) -> None:
    """Pixels, which are stored by the content of the image, don't depend on a seed."""
    picture = Image.open(folder() / "1.png").convert("RGB")
    marker, end = vlm.FAMILIES[name].marker, vlm.FAMILIES[name].before_end

    def states() -> tuple[object, ...]:
        numbers = np.random.get_state()
        return torch.get_rng_state().tolist(), str(numbers), random.getstate()

    before = states()
    vlm.processor(name)(text=[f"w1 {marker} w2{end}"], images=[[picture]], return_tensors="pt")
    assert states() == before


@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_at_image_tokens_of_each_family_equal_hooks(name: str, mode: str) -> None:
    """All rules in one file, each with an effect of more than 0.1."""
    due = {key: case for key, case in CASES.items() if key != "one cell" or name != "idefics2"}
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule)
        for n, (rule, _) in enumerate(due.values())
    )
    experiments = run_text(name, text, mode)
    base = [difference(bare(name).run(inputs(name, n, (n + 1) % 4))) for n in ALL]
    largest = 0.0
    for found, (_, run) in zip(experiments, due.values(), strict=True):
        measure, expected = found.measures[0], values(run, name)
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4)
        largest = max(largest, float(np.abs(np.array(expected) - base).max()))
    assert largest > 0.1


def lens(name: str, n: int, layer: int, token: int) -> float:
    """The difference of logits if a token's vector after a layer is that after the last one."""
    vectors = blocks(name, n, n)
    edit = at([token], vectors[layer][token])
    return difference(bare(name).run(inputs(name, n, n), blocks={len(vectors) - 1: edit})[[token]])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["planned", "padded on the right"])
@pytest.mark.parametrize("name", some(IN_A_GRID, ("qwen2_5_vl", "paligemma2")))
def test_logit_lens_at_image_tokens_equals_the_last_layer(name: str, mode: str) -> None:
    line = "observe logit_lens resid_post layer * at photo row 1 col 1 token, last token"
    measure = "measure logit(answer) - logit(wrong) as raw"
    [found] = run_text(name, experiment("e", line, measure=measure), mode)
    largest = 0.0
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        layer = int(cell.coords["layer"])
        last = cell.coords["position"] == "last token"
        tokens = [-1 if last else cells(name, n, n)[1, 1] for n in ALL]
        expected = [lens(name, n, layer, token) for n, token in enumerate(tokens)]
        np.testing.assert_allclose(values, expected, atol=1e-4, err_msg=str(cell.coords))
        largest = max(largest, float(np.abs(expected).max()))
    assert largest > 0.1


@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl",)))
def test_direct_logits_of_all_components_sum_to_the_logits(name: str) -> None:
    sites = ("resid_pre layer 0", "attn_out layer *", "mlp_out layer *")
    lines = (f"observe direct_logit {site} toward answer - wrong at last token" for site in sites)
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    parts = [row for each in run_text(name, text) for row in each.measures[0].patched]
    logits = [bare(name).run(inputs(name, n, n))[-1] for n in ALL]
    cap = getattr(bare(name).model.config.text_config, "final_logit_softcapping", None)
    expected = [difference(cap * torch.atanh(each / cap) if cap else each) for each in logits]
    np.testing.assert_allclose(np.sum(parts, axis=0), expected, atol=1e-4)
    assert np.abs(parts[-1]).max() > 0.05


EVERY = slice(None)
VIEWS: dict[str, list[tuple[int, slice, slice]]] = {
    "photo tile 1 tokens": [(1, EVERY, EVERY)],
    "photo tile 2 row 2 col 1 token": [(2, slice(1, 2), slice(1))],
    "photo tile 1..2 row 1 col * tokens": [(1, slice(1), EVERY), (2, slice(1), EVERY)],
    "photo thumbnail row 1..2 col 2 tokens": [(0, EVERY, slice(1, 2))],
    "each token of photo thumbnail": [
        (0, slice(row, row + 1), slice(col, col + 1)) for row in range(2) for col in range(2)
    ],
    "photo tile t tokens": [(t, EVERY, EVERY) for t in range(1, 5)],
}
"""Position → tile, rows and columns; several are cells, or joined after `tokens`."""


def without(name: str, n: int, where: list[tuple[int, slice, slice]]) -> float:
    """The difference with zeros at parts of tiles; NaN if the image lacks one."""
    parts = [(tile_cells(name, n, n, tile), rows, cols) for tile, rows, cols in where]
    tokens = [t for grid, rows, cols in parts for row in grid[rows] for t in row[cols]]
    if not all(grid for grid, _, _ in parts):
        return float("nan")
    edit = at(tokens, torch.zeros(()))
    return difference(bare(name).run(inputs(name, n, n), blocks={0: edit}))


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "internvl"])
def test_rules_at_tiles_and_thumbnails_equal_hooks(name: str) -> None:
    """A `for` over tiles skips images with fewer tiles."""
    rules = {at: f"ablate resid_post layer 0 at {at} with zero" for at in VIEWS}
    rules["photo tile t tokens"] = "for t in 1..4 { " + rules["photo tile t tokens"] + " }"
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules.values()))
    experiments = run_text(name, text)
    for found, (position, views) in zip(experiments, VIEWS.items(), strict=True):
        apart = "for" in rules[position] or position.startswith("each")
        cells = [[view] for view in views] if apart else [views]
        expected = [[without(name, n, cell) for n in ALL] for cell in cells]
        measure = found.measures[0]
        np.testing.assert_allclose(measure.patched, expected, atol=1e-4, err_msg=position)
        assert np.nanmax(np.abs(np.array(expected) - measure.base[0])) > 0.1
    labels = [cell.coords["position"] for cell in experiments[4].cells]
    assert labels == [f"photo thumbnail row {row} col {col}" for row in (1, 2) for col in (1, 2)]


# --- several images and replies in families whose images aren't only vectors ----------------------

EVERY_MODE = ("planned", "padded on the right", "plain", "small passes")
PLACED = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "paligemma2"),
    "llava_onevision",
)
"""Families that number the tokens of images by row and column, add vectors of images in several
layers, let tokens of an image attend to later ones, or prepare several images in another way."""
TWO = """
prompts both {
  rows "data.jsonl"
  image one = "{file}"
  image two = "{other}"
  words = if n = 1 then "w1" else if n = 2 then "w2 w1" else if n = 3 then "w3 w1 w2" else "w2"
  template "w3 {one} w1 {words} {two} w2 w3"
  answer " w1 w2"
  wrong " w2 w2"
  corrupt changed { swap one, two }
}
"""


@cache
def both(
    name: str, number: int, *, swapped: bool = False, is_equal: bool = False
) -> dict[str, Tensor]:
    files = (number, number if is_equal else (number + 1) % 4)
    pictures = [
        Image.open(folder() / f"{each}.png").convert("RGB")
        for each in (files[::-1] if swapped else files)
    ]
    marker = vlm.FAMILIES[name].marker
    end = vlm.FAMILIES[name].before_end
    text = f"w3 {marker} w1 {WORDS[number]} {marker} w2 w3{end}"
    return bare(name).with_pictures(text, pictures)


def second_cell(name: str, number: int, *, swapped: bool = False) -> int:
    """The position of `two row 1 col 2 token`."""
    files = (number, (number + 1) % 4)
    sizes = [Image.open(folder() / f"{each}.png").size[::-1] for each in files]
    own, given = bare(name), both(name, number, swapped=swapped)
    ordered = sizes[::-1] if swapped else sizes
    [_, found] = image_layout(own.processor, own.model.config, given, ordered)
    return next(cell.position for cell in found.cells if (cell.row, cell.col) == (1, 2))


def patched_cell(name: str, n: int) -> Callable[[Tensor], Tensor]:
    """Copy a token of the second image into the prompt with swapped images."""
    value = bare(name).states(both(name, n))["blocks"][0][second_cell(name, n)]
    return at([second_cell(name, n, swapped=True)], value)


def continued(name: str, n: int) -> float:
    """log p(answer) - log p(wrong) of two tokens, under the patch."""
    inputs = both(name, n, swapped=True)
    length = inputs["input_ids"].shape[1]
    edit = patched_cell(name, n)
    found: list[float] = []
    for first, second in (("w1", "w2"), ("w2", "w2")):
        ids = [vlm.WORDS[first], vlm.WORDS[second]]
        logits = bare(name).run(followed(inputs, ids[:1]), blocks={0: edit})
        logs = logits[length - 1 :].log_softmax(-1)
        found.append(float(logs[0, ids[0]] + logs[1, ids[1]]))
    return found[0] - found[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", some(EVERY_MODE, EVERY_MODE[:2]))
@pytest.mark.parametrize("name", some(PLACED, ("qwen2_5_vl", "qwen3_vl", "paligemma")))
def test_two_images_with_completions_and_long_answers_equal_hooks(name: str, mode: str) -> None:
    """Texts after and between images of several sizes, in two experiments of one file."""
    rule = "patch resid_post layer 0 at two row 1 col 2 token"
    lines = ("from clean into changed", rule)
    shared = "model m", "prompts both"
    written = "\n".join((*shared, "generate 5", *lines, 'measure matches("w") as raw', STATS))
    summed = "\n".join(
        (*shared, *lines, "measure logprob(answer) - logprob(wrong) as delta", STATS)
    )
    text = f"experiment r {{\n{written}\n}}\nexperiment s {{\n{summed}\n}}\n"
    replies, sums = run_text(name, text, mode, TWO)
    assert replies.replies is not None
    seen = set[tuple[int, ...]]()
    for n in ALL:
        own, swapped = both(name, n), both(name, n, swapped=True)
        edit = patched_cell(name, n)
        expected = [bare(name).reply(own, 5), bare(name).reply(swapped, 5, blocks={0: edit})]
        [reply], [cell] = replies.replies.runs["clean"][n], replies.replies.cells[0][n]
        assert [list(reply.ids), list(cell.ids)] == expected
        seen |= {tuple(reply) for reply in expected}
    assert len(seen) > 1
    values = [continued(name, n) for n in ALL]
    np.testing.assert_allclose(sums.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(sums.measures[0].patched[0] - sums.measures[0].base[0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_completions_of_prompts_of_very_different_lengths_equal_hooks(name: str) -> None:
    """The passes over short prompts begin after columns of padding."""
    longer = " w2 w1" * 20
    block = BLOCK.replace('then "w2 w1"', f'then "w2 w1{longer}"')
    rule = "ablate resid_post layer 0 at photo row 1 col 2 token with zero"
    lines = "model m", "prompts ask", "generate 4", rule, 'measure matches("w") as raw', STATS
    [found] = run_text(name, "experiment r {\n" + "\n".join(lines) + "\n}\n", block=block)
    assert found.replies is not None
    for n in ALL:
        token, given = cells(name, n, n)[1, 2], inputs(name, n, n)
        if n == 1:
            given = inputs_of(name, WORDS[1] + longer, 1)
        expected = (
            bare(name).reply(given, 4),
            bare(name).reply(given, 4, blocks={0: at([token], torch.zeros(()))}),
        )
        [reply], [cell] = found.replies.runs["clean"][n], found.replies.cells[0][n]
        assert (list(reply.ids), list(cell.ids)) == expected


def attention_hidden(name: str, n: int) -> Tensor:
    """Logits without attention from a token of the image to a later one, in one block."""
    grid = cells(name, n, n)
    query, key = grid[1, 1], grid[2, 2]

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].clone()
        shown = mask.dtype == torch.bool
        mask[..., query, key] = False if shown else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    attention = bare(name).block(1).self_attn
    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return bare(name).run(inputs(name, n, n))
    finally:
        handle.remove()


@pytest.mark.parametrize("mode", ["planned", "plain"])
@pytest.mark.parametrize("name", ["gemma3", "paligemma", "paligemma2"])
def test_image_tokens_attend_to_later_tokens_of_the_image(name: str, mode: str) -> None:
    """A rule on an edge to a later token, and measures before the written token."""
    edge = "block attention layer 1 from photo row 1 col 1 token to photo row 2 col 2 token"
    write = "ablate resid_post layer 0 at photo row 2 col 2 token with zero"
    late = "ablate resid_post layer 0 at last token with zero"
    read = "measure cosine(resid_post layer 2, clean) at photo row 1 col 1 token as raw"
    text = experiment("edge", edge) + experiment("before", write, measure=read)
    text += experiment("late", late, measure=read)
    hidden, before, text_after = (found.measures[0] for found in run_text(name, text, mode))
    expected = [difference(attention_hidden(name, n)) for n in ALL]
    np.testing.assert_allclose(hidden.patched[0], expected, atol=1e-4)
    assert np.abs(np.array(expected) - hidden.base[0]).max() > 1e-3
    for measure, places in ((before, [cells(name, n, n)[2, 2] for n in ALL]), (text_after, [-1])):
        alike = [moved_earlier(name, n, places[n % len(places)]) for n in ALL]
        np.testing.assert_allclose(measure.patched[0], alike, atol=1e-4)
        assert (min(alike) < 0.999) == (measure is before or name != "gemma3")


def moved_earlier(name: str, n: int, place: int) -> float:
    """The cosine of two vectors at an image's first token: of a clean run, and of one with zeros at
    this token."""
    first, found = cells(name, n, n)[1, 1], list[Tensor]()
    edits: tuple[dict[int, Any], ...] = {}, {0: at([place], torch.zeros(()))}
    for edit in edits:
        kept: list[Tensor] = []
        bare(name).run(inputs(name, n, n), blocks={**edit, 2: keeping(kept)})
        found.append(kept[0][first])
    return float(torch.cosine_similarity(*found, dim=0))


def keeping(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    return edit


@pytest.mark.slow
def test_line_breaks_merge_with_those_of_the_processor() -> None:
    """Gemma's processor writes line breaks around images; the tokenizer joins them with others."""
    model, processor = bare("gemma3").model, deepcopy(vlm.processor("gemma3"))
    processor.tokenizer.add_tokens(["\n\n\n"])
    own = Bare(model, processor)
    adopted, found = adopt_model("m", deepcopy(model), processor)
    assert adopted is not None, found
    block = BLOCK.replace("w2 {photo} w1", "w2\\n{photo} w1")
    text = experiment("e", "ablate resid_post layer 0 at photo row 1 col 2 token with zero")
    source = Source(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', folder() / "f.mech")
    measure = succeeded(*run_on(source, {"m": adopted}))["e"].measures[0]
    base, patched = list[float](), list[float]()
    for n in ALL:
        picture = Image.open(folder() / f"{n}.png").convert("RGB")
        given = own.with_pictures(f"w3 w2\n<start> w1 {WORDS[n]} w3", [picture])
        token = cells("gemma3", n, n)[1, 2]
        assert given["input_ids"].shape == inputs("gemma3", n, n)["input_ids"].shape
        base.append(difference(own.run(given)))
        patched.append(difference(own.run(given, blocks={0: at([token], torch.zeros(()))})))
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched[0], patched, atol=1e-4)
    assert (
        np.abs(
            np.array(base) - [difference(bare("gemma3").run(inputs("gemma3", n, n))) for n in ALL]
        ).max()
        > 0.01
    )


def test_processor_that_modifies_the_text_is_rejected() -> None:
    [error, *_] = errors = changed_text()
    assert error.code == "E0459"
    assert "changes the text around images" in render_full(errors, color=False, width=1000)


def changed_text() -> list[Diagnostic]:
    """Return the errors of a layout without the line break that a processor adds."""
    return refused_with("paligemma", "prefix_end", "")


@pytest.mark.parametrize("end", ["w3", "w2 \\n w3", "\\n w3 \\n"])
def test_prompt_without_the_final_line_break_is_rejected(end: str) -> None:
    block = BLOCK.replace('w3"\n  answer', f'{end}"\n  answer')
    text = experiment("e", "ablate resid_post layer 0 at photo row 1 col 2 token with zero")
    source = Source(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', folder() / "f.mech")
    result, diagnostics = run_on(source, {"m": loaded("paligemma")}, MODES["planned"])
    assert result is None
    [error] = [found for found in diagnostics if found.severity == "error"]
    shown = render_full([error], color=False, width=1000)
    assert error.code == "E0459"
    assert "it ends each prompt with a line break, its only one" in shown
    assert r"write `\n` at the end of the template, and nowhere else" in shown


def test_conventions_report_prefix_attention() -> None:
    text = experiment("e", "ablate resid_post layer 0 at photo row 1 col 2 token with zero")
    [found] = run_text("paligemma", text)
    said = found.conventions
    assert said["bos"] == "`<s>` after images, by the model's processor"
    assert said["prompt attention"].startswith("all tokens of a prompt attend to each other")


@pytest.mark.parametrize("mode", ["planned", "plain", "padded on the right"])
@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_texts_without_images_are_causal_in_a_model_with_prefix_attention(
    name: str, mode: str
) -> None:
    block = BLOCK.replace('  image photo = "{file}"\n', "").replace("{photo}", "w1")
    block = block.replace("file = other", 'words = "w3"')
    rule = "patch resid_post layer 0 at last token"
    text = experiment("e", "from clean into changed", rule)
    source = Source(f'mech 1\nmodel m = local("handed over")\n{block}\n{text}', folder() / "f.mech")
    [found] = succeeded(*run_on(source, {"m": loaded(name)}, MODES[mode])).values()
    said = "each token attends to itself and earlier ones, as no prompt has an image"
    assert found.conventions["prompt attention"] == f"{said} (`token_type_ids` of 1)"
    for n in ALL:
        clean, changed = (words_alone(name, words) for words in (WORDS[n], "w3"))
        value = bare(name).states(clean)["blocks"][0][-1]
        expected = difference(bare(name).run(changed, blocks={0: at([-1], value)}))
        np.testing.assert_allclose(found.measures[0].patched[0][n], expected, atol=1e-4)
        base = difference(bare(name).run(changed))
        np.testing.assert_allclose(found.measures[0].base[0][n], base, atol=1e-4)


def words_alone(name: str, words: str) -> dict[str, Tensor]:
    """The inputs of a text whose tokens attend to earlier ones."""
    given = bare(name).processor.tokenizer(f"w3 w2 w1 w1 {words} w3", add_special_tokens=False)
    ids = torch.tensor([given["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.ones_like(ids),
    }


def test_only_images_with_pan_and_scan_crops_are_rejected() -> None:
    """The processor writes texts and image tokens for each crop of a wide image."""
    if not hasattr(vlm.processor("gemma3"), "images_kwargs"):
        pytest.skip("this transformers has no settings of a processor's images")
    model, found = adopt_model("m", deepcopy(bare("gemma3").model), vlm.processor("gemma3_pan"))
    assert model is not None, found
    text = experiment("e", "ablate resid_post layer 0 at photo row 1 col 2 token with zero")
    for file, is_cropped in (("3", True), ("0", False)):
        block = BLOCK.replace('"{file}"', f'"{file}.png"').replace(
            "{ file = other }", '{ what = "" }'
        )
        source = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
        result, diagnostics = run_on(
            Source(source, folder() / "f.mech"), {"m": model}, MODES["plain"]
        )
        errors = [each for each in diagnostics if each.severity == "error"]
        assert [each.code for each in errors] == ["E0459"] * is_cropped
        if is_cropped:
            assert "changes the text around images" in render_full(errors, color=False, width=1000)
            continue
        [own] = succeeded(result, diagnostics).values()
        base = [difference(bare("gemma3").run(inputs("gemma3", n, 0))) for n in ALL]
        np.testing.assert_allclose(own.measures[0].base[0], base, atol=1e-4)


def test_layout_with_wrong_position_ids_is_rejected() -> None:
    [error, *_] = errors = miscounted()
    assert error.code == "E0458"
    assert "by more than" in render_full(errors, color=False, width=1000)


def miscounted() -> list[Diagnostic]:
    """Return the errors of a layout that counts tokens that the model numbers by row and column."""
    return refused_with("qwen2_vl", "numbering", "one by one")


def refused_with(name: str, attribute: str, value: str) -> list[Diagnostic]:
    """Return the errors of a family's layout with another attribute."""
    own = bare(name)
    with patch.object(type(IMAGE_LAYOUTS[name]), attribute, value):
        model, found = adopt_model("m", deepcopy(own.model), own.processor)
        assert model is not None, found
        return refused(model)


def refused(model: LoadedModel) -> list[Diagnostic]:
    """Return the errors of a file with an image for a model that doesn't take one."""
    file = """mech 1

model vlm = local("downloaded")

prompts ask {
  x in ["w1", "w2", "w3"]
  image photo = gray(100)
  template "{photo} w1 {x}"
  answer " w1"
}

experiment e {
  model vlm
  prompts ask
  ablate resid_post layer 0 at photo tokens with zero
  measure logit(answer) as delta
}
"""
    source = Source(file, Path("experiment.mech"))
    result, diagnostics = run_on(source, {"vlm": model}, MODES["planned"])
    assert result is None or not result.experiments
    return [found for found in diagnostics if found.severity == "error"]


# --- facts of the processor in the user's cache ---

SHAPES = ((0, 0), (24, 24), (17, 40), (52, 28))


def facts(reader: ImagePromptTokenizer) -> list[object]:
    together = ""
    try:
        reader._check_several(SHAPES[1:3])
    except UnsupportedProcessor as unfit:
        together = str(unfit)
    return [
        together,
        *(reader.image_id, reader.image_text, reader.image_marks, reader.processor_name),
        *(reader.bos_after_images, reader.prefix_end, reader.natural_size, type(reader.layout)),
        *map(reader.expansion, SHAPES),
    ]


def with_cache(name: str, folder: Path | None, **more: object) -> ImagePromptTokenizer:
    """The tokenizer with a folder of cached facts, and with nothing else that it has computed."""
    tokenizer = loaded(name).tokenizer
    assert isinstance(tokenizer, ImagePromptTokenizer)
    made = copy(tokenizer)
    for name, value in vars(ImagePromptTokenizer).items():
        if isinstance(value, cached_property):
            made.__dict__.pop(name, None)
    made.__dict__.update(_cache=folder, **more)
    return made


@pytest.mark.parametrize("name", ["llava_onevision", "idefics3", "qwen2_vl", "paligemma"])
def test_facts_of_processor_are_read_from_cache(name: str, tmp_path: Path) -> None:
    plain = facts(with_cache(name, None))
    assert facts(with_cache(name, tmp_path)) == plain
    assert facts(with_cache(name, tmp_path, _read=None)) == plain  # without the processor
    damaged = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_text("[1", encoding="utf-8")
    assert facts(with_cache(name, tmp_path)) == plain


def test_facts_of_a_plugin_layout_are_not_cached(tmp_path: Path) -> None:
    class Own(type(IMAGE_LAYOUTS["qwen2_vl"])):
        def natural_size(self, images: Any) -> tuple[int, int]:
            return 28, 56

    plain = with_cache("qwen2_vl", tmp_path).natural_size
    with patch.dict(IMAGE_LAYOUTS._entries, {"qwen2_vl": Own()}):
        assert with_cache("qwen2_vl", tmp_path).natural_size == (28, 56) != plain
    assert with_cache("qwen2_vl", tmp_path).natural_size == plain


def test_facts_of_a_processor_depend_on_its_files_the_libraries_and_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder_of("llava").iterdir():
        if file.suffix in (".json", ".jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def place() -> Path | None:
        found, problems = read_prompt_tokenizer(tmp_path, None)
        assert isinstance(found, ImagePromptTokenizer), problems
        return found._cache

    seen = [place()]
    assert place() == seen[0]
    for file in sorted(tmp_path.iterdir()):
        text = file.read_text(encoding="utf-8")
        file.write_text(f"{text} ", encoding="utf-8")
        seen.append(place())
    (tmp_path / "video_preprocessor_config.json").write_text("{}", encoding="utf-8")
    seen.append(place())
    with patch.object(image_prompts, "_library_versions", lambda: ("other",)):
        seen.append(place())
    changed = tmp_path / "package"
    for name in image_prompts._CODE:
        (changed / name).parent.mkdir(parents=True, exist_ok=True)
        (changed / name).write_text("other", encoding="utf-8")
    with patch.object(image_prompts, "PACKAGE_FOLDER", changed):
        seen.append(place())
    assert None not in seen
    assert len(set(seen)) == len(seen) > 6
    monkeypatch.setenv("MECHDSL_CACHE", "")
    assert place() is None


def test_cached_facts_depend_on_every_imported_module_that_reads_images_or_tokens() -> None:
    """No fact depends on values of pixels, on sounds or on chat templates of texts."""
    unrelated = {"images/pixels.py", "images/sounds.py"}
    unrelated.add("prompts/tokens/chat.py")
    imported = set[str]()
    for name in image_prompts._CODE:
        text = (image_prompts.PACKAGE_FOLDER / name).read_text(encoding="utf-8")
        for module in re.findall(r"^\s*from mechdsl\.(images|prompts)(\S*) import", text, re.M):
            imported.add("".join(module).replace(".", "/") + ".py")
    assert {*image_prompts._CODE} == (imported | {"prompts/tokens/image_prompts.py"}) - unrelated


@pytest.mark.parametrize("name", some(NAMES, ["qwen2_5_vl"]))
def test_identity_of_a_model_is_the_same_after_a_reply(name: str) -> None:
    """The library's modules keep the offset of positions of the last call."""
    module = draw(name)
    before = digest_module(module, "")
    assert before is not None
    with torch.no_grad():
        module.generate(**inputs(name, 0, 0), max_new_tokens=2)
    assert digest_module(module, "") == before


@pytest.mark.parametrize("name", some(NAMES, ["qwen3_vl"]))
def test_identity_of_a_model_is_the_same_while_hooks_insert_images(name: str) -> None:
    module = draw(name)
    before = digest_module(module, "")
    assert before is not None
    model, found = adopt_model("m", module, bare(name).processor)
    assert model is not None, found
    rule = "ablate resid_post layer 0 at photo tokens with zero"
    run_text(name, experiment("e", rule), model=model)
    assert any(part._forward_pre_hooks for part in module.modules())
    assert digest_module(module, "") == before
