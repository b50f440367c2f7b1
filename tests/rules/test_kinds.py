"""Rule types that a module outside the package registers."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings, check_source
from mechdsl.cli.entry import app
from mechdsl.resolve.cells import Coord
from mechdsl.resolve.types import ResolvedRule, VectorBatch
from mechdsl.rules.kinds import RULES, SiteRule, rule_kind

from ..parsing import format_file, parse
from ..quick import in_turn
from ..reference.forward import Write
from .support import (
    QUICK,
    agree,
    codes,
    difference,
    edited,
    experiment,
    plain,
    product,
    records,
    rows,
    run_file,
    table,
    tokens,
    unpatched,
)

ENTRY = Path(__file__).parent / "gizmo_rule.py"
ROOT = Path(__file__).parents[2]
LAYERS, HEADS = range(3), range(4)
TOY = """mech 1
model toy = zoo("counting")
prompts parts {
  a in 3..5
  item in ["apple", "pear"]
  apples = list(item, a, sep: " ")
  template "Part 1: {apples} Part 2: plum fig Count 1:"
  answer " {a}"
}
experiment e {
  model toy
  prompts parts
  stretch resid_post layer 0..1 at last token by 0.5
  measure prob(answer) as delta
  stats bootstrap(200) confidence 95% correct holm
}
"""


def _forget(verb: str) -> None:
    RULES._entries.pop(verb)  # type: ignore[attr-defined]


@pytest.fixture
def stretch() -> Iterator[None]:
    name = f"{__package__}.gizmo_rule"
    sys.modules.pop(name, None)
    importlib.import_module(name)
    yield
    _forget("stretch")


@pytest.fixture
def clip() -> Iterator[None]:
    @rule_kind("clip")
    class Clip(SiteRule):
        """`clip SITE at POSITIONS to NUMBER`: no number of the vector is larger."""

        takes = "to"
        reads = "run"

        def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
            read = vectors.read()
            return read.minimum(vectors.amounts[:, None].to(read))

    @rule_kind("flip")
    class Flip(SiteRule):
        """`flip SITE at POSITIONS`: what the vector is on another prompt, turned around."""

        reads = "donor"

        def values(self, rule: ResolvedRule, vectors: VectorBatch) -> Tensor:
            return -vectors.read()

    yield
    _forget("clip")
    _forget("flip")


def checked(text: str) -> list[str]:
    return [found.code for found in check_source(Source(text), CheckSettings()).diagnostics]


# --- values ---------------------------------------------------------------------------------------


def scaled(
    name: str, factor: float, site: str, at: str, layer: int, unit: int | None = None
) -> list[float]:
    """The reference difference of each prompt when a site is multiplied."""
    found: list[float] = []
    for text, record in zip(rows(), records(), strict=True):
        own = plain(name, text)[site, layer]
        writes = [
            Write(site, layer, factor * own[position, u], position, u)
            for position in tokens(text, at)
            for u in (range(own.shape[1]) if unit is None else [unit])
        ]
        found.append(difference(edited(name, text, writes).logits, record))
    return found


@pytest.mark.parametrize(("name", "mode"), in_turn(["gpt2", "llama"], QUICK))
def test_custom_rule_writes_the_values_of_its_class(
    stretch: None, data: Path, name: str, mode: str
) -> None:
    text = experiment("e", "stretch resid_post layer * at subject tokens by -0.5")
    text += experiment("f", "for x in [0, 1, 3] { stretch layer * head * at cue token by x }")
    found = run_file(text, data, name, mode)
    whole: dict[tuple[Coord | None, ...], Sequence[float]] = {
        (layer,): scaled(name, -0.5, "resid_post", "subject tokens", layer) for layer in LAYERS
    }
    agree(found["e"], ("layer",), whole, unpatched(name))
    heads: dict[tuple[Coord | None, ...], Sequence[float]] = {
        (x, layer, head): scaled(name, float(x), "z", "cue token", layer, head)
        for x, layer, head in product([0, 1, 3], LAYERS, HEADS)
    }
    agree(found["f"], ("x", "layer", "head"), heads, unpatched(name), most=False)


def test_custom_rule_marks_unchanged_rows_as_inert(stretch: None, data: Path) -> None:
    text = experiment("e", "for x in [1, 2] { stretch resid_post layer 1 at last token by x }")
    found = run_file(text, data, "llama", "planned")["e"]
    count = len(rows())
    assert found.conventions["inert"].startswith(f"1 of 2 cells, and {count} of {2 * count} rows")
    changed = np.abs(found.measures[0].patched - found.measures[0].base)
    assert changed[0].max() == 0
    assert changed[1].min() > 0


@pytest.mark.parametrize("mode", QUICK)
def test_custom_rules_with_different_factors_do_not_share_rows(
    stretch: None, data: Path, mode: str
) -> None:
    """Two experiments that differ only in the number, and one equal to the first."""
    text = "".join(
        experiment(key, f"stretch resid_post layer 1 at last token by {factor}")
        for key, factor in (("e", 2), ("f", 3), ("g", 2))
    ) + experiment("h", "set resid_post layer 1 at last token to 2")
    found = run_file(text, data, "llama", mode)
    one, other, same, number = (found[key].measures[0].patched for key in "efgh")
    np.testing.assert_allclose(
        one[0], scaled("llama", 2, "resid_post", "last token", 1, None), atol=1e-4
    )
    np.testing.assert_allclose(
        other[0], scaled("llama", 3, "resid_post", "last token", 1, None), atol=1e-4
    )
    np.testing.assert_allclose(same, one, atol=1e-5)
    assert np.abs(number - one).max() > 0.1


# --- output ---------------------------------------------------------------------------------------


def test_custom_rule_is_formatted_explained_and_drawn(stretch: None, tmp_path: Path) -> None:
    path = tmp_path / "toy.mech"
    path.write_text(TOY.replace("by 0.5", "by   0.5"), encoding="utf-8")
    tree, problems = parse(Source(path.read_text("utf-8")))
    assert not problems
    assert format_file(tree).strip() == format_file(parse(Source(TOY))[0]).strip()
    assert "  stretch resid_post layer 0..1 at last token by 0.5\n" in format_file(tree)
    run = CliRunner()
    said = {
        command: run.invoke(app, [command, str(path)]) for command in ("explain", "plan", "graph")
    }
    assert {one.exit_code for one in said.values()} == {0}
    assert "stretch resid_post layer 0..1 at last token by 0.5" in said["explain"].output
    assert "stretch 0.5" in said["graph"].output
    assert "Read" in said["graph"].output
    assert "e" in said["plan"].output


def test_unregistered_rule_is_a_syntax_error() -> None:
    assert checked(TOY) == ["E0101"]


def test_custom_rule_module_has_fewer_than_40_lines() -> None:
    assert len(ENTRY.read_text(encoding="utf-8").splitlines()) < 40


# --- custom verbs ---------------------------------------------------------------------------------


def test_custom_verb_equals_the_reference(clip: None, data: Path) -> None:
    text = experiment("e", "clip mlp_out layer * at last token to 0.1")
    found = run_file(text, data, "gpt2", "planned")["e"]

    def clipped(number: int, layer: int) -> float:
        prompt, record = rows()[number], records()[number]
        vector = plain("gpt2", prompt)["mlp_out", layer][prompt.last, 0].clamp(max=0.1)
        write = Write("mlp_out", layer, vector, prompt.last, 0)
        return difference(edited("gpt2", prompt, [write]).logits, record)

    expected = table([(n,) for n in LAYERS], clipped, len(rows()))
    agree(found, ("layer",), expected, unpatched("gpt2"))


def test_custom_verb_without_a_number_reads_other_rows(clip: None, data: Path) -> None:
    """Rows of `even` share their positions, and each gets the vector of one other row."""
    text = experiment("e", "flip resid_post layer 1 at cue token", block="even")
    found = run_file(text, data, "gpt2", "planned")["e"].measures[0].patched[0]
    every = rows("even")
    for number, (prompt, record) in enumerate(zip(every, records("even"), strict=True)):
        others = [
            plain("gpt2", other)["resid_post", 1][tokens(other, "cue token")[0], 0]
            for place, other in enumerate(every)
            if place != number
        ]
        at = tokens(prompt, "cue token")[0]
        writes = [Write("resid_post", 1, -vector, at, 0) for vector in others]
        wanted = [difference(edited("gpt2", prompt, [one]).logits, record) for one in writes]
        assert min(abs(found[number] - value) for value in wanted) < 1e-4
    text = experiment("e", "flip resid_post layer 1 at subject tokens")
    assert codes(text, data) == ["E0324"]


def test_custom_verb_remains_a_valid_name(clip: None) -> None:
    """The verb is a name wherever names are allowed, and starts a rule at the start of a line."""
    text = TOY.replace("  answer", '  clip in ["red", "blue"]\n  text clip_name = clip\n  answer')
    text = text.replace("stretch resid_post layer 0..1", "clip resid_post layer 0..1")
    text = text.replace("by 0.5", "to 0.5").replace(
        "  measure", "  report table clip\n  clip layer 1 head * at last token to 0\n  measure"
    )
    tree, problems = parse(Source(text))
    assert not problems
    assert "  report table clip\n  clip layer 1 head * at last token to 0\n" in format_file(tree)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clip layer 1 at last token by 2", "`to` and a number"),
        ("clip layer 1 at last token", "`to` and a number"),
        ("flip layer 1 at last token to 2", "no number after `flip`"),
    ],
)
def test_custom_verb_syntax_error_names_the_expected_word(
    clip: None, line: str, expected: str
) -> None:
    text = TOY.replace("stretch resid_post layer 0..1 at last token by 0.5", line)
    found = check_source(Source(text), CheckSettings()).diagnostics
    assert [one.code for one in found] == ["E0101"]
    assert vars(found[0])["expected"] == expected


def test_custom_verb_after_a_span_starts_a_rule(clip: None, data: Path) -> None:
    """The name of a number would also be valid there."""
    text = experiment(
        "e",
        "freeze z layer 1 at first token of subject clip mlp_out layer * at last token to 0.1",
    )
    found = run_file(text, data, "llama", "planned")["e"]
    assert found.axes == ("layer",)


@pytest.mark.parametrize(
    ("line", "meant"), [("pacth layer 3 at last token", "patch"), ("clpi layer 3 to 1", "clip")]
)
def test_misspelt_verb_is_suggested(clip: None, line: str, meant: str) -> None:
    text = TOY.replace("stretch resid_post layer 0..1 at last token by 0.5", line)
    found = check_source(Source(text), CheckSettings()).diagnostics
    # The missing layer of `patch` is reported too: the line is read as the suggested rule.
    assert [one.code for one in found] == ["E0102", "E0303"][: 2 if meant == "patch" else 1]
    assert vars(found[0])["meant"] == meant


def test_unregistered_verb_is_a_syntax_error() -> None:
    text = TOY.replace("stretch resid_post layer 0..1 at last token by 0.5", "clip layer 1 to 0")
    assert checked(text) == ["E0101"]


def test_keyword_or_registered_verb_is_rejected_at_registration() -> None:
    with pytest.raises(ValueError, match="`token` is a keyword"):
        rule_kind("token")
    with pytest.raises(ValueError, match="`patch` is registered twice"):
        rule_kind("patch")(SiteRule)


# --- documentation --------------------------------------------------------------------------------


def test_custom_rule_of_the_architecture_page_runs(tmp_path: Path) -> None:
    """Run the module and the command of `docs/architecture.md` verbatim."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = page.split("\n## Add a custom rule kind\n")[1].split("\n## ")[0]
    [module] = re.findall(r"```python\n(.*?)```", steps, re.DOTALL)
    [command] = re.findall(r"```sh\npython (.*?)\n```", steps, re.DOTALL)
    (tmp_path / "clip.py").write_text(module, encoding="utf-8")
    (tmp_path / "toy.mech").write_text(
        TOY.replace("stretch", "clip").replace("by 0.5", "to 0.5"), encoding="utf-8"
    )
    arguments = shlex.split(command.replace("FILE", "toy.mech"))
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "mechdsl", "validate", "toy.mech"],
        cwd=tmp_path, env=path, capture_output=True, text=True,
    )  # fmt: skip
    assert "unexpected `clip`" in alone.stdout + alone.stderr
