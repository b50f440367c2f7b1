"""Merged results of several variants: values per prompt and cell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mechdsl.resolve.cells import CellKey
from mechdsl.results.assembly.combination import merge_variants
from mechdsl.results.experiment_result import ExperimentResult
from mechdsl.statistics.measurements import RandomControlValues

from .synthetic import heads, measure

LABELS = ((("source", "one"),), (("source", "two"),))


def variant(number: int, rows: tuple[int, ...], cells: int = 2, **values: Any) -> ExperimentResult:
    """Values encode their origin: 100 * variant + 10 * cell + row."""
    row = np.array(rows, dtype=np.float64)
    patched = 100.0 * number + 10.0 * np.arange(cells)[:, None] + row
    inert = np.arange(cells) == number
    number_of = measure(patched, 1000 + row, 2000 + 100 * number + row, label="n", inert=inert)
    kind = {"kind": "category", "effect": "raw", "label": "c", "truth": number + row[None]}
    draws = 1000.0 * number + np.arange(number + 1)[:, None, None] + np.zeros((cells, 1)) + row
    drawn = RandomControlValues((draws, draws), np.full(cells, number + 1), 20, "heads")
    return replace(
        heads(prompts=len(rows)),
        model="m",
        axes=("layer",),
        cells=tuple(CellKey({"layer": n}, f"L{n}.z") for n in range(cells)),
        measures=(number_of, measure(patched % 7, row, **kind)),
        runs={"clean": {"n": 1000 + row}},
        accuracy={"clean": row % 2},
        base="clean",
        source=f"s{number}",
        called={"clean": "p", f"s{number}": f"source {number}"},
        conventions={"dtype": "float32"},
        hashes={"model": "same", "data": f"d{number}"},
        row_ids=rows,
        row_values={"row": list(rows)},
        texts=tuple((f"t{n}",) for n in rows),
        hits=tuple(tuple((cell,) for _ in rows) for cell in range(cells)),
        drawn=drawn,
        **values,
    )


def joined(*results: ExperimentResult) -> ExperimentResult:
    return merge_variants(list(zip(LABELS, results, strict=True)))


def test_merged_variants_keep_values_of_common_prompts() -> None:
    found = joined(variant(1, (4, 5, 6, 8)), variant(2, (8, 7, 5, 4)))
    assert found.row_ids == (4, 5, 8), "in the order of the first"
    row = np.array([4, 5, 8])
    numbers, categories = found.measures
    expected = [[100 * n + 10 * cell + r for r in row] for n in (1, 2) for cell in (0, 1)]
    assert numbers.patched.tolist() == expected
    assert categories.patched.tolist() == (np.array(expected) % 7).tolist()
    assert numbers.base.tolist() == [(1000 + row).tolist()], "once, where all have the same"
    assert numbers.source is not None
    assert numbers.source.tolist() == [(2000 + 100 * n + row).tolist() for n in (1, 1, 2, 2)]
    assert numbers.inert.tolist() == [False, True, False, False]
    assert categories.source is None
    assert categories.truth is not None
    assert categories.truth.tolist() == [(n + row).tolist() for n in (1, 1, 2, 2)]
    assert found.runs["clean"]["n"].tolist() == (1000 + row).tolist()
    assert found.accuracy["clean"].tolist() == [0, 1, 0]
    assert list(found.row_values["row"]) == [4, 5, 8]
    assert found.conventions["prompts"] == "3 that all results have"


def with_units(result: ExperimentResult, number: int) -> ExperimentResult:
    """Rows 4 and 5 are one unit of the accuracy, 5 and 8 of the second variant's measure."""
    ids = result.row_ids or ()
    row = np.array(ids)
    seen = np.array([[5 if n == 8 else n for n in ids]]) if number == 2 else None
    numbers, categories = result.measures
    return replace(
        result,
        measures=(replace(numbers, seen=seen, rounding=0.5 * number + 0.0 * row[None]), categories),
        accuracy_units={"clean": np.where(row == 5, 4, row)},
        accuracy_rounding={"clean": row / 10},
        accuracy_rows={},
        row_keys=tuple(700 + n for n in ids),
        strata=row % 2,
    )


def test_merged_variants_keep_units_of_common_prompts() -> None:
    found = joined(with_units(variant(1, (4, 5, 6, 8)), 1), with_units(variant(2, (8, 7, 5, 4)), 2))
    assert found.accuracy_units["clean"].tolist() == [4, 4, 8]
    assert found.accuracy_rounding["clean"].tolist() == [0.4, 0.5, 0.8]
    assert found.row_keys == (704, 705, 708)
    assert found.strata is not None
    assert found.strata.tolist() == [0, 1, 0]
    numbers, categories = found.measures
    assert numbers.seen is not None
    own = [np.unique(cell, return_inverse=True)[1].tolist() for cell in numbers.seen]
    assert own == [[0, 1, 2], [0, 1, 2], [0, 1, 1], [0, 1, 1]]
    assert categories.seen is None
    assert numbers.rounding is not None
    assert numbers.rounding.tolist() == [[0.5] * 3] * 2 + [[1.0] * 3] * 2


def test_variants_with_equal_prompts_have_no_prompts_convention() -> None:
    found = joined(variant(1, (4, 5)), variant(2, (4, 5)))
    assert "prompts" not in found.conventions
    one = variant(1, (4, 5))
    assert merge_variants([((), one)]) is one


def test_merged_variants_concatenate_cells_and_random_draws() -> None:
    found = joined(variant(1, (4, 5), cells=2), variant(2, (4, 5), cells=3))
    assert found.axes == ("source", "layer")
    assert [dict(cell.coords) for cell in found.cells] == [
        {"source": label, "layer": layer}
        for label, layers in (("one", 2), ("two", 3))
        for layer in range(layers)
    ]
    drawn = found.drawn
    assert drawn is not None
    assert drawn.counts.tolist() == [2, 2, 3, 3, 3]
    for values in drawn.values:
        assert values.shape == (3, 5, 2)
        for cell, number in enumerate((1, 1, 2, 2, 2)):
            own = values[: number + 1, cell]
            draws = np.arange(number + 1)[:, None]
            assert np.array_equal(own, 1000 * number + draws + np.array([4, 5]))
            assert np.isnan(values[number + 1 :, cell]).all()
    assert joined(variant(1, (4,)), replace(variant(2, (4,)), drawn=None)).drawn is None


def test_merged_draws_keep_only_common_prompts() -> None:
    found = joined(variant(1, (4, 5, 6)), variant(2, (5, 6, 7))).drawn
    assert found is not None
    assert found.values[0][0].tolist() == [[1005, 1006]] * 2 + [[2005, 2006]] * 2


def test_merged_variants_keep_only_agreed_run_names() -> None:
    one, two = variant(1, (4, 5)), variant(2, (4, 5))
    two = replace(two, called={**two.called, "clean": "q"})
    found = joined(one, two)
    assert found.source == "s1, s2"
    assert found.called == {}, "each calls the base otherwise, and has no name for the other's"
    same = {"clean": "p", "s1": "source 1", "s2": "source 2"}
    assert joined(replace(one, called=same), replace(two, called=same)).called == same


def test_texts_and_hits_are_kept_only_for_equal_prompts() -> None:
    one, two = variant(1, (4, 5)), variant(2, (5, 4))
    found = joined(one, two)
    assert found.texts == (("t4",), ("t5",))
    assert found.hits == (((0,), (0,)), ((1,), (1,))) * 2
    other = joined(one, replace(two, texts=(("x",), ("y",))))
    assert (other.texts, other.hits) == ((), ())


def test_runs_of_several_models_name_their_model() -> None:
    one, two = (with_units(variant(n, (4, 5)), n) for n in (1, 2))
    rows = {"clean": (4, 5)}
    one = replace(one, accuracy_rows=rows)
    two = replace(two, accuracy_rows=rows, accuracy_units={"clean": np.arange(2)}, model="tuned")
    found = joined(one, two)
    assert found.model == "m, tuned"
    assert list(found.runs) == ["clean (m)", "clean (tuned)"]
    for each in (found.accuracy, found.accuracy_rounding, found.accuracy_rows):
        assert list(each) == ["clean (m)", "clean (tuned)"]
    units = {run: own.tolist() for run, own in found.accuracy_units.items()}
    assert units == {"clean (m)": [4, 4], "clean (tuned)": [0, 1]}
    assert found.hashes == {"model": "same", "data of m": "d1", "data of tuned": "d2"}


def test_differing_conventions_name_their_variant() -> None:
    one, two = variant(1, (4,)), variant(2, (4,))
    assert joined(one, two).conventions == {"dtype": "float32"}
    found = joined(one, replace(two, conventions={"dtype": "bfloat16", "mask": "left"}))
    assert dict(found.conventions) == {
        "dtype": "one: float32; two: bfloat16",
        "mask": "two: left",
    }


def test_conventions_of_two_axes_name_only_the_distinguishing_axis() -> None:
    """One axis is named if it distinguishes the variants, else both."""
    each = [(("source", s), ("base", b)) for s in ("x", "y") for b in ("v", "w")]
    said = [{"fill": "0", "mask": "left"}, {"fill": "0", "mask": "right"}] * 2
    said[2:] = [{"fill": "1", "mask": "right"}, {"fill": "1", "mask": "left"}]
    parts = [
        (key, replace(variant(1, (4,)), conventions=own))
        for key, own in zip(each, said, strict=True)
    ]
    assert dict(merge_variants(parts).conventions) == {
        "fill": "x: 0; y: 1",
        "mask": "source x, base v, source y, base w: left; "
        "source x, base w, source y, base v: right",
    }
