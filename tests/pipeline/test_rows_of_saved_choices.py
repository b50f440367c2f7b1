"""Prompts that groups and circuits in files were chosen on, next to the measured prompts."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import mechdsl
from mechdsl.diagnostics.rendering import render_full

torch.set_num_threads(1)
NAMES = ("Mary", "John", "Tom", "Anna", "Luke")
HEAD = """mech 1
model lm = zoo("names")
prompts ioi {
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a bag to"
  answer " {io}"
  corrupt abc { io, s1, s2 = others(io, s) }
  split 50%
}
prompts more {
  io in ["Mary", "John", "Tom", "Anna", "Luke"]
  s = other(io)
  place in ["shop", "park"]
  template "When {io} and {s1 = s} went to the {place}, {s2 = s} gave a bag to"
  answer " {io}"
  corrupt abc { io, s1, s2 = others(io, s) }
}
"""
USE = (
    "experiment e {{\n  prompts {}\n  from abc into clean\n  {}\n"
    "  measure logit(answer) as {}\n{}}}\n"
)
KINDS = {
    "circuit": (
        "circuit c = fit(eap(size: 12), prompts: ioi.train, from: abc, maximise: logit(answer))",
        'circuit c = saved("out/c/mask.json")',
        ("ablate all but c at tokens * with abc", "faithfulness"),
    ),
    "group": (
        "group c = fit(atp(size: 3), prompts: ioi.train, from: abc, maximise: logit(answer)) "
        "at layers * heads * at last token",
        'group c = saved("out/c/mask.json")',
        ("patch c at last token", "delta"),
    ),
    "search": (
        "group c = fit(forward_selection(size: 1), prompts: ioi.train, from: abc, "
        "minimise: logit(answer)) at layers * heads * at last token",
        'group c = saved("out/c/mask.json")',
        ("patch c at last token", "delta"),
    ),
    "mask": (
        "group c = fit(mask(size: 3), prompts: ioi.train, from: abc, steps: 2, "
        "maximise: logit(answer)) at layers * heads * at last token",
        'group c = saved("out/c/mask.json")',
        ("patch c at last token", "delta"),
    ),
}


def write(folder: Path, *parts: str) -> Path:
    path = folder / "file.mech"
    path.write_text("\n".join((HEAD, *parts)), encoding="utf-8")
    return path


def use(kind: str, block: str, *more: str) -> str:
    rule, effect = KINDS[kind][2]
    return USE.format(block, rule, effect, "".join(f"  {each}\n" for each in more))


def digest(io: str, s: str, place: str) -> str:
    """The digest of a prompt, from its text."""
    text = f"When {io} and {s} went to the {place}, {s} gave a bag to"
    return sha256(text.encode()).hexdigest()[:16]


def run(path: Path) -> tuple[Any, list[str]]:
    done = mechdsl.run(path, store=False)
    shared = [render_full([each]) for each in done.diagnostics if each.code == "W0738"]
    return done["e"], shared


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
@pytest.mark.parametrize(
    "kind",
    ["circuit", "search", *(pytest.param(k, marks=pytest.mark.slow) for k in ("group", "mask"))],
)
def test_rows_of_a_choice_in_a_file_are_compared_with_measured_rows(
    kind: str, tmp_path: Path
) -> None:
    trained, read, _ = KINDS[kind]
    path = write(tmp_path, trained, use(kind, "ioi.test"))
    mechdsl.fit(path, store=tmp_path / "store", out=tmp_path / "out")
    content = json.loads((tmp_path / "out" / "c" / "mask.json").read_text("utf-8"))
    rows, places = content["prompts"], ("shop", "park")
    every = {digest(io, s, place) for io in NAMES for s in NAMES for place in places}
    assert len(rows) == 5
    assert {*rows} <= every
    noun = f"{'circuit' if kind == 'circuit' else 'group'} c"
    found, shared = run(write(tmp_path, read, use(kind, "ioi.test")))
    assert found.conventions[noun].endswith("chosen on 5 prompts, none of which is measured here")
    assert not shared
    found, shared = run(write(tmp_path, read, use(kind, "more")))
    values = [found.row_values[name] for name in ("io", "s", "place")]
    count = sum(digest(*own) in rows for own in zip(*values, strict=True))
    assert 0 < count < 10
    said = f"chosen on 5 prompts; {count} of the 10 rows here have one of them"
    assert found.conventions[noun].endswith(said)
    assert len(shared) == 1
    assert "`e` measures prompts that `c` was chosen on" in shared[0]
    assert f"{count} of its 10 rows" in shared[0]
    del content["prompts"]
    (tmp_path / "out" / "c" / "mask.json").write_text(json.dumps(content), "utf-8")
    found, shared = run(write(tmp_path, read, use(kind, "more")))
    assert found.conventions[noun].endswith("so they may be measured here")
    assert not shared


@pytest.mark.filterwarnings("ignore::mechdsl.MechdslWarning")
def test_graph_file_names_the_rows_of_its_training(tmp_path: Path) -> None:
    trained, read, _ = KINDS["circuit"]
    path = write(tmp_path, trained, use("circuit", "ioi.test", 'report graph to "c.json"'))
    mechdsl.run(path, store=tmp_path / "store", fit=True)
    mechdsl.fit(path, store=tmp_path / "store", out=tmp_path / "out")
    mask = json.loads((tmp_path / "out" / "c" / "mask.json").read_text("utf-8"))
    assert json.loads((tmp_path / "c.json").read_text("utf-8"))["prompts"] == mask["prompts"]
    own = read.replace("out/c/mask.json", "c.json")
    exported = use("circuit", "more limit 4", 'report graph to "again.json"')
    _, shared = run(write(tmp_path, own, exported))
    assert len(shared) == 1
    assert json.loads((tmp_path / "again.json").read_text("utf-8"))["prompts"] == mask["prompts"]
    own = own.replace("c.json", "again.json")
    _, shared = run(write(tmp_path, own, use("circuit", "more limit 4")))
    assert len(shared) == 1
