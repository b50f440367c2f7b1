"""Rules in the vision encoder of Llama 3.2 Vision, against plain hooks on the bare model: one
unpadded prompt at a time, with manually computed columns of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks import model as loaded_models
from mechdsl.loading.loader import adopt_model
from mechdsl.models.shape import ModelShape
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators

from ..execute.support import as_in_the_data, check_file, run_on
from ..operations import OperationCounter
from ..quick import some
from .support import BLOCK, MEASURE, RECORDS, experiment, succeeded
from .test_attended_images import (
    GRIDS,
    IMAGE,
    Hook,
    at,
    bare,
    difference,
    folder,
    inputs,
    loaded,
    other,
    outputs,
    patch,
    processor,
    read,
    replied,
    run_text,
    token,
    try_text,
)

ALL = range(len(RECORDS))
LOCAL, HEADS, WIDTH = 2, 2, 8
"""Layers of the first encoder (the second has one), and heads of each layer with their width."""
PADDED = 8
"""Columns of a tile in the encoder: a class token, 2 x 2 patches, and padding."""


def column(image: int, row: int, col: int) -> int:
    """The column of a patch in the encoder, from its row and column over all tiles."""
    (down, below), (right, after) = divmod(row - 1, 2), divmod(col - 1, 2)
    return (down * GRIDS[image][1] + right) * PADDED + 1 + 2 * below + after


def all_columns(image: int) -> list[int]:
    rows, cols = (2 * each for each in GRIDS[image])
    return [column(image, row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]


def place(site: str, layer: int) -> tuple[str, bool]:
    """The module of a site, and whether the site is its input."""
    encoder = "transformer" if layer < LOCAL else "global_transformer"
    block = f"model.vision_model.{encoder}.layers.{layer - LOCAL * (layer >= LOCAL)}"
    return {
        "resid_pre": (block, True),
        "resid_post": (block, False),
        "attn_out": (f"{block}.self_attn", False),
        "mlp_out": (f"{block}.mlp", False),
        "z": (f"{block}.self_attn.o_proj", True),
    }[site]


def changed(site: str, layer: int, change: Callable[[Tensor], None]) -> Hook:
    """A change, in place, of a site's values [column, width]."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        change(value[0])
        return value

    return (*place(site, layer), edit)


@cache
def state(site: str, layer: int, n: int, image: int) -> Tensor:
    """The values of a site [column, width] for one prompt."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value[0].clone())
        return value

    outputs(n, image, [(*place(site, layer), keep)])
    return found[0]


def written(site: str, layer: int, columns: Sequence[int], values: Tensor) -> Hook:
    def change(own: Tensor) -> None:
        own[list(columns)] = values

    return changed(site, layer, change)


def scaled(site: str, layer: int, columns: Sequence[int], factor: float) -> Hook:
    def change(own: Tensor) -> None:
        own[list(columns)] *= factor

    return changed(site, layer, change)


def copied(site: str, layer: int, n: int, row: int, col: int) -> Hook:
    """The vector of the prompt's image, written into the other one."""
    values = state(site, layer, n, n)[column(n, row, col)]
    return written(site, layer, [column(other(n), row, col)], values)


def direction() -> Tensor:
    return torch.stack([state("resid_post", 0, n, n)[column(n, 1, 1)] for n in ALL]).mean(0)


def gate(name: str) -> float:
    block = bare().get_submodule("model.vision_model.global_transformer.layers.0")
    return float(getattr(block, name).tanh())


def silenced(n: int, head: int) -> Hook:
    """A head of layer 0 without output at all patches."""

    def change(own: Tensor) -> None:
        own[all_columns(other(n)), head * WIDTH : (head + 1) * WIDTH] = 0

    return changed("z", 0, change)


def exchanged(n: int, layer: int) -> Hook:
    both = [column(other(n), 1, 1), column(other(n), 2, 2)]

    def change(own: Tensor) -> None:
        own[both] = own[both[::-1]]

    return changed("mlp_out", layer, change)


def projected(n: int) -> Hook:
    along = direction() / direction().norm()

    def change(own: Tensor) -> None:
        own[column(other(n), 1, 2)] -= own[column(other(n), 1, 2)] @ along * along

    return changed("resid_post", 1, change)


def clamped(n: int) -> Hook:
    along = direction() / direction().norm()

    def change(own: Tensor) -> None:
        own[column(other(n), 1, 2)] += (4 - own[column(other(n), 1, 2)] @ along) * along

    return changed("resid_post", 1, change)


def scaled_dims(n: int) -> Hook:
    def change(own: Tensor) -> None:
        own[column(other(n), 1, 2), 1:5] *= -4

    return changed("resid_post", 1, change)


def in_basis(n: int) -> Hook:
    vectors = torch.stack([state("resid_post", 0, m, m)[column(m, 1, 1)] for m in ALL])
    axes = torch.linalg.svd((vectors - vectors.mean(0)).double()).Vh[:2].float()
    source = state("resid_post", 0, n, n)[column(n, 1, 2)]

    def change(own: Tensor) -> None:
        here = column(other(n), 1, 2)
        own[here] += (source - own[here]) @ axes.T @ axes

    return changed("resid_post", 0, change)


def added(n: int) -> Hook:
    """Added to the output of attention after its gate, which multiplies the module's output."""

    def change(own: Tensor) -> None:
        own[column(other(n), 1, 2)] += 3 * direction() / gate("gate_attn")

    return changed("attn_out", 2, change)


def in_order(n: int) -> list[list[list[Hook]]]:
    """The changes of the cells of each rule of `RULES`."""
    image = other(n)
    one = [column(image, 1, 2)]
    mean = torch.stack([state("resid_post", 0, m, m)[column(m, 1, 2)] for m in ALL]).mean(0)
    held = state("mlp_out", 1, n, image)[all_columns(image)]
    first = [column(image, row, col) for row in (1, 2) for col in (1, 2)]
    zero = torch.zeros(())
    return [
        [[copied("resid_post", layer, n, 1, 2)] for layer in range(LOCAL + 1)],
        [[silenced(n, head)] for head in range(HEADS)],
        [[copied("mlp_out", 2, n, *at)] for at in ((1, 1), (2, 2))],
        [[scaled("resid_pre", 2, [column(image, 2, 1)], -2)]],
        [[exchanged(n, layer)] for layer in range(LOCAL + 1)],
        [[written("resid_post", 0, one, mean)]],
        [[added(n)]],
        [[projected(n)]],
        [[written("resid_post", 1, one, 2 * direction())]],
        [[copied("resid_post", 0, n, 1, 2), written("mlp_out", 1, all_columns(image), held)]],
        [[written("resid_post", 2, first, zero)]],
        [[copied("attn_out", 1, n, 2, 1)]],
        [[scaled("resid_post", 0, one, -3), at_patch(n)]],
        [[scaled("resid_post", 0, one, -3), at_last(n)]],
        [[clamped(n)]],
        [[scaled_dims(n)]],
        [[in_basis(n)]],
    ]


def at_patch(n: int) -> Hook:
    """The values of a patch in the language model, of the clean run."""
    here = [patch(other(n), 2, 2)]
    return at("v cross", 1, here, None, read(n, n, "v cross", 1))


def at_last(n: int) -> Hook:
    return at("resid_post", 1, [-1], None, read(n, n, "resid_post", 1))


DIRECTION = "direction d = mean(ask) at resid_post vision layer 0 at photo row 1 col 1 token\n"
BASIS = "basis b = pca(ask, dims: 2) at resid_post vision layer 0 at photo row 1 col 1 token\n"
ONE = "photo row 1 col 2 token"
SCALED = f"scale resid_post vision layer 0 at {ONE} by -3"
RULES = (
    f"patch resid_post vision layer * at {ONE}",
    "ablate z vision layer 0 head * at photo tokens with zero",
    "patch mlp_out vision layer 2 at photo row 1 col 1 token, photo row 2 col 2 token",
    "scale resid_pre vision layer 2 at photo row 2 col 1 token by -2",
    "swap mlp_out vision layer * at photo row 1 col 1 token with photo row 2 col 2 token",
    f"ablate resid_post vision layer 0 at {ONE} with mean of clean",
    f"add 3 * d to attn_out vision layer 2 at {ONE}",
    f"project out d from resid_post vision layer 1 at {ONE}",
    f"set resid_post vision layer 1 at {ONE} to 2 * d",
    f"patch resid_post vision layer 0 at {ONE}\n  freeze mlp_out vision layer 1 at photo tokens",
    "ablate resid_post vision layer 2 at photo tile 1 tokens with zero",
    "patch attn_out vision layer 1 at photo row 2 col 1 token",
    f"{SCALED}\n  patch v cross layer 1 heads * at photo row 2 col 2 token",
    f"{SCALED}\n  patch resid_post layer 1 at last token",
    f"clamp d of resid_post vision layer 1 at {ONE} to 4",
    f"scale resid_post vision layer 1 dims 1..4 at {ONE} by -4",
    f"patch resid_post vision layer 0 in basis b at {ONE}",
)


@pytest.mark.parametrize("mode", some(["planned", "small passes", "plain"], ["planned"]))
def test_rules_in_the_encoder_equal_hooks_on_the_bare_model(mode: str) -> None:
    """All rules in one file, in images of different numbers of tiles."""
    text = f"{DIRECTION}{BASIS}" + "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(RULES)
    )
    base = [difference(n, other(n)) for n in ALL]
    every = [in_order(n) for n in ALL]
    for number, (rule, found) in enumerate(zip(RULES, run_text(text, mode), strict=True)):
        cells = zip(*(each[number] for each in every), strict=True)
        values = [[difference(n, other(n), own) for n, own in enumerate(cell)] for cell in cells]
        [measure] = found.measures
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, values, atol=2e-4, err_msg=rule)
        assert (np.abs(np.array(values) - base).max(1) > 0.1).all(), rule


def test_replies_runs_and_norms_equal_hooks_on_the_bare_model() -> None:
    """Also a run with a rule in the encoder, whose vectors another rule reads."""
    written_text = 'measure matches("1|2|3") as raw'
    text = experiment("r", "generate 4", SCALED, measure=written_text)
    text += experiment(
        "d",
        f"run turned {{ {SCALED} }}",
        "from turned into clean",
        "patch v cross layer 3 heads * at photo row 1 col 2 token",
    )
    text += experiment("o", f"observe norm resid_post vision layer * at {ONE}", measure="")
    replies, derived, norms = run_text(text)
    assert replies.replies is not None
    differ, values = 0, list[float]()
    for n in ALL:
        hooks = [scaled("resid_post", 0, [column(n, 1, 2)], -3)]
        [reply], [cell] = replies.replies.runs["clean"][n], replies.replies.cells[0][n]
        assert list(reply.ids) == replied(n, ())
        assert list(cell.ids) == replied(n, hooks)
        differ += reply.ids != cell.ids
        seen: list[Tensor] = []
        path = "model.language_model.layers.3.cross_attn.v_proj"
        outputs(n, n, [*hooks, (path, False, lambda value, seen=seen: seen.append(value) or value)])
        values.append(difference(n, n, [at("v cross", 3, [patch(n, 1, 2)], None, seen[0])]))
    assert differ
    np.testing.assert_allclose(derived.measures[0].patched[0], values, atol=2e-4)
    assert np.abs(np.array(values) - derived.measures[0].base[0]).max() > 0.1
    lengths = [
        [float(state("resid_post", layer, n, n)[column(n, 1, 2)].norm()) for n in ALL]
        for layer in range(LOCAL + 1)
    ]
    np.testing.assert_allclose(norms.measures[0].patched, lengths, rtol=1e-4)


@pytest.mark.parametrize(("line", "least"), [("", 0.85), ("generate 3", 0.87)])
def test_planned_cost_is_near_the_counted_products(line: str, least: float) -> None:
    """Convolutions over pixels aren't counted."""
    rule = f"patch resid_post vision layer * at {ONE}"
    lines = ["from clean into changed", *([line] if line else []), rule]
    measure = 'measure matches("1|2|3") as raw' if line else MEASURE
    text = experiment("e", *lines, measure=measure)
    checked = check_file(text, folder(), loaded(), BLOCK)
    plan = make_plan(checked.experiments)
    execute(plan, {"m": loaded()}, None, check=check_denominators)  # encodes images before
    with OperationCounter() as counter:
        execute(plan, {"m": loaded()}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert least < planned / (counter.get_total_flops() / 2) < 1.05


def test_conventions_describe_the_effect_of_a_changed_image() -> None:
    [found] = run_text(experiment("e", SCALED))
    assert found.conventions["vision encoder"].endswith(
        "; blocks of `cross` read the vectors of the changed image"
    )


ERRORS = {
    "patch resid_post vision layer 0 at what tokens": "E0310",
    "patch resid_post vision layer 0 at photo row 9 col 1 token": "E0310",
    "patch resid_post vision layer 3 at photo tokens": "E0302",
    f"patch pattern vision layer 0 head 0 at {ONE}": "E0108",
}


@pytest.mark.parametrize(("line", "code"), ERRORS.items())
def test_invalid_line_reports_the_code_before_anything_runs(line: str, code: str) -> None:
    _, found = try_text(experiment("e", "from clean into changed", line))
    assert next(each.code for each in found if each.severity == "error") == code


def test_group_inside_and_outside_of_the_encoder_reports_e0108() -> None:
    text = "group g = resid_post vision layer 0, resid_post layer 1\n"
    text += experiment("e", "from clean into changed", f"patch g at {ONE}")
    _, found = try_text(text)
    assert [each.code for each in found if each.severity == "error"] == ["E0108"]


def test_columns_of_other_tokens_report_e0413(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules outside of the encoder keep their results."""
    model, found = adopt_model("m", deepcopy(bare()), processor())
    assert model is not None, found
    right = loaded_models.VisionColumns.of

    def wrong(shape: ModelShape) -> loaded_models.VisionColumns:
        own = right(shape)
        return loaded_models.VisionColumns(own.tokens, own.padded - 1, own.count)

    monkeypatch.setattr(loaded_models.VisionColumns, "of", staticmethod(wrong))
    text = experiment("inside", SCALED) + experiment(
        "e", "ablate mlp_out layer 0 at last token with zero"
    )
    result, found = try_text(text, model=model)
    assert [each.code for each in found if each.severity == "error"] == ["E0413"]
    assert result is not None
    assert [each.name for each in result.experiments] == ["e"]


@pytest.mark.slow
def test_store_depends_on_the_image_and_the_layer_of_the_encoder(tmp_path: Path) -> None:
    for file in folder().iterdir():
        if file.suffix in (".png", ".jsonl"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path, image = tmp_path / "file.mech", tmp_path / "0.png"
    first = image.read_bytes()
    seen: list[float] = []
    for layer, content in (
        (0, first),
        (1, first),
        (1, (tmp_path / "1.png").read_bytes()),
        (0, first),
    ):
        image.write_bytes(content)
        rule = SCALED.replace("layer 0", f"layer {layer}")
        text = f'mech 1\nmodel m = local("x")\n{BLOCK}\n{experiment("e", rule)}'
        path.write_text(text, encoding="utf-8")
        pair = bare(), processor()
        [stored], [plain] = (
            as_in_the_data(mechdsl.run(path, {"m": pair}, store=own)["e"]).measures
            for own in (tmp_path / "store", None)
        )
        np.testing.assert_allclose(stored.patched, plain.patched, atol=1e-5)
        seen.append(float(stored.patched[0, 0]))
    assert seen[0] == seen[3]
    assert len({round(value, 4) for value in seen}) == 3


def test_tiles_and_masked_images_equal_hooks_on_the_bare_model() -> None:
    """Images without a tile are left out of its cell."""
    text = experiment(
        "t", "for t in 1..4 { ablate resid_post vision layer 1 at photo tile t tokens with zero }"
    )
    text += experiment("h", "from hidden into clean", f"patch resid_post vision layer 2 at {ONE}")
    block = BLOCK.replace("{ file = other }", "{ file = other }\n  corrupt hidden { mask photo }")
    tiles, masked = run_text(text, block=block)
    for n, record in enumerate(RECORDS):
        count = GRIDS[n][0] * GRIDS[n][1]
        for tile in range(4):
            value = tiles.measures[0].patched[tile, n]
            if tile >= count:
                assert np.isnan(value)
                continue
            own = [tile * PADDED + 1 + k for k in range(4)]
            zero = written("resid_post", 1, own, torch.zeros(()))
            np.testing.assert_allclose(value, difference(n, n, [zero]), atol=2e-4)
        gray = Image.new("RGB", Image.open(folder() / f"{n}.png").size, (128, 128, 128))
        prompt = f"{IMAGE} how many {record['what']} are there ? answer :"
        given = processor()(text=[prompt], images=[[gray]], return_tensors="pt")
        vector = seen_in(bare(), dict(given), 2)[column(n, 1, 2)]
        value = difference(n, n, [written("resid_post", 2, [column(n, 1, 2)], vector)])
        np.testing.assert_allclose(masked.measures[0].patched[0, n], value, atol=2e-4)


@torch.no_grad()
def seen_in(model: Any, given: dict[str, Any], layer: int) -> Tensor:
    """The output of a block of the encoder of some model, [column, width]."""
    found: list[Tensor] = []
    module = model.get_submodule(place("resid_post", layer)[0])
    handle = module.register_forward_hook(lambda _, __, output: found.append(output[0].clone()))
    try:
        model(**given, use_cache=False)
    finally:
        handle.remove()
    return found[0]


@pytest.mark.slow
def test_patch_from_another_model_equals_hooks() -> None:
    tuned = deepcopy(bare())
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in tuned.model.vision_model.parameters():
            if weight.dim() > 1:
                weight += 0.2 * torch.randn_like(weight)
    other_model, found = adopt_model("tuned", tuned, processor())
    assert other_model is not None, found
    line = f"patch resid_post vision layer 0 at {ONE}"
    text = experiment("e", "from tuned into m", line, measure="measure logit(answer) as delta")
    source = f'mech 1\nmodel m = local("a")\nmodel tuned = local("b")\n{BLOCK}\n{text}'
    results = succeeded(
        *run_on(Source(source, folder() / "f.mech"), {"m": loaded(), "tuned": other_model})
    )
    for n, record in enumerate(RECORDS):
        vector = seen_in(tuned, inputs(n, n), 0)[column(n, 1, 2)]
        hook = written("resid_post", 0, [column(n, 1, 2)], vector)
        logits = outputs(n, n, [hook]).logits[0, -1]
        value = float(logits[token(str(record["n"]))])
        np.testing.assert_allclose(results["e"].measures[0].patched[0, n], value, atol=2e-4)
    assert np.abs(results["e"].measures[0].patched - results["e"].measures[0].base).max() > 0.05
