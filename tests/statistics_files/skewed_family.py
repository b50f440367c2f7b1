"""An experiment whose deltas are lognormal without an effect: too skewed for a corrected p."""

from __future__ import annotations

import tempfile
import warnings
from contextlib import chdir
from pathlib import Path

import mechdsl
from mechdsl.diagnostics.core import Diagnostic

METRIC = '''"""Deltas are lognormal with a mean of 0, drawn by the logits of each row."""
from hashlib import blake2b
from math import e, exp
from random import Random

import torch

BASE = {}  # a row's last logits in the base run, which comes first


def skewed(logits, rows):
    found = []
    for line, row in zip(logits, rows):
        seen = line.detach().float().round(decimals=2).numpy().tobytes()
        base = BASE.setdefault(str(row["fruits"]), seen)
        draw = Random(blake2b(seen).digest())
        found.append(e**2 if seen == base else exp(draw.gauss(0, 2)))
    return torch.tensor(found)
'''
FILE = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}

metric skewed = python("metrics.py:skewed")

experiment heads {
  prompts fruit limit 32
  ablate layer * head * at last token with zero
  {measures}
  report table
}
"""


def too_skewed(
    measures: str = "measure skewed as delta",
) -> tuple[mechdsl.Results, list[Diagnostic]]:
    """Return the results and their diagnostics."""
    text = FILE.replace("{measures}", measures)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", mechdsl.MechdslWarning)
        Path("metrics.py").write_text(METRIC, encoding="utf-8")
        found = mechdsl.run(text, allow_python=True, progress=False, store=False)
    return found, list(found.diagnostics)
