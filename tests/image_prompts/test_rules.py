"""Rules at image tokens in prompts, against plain hooks on the bare model with its processor: one
unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import adopted, check_file
from . import support
from .models import GRID, LAYERS, MODELS
from .reference import Bare, Edit, at
from .support import RECORDS, SIZES, TEMPLATE, experiment, run_file

NAMES = tuple(MODELS)
ANY = ("planned", "plain", "padded on the right", "small passes")


@cache
def inputs(name: str, number: int, image: int) -> dict[str, Tensor]:
    """The prompt of a record with one of the images."""
    text = TEMPLATE.format(**RECORDS[number])
    file = support.folder_of(name) / f"{image}.png"
    return support.bare(name).inputs(text, [file])


@cache
def states(name: str, number: int, image: int) -> dict[str, list[Tensor]]:
    return support.bare(name).states(inputs(name, number, image))


def difference(name: str, logits: Tensor, number: int) -> float:
    own = RECORDS[number]
    words = support.bare(name).processor.tokenizer.convert_tokens_to_ids
    return float(logits[-1, words(str(own["n"]))] - logits[-1, words(str(own["m"]))])


def clean(name: str) -> list[float]:
    bare = support.bare(name)
    return [difference(name, bare.run(inputs(name, n, n)), n) for n in range(len(RECORDS))]


def patched(name: str, run: Callable[[Bare, dict[str, Tensor], int], Tensor]) -> list[float]:
    """The logit difference in each prompt with its corrupted image, under the edits of `run`."""
    found: list[float] = []
    for n in range(len(RECORDS)):
        given = inputs(name, n, (n + 1) % len(SIZES))
        found.append(difference(name, run(support.bare(name), given, n), n))
    return found


Key = tuple[str | int, ...]
Run = Callable[[Bare, dict[str, Tensor], int], Tensor]
"""The logits of a prompt (a record's number) under a rule."""


def agree(found: ExperimentResult, expected: dict[Key, Sequence[float]], axes: list[str]) -> None:
    """Compare the values of every cell; one effect is above 0.1."""
    measure = found.measures[0]
    cells = {tuple(cell.coords[axis] for axis in axes): n for n, cell in enumerate(found.cells)}
    assert cells.keys() == expected.keys()
    largest = 0.0
    for key, values in expected.items():
        base = measure.base[0]
        largest = max(largest, float(np.abs(np.array(values) - base).max()))
        np.testing.assert_allclose(measure.patched[cells[key]], values, atol=1e-4, err_msg=str(key))
    assert largest > 0.1


def image_tokens(name: str, n: int = 0) -> list[int]:
    return support.bare(name).image_tokens(inputs(name, n, n))


def per_layer(
    name: str, edit: Callable[[str, int, int], Edit], kind: str = "blocks"
) -> dict[Key, list[float]]:
    """By layer, the values under an edit (of a model, record and layer)."""

    def run(layer: int) -> Run:
        return lambda bare, given, n: bare.run(given, **{kind: {layer: edit(name, n, layer)}})

    return {(layer,): patched(name, run(layer)) for layer in range(LAYERS)}


def one_token(name: str) -> dict[Key, list[float]]:
    token = image_tokens(name)[GRID]

    def edit(name: str, n: int, layer: int) -> Edit:
        return at([token], states(name, n, n)["blocks"][layer][token])

    return per_layer(name, edit)


def each_token(name: str) -> dict[Key, list[float]]:
    def run(token: int) -> Run:
        def patch(bare: Bare, given: dict[str, Tensor], n: int) -> Tensor:
            own = states(name, n, n)["blocks"][0][token]
            return bare.run(given, blocks={0: at([token], own)})

        return patch

    return {
        (f"photo row {1 + k // GRID} col {1 + k % GRID}",): patched(name, run(token))
        for k, token in enumerate(image_tokens(name))
    }


def heads(name: str) -> dict[Key, list[float]]:
    tokens = image_tokens(name)

    def run(head: int) -> Run:
        def patch(bare: Bare, given: dict[str, Tensor], n: int) -> Tensor:
            own = states(name, n, n)["heads"][1]
            columns = slice(head * 6, head * 6 + 6)

            def edit(value: Tensor) -> Tensor:
                value[tokens, columns] = own[tokens, columns]
                return value

            return bare.run(given, heads={1: edit})

        return patch

    return {(head,): patched(name, run(head)) for head in range(4)}


def zero_embeddings(name: str) -> dict[Key, list[float]]:
    tokens = image_tokens(name)[: 2 * GRID]

    def ablate(bare: Bare, given: dict[str, Tensor], n: int) -> Tensor:
        return bare.run(given, embed=at(tokens, torch.zeros(())))

    return {(): patched(name, ablate)}


def mean_over_rows(name: str) -> dict[Key, list[float]]:
    tokens = image_tokens(name)

    def edit(name: str, n: int, layer: int) -> Edit:
        every = [states(name, k, k)["blocks"][layer][tokens] for k in range(len(RECORDS))]
        return at(tokens, torch.stack(every).mean(0))

    return per_layer(name, edit)


def last_token(name: str) -> dict[Key, list[float]]:
    def edit(name: str, n: int, layer: int) -> Edit:
        return at([-1], states(name, n, n)["blocks"][layer][-1])

    return per_layer(name, edit)


def blocked(name: str) -> dict[Key, list[float]]:
    tokens = image_tokens(name)[:GRID]

    def run(layer: int) -> Run:
        return lambda bare, given, n: bare.run(given, blocked={layer: tokens})

    return {(layer,): patched(name, run(layer)) for layer in range(LAYERS)}


CASES: dict[str, tuple[str, list[str], Callable[[str], dict[Key, list[float]]]]] = {
    "one token": ("patch resid_post layer * at photo row 2 col 1 token", ["layer"], one_token),
    "each token": ("patch resid_post layer 0 at each token of photo", ["position"], each_token),
    "heads": ("patch z layer 1 head * at photo tokens", ["head"], heads),
    "embed": ("ablate embed at photo row 1..2 col * tokens with zero", [], zero_embeddings),
    "mean": ("ablate resid_post layer * at photo tokens with mean", ["layer"], mean_over_rows),
    "last": ("patch resid_post layer * at last token", ["layer"], last_token),
    "block": (
        "block attention layer * from last token to photo row 1 col * tokens",
        ["layer"],
        blocked,
    ),
}


@pytest.mark.parametrize("mode", ANY)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_rule_at_image_tokens_equals_hooks(name: str, case: str, mode: str) -> None:
    rule, axes, expected = CASES[case]
    found = run_file(experiment("e", "from clean into changed", rule), name, mode)["e"]
    agree(found, expected(name), axes)


@pytest.mark.parametrize("name", NAMES)
def test_image_rules_in_one_file_equal_hooks(name: str) -> None:
    """Experiments share passes and images."""
    text = "".join(
        experiment(f"e{n}", "from clean into changed", rule)
        for n, (rule, _, _) in enumerate(CASES.values())
    )
    found = run_file(text, name)
    for n, (_, axes, expected) in enumerate(CASES.values()):
        agree(found[f"e{n}"], expected(name), axes)


@pytest.mark.parametrize("name", NAMES)
def test_clean_run_with_images_equals_the_bare_model(name: str) -> None:
    found = run_file(experiment("e", "ablate embed at photo tokens with zero"), name)["e"]
    np.testing.assert_allclose(found.measures[0].base[0], clean(name), atol=1e-4)


def test_active_prompts_name_the_tokens_of_images() -> None:
    name = NAMES[0]
    basis = "basis b = pca(ask, dims: 2) at resid_post layer 0 at photo tokens\n"
    text = basis + experiment("e", "observe features of b at photo tokens", measure="")
    found = run_file(text, name)["e"]
    own = inputs(name, found.active[0][0].row, found.active[0][0].row)
    first = support.bare(name).image_tokens(own)[0]
    for prompt in found.active[0]:
        assert len(prompt.tokens) == len(prompt.values)
        assert prompt.tokens[first : first + 2] == (" photo row 1 col 1", " photo row 1 col 2")
        assert prompt.tokens[first + GRID * GRID].strip() == "how"
    shown = found.to_text(200).partition("most active prompts")[2]
    assert "[photo row " in shown
    assert "image" not in shown.partition("conventions")[0]


TEXTS = {
    'template "{file} how many {what} ?"': (
        '"{file}"`, and write `{photo}` instead of `{file}` in the template'
    ),
    'template "how many {what} (a/b.JPG) ?"': '"a/b.JPG"`, and write `{photo}` in the template',
    'image photo = "{file}"\n  template "{photo} and {other} how many ?"': (
        '"{other}"`, and write `{photo}` instead of `{other}` in the template'
    ),
    'image photo = "{file}"\n  template "{photo} how many {what} ?"': "",
    'template "how many {what} of png, .png or a.pngs or a.png.txt ?"': "",
}


@pytest.mark.parametrize("lines", TEXTS)
def test_name_of_an_image_in_the_text_is_one_warning(lines: str) -> None:
    block = f'prompts ask {{\n  rows "data.jsonl"\n  {lines}\n  answer " {{n}}"\n'
    block += "  corrupt changed { n = m }\n}\n"
    text = experiment("e", "ablate embed at last token with zero", measure="measure loss as raw")
    _, found = support.try_file(text, NAMES[0], block=block)
    helps = [each.help_text for each in found if each.code == "W0706"]
    wanted = TEXTS[lines]
    assert helps == ([f"add the line `image photo = {wanted}"] if wanted else [])


def test_name_of_an_image_is_no_warning_for_a_model_of_texts(tmp_path: Path) -> None:
    block = 'prompts p {\n  kind in ["w3", "w5"]\n  template "w7 {kind} a.png"\n  answer " w9"\n}\n'
    text = "experiment e {\n  model m\n  prompts p\n  measure loss as raw\n}\n"
    found = check_file(text, tmp_path, adopted("gpt2"), block).diagnostics
    assert "W0702" in {each.code for each in found}
    assert "W0706" not in {each.code for each in found}
