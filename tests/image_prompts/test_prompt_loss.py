"""The loss of prompts with images, a mean over their text, against hooks on the bare model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.diagnostics.rendering import render_full

from ..execute.support import run_on
from ..images import prompts_of_images as vlm
from ..quick import in_turn, some
from . import test_families as families
from . import test_video_processors as videos
from .reference import Edit, at
from .support import STATS, experiment
from .test_families import (
    ALL,
    BLOCK,
    NAMES,
    TWO,
    bare,
    both,
    cells,
    every_cell,
    folder,
    inputs,
    run_text,
)

CAUSAL = [name for name in NAMES if not name.startswith("paligemma")]
"""Families whose tokens of text see earlier tokens only."""
MODES_OF_PADDING = ("planned", "padded on the right")
LOSS = "measure loss as raw"
TEXT = {vlm.WORDS[each] for each in ("w1", "w2", "w3")}
FIRST = BLOCK.replace("w3 w2 {photo} w1 {words} w3", "{photo} {words}")


def loss_of(logits: Tensor, given: dict[str, Tensor], tokens: set[int] = TEXT) -> Tensor:
    """The mean over tokens of text, each predicted from the preceding tokens."""
    ids = given["input_ids"][0].tolist()
    places = [n for n, token in enumerate(ids) if n and token in tokens]
    logs = logits.log_softmax(-1)
    return -torch.stack([logs[n - 1, ids[n]] for n in places]).mean()


def rule_of(name: str) -> tuple[str, Callable[[int, int], list[int]]]:
    """A position, and its tokens in a record with an image."""
    if name == "idefics2":  # its tokens have no cells
        return "photo tokens", lambda n, image: every_cell(name, n, image)
    return "photo row 1 col 2 token", lambda n, image: [cells(name, n, image)[1, 2]]


@pytest.mark.parametrize(
    ("name", "mode"), in_turn(CAUSAL, MODES_OF_PADDING, ("llava_next", "qwen3_vl"))
)
def test_loss_with_a_rule_at_an_image_token_equals_hooks(name: str, mode: str) -> None:
    where, tokens = rule_of(name)
    text = experiment("a", f"ablate resid_post layer 0 at {where} with zero", measure=LOSS)
    text += experiment(
        "b", "from clean into changed", f"patch resid_post layer 0 at {where}", measure=LOSS
    )
    zeros, patched = run_text(name, text, mode)
    own, expected = bare(name), list[list[float]]()
    for n in ALL:
        other = (n + 1) % 4
        value = own.states(inputs(name, n, n))["blocks"][0][tokens(n, n)]
        edits: list[tuple[int, dict[int, Edit] | None]] = [
            (n, None),
            (n, {0: at(tokens(n, n), torch.zeros(()))}),
            (other, None),
            (other, {0: at(tokens(n, other), value)}),
        ]
        given = [(inputs(name, n, image), edit) for image, edit in edits]
        expected.append([float(loss_of(own.run(own_in, blocks=e), own_in)) for own_in, e in given])
    found = [
        values
        for each in (zeros, patched)
        for values in (each.measures[0].base[0], each.measures[0].patched[0])
    ]
    np.testing.assert_allclose(np.array(found).T, expected, atol=1e-4)
    assert np.abs(np.array(expected)[:, 1] - np.array(expected)[:, 0]).max() > 0.01


@pytest.mark.parametrize(("name", "mode"), in_turn(CAUSAL, MODES_OF_PADDING, ("idefics3",)))
def test_loss_of_a_prompt_that_begins_with_an_image_includes_its_first_word(
    name: str, mode: str
) -> None:
    [found] = run_text(
        name,
        experiment("e", "ablate mlp_out layer 1 at last token with zero", measure=LOSS),
        mode,
        FIRST,
    )
    own, expected = bare(name), list[float]()
    for n in ALL:
        image = families.Image.open(folder() / f"{n}.png").convert("RGB")
        words = f"{vlm.FAMILIES[name].marker} {families.WORDS[n]}"
        given = own.with_pictures(words, [image])
        expected.append(float(loss_of(own.run(given), given)))
    np.testing.assert_allclose(found.measures[0].base[0], expected, atol=1e-4)
    said = found.conventions["loss"]
    assert said.startswith("mean over the prompt's own tokens of text including the first, which `")
    assert said.endswith("` predicts; tokens of images don't count")


SEVERAL = [name for name in CAUSAL if name != "idefics3"]
"""Families of `CAUSAL` whose context is long enough for two images."""


@pytest.mark.parametrize("name", some(SEVERAL, ("qwen2_5_vl",)))
def test_loss_of_prompts_with_two_images_and_completions_equals_hooks(name: str) -> None:
    lines = (
        "model m", "prompts both", "generate 2",
        "ablate resid_post layer 0 at one tokens with zero",
        LOSS, "measure length as raw", STATS,
    )  # fmt: skip
    [found] = run_text(name, "experiment e {\n" + "\n".join(lines) + "\n}\n", block=TWO)
    own = bare(name)
    expected = [float(loss_of(own.run(both(name, n)), both(name, n))) for n in ALL]
    np.testing.assert_allclose(found.measures[0].base[0], expected, atol=1e-4)


UNPREDICTED = {
    "gemma3": ("loss at photo row 1 col 2 token", "includes a token of an image"),
    "llava_class": ("loss at token 2..5", "includes a token of an image"),
    "paligemma": ("loss", "attends to later ones, so none of them is predicted"),
    "paligemma2": ("loss at last token", "attends to later ones, so none of them is predicted"),
}
"""Family → a loss that its model doesn't have, and the reason."""


@pytest.mark.parametrize("name", some(UNPREDICTED, ("llava_class", "paligemma")))
def test_loss_of_tokens_that_no_model_predicts_reports_e0612(name: str) -> None:
    metric, reason = UNPREDICTED[name]
    line = experiment(
        "e", "ablate mlp_out layer 1 at last token with zero", measure=f"measure {metric} as raw"
    )
    block = BLOCK.replace(' w3"\n', ' w3 \\n"\n') if vlm.FAMILIES[name].before_end else BLOCK
    source = f'mech 1\nmodel m = local("handed over")\n{block}\n{line}'
    result, found = run_on(Source(source, folder() / "f.mech"), {"m": families.loaded(name)})
    [error] = [each for each in found if each.severity == "error"]
    assert result is None
    assert error.code == "E0612"
    assert reason in render_full([error], color=False, width=400)


def test_loss_of_prompts_with_videos_equals_hooks() -> None:
    name = "video_llava"
    rule = "ablate resid_post layer 0 at frame 2 row 1 col 2 token with zero"
    [found] = videos.run(experiment("e", rule, measure=LOSS), name).values()
    own, expected = videos.bare(name), list[list[float]]()
    for n in ALL:
        given = videos.inputs(name, n, n)
        edit = at([videos.cell(name, n, 2, 1, 2)], torch.zeros(()))
        runs = own.run(given), own.run(given, blocks={0: edit})
        expected.append([float(loss_of(logits, given)) for logits in runs])
    measure = found.measures[0]
    np.testing.assert_allclose([measure.base[0], measure.patched[0]], np.transpose(expected),
                               atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("name", some(["llava_class", "qwen3_vl"], ["llava_class"]))
def test_objective_that_measures_loss_equals_autograd(name: str) -> None:
    path = folder() / "loss.mech"
    line = experiment("e", "ablate mlp_out layer 1 at last token with zero", measure=LOSS)
    path.write_text(f'mech 1\nmodel m = local("x")\n{BLOCK}\n{line}', encoding="utf-8")
    own = bare(name)
    objective = mechdsl.objective(
        path, models={"m": (own.model, own.processor)}, site="resid_post layer 0",
        at="photo row 1 col 2 token",
    )  # fmt: skip
    start = objective.start.clone().requires_grad_()
    values = objective(start)
    (gradient,) = torch.autograd.grad(values.sum(), start)
    mine = start.detach().clone().requires_grad_()
    total = list[Tensor]()
    for row, n in enumerate(objective.rows):
        given, token = inputs(name, n, n), cells(name, n, n)[1, 2]

        def changed(output: Tensor, column: int, value: Tensor) -> Tensor:
            index = torch.arange(output.shape[1])[:, None] == column % output.shape[1]
            return torch.where(index, value, output)

        write = partial(changed, column=token, value=mine[row, 0])
        silence = partial(changed, column=-1, value=torch.zeros(()))
        handles = [
            own.block(0).register_forward_hook(lambda _, __, output, edit=write: edit(output)),
            own.block(1).mlp.register_forward_hook(
                lambda _, __, output, edit=silence: edit(output)
            ),
        ]
        total.append(loss_of(own.model(**given).logits[0], given))
        for handle in handles:
            handle.remove()
    (wanted,) = torch.autograd.grad(torch.stack(total).sum(), mine)
    np.testing.assert_allclose(values.detach(), torch.stack(total).detach(), atol=1e-4)
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)
    assert wanted.abs().max() > 1e-3
