"""Reports on attention between two positions: each number and label belongs to its key, or to its
query where only queries vary. The reference for observed weights is the bare model."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.show.reports.grid import chart_axis_title, position_names, value_names
from mechdsl.show.reports.overlay_pages import build_overlays, prompt_effects

from ..execute.support import ROWS, bare, experiment, prompt, try_file
from ..image_prompts import support as images
from .synthetic import report

FAMILY = "llama"
KEYS = {
    "observe attention layer 1 head 1 from last token to token * align left": "",
    "observe attention layers 0..1 heads 0, 1 from cue token to token * align left": "",
    "block attention layer 1 head 1 from last token to token * align left": "delta",
    "reweight attention layer 1 head 1 from last token to token * align left by 1.5": "delta",
    "block attention layer 1 head 1 from cue token to token * align left "
    "using gradient_attention": "raw",
}
QUERIES = {
    "observe attention layer 1 head 1 from token * align left to first token": "",
    "block attention layer 1 heads * from token * align left to first token": "delta",
}
LAST, FIRST = next(iter(KEYS)), next(iter(QUERIES))
BOTH = {"observe attention layer 1 head 1 from token * align left to token * align left": ""}


@cache
def attentions(row: int) -> list[np.ndarray[Any, Any]]:
    """[layer] weights of the bare model, [head, query, key], of one unpadded prompt."""
    model = deepcopy(bare(FAMILY))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = torch.tensor([prompt(ROWS[row]).ids])
        return [each[0].numpy() for each in model(ids, output_attentions=True).attentions]


def run(
    folder: Path, line: str, effect: str, reports: str = "report overlay top 9 report table"
) -> ExperimentResult:
    measure = f"measure logit(answer) - logit(wrong) as {effect}" if effect else ""
    text = experiment("e", "prompts p", line, measure, reports)
    result, problems = try_file(text, folder, bare(FAMILY))
    assert result is not None, problems
    return result.experiments[0]


def row_of(result: ExperimentResult, number: int) -> int:
    """The record of a row of the result."""
    assert result.row_ids is not None
    return result.row_ids[number]


def words_of(row: int) -> list[str]:
    return ["<s>", *prompt(ROWS[row]).words]


@pytest.mark.parametrize("line", [*KEYS, *QUERIES, *BOTH])
def test_numbers_and_labels_are_at_the_varying_end_of_attention(tmp_path: Path, line: str) -> None:
    result = run(tmp_path, line, {**KEYS, **QUERIES, **BOTH}[line])
    overlay, values = build_overlays(result, report("overlay", top=9))[0], prompt_effects(result, 0)
    cells = {
        (str(cell.coords.get("from_position")), str(cell.coords["position"])): n
        for n, cell in enumerate(result.cells)
    }
    assert len(overlay.prompts) == len(ROWS)
    for shaded in overlay.prompts:
        assert list(shaded.tokens) == words_of(row_of(result, shaded.prompt))
        queries = range(len(shaded.tokens)) if line in BOTH else [None]
        for query, (title, numbers) in zip(queries, shaded.rows, strict=False):
            assert title == ("" if query is None else f"from {query}")
            expected = [
                values[cells[key], shaded.prompt] if key in cells else np.nan
                for token in range(len(shaded.tokens))
                for key in [(str(query), str(token))]
            ]
            np.testing.assert_allclose(numbers, expected)
            assert np.isfinite(numbers).any()
    varied = {token: {words_of(n)[token] for n in range(len(ROWS)) if token < len(words_of(n))}
              for token in range(14)}  # fmt: skip
    for position, label in position_names(result).items():
        number, _, text = label.partition(": ")
        assert number == str(position)
        assert not text or text.removesuffix(", …") in varied[int(str(position))]
        assert bool(text) == (varied[int(str(position))] != {"<s>"})
    title = chart_axis_title(result, "position")
    assert title == ("Query position" if line in QUERIES else "Key position")
    if line in BOTH:
        assert chart_axis_title(result, "from_position") == "Query position"
        names = value_names(result, "from_position")
        assert names["2"].removeprefix("2: ").removesuffix(", …") in varied[2]


@pytest.mark.parametrize("line", [*list(KEYS)[:2], *list(QUERIES)[:1], *BOTH])
def test_observed_attention_in_overlays_equals_the_bare_model(tmp_path: Path, line: str) -> None:
    result = run(tmp_path, line, "")
    for shaded in build_overlays(result, report("overlay", top=9))[0].prompts:
        row = row_of(result, shaded.prompt)
        layers, length = attentions(row), len(shaded.tokens)
        if line in BOTH:
            for query, (_, numbers) in enumerate(shaded.rows[:length]):
                weights = layers[1][1, query, : query + 1]
                np.testing.assert_allclose(numbers[: query + 1], weights, atol=1e-4)
            continue
        ((_, numbers),) = shaded.rows
        cue = prompt(ROWS[row]).cue
        weights = {
            LAST: layers[1][1, -1],
            list(KEYS)[1]: np.mean([layers[n][:2, cue] for n in (0, 1)], axis=(0, 1)),
            FIRST: layers[1][1, :, 1],
        }[line]
        known = np.isfinite(numbers)
        assert known.sum() > 4
        np.testing.assert_allclose(np.array(numbers)[known], weights[known], atol=1e-4)


def test_tokens_of_both_ends_are_in_tables_json_and_csv(tmp_path: Path) -> None:
    result = run(tmp_path, LAST, "")
    cell = next(cell for cell in result.cells if str(cell.coords["position"]) == "2")
    assert set(cell.queries) == {row[-1] for row in map(words_of, range(len(ROWS)))}
    assert set(cell.tokens) == {words_of(n)[2] for n in range(len(ROWS))}
    assert not cell.keys
    assert "w42 → " in result.to_text(200)
    assert "w42 → ∅" in result.to_text(200), "`<s>` covers no text"
    header, first, *_ = result.to_csv().splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["queries"] == "w42"
    line = "observe attention layer 1 head 1 from last token to cue token"
    (only,) = run(tmp_path, line, "", "report table").cells
    assert (only.queries, set(only.tokens)) == (("w42",), {row["cue"] for row in ROWS})
    swept = run(tmp_path, FIRST, "").cells[2]
    assert (swept.queries, set(swept.keys)) == ((), {words_of(n)[1] for n in range(len(ROWS))})
    assert set(swept.tokens) == {words_of(n)[2] for n in range(len(ROWS))}


def test_attention_to_patches_is_drawn_on_them() -> None:
    line = "observe attention layer 1 head 0 from last token to each token of photo"
    text = images.experiment("e", line, "report overlay top 3", measure="")
    result = images.run_file(text, "llava")["e"]
    (overlay,) = build_overlays(result, report("overlay", top=3)).values()
    assert not overlay.texts(), "the query isn't drawn"
    values = prompt_effects(result, 0)
    for prompt_number, maps in enumerate(overlay.images()):
        ((_, patches),) = maps.maps
        np.testing.assert_allclose(patches.ravel(), values[:, prompt_number])
