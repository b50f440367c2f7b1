"""Rules and observations at patches in the vision encoder of LLaVA-OneVision, which interpolates
the patches of frames and of large images to fewer tokens, against plain hooks on the bare encoder:
one unpadded prompt at a time. Rows and columns of patches are computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.base.text import Source
from mechdsl.diagnostics.core import Diagnostic
from mechdsl.execute.run.panel import execute
from mechdsl.images.layouts import IMAGE_LAYOUTS
from mechdsl.loading.loader import adopt_model
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.results.assembly.collection import check_denominators
from mechdsl.results.experiment_result import ExperimentResult, FileResult

from ..execute.support import MODES, check_file, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_video_processors as videos
from .reference import Edit, at, edited_module, one_head, record_value
from .support import experiment, succeeded
from .test_encoder_attention import attended
from .test_families import ALL, BLOCK, WORDS, bare, difference, loaded
from .test_resampled_encoder import write_data

LARGE, FRAMES = "llava_onevision", "llava_onevision_frames"
"""Families with 2 x 2 patches of a tile, and 4 x 4 of a frame."""
HEADS, WIDTH = 2, 16
PLACES = {
    "resid_pre": ("", True),
    "resid_post": ("", False),
    "z": (".self_attn.out_proj", True),
    "mlp_out": (".mlp", False),
}
"""Site → part of a block, and whether the site is its input."""
SIZES = ((24, 24), (24, 14), (14, 24), (8, 16))
"""(height, width) of images of 3 x 3 tiles, two of them with padding, and of 1 x 2 tiles."""
TILES = ((3, 3), (3, 3), (3, 3), (1, 2))
CUT = ((0, 0), (0, 1), (1, 0), (0, 0))
"""Rows and columns of padding on each side of the patches of all tiles."""
SAME = ((24, 14),) * 4
"""Images of one size."""


def edited(name: str, site: str, layer: int, edit: Edit) -> AbstractContextManager[None]:
    """Change a site, [token of the encoder, width], over all tiles or frames."""
    part, is_input = PLACES[site]
    path = f"model.vision_tower.encoder.layers.{layer}{part}"
    module = bare(name).model.get_submodule(path)
    return edited_module(module, lambda value: edit(value.flatten(0, -2)), is_input=is_input)


# --- images ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The patches of an image in the encoder, whose first tile is the thumbnail."""

    tiles: tuple[int, int]
    cut: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns without padding."""
        rows, cols = (2 * count - 2 * own for count, own in zip(self.tiles, self.cut, strict=True))
        return rows, cols

    def at(self, row: int, col: int) -> int:
        """The patch in a row and a column of all tiles, from 1."""
        down, along = row - 1 + self.cut[0], col - 1 + self.cut[1]
        return 4 * (1 + down // 2 * self.tiles[1] + along // 2) + 2 * (down % 2) + along % 2

    def row(self, row: int) -> list[int]:
        return [self.at(row, col) for col in range(1, self.size[1] + 1)]

    def col(self, col: int) -> list[int]:
        return [self.at(row, col) for row in range(1, self.size[0] + 1)]

    @property
    def every(self) -> list[int]:
        rows = range(1, self.size[0] + 1)
        return [*range(4), *(own for row in rows for own in self.row(row))]


RAGGED = tuple(Grid(*each) for each in zip(TILES, CUT, strict=True))
EQUAL = (Grid((3, 3), (0, 1)),) * 4


@cache
def folder(sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    return write_data(Path(mkdtemp(prefix="mechdsl-interpolated-")), sizes)


@cache
def inputs(n: int, image: int, *, equal: bool = False) -> dict[str, Tensor]:
    file = folder(SAME if equal else SIZES) / f"{image}.png"
    picture = Image.open(file).convert("RGB")
    return bare(LARGE).with_pictures(f"w3 w2 <image> w1 {WORDS[n]} w3", [picture])


def try_text(
    text: str, mode: str = "planned", *, equal: bool = False
) -> tuple[FileResult | None, list[Diagnostic]]:
    whole = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}'
    source = Source(whole, folder(SAME if equal else SIZES) / "f.mech")
    return run_on(source, {"m": loaded(LARGE)}, MODES[mode])


def run_text(text: str, mode: str = "planned", *, equal: bool = False) -> list[ExperimentResult]:
    return [*succeeded(*try_text(text, mode, equal=equal)).values()]


def state(site: str, layer: int, given: dict[str, Tensor], name: str = LARGE) -> Tensor:
    own = videos.bare(name) if name == FRAMES else bare(name)
    return record_value(partial(edited, name, site, layer), partial(own.run, given))


def other(n: int) -> int:
    return (n + 1) % len(ALL)


def times(own: Sequence[int], factor: float) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value[list(own)] *= factor
        return value

    return edit


def under(
    site: str, layer: int, edit: Callable[[int], Edit], *, equal: bool = False
) -> list[float]:
    """The difference of each prompt with its other image, under an edit of its number."""
    found: list[float] = []
    for n in ALL:
        with edited(LARGE, site, layer, edit(n)):
            found.append(difference(bare(LARGE).run(inputs(n, other(n), equal=equal))))
    return found


def compare(
    found: ExperimentResult, expected: Sequence[Sequence[float]], base: Sequence[float], rule: str
) -> None:
    """Compare cells, each with an effect of more than 0.1 in some prompt."""
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched, expected, 1e-4, 1e-4, err_msg=rule)
    effects = np.abs(np.array(expected) - base)
    assert (np.nanmax(effects, axis=1) > 0.1).all(), (rule, effects)


AT: dict[str, Callable[[Grid], list[int]]] = {
    "photo row 1 col 2 token": lambda grid: [grid.at(1, 2)],
    "photo row 2 col 4 token": lambda grid: [grid.at(2, 4)],
    "photo row 2 col * tokens": lambda grid: grid.row(2),
    "photo row * col 3 tokens": lambda grid: grid.col(3),
    "photo row 1..2 col 2 tokens": lambda grid: [grid.at(1, 2), grid.at(2, 2)],
    "photo thumbnail tokens": lambda grid: [*range(4)],
    "photo thumbnail row 2 col 1 token": lambda grid: [2],
    "{photo row 1 col 1 token, photo thumbnail row 1 col 2 token}": lambda grid: [grid.at(1, 1), 1],
    "photo tokens": lambda grid: grid.every,
}
"""Position → patches of an image. Rows and columns have no padding."""


@pytest.mark.parametrize("mode", some(["planned", "padded on the right", "plain"], ["planned"]))
def test_scaled_patches_of_large_images_equal_hooks(mode: str) -> None:
    """Three images are interpolated; one has a token for each patch."""
    rules = [f"scale resid_pre vision layer 1 at {position} by -9" for position in AT]
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(rules)
    )
    base = [difference(bare(LARGE).run(inputs(n, other(n)))) for n in ALL]
    for found, (position, tokens) in zip(run_text(text, mode), AT.items(), strict=True):
        values = under("resid_pre", 1, lambda n, tokens=tokens: times(tokens(RAGGED[other(n)]), -9))
        compare(found, [values], base, position)


def swapped(first: Sequence[int], second: Sequence[int]) -> Edit:
    def exchange(value: Tensor) -> Tensor:
        value[[*first, *second]] = value[[*second, *first]]
        return value

    return exchange


def clean(site: str, layer: int, n: int) -> Tensor:
    return state(site, layer, inputs(n, n, equal=True))


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_rules_at_patches_of_images_of_one_size_equal_hooks(mode: str) -> None:
    grid, site = EQUAL[0], "resid_post vision layer 0"
    row, col, (rows, cols) = grid.row(3), grid.col(1), grid.size
    spots = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1)]
    assert (rows, cols) == (6, 4)

    def copied(spots: Sequence[int]) -> list[float]:
        return under(
            "resid_post", 0, lambda n: at(spots, clean("resid_post", 0, n)[spots]), equal=True
        )

    mean = torch.stack([clean("resid_post", 0, n)[row] for n in ALL]).mean(0)
    direction = torch.stack([clean("resid_post", 0, n)[col].mean(0) for n in ALL]).mean(0)

    def added(value: Tensor) -> Tensor:
        value[row] += 3 * direction
        return value

    def zero(head: int) -> Edit:
        return one_head(at(grid.every, torch.zeros(())), head, WIDTH // HEADS)

    def frozen(n: int) -> float:
        given = inputs(n, other(n), equal=True)
        kept = at(col, state("mlp_out", 1, given)[col])
        first = edited(LARGE, "resid_pre", 0, times([*range(4), *col], -5))
        with first, edited(LARGE, "mlp_out", 1, kept):
            return difference(bare(LARGE).run(given))

    cases: dict[str, Callable[[], list[list[float]]]] = {
        f"patch {site} at photo row * col * token": lambda: [
            copied([grid.at(*spot)]) for spot in spots
        ],
        f"patch {site} at photo tokens": lambda: [copied(grid.every)],
        f"patch {site} at photo row 3 col * tokens": lambda: [copied(row)],
        f"patch {site} at photo thumbnail row 1 col 1 token onto photo row 2 col 2 token": lambda: [
            under(
                "resid_post",
                0,
                lambda n: at([grid.at(2, 2)], clean("resid_post", 0, n)[[0]]),
                equal=True,
            )
        ],
        "ablate z vision layer 1 head * at photo tokens with zero": lambda: [
            under("z", 1, lambda n, h=h: zero(h), equal=True) for h in range(HEADS)
        ],
        f"ablate {site} at photo row 3 col * tokens with mean of clean": lambda: [
            under("resid_post", 0, lambda n: at(row, mean), equal=True)
        ],
        f"swap {site} at photo row 3 col * tokens with photo row 6 col * tokens": lambda: [
            under("resid_post", 0, lambda n: swapped(row, grid.row(6)), equal=True)
        ],
        f"add 3 * d to {site} at photo row 3 col * tokens": lambda: [
            under("resid_post", 0, lambda n: added, equal=True)
        ],
        "scale resid_pre vision layer 0 at {photo thumbnail tokens, photo row * col 1 tokens} by -5"
        "\n  freeze mlp_out vision layer 1 at photo row * col 1 tokens": lambda: [
            [frozen(n) for n in ALL]
        ],
    }
    text = f"direction d = mean(ask) at {site} at photo row * col 1 tokens\n"
    text += "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    base = [difference(bare(LARGE).run(inputs(n, other(n), equal=True))) for n in ALL]
    for found, (rule, values) in zip(run_text(text, mode, equal=True), cases.items(), strict=True):
        measure, expected = found.measures[0], values()
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, expected, 1e-4, 1e-4, err_msg=rule)
        assert np.abs(measure.patched - base).max() > 0.1, rule


def test_rules_in_the_encoder_leave_positions_of_the_language_model() -> None:
    """One experiment names patches in the encoder and tokens in the language model."""
    rules = (
        "scale resid_pre vision layer 1 at photo row 4 col 3 token by -9",
        "scale resid_post layer 0 at photo row 4 col 3 token by -3",
    )
    [found] = run_text(experiment("e", "from clean into changed", *rules), equal=True)
    expected: list[float] = []
    for n in ALL:
        # <s> w3 w2, 4 tokens of the thumbnail, then rows of 3 tokens and a row end.
        token = 7 + 3 * 4 + 2
        blocks = {0: times([token], -3)}
        with edited(LARGE, "resid_pre", 1, times([EQUAL[n].at(4, 3)], -9)):
            expected.append(
                difference(bare(LARGE).run(inputs(n, other(n), equal=True), blocks=blocks))
            )
    np.testing.assert_allclose(found.measures[0].patched[0], expected, 1e-4, 1e-4)


def test_conventions_of_images_with_tiles_count_tokens_of_the_thumbnail() -> None:
    [found] = run_text(experiment("e", "scale resid_post layer 0 at photo tokens by 2"))
    assert found.conventions["image `photo`"].endswith(
        "; 2 x 4, 3 x 4, 4 x 3 tokens and 1 more size, and 2 x 2 tokens of the thumbnail, rows and "
        "columns counted from 1 at the top left"
    )


def test_observations_of_patches_of_large_images_equal_the_bare_encoder() -> None:
    site = "resid_post vision layer 0"
    lines = [f"observe norm {site} at {position}" for position in AT]
    lines += [
        f"observe similarity {site} at photo row 1 col 1 token with photo row 2 col 3 token",
        "observe attention vision layer 1 head * from photo row 2 col 3 token to "
        "photo row 2 col * tokens",
    ]
    *norms, similar, seen = run_text(
        "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    )
    module = bare(LARGE).model.get_submodule("model.vision_tower.encoder.layers.1.self_attn")
    largest = 0.0
    for n in ALL:
        grid, vectors = RAGGED[n], state("resid_post", 0, inputs(n, n))
        for found, (position, tokens) in zip(norms, AT.items(), strict=True):
            expected = float(vectors[tokens(grid)].norm(dim=-1).mean())
            own = found.measures[0].patched[0, n]
            np.testing.assert_allclose(own, expected, 1e-5, err_msg=position)
        pair = vectors[[grid.at(1, 1), grid.at(2, 3)]]
        cosine = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
        np.testing.assert_allclose(similar.measures[0].patched[0, n], cosine, atol=1e-5)
        weights: dict[int, Tensor] = {}

        def keep(first: int, own: Tensor, weights: dict[int, Tensor] = weights) -> Tensor:
            weights[first] = own.clone()
            return own

        with attended(module, keep):
            bare(LARGE).run(inputs(n, n))
        query = grid.at(2, 3)
        first = query - query % 4
        keys = [key - first for key in grid.row(2) if first <= key < first + 4]
        expected = weights[first][:, query - first][:, keys].sum(-1)
        np.testing.assert_allclose(seen.measures[0].patched[:, n], expected, atol=1e-5)
        largest = max(largest, float(expected.max()))
    assert largest > 0.1


def test_estimates_at_patches_of_large_images_equal_autograd() -> None:
    """The change of the vectors times their gradient, of one patch and of a row."""
    places: dict[str, list[int]] = {
        "photo row 3 col 2 token": [EQUAL[0].at(3, 2)],
        "photo row 2 col * tokens": EQUAL[0].row(2),
    }
    ends = "from clean into changed", "using gradient_input"
    rule = "patch resid_post vision layer 0 at"
    text = "".join(experiment(f"e{n}", *ends, f"{rule} {p}") for n, p in enumerate(places))
    module = bare(LARGE).model.get_submodule("model.vision_tower.encoder.layers.0")
    for found, tokens in zip(run_text(text, equal=True), places.values(), strict=True):
        expected: list[float] = []
        for n in ALL:
            held: list[Tensor] = []

            def hold(_: Any, __: Any, output: Any, held: list[Tensor] = held) -> Any:
                value = output[0] if isinstance(output, tuple) else output
                held.append(value.detach().requires_grad_())
                return (held[0], *output[1:]) if isinstance(output, tuple) else held[0]

            handle = module.register_forward_hook(hold, prepend=True)
            try:
                logits = bare(LARGE).model(**inputs(n, other(n), equal=True)).logits[0]
            finally:
                handle.remove()
            words = [vlm.WORDS["w1"], vlm.WORDS["w2"]]
            first, second = logits[-1, words]
            [slope] = torch.autograd.grad(first - second, held)
            change = clean("resid_post", 0, n) - held[0].detach().flatten(0, -2)
            expected.append(float((change * slope.flatten(0, -2))[tokens].sum()))
        effects = found.measures[0].patched[0] - found.measures[0].base[0]
        np.testing.assert_allclose(effects, expected, 1e-4, 1e-4)
        assert np.abs(expected).max() > 0.1


# --- frames ---------------------------------------------------------------------------------------


def patch(frame: int, row: int, col: int) -> int:
    """The patch of a frame, from 1, in the encoder, which counts those of all frames."""
    return 16 * (frame - 1) + 4 * (row - 1) + col - 1


def frame_patches(frame: int) -> list[int]:
    return [patch(frame, row, col) for row in range(1, 5) for col in range(1, 5)]


def changed(n: int, site: str, layer: int, edit: Edit, count: int | None = None) -> float:
    """The difference of a prompt with its other frames. count: the number of its frames."""
    with edited(FRAMES, site, layer, edit):
        given = videos.inputs(FRAMES, n, videos.record(n)["b"], count)
        return difference(videos.bare(FRAMES).run(given))


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_rules_at_patches_of_frames_equal_hooks(mode: str) -> None:
    """A frame has 4 x 4 patches and 2 x 2 tokens."""
    site, one = "resid_post vision layer 0", [patch(2, 4, 3)]

    def copied(spots: list[int], n: int) -> float:
        theirs = videos.inputs(FRAMES, n, videos.record(n)["a"])
        vectors = state("resid_post", 0, theirs, FRAMES)
        return changed(n, "resid_post", 0, at(spots, vectors[spots]))

    cases: dict[str, Callable[[int], list[float]]] = {
        f"patch {site} at frame 1 row 4 col 3 token": lambda n: [copied([patch(1, 4, 3)], n)],
        f"patch {site} at each frame tokens": lambda n: [
            copied(frame_patches(k), n) for k in range(1, 5)
        ],
        "scale resid_pre vision layer 1 at frame 2 row 4 col 3 token by -9": lambda n: [
            changed(n, "resid_pre", 1, times(one, -9))
        ],
        "scale resid_pre vision layer 1 at frame 3 row 2 col * tokens by -9": lambda n: [
            changed(n, "resid_pre", 1, times([patch(3, 2, col) for col in range(1, 5)], -9))
        ],
        f"swap {site} at frame 1 row 1 col 1 token with frame 4 row 4 col 2 token": lambda n: [
            changed(n, "resid_post", 0, swapped([patch(1, 1, 1)], [patch(4, 4, 2)]))
        ],
        "ablate z vision layer 0 head 1 at clip tokens with zero": lambda n: [
            changed(n, "z", 0, one_head(at([*range(64)], torch.zeros(())), 1, WIDTH // HEADS))
        ],
    }
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule) for n, rule in enumerate(cases)
    )
    base = [videos.changed(FRAMES, n) for n in videos.ALL]
    results = videos.run(text, FRAMES, mode).values()
    for found, (rule, values) in zip(results, cases.items(), strict=True):
        expected = np.array([values(n) for n in videos.ALL]).T
        measure = found.measures[0]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, expected, 1e-4, 1e-4, err_msg=rule)
        assert np.abs(expected - base).max() > 0.05, rule


def test_replies_and_observations_at_patches_of_frames_equal_hooks() -> None:
    rule = "scale resid_post vision layer 0 at frame 2 row 3 col * tokens by -9"
    own = [patch(2, 3, col) for col in range(1, 5)]
    text = experiment("r", "generate 4", rule, measure='measure matches("w") as raw')
    text += experiment(
        "o", "observe norm resid_post vision layer 0 at each token of frame 3", measure=""
    )
    found, differ = videos.run(text, FRAMES), 0
    replies, norms = found["r"].replies, found["o"].measures[0].patched
    assert replies is not None
    for n in videos.ALL:
        given = videos.inputs(FRAMES, n, videos.record(n)["a"])
        plain = videos.bare(FRAMES).reply(given, 4)
        with edited(FRAMES, "resid_post", 0, times(own, -9)):
            expected = videos.bare(FRAMES).reply(given, 4)
        assert list(replies.cells[0][n][0].ids) == expected
        differ += plain != expected
        vectors = state("resid_post", 0, given, FRAMES)[frame_patches(3)]
        np.testing.assert_allclose(norms[:, n], vectors.norm(dim=-1), 1e-5)
    assert differ


def test_patches_of_videos_of_different_lengths_equal_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks with videos of three and of four frames in one file, with rules, replies and files of
    saved vectors."""
    monkeypatch.chdir(tmp_path)
    file = videos.BLOCK.replace(', "{size}-{a}.png"]', "]")
    assert file != videos.BLOCK
    block = videos.BLOCK + file.replace("prompts ask", "prompts short")
    rule = "scale resid_post vision layer 0 at frame 3 row 3 col * tokens by -9"
    own = [patch(3, 3, col) for col in range(1, 5)]
    saved = 'save resid_post vision layer 1 of clean at frame 3 tokens to "{}/{}.safetensors"'
    text = "".join(
        experiment(f"e{count}", rule, saved.format(tmp_path, count)).replace(
            "prompts ask", f"prompts {name}"
        )
        for name, count in (("ask", 4), ("short", 3))
    )
    found = videos.run(text, FRAMES, block=block)
    for count in (3, 4):
        vectors = load_file(tmp_path / f"{count}.safetensors")
        order = torch.argsort(vectors["row"], stable=True)
        written = vectors["resid_post.vision.layer1"][order].reshape(len(videos.ALL), 16, -1)
        measure, effects = found[f"e{count}"].measures[0], list[float]()
        for n in videos.ALL:
            given = videos.inputs(FRAMES, n, videos.record(n)["a"], count)
            with edited(FRAMES, "resid_post", 0, times(own, -9)):
                value = difference(videos.bare(FRAMES).run(given))
            np.testing.assert_allclose(measure.patched[0, n], value, atol=1e-4)
            base = difference(videos.bare(FRAMES).run(given))
            np.testing.assert_allclose(measure.base[0, n], base, atol=1e-4)
            effects.append(value - base)
            inner = state("resid_post", 1, given, FRAMES)[frame_patches(3)]
            np.testing.assert_allclose(written[n], inner, atol=1e-5)
        assert np.abs(effects).max() > 0.05
        assert vectors["patch"][order][:16].tolist() == frame_patches(3)


# --- errors ---------------------------------------------------------------------------------------

ERRORS = {
    "scale resid_post vision layer 0 at token 5 by 2": ("E0108", "resampled to the tokens"),
    "patch resid_post vision layer 0 at photo tokens": ("E0307", "use images of one width"),
    "scale resid_post vision layer 0 at photo row 7 col 1 token by 2": (
        "E0310",
        "6 rows and 6 columns",
    ),
    "scale resid_post layer 0 at photo row 5 col 1 token by 2": ("E0310", "4 rows and 4 columns"),
    "set resid_post layer 0 at last token to value(resid_post vision layer 0 at photo row 1 "
    "col 1 token)": ("E0108", "read `embed` at a token of the image"),
}


@pytest.mark.parametrize(("line", "expected"), ERRORS.items())
def test_invalid_patches_of_large_images_report_the_code(
    line: str, expected: tuple[str, str]
) -> None:
    found = try_text(experiment("e", "from clean into changed", line))[1]
    problems = [each for each in found if each.severity == "error"]
    assert [each.code for each in problems] == [expected[0]]
    assert expected[1] in str(problems[0]), str(problems[0])


def test_equal_numbers_of_patches_in_other_rows_and_columns_report_e0108() -> None:
    """Images of 24 x 14 and of 14 x 24 pixels have 24 patches in tiles."""
    turned = BLOCK.replace('  rows "data.jsonl"\n', '  rows "data.jsonl"\n  where n in [2]\n')
    rule = "patch resid_post vision layer 0 at photo tokens"
    source = Source(
        f'mech 1\nmodel m = local("handed over")\n{turned}\n'
        + experiment("e", "from clean into changed", rule),
        folder() / "f.mech",
    )
    found = run_on(source, {"m": loaded(LARGE)})[1]
    [problem] = [each for each in found if each.severity == "error"]
    assert problem.code == "E0108"
    assert "different rows and columns" in problem.message


@pytest.mark.parametrize("wrong", ["transposed", "shifted"])
def test_wrong_rows_and_columns_of_patches_report_e0413(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the encoder compares the tokens that each set of patches changes."""
    model, found = adopt_model("m", deepcopy(bare(LARGE).model), bare(LARGE).processor)
    assert model is not None, found
    entry: Any = type(IMAGE_LAYOUTS["llava_onevision"])
    right = entry._grids

    def grids(self: Any, *given: Any) -> list[list[list[int]]]:
        every = right(self, *given)
        if wrong == "transposed":
            return [[*map(list, zip(*rows, strict=True))] for rows in every]
        return [[*rows[1:], rows[0]] for rows in every]

    monkeypatch.setattr(entry, "_grids", grids)
    rule = "scale resid_post vision layer 0 at photo row 1 col 2 token by 2"
    text = f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{experiment("e", rule)}'
    problems = run_on(Source(text, folder(SAME) / "f.mech"), {"m": model})[1]
    assert [each.code for each in problems if each.severity == "error"] == ["E0413"]


def test_conventions_name_interpolated_patches() -> None:
    rule = "scale resid_post vision layer 0 at photo row 1 col 2 token by 2"
    [found] = run_text(experiment("e", rule))
    text = " ".join(found.conventions.values())
    assert "each position is a patch of an image; tokens of frames and of large images" in text


@pytest.mark.slow
def test_planned_cost_of_interpolated_patches_is_near_the_counted_products() -> None:
    text = experiment(
        "e", "from clean into changed", "patch resid_post vision layer * at photo row 1 col 2 token"
    )
    plan = make_plan(check_file(text, folder(SAME), loaded(LARGE), BLOCK).experiments)
    execute(plan, {"m": loaded(LARGE)}, None, check=check_denominators)  # also tests the patches
    with FlopCounterMode(display=False) as counter:
        execute(plan, {"m": loaded(LARGE)}, None, check=check_denominators)
    planned = plan_cost(plan).planned.multiply_adds
    assert 0.5 < planned / (counter.get_total_flops() / 2) < 2
