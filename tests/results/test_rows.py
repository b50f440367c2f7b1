"""Rows: identity by content, indistinguishable rows, the design, and explained variance."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechdsl
from mechdsl.base.arrays import Floats
from mechdsl.execute.patching.rule_inputs import _permute_rows  # pyright: ignore[reportPrivateUsage]
from mechdsl.prompts.data_files import RecordOrder
from mechdsl.prompts.values import content_key
from mechdsl.results.assembly.population import largest_explained_variance
from mechdsl.results.experiment_result import ExperimentResult

START = 'mech 1\nmodel toy = zoo("counting")\n'
FRUITS = ("apple", "pear", "plum", "fig", "kiwi")


def run(text: str, folder: Path) -> dict[str, ExperimentResult]:
    path = folder / "file.mech"
    path.write_text(START + text, encoding="utf-8")
    results = mechdsl.run(path)
    return {each.name: each for each in results}


# --- draws depend on the content ------------------------------------------------------------------

PERMUTED = """
prompts facts {
  rows "facts.jsonl"
  extra = choice("apple", "pear")
  template "Part 1: {names}, {extra}. Count 1:"
  answer " {count}"
  corrupt noised { add gaussian(std: 3 sd, samples: 2) to embed at names tokens }
  corrupt moved { names = shuffle(names) }
  corrupt other { extra = other(extra) }
}
experiment noisy { model toy  prompts facts limit 12  from clean into noised
  patch resid_post layer * at last token
  measure logit(answer) as delta  expect max(delta) > 1 }
experiment drawn { model toy  prompts facts limit 12
  ablate layer 1..2 head * at last token with resample
  measure logit(answer) as delta  expect min(delta) < 0 }
experiment elsewhere { model toy  prompts facts limit 12  from clean into moved
  patch resid_post layer 2 at last token
  against random(3, positions)
  measure logit(answer) as delta }
"""


def records(seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    counts = [draw.randint(2, 8) for _ in range(18)]
    found = [
        {"names": ", ".join(draw.choice(FRUITS) for _ in range(count)), "count": count + 1}
        for count in counts
    ]
    return [*found, found[3], found[3]]


def by_content(result: ExperimentResult, values: Floats) -> list[tuple[Any, ...]]:
    """Return values with their row's content, in an order independent of the table."""
    rows = zip(result.row_values["names"], result.row_values["extra"], values.T, strict=True)
    return sorted((a, b, *np.round(own, 3).tolist()) for a, b, own in rows)


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_a_data_file(tmp_path: Path) -> None:
    """Noise, donors, random positions, shuffles, draws and the choice of `limit`."""
    found: list[dict[str, ExperimentResult]] = []
    lines = [json.dumps(each) for each in records(5)]
    for order in (lines, lines[::-1], random.Random(1).sample(lines, len(lines))):
        (tmp_path / "facts.jsonl").write_text("\n".join(order), encoding="utf-8")
        found.append(run(PERMUTED, tmp_path))
    first = found[0]
    for name, result in first.items():
        for other in (each[name] for each in found[1:]):
            data, again = result.measures[0], other.measures[0]
            assert other.row_ids != result.row_ids, "the file was sorted otherwise"
            assert other.row_keys == result.row_keys
            for before, after in ((data.patched, again.patched), (data.base, again.base)):
                np.testing.assert_allclose(after, before, atol=1e-4)
            assert by_content(result, data.patched) == by_content(other, again.patched)
            assert [o.holds for o in other.outcomes] == [o.holds for o in result.outcomes]
            for band, same in zip(result.controls, other.controls, strict=True):
                assert band is not None
                assert same is not None
                np.testing.assert_allclose(same.low, band.low, atol=1e-4)
    assert np.abs(first["noisy"].measures[0].patched - first["noisy"].measures[0].base).max() > 0.1
    assert np.ptp(first["drawn"].measures[0].patched[0] - first["drawn"].measures[0].base[0]) > 0.01


def test_equal_records_have_equal_noise(tmp_path: Path) -> None:
    line = json.dumps(records(5)[0])
    other = json.dumps(records(5)[1])
    (tmp_path / "facts.jsonl").write_text("\n".join([line, other, line, line]), encoding="utf-8")
    text = (
        PERMUTED.replace('choice("apple", "pear")', '"pear"')
        .replace("corrupt other { extra = other(extra) }", "")
        .replace("corrupt moved { names = shuffle(names) }", "")
    )
    text = text[: text.index("experiment drawn")].replace(" limit 12", "")
    result = run(text, tmp_path)["noisy"]
    assert result.row_keys is not None
    keys = np.array(result.row_keys)
    same = keys == max(result.row_keys, key=result.row_keys.count)
    assert same.sum() == 3
    base = result.measures[0].base[0]
    assert np.ptp(base[same]) < 1e-4
    assert abs(base[same][0] - base[~same][0]) > 1e-3


def test_content_key_depends_only_on_the_content() -> None:
    first = content_key({"a": 1, "b": ["x", {"c": None}]}, ["text"])
    assert first == content_key({"b": ["x", {"c": None}], "a": 1}, ["text"])
    assert 0 <= first < 2**63
    others = [
        content_key({"a": 1, "b": ["x", {"c": None}]}, ["text", ""]),
        content_key({"a": "1", "b": ["x", {"c": None}]}, ["text"]),
        content_key({"a": 1, "b": ["x", {"d": None}]}, ["text"]),
        content_key({"a": 1, "b": ["x", {"c": None}]}, ["tex", "t"]),
    ]
    assert len({first, *others}) == 5


def test_record_order_does_not_depend_on_the_file_order() -> None:
    data = [{"a": n % 4} for n in range(11)]
    found, turned = RecordOrder(data), RecordOrder(data[::-1])
    assert [data[n] for n in found.order] == [data[::-1][n] for n in turned.order]
    assert [data[n] for n in found.order] != data
    assert [found.order[rank] for rank in found.rank] == list(range(11))
    assert sorted(zip(found.keys, found.copies, strict=True)) == sorted(
        zip(turned.keys, turned.copies, strict=True)
    )
    assert sorted(found.copies) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_donor_rows_have_different_content_if_possible(seed: int) -> None:
    draw = random.Random(seed)
    for size in range(2, 9):
        keys = [draw.randint(0, 3) for _ in range(size + 3)]
        kept = np.array(sorted(draw.sample(range(size + 3), size)))
        donors = _permute_rows(kept, keys, seed)
        assert sorted(donors[kept]) == kept.tolist()
        assert all(donors[row] != row for row in kept)
        own = [keys[row] for row in kept]
        most = max(map(own.count, own))
        equal = sum(keys[donors[row]] == keys[row] for row in kept)
        assert equal == max(0, 2 * most - size), "no more than must be"


# --- rows that a measure can't distinguish --------------------------------------------------------


def spread(result: ExperimentResult, measure: int = 0) -> list[int]:
    """Return the number of distinct rows per cell; assert that equal rows have equal values."""
    data, found = result.measures[measure], list[int]()
    for cell, values in enumerate(data.patched):
        there = ~np.isnan(values)
        if data.seen is None:
            found.append(int(there.sum()))
            continue
        seen = data.seen[cell if len(data.seen) > 1 else 0][there]
        for number in np.unique(seen):
            assert np.ptp(values[there][seen == number]) < 1e-4
        found.append(len(np.unique(seen)))
    return found


LISTS = """
prompts fruit { count in 2..5  item in ["apple", "pear", "plum"]
  fruits = list(item, count, sep: ", ")
  template "Part 1: {fruits}. Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 } }
prompts blank { template "Part 1: thing Count 1:"  span slot = "thing" }
"""
BLANK = "model toy  from fruit into blank  prompts fruit limit 60"


def beginnings(result: ExperimentResult, items: int) -> int:
    """Count the distinct first items of rows directly."""
    return len({tuple(row[:items]) for row in result.row_values["fruits"] if len(row) >= items})


def test_distinct_rows_depend_only_on_tokens_up_to_the_read_position(tmp_path: Path) -> None:
    found = run(
        LISTS
        + f"""
experiment e {{ {BLANK}  patch resid_post layer 1 at each item token onto slot token
  measure prob(" {{item.index}}") as raw  measure argmax(1..9) as raw
  measure prob(" 3") as delta  measure prob(" 3") as recovery }}
experiment own {{ {BLANK}  patch embed at each item token onto slot token
  measure prob(" 3") as raw }}
experiment whole {{ {BLANK}  patch resid_post layer 1 at last token onto slot token
  measure prob(" 3") as raw }}
experiment texts {{ {BLANK}  patch resid_post layer 1 at first-item token onto slot token
  measure prob(answer) as raw }}
""",
        tmp_path,
    )
    e = found["e"]
    expected = [beginnings(e, items) for items in range(1, 6)]
    assert expected[0] == 3
    assert expected[1] == 9
    for measure in range(3):  # the base run is the same in all rows
        assert spread(e, measure) == expected
    # The value of the source run depends on the whole prompt.
    assert spread(e, 3) == [sum(len(row) > n for row in e.row_values["fruits"]) for n in range(5)]
    assert spread(found["own"]) == [3] * 5
    assert found["whole"].measures[0].seen is None
    assert spread(found["texts"]) == [
        len({(row[0], len(row)) for row in found["texts"].row_values["fruits"]})
    ]


def test_merged_variants_and_groups_keep_distinct_rows(tmp_path: Path) -> None:
    from mechdsl.results.assembly.combination import merge_variants
    from mechdsl.show.reports.table import group_by_value

    text = f"""experiment e {{ {BLANK}  patch resid_post layer 1 at each item token onto slot token
  measure prob(" 3") as raw }}"""
    result = run(LISTS + text, tmp_path)["e"]
    data = result.measures[0]
    data = replace(data, source=None)
    assert data.seen is not None
    result = replace(result, measures=(data,))
    assert result.row_ids is not None
    assert result.row_keys is not None
    apart = replace(result, measures=(replace(data, seen=None),))
    keep = [n for n in range(result.prompts) if n % 3]
    fewer = replace(
        result,
        measures=(replace(data, patched=data.patched[:, keep], base=data.base[:, keep],
                          source=None,
                          rounding=None, seen=data.seen[:, keep]),),
        runs={}, accuracy={}, accuracy_rounding={},
        row_ids=tuple(result.row_ids[n] for n in keep),
        row_keys=tuple(result.row_keys[n] for n in keep),
        row_values={k: [v[n] for n in keep] for k, v in result.row_values.items()},
        strata=None, statistics=(), controls=(), texts=(), hits=(),
    )  # fmt: skip
    parts = [replace(each, runs={}, accuracy={}, accuracy_rounding={}) for each in (result, apart)]
    labels = [(("model", name),) for name in "abc"]
    both = merge_variants(list(zip(labels, [*parts, fewer], strict=True)))
    assert both.row_keys == fewer.row_keys
    seen = both.measures[0].seen
    assert seen is not None
    cells = len(data.patched)
    np.testing.assert_array_equal(seen[:cells], data.seen[:, keep])
    assert all(len(set(row)) == len(keep) for row in seen[cells : 2 * cells].tolist())
    np.testing.assert_array_equal(seen[2 * cells :], data.seen[:, keep])
    shown = group_by_value(result, "count").measures[0]
    assert shown.seen is not None
    np.testing.assert_array_equal(shown.seen, np.tile(data.seen, (4, 1)))


# --- the design -----------------------------------------------------------------------------------

POPULATIONS = [
    ("limit 64", "", "new rows of this design: count dealt evenly"),
    ("limit 3", "", "new rows of this design"),  # no complete round of values
    ("limit 12", "", "new rows of this design"),  # three rows of each count
    ("limit 64", "stats by count", "new values of count"),
]


@pytest.mark.parametrize(("limit", "stats", "words"), POPULATIONS)
def test_results_state_the_population(limit: str, stats: str, words: str, tmp_path: Path) -> None:
    text = (
        LISTS
        + f"""
experiment e {{ model toy  prompts fruit {limit}  measure logit(answer) as raw  {stats} }}"""
    )
    result = run(text.replace('"plum"', '"plum", "fig", "kiwi"'), tmp_path)["e"]
    assert result.population == words
    assert result.conventions["population"] == words
    if "evenly" not in words:
        assert result.strata is None
        return
    assert result.strata is not None
    pairs = set(zip(result.strata.tolist(), result.row_values["count"], strict=True))
    assert len(pairs) == 4 == len(set(result.strata.tolist()))


def test_even_dealing_drops_the_variable_with_most_values_first(tmp_path: Path) -> None:
    text = """
prompts two { a in 1..5  b in ["x", "y"]  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, 3, sep: ", ")  template "Part {a}: {fruits}. {b} 1:" }
experiment both { model toy  prompts two limit 60  measure logit(" 3") as raw }
experiment one { model toy  prompts two limit 30  measure logit(" 3") as raw }
"""
    found = run(text.replace('"x", "y"', '"Count", "apple"'), tmp_path)
    assert found["both"].population == "new rows of this design: a and b dealt evenly"
    assert found["one"].population == "new rows of this design: b dealt evenly"
    strata = found["one"].strata
    assert strata is not None
    pairs = set(zip(strata.tolist(), found["one"].row_values["b"], strict=True))
    assert len(pairs) == len(set(strata.tolist())) == 2


def test_population_of_data_files_and_complete_designs_has_no_strata(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, records(5))), encoding="utf-8")
    text = """
prompts facts { rows "facts.jsonl"  template "Part 1: {names}. Count 1:" }
prompts all { a in 1..8  template "Part {a}: apple. Count 1:" }
experiment file { model toy  prompts facts  measure logit(" 3") as raw }
experiment design { model toy  prompts all  measure logit(" 3") as raw }
"""
    found = run(text, tmp_path)
    assert found["file"].population == "new rows like these"
    assert found["file"].strata is None
    assert found["design"].population == "new rows like these, which cover the whole design"


# --- explained variance ---------------------------------------------------------------------------


def test_noise_rarely_has_an_explaining_variable() -> None:
    draw = np.random.default_rng(0)
    said = 0
    for _ in range(400):
        n = int(draw.integers(6, 80))
        rows = draw.standard_t(3, n) if draw.random() < 0.5 else draw.exponential(size=n)
        columns = {
            str(k): [str(v) for v in draw.integers(0, k, n)] for k in (2, 3, 5, 8, n // 2, n)
        }
        said += largest_explained_variance(rows, columns) is not None
    assert said <= 6


def test_variable_with_the_largest_explained_variance_is_named() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, 7, 64), draw.integers(0, 3, 64)
    rows = a + 0.3 * b + draw.normal(size=64) * 0.7
    columns = {"b": [*map(str, b)], "a": [*map(str, a)], "same": [*map(str, a + 1)]}
    columns["row"] = [*map(str, range(64))]
    found = largest_explained_variance(rows, columns)
    assert found is not None
    assert (found.name, found.values) == ("a", 7)
    means = np.array([rows[a == value].mean() for value in a])
    adjusted = 1 - ((rows - means) ** 2).sum() / (64 - 7) / rows.var(ddof=1)
    assert found.share == pytest.approx(adjusted)
    assert largest_explained_variance(a + 3 * draw.normal(size=64), columns) is None
    assert largest_explained_variance(np.ones(64), columns) is None


READ = """
prompts fruit { rows "lists.jsonl"
  template "Part 1: {fruits}. Count 1:"
  answer " {count}"
  text fewer = " {count - 1}" }
"""
HEADS = """
experiment heads { model toy  prompts fruit limit 60
  ablate layer 3 head * at last token with zero
  measure logit(answer) - logit(fewer) as delta
  STATS
}
"""


@pytest.mark.parametrize(
    ("stats", "line"),
    [
        ("", "write `stats by count`"),
        ("stats bootstrap(500)", "add `by count` to the line `stats`"),
        ("stats by part", "write `by count` instead of `by part` in the line `stats`"),
        ("stats by count", None),
    ],
)
def test_variable_explaining_most_variance_is_a_warning(
    stats: str, line: str | None, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    counts = [2 + i % 4 for i in range(60)]
    lines = [
        json.dumps({"fruits": ", ".join(draw.choice(FRUITS, count)), "count": count, "part": i % 7})
        for i, count in enumerate(counts)
    ]
    (tmp_path / "lists.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "file.mech"
    path.write_text(START + READ + HEADS.replace("STATS", stats), encoding="utf-8")
    results = mechdsl.run(path)
    found = [each for each in results.diagnostics if each.code == "W0722"]
    if line is None:
        assert not found
        return
    (said,) = found
    assert said.message.startswith("`count` explains ")
    (experiment,) = results.files[0].experiments
    (count,) = {int(each) for each in experiment.statistics[0].units}
    units = f"{count} groups of values of part" if "part" in stats else f"{count} distinct prompts"
    assert count < (7 if "part" in stats else 60), "equal rows are one unit"
    assert said.label_text.endswith(f"sample size is 4 values of `count`, not {units}")
    assert line in said.help_text
    population = "values of `part`" if "part" in stats else "rows"
    assert said.help_text.endswith(f"hold for new {population} with these 4 values of `count`")
    assert f"over {units}" in experiment.conventions["interval"]
    joined = "(values with equal rows are one group)" in experiment.conventions["interval"]
    assert joined == ("part" in stats)


def test_variable_with_its_whole_domain_is_no_warning(tmp_path: Path) -> None:
    """Rows are similar within a count, but the prompts cover all counts."""
    path = tmp_path / "file.mech"
    heads = HEADS.replace("fewer", "answer of fewer").replace("60", "32").replace("STATS", "")
    path.write_text(START + LISTS + heads, encoding="utf-8")
    results = mechdsl.run(path)
    assert "W0722" not in [each.code for each in results.diagnostics]
    (found,) = results.files[0].experiments
    assert found.strata is not None
    counts = found.row_values["count"]
    assert len(set(zip(found.strata.tolist(), counts, strict=True))) == len(set(counts)) == 4
