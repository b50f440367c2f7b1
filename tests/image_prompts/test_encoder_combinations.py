"""Rules in vision encoders together with other parts of the language, against plain hooks on the
bare model: one unpadded prompt at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mechdsl
from mechdsl.base.text import Source
from mechdsl.forward.hooks.model import LoadedModel
from mechdsl.images.layouts import IMAGE_LAYOUTS, ImagePrompt
from mechdsl.images.processing import UnsupportedProcessor
from mechdsl.loading.loader import adopt_model
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import as_in_the_data, run_on
from ..images import prompts_of_images as vlm
from ..quick import some
from . import test_two_models as two_models
from .reference import Edit, at
from .support import experiment
from .test_families import (
    ALL,
    BLOCK,
    TWO,
    WORDS,
    bare,
    blocks,
    both,
    cells,
    difference,
    folder,
    inputs,
    run_text,
)
from .test_token_patches import TOWERS, edited, other, read, shifted, state, turned

SITE = "resid_post"
NAMES = ("llava_next", "gemma3", "internvl", "qwen2_5_vl", "qwen3_vl")
QUICK = ("qwen3_vl",)
"""The family whose encoder also changes later blocks of the language model."""
MODES = some(["planned", "padded on the right", "small passes"], ["planned"])
SCALED = "scale resid_post vision layer 0 at photo row 1 col 2 token by -3"
Change = tuple[str, int, Edit]
"""Site and layer of the encoder, and an edit."""


def value(name: str, given: dict[str, Tensor], *changes: Change, **edits: Any) -> float:
    """The difference of logits under changes in the encoder and edits in the language model."""
    with opened(name, *changes):
        return difference(bare(name).run(given, **edits))


def opened(name: str, *changes: Change) -> ExitStack:
    stack = ExitStack()
    for site, layer, edit in changes:
        stack.enter_context(edited(name, site, layer, edit))
    return stack


def multiplied(patches: Sequence[int], factor: float) -> Edit:
    def edit(values: Tensor) -> Tensor:
        values[list(patches)] *= factor
        return values

    return edit


def scaled(name: str, image: int) -> Change:
    """What `SCALED` does to an image."""
    return SITE, 0, multiplied(TOWERS[name].cell(image, 1, 2), -3)


def on_both(name: str, *lines: str) -> str:
    return experiment(name, *lines).replace("prompts ask", "prompts both")


def compare(
    found: ExperimentResult, expected: Sequence[float], base: Sequence[float], cell: int = 0
) -> None:
    measure = found.measures[0]
    np.testing.assert_allclose(measure.base[0], base, atol=1e-4)
    np.testing.assert_allclose(measure.patched[cell], expected, atol=1e-4)
    assert np.abs(np.subtract(expected, base)).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_on_two_images_of_one_prompt_equal_hooks(name: str, mode: str) -> None:
    own, model = TOWERS[name], bare(name)
    places = "one row 1 col 2 token", "two row 2 col 1 token"
    at_site = "resid_post vision layer 0 at"
    text = on_both(
        "a",
        f"scale {at_site} one tokens by -2",
        "scale resid_post vision layer 1 at two row 1 col 2 token by 3",
    )
    text += on_both("b", f"patch {at_site} {places[0]} onto {places[1]} with clean")
    text += on_both("c", f"swap {at_site} {places[0]} with {places[1]}")
    text += on_both("d", "from changed into clean", f"patch {at_site} {{ {', '.join(places)} }}")
    block = TWO.replace('" w1 w2"', '" w1"').replace('" w2 w2"', '" w2"')
    found = run_text(name, text, mode, block)

    def second(n: int, row: int, col: int) -> list[int]:
        return [shifted(name, n, n) + patch for patch in own.cell(other(n), row, col)]

    def seen(n: int, *, swapped: bool) -> Tensor:
        return read(name, SITE, 0, partial(model.run, both(name, n, swapped=swapped)))

    def scale(n: int) -> list[Change]:
        return [
            (SITE, 0, turned(own.every(n))),
            (SITE, 1, multiplied(second(n, 1, 2), 3)),
        ]

    def copy(n: int) -> list[Change]:
        vectors = seen(n, swapped=False)[own.cell(n, 1, 2)]
        return [(SITE, 0, at(second(n, 2, 1), vectors))]

    def exchange(n: int) -> list[Change]:
        each = own.cell(n, 1, 2) + second(n, 2, 1)
        half = len(each) // 2
        return [(SITE, 0, at(each, seen(n, swapped=False)[each[half:] + each[:half]]))]

    def patch(n: int) -> list[Change]:
        later = [shifted(name, other(n), other(n)) + patch for patch in own.cell(n, 2, 1)]
        vectors = seen(n, swapped=True)[own.cell(other(n), 1, 2) + later]
        return [(SITE, 0, at(own.cell(n, 1, 2) + second(n, 2, 1), vectors))]

    base = [value(name, both(name, n)) for n in ALL]
    for result, changes in zip(found, (scale, copy, exchange, patch), strict=True):
        compare(result, [value(name, both(name, n), *changes(n)) for n in ALL], base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_rules_in_the_encoder_and_the_language_model_equal_hooks(name: str, mode: str) -> None:
    """Together in one experiment, and in two experiments of a file."""
    later = "patch resid_post layer 0 at photo row 2 col 1 token"
    rules = [
        (SCALED, "ablate resid_pre layer 1 at photo row 1 col 2 token with zero"),
        (SCALED, later),
        (later,),
        (SCALED, "patch z layer 1 head 0 at last token"),
    ]
    text = "".join(
        experiment(f"e{n}", "from clean into changed", *lines) for n, lines in enumerate(rules)
    )
    found = run_text(name, text, mode)
    model = bare(name)
    given = [inputs(name, n, other(n)) for n in ALL]
    base = [value(name, each) for each in given]

    def zero(n: int) -> float:
        def before(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            hidden[0, cells(name, n, other(n))[1, 2]] = 0
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, **named(hidden)})

        hook = model.block(1).register_forward_pre_hook(before, with_kwargs=True)
        try:
            return value(name, given[n], scaled(name, other(n)))
        finally:
            hook.remove()

    def named(hidden: Tensor) -> dict[str, Tensor]:
        return {"hidden_states": hidden}

    def patched(n: int) -> dict[int, Edit]:
        vector = blocks(name, n, n)[0][cells(name, n, n)[2, 1]]
        return {0: at([cells(name, n, other(n))[2, 1]], vector)}

    def head(n: int) -> dict[int, Edit]:
        clean = model.states(inputs(name, n, n))["heads"][1][-1]
        width = len(clean) // model.model.config.text_config.num_attention_heads

        def edit(values: Tensor) -> Tensor:
            values[-1, :width] = clean[:width]
            return values

        return {1: edit}

    expected = [
        [zero(n) for n in ALL],
        [value(name, given[n], scaled(name, other(n)), blocks=patched(n)) for n in ALL],
        [value(name, given[n], blocks=patched(n)) for n in ALL],
        [value(name, given[n], scaled(name, other(n)), heads=head(n)) for n in ALL],
    ]
    for result, values in zip(found, expected, strict=True):
        compare(result, values, base)


FEWER = (
    BLOCK.replace("prompts ask", "prompts fewer")
    .replace("  corrupt changed { file = other }\n", "")
    .replace('"{file}"', '"{other}"')
    .replace('rows "data.jsonl"', 'rows "data.jsonl"\n  where n < 4')
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_vectors_of_other_rows_and_prompts_equal_hooks(name: str, mode: str) -> None:
    own = TOWERS[name]
    position = "resid_post vision layer 0 at photo row 1 col 2 token"
    text = f"direction d = mean_difference(fewer, ask) at {position}\n"
    text += experiment("a", f"ablate {position} with mean of fewer")
    text += experiment("b", f"ablate {position} with mean of changed by size")
    text += experiment("c", "add 2 * d to resid_post vision layer 0 at photo row 1 col 1 token")
    text += experiment("r", f"ablate {position} with resample")
    text += experiment("s", f"ablate {position} with resample of fewer")
    block = BLOCK.replace("  template", '  size = if n > 2 then "long" else "short"\n  template')
    *found, resampled, apart = run_text(name, text, mode, block + FEWER)
    clean = [state(name, SITE, 0, n, n)[own.cell(n, 1, 2)] for n in ALL]
    others = [state(name, SITE, 0, n, other(n))[own.cell(other(n), 1, 2)] for n in ALL]
    fewer = torch.stack(others[:3])
    groups = [torch.stack(others[:2]).mean(0), torch.stack(others[2:]).mean(0)]
    direction = fewer.flatten(0, 1).mean(0) - torch.cat(clean).mean(0)

    def added(n: int) -> Edit:
        def edit(values: Tensor) -> Tensor:
            values[own.cell(n, 1, 1)] += 2 * direction
            return values

        return edit

    def written(n: int, vectors: Tensor) -> float:
        return value(name, inputs(name, n, n), (SITE, 0, at(own.cell(n, 1, 2), vectors)))

    base = [value(name, inputs(name, n, n)) for n in ALL]
    compare(found[0], [written(n, fewer.mean(0)) for n in ALL], base)
    compare(found[1], [written(n, groups[n // 2]) for n in ALL], base)
    compare(found[2], [value(name, inputs(name, n, n), (SITE, 0, added(n))) for n in ALL], base)
    for result, donors in ((resampled, clean), (apart, others[:3])):
        [patched] = result.measures[0].patched
        each = np.array([[written(n, vectors) for vectors in donors] for n in ALL])
        near = np.abs(each - patched[:, None])
        assert (near.min(1) < 1e-4).all()
        if donors is clean:
            assert sorted(near.argmin(1)) == [*ALL]
            assert (near.argmin(1) != [*ALL]).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", some(NAMES, QUICK))
def test_runs_with_rules_in_the_encoder_equal_hooks(name: str, mode: str) -> None:
    own, model = TOWERS[name], bare(name)
    first = f"run one {{ {SCALED} }}"
    more = "scale resid_post vision layer 1 at photo row 2 col 1 token by -2"
    text = experiment(
        "a",
        first,
        f"run two {{ from clean into one  {more} }}",
        "from two into clean",
        "patch resid_post layer 1 at last token",
    )
    copied = "patch resid_post vision layer 1 at photo row 1 col 1 token"
    text += experiment("b", first, "from one into changed", copied)
    text += experiment("c", first, "from clean into one", copied.replace("layer 1", "layer 0"))
    text += experiment(
        "d", "generate 3", first, f"{copied} with one", measure='measure matches("w") as raw'
    )
    found = run_text(name, text, mode)
    plain = [inputs(name, n, n) for n in ALL]
    base = [value(name, each) for each in plain]
    stacked: list[float] = []
    crossed: list[float] = []
    for n in ALL:
        twice = scaled(name, n), (SITE, 1, turned(own.cell(n, 2, 1)))
        with opened(name, *twice):
            vector = model.states(plain[n])["blocks"][1][-1]
        stacked.append(value(name, plain[n], blocks={1: at([-1], vector)}))
        with opened(name, scaled(name, n)):
            seen = read(name, SITE, 1, partial(model.run, plain[n]))[own.cell(n, 1, 1)]
        changed = inputs(name, n, other(n))
        crossed.append(value(name, changed, (SITE, 1, at(own.cell(other(n), 1, 1), seen))))
        assert found[3].replies is not None
        with opened(name, (SITE, 1, at(own.cell(n, 1, 1), seen))):
            expected = model.reply(plain[n], 3)
        assert list(found[3].replies.cells[0][n][0].ids) == expected
    compare(found[0], stacked, base)
    compare(found[1], crossed, [value(name, inputs(name, n, other(n))) for n in ALL])
    both_act = [
        value(
            name,
            plain[n],
            scaled(name, n),
            (SITE, 0, at(own.cell(n, 1, 1), state(name, SITE, 0, n, n)[own.cell(n, 1, 1)])),
        )
        for n in ALL
    ]
    np.testing.assert_allclose(found[2].measures[0].patched[0], both_act, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rules_in_prompts_with_inserted_tokens_equal_hooks(name: str) -> None:
    line = 'corrupt longer { insert 2 tokens before photo tokens with " w2" }'
    block = BLOCK.replace("  corrupt changed", f"  {line}\n  corrupt changed")
    rule = "patch resid_post vision layer 0 at photo row 1 col 2 token"
    text = experiment("a", "from clean into longer", SCALED)
    text += experiment("b", "from changed into longer", rule)
    found = run_text(name, text, block=block)
    own, marker = TOWERS[name], vlm.FAMILIES[name].marker

    def longer(n: int) -> dict[str, Tensor]:
        picture = Image.open(folder() / f"{n}.png").convert("RGB")
        return bare(name).with_pictures(f"w3 w2 w2 w2 {marker} w1 {WORDS[n]} w3", [picture])

    base = [value(name, longer(n)) for n in ALL]
    compare(found[0], [value(name, longer(n), scaled(name, n)) for n in ALL], base)
    changes = [
        at(own.cell(n, 1, 2), state(name, SITE, 0, n, other(n))[own.cell(other(n), 1, 2)])
        for n in ALL
    ]
    compare(found[1], [value(name, longer(n), (SITE, 0, changes[n])) for n in ALL], base)


# --- the store ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_changed_image_or_processor_gives_the_values_of_a_run_without_store(
    name: str, tmp_path: Path
) -> None:
    for file in folder().iterdir():
        if file.suffix in (".png", ".jsonl"):
            shutil.copy(file, tmp_path / file.name)
    rule = "patch resid_post vision layer 0 at photo row 1 col 2 token"
    text = experiment("a", "from clean into changed", rule) + experiment("b", SCALED)
    text += experiment(
        "c",
        f"run one {{ {SCALED} }}",
        "from one into clean",
        "patch resid_post layer 1 at last token",
    )
    path, image = tmp_path / "file.mech", tmp_path / "1.png"
    path.write_text(f'mech 1\nmodel m = local("handed over")\n{BLOCK}\n{text}', encoding="utf-8")
    first = Image.open(image).copy()

    def values(store: Path | None, setting: str, given: object) -> np.ndarray:
        processor = deepcopy(bare(name).processor)
        setattr(processor.image_processor, setting, given)
        found = mechdsl.run(path, {"m": (bare(name).model, processor)}, store=store)
        every = [as_in_the_data(found[each]).measures[0] for each in "abc"]
        return np.array([row for m in every for row in (m.base[0], m.patched[0])])

    seen: list[np.ndarray] = []
    mean = [0.1, 0.2, 0.3]
    for picture, *setting in (
        (first, "do_normalize", True),
        (first.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "do_normalize", True),
        (first.resize((first.width + 7, first.height)), "do_normalize", True),
        (first, "image_mean", mean),
        (first, "do_normalize", False),
        (first, "do_normalize", True),
    ):
        picture.save(image)
        seen.append(values(tmp_path / "store", str(setting[0]), setting[1]))
        np.testing.assert_allclose(seen[-1], values(None, str(setting[0]), setting[1]), atol=1e-5)
    np.testing.assert_array_equal(seen[0], seen[-1])
    assert len({round(float(each[0, 0]), 4) for each in seen}) == len(seen) - 1


# --- errors ---------------------------------------------------------------------------------------


def try_text(text: str, model: LoadedModel) -> tuple[list[str], list[str]]:
    """The codes of errors, and the experiments with results."""
    source = Source(f'mech 1\nmodel m = local("handed over")\n{text}', folder() / "f.mech")
    result, found = run_on(source, {"m": model})
    done = [] if result is None else [each.name for each in result.experiments]
    return [each.code for each in found if each.severity == "error"], done


ONE = FEWER.replace("fewer", "one").replace('"{other}"', '"{file}"').replace("n < 4", "n = 3")
"""A prompt with the image of 40 x 17 pixels."""
FIRST = "resid_post vision layer 0 at photo row 1 col 1 token"
SAVED = "resid_post vision layer 0 of clean at photo row 1 col 1 token"
ABLATED = "ablate resid_post layer 0 at photo tokens with zero"
OTHER_PROMPTS: dict[str, Callable[[], str]] = {
    "direction": lambda: f"direction d = mean(ask) at {FIRST}\n{on_one(f'add d to {FIRST}')}",
    "mean": lambda: on_one(f"ablate {FIRST} with mean of ask"),
    "donor": lambda: on_one(f"ablate {FIRST} with resample of ask"),
    "save": lambda: experiment("inside", f'save {SAVED} to "x.safetensors"', ABLATED),
}


def on_one(line: str) -> str:
    return experiment("inside", line).replace("prompts ask", "prompts one")


@pytest.mark.parametrize("case", some(OTHER_PROMPTS, ["mean"]))
def test_unknown_patches_that_no_rule_names_report_e0413(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other experiments keep their results."""
    name = "llava_class"
    entry = type(IMAGE_LAYOUTS[bare(name).model.config.model_type])
    known = entry.patches

    def reject(self: Any, prompt: ImagePrompt, *given: Any) -> list[tuple[int, ...]]:
        if prompt.sizes[0] != (17, 40):
            raise UnsupportedProcessor("it has patches that no test knows")
        return known(self, prompt, *given)

    monkeypatch.setattr(entry, "patches", reject)
    model, found = adopt_model("m", deepcopy(bare(name).model), bare(name).processor)
    assert model is not None, found
    text, more = f"{BLOCK}{ONE}{OTHER_PROMPTS[case]()}", experiment("e", ABLATED)
    assert try_text(f"{text}{more}", model) == (["E0413"], ["e"])
    assert try_text(text, model) == (["E0413"], [])


def test_unknown_patches_of_another_model_report_e0413_for_its_experiments() -> None:
    """The other model's projector reads other patches than mechdsl expects."""
    name = "llava_class"
    own = deepcopy(two_models.tuned(name).model)
    own.model.multi_modal_projector.register_forward_hook(lambda _, __, output: output.flip(1))
    model, problems = adopt_model("tuned", own, two_models.tuned(name).processor)
    assert model is not None, problems
    measured = ("measure logit(answer) - logit(wrong) as delta",)
    inside = "patch resid_post vision layer 0 at photo row 1 col 2 token"
    read_ones = ("model m", "prompts ask", "from tuned into m")
    text = two_models.experiment("a", *read_ones, inside, *measured)
    text += two_models.experiment("b", *read_ones, inside.replace("vision ", ""), *measured)
    text += two_models.experiment("c", "model m", "prompts ask", SCALED, *measured)
    result, found = two_models.try_file(name, text, model)
    [error] = [each for each in found if each.severity == "error"]
    assert error.code == "E0413"
    assert "`tuned`" in error.message
    assert result is not None
    assert [each.name for each in result.experiments] == ["b", "c"]
