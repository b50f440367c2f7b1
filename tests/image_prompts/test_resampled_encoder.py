"""Rules in the vision encoder of Idefics2, whose resampler reads all patches of a tile for each
token, against plain hooks on the bare encoder: one unpadded prompt at a time. The processor's own
pixel masks give the patches of an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.diagnostics.rendering import render_full
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.cost import vision_adds
from mechdsl.planner.passes import make_plan
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, check_file, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from ..shared_models import unchanged
from . import test_families as families
from .reference import Bare, Edit, at, edited_module, one_head, record_value
from .support import RECORDS, experiment, succeeded
from .test_families import ALL, BLOCK, TWO, WORDS, difference

LAYERS, HEADS, WIDTH, PATCH = 2, 2, 16, 4
Key = tuple[str | int, ...]
SITES: dict[str, tuple[str, bool]] = {
    "resid_pre": ("", True),
    "resid_post": ("", False),
    "z": (".self_attn.out_proj", True),
    "mlp_out": (".mlp", False),
}
SIZES = {"equal": [(21, 14)] * 4, "mixed": [(21, 14), (9, 16), (16, 16), (30, 9)]}
"""By name of a folder, (height, width) of its images."""


def write_data(made: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write an image of each size (height, width), and the records of the data."""
    for number, (height, width) in enumerate(sizes):
        small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image.save(made / f"{number}.png")
    text = "\n".join(map(json.dumps, RECORDS)) + "\n"
    (made / "data.jsonl").write_text(text, encoding="utf-8")
    return made


@cache
def folder(sizes: str) -> Path:
    return write_data(Path(mkdtemp(prefix="mechdsl-resampled-")), SIZES[sizes])


@cache
def bare(*, splits: bool) -> Bare:
    """A model of images of up to 4 x 4 patches, whose last token sees all tokens of images."""
    config = vlm.architecture("idefics2").config
    model = families.draw(
        "idefics2",
        text_config={**config["text_config"], "sliding_window": 64},
        vision_config={**config["vision_config"], "image_size": 4 * PATCH},
    )
    processor = deepcopy(vlm.processor("idefics2"))
    size = {"shortest_edge": 8, "longest_edge": 4 * PATCH}
    images = type(processor.image_processor)
    processor.image_processor = images(size=size, do_image_splitting=splits)
    return Bare(model, processor)


@cache
def loaded(*, splits: bool) -> LoadedModel:
    own = bare(splits=splits)
    model, found = adopt_model("m", own.model, own.processor)
    assert model is not None, found
    return unchanged(model)


def inputs(sizes: str, n: int, *images: int, splits: bool = True) -> dict[str, Tensor]:
    """A prompt of `BLOCK` with one image, or of `TWO` with two."""
    pictures = [Image.open(folder(sizes) / f"{image}.png").convert("RGB") for image in images]
    text = f"w3 w2 <image> w1 {WORDS[n]} w3"
    if len(images) == 2:
        text = f"w3 <image> w1 {WORDS[n]} <image> w2 w3"
    return bare(splits=splits).with_pictures(text, pictures)


def patches(given: dict[str, Tensor]) -> list[int]:
    """The tokens of the encoder, over all tiles, that aren't padding."""
    [mask] = given["pixel_attention_mask"]
    whole = mask.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).float().mean((-1, -2)) == 1
    return whole.flatten().nonzero()[:, 0].tolist()


@contextmanager
def edited(site: str, layer: int, edit: Edit, *, splits: bool = True) -> Generator[None]:
    """Change a site, [token of the encoder, width], over all tiles; `z` has all heads in a row."""
    part, is_input = SITES[site]
    path = f"model.vision_model.encoder.layers.{layer}{part}"
    module = bare(splits=splits).model.get_submodule(path)
    with edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input):
        yield


def state(site: str, layer: int, given: dict[str, Tensor], *, splits: bool = True) -> Tensor:
    run = partial(bare(splits=splits).run, given)
    return record_value(partial(edited, site, layer, splits=splits), run)


def other(n: int) -> int:
    return (n + 1) % 4


def under(
    sizes: str, site: str, layer: int, edit: Callable[[int, list[int]], Edit], *, splits: bool
) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number and the
    patches of the image."""
    found: list[float] = []
    for n in ALL:
        given = inputs(sizes, n, other(n), splits=splits)
        with edited(site, layer, edit(n, patches(given)), splits=splits):
            found.append(difference(bare(splits=splits).run(given)))
    return found


def copied(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    def edit(n: int, own: list[int], layer: int) -> Edit:
        clean = inputs(sizes, n, n, splits=splits)
        return at(own, state("resid_pre", layer, clean, splits=splits)[patches(clean)])

    return {
        (layer,): under(sizes, "resid_pre", layer, partial(edit, layer=layer), splits=splits)
        for layer in range(LAYERS)
    }


def zeros(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    def edit(n: int, own: list[int], head: int) -> Edit:
        return one_head(at(own, torch.zeros(())), head, WIDTH // HEADS)

    return {
        (head,): under(sizes, "z", 0, partial(edit, head=head), splits=splits)
        for head in range(HEADS)
    }


def times(own: Sequence[int], factor: float) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[list(own)] *= factor
        return value

    return edit


def scaled(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    return {(): under(sizes, "resid_pre", 1, lambda n, own: times(own, -2), splits=splits)}


def constant(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    def edit(n: int, own: list[int], head: int) -> Edit:
        return one_head(at(own, torch.tensor(1.5)), head, WIDTH // HEADS)

    return {
        (head,): under(sizes, "z", 1, partial(edit, head=head), splits=splits)
        for head in range(HEADS)
    }


def means(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    every = [inputs(sizes, n, n, splits=splits) for n in ALL]
    own = [state("resid_post", 0, given, splits=splits)[patches(given)] for given in every]
    mean = torch.stack(own).mean(0)
    return {(): under(sizes, "resid_post", 0, lambda n, own: at(own, mean), splits=splits)}


def copied_numbers(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    def edit(n: int, own: list[int]) -> Edit:
        given = inputs(sizes, n, n, splits=splits)
        clean = state("resid_post", 0, given, splits=splits)[patches(given), :4]

        def change(value: Tensor) -> Tensor:
            value[own, :4] = clean
            return value

        return change

    return {(): under(sizes, "resid_post", 0, edit, splits=splits)}


def frozen(sizes: str, *, splits: bool) -> dict[Key, list[float]]:
    """Scaled patches, while the output of an MLP keeps its values of the base run."""
    values: list[float] = []
    for n in ALL:
        given = inputs(sizes, n, other(n), splits=splits)
        own = patches(given)
        keep = at(own, state("mlp_out", 1, given, splits=splits)[own])
        scale = edited("resid_pre", 0, times(own, -2), splits=splits)
        with scale, edited("mlp_out", 1, keep, splits=splits):
            values.append(difference(bare(splits=splits).run(given)))
    return {(): values}


Case = Callable[..., dict[Key, list[float]]]
ANY: dict[str, tuple[list[str], Case]] = {
    "ablate z vision layer 0 head * at photo tokens with zero": (["head"], zeros),
    "scale resid_pre vision layer 1 at photo tokens by -2": ([], scaled),
    "set z vision layer 1 head * at photo tokens to 1.5": (["head"], constant),
    "scale resid_pre vision layer 0 at photo tokens by -2\n"
    "  freeze mlp_out vision layer 1 at photo tokens": ([], frozen),
}
"""Rules for images of all sizes."""
CASES = ANY | {
    "patch resid_pre vision layer * at photo tokens": (["layer"], copied),
    "ablate resid_post vision layer 0 at photo tokens with mean of clean": ([], means),
    "patch resid_post vision layer 0 dims 0..3 at photo tokens": ([], copied_numbers),
}


def source(text: str, sizes: str, block: str = BLOCK) -> Source:
    written = f'mech 1\nmodel m = local("handed over")\n{block}\n{text}'
    return Source(written, folder(sizes) / "f.mech")


def run_text(
    text: str, sizes: str, mode: str = "planned", block: str = BLOCK, *, splits: bool = True
) -> list[ExperimentResult]:
    model = {"m": loaded(splits=splits)}
    return list(succeeded(*run_on(source(text, sizes, block), model, MODES[mode])).values())


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize(
    ("sizes", "splits"), [("equal", True), ("mixed", True), ("equal", False), ("mixed", False)]
)
def test_rules_at_all_patches_equal_hooks(sizes: str, splits: bool, mode: str) -> None:
    """All rules in one file, each with an effect of more than 0.1."""
    cases = CASES if sizes == "equal" else ANY
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    own = bare(splits=splits)
    base = [difference(own.run(inputs(sizes, n, other(n), splits=splits))) for n in ALL]
    found = run_text(text, sizes, mode, splits=splits)
    for result, (rule, (axes, expected)) in zip(found, cases.items(), strict=True):
        measure, cells = result.measures[0], expected(sizes, splits=splits)
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        keys = {tuple(cell.coords[axis] for axis in axes): n for n, cell in enumerate(result.cells)}
        assert keys.keys() == cells.keys()
        for key, values in cells.items():
            where = f"{rule}: {key}"
            np.testing.assert_allclose(
                measure.patched[keys[key]], values, 1e-4, 1e-4, err_msg=where
            )
        assert max(np.abs(np.array(values) - base).max() for values in cells.values()) > 0.1, rule


def test_rules_in_one_of_two_images_equal_hooks_also_in_replies() -> None:
    """The patches of the second image follow those of the first one, in another tile."""
    block = TWO.replace("corrupt changed { swap one, two }\n", "")
    block = block.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    rules = [f"scale resid_post vision layer 0 at {p} tokens by -2" for p in ("one", "two")]
    rules.append("swap resid_pre vision layer 0 at one tokens with two tokens")
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    text = text.replace("prompts ask", "prompts both")
    text += experiment("r", "generate 4", rules[1], measure='measure matches("w") as raw').replace(
        "prompts ask", "prompts both"
    )
    *results, replies = run_text(text, "equal", block=block)
    assert replies.replies is not None
    for n in ALL:
        given, model = inputs("equal", n, n, other(n)), bare(splits=True)
        every = patches(given)
        first, second = every[: len(every) // 2], every[len(every) // 2 :]

        def exchange(value: Tensor, first: list[int] = first, second: list[int] = second) -> Tensor:
            value[first + second] = value[second + first]
            return value

        edits = [("resid_post", times(first, -2)), ("resid_post", times(second, -2))]
        for result, (site, edit) in zip(results, [*edits, ("resid_pre", exchange)], strict=True):
            with edited(site, 0, edit):
                value = difference(model.run(given))
            np.testing.assert_allclose(result.measures[0].patched[0, n], value, atol=1e-4)
        with edited("resid_post", 0, times(second, -2)):
            expected = model.reply(given, 4)
        assert list(replies.replies.cells[0][n][0].ids) == expected
    assert all(np.abs(r.measures[0].patched - r.measures[0].base).max() > 0.1 for r in results)


def test_patch_from_a_masked_image_of_each_size_equals_hooks() -> None:
    block = BLOCK.replace("corrupt changed { file = other }", "corrupt hidden { mask photo }")
    rule = "patch resid_post vision layer 0 at photo tokens"
    [found] = run_text(experiment("e", "from hidden into clean", rule), "mixed", block=block)
    values: list[float] = []
    for n, (height, width) in enumerate(SIZES["mixed"]):
        gray = Image.new("RGB", (width, height), (128, 128, 128))
        text, model = f"w3 w2 <image> w1 {WORDS[n]} w3", bare(splits=True)
        given = inputs("mixed", n, n)
        seen = state("resid_post", 0, model.with_pictures(text, [gray]))[patches(given)]
        with edited("resid_post", 0, at(patches(given), seen)):
            values.append(difference(model.run(given)))
    np.testing.assert_allclose(found.measures[0].patched[0], values, atol=1e-4)
    assert np.abs(np.array(values) - found.measures[0].base[0]).max() > 0.1


def test_rule_in_a_derived_run_equals_hooks() -> None:
    lines = (
        "run turned { scale resid_pre vision layer 1 at photo tokens by -2 }",
        ("from turned into clean"),
    )
    text = experiment("e", *lines, "patch resid_post layer 1 at last token")
    [found] = run_text(text, "mixed")
    for n in ALL:
        given, model = inputs("mixed", n, n), bare(splits=True)
        with edited("resid_pre", 1, times(patches(given), -2)):
            vector = model.states(given)["blocks"][1][-1]
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(found.measures[0].patched[0, n], value, atol=1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.1


def norms(given: dict[str, Tensor], site: str, layer: int, *, splits: bool) -> Tensor:
    """[patch, head] of `z`, otherwise [patch, 1]."""
    own = state(site, layer, given, splits=splits)[patches(given)]
    return own.unflatten(-1, (HEADS if site == "z" else 1, -1)).norm(dim=-1)


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize(("sizes", "splits"), [("mixed", True), ("mixed", False)])
def test_observed_norm_is_the_mean_over_all_patches(sizes: str, splits: bool, mode: str) -> None:
    """In an unpatched run, of another run, of each head, and after a rule."""
    lines = (
        ("observe norm resid_post vision layer * at photo tokens",),
        ("observe norm resid_pre vision layer * of changed at photo tokens",),
        ("observe norm z vision layer 1 head * at photo tokens",),
        (
            "scale resid_pre vision layer 0 at photo tokens by -2",
            "observe norm resid_post vision layer * at photo tokens",
        ),
    )
    text = "".join(experiment(f"e{n}", *own, measure="") for n, own in enumerate(lines))
    post, other_run, heads, after = (
        each.measures[0].patched for each in run_text(text, sizes, mode, splits=splits)
    )
    for n in ALL:
        given = inputs(sizes, n, n, splits=splits)
        changed = inputs(sizes, n, other(n), splits=splits)
        for layer in range(LAYERS):
            expected = norms(given, "resid_post", layer, splits=splits).mean()
            np.testing.assert_allclose(post[layer, n], expected, rtol=1e-5)
            expected = norms(changed, "resid_pre", layer, splits=splits).mean()
            np.testing.assert_allclose(other_run[layer, n], expected, rtol=1e-5)
            with edited("resid_pre", 0, times(patches(given), -2), splits=splits):
                expected = norms(given, "resid_post", layer, splits=splits).mean()
            np.testing.assert_allclose(after[layer, n], expected, rtol=1e-5)
        expected = norms(given, "z", 1, splits=splits).mean(0)
        np.testing.assert_allclose(heads[:, n], expected, rtol=1e-5)
    assert np.abs(after / post - 1).max() > 0.1
    assert len({len(patches(inputs("mixed", n, n))) for n in ALL}) > 1


def test_observed_norm_of_one_of_two_images_equals_that_of_the_bare_encoder() -> None:
    block = TWO.replace("corrupt changed { swap one, two }\n", "")
    block = block.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    line = "observe norm resid_post vision layer 0 at one tokens, two tokens"
    joined = "observe norm resid_post vision layer 0 at {one tokens, two tokens}"
    text = experiment("e", line, measure="") + experiment("f", joined, measure="")
    text += experiment("g", "generate 2", line, measure="")
    results = run_text(text.replace("prompts ask", "prompts both"), "mixed", block=block)
    each, both, before_reply = (found.measures[0].patched for found in results)
    for n in ALL:
        given = inputs("mixed", n, n, other(n))
        own = norms(given, "resid_post", 0, splits=True)[:, 0]
        alone = [len(patches(inputs("mixed", n, image))) for image in (n, other(n))]
        assert sum(alone) == len(own)
        expected = [own[: alone[0]].mean(), own[alone[0] :].mean(), own.mean()]
        np.testing.assert_allclose([*each[:, n], both[0, n]], expected, rtol=1e-5)
        np.testing.assert_allclose(before_reply[:, n], expected[:2], rtol=1e-5)


@pytest.mark.parametrize("sizes", some(SIZES, ["mixed"]))
def test_planned_cost_of_the_encoder_is_near_the_counted_products(sizes: str) -> None:
    """Each prompt runs the encoder on its own patches, not on those of the largest image."""
    text = experiment("e", "scale resid_post vision layer * at photo tokens by 2")
    [checked] = check_file(text, folder(sizes), loaded(splits=True), BLOCK).experiments
    [plan] = make_plan([checked]).panels[0].experiments
    prompts = np.arange(len(ALL))
    planned = vision_adds(plan, plan.rows(prompts), prompts)
    counts = [vision_products(inputs(sizes, n, n)) for n in ALL]
    assert 0.9 < planned / ((LAYERS + 1) * sum(counts)) < 1.5


def vision_products(given: dict[str, Tensor]) -> int:
    """The products of the encoder's blocks on one prompt."""
    own, calls = bare(splits=True), list[tuple[Any, Any]]()
    encoder = own.model.get_submodule("model.vision_model.encoder")
    handle = encoder.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        own.run(given)
    finally:
        handle.remove()
    [(args, kwargs)] = calls
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoder(*args, **kwargs)
    return counter.get_total_flops() // 2


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "observe cka resid_post vision layer 0 with resid_post layer 0 at photo tokens": (
        "a rule on sites in the vision encoder and in the language model"
    ),
}


@pytest.mark.parametrize(("line", "reason"), ERRORS.items())
def test_invalid_line_reports_e0108_before_anything_runs(line: str, reason: str) -> None:
    text = experiment("e", "from clean into changed", line)
    if "observe" in line:
        text = experiment("e", line, measure="")
    found: Sequence[Diagnostic] = run_on(source(text, "mixed"), {"m": loaded(splits=True)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0108"
    assert reason in problem.message, problem.message


@pytest.mark.parametrize(
    ("site", "code", "hint"),
    [
        ("neuron vision layer 1 dim 3", "E0322", "`mlp_hidden vision layer 1 neuron 3`"),
        ("head vision layer 1", "E0322", "`z vision layer 1 head 3`"),
        ("z layer vision", "E0322", "`z vision layer 1`"),
        ("z vision layer 9", "E0302", ""),
    ],
)
def test_site_with_an_error_reports_no_position(site: str, code: str, hint: str) -> None:
    """Whether an image has rows and columns depends on the site's stack."""
    text = experiment("e", f"ablate {site} at photo row 1 col 1 token with zero")
    found: Sequence[Diagnostic] = run_on(source(text, "mixed"), {"m": loaded(splits=True)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == code, problem
    assert hint in render_full([problem], color=False, width=200)


UNEQUAL = (
    "set resid_pre vision layer 1 at photo tokens to "
    "value(resid_pre vision layer 1 at photo tokens) of clean",
    "patch resid_post vision layer 0 at photo tokens",
    "ablate resid_post vision layer 0 at photo tokens with mean of clean",
)


@pytest.mark.parametrize("line", UNEQUAL)
def test_images_with_different_numbers_of_patches_report_an_error(line: str) -> None:
    text = experiment("e", "from clean into changed", line)
    found: Sequence[Diagnostic] = run_on(source(text, "mixed"), {"m": loaded(splits=True)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code in ("E0307", "E0108"), problem
    assert "patch" in f"{problem.message} {problem}", problem


@pytest.mark.parametrize("splits", [True, False])
def test_conventions_count_tokens_and_patches_of_an_image(splits: bool) -> None:
    """The model's processor gives the number of tokens, and its masks the patches."""
    text = experiment("e", "scale resid_post vision layer 0 at photo tokens by 2")
    [found] = run_text(text, "mixed", splits=splits)
    count = 0
    grids: set[tuple[int, int]] = set()
    thumbnails: set[tuple[int, int]] = set()
    for n in ALL:
        given = inputs("mixed", n, n, splits=splits)
        count = int((given["input_ids"] == bare(splits=splits).model.config.image_token_id).sum())
        [mask] = given["pixel_attention_mask"]
        grid = mask.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).float().mean((-1, -2)) == 1
        rows, cols = grid.any(2).sum(1).tolist(), grid.any(1).sum(1).tolist()
        grids.add((rows[0] + rows[2], cols[0] + cols[1]) if splits else (rows[0], cols[0]))
        thumbnails.add((rows[-1], cols[-1]))
    shown = ", ".join(f"{high} x {wide}" for high, wide in sorted(grids)[:3])
    shown += " patches" + (" and 1 more size" if len(grids) == 4 else "")
    if splits:
        views = ", ".join(f"{high} x {wide}" for high, wide in sorted(thumbnails))
        shown += f", and {views} patches of the thumbnail"
    assert found.conventions["image `photo`"].endswith(
        f"; {count} tokens without rows and columns, each computed from all patches of a tile; "
        f"in the vision encoder {shown}, rows and columns counted from 1 at the top left"
    )


def test_conventions_recommend_controls_only_where_they_are_valid() -> None:
    for rule in (
        "scale resid_post vision layer 0 at photo tokens by 2",
        "scale z layer 0 at last token by 2",
    ):
        lines = (rule, "against random(3)")
        asked = run_on(source(experiment("e", *lines), "mixed"), {"m": loaded(splits=True)})[1]
        [found] = run_text(experiment("e", rule), "mixed")
        rejected = any(each.severity == "error" for each in asked)
        assert ("against" in found.conventions["controls"]) != rejected


def test_rows_and_columns_of_the_language_model_report_e0310() -> None:
    text = experiment("e", "observe norm resid_post layer 0 at photo row 1 col 1 token", measure="")
    found: Sequence[Diagnostic] = run_on(source(text, "mixed"), {"m": loaded(splits=True)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0310"
    assert "tokens without rows and columns" in str(problem)


def test_observation_of_unknown_patches_reports_e0413(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(self: Any, *given: Any) -> list[tuple[int, ...]]:
        raise UnsupportedProcessor("its patches aren't known")

    monkeypatch.setattr(type(IMAGE_LAYOUTS["idefics2"]), "patches", reject)
    own = bare(splits=True)
    model, found = adopt_model("m", deepcopy(own.model), own.processor)
    assert model is not None, found
    text = experiment("e", "observe norm resid_post vision layer 0 at photo tokens", measure="")
    [problem] = [p for p in run_on(source(text, "equal"), {"m": model})[1] if p.severity == "error"]
    assert problem.code == "E0413"
    assert "its patches aren't known" in str(problem)


@pytest.mark.parametrize("verb", ["scale", "observe norm"])
def test_wrong_grid_reports_e0413(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout with too few rows of the tiles leaves out patches that change tokens."""
    entry = type(IMAGE_LAYOUTS["idefics2"])
    right = entry.patches

    def wrong(self: Any, *given: Any) -> list[tuple[int, ...]]:
        first, *rest = right(self, *given)
        return [(*first[1:], -1), *rest]

    monkeypatch.setattr(entry, "patches", wrong)
    own = bare(splits=True)
    model, found = adopt_model("m", deepcopy(own.model), own.processor)
    assert model is not None, found
    rule = f"{verb} resid_post vision layer 0 at photo tokens"
    text = experiment("e", f"{rule} by 2") if verb == "scale" else experiment("e", rule, measure="")
    problems = run_on(source(text, "equal"), {"m": model})[1]
    assert [each.code for each in problems if each.severity == "error"] == ["E0413"]
