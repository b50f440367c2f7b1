"""Files whose results have every feature, for tests of stored results."""

from __future__ import annotations

from pathlib import Path

from ..fruit import FEWER, FRUIT, head

TWO = head(FEWER, 'corrupt other { item = "plum" }')
COUNTED = "  stats by count\n"
HEADS = "  patch layer 1 head * at last-item token\n"
EFFECT = "  measure logit(answer) - logit(answer of fewer) as recovery\n"


def experiment(name: str, body: str, limit: int = 8) -> str:
    """Build an experiment on the prompts of `tests/fruit.py`."""
    return f"\nexperiment {name} {{\n  prompts fruit limit {limit}\n{body}}}\n"


TEXTS = {
    "plain": FRUIT + experiment("heads", "  from clean into fewer\n" + HEADS + EFFECT),
    "everything printed": FRUIT
    + experiment(
        "heads",
        "  from clean into fewer\n"
        + HEADS.replace("1 head", "0..1 head")
        + EFFECT
        + "  measure correct as raw\n"
        "  measure argmax(1..9) as raw\n" + COUNTED + "  report table by count\n"
        "  report heatmap layer by head\n  report bars head\n"
        "  report confusion count by argmax\n"
        "  expect max(recovery) > 0.1\n  expect accuracy(clean) > 2\n"
        "  expect abs(mean(recovery)) < 2\n",
        limit=16,
    )
    + experiment(
        "spots",
        "  from clean into fewer\n  patch resid_post layer 1..2 at each item token, last token\n"
        + EFFECT
        + "  report overlay\n  expect top 2 contains layer 2\n",
    ),
    "controls": FRUIT
    + experiment(
        "heads", "  from clean into fewer\n" + HEADS + EFFECT + "  against random(5, heads)\n"
    ),
    "variants": TWO + experiment("heads", "  from clean, other into fewer\n" + HEADS + EFFECT),
    "lost and missing": FRUIT
    + experiment(
        "heads",
        "  from clean into fewer\n"
        + HEADS
        + "  measure logit(answer) - logit(answer) as recovery\n"
        "  measure logit(answer) as delta\n  expect max(recovery) > 0\n",
    )
    + experiment(
        "gone",
        "  from clean into fewer\n"
        + HEADS
        + "  measure logit(answer) - logit(answer) as recovery\n"
        "  expect max(recovery) > 0\n",
    ),
    "gaps": FRUIT
    + experiment(
        "heads",
        "  ablate layer 0..3 head * at last-item token, last token with zero\n"
        "  measure correct as raw\n  measure entropy / correct as raw\n"
        "  measure logit(answer) as delta\n",
        limit=16,
    ),
    "replies": FRUIT
    + experiment(
        "written",
        "  from clean into fewer\n  generate 3\n" + HEADS + "  measure exact_match as delta\n"
        "  measure length as raw\n  report texts top 2\n",
    ),
    "no rules": FRUIT
    + experiment("seen", "  measure correct as raw\n  expect mean(correct) > 0\n"),
    "percentages": FRUIT
    + experiment(
        "places",
        "  ablate embed at token * align left with zero\n  measure logit(answer) as delta\n",
        limit=4,
    )
    + experiment(
        "curve",
        "  for k in 0%..100% step 50% { ablate embed at top k of places tokens with zero }\n"
        "  measure logit(answer) as delta\n  expect auc(delta, k) in -20..0\n",
        limit=4,
    ),
    "lists from data": (
        'mech 1\nmodel toy = zoo("counting")\nprompts rows {\n  rows "rows.json"\n'
        '  half = share / 2\n  template "Part 1: {item} {item} Count 1:"\n  answer " 2"\n}\n'
        "experiment e {\n  prompts rows\n  ablate layer 0 head * at last token with zero\n"
        "  measure logit(answer) as delta\n}\n"
    ),
    "no experiments": head(),
}
ROWS = (
    '[{"item": "fig", "share": 0.1, "tags": ["a", ["b", 1, 2.5, null, true]], "more": {"x": [{}]}},'
    ' {"item": "plum", "share": 3, "tags": [], "more": {"y": "\\u202e"}},'
    ' {"item": "pear", "share": -0.0, "tags": null, "more": {}}]'
)


def written(folder: Path, name: str) -> Path:
    """Write the file of this name and its data."""
    path = folder / "it.mech"
    path.write_text(TEXTS[name], encoding="utf-8")
    (folder / "rows.json").write_text(ROWS, encoding="utf-8")
    return path
