"""Every rule that edits vectors of encoder-decoders, which read texts, sounds or images, with hooks
on the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ..image_prompts import test_encoded_images as images
from ..image_prompts import test_sounds as sounds
from ..image_prompts.support import experiment as of_inputs
from ..quick import some
from ..reference.edits import EDITS, Vectors, write_rules
from .encoder_decoders import (
    Place,
    Write,
    difference,
    logits,
    model,
    place,
    read,
    starts,
    text,
    tokenizer,
)
from .support import DIFFERENCE, ROWS, by_name, experiment, try_file

FAMILIES = ("t5 writing", "bart writing", "mt5", "t5gemma", "marian writing", "mbart", "pegasus")
STACKS = ("resid_post encoder", "attn_out cross", "resid_post", "mlp_out encoder")

Run = Callable[[int, Sequence[Write]], float]
"""The measure of a row under writes."""


def check(
    found: Sequence[Any],
    of: Vectors,
    own: Sequence[Place],
    at: Callable[[int], int],
    run: Run,
) -> None:
    """Compare all edits, and the two rules after them.

    Args:
        found: The results of `lines`.
        of: The vectors of the site and of that of the next layer.
        own: Their modules.
        at: The token of each row.
        run: Runs the bare model.
    """
    base = [run(n, []) for n in range(4)]

    def written(layer: int, n: int, value: Tensor) -> Write:
        return own[layer], [at(n)], lambda _: value

    changes: list[Callable[[int], list[Write]]] = [
        lambda n, change=change: [written(0, n, change(of, n, of(n, False, 0)))]
        for change in EDITS.values()
    ]
    changes.append(lambda n: [written(0, n, 0 * of(n, False, 0)), written(1, n, of(n, False, 1))])
    changes.append(lambda n: [written(0, n, of(n, True, 0))])
    for each, change in zip(found, changes, strict=True):
        expected, measure = [run(n, change(n)) for n in range(4)], each.measures[0]
        np.testing.assert_allclose(measure.base[0], base, atol=2e-4)
        np.testing.assert_allclose(
            measure.patched[0], expected, atol=3e-4, rtol=1e-4, err_msg=each.name
        )
        if each is not found[-2]:  # a frozen stream of a decoder's only token hides the change
            assert np.abs(np.array(expected) - base).max() > 0.1, each.name


def lines(component: str, position: str, block: str, other: str) -> tuple[str, list[list[str]]]:
    """The direction, and the lines of experiments; patched runs are equal under `OTHER` lines."""
    site, following = f"{component} layer 0", f"{component} layer 1"
    rules = [[rule] for rule in write_rules(site, following, position, other)]
    frozen = f"ablate {site} at {position} with zero", f"freeze {following} at {position}"
    rules += [[*frozen], [f"set {site} at {position} to value({site} at {position}) of {other}"]]
    return f"direction d = mean({block}) at {site} at {position}\n", rules


@pytest.mark.parametrize("component", some(STACKS, STACKS[:2]))
@pytest.mark.parametrize("family", some(FAMILIES, ("t5 writing", "bart writing")))
def test_every_edit_of_a_text_encoder_decoder_equals_hooks(
    family: str, component: str, tmp_path: Path
) -> None:
    encodes = "encoder" in component
    position = "subject token" if encodes else "last token"
    declared, rules = lines(component, position, "p", "other")
    texts = "".join(experiment(f"e{n}", "prompts p", *r, DIFFERENCE) for n, r in enumerate(rules))
    ran = try_file(declared + texts, tmp_path, model(family), tokenizer=tokenizer())
    own = [place(family, component, layer) for layer in (0, 1)]

    def at(n: int, name: str = "clean") -> int:
        return text(ROWS[n], name).subject[-1] if encodes else len(starts(family)) - 1

    def of(n: int, other: bool, layer: int) -> Tensor:
        name = "other" if other else "clean"
        return read(family, text(ROWS[n], name), own[layer])[[at(n, name)]]

    def run(n: int, writes: Sequence[Write]) -> float:
        return difference(logits(family, text(ROWS[n]), writes), ROWS[n])

    check([*by_name(*ran).values()], of, own, at, run)


@pytest.mark.parametrize("component", some(STACKS, STACKS[:2]))
@pytest.mark.parametrize("name", some(("multilingual", "vit", "beit"), ("multilingual", "vit")))
def test_every_edit_of_an_encoder_of_sounds_or_images_equals_hooks(
    name: str, component: str
) -> None:
    if (name, component) == ("beit", "mlp_out encoder"):
        pytest.skip("BEiT scales the output of this module before it is added to the stream")
    is_sound, encodes = name == "multilingual", "encoder" in component
    source: Any = sounds if is_sound else images
    position = "last token"
    if encodes:
        position = "a frame 3 token" if is_sound else "photo row 1 col 2 token"
    declared, rules = lines(component, position, "ask", "changed")
    texts = "".join(of_inputs(f"e{n}", *rule) for n, rule in enumerate(rules))
    own = [source.place(component, layer) for layer in (0, 1)]
    last = len(sounds.STARTS[name]) - 1 if is_sound else 0
    encoded = 2 if is_sound else images.patch(name, 1, 2)
    token = encoded if encodes else last

    def of(n: int, other: bool, layer: int) -> Tensor:
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value.clone())
            return value

        source.outputs(name, source.other(n) if other else n, [(own[layer], [token], keep)])
        return found[0]

    def run(n: int, writes: Sequence[Write]) -> float:
        return source.difference(name, n, n, writes)

    check(source.run_text(declared + texts, name), of, own, lambda _: token, run)
