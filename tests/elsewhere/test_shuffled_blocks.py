"""`from A shuffled into B`: rows of another block are paired by a seeded shuffle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mechdsl
from mechdsl.prompts.data_files import RecordOrder
from mechdsl.prompts.other_runs import deal_rows

from ..execute.support import DIFFERENCE, MODES, ROWS, experiment, prompts, write_rows
from ..quick import in_turn
from .support import by_prompt, layers, models, q, run, same

EVERY = slice(None)
RULE = "patch resid_post layer * at last token"


@pytest.mark.parametrize(("mode", "family"), in_turn(list(MODES), ["gpt2", "llama"]))
def test_patch_from_a_shuffled_block_equals_reference(folder: Path, family: str, mode: str) -> None:
    """The same panel has an experiment that pairs the rows by number."""
    text = "".join(
        experiment(name, "prompts p", f"from {source} into clean", RULE, DIFFERENCE)
        for name, source in (("paired", "q"), ("shuffled", "q shuffled"))
    )
    found = run(text, folder, models(family), MODES[mode])
    assert (found["paired"].source, found["shuffled"].source) == ("q", "q shuffled")
    said = found["shuffled"].conventions
    assert said["rows of q shuffled"] == "paired by a seeded shuffle with those of `p`"
    assert "rows of q" not in said
    number = list(range(len(ROWS)))
    content = RecordOrder(ROWS)
    order = [content.order[n] for n in deal_rows(content.rank, 0, "p", "q")]
    assert sorted(order) == number
    assert order != number
    for name, theirs in (("paired", number), ("shuffled", order)):
        sources, bases = [q(ROWS[i]) for i in theirs], prompts()
        where = [((s.last,), (b.last,)) for s, b in zip(sources, bases, strict=True)]
        expected = by_prompt(family, layers("resid_post"), sources, bases, where)
        same(found[name].measures[0], expected, EVERY)


@pytest.mark.parametrize("limit", ["", " limit 3"])
def test_shuffled_pairs_do_not_depend_on_the_order_of_records(tmp_path: Path, limit: str) -> None:
    """Both blocks read the file, so pairs can be compared by content."""
    text = experiment("e", f"prompts p{limit}", "from q shuffled into clean", RULE, DIFFERENCE)
    found: list[set[tuple[float, ...]]] = []
    for number, rows in enumerate((ROWS, ROWS[2:] + ROWS[:2], ROWS[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_rows(folder, rows)
        measured = run(text, folder, models("gpt2"), MODES["plain"])["e"].measures[0]
        found.append({tuple(np.round(column, 4)) for column in measured.patched.T})
    assert len(found[0]) == (3 if limit else len(ROWS))
    assert found[0] == found[1] == found[2]


def test_shuffle_is_a_permutation_that_depends_only_on_row_and_seed() -> None:
    rows = list(range(0, 600, 3))
    pairs = dict(zip(rows, deal_rows(rows, 0, "a", "b"), strict=True))
    assert sorted(pairs.values()) == rows
    turned = rows[::-1]
    assert dict(zip(turned, deal_rows(turned, 0, "a", "b"), strict=True)) == pairs
    assert sum(a == b for a, b in pairs.items()) < 6  # 1 is expected
    correlation = np.corrcoef(list(pairs), list(pairs.values()))[0, 1]
    assert abs(correlation) < 0.25
    for other in ((1, "a", "b"), (0, "a", "c"), (0, "b", "a")):
        seed, *names = other
        assert deal_rows(rows, seed, *names) != list(pairs.values())


def test_shuffle_is_uniform_over_seeds() -> None:
    """Three rows have six orders."""
    count = Counter(tuple(deal_rows([4, 7, 9], seed, "a", "b")) for seed in range(1200))
    assert len(count) == 6
    expected = 1200 / 6
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 20.5  # p = 0.001, df 5


BLOCKS = """mech 1

model toy = zoo("counting")

prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
}

prompts listed {
  NAME in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, NAME, sep: ", ")
  template "Part 1: {fruits}. Count 1:"
  answer " {NAME}"
}

experiment carried {
  model toy
  prompts fruit limit 64
  from listed into clean
  patch resid_post layer 0 at last token
  measure argmax(1..9) as raw
  report confusion VALUE by argmax
}
"""


def warned(text: str, **written: str) -> list[str]:
    for name, value in {**written, "NAME": "count", "VALUE": "count"}.items():
        assert name in text or name not in written
        text = text.replace(name, value)
    return [each.code for each in mechdsl.validate(text) if each.code == "W0704"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({}, 1),
        (
            {"NAME in": "number in", "item, NAME": "item, number", "{NAME}": "{number}"},
            1,
        ),  # a different name for the same values
        ({"from listed into": "from listed shuffled into"}, 0),
        ({"NAME in 2..9": "NAME in 1..8"}, 0),
        ({"report confusion VALUE by argmax": "report table"}, 0),
        ({"report confusion VALUE": "report confusion layer", "layer 0": "layer *"}, 0),
    ],
)
def test_pairs_with_equal_values_give_a_warning(written: dict[str, str], expected: int) -> None:
    assert len(warned(BLOCKS, **written)) == expected


def test_confusion_diagonal_is_informative_only_for_shuffled_pairs() -> None:
    """Pairs by number fill the diagonal whether the patch has no effect or a full effect; shuffled
    pairs fill it only if the patch has no effect."""
    text = (
        BLOCKS.replace("NAME", "count").replace("VALUE", "count").replace("layer 0", "layer 0, 3")
    )
    shuffled = text.replace("listed into", "listed shuffled into")
    for source, full in ((text, (True, True)), (shuffled, (True, False))):
        (found,) = mechdsl.run(source).files[0].experiments
        patched = found.measures[0].patched
        right = patched == np.array(found.row_values["count"])
        assert tuple(right.all(axis=1)) == full


def test_shuffled_run_is_named_without_shuffled(folder: Path) -> None:
    """Covers metrics and expectations; `with q` in a rule means rows paired by number."""
    text = "".join(
        experiment(
            name, "prompts p", f"from q{word} into clean",
            f"patch resid_post layer 1 at last token{beside}", "measure kl(q) as raw",
            "expect accuracy(q) > -1",
        )
        for name, word, beside in (
            ("paired", "", ""), ("shuffled", " shuffled", ""), ("both", " shuffled", " with q"),
        )
    )  # fmt: skip
    found = run(text, folder, models("gpt2"))
    paired, shuffled, both = (found[name] for name in ("paired", "shuffled", "both"))
    assert set(paired.accuracy) == {"q"}
    assert set(shuffled.accuracy) == {"q shuffled"}
    assert [each.holds for each in shuffled.outcomes] == [True]
    values = [each.measures[0].base[0] for each in (paired, shuffled)]
    assert np.abs(values[0] - values[1]).max() > 1e-3
    # The rule reads rows paired by number, and `kl(q)` prefers these if both runs exist.
    np.testing.assert_allclose(both.measures[0].patched, paired.measures[0].patched, atol=1e-4)
