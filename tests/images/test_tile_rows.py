"""Rows of images that are cut into tiles, and their grouping."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.fits.regression import group_keys
from mechdsl.images.pixels import render_pixels
from mechdsl.images.processing import UnsupportedProcessor, parse_processing
from mechdsl.prompts.rows import PromptTable

from ..execute.support import run_on
from . import support, tiles
from .test_blocks import folder_of
from .test_tiles import run
from .tiles import NAMES

# --- rows -----------------------------------------------------------------------------------------

SHAPES = """
images scenes {
  kind in ["circle", "square"]
  seen in ["once", "twice"]
  image shapes(n: 3, kind: kind, size: 31)
  tiles 2 by 3 and whole
  answer "{kind}"
  drawn = choice("a", "b", "c", "d", "e")
  region object = mask
  corrupt noisy { noise image by 30 }
  corrupt dotted { noise image row 1 col 1 token by 30 }
  corrupt painted { mask object }
  split 50%
}
"""
ACROSS, DOWN = (0, 10, 20, 31), (0, 15, 31)


def shapes(folder: Path, use: str = "images scenes", block: str = SHAPES) -> PromptTable:
    line = "ablate embed at image row 1 col 1 token with zero"
    folder_of(folder)
    text = f'mech 1\nmodel vit = local("vit")\n{block}\nexperiment e {{ model vit {use} {line}\n'
    source = Source(text + "measure logit(answer) as delta }", folder / "file.mech")
    found = check_source(source, CheckSettings())
    errors = [d for d in found.diagnostics if d.severity == "error"]
    assert not errors, render_full(errors, color=False, width=100)
    return found.experiments[0].table


def by_image(table: PromptTable, run: str = "clean") -> dict[str, dict[str, np.ndarray]]:
    """Image → tile → its pixels."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for row, of in zip(table.runs["clean"].rows, table.runs[run].rows, strict=True):
        assert of.image is not None
        found.setdefault(row.values["image"], {})[row.values["tile"]] = render_pixels(of.image)
    return found


@pytest.mark.parametrize("run", ["clean", "noisy"])
def test_tiles_partition_their_image(tmp_path: Path, run: str) -> None:
    """Shapes and noise are drawn once per image."""
    block = SHAPES.replace("  corrupt painted { mask object }\n", "")
    found = by_image(shapes(tmp_path, "images scenes limit 56", block), run)
    assert len(found) == 8
    wholes = [own["whole"].tobytes() for own in found.values()]
    assert len(set(wholes)) == 8
    for own in found.values():
        assert list(own) == [*NAMES, "whole"]
        for number, name in enumerate(NAMES):
            row, col = divmod(number, 3)
            part = own["whole"][DOWN[row] : DOWN[row + 1], ACROSS[col] : ACROSS[col + 1]]
            np.testing.assert_array_equal(own[name], part)


def test_image_file_is_rotated_upright_before_tiling(tmp_path: Path) -> None:
    own = np.random.default_rng(3).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.fromarray(own).save(tmp_path / "turned.png", exif=exif)
    made = 'images scenes { image "turned.png" tiles 2 by 3 answer "circle" }'
    [found] = by_image(shapes(tmp_path, block=made)).values()
    upright = np.rot90(own, -1)  # [33, 20]
    np.testing.assert_array_equal(found["row 1 col 3"], upright[0:16, 13:20])
    np.testing.assert_array_equal(found["row 2 col 1"], upright[16:33, 0:6])


@pytest.mark.parametrize(
    ("cut", "fits"), [("3 by 20", True), ("4 by 2", False), ("2 by 21", False)]
)
def test_tiles_without_pixels_are_rejected(tmp_path: Path, cut: str, fits: bool) -> None:
    Image.new("RGB", (20, 3)).save(tmp_path / "flat.png")
    block = f'images scenes {{ image "flat.png" tiles {cut} answer "circle" }}'
    if not fits:
        with pytest.raises(AssertionError, match="E0561"):
            shapes(tmp_path, block=block)
        return
    [found] = by_image(shapes(tmp_path, block=block)).values()
    assert {own.shape for own in found.values()} == {(1, 1, 3)}


def test_tiles_of_one_image_share_random_draws(tmp_path: Path) -> None:
    table = shapes(tmp_path, "images scenes limit 70")
    drawn: dict[str, set[object]] = {}
    for row in table.runs["clean"].rows:
        drawn.setdefault(row.values["image"], set()).add(row.values["drawn"])
    assert len(drawn) >= 10
    assert {len(each) for each in drawn.values()} == {1}
    assert len(set.union(*drawn.values())) > 1


def test_patch_noise_is_drawn_for_each_tile(tmp_path: Path) -> None:
    rows = shapes(tmp_path, "images scenes limit 7").runs["dotted"].rows
    seeds = [row.image.changes[0].seed for row in rows if row.image is not None]
    assert len(set(seeds)) == len(rows) > 2


def test_other_tile_is_drawn_for_each_row(tmp_path: Path) -> None:
    block = SHAPES.replace("mask object", "tile = other(tile)")
    table = shapes(tmp_path, "images scenes limit 70", block)
    pairs = list(zip(table.runs["clean"].rows, table.runs["painted"].rows, strict=True))
    assert all(row.values["tile"] != other.values["tile"] for row, other in pairs)
    assert all(row.values["image"] == other.values["image"] for row, other in pairs)
    first = [other.values["tile"] for _, other in pairs[:7]]
    assert len(set(first)) > 2


def test_tiles_not_affected_by_the_corruption_are_dropped(tmp_path: Path) -> None:
    table = shapes(tmp_path, "images scenes limit 70 from painted into clean")
    clean, painted = by_image(table), by_image(table, "painted")
    whole = shapes(
        tmp_path, "images scenes limit 70", SHAPES.replace("mask object", "blur image radius 1")
    )
    assert len(by_image(whole)) == 10
    assert "that `painted` leaves unchanged" in table.conventions["dropped"]
    for image, own in clean.items():
        for name, before in own.items():
            assert (before != painted[image][name]).any()
    assert {len(own) for own in clean.values()} <= set(range(1, 8))


def test_parts_of_a_split_share_no_tiled_image(tmp_path: Path) -> None:
    parts = [by_image(shapes(tmp_path, f"images scenes.{part}")) for part in ("train", "test")]
    assert [len(part) for part in parts] == [2, 2]
    assert not set(parts[0]) & set(parts[1])
    small = by_image(shapes(tmp_path, "images scenes.train limit 5"))
    assert set(small) <= set(parts[0])


def test_limit_takes_all_tiles_of_an_image_first(tmp_path: Path) -> None:
    block = SHAPES.replace("  corrupt painted { mask object }\n", "")
    found = by_image(shapes(tmp_path, "images scenes limit 10", block))
    assert [list(own) for own in found.values()] == [[*NAMES, "whole"], list(NAMES[:3])]


def test_each_tile_has_a_distinct_key(tmp_path: Path) -> None:
    """Keys differ between tiles, the whole image and different cuts."""
    ids: dict[int, str] = {}
    for cut in ("2 by 3 and whole", "3 by 2", "2 by 2"):
        block = SHAPES.replace("2 by 3 and whole", cut).replace(
            "  corrupt painted { mask object }\n", ""
        )
        table = shapes(tmp_path, "images scenes", block)
        assert len(set(table.row_keys)) == len(table)
        for row in table.runs["clean"].rows:
            said = f"{row.values['image']} {cut} {row.values['tile']}"
            assert ids.setdefault(row.ids[0], said) == said
    assert len(ids) == 4 * (7 + 6 + 4)


@pytest.mark.slow
def test_mean_image_of_a_tiled_block_averages_tiles(tmp_path: Path) -> None:
    block = SHAPES + "images average { image mean of scenes }\n"
    line = "from scenes into average\n patch embed at image row 1 col 1 token"
    text = f"images scenes limit 7\n {line}\n"
    table = shapes(tmp_path, text.replace("\n ablate", ""), block)
    average = table.runs["average"].rows[0].image
    assert average is not None
    assert {bool(each.tile) for each in average.of} == {True}
    assert len({each.content() for each in average.of}) == average.count


# --- fits -----------------------------------------------------------------------------------------


def test_group_keys_join_rows_with_a_shared_key_or_group() -> None:
    keys = [b"a", b"b", b"c", b"c", b"d", b"e"]
    groups = [["1"], ["1"], ["2"], ["3"], ["3"], ["4"]]
    assert group_keys(keys, groups) == [b"a", b"a", b"c", b"c", b"c", b"e"]
    chain = group_keys([b"z", b"y", b"y", b"x"], [["1"], ["1"], ["2"], ["2"]])
    assert chain == [b"x"] * 4
    several = group_keys([b"z", b"y", b"x", b"w"], [["1"], ["1", "2"], ["2"], []])
    assert several == [b"x", b"x", b"x", b"w"]


def test_probe_folds_keep_tiles_of_an_image_together() -> None:
    """A label that differs between images can't be predicted for a held-out image."""
    line = "observe probe(file, folds: 3) at resid_post layer 2 at cls token as told"
    found = run(support.experiment("e", line, measure=""))["e"]
    assert (found.measures[0].patched == 0).all()


def told(text: str) -> list[Diagnostic]:
    """Diagnostics of a run."""
    with TemporaryDirectory() as folder:
        tiles.write(Path(folder))
        random = np.random.default_rng(5)
        for number in range(8):  # black on the right
            image = random.integers(0, 256, (16, 32, 3), dtype=np.uint8)
            image[:, 16:] = 0
            Image.fromarray(image).save(Path(folder) / f"half{number}.png")
        lines = (json.dumps({"file": f"half{n}.png", "label": "ring"}) for n in range(8))
        (Path(folder) / "halves.jsonl").write_text("\n".join(lines), encoding="utf-8")
        source = Source(f'mech 1\nmodel m = local("handed over")\n{text}', Path(folder) / "f.mech")
        return run_on(source, {"m": support.shared("vit")})[1]


HALVES = """
images scenes {
  rows "halves.jsonl"
  image "{file}"
  tiles 1 by 2
  answer "{label}"
}
images uncut {
  rows "halves.jsonl"
  image "{file}"
  answer "{label}"
}
"""


def test_tile_is_not_suggested_as_a_sampling_unit() -> None:
    """All right tiles are equal, but intervals are about new images, not new tiles."""
    line = "ablate embed at image tokens with zero"
    found = told(HALVES + support.experiment("e", line, measure="measure logit(answer) as delta"))
    assert not [each for each in found if each.severity == "error"]
    assert [each.message for each in found if each.code == "W0722"] == []


@pytest.mark.parametrize("blocks", [("scenes", "uncut"), ("uncut", "scenes")])
def test_probe_evaluated_on_tiles_of_training_images_is_rejected(
    blocks: tuple[str, str],
) -> None:
    line = f"observe probe(file, train: {blocks[1]}) at resid_post layer 1 at cls token as told"
    text = support.experiment("e", line, measure="").replace("images scenes", f"images {blocks[0]}")
    [found] = [each for each in told(HALVES + text) if each.severity == "error"]
    rows = 16 if blocks[0] == "scenes" else 8
    assert f"is evaluated on {rows} rows that it is fitted on" in found.message


# --- output ---------------------------------------------------------------------------------------


def test_report_names_the_tile_of_each_row() -> None:
    lines = ("ablate embed at each token of image with zero", "report overlay top 3")
    found = run(support.experiment("e", *lines))["e"]
    shown = found.to_text(100)
    first = next(tiles.rows(found.row_values))
    assert first.name == NAMES[0]
    assert f"image 1: {first.number}.png, tile row 1 col 1" in shown
    assert "21 of 21 tiles" in shown
    assert "cut into 2 x 3 tiles, and whole" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("GotOcr2", {"crop_to_patches": True}),
        ("Idefics3", {"do_image_splitting": True}),
        ("SmolVLM", {}),
        ("LlavaNext", {}),
        ("LlavaOnevision", {}),
        ("Mllama", {}),
        ("Gemma3", {"do_pan_and_scan": True}),
        ("Aria", {"split_image": True}),
    ],
)
def test_processor_that_tiles_images_is_rejected(kind: str, flags: dict[str, bool]) -> None:
    """Configs are those that transformers saves."""
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessor")(**flags)
    with pytest.raises(UnsupportedProcessor) as refused:
        parse_processing(json.loads(processor.to_json_string()))
    assert "cuts images into tiles" in str(refused.value)
    assert "`tiles 2 by 3`" in refused.value.hint
