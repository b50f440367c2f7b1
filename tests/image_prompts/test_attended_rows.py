"""Rows of a prompt in Llama 3.2 Vision, whose equal tokens are computed once, against plain hooks
on the bare model and counted tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mechdsl.execute.image_vectors import provide_images
from mechdsl.execute.run.panel import execute
from mechdsl.forward.hooks import model as model_inputs
from mechdsl.planner.passes import make_plan, plan_cost
from mechdsl.planner.plan import Plan
from mechdsl.prompts import runs
from mechdsl.results.assembly.collection import check_denominators

from ..execute.support import check_file
from ..quick import some
from . import test_attended_edges as edges
from . import test_attended_encoder as encoder
from . import test_attended_images as images
from . import test_attended_observations as observations
from . import test_attended_paths as paths
from .support import BLOCK, experiment
from .test_attended_images import bare, block_at, folder, loaded, run_text

CASES = {
    "rules": lambda: images.test_cross_attention_rules_equal_hooks_on_the_bare_model("planned"),
    "encoder": lambda: encoder.test_rules_in_the_encoder_equal_hooks_on_the_bare_model("planned"),
    "patches": lambda: edges.test_rules_on_attention_equal_changed_weights_of_the_bare_encoder(
        "planned"
    ),
    "attention": lambda: observations.test_rules_inside_attention_equal_hooks_on_the_bare_model(
        "planned"
    ),
    "later": observations.test_attention_to_later_tokens_equals_a_changed_mask,
    "blocked": images.test_observed_and_blocked_attention_equal_the_bare_model,
    "paths": lambda: paths.test_paths_equal_hooks_on_the_bare_model(paths.PATHS, "planned"),
    "answers": images.test_replies_and_long_answers_equal_hooks_on_the_bare_model,
    "text": images.test_text_before_the_image_equals_the_bare_model,
    "runs": paths.test_path_with_another_rule_and_a_derived_run_equal_hooks,
}


@pytest.mark.parametrize("case", some(CASES, ["rules"]))
def test_rows_that_share_tokens_equal_hooks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    CASES[case]()


def count_tokens(rule: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the tokens of each block for which queries are computed."""
    loaded()  # its checks compute tokens too
    counts = Counter[str]()
    attention = ("self_attn", "cross_attn", "self_attn", "cross_attn")
    modules = [f"{block_at(n)}.{name}.q_proj" for n, name in enumerate(attention)]
    weights = {id(bare().get_submodule(path).weight): path for path in modules}
    linear = torch.nn.functional.linear

    def look(given: Any, weight: Any, bias: Any = None) -> Any:
        if id(weight) in weights:
            counts[weights[id(weight)]] += given.shape[:-1].numel()
        return linear(given, weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", look)
        run_text(experiment("e", "from clean into changed", rule))
    return counts


def test_tokens_before_a_write_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs have 4 prompts of 10, 11, 10 and 13 tokens, and the pass 13 columns. Four rows of a
    prompt change the last token in block 0, and four in block 2."""
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    rule = "patch z layer * head * at last token"
    shared = count_tokens(rule, monkeypatch)
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1 << 30)
    alone = count_tokens(rule, monkeypatch)
    plain, rows = 2 * 4 * 13, 4 * 4
    assert set(alone.values()) == {plain + 2 * rows * 13}
    before, padding = 9 + 10 + 9 + 12, 3 + 2 + 3
    early, late = 4 * 13 + rows, before + padding + 2 * rows
    assert [*shared.values()] == [plain + early] * 2 + [plain + late] * 2


def planned_share(plan: Plan) -> float:
    """The planned multiply-adds of a run over the counted ones."""
    bare().set_attn_implementation("eager")  # the counter leaves out other kernels
    try:
        with FlopCounterMode(display=False) as counter:
            execute(plan, {"m": loaded()}, None, check=check_denominators)
    finally:
        bare().set_attn_implementation("sdpa")
    return plan_cost(plan).planned.multiply_adds / (counter.get_total_flops() / 2)


@pytest.mark.parametrize(
    "rule",
    some(
        (
            "patch z layer * head * at last token",
            "ablate mlp_out layer * at each what token with zero",
            "ablate v cross layer * head * at photo row 1 col 2 token with zero",
        ),
        ["patch z layer * head * at last token"],
    ),
)
def test_planned_cost_of_shared_rows_is_near_the_counted_products(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MIN_SHARED_TOKENS", 1)
    monkeypatch.setattr(model_inputs, "ATTENDED_MAPS", WeakKeyDictionary())
    text = experiment("e", "from clean into changed", rule)
    checked = check_file(text, folder(), loaded(), BLOCK)
    plan = make_plan(checked.experiments)
    for run in ("clean", "changed"):
        provide_images(loaded(), checked.experiments[0].table.runs[run].rows)
    assert 0.7 < planned_share(plan) < 1.3
