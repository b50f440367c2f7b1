"""`validate` of bases without the model on the machine, as in CI: widths are unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source

from .support import BLOCKS, experiment
from .test_dictionaries import make
from .test_transcoders import make as make_transcoder

WIDTH = 768
BASES = {
    "pca": ("pca(p, dims: 3) at resid_post layer 30 at last token", "feature 2 of b"),
    "random": ("random(dims: 300) at resid_post layer 30", "feature 280 of b"),
    "svd": ("svd(weights: mlp_out, dims: 200) at mlp_out layer 9", "features 180..190 of b"),
    "whole svd": ("svd(weights: mlp_out) at mlp_out layer 9", "feature 700 of b"),
    "neurons": ("neurons at mlp_hidden layer 3", "features 3000 of b"),
    "saved": ('saved("r.safetensors", "r") at resid_post layer 11', "feature * of b"),
    "directions": ("directions(d) at resid_post layer 11", "feature 0 of b"),
    "sae": ('sae("sae") at resid_post layer 1', "feature * of b"),
    "transcoder": ('transcoder("of_mlp") at mlp_out layer 1', "feature * of b"),
    "another site": ("random(dims: 300) at resid_post layer 2", "mlp_out layer 5 in basis b"),
    "dimensions": ("neurons at resid_post layer 2", "resid_post layer 2 dims 700..750"),
    "a dimension": ("neurons at resid_post layer 2", "resid_post layer 2 dim 767"),
    "exceptions": ("neurons at resid_post layer 2", "layers * heads * except L10H7, layer 11"),
    "an exception": ("neurons at resid_post layer 2", "layer 10 heads * except 11"),
}


NOWHERE = 'hf("nobody/nothing")'


def codes(basis: str, rule: str, folder: Path, model: str = NOWHERE) -> set[str]:
    text = f"mech 1\nmodel m = {model}\n{BLOCKS}\nbasis b = {basis}\n"
    text += 'direction d = saved("r.safetensors", "d")\n'
    text += experiment("e", f"from other into clean  {rule}")
    found = check_source(Source(text, folder / "file.mech"), CheckSettings())
    return {each.code for each in found.diagnostics if each.code != "W0730"}


def write_files(folder: Path) -> None:
    make(folder, "standard", WIDTH)
    make_transcoder(folder, "transcoder", WIDTH)
    save_file({"r": torch.eye(WIDTH)[:20], "d": torch.ones(WIDTH)}, folder / "r.safetensors")


@pytest.mark.parametrize("name", BASES)
def test_validate_accepts_bases_of_unknown_width(name: str, data: Path) -> None:
    write_files(data)
    basis, coordinates = BASES[name]
    assert codes(basis, f"patch {coordinates} at last token", data) <= {"W0710", "W0720"}


def test_validate_accepts_saved_directions_of_any_width(data: Path) -> None:
    write_files(data)
    basis = "neurons at resid_post layer 2"
    rule = "add 2 * d to resid_post layer 9 at last token"
    assert codes(basis, rule, data) <= {"W0710", "W0720"}


@pytest.mark.parametrize(
    ("basis", "code"),
    [
        ("pca(p, dims: 64) at resid_post layer 2 at last token", "E0342"),
        ('sae("nothing") at resid_post layer 2', "E0342"),
        ('transcoder("sae") at mlp_out layer 2', "E0342"),
        ('saved("r.safetensors", "x") at resid_post layer 2', "E0342"),
        ('saved("r.safetensors", "d") at resid_post layer 2', "E0342"),
    ],
)
def test_validate_checks_basis_files_without_the_model(basis: str, code: str, data: Path) -> None:
    write_files(data)
    assert code in codes(basis, "patch feature 0 of b at last token", data)


@pytest.mark.parametrize(
    ("recorded", "model", "said"),
    [
        ("gpt2-small", 'hf("openai-community/gpt2")', False),
        ("gpt2", 'hf("gpt2")', False),
        ("google/gemma-2-2b", 'hf("google/Gemma-2-2B")', False),
        ("gemma-2-2b", 'hf("google/gemma-2-2b-it")', True),
        ("gpt2-medium", 'hf("openai-community/gpt2")', True),
        ("gpt2-medium", 'local("folder")', False),
    ],
)
def test_validate_warns_if_the_recorded_model_differs(
    recorded: str, model: str, said: bool, data: Path
) -> None:
    write_files(data)
    config = data / "sae" / "cfg.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    facts["metadata"]["model_name"] = recorded
    config.write_text(json.dumps(facts), encoding="utf-8")
    found = codes(BASES["sae"][0], "patch feature 0 of b at last token", data, model)
    assert ("W0735" in found) == said
