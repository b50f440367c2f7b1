"""Several images in a prompt of LLaVA-OneVision, whose processor then cuts none of them into tiles,
against plain hooks on one unpadded prompt at a time. Positions of tokens are computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.execute.image_vectors import prepare_images
from mechdsl.prompts.tokens.image_prompts import ImagePromptTokenizer
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, check_file, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_video_processors as videos
from .reference import at, one_head
from .support import experiment, succeeded
from .test_families import ALL, STATS, WORDS, bare, difference, folder, loaded
from .test_interpolated_patches import HEADS, WIDTH, edited, state

NAME = "llava_onevision"
CELLS = 4
"""Tokens of an image without tiles, 2 x 2; one more follows them."""
VALUES = """
  rows "data.jsonl"
  image one = "{file}"
  image two = "{other}"
  words = if n = 1 then "w1" else if n = 2 then "w2 w1" else if n = 3 then "w3 w1 w2" else "w2"
  answer " w1"
  wrong " w2"
  corrupt swapped { swap one, two }
  corrupt masked { mask two }
"""
BLOCKS = f"""
prompts single {{
  template "w3 w2 {{one}} w1 {{words}} w3"
{VALUES.replace("  corrupt swapped { swap one, two }", "").replace("mask two", "mask one")}}}
prompts pair {{
  template "w3 {{one}} w1 {{words}} {{two}} w2 w3"
{VALUES}}}
prompts three {{
  template "w3 {{one}} {{two}} w1 {{words}} {{one}} w3"
{VALUES}}}
"""
TEXTS = {
    "single": "w3 w2 <image> w1 {words} w3",
    "pair": "w3 <image> w1 {words} <image> w2 w3",
    "three": "w3 <image> <image> w1 {words} <image> w3",
}
ORDER = {"single": (0,), "pair": (0, 1), "three": (0, 1, 0)}


def picture(number: int, *, masked: bool = False) -> Image.Image:
    found = Image.open(folder() / f"{number}.png").convert("RGB")
    return Image.new("RGB", found.size, (128, 128, 128)) if masked else found


@cache
def inputs(n: int, change: str = "", block: str = "pair") -> dict[str, Tensor]:
    """The inputs of a prompt; change: the name of a corruption."""
    hidden = change == "masked"
    one = picture(n, masked=hidden and block == "single")
    two = picture((n + 1) % 4, masked=hidden and block != "single")
    if change == "swapped":
        one, two = two, one
    pictures = [(one, two)[each] for each in ORDER[block]]
    return bare(NAME).with_pictures(TEXTS[block].format(words=WORDS[n]), pictures)


def first(n: int, image: int, block: str = "pair") -> int:
    """The first token of an image: `<s>` and words are one token each."""
    before = TEXTS[block].format(words=WORDS[n]).split()
    places = [place for place, word in enumerate(before) if word == "<image>"]
    return 1 + places[image] + image * CELLS


def cell(n: int, image: int, row: int, col: int, block: str = "pair") -> int:
    return first(n, image, block) + 2 * (row - 1) + col - 1


def every(n: int, image: int, block: str = "pair") -> list[int]:
    return [*range(first(n, image, block), first(n, image, block) + CELLS)]


def run_text(text: str, mode: str = "planned", **options: Any) -> dict[str, ExperimentResult]:
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCKS}\n{text}'
    source = Source(whole, folder() / "f.mech")
    return succeeded(*run_on(source, {"m": loaded(NAME)}, MODES[mode], **options))


def of_block(block: str, name: str, *lines: str, **options: Any) -> str:
    return experiment(name, *lines, **options).replace("prompts ask", f"prompts {block}")


def clean(n: int, layer: int = 0) -> Tensor:
    return bare(NAME).states(inputs(n))["blocks"][layer]


def each(run: Callable[[int], Tensor]) -> list[float]:
    return [difference(run(n)) for n in ALL]


def in_block(layer: int, places: Callable[[int], Sequence[int]], values: Any) -> list[float]:
    """Swapped prompts with vectors written after a block; values: by prompt."""

    def run(n: int) -> Tensor:
        edit = at(places(n), values(n))
        return bare(NAME).run(inputs(n, "swapped"), blocks={layer: edit})

    return each(run)


def in_vision(site: str, layer: int, edit: Callable[[int], Any]) -> list[float]:
    """Swapped prompts with a site of the encoder edited."""

    def run(n: int) -> Tensor:
        with edited(NAME, site, layer, edit(n)):
            return bare(NAME).run(inputs(n, "swapped"))

    return each(run)


def zero(n: int) -> Tensor:
    return torch.zeros(())


@pytest.mark.parametrize("block", ["pair", "three"])
def test_inputs_of_several_images_have_the_tokens_computed_here(block: str) -> None:
    for n in ALL:
        firsts = [first(n, image, block) for image in range(len(ORDER[block]))]
        expected = [start + k for start in firsts for k in range(CELLS + 1)]
        assert bare(NAME).image_tokens(inputs(n, block=block)) == expected


CASES: dict[str, Callable[[], list[list[float]]]] = {
    "patch resid_post layer 0 at two row 1 col 2 token": lambda: [
        in_block(0, lambda n: [cell(n, 1, 1, 2)], lambda n: clean(n)[[cell(n, 1, 1, 2)]])
    ],
    "patch resid_post layer 0 at two tokens onto one tokens": lambda: [
        in_block(0, lambda n: every(n, 0), lambda n: clean(n)[every(n, 1)])
    ],
    "ablate resid_post layer 1 at one row 2 col * tokens with zero": lambda: [
        in_block(1, lambda n: every(n, 0)[2:], zero)
    ],
    "ablate resid_post layer 0 at two row 2 col 1 token with mean of clean": lambda: [
        in_block(
            0,
            lambda n: [cell(n, 1, 2, 1)],
            lambda _: torch.stack([clean(n)[cell(n, 1, 2, 1)] for n in ALL]).mean(0),
        )
    ],
    "patch resid_post vision layer 0 at two row 1 col * token": lambda: [
        in_vision(
            "resid_post",
            0,
            lambda n, k=k: at([CELLS + k], state("resid_post", 0, inputs(n), NAME)[[CELLS + k]]),
        )
        for k in range(2)
    ],
    "ablate z vision layer 1 head * at one tokens with zero": lambda: [
        in_vision(
            "z", 1, lambda n, h=h: one_head(at(range(CELLS), torch.zeros(())), h, WIDTH // HEADS)
        )
        for h in range(HEADS)
    ],
    "patch resid_post vision layer 0 at one row 2 col 2 token onto two row 1 col 1 token": lambda: [
        in_vision(
            "resid_post", 0, lambda n: at([CELLS], state("resid_post", 0, inputs(n), NAME)[[3]])
        )
    ],
}


@pytest.mark.parametrize("mode", some([*MODES], ["planned", "padded on the right"]))
def test_rules_at_one_of_two_images_equal_hooks(mode: str) -> None:
    text = "".join(
        of_block("pair", f"e{n}", "from clean into swapped", rule) for n, rule in enumerate(CASES)
    )
    base = each(lambda n: bare(NAME).run(inputs(n, "swapped")))
    pairs = zip(run_text(text, mode).values(), CASES.items(), strict=True)
    for found, (rule, values) in pairs:
        measure = found.measures[0]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, values(), 1e-4, 1e-4, err_msg=rule)
        assert np.abs(measure.patched - base).max() > 0.1, rule


@pytest.mark.parametrize("mode", some(["planned", "plain"], ["planned"]))
def test_image_alone_and_in_groups_in_one_file_equals_the_bare_model(mode: str) -> None:
    """An image alone has tiles; with others, the same image has none."""
    rules = {"single": "one", "pair": "one", "three": "one 2"}
    text = "".join(
        of_block(
            *(block, f"e_{block}", "from clean into masked"),
            f"ablate resid_post layer 0 at {image} row 2 col 2 token with zero",
        )
        for block, image in rules.items()
    )
    found = run_text(text, mode)
    for block in rules:
        base = each(lambda n, block=block: bare(NAME).run(inputs(n, "masked", block)))
        np.testing.assert_allclose(found[f"e_{block}"].measures[0].base[0], base, atol=1e-4)
    for block, image in (("pair", 0), ("three", 2)):
        patched = each(
            lambda n, block=block, image=image: bare(NAME).run(
                inputs(n, "masked", block),
                blocks={0: at([cell(n, image, 2, 2, block)], zero(n))},
            )
        )
        own = found[f"e_{block}"].measures[0].patched[0]
        np.testing.assert_allclose(own, patched, atol=1e-4)


def test_prompts_of_one_to_three_images_in_one_block_equal_the_bare_model() -> None:
    """The same image has both forms in one batch of prompts."""
    templates = ", ".join(
        f'"{TEXTS[block].replace("<image>", "{}").format(*names, words="{words}")}"'
        for block, names in (("single", ["{one}"]), ("three", ["{one}", "{two}", "{one}"]))
    )
    block = f"prompts mixed {{\n  template in [{templates}]\n{VALUES}}}\n"
    rule = "ablate resid_post layer 0 at last token with zero"
    text = of_block("mixed", "e", rule)
    whole = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    source = Source(whole, folder() / "f.mech")
    [found] = succeeded(*run_on(source, {"m": loaded(NAME)}, MODES["planned"])).values()
    said = [found.conventions[f"image `{name}`"] for name in ("one", "two")]
    assert "`, padded to a square and not cut into tiles in prompts of several images; " in said[0]
    assert "`, padded to a square and not cut into tiles; " in said[1]
    measure = found.measures[0]
    rows = [(n, name) for name in ("single", "three") for n in ALL]
    base = [difference(bare(NAME).run(inputs(n, block=name))) for n, name in rows]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    patched = [
        difference(bare(NAME).run(inputs(n, block=name), blocks={0: at([-1], zero(n))}))
        for n, name in rows
    ]
    np.testing.assert_allclose(measure.patched[0], patched, atol=1e-4)


def test_image_written_twice_next_to_another_equals_hooks() -> None:
    positions: dict[str, Callable[[int], list[int]]] = {
        "one tokens": lambda n: every(n, 0, "three") + every(n, 2, "three"),
        "two row 1 col 2 token": lambda n: [cell(n, 1, 1, 2, "three")],
    }
    text = "".join(
        of_block("three", f"e{n}", f"ablate resid_post layer 0 at {position} with zero")
        for n, position in enumerate(positions)
    )
    for found, places in zip(run_text(text).values(), positions.values(), strict=True):
        expected = each(
            lambda n, places=places: bare(NAME).run(
                inputs(n, block="three"), blocks={0: at(places(n), zero(n))}
            )
        )
        np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=1e-4)


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_replies_to_two_images_under_a_rule_in_the_encoder_equal_hooks(mode: str) -> None:
    lines = (
        *("model m", "prompts pair", "generate 4"),
        "scale resid_post vision layer 0 at two row 1 col 1 token by -7",
        *('measure matches("w") as raw', STATS),
    )
    [found] = run_text("experiment r {\n" + "\n".join(lines) + "\n}\n", mode).values()
    assert found.replies is not None

    def scaled(value: Tensor) -> Tensor:
        value[CELLS] *= -7
        return value

    for n in ALL:
        with edited(NAME, "resid_post", 0, scaled):
            expected = bare(NAME).reply(inputs(n), 4)
        [reply] = found.replies.cells[0][n]
        assert list(reply.ids) == expected


def test_observations_at_one_of_two_images_equal_the_bare_encoder() -> None:
    lines = (
        "observe norm resid_post vision layer 0 at two row 2 col 1 token",
        "observe norm embed at one tokens",
        "observe similarity resid_post vision layer 1 at one row 1 col 1 token with "
        "two row 2 col 2 token",
    )
    text = "".join(of_block("pair", f"e{n}", line, measure="") for n, line in enumerate(lines))
    found = [own.measures[0].patched[0] for own in run_text(text).values()]
    for n in ALL:
        inner = [state("resid_post", layer, inputs(n), NAME) for layer in (0, 1)]
        embedded = bare(NAME).states(inputs(n))["embed"][0][every(n, 0)]
        pair = inner[1][[0, CELLS + 3]]
        expected = (
            inner[0][CELLS + 2].norm(),
            embedded.norm(dim=-1).mean(),
            torch.nn.functional.cosine_similarity(*pair, dim=0),
        )
        for own, value in zip(found, expected, strict=True):
            np.testing.assert_allclose(own[n], float(value), 1e-4, 1e-5)


def test_estimates_at_one_of_two_images_equal_gradients() -> None:
    rule = "patch resid_post layer 0 at two row * col * token"
    [found] = run_text(of_block("pair", "e", "from clean into swapped", rule, "using atp")).values()
    for n in ALL:
        kept: list[Tensor] = []

        def keep(value: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(value.detach().requires_grad_())
            return kept[0]

        given, own = inputs(n, "swapped"), every(n, 1)
        with torch.enable_grad():
            hook = (
                bare(NAME)
                .block(0)
                .register_forward_hook(
                    lambda module, args, output, keep=keep: (
                        (keep(output[0]), *output[1:])
                        if isinstance(output, tuple)
                        else keep(output)
                    )
                )
            )
            try:
                words = [vlm.WORDS["w1"], vlm.WORDS["w2"]]
                logits = bare(NAME).model(**given).logits[0, -1, words]
                (logits[0] - logits[1]).backward()
            finally:
                hook.remove()
        assert kept[0].grad is not None
        change = (clean(n) - kept[0].detach()[0])[own] * kept[0].grad[0, own]
        effect = found.measures[0].patched[:, n] - found.measures[0].base[0, n]
        np.testing.assert_allclose(effect, change.sum(-1), 1e-4, 1e-4)


def test_prepared_copy_of_a_grouped_image_equals_that_of_the_processor() -> None:
    """The vectors of one image don't depend on the other images of its prompt."""
    text = of_block("pair", "e", "ablate resid_post layer 0 at one tokens with zero")
    [found] = check_file(text, folder(), loaded(NAME), BLOCKS).experiments
    reader = loaded(NAME).tokenizer
    assert isinstance(reader, ImagePromptTokenizer)
    for row in found.table.runs["clean"].rows:
        n = int(row.values["n"]) - 1
        for image, placed in enumerate(row.whole_pictures):
            batch, own = prepare_images(loaded(NAME), reader, [placed.picture])
            assert int(own.sum()) == CELLS + 1
            pixels = inputs(n)["pixel_values"][image]
            np.testing.assert_allclose(batch.extra["pixel_values"][0].cpu(), pixels, atol=1e-6)


@pytest.mark.parametrize("images", [1, 2])
def test_images_next_to_a_video_are_grouped_without_it(images: int) -> None:
    """One image next to a video has a thumbnail and tiles, as it has alone."""
    shown = "{one} " + "{two} " * (images - 1)
    block = videos.BLOCK.replace("{clip}", f"{shown}{{clip}}").replace(
        "  template", '  image one = "{size}-{a}.png"\n  image two = "{size}-3.png"\n  template'
    )
    places = ("one row 1 col 2 token", "frame 2 row 1 col 2 token", "one tokens")
    text = "".join(
        experiment(f"e{n}", f"ablate resid_post layer 0 at {place} with zero")
        for n, place in enumerate(places)
    )
    found = videos.run(text, videos.QUICK[0], block=block)
    own = videos.bare(videos.QUICK[0])
    before_tiles = 0 if images == 2 else 16
    for n in videos.ALL:
        size, a = n % 2, n % 4
        rows, cols = ((2, 4), (4, 2))[size]  # of patches without padding
        each_image = 16 + 1 if images == 2 else 16 + rows * (cols + 1)
        files = [videos.folder() / f"{size}-{k}.png" for k in (a, 3)][:images]
        frames = [np.asarray(Image.open(videos.folder() / f"{size}-{k}.png")) for k in (a, a, 4, a)]
        made = own.processor(
            text=[f"w3 w2 {'<image> ' * images}<video> w1 {WORDS[n]} w3"],
            images=[[Image.open(file).convert("RGB") for file in files]],
            videos=[np.stack(frames)],
            do_sample_frames=False,
            video_metadata=[videos.metadata(videos.QUICK[0], 4)],
            return_tensors="pt",
        )
        given = {key: value for key, value in made.items() if key != "video_metadata"}
        start = 3 + each_image * images
        whole = [3 + k for k in range(16)]
        if images == 1:
            whole += [19 + (cols + 1) * row + col for row in range(rows) for col in range(cols)]
        cells = ([3 + before_tiles + 1], [start + 4 + 1], whole)
        for k, tokens in enumerate(cells):
            logits = own.run(given, blocks={0: at(tokens, torch.zeros(()))})
            measure = found[f"e{k}"].measures[0]
            np.testing.assert_allclose(measure.base[0, n], difference(own.run(given)), atol=1e-4)
            np.testing.assert_allclose(measure.patched[0, n], difference(logits), atol=1e-4)


def test_saved_patches_of_one_of_two_images_equal_the_bare_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = 'save resid_post vision layer 0 of {} at two tokens to "{}/{}.safetensors"'
    lines = [line.format(run, tmp_path, run) for run in ("clean", "swapped")]
    rule = "ablate resid_post layer 0 at one tokens with zero"
    run_text(of_block("pair", "e", "from clean into swapped", rule, *lines))
    for run in ("clean", "swapped"):
        saved = load_file(tmp_path / f"{run}.safetensors")
        order = torch.argsort(saved["row"], stable=True)
        found = saved["resid_post.vision.layer0"][order].reshape(len(ALL), CELLS, -1)
        numbers = saved["patch"][order].reshape(len(ALL), CELLS)
        tokens = saved["token"][order].reshape(len(ALL), CELLS)
        for n in ALL:
            given = inputs(n, "" if run == "clean" else run)
            expected = state("resid_post", 0, given, NAME)[CELLS : 2 * CELLS]
            np.testing.assert_allclose(found[n], expected, atol=1e-5)
            assert numbers[n].tolist() == [*range(CELLS)]
            assert set(tokens[n].tolist()) == {first(n, 1)}


@pytest.mark.parametrize("block", ["pair", "three"])
def test_loss_of_text_between_images_equals_the_bare_model(block: str) -> None:
    rule = "ablate resid_post layer 0 at two row 1 col 2 token with zero"
    [found] = run_text(of_block(block, "e", rule, measure="measure loss as raw")).values()
    patched = found.measures[0].patched[0]
    for n in ALL:
        given = inputs(n, block=block)
        edit = at([cell(n, 1, 1, 2, block)], zero(n))
        logs = bare(NAME).run(given, blocks={0: edit}).log_softmax(-1)
        ids = given["input_ids"][0].tolist()
        text = [k for k in range(1, len(ids)) if ids[k] != bare(NAME).image_id]
        losses = [-float(logs[k - 1, ids[k]]) for k in text]
        np.testing.assert_allclose(patched[n], np.mean(losses), atol=2e-4)
    assert np.abs(patched - found.measures[0].base[0]).max() > 0.01
