"""`using relp`, `gim` and `cdt` in decoders after an encoder of sounds or images, against models
whose modules have the changed derivatives."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ..execute.encoder_decoders import Place, changed
from ..quick import some
from ..reference.decomposed import decompose, decompose_held
from ..reference.gradients import Where
from ..reference.ruled import FlatSoftmax, ruled
from . import test_encoded_images as images
from . import test_sounds as sounds
from .support import experiment

KINDS = ("relp", "gim", "cdt")
MODELS = {"multilingual": sounds, "english": sounds, "vit": images, "beit": images}
SITES = ("resid_post encoder", "mlp_out encoder", "attn_out cross", "mlp_out", "v cross")
LAYERS = {"encoder": 2, "cross": 3, "": 3}


def is_encoded(site: str) -> bool:
    return site.endswith("encoder") or site == "v cross"


@cache
def double(name: str, kind: str) -> Any:
    module = copy.deepcopy(MODELS[name].bare(name)).double()
    if kind == "cdt":
        return module
    if kind == "relp" or name not in images.FAMILIES:
        return ruled(module, kind)
    module.encoder = ruled(module.encoder, kind)
    module.decoder = ruled(module.decoder, "norms")
    for part in module.encoder.modules():
        vars(part)["causal_in_reference"] = False
    for part in module.decoder.modules():
        for word, divisor in (("q_proj", 4), ("k_proj", 4), ("v_proj", 2)):
            if hasattr(part, word):
                getattr(part, word).register_forward_hook(divide_gradient(divisor))
    return module


def divide_gradient(divisor: int) -> Any:
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad / divisor)

    return hook


@contextmanager
def flat_softmax(kind: str) -> Generator[None]:
    """Give softmax functions of modules the derivatives of `gim`."""
    own = nn.functional.softmax
    if kind == "gim":
        nn.functional.softmax = lambda scores, dim: FlatSoftmax.apply(scores)  # pyright: ignore
    try:
        yield
    finally:
        nn.functional.softmax = own


def measured(module: Any, name: str, n: int, image: int) -> Tensor:
    if name in images.FAMILIES:
        given = {"pixel_values": images.pixels(name, image).double()}
        first, own = [images.START], images
    else:
        given = {"input_features": sounds.features(image).double()}
        first, own = list(sounds.STARTS[name]), sounds
    logits = module(**given, decoder_input_ids=torch.tensor([first]), use_cache=False).logits[0, -1]
    answer, wrong = (own.token(str(own.RECORDS[n][key])) for key in ("n", "m"))
    return logits[answer] - logits[wrong]


def token(name: str, site: str) -> int:
    if not is_encoded(site):
        return 0 if name in images.FAMILIES else len(sounds.STARTS[name]) - 1
    return images.patch(name, 1, 2) if name in images.FAMILIES else 2


def read(name: str, image: int, own: Place, at: int) -> Tensor:
    """[1, width]"""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    MODELS[name].outputs(name, image, [(own, [at], keep)])
    return found[0].double()


def estimate(name: str, kind: str, own: Place, at: int, n: int) -> float:
    """The value of a cell that copies a vector of sound or image `n`."""
    module, of = double(name, kind), MODELS[name]
    old, new = (read(name, each, own, at) for each in (of.other(n), n))
    if kind == "cdt":
        where = Where(own.path, "in" if own.of_input else "out")

        def call(module: Any) -> Tensor:
            return measured(module, name, n, of.other(n))

        return decompose(module, call, where, {(at, 0): new[0]})
    leaf = old.clone().requires_grad_()
    with torch.enable_grad(), changed(module, [(own, [at], lambda _: leaf)]), flat_softmax(kind):
        value = measured(module, name, n, of.other(n))
    (slope,) = torch.autograd.grad(value, leaf)
    return float(((new - old) * slope).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", some(tuple(MODELS), ("multilingual", "vit")))
def test_changed_derivatives_of_encoded_sounds_and_images_equal_the_reference(
    name: str, kind: str
) -> None:
    of = MODELS[name]
    word = "photo row 1 col 2" if name in images.FAMILIES else "a frame 3"
    sites = [site for site in SITES if site != "v cross" or (kind, of) != ("gim", images)]
    lines = [
        f"patch {site} layer * {'heads *' if site[0] == 'v' else ''} at "
        f"{word if is_encoded(site) else 'last'} token"
        for site in sites
    ]
    text = "".join(
        experiment(f"e{n}", "from clean into changed", " ".join(line.split()), f"using {kind}")
        for n, line in enumerate(lines)
    )
    found = of.run_text(text, name)
    for site, each in zip(sites, found, strict=True):
        at = token(name, site)
        expected = [
            [estimate(name, kind, of.place(site, layer), at, n) for n in range(len(of.RECORDS))]
            for layer in range(LAYERS[site.partition(" ")[2]])
        ]
        measure = each.measures[0]
        np.testing.assert_allclose(
            measure.patched - measure.base, expected, atol=2e-4, rtol=1e-3, err_msg=site
        )
        assert np.abs(expected).max() > 1e-3, site


def where(own: Place) -> Where:
    return Where(own.path, "in" if own.of_input else "out")


@pytest.mark.parametrize("name", some(tuple(MODELS), ("multilingual",)))
def test_cdt_of_paths_from_frames_and_patches_equals_the_reference(name: str) -> None:
    """All heads of one layer send; the values of all heads of a later attention receive."""
    of = MODELS[name]
    word = "photo row 1 col 2" if name in images.FAMILIES else "a frame 3"
    paths = [
        ("z encoder", 0, "v cross", 1, f"{word} token"),
        ("z encoder", 0, "v encoder", 1, f"{word} token"),
        ("z cross", 0, "v", 2, "last token"),
    ]
    text = "".join(
        experiment(
            f"e{n}",
            "from clean into changed",
            f"path {sender} layer {first} heads * -> {receiver} layer {second} heads * at {at}",
            "using cdt",
        )
        for n, (sender, first, receiver, second, at) in enumerate(paths)
    )
    held = [
        where(of.place(f"{site} {stack}".strip(), layer))
        for stack, count in LAYERS.items()
        for layer in range(count)
        for site in (("z",) if stack == "cross" else ("z", "mlp_out"))
    ]
    for each, (sender, first, receiver, second, _) in zip(
        of.run_text(text, name), paths, strict=True
    ):
        at, own, end = token(name, sender), of.place(sender, first), of.place(receiver, second)
        expected: list[float] = []
        for n in range(len(of.RECORDS)):

            def call(module: Any, n: int = n) -> Tensor:
                return measured(module, name, n, of.other(n))

            sent = {(at, 0): read(name, n, own, at)[0]}
            module = double(name, "cdt")
            _, [found] = decompose_held(module, call, [(where(own), sent)], held, [where(end)])
            expected.append(decompose(module, call, where(end), {(at, 0): found[at, 0]}))
        measure = each.measures[0]
        np.testing.assert_allclose(
            (measure.patched - measure.base)[0], expected, atol=2e-4, rtol=1e-3, err_msg=receiver
        )
        assert np.abs(expected).max() > 1e-3, receiver
