"""Effects, rows that are kept, split and limited, parameters, and changed inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mechdsl.base.text import Source
from mechdsl.checks.file_check import CheckSettings
from mechdsl.pipeline.options import RunOptions

from ..fruit import FRUIT
from ..reference.forward import forward
from ..reference.points import Point, copied
from ..run_source import run_source
from .support import (
    ABSOLUTE,
    DIFFERENCE,
    MODES,
    PROMPTS,
    ROWS,
    Array,
    Prompt,
    Record,
    Runs,
    agree,
    bare,
    difference,
    differences,
    experiment,
    ids_of,
    patches,
    prompt,
    prompts,
    run_file,
    token,
    try_file,
    unpatched,
)

RULE = "patch resid_post layer 0..1 at {cue token, last token}"
CELLS = [[Point("resid_post", 0)], [Point("resid_post", 1)]]
START = ("prompts p", "from longer into clean")
FAMILY = "llama"


def both(source: Prompt, base: Prompt) -> Runs:
    return [([source.cue, source.last], [base.cue, base.last])]


def distance(logits: Tensor, record: Record) -> float:
    """KL of the run `longer` from this one, never 0 on the clean prompts."""
    other = unpatched(FAMILY, prompt(record, "longer"))[0][-1].double().log_softmax(-1)
    return float((other.exp() * (other - logits[-1].double().log_softmax(-1))).sum())


def probability(logits: Tensor, record: Record) -> float:
    return float(logits[-1].double().softmax(-1)[token(record["a"])])


def by_hand() -> tuple[Array, Array, Array]:
    """Patched, base and source values of `distance`."""
    patched = patches(FAMILY, CELLS, "longer", both, distance)
    base = differences(FAMILY, ROWS, metric=distance)
    return patched, base, differences(FAMILY, ROWS, "longer", metric=distance)


APART = "stats bootstrap(100) confidence 80% correct none"
"""With these four rows, the ends of `distance` differ at 80 % confidence, not at 95 %."""
EFFECTS = ("raw", "total", "delta", "recovery", "relative", "relative per prompt")


@pytest.mark.parametrize("effect", EFFECTS)
def test_effects_equal_their_formula_of_means(folder: Path, effect: str) -> None:
    patched, base, source = by_hand()
    expected = {
        "raw": patched.mean(1),
        "total": np.full(2, (source - base).mean()),
        "delta": (patched - base).mean(1),
        "recovery": (patched - base).mean(1) / (source - base).mean(),
        "relative": (patched - base).mean(1) / abs(base.mean()),
        "relative per prompt": ((patched - base) / abs(base)).mean(1),
    }[effect]
    text = experiment("e", *START, RULE, f"measure kl(longer) as {effect}", stats=APART)
    for options in MODES.values():
        statistics = run_file(text, folder, bare(FAMILY), options)["e"].statistics[0]
        np.testing.assert_allclose(statistics.mean, expected, atol=1e-4, rtol=1e-3)
        np.testing.assert_allclose(statistics.base_mean, base.mean(), atol=1e-4)
        np.testing.assert_allclose(statistics.source_mean, source.mean(), atol=1e-4)
        if effect == "raw":
            assert np.isnan(statistics.p).all(), "a raw value is no difference"


def test_recovery_is_0_at_the_base_and_1_at_the_source(folder: Path) -> None:
    rules = "patch logits at last token"
    text = experiment("one", *START, rules, "measure kl(longer) as recovery", stats=APART)
    text += experiment(
        "zero", *START, "patch resid_post layer 0 at last token with clean",
        "measure kl(longer) as recovery", stats=APART,
    )  # fmt: skip
    found = run_file(text, folder, bare(FAMILY))
    assert found["one"].statistics[0].mean[0] == pytest.approx(1, abs=1e-5)
    assert found["zero"].statistics[0].mean[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mode", list(MODES))
def test_keep_excludes_and_counts_dropped_rows(folder: Path, mode: str) -> None:
    values = differences(FAMILY, ROWS, metric=probability)
    bound = float(np.sort(values)[1:3].mean())
    kept = [n for n, value in enumerate(values) if value > bound]
    text = experiment("e", *START, f"keep prob(answer) > {bound:.9f}", RULE, DIFFERENCE)
    found = run_file(text, folder, bare(FAMILY), MODES[mode])["e"]
    assert found.row_ids == tuple(kept)
    assert "2 rows kept, 2 dropped" in found.conventions["keep"]
    expected = patches(FAMILY, CELLS, "longer", both)[:, kept]
    agree(found.measures[0], expected, differences(FAMILY, ROWS)[kept])
    assert found.statistics[0].n.tolist() == [2, 2]


def test_keep_reads_the_clean_run_for_any_base(folder: Path) -> None:
    values = differences(FAMILY, ROWS, metric=probability)
    bound = float(np.sort(values)[1:3].mean())
    lines = ("prompts p", "from clean into longer", f"keep prob(answer) > {bound:.9f}")
    text = experiment("e", *lines, RULE, DIFFERENCE)
    found = run_file(text, folder, bare(FAMILY))["e"]
    assert found.row_ids == tuple(n for n, value in enumerate(values) if value > bound)


def test_mean_ablation_averages_over_the_rows_after_keep(folder: Path) -> None:
    values = differences(FAMILY, ROWS, metric=probability)
    bound = float(np.sort(values)[:2].mean())
    kept = [n for n, value in enumerate(values) if value > bound]
    assert len(kept) > 2  # the mean of two rows is their median, too
    rule = "ablate resid_post layer 0 at last token with mean"
    text = experiment("e", "prompts p", f"keep prob(answer) > {bound:.9f}", rule, DIFFERENCE)
    place = ("resid_post", 0)
    mean = torch.stack([unpatched(FAMILY, prompts()[n])[1][place][-1] for n in kept]).mean(0)
    expected = []
    for n in kept:
        base = prompts()[n]
        edits = copied([Point(*place)], {place: mean[None]}, [0], [base.last])
        expected.append(difference(forward(FAMILY, bare(FAMILY), base.ids, edits).logits, ROWS[n]))
    for options in MODES.values():
        measure = run_file(text, folder, bare(FAMILY), options)["e"].measures[0]
        agree(measure, np.array([expected]), differences(FAMILY, ROWS)[kept], large=0.02)


@pytest.mark.parametrize("mode", list(MODES))
def test_mean_of_a_corrupted_run_averages_that_run(folder: Path, mode: str) -> None:
    rule = "ablate resid_post layer 0 at {cue token, last token} with mean of longer"
    text = experiment("e", "prompts p", rule, DIFFERENCE)
    place = ("resid_post", 0)
    sources = prompts("longer")
    mean = torch.stack([unpatched(FAMILY, p)[1][place][[p.cue, p.last]] for p in sources]).mean(0)
    expected = []
    for base, record in zip(prompts(), ROWS, strict=True):
        edits = copied([Point(*place)], {place: mean}, [0, 1], [base.cue, base.last])
        expected.append(difference(forward(FAMILY, bare(FAMILY), base.ids, edits).logits, record))
    found = run_file(text, folder, bare(FAMILY), MODES[mode])["e"].measures[0]
    agree(found, np.array([expected]), differences(FAMILY, ROWS))


def test_split_parts_are_disjoint_and_complete(folder: Path) -> None:
    split = PROMPTS.replace('rows "data.jsonl"', 'rows "data.jsonl"  split 50%')
    text = "".join(
        experiment(part, f"prompts p.{part}", "from longer into clean", RULE, DIFFERENCE)
        for part in ("train", "test")
    )
    found = run_file(text, folder, bare(FAMILY), prompts=split)
    train, test = found["train"].row_ids, found["test"].row_ids
    assert train is not None
    assert test is not None
    assert len(train) == len(test) == 2
    assert sorted({*train, *test}) == [0, 1, 2, 3]
    whole = patches(FAMILY, CELLS, "longer", both)
    for name, rows in (("train", train), ("test", test)):
        base = differences(FAMILY, ROWS)[[*rows]]
        agree(found[name].measures[0], whole[:, [*rows]], base)


def test_limit_leaves_values_unchanged(folder: Path) -> None:
    whole, base = patches(FAMILY, CELLS, "longer", both), differences(FAMILY, ROWS)
    text = experiment("e", "prompts p limit 3", "from longer into clean", RULE, DIFFERENCE)
    for limit in (None, 2):
        options = RunOptions(settings=CheckSettings(limit=limit))
        found = run_file(text, folder, bare(FAMILY), options)["e"]
        assert found.row_ids is not None
        assert len(found.row_ids) == (limit or 3)
        rows = [*found.row_ids]
        agree(found.measures[0], whole[:, rows], base[rows])


@pytest.mark.parametrize(("given", "layer"), [({}, 1), ({"depth": "0"}, 0)])
def test_parameter_of_the_run_overrides_the_file(
    folder: Path, given: dict[str, str], layer: int
) -> None:
    rule = "patch resid_post layer depth at {cue token, last token}"
    text = "param depth = 1\n" + experiment("e", *START, rule, DIFFERENCE)
    options = RunOptions(settings=CheckSettings(given))
    found = run_file(text, folder, bare(FAMILY), options)["e"]
    expected = patches(FAMILY, [CELLS[layer]], "longer", both)
    agree(found.measures[0], expected, differences(FAMILY, ROWS))


def test_denominator_around_zero_is_an_error_before_any_cell(folder: Path) -> None:
    text = experiment("e", *START, RULE, "measure kl(longer) - kl(longer) as relative")
    found, diagnostics = try_file(text, folder, bare(FAMILY))
    assert found is None
    assert [d.code for d in diagnostics if d.severity == "error"] == ["E0604"]


# --- changed inputs -------------------------------------------------------------------------------


def plain_difference(words: list[str], record: Record) -> float:
    return difference(forward(FAMILY, bare(FAMILY), ids_of(words)).logits, record)


@pytest.mark.parametrize("mode", list(MODES))
def test_replace_equals_a_prompt_with_the_new_text(folder: Path, mode: str) -> None:
    rules = {
        "subject": ('replace subject tokens with "w7"', lambda r: (r["words"], ["w7"], r["cue"])),
        "cue": ('replace cue tokens with "w7 w8"', lambda r: (r["words"], None, "w7 w8")),
        "items": (
            'replace item tokens with "w7"',
            lambda r: (["w7"] * len(r["words"]), None, r["cue"]),
        ),
        "list": ('replace xs tokens with "w7"', lambda r: (["w7"], None, r["cue"])),
    }
    text = "".join(
        experiment(name, "prompts p", rule, DIFFERENCE) for name, (rule, _) in rules.items()
    )
    found = run_file(text, folder, bare(FAMILY), MODES[mode])
    for name, (_, parts) in rules.items():
        expected = []
        for record in ROWS:
            words, subject, cue = parts(record)
            subject = subject or record["subject"].split()
            whole = [*words, "w40", *subject, "w41", *cue.split(), "w42"]
            expected.append(plain_difference(whole, record))
        agree(found[name].measures[0], np.array([expected]), differences(FAMILY, ROWS))


@pytest.mark.parametrize("measure", ["entropy at cue token", "loss", "cosine(L1.resid, clean)"])
def test_replaced_shorter_prompts_are_not_read_past_their_end(folder: Path, measure: str) -> None:
    """The position of the other measure is after the end of the replaced prompts."""
    text = experiment("e", "prompts p", 'replace subject tokens with "w7"', DIFFERENCE)
    text += experiment("other", *START, RULE, f"measure {measure} as delta")
    text += experiment("late", *START, RULE, "measure entropy at cue token as delta")
    expected = [
        plain_difference([*r["words"], "w40", "w7", "w41", r["cue"], "w42"], r) for r in ROWS
    ]
    for options in MODES.values():
        found = run_file(text, folder, bare(FAMILY), options)["e"].measures[0]
        agree(found, np.array([expected]), differences(FAMILY, ROWS))


def test_sweep_of_replacements_has_a_cell_per_position(folder: Path) -> None:
    text = experiment("e", "prompts p", 'replace cue token, "w41" token with "w7"', DIFFERENCE)
    expected = []
    for place in (-2, -3):
        row = []
        for record in ROWS:
            words = list(prompt(record).words)
            words[place] = "w7"
            row.append(plain_difference(words, record))
        expected.append(row)
    for options in MODES.values():
        measure = run_file(text, folder, bare(FAMILY), options)["e"].measures[0]
        agree(measure, np.array(expected), differences(FAMILY, ROWS))


CHANGED = """
prompts c {
  rows "data.jsonl"
  xs = list(item, from: words, sep: " ")
  template "{xs} w40 {cue} w41 {cue2} w42"
  answer " {a}"
  wrong " {b}"
  corrupt crossed { swap cue, cue2 }
  corrupt blank { replace item tokens with "w7" }
  corrupt one { replace xs tokens with "w7" }
  corrupt written { template "{xs} w40 {cue2} w44 {cue} w42 w45" }
}
"""


def changed(record: Record, run: str) -> list[str]:
    words, one, two = record["words"], record["cue"], record["cue2"]
    return {
        "clean": [*words, "w40", one, "w41", two, "w42"],
        "crossed": [*words, "w40", two, "w41", one, "w42"],
        "blank": [*["w7"] * len(words), "w40", one, "w41", two, "w42"],
        "one": ["w7", "w40", one, "w41", two, "w42"],
        "written": [*words, "w40", two, "w44", one, "w42", "w45"],
    }[run]


@pytest.mark.parametrize("run", ["crossed", "blank", "one", "written"])
@pytest.mark.parametrize("direction", ["into the clean run", "out of the clean run"])
def test_corruption_equals_its_written_prompt(folder: Path, run: str, direction: str) -> None:
    """Both directions, at the token of `cue`, whose position differs between runs."""
    source, base = (run, "clean") if direction == "into the clean run" else ("clean", run)
    rule = "patch resid_post layer 0..1 at cue token"
    lines = ("prompts c", f"from {source} into {base}", rule, DIFFERENCE)
    expected = np.zeros((2, len(ROWS)))
    unchanged = np.zeros((2, len(ROWS)))
    for n, record in enumerate(ROWS):
        texts = [changed(record, source), changed(record, base)]
        for number, words in enumerate(texts):
            unchanged[number, n] = plain_difference(words, record)
        seen = forward(FAMILY, bare(FAMILY), ids_of(texts[0])).seen
        items = {"one": 1}
        at = [
            [items.get(r, len(record["words"])) + 2 + 2 * (r == "written")] for r in (source, base)
        ]
        for layer in (0, 1):
            edits = copied([Point("resid_post", layer)], seen, *at)
            logits = forward(FAMILY, bare(FAMILY), ids_of(texts[1]), edits).logits
            expected[layer, n] = difference(logits, record)
    for options in MODES.values():
        text = experiment("e", *lines)
        measure = run_file(text, folder, bare(FAMILY), options, prompts=CHANGED)["e"].measures[0]
        agree(measure, expected, unchanged[1], large=0.02)
        assert measure.source is not None
        np.testing.assert_allclose(measure.source[0], unchanged[0], atol=ABSOLUTE)


KEPT = (
    FRUIT
    + """
experiment e {
  prompts fruit limit 64
  from clean into fewer
  keep expected(1..9) < 3.5
  patch layer * head * at AT
  measure logit(answer) as delta
  stats correct SAID
}
"""
)


@pytest.mark.parametrize(
    ("correction", "at", "warned"),
    [
        ("holm", "last token", True),
        ("none", "last token", False),
        ("holm", "last-item token", False),
    ],
)
def test_too_few_rows_after_keep_are_a_warning(correction: str, at: str, warned: bool) -> None:
    """2⁻⁸ times 16 cells is too large; at the earlier token, only 12 cells can differ."""
    source = Source(KEPT.replace("SAID", correction).replace("AT", at))
    found, diagnostics = run_source(source)
    assert found is not None
    kept = found.experiments[0].prompts
    assert kept == 9
    said = [(d.code, d.message) for d in diagnostics]
    wanted = ("W0720", f"with {kept} prompts, no cell can be significant after correction")
    assert said == ([wanted] if warned else [])
    spans = [d.span.text for d in diagnostics if d.span is not None]
    assert spans == (["expected(1..9) < 3.5"] if warned else [])
