"""Tokens inserted into prompts with images, and vectors trained at them, against plain hooks on the
bare model with its processor: one unpadded prompt at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mechdsl
from mechdsl.fits.reports import SoftPromptReport
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data
from ..images import prompts_of_images as vlm
from ..quick import some
from . import support, test_families
from .reference import at
from .support import RECORDS, experiment, run_file, try_file
from .test_rules import ANY, difference

COUNT = 2
ROWS = range(len(RECORDS))
LINES = {
    "front": "before photo tokens",
    "middle": "after photo tokens",
    "end": "after last token",
}
"""By corruption, the position of the inserted tokens."""


def with_insertions(block: str, word: str) -> str:
    """A block with a corruption for each position, whose placeholders are this word."""
    lines = (
        f'corrupt {name} {{ insert {COUNT} tokens {line} with " {word}" }}'
        for name, line in LINES.items()
    )
    return block.replace("  corrupt changed", "\n  ".join(["", *lines, "corrupt changed"]), 1)


BLOCK = with_insertions(support.BLOCK, "and")
TEXTS = {
    "front": "and and <image> how many {what} are there ? answer :",
    "middle": "<image> and and how many {what} are there ? answer :",
    "end": "<image> how many {what} are there ? answer : and and",
}


def inputs(name: str, number: int, image: int) -> dict[str, Tensor]:
    file = support.folder_of("llava") / f"{image}.png"
    return support.bare("llava").inputs(TEXTS[name].format(**RECORDS[number]), [file])


def inserted(given: dict[str, Tensor]) -> list[int]:
    """The positions of the placeholders: two in a row, as a record may contain the word once."""
    placeholder = support.bare("llava").processor.tokenizer.convert_tokens_to_ids("and")
    ids = given["input_ids"][0].tolist()
    return next([n, n + 1] for n in range(len(ids)) if ids[n : n + 2] == [placeholder] * COUNT)


def states(name: str, number: int, image: int) -> dict[str, list[Tensor]]:
    return support.bare("llava").states(inputs(name, number, image))


@pytest.mark.parametrize("mode", ANY)
@pytest.mark.parametrize("name", LINES)
def test_vectors_at_tokens_inserted_next_to_images_equal_hooks(name: str, mode: str) -> None:
    text = experiment("e", f"from clean into {name}", "set embed at inserted tokens to 0")
    text += experiment(
        "f", f"from clean into {name}", "ablate z layer 1 at inserted tokens with mean of " + name
    )
    found, bare = run_file(text, "llava", mode, BLOCK), support.bare("llava")
    each = [inputs(name, n, n) for n in ROWS]
    means = torch.stack(
        [states(name, n, n)["heads"][1][inserted(given)] for n, given in enumerate(each)]
    ).mean(0)
    base, zeros, averages = list[float](), list[float](), list[float]()
    for n, given in enumerate(each):
        own = inserted(given)
        base.append(difference("llava", bare.run(given), n))
        zero = bare.run(given, embed=at(own, torch.zeros(())))
        zeros.append(difference("llava", zero, n))
        averages.append(difference("llava", bare.run(given, heads={1: at(own, means)}), n))
    np.testing.assert_allclose(found["e"].measures[0].base[0], base, atol=1e-4)
    np.testing.assert_allclose(found["e"].measures[0].patched[0], zeros, atol=1e-4)
    np.testing.assert_allclose(found["f"].measures[0].patched[0], averages, atol=1e-4)
    assert np.abs(np.subtract(zeros, base)).max() > 0.1


def test_patch_from_a_prompt_without_inserted_tokens_equals_hooks() -> None:
    """Inserted tokens shift the positions of the image."""
    rule = "patch resid_post layer 0 at photo row 2 col 1..2 token"
    [found] = run_file(
        experiment("e", "from changed into front", rule), "llava", block=BLOCK
    ).values()
    bare = support.bare("llava")
    for col in range(2):
        expected: list[float] = []
        for n in ROWS:
            file = support.folder_of("llava") / f"{(n + 1) % 4}.png"
            source = bare.inputs(support.TEMPLATE.format(**RECORDS[n]), [file])
            token = bare.image_tokens(source)[3 + col]
            value = bare.states(source)["blocks"][0][token]
            edit = {0: at([token + COUNT], value)}
            expected.append(difference("llava", bare.run(inputs("front", n, n), blocks=edit), n))
        np.testing.assert_allclose(found.measures[0].patched[col], expected, atol=1e-4)


@pytest.mark.parametrize("name", LINES)
def test_completions_with_vectors_at_inserted_tokens_equal_hooks(name: str) -> None:
    measure = 'measure contains("1") as raw\n  report texts'
    lines = ("generate 4", f"from clean into {name}", "set embed at inserted tokens to 0")
    found = run_file(experiment("e", *lines, measure=measure), "llava", block=BLOCK)["e"]
    assert found.replies is not None
    for n in ROWS:
        given = inputs(name, n, n)
        own = inserted(given)
        expected = support.bare("llava").reply(given, 4, embed=at(own, torch.zeros(())))
        [reply] = found.replies.cells[0][n]
        assert list(reply.ids) == expected


BREAKS = {"gemma3": 1, "paligemma": 1}
"""Number of line breaks or BOS tokens after an image."""
FAMILIES = (
    "vipllava",
    "llava_next",
    "idefics3",
    "internvl",
    "qwen2_vl",
    "qwen3_vl",
    "gemma3",
    "paligemma",
)


@pytest.mark.parametrize("family", some(FAMILIES, ("idefics3", "qwen2_vl", "gemma3")))
def test_inserted_tokens_of_each_family_equal_hooks(family: str) -> None:
    """Covers models that number image tokens by row and column."""
    block = with_insertions(test_families.BLOCK, "w3")
    text = "".join(
        experiment(name, f"from clean into {name}", "set embed at inserted tokens to 0")
        for name in LINES
    )
    found = test_families.run_text(family, text, block=block)
    own, marker = test_families.bare(family), vlm.FAMILIES[family].marker
    largest = 0.0
    line_break = vlm.FAMILIES[family].before_end
    for number, name in enumerate(LINES):
        if name == "end" and line_break:
            continue  # its processor ends a prompt with a line break
        base, values = list[float](), list[float]()
        for n in ROWS:
            words = f"w3 w2 PHOTO w1 {test_families.WORDS[n]} w3"
            more = {"front": "w3 w3 PHOTO", "middle": "PHOTO w3 w3"}.get(name, "PHOTO")
            words = words.replace("PHOTO", more) + (" w3 w3" if name == "end" else line_break)
            picture = Image.open(test_families.folder() / f"{n}.png").convert("RGB")
            given = own.with_pictures(words.replace("PHOTO", marker), [picture])
            moved = test_families.layout_of(family, n, n)
            length = test_families.inputs(family, n, n)["input_ids"].shape[1]
            first = {
                "front": 2 if line_break else 3,
                "middle": moved.end + BREAKS.get(family, 0),
            }.get(name, length)
            edit = at([first, first + 1], torch.zeros(()))
            base.append(test_families.difference(own.run(given)))
            values.append(test_families.difference(own.run(given, embed=edit)))
        np.testing.assert_allclose(found[number].measures[0].base[0], base, atol=1e-4)
        np.testing.assert_allclose(found[number].measures[0].patched[0], values, atol=1e-4)
        largest = max(largest, float(np.abs(np.subtract(values, base)).max()))
    assert largest > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl"])
def test_inserted_tokens_between_adjacent_images_equal_hooks(family: str) -> None:
    """The tokens are between the closing markers of one image and the opening ones of the next."""
    block = with_insertions(test_families.BLOCK, "w3").replace("photo tokens", "one tokens")
    block = block.replace('image photo = "{file}"', 'image one = "{file}"\n  image two = "{other}"')
    block = block.replace("{photo}", "{one}{two}")
    text = experiment("e", "from clean into middle", "set embed at inserted tokens to 0")
    [found] = test_families.run_text(family, text, block=block)
    own, marker = test_families.bare(family), vlm.FAMILIES[family].marker
    values: list[float] = []
    for n in ROWS:
        pictures = [
            Image.open(test_families.folder() / f"{k}.png").convert("RGB") for k in (n, (n + 1) % 4)
        ]
        words = f"w3 w2 {marker} w3 w3 {marker} w1 {test_families.WORDS[n]} w3"
        given = own.with_pictures(words, pictures)
        alone = own.with_pictures(f"w3 w2 {marker} w3 w3", pictures[:1])
        length = alone["input_ids"].shape[1]
        edit = at([length - 2, length - 1], torch.zeros(()))
        values.append(test_families.difference(own.run(given, embed=edit)))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)


# --- trained vectors ------------------------------------------------------------------------------

QUICK = "steps: 6, batch: 2, rate: 0.05, seed: 3, validation: 34%, measure_on_training_rows: true"
TRAINED = f"""
direction v = fit(
  soft_prompt(tokens: {COUNT}), prompts: front of ask,
  maximise: logit(answer) - logit(wrong), {QUICK}
) at embed at inserted tokens
"""


@pytest.fixture
def trained(tmp_path: Path) -> tuple[dict[str, ExperimentResult], Tensor, SoftPromptReport]:
    """A run of trained vectors, the vectors and the report of their training."""
    folder = tmp_path / "model"
    shutil.copytree(support.folder_of("llava"), folder)
    lines = ("from clean into front", "set embed at inserted tokens to v")
    text = experiment("e", *lines) + experiment(
        "f", *lines, "generate 4", measure='measure contains("1") as raw\n  report texts'
    )
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local(".")\n{BLOCK}{TRAINED}{text}', encoding="utf-8")
    [found] = mechdsl.fit(path, store=tmp_path / "store")
    assert isinstance(found.report, SoftPromptReport)
    saved = load_file(found.folder / "vector.safetensors")
    vectors = torch.stack([saved[f"vector.position{n}"] for n in range(COUNT)])
    result = mechdsl.run(path, store=tmp_path / "store")
    return {each.name: as_in_the_data(each) for each in result.experiments}, vectors, found.report


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_vectors_trained_in_prompts_with_images_equal_hooks(
    trained: tuple[dict[str, ExperimentResult], Tensor, SoftPromptReport],
) -> None:
    """In the measure, in replies, and in the means of the report's controls."""
    found, vectors, report = trained
    bare = support.bare("llava")
    assert found["f"].replies is not None
    values: dict[str, list[float]] = {"trained": [], "placeholders": []}
    for n in ROWS:
        given = inputs("front", n, n)
        edit = at(inserted(given), vectors)
        values["trained"].append(difference("llava", bare.run(given, embed=edit), n))
        values["placeholders"].append(difference("llava", bare.run(given), n))
        [reply] = found["f"].replies.cells[0][n]
        assert list(reply.ids) == bare.reply(given, 4, embed=edit)
    measured = found["e"].measures[0].patched[0]
    np.testing.assert_allclose(measured, values["trained"], atol=1e-4)
    assert (report.rows, report.held_out_rows) == (3, 1)
    away = np.abs(np.array(values["trained"]) - report.trained)
    held_out = int(away.argmin())
    assert away[held_out] < 1e-3
    assert report.placeholders == pytest.approx(values["placeholders"][held_out], abs=1e-3)


@pytest.mark.slow
def test_trained_vectors_improve_the_measure(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(support.folder_of("llava"), folder)
    options = "steps: 60, batch: 4, rate: 0.2, validation: 0%, measure_on_training_rows: true"
    text = TRAINED.replace(QUICK, options)
    text += experiment("e", "from clean into front", "set embed at inserted tokens to v")
    path = folder / "file.mech"
    path.write_text(f'mech 1\nmodel m = local(".")\n{BLOCK}{text}', encoding="utf-8")
    [found] = mechdsl.fit(path, store=tmp_path / "store")
    assert isinstance(found.report, SoftPromptReport)
    assert found.report.trained > max(found.report.random, found.report.placeholders) + 0.5


def test_saved_directions_are_written_at_each_inserted_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = support.loaded("llava").shape.d_model
    vectors = torch.randn(COUNT, width)
    names = ("a", "b")
    file = support.folder_of("llava") / "two.safetensors"
    save_file({name: vectors[n].clone() for n, name in enumerate(names)}, file)
    directions = "".join(
        f'direction {name} = saved("two.safetensors", "{name}") at embed\n' for name in names
    )
    text = directions + experiment(
        "e", "from clean into middle", "set embed at inserted tokens to [a, b]"
    )
    found = run_file(text, "llava", block=BLOCK)["e"]
    expected: list[float] = []
    for n in ROWS:
        given = inputs("middle", n, n)
        edit = at(inserted(given), vectors)
        expected.append(difference("llava", support.bare("llava").run(given, embed=edit), n))
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "code", "said"),
    [
        ('before photo tokens with " and"', "before photo tokens", "E0207", "with"),
        ("before photo tokens", "before foto tokens", "E0308", "photo"),
        ("before photo tokens", "before photo row 9 col 1 token", "E0310", "3 rows"),
        ('" and"', '" and is"', "E0207", "has 2 tokens"),
        ("before photo tokens", "after photo row 1 col 2 token", "E0207", "as a whole"),
        (f"{COUNT} tokens before photo", "0 tokens before photo", "E0515", "1 to 1,000"),
    ],
)  # fmt: skip
def test_invalid_insertion_reports_code_and_fix(
    before: str, after: str, code: str, said: str
) -> None:
    text = experiment("e", "from clean into front", "set embed at inserted tokens to 0")
    assert before in BLOCK
    _, found = try_file(text, "llava", block=BLOCK.replace(before, after, 1))
    errors = [each for each in found if each.severity == "error"]
    assert code in [each.code for each in errors], errors
    shown = " ".join(support.render_full(errors, color=False, width=1000).split())
    assert said in shown, shown
