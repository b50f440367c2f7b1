"""`using atp_qk` and `atp_star` at queries and keys of vision encoders, against hooks on the bare
model's encoder that compute attention from its projections, and autograd by its weights: one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.execute.run.panel import execute
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators

from ..execute.support import check_file
from ..images import prompts_of_images as vlm
from ..quick import some
from .support import experiment
from .test_encoder_allowed_attention import bounds, project
from .test_encoder_attention import module_of, run_in_both, try_line
from .test_encoder_paths import tower
from .test_families import ALL, BLOCK, TWO, bare, both, folder, inputs, loaded, run_text
from .test_token_patches import HEADS, LAYERS, other, shifted
from .test_vision_estimates import constant, values_of

NAMES = ("paligemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose encoders have no tokens but patches of image tokens."""
QUICK = ("paligemma", "qwen2_5_vl")
WITH_OTHERS = ("llava_class", "llava_next", "video_llava")
"""Families with class tokens or margins, which attend to keys."""
CELL = "photo row 1 col 2 token"
Vectors = dict[str, Tensor]
"""Site → queries or keys [token, head, width], before they are rotated."""


def weigh(q: Tensor, k: Tensor, ends: Sequence[int]) -> Tensor:
    """[head, query, key] of queries and keys [head, token, width]."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for first, last in pairwise(ends):
        seen[:, first:last, first:last] = True
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def read_vectors(module: Any, run: Callable[[], object]) -> Vectors:
    """The queries and keys of a module in a pass."""
    found: Vectors = {}

    def look(_: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        def note(site: str, vectors: Tensor) -> Tensor:
            found[site] = vectors.detach().clone()
            return vectors

        project(module, args[0] if args else given["hidden_states"], given, note)

    handle = module.register_forward_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


Write = Callable[[str, Tensor], Tensor]


@contextmanager
def differentiated(module: Any, writes: Sequence[Write]) -> Generator[list[Tensor]]:
    """Collect the change of weights by each write, and a zero that is added to the weights."""
    found: list[Tensor] = []

    def attend(_: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else given["hidden_states"]
        ends = bounds(hidden, given)
        q, k, v = project(module, hidden, given)
        weights = weigh(q, k, ends)
        for write in writes:
            changed, keys, _ = project(module, hidden, given, write)
            found.append((weigh(changed, keys, ends) - weights).detach())
        leaf = torch.zeros_like(weights).requires_grad_()
        found.append(leaf)
        last = module.proj if hasattr(module, "proj") else module.out_proj
        value = last(((weights + leaf) @ v).transpose(0, 1).flatten(1)).view(hidden.shape)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(attend, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def estimates(
    model: Any, module: Any, given: dict[str, Tensor], writes: Sequence[Write]
) -> list[float]:
    """The exact change of the weights times the gradient of the metric by them."""
    with torch.enable_grad(), differentiated(module, writes) as found:
        logits = model(**given).logits[0, -1]
        value = logits[vlm.WORDS["w1"]] - logits[vlm.WORDS["w2"]]
        *changes, leaf = found
        (slope,) = torch.autograd.grad(value, leaf)
    return [float((each * slope).sum()) for each in changes]


def at(site: str, head: int, patches: Sequence[int], values: Tensor) -> Write:
    def write(name: str, vectors: Tensor) -> Tensor:
        if name != site:
            return vectors
        vectors = vectors.clone()
        vectors[list(patches), head] = values
        return vectors

    return write


def expected(name: str, site: str, layer: int, fill: str, model: Any = None) -> list[list[float]]:
    """[head][prompt]: of vectors of the clean image at `CELL`, or 0 at all patches."""
    own, module = tower(name), module_of(name, layer)
    found = list[list[float]]()
    for n in ALL:
        here, every = own.cell(other(n), 1, 2), own.every(other(n))
        clean = read_vectors(module, lambda n=n: bare(name).run(inputs(name, n, n)))[site]
        clean = clean[own.cell(n, 1, 2)]
        writes = [
            at(site, head, every, torch.zeros(()))
            if fill == "zero"
            else at(site, head, here, clean[:, head])
            for head in range(HEADS)
        ]
        given = inputs(name, n, other(n))
        found.append(estimates(bare(name).model, module, given, writes))
    return np.array(found).T.tolist()


def estimate(rule: str, kind: str = "atp_qk", name: str = "e") -> str:
    measure = "measure logit(answer) - logit(wrong) as " + ("raw" if "star" in kind else "delta")
    return experiment(name, "from clean into changed", rule, f"using {kind}", measure=measure)


def compare(name: str, sites: str, mode: str) -> None:
    """Several experiments in one file, some of whose cells write one vector."""
    cases = [(site, layer) for site in sites for layer in range(LAYERS)]
    lines = [f"patch {site} vision layer {layer} head * at {CELL}" for site, layer in cases]
    lines += [f"ablate {site} vision layer 0 head * at photo tokens with zero" for site in sites]
    text = "".join(estimate(line, name=f"e{n}") for n, line in enumerate(lines))
    wanted = [expected(name, *case, "clean") for case in cases]
    wanted += [expected(name, site, 0, "zero") for site in sites]
    largest: list[float] = []
    for found, values, line in zip(run_text(name, text, mode), wanted, lines, strict=True):
        np.testing.assert_allclose(values_of(found), values, atol=1e-4, rtol=1e-3, err_msg=line)
        largest.append(float(np.abs(values).max()))
    assert max(largest) > 0.05, largest
    assert min(largest) > 1e-3, largest


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_atp_qk_of_patches_equals_changed_weights_times_their_gradient(
    name: str, mode: str
) -> None:
    compare(name, "qk", mode)


@pytest.mark.parametrize("name", some(WITH_OTHERS, ["llava_next"]))
def test_atp_qk_of_queries_equals_changed_weights_in_encoders_with_other_tokens(name: str) -> None:
    compare(name, "q", "planned")


@pytest.mark.parametrize("name", some(["gemma3", "qwen2_5_vl"], ["gemma3"]))
def test_atp_star_of_queries_and_keys_leaves_out_layers_one_by_one(name: str) -> None:
    own, model = tower(name), bare(name)
    blocks = [model.model.get_submodule(f"{own.blocks}.{layer}") for layer in range(LAYERS)]
    layers = [
        tuple(each.get_submodule(part) for part in (own.attention, own.mlp)) for each in blocks
    ]
    language = model.model.get_submodule("model.language_model").layers
    layers += [(each.self_attn, each.mlp) for each in language]
    for site in "qk":
        line = f"patch {site} vision layer 0 head * at {CELL}"
        [found] = run_text(name, estimate(line, "atp_star"))
        total = np.zeros((HEADS, len(ALL)))
        for number, modules in enumerate(layers):
            if number != 0:  # the layer of the site
                with constant(*modules):
                    total += np.abs(expected(name, site, 0, "clean"))
        total /= len(layers) - 1
        np.testing.assert_allclose(values_of(found), total, atol=1e-4, rtol=1e-3)
        assert total.max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_atp_qk_in_the_second_of_two_images_equals_that_of_the_bare_model(name: str) -> None:
    """Keys are counted within their image."""
    lines = [f"ablate {site} vision layer 0 head * at two tokens with zero" for site in "qk"]
    text = "".join(
        experiment(f"e{n}", line, "using atp_qk").replace("prompts ask", "prompts both")
        for n, line in enumerate(lines)
    )
    own, module = tower(name), module_of(name, 0)
    for found, site in zip(run_in_both(name, TWO, text), "qk", strict=True):
        for n in ALL:
            given, start = both(name, n), shifted(name, n, n)
            patches = [start + patch for patch in own.every(other(n))]
            writes = [at(site, head, patches, torch.zeros(())) for head in range(HEADS)]
            values = estimates(bare(name).model, module, given, writes)
            np.testing.assert_allclose(values_of(found)[:, n], values, atol=1e-4, rtol=1e-3)
        assert np.abs(values_of(found)).max() > 0.01


@pytest.mark.parametrize("name", ["internvl", "llava_next", "idefics2_wide"])
def test_atp_qk_of_keys_that_other_tokens_attend_to_is_an_error(name: str) -> None:
    [problem] = try_line(name, f"patch k vision layer 0 head 0 at {CELL}\n  using atp_qk")
    assert problem.code == "E0608"
    assert "class tokens, margins" in f"{problem.message}: {problem.label_text}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_planned_cost_of_recomputed_attention_is_near_the_counted_products(name: str) -> None:
    line = f"patch q vision layer * head * at {CELL}"
    plan = make_plan(check_file(estimate(line), folder(), loaded(name), BLOCK).experiments)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2
