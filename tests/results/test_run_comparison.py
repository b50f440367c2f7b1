"""Comparison of whole runs: inputs, verdicts, and added or removed items."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from mechdsl.base.arrays import Floats
from mechdsl.results.differences.comparison import compare_results, differences_schema
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    FileResult,
    LostExperiment,
)
from mechdsl.results.results import Results
from mechdsl.statistics.corrections import holm
from mechdsl.statistics.measurements import MeasureData, MissingReason

from .synthetic import finished, measure
from .two_results import BASE, OLD, noise, plain, results, states, two

# --- values of only one run -----------------------------------------------------------------------


def test_cell_that_lost_its_value_is_removed_with_a_reason() -> None:
    new = OLD.copy()
    new[1] = np.nan
    gaps = ("", "it was NaN", "", "")
    found = two(measure(OLD, BASE), measure(new, BASE, gaps=gaps))
    assert states(found) == {"equal": 3, "lost": 1}
    (place,) = found.removed
    assert (place.experiment, place.measure, place.cell) == ("where", "delta of ld", "L0H1.z")
    assert place.reason == "it was NaN"
    assert found.changed
    back = two(measure(new, BASE, gaps=gaps), measure(OLD, BASE))
    assert (states(back), back.changed) == ({"equal": 3, "found": 1}, False)
    assert back.added == (place,)
    neither = two(measure(new, BASE, gaps=gaps), measure(new, BASE, gaps=gaps))
    assert (states(neither), neither.changed) == ({"equal": 3, "none": 1}, False)


def test_lost_measure_is_removed_with_a_reason() -> None:
    gone = replace(measure(OLD * np.nan, BASE), missing=MissingReason("E0604", "the divisor is 0"))
    found = two(measure(OLD, BASE), gone)
    assert states(found) == {"lost": 4}
    assert {each.reason for each in found.removed} == {"not computed (E0604): the divisor is 0"}


def test_cells_and_measures_of_only_one_run_are_added_or_removed() -> None:
    other = measure(OLD, BASE, label="other")
    old = finished(plain(measure(OLD, BASE), other))
    new = finished(plain(measure(OLD[:3], BASE)))
    found = compare_results(results(old), results(new))
    assert [(each.measure, each.cell) for each in found.removed] == [
        ("delta of other", None),
        (None, "L0H3.z"),
    ]
    assert states(found) == {"equal": 3}
    assert found.reasons == ("2 things gone",)
    back = compare_results(results(new), results(old))
    assert (back.added, back.changed) == (found.removed, False)


def test_unmatched_cells_with_equal_names_have_their_positions() -> None:
    """A rule whose tokens changed."""
    old = plain(measure(OLD, BASE))
    first = replace(old.cells[0], position="tokens *")
    new = replace(old, cells=(first, *old.cells[1:]))
    found = compare_results(results(finished(old)), results(finished(new)))
    assert [each.cell for each in found.removed] == ["L0H0.z at last-item token"]
    assert [each.cell for each in found.added] == ["L0H0.z at tokens *"]


@pytest.mark.parametrize(
    "other",
    [
        {"label": "x"},
        {"effect": "raw"},
        {"at": "last token"},
        {"kind": "category"},
        {"per_prompt": True},
    ],
)
def test_measures_match_only_by_label_effect_position_and_kind(other: dict[str, Any]) -> None:
    found = two(measure(OLD, BASE), measure(OLD, BASE, **other))
    assert (found.compared, len(found.added), len(found.removed)) == (0, 1, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"site": "L0H1.q"},
        {"position": "last token"},
        {"coords": {"layer": 7}},
        {"also": {"item": 2}},
    ],
)
def test_cells_match_only_by_coordinates_site_and_position(other: dict[str, Any]) -> None:
    old = finished(plain(measure(OLD, BASE)))
    cells = (replace(old.cells[0], **other), *old.cells[1:])
    found = compare_results(results(old), results(replace(old, cells=cells)))
    assert (found.compared, len(found.added), len(found.removed)) == (3, 1, 1)


def test_new_removed_and_lost_experiments_are_reported() -> None:
    one = finished(plain(measure(OLD, BASE)), "max(delta) > -1")
    two_ = replace(one, name="second")
    lost = LostExperiment(
        "second",
        (MissingReason("E0424", "the model gave NaN"),),
        (ExpectOutcome("max(delta) > -1", False, None, None, None, "not computed"),),
    )
    found = compare_results(results(one, two_), results(one, lost=(lost,)))
    (place,) = found.removed
    assert (place.experiment, place.reason) == (
        "second",
        "not computed (E0424): the model gave NaN",
    )
    assert [(each.experiment, each.turn) for each in found.verdicts] == [("second", "fails now")]
    assert found.reasons == ("1 expectation held before and not now", "1 thing gone")
    gone = compare_results(results(one, two_), results(one))
    assert [each.experiment for each in gone.removed] == ["second"]
    assert [each.turn for each in gone.verdicts] == ["gone"]
    assert gone.changed
    new = compare_results(results(one), results(one, two_))
    assert ([each.experiment for each in new.added], new.changed) == (["second"], False)
    assert compare_results(results(one, lost=(lost,)), results(one, lost=(lost,))).removed == ()


# --- verdicts and inputs --------------------------------------------------------------------------


def test_flipped_verdict_has_both_values() -> None:
    old = finished(
        plain(measure(BASE + 1 + 0.1 * noise(3, 1), BASE)), "mean(delta) > 0.5", "max(delta) > 3"
    )
    new = finished(
        plain(measure(BASE + 0.1 * noise(3, 1), BASE)), "mean(delta) > 0.5", "max(delta) < 3"
    )
    found = compare_results(results(old), results(new))
    flipped, fresh, gone = found.verdicts
    assert (flipped.turn, fresh.turn, gone.turn) == ("fails now", "new", "gone")
    assert flipped.text == "mean(delta) > 0.5"
    assert flipped.old is not None
    assert flipped.new is not None
    assert flipped.old.value == pytest.approx(1, abs=0.1)
    assert flipped.new.value == pytest.approx(0, abs=0.1)
    back = compare_results(results(new), results(old))
    assert back.verdicts[0].turn == "holds now"
    assert "1 expectation held before and not now" in found.reasons
    assert not any("expectation" in each for each in back.reasons)


def test_new_failing_verdict_does_not_mark_the_run_as_different() -> None:
    old = finished(plain(measure(OLD, BASE)))
    new = finished(plain(measure(OLD, BASE)), "max(delta) > 9")
    found = compare_results(results(old), results(new))
    assert ([each.turn for each in found.verdicts], found.changed) == (["new"], False)


def test_different_inputs_are_listed_without_marking_the_run_as_different() -> None:
    old = finished(plain(measure(OLD, BASE)))
    new = replace(
        finished(plain(measure(OLD, BASE, metric="logit(answer)")), confidence=90.0),
        hashes={"model": "b" * 64, "python f.py": "c" * 64},
        conventions={**old.conventions, "dtype": "bfloat16 on cuda", "interval": "other words"},
    )
    before = replace(results(old), versions={"torch": "2.12.0", "mechdsl": "1"})
    after = replace(
        results(new, hash="2" * 64, seed=3), versions={"torch": "2.13.0", "mechdsl": "1"}
    )
    found = compare_results(before, after)
    said = {each.what: (each.old, each.new) for each in found.inputs}
    assert said["text of the file"] == ("1" * 64, "2" * 64)
    assert said["seed"] == ("0", "3")
    assert said["version of torch"] == ("2.12.0", "2.13.0")
    assert said["dtype"] == ("float32", "bfloat16 on cuda")
    assert said["model (SHA-256)"] == ("sha256:1", "b" * 64)
    assert said["data (SHA-256)"] == ("sha256:2", None)
    assert said["python f.py (SHA-256)"] == (None, "c" * 64)
    assert said["metric of ld"] == ("logit(answer) - logit(wrong)", "logit(answer)")
    assert "confidence 90 " in (said["stats"][1] or "")
    assert not {"interval", "version of mechdsl"} & set(said)
    assert not found.changed


def test_input_differences_name_their_experiments() -> None:
    one = finished(plain(measure(OLD, BASE)))
    second = replace(one, name="second")
    moved = replace(second, hashes={**second.hashes, "model": "b" * 64})
    found = compare_results(results(one, second), results(one, moved))
    assert [(each.what, each.experiments) for each in found.inputs] == [
        ("model (SHA-256)", ("second",))
    ]


# --- all cells together ---------------------------------------------------------------------------


def test_p_is_corrected_over_all_cells_that_differ() -> None:
    """The correction spans all experiments and measures."""
    first = plain(measure(OLD, BASE), measure(OLD + noise(20), BASE, label="other"))
    second = replace(first, name="second")

    def moved(result: ExperimentResult, seed: int) -> ExperimentResult:
        new = [
            replace(data, patched=data.patched + noise(seed + n) / 4 + 0.05)
            for n, data in enumerate(result.measures)
        ]
        return finished(replace(result, measures=tuple(new)))

    found = compare_results(
        results(finished(first), finished(second)), results(moved(first, 30), moved(second, 40))
    )
    p = np.array([each.p for each in found.cells], dtype=np.float64)
    corrected = np.array([each.p_corrected for each in found.cells], dtype=np.float64)
    assert len(p) == 16
    np.testing.assert_allclose(corrected, holm(p))
    changed = np.array([each.state == "changed" for each in found.cells])
    np.testing.assert_array_equal(changed, corrected < 0.05)
    assert ((p < 0.05) & ~changed).any()
    assert found.conventions["correction"].startswith("Holm, over 16 cells")


@pytest.mark.parametrize(
    ("correction", "word"), [("none", "none"), ("bh", "Benjamini-Hochberg"), ("max", "Holm")]
)
def test_comparison_uses_the_correction_of_the_file(correction: str, word: str) -> None:
    found = two(measure(OLD, BASE), measure(OLD + noise(5), BASE), correction=correction)
    assert found.conventions["correction"].startswith(word)
    if correction == "none":
        assert all(each.p == each.p_corrected for each in found.cells)


@pytest.mark.parametrize("words", [("none", "bh"), ("bh", "none"), ("none", "holm")])
def test_comparison_uses_holm_if_experiments_disagree(words: tuple[str, str]) -> None:
    def run(values: Floats) -> Results:
        each = plain(measure(values, BASE))
        first = finished(each, correction=words[0])
        return results(first, finished(replace(each, name="second"), correction=words[1]))

    found = compare_results(run(OLD), run(OLD + noise(5)))
    assert found.conventions["correction"].startswith("Holm, over 8 cells")


def test_comparison_always_uses_the_skewness_corrected_t() -> None:
    new = OLD + 0.3 + 0.2 * noise(6)
    found = [two(measure(OLD, BASE), measure(new, BASE), test=test) for test in ("t", "flips")]
    assert states(found[0]) == {"changed": 4}
    assert "corrected for skewness" in found[0].conventions["interval"]
    assert [each.p for each in found[0].cells] == [each.p for each in found[1].cells]


def test_comparison_uses_the_confidence_of_the_file() -> None:
    new = measure(OLD + 0.35 + 0.8 * noise(7), BASE)
    usual = two(measure(OLD, BASE), new, correction="none")
    strict = two(measure(OLD, BASE), new, correction="none", confidence=99.999)
    assert usual.changed_cells
    assert not strict.changed_cells
    one, other = usual.cells[0], strict.cells[0]
    assert other.high - other.low > one.high - one.low  # type: ignore[operator]


Pair = Callable[[np.random.Generator], tuple[MeasureData, MeasureData, Any]]


def _noise_on_rows(random: np.random.Generator) -> tuple[MeasureData, MeasureData, Any]:
    base = random.normal(0, 1, (1, 16))
    old = base + random.normal(0, 1, (6, 16))
    return measure(old, base), measure(old + random.normal(0, 0.5, old.shape), base), None


def _other_rows(random: np.random.Generator) -> tuple[MeasureData, MeasureData, Any]:
    sides = [random.normal(0, 1, (1, n)) for n in (16, 12)]
    old, new = (measure(base + random.normal(0.3, 1, (6, base.shape[1])), base) for base in sides)
    return old, new, tuple(range(500, 512))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [_noise_on_rows, _other_rows])
def test_comparison_has_at_most_5_percent_false_positives(pair: Pair) -> None:
    """More than 16 of 120 pairs differ by chance with a probability of 0.0001."""
    random = np.random.default_rng(50)
    wrong = 0
    for _ in range(120):
        old, new, keys = pair(random)
        wrong += two(old, new, keys=keys, resamples=100).changed
    assert wrong <= 16


def test_differences_document_matches_its_schema() -> None:
    new = OLD.copy()
    new[2] += 0.5
    new[3] = np.nan
    found = two(measure(OLD, BASE), measure(new, BASE), "max(delta) > 0")
    document = json.loads(found.to_json())
    schema = differences_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    assert document["schema"] == 1
    assert document["changed"] is True
    (cell,) = document["cells"]
    assert cell["coords"] == {"layer": 0, "head": 2}
    assert cell["difference"] == pytest.approx(0.5)
    assert document["removed"][0]["cell"] == "L0H3.z"
    assert document["counts"] == {"equal": 2, "changed": 1, "lost": 1}
    assert not any(isinstance(v, float) and math.isnan(v) for v in cell.values())


def test_text_states_the_difference_and_the_differing_rows() -> None:
    new = OLD.copy()
    new[2] += 0.5
    text = two(measure(OLD, BASE), measure(new, BASE)).to_text(200)
    (line,) = [line for line in text.splitlines() if "difference 0.5" in line]
    assert "difference 0.500 [0.500, 0.500], p corrected" in line
    assert "values changed in 24 of 24 rows, by at most 0.500" in line
    assert "1 cell changed beyond noise" in text
    assert "equal bit for bit: 3" in text


def test_several_files_are_matched_by_name() -> None:
    one = finished(plain(measure(OLD, BASE)))
    moved = finished(plain(measure(OLD + 1, BASE)))
    old = Results((FileResult("a.mech", (one,)), FileResult("b.mech", (one,))))
    new = Results((FileResult("b.mech", (moved,)), FileResult("a.mech", (one,))))
    found = compare_results(old, new)
    assert {each.experiment for each in found.changed_cells} == {"where of b.mech"}
    less = compare_results(old, Results((FileResult("a.mech", (one,)),)))
    assert [each.experiment for each in less.removed] == ["where of b.mech"]
    renamed = compare_results(Results((old.files[0],)), Results((new.files[0],)))
    assert len(renamed.changed_cells) == 4
