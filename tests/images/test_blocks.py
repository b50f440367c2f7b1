"""`images` blocks: rows, token positions, and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mechdsl.base import limits
from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.images.picture import Picture
from mechdsl.images.pixels import model_input
from mechdsl.images.processing import PatchLayout, Processing
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.tokens.tokenizer import ImageTokenizer, image_row_fields
from mechdsl.resolve.types import ResolvedExperiment

from . import support
from .support import CLASSIFIERS, ENCODERS, FRONT, GRID, SIDE

CONFIG: dict[str, Any] = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "id2label": {"0": "circle", "1": "square", "2": "triangle", "3": "cross"},
}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
SCENES = """
images scenes {
  kind in ["circle", "square", "triangle", "cross"]
  image shapes(n: 1, kind: kind, size: 32)
  answer "{kind}"
}
"""


def folder_of(folder: Path, **changes: object) -> None:
    """Write the configs of a model without weights."""
    (folder / "vit").mkdir(exist_ok=True)
    (folder / "vit" / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def check(
    folder: Path,
    *lines: str,
    blocks: str = SCENES,
    measure: str = "",
    model: str = 'model vit = local("vit")',
) -> tuple[list[ResolvedExperiment], list[Diagnostic]]:
    measure = measure or f"measure logit(answer) as {'delta' if lines else 'raw'}"
    every = ("model vit", "images scenes limit 6", *lines, measure)
    body = "\n".join(f"  {line}" for line in every)
    text = f"mech 1\n{model}\n{blocks}\nexperiment e {{\n{body}\n}}\n"
    found = check_source(Source(text, folder / "file.mech"), CheckSettings())
    return found.experiments, [d for d in found.diagnostics if d.severity == "error"]


def table_of(folder: Path, *lines: str, **how: str) -> PromptTable:
    [experiment], problems = check(folder, *lines, **how)
    assert not problems
    return experiment.table


def codes(folder: Path, *lines: str, **how: str) -> list[str]:
    return [d.code for d in check(folder, *lines, **how)[1]]


RULE = "ablate resid_post layer 1 at {} with zero"


def hits(folder: Path, position: str) -> list[tuple[str, tuple[int, ...]]]:
    """Label and joined tokens of each cell, which are the same in all rows."""
    [experiment], problems = check(folder, RULE.format(position))
    assert not problems, problems
    found: list[tuple[str, tuple[int, ...]]] = []
    for cell in experiment.rules[0].positions.written.values():
        [tokens] = set(cell.hits)
        [joined] = tokens
        found.append((cell.label, joined))
    return found


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "wanted"),
    [
        ("cls token", [("cls token", (0,))]),
        ("image row 1 col 1 token", [("image row 1 col 1 token", (1,))]),
        ("image row 3 col 2 token", [("image row 3 col 2 token", (10,))]),
        ("image row 4 col 4 token + 0", [("image row 4 col 4 token", (16,))]),
        ("image row 2..3 col 1..2 tokens", [("image row 2..3 col 1..2 tokens", (5, 6, 9, 10))]),
        ("image row 2 col * tokens", [("image row 2 col * tokens", (5, 6, 7, 8))]),
        (
            "image row 2 col 1..2 token",
            [("image row 2 col 1", (5,)), ("image row 2 col 2", (6,))],
        ),
        ("image tokens", [("image tokens", tuple(range(1, 17)))]),
        ("first token of image", [("first token of image", (1,))]),
        ("last token of image", [("last token of image", (16,))]),
        ("first token", [("first token", (1,))]),
        ("last token", [("last token", (16,))]),
        ("token 0", [("0", (0,))]),
        ("token -1", [("-1", (16,))]),
        ("tokens *", [("tokens *", tuple(range(17)))]),
        ("tokens except image tokens + 0", None),
        ("tokens except image row 1..4 col 1..3 tokens", [(
            "tokens except image row 1..4 col 1..3 tokens", (4, 8, 12, 16))]),
        ("{cls token, image row 1 col 2 token}", [("{cls token, image row 1 col 2 token}",
                                                    (0, 2))]),
        ("tokens between image row 1 col 3 token and image row 2 col 1 token",
         [("tokens between image row 1 col 3 token and image row 2 col 1 token", (3, 4, 5))]),
    ],
)  # fmt: skip
def test_image_position_selects_its_tokens(
    position: str, wanted: list[tuple[str, tuple[int, ...]]] | None, tmp_path: Path
) -> None:
    folder_of(tmp_path)
    if wanted is None:
        assert codes(tmp_path, RULE.format(position))
    else:
        assert hits(tmp_path, position) == wanted


def test_each_patch_has_a_cell_with_row_and_column(tmp_path: Path) -> None:
    folder_of(tmp_path)
    wanted = [
        (f"image row {row} col {col}", (1 + (row - 1) * 4 + col - 1,))
        for row in range(1, 5)
        for col in range(1, 5)
    ]
    assert hits(tmp_path, "each token of image") == wanted
    assert hits(tmp_path, "image row * col * token") == wanted


def test_for_variable_selects_an_image_row(tmp_path: Path) -> None:
    folder_of(tmp_path)
    rule = "for r in 2..3 { ablate resid_post layer 1 at image row r col 4 token with zero }"
    [experiment], problems = check(tmp_path, rule)
    assert not problems
    cells = experiment.rules[0].positions.written.values()
    assert [cell.hits[0] for cell in cells] == [((8,),), ((12,),)]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *ENCODERS])
def test_painted_patch_affects_only_the_embedding_of_its_token(name: str) -> None:
    """The layout maps each row and column to the token that embeds these pixels."""
    model = support.shared(name)
    reader = model.tokenizer
    assert isinstance(reader, ImageTokenizer)
    assert len(reader.layout.front) == FRONT[name]
    assert (reader.layout.rows, reader.layout.cols) == (GRID, GRID)
    random = torch.Generator().manual_seed(0)
    blank = torch.randn(1, 3, SIDE, SIDE, generator=random)
    with support.embedded(name) as (module, seen):
        module(pixel_values=blank)
        for token in reader.layout.grid:
            left, top, right, bottom = reader.layout.box(token)
            painted = blank.clone()
            painted[:, :, top:bottom, left:right] += 1
            module(pixel_values=painted)
            changed = (seen[-1] - seen[0]).abs().amax(-1) > 1e-6
            assert changed.nonzero().flatten().tolist() == [token]
    places = [reader.layout.place(token) for token in reader.layout.grid]
    assert places == [(row, col) for row in range(1, GRID + 1) for col in range(1, GRID + 1)]


# --- rows -----------------------------------------------------------------------------------------


def test_generated_image_rows_are_distinct_and_reproducible(tmp_path: Path) -> None:
    folder_of(tmp_path)
    rows = table_of(tmp_path, RULE.format("cls token")).runs["clean"].rows
    assert len(rows) == 6  # four shapes, so two of them occur twice
    assert len({row.text for row in rows}) == len({row.ids[0] for row in rows}) == 6
    assert all(len({*row.ids}) == 1 and len(row.ids) == 17 for row in rows)
    assert all(row.special == (True, *[False] * 16) for row in rows)
    again = table_of(tmp_path, RULE.format("cls token")).runs["clean"].rows
    assert [row.text for row in again] == [row.text for row in rows]
    assert {row.texts["answer"].text for row in rows} == set(CONFIG["id2label"].values())


def test_generated_images_depend_on_the_seed(tmp_path: Path) -> None:
    folder_of(tmp_path)
    one, other = (
        {row.text for row in table_of(tmp_path, blocks=f"{seed}\n{SCENES}").runs["clean"].rows}
        for seed in ("seed 1", "seed 2")
    )
    assert one.isdisjoint(other)


def test_corrupted_shape_keeps_the_seed_of_the_image(tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = SCENES.replace('answer "', 'corrupt other { kind = other(kind) }\n  answer "')
    table = table_of(
        tmp_path,
        "from clean into other",
        "patch resid_post layer 1 at cls token",
        blocks=blocks,
    )
    for clean, other in zip(table.runs["clean"].rows, table.runs["other"].rows, strict=True):
        assert clean.image is not None
        assert other.image is not None
        assert clean.image.kind != other.image.kind
        assert clean.image.seed == other.image.seed
        assert clean.ids != other.ids


def test_where_filters_image_rows_before_a_split(tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = SCENES.replace("  answer", '  where kind != "cross"\n  split 50%\n  answer')
    [experiment], problems = check(tmp_path, blocks=blocks)
    assert not problems
    kinds = {row.values["kind"] for row in experiment.table.runs["clean"].rows}
    assert kinds == {"circle", "square", "triangle"}


def test_image_files_are_rows_with_processed_pixels(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        image = np.full((5, 7, 3), ord(name), np.uint8)
        Image.fromarray(image).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "data.csv").write_text("file,label\na,circle\nb,square\n")
    blocks = 'images scenes { rows "data.csv" image "pictures/{file}.png" answer "{label}" }'
    rows = table_of(tmp_path, blocks=blocks).runs["clean"].rows
    assert sorted(row.text.split(" #")[0] for row in rows) == ["pictures/a.png", "pictures/b.png"]
    images = [row.image for row in rows]
    assert [image.size for image in images if image] == [(5, 7)] * 2
    reader = check(tmp_path, blocks=blocks)[0][0].model.tokenizer
    assert isinstance(reader, ImageTokenizer)
    for row in rows:
        assert row.image is not None
        value = ord(row.text.split("/")[1][0])
        wanted = np.float32((np.float32(value / 255) - np.float32(0.5)) / np.float32(0.5))
        np.testing.assert_allclose(model_input(row.image, reader.processing), wanted, atol=1e-6)


def test_row_ids_depend_on_the_bytes_of_the_image_file(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "data.csv").write_text("file,label\na,circle\n")
    blocks = 'images scenes { rows "data.csv" image "{file}.png" answer "{label}" }'
    ids: list[int] = []
    for value in (3, 4):
        Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(tmp_path / "a.png")
        ids.append(table_of(tmp_path, blocks=blocks).runs["clean"].rows[0].ids[0])
    assert ids[0] != ids[1]


# --- without the model ----------------------------------------------------------------------------


def test_missing_image_model_skips_grid_and_label_checks(tmp_path: Path) -> None:
    """The grid and the labels are unknown without the model."""
    lines = (
        "patch resid_post layer 1 at image row 30 col 2 token",
        "from scenes into neutral",
        "ablate resid_post layer 3 at cls token with zero",
    )
    blocks = SCENES + "images neutral { image gray }"
    for measure in ("logit(answer)", "prob(class answer)", "logit(answer) - logit(class 3)"):
        assert codes(tmp_path, *lines, blocks=blocks, measure=f"measure {measure} as delta") == []
    assert codes(tmp_path, RULE.format("dog token")) == ["E0308"]


def test_validation_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder_of(tmp_path)
    text = f'mech 1\nmodel vit = local("vit")\n{SCENES}\nexperiment e {{ model vit images scenes '
    text += "limit 4 ablate embed at cls token with zero measure logit(answer) as delta }\n"
    (tmp_path / "file.mech").write_text(text)
    code = "import sys, mechdsl.cli as cli\nsys.argv[1:1] = ['validate']\n"
    code += "try: cli.main()\nexcept SystemExit as e: assert not e.code\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file.mech")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False False"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "wanted"),
    [
        ("image grey", "E0203"),
        ("image shapes(n: 1)", "E0207"),
        ("image shapes(1)", "E0207"),
        ('image shapes(kind: "circle", sides: 3)', "E0207"),
        ('image shapes(kind: "circle", kind: "cross")', "E0207"),
        ('image shapes(kind: "blob")', "E0503"),
        ('image shapes(kind: "circle", size: 2)', "E0503"),
        ('image shapes(kind: "circle", size: 9000)', "E0207"),
        ('image shapes(kind: "circle", n: 0)', "E0207"),
        ('image shapes(kind: "circle", n: 1.5)', "E0503"),
        ("image shapes(kind: 3)", "E0503"),
        ("image shapes(kind: other)", "E0501"),
        ("image grid", "E0207"),
        ('image grid("-")', "E0207"),
        ('image grid(marks: "@")', "E0207"),
        ('image grid(row: "-")', "E0207"),
        ('image grid(rows: "red blob")', "E0503"),
        ('image grid(rows: "-, - / -")', "E0503"),
        ('image grid(rows: "-", marks: "@ #")', "E0503"),
        ('image grid(rows: "-", marks: "!")', "E0503"),
        ("image grid(rows: 3)", "E0503"),
        ('image grid(rows: "-", cell: 6)', "E0207"),
        ('image grid(rows: "-, -", cell: 2000)', "E0503"),
        ('image grid(rows: "red circle 101%")', "E0503"),
        ('image grid(rows: "red circle 30")', "E0503"),
        ('image grid(rows: "-", noise: -1)', "E0207"),
        ("image gray(300)", "E0207"),
        ("image gray(1, 2)", "E0207"),
        ("image 3", "E0207"),
        ("image blur", "E0207"),
        ("image mean", "E0207"),
        ('image "nothing.png"', "E0560"),
        ('image "{file}.png"', "E0501"),
        ("image gray image noise", "E0209"),
        ("", "E0207"),
        ('image gray template "hello"', "E0207"),
        ('image gray span a = "b"', "E0207"),
        ("image gray region a = box", "E0501"),
        ('image gray corrupt c { template "b" }', "E0207"),
        ('image gray corrupt c { replace image tokens with "b" }', "E0207"),
        ("image gray corrupt c { add gaussian(std: 1) to embed at dog tokens }", "E0308"),
        ('image gray x in ["a", "b"] where tokens(x) = 1 text t = "{x}"', "E0207"),
    ],
)  # fmt: skip
def test_invalid_images_block_is_rejected(block: str, wanted: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    blocks = f'images scenes {{ {block} answer "circle" }}'
    found = codes(tmp_path, blocks=blocks, measure="measure logit(answer) as raw")
    assert found[:1] == [wanted], found


@pytest.mark.parametrize(
    ("position", "wanted"),
    [
        ("image row 5 col 1 token", "E0310"),
        ("image row 0 col 1 token", "E0310"),
        ("image row 1 col 5 token", "E0310"),
        ("image row 3..2 col 1 tokens", "E0321"),
        ("dog token", "E0308"),
        ("dog row 1 col 1 token", "E0308"),
        ("register token", "E0308"),
        ('"circle" token', "E0308"),
        ("answer token", "E0308"),
        ("token 17", "E0310"),
    ],
)
def test_invalid_image_position_is_rejected(position: str, wanted: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    assert codes(tmp_path, RULE.format(position)) == [wanted]


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (("generate 4",), "E0108"),
        (("from scenes into told", "patch resid_post layer 1 at last token"), "E0455"),
        (("renumber tokens * from 3",), "E0108"),
        (("observe logit_lens resid_post layer 1 at cls token",), "E0108"),
        (('replace image tokens with "a"',), "E0108"),
        (("set logits at cls token to 1",), "E0108"),
        (('save logits at cls token to "a.safetensors"',), "E0108"),
    ],
)
def test_text_only_statement_is_rejected_on_images(
    lines: tuple[str, ...], wanted: str, tmp_path: Path
) -> None:
    folder_of(tmp_path)
    told = 'prompts told { template "a b" }'
    blocks, measure = f"{SCENES}\n{told}", "measure prob(answer) as raw"
    assert codes(tmp_path, *lines, blocks=blocks, measure=measure) == [wanted]


def test_text_model_rejects_image_positions(tmp_path: Path) -> None:
    model = 'model vit = zoo("counting")'
    assert codes(tmp_path, RULE.format("image tokens"), model=model) == ["E0455"]


def test_metrics_of_image_classifiers_are_checked(tmp_path: Path) -> None:
    folder_of(tmp_path)
    for right in ("logit(answer)", "logit(class answer)", 'prob("cross")', "entropy", "correct"):
        assert codes(tmp_path, measure=f"measure {right} as raw") == []
    assert codes(tmp_path, measure='measure logit("dog") as raw') == ["E0442"]
    assert codes(tmp_path, measure="measure logit(answer) at cls token as raw") == ["E0446"]
    assert codes(tmp_path, measure="measure loss as raw") == ["E0444"]


def test_encoder_without_head_rejects_logit_metrics(tmp_path: Path) -> None:
    folder_of(tmp_path, architectures=["ViTModel"])
    assert codes(tmp_path, measure="measure logit(answer) as raw") == ["E0437"]
    measure = "measure cosine(resid_post layer 2, clean) at cls token as raw"
    assert codes(tmp_path, RULE.format("image tokens"), measure=measure) == []


def test_wide_patch_layout_maps_tokens_and_boxes() -> None:
    layout = PatchLayout(("cls", "register"), (4, 2), (16, 12))
    assert (layout.rows, layout.cols, layout.tokens) == (4, 6, 26)
    assert layout.token(1, 6) == 7
    assert layout.token(2, 1) == 8
    assert layout.place(8) == (2, 1)
    assert layout.place(1) is None
    assert layout.box(7) == (10, 0, 12, 4)
    assert layout.box(8) == (0, 4, 2, 8)
    assert layout.named("register") == (1,)


def test_wide_image_has_positions_for_all_columns(tmp_path: Path) -> None:
    folder_of(tmp_path, image_size=[16, 32], patch_size=[8, 4])
    processor = {**PROCESSOR, "size": {"height": 16, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert hits(tmp_path, "image row 2 col 8 token") == [("image row 2 col 8 token", (16,))]
    assert codes(tmp_path, RULE.format("image row 3 col 1 token")) == ["E0310"]
    assert codes(tmp_path, RULE.format("image row 1 col 9 token")) == ["E0310"]


def test_processor_of_another_image_size_is_rejected(tmp_path: Path) -> None:
    folder_of(tmp_path, image_size=64)
    assert codes(tmp_path, RULE.format("cls token")) == ["E0456"]


def test_dinov2_accepts_a_processor_of_another_image_size(tmp_path: Path) -> None:
    """DINOv2 interpolates positions, so the processor determines the image size."""
    folder_of(tmp_path, model_type="dinov2", architectures=["Dinov2Model"], image_size=64)
    measure = "measure cosine(resid_post layer 1, clean) at cls token as raw"
    [experiment], problems = check(tmp_path, RULE.format("cls token"), measure=measure)
    assert not problems
    assert len(experiment.table.runs["clean"].rows[0].ids) == 17


def test_cell_limit_excludes_cells_skipped_by_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of nine pairs of a and b, times twelve patches."""
    folder_of(tmp_path)
    rule = "scale resid_post layers a..b at image row 1..3 col * token by 2"
    loops = f"for a in 0..2 {{ for b in a..2 {{ {rule} }} }}"
    monkeypatch.setattr(limits, "CELLS", 72)
    assert codes(tmp_path, loops) == []
    monkeypatch.setattr(limits, "CELLS", 71)
    [found] = check(tmp_path, loops)[1]
    assert found.code == "E0323"
    assert "has 72 cells, more than 71" in found.message
    assert "a (3) × b (3)" in found.label_text
    assert "without 36 that loops exclude" in found.label_text


def test_conventions_count_distinct_labels(tmp_path: Path) -> None:
    folder_of(tmp_path)
    said = table_of(tmp_path, RULE.format("cls token")).conventions["answer"]
    assert said.endswith("` and 3 others: each the name of a label, not a token")


def test_expectation_checks_the_position_of_a_patch(tmp_path: Path) -> None:
    folder_of(tmp_path)
    rule = RULE.format("each token of image")
    right, wrong = (f'expect delta(position: "image row {row} col 4") < 9' for row in (3, 5))
    assert codes(tmp_path, rule, right) == []
    assert codes(tmp_path, rule, wrong) == ["E0203"]


LAYOUT = PatchLayout(("cls", "register", "register"), (4, 4), (8, 8))


def test_image_token_ids_depend_on_layout_and_processing() -> None:
    own, same, smooth = (
        ImageTokenizer(LAYOUT, Processing(("exact", 8, 8), resample=how)) for how in (2, 2, 3)
    )
    other = ImageTokenizer(replace(LAYOUT, front=("cls",)), own.processing)
    assert own.same_as(same)
    ids = {reader: reader.encode_all(["gray"])[0].ids[0] for reader in (own, smooth, other)}
    assert len(set(ids.values())) == 3
    assert not own.same_as(smooth)
    assert not own.same_as(other)
    assert same.encode_all(["gray"])[0].ids == (ids[own],) * 7


def test_image_token_labels_equal_position_syntax() -> None:
    reader = ImageTokenizer(LAYOUT, Processing(("exact", 8, 8)))
    assert [reader.label(token) for token in range(5)] == [
        "cls", "register 1", "register 2", "image row 1 col 1", "image row 1 col 2",
    ]  # fmt: skip


def test_generated_image_without_size_gets_the_model_size() -> None:
    reader = ImageTokenizer(LAYOUT, Processing(None))
    for picture in (Picture("noise", seed=3), Picture("gray")):
        image = image_row_fields(picture, {}, reader)["image"]
        assert image.size == (8, 8)
        assert model_input(image, reader.processing).shape == (3, 8, 8)
    kept = Picture("noise", size=(4, 6), seed=3)
    assert image_row_fields(kept, {}, reader)["image"] == kept
