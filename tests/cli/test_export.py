"""`mechdsl export`: edited models as folders, loaded by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechdsl

from ..models import families
from .conftest import Command

EDITS = (
    "scale weights of mlp_out layer 1 neuron 5 by 0",
    "scale weights of attn_out layer 3 heads 1..2 by 0.5",
    "set weights of L1N7 to 2 * more",
    "add more to weights of mlp_out layer 2 neurons 8, 9",
    "project out more from weights",
)
PROMPTS = """
prompts parts {
  rows "parts.jsonl"
  template "{text}"
  answer " {a}"
  corrupt fewer { text = less }
}
direction more = mean_difference(parts, parts.fewer) at resid_post layer 2 at last token
"""
ROWS = [
    {
        "text": f"Part 1: {' '.join([item] * a)} Count 1:",
        "less": f"Part 1: {' '.join([item] * (a - 1))} Count 1:",
        "a": a,
    }
    for a in range(3, 10)
    for item in ("apple", "pear", "plum")
]
HEAD = f'mech 1\nmodel toy = zoo("counting")\n{PROMPTS}'
CURED = "model cured = toy with {\n" + "".join(f"  {line}\n" for line in EDITS) + "}\n"
MERGED = "model merged = toy + 0.5 * (cured - toy)\n"


def experiment(*lines: str, model: str = "toy") -> str:
    body = "\n".join(
        (f"model {model}", "prompts parts limit 21", *lines, "measure logit(answer) as raw")
    )
    return f"experiment e {{\n{body}\n}}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.mech"
    data = "\n".join(json.dumps(row) for row in ROWS) + "\n"
    (tmp_path / "parts.jsonl").write_text(data, encoding="utf-8")
    path.write_text(HEAD + CURED + MERGED + experiment(model="cured"), encoding="utf-8")
    return path


def logits(folder: Path) -> np.ndarray:
    """Compute logits with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[float] = []
    for row in ROWS:
        ids = tokenizer(row["text"], return_tensors="pt").input_ids
        (token,) = tokenizer(f" {row['a']}", add_special_tokens=False).input_ids
        with torch.no_grad():
            found.append(float(model(ids).logits[0, -1, token]))
    return np.array(found)


def sorted_values(text: str) -> np.ndarray:
    return np.sort(mechdsl.run(text, store=False)["e"].measures[0].patched[0])


@pytest.mark.slow
def test_exported_model_has_the_logits_of_the_edited_run(file: Path, command: Command) -> None:
    done = command("export", "file.mech", "--model", "cured", "--weights", "out/cured")
    assert done.status == 0
    assert done.out == ("cured written to out/cured: LlamaForCausalLM, 870,784 weights, float32\n")
    assert done.err == ""
    found = np.sort(logits(file.parent / "out" / "cured"))
    rules = sorted_values(HEAD + experiment(*EDITS))
    edited = sorted_values(HEAD + CURED + experiment(model="cured"))
    plain = sorted_values(HEAD + experiment())
    np.testing.assert_allclose(found, rules, atol=2e-4)
    np.testing.assert_allclose(found, edited, atol=2e-4)
    assert np.abs(found - plain).max() > 1
    again = HEAD.replace('zoo("counting")', f'local("{file.parent}/out/cured")')
    np.testing.assert_allclose(sorted_values(again + experiment()), found, atol=2e-4)


def test_python_export_writes_the_merged_model(file: Path) -> None:
    exported = mechdsl.export(file, "folder", "merged")
    assert exported == mechdsl.ExportedModel(
        "merged",
        Path("folder"),
        "LlamaForCausalLM",
        "toy + 0.5 * (cured - toy)",
        "float32",
        870_784,
        True,
    )
    found = np.sort(logits(Path("folder")))
    own = sorted_values(HEAD + CURED + MERGED + experiment(model="merged"))
    np.testing.assert_allclose(found, own, atol=2e-4)
    only = file.with_name("only.mech")
    only.write_text(HEAD + CURED.replace("toy with", "toy  with"), encoding="utf-8")
    assert mechdsl.export(only, "other").name == "cured"


def test_invalid_export_is_rejected_and_writes_nothing(file: Path, command: Command) -> None:
    done = command("export", "file.mech", "--weights", "out")
    assert done.status == 2
    assert "E0208" in done.err
    assert "the file has 2 edited models" in done.err
    assert "`--model cured`" in done.err
    done = command("export", "file.mech", "--weights", "out", "--model", "curd")
    assert (done.status, "did you mean `cured`?" in done.err) == (2, True)
    (file.parent / "full").mkdir()
    (file.parent / "full" / "own.txt").write_text("mine", encoding="utf-8")
    done = command("export", "file.mech", "--weights", "full", "--model", "toy")
    assert (done.status, "nothing is overwritten" in done.err) == (2, True)
    assert [each.name for each in (file.parent / "full").iterdir()] == ["own.txt"]
    file.write_text(HEAD + CURED.replace("L1N7", "L1N9999"), encoding="utf-8")
    done = command("export", "file.mech", "--weights", "out")
    assert (done.status, "E0301" in done.err) == (2, True)
    done = command("export", "file.mech", "--weights", "out", "--model", "toy", "--dtype", "double")
    assert done.status == 2, done.err
    assert "'double' is not one of 'float32'" in done.err
    done = command("export", "missing.mech", "--weights", "out")
    assert done.status == 2
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_export_unties_edited_embeddings(family: str, tmp_path: Path, command: Command) -> None:
    """The direction is removed from the embedding; the tied unembedding stays as it was."""
    families.build(family, tmp_path / "base", tie_word_embeddings=True)
    text = (
        'mech 1\nmodel m = local("base")\n'
        'direction u = unembedding(" w3")\n'
        "model cured = m with { project out u from weights }\n"
    )
    (tmp_path / "file.mech").write_text(text, encoding="utf-8")
    done = command("export", tmp_path / "file.mech", "--weights", tmp_path / "out")
    assert done.status == 0, done.err
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    cured: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = base.get_output_embeddings().weight
    assert torch.equal(cured.get_output_embeddings().weight, before)
    embedding = cured.get_input_embeddings().weight
    assert not torch.equal(embedding, before)
    token = families.tokenizer().token_to_id("w3")
    unit = before[token] / before[token].norm()
    assert float((embedding @ unit).abs().max()) < 1e-4
    assert cured.config.tie_word_embeddings is False
