"""Several images in a prompt of a model whose blocks attend to images, such as Llama 3.2 Vision,
against plain hooks on the bare model: one unpadded prompt at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.execute.image_vectors import provide_images
from mechdsl.forward.hooks import model as model_inputs
from mechdsl.planner.passes import make_plan
from mechdsl.prompts import runs
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, as_in_the_data, check_file, run_on
from ..quick import some
from . import test_attended_encoder as encoder
from .support import RECORDS, experiment, succeeded
from .test_attended_images import (
    CROSS,
    EACH,
    GRIDS,
    HEADS,
    IMAGE,
    TILES,
    WIDTH,
    Hook,
    at,
    bare,
    block_at,
    folder,
    followed,
    hooked,
    loaded,
    other,
    patch,
    place,
    processor,
    token,
)
from .test_attended_rows import planned_share

ALL = range(len(RECORDS))
WHOLE = TILES * EACH
"""Tokens of an image."""
VALUES = """
  rows "data.jsonl"
  image one = "{file}"
  image two = "{other}"
  answer " {n}"
  wrong " {m}"
  corrupt swapped { swap one, two }
}
"""
TEXTS = {
    "alone": ("{one} how many {what} are there ? answer :", (0,)),
    "pair": ("{one} how many {what} are there ? {two} answer :", (0, 1)),
    "inside": ("what is {one} red {two} and {what} answer :", (0, 1)),
    "close": ("{one}{two} how many {what} ? {one} answer :", (0, 1, 0)),
}
"""By block, its template and the images in it."""
BLOCKS = "".join(
    f'prompts {name} {{\n  template "{text}"{VALUES}' for name, (text, _) in TEXTS.items()
).replace('  image two = "{other}"\n', "", 0)


@cache
def inputs(block: str, n: int, *, swapped: bool = False) -> dict[str, Any]:
    """What the processor returns for one prompt."""
    files = (n, other(n))[:: -1 if swapped else 1]
    opened = [Image.open(folder() / f"{file}.png").convert("RGB") for file in files]
    text, order = TEXTS[block]
    text = text.format(one=IMAGE, two=IMAGE, what=RECORDS[n]["what"])
    images = [[opened[each] for each in order]]
    return dict(processor()(text=[text], images=images, return_tensors="pt"))


@torch.no_grad()
def outputs(given: dict[str, Any], hooks: Iterable[Hook] = (), text: Sequence[int] = ()) -> Tensor:
    """The logits of one prompt, followed by tokens that attend to what its last token does."""
    with hooked(hooks):
        return bare()(**followed(given, text), use_cache=False).logits[0]


def difference(n: int, logits: Tensor) -> float:
    answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
    return float(logits[-1, answer] - logits[-1, wrong])


def run_text(text: str, mode: str = "planned") -> dict[str, ExperimentResult]:
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCKS}\n{text}', folder() / "f.mech")
    return succeeded(*run_on(source, {"m": loaded()}, MODES[mode]))


def of_block(block: str, name: str, *lines: str, **options: Any) -> str:
    return experiment(name, *lines, **options).replace("prompts ask", f"prompts {block}")


def each(block: str, run: Callable[[int], Iterable[Hook]], *, swapped: bool = False) -> list[float]:
    """The difference of each prompt under hooks; run: from its number."""
    return [difference(n, outputs(inputs(block, n, swapped=swapped), run(n))) for n in ALL]


def nothing(n: int) -> list[Hook]:
    return []


@pytest.mark.parametrize("mode", some([*MODES], ["planned", "padded on the right"]))
def test_prompts_of_one_to_three_images_in_one_file_equal_the_bare_model(mode: str) -> None:
    """Prompts of all blocks share passes; texts before images attend to all of them."""
    rule = "ablate resid_post layer 0 at last token with zero"
    text = "".join(of_block(block, f"e_{block}", rule) for block in TEXTS)
    found = run_text(text, mode)
    for block in TEXTS:
        measure = found[f"e_{block}"].measures[0]
        zero = at("resid_post", 0, [-1], None, torch.zeros_like)
        np.testing.assert_allclose(measure.base[0], each(block, nothing), atol=1e-4, err_msg=block)
        expected = each(block, lambda n, zero=zero: [zero])
        np.testing.assert_allclose(measure.patched[0], expected, atol=1e-4, err_msg=block)


# --- rules ----------------------------------------------------------------------------------------


def shown(n: int, image: int, *, swapped: bool) -> int:
    """The number of the file that an image of a prompt of two shows."""
    return other(n) if (image == 1) != swapped else n


def spot(n: int, image: int, row: int, col: int, *, swapped: bool = True) -> int:
    """The token of a patch among those of all images."""
    return image * WHOLE + patch(shown(n, image, swapped=swapped), row, col)


def every(n: int, image: int, *, swapped: bool = True) -> list[int]:
    rows, cols = (2 * count for count in GRIDS[shown(n, image, swapped=swapped)])
    spots = [(row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]
    return [spot(n, image, *each, swapped=swapped) for each in spots]


@cache
def state(block: str, n: int, site: str, layer: int) -> Tensor:
    """The values of a site in a clean run, as the bare model has them."""
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    outputs(inputs(block, n), [(*place(site, layer), keep)])
    return found[0]


def moved(block: str, n: int, site: str, layer: int, tokens: Sequence[int], to: int) -> Hook:
    """Vectors of the clean run at these tokens, written at another one of the swapped run."""
    value = state(block, n, site, layer)
    if site == "k cross":
        value = value.transpose(1, 2).flatten(2)
    own = value.reshape(-1, value.shape[-1])[list(tokens)]
    return at(site, layer, [to], None, lambda _: own)


CASES: dict[str, Callable[[str, int], list[list[Hook]]]] = {
    "patch v cross layer 1 heads * at two row 1 col 2 token": lambda block, n: [
        [moved(block, n, "v cross", 1, [spot(n, 1, 1, 2, swapped=False)], spot(n, 1, 1, 2))]
    ],
    "patch k cross layer 3 heads * at one row 2 col 1 token onto two row 1 col 1 token": (
        lambda block, n: [
            [moved(block, n, "k cross", 3, [spot(n, 0, 2, 1, swapped=False)], spot(n, 1, 1, 1))]
        ]
    ),
    "ablate v cross layer 1 heads * at one tokens with zero": lambda block, n: [
        [at("v cross", 1, every(n, 0), None, torch.zeros_like)]
    ],
    "ablate v cross layer * heads * at two tokens with zero": lambda block, n: [
        [at("v cross", layer, every(n, 1), None, torch.zeros_like)] for layer in CROSS
    ],
    "patch resid_post layer * at last token": lambda block, n: [
        [at("resid_post", layer, [-1], None, state(block, n, "resid_post", layer))]
        for layer in range(4)
    ],
    "ablate z cross layer 3 head * at last token with zero": lambda block, n: [
        [at("z cross", 3, [-1], head, torch.zeros_like)] for head in range(HEADS)
    ],
    "scale attn_out cross layer 1 at what tokens by 3": lambda block, n: [
        [at("attn_out cross", 1, words(block, n), None, lambda value: 3 * value)]
    ],
}


def words(block: str, n: int) -> list[int]:
    """The positions of `{what}`."""
    before = {"pair": 4, "inside": 7}[block]
    return [*range(before, before + len(str(RECORDS[n]["what"]).split()))]


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
@pytest.mark.parametrize("block", ["pair", "inside"])
def test_rules_at_one_of_two_attended_images_equal_hooks(block: str, mode: str) -> None:
    text = "".join(
        of_block(block, f"e{n}", "from clean into swapped", rule) for n, rule in enumerate(CASES)
    )
    base = each(block, nothing, swapped=True)
    for found, (rule, hooks) in zip(run_text(text, mode).values(), CASES.items(), strict=True):
        measure, cells = found.measures[0], len(hooks(block, 0))
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        expected = [
            each(block, lambda n, k=k, hooks=hooks: hooks(block, n)[k], swapped=True)
            for k in range(cells)
        ]
        np.testing.assert_allclose(measure.patched, expected, atol=2e-4, err_msg=rule)
        assert np.abs(measure.patched - base).max() > 0.1, rule


# --- the vision encoder ---------------------------------------------------------------------------


def in_encoder(
    site: str, layer: int, image: int, columns: Sequence[int], change: Callable[[Tensor], Tensor]
) -> Hook:
    """A change of a site's values [image, column, width] of one image."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[image, list(columns)] = change(value[image, list(columns)])
        return value

    return (*encoder.place(site, layer), edit)


def encoded(n: int, site: str, layer: int) -> Tensor:
    found: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    outputs(inputs("pair", n), [(*encoder.place(site, layer), keep)])
    return found[0]


def columns(n: int, image: int) -> list[int]:
    return encoder.all_columns(shown(n, image, swapped=True))


def silenced(n: int, image: int, head: int) -> Hook:
    def change(value: Tensor) -> Tensor:
        value[:, head * encoder.WIDTH : (head + 1) * encoder.WIDTH] = 0
        return value

    return in_encoder("z", 0, image, columns(n, image), change)


def copied(n: int) -> Hook:
    """A vector of the second image of the clean run, written into the first of the swapped run."""
    value = encoded(n, "resid_post", 1)[1, [encoder.column(other(n), 2, 1)]]
    to = [encoder.column(other(n), 1, 1)]
    return in_encoder("resid_post", 1, 0, to, lambda _: value)


IN_VISION: dict[str, Callable[[int], list[list[Hook]]]] = {
    "scale resid_post vision layer * at two row 1 col 2 token by -5": lambda n: [
        [in_encoder("resid_post", layer, 1, [encoder.column(n, 1, 2)], lambda value: -5 * value)]
        for layer in range(3)
    ],
    "patch resid_post vision layer 1 at two row 2 col 1 token onto one row 1 col 1 token": (
        lambda n: [[copied(n)]]
    ),
    "ablate z vision layer 0 head * at one tokens with zero": lambda n: [
        [silenced(n, 0, head)] for head in range(encoder.HEADS)
    ],
    "scale resid_post vision layer 0 at {one row 1 col 1 token, two row 1 col 1 token} by -5": (
        lambda n: [
            [
                in_encoder(
                    *("resid_post", 0, image, [encoder.column(0, 1, 1)]),
                    lambda value: -5 * value,
                )
                for image in range(2)
            ]
        ]
    ),
}


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_rules_in_the_encoder_in_prompts_of_one_to_three_images_equal_hooks(mode: str) -> None:
    """In one file. A rule acts at both occurrences of an image that a prompt has twice."""
    images = {"alone": [0], "pair": [0], "inside": [0], "close": [0, 2]}
    text = "".join(
        of_block(block, f"e_{block}", "scale resid_post vision layer 1 at one tokens by -5")
        for block in images
    )
    found = run_text(text, mode)
    for block, occurrences in images.items():

        def hooks(n: int, occurrences: list[int] = occurrences) -> list[Hook]:
            own = encoder.all_columns(n)
            return [
                in_encoder("resid_post", 1, image, own, lambda value: -5 * value)
                for image in occurrences
            ]

        measure = found[f"e_{block}"].measures[0]
        np.testing.assert_allclose(measure.patched[0], each(block, hooks), atol=2e-4, err_msg=block)
        assert np.abs(measure.patched - measure.base).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rules", "encoder", "several", "replies", "attention"])
def test_shared_tokens_of_prompts_of_several_images_equal_hooks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    {
        "rules": lambda: test_rules_at_one_of_two_attended_images_equal_hooks("inside", "planned"),
        "encoder": lambda: test_rules_in_the_encoder_at_one_of_two_images_equal_hooks("planned"),
        "several": lambda: test_prompts_of_one_to_three_images_in_one_file_equal_the_bare_model(
            "planned"
        ),
        "replies": lambda: test_replies_to_prompts_of_several_images_equal_hooks("planned"),
        "attention": lambda: (
            test_attention_of_the_encoder_within_one_of_two_images_equals_its_weights("planned")
        ),
    }[name]()


@pytest.mark.parametrize("mode", some([*MODES], ["planned"]))
def test_rules_in_the_encoder_at_one_of_two_images_equal_hooks(mode: str) -> None:
    text = "".join(
        of_block("pair", f"e{n}", "from clean into swapped", rule)
        for n, rule in enumerate(IN_VISION)
    )
    base = each("pair", nothing, swapped=True)
    for found, (rule, hooks) in zip(run_text(text, mode).values(), IN_VISION.items(), strict=True):
        measure = found.measures[0]
        expected = [
            each("pair", lambda n, k=k, hooks=hooks: hooks(n)[k], swapped=True)
            for k in range(len(hooks(0)))
        ]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        np.testing.assert_allclose(measure.patched, expected, atol=2e-4, err_msg=rule)
        assert np.abs(measure.patched - base).max() > 0.1, rule


@contextmanager
def attending(layer: int, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Let a block of the encoder attend with changed weights [image, head, query, key]."""
    path = encoder.place("attn_out", layer)[0]
    module: Any = bare().get_submodule(path)
    size = encoder.HEADS, encoder.WIDTH

    def forward(hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        q, k, v = (
            part(hidden_states).unflatten(-1, size).transpose(1, 2)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * encoder.WIDTH**-0.5 + attention_mask
        weights = change(scores.softmax(-1).clone())
        return module.o_proj((weights @ v).transpose(1, 2).flatten(2)), weights

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def without_keys(image: int, queries: Sequence[int], keys: Sequence[int]) -> Any:
    def change(weights: Tensor) -> Tensor:
        rows = weights[image][:, list(queries)]
        rows[..., list(keys)] = 0
        weights[image][:, list(queries)] = rows / rows.sum(-1, keepdim=True)
        return weights

    return change


@pytest.mark.parametrize("mode", some(["planned", "small passes"], ["planned"]))
def test_attention_of_the_encoder_within_one_of_two_images_equals_its_weights(mode: str) -> None:
    """Keys of the other image, which patches don't attend to, change nothing."""
    at_two = "from two tokens to two row 1 col 1 token"
    text = of_block("pair", "own", f"block attention vision layer * heads * {at_two}")
    at_both = "from two tokens to {one tokens, two row 1 col 1 token}"
    text += of_block("pair", "both", f"block attention vision layer 1 heads * {at_both}")
    line = "observe attention vision layer * head * from two row 2 col 2 token to two tokens"
    text += of_block("pair", "seen", line, measure="")
    found = run_text(text, mode)
    patched = found["own"].measures[0].patched
    for n in ALL:
        corner, every_one = [encoder.column(other(n), 1, 1)], encoder.all_columns(other(n))
        for layer in range(3):
            with attending(layer, without_keys(1, every_one, corner)):
                value = difference(n, outputs(inputs("pair", n)))
            np.testing.assert_allclose(patched[layer, n], value, atol=2e-4)
            if layer == 1:
                both = found["both"].measures[0].patched[0, n]
                np.testing.assert_allclose(both, value, atol=2e-4)
            kept: list[Tensor] = []

            def keep(weights: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(weights.clone())
                return weights

            with attending(layer, keep):
                outputs(inputs("pair", n))
            own = kept[0][1, :, encoder.column(other(n), 2, 2), every_one].sum(-1)
            seen = found["seen"].measures[0].patched[2 * layer : 2 * layer + 2, n]
            np.testing.assert_allclose(seen, own, atol=1e-5)
    assert np.abs(patched - found["own"].measures[0].base).max() > 0.1


def test_attention_between_two_images_of_a_prompt_reports_e0332() -> None:
    line = "block attention vision layer 0 heads * from one tokens to two tokens"
    text = of_block("pair", "e", line)
    source = Source(f'mech 1\nmodel m = local("x")\n{BLOCKS}\n{text}', folder() / "f.mech")
    _, found = run_on(source, {"m": loaded()}, MODES["planned"])
    assert [each.code for each in found if each.severity == "error"] == ["E0332"]


# --- observations, replies and estimates ----------------------------------------------------------


def test_observed_and_blocked_attention_to_one_of_two_images_equal_the_bare_model() -> None:
    text = "".join(
        of_block("pair", f"o{image}", line, measure="")
        for image in ("one", "two")
        for line in (
            f"observe attention cross layer 1 head * from what token, last token to {image} tokens",
        )
    )
    block = "block attention cross layer 3 heads * from last token to two row 1 col * tokens"
    text += of_block("pair", "b", block)
    found = run_text(text)
    bare().set_attn_implementation("eager")
    blocked, seen = found["b"].measures[0], 0.0
    try:
        for n in ALL:
            given = inputs("pair", n)
            with torch.no_grad():
                weights = bare()(**given, use_cache=False, output_attentions=True).attentions[1][0]
            for image in range(2):
                keys = every(n, image, swapped=False)
                queries = [words("pair", n)[-1], -1]
                expected = weights[:, queries][..., keys].sum(-1).T.flatten()
                measure = found[f"o{('one', 'two')[image]}"].measures[0]
                cells = found[f"o{('one', 'two')[image]}"].cells
                order = sorted(
                    range(len(cells)),
                    key=lambda k, cells=cells: (
                        str(cells[k].coords["position"]) == "last token",
                        int(cells[k].coords["head"]),
                    ),
                )
                np.testing.assert_allclose(measure.patched[order, n], expected, atol=1e-5)
                seen = max(seen, float(expected.max()))
            rows = [
                spot(n, 1, 1, col, swapped=False) for col in range(1, 2 * GRIDS[other(n)][1] + 1)
            ]

            def hide(module: Any, args: Any, kwargs: Any, rows: list[int] = rows) -> Any:
                mask = kwargs["attention_mask"].clone()
                mask[..., -1, rows] = torch.finfo(torch.float32).min
                return args, {**kwargs, "attention_mask": mask}

            attention = bare().get_submodule(f"{block_at(3)}.cross_attn")
            handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
            try:
                value = difference(n, outputs(given))
            finally:
                handle.remove()
            np.testing.assert_allclose(blocked.patched[0, n], value, atol=2e-4)
    finally:
        bare().set_attn_implementation("sdpa")
    assert seen > 0.1
    assert np.abs(blocked.patched - blocked.base).max() > 0.1


REPLIED = {
    "ablate v cross layer 1 heads * at two tokens with zero": lambda n: [
        at("v cross", 1, every(n, 1, swapped=False), None, torch.zeros_like)
    ],
    "scale resid_post vision layer 1 at two row 1 col 2 token by -5": lambda n: [
        in_encoder("resid_post", 1, 1, [encoder.column(other(n), 1, 2)], lambda value: -5 * value)
    ],
}


def replied(block: str, n: int, hooks: Iterable[Hook] = ()) -> list[int]:
    """The most likely tokens before the end of the text."""
    found: list[int] = []
    for _ in range(4):
        best = int(outputs(inputs(block, n), hooks, found)[-1].argmax())
        if best == token("</s>"):
            break
        found.append(best)
    return found


@pytest.mark.parametrize("mode", some(["planned", "padded on the right"], ["planned"]))
def test_replies_to_prompts_of_several_images_equal_hooks(mode: str) -> None:
    """In one file with replies to prompts of one and three images."""
    measure = 'measure matches("1|2|3") as raw'
    plain = "ablate resid_post layer 0 at last token with zero"
    text = "".join(
        of_block("pair", f"e{n}", "generate 4", rule, measure=measure)
        for n, rule in enumerate(REPLIED)
    ) + "".join(
        of_block(block, f"e_{block}", "generate 4", plain, measure=measure) for block in TEXTS
    )
    found = run_text(text, mode)
    changed = 0
    for n in ALL:
        for number, hooks in enumerate(REPLIED.values()):
            replies = found[f"e{number}"].replies
            assert replies is not None
            [cell], expected = replies.cells[0][n], replied("pair", n, hooks(n))
            assert list(cell.ids) == expected
            changed += expected != replied("pair", n)
        for block in TEXTS:
            replies = found[f"e_{block}"].replies
            assert replies is not None
            [reply] = replies.runs["clean"][n]
            assert list(reply.ids) == replied(block, n)
    assert changed


def test_observations_at_one_of_two_attended_images_equal_the_bare_model() -> None:
    lines = (
        "observe norm resid_post vision layer 0 at two row 1 col 2 token",
        "observe norm v cross layer 1 head 0 at two row 1 col 1 token",
        "observe similarity resid_post vision layer 1 at one row 1 col 1 token with "
        "two row 1 col 2 token",
    )
    text = "".join(of_block("pair", f"e{n}", line, measure="") for n, line in enumerate(lines))
    found = [own.measures[0].patched[0] for own in run_text(text).values()]
    for n in ALL:
        inner = [encoded(n, "resid_post", layer) for layer in (0, 1)]
        value = state("pair", n, "v cross", 1)
        value = value.reshape(-1, value.shape[-1])[spot(n, 1, 1, 1, swapped=False)]
        pair = inner[1][0, encoder.column(n, 1, 1)], inner[1][1, encoder.column(other(n), 1, 2)]
        expected = (
            inner[0][1, encoder.column(other(n), 1, 2)].norm(),
            value[:WIDTH].norm(),
            torch.nn.functional.cosine_similarity(*pair, dim=0),
        )
        for own, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(own[n], float(wanted), 1e-4, 1e-5)


def slope(n: int, place: tuple[str, bool]) -> Tensor:
    """The gradient of the measure by a module's value, for a clean prompt."""
    leaves: list[Tensor] = []

    def add(value: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(value).requires_grad_())
        return value + leaves[0]

    with torch.enable_grad(), hooked([(*place, add)]):
        logits = bare()(**inputs("pair", n), use_cache=False).logits[0, -1]
        answer, wrong = (token(str(RECORDS[n][key])) for key in ("n", "m"))
        (found,) = torch.autograd.grad(logits[answer] - logits[wrong], leaves)
    return found


def test_gradients_at_each_patch_of_one_of_two_images_equal_autograd() -> None:
    measure = "measure logit(answer) - logit(wrong) as raw"
    sites = {
        "v cross layer 1 heads * at two row 1 col * token": place("v cross", 1),
        "resid_post vision layer 1 at two row 1 col * token": encoder.place("resid_post", 1),
    }
    text = "".join(
        of_block("pair", f"e{n}", f"ablate {site} with zero using gradient", measure=measure)
        for n, site in enumerate(sites)
    )
    for number, (found, module) in enumerate(
        zip(run_text(text).values(), sites.values(), strict=True)
    ):
        for n in ALL:
            gradient = slope(n, module)
            for k in range(2):
                if number:
                    own = gradient[1, encoder.column(other(n), 1, k + 1)]
                else:
                    flat = gradient.reshape(-1, gradient.shape[-1])
                    own = flat[spot(n, 1, 1, k + 1, swapped=False)]
                value = found.measures[0].patched[k, n]
                np.testing.assert_allclose(value, float(own.norm()), 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("lines", "factor"),
    [
        (("ablate z cross layer * head * at last token with zero",), 1.3),
        (("generate 3", "ablate z cross layer * head * at last token with zero"), 1.3),
        (("scale z vision layer * head * at two row 1 col 1 token by 2",), 2),
    ],
)
def test_planned_cost_of_two_images_is_near_the_counted_products(
    lines: Sequence[str], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the encoder of images, which runs once for each image, and here before."""
    monkeypatch.setattr(model_inputs, "ATTENDED_MAPS", WeakKeyDictionary())
    measure = {"measure": 'measure matches("1") as raw'} if len(lines) > 1 else {}
    text = of_block("pair", "e", *lines, **measure)
    checked = check_file(text, folder(), loaded(), BLOCKS)
    plan = make_plan(checked.experiments)
    provide_images(loaded(), checked.experiments[0].table.runs["clean"].rows)
    assert 1 / factor < planned_share(plan) < factor


def test_keys_and_values_of_each_image_of_a_prompt_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompts show four images, each of them twice."""
    monkeypatch.setattr(model_inputs, "ATTENDED_MAPS", WeakKeyDictionary())
    counts = Counter[int]()
    values = bare().get_submodule(f"{block_at(1)}.cross_attn.v_proj")
    linear = torch.nn.functional.linear

    def look(given: Any, weight: Any, bias: Any = None) -> Any:
        if weight is values.weight:
            counts[given.shape[:-1].numel()] += 1
        return linear(given, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", look)
    text = of_block("pair", "e", "ablate z cross layer 3 head * at last token with zero")
    run_text(text)
    assert counts == {WHOLE: 4}


MATCHES = 'measure matches("1") as raw'
MIXED = f"""
prompts mixed {{
  template in [
    "{TEXTS["alone"][0]}",
    "{TEXTS["inside"][0]}",
    "{TEXTS["close"][0]}",
  ]{VALUES}"""


@pytest.mark.parametrize("mode", some([*MODES], ["planned", "padded on the right"]))
def test_prompts_of_one_to_three_images_in_one_block_equal_hooks(mode: str) -> None:
    """Their batches have rows with missing images, which no token attends to."""

    def zero(n: int, block: str) -> list[Hook]:
        return [at("resid_post", 0, [-1], None, torch.zeros_like)]

    def scaled(n: int, block: str) -> list[Hook]:
        own = encoder.all_columns(n)
        images = [number for number, image in enumerate(TEXTS[block][1]) if image == 0]
        return [in_encoder("resid_post", 1, k, own, lambda value: -5 * value) for k in images]

    rules = {
        "ablate resid_post layer 0 at last token with zero": zero,
        "scale resid_post vision layer 1 at one tokens by -5": scaled,
    }
    text = "".join(of_block("mixed", f"e{n}", rule) for n, rule in enumerate(rules))
    text += of_block("mixed", "r", "generate 3", next(iter(rules)), measure=MATCHES)
    whole = f'mech 1\nmodel m = local("x")\n{MIXED}\n{text}'
    source = Source(whole, folder() / "f.mech")
    found = succeeded(*run_on(source, {"m": loaded()}, MODES[mode]))
    rows = [(n, block) for block in ("alone", "inside", "close") for n in ALL]
    for number, hooks in enumerate(rules.values()):
        measure = found[f"e{number}"].measures[0]
        base = [difference(n, outputs(inputs(block, n))) for n, block in rows]
        np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
        expected = [difference(n, outputs(inputs(block, n), hooks(n, block))) for n, block in rows]
        np.testing.assert_allclose(measure.patched[0], expected, atol=2e-4)
        assert np.abs(measure.patched - measure.base).max() > 0.1
    assert found["r"].replies is not None
    replies = found["r"].replies.runs["clean"]
    for number, (n, block) in enumerate(rows):
        [reply] = replies[number]
        assert list(reply.ids) == replied(block, n)[:3]


@pytest.mark.slow
def test_store_depends_on_each_image_of_a_prompt(tmp_path: Path) -> None:
    """Only the file of the second image of a prompt changes, and then the rule's layer."""
    for file in folder().iterdir():
        if file.suffix in (".png", ".jsonl"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path, image = tmp_path / "file.mech", tmp_path / "1.png"
    first, seen = image.read_bytes(), list[float]()
    changes = ((0, first), (1, first), (1, (tmp_path / "3.png").read_bytes()), (0, first))
    for layer, content in changes:
        image.write_bytes(content)
        rule = f"scale resid_post vision layer {layer} at two row 1 col 2 token by -5"
        text = f'mech 1\nmodel m = local("x")\n{BLOCKS}\n{of_block("pair", "e", rule)}'
        path.write_text(text, encoding="utf-8")
        stored, plain = (
            as_in_the_data(mechdsl.run(path, {"m": (bare(), processor())}, store=own)["e"])
            for own in (tmp_path / "store", None)
        )
        own = stored.measures[0].patched
        np.testing.assert_allclose(own, plain.measures[0].patched, atol=1e-5)
        seen.append(float(own[0, 0]))
    assert seen[0] == seen[3]
    assert len({round(value, 4) for value in seen}) == 3


def test_means_and_directions_at_one_of_two_images_equal_hooks() -> None:
    position = "two row 1 col 1 token"
    rules = (
        f"ablate v cross layer 1 heads * at {position} with mean of clean",
        f"add 3 * d to resid_post vision layer 1 at {position}",
    )
    text = f"direction d = mean(pair) at resid_post vision layer 1 at {position}\n"
    text += "".join(of_block("pair", f"e{n}", rule) for n, rule in enumerate(rules))
    found = [own.measures[0].patched[0] for own in run_text(text).values()]

    def value(n: int) -> Tensor:
        own = state("pair", n, "v cross", 1)
        return own.reshape(-1, own.shape[-1])[[spot(n, 1, 1, 1, swapped=False)]]

    mean = torch.stack([value(n) for n in ALL]).mean(0)
    direction = torch.stack(
        [encoded(n, "resid_post", 1)[1, encoder.column(other(n), 1, 1)] for n in ALL]
    ).mean(0)

    def hooks(n: int) -> list[Hook]:
        return [at("v cross", 1, [spot(n, 1, 1, 1, swapped=False)], None, lambda _: mean)]

    def added(n: int) -> list[Hook]:
        columns = [encoder.column(other(n), 1, 1)]
        return [in_encoder("resid_post", 1, 1, columns, lambda own: own + 3 * direction)]

    np.testing.assert_allclose(found[0], each("pair", hooks), atol=2e-4)
    np.testing.assert_allclose(found[1], each("pair", added), atol=2e-4)


def test_patches_of_the_second_image_equal_those_of_the_image_alone() -> None:
    """Images of a prompt don't change each other in the encoder."""
    line = "observe norm resid_post vision layer 2 at {} row 1 col 1 token"
    text = of_block("pair", "two", line.format("two"), measure="")
    text += of_block("alone", "one", line.format("one"), measure="")
    found = run_text(text)
    second, alone = (found[name].measures[0].patched[0] for name in ("two", "one"))
    np.testing.assert_allclose(second, [alone[other(n)] for n in ALL], rtol=1e-5)


def test_saved_vectors_at_one_of_two_images_equal_the_bare_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sites = {"vision": "resid_post vision layer 1", "cross": "v cross layer 1"}
    lines = [
        f'save {site} of clean at two row 1 col * tokens to "{tmp_path}/{name}.safetensors"'
        for name, site in sites.items()
    ]
    run_text(
        of_block("pair", "e", "ablate z cross layer 3 heads * at last token with zero", *lines)
    )
    for name in sites:
        saved = load_file(tmp_path / f"{name}.safetensors")
        [key] = (each for each in saved if "layer1" in each)
        order = torch.argsort(saved["row"], stable=True)
        found, rows = saved[key][order], saved["row"][order]
        tokens = saved["token"][order]
        for n in ALL:
            cols = range(1, 2 * GRIDS[other(n)][1] + 1)
            spots = [spot(n, 1, 1, col, swapped=False) for col in cols]
            if name == "vision":
                own = [encoder.column(other(n), 1, col) for col in cols]
                expected = encoded(n, "resid_post", 1)[1, own]
            else:
                value = state("pair", n, "v cross", 1)
                expected = value.reshape(-1, value.shape[-1])[spots]
            np.testing.assert_allclose(found[rows == n].flatten(1), expected, atol=1e-5)
            assert tokens[rows == n].tolist() == spots


@pytest.mark.parametrize("block", some([*TEXTS], ["close"]))
def test_loss_of_text_between_images_equals_the_bare_model(block: str) -> None:
    """Tokens of images and the beginning-of-sequence token aren't counted."""
    rule = "ablate v cross layer 1 heads * at one tokens with zero"
    [found] = run_text(of_block(block, "e", rule, measure="measure loss as raw")).values()
    patched = found.measures[0].patched[0]
    for n in ALL:
        given, images = inputs(block, n), TEXTS[block][1]
        shown = [number for number, image in enumerate(images) if image == 0]
        cells = [patch(n, row, col) for row, col in spots_of(n)]
        tokens = [number * WHOLE + own for number in shown for own in cells]
        logs = outputs(given, [at("v cross", 1, tokens, None, torch.zeros_like)]).log_softmax(-1)
        ids = given["input_ids"][0].tolist()
        skipped = {processor().image_token_id, token("<s>")}
        losses = [-float(logs[k - 1, ids[k]]) for k in range(1, len(ids)) if ids[k] not in skipped]
        np.testing.assert_allclose(patched[n], np.mean(losses), atol=2e-4)
    assert np.abs(patched - found.measures[0].base[0]).max() > 0.01


def spots_of(image: int) -> list[tuple[int, int]]:
    """Rows and columns of an image's patches."""
    rows, cols = (2 * count for count in GRIDS[image])
    return [(row, col) for row in range(1, rows + 1) for col in range(1, cols + 1)]
