"""`using atp_qk` in encoder-decoders of sounds and images, against attention weights that are
computed from the projections of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..execute.encoder_decoders import Place, Write, changed, copied_columns
from ..quick import some
from . import test_encoded_images as images
from . import test_sounds as sounds
from .support import experiment

ENCODER_HEADS, HEADS, ENCODER_LAYERS, LAYERS = 2, 4, 2, 3
POSITIONS = {"sounds": "a frame 3 token", "images": "photo row 1 col 2 token"}
SITES = ("q encoder", "k encoder", "q cross", "k cross", "q", "k")
MODELS: dict[str, tuple[Any, str]] = {
    "sounds": (sounds, "multilingual"),
    "images": (images, "vit"),
}


def run_with_gradients(of: Any, name: str, n: int, writes: Sequence[Write]) -> Tensor:
    """The difference of logits for another sound or image, as a tensor of autograd."""
    given = {"use_cache": False}
    if of is sounds:
        given |= {"input_features": sounds.features(of.other(n))}
        ids = list(sounds.STARTS[name])
    else:
        given |= {"pixel_values": images.pixels(name, of.other(n))}
        ids = [images.START]
    with torch.enable_grad(), changed(of.bare(name), writes):
        last = of.bare(name)(decoder_input_ids=torch.tensor([ids]), **given).logits[0, -1]
    answer, wrong = (of.token(str(of.RECORDS[n][key])) for key in ("n", "m"))
    return last[answer] - last[wrong]


def heads_of(site: str) -> int:
    return ENCODER_HEADS if site.endswith("encoder") else HEADS


@contextmanager
def weighed(of: Any, name: str, site: str, layer: int, leaves: list[Tensor]) -> Generator[None]:
    """Compute the attention of a layer from its projections; appends its weights."""
    module, found, handles = of.bare(name), dict[str, Tensor](), list[Any]()
    stack = site.partition(" ")[2]

    def at(component: str) -> Any:
        return module.get_submodule(of.place(f"{component} {stack}".strip(), layer).path)

    for each in "qkv":

        def keep(_: Any, args: Any, result: Tensor, each: str = each) -> None:
            found[each] = result[0].unflatten(-1, (heads_of(site), -1)).transpose(0, 1)

        handles.append(at(each).register_forward_hook(keep))

    def instead(_: Any, args: Any) -> Any:
        scores = found["q"] @ found["k"].transpose(-1, -2) * found["q"].shape[-1] ** -0.5
        if not stack:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        leaves.append(scores.softmax(-1).detach().requires_grad_())
        return ((leaves[-1] @ found["v"]).transpose(0, 1).flatten(1)[None],)

    handles.append(at("z").register_forward_pre_hook(instead))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights(
    of: Any, name: str, site: str, layer: int, n: int, writes: Sequence[Write] = ()
) -> tuple[Tensor, Tensor]:
    """The weights [head, query, key] of a layer, and the gradient by them."""
    leaves: list[Tensor] = []
    module = of.bare(name)
    with changed(module, writes), weighed(of, name, site, layer, leaves):
        value = run_with_gradients(of, name, n, ())
    (slope,) = torch.autograd.grad(value, leaves)
    return leaves[0].detach(), slope


def outputs_of(of: Any, name: str, n: int, own: Place) -> Tensor:
    """The output [token, width] of a module in the clean run."""
    found: list[Tensor] = []
    module = of.bare(name).get_submodule(own.path)
    handle = module.register_forward_hook(lambda _, args, output: found.append(output[0].clone()))
    try:
        of.outputs(name, n)
    finally:
        handle.remove()
    return found[0]


def estimate(of: Any, name: str, site: str, layer: int, head: int, n: int) -> float:
    """The exact change of the weights times the gradient by them."""
    own = Place(of.place(site, layer).path)
    encoded = site.endswith("encoder") or site == "k cross"
    token = (2 if of is sounds else images.patch(name, 1, 2)) if encoded else -1
    whole = outputs_of(of, name, n, own)
    width = whole.shape[-1] // heads_of(site)
    columns = slice(head * width, (head + 1) * width)
    now, slope = weights(of, name, site, layer, n)
    new, _ = weights(of, name, site, layer, n, [copied_columns(own, [token], columns, whole)])
    return float(((new - now) * slope).double().sum())


@pytest.mark.parametrize("kind", some(MODELS, ["sounds"]))
def test_atp_qk_of_sounds_and_images_equals_exact_weights(kind: str) -> None:
    of, name = MODELS[kind]
    sites = SITES if kind == "sounds" else SITES[:4]  # TrOCR's decoder begins with one token
    places = {
        site: POSITIONS[kind] if "encoder" in site or site == "k cross" else "last token"
        for site in sites
    }
    text = "".join(
        experiment(
            f"e{number}",
            "from clean into changed",
            f"patch {site} layer * head * at {at}",
            "using atp_qk",
        )
        for number, (site, at) in enumerate(places.items())
    )
    largest = 0.0
    for found, site in zip(of.run_text(text, name), sites, strict=True):
        layers = ENCODER_LAYERS if site.endswith("encoder") else LAYERS
        expected = [
            [estimate(of, name, site, layer, head, n) for n in range(len(of.RECORDS))]
            for layer in range(layers)
            for head in range(heads_of(site))
        ]
        measure = found.measures[0]
        given = measure.patched - measure.base
        np.testing.assert_allclose(given, expected, atol=2e-4, rtol=1e-3, err_msg=site)
        assert np.abs(expected).max() > 0.01, site
        largest = max(largest, float(np.abs(expected).max()))
    assert largest > 0.1
