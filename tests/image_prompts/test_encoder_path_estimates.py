"""Estimates of paths in vision encoders of prompts, against autograd along hooks on the encoder of
the bare model, which hold the outputs of heads and MLPs: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ..images import prompts_of_images as vlm
from ..quick import some
from .reference import Edit, record_value
from .support import experiment
from .test_encoder_paths import CELL, Path, Place, edited, heads, received, seen, state, tower
from .test_families import ALL, WORDS, bare, folder, inputs, run_text
from .test_token_patches import other
from .test_vision_estimates import RULED, in_64_bits, with_rules

NAMES = ("llava_class", "paligemma", "llava_next", "gemma3", "qwen2_5_vl", "idefics2_wide")
QUICK = ("llava_next", "gemma3")
"""One with tiles of two sizes, and one whose tokens are made from several patches."""

CASES: dict[str, list[Path]] = {
    "z vision layer 0 head * -> attn_norm vision layer 1": [
        Path(sender, Place("attn_norm", 1)) for sender in heads("z", 0)
    ],
    "mlp_out vision layer 0 -> mlp_norm vision layer 1": [
        Path(Place("mlp_out", 0), Place("mlp_norm", 1))
    ],
    "z vision layer 0 head 1 -> mlp_norm vision layer 1 through mlps": [
        Path(Place("z", 0, 1), Place("mlp_norm", 1), through_mlps=True)
    ],
}


def estimate(name: str, path: Path, n: int, kind: str = "") -> float:
    """The change of the sender times the gradient along the edge, in the base run.

    kind: The changed derivatives, with which the model is in 64 bits.
    """
    own, base = tower(name), other(n)
    model = with_rules(name, kind) if kind else bare(name).model
    here, given = own.cell(base, 1, 2), inputs(name, n, base)
    if kind:
        given = in_64_bits(given)

    def run() -> Tensor:
        return model(**given).logits[0, -1]

    old = path.sender.own(seen(name, path.sender, n, base))[here]
    new = path.sender.own(seen(name, path.sender, n, n))[own.cell(n, 1, 2)]
    of_base = {place: seen(name, place, n, base) for place in list_places(path)}
    if kind:
        old, new = old.double(), new.double()
        of_base = {place: value.double() for place, value in of_base.items()}
    sent = old.clone().requires_grad_()
    with torch.enable_grad():
        edge = (here, sent)
        inside = received(name, path, run, lambda place: of_base[place], edge, model)[here]
        leaf = torch.zeros_like(inside).requires_grad_()

        def add(value: Tensor) -> Tensor:
            value[here] = value[here] + leaf
            return value

        with edited(name, path.receiver, path.receiver.of_head(add), model):
            logits = run()
        measure = logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]
        (by_receiver,) = torch.autograd.grad(measure, leaf)
        (slope,) = torch.autograd.grad((inside * by_receiver).sum(), sent)
    return float(((new - old) * slope).sum())


def list_places(path: Path) -> list[Place]:
    """The sites that the path holds, or reads from the base run."""
    return [Place(site, layer) for site in ("z", "mlp_out") for layer in (0, 1)]


def estimated(name: str, line: str, estimator: str) -> np.ndarray:
    """[path, prompt] effects that a file estimates."""
    rule, _, rest = line.partition(" through")
    rule = f"path {rule} at photo row 1 col 2 token{' through' * bool(rest)}{rest}"
    text = experiment("e", "from clean into changed", rule, f"using {estimator}")
    [found] = run_text(name, text)
    return found.measures[0].patched - found.measures[0].base


@pytest.mark.parametrize("line", CASES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_eap_of_a_path_of_patches_equals_autograd(name: str, line: str) -> None:
    expected = [[estimate(name, path, n) for n in ALL] for path in CASES[line]]
    np.testing.assert_allclose(estimated(name, line, "eap"), expected, atol=2e-4, rtol=1e-3)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("line", CASES)
@pytest.mark.parametrize(
    "case",
    some(
        [(kind, name) for kind, names in RULED.items() for name in names],
        [("relp", "llava_next"), ("gim", "llava_class")],
    ),
    ids=" ".join,
)
def test_changed_derivatives_along_a_path_of_patches_equal_modules_with_them(
    case: tuple[str, str], line: str
) -> None:
    kind, name = case
    found = estimated(name, line, kind)
    expected = [[estimate(name, path, n, kind) for n in ALL] for path in CASES[line]]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-3)
    assert np.abs(expected).max() > 1e-3


STEPS = 3
TEXTS = """
prompts ask {
  rows "data.jsonl"
  image photo = "{file}"
  words = if n = 1 then "w1" else if n = 2 then "w2 w1" else if n = 3 then "w3 w1 w2" else "w2"
  word = "w2"
  template "w3 {word} {photo} w1 {words} w3"
  answer " w1"
  wrong " w2"
  corrupt changed { file = other  word = "w1" }
}
"""
"""Prompts that have another word in the changed run, too."""
EDGE = f"path z vision layer 0 head * -> mlp_norm vision layer 1 at {CELL}"
MOVES = {
    "inputs": (EDGE, "eap_ig"),
    "senders": (EDGE, "eap_ig_activations"),
    "inputs of nodes": (f"patch z vision layer 0 head * at {CELL}", "eap_ig"),
}


def ask(name: str, n: int, image: int, word: str) -> dict[str, Tensor]:
    picture = Image.open(folder() / f"{image}.png").convert("RGB")
    marker, end = vlm.FAMILIES[name].marker, vlm.FAMILIES[name].before_end
    return bare(name).with_pictures(f"w3 {word} {marker} w1 {WORDS[n]} w3{end}", [picture])


@contextmanager
def edited_texts(name: str, edit: Edit) -> Generator[None]:
    """Change what enters the language model, [token, width]."""

    def entering(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": edit(kwargs["inputs_embeds"][0].clone())[None]}

    handle = bare(name).language.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def integrated(name: str, n: int, sender: Place, moves: str) -> float:
    """The change of the sender's patch, times the slope that is averaged while all patches of
    images, and other tokens, move from the clean to the changed prompt."""
    own, model = tower(name), bare(name)
    base, source = ask(name, n, other(n), "w1"), ask(name, n, n, "w2")
    here, there = own.cell(other(n), 1, 2), own.cell(n, 1, 2)
    of_path = moves != "inputs of nodes"
    receiver = Place("mlp_norm", 1) if of_path else sender
    moved = Place("z", 0) if moves == "senders" else Place("resid_pre", 0)
    patches = [t for row in (1, 2) for col in (1, 2) for t in own.cell(n, row, col)]

    def run() -> Tensor:
        return model.model(**base).logits[0, -1]

    def read(place: Place, given: dict[str, Tensor]) -> Tensor:
        return state(name, place, partial(model.run, given))

    def read_text(given: dict[str, Tensor]) -> Tensor:
        return record_value(partial(edited_texts, name), partial(model.run, given))

    way, texts = read(moved, source) - read(moved, base), read_text(source) - read_text(base)
    texts[base["input_ids"][0] == vlm.SPECIAL["<image>"]] = 0
    if moves == "senders":
        texts[:] = 0
    old, slope = sender.own(read(sender, base))[here], torch.zeros(())
    leaf = torch.zeros_like(receiver.own(read(receiver, base))[here]).requires_grad_()
    for step in range(STEPS):
        share = 1 - (step + 1) / STEPS

        def move(value: Tensor, share: float = share) -> Tensor:
            value[patches] += share * way[patches]
            return value

        def add(value: Tensor) -> Tensor:
            value[here] = value[here] + leaf
            return value

        with (
            torch.enable_grad(),
            edited(name, moved, move),
            edited_texts(name, lambda value, share=share: value + share * texts),
            edited(name, receiver, receiver.of_head(add)),
        ):
            logits = run()
            measure = logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]
            slope = slope + torch.autograd.grad(measure, leaf)[0] / STEPS
    change = sender.own(read(sender, source))[there] - old
    if not of_path:
        return float((change * slope).sum())
    path, sent = Path(sender, receiver), old.clone().requires_grad_()
    of_base = {place: read(place, base) for place in list_places(path)}
    with torch.enable_grad():
        inside = received(name, path, run, lambda place: of_base[place], (here, sent))[here]
        (along,) = torch.autograd.grad((inside * slope).sum(), sent)
    return float((change * along).sum())


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("name", some(("llava_class", "paligemma", "gemma3"), ["gemma3"]))
def test_integrated_gradients_of_a_path_move_patches_and_other_tokens(
    name: str, moves: str
) -> None:
    rule, estimator = MOVES[moves]
    using = f"using {estimator}(steps: {STEPS})"
    text = experiment("e", "from clean into changed", rule, using)
    [found] = run_text(name, text, block=TEXTS)
    estimated = found.measures[0].patched - found.measures[0].base
    expected = [[integrated(name, n, place, moves) for n in ALL] for place in heads("z", 0)]
    np.testing.assert_allclose(estimated, expected, atol=2e-4, rtol=1e-3)
    assert np.abs(expected).max() > 1e-3


def test_integrated_gradients_need_images_with_equal_patches() -> None:
    """Images with equal numbers of tokens, in other rows and columns."""
    for name, size in (("tall", (28, 56)), ("wide", (56, 28))):
        Image.new("RGB", size, (200, 40, 90)).save(folder() / f"{name}.png")
    (folder() / "tall.jsonl").write_text('{"file": "tall.png", "n": 1}\n', encoding="utf-8")
    block = TEXTS.replace("data.jsonl", "tall.jsonl").replace("file = other", 'file = "wide.png"')
    text = experiment("e", "from clean into changed", EDGE, "using eap_ig")
    with pytest.raises(AssertionError) as raised:
        run_text("qwen2_vl", text, block=block)
    said = " ".join(str(raised.value).split())
    assert "error[E0608]" in said
    assert "row 0 have other rows and columns of patches in `clean` than in `changed`" in said
    assert "use images of one width and height, or write `using eap`" in said
