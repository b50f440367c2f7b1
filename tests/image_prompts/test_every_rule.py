"""Every rule at a token of an image, in all vision-language families, against plain hooks on the
bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..quick import some
from ..reference.edits import EDITS, Vectors, write_rules
from .reference import Edit, at
from .support import experiment
from .test_families import (
    ALL,
    NAMES,
    QUICK,
    bare,
    blocks,
    cells,
    difference,
    every_cell,
    inputs,
    run_text,
)

DECLARED = """
direction d = mean(ask) at resid_post layer 0 at AT
basis b = pca(ask, dims: 2, each_token: true) at resid_post layer 0 at AT
"""


def where(name: str) -> str:
    """Idefics2 mixes all patches of an image into each of its tokens, which have no cells."""
    return "photo tokens" if name == "idefics2" else "photo row 1 col 2 token"


def tokens(name: str, n: int, image: int) -> list[int]:
    if name == "idefics2":
        return every_cell(name, n, image)
    return [cells(name, n, image)[1, 2]]


def vectors(name: str, n: int, image: int, layer: int = 0) -> Tensor:
    """[token, width] in an unpatched run."""
    return blocks(name, n, image)[layer][tokens(name, n, image)]


def other(n: int) -> int:
    return (n + 1) % len(ALL)


def reader(name: str) -> Vectors:
    """Reads vectors after a layer, at the tokens of a prompt with its image or its other one."""
    return lambda n, changed, layer: vectors(name, n, other(n) if changed else n, layer)


def edited(name: str, n: int, value: Tensor) -> float:
    edit = at(tokens(name, n, n), value)
    return difference(bare(name).run(inputs(name, n, n), blocks={0: edit}))


def swapped(name: str, n: int) -> float:
    [token], last = tokens(name, n, n), inputs(name, n, n)["input_ids"].shape[1] - 1
    given = blocks(name, n, n)[0][[last, token]]
    return difference(bare(name).run(inputs(name, n, n), blocks={0: at([token, last], given)}))


def in_a_basis(name: str, n: int) -> float:
    """Two principal components of the tokens are copied into the prompt with the other image."""
    every = torch.cat([vectors(name, each, each) for each in ALL]).double()
    two = torch.linalg.svd(every - every.mean(0), full_matrices=False)[2][:2].float()
    here, given = tokens(name, n, other(n)), inputs(name, n, other(n))
    old, new = vectors(name, n, other(n)), vectors(name, n, n)
    edit = at(here, old + (new - old) @ two.T @ two)
    return difference(bare(name).run(given, blocks={0: edit}))


def frozen(name: str, n: int) -> float:
    here = tokens(name, n, n)
    edits = {0: at(here, torch.zeros(())), 1: at(here, vectors(name, n, n, 1))}
    return difference(bare(name).run(inputs(name, n, n), blocks=edits))


def along_path(name: str, n: int) -> float:
    """Values of layer 1 at the tokens read the stream after layer 0 at the same tokens only."""
    image, here, found = other(n), tokens(name, n, other(n)), list[Tensor]()
    module, given = bare(name).block(1).self_attn.v_proj, inputs(name, n, image)

    def keep(value: Tensor) -> Tensor:
        found.append(value[here].clone())
        return value

    with at_output(module, keep):
        bare(name).run(given, blocks={0: at(here, vectors(name, n, n))})
    with at_output(module, at(here, found[0])):
        return difference(bare(name).run(given))


@contextmanager
def at_output(module: Any, edit: Edit) -> Generator[None]:
    handle = module.register_forward_hook(lambda _, __, output: edit(output[0].clone())[None])
    try:
        yield
    finally:
        handle.remove()


def hidden(name: str, n: int) -> float:
    """The last query of layer 1 doesn't see the image."""
    here, given = every_cell(name, n, n), inputs(name, n, n)
    count = given["input_ids"].shape[1]

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)[None, None]
        own = kwargs.get("attention_mask")
        if own is not None:
            mask = own.clone()
            if own.dtype == torch.bool:
                mask = torch.zeros(own.shape).masked_fill(~own, torch.finfo(torch.float32).min)
        mask[..., -1, here] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}

    handle = bare(name).block(1).self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return difference(bare(name).run(given))
    finally:
        handle.remove()


OTHERS: dict[str, tuple[Callable[[str, int], float], bool]] = {
    "swap resid_post layer 0 at AT with last token": (swapped, False),
    "ablate resid_post layer 0 at AT with zero\n  freeze resid_post layer 1 at AT": (frozen, False),
    "block attention layer 1 heads * from last token to photo tokens": (hidden, False),
    "reweight attention layer 1 heads * from last token to photo tokens by 0": (hidden, False),
    "patch resid_post layer 0 in basis b at AT": (in_a_basis, True),
    "path resid_post layer 0 -> v layer 1 heads * at AT": (along_path, True),
}
"""Rule → its value in a record, and whether it patches `from clean into changed`."""


@pytest.mark.parametrize(
    "mode", ["planned", pytest.param("padded on the right", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_every_rule_at_a_token_of_an_image_equals_hooks(name: str, mode: str) -> None:
    """In one file, on prompts of different lengths and images."""
    own, position = reader(name), where(name)
    others = {
        rule: case for rule, case in OTHERS.items() if name != "idefics2" or "swap" not in rule
    }
    rules = write_rules("resid_post layer 0", "resid_post layer 1", position, "changed")
    runs: list[Callable[[int], float]] = [
        lambda n, change=change: edited(name, n, change(own, n, own(n, False, 0)))
        for change in EDITS.values()
    ]
    lines = [[rule] for rule in rules]
    for rule, (run, patches) in others.items():
        first = ["from clean into changed"] if patches else []
        lines.append([*first, rule.replace("AT", position)])
        runs.append(lambda n, run=run: run(name, n))
    text = DECLARED.replace("AT", position)
    text += "".join(experiment(f"e{n}", *each) for n, each in enumerate(lines))
    found = run_text(name, text, mode)
    for each, run, line in zip(found, runs, lines, strict=True):
        expected, measure = [run(n) for n in ALL], each.measures[0]
        np.testing.assert_allclose(
            measure.patched[0], expected, atol=2e-4, rtol=1e-4, err_msg=line[-1]
        )
        if name != "idefics2" or "attention" not in line[-1]:  # its last token hardly sees images
            assert np.abs(np.array(expected) - measure.base[0]).max() > 1e-2, line


@pytest.mark.parametrize("name", some(NAMES, ("qwen3_vl",)))
def test_resampled_token_of_an_image_is_that_of_another_row(name: str) -> None:
    rule = f"ablate resid_post layer 0 at {where(name)} with resample"
    [found] = run_text(name, experiment("e", rule))
    for n, value in enumerate(found.measures[0].patched[0]):
        expected = [edited(name, n, vectors(name, m, m)) for m in ALL if m != n]
        assert np.abs(np.array(expected) - value).min() < 2e-4
