"""Indistinguishable rows of a measure, for each input that its value depends on.

The expected number of rows is counted from the prompts' words; `different` asserts that
indistinguishable rows have equal values.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import mechdsl
import mechdsl.results.assembly.collection
from mechdsl.results.assembly.sampling_units import RowViews, _prefix_numbers  # pyright: ignore[reportPrivateUsage]
from mechdsl.results.experiment_result import ExperimentResult

HELD = "run held { from clean into blank patch resid_post layer 2 at item 2 token onto last token }"
READ = 'measure logit(" 3") as raw'
START = """mech 1
model toy = zoo("counting")
prompts fruit { count in 2..5  item in ["apple", "pear", "plum"]
  fruits = list(item, count, sep: ", ")
  template "Part 1: {fruits}. Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
  corrupt noised { add gaussian(std: 1) to embed at each item token }
}
prompts blank { template "Part 1: thing, thing Count 1:" }
"""


def run(text: str, folder: Path) -> ExperimentResult:
    path = folder / "file.mech"
    text = f"{START}experiment e {{ model toy  prompts fruit limit 60  {text} }}"
    path.write_text(text, encoding="utf-8")
    return mechdsl.run(path)["e"]


def different(result: ExperimentResult, *, drawn: bool = False) -> list[int]:
    """Return the number of distinguishable rows of the first measure, per cell.

    drawn: rows also differ by random draws, such as noise.
    """
    data, found = result.measures[0], list[int]()
    for cell, values in enumerate(data.patched):
        there = ~np.isnan(values)
        seen = np.arange(len(values))
        if data.seen is not None:
            seen = data.seen[cell if len(data.seen) > 1 else 0]
        for number in np.unique(seen[there]):
            same = values[there & (seen == number)]
            assert drawn or np.ptp(same) < 1e-4
        if drawn:
            assert len(np.unique(values[there].round(6))) > len(np.unique(seen[there]))
        found.append(len(np.unique(seen[there])))
    return found


def lists(result: ExperimentResult) -> list[tuple[str, ...]]:
    return [tuple(row) for row in result.row_values["fruits"]]


CASES = {
    "read early": ('measure logit(" 3") at first-item token as raw', lambda row: row[0]),
    "delta of a write behind it": (
        'ablate resid_post layer 1 at last token with zero  measure logit(" 3") at first-item '
        "token as delta",
        lambda row: row[0],
    ),
    "a write before it": (
        'ablate resid_post layer 1 at item 1 token with zero  measure logit(" 3") at item 2 token '
        "as delta",
        lambda row: row[:2],
    ),
    "the texts of the metric": (
        "measure logit(answer) at first-item token as raw",
        lambda row: (row[0], len(row)),
    ),
    "a value of the source": (
        'from clean into fewer  patch resid_post layer 1 at first-item token  measure logit(" 3") '
        "at first-item token as total",
        lambda row: row[0],
    ),
    "a reference run": (
        "from clean into blank  ablate resid_post layer 1 at last token with zero  "
        "measure kl(clean) as raw",
        lambda row: row,
    ),
    "means of groups": (
        "from clean into blank  ablate resid_post layer 1 at last token with mean of clean by "
        'count  measure logit(" 3") as raw',
        len,
    ),
    "means of all": (
        "from clean into blank  ablate resid_post layer 1 at last token with mean of clean  "
        'measure logit(" 3") as raw',
        lambda row: 0,
    ),
    "attention that is looked at": (
        "observe attention layer 1 head 0 from first-item token to first token",
        lambda row: row[0],
    ),
    "a second position after the first": (
        "observe similarity resid_post layer 2 at first-item token with last-item token",
        lambda row: row,
    ),
    "what two tokens predict": (
        "observe rank_correlation(3) logits at first-item token with item 2 token",
        lambda row: row[:2],
    ),
    "a number drawn for the text": (
        "observe random embed at first-item token as drawn",
        lambda row: row,
    ),
    "a token below attention": (
        'from clean into blank  patch embed at last-item token onto last token  measure logit(" 3")'
        " as raw",
        lambda row: (row[-1], len(row)),
    ),
    "the beginning of the source": (
        "from clean into blank  patch resid_post layer 2 at item 2 token onto last token  "
        'measure logit(" 3") as raw',
        lambda row: row[:2],
    ),
    "a source with rules": (
        f"{HELD} from held into blank  patch resid_post layer 3 at last token  {READ}",
        lambda row: row[:2],
    ),
    "a base with rules": (
        f"{HELD} from clean into held  ablate mlp_out layer 3 at last token with zero  {READ}",
        lambda row: row[:2],
    ),
    "a reference run with rules": (
        f"{HELD} ablate resid_post layer 1 at last token with zero  from clean into blank  "
        "measure kl(held) as raw",
        lambda row: row[:2],
    ),
    "a run made of one with rules": (
        f"{HELD} run twice {{ from held into blank patch mlp_out layer 3 at last token }} "
        f"from twice into blank  patch resid_post layer 3 at last token  {READ}",
        lambda row: row[:2],
    ),
    "a run on one with rules": (
        f"{HELD} run twice {{ from clean into held "
        "ablate mlp_out layer 3 at last token with zero } "
        f"from twice into blank  patch resid_post layer 3 at last token  {READ}",
        lambda row: row[:2],
    ),
    "a run that reads below attention": (
        "run held { from clean into blank patch embed at last-item token onto last token } "
        f"from held into blank  patch resid_post layer 3 at last token  {READ}",
        lambda row: (row[-1], len(row)),
    ),
    "a run whose rules write behind what is read": (
        f"{HELD} from held into blank  patch resid_post layer 2 at token -2  "
        'measure logit(" 3") at token -2 as raw',
        lambda row: 0,
    ),
    "a run in which tokens see later tokens": (
        "run held { allow attention layers * from first-item token to last-item token } "
        'from held into clean  patch resid_post layer 3 at first-item token  measure logit(" 3") '
        "at first-item token as raw",
        lambda row: row,
    ),
    "edges of a run": (
        "run held { block attention layer 1 from last token to last-item token } "
        f"from held into blank  patch resid_post layer 3 at last token  {READ}",
        lambda row: row,
    ),
    "edges": (
        "block attention layer 1 from last-item token to first-item token  "
        'measure logit(" 3") at last-item token as delta',
        lambda row: row,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_distinct_rows_depend_on_the_inputs_of_the_measure(case: str, tmp_path: Path) -> None:
    text, mark = CASES[case]
    result = run(text, tmp_path)
    assert different(result) == [len({mark(row) for row in lists(result)})]


def test_sweep_distinguishes_more_rows_at_later_positions(tmp_path: Path) -> None:
    result = run(
        "from clean into blank  patch resid_post layer 0..1 at each item token onto last token  "
        'measure logit(" 3") as raw',
        tmp_path,
    )
    rows = lists(result)
    expected = [len({row[:n] for row in rows if len(row) >= n}) for n in range(1, 6)]
    # Both layers are equal, since rows differ by nothing else before the second attention.
    assert different(result) == expected * 2


def test_noise_adds_no_distinct_rows(tmp_path: Path) -> None:
    result = run('from clean into noised  measure logit(" 3") at first-item token as raw', tmp_path)
    assert different(result, drawn=True) == [3]


def test_donors_add_no_distinct_rows(tmp_path: Path) -> None:
    text = "ablate resid_post layer 1 at item 2 token with resample"
    result = run(f'{text}  measure logit(" 3") at item 2 token as raw', tmp_path)
    assert different(result, drawn=True) == [9]


def test_bidirectional_model_distinguishes_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bidirectional(plan: object, kept: object, causal: object) -> RowViews:
        return RowViews(plan, kept, lambda name: False)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(mechdsl.results.assembly.collection, "RowViews", bidirectional)
    for case in ("read early", "the beginning of the source"):
        assert run(CASES[case][0], tmp_path).measures[0].seen is None


def test_prefix_numbers_are_equal_only_for_equal_prefixes() -> None:
    random = np.random.default_rng(0)
    rows = [tuple(random.integers(0, 3, size).tolist()) for size in random.integers(0, 6, 200)]
    numbers = _prefix_numbers(rows)
    seen: dict[int, tuple[int, ...]] = {}
    for ids, own in zip(rows, numbers.tolist(), strict=True):
        for end in range(len(ids)):
            assert seen.setdefault(own[end], ids[: end + 1]) == ids[: end + 1]
    assert len(set(seen.values())) == len(seen)
