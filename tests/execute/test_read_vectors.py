"""Vectors of all rows, read in batches, equal to those of one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.execute.vectors import SiteVectors, build_reader, read_vectors, split_prompts
from mechdsl.models.shape import PaddingSide
from mechdsl.planner import plan as module
from mechdsl.prompts.rows import PromptTable
from mechdsl.prompts.runs import PositionCell, PromptRun, RunRow
from mechdsl.resolve.types import SitePoint

from ..reference.noise import noise
from .support import (
    ABSOLUTE,
    PROMPTS,
    ROWS,
    adopted,
    check_file,
    experiment,
    prompt,
    unpatched,
    write_rows,
)

FAMILIES = ("gpt2", "llama", "gpt_neox")
POINTS = (
    SitePoint("embed", None, None),
    SitePoint("resid_post", 0, None),
    SitePoint("z", 1, 2),
    SitePoint("z", 1, None),
    SitePoint("mlp_hidden", 2, 5),
    SitePoint("mlp_hidden", 0, None),
    SitePoint("k", 2, 1),
    SitePoint("final_norm", None, None),
    SitePoint("logits", None, None),
)
RUNS = ("clean", "longer")


def table(family: str, folder: Path) -> PromptTable:
    write_rows(folder)
    text = experiment("e", "prompts p", "measure prob(answer) as raw")
    return check_file(text, folder, adopted(family)).experiments[0].table


def cells(found: PromptTable, run: str) -> list[PositionCell]:
    """The cue; all tokens of the subject, and none in the first row; every token."""
    rows = [prompt(ROWS[row], run) for row in found.row_ids]
    subjects = [() if number == 0 else (p.subject,) for number, p in enumerate(rows)]
    return [
        PositionCell("cue", tuple(((p.cue,),) for p in rows)),
        PositionCell("subject", tuple(subjects)),
        PositionCell("all", tuple((tuple(range(len(p.ids))),) for p in rows)),
    ]


def expected(found: PromptTable, run: str, family: str, point: SitePoint, cell: PositionCell,
             rows: Sequence[int]) -> tuple[list[tuple[int, int]], Tensor]:  # fmt: skip
    """((row, token) of each vector, the vectors)"""
    where = [(row, token) for row in rows for hit in cell.hits[row] for token in hit]
    vectors = [
        unpatched(family, prompt(ROWS[found.row_ids[row]], run))[1][point.site, point.layer][token]
        for row, token in where
    ]
    own = [v.flatten() if point.unit is None else v[point.unit] for v in vectors]
    return where, torch.stack(own)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("run", RUNS)
def test_batched_vectors_equal_single_prompts(
    family: str, side: PaddingSide, run: str, tmp_path: Path
) -> None:
    found = table(family, tmp_path)
    model, positions = adopted(family), cells(found, run)
    lanes = build_reader(model, found, found.runs[run], POINTS, seed=0, side=side)
    batches = split_prompts(model, found.runs[run], POINTS, tokens=30)
    assert 1 < len(batches) < len(ROWS)
    gathered: dict[tuple[int, int], list[SiteVectors]] = {}
    for each in read_vectors(lanes, POINTS, positions, batches):
        gathered.setdefault((each.point, each.position), []).append(each)
    assert len(gathered) == len(POINTS) * len(positions)
    for (point, position), parts in gathered.items():
        rows = range(len(found))
        where, vectors = expected(found, run, family, POINTS[point], positions[position], rows)
        got = [(int(r), int(t)) for part in parts for r, t in zip(part.prompts, part.tokens,
                                                                  strict=True)]  # fmt: skip
        assert got == where
        torch.testing.assert_close(
            torch.cat([part.vectors for part in parts]), vectors, atol=ABSOLUTE, rtol=1e-3
        )


def test_vectors_of_selected_rows_equal_single_prompts(tmp_path: Path) -> None:
    found = table("llama", tmp_path)
    model, point = adopted("llama"), SitePoint("resid_post", 1, None)
    run, rows = found.runs["clean"], np.array([1, 3], dtype=np.int64)
    lanes = build_reader(model, found, run, [point], seed=0)
    batches = split_prompts(model, run, [point], rows)
    (each,) = read_vectors(lanes, [point], cells(found, "clean")[:1], batches)
    where, vectors = expected(found, "clean", "llama", point, cells(found, "clean")[0], [1, 3])
    assert [tuple(pair) for pair in zip(each.prompts, each.tokens, strict=True)] == where
    torch.testing.assert_close(each.vectors, vectors, atol=ABSOLUTE, rtol=1e-3)


def test_read_attention_patterns_equal_single_prompts(tmp_path: Path) -> None:
    found = table("gpt2", tmp_path)
    model, point = adopted("gpt2"), SitePoint("pattern", 1, 3)
    run = found.runs["clean"]
    lanes = build_reader(model, found, run, [point], seed=0)
    batches = split_prompts(model, run, [point])
    (each,) = read_vectors(lanes, [point], cells(found, "clean")[:1], batches)
    for row, token, weights in zip(each.prompts, each.tokens, each.vectors, strict=True):
        own = prompt(ROWS[found.row_ids[row]])
        seen = unpatched("gpt2", own)[1]["pattern", 1][token, 3]
        torch.testing.assert_close(weights[: len(own.ids)], seen, atol=ABSOLUTE, rtol=1e-3)
        assert not weights[len(own.ids) :].any()


def test_noised_run_has_a_vector_per_noise_draw(tmp_path: Path) -> None:
    """A noised run has a vector for each draw, and they differ by the added noise."""
    noised = "corrupt noised { add gaussian(std: 1.5, samples: 3) to embed at subject tokens }"
    text = PROMPTS.replace("corrupt other", f"{noised}\n  corrupt other")
    write_rows(tmp_path)
    lines = experiment("e", "prompts p", "measure prob(answer) as raw")
    checked = check_file(lines, tmp_path, adopted("llama"), text)
    found, model = checked.experiments[0].table, adopted("llama")
    run, point = found.runs["noised"], SitePoint("embed", None, None)
    lanes = build_reader(model, found, run, [point], seed=0)
    batches = split_prompts(model, run, [point], tokens=60)
    cell = cells(found, "clean")[1]
    parts = list(read_vectors(lanes, [point], [cell], batches))
    assert len(parts) > 1
    prompts, draws, tokens = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("prompts", "draws", "tokens")
    )
    assert sorted(set(draws.tolist())) == [0, 1, 2]
    vectors = torch.cat([part.vectors for part in parts])
    for row, draw, token, vector in zip(prompts, draws, tokens, vectors, strict=True):
        plain = unpatched("llama", prompt(ROWS[found.row_ids[row]]))[1]["embed", None][token, 0]
        drawn = noise(found.row_keys[row], int(draw), int(token), len(plain))
        own = plain + (1.5 * drawn).to(plain)
        torch.testing.assert_close(vector, own, atol=ABSOLUTE, rtol=1e-3)


def test_read_batches_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many sites make batches small, none makes them empty."""
    model = adopted("gpt2")
    widest = [SitePoint("mlp_hidden", layer, None) for layer in range(3)]
    row = RunRow("", tuple(range(10)), (), (False,) * 10, (), {}, {})
    run = PromptRun("clean", (row,) * 40)
    assert [len(b) for b in split_prompts(model, run, widest, tokens=100)] == [10] * 4
    # Queries, keys and values have 72 numbers together, the MLP 28. Nine prompts of ten tokens fit.
    monkeypatch.setattr("mechdsl.execute.vectors.MIN_READ_TOKENS", 1)
    monkeypatch.setattr("mechdsl.execute.vectors.CPU_ACTIVATION_BYTES", 4 * 72 * (10 * 9 + 1))
    assert [len(b) for b in split_prompts(model, run, widest)] == [9] * 4 + [4]
    monkeypatch.undo()
    monkeypatch.setattr(
        module, "READ_BATCH_BYTES", 28 * 3 * 4 * 10 * 7
    )  # seven prompts of ten tokens
    assert [len(b) for b in split_prompts(model, run, widest)] == [7] * 5 + [5]
    monkeypatch.setattr(module, "READ_BATCH_BYTES", 1)
    assert [len(b) for b in split_prompts(model, run, widest)] == [1] * 40
