"""Position ids and losses of prompts in models whose blocks attend to an image, against the bare
model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mechdsl.diagnostics.rendering import render_full

from .support import BLOCK, RECORDS, experiment
from .test_attended_images import (
    IMAGE,
    WORDS,
    Hook,
    at,
    bare,
    folder,
    inputs,
    other,
    outputs,
    place,
    processor,
    read,
    run_text,
    token,
    try_text,
    words,
)

ALL = range(len(RECORDS))
FROM = "from clean into changed"


def renumbered(n: int, count: int = 0, first: int = 20) -> Tensor:
    """[1, token] position ids of a prompt and of a reply; those of `{what}` count from `first`."""
    ids = torch.arange(len(inputs(n, n)["input_ids"][0]) + count)
    ids[words(n)] = torch.arange(first, first + len(words(n)))
    return ids[None]


def test_renumbered_tokens_equal_position_ids_of_the_bare_model() -> None:
    """Alone, and with a rule that has rows of the same prompts."""
    rules = ("renumber what tokens from 20", "ablate z layer 2 head * at last token with zero")
    text = experiment("e", rules[0]) + experiment("f", *rules)
    text += experiment("g", "for k in [5, 20] { renumber what tokens from k }")
    alone, ablated, swept = (each.measures[0] for each in run_text(text))
    for n in ALL:
        ids = [token(str(RECORDS[n][key])) for key in ("n", "m")]
        given, plain = renumbered(n), outputs(n, n).logits[0, -1, ids]
        moved = outputs(n, n, position_ids=given).logits[0, -1, ids]
        np.testing.assert_allclose(alone.base[0, n], plain[0] - plain[1], atol=2e-4)
        np.testing.assert_allclose(alone.patched[0, n], moved[0] - moved[1], atol=2e-4)
        np.testing.assert_allclose(swept.patched[1, n], moved[0] - moved[1], atol=2e-4)
        for head in range(4):
            hooks = [at("z", 2, [-1], head, torch.zeros_like)]
            logits = outputs(n, n, hooks, position_ids=given).logits[0, -1, ids]
            np.testing.assert_allclose(ablated.patched[head, n], logits[0] - logits[1], atol=2e-4)
    assert np.abs(alone.patched - alone.base).max() > 0.1
    assert np.abs(swept.patched[0] - swept.patched[1]).max() > 0.1


def test_replies_after_renumbered_tokens_equal_the_bare_model() -> None:
    """Tokens of the reply keep their position ids."""
    rule, measure = "renumber what tokens from 90", 'measure matches("1|2|3") as raw'
    [found] = run_text(experiment("e", "generate 4", rule, measure=measure))
    assert found.replies is not None
    plain, moved = list[list[int]](), list[list[int]]()
    for n in ALL:
        for replies, changed in ((plain, False), (moved, True)):
            reply = list[int]()
            for step in range(4):
                more = {"position_ids": renumbered(n, step, 90)} if changed else {}
                reply.append(int(outputs(n, n, (), reply, **more).logits[0, -1].argmax()))
            end = token("</s>")
            replies.append(reply[: reply.index(end)] if end in reply else reply)
    assert [[*found.replies.runs["clean"][n][0].ids] for n in ALL] == plain
    assert [[*found.replies.cells[0][n][0].ids] for n in ALL] == moved
    assert plain != moved


def loss(n: int, image: int, hooks: Sequence[Hook] = ()) -> list[float]:
    """The negative log-likelihood of each token of the text, which follows the image's token and
    the beginning-of-sequence token."""
    ids = inputs(n, image)["input_ids"][0].tolist()
    assert ids[:2] == [len(WORDS), token("<s>")]
    found = outputs(n, image, hooks).logits[0].log_softmax(-1)
    return [-float(found[k - 1, ids[k]]) for k in range(2, len(ids))]


@pytest.mark.parametrize("mode", ["planned", pytest.param("small passes", marks=pytest.mark.slow)])
def test_losses_of_texts_equal_the_bare_model(mode: str) -> None:
    """Of whole prompts, and of single tokens; patched rows and both runs."""
    rule = "patch resid_post layer * at what tokens"
    text = experiment("e", FROM, rule, measure="measure loss as raw")
    text += experiment("f", FROM, rule, measure="measure loss at last token as raw")
    whole, last = (each.measures[0] for each in run_text(text, mode))
    for n in ALL:
        base = loss(n, other(n))
        np.testing.assert_allclose(whole.base[0, n], np.mean(base), atol=2e-4)
        np.testing.assert_allclose(last.base[0, n], base[-1], atol=2e-4)
        for layer in range(4):
            hooks = [at("resid_post", layer, words(n), None, read(n, n, "resid_post", layer))]
            patched = loss(n, other(n), hooks)
            np.testing.assert_allclose(whole.patched[layer, n], np.mean(patched), atol=2e-4)
            np.testing.assert_allclose(last.patched[layer, n], patched[-1], atol=2e-4)
    assert np.abs(whole.patched - whole.base).max() > 0.1


def test_loss_excludes_the_token_of_an_image_within_the_text() -> None:
    """It has no logit."""
    block = BLOCK.replace("{photo} how many {what}", "how many {photo} {what}")
    rule = "ablate z layer 2 head 0 at last token with zero"
    [found] = run_text(experiment("e", rule, measure="measure loss as raw"), block=block)
    for n, record in enumerate(RECORDS):
        text = f"how many {IMAGE} {record['what']} are there ? answer :"
        picture = Image.open(folder() / f"{n}.png").convert("RGB")
        reader: Any = processor()
        given = dict(reader(text=[text], images=[[picture]], return_tensors="pt"))
        ids = given["input_ids"][0].tolist()
        with torch.no_grad():
            logits = bare()(**given, use_cache=False).logits[0].log_softmax(-1)
        counted = [k for k in range(1, len(ids)) if ids[k] != len(WORDS)]
        assert len(counted) == len(ids) - 2
        expected = -np.mean([float(logits[k - 1, ids[k]]) for k in counted])
        np.testing.assert_allclose(found.measures[0].base[0, n], expected, atol=2e-4)


def test_loss_of_the_token_of_an_image_within_the_text_is_e0612() -> None:
    block = BLOCK.replace("{photo} how many {what}", "how many {photo} {what}")
    rule = "ablate z layer 2 head 0 at last token with zero"
    text = experiment("e", rule, measure="measure loss at token 2..4 as raw")
    _, found = try_text(text, block=block)
    assert [each.code for each in found if each.severity == "error"] == ["E0612"]


def test_estimate_of_a_loss_equals_its_derivative_in_the_bare_model() -> None:
    rule = "patch resid_post layer 1 at what tokens using gradient_input"
    [found] = run_text(experiment("e", FROM, rule, measure="measure loss as delta"))
    for n in ALL:
        ids = inputs(n, other(n))["input_ids"][0]
        moved = read(n, n, "resid_post", 1) - read(n, other(n), "resid_post", 1)
        step = torch.zeros(len(words(n)), moved.shape[-1], requires_grad=True)

        def add(value: Tensor, n: int = n, step: Tensor = step) -> Tensor:
            return value.index_add(1, torch.tensor(words(n)), step[None])

        path, of_input = place("resid_post", 1)
        with torch.enable_grad():
            logits = outputs.__wrapped__(n, other(n), [(path, of_input, add)]).logits[0]
            mean = torch.nn.functional.cross_entropy(logits[1:-1], ids[2:])
        [slope] = torch.autograd.grad(mean, step)
        effect = float((slope * moved[0, words(n)]).sum())
        measure = found.measures[0]
        np.testing.assert_allclose(measure.patched[0, n] - measure.base[0, n], effect, atol=2e-4)


WEIGHTS = {
    "scale weights of z layer 2 head 0 by 0": "write `scale z layer 0 head 1 at tokens * by 2`",
    "set weights of mlp_out layer 2 neurons 3, 5 to 2 * d": (
        "write `add 2 * d to mlp_out layer 0 at tokens *`"
    ),
}


@pytest.mark.parametrize(("rule", "hint"), WEIGHTS.items())
def test_rule_on_weights_is_e0108_with_a_rule_to_write(rule: str, hint: str) -> None:
    direction = "direction d = mean(ask) at resid_post layer 1 at last token\n"
    _, found = try_text(direction + experiment("e", rule))
    errors = [each for each in found if each.severity == "error"]
    assert [each.code for each in errors] == ["E0108"]
    assert hint in render_full(errors, color=False, width=200)
    proposed = hint.split("`")[1]
    run_text(direction + experiment("e", proposed))
