"""Regions of images, and corruptions at regions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import mechdsl
from mechdsl.images import pixels
from mechdsl.images.picture import Picture, PictureChange, Region, box_coverage, covered_tokens
from mechdsl.images.pixels import (
    draw_shapes,
    model_input,
    process_pixels,
    region_coverage,
    region_mask,
    render_pixels,
    uncut_coverage,
)
from mechdsl.images.processing import PatchLayout, Processing
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer
from mechdsl.results.assembly.collection import _read_image, overlay_data

from ..quick import some
from . import support
from .support import CLASSIFIERS, copied, difference, forward, plain
from .test_blocks import check, codes, folder_of

UNRESIZED = {
    "vit": (16, 16),
    "deit": (20, 22),
    "dinov2_with_registers": (18, 27),
    "beit": (16, 16),
    "siglip": (16, 16),
    "clip": (31, 18),
}
"""(height, width) of images that the processor doesn't resize; some are cropped."""


def changed_by_painting(name: str, image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[token]: effect of painting part of the image on the embedding, by the library's processor
    and the model's own embedding."""
    painted = image.copy()
    painted[inside] = 255 - painted[inside]
    with support.embedded(name) as (module, seen):
        for each in (image, painted):
            given = support.processor(name)(Image.fromarray(each), return_tensors="pt")
            module(pixel_values=given["pixel_values"])
    return (seen[1] - seen[0]).abs().amax(-1).numpy()


def reader(name: str) -> ImageTokenizer:
    found = support.shared(name).tokenizer
    assert isinstance(found, ImageTokenizer)
    return found


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 100, (height, width, 3), dtype=np.uint8)


BOXES = ((3, 2, 9, 7), (0, 0, 4, 4), (15, 15, 16, 16), (5, 9, 14, 18), (0, 0, 1, 40))


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("box", BOXES)
def test_region_tokens_are_those_affected_by_painting_the_box(
    name: str, box: tuple[int, int, int, int]
) -> None:
    height, width = UNRESIZED[name]
    inside = np.zeros((height, width), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    changed = changed_by_painting(name, noise(height, width), inside) > 1e-6
    own = reader(name)
    found = covered_tokens(box_coverage(box, (height, width)), own.processing, own.layout)
    assert list(found) == changed.nonzero()[0].tolist()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("size", [(64, 64), (90, 70), (33, 61)])
def test_region_of_a_resized_image_covers_the_painted_tokens(
    name: str, size: tuple[int, int]
) -> None:
    """Tokens outside may be affected slightly, because the resize filter blurs the edge."""
    height, width = size
    inside = np.zeros(size, bool)
    box = (width // 5, height // 4, width // 2, height // 2)
    inside[box[1] : box[3], box[0] : box[2]] = True
    changed = changed_by_painting(name, np.full((*size, 3), 60, np.uint8), inside)
    own = reader(name)
    found = covered_tokens(box_coverage(box, size), own.processing, own.layout)
    assert found
    without = [token for token in own.layout.grid if token not in found]
    assert changed[list(found)].min() > 0
    assert changed[without].max() < 0.75 * changed[list(found)].max()


def test_shapes_of_a_changed_picture_or_its_tile_are_drawn_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask is that of the drawing, whatever changes and tiles the picture has."""
    picture = Picture("shapes", kind="circle", count=2, size=(40, 40), seed=417)
    drawn: list[int] = []

    def count(kind: str, n: int, size: int, random: np.random.Generator, **how: str) -> object:
        drawn.append(n)
        return draw_shapes(kind, n, size, random, **how)

    monkeypatch.setattr(pixels, "draw_shapes", count)
    whole = np.asarray(region_coverage(Region(shapes=True), picture))
    random = np.random.Generator(np.random.Philox(417))
    assert ((whole > 0) == draw_shapes("circle", 2, 40, random).mask).all()
    changed = replace(picture, changes=(PictureChange("blur", 2.0),))
    assert (np.asarray(region_coverage(Region(shapes=True), changed)) == whole).all()
    tile = replace(picture, tile="left", cut=(0, 0, 20, 40))
    assert (np.asarray(region_coverage(Region(shapes=True), tile)) == whole[:, :20]).all()
    assert drawn == [2]
    other = np.asarray(region_coverage(Region(shapes=True), replace(picture, seed=418)))
    assert (other != whole).any()


def test_mask_file_selects_its_tokens(tmp_path: Path) -> None:
    own = reader("clip")
    height, width = UNRESIZED["clip"]
    inside = np.zeros((height, width), bool)
    inside[12:15, 3:5] = inside[20, 10] = True
    path = tmp_path / "mask.png"
    Image.fromarray(np.where(inside, 7, 0).astype(np.uint8)).save(path)
    from mechdsl.images.picture import inspect_image

    region = Region(mask=path, digest=inspect_image(path)[0])
    found = covered_tokens(
        uncut_coverage(region, Picture("gray"), (height, width)), own.processing, own.layout
    )
    changed = changed_by_painting("clip", noise(height, width), inside) > 1e-6
    assert list(found) == changed.nonzero()[0].tolist()


def test_region_tokens_are_drawn_once_for_all_runs_and_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path)
    drawn = Counter[int]()

    def counting(picture: Picture) -> object:
        drawn[picture.seed] += 1
        return draw(picture)

    draw = pixels._drawing  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(pixels, "_drawing", counting)
    blocks = """
images scenes {
  kind in ["circle", "cross"]
  image shapes(n: 2, kind: kind, size: 32)
  region object = mask
  answer "{kind}"
  corrupt vague { blur image radius 2 }
}
experiment other {
  model vit
  images scenes limit 1
  measure logit(answer) as raw
}"""
    experiments, problems = check(
        tmp_path, "ablate embed at object tokens with zero", blocks=blocks
    )
    assert not problems
    assert [len(each.table) for each in experiments] == [1, 6]
    for table in (each.table for each in experiments):
        clean, vague = (table.runs[run].rows for run in ("clean", "vague"))
        assert [row.places for row in clean] == [row.places for row in vague]
    assert list(drawn.values()) == [1] * 6


def test_mask_of_generated_shapes_selects_their_tokens(tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = """
images scenes {
  kind in ["circle", "cross"]
  image shapes(n: 2, kind: kind, size: 32)
  region object = mask
  answer "{kind}"
}"""
    [experiment], problems = check(
        tmp_path, "ablate embed at object tokens with zero", blocks=blocks
    )
    assert not problems
    for row in experiment.table.runs["clean"].rows:
        picture = row.image
        assert picture is not None
        random = np.random.Generator(np.random.Philox(picture.seed))
        mask = draw_shapes(picture.kind, 2, 32, random).mask
        patches = mask.reshape(4, 8, 4, 8).any((1, 3)).flatten()
        assert list(row.places["object"][0]) == (1 + patches.nonzero()[0]).tolist()


BOXED = """
images scenes {
  rows "boxes.jsonl"
  image "{file}"
  region object = box
  answer "{label}"
  wrong "{other}"
  corrupt hidden { mask object }
  corrupt blurred { blur image radius 2 }
  corrupt noisy { noise object by 50 }
}
images neutral { image gray }
"""
BOX = ((2, 3, 9, 12), (0, 0, 6, 16), (20, 10, 35, 25))


def write_boxes(folder: Path) -> None:
    support.write_images(folder)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for record, box in zip(records, BOX, strict=True):
        record["box"] = list(box)
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, records)))


def inside(number: int) -> np.ndarray:
    found = np.zeros(support.SIZES[number], bool)
    left, top, right, bottom = BOX[number]
    found[top:bottom, left:right] = True
    return found


@pytest.mark.parametrize("mode", some(("plain", "planned"), ["planned"]))
@pytest.mark.parametrize("name", some(CLASSIFIERS, ["vit", "dinov2_with_registers", "siglip"]))
def test_ablated_region_equals_hooks(name: str, mode: str, tmp_path: Path) -> None:
    """The reference hooks act at the tokens that painting affects most."""
    write_boxes(tmp_path)
    text = support.experiment("e", "ablate resid_post layer 0 at object tokens with zero")
    found = support.run_file(text, tmp_path, name, mode, BOXED)["e"]
    own = reader(name)
    expected: list[float] = []
    for number in range(3):
        tokens = covered_tokens(
            box_coverage(BOX[number], support.SIZES[number]), own.processing, own.layout
        )
        changed = changed_by_painting(name, support.image(number), inside(number))
        assert set(changed.argsort()[::-1][: len(tokens) // 2]) <= set(tokens)
        changes = [
            support.Change(
                token, 0, torch.zeros_like(plain(name, number).sites["resid_post", 0][0, 0])
            )
            for token in tokens
        ]
        seen = forward(name, support.pixels(name, number), {("resid_post", 0): changes})
        expected.append(difference(seen, number))
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.1


@pytest.mark.parametrize("mode", some(("plain", "planned"), ["planned"]))
@pytest.mark.parametrize("name", some(CLASSIFIERS, ["vit", "siglip"]))
def test_region_patched_into_the_baseline_image_equals_hooks(
    name: str, mode: str, tmp_path: Path
) -> None:
    """The baseline image has no region, so each image's region is used."""
    write_boxes(tmp_path)
    rule = "patch resid_post layer 0 at object tokens"
    text = support.experiment("e", "from scenes into neutral", rule)
    measure = support.run_file(text, tmp_path, name, mode, BOXED)["e"].measures[0]
    own, base = reader(name), support.pixels(name, None)
    for number in range(3):
        box = box_coverage(BOX[number], support.SIZES[number])
        tokens = covered_tokens(box, own.processing, own.layout)
        writes = {("resid_post", 0): support.copied(plain(name, number), "resid_post", 0, tokens)}
        expected = difference(forward(name, base, writes), number)
        assert measure.patched[0, number] == pytest.approx(expected, abs=1e-4)
    assert np.abs(measure.patched - measure.base).max() > 0.1


def test_region_of_the_base_block_takes_precedence(tmp_path: Path) -> None:
    folder_of(tmp_path)
    support.write_images(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"file": "0.png", "label": "circle", "at": [0, 0, 8, 8]}')
    one = 'images one { rows "one.jsonl" image "{file}" answer "{label}" REGION }'
    lines = ("from scenes into one", "ablate embed at object tokens with zero")
    own, borrowed = (
        check(tmp_path, *lines, blocks=SHAPED + one.replace("REGION", region))[0][0]
        for region in ("region object = at", "")
    )
    [cell] = own.rules[0].positions.written.values()
    assert len(set(cell.hits)) == 1
    clean, [cell] = own.table.runs["clean"].rows, borrowed.rules[0].positions.written.values()
    assert [set(hit[0]) for hit in cell.hits] == [set(row.places["object"][0]) for row in clean]
    assert len(set(cell.hits)) > 1


@pytest.mark.parametrize("name", some(CLASSIFIERS, ["vit", "clip"]))
def test_masked_and_blurred_images_equal_reference(name: str, tmp_path: Path) -> None:
    write_boxes(tmp_path)
    for run, changed in (
        ("hidden", lambda image, part: np.where(part[..., None], 128, image)),
        (
            "blurred",
            lambda image, part: np.asarray(
                Image.fromarray(image).filter(ImageFilter.GaussianBlur(2))
            ),
        ),
    ):
        text = support.experiment(
            "e", f"from clean into {run}", "patch resid_post layer 0 at object tokens"
        )
        found = support.run_file(text, tmp_path, name, "planned", BOXED)["e"]
        own = reader(name)
        base: list[float] = []
        expected: list[float] = []
        for number in range(3):
            image = changed(support.image(number), inside(number)).astype(np.uint8)
            given = support.processor(name)(Image.fromarray(image), return_tensors="pt")
            values = given["pixel_values"].double()
            base.append(difference(forward(name, values), number))
            tokens = covered_tokens(
                box_coverage(BOX[number], support.SIZES[number]), own.processing, own.layout
            )
            writes = {("resid_post", 0): copied(plain(name, number), "resid_post", 0, tokens)}
            expected.append(difference(forward(name, values, writes), number))
        np.testing.assert_allclose(found.measures[0].base[0], base, atol=1e-4)
        np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)
        clean = [difference(plain(name, number), number) for number in range(3)]
        assert np.abs(np.array(base) - clean).max() > 0.1


def test_region_noise_is_seeded_by_row_and_stays_in_the_region(tmp_path: Path) -> None:
    write_boxes(tmp_path)
    folder_of(tmp_path, id2label=dict(enumerate(support.LABELS)))
    lines = ("from clean into noisy", "patch embed at object tokens")
    seen: list[dict[str, np.ndarray]] = []
    for text in (BOXED, BOXED.replace("rows", 'where file != "0.png" rows')):
        [experiment], problems = check(tmp_path, *lines, blocks=text)
        assert not problems
        runs = experiment.table.runs
        own: dict[str, np.ndarray] = {}
        for clean, noisy in zip(runs["clean"].rows, runs["noisy"].rows, strict=True):
            assert clean.image is not None
            assert noisy.image is not None
            number = int(str(clean.values["file"])[0])
            before, after = render_pixels(clean.image), render_pixels(noisy.image)
            part = inside(number)
            assert (before[~part] == after[~part]).all()
            apart = (after.astype(int) - before)[
                part & (abs(before.astype(int) - 128) < 40).all(-1)
            ]
            if len(apart) > 50:
                assert 35 < apart.std() < 60
            own[str(clean.values["file"])] = after
        seen.append(own)
    assert len(seen[0]) == 3
    assert len(seen[1]) == 2
    for name, image in seen[1].items():
        np.testing.assert_array_equal(image, seen[0][name])
    first, second = (seen[0][f"{n}.png"] - support.image(n) for n in (0, 2))
    assert not np.array_equal(first[3:9, 2:9], second[10:16, 20:27])


def test_image_corruptions_apply_in_order_and_have_distinct_texts() -> None:
    box = Region(box=(1, 1, 4, 5))
    blur, mask = PictureChange("blur", 2.0), PictureChange("mask", region=box)
    plain_one = Picture("noise", size=(12, 10), seed=3)
    both = Picture("noise", size=(12, 10), seed=3, changes=(blur, mask))
    image = np.asarray(
        Image.fromarray(render_pixels(plain_one)).filter(ImageFilter.GaussianBlur(2))
    )
    wanted = image.copy()
    wanted[1:5, 1:4] = 128
    np.testing.assert_array_equal(render_pixels(both), wanted)
    others = [
        (blur,),
        (mask,),
        (mask, blur),
        (PictureChange("blur", 3.0), mask),
        (PictureChange("blur", 2.0, box),),
        (PictureChange("noise", 2.0),),
        (PictureChange("noise", 2.0, seed=1),),
    ]
    texts = [Picture("noise", size=(12, 10), seed=3, changes=each).text for each in others]
    assert len({*texts, both.text, plain_one.text}) == len(others) + 2
    how = reader("vit").processing
    assert not np.array_equal(model_input(both, how), model_input(plain_one, how))


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("region image = box", "E0207"),
        ("region object = nothing", "E0501"),
        ("region object = label", "E0560"),
        ("region object = number", "E0503"),
        ("region object = three", "E0503"),
        ("region object = empty", "E0503"),
        ("region object = flat", "E0503"),
        ("region object = five", "E0503"),
        ("region object = other_size", "E0560"),
        ("corrupt c { blur image radius 1000000 }", "E0207"),
        ("region object = box region object = box", "E0202"),
        ("corrupt c { mask thing }", "E0203"),
        ("corrupt c { blur image radius 0 }", "E0207"),
        ("corrupt c { blur image radius label }", "E0207"),
        ("corrupt c { noise image by -3 }", "E0207"),
        ("corrupt c { blur image }", "E0101"),
        ("corrupt c { blur nobody radius 2 }", "E0203"),
    ],
)
def test_invalid_region_or_region_corruption_is_rejected(
    lines: str, wanted: str, tmp_path: Path
) -> None:
    folder_of(tmp_path)
    support.write_images(tmp_path)
    record = {
        "file": "0.png", "label": "circle", "box": [1, 2, 3, 4], "number": 3, "three": [1, 2, 3],
        "empty": [3, 3, 3, 4], "flat": [1, 3, 4, 3], "five": [1, 2, 3, 4, "x"],
        "other_size": "1.png",
    }  # fmt: skip
    (tmp_path / "boxes.jsonl").write_text(json.dumps(record))
    blocks = f'images scenes {{ rows "boxes.jsonl" image "{{file}}" answer "{{label}}" {lines} }}'
    assert codes(tmp_path, blocks=blocks)[:1] == [wanted]


def test_blur_in_a_prompts_block_is_rejected(tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = 'images scenes { image gray answer "circle" }\nprompts p { x in ["a", "b"] '
    blocks += 'template "{x} b" answer "circle" corrupt c { blur image radius 3 } }'
    text = 'model toy = zoo("counting")\nmodel vit = local("vit")'
    extra = "experiment f { model toy prompts p measure entropy as raw }"
    assert codes(tmp_path, blocks=f"{blocks}\n{extra}", model=text) == ["E0207"]


def test_image_noise_in_prompts_suggests_embedding_noise() -> None:
    text = """mech 1
model toy = zoo("counting")
prompts p { x in ["a", "b"] template "{x} b" answer "a" corrupt c { noise x tokens by 1 } }
experiment f { model toy prompts p measure entropy as raw }
"""
    (found,) = mechdsl.validate(text)
    assert found.code == "E0207"
    assert "add gaussian(std: 3 sd) to embed" in found.hint


def test_rule_at_a_region_missing_from_a_row_is_rejected(tmp_path: Path) -> None:
    folder_of(tmp_path)
    support.write_images(tmp_path)
    records = [
        {"file": "0.png", "label": "circle", "box": [1, 2, 9, 9]},
        {"file": "1.png", "label": "cross", "box": [100, 2, 109, 9]},
    ]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, records)))
    blocks = 'images scenes { rows "boxes.jsonl" image "{file}" answer "{label}" '
    blocks += "region object = box }"
    rule = "ablate embed at {} with zero"
    assert codes(tmp_path, rule.format("object tokens"), blocks=blocks) == ["E0309"]


def test_half_covered_pixel_is_in_a_region() -> None:
    layout, how = PatchLayout((), (1, 1), (2, 3)), Processing(None)
    assert covered_tokens(box_coverage((0.0, 0.0, 1.25, 1.0), (2, 3)), how, layout) == (0,)
    assert covered_tokens(box_coverage((0.0, 0.0, 1.75, 1.0), (2, 3)), how, layout) == (0, 1)
    assert covered_tokens(box_coverage((2.75, 0.0, 3.0, 1.0), (2, 3)), how, layout) == ()
    half, picture = Region(box=(0.0, 0.0, 1.5, 1.0)), Picture("gray", size=(2, 3))
    assert region_mask([half], picture, how, layout).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("size", [(13, 11), (11, 14), (12, 13), (20, 15), (15, 21)])
def test_region_of_an_image_smaller_than_the_crop_is_located(size: tuple[int, int]) -> None:
    how, layout = Processing(None, crop=(16, 16)), PatchLayout((), (2, 2), (16, 16))
    for row, col in ((0, 0), (size[0] - 1, size[1] - 1), (5, 6)):
        image = np.zeros((*size, 3), np.uint8)
        image[row, col] = 255
        changed = process_pixels(image, how).max(0).reshape(8, 2, 8, 2).max((1, 3)).flatten()
        box = (float(col), float(row), col + 1.0, row + 1.0)
        found = covered_tokens(box_coverage(box, size), how, layout)
        assert list(found) == changed.nonzero()[0].tolist()


SHAPED = """
images scenes {
  kind in ["circle", "cross"]
  image shapes(n: 1, kind: kind, size: 32)
  region object = mask
  answer "{kind}"
}"""


def test_cell_of_each_region_token_has_only_rows_with_that_token(tmp_path: Path) -> None:
    folder_of(tmp_path)
    rule = "ablate embed at each token of object with zero"
    [experiment], problems = check(tmp_path, rule, blocks=SHAPED)
    assert not [each for each in problems if each.severity == "error"]
    rows = experiment.table.runs["clean"].rows
    own = [set(row.places["object"][0]) for row in rows]
    assert own[0] != own[1]
    cells = [*experiment.rules[0].positions.written.values()]
    assert len(cells) == len(set().union(*own))
    for cell in cells:
        [token] = {at for hit in cell.hits for joined in hit for at in joined}
        assert [bool(hit) for hit in cell.hits] == [token in places for places in own]


@pytest.mark.parametrize(
    "position",
    ["answer tokens", "object row 1 col 1 token", "cls row 1 col 1 token", "cls 1 of image token"],
)
def test_unknown_image_position_is_rejected(position: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    assert codes(tmp_path, f"ablate embed at {position} with zero", blocks=SHAPED) == ["E0308"]


def test_overlay_data_has_region_hits_and_the_largest_top(tmp_path: Path) -> None:
    """Each image has its own region tokens; the largest report sets the number of images."""
    folder_of(tmp_path)
    lines = (
        "ablate embed at object tokens with zero",
        "report overlay top 1",
        "report overlay top 4",
    )
    [experiment], _ = check(tmp_path, *lines, blocks=SHAPED.replace("n: 1", "n: 2"))
    rows = experiment.table.runs["clean"].rows
    kept = overlay_data(experiment, np.arange(len(rows)), np.array([True]))
    assert kept["hits"] == (tuple(row.places["object"][0] for row in rows),)
    assert len({*kept["hits"][0]}) == len(rows)
    assert [bool(seen) for seen in kept["seen"]] == [True] * 4 + [False] * (len(rows) - 4)
    wide = ImageTokenizer(PatchLayout(("cls",), (8, 4), (16, 32)), Processing(("exact", 16, 32)))
    seen = _read_image(Picture("noise", size=(16, 32), seed=2), wide)
    assert (seen.tokens[0], seen.rows, seen.cols) == (1, 2, 8)
