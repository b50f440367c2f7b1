"""Rankings by experiments with several models, sources or bases."""

from __future__ import annotations

import numpy as np

from mechdsl.base.text import Source

from ..run_source import run_source
from .support import HEAD, best_sites, experiment, patched, run
from .test_tokens import LOGIT, expected, orders

DELTA = "measure logit(answer) as delta"
TWO = HEAD.replace(
    'model toy = zoo("counting")', 'model toy = zoo("counting")\nmodel tuned = zoo("counting")'
)


def heads(*lines: str) -> str:
    return experiment("heads", *lines, DELTA, prompts="fruit.train limit 6")


def test_site_is_ranked_by_its_best_base() -> None:
    head = HEAD.replace("  corrupt", "  corrupt other { item = other(item) }\n  corrupt")
    text = experiment("a", "ablate top 3 of heads at last token with zero", DELTA)
    of = heads("from clean into fewer, other", "patch layer * head * at last token")
    found = run(text + of, head=head)
    best: dict[str, float] = {}
    for record in found["heads"].records():
        best[record["site"]] = max(record["mean"], best.get(record["site"], -np.inf))
    three = sorted(best, key=lambda site: -best[site])[:3]
    said = found["a"].conventions["top 3 of heads"]
    assert said.startswith(", ".join(f"{site} ({best[site]:.3g})" for site in three))
    assert said.endswith("each of the 16 sites by the best of its cells")


def test_sites_are_ranked_for_the_model_of_the_derived_experiment() -> None:
    of = heads("model toy, tuned", "ablate layer * head * at last token with zero")
    text = experiment("a", "model tuned", "ablate top 2 of heads at last token with zero", DELTA)
    found = run(text + of, head=TWO)
    assert found["heads"].axes == ("model", "layer", "head")
    said = found["a"].conventions["top 2 of heads"]
    assert "by the best of its cells" not in said  # only one model's cells


def test_derived_experiment_with_several_models_has_a_cell_each() -> None:
    of = heads("model toy", "ablate layer * head * at last token with zero")
    lines = ("model toy, tuned", "ablate top 2 of heads at last token with zero", DELTA)
    found = run(experiment("a", *lines) + of, head=TWO)
    rows = patched(found["a"])
    assert [cell.coords for cell in found["a"].cells] == [{"model": "toy"}, {"model": "tuned"}]
    assert np.array_equal(rows[0], rows[1])


def test_heads_are_ranked_by_observed_attention() -> None:
    """Heads ranked by edges are ablated at their outputs."""
    of = experiment(
        "heads",
        "observe attention layer * head * from last token to last-item token",
        prompts="fruit.train limit 6",
    )
    found = run(experiment("a", "ablate top 2 of heads at last token with zero", DELTA) + of)
    two = [site.removesuffix(".attention") for site in best_sites(found["heads"], 2)]
    named = experiment("b", "ablate hand at last token with zero", DELTA)
    by_hand = run(f"\ngroup hand = {', '.join(two)}\n" + named)
    assert np.array_equal(patched(found["a"]), patched(by_hand["b"]))


def test_edges_to_top_tokens_are_blocked() -> None:
    places = experiment("places", "ablate embed at token * align left with zero", DELTA)
    text = experiment(
        "a",
        "for k in [0, 2] {",
        "  block attention layers * from last token to top k of places tokens",
        "}",
        DELTA,
    )
    found = run(text + places)
    rows = patched(found["a"])
    assert np.allclose(rows[0], found["a"].measures[0].base[0], atol=1e-4)
    assert not np.allclose(rows[1], rows[0], atol=1e-2)


def test_derived_experiment_without_ranked_rows_fails() -> None:
    """No row that `places` kept is a row of the derived experiment."""
    clean = run(experiment("clean", "measure logit(answer) as raw", prompts="fruit limit 6"))
    values = patched(clean["clean"])[0]
    first = float(values[0])
    keep = f"keep logit(answer) {'>' if first < values.max() else '<'} {first:.5f}"
    places = experiment(
        "places",
        keep.replace(f"{first:.5f}", f"{first + 0.01 if '>' in keep else first - 0.01:.5f}"),
        "ablate embed at token * align left with zero",
        DELTA,
        prompts="fruit limit 6",
    )
    text = experiment(
        "a", "ablate embed at top 25% of places tokens with zero", DELTA, prompts="fruit limit 1"
    )
    result, found = run_source(Source(HEAD + text + places))
    assert result is not None
    assert [each.name for each in result.lost] == ["a"]
    (error,) = (d for d in found if d.severity == "error")
    assert error.code == "E0620"
    assert "`places` has none of the 1 rows" in error.message


def test_tokens_ranked_by_patching_a_baseline_prompt_equal_reference() -> None:
    """The ranking patches tokens of the prompts into a baseline prompt."""
    head = HEAD.replace("count in 3..9", "count in 3..3").replace('"fig"]', '"fig", "kiwi"]')
    head += """
prompts blank {
  word in ["fig"]
  template "Part 1: {word} {word} {word} Count 1:"
}
"""
    head = head.replace("  corrupt fewer { count = count - 1 }\n", "").replace("  split 50%\n", "")
    places = experiment(
        "places",
        "from fruit into blank",
        "patch resid_post layers 1..2 at token * align left",
        "measure logit(answer) as delta",
        prompts="fruit limit 5",
    )
    text = experiment(
        "a", "ablate embed at top 25% of places tokens with zero", LOGIT, prompts="fruit limit 5"
    )
    found = run(text + places, head=head)
    tokens = {row: order[:3] for row, order in orders(found["places"]).items()}
    by_hand = expected(text + places, "a", tokens, head=head)
    assert np.allclose(patched(found["a"])[0], by_hand, atol=1e-4)
    assert np.std(by_hand) > 0.01
