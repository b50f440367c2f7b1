"""Estimators with changed derivatives, noise, edges and attention weights in Llama 3.2 Vision,
against autograd on copies of the bare model: one unpadded prompt at a time."""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AttentionInterface

from mechdsl.execute.patching import estimates

from ..quick import some
from ..reference.ruled import ruled
from . import test_attended_paths as paths
from .support import RECORDS, experiment
from .test_attended_blocks import tower
from .test_attended_encoder import LOCAL, all_columns
from .test_attended_estimates import (
    ALL,
    SITES,
    TOWER_WIDTH,
    Cell,
    at_last,
    head,
    in_tower,
    one_patch,
    read,
    slope,
)
from .test_attended_images import (
    EACH,
    GRIDS,
    LAYERS,
    SIZES,
    TILES,
    WIDTH,
    Hook,
    bare,
    block_at,
    hooked,
    other,
    patch,
    processor,
    run_text,
    token,
    try_text,
)
from .test_attended_paths import (
    HEADS_OF_TEXT,
    HEADS_OF_TOWER,
    IN_TOWER,
    MARKED,
    MLPS_OF_TEXT,
    MLPS_OF_TOWER,
    PATHS,
    Path,
    Place,
    attention,
    given,
    held,
    recorded,
    run,
    z,
)
from .test_vision_estimates import constant

RAW = "measure logit(answer) - logit(wrong) as raw"
ONE = "photo row 1 col 2 token"


@cache
def double(kind: str) -> Any:
    """A copy of the bare model in 64 bits, with the derivatives of `relp`, of `gim`, or of norms
    that divide by a constant."""
    model: Any = copy.deepcopy(bare()).double()
    if kind != "eap":
        model = ruled(model, kind)
    for path, part in model.named_modules():
        if "vision" in path:
            vars(part)["causal_in_reference"] = False
    return model


@pytest.mark.parametrize(
    "case",
    some(
        [(kind, site) for kind in ("relp", "gim") for site in SITES],
        [("relp", "mlp_out layer * at last token"), ("gim", f"v cross layer 1 head * at {ONE}")],
    ),
    ids=" ".join,
)
def test_changed_derivatives_equal_modules_with_them(case: tuple[str, str]) -> None:
    kind, site = case
    text = experiment("e", "from clean into changed", f"patch {site} using {kind}")
    [found] = run_text(text, "planned", MARKED)
    expected = np.zeros((len(SITES[site]), len(ALL)))
    for row, cell in enumerate(SITES[site]):
        for n in ALL:
            way = (read(n, False, cell) - read(n, True, cell)).double()
            expected[row, n] = float((way * slope(n, cell, (), double(kind))).sum())
    shown = found.measures[0].patched - [run(n, True) for n in ALL]
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=1e-3)
    assert np.abs(expected).max() > 0.05


def waves(key: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Deterministic numbers instead of noise, different for each copy, vector and dimension."""
    return np.cos(np.arange(int(np.prod(size))) * 1.7 + key[-1]).reshape(size)


def all_tokens(image: int) -> list[int]:
    """The tokens of the prompt with the image of a number, which is that of the changed run."""
    count = given((image - 1) % len(RECORDS), True)["input_ids"].shape[1]
    return [*range(count)]


def all_patches(image: int) -> list[int]:
    rows, cols = (2 * each for each in GRIDS[image])
    return [patch(image, row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]


def every_token(image: int) -> list[int]:
    """The tokens of all tiles, also of those that the image doesn't fill: text before the image
    attends to them."""
    return [*range(TILES * EACH)]


NOISY: dict[str, tuple[Place, int, int, Any, Any]] = {
    "patch z layer 2 head * at last token": (z(2), 4, WIDTH, all_tokens, at_last),
    f"patch z vision layer 0 head * at {ONE}": (
        HEADS_OF_TOWER[0],
        2,
        TOWER_WIDTH,
        lambda image: sorted(all_columns(image)),  # tile by tile
        in_tower,
    ),
    f"patch v cross layer 1 head * at {ONE}": (
        (f"{attention(1)}.v_proj", False),
        2,
        WIDTH,
        every_token,
        one_patch,
    ),
}


@pytest.mark.parametrize("rule", some(tuple(NOISY), [*NOISY][1:2]))
def test_smoothgrad_adds_noise_to_all_vectors_of_a_site(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "draw_noise", waves)
    place, heads, width, every, one = NOISY[rule]
    text = experiment(
        "e",
        "from clean into changed",
        f"{rule} using smoothgrad(samples: 2, noise: 0.4)",
        measure=RAW,
    )
    [found] = run_text(text, "planned", MARKED)
    whole = Cell(place, every)
    for n in ALL:
        values = read(n, True, whole).unflatten(1, (heads, width))
        scale, total = 0.4 * float(values.max() - values.min()), torch.zeros(())
        for number in range(2):
            move = scale * torch.from_numpy(waves([number], values.shape)).float().flatten(1)
            total = total + slope(n, Cell(place, one), [(whole, move)]) / 2
        want = total.unflatten(1, (heads, width)).norm(dim=(0, 2)).numpy()
        np.testing.assert_allclose(
            found.measures[0].patched[:, n], want, atol=1e-4, rtol=1e-3, err_msg=rule
        )
        assert want.max() > 0.01


def edge(n: int, path: Path, kind: str, steps: int = 1) -> float:
    """The change of the sender times the gradient along the edges from it to the receivers.

    steps: The points at which gradients by receivers are taken, as the inputs of both stacks move
    from the source run to the base run.
    """
    module, at = double(kind), path.token(n)
    source = recorded(n, False, [path.sender])[path.sender]
    heads, mlps = HEADS_OF_TEXT, MLPS_OF_TEXT
    if path.vision:
        heads, mlps = HEADS_OF_TOWER, MLPS_OF_TOWER
    places = [*heads, *(mlps if path.mlps else ())]
    base = recorded(n, True, [*places, path.sender])
    own = path.columns(path.head)
    way = (source - base[path.sender])[0, at, own].double()
    slopes = receivers(n, path, module, steps)
    leaf = torch.zeros_like(way).requires_grad_()
    reached: list[Tensor] = []

    def moved(_: Tensor) -> Tensor:
        whole = base[path.sender].double().clone()
        whole[0, at, own] += leaf
        return whole

    hooks: list[Hook] = [
        held(place, base[place].double()) for place in places if place != path.sender
    ]
    hooks.append((*path.sender, moved))
    for (place, number), by in slopes:

        def keep(now: Tensor, of: Any = (place, number), by: Tensor = by) -> Tensor:
            reached.append((of_head(now, path, of, at) * by).sum())
            return now.clone()  # without the factor of gradients at queries

        hooks.append((*place, keep))
    value = logits(n, double("norms") if path.norms else module, hooks)
    target = value if path.receivers is None else torch.stack(reached).sum()
    (gradient,) = torch.autograd.grad(target, leaf, allow_unused=True, materialize_grads=True)
    return float((gradient * way).sum())


def of_head(now: Tensor, path: Path, of: tuple[Place, int | None], at: int) -> Tensor:
    place, number = of
    if place[0].endswith("q_norm"):  # [1, head, token, width]
        return now[0, slice(None) if number is None else number, at]
    return now[0, at, path.columns(number)]


def logits(n: int, module: Any, hooks: Sequence[Hook]) -> Tensor:
    inputs = {
        key: each.double() if each.is_floating_point() else each
        for key, each in given(n, True).items()
    }
    for each in module.parameters():
        each.requires_grad_(False)
    with torch.enable_grad(), hooked(hooks, module):
        last = module(**inputs, use_cache=False).logits[0, -1]
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return last[answer] - last[wrong]


def receivers(
    n: int, path: Path, module: Any, steps: int = 1
) -> list[tuple[tuple[Place, int | None], Tensor]]:
    """The gradient of the measure by each receiver, in the base run, or between both runs."""
    found: list[tuple[tuple[Place, int | None], Tensor]] = []
    inputs: list[Place] = [(tower(0), True), (block_at(0), True)]
    clean, changed = (recorded(n, which, inputs) for which in (False, True))
    for of in (path.receivers or {}).items():
        total: Any = 0
        for step in range(steps):
            share, leaves = step / steps, list[Tensor]()

            def add(now: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
                leaves.append(torch.zeros_like(now).requires_grad_())
                return now + leaves[0]

            def move(now: Tensor, way: Tensor, share: float = share) -> Tensor:
                return now + share * way

            hooks: list[Hook] = [
                (*each, partial(move, way=(clean[each] - changed[each]).double()))
                for each in inputs
            ]
            value = logits(n, module, [*hooks, (*of[0], add)])
            total = total + torch.autograd.grad(value, leaves)[0] / steps
        found.append((of, of_head(total, path, of, path.token(n))))
    return found


EDGES = [
    (kind, rule)
    for kind in ("eap", "relp", "gim")
    for rule in (*PATHS, *IN_TOWER)
    if kind == "eap" or "frozen" not in rule
]


@pytest.mark.parametrize("case", some(EDGES, [EDGES[1], EDGES[-7]]), ids=" ".join)
def test_estimated_edges_equal_autograd_with_held_sublayers(case: tuple[str, str]) -> None:
    kind, rule = case
    text = experiment("e", "from clean into changed", f"{rule} using {kind}")
    [found] = run_text(text, "planned", MARKED)
    expected = np.array([[edge(n, path, kind) for n in ALL] for path in (PATHS | IN_TOWER)[rule]])
    shown = (found.measures[0].patched - [run(n, True) for n in ALL])[: len(expected)]
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=1e-3)
    assert np.abs(expected).max() > 0.01


def test_integrated_gradients_move_patches_and_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a gray image of the same size, and to another word."""
    monkeypatch.setattr(paths, "other", lambda n: n)
    plain = given

    def grayed(n: int, changed: bool) -> dict[str, Any]:
        if not changed:
            return plain(n, changed)
        height, width = SIZES[n]
        picture = Image.new("RGB", (width, height), (128,) * 3)
        read: Any = processor()
        [text] = read.batch_decode(plain(n, changed)["input_ids"])
        return dict(read(text=[text], images=[[picture]], return_tensors="pt"))

    for module in (paths, sys.modules[__name__]):
        monkeypatch.setattr(module, "given", grayed)
    rule = next(each for each in IN_TOWER if "mlp_norm" in each)
    text = experiment("e", "from clean into changed", f"{rule} using eap_ig(steps: 3)")
    [found] = run_text(text, "planned", MARKED.replace("file = other", "mask photo"))
    expected = np.array([[edge(n, path, "eap", 3) for n in ALL] for path in IN_TOWER[rule]])
    shown = (found.measures[0].patched - [run(n, True) for n in ALL])[: len(expected)]
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=1e-3)
    assert np.abs(expected).max() > 0.01


@contextmanager
def weighed(module: Any, leaves: list[Tensor]) -> Generator[None]:
    """Compute attention of the bare model here, and add zeros to the weights of one module."""

    def attend(part: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        shared = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(shared, 1) for each in (k, v))
        scores = q @ k.transpose(-1, -2) * (more.get("scaling") or q.shape[-1] ** -0.5)
        if isinstance(mask, Tensor):
            scores = scores + mask
        elif getattr(part, "is_causal", False):
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(unseen, float("-inf"))
        weights = scores.softmax(-1)
        if part is module:
            leaves.extend((weights.detach(), torch.zeros_like(weights).requires_grad_()))
            weights = weights + leaves[1]
        return (weights @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("weighed", attend)
    bare().set_attn_implementation("weighed")
    try:
        yield
    finally:
        bare().set_attn_implementation("sdpa")
        del AttentionInterface._global_mapping["weighed"]


def products(n: int, layer: int) -> Tensor:
    """Positive products [head, query, key] of the weights and the gradient by them."""
    leaves: list[Tensor] = []
    with weighed(bare().get_submodule(attention(layer)), leaves), torch.enable_grad():
        last = bare()(**given(n, True), use_cache=False).logits[0, -1]
        answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        (gradient,) = torch.autograd.grad(last[answer] - last[wrong], leaves[1])
    return (leaves[0] * gradient).clamp(min=0)[0]


def test_gradients_of_attention_equal_autograd_by_its_weights() -> None:
    lines = {
        "block attention layer 2 head * from last token to token 3": (2, lambda n: [3]),
        f"block attention cross layer 1 head * from last token to {ONE}": (1, one_patch),
        "block attention cross layer 3 head * from last token to photo tokens": (3, all_patches),
    }
    text = "".join(
        experiment(
            f"e{n}", "from clean into changed", f"{line} using gradient_attention", measure=RAW
        )
        for n, line in enumerate(lines)
    )
    found = run_text(text, "planned", MARKED)
    for each, (line, (layer, keys)) in zip(found, lines.items(), strict=True):
        expected = np.array(
            [products(n, layer)[:, -1, keys(other(n))].sum(-1).numpy() for n in ALL]
        ).T
        np.testing.assert_allclose(
            each.measures[0].patched, expected, atol=1e-4, rtol=1e-3, err_msg=line
        )
        assert expected.max() > 0.01, line


def at_tensor(now: Tensor, cell: Cell, value: Tensor, image: int) -> Tensor:
    now = now.clone()
    if now.dim() == 4:  # [1, head, token, width]
        numbers = range(now.shape[1]) if cell.columns is None else [cell.columns.start // WIDTH]
        for number in numbers:
            now[0, number, list(cell.tokens(image))] = value[..., head(number)]
        return now
    flat = now.view(-1, now.shape[-1])
    flat[list(cell.tokens(image)), cell.columns or slice(None)] = value
    return now


def weights(
    n: int, layer: int, hooks: Sequence[Hook] = (), parts: Sequence[Any] = ()
) -> list[Tensor]:
    """The weights of attention [1, head, query, key] of a block, and the gradient by them."""
    leaves: list[Tensor] = []
    with (
        weighed(bare().get_submodule(attention(layer)), leaves),
        torch.enable_grad(),
        hooked(hooks),
        constant(*parts),
    ):
        last = bare()(**given(n, True), use_cache=False).logits[0, -1]
        answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        (gradient,) = torch.autograd.grad(last[answer] - last[wrong], leaves[1])
    return [leaves[0], gradient]


def sublayers(layer: int) -> list[Any]:
    return [bare().get_submodule(path) for path in (attention(layer), f"{block_at(layer)}.mlp")]


def fixed(n: int, layer: int, cell: Cell, parts: Sequence[Any] = ()) -> float:
    """The exact change of the weights times the gradient by them."""
    source = read(n, False, cell)
    hook = (*cell.place, lambda now: at_tensor(now, cell, source, other(n)))
    base, gradient = weights(n, layer, (), parts)
    return float(((weights(n, layer, [hook])[0] - base) * gradient).sum())


ATTENTION_CELLS: dict[str, list[tuple[int, Cell]]] = {
    "q layer 2 head * at last token": [
        (2, Cell((f"{attention(2)}.q_proj", False), at_last, head(number))) for number in range(4)
    ],
    "k layer 2 head * at token 3": [
        (2, Cell((f"{attention(2)}.k_proj", False), lambda _: [3], head(number)))
        for number in range(2)
    ],
    "q cross layer 3 heads * at last token": [
        (3, Cell((f"{attention(3)}.q_norm", False), at_last))
    ],
    f"k cross layer 1 heads * at {ONE}": [(1, Cell((f"{attention(1)}.k_norm", False), one_patch))],
}


@pytest.mark.parametrize(
    "line", some(tuple(ATTENTION_CELLS), ["q cross layer 3 heads * at last token"])
)
def test_fixed_queries_and_keys_equal_exact_weights_of_the_bare_model(line: str) -> None:
    text = experiment("e", "from clean into changed", f"patch {line} using atp_qk")
    text += experiment("f", "from clean into changed", f"patch {line} using atp_star", measure=RAW)
    found = run_text(text, "planned", MARKED)
    expected = np.zeros((2, len(ATTENTION_CELLS[line]), len(ALL)))
    for number, (layer, cell) in enumerate(ATTENTION_CELLS[line]):
        for n in ALL:
            others = [sublayers(dropped) for dropped in range(LAYERS) if dropped != layer]
            sizes = [abs(fixed(n, layer, cell, parts)) for parts in others]
            expected[:, number, n] = fixed(n, layer, cell), np.mean(sizes)
    shown = [found[0].measures[0].patched - [run(n, True) for n in ALL]]
    shown.append(found[1].measures[0].patched)
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=1e-3)
    assert np.abs(expected).max() > 0.01


TO_QUERIES = [rule for rule in PATHS if "-> q" in rule]


@pytest.mark.parametrize("rule", some(TO_QUERIES, TO_QUERIES[2:3]))
def test_edges_to_queries_equal_exact_weights_of_the_bare_model(rule: str) -> None:
    text = experiment("e", "from clean into changed", f"{rule} using atp_qk")
    [found] = run_text(text, "planned", MARKED)
    expected = np.zeros((len(PATHS[rule]), len(ALL)))
    for number, path in enumerate(PATHS[rule]):
        [place] = path.receivers or {}
        layer = next(n for n in range(LAYERS) if place[0].startswith(f"{attention(n)}."))
        for n in ALL:
            base, gradient = weights(n, layer)
            changed, _ = weights(n, layer, path.all_received(n))
            expected[number, n] = ((changed - base) * gradient).sum()
    shown = (found.measures[0].patched - [run(n, True) for n in ALL])[: len(expected)]
    np.testing.assert_allclose(shown, expected, atol=3e-4, rtol=1e-3)
    assert np.abs(expected).max() > 0.01


DROPPED = ("z cross layer * head * at last token", f"z vision layer * head * at {ONE}")


@pytest.mark.parametrize("site", some(DROPPED, DROPPED[:1]))
def test_atp_star_leaves_out_layers_of_all_stacks_of_the_site(site: str) -> None:
    text = experiment("e", "from clean into changed", f"patch {site} using atp_star", measure=RAW)
    [found] = run_text(text, "planned", MARKED)
    layers = {block_at(layer): sublayers(layer) for layer in range(LAYERS)}
    if "vision" in site:
        for layer in range(LOCAL + 1):
            parts = [
                bare().get_submodule(f"{tower(layer)}.{name}") for name in ("self_attn", "mlp")
            ]
            layers[tower(layer)] = parts
    for cell, shown in zip(SITES[site], found.measures[0].patched, strict=True):
        for n in ALL:
            way, sizes = read(n, False, cell) - read(n, True, cell), list[float]()
            for block, parts in layers.items():
                if not cell.place[0].startswith(f"{block}."):
                    with constant(*parts):
                        sizes.append(abs(float((way * slope(n, cell)).sum())))
            np.testing.assert_allclose(shown[n], np.mean(sizes), atol=3e-4, rtol=1e-3)
    assert found.measures[0].patched.max() > 0.05


ERRORS = {
    "path z layer 0 head 0 -> q layer 2 head 0 at last token using eap_ig": "not the image",
    "patch resid_post layer 1 at last token using cdt": "whose blocks attend to an image",
    f"patch q vision layer 1 head 0 at {ONE} using atp_qk": "isn't recomputed yet",
}


@pytest.mark.parametrize(("line", "reason"), ERRORS.items())
def test_estimator_without_a_meaning_reports_e0608(line: str, reason: str) -> None:
    _, found = try_text(experiment("e", "from clean into changed", line), block=MARKED)
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0608"
    assert reason in problem.message
