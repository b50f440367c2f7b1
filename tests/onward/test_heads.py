"""Heads ranked by another experiment in edges and as path receivers, against named heads."""

from __future__ import annotations

import numpy as np
import pytest

from mechdsl.results.experiment_result import ExperimentResult

from ..quick import in_turn, some
from . import support
from .support import MODES, checked, experiment, patched, run

DELTA = "measure logit(answer) as delta"
FROM = "from clean into fewer"
DIRECT = experiment(
    "direct", FROM, "path layer * head * -> logits at last token", DELTA, prompts="fruit.train"
)
EDGE = "from last token to last-item token"


def best_sites(result: ExperimentResult, count: int) -> list[str]:
    """Short names of the best sites; of paths, the senders."""
    return [site.partition(".z")[0] for site in support.best_sites(result, count)]


EDGES = [
    f"block attention HEADS {EDGE}",
    f"reweight attention HEADS {EDGE} by 3",
    "set attention HEADS from last token to fruits tokens to uniform",
    f"set attention HEADS {EDGE} to 0.2",
]


@pytest.mark.parametrize(("rule", "mode"), in_turn(EDGES, list(MODES)))
def test_edges_of_top_heads_equal_named_heads(rule: str, mode: str) -> None:
    picked = run(
        experiment("a", rule.replace("HEADS", "top 2 of direct"), DELTA) + DIRECT,
        without=MODES[mode],
    )
    two = best_sites(picked["direct"], 2)
    hand = f"\ngroup hand = {', '.join(two)}\n"
    named = run(hand + experiment("a", rule.replace("HEADS", "hand"), DELTA), without=MODES[mode])
    assert np.array_equal(patched(picked["a"]), patched(named["a"]))
    effect = np.abs(patched(picked["a"]) - picked["a"].measures[0].base)
    assert effect.max() > 0.02
    assert picked["a"].cells[0].site == "top 2 of direct"
    assert named["a"].cells[0].site == "hand"
    assert list(picked) == ["a", "direct"]
    assert picked["a"].conventions["top 2 of direct"].startswith(f"{two[0]}.z")


@pytest.mark.parametrize(("site", "mode"), in_turn(["q", "k", "v"], list(MODES)))
def test_paths_to_top_heads_equal_named_heads(site: str, mode: str) -> None:
    rule = "path layer * head 0, 2 -> {} at {{last-item token, last token}}"
    text = experiment("a", FROM, rule.format(f"{site} of top 2 of direct"), DELTA) + DIRECT
    picked = run(text, without=MODES[mode])
    two = best_sites(picked["direct"], 2)
    hand = f"\ngroup hand = {', '.join(two)}\n"
    own = f"\ngroup own = {', '.join(f'{name}.{site}' for name in two)}\n"
    named = run(
        hand + experiment("a", FROM, rule.format(f"{site} hand"), DELTA), without=MODES[mode]
    )
    assert np.array_equal(patched(picked["a"]), patched(named["a"]))
    sites = run(own + experiment("a", FROM, rule.format("own"), DELTA), without=MODES[mode])
    assert np.array_equal(patched(picked["a"]), patched(sites["a"]))
    assert picked["a"].cells[0].site == f"L0H0.z → {site} of top 2 of direct"
    assert np.abs(patched(picked["a"]) - picked["a"].measures[0].base).max() > 0.01


def test_expectation_names_a_sender_of_paths_to_the_best_head() -> None:
    expected = "expect delta(layer: 0, head: 1) > -100"
    rule = "path layer 0..1 head * -> q of best of direct at last token"
    found = checked(experiment("a", FROM, rule, DELTA, expected) + DIRECT)
    assert [each.code for each in found.diagnostics if each.severity == "error"] == []


def test_best_head_is_shown_by_its_name() -> None:
    found = run(
        experiment("a", f"observe attention best of direct {EDGE}")
        + experiment("b", FROM, "path layer 0 head 0 -> q of best of direct at last token", DELTA)
        + DIRECT
    )
    (best,) = best_sites(found["direct"], 1)
    assert found["a"].cells[0].site == f"{best}.attention"
    assert found["b"].cells[0].site == f"L0H0.z → {best}.q"
    assert found["a"].conventions["observed"] == "the total weight of the keys"


@pytest.mark.parametrize("mode", some(MODES, ["planned"]))
def test_growing_sets_of_top_heads_equal_named_heads(mode: str) -> None:
    rule = f"for n in [0, 1, 3] {{ block attention top n of direct {EDGE} }}"
    found = run(experiment("a", rule, DELTA) + DIRECT, without=MODES[mode])
    rows = patched(found["a"])
    base = found["a"].measures[0].base
    np.testing.assert_array_equal(rows[0], np.broadcast_to(base, rows.shape)[0])
    three = best_sites(found["direct"], 3)
    for row, heads in ((1, three[:1]), (2, three)):
        hand = f"\ngroup hand = {', '.join(heads)}\n"
        same = run(
            hand + experiment("b", f"block attention hand {EDGE}", DELTA), without=MODES[mode]
        )
        np.testing.assert_allclose(rows[row], patched(same["b"])[0], atol=1e-4)
    to = "for n in [0, 1, 3] { path layer 0 head 0 -> q of top n of direct at last token }"
    paths = run(experiment("a", FROM, to, DELTA) + DIRECT, without=MODES[mode])["a"]
    assert [cell.coords["n"] for cell in paths.cells] == [1, 3]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"observe attention top 0 of direct {EDGE}", "E0332"),
        (f"block attention whole {EDGE}", "E0304"),
        (f"block attention firing {EDGE}", "E0304"),
        (f"block attention movrs {EDGE}", "E0201"),
        ("path layer 0 head 0 -> q movrs at last token", "E0201"),
        ("path layer 0 head 0 -> attn_norm movers at last token", "E0304"),
        ("path layer 0 head 0 -> z movers at last token", "E0334"),
        ("path layer 0 head 0 -> q whole at last token", "E0304"),
        ("path layer 0 head 0 -> qq movers at last token", "E0203"),
        ("path layer 3 head 0 -> q movers at last token", "E0335"),
        ("path layer 3 head 0 -> q of top 0 of direct at last token", "E0335"),
        (f"block attention top 2 of nobody {EDGE}", "E0201"),
        (f"block attention top 99 of direct {EDGE}", "E0620"),
        (f"ablate top 2 of movers at last token with {FROM.split()[1]}", "E0201"),
    ],
)
def test_invalid_heads_of_edges_or_paths_are_rejected(line: str, code: str) -> None:
    groups = """
group movers = L1H0, L2H1
group whole = L1H0, L2.resid
group firing = L1N3
"""
    measure = "" if line.startswith("observe") else DELTA
    text = experiment("a", FROM, line, *([measure] if measure else []))
    rest = "".join(
        experiment(f"use_{name}", f"ablate {name} at last token with zero", DELTA)
        for name in ("movers", "whole", "firing")
    )
    if "top 0" in line:
        with pytest.raises(AssertionError, match=code):
            run(groups + text + rest + DIRECT)
        return
    found = checked(groups + text + rest + DIRECT).diagnostics
    assert [d.code for d in found if d.severity == "error"] == [code]
