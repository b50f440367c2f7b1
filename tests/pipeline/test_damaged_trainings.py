"""A damaged file of a stored training: the training is run again, and no result changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import mechdsl

HEAD = """mech 1
seed 3
model toy = zoo("counting")
prompts p {
  x in ["apple", "pear", "plum", "fig", "kiwi"]
  n in 1..6
  template "Part 1: {x} {x} plum Count {n}:"
  answer " 1"
  corrupt fewer { n -> n + 1 }
  split 70%
}
"""

ROWS = "prompts: p.train, limit: 8"

STEPS = f"{ROWS}, steps: 4, batch: 8"

EFFECT = f"{ROWS}, from: fewer, maximise: logit(answer), steps: 2"

TRAININGS = f"""
basis sparse = fit(sae(features: 32, k: 4), {STEPS}) at resid_post layer 1 at tokens *
basis across = fit(cross_layer_transcoder(features: 8, k: 2), {STEPS}) at mlp_out layer * at tokens *
basis turned = fit(das(dims: 2), {EFFECT}) at resid_post layer 1 at last token
direction moved = fit(vector(length: 2), {STEPS}, maximise: logit(answer)) at resid_post layer 1
lens tuned = fit(tuned_lens, {STEPS}) at resid_post layer 1 at tokens *
probe told = fit(ridge, {ROWS}, target: n) at resid_post layer 1 at last token
group heads_of = fit(mask(size: 2), {EFFECT}) at layers * heads * at last token
group scored = fit(atp(size: 2), {ROWS}, from: fewer, maximise: logit(answer)) at layers * heads * at last token
"""

RULES = {
    "sparse": "set resid_post layer 1 at last token to reconstruction of sparse",
    "across": "observe features of across at last token top 2 as act",
    "turned": "patch dims * of turned at last token from fewer",
    "moved": "add 1 * moved to resid_post layer 1 at last token",
    "tuned": "observe tuned_lens(tuned) layer 1 at last token as seen",
    "told": "observe probe(told) layer 1 at last token as read",
    "heads_of": "ablate heads_of at last token with zero",
    "scored": "ablate scored at last token with zero",
}

MEASURE = "measure logit(answer) as delta"

TEXT = HEAD + TRAININGS + "".join(
    f"experiment e_{name} {{\n  prompts p.test limit 3\n  {rule}\n  {MEASURE}\n}}\n"
    for name, rule in RULES.items()
)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 0x40
    path.write_bytes(content)


def _edit_card(path: Path) -> None:
    text = path.read_text("utf-8")
    digits = [place for place, character in enumerate(text) if character in "12345678"]
    place = digits[len(digits) // 2]
    path.write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :], "utf-8")


def _repeat_key(path: Path) -> None:
    (name, value), *_ = json.loads(path.read_text("utf-8")).items()
    text = path.read_text("utf-8").strip()
    path.write_text(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}", "utf-8")


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "bit": ("*", _flip),
    "truncation": ("*", lambda path: path.write_bytes(path.read_bytes()[:-16])),
    "edit": ("*.json", _edit_card),
    "missing": ("*", Path.unlink),
    "key": ("*.json", _repeat_key),
}
