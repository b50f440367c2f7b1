"""`mechdsl sites MODEL`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..families import tables
from ..families.build import model
from ..families.parts import Architecture
from ..models import families
from .conftest import Command


def folder(name: str, root: Path) -> Path:
    """Save a tiny model of the architecture tables and return its folder."""
    row = next(row for row in tables.every() if row.name == name)
    assert isinstance(row, Architecture)
    model(row).save_pretrained(root / "model")  # type: ignore[operator]
    return root / "model"


def test_sites_of_a_zoo_model_are_printed(command: Command) -> None:
    done = command("sites", "counting")
    assert done.status == 0
    assert not done.err
    text = " ".join(done.out.split())
    for said in (
        "LlamaForCausalLM",
        "4 blocks of width 128, 4 heads of 32",
        "before attention `input_layernorm`",
        "rows restarted at a block and token = full forward passes",
        "planner passes: all",
    ):
        assert said in text
    assert "does not hold" not in text


def test_sites_json_lists_layers_with_experts(command: Command, tmp_path: Path) -> None:
    done = command("sites", folder("deepseek_v3", tmp_path), "--format", "json")
    assert done.status == 0
    stack = json.loads(done.out)["stacks"][""]
    assert stack["sites"]["expert_out"]["layers"] == [1, 2]
    assert stack["sites"]["mlp_hidden"]["layers"] == [0]
    assert stack["sites"]["v"]["width"] == 6
    assert "k" not in stack["sites"]


def test_sites_state_why_full_forward_passes_are_needed(command: Command, tmp_path: Path) -> None:
    done = command("sites", folder("mamba", tmp_path))
    assert done.status == 0
    text = " ".join(done.out.split())
    assert "mixer_out" in text
    assert "no `z`:" in text
    assert "planner passes: every row is a full forward pass (" in text


def test_sites_of_an_image_model_are_not_causal(command: Command, tmp_path: Path) -> None:
    done = command("sites", folder("vit", tmp_path), "--format", "json")
    found = json.loads(done.out)
    assert found["stacks"][""]["causal"] is False
    assert all(check["passed"] for check in found["checks"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("countin", "error[E0403]: the zoo has no model `countin`"),
        ("countin", "did you mean `counting`?"),
        ("no/such", "error[E0401]: there is no model at `no/such`"),
    ],
)
def test_sites_of_a_missing_model_are_an_error(command: Command, name: str, said: str) -> None:
    done = command("sites", name)
    assert done.status == 2
    assert said in done.err


def test_sites_of_an_invalid_model_path_are_an_error(command: Command, tmp_path: Path) -> None:
    done = command("sites", families.build("gpt2", tmp_path / "m") / "config.json")
    assert done.status == 2
    assert "error[E0401]" in done.err


@pytest.mark.parametrize("stack", ["", "vision"])
def test_sites_name_the_patch_embedding_before_positions(command: Command, stack: str) -> None:
    """`embed` of an image encoder is read before positions are added, not at the module that adds
    them."""
    name = "counting-vlm" if stack else "dual"
    done = command("sites", name, "--format", "json")
    tensor = json.loads(done.out)["stacks"][stack]["sites"]["embed"]["tensor"]
    assert tensor.startswith("output of ")
    assert tensor.endswith("embeddings.patch_embedding, before positions are added")
