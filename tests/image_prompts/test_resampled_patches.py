"""Rules and observations at single patches, rows, columns and tiles in the vision encoder of
Idefics2, whose resampler reads all patches of a tile for each token, against plain hooks on the
bare encoder. The processor's own pixel masks give the rows and columns of each tile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.checks.file_check import CheckSettings
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.loading.loader import adopt_model

from ..execute.support import MODES, run_on
from ..quick import some
from .reference import Bare, Edit, at, edited_module, one_head
from .support import experiment, succeeded
from .test_encoder_attention import Change, attended, between, blocked, fixed, multiplied
from .test_families import ALL, BLOCK, TWO, difference
from .test_resampled_encoder import (
    HEADS,
    PATCH,
    SIZES,
    WIDTH,
    bare,
    edited,
    folder,
    inputs,
    loaded,
    other,
    run_text,
    source,
    state,
    times,
)

SIZES["uneven"] = [(23, 22), (22, 27), (48, 64), (30, 19)]
SIZES["equal and uneven"] = [(23, 22)] * 4
"""Images whose upper and lower tiles have different numbers of rows."""
Spot = tuple[int, int, int]
"""Index of the tile in the encoder, row and column in it, from 0."""


def spots(given: dict[str, Tensor]) -> dict[Spot, int]:
    """The tokens of the encoder that aren't padding, over all tiles."""
    [mask] = given["pixel_attention_mask"]
    whole = mask.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).float().mean((-1, -2)) == 1
    places = cast("list[list[int]]", whole.nonzero().tolist())
    _, rows, cols = whole.shape
    return {(tile, row, col): (tile * rows + row) * cols + col for tile, row, col in places}


def rows_of(given: dict[str, Tensor], tile: int) -> int:
    return 1 + max(row for own, row, _ in spots(given) if own == tile)


def cols_of(given: dict[str, Tensor], tile: int) -> int:
    return 1 + max(col for own, _, col in spots(given) if own == tile)


def in_grid(given: dict[str, Tensor], row: int, col: int, *, image: int = 0) -> int:
    """The token in a row and a column over the four tiles of an image, from 1."""
    first = 5 * image
    above, before = rows_of(given, first), cols_of(given, first)
    lower, right = row > above, col > before
    tile = first + 2 * lower + right
    return spots(given)[tile, row - 1 - above * lower, col - 1 - before * right]


def in_tile(given: dict[str, Tensor], tile: int) -> list[int]:
    return [token for (own, _, _), token in spots(given).items() if own == tile]


def whole_row(given: dict[str, Tensor], row: int) -> list[int]:
    count = cols_of(given, 0) + cols_of(given, 1)
    return [in_grid(given, row, col) for col in range(1, count + 1)]


def whole_col(given: dict[str, Tensor], col: int) -> list[int]:
    count = rows_of(given, 0) + rows_of(given, 2)
    return [in_grid(given, row, col) for row in range(1, count + 1)]


Tokens = Callable[[dict[str, Tensor]], list[int]]
AT: dict[str, Tokens] = {
    "photo row 1 col 2 token": lambda given: [in_grid(given, 1, 2)],
    "photo row 3 col 1 token": lambda given: [in_grid(given, 3, 1)],
    "photo row 4 col 3 token": lambda given: [in_grid(given, 4, 3)],
    "photo row 3 col * tokens": lambda given: whole_row(given, 3),
    "photo row * col 4 tokens": lambda given: whole_col(given, 4),
    "photo row 2..3 col 2 tokens": lambda given: [in_grid(given, row, 2) for row in (2, 3)],
    "photo tile 3 row 2 col 1 token": lambda given: [spots(given)[2, 1, 0]],
    "photo tile 4 tokens": lambda given: in_tile(given, 3),
    "photo tile 2..3 tokens": lambda given: in_tile(given, 1) + in_tile(given, 2),
    "photo thumbnail tokens": lambda given: in_tile(given, 4),
    "photo thumbnail row 2 col 2 token": lambda given: [spots(given)[4, 1, 1]],
    "{photo row 1 col 1 token, photo tile 4 row 1 col 2 token}": lambda given: [
        in_grid(given, 1, 1),
        spots(given)[3, 0, 1],
    ],
    "photo tokens": lambda given: list(spots(given).values()),
}
"""Position → the tokens of the encoder in the inputs of a prompt."""


def edit_of(sizes: str, site: str, layer: int, edit: Callable[[int], Edit]) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    found: list[float] = []
    for n in ALL:
        with edited(site, layer, edit(n)):
            found.append(difference(bare(splits=True).run(inputs(sizes, n, other(n)))))
    return found


def base_of(sizes: str) -> list[float]:
    return [difference(bare(splits=True).run(inputs(sizes, n, other(n)))) for n in ALL]


@pytest.mark.parametrize("mode", some(["planned", "padded on the right", "plain"], ["planned"]))
@pytest.mark.parametrize("sizes", ["uneven", "equal and uneven"])
def test_scaled_patches_equal_hooks(sizes: str, mode: str) -> None:
    rules = [f"scale resid_pre vision layer 1 at {position} by -20" for position in AT]
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(rules)
    )
    base = np.array(base_of(sizes))
    for found, (position, tokens) in zip(run_text(text, sizes, mode), AT.items(), strict=True):
        values = edit_of(
            sizes,
            "resid_pre",
            1,
            lambda n, tokens=tokens: times(tokens(inputs(sizes, n, other(n))), -20),
        )
        own = found.measures[0].patched[0]
        np.testing.assert_allclose(own, values, 1e-4, 1e-4, err_msg=position)
        assert np.abs(own - base).max() > 0.02, position


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_patches_copied_one_by_one_equal_hooks(mode: str) -> None:
    """Each cell of the sweep copies one patch of another image with the same grid."""
    sizes = "equal and uneven"
    rule = "patch resid_post vision layer 0 at photo row * col * token"
    [found] = run_text(experiment("e", "from clean into changed", rule), sizes, mode)
    given = inputs(sizes, 0, 0)
    rows, cols = len(whole_col(given, 1)), len(whole_row(given, 1))
    assert (rows, cols) == (5, 4)
    by_label = {cell.coords["position"]: n for n, cell in enumerate(found.cells)}
    assert len(by_label) == rows * cols
    clean = [state("resid_post", 0, inputs(sizes, n, n)) for n in ALL]
    for row in range(1, rows + 1):
        for col in range(1, cols + 1):
            token = in_grid(given, row, col)
            values = edit_of(
                sizes, "resid_post", 0, lambda n, token=token: at([token], clean[n][token])
            )
            own = found.measures[0].patched[by_label[f"photo row {row} col {col}"]]
            np.testing.assert_allclose(own, values, 1e-4, 1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.05


def swapped(given: dict[str, Tensor]) -> Edit:
    first, second = whole_row(given, 1), whole_row(given, 4)

    def exchange(value: Tensor) -> Tensor:
        value[first + second] = value[second + first]
        return value

    return exchange


def frozen(sizes: str) -> list[float]:
    found: list[float] = []
    for n in ALL:
        given = inputs(sizes, n, other(n))
        row, tile = whole_row(given, 2), in_tile(given, 4)
        keep = at(row, state("mlp_out", 1, given)[row])
        with edited("resid_pre", 0, times(tile + row, -5)), edited("mlp_out", 1, keep):
            found.append(difference(bare(splits=True).run(given)))
    return found


def written(sizes: str, n: int) -> Edit:
    """The first patch of the thumbnail of the clean image, in another tile."""
    clean = inputs(sizes, n, n)
    vector = state("resid_post", 0, clean)[spots(clean)[4, 0, 0]]
    return at([in_grid(inputs(sizes, n, other(n)), 1, 1)], vector)


def mean_patch(sizes: str) -> Edit:
    every = [inputs(sizes, n, n) for n in ALL]
    rows = [state("resid_post", 0, given)[whole_row(given, 2)] for given in every]
    return at(whole_row(every[0], 2), torch.stack(rows).mean(0))


def zero_head(sizes: str, n: int) -> Edit:
    col = whole_col(inputs(sizes, n, other(n)), 1)
    return one_head(at(col, torch.zeros(())), 1, WIDTH // HEADS)


EVERY: dict[str, Callable[[str], list[float]]] = {
    "ablate z vision layer 0 head 1 at photo row * col 1 tokens with zero": lambda sizes: edit_of(
        sizes, "z", 0, partial(zero_head, sizes)
    ),
    "swap resid_post vision layer 0 at photo row 1 col * tokens with photo row 4 col * tokens": (
        lambda sizes: edit_of(sizes, "resid_post", 0, lambda n: swapped(inputs(sizes, n, other(n))))
    ),
    "scale resid_pre vision layer 0 at {photo thumbnail tokens, photo row 2 col * tokens} by -5\n"
    "  freeze mlp_out vision layer 1 at photo row 2 col * tokens": frozen,
    "patch resid_post vision layer 0 at photo thumbnail row 1 col 1 token onto "
    "photo row 1 col 1 token": (
        lambda sizes: edit_of(sizes, "resid_post", 0, partial(written, sizes))
    ),
    "set resid_post vision layer 0 at photo row 1 col 1 token to "
    "value(resid_post vision layer 0 at photo thumbnail row 1 col 1 token) of clean": (
        lambda sizes: edit_of(sizes, "resid_post", 0, partial(written, sizes))
    ),
}
MEAN = "ablate resid_post vision layer 0 at photo row 2 col * tokens with mean of clean"


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("sizes", some(["uneven", "equal and uneven"], ["equal and uneven"]))
def test_rules_at_some_patches_equal_hooks(sizes: str, mode: str) -> None:
    cases = dict(EVERY)
    if sizes != "uneven":
        cases[MEAN] = lambda sizes: edit_of(sizes, "resid_post", 0, lambda n: mean_patch(sizes))
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    base = np.array(base_of(sizes))
    for found, (rule, values) in zip(run_text(text, sizes, mode), cases.items(), strict=True):
        own, expected = found.measures[0].patched[0], values(sizes)
        np.testing.assert_allclose(own, expected, 1e-4, 1e-4, err_msg=rule)
        assert np.abs(own - base).max() > 0.02, rule


def test_region_of_an_image_is_the_patches_over_it() -> None:
    """A box of the right half of the image; the middle lies on the border of tiles."""
    block = BLOCK.replace(
        "  words =",
        "  right = [32, 0, 64, 24]\n  region part of photo = right\n  words =",
    ).replace("corrupt changed { file = other }", "")
    assert "region" in block
    rule = "scale resid_pre vision layer 1 at part tokens by -20"
    SIZES["large"] = [(48, 64)] * 4
    [found] = run_text(experiment("e", rule), "large", block=block)
    for n in ALL:
        given = inputs("large", n, n)
        upper_right = in_tile(given, 1)
        thumbnail = [
            token
            for (tile, row, col), token in spots(given).items()
            if tile == 4 and row < (rows_of(given, 4) + 1) // 2 and col >= cols_of(given, 4) // 2
        ]
        with edited("resid_pre", 1, times(upper_right + thumbnail, -20)):
            expected = difference(bare(splits=True).run(given))
        np.testing.assert_allclose(found.measures[0].patched[0, n], expected, 1e-4, 1e-4)


def test_patches_without_tiles_equal_hooks() -> None:
    """In float64: the attention of patches times -20 amplifies rounding errors of float32."""
    rules = [
        "scale resid_pre vision layer 1 at photo row 2 col 2 token by -20",
        "scale resid_pre vision layer 1 at photo row 1 col * tokens by -20",
    ]
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    plain = bare(splits=False)
    model = Bare(deepcopy(plain.model).double(), plain.processor)
    adopted, problems = adopt_model("m", model.model, model.processor)
    assert adopted is not None, problems
    results = succeeded(*run_on(source(text, "mixed"), {"m": adopted})).values()
    block = model.model.get_submodule("model.vision_model.encoder.layers.1")
    for n in ALL:
        given = inputs("mixed", n, n, splits=False)
        own = spots(given)
        precise = {
            name: each.double() if each.is_floating_point() else each
            for name, each in given.items()
        }
        wanted = [own[0, 1, 1]], [token for (_, row, _), token in own.items() if row == 0]
        for found, tokens in zip(results, wanted, strict=True):
            scale = times(tokens, -20)
            with edited_module(block, lambda x, f=scale: f(x.flatten(0, -2)), is_input=True):
                expected = difference(model.run(precise))
            np.testing.assert_allclose(found.measures[0].patched[0, n], expected, atol=1e-6)


def test_patches_of_one_of_two_images_equal_hooks_also_in_replies() -> None:
    block = TWO.replace("corrupt changed { swap one, two }\n", "")
    block = block.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    rules = [
        f"scale resid_post vision layer 0 at {p} row 2 col * tokens by -20" for p in ("one", "two")
    ]
    text = "".join(experiment(f"e{n}", rule) for n, rule in enumerate(rules))
    text += experiment("r", "generate 4", rules[1], measure='measure matches("w") as raw')
    *results, replies = run_text(text.replace("prompts ask", "prompts both"), "uneven", block=block)
    assert replies.replies is not None
    for n in ALL:
        given, model = inputs("uneven", n, n, other(n)), bare(splits=True)
        reply: list[int] = []
        for image, found in enumerate(results):
            cols = cols_of(given, 5 * image) + cols_of(given, 5 * image + 1)
            own = [in_grid(given, 2, col + 1, image=image) for col in range(cols)]
            with edited("resid_post", 0, times(own, -20)):
                expected = difference(model.run(given))
                reply = model.reply(given, 4)
            np.testing.assert_allclose(found.measures[0].patched[0, n], expected, 1e-4, 1e-4)
        assert list(replies.replies.cells[0][n][0].ids) == reply
    assert all(np.abs(r.measures[0].patched - r.measures[0].base).max() > 0.02 for r in results)


def test_patches_in_a_derived_run_equal_hooks() -> None:
    lines = (
        "run turned { scale resid_pre vision layer 1 at photo row 3 col * tokens by -20 }",
        "from turned into clean",
    )
    text = experiment("e", *lines, "patch resid_post layer 1 at last token")
    [found] = run_text(text, "uneven")
    for n in ALL:
        given, model = inputs("uneven", n, n), bare(splits=True)
        with edited("resid_pre", 1, times(whole_row(given, 3), -20)):
            vector = model.states(given)["blocks"][1][-1]
        value = difference(model.run(given, blocks={1: at([-1], vector)}))
        np.testing.assert_allclose(found.measures[0].patched[0, n], value, 1e-4, 1e-4)


FUNCTION = """
def mixed(vectors):
    \"\"\"Each patch minus a multiple of the mean over all rows and patches.\"\"\"
    return -3 * vectors - 10 * vectors.nanmean(dim=(0, 1), keepdim=True)
"""


def test_function_of_patches_gets_those_of_all_rows() -> None:
    """Images have different numbers of patches; those that one lacks aren't numbers."""
    (folder("uneven") / "functions.py").write_text(FUNCTION, encoding="utf-8")
    at_tile = "resid_post vision layer 0 at photo tile 4 tokens"
    text = experiment("e", f'set {at_tile} to python("functions.py:mixed")')
    options = replace(MODES["planned"], settings=CheckSettings(python="run"))
    ran = run_on(source(text, "uneven"), {"m": loaded(splits=True)}, options)
    [found] = succeeded(*ran).values()
    every = [inputs("uneven", n, n) for n in ALL]
    tiles = [in_tile(given, 3) for given in every]
    assert len({*map(len, tiles)}) > 1
    states = [state("resid_post", 0, given) for given in every]
    mean = torch.cat([own[tile] for own, tile in zip(states, tiles, strict=True)]).mean(0)
    for n in ALL:
        with edited("resid_post", 0, at(tiles[n], -3 * states[n][tiles[n]] - 10 * mean)):
            expected = difference(bare(splits=True).run(every[n]))
        np.testing.assert_allclose(found.measures[0].patched[0, n], expected, 1e-4, 1e-4)
    assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.05


# --- observations ---------------------------------------------------------------------------------


def norms(given: dict[str, Tensor], site: str, layer: int, tokens: Iterable[int]) -> float:
    return float(state(site, layer, given)[list(tokens)].norm(dim=-1).mean())


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_observed_norms_of_patches_equal_those_of_the_bare_encoder(mode: str) -> None:
    lines = [f"observe norm resid_post vision layer 0 at {position}" for position in AT]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    swept = "observe norm resid_post vision layer 1 of changed at photo tile 3 row 1 col * token"
    text += experiment("swept", swept, measure="")
    *results, sweep = run_text(text, "uneven", mode)
    for n in ALL:
        given = inputs("uneven", n, n)
        for found, (position, tokens) in zip(results, AT.items(), strict=True):
            expected = norms(given, "resid_post", 0, tokens(given))
            own = found.measures[0].patched[0, n]
            np.testing.assert_allclose(own, expected, 1e-5, err_msg=position)
        changed = inputs("uneven", n, other(n))
        for col, own in enumerate(sweep.measures[0].patched[:, n]):
            if col < cols_of(changed, 2):
                expected = norms(changed, "resid_post", 1, [spots(changed)[2, 0, col]])
                np.testing.assert_allclose(own, expected, 1e-5)
            else:
                assert np.isnan(own)


def vectors(given: dict[str, Tensor], layer: int, tokens: Iterable[int]) -> Tensor:
    return state("resid_post", layer, given)[list(tokens)]


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_similarity_of_patches_equals_cosines_of_the_bare_encoder(mode: str) -> None:
    site = "observe similarity resid_post vision layer"
    lines = [
        f"{site} * at photo row 1 col 1 token with photo thumbnail row 2 col 1 token",
        f"{site} 1 of clean with changed at photo row 3 col 2 token",
        f"{site} 0 at photo tile 3 tokens",
    ]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    pairs, runs, inside = (each.measures[0].patched for each in run_text(text, "uneven", mode))
    for n in ALL:
        given, changed = inputs("uneven", n, n), inputs("uneven", n, other(n))
        for layer in (0, 1):
            ends = [in_grid(given, 1, 1), spots(given)[4, 1, 0]]
            expected = cosine(*vectors(given, layer, ends))
            np.testing.assert_allclose(pairs[layer, n], expected, atol=1e-5)
        [own] = vectors(given, 1, [in_grid(given, 3, 2)])
        [there] = vectors(changed, 1, [in_grid(changed, 3, 2)])
        np.testing.assert_allclose(runs[0, n], cosine(own, there), atol=1e-5)
        tile = vectors(given, 0, in_tile(given, 2))
        every = [cosine(a, b) for k, a in enumerate(tile) for b in tile[k + 1 :]]
        np.testing.assert_allclose(inside[0, n], np.mean(every), atol=1e-5)


def module_of(layer: int) -> Any:
    path = f"model.vision_model.encoder.layers.{layer}.self_attn"
    return bare(splits=True).model.get_submodule(path)


def pattern(given: dict[str, Tensor], layer: int) -> dict[int, Tensor]:
    """By the first token of a tile, its weights [head, query, key]."""
    found: dict[int, Tensor] = {}

    def keep(first: int, weights: Tensor) -> Tensor:
        found[first] = weights.clone()
        return weights

    with attended(module_of(layer), keep):
        bare(splits=True).run(given)
    return found


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_attention_between_patches_of_padded_tiles_equals_the_bare_encoder(mode: str) -> None:
    lines = [
        "observe attention vision layer * head * from photo row 2 col 1 token to "
        "photo row 1 col 1 token",
        "observe attention vision layer 1 from photo tokens to photo thumbnail tokens",
    ]
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    one, every = run_text(text, "uneven", mode)
    largest = 0.0
    for n in ALL:
        given = inputs("uneven", n, n)
        for number, cell in enumerate(one.cells):
            layer, head = int(cell.coords["layer"]), int(cell.coords["head"])
            weights = pattern(given, layer)[0]
            expected = float(weights[head, in_grid(given, 2, 1), in_grid(given, 1, 1)])
            np.testing.assert_allclose(one.measures[0].patched[number, n], expected, atol=1e-5)
            largest = max(largest, expected)
        # Only patches of the thumbnail see it: the others have a weight of 0 there.
        count, small = len(spots(given)), in_tile(given, 4)
        weights = pattern(given, 1)
        own = [token - max(weights) for token in small]
        total = float(weights[max(weights)][:, own][:, :, own].sum(2).mean())
        expected = total * len(small) / count
        np.testing.assert_allclose(every.measures[0].patched[0, n], expected, atol=1e-5)
    assert largest > 0.1


def attending(n: int, layer: int, queries: Tokens, keys: Tokens, change: Change) -> float:
    given = inputs("uneven", n, other(n))
    with attended(module_of(layer), between(queries(given), keys(given), change)):
        return difference(bare(splits=True).run(given))


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_rules_on_attention_between_patches_equal_changed_weights(mode: str) -> None:
    every, row, small = AT["photo tokens"], AT["photo row 3 col * tokens"], partial(in_tile, tile=4)
    cases: dict[str, Callable[[int], float]] = {
        "block attention vision layer 1 from photo tokens to photo row 3 col * tokens": (
            lambda n: attending(n, 1, every, row, blocked)
        ),
        "reweight attention vision layer 0 from photo thumbnail tokens to "
        "photo thumbnail row 2 col 2 token by 50": (
            lambda n: attending(
                n, 0, small, AT["photo thumbnail row 2 col 2 token"], multiplied(50)
            )
        ),
        "set attention vision layer 1 from photo row 3 col 1 token to photo row 3 col 1 token "
        "to 0.9": lambda n: attending(
            n, 1, AT["photo row 3 col 1 token"], AT["photo row 3 col 1 token"], fixed(0.9)
        ),
    }
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    base = np.array(base_of("uneven"))
    for found, (rule, values) in zip(run_text(text, "uneven", mode), cases.items(), strict=True):
        own = found.measures[0].patched[0]
        np.testing.assert_allclose(own, [values(n) for n in ALL], 1e-4, 1e-4, err_msg=rule)
        assert np.abs(own - base).max() > 0.02, rule


def test_directions_of_patches_are_means_over_rows() -> None:
    """The vector of a row is the mean over its patches."""
    text = ""
    for name, where in (("a", "photo row 1 col 2 token"), ("b", "photo tile 4 tokens")):
        text += f"direction {name} = mean(ask) at resid_post vision layer 0 at {where}\n"
        text += experiment(f"e{name}", f"add 30 * {name} to resid_post vision layer 0 at {where}")
    results = run_text(text, "uneven")
    for found, where in zip(
        results, ("photo row 1 col 2 token", "photo tile 4 tokens"), strict=True
    ):
        every = [inputs("uneven", n, n) for n in ALL]
        rows = [vectors(given, 0, AT[where](given)).mean(0) for given in every]
        added = 30 * torch.stack(rows).mean(0)
        for n in ALL:
            own = AT[where](every[n])

            def edit(value: Tensor, own: list[int] = own, added: Tensor = added) -> Tensor:
                value[own] += added
                return value

            with edited("resid_post", 0, edit):
                expected = difference(bare(splits=True).run(every[n]))
            np.testing.assert_allclose(found.measures[0].patched[0, n], expected, 1e-4, 1e-4)
        assert np.abs(found.measures[0].patched - found.measures[0].base).max() > 0.05


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "scale resid_post vision layer 0 at photo row 9 col 1 token by 2": ("E0310", "in 4 of 4 rows"),
    "scale resid_post vision layer 0 at photo tile 5 row 1 col 1 token by 2": (
        "E0310",
        "4 tiles, and a thumbnail",
    ),
    "scale resid_post vision layer 0 at token 5 by 2": ("E0108", "`token 5`, which counts tokens"),
    "scale resid_post vision layer 0 at photo row 1 col 1 token + 1 by 2": ("E0108", "+ 1`"),
    "scale resid_post vision layer 0 at last token by 2": ("E0310", "tokens of an image"),
    "patch resid_post vision layer 0 at photo tokens": ("E0307", "numbers of patches"),
    "patch resid_post vision layer 0 at photo row 1 col 1 token onto photo row 1 col * tokens": (
        "E0307",
        "1 patch in the source run, ",
    ),
    "scale resid_post layer 0 at photo row 1 col 1 token by 2": ("E0310", "vision encoder"),
}


@pytest.mark.parametrize(("line", "expected"), ERRORS.items())
def test_patches_that_no_image_has_are_reported(line: str, expected: tuple[str, str]) -> None:
    text = experiment("e", "from clean into changed", line)
    found: list[Diagnostic] = run_on(source(text, "uneven"), {"m": loaded(splits=True)})[1]
    problems = [each for each in found if each.severity == "error"]
    code, words = expected
    assert {each.code for each in problems} == {code}
    said = [f"{each.message} {each.label_text} {each}" for each in problems]
    assert all(words in each for each in said), said


def test_columns_over_tiles_of_different_heights_report_e0310() -> None:
    """Tiles of 24 x 32 and 24 x 33 pixels have three and two rows of patches."""
    SIZES["holes"] = [(48, 65)] * 4
    line = "scale resid_post vision layer 0 at photo row 3 col * tokens by 2"
    found = run_on(source(experiment("e", line), "holes"), {"m": loaded(splits=True)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0310"
    assert "name a tile, as in `photo tile 1 row 1 col 1 token`" in str(problem)
    line = "scale resid_post vision layer 0 at photo tile 1 row 3 col * tokens by -20"
    [result] = run_text(experiment("e", line), "holes")
    for n in ALL:
        given = inputs("holes", n, n)
        row = [token for (tile, own, _), token in spots(given).items() if (tile, own) == (0, 2)]
        assert (rows_of(given, 0), rows_of(given, 1), len(row)) == (3, 2, 4)
        with edited("resid_post", 0, times(row, -20)):
            expected = difference(bare(splits=True).run(given))
        np.testing.assert_allclose(result.measures[0].patched[0, n], expected, 1e-4, 1e-4)


def test_whole_images_with_other_rows_and_columns_report_e0108() -> None:
    """Without tiles, both images have eight patches: in four rows and in two."""
    SIZES["turned"] = [(16, 8), (8, 16), (16, 8), (8, 16)]
    rule = "patch resid_post vision layer 0 at photo tokens"
    text = experiment("e", "from clean into changed", rule)
    found = run_on(source(text, "turned"), {"m": loaded(splits=False)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0108"
    assert "between images with different rows and columns" in problem.message
