"""Probes of attribution graphs, against frozen models, fits in loops and bare passes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechdsl.pipeline.options import RunOptions
from mechdsl.store.store import Store

from ..execute import support as of_files
from ..execute.support import ids_of
from .models import bare, double
from .test_attribution_graphs import T0, T2, Frozen, transcoders
from .test_over_rows import (
    PROMPTS,
    RECORDS,
    SEED,
    Array,
    classes_told,
    dealt,
    dealt_values,
    ridge_told,
    words,
)

GROUP = "group a = features 1, 3, 8 of t0, feature 6 of t2\n"
PROBE = "observe graph_probe(t0, t2, {}) logits toward answer at last token as told"


@cache
def _right(family: str) -> tuple[str, ...]:
    """One answer per row; every second row has it right if it is a word."""
    known = {ids_of([f"w{n}"])[-1]: f"w{n}" for n in range(48)}
    found: list[str] = []
    for n, record in enumerate(RECORDS):
        logits = double(family)(torch.tensor([ids_of(words(record))])).logits[0, -1]
        best = known.get(int(logits.argmax()), "w7")
        found.append(best if n % 2 or n == 25 else "w7")
    return tuple(found)


def write(family: str, folder: Path) -> None:
    rows = [
        {"left": " ".join(r["left"]), "right": " ".join(r["right"]), "turn": " ".join(r["turn"]),
         "size": r["size"], "kind": r["kind"], "a": a}
        for r, a in zip(RECORDS, _right(family), strict=True)
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "many.jsonl").write_text(text, encoding="utf-8")


def run(family: str, folder: Path, *observe: str, groups: str = "") -> list[Any]:
    """The results of an experiment for each line."""
    write(family, folder)
    blocks = [
        f"experiment e{n} {{\n  model m\n  prompts p\n  {line}{n}\n}}\n"
        for n, line in enumerate(observe)
    ]
    text = f"seed {SEED}\n{T0}{T2}{groups}{''.join(blocks)}"
    found = of_files.run_file(text, folder, bare(family), prompts=PROMPTS)
    return list(found.values())


def columns(family: str, own: dict[int, Any], chosen: dict[int, list[int]]) -> Array:
    """[row, feature] the change of the answer's logit when the output of a feature is removed from
    the frozen model."""
    found: list[list[float]] = []
    for record, answer in zip(RECORDS, _right(family), strict=True):
        reference, target = Frozen(family, ids_of(words(record))), ids_of([answer])[-1]
        before, logits = reference.run_inputs()
        row: list[float] = []
        for layer, features in chosen.items():
            codes = own[layer].encode(before[layer])
            for feature in features:
                written = codes[:, [feature]] @ own[layer].weights["W_dec"][[feature]]
                change = logits - reference.run({layer: -written[None]})
                row.append(float(change[target]))
        found.append(row)
    return np.array(found)


def entropies(family: str) -> Array:
    found: list[float] = []
    for record in RECORDS:
        logits = double(family)(torch.tensor([ids_of(words(record))])).logits[0, -1]
        found.append(
            float(torch.distributions.Categorical(logits=logits.double()).entropy().detach())
        )
    return np.array(found)[:, None]


def varying(x: Array) -> Array:
    """Columns without those of features that are never active."""
    return x[:, np.abs(x).max(0) > 1e-6]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "transcoder"), pytest.param("gpt2", "jumprelu_transcoder", marks=pytest.mark.slow),
     pytest.param("gpt_neox", "sparsify", marks=pytest.mark.slow)],
)  # fmt: skip
def test_graph_probe_of_values_and_answers_equals_the_reference(
    family: str, kind: str, tmp_path: Path
) -> None:
    """A number, a class, and whether the next token is right, in three experiments of a file."""
    _, own = transcoders(family, kind, tmp_path, [0, 2])
    lines = [
        "target: size, features: a, penalty: 20, folds: 4",
        "target: kind, features: a, penalty: 5, folds: 4",
        "target: correct(answer), features: a, penalty: 5, folds: 4",
    ]
    found = run(family, tmp_path, *map(PROBE.format, lines), groups=GROUP)
    x, apart = varying(columns(family, own, {0: [1, 3, 8], 2: [6]})), entropies(family)
    assert x.shape[1] > 1
    size = np.array([[record["size"]] for record in RECORDS])
    fold = dealt("last token", 4)
    for given, y, got in (
        (x, size, found[0].measures[0]),
        (x, dealt_values("last token", size), found[0].measures[2]),
    ):
        np.testing.assert_allclose(got.patched[0], ridge_told(given, y, fold, 20), atol=5e-3)
    names = [record["kind"] for record in RECORDS]
    kinds = np.array([sorted(set(names)).index(each) for each in names])
    right = np.array([
        float(int(double(family)(torch.tensor([ids_of(words(r))])).logits[0, -1].argmax())
              == ids_of([a])[-1])
        for r, a in zip(RECORDS, _right(family), strict=True)
    ]).astype(int)  # fmt: skip
    assert 3 < right.sum() < 23
    for result, y in ((found[1], kinds), (found[2], right)):
        fold = dealt("last token", 4, [str(float(each)) for each in y])
        for given, targets, penalty, got in (
            (x, y, 5, result.measures[0]),
            (apart, y, 1, result.measures[1]),
            (x, dealt_values("last token", y), 5, result.measures[2]),
        ):
            expected = classes_told(given, targets, fold, penalty)
            assert got.patched[0].tolist() == expected.tolist()
    labels = [measure.label for measure in found[2].measures]
    assert labels == ["told2", "told2 baseline", "told2 shuffled"]
    assert [each.measures[0].unit for each in found] == ["R²", "share", "share"]
    said = found[2].conventions["observed"]
    assert "a linear probe of `correct(answer)`; its columns are, for each feature of `a`" in said


@pytest.mark.slow
def test_probe_without_a_group_has_a_column_for_each_active_feature(tmp_path: Path) -> None:
    _, own = transcoders("llama", "transcoder", tmp_path, [0, 2])
    (found,) = run("llama", tmp_path, PROBE.format("target: size, penalty: 20"))
    every = {layer: [*range(len(own[layer].weights["W_dec"]))] for layer in (0, 2)}
    x, size = varying(columns("llama", own, every)), np.array([[r["size"]] for r in RECORDS])
    assert x.shape[1] > 8
    expected = ridge_told(x, size, dealt("last token", 5), 20)
    np.testing.assert_allclose(found.measures[0].patched[0], expected, atol=5e-3)


def test_probe_of_an_answer_that_all_rows_have_wrong_is_a_gap(tmp_path: Path) -> None:
    transcoders("llama", "transcoder", tmp_path, [0, 2])
    (found,) = run("llama", tmp_path, PROBE.format('target: correct(" w3")'))
    assert np.isnan(found.measures[0].patched).all()
    reasons = [gap for gap in found.measures[0].gaps if gap]
    assert reasons == ['`correct(" w3")` is the same in all rows, in 26 rows, first in row 2']


CHANGES = {
    "target": ("target: size", "target: correct(answer)"),
    "value": ("target: size", "target: kind"),
    "group": ("features: a", "features: b"),
    "penalty": ("penalty: 5", "penalty: 5000"),
    "folds": ("folds: 4", "folds: 2"),
    "seed": (f"seed {SEED}", "seed 11"),
}


@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[pytest.mark.slow] * (c != "target")) for c in CHANGES]
)
def test_stored_values_depend_on_the_target_and_the_fit(change: str, tmp_path: Path) -> None:
    transcoders("llama", "transcoder", tmp_path, [0, 2])
    write("llama", tmp_path)
    line = PROBE.format("target: size, features: a, penalty: 5, folds: 4")
    groups = GROUP + "group b = features 2, 9 of t0\n"
    body = f"  model m\n  prompts p limit 14\n  {line}\n"
    text = f"seed {SEED}\n{T0}{T2}{groups}experiment e {{\n{body}}}\n"

    def ran(text: str, store: str) -> Array:
        with Store(tmp_path / store) as kept, kept.begin(text, {}) as opened:
            found, problems = of_files.try_file(
                text, tmp_path, bare("llama"), RunOptions(), run=opened, prompts=PROMPTS
            )
            assert found is not None, problems
            opened.finish({}, {})
        return np.stack([each.patched[0] for each in found.experiments[0].measures])

    first = ran(text, "store")
    changed = ran(text.replace(*CHANGES[change]), "store")
    np.testing.assert_array_equal(ran(text, "store"), first)
    np.testing.assert_array_equal(ran(text.replace(*CHANGES[change]), "fresh"), changed)
    assert not np.array_equal(first, changed)


WRONG = {
    "no target": ("features: a", "needs one value to predict"),
    "two targets": ("target: size, target: kind", "needs one value to predict"),
    "a number of the answer": ("target: logit(answer)", "needs a measure that is 0 or 1"),
    "a ridge of a class": ("target: correct(answer), kind: ridge", "needs no `kind`"),
    "an unknown value": ("target: sise", "sise"),
    "too many folds": ("target: kind, folds: 90", "can't be split"),
    "folds of nothing": ("target: correct(answer), folds: 1", "can't be `1`"),
    "other rows": ("target: kind, train: p", "has no option `train`"),
    "the same value": ("target: 3", "is the same in all rows"),
    "several tokens": ('target: correct(" w1 w2")', "has several tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_graph_probe_is_an_error(name: str, tmp_path: Path) -> None:
    transcoders("llama", "transcoder", tmp_path, [0, 2])
    write("llama", tmp_path)
    arguments, reason = WRONG[name]
    body = PROBE.format(arguments)
    text = f"{T0}{T2}{GROUP}experiment e {{\n  model m\n  prompts p\n  {body}\n}}\n"
    result, found = of_files.try_file(text, tmp_path, bare("llama"), prompts=PROMPTS)
    errors = [each for each in found if each.severity == "error"]
    assert result is None
    assert len(errors) == 1
    assert reason in errors[0].message
