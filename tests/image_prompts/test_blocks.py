"""Prompts blocks with images: corruptions, several images, other blocks, completions, errors."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import mechdsl
from mechdsl.diagnostics.rendering import render_full
from mechdsl.loading.loader import adopt_model

from . import support
from .models import GRID
from .reference import Bare, at
from .support import RECORDS, TEMPLATE, experiment, run_file, try_file
from .test_rules import difference, image_tokens, inputs, states

NAME = "llava"


def of_pictures(pictures: list[Image.Image], text: str = TEMPLATE) -> list[float]:
    """Logit difference of each record's prompt with a given picture."""
    bare = support.bare(NAME)
    found: list[float] = []
    for n, picture in enumerate(pictures):
        given = bare.with_pictures(text.format(**RECORDS[n]), [picture])
        found.append(difference(NAME, bare.run(given), n))
    return found


def picture(number: int) -> Image.Image:
    return Image.open(support.folder_of(NAME) / f"{number}.png").convert("RGB")


@pytest.mark.parametrize(
    ("change", "make"),
    [
        ("mask photo", lambda own: Image.new("RGB", own.size, (128, 128, 128))),
        ("blur photo radius 3", lambda own: own.filter(ImageFilter.GaussianBlur(3))),
    ],
)
def test_corrupted_image_in_a_prompt_equals_reference(change: str, make: object) -> None:
    block = support.BLOCK.replace("file = other", change)
    text = experiment("e", "from clean into changed", "patch resid_pre layer 0 at photo tokens")
    found = run_file(text, NAME, block=block)["e"]
    assert callable(make)
    expected = of_pictures([make(picture(n)) for n in range(len(RECORDS))])
    np.testing.assert_allclose(found.measures[0].base[0], expected, atol=1e-4)
    own = of_pictures([picture(n) for n in range(len(RECORDS))])
    np.testing.assert_allclose(found.measures[0].patched[0], own, atol=1e-4)
    assert np.abs(np.array(expected) - own).max() > 0.1


TWO = """
prompts ask {
  rows "data.jsonl"
  image one = "{file}"
  image two = "{other}"
  template "what is {what} in {one} and in the second {two} answer :"
  answer " {n}"
  wrong " {m}"
  corrupt changed { swap one, two }
}
"""


def test_swapped_and_patched_images_of_a_prompt_equal_hooks() -> None:
    """Tokens of each image, in both orders."""
    rule = "patch resid_post layer 1 at two row 1..2 col 1 tokens"
    found = run_file(experiment("e", "from clean into changed", rule), NAME, block=TWO)["e"]
    bare, values, bases = support.bare(NAME), list[float](), list[float]()
    for n, record in enumerate(RECORDS):
        text = "what is {what} in <image> and in the second <image> answer :".format(**record)
        files = [support.folder_of(NAME) / str(record[name]) for name in ("file", "other")]
        own, swapped = bare.inputs(text, files), bare.inputs(text, files[::-1])
        tokens = [bare.image_tokens(own)[k] for k in (GRID * GRID, GRID * GRID + GRID)]
        vectors = bare.states(own)["blocks"][1][tokens]
        values.append(difference(NAME, bare.run(swapped, blocks={1: at(tokens, vectors)}), n))
        bases.append(difference(NAME, bare.run(swapped), n))
    np.testing.assert_allclose(found.measures[0].base[0], bases, atol=1e-4)
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - bases).max() > 0.1


TEXTS = """
prompts blank {
  template "what is in the second picture ? answer :"
  span slot = "picture"
}
"""


def test_patch_from_an_image_token_into_a_text_equals_hooks() -> None:
    text = experiment(
        "e",
        "from ask into blank",
        "patch resid_post layer 0 at photo row 1 col 2 token onto slot token",
    )
    found = run_file(text, NAME, block=support.BLOCK + TEXTS)["e"]
    bare = support.bare(NAME)
    given = bare.inputs("what is in the second picture ? answer :", [])
    slot = (
        given["input_ids"][0]
        .tolist()
        .index(bare.processor.tokenizer.convert_tokens_to_ids("picture"))
    )
    token = image_tokens(NAME)[1]
    values = [
        difference(
            NAME, bare.run(given, blocks={0: at([slot], states(NAME, n, n)["blocks"][0][token])}), n
        )
        for n in range(len(RECORDS))
    ]
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.ptp(np.array(values) - found.measures[0].base[0]) > 0.1


def test_greedy_completions_with_image_rules_equal_hooks() -> None:
    """Greedy replies, clean and with a rule at the image's tokens."""
    text = experiment(
        "e",
        "generate 5",
        "from clean into changed",
        "patch resid_post layer 0 at photo tokens",
        measure='measure matches("1|2|3") as raw\n  report texts',
    )
    found = run_file(text, NAME)["e"]
    bare = support.bare(NAME)
    assert found.replies is not None
    for n in range(len(RECORDS)):
        expected = bare.reply(inputs(NAME, n, n), 5)
        changed = inputs(NAME, n, (n + 1) % 4)
        own = states(NAME, n, n)["blocks"][0][image_tokens(NAME)]
        edited = bare.reply(changed, 5, blocks={0: at(image_tokens(NAME), own)})
        words = bare.processor.tokenizer.decode
        [reply], [cell] = found.replies.runs["clean"][n], found.replies.cells[0][n]
        assert list(reply.ids) == expected, words(expected)
        assert list(cell.ids) == edited, words(edited)


def test_mismatched_images_depend_on_the_seed() -> None:
    """`other(file)` draws the images of other records."""
    block = support.BLOCK.replace("file = other", "file = other(file)")
    text = experiment("e", "from clean into changed", "patch embed at photo tokens")
    bare, drawn = support.bare(NAME), set[tuple[int, ...]]()
    every = [
        [difference(NAME, bare.run(inputs(NAME, n, k)), n) for k in range(4)] for n in range(4)
    ]
    for seed in range(4):
        values = run_file(f"seed {seed}\n{text}", NAME, block=block)["e"].measures[0].base[0]
        apart = np.abs(np.array(every) - values[:, None])
        np.testing.assert_allclose(apart.min(1), 0, atol=1e-4)
        found = tuple(apart.argmin(1).tolist())
        assert all(image != n for n, image in enumerate(found))
        drawn.add(found)
    assert len(drawn) > 1


# --- store keys -----------------------------------------------------------------------------------


def test_store_key_depends_on_the_content_of_a_prompt_image(tmp_path: Path) -> None:
    """The file name stays the same, but not its pixels."""
    for file in support.folder_of(NAME).iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    text = experiment("e", "ablate embed at photo row 1 col 1 token with zero")
    source = f'mech 1\nmodel m = local(".")\n{support.BLOCK}\n{text}'
    (tmp_path / "file.mech").write_text(source, encoding="utf-8")
    first = mechdsl.run(tmp_path / "file.mech", store=tmp_path / "store")
    again = mechdsl.run(tmp_path / "file.mech", store=tmp_path / "store")
    Image.fromarray(255 - np.asarray(picture(0))).save(tmp_path / "0.png")
    other = mechdsl.run(tmp_path / "file.mech", store=tmp_path / "store")
    values = [found["e"].measures[0].base[0] for found in (first, again, other)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[2] - values[0]).max() > 0.05


@pytest.mark.slow
def test_image_vectors_use_the_current_weights_of_a_python_model() -> None:
    """Image vectors aren't cached across weight edits, also in a copy of the model."""
    text = experiment("e", "ablate resid_post layer 0 at photo row 1 col 1 token with zero")
    own = Bare.of_folder(support.folder_of(NAME))
    for factor in (1.0, 0.5):
        weight = own.model.model.multi_modal_projector.linear_2.weight
        with torch.no_grad():
            weight.mul_(factor)
        for each in (own, Bare(deepcopy(own.model), own.processor)):
            model, found = adopt_model("m", each.model, each.processor)
            assert model is not None, found
            values = support.run_with(text, NAME, model)["e"].measures[0].base[0]
            expected = [difference(NAME, own.run(inputs(NAME, n, n)), n) for n in range(4)]
            np.testing.assert_allclose(values, expected, atol=1e-4)


@pytest.mark.slow
def test_edited_model_with_images_equals_hooks() -> None:
    """One file uses a model and an edited copy of it."""
    edited = "model n = m with { scale weights of L0.mlp by 0 }\n"
    lines = ("from clean into changed", "patch resid_post layer 1 at photo tokens")
    text = experiment("e", *lines) + experiment("f", *lines).replace("model m", "model n")
    found = run_file(edited + text, NAME)
    bare = support.bare(NAME)
    zero = bare.block(0).mlp.register_forward_hook(lambda module, args, output: output * 0)
    try:
        expected = [difference(NAME, bare.run(inputs(NAME, n, (n + 1) % 4)), n) for n in range(4)]
    finally:
        zero.remove()
    np.testing.assert_allclose(found["f"].measures[0].base[0], expected, atol=1e-4)
    assert np.abs(found["e"].measures[0].base[0] - expected).max() > 0.1


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        ("image photo =", "image", "E0207", "needs a name in a prompt"),
        ("{photo} how", "how", "E0510", "template"),
        ("row 1 col 2", "row 9 col 2", "E0310", "3 rows and 3 columns"),
        ("row 1 col 2", "row 3..1 col 2", "E0321", "3..1"),
        ("at photo row", "at foto row", "E0308", "photo"),
        ("at photo row", "at what row", "E0308", "images are `photo`"),
        ("photo row 1 col 2", "what tile 1", "E0308", "images are `photo`"),
        ("photo row 1 col 2 token", "photo tile 2 tokens", "E0310", "in 1 tile, and no thumbnail"),
        ("photo row 1 col 2 token", "photo thumbnail tokens", "E0310", "and no thumbnail"),
        ("photo row 1", "photo tile 2..1 row 1", "E0321", "2..1"),
        ("photo row 1 col 2", "photo tile 1 row 4 col 2", "E0310", "3 rows and 3 columns"),
        ("photo row 1 col 2 token", "photo tile 1 token", "E0306", "`each token of photo tile 1`"),
        ("at photo row 1 col 2 token", "at photo token", "E0306", "9 patches"),
        ("patch embed", "patch resid_post text layer 0", "E0108", "remove `text`"),
        ('"{file}"', '"{file}.gif"', "E0560", ".gif"),
        ('"{file}"', "mean of ask", "E0207", "is a prompts block"),
        ('"{file}"', "zebra", "E0203", "zebra"),
        ("file = other", "mask foto", "E0203", "photo"),
        ("file = other", "mask photo row 1 col 1 token", "E0207", "whole images"),
        ('"{file}"', '"{file}" region a = what', "E0560", "no such file"),
        ('"{file}"', '"{file}" region a of b = what', "E0501", "photo"),
        ('"{file}"', '"{file}"\n  region a of photo = box(0, 9)', "E0101", "name the box: `box"),
        ("file = other", "photo = gray", "E0207", "mask photo"),
        ('image photo = "{file}"', 'image one = "{file}"', "E0501", "photo"),
    ],
)  # fmt: skip
def test_invalid_prompts_block_with_images_is_rejected(
    before: str, after: str, code: str, said: str
) -> None:
    text = experiment("e", "from clean into changed", "patch embed at photo row 1 col 2 token")
    whole = support.BLOCK + text
    assert before in whole
    result, found = try_file("", NAME, block=whole.replace(before, after, 1))
    assert result is None
    errors = [each for each in found if each.severity == "error"]
    assert code in [each.code for each in errors], errors
    assert code != "E0101" or len(errors) == 1, errors  # the line isn't divided at `photo =`
    shown = " ".join(render_full(errors, color=False, width=1000).split())
    assert said in shown, shown


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ("{photo} how", "{photo} {new = } how", "E0113"),
        ("{photo} how", "{photo} {new = how", "E0113"),
        ('"{file}"', '"{file}.gif"', "E0560"),
    ],
)
def test_broken_prompts_with_images_cause_no_errors_of_positions(
    before: str, after: str, code: str
) -> None:
    """Regions, and placeholders with errors, count as spans; misspelt names are still reported."""
    named = "new token, " if "new" in after else ""
    lines = f"ablate embed at {named}object tokens, each token of object, objct tokens with zero"
    region = "  part = [0, 0, 8, 8]\n  region object of photo = part\n  image photo"
    whole = support.BLOCK.replace("  image photo", region, 1) + experiment("e", lines)
    assert before in whole
    result, found = try_file("", NAME, block=whole.replace(before, after, 1))
    assert result is None
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == [code, "E0308"], errors
    assert "called `objct`" in errors[1].message


def test_maps_of_windows_in_prompts_with_images_are_rejected() -> None:
    window = "photo row r..r + 1 col 1..2 tokens"
    lines = f"for r in 1..2 {{ ablate embed at {window} with zero }}"
    text = experiment("windows", lines)
    text += experiment("total", "observe sum of windows at each token of photo", measure="")
    result, found = try_file("", NAME, block=support.BLOCK + text)
    assert result is None
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0207"
    assert "`windows` doesn't sweep positions" in error.message
