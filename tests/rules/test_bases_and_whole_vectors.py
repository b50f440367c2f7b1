"""Rules in the basis of all numbers equal rules on whole vectors, next to other constructs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import mechdsl

from ..quick import in_turn

TEXTS = """
prompts fruit {
  count in 2..9
  item in ["apple", "pear", "plum", "fig"]
  fruits = list(item, count, sep: " ")
  template "Part 1: {fruits} Count 1:"
  answer " {count}"
  corrupt fewer { count = count - 1 }
  corrupt noised { add gaussian(std: 2 sd) to embed at last-item token }
}
"""
IMAGES = """
images scenes {
  kind in ["circle", "square"]
  n in [1, 2]
  image shapes(n: n, kind: kind)
  answer kind
  corrupt hidden { mask image row 1..4 col 1..4 tokens }
}
"""
LD = "measure logit(answer) - logit(answer of fewer) as delta"
CASES = {
    "patch": ("from clean into fewer", "patch PLACE at last token", LD),
    "mean of a run": ("", "ablate PLACE at last token with mean of fewer", LD),
    "resample": ("", "ablate PLACE at last token with resample", LD),
    "mean by value": ("", "ablate PLACE at last token with mean by count", LD),
    "after a rule": (
        "from clean into fewer  scale attn_out layer 0 at tokens * by 0.5",
        "patch PLACE at last-item token",
        LD,
    ),
    "before a rule": (
        "from clean into fewer",
        "patch PLACE at last token  scale PLACE at last token by 2",
        LD,
    ),
    "into noise": ("from clean into noised", "patch PLACE at last-item token", LD),
    "from a run with rules": (
        "run healed { from clean into fewer  patch PLACE at last-item token }\n"
        "  from healed into fewer",
        "patch attn_out layer 3 at last token",
        LD,
    ),
    "in generated text": (
        "generate 3",
        "scale PLACE at tokens * by 1.5 during step 1..2",
        "measure entropy at each step as delta",
    ),
    "onto another position": (
        "from clean into fewer",
        "patch PLACE at last-item token onto last token",
        LD,
    ),
}


QUICK = ("from a run with rules", "in generated text")


def effects(text: str) -> list[np.ndarray]:
    """[measure and cell, prompt] of each experiment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mechdsl.run(text, store=False)
    return [np.concatenate([own.patched for own in each.measures]) for each in found.experiments]


def agree(head: str, lines: str, site: str, tolerance: float = 1e-4) -> None:
    """Assert that coordinates and whole vectors give equal values, in one file and alone."""
    plain = lines.replace("PLACE", site)
    within = lines.replace("PLACE", f"{site} in basis whole")
    named = lines.replace("PLACE", "features * of whole")
    every = [plain, within] if "onto" in lines else [plain, within, named]
    experiments = [f"experiment e{n} {{\n  {each}\n}}\n" for n, each in enumerate(every)]
    one, *others = effects(head + "".join(experiments))
    if "by 1.5" in plain:
        (base,) = effects(head + experiments[0].replace("by 1.5", "by 1"))
        assert np.nanmax(np.abs(one - base)) > 1e-3
    for other in others:
        np.testing.assert_allclose(other, one, atol=tolerance, rtol=tolerance)
    for experiment, other in zip(experiments[1:], others, strict=True):
        (alone,) = effects(head + experiment)
        np.testing.assert_allclose(alone, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "site"), in_turn(list(CASES), ["resid_post layer 2", "z layer 2"], QUICK)
)
def test_rules_on_all_coordinates_equal_rules_on_the_vector(case: str, site: str) -> None:
    before, rule, measure = CASES[case]
    head = 'mech 1\nmodel toy = zoo("counting")\n' + TEXTS + "basis whole = neurons at SITE\n"
    lines = f"model toy  prompts fruit limit 8\n  {before}\n  {rule}\n  {measure}"
    agree(head.replace("SITE", site), lines, site)


@pytest.mark.parametrize("rule", ["patch PLACE at tokens *", "ablate PLACE at tokens * with mean"])
def test_rules_on_all_coordinates_of_image_tokens_equal_rules_on_the_vector(rule: str) -> None:
    site = "resid_post layer 1"
    head = 'mech 1\nmodel eye = zoo("shapes")\n' + IMAGES + f"basis whole = neurons at {site}\n"
    lines = f"model eye  images scenes\n  from clean into hidden\n  {rule}\n"
    lines += "  measure logit(answer) as delta"
    agree(head, lines, site)


@pytest.mark.slow
def test_rules_on_all_coordinates_equal_rules_on_the_vector_in_16_bits() -> None:
    before, rule, measure = CASES["patch"]
    head = 'mech 1\nmodel toy = zoo("counting", dtype: "bfloat16")\n' + TEXTS
    head += "basis whole = neurons at resid_post layer 2\n"
    lines = f"model toy  prompts fruit limit 8\n  {before}\n  {rule}\n  {measure}"
    agree(head, lines, "resid_post layer 2", tolerance=0.1)
