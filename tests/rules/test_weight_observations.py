"""`observe value_vectors`, `singular_values`, `successor`: files against slices of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mechdsl.execute.observation import weights
from mechdsl.results.experiment_result import ExperimentResult

from ..execute.support import ids_of, run_file, try_file
from ..execute.test_observed_weights import FAMILIES, bare, behind_first_mlp, ends, head, written

PROMPTS = """
prompts p {
  rows "some.jsonl"
  template "{left} w40"
  answer " {good}"
  wrong " {bad}"
}
"""
ANSWERS = [("w7", "w9"), ("w3", "w20"), ("w7", "w9"), ("w30", "w7"), ("w11", "w5"), ("w9", "w3"),
           ("w12", "w13"), ("w2", "w41")]  # fmt: skip


def run(folder: Path, name: str, *lines: str) -> ExperimentResult:
    records = [
        json.dumps({"left": " ".join(["w1"] * (n % 3 + 1)), "good": good, "bad": bad})
        for n, (good, bad) in enumerate(ANSWERS)
    ]
    (folder / "some.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    body = "\n".join(f"  {line}" for line in ("model m", "prompts p", *lines))
    results = run_file(f"experiment e {{\n{body}\n}}\n", folder, bare(name), prompts=PROMPTS)
    return next(iter(results.values()))


def token(word: str) -> int:
    return ids_of([word])[-1]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_value_vectors_toward_answers_equal_the_reference(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "NEURON_BATCH", 8)
    line = "observe value_vectors layer 1..2 neuron 3..19 toward answer - wrong"
    found = run(tmp_path, name, line)
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        layer, neuron = int(cell.coords["layer"]), int(cell.coords["neuron"])
        own = (written(name, layer) @ ends(name)[1])[neuron]
        wanted = [own[token(good)] - own[token(bad)] for good, bad in ANSWERS]
        np.testing.assert_allclose(values, wanted, atol=1e-4 * np.abs(own).max())
    assert len(found.cells) == 34
    assert found.measures[0].spread == "rows"
    assert found.statistics[0].units[0] == len(set(ANSWERS))
    assert np.isfinite(found.statistics[0].low[0])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_value_vectors_list_their_top_tokens(tmp_path: Path, name: str) -> None:
    found = run(tmp_path, name, "observe value_vectors layer 1 neuron 0..4 top 3 as says")
    logits = written(name, 1) @ ends(name)[1]
    texts = {token(f"w{n}"): f"w{n}" for n in range(40)}
    for neuron, cell in enumerate(found.cells):
        own = logits[neuron]
        best = np.argsort(-own)[:3]
        np.testing.assert_allclose(found.measures[0].patched[neuron], own.max(), rtol=1e-4)
        assert len(cell.listed) == 3
        for number, text in zip(best.tolist(), cell.listed, strict=True):
            assert texts.get(number, text) == text
    assert any(text in texts.values() for cell in found.cells for text in cell.listed)
    shown = found.to_text(140)
    assert "top tokens" in shown
    assert ", ".join(found.cells[0].listed) in shown
    assert found.records()[0]["listed"] == " ".join(found.cells[0].listed)
    assert np.isnan(found.statistics[0].low).all()


def test_value_vectors_toward_answers_also_list_top_tokens(tmp_path: Path) -> None:
    line = "observe value_vectors layer 1 neuron 0..1"
    both = run(tmp_path, "gpt2", f"{line} toward answer - wrong top 2")
    alone = run(tmp_path, "gpt2", f"{line} top 2")
    assert [cell.listed for cell in both.cells] == [cell.listed for cell in alone.cells]
    assert "top tokens" in both.conventions
    assert "top tokens" not in run(tmp_path, "gpt2", line).conventions


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("of", ["ov", "qk"])
def test_singular_values_of_heads_equal_the_reference(tmp_path: Path, name: str, of: str) -> None:
    line = f"observe singular_values({of}) at layer 0..1 head * top 4 as sizes"
    found = run(tmp_path, name, line, "report lines value of sizes", "expect max(sizes) > 0")
    assert found.axes == ("layer", "head", "value")
    for cell, values in zip(found.cells, found.measures[0].patched, strict=True):
        own = head(name, int(cell.coords["layer"]), int(cell.coords["head"]))
        whole = np.linalg.svd(own.v @ own.o if of == "ov" else own.q @ own.k.T)[1]
        wanted = whole[int(cell.coords["value"]) - 1]
        np.testing.assert_allclose(values, wanted, atol=1e-4 * whole[0])
    assert found.holds


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_successor_scores_of_heads_equal_the_reference(tmp_path: Path, name: str) -> None:
    words = [f"w{n}" for n in (5, 6, 30, 8, 21, 5)]
    line = f"observe successor({', '.join(chr(34) + ' ' + w + chr(34) for w in words)}) at "
    found = run(tmp_path, name, f"{line} layer 1..2 head * as next")
    assert [m.label for m in found.measures] == ["next", "next rank"]
    assert [m.unit for m in found.measures] == ["share", "rank"]
    tokens = [token(word) for word in words]
    named, vectors = sorted(set(tokens)), behind_first_mlp(name, np.array(tokens[:-1]))
    for number, cell in enumerate(found.cells):
        own = head(name, int(cell.coords["layer"]), int(cell.coords["head"]))
        logits = (vectors @ own.v @ own.o @ ends(name)[1])[:, named]
        order = [np.argsort(-row).tolist() for row in logits]
        ranks = [
            1 + row.index(named.index(then)) for row, then in zip(order, tokens[1:], strict=True)
        ]
        assert np.allclose(found.measures[0].patched[number], np.mean(np.array(ranks) == 1))
        assert np.allclose(found.measures[1].patched[number], np.mean(ranks))
    assert len({*found.measures[1].patched[:, 0].tolist()}) > 2


def test_conventions_of_successor_state_texts_and_mlp(tmp_path: Path) -> None:
    found = run(tmp_path, "gpt2", 'observe successor(" w1", " w2", " w3") at layer 1 head 0')
    said = found.conventions["observed"]
    assert 'of " w1", " w2", " w3"' in said
    assert "through the first block's norm and MLP" in said


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_observations_need_no_prompts(tmp_path: Path, name: str) -> None:
    """The values equal those of an experiment with prompts."""
    lines = ("observe copying layer * head 1 as copies", "observe matching L1H2 as repeats")
    text = "experiment e {\n  model m\n  " + "\n  ".join(lines) + "\n}\n"
    alone = run_file(text, tmp_path, bare(name), prompts="")
    assert list(alone) == ["e.copies", "e.repeats"]
    for line, found in zip(lines, alone.values(), strict=True):
        beside = run(tmp_path, name, line)
        assert [cell.site for cell in found.cells] == [cell.site for cell in beside.cells]
        values = found.measures[0].patched
        np.testing.assert_allclose(values[:, 0], beside.measures[0].patched[:, 0], atol=1e-6)
        assert values.shape[1] == 1
        assert found.conventions["rows"].startswith("none: read from weights only")


@pytest.mark.parametrize(
    "lines",
    [
        ("observe norm resid_post layer * at last token",),
        ("observe copying L1H1 as c", "observe norm embed at last token as n"),
        ("observe value_vectors layer 1 neuron * toward answer",),
        ("observe copying L1H1", "measure logit(answer) as raw"),
    ],
)
def test_observations_that_need_prompts_are_errors_without_them(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    text = "experiment e {\n  model m\n  " + "\n  ".join(lines) + "\n}\n"
    _, found = try_file(text, tmp_path, bare("gpt2"), prompts="")
    assert "E0206" in [each.code for each in found]
