"""Maps over text tokens compared with positions, against scores computed from the bare model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mechdsl.diagnostics.rendering import render_full

from ..quick import some
from .support import MODES, ZOO, Array, checked, experiment, patched, run, without_tokens
from .test_observed_tokens import answers, rows_of, seen

ITEMS = ("apple", "pear", "plum", "fig")
LOOK = experiment("look", "observe attention layer 2 head 3 from last token to token * align left")
CUT = experiment(
    "cut", "ablate embed at token * align left with zero", "measure logit(answer) as delta"
)
MAPS = LOOK + CUT


def words(ids: Sequence[int]) -> list[str]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ZOO).convert_ids_to_tokens(list(ids))


def items(ids: Sequence[int]) -> list[bool]:
    return [word in ITEMS for word in words(ids)]


def last_item(ids: Sequence[int]) -> list[bool]:
    place = max(np.flatnonzero(items(ids)))
    return [token == place for token in range(len(ids))]


def after_look(ids: list[int], answer: int) -> Array:
    return np.array(seen(ids))


def after_cut(ids: list[int], answer: int) -> Array:
    whole = without_tokens(ids, [], answer)[0]
    return np.array([without_tokens(ids, [t], answer)[0] - whole for t in range(len(ids))])


REFERENCES = {"look": after_look, "cut": after_cut}


def best(values: Array, count: int) -> set[int]:
    return set(np.argsort(-values)[:count].tolist())


def pointing(values: Array, region: list[bool]) -> float:
    return float(region[int(np.argmax(values))])


def mass(values: Array, region: list[bool]) -> float:
    above = np.maximum(values, 0)
    return float(above[region].sum() / above.sum())


def overlap(values: Array, region: list[bool], count: int) -> float:
    there, chosen = set(np.flatnonzero(region).tolist()), best(values, count)
    return len(there & chosen) / len(there | chosen)


def harmonic_mean(values: Array, region: list[bool], count: int) -> float:
    there, chosen = set(np.flatnonzero(region).tolist()), best(values, count)
    both = len(there & chosen)
    return 2 * both / (len(there) + len(chosen)) if both else 0.0


def roc_area(values: Array, region: list[bool]) -> float:
    pairs = [(a, b) for a, own in zip(values, region, strict=True) if own
             for b, other in zip(values, region, strict=True) if not other]  # fmt: skip
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_map_scores_of_text_tokens_equal_reference() -> None:
    lines = {
        "at": "observe pointing of look, cut in last-item token",
        "share": "observe mass of look, cut in {item tokens}",
        "same": "observe iou of look, cut in item tokens",
        "best": "observe f1 of look, cut in {item tokens}",
        "quarter": "observe f1 of look, cut in last-item token top 25%",
        "third": "observe iou of look, cut in last-item token top 33%",
        "ranks": "observe auroc of look, cut in {item tokens}",
    }
    text = MAPS + "".join(experiment(name, line) for name, line in lines.items())
    found, ids = run(text), rows_of(text, "at")
    by_answer = dict(zip(found["at"].row_ids or (), answers(text, "cut"), strict=True))
    seen_values: dict[str, set[float]] = {name: set() for name in lines}
    for number, of in enumerate(("look", "cut")):
        for column, row in enumerate(found["at"].row_ids or ()):
            values = REFERENCES[of](ids[row], by_answer[row])
            many, one, size = items(ids[row]), last_item(ids[row]), len(ids[row])
            expected = {
                "at": pointing(values, one),
                "share": mass(values, many),
                "same": overlap(values, many, sum(many)),
                "best": harmonic_mean(values, many, sum(many)),
                "quarter": harmonic_mean(values, one, int(0.25 * size + 0.5)),
                "third": overlap(values, one, int(0.33 * size + 0.5)),
                "ranks": roc_area(values, many),
            }
            for name, value in expected.items():
                got = patched(found[name])[number, column]
                assert got == pytest.approx(value, abs=1e-4), (name, of, row)
                seen_values[name].add(round(value, 6))
    assert all(len(each) > 1 for each in seen_values.values()), seen_values


def test_chance_is_the_share_of_tokens_with_a_value() -> None:
    """The map has values only for items, one of which is in the region."""
    text = experiment(
        "part", "ablate embed at each item token with zero", "measure logit(answer) as delta"
    )
    text += experiment("at", "observe pointing of part in last-item token")
    text += experiment("share", "observe mass of part in last-item token")
    text += experiment("half", "observe f1 of part in last-item token top 50%")
    found, ids, positive = run(text), rows_of(text, "at"), 0
    for column, row in enumerate(found["at"].row_ids or ()):
        count = sum(items(ids[row]))
        values = patched(found["part"])[:count, column]
        values = values - found["part"].measures[0].base[0, column]
        positive += int(values.max() > 0)
        for name in ("at", "share"):
            chance = patched(found[name], 1)[0, column]
            without = name == "share" and values.max() <= 0
            assert np.isnan(chance) if without else chance == pytest.approx(1 / count)
        chosen = best(values, int(0.5 * count + 0.5))
        expected = 2 / (1 + len(chosen)) if count - 1 in chosen else 0
        assert patched(found["half"])[0, column] == pytest.approx(expected)
    assert positive > 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
def test_sums_of_maps_rank_tokens_and_are_compared(mode: str) -> None:
    text = MAPS + experiment("both", "observe sum of look, -0.5 * cut at token * align left as b")
    text += experiment("size", "observe magnitude of cut at token * align left as s")
    text += experiment("joint", "observe product of s, b at token * align left as p")
    text += experiment("at", "observe f1 of b in item tokens")
    text += experiment(
        "then", "ablate embed at top 2 of b tokens with zero", "measure logit(answer) as raw"
    )
    found, ids = run(text, without=MODES[mode]), rows_of(text, "at")
    for column, (row, answer) in enumerate(zip(ids, answers(text, "then"), strict=True)):
        values = after_look(ids[row], answer) - 0.5 * after_cut(ids[row], answer)
        summed = patched(found["both"])[: len(ids[row]), column]
        np.testing.assert_allclose(summed, values, atol=1e-3)
        sizes = np.abs(after_cut(ids[row], answer))
        for name, wanted in (("size", sizes), ("joint", sizes * values)):
            got = patched(found[name])[: len(ids[row]), column]
            np.testing.assert_allclose(got, wanted, atol=3e-3)
        region = items(ids[row])
        expected = harmonic_mean(values, region, sum(region))
        assert patched(found["at"])[0, column] == pytest.approx(expected)
        without = without_tokens(ids[row], sorted(best(values, 2)), answer)[0]
        assert patched(found["then"])[0, column] == pytest.approx(without, abs=1e-3)


def test_maps_of_another_run_use_its_tokens() -> None:
    """`fewer` has one item less, so its tokens have different positions."""
    text = experiment(
        "into",
        "from clean into fewer",
        "ablate embed at token * align left with zero",
        "measure logit(answer) as delta",
    )
    text += experiment("at", "from clean into fewer", "observe f1 of into in item tokens")
    found = run(text)
    table = next(e.table for e in checked(text).experiments if e.name == "at")
    for column, row in enumerate(table.runs["fewer"].rows):
        values = patched(found["into"])[: len(row.ids), column]
        values = values - found["into"].measures[0].base[0, column]
        region = items(row.ids)
        expected = harmonic_mean(values, region, sum(region))
        assert patched(found["at"])[0, column] == pytest.approx(expected)


def test_map_of_one_run_is_compared_with_positions_of_another_run() -> None:
    """`look` has values for tokens of `clean`; the region is one of `fewer`."""
    text = experiment("look", "observe attention layer 2 head 3 from last token to each item token")
    text += experiment("at", "from clean into fewer", "observe pointing of look in last-item token")
    found = run(text)
    table = next(e.table for e in checked(text).experiments if e.name == "at")
    scores = patched(found["at"])[0]
    for column, row in enumerate(table.runs["fewer"].rows):
        count = sum(items(row.ids))
        values = patched(found["look"])[:count, column]
        assert scores[column] == float(np.argmax(values) == count - 1)
    assert len(set(scores.tolist())) == 2


def test_random_map_of_text_tokens_differs_between_rows() -> None:
    """Values also differ at tokens with equal preceding tokens."""
    text = experiment("drawn", "observe random embed at token * align left")
    values = patched(run(text)["drawn"])
    assert len(np.unique(values[0])) == values.shape[1]
    chosen = np.nanargmax(values, axis=0)
    assert len(set(chosen.tolist())) > 3


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        ("observe f1 of look in item", "E0207", "write a position: `item token`"),
        ("observe f1 of look in each item token", "E0207", "is a sweep"),
        ("observe f1 of look in itme token", "E0308", "`item`"),
        ("observe pointing of look in last-item token top 25%", "E0207", "takes no `top`"),
        ("observe pointing of look", "E0101", "name the region"),
        ("observe auroc of look", "E0101", "name the region"),
        ("observe auroc of look in item token top 25%", "E0207", "takes no `top`"),
        ("observe magnitude of look in item tokens", "E0207", "is itself a map"),
        ("observe infidelity of look to cut", "E0207", "needs images"),
        ("observe sensitivity of look to cut", "E0207", "needs images"),
        ("observe f1 of head in item tokens", "E0207", "doesn't sweep positions"),
    ],
)
def test_invalid_map_observation_on_texts_is_rejected(line: str, code: str, part: str) -> None:
    text = MAPS + experiment(
        "head",
        "from fewer into clean",
        "patch layer * head * at last token",
        "measure logit(answer) as delta",
    )
    text += experiment("at", line)
    found = checked(text).diagnostics
    assert [each.code for each in found if each.severity == "error"] == [code]
    assert part in render_full(found)
