"""Similarity of vectors in vision encoders of prompts with images, against plain hooks on the bare
model's encoder. Each token of an image has the mean of its patches."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..quick import some
from .support import experiment
from .test_encoder_attention import try_line
from .test_families import ALL, run_text
from .test_token_patches import LAYERS, TOWERS, other, state

NAMES = ("llava_next", "gemma3", "qwen2_5_vl", "internvl", "smolvlm", "idefics2_wide")


def mean_of(name: str, site: str, layer: int, n: int, image: int, at: tuple[int, int]) -> Tensor:
    """The mean over the patches of a token, in the clean run of a prompt."""
    return state(name, site, layer, n, image)[TOWERS[name].cell(image, *at)].mean(0)


def cosine(first: Tensor, second: Tensor) -> float:
    return float(cosine_similarity(first.double(), second.double(), dim=0))


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
@pytest.mark.parametrize("name", some(NAMES, ("qwen2_5_vl", "idefics2_wide")))
def test_similarity_of_patches_equals_cosines_of_the_bare_encoder(name: str, mode: str) -> None:
    """Of two tokens, of two sites, of two runs, and of all pairs of three tokens."""
    first, second = "photo row 1 col 1 token", "photo row 1 col 2 token"
    lines = (
        f"observe similarity resid_post vision layer * at {first} with {second}",
        f"observe similarity resid_pre vision layer * with resid_post vision layer 1 at {first}",
        f"observe similarity resid_post vision layer * of clean with changed at {second}",
        "observe similarity resid_post vision layer * at "
        f"{{{first}, {second}, photo row 2 col 1 token}}",
    )
    text = "".join(experiment(f"e{n}", line, measure="") for n, line in enumerate(lines))
    pairs, sites, runs, inside = (each.measures[0].patched for each in run_text(name, text, mode))
    a, b, c = (1, 1), (1, 2), (2, 1)
    for layer in range(LAYERS):
        post = {
            (n, cell): mean_of(name, "resid_post", layer, n, n, cell)
            for n in ALL
            for cell in (a, b, c)
        }
        expected = [cosine(post[n, a], post[n, b]) for n in ALL]
        np.testing.assert_allclose(pairs[layer], expected, atol=1e-5)
        expected = [
            cosine(
                mean_of(name, "resid_pre", layer, n, n, a), mean_of(name, "resid_post", 1, n, n, a)
            )
            for n in ALL
        ]
        np.testing.assert_allclose(sites[layer], expected, atol=1e-5)
        changed = [mean_of(name, "resid_post", layer, n, other(n), b) for n in ALL]
        expected = [cosine(post[n, b], changed[n]) for n in ALL]
        np.testing.assert_allclose(runs[layer], expected, atol=1e-5)
        every = [
            [cosine(post[n, one], post[n, two]) for one, two in ((a, b), (a, c), (b, c))]
            for n in ALL
        ]
        np.testing.assert_allclose(inside[layer], np.mean(every, axis=1), atol=1e-5)


def test_similarity_with_a_run_that_changes_patches_stops_before_later_image_vectors() -> None:
    """Qwen3-VL adds vectors of images after its first blocks, which these passes don't reach."""
    at = "photo row 1 col 2 token"
    lines = (
        f"run cut {{ scale resid_post vision layer 0 at {at} by 3 }}",
        f"observe similarity resid_post vision layer * of clean with cut at {at}",
        f"observe similarity embed of clean with cut at {at}",
    )
    text = "".join(experiment(f"e{n}", lines[0], lines[n], measure="") for n in (1, 2))
    patches, embedded = (each.measures[0].patched for each in run_text("qwen3_vl", text))
    np.testing.assert_allclose(patches[0], 1, atol=1e-5)  # scaled, which no cosine shows
    assert (patches[1] < 1 - 1e-4).all()
    assert (embedded < 1 - 1e-4).all()


LINES = {
    "observe similarity resid_post vision layer 0 with resid_post layer 0 at photo row 1 col 1 "
    "token": ("llava_next", "E0108"),
    "observe similarity resid_post vision layer 0 at photo row 1 col 1 token with last token": (
        "llava_next",
        "E0310",
    ),
}


@pytest.mark.parametrize(("line", "case"), LINES.items())
def test_invalid_line_reports_the_code_before_anything_runs(
    line: str, case: tuple[str, str]
) -> None:
    name, code = case
    assert [each.code for each in try_line(name, line)] == [code]
