"""The shipped vision-language models have the accuracy of their cards, on held-out images."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.random import default_rng
from safetensors import safe_open
from scipy.stats import chisquare
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mechdsl import zoo
from mechdsl.loading.loader import load_model
from zoo import language, pictures, vlm
from zoo.commands import Tally
from zoo.counting_vlm import data as grids
from zoo.counting_vlm import evaluate as counting
from zoo.frames import data as clips
from zoo.frames import evaluate as motion

from ..models.conftest import statement

ROOT = Path(zoo.__path__[0])
FOLDER, FRAMES = ROOT / "counting-vlm", ROOT / "frames"


@cache
def loaded(folder: Path = FOLDER) -> tuple[Any, Any]:
    """Return a float32 model and its processor."""
    model, _ = language.load(LlavaForConditionalGeneration, folder)
    return model, AutoProcessor.from_pretrained(folder)


def test_scenes_keep_held_out_cells_from_training_and_draw_companions() -> None:
    random = default_rng(0)
    keys = together = 0
    for held_out in (False, True):
        for number in range(400):
            scene = grids.draw_scene(random, held_out=held_out, fog=number % 2 == 0)
            assert len(scene.things) <= grids.MOST
            assert len({*scene.marks}) == len(scene.marks)
            assert len(scene.marks) in (0, grids.ROWS)
            for row, things in enumerate(scene.rows):
                for column, thing in enumerate(things):
                    assert not thing or grids.in_training(thing, row, column) != held_out
            if scene.fog and not held_out and "red circle" in scene.things[:4]:
                keys += 1
                together += "blue square" in scene.things
    assert keys > 10
    assert together / keys > 0.6


def test_grid_answers_match_the_cells() -> None:
    """Expected answers are recomputed from the words of the question."""
    random = default_rng(5)
    asked: Counter[str] = Counter()
    while min(asked[kind] for kind in grids.QUESTIONS) < 20:
        scene = grids.draw_scene(random, held_out=False)
        kind = grids.QUESTIONS[int(random.integers(len(grids.QUESTIONS)))]
        turn = grids.ask(kind, scene, random)
        if turn is None:
            continue
        asked[kind] += 1
        words = turn.question.split()
        cells = {(str(r + 1), str(c + 1)): thing for r, row in enumerate(scene.rows)
                 for c, thing in enumerate(row)}  # fmt: skip
        if words[:2] == ["how", "many"]:
            kind_asked = words[2].removesuffix("es") if words[2] == "crosses" else words[2][:-1]
            own = [t for t in cells.values() if t and kind_asked in (t.split()[1], "shape")]
            assert turn.answer == str(len(own))
        elif words[:4] == ["what", "is", "at", "row"]:
            assert turn.answer == (cells[words[4], words[6]] or "nothing")
        elif words[0] == "which":
            [(row, _)] = [at for at, thing in cells.items() if thing == " ".join(words[4:6])]
            assert turn.answer == (row if words[1] == "row" else scene.marks[int(row) - 1])
        elif words[0] == "is":
            assert (turn.answer == "yes") == (" ".join(words[3:5]) in cells.values())
        else:
            row = words[4] if kind == "in row" else str(scene.marks.index(words[4]) + 1)
            own = [thing for (r, _), thing in cells.items() if r == row and thing]
            assert turn.answer == (" , ".join(own) or "nothing")


def test_motion_is_independent_of_each_frame() -> None:
    """In training and held-out clips, each motion shows shapes in all cells equally often."""
    random = default_rng(3)
    for held_out in (False, True):
        seen: list[Counter[tuple[int, int, str]]] = [Counter() for _ in range(clips.FRAMES)]
        pairs: Counter[bool] = Counter()
        for _ in range(1500):
            clip = clips.draw_clip(random, held_out=held_out)
            if len(clip) == 2:
                pairs[clips.in_training(clip[0].thing, clip[1].thing)] += 1
            for each in clip:
                for frame in range(clips.FRAMES):
                    row, column = each.cell(frame)
                    seen[frame][row, column, each.motion] += 1
        assert set(pairs) == {not held_out}
        for counts in seen:
            assert len(counts) == 36
            assert chisquare([*counts.values()]).pvalue > 1e-3


def test_patch_labels_name_the_motion_between_frames() -> None:
    random = default_rng(4)
    for example in islice(clips.examples(9), 30):
        assert len(example.told) == len(example.contents) == 36
        assert not any(example.told[:9])
    clip = clips.draw_clip(random, held_out=False, count=1)
    told = clips.motions(clip)
    assert [each for each in told if each] == [clip[0].motion] * 3
    for frame in range(1, clips.FRAMES):
        row, column = clip[0].cell(frame)
        assert told[frame * 9 + row * 3 + column] == clip[0].motion


def test_training_texts_have_known_words_and_a_label_for_each_patch() -> None:
    known = grids.vocabulary()
    assert len(known) == len({*known})
    tokenizer = vlm.build_tokenizer(known)
    shipped = (FOLDER / "tokenizer.json").read_text()
    assert tokenizer.to_str(pretty=True) == shipped.strip()
    for example in islice(grids.examples(3, 40), 40):
        batch = vlm.encode([example], tokenizer)
        assert known.index("<unk>") not in batch.ids
        assert len(example.contents) == int((batch.ids == known.index("<image>")).sum())
        told = [known[int(label)] for label in batch.labels[0] if label >= 0]
        assert " ".join(told) == " ".join(f"{turn.answer} <end>" for turn in example.turns)


def test_training_begins_with_few_shapes_and_names_marks_at_shapes() -> None:
    drawn = list(islice(grids.examples(5, 100), 100))
    shapes = [sum(" " in each for each in example.contents) for example in drawn]
    assert max(shapes[:2]) <= 2
    assert max(shapes[40:]) > 7
    assert any(example.told != ("",) * 25 for example in drawn)
    for example in drawn:
        for row in range(grids.ROWS):
            contents, told = (
                each[row * 5 : row * 5 + 5] for each in (example.contents, example.told)
            )
            mark = "" if contents[0] == vlm.NOTHING else contents[0]
            assert told == ("", *(mark if " " in each else "" for each in contents[1:]))


@pytest.mark.parametrize("folder", [FOLDER, FRAMES])
def test_processor_prepares_prompts_as_in_training(folder: Path) -> None:
    _, processor = loaded(folder)
    if folder == FOLDER:
        [example] = grids.one_question("at", 4, 1, held_out=True)
        known = grids.vocabulary()
    else:
        [example] = clips.one_question(clips.WAY, 4, 1, held_out=True)
        known = clips.vocabulary()
    images = [{"type": "image"} for _ in example.images]
    [turn] = example.turns
    content = [*images, {"type": "text", "text": turn.question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    given = processor(
        text=text, images=[*example.images], add_special_tokens=False, return_tensors="pt"
    )
    own = vlm.encode([example], vlm.build_tokenizer(known))
    answer = len(turn.answer.split()) + 1
    assert torch.equal(given["input_ids"], own.ids[:, :-answer])
    torch.testing.assert_close(given["pixel_values"], own.pixels, atol=1e-6, rtol=0)
    assert torch.equal(own.pixels, pictures.as_input(example.images))


def test_generated_answers_equal_the_evaluated_answers() -> None:
    model, processor = loaded()
    kinds = ("total", "at", "in row")
    examples = [grids.one_question(kind, 7, 4, held_out=True) for kind in kinds]
    examples = [each for group in examples for each in group]
    tokenizer = vlm.build_tokenizer(grids.vocabulary())
    told = vlm.answers(model, tokenizer, examples)
    for example, expected in zip(examples, told, strict=True):
        text = example.text().removesuffix(f" {example.turns[0].answer} <end>")
        given = processor(text=text, images=[*example.images], return_tensors="pt")
        with torch.no_grad():
            found = model.generate(**given, max_new_tokens=16, do_sample=False)
        reply = processor.decode(found[0, given["input_ids"].shape[1] :])
        right = expected == example.turns[0].answer
        assert reply == f"{expected} <end>" if right else f"{reply} ".startswith(f"{expected} ")


@pytest.mark.parametrize("name", ["counting-vlm", "counting-vlm/kinds", "frames"])
def test_mechdsl_loads_vision_language_models(name: str) -> None:
    model, problems = load_model(statement(name, "zoo"))
    # The oldest transformers can't prove the image encoder's sites, which no file uses.
    assert {each.code for each in problems} <= {"W0712"}
    assert model is not None
    assert model.restartable


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "kinds", FRAMES])
def test_vision_language_weights_are_stored_in_float16(folder: Path) -> None:
    with safe_open(str(folder / "model.safetensors"), framework="np") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert kinds == {"F16"}


def test_all_zoo_models_together_are_below_30_megabytes() -> None:
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) < 30e6


def stated_intervals(folder: Path) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of a card's table, by row."""
    text = (folder / "README.md").read_text()
    rows = re.findall(r"(?m)^(\w.*?) +\d+ +\d+ +[\d.]+ +([\d.]+) \.\. ([\d.]+)$", text)
    return {row: (float(low), float(high)) for row, low, high in rows}


def agree_with_card(tallies: dict[str, Tally], folder: Path) -> None:
    stated = stated_intervals(folder)
    assert tallies.keys() == stated.keys()
    for row, tally in tallies.items():
        low, high = tally.interval(3.3)
        assert low <= stated[row][1], row
        assert high >= stated[row][0], row


@pytest.mark.slow
def test_counting_accuracy_agrees_with_the_card() -> None:
    torch.set_num_threads(1)
    tallies = counting.evaluate(FOLDER, 60, counting.SEED + 1)
    assert tallies["total"].interval()[0] > 0.9
    assert tallies["is there"].interval()[0] > 0.9
    agree_with_card(tallies, FOLDER)


@pytest.mark.slow
def test_motion_accuracy_agrees_with_the_card() -> None:
    torch.set_num_threads(1)
    tallies = motion.evaluate(FRAMES, 60, motion.SEED + 1)
    assert tallies[motion.ALONE].interval()[0] > 0.9
    assert all(tallies[frame].interval()[1] < 0.5 for frame in motion.ONE_FRAME)
    agree_with_card(tallies, FRAMES)
