"""Side files that are damaged or malformed: an error with a location, never an internal one."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mechdsl.base.text import Source
from mechdsl.checks.file_check import check_source

PROMPTS = """mech 1
model toy = zoo("counting")
prompts p {
  x in ["apple", "pear", "plum", "fig", "kiwi"]
  template "Part 1: {x} plum Count 1:"
  answer " 1"
}
"""

WIDTH, FEATURES = 128, 24

CONFIG = {
    "architecture": "topk",
    "k": 4,
    "d_in": WIDTH,
    "d_sae": FEATURES,
    "hook_name": "blocks.1.hook_resid_post",
    "normalize_activations": "none",
}

GRAPH = {
    "cfg": {"n_layers": 4, "n_heads": 4},
    "nodes": {},
    "edges": {
        "input->m1": {"score": 1, "in_graph": True},
        "m1->logits": {"score": 1, "in_graph": True},
    },
}

MASK = {
    "sites": [["z", 2, 0], ["z", 2, 1]],
    "labels": ["z layer 2 head 0", "z layer 2 head 1"],
    "probabilities": [0.9, 0.1],
    "chosen": [0],
}

YAML = "feature_input_hook: hook_resid_mid\nmodel_name: toy\n"

EXPERIMENT = "experiment e {{\n  prompts p\n  {}\n  measure logit(answer) as raw\n}}\n"

USES = {
    "sae": (
        'basis s = sae("sae") at resid_post layer 1',
        "scale feature 0 of s at last token by 2",
    ),
    "clt": (
        'basis s = transcoder("clt") at mlp_out layer 1',
        "observe features of s at last token top 3 as act",
    ),
    "circuit": ('circuit c = saved("circuit.json")', "ablate all but c at tokens * with zero"),
    "group": ('group g = saved("group.json")', "ablate g at last token with zero"),
    "direction": (
        'direction d = saved("direction.safetensors", "d")',
        "add 1 * d to resid_post layer 1 at last token",
    ),
}

FILES = {
    "cfg.json": ("sae", "sae/cfg.json"),
    "weights": ("sae", "sae/sae_weights.safetensors"),
    "config.yaml": ("clt", "clt/config.yaml"),
    "encoder": ("clt", "clt/W_enc_1.safetensors"),
    "circuit": ("circuit", "circuit.json"),
    "group": ("group", "group.json"),
    "direction": ("direction", "direction.safetensors"),
}


def write_files(folder: Path) -> None:
    """Write one sound file of each kind."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "sae").mkdir(parents=True)
    (folder / "clt").mkdir()
    tensors = {
        "W_enc": torch.zeros(WIDTH, FEATURES),
        "b_enc": torch.zeros(FEATURES),
        "W_dec": torch.zeros(FEATURES, WIDTH),
        "b_dec": torch.zeros(WIDTH),
    }
    save_file(tensors, folder / "sae" / "sae_weights.safetensors")
    encoder = {"W_enc_1": torch.zeros(FEATURES, WIDTH), "b_enc_1": torch.zeros(FEATURES)}
    save_file(encoder, folder / "clt" / "W_enc_1.safetensors")
    save_file({"d": torch.ones(WIDTH)}, folder / "direction.safetensors")
    (folder / "sae" / "cfg.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "clt" / "config.yaml").write_text(YAML, "utf-8")
    (folder / "circuit.json").write_text(json.dumps(GRAPH), "utf-8")
    (folder / "group.json").write_text(json.dumps(MASK), "utf-8")


def list_errors(folder: Path, kind: str) -> list[tuple[str, str]]:
    """Return the code and the written text of each error of a file that uses a side file."""
    definition, rule = USES[kind]
    text = f"{PROMPTS}{definition}\n{EXPERIMENT.format(rule)}"
    checked = check_source(Source(text, folder / "file.mech"))
    problems = [each for each in checked.diagnostics if each.severity == "error"]
    return [(each.code, each.span.written) for each in problems]


def _edited(of: dict[str, Any], **facts: Any) -> bytes:
    return json.dumps(of | facts).encode()


_EDGE = {"input->m1": {"score": 1, "in_graph": "false"}}

MALFORMED: dict[str, tuple[str, bytes]] = {
    "k is a fraction": ("cfg.json", _edited(CONFIG, k=2.5)),
    "k is NaN": ("cfg.json", _edited(CONFIG, k=float("nan"))),
    "k is a text": ("cfg.json", _edited(CONFIG, k="4")),
    "k is true": ("cfg.json", _edited(CONFIG, k=True)),
    "k exceeds the features": ("cfg.json", _edited(CONFIG, k=FEATURES + 1)),
    "threshold is a text": ("cfg.json", _edited(CONFIG, residual_threshold="x")),
    "flag is a text": ("cfg.json", _edited(CONFIG, apply_b_dec_to_input="false")),
    "width differs": ("cfg.json", _edited(CONFIG, d_in=WIDTH + 1)),
    "features differ": ("cfg.json", _edited(CONFIG, d_sae=FEATURES + 1)),
    "layers": ("cfg.json", _edited(CONFIG, architecture="temporal", n_attn_layers=10**7)),
    "repeated key": ("cfg.json", json.dumps(CONFIG).encode()[:-1] + b', "k": 3}'),
    "long number": ("cfg.json", json.dumps(CONFIG).encode()[:-1] + b', "x": ' + b"9" * 5000 + b"}"),
    "large config": ("cfg.json", json.dumps(CONFIG).encode() + b" " * 10**6),
    "deep": ("cfg.json", b"[" * 10**5),
    "yaml text": ("config.yaml", b"feature_input_hook: [hook_resid_mid]\n"),
    "yaml alias": ("config.yaml", b"x: &a 1\ny: *a\n" + YAML.encode()),
    "yaml repeated key": ("config.yaml", YAML.encode() * 2),
    "yaml date": ("config.yaml", YAML.encode() + b"at: 2001-99-99\n"),
    "yaml list": ("config.yaml", b"- a\n"),
    "large yaml": ("config.yaml", YAML.encode() + b"# x\n" * 10**6),
    "membership is a text": ("circuit", _edited(GRAPH, edges=_EDGE)),
    "score is a text": ("circuit", _edited(GRAPH, edges={"input->m1": {"score": "1"}})),
    "edge of many words": ("circuit", json.dumps({"edges": ["a " * 10_000]}).encode()),
    "edge is a number": ("circuit", b'{"edges": [5]}'),
    "circuit repeats a key": ("circuit", b'{"edges": [], "edges": ["m1->logits"]}'),
    "chosen is negative": ("group", _edited(MASK, chosen=[-1])),
    "chosen is a fraction": ("group", _edited(MASK, chosen=[0.5])),
    "chosen twice": ("group", _edited(MASK, chosen=[0, 0])),
    "group repeats a key": ("group", json.dumps(MASK).encode()[:-1] + b', "chosen": [1]}'),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_side_file_is_an_error_at_its_line(name: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    kind, path = FILES[MALFORMED[name][0]]
    (tmp_path / path).write_bytes(MALFORMED[name][1])
    began = time.process_time()
    ((code, written),) = list_errors(tmp_path, kind)
    assert code == "E0342"
    assert written in USES[kind][0]
    assert time.process_time() - began < 2


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "end": lambda content: content[:-4],
    "half": lambda content: content[: len(content) // 2],
    "header": lambda content: content[:12],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"1234",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["weights", "encoder", "direction", "cfg.json", "circuit"])
def test_truncated_side_file_is_an_error(name: str, cut: str, tmp_path: Path) -> None:
    write_files(tmp_path)
    kind, path = FILES[name]
    (tmp_path / path).write_bytes(CUTS[cut]((tmp_path / path).read_bytes()))
    ((code, written),) = list_errors(tmp_path, kind)
    assert code in ("E0342", "E0341")
    assert written in USES[kind][0]


def test_sound_side_files_are_valid_and_mutated_ones_never_internal_errors(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert {kind: list_errors(tmp_path, kind) for kind in USES} == {kind: [] for kind in USES}
    draw = random.Random(0)
    for kind, path in FILES.values():
        sound = (tmp_path / path).read_bytes()
        for _ in range(8):
            mutated = bytearray(sound)
            for _ in range(draw.randint(1, 4)):
                place = draw.randrange(min(len(mutated), 300))
                mutated[place : place + draw.randint(0, 3)] = draw.choice(
                    [b"NaN", b"1e999", b'"', b"[", b"-1", b"null", b"\xff", b"true", b"{", b"&a *a"]
                )
            (tmp_path / path).write_bytes(mutated)
            assert {code for code, _ in list_errors(tmp_path, kind)} <= {"E0341", "E0342"}
        (tmp_path / path).write_bytes(sound)
