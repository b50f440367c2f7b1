"""`using gradient_attention`: weights of attention times the metric's gradient by them, in a file,
against attentions of the bare model and plain autograd, in 64 bits, one unpadded prompt, image or
pair at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import MODES, ROWS, Prompt, experiment, ids_of, prompt, run_file, token
from ..execute.test_stored_values import check_case
from ..images import duals, support, texts
from ..images.support import ANSWERS, FRONT, GRID, LABELS, WRONG
from ..quick import some
from .models import bare, double

Product = NDArray[np.float64]
"""[layer, head, query, key]: the positive part of attention × gradient."""
FAMILIES = ("gpt2", "llama", "gpt_neox", "gemma2", "gpt_oss")
"""Also with heads that share keys, caps on scores, windows and sinks."""
LONG = "w7 w9 w2"
USING = "using gradient_attention"


def product(number: Tensor, attentions: Sequence[Tensor]) -> Product:
    """The product of one prompt, whose attention is [1, head, query, key] in each layer."""
    gradients = torch.autograd.grad(number, attentions)
    found = [(a * g).clamp(min=0)[0] for a, g in zip(attentions, gradients, strict=True)]
    return torch.stack(found).detach().numpy()


def eager(module: Any) -> Any:
    """A copy that returns its attention and supports autograd."""
    made = copy.deepcopy(module)
    made.set_attn_implementation("eager")
    made.requires_grad_(False)  # tensors cached by a library have no gradient
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("emb" in name or "wte" in name)
    return made


def edges(
    own: Product,
    layers: Sequence[int],
    heads: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
) -> float:
    """The value of a cell: summed over layers and keys, averaged over heads and queries."""
    return sum(float(own[n][np.ix_(heads, queries, keys)].sum(-1).mean()) for n in layers)


def agrees(
    result: ExperimentResult, measure: int, expected: Callable[..., Sequence[float]]
) -> float:
    """expected: from a cell's coordinates; NaN for rows without the cell. Returns the maximum."""
    largest = 0.0
    for cell, own in zip(result.cells, result.measures[measure].patched, strict=True):
        wanted = np.array(expected(**cell.coords))
        there = np.isfinite(wanted)
        assert (np.isfinite(own) == there).all()
        allowed = np.minimum(1e-4, np.maximum(1e-3 * wanted[there], 2e-6))
        assert (np.abs(own - wanted)[there] <= allowed).all(), (cell.coords, own, wanted)
        largest = max(largest, float(wanted[there].max()))
    return largest


# --- texts ----------------------------------------------------------------------------------------


@cache
def attending(family: str) -> Any:
    return eager(double(family))


@cache
def of_text(family: str, row: int, measure: str) -> Product:
    own, record = prompt(ROWS[row]), ROWS[row]
    behind = ids_of(LONG.split())[1:] if LONG in measure else []
    ids = torch.tensor([[*own.ids, *behind[:-1]]])
    seen = attending(family)(input_ids=ids, output_attentions=True)
    logits = seen.logits[0, own.last :]
    number = logits[0, token(record["a"])] - logits[0, token(record["b"])]
    if behind:
        number = logits.log_softmax(-1)[range(len(behind)), behind].sum()
    return product(number, seen.attentions)


Cell = Callable[..., tuple[Sequence[int], Sequence[int] | None, Sequence[int], Sequence[int]]]
"""From a prompt and coordinates: layers, heads (None: all), queries, keys."""


def _item(own: Prompt, position: str) -> tuple[int, ...]:
    """The token of `item 2`; empty for prompts with fewer items."""
    item = int(position.split()[1])
    return own.items[item - 1 : item]


CELLS: dict[str, tuple[str, Cell]] = {
    "edges": (
        "block attention layer * head * from last token to subject tokens",
        lambda own, layer, head: ([layer], [head], [own.last], own.subject),
    ),
    "keys": (
        "block attention layers 0..2 heads * from last token to each item token",
        lambda own, position: ([0, 1, 2], None, [own.last], _item(own, position)),
    ),
    "queries": (
        "block attention layer * heads * from subject tokens to item tokens",
        lambda own, layer: ([layer], None, own.subject, own.items),
    ),
    # If this rule ran, the query would have no key left.
    "all": (
        "block attention layers 1..2 heads 0..1 from last token to tokens *",
        lambda own: ([1, 2], [0, 1], [own.last], range(own.last + 1)),
    ),
}
MEASURES = ("measure logit(answer) - logit(wrong) as raw", f'measure logprob(" {LONG}") as raw')


@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:3]))
def test_gradient_attention_of_texts_equals_autograd(
    family: str, mode: str, tmp_path: Path
) -> None:
    text = "".join(
        experiment(name, "prompts p", line, USING, *MEASURES) for name, (line, _) in CELLS.items()
    )
    found = run_file(text, tmp_path, bare(family), MODES[mode])
    for number, measure in enumerate(MEASURES):
        for name, (_, cell) in CELLS.items():

            def expected(cell: Cell = cell, measure: str = measure, **at: Any) -> list[float]:
                values: list[float] = []
                for row, record in enumerate(ROWS):
                    every = of_text(family, row, measure)
                    layers, heads, queries, keys = cell(prompt(record), **at)
                    heads = range(every.shape[1]) if heads is None else heads
                    there = edges(every, layers, heads, queries, keys) if keys else np.nan
                    values.append(there)
                return values

            assert agrees(found[name], number, expected) > 1e-2, name


def test_gradient_attention_of_queries_after_the_measured_token_is_zero(tmp_path: Path) -> None:
    """A rule there would not change the row; the estimate is 0, not the value of the base run."""
    line = "block attention layer * heads * from subject tokens to item tokens"
    found = run_file(experiment("e", "prompts p", line, USING, MEASURES[0]), tmp_path, bare("gpt2"))
    values = found["e"].measures[0].patched
    assert (values[-1] == 0).all()
    assert (values[:-1] > 0).all()


def test_gradient_attention_is_labelled_in_table_and_conventions(tmp_path: Path) -> None:
    line, _ = CELLS["edges"]
    text = experiment("e", "prompts p", line, USING, MEASURES[0])
    found = run_file(text, tmp_path, bare("gpt2"))["e"]
    assert "gradient × attention of" in found.to_text()
    assert "none is blocked" in found.conventions["edges"]
    assert "averaged over heads and queries" in found.conventions["estimates"]
    assert "max(A · ∂m/∂A, 0)" in found.conventions["effect"]
    assert np.isnan(found.statistics[0].p).all()
    assert found.measures[0].unit == "logit"


def test_interrupted_gradient_attention_resumes(tmp_path: Path) -> None:
    line, _ = CELLS["edges"]
    check_case("llama", experiment("e", "prompts p", line, USING, *MEASURES), tmp_path, cut=1)


# --- images ---------------------------------------------------------------------------------------

CLASSES = ("vit", "dinov2_with_registers", "beit", "siglip")


@cache
def of_image(name: str, row: int) -> Product:
    seen = _image_model(name)(pixel_values=support.pixels(name, row), output_attentions=True)
    answer, wrong = LABELS.index(ANSWERS[row]), LABELS.index(WRONG[row])
    return product(seen.logits[0, answer] - seen.logits[0, wrong], seen.attentions)


@cache
def _image_model(name: str) -> Any:
    return eager(support.double(name))


PLACES = {
    f"image row {row} col {col}": (row, col)
    for row in range(1, GRID + 1)
    for col in range(1, GRID + 1)
}


@pytest.mark.parametrize("name", some(CLASSES, ["vit"]))
def test_gradient_attention_of_images_equals_autograd(name: str, tmp_path: Path) -> None:
    query = "cls token" if FRONT[name] else "image row 2 col 1 token"
    at = 0 if FRONT[name] else support.token(name, 2, 1)
    line = f"block attention layer * heads * from {query} to each token of image"
    measure = "measure logit(answer) - logit(wrong) as raw"
    text = support.experiment("maps", line, USING, measure=measure)
    found = support.run_file(text, tmp_path, name)["maps"]

    def expected(layer: int, position: str) -> list[float]:
        key = [support.token(name, *PLACES[position])]
        every = [of_image(name, row) for row in range(3)]
        return [edges(own, [layer], range(own.shape[1]), [at], key) for own in every]

    assert len(found.cells) == support.LAYERS * GRID**2
    assert agrees(found, 0, expected) > 1e-2


# --- images and texts -----------------------------------------------------------------------------


def of_pair(name: str, row: int, text: str, tower: str) -> Product:
    given = {"pixel_values": support.pixels(name, row), **duals.inputs(name, text)}
    seen = _image_model(name)(**given, output_attentions=True)
    return product(seen.logits_per_image[0, 0], getattr(seen, f"{tower}_output").attentions)


@pytest.mark.parametrize("name", some(duals.NAMES, ["clip/dual"]))
def test_gradient_attention_of_scores_in_the_image_tower_equals_autograd(
    name: str, tmp_path: Path
) -> None:
    query = "cls token" if FRONT[name] else "image row 2 col 1 token"
    at = 0 if FRONT[name] else support.token(name, 2, 1)
    line = f"block attention vision layer * heads * from {query} to each token of image"
    text = support.experiment("maps", line, USING, measure="measure score(answer) as raw")
    found = support.run_file(text, tmp_path, name)["maps"]
    answers = [f"a photo of a {answer}" for answer in ANSWERS]
    every = [of_pair(name, row, answer, "vision_model") for row, answer in enumerate(answers)]

    def expected(layer: int, position: str) -> list[float]:
        key = [support.token(name, *PLACES[position])]
        return [edges(own, [layer], range(own.shape[1]), [at], key) for own in every]

    assert agrees(found, 0, expected) > 1e-2


@pytest.mark.parametrize("name", some(duals.NAMES, ["clip/dual"]))
def test_gradient_attention_of_scores_in_the_text_tower_equals_autograd(
    name: str, tmp_path: Path
) -> None:
    """Texts have different lengths and are padded."""
    texts.write(tmp_path)
    line = "block attention text layer * heads * from token -1 to thing tokens"
    lines = ("model m", "prompts captions", line, USING, "measure score as raw", support.STATS)
    text = "experiment e {\n" + "\n".join(lines) + "\n}\n"
    blocks = support.blocks_of(name) + texts.BLOCKS
    found = support.run_file(text, tmp_path, name, blocks=blocks)["e"]
    views = [texts.TextView(name, row, "own") for row in range(3)]
    written = [f"{before} {thing}{behind}" for before, thing, behind, _ in texts.PARTS]
    every = [of_pair(name, row, own, "text_model") for row, own in enumerate(written)]

    def expected(layer: int) -> list[float]:
        return [
            edges(own, [layer], range(own.shape[1]), view.at("FRONT"), view.at("thing tokens"))
            for view, own in zip(views, every, strict=True)
        ]

    assert agrees(found, 0, expected) > 1e-3
