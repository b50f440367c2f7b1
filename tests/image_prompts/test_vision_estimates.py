"""`using` in vision encoders of prompts with images, against autograd with one plain hook on the
bare model: one unpadded prompt at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from mechdsl.execute.patching import estimates
from mechdsl.execute.run.panel import execute
from mechdsl.execute.run_record import ExecutionOptions
from mechdsl.forward.hooks import full_pass
from mechdsl.loading.loader import adopt_model
from mechdsl.pipeline.options import RunOptions
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, check_file, run_on
from ..images import prompts_of_images as vlm
from ..operations import OperationCounter
from ..quick import some
from ..reference.decomposed import decompose, decompose_held
from ..reference.gradients import Where
from ..reference.ruled import attend_flattened, ruled
from . import test_resampled_encoder as resampled
from . import test_resampled_patches as grids
from . import test_video_processors as videos
from .reference import edited_module, followed
from .support import experiment, succeeded
from .test_encoder_paths import CELL, SIZE, Place, find_module, seen, tower
from .test_encoder_paths import NAMES as PATH_NAMES
from .test_families import (
    ALL,
    BLOCK,
    IN_A_GRID,
    TWO,
    bare,
    both,
    cells,
    folder,
    inputs,
    loaded,
    run_text,
)
from .test_token_patches import HEADS, LAYERS, components_of, other, shifted

NAMES = (*PATH_NAMES, "vipllava", "llava_next_square", "video_llava", "idefics3")
QUICK = ("llava_class", "qwen2_5_vl")
STEPS = 3
Cell = tuple[Place, Sequence[int], Tensor]
"""The vectors of a cell: their site, the patches in the changed image, and the written vectors."""


def slopes(
    name: str,
    place: Place,
    given: dict[str, Tensor],
    move: Tensor | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    model: Any = None,
) -> tuple[Tensor, Tensor]:
    """The values of a site in an encoder, [token, width], and the gradient of a metric by them.

    move: A change of the values. model: One with other derivatives.
    """
    path, is_input = find_module(name, place)
    model = bare(name).model if model is None else model
    return slopes_at(model, path, given, move, metric, is_input=is_input)


def slopes_at(
    model: Any,
    path: str,
    given: dict[str, Tensor],
    move: Tensor | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    *,
    is_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same at the input or the output of a module."""
    found: list[tuple[Tensor, Tensor]] = []

    def edit(value: Tensor) -> Tensor:
        leaf = torch.zeros_like(value).requires_grad_()
        found.append((value.detach().clone(), leaf))
        return value + leaf if move is None else value + move + leaf

    wanted = [each for each in model.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    part = model.get_submodule(path)
    opened = edited_module(part, lambda value: edit(value.flatten(0, -2)), is_input=is_input)
    with torch.enable_grad(), opened:
        logits = model(**given).logits[0]
        value = _gap(logits) if metric is None else metric(logits)
        [(values, leaf)] = found
        (gradient,) = torch.autograd.grad(value, [leaf])
    for each in wanted:
        each.requires_grad_()
    return values, gradient


def _gap(logits: Tensor) -> Tensor:
    return logits[-1, vlm.WORDS["w1"]] - logits[-1, vlm.WORDS["w2"]]


def changes(place: Place, values: Tensor, patches: Sequence[int], written: Tensor) -> Tensor:
    """What a cell changes, [token, width], zero elsewhere."""
    found = torch.zeros_like(values)
    place.own(found)[list(patches)] = written - place.own(values)[list(patches)]
    return found


def attributed(name: str, n: int, cell: Cell) -> float:
    place, patches, written = cell
    values, gradient = slopes(name, place, inputs(name, n, other(n)))
    return float((changes(place, values, patches, written) * gradient).sum())


def length(name: str, n: int, cell: Cell) -> float:
    place, patches, _ = cell
    _, gradient = slopes(name, place, inputs(name, n, other(n)))
    return float(place.own(gradient)[list(patches)].norm())


def integrated(name: str, n: int, cells: Sequence[Cell]) -> list[float]:
    """All cells of a site move together."""
    given = inputs(name, n, other(n))
    values, _ = slopes(name, cells[0][0], given)
    every = [changes(place, values, patches, written) for place, patches, written in cells]
    way, total = sum(every, torch.zeros_like(values)), torch.zeros_like(values)
    for step in range(STEPS):
        total += slopes(name, cells[0][0], given, way * (step + 0.5) / STEPS)[1] / STEPS
    return [float((own * total).sum()) for own in every]


def copied(name: str, n: int, place: Place) -> Cell:
    own = tower(name)
    there = place.own(seen(name, Place(place.site, place.layer), n, n))[own.cell(n, 1, 2)]
    return place, own.cell(other(n), 1, 2), there


def emptied(name: str, n: int, place: Place) -> Cell:
    patches = tower(name).cell(other(n), 2, 1)
    values = seen(name, Place(place.site, place.layer), n, other(n))
    return place, patches, torch.zeros_like(place.own(values)[patches])


def heads(site: str, *layers: int) -> list[Place]:
    return [Place(site, layer, head) for layer in layers for head in range(HEADS)]


Make = Callable[[str, int, Place], Cell]
CASES: dict[str, tuple[str, list[Place], Make]] = {
    f"patch z vision layer * head * at {CELL}": ("gradient_input", heads("z", 0, 1), copied),
    f"patch resid_pre vision layer * at {CELL}": (
        "atp",
        [Place("resid_pre", layer) for layer in range(LAYERS)],
        copied,
    ),
    "ablate mlp_out vision layer * at photo row 2 col 1 token with zero": (
        "gradient_input",
        [Place("mlp_out", layer) for layer in range(LAYERS)],
        emptied,
    ),
    f"patch attn_out vision layer * at {CELL}": (
        "gradient_input",
        [Place("attn_out", layer) for layer in range(LAYERS)],
        copied,
    ),
    f"patch z vision layer 0 head * at {CELL}": ("gradient", heads("z", 0), copied),
    f"patch z vision layer 1 head * at {CELL}": (
        f"integrated_gradients(steps: {STEPS})",
        heads("z", 1),
        copied,
    ),
    f"patch mlp_out vision layer 0 at {CELL}": (
        f"integrated_gradients(steps: {STEPS})",
        [Place("mlp_out", 0)],
        copied,
    ),
}


def expected(name: str, estimator: str, places: Sequence[Place], make: Make) -> list[list[float]]:
    """[cell][prompt]"""
    if estimator.startswith("integrated"):
        columns = [integrated(name, n, [make(name, n, place) for place in places]) for n in ALL]
        return [list(row) for row in zip(*columns, strict=True)]
    kind = length if estimator == "gradient" else attributed
    return [[kind(name, n, make(name, n, place)) for n in ALL] for place in places]


def values_of(found: ExperimentResult) -> np.ndarray:
    """[cell, prompt] estimated effects, or values that aren't effects."""
    measure = found.measures[0]
    return measure.patched if measure.effect == "raw" else measure.patched - measure.base


def estimate(rule: str, estimator: str, name: str = "e") -> str:
    measure = "measure logit(answer) - logit(wrong) as "
    measure += "raw" if estimator == "gradient" or estimator.startswith("smooth") else "delta"
    lines = "from clean into changed", rule, f"using {estimator}"
    return experiment(name, *lines, measure=measure)


@pytest.mark.parametrize(
    "mode", some(["planned", "padded on the right", "small passes"], ["planned"])
)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_estimates_in_the_encoder_equal_autograd(name: str, mode: str) -> None:
    text = "".join(
        estimate(rule, own, f"e{n}") for n, (rule, (own, *_)) in enumerate(CASES.items())
    )
    largest = 0.0
    for found, (rule, case) in zip(run_text(name, text, mode), CASES.items(), strict=True):
        want = expected(name, *case)
        np.testing.assert_allclose(values_of(found), want, atol=1e-4, rtol=1e-4, err_msg=rule)
        assert np.abs(want).max() > 5e-3, rule
        largest = max(largest, float(np.abs(want).max()))
    assert largest > 0.1


@pytest.mark.parametrize("name", some(("llava_class", "llava_next", "qwen3_vl", "gemma3"), []))
def test_integrated_gradients_of_all_patches_add_up_to_the_exact_effect(name: str) -> None:
    """Completeness: many steps of one cell give the effect of its run."""
    rule = "ablate z vision layer 0 head 0 at photo tokens with zero"
    text = estimate(rule, "integrated_gradients(steps: 128)") + experiment(
        "exact", "from clean into changed", rule
    )
    estimated, exact = map(values_of, run_text(name, text))
    np.testing.assert_allclose(estimated, exact, atol=5e-3)
    assert np.abs(exact).max() > 0.05


def waves(key: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Deterministic numbers instead of noise, different for each copy, patch and dimension."""
    return np.cos(np.arange(int(np.prod(size))) * 1.7 + key[-1]).reshape(size)


@pytest.mark.parametrize(
    "name", some(("llava_next", "gemma3", "qwen2_5_vl", "idefics2_wide"), ["gemma3"])
)
def test_smoothgrad_in_the_encoder_adds_noise_to_all_patches_of_images(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to class tokens, which no position names."""
    monkeypatch.setattr(estimates, "draw_noise", waves)
    rule = f"patch z vision layer 0 head * at {CELL}"
    [found] = run_text(name, estimate(rule, "smoothgrad(samples: 2, noise: 0.4)"))
    own, places = tower(name), heads("z", 0)
    for n in ALL:
        given, every = inputs(name, n, other(n)), in_order(name, n)
        values, total = seen(name, Place("z", 0), n, other(n)), torch.zeros(())
        read = values[every].unflatten(1, (HEADS, SIZE))
        scale = 0.4 * float(read.max() - read.min())
        for number in range(2):
            move = torch.zeros_like(values)
            move[every] = scale * torch.from_numpy(waves([number], read.shape)).float().flatten(1)
            total = total + slopes(name, Place("z", 0), given, move)[1] / 2
        want = [float(place.own(total)[own.cell(other(n), 1, 2)].norm()) for place in places]
        np.testing.assert_allclose(values_of(found)[:, n], want, atol=1e-4, rtol=1e-4)
        assert max(want) > 1e-3


def in_order(name: str, n: int) -> list[int]:
    """The patches of the changed image of a prompt, in the order of its tokens."""
    own, image = tower(name), other(n)
    if name == "llava_next":  # the thumbnail's tokens come first
        small = [own.small(image, row, col) for row in (1, 2) for col in (1, 2)]
        front = [patch for each in small for patch in each]
        return front + [patch for patch in own.every(image) if patch not in front]
    if name == "idefics2_wide":
        return own.every(image)
    rows, cols = own.grids[image] if own.grids else (own.side, own.side)
    cells = [own.cell(image, row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]
    return [patch for each in cells for patch in each]


@pytest.mark.parametrize("name", some(("llava_next", "gemma3", "qwen3_vl"), ["qwen3_vl"]))
def test_estimate_in_the_second_of_two_images_equals_autograd(name: str) -> None:
    """With an answer of two tokens, whose second one follows the prompt."""
    text = experiment(
        "e",
        "from changed into clean",
        "patch z vision layer * head * at two row 1 col 2 token",
        "using gradient_input",
        measure="measure logprob(answer) as delta",
    )
    [found] = run_text(name, text.replace("prompts ask", "prompts both"), block=TWO)
    own, places = tower(name), heads("z", 0, 1)

    def metric(logits: Tensor) -> Tensor:
        words = torch.tensor([vlm.WORDS["w1"], vlm.WORDS["w2"]])
        return logits[-2:].log_softmax(-1)[[0, 1], words].sum()

    want: list[list[float]] = []
    for place in places:
        where, values = Place(place.site, place.layer), list[float]()
        for n in ALL:
            theirs, _ = slopes(name, where, both(name, n, swapped=True))
            here = [shifted(name, n, n) + patch for patch in own.cell(other(n), 1, 2)]
            there = [shifted(name, n, other(n)) + patch for patch in own.cell(n, 1, 2)]
            given = followed(both(name, n), [vlm.WORDS["w1"]])
            base, gradient = slopes(name, where, given, metric=metric)
            change = changes(place, base, here, place.own(theirs)[there])
            values.append(float((change * gradient).sum()))
        want.append(values)
    np.testing.assert_allclose(values_of(found), want, atol=1e-4, rtol=1e-4)
    assert np.abs(want).max() > 0.02


def test_verified_estimates_print_exact_effects_of_the_encoder() -> None:
    rule = f"patch z vision layer * head * at {CELL}"
    text = estimate(rule, "gradient_input verify top 2, random 1") + experiment(
        "exact", "from clean into changed", rule
    )
    estimated, exact = run_text("llava_class", text)
    [verified] = estimated.verified
    assert len(verified.cells) == 3
    want = values_of(exact)[verified.cells].mean(axis=1)
    np.testing.assert_allclose(verified.exact, want, atol=1e-4)
    assert np.abs(want).max() > 0.05


@pytest.mark.parametrize("name", some(("llava_class", "gemma3", "qwen3_vl"), ["gemma3"]))
def test_estimates_of_long_prompts_compute_blocks_of_the_encoder_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In passes of fewer tokens than a prompt has, activations aren't stored."""
    text = estimate(f"patch z vision layer * head * at {CELL}", "gradient_input") + estimate(
        f"patch mlp_out vision layer * at {CELL}", "integrated_gradients(steps: 2)", "f"
    )
    whole, again = run_text(name, text), set[str]()
    module = bare(name).model
    paths = {own: path for path, own in module.named_modules()}
    plain = full_pass.recompute_blocks

    def watched(blocks: Sequence[nn.Module], run: object) -> object:
        again.update(paths[own] for own in blocks)
        return plain(blocks, run)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(full_pass, "recompute_blocks", watched)
    monkeypatch.setitem(MODES, "short", RunOptions(execution=ExecutionOptions(pass_tokens=5)))
    for found, expected in zip(run_text(name, text, "short"), whole, strict=True):
        np.testing.assert_allclose(values_of(found), values_of(expected), atol=1e-5)
        assert np.abs(values_of(expected)).max() > 0.01
    assert {f"{tower(name).blocks}.{layer}" for layer in range(LAYERS)} < again


@contextmanager
def without_gradients(module: nn.Module) -> Generator[None]:
    """Let no weight require a gradient: the counter fails in inference mode on modules whose inputs
    are weights, such as the latents of a resampler."""
    wanted = [each for each in module.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in wanted:
            each.requires_grad_()


@pytest.mark.parametrize(
    "case",
    some(
        [
            *product(
                ["patch z vision layer * head *"],
                ["gradient_input", "integrated_gradients(steps: 3)"],
                ["llava_next", "gemma3", "qwen2_5_vl", "idefics2_wide"],
            ),
            *product(
                ["path z vision layer 0 head * -> mlp_norm vision layer 1"],
                ["relp", "eap_ig(steps: 4)", "eap_ig_activations(steps: 4)"],
                ["llava_class", "gemma3"],
            ),
        ],
        [
            ("patch z vision layer * head *", "gradient_input", "gemma3"),
            (
                "path z vision layer 0 head * -> mlp_norm vision layer 1",
                "eap_ig(steps: 4)",
                "llava_class",
            ),
        ],
    ),
    ids=" ".join,
)
def test_planned_cost_of_estimates_is_near_the_counted_products(
    case: tuple[str, str, str],
) -> None:
    rule, estimator, name = case
    text = estimate(f"{rule} at photo row 1 col 2 token", estimator)
    plan = make_plan(check_file(text, folder(), loaded(name), BLOCK).experiments)
    execute(plan, {"m": loaded(name)}, None, check=check_denominators)  # also tests the patches
    with without_gradients(bare(name).model), OperationCounter() as counter:
        execute(plan, {"m": loaded(name)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2


@pytest.mark.parametrize("name", some(("llava_next", "gemma3", "qwen2_5_vl"), ["gemma3"]))
def test_estimate_in_a_basis_of_the_encoder_equals_autograd(name: str) -> None:
    """Each patch of a token gets the coordinates of its counterpart."""
    basis = "basis b = pca(ask, dims: 2) at resid_post vision layer 0 at photo row 1 col 1 token"
    rule = f"patch resid_post vision layer 0 in basis b at {CELL}"
    [found] = run_text(name, f"{basis}\n{estimate(rule, 'gradient_input')}")
    axes, _ = components_of(name, each_token=False)
    want: list[float] = []
    for n in ALL:
        own, path = tower(name), f"{tower(name).blocks}.0"
        here, there = own.cell(other(n), 1, 2), own.cell(n, 1, 2)
        base, slope = slopes_at(bare(name).model, path, inputs(name, n, other(n)), is_input=False)
        clean, _ = slopes_at(bare(name).model, path, inputs(name, n, n), is_input=False)
        change = (clean[there] - base[here]) @ axes.T @ axes
        want.append(float((change * slope[here]).sum()))
    np.testing.assert_allclose(values_of(found)[0], want, atol=1e-4, rtol=1e-4)
    assert np.abs(want).max() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_estimate_at_a_frame_of_a_video_equals_autograd(name: str) -> None:
    rule = "patch z vision layer * head * at frame 2 row 1 col 1 token"
    found = videos.run(estimate(rule, "gradient_input"), name)["e"]
    grids_of, model = ((2, 4), (4, 2)), videos.bare(name).model
    own = replace(tower(name), grids=grids_of)
    for row, place in zip(values_of(found), heads("z", 0, 1), strict=True):
        path, want = find_module(name, place)[0], list[float]()
        for n in ALL:
            rows, cols = grids_of[n % 2]
            here = [4 * rows * cols + patch for patch in own.cell(n % 2, 1, 1)]
            both_runs = (videos.inputs(name, n, videos.record(n)[key]) for key in ("b", "a"))
            (base, slope), (clean, _) = (slopes_at(model, path, given) for given in both_runs)
            change = changes(place, base, here, place.own(clean)[here])
            want.append(float((change * slope).sum()))
        np.testing.assert_allclose(row, want, atol=1e-4, rtol=1e-4)
    assert np.abs(values_of(found)).max() > 0.01


MIXED = {
    "estimated": "from clean into changed\n  patch z vision layer * head * at photo tokens\n"
    "  using integrated_gradients(steps: 2)",
    "written": "from clean into changed\n  generate 3\n  scale resid_post vision layer 0 at "
    f"{CELL} by -2",
    "derived": "run cut {\n    scale z vision layer 0 at photo tokens by 0\n  }\n"
    f"  from cut into clean\n  patch resid_post layer 0 at {CELL}",
    "ruled": f"from clean into changed\n  patch mlp_out vision layer * at {CELL}\n  using relp",
    "blocked": "from clean into changed\n  block attention vision layer 1 from photo tokens to "
    f"{CELL}",
    "compared": f"observe cka resid_post vision layer * with z vision layer 0 at {CELL}",
    "read": f"observe norm resid_post vision layer * of changed at {CELL}",
}
MANY = ("llava_class", "paligemma", "llava_next", "gemma3", "internvl", "smolvlm", "qwen3_vl")


@pytest.mark.parametrize("name", some((*MANY, "qwen2_5_vl", "video_llava"), ["qwen2_5_vl"]))
def test_estimates_and_other_rules_on_the_same_images_equal_separate_files(name: str) -> None:
    """Passes with gradients leave nothing for passes without, in either order."""

    def text(*words: str) -> str:
        parts = [
            experiment(each, MIXED[each].replace("photo tokens", CELL), measure="")
            if each in ("compared", "read")
            else experiment(each, MIXED[each].replace("photo tokens", CELL))
            for each in words
        ]
        return "".join(parts)

    every = tuple(MIXED)
    alone = {word: run_text(name, text(word))[0] for word in every}
    for words in (every, every[::-1]):
        for word, found in zip(words, run_text(name, text(*words)), strict=True):
            for own, expected in zip(found.measures, alone[word].measures, strict=True):
                np.testing.assert_allclose(own.patched, expected.patched, atol=1e-4, err_msg=word)


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_estimates_of_patches_that_a_resampler_reads_equal_autograd(mode: str) -> None:
    """Of one patch, and of all patches of an image."""
    sizes = "equal and uneven"
    places = {
        "photo row 1 col 2 token": lambda given: [grids.in_grid(given, 1, 2)],
        "photo tokens": lambda given: list(grids.spots(given).values()),
    }
    text = "".join(
        estimate(f"patch z vision layer * head * at {position}", "gradient_input", f"e{n}")
        for n, position in enumerate(places)
    )
    model, largest = resampled.bare(splits=True).model, 0.0
    for found, tokens in zip(resampled.run_text(text, sizes, mode), places.values(), strict=True):
        for row, place in zip(values_of(found), heads("z", 0, 1), strict=True):
            want: list[float] = []
            for n in ALL:
                given, theirs = (resampled.inputs(sizes, n, image) for image in (other(n), n))
                clean = resampled.state("z", place.layer, theirs)
                part = f"model.vision_model.encoder.layers.{place.layer}.self_attn.out_proj"
                base, gradient = slopes_at(model, part, given)
                written = place.own(clean)[tokens(theirs)]
                want.append(float((changes(place, base, tokens(given), written) * gradient).sum()))
            np.testing.assert_allclose(row, want, atol=1e-4, rtol=1e-4)
            largest = max(largest, float(np.abs(want).max()))
    assert largest > 0.05


@cache
def with_rules(name: str, kind: str) -> Any:
    """The model in 64 bits with the derivatives of `relp` or `gim`."""
    model: Any = ruled(copy.deepcopy(bare(name).model).double(), kind)
    for path, part in model.named_modules():
        if "vis" in path or name == "paligemma":  # all tokens of its prompts see each other
            vars(part)["causal_in_reference"] = False
    return model


def in_64_bits(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a model in 64 bits."""
    return {key: each.double() if each.is_floating_point() else each for key, each in given.items()}


RULED = {
    "relp": (
        "llava_class",
        "qwen2_5_vl",
        "llava_next",
        "paligemma",
        "internvl",
        "idefics2_wide",
    ),
    "gim": ("llava_class", "qwen2_5_vl", "llava_next", "paligemma"),
}


@pytest.mark.parametrize(
    "case",
    some(
        [(kind, name) for kind, names in RULED.items() for name in names],
        [("relp", "qwen2_5_vl"), ("gim", "llava_class")],
    ),
    ids=" ".join,
)
def test_changed_derivatives_in_the_encoder_equal_modules_with_them(case: tuple[str, str]) -> None:
    kind, name = case
    places = [*heads("z", 0, 1), Place("mlp_out", 0), Place("resid_pre", 0), Place("attn_norm", 1)]
    lines = ("z vision layer * head *", "mlp_out vision layer 0", "resid_pre vision layer 0")
    text = "".join(
        estimate(f"patch {line} at {CELL}", kind, f"e{n}")
        for n, line in enumerate((*lines, "attn_norm vision layer 1"))
    )
    found = np.concatenate([values_of(each) for each in run_text(name, text)])
    for row, place in zip(found, places, strict=True):
        want: list[float] = []
        for n in ALL:
            _, patches, written = copied(name, n, place)
            given = in_64_bits(inputs(name, n, other(n)))
            base, gradient = slopes(name, place, given, model=with_rules(name, kind))
            want.append(float((changes(place, base, patches, written.double()) * gradient).sum()))
        np.testing.assert_allclose(row, want, atol=2e-4, rtol=1e-3, err_msg=str(place))
    assert np.abs(found).max() > 0.05


@pytest.mark.slow
def test_changed_derivatives_in_the_encoder_of_frames_equal_modules_with_them() -> None:
    """Video-LLaVA, which passes other arguments to the attention of its encoders."""
    rule = "patch z vision layer * head * at frame 2 tokens"
    found = videos.run(estimate(rule, "gim"), "video_llava")["e"]
    model: Any = ruled(copy.deepcopy(videos.bare("video_llava").model).double(), "gim")
    for path, part in model.named_modules():
        if "tower" in path:
            vars(part)["causal_in_reference"] = False
    for row, place in zip(values_of(found), heads("z", 0, 1), strict=True):
        path, want = f"model.video_tower.encoder.layers.{place.layer}.self_attn.out_proj", []
        for n in ALL:
            runs = (videos.inputs("video_llava", n, videos.record(n)[key]) for key in ("b", "a"))
            (base, slope), (clean, _) = (slopes_at(model, path, in_64_bits(own)) for own in runs)
            here = range(6, 10)  # after the class tokens of two frames and the patches of one
            want.append(float((changes(place, base, here, place.own(clean)[here]) * slope).sum()))
        np.testing.assert_allclose(row, want, atol=2e-4, rtol=1e-3)
    assert np.abs(values_of(found)).max() > 0.05


@contextmanager
def constant(*modules: Any) -> Generator[None]:
    """Let no gradient pass the outputs of modules."""

    def detach(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].detach(), *output[1:])
        return output.detach()

    with ExitStack() as stack:
        for each in modules:
            stack.callback(each.register_forward_hook(detach).remove)
        yield


@pytest.mark.parametrize(
    "name", some(("llava_class", "llava_next", "qwen3_vl", "gemma3", "idefics2_wide"), ["gemma3"])
)
def test_atp_star_leaves_out_layers_of_the_encoder_and_the_language_model(name: str) -> None:
    line = "patch z vision layer * head * at photo row 1 col 2 token"
    measure = "measure logit(answer) - logit(wrong) as raw"
    lines = "from clean into changed", line, "using atp_star"
    [found] = run_text(name, experiment("e", *lines, measure=measure))
    own, model = tower(name), bare(name)
    blocks = [model.model.get_submodule(f"{own.blocks}.{layer}") for layer in range(LAYERS)]
    layers = [
        tuple(each.get_submodule(part) for part in (own.attention, own.mlp)) for each in blocks
    ]
    layers += [(each.self_attn, each.mlp) for each in model.language.layers]
    for row, place in zip(values_of(found), heads("z", 0, 1), strict=True):
        for n in ALL:
            sizes: list[float] = []
            for number, parts in enumerate(layers):
                if number != place.layer:
                    with constant(*parts):
                        sizes.append(abs(attributed(name, n, copied(name, n, place))))
            np.testing.assert_allclose(row[n], np.mean(sizes), atol=1e-4, rtol=1e-4)
    assert np.abs(values_of(found)).max() > 0.05


def test_atp_qk_equals_gradient_input_where_no_query_or_key_is_written() -> None:
    rule = f"patch z vision layer * head * at {CELL}"
    text = estimate(rule, "gradient_input") + estimate(rule, "atp_qk", "f")
    first, second = map(values_of, run_text("gemma3", text))
    np.testing.assert_array_equal(first, second)


@cache
def double(name: str) -> Any:
    return copy.deepcopy(bare(name).model).double()


def language(name: str, layer: int, site: str) -> Where:
    """A module of the language model."""
    [root] = (
        path for path, part in bare(name).model.named_modules() if part is bare(name).language
    )
    block = f"{root}.layers.{range(len(bare(name).language.layers))[layer]}"
    mlp = "post_feedforward_layernorm" if name in ("gemma3", "paligemma2") else "mlp"
    path = {
        "resid_post": "",
        "z": ".self_attn.o_proj",
        "v": ".self_attn.v_proj",
        "mlp_out": f".{mlp}",
    }[site]
    return Where(f"{block}{path}", "in" if site == "z" else "out")


def double_inputs(name: str, n: int, image: int) -> dict[str, Tensor]:
    return in_64_bits(inputs(name, n, image))


def read_language(name: str, where: Where, n: int, at: int) -> Tensor:
    """A vector of the prompt with its own image, before the patch."""
    found: list[Tensor] = []

    def keep(part: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        found.append(args[0] if where.side == "in" else value)

    with double(name).get_submodule(where.path).register_forward_hook(keep), torch.no_grad():
        double(name)(**double_inputs(name, n, n))
    return found[0][0, at]


def decomposed(name: str, sender: Where, receiver: Where | None, n: int, *, last: bool) -> float:
    """The estimate for the last token or the first cell of an image, of a node or an edge."""
    given, model = double_inputs(name, n, other(n)), double(name)
    to, of = (
        len(inputs(name, n, each)["input_ids"][0]) - 1 if last else cells(name, n, each)[1, 1]
        for each in (other(n), n)
    )

    def call(model: Any) -> Tensor:
        return _gap(model(**given).logits[0])

    sent = {(to, 0): read_language(name, sender, n, of)}
    if receiver is None:
        return decompose(model, call, sender, sent)
    layers = range(len(bare(name).language.layers))
    held = [language(name, layer, site) for layer in layers for site in ("z", "mlp_out")]
    _, [found] = decompose_held(model, call, [(sender, sent)], held, [receiver])
    return decompose(model, call, receiver, {(to, 0): found[to, 0]})


DECOMPOSED: dict[str, tuple[tuple[str, int], tuple[str, int] | None]] = {
    "patch resid_post layer 0": (("resid_post", 0), None),
    "patch mlp_out layer 0": (("mlp_out", 0), None),
    "path layer 0 heads * -> v layer 1 heads *": (("z", 0), ("v", 1)),
    "path mlp_out layer 0 -> logits": (("mlp_out", 0), ("resid_post", -1)),
}


@pytest.mark.parametrize("name", some(IN_A_GRID, ("qwen2_5_vl", "paligemma2")))
def test_cdt_in_language_models_of_images_equals_plain_hooks(name: str) -> None:
    """At the final token and at tokens of images, whose vectors are those of the whole encoder."""
    due = [
        (rule, sender, receiver, last)
        for rule, (sender, receiver) in DECOMPOSED.items()
        for last in (True, False)
        if last or "logits" not in rule
    ]
    text = "".join(
        experiment(
            f"e{k}",
            "from clean into changed",
            f"{rule} at {'last' if last else 'photo row 1 col 1'} token",
            "using cdt",
        )
        for k, (rule, _, _, last) in enumerate(due)
    )
    # In 32 bits, shares of a bias have jumps where both parts of a number are near 0.
    model, problems = adopt_model("m", double(name), bare(name).processor)
    assert model is not None, problems
    experiments, largest = run_text(name, text, model=model), 0.0
    for found, (rule, sender, receiver, last) in zip(experiments, due, strict=True):
        ends = [
            None if end is None else language(name, end[1], end[0]) for end in (sender, receiver)
        ]
        assert ends[0] is not None
        expected = [decomposed(name, ends[0], ends[1], n, last=last) for n in ALL]
        measure = found.measures[0]
        np.testing.assert_allclose(
            (measure.patched - measure.base)[0], expected, atol=2e-4, rtol=1e-3, err_msg=rule
        )
        largest = max(largest, float(np.abs(expected).max()))
    assert largest > 0.05


REJECTED = {
    (f"patch z vision layer 0 head 0 at {CELL}", "cdt"): (
        "E0608",
        "it decomposes the language model, which reads the vectors of images",
    ),
    (f"path z vision layer 0 head 0 -> attn_norm vision layer 1 at {CELL}", "eap_ig"): (
        "E0608",
        "row 3 has 24 tokens in `changed` and 18 in `clean`, and each token moves",
    ),
    ("block attention vision layer 0 from photo tokens to last token", "gradient_attention"): (
        "E0310",
        "",
    ),
    (f"block attention vision layer 0 from photo tokens to {CELL}", "gradient_attention"): (
        "E0608",
        "gradients of attention weights between patches aren't computed yet",
    ),
    (f"patch resid_post vision layer 0 at {CELL}", "eap"): (
        "E0608",
        "it estimates edges between components",
    ),
    ("scale resid_post vision layer 0 at photo tokens by 2", "gradient_input"): (
        "E0608",
        "the written value must be a vector of an unpatched run, or zero",
    ),
    (f"generate 3\n  patch resid_post vision layer 0 at {CELL}", "atp"): (
        "E0608",
        "a sampled or selected token has no gradient",
    ),
}


@pytest.mark.parametrize(("lines", "problem"), REJECTED.items())
def test_invalid_estimate_in_the_encoder_reports_the_code(
    lines: tuple[str, str], problem: tuple[str, str]
) -> None:
    with pytest.raises(AssertionError) as raised:
        run_text("qwen2_5_vl", estimate(*lines))
    assert f"error[{problem[0]}]" in str(raised.value)
    assert problem[1] in " ".join(str(raised.value).split())


@cache
def with_padding(kind: str) -> Any:
    """The same for Idefics2, whose encoder and resampler don't attend to padding."""
    AttentionInterface.register("ruled, with masks", attend_flattened)
    AttentionMaskInterface.register("ruled, with masks", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model: Any = ruled(copy.deepcopy(resampled.bare(splits=True).model).double(), kind)
    model.set_attn_implementation("ruled, with masks")
    for path, part in model.named_modules():
        if "vision" in path or "perceiver" in path:
            vars(part)["causal_in_reference"] = False
    return model


@pytest.mark.parametrize("sizes", some(["equal and uneven", "equal"], ["equal and uneven"]))
def test_gim_changes_derivatives_of_a_resampler(sizes: str) -> None:
    """Which reads padded tiles of different sizes."""
    text = estimate("patch z vision layer * head * at photo tokens", "gim")
    own = resampled.bare(splits=True)
    model, problems = adopt_model("m", copy.deepcopy(own.model).double(), own.processor)
    assert model is not None, problems
    ran = run_on(resampled.source(text, sizes), {"m": model}, MODES["planned"])
    [found] = succeeded(*ran).values()
    for row, place in zip(values_of(found), heads("z", 0, 1), strict=True):
        want: list[float] = []
        for n in ALL:  # in 64 bits, because the measure changes quickly with the patches
            given, theirs = (
                in_64_bits(resampled.inputs(sizes, n, image)) for image in (other(n), n)
            )
            part = f"model.vision_model.encoder.layers.{place.layer}.self_attn.out_proj"
            base, gradient = slopes_at(with_padding("gim"), part, given)
            clean, _ = slopes_at(with_padding("gim"), part, theirs)
            to, of = (list(grids.spots(each).values()) for each in (given, theirs))
            change = changes(place, base, to, place.own(clean)[of])
            want.append(float((change * gradient).sum()))
        np.testing.assert_allclose(row, want, atol=2e-4, rtol=1e-3, err_msg=str(place))
    assert np.abs(values_of(found)).max() > 0.01
